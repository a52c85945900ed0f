//! An NVMe controller (NVM Express Base 1.4): Debian's kernels have the driver built in, so a disk behind it
//! needs no initrd. One controller, one namespace per disk, one pair of I/O queues per CPU.
//!
//! ```text
//!   CPU thread: doorbell ─▶ list of queues ─▶ worker: fetch one command, list the queue again where it has more
//!                                               ├─▶ the host has it in memory ─▶ completion ─▶ MSI-X, one for several
//!                                               └─▶ the disk must be waited for ─▶ carrier
//!   landing thread: carrier ─▶ completions ─▶ MSI-X
//! ```
//!
//! Lock order: the controller's lock, then whatever [`Dma::written`] takes in the CPU back end. Interrupts are
//! sent, and commands carried, without it.

mod admin;
mod command;
mod identify;
mod io;
mod log;
mod prp;
mod state;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use cpu::Vm;
use disk::{Disk, DiskError};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use serde::{Deserialize, Serialize};

use self::command::{Answer, Command, Completion, Status};
use self::io::Begun;
use self::state::{CC_ENABLE, CC_SHUTDOWN, GuestError, QUEUE_LIMIT, State};
use crate::bus::{get, put};
use crate::carrier::{Carrier, Pace, TELL_BYTES, TELL_COUNT};
use crate::complaint::Complaint;
use crate::memory::Dma;
use crate::pci::function::FunctionState;
use crate::pci::{Function, FunctionBuilder, Msix, PciDevice};
use crate::pool::{Pool, grow_on};
use crate::state::{Persist, Saved, StateError};

/// Red Hat. Not its device 0x0010, QEMU's controller, for which Linux switches features off.
pub const VENDOR: u16 = 0x1b36;
const DEVICE: u16 = 0x0b10;
const CLASS: u32 = 0x01_0802;

const REGISTERS_LEN: u64 = 0x4000;
const DOORBELLS: u64 = 0x1000;
const MSIX_BAR: u8 = 4;
/// Bytes of the largest transfer.
pub(crate) const MAX_TRANSFER: u64 = prp::PAGE << identify::MAX_TRANSFER_SHIFT;
/// I/O queue pairs, at most; the doorbells of so many fit into the BAR.
const IO_QUEUE_LIMIT: u32 = 64;
/// Workers, at most; none of them waits for a disk.
const WORKERS: usize = 4;
/// Commands with the workers and the carrier at once, so that a guest does not take the host's memory by asking.
const IN_FLIGHT_LIMIT: usize = 1024;

/// Entries of a queue less one, contiguous queues, 10 s to become ready, NVM command set, 4 KiB pages.
const CAPABILITIES: u64 = (QUEUE_LIMIT as u64 - 1) | 1 << 16 | 20 << 24 | 1 << 37;

struct Inner {
    state: State,
    /// Commands with a worker.
    in_flight: usize,
    /// Workers that look after the list of queues and do not sleep.
    active: usize,
    /// A reset waits for those.
    resetting: bool,
    /// The guest asked for shutdown and its flush is to be done.
    shutting_down: bool,
    paused: bool,
    closed: bool,
}

pub(crate) struct Shared {
    dma: Dma,
    function: Function,
    disks: Vec<Arc<dyn Disk>>,
    identity: u64,
    io_queues: u16,
    complaint: Complaint,
    /// Commands that wait for a disk, by their queue.
    carrier: Carrier<(u16, Command), Option<Answer>>,
    pool: Arc<Pool>,
    pace: Pace,
    inner: Mutex<Inner>,
    /// Work has come, or the workers shall end.
    work: Condvar,
    /// The last command in flight is done.
    idle: Condvar,
}

