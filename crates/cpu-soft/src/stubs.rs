//! The crossing between Rust and translated code: hand-made stubs at the front of each code cache.

use std::mem::offset_of;

use crate::cache::Cache;
use cpu::x86::Segment;

use crate::state::{
    CS, Cpu, Frame, JumpEntry, Level, SECOND_JUMPS, SECOND_TLB, SS, Second, TLB_ENTRIES, TlbEntry,
    flag,
};
use crate::system::System;
use crate::system::branch::{SYSRET_FLAGS, flat};
use crate::system::msr::Msrs;
use crate::translate::emit::*;
use crate::translate::{GPR, RETURN, SAVED_RAX, SCRATCH, Stubs, TARGET, leave, level_offset};

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

const fn second(offset: usize) -> usize {
    offset_of!(Frame, second) + offset
}

/// Branches taken in ring 3.
fn if_user(code: &mut Code) -> Patch {
    code.with_mem(None, false, &[0x80], 7, Mem::gs(offset_of!(Cpu, cpl)));
    code.byte(3);
    code.jcc(CC_E)
}

/// Looks for the jump target in r10 in the second table, notes it in the first and goes there; falls through where it is not
/// known or the run loop is wanted. Flags are in the slot; r11 is free.
fn second_jump(code: &mut Code, miss: u64) {
    const { assert!(SECOND_JUMPS.is_power_of_two() && size_of::<JumpEntry>() == 16) };
    code.store(Mem::gs(SAVED_RAX), RAX);
    code.store(Mem::gs(PAGE_OFFSET), RCX);
    let mut unknown = Vec::new();
    code.cmp32_mem_imm8(Mem::gs(offset_of!(Cpu, attention)), 0);
    unknown.push(code.jcc(CC_NE));
    // As `tlb::second_jump`.
    code.mov32(RCX, R10);
    code.shr32(RCX, 12);
    code.with_reg(false, &[0x31], R10, RCX); // xor ecx, r10d
    code.and32(RCX, SECOND_JUMPS as u32 - 1);
    code.with_reg(false, &[0xc1], 4, RCX); // shl ecx, 4
    code.byte(4);
    code.mov(RAX, R10);
    let entry = second(offset_of!(Second, jump));
    let mut user = Some(if_user(code));
    for n in 0..2 {
        if n == 1 {
            if let Some(user) = user.take() {
                code.bind(user);
            }
            code.xor_load(RAX, Mem::gs(second(offset_of!(Second, mix))));
        }
        let first = level_offset(n == 1) + offset_of!(Level, jump);
        let listed = second(offset_of!(Second, listed)) + n * 4;
        let list = second(offset_of!(Second, list)) + n * size_of::<[u16; 65536]>();
        // cmp rax, gs:[rcx + key]
        code.with_mem(None, true, &[0x3b], RAX, Mem::gs_at(RCX, entry));
        unknown.push(code.jcc(CC_NE));
        code.load(RCX, Mem::gs_at(RCX, entry + offset_of!(JumpEntry, host)));
        code.with_reg(false, &[0x0f, 0xb7], RAX, R10); // movzx eax, r10w
        let slot = Mem {
            index: Some((RAX, 3)),
            disp: first as i32,
            gs: true,
            base: None,
        };
        code.mov_imm(R11, miss);
        code.cmp_mem_reg(slot, R11);
        let noted = code.jcc(CC_NE);
        code.load32(R11, Mem::gs(listed));
        let end = Mem {
            index: Some((R11, 1)),
            disp: list as i32,
            gs: true,
            base: None,
        };
        code.with_mem(Some(0x66), false, &[0x89], RAX, end);
        code.with_mem(None, false, &[0xff], 0, Mem::gs(listed)); // inc
        code.bind(noted);
        code.store(slot, RCX);
        code.mov(R11, RCX);
        code.load(RAX, Mem::gs(SAVED_RAX));
        code.load(RCX, Mem::gs(PAGE_OFFSET));
        code.raw(&[0x41, 0xff, 0xe3]); // jmp r11
    }
    for patch in unknown {
        code.bind(patch);
    }
    code.load(RAX, Mem::gs(SAVED_RAX));
    code.load(RCX, Mem::gs(PAGE_OFFSET));
}

