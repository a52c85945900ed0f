//! The process of one machine: `berth machine-process FOLDER`.
//!
//! It is started by the daemon and outlives it. Everything it may touch is in its folder, opened or passed to it:
//!
//! ```text
//! FOLDER/process.json   what to run (ProcessConfig), written by the daemon
//! FOLDER/control.sock   requests and answers, one JSON object a line (protocol)
//! FOLDER/console.log    the serial line's output, with one older file
//! FOLDER/exit.json      how it ended (ExitRecord), written last
//! ```
//!
//! Start: read the configuration, open the kernel, take the passed taps ▶ jail ([`jail`]) ▶ make the machine ▶ run.
//! A reset makes the machine anew in the same process, so that its disks are never let go of in between.

pub mod console;
pub mod disks;
pub mod jail;
pub mod protocol;

use std::any::Any;
use std::fs;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base::Classified;
use base::file::{Durability, read_json, write_json};
use serde::{Deserialize, Serialize};

use crate::boot::{BootError, Kernel, Protocol, command_line, place};
use crate::control::Outcome;
use crate::crash::{CrashWatch, Watched};
use crate::machine::{CpuChoice, Machine, MachineConfig};
use crate::virtio::net::{Net, Port};
use console::Console;
use cpu::CpuModel;
use disk::{BackingFiles, Disk, Format};
use disks::{Counters, GuardedDisk, Room};
use jail::{Reach, Thread};

/// File names inside a machine's folder.
pub const CONFIG: &str = "process.json";
pub const CONTROL: &str = "control.sock";
pub const CONSOLE_LOG: &str = "console.log";
pub const EXIT: &str = "exit.json";

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
}

/// One disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProcessDisk {
    pub path: PathBuf,
    pub format: Format,
    #[serde(default)]
    pub read_only: bool,
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
    /// RFC 3339.
    pub finished: String,
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

/// What control connections reach; the machine inside changes with each reset.
pub(crate) struct Running {
    pub machine: Mutex<Option<Handles>>,
    pub console: Arc<Console>,
    pub resets: Mutex<u64>,
    /// How the guest crashed last, where it was started again.
    pub last_crash: Mutex<Option<String>>,
    pub started: Instant,
    /// In the order of the configuration.
    pub disks: Vec<Arc<Counters>>,
}

