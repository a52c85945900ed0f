//! Saving and restoring of x87, SSE and AVX state (SDM vol. 1, 10.5 and chapter 13), and who may use them.
//!
//! The guest's x87 registers live in the host's x87 unit (Rust code of this crate never touches it), its vector
//! registers in [`Cpu::ymm`] while Rust runs. Instruction and data pointers of x87 are not shown: they would be
//! addresses of translated code.

use cpu::x86::{RAX, RDX};
use iced_x86::{CpuidFeature, Instruction, Mnemonic, OpKind};

use super::interp::operand;
use super::{cpuid, cr};
use crate::state::{Cpu, Fault, Flow, Rights};

/// MXCSR bits that exist.
const MXCSR_MASK: u32 = 0xffff;
const LEGACY: usize = 512;
const HEADER: usize = 64;

/// FXSAVE image of the host's x87 unit, 16-aligned for the instruction.
#[repr(C, align(64))]
struct Image([u8; LEGACY]);

fn host_save() -> Image {
    let mut image = Image([0; LEGACY]);
    // SAFETY: the image is 512 bytes and aligned; FXSAVE64 writes nothing else.
    unsafe { core::arch::x86_64::_fxsave64(image.0.as_mut_ptr()) };
    image
}

/// Loads x87 from `image[..160]`; the XMM part of the image is the host's own, unchanged.
fn host_restore(x87: &[u8]) {
    let mut image = host_save();
    image.0[..24].copy_from_slice(&x87[..24]);
    image.0[32..160].copy_from_slice(&x87[32..160]);
    // SAFETY: the MXCSR and XMM fields are those just saved, so Rust's own state does not change; x87 is the guest's.
    unsafe { core::arch::x86_64::_fxrstor64(image.0.as_ptr()) };
}

/// Initial x87 state: FCW 0x37f, all registers empty.
fn initial_x87() -> [u8; 160] {
    let mut x87 = [0u8; 160];
    x87[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    x87
}

/// x87 state as the guest may see it, 160 bytes of the FXSAVE format, MXCSR not filled in.
fn x87_image() -> [u8; 160] {
    let image = host_save();
    let mut x87 = [0u8; 160];
    // FCW, FSW, abridged FTW; no last instruction, no pointers.
    x87[..5].copy_from_slice(&image.0[..5]);
    x87[32..160].copy_from_slice(&image.0[32..160]);
    x87
}

/// Whether the guest's state allows the instruction: #NM, #UD and pending x87 errors (SDM vol. 3, 2.5 and 13).
pub fn check(cpu: &Cpu, i: &Instruction) -> Result<(), Fault> {
    let (em, ts) = (cpu.cr0 & cr::CR0_EM != 0, cpu.cr0 & cr::CR0_TS != 0);
    if i.mnemonic() == Mnemonic::Wait {
        if ts && cpu.cr0 & cr::CR0_MP != 0 {
            return Err(Fault::NM);
        }
        return pending_x87();
    }
    let features = i.cpuid_features();
    let has = |f: CpuidFeature| features.contains(&f);
    if has(CpuidFeature::FPU)
        || has(CpuidFeature::FPU287)
        || has(CpuidFeature::FPU387)
        || i.mnemonic() == Mnemonic::Fisttp
    {
        if em || ts {
            return Err(Fault::NM);
        }
        let waits = !matches!(
            i.mnemonic(),
            Mnemonic::Fnclex
                | Mnemonic::Fninit
                | Mnemonic::Fnsave
                | Mnemonic::Fnstcw
                | Mnemonic::Fnstenv
                | Mnemonic::Fnstsw
        );
        return if waits { pending_x87() } else { Ok(()) };
    }
    // Conversions between MMX and SSE are SSE's by name, but use x87's registers.
    let uses_mmx =
        (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm());
    if uses_mmx || has(CpuidFeature::MMX) {
        return if em {
            Err(Fault::UD)
        } else if ts {
            Err(Fault::NM)
        } else {
            pending_x87()
        };
    }
    let vex = !matches!(i.encoding(), iced_x86::EncodingKind::Legacy);
    let vector = (0..i.op_count())
        .any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_vector_register())
        || matches!(
            i.mnemonic(),
            Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr | Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr
        )
        || matches!(i.mnemonic(), Mnemonic::Vzeroall | Mnemonic::Vzeroupper);
    if !vector {
        return Ok(());
    }
    if vex {
        let enabled =
            cpu.xcr0 & (cpuid::XCR0_SSE | cpuid::XCR0_AVX) == cpuid::XCR0_SSE | cpuid::XCR0_AVX;
        if cpu.cr4 & cr::CR4_OSXSAVE == 0
            || !enabled
            || i.encoding() == iced_x86::EncodingKind::EVEX
        {
            return Err(Fault::UD);
        }
    } else if em || cpu.cr4 & cr::CR4_OSFXSR == 0 {
        return Err(Fault::UD);
    }
    if ts { Err(Fault::NM) } else { Ok(()) }
}

