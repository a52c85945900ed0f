//! A container's file system from outside: read by descriptor, every path resolved within it.

use std::ffi::CString;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use ::image::Layers;
use ::image::layer::merged::Stack;
use ::image::layer::tree;
use rustix::fs::{AtFlags, FileType, Mode, OFlags};

use crate::container::record::{MountRecord, Record};
use crate::error::{Error, Result};
use crate::volume::Volumes;

/// The longest `/etc/passwd` that is read.
const MAX_TEXT: u64 = 4 << 20;

/// Reads a small text file through all layers without mounting them; empty where there is none.
///
/// Links are followed within the layer that has them, which is where real systems keep such files.
pub(crate) fn read_text(layers: &Layers, path: &str) -> String {
    let mut folders = vec![layers.upper.clone()];
    folders.extend(layers.lower.iter().cloned());
    let Ok(stack) = Stack::open(&folders) else {
        return String::new();
    };
    let Ok(Some(found)) = stack.find(path.as_bytes()) else {
        return String::new();
    };
    let open = || -> io::Result<String> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd = match tree::file_type(&found.stat) {
            FileType::RegularFile => rustix::fs::openat(
                &found.parent,
                &*found.name,
                flags | OFlags::NOFOLLOW,
                Mode::empty(),
            )?,
            FileType::Symlink => {
                // Wherever it leads, it is looked for in each layer as its root.
                let mut last = io::Error::from(io::ErrorKind::NotFound);
                let mut opened = None;
                for folder in &folders {
                    let root = tree::open_root(folder)?;
                    match tree::open_in(&root, path.as_bytes(), flags) {
                        Ok(fd) => {
                            opened = Some(fd);
                            break;
                        }
                        Err(error) => last = error.into(),
                    }
                }
                opened.ok_or(last)?
            }
            _ => return Ok(String::new()),
        };
        if !rustix::fs::fstat(&fd).is_ok_and(|stat| tree::file_type(&stat) == FileType::RegularFile)
        {
            return Ok(String::new());
        }
        let mut bytes = Vec::new();
        std::fs::File::from(fd)
            .take(MAX_TEXT)
            .read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    open().unwrap_or_default()
}

fn exists(layers: &Layers, path: &str) -> Result<bool> {
    let mut folders = vec![layers.upper.clone()];
    folders.extend(layers.lower.iter().cloned());
    let found =
        Stack::open(&folders).and_then(|stack| stack.find(path.trim_matches('/').as_bytes()));
    Ok(found
        .map_err(Error::io(format!("looking for {path}")))?
        .is_some())
}

/// Makes the working directory where the image lacks it.
pub(crate) fn make_folder(layers: &Layers, path: &str, mounts: &[MountRecord]) -> Result<()> {
    let mounted = mounts
        .iter()
        .any(|mount| Path::new(path).starts_with(&mount.point.destination));
    if mounted || path == "/" || exists(layers, path)? {
        return Ok(());
    }
    let root = ::image::mount_detached(layers, true).map_err(Error::room)?;
    make_folders(&root, path.trim_matches('/').as_bytes())
        .map_err(Error::io(format!("making the working directory {path}")))
}

/// Makes a folder and those above it; links are followed inside the root. A file in the way is left to the runtime to complain of.
pub(crate) fn make_folders(root: &OwnedFd, path: &[u8]) -> io::Result<()> {
    let mut done: Vec<u8> = Vec::new();
    for part in path
        .split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty())
    {
        let parent = tree::open_in(root, &done, OFlags::PATH | OFlags::DIRECTORY)?;
        let name = CString::new(part)?;
        match rustix::fs::mkdirat(&parent, &*name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        if !done.is_empty() {
            done.push(b'/');
        }
        done.extend_from_slice(part);
    }
    Ok(())
}

