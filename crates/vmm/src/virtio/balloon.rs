//! The memory balloon (section 5.5): the guest gives pages back when asked to, and reports free ones by itself.
//! Given pages are dropped on the host at once and come back zeroed when touched.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::{Backend, QueueError, Queues, config_bytes};
use crate::memory::Dma;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORT: usize = 2;
const PAGE: u64 = 4096;

const DEFLATE_ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;

/// See the module.
#[derive(Default)]
pub struct Balloon {
    /// Pages of 4 KiB the host wants.
    wanted: AtomicU32,
    /// Pages the guest says it gave.
    actual: AtomicU32,
    /// Bytes dropped so far, for statistics.
    dropped: AtomicU64,
}

impl Balloon {
    pub fn new() -> Balloon {
        Balloon::default()
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

    /// Drops the whole pages within a range of guest memory.
    fn drop_range(&self, dma: &Dma, address: u64, len: u64) {
        let start = address.next_multiple_of(PAGE);
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

impl Backend for Balloon {
    fn kind(&self) -> u16 {
        5
    }
    fn class(&self) -> u32 {
        0xff_0000
    }
    fn features(&self) -> u64 {
        DEFLATE_ON_OOM | REPORTING
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![128; 3]
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
        queues.with(index, |queue, dma| {
            while let Some(chain) = queue.pop(dma)? {
                match index {
                    INFLATE => {
                        // Page numbers; runs of them are dropped together.
                        let mut list = vec![0; chain.readable_len().min(1 << 16) as usize];
                        let len = chain.read(dma, 0, &mut list)?;
                        let mut run: Option<(u64, u64)> = None;
                        for number in list[..len].chunks_exact(4) {
                            let page = u64::from(u32::from_le_bytes(
                                number.try_into().unwrap_or_default(),
                            )) * PAGE;
                            run = match run {
                                Some((start, len)) if start + len == page => {
                                    Some((start, len + PAGE))
                                }
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
                    REPORT => {
                        for (address, len) in &chain.writable {
                            self.drop_range(dma, *address, u64::from(*len));
                        }
                    }
                    DEFLATE => {}
                    _ => {}
                }
                queue.push(dma, chain.head, 0)?;
            }
            Ok(())
        })
    }

    fn reset(&self) {
        self.actual.store(0, Ordering::Relaxed);
    }

    fn save(&self) -> serde_json::Value {
        serde_json::json!([
            self.wanted.load(Ordering::Relaxed),
            self.actual.load(Ordering::Relaxed)
        ])
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), String> {
        let number = |at: usize| {
            state[at]
                .as_u64()
                .and_then(|value| u32::try_from(value).ok())
        };
        let (Some(wanted), Some(actual)) = (number(0), number(1)) else {
            return Err("no page counts".into());
        };
        self.wanted.store(wanted, Ordering::Relaxed);
        self.actual.store(actual, Ordering::Relaxed);
        Ok(())
    }
}
