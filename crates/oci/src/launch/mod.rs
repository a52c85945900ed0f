//! Making and joining containers, seen from the runtime's side.

mod clone;
mod exec;
mod talk;

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxIntelRdt, LinuxNetDevice, Spec};

pub use exec::{Exec, exec};
pub(crate) use talk::start_at;

use self::clone::clone;
use self::talk::{Talk, follow};

use crate::bundle;
use crate::cgroup::{Cgroup, CgroupTarget, Hierarchies};
use crate::channel::Channel;
use crate::error::{Context, Error, Result};
use crate::init::{self, Init};
use crate::mount::{self, Options};
use crate::namespace::{self, Namespaces};
use crate::netdevice;
use crate::process;
use crate::rootfs::Rootfs;
use crate::seccomp;
use crate::syscall::Child;
use crate::terminal::Size;

/// What the process has for stdin, stdout and stderr.
#[derive(Debug, Default)]
pub enum Stdio {
    /// The caller's own.
    #[default]
    Inherit,
    Fds([OwnedFd; 3]),
    /// A new terminal of the container; its master comes back to the caller.
    Terminal {
        size: Option<Size>,
    },
}

/// What init waits for before it executes the program.
#[derive(Debug, Default)]
pub enum Gate {
    /// [`Created::start`], in this process.
    #[default]
    Channel,
    /// A connection to this listening socket, from whichever process starts the container.
    Listener(OwnedFd),
    /// Nothing: [`create`] returns when the program runs.
    Open,
}

/// What is told the pid and the cgroup of a new init.
pub type OnClone<'a> = dyn FnMut(i32, Option<&Cgroup>) -> Result<()> + 'a;

/// A container to be made. The caller must be single-threaded.
pub struct Launch<'a> {
    pub id: &'a str,
    pub bundle: &'a Path,
    pub spec: &'a Spec,
    pub rootfs: Rootfs,
    pub cgroup: CgroupTarget,
    pub stdio: Stdio,
    /// Joined instead of what the specification says about the network.
    pub net_ns: Option<OwnedFd>,
    pub gate: Gate,
    /// Descriptors 3, 4, … of the caller that the program keeps.
    pub preserve_fds: u32,
    /// How many of these are sockets announced as LISTEN_FDS.
    pub listen_fds: u32,
    pub no_pivot: bool,
    pub no_new_keyring: bool,
    /// Cgroups that cannot be made are done without, where no limit needs them.
    pub rootless: bool,
    /// Called with the pid while init sets itself up; its error ends the container.
    pub on_clone: Option<&'a mut OnClone<'a>>,
}

impl<'a> Launch<'a> {
    /// A launch of the bundle as its configuration says.
    ///
    /// # Errors
    /// [`Error::Invalid`] where `root` is missing or the cgroup path is not one.
    pub fn new(id: &'a str, bundle: &'a Path, spec: &'a Spec) -> Result<Launch<'a>> {
        Ok(Launch {
            id,
            bundle,
            spec,
            rootfs: Rootfs::Dir(bundle::root(spec, bundle)?),
            cgroup: CgroupTarget::of(spec, id, false)?,
            stdio: Stdio::Inherit,
            net_ns: None,
            gate: Gate::Channel,
            preserve_fds: 0,
            listen_fds: 0,
            no_pivot: false,
            no_new_keyring: false,
            rootless: !rustix::process::geteuid().is_root(),
            on_clone: None,
        })
    }

    /// The network devices to be moved into the container.
    fn net_devices(&self) -> Option<&'a HashMap<String, LinuxNetDevice>> {
        let linux = self.spec.linux().as_ref()?;
        linux.net_devices().as_ref().filter(|map| !map.is_empty())
    }

    fn intel_rdt(&self) -> Option<&'a LinuxIntelRdt> {
        self.spec.linux().as_ref()?.intel_rdt().as_ref()
    }

    /// Whether init waits until the runtime has seen to what only it can do from outside.
    pub(crate) fn holds_init(&self, has_user: bool) -> bool {
        has_user
            || matches!(self.cgroup, CgroupTarget::Systemd { .. })
            || self.net_devices().is_some()
            || self.intel_rdt().is_some()
    }
}

/// A running process of a container. Dropping it does not end the process.
#[derive(Debug)]
pub struct Running {
    pub pid: i32,
    pub pidfd: OwnedFd,
    /// The terminal's master, if one was asked for.
    pub terminal: Option<OwnedFd>,
    pub cgroup: Option<Cgroup>,
}

impl Running {
    /// Waits for the end of the process and reaps it.
    ///
    /// # Errors
    /// As [`process::wait`].
    pub fn wait(&self) -> Result<process::Exit> {
        process::wait(self.pidfd.as_fd()).during(|| format!("wait for process {}", self.pid))
    }
}

/// A container whose init waits at its gate. Dropping it without a start ends the container where the gate is the
/// channel.
#[derive(Debug)]
pub struct Created {
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub terminal: Option<OwnedFd>,
    pub cgroup: Option<Cgroup>,
    channel: Channel,
}

