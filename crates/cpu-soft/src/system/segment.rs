//! Segment descriptors and the loading of segment registers (SDM vol. 3, chapters 3 and 5).

use cpu::x86::Segment;

use super::cr;
use crate::state::{CS, Cpu, FS, Fault, GS, Rights, SS, flag};

/// Bits of [`Segment::attributes`].
pub mod attribute {
    pub const ACCESSED: u16 = 1;
    /// Data: writable. Code: readable.
    pub const WRITABLE: u16 = 1 << 1;
    /// Data: expands down. Code: conforming.
    pub const CONFORMING: u16 = 1 << 2;
    pub const CODE: u16 = 1 << 3;
    /// Not a system descriptor.
    pub const S: u16 = 1 << 4;
    pub const PRESENT: u16 = 1 << 7;
    pub const LONG: u16 = 1 << 13;
    /// Default size (code), big (stack).
    pub const BIG: u16 = 1 << 14;
    pub const GRANULARITY: u16 = 1 << 15;
}
use attribute::*;

/// A descriptor as its table holds it.
#[derive(Debug, Clone, Copy)]
pub struct Descriptor(pub u64);

impl Descriptor {
    pub fn attributes(self) -> u16 {
        (self.0 >> 40) as u16 & 0xf0ff
    }
    pub fn dpl(self) -> u8 {
        (self.0 >> 45) as u8 & 3
    }
    pub fn present(self) -> bool {
        self.0 >> 47 & 1 != 0
    }
    /// System type; code and data segments answer their type too.
    pub fn kind(self) -> u8 {
        (self.0 >> 40) as u8 & 15
    }
    pub fn is_segment(self) -> bool {
        self.attributes() & S != 0
    }
    pub fn is_code(self) -> bool {
        self.attributes() & (S | CODE) == S | CODE
    }
    pub fn conforming(self) -> bool {
        self.attributes() & CONFORMING != 0
    }
    pub fn limit(self) -> u32 {
        let raw = (self.0 & 0xffff) as u32 | (self.0 >> 32) as u32 & 0xf_0000;
        if self.attributes() & GRANULARITY != 0 {
            raw << 12 | 0xfff
        } else {
            raw
        }
    }
    pub fn base(self) -> u32 {
        (self.0 >> 16) as u32 & 0xff_ffff | (self.0 >> 32) as u32 & 0xff00_0000
    }
    pub fn segment(self, selector: u16) -> Segment {
        Segment {
            base: u64::from(self.base()),
            limit: self.limit(),
            selector,
            attributes: self.attributes(),
            unusable: false,
        }
    }
}

/// What the CPU runs as.
pub fn protected(cpu: &Cpu) -> bool {
    cpu.cr0 & cr::CR0_PE != 0
}

pub fn virtual_8086(cpu: &Cpu) -> bool {
    cpu.rflags & flag::VM != 0
}

/// IA-32e mode (64-bit or compatibility).
pub fn long_mode(cpu: &Cpu) -> bool {
    cpu.efer & cr::EFER_LMA != 0
}

/// 64-bit mode.
pub fn code64(cpu: &Cpu) -> bool {
    long_mode(cpu) && cpu.segments[CS].attributes & LONG != 0
}

/// 16, 32 or 64: how instructions are decoded.
pub fn bitness(cpu: &Cpu) -> u32 {
    if code64(cpu) {
        64
    } else if cpu.segments[CS].attributes & BIG != 0 && protected(cpu) {
        32
    } else {
        16
    }
}

/// Bytes of the stack pointer: 2, 4 or 8.
pub fn stack_size(cpu: &Cpu) -> usize {
    if code64(cpu) {
        8
    } else if cpu.segments[SS].attributes & BIG != 0 {
        4
    } else {
        2
    }
}

/// A flat segment for SYSCALL and its kin.
pub fn flat(selector: u16, attributes: u16) -> Segment {
    Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        attributes,
        unusable: false,
    }
}

