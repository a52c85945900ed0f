//! `berth machine boot`: a kernel in the foreground, without a daemon.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use base::units::format_size;
use clap::{Args, ValueEnum};
use vmm::boot::{BootConfig, DiskConfig, NetworkConfig, Outcome};
use vmm::machine::MachineConfig;

use super::{CpuChoice, OnCrash, OnDiskFull};
use crate::failure::Failure;
use crate::user_network;

/// See [`BootArgs::console`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ConsoleLine {
    #[default]
    Serial,
    /// The guest needs the driver, and a program on hvc0.
    Virtio,
}

#[derive(Debug, Args)]
pub struct BootArgs {
    /// The kernel: a bzImage or an ELF vmlinux.
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Further words of the kernel's command line.
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        allow_hyphen_values = true
    )]
    pub append: String,
    /// Disk image, read-only with ,ro; behind NVMe, or behind virtio-blk with ,virtio. May be given many times.
    #[arg(long, value_name = "FILE[,ro][,virtio][,format=raw|qcow2]")]
    pub disk: Vec<String>,
    /// Tap interface of the host to connect a network card to. May be given many times.
    #[arg(long, value_name = "NAME", conflicts_with = "net")]
    pub tap: Vec<String>,
    /// Network: user needs no rights, and forwards ports of this host with hostfwd=tcp:[ADDRESS]:PORT-:PORT.
    #[arg(long, value_name = "user[,hostfwd=RULE]…")]
    pub net: Option<String>,
    /// Unix socket through which programs of this host reach the guest's vsock ports ("CONNECT PORT"), and the guest theirs at
    /// PATH_PORT.
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<PathBuf>,
    /// The console that this terminal is: the serial line, or the virtio console (hvc0), which has the window's size.
    #[arg(long, value_enum, default_value_t)]
    pub console: ConsoleLine,
    /// Number of CPUs.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub cpus: u32,
    /// Memory.
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub memory: String,
    /// Allow more memory than the host has.
    #[arg(long)]
    pub overcommit: bool,
    /// Which CPU runs the guest.
    #[arg(long, value_enum, default_value_t)]
    pub cpu: CpuChoice,
    /// CPU model shown to the guest: max, x86-64-v2 or x86-64-v3.
    #[arg(long, value_name = "MODEL", default_value = "max")]
    pub cpu_model: String,
    /// How the kernel is entered: linux64, pvh or bzimage (with the kernel's own decompressor).
    #[arg(long, value_name = "PROTOCOL", default_value = "linux64")]
    pub protocol: String,
    /// Boot again when the guest resets, instead of ending.
    #[arg(long)]
    pub reboot: bool,
    /// What follows a crash of the guest: a kernel panic or a triple fault.
    #[arg(long, value_enum, value_name = "POLICY", default_value_t)]
    pub on_crash: OnCrash,
    /// What follows a write to a disk for which the host has no room.
    #[arg(long, value_enum, value_name = "POLICY", default_value_t)]
    pub on_disk_full: OnDiskFull,
    /// Say which CPU serves and how long the start took.
    #[arg(short, long)]
    pub verbose: bool,
}

/// Refuses what the host has no memory for, and warns of CPUs that would only take turns.
fn check_host(cpus: u32, memory: u64, overcommit: bool) -> Result<(), Failure> {
    let total = base::host::memory();
    if memory > total && !overcommit {
        let message = format!(
            "{} of memory were asked for; this host has {}",
            format_size(memory),
            format_size(total)
        );
        let failure = Failure::new(base::Kind::Capacity, message);
        return Err(failure.with_fix("ask for less, or say --overcommit"));
    }
    let processors = base::host::processors();
    if cpus > processors {
        eprintln!(
            "berth: {cpus} CPUs were asked for; this host has {processors} logical processors, which they share"
        );
    }
    Ok(())
}

/// Runs a kernel in the foreground. Exit code 0 for the guest's power-off or reset, 1 for a crash.
pub fn boot(args: BootArgs) -> Result<ExitCode, Failure> {
    let memory = super::size("memory", &args.memory)?;
    check_host(args.cpus, memory, args.overcommit)?;
    let model = vmm::boot::parse_model(&args.cpu_model).map_err(Failure::invalid)?;
    let protocol = args.protocol.parse().map_err(Failure::invalid)?;
    let disks: Vec<DiskConfig> = args
        .disk
        .iter()
        .map(|spec| spec.parse())
        .collect::<Result<_, String>>()
        .map_err(|e| Failure::invalid(format!("--disk: {e}")))?;
    // The network lives through the guest's resets.
    let (network, _user) = match &args.net {
        None => (None, None),
        Some(text) => {
            let wish = user_network::parse(text)?;
            let (ours, theirs) = vmm::process::datagrams()
                .map_err(|e| Failure::io("the host gives no sockets for a network", &e))?;
            let user = user_network::open(&wish, user_network::MAC, theirs, || {})
                .map_err(|e| Failure::new(base::Kind::Conflict, format!("--net: {e}")))?;
            let network = NetworkConfig {
                link: Arc::new(ours),
                mac: user_network::MAC,
            };
            (Some(network), Some(user))
        }
    };
    let mut pause = Duration::from_secs(1);
    loop {
        let outcome = vmm::boot::run(BootConfig {
            kernel: args.kernel.clone(),
            initrd: args.initrd.clone(),
            append: args.append.clone(),
            disks: disks.clone(),
            taps: args.tap.clone(),
            network: network.clone(),
            vsock: args.vsock.clone(),
            virtio_console: args.console == ConsoleLine::Virtio,
            machine: MachineConfig {
                cpus: args.cpus,
                memory,
                cpu: args.cpu.into(),
                model,
                ..MachineConfig::default()
            },
            on_disk_full: args.on_disk_full.into(),
            protocol,
            verbose: args.verbose,
        })
        .map_err(|e| Failure::of(&e))?;
        return match outcome {
            Outcome::PowerOff => Ok(ExitCode::SUCCESS),
            Outcome::Reset if args.reboot => continue,
            Outcome::Reset => {
                eprintln!("berth: the guest asked for a reset (boot again with --reboot)");
                Ok(ExitCode::SUCCESS)
            }
            Outcome::Crash(why) if args.on_crash == OnCrash::Restart => {
                eprintln!(
                    "berth: the guest crashed: {why}; booting again in {} s",
                    pause.as_secs()
                );
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_secs(32));
                continue;
            }
            Outcome::Crash(why) => Err(Failure::internal(format!("the guest crashed: {why}"))
                .with_fix("boot again after a crash with --on-crash restart")),
            Outcome::Killed => Ok(ExitCode::from(137)),
            Outcome::DebugExit(code) => Ok(ExitCode::from(code)),
        };
    }
}
