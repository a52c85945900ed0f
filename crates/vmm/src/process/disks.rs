//! What stands between a machine's devices and its disks: counts, a full host disk, a damaged image.
//!
//! A write for which the host has no room is kept and tried again, and the guest's CPUs stand still meanwhile, so
//! that nothing in the guest times out; or it fails, as [`OnDiskFull`] says:
//!
//! ```text
//!   write ──no room──▶ CPUs paused, problem shown ──room──▶ write done, CPUs go on
//!              │                └──kill──▶ write fails
//!              └──policy error──▶ problem shown, write fails
//! ```

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use disk::{Disk, DiskError, Place, Way};
use serde::{Deserialize, Serialize};
use vm_memory::VolatileSlice;

use crate::control::Control;

/// Between two tries of a write that found no room.
const PAUSE: Duration = Duration::from_millis(250);

/// What follows a write for which the host has no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDiskFull {
    /// The machine is paused, with the write kept, until there is room.
    #[default]
    Pause,
    /// The guest is told of an error, as by a broken disk.
    Error,
}

/// What went through a disk since the process began.
#[derive(Debug, Default)]
pub struct Counters {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
}

/// [`Counters`] at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskCounts {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
}

impl Counters {
    fn note(&self, way: Way, len: u64) {
        let (count, bytes) = match way {
            Way::FromFile => (&self.reads, &self.read_bytes),
            Way::ToFile => (&self.writes, &self.written_bytes),
        };
        count.fetch_add(1, Ordering::Relaxed);
        bytes.fetch_add(len, Ordering::Relaxed);
    }

    pub fn now(&self) -> DiskCounts {
        let at = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DiskCounts {
            reads: at(&self.reads),
            read_bytes: at(&self.read_bytes),
            writes: at(&self.writes),
            written_bytes: at(&self.written_bytes),
        }
    }
}

#[derive(Default)]
struct Waiting {
    writes: usize,
    problem: Option<String>,
    /// What is wrong with a disk, for good.
    damage: Option<String>,
    /// It was said that the guest is told of errors.
    refused: bool,
    /// We paused the CPUs, so we let them go on.
    paused: bool,
}

type Notice = Box<dyn Fn(&str) + Send + Sync>;

/// The writes of one machine that wait for room.
pub struct Room {
    control: Arc<Control>,
    policy: OnDiskFull,
    /// Tells people.
    notice: Notice,
    waiting: Mutex<Waiting>,
}

