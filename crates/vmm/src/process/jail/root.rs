//! A root file system of a machine process's own: a small read-only tmpfs in which its files are mounted where they were
//! on the host, and nothing else is.
//!
//! ```text
//!   clone the mount of each file ─▶ tmpfs over the machine's folder ─▶ clones into it ─▶ pivot_root(2), let the old root go
//! ```
//!
//! All by descriptors of the new mount API (mount_setattr(2), move_mount(2)), so that no name is looked up twice.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};

/// How a file is seen in the new root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
    /// A device that may be opened.
    Device,
}

/// A file or folder with its mount, on its way.
struct Carried {
    tree: OwnedFd,
    directory: bool,
    /// Where it is to be: as it was named, and where that leads to.
    places: Vec<PathBuf>,
}

fn at<T>(path: &Path, result: Result<T, Errno>) -> io::Result<T> {
    result.map_err(|errno| {
        let error = io::Error::from(errno);
        io::Error::new(error.kind(), format!("{}: {error}", path.display()))
    })
}

impl Carried {
    fn of(path: &Path, access: Access) -> io::Result<Carried> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = at(path, rustix::mount::open_tree(CWD, path, flags))?;
        let about = at(path, rustix::fs::statat(&tree, "", AtFlags::EMPTY_PATH))?;
        let mut take = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
        match access {
            Access::Read => take |= libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV,
            Access::Write if !is_device(about.st_mode) => take |= libc::MOUNT_ATTR_NODEV,
            Access::Write | Access::Device => {}
        }
        // A block device that is only read must still be opened.
        if access == Access::Read && is_device(about.st_mode) {
            take &= !libc::MOUNT_ATTR_NODEV;
        }
        restrict(tree.as_fd(), take)?;
        let mut places = vec![path.to_owned()];
        let real = std::fs::canonicalize(path)?;
        if real != path {
            places.push(real);
        }
        Ok(Carried {
            tree,
            directory: rustix::fs::FileType::from_raw_mode(about.st_mode).is_dir(),
            places,
        })
    }

    /// Mounts it below `root`, with the folders that lead to it.
    fn put(self, root: BorrowedFd<'_>) -> io::Result<()> {
        let flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        let clone = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        let mut mount = self.tree;
        for (number, place) in self.places.iter().enumerate() {
            let target = make_place(root, place, self.directory)?;
            if number > 0 {
                // Of the one before, which is mounted by now: kernels before 6.15 clone no other.
                mount = at(place, rustix::mount::open_tree(&mount, "", clone))?;
            }
            at(
                place,
                rustix::mount::move_mount(&mount, "", target, "", flags),
            )?;
        }
        Ok(())
    }
}

fn is_device(mode: rustix::fs::RawMode) -> bool {
    let kind = rustix::fs::FileType::from_raw_mode(mode);
    kind.is_block_device() || kind.is_char_device()
}

/// Takes these attributes (`MOUNT_ATTR_…`) from a mount for good.
fn restrict(mount: BorrowedFd<'_>, attributes: u64) -> io::Result<()> {
    let wish = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is an empty C string, and `wish` is a mount_attr of the size that is passed; both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const wish,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// An empty folder or file at `place` below `root`, to mount on.
fn make_place(root: BorrowedFd<'_>, place: &Path, directory: bool) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut folder = rustix::io::fcntl_dupfd_cloexec(root, 0)?;
    let names: Vec<_> = place
        .components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name),
            // An absolute path was asked for, in which these are folders that were made a moment ago.
            Component::ParentDir => Some("..".as_ref()),
            _ => None,
        })
        .collect();
    for (index, name) in names.iter().enumerate() {
        let last = index + 1 == names.len();
        // In a folder that is mounted already it is there, and cannot be made.
        match rustix::fs::openat(&folder, *name, flags, Mode::empty()) {
            Ok(found) => {
                folder = found;
                continue;
            }
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
        if last && !directory {
            let mode = Mode::from_raw_mode(0o444);
            let create = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            drop(rustix::fs::openat(&folder, *name, create, mode)?);
        } else {
            rustix::fs::mkdirat(&folder, *name, Mode::from_raw_mode(0o755))?;
        }
        folder = rustix::fs::openat(&folder, *name, flags, Mode::empty())?;
    }
    Ok(folder)
}

/// Makes `folder`, to be read, and `files`, which may lie in it, all there is, and `folder` the working folder. Must be in a mount namespace of its own.
///
/// # Errors
/// Where the kernel is older than 5.12 or refuses; everything is as before then.
pub fn enter(folder: &Path, files: &[(&Path, Access)]) -> io::Result<()> {
    // What is mounted here must not appear on the host, and the host's must not come here.
    let whole = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", whole)?;
    let mut carried = vec![Carried::of(folder, Access::Read)?];
    for (path, access) in files {
        carried.push(Carried::of(path, *access)?);
    }
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "mode", "0755")?;
    rustix::mount::fsconfig_set_string(&context, "size", "1m")?;
    rustix::mount::fsconfig_create(&context)?;
    let root = rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )?;
    // It has to be somewhere: where only this machine's files are hidden, by themselves.
    rustix::mount::move_mount(
        &root,
        "",
        CWD,
        folder,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?;
    let moved = (|| {
        for one in carried {
            one.put(root.as_fd())?;
        }
        restrict(root.as_fd(), libc::MOUNT_ATTR_RDONLY)?;
        rustix::process::fchdir(&root)?;
        rustix::process::pivot_root(".", ".")?;
        Ok(())
    })();
    if let Err(error) = moved {
        let _ = rustix::mount::unmount(folder, UnmountFlags::DETACH);
        let _ = rustix::process::chdir(folder);
        return Err(error);
    }
    // The old root lies on the new one, and goes.
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir(folder)?)
}
