//! Model-specific registers (SDM vol. 4) and those of the KVM paravirtual clock. What is not known here is #GP.

use super::paging::canonical;
use super::{apic, cr};
use crate::clock::{host_tsc, tsc_hz};
use crate::state::{Cpu, FS, Fault, Flow, GS};

pub const TSC: u32 = 0x10;
pub const APIC_BASE: u32 = 0x1b;
pub const TSC_ADJUST: u32 = 0x3b;
pub const SPEC_CTRL: u32 = 0x48;
pub const ARCH_CAPABILITIES: u32 = 0x10a;
pub const SYSENTER_CS: u32 = 0x174;
pub const SYSENTER_ESP: u32 = 0x175;
pub const SYSENTER_EIP: u32 = 0x176;
pub const MCG_CAP: u32 = 0x179;
pub const MCG_STATUS: u32 = 0x17a;
pub const MISC_ENABLE: u32 = 0x1a0;
pub const DEBUGCTL: u32 = 0x1d9;
pub const MTRR_CAP: u32 = 0xfe;
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
pub const PAT: u32 = 0x277;
pub const TSC_DEADLINE: u32 = 0x6e0;
pub const EFER: u32 = 0xc000_0080;
pub const STAR: u32 = 0xc000_0081;
pub const LSTAR: u32 = 0xc000_0082;
pub const CSTAR: u32 = 0xc000_0083;
pub const SFMASK: u32 = 0xc000_0084;
pub const FS_BASE: u32 = 0xc000_0100;
pub const GS_BASE: u32 = 0xc000_0101;
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const TSC_AUX: u32 = 0xc000_0103;
const KVM_WALL_CLOCK_OLD: u32 = 0x11;
const KVM_SYSTEM_TIME_OLD: u32 = 0x12;
const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;

/// RDCL_NO, IBRS_ALL, SKIP_L1DFL, MDS_NO, PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO,
/// PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO (see `cpuid` on what that means here).
const CAPABILITIES: u64 = 1 << 0
    | 1 << 1
    | 1 << 3
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// Registers with no effect of their own here, or with one elsewhere.
#[derive(Debug, Clone)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    spec_ctrl: u64,
    misc_enable: u64,
    debugctl: u64,
    mcg_status: u64,
    tsc_adjust: u64,
    mtrr_def_type: u64,
    mtrr_fixed: [u64; 11],
    mtrr_variable: [u64; 16],
    kvm_wall_clock: u64,
    kvm_system_time: u64,
    /// Added to the paravirtual clock, in nanoseconds: time of the machine before it was restored here.
    clock_offset: u64,
}

impl Default for Msrs {
    fn default() -> Msrs {
        Msrs {
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            pat: 0x0007_0406_0007_0406,
            spec_ctrl: 0,
            // Fast strings; no branch trace, no PEBS.
            misc_enable: 1 | 1 << 11 | 1 << 12,
            debugctl: 0,
            mcg_status: 0,
            tsc_adjust: 0,
            // Enabled, fixed ranges too, write-back.
            mtrr_def_type: 0xc06,
            mtrr_fixed: [0x0606_0606_0606_0606; 11],
            mtrr_variable: [0; 16],
            kvm_wall_clock: 0,
            kvm_system_time: 0,
            clock_offset: 0,
        }
    }
}

/// The guest's time-stamp counter.
pub fn guest_tsc(cpu: &Cpu) -> u64 {
    host_tsc().wrapping_add(cpu.tsc_offset)
}

fn fixed_mtrr(msr: u32) -> Option<usize> {
    match msr {
        0x250 => Some(0),
        0x258 | 0x259 => Some((msr - 0x257) as usize),
        0x268..=0x26f => Some((msr - 0x265) as usize),
        _ => None,
    }
}

