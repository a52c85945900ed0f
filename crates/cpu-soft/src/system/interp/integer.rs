//! The general-purpose instructions (SDM vol. 1, 5.1), of every operand and address size, in every mode.

use cpu::x86::{RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP};
use iced_x86::{Code, ConditionCode, Instruction, Mnemonic, OpKind, Register};

use super::alu::{self, Outcome, Shift};
use super::operand::{self, mask, read_register, sign_extend, write_register};
use crate::mem::Place;
use crate::state::{Access, Cpu, Fault, Flow, Rights, flag};
use crate::system::segment::{linear as segment_linear, stack_size};
use crate::system::stack::Stack;

/// Executes one instruction; `Ok(None)`: not a general-purpose one. Sets rip.
use super::bits::{bit_count, bit_test, manipulate};
use super::branch::branch;
pub use super::branch::condition_holds;

pub fn execute(cpu: &mut Cpu, i: &Instruction) -> Result<Option<Flow>, Fault> {
    use Mnemonic as M;
    if let Some(flow) = branch(cpu, i)? {
        return Ok(Some(flow));
    }
    match i.mnemonic() {
        M::Mov | M::Movbe => transfer(cpu, i)?,
        M::Movzx => extend(cpu, i, false)?,
        M::Movsx | M::Movsxd => extend(cpu, i, true)?,
        M::Movnti => {
            let size = operand::size(i, 1);
            let value = operand::read(cpu, i, 1, size)?;
            operand::write(cpu, i, 0, size, value)?;
        }
        M::Lea => {
            let value = operand::offset(cpu, i);
            write_register(cpu, i.op0_register(), value);
        }
        M::Add | M::Adc | M::Sub | M::Sbb | M::And | M::Or | M::Xor => binary(cpu, i)?,
        M::Cmp | M::Test => {
            let size = operand::size(i, 0);
            let a = operand::read(cpu, i, 0, size)?;
            let b = operand::read(cpu, i, 1, size)?;
            if i.mnemonic() == M::Cmp {
                alu::sub(a, b, 0, size).set(cpu)
            } else {
                alu::logic(a & b, size).set(cpu)
            }
        }
        M::Inc | M::Dec | M::Neg | M::Not => {
            let size = operand::size(i, 0);
            let mnemonic = i.mnemonic();
            let f = |a: u64| match mnemonic {
                M::Inc => alu::inc(a, size),
                M::Dec => alu::dec(a, size),
                M::Neg => alu::sub(0, a, 0, size),
                _ => Outcome {
                    value: !a & mask(size),
                    flags: 0,
                    changed: 0,
                },
            };
            unary(cpu, i, size, f)?;
        }
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr => {
            let size = operand::size(i, 0);
            let count = operand::read(cpu, i, 1, 1)?;
            let carry = cpu.rflags & flag::CF != 0;
            let kind = match i.mnemonic() {
                M::Shl | M::Sal => Shift::Shl,
                M::Shr => Shift::Shr,
                M::Sar => Shift::Sar,
                M::Rol => Shift::Rol,
                M::Ror => Shift::Ror,
                M::Rcl => Shift::Rcl,
                _ => Shift::Rcr,
            };
            unary(cpu, i, size, |a| alu::shift(kind, a, count, carry, size))?;
        }
        M::Shld | M::Shrd => {
            let size = operand::size(i, 0);
            let b = operand::read(cpu, i, 1, size)?;
            let count = operand::read(cpu, i, 2, 1)?;
            let left = i.mnemonic() == M::Shld;
            unary(cpu, i, size, |a| alu::double_shift(left, a, b, count, size))?;
        }
        M::Mul | M::Imul => multiply(cpu, i)?,
        M::Div | M::Idiv => divide(cpu, i)?,
        M::Xchg => {
            let size = operand::size(i, 0);
            if i.op0_kind() == OpKind::Register && i.op1_kind() == OpKind::Memory {
                exchange(cpu, i, 1, 0, size)?;
            } else {
                exchange(cpu, i, 0, 1, size)?;
            }
        }
        M::Xadd => {
            let size = operand::size(i, 0);
            let b = operand::read(cpu, i, 1, size)?;
            let old = operand::modify(cpu, i, 0, size, |a| alu::add(a, b, 0, size).value)?;
            alu::add(old, b, 0, size).set(cpu);
            // With both operands the same register the sum wins.
            if !(i.op0_kind() == OpKind::Register && i.op0_register() == i.op1_register()) {
                write_register(cpu, i.op1_register(), old);
            }
        }
        M::Cmpxchg => {
            let size = operand::size(i, 0);
            let expected = cpu.gpr[RAX] & mask(size);
            let new = operand::read(cpu, i, 1, size)?;
            // A failed compare leaves a register alone, also its upper half, but writes memory back.
            let old = if i.op0_kind() == OpKind::Register {
                let old = read_register(cpu, i.op0_register());
                if old == expected {
                    write_register(cpu, i.op0_register(), new);
                }
                old
            } else {
                operand::modify(cpu, i, 0, size, |a| if a == expected { new } else { a })?
            };
            alu::sub(expected, old, 0, size).set(cpu);
            if old != expected {
                write_register(cpu, accumulator(size), old);
            }
        }
        M::Cmpxchg8b => compare_exchange_pair(cpu, i, 4)?,
        M::Cmpxchg16b => compare_exchange_pair(cpu, i, 8)?,
        M::Bt | M::Bts | M::Btr | M::Btc => bit_test(cpu, i)?,
        M::Bsf | M::Bsr | M::Tzcnt | M::Lzcnt | M::Popcnt => bit_count(cpu, i)?,
        M::Bswap => {
            let register = i.op0_register();
            let value = read_register(cpu, register);
            let swapped = match register.size() {
                8 => value.swap_bytes(),
                4 => u64::from((value as u32).swap_bytes()),
                // Undefined; processors answer zero.
                _ => 0,
            };
            write_register(cpu, register, swapped);
        }
        M::Cbw => cpu.gpr[RAX] = cpu.gpr[RAX] & !0xffff | sign_extend(cpu.gpr[RAX], 1) & 0xffff,
        M::Cwde => cpu.gpr[RAX] = sign_extend(cpu.gpr[RAX], 2) & 0xffff_ffff,
        M::Cdqe => cpu.gpr[RAX] = sign_extend(cpu.gpr[RAX], 4),
        M::Cwd => {
            let high = sign_extend(cpu.gpr[RAX], 2) >> 16 & 0xffff;
            write_register(cpu, Register::DX, high);
        }
        M::Cdq => cpu.gpr[RDX] = sign_extend(cpu.gpr[RAX], 4) >> 32,
        M::Cqo => cpu.gpr[RDX] = if cpu.gpr[RAX] >> 63 != 0 { u64::MAX } else { 0 },
        M::Push => {
            let bytes = i.stack_pointer_increment().unsigned_abs() as usize;
            let value = match i.op0_kind() {
                OpKind::Register | OpKind::Memory => operand::read(cpu, i, 0, bytes)?,
                _ => i.immediate(0),
            };
            let mut stack = Stack::current(cpu);
            stack.push(cpu, bytes, value)?;
            stack.commit(cpu);
        }
        M::Pop => {
            let bytes = i.stack_pointer_increment().unsigned_abs() as usize;
            let mut stack = Stack::current(cpu);
            let value = stack.pop(cpu, bytes)?;
            let before = cpu.gpr[RSP];
            // The address of a memory operand is computed with the pointer already moved.
            stack.commit(cpu);
            if let Err(fault) = operand::write(cpu, i, 0, bytes, value) {
                cpu.gpr[RSP] = before;
                return Err(fault);
            }
        }
        M::Pusha | M::Pushad => {
            let bytes = if i.mnemonic() == M::Pusha { 2 } else { 4 };
            let mut stack = Stack::current(cpu);
            let values = [RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI].map(|r| cpu.gpr[r]);
            for value in values {
                stack.push(cpu, bytes, value)?;
            }
            stack.commit(cpu);
        }
        M::Popa | M::Popad => {
            let bytes = if i.mnemonic() == M::Popa { 2 } else { 4 };
            let mut stack = Stack::current(cpu);
            let mut values = [0u64; 8];
            for value in &mut values {
                *value = stack.pop(cpu, bytes)?;
            }
            stack.commit(cpu);
            for (register, value) in [RDI, RSI, RBP, RSP, RBX, RDX, RCX, RAX]
                .into_iter()
                .zip(values)
            {
                if register != RSP {
                    cpu.gpr[register] = if bytes == 4 {
                        value
                    } else {
                        cpu.gpr[register] & !0xffff | value
                    };
                }
            }
        }
        M::Enter => enter(cpu, i)?,
        M::Leave => {
            let bytes = i.stack_pointer_increment_of_leave();
            let old = cpu.gpr[RSP];
            let width = mask(stack_size(cpu));
            cpu.gpr[RSP] = if width == 0xffff {
                old & !width | cpu.gpr[RBP] & width
            } else {
                cpu.gpr[RBP] & width
            };
            let mut stack = Stack::current(cpu);
            match stack.pop(cpu, bytes) {
                Ok(value) => {
                    stack.commit(cpu);
                    cpu.gpr[RBP] = if bytes == 2 {
                        cpu.gpr[RBP] & !0xffff | value
                    } else {
                        value
                    };
                }
                Err(fault) => {
                    cpu.gpr[RSP] = old;
                    return Err(fault);
                }
            }
        }
        M::Lahf => {
            let flags = cpu.rflags & 0xd5 | flag::FIXED;
            write_register(cpu, Register::AH, flags);
        }
        M::Sahf => cpu.rflags = cpu.rflags & !0xd5 | read_register(cpu, Register::AH) & 0xd5,
        M::Clc => cpu.rflags &= !flag::CF,
        M::Stc => cpu.rflags |= flag::CF,
        M::Cmc => cpu.rflags ^= flag::CF,
        M::Cld => cpu.rflags &= !flag::DF,
        M::Std => cpu.rflags |= flag::DF,
        M::Xlatb => {
            let width = mask(operand::address_size(i));
            let offset = cpu.gpr[RBX].wrapping_add(cpu.gpr[RAX] & 0xff) & width;
            let at = segment_linear(cpu, operand::memory_segment(i), offset, 1, false)?;
            let value = operand::load(cpu, at, 1)?;
            write_register(cpu, Register::AL, value);
        }
        M::Salc => {
            let value = if cpu.rflags & flag::CF != 0 { 0xff } else { 0 };
            write_register(cpu, Register::AL, value);
        }
        M::Daa | M::Das | M::Aaa | M::Aas | M::Aam | M::Aad => decimal(cpu, i)?,
        M::Bound => {
            let size = i.op0_register().size();
            let index = sign_extend(read_register(cpu, i.op0_register()), size) as i64;
            let at = operand::linear(cpu, i, size * 2, false)?;
            let low = sign_extend(operand::load(cpu, at, size)?, size) as i64;
            let high = sign_extend(
                operand::load(cpu, at.wrapping_add(size as u64), size)?,
                size,
            ) as i64;
            if index < low || index > high {
                return Err(Fault::plain(5));
            }
        }
        M::Crc32 => {
            let size = operand::size(i, 1);
            let data = operand::read(cpu, i, 1, size)?;
            let crc = read_register(cpu, i.op0_register()) as u32;
            write_register(
                cpu,
                i.op0_register(),
                u64::from(alu::crc32c(crc, data, size)),
            );
        }
        M::Adcx | M::Adox => {
            let size = operand::size(i, 0);
            let which = if i.mnemonic() == M::Adcx {
                flag::CF
            } else {
                flag::OF
            };
            let b = operand::read(cpu, i, 1, size)?;
            let a = read_register(cpu, i.op0_register());
            let outcome = alu::add(a, b, u64::from(cpu.rflags & which != 0), size);
            write_register(cpu, i.op0_register(), outcome.value);
            cpu.rflags = cpu.rflags & !which
                | if outcome.flags & flag::CF != 0 {
                    which
                } else {
                    0
                };
        }
        M::Andn
        | M::Bextr
        | M::Blsi
        | M::Blsmsk
        | M::Blsr
        | M::Bzhi
        | M::Mulx
        | M::Pdep
        | M::Pext
        | M::Rorx
        | M::Sarx
        | M::Shlx
        | M::Shrx => manipulate(cpu, i)?,
        M::Pause => cpu.pause(),
        M::Nop
        | M::Fnop
        | M::Endbr64
        | M::Endbr32
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetch
        | M::Reservednop
        | M::Cldemote => {}
        M::Lfence | M::Mfence | M::Sfence => {
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst)
        }
        _ => match i.condition_code() {
            ConditionCode::None => return Ok(None),
            // FCMOVcc and CMPccXADD have conditions too.
            _ if i.encoding() != iced_x86::EncodingKind::Legacy || i.op0_register().is_st() => {
                return Ok(None);
            }
            // SETcc and CMOVcc: Jcc went above.
            condition => {
                let holds = condition_holds(cpu.rflags, condition);
                if i.op_count() == 1 {
                    operand::write(cpu, i, 0, 1, u64::from(holds))?;
                } else {
                    let size = operand::size(i, 0);
                    // The source is read either way; a 32-bit destination is zero-extended either way.
                    let source = operand::read(cpu, i, 1, size)?;
                    let old = read_register(cpu, i.op0_register());
                    write_register(cpu, i.op0_register(), if holds { source } else { old });
                }
            }
        },
    }
    cpu.rip = i.next_ip();
    Ok(Some(Flow::Continue))
}

