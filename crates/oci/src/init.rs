//! The container's first process, from clone3(2) to execve(2).

use std::convert::Infallible;
use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Hook, Linux, Mount, Process};
use rustix::fs::{FileType, Mode, OFlags};

use crate::cgroup::{self, Cgroup, CgroupTarget, Hierarchies};
use crate::channel::Channel;
use crate::device;
use crate::error::{Context, Error, Result};
use crate::hook::{self, HookState};
use crate::launch::{Gate, Launch, Stdio};
use crate::mount::{self, Options};
use crate::namespace::{self, CLONE_NEWTIME, Namespaces};
use crate::process::{self, Label};
use crate::rootfs::{self, Masks, Root};
use crate::scheduling;
use crate::seccomp::Program;
use crate::syscall::{self, MountAttr, attr, resolve};
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
        if new_user || matches!(self.launch.cgroup, CgroupTarget::Systemd { .. }) {
            self.channel.expect(b'm')?;
        }
        cgroup::join(&self.tasks)?;
        self.tasks.clear();
        if self.namespaces.has(libc::CLONE_NEWUSER) {
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

    fn enter_root(&mut self) -> Result<()> {
        let spec = self.launch.spec;
        let propagation = self.linux.rootfs_propagation().as_deref();
        let path = match &self.launch.rootfs {
            rootfs::Rootfs::Dir(path) => fs::canonicalize(path)
                .during(|| format!("the container's root {}", path.display()))?,
            // Anywhere will do inside this mount namespace; the bundle always exists.
            rootfs::Rootfs::Overlay { upper, .. } => upper.clone(),
        };
        rootfs::set_host_propagation(&path, propagation)?;
        let mount = match self.root.take() {
            Some(mount) => mount,
            None => self.launch.rootfs.detached()?,
        };
        let place = rustix::fs::open(
            &path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .during(|| format!("the container's root {}", path.display()))?;
        syscall::attach(mount.as_fd(), place.as_fd())
            .during(|| format!("mount the container's root at {}", path.display()))?;
        drop(place);
        let root = Root { mount, path };

        let mounts = spec.mounts().as_deref().unwrap_or_default();
        let mut late_read_only: Vec<(OwnedFd, u64)> = Vec::new();
        let mut dev_bound = false;
        for (index, mount) in mounts.iter().enumerate() {
            let options = mount::parse_options(mount)?;
            if mount.destination() == Path::new("/dev") && options.bind {
                dev_bound = true;
            }
            let attached = self.mount_one(&root, mount, &options, index)?;
            // A /dev to be read-only is so once its nodes are made.
            if let Some(tree) = attached {
                late_read_only.push((tree, attr::RDONLY));
            }
        }
        if !dev_bound {
            let in_user_namespace =
                self.namespaces.has(libc::CLONE_NEWUSER) || self.launch.rootless;
            device::make_nodes(
                &root,
                self.linux.devices().as_deref().unwrap_or_default(),
                in_user_namespace,
            )?;
            device::make_links(&root)?;
        }
        if let Stdio::Terminal { size } = self.launch.stdio {
            self.open_terminal(&root, size)?;
        }
        self.run_create_hooks()?;
        for (tree, attributes) in late_read_only {
            let attributes = MountAttr {
                attr_set: attributes,
                ..MountAttr::default()
            };
            syscall::mount_setattr(tree.as_fd(), false, &attributes)
                .during(|| "make /dev read-only".into())?;
        }
        for path in self.linux.readonly_paths().iter().flatten() {
            rootfs::make_read_only(&root, Path::new(path))?;
        }
        if let Some(masked) = self
            .linux
            .masked_paths()
            .as_ref()
            .filter(|list| !list.is_empty())
        {
            let mut masks = Masks::new()?;
            for path in masked {
                masks.cover(&root, Path::new(path))?;
            }
        }
        if spec
            .root()
            .as_ref()
            .is_some_and(|root| root.readonly() == Some(true))
        {
            let attributes = MountAttr {
                attr_set: attr::RDONLY,
                ..MountAttr::default()
            };
            syscall::mount_setattr(root.mount.as_fd(), false, &attributes)
                .during(|| "make the root read-only".into())?;
        }
        if self.launch.no_pivot {
            rootfs::move_root(&root)?
        } else {
            rootfs::pivot(&root)?
        }
        rootfs::set_own_propagation(propagation)
    }

    /// Makes one mount. Returns it where it still has to become read-only.
    fn mount_one(
        &mut self,
        root: &Root,
        mount: &Mount,
        options: &Options,
        index: usize,
    ) -> Result<Option<OwnedFd>> {
        let destination = mount.destination();
        let what = || {
            format!(
                "mount {} {} at {}",
                mount.typ().as_deref().unwrap_or("bind"),
                mount.source().as_deref().unwrap_or(Path::new("")).display(),
                destination.display()
            )
        };
        let kind = mount.typ().as_deref().unwrap_or("");
        if kind == "cgroup" || kind == "cgroup2" {
            return self
                .mount_cgroups(root, destination, options)
                .map(|()| None);
        }
        if options.bind {
            let tree = match self.prepared.get_mut(index).and_then(Option::take) {
                Some(tree) => tree,
                None => mount::detached_bind(
                    &mount::bind_source(mount, self.launch.bundle)?,
                    options,
                    None,
                )?,
            };
            let stat = rustix::fs::fstat(&tree).during(what)?;
            let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            let target = root.target(destination, directory).during(what)?;
            let is_proc = syscall::is_filesystem(&tree, mount::PROC_SUPER_MAGIC).during(what)?;
            self.check_proc(root, target.as_fd(), is_proc, destination)?;
            syscall::attach(tree.as_fd(), target.as_fd()).during(what)?;
            mount::set_propagation(tree.as_fd(), options).during(what)?;
            return Ok(None);
        }
        let target = root.directory(destination).during(what)?;
        let mut extra = Vec::new();
        if kind == "proc" || kind == "sysfs" {
            // A link here would put the kernel's files where the image wants them (CVE-2019-16884).
            let inside = destination.strip_prefix("/").unwrap_or(destination);
            syscall::openat2(
                root.mount.as_fd(),
                inside,
                libc::O_PATH,
                0,
                resolve::IN_ROOT | resolve::NO_SYMLINKS,
            )
            .during(|| {
                format!(
                    "mount {kind} at {}: it must be an ordinary directory",
                    destination.display()
                )
            })?;
        } else {
            self.check_proc(root, target.as_fd(), false, destination)?;
        }
        if kind == "tmpfs"
            && !options
                .data
                .iter()
                .any(|option| option.starts_with("mode="))
        {
            let stat = rustix::fs::fstat(&target).during(what)?;
            extra.push(("mode", format!("{:o}", stat.st_mode & 0o7777)));
        }
        let source = mount
            .source()
            .as_deref()
            .filter(|source| !source.as_os_str().is_empty());
        let dev_read_only = destination == Path::new("/dev") && options.set & attr::RDONLY != 0;
        let held = Options {
            set: options.set & !attr::RDONLY,
            ..clone_options(options)
        };
        let built = mount::detached_filesystem(
            kind,
            source,
            if dev_read_only { &held } else { options },
            &extra,
        );
        let tree = match built {
            Ok(tree) => tree,
            // Without a network namespace of its own a user namespace may not mount sysfs: the host's serves.
            Err(error) if kind == "sysfs" && error.raw_os_error() == Some(libc::EPERM) => {
                let bind = Options {
                    recursive: true,
                    recursive_set: options.set,
                    ..Options::default()
                };
                mount::detached_bind(Path::new("/sys"), &bind, None)?
            }
            Err(error) => return Err(error).during(what),
        };
        if options.copy_up {
            copy_up(target.as_fd(), tree.as_fd())
                .during(|| format!("copy {} up into its tmpfs", destination.display()))?;
            if options.set & attr::RDONLY != 0 {
                let attributes = MountAttr {
                    attr_set: attr::RDONLY,
                    ..MountAttr::default()
                };
                syscall::mount_setattr(tree.as_fd(), false, &attributes).during(what)?;
            }
        }
        syscall::attach(tree.as_fd(), target.as_fd()).during(what)?;
        mount::set_propagation(tree.as_fd(), options).during(what)?;
        Ok(dev_read_only.then_some(tree))
    }

    fn check_proc(
        &self,
        root: &Root,
        target: BorrowedFd<'_>,
        is_proc: bool,
        destination: &Path,
    ) -> Result<()> {
        let true_path = root
            .true_path(target)
            .during(|| format!("resolve {}", destination.display()))?;
        mount::check_proc_target(&true_path, &root.path, is_proc, destination)
    }

    /// The cgroup file system: on v2 the tree itself, on v1 a tmpfs with a directory for each hierarchy joined.
    fn mount_cgroups(&self, root: &Root, destination: &Path, options: &Options) -> Result<()> {
        let what = || format!("mount the cgroups at {}", destination.display());
        let target = root.directory(destination).during(what)?;
        let Some(hierarchies) = &self.hierarchies else {
            return Ok(());
        };
        let own = self.cgroup.as_ref();
        let plain = Options {
            set: options.set | attr::NOSUID | attr::NODEV | attr::NOEXEC,
            clear: options.clear,
            ..Options::default()
        };
        // A fresh mount shows the cgroup namespace's root; without a namespace, only the container's own part is
        // bound.
        let one = |kind: &str,
                   controllers: &[String],
                   directory: Option<&PathBuf>,
                   target: BorrowedFd<'_>|
         -> Result<()> {
            let data = controllers
                .iter()
                .flat_map(|name| {
                    if name.starts_with("name=") {
                        vec!["none".to_owned(), name.clone()]
                    } else {
                        vec![name.clone()]
                    }
                })
                .collect();
            let fresh = Options {
                data,
                ..clone_options(&plain)
            };
            let private = self.namespaces.new_cgroup;
            let tree = match (private, directory) {
                (false, Some(directory)) => mount::detached_bind(directory, &plain, None)?,
                _ => match (
                    mount::detached_filesystem(kind, Some(Path::new("cgroup")), &fresh, &[]),
                    directory,
                ) {
                    (Ok(tree), _) => tree,
                    (Err(_), Some(directory)) => mount::detached_bind(directory, &plain, None)?,
                    (Err(error), None) => return Err(error).during(what),
                },
            };
            syscall::attach(tree.as_fd(), target).during(what)
        };
        if hierarchies.is_v2() {
            return one(
                "cgroup2",
                &[],
                own.and_then(|cgroup| cgroup.unified.as_ref()),
                target.as_fd(),
            );
        }
        let mut tmpfs = Options {
            set: plain.set & !attr::RDONLY,
            ..Options::default()
        };
        tmpfs.data.push("mode=755".into());
        let tree = mount::detached_filesystem("tmpfs", Some(Path::new("cgroup")), &tmpfs, &[])
            .during(what)?;
        syscall::attach(tree.as_fd(), target.as_fd()).during(what)?;
        let Some(own) = own else { return Ok(()) };
        let inside = |name: &str| -> Result<OwnedFd> {
            rustix::fs::mkdirat(&tree, name, Mode::from_raw_mode(0o755)).during(what)?;
            rustix::fs::openat(
                &tree,
                name,
                OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .during(what)
        };
        for (controllers, _) in &hierarchies.v1 {
            // What the container has not joined would show the host's cgroups.
            let Some(directory) = own.v1.get(&controllers[0]) else {
                continue;
            };
            let name = controllers.join(",");
            let name = name.strip_prefix("name=").unwrap_or(&name);
            let place = inside(name)?;
            one("cgroup", controllers, Some(directory), place.as_fd())?;
            for controller in controllers.iter().filter(|controller| *controller != name) {
                if !controller.starts_with("name=") {
                    let _ = rustix::fs::symlinkat(name, &tree, controller.as_str());
                }
            }
        }
        if let Some(directory) = &own.unified {
            let place = inside("unified")?;
            one("cgroup2", &[], Some(directory), place.as_fd())?;
        }
        if options.set & attr::RDONLY != 0 {
            let attributes = MountAttr {
                attr_set: attr::RDONLY,
                ..MountAttr::default()
            };
            syscall::mount_setattr(tree.as_fd(), false, &attributes).during(what)?;
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

fn clone_options(options: &Options) -> Options {
    Options {
        set: options.set,
        clear: options.clear,
        super_flags: options.super_flags.clone(),
        data: options.data.clone(),
        ..Options::default()
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

/// Copies what a tmpfs is about to cover into it (`tmpcopyup`).
fn copy_up(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> std::io::Result<()> {
    use rustix::fs::{AtFlags, Dir};
    let readable = rustix::fs::openat(
        from,
        ".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    for entry in Dir::read_from(&readable)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                rustix::fs::mkdirat(to, name, mode)?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let below = rustix::fs::openat(from, name, flags, Mode::empty())?;
                let above = rustix::fs::openat(to, name, flags, Mode::empty())?;
                copy_up(below.as_fd(), above.as_fd())?;
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(from, name, Vec::new())?;
                rustix::fs::symlinkat(&target, to, name)?;
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let mut source =
                    fs::File::from(rustix::fs::openat(from, name, flags, Mode::empty())?);
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let mut copy = fs::File::from(rustix::fs::openat(to, name, flags, mode)?);
                std::io::copy(&mut source, &mut copy)?;
            }
            kind => rustix::fs::mknodat(to, name, kind, mode, stat.st_rdev)?,
        }
        let owner = (
            Some(rustix::fs::Uid::from_raw(stat.st_uid)),
            Some(rustix::fs::Gid::from_raw(stat.st_gid)),
        );
        rustix::fs::chownat(to, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

/// All a process that joins a container needs.
pub(crate) struct Join<'a> {
    pub target: BorrowedFd<'a>,
    pub flags: i32,
    pub tasks: Vec<OwnedFd>,
    /// `Some` where it gets a terminal of the container.
    pub terminal: Option<Option<Size>>,
    pub stdio: Option<[OwnedFd; 3]>,
    pub finish: Finish<'a>,
}

/// Joins the container and executes the program.
pub(crate) fn join(mut join: Join<'_>) -> ! {
    match join.set_up() {
        Ok(()) => join.finish.run(),
        Err(error) => {
            join.finish.channel.send_error(&error);
            syscall::exit_now(1);
        }
    }
}

impl Join<'_> {
    fn set_up(&mut self) -> Result<()> {
        syscall::prctl(libc::PR_SET_DUMPABLE, 0, 0).during(|| "prctl".into())?;
        syscall::reset_known_signals();
        self.finish.channel.expect(b'm')?;
        let affinity = self.finish.process.exec_cpu_affinity().as_ref();
        if let Some(list) = affinity.and_then(|affinity| affinity.initial().as_deref()) {
            scheduling::set_affinity(list)?;
        }
        cgroup::join(&self.tasks)?;
        self.tasks.clear();
        if let Some(list) = affinity.and_then(|affinity| affinity.cpu_affinity_final().as_deref()) {
            scheduling::set_affinity(list)?;
        }
        // The label's file is opened while /proc still is the host's.
        self.finish.label = process::open_label(self.finish.process)?;
        let rest = self.flags & !libc::CLONE_NEWPID;
        let staged = !rustix::process::geteuid().is_root() && rest & libc::CLONE_NEWUSER != 0;
        let rest = if staged {
            rest & !libc::CLONE_NEWUSER
        } else {
            rest
        };
        if rest != 0 {
            syscall::setns(self.target, rest)
                .during(|| "join the container's namespaces".into())?;
        }
        if self.flags & libc::CLONE_NEWUSER != 0 {
            let _ = syscall::set_groups(&[]);
            // Where root is not mapped, the capabilities that came with the join still do.
            let _ = syscall::set_ids(0, 0);
        }
        let _ = rustix::process::setsid();
        rustix::process::umask(Mode::empty());
        if let Some(size) = self.terminal {
            let root = rustix::fs::open(
                "/",
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .during(|| "open the container's root".into())?;
            let pty = terminal::open(root.as_fd(), size, self.finish.process.user().uid())?;
            self.finish.channel.send(b'T', &[], &[pty.master.as_fd()])?;
            terminal::take(pty.slave.as_fd())?;
        }
        if let Some(fds) = &self.stdio {
            take_fds(fds)?;
        }
        Ok(())
    }
}

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
    /// Else the runtime has set them from outside.
    pub set_limits: bool,
    pub start_hooks: Option<(&'a [Hook], HookState<'a>)>,
    pub label: Option<Label>,
}

impl Finish<'_> {
    fn run(mut self) -> ! {
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
        process::enter_directory(process.cwd())?;
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
        let deny_groups = groups_denied();
        let no_new_privileges = process.no_new_privileges().unwrap_or(false);
        self.channel.write(b'X', &[])?;
        // Without no_new_privs, loading a filter takes CAP_SYS_ADMIN, which goes next.
        if !no_new_privileges {
            self.load_seccomp()?;
        }
        process::become_user(process, deny_groups)?;
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

/// Whether setgroups(2) has been given up in this user namespace. The initial one never does.
fn groups_denied() -> bool {
    fs::read_to_string("/proc/self/setgroups").is_ok_and(|text| text.trim() == "deny")
}
