//! What a device wants of a disk and cannot have at once: carried by the kernel's ring (io_uring) where there is one, by
//! the threads of a [`Pool`] otherwise and for what no ring does.
//!
//! ```text
//!   carry, sync ─▶ ring ──done──────────────────────────▶ landed() ─▶ the device
//!          │         └─not all of it─▶ pool: once more ──▶    ▲
//!          └─no ring, no plain place──▶ pool ─────────────────┘     event() is readable
//!   run ──────────────────────────────▶ pool ─────────────────┘
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use disk::{Disk, Ring, Task, Way};
use rustix::event::{EventfdFlags, eventfd};

use crate::memory::{Dma, MemoryError};
use crate::pool::Pool;

/// Bytes, and requests, of which a guest is told with one interrupt, at most: it works on them while the next are done.
pub const TELL_BYTES: u64 = 128 << 10;
pub const TELL_COUNT: usize = 32;

/// Whether the host takes writes into its cache at once, as it mostly does, or has too much of them there already.
#[derive(Default)]
pub struct Pace {
    /// Writes for which it is taken to be slow.
    slow: AtomicU32,
}

impl Pace {
    const QUICK: Duration = Duration::from_millis(2);
    const SLOW_FOR: u32 = 64;

    /// Does `write` at once, unless the last ones took long.
    pub fn keep<R, E>(&self, write: impl FnOnce() -> Result<Option<R>, E>) -> Result<Option<R>, E> {
        let slow = self.slow.load(Ordering::Relaxed);
        if slow > 0 {
            self.slow.store(slow - 1, Ordering::Relaxed);
            return Ok(None);
        }
        let begun = Instant::now();
        let done = write();
        if begun.elapsed() > Pace::QUICK {
            self.slow.store(Pace::SLOW_FOR, Ordering::Relaxed);
        }
        done
    }
}

/// A transfer between a disk and guest memory.
pub struct Transfer {
    pub disk: Arc<dyn Disk>,
    pub way: Way,
    pub offset: u64,
    /// Address and length.
    pub pieces: Vec<(u64, usize)>,
}

type Retry<R> = Box<dyn FnOnce() -> R + Send>;

struct Load<T, R> {
    token: T,
    /// What it has come to once the ring has done all of it.
    good: R,
    /// The same by calls that wait.
    retry: Retry<R>,
    transfer: Option<Transfer>,
    /// Keeps the guest's memory, which the kernel fills.
    dma: Dma,
}

struct Landed<T, R> {
    list: Mutex<Vec<(T, R)>>,
    event: OwnedFd,
}

