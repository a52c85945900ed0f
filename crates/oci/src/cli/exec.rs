//! exec.

use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;

use clap::Args;
use oci_spec::runtime::{Capability, LinuxCapabilities, Process, User};

use super::foreground::{self, Signals};
use super::{Context, run};
use crate::error::{Context as _, Error, Result};
use crate::launch::{self, Exec, Stdio};
use crate::state::{self, Status};

#[derive(Debug, Args)]
pub struct ExecArgs {
    /// The socket that receives the terminal's master
    #[arg(long)]
    pub console_socket: Option<PathBuf>,
    /// The socket that receives the process's pidfd
    #[arg(long)]
    pub pidfd_socket: Option<PathBuf>,
    /// The working directory
    #[arg(long)]
    pub cwd: Option<PathBuf>,
    /// A variable NAME=VALUE
    #[arg(short, long)]
    pub env: Vec<String>,
    /// With a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// UID or UID:GID
    #[arg(short, long)]
    pub user: Option<String>,
    /// Further groups
    #[arg(short = 'g', long)]
    pub additional_gids: Vec<u32>,
    /// A file with the process's JSON
    #[arg(short, long)]
    pub process: Option<PathBuf>,
    /// Do not wait for its end
    #[arg(short, long)]
    pub detach: bool,
    /// The file to write the pid to
    #[arg(long)]
    pub pid_file: Option<PathBuf>,
    /// Its SELinux label
    #[arg(long)]
    pub process_label: Option<String>,
    /// Its AppArmor profile
    #[arg(long)]
    pub apparmor: Option<String>,
    /// It cannot gain privileges
    #[arg(long)]
    pub no_new_privs: bool,
    /// A capability more
    #[arg(short, long)]
    pub cap: Vec<String>,
    /// How many descriptors from 3 on the process keeps
    #[arg(long, default_value_t = 0)]
    pub preserve_fds: u32,
    /// A cgroup below the container's
    #[arg(long)]
    pub cgroup: Option<PathBuf>,
    /// Also where the container is paused
    #[arg(long)]
    pub ignore_paused: bool,
    /// Accepted for runc's callers
    #[arg(long)]
    pub no_subreaper: bool,
    pub id: String,
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// `exec`.
pub(super) fn exec(context: &Context, arguments: &ExecArgs) -> Result<u8> {
    crate::exe::protect()?;
    let record = context.store.read(&arguments.id)?;
    let spec = context.store.config(&arguments.id)?;
    match context.store.status(&record) {
        Status::Stopped => {
            return Err(Error::Conflict("cannot exec in a stopped container".into()));
        }
        Status::Paused if !arguments.ignore_paused => {
            return Err(Error::Conflict(
                "cannot exec in a paused container (use --ignore-paused to override)".into(),
            ));
        }
        _ => {}
    }
    // Keeps the pid from being reused while it is joined.
    let Some(_target) = state::open(&record).during(|| format!("open process {}", record.pid))?
    else {
        return Err(Error::Conflict("cannot exec in a stopped container".into()));
    };
    let process = process(arguments, spec.process().as_ref())?;
    let terminal = process.terminal() == Some(true);
    if terminal && arguments.detach && arguments.console_socket.is_none() {
        return Err(Error::invalid(
            "cannot allocate tty if runc will detach without setting console socket",
        ));
    }
    let signals = if arguments.detach {
        None
    } else {
        Some(Signals::block()?)
    };
    let stdio = if terminal {
        let given = process.console_size().map(|size| crate::Size {
            columns: size.width() as u16,
            rows: size.height() as u16,
        });
        Stdio::Terminal {
            size: if arguments.console_socket.is_none() {
                foreground::own_size()
            } else {
                given
            },
        }
    } else {
        Stdio::Inherit
    };
    let listen_fds = run::listen_fds();
    let mut running = launch::exec(Exec {
        id: &arguments.id,
        pid: record.pid,
        cgroup: record.cgroup.as_ref(),
        process: &process,
        seccomp: spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.seccomp().as_ref()),
        stdio,
        preserve_fds: arguments.preserve_fds + listen_fds,
        listen_fds,
        // It is to see the container's keys, not new ones.
        no_new_keyring: true,
        rootless: context.rootless,
        sub_cgroup: arguments.cgroup.clone(),
    })?;
    let handed = (|| {
        if let (Some(socket), Some(master)) = (&arguments.console_socket, &running.terminal) {
            run::send_fd(socket, master.as_fd(), b"/dev/ptmx")?;
        }
        if let Some(socket) = &arguments.pidfd_socket {
            run::send_fd(socket, running.pidfd.as_fd(), b"pidfd")?;
        }
        arguments
            .pid_file
            .as_deref()
            .map_or(Ok(()), |path| run::pid_file(path, running.pid))
    })();
    if let Err(error) = handed {
        let _ = rustix::process::pidfd_send_signal(&running.pidfd, rustix::process::Signal::KILL);
        let _ = running.wait();
        return Err(error);
    }
    let Some(signals) = signals else { return Ok(0) };
    let master = running
        .terminal
        .take()
        .filter(|_| arguments.console_socket.is_none());
    let exit = foreground::wait(running.pidfd.as_fd(), master, signals)?;
    Ok(exit.code() as u8)
}