/// RDMSR.
pub fn read(cpu: &mut Cpu, msr: u32) -> Result<u64, Fault> {
    let m = &cpu.system.msr;
    Ok(match msr {
        TSC => guest_tsc(cpu),
        // Platform id, SMI count, platform info: nothing to say.
        0x17 | 0x34 | 0xce => 0,
        APIC_BASE => cpu.system.apic.base,
        // IA32_FEATURE_CONTROL: locked, nothing enabled.
        0x3a => 1,
        TSC_ADJUST => m.tsc_adjust,
        SPEC_CTRL => m.spec_ctrl,
        // Microcode revision.
        0x8b => 1 << 32,
        // Eight variable ranges, fixed ranges, write combining.
        MTRR_CAP => 0x508,
        ARCH_CAPABILITIES => CAPABILITIES,
        SYSENTER_CS => m.sysenter_cs,
        SYSENTER_ESP => m.sysenter_esp,
        SYSENTER_EIP => m.sysenter_eip,
        MCG_CAP => 0,
        MCG_STATUS => m.mcg_status,
        MISC_ENABLE => m.misc_enable,
        DEBUGCTL => m.debugctl,
        0x200..=0x20f => m.mtrr_variable[(msr - 0x200) as usize],
        MTRR_DEF_TYPE => m.mtrr_def_type,
        PAT => m.pat,
        TSC_DEADLINE => cpu.system.apic.tsc_deadline,
        0x800..=0x8ff => return apic::msr_read(cpu, msr),
        EFER => cpu.efer,
        STAR => m.star,
        LSTAR => m.lstar,
        CSTAR => m.cstar,
        SFMASK => m.sfmask,
        FS_BASE => cpu.segments[FS].base,
        GS_BASE => cpu.segments[GS].base,
        KERNEL_GS_BASE => cpu.kernel_gs_base,
        TSC_AUX => cpu.tsc_aux,
        KVM_WALL_CLOCK | KVM_WALL_CLOCK_OLD => m.kvm_wall_clock,
        KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_OLD => m.kvm_system_time,
        _ => match fixed_mtrr(msr) {
            Some(i) => m.mtrr_fixed[i],
            None => {
                tracing::debug!("rdmsr {msr:#x} at {:#x}: not known", cpu.rip);
                return Err(Fault::GP);
            }
        },
    })
}

/// WRMSR.
pub fn write(cpu: &mut Cpu, msr: u32, value: u64) -> Result<Flow, Fault> {
    let canonical_only = matches!(
        msr,
        SYSENTER_ESP | SYSENTER_EIP | LSTAR | CSTAR | FS_BASE | GS_BASE | KERNEL_GS_BASE
    );
    if canonical_only && !canonical(value) {
        return Err(Fault::GP);
    }
    let memory_type = |t: u64| matches!(t, 0 | 1 | 4 | 5 | 6);
    let m = &mut cpu.system.msr;
    match msr {
        TSC => {
            let offset = value.wrapping_sub(host_tsc());
            let delta = offset.wrapping_sub(cpu.tsc_offset);
            m.tsc_adjust = m.tsc_adjust.wrapping_add(delta);
            shift_tsc(cpu, offset);
            return Ok(Flow::EndBlock);
        }
        TSC_ADJUST => {
            let delta = value.wrapping_sub(m.tsc_adjust);
            m.tsc_adjust = value;
            let offset = cpu.tsc_offset.wrapping_add(delta);
            shift_tsc(cpu, offset);
            return Ok(Flow::EndBlock);
        }
        APIC_BASE => {
            apic::set_base(cpu, value)?;
            return Ok(Flow::EndBlock);
        }
        // A microcode update and the machine-check status are taken and forgotten.
        0x79 | 0x8b => {}
        SPEC_CTRL if value & !0x407 == 0 => m.spec_ctrl = value,
        // IA32_PRED_CMD: IBPB.
        0x49 if value & !1 == 0 => {}
        SYSENTER_CS => m.sysenter_cs = value & 0xffff_ffff,
        SYSENTER_ESP => m.sysenter_esp = value,
        SYSENTER_EIP => m.sysenter_eip = value,
        MCG_STATUS => m.mcg_status = value,
        MISC_ENABLE => m.misc_enable = value | 1 << 11 | 1 << 12,
        // Branch records are not kept; the bits are.
        DEBUGCTL if value & !0x3 == 0 => m.debugctl = value,
        0x200..=0x20f => m.mtrr_variable[(msr - 0x200) as usize] = value,
        MTRR_DEF_TYPE if value & !0xcff == 0 && memory_type(value & 0xff) => {
            m.mtrr_def_type = value
        }
        PAT if value
            .to_le_bytes()
            .iter()
            .all(|t| memory_type(u64::from(*t)) || *t == 7) =>
        {
            m.pat = value
        }
        TSC_DEADLINE => {
            apic::set_deadline(cpu, value);
            return Ok(Flow::Continue);
        }
        0x800..=0x8ff => {
            apic::msr_write(cpu, msr, value)?;
            // Only a waiting interrupt needs the run loop.
            return Ok(if cpu.interrupt_waits != 0 || cpu.mailbox.has_mail() {
                Flow::EndBlock
            } else {
                Flow::Continue
            });
        }
        EFER => {
            super::registers::set_efer(cpu, value)?;
            return Ok(Flow::EndBlock);
        }
        STAR => m.star = value,
        LSTAR => m.lstar = value,
        CSTAR => m.cstar = value,
        SFMASK => m.sfmask = value & 0xffff_ffff,
        FS_BASE => cpu.segments[FS].base = value,
        GS_BASE => cpu.segments[GS].base = value,
        KERNEL_GS_BASE => cpu.kernel_gs_base = value,
        TSC_AUX if value >> 32 == 0 => cpu.tsc_aux = value,
        KVM_WALL_CLOCK | KVM_WALL_CLOCK_OLD => {
            m.kvm_wall_clock = value;
            write_wall_clock(cpu, value);
        }
        KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_OLD => {
            m.kvm_system_time = value;
            write_system_time(cpu);
        }
        _ => match fixed_mtrr(msr) {
            Some(i)
                if value
                    .to_le_bytes()
                    .iter()
                    .all(|t| memory_type(u64::from(*t))) =>
            {
                m.mtrr_fixed[i] = value
            }
            _ => {
                tracing::debug!("wrmsr {msr:#x} = {value:#x} at {:#x}: refused", cpu.rip);
                return Err(Fault::GP);
            }
        },
    }
    Ok(Flow::Continue)
}

