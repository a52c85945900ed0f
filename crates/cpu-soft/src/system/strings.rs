//! String instructions (SDM vol. 1, 7.3.9): MOVS, STOS, LODS, CMPS, SCAS, INS, OUTS with their REP prefixes.
//!
//! Registers advance with every element, so that a fault or an interrupt in the middle leaves a state from which
//! the same instruction goes on. Forward MOVS and STOS move a page's worth of elements at a time.

use cpu::x86::{RAX, RCX, RDI, RDX, RSI};
use iced_x86::{Instruction, Mnemonic, OpKind};
use std::sync::atomic::Ordering;

use super::interp::{alu, operand};
use super::port;
use super::segment;
use crate::mem::Place;
use crate::state::{Access, Cpu, ES, Fault, Flow, Rights, flag};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Movs,
    Stos,
    Lods,
    Cmps,
    Scas,
    Ins,
    Outs,
}

/// One string instruction, taken apart.
#[derive(Debug, Clone, Copy)]
struct Op {
    kind: Kind,
    /// Bytes of an element.
    size: usize,
    /// Bits of SI, DI and CX in use.
    mask: u64,
    source: usize,
    repeated: bool,
    /// REPE and REPNE end a compare on this value of ZF.
    end_on: Option<bool>,
}

fn decode(i: &Instruction) -> Option<Op> {
    use Mnemonic as M;
    let (kind, size) = match i.mnemonic() {
        M::Movsb => (Kind::Movs, 1),
        M::Movsw => (Kind::Movs, 2),
        M::Movsd => (Kind::Movs, 4),
        M::Movsq => (Kind::Movs, 8),
        M::Stosb => (Kind::Stos, 1),
        M::Stosw => (Kind::Stos, 2),
        M::Stosd => (Kind::Stos, 4),
        M::Stosq => (Kind::Stos, 8),
        M::Lodsb => (Kind::Lods, 1),
        M::Lodsw => (Kind::Lods, 2),
        M::Lodsd => (Kind::Lods, 4),
        M::Lodsq => (Kind::Lods, 8),
        M::Cmpsb => (Kind::Cmps, 1),
        M::Cmpsw => (Kind::Cmps, 2),
        M::Cmpsd => (Kind::Cmps, 4),
        M::Cmpsq => (Kind::Cmps, 8),
        M::Scasb => (Kind::Scas, 1),
        M::Scasw => (Kind::Scas, 2),
        M::Scasd => (Kind::Scas, 4),
        M::Scasq => (Kind::Scas, 8),
        M::Insb => (Kind::Ins, 1),
        M::Insw => (Kind::Ins, 2),
        M::Insd => (Kind::Ins, 4),
        M::Outsb => (Kind::Outs, 1),
        M::Outsw => (Kind::Outs, 2),
        M::Outsd => (Kind::Outs, 4),
        _ => return None,
    };
    // MOVSD and CMPSD are names of SSE instructions as well: those have no string operands.
    let address = (0..i.op_count()).find_map(|n| match i.op_kind(n) {
        OpKind::MemorySegSI | OpKind::MemoryESDI => Some(2),
        OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(4),
        OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(8),
        _ => None,
    })?;
    let compares = matches!(kind, Kind::Cmps | Kind::Scas);
    let repeated = i.has_rep_prefix() || i.has_repne_prefix();
    Some(Op {
        kind,
        size,
        mask: operand::mask(address),
        source: operand::memory_segment(i),
        repeated,
        end_on: (compares && repeated).then_some(i.has_repne_prefix()),
    })
}

/// Elements after which a repeated instruction looks whether anything waits.
const PATIENCE: u64 = 1024;

/// Executes a string instruction; `Ok(None)`: it is none.
pub fn execute(cpu: &mut Cpu, i: &Instruction) -> Result<Option<Flow>, Fault> {
    let Some(op) = decode(i) else { return Ok(None) };
    if !op.repeated {
        let flow = one(cpu, op)?;
        cpu.rip = i.next_ip();
        return Ok(Some(flow));
    }
    let single_step = cpu.rflags & flag::TF != 0;
    let mut since_look = 0;
    while cpu.gpr[RCX] & op.mask != 0 {
        let done = match batch(cpu, op)? {
            0 => {
                let flow = one(cpu, op)?;
                advance(cpu, RCX, op.mask, 1u64.wrapping_neg());
                if flow == Flow::Stop {
                    return Ok(Some(flow));
                }
                1
            }
            n => n,
        };
        if op
            .end_on
            .is_some_and(|zf| zf == (cpu.rflags & flag::ZF != 0))
        {
            break;
        }
        since_look += done;
        if cpu.debug.hit != 0 && cpu.gpr[RCX] & op.mask != 0 {
            return Ok(Some(Flow::EndBlock));
        }
        if cpu.gpr[RCX] & op.mask != 0 && (single_step || since_look >= PATIENCE) {
            since_look = 0;
            if single_step || (cpu.attention.load(Ordering::Relaxed) != 0 && cpu.replay.is_none()) {
                // rip stays: the instruction goes on afterwards.
                return Ok(Some(Flow::EndBlock));
            }
        }
    }
    cpu.rip = i.next_ip();
    Ok(Some(Flow::Continue))
}