/// The process of the flags, which change the container's own.
fn process(arguments: &ExecArgs, own: Option<&Process>) -> Result<Process> {
    if let Some(path) = &arguments.process {
        let bytes = fs::read(path).during(|| format!("read {}", path.display()))?;
        return serde_json::from_slice(&bytes).map_err(|source| Error::Json {
            path: path.clone(),
            source,
        });
    }
    let mut process = own.cloned().ok_or_else(|| {
        Error::invalid("the container has no process to take after: use --process")
    })?;
    if arguments.command.is_empty() {
        return Err(Error::invalid("process args cannot be empty"));
    }
    process.set_args(Some(arguments.command.clone()));
    process.set_terminal(Some(arguments.tty));
    process.set_console_size(None);
    if let Some(cwd) = &arguments.cwd {
        process.set_cwd(cwd.clone());
    }
    if !arguments.env.is_empty() {
        let mut all = process.env().clone().unwrap_or_default();
        for variable in &arguments.env {
            let name = variable
                .split_once('=')
                .map_or(variable.as_str(), |(name, _)| name);
            all.retain(|known| {
                known
                    .split_once('=')
                    .map_or(known.as_str(), |(name, _)| name)
                    != name
            });
            all.push(variable.clone());
        }
        process.set_env(Some(all));
    }
    if let Some(user) = &arguments.user {
        process.set_user(parse_user(user, process.user())?);
    }
    if !arguments.additional_gids.is_empty() {
        let mut user = process.user().clone();
        user.set_additional_gids(Some(arguments.additional_gids.clone()));
        process.set_user(user);
    }
    if let Some(label) = &arguments.process_label {
        process.set_selinux_label(Some(label.clone()));
    }
    if let Some(profile) = &arguments.apparmor {
        process.set_apparmor_profile(Some(profile.clone()));
    }
    if arguments.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    if !arguments.cap.is_empty() {
        process.set_capabilities(Some(with_capabilities(
            process.capabilities().clone(),
            &arguments.cap,
        )?));
    }
    Ok(process)
}

fn parse_user(text: &str, own: &User) -> Result<User> {
    let wrong = || Error::invalid(format!("--user {text:?}: UID or UID:GID is wanted"));
    let (uid, gid) = match text.split_once(':') {
        Some((uid, gid)) => (uid, Some(gid)),
        None => (text, None),
    };
    let mut user = own.clone();
    user.set_uid(uid.parse().map_err(|_| wrong())?);
    if let Some(gid) = gid {
        user.set_gid(gid.parse().map_err(|_| wrong())?);
    }
    Ok(user)
}

fn with_capabilities(own: Option<LinuxCapabilities>, more: &[String]) -> Result<LinuxCapabilities> {
    let mut sets = match own {
        Some(sets) => sets,
        None => serde_json::from_str("{}").map_err(|error| Error::invalid(error.to_string()))?,
    };
    for name in more {
        let capability: Capability =
            serde_json::from_value(serde_json::Value::String(name.to_uppercase()))
                .map_err(|_| Error::invalid(format!("--cap {name:?} is not a capability")))?;
        let add = |set: &Option<std::collections::HashSet<Capability>>| {
            let mut set = set.clone().unwrap_or_default();
            set.insert(capability);
            Some(set)
        };
        sets.set_bounding(add(sets.bounding()));
        sets.set_effective(add(sets.effective()));
        sets.set_permitted(add(sets.permitted()));
        // As runc: ambient only where inheritable already says so.
    }
    Ok(sets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_one_number_or_two() {
        let own = User::default();
        assert_eq!(parse_user("7:8", &own).unwrap().gid(), 8);
        assert_eq!(parse_user("7", &own).unwrap().uid(), 7);
        assert!(parse_user("root", &own).is_err());
    }
}
