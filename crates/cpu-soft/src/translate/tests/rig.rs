//! The three executors of the property test: the host itself, the translator and the interpreter, on one state.
//! Guest RAM lies at the same address for all of them; the page tables map it one to one.

use std::sync::Arc;

use cpu::{CpuModel, GuestMemory, Vm, VmConfig};
use iced_x86::Instruction;
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

use crate::host;
use crate::state::{CS, Cpu, Fault, flag};
use crate::stubs;
use crate::system;
use crate::translate::emit::{Code, Mem};
use crate::translate::{GPR, SCRATCH};
use crate::vcpu::SoftVcpu;

pub const BASE: u64 = 0x4000_0000;
const SIZE: usize = 1 << 20;
/// Guest code (two pages), and the page where everything ends.
pub const CODE: u64 = BASE + 0x1_0000;
pub const END: u64 = BASE + 0x2_0000;
/// Data: three pages from `DATA - 0x1000` on; accesses around the border before the last, [`BORDER`].
pub const DATA: u64 = BASE + 0x4_0000;
pub const BORDER: u64 = DATA + 0x1000;
const TABLES: u64 = BASE + 0x8_0000;
/// Host code of native runs.
const NATIVE: u64 = BASE + 0x80_0000;

/// What the last page of the data allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page {
    Writable,
    ReadOnly,
    Absent,
}

/// How an instruction sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Through,
    /// Class of the exception, and the offset of the instruction that raised it.
    Fault(Class, u64),
}

/// Exceptions that the host's signals tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    Memory,
    Arithmetic,
    Undefined,
}

#[derive(Clone, PartialEq)]
pub struct State {
    pub gpr: [u64; 16],
    pub rflags: u64,
    pub ymm: [[u64; 4]; 16],
    pub mxcsr: u32,
    /// FXSAVE image: control, status, tag words and the eight registers count.
    pub x87: [u8; 512],
    pub data: Vec<u8>,
    pub fs: u64,
    pub gs: u64,
}

pub const DATA_LEN: usize = 0x3000;

pub struct Rig {
    pub vcpu: SoftVcpu,
    memory: *mut u8,
    native: *mut u8,
    stub: u64,
}