/// See the module.
pub struct Controller {
    name: String,
    shared: Arc<Shared>,
    workers: Mutex<Vec<JoinHandle<()>>>,
    /// Ends the landing thread.
    end: OwnedFd,
    landing: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedController {
    function: FunctionState,
    state: State,
    shutting_down: bool,
    /// Bytes of each disk, which must be the same ones.
    disks: Vec<u64>,
}

impl Controller {
    /// A controller called `name` (`nvme0`) for a machine of `cpus`, with a namespace for each of `disks`.
    /// `identity` makes its serial number and identifiers.
    ///
    /// # Errors
    /// Where the host gives no threads.
    pub fn new(
        name: impl Into<String>,
        dma: Dma,
        vm: Arc<dyn Vm>,
        disks: Vec<Arc<dyn Disk>>,
        cpus: u32,
        identity: u64,
    ) -> std::io::Result<Arc<Controller>> {
        let name = name.into();
        let io_queues = cpus.clamp(1, IO_QUEUE_LIMIT) as u16;
        let function = FunctionBuilder::new(VENDOR, DEVICE, CLASS, 2)
            .subsystem(VENDOR, DEVICE)
            .bar(0, REGISTERS_LEN)
            .msix(vm, io_queues + 1, MSIX_BAR)
            .build();
        let inner = Inner {
            state: State::new(io_queues),
            in_flight: 0,
            active: 0,
            resetting: false,
            shutting_down: false,
            paused: false,
            closed: false,
        };
        let pool = Arc::new(Pool::new(&name)?);
        let shared = Arc::new(Shared {
            carrier: Carrier::new(pool.clone())?,
            pool,
            pace: Pace::default(),
            dma,
            function,
            disks,
            identity,
            io_queues,
            complaint: Complaint::new(name.clone()),
            inner: Mutex::new(inner),
            work: Condvar::new(),
            idle: Condvar::new(),
        });
        let controller = Controller {
            name,
            shared,
            workers: Mutex::default(),
            end: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            landing: Mutex::default(),
        };
        let (shared, end) = (
            controller.shared.clone(),
            rustix::io::fcntl_dupfd_cloexec(&controller.end, 0)?,
        );
        let landing = std::thread::Builder::new()
            .name(format!("{}-land", controller.name))
            .spawn(move || {
                crate::process::jail::confine(crate::process::jail::Thread::Io);
                shared.land_all(&end);
            })?;
        *controller
            .landing
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(landing);
        for number in 0..(cpus as usize).clamp(1, WORKERS) {
            let shared = controller.shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("{}-{number}", controller.name))
                .spawn(move || {
                    crate::process::jail::confine(crate::process::jail::Thread::Io);
                    shared.work();
                })?;
            controller
                .workers
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(thread);
        }
        Ok(Arc::new(controller))
    }
}

impl Controller {
    /// Makes a disk larger, by its place among the disks, and tells the guest.
    ///
    /// # Errors
    /// For people: why it cannot be larger.
    pub fn grow(&self, disk: usize, size: u64) -> Result<(), String> {
        let shared = &self.shared;
        let Some(grown) = shared.disks.get(disk).cloned() else {
            return Err(format!("it has no disk {disk}"));
        };
        grow_on(&shared.pool, grown, size)?;
        let vector = {
            let mut inner = shared.lock();
            inner.state.log.note_change(disk as u32 + 1);
            inner.state.tell_of_changes(&shared.dma)
        };
        shared.notify(vector);
        Ok(())
    }
}

/// Commands that a worker has completed and the guest was not yet told of.
#[derive(Default)]
struct Untold {
    count: usize,
    bytes: u64,
    vectors: Vec<u16>,
}

impl Untold {
    /// The guest works on these while the next are done.
    fn is_full(&self) -> bool {
        self.count >= TELL_COUNT || self.bytes >= TELL_BYTES
    }

