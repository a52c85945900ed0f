//! Connections the kernel remembers (ctnetlink, <linux/netfilter/nfnetlink_conntrack.h>), for the one thing that
//! needs them: a UDP flow keeps the translation it had when its first packet came. When a port is published or no
//! longer is, flows to it are forgotten, so that their next packet is judged anew.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use netlink_sys::{Socket, SocketAddr as NetlinkAddress, protocols::NETLINK_NETFILTER};

use crate::endpoint::Protocol;
use crate::firewall::Forward;

// Subsystem 1 (NFNL_SUBSYS_CTNETLINK) in the upper byte.
const GET: u16 = 0x101;
const DELETE: u16 = 0x102;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const ERROR: u16 = 2;
const DONE: u16 = 3;

const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const UDP: u8 = 17;

/// One direction of a remembered flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tuple {
    protocol: u8,
    source: SocketAddr,
    destination: SocketAddr,
}

/// A remembered flow.
#[derive(Debug, PartialEq, Eq)]
struct Flow<'a> {
    family: u8,
    original: Tuple,
    reply: Tuple,
    /// The attributes that name it to the kernel, as they came.
    name: Vec<&'a [u8]>,
}

/// Forgets the UDP flows that these forwards concern; says how many. Best effort: a kernel without connection
/// tracking has none.
pub(crate) fn forget(forwards: &[Forward]) -> usize {
    if !forwards.iter().any(|f| f.port.protocol == Protocol::Udp) {
        return 0;
    }
    match try_forget(forwards) {
        Ok(count) => count,
        Err(error) => {
            tracing::debug!(%error, "remembered UDP flows were left");
            0
        }
    }
}

fn try_forget(forwards: &[Forward]) -> io::Result<usize> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&NetlinkAddress::new(0, 0))?;
    let mut found = Vec::new();
    socket.send(&message(GET, REQUEST | DUMP, 1, 0, &[]), 0)?;
    'dump: loop {
        let (datagram, _) = socket.recv_from_full()?;
        for (kind, body) in messages(&datagram) {
            match kind {
                DONE => break 'dump,
                ERROR => {
                    result(body)?;
                    break 'dump;
                }
                _ => {
                    if let Some(flow) = flow(body)
                        && forwards.iter().any(|forward| concerns(forward, &flow))
                    {
                        found.push((flow.family, flow.name.concat()));
                    }
                }
            }
        }
    }
    for (number, (family, name)) in found.iter().enumerate() {
        let sequence = number as u32 + 2;
        socket.send(&message(DELETE, REQUEST | ACK, sequence, *family, name), 0)?;
        let (datagram, _) = socket.recv_from_full()?;
        for (_, body) in messages(&datagram).filter(|(kind, _)| *kind == ERROR) {
            match result(body) {
                // It ended by itself meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                other => other?,
            }
        }
    }
    Ok(found.len())
}

fn concerns(forward: &Forward, flow: &Flow<'_>) -> bool {
    let port = &forward.port;
    let target = SocketAddr::new(forward.to, port.container_port);
    let Flow {
        original, reply, ..
    } = flow;
    if port.protocol != Protocol::Udp
        || original.protocol != UDP
        || original.destination.port() != port.host_port
    {
        return false;
    }
    if reply.source == target {
        return true;
    }
    // A flow to this host that led elsewhere so far. Those that only pass through are nobody's business here.
    let here = original.destination.ip();
    if port.host_ip.is_unspecified() {
        port.host_ip.is_ipv4() == here.is_ipv4()
            && reply.source == original.destination
            && is_ours(here)
    } else {
        port.host_ip == here
    }
}

fn is_ours(address: IpAddr) -> bool {
    UdpSocket::bind((address, 0)).is_ok()
}

fn message(kind: u16, flags: u16, sequence: u32, family: u8, attributes: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(20 + attributes.len());
    bytes.extend_from_slice(&(20 + attributes.len() as u32).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&sequence.to_ne_bytes());
    bytes.extend_from_slice(&[0; 4]);
    // struct nfgenmsg: family, version, resource
    bytes.extend_from_slice(&[family, 0, 0, 0]);
    bytes.extend_from_slice(attributes);
    bytes
}

/// The messages of a datagram: kind and what follows the header. Ends where one is cut.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(datagram.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(datagram.get(4..6)?.try_into().ok()?);
        let body = datagram.get(16..length)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, body))
    })
}

