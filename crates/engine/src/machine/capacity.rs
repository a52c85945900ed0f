//! What machines may take of the host, and what was promised to them.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use base::Id;
use base::file::read_json;
use base::units::format_size;
use serde::{Deserialize, Serialize};

use super::record::{Machine, MachineSpec};
use super::{Machines, RECORD, disk};
use crate::{Error, Result};

pub(super) fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram as u64 * u64::from(info.mem_unit.max(1))
}

pub(super) fn host_cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

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

/// The space that machines' disks have and were promised, all in bytes.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Storage {
    pub machines: u64,
    pub running: u64,
    /// Sizes of all disks as their guests see them.
    pub promised: u64,
    /// What the disks take on the host.
    pub used: u64,
    /// Images' files that machines' disks lie on, each once.
    pub shared: u64,
    /// What stopped machines' disks take.
    pub reclaimable: u64,
    /// Free on the file system of the machines' folder.
    pub free: u64,
    /// What the disks may still grow.
    pub outstanding: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

impl Storage {
    /// A sentence where the host may not be able to keep what was promised, or soon.
    fn judge(&self) -> Option<String> {
        let figures = format!(
            "machines' disks may still grow by {}, and {} are free",
            format_size(self.outstanding),
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
    fn add(&mut self, folder: &Path, machine: &Machine) {
        let (promised, used) = disks_of(folder, machine);
        self.machines += 1;
        self.promised += promised;
        self.used += used;
        self.outstanding += promised.saturating_sub(used);
        if machine.run.is_some() {
            self.running += 1;
        } else {
            self.reclaimable += used;
        }
    }

    fn finish(mut self, state: &Path) -> Storage {
        if let Ok(about) = rustix::fs::statvfs(state) {
            self.free = about.f_bavail * about.f_frsize;
        }
        self.warning = self.judge();
        self
    }

    /// By the records in a daemon's state folder, for those who look without a daemon.
    pub fn of_state(state: &Path) -> Storage {
        let mut storage = Storage::default();
        let folders = fs::read_dir(state.join("machines")).into_iter().flatten();
        for folder in folders.flatten().map(|entry| entry.path()) {
            if let Ok(Some(machine)) = read_json::<Machine>(&folder.join(RECORD)) {
                storage.add(&folder, &machine);
            }
        }
        storage.finish(state)
    }
}

impl Machines {
    pub(super) fn check_capacity(&self, spec: &MachineSpec, in_use: u64) -> Result<()> {
        let cpus = host_cpus();
        if spec.cpus > cpus {
            return Err(Error::Capacity(format!(
                "{} CPUs were asked for; this host has {cpus} logical processors. Ask for at most {cpus}",
                spec.cpus
            )));
        }
        if spec.memory.saturating_add(in_use) > host_memory() && !spec.overcommit {
            let running = if in_use > 0 {
                format!(", of which running machines have {}", format_size(in_use))
            } else {
                String::new()
            };
            return Err(Error::Capacity(format!(
                "{} of memory were asked for; this host has {}{running}. Ask for less, stop a machine, or say --overcommit",
                format_size(spec.memory),
                format_size(host_memory())
            )));
        }
        Ok(())
    }

    /// Promised and actual space of all machines' disks.
    pub fn storage(&self) -> Storage {
        let mut storage = Storage::default();
        for slot in self.all() {
            storage.add(&slot.folder, &slot.lock());
        }
        storage.shared = self.bases.used();
        storage.finish(&self.folder)
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

    fn storage(outstanding: u64, free: u64) -> Option<String> {
        Storage {
            outstanding: outstanding << 30,
            free: free << 30,
            ..Storage::default()
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
        assert_eq!(storage(10, 100), None);
        assert!(storage(90, 100).unwrap().contains("runs short"));
        let warning = storage(101, 100).unwrap();
        assert!(warning.contains("more disk space is promised"), "{warning}");
        assert!(warning.contains("101"), "{warning}");
    }
}
