//! The control queue (5.1.6.5): receive filters, addresses, VLANs, the number of queue pairs, offloads.
//!
//! A command is class, command and data, answered by one byte. Filters are a wish (5.1.6.5.1): the network behind a card
//! hands it what is meant for it, and so the filters are taken and change nothing.

use super::{GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6};

const OK: u8 = 0;
const ERROR: u8 = 1;
/// Bytes of the longest command: two tables of a few thousand addresses.
pub const LIMIT: u64 = 64 * 1024;

/// What a command asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It is done already, with this answer.
    Answer(u8),
    Address([u8; 6]),
    Pairs(u16),
    /// Feature bits of the offloads that shall be on.
    Offloads(u64),
}

impl Action {
    pub const DONE: Action = Action::Answer(OK);
    pub const REFUSED: Action = Action::Answer(ERROR);
}

/// True where `data` is one table of addresses after the other (5.1.6.5.2).
fn are_tables(mut data: &[u8], mut tables: usize) -> bool {
    while let Some((count, rest)) = data.split_first_chunk::<4>() {
        let Some(len) = (u32::from_le_bytes(*count) as usize).checked_mul(6) else {
            return false;
        };
        let Some(rest) = rest.get(len..) else {
            return false;
        };
        (data, tables) = (rest, tables.wrapping_sub(1));
    }
    data.is_empty() && tables == 0
}

/// Reads a command. `pairs` is how many queue pairs there are, `features` what the driver accepted.
pub fn parse(command: &[u8], pairs: u16, features: u64) -> Action {
    let Some((head, data)) = command.split_first_chunk::<2>() else {
        return Action::REFUSED;
    };
    match (head, data) {
        // Promiscuous, all multicast, all unicast, no multicast, no unicast, no broadcast.
        ([0, 0..=5], [0 | 1]) => Action::DONE,
        ([1, 0], tables) if are_tables(tables, 2) => Action::DONE,
        ([1, 1], address) => match <[u8; 6]>::try_from(address) {
            Ok(address) if address[0] & 1 == 0 => Action::Address(address),
            _ => Action::REFUSED,
        },
        ([2, 0 | 1], [_, _]) => Action::DONE,
        ([4, 0], [low, high]) => match u16::from_le_bytes([*low, *high]) {
            wanted if (1..=pairs).contains(&wanted) => Action::Pairs(wanted),
            _ => Action::REFUSED,
        },
        ([5, 0], wanted) => match <[u8; 8]>::try_from(wanted).map(u64::from_le_bytes) {
            Ok(wanted)
                if wanted & !(features & (GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN))
                    == 0 =>
            {
                Action::Offloads(wanted)
            }
            _ => Action::REFUSED,
        },
        _ => Action::REFUSED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_taken_as_the_specification_has_them() {
        assert_eq!(parse(&[0, 0, 1], 1, 0), Action::DONE);
        assert_eq!(
            parse(&[1, 0, 1, 0, 0, 0, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0], 1, 0),
            Action::DONE
        );
        assert_eq!(
            parse(&[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0], 1, 0),
            Action::REFUSED
        );
        assert_eq!(
            parse(&[1, 1, 2, 0, 0, 0, 0, 9], 1, 0),
            Action::Address([2, 0, 0, 0, 0, 9])
        );
        assert_eq!(
            parse(&[1, 1, 3, 0, 0, 0, 0, 9], 1, 0),
            Action::REFUSED,
            "a group's address"
        );
        assert_eq!(parse(&[4, 0, 2, 0], 2, 0), Action::Pairs(2));
        for wrong in [[4, 0, 3, 0], [4, 0, 0, 0]] {
            assert_eq!(parse(&wrong, 2, 0), Action::REFUSED);
        }
        let on = GUEST_CSUM.to_le_bytes();
        assert_eq!(
            parse(&[&[5, 0], &on[..]].concat(), 1, GUEST_CSUM),
            Action::Offloads(GUEST_CSUM)
        );
        assert_eq!(parse(&[&[5, 0], &on[..]].concat(), 1, 0), Action::REFUSED);
        assert_eq!(parse(&[], 1, 0), Action::REFUSED);
    }

    proptest::proptest! {
        #[test]
        fn no_command_panics(command in proptest::collection::vec(proptest::num::u8::ANY, 0..64)) {
            parse(&command, 4, u64::MAX);
        }
    }
}
