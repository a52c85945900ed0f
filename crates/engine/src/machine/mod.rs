//! Virtual machines of this host: records, disks, processes.
//!
//! ```text
//! create:  image ─layers─▶ ext4 disk + kernel in STATE/machines/ID
//! start:   tap of the network ─fd─▶ machine process (vmm::process), which outlives the daemon
//! later:   control socket in the same folder; the end by pidfd, how it ended in exit.json
//! ```
//!
//! All calls block (disk, sockets) for milliseconds, `create` for seconds; callers on the reactor use a blocking
//! thread. One machine's changes are serialized by its lock; the map's lock is never held over I/O.

mod disk;
mod record;

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use base::Id;
use base::file::{Durability, read_json, write_json};
use base::pidfd::{PidFd, ProcessKey};
use base::units::format_size;
use net::{Endpoint, EndpointSpec, TapOptions};
use vmm::process::protocol::{Answer, Request, State, Status};
use vmm::process::{self, ExitReason, ExitRecord, ProcessConfig, ProcessDisk, ProcessNetwork};

pub use record::{Machine, MachineSpec, MachineStats, MachineView, Run};

use crate::{Engine, Error, Result};

const RECORD: &str = "machine.json";
/// The smallest disk that holds a Debian.
const SMALLEST_DISK: u64 = 256 << 20;
const SMALLEST_MEMORY: u64 = 64 << 20;
/// Descriptors passed to a machine process start here.
const FIRST_PASSED: i32 = 20;

struct Slot {
    folder: PathBuf,
    machine: Mutex<Machine>,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All machines of a daemon.
pub struct Machines {
    engine: Arc<Engine>,
    folder: PathBuf,
    slots: RwLock<HashMap<Id, Arc<Slot>>>,
}

/// The endpoints of machines whose processes live, for the networks to be taken over before [`Machines::open`].
pub fn live_endpoints(state: &Path) -> Vec<Endpoint> {
    let Ok(entries) = fs::read_dir(state.join("machines")) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| read_json::<Machine>(&entry.path().join(RECORD)).ok()??.run)
        .filter(|run| run.process.open().ok().flatten().is_some())
        .map(|run| run.endpoint)
        .collect()
}

fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram as u64 * u64::from(info.mem_unit.max(1))
}

fn host_cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

fn valid_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

