//! Delivery of exceptions and interrupts through the guest's IDT, and the return from them (SDM vol. 3, chapter 6).

use cpu::x86::Activity;

use super::TripleFault;
use super::paging::canonical;
use super::segment::{self, Descriptor, attribute, code64, long_mode, protected, virtual_8086};
use super::stack::Stack;
use crate::state::{CS, Cpu, Fault, Flow, Rights, SS, flag};

const RSP: usize = cpu::x86::RSP;

/// Where an interruption comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A fault of an instruction, or a trap.
    Exception,
    /// An interrupt of the APIC or PIC, or an NMI.
    External,
    /// INT n, INT3, INTO: the gate's privilege is checked.
    Software,
}

/// Delivers an exception, with the rules for exceptions during the delivery of exceptions (SDM vol. 3, table 6-5).
pub fn deliver(cpu: &mut Cpu, fault: Fault) -> Result<(), TripleFault> {
    deliver_from(cpu, fault, Source::Exception)
}

/// Delivers an external interrupt or NMI.
pub fn deliver_interrupt(cpu: &mut Cpu, vector: u8) -> Result<(), TripleFault> {
    deliver_from(cpu, Fault::plain(vector), Source::External)
}

fn deliver_from(cpu: &mut Cpu, fault: Fault, source: Source) -> Result<(), TripleFault> {
    let mut current = fault;
    let mut source = source;
    loop {
        if source == Source::Exception {
            if current.vector == 14 {
                cpu.cr2 = current.address;
            }
            if current.vector == 1 {
                cpu.dr[7] &= !(1 << 13);
            }
        }
        let rip = cpu.rip;
        match enter(cpu, current.vector, current.error, source, rip) {
            Ok(()) => {
                cpu.system.activity = Activity::Running;
                cpu.interrupt_shadow = false;
                return Ok(());
            }
            Err(_) if source == Source::Exception && current.vector == 8 => {
                return Err(TripleFault);
            }
            Err(next) => {
                let nested = source == Source::Exception;
                source = Source::Exception;
                current = if nested { combine(current, next) } else { next };
            }
        }
    }
}

/// What two exceptions make of each other.
fn combine(first: Fault, second: Fault) -> Fault {
    let contributory = |v: u8| matches!(v, 0 | 10 | 11 | 12 | 13);
    let double = (contributory(first.vector) && contributory(second.vector))
        || (first.vector == 14 && (second.vector == 14 || contributory(second.vector)));
    if double {
        Fault::with_error(8, 0)
    } else {
        second
    }
}

/// INT n and INT3: on an error nothing has changed.
pub fn software_interrupt(cpu: &mut Cpu, vector: u8, return_rip: u64) -> Result<Flow, Fault> {
    if virtual_8086(cpu) && vector != 3 && cpu.rflags & flag::IOPL != flag::IOPL {
        return Err(Fault::GP);
    }
    enter(cpu, vector, None, Source::Software, return_rip)?;
    Ok(Flow::EndBlock)
}

/// INT1 (ICEBP): a debug trap that no gate privilege stops.
pub fn icebp(cpu: &mut Cpu, return_rip: u64) -> Result<Flow, Fault> {
    enter(cpu, 1, None, Source::Exception, return_rip)?;
    Ok(Flow::EndBlock)
}

