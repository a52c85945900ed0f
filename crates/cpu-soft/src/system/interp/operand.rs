//! Operands of a decoded instruction: registers, immediates, memory.

use iced_x86::{Instruction, OpKind, Register};

use crate::state::{Cpu, ES, FS, Fault, Rights, SS};
use crate::system::segment;

/// The bits of a value of `size` bytes (1, 2, 4 or 8).
#[inline]
pub const fn mask(size: usize) -> u64 {
    if size >= 8 {
        u64::MAX
    } else {
        (1 << (size * 8)) - 1
    }
}

/// Sign-extends a value of `size` bytes.
#[inline]
pub const fn sign_extend(value: u64, size: usize) -> u64 {
    let shift = 64 - size as u32 * 8;
    ((value << shift) as i64 >> shift) as u64
}

/// Where a general register is in [`Cpu::gpr`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub index: usize,
    pub size: usize,
    /// AH, CH, DH, BH.
    pub high: bool,
}

/// The place of a general register; `None` for anything else.
#[inline]
pub fn general(register: Register) -> Option<Place> {
    let number = register as usize;
    let from = |first: Register| number - first as usize;
    if register.is_gpr64() {
        Some(Place {
            index: from(Register::RAX),
            size: 8,
            high: false,
        })
    } else if register.is_gpr32() {
        Some(Place {
            index: from(Register::EAX),
            size: 4,
            high: false,
        })
    } else if register.is_gpr16() {
        Some(Place {
            index: from(Register::AX),
            size: 2,
            high: false,
        })
    } else if register.is_gpr8() {
        let at = from(Register::AL);
        Some(match at {
            // AL CL DL BL AH CH DH BH SPL BPL SIL DIL R8L...
            0..=3 => Place {
                index: at,
                size: 1,
                high: false,
            },
            4..=7 => Place {
                index: at - 4,
                size: 1,
                high: true,
            },
            _ => Place {
                index: at - 4,
                size: 1,
                high: false,
            },
        })
    } else {
        None
    }
}

/// The number of a segment register in [`Cpu::segments`].
pub fn segment_index(register: Register) -> usize {
    match register {
        Register::ES | Register::CS | Register::SS | Register::DS | Register::FS | Register::GS => {
            register as usize - Register::ES as usize + ES
        }
        _ => crate::state::DS,
    }
}

/// Reads a general or segment register, zero-extended.
#[inline]
pub fn read_register(cpu: &Cpu, register: Register) -> u64 {
    match general(register) {
        Some(Place {
            index, high: true, ..
        }) => cpu.gpr[index] >> 8 & 0xff,
        Some(Place { index, size, .. }) => cpu.gpr[index] & mask(size),
        None if register.is_segment_register() => {
            u64::from(cpu.segments[segment_index(register)].selector)
        }
        None => 0,
    }
}

/// Writes a general register: 32-bit writes clear the upper half, narrower ones keep it.
#[inline]
pub fn write_register(cpu: &mut Cpu, register: Register, value: u64) {
    match general(register) {
        Some(Place {
            index, high: true, ..
        }) => cpu.gpr[index] = cpu.gpr[index] & !0xff00 | (value & 0xff) << 8,
        Some(Place { index, size, .. }) => match size {
            8 => cpu.gpr[index] = value,
            4 => cpu.gpr[index] = value & 0xffff_ffff,
            _ => cpu.gpr[index] = cpu.gpr[index] & !mask(size) | value & mask(size),
        },
        None => {}
    }
}

/// Bytes of operand `op`.
pub fn size(instruction: &Instruction, op: u32) -> usize {
    match instruction.op_kind(op) {
        OpKind::Register => instruction.op_register(op).size(),
        OpKind::Immediate8 | OpKind::Immediate8_2nd => 1,
        OpKind::Immediate16 | OpKind::Immediate8to16 => 2,
        OpKind::Immediate32 | OpKind::Immediate8to32 => 4,
        OpKind::Immediate64 | OpKind::Immediate8to64 | OpKind::Immediate32to64 => 8,
        _ => instruction.memory_size().size(),
    }
}

/// Bytes of the address calculation: 2, 4 or 8.
pub fn address_size(instruction: &Instruction) -> usize {
    let base = instruction.memory_base();
    if base != Register::None {
        return base.size();
    }
    let index = instruction.memory_index();
    if index != Register::None && !index.is_vector_register() {
        return index.size();
    }
    match instruction.memory_displ_size() {
        2 => 2,
        4 => 4,
        8 => 8,
        _ => instruction.code_size_bytes(),
    }
}

trait CodeSizeBytes {
    fn code_size_bytes(&self) -> usize;
}

impl CodeSizeBytes for Instruction {
    fn code_size_bytes(&self) -> usize {
        match self.code_size() {
            iced_x86::CodeSize::Code16 => 2,
            iced_x86::CodeSize::Code32 => 4,
            _ => 8,
        }
    }
}

/// The offset of the memory operand inside its segment.
pub fn offset(cpu: &Cpu, instruction: &Instruction) -> u64 {
    let base = instruction.memory_base();
    let mut at = instruction.memory_displacement64();
    // RIP-relative: the decoder has added the instruction's address.
    if base != Register::None && !base.is_ip() {
        at = at.wrapping_add(read_register(cpu, base));
    }
    let index = instruction.memory_index();
    if index != Register::None {
        at = at.wrapping_add(
            read_register(cpu, index).wrapping_mul(u64::from(instruction.memory_index_scale())),
        );
    }
    at & mask(address_size(instruction))
}