fn shift_tsc(cpu: &mut Cpu, offset: u64) {
    cpu.tsc_offset = offset;
    let deadline = cpu.system.apic.tsc_deadline;
    if deadline != 0 {
        apic::set_deadline(cpu, deadline);
    }
    write_system_time(cpu);
}

/// Host TSC at which the paravirtual clock of this process's machines stands at zero. First called well before a guest
/// runs: a guest's RDTSC may be executed early by the host and must not come before it.
pub(crate) fn clock_zero() -> u64 {
    if crate::clock::counted() {
        return 1;
    }
    static ZERO: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *ZERO.get_or_init(host_tsc)
}

/// TSC ticks to nanoseconds as `(ticks << shift) * mul >> 32` (shift may be negative).
fn tsc_scale(hz: u64) -> (u32, i8) {
    let mut shift = 0i8;
    let mut rate = hz;
    while rate > 2_000_000_000 {
        rate >>= 1;
        shift -= 1;
    }
    while rate <= 1_000_000_000 {
        rate <<= 1;
        shift += 1;
    }
    // From the unrounded frequency, so that the shift costs no precision.
    let scaled = if shift < 0 {
        u128::from(hz)
    } else {
        u128::from(hz) << shift
    };
    let numerator = (1_000_000_000u128 << 32) << if shift < 0 { -i32::from(shift) } else { 0 };
    ((numerator / scaled) as u32, shift)
}

/// Nanoseconds of the paravirtual clock now.
pub fn clock_now(cpu: &Cpu) -> u64 {
    // The zero first: the first call sets it, and must not find a time before it.
    let zero = clock_zero();
    let ticks = host_tsc().saturating_sub(zero);
    cpu.system
        .msr
        .clock_offset
        .wrapping_add((u128::from(ticks) * 1_000_000_000 / u128::from(tsc_hz())) as u64)
}

/// Makes a counted clock begin at its own zero, whatever the state that the CPU was given says.
pub(crate) fn begin_counting(cpu: &mut Cpu) {
    cpu.tsc_offset = 0;
    cpu.system.msr.clock_offset = 0;
    cpu.system.msr.tsc_adjust = 0;
}

/// Fills the page of the paravirtual clock (Documentation/virt/kvm/x86/msr.rst of Linux): 32 bytes. The TSC is
/// constant and the same on all CPUs, so it is written once.
fn write_system_time(cpu: &mut Cpu) {
    let value = cpu.system.msr.kvm_system_time;
    if value & 1 == 0 {
        return;
    }
    let at = value & !1;
    let (mul, shift) = tsc_scale(tsc_hz());
    let version = cpu.physical_read::<u32>(at).wrapping_add(1) | 1;
    cpu.physical_write::<u32>(at, version);
    cpu.physical_write::<u32>(at + 4, 0);
    cpu.physical_write::<u64>(at + 8, clock_zero().wrapping_add(cpu.tsc_offset));
    cpu.physical_write::<u64>(at + 16, cpu.system.msr.clock_offset);
    cpu.physical_write::<u32>(at + 24, mul);
    // Flags bit 0: stable across CPUs.
    cpu.physical_write::<u32>(at + 28, u32::from(shift as u8) | 1 << 8);
    cpu.physical_write::<u32>(at, version.wrapping_add(1));
}

