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
mod jail;
pub mod protocol;

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use base::Classified;
use base::file::{Durability, read_json, write_json};
use serde::{Deserialize, Serialize};

use crate::boot::{BootError, Kernel, Protocol, command_line, place};
use crate::control::Outcome;
use crate::machine::{CpuChoice, Machine, MachineConfig};
use crate::virtio::net::{Net, Port};
use console::Console;
use cpu::CpuModel;
use disk::{BackingFiles, Disk, Format};

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
    pub descriptor: i32,
    /// Bytes, where the network says.
    #[serde(default)]
    pub mtu: Option<u16>,
}

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
    pub started: std::time::Instant,
}

/// The parts of a machine that may be reached while its thread waits for its end.
#[derive(Clone)]
pub(crate) struct Handles {
    pub control: Arc<crate::control::Control>,
    pub power: Arc<crate::devices::power::Power>,
    pub serial: Arc<crate::devices::serial::Serial>,
    pub cpu: &'static str,
    pub note: Option<String>,
}

/// Runs the machine of a folder; exit code 0 for a power-off.
pub fn main(args: impl IntoIterator<Item = String>) -> ExitCode {
    let Some(folder) = args.into_iter().next().map(PathBuf::from) else {
        eprintln!(
            "usage: berth machine-process FOLDER (the daemon's own; use berth machine start)"
        );
        return ExitCode::from(2);
    };
    let record = match run(&folder) {
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

fn run(folder: &Path) -> Result<Outcome, BootError> {
    let config = read_config(folder)?;
    let kernel = Kernel::open(&config.kernel, Protocol::default())?;
    let initrd = config
        .initrd
        .as_deref()
        .map(|path| crate::boot::read("initrd", path))
        .transpose()?;
    let taps: Vec<(ProcessNetwork, OwnedFd)> = config
        .networks
        .iter()
        .map(|network| {
            // SAFETY: the daemon passed these descriptors to this process alone and wrote their numbers;
            // this is the only place that takes them, once.
            (network.clone(), unsafe {
                OwnedFd::from_raw_fd(network.descriptor)
            })
        })
        .collect();
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
        started: std::time::Instant::now(),
    });
    let mut writable: Vec<&Path> = vec![folder];
    writable.extend(
        config
            .disks
            .iter()
            .filter(|d| !d.read_only)
            .map(|d| d.path.as_path()),
    );
    let mut readable: Vec<&Path> = Vec::new();
    readable.extend(config.disks.iter().map(|d| d.path.as_path()));
    // What could not be confined is said, so that `inspect` and the log show it.
    for weakness in jail::enter(&readable, &writable) {
        tracing::warn!("{weakness}");
        eprintln!("berth: {weakness}");
    }
    protocol::serve(listener, running.clone()).map_err(failed("a thread for"))?;
    loop {
        let outcome = run_once(&config, &kernel, initrd.as_deref(), &taps, &running)?;
        *running
            .machine
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
        match &outcome {
            Outcome::Reset => {}
            Outcome::Crash(why) if config.on_crash == OnCrash::Restart => {
                console.note(&format!("the guest crashed ({why}) and is started again"));
                // A guest that crashes at once must not take the host's time.
                std::thread::sleep(std::time::Duration::from_secs(1));
            }
            _ => return Ok(outcome),
        }
        *running
            .resets
            .lock()
            .unwrap_or_else(PoisonError::into_inner) += 1;
    }
}

fn run_once(
    config: &ProcessConfig,
    kernel: &Kernel,
    initrd: Option<&[u8]>,
    taps: &[(ProcessNetwork, OwnedFd)],
    running: &Running,
) -> Result<Outcome, BootError> {
    let machine_config = MachineConfig {
        cpus: config.cpus,
        memory: config.memory,
        cpu: config.cpu,
        model: config.model,
        ..MachineConfig::default()
    };
    let mut machine = Machine::new(machine_config, Box::new(running.console.writer()))?;
    let mut disks: Vec<Arc<dyn Disk>> = Vec::new();
    for disk in &config.disks {
        disks.push(
            disk::open(
                &disk.path,
                disk.format,
                disk.read_only,
                BackingFiles::Allowed,
            )?
            .into(),
        );
    }
    if !disks.is_empty() {
        machine.add_nvme(disks, 0)?;
    }
    attach_networks(&mut machine, taps)?;
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
        cpu: machine.vm.name(),
        note: machine.cpu_note.clone(),
    });
    machine.start()?;
    Ok(machine.wait())
}

fn attach_networks(
    machine: &mut Machine,
    taps: &[(ProcessNetwork, OwnedFd)],
) -> Result<(), BootError> {
    for (index, (network, tap)) in taps.iter().enumerate() {
        // The tap outlives each machine of a reset.
        let port = rustix::io::fcntl_dupfd_cloexec(tap, 0)
            .map_err(std::io::Error::from)
            .and_then(Port::tap)
            .map_err(|source| BootError::Read {
                what: "the network interface",
                path: PathBuf::from(format!("net{index}")),
                source,
            })?;
        let card = Net::new(port, network.mac, network.mtu.unwrap_or(1500));
        machine.add_virtio(format!("net{index}"), Arc::new(card))?;
    }
    // Without it a guest's first seconds go by waiting for randomness.
    machine.add_virtio("rng0", Arc::new(crate::virtio::rng::Rng))?;
    Ok(())
}
