//! The crossing between Rust and translated code: hand-made stubs at the front of each code cache.

use std::mem::offset_of;

use crate::cache::Cache;
use crate::state::{Cpu, flag};
use crate::translate::emit::*;
use crate::translate::{GPR, RETURN, SCRATCH, Stubs, TARGET, leave};

/// Offset in the page, for the way back from a memory stub.
pub(crate) const PAGE_OFFSET: usize = SCRATCH + 48;
/// Where the host trapped; see [`crate::host`].
pub(crate) const TRAP: usize = SCRATCH + 56;

/// What `enter` answers when Rust code itself decided to leave.
pub(crate) const LEFT: u64 = 0;
/// What `enter` answers after a trap of the host.
pub(crate) const TRAPPED: u64 = 1;

/// The registers that keep their place.
const HELD: [u8; 13] = [RAX, RCX, RDX, RBX, RBP, RSI, RDI, 8, 9, 12, 13, 14, 15];
/// Those of them that the System V ABI lets callees destroy.
const VOLATILE: [u8; 7] = [RAX, RCX, RDX, RSI, RDI, 8, 9];

/// Rust functions the stubs call.
#[derive(Clone, Copy)]
pub(crate) struct Entries {
    /// (cpu, guest address, descriptor) -> host page address, or 0 to leave.
    pub memory: u64,
    /// (cpu, descriptor) -> 0 to leave.
    pub instruction: u64,
}

fn gpr(n: u8) -> Mem {
    Mem::gs(GPR + usize::from(n) * 8)
}

/// Stores the guest's registers and makes the host's stack and modes current. Destroys rax and rcx only.
fn save(code: &mut Code, avx: bool) {
    for r in HELD {
        code.store(gpr(r), r);
    }
    code.store(gpr(RSP), RSP);
    code.load(RSP, Mem::gs(offset_of!(Cpu, host_rsp)));
    code.raw(&[0x9c, 0x58]); // pushfq; pop rax
    code.byte(0x25); // and eax, imm32
    code.u32(flag::NATIVE as u32);
    code.load32(RCX, Mem::gs(offset_of!(Cpu, rflags)));
    code.with_reg(false, &[0x81], 4, RCX);
    code.u32(!(flag::NATIVE as u32));
    code.with_reg(false, &[0x09], RCX, RAX); // or eax, ecx
    code.store32(Mem::gs(offset_of!(Cpu, rflags)), RAX);
    code.byte(0xfc); // cld
    code.with_mem(
        None,
        false,
        &[0x0f, 0xae],
        3,
        Mem::gs(offset_of!(Cpu, mxcsr)),
    );
    code.with_mem(
        None,
        false,
        &[0x0f, 0xae],
        2,
        Mem::gs(offset_of!(Cpu, host_mxcsr)),
    );
    vectors(code, avx, true);
}

/// Loads or stores the sixteen vector registers.
fn vectors(code: &mut Code, avx: bool, store: bool) {
    for n in 0..16u8 {
        let at = offset_of!(Cpu, ymm) + usize::from(n) * 32;
        if avx {
            // vmovups ymm, gs:[disp32], VEX.256.0F.WIG 10/11, two-byte VEX
            code.byte(0x65);
            let r = if n < 8 { 0x80 } else { 0 };
            code.raw(&[
                0xc5,
                r | 0x7c,
                if store { 0x11 } else { 0x10 },
                (n & 7) << 3 | 4,
                0x25,
            ]);
            code.u32(at as u32);
        } else {
            code.with_mem(
                None,
                false,
                &[0x0f, if store { 0x11 } else { 0x10 }],
                n,
                Mem::gs(at),
            );
        }
    }
}

fn restore_direction(code: &mut Code) {
    // bt dword gs:[rflags], 10; jnc +1; std
    code.with_mem(
        None,
        false,
        &[0x0f, 0xba],
        4,
        Mem::gs(offset_of!(Cpu, rflags)),
    );
    code.byte(10);
    code.raw(&[0x73, 0x01, 0xfd]);
}

