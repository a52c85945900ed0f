//! Bit tests, counts and the BMI instructions (SDM vol. 2).

use cpu::x86::RDX;
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::alu::{self, Outcome, STATUS};
use super::operand::{self, mask, read_register, sign_extend, write_register};
use crate::state::{Cpu, Fault, flag};
use crate::system::segment::linear as segment_linear;

/// Executes one instruction; `Ok(None)`: not a general-purpose one. Sets rip.
/// BT, BTS, BTR, BTC. A register index reaches beyond the memory operand.
pub(super) fn bit_test(cpu: &mut Cpu, i: &Instruction) -> Result<(), Fault> {
    let size = operand::size(i, 0);
    let bits = size as u64 * 8;
    let index = operand::read(cpu, i, 1, size)?;
    let by_register = i.op1_kind() == OpKind::Register;
    let change = i.mnemonic();
    let selected = 1u64 << (index % bits);
    let f = |a: u64| match change {
        Mnemonic::Bts => a | selected,
        Mnemonic::Btr => a & !selected,
        Mnemonic::Btc => a ^ selected,
        _ => a,
    };
    let old = if i.op0_kind() == OpKind::Register {
        let old = read_register(cpu, i.op0_register());
        if change != Mnemonic::Bt {
            write_register(cpu, i.op0_register(), f(old));
        }
        old
    } else {
        let mut offset = operand::offset(cpu, i);
        if by_register {
            let element = (sign_extend(index, size) as i64).div_euclid(bits as i64);
            offset = offset.wrapping_add((element as u64).wrapping_mul(size as u64))
                & mask(operand::address_size(i));
        }
        let writes = change != Mnemonic::Bt;
        let at = segment_linear(cpu, operand::memory_segment(i), offset, size, writes)?;
        if writes {
            operand::modify_at(cpu, at, size, i.has_lock_prefix(), f)?
        } else {
            operand::load(cpu, at, size)?
        }
    };
    cpu.rflags = cpu.rflags & !flag::CF | if old & selected != 0 { flag::CF } else { 0 };
    Ok(())
}

pub(super) fn bit_count(cpu: &mut Cpu, i: &Instruction) -> Result<(), Fault> {
    use Mnemonic as M;
    let size = operand::size(i, 1);
    let bits = size as u32 * 8;
    let source = operand::read(cpu, i, 1, size)?;
    let leading = source.leading_zeros().saturating_sub(64 - bits);
    let trailing = source.trailing_zeros().min(bits);
    let zf = |z: bool| if z { flag::ZF } else { 0 };
    let result = match i.mnemonic() {
        M::Bsf | M::Bsr => {
            cpu.rflags = cpu.rflags & !flag::ZF | zf(source == 0);
            if source == 0 {
                // The destination stays as it is, all of it.
                return Ok(());
            }
            if i.mnemonic() == M::Bsf {
                trailing
            } else {
                bits - 1 - leading
            }
        }
        M::Tzcnt | M::Lzcnt => {
            let n = if i.mnemonic() == M::Tzcnt {
                trailing
            } else {
                leading
            };
            let cf = if source == 0 { flag::CF } else { 0 };
            cpu.rflags = cpu.rflags & !(flag::ZF | flag::CF) | zf(n == 0) | cf;
            n
        }
        _ => {
            cpu.rflags = cpu.rflags & !STATUS | zf(source == 0);
            source.count_ones()
        }
    };
    write_register(cpu, i.op0_register(), u64::from(result));
    Ok(())
}

/// BMI1 and BMI2.
pub(super) fn manipulate(cpu: &mut Cpu, i: &Instruction) -> Result<(), Fault> {
    use Mnemonic as M;
    let size = operand::size(i, 0);
    let bits = size as u64 * 8;
    let m = mask(size);
    let a = operand::read(cpu, i, 1, size)?;
    // RORX's count is a byte; the second source of the others has the operand size.
    let b = match i.mnemonic() {
        M::Rorx => u64::from(i.immediate8()),
        _ if i.op_count() == 3 => operand::read(cpu, i, 2, size)?,
        _ => 0,
    };
    let no_carry = |value: u64| Outcome {
        flags: alu::logic(value, size).flags,
        value,
        changed: STATUS,
    };
    let carry_if = |value: u64, carry: bool| {
        let mut outcome = no_carry(value & m);
        if carry {
            outcome.flags |= flag::CF;
        }
        outcome
    };
    let silent = |value: u64| Outcome {
        value: value & m,
        flags: 0,
        changed: 0,
    };
    let outcome = match i.mnemonic() {
        M::Andn => no_carry(!a & b & m),
        M::Bextr => {
            let (start, len) = (b & 0xff, b >> 8 & 0xff);
            let shifted = if start >= bits { 0 } else { a >> start };
            let value = if len >= 64 {
                shifted
            } else {
                shifted & ((1 << len) - 1)
            };
            Outcome {
                flags: if value == 0 { flag::ZF } else { 0 },
                value,
                changed: STATUS,
            }
        }
        M::Blsi => carry_if(a & a.wrapping_neg(), a != 0),
        M::Blsmsk => carry_if(a ^ a.wrapping_sub(1), a == 0),
        M::Blsr => carry_if(a & a.wrapping_sub(1), a == 0),
        M::Bzhi => {
            let index = b & 0xff;
            let value = if index >= bits {
                a
            } else {
                a & ((1 << index) - 1)
            };
            carry_if(value, index >= bits)
        }
        M::Mulx => {
            let product = u128::from(cpu.gpr[RDX] & m) * u128::from(b);
            // The high half is written last: it wins where both destinations are one register.
            write_register(cpu, i.op1_register(), product as u64 & m);
            silent((product >> bits) as u64)
        }
        M::Pdep => silent(alu::deposit(a, b)),
        M::Pext => silent(alu::extract(a, b)),
        M::Rorx => {
            let by = b & (bits - 1);
            silent(if by == 0 {
                a
            } else {
                a >> by | a << (bits - by)
            })
        }
        M::Sarx => silent((sign_extend(a, size) as i64 >> (b & (bits - 1))) as u64),
        M::Shlx => silent(a << (b & (bits - 1))),
        _ => silent(a >> (b & (bits - 1))),
    };
    write_register(cpu, i.op0_register(), outcome.value);
    outcome.set(cpu);
    Ok(())
}
