//! Control and debug registers (SDM vol. 3, 2.5 and 18.2).

use iced_x86::{Instruction, Register};

use super::interp::operand;
use super::paging::{self};
use super::segment::{self, code64, long_mode};
use super::{apic, cr, msr};
use crate::state::{Cpu, Fault, Flow};

use super::control::ring0;

pub(super) fn control_number(register: Register) -> usize {
    register as usize - Register::CR0 as usize
}

pub(super) fn move_control(cpu: &mut Cpu, i: &Instruction) -> Result<Flow, Fault> {
    ring0(cpu)?;
    if i.op1_register().is_cr() {
        let value = match control_number(i.op1_register()) {
            0 => cpu.cr0,
            2 => cpu.cr2,
            3 => cpu.cr3,
            4 => cpu.cr4,
            8 => cpu.system.apic.task_priority(),
            _ => return Err(Fault::UD),
        };
        operand::write_register(cpu, i.op0_register(), value);
        return Ok(Flow::Continue);
    }
    let value = operand::read_register(cpu, i.op1_register());
    match control_number(i.op0_register()) {
        0 => set_cr0(cpu, value)?,
        2 => {
            cpu.cr2 = value;
            return Ok(Flow::Continue);
        }
        3 => set_cr3(cpu, value)?,
        4 => set_cr4(cpu, value)?,
        8 => {
            if value & !15 != 0 {
                return Err(Fault::GP);
            }
            apic::set_task_priority(cpu, value);
        }
        _ => return Err(Fault::UD),
    }
    Ok(Flow::EndBlock)
}

/// MOV to CR0 and LMSW (SDM vol. 2, MOV to CR; vol. 3, 9.8.5).
pub fn set_cr0(cpu: &mut Cpu, value: u64) -> Result<(), Fault> {
    let new = value & cr::CR0_KNOWN | cr::CR0_ET;
    let old = cpu.cr0;
    let paging = new & cr::CR0_PG != 0;
    if value >> 32 != 0
        || (paging && new & cr::CR0_PE == 0)
        || (new & cr::CR0_NW != 0 && new & cr::CR0_CD == 0)
        || (!paging && (code64(cpu) || cpu.cr4 & cr::CR4_PCIDE != 0))
    {
        return Err(Fault::GP);
    }
    if paging && old & cr::CR0_PG == 0 && cpu.efer & cr::EFER_LME != 0 {
        let cs_long = cpu.segments[crate::state::CS].attributes & segment::attribute::LONG != 0;
        if cpu.cr4 & cr::CR4_PAE == 0 || cs_long {
            return Err(Fault::GP);
        }
        cpu.efer |= cr::EFER_LMA;
    }
    if !paging {
        cpu.efer &= !cr::EFER_LMA;
    }
    cpu.cr0 = new;
    if (old ^ new) & (cr::CR0_PG | cr::CR0_PE | cr::CR0_WP) != 0 {
        cpu.flush_tlb();
    }
    if (old ^ new) & (cr::CR0_EM | cr::CR0_TS) != 0 {
        cpu.flush_jumps(true);
    }
    if (old ^ new) & cr::CR0_PE != 0 {
        cpu.cpl = 0;
    }
    Ok(())
}

/// MOV to CR3.
pub fn set_cr3(cpu: &mut Cpu, value: u64) -> Result<(), Fault> {
    // With PCIDs, bit 63 asks to keep the translations of the new one.
    let keep = cpu.cr4 & cr::CR4_PCIDE != 0 && value >> 63 != 0;
    let value = if keep { value & !(1 << 63) } else { value };
    if long_mode(cpu) && value >> paging::PHYSICAL_BITS != 0 {
        return Err(Fault::GP);
    }
    cpu.cr3 = value;
    cpu.switch_context(keep);
    Ok(())
}

/// MOV to CR4.
pub fn set_cr4(cpu: &mut Cpu, value: u64) -> Result<(), Fault> {
    let old = cpu.cr4;
    if value & !cpu.system.cpuid.cr4_mask() != 0 || (long_mode(cpu) && value & cr::CR4_PAE == 0) {
        return Err(Fault::GP);
    }
    if value & !old & cr::CR4_PCIDE != 0 && (!long_mode(cpu) || cpu.cr3 & 0xfff != 0) {
        return Err(Fault::GP);
    }
    cpu.cr4 = value;
    let paging =
        cr::CR4_PGE | cr::CR4_PAE | cr::CR4_PSE | cr::CR4_SMEP | cr::CR4_SMAP | cr::CR4_PCIDE;
    if (old ^ value) & paging != 0 {
        cpu.flush_tlb();
    } else if (old ^ value) & (cr::CR4_OSFXSR | cr::CR4_OSXSAVE) != 0 {
        cpu.flush_jumps(true);
    }
    Ok(())
}

/// WRMSR to EFER.
pub fn set_efer(cpu: &mut Cpu, value: u64) -> Result<(), Fault> {
    let changes = value ^ cpu.efer;
    if value & !msr::EFER_KNOWN != 0 || (changes & cr::EFER_LME != 0 && cpu.cr0 & cr::CR0_PG != 0) {
        return Err(Fault::GP);
    }
    cpu.efer = value & !cr::EFER_LMA | cpu.efer & cr::EFER_LMA;
    if changes & cr::EFER_NXE != 0 {
        cpu.flush_tlb();
    }
    Ok(())
}

pub(super) fn move_debug(cpu: &mut Cpu, i: &Instruction) -> Result<Flow, Fault> {
    let writes = i.op0_register().is_dr();
    let register = if writes {
        i.op0_register()
    } else {
        i.op1_register()
    };
    let mut number = register as usize - Register::DR0 as usize;
    if number > 7 || (matches!(number, 4 | 5) && cpu.cr4 & cr::CR4_DE != 0) {
        return Err(Fault::UD);
    }
    ring0(cpu)?;
    if matches!(number, 4 | 5) {
        number += 2;
    }
    // DR7.GD: touching debug registers is itself a debug exception.
    if cpu.dr[7] & 1 << 13 != 0 {
        cpu.dr[6] |= 1 << 13;
        return Err(Fault::DB);
    }
    if !writes {
        let value = cpu.dr[number];
        operand::write_register(cpu, i.op0_register(), value);
        return Ok(Flow::Continue);
    }
    let value = operand::read_register(cpu, i.op1_register());
    cpu.dr[number] = match number {
        6 if value >> 32 != 0 => return Err(Fault::GP),
        7 if value >> 32 != 0 => return Err(Fault::GP),
        // DR6 and DR7 have bits that are always set or clear (SDM vol. 3, 18.2).
        6 => value & 0xe00f | 0xffff_0ff0,
        7 => value & 0xffff_2fff | 0x400,
        _ => value,
    };
    cpu.debug_changed();
    Ok(Flow::EndBlock)
}
