//! The container's first process, from clone3(2) to execve(2).

mod cgroups;
mod filesystem;
mod finish;
mod join;

use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{Linux, Process};
use rustix::fs::{Mode, OFlags};

pub(crate) use finish::Finish;
pub(crate) use join::{Join, join};

use crate::cgroup::{self, Cgroup, Hierarchies};
use crate::channel::Channel;
use crate::error::{Context, Error, Result};
use crate::hook::{self, HookState};
use crate::launch::{Launch, Stdio, set_oom_score};
use crate::namespace::{self, CLONE_NEWTIME, Namespaces};
use crate::process::{self, Label};
use crate::rootfs::Root;
use crate::scheduling;
use crate::seccomp::Program;
use crate::syscall::{self, resolve};
use crate::terminal::{self, Size};

/// All init needs, copied with the runtime's memory.
pub(crate) struct Init<'a, 'l> {
    pub launch: Launch<'l>,
    pub process: &'a Process,
    pub linux: &'a Linux,
    pub namespaces: Namespaces,
    /// The user and pid namespaces have been joined on the way here.
    pub staged: bool,
    pub seccomp: Option<&'a Program>,
    pub channel: Channel,
    pub tasks: Vec<OwnedFd>,
    /// Mounts opened by the runtime, by their place in the specification's list.
    pub prepared: Vec<Option<OwnedFd>>,
    /// The root's mount, where the runtime had to make it.
    pub root: Option<OwnedFd>,
    pub cgroup: Option<Cgroup>,
    pub hierarchies: Option<Hierarchies>,
}

/// Does everything, and ends the process if something fails.
pub(crate) fn run(mut init: Init<'_, '_>) -> ! {
    // The channel moves on to `Finish`: errors before that go over it from here.
    match init.set_up() {
        Ok(label) => {
            let stdio = std::mem::take(&mut init.launch.stdio);
            drop(stdio);
            let spec = init.launch.spec;
            let finish = Finish {
                id: init.launch.id,
                process: init.process,
                seccomp: init.seccomp,
                channel: init.channel,
                gate: init.launch.gate,
                preserve_fds: init.launch.preserve_fds,
                listen_fds: init.launch.listen_fds,
                no_new_keyring: init.launch.no_new_keyring,
                make_directory: true,
                set_limits: !init.namespaces.is_new(libc::CLONE_NEWUSER),
                start_hooks: spec.hooks().as_ref().and_then(|hooks| {
                    let hooks = hooks.start_container().as_deref()?;
                    Some((
                        hooks,
                        HookState::new(spec, init.launch.id, init.launch.bundle, "created", None),
                    ))
                }),
                label,
            };
            finish.run()
        }
        Err(error) => {
            init.channel.send_error(&error);
            syscall::exit_now(1);
        }
    }
}

impl Init<'_, '_> {
    fn set_up(&mut self) -> Result<Option<Label>> {
        syscall::reset_known_signals();
        let new_user = self.namespaces.is_new(libc::CLONE_NEWUSER);
        let has_user = self.namespaces.has(libc::CLONE_NEWUSER);
        if self.launch.holds_init(has_user) {
            self.channel.expect(b'm')?;
        }
        cgroup::join(&self.tasks)?;
        self.tasks.clear();
        if let Some(adjustment) = self.process.oom_score_adj().filter(|_| !has_user) {
            set_oom_score("self", adjustment, self.launch.rootless)?;
        }
        if has_user {
            // Refused where setgroups(2) is denied: then there are no groups to lose either.
            let _ = syscall::set_groups(&[]);
            if namespace::outside(&self.namespaces.uid_map, 0).is_some() || !new_user {
                syscall::set_ids(0, 0).during(|| "become root of the user namespace".into())?;
            }
        }
        // Other processes of the container must not look into this one, which still is the runtime.
        syscall::prctl(libc::PR_SET_DUMPABLE, 0, 0).during(|| "prctl".into())?;
        self.join_namespaces()?;
        let _ = rustix::process::setsid();
        if let Some(policy) = self.linux.memory_policy() {
            scheduling::set_memory_policy(policy)?;
        }
        if let Some(personality) = self.linux.personality() {
            scheduling::set_personality(personality)?;
        }
        self.offset_time()?;
        let spec = self.launch.spec;
        let named = |name: &'static str| move || format!("set the {name}");
        syscall::set_names(
            spec.hostname().as_deref().filter(|name| !name.is_empty()),
            None,
        )
        .during(named("hostname"))?;
        syscall::set_names(
            None,
            spec.domainname().as_deref().filter(|name| !name.is_empty()),
        )
        .during(named("domainname"))?;
        self.set_sysctls()?;
        let label = process::open_label(self.process)?;
        rustix::process::umask(Mode::empty());
        if self.namespaces.new_cgroup {
            syscall::unshare(libc::CLONE_NEWCGROUP).during(|| "make a cgroup namespace".into())?;
        }
        if self.namespaces.is_new(libc::CLONE_NEWNS) {
            self.enter_root()?;
        } else {
            self.run_create_hooks()?;
        }
        self.take_stdio()?;
        Ok(label)
    }

