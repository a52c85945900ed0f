//! Virtual machines of this host: records, disks, processes.
//!
//! ```text
//! create:  image ─files─▶ base, once (bases) ◀─below── the machine's disk in STATE/machines/ID
//! start:   tap of the network ─fd─▶ machine process (vmm::process), which outlives the daemon
//! later:   control socket in the folder's run/; the end by pidfd, how it ended in exit.json beside it
//! ```
//!
//! All calls block (disk, sockets) for milliseconds, `create` for seconds; callers on the reactor use a blocking
//! thread. One machine's changes are serialized by its lock; the map's lock is never held over I/O.

mod bases;
mod capacity;
mod create;
mod disk;
mod power;
mod process;
mod record;
mod run;
mod view;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use base::Id;
use base::file::{Durability, read_json, write_json};
use net::Endpoint;

pub use capacity::Storage;
pub use record::{
    Drive, DriveSpec, Machine, MachineChange, MachineSpec, MachineStats, MachineView, NO_NETWORK,
    Restart, Run, USER_NETWORK,
};
pub use vmm::process::protocol::Line;

use crate::{Engine, Error, Result};
use bases::Bases;
use capacity::Ledger;

const RECORD: &str = "machine.json";

/// One machine in memory.
struct Slot {
    folder: PathBuf,
    machine: Mutex<Machine>,
    /// Starts by the restart policy since it last ran for a while.
    restarts: AtomicU32,
    /// It is about to be removed or was.
    gone: AtomicBool,
}

impl Slot {
    fn new(folder: PathBuf, machine: Machine) -> Arc<Slot> {
        Arc::new(Slot {
            folder,
            machine: Mutex::new(machine),
            restarts: AtomicU32::new(0),
            gone: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All machines of a daemon.
pub struct Machines {
    engine: Arc<Engine>,
    folder: PathBuf,
    bases: Bases,
    ledger: Ledger,
    slots: RwLock<HashMap<Id, Arc<Slot>>>,
    /// The log says that space runs short.
    warned: AtomicBool,
}

/// The endpoints of machines whose processes live, for the networks to be taken over before [`Machines::open`].
pub fn live_endpoints(state: &Path) -> Vec<Endpoint> {
    live_runs(state)
        .into_iter()
        .filter_map(|run| run.endpoint)
        .collect()
}

/// Whether the process of any machine lives.
pub fn any_alive(state: &Path) -> bool {
    !live_runs(state).is_empty()
}

fn live_runs(state: &Path) -> Vec<Run> {
    let Ok(entries) = fs::read_dir(state.join("machines")) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| read_json::<Machine>(&entry.path().join(RECORD)).ok()??.run)
        .filter(|run| run.process.open().ok().flatten().is_some())
        .collect()
}

/// What an image without a kernel is answered with.
fn no_kernel(image: &str) -> Error {
    let name = image.split('/').next_back().unwrap_or(image);
    let bootstrap = if name.starts_with("debian:") {
        format!("berth image bootstrap {name} --kernel --tag {image}")
    } else {
        format!("berth image bootstrap debian:12 --kernel --tag {image}")
    };
    Error::Room {
        message: format!("the image {image} has no kernel in /boot, which a machine boots"),
        kind: base::Kind::Invalid,
        fix: Some(bootstrap),
    }
}

impl Machines {
    /// Reads the records, finds running machines again and removes what a killed daemon left half-made.
    ///
    /// # Errors
    /// Where the folder cannot be made or read.
    pub fn open(engine: Arc<Engine>) -> Result<Arc<Machines>> {
        let state = engine.config().paths.state.clone();
        let folder = state.join("machines");
        let failed = || Error::io(format!("cannot use {}", folder.display()));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(failed())?;
        let bases = Bases::open(state.join("machine-bases")).map_err(failed())?;
        let machines = Arc::new(Machines {
            engine,
            folder: folder.clone(),
            bases,
            ledger: Ledger::default(),
            slots: RwLock::default(),
            warned: AtomicBool::new(false),
        });
        for entry in fs::read_dir(&folder).map_err(failed())? {
            let path = entry.map_err(failed())?.path();
            let machine: Option<Machine> = match read_json(&path.join(RECORD)) {
                Ok(machine) => machine,
                Err(error) => {
                    tracing::error!(%error, folder = %path.display(), "a machine's record cannot be read; it is left alone");
                    continue;
                }
            };
            match machine {
                // The record is written last: without it, nothing was promised.
                None => {
                    let _ = fs::remove_dir_all(&path);
                }
                Some(machine) => machines.adopt(path, machine),
            }
        }
        machines.watch_storage();
        Ok(machines)
    }

    fn adopt(self: &Arc<Machines>, folder: PathBuf, machine: Machine) {
        let (id, name) = (machine.id.clone(), machine.spec.name.clone());
        let run = machine.run.clone();
        let ports = machine.spec.ports.clone();
        let memory = machine.spec.memory;
        let always = machine.spec.restart == Restart::Always && machine.last_exit.is_some();
        let slot = Slot::new(folder, machine);
        self.slots
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id, slot.clone());
        let Some(run) = run else {
            if always {
                // Also where a person had stopped it.
                slot.lock().stopped = false;
                self.restart_soon(&slot);
            }
            return;
        };
        match run.process.open() {
            Ok(Some(pidfd)) => {
                self.ledger.note(&slot.lock().id, memory);
                if let Some(endpoint) = run.endpoint.filter(|_| !ports.is_empty())
                    && let Err(error) = self.engine.networks().publish(&endpoint, &ports)
                {
                    tracing::error!(%error, machine = name, "its ports cannot be published again");
                }
                self.watch(slot, pidfd);
            }
            Ok(None) => self.ended(&slot),
            Err(error) => {
                tracing::error!(%error, machine = name, "its process cannot be looked at");
                self.ended(&slot);
            }
        }
    }

    fn all(&self) -> Vec<Arc<Slot>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.values().cloned().collect()
    }

    fn find(&self, name: &str) -> Result<Arc<Slot>> {
        let mut found = Vec::new();
        for slot in self.all() {
            let machine = slot.lock();
            if machine.id.as_str() == name || machine.spec.name == name {
                drop(machine);
                return Ok(slot);
            }
            let begins = !name.is_empty() && machine.id.as_str().starts_with(name);
            drop(machine);
            if begins {
                found.push(slot);
            }
        }
        match (found.pop(), found.is_empty()) {
            (Some(slot), true) => Ok(slot),
            (Some(_), false) => Err(Error::Invalid(format!(
                "several machines' ids begin with {name}"
            ))),
            (None, _) => Err(Error::NotFound(format!(
                "there is no machine {name}; see berth machine list"
            ))),
        }
    }

    fn save(&self, slot: &Slot, machine: &Machine) -> Result<()> {
        let path = slot.folder.join(RECORD);
        write_json(&path, machine, Durability::Host)
            .map_err(Error::io(format!("cannot write {}", path.display())))
    }

    /// Removes the bases that nothing needs.
    fn sweep_bases(&self) {
        let slots = self.all();
        let needed: HashSet<String> = slots
            .iter()
            .filter_map(|slot| slot.lock().base.clone())
            .collect();
        self.bases.sweep(&needed, self.engine.images());
    }
}