impl Room {
    /// `notice` is told what keeps the machine from running, and when it goes on.
    pub fn new(
        control: Arc<Control>,
        policy: OnDiskFull,
        notice: impl Fn(&str) + Send + Sync + 'static,
    ) -> Arc<Room> {
        Arc::new(Room {
            control,
            policy,
            notice: Box::new(notice),
            waiting: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What keeps the machine from running, or from its disks, for people.
    pub fn problem(&self) -> Option<String> {
        let waiting = self.lock();
        waiting.problem.clone().or_else(|| waiting.damage.clone())
    }

    /// What keeps it from running.
    pub fn obstacle(&self) -> Option<String> {
        self.lock().problem.clone()
    }

    /// Notes the first damage that is found, which stays.
    fn note_damage(&self, path: &std::path::Path, error: &DiskError) {
        if !is_damage(error) {
            return;
        }
        let mut waiting = self.lock();
        if waiting.damage.is_none() {
            let text = format!("the disk {} is broken: {error}", path.display());
            waiting.damage = Some(text.clone());
            drop(waiting);
            self.tell(&text);
        }
    }

    fn tell(&self, text: &str) {
        tracing::error!("{text}");
        (self.notice)(text);
    }

    /// A person paused the machine: it stays paused when there is room.
    pub fn keep_paused(&self) {
        self.lock().paused = false;
    }

    fn begin(&self, path: &std::path::Path, error: &DiskError) {
        let mut waiting = self.lock();
        waiting.writes += 1;
        if waiting.writes == 1 {
            let problem = format!(
                "the machine is paused: {}. It goes on by itself when there is room",
                no_room(path, error)
            );
            waiting.paused = !self.control.is_paused();
            waiting.problem = Some(problem.clone());
            drop(waiting);
            self.tell(&problem);
        }
    }

    fn end(&self) {
        let mut waiting = self.lock();
        waiting.writes -= 1;
        if waiting.writes == 0 {
            waiting.problem = None;
            // With the lock: a person may pause it from here on.
            if std::mem::take(&mut waiting.paused) {
                self.control.resume();
            }
            drop(waiting);
            (self.notice)("there is room again");
        }
    }

    /// Does `work` again and again while the host has no room for it.
    ///
    /// The CPUs are asked to stop and not waited for: one of them may wait for this very write.
    fn make<T>(
        &self,
        path: &std::path::Path,
        mut work: impl FnMut() -> Result<T, DiskError>,
    ) -> Result<T, DiskError> {
        let mut waited = false;
        loop {
            let result = work();
            match &result {
                Err(error) if lacks_room(error) && self.policy == OnDiskFull::Error => {
                    self.note_refusal(path, error);
                    return result;
                }
                Err(error) if lacks_room(error) && !self.control.has_ended() => {
                    if !waited {
                        waited = true;
                        self.begin(path, error);
                    }
                    self.control.ask_pause();
                    std::thread::sleep(PAUSE);
                }
                _ => {
                    if waited {
                        self.end();
                    }
                    if let Err(error) = &result {
                        self.note_damage(path, error);
                    }
                    return result;
                }
            }
        }
    }
}

impl Room {
    /// Says once that the guest is told of errors.
    fn note_refusal(&self, path: &std::path::Path, error: &DiskError) {
        if std::mem::replace(&mut self.lock().refused, true) {
            return;
        }
        self.tell(&format!(
            "{}: the guest is told of an error, as --on-disk-full error says",
            no_room(path, error)
        ));
    }
}

fn is_damage(error: &DiskError) -> bool {
    matches!(error, DiskError::Io { source, .. } if source.kind() == std::io::ErrorKind::InvalidData)
}

fn lacks_room(error: &DiskError) -> bool {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error, DiskError::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded))
}

fn no_room(path: &std::path::Path, error: &DiskError) -> String {
    let reason = match error {
        DiskError::Io { source, .. } => source.to_string(),
        other => other.to_string(),
    };
    format!(
        "the host has no room to write {} ({reason})",
        path.display()
    )
}

/// See the module.
pub struct GuardedDisk {
    pub disk: Box<dyn Disk>,
    pub path: PathBuf,
    pub counters: Arc<Counters>,
    pub room: Arc<Room>,
}

impl Disk for GuardedDisk {
    fn len(&self) -> u64 {
        self.disk.len()
    }
    fn read_only(&self) -> bool {
        self.disk.read_only()
    }
    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        self.counters.note(Way::FromFile, data.len() as u64);
        self.room
            .make(&self.path, || self.disk.read_at(offset, data))
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.counters.note(Way::ToFile, data.len() as u64);
        self.room
            .make(&self.path, || self.disk.write_at(offset, data))
    }
    fn read_volatile_at(
        &self,
        offset: u64,
        buffers: &[VolatileSlice<'_>],
    ) -> Result<(), DiskError> {
        self.counters.note(Way::FromFile, disk::total(buffers));
        self.room
            .make(&self.path, || self.disk.read_volatile_at(offset, buffers))
    }
    fn try_read_volatile_at(
        &self,
        offset: u64,
        buffers: &[VolatileSlice<'_>],
    ) -> Result<bool, DiskError> {
        let done = self.disk.try_read_volatile_at(offset, buffers)?;
        if done {
            self.counters.note(Way::FromFile, disk::total(buffers));
        }
        Ok(done)
    }
    fn write_volatile_at(
        &self,
        offset: u64,
        buffers: &[VolatileSlice<'_>],
    ) -> Result<(), DiskError> {
        self.counters.note(Way::ToFile, disk::total(buffers));
        self.room
            .make(&self.path, || self.disk.write_volatile_at(offset, buffers))
    }
    fn try_write_volatile_at(
        &self,
        offset: u64,
        buffers: &[VolatileSlice<'_>],
    ) -> Result<bool, DiskError> {
        let done = self.disk.try_write_volatile_at(offset, buffers)?;
        if done {
            self.moved(Way::ToFile, disk::total(buffers));
        }
        Ok(done)
    }
    fn place(&self, way: Way, offset: u64, len: u64) -> Option<Place> {
        self.disk.place(way, offset, len)
    }
    fn moved(&self, way: Way, len: u64) {
        self.counters.note(way, len);
    }
    fn flush_file(&self) -> Option<Arc<File>> {
        self.disk.flush_file()
    }
    fn grow(&self, size: u64) -> Result<(), DiskError> {
        self.disk.grow(size)
    }
    fn flush(&self) -> Result<(), DiskError> {
        self.room.make(&self.path, || self.disk.flush())
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.room
            .make(&self.path, || self.disk.discard(offset, len))
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.room
            .make(&self.path, || self.disk.write_zeroes(offset, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    /// A disk on a host without room, until there is.
    #[derive(Default)]
    struct Cramped {
        roomy: Arc<AtomicBool>,
        written: Arc<AtomicU64>,
    }

    impl Disk for Cramped {
        fn len(&self) -> u64 {
            4096
        }
        fn read_only(&self) -> bool {
            false
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> Result<(), DiskError> {
            Ok(())
        }
        fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
            if !self.roomy.load(Ordering::SeqCst) {
                return Err(DiskError::Io {
                    what: "writing",
                    offset,
                    len: data.len() as u64,
                    source: std::io::Error::from(std::io::ErrorKind::StorageFull),
                });
            }
            self.written.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
        fn flush(&self) -> Result<(), DiskError> {
            Ok(())
        }
        fn discard(&self, _: u64, _: u64) -> Result<(), DiskError> {
            Ok(())
        }
        fn write_zeroes(&self, _: u64, _: u64) -> Result<(), DiskError> {
            Ok(())
        }
        fn grow(&self, _: u64) -> Result<(), DiskError> {
            Ok(())
        }
    }

    fn guarded(policy: OnDiskFull) -> (Arc<GuardedDisk>, Arc<AtomicBool>, Arc<AtomicU64>) {
        let disk = Cramped::default();
        let (roomy, written) = (disk.roomy.clone(), disk.written.clone());
        let guarded = GuardedDisk {
            disk: Box::new(disk),
            path: "disk".into(),
            counters: Arc::default(),
            room: Room::new(Control::new(), policy, |_| ()),
        };
        (Arc::new(guarded), roomy, written)
    }

    fn until(mut done: impl FnMut() -> bool) {
        while !done() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_write_without_room_waits_with_the_machine_paused_and_is_not_lost() {
        let (disk, roomy, written) = guarded(OnDiskFull::Pause);
        std::thread::scope(|scope| {
            let writes = [0, 512].map(|at| {
                let disk = disk.clone();
                scope.spawn(move || disk.write_at(at, &[1; 512]))
            });
            until(|| disk.room.lock().writes == 2 && disk.room.control.is_paused());
            assert!(disk.room.problem().unwrap().contains("no room"));
            roomy.store(true, Ordering::SeqCst);
            for write in writes {
                write.join().unwrap().unwrap();
            }
        });
        assert_eq!(written.load(Ordering::SeqCst), 2);
        assert!(disk.room.problem().is_none() && !disk.room.control.is_paused());
        assert_eq!(disk.counters.now().written_bytes, 1024);
    }

    #[test]
    fn with_the_policy_error_the_guest_is_told_and_the_machine_goes_on() {
        let (disk, roomy, _) = guarded(OnDiskFull::Error);
        assert!(disk.write_at(0, &[1; 512]).is_err());
        assert!(!disk.room.control.is_paused() && disk.room.obstacle().is_none());
        roomy.store(true, Ordering::SeqCst);
        disk.write_at(0, &[1; 512]).unwrap();
    }

    #[test]
    fn a_cpu_that_waits_for_the_write_itself_does_not_keep_it_from_being_done() {
        let (disk, roomy, written) = guarded(OnDiskFull::Pause);
        // A CPU inside a device, which waits for the disk.
        assert!(disk.room.control.enter());
        std::thread::scope(|scope| {
            let write = scope.spawn(|| disk.write_at(0, &[1; 512]));
            until(|| disk.room.problem().is_some());
            roomy.store(true, Ordering::SeqCst);
            write.join().unwrap().unwrap();
        });
        disk.room.control.leave();
        assert_eq!(written.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_machine_that_is_ended_does_not_wait_for_room() {
        let (disk, _, _) = guarded(OnDiskFull::Pause);
        std::thread::scope(|scope| {
            let write = scope.spawn(|| disk.write_at(0, &[1; 512]));
            until(|| disk.room.problem().is_some());
            disk.room.control.end(crate::control::Outcome::Killed);
            assert!(write.join().unwrap().is_err());
        });
    }
}
