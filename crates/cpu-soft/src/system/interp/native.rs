//! Runs one instruction of the guest's on the host CPU, between a load and a save of the guest's registers.
//!
//! Serves x87, MMX, SSE and AVX instructions whose memory operand is a device, or which run outside 64-bit mode. The
//! memory operand becomes a buffer: read before, written back after. Also the other side of the property tests.

use std::collections::HashMap;
use std::ptr::NonNull;

use iced_x86::{
    Code, CpuidFeature, Encoder, Instruction, InstructionInfoFactory, MemorySize, Mnemonic,
    OpAccess, OpKind, Register, RflagsBits,
};

use super::operand;
use crate::state::{Cpu, Fault, Flow, Rights, flag};
use crate::system::fpu;

/// What the trampoline loads and saves. Offsets are used by the assembly below.
#[repr(C, align(64))]
struct Context {
    gpr: [u64; 16],
    flags: u64,
    mxcsr: u32,
    host_mxcsr: u32,
    _pad: [u64; 6],
    ymm: [[u64; 4]; 16],
}

const _: () = {
    assert!(std::mem::offset_of!(Context, flags) == 128);
    assert!(std::mem::offset_of!(Context, mxcsr) == 136);
    assert!(std::mem::offset_of!(Context, host_mxcsr) == 140);
    assert!(std::mem::offset_of!(Context, ymm) == 192);
};

macro_rules! trampoline {
    ($name:literal, $load:literal, $save:literal, $clean:literal) => {
        std::arch::global_asm!(
            concat!(".global ", $name),
            concat!($name, ":"),
            "push rbx; push rbp; push r12; push r13; push r14; push r15",
            "push rdi; push rsi",
            "stmxcsr [rdi + 140]",
            $load,
            "ldmxcsr [rdi + 136]",
            "push qword ptr [rdi + 128]",
            "popfq",
            "mov rax, [rdi]; mov rcx, [rdi + 8]; mov rdx, [rdi + 16]; mov rbx, [rdi + 24]",
            "mov rbp, [rdi + 40]; mov rsi, [rdi + 48]",
            "mov r8, [rdi + 64]; mov r9, [rdi + 72]; mov r10, [rdi + 80]; mov r11, [rdi + 88]",
            "mov r12, [rdi + 96]; mov r13, [rdi + 104]; mov r14, [rdi + 112]; mov r15, [rdi + 120]",
            "mov rdi, [rdi + 56]",
            "call [rsp]",
            "push rdi",
            "mov rdi, [rsp + 16]",
            "mov [rdi], rax; mov [rdi + 8], rcx; mov [rdi + 16], rdx; mov [rdi + 24], rbx",
            "mov [rdi + 40], rbp; mov [rdi + 48], rsi",
            "mov [rdi + 64], r8; mov [rdi + 72], r9; mov [rdi + 80], r10; mov [rdi + 88], r11",
            "mov [rdi + 96], r12; mov [rdi + 104], r13; mov [rdi + 112], r14; mov [rdi + 120], r15",
            "pushfq",
            "pop rax",
            "mov [rdi + 128], rax",
            "pop rax",
            "mov [rdi + 56], rax",
            "cld",
            $save,
            $clean,
            "stmxcsr [rdi + 136]",
            "ldmxcsr [rdi + 140]",
            "add rsp, 16",
            "pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
            "ret",
        );
    };
}

