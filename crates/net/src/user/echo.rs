//! The guest's pings of the world, through the kernel's sockets for that (icmp(7), "ping sockets"), which users may open
//! where `net.ipv4.ping_group_range` has their group.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, ipproto, recv, send,
    socket_with,
};

/// Destination and the guest's identifier.
type Key = (Ipv4Addr, [u8; 2]);

const MOST: usize = 64;
const SILENCE: Duration = Duration::from_secs(30);
/// Type, code and checksum.
const HEAD: usize = 4;

struct Echo {
    socket: OwnedFd,
    used: Instant,
}

#[derive(Default)]
pub(super) struct Echoes {
    open: HashMap<Key, Echo>,
}

fn open(destination: Ipv4Addr) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        flags,
        Some(ipproto::ICMP),
    )?;
    connect(&socket, &SocketAddr::from((destination, 0)))?;
    Ok(socket)
}

impl Echoes {
    /// `data`: identifier, sequence number and payload of the guest's request.
    pub(super) fn send(&mut self, destination: Ipv4Addr, data: &[u8]) {
        let Some(identifier) = data.first_chunk::<2>() else {
            return;
        };
        let key = (destination, *identifier);
        let now = Instant::now();
        if !self.open.contains_key(&key) {
            if self.open.len() >= MOST {
                let oldest = self.open.iter().min_by_key(|(_, echo)| echo.used);
                if let Some(oldest) = oldest.map(|(key, _)| *key) {
                    self.open.remove(&oldest);
                }
            }
            match open(destination) {
                Ok(socket) => {
                    self.open.insert(key, Echo { socket, used: now });
                }
                Err(error) => {
                    tracing::debug!(%error, "the guest's ping is not sent (see net.ipv4.ping_group_range)");
                    return;
                }
            }
        }
        if let Some(echo) = self.open.get_mut(&key) {
            echo.used = now;
            // The kernel puts in its identifier and the checksum.
            let mut request = vec![8, 0, 0, 0];
            request.extend(data);
            let _ = send(&echo.socket, &request, SendFlags::NOSIGNAL);
        }
    }

    pub(super) fn interests<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        fds.extend(
            self.open
                .values()
                .map(|echo| PollFd::new(&echo.socket, PollFlags::IN)),
        );
    }

    /// Who answered, with identifier, sequence number and payload as the guest knows them.
    pub(super) fn receive(&mut self, now: Instant) -> Vec<(Ipv4Addr, Vec<u8>)> {
        let mut replies = Vec::new();
        let mut buffer = [0u8; 2048];
        self.open.retain(|(destination, identifier), echo| {
            for _ in 0..super::flow::AT_ONCE {
                let Ok((length, _)) = recv(&echo.socket, &mut buffer[..], RecvFlags::empty())
                else {
                    break;
                };
                let reply = &buffer[..length.min(buffer.len())];
                // An echo reply, not an error.
                if reply.len() >= HEAD + 4 && reply[0] == 0 {
                    let mut data = identifier.to_vec();
                    data.extend(&reply[HEAD + 2..]);
                    replies.push((*destination, data));
                }
            }
            now.duration_since(echo.used) < SILENCE
        });
        replies
    }
}
