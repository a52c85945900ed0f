//! A network for users without rights: Ethernet frames on a descriptor, the host's own sockets on the other side.
//!
//! The guest is alone on a small IPv4 network with a gateway that answers ARP, DHCP and ping, forwards DNS to the host's
//! resolver, and makes each TCP connection, UDP flow and ping of the guest one of this process's. The TCP towards the guest
//! is smoltcp's. Everything is on one thread, by poll(2).

mod echo;
mod flow;
mod forward;
mod fragments;
mod frame;
mod offload;

use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::address::{Mac, Subnet};
use crate::dhcp::{self, Lease};
use crate::error::{Context, Error, Result};
use echo::Echoes;
use flow::{TcpFlows, UdpFlows};
use forward::UdpForwards;
use fragments::Fragments;
use frame::{Frame, Transport};

/// The guest's side of the network. The default is the one users of other user-mode stacks know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserConfig {
    /// The guest's address with the prefix length.
    pub guest: Subnet,
    pub gateway: Ipv4Addr,
    /// The guest's MAC address; DHCP answers no other.
    pub mac: Mac,
    pub hostname: String,
    /// Whether the gateway's address leads to the host's own 127.0.0.1. Off: a guest shall not see what the user's own
    /// services say to the user only.
    pub host_loopback: bool,
    /// Host addresses that lead to TCP ports of the guest.
    pub forwards: Vec<(SocketAddr, u16)>,
    /// The same for UDP.
    pub udp_forwards: Vec<(SocketAddr, u16)>,
    /// What is before each frame on the link.
    pub header: Header,
    /// TCP connections, and UDP flows, at once.
    pub most_flows: usize,
}

/// What is before each frame on the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Header {
    /// Nothing.
    #[default]
    None,
    /// The 10 bytes of `virtio_net_hdr` (virtio 1.2 section 5.1.6): a frame may hold a TCP stream's bytes of many segments, and a
    /// checksum may be left to who sends it on.
    Virtio,
}

impl Header {
    const fn length(self) -> usize {
        match self {
            Header::None => 0,
            Header::Virtio => offload::HEADER,
        }
    }
}

impl UserConfig {
    /// 10.0.2.15/24 behind 10.0.2.2.
    pub fn new(mac: Mac) -> UserConfig {
        UserConfig {
            guest: Subnet::new(Ipv4Addr::new(10, 0, 2, 15).into(), 24).expect("24 is short"),
            gateway: Ipv4Addr::new(10, 0, 2, 2),
            mac,
            hostname: "machine".into(),
            host_loopback: false,
            forwards: Vec::new(),
            udp_forwards: Vec::new(),
            header: Header::None,
            most_flows: 1024,
        }
    }

    fn guest_v4(&self) -> Option<Ipv4Addr> {
        match self.guest.address() {
            std::net::IpAddr::V4(v4) => Some(v4),
            std::net::IpAddr::V6(_) => None,
        }
    }
}

/// A running user-mode network; it ends when dropped.
#[derive(Debug)]
pub struct UserNet {
    stop: Arc<OwnedFd>,
    thread: Option<thread::JoinHandle<()>>,
    /// Where the forwarded ports really are, in the order asked: port 0 was chosen by the kernel.
    pub forwards: Vec<SocketAddr>,
    pub udp_forwards: Vec<SocketAddr>,
}

impl UserNet {
    /// Serves the frames of `link`, one per read or write: a datagram or seqpacket socket, or a tap.
    ///
    /// # Errors
    /// A configuration that makes no sense, and forwarded ports that are taken.
    pub fn spawn(link: OwnedFd, config: UserConfig) -> Result<UserNet> {
        UserNet::spawn_with(link, config, || {})
    }

    /// [`UserNet::spawn`] with what the network's thread does first, as confining itself.
    ///
    /// # Errors
    /// As [`UserNet::spawn`].
    pub fn spawn_with(link: OwnedFd, config: UserConfig, first: fn()) -> Result<UserNet> {
        let guest = config
            .guest_v4()
            .ok_or_else(|| Error::invalid("the guest needs an IPv4 address"))?;
        let gateway_inside = config.guest.contains(config.gateway.into());
        if !gateway_inside || guest == config.gateway || config.guest.prefix() > 30 {
            return Err(Error::invalid(format!(
                "gateway {} does not fit {}",
                config.gateway, config.guest
            )));
        }
        rustix::io::ioctl_fionbio(&link, true).context(|| "setting up the link".into())?;
        let tcp = TcpFlows::new(&config, guest)?;
        let forwards = tcp.listening();
        let inbound = UdpForwards::new(&config.udp_forwards)?;
        let udp_forwards = inbound.listening();
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let stop = Arc::new(stop.context(|| "making an eventfd".into())?);
        let stopped = Arc::clone(&stop);
        let most_flows = config.most_flows;
        let longest = match config.header {
            Header::None => 1500,
            // What carries whole streams carries a whole datagram.
            Header::Virtio => 65_535,
        };
        let mut state = State {
            link,
            guest,
            config,
            tcp,
            udp: UdpFlows::new(most_flows, longest),
            inbound,
            echoes: Echoes::default(),
            fragments: Fragments::default(),
        };
        let thread = thread::Builder::new()
            .name("berth-usernet".into())
            .spawn(move || {
                first();
                if let Err(error) = state.run(stopped.as_fd()) {
                    tracing::warn!(%error, "a user-mode network ended");
                }
            })
            .context(|| "starting a thread".into())?;
        Ok(UserNet {
            stop,
            thread: Some(thread),
            forwards,
            udp_forwards,
        })
    }

