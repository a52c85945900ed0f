//! Far transfers of control: far JMP, CALL and RET, SYSCALL, SYSRET, SYSENTER, SYSEXIT.

use iced_x86::{Code, Instruction, OpKind};

use super::paging::canonical;
use super::segment::{self, Descriptor, attribute, code64, long_mode, protected, virtual_8086};
use super::stack::Stack;
use super::{cr, exceptions};
use crate::state::{CS, Cpu, Fault, Flow, Rights, SS, flag};
use crate::system::interp::operand;

use cpu::x86::{RCX, RDX, RSP};
const R11: usize = 11;

/// Attributes of the flat segments that the fast system calls load.
pub(crate) mod flat {
    pub const CODE64: u16 = 0xa09b;
    pub const CODE64_USER: u16 = 0xa0fb;
    pub const CODE32: u16 = 0xc09b;
    pub const CODE32_USER: u16 = 0xc0fb;
    pub const DATA: u16 = 0xc093;
    pub const DATA_USER: u16 = 0xc0f3;
}

/// SYSCALL (SDM vol. 2): 64-bit mode only, as on Intel's CPUs.
pub fn syscall(cpu: &mut Cpu, next: u64) -> Result<Flow, Fault> {
    if cpu.efer & cr::EFER_SCE == 0 || !code64(cpu) {
        return Err(Fault::UD);
    }
    let m = &cpu.system.msr;
    let selector = (m.star >> 32) as u16 & 0xfffc;
    let (target, masked) = (m.lstar, m.sfmask);
    cpu.gpr[RCX] = next;
    cpu.gpr[R11] = cpu.rflags & !flag::RF | flag::FIXED;
    cpu.rip = target;
    cpu.rflags = cpu.rflags & !(masked | flag::RF) | flag::FIXED;
    cpu.segments[CS] = segment::flat(selector, flat::CODE64);
    cpu.segments[SS] = segment::flat(selector.wrapping_add(8), flat::DATA);
    cpu.cpl = 0;
    Ok(Flow::EndBlock)
}

/// The flags that SYSRET takes from r11.
pub(crate) const SYSRET_FLAGS: u64 = 0x3c_7fd7;

/// SYSRET; `wide`: with REX.W, back to 64-bit code.
pub fn sysret(cpu: &mut Cpu, wide: bool) -> Result<Flow, Fault> {
    if cpu.efer & cr::EFER_SCE == 0 || !code64(cpu) {
        return Err(Fault::UD);
    }
    if cpu.cpl != 0 || (wide && !canonical(cpu.gpr[RCX])) {
        return Err(Fault::GP);
    }
    let base = (cpu.system.msr.star >> 48) as u16;
    if wide {
        cpu.rip = cpu.gpr[RCX];
        cpu.segments[CS] = segment::flat(base.wrapping_add(16) | 3, flat::CODE64_USER);
    } else {
        cpu.rip = cpu.gpr[RCX] & 0xffff_ffff;
        cpu.segments[CS] = segment::flat(base | 3, flat::CODE32_USER);
    }
    cpu.segments[SS] = segment::flat(base.wrapping_add(8) | 3, flat::DATA_USER);
    cpu.rflags = cpu.gpr[R11] & SYSRET_FLAGS | flag::FIXED;
    cpu.cpl = 3;
    Ok(Flow::EndBlock)
}

/// SYSENTER.
pub fn sysenter(cpu: &mut Cpu) -> Result<Flow, Fault> {
    let m = &cpu.system.msr;
    let selector = m.sysenter_cs as u16 & 0xfffc;
    if !protected(cpu) || selector == 0 {
        return Err(Fault::GP);
    }
    let (rip, rsp) = (m.sysenter_eip, m.sysenter_esp);
    cpu.rflags &= !(flag::VM | flag::IF | flag::RF);
    let long = long_mode(cpu);
    cpu.segments[CS] = segment::flat(selector, if long { flat::CODE64 } else { flat::CODE32 });
    cpu.segments[SS] = segment::flat(selector + 8, flat::DATA);
    cpu.rip = if long { rip } else { rip & 0xffff_ffff };
    cpu.gpr[RSP] = if long { rsp } else { rsp & 0xffff_ffff };
    cpu.cpl = 0;
    Ok(Flow::EndBlock)
}