/// Goes through one gate. On `Err` no architectural state has changed.
fn enter(
    cpu: &mut Cpu,
    vector: u8,
    error: Option<u32>,
    source: Source,
    return_rip: u64,
) -> Result<(), Fault> {
    if !protected(cpu) {
        return enter_real(cpu, vector, return_rip);
    }
    let ext = u32::from(source != Source::Software);
    let gate_error = u32::from(vector) * 8 + 2 + ext;
    let wide = long_mode(cpu);
    let size = if wide { 16 } else { 8 };
    let offset = u64::from(vector) * size;
    if offset + size - 1 > u64::from(cpu.idtr.limit) {
        return Err(Fault::gp(gate_error));
    }
    let low = cpu.read::<u64>(cpu.idtr.base.wrapping_add(offset), Rights::Supervisor)?;
    let high = if wide {
        cpu.read::<u64>(cpu.idtr.base.wrapping_add(offset + 8), Rights::Supervisor)?
    } else {
        0
    };
    let gate = Descriptor(low);
    let (interrupt, bytes) = match (gate.is_segment(), gate.kind(), wide) {
        (false, 0xe, true) => (true, 8),
        (false, 0xf, true) => (false, 8),
        (false, 0xe, false) => (true, 4),
        (false, 0xf, false) => (false, 4),
        (false, 0x6, false) => (true, 2),
        (false, 0x7, false) => (false, 2),
        _ => return Err(Fault::gp(gate_error)),
    };
    if source == Source::Software && gate.dpl() < cpu.cpl {
        return Err(Fault::gp(u32::from(vector) * 8 + 2));
    }
    if !gate.present() {
        return Err(Fault::with_error(11, gate_error));
    }
    let selector = (low >> 16) as u16;
    let mut target = (low & 0xffff) | (low >> 32) & 0xffff_0000 | high << 32;
    if bytes == 2 {
        target &= 0xffff;
    }
    let ist = if wide { (low >> 32 & 7) as u8 } else { 0 };

    if selector & !3 == 0 {
        return Err(Fault::gp(ext));
    }
    let selector_error = u32::from(selector & !3) + ext;
    let code = segment::read_descriptor(cpu, selector).map_err(|f| with_ext(f, ext))?;
    if !code.is_code() || code.dpl() > cpu.cpl {
        return Err(Fault::gp(selector_error));
    }
    let long_code = code.attributes() & (attribute::LONG | attribute::BIG);
    if wide && long_code != attribute::LONG {
        return Err(Fault::gp(selector_error));
    }
    if !code.present() {
        return Err(Fault::with_error(11, selector_error));
    }
    let from_v86 = virtual_8086(cpu);
    let new_cpl = if code.conforming() {
        cpu.cpl
    } else {
        code.dpl()
    };
    if from_v86 && new_cpl != 0 {
        return Err(Fault::gp(selector_error));
    }
    if wide && !canonical(target) {
        return Err(Fault::gp(ext));
    }
    if !wide && target > u64::from(code.limit()) {
        return Err(Fault::gp(ext));
    }

    let mut pushed_flags = cpu.rflags | flag::FIXED;
    let debug_trap = vector == 1;
    if source == Source::Exception && !debug_trap {
        pushed_flags |= flag::RF;
    } else if source != Source::External {
        pushed_flags &= !flag::RF;
    }
    let (old_ss, old_rsp) = (cpu.segments[SS], cpu.gpr[RSP]);
    let old_cs = cpu.segments[CS];
    let changes = new_cpl < cpu.cpl || from_v86;

    if wide {
        let mut rsp = if ist != 0 {
            task_pointer(cpu, 0x24 + u64::from(ist - 1) * 8, 8)?
        } else if changes {
            task_pointer(cpu, 4 + u64::from(new_cpl) * 8, 8)?
        } else {
            old_rsp
        };
        if !canonical(rsp) {
            return Err(Fault::ss(ext));
        }
        rsp &= !15;
        let mut frame = [0u8; 48];
        let words = [
            u64::from(error.unwrap_or(0)),
            return_rip,
            u64::from(old_cs.selector),
            pushed_flags,
            old_rsp,
            u64::from(old_ss.selector),
        ];
        for (slot, word) in frame.chunks_exact_mut(8).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        let pushed = if error.is_some() {
            &frame[..]
        } else {
            &frame[8..]
        };
        let at = rsp.wrapping_sub(pushed.len() as u64);
        if !canonical(at) {
            return Err(Fault::ss(ext));
        }
        let rights = if new_cpl == 3 {
            Rights::User
        } else {
            Rights::Supervisor
        };
        cpu.write_bytes(at, pushed, rights)?;
        cpu.gpr[RSP] = at;
        if changes {
            cpu.segments[SS] = segment::null(SS, u16::from(new_cpl), new_cpl);
        }
    } else {
        let rights = if new_cpl == 3 {
            Rights::User
        } else {
            Rights::Supervisor
        };
        let mut new_ss = old_ss;
        let mut stack = if changes {
            let wide_tss = cpu.tr.attributes & 8 != 0;
            let (pointer, selector) = if wide_tss {
                let at = 4 + u64::from(new_cpl) * 8;
                (
                    task_pointer(cpu, at, 4)?,
                    task_pointer(cpu, at + 4, 2)? as u16,
                )
            } else {
                let at = 2 + u64::from(new_cpl) * 4;
                (
                    task_pointer(cpu, at, 2)?,
                    task_pointer(cpu, at + 2, 2)? as u16,
                )
            };
            let invalid = Fault::with_error(10, u32::from(selector & !3) + ext);
            if selector & !3 == 0 || (selector & 3) as u8 != new_cpl {
                return Err(invalid);
            }
            // The checks of the new stack's segment are those of ring `new_cpl`; what they find is an invalid TSS.
            new_ss = segment::check(cpu, SS, selector, new_cpl)
                .map_err(|f| if f.vector == 13 { invalid } else { f })?;
            Stack::new(&new_ss, pointer, rights, false)
        } else {
            Stack::new(&old_ss, old_rsp, rights, false)
        };
        if changes {
            if from_v86 {
                for which in [
                    crate::state::GS,
                    crate::state::FS,
                    crate::state::DS,
                    crate::state::ES,
                ] {
                    stack.push(cpu, bytes, u64::from(cpu.segments[which].selector))?;
                }
            }
            stack.push(cpu, bytes, u64::from(old_ss.selector))?;
            stack.push(cpu, bytes, old_rsp)?;
        }
        stack.push(cpu, bytes, pushed_flags)?;
        stack.push(cpu, bytes, u64::from(old_cs.selector))?;
        stack.push(cpu, bytes, return_rip)?;
        if let Some(error) = error {
            stack.push(cpu, bytes, u64::from(error))?;
        }
        cpu.segments[SS] = new_ss;
        stack.commit(cpu);
        if from_v86 {
            for which in [
                crate::state::GS,
                crate::state::FS,
                crate::state::DS,
                crate::state::ES,
            ] {
                cpu.segments[which] = segment::null(which, 0, 0);
            }
        }
    }
    let code = segment::mark_accessed(cpu, selector, code)?;
    cpu.segments[CS] = code.segment(selector & !3 | u16::from(new_cpl));
    cpu.cpl = new_cpl;
    cpu.rip = target;
    let mut cleared = flag::TF | flag::NT | flag::RF | flag::VM;
    if interrupt {
        cleared |= flag::IF;
    }
    cpu.rflags &= !cleared;
    Ok(())
}