/// The linear address of a descriptor; `Err`: beyond the table's limit.
fn locate(cpu: &Cpu, selector: u16, bytes: u64) -> Option<u64> {
    let index = u64::from(selector & !7);
    let (base, limit) = if selector & 4 != 0 {
        if cpu.ldtr.unusable {
            return None;
        }
        (cpu.ldtr.base, u64::from(cpu.ldtr.limit))
    } else {
        (cpu.gdtr.base, u64::from(cpu.gdtr.limit))
    };
    (index + bytes - 1 <= limit).then(|| base.wrapping_add(index))
}

/// Reads the descriptor that `selector` names; #GP(selector) beyond the table.
pub fn read_descriptor(cpu: &mut Cpu, selector: u16) -> Result<Descriptor, Fault> {
    let at = locate(cpu, selector, 8).ok_or(Fault::gp(u32::from(selector & !3)))?;
    Ok(Descriptor(cpu.read::<u64>(at, Rights::Supervisor)?))
}

/// Reads a system descriptor, of 16 bytes in IA-32e mode: the descriptor and the upper half of its base.
pub fn read_system_descriptor(cpu: &mut Cpu, selector: u16) -> Result<(Descriptor, u64), Fault> {
    let low = read_descriptor(cpu, selector)?;
    if !long_mode(cpu) {
        return Ok((low, 0));
    }
    let at = locate(cpu, selector, 16).ok_or(Fault::gp(u32::from(selector & !3)))?;
    let high = cpu.read::<u64>(at + 8, Rights::Supervisor)?;
    Ok((low, high))
}

/// Sets the accessed bit in the table, where it is not set yet.
pub fn mark_accessed(
    cpu: &mut Cpu,
    selector: u16,
    descriptor: Descriptor,
) -> Result<Descriptor, Fault> {
    if descriptor.attributes() & ACCESSED != 0 {
        return Ok(descriptor);
    }
    let Some(at) = locate(cpu, selector, 8) else {
        return Ok(descriptor);
    };
    let byte = (descriptor.0 >> 40) as u8;
    cpu.write::<u8>(at + 5, byte | 1, Rights::Supervisor)?;
    Ok(Descriptor(descriptor.0 | 1 << 40))
}

/// MOV or POP into a segment register other than CS (SDM vol. 2, MOV).
pub fn load(cpu: &mut Cpu, which: usize, selector: u16) -> Result<(), Fault> {
    if !protected(cpu) || virtual_8086(cpu) {
        load_real(cpu, which, selector);
        return Ok(());
    }
    let loaded = check(cpu, which, selector, cpu.cpl)?;
    cpu.segments[which] = loaded;
    Ok(())
}

/// Real mode keeps limit and attributes: only the base follows the selector.
pub fn load_real(cpu: &mut Cpu, which: usize, selector: u16) {
    let segment = &mut cpu.segments[which];
    segment.selector = selector;
    segment.base = u64::from(selector) << 4;
    segment.unusable = false;
    if which == CS || segment.attributes & S == 0 {
        segment.attributes = 0x93;
    }
    if segment.limit == 0 {
        segment.limit = 0xffff;
    }
}

/// What loading `selector` at privilege `cpl` would give, with all checks made and the accessed bit set.
pub fn check(cpu: &mut Cpu, which: usize, selector: u16, cpl: u8) -> Result<Segment, Fault> {
    let rpl = (selector & 3) as u8;
    let error = u32::from(selector & !3);
    if selector & !3 == 0 {
        if which == SS && !(code64(cpu) && cpl < 3 && rpl == cpl) {
            return Err(Fault::GP);
        }
        return Ok(null(which, selector, cpl));
    }
    let descriptor = read_descriptor(cpu, selector)?;
    let attributes = descriptor.attributes();
    if which == SS {
        if attributes & (S | CODE | WRITABLE) != S | WRITABLE
            || rpl != cpl
            || descriptor.dpl() != cpl
        {
            return Err(Fault::gp(error));
        }
        if !descriptor.present() {
            return Err(Fault::ss(error));
        }
    } else {
        if attributes & S == 0 || attributes & (CODE | WRITABLE) == CODE {
            return Err(Fault::gp(error));
        }
        let conforming = attributes & (CODE | CONFORMING) == CODE | CONFORMING;
        if !conforming && (rpl > descriptor.dpl() || cpl > descriptor.dpl()) {
            return Err(Fault::gp(error));
        }
        if !descriptor.present() {
            return Err(Fault::with_error(11, error));
        }
    }
    Ok(mark_accessed(cpu, selector, descriptor)?.segment(selector))
}