trait LeaveSize {
    fn stack_pointer_increment_of_leave(&self) -> usize;
}

impl LeaveSize for Instruction {
    fn stack_pointer_increment_of_leave(&self) -> usize {
        match self.code() {
            Code::Leavew => 2,
            Code::Leaved => 4,
            _ => 8,
        }
    }
}

fn accumulator(size: usize) -> Register {
    match size {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    }
}

/// MOV and MOVBE.
fn transfer(cpu: &mut Cpu, i: &Instruction) -> Result<(), Fault> {
    let size = operand::size(i, 0);
    let mut value = operand::read(cpu, i, 1, size)?;
    if i.mnemonic() == Mnemonic::Movbe {
        value = value.swap_bytes() >> (64 - size * 8);
    }
    operand::write(cpu, i, 0, size, value)
}

fn extend(cpu: &mut Cpu, i: &Instruction, signed: bool) -> Result<(), Fault> {
    let from = operand::size(i, 1);
    let value = operand::read(cpu, i, 1, from)?;
    let value = if signed {
        sign_extend(value, from)
    } else {
        value
    };
    write_register(cpu, i.op0_register(), value & mask(i.op0_register().size()));
    Ok(())
}

/// Replaces operand 0 by `f` of it and sets the flags.
fn unary(
    cpu: &mut Cpu,
    i: &Instruction,
    size: usize,
    f: impl Fn(u64) -> Outcome,
) -> Result<(), Fault> {
    let old = operand::modify(cpu, i, 0, size, |a| f(a).value)?;
    f(old).set(cpu);
    Ok(())
}