/// Makes all of the guest's registers current and jumps to `TARGET`.
fn load_all(code: &mut Code, avx: bool) {
    vectors(code, avx, false);
    code.with_mem(
        None,
        false,
        &[0x0f, 0xae],
        2,
        Mem::gs(offset_of!(Cpu, mxcsr)),
    );
    restore_direction(code);
    // ah = low flags, al = OF
    code.load32(RAX, Mem::gs(offset_of!(Cpu, rflags)));
    code.mov32(RCX, RAX);
    code.and32(RCX, flag::DF as u32);
    code.store32(Mem::gs(offset_of!(Cpu, direction)), RCX);
    code.mov32(RCX, RAX);
    code.shr32(RCX, 11);
    code.with_reg(false, &[0x83], 4, RCX);
    code.byte(1); // and ecx, 1
    code.raw(&[0x88, 0xc4]); // mov ah, al
    code.raw(&[0x88, 0xc8]); // mov al, cl
    code.raw(&[0x04, 0x7f, 0x9e]); // add al, 0x7f; sahf
    for r in HELD {
        code.load(r, gpr(r));
    }
    code.load(RSP, gpr(RSP));
    // What an indirect entry compares; free elsewhere.
    code.load(R10, Mem::gs(offset_of!(Cpu, rip)));
    code.jmp_mem(Mem::gs(TARGET));
}

fn call(code: &mut Code, function: u64) {
    code.mov_imm(RAX, function);
    code.raw(&[0xff, 0xd0]);
}

/// The host's callee-saved registers back, and return.
fn leave_rust(code: &mut Code) {
    code.raw(&[0x48, 0x83, 0xc4, 0x08]); // add rsp, 8
    code.raw(&[
        0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3,
    ]);
}

/// Writes the stubs for the CPU at `cpu` to the front of `cache`.
pub(crate) fn install(cache: &mut Cache, cpu: u64, entries: Entries) -> Stubs {
    let avx = std::arch::is_x86_feature_detected!("avx");
    let mut code = Code::new(cache.next());
    let mut stubs = Stubs {
        enter: code.here(),
        ..Stubs::default()
    };
    code.raw(&[0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57]); // push rbx rbp r12..r15
    code.raw(&[0x48, 0x83, 0xec, 0x08]); // sub rsp, 8
    code.store(Mem::gs(offset_of!(Cpu, host_rsp)), RSP);
    code.store(Mem::gs(TARGET), RDI);
    let load = code.here();
    load_all(&mut code, avx);

    stubs.exit = code.here();
    save(&mut code, avx);
    code.mov(RAX, R11);
    let out = code.here();
    leave_rust(&mut code);

    stubs.jump_miss = code.here();
    code.store(Mem::gs(offset_of!(Cpu, rip)), R10);
    let lea = code.lea_r11_rip();
    code.jmp_to(stubs.exit);
    code.bind(lea);
    code.u32(leave::INDIRECT | leave::SLOT);
    code.u32(0);

    stubs.memory = code.here();
    save(&mut code, avx);
    code.mov_imm(RDI, cpu);
    code.mov(RSI, R10);
    code.mov(RDX, R11);
    call(&mut code, entries.memory);
    code.raw(&[0x48, 0x85, 0xc0]); // test rax, rax
    code.jcc_to(4, out);
    code.mov(R11, RAX);
    code.load(R10, Mem::gs(PAGE_OFFSET));
    vectors(&mut code, avx, false);
    code.with_mem(
        None,
        false,
        &[0x0f, 0xae],
        2,
        Mem::gs(offset_of!(Cpu, mxcsr)),
    );
    restore_direction(&mut code);
    for r in VOLATILE {
        code.load(r, gpr(r));
    }
    code.load(RSP, gpr(RSP));
    code.jmp_mem(Mem::gs(TARGET));

    stubs.instruction = code.here();
    save(&mut code, avx);
    code.mov_imm(RDI, cpu);
    code.mov(RSI, R11);
    call(&mut code, entries.instruction);
    code.raw(&[0x48, 0x85, 0xc0]);
    code.jcc_to(4, out);
    code.jmp_to(load);

    stubs.host_fault = code.here();
    // For tests, which compare them with the guest's.
    code.store(Mem::gs(TARGET), R10);
    code.store(Mem::gs(RETURN), R11);
    save(&mut code, avx);
    code.mov_imm(RAX, TRAPPED);
    code.jmp_to(out);

    assert!(
        cache.append(&code.bytes),
        "the smallest cache holds the stubs"
    );
    cache.reserve();
    stubs
}

/// Runs translated code at `target` until it leaves; answers the descriptor's host address, [`LEFT`] or [`TRAPPED`].
///
/// # Safety
/// Host GS is the frame the stubs were made for, `target` an entry of a live block of the same cache, and the frame's
/// registers are the state that block expects.
pub(crate) unsafe fn enter(stubs: &Stubs, target: u64) -> u64 {
    // SAFETY: the stub follows the System V ABI: it saves callee-saved registers, takes one argument and returns in rax.
    let function: unsafe extern "sysv64" fn(u64) -> u64 =
        unsafe { std::mem::transmute(stubs.enter) };
    // SAFETY: the caller's promise.
    unsafe { function(target) }
}
