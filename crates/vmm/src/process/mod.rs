//! The process of one machine: `berth machine-process FOLDER`.
//!
//! It is started by the daemon and outlives it. Everything it may touch is in its folder, opened or passed to it:
//!
//! ```text
//! FOLDER/process.json       what to run (ProcessConfig), written by the daemon
//! FOLDER/run/               the only folder that it may change:
//!            control.sock   requests and answers, one JSON object a line (protocol)
//!            console.log    the serial line's output, with one older file
//!            vsock.sock     where host programs reach the guest's sockets, and it theirs at vsock.sock_PORT
//!            exit.json      how it ended (ExitRecord), written last
//! ```
//!
//! A guest may have taken the process over: what it wrote is read with care ([`read_exit`]).
//!
//! Start: read the configuration, open the kernel, take the passed taps ▶ jail ([`jail`]) ▶ make the machine ▶ run.
//! A reset makes the machine anew in the same process, so that its disks are never let go of in between.

pub mod console;
pub mod disks;
pub mod jail;
mod link;
pub mod protocol;

pub use disks::OnDiskFull;

use std::any::Any;
use std::fs;
use std::io::Read;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base::file::{Durability, read_json, write_json};
use base::{Classified, Kind};
use serde::{Deserialize, Serialize};

use crate::boot::{BootError, DiskBus, Kernel, Protocol, command_line, place};
use crate::control::Outcome;
use crate::crash::{CrashWatch, Watched};
use crate::machine::{CpuChoice, Machine, MachineConfig, MachineError};
use crate::nvme::Controller;
use crate::virtio::Backend;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::console::Console as Terminal;
use crate::virtio::transport::Transport;
use crate::virtio::vsock::Vsock;
use console::Console;
use cpu::CpuModel;
use disk::{BackingFiles, Disk, Format};
use disks::{Counters, GuardedDisk, Room};
use jail::Reach;
use link::Link;
pub use link::datagrams;

/// File names inside a machine's folder.
pub const CONFIG: &str = "process.json";
pub const RUN: &str = "run";
pub const CONTROL: &str = "run/control.sock";
pub const CONSOLE_LOG: &str = "run/console.log";
pub const EXIT: &str = "run/exit.json";
pub const VSOCK: &str = "run/vsock.sock";
/// Bytes of an exit record that are read.
const EXIT_LIMIT: u64 = 64 << 10;
/// The guest's number among sockets between host and guest. Each machine has its own unix socket, so one serves all.
pub const GUEST_CID: u64 = 3;

/// What a machine process runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProcessConfig {
    /// Of this structure: 1.
    pub version: u32,
    pub kernel: PathBuf,
    /// The kernel's vmlinux, where it was unpacked before.
    #[serde(default)]
    pub unpacked: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    #[serde(default)]
    pub append: String,
    pub cpus: u32,
    /// Bytes.
    pub memory: u64,
    #[serde(default)]
    pub cpu: CpuChoice,
    #[serde(default)]
    pub model: CpuModel,
    pub disks: Vec<ProcessDisk>,
    /// What lies below the disks and is only read.
    #[serde(default)]
    pub below: Vec<PathBuf>,
    #[serde(default)]
    pub networks: Vec<ProcessNetwork>,
    #[serde(default)]
    pub on_crash: OnCrash,
    #[serde(default)]
    pub on_disk_full: OnDiskFull,
}

/// One disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProcessDisk {
    pub path: PathBuf,
    pub format: Format,
    #[serde(default)]
    pub read_only: bool,
    #[serde(default)]
    pub bus: DiskBus,
}

/// One network interface.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProcessNetwork {
    pub mac: [u8; 6],
    /// The tap's descriptor in the new process.
    #[serde(default)]
    pub descriptor: i32,
    /// Instead of a tap, a network of this process's own on the host's sockets.
    #[serde(default)]
    pub user: Option<UserNetwork>,
    /// Bytes, where the network says.
    #[serde(default)]
    pub mtu: Option<u16>,
}

/// A user-mode network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UserNetwork {
    pub hostname: String,
    pub forwards: Vec<Forward>,
}

/// A port of the host that leads to one of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    pub udp: bool,
    pub host: SocketAddr,
    pub guest: u16,
}