impl Created {
    /// Lets init execute the program. Errors of execve come back here; the process has then ended and been reaped.
    ///
    /// # Errors
    /// [`Error::Init`] with the shell's status for a program that is missing (127) or cannot be executed (126).
    pub fn start(self) -> Result<Running> {
        let Created {
            pid,
            pidfd,
            terminal,
            cgroup,
            channel,
        } = self;
        let started = channel.send(b's', &[], &[]).and_then(|()| {
            follow(
                &channel,
                &Talk {
                    pid,
                    pidfd: Some(pidfd.as_fd()),
                    ..Talk::default()
                },
                &mut None,
            )
            .map(drop)
        });
        if let Err(error) = started {
            let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
            let _ = process::wait(pidfd.as_fd());
            return Err(error);
        }
        Ok(Running {
            pid,
            pidfd,
            terminal,
            cgroup,
        })
    }

    /// The same process, not to be started through this handle (its gate is a listener, or it was open).
    pub fn into_running(self) -> Running {
        Running {
            pid: self.pid,
            pidfd: self.pidfd,
            terminal: self.terminal,
            cgroup: self.cgroup,
        }
    }
}

/// Ends what was begun when a step fails: kills and reaps init, removes the cgroup.
struct Unfinished {
    pidfd: Option<OwnedFd>,
    cgroup: Option<Cgroup>,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(pidfd) = &self.pidfd {
            let _ = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
            let _ = process::wait(pidfd.as_fd());
        }
        if let Some(cgroup) = &self.cgroup {
            let _ = cgroup.kill();
            let _ = cgroup.remove();
        }
    }
}

/// Makes a container. When this returns, init waits at its gate (or, with [`Gate::Open`], the program runs).
///
/// # Errors
/// Whatever the configuration, the host or init's set-up gave; nothing is left behind then.
pub fn create(mut launch: Launch<'_>) -> Result<Created> {
    bundle::validate(launch.spec)?;
    let spec = launch.spec;
    let (Some(process), Some(linux)) = (spec.process().as_ref(), spec.linux().as_ref()) else {
        return Err(Error::invalid("config.json: process is missing"));
    };
    let namespaces = Namespaces::of(spec, launch.net_ns.take())?;
    let seccomp = linux
        .seccomp()
        .as_ref()
        .map(seccomp::compiled)
        .transpose()?;
    let new_user = namespaces.is_new(libc::CLONE_NEWUSER);
    let has_user = namespaces.has(libc::CLONE_NEWUSER);
    let hierarchies = match launch.cgroup {
        CgroupTarget::None => None,
        _ => Some(Hierarchies::of_host()?),
    };
    let mut unfinished = Unfinished {
        pidfd: None,
        cgroup: begin_cgroup(&launch, hierarchies.as_ref())?,
    };
    let tasks = match &unfinished.cgroup {
        Some(cgroup) => cgroup.task_files()?,
        None => Vec::new(),
    };
    let birthplace = match &unfinished.cgroup {
        Some(cgroup) => cgroup.birthplace()?,
        None => None,
    };
    let privileged = rustix::process::geteuid().is_root();
    let prepared = prepare_mounts(&launch, &namespaces, new_user && privileged)?;
    let root = if new_user && privileged {
        Some(launch.rootfs.detached()?)
    } else {
        None
    };

    // Kept beyond the clone, with which the list of namespaces goes.
    let network = match (
        launch.net_devices(),
        namespaces.joined_fd(libc::CLONE_NEWNET),
    ) {
        (Some(_), Some(fd)) => Some(fd.try_clone_to_owned().during(|| "dup".into())?),
        _ => None,
    };
    let (ours, theirs) = Channel::pair()?;
    let staged = namespaces.joins(libc::CLONE_NEWUSER)
        || (namespaces.joins(libc::CLONE_NEWPID) && !privileged);
    let child = clone(
        namespaces.new as u64,
        &namespaces,
        staged,
        birthplace.as_ref().map(AsFd::as_fd),
    )?;
    let Some(Child { pid, pidfd }) = child else {
        drop(ours);
        // The child must not undo what its parent made.
        let cgroup = unfinished.cgroup.take();
        std::mem::forget(unfinished);
        init::run(Init {
            launch,
            process,
            linux,
            namespaces,
            staged,
            seccomp: seccomp.as_deref(),
            channel: theirs,
            tasks,
            prepared,
            root,
            cgroup,
            hierarchies,
        });
    };
    drop((theirs, prepared, root, tasks));
    unfinished.pidfd = Some(pidfd);
    let Some(pidfd) = unfinished.pidfd.as_ref() else {
        return Err(Error::invalid("no pidfd"));
    };

    // In a user namespace, init could not.
    if let Some(adjustment) = process.oom_score_adj().filter(|_| has_user) {
        set_oom_score(&pid.to_string(), adjustment, true)?;
    }
    if new_user {
        namespace::write_mappings(pid, &namespaces.uid_map, &namespaces.gid_map)?;
        process::set_limits(pid, process.rlimits().as_deref().unwrap_or_default())?;
    }
    if let (
        CgroupTarget::Systemd {
            slice,
            prefix,
            name,
        },
        Some(hierarchies),
    ) = (&launch.cgroup, &hierarchies)
    {
        let limits = linux.resources().as_ref();
        let cgroup = Cgroup::systemd_scope(slice, prefix, name, pid, limits, hierarchies)?;
        unfinished.cgroup = Some(cgroup);
    }
    if let Some(config) = launch.intel_rdt() {
        unfinished
            .cgroup
            .get_or_insert_default()
            .join_resctrl(config, launch.id, pid)?;
    }
    if let Some(devices) = launch.net_devices() {
        match &network {
            Some(joined) => netdevice::move_all(devices, joined.as_fd())?,
            None => netdevice::move_all(devices, network_of(pid)?.as_fd())?,
        }
    }
    if launch.holds_init(has_user) {
        ours.send(b'm', &[], &[])?;
    }
    if let Some(notify) = &mut launch.on_clone {
        notify(pid, unfinished.cgroup.as_ref())?;
    }
    let mut terminal = None;
    let listener = seccomp
        .as_ref()
        .and_then(|program| program.listener.as_ref());
    let talk = Talk {
        pid,
        pidfd: Some(pidfd.as_fd()),
        launch: Some((spec, launch.id, launch.bundle)),
        listener: listener.map(|(path, metadata)| (path.as_path(), metadata.as_str())),
    };
    follow(&ours, &talk, &mut terminal)?;
    let cgroup = unfinished.cgroup.take();
    let pidfd = unfinished
        .pidfd
        .take()
        .ok_or_else(|| Error::invalid("no pidfd"))?;
    Ok(Created {
        pid,
        pidfd,
        terminal,
        cgroup,
        channel: ours,
    })
}