fn binary(cpu: &mut Cpu, i: &Instruction) -> Result<(), Fault> {
    use Mnemonic as M;
    let size = operand::size(i, 0);
    let b = operand::read(cpu, i, 1, size)?;
    let carry = u64::from(cpu.rflags & flag::CF != 0);
    let mnemonic = i.mnemonic();
    unary(cpu, i, size, |a| match mnemonic {
        M::Add => alu::add(a, b, 0, size),
        M::Adc => alu::add(a, b, carry, size),
        M::Sub => alu::sub(a, b, 0, size),
        M::Sbb => alu::sub(a, b, carry, size),
        M::And => alu::logic(a & b, size),
        M::Or => alu::logic(a | b, size),
        _ => alu::logic(a ^ b, size),
    })
}

fn exchange(cpu: &mut Cpu, i: &Instruction, to: u32, from: u32, size: usize) -> Result<(), Fault> {
    let register = i.op_register(from);
    let value = read_register(cpu, register);
    let old = operand::modify(cpu, i, to, size, |_| value)?;
    write_register(cpu, register, old);
    Ok(())
}

fn multiply(cpu: &mut Cpu, i: &Instruction) -> Result<(), Fault> {
    let size = operand::size(i, 0);
    if i.op_count() > 1 {
        // IMUL with two or three operands.
        let (a, b) = if i.op_count() == 3 {
            (
                operand::read(cpu, i, 1, size)?,
                operand::read(cpu, i, 2, size)?,
            )
        } else {
            (
                read_register(cpu, i.op0_register()),
                operand::read(cpu, i, 1, size)?,
            )
        };
        let (low, _, outcome) = alu::imul(a, b, size);
        write_register(cpu, i.op0_register(), low);
        outcome.set(cpu);
        return Ok(());
    }
    let b = operand::read(cpu, i, 0, size)?;
    let a = cpu.gpr[RAX];
    let (low, high, outcome) = if i.mnemonic() == Mnemonic::Mul {
        alu::mul(a, b, size)
    } else {
        alu::imul(a, b, size)
    };
    write_pair(cpu, low, high, size);
    outcome.set(cpu);
    Ok(())
}

