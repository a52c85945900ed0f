//! The verbs of containers. Those with a stream of their own (`run`, `exec`, `attach`) are in [`super::session`].

mod content;
mod life;
mod look;
mod ls;
mod watch;

use std::process::ExitCode;

use clap::Args;

use super::show::{seconds, since};
use crate::client::encode;
use crate::failure::Failure;
use crate::output;

pub use content::*;
pub use life::*;
pub use look::*;
pub use ls::*;
pub use watch::*;

fn path_of(container: &str, verb: &str) -> String {
    format!("/containers/{}/{verb}", encode(container))
}

/// Does `one` for every name, prints what it returns, goes on after failures and reports each.
pub async fn for_each<F>(names: &[String], one: F) -> Result<ExitCode, Failure>
where
    F: AsyncFn(&str) -> Result<Option<String>, Failure>,
{
    let mut worst = None;
    for name in names {
        match one(name).await {
            Ok(Some(line)) => output::line(line),
            Ok(None) => {}
            Err(failure) => {
                failure.report();
                worst = Some(failure.code);
            }
        }
    }
    Ok(worst.map_or(ExitCode::SUCCESS, ExitCode::from))
}

#[derive(Debug, Args)]
pub struct Names {
    /// The containers.
    #[arg(required = true)]
    pub containers: Vec<String>,
}

/// Age in whole seconds of an RFC 3339 text, for tables.
pub fn age(text: &str) -> String {
    since(seconds(text))
}
