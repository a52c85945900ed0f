//! Virtual machines.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};

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
    #[arg(long, value_name = "WORDS", default_value = "", allow_hyphen_values = true)]
    pub append: String,
    /// Disk image; may be given many times.
    #[arg(long, value_name = "FILE")]
    pub disk: Vec<PathBuf>,
    /// Number of CPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// Memory.
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub memory: String,
    /// Which CPU runs the guest.
    #[arg(long, value_enum, default_value_t)]
    pub cpu: CpuChoice,
}

/// Verbs that ask the daemon.
pub async fn run(_context: &Context, command: MachineCommand) -> Result<ExitCode, Failure> {
    match command {
        MachineCommand::Boot(args) => boot(args),
    }
}
