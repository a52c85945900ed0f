//! The memory balloon (section 5.5): the guest gives pages back when asked to, and reports free ones by itself; it tells
//! how its memory is used when asked. Given pages are dropped on the host at once and come back zeroed when touched.
//!
//! ```text
//!   queues: inflate, deflate, statistics, report           the last two move up where the driver has no statistics
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};

use super::{Backend, QueueError, Queues, config_bytes};
use crate::memory::Dma;

const INFLATE: usize = 0;
const STATISTICS: usize = 2;
const PAGE: u64 = 4096;
/// Bytes of one statistic, and of the longest list.
const STATISTIC: usize = 10;
const LIST_LIMIT: u64 = 64 * STATISTIC as u64;
/// Chains served in one go, so that a reset or a pause gets its turn.
const TURN: usize = 256;

const STATISTICS_QUEUE: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;

/// How the guest uses its memory (5.5.6.3), as it last told; bytes and counts, `None` where it does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Statistics {
    pub swapped_in: Option<u64>,
    pub swapped_out: Option<u64>,
    pub major_faults: Option<u64>,
    pub minor_faults: Option<u64>,
    pub free: Option<u64>,
    pub total: Option<u64>,
    pub available: Option<u64>,
    pub caches: Option<u64>,
}

impl Statistics {
    fn parse(list: &[u8]) -> Statistics {
        let mut found = Statistics::default();
        for entry in list.chunks_exact(STATISTIC) {
            let value = u64::from_le_bytes(entry[2..].try_into().unwrap_or_default());
            let field = match u16::from_le_bytes([entry[0], entry[1]]) {
                0 => &mut found.swapped_in,
                1 => &mut found.swapped_out,
                2 => &mut found.major_faults,
                3 => &mut found.minor_faults,
                4 => &mut found.free,
                5 => &mut found.total,
                6 => &mut found.available,
                7 => &mut found.caches,
                _ => continue,
            };
            // All ones are Linux's way of not knowing.
            *field = (value != u64::MAX).then_some(value);
        }
        found
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Told {
    statistics: Statistics,
    /// The guest's buffer, which it fills anew when it gets it back.
    held: Option<u16>,
}

/// See the module.
pub struct Balloon {
    /// Pages of 4 KiB the host wants.
    wanted: AtomicU32,
    /// Pages the guest says it gave.
    actual: AtomicU32,
    /// Bytes dropped so far, for statistics.
    dropped: AtomicU64,
    told: Mutex<Told>,
    event: OwnedFd,
}

impl Balloon {
    /// # Errors
    /// Where the host gives no event.
    pub fn new() -> std::io::Result<Balloon> {
        Ok(Balloon {
            wanted: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            dropped: AtomicU64::new(0),
            told: Mutex::default(),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for `bytes` of the guest's memory; its transport must then tell of the changed configuration.
    pub fn want(&self, bytes: u64) {
        self.wanted.store(
            (bytes / PAGE).min(u64::from(u32::MAX)) as u32,
            Ordering::Relaxed,
        );
    }

    /// Bytes in the balloon, and bytes dropped on the host so far.
    pub fn figures(&self) -> (u64, u64) {
        (
            u64::from(self.actual.load(Ordering::Relaxed)) * PAGE,
            self.dropped.load(Ordering::Relaxed),
        )
    }

    /// What the guest last told of its memory.
    pub fn statistics(&self) -> Statistics {
        self.told().statistics
    }

    /// Asks the guest to tell again.
    pub fn refresh(&self) {
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Drops the whole pages within a range of guest memory.
    fn drop_range(&self, dma: &Dma, address: u64, len: u64) {
        let Some(start) = address.checked_next_multiple_of(PAGE) else {
            return;
        };
        let Some(end) = address
            .checked_add(len)
            .map(|end| end / PAGE * PAGE)
            .filter(|end| *end > start)
        else {
            return;
        };
        let Ok(slice) = dma.slice(start, (end - start) as usize) else {
            return;
        };
        let guard = slice.ptr_guard_mut();
        // SAFETY: the range is whole pages of the guest's own anonymous memory, checked just before; dropping them
        // only changes their content, which the guest gave up.
        let result = unsafe {
            libc::madvise(
                guard.as_ptr().cast(),
                (end - start) as usize,
                libc::MADV_DONTNEED,
            )
        };
        if result == 0 {
            self.dropped.fetch_add(end - start, Ordering::Relaxed);
        }
        dma.written(start, end - start);
    }
}

impl Balloon {
    /// Drops pages given by their numbers; runs of them together.
    fn drop_pages(&self, dma: &Dma, list: &[u8]) {
        let mut run: Option<(u64, u64)> = None;
        for number in list.chunks_exact(4) {
            let page = u64::from(u32::from_le_bytes(number.try_into().unwrap_or_default())) * PAGE;
            run = match run {
                Some((start, len)) if start + len == page => Some((start, len + PAGE)),
                // Linux takes free pages from the top downwards.
                Some((start, len)) if page + PAGE == start => Some((page, len + PAGE)),
                Some((start, len)) => {
                    self.drop_range(dma, start, len);
                    Some((page, PAGE))
                }
                None => Some((page, PAGE)),
            };
        }
        if let Some((start, len)) = run {
            self.drop_range(dma, start, len);
        }
    }
}

impl Backend for Balloon {
    fn kind(&self) -> u16 {
        5
    }
    fn class(&self) -> u32 {
        0xff_0000
    }
    fn features(&self) -> u64 {
        STATISTICS_QUEUE | DEFLATE_ON_OOM | REPORTING
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![128; 4]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0u8; 8];
        config[..4].copy_from_slice(&self.wanted.load(Ordering::Relaxed).to_le_bytes());
        config[4..].copy_from_slice(&self.actual.load(Ordering::Relaxed).to_le_bytes());
        config_bytes(&config, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (4, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            self.actual
                .store(u32::from_le_bytes(bytes), Ordering::Relaxed);
        }
    }

    fn serve(&self, index: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        let has_statistics = queues.features & STATISTICS_QUEUE != 0;
        let report = STATISTICS + usize::from(has_statistics);
        queues.with(index, |queue, dma| {
            for _ in 0..TURN {
                let Some(chain) = queue.pop(dma)? else {
                    return Ok(());
                };
                if index == INFLATE {
                    let mut list = vec![0; chain.readable_len().min(1 << 16) as usize];
                    let len = chain.read(dma, 0, &mut list)?;
                    self.drop_pages(dma, &list[..len]);
                } else if index == report {
                    for (address, len) in &chain.writable {
                        self.drop_range(dma, *address, u64::from(*len));
                    }
                } else if index == STATISTICS {
                    let mut list = vec![0; chain.readable_len().min(LIST_LIMIT) as usize];
                    let len = chain.read(dma, 0, &mut list)?;
                    let before = {
                        let mut told = self.told();
                        told.statistics = Statistics::parse(&list[..len]);
                        told.held.replace(chain.head)
                    };
                    // There is one; a guest that gives more gets the others back.
                    if let Some(head) = before {
                        queue.push(dma, head, 0)?;
                    }
                    continue;
                }
                queue.push(dma, chain.head, 0)?;
            }
            queues.again(index);
            Ok(())
        })
    }

    fn event_source(&self, _: usize) -> Option<BorrowedFd<'_>> {
        Some(self.event.as_fd())
    }

    fn serve_event(&self, _: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        if queues.features & STATISTICS_QUEUE == 0 {
            return Ok(());
        }
        queues.with(STATISTICS, |queue, dma| match self.told().held.take() {
            Some(head) if queue.enabled => queue.push(dma, head, 0),
            _ => Ok(()),
        })
    }

    fn reset(&self) {
        self.actual.store(0, Ordering::Relaxed);
        *self.told() = Told::default();
    }

    fn save(&self) -> serde_json::Value {
        serde_json::json!({
            "wanted": self.wanted.load(Ordering::Relaxed),
            "actual": self.actual.load(Ordering::Relaxed),
            "told": *self.told(),
        })
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), String> {
        let number = |name: &str| {
            state[name]
                .as_u64()
                .and_then(|value| u32::try_from(value).ok())
        };
        let (Some(wanted), Some(actual)) = (number("wanted"), number("actual")) else {
            return Err("no page counts".into());
        };
        *self.told() =
            serde_json::from_value(state["told"].clone()).map_err(|error| error.to_string())?;
        self.wanted.store(wanted, Ordering::Relaxed);
        self.actual.store(actual, Ordering::Relaxed);
        Ok(())
    }
}
