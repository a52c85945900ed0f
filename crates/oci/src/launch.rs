//! Making and joining containers, seen from the runtime's side.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use oci_spec::runtime::{LinuxSeccomp, Process, Spec};

use crate::bundle;
use crate::cgroup::{self, Cgroup, CgroupTarget, Hierarchies};
use crate::channel::{Channel, Message};
use crate::error::{Context, Error, Result};
use crate::hook::{self, HookState};
use crate::init::{self, Finish, Init};
use crate::mount::{self, Options};
use crate::namespace::{self, Namespaces};
use crate::process;
use crate::rootfs::Rootfs;
use crate::seccomp::{self, Program};
use crate::syscall::{self, Child};
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

/// What the runtime needs to answer init.
#[derive(Default)]
struct Talk<'a> {
    pid: i32,
    pidfd: Option<BorrowedFd<'a>>,
    launch: Option<(&'a Spec, &'a str, &'a Path)>,
    listener: Option<(&'a Path, &'a str)>,
}

/// Where init is when [`follow`] returns.
#[derive(Debug, PartialEq, Eq)]
enum Reached {
    Gate,
    Program,
}

/// Follows init until it waits at its gate or executes the program.
fn follow(channel: &Channel, talk: &Talk<'_>, terminal: &mut Option<OwnedFd>) -> Result<Reached> {
    let mut executing = false;
    loop {
        let Some(Message { tag, body, mut fds }) = channel.receive()? else {
            if executing {
                return Ok(Reached::Program);
            }
            return Err(Error::Init {
                message:
                    "the container's first process ended during its set-up (killed? out of memory?)"
                        .into(),
                kind: base::Kind::Internal,
                errno: 0,
                status: 1,
            });
        };
        match tag {
            b'T' => *terminal = fds.pop(),
            b'H' => {
                if let Some((spec, id, bundle)) = talk.launch {
                    let state = HookState::new(spec, id, bundle, "creating", Some(talk.pid));
                    if let Some(hooks) = spec.hooks() {
                        #[allow(deprecated)]
                        hook::run_all("prestart", hooks.prestart().as_deref(), &state)?;
                        hook::run_all("createRuntime", hooks.create_runtime().as_deref(), &state)?;
                    }
                }
                channel.send(b'h', &talk.pid.to_le_bytes(), &[])?;
            }
            b'R' => return Ok(Reached::Gate),
            b'X' => executing = true,
            b'N' => {
                hand_over_listener(talk, &body)?;
                channel.send(b'n', &[], &[])?;
            }
            b'E' => return Err(crate::channel::decode_error(&body)),
            other => {
                return Err(Error::invalid(format!(
                    "init sent an unknown message {:?}",
                    other as char
                )));
            }
        }
    }
}