trampoline!(
    "berth_native_avx",
    "vmovdqu ymm0, [rdi+192]; vmovdqu ymm1, [rdi+224]; vmovdqu ymm2, [rdi+256]; vmovdqu ymm3, [rdi+288]
     vmovdqu ymm4, [rdi+320]; vmovdqu ymm5, [rdi+352]; vmovdqu ymm6, [rdi+384]; vmovdqu ymm7, [rdi+416]
     vmovdqu ymm8, [rdi+448]; vmovdqu ymm9, [rdi+480]; vmovdqu ymm10, [rdi+512]; vmovdqu ymm11, [rdi+544]
     vmovdqu ymm12, [rdi+576]; vmovdqu ymm13, [rdi+608]; vmovdqu ymm14, [rdi+640]; vmovdqu ymm15, [rdi+672]",
    "vmovdqu [rdi+192], ymm0; vmovdqu [rdi+224], ymm1; vmovdqu [rdi+256], ymm2; vmovdqu [rdi+288], ymm3
     vmovdqu [rdi+320], ymm4; vmovdqu [rdi+352], ymm5; vmovdqu [rdi+384], ymm6; vmovdqu [rdi+416], ymm7
     vmovdqu [rdi+448], ymm8; vmovdqu [rdi+480], ymm9; vmovdqu [rdi+512], ymm10; vmovdqu [rdi+544], ymm11
     vmovdqu [rdi+576], ymm12; vmovdqu [rdi+608], ymm13; vmovdqu [rdi+640], ymm14; vmovdqu [rdi+672], ymm15",
    "vzeroupper"
);
trampoline!(
    "berth_native_sse",
    "movdqu xmm0, [rdi+192]; movdqu xmm1, [rdi+224]; movdqu xmm2, [rdi+256]; movdqu xmm3, [rdi+288]
     movdqu xmm4, [rdi+320]; movdqu xmm5, [rdi+352]; movdqu xmm6, [rdi+384]; movdqu xmm7, [rdi+416]
     movdqu xmm8, [rdi+448]; movdqu xmm9, [rdi+480]; movdqu xmm10, [rdi+512]; movdqu xmm11, [rdi+544]
     movdqu xmm12, [rdi+576]; movdqu xmm13, [rdi+608]; movdqu xmm14, [rdi+640]; movdqu xmm15, [rdi+672]",
    "movdqu [rdi+192], xmm0; movdqu [rdi+224], xmm1; movdqu [rdi+256], xmm2; movdqu [rdi+288], xmm3
     movdqu [rdi+320], xmm4; movdqu [rdi+352], xmm5; movdqu [rdi+384], xmm6; movdqu [rdi+416], xmm7
     movdqu [rdi+448], xmm8; movdqu [rdi+480], xmm9; movdqu [rdi+512], xmm10; movdqu [rdi+544], xmm11
     movdqu [rdi+576], xmm12; movdqu [rdi+608], xmm13; movdqu [rdi+640], xmm14; movdqu [rdi+672], xmm15",
    ""
);

unsafe extern "C" {
    fn berth_native_avx(context: *mut Context, code: *const u8);
    fn berth_native_sse(context: *mut Context, code: *const u8);
}

/// Bytes of code memory of one CPU for single instructions.
const CODE_SIZE: usize = 16 * 1024;
/// One instruction (at most 15 bytes) and its RET.
const SLOT: usize = 16;

/// Host code of single instructions, written through one mapping and run through another.
pub struct Stubs {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    used: usize,
    known: HashMap<[u8; SLOT], usize>,
}

// SAFETY: the mappings belong to this value alone.
unsafe impl Send for Stubs {}

impl Stubs {
    /// Maps the memory; `None` where the host refuses.
    pub fn new() -> Option<Stubs> {
        use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let fd = memfd_create("berth-stubs", MemfdFlags::CLOEXEC).ok()?;
        ftruncate(&fd, CODE_SIZE as u64).ok()?;
        let map = |protection| {
            // SAFETY: a new mapping at an address of the kernel's choice.
            let at = unsafe {
                mmap(
                    std::ptr::null_mut(),
                    CODE_SIZE,
                    protection,
                    MapFlags::SHARED,
                    &fd,
                    0,
                )
            };
            at.ok().and_then(|p| NonNull::new(p.cast::<u8>()))
        };
        let writable = map(ProtFlags::READ | ProtFlags::WRITE)?;
        let Some(executable) = map(ProtFlags::READ | ProtFlags::EXEC) else {
            // SAFETY: mapped just now, used by nobody.
            unsafe { _ = rustix::mm::munmap(writable.as_ptr().cast(), CODE_SIZE) };
            return None;
        };
        Some(Stubs {
            writable,
            executable,
            used: 0,
            known: HashMap::new(),
        })
    }

