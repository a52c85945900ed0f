//! Hardware virtualization through KVM, as a back end of [`cpu::Vm`].
//!
//! The interrupt controllers are split (KVM_CAP_SPLIT_IRQCHIP): local APICs in the kernel, the IOAPIC in `vmm`.

mod cpuid;
mod lines;
mod probe;
mod state;
mod vcpu;
mod vm;

pub use probe::{Probe, probe};
pub use vm::KvmVm;

use cpu::CpuError;

/// Wraps an ioctl's error.
fn host(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> CpuError {
    move |error| CpuError::Host {
        what,
        source: std::io::Error::from_raw_os_error(error.errno()),
    }
}
