//! The PCI transport (section 4.1) and the threads of a device.
//!
//! ```text
//!   BAR 0:  0x0000 common configuration   0x1000 interrupt status
//!           0x2000 device configuration   0x3000 notifications, four bytes for each queue
//!   BAR 4:  MSI-X
//! ```
//!
//! Lock order: the gate, the common state, one queue, then (in the backend) the backend's own. The interrupt status is taken
//! with none of them. A guest's reset
//! takes each queue's lock and so waits for a thread that is serving it.

mod gate;
mod registers;
mod watch;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cpu::Vm;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use serde::{Deserialize, Serialize};

use self::gate::Gate;
use self::watch::Watch;
use super::queue::{Queue, QueueError};
use super::{Backend, Queues, feature};
use crate::complaint::Complaint;
use crate::memory::Dma;
use crate::pci::function::FunctionState;
use crate::pci::{Function, FunctionBuilder, PciDevice};
use crate::state::{Persist, Saved, StateError};

const VENDOR: u16 = 0x1af4;
const BAR_LEN: u64 = 0x4000;
const ISR_AT: u64 = 0x1000;
const DEVICE_AT: u64 = 0x2000;
const NOTIFY_AT: u64 = 0x3000;
const NOTIFY_STEP: u64 = 4;
const MSIX_BAR: u8 = 4;
const NO_VECTOR: u16 = 0xffff;

const CAPABILITY_VENDOR: u8 = 0x09;
const CONFIG_ACCESS: u8 = 5;

const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 64;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// A queue with its lock and the event that notifies it.
pub(crate) struct QueueSlot {
    queue: Mutex<Queue>,
    event: OwnedFd,
}

impl QueueSlot {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn notify(&self) {
        // Full means that it is notified already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Common {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    status: u8,
    generation: u8,
    queue_select: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedTransport {
    function: FunctionState,
    common: Common,
    isr: u8,
    queues: Vec<Queue>,
    backend: serde_json::Value,
}

struct Shared {
    name: String,
    dma: Dma,
    vm: Arc<dyn Vm>,
    function: Function,
    backend: Arc<dyn Backend>,
    features: u64,
    common: Mutex<Common>,
    /// Interrupt status; held while the pin follows it, so that neither is left behind.
    isr: Mutex<u8>,
    slots: Vec<QueueSlot>,
    gate: Gate,
    complaint: Complaint,
    closed: AtomicBool,
    /// Where the kernel answers the notifications now.
    doorbells: Mutex<Option<u64>>,
    access_capability: usize,
}

/// See the module.
pub struct Transport {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    wakes: Vec<OwnedFd>,
}

fn capability(kind: u8, offset: u64, len: u32, extra: &[u8]) -> Vec<u8> {
    let mut content = vec![16 + extra.len() as u8, kind, 0, 0, 0, 0];
    content.extend((offset as u32).to_le_bytes());
    content.extend(len.to_le_bytes());
    content.extend(extra);
    content
}

fn event() -> std::io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

fn drain(fd: BorrowedFd<'_>) {
    let _ = rustix::io::read(fd, &mut [0u8; 8]);
}

impl Transport {
    /// A device called `name` (`net0`), with the threads its backend wants.
    ///
    /// # Errors
    /// Where the host gives no event or thread.
    pub fn new(
        name: impl Into<String>,
        dma: Dma,
        vm: Arc<dyn Vm>,
        backend: Arc<dyn Backend>,
    ) -> std::io::Result<Arc<Transport>> {
        let name = name.into();
        let sizes = backend.queue_sizes();
        let kind = backend.kind();
        let mut builder = FunctionBuilder::new(VENDOR, 0x1040 + kind, backend.class(), 1)
            .subsystem(VENDOR, 0x40 + kind)
            .interrupt_pin()
            .bar(0, BAR_LEN)
            .msix(vm.clone(), sizes.len() as u16 + 1, MSIX_BAR);
        let notify = NOTIFY_STEP as u32;
        let parts = [
            capability(1, 0, 64, &[]),
            capability(
                2,
                NOTIFY_AT,
                sizes.len() as u32 * notify,
                &notify.to_le_bytes(),
            ),
            capability(3, ISR_AT, 4, &[]),
            capability(4, DEVICE_AT, 0x1000, &[]),
        ];
        for content in parts {
            builder = builder.capability(CAPABILITY_VENDOR, &content, &[]).0;
        }
        // A window through configuration space: BAR, offset, length and data are the guest's to write.
        let mut writable = [0u8; 18];
        writable[2] = 0xff;
        writable[6..].fill(0xff);
        let (builder, access_capability) = builder.capability(
            CAPABILITY_VENDOR,
            &capability(CONFIG_ACCESS, 0, 0, &[0; 4]),
            &writable,
        );
        let slots = sizes
            .iter()
            .map(|size| {
                Ok(QueueSlot {
                    queue: Mutex::new(Queue::new(*size)),
                    event: event()?,
                })
            })
            .collect::<std::io::Result<Vec<_>>>()?;
        let features =
            backend.features() | feature::VERSION_1 | feature::EVENT_INDEX | feature::INDIRECT;
        let shared = Arc::new(Shared {
            complaint: Complaint::new(name.clone()),
            name,
            dma,
            vm,
            function: builder.build(),
            backend,
            features,
            common: Mutex::new(Common {
                config_vector: NO_VECTOR,
                ..Common::default()
            }),
            isr: Mutex::new(0),
            slots,
            gate: Gate::default(),
            closed: AtomicBool::new(false),
            doorbells: Mutex::new(None),
            access_capability,
        });
        let mut threads = Vec::new();
        let mut wakes = Vec::new();
        for (number, queues) in shared.backend.threads().into_iter().enumerate() {
            let wake = event()?;
            let waited = rustix::io::dup(&wake)?;
            let worker = shared.clone();
            threads.push(
                std::thread::Builder::new()
                    .name(format!("{}-{number}", shared.name))
                    .spawn(move || {
                        crate::process::jail::confine(worker.backend.thread());
                        worker.work(number, &queues, &waited);
                    })?,
            );
            wakes.push(wake);
        }
        Ok(Arc::new(Transport {
            shared,
            threads: Mutex::new(threads),
            wakes,
        }))
    }

