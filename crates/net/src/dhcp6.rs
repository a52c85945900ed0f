//! IPv6 for the machines of one bridge: router advertisements that name the router and say "ask for your address"
//! (RFC 4861 section 4.2, flag M), and a DHCPv6 server with fixed leases (RFC 8415), to MAC addresses we handed out
//! only.
//!
//! Advertisements go to the machine that asked and, before they expire, to those that once did: never to all nodes,
//! since containers on the same bridge have their routes already.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};
use tokio::net::UdpSocket;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::address::{Mac, Subnet};
use crate::dhcp::bind_to_device;

/// Seconds. The address is fixed; the lease's end only makes a guest ask for news.
const LEASE: u32 = 12 * 3600;
/// Seconds that a router stays one without news of it, and how often there is news.
const ROUTER: u16 = 9000;
const NEWS: Duration = Duration::from_secs(3000);
/// Machines remembered per bridge; a guest may make up link-local addresses without end.
const MOST_KNOWN: usize = 4096;

const SOLICIT_ROUTER: u8 = 133;
const ADVERTISE_ROUTER: u8 = 134;

/// What one machine is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lease {
    /// The address with its prefix length.
    pub address: Subnet,
    /// Whether this bridge leads anywhere.
    pub router: bool,
    pub mtu: Option<u32>,
}

pub(crate) type Leases = Arc<RwLock<HashMap<Mac, Lease>>>;

/// Serves one bridge until dropped.
pub(crate) struct Server {
    tasks: [JoinHandle<()>; 2],
    pub(crate) leases: Leases,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Which MAC address is behind a link-local one, as the solicitations said.
type Known = Arc<RwLock<HashMap<Ipv6Addr, Mac>>>;

impl Server {
    /// `own` is the bridge's address, and the name service's.
    pub(crate) fn start(runtime: &Handle, bridge: &str, own: Ipv6Addr) -> io::Result<Server> {
        let index =
            rustix::net::netdevice::name_to_index(socket(SocketType::DGRAM, None)?, bridge)?;
        let icmp = socket(SocketType::RAW, Some(ipproto::ICMPV6))?;
        only_solicitations(&icmp)?;
        bind_to_device(&icmp, bridge)?;
        // RFC 4861 section 6.1.2: anything that crossed a router is ignored.
        sockopt::set_ipv6_unicast_hops(&icmp, Some(255))?;
        let all_routers = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
        sockopt::set_ipv6_add_membership(&icmp, &all_routers, index)?;
        let dhcp = socket(SocketType::DGRAM, None)?;
        sockopt::set_socket_reuseaddr(&dhcp, true)?;
        sockopt::set_ipv6_v6only(&dhcp, true)?;
        bind_to_device(&dhcp, bridge)?;
        let all_servers = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
        sockopt::set_ipv6_add_membership(&dhcp, &all_servers, index)?;
        rustix::net::bind(&dhcp, &SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 547, 0, 0))?;
        let _entered = runtime.enter();
        // A raw socket is read and written like a datagram one.
        let icmp = UdpSocket::from_std(icmp.into())?;
        let dhcp = UdpSocket::from_std(dhcp.into())?;
        let (leases, known) = (Leases::default(), Known::default());
        let tasks = [
            runtime.spawn(advertise(icmp, own, index, leases.clone(), known.clone())),
            runtime.spawn(serve(dhcp, own, leases.clone(), known)),
        ];
        Ok(Server { tasks, leases })
    }
}

fn socket(kind: SocketType, protocol: Option<rustix::net::Protocol>) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(
        AddressFamily::INET6,
        kind,
        flags,
        protocol,
    )?)
}

