//! REP MOVS and REP STOS inside one page, in place; everything else about them in Rust.

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::emit::*;
use super::{Flags, SAVED_LOW, SAVED_OPERAND, SAVED_RAX, Translator, leave};
use crate::state::Cpu;

/// log2 of the element's size, where the instruction has a form in place.
pub(super) fn element(i: &Instruction) -> Option<u8> {
    let log = match i.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Stosb => 0,
        Mnemonic::Movsw | Mnemonic::Stosw => 1,
        Mnemonic::Movsd | Mnemonic::Stosd => 2,
        Mnemonic::Movsq | Mnemonic::Stosq => 3,
        _ => return None,
    };
    let kinds = (i.op0_kind(), i.op1_kind());
    let plain = matches!(
        kinds,
        (OpKind::MemoryESRDI, OpKind::MemorySegRSI | OpKind::Register)
    );
    (plain && i.has_rep_prefix() && i.segment_prefix() == iced_x86::Register::None).then_some(log)
}

/// A way out of line: an instruction for Rust, then back.
pub(super) struct Detour {
    branches: Vec<Patch>,
    number: u32,
    word: u32,
    back: u64,
}

impl Translator<'_> {
    /// The instruction, with host addresses in rdi and rsi where all of it lies in pages that the buffers know.
    pub(super) fn repeat(&mut self) {
        let Some(log) = element(&self.at) else {
            return self.call_rust();
        };
        let moves = matches!(
            self.at.mnemonic(),
            Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq
        );
        self.spare_flags(self.live_before != 0);
        let number = self.lists.instructions.len() as u32;
        self.lists.instructions.push((self.at, self.request.number));
        let word = self.word(leave::INSTRUCTION);
        let mut branches = Vec::with_capacity(5);
        self.code
            .cmp32_mem_imm8(Mem::gs(offset_of!(Cpu, direction)), 0);
        branches.push(self.code.jcc(CC_NE));
        if moves {
            self.stretch(RSI, false, log, &mut branches);
            self.code.store(Mem::gs(SAVED_LOW), R11);
        }
        self.stretch(RDI, true, log, &mut branches);
        self.code.store(Mem::gs(SAVED_OPERAND), RDI);
        self.code.mov(RDI, R11);
        if moves {
            self.code.store(Mem::gs(SAVED_RAX), RSI);
            self.code.load(RSI, Mem::gs(SAVED_LOW));
        }
        self.code.mov(R10, RCX);
        self.copy();
        let advanced = |base| Mem {
            base: Some(base),
            index: Some((R10, log)),
            disp: 0,
            gs: false,
        };
        self.code.load(RDI, Mem::gs(SAVED_OPERAND));
        self.code.lea(RDI, advanced(RDI));
        if moves {
            self.code.load(RSI, Mem::gs(SAVED_RAX));
            self.code.lea(RSI, advanced(RSI));
        }
        let back = self.code.here();
        self.detours.push(Detour {
            branches,
            number,
            word,
            back,
        });
        self.flags_destroyed();
        if self.flags == Flags::Host {
            // Dead: whatever EFLAGS hold will do.
            debug_assert!(self.live_before == 0);
        }
    }

    /// Host address of the byte at `register` into r11, where rcx elements from there stay in its page.
    fn stretch(&mut self, register: u8, write: bool, log: u8, branches: &mut Vec<Patch>) {
        let table = self.table(write);
        self.code.mov(R10, register);
        branches.push(self.probe(table, 1));
        self.code.lea(R11, Mem::sum(R11, R10));
        // Elements left in the page: (4096 - r10) >> log.
        self.code.with_reg(false, &[0xf7], 3, R10);
        self.code.with_reg(false, &[0x81], 0, R10);
        self.code.u32(4096);
        if log != 0 {
            self.code.shr32(R10, log);
        }
        self.code.cmp_reg(RCX, R10);
        branches.push(self.code.jcc(CC_A));
    }

    /// The ways out of line, behind the block.
    pub(super) fn finish_detours(&mut self) {
        for detour in std::mem::take(&mut self.detours) {
            for branch in detour.branches {
                self.code.bind(branch);
            }
            self.descriptor(self.request.stubs.instruction, detour.word, detour.number);
            self.code.jmp_to(detour.back);
        }
    }
}
