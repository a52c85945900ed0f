//! create, start, run.

use std::fs;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use base::pidfd::ProcessKey;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::foreground::{self, Signals};
use super::{Context, CreateArgs, RunArgs, commands};
use crate::bundle::{self, Bundle};
use crate::cgroup::CgroupTarget;
use crate::error::{Context as _, Error, Result};
use crate::hook::{self, HookState};
use crate::launch::{self, Created, Gate, Launch, Stdio};
use crate::state::{Record, Status};
use crate::{exe, rootfs::Rootfs};

/// `create`.
pub(super) fn create(context: &Context, arguments: &CreateArgs) -> Result<u8> {
    exe::protect()?;
    let bundle = load(&arguments.bundle)?;
    let terminal = wants_terminal(&bundle);
    if terminal && arguments.console_socket.is_none() {
        return Err(Error::invalid(
            "cannot allocate tty if runc will detach without setting console socket",
        ));
    }
    context.store.reserve(&arguments.id)?;
    let made = (|| {
        let gate = Gate::Listener(context.store.listen(&arguments.id)?);
        let created = make(context, arguments, &bundle, gate, false)?;
        let handed = hand_over(arguments, &created, terminal)
            .and_then(|()| write_pid_file(arguments, created.pid));
        handed.inspect_err(|_| abandon(&created))
    })();
    made.inspect_err(|_| {
        let _ = context.store.remove(&arguments.id);
    })?;
    Ok(0)
}

/// `start`.
pub(super) fn start(context: &Context, id: &str) -> Result<u8> {
    let record = context.store.read(id)?;
    let spec = context.store.config(id)?;
    match context.store.status(&record) {
        Status::Created => {}
        Status::Stopped => {
            return Err(Error::Conflict(
                "cannot start a container that has stopped".into(),
            ));
        }
        _ => {
            return Err(Error::Conflict(
                "cannot start an already running container".into(),
            ));
        }
    }
    let Some(process) =
        crate::state::open(&record).during(|| format!("open process {}", record.pid))?
    else {
        return Err(Error::Conflict(
            "cannot start a container that has stopped".into(),
        ));
    };
    let socket = context.store.connect(id)?;
    launch::start_at(socket, &record, &spec, process.as_fd())?;
    let state = HookState::new(
        &spec,
        &record.id,
        &record.bundle,
        "running",
        Some(record.pid),
    );
    let hooks = spec
        .hooks()
        .as_ref()
        .and_then(|hooks| hooks.poststart().as_deref());
    if let Err(error) = hook::run_all("poststart", hooks, &state) {
        let _ = commands::delete(context, id, true);
        return Err(error);
    }
    Ok(0)
}

/// `run`.
pub(super) fn run(context: &Context, arguments: &RunArgs) -> Result<u8> {
    exe::protect()?;
    let create = &arguments.create;
    let bundle = load(&create.bundle)?;
    let terminal = wants_terminal(&bundle);
    if terminal && arguments.detach && create.console_socket.is_none() {
        return Err(Error::invalid(
            "cannot allocate tty if runc will detach without setting console socket",
        ));
    }
    if create.console_socket.is_some() && !(terminal && arguments.detach) {
        return Err(Error::invalid(
            "cannot use console socket if runc will not detach or allocate tty",
        ));
    }
    // Before the process exists: no signal for it is lost.
    let signals = if arguments.detach {
        None
    } else {
        Some(Signals::block()?)
    };
    context.store.reserve(&create.id)?;
    let finished = run_reserved(context, arguments, &bundle, terminal, signals);
    if finished.is_err() {
        let _ = context.store.remove(&create.id);
    }
    finished
}

fn run_reserved(
    context: &Context,
    arguments: &RunArgs,
    bundle: &Bundle,
    terminal: bool,
    signals: Option<Signals>,
) -> Result<u8> {
    let create = &arguments.create;
    let hooks = bundle.spec.hooks().as_ref();
    let mut created = make(context, create, bundle, Gate::Open, signals.is_some())?;
    let after = hand_over(create, &created, terminal && arguments.detach)
        .and_then(|()| write_pid_file(create, created.pid))
        .and_then(|()| {
            let state = HookState::new(
                &bundle.spec,
                &create.id,
                &bundle.directory,
                "running",
                Some(created.pid),
            );
            hook::run_all(
                "poststart",
                hooks.and_then(|hooks| hooks.poststart().as_deref()),
                &state,
            )
        });
    if let Err(error) = after {
        abandon(&created);
        return Err(error);
    }
    let Some(signals) = signals else { return Ok(0) };
    let master = created.terminal.take();
    let exit = foreground::wait(created.pidfd.as_fd(), master, signals)?;
    if !arguments.keep {
        if let Some(cgroup) = &created.cgroup {
            // Without a pid namespace of its own, processes may have outlived the first.
            if cgroup.remove_now().is_err() {
                // The exit code is the program's all the same.
                if let Err(error) = cgroup.kill().and_then(|()| cgroup.remove()) {
                    eprintln!("berth oci: {error}");
                }
            }
        }
        context.store.remove(&create.id)?;
        let state = HookState::new(&bundle.spec, &create.id, &bundle.directory, "stopped", None);
        if let Err(error) = hook::run_all(
            "poststop",
            hooks.and_then(|hooks| hooks.poststop().as_deref()),
            &state,
        ) {
            eprintln!("berth oci: {error}");
        }
    }
    Ok(exit.code() as u8)
}

