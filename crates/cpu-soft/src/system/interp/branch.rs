//! Near branches: conditional, counting, calls and returns (SDM vol. 2).

use cpu::x86::RCX;
use iced_x86::{Code, ConditionCode, Instruction, Mnemonic, OpKind};

use super::operand::{self};
use crate::state::{Cpu, Fault, Flow, flag};
use crate::system::segment::code64;
use crate::system::stack::Stack;

/// Executes one instruction; `Ok(None)`: not a general-purpose one. Sets rip.
/// Whether a condition holds for RFLAGS.
pub fn condition_holds(flags: u64, condition: ConditionCode) -> bool {
    let f = |bit: u64| flags & bit != 0;
    let less = f(flag::SF) != f(flag::OF);
    match condition {
        ConditionCode::o => f(flag::OF),
        ConditionCode::no => !f(flag::OF),
        ConditionCode::b => f(flag::CF),
        ConditionCode::ae => !f(flag::CF),
        ConditionCode::e => f(flag::ZF),
        ConditionCode::ne => !f(flag::ZF),
        ConditionCode::be => f(flag::CF) || f(flag::ZF),
        ConditionCode::a => !f(flag::CF) && !f(flag::ZF),
        ConditionCode::s => f(flag::SF),
        ConditionCode::ns => !f(flag::SF),
        ConditionCode::p => f(flag::PF),
        ConditionCode::np => !f(flag::PF),
        ConditionCode::l => less,
        ConditionCode::ge => !less,
        ConditionCode::le => less || f(flag::ZF),
        ConditionCode::g => !less && !f(flag::ZF),
        ConditionCode::None => true,
    }
}

/// Near branches.
pub(super) fn branch(cpu: &mut Cpu, i: &Instruction) -> Result<Option<Flow>, Fault> {
    use Mnemonic as M;
    let next = i.next_ip();
    let target = match i.mnemonic() {
        M::Jmp => near_target(cpu, i)?,
        M::Call => {
            let target = near_target(cpu, i)?;
            let bytes = i.stack_pointer_increment().unsigned_abs() as usize;
            check_target(cpu, target)?;
            let mut stack = Stack::current(cpu);
            stack.push(cpu, bytes, next)?;
            stack.commit(cpu);
            target
        }
        M::Ret => {
            let bytes = match i.code() {
                Code::Retnw | Code::Retnw_imm16 => 2,
                Code::Retnd | Code::Retnd_imm16 => 4,
                _ => 8,
            };
            let mut stack = Stack::current(cpu);
            let target = stack.pop(cpu, bytes)?;
            check_target(cpu, target)?;
            if i.op_count() > 0 {
                stack.add(u64::from(i.immediate16()));
            }
            stack.commit(cpu);
            target
        }
        M::Loop | M::Loope | M::Loopne => {
            let width = loop_mask(i);
            let count = cpu.gpr[RCX].wrapping_sub(1) & width;
            let zf = cpu.rflags & flag::ZF != 0;
            let taken = count != 0
                && match i.mnemonic() {
                    M::Loope => zf,
                    M::Loopne => !zf,
                    _ => true,
                };
            let target = if taken { i.near_branch_target() } else { next };
            check_target(cpu, target)?;
            cpu.gpr[RCX] = if width == 0xffff {
                cpu.gpr[RCX] & !width | count
            } else {
                count
            };
            target
        }
        M::Jcxz | M::Jecxz | M::Jrcxz => {
            let width = match i.mnemonic() {
                M::Jcxz => 0xffff,
                M::Jecxz => 0xffff_ffff,
                _ => u64::MAX,
            };
            if cpu.gpr[RCX] & width == 0 {
                i.near_branch_target()
            } else {
                next
            }
        }
        _ if i.is_jcc_short_or_near() => {
            if condition_holds(cpu.rflags, i.condition_code()) {
                i.near_branch_target()
            } else {
                next
            }
        }
        _ => return Ok(None),
    };
    check_target(cpu, target)?;
    cpu.rip = target;
    Ok(Some(Flow::EndBlock))
}

pub(super) fn loop_mask(i: &Instruction) -> u64 {
    match i.code() {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => 0xffff,
        Code::Loop_rel8_64_RCX
        | Code::Loop_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX
        | Code::Loopne_rel8_16_RCX => u64::MAX,
        _ => 0xffff_ffff,
    }
}

pub(super) fn near_target(cpu: &mut Cpu, i: &Instruction) -> Result<u64, Fault> {
    match i.op0_kind() {
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
            Ok(i.near_branch_target())
        }
        _ => {
            let size = operand::size(i, 0);
            operand::read(cpu, i, 0, size)
        }
    }
}

pub(super) fn check_target(cpu: &Cpu, target: u64) -> Result<(), Fault> {
    let fits = if code64(cpu) {
        crate::system::paging::canonical(target)
    } else {
        target <= u64::from(cpu.segments[crate::state::CS].limit)
    };
    if fits { Ok(()) } else { Err(Fault::GP) }
}