/// The time of day at which the paravirtual clock was zero: version, seconds, nanoseconds.
fn write_wall_clock(cpu: &mut Cpu, at: u64) {
    let now = if crate::clock::counted() {
        std::time::Duration::from_secs(1_600_000_000)
    } else {
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default()
    };
    let zero = now.saturating_sub(std::time::Duration::from_nanos(clock_now(cpu)));
    let at = at & !3;
    let version = cpu.physical_read::<u32>(at).wrapping_add(1) | 1;
    cpu.physical_write::<u32>(at, version);
    cpu.physical_write::<u32>(at + 4, zero.as_secs() as u32);
    cpu.physical_write::<u32>(at + 8, zero.subsec_nanos());
    cpu.physical_write::<u32>(at, version.wrapping_add(1));
}

/// Pseudo-number under which the paravirtual clock's time is saved.
const SAVED_CLOCK: u32 = 0x4b56_4dff;
/// What [`save`] keeps besides the state's own fields.
const SAVED: [u32; 14] = [
    TSC_ADJUST,
    SPEC_CTRL,
    SYSENTER_CS,
    SYSENTER_ESP,
    SYSENTER_EIP,
    MCG_STATUS,
    MISC_ENABLE,
    DEBUGCTL,
    PAT,
    MTRR_DEF_TYPE,
    STAR,
    LSTAR,
    CSTAR,
    SFMASK,
];

/// All registers by number, sorted.
pub fn save(cpu: &mut Cpu) -> Vec<(u32, u64)> {
    let fixed = [0x250, 0x258, 0x259].into_iter().chain(0x268..=0x26f);
    let numbers: Vec<u32> = SAVED
        .into_iter()
        .chain(fixed)
        .chain(0x200..=0x20f)
        .chain([KERNEL_GS_BASE, TSC_AUX, KVM_WALL_CLOCK, KVM_SYSTEM_TIME])
        .collect();
    let mut saved: Vec<(u32, u64)> = numbers
        .into_iter()
        .filter_map(|n| read(cpu, n).ok().map(|v| (n, v)))
        .collect();
    if cpu.ran {
        saved.push((SAVED_CLOCK, clock_now(cpu)));
    }
    saved.sort_unstable();
    saved
}

/// The reverse of [`save`]; `cpu.tsc_offset` is set already. Numbers not known are left out, so that a state saved
/// under another back end can be used.
pub fn restore(cpu: &mut Cpu, saved: &[(u32, u64)]) {
    if let Some((_, clock)) = saved.iter().find(|(n, _)| *n == SAVED_CLOCK) {
        cpu.system.msr.clock_offset = 0;
        cpu.system.msr.clock_offset = clock.wrapping_sub(clock_now(cpu));
    }
    for &(number, value) in saved {
        match number {
            TSC_ADJUST => cpu.system.msr.tsc_adjust = value,
            // Writing it would fill in today's time of day for a clock that the guest has read already.
            KVM_WALL_CLOCK => cpu.system.msr.kvm_wall_clock = value,
            TSC | TSC_DEADLINE | APIC_BASE | EFER | SAVED_CLOCK | 0x800..=0x8ff => {}
            _ => _ = write(cpu, number, value),
        }
    }
}

/// CR and EFER bits that `restore` needs by name elsewhere.
pub const EFER_KNOWN: u64 = cr::EFER_SCE | cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_ticks_is_a_second_of_nanoseconds() {
        for hz in [999_000_000u64, 1_000_000_000, 2_596_140_000, 5_100_000_000] {
            let (mul, shift) = tsc_scale(hz);
            let ticks = if shift < 0 {
                u128::from(hz) >> -shift
            } else {
                u128::from(hz) << shift
            };
            let nanoseconds = (ticks * u128::from(mul)) >> 32;
            assert!(
                nanoseconds.abs_diff(1_000_000_000) < 5,
                "{hz}: {nanoseconds}"
            );
        }
    }
}
