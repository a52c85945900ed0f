//! A guest's run recorded in chained blocks, followed by one of single instructions and one in the interpreter. Alone in its
//! program, since a counted clock and its log are of one CPU.

mod common;

use common::*;
use cpu::Vcpu;
use cpu_soft::replay::Options;
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};

/// Calls, loops, pushes in groups, page borders, strings, vectors, a device, faults.
fn program(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut function = a.create_label();
    let mut body = a.create_label();
    let mut over = a.create_label();
    a.mov(rbx, 0x30_0fe0u64)?;
    a.mov(r12, 0x1000_0000u64)?;
    a.mov(ecx, 2000)?;
    a.xor(eax, eax)?;
    a.jmp(body)?;
    a.set_label(&mut function)?;
    a.push(rbx)?;
    a.push(r10)?;
    a.push(rcx)?;
    a.mov(rdx, qword_ptr(rbx))?;
    a.add(rdx, qword_ptr(rbx + 8))?;
    a.mov(qword_ptr(rbx + 0x1c), rdx)?;
    a.lea(r10, ptr(rdx + rcx * 4))?;
    a.pop(rcx)?;
    a.add(rax, r10)?;
    a.pop(r10)?;
    a.pop(rbx)?;
    a.ret()?;
    a.set_label(&mut body)?;
    a.call(function)?;
    a.adc(rax, rcx)?;
    a.movq(xmm1, rax)?;
    a.paddq(xmm2, xmm1)?;
    a.lea(rsi, ptr(rbx))?;
    a.lea(rdi, ptr(rbx + 0x100))?;
    a.mov(r8d, ecx)?;
    a.mov(ecx, 24)?;
    a.rep().movsb()?;
    a.mov(ecx, r8d)?;
    a.test(ecx, 63)?;
    a.jnz(over)?;
    a.add(al, byte_ptr(r12))?;
    a.rdtsc()?;
    a.mov(r9, rax)?;
    a.ud2()?;
    a.set_label(&mut over)?;
    a.dec(ecx)?;
    a.jnz(body)?;
    a.movq(rax, xmm2)?;
    a.mov(dx, 0xe9)?;
    a.out(dx, eax)?;
    end(a)
}

#[test]
fn three_modes_pass_through_the_same_states_and_a_difference_is_found() {
    let code = assemble(CODE, program);
    // Goes on behind the two bytes of UD2.
    let skip = assemble(handler(6), |a| {
        a.add(qword_ptr(rsp), 2)?;
        a.iretq()
    });
    let log = std::env::temp_dir().join(format!("berth-replay-{}", std::process::id()));
    let log = log.to_str().expect("a plain name").to_owned();
    let attempt = |words: String, value: u64| {
        let (vm, memory) = machine(&code);
        memory
            .write_slice(&skip, GuestAddress(handler(6)))
            .expect("in RAM");
        memory
            .write_obj(value, GuestAddress(0x30_0fe0))
            .expect("in RAM");
        let mut vcpu = start(&vm);
        vcpu.debug(&Options::parse(&words).expect("known words"))
            .expect("a log");
        let mut bus = Bus::default();
        vcpu.run(&mut bus).map(|_| bus.written)
    };
    let recorded = attempt(format!("record={log},every=16"), 5).expect("runs");
    for mode in ["single", "interpret"] {
        let followed =
            attempt(format!("replay={log},every=16,{mode}"), 5).expect("the same states");
        assert_eq!(followed, recorded);
    }
    let differs = attempt(format!("replay={log},every=16,single"), 6).expect_err("another state");
    assert!(differs.to_string().contains("states differ"), "{differs}");
    std::fs::remove_file(&log).expect("the log is there");
}