fn begin_cgroup(launch: &Launch<'_>, hierarchies: Option<&Hierarchies>) -> Result<Option<Cgroup>> {
    let limits = launch
        .spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let (CgroupTarget::Path(path), Some(hierarchies)) = (&launch.cgroup, hierarchies) else {
        return Ok(None);
    };
    // A container that may write to its cgroup file system manages cgroups itself (systemd does).
    let full = launch.spec.mounts().iter().flatten().any(|mount| {
        mount.typ().as_deref() == Some("cgroup")
            && !mount
                .options()
                .iter()
                .flatten()
                .any(|option| option == "ro" || option == "rro")
    });
    // Before anything is put under the guard, which kills what is in it.
    Cgroup::refuse_used(path, hierarchies)?;
    let mut guard = Unfinished {
        pidfd: None,
        cgroup: None,
    };
    let made = Cgroup::begin(path, hierarchies).and_then(|cgroup| {
        let cgroup = guard.cgroup.insert(cgroup);
        cgroup.complete(hierarchies, limits, full)
    });
    match made {
        Ok(()) => Ok(guard.cgroup.take()),
        Err(error)
            if launch.rootless
                && matches!(error.errno(), libc::EACCES | libc::EPERM | libc::EROFS) =>
        {
            let needs = limits
                .is_some_and(|l| l.memory().is_some() || l.pids().is_some() || l.cpu().is_some());
            if needs { Err(error) } else { Ok(None) }
        }
        Err(error) => Err(error),
    }
}

/// Opens, as the host's root, the sources of binds that the root of a new user namespace might not reach, and those
/// whose ids are mapped, which takes privilege over their file systems.
fn prepare_mounts(
    launch: &Launch<'_>,
    namespaces: &Namespaces,
    binds: bool,
) -> Result<Vec<Option<OwnedFd>>> {
    let mounts = launch.spec.mounts().as_deref().unwrap_or_default();
    let mut prepared = Vec::with_capacity(mounts.len());
    for mount in mounts {
        let options: Options = mount::parse_options(mount)?;
        if !options.bind || (!binds && options.idmap.is_none()) {
            prepared.push(None);
            continue;
        }
        let mapping = match options.idmap {
            Some(_) => {
                let (uid_map, gid_map) =
                    mount::idmap_ranges(mount, (&namespaces.uid_map, &namespaces.gid_map))?;
                Some(namespace::mapping_namespace(&uid_map, &gid_map)?)
            }
            None => None,
        };
        let source = mount::bind_source(mount, launch.bundle)?;
        prepared.push(Some(mount::detached_bind(
            &source,
            &options,
            mapping.as_ref().map(AsFd::as_fd),
        )?));
    }
    Ok(prepared)
}

fn network_of(pid: i32) -> Result<OwnedFd> {
    rustix::fs::open(
        format!("/proc/{pid}/ns/net"),
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .during(|| "open the container's network namespace".into())
}

/// Sets it for `/proc/PROCESS`.
pub(crate) fn set_oom_score(process: &str, adjustment: i32, tolerant: bool) -> Result<()> {
    let path = format!("/proc/{process}/oom_score_adj");
    match std::fs::write(&path, adjustment.to_string()) {
        Ok(()) => Ok(()),
        Err(error) if tolerant && matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM)) => Ok(()),
        Err(error) => Err(error).during(|| {
            format!("set process.oomScoreAdj to {adjustment} (lowering it needs CAP_SYS_RESOURCE in the initial user namespace)")
        }),
    }
}
