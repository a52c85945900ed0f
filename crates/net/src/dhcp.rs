//! A DHCPv4 server (RFC 2131, 2132) for the machines of one bridge: fixed leases, to MAC addresses we handed out only.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::{Arc, PoisonError, RwLock};

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::net::UdpSocket;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::address::{Mac, Subnet};

/// Seconds. The address is fixed; the lease's end only makes a guest ask for news.
const LEASE: u32 = 12 * 3600;
const MAGIC: [u8; 4] = [99, 130, 83, 99];

/// What one machine is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lease {
    /// The address with its prefix length.
    pub address: Subnet,
    /// Absent on internal networks.
    pub router: Option<Ipv4Addr>,
    pub hostname: String,
    pub mtu: Option<u16>,
}

pub(crate) type Leases = Arc<RwLock<HashMap<Mac, Lease>>>;

/// Serves one bridge until dropped.
pub(crate) struct Server {
    task: JoinHandle<()>,
    pub(crate) leases: Leases,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// `address` is the bridge's own, and the name service's.
    pub(crate) fn start(runtime: &Handle, bridge: &str, address: Ipv4Addr) -> io::Result<Server> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
        // Others may serve other interfaces.
        sockopt::set_socket_reuseaddr(&socket, true)?;
        sockopt::set_socket_broadcast(&socket, true)?;
        bind_to_device(&socket, bridge)?;
        rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 67))?;
        let _entered = runtime.enter();
        let socket = UdpSocket::from_std(socket.into())?;
        let leases = Leases::default();
        let task = runtime.spawn(serve(socket, address, Arc::clone(&leases)));
        Ok(Server { task, leases })
    }
}

pub(crate) fn bind_to_device(socket: &std::os::fd::OwnedFd, name: &str) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let length = name.len() as libc::socklen_t;
    // SAFETY: the pointer and the length are those of `name`, which outlives the call; the kernel copies it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_BINDTODEVICE,
            name.as_ptr().cast(),
            length,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

async fn serve(socket: UdpSocket, address: Ipv4Addr, leases: Leases) {
    let mut buffer = vec![0; 2048];
    loop {
        let Ok((length, _)) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        let Some(request) = Request::parse(&buffer[..length]) else {
            continue;
        };
        let lease = {
            let leases = leases.read().unwrap_or_else(PoisonError::into_inner);
            leases.get(&request.mac).cloned()
        };
        let Some(lease) = lease else { continue };
        if let Some((reply, to)) = request.reply(&lease, address) {
            let _ = socket.send_to(&reply, SocketAddr::from((to, 68))).await;
        }
    }
}

/// A client's message, as far as it matters.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Request {
    kind: u8,
    transaction: [u8; 4],
    seconds_and_flags: [u8; 4],
    mac: Mac,
    /// The address the client already uses, or unspecified.
    client: Ipv4Addr,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

impl Request {
    /// `None` for what is not a request of an Ethernet client on this link.
    fn parse(packet: &[u8]) -> Option<Request> {
        let fixed: &[u8; 240] = packet.first_chunk()?;
        // Of a client, over Ethernet, through no relay.
        if fixed[..3] != [1, 1, 6] || fixed[236..240] != MAGIC || fixed[24..28] != [0; 4] {
            return None;
        }
        let (mut kind, mut requested, mut server) = (None, None, None);
        let mut rest = &packet[240..];
        while let [code, tail @ ..] = rest {
            match code {
                0 => rest = tail,
                255 => break,
                _ => {
                    let (length, tail) = tail.split_first()?;
                    let value = tail.get(..usize::from(*length))?;
                    rest = &tail[usize::from(*length)..];
                    let address = || <[u8; 4]>::try_from(value).ok().map(Ipv4Addr::from);
                    match code {
                        53 => kind = value.first().copied().filter(|_| value.len() == 1),
                        50 => requested = address(),
                        54 => server = address(),
                        _ => {}
                    }
                }
            }
        }
        Some(Request {
            kind: kind?,
            transaction: fixed[4..8].try_into().ok()?,
            seconds_and_flags: fixed[8..12].try_into().ok()?,
            mac: Mac(fixed[28..34].try_into().ok()?),
            client: Ipv4Addr::from(<[u8; 4]>::try_from(&fixed[12..16]).ok()?),
            requested,
            server,
        })
    }

