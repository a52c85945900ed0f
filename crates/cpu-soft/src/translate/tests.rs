//! Random instructions, run by the host itself between a state-load and a state-save, and by the translator: registers,
//! flags, vectors and memory must agree. Guest RAM lies at the same address for both.

use std::collections::BTreeSet;
use std::sync::Arc;

use cpu::{CpuModel, GuestMemory, Vm, VmConfig};
use iced_x86::{Code as C, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

use super::emit::{Code, Mem};
use super::kind::{self, Way};
use super::{GPR, leave};
use crate::host::Guard;
use crate::state::flag;
use crate::stubs;
use crate::vcpu::SoftVcpu;

const BASE: u64 = 0x4000_0000;
const SIZE: usize = 1 << 20;
/// Guest code, and the page where everything ends.
const CODE: u64 = BASE + 0x1_0000;
const END: u64 = BASE + 0x2_0000;
/// Data: two pages, accesses around the border between them.
const DATA: u64 = BASE + 0x4_0000;

struct Rig {
    vcpu: SoftVcpu,
    memory: *mut u8,
    native: u64,
}

fn rig(at: u64) -> Option<Rig> {
    // SAFETY: a new mapping at an address that is refused when taken.
    let memory = unsafe {
        libc::mmap(
            at as *mut _,
            SIZE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    if memory as u64 != at {
        eprintln!("SKIPPED: the test's fixed address is taken");
        return None;
    }
    // SAFETY: the mapping just made, never unmapped.
    let region = unsafe {
        MmapRegion::build_raw(
            memory.cast(),
            SIZE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE,
        )
    }
    .ok()?;
    let region = GuestRegionMmap::new(region, GuestAddress(BASE))?;
    let memory_map = GuestMemory::from_regions(vec![region]).ok()?;
    let vm = crate::SoftVm::new(&VmConfig {
        vcpus: 1,
        model: CpuModel::Max,
        code_cache: 16 << 20,
    })
    .ok()?;
    vm.set_memory(Arc::new(memory_map)).ok()?;
    let mut vcpu = vm.make(0).ok()?;
    let cpu = vcpu.cpu();
    cpu.efer = 0x500;
    cpu.segments[crate::state::CS].attributes = 1 << 13;
    Some(Rig {
        vcpu,
        memory: memory.cast(),
        native: 0,
    })
}

/// SplitMix64: the same sequence on every machine.
struct Random(u64);

/// RFLAGS bits of iced's flags.
fn architectural(bits: u32) -> u64 {
    use iced_x86::RflagsBits as B;
    [
        (B::CF, flag::CF),
        (B::PF, flag::PF),
        (B::AF, flag::AF),
        (B::ZF, flag::ZF),
        (B::SF, flag::SF),
        (B::OF, flag::OF),
    ]
    .iter()
    .filter(|(b, _)| bits & b != 0)
    .map(|(_, f)| f)
    .sum()
}

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// A random instruction that the translator has a way for, without control flow, as bytes.
fn generate(random: &mut Random) -> Option<(Vec<u8>, Instruction)> {
    let mut bytes = Vec::new();
    match random.below(8) {
        0 => bytes.push(0x66),
        1 => bytes.push(0xf2),
        2 => bytes.push(0xf3),
        3 if random.below(4) == 0 => bytes.push(0xf0),
        _ => {}
    }
    let vex = std::arch::is_x86_feature_detected!("avx2") && random.below(6) == 0;
    if vex && bytes.is_empty() {
        bytes.extend([
            0xc4,
            (random.next() as u8 & 0xe0) | (1 + random.below(3) as u8),
            random.next() as u8,
        ]);
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
    let mut decoder = Decoder::with_ip(64, &bytes, CODE, DecoderOptions::NONE);
    let i = decoder.decode();
    if i.is_invalid() || i.len() > 15 {
        return None;
    }
    let k = kind::kind(&i);
    let stack = matches!(
        i.code(),
        C::Push_r64 | C::Push_rm64 | C::Pushq_imm8 | C::Pushq_imm32 | C::Pop_r64 | C::Pop_rm64
    );
    if k.way != Way::Native && !stack {
        return None;
    }
    // Left out: random numbers, other registers of the x87 unit's environment, waiting exceptions, absolute addresses.
    if matches!(
        i.mnemonic(),
        Mnemonic::Rdrand
            | Mnemonic::Rdseed
            | Mnemonic::Fnstenv
            | Mnemonic::Fldenv
            | Mnemonic::Fnsave
            | Mnemonic::Frstor
            | Mnemonic::Fldcw
    ) {
        return None;
    }
    if i.memory_displ_size() == 8 || matches!(i.memory_segment(), Register::FS | Register::GS) {
        return None;
    }
    if matches!(i.memory_base(), Register::RIP | Register::EIP) && i.mnemonic() != Mnemonic::Lea {
        // Towards the data.
        let offsets = decoder.get_constant_offsets(&i);
        let displacement = (DATA + 0xfe0 + random.below(64)).wrapping_sub(i.next_ip()) as u32;
        bytes[offsets.displacement_offset()..][..4].copy_from_slice(&displacement.to_le_bytes());
    }
    bytes.truncate(i.len());
    let i = Decoder::with_ip(64, &bytes, CODE, DecoderOptions::NONE).decode();
    Some((bytes, i))
}

/// Registers such that the memory operands of `i` are in the data. False where that cannot be.
fn aim(i: &Instruction, gpr: &mut [u64; 16], random: &mut Random) -> bool {
    gpr[4] = DATA + 0x800;
    let has_memory =
        (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) && i.mnemonic() != Mnemonic::Lea;
    if !has_memory {
        return true;
    }
    let (base, index) = (i.memory_base(), i.memory_index());
    if matches!(base, Register::RIP | Register::EIP) {
        return true;
    }
    if base == Register::None || base.full_register() == index.full_register() {
        return false;
    }
    if matches!(
        i.mnemonic(),
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
    ) && i.op1_kind() == OpKind::Register
    {
        let r = i.op1_register().full_register();
        if r == base.full_register() || r == index.full_register() || r == Register::RSP {
            return false;
        }
        gpr[r.number()] = random.below(2048).wrapping_sub(1024);
    }
    let target = DATA
        + if random.below(4) == 0 {
            0xfc0 + random.below(64)
        } else {
            random.below(0x100) * 16 + random.below(17)
        };
    let mut offset = i.memory_displacement64();
    if index != Register::None {
        let value = if index.full_register() == Register::RSP {
            return false;
        } else {
            random.below(16)
        };
        gpr[index.full_register().number()] = value;
        offset = offset.wrapping_add(value * u64::from(i.memory_index_scale()));
    }
    let value = target.wrapping_sub(offset);
    gpr[base.full_register().number()] = if base.size() == 4 {
        value & 0xffff_ffff
    } else {
        value
    };
    true
}

#[derive(Clone, PartialEq)]
struct State {
    gpr: [u64; 16],
    rflags: u64,
    ymm: [[u64; 4]; 16],
    mxcsr: u32,
    data: Vec<u8>,
    trapped: bool,
}

impl Rig {
    fn set(&mut self, state: &State) {
        let cpu = self.vcpu.cpu();
        cpu.gpr = state.gpr;
        cpu.rflags = state.rflags;
        cpu.ymm = state.ymm;
        cpu.mxcsr = state.mxcsr;
        cpu.rip = CODE;
        cpu.bounce.len = 0;
        // SAFETY: inside the mapping; no other thread uses it.
        unsafe {
            std::ptr::copy_nonoverlapping(
                state.data.as_ptr(),
                self.memory.add((DATA - 0x1000 - BASE) as usize),
                state.data.len(),
            )
        };
        self.vcpu.cpu().x87 = crate::state::FxImage::reset();
        self.vcpu.cpu().x87_load();
    }

    fn get(&mut self, trapped: bool) -> State {
        let cpu = self.vcpu.cpu();
        let mut data = vec![0u8; 0x3000];
        // SAFETY: as in `set`.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.memory.add((DATA - 0x1000 - BASE) as usize),
                data.as_mut_ptr(),
                data.len(),
            )
        };
        State {
            gpr: cpu.gpr,
            rflags: cpu.rflags & flag::NATIVE,
            ymm: cpu.ymm,
            mxcsr: cpu.mxcsr,
            data,
            trapped,
        }
    }

    fn natively(&mut self, bytes: &[u8], state: &State) -> State {
        self.set(state);
        let (stubs, origin) = self.vcpu.cpu().workbench();
        let mut code = Code::new(origin);
        for r in [10u8, 11] {
            code.load(r, Mem::gs(GPR + usize::from(r) * 8));
        }
        code.raw(bytes);
        for r in [10u8, 11] {
            code.store(Mem::gs(GPR + usize::from(r) * 8), r);
        }
        let lea = code.lea_r11_rip();
        code.jmp_to(stubs.exit);
        code.bind(lea);
        code.u32(leave::TARGET);
        code.u32(0);
        self.vcpu.cpu().append_raw(&code.bytes);
        self.native = origin;
        // SAFETY: the guard of the test set GS; the code was just written and leaves by the exit stub.
        let left = unsafe { stubs::enter(&stubs, origin) };
        self.get(left == stubs::TRAPPED)
    }

    fn translated(&mut self, bytes: &[u8], state: &State, single: bool) -> State {
        self.set(state);
        // SAFETY: inside the mapping.
        unsafe {
            let at = self.memory.add((CODE - BASE) as usize);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len());
            // jmp END
            let jump = END.wrapping_sub(CODE + bytes.len() as u64 + 5) as u32;
            at.add(bytes.len()).write(0xe9);
            at.add(bytes.len() + 1).cast::<u32>().write_unaligned(jump);
        }
        let cpu = self.vcpu.cpu();
        cpu.note_store(CODE, 0);
        let trapped = cpu.run_to(END, single);
        self.get(trapped)
    }
}

fn difference(a: &State, b: &State) -> Option<String> {
    if a.trapped || b.trapped {
        return (a.trapped != b.trapped)
            .then(|| format!("trapped natively {}, translated {}", a.trapped, b.trapped));
    }
    for n in 0..16 {
        if a.gpr[n] != b.gpr[n] {
            return Some(format!(
                "register {n}: natively {:x}, translated {:x}",
                a.gpr[n], b.gpr[n]
            ));
        }
        if a.ymm[n] != b.ymm[n] {
            return Some(format!(
                "ymm{n}: natively {:x?}, translated {:x?}",
                a.ymm[n], b.ymm[n]
            ));
        }
    }
    if a.rflags != b.rflags {
        return Some(format!(
            "flags: natively {:x}, translated {:x}",
            a.rflags, b.rflags
        ));
    }
    if a.mxcsr != b.mxcsr {
        return Some(format!(
            "mxcsr: natively {:x}, translated {:x}",
            a.mxcsr, b.mxcsr
        ));
    }
    let at = (0..a.data.len()).find(|n| a.data[*n] != b.data[*n])?;
    Some(format!(
        "memory at {:x}: natively {:x?}, translated {:x?}",
        at,
        &a.data[at..(at + 8).min(0x3000)],
        &b.data[at..(at + 8).min(0x3000)]
    ))
}

fn random_state(random: &mut Random) -> State {
    let mut state = State {
        gpr: [0; 16],
        rflags: random.next() & (flag::NATIVE & !flag::DF) | 2,
        ymm: [[0; 4]; 16],
        mxcsr: 0x1f80,
        data: vec![0; 0x3000],
        trapped: false,
    };
    for g in &mut state.gpr {
        *g = match random.below(4) {
            0 => random.below(64),
            1 => random.next() as u32 as i32 as i64 as u64,
            _ => random.next(),
        };
    }
    for r in &mut state.ymm {
        for w in r {
            *w = random.next();
        }
    }
    for chunk in state.data.chunks_mut(8) {
        chunk.copy_from_slice(&random.next().to_le_bytes());
    }
    state
}

#[test]
fn translated_instructions_do_what_the_host_does() {
    let Some(mut rig) = rig(BASE) else { return };
    let (frame, range, fault) = rig.vcpu.cpu().place_of_code();
    let _guard = Guard::new(frame, range, fault).expect("guard");
    let seed = std::env::var("BERTH_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(1u64);
    let rounds: u64 = std::env::var("BERTH_ROUNDS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(40_000);
    let mut random = Random(seed);
    let mut covered = BTreeSet::new();
    let (mut ran, mut trapped) = (0u64, 0u64);
    while ran < rounds {
        // One instruction alone, or a few in one block that share registers.
        let count = if random.below(2) == 0 {
            1
        } else {
            2 + random.below(6)
        };
        let mut state = random_state(&mut random);
        let mut bytes = Vec::new();
        let mut text = Vec::new();
        let mut memory = false;
        while text.len() < count as usize {
            let Some((b, i)) = generate(&mut random) else {
                continue;
            };
            if !rig.vcpu.cpu().system.cpuid.offers(&i) {
                continue;
            }
            let touches = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
                && i.mnemonic() != Mnemonic::Lea;
            let stack = matches!(i.mnemonic(), Mnemonic::Push | Mnemonic::Pop);
            if touches || stack {
                // Only one access by computed address, first, so that its registers are as aimed.
                if memory
                    || !text.is_empty()
                    || (touches && i.memory_base() == Register::RIP && count > 1)
                {
                    continue;
                }
                memory = true;
            }
            if !aim(&i, &mut state.gpr, &mut random) {
                memory = false;
                continue;
            }
            if text.is_empty() || !touches {
                bytes.extend(b);
                covered.insert(i.code());
                text.push(i);
            }
        }
        // Flags that the architecture leaves undefined are left out, and sequences that use them.
        let mut undefined = 0u32;
        let mut uses = false;
        for i in &text {
            // (A count that may be zero leaves flags alone: as if it used them.)
            uses |= (i.rflags_read() | kind::flags(i).0) & undefined != 0;
            undefined &= !(i.rflags_written() | i.rflags_cleared() | i.rflags_set());
            undefined |= i.rflags_undefined();
            if matches!(i.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) {
                // A count that is a whole turn: processors differ in OF.
                undefined |= iced_x86::RflagsBits::OF;
            }
        }
        if uses {
            continue;
        }
        // Relative displacements were made for the first place.
        let native = rig.natively_at(&bytes, &text, &state);
        let Some(mut native) = native else { continue };
        ran += 1;
        trapped += u64::from(native.trapped);
        let single = random.below(2) == 0;
        let mut translated = rig.translated(&bytes, &state, single);
        let defined = !architectural(undefined);
        native.rflags &= defined;
        translated.rflags &= defined;
        if native.trapped && count > 1 {
            continue;
        }
        if let Some(what) = difference(&native, &translated) {
            let lines: Vec<String> = text.iter().map(|i| format!("{i}")).collect();
            panic!(
                "{what}\n  {}\n  bytes {bytes:02x?} single {single}\n  gpr {:x?} flags {:x}",
                lines.join("; "),
                state.gpr,
                state.rflags
            );
        }
    }
    eprintln!(
        "{ran} sequences, {trapped} trapped, {} instruction codes covered",
        covered.len()
    );
}

impl Rig {
    /// RIP-relative instructions only make sense at their place: those run on the host from guest memory's address as data.
    fn natively_at(&mut self, bytes: &[u8], text: &[Instruction], state: &State) -> Option<State> {
        let relative = text
            .iter()
            .any(|i| matches!(i.memory_base(), Register::RIP | Register::EIP));
        if relative {
            // The displacement is moved by as much as the code is.
            if text.len() > 1 {
                return None;
            }
            let i = &text[0];
            if i.mnemonic() == Mnemonic::Lea {
                return None;
            }
            let mut bytes = bytes.to_vec();
            let mut decoder = Decoder::with_ip(64, &bytes, CODE, DecoderOptions::NONE);
            let again = decoder.decode();
            let offsets = decoder.get_constant_offsets(&again);
            let (_, origin) = self.vcpu.cpu().workbench();
            // Two loads of 9 bytes precede it.
            let delta = (CODE as i64).wrapping_sub(origin as i64 + 18);
            let displacement = i64::from(i32::from_le_bytes(
                bytes[offsets.displacement_offset()..][..4]
                    .try_into()
                    .ok()?,
            )) + delta;
            let displacement = i32::try_from(displacement).ok()?;
            bytes[offsets.displacement_offset()..][..4]
                .copy_from_slice(&displacement.to_le_bytes());
            return Some(self.natively(&bytes, state));
        }
        Some(self.natively(bytes, state))
    }
}
