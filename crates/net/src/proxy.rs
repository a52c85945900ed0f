//! A small proxy for published ports, for what packet rewriting cannot serve: connections to `::1`, IPv6 to a
//! container with IPv4 only, and a table that someone flushed.

mod relay;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use crate::endpoint::Protocol;

/// Connections at once per port; more wait in the kernel's queue.
const MOST: usize = 1024;
/// A UDP sender that is silent for so long is forgotten.
const UDP_SILENCE: Duration = Duration::from_secs(90);
/// What a datagram waits for room, before it is dropped.
const UDP_SEND: Duration = Duration::from_millis(100);

/// Serves until dropped; connections already made go on.
pub(crate) struct Proxy(JoinHandle<()>);

/// How long an end may take: a thread of the runtime drops the socket.
const END: Duration = Duration::from_secs(1);

impl Drop for Proxy {
    /// Returns when the port is free for the next.
    fn drop(&mut self) {
        self.0.abort();
        let begun = Instant::now();
        while !self.0.is_finished() && begun.elapsed() < END {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// Serves the bound (TCP: listening), non-blocking `socket` by connections to `target`.
pub(crate) fn start(
    runtime: &Handle,
    socket: OwnedFd,
    protocol: Protocol,
    target: SocketAddr,
) -> io::Result<Proxy> {
    let _entered = runtime.enter();
    Ok(Proxy(match protocol {
        Protocol::Udp => {
            let socket = UdpSocket::from_std(socket.into())?;
            runtime.spawn(udp(socket, target))
        }
        _ => {
            let listener = TcpListener::from_std(socket.into())?;
            runtime.spawn(tcp(listener, target))
        }
    }))
}

async fn tcp(listener: TcpListener, target: SocketAddr) {
    let room = Arc::new(Semaphore::new(MOST));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((outside, _)) => {
                tokio::spawn(async move {
                    let _permit = permit;
                    let inside = timeout(Duration::from_secs(10), TcpStream::connect(target)).await;
                    if let Ok(Ok(inside)) = inside {
                        let _ = outside.set_nodelay(true);
                        let _ = inside.set_nodelay(true);
                        let _ = relay::both_ways(&outside, &inside).await;
                    }
                });
            }
            // Out of descriptors, or the peer left: not a reason to end.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn udp(socket: UdpSocket, target: SocketAddr) {
    let socket = Arc::new(socket);
    // They end with this.
    let mut answering = JoinSet::new();
    let mut senders: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut buffer = vec![0; 65536];
    loop {
        tokio::select! {
            Some(Ok(sender)) = answering.join_next() => { senders.remove(&sender); }
            received = socket.recv_from(&mut buffer) => {
                let Ok((length, sender)) = received else { continue };
                if !senders.contains_key(&sender) {
                    if senders.len() >= MOST {
                        continue;
                    }
                    let Ok(inside) = connect_udp(target).await else { continue };
                    let inside = Arc::new(inside);
                    answering.spawn(answers(Arc::downgrade(&socket), Arc::clone(&inside), sender));
                    senders.insert(sender, inside);
                }
                if let Some(inside) = senders.get(&sender) {
                    // A new socket is not known to be writable yet: its first datagram must not be lost.
                    let _ = timeout(UDP_SEND, inside.send(&buffer[..length])).await;
                }
            }
        }
    }
}

async fn connect_udp(target: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = if target.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(target).await?;
    Ok(socket)
}

/// Carries answers to `sender`, who is returned after a silence. The outside is not held: with the proxy's end its port is free.
async fn answers(
    outside: Weak<UdpSocket>,
    inside: Arc<UdpSocket>,
    sender: SocketAddr,
) -> SocketAddr {
    let mut buffer = vec![0; 65536];
    while let Ok(Ok(length)) = timeout(UDP_SILENCE, inside.recv(&mut buffer)).await {
        let Some(outside) = outside.upgrade() else {
            break;
        };
        let _ = outside.send_to(&buffer[..length], sender).await;
    }
    sender
}

/// A bound socket, listening where the protocol listens. IPv6 ones take no IPv4.
pub(crate) fn listen(address: SocketAddr, protocol: Protocol) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let (kind, number) = match protocol {
        Protocol::Tcp => (SocketType::STREAM, ipproto::TCP),
        Protocol::Udp => (SocketType::DGRAM, ipproto::UDP),
        Protocol::Sctp => (SocketType::STREAM, ipproto::SCTP),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, kind, flags, Some(number))?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if protocol != Protocol::Udp {
        // Connections of the former holder that linger do not keep the port.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    if protocol != Protocol::Udp {
        rustix::net::listen(&socket, 1024)?;
    }
    Ok(socket)
}

/// The port a socket is bound to.
pub(crate) fn bound_port(socket: &OwnedFd) -> io::Result<u16> {
    let address = rustix::net::getsockname(socket)?;
    Ok(SocketAddr::try_from(address)?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_of_a_dropped_udp_proxy_is_free_at_once_though_it_had_senders() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let socket = |address| {
            let socket = std::net::UdpSocket::bind(address).unwrap();
            socket
                .set_read_timeout(Some(Duration::from_secs(60)))
                .unwrap();
            socket
        };
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let (target, sender, outside) = (socket(any), socket(any), socket(any));
        outside.set_nonblocking(true).unwrap();
        let (inside, address) = (target.local_addr().unwrap(), outside.local_addr().unwrap());
        let proxy = start(runtime.handle(), outside.into(), Protocol::Udp, inside).unwrap();
        let mut word = [0; 4];
        sender.send_to(b"ping", address).unwrap();
        let (_, by) = target.recv_from(&mut word).unwrap();
        target.send_to(b"pong", by).unwrap();
        sender.recv(&mut word).unwrap();
        assert_eq!(&word, b"pong");
        drop(proxy);
        socket(address);
    }
}