/// Makes user-mode networks, which are another room's: for a card with this address whose frames, one a datagram, come
/// and go by the descriptor. Its thread calls the function first. The network lives as long as the value.
pub type UserNetworks =
    fn(&UserNetwork, [u8; 6], OwnedFd, fn()) -> Result<Box<dyn Any + Send>, String>;

/// What follows a crash of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnCrash {
    Restart,
    #[default]
    Stop,
}

/// How a machine process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    pub reason: ExitReason,
    /// For people; empty for a plain power-off.
    pub message: String,
    /// What sort of failure kept it from running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<Kind>,
    /// What mends that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
    /// Instead, the option of the machine that does, as `--cpu soft`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub option: Option<String>,
    /// RFC 3339.
    pub finished: String,
}

impl ExitRecord {
    /// An end at this moment.
    pub fn now(reason: ExitReason, message: impl Into<String>) -> ExitRecord {
        ExitRecord {
            reason,
            message: message.into(),
            kind: None,
            fix: None,
            option: None,
            finished: base::time::now_rfc3339(),
        }
    }

    /// A start that failed.
    pub fn of_failure(error: &BootError) -> ExitRecord {
        ExitRecord {
            kind: Some(error.kind()),
            fix: error.fix(),
            option: error.option().map(str::to_owned),
            ..ExitRecord::now(ExitReason::Failed, error.to_string())
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitReason {
    PowerOff,
    Killed,
    Crashed,
    /// It never ran.
    Failed,
}

/// How the machine of a folder ended, where that is recorded. Links, pipes and what is far too long are none.
pub fn read_exit(folder: &Path) -> Option<ExitRecord> {
    let mut text = Vec::new();
    open_plain(&folder.join(EXIT))
        .ok()?
        .take(EXIT_LIMIT)
        .read_to_end(&mut text)
        .ok()?;
    serde_json::from_slice(&text).ok()
}

/// Opens a file that a machine's process wrote, where it is one and no link, pipe or device.
///
/// # Errors
/// Where it cannot be opened, or is something else.
pub fn open_plain(path: &Path) -> std::io::Result<fs::File> {
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(std::io::ErrorKind::InvalidInput.into())
    }
}

/// What control connections reach; the machine inside changes with each reset.
pub(crate) struct Running {
    pub machine: Mutex<Option<Handles>>,
    /// The serial line's.
    pub console: Arc<Console>,
    /// The virtio console's.
    pub terminal: Arc<Console>,
    /// Columns and rows of the virtio console.
    pub window: Mutex<(u16, u16)>,
    /// Bytes of the guest's memory that were asked back.
    pub wanted: AtomicU64,
    pub resets: AtomicU64,
    /// A person ended the machine, which may be between two boots of its guest.
    pub left: Mutex<bool>,
    pub leaving: Condvar,
    /// How the guest crashed last, where it was started again.
    pub last_crash: Mutex<Option<String>>,
    pub started: Instant,
    /// In the order of the configuration.
    pub disks: Vec<Arc<Counters>>,
}

impl Running {
    /// Ends a machine that is between two boots.
    pub fn leave(&self) {
        *self.left.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.leaving.notify_all();
    }

    fn has_left(&self) -> bool {
        *self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits, unless a person ends the machine meanwhile: true then.
    fn wait_to_leave(&self, pause: Duration) -> bool {
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .leaving
            .wait_timeout_while(left, pause, |left| !*left)
            .unwrap_or_else(PoisonError::into_inner);
        *waited.0
    }
}

/// The parts of a machine that may be reached while its thread waits for its end.
#[derive(Clone)]
pub(crate) struct Handles {
    pub control: Arc<crate::control::Control>,
    pub power: Arc<crate::devices::power::Power>,
    pub serial: Arc<crate::devices::serial::Serial>,
    pub balloon: Shared<Balloon>,
    pub terminal: Shared<Terminal>,
    pub room: Arc<Room>,
    /// In the order of the configuration.
    pub disks: Vec<Plugged>,
    pub cpu: &'static str,
    pub note: Option<String>,
}

/// A virtio device and what its driver is told by.
pub(crate) struct Virtio<T> {
    pub device: Arc<T>,
    pub transport: Arc<Transport>,
}

type Shared<T> = Arc<Virtio<T>>;

impl<T: Backend + 'static> Virtio<T> {
    fn add(machine: &mut Machine, name: String, device: T) -> Result<Shared<T>, MachineError> {
        let device = Arc::new(device);
        let transport = machine.add_virtio(name, device.clone())?;
        Ok(Arc::new(Virtio { device, transport }))
    }
}

/// A disk where the guest finds it.
#[derive(Clone)]
pub(crate) enum Plugged {
    /// A namespace of the controller, by its place.
    Nvme(Arc<Controller>, usize),
    Virtio(Shared<Block>),
}

impl Plugged {
    /// Makes the disk larger and tells the guest.
    pub fn grow(&self, size: u64) -> Result<(), String> {
        match self {
            Plugged::Nvme(controller, namespace) => controller.grow(*namespace, size),
            Plugged::Virtio(block) => {
                block.device.grow(size)?;
                block.transport.config_changed();
                Ok(())
            }
        }
    }
}

/// Runs the machine of a folder; exit code 0 for a power-off.
pub fn main(args: impl IntoIterator<Item = String>, networks: UserNetworks) -> ExitCode {
    let Some(folder) = args.into_iter().next().map(PathBuf::from) else {
        eprintln!(
            "usage: berth machine-process FOLDER (the daemon's own; use berth machine start)"
        );
        return ExitCode::from(2);
    };
    let record = match run(&folder, networks) {
        Ok(Outcome::PowerOff | Outcome::Reset | Outcome::DebugExit(_)) => {
            ExitRecord::now(ExitReason::PowerOff, "")
        }
        Ok(Outcome::Killed) => ExitRecord::now(ExitReason::Killed, ""),
        Ok(Outcome::Crash(why)) => ExitRecord::now(ExitReason::Crashed, why),
        Err(error) => ExitRecord::of_failure(&error),
    };
    if !record.message.is_empty() {
        eprintln!("berth: {}", record.message);
    }
    for name in [CONTROL, VSOCK] {
        let _ = fs::remove_file(folder.join(name));
    }
    if let Err(error) = write_json(&folder.join(EXIT), &record, Durability::Host) {
        eprintln!("berth: cannot record the end: {error}");
        return ExitCode::FAILURE;
    }
    match (record.reason, record.kind) {
        (ExitReason::PowerOff, _) => ExitCode::SUCCESS,
        (_, Some(kind)) => ExitCode::from(kind.exit_code()),
        (_, None) => ExitCode::FAILURE,
    }
}

fn read_config(folder: &Path) -> Result<ProcessConfig, BootError> {
    let path = folder.join(CONFIG);
    let failed = |source| BootError::Read {
        what: "the machine's configuration",
        path: path.clone(),
        source,
    };
    read_json(&path)
        .map_err(failed)?
        .ok_or_else(|| failed(std::io::Error::from(std::io::ErrorKind::NotFound)))
}

fn run(folder: &Path, user_networks: UserNetworks) -> Result<Outcome, BootError> {
    let config = read_config(folder)?;
    // Its files are at hand from now on by short names, here and in the jail.
    std::env::set_current_dir(folder).map_err(|source| BootError::Read {
        what: "the machine's folder",
        path: folder.to_owned(),
        source,
    })?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(RUN)
        .map_err(|source| BootError::Read {
            what: "the machine's folder",
            path: folder.join(RUN),
            source,
        })?;
    // The host's CPU is looked at while that is allowed.
    let _ = cpu_kvm::probe();
    let kernel = match &config.unpacked {
        Some(unpacked) => Kernel::open_unpacked(&config.kernel, unpacked)?,
        None => Kernel::open(&config.kernel, Protocol::default())?,
    };
    let initrd = config
        .initrd
        .as_deref()
        .map(|path| crate::boot::read("initrd", path))
        .transpose()?;
    let failed = |what: &'static str| {
        move |source| BootError::Read {
            what,
            path: folder.to_owned(),
            source,
        }
    };
    let console =
        Console::open(&folder.join(CONSOLE_LOG)).map_err(failed("the console's log in"))?;
    let _ = fs::remove_file(CONTROL);
    let listener = UnixListener::bind(CONTROL).map_err(failed("the control socket in"))?;
    let running = Arc::new(Running {
        machine: Mutex::new(None),
        console,
        terminal: Console::unlogged(),
        window: Mutex::new((80, 24)),
        wanted: AtomicU64::new(0),
        resets: AtomicU64::new(0),
        left: Mutex::new(false),
        leaving: Condvar::new(),
        last_crash: Mutex::default(),
        started: Instant::now(),
        disks: config.disks.iter().map(|_| Arc::default()).collect(),
    });
    let paths = |read_only: bool| {
        let disks = config.disks.iter();
        disks.filter(move |disk| disk.read_only == read_only)
    };
    let run = folder.join(RUN);
    let mut writable: Vec<&Path> = paths(false).map(|disk| disk.path.as_path()).collect();
    writable.push(&run);
    let mut readable: Vec<&Path> = paths(true).map(|disk| disk.path.as_path()).collect();
    readable.extend(config.below.iter().map(PathBuf::as_path));
    let reach = Reach {
        folder,
        readable: &readable,
        writable: &writable,
        network: config.networks.iter().any(|network| network.user.is_some()),
    };
    // What could not be confined is said, so that the log shows it.
    for weakness in jail::enter(reach) {
        tracing::warn!("{weakness}");
        eprintln!("berth: {weakness}");
    }
    let links = config
        .networks
        .iter()
        .map(|network| Link::open(network, user_networks))
        .collect::<Result<Vec<_>, _>>()?;
    protocol::serve(listener, running.clone()).map_err(failed("a thread for"))?;
    let watch = CrashWatch::new();
    let outcome = run_to_its_end(&config, &running, &watch, || {
        run_once(
            &config,
            &kernel,
            initrd.as_deref(),
            &links,
            &running,
            &watch,
        )
    });
    for console in [&running.console, &running.terminal] {
        console.close();
    }
    outcome
}

/// Runs the machine again and again, as its guest and its policy for crashes want.
fn run_to_its_end(
    config: &ProcessConfig,
    running: &Running,
    watch: &CrashWatch,
    mut run_once: impl FnMut() -> Result<Outcome, BootError>,
) -> Result<Outcome, BootError> {
    let console = &running.console;
    let mut patience = Patience::default();
    loop {
        let begun = Instant::now();
        let outcome = run_once()?;
        let outcome = watch.judge(outcome);
        *running
            .machine
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
        match &outcome {
            // Asked for while the guest was on its way to the next boot.
            Outcome::Reset | Outcome::Crash(_) if running.has_left() => {
                return Ok(Outcome::Killed);
            }
            Outcome::Reset => {}
            Outcome::Crash(why) if config.on_crash == OnCrash::Restart => {
                let pause = patience.after(begun.elapsed());
                console.note(&format!(
                    "the guest crashed ({why}); it is started again in {} s",
                    pause.as_secs()
                ));
                *running
                    .last_crash
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner) = Some(why.clone());
                if running.wait_to_leave(pause) {
                    return Ok(Outcome::Killed);
                }
            }
            Outcome::Crash(why) => {
                console.note(&format!("the guest crashed: {why}"));
                return Ok(outcome);
            }
            _ => return Ok(outcome),
        }
        running.resets.fetch_add(1, Ordering::Relaxed);
    }
}