    fn add(&mut self, vector: Option<u16>, bytes: u64) {
        self.count += 1;
        self.bytes += bytes;
        if let Some(vector) = vector
            && !self.vectors.contains(&vector)
        {
            self.vectors.push(vector);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vectors(&self) -> u16 {
        self.function.msix().map_or(0, Msix::vectors)
    }

    /// The answer to "number of queues": both counts less one.
    fn queue_counts(&self) -> u32 {
        let count = u32::from(self.io_queues) - 1;
        count << 16 | count
    }

    fn notify(&self, vector: Option<u16>) {
        if let (Some(vector), Some(msix)) = (vector, self.function.msix()) {
            msix.notify(vector);
        }
    }

    /// Says what a disk met with; the status for it.
    fn failed(&self, error: &DiskError, otherwise: Status) -> Status {
        self.complaint.make(error);
        io::status_of(error, otherwise)
    }

    fn flush_all(&self) -> Result<(), Status> {
        let mut result = Ok(());
        for disk in &self.disks {
            if let Err(error) = disk.flush() {
                result = Err(self.failed(&error, Status::WRITE_FAULT));
            }
        }
        result
    }

    /// A worker's life: it drains the listed queues, and leaves to the carrier what waits for a disk.
    fn work(self: &Arc<Shared>) {
        let mut untold = Untold::default();
        // Commands were given to the carrier and not yet submitted.
        let mut carried = false;
        let mut inner = self.lock();
        inner.active += 1;
        loop {
            if carried && (untold.is_full() || inner.state.list.is_empty()) {
                drop(inner);
                self.carrier.submit();
                carried = false;
                inner = self.lock();
                continue;
            }
            if untold.count > 0 && (untold.is_full() || inner.state.list.is_empty()) {
                drop(inner);
                inner = self.tell(&mut untold);
                continue;
            }
            if inner.closed {
                return;
            }
            let stopped = inner.paused || inner.resetting || inner.in_flight >= IN_FLIGHT_LIMIT;
            if !stopped && std::mem::take(&mut inner.shutting_down) {
                inner.in_flight += 1;
                drop(inner);
                let _ = self.flush_all();
                inner = self.lock();
                inner.state.shutdown = 2;
                self.land(&mut inner, 1);
                continue;
            }
            let next = if stopped {
                None
            } else {
                inner.state.fetch(&self.dma)
            };
            let Some((queue, command)) = next else {
                if carried {
                    drop(inner);
                    self.carrier.submit();
                    carried = false;
                    inner = self.lock();
                    continue;
                }
                if untold.count > 0 {
                    drop(inner);
                    inner = self.tell(&mut untold);
                    continue;
                }
                inner.active -= 1;
                inner = self
                    .work
                    .wait(inner)
                    .unwrap_or_else(PoisonError::into_inner);
                inner.active += 1;
                continue;
            };
            inner.state.serve(queue);
            inner.in_flight += 1;
            drop(inner);
            let answer = match self.run_at_once(queue, &command) {
                Begun::Done(answer) => answer,
                Begun::Waits(found) => {
                    io::carry(self, queue, command, found);
                    carried = true;
                    inner = self.lock();
                    continue;
                }
            };
            inner = self.lock();
            let vector = self.complete(&mut inner, queue, &command, answer);
            untold.add(vector, command.bytes(queue));
        }
    }

    /// Puts a command's answer into its completion queue; the vector to notify.
    fn complete(
        &self,
        inner: &mut Inner,
        queue: u16,
        command: &Command,
        answer: Option<Answer>,
    ) -> Option<u16> {
        let Answer { status, result } = answer.filter(|_| !inner.resetting)?;
        let completion = Completion {
            result,
            queue,
            head: 0,
            command: command.id,
            status,
        };
        inner.state.log.note(queue, command, status);
        inner.state.complete(&self.dma, completion)
    }

    /// The landing thread's life: completes what the carrier has done.
    fn land_all(&self, end: &OwnedFd) {
        loop {
            let event = self.carrier.event();
            let mut waiting = [
                PollFd::new(end, PollFlags::IN),
                PollFd::new(&event, PollFlags::IN),
            ];
            let waited = poll(&mut waiting, None);
            if waited.is_ok() && !waiting[0].revents().is_empty() {
                return;
            }
            self.land_some();
        }
    }

    fn land_some(&self) {
        let landed = self.carrier.landed();
        if landed.is_empty() {
            return;
        }
        let mut untold = Untold::default();
        let mut inner = self.lock();
        for ((queue, command), answer) in landed {
            let vector = self.complete(&mut inner, queue, &command, answer);
            untold.add(vector, command.bytes(queue));
        }
        drop(inner);
        drop(self.tell(&mut untold));
    }

    /// Interrupts for what was completed. Only then are the commands no longer in flight: a pause waits for both.
    fn tell(&self, untold: &mut Untold) -> MutexGuard<'_, Inner> {
        untold
            .vectors
            .drain(..)
            .for_each(|vector| self.notify(Some(vector)));
        let mut inner = self.lock();
        self.land(&mut inner, std::mem::take(&mut untold.count));
        untold.bytes = 0;
        inner
    }

    /// Wakes a worker where more queues are listed than workers look after.
    fn wake_for_list(&self, inner: &Inner) {
        if inner.state.list.len() > inner.active {
            self.work.notify_one();
        }
    }

    /// Runs what needs no wait for a disk.
    fn run_at_once(&self, queue: u16, command: &Command) -> Begun {
        if queue != 0 && command.flags & 3 == 0 {
            io::run_at_once(self, command)
        } else if command.opcode == command::admin::FORMAT {
            Begun::Waits(None)
        } else {
            Begun::Done(self.run(queue, command))
        }
    }

    fn run(&self, queue: u16, command: &Command) -> Option<Answer> {
        // Fused operations are not offered.
        if command.flags & 3 != 0 {
            return Some(Status::INVALID_FIELD.into());
        }
        match queue {
            0 => admin::run(self, command),
            _ => Some(io::run(self, command)),
        }
    }

    /// `count` commands less in flight; the last one lets a waiting reset happen.
    fn land(&self, inner: &mut Inner, count: usize) {
        let full = inner.in_flight >= IN_FLIGHT_LIMIT;
        inner.in_flight -= count;
        if full && inner.in_flight < IN_FLIGHT_LIMIT {
            self.work.notify_all();
        }
        if inner.in_flight == 0 {
            self.finish_reset(inner);
            self.idle.notify_all();
        }
    }

    fn finish_reset(&self, inner: &mut Inner) {
        if std::mem::take(&mut inner.resetting) {
            inner.shutting_down = false;
            inner.state.clear_queues();
            if inner.state.configuration & CC_ENABLE != 0 {
                inner.state.enable();
            }
            self.work.notify_all();
        }
    }

    fn configure(&self, value: u32) {
        let mut inner = self.lock();
        let before = std::mem::replace(&mut inner.state.configuration, value);
        if before & CC_ENABLE != 0 && value & CC_ENABLE == 0 {
            inner.resetting = true;
            if inner.in_flight == 0 {
                self.finish_reset(&mut inner);
            }
        } else if before & CC_ENABLE == 0 && value & CC_ENABLE != 0 && !inner.resetting {
            inner.state.enable();
        }
        if value & CC_SHUTDOWN != 0 && before & CC_SHUTDOWN == 0 {
            inner.state.shutdown = 1;
            inner.shutting_down = true;
            self.work.notify_one();
        }
    }

    fn ring(&self, offset: u64, value: u32) {
        let index = offset / 4;
        let Ok(queue) = u16::try_from(index / 2) else {
            return;
        };
        let vector = {
            let mut inner = self.lock();
            let state = &mut inner.state;
            if !state.ready || state.fatal {
                return;
            }
            if index.is_multiple_of(2) {
                match state.submission(queue) {
                    Some(submission) if value < submission.size => {
                        submission.tail = value;
                        if state.serve(queue) {
                            self.wake_for_list(&inner);
                        }
                        None
                    }
                    Some(_) => state.report(&self.dma, GuestError::DoorbellValue),
                    None => state.report(&self.dma, GuestError::NoSuchDoorbell),
                }
            } else {
                match state.completion(queue) {
                    Some(completion) if value < completion.size => {
                        completion.head = value;
                        let vector = state.deliver(&self.dma, queue);
                        for number in 0..=self.io_queues {
                            if state
                                .submission(number)
                                .is_some_and(|submission| submission.completion == queue)
                            {
                                state.serve(number);
                            }
                        }
                        self.wake_for_list(&inner);
                        vector
                    }
                    Some(_) => state.report(&self.dma, GuestError::DoorbellValue),
                    None => state.report(&self.dma, GuestError::NoSuchDoorbell),
                }
            }
        };
        self.notify(vector);
    }

    fn register(&self, offset: u64) -> u32 {
        let inner = self.lock();
        let state = &inner.state;
        match offset {
            0x00 => CAPABILITIES as u32,
            0x04 => (CAPABILITIES >> 32) as u32,
            0x08 => identify::VERSION,
            0x14 => state.configuration,
            0x1c => {
                u32::from(state.ready)
                    | u32::from(state.fatal) << 1
                    | u32::from(state.shutdown) << 2
            }
            0x24 => state.admin_sizes,
            0x28 => state.admin_submission as u32,
            0x2c => (state.admin_submission >> 32) as u32,
            0x30 => state.admin_completion as u32,
            0x34 => (state.admin_completion >> 32) as u32,
            _ => 0,
        }
    }

    fn set_register(&self, offset: u64, value: u32) {
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        let low = |old: u64| old >> 32 << 32 | u64::from(value);
        if offset == 0x14 {
            return self.configure(value);
        }
        let state = &mut self.lock().state;
        match offset {
            0x24 => state.admin_sizes = value & 0x0fff_0fff,
            0x28 => state.admin_submission = low(state.admin_submission),
            0x2c => state.admin_submission = high(state.admin_submission),
            0x30 => state.admin_completion = low(state.admin_completion),
            0x34 => state.admin_completion = high(state.admin_completion),
            _ => {}
        }
    }
}

impl PciDevice for Controller {
    fn function(&self) -> &Function {
        &self.shared.function
    }

