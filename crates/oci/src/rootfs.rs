//! The container's root: its mount, everything inside it, and the switch to it.
//!
//! Every path inside is resolved with the container's root as root (openat2(2), RESOLVE_IN_ROOT) and used by
//! descriptor from then on, so that a link planted by the image or by another container leads nowhere outside
//! (CVE-2025-31133, -52565, -52881).

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, mkdirat, readlinkat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, UnmountFlags, fsconfig_create, fsconfig_set_string,
    fsmount, fsopen, unmount,
};

use crate::error::{Context, Error, Result};
use crate::syscall::{self, MountAttr, attr, resolve};

/// What the container's root is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rootfs {
    /// A directory that holds the whole tree.
    Dir(PathBuf),
    /// An overlay, mounted inside the container's mount namespace alone. `lower` is topmost first.
    Overlay {
        lower: Vec<PathBuf>,
        upper: PathBuf,
        work: PathBuf,
    },
}

impl Rootfs {
    /// A detached mount of the root.
    pub(crate) fn detached(&self) -> Result<OwnedFd> {
        match self {
            Rootfs::Dir(path) => syscall::clone_tree(CWD, path, true)
                .during(|| format!("the container's root {}", path.display())),
            Rootfs::Overlay { lower, upper, work } => overlay(lower, upper, work)
                .during(|| format!("mount the overlay over {}", upper.display())),
        }
    }
}

/// Mounts an overlay detached.
fn overlay(lower: &[PathBuf], upper: &Path, work: &Path) -> io::Result<OwnedFd> {
    let mut overlay = base::overlay::Overlay {
        lower: lower.iter().map(PathBuf::as_path).collect(),
        writable: Some((upper, work)),
        tried: base::overlay::PLAIN.to_vec(),
        ..Default::default()
    };
    if base::userns::inside() {
        // The marks of a layer that was unpacked here are such attributes: others could not be set.
        overlay.options.push("userxattr");
    }
    overlay.mount(MountAttrFlags::empty())
}

/// The container's root by descriptor, before the switch to it.
pub(crate) struct Root {
    /// The root of its mount, attached.
    pub mount: OwnedFd,
    /// Where it is attached, as this mount namespace sees it.
    pub path: PathBuf,
}

impl Root {
    /// Opens a path of the container as a place (`O_PATH`).
    pub fn place(&self, path: &Path) -> io::Result<OwnedFd> {
        place(self.mount.as_fd(), path)
    }

    /// What `path` is where no link is on the way, and nothing is to be made: then its true path is known as well.
    pub fn plain(&self, path: &Path, is_directory: bool) -> Option<(OwnedFd, PathBuf)> {
        let flags = if is_directory {
            libc::O_PATH | libc::O_DIRECTORY
        } else {
            libc::O_PATH
        };
        let how = resolve::IN_ROOT | resolve::NO_SYMLINKS;
        let found = syscall::openat2(self.mount.as_fd(), relative(path), flags, 0, how).ok()?;
        Some((found, self.path.join(clean(path))))
    }

    /// What `path` is, made where it is missing, and its true path.
    pub fn find(&self, path: &Path, is_directory: bool) -> io::Result<(OwnedFd, PathBuf)> {
        if let Some(found) = self.plain(path, is_directory) {
            return Ok(found);
        }
        let target = self.target(path, is_directory)?;
        let true_path = self.true_path(target.as_fd())?;
        Ok((target, true_path))
    }

    /// The directory `path`, made with its parents where it is missing.
    pub fn directory(&self, path: &Path) -> io::Result<OwnedFd> {
        make_directory(self.mount.as_fd(), path, 0)
    }

