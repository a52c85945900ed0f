//! Programs of other builds in /run (see `stage`), which an upgrade leaves there.

use std::ffi::CStr;
use std::mem::zeroed;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Removes them, where nobody runs them and they are older than an hour: builds that are in use side by side do not chase
/// each other's away. `own` is this build's name. Called before `main`: it makes system calls, and allocates nothing.
pub fn sweep(directory: RawFd, own: &[u8]) {
    const HOUR: i64 = 3600;
    // A page for the entries of the directory (getdents64(2)).
    let mut page = [0u64; 512];
    loop {
        // SAFETY: the buffer is as long as is said.
        let filled = unsafe {
            libc::syscall(
                libc::SYS_getdents64,
                directory,
                page.as_mut_ptr(),
                size_of_val(&page),
            )
        };
        if filled <= 0 {
            return;
        }
        let mut at = 0;
        while at < filled as usize {
            // SAFETY: the kernel has written whole records up to `filled`, each with its length at 16 and a name that
            // ends with NUL at 19.
            let (length, name) = unsafe {
                let entry = page.as_ptr().cast::<u8>().add(at);
                let length = entry.add(16).cast::<u16>().read_unaligned();
                (length, CStr::from_ptr(entry.add(19).cast()))
            };
            at += usize::from(length).max(1);
            if !name.to_bytes().starts_with(b".program-") || name.to_bytes() == own {
                continue;
            }
            // SAFETY: the name ends with NUL, all bytes zero is a `stat`, the kernel fills it, and a descriptor it has
            // just made is nobody else's.
            unsafe {
                let mut stat: libc::stat = zeroed();
                let flags = libc::AT_SYMLINK_NOFOLLOW;
                let looked = libc::fstatat(directory, name.as_ptr(), &raw mut stat, flags);
                if looked != 0 || stat.st_mtime + HOUR > libc::time(std::ptr::null_mut()) {
                    continue;
                }
                // What is being executed cannot be opened for writing (ETXTBSY).
                let flags = libc::O_WRONLY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
                let opened = libc::openat(directory, name.as_ptr(), flags);
                if opened >= 0 {
                    drop(OwnedFd::from_raw_fd(opened));
                    libc::unlinkat(directory, name.as_ptr(), 0);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::os::fd::AsRawFd;
    use std::process::Command;
    use std::time::{Duration, SystemTime};

    #[test]
    fn old_programs_that_nobody_runs_go_and_all_others_stay() {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str| scratch.path().join(name);
        let names = [
            ".program-own",
            ".program-old",
            ".program-new",
            ".program-busy",
            "c1",
        ];
        for name in names {
            fs::copy("/bin/sleep", at(name)).unwrap();
            if name != ".program-new" {
                let yesterday = SystemTime::now() - Duration::from_secs(86_400);
                File::open(at(name))
                    .unwrap()
                    .set_modified(yesterday)
                    .unwrap();
            }
        }
        let mut busy = Command::new(at(".program-busy"))
            .arg("600")
            .spawn()
            .unwrap();
        let directory = File::open(scratch.path()).unwrap();
        sweep(directory.as_raw_fd(), b".program-own");
        // Linux 6.11 and 6.12 let what is being executed be opened for writing; such a program loses its name alone.
        let held = File::options().write(true).open(at(".program-own"));
        let protects = File::options()
            .write(true)
            .open(at(".program-busy"))
            .is_err();
        let running = busy.try_wait().unwrap().is_none();
        busy.kill().unwrap();
        busy.wait().unwrap();
        assert!(held.is_ok() && running);
        let left: Vec<bool> = names.iter().map(|name| at(name).exists()).collect();
        assert_eq!(left, [true, false, true, protects, true]);
    }
}
