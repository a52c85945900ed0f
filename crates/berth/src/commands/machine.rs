//! Virtual machines.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};

use vmm::boot::{BootConfig, DiskConfig, Outcome};
use vmm::machine::MachineConfig;

use base::units::format_size;
use hyper::Method;
use serde_json::{Value, json};

use super::container::for_each;
use super::show::text;
use super::{Context, ListOptions, ShowOptions};
use crate::client::{Client, empty, encode};
use crate::failure::Failure;
use crate::output::{self, Format, Table};
use crate::terminal::{DetachKeys, InputEnd, RawMode, copy_input, copy_output};

#[derive(Debug, Subcommand)]
pub enum MachineCommand {
    /// Make a machine of an image that has a kernel (`berth image bootstrap --kernel`).
    Create(Box<CreateArgs>),
    /// Start machines.
    Start(Names),
    /// Ask machines to power off; end them if they do not.
    Stop(StopArgs),
    /// Ask a machine to power off, then start it.
    Restart(StopArgs),
    /// End machines at once.
    Kill(Names),
    /// Stop the CPUs of machines.
    Pause(Names),
    /// Let paused machines go on.
    Resume(Names),
    /// Press the reset button.
    Reset(Names),
    /// List machines.
    #[command(visible_alias = "ls")]
    List(ListOptions),
    /// Show machines in full.
    Inspect(InspectArgs),
    /// Show what machines use.
    Stats(StatsArgs),
    /// Show what the serial line wrote.
    Logs(LogsArgs),
    /// The guest's own console: its login. Ctrl-] leaves it.
    Console(OneName),
    /// Remove machines and their disks.
    #[command(visible_alias = "rm")]
    Remove(RemoveArgs),
    /// Boot a kernel in the foreground, its serial line on this terminal; needs no daemon.
    Boot(BootArgs),
}

#[derive(Debug, Args)]
pub struct Names {
    /// The machines.
    #[arg(required = true)]
    pub machines: Vec<String>,
}

#[derive(Debug, Args)]
pub struct OneName {
    /// The machine.
    pub machine: String,
}

#[derive(Debug, Args)]
pub struct StopArgs {
    /// Seconds the guest has to power off.
    #[arg(short, long, value_name = "SECONDS", default_value_t = 90)]
    pub timeout: u64,
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

#[derive(Debug, Args)]
pub struct InspectArgs {
    #[command(flatten)]
    pub show: ShowOptions,
    #[command(flatten)]
    pub names: Names,
}

#[derive(Debug, Args)]
pub struct StatsArgs {
    /// How to write the answer.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub format: Format,
    /// The machines; all running ones if not given.
    pub machines: Vec<String>,
}

#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on with what is written from now.
    #[arg(short, long)]
    pub follow: bool,
    /// The machine.
    pub machine: String,
}

/// A guest's own options come from its image; these are the machine's.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Image with a kernel in /boot.
    #[arg(long)]
    pub image: String,
    /// Number of CPUs, at most the host's.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// Memory.
    #[arg(short, long, value_name = "SIZE", default_value = "1G")]
    pub memory: String,
    /// Disk; what is not written takes no room on the host.
    #[arg(long, value_name = "SIZE", default_value = "10G")]
    pub disk: String,
    /// Which CPU runs the guest.
    #[arg(long, value_enum, default_value_t)]
    pub cpu: CpuChoice,
    /// Network, shared with containers.
    #[arg(long, value_name = "NETWORK", default_value = "bridge")]
    pub network: String,
    /// Publish a port: [[ADDRESS:]HOST:]PORT[/tcp|udp].
    #[arg(short, long, value_name = "SPEC")]
    pub publish: Vec<String>,
    /// What follows a crash of the guest: stop or restart.
    #[arg(long, value_name = "POLICY", default_value = "stop", value_parser = ["stop", "restart"])]
    pub on_crash: String,
    /// Allow more memory than the host has.
    #[arg(long)]
    pub overcommit: bool,
    /// Further words of the kernel's command line.
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        allow_hyphen_values = true
    )]
    pub append: String,
    /// File with root's public keys for ssh.
    #[arg(long, value_name = "FILE")]
    pub ssh_key: Vec<PathBuf>,
    /// root's password as crypt(3) writes it (mkpasswd, openssl passwd -6).
    #[arg(long, value_name = "HASH")]
    pub password_hash: Option<String>,
    /// The console logs root in without a question.
    #[arg(long)]
    pub autologin: bool,
    /// Name, which is also the host name.
    pub name: String,
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
    /// Disk image, read-only with ,ro; behind NVMe, or behind virtio-blk with ,virtio. May be given many times.
    #[arg(long, value_name = "FILE[,ro][,virtio]")]
    pub disk: Vec<String>,
    /// Tap interface of the host to connect a network card to. May be given many times.
    #[arg(long, value_name = "NAME")]
    pub tap: Vec<String>,
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
        .map(|spec| spec.parse())
        .collect::<Result<_, String>>()
        .map_err(|e| Failure::invalid(format!("--disk: {e}")))?;
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
            taps: args.tap.clone(),
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