/// AX, DX:AX, EDX:EAX, RDX:RAX.
fn write_pair(cpu: &mut Cpu, low: u64, high: u64, size: usize) {
    match size {
        1 => write_register(cpu, Register::AX, low | high << 8),
        2 => {
            write_register(cpu, Register::AX, low);
            write_register(cpu, Register::DX, high);
        }
        4 => {
            write_register(cpu, Register::EAX, low);
            write_register(cpu, Register::EDX, high);
        }
        _ => (cpu.gpr[RAX], cpu.gpr[RDX]) = (low, high),
    }
}

fn divide(cpu: &mut Cpu, i: &Instruction) -> Result<(), Fault> {
    let size = operand::size(i, 0);
    let d = operand::read(cpu, i, 0, size)?;
    let (high, low) = if size == 1 {
        (cpu.gpr[RAX] >> 8 & 0xff, cpu.gpr[RAX] & 0xff)
    } else {
        (cpu.gpr[RDX], cpu.gpr[RAX])
    };
    let result = if i.mnemonic() == Mnemonic::Div {
        alu::div(high, low, d, size)
    } else {
        alu::idiv(high, low, d, size)
    };
    let (quotient, remainder) = result.ok_or(Fault::DE)?;
    write_pair(cpu, quotient, remainder, size);
    Ok(())
}

