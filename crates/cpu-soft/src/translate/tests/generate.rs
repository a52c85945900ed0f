//! Random instructions, alone or in sequences that share registers, and states whose memory operands are in the data.

use iced_x86::{
    Code as C, Decoder, DecoderOptions, Encoder, Instruction, InstructionInfoFactory, Mnemonic,
    OpAccess, OpKind, Register,
};

use super::rig::{BORDER, DATA, DATA_LEN, State};
use crate::state::flag;
use crate::translate::kind::{self, Way};

/// SplitMix64: the same sequence on every machine.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// A sequence made for `start`.
pub struct Sequence {
    pub bytes: Vec<u8>,
    pub text: Vec<Instruction>,
    pub start: u64,
    /// Uses FS or GS, whose bases on the host are not the guest's.
    pub segments: bool,
}

pub fn decode(bytes: &[u8], ip: u64) -> Instruction {
    Decoder::with_ip(64, bytes, ip, DecoderOptions::NONE).decode()
}

pub fn memory_operand(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) && i.mnemonic() != Mnemonic::Lea
}

pub fn string(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| matches!(i.op_kind(n), OpKind::MemorySegRSI | OpKind::MemoryESRDI))
}

/// Instructions whose result or side effect the host and a guest do not share.
fn left_out(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Rdrand | M::Rdseed | M::Rdtsc | M::Rdtscp | M::Rdpid
            // The environment holds the instruction's address.
            | M::Fnstenv | M::Fldenv | M::Fnsave | M::Frstor
            // Its own bits beside those of the guest, privileged or undefined results.
            | M::Pushfq | M::Pushf | M::Popfq | M::Popf | M::Cli | M::Sti | M::Swapgs | M::Xgetbv
            | M::Ud0 | M::Ud1 | M::Ud2
    )
}

/// Whether both sides have a way for it and it goes on with the next instruction.
fn suitable(i: &Instruction) -> bool {
    let stack = matches!(
        i.code(),
        C::Push_r64
            | C::Push_rm64
            | C::Pushq_imm8
            | C::Pushq_imm32
            | C::Pop_r64
            | C::Pop_rm64
            | C::Leaveq
            | C::Enterq_imm16_imm8
    );
    let in_rust = string(i)
        && !matches!(
            i.mnemonic(),
            Mnemonic::Insb
                | Mnemonic::Insw
                | Mnemonic::Insd
                | Mnemonic::Outsb
                | Mnemonic::Outsw
                | Mnemonic::Outsd
        )
        || matches!(i.mnemonic(), Mnemonic::Xlatb)
        || i.is_vsib()
        || matches!(
            i.code(),
            C::Ldmxcsr_m32 | C::Stmxcsr_m32 | C::VEX_Vldmxcsr_m32
        );
    let way = kind::kind(i).way;
    !i.is_invalid()
        && !left_out(i)
        && i.flow_control() == iced_x86::FlowControl::Next
        && (way == Way::Native || way == Way::Nothing || stack || in_rust)
        && !matches!(i.memory_displ_size(), 2)
}

/// Raw bytes that decode to something suitable.
pub fn instruction(random: &mut Random) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    if random.one_in(16) {
        return Some(string_instruction(random));
    }
    if random.one_in(24) {
        return locked(random);
    }
    match random.below(8) {
        0 => bytes.push(0x66),
        1 => bytes.push(0xf2),
        2 => bytes.push(0xf3),
        _ => {}
    }
    let vex = std::arch::is_x86_feature_detected!("avx2") && random.below(4) == 0;
    if vex && bytes.is_empty() {
        if random.one_in(3) {
            bytes.extend([0xc5, random.next() as u8]);
        } else {
            bytes.extend([
                0xc4,
                (random.next() as u8 & 0xe0) | (1 + random.below(3) as u8),
                random.next() as u8,
            ]);
        }
    } else {
        if random.below(3) != 0 {
            bytes.push(0x40 | random.next() as u8 & 15);
        }
        match random.below(6) {
            0..=1 => {}
            2..=3 => bytes.push(0x0f),
            4 => bytes.extend([0x0f, 0x38]),
            _ => bytes.extend([0x0f, 0x3a]),
        }
    }
    for _ in 0..15 {
        bytes.push(random.next() as u8);
    }
    finish(bytes)
}