    fn read_bar(&self, _: u8, offset: u64, data: &mut [u8]) {
        let value = match (offset, data.len()) {
            (DOORBELLS.., _) => 0,
            (_, 8) if offset.is_multiple_of(8) => {
                u64::from(self.shared.register(offset))
                    | u64::from(self.shared.register(offset + 4)) << 32
            }
            (_, len) => {
                let shift = offset % 4 * 8;
                let word = u64::from(self.shared.register(offset & !3)) >> shift;
                if shift + len as u64 * 8 <= 32 {
                    word
                } else {
                    0
                }
            }
        };
        put(data, value);
    }

    fn write_bar(&self, _: u8, offset: u64, data: &[u8]) {
        let value = get(data);
        match (offset, data.len()) {
            (DOORBELLS.., 4) if offset.is_multiple_of(4) => {
                self.shared.ring(offset - DOORBELLS, value as u32)
            }
            (DOORBELLS.., _) => {}
            (_, 4) if offset.is_multiple_of(4) => self.shared.set_register(offset, value as u32),
            (_, 8) if offset.is_multiple_of(8) => {
                self.shared.set_register(offset, value as u32);
                self.shared.set_register(offset + 4, (value >> 32) as u32);
            }
            _ => {}
        }
    }
}

impl Persist for Controller {
    fn identity(&self) -> String {
        self.name.clone()
    }