    /// The file `path`, made empty with its parents where it is missing.
    pub fn file(&self, path: &Path) -> io::Result<OwnedFd> {
        match self.place(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let (parent, name) = split(path)?;
        let parent = self.directory(parent)?;
        let made = rustix::fs::openat(
            &parent,
            name,
            OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::WRONLY,
            Mode::from_raw_mode(0o644),
        );
        match made {
            Ok(_) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        // Through the root again, in case that what exists now is a link.
        self.place(path)
    }

    /// The target of a mount: a directory or a file, as its source is.
    pub fn target(&self, path: &Path, is_directory: bool) -> io::Result<OwnedFd> {
        if is_directory {
            self.directory(path)
        } else {
            self.file(path)
        }
    }

    /// The true path of something inside, in this mount namespace.
    pub fn true_path(&self, fd: BorrowedFd<'_>) -> io::Result<PathBuf> {
        std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
    }
}

/// A path inside `root`, as a place. No magic link is followed.
pub(crate) fn place(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    syscall::openat2(
        root,
        relative(path),
        libc::O_PATH,
        0,
        resolve::IN_ROOT | resolve::NO_MAGICLINKS,
    )
}

/// `.` for the root itself: openat2 has no word for an absolute path's root without it.
fn relative(path: &Path) -> &Path {
    let stripped = path.strip_prefix("/").unwrap_or(path);
    if stripped.as_os_str().is_empty() {
        Path::new(".")
    } else {
        stripped
    }
}

fn split(path: &Path) -> io::Result<(&Path, &OsStr)> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok((parent, name)),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a path that ends in a name is needed",
        )),
    }
}

fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    clean
}

fn make_directory(root: BorrowedFd<'_>, path: &Path, depth: u32) -> io::Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    match syscall::openat2(
        root,
        relative(path),
        flags,
        0,
        resolve::IN_ROOT | resolve::NO_MAGICLINKS,
    ) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && depth < 64 => {}
        other => return other,
    }
    // Without `..`, which a path to be made can only mean by its words. The root stops it in any case.
    let path = &clean(path);
    let (parent_path, name) = split(path)?;
    let parent = make_directory(root, parent_path, depth + 1)?;
    match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            // A link to what does not exist yet: make what it names, inside the root.
            if let Ok(link) = readlinkat(&parent, name, Vec::new()) {
                use std::os::unix::ffi::OsStrExt;
                let link = Path::new(OsStr::from_bytes(link.as_bytes()));
                return make_directory(root, &parent_path.join(link), depth + 1);
            }
        }
        Err(errno) => return Err(errno.into()),
    }
    syscall::openat2(
        parent.as_fd(),
        Path::new(name),
        flags,
        0,
        resolve::BENEATH | resolve::NO_SYMLINKS,
    )
}

/// Sets how mounts spread between the host and the container's mount namespace, before anything is mounted.
pub(crate) fn set_host_propagation(root: &Path, wanted: Option<&str>) -> Result<()> {
    let everywhere = |propagation| {
        syscall::mount_setattr_path(
            c"/",
            true,
            &MountAttr {
                propagation,
                ..MountAttr::default()
            },
        )
        .during(|| "set the propagation of the host's mounts".into())
    };
    match wanted {
        None | Some("") | Some("slave" | "rslave") => everywhere(libc::MS_SLAVE),
        Some("private" | "rprivate" | "unbindable" | "runbindable") => everywhere(libc::MS_PRIVATE),
        Some("shared" | "rshared") => {
            // pivot_root(2) wants the parent mount of the root private; all else stays shared.
            let mut path = root.to_owned();
            loop {
                let status = rustix::fs::statx(
                    CWD,
                    &path,
                    AtFlags::empty(),
                    rustix::fs::StatxFlags::empty(),
                )
                .during(|| format!("stat {}", path.display()))?;
                const MOUNT_ROOT: u64 = 0x2000; // STATX_ATTR_MOUNT_ROOT
                if status.stx_attributes.bits() & MOUNT_ROOT != 0 || !path.pop() {
                    break;
                }
            }
            let path = if path.as_os_str().is_empty() {
                PathBuf::from("/")
            } else {
                path
            };
            let path = syscall::c_path(&path).during(|| "the root's path".into())?;
            let private = MountAttr {
                propagation: libc::MS_PRIVATE,
                ..MountAttr::default()
            };
            syscall::mount_setattr_path(&path, false, &private)
                .during(|| "make the mount above the container's root private".into())
        }
        Some(other) => Err(Error::invalid(format!(
            "config.json: linux.rootfsPropagation {other:?} is not known"
        ))),
    }
}