fn string_instruction(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    match random.below(4) {
        0 => bytes.push(0xf2),
        1 | 2 => bytes.push(0xf3),
        _ => {}
    }
    if random.one_in(4) {
        bytes.push(0x66);
    }
    if random.one_in(3) {
        bytes.push(0x48);
    }
    let codes = [0xa4u8, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf];
    bytes.push(codes[random.below(10) as usize]);
    bytes
}

fn locked(random: &mut Random) -> Option<Vec<u8>> {
    let mut bytes = vec![0xf0];
    if random.one_in(4) {
        bytes.push(0x66);
    }
    bytes.push(0x40 | random.next() as u8 & 15);
    let plain = [
        0x00u8, 0x01, 0x08, 0x09, 0x10, 0x11, 0x18, 0x19, 0x20, 0x21, 0x28, 0x29, 0x30, 0x31, 0x80,
        0x81, 0x83, 0x86, 0x87, 0xf6, 0xf7, 0xfe, 0xff,
    ];
    let extended = [0xabu8, 0xb3, 0xbb, 0xba, 0xb0, 0xb1, 0xc0, 0xc1, 0xc7];
    if random.one_in(2) {
        bytes.push(plain[random.below(plain.len() as u64) as usize]);
    } else {
        bytes.push(0x0f);
        bytes.push(extended[random.below(extended.len() as u64) as usize]);
    }
    bytes.push(random.next() as u8 & 0xbf);
    for _ in 0..10 {
        bytes.push(random.next() as u8);
    }
    finish(bytes)
}

fn finish(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let i = decode(&bytes, 0);
    if !suitable(&i) {
        return None;
    }
    bytes.truncate(i.len());
    Some(bytes)
}

fn near_border(random: &mut Random) -> u64 {
    match random.below(4) {
        0 => BORDER - 64 + random.below(128),
        1 => BORDER - 16 + random.below(24),
        _ => DATA + random.below(0x100) * 16 + random.below(17),
    }
}

fn set(gpr: &mut [u64; 16], register: Register, value: u64) {
    gpr[register.full_register().number()] = value;
}

/// Registers such that the memory operands of `i`, alone, are in the data. False where that cannot be.
fn aim(i: &Instruction, state: &mut State, random: &mut Random) -> bool {
    let gpr = &mut state.gpr;
    if string(i) {
        let len = if random.one_in(4) { 200 } else { 20 };
        gpr[1] = random.below(len);
        for register in [6, 7] {
            gpr[register] = DATA - 0x400 + random.below(0x1c00);
            if random.one_in(3) {
                gpr[register] = BORDER - 40 + random.below(60);
            }
        }
        return true;
    }
    if i.mnemonic() == Mnemonic::Xlatb {
        gpr[3] = near_border(random);
        return true;
    }
    if i.code() == C::Leaveq {
        gpr[5] = near_border(random);
        return true;
    }
    if i.code() == C::Enterq_imm16_imm8 {
        gpr[5] = DATA + 0x800;
        return i.immediate16() < 0x300;
    }
    if !memory_operand(i) {
        return true;
    }
    let (base, index) = (i.memory_base(), i.memory_index());
    if base == Register::None || base.is_ip() || base.full_register() == index.full_register() {
        return false;
    }
    if bit_string(i) {
        let r = i.op1_register().full_register();
        if r == base.full_register() || r == index.full_register() || r == Register::RSP {
            return false;
        }
        gpr[r.number()] = random.below(2048).wrapping_sub(1024);
    }
    let target = near_border(random);
    let mut offset = i.memory_displacement64();
    if i.is_vsib() {
        for word in &mut state.ymm[index.number()] {
            *word &= 0x0000_0fff_0000_00ff;
            if i.mnemonic().ne(&Mnemonic::Vpgatherdd) {
                *word &= 0xff;
            }
        }
    } else if index != Register::None {
        let value = random.below(16);
        set(gpr, index, value);
        offset = offset.wrapping_add(value * u64::from(i.memory_index_scale()));
    }
    let value = target.wrapping_sub(offset);
    set(
        gpr,
        base,
        if base.size() == 4 {
            value & 0xffff_ffff
        } else {
            value
        },
    );
    true
}

