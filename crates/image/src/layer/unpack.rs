//! Unpacks a layer's tar into a folder that overlayfs can stack (OCI image specification, layer.md; kernel
//! documentation, filesystems/overlayfs).
//!
//! The tar is hostile until proven otherwise. Every name is resolved by openat2(2) with `RESOLVE_IN_ROOT` from the
//! folder's descriptor, so links inside the layer work as they would in a container and never lead out; the last
//! name is never followed; `..` is refused, as are hard links to what the layer does not hold.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::tar::{Entry, EntryKind, TarReader};
use super::{Limits, is_overlay_attribute, opaque_attribute, tree};
use crate::progress::Cancel;
use crate::{Error, Result};

/// What was unpacked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Bytes of all files.
    pub size: u64,
    pub entries: u64,
    /// Folders that had to be made though the tar does not describe them: their owner and mode belong to the
    /// layers beneath. The empty path is the root.
    pub implied: BTreeSet<Vec<u8>>,
    /// The root itself is marked as hiding everything in the layers beneath.
    pub hides_beneath: bool,
}

/// How to unpack into a tree that is in use, rather than into a layer: whiteouts are ordinary names there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CopyInto {
    /// The folder in the tree, clean; links in it are followed inside the tree.
    pub folder: Vec<u8>,
    /// Everything gets this owner and group.
    pub owner: Option<(u32, u32)>,
    /// Everything gets these permission bits.
    pub mode: Option<u32>,
    /// Refuse to replace a folder by a file or a file by a folder.
    pub keep_kinds: bool,
    /// Merge a folder entry into an existing folder without changing that folder's owner, mode and time.
    pub keep_folders: bool,
}

struct Directory {
    /// Owner and group, where they are not those of a new file.
    owner: Option<(u32, u32)>,
    mode: u32,
    mtime: (i64, u32),
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// Unpacks into one folder.
pub struct Unpacker<'a> {
    root: OwnedFd,
    limits: Limits,
    cancel: &'a Cancel,
    /// Whiteouts are kept only where there is something beneath to hide.
    lowest: bool,
    privileged: bool,
    /// Owner and group that new files have by themselves; `None` where that is not sure.
    native: Option<(u32, u32)>,
    copy: Option<CopyInto>,
    /// The folder of the last entry: most entries share it with the one before.
    parent: Option<(Vec<u8>, OwnedFd)>,
    directories: BTreeMap<Vec<u8>, Directory>,
    /// Bytes of what `directories` holds.
    kept: usize,
    done: Unpacked,
    until_space_check: u64,
    buffer: Vec<u8>,
}

const SPACE_CHECK: u64 = 64 << 20;
/// Bytes of folders' names and attributes, which are kept until the end.
const DIRECTORIES_LIMIT: usize = 128 << 20;

