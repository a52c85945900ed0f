//! Submission and completion queue entries (NVMe Base 1.4, 4.2 and 4.6) and the status codes we give.

use serde::{Deserialize, Serialize};

pub const SQE_LEN: u64 = 64;
pub const CQE_LEN: u64 = 16;
pub const BROADCAST: u32 = 0xffff_ffff;

/// Opcodes of admin commands (section 5).
pub mod admin {
    pub const DELETE_SUBMISSION: u8 = 0x00;
    pub const CREATE_SUBMISSION: u8 = 0x01;
    pub const GET_LOG: u8 = 0x02;
    pub const DELETE_COMPLETION: u8 = 0x04;
    pub const CREATE_COMPLETION: u8 = 0x05;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const GET_FEATURES: u8 = 0x0a;
    pub const EVENT_REQUEST: u8 = 0x0c;
    pub const FORMAT: u8 = 0x80;
    pub const ALL: [u8; 11] = [
        DELETE_SUBMISSION,
        CREATE_SUBMISSION,
        GET_LOG,
        DELETE_COMPLETION,
        CREATE_COMPLETION,
        IDENTIFY,
        ABORT,
        SET_FEATURES,
        GET_FEATURES,
        EVENT_REQUEST,
        FORMAT,
    ];
}

/// Opcodes of the NVM command set (section 6).
pub mod io {
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    pub const ALL: [u8; 5] = [FLUSH, WRITE, READ, WRITE_ZEROES, DATASET_MANAGEMENT];
}

/// A submission queue entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Command {
    pub opcode: u8,
    /// Fused operation and PRP-or-SGL bits.
    pub flags: u8,
    pub id: u16,
    pub namespace: u32,
    pub prp1: u64,
    pub prp2: u64,
    /// Command dwords 10 to 15.
    pub words: [u32; 6],
}

impl Command {
    pub fn parse(bytes: &[u8; SQE_LEN as usize]) -> Command {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Command {
            opcode: bytes[0],
            flags: bytes[1],
            id: u16::from_le_bytes([bytes[2], bytes[3]]),
            namespace: word(4),
            prp1: long(24),
            prp2: long(32),
            words: [word(40), word(44), word(48), word(52), word(56), word(60)],
        }
    }

    /// First logical block of an I/O command.
    pub fn first_block(&self) -> u64 {
        u64::from(self.words[0]) | u64::from(self.words[1]) << 32
    }

    /// Number of logical blocks of an I/O command.
    pub fn blocks(&self) -> u64 {
        u64::from(self.words[2] & 0xffff) + 1
    }

    /// Bytes that a command of `queue` reads or writes; 0 for all others.
    pub fn bytes(&self, queue: u16) -> u64 {
        match self.opcode {
            io::READ | io::WRITE if queue != 0 => self.blocks() * 512,
            _ => 0,
        }
    }
}

/// Status field without the phase bit: code in bits 0..=7, type in 8..=10, more in the error log in bit 13, do-not-retry in
/// bit 14.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status(pub u16);

const DO_NOT_RETRY: u16 = 1 << 14;
const MORE: u16 = 1 << 13;

impl Status {
    pub const SUCCESS: Status = Status(0);
    pub const INVALID_OPCODE: Status = Status(0x001 | DO_NOT_RETRY);
    pub const INVALID_FIELD: Status = Status(0x002 | DO_NOT_RETRY);
    pub const DATA_TRANSFER: Status = Status(0x004 | DO_NOT_RETRY);
    pub const INTERNAL: Status = Status(0x006);
    pub const INVALID_NAMESPACE: Status = Status(0x00b | DO_NOT_RETRY);
    pub const INVALID_PRP: Status = Status(0x013 | DO_NOT_RETRY);
    pub const WRITE_PROTECTED: Status = Status(0x020 | DO_NOT_RETRY);
    pub const OUT_OF_RANGE: Status = Status(0x080 | DO_NOT_RETRY);
    pub const CAPACITY: Status = Status(0x081 | DO_NOT_RETRY);
    pub const INVALID_COMPLETION_QUEUE: Status = Status(0x100 | DO_NOT_RETRY);
    pub const INVALID_QUEUE_ID: Status = Status(0x101 | DO_NOT_RETRY);
    pub const INVALID_QUEUE_SIZE: Status = Status(0x102 | DO_NOT_RETRY);
    pub const TOO_MANY_EVENT_REQUESTS: Status = Status(0x105 | DO_NOT_RETRY);
    pub const INVALID_VECTOR: Status = Status(0x108 | DO_NOT_RETRY);
    pub const INVALID_LOG: Status = Status(0x109 | DO_NOT_RETRY);
    pub const INVALID_FORMAT: Status = Status(0x10a | DO_NOT_RETRY);
    pub const INVALID_DELETION: Status = Status(0x10c | DO_NOT_RETRY);
    pub const NOT_SAVEABLE: Status = Status(0x10d | DO_NOT_RETRY);
    pub const WRITE_FAULT: Status = Status(0x280);
    pub const READ_ERROR: Status = Status(0x281);
}

/// What a command came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    pub status: Status,
    /// Dword 0 of the completion.
    pub result: u32,
}

impl Answer {
    pub const SUCCESS: Answer = Answer {
        status: Status::SUCCESS,
        result: 0,
    };

    pub fn result(result: u32) -> Answer {
        Answer {
            status: Status::SUCCESS,
            result,
        }
    }
}

impl From<Status> for Answer {
    fn from(status: Status) -> Answer {
        Answer { status, result: 0 }
    }
}

/// A completion on its way into its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completion {
    pub result: u32,
    pub queue: u16,
    pub head: u16,
    pub command: u16,
    pub status: Status,
}

impl Completion {
    pub fn bytes(&self, phase: bool) -> [u8; CQE_LEN as usize] {
        let more = if self.status == Status::SUCCESS {
            0
        } else {
            MORE
        };
        let mut bytes = [0; CQE_LEN as usize];
        bytes[0..4].copy_from_slice(&self.result.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.head.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.queue.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.command.to_le_bytes());
        bytes[14..16]
            .copy_from_slice(&((self.status.0 | more) << 1 | u16::from(phase)).to_le_bytes());
        bytes
    }
}