/// The segment of the memory operand.
pub fn memory_segment(instruction: &Instruction) -> usize {
    segment_index(instruction.memory_segment())
}

/// The linear address of the memory operand's `len` bytes, checked against its segment.
pub fn linear(cpu: &Cpu, instruction: &Instruction, len: usize, write: bool) -> Result<u64, Fault> {
    segment::linear(
        cpu,
        memory_segment(instruction),
        offset(cpu, instruction),
        len,
        write,
    )
}

/// Reads `size` bytes (1, 2, 4 or 8) at a linear address.
pub fn load(cpu: &mut Cpu, linear: u64, size: usize) -> Result<u64, Fault> {
    let mut bytes = [0u8; 8];
    cpu.read_bytes(linear, &mut bytes[..size], Rights::Current)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Writes `size` bytes at a linear address.
pub fn store(cpu: &mut Cpu, linear: u64, size: usize, value: u64) -> Result<(), Fault> {
    cpu.write_bytes(linear, &value.to_le_bytes()[..size], Rights::Current)
}

/// Compare-and-swap of `size` bytes; `Err` of the inner result: what was found instead.
pub fn exchange_if(
    cpu: &mut Cpu,
    linear: u64,
    size: usize,
    old: u64,
    new: u64,
) -> Result<Result<u64, u64>, Fault> {
    let widen = |r: Result<u64, u64>| Ok(r);
    match size {
        1 => widen(
            cpu.compare_exchange(linear, old as u8, new as u8, Rights::Current)?
                .map(u64::from)
                .map_err(u64::from),
        ),
        2 => widen(
            cpu.compare_exchange(linear, old as u16, new as u16, Rights::Current)?
                .map(u64::from)
                .map_err(u64::from),
        ),
        4 => widen(
            cpu.compare_exchange(linear, old as u32, new as u32, Rights::Current)?
                .map(u64::from)
                .map_err(u64::from),
        ),
        _ => widen(cpu.compare_exchange(linear, old, new, Rights::Current)?),
    }
}

/// Reads operand `op` as `size` bytes; immediates come sign-extended to them.
pub fn read(cpu: &mut Cpu, instruction: &Instruction, op: u32, size: usize) -> Result<u64, Fault> {
    match instruction.op_kind(op) {
        OpKind::Register => Ok(read_register(cpu, instruction.op_register(op))),
        OpKind::Memory => {
            let at = linear(cpu, instruction, size, false)?;
            load(cpu, at, size)
        }
        _ => Ok(instruction.immediate(op) & mask(size)),
    }
}

/// Writes operand `op`.
pub fn write(
    cpu: &mut Cpu,
    instruction: &Instruction,
    op: u32,
    size: usize,
    value: u64,
) -> Result<(), Fault> {
    match instruction.op_kind(op) {
        OpKind::Register => {
            write_register(cpu, instruction.op_register(op), value);
            Ok(())
        }
        _ => {
            let at = linear(cpu, instruction, size, true)?;
            store(cpu, at, size, value)
        }
    }
}

/// Replaces operand `op` by `f` of it, atomically where the instruction is locked; answers the old value.
pub fn modify(
    cpu: &mut Cpu,
    instruction: &Instruction,
    op: u32,
    size: usize,
    mut f: impl FnMut(u64) -> u64,
) -> Result<u64, Fault> {
    if instruction.op_kind(op) == OpKind::Register {
        let register = instruction.op_register(op);
        let old = read_register(cpu, register);
        write_register(cpu, register, f(old));
        return Ok(old);
    }
    let at = linear(cpu, instruction, size, true)?;
    let locked =
        instruction.has_lock_prefix() || instruction.mnemonic() == iced_x86::Mnemonic::Xchg;
    modify_at(cpu, at, size, locked, f_mut(&mut f))
}

fn f_mut(f: &mut impl FnMut(u64) -> u64) -> impl FnMut(u64) -> u64 + '_ {
    move |x| f(x)
}

/// Replaces memory at a linear address by `f` of it.
pub fn modify_at(
    cpu: &mut Cpu,
    at: u64,
    size: usize,
    locked: bool,
    mut f: impl FnMut(u64) -> u64,
) -> Result<u64, Fault> {
    // The fault of a read-modify-write is that of a write.
    cpu.write_probe(at, size, Rights::Current)?;
    let mut old = load(cpu, at, size)?;
    if !locked {
        let new = f(old);
        store(cpu, at, size, new)?;
        return Ok(old);
    }
    loop {
        let new = f(old);
        match exchange_if(cpu, at, size, old, new)? {
            Ok(_) => return Ok(old),
            Err(found) => old = found,
        }
    }
}

/// True where the memory operand is in the stack segment.
pub fn is_stack(instruction: &Instruction) -> bool {
    memory_segment(instruction) == SS
}

/// The base of the segment in 64-bit mode counts only for FS and GS.
pub fn segment_base(cpu: &Cpu, which: usize) -> u64 {
    if segment::code64(cpu) && which < FS {
        0
    } else {
        cpu.segments[which].base
    }
}
