//! The cgroup file system inside a container.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::Init;
use crate::error::{Context, Result};
use crate::mount::{self, Options};
use crate::rootfs::Root;
use crate::syscall::{self, MountAttr, attr};

impl Init<'_, '_> {
    /// The cgroup file system: on v2 the tree itself, on v1 a tmpfs with a directory for each hierarchy joined.
    pub(super) fn mount_cgroups(
        &self,
        root: &Root,
        destination: &Path,
        options: &Options,
    ) -> Result<()> {
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
                ..plain.of_filesystem()
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
}
