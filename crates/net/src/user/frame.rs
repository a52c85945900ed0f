//! Ethernet, ARP (RFC 826), IPv4 (RFC 791), UDP and ICMP echo, as far as a gateway for one guest needs them.

use std::net::Ipv4Addr;

use crate::address::Mac;

pub(super) const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;

/// A frame of the guest that means something to us.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame<'a> {
    Arp {
        sender: Ipv4Addr,
        asked: Ipv4Addr,
    },
    Ipv4 {
        source: Ipv4Addr,
        destination: Ipv4Addr,
        transport: Transport<'a>,
        packet: &'a [u8],
    },
}

/// What an IPv4 packet carries.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Transport<'a> {
    Udp {
        source_port: u16,
        destination_port: u16,
        data: &'a [u8],
    },
    /// `opens`: SYN without ACK.
    Tcp {
        source_port: u16,
        destination_port: u16,
        opens: bool,
    },
    /// An echo request's bytes after the checksum.
    Echo {
        data: &'a [u8],
    },
    Other,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..at + 2)
        .map(|b| u16::from_be_bytes([b[0], b[1]]))
}

fn v4_at(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    bytes
        .get(at..at + 4)
        .map(|b| Ipv4Addr::new(b[0], b[1], b[2], b[3]))
}

impl<'a> Frame<'a> {
    /// `None` for what is malformed, fragmented or of no interest.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Frame<'a>> {
        let payload = bytes.get(14..)?;
        match u16_at(bytes, 12)? {
            // Ethernet, IPv4, a request.
            ARP if payload.get(..8)? == [0, 1, 8, 0, 6, 4, 0, 1] => Some(Frame::Arp {
                sender: v4_at(payload, 14)?,
                asked: v4_at(payload, 24)?,
            }),
            IPV4 => Frame::parse_ipv4(payload),
            _ => None,
        }
    }

    fn parse_ipv4(payload: &'a [u8]) -> Option<Frame<'a>> {
        let first = *payload.first()?;
        let header = usize::from(first & 0x0f) * 4;
        let total = usize::from(u16_at(payload, 2)?);
        if first >> 4 != 4 || header < 20 || total < header || total > payload.len() {
            return None;
        }
        // More fragments, or not the first one.
        if u16_at(payload, 6)? & 0x3fff != 0 {
            return None;
        }
        let packet = &payload[..total];
        let body = &packet[header..];
        let transport = match packet[9] {
            1 if body.len() >= 8 && body[..2] == [8, 0] => Transport::Echo { data: &body[4..] },
            6 if body.len() >= 20 => Transport::Tcp {
                source_port: u16_at(body, 0)?,
                destination_port: u16_at(body, 2)?,
                opens: body[13] & 0x12 == 0x02,
            },
            17 => {
                let length = usize::from(u16_at(body, 4)?);
                Transport::Udp {
                    source_port: u16_at(body, 0)?,
                    destination_port: u16_at(body, 2)?,
                    data: body.get(8..length)?,
                }
            }
            _ => Transport::Other,
        };
        Some(Frame::Ipv4 {
            source: v4_at(packet, 12)?,
            destination: v4_at(packet, 16)?,
            transport,
            packet,
        })
    }
}

/// `addresses`: to, from.
pub(super) fn ethernet(addresses: (Mac, Mac), kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(14 + payload.len());
    frame.extend(addresses.0.0);
    frame.extend(addresses.1.0);
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame
}

pub(super) fn arp_reply(addresses: (Mac, Mac), asked: Ipv4Addr, asker: Ipv4Addr) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 2];
    arp.extend(addresses.1.0);
    arp.extend(asked.octets());
    arp.extend(addresses.0.0);
    arp.extend(asker.octets());
    ethernet(addresses, ARP, &arp)
}

/// The Internet checksum (RFC 1071).
pub(super) fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
    }
    !(sum as u16)
}

fn ipv4(protocol: u8, from: Ipv4Addr, to: Ipv4Addr, body: &[u8]) -> Vec<u8> {
    let length = (20 + body.len()).min(usize::from(u16::MAX)) as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(length.to_be_bytes());
    // What is too long for the rest of its way is cut on it; nothing else.
    let whole = if length > 1500 { 0 } else { 0x40 };
    packet.extend([0, 0, whole, 0, 64, protocol, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    let sum = checksum(&[&packet]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(body);
    packet
}

/// `data` must fit one packet (at most 65,507 bytes, which what a socket received does).
pub(super) fn udp(
    addresses: (Mac, Mac),
    from: (Ipv4Addr, u16),
    to: (Ipv4Addr, u16),
    data: &[u8],
) -> Vec<u8> {
    let length = (8 + data.len()).min(usize::from(u16::MAX)) as u16;
    let mut body = Vec::with_capacity(8 + data.len());
    body.extend(from.1.to_be_bytes());
    body.extend(to.1.to_be_bytes());
    body.extend(length.to_be_bytes());
    body.extend([0, 0]);
    body.extend(data);
    let pseudo = [
        &from.0.octets()[..],
        &to.0.octets(),
        &[0, 17],
        &length.to_be_bytes(),
    ]
    .concat();
    let sum = match checksum(&[&pseudo, &body]) {
        0 => 0xffff, // zero says "none" in UDP
        sum => sum,
    };
    body[6..8].copy_from_slice(&sum.to_be_bytes());
    ethernet(addresses, IPV4, &ipv4(17, from.0, to.0, &body))
}

pub(super) fn echo_reply(
    addresses: (Mac, Mac),
    from: Ipv4Addr,
    to: Ipv4Addr,
    data: &[u8],
) -> Vec<u8> {
    let mut body = vec![0, 0, 0, 0];
    body.extend(data);
    let sum = checksum(&[&body]);
    body[2..4].copy_from_slice(&sum.to_be_bytes());
    ethernet(addresses, IPV4, &ipv4(1, from, to, &body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_ignored(mut data in proptest::collection::vec(any::<u8>(), 0..200), shaped: bool) {
            if shaped && data.len() > 34 {
                data[12..15].copy_from_slice(&[8, 0, 0x45]);
                data[20..22].fill(0);
                data[16] = 0;
            }
            super::super::fuzz_user_frame(&data);
        }

        #[test]
        fn what_is_written_can_be_read(data in proptest::collection::vec(any::<u8>(), 0..300), a: u16, b: u16) {
            let (one, two) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
            let bytes = udp((Mac([2; 6]), Mac([4; 6])), (one, a), (two, b), &data);
            let Some(Frame::Ipv4 { transport: Transport::Udp { source_port, destination_port, data: read }, packet, .. }) =
                Frame::parse(&bytes) else { panic!("not read") };
            prop_assert_eq!((source_port, destination_port, read), (a, b, &data[..]));
            prop_assert_eq!(checksum(&[&packet[..20]]), 0);
        }
    }
}
