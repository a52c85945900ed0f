//! System instructions: control and debug registers, descriptor tables, flags, MSRs, TLB, CPUID, HLT
//! (SDM vol. 2, and vol. 3 chapters 2, 4 and 5).

use cpu::x86::{Activity, RAX, RBX, RCX, RDX, TableRegister};
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::interp::operand;
use super::paging::canonical;
use super::port::port;
use super::registers::{move_control, move_debug, set_cr0};
use super::segment::{self, code64, protected, virtual_8086};
use super::stack::Stack;
use super::{branch, cpuid, cr, exceptions, msr};
use crate::state::{Access, Cpu, Fault, Flow, Rights, SS, flag};

/// Executes a system instruction; `Ok(None)`: it is not one of those known here.
/// On `Ok(Some(_))` rip is already right.
pub fn execute(cpu: &mut Cpu, i: &Instruction) -> Result<Option<Flow>, Fault> {
    use Mnemonic as M;
    let next = i.next_ip();
    // Those that set rip themselves.
    match i.mnemonic() {
        M::Syscall => return branch::syscall(cpu, next).map(Some),
        M::Sysret | M::Sysretq => return branch::sysret(cpu, i.mnemonic() == M::Sysretq).map(Some),
        M::Sysenter => return branch::sysenter(cpu).map(Some),
        M::Sysexit | M::Sysexitq => {
            return branch::sysexit(cpu, i.mnemonic() == M::Sysexitq).map(Some);
        }
        M::Iret => return exceptions::iret(cpu, 2).map(Some),
        M::Iretd => return exceptions::iret(cpu, 4).map(Some),
        M::Iretq => return exceptions::iret(cpu, 8).map(Some),
        M::Int => return exceptions::software_interrupt(cpu, i.immediate8(), next).map(Some),
        M::Int3 => return exceptions::software_interrupt(cpu, 3, next).map(Some),
        M::Int1 => return exceptions::icebp(cpu, next).map(Some),
        M::Into if cpu.rflags & flag::OF != 0 => {
            return exceptions::software_interrupt(cpu, 4, next).map(Some);
        }
        M::Retf => {
            let bytes = match i.code() {
                Code::Retfw | Code::Retfw_imm16 => 2,
                Code::Retfd | Code::Retfd_imm16 => 4,
                _ => 8,
            };
            let extra = if i.op_count() > 0 {
                u64::from(i.immediate16())
            } else {
                0
            };
            return branch::far_return(cpu, bytes, extra).map(Some);
        }
        M::Jmp if is_far(i) => return branch::far_jump(cpu, i).map(Some),
        M::Call if is_far(i) => return branch::far_call(cpu, i).map(Some),
        _ => {}
    }
    let flow = match i.mnemonic() {
        M::Into => Flow::Continue,
        M::Rdmsr => {
            ring0(cpu)?;
            let value = msr::read(cpu, cpu.gpr[RCX] as u32)?;
            set_pair(cpu, value);
            Flow::Continue
        }
        M::Wrmsr => {
            ring0(cpu)?;
            let value = cpu.gpr[RDX] << 32 | cpu.gpr[RAX] & 0xffff_ffff;
            msr::write(cpu, cpu.gpr[RCX] as u32, value)?
        }
        M::Cli => {
            check_iopl(cpu)?;
            cpu.rflags &= !flag::IF;
            Flow::Continue
        }
        M::Sti => {
            check_iopl(cpu)?;
            if cpu.rflags & flag::IF == 0 {
                cpu.rflags |= flag::IF;
                cpu.interrupt_shadow = true;
            }
            Flow::EndBlock
        }
        M::Clac | M::Stac => {
            if cpu.cpl != 0 {
                return Err(Fault::UD);
            }
            if i.mnemonic() == M::Stac {
                cpu.rflags |= flag::AC;
            } else {
                cpu.rflags &= !flag::AC;
            }
            Flow::EndBlock
        }
        // Stores to code are seen at once as it is.
        M::Serialize => Flow::Continue,
        M::Pushf | M::Pushfd | M::Pushfq => {
            let bytes = flags_size(i);
            if virtual_8086(cpu) && cpu.rflags & flag::IOPL != flag::IOPL {
                return Err(Fault::GP);
            }
            let image = cpu.rflags & !(flag::VM | flag::RF) | flag::FIXED;
            let mut stack = Stack::current(cpu);
            stack.push(cpu, bytes, image)?;
            stack.commit(cpu);
            Flow::Continue
        }
        M::Popf | M::Popfd | M::Popfq => pop_flags(cpu, flags_size(i))?,
        M::Hlt => {
            ring0(cpu)?;
            cpu.system.activity = Activity::Halted;
            Flow::Halt
        }
        M::Swapgs => {
            if !code64(cpu) {
                return Err(Fault::UD);
            }
            ring0(cpu)?;
            std::mem::swap(
                &mut cpu.segments[crate::state::GS].base,
                &mut cpu.kernel_gs_base,
            );
            Flow::Continue
        }
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => segment_base(cpu, i)?,
        M::Mov if i.op0_register().is_cr() || i.op1_register().is_cr() => move_control(cpu, i)?,
        M::Mov if i.op0_register().is_dr() || i.op1_register().is_dr() => move_debug(cpu, i)?,
        M::Mov
            if i.op0_register().is_segment_register() || i.op1_register().is_segment_register() =>
        {
            move_segment(cpu, i)?
        }
        M::Pop if i.op0_register().is_segment_register() => {
            let bytes = segment_stack_size(i);
            let mut stack = Stack::current(cpu);
            let selector = stack.pop(cpu, bytes)? as u16;
            let flow = load_segment(cpu, i.op0_register(), selector)?;
            stack.commit(cpu);
            flow
        }
        M::Push if i.op0_register().is_segment_register() => {
            let bytes = segment_stack_size(i);
            let selector = operand::read_register(cpu, i.op0_register());
            let mut stack = Stack::current(cpu);
            stack.push(cpu, bytes, selector)?;
            stack.commit(cpu);
            Flow::Continue
        }
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => load_far_pointer(cpu, i)?,
        M::Clts => {
            ring0(cpu)?;
            cpu.cr0 &= !cr::CR0_TS;
            cpu.flush_jumps(true);
            Flow::EndBlock
        }
        M::Lmsw => {
            ring0(cpu)?;
            let value = operand::read(cpu, i, 0, 2)?;
            let new = cpu.cr0 & !0xe | value & 0xe | value & 1;
            set_cr0(cpu, new)?;
            Flow::EndBlock
        }
        M::Smsw => {
            user_mode_prevented(cpu)?;
            let size = if i.op0_kind() == OpKind::Memory {
                2
            } else {
                i.op0_register().size()
            };
            operand::write(cpu, i, 0, size, cpu.cr0)?;
            Flow::Continue
        }
        M::Lgdt | M::Lidt => load_table(cpu, i)?,
        M::Sgdt | M::Sidt => {
            user_mode_prevented(cpu)?;
            let table = if i.mnemonic() == M::Sgdt {
                cpu.gdtr
            } else {
                cpu.idtr
            };
            let len = if code64(cpu) { 10 } else { 6 };
            let mut image = [0u8; 10];
            image[..2].copy_from_slice(&table.limit.to_le_bytes());
            image[2..].copy_from_slice(&table.base.to_le_bytes());
            let at = operand::linear(cpu, i, len, true)?;
            cpu.write_bytes(at, &image[..len], Rights::Current)?;
            Flow::Continue
        }
        M::Lldt | M::Ltr => {
            protected_only(cpu)?;
            ring0(cpu)?;
            let selector = operand::read(cpu, i, 0, 2)? as u16;
            if i.mnemonic() == M::Lldt {
                segment::load_ldt(cpu, selector)?
            } else {
                segment::load_task(cpu, selector)?
            }
            Flow::Continue
        }
        M::Sldt | M::Str => {
            protected_only(cpu)?;
            user_mode_prevented(cpu)?;
            let selector = if i.mnemonic() == M::Sldt {
                cpu.ldtr.selector
            } else {
                cpu.tr.selector
            };
            let size = if i.op0_kind() == OpKind::Memory {
                2
            } else {
                i.op0_register().size()
            };
            operand::write(cpu, i, 0, size, u64::from(selector))?;
            Flow::Continue
        }
        M::Lar | M::Lsl => {
            protected_only(cpu)?;
            let selector = operand::read(cpu, i, 1, 2)? as u16;
            match segment::inspect(cpu, selector, i.mnemonic() == M::Lsl)? {
                Some(descriptor) => {
                    let value = if i.mnemonic() == M::Lsl {
                        u64::from(descriptor.limit())
                    } else {
                        descriptor.0 >> 32 & 0x00f0_ff00
                    };
                    operand::write_register(cpu, i.op0_register(), value);
                    cpu.rflags |= flag::ZF;
                }
                None => cpu.rflags &= !flag::ZF,
            }
            Flow::Continue
        }
        M::Verr | M::Verw => {
            protected_only(cpu)?;
            let selector = operand::read(cpu, i, 0, 2)? as u16;
            let usable = segment::verify(cpu, selector, i.mnemonic() == M::Verw)?;
            cpu.rflags = cpu.rflags & !flag::ZF | if usable { flag::ZF } else { 0 };
            Flow::Continue
        }
        M::Arpl => {
            protected_only(cpu)?;
            let source = operand::read(cpu, i, 1, 2)?;
            let old = operand::read(cpu, i, 0, 2)?;
            if old & 3 < source & 3 {
                operand::write(cpu, i, 0, 2, old & !3 | source & 3)?;
                cpu.rflags |= flag::ZF;
            } else {
                cpu.rflags &= !flag::ZF;
            }
            Flow::Continue
        }
        M::Invlpg => {
            ring0(cpu)?;
            let base = operand::segment_base(cpu, operand::memory_segment(i));
            let at = base.wrapping_add(operand::offset(cpu, i));
            if !code64(cpu) || canonical(at) {
                cpu.flush_tlb_page(at);
            }
            Flow::EndBlock
        }
        M::Invpcid => invalidate_pcid(cpu, i)?,
        M::Invd | M::Wbinvd => {
            ring0(cpu)?;
            Flow::Continue
        }
        M::Clflush | M::Clflushopt | M::Clwb => {
            let at = operand::linear(cpu, i, 1, false)?;
            cpu.place(at, Access::Read, Rights::Current)?;
            Flow::Continue
        }
        M::Cpuid => {
            let model = cpu.system.cpuid.clone();
            let [a, b, c, d] = model.query(cpu, cpu.gpr[RAX] as u32, cpu.gpr[RCX] as u32);
            for (register, value) in [(RAX, a), (RBX, b), (RCX, c), (RDX, d)] {
                cpu.gpr[register] = u64::from(value);
            }
            Flow::Continue
        }
        M::Rdtsc | M::Rdtscp => {
            if cpu.cr4 & cr::CR4_TSD != 0 && cpu.cpl != 0 {
                return Err(Fault::GP);
            }
            let now = msr::guest_tsc(cpu);
            set_pair(cpu, now);
            if i.mnemonic() == M::Rdtscp {
                cpu.gpr[RCX] = cpu.tsc_aux & 0xffff_ffff;
            }
            Flow::Continue
        }
        M::Rdpid => {
            let value = cpu.tsc_aux;
            operand::write_register(cpu, i.op0_register(), value);
            Flow::Continue
        }
        M::Rdpmc => return Err(Fault::GP),
        M::Xgetbv => {
            if cpu.cr4 & cr::CR4_OSXSAVE == 0 {
                return Err(Fault::UD);
            }
            // 1: the state components in use; all enabled ones may be.
            if cpu.gpr[RCX] as u32 > 1 {
                return Err(Fault::GP);
            }
            let value = cpu.xcr0;
            set_pair(cpu, value);
            Flow::Continue
        }
        M::Xsetbv => {
            if cpu.cr4 & cr::CR4_OSXSAVE == 0 {
                return Err(Fault::UD);
            }
            ring0(cpu)?;
            let value = cpu.gpr[RDX] << 32 | cpu.gpr[RAX] & 0xffff_ffff;
            let needs_sse = value & cpuid::XCR0_AVX != 0 && value & cpuid::XCR0_SSE == 0;
            if cpu.gpr[RCX] as u32 != 0
                || value & 1 == 0
                || needs_sse
                || value & !cpu.system.cpuid.xcr0_mask() != 0
            {
                return Err(Fault::GP);
            }
            cpu.xcr0 = value;
            cpu.flush_jumps(true);
            Flow::EndBlock
        }
        M::Vmcall | M::Vmmcall => hypercall(cpu)?,
        M::In | M::Out => port(cpu, i)?,
        M::Rdrand | M::Rdseed => {
            let size = i.op0_register().size();
            let value = if crate::clock::counted() {
                Some(crate::clock::host_tsc().wrapping_mul(0x9e37_79b9_7f4a_7c15))
            } else {
                random(i.mnemonic() == M::Rdseed).ok_or(Fault::UD)?
            };
            let status = flag::CF | flag::OF | flag::SF | flag::ZF | flag::AF | flag::PF;
            cpu.rflags &= !status;
            let value = match value {
                Some(value) => {
                    cpu.rflags |= flag::CF;
                    value
                }
                None => 0,
            };
            operand::write_register(cpu, i.op0_register(), value & operand::mask(size));
            Flow::Continue
        }
        M::Monitor
        | M::Mwait
        | M::Rdpkru
        | M::Wrpkru
        | M::Rsm
        | M::Getsec
        | M::Xabort
        | M::Xbegin
        | M::Xend
        | M::Xtest
        | M::Ud0
        | M::Ud1
        | M::Ud2 => return Err(Fault::UD),
        _ => return Ok(None),
    };
    cpu.rip = next;
    Ok(Some(flow))
}