/// Fetches the seccomp listener out of init and passes it to the agent at `listenerPath`, with the state the
/// specification defines ("The Container Process State").
fn hand_over_listener(talk: &Talk<'_>, body: &[u8]) -> Result<()> {
    let (Some(pidfd), Some((path, metadata)), Ok(number)) =
        (talk.pidfd, talk.listener, <[u8; 4]>::try_from(body))
    else {
        return Err(Error::invalid(
            "init announced a seccomp listener that nobody asked for",
        ));
    };
    let fd = rustix::process::pidfd_getfd(
        pidfd,
        i32::from_le_bytes(number),
        rustix::process::PidfdGetfdFlags::empty(),
    )
    .during(|| "fetch the seccomp listener".into())?;
    let state = talk
        .launch
        .map(|(spec, id, bundle)| HookState::new(spec, id, bundle, "creating", Some(talk.pid)));
    let text = serde_json::json!({
        "ociVersion": crate::OCI_VERSION,
        "fds": ["seccompFd"],
        "pid": talk.pid,
        "metadata": metadata,
        "state": state,
    });
    use std::mem::MaybeUninit;
    let socket = std::os::unix::net::UnixStream::connect(path)
        .during(|| format!("connect to the seccomp agent at {}", path.display()))?;
    let bytes = text.to_string();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = rustix::net::SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(&fds));
    rustix::net::sendmsg(
        &socket,
        &[std::io::IoSlice::new(bytes.as_bytes())],
        &mut ancillary,
        rustix::net::SendFlags::NOSIGNAL,
    )
    .during(|| format!("hand the seccomp listener to {}", path.display()))
    .map(drop)
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

    // Written from outside: in a user namespace, init could not.
    if let Some(adjustment) = process.oom_score_adj() {
        set_oom_score(pid, adjustment, new_user || launch.rootless)?;
    }
    if new_user {
        namespace::write_mappings(pid, &namespaces.uid_map, &namespaces.gid_map)?;
        process::set_limits(pid, process.rlimits().as_deref().unwrap_or_default())?;
    }
    if let CgroupTarget::Systemd {
        slice,
        prefix,
        name,
    } = &launch.cgroup
    {
        let mut cgroup = Cgroup::systemd_scope(slice, prefix, name, pid)?;
        if let Some(limits) = linux.resources() {
            cgroup.apply(limits)?;
        }
        unfinished.cgroup = Some(cgroup);
    }
    if new_user || matches!(launch.cgroup, CgroupTarget::Systemd { .. }) {
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

/// Clones init with its new namespaces. `None` in init.
fn clone(
    flags: u64,
    namespaces: &Namespaces,
    staged: bool,
    birthplace: Option<BorrowedFd<'_>>,
) -> Result<Option<Child>> {
    if staged {
        return clone_staged(flags, &namespaces.joined, birthplace);
    }
    let own = match namespaces.joined_fd(libc::CLONE_NEWPID) {
        Some(pid_namespace) => Some(enter_pid_namespace(pid_namespace)?),
        None => None,
    };
    // SAFETY: callers of the runtime are single-threaded (see the crate's documentation).
    let child = unsafe { syscall::clone3(flags, birthplace) };
    if let (Some(own), Ok(Some(_)) | Err(_)) = (own, &child) {
        leave_pid_namespace(&own)?;
    }
    child.during(|| explain_clone(flags))
}

fn explain_clone(flags: u64) -> String {
    if flags & libc::CLONE_NEWUSER as u64 != 0 {
        "clone3 with a new user namespace (is /proc/sys/user/max_user_namespaces above 0?)".into()
    } else {
        "clone3 with the container's namespaces (are you root, or is a user namespace asked for?)"
            .into()
    }
}

/// Children of this process are born in that pid namespace until [`leave_pid_namespace`]. The runtime hides its
/// memory and descriptors meanwhile: the container can see its children from their first moment on.
fn enter_pid_namespace(namespace: BorrowedFd<'_>) -> Result<OwnedFd> {
    let own = rustix::fs::open(
        "/proc/self/ns/pid",
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .during(|| "open the own pid namespace".into())?;
    syscall::prctl(libc::PR_SET_DUMPABLE, 0, 0).during(|| "prctl".into())?;
    syscall::setns(namespace, libc::CLONE_NEWPID)
        .during(|| "join the container's pid namespace".into())?;
    Ok(own)
}

fn leave_pid_namespace(own: &OwnedFd) -> Result<()> {
    syscall::setns(own.as_fd(), libc::CLONE_NEWPID)
        .during(|| "return to the own pid namespace".into())
}

/// As [`clone`], by way of a process that joins the user namespace first, so that the new namespaces belong to it.
/// Init becomes a child of this process all the same (CLONE_PARENT), and its pidfd lands in the descriptor table
/// that the process in between shares with this one (CLONE_FILES).
fn clone_staged(
    flags: u64,
    joined: &[(i32, OwnedFd)],
    birthplace: Option<BorrowedFd<'_>>,
) -> Result<Option<Child>> {
    let (ours, theirs) = Channel::pair()?;
    syscall::prctl(libc::PR_SET_DUMPABLE, 0, 0).during(|| "prctl".into())?;
    // SAFETY: callers of the runtime are single-threaded (see the crate's documentation).
    let stage = unsafe { syscall::clone3(libc::CLONE_FILES as u64, birthplace) }
        .during(|| "clone3 of the process that joins the user namespace".into())?;
    let Some(stage) = stage else {
        let joined = joined
            .iter()
            .filter(|(flag, _)| *flag == libc::CLONE_NEWUSER || *flag == libc::CLONE_NEWPID);
        for (flag, fd) in joined {
            if let Err(error) = syscall::setns(fd.as_fd(), *flag)
                .during(|| "join a namespace of another container".into())
            {
                theirs.send_error(&error);
                syscall::exit_now(1);
            }
        }
        // SAFETY: this process has one thread, as its parent had.
        match unsafe { syscall::clone3(flags | libc::CLONE_PARENT as u64, None) }
            .during(|| explain_clone(flags))
        {
            Ok(None) => return Ok(None),
            Ok(Some(child)) => {
                let _ = theirs.send(b'P', &child.pidfd.as_raw_fd().to_le_bytes(), &[]);
                syscall::exit_now(0);
            }
            Err(error) => {
                theirs.send_error(&error);
                syscall::exit_now(1);
            }
        }
    };
    let _ = process::wait(stage.pidfd.as_fd());
    drop(theirs);
    let message = ours.expect(b'P')?;
    let number =
        <[u8; 4]>::try_from(&message.body[..]).map_err(|_| Error::invalid("no pidfd came back"))?;
    // SAFETY: the process in between stored this new descriptor in the table it shared, and has ended.
    let pidfd = unsafe { OwnedFd::from_raw_fd(i32::from_le_bytes(number)) };
    let information = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))
        .during(|| "read the pid of the new process".into())?;
    let pid = information
        .lines()
        .find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
    let pid = pid
        .filter(|pid| *pid > 0)
        .ok_or_else(|| Error::invalid("the new process ended at once"))?;
    Ok(Some(Child { pid, pidfd }))
}

