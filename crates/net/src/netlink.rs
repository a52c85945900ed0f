//! rtnetlink(7), synchronously: the few requests a container's network needs.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVeth, LinkAttribute,
    LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::address::{Mac, Subnet};

/// A socket to the kernel's tables of the namespace it was opened in.
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// An interface as listed.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub index: u32,
    pub name: String,
    pub mac: Option<Mac>,
    pub master: Option<u32>,
}

/// A route as listed, of the main table.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    pub destination: Subnet,
    pub interface: Option<u32>,
    pub has_gateway: bool,
}

/// What [`Netlink::set_link`] changes.
#[derive(Debug, Clone, Default)]
pub(crate) struct LinkChange<'a> {
    pub name: Option<&'a str>,
    pub mac: Option<Mac>,
    pub mtu: Option<u32>,
    pub master: Option<u32>,
    pub up: Option<bool>,
}

impl Netlink {
    /// A socket in the calling thread's network namespace.
    pub(crate) fn open() -> io::Result<Netlink> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Errors then carry the request's header only, and the kernel says in words what is wrong.
        let _ = socket.set_cap_ack(true);
        Ok(Netlink {
            socket,
            sequence: 0,
        })
    }

    fn request(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            if take_answers(&datagram, self.sequence, &mut answers)? {
                return Ok(answers);
            }
        }
    }

    /// All interfaces.
    pub(crate) fn links(&mut self) -> io::Result<Vec<Link>> {
        let answers = self.request(
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
            NLM_F_DUMP,
        )?;
        Ok(answers.into_iter().filter_map(link_of).collect())
    }

    /// The interface by name; `None` where there is none.
    pub(crate) fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        let mut message = LinkMessage::default();
        message
            .attributes
            .push(LinkAttribute::IfName(name.to_owned()));
        match self.request(RouteNetlinkMessage::GetLink(message), NLM_F_ACK) {
            Ok(answers) => Ok(answers.into_iter().find_map(link_of)),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn new_link(&mut self, attributes: Vec<LinkAttribute>) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.attributes = attributes;
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        self.request(RouteNetlinkMessage::NewLink(message), flags)
            .map(drop)
    }

    /// A bridge without spanning tree, down.
    pub(crate) fn add_bridge(&mut self, name: &str, mac: Mac, mtu: Option<u32>) -> io::Result<()> {
        let mut attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Address(mac.0.to_vec()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
        ];
        attributes.extend(mtu.map(LinkAttribute::Mtu));
        self.new_link(attributes)
    }

    /// A veth pair, one end here, the other in the namespace of `peer_ns`.
    pub(crate) fn add_veth(
        &mut self,
        name: &str,
        peer: &str,
        peer_ns: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let mut inside = LinkMessage::default();
        inside.attributes = vec![
            LinkAttribute::IfName(peer.to_owned()),
            LinkAttribute::NetNsFd(peer_ns.as_raw_fd()),
        ];
        self.new_link(vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(inside))),
            ]),
        ])
    }

    pub(crate) fn set_link(&mut self, index: u32, change: &LinkChange<'_>) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        if let Some(up) = change.up {
            message.header.change_mask = LinkFlags::Up;
            message.header.flags = if up {
                LinkFlags::Up
            } else {
                LinkFlags::empty()
            };
        }
        let a = &mut message.attributes;
        a.extend(change.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
        a.extend(change.mtu.map(LinkAttribute::Mtu));
        a.extend(
            change
                .name
                .map(|name| LinkAttribute::IfName(name.to_owned())),
        );
        a.extend(change.master.map(LinkAttribute::Controller));
        self.request(RouteNetlinkMessage::SetLink(message), NLM_F_ACK)
            .map(drop)
    }

    /// Keeps a bridge port from the other isolated ports of the bridge.
    pub(crate) fn isolate_port(&mut self, index: u32) -> io::Result<()> {
        self.set_port(index, InfoBridgePort::Isolated(true))
    }

    /// Lets a bridge send a packet out of the port it came in by.
    pub(crate) fn hairpin_port(&mut self, index: u32) -> io::Result<()> {
        self.set_port(index, InfoBridgePort::HairpinMode(true))
    }

    fn set_port(&mut self, index: u32, setting: InfoBridgePort) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(vec![setting])),
        ]));
        self.request(RouteNetlinkMessage::NewLink(message), NLM_F_ACK)
            .map(drop)
    }

    /// Removes an interface; one that is gone already is fine.
    pub(crate) fn remove_link(&mut self, name: &str) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message
            .attributes
            .push(LinkAttribute::IfName(name.to_owned()));
        match self.request(RouteNetlinkMessage::DelLink(message), NLM_F_ACK) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            other => other.map(drop),
        }
    }

    /// An address with the route to its subnet; without duplicate detection in IPv6, since we know all holders.
    pub(crate) fn add_address(&mut self, index: u32, address: Subnet) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.index = index;
        message.header.prefix_len = address.prefix();
        message.header.scope = AddressScope::Universe;
        message.header.family = family(address.address());
        match address.address() {
            IpAddr::V4(_) => {
                message
                    .attributes
                    .push(AddressAttribute::Local(address.address()));
                if address.prefix() < 31
                    && let IpAddr::V4(broadcast) = address.last()
                {
                    message
                        .attributes
                        .push(AddressAttribute::Broadcast(broadcast));
                }
            }
            IpAddr::V6(_) => message.header.flags = AddressHeaderFlags::Nodad,
        }
        message
            .attributes
            .push(AddressAttribute::Address(address.address()));
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        self.request(RouteNetlinkMessage::NewAddress(message), flags)
            .map(drop)
    }

    fn default_route(gateway: IpAddr, interface: u32) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = family(gateway);
        message.header.table = libc::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Boot;
        message.header.scope = RouteScope::Universe;
        message.header.kind = RouteType::Unicast;
        message.attributes.push(RouteAttribute::Oif(interface));
        message
            .attributes
            .push(RouteAttribute::Gateway(match gateway {
                IpAddr::V4(v4) => RouteAddress::Inet(v4),
                IpAddr::V6(v6) => RouteAddress::Inet6(v6),
            }));
        message
    }

    /// The default route of one family, in place of another of the same metric.
    pub(crate) fn replace_default_route(
        &mut self,
        gateway: IpAddr,
        interface: u32,
    ) -> io::Result<()> {
        let message = Self::default_route(gateway, interface);
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        self.request(RouteNetlinkMessage::NewRoute(message), flags)
            .map(drop)
    }

    /// The routes of the main table, default routes included.
    pub(crate) fn routes(&mut self) -> io::Result<Vec<Route>> {
        let mut found = Vec::new();
        for v4 in [true, false] {
            let mut ask = RouteMessage::default();
            ask.header.address_family = if v4 {
                AddressFamily::Inet
            } else {
                AddressFamily::Inet6
            };
            for answer in self.request(RouteNetlinkMessage::GetRoute(ask), NLM_F_DUMP)? {
                let RouteNetlinkMessage::NewRoute(message) = answer else {
                    continue;
                };
                if message.header.table != libc::RT_TABLE_MAIN
                    || message.header.kind != RouteType::Unicast
                {
                    continue;
                }
                let mut address = if v4 {
                    Ipv4Addr::UNSPECIFIED.into()
                } else {
                    IpAddr::from(Ipv6Addr::UNSPECIFIED)
                };
                let (mut interface, mut has_gateway) = (None, false);
                for attribute in &message.attributes {
                    match attribute {
                        RouteAttribute::Destination(RouteAddress::Inet(ip)) => {
                            address = (*ip).into()
                        }
                        RouteAttribute::Destination(RouteAddress::Inet6(ip)) => {
                            address = (*ip).into()
                        }
                        RouteAttribute::Oif(index) => interface = Some(*index),
                        RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => has_gateway = true,
                        _ => {}
                    }
                }
                if let Some(destination) =
                    Subnet::new(address, message.header.destination_prefix_length)
                {
                    found.push(Route {
                        destination,
                        interface,
                        has_gateway,
                    });
                }
            }
        }
        Ok(found)
    }
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

