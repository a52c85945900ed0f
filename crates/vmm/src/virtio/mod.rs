//! Virtio 1.2 over PCI.
//!
//! ```text
//!   CPU thread: notify ─▶ eventfd (with KVM: straight from the kernel)
//!                            └─▶ the device's thread: Backend::serve(queue) ─▶ chains ─▶ used ring ─▶ interrupt
//! ```
//!
//! A [`Backend`] is what one kind of device does; [`transport::Transport`] is everything else: configuration
//! space, features, status, queues, threads, interrupts, saved state.

pub mod balloon;
pub mod block;
pub mod console;
pub mod net;
pub mod queue;
pub mod rng;
pub mod transport;
pub mod vsock;

use std::os::fd::BorrowedFd;

pub use queue::{Chain, Queue, QueueError};
pub use transport::Transport;

use crate::memory::Dma;
use crate::process::jail::Thread;

/// Feature bits of every device (section 6).
pub mod feature {
    pub const INDIRECT: u64 = 1 << 28;
    pub const EVENT_INDEX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
}

/// The queues of a running device, as its backend reaches them. Chains that were given back are told to the
/// guest when the backend returns.
pub struct Queues<'a> {
    pub dma: &'a Dma,
    pub(crate) slots: &'a [transport::QueueSlot],
    /// What the driver accepted.
    pub features: u64,
    pub(crate) tell: &'a (dyn Fn(usize) + Sync),
}

impl Queues<'_> {
    /// Works on one queue, locked. A queue that is not enabled has no chains.
    pub fn with<T>(
        &self,
        index: usize,
        work: impl FnOnce(&mut Queue, &Dma) -> Result<T, QueueError>,
    ) -> Result<T, QueueError> {
        let mut queue = self.slots[index].lock();
        work(&mut queue, self.dma)
    }

    /// Tells the guest at once of chains given back on queue `index`, which must not be locked: for a backend that works
    /// on for a while.
    pub fn tell(&self, index: usize) {
        (self.tell)(index);
    }

    /// Serves queue `index` again after the others of its thread: for a backend that stopped before it was empty.
    pub fn again(&self, index: usize) {
        self.slots[index].notify();
    }
}

/// What one kind of device does with its queues.
pub trait Backend: Send + Sync {
    /// Device type (section 5): 1 network, 2 block …
    fn kind(&self) -> u16;
    /// PCI class code, as 0x020000.
    fn class(&self) -> u32;
    /// Offered features beyond those of the transport.
    fn features(&self) -> u64;
    /// The size of each queue.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Reads the device's own configuration; bytes past its end read as zeros.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    fn write_config(&self, _offset: u64, _data: &[u8]) {}
    /// What its threads do, which says what they may ask of the host.
    fn thread(&self) -> Thread {
        Thread::Io
    }
    /// Which queues are served by one thread each; every queue in exactly one.
    fn threads(&self) -> Vec<Vec<usize>> {
        vec![(0..self.queue_sizes().len()).collect()]
    }
    /// Serves queue `index`, which the guest notified, until it is empty.
    fn serve(&self, index: usize, queues: &Queues<'_>) -> Result<(), QueueError>;
    /// A descriptor that thread `thread` also waits on, while the backend wants input from it.
    fn event_source(&self, _thread: usize) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Whether its requests follow one another so closely that looking for the next one is cheaper than a sleep.
    fn is_brisk(&self) -> bool {
        false
    }
    /// That descriptor has input.
    fn serve_event(&self, _thread: usize, _queues: &Queues<'_>) -> Result<(), QueueError> {
        Ok(())
    }
    /// Returns when no chain is held outside of the queues. For a pause; the device's threads rest.
    fn drain(&self, _queues: &Queues<'_>) -> Result<(), QueueError> {
        Ok(())
    }
    /// The driver is ready, with these features.
    fn start(&self, _features: u64) {}
    /// Whether a driver that has just become ready is told to look at the configuration: some read it only then.
    fn tells_config_at_start(&self) -> bool {
        false
    }
    /// The device was reset: no chain is held any more.
    fn reset(&self) {}
    /// What of the backend itself is saved.
    fn save(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
    /// # Errors
    /// What is wrong with the state.
    fn restore(&self, _state: &serde_json::Value) -> Result<(), String> {
        Ok(())
    }
    /// Everything is written out; the device is not used again.
    fn close(&self) {}
}

/// Copies the part of `config` at `offset` into `data`, zeros past its end.
pub(crate) fn config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    for (at, byte) in (offset as usize..).zip(data) {
        *byte = config.get(at).copied().unwrap_or(0);
    }
}

#[cfg(test)]
mod tests;
