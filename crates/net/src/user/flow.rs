//! The guest's TCP connections and UDP flows as sockets of the host.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr, IpListenEndpoint};

use super::{Header, UserConfig, offload};
use crate::error::{Context, Result};

/// The guest's port, and the address and port it calls.
pub(super) type Key = (u16, (Ipv4Addr, u16));

const UDP_SILENCE: Duration = Duration::from_secs(90);
const BUFFER: usize = 128 * 1024;
/// Of a link that takes many segments at once, to the guest.
const LONG_BUFFER: usize = 512 * 1024;
const MTU: usize = 1500;
/// Datagrams taken of one socket in a row: a busy one does not keep the others waiting.
pub(super) const AT_ONCE: usize = 64;
/// The longest packet, and the largest segment in it.
const LONG_MTU: usize = 65_535;
const LONG_SEGMENT: u16 = 65_495;

/// The first resolver of the host.
pub(super) fn resolver() -> Option<SocketAddr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    crate::resolv::name_servers(&text)
        .first()
        .map(|server| SocketAddr::new(*server, 53))
}

pub(super) struct UdpFlows {
    flows: HashMap<Key, UdpFlow>,
    most: usize,
    buffer: Vec<u8>,
}

struct UdpFlow {
    socket: UdpSocket,
    used: Instant,
}

/// A datagram for the guest.
pub(super) struct Reply {
    pub from: (Ipv4Addr, u16),
    /// The guest's port.
    pub to: u16,
    pub data: Vec<u8>,
}

impl UdpFlows {
    /// `longest`: bytes of a packet for the guest.
    pub(super) fn new(most: usize, longest: usize) -> UdpFlows {
        UdpFlows {
            flows: HashMap::new(),
            most,
            // One more, to know what is too long.
            buffer: vec![0; longest - 28 + 1],
        }
    }

    pub(super) fn send(&mut self, key: Key, target: SocketAddr, data: &[u8]) {
        let now = Instant::now();
        if !self.flows.contains_key(&key) {
            if self.flows.len() >= self.most {
                let oldest = self
                    .flows
                    .iter()
                    .min_by_key(|(_, flow)| flow.used)
                    .map(|(key, _)| *key);
                self.flows.remove(&oldest.expect("there are many"));
            }
            let opened = (|| {
                let any = if target.is_ipv4() {
                    "0.0.0.0:0"
                } else {
                    "[::]:0"
                };
                let socket = UdpSocket::bind(any)?;
                socket.set_nonblocking(true)?;
                socket.connect(target)?;
                Ok::<_, io::Error>(socket)
            })();
            let Ok(socket) = opened else { return };
            self.flows.insert(key, UdpFlow { socket, used: now });
        }
        if let Some(flow) = self.flows.get_mut(&key) {
            flow.used = now;
            let _ = flow.socket.send(data);
        }
    }

    pub(super) fn interests<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        fds.extend(
            self.flows
                .values()
                .map(|flow| PollFd::new(&flow.socket, PollFlags::IN)),
        );
    }

    /// What arrived since and fits.
    pub(super) fn receive(&mut self, now: Instant) -> Vec<Reply> {
        let mut replies = Vec::new();
        let buffer = &mut self.buffer;
        self.flows.retain(|key, flow| {
            for _ in 0..AT_ONCE {
                let Ok(length) = flow.socket.recv(buffer) else {
                    break;
                };
                flow.used = now;
                if length < buffer.len() {
                    replies.push(Reply {
                        from: key.1,
                        to: key.0,
                        data: buffer[..length].to_vec(),
                    });
                }
            }
            now.duration_since(flow.used) < UDP_SILENCE
        });
        replies
    }
}

/// smoltcp's view of the link: IP packets in two queues.
#[derive(Default)]
struct Queues {
    incoming: VecDeque<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
    header: Header,
}

struct Incoming(Vec<u8>);
struct Outgoing<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut packet = vec![0; length];
        let result = f(&mut packet);
        self.0.push_back(packet);
        result
    }
}