fn fixed(at: u64, len: usize, protection: i32) -> Option<*mut u8> {
    // SAFETY: a new mapping at an address that is refused when taken.
    let memory = unsafe {
        libc::mmap(
            at as *mut _,
            len,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    (memory as u64 == at).then_some(memory.cast())
}

/// A machine whose RAM is at [`BASE`]; `None` where the address is taken.
pub fn rig() -> Option<Rig> {
    let read_write = libc::PROT_READ | libc::PROT_WRITE;
    let (Some(memory), Some(native)) = (
        fixed(BASE, SIZE, read_write),
        fixed(NATIVE, 4096, read_write | libc::PROT_EXEC),
    ) else {
        eprintln!("SKIPPED: the test's fixed addresses are taken");
        return None;
    };
    // SAFETY: the mapping just made, never unmapped.
    let region =
        unsafe { MmapRegion::build_raw(memory, SIZE, read_write, libc::MAP_PRIVATE) }.ok()?;
    let region = GuestRegionMmap::new(region, GuestAddress(BASE))?;
    let vm = crate::SoftVm::new(&VmConfig {
        vcpus: 1,
        model: CpuModel::Max,
        code_cache: 16 << 20,
    })
    .ok()?;
    vm.set_memory(Arc::new(GuestMemory::from_regions(vec![region]).ok()?))
        .ok()?;
    let mut vcpu = vm.make(0).ok()?;
    let cpu = vcpu.cpu();
    cpu.segments[CS].attributes = 0xa09b;
    cpu.segments[crate::state::SS].attributes = 0xc093;
    cpu.xcr0 = 7;
    cpu.efer = system::cr::EFER_LMA | system::cr::EFER_LME | system::cr::EFER_SCE;
    cpu.cr3 = TABLES;
    cpu.cr4 = system::cr::CR4_PAE
        | system::cr::CR4_OSFXSR
        | system::cr::CR4_OSXMMEXCPT
        | system::cr::CR4_OSXSAVE;
    cpu.cr0 = system::cr::CR0_PE
        | system::cr::CR0_PG
        | system::cr::CR0_WP
        | system::cr::CR0_NE
        | system::cr::CR0_MP;
    let (_, _, stub) = cpu.place_of_code();
    let mut rig = Rig {
        vcpu,
        memory,
        native,
        stub,
    };
    let table = |n: u64| TABLES + n * 0x1000;
    rig.put(table(0), table(1) | 7);
    rig.put(table(1) + (BASE >> 30 & 511) * 8, table(2) | 7);
    rig.put(table(2) + (BASE >> 21 & 511) * 8, table(3) | 7);
    for n in 0..(SIZE / 4096) as u64 {
        rig.put(table(3) + n * 8, (BASE + n * 4096) | 0x67);
    }
    Some(rig)
}

impl Rig {
    fn at(&self, gpa: u64) -> *mut u8 {
        // SAFETY: callers name addresses of the mapping.
        unsafe { self.memory.add((gpa - BASE) as usize) }
    }

    fn put(&mut self, gpa: u64, value: u64) {
        // SAFETY: inside the mapping, eight-byte aligned.
        unsafe { self.at(gpa).cast::<u64>().write(value) };
    }

    /// What guest and host find at [`BORDER`].
    fn protect(&mut self, page: Page, host: bool) {
        let (bits, protection) = match page {
            Page::Writable => (0x67, libc::PROT_READ | libc::PROT_WRITE),
            Page::ReadOnly => (0x65, libc::PROT_READ),
            Page::Absent => (0x66, libc::PROT_NONE),
        };
        if host {
            // SAFETY: a page of the mapping, which nothing borrows.
            let done = unsafe { libc::mprotect(self.at(BORDER).cast(), 4096, protection) };
            assert_eq!(done, 0);
        } else {
            self.put(TABLES + 0x3000 + (BORDER >> 12 & 511) * 8, BORDER | bits);
            self.vcpu.cpu().flush_tlb_page(BORDER);
        }
    }

    fn set(&mut self, state: &State) {
        // SAFETY: inside the mapping; no other thread uses it.
        unsafe {
            std::ptr::copy_nonoverlapping(
                state.data.as_ptr(),
                self.at(DATA - 0x1000),
                state.data.len(),
            )
        };
        let cpu = self.vcpu.cpu();
        cpu.gpr = state.gpr;
        cpu.rflags = state.rflags;
        cpu.ymm = state.ymm;
        cpu.mxcsr = state.mxcsr;
        cpu.segments[crate::state::FS].base = state.fs;
        cpu.segments[crate::state::GS].base = state.gs;
        cpu.bounce.len = 0;
        cpu.interrupt_shadow = false;
        cpu.x87.0 = state.x87;
        cpu.x87_load();
    }

    fn get(&mut self) -> State {
        let mut data = vec![0u8; DATA_LEN];
        // SAFETY: as in `set`.
        unsafe {
            std::ptr::copy_nonoverlapping(self.at(DATA - 0x1000), data.as_mut_ptr(), data.len())
        };
        let cpu = self.vcpu.cpu();
        cpu.x87_store();
        let mut x87 = cpu.x87.0;
        // Opcode and pointers of the last instruction, MXCSR and the vector registers are not looked at here.
        x87[6..32].fill(0);
        for n in 0..8 {
            x87[32 + n * 16 + 10..48 + n * 16].fill(0);
        }
        x87[160..].fill(0);
        State {
            gpr: cpu.gpr,
            rflags: cpu.rflags & flag::NATIVE,
            ymm: cpu.ymm,
            mxcsr: cpu.mxcsr,
            x87,
            data,
            fs: 0,
            gs: 0,
        }
    }

    /// Runs the bytes, made for `start`, on the host. RIP-relative displacements are moved as the code is.
    pub fn natively(
        &mut self,
        bytes: &[u8],
        text: &[Instruction],
        start: u64,
        state: &State,
        page: Page,
    ) -> (State, End) {
        self.set(state);
        let (stubs, _) = self.vcpu.cpu().workbench();
        let mut code = Code::new(NATIVE);
        for r in [10u8, 11] {
            code.load(r, Mem::gs(GPR + usize::from(r) * 8));
        }
        let first = code.bytes.len();
        code.raw(bytes);
        let delta = start.wrapping_sub(NATIVE + first as u64) as u32;
        for i in text {
            if i.is_ip_rel_memory_operand() {
                let at = first + (i.ip() - start) as usize;
                let mut decoder = iced_x86::Decoder::new(
                    64,
                    &bytes[(i.ip() - start) as usize..],
                    iced_x86::DecoderOptions::NONE,
                );
                let again = decoder.decode();
                let offset = at + decoder.get_constant_offsets(&again).displacement_offset();
                let old = u32::from_le_bytes(code.bytes[offset..offset + 4].try_into().expect("4"));
                code.bytes[offset..offset + 4]
                    .copy_from_slice(&old.wrapping_add(delta).to_le_bytes());
            }
        }
        for r in [10u8, 11] {
            code.store(Mem::gs(GPR + usize::from(r) * 8), r);
        }
        code.raw(&[0x41, 0xbb]); // mov r11d, a descriptor's address that nobody looks at
        code.u32(0x1000);
        code.raw(&[0xff, 0x25, 0, 0, 0, 0]); // jmp [rip]
        code.raw(&stubs.exit.to_le_bytes());
        // SAFETY: one page of code memory of the rig's own.
        unsafe {
            std::ptr::copy_nonoverlapping(code.bytes.as_ptr(), self.native, code.bytes.len())
        };
        self.protect(page, true);
        host::set_code((NATIVE, NATIVE + 4096), self.stub);
        // SAFETY: the guard of the test set GS; the code was just written and leaves by the exit stub.
        let left = unsafe { stubs::enter(&stubs, NATIVE) };
        let (_, range, _) = self.vcpu.cpu().place_of_code();
        host::set_code(range, self.stub);
        self.protect(Page::Writable, true);
        let end = if left == stubs::TRAPPED {
            let cpu = self.vcpu.cpu();
            const { assert!(SCRATCH.is_multiple_of(8)) };
            (cpu.gpr[10], cpu.gpr[11]) = (cpu.scratch[4], cpu.scratch[5]);
            let trap = cpu.scratch[7];
            let class = match (trap >> 56) as i32 {
                libc::SIGFPE => Class::Arithmetic,
                libc::SIGILL => Class::Undefined,
                _ => Class::Memory,
            };
            End::Fault(
                class,
                (trap & ((1 << 56) - 1)).wrapping_sub(NATIVE + first as u64),
            )
        } else {
            End::Through
        };
        (self.get(), end)
    }

    pub fn load(&mut self, bytes: &[u8], start: u64) {
        let jump = END.wrapping_sub(start + bytes.len() as u64 + 5) as u32;
        // SAFETY: inside the mapping; sequences are much shorter than the pages behind `start`.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(start), bytes.len());
            let at = self.at(start + bytes.len() as u64);
            at.write(0xe9);
            at.add(1).cast::<u32>().write_unaligned(jump);
        }
        let cpu = self.vcpu.cpu();
        cpu.note_store(start);
        cpu.note_store(start + bytes.len() as u64 + 5);
    }

    /// The CPU before the first instruction of `bytes`.
    fn begin(&mut self, bytes: &[u8], start: u64, state: &State, page: Page) -> &mut Cpu {
        self.set(state);
        self.load(bytes, start);
        self.protect(page, false);
        let cpu = self.vcpu.cpu();
        cpu.rip = start;
        cpu
    }

    /// Runs the bytes in translated blocks, of one instruction each where `single`.
    pub fn translated(
        &mut self,
        bytes: &[u8],
        start: u64,
        state: &State,
        single: bool,
        page: Page,
    ) -> (State, End) {
        let cpu = self.begin(bytes, start, state, page);
        let end = match cpu.run_to(END, single) {
            Some(fault) => ended(fault, cpu.rip.wrapping_sub(start)),
            None => End::Through,
        };
        self.protect(Page::Writable, false);
        (self.get(), end)
    }

    /// Runs the bytes in the interpreter.
    pub fn interpreted(
        &mut self,
        bytes: &[u8],
        start: u64,
        state: &State,
        page: Page,
    ) -> (State, End) {
        let cpu = self.begin(bytes, start, state, page);
        let mut end = End::Through;
        while cpu.rip != END {
            if let Err(fault) = system::interpret(cpu) {
                end = ended(fault, cpu.rip.wrapping_sub(start));
                break;
            }
        }
        self.protect(Page::Writable, false);
        (self.get(), end)
    }
}

fn ended(fault: Fault, at: u64) -> End {
    let class = match fault.vector {
        0 | 16 | 19 => Class::Arithmetic,
        6 => Class::Undefined,
        _ => Class::Memory,
    };
    End::Fault(class, at)
}
