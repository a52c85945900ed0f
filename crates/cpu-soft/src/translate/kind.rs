//! What the translator does with each instruction code: decided once per code, by what iced-x86 knows of it.

use std::sync::OnceLock;

use iced_x86::{
    Code, CpuidFeature, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind,
};

/// How an instruction is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By the host's own instruction, memory operand replaced.
    Native,
    /// By [`crate::system::execute`].
    Rust,
    /// Nothing to do: hints.
    Nothing,
    /// The translator has a case of its own.
    Own,
    /// REP MOVS or REP STOS: in place inside a page, else in Rust.
    Repeat,
}

/// Facts of one instruction code.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    pub way: Way,
    /// The memory operand is written.
    pub writes: bool,
    /// The memory operand is read.
    pub reads: bool,
    /// Bit n: register operand n is written.
    pub register_writes: u8,
    /// Bit n: general register n is written without being an operand.
    pub implicit_writes: u16,
    /// May raise an exception by itself on the host: division, aligned vector access, floating point.
    pub traps: bool,
    /// Uses x87, MMX, SSE or AVX state.
    pub fpu: bool,
    /// VEX-encoded with vector operands: needs XCR0's leave.
    pub avx: bool,
    /// Exists only where CPUID shows a feature that not every x86-64 has.
    pub extended: bool,
    /// Only ring 0 has a native form of it.
    pub ring0: bool,
}

/// Facts of `instruction`'s code.
pub fn kind(instruction: &Instruction) -> Kind {
    static TABLE: OnceLock<Vec<OnceLock<Kind>>> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        (0..Code::values().len() * 2)
            .map(|_| OnceLock::new())
            .collect()
    });
    // Codes with a register-or-memory operand have facts of both forms; iced gives operand 0 or 1 of them.
    let memory = has_memory(instruction);
    *table[instruction.code() as usize * 2 + usize::from(memory)]
        .get_or_init(|| classify(instruction))
}

fn has_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
}

/// Whether the instruction reads or writes the memory its operand names.
pub fn touches(i: &Instruction) -> bool {
    has_memory(i) && i.mnemonic() != Mnemonic::Lea
}

/// Whether the access to memory is atomic.
pub fn locked(i: &Instruction) -> bool {
    i.has_lock_prefix() || (i.mnemonic() == Mnemonic::Xchg && has_memory(i))
}

/// `BT [memory], register` and its kin address bits beyond the operand.
pub fn bit_string(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
    ) && i.op1_kind() == OpKind::Register
        && i.op0_kind() == OpKind::Memory
}

/// Whether operand `n` is an immediate.
pub fn immediate(i: &Instruction, n: u32) -> bool {
    n < i.op_count() && i.try_immediate(n).is_ok()
}

/// Whether general register `base` (64 bits) is written.
pub fn writes(i: &Instruction, kind: &Kind, base: iced_x86::Register) -> bool {
    kind.implicit_writes >> base.number() & 1 != 0
        || (0..i.op_count()).any(|n| {
            kind.register_writes >> n & 1 != 0
                && i.op_kind(n) == OpKind::Register
                && i.op_register(n).full_register() == base
        })
}

fn allowed(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    match feature {
        INTEL8086 | INTEL8086_ONLY | INTEL186 | INTEL286 | INTEL386 | INTEL486 | X64 | CMOV
        | FPU | FPU287 | FPU387 | MMX | SSE | SSE2 | SSE3 | SSSE3 | SSE4_1 | SSE4_2 | POPCNT
        | PCLMULQDQ | AES | CX8 | CMPXCHG16B | LZCNT | MOVBE | FXSR | TSC | RDTSCP | CLFSH
        | PAUSE | MULTIBYTENOP | PREFETCHW | SHA | ADX | RDRAND | RDSEED | CET_IBT | CLFLUSHOPT
        | CLWB => true,
        AVX | AVX2 | BMI1 | BMI2 | FMA | F16C | VAES | VPCLMULQDQ => {
            std::arch::is_x86_feature_detected!("avx2")
        }
        _ => false,
    }
}

