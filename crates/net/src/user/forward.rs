//! UDP ports of the host that lead to the guest. Each peer is shown to the guest as a port of the gateway.

use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::error::{Context, Result};

const MOST_PEERS: usize = 1024;
const SILENCE: Duration = Duration::from_secs(120);
/// The gateway's ports that stand for peers.
const FIRST_PORT: u16 = 20_000;
const LAST_PORT: u16 = 29_999;
const LARGEST: usize = 1500 - 28;

struct Peer {
    address: SocketAddr,
    listener: usize,
    used: Instant,
}

#[derive(Default)]
pub(super) struct UdpForwards {
    listeners: Vec<(UdpSocket, u16)>,
    /// By the gateway's port.
    peers: HashMap<u16, Peer>,
    next: u16,
}

/// A datagram for the guest.
pub(super) struct Arrived {
    /// The gateway's port that stands for the sender.
    pub from: u16,
    /// The guest's port.
    pub to: u16,
    pub data: Vec<u8>,
}

impl UdpForwards {
    pub(super) fn new(forwards: &[(SocketAddr, u16)]) -> Result<UdpForwards> {
        let mut listeners = Vec::new();
        for (address, port) in forwards {
            let socket =
                UdpSocket::bind(address).context(|| format!("forwarding udp {address}"))?;
            socket
                .set_nonblocking(true)
                .context(|| format!("forwarding udp {address}"))?;
            listeners.push((socket, *port));
        }
        Ok(UdpForwards {
            listeners,
            peers: HashMap::new(),
            next: FIRST_PORT,
        })
    }

    pub(super) fn listening(&self) -> Vec<SocketAddr> {
        self.listeners
            .iter()
            .filter_map(|(socket, _)| socket.local_addr().ok())
            .collect()
    }

    pub(super) fn interests<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        fds.extend(
            self.listeners
                .iter()
                .map(|(socket, _)| PollFd::new(socket, PollFlags::IN)),
        );
    }

    fn port_of(&mut self, listener: usize, address: SocketAddr, now: Instant) -> Option<u16> {
        let known = self
            .peers
            .iter_mut()
            .find(|(_, peer)| peer.listener == listener && peer.address == address);
        if let Some((port, peer)) = known {
            peer.used = now;
            return Some(*port);
        }
        if self.peers.len() >= MOST_PEERS {
            self.peers
                .retain(|_, peer| now.duration_since(peer.used) < SILENCE);
            if self.peers.len() >= MOST_PEERS {
                return None;
            }
        }
        while self.peers.contains_key(&self.next) {
            self.next = if self.next == LAST_PORT {
                FIRST_PORT
            } else {
                self.next + 1
            };
        }
        let peer = Peer {
            address,
            listener,
            used: now,
        };
        self.peers.insert(self.next, peer);
        Some(self.next)
    }

    pub(super) fn receive(&mut self, now: Instant) -> Vec<Arrived> {
        let mut arrived = Vec::new();
        let mut buffer = [0u8; 2048];
        for index in 0..self.listeners.len() {
            for _ in 0..super::flow::AT_ONCE {
                let Ok((length, address)) = self.listeners[index].0.recv_from(&mut buffer) else {
                    break;
                };
                let to = self.listeners[index].1;
                if length <= LARGEST
                    && let Some(from) = self.port_of(index, address, now)
                {
                    arrived.push(Arrived {
                        from,
                        to,
                        data: buffer[..length].to_vec(),
                    });
                }
            }
        }
        arrived
    }

    /// The guest answers a peer by the gateway's port; false where that stands for none.
    pub(super) fn answer(&mut self, gateway_port: u16, guest_port: u16, data: &[u8]) -> bool {
        let Some(peer) = self.peers.get_mut(&gateway_port) else {
            return false;
        };
        let (socket, port) = &self.listeners[peer.listener];
        if *port != guest_port {
            return false;
        }
        peer.used = Instant::now();
        let _ = socket.send_to(data, peer.address);
        true
    }
}