/// Moves a register by `delta` inside its address size.
fn advance(cpu: &mut Cpu, register: usize, mask: u64, delta: u64) {
    let moved = cpu.gpr[register].wrapping_add(delta) & mask;
    // A 32-bit address size clears the upper half, as every 32-bit write does.
    cpu.gpr[register] = if mask == 0xffff {
        cpu.gpr[register] & !mask | moved
    } else {
        moved
    };
}

fn step(cpu: &Cpu, op: Op) -> u64 {
    if cpu.rflags & flag::DF != 0 {
        (op.size as u64).wrapping_neg()
    } else {
        op.size as u64
    }
}

fn source(cpu: &Cpu, op: Op, len: usize) -> Result<u64, Fault> {
    segment::linear(cpu, op.source, cpu.gpr[RSI] & op.mask, len, false)
}

fn target(cpu: &Cpu, op: Op, len: usize, write: bool) -> Result<u64, Fault> {
    segment::linear(cpu, ES, cpu.gpr[RDI] & op.mask, len, write)
}

/// One element.
fn one(cpu: &mut Cpu, op: Op) -> Result<Flow, Fault> {
    let delta = step(cpu, op);
    let size = op.size;
    let mut flow = Flow::Continue;
    match op.kind {
        Kind::Movs => {
            let (from, to) = (source(cpu, op, size)?, target(cpu, op, size, true)?);
            let value = operand::load(cpu, from, size)?;
            operand::store(cpu, to, size, value)?;
            advance(cpu, RSI, op.mask, delta);
            advance(cpu, RDI, op.mask, delta);
        }
        Kind::Stos => {
            let to = target(cpu, op, size, true)?;
            let value = cpu.gpr[RAX];
            operand::store(cpu, to, size, value)?;
            advance(cpu, RDI, op.mask, delta);
        }
        Kind::Lods => {
            let from = source(cpu, op, size)?;
            let value = operand::load(cpu, from, size)?;
            set_accumulator(cpu, size, value);
            advance(cpu, RSI, op.mask, delta);
        }
        Kind::Cmps => {
            let (from, to) = (source(cpu, op, size)?, target(cpu, op, size, false)?);
            let (a, b) = (
                operand::load(cpu, from, size)?,
                operand::load(cpu, to, size)?,
            );
            alu::sub(a, b, 0, size).set(cpu);
            advance(cpu, RSI, op.mask, delta);
            advance(cpu, RDI, op.mask, delta);
        }
        Kind::Scas => {
            let to = target(cpu, op, size, false)?;
            let b = operand::load(cpu, to, size)?;
            let a = cpu.gpr[RAX] & operand::mask(size);
            alu::sub(a, b, 0, size).set(cpu);
            advance(cpu, RDI, op.mask, delta);
        }
        Kind::Ins => {
            let port = cpu.gpr[RDX] as u16;
            port::check_port(cpu, port, size)?;
            let to = target(cpu, op, size, true)?;
            cpu.write_probe(to, size, Rights::Current)?;
            let value = port::port_in(cpu, port, size);
            operand::store(cpu, to, size, value)?;
            advance(cpu, RDI, op.mask, delta);
        }
        Kind::Outs => {
            let port = cpu.gpr[RDX] as u16;
            port::check_port(cpu, port, size)?;
            let from = source(cpu, op, size)?;
            let value = operand::load(cpu, from, size)?;
            flow = port::port_out(cpu, port, size, value);
            advance(cpu, RSI, op.mask, delta);
        }
    }
    Ok(flow)
}

fn set_accumulator(cpu: &mut Cpu, size: usize, value: u64) {
    let mask = operand::mask(size);
    cpu.gpr[RAX] = if size >= 4 {
        value
    } else {
        cpu.gpr[RAX] & !mask | value
    };
}

/// Elements from `linear` up to the end of its page.
fn in_page(linear: u64, size: usize) -> u64 {
    (4096 - (linear & 4095)) / size as u64
}

