//! Hardware breakpoints and alignment checks (SDM vol. 3, 18.2 and 6.15).
//!
//! While a code breakpoint is set, code runs one instruction at a time. Pages with data breakpoints get no entry in the
//! look-aside buffers, so that every access of theirs comes to Rust; the instruction then runs alone and traps behind it.

use super::cr;
use crate::state::{Cpu, Fault, flag};

/// What DR7 arms, found when it is written.
#[derive(Debug, Clone, Copy, Default)]
pub struct Debug {
    /// A code breakpoint is set.
    pub executes: bool,
    /// A data breakpoint is set.
    pub watches: bool,
    /// DR6 bits of breakpoints that the instruction under way hit.
    pub hit: u64,
}

/// Kinds of breakpoints, DR7's R/W fields.
mod on {
    pub const EXECUTE: u64 = 0;
    pub const WRITE: u64 = 1;
    pub const PORT: u64 = 2;
}

impl Cpu {
    /// Armed breakpoints: number, kind, address, length.
    fn breakpoints(&self) -> impl Iterator<Item = (u32, u64, u64, u64)> + use<> {
        let (dr, dr7) = (self.dr, self.dr[7]);
        (0..4u32).filter_map(move |n| {
            if dr7 >> (n * 2) & 3 == 0 {
                return None;
            }
            let kind = dr7 >> (16 + n * 4) & 3;
            let len = [1, 2, 8, 4][(dr7 >> (18 + n * 4) & 3) as usize];
            Some((n, kind, dr[n as usize] & !(len - 1), len))
        })
    }

    /// DR7 or an address register was written, or all of them restored.
    pub(crate) fn debug_changed(&mut self) {
        let kinds: Vec<u64> = self.breakpoints().map(|b| b.1).collect();
        self.debug.executes = kinds.contains(&on::EXECUTE);
        self.debug.watches = kinds.iter().any(|k| *k != on::EXECUTE);
        if self.debug.watches {
            self.flush_tlb();
        }
    }

    /// The fault of a code breakpoint at rip.
    pub(crate) fn code_breakpoint(&mut self) -> Option<Fault> {
        if self.rflags & flag::RF != 0 {
            return None;
        }
        let rip = self.rip.wrapping_add(if super::segment::code64(self) {
            0
        } else {
            self.segments[crate::state::CS].base
        });
        let hit = self
            .breakpoints()
            .filter(|(_, kind, at, _)| *kind == on::EXECUTE && *at == rip)
            .fold(0, |bits, (n, ..)| bits | 1 << n);
        if hit == 0 {
            return None;
        }
        self.dr[6] = self.dr[6] & !0xf | hit;
        Some(Fault::DB)
    }

    /// Notes an access that a data breakpoint watches; true where one does.
    pub(crate) fn watch(&mut self, va: u64, len: u64, write: bool) -> bool {
        let hit = self
            .breakpoints()
            .filter(|(_, kind, at, size)| {
                (*kind == on::WRITE && write || *kind == 3)
                    && va < at.wrapping_add(*size)
                    && *at < va.wrapping_add(len)
            })
            .fold(0, |bits, (n, ..)| bits | 1 << n);
        self.debug.hit |= hit;
        hit != 0
    }

    /// As [`Cpu::watch`], for a port.
    pub(crate) fn watch_port(&mut self, port: u16, len: usize) {
        if !self.debug.watches || self.cr4 & cr::CR4_DE == 0 {
            return;
        }
        let (port, len) = (u64::from(port), len as u64);
        for (n, kind, at, size) in self.breakpoints() {
            if kind == on::PORT && port < at + size && at < port + len {
                self.debug.hit |= 1 << n;
            }
        }
    }

    /// Whether the page of `va` has a data breakpoint.
    pub(crate) fn watched_page(&self, va: u64) -> bool {
        self.breakpoints()
            .any(|(_, kind, at, _)| kind != on::EXECUTE && (at ^ va) >> 12 == 0)
    }

    /// After an instruction: the trap of the breakpoints it hit, and of single stepping.
    pub(crate) fn debug_trap(&mut self, step: bool) -> Option<Fault> {
        let hit = std::mem::take(&mut self.debug.hit);
        if hit == 0 && !step {
            return None;
        }
        self.dr[6] = self.dr[6] & !0xf | hit | if step { 1 << 14 } else { 0 };
        Some(Fault::DB)
    }

    /// Whether unaligned accesses fault now: ring 3 with CR0.AM and RFLAGS.AC.
    pub(crate) fn alignment_checked(&self) -> bool {
        self.cpl == 3 && self.rflags & flag::AC != 0 && self.cr0 & cr::CR0_AM != 0
    }
}
