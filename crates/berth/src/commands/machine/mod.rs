//! Virtual machines.

mod boot;
mod console;
mod create;
mod show;

use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use disk::Format as DiskFormat;

use super::Context;
use super::container::for_each;
use crate::client::{Client, encode};
use crate::failure::Failure;

pub use boot::boot;

#[derive(Debug, Subcommand)]
pub enum MachineCommand {
    /// Make a machine of an image that has a kernel (`berth image bootstrap --kernel`).
    Create(Box<create::CreateArgs>),
    /// Start machines.
    Start(StartArgs),
    /// Ask machines to power off; end them if they do not.
    Stop(StopArgs),
    /// Ask a machine to power off, then start it.
    Restart(StopArgs),
    /// End machines at once.
    Kill(Names),
    /// Stop the CPUs of machines.
    Pause(Names),
    /// Let paused machines go on.
    #[command(visible_alias = "unpause")]
    Resume(Names),
    /// Press the reset button.
    Reset(Names),
    /// List machines.
    #[command(visible_alias = "ls")]
    List(show::ListArgs),
    /// Show machines in full.
    Inspect(show::InspectArgs),
    /// Show what machines use.
    Stats(show::StatsArgs),
    /// Show what the serial line wrote.
    Logs(show::LogsArgs),
    /// The guest's own console: its login. Ctrl-] leaves it.
    Console(console::ConsoleArgs),
    /// Connect standard input and output to a vsock port of the guest, as ProxyCommand of ssh does.
    Vsock(console::VsockArgs),
    /// Take memory back from a running guest, or return it; without a size, show what it has.
    Balloon(BalloonArgs),
    /// Change machines: CPUs, memory, a larger disk, policies.
    #[command(visible_aliases = ["set", "resize"])]
    Update(Box<create::UpdateArgs>),
    /// Give a machine another name.
    Rename(RenameArgs),
    /// Wait for the ends of machines and say how they ended.
    Wait(Names),
    /// Remove machines and their disks.
    #[command(visible_alias = "rm")]
    Remove(RemoveArgs),
    /// Boot a kernel in the foreground, its serial line on this terminal; needs no daemon.
    Boot(boot::BootArgs),
}

#[derive(Debug, Args)]
pub struct Names {
    /// The machines.
    #[arg(required = true)]
    pub machines: Vec<String>,
}

#[derive(Debug, Args)]
pub struct StartArgs {
    /// Go to the console of the machine at once.
    #[arg(short, long)]
    pub console: bool,
    #[command(flatten)]
    pub names: Names,
}

#[derive(Debug, Args)]
pub struct BalloonArgs {
    /// The machine.
    pub machine: String,
    /// What the guest keeps, up to its end; at most what the machine was made with.
    pub size: Option<String>,
}

#[derive(Debug, Args)]
pub struct RenameArgs {
    /// The machine.
    pub machine: String,
    /// Its new name.
    pub name: String,
}

#[derive(Debug, Args)]
pub struct StopArgs {
    /// Seconds the guest has to power off.
    #[arg(
        short,
        long,
        visible_alias = "time",
        value_name = "SECONDS",
        default_value_t = 90
    )]
    pub timeout: u64,
    /// End it at once, as kill does.
    #[arg(short, long)]
    pub force: bool,
    #[command(flatten)]
    pub names: Names,
}

#[derive(Debug, Args)]
pub struct RemoveArgs {
    /// End it first if it runs.
    #[arg(short, long)]
    pub force: bool,
    #[command(flatten)]
    pub names: Names,
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

impl CpuChoice {
    fn name(self) -> &'static str {
        match self {
            CpuChoice::Auto => "auto",
            CpuChoice::Kvm => "kvm",
            CpuChoice::Soft => "soft",
        }
    }
}

impl From<CpuChoice> for vmm::machine::CpuChoice {
    fn from(choice: CpuChoice) -> Self {
        match choice {
            CpuChoice::Auto => Self::Auto,
            CpuChoice::Kvm => Self::Kvm,
            CpuChoice::Soft => Self::Soft,
        }
    }
}

/// What follows a crash of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum OnCrash {
    /// The machine ends, and says why.
    #[default]
    Stop,
    /// The guest boots again, after a pause that grows with each time.
    Restart,
}

impl OnCrash {
    fn name(self) -> &'static str {
        match self {
            OnCrash::Stop => "stop",
            OnCrash::Restart => "restart",
        }
    }
}

/// What follows a write for which the host has no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum OnDiskFull {
    /// The machine is paused, with the write kept, and goes on by itself when there is room.
    #[default]
    Pause,
    /// The guest sees an I/O error.
    Error,
}

impl OnDiskFull {
    fn name(self) -> &'static str {
        match self {
            OnDiskFull::Pause => "pause",
            OnDiskFull::Error => "error",
        }
    }
}

impl From<OnDiskFull> for vmm::process::OnDiskFull {
    fn from(policy: OnDiskFull) -> Self {
        match policy {
            OnDiskFull::Pause => Self::Pause,
            OnDiskFull::Error => Self::Error,
        }
    }
}