/// Takes the answers to the request `sequence` out of a datagram; true where they are complete.
///
/// # Errors
/// What the kernel refused, and `InvalidData`.
fn take_answers(
    datagram: &[u8],
    sequence: u32,
    answers: &mut Vec<RouteNetlinkMessage>,
) -> io::Result<bool> {
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let mut rest = datagram;
    while rest.len() >= 16 {
        let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
        if length < 16 || length > rest.len() {
            return Err(invalid("netlink answer cut short".to_owned()));
        }
        // A message of a kind the decoder does not know must not end a dump.
        let kind = u16::from_ne_bytes([rest[4], rest[5]]);
        let of = u32::from_ne_bytes([rest[8], rest[9], rest[10], rest[11]]);
        let parsed = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&rest[..length]);
        rest = &rest[((length + 3) & !3).min(rest.len())..];
        if of != sequence {
            continue;
        }
        match parsed {
            Ok(message) => match message.payload {
                NetlinkPayload::Done(_) => return Ok(true),
                NetlinkPayload::Error(error) => {
                    return match error.raw_code() {
                        0 => Ok(true),
                        code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
                    };
                }
                NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                _ => {}
            },
            Err(_) if kind >= 16 => {}
            Err(error) => return Err(invalid(error.to_string())),
        }
    }
    Ok(false)
}

/// Fuzz entry: datagrams as the kernel would send them, of interfaces and routes and of remembered flows.
pub fn fuzz_netlink(data: &[u8]) {
    let sequence = data.get(8..12).and_then(|b| b.try_into().ok());
    let mut answers = Vec::new();
    let _ = take_answers(data, sequence.map_or(1, u32::from_ne_bytes), &mut answers);
    for answer in answers {
        let _ = link_of(answer);
    }
    crate::conntrack::fuzz(data);
}

fn link_of(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else {
        return None;
    };
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: None,
        master: None,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(bytes) => link.mac = bytes.try_into().ok().map(Mac),
            LinkAttribute::Controller(index) => link.master = Some(index),
            _ => {}
        }
    }
    Some(link)
}