    /// The host address of `code` followed by RET.
    fn place(&mut self, code: &[u8]) -> Option<*const u8> {
        let mut slot = [0xcc; SLOT];
        slot.get_mut(..code.len())?.copy_from_slice(code);
        *slot.get_mut(code.len())? = 0xc3;
        if let Some(&at) = self.known.get(&slot) {
            // SAFETY: inside the mapping.
            return Some(unsafe { self.executable.as_ptr().add(at) });
        }
        if self.used + SLOT > CODE_SIZE {
            self.known.clear();
            self.used = 0;
        }
        let at = self.used;
        self.used += SLOT;
        self.known.insert(slot, at);
        // SAFETY: `at + SLOT` is inside the mapping, and no code of it runs meanwhile.
        unsafe {
            std::ptr::copy_nonoverlapping(slot.as_ptr(), self.writable.as_ptr().add(at), SLOT)
        };
        // Code changed through another address: a serializing instruction must come before it runs (SDM vol. 3, 9.1.3).
        core::arch::x86_64::__cpuid(0);
        // SAFETY: inside the mapping.
        Some(unsafe { self.executable.as_ptr().add(at) })
    }
}

impl Drop for Stubs {
    fn drop(&mut self) {
        // SAFETY: both mappings are ours and of this size.
        unsafe {
            _ = rustix::mm::munmap(self.writable.as_ptr().cast(), CODE_SIZE);
            _ = rustix::mm::munmap(self.executable.as_ptr().cast(), CODE_SIZE);
        }
    }
}

/// The largest memory operand (FXSAVE aside, which is not run here): FNSAVE's 108 bytes.
#[repr(C, align(64))]
struct Buffer([u8; 128]);

/// Executes `i` natively; `Ok(None)`: it cannot be run so.
pub fn execute(cpu: &mut Cpu, i: &Instruction) -> Result<Option<Flow>, Fault> {
    if !cpu.system.cpuid.offers(i) || i.is_privileged() {
        return Ok(None);
    }
    fpu::check(cpu, i)?;
    if i.is_vsib() {
        return super::gather::execute(cpu, i);
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(i);
    let memory = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory);
    // Operands addressed by implicit registers: MASKMOVDQU.
    if (0..i.op_count()).any(|n| {
        matches!(
            i.op_kind(n),
            OpKind::MemorySegRDI | OpKind::MemorySegEDI | OpKind::MemorySegDI
        )
    }) {
        return super::gather::masked_store(cpu, i);
    }
    let touches_rsp = info
        .used_registers()
        .iter()
        .any(|r| r.register().full_register() == Register::RSP);
    if i.flow_control() != iced_x86::FlowControl::Next {
        return Ok(None);
    }
    let mut copy = *i;
    let mut buffer = Buffer([0; 128]);
    let mut target = None;
    let mut borrowed = Borrowed::default();
    let is_rsp = |n: &u32| {
        i.op_kind(*n) == OpKind::Register && i.op_register(*n).full_register() == Register::RSP
    };
    if (0..i.op_count()).any(|n| is_rsp(&n)) {
        // Another register stands in for rsp, which the trampoline needs itself.
        let Some(free) = free_register(i, None) else {
            return Ok(None);
        };
        for n in (0..i.op_count()).filter(is_rsp) {
            let stand_in = match i.op_register(n).size() {
                8 => free,
                4 => free.full_register32(),
                _ => return Ok(None),
            };
            copy.set_op_register(n, stand_in);
        }
        borrowed.stack = operand::general(free).map(|p| (p.index, cpu.gpr[4]));
    } else if touches_rsp && memory.is_none() {
        return Ok(None);
    }
    if let Some(n) = memory {
        let len = memory_len(i);
        if len == 0 || len > 128 {
            return Ok(None);
        }
        let access = match n {
            0 => info.op0_access(),
            1 => info.op1_access(),
            2 => info.op2_access(),
            3 => info.op3_access(),
            _ => info.op4_access(),
        };
        let writes = !matches!(
            access,
            OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess | OpAccess::None
        );
        let at = operand::linear(cpu, i, len, writes)?;
        if aligned_operand(i, len) && at & (len as u64 - 1) != 0 {
            return Err(Fault::GP);
        }
        let masked = matches!(
            i.mnemonic(),
            Mnemonic::Vpmaskmovd
                | Mnemonic::Vpmaskmovq
                | Mnemonic::Vmaskmovps
                | Mnemonic::Vmaskmovpd
        );
        if masked || matches!(access, OpAccess::CondWrite | OpAccess::CondRead) {
            return super::gather::masked_move(cpu, i, at, len);
        }
        if writes {
            cpu.write_probe(at, len, Rights::Current)?;
            target = Some((at, len));
        }
        // An x87 store that raises an exception leaves the memory as it is.
        let x87 = i.mnemonic() == Mnemonic::Fisttp
            || i.cpuid_features().iter().any(|f| {
                matches!(
                    f,
                    CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387
                )
            });
        if access != OpAccess::Write || x87 {
            cpu.read_bytes(at, &mut buffer.0[..len], Rights::Current)?;
        }
        // A register that the instruction does not name holds the buffer's address.
        let Some(free) = free_register(i, borrowed.stack) else {
            return Ok(None);
        };
        borrowed.buffer = operand::general(free).map(|p| (p.index, buffer.0.as_mut_ptr() as u64));
        copy.set_memory_base(free);
        copy.set_memory_index(Register::None);
        copy.set_memory_index_scale(1);
        copy.set_memory_displacement64(0);
        copy.set_memory_displ_size(0);
        copy.set_segment_prefix(Register::None);
    }
    if copy.code() == Code::INVALID {
        return Err(Fault::UD);
    }
    let mut encoder = Encoder::new(64);
    if encoder.encode(&copy, 0).is_err() {
        return Ok(None);
    }
    let code = encoder.take_buffer();
    if run(cpu, &code, borrowed)?.is_none() {
        return Ok(None);
    }
    if let Some((at, len)) = target {
        cpu.write_bytes(at, &buffer.0[..len], Rights::Current)?;
    }
    cpu.rip = i.next_ip();
    Ok(Some(Flow::Continue))
}

