//! What machines may take of the host, and what was promised to them.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use base::Id;
use base::file::read_json;
use base::units::format_size;
use serde::{Deserialize, Serialize};

use super::record::{Machine, MachineSpec};
use super::{Machines, RECORD, disk};
use crate::{Error, Result};

/// Memory of the machines that run or are about to, in bytes. Its own lock, a leaf, is what two starts at once meet at.
#[derive(Default)]
pub(super) struct Ledger(Mutex<HashMap<Id, u64>>);

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, HashMap<Id, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a machine in where `check` lets it, which is told what the others have.
    pub fn admit(&self, id: &Id, memory: u64, check: impl FnOnce(u64) -> Result<()>) -> Result<()> {
        let mut entries = self.lock();
        let others = entries.iter().filter(|(other, _)| *other != id);
        check(others.map(|(_, memory)| memory).sum())?;
        entries.insert(id.clone(), memory);
        Ok(())
    }

    /// A machine that runs already, whatever the host has.
    pub fn note(&self, id: &Id, memory: u64) {
        self.lock().insert(id.clone(), memory);
    }

    pub fn strike(&self, id: &Id) {
        self.lock().remove(id);
    }
}

/// What machines' disks may still take of one file system of the host, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSystem {
    /// A folder on it: the daemon's, or that of the first disk found there.
    pub path: PathBuf,
    /// Disks on it that may grow.
    pub disks: u64,
    /// What they may still grow.
    pub outstanding: u64,
    pub free: u64,
    #[serde(skip)]
    device: u64,
}

impl FileSystem {
    /// A sentence where the host may not be able to keep what was promised, or soon.
    fn judge(&self) -> Option<String> {
        let figures = format!(
            "machines' disks may still grow by {} on the file system of {}, and {} are free",
            format_size(self.outstanding),
            self.path.display(),
            format_size(self.free)
        );
        let fix = "remove machines or images (berth system prune), or add space";
        if self.outstanding > self.free {
            Some(format!(
                "more disk space is promised to machines than there is: {figures}. {fix}"
            ))
        } else if self.outstanding > self.free / 5 * 4 {
            Some(format!(
                "disk space runs short for what is promised to machines: {figures}. {fix}"
            ))
        } else {
            None
        }
    }
}

/// The space that machines' disks have and were promised, all in bytes.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Storage {
    pub machines: u64,
    pub running: u64,
    /// Sizes of all disks as their guests see them, files of the user's that machines use among them.
    pub promised: u64,
    /// What these take on the host.
    pub used: u64,
    /// Images' files that machines' disks lie on, each once.
    pub shared: u64,
    /// What stopped machines' own disks take.
    pub reclaimable: u64,
    /// Free on the file system of the machines' folder.
    pub free: u64,
    /// What the disks may still grow, wherever they lie.
    pub outstanding: u64,
    /// The same by file system, that of the machines' folder first.
    #[serde(default)]
    pub file_systems: Vec<FileSystem>,
    /// Files that were counted: two machines may use one.
    #[serde(skip)]
    seen: HashSet<(u64, u64)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// Bytes that a file takes; 0 where it cannot be looked at.
pub(super) fn allocated(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |about| about.blocks() * 512)
}

/// Sizes of a machine's own disks: promised, used.
pub(super) fn disks_of(folder: &Path, machine: &Machine) -> (u64, u64) {
    let root = folder.join(disk::file_name(machine.format));
    let own = machine.drives.iter().filter(|drive| drive.own);
    own.fold(
        (machine.spec.disk, allocated(&root)),
        |(promised, used), drive| (promised + drive.size, used + allocated(&drive.path)),
    )
}

impl Storage {
    fn of_folder(folder: &Path) -> Storage {
        let mut storage = Storage::default();
        storage.file_system(folder);
        storage
    }

    fn file_system(&mut self, folder: &Path) -> Option<&mut FileSystem> {
        let device = fs::metadata(folder).ok()?.dev();
        let place = self
            .file_systems
            .iter()
            .position(|known| known.device == device);
        let place = place.unwrap_or_else(|| {
            let free =
                rustix::fs::statvfs(folder).map_or(0, |about| about.f_bavail * about.f_frsize);
            self.file_systems.push(FileSystem {
                path: folder.to_owned(),
                free,
                device,
                ..FileSystem::default()
            });
            self.file_systems.len() - 1
        });
        self.file_systems.get_mut(place)
    }

    /// Counts a disk of `size`; what it takes.
    fn add_disk(&mut self, path: &Path, size: u64, read_only: bool) -> u64 {
        let Ok(about) = fs::metadata(path) else {
            self.promised += size;
            return 0;
        };
        // A block device has its space already.
        if about.file_type().is_block_device() || !self.seen.insert((about.dev(), about.ino())) {
            return 0;
        }
        let used = about.blocks() * 512;
        self.promised += size;
        self.used += used;
        let rest = size.saturating_sub(used);
        if !read_only && rest > 0 {
            self.outstanding += rest;
            let folder = path.parent().unwrap_or(Path::new("/"));
            if let Some(file_system) = self.file_system(folder) {
                file_system.outstanding += rest;
                file_system.disks += 1;
            }
        }
        used
    }

    fn add(&mut self, folder: &Path, machine: &Machine) {
        let root = folder.join(disk::file_name(machine.format));
        let mut own = self.add_disk(&root, machine.spec.disk, false);
        for drive in &machine.drives {
            let used = self.add_disk(&drive.path, drive.size, drive.read_only);
            if drive.own {
                own += used;
            }
        }
        self.machines += 1;
        if machine.run.is_some() {
            self.running += 1;
        } else {
            self.reclaimable += own;
        }
    }