    fn wake_threads(&self) {
        for wake in &self.wakes {
            let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
        }
    }

    /// The device's configuration changed: the driver is told to read it again.
    pub fn config_changed(&self) {
        self.shared.config_changed();
    }

    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.shared.backend
    }
}

impl Shared {
    fn common(&self) -> MutexGuard<'_, Common> {
        self.common.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn isr(&self) -> MutexGuard<'_, u8> {
        self.isr.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running_features(&self) -> Option<u64> {
        let common = self.common();
        (common.status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET) == STATUS_DRIVER_OK)
            .then_some(common.driver_features)
    }

    fn interrupt(&self, vector: u16, cause: u8) {
        match self.function.msix() {
            Some(msix) if msix.enabled() => {
                if vector != NO_VECTOR {
                    msix.notify(vector);
                }
            }
            _ => {
                let mut isr = self.isr();
                *isr |= cause;
                self.function.set_pin(true);
            }
        }
    }

    fn config_changed(&self) {
        let vector = {
            let mut common = self.common();
            common.generation = common.generation.wrapping_add(1);
            common.config_vector
        };
        self.interrupt(vector, ISR_CONFIG);
    }

    fn break_device(&self, error: &QueueError) {
        self.complaint
            .make(&format_args!("the guest broke its queue: {error}"));
        self.common().status |= STATUS_NEEDS_RESET;
        self.config_changed();
    }

    /// Tells the guest of chains given back on `queues`.
    fn tell(&self, queues: &[usize]) {
        for index in queues {
            let (wanted, vector) = {
                let mut queue = self.slots[*index].lock();
                if !queue.enabled {
                    continue;
                }
                (queue.wants_interrupt(&self.dma), queue.vector)
            };
            match wanted {
                Ok(true) => self.interrupt(vector, ISR_QUEUE),
                Ok(false) => {}
                Err(error) => self.break_device(&error),
            }
        }
    }

