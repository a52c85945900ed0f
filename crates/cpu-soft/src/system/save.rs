//! The system side of a saved CPU ([`cpu::x86::CpuState`]), and the states after power-on and INIT.

use cpu::x86::{Activity, CpuState, RDX, Segment, TableRegister};

use super::segment::attribute;
use super::{apic, msr};
use crate::clock::host_tsc;
use crate::state::{CS, Cpu, flag};

/// Fills in what only the system side knows: MSRs, APIC, time, NMIs, activity. Called on the CPU's own thread.
pub fn save(cpu: &mut Cpu, state: &mut CpuState) {
    apic::take_mail_for_save(cpu);
    state.activity = cpu.system.activity;
    state.cr8 = cpu.system.apic.task_priority();
    state.msrs = msr::save(cpu);
    state.apic = cpu.system.apic.save();
    state.apic_base = cpu.system.apic.base;
    state.tsc_deadline = cpu.system.apic.tsc_deadline;
    // Zero says that the guest's time has not begun (see `restore`): a loader may save, change and restore.
    state.tsc = if cpu.ran {
        host_tsc().wrapping_add(cpu.tsc_offset)
    } else {
        0
    };
    state.pending_nmi = cpu.system.nmi_pending;
    state.nmi_masked = cpu.system.nmi_masked;
}

/// The reverse of [`save`], after the registers proper were restored; an error says what cannot be used.
pub fn restore(cpu: &mut Cpu, state: &CpuState) -> Result<(), String> {
    if state.cr4 & !cpu.system.cpuid.cr4_mask() != 0
        || state.xcr0 & !(cpu.system.cpuid.xcr0_mask() | 1) != 0
    {
        return Err(format!(
            "it uses CPU features that this model lacks (CR4 {:#x}, XCR0 {:#x})",
            state.cr4, state.xcr0
        ));
    }
    cpu.system.activity = state.activity;
    cpu.cr0 |= super::cr::CR0_ET;
    if state.dr[6] == 0 && state.dr[7] == 0 {
        (cpu.dr[6], cpu.dr[7]) = (0xffff_0ff0, 0x400);
    }
    // A counter of zero is a machine that starts, not one saved: it gets the host's, which is the fast case.
    cpu.tsc_offset = if state.tsc == 0 {
        0
    } else {
        state.tsc.wrapping_sub(host_tsc())
    };
    cpu.ran = state.tsc != 0;
    msr::restore(cpu, &state.msrs);
    if state.apic.is_empty() {
        cpu.system.apic.reset();
    } else {
        let base = if state.apic_base == 0 {
            cpu.system.apic.base
        } else {
            state.apic_base
        };
        let offset = cpu.tsc_offset;
        cpu.system
            .apic
            .restore(&state.apic, base, state.tsc_deadline, offset);
    }
    apic::publish(cpu);
    apic::arm(cpu);
    cpu.system.nmi_pending = state.pending_nmi;
    cpu.system.nmi_masked = state.nmi_masked;
    cpu.interrupt_waits = 0;
    cpu.debug_changed();
    Ok(())
}

/// The state after INIT (SDM vol. 3, table 10-1): real mode at the reset vector; vector registers and x87 stay.
pub fn initialize(cpu: &mut Cpu) {
    let data = Segment {
        base: 0,
        limit: 0xffff,
        selector: 0,
        attributes: 0x93,
        unusable: false,
    };
    cpu.gpr = [0; 16];
    // Family 6, model 0x8f.
    cpu.gpr[RDX] = 0x0008_06f8;
    cpu.rip = 0xfff0;
    cpu.rflags = flag::FIXED;
    cpu.segments = [data; 6];
    cpu.segments[CS] = Segment {
        base: 0xffff_0000,
        selector: 0xf000,
        attributes: 0x9b,
        ..data
    };
    cpu.ldtr = Segment {
        attributes: 2 | attribute::PRESENT,
        ..data
    };
    cpu.tr = Segment {
        attributes: 0xb | attribute::PRESENT,
        ..data
    };
    cpu.gdtr = TableRegister {
        base: 0,
        limit: 0xffff,
    };
    cpu.idtr = cpu.gdtr;
    // CD, NW, ET.
    cpu.cr0 = 0x6000_0010;
    (cpu.cr2, cpu.cr3, cpu.cr4, cpu.efer) = (0, 0, 0, 0);
    cpu.dr = [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400];
    cpu.debug = super::debug::Debug::default();
    cpu.cpl = 0;
    cpu.interrupt_shadow = false;
    cpu.interrupt_waits = 0;
    cpu.system.nmi_pending = false;
    cpu.system.nmi_masked = false;
    cpu.system.apic.reset();
    apic::publish(cpu);
    apic::arm(cpu);
    cpu.flush_tlb();
}

/// The state in which a start-up message leaves a CPU: real mode at page `vector`.
pub fn start_up(cpu: &mut Cpu, vector: u8) {
    cpu.segments[CS].selector = u16::from(vector) << 8;
    cpu.segments[CS].base = u64::from(vector) << 12;
    cpu.rip = 0;
    cpu.system.activity = Activity::Running;
}
