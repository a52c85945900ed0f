//! A ring of requests to the kernel (io_uring(7)): many transfers begin with one system call, and none of them keeps a
//! thread waiting.
//!
//! ```text
//!   push, push, push ─▶ submit ─▶ the kernel ─▶ the ring's descriptor is readable ─▶ reap: tokens come back
//! ```
//!
//! A ring reads, writes and syncs files that are open already and can do nothing else: it is restricted to that before its
//! first use, since its requests pass no seccomp filter. Where the kernel or a filter refuses a ring
//! (`kernel.io_uring_disabled`, Linux before 5.10), [`Ring::new`] fails and the caller's threads do the work.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use io_uring::register::Restriction;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use rustix::event::{PollFd, PollFlags, poll};
use vm_memory::VolatileSlice;

use crate::place::{Part, Place, Way, split, zero};

/// Requests that wait to be submitted, at most.
const ENTRIES: u32 = 256;
/// Kernel threads for what cannot be done without waiting, each of bounded and unbounded work.
const WORKERS: u32 = 4;
/// Tries of a submission that the kernel is too busy for.
const TRIES: u32 = 1000;

/// What the kernel is asked to do.
pub enum Task<'a> {
    /// Moves all of `buffers`, which are as long as `place`.
    Move {
        way: Way,
        place: Place,
        buffers: &'a [VolatileSlice<'a>],
    },
    /// fdatasync(2).
    Sync(Arc<File>),
}