fn with_ext(fault: Fault, ext: u32) -> Fault {
    if fault.vector == 14 {
        fault
    } else {
        Fault {
            error: fault.error.map(|e| e | ext),
            ..fault
        }
    }
}

/// A field of the task-state segment; #TS beyond its limit.
fn task_pointer(cpu: &mut Cpu, offset: u64, bytes: u64) -> Result<u64, Fault> {
    if cpu.tr.unusable || offset + bytes - 1 > u64::from(cpu.tr.limit) {
        return Err(Fault::with_error(10, u32::from(cpu.tr.selector & !3)));
    }
    let at = cpu.tr.base.wrapping_add(offset);
    Ok(match bytes {
        2 => u64::from(cpu.read::<u16>(at, Rights::Supervisor)?),
        4 => u64::from(cpu.read::<u32>(at, Rights::Supervisor)?),
        _ => cpu.read::<u64>(at, Rights::Supervisor)?,
    })
}

/// Real mode: the interrupt vector table (SDM vol. 3, 20.1.4).
fn enter_real(cpu: &mut Cpu, vector: u8, return_rip: u64) -> Result<(), Fault> {
    let offset = u64::from(vector) * 4;
    if offset + 3 > u64::from(cpu.idtr.limit) {
        return Err(Fault::GP);
    }
    let entry = cpu.read::<u32>(cpu.idtr.base.wrapping_add(offset), Rights::Supervisor)?;
    let mut stack = Stack::current(cpu);
    stack.push(cpu, 2, cpu.rflags)?;
    stack.push(cpu, 2, u64::from(cpu.segments[CS].selector))?;
    stack.push(cpu, 2, return_rip)?;
    stack.commit(cpu);
    segment::load_real(cpu, CS, (entry >> 16) as u16);
    cpu.rip = u64::from(entry & 0xffff);
    cpu.rflags &= !(flag::IF | flag::TF | flag::RF | flag::AC);
    Ok(())
}