fn bit_string(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
    ) && i.op1_kind() == OpKind::Register
        && i.op0_kind() == OpKind::Memory
}

/// A random state: registers of every size, flags, vectors, an x87 stack with something on it.
pub fn state(random: &mut Random) -> State {
    let mut state = State {
        gpr: [0; 16],
        rflags: random.next() & (flag::NATIVE & !flag::DF) | flag::FIXED,
        ymm: [[0; 4]; 16],
        mxcsr: 0x1f80,
        x87: crate::state::FxImage::reset().0,
        data: vec![0; DATA_LEN],
        fs: 0x100,
        gs: 0x18_0000u64.wrapping_neg(),
    };
    if random.one_in(4) {
        state.rflags |= flag::DF;
    }
    if random.one_in(8) {
        // Exceptions unmasked, flags raised, other roundings.
        state.mxcsr = random.next() as u32 & 0xffff;
    }
    for g in &mut state.gpr {
        *g = match random.below(4) {
            0 => random.below(64),
            1 => random.next() as u32 as i32 as i64 as u64,
            _ => random.next(),
        };
    }
    for w in state.ymm.as_flattened_mut() {
        *w = match random.below(4) {
            // Numbers that floating point makes something of.
            0 => f64::from(random.next() as i32).to_bits(),
            1 => u64::from((random.below(2000) as f32 - 1000.0).to_bits()) * 0x1_0000_0001,
            _ => random.next(),
        };
    }
    for chunk in state.data.chunks_mut(8) {
        chunk.copy_from_slice(&random.next().to_le_bytes());
    }
    // A few registers of the x87 stack, or MMX registers.
    let depth = random.below(8) as usize;
    let top = (8 - depth) & 7;
    state.x87[3] = (top as u8) << 3;
    for n in 0..depth {
        let at = 32 + n * 16;
        state.x87[4] |= 1 << ((top + n) & 7);
        let exponent =
            16383 - 40 + random.below(80) as u16 + if random.one_in(2) { 0x8000 } else { 0 };
        state.x87[at..at + 8].copy_from_slice(&(random.next() | 1 << 63).to_le_bytes());
        state.x87[at + 8..at + 10].copy_from_slice(&exponent.to_le_bytes());
    }
    if random.one_in(8) {
        state.x87[0] = random.next() as u8 & 0x3f | 0x40;
        state.x87[1] = random.next() as u8 & 0x0f;
    }
    state.gpr[4] = DATA + 0x800;
    if random.one_in(3) {
        // The stack may cross into the last page.
        state.gpr[4] = BORDER - 32 + random.below(64);
    }
    state
}

/// One instruction as its bytes are, with registers aimed.
pub fn alone(random: &mut Random, state: &mut State, start: u64) -> Option<Sequence> {
    let mut bytes = instruction(random)?;
    let i = decode(&bytes, start);
    let segments = segment_prefix(&i);
    if memory_operand(&i) && i.is_ip_rel_memory_operand() {
        if i.memory_base() == Register::EIP {
            return None;
        }
        let mut decoder = Decoder::with_ip(64, &bytes, start, DecoderOptions::NONE);
        let offsets = {
            let again = decoder.decode();
            decoder.get_constant_offsets(&again)
        };
        let to = near_border(random).wrapping_sub(if segments { segment(state, &i) } else { 0 });
        let displacement = to.wrapping_sub(i.next_ip()) as u32;
        bytes[offsets.displacement_offset()..][..4].copy_from_slice(&displacement.to_le_bytes());
    } else {
        if !aim(&i, state, random) {
            return None;
        }
        if segments && memory_operand(&i) {
            let base = i.memory_base();
            let n = base.full_register().number();
            let at = state.gpr[n].wrapping_sub(segment(state, &i));
            state.gpr[n] = if base.size() == 4 {
                at & 0xffff_ffff
            } else {
                at
            };
        } else if segments {
            return None;
        }
    }
    let i = decode(&bytes, start);
    if splits_lock(&i, state) && !random.one_in(64) {
        return None;
    }
    Some(Sequence {
        bytes,
        text: vec![i],
        start,
        segments,
    })
}

fn segment_prefix(i: &Instruction) -> bool {
    matches!(i.segment_prefix(), Register::FS | Register::GS)
}