/// #MF where an unmasked x87 exception waits.
fn pending_x87() -> Result<(), Fault> {
    let status: u16;
    // SAFETY: FNSTSW waits for nothing and changes nothing.
    unsafe {
        std::arch::asm!("fnstsw ax", out("ax") status, options(nomem, nostack, preserves_flags))
    };
    if status & 0x80 != 0 {
        Err(Fault::MF)
    } else {
        Ok(())
    }
}

/// The state instructions; `Ok(None)`: none of them.
pub fn execute(cpu: &mut Cpu, i: &Instruction) -> Result<Option<Flow>, Fault> {
    use Mnemonic as M;
    match i.mnemonic() {
        M::Fxsave | M::Fxsave64 => {
            allowed(cpu)?;
            let at = aligned(cpu, i, LEGACY, 16, true)?;
            let mut area = [0u8; LEGACY];
            cpu.read_bytes(at, &mut area, Rights::Current)?;
            store_x87(&mut area);
            store_mxcsr(cpu, &mut area);
            if cpu.cr4 & cr::CR4_OSFXSR != 0 {
                store_xmm(cpu, &mut area);
            }
            cpu.write_bytes(at, &area, Rights::Current)?;
        }
        M::Fxrstor | M::Fxrstor64 => {
            allowed(cpu)?;
            let at = aligned(cpu, i, LEGACY, 16, false)?;
            let mut area = [0u8; LEGACY];
            cpu.read_bytes(at, &mut area, Rights::Current)?;
            let mxcsr = word(&area, 24);
            if cpu.cr4 & cr::CR4_OSFXSR != 0 {
                if mxcsr & !MXCSR_MASK != 0 {
                    return Err(Fault::GP);
                }
                cpu.mxcsr = mxcsr;
                load_xmm(cpu, &area);
            }
            host_restore(&without_pointers(&area));
        }
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 => save(cpu, i, false)?,
        M::Xsavec | M::Xsavec64 => save(cpu, i, true)?,
        M::Xrstor | M::Xrstor64 => restore(cpu, i)?,
        M::Xsaves | M::Xsaves64 | M::Xrstors | M::Xrstors64 => return Err(Fault::UD),
        M::Ldmxcsr | M::Vldmxcsr => {
            check(cpu, i)?;
            let value = operand::read(cpu, i, 0, 4)? as u32;
            if value & !MXCSR_MASK != 0 {
                return Err(Fault::GP);
            }
            cpu.mxcsr = value;
        }
        M::Stmxcsr | M::Vstmxcsr => {
            check(cpu, i)?;
            let value = u64::from(cpu.mxcsr);
            operand::write(cpu, i, 0, 4, value)?;
        }
        _ => return Ok(None),
    }
    cpu.rip = i.next_ip();
    Ok(Some(Flow::Continue))
}

