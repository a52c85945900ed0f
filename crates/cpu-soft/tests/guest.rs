//! Small guests in long mode, through the public traits.

mod common;

use common::*;
use cpu::{Exit, Vcpu};
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};

#[test]
fn a_loop_with_calls_and_memory_computes() {
    let (mut vcpu, _) = guest(|a| {
        let mut body = a.create_label();
        let mut function = a.create_label();
        let mut over = a.create_label();
        (|| {
            a.xor(eax, eax)?;
            a.mov(ecx, 1000)?;
            a.mov(r10, 0x30_0000u64)?;
            a.mov(qword_ptr(r10), 0)?;
            a.jmp(over)?;
            a.set_label(&mut function)?;
            a.add(qword_ptr(r10), rcx)?;
            a.ret()?;
            a.set_label(&mut over)?;
            a.nop()?;
            a.set_label(&mut body)?;
            a.call(function)?;
            a.dec(ecx)?;
            a.jnz(body)?;
            a.mov(eax, dword_ptr(r10))?;
            a.mov(dx, 0xe9)?;
            a.out(dx, eax)?;
            end(a)
        })()
        .expect("assembles");
    });
    assert_eq!(run(&mut *vcpu).written, [500_500]);
}

#[test]
fn code_that_rewrites_itself_runs_as_rewritten() {
    let (mut vcpu, _) = guest(|a| {
        let mut again = a.create_label();
        let mut patched = a.create_label();
        (|| {
            a.xor(ebx, ebx)?;
            a.mov(dx, 0xe9)?;
            a.set_label(&mut again)?;
            // The immediate of the very next instruction.
            a.lea(rsi, ptr(patched))?;
            a.mov(dword_ptr(rsi + 1), ebx)?;
            a.set_label(&mut patched)?;
            a.mov(eax, 0x7777_7777)?;
            a.out(dx, eax)?;
            a.inc(ebx)?;
            a.cmp(ebx, 5)?;
            a.jne(again)?;
            end(a)
        })()
        .expect("assembles");
    });
    assert_eq!(run(&mut *vcpu).written, [0, 1, 2, 3, 4]);
}

#[test]
fn devices_and_pages_borders_are_reached_by_any_instruction() {
    let (mut vcpu, memory) = guest(|a| {
        (|| {
            a.mov(rdi, 0x30_0ffcu64)?;
            a.mov(rax, 0x1122_3344_5566_7788u64)?;
            a.mov(qword_ptr(rdi), rax)?;
            a.add(qword_ptr(rdi), 1)?;
            a.mov(r11, 0x1000_0010u64)?;
            a.mov(dword_ptr(r11), 0xabcd)?;
            a.mov(al, byte_ptr(r11))?;
            a.movzx(eax, al)?;
            a.mov(dx, 0xe9)?;
            a.out(dx, eax)?;
            end(a)
        })()
        .expect("assembles");
    });
    let bus = run(&mut *vcpu);
    assert_eq!(bus.mmio, [(0x1000_0010, vec![0xcd, 0xab, 0, 0])]);
    assert_eq!(bus.written, [0x10]);
    assert_eq!(
        memory
            .read_obj::<u64>(GuestAddress(0x30_0ffc))
            .expect("in RAM"),
        0x1122_3344_5566_7789
    );
}

#[test]
fn a_kick_gets_out_of_an_endless_loop_and_the_loop_can_go_on() {
    let (mut vcpu, _) = guest(|a| {
        let mut body = a.create_label();
        (|| {
            a.set_label(&mut body)?;
            a.inc(rax)?;
            a.jmp(body)
        })()
        .expect("assembles");
    });
    for _ in 0..3 {
        let kick = vcpu.kicker();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            kick.kick();
        });
        assert_eq!(vcpu.run(&mut Bus::default()).expect("runs"), Exit::Kicked);
        thread.join().expect("kicker");
    }
    let state = vcpu.save().expect("saved");
    assert!(state.gpr[0] > 0 && (CODE..CODE + 16).contains(&state.rip));
}

#[test]
fn a_fault_without_handlers_is_a_triple_fault() {
    let code = assemble(CODE, |a| a.ud2());
    let (vm, _) = machine(&code);
    let mut vcpu = start(&vm);
    vcpu.cpu().idtr.limit = 0;
    assert_eq!(
        vcpu.run(&mut Bus::default()).expect("runs"),
        Exit::TripleFault
    );
}

