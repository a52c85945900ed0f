//! The software CPU: runs x86-64 guests on hosts without hardware virtualization, by translating guest code to host code.

pub mod clock;
pub mod machine;
pub mod mem;
pub mod run;
pub mod state;
pub mod system;
pub mod tlb;
