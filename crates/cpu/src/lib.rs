//! The line between a machine and the CPUs that run its guest.
//!
//! `vmm` drives these traits and knows no CPU; `cpu-kvm` and `cpu-soft` implement them and know no device.
//! Devices are reached by callbacks ([`CpuIo`]) and not by exits, because a translator needs the value of a
//! device read in the middle of a block.
//!
//! ```text
//!   vmm ──map_memory, signal_msi──▶ Vm                 (one per machine)
//!   vmm ──run(io)───────────────▶ Vcpu ──mmio/pio──▶ CpuIo (the bus, implemented by vmm)
//!   any thread ──kick────────────▶ Kick                (makes run() return Exit::Kicked)
//! ```
//!
//! The per-CPU interrupt controller (local APIC) belongs to the CPU back end; IOAPIC, PIC, PIT and RTC
//! are devices of `vmm`. Interrupts reach CPUs as messages: [`Vm::signal_msi`] (Intel SDM vol. 3, 11.11).

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

pub mod x86;

/// Guest RAM as every room shares it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// What failed in a CPU back end.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    #[error(
        "this host has no usable hardware virtualization: {0}. Use --cpu soft, or enable VT-x/AMD-V (or nested virtualization)"
    )]
    NoVirtualization(String),
    #[error("{what}: {source}")]
    Host {
        what: &'static str,
        source: std::io::Error,
    },
    #[error("the saved CPU state cannot be used: {0}")]
    State(String),
    #[error("the CPU cannot go on: {0}")]
    Broken(String),
}

/// Why [`Vcpu::run`] came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// [`Kick::kick`] was called; run may be called again.
    Kicked,
    /// Triple fault, or a shutdown by the guest's CPU: the machine's policy decides.
    TripleFault,
    /// A device asked for the machine to stop or reset during a callback (see [`CpuIo::stop_requested`]).
    Stopped,
}

/// Which CPU model is shown to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CpuModel {
    /// What the back end does best.
    #[default]
    Max,
    X86_64V2,
    X86_64V3,
}

/// How a machine's CPUs are made.
#[derive(Debug, Clone)]
pub struct VmConfig {
    pub vcpus: u32,
    pub model: CpuModel,
    /// Host bytes for translated code (software CPU only).
    pub code_cache: usize,
}

/// One machine's CPUs, memory map and interrupts.
pub trait Vm: Send + Sync {
    /// Name for people: `kvm` or `soft`.
    fn name(&self) -> &'static str;
    /// Makes `memory` the guest's physical RAM. Called once, before any vcpu.
    fn set_memory(&self, memory: Arc<GuestMemory>) -> Result<(), CpuError>;
    /// Makes vCPU `id` (also its APIC id). vCPU 0 starts in the state the loader sets; the others wait for INIT-SIPI.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, CpuError>;
    /// Delivers a message-signalled interrupt: address and data as the guest programmed them.
    /// Callable from any thread; wakes a halted CPU.
    fn signal_msi(&self, address: u64, data: u32) -> Result<(), CpuError>;
    /// What the IOAPIC's `pin` sends, `None` while it is masked: address and data as for [`Vm::signal_msi`]. A back
    /// end whose hardware ends interrupts by itself needs it, to report the level-triggered ones
    /// ([`CpuIo::eoi`]); others report every end.
    fn ioapic_route(&self, _pin: u32, _message: Option<(u64, u32)>) -> Result<(), CpuError> {
        Ok(())
    }
    /// Host-backed doorbells and interrupt lines, where the back end has them.
    fn doorbells(&self) -> Option<&dyn Doorbells> {
        None
    }
    /// Message lines, where the back end has them.
    fn message_lines(&self) -> Option<&dyn MessageLines> {
        None
    }
    /// Tells the CPUs that `[gpa, gpa+len)` was written behind their back (DMA), so that translated code of it
    /// is dropped. A no-op where the hardware sees to it.
    fn memory_written(&self, gpa: u64, len: u64);
    /// Pages written since the last call, one bit per 4 KiB page of RAM; `None` where tracking is off.
    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        None
    }
}

/// ioeventfd (KVM_IOEVENTFD): doorbells that do not come back to user space's vCPU thread.
pub trait Doorbells {
    /// A guest write of `len` bytes (0: any) at `gpa` makes the eventfd readable and does not reach the bus.
    fn add_doorbell(&self, gpa: u64, len: u32, event: BorrowedFd<'_>) -> Result<(), CpuError>;
    fn remove_doorbell(&self, gpa: u64, len: u32, event: BorrowedFd<'_>) -> Result<(), CpuError>;
}

/// irqfd (KVM_IRQFD): interrupt messages that the host's kernel sends by itself as soon as an event is written.
pub trait MessageLines {
    /// A line of its own, which sends nothing yet.
    ///
    /// # Errors
    /// Where the host has no further one; [`Vm::signal_msi`] serves then.
    fn open_line(&self) -> Result<Arc<dyn MessageLine>, CpuError>;
}

/// One line of [`MessageLines`]; it is gone when it is dropped.
pub trait MessageLine: Send + Sync {
    /// What it sends from now on: address and data as for [`Vm::signal_msi`].
    fn set_message(&self, address: u64, data: u32) -> Result<(), CpuError>;
    /// Writing it (an eventfd) sends the message.
    fn event(&self) -> BorrowedFd<'_>;
}

/// Tracking of written pages, for snapshots and live migration.
pub trait DirtyLog {
    fn start(&self) -> Result<(), CpuError>;
    fn take(&self) -> Result<Vec<u64>, CpuError>;
    fn stop(&self) -> Result<(), CpuError>;
}

/// One guest CPU. It is moved to its own host thread, which calls [`Vcpu::run`] in a loop.
pub trait Vcpu: Send {
    /// Runs guest code until there is a reason to come back. A halted CPU sleeps inside.
    fn run(&mut self, io: &mut dyn CpuIo) -> Result<Exit, CpuError>;
    /// A handle that makes [`Vcpu::run`] return [`Exit::Kicked`] soon, from any thread.
    fn kicker(&self) -> Arc<dyn Kick>;
    /// The architectural state, in our own versioned form.
    fn save(&mut self) -> Result<x86::CpuState, CpuError>;
    fn restore(&mut self, state: &x86::CpuState) -> Result<(), CpuError>;
    /// Guest-virtual to guest-physical, as a supervisor read would see it.
    fn translate(&mut self, gva: u64) -> Option<u64>;
    /// Counters for `inspect` (blocks translated, exits by kind …), name and value.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// See [`Vcpu::kicker`].
pub trait Kick: Send + Sync {
    fn kick(&self);
}

/// The bus as a CPU sees it. `data.len()` is 1, 2, 4 or 8. Reads of nothing give all ones.
pub trait CpuIo {
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]);
    fn mmio_write(&mut self, gpa: u64, data: &[u8]);
    fn pio_read(&mut self, port: u16, data: &mut [u8]);
    fn pio_write(&mut self, port: u16, data: &[u8]);
    /// The guest ended a level-triggered interrupt (directed to the IOAPIC).
    fn eoi(&mut self, vector: u8);
    /// An interrupt of the old PIC waits: its vector, taken by this call.
    fn pic_interrupt(&mut self) -> Option<u8> {
        None
    }
    /// True once a device asked for power-off or reset: [`Vcpu::run`] then returns [`Exit::Stopped`].
    fn stop_requested(&self) -> bool;
}