fn segment(state: &State, i: &Instruction) -> u64 {
    if i.memory_segment() == Register::FS {
        state.fs
    } else {
        state.gs
    }
}

/// Whether a locked access, with these registers, lies in two cache lines. Those stay rare: Linux makes a program that does
/// it sleep each time (`split_lock_mitigate`).
fn splits_lock(i: &Instruction, state: &State) -> bool {
    let locked = i.has_lock_prefix() || i.mnemonic() == Mnemonic::Xchg;
    if !locked || !memory_operand(i) {
        return false;
    }
    let value = |register: Register, _: usize, _: usize| {
        Some(match register {
            Register::FS => state.fs,
            Register::GS => state.gs,
            r if r.is_segment_register() => 0,
            r => state.gpr[r.full_register().number()],
        })
    };
    let operand = u32::from(i.op0_kind() != OpKind::Memory);
    let at = i.virtual_address(operand, 0, value);
    at.is_some_and(|at| (at & 63) + i.memory_size().size() as u64 > 64)
}

/// A few instructions whose memory operands all go by two registers that nothing in the sequence writes, by rsp or by rip;
/// with conditional jumps between them, and now and then in a loop.
pub fn sequence(random: &mut Random, state: &mut State, start: u64) -> Option<Sequence> {
    const NAMES: [Register; 16] = [
        Register::RAX,
        Register::RCX,
        Register::RDX,
        Register::RBX,
        Register::RSP,
        Register::RBP,
        Register::RSI,
        Register::RDI,
        Register::R8,
        Register::R9,
        Register::R10,
        Register::R11,
        Register::R12,
        Register::R13,
        Register::R14,
        Register::R15,
    ];
    let mut free: Vec<usize> = (0..16).filter(|n| *n != 4).collect();
    let mut take = |random: &mut Random| free.swap_remove(random.below(free.len() as u64) as usize);
    let bases = [take(random), take(random)];
    let index = take(random);
    let counter = take(random);
    let mut held = vec![bases[0], bases[1], index, counter];
    let at = near_border(random);
    state.gpr[bases[0]] = at;
    state.gpr[bases[1]] = if random.one_in(2) {
        at.wrapping_add(random.below(64))
    } else {
        near_border(random)
    };
    state.gpr[index] = random.below(16);
    let strings = random.one_in(8);
    if strings && !held.iter().any(|n| matches!(n, 1 | 6 | 7)) {
        held.extend([1, 6, 7]);
        state.gpr[1] = random.below(24);
        state.gpr[6] = DATA + random.below(0x1200);
        state.gpr[7] = DATA + random.below(0x1200);
    }
    let mut sequence = Sequence {
        bytes: Vec::new(),
        text: Vec::new(),
        start,
        segments: false,
    };
    let mut factory = InstructionInfoFactory::new();
    let looped = random.one_in(5);
    if looped {
        state.gpr[counter] = 1 + random.below(3);
    }
    let count = 1 + random.below(8) as usize;
    let mut tries = 0;
    let mut made = 0;
    while made < count {
        tries += 1;
        if tries > 4000 {
            return None;
        }
        let ip = start + sequence.bytes.len() as u64;
        let Some(mut bytes) = instruction(random) else {
            continue;
        };
        let mut i = decode(&bytes, ip);
        if i.is_vsib()
            || i.mnemonic() == Mnemonic::Enter
            || i.code() == C::Leaveq
            || i.mnemonic() == Mnemonic::Xlatb
            || (string(&i) && !(held.len() > 4 && made + 1 == count && !looped))
        {
            continue;
        }
        if memory_operand(&i) {
            // Stack operations by memory come alone.
            if matches!(i.mnemonic(), Mnemonic::Pop | Mnemonic::Push) {
                continue;
            }
            if bit_string(&i) {
                let size = i.op1_register().size();
                let name = NAMES[index];
                let name = match size {
                    8 => name,
                    4 => name.full_register32(),
                    _ => continue,
                };
                i.set_op1_register(name);
            }
            let with_index = random.one_in(4);
            match random.below(8) {
                0 => {
                    i.set_memory_base(Register::RIP);
                    i.set_memory_index(Register::None);
                    i.set_memory_displacement64(near_border(random));
                    i.set_memory_displ_size(8);
                }
                n => {
                    let base = if n == 1 {
                        Register::RSP
                    } else {
                        NAMES[bases[(n % 2) as usize]]
                    };
                    i.set_memory_base(base);
                    i.set_memory_index(if with_index {
                        NAMES[index]
                    } else {
                        Register::None
                    });
                    i.set_memory_index_scale(if with_index { 1 << random.below(4) } else { 1 });
                    let displacement = match random.below(3) {
                        0 => 0,
                        1 => random.below(8) * 8,
                        _ => random.below(160).wrapping_sub(64),
                    };
                    i.set_memory_displacement64(displacement);
                    i.set_memory_displ_size(if displacement == 0 { 0 } else { 8 });
                }
            }
            i.set_segment_prefix(Register::None);
            if random.one_in(10)
                && !i.is_ip_rel_memory_operand()
                && i.memory_base() != Register::RSP
            {
                i.set_segment_prefix(if random.one_in(2) {
                    Register::FS
                } else {
                    Register::GS
                });
                let moved = i.memory_displacement64().wrapping_sub(segment(state, &i));
                if i32::try_from(moved as i64).is_err() {
                    continue;
                }
                i.set_memory_displacement64(moved);
                i.set_memory_displ_size(8);
            }
            match i.code() {
                C::Mov_AL_moffs8
                | C::Mov_AX_moffs16
                | C::Mov_EAX_moffs32
                | C::Mov_RAX_moffs64
                | C::Mov_moffs8_AL
                | C::Mov_moffs16_AX
                | C::Mov_moffs32_EAX
                | C::Mov_moffs64_RAX => continue,
                _ => {}
            }
            let mut encoder = Encoder::new(64);
            if encoder.encode(&i, ip).is_err() {
                continue;
            }
            bytes = encoder.take_buffer();
            i = decode(&bytes, ip);
            if i.is_invalid() {
                continue;
            }
        }
        if splits_lock(&i, state) && !random.one_in(64) {
            continue;
        }
        let stack = matches!(i.mnemonic(), Mnemonic::Push | Mnemonic::Pop);
        let writes_held = factory.info(&i).used_registers().iter().any(|used| {
            let writes = matches!(
                used.access(),
                OpAccess::Write
                    | OpAccess::ReadWrite
                    | OpAccess::CondWrite
                    | OpAccess::ReadCondWrite
            );
            let r = used.register().full_register();
            writes && r.is_gpr64() && (held.contains(&r.number()) || (r == Register::RSP && !stack))
        });
        // (A string instruction is the last one and may move what is held.)
        if (writes_held && !string(&i)) || (segment_prefix(&i) && !memory_operand(&i)) {
            continue;
        }
        sequence.segments |= segment_prefix(&i);
        if made + 1 < count && random.one_in(4) {
            // A conditional jump over it.
            i.set_ip(ip + 2);
            if i.is_ip_rel_memory_operand() {
                let mut encoder = Encoder::new(64);
                if encoder.encode(&i, ip + 2).is_err() {
                    return None;
                }
                bytes = encoder.take_buffer();
            }
            i = decode(&bytes, ip + 2);
            let jump = [0x70 | random.below(16) as u8, bytes.len() as u8];
            sequence.text.push(decode(&jump, ip));
            sequence.bytes.extend(jump);
        }
        sequence.bytes.extend(&bytes);
        sequence.text.push(i);
        made += 1;
    }
    if looped {
        // sub counter, 1; jnz start
        let ip = start + sequence.bytes.len() as u64;
        let high = u8::from(counter >= 8);
        let subtract = [0x48 | high, 0x83, 0xe8 | counter as u8 & 7, 1];
        let back = -(sequence.bytes.len() as i64 + 6);
        sequence.text.push(decode(&subtract, ip));
        sequence.bytes.extend(subtract);
        let mut jump = Vec::from([0x75u8, back as u8]);
        if back < -128 {
            jump = Vec::from([0x0f, 0x85]);
            jump.extend((back as i32 - 4).to_le_bytes());
        }
        sequence.text.push(decode(&jump, ip + 4));
        sequence.bytes.extend(jump);
    }
    Some(sequence)
}
