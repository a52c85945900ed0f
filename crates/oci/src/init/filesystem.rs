//! The container's file system, from the detached root to the switch to it.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::Mount;
use rustix::fs::{FileType, Mode, OFlags};

use super::Init;
use crate::device;
use crate::error::{Context, Error, Result};
use crate::launch::Stdio;
use crate::mount::{self, Options};
use crate::rootfs::{self, Masks, Root};
use crate::syscall::{self, MountAttr, attr};

impl Init<'_, '_> {
    pub(super) fn enter_root(&mut self) -> Result<()> {
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
            let (target, true_path) = root.find(destination, directory).during(what)?;
            let is_proc = syscall::is_filesystem(&tree, mount::PROC_SUPER_MAGIC).during(what)?;
            mount::check_proc_target(&true_path, &root.path, is_proc, destination)?;
            syscall::attach(tree.as_fd(), target.as_fd()).during(what)?;
            mount::set_propagation(tree.as_fd(), options).during(what)?;
            return Ok(None);
        }
        let target = if kind == "proc" || kind == "sysfs" {
            // A link here would put the kernel's files where the image wants them (CVE-2019-16884).
            let found = match root.plain(destination, true) {
                None => {
                    root.directory(destination).during(what)?;
                    root.plain(destination, true)
                }
                found => found,
            };
            let (target, _) = found.ok_or_else(|| {
                Error::invalid(format!(
                    "mount {kind} at {}: it must be an ordinary directory",
                    destination.display()
                ))
            })?;
            target
        } else {
            let (target, true_path) = root.find(destination, true).during(what)?;
            mount::check_proc_target(&true_path, &root.path, false, destination)?;
            target
        };
        let mut extra = Vec::new();
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
            ..options.of_filesystem()
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
