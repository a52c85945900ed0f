//! `berth oci …`: a stand-in for runc, with its words, its files and its exit codes.

mod commands;
mod exec;
mod foreground;
mod quick;
mod report;
mod run;

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::error::{Error, Result};
use crate::state::{self, Store};

/// Runs containers as the Open Container Initiative specifies them.
#[derive(Debug, Parser)]
#[command(
    name = "berth oci",
    bin_name = "berth oci",
    version,
    disable_help_subcommand = true
)]
pub struct Cli {
    /// Where the state of containers is kept [default: /run/berth-oci]
    #[arg(long)]
    pub root: Option<PathBuf>,
    /// Append errors to this file
    #[arg(long)]
    pub log: Option<PathBuf>,
    /// The form of the log
    #[arg(long, default_value = "text")]
    pub log_format: LogFormat,
    /// Accepted for runc's callers
    #[arg(long)]
    pub debug: bool,
    /// Let systemd make the cgroups; linux.cgroupsPath is slice:prefix:name
    #[arg(long)]
    pub systemd_cgroup: bool,
    /// Do without cgroups that cannot be made: true, false or auto
    #[arg(long, default_value = "auto")]
    pub rootless: String,
    /// Accepted for runc's callers
    #[arg(long, hide = true)]
    pub criu: Option<PathBuf>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a container; its process waits for start
    Create(CreateArgs),
    /// Start the process of a created container
    Start { id: String },
    /// Create and start a container, and wait for its end
    Run(RunArgs),
    /// Show the state of a container
    State { id: String },
    /// Send a signal to the container's first process
    Kill {
        /// To all processes of the container
        #[arg(short, long)]
        all: bool,
        id: String,
        #[arg(default_value = "SIGTERM")]
        signal: String,
    },
    /// Remove what is left of a container
    Delete {
        /// Kill it first if it runs
        #[arg(short, long)]
        force: bool,
        id: String,
    },
    /// Run a further process in a container
    Exec(exec::ExecArgs),
    /// Show the processes of a container
    Ps {
        #[arg(short, long, default_value = "table")]
        format: ListFormat,
        id: String,
        /// Options of ps(1)
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        ps_options: Vec<String>,
    },
    /// List the containers
    List {
        #[arg(short, long, default_value = "table")]
        format: ListFormat,
        /// Ids alone
        #[arg(short, long)]
        quiet: bool,
    },
    /// Freeze all processes of a container
    Pause { id: String },
    /// Let the processes of a container go on
    Resume { id: String },
    /// Change the limits of a container
    Update(report::UpdateArgs),
    /// Show what a container uses
    Events {
        /// Seconds between two lines
        #[arg(long, default_value = "5s")]
        interval: String,
        /// One line, and end
        #[arg(long)]
        stats: bool,
        id: String,
    },
    /// Show what this runtime can do
    Features,
    /// Write a config.json to begin with
    Spec {
        #[arg(short, long)]
        bundle: Option<PathBuf>,
        /// For a user without privileges
        #[arg(long = "rootless")]
        rootless_spec: bool,
    },
    /// Not supported
    #[command(hide = true)]
    Checkpoint {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Not supported
    #[command(hide = true)]
    Restore {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ListFormat {
    Table,
    Json,
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// The bundle's directory
    #[arg(short, long, default_value = ".")]
    pub bundle: PathBuf,
    /// The socket that receives the terminal's master
    #[arg(long)]
    pub console_socket: Option<PathBuf>,
    /// The socket that receives the process's pidfd
    #[arg(long)]
    pub pidfd_socket: Option<PathBuf>,
    /// The file to write the pid to
    #[arg(long)]
    pub pid_file: Option<PathBuf>,
    /// Do not use pivot_root
    #[arg(long)]
    pub no_pivot: bool,
    /// Keep the session keyring
    #[arg(long)]
    pub no_new_keyring: bool,
    /// How many descriptors from 3 on the process keeps
    #[arg(long, default_value_t = 0)]
    pub preserve_fds: u32,
    pub id: String,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub create: CreateArgs,
    /// Do not wait for its end
    #[arg(short, long)]
    pub detach: bool,
    /// Keep its state when it has ended
    #[arg(long)]
    pub keep: bool,
    /// Accepted for runc's callers
    #[arg(long)]
    pub no_subreaper: bool,
}

/// What the global flags say.
pub(crate) struct Context {
    pub store: Store,
    pub systemd_cgroup: bool,
    pub rootless: bool,
}

/// Runs the command line `arguments` (the first is the program's name) and returns its exit code: the container's for
/// `run` and `exec` in the foreground, 255 for a failed `exec`, else 1 for a failure.
pub fn main<I: IntoIterator<Item = OsString>>(arguments: I) -> ExitCode {
    ExitCode::from(exit_code(arguments))
}

/// [`main`] for who has no use for an [`ExitCode`].
pub fn exit_code<I: IntoIterator<Item = OsString>>(arguments: I) -> u8 {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let parsed = match quick::parse(&arguments) {
        Some(cli) => Ok(cli),
        None => Cli::try_parse_from(arguments),
    };
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return error.use_stderr().into();
        }
    };
    let failure = if matches!(cli.command, Command::Exec(_)) {
        255
    } else {
        1
    };
    let log = cli.log.clone();
    let format = cli.log_format;
    match dispatch(cli) {
        Ok(code) => code,
        Err(error) => {
            complain(log, format, &error);
            failure
        }
    }
}

fn dispatch(cli: Cli) -> Result<u8> {
    let rootless = match cli.rootless.as_str() {
        "true" => true,
        "false" => false,
        "auto" => !rustix::process::geteuid().is_root(),
        other => {
            return Err(Error::invalid(format!(
                "--rootless {other:?}: true, false or auto is wanted"
            )));
        }
    };
    let context = Context {
        store: Store::new(cli.root.unwrap_or_else(state::default_root)),
        systemd_cgroup: cli.systemd_cgroup,
        rootless,
    };
    match cli.command {
        Command::Create(arguments) => run::create(&context, &arguments),
        Command::Run(arguments) => run::run(&context, &arguments),
        Command::Start { id } => run::start(&context, &id),
        Command::State { id } => commands::state(&context, &id),
        Command::Kill { all, id, signal } => commands::kill(&context, &id, &signal, all),
        Command::Delete { force, id } => commands::delete(&context, &id, force),
        Command::Exec(arguments) => exec::exec(&context, &arguments),
        Command::Ps {
            format,
            id,
            ps_options,
        } => commands::ps(&context, &id, format, &ps_options),
        Command::List { format, quiet } => commands::list(&context, format, quiet),
        Command::Pause { id } => commands::pause(&context, &id),
        Command::Resume { id } => commands::resume(&context, &id),
        Command::Update(arguments) => report::update(&context, &arguments),
        Command::Events {
            interval,
            stats,
            id,
        } => report::events(&context, &id, &interval, stats),
        Command::Features => report::features(),
        Command::Spec {
            bundle,
            rootless_spec,
        } => report::spec(bundle.as_deref(), rootless_spec || cli.rootless == "true"),
        Command::Checkpoint { .. } | Command::Restore { .. } => Err(Error::unsupported(
            "checkpoint and restore are not supported by this runtime: use runc with criu for them",
        )),
    }
}

/// Writes the error to stderr and, as logrus would, to the log.
fn complain(log: Option<PathBuf>, format: LogFormat, error: &Error) {
    let text = error.to_string();
    let _ = writeln!(std::io::stderr(), "berth oci: {text}");
    let Some(path) = log else { return };
    let time = base::time::now_rfc3339();
    let line = match format {
        LogFormat::Json => {
            serde_json::json!({"level": "error", "msg": text, "time": time}).to_string()
        }
        LogFormat::Text => format!("time=\"{time}\" level=error msg={text:?}"),
    };
    if let Ok(mut file) = OpenOptions::new().append(true).create(true).open(path) {
        let _ = file.write_all(format!("{line}\n").as_bytes());
    }
}