impl Machines {
    /// Reads the records, finds running machines again and removes what a killed daemon left half-made.
    ///
    /// # Errors
    /// Where the folder cannot be made or read.
    pub fn open(engine: Arc<Engine>) -> Result<Arc<Machines>> {
        let folder = engine.config().paths.state.join("machines");
        let failed = || Error::io(format!("cannot use {}", folder.display()));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(failed())?;
        let machines = Arc::new(Machines {
            engine,
            folder: folder.clone(),
            slots: RwLock::default(),
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
        Ok(machines)
    }

    fn adopt(self: &Arc<Machines>, folder: PathBuf, machine: Machine) {
        let id = machine.id.clone();
        let run = machine.run.clone();
        let slot = Arc::new(Slot {
            folder,
            machine: Mutex::new(machine),
        });
        self.slots
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id, slot.clone());
        let Some(run) = run else { return };
        match run.process.open() {
            Ok(Some(pidfd)) => {
                if !run.ports.is_empty() {
                    let wishes = slot.lock().spec.ports.clone();
                    if let Err(error) = self.engine.networks().publish(&run.endpoint, &wishes) {
                        tracing::error!(%error, machine = slot.lock().spec.name, "its ports cannot be published again");
                    }
                }
                self.watch(slot, pidfd);
            }
            Ok(None) => self.ended(&slot),
            Err(error) => {
                tracing::error!(%error, "a machine's process cannot be looked at");
                self.ended(&slot);
            }
        }
    }

    fn find(&self, name: &str) -> Result<Arc<Slot>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let mut found = Vec::new();
        for (id, slot) in slots.iter() {
            if id.as_str() == name || slot.lock().spec.name == name {
                return Ok(slot.clone());
            }
            if !name.is_empty() && id.as_str().starts_with(name) {
                found.push(slot.clone());
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

    /// Memory of the machines that run.
    fn memory_in_use(&self) -> u64 {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots
            .values()
            .map(|slot| slot.lock())
            .filter(|m| m.run.is_some())
            .map(|m| m.spec.memory)
            .sum()
    }

    fn check_capacity(&self, spec: &MachineSpec, in_use: u64) -> Result<()> {
        if spec.cpus > host_cpus() {
            return Err(Error::Capacity(format!(
                "{} CPUs were asked for; this host has {} logical processors. Ask for at most {}",
                spec.cpus,
                host_cpus(),
                host_cpus()
            )));
        }
        if spec.memory + in_use > host_memory() && !spec.overcommit {
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

    /// Makes a machine; it does not run yet.
    ///
    /// # Errors
    /// A name in use, an image that is not here or has no kernel, more than the host has. Nothing is left then.
    pub fn create(self: &Arc<Machines>, mut spec: MachineSpec) -> Result<Id> {
        if !valid_name(&spec.name) {
            return Err(Error::Invalid(format!(
                "{:?} is no name for a machine: letters, digits and inner hyphens, at most 63",
                spec.name
            )));
        }
        spec.cpus = spec.cpus.max(1);
        spec.memory = if spec.memory == 0 {
            1 << 30
        } else {
            spec.memory
        };
        spec.disk = if spec.disk == 0 { 10 << 30 } else { spec.disk };
        if spec.network.is_empty() {
            spec.network = "bridge".into();
        }
        if spec.memory < SMALLEST_MEMORY || spec.disk < SMALLEST_DISK {
            return Err(Error::Invalid(format!(
                "a machine needs at least {} of memory and {} of disk",
                format_size(SMALLEST_MEMORY),
                format_size(SMALLEST_DISK)
            )));
        }
        self.check_capacity(&spec, 0)?;
        if self.find(&spec.name).is_ok() {
            return Err(Error::Conflict(format!(
                "there is a machine {} already; choose another name",
                spec.name
            )));
        }
        let store = self.engine.images();
        let image = store.resolve(&spec.image).map_err(Error::room)?;
        let network = self
            .engine
            .networks()
            .inspect(&spec.network)
            .map_err(Error::room)?;
        let resolver = network
            .gateway_v4()
            .map_or_else(|| "127.0.0.1".into(), |address| address.to_string());
        let id = Id::random();
        let folder = self.folder.join(id.as_str());
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .map_err(Error::io(format!("cannot make {}", folder.display())))?;
        let made = disk::make(store, &image, &spec, &folder, &resolver).and_then(|boot| {
            let machine = Machine {
                version: 1,
                id: id.clone(),
                image_id: image.to_string(),
                created: base::time::now_rfc3339(),
                mac: None,
                initrd: boot.initrd,
                run: None,
                last_exit: None,
                spec: spec.clone(),
            };
            let slot = Arc::new(Slot {
                folder: folder.clone(),
                machine: Mutex::new(machine.clone()),
            });
            self.save(&slot, &machine)?;
            let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
            // Another may have taken the name while the disk was made.
            if slots
                .values()
                .any(|other| other.lock().spec.name == spec.name)
            {
                return Err(Error::Conflict(format!(
                    "there is a machine {} already; choose another name",
                    spec.name
                )));
            }
            slots.insert(id.clone(), slot);
            Ok(())
        });
        if let Err(error) = made {
            let _ = fs::remove_dir_all(&folder);
            return Err(error);
        }
        Ok(id)
    }

    /// Starts a machine.
    ///
    /// # Errors
    /// [`Error::NotModified`] where it runs; what the host has no room for; what its process says.
    pub fn start(self: &Arc<Machines>, name: &str) -> Result<()> {
        let slot = self.find(name)?;
        let in_use = self.memory_in_use();
        let mut machine = slot.lock();
        if machine.run.is_some() {
            return Err(Error::NotModified(format!(
                "machine {} runs already",
                machine.spec.name
            )));
        }
        self.check_capacity(&machine.spec, in_use)?;
        let networks = self.engine.networks();
        let spec = EndpointSpec {
            network: machine.spec.network.clone(),
            container: machine.id.to_string(),
            names: vec![machine.spec.name.clone()],
            mac: machine.mac,
            ..EndpointSpec::default()
        };
        let tap = networks
            .tap(spec, TapOptions::default())
            .map_err(Error::room)?;
        let started = self.launch(&slot, &mut machine, tap);
        if started.is_err() {
            networks.release(machine.id.as_str());
        }
        let pidfd = started?;
        drop(machine);
        self.watch(slot, pidfd);
        Ok(())
    }

    fn launch(&self, slot: &Slot, machine: &mut Machine, tap: net::Tap) -> Result<PidFd> {
        let ports = self
            .engine
            .networks()
            .publish(&tap.endpoint, &machine.spec.ports)
            .map_err(Error::room)?;
        machine.mac = tap.endpoint.mac;
        let mac = tap
            .endpoint
            .mac
            .ok_or_else(|| Error::Invalid("the network gave no hardware address".into()))?;
        let folder = &slot.folder;
        let config = ProcessConfig {
            version: 1,
            kernel: folder.join(disk::KERNEL),
            initrd: machine.initrd.then(|| folder.join(disk::INITRD)),
            append: format!("root=/dev/nvme0n1 rw quiet {}", machine.spec.append),
            cpus: machine.spec.cpus,
            memory: machine.spec.memory,
            cpu: machine.spec.cpu,
            model: Default::default(),
            disks: vec![ProcessDisk {
                path: folder.join(disk::DISK),
                format: ::disk::Format::Raw,
                read_only: false,
            }],
            networks: vec![ProcessNetwork {
                mac: mac.0,
                descriptor: FIRST_PASSED,
                mtu: tap.mtu.and_then(|m| u16::try_from(m).ok()),
            }],
            on_crash: machine.spec.on_crash,
        };
        let write = |name: &str| Error::io(format!("cannot write {}", folder.join(name).display()));
        write_json(&folder.join(process::CONFIG), &config, Durability::Process)
            .map_err(write(process::CONFIG))?;
        let _ = fs::remove_file(folder.join(process::EXIT));
        let _ = fs::remove_file(folder.join(process::CONTROL));
        let log = fs::File::create(folder.join("process.log")).map_err(write("process.log"))?;
        let child = spawn(folder, tap.queues, log)?;
        let key = ProcessKey::of(child.id() as i32)
            .map_err(Error::io("cannot find the machine's process".to_owned()))?;
        let pidfd = PidFd::open(key.pid)
            .map_err(Error::io("cannot hold the machine's process".to_owned()))?;
        machine.run = Some(Run {
            process: key,
            started: base::time::now_rfc3339(),
            endpoint: tap.endpoint,
            ports,
        });
        machine.last_exit = None;
        if let Err(error) = self.save(slot, machine) {
            let _ = pidfd.signal(libc::SIGKILL);
            machine.run = None;
            reap(child);
            return Err(error);
        }
        reap(child);
        self.wait_until_it_answers(folder, &pidfd)
            .inspect_err(|_| {
                let _ = pidfd.signal(libc::SIGKILL);
                machine.run = None;
                let _ = self.save(slot, machine);
            })?;
        Ok(pidfd)
    }

    /// A process that ends at once says why here and not in some log.
    fn wait_until_it_answers(&self, folder: &Path, pidfd: &PidFd) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            if let Ok(Some(record)) = read_json::<ExitRecord>(&folder.join(process::EXIT))
                && record.reason == ExitReason::Failed
            {
                return Err(Error::Runtime {
                    message: record.message,
                    kind: base::Kind::Internal,
                });
            }
            if ask(folder, &Request::Status)
                .is_ok_and(|answer| answer.status.is_some_and(|s| s.state != State::Starting))
            {
                return Ok(());
            }
            if has_ended(pidfd) {
                let log = fs::read_to_string(folder.join("process.log")).unwrap_or_default();
                // It may have run and powered off within our poll.
                if read_json::<ExitRecord>(&folder.join(process::EXIT))
                    .ok()
                    .flatten()
                    .is_some_and(|r| r.reason != ExitReason::Failed)
                {
                    return Ok(());
                }
                let last = log
                    .lines()
                    .next_back()
                    .unwrap_or("it said nothing")
                    .to_owned();
                return Err(Error::Runtime {
                    message: format!("the machine's process ended at once: {last}"),
                    kind: base::Kind::Internal,
                });
            }
            if Instant::now() > end {
                return Err(Error::Runtime {
                    message: "the machine's process does not answer".into(),
                    kind: base::Kind::Internal,
                });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Follows a process to its end.
    fn watch(self: &Arc<Machines>, slot: Arc<Slot>, pidfd: PidFd) {
        let machines = self.clone();
        let watched = std::thread::Builder::new()
            .name("machine-end".into())
            .stack_size(128 << 10)
            .spawn(move || {
                let mut fds = [rustix::event::PollFd::new(
                    &pidfd,
                    rustix::event::PollFlags::IN,
                )];
                while rustix::event::poll(&mut fds, None).is_err() {}
                machines.ended(&slot);
            });
        if let Err(error) = watched {
            tracing::error!(%error, "no thread to follow a machine: its end is seen when the daemon starts next");
        }
    }

    fn ended(&self, slot: &Slot) {
        let mut machine = slot.lock();
        if machine.run.take().is_none() {
            return;
        }
        let record = read_json::<ExitRecord>(&slot.folder.join(process::EXIT))
            .ok()
            .flatten();
        machine.last_exit = Some(record.unwrap_or_else(|| ExitRecord {
            reason: ExitReason::Killed,
            message: "its process was killed, or the host went down".into(),
            finished: base::time::now_rfc3339(),
        }));
        self.engine.networks().release(machine.id.as_str());
        if let Err(error) = self.save(slot, &machine) {
            tracing::error!(%error, "a machine's end cannot be recorded");
        }
    }

    fn running(&self, name: &str) -> Result<(Arc<Slot>, ProcessKey)> {
        let slot = self.find(name)?;
        let run = slot.lock().run.as_ref().map(|run| run.process);
        let key = run.ok_or_else(|| {
            Error::Conflict(format!(
                "machine {name} is not running; start it: berth machine start {name}"
            ))
        })?;
        Ok((slot, key))
    }

    fn command(&self, name: &str, request: &Request) -> Result<()> {
        let (slot, _) = self.running(name)?;
        let answer = ask(&slot.folder, request)?;
        match answer.error {
            None => Ok(()),
            Some(error) => Err(Error::Conflict(format!("machine {name}: {error}"))),
        }
    }

    /// Asks the guest to power off, and ends it after `timeout`.
    pub fn stop(&self, name: &str, timeout: Duration) -> Result<()> {
        let (slot, key) = self.running(name)?;
        let end = Instant::now() + timeout;
        let _ = ask(&slot.folder, &Request::Resume);
        ask(&slot.folder, &Request::PowerButton)?;
        while Instant::now() < end {
            if slot
                .lock()
                .run
                .as_ref()
                .is_none_or(|run| run.process != key)
            {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        self.kill(name)
    }

    /// Ends a machine at once.
    pub fn kill(&self, name: &str) -> Result<()> {
        let (slot, key) = self.running(name)?;
        let asked = ask(&slot.folder, &Request::Kill).is_ok();
        let end = Instant::now() + Duration::from_secs(if asked { 5 } else { 0 });
        loop {
            if slot
                .lock()
                .run
                .as_ref()
                .is_none_or(|run| run.process != key)
            {
                return Ok(());
            }
            if Instant::now() > end
                && let Ok(Some(pidfd)) = key.open()
            {
                let _ = pidfd.signal(libc::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn pause(&self, name: &str) -> Result<()> {
        self.command(name, &Request::Pause)
    }

    pub fn resume(&self, name: &str) -> Result<()> {
        self.command(name, &Request::Resume)
    }

    /// Resets the guest, as the button of a real one does.
    pub fn reset(&self, name: &str) -> Result<()> {
        self.command(name, &Request::Reset)
    }

    /// Removes a machine and its disk.
    ///
    /// # Errors
    /// [`Error::Conflict`] where it runs and `force` is not said.
    pub fn remove(&self, name: &str, force: bool) -> Result<()> {
        let slot = self.find(name)?;
        if slot.lock().run.is_some() {
            if !force {
                return Err(Error::Conflict(format!(
                    "machine {name} is running; stop it first, or say --force"
                )));
            }
            self.kill(name)?;
        }
        let machine = slot.lock();
        self.slots
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&machine.id);
        // The record goes first: what is left of a crash in between is swept at the next start.
        let _ = fs::remove_file(slot.folder.join(RECORD));
        fs::remove_dir_all(&slot.folder).map_err(Error::io(format!(
            "cannot remove {}",
            slot.folder.display()
        )))
    }

    fn view(&self, slot: &Slot) -> MachineView {
        let machine = slot.lock().clone();
        let status: Option<Status> = machine
            .run
            .as_ref()
            .and_then(|_| ask(&slot.folder, &Request::Status).ok()?.status);
        let state = match (&machine.run, &status, &machine.last_exit) {
            (Some(_), Some(status), _) => match status.state {
                State::Starting => "starting",
                State::Running => "running",
                State::Paused => "paused",
            },
            (Some(_), None, _) => "starting",
            (None, _, Some(_)) => "stopped",
            (None, _, None) => "created",
        };
        let disk = slot.folder.join(disk::DISK);
        let run = machine.run;
        MachineView {
            id: machine.id,
            name: machine.spec.name,
            image: machine.spec.image,
            image_id: machine.image_id,
            state: state.into(),
            cpus: machine.spec.cpus,
            memory: machine.spec.memory,
            disk: machine.spec.disk,
            disk_used: fs::metadata(&disk).map_or(0, |m| m.blocks() * 512),
            cpu: status
                .as_ref()
                .map(|s| s.cpu.clone())
                .filter(|c| !c.is_empty()),
            cpu_note: status.as_ref().and_then(|s| s.note.clone()),
            network: machine.spec.network,
            address: run
                .as_ref()
                .and_then(|r| r.endpoint.v4)
                .map(|v4| v4.address().to_string()),
            mac: machine.mac.map(|mac| mac.to_string()),
            ports: run.as_ref().map_or_else(Vec::new, |r| r.ports.clone()),
            created: machine.created,
            started: run.as_ref().map(|r| r.started.clone()),
            pid: run.as_ref().map(|r| r.process.pid),
            resets: status.map_or(0, |s| s.resets),
            last_exit: machine.last_exit,
            folder: slot.folder.clone(),
        }
    }

    /// One machine in full.
    pub fn inspect(&self, name: &str) -> Result<MachineView> {
        Ok(self.view(&*self.find(name)?))
    }

    /// All machines, by name.
    pub fn list(&self) -> Vec<MachineView> {
        let slots: Vec<_> = self
            .slots
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect();
        let mut views: Vec<_> = slots.iter().map(|slot| self.view(slot)).collect();
        views.sort_by(|a, b| a.name.cmp(&b.name));
        views
    }

    /// What a running machine uses.
    pub fn stats(&self, name: &str) -> Result<MachineStats> {
        let (slot, key) = self.running(name)?;
        let stat = fs::read_to_string(format!("/proc/{}/stat", key.pid)).unwrap_or_default();
        let fields: Vec<u64> = stat
            .rsplit_once(')')
            .map_or("", |(_, rest)| rest)
            .split_ascii_whitespace()
            .skip(1)
            .map(|field| field.parse().unwrap_or(0))
            .collect();
        let field = |number: usize| fields.get(number).copied().unwrap_or(0);
        let tick = 1_000_000_000 / rustix::param::clock_ticks_per_second();
        let machine = slot.lock();
        Ok(MachineStats {
            name: machine.spec.name.clone(),
            // utime and stime, fields 14 and 15 of proc(5); rss is field 24, in pages.
            cpu_time: (field(10) + field(11)) * tick,
            memory_used: field(20) * rustix::param::page_size() as u64,
            memory: machine.spec.memory,
            disk_used: fs::metadata(slot.folder.join(disk::DISK)).map_or(0, |m| m.blocks() * 512),
            disk: machine.spec.disk,
        })
    }

    /// The last of what the serial line wrote, at most 4 MiB.
    pub fn logs(&self, name: &str) -> Result<Vec<u8>> {
        let slot = self.find(name)?;
        let path = slot.folder.join(process::CONSOLE_LOG);
        match fs::read(&path) {
            Ok(bytes) => Ok(bytes),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(Error::io(format!("cannot read {}", path.display()))(error)),
        }
    }

    /// The serial line, both ways.
    pub fn console(&self, name: &str) -> Result<UnixStream> {
        let (slot, _) = self.running(name)?;
        let failed = || Error::io(format!("the machine's process of {name} does not answer"));
        let stream = connect(&slot.folder).map_err(failed())?;
        let answer = exchange(&stream, &Request::Console { history: true }).map_err(failed())?;
        match answer.error {
            None => Ok(stream),
            Some(error) => Err(Error::Conflict(error)),
        }
    }
}

fn has_ended(pidfd: &PidFd) -> bool {
    let mut fds = [rustix::event::PollFd::new(
        pidfd,
        rustix::event::PollFlags::IN,
    )];
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

/// Its end is seen by its pidfd; only the kernel's record of it has to be taken.
fn reap(mut child: std::process::Child) {
    let _ = std::thread::Builder::new()
        .name("machine-reap".into())
        .stack_size(64 << 10)
        .spawn(move || child.wait());
}

fn connect(folder: &Path) -> std::io::Result<UnixStream> {
    // The path of a socket may have 107 bytes, a state folder more: the folder's descriptor is short.
    let directory = fs::File::open(folder)?;
    UnixStream::connect(format!(
        "/proc/self/fd/{}/{}",
        directory.as_raw_fd(),
        process::CONTROL
    ))
}

fn exchange(stream: &UnixStream, request: &Request) -> std::io::Result<Answer> {
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    (&*stream).write_all(&line)?;
    // Byte by byte: what follows the line belongs to the console.
    let mut answer = Vec::new();
    let mut reader = BufReader::with_capacity(1, stream);
    reader.read_until(b'\n', &mut answer)?;
    stream.set_read_timeout(None)?;
    Ok(serde_json::from_slice(&answer)?)
}

fn ask(folder: &Path, request: &Request) -> Result<Answer> {
    connect(folder)
        .and_then(|stream| exchange(&stream, request))
        .map_err(Error::io(
            "the machine's process does not answer".to_owned(),
        ))
}

/// Starts the process of the machine in `folder`, with the taps as descriptors from [`FIRST_PASSED`] on.
fn spawn(folder: &Path, taps: Vec<OwnedFd>, log: fs::File) -> Result<std::process::Child> {
    let copy = log
        .try_clone()
        .map_err(Error::io("cannot share the log".to_owned()))?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("berth")
        .arg("machine-process")
        .arg(folder)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(copy)
        .current_dir("/");
    let numbers: Vec<i32> = taps.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: only async-signal-safe calls on numbers captured before the fork; the descriptors are open then.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            // First out of the way of their targets, then into place, where dup2 clears close-on-exec.
            let mut high = [0i32; 16];
            for (slot, number) in high.iter_mut().zip(&numbers) {
                *slot = libc::fcntl(*number, libc::F_DUPFD_CLOEXEC, FIRST_PASSED + 16);
                if *slot < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            for (index, _) in numbers.iter().enumerate() {
                if libc::dup2(high[index], FIRST_PASSED + index as i32) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    command
        .spawn()
        .map_err(Error::io("cannot start the machine's process".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_host_name() {
        assert!(valid_name("web-1"));
        for bad in ["", "-a", "a-", "a.b", "a/b", "ä"] {
            assert!(!valid_name(bad), "{bad}");
        }
        assert!(!valid_name(&"a".repeat(64)));
    }
}