/// A null segment: unusable, except that 64-bit stacks work with one.
pub fn null(which: usize, selector: u16, cpl: u8) -> Segment {
    let attributes = if which == SS { u16::from(cpl) << 5 } else { 0 };
    Segment {
        base: 0,
        limit: 0,
        selector,
        attributes,
        unusable: true,
    }
}

/// After a return to an outer ring, data segments that ring may not use become null (SDM vol. 2, IRET).
pub fn drop_privileged(cpu: &mut Cpu) {
    for which in [crate::state::ES, crate::state::DS, FS, GS] {
        let segment = cpu.segments[which];
        let dpl = (segment.attributes >> 5 & 3) as u8;
        let code_conforming = segment.attributes & (CODE | CONFORMING) == CODE | CONFORMING;
        if !segment.unusable && dpl < cpu.cpl && !code_conforming {
            cpu.segments[which] = Segment {
                base: segment.base,
                ..null(which, 0, cpu.cpl)
            };
            if which < FS {
                cpu.segments[which].base = 0;
            }
        }
    }
}

/// The linear address of `offset..offset+len` in a segment; segment faults as the SDM says (vol. 3, 5.3).
pub fn linear(cpu: &Cpu, which: usize, offset: u64, len: usize, write: bool) -> Result<u64, Fault> {
    let fault = if which == SS { Fault::ss(0) } else { Fault::GP };
    let segment = &cpu.segments[which];
    if code64(cpu) {
        let at = if which >= FS {
            segment.base.wrapping_add(offset)
        } else {
            offset
        };
        let last = at.wrapping_add(len as u64 - 1);
        if !super::paging::canonical(at) || !super::paging::canonical(last) {
            return Err(fault);
        }
        return Ok(at);
    }
    let offset = offset & 0xffff_ffff;
    if protected(cpu) && !virtual_8086(cpu) {
        if segment.unusable {
            return Err(fault);
        }
        let code = segment.attributes & CODE != 0;
        let allowed = if write {
            !code && segment.attributes & WRITABLE != 0
        } else {
            !code || segment.attributes & WRITABLE != 0
        };
        if !allowed {
            return Err(fault);
        }
    }
    let last = offset + len as u64 - 1;
    let limit = u64::from(segment.limit);
    let inside = if segment.attributes & (CODE | CONFORMING | S) == CONFORMING | S {
        let top = if segment.attributes & BIG != 0 {
            0xffff_ffff
        } else {
            0xffff
        };
        offset > limit && last <= top
    } else {
        last <= limit
    };
    if !inside {
        return Err(fault);
    }
    Ok(segment.base.wrapping_add(offset) & 0xffff_ffff)
}

/// VERR and VERW: whether `selector` may be read (or written) at the current privilege.
pub fn verify(cpu: &mut Cpu, selector: u16, write: bool) -> Result<bool, Fault> {
    let Some(descriptor) = visible(cpu, selector)? else {
        return Ok(false);
    };
    let attributes = descriptor.attributes();
    if attributes & S == 0 {
        return Ok(false);
    }
    let conforming = attributes & (CODE | CONFORMING) == CODE | CONFORMING;
    let ring = cpu.cpl.max((selector & 3) as u8);
    if !conforming && ring > descriptor.dpl() {
        return Ok(false);
    }
    Ok(match (attributes & CODE != 0, write) {
        (true, true) => false,
        (true, false) => attributes & WRITABLE != 0,
        (false, true) => attributes & WRITABLE != 0,
        (false, false) => true,
    })
}

