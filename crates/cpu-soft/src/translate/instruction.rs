//! One instruction at a time: native copies, memory operands, stack and control flow.

use std::mem::offset_of;

use iced_x86::{Code as C, Instruction, Mnemonic, OpKind, Register};

use super::emit::*;
use super::kind::{self, Way};
use super::{FLAGS_SLOT, GPR, SAVED_LOW, SAVED_OPERAND, Side, Site, Translator};
use crate::state::{Cpu, GS, Level, flag};

/// A register the guest's code names but which lives in memory.
pub(super) fn in_memory(register: Register) -> Option<usize> {
    match register.full_register() {
        Register::R10 => Some(10),
        Register::R11 => Some(11),
        _ => None,
    }
}

pub(super) fn number(register: Register) -> u8 {
    register.full_register().number() as u8
}

/// Host r11 in the size of `like`.
pub(super) fn r11_like(like: Register) -> Register {
    match like.size() {
        1 => Register::R11L,
        2 => Register::R11W,
        4 => Register::R11D,
        _ => Register::R11,
    }
}

pub(super) fn gpr(n: usize) -> Mem {
    Mem::gs(GPR + n * 8)
}

fn is_high_byte(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::BH | Register::CH | Register::DH
    )
}

impl Translator<'_> {
    /// Translates [`Translator::at`]; false when the block ends with it.
    pub(super) fn instruction(&mut self, way: Way) -> bool {
        let k = kind::kind(&self.at);
        if way == Way::Nothing {
            return true;
        }
        if way == Way::Rust {
            self.call_rust();
            if self.at.flow_control() != iced_x86::FlowControl::Next || self.at.is_invalid() {
                // Never reached when the helper did as promised; leave with rip as it set it.
                let next = self.at.next_ip();
                self.exit_to(next, true);
                return false;
            }
            return true;
        }
        if way == Way::Own {
            return self.own();
        }
        if way == Way::Repeat {
            self.repeat();
            return true;
        }
        if self.at.mnemonic() == Mnemonic::Lea && self.at.is_ip_rel_memory_operand() {
            self.lea_rip();
        } else if kind::touches(&self.at) {
            self.with_memory(k);
        } else {
            self.registers_only(k);
        }
        true
    }

    fn site(&mut self, start: u64, traps: bool) {
        if traps {
            let slot = self.flags != super::Flags::Host;
            self.lists.sites.push(Site {
                host: start,
                end: self.code.here(),
                rip: self.at.ip(),
                slot,
            });
        }
    }

    /// The guest's own bytes.
    pub(super) fn copy(&mut self) {
        let offset = self.at.ip().wrapping_sub(self.request.key.rip) as usize;
        let bytes = &self.request.bytes[offset..offset + self.at.len()];
        self.code.raw(bytes);
    }

    fn registers_only(&mut self, k: kind::Kind) {
        self.flags_for_instruction();
        let mut used = [false; 2];
        let mut written = [false; 2];
        for n in 0..self.at.op_count() {
            if self.at.op_kind(n) == OpKind::Register
                && let Some(r) = in_memory(self.at.op_register(n))
            {
                used[r - 10] = true;
                written[r - 10] |= k.register_writes >> n & 1 != 0;
            }
        }
        if self.at.mnemonic() == Mnemonic::Lea {
            for register in [self.at.memory_base(), self.at.memory_index()] {
                if let Some(r) = in_memory(register) {
                    used[r - 10] = true;
                }
            }
        }
        for r in [10usize, 11] {
            if used[r - 10] {
                self.code.load(r as u8, gpr(r));
            }
        }
        let start = self.code.here();
        self.copy();
        self.site(start, k.traps);
        for r in [10usize, 11] {
            if written[r - 10] {
                self.code.store(gpr(r), r as u8);
            }
        }
    }

    fn lea_rip(&mut self) {
        let target = self.at.memory_displacement64();
        let register = self.at.op0_register();
        let home = in_memory(register);
        let host = if home.is_some() {
            R10
        } else {
            number(register)
        };
        match register.size() {
            8 => self.guest_address(host, target),
            4 => {
                self.code.mov_imm(host, target & 0xffff_ffff);
                self.low_address();
            }
            _ => {
                self.fixed = true;
                if let Some(r) = home {
                    self.code.load(R10, gpr(r));
                }
                self.code.byte(0x66);
                if host >= 8 {
                    self.code.byte(0x41);
                }
                self.code.byte(0xb8 | (host & 7));
                self.code.raw(&(target as u16).to_le_bytes());
            }
        }
        if let Some(r) = home {
            self.code.store(gpr(r), R10);
        }
    }

    fn with_memory(&mut self, k: kind::Kind) {
        if kind::bit_string(&self.at) {
            return self.bit_string(k);
        }
        let size = self.at.memory_size().size();
        let mem = self.operand(size, k.writes, k.writes && k.reads);
        self.flags_for_instruction();
        let mut i = self.at;
        // Which register operands live in memory, which keep a REX prefix away?
        let mut homes = [None; 2];
        let mut high = false;
        let mut written = false;
        for n in 0..i.op_count() {
            if i.op_kind(n) == OpKind::Register {
                let r = i.op_register(n);
                high |= is_high_byte(r);
                if let Some(home) = in_memory(r) {
                    homes[home - 10] = Some(n);
                    written |= k.register_writes >> n & 1 != 0;
                }
            }
        }
        match homes {
            [None, None] if high => {
                let low = self.low_register();
                self.code.store(Mem::gs(SAVED_LOW), low);
                self.code.lea(low, mem);
                self.encode_at(&mut i, low_name(low), Register::None, 0);
                self.code.load(low, Mem::gs(SAVED_LOW));
            }
            [None, None] => {
                let start = self.code.here();
                let index = if mem.index.is_some() {
                    Register::R11
                } else {
                    Register::None
                };
                let base = if mem.base == Some(R10) {
                    Register::R10
                } else {
                    Register::R11
                };
                self.encode_at(&mut i, base, index, mem.disp);
                self.site(start, k.traps);
            }
            [Some(_), Some(_)] => {
                // Both scratch registers are operands (BMI2 and the like, which only read memory): the value goes by the frame.
                self.code.lea(R10, mem);
                // No more than the operand: behind it the memory may end.
                if size == 4 {
                    self.code.load32(R11, Mem::base(R10, 0));
                } else {
                    self.code.load(R11, Mem::base(R10, 0));
                }
                self.code.store(Mem::gs(SAVED_OPERAND), R11);
                self.code.load(R10, gpr(10));
                self.code.load(R11, gpr(11));
                i.set_segment_prefix(Register::GS);
                i.set_memory_base(Register::None);
                i.set_memory_index(Register::None);
                i.set_memory_displacement64(SAVED_OPERAND as u64);
                i.set_memory_displ_size(4);
                self.encode(&i);
                self.code.store(gpr(10), R10);
                self.code.store(gpr(11), R11);
            }
            [Some(_), None] | [None, Some(_)] => {
                let home = if homes[0].is_some() { 10 } else { 11 };
                self.code.lea(R10, mem);
                self.code.load(R11, gpr(home));
                for n in 0..i.op_count() {
                    if i.op_kind(n) == OpKind::Register && in_memory(i.op_register(n)).is_some() {
                        let like = r11_like(i.op_register(n));
                        i.set_op_register(n, like);
                    }
                }
                let start = self.code.here();
                self.encode_at(&mut i, Register::R10, Register::None, 0);
                self.site(start, k.traps);
                if written {
                    self.code.store(gpr(home), R11);
                }
            }
        }
    }

    /// A register below 8 that the instruction does not name, for operands that cannot have a REX prefix.
    fn low_register(&self) -> u8 {
        let mut taken = [false; 16];
        for n in 0..self.at.op_count() {
            if self.at.op_kind(n) == OpKind::Register {
                taken[number(self.at.op_register(n)) as usize] = true;
            }
        }
        // CMPXCHG uses AL.
        if !taken[usize::from(RSI)] { RSI } else { RDI }
    }

    pub(super) fn encode_at(
        &mut self,
        i: &mut Instruction,
        base: Register,
        index: Register,
        disp: i32,
    ) {
        i.set_segment_prefix(Register::None);
        i.set_memory_base(base);
        i.set_memory_index(index);
        i.set_memory_index_scale(1);
        i.set_memory_displacement64(disp as i64 as u64);
        i.set_memory_displ_size(if disp == 0 { 0 } else { 8 });
        // The forms with an absolute address have no ModRM: take those that do.
        match i.code() {
            C::Mov_AL_moffs8 => i.set_code(C::Mov_r8_rm8),
            C::Mov_AX_moffs16 => i.set_code(C::Mov_r16_rm16),
            C::Mov_EAX_moffs32 => i.set_code(C::Mov_r32_rm32),
            C::Mov_RAX_moffs64 => i.set_code(C::Mov_r64_rm64),
            C::Mov_moffs8_AL => i.set_code(C::Mov_rm8_r8),
            C::Mov_moffs16_AX => i.set_code(C::Mov_rm16_r16),
            C::Mov_moffs32_EAX => i.set_code(C::Mov_rm32_r32),
            C::Mov_moffs64_RAX => i.set_code(C::Mov_rm64_r64),
            _ => {}
        }
        self.encode(i);
    }

    fn encode(&mut self, i: &Instruction) {
        self.encoder
            .set_buffer(std::mem::take(&mut self.code.bytes));
        let done = self.encoder.encode(i, 0);
        self.code.bytes = self.encoder.take_buffer();
        if let Err(e) = done {
            // Never seen for what `kind` lets through; a trap here becomes #UD for the guest instead of wrong work.
            tracing::error!(instruction = ?i, error = %e, "cannot encode");
            self.code.raw(&[0x0f, 0x0b]);
        }
    }

    /// A value for a store: the register that holds it once r10 is the whole address.
    fn store_value(&mut self, value: Value, mem: Mem) {
        let direct = match value {
            Value::Register(r) if in_memory(r).is_none() => {
                return self.code.store(mem, number(r));
            }
            Value::Immediate(v) | Value::Address(v) if i32::try_from(v as i64).is_ok() => {
                self.fixed |= matches!(value, Value::Address(_));
                return self.code.store_imm(mem, v as i32);
            }
            // In a group r10 alone is the address, and stays.
            _ if mem.index.is_none() => mem,
            _ => {
                self.code.lea(R10, mem);
                Mem::base(R10, 0)
            }
        };
        match value {
            Value::Register(r) => self.code.load(R11, gpr(in_memory(r).unwrap_or(10))),
            Value::Immediate(v) => self.code.mov_imm(R11, v),
            Value::Address(v) => self.guest_address(R11, v),
            Value::Saved => self.code.load(R11, Mem::gs(SAVED_OPERAND)),
        }
        self.code.store(direct, R11);
    }

    fn push(&mut self, value: Value) {
        let mem = self.stack(-8, true);
        self.store_value(value, mem);
        self.code.lea(RSP, Mem::base(RSP, -8));
    }

    /// A branch target or operand from register or memory into `r10`.
    fn value_to_r10(&mut self) {
        if self.at.op0_kind() == OpKind::Memory {
            let mem = self.operand(8, false, false);
            self.code.load(R10, mem);
        } else {
            let r = self.at.op0_register();
            match in_memory(r) {
                Some(home) => self.code.load(R10, gpr(home)),
                None => self.code.mov(R10, number(r)),
            }
        }
    }

    fn own(&mut self) -> bool {
        let i = self.at;
        match i.code() {
            C::Push_r64 => self.push(Value::Register(i.op0_register())),
            C::Push_rm64 => {
                if i.op0_kind() == OpKind::Memory {
                    let mem = self.operand(8, false, false);
                    self.code.load(R10, mem);
                    self.code.store(Mem::gs(SAVED_OPERAND), R10);
                    self.push(Value::Saved);
                } else {
                    self.push(Value::Register(i.op0_register()));
                }
            }
            C::Pushq_imm32 => self.push(Value::Immediate(i.immediate32to64() as u64)),
            C::Pushq_imm8 => self.push(Value::Immediate(i.immediate8to64() as u64)),
            C::Pop_rm64 if i.op0_kind() == OpKind::Memory => {
                let mem = self.stack(0, false);
                self.code.load(R10, mem);
                self.code.store(Mem::gs(SAVED_OPERAND), R10);
                // An address by rsp is computed after the increment.
                self.spare_flags(self.live_before != 0);
                let by_rsp = i.memory_base().full_register() == Register::RSP;
                if by_rsp {
                    self.at
                        .set_memory_displacement64(i.memory_displacement64().wrapping_add(8));
                }
                if let Some(va) = self.constant_address() {
                    let relative = self.relative();
                    self.address_known(R10, va, relative);
                } else {
                    self.address();
                }
                self.check(8, true, false);
                self.store_value(Value::Saved, Mem::sum(R10, R11));
                self.code.lea(RSP, Mem::base(RSP, 8));
            }
            C::Pop_r64 | C::Pop_rm64 => {
                let mem = self.stack(0, false);
                let r = i.op0_register();
                if r == Register::RSP {
                    self.code.load(RSP, mem);
                } else {
                    match in_memory(r) {
                        Some(home) => {
                            self.code.load(R10, mem);
                            self.code.store(gpr(home), R10);
                        }
                        None => self.code.load(number(r), mem),
                    }
                    self.code.lea(RSP, Mem::base(RSP, 8));
                }
            }
            C::Leaveq => {
                self.spare_flags(self.live_before != 0);
                self.code.mov(R10, RBP);
                self.check(8, false, false);
                self.code.lea(RSP, Mem::base(RBP, 8));
                self.code.load(RBP, Mem::sum(R10, R11));
            }
            C::Call_rel32_64 => {
                self.push(Value::Address(i.next_ip()));
                self.exit_to(i.near_branch_target(), true);
                return false;
            }
            C::Call_rm64 => {
                self.value_to_r10();
                self.code.store(Mem::gs(SAVED_OPERAND), R10);
                self.push(Value::Address(i.next_ip()));
                self.spare_flags(true);
                self.code.load(R10, Mem::gs(SAVED_OPERAND));
                self.exit_indirect();
                return false;
            }
            C::Jmp_rm64 => {
                self.spare_flags(true);
                self.value_to_r10();
                self.exit_indirect();
                return false;
            }
            C::Retnq | C::Retnq_imm16 => {
                self.spare_flags(true);
                let mem = self.stack(0, false);
                self.code.load(R10, mem);
                let pop = 8 + if i.code() == C::Retnq_imm16 {
                    i32::from(i.immediate16())
                } else {
                    0
                };
                self.code.lea(RSP, Mem::base(RSP, pop));
                self.exit_indirect();
                return false;
            }
            C::Jmp_rel8_64 | C::Jmp_rel32_64 => {
                self.exit_to(i.near_branch_target(), self.live_after != 0);
                return false;
            }
            C::Cli => {
                self.spare_flags(self.live_after != 0);
                self.code
                    .with_mem(None, false, &[0x81], 4, Mem::gs(offset_of!(Cpu, rflags)));
                self.code.u32(!(flag::IF as u32));
                self.flags_destroyed();
            }
            C::Sti => {
                self.spare_flags(self.live_after != 0);
                self.code
                    .cmp32_mem_imm8(Mem::gs(offset_of!(Cpu, interrupt_waits)), 0);
                self.flags_destroyed();
                let calm = self.code.jcc_short(CC_E);
                // An interrupt waits for this: Rust sets the flag, and the run loop minds the shadow.
                let before = self.flags;
                self.call_rust();
                self.flags = before;
                self.code.bind_short(calm);
                self.code
                    .with_mem(None, false, &[0x81], 1, Mem::gs(offset_of!(Cpu, rflags)));
                self.code.u32(flag::IF as u32);
            }
            C::Cld | C::Std => {
                self.copy();
                let down = i32::from(i.code() == C::Std);
                self.code
                    .store32_imm(Mem::gs(offset_of!(Cpu, direction)), down);
            }
            C::Swapgs => {
                let (base, kernel) = (
                    Mem::gs(segment_base(GS)),
                    Mem::gs(offset_of!(Cpu, kernel_gs_base)),
                );
                self.code.load(R10, base);
                self.code.load(R11, kernel);
                self.code.store(base, R11);
                self.code.store(kernel, R10);
            }
            C::Syscall => {
                self.want_flags();
                self.guest_address(RCX, i.next_ip());
                self.code.jmp_to(self.request.stubs.syscall);
                self.stub_displacement();
                return false;
            }
            C::Sysretq => {
                self.rust_by(self.request.stubs.sysret);
                self.exit_to(i.next_ip(), true);
                return false;
            }
            C::Pushfq => {
                // The flags by way of the host's stack, the rest from memory.
                self.want_flags();
                self.spare_flags(true);
                self.code.store(gpr(4), RSP);
                self.code.load(RSP, Mem::gs(offset_of!(Cpu, host_rsp)));
                self.code.raw(&[0x9c, 0x41, 0x5a]); // pushfq; pop r10
                self.code.load(RSP, gpr(4));
                self.code.and32(R10, flag::NATIVE as u32);
                self.code.load32(R11, Mem::gs(offset_of!(Cpu, rflags)));
                self.code
                    .and32(R11, !((flag::NATIVE | flag::RF | flag::VM) as u32));
                self.code.with_reg(false, &[0x09], R11, R10); // or r10d, r11d
                self.flags_destroyed();
                self.code.store(Mem::gs(SAVED_OPERAND), R10);
                self.push(Value::Saved);
            }
            C::Rdtsc | C::Rdtscp => {
                if !self.request.tsc_shifted {
                    self.code.raw(&[0x0f, 0x31]);
                } else {
                    self.spare_flags(self.live_before != 0);
                    self.code.raw(&[0x0f, 0x31]);
                    // shl rdx,32; or rax,rdx; add rax,[offset]; mov rdx,rax; shr rdx,32; mov eax,eax
                    self.code.raw(&[0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0]);
                    self.code.with_mem(
                        None,
                        true,
                        &[0x03],
                        RAX,
                        Mem::gs(offset_of!(Cpu, tsc_offset)),
                    );
                    self.code.mov(RDX, RAX);
                    self.code.raw(&[0x48, 0xc1, 0xea, 0x20]);
                    self.code.mov32(RAX, RAX);
                    self.flags_destroyed();
                }
                if i.code() == C::Rdtscp {
                    self.code.load32(RCX, Mem::gs(offset_of!(Cpu, tsc_aux)));
                }
            }
            _ => {
                return self.conditional();
            }
        }
        true
    }

    /// A conditional branch; true where what follows it is behind it.
    fn conditional(&mut self) -> bool {
        let i = self.at;
        if i.is_jcc_short_or_near() {
            self.want_flags();
            let condition = (i.condition_code() as u8) - 1;
            let (target, live) = (i.near_branch_target(), self.live_taken);
            if !self.chainable(target) {
                let branch = self.code.jcc(condition);
                self.sides.push(Side {
                    branch,
                    at: i,
                    flags: self.flags,
                    live,
                });
            } else if target > i.ip() {
                let exit = self.exit(target);
                let branch = self.code.jcc(condition);
                self.chained(branch, exit);
            } else {
                let over = self.code.jcc_short(condition ^ 1);
                let before = self.flags;
                self.exit_to(target, live);
                self.flags = before;
                self.code.bind_short(over);
            }
            return true;
        }
        let live = self.live_after != 0;
        let counting = matches!(
            i.mnemonic(),
            Mnemonic::Loop | Mnemonic::Jrcxz | Mnemonic::Jecxz | Mnemonic::Jcxz
        );
        if !counting {
            self.want_flags();
        }
        // LOOP and JRCXZ only have short forms: over a jump.
        let mut bytes: Vec<u8> = Vec::with_capacity(6);
        let offset = i.ip().wrapping_sub(self.request.key.rip) as usize;
        bytes.extend_from_slice(&self.request.bytes[offset..offset + i.len()]);
        if let Some(last) = bytes.last_mut() {
            *last = 5;
        }
        self.code.raw(&bytes);
        let not_taken = self.code.jmp();
        let before = self.flags;
        self.exit_to(i.near_branch_target(), live);
        self.flags = before;
        self.code.bind(not_taken);
        self.exit_to(i.next_ip(), live);
        false
    }
}

enum Value {
    Register(Register),
    Immediate(u64),
    /// A guest address that moves with the block.
    Address(u64),
    Saved,
}

fn low_name(register: u8) -> Register {
    if register == RSI {
        Register::RSI
    } else {
        Register::RDI
    }
}

pub(super) fn segment_base(segment: usize) -> usize {
    offset_of!(Cpu, segments)
        + segment * size_of::<cpu::x86::Segment>()
        + offset_of!(cpu::x86::Segment, base)
}

const _: () = assert!(FLAGS_SLOT < 4096 && offset_of!(Level, read) == 0);