/// CMPXCHG8B and CMPXCHG16B; `half`: bytes of a half.
fn compare_exchange_pair(cpu: &mut Cpu, i: &Instruction, half: usize) -> Result<(), Fault> {
    let at = operand::linear(cpu, i, half * 2, true)?;
    if half == 8 && at & 15 != 0 {
        return Err(Fault::GP);
    }
    let m = mask(half);
    let bits = half as u32 * 8;
    let join = |high: u64, low: u64| u128::from(high & m) << bits | u128::from(low & m);
    let expected = join(cpu.gpr[RDX], cpu.gpr[RAX]);
    let new = join(cpu.gpr[RCX], cpu.gpr[RBX]);
    let found = if half == 4 {
        match cpu.compare_exchange::<u64>(at, expected as u64, new as u64, Rights::Current)? {
            Ok(v) | Err(v) => u128::from(v),
        }
    } else {
        match cpu.place(at, Access::Write, Rights::Current)? {
            Place::Ram(host) if std::arch::is_x86_feature_detected!("cmpxchg16b") => {
                // SAFETY: in guest RAM, 16-aligned as `at` is; the instruction exists on this host.
                let found = unsafe { exchange16(host.cast(), expected, new) };
                cpu.stored(host);
                found
            }
            _ => {
                let (low, high) = (
                    operand::load(cpu, at, 8)?,
                    operand::load(cpu, at.wrapping_add(8), 8)?,
                );
                let found = join(high, low);
                let value = if found == expected { new } else { found };
                operand::store(cpu, at, 8, value as u64)?;
                operand::store(cpu, at.wrapping_add(8), 8, (value >> 64) as u64)?;
                found
            }
        }
    };
    if found == expected {
        cpu.rflags |= flag::ZF;
    } else {
        cpu.rflags &= !flag::ZF;
        cpu.gpr[RAX] = found as u64 & m;
        cpu.gpr[RDX] = (found >> bits) as u64 & m;
    }
    Ok(())
}