/// Pieces of memory that nobody but the kernel follows.
struct Vectors(#[expect(dead_code, reason = "kept for the kernel")] Vec<libc::iovec>);

// SAFETY: the pointers in it are never followed here; what they name is kept by whoever pushed the task, from any thread.
unsafe impl Send for Vectors {}

struct Slot<T> {
    token: T,
    /// Of all parts; the kernel reads them until the last request of this slot ends.
    _vectors: Vectors,
    /// Keeps the files open and their clusters in use.
    _place: Option<Place>,
    _file: Option<Arc<File>>,
    /// Bytes of each request, by its number.
    wanted: Vec<usize>,
    /// Requests without an answer.
    left: usize,
    done: bool,
}

struct Inner<T> {
    ring: IoUring,
    slots: Vec<Option<Slot<T>>>,
    free: Vec<usize>,
    /// Names of the requests that the kernel has not taken yet, in order.
    queued: VecDeque<u64>,
    /// Requests without an answer, those of `queued` too.
    in_flight: usize,
    /// The kernel takes no more; what it has taken still ends.
    broken: bool,
    /// Tasks that ended without the kernel.
    stranded: Vec<Slot<T>>,
    /// What the kernel makes readable with each task that ends; of the stranded it does not know.
    event: Option<OwnedFd>,
}

/// See the module. `T` comes back when a task has ended. Its lock is a leaf.
pub struct Ring<T> {
    /// A second descriptor of the ring, to wait on without its lock.
    readable: OwnedFd,
    inner: Mutex<Inner<T>>,
    /// Answers that the kernel has room for.
    limit: usize,
}

/// A request's name: its slot, and which of the slot's requests it is.
fn name(slot: usize, request: usize) -> u64 {
    (request as u64) << 32 | slot as u64
}

impl<T> Ring<T> {
    /// A ring that also makes `event` (an eventfd) readable with each task that ends.
    ///
    /// # Errors
    /// Where the kernel has no such ring, or does not let this process have one.
    pub fn new(event: Option<BorrowedFd<'_>>) -> io::Result<Ring<T>> {
        let ring = IoUring::builder()
            .setup_r_disabled()
            .setup_clamp()
            .build(ENTRIES)?;
        let submitter = ring.submitter();
        // A hint: where it is not known, the kernel's own bound holds.
        let _ = submitter.register_iowq_max_workers(&mut [WORKERS, WORKERS]);
        if let Some(event) = event {
            submitter.register_eventfd(event.as_raw_fd())?;
        }
        let mut allowed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
        ]
        .map(Restriction::sqe_op);
        submitter.register_restrictions(&mut allowed)?;
        submitter.register_enable_rings()?;
        // SAFETY: the ring, whose descriptor this is, outlives the borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) };
        let readable = rustix::io::fcntl_dupfd_cloexec(fd, 0)?;
        let event = event
            .map(|event| rustix::io::fcntl_dupfd_cloexec(event, 0))
            .transpose()?;
        Ok(Ring {
            limit: ring.params().cq_entries() as usize,
            readable,
            inner: Mutex::new(Inner {
                ring,
                slots: Vec::new(),
                free: Vec::new(),
                queued: VecDeque::new(),
                in_flight: 0,
                broken: false,
                stranded: Vec::new(),
                event,
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable while [`Ring::reap`] has something to give.
    pub fn readable(&self) -> BorrowedFd<'_> {
        self.readable.as_fd()
    }

    /// Queues a task for the next [`Ring::submit`]. `token` comes back at once where the ring has no room for it, or the
    /// task needs no kernel at all.
    ///
    /// # Safety
    /// The memory of the task's buffers stays mapped until `token` comes back from [`Ring::reap`], or the ring was dropped.
    pub unsafe fn push(&self, task: Task<'_>, token: T) -> Result<(), T> {
        let mut entries: Vec<squeue::Entry> = Vec::new();
        let mut wanted = Vec::new();
        let (vectors, place, file) = match task {
            Task::Move {
                way,
                place,
                buffers,
            } => {
                let Some((vectors, counts)) = split(&place, buffers) else {
                    return Err(token);
                };
                let mut rest = &vectors[..];
                for (part, count) in place.parts.iter().zip(counts) {
                    let (list, later) = rest.split_at(count);
                    rest = later;
                    let Part::File { file, offset, len } = part else {
                        list.iter().for_each(zero);
                        continue;
                    };
                    let (fd, count) = (Fd(file.as_raw_fd()), count as u32);
                    entries.push(match way {
                        Way::FromFile => opcode::Readv::new(fd, list.as_ptr(), count)
                            .offset(*offset)
                            .build(),
                        Way::ToFile => opcode::Writev::new(fd, list.as_ptr(), count)
                            .offset(*offset)
                            .build(),
                    });
                    wanted.push(*len as usize);
                }
                (vectors, Some(place), None)
            }
            Task::Sync(file) => {
                let fd = Fd(file.as_raw_fd());
                entries.push(opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build());
                wanted.push(0);
                (Vec::new(), None, Some(file))
            }
        };
        let left = entries.len();
        let mut inner = self.lock();
        let fits = inner.in_flight + left <= self.limit && left <= ENTRIES as usize;
        if inner.broken || !fits || left == 0 {
            return Err(token);
        }
        if inner.queued.len() + left > ENTRIES as usize {
            inner.submit();
        }
        let slot = inner.free.pop().unwrap_or_else(|| {
            inner.slots.push(None);
            inner.slots.len() - 1
        });
        for (request, entry) in entries.iter_mut().enumerate() {
            entry.set_user_data(name(slot, request));
        }
        // SAFETY: the slot keeps the files and the vectors until its last request has ended; the memory is the caller's
        // promise.
        let pushed =
            !inner.broken && unsafe { inner.ring.submission().push_multiple(&entries) }.is_ok();
        if !pushed {
            inner.free.push(slot);
            return Err(token);
        }
        inner.queued.extend((0..left).map(|n| name(slot, n)));
        inner.in_flight += left;
        inner.slots[slot] = Some(Slot {
            token,
            _vectors: Vectors(vectors),
            _place: place,
            _file: file,
            wanted,
            left,
            done: true,
        });
        Ok(())
    }

    /// Hands what was pushed to the kernel.
    pub fn submit(&self) {
        let mut inner = self.lock();
        if !inner.queued.is_empty() {
            inner.submit();
        }
    }

    /// True while tasks have not come back.
    pub fn is_busy(&self) -> bool {
        let inner = self.lock();
        inner.in_flight > 0 || !inner.stranded.is_empty()
    }

    /// Calls `each` with the token of every task that has ended, and whether all of it was done; what was not is to be done
    /// again by the calls that wait, which say what is wrong.
    pub fn reap(&self, mut each: impl FnMut(T, bool)) {
        let ended = {
            let mut inner = self.lock();
            let inner = &mut *inner;
            let mut ended = std::mem::take(&mut inner.stranded);
            for answer in inner.ring.completion() {
                let (index, request) = (
                    answer.user_data() as u32 as usize,
                    (answer.user_data() >> 32) as usize,
                );
                inner.in_flight -= 1;
                let Some(Some(slot)) = inner.slots.get_mut(index) else {
                    continue;
                };
                let wanted = slot.wanted.get(request).copied();
                slot.done &= usize::try_from(answer.result()).ok() == wanted;
                slot.left -= 1;
                if slot.left == 0 {
                    ended.extend(inner.slots[index].take());
                    inner.free.push(index);
                }
            }
            ended
        };
        for slot in ended {
            each(slot.token, slot.done);
        }
    }

    /// Returns once something can be reaped, or nothing is under way.
    pub fn wait(&self) {
        loop {
            self.submit();
            {
                let mut inner = self.lock();
                if inner.in_flight == 0
                    || !inner.stranded.is_empty()
                    || !inner.ring.completion().is_empty()
                {
                    return;
                }
            }
            let _ = poll(&mut [PollFd::new(&self.readable, PollFlags::IN)], None);
        }
    }
}

impl<T> Drop for Ring<T> {
    /// What is under way still moves memory: the ring is gone when that has ended.
    fn drop(&mut self) {
        while self.is_busy() {
            self.wait();
            self.reap(|_, _| ());
        }
    }
}

impl<T> Inner<T> {
    fn submit(&mut self) {
        for _ in 0..TRIES {
            match self.ring.submit() {
                Ok(taken) => {
                    self.queued.drain(..taken.min(self.queued.len()));
                    if self.queued.is_empty() {
                        return;
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN | libc::EBUSY) => std::thread::yield_now(),
                    _ => break,
                },
            }
        }
        self.strand();
    }

    /// The kernel takes no more: what it has not taken comes back undone.
    fn strand(&mut self) {
        self.broken = true;
        for data in std::mem::take(&mut self.queued) {
            self.in_flight -= 1;
            let index = data as u32 as usize;
            if let Some(Some(slot)) = self.slots.get_mut(index) {
                slot.done = false;
                slot.left -= 1;
                if slot.left == 0 {
                    self.stranded.extend(self.slots[index].take());
                }
            }
        }
        if let Some(event) = &self.event {
            let _ = rustix::io::write(event, &1u64.to_ne_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Disk, RawDisk};

    fn ring<T>() -> Option<Ring<T>> {
        match Ring::new(None) {
            Ok(ring) => Some(ring),
            Err(error) => {
                eprintln!("SKIPPED: no io_uring on this host: {error}");
                None
            }
        }
    }

    fn all<T>(ring: &Ring<T>) -> Vec<(T, bool)> {
        let mut ended = Vec::new();
        while ring.is_busy() {
            ring.wait();
            ring.reap(|token, done| ended.push((token, done)));
        }
        ended
    }

    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        file
    }

    #[test]
    fn transfers_and_a_sync_come_back_with_what_they_moved() {
        let Some(ring) = ring() else { return };
        let content: Vec<u8> = (0..64 << 10).map(|n| (n / 7) as u8).collect();
        let held = file(&content);
        let disk = RawDisk::open(held.path(), false).unwrap();
        let mut back = vec![0u8; 1 << 16];
        let (left, right) = back.split_at_mut(40_000);
        let (one, two) = left.split_at_mut(5);
        let buffers = [
            VolatileSlice::from(&mut *one),
            VolatileSlice::from(&mut *two),
        ];
        let task = |way, offset, buffers| Task::Move {
            way,
            place: disk
                .place(way, offset, 40_000)
                .expect("a raw disk lies where it lies"),
            buffers,
        };
        // SAFETY: the memory outlives the ring's work, which ends within this function.
        unsafe { ring.push(task(Way::FromFile, 100, &buffers), 1) }.unwrap();
        // SAFETY: a sync has no memory.
        unsafe { ring.push(Task::Sync(disk.flush_file().unwrap()), 2) }.unwrap();
        let mut ended = all(&ring);
        ended.sort();
        assert_eq!(ended, [(1, true), (2, true)]);
        drop(ring);
        assert_eq!([&*one, &*two].concat(), content[100..40_100]);
        assert!(right.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_the_file_has_not_is_said_to_be_undone() {
        let Some(ring) = ring() else { return };
        let held = file(&[7; 1000]);
        let place = Place {
            parts: vec![
                Part::Zeros { len: 100 },
                Part::File {
                    file: Arc::new(held.reopen().unwrap()),
                    offset: 900,
                    len: 200,
                },
            ],
            lease: None,
        };
        let mut memory = [1; 300];
        let buffers = [VolatileSlice::from(&mut memory[..])];
        let task = Task::Move {
            way: Way::FromFile,
            place,
            buffers: &buffers,
        };
        // SAFETY: the memory outlives the ring's work, which ends within this function.
        unsafe { ring.push(task, ()) }.unwrap();
        assert_eq!(all(&ring), [((), false)]);
        assert!(memory[..100] == [0; 100] && memory[100..200] == [7; 100]);
    }

    #[test]
    fn more_tasks_than_the_ring_has_room_for_are_given_back_and_the_rest_is_done() {
        let Some(ring) = ring() else { return };
        let held = file(&[5; 4096]);
        let disk = RawDisk::open(held.path(), false).unwrap();
        let mut memory = vec![0u8; 4096];
        let buffers = [VolatileSlice::from(&mut memory[..])];
        let (mut given, mut refused) = (0, 0);
        for number in 0..2000 {
            let task = Task::Move {
                way: Way::FromFile,
                place: disk.place(Way::FromFile, 0, 4096).unwrap(),
                buffers: &buffers,
            };
            // SAFETY: the memory outlives the ring's work, which ends within this function.
            match unsafe { ring.push(task, number) } {
                Ok(()) => given += 1,
                Err(back) => {
                    assert_eq!(back, number);
                    refused += 1;
                }
            }
        }
        assert!(given >= ENTRIES && refused > 0, "{given} {refused}");
        let ended = all(&ring);
        assert_eq!(ended.len(), given as usize);
        assert!(ended.iter().all(|(_, done)| *done));
    }

    #[test]
    fn a_ring_does_nothing_but_move_and_sync_files() {
        let Some(ring) = ring::<()>() else { return };
        let mut inner = ring.lock();
        let path = c"/etc/passwd";
        let open = opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build();
        // SAFETY: the name is a constant.
        unsafe { inner.ring.submission().push(&open) }.unwrap();
        inner.ring.submit_and_wait(1).unwrap();
        let answer = inner.ring.completion().next().unwrap().result();
        assert_eq!(answer, -libc::EACCES);
    }
}