impl Device for Queues {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Incoming, Outgoing<'_>)> {
        let packet = self.incoming.pop_front()?;
        Some((Incoming(packet), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Outgoing<'_>> {
        Some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        match self.header {
            Header::None => capabilities.max_transmission_unit = MTU,
            Header::Virtio => {
                capabilities.max_transmission_unit = LONG_MTU;
                capabilities.checksum.tcp = Checksum::None;
            }
        }
        capabilities
    }
}

pub(super) struct TcpFlows {
    queues: Queues,
    interface: Interface,
    sockets: SocketSet<'static>,
    flows: HashMap<Key, Flow>,
    listeners: Vec<(TcpListener, u16)>,
    guest: Ipv4Addr,
    gateway: Ipv4Addr,
    next_port: u16,
    most: usize,
}

struct Flow {
    host: TcpStream,
    stage: Stage,
    /// The host's side has sent its end.
    host_ended: bool,
    /// The guest's end was passed on.
    guest_ended: bool,
    /// Bytes of the guest that the host's socket did not take yet.
    can_write: bool,
    /// The largest segment the guest takes, where longer packets are cut on the way; else 0.
    segment: u16,
}

enum Stage {
    /// The host's socket connects; the guest's SYN waits.
    Connecting(Vec<u8>, Instant),
    Open(SocketHandle),
}

impl TcpFlows {
    pub(super) fn new(config: &UserConfig, guest: Ipv4Addr) -> Result<TcpFlows> {
        let mut listeners = Vec::new();
        for (address, port) in &config.forwards {
            let listener =
                TcpListener::bind(address).context(|| format!("forwarding {address}"))?;
            listener
                .set_nonblocking(true)
                .context(|| format!("forwarding {address}"))?;
            listeners.push((listener, *port));
        }
        let mut queues = Queues {
            header: config.header,
            ..Queues::default()
        };
        let now = now();
        let mut setup = Config::new(HardwareAddress::Ip);
        let mut seed = [0u8; 8];
        getrandom::fill(&mut seed).expect("the kernel's random source answers");
        setup.random_seed = u64::from_ne_bytes(seed);
        let mut interface = Interface::new(setup, &mut queues, now);
        interface.update_ip_addrs(|addresses| {
            let own = IpCidr::new(IpAddress::Ipv4(config.gateway), config.guest.prefix());
            addresses.push(own).expect("there is room for one");
        });
        // Every address is ours, so that the guest may call any.
        interface.set_any_ip(true);
        interface
            .routes_mut()
            .add_default_ipv4_route(config.gateway)
            .expect("there is room for one");
        Ok(TcpFlows {
            queues,
            interface,
            sockets: SocketSet::new(Vec::new()),
            flows: HashMap::new(),
            listeners,
            guest,
            gateway: config.gateway,
            next_port: 49_152,
            most: config.most_flows,
        })
    }

    pub(super) fn listening(&self) -> Vec<SocketAddr> {
        self.listeners
            .iter()
            .filter_map(|(listener, _)| listener.local_addr().ok())
            .collect()
    }

    /// A segment of the guest.
    pub(super) fn receive(
        &mut self,
        key: Key,
        target: Option<SocketAddr>,
        opens: bool,
        packet: &[u8],
    ) {
        match self.flows.get(&key) {
            // A repeated SYN, while the host still connects.
            Some(Flow {
                stage: Stage::Connecting(..),
                ..
            }) => return,
            Some(_) => {}
            None if opens && self.flows.len() < self.most => {
                if let Some(Ok(host)) = target.map(connect) {
                    let stage = Stage::Connecting(packet.to_vec(), Instant::now());
                    let flow = Flow {
                        host,
                        stage,
                        host_ended: false,
                        guest_ended: false,
                        can_write: false,
                        segment: 0,
                    };
                    self.flows.insert(key, flow);
                    return;
                }
            }
            None => {}
        }
        // With no socket for it, smoltcp answers with a reset.
        self.queues.incoming.push_back(packet.to_vec());
    }