fn classify(instruction: &Instruction) -> Kind {
    let mut kind = Kind {
        way: Way::Native,
        writes: false,
        reads: false,
        register_writes: 0,
        implicit_writes: 0,
        traps: false,
        fpu: false,
        avx: false,
        extended: false,
        ring0: false,
    };
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    let mut memory = false;
    for n in 0..instruction.op_count() {
        let access = info.op_access(n);
        let writes = matches!(
            access,
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        );
        let reads = matches!(
            access,
            OpAccess::Read | OpAccess::CondRead | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        );
        if instruction.op_kind(n) == OpKind::Memory {
            memory = true;
            kind.writes = writes;
            kind.reads = reads || matches!(access, OpAccess::CondWrite);
        } else if writes {
            kind.register_writes |= 1 << n;
        }
    }
    for used in info.used_registers() {
        let register = used.register().full_register();
        let writes = !matches!(
            used.access(),
            OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess | OpAccess::None
        );
        let operand = (0..instruction.op_count()).any(|n| {
            kind.register_writes >> n & 1 != 0
                && instruction.op_kind(n) == OpKind::Register
                && instruction.op_register(n).full_register() == register
        });
        if writes && !operand && register.is_gpr64() {
            kind.implicit_writes |= 1 << register.number();
        }
    }
    if matches!(
        instruction.mnemonic(),
        Mnemonic::Mul
            | Mnemonic::Imul
            | Mnemonic::Div
            | Mnemonic::Idiv
            | Mnemonic::Cmpxchg
            | Mnemonic::Cmpxchg8b
            | Mnemonic::Cmpxchg16b
    ) {
        // rax and rdx, which may have been operands of the instruction looked at.
        kind.implicit_writes |= 0b0101;
    }
    let features = instruction.cpuid_features();
    kind.fpu = features.iter().any(|f| {
        use CpuidFeature::*;
        matches!(
            f,
            FPU | FPU287
                | FPU387
                | MMX
                | SSE
                | SSE2
                | SSE3
                | SSSE3
                | SSE4_1
                | SSE4_2
                | AES
                | PCLMULQDQ
                | SHA
                | AVX
                | AVX2
                | FMA
                | F16C
                | VAES
                | VPCLMULQDQ
        )
    }) && !matches!(
        instruction.mnemonic(),
        Mnemonic::Lfence
            | Mnemonic::Mfence
            | Mnemonic::Sfence
            | Mnemonic::Movnti
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Crc32
            | Mnemonic::Pause
    );
    // FWAIT is of no feature by name.
    kind.fpu |= instruction.mnemonic() == Mnemonic::Wait;
    kind.avx = kind.fpu && instruction.encoding() != iced_x86::EncodingKind::Legacy;
    kind.traps = kind.fpu
        || matches!(
            instruction.mnemonic(),
            Mnemonic::Div | Mnemonic::Idiv | Mnemonic::Cmpxchg16b
        );
    kind.extended = features.iter().any(|f| {
        use CpuidFeature::*;
        !matches!(
            f,
            INTEL8086
                | INTEL8086_ONLY
                | INTEL186
                | INTEL286
                | INTEL386
                | INTEL486
                | X64
                | CMOV
                | FPU
                | FPU287
                | FPU387
                | MMX
                | SSE
                | SSE2
                | CX8
                | PAUSE
                | MULTIBYTENOP
        )
    });
    kind.ring0 = matches!(
        instruction.mnemonic(),
        Mnemonic::Cli | Mnemonic::Sti | Mnemonic::Swapgs | Mnemonic::Sysretq
    );
    kind.way = way(instruction, memory);
    kind
}

