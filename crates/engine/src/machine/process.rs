//! A machine's process as the daemon meets it: its start, its control socket, its cgroup.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use base::pidfd::PidFd;
use oci::cgroup::Cgroup;
use oci_spec::runtime::LinuxResources;
use rustix::thread::UnshareFlags;
use serde_json::json;
use vmm::process;
use vmm::process::protocol::{Answer, Request};

use super::record::Machine;
use crate::{Error, Result};

/// Descriptors passed to a machine process start here.
pub const FIRST_PASSED: i32 = 20;

/// Memory of a machine's process beyond its guest's: translated code, tables, buffers, and the pages of its disks
/// that the kernel keeps as long as there is room.
const OVERHEAD: u64 = 512 << 20;
const OVERHEAD_PER_CPU: u64 = 32 << 20;

pub fn has_ended(pidfd: &PidFd) -> bool {
    let mut fds = [rustix::event::PollFd::new(
        pidfd,
        rustix::event::PollFlags::IN,
    )];
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

/// Its end is seen by its pidfd; only the kernel's record of it has to be taken.
pub fn reap(mut child: std::process::Child) {
    let _ = std::thread::Builder::new()
        .name("machine-reap".into())
        .stack_size(64 << 10)
        .spawn(move || child.wait());
}

/// Connects to a socket in a machine's folder.
pub fn connect(folder: &Path, name: &str) -> std::io::Result<UnixStream> {
    // The path of a socket may have 107 bytes, a state folder more: a descriptor's is short. And it must not be a link, which
    // a machine's process can make.
    let socket = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(folder.join(name))?;
    if !socket.metadata()?.file_type().is_socket() {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd()))
}

/// Reads a line, byte by byte: what follows it is for who gets the stream then, the guest's sockets or its console.
fn read_line(stream: &UnixStream, limit: u64) -> std::io::Result<Vec<u8>> {
    let mut line = Vec::new();
    BufReader::with_capacity(1, stream.take(limit)).read_until(b'\n', &mut line)?;
    Ok(line)
}

/// How long the guest has to take or refuse a connection.
const GUEST_ANSWER: Duration = Duration::from_secs(10);