fn is_far(i: &Instruction) -> bool {
    i.is_jmp_far() || i.is_call_far() || i.is_jmp_far_indirect() || i.is_call_far_indirect()
}

pub(super) fn ring0(cpu: &Cpu) -> Result<(), Fault> {
    if cpu.cpl == 0 { Ok(()) } else { Err(Fault::GP) }
}

fn protected_only(cpu: &Cpu) -> Result<(), Fault> {
    if protected(cpu) && !virtual_8086(cpu) {
        Ok(())
    } else {
        Err(Fault::UD)
    }
}

/// CR4.UMIP.
fn user_mode_prevented(cpu: &Cpu) -> Result<(), Fault> {
    if cpu.cr4 & cr::CR4_UMIP != 0 && cpu.cpl != 0 {
        Err(Fault::GP)
    } else {
        Ok(())
    }
}

pub(super) fn check_iopl(cpu: &Cpu) -> Result<(), Fault> {
    let iopl = (cpu.rflags & flag::IOPL) >> 12;
    if !protected(cpu) || u64::from(cpu.cpl) <= iopl {
        Ok(())
    } else {
        Err(Fault::GP)
    }
}

fn set_pair(cpu: &mut Cpu, value: u64) {
    cpu.gpr[RAX] = value & 0xffff_ffff;
    cpu.gpr[RDX] = value >> 32;
}