    fn quiesce(&self) {
        let mut inner = self.shared.lock();
        inner.paused = true;
        while inner.in_flight > 0 {
            inner = self
                .shared
                .idle
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn wake(&self) {
        self.shared.lock().paused = false;
        self.shared.work.notify_all();
    }

    fn close(&self) {
        self.shared.lock().closed = true;
        self.shared.work.notify_all();
        let workers =
            std::mem::take(&mut *self.workers.lock().unwrap_or_else(PoisonError::into_inner));
        for worker in workers {
            crate::defect::join(worker);
        }
        self.shared.carrier.drain();
        let _ = rustix::io::write(&self.end, &1u64.to_ne_bytes());
        let landing = self
            .landing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(landing) = landing {
            crate::defect::join(landing);
        }
        self.shared.land_some();
        self.shared.pool.close();
        let _ = self.shared.flush_all();
    }

    fn save(&self) -> Result<Saved, StateError> {
        let inner = self.shared.lock();
        if inner.in_flight > 0 {
            let reason = "I/O is in flight; quiesce it first".into();
            return Err(StateError::Busy {
                device: self.identity(),
                reason,
            });
        }
        let saved = SavedController {
            function: self.shared.function.save(),
            state: inner.state.clone(),
            shutting_down: inner.shutting_down,
            disks: self.shared.disks.iter().map(|disk| disk.len()).collect(),
        };
        Saved::of(self.identity(), 2, &saved)
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let content: SavedController = saved.get(&self.identity(), 2)?;
        if !self
            .shared
            .disks
            .iter()
            .map(|disk| disk.len())
            .eq(content.disks)
        {
            return Err(saved.damaged("its disks have other sizes"));
        }
        if !content
            .state
            .is_sound(usize::from(self.shared.io_queues) + 1)
        {
            return Err(saved.damaged("its queues cannot be"));
        }
        self.shared
            .function
            .restore(content.function)
            .map_err(|reason| saved.damaged(reason))?;
        let mut inner = self.shared.lock();
        inner.state = content.state;
        inner.shutting_down = content.shutting_down;
        self.shared.work.notify_all();
        Ok(())
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests;
