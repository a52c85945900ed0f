//! What the CPUs of one machine share: RAM, the map of translated code, mailboxes, the alarm clock.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;

use cpu::GuestMemory;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::state::{Mailbox, request};

/// A stretch of guest RAM in host memory.
#[derive(Debug, Clone, Copy)]
struct Bank {
    gpa: u64,
    len: u64,
    host: *mut u8,
    /// Index of its first page in [`Machine::code`].
    first: usize,
}

/// One machine's shared side.
pub struct Machine {
    memory: OnceLock<(Arc<GuestMemory>, Vec<Bank>)>,
    /// For each page of RAM, one bit per 64 bytes that some CPU has translated.
    code: OnceLock<Vec<AtomicU64>>,
    /// By CPU number; set once when a CPU is made.
    pub(crate) mailboxes: Mutex<Vec<Arc<Mailbox>>>,
    pub(crate) alone: Alone,
    /// Held while marks are set and other CPUs told what follows from them.
    marking: Mutex<()>,
    pub vcpus: u32,
    pub model: cpu::CpuModel,
}

/// Who runs while all other CPUs of the machine are kept outside of translated code: one at a time.
#[derive(Default)]
pub(crate) struct Alone {
    busy: Mutex<bool>,
    over: Condvar,
    /// As `busy`, for a look without the lock.
    wanted: AtomicBool,
}

impl Alone {
    /// Whether a CPU must not go inside now.
    pub(crate) fn wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }

    /// Sleeps until nobody is alone.
    pub(crate) fn wait(&self) {
        let mut busy = self.busy.lock().unwrap_or_else(|e| e.into_inner());
        while *busy {
            busy = self.over.wait(busy).unwrap_or_else(|e| e.into_inner());
        }
    }

    fn take(&self) {
        let mut busy = self.busy.lock().unwrap_or_else(|e| e.into_inner());
        while *busy {
            busy = self.over.wait(busy).unwrap_or_else(|e| e.into_inner());
        }
        *busy = true;
        self.wanted.store(true, Ordering::SeqCst);
    }

    pub(crate) fn give(&self) {
        let mut busy = self.busy.lock().unwrap_or_else(|e| e.into_inner());
        *busy = false;
        // With the lock: the next one wants it from the moment it is to be had.
        self.wanted.store(false, Ordering::SeqCst);
        drop(busy);
        self.over.notify_all();
    }
}

// SAFETY: the raw pointers are those of the guest's RAM, which is shared memory by nature and reached only by
// volatile, atomic or translated accesses.
unsafe impl Send for Machine {}
// SAFETY: as above.
unsafe impl Sync for Machine {}

impl Machine {
    pub fn new(vcpus: u32, model: cpu::CpuModel) -> Machine {
        Machine {
            memory: OnceLock::new(),
            code: OnceLock::new(),
            mailboxes: Mutex::new(Vec::new()),
            alone: Alone::default(),
            marking: Mutex::default(),
            vcpus,
            model,
        }
    }

    /// Sets guest RAM; false when it was set before or a region is not page-aligned.
    pub fn set_memory(&self, memory: Arc<GuestMemory>) -> bool {
        let mut banks = Vec::new();
        let mut pages = 0;
        for region in memory.iter() {
            let gpa = vm_memory::Address::raw_value(&region.start_addr());
            if gpa % 4096 != 0
                || region.len() % 4096 != 0
                || !(region.as_ptr() as usize).is_multiple_of(4096)
            {
                return false;
            }
            banks.push(Bank {
                gpa,
                len: region.len(),
                host: region.as_ptr(),
                first: pages,
            });
            pages += (region.len() / 4096) as usize;
        }
        // Zeroed memory of the allocator is untouched memory of the kernel: pages without code cost nothing.
        let mut code = Vec::with_capacity(pages);
        code.resize_with(pages, || AtomicU64::new(0));
        if self.code.set(code).is_err() {
            return false;
        }
        // The largest bank first: most accesses end at the first comparison.
        banks.sort_by_key(|b| std::cmp::Reverse(b.len));
        self.memory.set((memory, banks)).is_ok()
    }

    /// The host address of RAM at `gpa`, valid to the end of its 4 KiB page; `None` where there is no RAM.
    #[inline]
    pub fn ram_at(&self, gpa: u64) -> Option<*mut u8> {
        let (_, banks) = self.memory.get()?;
        for bank in banks {
            let offset = gpa.wrapping_sub(bank.gpa);
            if offset < bank.len {
                // SAFETY: inside the bank's mapping.
                return Some(unsafe { bank.host.add(offset as usize) });
            }
        }
        None
    }

    /// The bits of translated code of the page of `gpa`; `None` where there is no RAM.
    #[inline]
    pub(crate) fn granules(&self, gpa: u64) -> Option<&AtomicU64> {
        let (_, banks) = self.memory.get()?;
        for bank in banks {
            let offset = gpa.wrapping_sub(bank.gpa);
            if offset < bank.len {
                return self.code.get()?.get(bank.first + (offset >> 12) as usize);
            }
        }
        None
    }