fn flags_size(i: &Instruction) -> usize {
    match i.mnemonic() {
        Mnemonic::Pushf | Mnemonic::Popf => 2,
        Mnemonic::Pushfd | Mnemonic::Popfd => 4,
        _ => 8,
    }
}

fn pop_flags(cpu: &mut Cpu, bytes: usize) -> Result<Flow, Fault> {
    if virtual_8086(cpu) && cpu.rflags & flag::IOPL != flag::IOPL {
        return Err(Fault::GP);
    }
    let mut stack = Stack::current(cpu);
    let value = stack.pop(cpu, bytes)?;
    stack.commit(cpu);
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
        writable |= flag::AC | flag::ID;
    }
    if check_iopl(cpu).is_ok() {
        writable |= flag::IF;
    }
    if cpu.cpl == 0 && !virtual_8086(cpu) {
        writable |= flag::IOPL;
    }
    let old = cpu.rflags;
    cpu.rflags = (old & !(writable | flag::RF)) | (value & writable) | flag::FIXED;
    let matters = flag::IF | flag::TF | flag::AC;
    Ok(if (old ^ cpu.rflags) & matters != 0 {
        Flow::EndBlock
    } else {
        Flow::Continue
    })
}

fn segment_base(cpu: &mut Cpu, i: &Instruction) -> Result<Flow, Fault> {
    if !code64(cpu) || cpu.cr4 & cr::CR4_FSGSBASE == 0 {
        return Err(Fault::UD);
    }
    let register = i.op0_register();
    let which = if matches!(i.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Wrfsbase) {
        crate::state::FS
    } else {
        crate::state::GS
    };
    if matches!(i.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
        let base = cpu.segments[which].base;
        operand::write_register(cpu, register, base);
    } else {
        let base = operand::read_register(cpu, register);
        if !canonical(base) {
            return Err(Fault::GP);
        }
        cpu.segments[which].base = base;
    }
    Ok(Flow::Continue)
}

