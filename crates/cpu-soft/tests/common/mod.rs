//! A small machine: memory, page tables, a bus that collects what is written.
#![allow(dead_code)]

use std::sync::Arc;

use cpu::x86::{CpuState, Segment, TableRegister};
use cpu::{CpuIo, CpuModel, Exit, GuestMemory, Vcpu, Vm, VmConfig};
use cpu_soft::{SoftVcpu, SoftVm};
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};

pub const CODE: u64 = 0x10_0000;
pub const STACK: u64 = 0x20_0000;
pub const TABLES: u64 = 0x1000;
const GDT: u64 = 0x6000;
const IDT: u64 = 0x7000;

/// Collects writes to port 0xe9; port 0xf4 ends the machine.
#[derive(Default)]
pub struct Bus {
    pub written: Vec<u32>,
    pub stopped: bool,
    pub mmio: Vec<(u64, Vec<u8>)>,
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

/// A machine with 8 MiB, the first gigabyte mapped one to one by large pages (what lies behind RAM is a device), `code` at
/// [`CODE`], a GDT with flat segments, and an IDT whose gates lead to [`handler`].
pub fn machine(code: &[u8]) -> (SoftVm, Arc<GuestMemory>) {
    let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 8 << 20)]).expect("memory"));
    let vm = over(&memory);
    let put = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).expect("in RAM");
    put(TABLES, (TABLES + 0x1000) | 7);
    put(TABLES + 0x1000, (TABLES + 0x2000) | 7);
    for n in 0..512u64 {
        put(TABLES + 0x2000 + n * 8, (n << 21) | 0x87);
    }
    for (n, descriptor) in [0u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]
        .into_iter()
        .enumerate()
    {
        put(GDT + n as u64 * 8, descriptor);
    }
    for vector in 0..256u64 {
        let to = handler(vector as u8);
        put(
            IDT + vector * 16,
            to & 0xffff | 8 << 16 | 0x8e00 << 32 | (to >> 16 & 0xffff) << 48,
        );
        put(IDT + vector * 16 + 8, to >> 32);
        // Until a test puts something else there: stop.
        memory
            .write_slice(&[0x66, 0xba, 0xf4, 0, 0xee, 0xf4], GuestAddress(to))
            .expect("in RAM");
    }
    memory
        .write_slice(code, GuestAddress(CODE))
        .expect("in RAM");
    (vm, memory)
}

/// A machine over memory that is there already.
pub fn over(memory: &Arc<GuestMemory>) -> SoftVm {
    let vm = SoftVm::new(&VmConfig {
        vcpus: 1,
        model: CpuModel::Max,
        code_cache: 8 << 20,
    })
    .expect("vm");
    vm.set_memory(memory.clone()).expect("memory is set once");
    vm
}

/// Where the code for `vector` lies.
pub fn handler(vector: u8) -> u64 {
    0x8_0000 + u64::from(vector) * 0x100
}

/// What `program` assembles to, for `at`.
pub fn assemble(
    at: u64,
    program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("64 bits");
    program(&mut a).expect("assembles");
    a.assemble(at).expect("assembles")
}

/// The CPU of a machine, at [`CODE`] in ring 0 of long mode.
pub fn start(vm: &SoftVm) -> SoftVcpu {
    let mut vcpu = vm.make(0).expect("vcpu");
    vcpu.restore(&begin()).expect("a state of ours");
    vcpu
}

fn begin() -> CpuState {
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
        gdtr: TableRegister {
            base: GDT,
            limit: 23,
        },
        idtr: TableRegister {
            base: IDT,
            limit: 4095,
        },
        ..CpuState::default()
    };
    state.gpr[4] = STACK;
    state.segments = [flat(0x10, 0xc093); 6];
    state.segments[1] = flat(8, 0xa09b);
    state.tr = flat(0x18, 0x8b);
    state
}

/// A CPU about to run `program`.
pub fn guest(program: impl FnOnce(&mut CodeAssembler)) -> (Box<dyn Vcpu>, Arc<GuestMemory>) {
    let code = assemble(CODE, |a| {
        program(a);
        Ok(())
    });
    let (vm, memory) = machine(&code);
    (Box::new(start(&vm)), memory)
}

pub fn end(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dx, 0xf4)?;
    a.out(dx, al)?;
    a.hlt()
}

pub fn run(vcpu: &mut dyn Vcpu) -> Bus {
    let mut bus = Bus::default();
    assert_eq!(vcpu.run(&mut bus).expect("runs"), Exit::Stopped);
    bus
}
