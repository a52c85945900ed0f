//! What the CPUs of one machine share: RAM, the map of translated code, mailboxes, the alarm clock.

use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};
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
}

/// One machine's shared side.
pub struct Machine {
    memory: OnceLock<(Arc<GuestMemory>, Vec<Bank>)>,
    /// By CPU number; set once when a CPU is made.
    pub(crate) mailboxes: Mutex<Vec<Arc<Mailbox>>>,
    pub vcpus: u32,
    pub model: cpu::CpuModel,
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
            mailboxes: Mutex::new(Vec::new()),
            vcpus,
            model,
        }
    }

    /// Sets guest RAM; false when it was set before or a region is not page-aligned.
    pub fn set_memory(&self, memory: Arc<GuestMemory>) -> bool {
        let mut banks = Vec::new();
        for region in memory.iter() {
            let gpa = vm_memory::Address::raw_value(&region.start_addr());
            if gpa % 4096 != 0 || region.len() % 4096 != 0 || region.as_ptr() as usize % 4096 != 0 {
                return false;
            }
            banks.push(Bank {
                gpa,
                len: region.len(),
                host: region.as_ptr(),
            });
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