/// IRET, IRETD, IRETQ with an operand size of `bytes` (SDM vol. 2, IRET).
pub fn iret(cpu: &mut Cpu, bytes: usize) -> Result<Flow, Fault> {
    if !protected(cpu) || virtual_8086(cpu) {
        return iret_real(cpu, bytes);
    }
    if cpu.rflags & flag::NT != 0 {
        // A return to another task: not there in IA-32e mode, and no guest of ours switches tasks by hardware.
        return Err(Fault::GP);
    }
    let from64 = code64(cpu);
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, bytes)?;
    let selector = stack.pop(cpu, bytes)? as u16;
    let flags = stack.pop(cpu, bytes)?;
    if flags & flag::VM != 0 && !long_mode(cpu) && cpu.cpl == 0 && bytes == 4 {
        return iret_to_v86(cpu, stack, rip, selector, flags);
    }
    let (code, new_cpl) = return_code(cpu, selector)?;
    let to64 = long_mode(cpu) && code.attributes() & attribute::LONG != 0;
    let outer = new_cpl > cpu.cpl;
    if to64 {
        if !canonical(rip) {
            return Err(Fault::GP);
        }
    } else if rip > u64::from(code.limit()) {
        return Err(Fault::GP);
    }
    let mut returned = None;
    if outer || from64 {
        let rsp = stack.pop(cpu, bytes)?;
        let ss = stack.pop(cpu, bytes)? as u16;
        let segment = if ss & !3 == 0 {
            if !(to64 && new_cpl != 3 && (ss & 3) as u8 == new_cpl) {
                return Err(Fault::GP);
            }
            segment::null(SS, ss, new_cpl)
        } else {
            segment::check(cpu, SS, ss, new_cpl)?
        };
        returned = Some((rsp, segment));
    }
    let code = segment::mark_accessed(cpu, selector, code)?;

    let mut writable = flag::CF
        | flag::PF
        | flag::AF
        | flag::ZF
        | flag::SF
        | flag::TF
        | flag::DF
        | flag::OF
        | flag::NT;
    if bytes > 2 {
        writable |= flag::RF | flag::AC | flag::ID;
    }
    if cpu.cpl == 0 {
        writable |= flag::IOPL;
        if bytes > 2 {
            writable |= flag::VIF | flag::VIP;
        }
    }
    if u64::from(cpu.cpl) <= (cpu.rflags & flag::IOPL) >> 12 {
        writable |= flag::IF;
    }
    cpu.rflags = (cpu.rflags & !writable) | (flags & writable) | flag::FIXED;
    cpu.segments[CS] = code.segment(selector);
    cpu.rip = if to64 { rip } else { rip & 0xffff_ffff };
    match returned {
        Some((rsp, segment)) => {
            cpu.segments[SS] = segment;
            let big = to64 || segment.attributes & attribute::BIG != 0;
            cpu.gpr[RSP] = if to64 {
                rsp
            } else if big {
                rsp & 0xffff_ffff
            } else {
                cpu.gpr[RSP] & !0xffff | rsp & 0xffff
            };
        }
        None => stack.commit(cpu),
    }
    cpu.cpl = new_cpl;
    if outer {
        segment::drop_privileged(cpu);
    }
    unmask_nmi(cpu);
    Ok(Flow::EndBlock)
}