/// As many elements as RAM inside one page (of either side) allows; 0: take the slow way for the next one.
fn batch(cpu: &mut Cpu, op: Op) -> Result<u64, Fault> {
    let looked_at = cpu.debug.watches || cpu.alignment_checked();
    if cpu.rflags & (flag::DF | flag::TF) != 0 || looked_at {
        return Ok(0);
    }
    let left = cpu.gpr[RCX] & op.mask;
    let size = op.size as u64;
    let room = |register: u64| (op.mask - (register & op.mask)) / size;
    let uses_source = matches!(op.kind, Kind::Movs | Kind::Cmps);
    if matches!(op.kind, Kind::Lods | Kind::Ins | Kind::Outs) || left < 2 {
        return Ok(0);
    }
    let writes = matches!(op.kind, Kind::Movs | Kind::Stos);
    let to = target(cpu, op, op.size, writes)?;
    let mut n = left.min(in_page(to, op.size)).min(room(cpu.gpr[RDI]));
    let mut from = 0;
    if uses_source {
        from = source(cpu, op, op.size)?;
        n = n.min(in_page(from, op.size)).min(room(cpu.gpr[RSI]));
    }
    let len = (n * size) as usize;
    if n < 2
        || target(cpu, op, len, writes).is_err()
        || (uses_source && source(cpu, op, len).is_err())
    {
        return Ok(0);
    }
    // The source first: its fault comes before the target's.
    let from_host = if uses_source {
        match cpu.place(from, Access::Read, Rights::Current)? {
            Place::Ram(at) => Some(at),
            Place::Device(_) => return Ok(0),
        }
    } else {
        None
    };
    let access = if writes { Access::Write } else { Access::Read };
    let Place::Ram(to_host) = cpu.place(to, access, Rights::Current)? else {
        return Ok(0);
    };
    let done = match op.kind {
        Kind::Movs => {
            let Some(from_host) = from_host else {
                return Ok(0);
            };
            // SAFETY: both ranges lie inside one page of guest RAM each, as `n` was cut to that.
            unsafe { copy_forward(from_host, to_host, len, op.size) };
            cpu.stored(to_host);
            n
        }
        Kind::Stos => {
            let value = cpu.gpr[RAX];
            // SAFETY: as above.
            unsafe { fill(to_host, len, op.size, value) };
            cpu.stored(to_host);
            n
        }
        _ => {
            let accumulator = cpu.gpr[RAX] & operand::mask(op.size);
            let mut done = 0;
            while done < n {
                let at = (done * size) as usize;
                // SAFETY: inside the pages, as above.
                let b = unsafe { element(to_host.add(at), op.size) };
                let a = match from_host {
                    // SAFETY: as above.
                    Some(from) => unsafe { element(from.add(at), op.size) },
                    None => accumulator,
                };
                done += 1;
                let last = op.end_on.is_some_and(|zf| zf == (a == b));
                if last || done == n {
                    alu::sub(a, b, 0, op.size).set(cpu);
                    if last {
                        break;
                    }
                }
            }
            done
        }
    };
    let moved = done * size;
    advance(cpu, RDI, op.mask, moved);
    if uses_source {
        advance(cpu, RSI, op.mask, moved);
    }
    advance(cpu, RCX, op.mask, done.wrapping_neg());
    Ok(done)
}

/// Reads one element.
///
/// # Safety
/// `at` is valid for `size` bytes.
unsafe fn element(at: *const u8, size: usize) -> u64 {
    // SAFETY: the caller's promise; unaligned reads are allowed for.
    unsafe {
        match size {
            1 => u64::from(at.read_volatile()),
            2 => u64::from(at.cast::<u16>().read_unaligned()),
            4 => u64::from(at.cast::<u32>().read_unaligned()),
            _ => at.cast::<u64>().read_unaligned(),
        }
    }
}

/// Copies element by element in rising order, which matters where the ranges overlap.
///
/// # Safety
/// Both ranges are valid for `len` bytes, a multiple of `size`.
unsafe fn copy_forward(from: *const u8, to: *mut u8, len: usize, size: usize) {
    let distance = (to as usize).wrapping_sub(from as usize);
    // SAFETY: the caller's promise; `copy` allows any overlap.
    unsafe {
        if distance == 0 || distance >= len {
            std::ptr::copy(from, to, len);
        } else {
            for at in (0..len).step_by(size) {
                std::ptr::copy(from.add(at), to.add(at), size);
            }
        }
    }
}

/// Fills with copies of the low `size` bytes of `value`.
///
/// # Safety
/// The range is valid for `len` bytes, a multiple of `size`.
unsafe fn fill(to: *mut u8, len: usize, size: usize, value: u64) {
    let bytes = value.to_le_bytes();
    // SAFETY: the caller's promise.
    unsafe {
        if bytes[..size].iter().all(|b| *b == bytes[0]) {
            std::ptr::write_bytes(to, bytes[0], len);
        } else {
            for at in (0..len).step_by(size) {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.add(at), size);
            }
        }
    }
}