fn move_segment(cpu: &mut Cpu, i: &Instruction) -> Result<Flow, Fault> {
    if i.op0_register().is_segment_register() {
        let selector = operand::read(cpu, i, 1, 2)? as u16;
        return load_segment(cpu, i.op0_register(), selector);
    }
    let selector = operand::read_register(cpu, i.op1_register());
    let size = if i.op0_kind() == OpKind::Memory {
        2
    } else {
        i.op0_register().size()
    };
    operand::write(cpu, i, 0, size, selector)?;
    Ok(Flow::Continue)
}

fn load_segment(cpu: &mut Cpu, register: Register, selector: u16) -> Result<Flow, Fault> {
    let which = operand::segment_index(register);
    if which == crate::state::CS {
        return Err(Fault::UD);
    }
    segment::load(cpu, which, selector)?;
    if which == SS {
        cpu.interrupt_shadow = true;
    }
    // In 64-bit mode nothing that translated code depends on has changed: FS and GS bases are read where used.
    Ok(if code64(cpu) {
        Flow::Continue
    } else {
        Flow::EndBlock
    })
}

fn segment_stack_size(i: &Instruction) -> usize {
    i.stack_pointer_increment().unsigned_abs() as usize
}

fn load_far_pointer(cpu: &mut Cpu, i: &Instruction) -> Result<Flow, Fault> {
    let register = match i.mnemonic() {
        Mnemonic::Lds => Register::DS,
        Mnemonic::Les => Register::ES,
        Mnemonic::Lfs => Register::FS,
        Mnemonic::Lgs => Register::GS,
        _ => Register::SS,
    };
    let size = i.op0_register().size();
    let at = operand::linear(cpu, i, size + 2, false)?;
    let offset = operand::load(cpu, at, size)?;
    let selector = operand::load(cpu, at.wrapping_add(size as u64), 2)? as u16;
    let flow = load_segment(cpu, register, selector)?;
    operand::write_register(cpu, i.op0_register(), offset);
    Ok(flow)
}

