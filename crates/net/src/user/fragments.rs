//! Datagrams of the guest that come in pieces (RFC 791 section 3.2).

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// At once; the oldest gives way.
const MOST: usize = 64;
const PATIENCE: Duration = Duration::from_secs(10);
const ETHERNET: usize = 14;

/// Source, destination, identification and protocol.
type Key = [u8; 11];

struct Partial {
    /// Ethernet's and IPv4's of the first piece.
    head: Vec<u8>,
    body: Vec<u8>,
    /// What is there, as first byte and end, as it came; none overlaps another.
    have: Vec<(usize, usize)>,
    /// Known with the last piece.
    length: Option<usize>,
    since: Instant,
}

#[derive(Default)]
pub(super) struct Fragments(HashMap<Key, Partial>);

/// Whether a frame holds a piece of an IPv4 packet: more follow, or it is not the first.
pub(super) fn is_one(frame: &[u8]) -> bool {
    matches!(frame, [_, _, _, _, _, _, _, _, _, _, _, _, 8, 0, first, _, _, _, _, _, high, low, ..]
        if first >> 4 == 4 && (high & 0x3f, *low) != (0, 0))
}

impl Fragments {
    /// Takes a piece; gives the frame of the whole packet where this one made it whole.
    pub(super) fn add(&mut self, frame: &[u8], now: Instant) -> Option<Vec<u8>> {
        let packet = frame.get(ETHERNET..)?;
        let header = usize::from(packet.first()? & 15) * 4;
        let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
        if header < 20 {
            return None;
        }
        let piece = packet.get(header..total)?;
        let place = u16::from_be_bytes([packet[6], packet[7]]);
        let start = usize::from(place & 0x1fff) * 8;
        let more = place & 0x2000 != 0;
        let end = start + piece.len();
        if piece.is_empty() || end + header > 65_535 || (more && piece.len() % 8 != 0) {
            return None;
        }
        let mut key = [0; 11];
        key[..8].copy_from_slice(&packet[12..20]);
        key[8..10].copy_from_slice(&packet[4..6]);
        key[10] = packet[9];
        self.0
            .retain(|_, partial| now.duration_since(partial.since) < PATIENCE);
        if self.0.len() >= MOST && !self.0.contains_key(&key) {
            let oldest = self.0.iter().min_by_key(|(_, partial)| partial.since);
            if let Some(oldest) = oldest.map(|(key, _)| *key) {
                self.0.remove(&oldest);
            }
        }
        let partial = self.0.entry(key).or_insert_with(|| Partial {
            head: Vec::new(),
            body: Vec::new(),
            have: Vec::new(),
            length: None,
            since: now,
        });
        // Pieces that overlap or contradict each other are nobody's honest datagram (RFC 5722 says so for IPv6).
        let overlaps = partial.have.iter().any(|(a, b)| start < *b && *a < end);
        let beyond = partial.length.is_some_and(|length| end > length || !more);
        let short = !more && partial.body.len() > end;
        if overlaps || beyond || short {
            self.0.remove(&key);
            return None;
        }
        if partial.body.len() < end {
            partial.body.resize(end, 0);
        }
        partial.body[start..end].copy_from_slice(piece);
        if start == 0 {
            partial.head = frame[..ETHERNET + header].to_vec();
        }
        if !more {
            partial.length = Some(end);
        }
        partial.have.push((start, end));
        let there: usize = partial.have.iter().map(|(a, b)| b - a).sum();
        if partial.length != Some(there) {
            return None;
        }
        let mut whole = self.0.remove(&key)?;
        let length = (whole.head.len() - ETHERNET + there) as u16;
        whole.head[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&length.to_be_bytes());
        whole.head[ETHERNET + 6..ETHERNET + 8].fill(0);
        whole.head.append(&mut whole.body);
        Some(whole.head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn piece(start: usize, data: &[u8], more: bool) -> Vec<u8> {
        let mut frame = vec![0; 34];
        frame[12..15].copy_from_slice(&[8, 0, 0x45]);
        frame[16..18].copy_from_slice(&(20 + data.len() as u16).to_be_bytes());
        let place = (start / 8) as u16 | if more { 0x2000 } else { 0 };
        frame[20..22].copy_from_slice(&place.to_be_bytes());
        frame.extend(data);
        frame
    }

    #[test]
    fn pieces_in_any_order_make_the_datagram() {
        let data: Vec<u8> = (0..100).collect();
        let pieces = [
            piece(0, &data[..40], true),
            piece(40, &data[40..80], true),
            piece(80, &data[80..], false),
        ];
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
            let mut fragments = Fragments::default();
            let mut whole = None;
            for index in order {
                assert!(is_one(&pieces[index]) && whole.is_none());
                whole = fragments.add(&pieces[index], Instant::now());
            }
            let whole = whole.unwrap();
            assert!(!is_one(&whole));
            assert_eq!(whole[34..], data);
            assert_eq!(whole[16..18], 120u16.to_be_bytes());
            assert!(fragments.0.is_empty());
        }
    }

    #[test]
    fn pieces_that_overlap_make_nothing() {
        let mut fragments = Fragments::default();
        let now = Instant::now();
        assert!(fragments.add(&piece(0, &[1; 16], true), now).is_none());
        assert!(fragments.add(&piece(8, &[2; 16], false), now).is_none());
        assert!(fragments.0.is_empty());
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken(frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..80), 0..40)) {
            let mut fragments = Fragments::default();
            for frame in frames {
                if is_one(&frame) {
                    let _ = fragments.add(&frame, Instant::now());
                }
            }
        }
    }
}