/// Registers that hold something else while an instruction runs: index and value.
#[derive(Default, Clone, Copy)]
struct Borrowed {
    /// Stands in for rsp.
    stack: Option<(usize, u64)>,
    /// The address of the memory operand.
    buffer: Option<(usize, u64)>,
}

/// A register that the instruction does not use, nor is borrowed already.
fn free_register(i: &Instruction, taken: Option<(usize, u64)>) -> Option<Register> {
    [
        Register::RAX,
        Register::RCX,
        Register::RDX,
        Register::RBX,
        Register::RSI,
        Register::RDI,
    ]
    .into_iter()
    .find(|r| {
        !(0..i.op_count())
            .any(|m| i.op_kind(m) == OpKind::Register && i.op_register(m).full_register() == *r)
            && !implicit_use(i, *r)
            && taken.is_none_or(|(index, _)| index != r.number())
    })
}

/// Runs encoded code with the guest's registers, but those `borrowed`. `None`: there is no memory for code.
fn run(cpu: &mut Cpu, code: &[u8], borrowed: Borrowed) -> Result<Option<()>, Fault> {
    if cpu.system.stubs.is_none() {
        cpu.system.stubs = Stubs::new();
    }
    let Some(entry) = cpu.system.stubs.as_mut().and_then(|s| s.place(code)) else {
        return Ok(None);
    };
    // SIMD exceptions are masked while it runs; one that the guest unmasked is found in the flags afterwards.
    const MASKS: u32 = 0x1f80;
    const RAISED: u32 = 0x3f;
    let mut context = Context {
        gpr: cpu.gpr,
        flags: cpu.rflags & flag::NATIVE | flag::FIXED,
        mxcsr: (cpu.mxcsr | MASKS) & !RAISED,
        host_mxcsr: 0,
        _pad: [0; 6],
        ymm: cpu.ymm,
    };
    let lent = [borrowed.stack, borrowed.buffer];
    for (register, value) in lent.into_iter().flatten() {
        context.gpr[register] = value;
    }
    // SAFETY: `entry` holds one instruction without control flow that names no memory but the buffer (or none), and a
    // RET; the trampoline saves what the ABI wants kept. x87 is the guest's own and free for its instructions.
    unsafe {
        if std::arch::is_x86_feature_detected!("avx") {
            berth_native_avx(&mut context, entry);
        } else {
            berth_native_sse(&mut context, entry);
        }
    }
    let raised = context.mxcsr & RAISED;
    let unmasked = raised & !(cpu.mxcsr >> 7) & RAISED;
    if unmasked != 0 {
        // Exceptions found before computing (invalid, denormal, division by zero) keep the others from coming up.
        const BEFORE: u32 = 0x07;
        cpu.mxcsr |= if unmasked & BEFORE != 0 {
            raised & BEFORE
        } else {
            raised
        };
        return Err(if cpu.cr4 & crate::system::cr::CR4_OSXMMEXCPT != 0 {
            Fault::XM
        } else {
            Fault::UD
        });
    }
    cpu.mxcsr |= raised;
    for n in (0..16).filter(|n| *n != 4) {
        if !lent.iter().flatten().any(|(register, _)| *register == n) {
            cpu.gpr[n] = context.gpr[n];
        }
    }
    if let Some((register, _)) = borrowed.stack {
        cpu.gpr[4] = context.gpr[register];
    }
    cpu.ymm = context.ymm;
    cpu.rflags = cpu.rflags & !flag::NATIVE | context.flags & flag::NATIVE;
    Ok(Some(()))
}

