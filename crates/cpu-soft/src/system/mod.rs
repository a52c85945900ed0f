//! What the processor does apart from computing: paging, exceptions, interrupts, control registers, time.
//!
//! The run loop calls:
//! - [`execute`] for every instruction in 64-bit mode that is not translated (rip at the instruction on entry; on success
//!   at the next one or the target; on `Err` nothing has changed, except REP progress);
//! - [`interpret`] for one instruction in any mode (fetch, decode, execute);
//! - [`deliver`] for faults, [`poll_interrupts`] between blocks when `attention` was raised or IF was set;
//! - [`save()`] and [`restore()`] for the registers that only this side knows.
//!
//! STI and MOV SS set [`Cpu::interrupt_shadow`]; while it is set [`poll_interrupts`] delivers nothing. The run loop takes
//! it when it starts the next instruction, runs that one alone, and polls again.
//!
//! A halted CPU, or one that waits for its start-up message, has its [`System::activity`] say so; [`wakes`] and the
//! result of [`poll_interrupts`] end that.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cpu::x86::Activity;
use iced_x86::Instruction;

use crate::machine::Machine;
use crate::state::{Cpu, Fault, Flow, flag, request};

pub mod apic;
pub(crate) mod branch;
mod control;
pub mod cpuid;
pub mod cr;
pub mod debug;
mod exceptions;
pub mod fpu;
pub mod interp;
pub mod message;
pub mod msr;
pub mod paging;
mod port;
mod registers;
mod save;
pub mod segment;
mod stack;
mod strings;

pub use save::{restore, save};

/// State of the system side that translated code never touches.
pub struct System {
    pub activity: Activity,
    pub apic: apic::Apic,
    pub msr: msr::Msrs,
    pub cpuid: Arc<cpuid::Cpuid>,
    pub nmi_pending: bool,
    /// From the delivery of an NMI to the next IRET.
    pub nmi_masked: bool,
    /// Code of instructions run natively one by one; made when first needed.
    pub(crate) stubs: Option<interp::native::Stubs>,
    /// PAUSE instructions, counted where the machine has other CPUs.
    pauses: u32,
}

impl Cpu {
    /// PAUSE: now and then the host's processor goes to whoever this CPU may be waiting for.
    pub(crate) fn pause(&mut self) {
        if self.machine.vcpus > 1 {
            self.system.pauses = self.system.pauses.wrapping_add(1);
            if self.system.pauses.is_multiple_of(16) {
                std::thread::yield_now();
            }
        }
    }
}

impl System {
    /// The system side of CPU `id`.
    pub fn new(machine: &Machine, id: u32) -> System {
        msr::clock_zero();
        System {
            activity: if id == 0 {
                Activity::Running
            } else {
                Activity::WaitForSipi
            },
            apic: apic::Apic::new(id),
            msr: msr::Msrs::default(),
            cpuid: Arc::new(cpuid::Cpuid::new(
                machine.model,
                machine.vcpus,
                crate::clock::tsc_hz(),
            )),
            nmi_pending: false,
            nmi_masked: false,
            stubs: None,
            pauses: 0,
        }
    }
}

/// A fault came up while a double fault was delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TripleFault;

/// Executes one decoded instruction.
pub fn execute(cpu: &mut Cpu, instruction: &Instruction) -> Result<Flow, Fault> {
    if instruction.is_invalid() {
        return Err(Fault::UD);
    }
    if let Some(flow) = control::execute(cpu, instruction)? {
        return Ok(flow);
    }
    if let Some(flow) = strings::execute(cpu, instruction)? {
        return Ok(flow);
    }
    if let Some(flow) = interp::integer::execute(cpu, instruction)? {
        return Ok(flow);
    }
    if let Some(flow) = fpu::execute(cpu, instruction)? {
        return Ok(flow);
    }
    if let Some(flow) = interp::native::execute(cpu, instruction)? {
        return Ok(flow);
    }
    tracing::warn!(
        "instruction not known at {:#x}: {:?}",
        cpu.rip,
        instruction.code()
    );
    Err(Fault::UD)
}

/// Executes the instruction at rip, whatever the mode. The single-step trap is the run loop's.
pub fn interpret(cpu: &mut Cpu) -> Result<Flow, Fault> {
    let instruction = interp::fetch(cpu)?;
    execute(cpu, &instruction)
}

/// Delivers an exception through the guest's IDT.
pub fn deliver(cpu: &mut Cpu, fault: Fault) -> Result<(), TripleFault> {
    exceptions::deliver(cpu, fault)
}

/// Takes the mailbox in, and delivers the highest pending interrupt where RFLAGS.IF and the shadow allow.
/// Sets [`Cpu::interrupt_waits`] where one waits for IF. `Ok(true)`: something was delivered (or INIT/SIPI taken).
pub fn poll_interrupts(cpu: &mut Cpu) -> Result<bool, TripleFault> {
    let requests = apic::take_mail(cpu);
    apic::tick(cpu);
    let mut restarted = false;
    if requests & request::INIT != 0 {
        save::initialize(cpu);
        cpu.system.activity = if cpu.id == 0 {
            Activity::Running
        } else {
            Activity::WaitForSipi
        };
        restarted = true;
    }
    if requests & request::SIPI != 0 && cpu.system.activity == Activity::WaitForSipi {
        let vector = cpu.mailbox.sipi_vector.load(Ordering::SeqCst) as u8;
        save::initialize(cpu);
        save::start_up(cpu, vector);
        restarted = true;
    }
    if requests & request::NMI != 0 {
        cpu.system.nmi_pending = true;
    }
    if restarted || cpu.system.activity == Activity::WaitForSipi {
        return Ok(restarted);
    }
    if cpu.interrupt_shadow {
        return Ok(false);
    }
    if cpu.system.nmi_pending && !cpu.system.nmi_masked {
        cpu.system.nmi_pending = false;
        cpu.system.nmi_masked = true;
        exceptions::deliver_interrupt(cpu, 2)?;
        return Ok(true);
    }
    if cpu.rflags & flag::IF != 0
        && let Some(vector) = apic::accept(cpu)
    {
        exceptions::deliver_interrupt(cpu, vector)?;
        cpu.interrupt_waits = u32::from(apic::waits(cpu));
        return Ok(true);
    }
    cpu.interrupt_waits = u32::from(apic::waits(cpu));
    Ok(false)
}

/// True where a halted CPU has a reason to wake (after the mailbox was taken in).
pub fn wakes(cpu: &Cpu) -> bool {
    apic::wakes(cpu)
}

/// Sends an interrupt message of a device to the CPUs it names.
pub fn signal_msi(machine: &Machine, address: u64, data: u32) {
    match apic::Message::from_msi(address, data) {
        Some(message) => _ = apic::send(machine, message, None),
        None => tracing::debug!("message {data:#x} to {address:#x} is no interrupt"),
    }
}

/// Local APIC in xAPIC mode; false: not its page.
pub(crate) fn apic_read(cpu: &mut Cpu, gpa: u64, out: &mut [u8]) -> bool {
    apic::page_read(cpu, gpa, out)
}

/// As [`apic_read`].
pub(crate) fn apic_write(cpu: &mut Cpu, gpa: u64, data: &[u8]) -> bool {
    apic::page_write(cpu, gpa, data)
}

#[cfg(test)]
mod tests;