fn load(directory: &Path) -> Result<Bundle> {
    let bundle = bundle::load(directory)?;
    // The process looks at relative paths of the configuration from the bundle.
    std::env::set_current_dir(&bundle.directory)
        .during(|| format!("enter {}", bundle.directory.display()))?;
    Ok(bundle)
}

fn wants_terminal(bundle: &Bundle) -> bool {
    bundle
        .spec
        .process()
        .as_ref()
        .is_some_and(|process| process.terminal() == Some(true))
}

fn make(
    context: &Context,
    arguments: &CreateArgs,
    bundle: &Bundle,
    gate: Gate,
    foreground: bool,
) -> Result<Created> {
    let spec = &bundle.spec;
    let mut launch = Launch::new(&arguments.id, &bundle.directory, spec)?;
    launch.cgroup = CgroupTarget::of(spec, &arguments.id, context.systemd_cgroup)?;
    launch.gate = gate;
    let listen_fds = listen_fds();
    launch.preserve_fds = arguments.preserve_fds + listen_fds;
    launch.listen_fds = listen_fds;
    launch.no_pivot = arguments.no_pivot;
    launch.no_new_keyring = arguments.no_new_keyring;
    launch.rootless = context.rootless;
    if wants_terminal(bundle) {
        let size = if foreground {
            foreground::own_size()
        } else {
            None
        };
        launch.stdio = Stdio::Terminal { size };
    }
    let rootfs = match &launch.rootfs {
        Rootfs::Dir(path) => path.clone(),
        Rootfs::Overlay { upper, .. } => upper.clone(),
    };
    let mut record = |pid: i32, cgroup: Option<&crate::cgroup::Cgroup>| {
        let record = Record {
            oci_version: if spec.version().is_empty() {
                crate::OCI_VERSION.into()
            } else {
                spec.version().clone()
            },
            id: arguments.id.clone(),
            pid,
            key: Some(ProcessKey::of(pid).during(|| "look at the new process".into())?),
            bundle: bundle.directory.clone(),
            rootfs: rootfs.clone(),
            created: base::time::now_rfc3339(),
            owner: String::new(),
            cgroup: cgroup.cloned(),
            rootless: context.rootless,
        };
        context.store.write(&record, &bundle.raw)
    };
    launch.on_clone = Some(&mut record);
    launch::create(launch)
}

/// How many sockets systemd's socket activation passed to this process for the container.
pub(super) fn listen_fds() -> u32 {
    let own = std::process::id().to_string();
    if std::env::var("LISTEN_PID").is_ok_and(|pid| pid != own) {
        return 0;
    }
    std::env::var("LISTEN_FDS")
        .ok()
        .and_then(|count| count.parse().ok())
        .filter(|count| *count < 1024)
        .unwrap_or(0)
}

fn hand_over(arguments: &CreateArgs, created: &Created, terminal: bool) -> Result<()> {
    if let (true, Some(socket), Some(master)) =
        (terminal, &arguments.console_socket, &created.terminal)
    {
        send_fd(socket, master.as_fd(), b"/dev/ptmx")?;
    }
    if let Some(socket) = &arguments.pidfd_socket {
        send_fd(socket, created.pidfd.as_fd(), b"pidfd")?;
    }
    Ok(())
}

/// Sends a descriptor with a name to a listening socket.
pub(super) fn send_fd(socket: &PathBuf, fd: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    let stream = UnixStream::connect(socket)
        .during(|| format!("connect to the socket {}", socket.display()))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    rustix::net::sendmsg(
        &stream,
        &[IoSlice::new(name)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )
    .during(|| format!("send a descriptor to {}", socket.display()))
    .map(drop)
}

fn write_pid_file(arguments: &CreateArgs, pid: i32) -> Result<()> {
    arguments
        .pid_file
        .as_deref()
        .map_or(Ok(()), |path| pid_file(path, pid))
}

/// Written beside and renamed: a reader never sees half of it.
pub(super) fn pid_file(path: &Path, pid: i32) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = path.with_file_name(format!(".{name}"));
    fs::write(&beside, pid.to_string())
        .and_then(|()| fs::rename(&beside, path))
        .during(|| format!("write the pid file {}", path.display()))
}

/// Ends a container that cannot be handed to its caller.
fn abandon(created: &Created) {
    let pidfd: &OwnedFd = &created.pidfd;
    let _ = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
    let _ = crate::process::wait(pidfd.as_fd());
    if let Some(cgroup) = &created.cgroup {
        let _ = cgroup.kill();
        let _ = cgroup.remove();
    }
}