/// When a machine that ended is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum RestartPolicy {
    #[default]
    No,
    /// After a crash, a killed process, or the host's end.
    OnFailure,
    /// After any end, and whenever the daemon starts.
    Always,
    /// After any end but a stop by a person.
    UnlessStopped,
}

impl RestartPolicy {
    fn name(self) -> &'static str {
        match self {
            RestartPolicy::No => "no",
            RestartPolicy::OnFailure => "on-failure",
            RestartPolicy::Always => "always",
            RestartPolicy::UnlessStopped => "unless-stopped",
        }
    }
}

fn format_named(option: &str, name: &str) -> Result<DiskFormat, Failure> {
    match name {
        "raw" => Ok(DiskFormat::Raw),
        "qcow2" => Ok(DiskFormat::Qcow2),
        _ => Err(Failure::invalid(format!(
            "--{option}: {name:?} is no disk format: raw or qcow2"
        ))),
    }
}

fn size(option: &str, text: &str) -> Result<u64, Failure> {
    base::units::parse_size(text).map_err(|e| Failure::invalid(format!("--{option}: {e}")))
}

const MACHINES: &str = "/berth/v1/machines";

fn path_of(name: &str, verb: &str) -> String {
    format!("{MACHINES}/{}/{verb}", encode(name))
}

/// Verbs that ask the daemon.
pub async fn run(context: &Context, command: MachineCommand) -> Result<ExitCode, Failure> {
    let client = &context.client;
    match command {
        MachineCommand::Boot(args) => boot(args),
        MachineCommand::Create(args) => create::create(client, *args).await,
        MachineCommand::Update(args) => create::update(client, *args).await,
        MachineCommand::Start(args) => start(client, args).await,
        MachineCommand::Kill(names) => each(client, names, "kill").await,
        MachineCommand::Pause(names) => each(client, names, "pause").await,
        MachineCommand::Resume(names) => each(client, names, "resume").await,
        MachineCommand::Reset(names) => each(client, names, "reset").await,
        MachineCommand::Stop(args) => stop(client, args, false).await,
        MachineCommand::Restart(args) => stop(client, args, true).await,
        MachineCommand::List(args) => show::list(client, &args).await,
        MachineCommand::Inspect(args) => show::inspect(client, args).await,
        MachineCommand::Stats(args) => show::stats(client, args).await,
        MachineCommand::Logs(args) => show::logs(client, args).await,
        MachineCommand::Console(args) => console::console(client, &args).await,
        MachineCommand::Vsock(args) => console::vsock(client, &args).await,
        MachineCommand::Balloon(args) => balloon(client, args).await,
        MachineCommand::Wait(names) => show::wait(client, names).await,
        MachineCommand::Rename(args) => {
            let query = [("name", args.name)];
            client
                .act(&path_of(&args.machine, "rename"), &query)
                .await?;
            Ok(ExitCode::SUCCESS)
        }
        MachineCommand::Remove(args) => {
            let query = [("force", args.force.to_string())];
            for_each(&args.names.machines, async |name| {
                client
                    .delete(&format!("{MACHINES}/{}", encode(name)), &query)
                    .await?;
                Ok(Some(name.to_owned()))
            })
            .await
        }
    }
}

async fn each(client: &Client, names: Names, verb: &str) -> Result<ExitCode, Failure> {
    for_each(&names.machines, async |name| {
        client.act(&path_of(name, verb), &[]).await?;
        Ok(Some(name.to_owned()))
    })
    .await
}

async fn start(client: &Client, args: StartArgs) -> Result<ExitCode, Failure> {
    if !args.console {
        return each(client, args.names, "start").await;
    }
    let [name] = &args.names.machines[..] else {
        return Err(Failure::invalid("--console is for one machine at a time"));
    };
    client.act(&path_of(name, "start"), &[]).await?;
    let console = console::ConsoleArgs {
        virtio: false,
        detach_keys: "ctrl-]".into(),
        machine: name.clone(),
    };
    console::console(client, &console).await
}

async fn balloon(client: &Client, args: BalloonArgs) -> Result<ExitCode, Failure> {
    let name = &args.machine;
    if let Some(text) = &args.size {
        let query = [("memory", size("size", text)?.to_string())];
        client.act(&path_of(name, "balloon"), &query).await?;
    }
    show::memory(client, name).await
}

async fn stop(client: &Client, args: StopArgs, again: bool) -> Result<ExitCode, Failure> {
    let query = [("timeout", args.timeout.to_string())];
    for_each(&args.names.machines, async |name| {
        if args.force {
            client.act(&path_of(name, "kill"), &[]).await?;
        } else {
            client.act(&path_of(name, "stop"), &query).await?;
        }
        if again {
            client.act(&path_of(name, "start"), &[]).await?;
        }
        Ok(Some(name.to_owned()))
    })
    .await
}