    /// The guest-physical address of a byte of RAM by its host address.
    pub(crate) fn gpa_of(&self, host: *const u8) -> Option<u64> {
        let (_, banks) = self.memory.get()?;
        banks.iter().find_map(|bank| {
            let offset = (host as u64).wrapping_sub(bank.host as u64);
            (offset < bank.len).then_some(bank.gpa + offset)
        })
    }

    /// Guest-physical bytes were written behind the CPUs' backs, or by the CPU `by`: all others drop translated code of them.
    /// True where there was any.
    pub(crate) fn drop_code(&self, gpa: u64, len: u64, by: Option<u32>) -> bool {
        let mut found = false;
        let mut at = gpa;
        let end = gpa.saturating_add(len);
        while at < end {
            let stop = ((at | 0xfff) + 1).min(end);
            if let Some(bits) = self.granules(at) {
                let hit = granule_mask(at, stop - at);
                found |= bits.load(Ordering::SeqCst) & hit != 0
                    && self.drop_marked(bits, hit, (at & !63, (stop + 63) & !63), by);
            }
            at = stop;
        }
        found
    }

    /// [`Machine::drop_code`] of one page's marks `hit`, which are of `range` (first address and end). The marks go when the
    /// others know, and nobody marks anew in between.
    fn drop_marked(
        &self,
        bits: &AtomicU64,
        hit: u64,
        (first, last): (u64, u64),
        by: Option<u32>,
    ) -> bool {
        let _marking = self.marking.lock().unwrap_or_else(|e| e.into_inner());
        if bits.load(Ordering::SeqCst) & hit == 0 {
            return false;
        }
        let mailboxes = self.mailboxes.lock().unwrap_or_else(|e| e.into_inner());
        for (id, mailbox) in mailboxes.iter().enumerate() {
            if by != Some(id as u32) {
                mailbox
                    .stale
                    .lock()
                    .unwrap_or_else(|e| e.into_inner())
                    .push((first, last - first));
                mailbox
                    .requests
                    .fetch_or(request::SAFE_POINT, Ordering::SeqCst);
                mailbox.ring();
            }
        }
        bits.fetch_and(!hit, Ordering::SeqCst);
        true
    }

    /// Marks granules of a page as translated code of CPU `by`, which reads them only after this has returned: then no other CPU
    /// can write them without a look at the marks any more, nor is it between that look and its store. True where the page
    /// had no marks before. The caller is not inside translated code, so that two callers do not wait for each other.
    pub(crate) fn mark(
        &self,
        bits: &AtomicU64,
        mask: u64,
        gpa: u64,
        host_page: u64,
        by: u32,
    ) -> bool {
        if self.vcpus < 2 {
            let _marking = self.marking.lock().unwrap_or_else(|e| e.into_inner());
            return bits.fetch_or(mask, Ordering::SeqCst) == 0;
        }
        let others = self.others(by);
        let fresh = {
            // Whoever finds marks of another CPU finds that CPU's demands too.
            let _marking = self.marking.lock().unwrap_or_else(|e| e.into_inner());
            let fresh = bits.fetch_or(mask, Ordering::SeqCst) == 0;
            if fresh {
                for mailbox in &others {
                    mailbox
                        .forbidden
                        .lock()
                        .unwrap_or_else(|e| e.into_inner())
                        .push(host_page);
                    mailbox.forbids.store(true, Ordering::SeqCst);
                }
            }
            fresh
        };
        let page = (gpa >> 12) + 1;
        for mailbox in &others {
            await_exit(mailbox, || {
                mailbox.forbids.load(Ordering::SeqCst)
                    || mailbox.storing.load(Ordering::SeqCst) == page
            });
        }
        fresh
    }

    /// Keeps all other CPUs outside of translated code until [`Alone::give`]. The caller does not count as inside.
    pub(crate) fn stop_others(&self, by: u32) {
        self.alone.take();
        for mailbox in &self.others(by) {
            mailbox.attention.raise();
            await_exit(mailbox, || true);
        }
    }

    fn others(&self, by: u32) -> Vec<Arc<Mailbox>> {
        self.mailboxes
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .iter()
            .enumerate()
            .filter(|(id, _)| *id as u32 != by)
            .map(|(_, m)| Arc::clone(m))
            .collect()
    }

    /// Sends a fixed interrupt to one CPU (by APIC id).
    pub fn post_interrupt(&self, apic_id: u32, vector: u8) {
        if let Some(mailbox) = self.mailbox(apic_id) {
            mailbox.interrupts[usize::from(vector / 64)]
                .fetch_or(1 << (vector % 64), Ordering::SeqCst);
            mailbox.ring();
        }
    }

