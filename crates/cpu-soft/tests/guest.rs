//! Small guests in long mode, through the public traits.

use std::sync::Arc;

use cpu::x86::{CpuState, Segment};
use cpu::{CpuIo, CpuModel, Exit, GuestMemory, Vcpu, Vm, VmConfig};
use cpu_soft::SoftVm;
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};

const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x20_0000;
const TABLES: u64 = 0x1000;

/// Collects writes to port 0xe9; port 0xf4 ends the machine.
#[derive(Default)]
struct Bus {
    written: Vec<u32>,
    stopped: bool,
    mmio: Vec<(u64, Vec<u8>)>,
}

impl CpuIo for Bus {
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) {
        data.fill(gpa as u8);
    }
    fn mmio_write(&mut self, gpa: u64, data: &[u8]) {
        self.mmio.push((gpa, data.to_vec()));
    }
    fn pio_read(&mut self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        if port == 0xf4 {
            self.stopped = true;
            return;
        }
        let mut value = [0u8; 4];
        value[..data.len()].copy_from_slice(data);
        self.written.push(u32::from_le_bytes(value));
    }
    fn eoi(&mut self, _: u8) {}
    fn stop_requested(&self) -> bool {
        self.stopped
    }
}

/// A CPU at `CODE` in ring 0 of long mode, the first gigabyte mapped one to one by large pages (the page after RAM is a device).
fn guest(program: impl FnOnce(&mut CodeAssembler)) -> (Box<dyn Vcpu>, Arc<GuestMemory>) {
    let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 8 << 20)]).expect("memory"));
    let vm = SoftVm::new(&VmConfig {
        vcpus: 1,
        model: CpuModel::Max,
        code_cache: 8 << 20,
    })
    .expect("vm");
    vm.set_memory(memory.clone()).expect("memory is set once");
    let put = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).expect("in RAM");
    put(TABLES, (TABLES + 0x1000) | 7);
    put(TABLES + 0x1000, (TABLES + 0x2000) | 7);
    for n in 0..512u64 {
        put(TABLES + 0x2000 + n * 8, (n << 21) | 0x87);
    }
    let mut a = CodeAssembler::new(64).expect("64 bits");
    program(&mut a);
    let code = a.assemble(CODE).expect("assembles");
    memory
        .write_slice(&code, GuestAddress(CODE))
        .expect("in RAM");
    let mut vcpu = vm.create_vcpu(0).expect("vcpu");
    let flat = |selector, attributes| Segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        attributes,
        unusable: false,
    };
    let mut state = CpuState {
        version: 1,
        rip: CODE,
        rflags: 2,
        cr0: 0x8000_0033,
        cr3: TABLES,
        cr4: 0x6a0,
        efer: 0x500,
        ..CpuState::default()
    };
    state.gpr[4] = STACK;
    state.segments = [flat(0x10, 0xc093); 6];
    state.segments[1] = flat(8, 0xa09b);
    state.tr = flat(0x18, 0x8b);
    vcpu.restore(&state).expect("a state of ours");
    (vcpu, memory)
}

fn end(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dx, 0xf4)?;
    a.out(dx, al)?;
    a.hlt()
}

fn run(vcpu: &mut dyn Vcpu) -> Bus {
    let mut bus = Bus::default();
    assert_eq!(vcpu.run(&mut bus).expect("runs"), Exit::Stopped);
    bus
}

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
    let (mut vcpu, _) = guest(|a| a.ud2().expect("assembles"));
    assert_eq!(
        vcpu.run(&mut Bus::default()).expect("runs"),
        Exit::TripleFault
    );
}