fn way(instruction: &Instruction, memory: bool) -> Way {
    use Mnemonic as M;
    let code = instruction.code();
    if instruction.is_invalid() {
        return Way::Rust;
    }
    match instruction.mnemonic() {
        M::Nop | M::Endbr64 | M::Endbr32 | M::Reservednop | M::Serialize => return Way::Nothing,
        M::Prefetch
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2 => return Way::Nothing,
        M::Cldemote => return Way::Nothing,
        M::Clflush | M::Clflushopt | M::Clwb => return Way::Rust,
        M::Rdtsc
        | M::Rdtscp
        | M::Leave
        | M::Cli
        | M::Sti
        | M::Swapgs
        | M::Pushfq
        | M::Cld
        | M::Std
        | M::Syscall
        | M::Sysretq => {
            return Way::Own;
        }
        M::Push | M::Pop => {
            return match code {
                Code::Push_r64
                | Code::Push_rm64
                | Code::Pushq_imm32
                | Code::Pushq_imm8
                | Code::Pop_r64
                | Code::Pop_rm64 => Way::Own,
                _ => Way::Rust,
            };
        }
        M::Call => {
            return match code {
                Code::Call_rel32_64 | Code::Call_rm64 => Way::Own,
                _ => Way::Rust,
            };
        }
        M::Ret => {
            return match code {
                Code::Retnq | Code::Retnq_imm16 => Way::Own,
                _ => Way::Rust,
            };
        }
        M::Jmp => {
            return match code {
                Code::Jmp_rel8_64 | Code::Jmp_rel32_64 | Code::Jmp_rm64 => Way::Own,
                _ => Way::Rust,
            };
        }
        M::In
        | M::Out
        | M::Hlt
        | M::Cpuid
        | M::Pushf
        | M::Pushfd
        | M::Popf
        | M::Popfd
        | M::Popfq => return Way::Rust,
        M::Rdmsr
        | M::Wrmsr
        | M::Lgdt
        | M::Lidt
        | M::Sgdt
        | M::Sidt
        | M::Lldt
        | M::Sldt
        | M::Ltr
        | M::Str
        | M::Smsw
        | M::Lmsw => return Way::Rust,
        M::Lar
        | M::Lsl
        | M::Verr
        | M::Verw
        | M::Arpl
        | M::Xgetbv
        | M::Xsetbv
        | M::Xlatb
        | M::Enter
        | M::Maskmovq
        | M::Maskmovdqu => return Way::Rust,
        // Elements that the mask leaves out do not fault.
        M::Vpmaskmovd | M::Vpmaskmovq | M::Vmaskmovps | M::Vmaskmovpd if memory => {
            return Way::Rust;
        }
        M::Vmaskmovdqu
        | M::Rdpid
        | M::Rdpmc
        | M::Clac
        | M::Stac
        | M::Lss
        | M::Lfs
        | M::Lgs
        | M::Lds
        | M::Les => return Way::Rust,
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 | M::Ldmxcsr | M::Vldmxcsr => {
            return Way::Rust;
        }
        M::Ud0
        | M::Ud1
        | M::Ud2
        | M::Int
        | M::Int1
        | M::Int3
        | M::Into
        | M::Iret
        | M::Iretd
        | M::Iretq => return Way::Rust,
        M::Vpgatherdd
        | M::Vpgatherdq
        | M::Vpgatherqd
        | M::Vpgatherqq
        | M::Vgatherdps
        | M::Vgatherdpd
        | M::Vgatherqps
        | M::Vgatherqpd => return Way::Rust,
        _ => {}
    }
    match instruction.flow_control() {
        FlowControl::Next => {}
        FlowControl::ConditionalBranch => {
            // 16-bit operand size truncates rip: not worth a native form.
            return if instruction.near_branch16() != 0
                && instruction.op0_kind() == OpKind::NearBranch16
            {
                Way::Rust
            } else {
                Way::Own
            };
        }
        _ => return Way::Rust,
    }
    if super::repeat::element(instruction).is_some() {
        return Way::Repeat;
    }
    if instruction.is_privileged()
        || instruction.is_string_instruction()
        || !instruction.cpuid_features().iter().all(|f| allowed(*f))
    {
        return Way::Rust;
    }
    for n in 0..instruction.op_count() {
        if instruction.op_kind(n) == OpKind::Register {
            let r = instruction.op_register(n);
            if r.is_segment_register() || r.is_cr() || r.is_dr() || r.is_tr() {
                return Way::Rust;
            }
        }
    }
    if memory
        && instruction.mnemonic() != M::Lea
        && !matches!(instruction.memory_size().size(), 1..=64 | 94 | 108)
    {
        return Way::Rust;
    }
    Way::Native
}

/// The six arithmetic flags, in iced's bits.
pub const ALL_FLAGS: u32 = iced_x86::RflagsBits::CF
    | iced_x86::RflagsBits::PF
    | iced_x86::RflagsBits::AF
    | iced_x86::RflagsBits::ZF
    | iced_x86::RflagsBits::SF
    | iced_x86::RflagsBits::OF;

/// Flags an instruction reads (or may leave as they were), and flags it surely overwrites.
pub fn flags(instruction: &Instruction) -> (u32, u32) {
    use Mnemonic as M;
    let reads = instruction.rflags_read() & ALL_FLAGS;
    let kills = instruction.rflags_modified() & ALL_FLAGS;
    match instruction.mnemonic() {
        // A count of zero leaves the flags as they were.
        M::Shl
        | M::Shr
        | M::Sar
        | M::Sal
        | M::Rol
        | M::Ror
        | M::Rcl
        | M::Rcr
        | M::Shld
        | M::Shrd => {
            let last = instruction.op_count() - 1;
            let counted = match instruction.op_kind(last) {
                OpKind::Immediate8 => {
                    let wide = instruction.op_count() > 0 && matches!(size_of_op0(instruction), 8);
                    instruction.immediate8() & if wide { 63 } else { 31 } != 0
                }
                _ => false,
            };
            if counted {
                (reads, kills)
            } else {
                (ALL_FLAGS, 0)
            }
        }
        // They go into r11.
        M::Syscall => (ALL_FLAGS, 0),
        // What these leave undefined is what the host leaves: keep it a plain overwrite only where defined.
        M::Bsf | M::Bsr => (reads, kills),
        _ => (reads, kills),
    }
}

fn size_of_op0(instruction: &Instruction) -> usize {
    match instruction.op0_kind() {
        OpKind::Register => instruction.op0_register().size(),
        _ => instruction.memory_size().size(),
    }
}