fn load_table(cpu: &mut Cpu, i: &Instruction) -> Result<Flow, Fault> {
    ring0(cpu)?;
    let wide = code64(cpu);
    let at = operand::linear(cpu, i, if wide { 10 } else { 6 }, false)?;
    let limit = operand::load(cpu, at, 2)? as u16;
    let mut base = operand::load(cpu, at.wrapping_add(2), if wide { 8 } else { 4 })?;
    if wide && !canonical(base) {
        return Err(Fault::GP);
    }
    if matches!(i.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0xff_ffff;
    }
    let table = TableRegister { base, limit };
    if i.mnemonic() == Mnemonic::Lgdt {
        cpu.gdtr = table
    } else {
        cpu.idtr = table
    }
    Ok(Flow::Continue)
}

fn invalidate_pcid(cpu: &mut Cpu, i: &Instruction) -> Result<Flow, Fault> {
    ring0(cpu)?;
    let kind = operand::read_register(cpu, i.op0_register());
    let at = operand::linear(cpu, i, 16, false)?;
    let pcid = operand::load(cpu, at, 8)?;
    let address = operand::load(cpu, at.wrapping_add(8), 8)?;
    let tagged = kind < 2;
    if kind > 3
        || pcid >> 12 != 0
        || (tagged && pcid != 0 && cpu.cr4 & cr::CR4_PCIDE == 0)
        || (kind == 0 && !canonical(address))
    {
        return Err(Fault::GP);
    }
    match kind {
        // A page of another address space: all of that one, which a look for its entries would cost more than.
        0 if cpu.cr4 & cr::CR4_PCIDE != 0 && pcid != cpu.cr3 & 0xfff => cpu.flush_pcid(pcid),
        0 => cpu.flush_tlb_page(address),
        1 => cpu.flush_pcid(pcid),
        3 => cpu.flush_pcids(),
        _ => cpu.flush_tlb(),
    }
    Ok(Flow::EndBlock)
}

/// KVM hypercalls: none has work to do here, the wake-up of a CPU excepted, which its mailbox's ring serves.
fn hypercall(cpu: &mut Cpu) -> Result<Flow, Fault> {
    const KICK_CPU: u64 = 5;
    const NO_SUCH_CALL: u64 = -1000i64 as u64;
    const NOT_PERMITTED: u64 = -1i64 as u64;
    let result = if cpu.cpl != 0 {
        NOT_PERMITTED
    } else if cpu.gpr[RAX] == KICK_CPU {
        if let Some(mailbox) = cpu.machine.mailbox(cpu.gpr[RCX] as u32) {
            mailbox.ring();
        }
        0
    } else {
        NO_SUCH_CALL
    };
    cpu.gpr[RAX] = result;
    Ok(Flow::Continue)
}

/// Random bits of the host: `None` where it has no such instruction, `Some(None)` where it has none ready.
fn random(seed: bool) -> Option<Option<u64>> {
    let (value, ok): (u64, u8);
    if seed {
        if !std::arch::is_x86_feature_detected!("rdseed") {
            return None;
        }
        // SAFETY: the instruction exists and touches only its register and the flags.
        unsafe {
            std::arch::asm!("rdseed {}", "setc {}", out(reg) value, out(reg_byte) ok, options(nomem, nostack))
        };
    } else {
        if !std::arch::is_x86_feature_detected!("rdrand") {
            return None;
        }
        // SAFETY: as above.
        unsafe {
            std::arch::asm!("rdrand {}", "setc {}", out(reg) value, out(reg_byte) ok, options(nomem, nostack))
        };
    }
    Some((ok != 0).then_some(value))
}
