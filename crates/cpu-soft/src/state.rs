//! The state of one guest CPU, laid out so that translated code and Rust share it.
//!
//! Translated code reaches it off host GS ([`Frame`] is what GS points at). While translated code runs, fourteen
//! guest registers live in their host registers (all but r10 and r11), the arithmetic flags and DF in host EFLAGS, the vector registers and
//! MXCSR and x87 in the host's. On every entry into Rust the stubs store them here, so Rust code sees:
//!
//! | state | where, while Rust runs |
//! | --- | --- |
//! | general registers, rip, RFLAGS | [`Cpu::gpr`], [`Cpu::rip`], [`Cpu::rflags`] (complete) |
//! | XMM/YMM 0..=15, MXCSR | [`Cpu::ymm`], [`Cpu::mxcsr`] |
//! | x87 and MMX | still in the host's x87 unit: `fxsave64` / `fxrstor64` reach it (Rust code never uses x87) |

use std::cell::UnsafeCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use cpu::CpuIo;
use cpu::x86::{Segment, TableRegister};

use crate::machine::Machine;
use crate::system::System;

/// Segment numbers in the encoding's order, indexes of [`Cpu::segments`].
pub const ES: usize = 0;
pub const CS: usize = 1;
pub const SS: usize = 2;
pub const DS: usize = 3;
pub const FS: usize = 4;
pub const GS: usize = 5;

/// RFLAGS bits (SDM vol. 1, 3.4.3).
pub mod flag {
    pub const CF: u64 = 1 << 0;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The flags that host EFLAGS hold while translated code runs.
    pub const NATIVE: u64 = CF | PF | AF | ZF | SF | OF | DF;
}

/// An exception to be delivered to the guest (SDM vol. 3, 6.15).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    pub vector: u8,
    pub error: Option<u32>,
    /// Goes into CR2 when the vector is 14.
    pub address: u64,
}

impl Fault {
    pub const fn plain(vector: u8) -> Fault {
        Fault {
            vector,
            error: None,
            address: 0,
        }
    }
    pub const fn with_error(vector: u8, error: u32) -> Fault {
        Fault {
            vector,
            error: Some(error),
            address: 0,
        }
    }
    pub const DE: Fault = Fault::plain(0);
    pub const DB: Fault = Fault::plain(1);
    pub const BP: Fault = Fault::plain(3);
    pub const UD: Fault = Fault::plain(6);
    pub const NM: Fault = Fault::plain(7);
    pub const MF: Fault = Fault::plain(16);
    /// An unaligned access, where those are checked.
    pub const AC: Fault = Fault::with_error(17, 0);
    pub const XM: Fault = Fault::plain(19);
    /// General protection with error code 0.
    pub const GP: Fault = Fault::with_error(13, 0);
    pub const fn gp(error: u32) -> Fault {
        Fault::with_error(13, error)
    }
    pub const fn ss(error: u32) -> Fault {
        Fault::with_error(12, error)
    }
    pub const fn page(address: u64, error: u32) -> Fault {
        Fault {
            vector: 14,
            error: Some(error),
            address,
        }
    }
}

/// What an instruction executed in Rust asks of the run loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Go on; nothing that blocks depend on (privilege, paging, segment bases for non-FS/GS, mode) changed.
    Continue,
    /// Control state or rip changed: look the next block up anew, and poll interrupts first.
    EndBlock,
    /// HLT or MWAIT: sleep until an interrupt.
    Halt,
    /// A device asked for power-off or reset, or the guest shut its CPU down.
    Stop,
}

/// Why an access of guest memory is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Read,
    /// Also read-modify-write.
    Write,
    Fetch,
}

/// With whose rights an access of guest memory is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rights {
    /// Those of the current privilege level.
    Current,
    /// Implicit supervisor accesses: descriptor tables, TSS, delivery of exceptions into ring 0.
    Supervisor,
    /// As ring 3 would (delivery into or return to ring 3).
    User,
}

