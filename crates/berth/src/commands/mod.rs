//! What each word of the command line asks the daemon to do.

pub mod build;
pub mod container;
pub mod copy;
pub mod create;
pub mod credentials;
pub mod image;
pub mod machine;
pub mod network;
pub mod session;
pub mod show;
pub mod system;
pub mod volume;

use crate::client::Client;
use crate::output::Format;

/// What every command has at hand.
pub struct Context {
    pub client: Client,
}

/// `--format` and `-q` of everything that lists.
#[derive(Debug, Clone, clap::Args)]
pub struct ListOptions {
    /// table, json, yaml, or a Go template as '{{.Name}}'.
    #[arg(long, default_value_t, value_name = "FORMAT")]
    pub format: Format,
    /// Write ids or names only.
    #[arg(short, long)]
    pub quiet: bool,
}

/// `--format` of everything that shows one thing.
#[derive(Debug, Clone, clap::Args)]
pub struct ShowOptions {
    /// table, json, yaml, or a Go template as '{{.Name}}'.
    #[arg(short, long, default_value_t = Format::Json, value_name = "FORMAT")]
    pub format: Format,
}
