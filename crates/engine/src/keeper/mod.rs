//! The keeper: the small process that is the parent of all container processes and outlives the daemon.

use std::process::ExitCode;

/// Runs the keeper until no daemon is connected and no container lives: `berth keeper --state DIR --run DIR`.
pub fn main(args: impl IntoIterator<Item = String>) -> ExitCode {
    let _ = args;
    eprintln!("berth keeper: this build has no keeper");
    ExitCode::from(base::Kind::Unsupported.exit_code())
}