/// Writes DR6 and the interrupted rip to the port, and goes on with RF set and TF clear.
fn debug_handler(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.push(rax)?;
    a.push(rdx)?;
    a.mov(dx, 0xe9)?;
    a.mov(rax, dr6)?;
    a.and(eax, 0xf00fu32 as i32)?;
    a.out(dx, eax)?;
    a.mov(eax, dword_ptr(rsp + 16))?;
    a.out(dx, eax)?;
    a.xor(eax, eax)?;
    a.mov(dr6, rax)?;
    a.or(dword_ptr(rsp + 32), 0x1_0000)?;
    a.and(dword_ptr(rsp + 32), !0x100)?;
    a.pop(rdx)?;
    a.pop(rax)?;
    a.iretq()
}

#[test]
fn breakpoints_of_the_debug_registers_stop_before_code_and_behind_writes() {
    let mut stops = Vec::new();
    let code = assemble(CODE, |a| {
        let mut here = a.create_label();
        a.mov(eax, 0x30_0010)?;
        a.mov(dr0, rax)?;
        a.lea(rax, ptr(here))?;
        a.mov(dr1, rax)?;
        // 0: four bytes written; 1: executed.
        a.mov(eax, 0x000d_000a)?;
        a.mov(dr7, rax)?;
        a.mov(ecx, 3)?;
        a.mov(rbx, 0x30_0000u64)?;
        a.mov(eax, dword_ptr(rbx + 0x10))?;
        a.mov(dword_ptr(rbx), eax)?;
        a.mov(dword_ptr(rbx + 0x12), ecx)?;
        a.nop()?;
        a.set_label(&mut here)?;
        a.nop()?;
        a.mov(edi, 0x30_000c)?;
        a.xor(eax, eax)?;
        a.rep().stosd()?;
        a.mov(dr7, rax)?;
        a.mov(dword_ptr(rbx + 0x10), ecx)?;
        a.pushfq()?;
        a.or(dword_ptr(rsp), 0x100)?;
        a.popfq()?;
        a.nop()?;
        end(a)
    });
    let mut decoder = iced_x86::Decoder::with_ip(64, &code, CODE, 0);
    let mut previous = 0u64;
    for i in &mut decoder {
        use iced_x86::Mnemonic as M;
        match i.mnemonic() {
            // Behind the write at +0x12, and at the code breakpoint.
            M::Nop if stops.len() < 2 => stops.push((1 << stops.len(), i.ip())),
            // Inside of it: the second of three elements was written.
            M::Stosd => stops.push((1, i.ip())),
            M::Popfq => previous = i.next_ip() + 1,
            _ => {}
        }
    }
    stops.push((1 << 14, previous));
    let (vm, memory) = machine(&code);
    memory
        .write_slice(
            &assemble(handler(1), debug_handler),
            GuestAddress(handler(1)),
        )
        .expect("in RAM");
    let bus = run(&mut start(&vm));
    let wanted: Vec<u32> = stops
        .iter()
        .flat_map(|(bits, rip)| [*bits as u32, *rip as u32])
        .collect();
    assert_eq!(bus.written, wanted, "{stops:x?}");
}

#[test]
fn unaligned_accesses_fault_in_ring_3_where_alignment_is_checked() {
    // Ring 3 code at CODE + 0x1000; AC and AM set.
    let user = assemble(CODE + 0x1000, |a| {
        a.mov(ebx, 0x30_0001)?;
        a.mov(al, byte_ptr(rbx))?;
        a.mov(eax, dword_ptr(rbx + 3))?;
        a.mov(eax, dword_ptr(rbx))?;
        a.ud2()
    });
    let code = assemble(CODE, |a| {
        a.mov(rax, cr0)?;
        a.or(eax, 1 << 18)?;
        a.mov(cr0, rax)?;
        a.push(0x23)?;
        a.push(0x28_0000)?;
        a.push(0x4_0002)?;
        a.push(0x2b)?;
        a.mov(eax, (CODE + 0x1000) as u32)?;
        a.push(rax)?;
        a.iretq()
    });
    let (vm, memory) = machine(&code);
    memory
        .write_slice(&user, GuestAddress(CODE + 0x1000))
        .expect("in RAM");
    // Ring 3 segments and a TSS with a ring 0 stack.
    for (at, value) in [
        (0x6020u64, 0x00cf_f300_0000_ffffu64),
        (0x6028, 0x00af_fb00_0000_ffff),
        (0x9004, STACK - 0x1000),
    ] {
        memory.write_obj(value, GuestAddress(at)).expect("in RAM");
    }
    let stop = assemble(handler(17), |a| {
        a.mov(dx, 0xe9)?;
        a.mov(eax, dword_ptr(rsp + 8))?;
        a.out(dx, eax)?;
        end(a)
    });
    memory
        .write_slice(&stop, GuestAddress(handler(17)))
        .expect("in RAM");
    let mut vcpu = start(&vm);
    vcpu.cpu().gdtr.limit = 0x2f;
    vcpu.cpu().tr.base = 0x9000;
    vcpu.cpu().tr.limit = 0x67;
    let at = iced_x86::Decoder::with_ip(64, &user, CODE + 0x1000, 0)
        .iter()
        .nth(3)
        .expect("five instructions")
        .ip();
    assert_eq!(run(&mut vcpu).written, [at as u32]);
}