    /// Waits until it ends by itself, which is when its link does.
    pub fn wait(mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for UserNet {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct State {
    link: OwnedFd,
    guest: Ipv4Addr,
    config: UserConfig,
    tcp: TcpFlows,
    udp: UdpFlows,
    inbound: UdpForwards,
    echoes: Echoes,
    fragments: Fragments,
}

impl State {
    fn run(&mut self, stop: BorrowedFd<'_>) -> io::Result<()> {
        let header = self.config.header.length();
        // A frame of the longest packet.
        let mut buffer = vec![0u8; header + 14 + 65_536];
        loop {
            let wait = self.tcp.delay().min(Duration::from_secs(5));
            let link_ended = {
                let mut fds = vec![
                    PollFd::from_borrowed_fd(stop, PollFlags::IN),
                    PollFd::new(&self.link, PollFlags::IN),
                ];
                self.tcp.interests(&mut fds);
                self.udp.interests(&mut fds);
                self.inbound.interests(&mut fds);
                self.echoes.interests(&mut fds);
                let timeout = Timespec {
                    tv_sec: wait.as_secs().cast_signed(),
                    tv_nsec: i64::from(wait.subsec_nanos()),
                };
                match poll(&mut fds, Some(&timeout)) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
                if fds[0].revents().intersects(PollFlags::IN) {
                    return Ok(());
                }
                let ended = PollFlags::HUP | PollFlags::ERR;
                fds[1].revents().intersects(ended) && !fds[1].revents().intersects(PollFlags::IN)
            };
            if link_ended {
                return Ok(());
            }
            // A busy guest does not starve the sockets.
            for _ in 0..256 {
                match rustix::io::read(&self.link, &mut buffer[..]) {
                    Ok(0) => return Ok(()),
                    Ok(length) => {
                        if let Some((header, frame)) = buffer[..length].split_at_checked(header) {
                            self.receive(offload::datagrams_of(header), frame);
                        }
                    }
                    Err(rustix::io::Errno::AGAIN) => break,
                    // A packet whose kind the kernel has no header for.
                    Err(rustix::io::Errno::INVAL) if header > 0 => {}
                    Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            for reply in self.udp.receive(Instant::now()) {
                let (from, to) = (reply.from, reply.to);
                self.send(frame::udp(
                    self.ethernet(),
                    from,
                    (self.guest, to),
                    &reply.data,
                ));
            }
            for arrived in self.inbound.receive(Instant::now()) {
                let from = (self.config.gateway, arrived.from);
                let to = (self.guest, arrived.to);
                self.send(frame::udp(self.ethernet(), from, to, &arrived.data));
            }
            for (from, data) in self.echoes.receive(Instant::now()) {
                self.send(frame::echo_reply(self.ethernet(), from, self.guest, &data));
            }
            self.tcp.pump();
            while let Some(packet) = self.tcp.outgoing() {
                self.send_tcp(packet);
            }
        }
    }

    /// The guest's MAC address and ours.
    fn ethernet(&self) -> (Mac, Mac) {
        (self.config.mac, Mac::of_v4(self.config.gateway))
    }

    fn send(&self, frame: Vec<u8>) {
        let header = [0; offload::HEADER];
        self.write(&header, &frame);
    }

    /// Sends one frame, after its header where the link has them.
    fn write(&self, header: &[u8; offload::HEADER], frame: &[u8]) {
        let header = &header[..self.config.header.length()];
        // A full link loses frames, as Ethernet does.
        let _ = rustix::io::writev(&self.link, &[IoSlice::new(header), IoSlice::new(frame)]);
    }

    /// Sends a packet of smoltcp's.
    fn send_tcp(&self, mut packet: Vec<u8>) {
        if self.config.header == Header::None {
            self.send(frame::ethernet(self.ethernet(), frame::IPV4, &packet));
            return;
        }
        let segment = self.tcp.segment_of(&packet);
        let header = offload::leave_checksum(&mut packet, segment);
        let frame = frame::ethernet(self.ethernet(), frame::IPV4, &packet);
        self.write(&header, &frame);
    }

    /// `datagrams`: into how many bytes each a UDP packet is to be cut, where it is several.
    fn receive(&mut self, datagrams: Option<usize>, bytes: &[u8]) {
        if fragments::is_one(bytes) {
            if let Some(whole) = self.fragments.add(bytes, Instant::now()) {
                self.receive(None, &whole);
            }
            return;
        }
        match Frame::parse(bytes) {
            // All the network but the guest is the gateway.
            Some(Frame::Arp { sender, asked })
                if asked != self.guest && self.config.guest.contains(asked.into()) =>
            {
                self.send(frame::arp_reply(self.ethernet(), asked, sender));
            }
            Some(Frame::Ipv4 {
                source,
                destination,
                transport,
                packet,
            }) => {
                if let (
                    Some(size),
                    Transport::Udp {
                        source_port,
                        destination_port,
                        data,
                    },
                ) = (datagrams, &transport)
                {
                    for data in data.chunks(size) {
                        let transport = Transport::Udp {
                            source_port: *source_port,
                            destination_port: *destination_port,
                            data,
                        };
                        self.route(source, destination, transport, packet);
                    }
                    return;
                }
                self.route(source, destination, transport, packet);
            }
            _ => {}
        }
    }

    fn route(
        &mut self,
        source: Ipv4Addr,
        destination: Ipv4Addr,
        transport: Transport<'_>,
        packet: &[u8],
    ) {
        if let Transport::Udp {
            destination_port: 67,
            data,
            ..
        } = transport
        {
            let lease = Lease {
                address: self.config.guest,
                router: Some(self.config.gateway),
                hostname: self.config.hostname.clone(),
                mtu: None,
            };
            if let Some(reply) = dhcp::answer(data, self.config.mac, &lease, self.config.gateway) {
                let from = (self.config.gateway, 67);
                self.send(frame::udp(
                    self.ethernet(),
                    from,
                    (Ipv4Addr::BROADCAST, 68),
                    &reply,
                ));
            }
            return;
        }
        if source != self.guest {
            return;
        }
        match transport {
            Transport::Echo { data } if destination == self.config.gateway => {
                let (guest, gateway) = (self.guest, destination);
                self.send(frame::echo_reply(self.ethernet(), gateway, guest, data));
            }
            Transport::Echo { data } if self.target(destination, 1, false).is_some() => {
                self.echoes.send(destination, data);
            }
            Transport::Udp {
                source_port,
                destination_port,
                data,
            } if destination == self.config.gateway
                && self.inbound.answer(destination_port, source_port, data) => {}
            Transport::Udp {
                source_port,
                destination_port,
                data,
            } => {
                if let Some(target) = self.target(destination, destination_port, true) {
                    self.udp
                        .send((source_port, (destination, destination_port)), target, data);
                }
            }
            Transport::Tcp {
                source_port,
                destination_port,
                opens,
            } => {
                let target = self.target(destination, destination_port, false);
                self.tcp.receive(
                    (source_port, (destination, destination_port)),
                    target,
                    opens,
                    packet,
                );
            }
            _ => {}
        }
    }

    /// Where on the host's side an address of the guest's view is; `None` for what it may not reach.
    fn target(&self, address: Ipv4Addr, port: u16, udp: bool) -> Option<SocketAddr> {
        if address == self.config.gateway {
            if port == 53 {
                return flow::resolver();
            }
            return self
                .config
                .host_loopback
                .then(|| (Ipv4Addr::LOCALHOST, port).into());
        }
        let bad = address.is_loopback()
            || address.is_unspecified()
            || address.is_multicast()
            || address.is_broadcast()
            || self.config.guest.contains(address.into())
            || (udp && port == 0);
        (!bad).then(|| (address, port).into())
    }
}

/// Entry for fuzzing: any bytes as a frame of the guest. Nothing is sent to the host's network.
pub fn fuzz_user_frame(data: &[u8]) {
    let _ = Frame::parse(data);
    if fragments::is_one(data) {
        let mut fragments = Fragments::default();
        let whole = fragments.add(data, Instant::now());
        let _ = whole.as_deref().map(Frame::parse);
    }
    if let Some((header, packet)) = data.split_at_checked(offload::HEADER) {
        let _ = offload::datagrams_of(header);
        let mut packet = packet.to_vec();
        let _ = offload::raise_segment(&mut packet, 9000);
        let _ = offload::leave_checksum(&mut packet, 1460);
    }
}

#[cfg(test)]
mod tests;
