//! A packet's header (section 5.10.6).
//!
//! ```text
//!    0 source cid u64   8 destination cid u64   16 source port u32   20 destination port u32   24 length u32
//!   28 type u16        30 operation u16         32 flags u32         36 buffer u32             40 forwarded u32
//! ```

pub const HEADER: usize = 44;
pub const HOST_CID: u64 = 2;
/// The one type of socket there is here.
pub const STREAM: u16 = 1;

/// Operations (5.10.6).
pub mod operation {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RESET: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const DATA: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of a shutdown: its sender receives no more, sends no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
pub const SHUTDOWN_SEND: u32 = 2;

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    pub source_cid: u64,
    pub destination_cid: u64,
    pub source_port: u32,
    pub destination_port: u32,
    pub len: u32,
    pub kind: u16,
    pub operation: u16,
    pub flags: u32,
    /// Bytes that the sender can hold, and bytes it has taken so far.
    pub buffer: u32,
    pub forwarded: u32,
}

impl Header {
    pub fn parse(bytes: &[u8; HEADER]) -> Header {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Header {
            source_cid: long(0),
            destination_cid: long(8),
            source_port: word(16),
            destination_port: word(20),
            len: word(24),
            kind: word(28) as u16,
            operation: (word(28) >> 16) as u16,
            flags: word(32),
            buffer: word(36),
            forwarded: word(40),
        }
    }

    pub fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.operation.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.forwarded.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn a_header_is_the_same_there_and_back(bytes in proptest::array::uniform32(proptest::num::u8::ANY), rest in proptest::array::uniform12(proptest::num::u8::ANY)) {
            let whole: [u8; HEADER] = [&bytes[..], &rest[..]].concat().try_into().unwrap();
            proptest::prop_assert_eq!(Header::parse(&whole).bytes(), whole);
        }
    }
}
