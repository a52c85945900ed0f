//! `virtio_net_hdr` (virtio 1.2 section 5.1.6, <linux/virtio_net.h>): work that the two sides of a link leave to each other.

use super::frame::checksum;

/// Bytes, without the count of buffers.
pub(super) const HEADER: usize = 10;

const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const GSO_UDP_L4: u8 = 5;
/// Before the packet.
const ETHERNET: u16 = 14;
/// Of the checksum in TCP's header.
const TCP_CHECKSUM: u16 = 16;

/// Into how many bytes each a UDP packet is to be cut, by the header it came with.
pub(super) fn datagrams_of(header: &[u8]) -> Option<usize> {
    let [_, GSO_UDP_L4, _, _, low, high, ..] = header else {
        return None;
    };
    Some(usize::from(u16::from_ne_bytes([*low, *high]))).filter(|size| *size > 0)
}

/// Prepares a TCP packet whose checksum is not computed, and that is to be cut into segments of `segment` bytes where it
/// has more; gives the header that says so. The packet is one of our own: IPv4 without options, then TCP.
pub(super) fn leave_checksum(packet: &mut [u8], segment: u16) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    let Some(tcp) = packet.get(20..).filter(|tcp| tcp.len() >= 20) else {
        return header;
    };
    let tcp_header = u16::from(tcp[12] >> 4) * 4;
    let length = tcp.len() as u16;
    if segment > 0 && length.saturating_sub(tcp_header) > segment {
        header[1] = GSO_TCPV4;
        header[2..4].copy_from_slice(&(ETHERNET + 20 + tcp_header).to_ne_bytes());
        header[4..6].copy_from_slice(&segment.to_ne_bytes());
    }
    header[0] = NEEDS_CSUM;
    header[6..8].copy_from_slice(&(ETHERNET + 20).to_ne_bytes());
    header[8..10].copy_from_slice(&TCP_CHECKSUM.to_ne_bytes());
    // The sum of the pseudo-header (RFC 9293 section 3.1), which the rest is added to.
    let sum = !checksum(&[&packet[12..20], &[0, 6], &length.to_be_bytes()]);
    packet[36..38].copy_from_slice(&sum.to_be_bytes());
    header
}

/// The largest segment that the sender of a SYN takes (RFC 9293 section 3.7.1), raised to `ours` in the packet. The
/// packet is IPv4 with TCP; its checksum is not kept.
pub(super) fn raise_segment(packet: &mut [u8], ours: u16) -> u16 {
    const LEAST: u16 = 536;
    let Some(start) = packet.first().map(|first| usize::from(first & 15) * 4) else {
        return LEAST;
    };
    let Some(tcp) = packet.get_mut(start..).filter(|tcp| tcp.len() >= 20) else {
        return LEAST;
    };
    let end = (usize::from(tcp[12] >> 4) * 4).min(tcp.len());
    let mut at = 20;
    while at < end {
        match tcp[at] {
            0 => break,
            1 => at += 1,
            2 if at + 4 <= end && tcp[at + 1] == 4 => {
                let theirs = u16::from_be_bytes([tcp[at + 2], tcp[at + 3]]);
                tcp[at + 2..at + 4].copy_from_slice(&ours.to_be_bytes());
                return theirs;
            }
            _ => match tcp.get(at + 1) {
                Some(length) if *length >= 2 => at += usize::from(*length),
                _ => break,
            },
        }
    }
    LEAST
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn syn(options: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x45;
        packet[32] = (((20 + options.len()) / 4) << 4) as u8;
        packet.extend(options);
        packet
    }

    #[test]
    fn a_long_packet_says_where_it_is_cut_and_what_is_to_be_summed() {
        let mut packet = syn(&[]);
        packet.extend([7; 3000]);
        packet[12..20].copy_from_slice(&[192, 0, 0, 1, 192, 0, 0, 2]);
        let header = leave_checksum(&mut packet, 1460);
        let word = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        assert_eq!((header[0], header[1]), (NEEDS_CSUM, GSO_TCPV4));
        assert_eq!([word(2), word(4), word(6), word(8)], [54, 1460, 34, 16]);
        // 6 + 3020 + 0xc000 + 1 + 0xc000 + 2, folded.
        assert_eq!(packet[36..38], 0x8bd6u16.to_be_bytes());
        assert_eq!(leave_checksum(&mut packet, 3000)[1], 0);
    }

    #[test]
    fn the_segment_of_a_syn_is_read_and_raised() {
        let mut packet = syn(&[1, 1, 4, 2, 2, 4, 0x05, 0xb4]);
        assert_eq!(raise_segment(&mut packet, 65_495), 1460);
        assert_eq!(raise_segment(&mut packet, 9), 65_495);
        assert_eq!(raise_segment(&mut syn(&[]), 9), 536);
        // An option whose length says nothing ends the search.
        assert_eq!(raise_segment(&mut syn(&[8, 0, 2, 4, 1, 1, 1, 1]), 9), 536);
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken(mut data in prop::collection::vec(any::<u8>(), 0..120), segment: u16) {
            let _ = datagrams_of(&data);
            let _ = raise_segment(&mut data, segment);
            let _ = leave_checksum(&mut data, segment);
        }
    }
}
