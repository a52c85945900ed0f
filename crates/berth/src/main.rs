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
#[cfg(any(all(stage, target_arch = "x86_64"), test))]
mod place;
mod progress;
mod rootless;
mod serve;
#[cfg(stage)]
mod stage;
#[cfg(any(stage, test))]
mod sweep;
mod template;
mod terminal;
mod user_network;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command, ContainerCommand, ContainerWord, ImageCommand, ImageWord};
use client::Client;
use commands::{
    Context, build, container, copy, credentials, image as images, machine, network, session,
    system, volume,
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
        Some("gateway") => return net::gateway::main(words()),
        Some("machine-process") => return vmm::process::main(words(), user_network::open),
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
        Command::Oci(_) | Command::Keeper(_) | Command::Gateway(_) | Command::MachineProcess(_) => {
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
        Command::Ps(args) => container::ps(context, args).await,
        Command::OfContainers(word) => container_word(context, word).await,
        Command::Inspect(args) => {
            let paths = [
                "/containers/{}/json",
                "/images/{}/json",
                "/networks/{}",
                "/volumes/{}",
                "/berth/v1/machines/{}",
            ];
            container::inspect(context, &paths, args).await
        }
        Command::Images(args) => images::images(context, args).await,
        Command::OfImages(word) => image_word(context, word).await,
        Command::Rmi(args) => images::rmi(context, args).await,
        Command::Login(args) => credentials::login(context, args).await,
        Command::Logout(args) => credentials::logout(&args),
        Command::Container(command) => match command {
            ContainerCommand::Ls(args) => container::ps(context, args).await,
            ContainerCommand::Word(word) => container_word(context, word).await,
            ContainerCommand::Inspect(args) => {
                container::inspect(context, &["/containers/{}/json"], args).await
            }
            ContainerCommand::Prune(args) => container::prune(context, args).await,
        },
        Command::Image(command) => match command {
            ImageCommand::Ls(args) => images::images(context, args).await,
            ImageCommand::Bootstrap(args) => images::bootstrap(context, args).await,
            ImageCommand::Word(word) => image_word(context, word).await,
            ImageCommand::Inspect(args) => {
                container::inspect(context, &["/images/{}/json"], args).await
            }
            ImageCommand::Rm(args) => images::rmi(context, args).await,
            ImageCommand::Prune(args) => images::prune(context, args).await,
        },
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
        | Command::Gateway(_)
        | Command::MachineProcess(_) => Err(Failure::internal(
            "this command needs no daemon and was handled before",
        )),
    }
}

async fn container_word(context: &Context, word: ContainerWord) -> Result<ExitCode, Failure> {
    match word {
        ContainerWord::Run(args) => session::run_run(context, *args).await,
        ContainerWord::Exec(args) => session::run_exec(context, args).await,
        ContainerWord::Create(args) => session::run_create(context, *args).await,
        ContainerWord::Start(args) => session::run_start(context, args).await,
        ContainerWord::Stop(args) => container::stop(context, "stop", args).await,
        ContainerWord::Restart(args) => container::stop(context, "restart", args).await,
        ContainerWord::Kill(args) => container::kill(context, args).await,
        ContainerWord::Pause(args) => container::plain(context, "pause", args).await,
        ContainerWord::Unpause(args) => container::plain(context, "unpause", args).await,
        ContainerWord::Wait(args) => container::wait(context, args).await,
        ContainerWord::Rename(args) => container::rename(context, args).await,
        ContainerWord::Update(args) => container::update(context, args).await,
        ContainerWord::Rm(args) => container::rm(context, args).await,
        ContainerWord::Attach(args) => session::run_attach(context, args).await,
        ContainerWord::Logs(args) => container::logs(context, args).await,
        ContainerWord::Stats(args) => container::stats(context, args).await,
        ContainerWord::Top(args) => container::top(context, args).await,
        ContainerWord::Diff(args) => container::diff(context, args).await,
        ContainerWord::Port(args) => container::port(context, args).await,
        ContainerWord::Cp(args) => copy::run(context, args).await,
        ContainerWord::Commit(args) => container::commit(context, args).await,
        ContainerWord::Export(args) => container::export(context, args).await,
    }
}

async fn image_word(context: &Context, word: ImageWord) -> Result<ExitCode, Failure> {
    match word {
        ImageWord::Pull(args) => images::pull(context, args).await,
        ImageWord::Push(args) => images::push(context, args).await,
        ImageWord::Build(args) => build::run(context, args).await,
        ImageWord::History(args) => images::history(context, args).await,
        ImageWord::Tag(args) => images::tag(context, args).await,
        ImageWord::Save(args) => images::save(context, args).await,
        ImageWord::Load(args) => images::load(context, args).await,
        ImageWord::Import(args) => images::import(context, args).await,
    }
}