/// One guest CPU. Fields before `system` have fixed offsets that translated code uses.
#[repr(C, align(4096))]
pub struct Cpu {
    /// rax rcx rdx rbx rsp rbp rsi rdi r8..r15.
    pub gpr: [u64; 16],
    pub rip: u64,
    /// Complete while Rust runs; while translated code runs, [`flag::NATIVE`] bits here are stale.
    pub rflags: u64,
    /// Host stack pointer of the run loop's trampoline.
    pub host_rsp: u64,
    /// Scratch of stubs and translated code.
    pub scratch: [u64; 8],
    /// Non-zero: leave translated code at the next poll. Any thread may set it (see [`Mailbox`]).
    pub attention: AtomicU32,
    /// Non-zero: an interrupt waits for IF; set by the run loop, looked at by whatever sets IF.
    pub interrupt_waits: u32,
    /// Not zero where RFLAGS.DF is set; current while translated code runs.
    pub direction: u32,
    /// Current privilege level, 0 or 3 (1 and 2 are kept as the guest set them).
    pub cpl: u8,
    /// STI or MOV SS just ran: no interrupt before the next instruction ends.
    pub interrupt_shadow: bool,
    pub mxcsr: u32,
    /// MXCSR that Rust code runs with.
    pub host_mxcsr: u32,
    /// es cs ss ds fs gs.
    pub segments: [Segment; 6],
    pub ymm: [[u64; 4]; 16],
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub xcr0: u64,
    pub dr: [u64; 8],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: TableRegister,
    pub idtr: TableRegister,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    /// Guest TSC = host TSC + this.
    pub tsc_offset: u64,
    /// An access that could not be made in place: where it goes once the instruction has run (see `translate`).
    pub bounce: Bounce,
    /// All other CPUs wait outside of translated code until this one's access across pages is done.
    pub(crate) alone: bool,
    /// It ran, or was restored from one that did: time has begun for its guest.
    pub ran: bool,
    /// What the debug registers arm.
    pub debug: crate::system::debug::Debug,
    /// Instructions executed, counted only for [`crate::replay`].
    pub count: u64,
    /// Ticks that the counted clock skipped while the CPU was halted.
    pub(crate) skipped: u64,
    pub(crate) replay: Option<Box<crate::replay::Replay>>,
    /// An instruction in Rust or an exception just ended: where a counted run takes interrupts.
    pub(crate) open_point: bool,
    /// FXSAVE image of x87 and MMX state while no run is under way.
    pub x87: FxImage,
    /// The bus, valid while the run loop runs.
    pub(crate) io: Option<*mut (dyn CpuIo + 'static)>,
    /// The run loop's side: code cache, lookup, counters. Null in tests of single helpers.
    pub(crate) engine: *mut crate::run::Engine,
    pub machine: Arc<Machine>,
    pub mailbox: Arc<Mailbox>,
    /// This CPU's number and APIC id.
    pub id: u32,
    /// What the system side keeps: MSRs, local APIC, time.
    pub system: System,
}

/// An FXSAVE64 image (SDM vol. 1, 10.5.1).
#[derive(Clone)]
#[repr(C, align(64))]
pub struct FxImage(pub [u8; 512]);

impl FxImage {
    /// After FNINIT, with MXCSR 0x1f80.
    pub const fn reset() -> FxImage {
        let mut bytes = [0u8; 512];
        bytes[0] = 0x7f;
        bytes[1] = 0x03;
        bytes[24] = 0x80;
        bytes[25] = 0x1f;
        FxImage(bytes)
    }
}

/// See [`Cpu::bounce`].
#[repr(C, align(64))]
pub struct Bounce {
    pub data: [u8; 1024],
    pub address: u64,
    /// Zero: nothing to write back.
    pub len: u32,
    /// Where in `data` it lies.
    pub offset: u32,
}

/// What other threads may ask of one CPU. All fields are atomic; setting one is followed by [`Mailbox::ring`].
pub struct Mailbox {
    /// Interrupt vectors that arrived, moved into the APIC's IRR by its own CPU.
    pub interrupts: [AtomicU64; 4],
    /// Bits of [`request`].
    pub requests: AtomicU32,
    /// Vector of the last start-up message.
    pub sipi_vector: AtomicU32,
    /// Host TSC at which the CPU wants to be rung (0: never). Written by its own CPU through [`Mailbox::set_alarm`].
    pub alarm: AtomicU64,
    /// What senders of interrupts must know of this CPU's APIC.
    pub apic: crate::system::apic::Shared,
    /// Guest-physical bytes (address, length) whose translated code is to be dropped at the next safe point.
    pub(crate) stale: std::sync::Mutex<Vec<(u64, u64)>>,
    /// The CPU is in translated code, or in Rust called from there: its write entries may be in use.
    pub(crate) inside: std::sync::atomic::AtomicBool,
    /// Host pages that must lose their write entries before the CPU goes inside again.
    pub(crate) forbidden: std::sync::Mutex<Vec<u64>>,
    /// `forbidden` is not empty.
    pub(crate) forbids: std::sync::atomic::AtomicBool,
    /// Number + 1 of the guest-physical page that the CPU, inside, may be about to store to without a write entry.
    pub(crate) storing: AtomicU64,
    pub(crate) attention: crate::machine::AttentionPointer,
    pub(crate) sleeper: crate::machine::Sleeper,
}

/// Bits of [`Mailbox::requests`].
pub mod request {
    pub const KICK: u32 = 1;
    pub const NMI: u32 = 2;
    pub const INIT: u32 = 4;
    pub const SIPI: u32 = 8;
    /// Bring translated code up to date (another CPU changed code): served by the run loop.
    pub const SAFE_POINT: u32 = 16;
    /// The alarm time was reached.
    pub const ALARM: u32 = 32;
}

/// One entry of the inline look-aside buffers: `tag` is the page's virtual address, `host` the page's host address.
/// An empty entry has the tag of a page that belongs to another entry, so that nothing matches.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct TlbEntry {
    pub tag: u64,
    pub host: u64,
}

