//! Folders held by descriptor, so that no name in an archive or image can lead out of them.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

/// As a process confined to the folder would see it: absolute and `..` links end at the folder itself.
pub const CONFINED: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);

/// Opens a folder for use as a root.
pub fn open_root(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Opens `path` beneath `root`; links are resolved inside it. An empty path is the root.
pub fn open_in(root: impl AsFd, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path: &[u8] = if path.is_empty() { b"." } else { path };
    // The kernel asks for another try when a rename elsewhere raced with the walk (openat2(2), EAGAIN).
    for _ in 0..64 {
        match rustix::fs::openat2(
            &root,
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            CONFINED,
        ) {
            Err(Errno::AGAIN) => {}
            other => return other,
        }
    }
    Err(Errno::AGAIN)
}

/// The folder and the last name of a clean path; the last name is not resolved.
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

/// `path` without leading, doubled and trailing slashes and `.`; `None` where it holds `..` or a NUL byte.
pub fn clean(path: &[u8]) -> Option<Vec<u8>> {
    let mut cleaned = Vec::with_capacity(path.len());
    for component in path.split(|b| *b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => return None,
            _ => {
                if component.contains(&0) {
                    return None;
                }
                if !cleaned.is_empty() {
                    cleaned.push(b'/');
                }
                cleaned.extend_from_slice(component);
            }
        }
    }
    Some(cleaned)
}

/// `path` without empty components, `.` and `..`, as it is written: links play no part. `..` stops at the root.
pub fn normal(path: &[u8]) -> Vec<u8> {
    let mut components: Vec<&[u8]> = Vec::new();
    for component in path.split(|b| *b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                components.pop();
            }
            other => components.push(other),
        }
    }
    components.join(&b'/')
}

/// [`normal`], or none where `..` would rise above the root or there is a NUL byte.
pub fn normal_inside(path: &[u8]) -> Option<Vec<u8>> {
    let mut depth = 0usize;
    for component in path.split(|b| *b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => depth = depth.checked_sub(1)?,
            other if other.contains(&0) => return None,
            _ => depth += 1,
        }
    }
    Some(normal(path))
}