/// Registers that an instruction uses without naming them as operands.
fn implicit_use(i: &Instruction, register: Register) -> bool {
    use iced_x86::Mnemonic as M;
    match i.mnemonic() {
        M::Pcmpestri
        | M::Pcmpestrm
        | M::Pcmpestri64
        | M::Pcmpestrm64
        | M::Vpcmpestri64
        | M::Vpcmpestrm64
        | M::Vpcmpestri
        | M::Vpcmpestrm
        | M::Pcmpistri
        | M::Vpcmpistri => {
            matches!(register, Register::RAX | Register::RCX | Register::RDX)
        }
        M::Mul | M::Imul | M::Div | M::Idiv | M::Cmpxchg | M::Mulx => {
            matches!(register, Register::RAX | Register::RDX)
        }
        M::Cmpxchg8b | M::Cmpxchg16b => {
            matches!(
                register,
                Register::RAX | Register::RBX | Register::RCX | Register::RDX
            )
        }
        _ => false,
    }
}

/// Bytes of the memory operand.
fn memory_len(i: &Instruction) -> usize {
    match i.memory_size() {
        MemorySize::FpuEnv14 => 14,
        MemorySize::FpuEnv28 => 28,
        MemorySize::FpuState94 => 94,
        MemorySize::FpuState108 => 108,
        size => size.size(),
    }
}

/// Legacy SSE operands of 16 bytes must be aligned, but for the unaligned moves; of VEX only the aligned moves.
fn aligned_operand(i: &Instruction, len: usize) -> bool {
    use iced_x86::Mnemonic as M;
    if !matches!(len, 16 | 32) {
        return false;
    }
    let always = matches!(
        i.mnemonic(),
        M::Vmovaps
            | M::Vmovapd
            | M::Vmovdqa
            | M::Vmovntps
            | M::Vmovntpd
            | M::Vmovntdq
            | M::Vmovntdqa
    );
    // CVTPD2PI reads a whole vector into an MMX register.
    let vector = (0..i.op_count()).any(|n| {
        i.op_kind(n) == OpKind::Register
            && (i.op_register(n).is_vector_register() || i.op_register(n).is_mm())
    });
    let legacy = i.encoding() == iced_x86::EncodingKind::Legacy
        && vector
        && !matches!(
            i.mnemonic(),
            M::Movups
                | M::Movupd
                | M::Movdqu
                | M::Lddqu
                | M::Pcmpestri
                | M::Pcmpestrm
                | M::Pcmpestri64
                | M::Pcmpestrm64
                | M::Pcmpistri
                | M::Pcmpistrm
        );
    always || legacy
}

/// Flags that an instruction leaves undefined, as RFLAGS bits.
pub fn undefined_flags(i: &Instruction) -> u64 {
    let bits = i.rflags_undefined();
    let mut mask = 0;
    for (bit, ours) in [
        (RflagsBits::CF, flag::CF),
        (RflagsBits::PF, flag::PF),
        (RflagsBits::AF, flag::AF),
        (RflagsBits::ZF, flag::ZF),
        (RflagsBits::SF, flag::SF),
        (RflagsBits::OF, flag::OF),
    ] {
        if bits & bit != 0 {
            mask |= ours;
        }
    }
    mask
}