/// The parts of a machine that may be reached while its thread waits for its end.
#[derive(Clone)]
pub(crate) struct Handles {
    pub control: Arc<crate::control::Control>,
    pub power: Arc<crate::devices::power::Power>,
    pub serial: Arc<crate::devices::serial::Serial>,
    pub room: Arc<Room>,
    pub cpu: &'static str,
    pub note: Option<String>,
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
            record(ExitReason::PowerOff, String::new())
        }
        Ok(Outcome::Killed) => record(ExitReason::Killed, String::new()),
        Ok(Outcome::Crash(why)) => record(ExitReason::Crashed, why),
        Err(error) => {
            let mut message = error.to_string();
            if let Some(fix) = error.fix() {
                message = format!("{message} (fix: {fix})");
            }
            record(ExitReason::Failed, message)
        }
    };
    if !record.message.is_empty() {
        eprintln!("berth: {}", record.message);
    }
    let _ = fs::remove_file(folder.join(CONTROL));
    if let Err(error) = write_json(&folder.join(EXIT), &record, Durability::Host) {
        eprintln!("berth: cannot record the end: {error}");
        return ExitCode::FAILURE;
    }
    if record.reason == ExitReason::PowerOff {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn record(reason: ExitReason, message: String) -> ExitRecord {
    ExitRecord {
        reason,
        message,
        finished: base::time::now_rfc3339(),
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
    let socket = folder.join(CONTROL);
    let _ = fs::remove_file(&socket);
    // A socket's path may have 107 bytes, a machine's folder more: its descriptor is short.
    let listener = fs::File::open(folder)
        .and_then(|directory| {
            UnixListener::bind(format!("/proc/self/fd/{}/{CONTROL}", directory.as_raw_fd()))
        })
        .map_err(failed("the control socket in"))?;
    let running = Arc::new(Running {
        machine: Mutex::new(None),
        console: console.clone(),
        resets: Mutex::new(0),
        last_crash: Mutex::default(),
        started: Instant::now(),
        disks: config.disks.iter().map(|_| Arc::default()).collect(),
    });
    let paths = |read_only: bool| {
        let disks = config.disks.iter();
        disks.filter(move |disk| disk.read_only == read_only)
    };
    let mut writable: Vec<&Path> = vec![folder];
    writable.extend(paths(false).map(|disk| disk.path.as_path()));
    let mut readable: Vec<&Path> = paths(true).map(|disk| disk.path.as_path()).collect();
    readable.extend(config.below.iter().map(PathBuf::as_path));
    let reach = Reach {
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
    let mut patience = Patience::default();
    loop {
        let begun = Instant::now();
        let outcome = run_once(
            &config,
            &kernel,
            initrd.as_deref(),
            &links,
            &running,
            &watch,
        )?;
        let outcome = watch.judge(outcome);
        *running
            .machine
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
        match &outcome {
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
                std::thread::sleep(pause);
            }
            Outcome::Crash(why) => {
                console.note(&format!("the guest crashed: {why}"));
                return Ok(outcome);
            }
            _ => return Ok(outcome),
        }
        *running
            .resets
            .lock()
            .unwrap_or_else(PoisonError::into_inner) += 1;
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
    let room = Room::new(machine.control.clone(), running.console.clone());
    let mut disks: Vec<Arc<dyn Disk>> = Vec::new();
    for (disk, counters) in config.disks.iter().zip(&running.disks) {
        let opened = disk::open(
            &disk.path,
            disk.format,
            disk.read_only,
            BackingFiles::Allowed,
        )?;
        disks.push(Arc::new(GuardedDisk {
            disk: opened,
            path: disk.path.clone(),
            counters: counters.clone(),
            room: room.clone(),
        }));
    }
    if !disks.is_empty() {
        machine.add_nvme(disks, 0)?;
    }
    for (index, link) in links.iter().enumerate() {
        machine.add_virtio(format!("net{index}"), Arc::new(link.card(index)?))?;
    }
    // Without it a guest's first seconds go by waiting for randomness.
    machine.add_virtio("rng0", Arc::new(crate::virtio::rng::Rng))?;
    let rsdp = crate::acpi::write(&machine.memory, config.cpus)?;
    let words = command_line(&config.append, !config.disks.is_empty(), initrd.is_some());
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
        room,
        cpu: machine.vm.name(),
        note: machine.cpu_note.clone(),
    });
    machine.start()?;
    Ok(machine.wait())
}

/// One network interface's way out; it outlives each machine of a reset.
struct Link {
    fd: OwnedFd,
    network: ProcessNetwork,
    /// The user-mode network at the other end.
    _user: Option<Box<dyn Any + Send>>,
}

impl Link {
    fn open(network: &ProcessNetwork, user_networks: UserNetworks) -> Result<Link, BootError> {
        let (fd, user) = match &network.user {
            None => {
                // SAFETY: the daemon passed these descriptors to this process alone and wrote their numbers;
                // this is the only place that takes them, once.
                (unsafe { OwnedFd::from_raw_fd(network.descriptor) }, None)
            }
            Some(wish) => {
                let (ours, theirs) = datagrams().map_err(BootError::Link)?;
                let confine = || jail::confine(Thread::Network);
                let user = user_networks(wish, network.mac, theirs, confine)
                    .map_err(|why| BootError::Network { why })?;
                (ours, Some(user))
            }
        };
        Ok(Link {
            fd,
            network: network.clone(),
            _user: user,
        })
    }

    fn card(&self, index: usize) -> Result<Net, BootError> {
        let port = rustix::io::fcntl_dupfd_cloexec(&self.fd, 0)
            .map_err(std::io::Error::from)
            .and_then(|fd| match self.network.user {
                None => Port::tap(fd),
                Some(_) => Port::datagrams(fd),
            })
            .map_err(|source| BootError::Read {
                what: "the network interface",
                path: PathBuf::from(format!("net{index}")),
                source,
            })?;
        let mtu = self.network.mtu.unwrap_or(1500);
        Ok(Net::new(port, self.network.mac, mtu))
    }
}

/// Two ends of a link on which each datagram is a frame.
///
/// # Errors
/// Where the host gives no sockets.
pub fn datagrams() -> std::io::Result<(OwnedFd, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
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