    fn join_namespaces(&mut self) -> Result<()> {
        for (flag, fd) in &self.namespaces.joined {
            // The runtime has seen to the pid namespace, and a stage to both.
            if *flag == libc::CLONE_NEWPID || (*flag == libc::CLONE_NEWUSER && self.staged) {
                continue;
            }
            syscall::setns(fd.as_fd(), *flag).during(|| {
                let name = namespace::ALL
                    .iter()
                    .find(|known| known.0 == *flag)
                    .map_or("", |known| known.1);
                format!("join the {name} namespace")
            })?;
        }
        self.namespaces.joined.clear();
        Ok(())
    }

    fn offset_time(&self) -> Result<()> {
        if !self.namespaces.new_time {
            return Ok(());
        }
        syscall::unshare(CLONE_NEWTIME).during(|| "make a time namespace".into())?;
        let mut text = String::new();
        for (clock, offset) in self.linux.time_offsets().iter().flatten() {
            if clock != "monotonic" && clock != "boottime" {
                return Err(Error::invalid(format!(
                    "config.json: linux.timeOffsets: {clock:?} is neither monotonic nor boottime"
                )));
            }
            text.push_str(&format!(
                "{clock} {} {}\n",
                offset.secs().unwrap_or(0),
                offset.nanosecs().unwrap_or(0)
            ));
        }
        if !text.is_empty() {
            write_file(Path::new("/proc/self/timens_offsets"), &text)?;
        }
        let own = rustix::fs::open(
            "/proc/self/ns/time_for_children",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .during(|| "open the new time namespace".into())?;
        syscall::setns(own.as_fd(), CLONE_NEWTIME).during(|| "enter the new time namespace".into())
    }

    /// Written through the host's /proc, which no container can have tampered with; the kernel goes by the
    /// namespaces of the writer.
    fn set_sysctls(&self) -> Result<()> {
        let Some(sysctls) = self.linux.sysctl().as_ref().filter(|map| !map.is_empty()) else {
            return Ok(());
        };
        let root = rustix::fs::open(
            "/proc/sys",
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .during(|| "open /proc/sys".into())?;
        let mut entries: Vec<_> = sysctls.iter().collect();
        entries.sort_unstable();
        for (name, value) in entries {
            // A name with slashes has dots of its own (an interface's).
            let path = if name.contains('/') {
                name.clone()
            } else {
                name.replace('.', "/")
            };
            let how = resolve::BENEATH | resolve::NO_SYMLINKS | resolve::NO_XDEV;
            syscall::openat2(root.as_fd(), Path::new(&path), libc::O_WRONLY, 0, how)
                .and_then(|fd| fs::File::from(fd).write_all(value.as_bytes()))
                .during(|| format!("set the kernel parameter {name} to {value:?}"))?;
        }
        Ok(())
    }

    fn open_terminal(&mut self, root: &Root, size: Option<Size>) -> Result<()> {
        let given = self.process.console_size().map(|size| Size {
            columns: size.width().min(u16::MAX.into()) as u16,
            rows: size.height().min(u16::MAX.into()) as u16,
        });
        let pty = terminal::open(
            root.mount.as_fd(),
            size.or(given),
            self.process.user().uid(),
        )?;
        terminal::bind_console(root.mount.as_fd(), pty.slave.as_fd())?;
        self.channel.send(b'T', &[], &[pty.master.as_fd()])?;
        terminal::take(pty.slave.as_fd())
    }

    /// The hooks between the set-up and the switch of the root: the runtime's, then the container's own.
    fn run_create_hooks(&self) -> Result<()> {
        // All nodes are made, with their own modes; what hooks make and the working directory have the usual one.
        rustix::process::umask(Mode::from_raw_mode(0o022));
        let Some(hooks) = self.launch.spec.hooks() else {
            return Ok(());
        };
        #[allow(deprecated)]
        let in_runtime = hooks.prestart().is_some() || hooks.create_runtime().is_some();
        let in_container = hooks.create_container().as_deref().unwrap_or_default();
        if !in_runtime && in_container.is_empty() {
            return Ok(());
        }
        self.channel.send(b'H', &[], &[])?;
        let reply = self.channel.expect(b'h')?;
        let pid = <[u8; 4]>::try_from(&reply.body[..])
            .map(i32::from_le_bytes)
            .ok();
        let state = HookState::new(
            self.launch.spec,
            self.launch.id,
            self.launch.bundle,
            "creating",
            pid,
        );
        hook::run_all("createContainer", Some(in_container), &state)
    }

    fn take_stdio(&mut self) -> Result<()> {
        if let Stdio::Fds(fds) = &self.launch.stdio {
            take_fds(fds)?;
        }
        Ok(())
    }
}

fn take_fds(fds: &[OwnedFd; 3]) -> Result<()> {
    for (number, fd) in fds.iter().enumerate() {
        debug_assert!(fd.as_raw_fd() > 2);
        // SAFETY: the three standard descriptors are owned by nobody in a Rust process.
        unsafe { syscall::dup_onto(fd.as_fd(), number as i32) }
            .during(|| "give its descriptors to the process".into())?;
    }
    Ok(())
}

fn write_file(path: &Path, text: &str) -> Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .during(|| format!("write {}", path.display()))
}
