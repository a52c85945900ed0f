//! The machine: guest memory, buses, devices, boot loaders and the run loop, above any CPU that implements
//! [`cpu::Vm`].
//!
//! ```text
//!   boot ─▶ machine ─▶ bus ─▶ devices, pci ─▶ irq lines, messages ─▶ cpu::Vm
//!              └─▶ control (run, pause, end)      memory (RAM, DMA)
//! ```

pub mod acpi;
pub mod boot;
pub mod bus;
mod carrier;
mod complaint;
pub mod control;
pub mod crash;
mod defect;
pub mod devices;
pub mod fuzz;
pub mod machine;
pub mod memory;
pub mod nvme;
pub mod pci;
mod pool;
pub mod process;
pub mod state;
pub mod terminal;
pub mod virtio;