    /// How long nothing is due.
    pub(super) fn delay(&mut self) -> Duration {
        if !self.queues.incoming.is_empty() {
            return Duration::ZERO;
        }
        let delay = self.interface.poll_delay(now(), &self.sockets);
        delay.map_or(Duration::from_secs(5), Into::into)
    }

    pub(super) fn interests<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        // Those that cannot be accepted wait.
        if self.flows.len() < self.most {
            fds.extend(
                self.listeners
                    .iter()
                    .map(|(listener, _)| PollFd::new(listener, PollFlags::IN)),
            );
        }
        for flow in self.flows.values() {
            let mut wanted = PollFlags::empty();
            match &flow.stage {
                Stage::Connecting(..) => wanted |= PollFlags::OUT,
                Stage::Open(handle) => {
                    let socket = self.sockets.get::<tcp::Socket>(*handle);
                    if !flow.host_ended && socket.can_send() {
                        wanted |= PollFlags::IN;
                    }
                    if socket.can_recv() && !flow.can_write {
                        wanted |= PollFlags::OUT;
                    }
                }
            }
            if !wanted.is_empty() {
                fds.push(PollFd::new(&flow.host, wanted));
            }
        }
    }

    /// Into how long segments a packet for the guest is cut on the way; 0 where it is not.
    pub(super) fn segment_of(&self, packet: &[u8]) -> u16 {
        let port = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
        if packet.len() < 40 {
            return 0;
        }
        let from = Ipv4Addr::new(packet[12], packet[13], packet[14], packet[15]);
        let flow = self.flows.get(&(port(22), (from, port(20))));
        flow.map_or(0, |flow| flow.segment)
    }

    pub(super) fn outgoing(&mut self) -> Option<Vec<u8>> {
        self.queues.outgoing.pop_front()
    }

    /// Moves everything that can move.
    pub(super) fn pump(&mut self) {
        self.accept();
        self.finish_connecting();
        self.poll();
        let mut done = Vec::new();
        for (key, flow) in &mut self.flows {
            let Stage::Open(handle) = flow.stage else {
                continue;
            };
            let socket = self.sockets.get_mut::<tcp::Socket>(handle);
            if let Err(error) = relay(flow, socket) {
                tracing::trace!(%error, "a connection of the guest broke");
                socket.abort();
            }
            if socket.state() == tcp::State::Closed {
                done.push((*key, handle));
            }
        }
        // Sends what was taken over, resets included, before the sockets go.
        self.poll();
        for (key, handle) in done {
            self.flows.remove(&key);
            self.sockets.remove(handle);
        }
    }

    fn poll(&mut self) {
        let now = now();
        self.interface
            .poll(now, &mut self.queues, &mut self.sockets);
    }

    fn accept(&mut self) {
        for index in 0..self.listeners.len() {
            while self.flows.len() < self.most {
                let Ok((host, _)) = self.listeners[index].0.accept() else {
                    break;
                };
                if host.set_nonblocking(true).is_err() {
                    continue;
                }
                let _ = host.set_nodelay(true);
                let guest_port = self.listeners[index].1;
                let Some(own) = self.free_port(guest_port) else {
                    break;
                };
                let mut socket = new_socket(self.queues.header);
                let to = (IpAddress::Ipv4(self.guest), guest_port);
                let from = (IpAddress::Ipv4(self.gateway), own);
                if socket.connect(self.interface.context(), to, from).is_err() {
                    continue;
                }
                let stage = Stage::Open(self.sockets.add(socket));
                let flow = Flow {
                    host,
                    stage,
                    host_ended: false,
                    guest_ended: false,
                    can_write: true,
                    segment: 0,
                };
                self.flows.insert((guest_port, (self.gateway, own)), flow);
            }
        }
    }

    fn free_port(&mut self, guest_port: u16) -> Option<u16> {
        for _ in 0..16_384 {
            let port = self.next_port;
            self.next_port = if port == u16::MAX { 49_152 } else { port + 1 };
            if !self.flows.contains_key(&(guest_port, (self.gateway, port))) {
                return Some(port);
            }
        }
        None
    }

