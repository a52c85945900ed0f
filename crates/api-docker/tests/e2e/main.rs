//! The real clients (docker's command line, the PyPI package `docker`, bare HTTP) against a daemon in this process.
//!
//! Run with names (or parts of them) as arguments to run only those. The binary is also the keeper that the
//! daemon starts, which is why it has a `main` of its own.

mod daemon;

mod builds;
mod compose;
mod containers;
mod images;
mod limits;
mod lists;
mod networks;
mod python;
mod remote;
mod streams;
mod terminals;
mod verbs;
mod volumes;
mod wire;

use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Instant;

/// A test and its name.
pub type Test = (&'static str, fn());

/// Tests as a table of their function names.
#[macro_export]
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        pub const TESTS: &[$crate::Test] = &[$((stringify!($name), $name as fn())),*];
    };
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(role) = daemon::role(&args) {
        return role;
    }
    if args.iter().any(|arg| arg == "--list") {
        return ExitCode::SUCCESS;
    }
    daemon::isolate();
    let wanted: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    let all = [
        wire::TESTS,
        volumes::TESTS,
        networks::TESTS,
        images::TESTS,
        containers::TESTS,
        python::TESTS,
        remote::TESTS,
        verbs::TESTS,
        limits::TESTS,
        compose::TESTS,
        lists::TESTS,
        builds::TESTS,
        terminals::TESTS,
        streams::TESTS,
    ];
    let chosen: Vec<Test> = all
        .into_iter()
        .flatten()
        .copied()
        .filter(|(name, _)| {
            wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()))
        })
        .collect();
    println!("running {} tests", chosen.len());
    let queue = Mutex::new(chosen.into_iter());
    let failed = Mutex::new(Vec::new());
    // Two at a time: enough to find what does not stand company, few enough for a small machine.
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some((name, test)) = queue.lock().unwrap().next() else {
                        return;
                    };
                    let begun = Instant::now();
                    let ended = panic::catch_unwind(AssertUnwindSafe(test));
                    let seconds = begun.elapsed().as_secs_f32();
                    if ended.is_ok() {
                        println!("test {name} ... ok ({seconds:.1} s)");
                    } else {
                        println!("test {name} ... FAILED ({seconds:.1} s)");
                        failed.lock().unwrap().push(name);
                    }
                }
            });
        }
    });
    daemon::stop_shared();
    let failed = failed.into_inner().unwrap();
    if failed.is_empty() {
        println!("test result: ok");
        return ExitCode::SUCCESS;
    }
    println!("test result: FAILED: {}", failed.join(", "));
    ExitCode::FAILURE
}
