//! The software CPU: runs x86-64 guests on hosts without hardware virtualization, by translating guest code to host code.
//!
//! [`run`] finds and runs blocks that [`translate`] makes; [`system`] holds what is done in Rust. See [`translate`] for
//! how guest state lies in host registers.
//!
//! Debugging: `BERTH_SOFT_MODE=single` translates one instruction at a time and never chains;
//! `BERTH_SOFT_MODE=short` chains blocks of one instruction;
//! `BERTH_SOFT_MODE=interpret` executes everything in the interpreter;
//! `BERTH_SOFT_MODE=profile` says at each return to the machine what left translated code;
//! `BERTH_SOFT_MODE=trace` writes a line with a hash of the registers for each block the run loop enters;
//! `record=FILE` and `replay=FILE` compare two runs ([`replay`]). Several may be given, with commas.

pub mod cache;
pub mod clock;
mod host;
mod index;
pub mod machine;
pub mod mem;
pub mod replay;
pub mod run;
mod saved;
pub mod state;
mod stubs;
pub mod system;
pub mod tlb;
pub mod translate;
mod vcpu;

pub use vcpu::{SoftVcpu, SoftVm};
