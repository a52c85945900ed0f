//! Streams into a machine: its consoles and its sockets.

use std::process::ExitCode;

use clap::Args;

use super::path_of;
use crate::client::{Client, empty};
use crate::commands::session::follow_size;
use crate::failure::Failure;
use crate::terminal::{DetachKeys, InputEnd, RawMode, copy_input, copy_output};

#[derive(Debug, Args)]
pub struct ConsoleArgs {
    /// The virtio console (hvc0) instead of the serial line: quicker, and it has this window's size. A Debian of ours has
    /// a login there once its driver is loaded.
    #[arg(long)]
    pub virtio: bool,
    /// Keys that leave the console.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-]")]
    pub detach_keys: String,
    /// The machine.
    pub machine: String,
}

#[derive(Debug, Args)]
pub struct VsockArgs {
    /// The machine.
    pub machine: String,
    /// Port of the guest.
    pub port: u32,
}

pub async fn console(client: &Client, args: &ConsoleArgs) -> Result<ExitCode, Failure> {
    let name = &args.machine;
    let keys = DetachKeys::parse(&args.detach_keys).map_err(Failure::invalid)?;
    let line = if args.virtio { "virtio" } else { "serial" };
    let query = [("line", line.to_owned())];
    let (stream, _) = client
        .upgrade(&path_of(name, "console"), &query, empty())
        .await?;
    let (reader, mut writer) = tokio::io::split(stream);
    eprintln!(
        "berth: the console of {name}; {} leaves it, Enter brings its prompt",
        args.detach_keys.replace("ctrl-", "Ctrl-")
    );
    let _size = args
        .virtio
        .then(|| follow_size(client.clone(), path_of(name, "resize")));
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

/// Joins standard input and output with a port of the guest, until the guest closes it.
pub async fn vsock(client: &Client, args: &VsockArgs) -> Result<ExitCode, Failure> {
    let query = [("port", args.port.to_string())];
    let (stream, _) = client
        .upgrade(&path_of(&args.machine, "vsock"), &query, empty())
        .await?;
    let (reader, mut writer) = tokio::io::split(stream);
    let sent = async {
        // The guest may go on answering after our input ended.
        let _ = copy_input(&mut writer, None).await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        received = copy_output(reader, true) => {
            received.map_err(|e| Failure::io("the guest's socket broke off", &e))?;
        }
        () = sent => {}
    }
    Ok(ExitCode::SUCCESS)
}
