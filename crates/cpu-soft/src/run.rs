//! The run loop.

use crate::state::Cpu;

/// The translator's side of one CPU.
pub struct Engine {
    /// Host code that indirect jumps reach when their target is not in the table.
    pub(crate) jump_miss: u64,
}

pub(crate) fn jump_miss(cpu: &Cpu) -> u64 {
    if cpu.engine.is_null() {
        return 0;
    }
    // SAFETY: set for the CPU's life by its owner, which is on this thread.
    unsafe { (*cpu.engine).jump_miss }
}

impl Cpu {
    /// A store to guest RAM by Rust code: drops translated code of what it hits.
    pub(crate) fn note_store(&mut self, _gpa: u64, _va: u64) {}
}
