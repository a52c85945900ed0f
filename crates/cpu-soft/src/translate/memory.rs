//! Memory operands: the guest's address, the look-aside buffer, and groups of accesses checked at once.

use iced_x86::Register;

use super::emit::*;
use super::group::Part;
use super::instruction::{gpr, in_memory, number, r11_like, segment_base};
use super::kind;
use super::{Address, Slow, Translator, leave};
use crate::state::{FS, GS};
use crate::tlb;

impl Translator<'_> {
    /// The effective address when it is known now.
    pub(super) fn constant_address(&self) -> Option<u64> {
        let i = &self.at;
        if matches!(i.memory_segment(), Register::FS | Register::GS) {
            return None;
        }
        match (i.memory_base(), i.memory_index()) {
            (Register::RIP | Register::EIP | Register::None, Register::None) => {
                Some(i.memory_displacement64())
            }
            _ => None,
        }
    }

    /// Guest-virtual address of the memory operand into r10; destroys r11, keeps EFLAGS.
    pub(super) fn address(&mut self) {
        let i = self.at;
        let mut base = i.memory_base();
        let index = i.memory_index();
        let mut disp = i.memory_displacement64();
        let segment = match i.memory_segment() {
            Register::FS => Some(FS),
            Register::GS => Some(GS),
            _ => None,
        };
        let relative = base == Register::RIP;
        self.fixed |= base == Register::EIP;
        if matches!(base, Register::RIP | Register::EIP) {
            base = Register::None;
        }
        if base == Register::None && index == Register::None {
            if let Some(segment) = segment {
                self.code.load(R10, Mem::gs(segment_base(segment)));
                if let Ok(small) = i32::try_from(disp as i64) {
                    self.fixed |= relative;
                    self.code.lea(R10, Mem::base(R10, small));
                } else {
                    self.address_known(R11, disp, relative);
                    self.code.lea(R10, Mem::sum(R10, R11));
                }
            } else {
                self.address_known(R10, disp, relative);
            }
            return;
        }
        let narrow = base.size() == 4 || index.size() == 4;
        if narrow {
            disp = disp as u32 as i32 as i64 as u64;
        }
        let host_base = match base {
            Register::None => None,
            r => Some(match in_memory(r) {
                Some(home) => {
                    self.code.load(R10, gpr(home));
                    R10
                }
                None => number(r),
            }),
        };
        let host_index = match index {
            Register::None => None,
            r => Some((
                match in_memory(r) {
                    Some(home) => {
                        self.code.load(R11, gpr(home));
                        R11
                    }
                    None => number(r),
                },
                i.memory_index_scale().trailing_zeros() as u8,
            )),
        };
        let mem = Mem {
            base: host_base,
            index: host_index,
            disp: disp as i32,
            gs: false,
        };
        if narrow {
            self.code.byte(0x67);
            self.code.with_mem(None, false, &[0x8d], R10, mem);
        } else if mem.disp == 0 && mem.index.is_none() {
            if host_base != Some(R10)
                && let Some(b) = host_base
            {
                self.code.mov(R10, b);
            }
        } else {
            self.code.lea(R10, mem);
        }
        if let Some(segment) = segment {
            self.code.load(R11, Mem::gs(segment_base(segment)));
            self.code.lea(R10, Mem::sum(R10, R11));
        }
    }

    /// A guest address known now into a register; `relative`: to the instruction, so that it moves with the block.
    pub(super) fn address_known(&mut self, register: u8, va: u64, relative: bool) {
        if relative {
            self.guest_address(register, va);
        } else {
            self.code.mov_imm(register, va);
        }
    }

    /// Whether the memory operand moves with the block.
    pub(super) fn relative(&mut self) -> bool {
        self.fixed |= self.at.memory_base() == Register::EIP;
        self.at.memory_base() == Register::RIP
    }

    /// With the guest address in r10: leaves the offset in the page in r10 and the page's host address in r11.
    /// Destroys EFLAGS (the caller spared them).
    pub(super) fn check(&mut self, size: usize, write: bool, modify: bool) {
        let table = self.table(write);
        let words = self.memory_words(size, write, modify);
        let split = (words & leave::LOCK != 0).then(|| {
            self.code.mov32(R11, R10);
            self.code.and32(R11, 63);
            self.code.cmp_imm(R11, 64 - size as i32);
            self.code.jcc(CC_A)
        });
        let branch = self.probe(table, size);
        let back = self.code.here();
        if let Some(branch) = split {
            self.slow.push(Slow {
                branch,
                address: Address::Same,
                words,
                back,
            });
        }
        self.slow.push(Slow {
            branch,
            address: Address::Undo(table),
            words,
            back,
        });
        self.flags_destroyed();
    }

    /// The look itself: r10 as above and r11 the page's host address, or away where the buffer does not know the page or the
    /// access leaves it.
    pub(super) fn probe(&mut self, table: usize, size: usize) -> Patch {
        if self.bmi2 {
            self.code.raw(&[0xc4, 0x43, 0x7b, 0xf0, 0xda, 8]); // rorx r11d, r10d, 8
        } else {
            self.code.mov32(R11, R10);
            self.code.shr32(R11, 8);
        }
        self.code.and32(R11, (tlb::index(u64::MAX) as u32) << 4);
        self.code.xor_load(R10, Mem::gs_at(R11, table));
        self.code.cmp_imm(R10, 4096 - size as i32);
        let branch = self.code.jcc(CC_A);
        self.code.load(R11, Mem::gs_at(R11, table + 8));
        branch
    }

    pub(super) fn memory_words(&self, size: usize, write: bool, modify: bool) -> u32 {
        // The check itself destroys EFLAGS: only the slot can still hold them.
        self.word(leave::MEMORY)
            | if write { leave::WRITE } else { 0 }
            | if modify { leave::MODIFY } else { 0 }
            | if modify && size > 1 && kind::locked(&self.at) {
                leave::LOCK
            } else {
                0
            }
            | (size as u32) << leave::SIZE_SHIFT
    }

    /// As `check` for an address known now; answers the operand.
    pub(super) fn check_constant(
        &mut self,
        va: u64,
        size: usize,
        write: bool,
        modify: bool,
    ) -> Mem {
        let offset = va & 0xfff;
        let relative = self.relative();
        let split = offset % 64 + size as u64 > 64 && modify && kind::locked(&self.at);
        if offset + size as u64 > 4096 || split {
            self.address_known(R10, va, relative);
            self.check(size, write, modify);
            return Mem::sum(R10, R11);
        }
        let entry = self.table(write) + tlb::index(va) * 16;
        let words = self.memory_words(size, write, modify);
        let page = va - offset;
        if let Ok(imm) = i32::try_from(page as i64) {
            self.fixed |= relative;
            self.code.cmp_mem_imm(Mem::gs(entry), imm);
        } else {
            self.address_known(R10, page, relative);
            self.code.cmp_mem_reg(Mem::gs(entry), R10);
            if relative {
                self.buffer_slot(write);
            }
        }
        let branch = self.code.jcc(CC_NE);
        self.code.load(R11, Mem::gs(entry + 8));
        if relative {
            self.buffer_slot(write);
        }
        let back = self.code.here();
        self.slow.push(Slow {
            branch,
            address: Address::Constant(va, relative),
            words,
            back,
        });
        self.flags_destroyed();
        Mem::base(R11, offset as i32)
    }

    /// Checks the memory operand of the instruction; answers where it is.
    pub(super) fn operand(&mut self, size: usize, write: bool, modify: bool) -> Mem {
        match self.part {
            Some(Part::Lead { .. }) => return self.lead(),
            Some(Part::Follow { offset }) => return Mem::base(R10, offset),
            None => {}
        }
        self.spare_flags(self.live_before != 0);
        if let Some(va) = self.constant_address() {
            return self.check_constant(va, size, write, modify);
        }
        self.address();
        self.check(size, write, modify);
        Mem::sum(R10, R11)
    }

    /// A stack access at rsp + `offset`; answers where it is.
    pub(super) fn stack(&mut self, offset: i32, write: bool) -> Mem {
        match self.part {
            Some(Part::Lead { .. }) => return self.lead(),
            Some(Part::Follow { offset }) => return Mem::base(R10, offset),
            None => {}
        }
        self.spare_flags(self.live_before != 0);
        self.base_plus(RSP, offset);
        self.check(8, write, false);
        Mem::sum(R10, R11)
    }

    fn base_plus(&mut self, base: u8, offset: i32) {
        if offset == 0 {
            self.code.mov(R10, base);
        } else {
            self.code.lea(R10, Mem::base(base, offset));
        }
    }

    /// Checks the whole group that begins here; r10 stays the host address of its lowest byte to the group's end.
    fn lead(&mut self) -> Mem {
        let Some(Part::Lead {
            base,
            low,
            span,
            write,
            offset,
        }) = self.part
        else {
            unreachable!("called for leads")
        };
        self.spare_flags(self.live_before != 0);
        self.base_plus(base, low);
        self.check(span as usize, write, false);
        if let Some(slow) = self.slow.last_mut() {
            slow.words |= leave::GROUP;
        }
        self.code.lea(R10, Mem::sum(R10, R11));
        Mem::base(R10, offset)
    }

    /// `BT [memory], register` and its kin address bits beyond the operand.
    pub(super) fn bit_string(&mut self, k: kind::Kind) {
        self.spare_flags(self.live_before != 0);
        let bits = self.at.op1_register();
        let (size, log) = match bits.size() {
            2 => (2, 1u8),
            4 => (4, 2),
            _ => (8, 3),
        };
        self.address();
        match in_memory(bits) {
            Some(home) => self.code.load(R11, gpr(home)),
            None => self.code.mov(R11, number(bits)),
        }
        match size {
            // movsxd r11, r11d / movsx r11, r11w
            4 => self.code.with_reg(true, &[0x63], R11, R11),
            2 => self.code.with_reg(true, &[0x0f, 0xbf], R11, R11),
            _ => {}
        }
        self.code.sar64(R11, log + 3);
        self.code.lea(
            R10,
            Mem {
                base: Some(R10),
                index: Some((R11, log)),
                disp: 0,
                gs: false,
            },
        );
        self.flags_destroyed();
        self.check(size, k.writes, k.writes);
        self.code.lea(R10, Mem::sum(R10, R11));
        match in_memory(bits) {
            Some(home) => self.code.load(R11, gpr(home)),
            None => self.code.mov(R11, number(bits)),
        }
        self.code.and32(R11, size as u32 * 8 - 1);
        self.flags_for_instruction();
        let mut i = self.at;
        i.set_op1_register(r11_like(bits));
        self.encode_at(&mut i, Register::R10, Register::None, 0);
    }
}