/// Masks a path: what is there is covered, and what is not there stays so (config-linux "Masked Paths").
pub(crate) struct Masks {
    null: OwnedFd,
    empty: Option<OwnedFd>,
}

impl Masks {
    /// # Errors
    /// Where the host's `/dev/null` is not the null device.
    pub fn new() -> Result<Masks> {
        let null = rustix::fs::open(
            "/dev/null",
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .during(|| "open /dev/null".into())?;
        let stat = rustix::fs::fstat(&null).during(|| "stat /dev/null".into())?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice
            || stat.st_rdev != rustix::fs::makedev(1, 3)
        {
            return Err(Error::invalid(
                "the host's /dev/null is not the null device: paths cannot be masked with it",
            ));
        }
        Ok(Masks { null, empty: None })
    }

    pub fn cover(&mut self, root: &Root, path: &Path) -> Result<()> {
        let target = match root.place(path) {
            Ok(target) => target,
            Err(error) if absent(&error) => return Ok(()),
            Err(error) => return Err(error).during(|| format!("mask {}", path.display())),
        };
        let stat = rustix::fs::fstat(&target).during(|| format!("mask {}", path.display()))?;
        let cover = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            self.empty_directory()
        } else {
            syscall::clone_tree(self.null.as_fd(), Path::new(""), false)
        };
        let cover = cover.during(|| format!("mask {}", path.display()))?;
        syscall::attach(cover.as_fd(), target.as_fd())
            .during(|| format!("mask {}", path.display()))?;
        if self.empty.is_none() && FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            self.empty = Some(cover);
        }
        Ok(())
    }

    /// One empty read-only tmpfs serves all directories: the first is attached, the others are copies of it.
    fn empty_directory(&self) -> io::Result<OwnedFd> {
        if let Some(first) = &self.empty {
            return syscall::clone_tree(first.as_fd(), Path::new(""), false);
        }
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "nr_inodes", "2")?;
        fsconfig_set_string(&context, "mode", "755")?;
        fsconfig_create(&context)?;
        let attributes = MountAttrFlags::from_bits_retain(
            (attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC) as u32,
        );
        Ok(fsmount(
            &context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            attributes,
        )?)
    }
}

fn absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR))
}

/// Makes a path read-only with all beneath it (config-linux "Readonly Paths").
pub(crate) fn make_read_only(root: &Root, path: &Path) -> Result<()> {
    let done = (|| {
        let target = match root.place(path) {
            Err(error) if absent(&error) => return Ok(()),
            other => other?,
        };
        let tree = syscall::clone_tree(target.as_fd(), Path::new(""), true)?;
        let attributes = MountAttr {
            attr_set: attr::RDONLY,
            ..MountAttr::default()
        };
        syscall::mount_setattr(tree.as_fd(), false, &attributes)?;
        syscall::attach(tree.as_fd(), target.as_fd())
    })();
    done.during(|| format!("make {} read-only", path.display()))
}

/// Makes the mount the root of this process and forgets the old one (pivot_root(2)).
pub(crate) fn pivot(root: &Root) -> Result<()> {
    rustix::process::fchdir(&root.mount).during(|| "enter the container's root".into())?;
    rustix::process::pivot_root(".", ".").during(|| "pivot_root".into())?;
    // The old root now lies over the new one at ".". Nothing of this may reach the host's own mounts.
    let slave = MountAttr {
        propagation: libc::MS_SLAVE,
        ..MountAttr::default()
    };
    syscall::mount_setattr_path(c".", true, &slave)
        .during(|| "detach the old root from the host's mounts".into())?;
    unmount(".", UnmountFlags::DETACH).during(|| "unmount the old root".into())?;
    rustix::process::chdir("/").during(|| "enter the new root".into())
}