/// Looks for the page of the guest address in r10 in the second buffers, notes it in the first and goes back to where the
/// descriptor in r11 says; falls through with all registers as they were.
fn second_tlb(code: &mut Code) {
    const { assert!(SECOND_TLB.is_power_of_two() && size_of::<TlbEntry>() == 16) };
    const { assert!(SECOND_TLB <= 1 << 20 && TLB_ENTRIES <= 1 << 20) };
    code.store(Mem::gs(SAVED_RAX), RAX);
    code.store(Mem::gs(PAGE_OFFSET), RCX);
    let mut unknown = Vec::new();
    code.load32(RAX, Mem::base(R11, 0));
    code.raw(&[0xa8, leave::LOCK as u8]); // test al, imm8
    unknown.push(code.jcc(CC_NE));
    // Over the page's end?
    code.mov32(RCX, RAX);
    code.shr32(RCX, leave::SIZE_SHIFT as u8);
    code.and32(RCX, 0xff);
    let last = Mem {
        base: Some(R10),
        index: Some((RCX, 0)),
        disp: -1,
        gs: false,
    };
    code.with_mem(None, false, &[0x8d], RCX, last); // lea ecx, [r10 + rcx - 1]
    code.with_reg(false, &[0x31], R10, RCX); // xor ecx, r10d
    code.with_reg(false, &[0xf7], 0, RCX); // test ecx, imm32
    code.u32(0xffff_f000);
    unknown.push(code.jcc(CC_NE));
    code.mov32(RCX, R10);
    code.shr32(RCX, 8);
    code.and32(RCX, (SECOND_TLB as u32 - 1) << 4);
    let mut user = Some(if_user(code));
    for ring3 in [false, true] {
        if ring3 && let Some(user) = user.take() {
            code.bind(user);
        }
        code.byte(0xa9); // test eax, imm32
        code.u32(leave::WRITE);
        let mut writes = Some(code.jcc(CC_NE));
        for write in [false, true] {
            if write && let Some(writes) = writes.take() {
                code.bind(writes);
            }
            code.mov(RAX, R10);
            code.with_reg(true, &[0x81], 4, RAX); // and rax, -4096
            code.u32(0xffff_f000);
            let n = usize::from(ring3) * 2 + usize::from(write);
            let table = second(offset_of!(Second, tlb)) + n * SECOND_TLB * 16;
            let compare =
                |code: &mut Code| code.with_mem(None, true, &[0x3b], RAX, Mem::gs_at(RCX, table));
            let global = (!ring3).then(|| {
                compare(code);
                code.jcc(CC_E)
            });
            // or rax, gs:[context]
            let context = Mem::gs(second(offset_of!(Second, context)));
            code.with_mem(None, true, &[0x0b], RAX, context);
            compare(code);
            unknown.push(code.jcc(CC_NE));
            found(code, ring3, write, false, table);
            if let Some(global) = global {
                code.bind(global);
                found(code, ring3, write, true, table);
            }
        }
    }
    for patch in unknown {
        code.bind(patch);
    }
    code.load(RAX, Mem::gs(SAVED_RAX));
    code.load(RCX, Mem::gs(PAGE_OFFSET));
}