/// FXSAVE and its kin: EM and TS both raise #NM.
fn allowed(cpu: &Cpu) -> Result<(), Fault> {
    if cpu.cr0 & (cr::CR0_EM | cr::CR0_TS) != 0 {
        Err(Fault::NM)
    } else {
        Ok(())
    }
}

fn aligned(
    cpu: &mut Cpu,
    i: &Instruction,
    len: usize,
    alignment: u64,
    write: bool,
) -> Result<u64, Fault> {
    let at = operand::linear(cpu, i, len, write)?;
    if at & (alignment - 1) != 0 {
        return Err(Fault::GP);
    }
    if write {
        cpu.write_probe(at, len, Rights::Current)?;
    }
    Ok(at)
}

fn word(area: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([area[at], area[at + 1], area[at + 2], area[at + 3]])
}

fn long(area: &[u8], at: usize) -> u64 {
    u64::from(word(area, at)) | u64::from(word(area, at + 4)) << 32
}

fn without_pointers(area: &[u8]) -> [u8; 160] {
    let mut x87 = [0u8; 160];
    x87[..5].copy_from_slice(&area[..5]);
    x87[32..160].copy_from_slice(&area[32..160]);
    x87
}

fn store_x87(area: &mut [u8]) {
    let x87 = x87_image();
    area[..24].copy_from_slice(&x87[..24]);
    area[32..160].copy_from_slice(&x87[32..160]);
}