/// LAR and LSL: the descriptor, where its type and the privilege allow them.
pub fn inspect(cpu: &mut Cpu, selector: u16, for_limit: bool) -> Result<Option<Descriptor>, Fault> {
    let Some(descriptor) = visible(cpu, selector)? else {
        return Ok(None);
    };
    if !descriptor.is_segment() {
        let valid = match descriptor.kind() {
            2 | 9 | 11 => true,
            1 | 3 => !long_mode(cpu),
            4 | 5 => !for_limit && !long_mode(cpu),
            12 => !for_limit,
            _ => false,
        };
        if !valid {
            return Ok(None);
        }
    }
    let conforming = descriptor.is_code() && descriptor.conforming();
    let ring = cpu.cpl.max((selector & 3) as u8);
    Ok((conforming || ring <= descriptor.dpl()).then_some(descriptor))
}

fn visible(cpu: &mut Cpu, selector: u16) -> Result<Option<Descriptor>, Fault> {
    if selector & !3 == 0 {
        return Ok(None);
    }
    match locate(cpu, selector, 8) {
        Some(at) => Ok(Some(Descriptor(cpu.read::<u64>(at, Rights::Supervisor)?))),
        None => Ok(None),
    }
}

/// LLDT.
pub fn load_ldt(cpu: &mut Cpu, selector: u16) -> Result<(), Fault> {
    if selector & !3 == 0 {
        cpu.ldtr = Segment {
            selector,
            unusable: true,
            ..Segment::default()
        };
        return Ok(());
    }
    let (descriptor, high) = table_entry(cpu, selector)?;
    if descriptor.is_segment() || descriptor.kind() != 2 {
        return Err(Fault::gp(u32::from(selector & !3)));
    }
    if !descriptor.present() {
        return Err(Fault::with_error(11, u32::from(selector & !3)));
    }
    let mut segment = descriptor.segment(selector);
    segment.base |= high << 32;
    cpu.ldtr = segment;
    Ok(())
}

/// LTR: marks the TSS busy.
pub fn load_task(cpu: &mut Cpu, selector: u16) -> Result<(), Fault> {
    if selector & !3 == 0 {
        return Err(Fault::GP);
    }
    let (descriptor, high) = table_entry(cpu, selector)?;
    let available = matches!(descriptor.kind(), 9) || (descriptor.kind() == 1 && !long_mode(cpu));
    if descriptor.is_segment() || !available {
        return Err(Fault::gp(u32::from(selector & !3)));
    }
    if !descriptor.present() {
        return Err(Fault::with_error(11, u32::from(selector & !3)));
    }
    if let Some(at) = locate(cpu, selector, 8) {
        cpu.write::<u8>(at + 5, (descriptor.0 >> 40) as u8 | 2, Rights::Supervisor)?;
    }
    let mut segment = descriptor.segment(selector);
    segment.base |= high << 32;
    segment.attributes |= 2;
    cpu.tr = segment;
    Ok(())
}

/// A descriptor of the GDT (LLDT and LTR take no other); in IA-32e mode its upper base.
fn table_entry(cpu: &mut Cpu, selector: u16) -> Result<(Descriptor, u64), Fault> {
    let error = Fault::gp(u32::from(selector & !3));
    if selector & 4 != 0 {
        return Err(error);
    }
    let (descriptor, high) = read_system_descriptor(cpu, selector)?;
    if high >> 40 & 0x1f != 0 {
        return Err(error);
    }
    let base = high << 32 | u64::from(descriptor.base());
    if long_mode(cpu) && !super::paging::canonical(base) {
        return Err(error);
    }
    Ok((descriptor, high & 0xffff_ffff))
}
