//! What the processor does apart from computing: paging, exceptions, interrupts, control registers, time.
//!
//! The run loop calls:
//! - [`execute`] for every instruction in 64-bit mode that is not translated (rip at the instruction on entry; on success
//!   at the next one or the target; on `Err` nothing has changed, except REP progress);
//! - [`interpret`] for one instruction in 16-bit, 32-bit or compatibility mode (fetch, decode, execute);
//! - [`deliver`] for faults, [`poll_interrupts`] between blocks when `attention` was raised or IF was set.

use iced_x86::Instruction;

use crate::state::{Cpu, Fault, Flow};

pub mod paging;

/// State of the system side that translated code never touches.
#[derive(Default)]
pub struct System {}

/// A fault came up while a double fault was delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TripleFault;

/// Executes one decoded instruction.
pub fn execute(cpu: &mut Cpu, instruction: &Instruction) -> Result<Flow, Fault> {
    let _ = (cpu, instruction);
    Err(Fault::UD)
}

/// Executes the instruction at rip outside 64-bit mode.
pub fn interpret(cpu: &mut Cpu) -> Result<Flow, Fault> {
    let _ = cpu;
    Err(Fault::UD)
}

/// Delivers an exception through the guest's IDT.
pub fn deliver(cpu: &mut Cpu, fault: Fault) -> Result<(), TripleFault> {
    let _ = (cpu, fault);
    Err(TripleFault)
}

/// Takes the mailbox in, and delivers the highest pending interrupt where RFLAGS.IF and the shadow allow.
/// Sets [`Cpu::interrupt_waits`] where one waits for IF. `Ok(true)`: something was delivered (or INIT/SIPI taken).
pub fn poll_interrupts(cpu: &mut Cpu) -> Result<bool, TripleFault> {
    let _ = cpu;
    Ok(false)
}

/// True where a halted CPU has a reason to wake (after the mailbox was taken in).
pub fn wakes(cpu: &Cpu) -> bool {
    let _ = cpu;
    false
}

/// Local APIC in xAPIC mode; false: not its page.
pub(crate) fn apic_read(cpu: &mut Cpu, gpa: u64, out: &mut [u8]) -> bool {
    let _ = (cpu, gpa, out);
    false
}

/// As [`apic_read`].
pub(crate) fn apic_write(cpu: &mut Cpu, gpa: u64, data: &[u8]) -> bool {
    let _ = (cpu, gpa, data);
    false
}