/// How long a guest that crashes again and again waits: it must not take the host's time.
#[derive(Default)]
struct Patience {
    crashes: u32,
}

impl Patience {
    fn after(&mut self, ran: Duration) -> Duration {
        if ran > Duration::from_secs(120) {
            self.crashes = 0;
        }
        self.crashes += 1;
        Duration::from_secs(1 << (self.crashes - 1).min(5))
    }
}

fn run_once(
    config: &ProcessConfig,
    kernel: &Kernel,
    initrd: Option<&[u8]>,
    links: &[Link],
    running: &Running,
    watch: &Arc<CrashWatch>,
) -> Result<Outcome, BootError> {
    let machine_config = MachineConfig {
        cpus: config.cpus,
        memory: config.memory,
        cpu: config.cpu,
        model: config.model,
        ..MachineConfig::default()
    };
    let console = Watched {
        watch: watch.clone(),
        to: running.console.writer(),
    };
    let mut machine = Machine::new(machine_config, Box::new(console))?;
    watch.begin(machine.control.clone());
    crate::defect::ends(&machine.control);
    let notes = running.console.clone();
    let room = Room::new(machine.control.clone(), config.on_disk_full, move |text| {
        notes.note(text);
    });
    let disks = plug_disks(&mut machine, config, running, &room)?;
    for (index, link) in links.iter().enumerate() {
        machine.add_virtio(format!("net{index}"), Arc::new(link.card(index)?))?;
    }
    // Without it a guest's first seconds go by waiting for randomness.
    machine.add_virtio("rng0", Arc::new(crate::virtio::rng::Rng))?;
    let (balloon, terminal) = guest_services(&mut machine, running)?;
    let rsdp = crate::acpi::write(&machine.memory, config.cpus)?;
    let on_nvme = disks.iter().any(|disk| matches!(disk, Plugged::Nvme(..)));
    let words = command_line(&config.append, on_nvme, initrd.is_some());
    let memory = machine.memory.clone();
    machine.set_start::<BootError>(|state| {
        place(
            &memory,
            kernel,
            initrd,
            &words,
            rsdp,
            Protocol::default(),
            state,
        )
    })?;
    *running
        .machine
        .lock()
        .unwrap_or_else(PoisonError::into_inner) = Some(Handles {
        control: machine.control.clone(),
        power: machine.power.clone(),
        serial: machine.serial.clone(),
        balloon,
        terminal,
        room,
        disks,
        cpu: machine.vm.name(),
        note: machine.cpu_note.clone(),
    });
    if running.has_left() {
        machine.control.end(Outcome::Killed);
    }
    machine.start()?;
    Ok(machine.wait())
}

