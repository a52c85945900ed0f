//! Blocks made anew for another guest address: programs and libraries lie elsewhere in each process, their pages are the same.
//! A copy of the block, with what depends on the guest's addresses and on its own place made right, costs a tenth of a
//! translation.

use iced_x86::{Instruction, OpKind, Register};

use super::{Exit, Lists, Site, Translator, level_offset};
use crate::cache::{Block, Key};
use crate::state::{Level, TLB_ENTRIES};

/// Something in a block's code that depends on where it lies or what it is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Where, from the block's first byte.
    at: u32,
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// A displacement of 32 bits to a stub.
    Stub,
    /// A guest address of 64 bits.
    Address,
    /// The low half of one.
    Low,
    /// A displacement from host GS into ring 3's table of jump targets.
    Jump,
    /// The same into ring 3's look-aside buffer for reads, and for writes.
    Read,
    Write,
    /// Numbers of an exit, of an instruction for Rust, of the block.
    Exit,
    Instruction,
    Number,
}

/// Addresses for which every address within reach of an instruction has the same form in the code.
const MOVABLE: std::ops::Range<u64> = 0x2_0000_0000..0x7ffe_0000_0000;

/// Whether a block of ring 3 at `rip` can be moved, and moved to.
pub fn movable(rip: u64) -> bool {
    MOVABLE.contains(&rip)
}

impl Translator<'_> {
    fn note(&mut self, back: usize, what: What) {
        if self.request.movable {
            let at = (self.code.bytes.len() - back) as u32;
            self.lists.places.push(Place { at, what });
        }
    }

    /// The displacement just emitted leads to a stub.
    pub(super) fn stub_displacement(&mut self) {
        self.note(4, What::Stub);
    }

    /// A guest address that moves with the block into `register`.
    pub(super) fn guest_address(&mut self, register: u8, address: u64) {
        self.code.mov_imm(register, address);
        if (1 << 32..1 << 47).contains(&address) {
            self.note(8, What::Address);
        } else {
            self.fixed = true;
        }
    }

    /// The low half of a guest address was just emitted.
    pub(super) fn low_address(&mut self) {
        self.note(4, What::Low);
    }

    pub(super) fn jump_slot(&mut self) {
        self.note(4, What::Jump);
    }

    pub(super) fn buffer_slot(&mut self, write: bool) {
        self.note(4, if write { What::Write } else { What::Read });
    }

    pub(super) fn number_of_exit(&mut self) {
        self.note(4, What::Exit);
    }

    pub(super) fn number_of_instruction(&mut self) {
        self.note(4, What::Instruction);
    }

    pub(super) fn number_of_block(&mut self) {
        self.note(4, What::Number);
    }
}

/// The same instruction `by` bytes further on.
fn moved(mut i: Instruction, by: u64) -> Instruction {
    let target = i.memory_displacement64();
    let relative = i.is_ip_rel_memory_operand();
    i.set_ip(i.ip().wrapping_add(by));
    if relative {
        let target = target.wrapping_add(by);
        let wraps = i.memory_base() == Register::EIP;
        i.set_memory_displacement64(if wraps { target & 0xffff_ffff } else { target });
    }
    if i.op0_kind() == OpKind::NearBranch64 {
        i.set_near_branch64(i.near_branch64().wrapping_add(by));
    }
    i
}

/// Makes `bytes`, the code of `donor`, that of a block `number` for `key` at host address `origin`.
/// `None`: the donor cannot be moved.
pub fn copy(
    donor: &Block,
    bytes: &mut [u8],
    key: Key,
    origin: u64,
    number: u32,
    lists: &mut Lists,
) -> Option<Block> {
    let (first, count) = donor.places?;
    let by = key.rip.wrapping_sub(donor.key.rip);
    let shift = origin.wrapping_sub(donor.leave);
    let word = |bytes: &[u8], at: usize| {
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    let level = level_offset(true) as u32;
    let jump = level + std::mem::offset_of!(Level, jump) as u32;
    let pages = (by >> 12) as u32;
    let places = lists.places.len() as u32;
    // A block's numbers follow each other.
    let numbers = |lists: &Lists, what: What| {
        lists.places[first as usize..(first + count) as usize]
            .iter()
            .filter(|p| p.what == what)
            .map(|p| word(bytes, p.at as usize))
            .fold((u32::MAX, 0), |(a, b), n| (a.min(n), b.max(n + 1)))
    };
    let (exits, exits_end) = numbers(lists, What::Exit);
    let (instructions, instructions_end) = numbers(lists, What::Instruction);
    let first_exit = lists.exits.len() as u32;
    let first_instruction = lists.instructions.len() as u32;
    for n in exits..exits_end {
        let exit = lists.exits[n as usize];
        let site = if exit.site == 0 {
            0
        } else {
            // Whatever it was chained to.
            let jump = (exit.site - donor.leave) as usize;
            bytes[jump..jump + 4].copy_from_slice(&exit.unchained.to_le_bytes());
            exit.site.wrapping_add(shift)
        };
        lists.exits.push(Exit {
            target: exit.target.wrapping_add(by),
            site,
            unchained: exit.unchained,
            block: number,
        });
    }
    for n in instructions..instructions_end {
        let (instruction, _) = lists.instructions[n as usize];
        lists.instructions.push((moved(instruction, by), number));
    }
    for n in first..first + count {
        let place = lists.places[n as usize];
        lists.places.push(place);
        let at = place.at as usize;
        let old = word(bytes, at);
        let new = match place.what {
            What::Stub => old.wrapping_sub(shift as u32),
            What::Address => {
                let mut address = [0; 8];
                address.copy_from_slice(&bytes[at..at + 8]);
                let address = u64::from_le_bytes(address).wrapping_add(by);
                bytes[at..at + 8].copy_from_slice(&address.to_le_bytes());
                continue;
            }
            What::Low => old.wrapping_add(by as u32),
            What::Jump => jump + (((old - jump) >> 3).wrapping_add(by as u32) & 0xffff) * 8,
            What::Read | What::Write => {
                let table = level
                    + if place.what == What::Write {
                        std::mem::offset_of!(Level, write) as u32
                    } else {
                        std::mem::offset_of!(Level, read) as u32
                    };
                let index = ((old - table) >> 4).wrapping_add(pages) & (TLB_ENTRIES as u32 - 1);
                table + index * 16 + (old - table) % 16
            }
            What::Exit => first_exit + (old - exits),
            What::Instruction => first_instruction + (old - instructions),
            What::Number => number,
        };
        bytes[at..at + 4].copy_from_slice(&new.to_le_bytes());
    }
    let sites = lists.sites.len() as u32;
    for n in donor.sites.0..donor.sites.0 + donor.sites.1 {
        let site = lists.sites[n as usize];
        lists.sites.push(Site {
            host: site.host.wrapping_add(shift),
            end: site.end.wrapping_add(shift),
            rip: site.rip.wrapping_add(by),
            slot: site.slot,
        });
    }
    Some(Block {
        key,
        indirect: donor.indirect.wrapping_add(shift),
        direct: donor.direct.wrapping_add(shift),
        leave: origin,
        end: donor.end.wrapping_add(shift),
        places: Some((places, count)),
        sites: (sites, donor.sites.1),
        ..donor.clone()
    })
}
