//! Hardware virtualization through KVM, as a back end of [`cpu::Vm`].

mod probe;

pub use probe::{Probe, probe};
