//! The last steps to execve(2), which init and a joined process share.

use std::convert::Infallible;
use std::os::fd::AsRawFd;

use oci_spec::runtime::{Hook, Process};
use rustix::fs::Mode;

use crate::channel::Channel;
use crate::error::{Context, Error, Result};
use crate::hook::{self, HookState};
use crate::launch::Gate;
use crate::process::{self, Label};
use crate::scheduling;
use crate::seccomp::Program;
use crate::syscall;

/// The last steps, which init and a joined process share.
pub(crate) struct Finish<'a> {
    pub id: &'a str,
    pub process: &'a Process,
    pub seccomp: Option<&'a Program>,
    pub channel: Channel,
    pub gate: Gate,
    pub preserve_fds: u32,
    pub listen_fds: u32,
    pub no_new_keyring: bool,
    /// Make the working directory where it is not there.
    pub make_directory: bool,
    /// Else the runtime has set them from outside.
    pub set_limits: bool,
    pub start_hooks: Option<(&'a [Hook], HookState<'a>)>,
    pub label: Option<Label>,
}

impl Finish<'_> {
    pub(super) fn run(mut self) -> ! {
        let Err(error) = self.execute();
        self.channel.send_error(&error);
        syscall::exit_now(error.exit_status().into());
    }

    fn execute(&mut self) -> Result<Infallible> {
        let process = self.process;
        if let Some(priority) = process.io_priority() {
            scheduling::set_io_priority(priority)?;
        }
        if let Some(scheduler) = process.scheduler() {
            scheduling::set_scheduler(scheduler)?;
        }
        process::own_stdio(process.user().uid());
        process::enter_directory(process.cwd(), self.make_directory)?;
        let arguments = process::arguments(process)?;
        let environment = process::environment(process, self.listen_fds)?;
        let program = process::find_program(&arguments[0], &environment)?;
        self.wait_at_gate()?;
        if let Some((hooks, state)) = &self.start_hooks {
            hook::run_all("startContainer", Some(hooks), state)?;
        }
        if !self.no_new_keyring {
            self.join_keyring()?;
        }
        if self.set_limits {
            process::set_limits(0, process.rlimits().as_deref().unwrap_or_default())?;
        }
        if let Some((file, label)) = self.label.take() {
            rustix::io::write(&file, label.as_bytes())
                .during(|| format!("take the security label {label:?}"))?;
        }
        syscall::cloexec_from(3 + self.preserve_fds).during(|| "close_range".into())?;
        let no_new_privileges = process.no_new_privileges().unwrap_or(false);
        self.channel.write(b'X', &[])?;
        // Without no_new_privs, loading a filter takes CAP_SYS_ADMIN, which goes next.
        if !no_new_privileges {
            self.load_seccomp()?;
        }
        process::become_user(process)?;
        rustix::process::umask(Mode::from_raw_mode(process.user().umask().unwrap_or(0o022)));
        if no_new_privileges {
            syscall::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).during(|| "set no_new_privs".into())?;
            self.load_seccomp()?;
        }
        let error = syscall::exec(&program, &arguments, &environment);
        Err(process::exec_error(&program, &error))
    }

    fn wait_at_gate(&mut self) -> Result<()> {
        match &self.gate {
            Gate::Open => return Ok(()),
            Gate::Channel => self.channel.write(b'R', &[])?,
            Gate::Listener(listener) => {
                self.channel.write(b'R', &[])?;
                let connection = loop {
                    match rustix::net::accept_with(listener, rustix::net::SocketFlags::CLOEXEC) {
                        Ok(connection) => break connection,
                        Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                        Err(errno) => return Err(errno).during(|| "wait for the start".into()),
                    }
                };
                self.channel = Channel::from_owned(connection);
            }
        }
        match self.channel.read_tag() {
            Some(b's') => {
                self.gate = Gate::Open;
                Ok(())
            }
            // Whoever made the container has gone: nobody will start it any more.
            _ => syscall::exit_now(1),
        }
    }

    fn join_keyring(&self) -> Result<()> {
        let name = std::ffi::CString::new(format!("_ses.{}", self.id))
            .map_err(|_| Error::invalid("the container's id holds a NUL byte"))?;
        match syscall::join_session_keyring(&name) {
            Ok(keyring) => {
                let _ = syscall::allow_keyring_search(keyring);
                Ok(())
            }
            // A kernel without keys, or a quota used up by others: as runc, go on with the old one.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOSYS | libc::EDQUOT | libc::EPERM)
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error).during(|| "make a session keyring".into()),
        }
    }

    fn load_seccomp(&self) -> Result<()> {
        let Some(program) = self.seccomp else {
            return Ok(());
        };
        let listener = program.load().during(|| "load the seccomp filter".into())?;
        if let Some(listener) = listener {
            self.channel
                .write(b'N', &listener.as_raw_fd().to_le_bytes())?;
            if self.channel.read_tag() != Some(b'n') {
                return Err(Error::invalid("the seccomp listener was not taken"));
            }
        }
        Ok(())
    }
}
