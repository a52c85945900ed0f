//! Threads for what may wait for a disk, so that a device's own thread goes on with the next request.
//!
//! ```text
//!   device thread ─ run(job) ─▶ queue ─▶ one of a few threads: the job, which tells the device when it is done
//! ```

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use disk::Disk;

/// Threads of one pool: as many requests wait for the disk at once.
const THREADS: usize = 4;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Inner {
    jobs: VecDeque<Job>,
    running: usize,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    inner: Mutex<Inner>,
    work: Condvar,
    idle: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread's life. A defect of one job, which ends the machine, leaves the others to be done; it goes on at the end.
    fn work(&self) {
        let mut defect = None;
        let mut inner = self.lock();
        loop {
            if let Some(job) = inner.jobs.pop_front() {
                inner.running += 1;
                drop(inner);
                if let Err(panic) = catch_unwind(AssertUnwindSafe(job)) {
                    defect.get_or_insert(panic);
                }
                inner = self.lock();
                inner.running -= 1;
                if inner.running == 0 && inner.jobs.is_empty() {
                    self.idle.notify_all();
                }
            } else if inner.closed {
                drop(inner);
                if let Some(panic) = defect {
                    resume_unwind(panic);
                }
                return;
            } else {
                inner = self
                    .work
                    .wait(inner)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

/// See the module.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Pool {
    /// A pool whose threads are called `name` and a number.
    ///
    /// # Errors
    /// Where the host gives no thread.
    pub fn new(name: &str) -> std::io::Result<Pool> {
        let pool = Pool {
            shared: Arc::default(),
            threads: Mutex::default(),
        };
        for number in 0..THREADS {
            let shared = pool.shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("{name}-io{number}"))
                .spawn(move || {
                    crate::process::jail::confine(crate::process::jail::Thread::Io);
                    shared.work();
                })?;
            pool.threads
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(thread);
        }
        Ok(pool)
    }

    /// Runs `job` on one of the threads, in the order of the calls but several at once. It is dropped once the pool is
    /// closed.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut inner = self.shared.lock();
        if inner.closed {
            return;
        }
        inner.jobs.push_back(Box::new(job));
        drop(inner);
        self.shared.work.notify_one();
    }

    /// Runs a job and waits for what it says; `None` where it never ran to its end. For threads that may not write files.
    pub fn call<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let (done, wait) = std::sync::mpsc::sync_channel(1);
        self.run(move || {
            let _ = done.send(job());
        });
        wait.recv().ok()
    }

    /// Returns once every job given before has ended.
    pub fn wait_idle(&self) {
        let mut inner = self.shared.lock();
        while inner.running > 0 || !inner.jobs.is_empty() {
            inner = self
                .shared
                .idle
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Runs what was given and ends the threads.
    pub fn close(&self) {
        self.shared.lock().closed = true;
        self.shared.work.notify_all();
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            crate::defect::join(thread);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.close();
    }
}

/// Makes a disk larger from a thread that may not write files.
///
/// # Errors
/// For people: why it cannot be.
pub fn grow_on(pool: &Pool, disk: Arc<dyn Disk>, size: u64) -> Result<(), String> {
    match pool.call(move || disk.grow(size)) {
        Some(grown) => grown.map_err(|error| error.to_string()),
        None => Err("the machine has ended".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn all_jobs_are_done_when_it_is_idle_and_when_it_is_closed() {
        let pool = Pool::new("test").unwrap();
        let done = Arc::new(AtomicU32::new(0));
        let give = |count: u32| {
            for _ in 0..count {
                let done = done.clone();
                pool.run(move || {
                    std::thread::yield_now();
                    done.fetch_add(1, Ordering::SeqCst);
                });
            }
        };
        give(100);
        pool.wait_idle();
        assert_eq!(done.load(Ordering::SeqCst), 100);
        give(50);
        pool.close();
        assert_eq!(done.load(Ordering::SeqCst), 150);
        // Nobody would do these: who waits for one is told.
        assert_eq!(pool.call(|| 7), None);
        pool.wait_idle();
    }
}