/// SYSEXIT; `wide`: with REX.W.
pub fn sysexit(cpu: &mut Cpu, wide: bool) -> Result<Flow, Fault> {
    let selector = cpu.system.msr.sysenter_cs as u16 & 0xfffc;
    if !protected(cpu) || selector == 0 || cpu.cpl != 0 {
        return Err(Fault::GP);
    }
    let (rip, rsp) = (cpu.gpr[RDX], cpu.gpr[RCX]);
    if wide && !(canonical(rip) && canonical(rsp)) {
        return Err(Fault::GP);
    }
    let code = selector.wrapping_add(if wide { 32 } else { 16 }) | 3;
    cpu.segments[CS] = segment::flat(
        code,
        if wide {
            flat::CODE64_USER
        } else {
            flat::CODE32_USER
        },
    );
    cpu.segments[SS] = segment::flat(code.wrapping_add(8), flat::DATA_USER);
    cpu.rip = if wide { rip } else { rip & 0xffff_ffff };
    cpu.gpr[RSP] = if wide { rsp } else { rsp & 0xffff_ffff };
    cpu.cpl = 3;
    Ok(Flow::EndBlock)
}

/// The target of a far JMP or CALL and the operand size in bytes.
fn far_target(cpu: &mut Cpu, i: &Instruction) -> Result<(u16, u64, usize), Fault> {
    match i.op0_kind() {
        OpKind::FarBranch16 => Ok((i.far_branch_selector(), u64::from(i.far_branch16()), 2)),
        OpKind::FarBranch32 => Ok((i.far_branch_selector(), u64::from(i.far_branch32()), 4)),
        _ => {
            let bytes = match i.code() {
                Code::Jmp_m1616 | Code::Call_m1616 => 2,
                Code::Jmp_m1632 | Code::Call_m1632 => 4,
                _ => 8,
            };
            let at = operand::linear(cpu, i, bytes + 2, false)?;
            let target = operand::load(cpu, at, bytes)?;
            let selector = operand::load(cpu, at.wrapping_add(bytes as u64), 2)? as u16;
            Ok((selector, target, bytes))
        }
    }
}

/// Far JMP.
pub fn far_jump(cpu: &mut Cpu, i: &Instruction) -> Result<Flow, Fault> {
    let (selector, target, _) = far_target(cpu, i)?;
    if !protected(cpu) || virtual_8086(cpu) {
        return real_jump(cpu, selector, target);
    }
    let Transfer {
        code,
        selector,
        target,
        ..
    } = resolve(cpu, selector, target, false)?;
    go(cpu, code, selector, target)
}

/// Far CALL.
pub fn far_call(cpu: &mut Cpu, i: &Instruction) -> Result<Flow, Fault> {
    let (selector, target, bytes) = far_target(cpu, i)?;
    let next = i.next_ip();
    let mut stack = Stack::current(cpu);
    if !protected(cpu) || virtual_8086(cpu) {
        stack.push(cpu, bytes, u64::from(cpu.segments[CS].selector))?;
        stack.push(cpu, bytes, next)?;
        if target > 0xffff {
            return Err(Fault::GP);
        }
        stack.commit(cpu);
        return real_jump(cpu, selector, target);
    }
    let transfer = resolve(cpu, selector, target, true)?;
    let bytes = transfer.gate_bytes.unwrap_or(bytes);
    if transfer.inner {
        return inner_call(cpu, transfer, bytes, next);
    }
    stack.push(cpu, bytes, u64::from(cpu.segments[CS].selector))?;
    stack.push(cpu, bytes, next)?;
    let flow = go(cpu, transfer.code, transfer.selector, transfer.target)?;
    stack.commit(cpu);
    Ok(flow)
}

fn real_jump(cpu: &mut Cpu, selector: u16, target: u64) -> Result<Flow, Fault> {
    if target > u64::from(cpu.segments[CS].limit) {
        return Err(Fault::GP);
    }
    let attributes = cpu.segments[CS].attributes;
    segment::load_real(cpu, CS, selector);
    if virtual_8086(cpu) {
        cpu.segments[CS].attributes = attributes;
    }
    cpu.rip = target;
    Ok(Flow::EndBlock)
}

