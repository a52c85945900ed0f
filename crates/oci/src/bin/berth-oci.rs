//! The runtime as a program of its own, which `berth` carries and executes (crates/berth/build.rs).
//!
//! The standard library's start-up before `main` (a guard for the stack, a look at the process's memory map) is a
//! part of a short run that can be felt: this is the C library's `main`, which does what of it is needed.

#![no_main]

use std::ffi::{c_char, c_int};

#[unsafe(no_mangle)]
extern "C" fn main(_count: c_int, _arguments: *const *const c_char) -> c_int {
    if !ready() {
        return 1;
    }
    // The C library has handed the arguments to the standard library.
    let code = oci::cli::exit_code(std::env::args_os());
    // Flushes what is written to standard output.
    std::process::exit(code.into())
}

/// Standard descriptors that are closed would be taken by the next files opened, and a closed pipe is an error to be
/// told, not the end.
fn ready() -> bool {
    // SAFETY: the path ends with NUL, and SIG_IGN is no handler.
    unsafe {
        for number in 0..3 {
            if libc::fcntl(number, libc::F_GETFD) < 0
                && libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) != number
            {
                return false;
            }
        }
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
    }
    true
}
