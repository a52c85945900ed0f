//! Berth's OCI runtime (runtime-spec 1.2, and what 1.3 adds for Linux): a library for the engine's keeper, and
//! [`cli`], which stands in for runc.
//!
//! A container is made by one clone3(2). The new process sets itself up (mounts through the new mount API, all by
//! descriptor), tells the runtime over a socket how it went, waits for the start, and executes the program. Nothing
//! is executed in between, and no process remains but the container's own.
//!
//! **The calling process must be single-threaded.** The child goes on in a copy of it.

pub mod bundle;
pub mod cgroup;
mod channel;
pub mod cli;
mod device;
mod error;
pub mod exe;
mod hook;
mod init;
mod launch;
mod mount;
mod namespace;
mod netdevice;
mod process;
mod rootfs;
mod scheduling;
pub mod seccomp;
pub mod state;
mod syscall;
mod terminal;

pub use error::{Error, Result};
pub use launch::{Created, Exec, Gate, Launch, OnClone, Running, Stdio, create, exec};
pub use namespace::Range;
pub use process::{Exit, try_wait, wait};
pub use rootfs::Rootfs;
pub use terminal::{Size, set_size};

/// The version of the runtime specification this follows.
pub const OCI_VERSION: &str = "1.3.0";