/// Where a far JMP or CALL in protected mode ends up.
struct Transfer {
    code: Descriptor,
    /// With the RPL that CS will show.
    selector: u16,
    target: u64,
    /// Operand size of the call gate, where one was used.
    gate_bytes: Option<usize>,
    /// Words of parameters that the gate copies.
    parameters: u8,
    /// To a more privileged ring, with its stack.
    inner: bool,
}

fn resolve(cpu: &mut Cpu, selector: u16, target: u64, call: bool) -> Result<Transfer, Fault> {
    if selector & !3 == 0 {
        return Err(Fault::GP);
    }
    let error = u32::from(selector & !3);
    let rpl = (selector & 3) as u8;
    let descriptor = segment::read_descriptor(cpu, selector)?;
    if descriptor.is_code() {
        check_code(cpu, descriptor, error)?;
        let allowed = if descriptor.conforming() {
            descriptor.dpl() <= cpu.cpl
        } else {
            rpl <= cpu.cpl && descriptor.dpl() == cpu.cpl
        };
        if !allowed {
            return Err(Fault::gp(error));
        }
        if !descriptor.present() {
            return Err(Fault::with_error(11, error));
        }
        let selector = selector & !3 | u16::from(cpu.cpl);
        return Ok(Transfer {
            code: descriptor,
            selector,
            target,
            gate_bytes: None,
            parameters: 0,
            inner: false,
        });
    }
    // A call gate; task gates and TSSes are not there in IA-32e mode, nor here.
    let gate_bytes = match (descriptor.is_segment(), descriptor.kind(), long_mode(cpu)) {
        (false, 12, true) => 8,
        (false, 12, false) => 4,
        (false, 4, false) => 2,
        _ => return Err(Fault::gp(error)),
    };
    if descriptor.dpl() < cpu.cpl || descriptor.dpl() < rpl {
        return Err(Fault::gp(error));
    }
    if !descriptor.present() {
        return Err(Fault::with_error(11, error));
    }
    let (_, high) = segment::read_system_descriptor(cpu, selector)?;
    if high >> 40 & 0x1f != 0 {
        return Err(Fault::gp(error));
    }
    let gate = descriptor.0;
    let target = (gate & 0xffff) | (gate >> 32) & 0xffff_0000 | (high & 0xffff_ffff) << 32;
    let selector = (gate >> 16) as u16;
    if selector & !3 == 0 {
        return Err(Fault::GP);
    }
    let error = u32::from(selector & !3);
    let code = segment::read_descriptor(cpu, selector)?;
    let long_code = code.attributes() & attribute::LONG != 0;
    if !code.is_code() || code.dpl() > cpu.cpl || (long_mode(cpu) && !long_code) {
        return Err(Fault::gp(error));
    }
    check_code(cpu, code, error)?;
    if !code.present() {
        return Err(Fault::with_error(11, error));
    }
    let inner = call && !code.conforming() && code.dpl() < cpu.cpl;
    if !call && !code.conforming() && code.dpl() != cpu.cpl {
        return Err(Fault::gp(error));
    }
    let ring = if inner { code.dpl() } else { cpu.cpl };
    Ok(Transfer {
        code,
        selector: selector & !3 | u16::from(ring),
        target,
        gate_bytes: Some(gate_bytes),
        parameters: (gate >> 32 & 31) as u8,
        inner,
    })
}

fn check_code(cpu: &Cpu, code: Descriptor, error: u32) -> Result<(), Fault> {
    let both = attribute::LONG | attribute::BIG;
    if long_mode(cpu) && code.attributes() & both == both {
        Err(Fault::gp(error))
    } else {
        Ok(())
    }
}

/// Loads CS and rip, the privilege being the selector's RPL.
fn go(cpu: &mut Cpu, code: Descriptor, selector: u16, target: u64) -> Result<Flow, Fault> {
    let to64 = long_mode(cpu) && code.attributes() & attribute::LONG != 0;
    let fits = if to64 {
        canonical(target)
    } else {
        target <= u64::from(code.limit())
    };
    if !fits {
        return Err(Fault::GP);
    }
    let code = segment::mark_accessed(cpu, selector, code)?;
    cpu.segments[CS] = code.segment(selector);
    cpu.rip = target;
    cpu.cpl = (selector & 3) as u8;
    Ok(Flow::EndBlock)
}