/// Asks for a port of the guest (see `vmm::virtio::vsock`); false where it is refused.
pub fn greet(stream: &UnixStream, port: u32) -> std::io::Result<bool> {
    stream.set_read_timeout(Some(GUEST_ANSWER))?;
    (&*stream).write_all(format!("CONNECT {port}\n").as_bytes())?;
    let read = read_line(stream, 64);
    stream.set_read_timeout(None)?;
    match read {
        Ok(answer) => Ok(answer.starts_with(b"OK ")),
        // A guest without the driver does not answer at all.
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::WouldBlock
                    | std::io::ErrorKind::TimedOut
                    | std::io::ErrorKind::ConnectionReset
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// How long a machine's process has to answer what it does at once, and what may take it a while.
const QUICK: Duration = Duration::from_secs(3);
const SLOW: Duration = Duration::from_secs(20);
/// The longest answer; the process serves a guest that may have taken it over.
const ANSWER_LIMIT: u64 = 256 << 10;

pub fn exchange(stream: &UnixStream, request: &Request) -> std::io::Result<Answer> {
    let timeout = match request {
        // They wait for what the disks are at.
        Request::Pause | Request::GrowDisk { .. } => SLOW,
        _ => QUICK,
    };
    stream.set_write_timeout(Some(timeout))?;
    stream.set_read_timeout(Some(timeout))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    (&*stream).write_all(&line)?;
    let answer = read_line(stream, ANSWER_LIMIT)?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    Ok(serde_json::from_slice(&answer)?)
}

pub fn ask(folder: &Path, request: &Request) -> Result<Answer> {
    connect(folder, process::CONTROL)
        .and_then(|stream| exchange(&stream, request))
        .map_err(Error::io(
            "the machine's process does not answer".to_owned(),
        ))
}

/// Limits of a machine's process: what its guest was promised and what serving it takes.
fn limits(machine: &Machine) -> Result<LinuxResources> {
    let spec = &machine.spec;
    let cpus = u64::from(spec.cpus);
    let memory = spec.memory + spec.memory / 32 + OVERHEAD + OVERHEAD_PER_CPU * cpus;
    // A processor more than the guest has: disks and networks are served beside its own.
    let quota = (cpus + 1) * 100_000;
    let mut devices = vec![
        json!({"allow": true, "type": "c", "major": 10, "minor": 232, "access": "rw"}),
        json!({"allow": true, "type": "c", "major": 1, "minor": 9, "access": "r"}),
    ];
    for drive in &machine.drives {
        if let Ok(about) = fs::metadata(&drive.path)
            && about.file_type().is_block_device()
        {
            let number = about.rdev();
            devices.push(json!({
                "allow": true,
                "type": "b",
                "major": rustix::fs::major(number),
                "minor": rustix::fs::minor(number),
                "access": if drive.read_only { "r" } else { "rw" },
            }));
        }
    }
    let limits = json!({
        "memory": {"limit": memory},
        "cpu": {"quota": quota, "period": 100_000},
        "pids": {"limit": 192 + 8 * cpus},
        "devices": devices,
    });
    serde_json::from_value(limits).map_err(|error| Error::Invalid(format!("limits: {error}")))
}

/// A cgroup for a machine's process, and the doors through which it enters.
///
/// # Errors
/// Where this host has no cgroups, or the daemon may not make one.
pub fn make_cgroup(path: &str, machine: &Machine) -> Result<(Cgroup, Vec<OwnedFd>)> {
    let cgroup = Cgroup::make(&format!("/{path}"), &limits(machine)?).map_err(Error::room)?;
    match cgroup.doors() {
        Ok(doors) => Ok((cgroup, doors)),
        Err(error) => {
            let _ = cgroup.remove();
            Err(Error::room(error))
        }
    }
}

/// Starts the process of the machine in `folder`, with the taps as descriptors from [`FIRST_PASSED`] on. It enters its
/// cgroup before it does anything else, and is the first of a process namespace where the host gives one.
pub fn spawn(
    folder: &Path,
    taps: Vec<OwnedFd>,
    doors: Vec<OwnedFd>,
    log: fs::File,
) -> Result<std::process::Child> {
    let copy = log
        .try_clone()
        .map_err(Error::io("cannot share the log".to_owned()))?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("berth")
        .arg("machine-process")
        .arg(folder)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(copy)
        .current_dir("/");
    let numbers: Vec<i32> = taps.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: only async-signal-safe calls on numbers captured before the fork; the descriptors are open then.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            for door in &doors {
                rustix::io::write(door, b"0")?;
            }
            // First out of the way of their targets, then into place, where dup2 clears close-on-exec.
            let mut high = [0i32; 16];
            for (slot, number) in high.iter_mut().zip(&numbers) {
                *slot = libc::fcntl(*number, libc::F_DUPFD_CLOEXEC, FIRST_PASSED + 16);
                if *slot < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            for (index, _) in numbers.iter().enumerate() {
                if libc::dup2(high[index], FIRST_PASSED + index as i32) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    // What a thread leaves, only its later children are without: the daemon's other threads keep their namespace.
    let spawner = std::thread::Builder::new()
        .name("machine-start".into())
        .spawn(move || {
            // SAFETY: no memory, descriptor or file system state is unshared, only where this thread's children begin.
            if let Err(error) = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) } {
                tracing::warn!(%error, "a machine's process sees the host's processes");
            }
            command.spawn()
        });
    let failed = || Error::io("cannot start the machine's process".to_owned());
    let spawned = spawner.map_err(failed())?.join();
    spawned
        .unwrap_or_else(|_| Err(std::io::Error::other("a defect in its start")))
        .map_err(failed())
}
