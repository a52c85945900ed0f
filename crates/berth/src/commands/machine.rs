//! Virtual machines.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};

use vmm::boot::{BootConfig, DiskConfig, Outcome};
use vmm::machine::MachineConfig;

use super::Context;
use crate::failure::Failure;

#[derive(Debug, Subcommand)]
pub enum MachineCommand {
    /// Boot a kernel in the foreground, its serial line on this terminal; needs no daemon.
    Boot(BootArgs),
}

/// Which CPU runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum CpuChoice {
    /// Hardware virtualization where the host truly has it, else the software CPU.
    #[default]
    Auto,
    /// Hardware virtualization through KVM.
    Kvm,
    /// The software CPU.
    Soft,
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
    /// Disk image, FILE or FILE,ro; may be given many times.
    #[arg(long, value_name = "FILE[,ro]")]
    pub disk: Vec<String>,
    /// Number of CPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// Memory.
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub memory: String,
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
    /// Say which CPU serves and how long the start took.
    #[arg(short, long)]
    pub verbose: bool,
}

/// Runs a kernel in the foreground. Exit code 0 for the guest's power-off or reset, 1 for a crash.
pub fn boot(args: BootArgs) -> Result<ExitCode, Failure> {
    let memory = base::units::parse_size(&args.memory)
        .map_err(|e| Failure::invalid(format!("--memory: {e}")))?;
    let model = vmm::boot::parse_model(&args.cpu_model).map_err(Failure::invalid)?;
    let protocol = args.protocol.parse().map_err(Failure::invalid)?;
    let disks: Vec<DiskConfig> = args
        .disk
        .iter()
        .map(|spec| match spec.strip_suffix(",ro") {
            Some(path) => DiskConfig {
                path: path.into(),
                read_only: true,
            },
            None => DiskConfig {
                path: spec.into(),
                read_only: false,
            },
        })
        .collect();
    let cpu = match args.cpu {
        CpuChoice::Auto => vmm::machine::CpuChoice::Auto,
        CpuChoice::Kvm => vmm::machine::CpuChoice::Kvm,
        CpuChoice::Soft => vmm::machine::CpuChoice::Soft,
    };
    loop {
        let outcome = vmm::boot::run(BootConfig {
            kernel: args.kernel.clone(),
            initrd: args.initrd.clone(),
            append: args.append.clone(),
            disks: disks.clone(),
            machine: MachineConfig {
                cpus: args.cpus,
                memory,
                cpu,
                model,
                ..MachineConfig::default()
            },
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
            Outcome::Crash(why) => Err(Failure::internal(format!("the guest crashed: {why}"))),
            Outcome::Killed => Ok(ExitCode::from(137)),
            Outcome::DebugExit(code) => Ok(ExitCode::from(code)),
        };
    }
}

/// Verbs that ask the daemon.
pub async fn run(_context: &Context, command: MachineCommand) -> Result<ExitCode, Failure> {
    match command {
        MachineCommand::Boot(args) => boot(args),
    }
}