fn set_oom_score(pid: i32, adjustment: i32, tolerant: bool) -> Result<()> {
    let path = format!("/proc/{pid}/oom_score_adj");
    match std::fs::write(&path, adjustment.to_string()) {
        Ok(()) => Ok(()),
        Err(error) if tolerant && matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM)) => Ok(()),
        Err(error) => Err(error).during(|| {
            format!("set process.oomScoreAdj to {adjustment} (lowering it needs CAP_SYS_RESOURCE in the initial user namespace)")
        }),
    }
}

/// A further process in a running container. The caller must be single-threaded.
pub struct Exec<'a> {
    /// The container's id, for messages and keyrings.
    pub id: &'a str,
    /// The pid of the container's init, whose namespaces are joined.
    pub pid: i32,
    pub cgroup: Option<&'a Cgroup>,
    pub process: &'a Process,
    pub seccomp: Option<&'a LinuxSeccomp>,
    pub stdio: Stdio,
    pub preserve_fds: u32,
    pub listen_fds: u32,
    pub no_new_keyring: bool,
    pub rootless: bool,
    /// A cgroup below the container's, by its path there.
    pub sub_cgroup: Option<PathBuf>,
}

/// Runs a process in a container. When this returns, its program runs.
///
/// # Errors
/// As [`Created::start`]; a process begun is ended and reaped.
pub fn exec(request: Exec<'_>) -> Result<Running> {
    bundle::validate_process(request.process)?;
    let seccomp: Option<Rc<Program>> = request.seccomp.map(seccomp::compiled).transpose()?;
    let target = base::pidfd::PidFd::open(request.pid)
        .during(|| format!("open the container's process {}", request.pid))?;
    let flags = namespace::differing(request.pid)?;
    let mut cgroup = request.cgroup.cloned();
    if let (Some(cgroup), Some(below)) = (&mut cgroup, &request.sub_cgroup) {
        descend(cgroup, below)?;
    }
    let tasks = match &cgroup {
        Some(cgroup) => cgroup.task_files()?,
        None => Vec::new(),
    };
    let birthplace = match &cgroup {
        Some(cgroup) => cgroup.birthplace()?,
        None => None,
    };
    let privileged = rustix::process::geteuid().is_root();
    let (ours, theirs) = Channel::pair()?;
    let child = exec_clone(
        &request,
        flags,
        &target,
        birthplace.as_ref().map(AsFd::as_fd),
        privileged,
    )?;
    let Some(Child { pid, pidfd }) = child else {
        drop(ours);
        init::join(init::Join {
            target: target.as_fd(),
            flags,
            tasks,
            terminal: match request.stdio {
                Stdio::Terminal { size } => Some(size),
                _ => None,
            },
            stdio: match request.stdio {
                Stdio::Fds(fds) => Some(fds),
                _ => None,
            },
            finish: Finish {
                id: request.id,
                process: request.process,
                seccomp: seccomp.as_deref(),
                channel: theirs,
                gate: Gate::Open,
                preserve_fds: request.preserve_fds,
                listen_fds: request.listen_fds,
                no_new_keyring: request.no_new_keyring,
                set_limits: flags & libc::CLONE_NEWUSER == 0,
                start_hooks: None,
                label: None,
            },
        });
    };
    drop((theirs, tasks));
    let mut unfinished = Unfinished {
        pidfd: Some(pidfd),
        cgroup: None,
    };
    if let Some(adjustment) = request.process.oom_score_adj() {
        set_oom_score(
            pid,
            adjustment,
            request.rootless || flags & libc::CLONE_NEWUSER != 0,
        )?;
    }
    if flags & libc::CLONE_NEWUSER != 0 {
        process::set_limits(
            pid,
            request.process.rlimits().as_deref().unwrap_or_default(),
        )?;
    }
    ours.send(b'm', &[], &[])?;
    let mut terminal = None;
    let listener = seccomp
        .as_ref()
        .and_then(|program| program.listener.as_ref());
    let talk = Talk {
        pid,
        pidfd: unfinished.pidfd.as_ref().map(AsFd::as_fd),
        launch: None,
        listener: listener.map(|(path, metadata)| (path.as_path(), metadata.as_str())),
    };
    follow(&ours, &talk, &mut terminal)?;
    let pidfd = unfinished
        .pidfd
        .take()
        .ok_or_else(|| Error::invalid("no pidfd"))?;
    Ok(Running {
        pid,
        pidfd,
        terminal,
        cgroup: request.cgroup.cloned(),
    })
}