fn store_mxcsr(cpu: &Cpu, area: &mut [u8]) {
    area[24..28].copy_from_slice(&cpu.mxcsr.to_le_bytes());
    area[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
}

fn store_xmm(cpu: &Cpu, area: &mut [u8]) {
    for (slot, ymm) in area[160..416].chunks_exact_mut(16).zip(&cpu.ymm) {
        slot[..8].copy_from_slice(&ymm[0].to_le_bytes());
        slot[8..].copy_from_slice(&ymm[1].to_le_bytes());
    }
}

fn load_xmm(cpu: &mut Cpu, area: &[u8]) {
    for (n, ymm) in cpu.ymm.iter_mut().enumerate() {
        (ymm[0], ymm[1]) = (long(area, 160 + n * 16), long(area, 168 + n * 16));
    }
}

/// The state components asked for in EDX:EAX, of those enabled.
fn requested(cpu: &Cpu) -> u64 {
    (cpu.gpr[RDX] << 32 | cpu.gpr[RAX] & 0xffff_ffff) & cpu.xcr0
}

fn xsave_allowed(cpu: &Cpu) -> Result<(), Fault> {
    if cpu.cr4 & cr::CR4_OSXSAVE == 0 {
        return Err(Fault::UD);
    }
    if cpu.cr0 & cr::CR0_TS != 0 {
        Err(Fault::NM)
    } else {
        Ok(())
    }
}

fn area_len(components: u64) -> usize {
    if components & cpuid::XCR0_AVX != 0 {
        cpuid::XSAVE_AVX as usize
    } else {
        LEGACY + HEADER
    }
}

/// XSAVE, XSAVEOPT, XSAVEC. With x87, SSE and AVX alone the compacted form has the same offsets as the standard one.
fn save(cpu: &mut Cpu, i: &Instruction, compacted: bool) -> Result<(), Fault> {
    xsave_allowed(cpu)?;
    let components = requested(cpu);
    let len = area_len(components);
    let at = aligned(cpu, i, len, 64, true)?;
    let mut buffer = [0u8; cpuid::XSAVE_AVX as usize];
    let area = &mut buffer[..len];
    cpu.read_bytes(at, area, Rights::Current)?;
    fill_xsave(cpu, area, components);
    let header = &mut area[LEGACY..LEGACY + HEADER];
    if compacted {
        header.fill(0);
        header[..8].copy_from_slice(&components.to_le_bytes());
        header[8..16].copy_from_slice(&(components | 1 << 63).to_le_bytes());
    } else {
        let present = long(header, 0) | components;
        header[..8].copy_from_slice(&present.to_le_bytes());
    }
    cpu.write_bytes(at, area, Rights::Current)
}

/// The components' bytes in the standard format.
fn fill_xsave(cpu: &Cpu, area: &mut [u8], components: u64) {
    if components & cpuid::XCR0_X87 != 0 {
        store_x87(area);
    }
    if components & (cpuid::XCR0_SSE | cpuid::XCR0_AVX) != 0 {
        store_mxcsr(cpu, area);
    }
    if components & cpuid::XCR0_SSE != 0 {
        store_xmm(cpu, area);
    }
    if components & cpuid::XCR0_AVX != 0 {
        for (slot, ymm) in area[LEGACY + HEADER..].chunks_exact_mut(16).zip(&cpu.ymm) {
            slot[..8].copy_from_slice(&ymm[2].to_le_bytes());
            slot[8..].copy_from_slice(&ymm[3].to_le_bytes());
        }
    }
}

fn restore(cpu: &mut Cpu, i: &Instruction) -> Result<(), Fault> {
    xsave_allowed(cpu)?;
    let components = requested(cpu);
    let len = area_len(components);
    let at = aligned(cpu, i, len, 64, false)?;
    let mut buffer = [0u8; cpuid::XSAVE_AVX as usize];
    let area = &mut buffer[..len];
    cpu.read_bytes(at, area, Rights::Current)?;
    let header = &area[LEGACY..LEGACY + HEADER];
    let (present, layout) = (long(header, 0), long(header, 8));
    let compacted = layout >> 63 != 0;
    let invalid = if compacted {
        let layout = layout & !(1 << 63);
        layout & !cpu.xcr0 != 0 || present & !layout != 0 || header[16..].iter().any(|b| *b != 0)
    } else {
        present & !cpu.xcr0 != 0 || header[8..24].iter().any(|b| *b != 0)
    };
    if invalid {
        return Err(Fault::GP);
    }
    let in_area = components & present;
    let mut mxcsr = None;
    if compacted {
        if components & (cpuid::XCR0_SSE | cpuid::XCR0_AVX) != 0 {
            mxcsr = Some(if present & (cpuid::XCR0_SSE | cpuid::XCR0_AVX) != 0 {
                word(area, 24)
            } else {
                0x1f80
            });
        }
    } else if components & (cpuid::XCR0_SSE | cpuid::XCR0_AVX) != 0 {
        mxcsr = Some(word(area, 24));
    }
    if let Some(value) = mxcsr {
        if value & !MXCSR_MASK != 0 {
            return Err(Fault::GP);
        }
        cpu.mxcsr = value;
    }
    apply_xsave(cpu, area, components, in_area);
    Ok(())
}

/// Loads `components`: from `area` those in `present`, the others to their initial state.
fn apply_xsave(cpu: &mut Cpu, area: &[u8], components: u64, present: u64) {
    if components & cpuid::XCR0_X87 != 0 {
        let x87 = if present & cpuid::XCR0_X87 != 0 {
            without_pointers(area)
        } else {
            initial_x87()
        };
        host_restore(&x87);
    }
    if components & cpuid::XCR0_SSE != 0 {
        if present & cpuid::XCR0_SSE != 0 {
            load_xmm(cpu, area);
        } else {
            for ymm in &mut cpu.ymm {
                (ymm[0], ymm[1]) = (0, 0);
            }
        }
    }
    if components & cpuid::XCR0_AVX != 0 {
        let has = present & cpuid::XCR0_AVX != 0;
        for (n, ymm) in cpu.ymm.iter_mut().enumerate() {
            let at = LEGACY + HEADER + n * 16;
            (ymm[2], ymm[3]) = if has {
                (long(area, at), long(area, at + 8))
            } else {
                (0, 0)
            };
        }
    }
}

/// Puts the x87 unit of this thread back to its initial state, for tests that ran a guest's instructions in it.
#[cfg(test)]
pub fn reset_host() {
    host_restore(&initial_x87());
}