#[test]
fn a_running_cpu_goes_on_elsewhere_after_save_and_restore() {
    let code = assemble(CODE, |a| {
        let mut body = a.create_label();
        a.mov(rbx, 0x30_0000u64)?;
        a.mov(ecx, 3_000_000)?;
        a.xor(eax, eax)?;
        a.movq(xmm3, rax)?;
        a.fld1()?;
        a.set_label(&mut body)?;
        a.add(eax, ecx)?;
        a.mov(qword_ptr(rbx), rax)?;
        a.paddd(xmm3, xmmword_ptr(rbx))?;
        a.dec(ecx)?;
        a.jnz(body)?;
        a.fistp(dword_ptr(rbx + 32))?;
        a.mov(dx, 0xe9)?;
        a.out(dx, eax)?;
        a.movd(eax, xmm3)?;
        a.out(dx, eax)?;
        a.mov(eax, dword_ptr(rbx + 32))?;
        a.out(dx, eax)?;
        end(a)
    });
    let (vm, _) = machine(&code);
    let wanted = run(&mut start(&vm)).written;
    let (vm, memory) = machine(&code);
    let mut vcpu = start(&vm);
    let mut moves = 0;
    loop {
        let kick = vcpu.kicker();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(2));
            kick.kick();
        });
        let mut bus = Bus::default();
        let exit = vcpu.run(&mut bus).expect("runs");
        thread.join().expect("kicker");
        if exit == Exit::Stopped {
            assert_eq!(bus.written, wanted);
            break;
        }
        let state = vcpu.save().expect("saved");
        vcpu = over(&memory).make(0).expect("another machine");
        vcpu.restore(&state).expect("its own state");
        let mut again = vcpu.save().expect("saved");
        // Only time goes on.
        (again.tsc, again.msrs) = (state.tsc, state.msrs.clone());
        assert_eq!(again, state);
        moves += 1;
    }
    eprintln!("{moves} moves");
}

/// SplitMix64.
fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*seed ^ (*seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[test]
fn random_bytes_as_code_neither_break_nor_hang_the_process() {
    let rounds: u64 = std::env::var("BERTH_ROUNDS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(150);
    let mut seed = std::env::var("BERTH_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(7u64);
    let (mut stopped, mut triple, mut kicked) = (0, 0, 0);
    for round in 0..rounds {
        let code: Vec<u8> = (0..8192).map(|_| random(&mut seed) as u8).collect();
        let (vm, memory) = machine(&code);
        for vector in 0..32u8 {
            // Handlers that drop what was interrupted and go on with other random bytes.
            let to = CODE + random(&mut seed) % 8192;
            let body = assemble(handler(vector), |a| {
                a.mov(rsp, STACK)?;
                a.mov(rax, to)?;
                a.jmp(rax)
            });
            memory
                .write_slice(&body, GuestAddress(handler(vector)))
                .expect("in RAM");
        }
        let mut vcpu = start(&vm);
        for g in 0..16 {
            if g != 4 {
                let value = random(&mut seed);
                vcpu.cpu().gpr[g] = if value & 1 == 0 {
                    0x30_0000 + (value >> 8 & 0xffff)
                } else {
                    value
                };
            }
        }
        if round % 2 == 1 {
            vcpu.cpu().rflags |= 0x200;
        }
        let kick = vcpu.kicker();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(8));
            kick.kick();
        });
        match vcpu
            .run(&mut Bus::default())
            .expect("a guest's code is no reason to break")
        {
            Exit::Stopped => stopped += 1,
            Exit::TripleFault => triple += 1,
            Exit::Kicked => kicked += 1,
        }
        thread.join().expect("kicker");
        let state = vcpu.save().expect("saved in any state");
        vcpu.restore(&state).expect("and restored");
    }
    eprintln!("{stopped} stopped, {triple} triple faults, {kicked} kicked");
}

#[test]
fn a_state_saved_before_the_first_instruction_leaves_the_guests_time_at_its_beginning() {
    let (vm, _) = machine(&assemble(CODE, end));
    let mut vcpu = start(&vm);
    let state = vcpu.save().expect("saved");
    assert_eq!(state.tsc, 0);
    vcpu.restore(&state).expect("restored");
    assert_eq!(vcpu.cpu().tsc_offset, 0, "as fast as the host's counter");
    run(&mut vcpu);
    assert_ne!(vcpu.save().expect("saved").tsc, 0);
}