impl<T, R> Landed<T, R> {
    fn add(&self, token: T, result: R) {
        self.list
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((token, result));
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

/// See the module. `T` names a request, `R` is what it came to. Locks are leaves, but for `reaping`.
pub struct Carrier<T, R> {
    ring: Option<Ring<Load<T, R>>>,
    /// Held by who reaps the ring, until what it could not do is with the pool: else another waits for what was taken
    /// already, or finds nothing under way too early. Taken before the ring's lock and the list's.
    reaping: Mutex<()>,
    pool: Arc<Pool>,
    landed: Arc<Landed<T, R>>,
}

impl<T: Send + 'static, R: Send + 'static> Carrier<T, R> {
    /// A carrier over `pool`, and over a ring of its own where the host lets it have one.
    ///
    /// # Errors
    /// Where the host gives no event.
    pub fn new(pool: Arc<Pool>) -> std::io::Result<Carrier<T, R>> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let wanted = std::env::var_os("BERTH_IO_URING").is_none_or(|word| word != "off");
        let ring = if wanted {
            Ring::new(Some(event.as_fd()))
                .inspect_err(|error| {
                    tracing::debug!("no io_uring, threads move the disks' data: {error}");
                })
                .ok()
        } else {
            None
        };
        Ok(Carrier {
            ring,
            reaping: Mutex::default(),
            pool,
            landed: Arc::new(Landed {
                list: Mutex::default(),
                event,
            }),
        })
    }

    /// Runs `work` on a thread that may wait.
    pub fn run(&self, token: T, work: impl FnOnce() -> R + Send + 'static) {
        let landed = self.landed.clone();
        self.pool.run(move || landed.add(token, work()));
    }

    /// Begins a transfer, at the latest with the next [`Carrier::submit`]. `good` is what it comes to; where anything stands
    /// in the way, `retry` does it by calls that wait.
    ///
    /// # Errors
    /// Where a piece is not guest memory; nothing was begun.
    pub fn carry(
        &self,
        dma: &Dma,
        transfer: Transfer,
        token: T,
        good: R,
        retry: impl FnOnce() -> R + Send + 'static,
    ) -> Result<(), MemoryError> {
        let buffers = dma.slices(&transfer.pieces)?;
        let len = disk::total(&buffers);
        let (way, offset) = (transfer.way, transfer.offset);
        let place = match &self.ring {
            Some(_) => transfer.disk.place(way, offset, len),
            None => None,
        };
        let task = place.map(|place| Task::Move {
            way,
            place,
            buffers: &buffers,
        });
        self.put(task, dma, Some(transfer), token, good, Box::new(retry));
        Ok(())
    }

    /// As [`Carrier::carry`], for a flush of `disk`.
    pub fn sync(
        &self,
        dma: &Dma,
        disk: &dyn Disk,
        token: T,
        good: R,
        retry: impl FnOnce() -> R + Send + 'static,
    ) {
        let task = disk.flush_file().map(Task::Sync);
        self.put(task, dma, None, token, good, Box::new(retry));
    }

    fn put(
        &self,
        task: Option<Task<'_>>,
        dma: &Dma,
        transfer: Option<Transfer>,
        token: T,
        good: R,
        retry: Retry<R>,
    ) {
        let load = Load {
            token,
            good,
            retry,
            transfer,
            dma: dma.clone(),
        };
        let refused = match (&self.ring, task) {
            // SAFETY: the buffers are guest memory, which the load keeps until it comes back.
            (Some(ring), Some(task)) => unsafe { ring.push(task, load) }.err(),
            _ => Some(load),
        };
        if let Some(load) = refused {
            self.run(load.token, load.retry);
        }
    }

    /// Hands what was begun to the kernel, all with one call.
    pub fn submit(&self) {
        if let Some(ring) = &self.ring {
            ring.submit();
        }
    }

    /// Readable while [`Carrier::landed`] has something to give.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.landed.event.as_fd()
    }

    /// What has ended, and what it came to.
    pub fn landed(&self) -> Vec<(T, R)> {
        let _ = rustix::io::read(&self.landed.event, &mut [0; 8]);
        let mut list = Vec::new();
        {
            let _alone = self.alone();
            self.reap(&mut list);
        }
        let mut more = self
            .landed
            .list
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        list.append(&mut more);
        list
    }

    fn alone(&self) -> MutexGuard<'_, ()> {
        self.reaping.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called with `reaping` held.
    fn reap(&self, list: &mut Vec<(T, R)>) {
        let Some(ring) = &self.ring else { return };
        ring.reap(|load, done| {
            if !done {
                return self.run(load.token, load.retry);
            }
            if let Some(transfer) = &load.transfer {
                let len = transfer.pieces.iter().map(|(_, len)| *len as u64).sum();
                transfer.disk.moved(transfer.way, len);
                if transfer.way == Way::FromFile {
                    for (address, len) in &transfer.pieces {
                        load.dma.written(*address, *len as u64);
                    }
                }
            }
            list.push((load.token, load.good));
        });
    }

    /// Returns once nothing is under way; all of it is in [`Carrier::landed`] then.
    pub fn drain(&self) {
        if let Some(ring) = &self.ring {
            let _alone = self.alone();
            while ring.is_busy() {
                ring.wait();
                let mut list = Vec::new();
                self.reap(&mut list);
                list.into_iter()
                    .for_each(|(token, result)| self.landed.add(token, result));
            }
        }
        self.pool.wait_idle();
    }
}

#[cfg(test)]
mod tests {
    use disk::{DiskError, RawDisk};