/// The switch where the initial ramfs is the root, which pivot_root cannot leave (`--no-pivot`).
pub(crate) fn move_root(root: &Root) -> Result<()> {
    rustix::process::fchdir(&root.mount).during(|| "enter the container's root".into())?;
    rustix::mount::mount_move(".", "/").during(|| "move the container's root to /".into())?;
    rustix::process::chroot(".").during(|| "chroot".into())?;
    rustix::process::chdir("/").during(|| "enter the new root".into())
}

/// The propagation the container's own root ends up with.
pub(crate) fn set_own_propagation(wanted: Option<&str>) -> Result<()> {
    let propagation = match wanted {
        Some("shared" | "rshared") => libc::MS_SHARED,
        Some("unbindable" | "runbindable") => libc::MS_UNBINDABLE,
        _ => return Ok(()),
    };
    let recursive = wanted.is_some_and(|word| word.starts_with('r'));
    syscall::mount_setattr_path(
        c"/",
        recursive,
        &MountAttr {
            propagation,
            ..MountAttr::default()
        },
    )
    .during(|| "set the propagation of the container's root".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> OwnedFd {
        rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    #[test]
    fn a_plain_path_has_no_link_on_its_way_and_is_known_without_asking() {
        let scratch = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(scratch.path().join("a/b")).unwrap();
        std::os::unix::fs::symlink("a", scratch.path().join("link")).unwrap();
        let root = Root {
            mount: open(scratch.path()),
            path: scratch.path().to_owned(),
        };
        for path in ["/a/b", "a/../../a/./b/", "/a", "/"] {
            let (found, known) = root.plain(Path::new(path), true).unwrap();
            assert_eq!(root.true_path(found.as_fd()).unwrap(), known, "{path}");
        }
        for path in ["/link/b", "/link", "/a/missing"] {
            assert!(root.plain(Path::new(path), true).is_none(), "{path}");
        }
    }

    #[test]
    fn a_link_out_of_the_root_stays_inside_it() {
        let scratch = tempfile::tempdir().unwrap();
        let (inside, outside) = (scratch.path().join("root"), scratch.path().join("outside"));
        std::fs::create_dir_all(&inside).unwrap();
        std::fs::create_dir_all(&outside).unwrap();
        std::os::unix::fs::symlink("../outside", inside.join("escape")).unwrap();
        std::os::unix::fs::symlink(&outside, inside.join("absolute")).unwrap();
        let root = Root {
            mount: open(&inside),
            path: inside.clone(),
        };
        root.directory(Path::new("/escape/new")).unwrap();
        root.file(Path::new("/absolute/file")).unwrap();
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
        assert!(inside.join("outside/new").is_dir());
        let mirrored = inside.join(outside.strip_prefix("/").unwrap()).join("file");
        assert!(mirrored.is_file(), "{}", mirrored.display());
    }

    #[test]
    fn links_in_a_circle_end_with_an_error() {
        let scratch = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("b", scratch.path().join("a")).unwrap();
        std::os::unix::fs::symlink("a", scratch.path().join("b")).unwrap();
        let root = Root {
            mount: open(scratch.path()),
            path: scratch.path().to_owned(),
        };
        assert!(root.directory(Path::new("/a/x")).is_err());
    }

    #[test]
    fn parents_are_made_and_a_file_in_the_way_is_an_error() {
        let scratch = tempfile::tempdir().unwrap();
        let root = Root {
            mount: open(scratch.path()),
            path: scratch.path().to_owned(),
        };
        root.file(Path::new("/a/b/c")).unwrap();
        assert!(scratch.path().join("a/b/c").is_file());
        assert!(root.directory(Path::new("/a/b/c/d")).is_err());
    }
}