fn exec_clone(
    request: &Exec<'_>,
    flags: i32,
    target: &base::pidfd::PidFd,
    birthplace: Option<BorrowedFd<'_>>,
    privileged: bool,
) -> Result<Option<Child>> {
    if !privileged && flags & libc::CLONE_NEWUSER != 0 {
        let open = |name: &str| {
            rustix::fs::open(
                format!("/proc/{}/ns/{name}", request.pid),
                rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            )
            .during(|| format!("open the {name} namespace of process {}", request.pid))
        };
        let mut joined = vec![(libc::CLONE_NEWUSER, open("user")?)];
        if flags & libc::CLONE_NEWPID != 0 {
            joined.push((libc::CLONE_NEWPID, open("pid")?));
        }
        return clone_staged(0, &joined, birthplace);
    }
    let own = if flags & libc::CLONE_NEWPID != 0 {
        Some(enter_pid_namespace(target.as_fd())?)
    } else {
        None
    };
    // SAFETY: callers of the runtime are single-threaded (see the crate's documentation).
    let mut child = unsafe { syscall::clone3(0, birthplace) };
    if matches!(&child, Err(error) if error.raw_os_error() == Some(libc::EBUSY)) {
        // The container has handed controllers down (systemd does): only its leaves take processes. Its init is in
        // one.
        let leaf = cgroup::unified_path_of(request.pid).zip(Hierarchies::of_host()?.unified);
        if let Some((path, root)) = leaf {
            let leaf = Cgroup {
                unified: Some(root.join(path.trim_start_matches('/'))),
                ..Cgroup::default()
            };
            let place = leaf.birthplace()?;
            // SAFETY: as above.
            child = unsafe { syscall::clone3(0, place.as_ref().map(AsFd::as_fd)) };
        }
    }
    if let (Some(own), Ok(Some(_)) | Err(_)) = (own, &child) {
        leave_pid_namespace(&own)?;
    }
    child.during(|| "clone3 into the container".into())
}

fn descend(cgroup: &mut Cgroup, below: &Path) -> Result<()> {
    if below.components().any(|part| {
        !matches!(
            part,
            std::path::Component::Normal(_) | std::path::Component::RootDir
        )
    }) {
        return Err(Error::invalid(format!(
            "--cgroup {}: it must name a cgroup below the container's",
            below.display()
        )));
    }
    let below = below.strip_prefix("/").unwrap_or(below);
    for directory in cgroup.v1.values_mut().chain(&mut cgroup.unified) {
        directory.push(below);
    }
    Ok(())
}

/// Starts a container that waits at a listener (see [`Gate::Listener`]).
pub(crate) fn start_at(
    socket: OwnedFd,
    state: &crate::state::Record,
    spec: &Spec,
    pidfd: BorrowedFd<'_>,
) -> Result<()> {
    let channel = Channel::from_owned(socket);
    channel.send(b's', &[], &[])?;
    let seccomp = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.seccomp().as_ref());
    let listener = seccomp.and_then(|profile| {
        Some((
            profile.listener_path().as_deref()?,
            profile.listener_metadata().as_deref().unwrap_or_default(),
        ))
    });
    let talk = Talk {
        pid: state.pid,
        pidfd: Some(pidfd),
        launch: Some((spec, &state.id, &state.bundle)),
        listener,
    };
    follow(&channel, &talk, &mut None).map(drop)
}