    use super::*;
    use crate::virtio::queue::tests::dma;

    fn carrier() -> Carrier<u32, Result<(), String>> {
        Carrier::new(Arc::new(Pool::new("test").unwrap())).unwrap()
    }

    fn raw(content: &[u8]) -> (tempfile::NamedTempFile, Arc<dyn Disk>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let disk: Arc<dyn Disk> = Arc::new(RawDisk::open(file.path(), false).unwrap());
        (file, disk)
    }

    #[test]
    fn a_transfer_a_flush_and_a_job_land_whatever_carries_them() {
        let mut with_threads = carrier();
        with_threads.ring = None;
        for carrier in [carrier(), with_threads] {
            let dma = dma();
            let (_file, disk) = raw(&[7; 4096]);
            let transfer = Transfer {
                disk: disk.clone(),
                way: Way::FromFile,
                offset: 512,
                pieces: vec![(0x1000, 100), (0x3000, 412)],
            };
            let (again, memory) = (disk.clone(), dma.clone());
            carrier
                .carry(&dma, transfer, 1, Ok(()), move || {
                    let buffers = memory.slices(&[(0x1000, 100), (0x3000, 412)]);
                    again
                        .read_volatile_at(512, &buffers.unwrap())
                        .map_err(|error| error.to_string())
                })
                .unwrap();
            let flushed = disk.clone();
            carrier.sync(&dma, &*disk, 2, Ok(()), move || {
                flushed.flush().map_err(|error| error.to_string())
            });
            carrier.run(3, || Err("as it was told".into()));
            carrier.submit();
            carrier.drain();
            let mut landed = carrier.landed();
            landed.sort_by_key(|(token, _)| *token);
            assert_eq!(
                landed,
                [(1, Ok(())), (2, Ok(())), (3, Err("as it was told".into()))]
            );
            let mut bytes = [0; 412];
            dma.read(0x3000, &mut bytes).unwrap();
            assert_eq!(bytes, [7; 412]);
        }
    }

    #[test]
    fn what_the_ring_could_not_do_is_done_again_and_says_why_it_fails() {
        let carrier = carrier();
        let dma = dma();
        let (file, disk) = raw(&[7; 4096]);
        // The file is cut off behind the disk's back.
        file.as_file().set_len(1024).unwrap();
        let transfer = Transfer {
            disk: disk.clone(),
            way: Way::FromFile,
            offset: 0,
            pieces: vec![(0x1000, 4096)],
        };
        let retry = move || {
            disk.read_at(0, &mut [0; 4096])
                .map_err(|error: DiskError| error.to_string())
        };
        carrier.carry(&dma, transfer, 1, Ok(()), retry).unwrap();
        carrier.drain();
        let landed = carrier.landed();
        assert_eq!(landed.len(), 1);
        assert!(
            landed[0]
                .1
                .as_ref()
                .unwrap_err()
                .contains("reading of 4096")
        );
    }

    #[test]
    fn after_a_slow_write_the_next_ones_do_not_hold_up_the_queue() {
        let pace = Pace::default();
        let write = |length| {
            move || {
                std::thread::sleep(length);
                Ok::<_, ()>(Some(()))
            }
        };
        assert_eq!(pace.keep(write(Duration::from_millis(5))), Ok(Some(())));
        for _ in 0..Pace::SLOW_FOR {
            assert_eq!(pace.keep(write(Duration::ZERO)), Ok(None));
        }
        assert_eq!(pace.keep(write(Duration::ZERO)), Ok(Some(())));
    }

    #[test]
    fn memory_that_is_none_begins_nothing() {
        let carrier = carrier();
        let dma = dma();
        let (_file, disk) = raw(&[7; 4096]);
        let transfer = Transfer {
            disk,
            way: Way::ToFile,
            offset: 0,
            pieces: vec![(u64::MAX - 10, 512)],
        };
        assert!(carrier.carry(&dma, transfer, 1, Ok(()), || Ok(())).is_err());
        carrier.drain();
        assert!(carrier.landed().is_empty());
    }
}