    /// The answer and where it goes; `None` where silence is right.
    fn reply(&self, lease: &Lease, own: Ipv4Addr) -> Option<(Vec<u8>, Ipv4Addr)> {
        let std::net::IpAddr::V4(address) = lease.address.address() else {
            return None;
        };
        let kind = match self.kind {
            DISCOVER => OFFER,
            // RFC 2131 section 4.3.2: another server was chosen.
            REQUEST if self.server.is_some_and(|s| s != own) => return None,
            REQUEST => {
                let wanted = self
                    .requested
                    .or((!self.client.is_unspecified()).then_some(self.client));
                if wanted == Some(address) { ACK } else { NAK }
            }
            INFORM => ACK,
            // DECLINE and RELEASE change nothing: the lease is fixed.
            _ => return None,
        };
        let mut reply = vec![0u8; 236];
        reply[..3].copy_from_slice(&[2, 1, 6]);
        reply[4..8].copy_from_slice(&self.transaction);
        reply[10..12].copy_from_slice(&self.seconds_and_flags[2..]);
        if kind != NAK {
            reply[12..16].copy_from_slice(&self.client.octets());
            if self.kind != INFORM {
                reply[16..20].copy_from_slice(&address.octets());
            }
            reply[20..24].copy_from_slice(&own.octets());
        }
        reply[28..34].copy_from_slice(&self.mac.0);
        reply.extend(MAGIC);
        let mut option = |code: u8, value: &[u8]| {
            reply.extend([code, value.len() as u8]);
            reply.extend(value);
        };
        option(53, &[kind]);
        option(54, &own.octets());
        if kind != NAK {
            if self.kind != INFORM {
                option(51, &LEASE.to_be_bytes());
                option(58, &(LEASE / 2).to_be_bytes());
                option(59, &(LEASE / 8 * 7).to_be_bytes());
            }
            option(1, &lease.address.mask_v4().octets());
            if let Some(router) = lease.router {
                option(3, &router.octets());
            }
            option(6, &own.octets());
            if (1..=63).contains(&lease.hostname.len()) {
                option(12, lease.hostname.as_bytes());
            }
            if let Some(mtu) = lease.mtu {
                option(26, &mtu.to_be_bytes());
            }
        }
        reply.push(255);
        // RFC 1542 section 2.1: some clients want the old BOOTP size.
        reply.resize(reply.len().max(300), 0);
        let renewing = !self.client.is_unspecified() && kind != NAK;
        Some((
            reply,
            if renewing {
                self.client
            } else {
                Ipv4Addr::BROADCAST
            },
        ))
    }
}

/// The answer to any packet by a server with one machine; for the user-mode network and for fuzzing.
pub(crate) fn answer(packet: &[u8], mac: Mac, lease: &Lease, own: Ipv4Addr) -> Option<Vec<u8>> {
    let request = Request::parse(packet).filter(|r| r.mac == mac)?;
    request.reply(lease, own).map(|(reply, _)| reply)
}

/// Entry for fuzzing: any bytes as a request.
pub fn fuzz_dhcp(data: &[u8]) {
    let mac = data
        .get(28..34)
        .and_then(|m| m.try_into().ok())
        .map_or(Mac([2; 6]), Mac);
    let lease = Lease {
        address: "10.0.0.2/24".parse().expect("a subnet"),
        router: Some(Ipv4Addr::new(10, 0, 0, 1)),
        hostname: "web".into(),
        mtu: Some(1400),
    };
    let _ = answer(data, mac, &lease, Ipv4Addr::new(10, 0, 0, 1));
}

/// A client's message, for tests.
#[cfg(test)]
pub(crate) fn client_message(kind: u8, mac: Mac, options: &[(u8, [u8; 4])]) -> Vec<u8> {
    let mut packet = vec![0; 236];
    packet[..8].copy_from_slice(&[1, 1, 6, 0, 9, 8, 7, 6]);
    packet[28..34].copy_from_slice(&mac.0);
    packet.extend(MAGIC);
    packet.extend([53, 1, kind]);
    for (code, value) in options {
        packet.extend([*code, 4]);
        packet.extend(value);
    }
    packet.push(255);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const OWN: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

    fn say(kind: u8, options: &[(u8, [u8; 4])]) -> Option<(u8, [u8; 4])> {
        let lease = Lease {
            address: "10.0.0.2/24".parse().unwrap(),
            router: None,
            hostname: "h".into(),
            mtu: None,
        };
        let reply = answer(&client_message(kind, MAC, options), MAC, &lease, OWN)?;
        assert_eq!(reply[4..8], [9, 8, 7, 6]);
        Some((reply[242], reply[16..20].try_into().unwrap()))
    }

    #[test]
    fn a_machine_gets_its_own_address_and_no_other() {
        assert_eq!(say(DISCOVER, &[]), Some((OFFER, [10, 0, 0, 2])));
        assert_eq!(
            say(REQUEST, &[(50, [10, 0, 0, 2]), (54, [10, 0, 0, 1])]),
            Some((ACK, [10, 0, 0, 2]))
        );
        assert_eq!(say(REQUEST, &[(50, [10, 0, 0, 3])]), Some((NAK, [0; 4])));
        assert_eq!(
            say(REQUEST, &[(50, [10, 0, 0, 2]), (54, [10, 0, 0, 9])]),
            None
        );
        assert_eq!(say(INFORM, &[]), Some((ACK, [0; 4])));
        assert_eq!(say(7, &[]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_or_ignored(
            mut data in proptest::collection::vec(any::<u8>(), 0..500),
            shaped: bool,
        ) {
            if shaped && data.len() >= 240 {
                data[..3].copy_from_slice(&[1, 1, 6]);
                data[24..28].fill(0);
                data[236..240].copy_from_slice(&MAGIC);
            }
            fuzz_dhcp(&data);
        }
    }
}