    /// A thread's life: waits for its queues' events and the backend's own, and serves them.
    fn work(&self, thread: usize, queues: &[usize], wake: &OwnedFd) {
        let mut watch = Watch::default();
        while !self.closed.load(Ordering::Acquire) {
            let features = self.running_features();
            let source = if features.is_some() {
                self.backend.event_source(thread)
            } else {
                None
            };
            let mut waiting: Vec<PollFd<'_>> = vec![PollFd::new(wake, PollFlags::IN)];
            waiting.extend(
                queues
                    .iter()
                    .map(|index| PollFd::new(&self.slots[*index].event, PollFlags::IN)),
            );
            if let Some(source) = &source {
                waiting.push(PollFd::new(source, PollFlags::IN));
            }
            let brisk = features.is_some() && self.backend.is_brisk();
            let ready = match self.wait(queues, &mut waiting, brisk.then_some(&mut watch)) {
                Ok(ready) => ready,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => {
                    tracing::error!("{}: waiting failed: {error}", self.name);
                    return;
                }
            };
            if ready[0] {
                drain(wake.as_fd());
            }
            let Some(_inside) = self.gate.enter() else {
                // Resuming notifies every queue again.
                std::thread::park_timeout(Duration::from_millis(20));
                continue;
            };
            if let Some(features) = self.running_features() {
                let access = Queues {
                    dma: &self.dma,
                    slots: &self.slots,
                    features,
                    tell: &|index| self.tell(&[index]),
                };
                let mut result = Ok(());
                for (at, index) in queues.iter().enumerate() {
                    if ready[1 + at] {
                        drain(self.slots[*index].event.as_fd());
                        result = result.and_then(|()| self.backend.serve(*index, &access));
                    }
                }
                if source.is_some() && ready.last() == Some(&true) {
                    result = result.and_then(|()| self.backend.serve_event(thread, &access));
                }
                self.tell(queues);
                if let Err(error) = result {
                    self.break_device(&error);
                }
            } else {
                queues
                    .iter()
                    .for_each(|index| drain(self.slots[*index].event.as_fd()));
            }
        }
    }

    /// Returns when there is something to serve: which of `waiting` are ready. The queues of a brisk device are watched for
    /// a while first, during which their guest tells of nothing.
    fn wait(
        &self,
        queues: &[usize],
        waiting: &mut [PollFd<'_>],
        watch: Option<&mut Watch>,
    ) -> Result<Vec<bool>, rustix::io::Errno> {
        let more = |index: &usize| {
            // What the guest broke shows when it is served.
            let queue = self.slots[*index].lock();
            queue.has_more(&self.dma).unwrap_or(true)
        };
        let mut found = Vec::new();
        if let Some(watch) = &watch {
            let there = watch.look(|| queues.iter().any(more));
            for index in queues {
                let mut queue = self.slots[*index].lock();
                let here = if there {
                    queue.watched = true;
                    queue.has_more(&self.dma)
                } else {
                    Ok(queue.watched && queue.unwatch(&self.dma).unwrap_or(true))
                };
                found.push(here.unwrap_or(true));
            }
        }
        let any = found.contains(&true);
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let begun = Instant::now();
        match poll(waiting, any.then_some(&now)) {
            // What was found is served all the same: the guest was told to say no more of it.
            Err(rustix::io::Errno::INTR) if any => {}
            other => {
                other?;
            }
        }
        if let (Some(watch), false) = (watch, any) {
            watch.slept(begun.elapsed());
        }
        let mut ready: Vec<bool> = waiting.iter().map(|fd| !fd.revents().is_empty()).collect();
        // The first is no queue's.
        for (ready, found) in ready.iter_mut().skip(1).zip(found) {
            *ready |= found;
        }
        Ok(ready)
    }

    /// Lets the kernel answer notifications where BAR 0 is now, where the back end can.
    fn move_doorbells(&self, base: Option<u64>) {
        let mut current = self
            .doorbells
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(doorbells) = self.vm.doorbells() else {
            return;
        };
        if *current == base {
            return;
        }
        let addresses = |base: u64| {
            self.slots
                .iter()
                .enumerate()
                .map(move |(index, slot)| (base + NOTIFY_AT + index as u64 * NOTIFY_STEP, slot))
        };
        if let Some(old) = current.take() {
            for (address, slot) in addresses(old) {
                let _ = doorbells.remove_doorbell(address, 0, slot.event.as_fd());
            }
        }
        if let Some(new) = base {
            for (address, slot) in addresses(new) {
                if let Err(error) = doorbells.add_doorbell(address, 0, slot.event.as_fd()) {
                    // The bus answers it then, only slower.
                    tracing::debug!("{}: no doorbell at {address:#x}: {error}", self.name);
                }
            }
            *current = base;
        }
    }
}

impl PciDevice for Transport {
    fn function(&self) -> &Function {
        &self.shared.function
    }
    fn read_bar(&self, _: u8, offset: u64, data: &mut [u8]) {
        self.shared.read(offset, data);
    }
    fn write_bar(&self, _: u8, offset: u64, data: &[u8]) {
        self.shared.write(offset, data);
    }
    fn before_config_read(&self, offset: usize, len: usize) {
        let data_at = self.shared.access_capability + 16;
        if offset < data_at + 4
            && offset + len > data_at
            && let Some((at, size)) = self.shared.window()
        {
            let mut data = [0; 4];
            self.shared.read(at, &mut data[..size]);
            self.shared.function.set_config_bytes(data_at, &data);
        }
    }
    fn after_config_write(&self, offset: usize, len: usize) {
        let data_at = self.shared.access_capability + 16;
        if offset < data_at + 4
            && offset + len > data_at
            && let Some((at, size)) = self.shared.window()
        {
            let mut data = [0; 4];
            self.shared.function.config_bytes(data_at, &mut data);
            self.shared.write(at, &data[..size]);
        }
        if offset < 0x28 {
            self.shared
                .move_doorbells(self.shared.function.decoded_at(0));
        }
    }
}

impl Persist for Transport {
    fn identity(&self) -> String {
        self.shared.name.clone()
    }