/// Copies what the image has at the targets of new, empty volumes into them.
pub(crate) fn copy_into_volumes(layers: &Layers, record: &Record, volumes: &Volumes) -> Result<()> {
    let mut root = None;
    for mount in record
        .mounts
        .iter()
        .filter(|mount| mount.point.kind == "volume" && mount.copy)
    {
        let target = mount.point.destination.trim_matches('/');
        if !exists(layers, target)? {
            continue;
        }
        // Only folders of this host: another file system is not mounted here.
        let Ok(crate::volume::VolumeSource::Directory(directory)) =
            volumes.source(&mount.point.name)
        else {
            continue;
        };
        let empty = std::fs::read_dir(&directory)
            .map_err(Error::io(format!("reading volume {}", mount.point.name)))?
            .next()
            .is_none();
        if !empty {
            continue;
        }
        if root.is_none() {
            root = Some(::image::mount_detached(layers, false).map_err(Error::room)?);
        }
        let Some(root) = &root else { continue };
        let copying = || {
            format!(
                "copying {} of the image into volume {}",
                mount.point.destination, mount.point.name
            )
        };
        let Ok(from) = tree::open_in(root, target.as_bytes(), OFlags::RDONLY | OFlags::DIRECTORY)
        else {
            continue;
        };
        let into = tree::open_root(&directory).map_err(Error::io(copying()))?;
        copy_tree(&from, &into).map_err(Error::io(copying()))?;
    }
    Ok(())
}

/// Copies a folder's owner and mode and all it holds.
fn copy_tree(from: &OwnedFd, into: &OwnedFd) -> io::Result<()> {
    let stat = rustix::fs::fstat(from)?;
    rustix::fs::fchown(
        into,
        Some(rustix::fs::Uid::from_raw(stat.st_uid)),
        Some(rustix::fs::Gid::from_raw(stat.st_gid)),
    )?;
    rustix::fs::fchmod(into, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    for name in tree::names(from)? {
        let Some(stat) = tree::stat_at(from, name.as_bytes())? else {
            continue;
        };
        let owner = (
            Some(rustix::fs::Uid::from_raw(stat.st_uid)),
            Some(rustix::fs::Gid::from_raw(stat.st_gid)),
        );
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        match tree::file_type(&stat) {
            FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let below = rustix::fs::openat(from, &*name, flags, Mode::empty())?;
                rustix::fs::mkdirat(into, &*name, Mode::from_raw_mode(0o700))?;
                let made = rustix::fs::openat(into, &*name, flags, Mode::empty())?;
                copy_tree(&below, &made)?;
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut source =
                    std::fs::File::from(rustix::fs::openat(from, &*name, flags, Mode::empty())?);
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let mut target = std::fs::File::from(rustix::fs::openat(
                    into,
                    &*name,
                    flags,
                    Mode::from_raw_mode(0o600),
                )?);
                io::copy(&mut source, &mut target)?;
                rustix::fs::fchown(&target, owner.0, owner.1)?;
                rustix::fs::fchmod(&target, mode)?;
            }
            FileType::Symlink => {
                let link = rustix::fs::readlinkat(from, &*name, Vec::new())?;
                rustix::fs::symlinkat(&*link, into, &*name)?;
                rustix::fs::chownat(into, &*name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)?;
            }
            kind @ (FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice) => {
                rustix::fs::mknodat(into, &*name, kind, mode, stat.st_rdev)?;
                rustix::fs::chownat(into, &*name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)?;
            }
            _ => {}
        }
        let times = rustix::fs::Timestamps {
            last_access: rustix::fs::Timespec {
                tv_sec: stat.st_atime as _,
                tv_nsec: stat.st_atime_nsec as _,
            },
            last_modification: rustix::fs::Timespec {
                tv_sec: stat.st_mtime as _,
                tv_nsec: stat.st_mtime_nsec as _,
            },
        };
        let _ = rustix::fs::utimensat(into.as_fd(), &*name, &times, AtFlags::SYMLINK_NOFOLLOW);
    }
    Ok(())
}
