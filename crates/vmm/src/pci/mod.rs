//! PCI: one root bus with 32 slots of one function each (PCI Local Bus 3.0; PCI Express Base 4.0, 7.2.2 ECAM).
//!
//! A device implements [`PciDevice`] around a [`Function`], which keeps its configuration space, BARs and
//! MSI-X. The [`root::Root`] routes configuration accesses, and puts a device's BARs on the memory bus while
//! its command register lets it decode them.

pub mod function;
pub mod msix;
pub mod root;

pub use function::{Function, FunctionBuilder};
pub use msix::Msix;
pub use root::Root;

/// One PCI function.
pub trait PciDevice: Send + Sync {
    /// Its generic part.
    fn function(&self) -> &Function;
    /// An access to one of its own BARs (the MSI-X BAR is answered before).
    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]);
    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]);
    /// The guest is about to read configuration bytes; a device with a window there fills it first.
    fn before_config_read(&self, _offset: usize, _len: usize) {}
    /// The guest wrote configuration bytes.
    fn after_config_write(&self, _offset: usize, _len: usize) {}
}
