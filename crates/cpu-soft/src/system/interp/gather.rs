//! Vector instructions whose memory operand is many: gathers and masked moves (AVX, AVX2, SSE2).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::operand::{self, mask, sign_extend};
use crate::state::{Cpu, Fault, Flow, Rights};
use crate::system::segment;

fn vector_index(register: Register) -> (usize, usize) {
    if register.is_ymm() {
        (register as usize - Register::YMM0 as usize, 32)
    } else {
        (register as usize - Register::XMM0 as usize, 16)
    }
}

fn bytes_of(cpu: &Cpu, index: usize) -> [u8; 32] {
    let mut bytes = [0u8; 32];
    for (slot, word) in bytes.chunks_exact_mut(8).zip(cpu.ymm[index]) {
        slot.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn set_bytes(cpu: &mut Cpu, index: usize, bytes: &[u8; 32]) {
    for (word, slot) in cpu.ymm[index].iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes([
            slot[0], slot[1], slot[2], slot[3], slot[4], slot[5], slot[6], slot[7],
        ]);
    }
}

fn element(bytes: &[u8; 32], at: usize, size: usize) -> u64 {
    let mut word = [0u8; 8];
    word[..size].copy_from_slice(&bytes[at * size..][..size]);
    u64::from_le_bytes(word)
}

/// VGATHER and VPGATHER (SDM vol. 2, VPGATHERDD): elements whose mask's top bit is set are loaded, and their mask
/// cleared, one after the other, so that a fault leaves a state from which it goes on.
pub fn execute(cpu: &mut Cpu, i: &Instruction) -> Result<Option<Flow>, Fault> {
    use Mnemonic as M;
    let (index_size, data_size) = match i.mnemonic() {
        M::Vgatherdps | M::Vpgatherdd => (4, 4),
        M::Vgatherdpd | M::Vpgatherdq => (4, 8),
        M::Vgatherqps | M::Vpgatherqd => (8, 4),
        M::Vgatherqpd | M::Vpgatherqq => (8, 8),
        _ => return Ok(None),
    };
    let (destination, width) = vector_index(i.op0_register());
    let (indexes, index_width) = vector_index(i.memory_index());
    let (masks, _) = vector_index(i.op2_register());
    if destination == indexes || destination == masks || indexes == masks {
        return Err(Fault::UD);
    }
    let count = (width / data_size).min(index_width / index_size);
    let index_bytes = bytes_of(cpu, indexes);
    let base = if i.memory_base() == Register::None {
        0
    } else {
        operand::read_register(cpu, i.memory_base())
    };
    let base = base.wrapping_add(i.memory_displacement64());
    let address = if i.memory_base() == Register::None {
        8
    } else {
        operand::address_size(i)
    };
    for n in 0..count {
        let mut mask_bytes = bytes_of(cpu, masks);
        if mask_bytes[(n + 1) * data_size - 1] & 0x80 != 0 {
            let index = sign_extend(element(&index_bytes, n, index_size), index_size);
            let offset = base.wrapping_add(index.wrapping_mul(u64::from(i.memory_index_scale())))
                & mask(address);
            let at = segment::linear(cpu, operand::memory_segment(i), offset, data_size, false)?;
            let value = operand::load(cpu, at, data_size)?;
            let mut data = bytes_of(cpu, destination);
            data[n * data_size..][..data_size].copy_from_slice(&value.to_le_bytes()[..data_size]);
            set_bytes(cpu, destination, &data);
        }
        mask_bytes[n * data_size..][..data_size].fill(0);
        set_bytes(cpu, masks, &mask_bytes);
    }
    cpu.ymm[masks] = [0; 4];
    // What lies above the elements is cleared.
    let mut data = bytes_of(cpu, destination);
    data[count * data_size..].fill(0);
    set_bytes(cpu, destination, &data);
    cpu.rip = i.next_ip();
    Ok(Some(Flow::Continue))
}

/// MASKMOVDQU and VMASKMOVDQU: bytes whose mask's top bit is set are stored at RDI.
pub fn masked_store(cpu: &mut Cpu, i: &Instruction) -> Result<Option<Flow>, Fault> {
    if !matches!(i.mnemonic(), Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu) {
        return Ok(None);
    }
    let width = match i.op0_kind() {
        OpKind::MemorySegDI => 2,
        OpKind::MemorySegEDI => 4,
        _ => 8,
    };
    let offset = cpu.gpr[cpu::x86::RDI] & mask(width);
    let at = segment::linear(cpu, operand::memory_segment(i), offset, 16, true)?;
    let data = bytes_of(cpu, vector_index(i.op1_register()).0);
    let masks = bytes_of(cpu, vector_index(i.op2_register()).0);
    store_selected(cpu, at, 1, 16, &data, &masks)?;
    cpu.rip = i.next_ip();
    Ok(Some(Flow::Continue))
}

/// VMASKMOVPS/PD and VPMASKMOVD/Q: only selected elements are touched, so only they can fault.
pub fn masked_move(
    cpu: &mut Cpu,
    i: &Instruction,
    at: u64,
    len: usize,
) -> Result<Option<Flow>, Fault> {
    use Mnemonic as M;
    let size = match i.mnemonic() {
        M::Vmaskmovps | M::Vpmaskmovd => 4,
        M::Vmaskmovpd | M::Vpmaskmovq => 8,
        _ => return Ok(None),
    };
    if i.op0_kind() == OpKind::Memory {
        let masks = bytes_of(cpu, vector_index(i.op1_register()).0);
        let data = bytes_of(cpu, vector_index(i.op2_register()).0);
        store_selected(cpu, at, size, len, &data, &masks)?;
    } else {
        let masks = bytes_of(cpu, vector_index(i.op1_register()).0);
        let mut data = [0u8; 32];
        for n in 0..len / size {
            if masks[(n + 1) * size - 1] & 0x80 != 0 {
                let value = operand::load(cpu, at.wrapping_add((n * size) as u64), size)?;
                data[n * size..][..size].copy_from_slice(&value.to_le_bytes()[..size]);
            }
        }
        set_bytes(cpu, vector_index(i.op0_register()).0, &data);
    }
    cpu.rip = i.next_ip();
    Ok(Some(Flow::Continue))
}

fn store_selected(
    cpu: &mut Cpu,
    at: u64,
    size: usize,
    len: usize,
    data: &[u8; 32],
    masks: &[u8; 32],
) -> Result<(), Fault> {
    let selected = |n: usize| masks[(n + 1) * size - 1] & 0x80 != 0;
    for n in (0..len / size).filter(|n| selected(*n)) {
        cpu.write_probe(at.wrapping_add((n * size) as u64), size, Rights::Current)?;
    }
    for n in (0..len / size).filter(|n| selected(*n)) {
        operand::store(
            cpu,
            at.wrapping_add((n * size) as u64),
            size,
            element(data, n, size),
        )?;
    }
    Ok(())
}