/// The code segment a far return goes to, and the privilege there.
pub(super) fn return_code(cpu: &mut Cpu, selector: u16) -> Result<(Descriptor, u8), Fault> {
    if selector & !3 == 0 {
        return Err(Fault::GP);
    }
    let error = u32::from(selector & !3);
    let rpl = (selector & 3) as u8;
    let code = segment::read_descriptor(cpu, selector)?;
    let wrong_ring = if code.conforming() {
        code.dpl() > rpl
    } else {
        code.dpl() != rpl
    };
    let both = attribute::LONG | attribute::BIG;
    if !code.is_code()
        || rpl < cpu.cpl
        || wrong_ring
        || (long_mode(cpu) && code.attributes() & both == both)
    {
        return Err(Fault::gp(error));
    }
    if !code.present() {
        return Err(Fault::with_error(11, error));
    }
    Ok((code, rpl))
}

fn iret_real(cpu: &mut Cpu, bytes: usize) -> Result<Flow, Fault> {
    let v86 = virtual_8086(cpu);
    if v86 && cpu.rflags & flag::IOPL != flag::IOPL {
        return Err(Fault::GP);
    }
    let mut stack = Stack::current(cpu);
    let ip = stack.pop(cpu, bytes)?;
    let selector = stack.pop(cpu, bytes)? as u16;
    let flags = stack.pop(cpu, bytes)?;
    if ip > 0xffff {
        return Err(Fault::GP);
    }
    stack.commit(cpu);
    segment::load_real(cpu, CS, selector);
    cpu.rip = ip;
    let mut writable = 0x7fd5 & !if v86 { flag::IOPL } else { 0 };
    if bytes > 2 {
        writable |= flag::RF | flag::AC | flag::ID;
    }
    cpu.rflags = (cpu.rflags & !writable) | (flags & writable) | flag::FIXED;
    unmask_nmi(cpu);
    Ok(Flow::EndBlock)
}

/// One that came meanwhile is next.
fn unmask_nmi(cpu: &mut Cpu) {
    cpu.system.nmi_masked = false;
    if cpu.system.nmi_pending {
        cpu.attention.store(1, std::sync::atomic::Ordering::SeqCst);
    }
}

fn iret_to_v86(
    cpu: &mut Cpu,
    mut stack: Stack,
    rip: u64,
    selector: u16,
    flags: u64,
) -> Result<Flow, Fault> {
    let rsp = stack.pop(cpu, 4)?;
    let mut selectors = [0u16; 5];
    for slot in &mut selectors {
        *slot = stack.pop(cpu, 4)? as u16;
    }
    cpu.rflags = flags & 0x3f_7fd5 | flag::FIXED;
    cpu.cpl = 3;
    cpu.rip = rip & 0xffff;
    cpu.gpr[RSP] = rsp;
    use crate::state::{DS, ES, FS, GS};
    for (which, selector) in [
        (CS, selector),
        (SS, selectors[0]),
        (ES, selectors[1]),
        (DS, selectors[2]),
        (FS, selectors[3]),
        (GS, selectors[4]),
    ] {
        cpu.segments[which] = cpu::x86::Segment {
            base: u64::from(selector) << 4,
            limit: 0xffff,
            selector,
            attributes: 0xf3,
            unusable: false,
        };
    }
    unmask_nmi(cpu);
    Ok(Flow::EndBlock)
}