/// The entry at gs:[rcx + table] is the one: into the first buffer with it, and back.
fn found(code: &mut Code, user: bool, write: bool, global: bool, table: usize) {
    let first = level_offset(user)
        + if write {
            offset_of!(Level, write)
        } else {
            offset_of!(Level, read)
        };
    let marks = second(offset_of!(Second, nonglobal))
        + (usize::from(user) * 2 + usize::from(write)) * (TLB_ENTRIES / 8);
    code.store(Mem::gs(TARGET), R11);
    code.load(RCX, Mem::gs_at(RCX, table + offset_of!(TlbEntry, host)));
    code.mov32(R11, R10);
    code.shr32(R11, 8);
    code.and32(R11, (TLB_ENTRIES as u32 - 1) << 4);
    code.store(Mem::gs_at(R11, first + offset_of!(TlbEntry, host)), RCX);
    code.with_reg(true, &[0x81], 4, RAX); // and rax, -4096
    code.u32(0xffff_f000);
    code.store(Mem::gs_at(R11, first), RAX);
    code.shr32(R11, 4);
    let mark = if global { 0xb3 } else { 0xab }; // btr, bts
    code.with_mem(None, true, &[0x0f, mark], R11, Mem::gs(marks));
    // Back to descriptor + its second word.
    code.load(R11, Mem::gs(TARGET));
    code.with_mem(None, true, &[0x63], RAX, Mem::base(R11, 4)); // movsxd rax, [r11 + 4]
    code.with_reg(true, &[0x01], R11, RAX); // add rax, r11
    code.store(Mem::gs(TARGET), RAX);
    code.mov(R11, RCX);
    code.and32(R10, 0xfff);
    code.load(RAX, Mem::gs(SAVED_RAX));
    code.load(RCX, Mem::gs(PAGE_OFFSET));
    code.jmp_mem(Mem::gs(TARGET));
}

/// RFLAGS as they are in r10d, in all places where flags are kept for an indirect entry. Destroys r10 and r11.
fn new_flags(code: &mut Code) {
    code.store(Mem::gs(offset_of!(Cpu, rflags)), R10);
    code.with_reg(false, &[0x0f, 0xb6], R11, R10); // movzx r11d, r10b
    code.with_reg(false, &[0xc1], 4, R11); // shl r11d, 8
    code.byte(8);
    code.store32(Mem::gs(SCRATCH), R11);
    code.mov32(R11, R10);
    code.shr32(R11, 11);
    code.and32(R11, 1);
    code.with_mem(None, false, &[0x09], R11, Mem::gs(SCRATCH)); // or [slot], r11d
    code.and32(R10, flag::DF as u32);
    code.store32(Mem::gs(offset_of!(Cpu, direction)), R10);
    let down = code.jcc_short(CC_NE);
    code.byte(0xfc); // cld
    let end = code.short(0xeb);
    code.bind_short(down);
    code.byte(0xfd); // std
    code.bind_short(end);
}

/// Flat CS and SS with the selector in r11w, to be added to and made one of ring `ring`. Destroys r10.
fn flat_segments(code: &mut Code, add: (i32, i32), attributes: (u16, u16), ring: u8) {
    const { assert!(offset_of!(Segment, attributes) == offset_of!(Segment, selector) + 2) };
    for (segment, add, attributes) in [(CS, add.0, attributes.0), (SS, add.1, attributes.1)] {
        let at = offset_of!(Cpu, segments) + segment * size_of::<Segment>();
        code.with_mem(None, false, &[0x8d], R10, Mem::base(R11, add)); // lea r10d, [r11 + add]
        code.and32(R10, 0xffff);
        code.with_reg(false, &[0x81], 1, R10); // or r10d, imm32
        code.u32(u32::from(attributes) << 16 | u32::from(ring));
        code.store32(Mem::gs(at + offset_of!(Segment, selector)), R10);
        code.store_imm(Mem::gs(at + offset_of!(Segment, base)), 0);
        code.store32_imm(Mem::gs(at + offset_of!(Segment, limit)), -1);
        let unusable = Mem::gs(at + offset_of!(Segment, unusable));
        code.with_mem(None, false, &[0xc6], 0, unusable);
        code.byte(0);
    }
    code.with_mem(None, false, &[0xc6], 0, Mem::gs(offset_of!(Cpu, cpl)));
    code.byte(ring);
}