/// Opens the disks and puts them where the guest finds them: the NVMe ones side by side behind one controller.
fn plug_disks(
    machine: &mut Machine,
    config: &ProcessConfig,
    running: &Running,
    room: &Arc<Room>,
) -> Result<Vec<Plugged>, BootError> {
    let mut namespaces: Vec<Arc<dyn Disk>> = Vec::new();
    let mut places = Vec::new();
    for (number, disk) in config.disks.iter().enumerate() {
        let opened: Arc<dyn Disk> = Arc::new(GuardedDisk {
            disk: disk::open(
                &disk.path,
                disk.format,
                disk.read_only,
                BackingFiles::Allowed,
            )?,
            path: disk.path.clone(),
            counters: running.disks[number].clone(),
            room: room.clone(),
        });
        places.push(match disk.bus {
            DiskBus::Nvme => {
                namespaces.push(opened);
                Err(namespaces.len() - 1)
            }
            DiskBus::Virtio => {
                let name = format!("disk{number}");
                let block = Block::new(opened, config.cpus, &name).map_err(MachineError::Thread)?;
                Ok(Virtio::add(machine, name, block)?)
            }
        });
    }
    let controller = match namespaces.is_empty() {
        true => None,
        false => Some(machine.add_nvme(namespaces, 0)?),
    };
    let plugged = places.into_iter().filter_map(|place| match place {
        Ok(block) => Some(Plugged::Virtio(block)),
        Err(namespace) => Some(Plugged::Nvme(controller.clone()?, namespace)),
    });
    Ok(plugged.collect())
}