/// # Safety
/// `at` is valid for reads and writes of 16 bytes and aligned to 16.
unsafe fn exchange16(at: *mut u128, old: u128, new: u128) -> u128 {
    let (mut low, mut high) = (old as u64, (old >> 64) as u64);
    // SAFETY: the caller's promise; RBX, which the compiler keeps for itself, is put back.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {new}",
            "lock cmpxchg16b [{at}]",
            "mov rbx, {new}",
            at = in(reg) at,
            new = inout(reg) new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") low,
            inout("rdx") high,
            options(nostack),
        );
    }
    u128::from(high) << 64 | u128::from(low)
}

fn enter(cpu: &mut Cpu, i: &Instruction) -> Result<(), Fault> {
    let bytes = match i.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let frame_bytes = u64::from(i.immediate16());
    let level = i.immediate8_2nd() & 31;
    let mut stack = Stack::current(cpu);
    stack.push(cpu, bytes, cpu.gpr[RBP])?;
    let frame = stack.pointer();
    let mut base = cpu.gpr[RBP];
    let width = mask(stack_size(cpu));
    for _ in 1..level {
        base = base.wrapping_sub(bytes as u64);
        let at = segment_linear(cpu, crate::state::SS, base & width, bytes, false)?;
        let link = operand::load(cpu, at, bytes)?;
        stack.push(cpu, bytes, link)?;
    }
    if level > 0 {
        stack.push(cpu, bytes, frame)?;
    }
    stack.add(frame_bytes.wrapping_neg());
    stack.commit(cpu);
    cpu.gpr[RBP] = if bytes == 2 {
        cpu.gpr[RBP] & !0xffff | frame & 0xffff
    } else {
        frame & mask(bytes)
    };
    Ok(())
}

/// DAA, DAS, AAA, AAS, AAM, AAD.
fn decimal(cpu: &mut Cpu, i: &Instruction) -> Result<(), Fault> {
    use Mnemonic as M;
    let al = cpu.gpr[RAX] & 0xff;
    let (cf, af) = (cpu.rflags & flag::CF != 0, cpu.rflags & flag::AF != 0);
    let low_adjust = al & 15 > 9 || af;
    match i.mnemonic() {
        M::Daa | M::Das => {
            let adds = i.mnemonic() == M::Daa;
            let high_adjust = al > 0x99 || cf;
            let by = if low_adjust { 6 } else { 0 } + if high_adjust { 0x60 } else { 0 };
            let value = if adds {
                al.wrapping_add(by)
            } else {
                al.wrapping_sub(by)
            } & 0xff;
            let borrow = !adds && low_adjust && al < 6;
            write_register(cpu, Register::AL, value);
            let mut outcome = alu::logic(value, 1);
            outcome.flags |= if high_adjust || borrow { flag::CF } else { 0 }
                | if low_adjust { flag::AF } else { 0 };
            outcome.set(cpu);
        }
        M::Aaa | M::Aas => {
            let ax = cpu.gpr[RAX] & 0xffff;
            let adjusted = match (low_adjust, i.mnemonic()) {
                (true, M::Aaa) => ax.wrapping_add(0x106),
                (true, _) => ax.wrapping_sub(0x106),
                _ => ax,
            };
            write_register(cpu, Register::AX, adjusted & 0xff0f);
            let mut outcome = alu::logic(adjusted & 0x0f, 1);
            outcome.flags |= if low_adjust { flag::CF | flag::AF } else { 0 };
            outcome.set(cpu);
        }
        M::Aam => {
            let base = u64::from(i.immediate8());
            if base == 0 {
                return Err(Fault::DE);
            }
            write_register(cpu, Register::AX, ((al / base) << 8) | (al % base));
            alu::logic(al % base, 1).set(cpu);
        }
        _ => {
            let ah = cpu.gpr[RAX] >> 8 & 0xff;
            let value = al.wrapping_add(ah.wrapping_mul(u64::from(i.immediate8()))) & 0xff;
            write_register(cpu, Register::AX, value);
            alu::logic(value, 1).set(cpu);
        }
    }
    Ok(())
}