    fn quiesce(&self) {
        let shared = &self.shared;
        shared.gate.pause();
        if let Some(features) = shared.running_features() {
            let access = Queues {
                dma: &shared.dma,
                slots: &shared.slots,
                features,
                tell: &|index| shared.tell(&[index]),
            };
            let drained = shared.backend.drain(&access);
            let all: Vec<usize> = (0..shared.slots.len()).collect();
            shared.tell(&all);
            if let Err(error) = drained {
                shared.break_device(&error);
            }
        }
    }

    fn wake(&self) {
        self.shared.gate.open();
        self.shared.slots.iter().for_each(QueueSlot::notify);
        self.wake_threads();
    }

    fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        self.wake_threads();
        for thread in
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner))
        {
            crate::defect::join(thread);
        }
        self.shared.move_doorbells(None);
        self.shared.backend.close();
    }

    fn save(&self) -> Result<Saved, StateError> {
        let saved = SavedTransport {
            function: self.shared.function.save(),
            common: self.shared.common().clone(),
            isr: *self.shared.isr(),
            queues: self
                .shared
                .slots
                .iter()
                .map(|slot| slot.lock().clone())
                .collect(),
            backend: self.shared.backend.save(),
        };
        Saved::of(self.identity(), 1, &saved)
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let content: SavedTransport = saved.get(&self.identity(), 1)?;
        let shared = &self.shared;
        let sizes = shared.backend.queue_sizes();
        let sound = content.queues.len() == sizes.len()
            && content.queues.iter().zip(&sizes).all(|(queue, size)| {
                queue.max_size == *size && (!queue.enabled || queue.is_sound(&shared.dma))
            });
        if !sound {
            return Err(saved.damaged("its queues cannot be"));
        }
        let agreed = content.common.status & STATUS_FEATURES_OK != 0;
        if agreed && content.common.driver_features & !shared.features != 0 {
            return Err(saved.damaged("it uses features that this machine does not offer"));
        }
        shared
            .function
            .restore(content.function)
            .map_err(|reason| saved.damaged(reason))?;
        shared
            .backend
            .restore(&content.backend)
            .map_err(|reason| saved.damaged(reason))?;
        for (slot, queue) in shared.slots.iter().zip(content.queues) {
            *slot.lock() = queue;
        }
        *shared.isr() = content.isr;
        let features = content.common.driver_features;
        let started = agreed && content.common.status & STATUS_DRIVER_OK != 0;
        *shared.common() = content.common;
        if started {
            shared.backend.start(features);
        }
        shared.move_doorbells(shared.function.decoded_at(0));
        shared.slots.iter().for_each(QueueSlot::notify);
        Ok(())
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.close();
    }
}