/// ICMP6_FILTER (RFC 3542 section 3.2): a set bit blocks a type.
fn only_solicitations(socket: &OwnedFd) -> io::Result<()> {
    let mut filter = [u32::MAX; 8];
    filter[usize::from(SOLICIT_ROUTER / 32)] &= !(1 << (SOLICIT_ROUTER % 32));
    // SAFETY: the pointer and the length are those of `filter`, a struct icmp6_filter; the kernel copies it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_ICMPV6,
            1,
            filter.as_ptr().cast(),
            size_of_val(&filter) as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn lease_of(leases: &Leases, mac: Option<Mac>) -> Option<Lease> {
    let leases = leases.read().unwrap_or_else(PoisonError::into_inner);
    leases.get(&mac?).cloned()
}

async fn advertise(socket: UdpSocket, own: Ipv6Addr, index: u32, leases: Leases, known: Known) {
    let mut buffer = vec![0; 2048];
    let mut news = tokio::time::interval(NEWS);
    loop {
        tokio::select! {
            received = socket.recv_from(&mut buffer) => {
                let Ok((length, SocketAddr::V6(from))) = received else { continue };
                let Some(mac) = solicitation(&buffer[..length], *from.ip()) else { continue };
                let Some(lease) = lease_of(&leases, Some(mac)) else { continue };
                {
                    let mut known = known.write().unwrap_or_else(PoisonError::into_inner);
                    // One address per machine; a guest that changes its own is known by the new one.
                    known.retain(|_, other| *other != mac);
                    if known.len() < MOST_KNOWN {
                        known.insert(*from.ip(), mac);
                    }
                }
                let to = SocketAddrV6::new(*from.ip(), 0, 0, index);
                let _ = socket.send_to(&advertisement(&lease, own), SocketAddr::V6(to)).await;
            }
            _ = news.tick() => {
                let all: Vec<_> = {
                    let known = known.read().unwrap_or_else(PoisonError::into_inner);
                    known.iter().map(|(address, mac)| (*address, *mac)).collect()
                };
                for (address, mac) in all {
                    match lease_of(&leases, Some(mac)) {
                        Some(lease) => {
                            let to = SocketAddrV6::new(address, 0, 0, index);
                            let _ = socket.try_send_to(&advertisement(&lease, own), SocketAddr::V6(to));
                        }
                        None => {
                            known.write().unwrap_or_else(PoisonError::into_inner).remove(&address);
                        }
                    }
                }
            }
        }
    }
}

/// Who asks: by the source link-layer option, else by the address made of it.
fn solicitation(message: &[u8], from: Ipv6Addr) -> Option<Mac> {
    if message.first() != Some(&SOLICIT_ROUTER) || !is_link_local(from) {
        return None;
    }
    let mut rest = message.get(8..)?;
    while let [kind, units, ..] = *rest {
        let length = usize::from(units) * 8;
        let option = rest.get(..length).filter(|o| !o.is_empty())?;
        if kind == 1 {
            return option.get(2..8)?.try_into().ok().map(Mac);
        }
        rest = &rest[length..];
    }
    mac_in(from)
}

fn is_link_local(address: Ipv6Addr) -> bool {
    address.segments()[0] & 0xffc0 == 0xfe80
}

/// The MAC address a modified EUI-64 interface identifier was made of (RFC 4291 appendix A).
fn mac_in(address: Ipv6Addr) -> Option<Mac> {
    let o = address.octets();
    (o[11] == 0xff && o[12] == 0xfe).then(|| Mac([o[8] ^ 2, o[9], o[10], o[13], o[14], o[15]]))
}

/// The kernel fills in the checksum.
fn advertisement(lease: &Lease, own: Ipv6Addr) -> Vec<u8> {
    let lifetime = if lease.router { ROUTER } else { 0 };
    // Hop limit 64; M and O: address and the rest by DHCPv6.
    let mut message = vec![ADVERTISE_ROUTER, 0, 0, 0, 64, 0xc0];
    message.extend(lifetime.to_be_bytes());
    message.extend([0; 8]);
    // Prefix information: on the link, but nobody makes an address of it.
    let prefix = lease.address.network();
    message.extend([3, 4, prefix.prefix(), 0x80]);
    message.extend([0xff; 8]);
    message.extend([0; 4]);
    message.extend(match prefix.address() {
        IpAddr::V6(v6) => v6.octets(),
        IpAddr::V4(_) => [0; 16],
    });
    if let Some(mtu) = lease.mtu {
        message.extend([5, 1, 0, 0]);
        message.extend(mtu.to_be_bytes());
    }
    // Name service (RFC 8106 section 5.1).
    message.extend([25, 3, 0, 0]);
    message.extend(u32::from(ROUTER).to_be_bytes());
    message.extend(own.octets());
    message
}

async fn serve(socket: UdpSocket, own: Ipv6Addr, leases: Leases, known: Known) {
    let mut buffer = vec![0; 2048];
    loop {
        let Ok((length, SocketAddr::V6(from))) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        let Some(request) = Request::parse(&buffer[..length]) else {
            continue;
        };
        let mac = {
            let known = known.read().unwrap_or_else(PoisonError::into_inner);
            known.get(from.ip()).copied()
        };
        let mac = mac.or(mac_in(*from.ip())).or(request.mac());
        if let Some(lease) = lease_of(&leases, mac)
            && let Some(reply) = request.reply(&lease, own)
        {
            let _ = socket.send_to(&reply, SocketAddr::V6(from)).await;
        }
    }
}

const SOLICIT: u8 = 1;
const ADVERTISE: u8 = 2;
const REQUEST: u8 = 3;
const CONFIRM: u8 = 4;
const RENEW: u8 = 5;
const REBIND: u8 = 6;
const REPLY: u8 = 7;
const RELEASE: u8 = 8;
const DECLINE: u8 = 9;
const INFORMATION: u8 = 11;

const CLIENT_ID: u16 = 1;
const SERVER_ID: u16 = 2;
const IA_NA: u16 = 3;
const IA_ADDRESS: u16 = 5;
const STATUS: u16 = 13;
const RAPID_COMMIT: u16 = 14;
const NAME_SERVERS: u16 = 23;

const NO_ADDRESSES: u16 = 2;
const NOT_ON_LINK: u16 = 4;

/// A client's message, as far as it matters.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Request<'a> {
    kind: u8,
    transaction: [u8; 3],
    client: &'a [u8],
    server: Option<&'a [u8]>,
    /// The identity associations: their numbers and the addresses the client names in them.
    associations: Vec<([u8; 4], Vec<Ipv6Addr>)>,
    rapid: bool,
}