const MACHINES: &str = "/berth/v1/machines";

fn path_of(name: &str, verb: &str) -> String {
    format!("{MACHINES}/{}/{verb}", encode(name))
}

/// Verbs that ask the daemon.
pub async fn run(context: &Context, command: MachineCommand) -> Result<ExitCode, Failure> {
    let client = &context.client;
    match command {
        MachineCommand::Boot(args) => boot(args),
        MachineCommand::Create(args) => create(client, *args).await,
        MachineCommand::Start(names) => each(client, names, "start").await,
        MachineCommand::Kill(names) => each(client, names, "kill").await,
        MachineCommand::Pause(names) => each(client, names, "pause").await,
        MachineCommand::Resume(names) => each(client, names, "resume").await,
        MachineCommand::Reset(names) => each(client, names, "reset").await,
        MachineCommand::Stop(args) => stop(client, args, false).await,
        MachineCommand::Restart(args) => stop(client, args, true).await,
        MachineCommand::List(options) => list(client, &options).await,
        MachineCommand::Inspect(args) => inspect(client, args).await,
        MachineCommand::Stats(args) => stats(client, args).await,
        MachineCommand::Logs(args) => logs(client, args).await,
        MachineCommand::Console(args) => console(client, &args.machine).await,
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

async fn stop(client: &Client, args: StopArgs, again: bool) -> Result<ExitCode, Failure> {
    let query = [("timeout", args.timeout.to_string())];
    for_each(&args.names.machines, async |name| {
        client.act(&path_of(name, "stop"), &query).await?;
        if again {
            client.act(&path_of(name, "start"), &[]).await?;
        }
        Ok(Some(name.to_owned()))
    })
    .await
}

async fn create(client: &Client, args: CreateArgs) -> Result<ExitCode, Failure> {
    let size = |option: &str, text: &str| {
        base::units::parse_size(text).map_err(|e| Failure::invalid(format!("--{option}: {e}")))
    };
    let mut ports = Vec::new();
    for spec in &args.publish {
        for (port, address, host) in super::create::published(spec)? {
            let (number, protocol) = port.split_once('/').unwrap_or((&port, "tcp"));
            let range = if host.is_empty() {
                None
            } else {
                Some(super::create::port_range("publish", &host)?)
            };
            ports.push(json!({
                "container_port": number.parse::<u16>().unwrap_or(0),
                "protocol": protocol,
                "host_ip": (!address.is_empty()).then_some(address),
                "host_ports": range,
            }));
        }
    }
    let mut keys = Vec::new();
    for file in &args.ssh_key {
        let text = std::fs::read_to_string(file)
            .map_err(|e| Failure::io(format!("cannot read {}", file.display()), &e))?;
        keys.extend(
            text.lines()
                .filter(|l| !l.trim().is_empty())
                .map(str::to_owned),
        );
    }
    let cpu = match args.cpu {
        CpuChoice::Auto => "auto",
        CpuChoice::Kvm => "kvm",
        CpuChoice::Soft => "soft",
    };
    let body = json!({
        "name": args.name,
        "image": args.image,
        "cpus": args.cpus,
        "memory": size("memory", &args.memory)?,
        "disk": size("disk", &args.disk)?,
        "cpu": cpu,
        "network": args.network,
        "ports": ports,
        "on_crash": args.on_crash,
        "overcommit": args.overcommit,
        "append": args.append,
        "password_hash": args.password_hash,
        "ssh_keys": keys,
        "autologin": args.autologin,
    });
    let answer: Value = client.post(MACHINES, &[], &body).await?;
    output::line(text(&answer, "/id"));
    Ok(ExitCode::SUCCESS)
}

async fn list(client: &Client, options: &ListOptions) -> Result<ExitCode, Failure> {
    let machines: Vec<Value> = client.get(MACHINES, &[]).await?;
    if options.quiet {
        machines
            .iter()
            .for_each(|machine| output::line(text(machine, "/name")));
        return Ok(ExitCode::SUCCESS);
    }
    if options.format != Format::Table {
        output::document(options.format, &machines)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&[
        "NAME", "STATE", "CPUS", "MEMORY", "DISK", "CPU", "ADDRESS", "IMAGE",
    ]);
    for machine in &machines {
        let number = |key: &str| machine[key].as_u64().unwrap_or(0);
        table.row(vec![
            text(machine, "/name"),
            text(machine, "/state"),
            text(machine, "/cpus"),
            format_size(number("memory")),
            format!(
                "{} of {}",
                format_size(number("disk_used")),
                format_size(number("disk"))
            ),
            text(machine, "/cpu"),
            text(machine, "/address"),
            text(machine, "/image"),
        ]);
    }
    output::print(&table.render());
    Ok(ExitCode::SUCCESS)
}

async fn inspect(client: &Client, args: InspectArgs) -> Result<ExitCode, Failure> {
    let mut found = Vec::new();
    for name in &args.names.machines {
        found.push(
            client
                .get::<Value>(&format!("{MACHINES}/{}", encode(name)), &[])
                .await?,
        );
    }
    output::document(args.show.format, &found)?;
    Ok(ExitCode::SUCCESS)
}

async fn stats(client: &Client, args: StatsArgs) -> Result<ExitCode, Failure> {
    let names = if args.machines.is_empty() {
        let machines: Vec<Value> = client.get(MACHINES, &[]).await?;
        machines
            .iter()
            .filter(|m| !m["pid"].is_null())
            .map(|m| text(m, "/name"))
            .collect()
    } else {
        args.machines
    };
    let mut table = Table::new(&["NAME", "CPU TIME", "MEMORY", "DISK"]);
    let mut all = Vec::new();
    for name in &names {
        let stats: Value = client.get(&path_of(name, "stats"), &[]).await?;
        let number = |key: &str| stats[key].as_u64().unwrap_or(0);
        table.row(vec![
            text(&stats, "/name"),
            format!("{:.1}s", number("cpu_time") as f64 / 1e9),
            format!(
                "{} of {}",
                format_size(number("memory_used")),
                format_size(number("memory"))
            ),
            format!(
                "{} of {}",
                format_size(number("disk_used")),
                format_size(number("disk"))
            ),
        ]);
        all.push(stats);
    }
    match args.format {
        Format::Table => output::print(&table.render()),
        format => output::document(format, &all)?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn logs(client: &Client, args: LogsArgs) -> Result<ExitCode, Failure> {
    if args.follow {
        let (stream, _) = client
            .upgrade(&path_of(&args.machine, "console"), &[], empty())
            .await?;
        let (reader, _writer) = tokio::io::split(stream);
        copy_output(reader, true)
            .await
            .map_err(|e| Failure::io("the console broke off", &e))?;
        return Ok(ExitCode::SUCCESS);
    }
    let response = client
        .send(
            Method::GET,
            &path_of(&args.machine, "logs"),
            &[],
            empty(),
            &[],
        )
        .await?;
    copy_output(super::container::body_reader(response), true)
        .await
        .map_err(|e| Failure::io("the log broke off", &e))?;
    Ok(ExitCode::SUCCESS)
}

async fn console(client: &Client, name: &str) -> Result<ExitCode, Failure> {
    let (stream, _) = client
        .upgrade(&path_of(name, "console"), &[], empty())
        .await?;
    let (reader, mut writer) = tokio::io::split(stream);
    eprintln!("berth: the console of {name}; Ctrl-] leaves it, Enter brings its prompt");
    let keys = DetachKeys::parse("ctrl-]").map_err(Failure::invalid)?;
    let raw =
        RawMode::enter().map_err(|e| Failure::io("cannot set the terminal to raw mode", &e))?;
    let typed = async {
        match copy_input(&mut writer, Some(&keys)).await {
            Ok(InputEnd::Detached) => {}
            // The guest goes on writing after our input ended.
            Ok(InputEnd::Eof) | Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = copy_output(reader, true) => {}
        () = typed => {}
    }
    drop(raw);
    eprintln!();
    Ok(ExitCode::SUCCESS)
}