/// The state of `name` in `directory`, links not followed; `None` where there is none.
pub fn stat_at(directory: impl AsFd, name: &[u8]) -> io::Result<Option<Stat>> {
    match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The type in a stat.
pub fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Whether it is overlayfs' mark of a removed file: a character device 0/0.
pub fn is_whiteout(stat: &Stat) -> bool {
    file_type(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Names in a folder without `.` and `..`, sorted.
pub fn names(directory: impl AsFd) -> io::Result<Vec<CString>> {
    let directory = rustix::fs::openat(
        directory,
        ".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mut names = Vec::new();
    for entry in Dir::new(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Removes what `path` names, a file or a whole tree, however deep it is; nothing there is success.
pub fn remove_all(path: &Path) -> io::Result<()> {
    let Some(name) = path.file_name() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no file name"));
    };
    let parent = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    match open_root(parent) {
        Ok(parent) => remove_at(&parent, &CString::new(name.as_bytes())?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// [`remove_all`] of a name in an open folder.
///
/// Folders that are not empty are first moved up to the top of the tree, so that neither the stack nor the number
/// of open files grows with the depth, which hostile layers make larger than any path.
pub fn remove_at(parent: impl AsFd, name: &CStr) -> io::Result<()> {
    let parent = parent.as_fd();
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTEMPTY | Errno::ACCESS) => {}
        Err(error) => return Err(error.into()),
    }
    let top = open_writable(parent, name)?;
    let mut serial = 0u64;
    loop {
        let names = names(&top)?;
        if names.is_empty() {
            break;
        }
        for child in names {
            match rustix::fs::unlinkat(&top, &*child, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => continue,
                Err(Errno::ISDIR | Errno::PERM) => {}
                Err(error) => return Err(error.into()),
            }
            empty_upwards(top.as_fd(), &child, &mut serial)?;
        }
    }
    match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Removes the files of `top/name`, moves its folders up into `top`, and removes it.
fn empty_upwards(top: BorrowedFd<'_>, name: &CStr, serial: &mut u64) -> io::Result<()> {
    match rustix::fs::unlinkat(top, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTEMPTY | Errno::ACCESS) => {}
        Err(error) => return Err(error.into()),
    }
    let directory = open_writable(top, name)?;
    for child in names(&directory)? {
        match rustix::fs::unlinkat(&directory, &*child, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
        match rustix::fs::unlinkat(&directory, &*child, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(_) => {}
        }
        drop(open_writable(directory.as_fd(), &child)?);
        loop {
            *serial += 1;
            let aside = format!(".berth-removing-{serial}");
            match rustix::fs::renameat_with(
                &directory,
                &*child,
                top,
                aside.as_str(),
                rustix::fs::RenameFlags::NOREPLACE,
            ) {
                Ok(()) => break,
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(rustix::fs::unlinkat(top, name, AtFlags::REMOVEDIR)?)
}

/// Opens a folder that is to be emptied; without privileges its own bits may be in the way.
fn open_writable(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    if !rustix::process::geteuid().is_root() {
        let _ = rustix::fs::chmodat(parent, name, Mode::RWXU, AtFlags::empty());
    }
    Ok(rustix::fs::openat(
        parent,
        name,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// A path through the descriptor, for the calls that know no other way to name an `O_PATH` file.
pub(crate) fn proc_path(fd: BorrowedFd<'_>) -> String {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// All extended attributes of an open file; none where the file system has none.
pub fn attributes(path: &str) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut list = vec![0u8; 1024];
    let length = loop {
        match rustix::fs::listxattr(path, &mut list[..]) {
            Ok(length) => break length,
            Err(Errno::RANGE) if list.len() < 1 << 20 => list.resize(list.len() * 4, 0),
            Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        }
    };
    let mut found = Vec::new();
    for name in list[..length].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let mut value = vec![0u8; 256];
        loop {
            match rustix::fs::getxattr(path, name, &mut value[..]) {
                Ok(length) => {
                    value.truncate(length);
                    found.push((name.to_vec(), value));
                    break;
                }
                Err(Errno::RANGE) if value.len() < 1 << 20 => value.resize(value.len() * 4, 0),
                Err(Errno::NODATA | Errno::OPNOTSUPP) => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(found)
}

/// Whether a folder is marked as hiding what lower layers have beneath it.
pub fn is_opaque(directory: BorrowedFd<'_>) -> bool {
    let mut value = [0u8; 8];
    let path = proc_path(directory);
    ["trusted.overlay.opaque", "user.overlay.opaque"]
        .iter()
        .any(|name| {
            matches!(rustix::fs::getxattr(&*path, *name, &mut value[..]), Ok(1)) && value[0] == b'y'
        })
}

/// A fresh folder of mode 0700, removed on drop unless kept.
#[derive(Debug)]
pub struct Scratch(Option<std::path::PathBuf>);

impl Scratch {
    /// Makes it.
    pub fn create(path: std::path::PathBuf) -> io::Result<Scratch> {
        rustix::fs::mkdirat(CWD, &path, Mode::RWXU)?;
        Ok(Scratch(Some(path)))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.as_deref().unwrap_or(Path::new(""))
    }

    /// Renames it to `target`, where it stays.
    pub fn keep_as(mut self, target: &Path) -> io::Result<()> {
        std::fs::rename(self.path(), target)?;
        self.0 = None;
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(path) = self.0.take()
            && let Err(error) = remove_all(&path)
        {
            tracing::warn!(path = %path.display(), %error, "a scratch folder could not be removed");
        }
    }
}

/// Bytes free for this user on the file system of `fd`.
pub fn free_bytes(fd: impl AsFd) -> io::Result<u64> {
    let stat = rustix::fs::fstatvfs(fd)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// A file from a descriptor opened in a tree.
pub fn file(fd: OwnedFd) -> File {
    File::from(fd)
}

/// Bytes as they are in a path.
pub fn os(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_deeper_than_any_path_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let top = directory.path().join("top");
        std::fs::create_dir(&top).unwrap();
        let mut here = open_root(&top).unwrap();
        for _ in 0..2500 {
            rustix::fs::mkdirat(&here, "deeper", Mode::RWXU).unwrap();
            std::fs::write(proc_path(here.as_fd()) + "/file", b"x").unwrap();
            here = rustix::fs::openat(
                &here,
                "deeper",
                OFlags::DIRECTORY | OFlags::RDONLY,
                Mode::empty(),
            )
            .unwrap();
        }
        remove_all(&top).unwrap();
        assert!(!top.exists());
    }

    #[test]
    fn a_link_is_removed_and_not_what_it_names() {
        let directory = tempfile::tempdir().unwrap();
        let (kept, link) = (directory.path().join("kept"), directory.path().join("link"));
        std::fs::create_dir(&kept).unwrap();
        std::fs::write(kept.join("file"), b"x").unwrap();
        std::os::unix::fs::symlink(&kept, &link).unwrap();
        remove_all(&link).unwrap();
        remove_all(&link).unwrap();
        assert!(kept.join("file").exists());
    }

    #[test]
    fn paths_are_cleaned_and_dots_refused() {
        assert_eq!(clean(b"/./a//b/").unwrap(), b"a/b");
        assert_eq!(clean(b"./").unwrap(), b"");
        assert!(clean(b"a/../b").is_none());
        assert!(clean(b"a\0b").is_none());
        assert_eq!(normal(b"/a/./b//../c/../../../d/"), b"d");
        assert_eq!(normal_inside(b"a/../b/").unwrap(), b"b");
        assert!(normal_inside(b"a/../../b").is_none() && normal_inside(b"\0").is_none());
    }
}
