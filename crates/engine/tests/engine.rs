//! The engine with a real keeper, real containers and a busybox image made on the fly.
//!
//! No test harness of its own threads: this program is also the keeper (`engine-test keeper`), which must have one
//! thread. Needs root, overlayfs and busybox; says so and passes where they are missing.

mod cases;
mod fixture;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some("keeper") {
        return engine::keeper::main(arguments);
    }
    let filter = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'));
    if std::env::args().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    if let Some(reason) = fixture::missing() {
        eprintln!("SKIPPED: {reason}");
        return ExitCode::SUCCESS;
    }
    cases::run(filter.as_deref())
}