    /// Sends bits of [`request`] to one CPU.
    pub fn post_request(&self, apic_id: u32, bits: u32) {
        if let Some(mailbox) = self.mailbox(apic_id) {
            mailbox.requests.fetch_or(bits, Ordering::SeqCst);
            mailbox.ring();
        }
    }

    /// The mailbox of a CPU that was made.
    pub fn mailbox(&self, apic_id: u32) -> Option<Arc<Mailbox>> {
        self.mailboxes
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .get(apic_id as usize)
            .cloned()
    }
}

/// Waits while the CPU is inside translated code and `holds` says so.
fn await_exit(mailbox: &Mailbox, holds: impl Fn() -> bool) {
    let mut spins = 0u32;
    while mailbox.inside.load(Ordering::SeqCst) && holds() {
        spins += 1;
        if spins == 1 || spins.is_multiple_of(64) {
            // Again and again: a poll may have come before. It may be in a device, or its thread not running.
            mailbox.attention.raise();
        }
        if spins.is_multiple_of(64) {
            std::thread::yield_now();
        }
        std::hint::spin_loop();
    }
}

/// Bits of a page's granules that `len` bytes at `gpa` (inside one page) touch.
pub(crate) fn granule_mask(gpa: u64, len: u64) -> u64 {
    let first = (gpa & 0xfff) >> 6;
    let last = ((gpa & 0xfff) + len.max(1) - 1).min(0xfff) >> 6;
    (u64::MAX >> (63 - (last - first))) << first
}

/// Where a CPU's `attention` word is, as long as the CPU exists.
#[derive(Default)]
pub struct AttentionPointer(pub(crate) AtomicPtr<AtomicU32>, Mutex<()>);

impl AttentionPointer {
    /// Announces (or, with null, withdraws) the word.
    pub(crate) fn set(&self, at: *mut AtomicU32) {
        let _lock = self.1.lock();
        self.0.store(at, Ordering::SeqCst);
    }

    fn raise(&self) {
        let _lock = self.1.lock();
        let at = self.0.load(Ordering::SeqCst);
        if !at.is_null() {
            // SAFETY: announced by `set`, withdrawn under the lock held here before the CPU's memory goes.
            unsafe { (*at).store(1, Ordering::SeqCst) };
        }
    }
}

/// Where a halted CPU sleeps.
#[derive(Default)]
pub struct Sleeper {
    rung: Mutex<bool>,
    wake: Condvar,
}

impl Mailbox {
    pub fn new() -> Mailbox {
        Mailbox {
            interrupts: [const { AtomicU64::new(0) }; 4],
            requests: AtomicU32::new(0),
            sipi_vector: AtomicU32::new(0),
            alarm: AtomicU64::new(0),
            apic: crate::system::apic::Shared::default(),
            stale: Mutex::default(),
            inside: AtomicBool::new(false),
            forbidden: Mutex::default(),
            forbids: AtomicBool::new(false),
            storing: AtomicU64::new(0),
            attention: AttentionPointer::default(),
            sleeper: Sleeper::default(),
        }
    }

    /// Makes the CPU look at its mailbox soon, waking it if it sleeps.
    pub fn ring(&self) {
        self.attention.raise();
        let mut rung = self.sleeper.rung.lock().unwrap_or_else(|e| e.into_inner());
        *rung = true;
        self.sleeper.wake.notify_one();
    }

    /// Sleeps until rung, at most `limit` (`None`: without end). A ring before the call counts.
    pub fn sleep(&self, limit: Option<Duration>) {
        let mut rung = self.sleeper.rung.lock().unwrap_or_else(|e| e.into_inner());
        if !*rung {
            rung = match limit {
                Some(limit) => {
                    self.sleeper
                        .wake
                        .wait_timeout(rung, limit)
                        .unwrap_or_else(|e| e.into_inner())
                        .0
                }
                None => self
                    .sleeper
                    .wake
                    .wait(rung)
                    .unwrap_or_else(|e| e.into_inner()),
            };
        }
        *rung = false;
    }

    /// True where something waits to be looked at.
    pub fn has_mail(&self) -> bool {
        self.requests.load(Ordering::SeqCst) != 0
            || self
                .interrupts
                .iter()
                .any(|w| w.load(Ordering::SeqCst) != 0)
    }

    /// Asks to be rung (with [`request::ALARM`]) when the host's TSC reaches `host_tsc` (0: never).
    pub fn set_alarm(&self, host_tsc: u64) {
        self.alarm.store(host_tsc, Ordering::SeqCst);
        crate::clock::alarm_changed(self);
    }

    pub(crate) fn ring_alarm(&self) {
        self.requests.fetch_or(request::ALARM, Ordering::SeqCst);
        self.ring();
    }
}

impl Default for Mailbox {
    fn default() -> Self {
        Mailbox::new()
    }
}