/// Adds the devices that every machine has beside disks and networks: memory given back, sockets, a terminal.
fn guest_services(
    machine: &mut Machine,
    running: &Running,
) -> Result<(Shared<Balloon>, Shared<Terminal>), BootError> {
    let failed = |what: &'static str| {
        move |source| BootError::Read {
            what,
            path: PathBuf::from(VSOCK),
            source,
        }
    };
    let balloon = Balloon::new().map_err(MachineError::Event)?;
    balloon.want(running.wanted.load(Ordering::Relaxed));
    let balloon = Virtio::add(machine, "balloon0".into(), balloon)?;
    // That of the machine before a reset, or of a process that was killed.
    let _ = fs::remove_file(VSOCK);
    let vsock = Vsock::new(Path::new(VSOCK), GUEST_CID).map_err(failed("the socket"))?;
    machine.add_virtio("vsock0", Arc::new(vsock))?;
    let sink = Box::new(running.terminal.writer());
    let terminal = Terminal::new(sink).map_err(MachineError::Event)?;
    let (columns, rows) = *running
        .window
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    terminal.resize(columns, rows);
    let terminal = Virtio::add(machine, "console0".into(), terminal)?;
    Ok((balloon, terminal))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_crashes_again_and_again_waits_longer_and_a_steady_one_begins_anew() {
        let mut patience = Patience::default();
        let short = Duration::from_secs(1);
        let waits: Vec<u64> = (0..8).map(|_| patience.after(short).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 32, 32]);
        assert_eq!(patience.after(Duration::from_secs(1000)).as_secs(), 1);
    }
}