impl<'a> Unpacker<'a> {
    /// Prepares to unpack into the empty folder `root`. `lowest`: there is no layer beneath.
    pub fn new(
        root: &Path,
        lowest: bool,
        limits: Limits,
        cancel: &'a Cancel,
    ) -> Result<Unpacker<'a>> {
        let root = tree::open_root(root).map_err(|source| Error::Io {
            what: root.display().to_string(),
            source,
        })?;
        let mut done = Unpacked::default();
        done.implied.insert(Vec::new());
        let native = native_owner(&root).map_err(|errno| Error::Io {
            what: "the layer's folder".to_owned(),
            source: errno.into(),
        })?;
        Ok(Unpacker {
            native,
            root,
            limits,
            cancel,
            lowest,
            privileged: rustix::process::geteuid().is_root(),
            copy: None,
            parent: None,
            directories: BTreeMap::new(),
            kept: 0,
            done,
            until_space_check: 0,
            buffer: vec![0; 128 << 10],
        })
    }

    /// Prepares to unpack into a tree that is in use.
    pub fn into_tree(
        root: OwnedFd,
        copy: CopyInto,
        limits: Limits,
        cancel: &'a Cancel,
    ) -> Unpacker<'a> {
        Unpacker {
            native: None,
            root,
            limits,
            cancel,
            lowest: true,
            privileged: rustix::process::geteuid().is_root(),
            copy: Some(copy),
            parent: None,
            directories: BTreeMap::new(),
            kept: 0,
            done: Unpacked::default(),
            until_space_check: 0,
            buffer: vec![0; 128 << 10],
        }
    }

    /// Unpacks all of `tar`, to its very last byte.
    ///
    /// # Errors
    /// [`Error::HostileEntry`], [`Error::LayerLimit`], [`Error::DamagedLayer`], [`Error::NoRoom`]; what was unpacked
    /// so far is then the caller's to remove.
    pub fn unpack<R: Read>(mut self, tar: &mut TarReader<R>) -> Result<Unpacked> {
        loop {
            let entry = match tar.next_entry() {
                Ok(Some(entry)) => entry,
                Ok(None) => break,
                Err(error) => return Err(damaged(error)),
            };
            self.cancel.check()?;
            self.done.entries += 1;
            if self.done.entries > self.limits.entries {
                return Err(Error::LayerLimit(format!(
                    "it holds more than {} entries",
                    self.limits.entries
                )));
            }
            match &self.copy {
                None => self.entry(&entry, tar)?,
                Some(copy) => {
                    let entry = copy.adapt(entry);
                    self.entry(&entry, tar)?;
                }
            }
        }
        self.finish()
    }

    fn entry<R: Read>(&mut self, entry: &Entry, tar: &mut TarReader<R>) -> Result<()> {
        let hostile = |why: &str| Error::HostileEntry {
            entry: lossy(&entry.path),
            why: why.to_owned(),
        };
        let mut path = tree::clean(&entry.path)
            .ok_or_else(|| hostile("its name holds \"..\" or a NUL byte"))?;
        if let Some(copy) = &self.copy {
            if path.is_empty() {
                return Ok(());
            }
            path = super::pack::join(&copy.folder, &path);
        }
        if path.is_empty() {
            if entry.kind != EntryKind::Directory {
                return Err(hostile("it would replace the root itself"));
            }
            self.done.implied.remove(&path);
            self.own_directory(path, entry)?;
            return Ok(());
        }
        let (folder, name) = tree::split(&path);
        if name.len() > 255 {
            return Err(hostile("a name longer than 255 bytes"));
        }
        let parent = self.parent(folder, entry)?;
        let name = CString::new(name).map_err(|_| hostile("its name holds a NUL byte"))?;
        if let Some(hidden) = name
            .as_bytes()
            .strip_prefix(b".wh.")
            .filter(|_| self.copy.is_none())
        {
            let result = self.whiteout(&parent, folder, hidden, entry);
            self.parent = Some((folder.to_vec(), parent));
            return result;
        }
        let at = |errno: Errno| entry_error(entry, errno);
        let mut hides = false;
        // Twice at most: what is in the way is removed before the second.
        for attempt in 0..2 {
            let result = match entry.kind {
                EntryKind::File => rustix::fs::openat(
                    &parent,
                    &*name,
                    OFlags::WRONLY
                        | OFlags::CREATE
                        | OFlags::EXCL
                        | OFlags::NOFOLLOW
                        | OFlags::CLOEXEC,
                    Mode::RUSR | Mode::WUSR,
                )
                .map(Some),
                EntryKind::Directory => {
                    rustix::fs::mkdirat(&parent, &*name, Mode::RWXU).map(|()| None)
                }
                EntryKind::Symlink => {
                    rustix::fs::symlinkat(&entry.link[..], &parent, &*name).map(|()| None)
                }
                EntryKind::HardLink => self.hard_link(entry, &parent, &name)?.map(|()| None),
                EntryKind::Fifo => {
                    rustix::fs::mknodat(&parent, &*name, FileType::Fifo, Mode::RUSR, 0)
                        .map(|()| None)
                }
                EntryKind::Char | EntryKind::Block => {
                    let kind = if entry.kind == EntryKind::Char {
                        FileType::CharacterDevice
                    } else {
                        FileType::BlockDevice
                    };
                    let device = rustix::fs::makedev(entry.major, entry.minor);
                    match rustix::fs::mknodat(&parent, &*name, kind, Mode::RUSR, device) {
                        // Only the host's root makes devices, and containers get theirs from the runtime.
                        Err(Errno::PERM) if !self.privileged || base::userns::inside() => {
                            self.parent = Some((folder.to_vec(), parent));
                            return Ok(());
                        }
                        other => other.map(|()| None),
                    }
                }
            };
            match result {
                Ok(file) => {
                    match file {
                        Some(file) => self.content(file, entry, tar)?,
                        None if entry.kind == EntryKind::Directory => {
                            if hides {
                                self.mark_opaque(&parent, &name)?;
                            }
                        }
                        None if entry.kind == EntryKind::HardLink => {}
                        None => self.own_special(&parent, &name, entry).map_err(at)?,
                    }
                    break;
                }
                Err(Errno::EXIST) if attempt == 0 => {
                    let existing =
                        tree::stat_at(&parent, name.as_bytes()).map_err(|e| at(errno_of(&e)))?;
                    let Some(existing) = existing else { continue };
                    let is_folder = tree::file_type(&existing) == FileType::Directory;
                    if is_folder && entry.kind == EntryKind::Directory {
                        if self.copy.as_ref().is_some_and(|c| c.keep_folders) {
                            self.parent = Some((folder.to_vec(), parent));
                            return Ok(());
                        }
                        break;
                    }
                    if self.copy.as_ref().is_some_and(|c| c.keep_kinds)
                        && is_folder != (entry.kind == EntryKind::Directory)
                    {
                        let (old, new) = if is_folder {
                            ("directory", "non-directory")
                        } else {
                            ("non-directory", "directory")
                        };
                        return Err(Error::Conflict(format!(
                            "cannot overwrite {old} {:?} with {new}",
                            lossy(&path)
                        )));
                    }
                    hides = tree::is_whiteout(&existing);
                    tree::remove_at(&parent, &name).map_err(|e| at(errno_of(&e)))?;
                }
                Err(errno) => return Err(at(errno)),
            }
        }
        if entry.kind == EntryKind::Directory {
            self.done.implied.remove(&path);
            self.own_directory(path.clone(), entry)?;
        }
        self.parent = Some((folder.to_vec(), parent));
        Ok(())
    }

    /// The descriptor of an entry's folder, made where the tar does not mention it.
    fn parent(&mut self, folder: &[u8], entry: &Entry) -> Result<OwnedFd> {
        if let Some((path, fd)) = self.parent.take()
            && path == folder
            // In a tree in use others may have removed it: then it has no links left, and entries would be lost.
            && (self.copy.is_none() || rustix::fs::fstat(&fd).is_ok_and(|s| s.st_nlink > 0))
        {
            return Ok(fd);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        match tree::open_in(&self.root, folder, flags) {
            Ok(fd) => return Ok(fd),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(errno) => return Err(entry_error(entry, errno)),
        }
        let mut here = tree::open_in(&self.root, b"", flags).map_err(|e| entry_error(entry, e))?;
        let mut end = 0;
        for component in folder.split(|b| *b == b'/') {
            end += component.len();
            let path = &folder[..end];
            end += 1;
            here = match tree::open_in(&self.root, path, flags) {
                Ok(fd) => fd,
                Err(Errno::NOENT) => {
                    self.count_implied()?;
                    rustix::fs::mkdirat(&here, component, Mode::RWXU).map_err(
                        |errno| match errno {
                            Errno::EXIST => Error::HostileEntry {
                                entry: lossy(&entry.path),
                                why: format!("its folder {:?} is a link to nothing", lossy(path)),
                            },
                            errno => entry_error(entry, errno),
                        },
                    )?;
                    self.imply(path);
                    tree::open_in(&self.root, path, flags).map_err(|e| entry_error(entry, e))?
                }
                Err(Errno::NOTDIR) => {
                    let stat = tree::stat_at(&here, component)
                        .map_err(|e| entry_error(entry, errno_of(&e)))?;
                    if !stat.is_some_and(|s| tree::is_whiteout(&s)) {
                        return Err(Error::HostileEntry {
                            entry: lossy(&entry.path),
                            why: format!("its folder {:?} is not a folder", lossy(path)),
                        });
                    }
                    // Removed beneath and made anew in this layer.
                    let name = CString::new(component).unwrap_or_default();
                    rustix::fs::unlinkat(&here, &*name, AtFlags::empty())
                        .map_err(|e| entry_error(entry, e))?;
                    rustix::fs::mkdirat(&here, &*name, Mode::RWXU)
                        .map_err(|e| entry_error(entry, e))?;
                    self.mark_opaque(&here, &name)?;
                    self.imply(path);
                    tree::open_in(&self.root, path, flags).map_err(|e| entry_error(entry, e))?
                }
                Err(errno) => return Err(entry_error(entry, errno)),
            };
        }
        Ok(here)
    }

    fn count_implied(&mut self) -> Result<()> {
        self.done.entries += 1;
        if self.done.entries > self.limits.entries {
            return Err(Error::LayerLimit(format!(
                "it holds more than {} entries",
                self.limits.entries
            )));
        }
        Ok(())
    }

    fn imply(&mut self, path: &[u8]) {
        self.done.implied.insert(path.to_vec());
        let directory = Directory {
            owner: None,
            mode: 0o755,
            mtime: (0, 0),
            xattrs: BTreeMap::new(),
        };
        self.directories.insert(path.to_vec(), directory);
    }

    fn own_directory(&mut self, path: Vec<u8>, entry: &Entry) -> Result<()> {
        let attributes = entry.xattrs.iter().map(|(k, v)| k.len() + v.len());
        self.kept += path.len() + attributes.sum::<usize>();
        if self.kept > DIRECTORIES_LIMIT {
            return Err(Error::LayerLimit(format!(
                "the layer's folders have more than {} MiB of names and attributes",
                DIRECTORIES_LIMIT >> 20
            )));
        }
        let directory = Directory {
            owner: self.is_foreign(entry).then_some((entry.uid, entry.gid)),
            mode: entry.mode,
            mtime: entry.mtime,
            xattrs: entry.xattrs.clone(),
        };
        self.directories.insert(path, directory);
        Ok(())
    }

    /// Whether an entry's owner must be set.
    fn is_foreign(&self, entry: &Entry) -> bool {
        self.privileged && self.native != Some((entry.uid, entry.gid))
    }

    fn own_special(
        &self,
        parent: &OwnedFd,
        name: &CString,
        entry: &Entry,
    ) -> rustix::io::Result<()> {
        if self.is_foreign(entry) {
            rustix::fs::chownat(
                parent,
                &**name,
                uid(entry.uid),
                gid(entry.gid),
                AtFlags::SYMLINK_NOFOLLOW,
            )?;
        }
        if entry.kind != EntryKind::Symlink {
            // chmod after chown, which clears setuid and setgid; just created, so not a link.
            rustix::fs::chmodat(
                parent,
                &**name,
                Mode::from_raw_mode(entry.mode),
                AtFlags::empty(),
            )?;
        }
        rustix::fs::utimensat(
            parent,
            &**name,
            &times(entry.mtime),
            AtFlags::SYMLINK_NOFOLLOW,
        )
    }

    fn hard_link(
        &self,
        entry: &Entry,
        parent: &OwnedFd,
        name: &CString,
    ) -> Result<rustix::io::Result<()>> {
        let hostile = |why: String| Error::HostileEntry {
            entry: lossy(&entry.path),
            why,
        };
        let mut target = tree::clean(&entry.link)
            .filter(|t| !t.is_empty())
            .ok_or_else(|| {
                hostile(format!(
                    "a hard link to {:?}, out of the tree",
                    lossy(&entry.link)
                ))
            })?;
        if let Some(copy) = &self.copy {
            target = super::pack::join(&copy.folder, &target);
        }
        let (folder, last) = tree::split(&target);
        let missing = || {
            hostile(format!(
                "a hard link to {:?}, which this layer does not hold",
                lossy(&target)
            ))
        };
        let from = tree::open_in(&self.root, folder, OFlags::PATH | OFlags::DIRECTORY).map_err(
            |e| match e {
                Errno::NOENT | Errno::NOTDIR => missing(),
                e => entry_error(entry, e),
            },
        )?;
        let stat = tree::stat_at(&from, last)
            .map_err(|e| entry_error(entry, errno_of(&e)))?
            .ok_or_else(missing)?;
        if tree::file_type(&stat) == FileType::Directory {
            return Err(hostile(format!(
                "a hard link to the folder {:?}",
                lossy(&target)
            )));
        }
        if let Some(own) =
            tree::stat_at(parent, name.as_bytes()).map_err(|e| entry_error(entry, errno_of(&e)))?
            && (own.st_dev, own.st_ino) == (stat.st_dev, stat.st_ino)
        {
            // It is that very file already; removing it first would lose it.
            return Ok(Ok(()));
        }
        Ok(rustix::fs::linkat(
            &from,
            last,
            parent,
            &**name,
            AtFlags::empty(),
        ))
    }

    fn whiteout(
        &mut self,
        parent: &OwnedFd,
        folder: &[u8],
        hidden: &[u8],
        entry: &Entry,
    ) -> Result<()> {
        let at = |errno| entry_error(entry, errno);
        if hidden == b".wh..opq" {
            if folder.is_empty() {
                self.done.hides_beneath = !self.lowest;
            } else if !self.lowest {
                let directory =
                    tree::open_in(&self.root, folder, OFlags::RDONLY | OFlags::DIRECTORY)
                        .map_err(at)?;
                set_attribute(&directory, opaque_attribute().as_bytes(), b"y").map_err(at)?;
            }
            return Ok(());
        }
        if hidden.starts_with(b".wh.") {
            // aufs kept books under such names; nobody reads them.
            return Ok(());
        }
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(Error::HostileEntry {
                entry: lossy(&entry.path),
                why: "a whiteout of no name".to_owned(),
            });
        }
        if self.lowest {
            return Ok(());
        }
        let name = CString::new(hidden).unwrap_or_default();
        match rustix::fs::mknodat(parent, &*name, FileType::CharacterDevice, Mode::empty(), 0) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => {
                // A whiteout speaks of lower layers only: what this layer itself holds there stays.
                let stat = tree::stat_at(parent, hidden).map_err(|e| at(errno_of(&e)))?;
                if stat.is_some_and(|s| tree::file_type(&s) == FileType::Directory) {
                    self.mark_opaque(parent, &name)?;
                }
                Ok(())
            }
            Err(errno) => Err(at(errno)),
        }
    }

    fn mark_opaque(&self, parent: &OwnedFd, name: &CString) -> Result<()> {
        let what = || name.to_string_lossy().into_owned();
        rustix::fs::openat(
            parent,
            &**name,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .and_then(|directory| set_attribute(&directory, opaque_attribute().as_bytes(), b"y"))
        .map_err(|errno| Error::Io {
            what: what(),
            source: errno.into(),
        })
    }

    fn content<R: Read>(
        &mut self,
        file: OwnedFd,
        entry: &Entry,
        tar: &mut TarReader<R>,
    ) -> Result<()> {
        let at = |errno| entry_error(entry, errno);
        let mut file = File::from(file);
        match &entry.sparse {
            None => {
                let mut left = entry.size;
                while left > 0 {
                    let part = (self.buffer.len() as u64).min(left) as usize;
                    let read = tar.read(&mut self.buffer[..part]).map_err(damaged)?;
                    if read == 0 {
                        return Err(Error::DamagedLayer("it is cut".to_owned()));
                    }
                    self.room(read as u64)?;
                    file.write_all(&self.buffer[..read])
                        .map_err(|e| at(errno_of(&e)))?;
                    left -= read as u64;
                }
            }
            Some(map) => {
                for (offset, length) in map {
                    let (mut offset, end) = (*offset, offset + length);
                    while offset < end {
                        let part = (self.buffer.len() as u64).min(end - offset) as usize;
                        let read = tar.read(&mut self.buffer[..part]).map_err(damaged)?;
                        if read == 0 {
                            return Err(Error::DamagedLayer("it is cut".to_owned()));
                        }
                        self.room(read as u64)?;
                        file.write_all_at(&self.buffer[..read], offset)
                            .map_err(|e| at(errno_of(&e)))?;
                        offset += read as u64;
                    }
                }
                file.set_len(entry.size).map_err(|e| at(errno_of(&e)))?;
            }
        }
        if self.is_foreign(entry) {
            rustix::fs::fchown(&file, uid(entry.uid), gid(entry.gid)).map_err(at)?;
        }
        rustix::fs::fchmod(&file, Mode::from_raw_mode(entry.mode)).map_err(at)?;
        // Capabilities come last: a change of owner takes them away.
        self.attributes(&file, &entry.xattrs).map_err(at)?;
        rustix::fs::futimens(&file, &times(entry.mtime)).map_err(at)
    }

    fn attributes(
        &self,
        file: impl AsFd,
        xattrs: &BTreeMap<Vec<u8>, Vec<u8>>,
    ) -> rustix::io::Result<()> {
        for (name, value) in xattrs {
            if is_overlay_attribute(name) {
                continue;
            }
            match set_attribute(&file, name, value) {
                Ok(()) | Err(Errno::OPNOTSUPP) => {}
                // Labels of another host's security module, or no privileges: the file is good without.
                Err(Errno::PERM | Errno::INVAL | Errno::NODATA)
                    if !self.privileged || !name.starts_with(b"security.capability") => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn room(&mut self, bytes: u64) -> Result<()> {
        self.done.size += bytes;
        if self.done.size > self.limits.bytes {
            return Err(Error::LayerLimit(format!(
                "it holds more than {}",
                base::units::format_size(self.limits.bytes)
            )));
        }
        if self.until_space_check > bytes {
            self.until_space_check -= bytes;
            return Ok(());
        }
        self.until_space_check = SPACE_CHECK;
        self.cancel.check()?;
        let free = tree::free_bytes(&self.root).unwrap_or(u64::MAX);
        if free < self.limits.keep_free {
            return Err(Error::NoRoom(format!(
                "unpacking the layer would leave less than {} free on the disk",
                base::units::format_size(self.limits.keep_free)
            )));
        }
        Ok(())
    }

    /// Folders get their times and modes last, since filling them changes the one and may need the other.
    fn finish(self) -> Result<Unpacked> {
        for (path, directory) in self.directories.iter().rev() {
            let fd = match tree::open_in(
                &self.root,
                path,
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW,
            ) {
                Ok(fd) => fd,
                // Replaced by another entry since.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(errno) => {
                    return Err(Error::Io {
                        what: lossy(path),
                        source: errno.into(),
                    });
                }
            };
            let owned = match directory.owner {
                Some((user, group)) => rustix::fs::fchown(&fd, uid(user), gid(group)),
                None => Ok(()),
            };
            owned
                .and_then(|()| self.attributes(&fd, &directory.xattrs))
                .and_then(|()| rustix::fs::fchmod(&fd, Mode::from_raw_mode(directory.mode)))
                .and_then(|()| rustix::fs::futimens(&fd, &times(directory.mtime)))
                .map_err(|errno| Error::Io {
                    what: lossy(path),
                    source: errno.into(),
                })?;
        }
        Ok(self.done)
    }
}

impl CopyInto {
    fn adapt(&self, mut entry: Entry) -> Entry {
        if let Some((uid, gid)) = self.owner {
            (entry.uid, entry.gid) = (uid, gid);
        }
        if let Some(mode) = self.mode {
            entry.mode = mode;
        }
        entry
    }
}

pub(crate) fn set_attribute(file: impl AsFd, name: &[u8], value: &[u8]) -> rustix::io::Result<()> {
    rustix::fs::fsetxattr(file, name, value, XattrFlags::empty())
}

fn uid(id: u32) -> Option<Uid> {
    // The value -1 means "leave it" to chown(2).
    (id != u32::MAX).then(|| Uid::from_raw(id))
}

fn gid(id: u32) -> Option<Gid> {
    (id != u32::MAX).then(|| Gid::from_raw(id))
}

/// Owner and group that files made in the fresh folder `root` have: the process' own, unless the folder passes on
/// its group (setgid, or a file system mounted with `grpid`).
fn native_owner(root: &OwnedFd) -> rustix::io::Result<Option<(u32, u32)>> {
    let stat = rustix::fs::fstat(root)?;
    let own = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let setgid = Mode::from_raw_mode(stat.st_mode).contains(Mode::SGID);
    Ok((!setgid && (stat.st_uid, stat.st_gid) == own).then_some(own))
}

pub(crate) fn times((seconds, nanoseconds): (i64, u32)) -> Timestamps {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: i64::from(nanoseconds),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

pub(crate) fn lossy(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    if text.chars().count() > 200 {
        text.chars().take(200).chain("…".chars()).collect()
    } else {
        text.into_owned()
    }
}

fn errno_of(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

fn entry_error(entry: &Entry, errno: Errno) -> Error {
    match errno {
        Errno::NOSPC | Errno::DQUOT => Error::NoRoom(format!(
            "unpacking {:?}: the disk is full",
            lossy(&entry.path)
        )),
        Errno::LOOP => Error::HostileEntry {
            entry: lossy(&entry.path),
            why: "its folder is a loop of links".to_owned(),
        },
        Errno::NAMETOOLONG => Error::HostileEntry {
            entry: lossy(&entry.path),
            why: "its name is too long".to_owned(),
        },
        errno => Error::Io {
            what: format!("unpacking {:?}", lossy(&entry.path)),
            source: errno.into(),
        },
    }
}

/// Errors carried through a reader: ours come out again as they went in.
pub(crate) fn damaged(error: io::Error) -> Error {
    if error.get_ref().is_some_and(|inner| inner.is::<Error>()) {
        let inner = error
            .into_inner()
            .and_then(|inner| inner.downcast::<Error>().ok());
        return inner.map_or(Error::DamagedLayer("unreadable".to_owned()), |boxed| *boxed);
    }
    Error::DamagedLayer(error.to_string())
}
