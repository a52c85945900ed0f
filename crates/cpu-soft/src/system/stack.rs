//! Pushes and pops that change the stack pointer only when everything went well.

use cpu::x86::{RSP, Segment};

use super::segment::{self, attribute, code64};
use crate::state::{Cpu, Fault, Rights, SS};

/// A stack with its own copy of the pointer; [`Stack::commit`] makes it the CPU's.
#[derive(Debug, Clone, Copy)]
pub struct Stack {
    segment: Segment,
    pointer: u64,
    /// Bits of the pointer in use: 16, 32 or 64.
    mask: u64,
    rights: Rights,
}

impl Stack {
    /// The stack in `segment`; `long`: 64-bit mode, where the segment plays no part.
    pub fn new(segment: &Segment, pointer: u64, rights: Rights, long: bool) -> Stack {
        let mask = if long {
            u64::MAX
        } else if segment.attributes & attribute::BIG != 0 {
            0xffff_ffff
        } else {
            0xffff
        };
        Stack {
            segment: *segment,
            pointer,
            mask,
            rights,
        }
    }

    /// The running code's own stack.
    pub fn current(cpu: &Cpu) -> Stack {
        Stack::new(
            &cpu.segments[SS],
            cpu.gpr[RSP],
            Rights::Current,
            code64(cpu),
        )
    }

    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Moves the pointer by `delta` bytes.
    pub fn add(&mut self, delta: u64) {
        self.pointer = self.pointer & !self.mask | self.pointer.wrapping_add(delta) & self.mask;
    }

    fn linear(&self, cpu: &Cpu, pointer: u64, bytes: usize) -> Result<u64, Fault> {
        let offset = pointer & self.mask;
        if self.mask == u64::MAX {
            return segment::linear(cpu, SS, offset, bytes, true);
        }
        let last = offset + bytes as u64 - 1;
        let limit = u64::from(self.segment.limit);
        let down = self.segment.attributes
            & (attribute::CODE | attribute::CONFORMING | attribute::S)
            == attribute::CONFORMING | attribute::S;
        let inside = if down {
            offset > limit && last <= self.mask
        } else {
            last <= limit
        };
        if !inside {
            return Err(Fault::ss(0));
        }
        Ok(self.segment.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Pushes the low `bytes` (2, 4 or 8) of `value`.
    pub fn push(&mut self, cpu: &mut Cpu, bytes: usize, value: u64) -> Result<(), Fault> {
        let pointer = self.pointer.wrapping_sub(bytes as u64);
        let at = self.linear(cpu, pointer, bytes)?;
        cpu.write_bytes(at, &value.to_le_bytes()[..bytes], self.rights)?;
        self.add((bytes as u64).wrapping_neg());
        Ok(())
    }

    /// Pops `bytes` (2, 4 or 8), zero-extended.
    pub fn pop(&mut self, cpu: &mut Cpu, bytes: usize) -> Result<u64, Fault> {
        let at = self.linear(cpu, self.pointer, bytes)?;
        let mut value = [0u8; 8];
        cpu.read_bytes(at, &mut value[..bytes], self.rights)?;
        self.add(bytes as u64);
        Ok(u64::from_le_bytes(value))
    }

    /// Makes the pointer the CPU's.
    pub fn commit(&self, cpu: &mut Cpu) {
        cpu.gpr[RSP] = if self.mask == 0xffff_ffff {
            self.pointer & self.mask
        } else {
            self.pointer
        };
    }
}