/// A call through a gate into a more privileged ring.
fn inner_call(cpu: &mut Cpu, transfer: Transfer, bytes: usize, next: u64) -> Result<Flow, Fault> {
    let ring = transfer.code.dpl();
    let (old_ss, old_rsp, old_cs) = (cpu.segments[SS], cpu.gpr[RSP], cpu.segments[CS]);
    let invalid = Fault::with_error(10, u32::from(cpu.tr.selector & !3));
    let read = |cpu: &mut Cpu, offset: u64, len: u64| {
        if offset + len - 1 > u64::from(cpu.tr.limit) {
            Err(invalid)
        } else {
            Ok(cpu.tr.base.wrapping_add(offset))
        }
    };
    let (new_ss, mut stack) = if long_mode(cpu) {
        let at = read(cpu, 4 + u64::from(ring) * 8, 8)?;
        let rsp = cpu.read::<u64>(at, Rights::Supervisor)?;
        let ss = segment::null(SS, u16::from(ring), ring);
        (ss, Stack::new(&ss, rsp, Rights::Supervisor, true))
    } else {
        let at = read(cpu, 4 + u64::from(ring) * 8, 8)?;
        let esp = u64::from(cpu.read::<u32>(at, Rights::Supervisor)?);
        let selector = cpu.read::<u16>(at + 4, Rights::Supervisor)?;
        let ss = segment::check(cpu, SS, selector, ring)?;
        (ss, Stack::new(&ss, esp, Rights::Supervisor, false))
    };
    let mut parameters = Vec::new();
    if !long_mode(cpu) {
        let mut old = Stack::new(&old_ss, old_rsp, Rights::Current, false);
        for _ in 0..transfer.parameters {
            parameters.push(old.pop(cpu, bytes)?);
        }
    }
    stack.push(cpu, bytes, u64::from(old_ss.selector))?;
    stack.push(cpu, bytes, old_rsp)?;
    for value in parameters.into_iter().rev() {
        stack.push(cpu, bytes, value)?;
    }
    stack.push(cpu, bytes, u64::from(old_cs.selector))?;
    stack.push(cpu, bytes, next)?;
    let flow = go(cpu, transfer.code, transfer.selector, transfer.target)?;
    cpu.segments[SS] = new_ss;
    stack.commit(cpu);
    Ok(flow)
}

/// Far RET with an operand size of `bytes`, dropping `extra` bytes of parameters.
pub fn far_return(cpu: &mut Cpu, bytes: usize, extra: u64) -> Result<Flow, Fault> {
    let mut stack = Stack::current(cpu);
    let target = stack.pop(cpu, bytes)?;
    let selector = stack.pop(cpu, bytes)? as u16;
    if !protected(cpu) || virtual_8086(cpu) {
        stack.add(extra);
        let flow = real_jump(cpu, selector, target)?;
        stack.commit(cpu);
        return Ok(flow);
    }
    let (code, ring) = exceptions::return_code(cpu, selector)?;
    stack.add(extra);
    if ring == cpu.cpl {
        let flow = go(cpu, code, selector, target)?;
        stack.commit(cpu);
        return Ok(flow);
    }
    let rsp = stack.pop(cpu, bytes)?;
    let ss = stack.pop(cpu, bytes)? as u16;
    let to64 = long_mode(cpu) && code.attributes() & attribute::LONG != 0;
    let new_ss = if ss & !3 == 0 {
        if !(to64 && ring != 3 && (ss & 3) as u8 == ring) {
            return Err(Fault::GP);
        }
        segment::null(SS, ss, ring)
    } else {
        segment::check(cpu, SS, ss, ring)?
    };
    let flow = go(cpu, code, selector, target)?;
    cpu.segments[SS] = new_ss;
    let mut outer = Stack::new(&new_ss, rsp, Rights::Current, to64);
    outer.add(extra);
    outer.commit(cpu);
    segment::drop_privileged(cpu);
    Ok(flow)
}