pub const TLB_ENTRIES: usize = 1024;
/// Entries of the table for indirect jumps: the low 16 bits of the target choose.
pub const JUMP_ENTRIES: usize = 65536;

/// Look-aside buffers of one privilege level.
#[repr(C)]
pub struct Level {
    pub read: [TlbEntry; TLB_ENTRIES],
    pub write: [TlbEntry; TLB_ENTRIES],
    /// Host code of indirect entries, by hash of the guest address.
    pub jump: [u64; JUMP_ENTRIES],
}

/// Entries of each of the second look-aside buffers.
pub const SECOND_TLB: usize = 4096;
/// Entries of [`Second::writers`].
pub const WRITERS: usize = 16384;
/// Several entries, perhaps of several pages.
pub const MANY_WRITERS: u16 = u16::MAX;
/// Entries of the second table for indirect jumps.
pub const SECOND_JUMPS: usize = 65536;

/// An indirect entry by its exact address, address space and level.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct JumpEntry {
    /// The guest address; for ring 3 exclusive-or [`Second::mix`].
    pub key: u64,
    pub host: u64,
}

/// Behind the tables that translated code looks into: larger ones, which the stubs look into before they call Rust, and which
/// outlive a change of the address space, as their entries carry its number. See [`crate::tlb`].
#[repr(C)]
pub struct Second {
    /// For each of (level, write), tags are page | context: 0 for global pages, else [`Second::context`].
    pub tlb: [[TlbEntry; SECOND_TLB]; 4],
    pub jump: [JumpEntry; SECOND_JUMPS],
    /// For each of (level, write): entries of the first buffers that are not of global pages.
    pub nonglobal: [[u64; TLB_ENTRIES / 64]; 4],
    /// Entries of [`Level::jump`] that are set, per level: how many, and which.
    pub listed: [u32; 2],
    pub list: [[u16; JUMP_ENTRIES]; 2],
    /// Number of the address space as it is now, of the CPU's own giving: 1..=[`crate::tlb::LAST_CONTEXT`].
    pub context: u64,
    /// The same in the bits of an address that are all alike, with a bit for ring 3.
    pub mix: u64,
    /// Numbers by PCID; 0: its translations were dropped.
    pub contexts: [u16; 4096],
    /// The last number given.
    pub given: u16,
    /// Where `tlb` lets a page of RAM be written, by [`crate::tlb::writer`] of the page: 0 nowhere, n in the entry n - 1
    /// (of ring 3 from [`SECOND_TLB`] on), or [`MANY_WRITERS`].
    pub writers: [u16; WRITERS],
}

/// What host GS points at.
#[repr(C, align(4096))]
pub struct Frame {
    pub cpu: UnsafeCell<Cpu>,
    /// Supervisor, then user.
    pub levels: UnsafeCell<[Level; 2]>,
    pub second: UnsafeCell<Second>,
}

impl Frame {
    /// A CPU with everything zero but what must not be: RFLAGS 2, MXCSR 0x1f80, x87 untouched, XCR0 1, buffers empty.
    /// The caller sets a start state ([`cpu::Vcpu::restore`]).
    pub fn new(id: u32, machine: Arc<Machine>, mailbox: Arc<Mailbox>) -> Box<Frame> {
        let system = System::new(&machine, id);
        let cpu = Cpu {
            gpr: [0; 16],
            rip: 0,
            rflags: flag::FIXED,
            host_rsp: 0,
            scratch: [0; 8],
            attention: AtomicU32::new(0),
            interrupt_waits: 0,
            direction: 0,
            cpl: 0,
            interrupt_shadow: false,
            mxcsr: 0x1f80,
            host_mxcsr: 0x1f80,
            segments: [Segment::default(); 6],
            ymm: [[0; 4]; 16],
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            dr: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: TableRegister::default(),
            idtr: TableRegister::default(),
            kernel_gs_base: 0,
            tsc_aux: 0,
            tsc_offset: 0,
            bounce: Bounce {
                data: [0; 1024],
                address: 0,
                len: 0,
                offset: 0,
            },
            alone: false,
            ran: false,
            debug: crate::system::debug::Debug::default(),
            count: 0,
            skipped: 0,
            replay: None,
            open_point: false,
            x87: FxImage::reset(),
            io: None,
            engine: std::ptr::null_mut(),
            machine,
            mailbox,
            id,
            system,
        };
        let mut frame = Box::<Frame>::new_uninit();
        let at = frame.as_mut_ptr();
        // SAFETY: all fields are written before the box is taken as initialised; `Level` and `Second` are plain integers,
        // for which all ones and zero are values (and all ones the tag of an empty entry).
        unsafe {
            (&raw mut (*at).cpu).write(UnsafeCell::new(cpu));
            (&raw mut (*at).levels).write_bytes(0xff, 1);
            (&raw mut (*at).second).write_bytes(0, 1);
            let mut frame = frame.assume_init();
            frame.cpu.get_mut().flush_tlb();
            frame
        }
    }
}