/// struct nlmsgerr: the negative error number, then the request.
fn result(body: &[u8]) -> io::Result<()> {
    let code = body.get(..4).and_then(|b| b.try_into().ok());
    match code.map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Kind, content and the whole of each attribute. Ends where one is cut.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8], &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & 0x3fff;
        let content = bytes.get(4..length)?;
        let padded = length.next_multiple_of(4).min(bytes.len());
        let whole = &bytes[..padded];
        bytes = &bytes[padded..];
        Some((kind, content, whole))
    })
}

fn flow(body: &[u8]) -> Option<Flow<'_>> {
    let family = *body.first()?;
    let (mut original, mut reply, mut name) = (None, None, Vec::new());
    for (kind, content, whole) in attributes(body.get(4..)?) {
        match kind {
            TUPLE_ORIG => original = tuple(content),
            TUPLE_REPLY => reply = tuple(content),
            _ => {}
        }
        if matches!(kind, TUPLE_ORIG | ID | ZONE) {
            name.push(whole);
        }
    }
    Some(Flow {
        family,
        original: original?,
        reply: reply?,
        name,
    })
}

fn tuple(bytes: &[u8]) -> Option<Tuple> {
    let (mut addresses, mut ports, mut protocol) = ([None; 2], [None; 2], None);
    for (kind, content, _) in attributes(bytes) {
        for (inner, value, _) in attributes(content) {
            match (kind, inner) {
                (1, 1..=4) => addresses[usize::from((inner - 1) % 2)] = address(value),
                (2, 1) => protocol = value.first().copied(),
                (2, 2 | 3) => {
                    let port = value.get(..2)?.try_into().ok()?;
                    ports[usize::from(inner - 2)] = Some(u16::from_be_bytes(port));
                }
                _ => {}
            }
        }
    }
    Some(Tuple {
        protocol: protocol?,
        source: SocketAddr::new(addresses[0]?, ports[0]?),
        destination: SocketAddr::new(addresses[1]?, ports[1]?),
    })
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

/// Fuzz entry: a datagram as the kernel would send it.
pub(crate) fn fuzz(data: &[u8]) {
    for (_, body) in messages(data) {
        let _ = result(body);
        if let Some(flow) = flow(body) {
            assert!(flow.name.concat().len() <= data.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn attribute(kind: u16, content: &[u8]) -> Vec<u8> {
        let mut bytes = (4 + content.len() as u16).to_ne_bytes().to_vec();
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn encoded(source: ([u8; 4], u16), destination: ([u8; 4], u16)) -> Vec<u8> {
        let addresses = [attribute(1, &source.0), attribute(2, &destination.0)].concat();
        let ports = [
            attribute(1, &[UDP]),
            attribute(2, &source.1.to_be_bytes()),
            attribute(3, &destination.1.to_be_bytes()),
        ]
        .concat();
        [attribute(0x8001, &addresses), attribute(0x8002, &ports)].concat()
    }

    #[test]
    fn a_flow_is_read_as_the_kernel_writes_it() {
        let (client, host, container) = ([192, 0, 2, 9], [192, 0, 2, 1], [172, 17, 0, 2]);
        let body = [
            vec![2, 0, 0, 0],
            attribute(0x8001, &encoded((client, 4000), (host, 53))),
            attribute(0x8002, &encoded((container, 5353), (client, 4000))),
            attribute(ID, &[1, 2, 3, 4]),
        ]
        .concat();
        let flow = flow(&body).unwrap();
        assert_eq!(flow.original.destination, "192.0.2.1:53".parse().unwrap());
        assert_eq!(flow.reply.source, "172.17.0.2:5353".parse().unwrap());
        assert_eq!(flow.name.len(), 2);
        let forward = |host_ip: &str, to: &str| Forward {
            port: crate::PublishedPort {
                host_ip: host_ip.parse().unwrap(),
                host_port: 53,
                container_port: 5353,
                protocol: Protocol::Udp,
            },
            to: to.parse().unwrap(),
        };
        assert!(concerns(&forward("0.0.0.0", "172.17.0.2"), &flow));
        assert!(concerns(&forward("192.0.2.1", "172.17.0.3"), &flow));
        // Another container's flow, and another address of the host.
        assert!(!concerns(&forward("0.0.0.0", "172.17.0.3"), &flow));
        assert!(!concerns(&forward("192.0.2.2", "172.17.0.3"), &flow));
    }

    proptest! {
        #[test]
        fn no_datagram_panics(data in prop::collection::vec(any::<u8>(), 0..200)) {
            fuzz(&data);
        }
    }
}
