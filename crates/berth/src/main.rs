//! The `berth` command: everything a person types, and the daemon's start-up.

mod cli;
mod client;
mod commands;
mod config;
mod doctor;
mod failure;
mod manual;
mod native;
mod output;
mod progress;
mod serve;
mod terminal;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command, ContainerCommand, ImageCommand};
use client::Client;
use commands::{
    Context, build, container, copy, image as image_commands, machine, network, session, system,
    volume,
};
use failure::Failure;

fn main() -> ExitCode {
    // The runtime, the keeper and init are on the path of every container start: they never see the
    // command-line parser of the rest.
    let mut args = std::env::args_os();
    let program = args.next().unwrap_or_default();
    if program.as_encoded_bytes().rsplit(|b| *b == b'/').next() == Some(b"berth-oci") {
        return oci::cli::main(std::env::args_os());
    }
    let words = || std::env::args().skip(2);
    match args.next().as_ref().and_then(|word| word.to_str()) {
        Some("oci") => return oci::cli::main(std::iter::once("berth oci".into()).chain(args)),
        Some("keeper") => return engine::keeper::main(words()),
        Some("machine-process") => return vmm::process::main(words()),
        _ => {}
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { 2 } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    match dispatch(cli) {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

fn dispatch(cli: Cli) -> Result<ExitCode, Failure> {
    let explicit = cli.global.host.clone();
    match cli.command {
        Command::Serve(args) => return serve::run(args, explicit),
        Command::Doctor(args) => return doctor::run(args),
        Command::Completions(args) => return manual::completions(&args),
        Command::Man(args) => return manual::man(&args),
        Command::Machine(machine::MachineCommand::Boot(args)) => return machine::boot(args),
        // Only reached with options before the word, which these do not take.
        Command::Oci(_) | Command::Keeper(_) | Command::MachineProcess(_) => {
            return Err(Failure::invalid(
                "this command takes no options before its name",
            ));
        }
        _ => {}
    }
    let context = Context {
        client: Client::new(
            explicit
                .clone()
                .unwrap_or_else(|| base::paths::Paths::of_this_user().socket),
            explicit.is_none(),
        ),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::io("cannot start", &e))?;
    let result = runtime.block_on(talk(&context, cli.command));
    // A blocked read of standard input must not keep the process.
    runtime.shutdown_background();
    result
}

async fn talk(context: &Context, command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Run(args) => session::run_run(context, *args).await,
        Command::Exec(args) => session::run_exec(context, args).await,
        Command::Ps(args) => container::ps(context, args).await,
        Command::Create(args) => session::run_create(context, *args).await,
        Command::Start(args) => session::run_start(context, args).await,
        Command::Stop(args) => container::stop(context, "stop", args).await,
        Command::Restart(args) => container::stop(context, "restart", args).await,
        Command::Kill(args) => container::kill(context, args).await,
        Command::Pause(args) => container::plain(context, "pause", args).await,
        Command::Unpause(args) => container::plain(context, "unpause", args).await,
        Command::Wait(args) => container::wait(context, args).await,
        Command::Rename(args) => container::rename(context, args).await,
        Command::Update(args) => container::update(context, args).await,
        Command::Rm(args) => container::rm(context, args).await,
        Command::Attach(args) => session::run_attach(context, args).await,
        Command::Logs(args) => container::logs(context, args).await,
        Command::Stats(args) => container::stats(context, args).await,
        Command::Top(args) => container::top(context, args).await,
        Command::Diff(args) => container::diff(context, args).await,
        Command::Port(args) => container::port(context, args).await,
        Command::Cp(args) => copy::run(context, args).await,
        Command::Commit(args) => container::commit(context, args).await,
        Command::Export(args) => container::export(context, args).await,
        Command::Inspect(args) => {
            let paths = [
                "/containers/{}/json",
                "/images/{}/json",
                "/networks/{}",
                "/volumes/{}",
            ];
            container::inspect(context, &paths, args).await
        }
        Command::Images(args) => image_commands::images(context, args).await,
        Command::Pull(args) => image_commands::pull(context, args).await,
        Command::Push(args) => image_commands::push(context, args).await,
        Command::Build(args) => build::run(context, args).await,
        Command::Tag(args) => image_commands::tag(context, args).await,
        Command::Rmi(args) => image_commands::rmi(context, args).await,
        Command::Save(args) => image_commands::save(context, args).await,
        Command::Load(args) => image_commands::load(context, args).await,
        Command::Import(args) => image_commands::import(context, args).await,
        Command::Login(args) => image_commands::login(context, args).await,
        Command::Container(command) => talk_container(context, command).await,
        Command::Image(command) => talk_image(context, command).await,
        Command::Machine(command) => machine::run(context, command).await,
        Command::Network(command) => network::run(context, command).await,
        Command::Volume(command) => volume::run(context, command).await,
        Command::System(command) => system::run(context, command).await,
        Command::Events(args) => container::events(context, args).await,
        Command::Info(args) => system::info(context, args).await,
        Command::Version(args) => {
            let (show, given) = args.show();
            system::version(context, show, given).await
        }
        Command::Serve(_)
        | Command::Doctor(_)
        | Command::Completions(_)
        | Command::Man(_)
        | Command::Oci(_)
        | Command::Keeper(_)
        | Command::MachineProcess(_) => Err(Failure::internal(
            "this command needs no daemon and was handled before",
        )),
    }
}

async fn talk_container(context: &Context, command: ContainerCommand) -> Result<ExitCode, Failure> {
    match command {
        ContainerCommand::Ls(args) => container::ps(context, args).await,
        ContainerCommand::Run(args) => session::run_run(context, *args).await,
        ContainerCommand::Create(args) => session::run_create(context, *args).await,
        ContainerCommand::Exec(args) => session::run_exec(context, args).await,
        ContainerCommand::Start(args) => session::run_start(context, args).await,
        ContainerCommand::Stop(args) => container::stop(context, "stop", args).await,
        ContainerCommand::Restart(args) => container::stop(context, "restart", args).await,
        ContainerCommand::Kill(args) => container::kill(context, args).await,
        ContainerCommand::Pause(args) => container::plain(context, "pause", args).await,
        ContainerCommand::Unpause(args) => container::plain(context, "unpause", args).await,
        ContainerCommand::Wait(args) => container::wait(context, args).await,
        ContainerCommand::Rename(args) => container::rename(context, args).await,
        ContainerCommand::Update(args) => container::update(context, args).await,
        ContainerCommand::Rm(args) => container::rm(context, args).await,
        ContainerCommand::Attach(args) => session::run_attach(context, args).await,
        ContainerCommand::Logs(args) => container::logs(context, args).await,
        ContainerCommand::Stats(args) => container::stats(context, args).await,
        ContainerCommand::Top(args) => container::top(context, args).await,
        ContainerCommand::Diff(args) => container::diff(context, args).await,
        ContainerCommand::Port(args) => container::port(context, args).await,
        ContainerCommand::Cp(args) => copy::run(context, args).await,
        ContainerCommand::Commit(args) => container::commit(context, args).await,
        ContainerCommand::Export(args) => container::export(context, args).await,
        ContainerCommand::Inspect(args) => {
            container::inspect(context, &["/containers/{}/json"], args).await
        }
        ContainerCommand::Prune(args) => container::prune(context, args).await,
    }
}

async fn talk_image(context: &Context, command: ImageCommand) -> Result<ExitCode, Failure> {
    match command {
        ImageCommand::Ls(args) => image_commands::images(context, args).await,
        ImageCommand::Bootstrap(args) => image_commands::bootstrap(context, args).await,
        ImageCommand::Build(args) => build::run(context, args).await,
        ImageCommand::Pull(args) => image_commands::pull(context, args).await,
        ImageCommand::Push(args) => image_commands::push(context, args).await,
        ImageCommand::Inspect(args) => {
            container::inspect(context, &["/images/{}/json"], args).await
        }
        ImageCommand::History(args) => image_commands::history(context, args).await,
        ImageCommand::Tag(args) => image_commands::tag(context, args).await,
        ImageCommand::Rm(args) => image_commands::rmi(context, args).await,
        ImageCommand::Prune(args) => image_commands::prune(context, args).await,
        ImageCommand::Save(args) => image_commands::save(context, args).await,
        ImageCommand::Load(args) => image_commands::load(context, args).await,
        ImageCommand::Import(args) => image_commands::import(context, args).await,
    }
}
