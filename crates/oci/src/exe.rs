//! Protection of the runtime's own executable (CVE-2019-5736).
//!
//! A container can reach the file its first process was copied from, through `/proc/self/exe`, and could overwrite
//! it once nobody executes it any more. So the runtime executes itself from a detached read-only mount of that file:
//! what the container reaches is that mount, which it can neither write through nor remount. Where such a mount
//! cannot be made, a sealed copy in memory does the same.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use rustix::fs::{CWD, MemfdFlags, SealFlags, StatVfsMountFlags};

use crate::error::{Context, Result};
use crate::syscall::{self, MountAttr, attr};

/// Whether this process's executable cannot be written through `/proc/self/exe`.
pub fn is_protected() -> bool {
    let read_only = rustix::fs::statvfs("/proc/self/exe")
        .is_ok_and(|stat| stat.f_flag.contains(StatVfsMountFlags::RDONLY));
    read_only
        || fs::File::open("/proc/self/exe")
            .and_then(|file| Ok(rustix::fs::fcntl_get_seals(&file)?))
            .is_ok_and(|seals| seals.contains(SealFlags::WRITE))
}

/// Executes this program again, protected, with the same arguments; returns at once where it already is. To be
/// called first thing, before threads and descriptors exist.
///
/// # Errors
/// Where neither a mount nor a copy can be made.
pub fn protect() -> Result<()> {
    if is_protected() {
        return Ok(());
    }
    let file = read_only_mount()
        .or_else(|_| sealed_copy())
        .during(|| "protect the runtime's executable".into())?;
    let text = |value: std::ffi::OsString| CString::new(value.into_vec()).unwrap_or_default();
    let arguments: Vec<CString> = std::env::args_os().map(text).collect();
    let environment: Vec<CString> = std::env::vars_os()
        .map(|(mut name, value)| {
            name.push("=");
            name.push(value);
            text(name)
        })
        .collect();
    Err(syscall::exec_fd(file.as_fd(), &arguments, &environment))
        .during(|| "execute the protected runtime".into())
}

fn read_only_mount() -> io::Result<OwnedFd> {
    let tree = syscall::clone_tree(CWD, Path::new("/proc/self/exe"), false)?;
    let attributes = MountAttr {
        attr_set: attr::RDONLY | attr::NODEV | attr::NOSUID,
        ..MountAttr::default()
    };
    syscall::mount_setattr(tree.as_fd(), false, &attributes)?;
    Ok(tree)
}

fn sealed_copy() -> io::Result<OwnedFd> {
    let mut source = fs::File::open("/proc/self/exe")?;
    let mut copy = fs::File::from(rustix::fs::memfd_create(
        "berth-oci",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?);
    io::copy(&mut source, &mut copy)?;
    rustix::fs::fcntl_add_seals(
        &copy,
        SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
    )?;
    Ok(copy.into())
}