/// To the guest address in r10 by the table of one level.
fn go(code: &mut Code, user: bool) {
    code.with_reg(false, &[0x0f, 0xb7], R11, R10); // movzx r11d, r10w
    code.jmp_mem(Mem {
        base: None,
        index: Some((R11, 3)),
        disp: (level_offset(user) + offset_of!(Level, jump)) as i32,
        gs: true,
    });
}

/// SYSCALL and SYSRET to 64-bit code, as `system::branch` has them, where nothing else is to be done with them.
fn system_calls(code: &mut Code, stubs: &mut Stubs) {
    let msr = |offset: usize| Mem::gs(offset_of!(Cpu, system) + offset_of!(System, msr) + offset);
    let star = offset_of!(Msrs, star);
    stubs.syscall = code.here();
    code.store(gpr(RSP), RSP);
    code.load(RSP, Mem::gs(offset_of!(Cpu, host_rsp)));
    code.raw(&[0x9c, 0x41, 0x5a]); // pushfq; pop r10
    code.load(RSP, gpr(RSP));
    code.and32(R10, flag::NATIVE as u32);
    code.load32(R11, Mem::gs(offset_of!(Cpu, rflags)));
    code.and32(R11, !((flag::NATIVE | flag::RF) as u32));
    code.with_reg(false, &[0x09], R11, R10); // or r10d, r11d
    code.store(gpr(R11), R10);
    code.load32(R11, msr(offset_of!(Msrs, sfmask)));
    code.with_reg(false, &[0xf7], 2, R11); // not r11d
    code.with_reg(false, &[0x21], R11, R10); // and r10d, r11d
    code.with_reg(false, &[0x83], 1, R10); // or r10d, 2
    code.byte(flag::FIXED as u8);
    new_flags(code);
    code.load32(R11, msr(star + 4));
    code.and32(R11, 0xfffc);
    flat_segments(code, (0, 8), (flat::CODE64, flat::DATA), 0);
    code.load(R10, msr(offset_of!(Msrs, lstar)));
    go(code, false);

    stubs.sysret = code.here();
    code.store(Mem::gs(RETURN), R11);
    let mut rare = Vec::new();
    code.load32(R10, gpr(R11));
    code.with_reg(false, &[0xf7], 0, R10); // test r10d, imm32
    code.u32((flag::TF | flag::AC) as u32);
    rare.push(code.jcc(CC_NE));
    code.cmp32_mem_imm8(Mem::gs(offset_of!(Cpu, interrupt_waits)), 0);
    rare.push(code.jcc(CC_NE));
    code.with_mem(None, false, &[0x80], 7, Mem::gs(offset_of!(Cpu, cpl)));
    code.byte(0);
    rare.push(code.jcc(CC_NE));
    code.mov(R11, RCX);
    code.sar64(R11, 47);
    rare.push(code.jcc(CC_NE));
    code.and32(R10, SYSRET_FLAGS as u32);
    code.with_reg(false, &[0x83], 1, R10); // or r10d, 2
    code.byte(flag::FIXED as u8);
    new_flags(code);
    code.load32(R11, msr(star + 4));
    code.shr32(R11, 16);
    flat_segments(code, (16, 8), (flat::CODE64_USER, flat::DATA_USER), 3);
    code.mov(R10, RCX);
    go(code, true);
    for patch in rare {
        code.bind(patch);
    }
    code.load(R11, Mem::gs(RETURN));
    code.jmp_to(stubs.instruction);
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
    second_jump(&mut code, stubs.jump_miss);
    stubs.jump_gone = code.here();
    code.store(Mem::gs(offset_of!(Cpu, rip)), R10);
    let lea = code.lea_r11_rip();
    code.jmp_to(stubs.exit);
    code.bind(lea);
    code.u32(leave::INDIRECT | leave::SLOT);
    code.u32(0);

    stubs.memory = code.here();
    second_tlb(&mut code);
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

    system_calls(&mut code, &mut stubs);

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