    fn finish_connecting(&mut self) {
        let mut failed = Vec::new();
        let mut connected = Vec::new();
        for (key, flow) in &self.flows {
            let Stage::Connecting(_, since) = &flow.stage else {
                continue;
            };
            match flow.host.take_error() {
                Ok(None) if flow.host.peer_addr().is_ok() => connected.push(*key),
                Ok(None) if since.elapsed() < Duration::from_secs(60) => {}
                _ => failed.push(*key),
            }
        }
        for key in failed {
            if let Some(Flow {
                stage: Stage::Connecting(syn, _),
                ..
            }) = self.flows.remove(&key)
            {
                // Nobody listens: refused.
                self.queues.incoming.push_back(syn);
            }
        }
        for key in connected {
            let Some(flow) = self.flows.get_mut(&key) else {
                continue;
            };
            let mut socket = new_socket(self.queues.header);
            let (address, port) = key.1;
            let at = IpListenEndpoint {
                addr: Some(IpAddress::Ipv4(address)),
                port,
            };
            if socket.listen(at).is_err() {
                continue; // port 0, which nobody connects to
            }
            let _ = flow.host.set_nodelay(true);
            let stage = Stage::Open(self.sockets.add(socket));
            flow.can_write = true;
            if let Stage::Connecting(mut syn, _) = std::mem::replace(&mut flow.stage, stage) {
                if self.queues.header == Header::Virtio {
                    flow.segment = offload::raise_segment(&mut syn, LONG_SEGMENT);
                }
                self.queues.incoming.push_back(syn);
            }
            // At once, so that this listening socket takes this SYN and no other.
            let now = now();
            self.interface
                .poll(now, &mut self.queues, &mut self.sockets);
        }
    }
}

/// smoltcp's time, by the monotonic clock: the host's may jump.
fn now() -> smoltcp::time::Instant {
    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    smoltcp::time::Instant::from_micros(START.elapsed().as_micros() as i64)
}

fn new_socket(header: Header) -> tcp::Socket<'static> {
    let buffer = |size| tcp::SocketBuffer::new(vec![0; size]);
    let mut socket = match header {
        Header::None => tcp::Socket::new(buffer(BUFFER), buffer(BUFFER)),
        Header::Virtio => tcp::Socket::new(buffer(2 * BUFFER), buffer(LONG_BUFFER)),
    };
    socket.set_nagle_enabled(false);
    socket.set_timeout(Some(smoltcp::time::Duration::from_secs(120)));
    socket.set_keep_alive(Some(smoltcp::time::Duration::from_secs(60)));
    socket
}

/// A socket that is about to be connected.
fn connect(target: SocketAddr) -> io::Result<TcpStream> {
    let family = if target.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &target) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    let _ = sockopt::set_socket_keepalive(socket.as_fd(), true);
    Ok(socket.into())
}

/// Copies in both directions until one of them blocks.
fn relay(flow: &mut Flow, socket: &mut tcp::Socket<'_>) -> io::Result<()> {
    while !flow.host_ended && socket.can_send() {
        let mut read = Ok(0);
        let sent = socket.send(|room| {
            read = flow.host.read(room);
            (*read.as_ref().unwrap_or(&0), ())
        });
        match read {
            Ok(0) => {
                flow.host_ended = true;
                socket.close();
            }
            Ok(_) if sent.is_ok() => {}
            Ok(_) => return Err(io::Error::other("the guest's side takes nothing more")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    flow.can_write = true;
    while socket.can_recv() && flow.can_write {
        let mut result = Ok(());
        let received = socket.recv(|data| match flow.host.write(data) {
            Ok(length) => (length, ()),
            Err(error) => {
                result = Err(error);
                (0, ())
            }
        });
        match result {
            Ok(()) if received.is_ok() => {}
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => flow.can_write = false,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let guest_done = matches!(
        socket.state(),
        tcp::State::CloseWait | tcp::State::LastAck | tcp::State::Closing | tcp::State::TimeWait
    );
    if guest_done && !socket.can_recv() && !flow.guest_ended {
        flow.guest_ended = true;
        let _ = flow.host.shutdown(Shutdown::Write);
    }
    Ok(())
}