/// Code and content of each option; `None` once one is cut.
fn options(mut bytes: &[u8]) -> impl Iterator<Item = Option<(u16, &[u8])>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let one = (|| {
            let code = u16::from_be_bytes(bytes.get(..2)?.try_into().ok()?);
            let length = usize::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?));
            Some((code, bytes.get(4..4 + length)?))
        })();
        bytes = one.map_or(&[][..], |(_, content)| &bytes[4 + content.len()..]);
        Some(one)
    })
}

impl<'a> Request<'a> {
    /// `None` for what is not a whole message of a client.
    fn parse(packet: &'a [u8]) -> Option<Request<'a>> {
        let (kind, rest) = packet.split_first()?;
        let transaction = rest.get(..3)?.try_into().ok()?;
        let mut request = Request {
            kind: *kind,
            transaction,
            client: &[],
            server: None,
            associations: Vec::new(),
            rapid: false,
        };
        for option in options(&rest[3..]) {
            let (code, content) = option?;
            match code {
                CLIENT_ID => request.client = content,
                SERVER_ID => request.server = Some(content),
                RAPID_COMMIT => request.rapid = true,
                IA_NA => {
                    let number = content.get(..4)?.try_into().ok()?;
                    let mut addresses = Vec::new();
                    for inner in options(content.get(12..)?) {
                        let (code, content) = inner?;
                        if code == IA_ADDRESS {
                            let octets: [u8; 16] = content.get(..16)?.try_into().ok()?;
                            addresses.push(octets.into());
                        }
                    }
                    request.associations.push((number, addresses));
                }
                _ => {}
            }
        }
        // Section 16: all but a question for information must say who asks; DUIDs have at most 130 bytes.
        let nameless = request.client.is_empty() && request.kind != INFORMATION;
        (!nameless && request.client.len() <= 130).then_some(request)
    }

    /// The MAC address in a DUID made of one (section 11.2 and 11.4).
    fn mac(&self) -> Option<Mac> {
        let mac = match self.client {
            [0, 1, 0, 1, _, _, _, _, mac @ ..] | [0, 3, 0, 1, mac @ ..] => mac,
            _ => return None,
        };
        mac.try_into().ok().map(Mac)
    }

    /// The answer; `None` where silence is right.
    fn reply(&self, lease: &Lease, own: Ipv6Addr) -> Option<Vec<u8>> {
        let IpAddr::V6(address) = lease.address.address() else {
            return None;
        };
        // A DUID made of a number of our own (type 4, a UUID): the bridge's address.
        let mut id = vec![0, 4];
        id.extend(own.octets());
        let names_us = self.server == Some(id.as_slice());
        let kind = match self.kind {
            SOLICIT if self.server.is_some() => return None,
            SOLICIT if self.rapid => REPLY,
            SOLICIT => ADVERTISE,
            REQUEST | RENEW | RELEASE | DECLINE if !names_us => return None,
            CONFIRM | REBIND if self.server.is_some() => return None,
            INFORMATION if self.server.is_some() && !names_us => return None,
            REQUEST | CONFIRM | RENEW | REBIND | RELEASE | DECLINE | INFORMATION => REPLY,
            _ => return None,
        };
        let mut reply = vec![kind];
        reply.extend(self.transaction);
        let mut option = |code: u16, content: &[u8]| {
            reply.extend(code.to_be_bytes());
            reply.extend((content.len() as u16).to_be_bytes());
            reply.extend(content);
        };
        if !self.client.is_empty() {
            option(CLIENT_ID, self.client);
        }
        option(SERVER_ID, &id);
        match self.kind {
            CONFIRM => {
                let mut named = self.associations.iter().flat_map(|(_, a)| a).peekable();
                named.peek()?;
                let here = named.all(|a| lease.address.contains(IpAddr::V6(*a)));
                let code = if here { 0 } else { NOT_ON_LINK };
                option(STATUS, &code.to_be_bytes());
            }
            // The lease is fixed: they change nothing.
            RELEASE | DECLINE => option(STATUS, &[0, 0]),
            INFORMATION => {}
            _ => {
                if kind == REPLY && self.kind == SOLICIT {
                    option(RAPID_COMMIT, &[]);
                }
                for (place, (number, named)) in self.associations.iter().take(8).enumerate() {
                    option(IA_NA, &association(*number, named, address, place == 0));
                }
            }
        }
        option(NAME_SERVERS, &own.octets());
        Some(reply)
    }
}

/// The content of an answer's IA_NA: our address in the first, none in others; what else the client named is over.
fn association(number: [u8; 4], named: &[Ipv6Addr], address: Ipv6Addr, first: bool) -> Vec<u8> {
    let mut content = number.to_vec();
    content.extend((LEASE / 2).to_be_bytes());
    content.extend((LEASE / 8 * 7).to_be_bytes());
    let mut one = |address: Ipv6Addr, seconds: u32| {
        content.extend(IA_ADDRESS.to_be_bytes());
        content.extend(24u16.to_be_bytes());
        content.extend(address.octets());
        content.extend(seconds.to_be_bytes());
        content.extend(seconds.to_be_bytes());
    };
    if first {
        one(address, LEASE);
    }
    for other in named.iter().filter(|a| !first || **a != address).take(8) {
        one(*other, 0);
    }
    if !first {
        content.extend(STATUS.to_be_bytes());
        content.extend(2u16.to_be_bytes());
        content.extend(NO_ADDRESSES.to_be_bytes());
    }
    content
}

/// Entry for fuzzing: any bytes as a solicitation and as a request.
pub fn fuzz_dhcp6(data: &[u8]) {
    let own = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
    let _ = solicitation(data, Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0xff, 0xfe00, 1));
    let lease = Lease {
        address: "fd00::2/64".parse().expect("a subnet"),
        router: true,
        mtu: None,
    };
    if let Some(request) = Request::parse(data) {
        let _ = request.mac();
        if let Some(reply) = request.reply(&lease, own) {
            // One who asked without a name is answered without: whole options, but no client's message.
            assert!(options(&reply[4..]).all(|option| option.is_some()));
            assert!(request.client.is_empty() || Request::parse(&reply).is_some());
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A client's message with one association, by a DUID that says nothing of its hardware.
    pub(crate) fn client_message(kind: u8, more: &[u8]) -> Vec<u8> {
        let mut message = vec![kind, 1, 2, 3];
        message.extend([0, 1, 0, 6, 0, 2, 0, 0, 0xab, 0x11]);
        message.extend([0, 3, 0, 12, 9, 9, 9, 9, 0, 0, 0, 0, 0, 0, 0, 0]);
        message.extend(more);
        message
    }

    fn lease() -> Lease {
        Lease {
            address: "fd00::2/64".parse().unwrap(),
            router: true,
            mtu: Some(1400),
        }
    }

    #[test]
    fn who_asks_for_information_without_a_name_is_answered_without_one() {
        let asked = [INFORMATION, 0xff, 0, 1, 1, 0, 0, 1, 0xab];
        fuzz_dhcp6(&asked);
        let request = Request::parse(&asked).unwrap();
        let reply = request.reply(&lease(), "fd00::1".parse().unwrap()).unwrap();
        let codes: Vec<u16> = options(&reply[4..]).map(|o| o.unwrap().0).collect();
        assert_eq!((reply[0], codes), (REPLY, vec![SERVER_ID, NAME_SERVERS]));
    }

    #[test]
    fn a_machine_is_offered_its_address_and_gets_it_when_it_asks_us() {
        let own: Ipv6Addr = "fd00::1".parse().unwrap();
        let asked = client_message(SOLICIT, &[]);
        let offer = Request::parse(&asked)
            .unwrap()
            .reply(&lease(), own)
            .unwrap();
        assert_eq!(offer[..4], [ADVERTISE, 1, 2, 3]);
        let parsed = Request::parse(&offer).unwrap();
        let address: Ipv6Addr = "fd00::2".parse().unwrap();
        assert_eq!(parsed.associations, [([9; 4], vec![address])]);
        let server = parsed.server.unwrap().to_vec();
        let mut named = vec![0, 2, 0, server.len() as u8];
        named.extend(&server);
        let asked = client_message(REQUEST, &named);
        let reply = Request::parse(&asked)
            .unwrap()
            .reply(&lease(), own)
            .unwrap();
        assert_eq!(reply[0], REPLY);
        // One that asks another server is not ours to answer.
        let asked = client_message(REQUEST, &[0, 2, 0, 2, 7, 7]);
        assert!(
            Request::parse(&asked)
                .unwrap()
                .reply(&lease(), own)
                .is_none()
        );
    }

    #[test]
    fn an_address_of_another_network_is_not_confirmed() {
        let own: Ipv6Addr = "fd00::1".parse().unwrap();
        for (address, code) in [("fd00::2", 0), ("2001:db8::2", NOT_ON_LINK)] {
            let address: Ipv6Addr = address.parse().unwrap();
            let mut message = vec![CONFIRM, 1, 2, 3, 0, 1, 0, 2, 5, 5, 0, 3, 0, 40];
            message.extend([0; 12]);
            message.extend([0, 5, 0, 24]);
            message.extend(address.octets());
            message.extend([0; 8]);
            let reply = Request::parse(&message)
                .unwrap()
                .reply(&lease(), own)
                .unwrap();
            let status = options(&reply[4..])
                .flatten()
                .find(|(code, _)| *code == STATUS);
            assert_eq!(status.unwrap().1, code.to_be_bytes());
        }
    }

    #[test]
    fn a_solicitation_says_its_mac_by_option_or_by_address() {
        let from: Ipv6Addr = "fe80::ff:fe00:1".parse().unwrap();
        let mut message = vec![SOLICIT_ROUTER, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(solicitation(&message, from), Some(Mac([2, 0, 0, 0, 0, 1])));
        message.extend([1, 1, 2, 9, 9, 9, 9, 9]);
        assert_eq!(solicitation(&message, from), Some(Mac([2, 9, 9, 9, 9, 9])));
        assert_eq!(solicitation(&message, Ipv6Addr::UNSPECIFIED), None);
    }

    proptest! {
        #[test]
        fn no_packet_panics(mut data in prop::collection::vec(any::<u8>(), 0..200), honest in any::<bool>()) {
            if honest {
                let more = std::mem::take(&mut data);
                data = client_message(more.first().map_or(1, |k| k % 12), &more);
            }
            fuzz_dhcp6(&data);
        }
    }
}