    fn finish(mut self) -> Storage {
        self.free = self.file_systems.first().map_or(0, |first| first.free);
        let warnings: Vec<String> = self
            .file_systems
            .iter()
            .filter_map(FileSystem::judge)
            .collect();
        self.warning = (!warnings.is_empty()).then(|| warnings.join("; "));
        self
    }

    /// By the records in a daemon's state folder, for those who look without a daemon.
    pub fn of_state(state: &Path) -> Storage {
        let mut storage = Storage::of_folder(state);
        let folders = fs::read_dir(state.join("machines")).into_iter().flatten();
        for folder in folders.flatten().map(|entry| entry.path()) {
            if let Ok(Some(machine)) = read_json::<Machine>(&folder.join(RECORD)) {
                storage.add(&folder, &machine);
            }
        }
        storage.finish()
    }
}

impl Machines {
    pub(super) fn check_capacity(&self, spec: &MachineSpec, in_use: u64) -> Result<()> {
        let cpus = base::host::processors();
        if spec.cpus > cpus {
            return Err(Error::Capacity(format!(
                "{} CPUs were asked for; this host has {cpus} logical processors. Ask for at most {cpus}",
                spec.cpus
            )));
        }
        if spec.memory.saturating_add(in_use) > base::host::memory() && !spec.overcommit {
            let running = if in_use > 0 {
                format!(", of which running machines have {}", format_size(in_use))
            } else {
                String::new()
            };
            return Err(Error::Capacity(format!(
                "{} of memory were asked for; this host has {}{running}. Ask for less, stop a machine, or say --overcommit",
                format_size(spec.memory),
                format_size(base::host::memory())
            )));
        }
        Ok(())
    }

    /// Promised and actual space of all machines' disks.
    pub fn storage(&self) -> Storage {
        let mut storage = Storage::of_folder(&self.folder);
        for slot in self.all() {
            storage.add(&slot.folder, &slot.lock());
        }
        storage.shared = self.bases.used();
        storage.finish()
    }

    /// Removes what nothing needs any more, and says in the log, once per change, that promised space may not be there.
    pub fn watch_storage(&self) {
        self.sweep_bases();
        let warning = self.storage().warning;
        let warned = self.warned.swap(warning.is_some(), Ordering::Relaxed);
        match warning {
            Some(warning) if !warned => tracing::warn!("{warning}"),
            None if warned => {
                tracing::info!("there is room again for what is promised to machines")
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(outstanding: u64, free: u64) -> Option<String> {
        FileSystem {
            path: "/srv".into(),
            outstanding: outstanding << 30,
            free: free << 30,
            ..FileSystem::default()
        }
        .judge()
    }

    #[test]
    fn two_starts_at_once_do_not_get_the_same_memory() {
        let ledger = Ledger::default();
        let check = |others: u64| match others + 60 > 100 {
            true => Err(Error::Capacity(format!("{others} are in use"))),
            false => Ok(()),
        };
        let ids = [Id::random(), Id::random()];
        let admitted = std::thread::scope(|scope| {
            let started = ids.each_ref().map(|id| {
                let ledger = &ledger;
                scope.spawn(move || ledger.admit(id, 60, check).is_ok())
            });
            started.map(|one| u32::from(one.join().unwrap()))
        });
        assert_eq!(admitted.iter().sum::<u32>(), 1);
        // One that ended makes room, and one's own entry is no obstacle.
        let winner = &ids[usize::from(admitted[0] == 0)];
        assert!(ledger.admit(winner, 60, check).is_ok());
        ledger.strike(winner);
        assert!(
            ledger
                .admit(&ids[usize::from(admitted[0] == 1)], 60, check)
                .is_ok()
        );
    }

    #[test]
    fn a_warning_comes_before_promised_space_exceeds_what_is_there() {
        assert_eq!(judged(10, 100), None);
        assert!(judged(90, 100).unwrap().contains("runs short"));
        let warning = judged(101, 100).unwrap();
        assert!(warning.contains("more disk space is promised"), "{warning}");
        assert!(
            warning.contains("101") && warning.contains("/srv"),
            "{warning}"
        );
    }

    #[test]
    fn a_disk_counts_once_where_it_lies_and_only_what_it_may_still_take() {
        let (state, other) = (tempfile::tempdir().unwrap(), "/dev/shm");
        let Ok(elsewhere) = tempfile::tempdir_in(other) else {
            eprintln!("SKIPPED: {other} cannot be written");
            return;
        };
        let mut storage = Storage::of_folder(state.path());
        let file = |folder: &Path, name: &str, size: u64| {
            let path = folder.join(name);
            fs::File::create(&path).unwrap().set_len(size).unwrap();
            path
        };
        let root = file(state.path(), "root", 1 << 30);
        let shared = file(elsewhere.path(), "shared", 4 << 30);
        let fixed = file(elsewhere.path(), "fixed", 2 << 30);
        storage.add_disk(&root, 1 << 30, false);
        storage.add_disk(&shared, 4 << 30, false);
        storage.add_disk(&shared, 4 << 30, false);
        storage.add_disk(&fixed, 2 << 30, true);
        let storage = storage.finish();
        assert_eq!(storage.promised, 7 << 30);
        assert_eq!(storage.outstanding, 5 << 30);
        let same = fs::metadata(state.path()).unwrap().dev()
            == fs::metadata(elsewhere.path()).unwrap().dev();
        if same {
            eprintln!("SKIPPED: {other} is on the file system of temporary files");
            return;
        }
        let [first, second] = &storage.file_systems[..] else {
            panic!("{storage:?}");
        };
        assert_eq!((first.outstanding, first.disks), (1 << 30, 1));
        assert_eq!((second.outstanding, second.disks), (4 << 30, 1));
        assert!(second.free > 0 && second.path == elsewhere.path());
    }
}
