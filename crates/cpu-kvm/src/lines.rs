//! The kernel's table of interrupt routes, and the lines that reach it without this process (irqfd).
//!
//! ```text
//!   IOAPIC pin 0..24 ──message──▶ route 0..24      for the end of level interrupts alone
//!   eventfd of a line ──KVM_IRQFD─▶ route 24..     KVM_IRQ_ROUTING_MSI ─▶ local APIC
//! ```
//!
//! The table is replaced as a whole (Linux `Documentation/virt/kvm/api.rst`, 4.52): one lock holds what is in it.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use cpu::{CpuError, MessageLine};
use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::host;

/// Pins of the IOAPIC.
pub(crate) const PINS: u32 = 24;
/// Routes that a kernel has room for, at least (KVM_MAX_IRQ_ROUTES is 4,096 since Linux 4.14).
const ROUTES: u32 = 1024;

/// Address and data of a message; a line without one has a number and no route.
type Message = Option<(u64, u32)>;

/// See the module.
pub(crate) struct Routes {
    vm: Arc<VmFd>,
    table: Mutex<BTreeMap<u32, Message>>,
}

impl Routes {
    pub(crate) fn new(vm: Arc<VmFd>) -> Arc<Routes> {
        Arc::new(Routes {
            vm,
            table: Mutex::default(),
        })
    }

    /// What a route sends from now on. Nothing is done where it does so already.
    pub(crate) fn set(&self, number: u32, message: Message) -> Result<(), CpuError> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let before = table.insert(number, message);
        if before.flatten() == message {
            return Ok(());
        }
        self.write(&table).inspect_err(|_| {
            table.insert(number, before.flatten());
        })
    }

    fn write(&self, table: &BTreeMap<u32, Message>) -> Result<(), CpuError> {
        let entries: Vec<kvm_irq_routing_entry> = table
            .iter()
            .filter_map(|(number, message)| {
                let (address, data) = (*message)?;
                let mut entry = kvm_irq_routing_entry {
                    gsi: *number,
                    type_: KVM_IRQ_ROUTING_MSI,
                    ..Default::default()
                };
                entry.u.msi.address_lo = address as u32;
                entry.u.msi.address_hi = (address >> 32) as u32;
                entry.u.msi.data = data;
                Some(entry)
            })
            .collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| CpuError::Broken("the interrupt routes do not fit".into()))?;
        self.vm
            .set_gsi_routing(&table)
            .map_err(host("routing interrupts"))
    }

    /// A number that no other line has.
    fn take(&self) -> Result<u32, CpuError> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let number = (PINS..ROUTES).find(|number| !table.contains_key(number));
        let number =
            number.ok_or_else(|| CpuError::Broken("all interrupt routes are taken".into()))?;
        table.insert(number, None);
        Ok(number)
    }

    fn let_go(&self, number: u32) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        // A route that nothing reaches any more does no harm; the next that is written leaves it out.
        table.remove(&number);
    }
}

/// One line.
pub(crate) struct KvmLine {
    routes: Arc<Routes>,
    number: u32,
    event: EventFd,
}

impl KvmLine {
    pub(crate) fn open(routes: &Arc<Routes>) -> Result<KvmLine, CpuError> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| CpuError::Host {
            what: "making an event",
            source,
        })?;
        let number = routes.take()?;
        let line = KvmLine {
            routes: routes.clone(),
            number,
            event,
        };
        routes
            .vm
            .register_irqfd(&line.event, number)
            .map_err(host("adding an interrupt line"))?;
        Ok(line)
    }
}

impl MessageLine for KvmLine {
    fn set_message(&self, address: u64, data: u32) -> Result<(), CpuError> {
        self.routes.set(self.number, Some((address, data)))
    }

    fn event(&self) -> BorrowedFd<'_> {
        // SAFETY: the event, whose descriptor this is, lives as long as the borrow of `self`.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }
}

impl Drop for KvmLine {
    fn drop(&mut self) {
        let _ = self.routes.vm.unregister_irqfd(&self.event, self.number);
        self.routes.let_go(self.number);
    }
}
