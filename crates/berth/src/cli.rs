//! The whole command line, by type. Help, completions and man pages are made from this.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::commands::{
    ShowOptions, build, container, copy, credentials, image, machine, network, session, system,
    volume,
};
use crate::doctor::DoctorArgs;
use crate::manual::{CompletionArgs, ManArgs};
use crate::serve::ServeArgs;

/// Turns this machine into a small cloud: containers, virtual machines, networks, images.
///
/// Words for containers are docker's (`run`, `ps`, `exec` …); everything else is `berth NOUN VERB`.
/// The daemon is started on first use; `berth doctor` says what this host can do.
///
/// Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict, 5 no room, 6 not permitted, 7 this host
/// cannot. `run` and `exec` exit as the program did; 125 when Berth failed before it ran.
#[derive(Debug, Parser)]
#[command(
    name = "berth",
    version,
    propagate_version = true,
    disable_help_subcommand = true,
    max_term_width = 110
)]
pub struct Cli {
    #[command(flatten)]
    pub global: GlobalOptions,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct GlobalOptions {
    /// Socket of the daemon to talk to.
    #[arg(
        short = 'H',
        long,
        global = true,
        env = "BERTH_SOCKET",
        value_name = "PATH",
        help_heading = "Global options"
    )]
    pub host: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List containers.
    Ps(container::PsArgs),
    #[command(flatten)]
    OfContainers(ContainerWord),
    /// Show anything in full.
    Inspect(container::InspectArgs),

    /// List images.
    Images(image::ImagesArgs),
    #[command(flatten)]
    OfImages(ImageWord),
    /// Remove images.
    Rmi(image::RmiArgs),
    /// Check and keep credentials of a registry.
    Login(credentials::LoginArgs),
    /// Forget credentials of a registry.
    Logout(credentials::LogoutArgs),

    /// Containers.
    #[command(subcommand)]
    Container(ContainerCommand),
    /// Images.
    #[command(subcommand)]
    Image(ImageCommand),
    /// Virtual machines.
    #[command(subcommand)]
    Machine(machine::MachineCommand),
    /// Networks.
    #[command(subcommand)]
    Network(network::NetworkCommand),
    /// Volumes.
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// The daemon and the host as a whole.
    #[command(subcommand)]
    System(system::SystemCommand),

    /// Follow what happens.
    Events(container::EventsArgs),
    /// Show the daemon and the host.
    Info(system::InfoArgs),
    /// Show versions.
    Version(VersionArgs),
    /// Say what this host can do, and how to mend what it cannot.
    Doctor(DoctorArgs),
    /// Run the daemon.
    Serve(ServeArgs),
    /// Print the completions of a shell.
    Completions(CompletionArgs),
    /// Write the manual pages.
    Man(ManArgs),
    /// The OCI runtime: runc's commands and options (`berth oci --help`).
    #[command(disable_help_flag = true)]
    Oci(Verbatim),
    /// Parent of container processes; started by the daemon.
    #[command(hide = true, disable_help_flag = true)]
    Keeper(Verbatim),
    /// The way out of an ordinary user's networks; started by the daemon.
    #[command(hide = true, disable_help_flag = true)]
    Gateway(Verbatim),
    /// The process of one machine; started by the daemon.
    #[command(hide = true, disable_help_flag = true)]
    MachineProcess(Verbatim),
}

/// Arguments handed on as they are.
#[derive(Debug, Args)]
pub struct Verbatim {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<String>,
}

#[derive(Debug, Args)]
pub struct VersionArgs {
    /// table, json, yaml, or a Go template as '{{.Name}}'.
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<crate::output::Format>,
}

impl VersionArgs {
    pub fn show(&self) -> (ShowOptions, bool) {
        (
            ShowOptions {
                format: self.format.unwrap_or_default(),
            },
            self.format.is_some(),
        )
    }
}

/// What is done with containers: docker's words, at the top level and under `container`.
#[derive(Debug, Subcommand)]
pub enum ContainerWord {
    /// Run a program in a new container.
    Run(Box<session::RunArgs>),
    /// Run a program in a running container.
    Exec(session::ExecArgs),
    /// Make a container and do not start it.
    Create(Box<session::CreateArgs>),
    /// Start containers.
    Start(session::StartArgs),
    /// Stop containers.
    Stop(container::StopArgs),
    /// Stop and start containers.
    Restart(container::StopArgs),
    /// Send containers a signal.
    Kill(container::KillArgs),
    /// Freeze all processes of containers.
    Pause(container::Names),
    /// Thaw all processes of containers.
    Unpause(container::Names),
    /// Wait until containers end and print their exit codes.
    Wait(container::Names),
    /// Give a container another name.
    Rename(container::RenameArgs),
    /// Change limits and restart policy.
    Update(container::UpdateArgs),
    /// Remove containers.
    Rm(container::RmArgs),
    /// Attach to a running container.
    Attach(session::AttachArgs),
    /// Show what a container wrote.
    Logs(container::LogsArgs),
    /// Show what containers use.
    Stats(container::StatsArgs),
    /// Show the processes of a container.
    Top(container::TopArgs),
    /// Show what changed in a container's files.
    Diff(container::DiffArgs),
    /// Show published ports.
    Port(container::PortArgs),
    /// Copy files between a container and the host.
    Cp(copy::CopyArgs),
    /// Make an image of a container.
    Commit(container::CommitArgs),
    /// Write a container's files as a tar archive.
    Export(container::ExportArgs),
}

/// docker's `container` noun.
#[derive(Debug, Subcommand)]
pub enum ContainerCommand {
    /// List containers.
    #[command(visible_aliases = ["list", "ps"])]
    Ls(container::PsArgs),
    #[command(flatten)]
    Word(ContainerWord),
    /// Show containers in full.
    Inspect(container::InspectArgs),
    /// Remove all stopped containers.
    Prune(container::PruneArgs),
}

/// What is done with images: docker's words, at the top level and under `image`.
#[derive(Debug, Subcommand)]
pub enum ImageWord {
    /// Fetch an image from a registry.
    Pull(image::PullArgs),
    /// Send an image to a registry.
    Push(image::PushArgs),
    /// Build an image from a Dockerfile.
    Build(build::BuildArgs),
    /// Show how an image came to be.
    History(image::HistoryArgs),
    /// Give an image a further name.
    Tag(image::TagArgs),
    /// Write images as an archive.
    Save(image::SaveArgs),
    /// Read images from an archive.
    Load(image::LoadArgs),
    /// Make an image from an archive of files.
    Import(image::ImportArgs),
}

/// docker's `image` noun.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// List images.
    #[command(visible_alias = "list")]
    Ls(image::ImagesArgs),
    /// Make an image from a distribution's own package archive.
    Bootstrap(image::BootstrapArgs),
    #[command(flatten)]
    Word(ImageWord),
    /// Show images in full.
    Inspect(container::InspectArgs),
    /// Remove images.
    #[command(visible_alias = "remove")]
    Rm(image::RmiArgs),
    /// Remove unused images.
    Prune(image::PruneArgs),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_of_the_program_are_not_ours() {
        let cli = Cli::parse_from(["berth", "run", "--rm", "debian", "ls", "--help", "-la"]);
        let Command::OfContainers(ContainerWord::Run(run)) = cli.command else {
            panic!("run expected")
        };
        assert_eq!(run.container.command, ["ls", "--help", "-la"]);
    }
}
