//! Packs a folder into a tar: a container's changes into a layer, or a whole file system into an archive.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, Stat};

use super::tar::{Entry, EntryKind, TarWriter};
use super::{is_overlay_attribute, tree};

/// What to make of overlayfs' marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marks {
    /// The folder is an upper or lower one: whiteouts and opaque folders become `.wh.` entries.
    Translate,
    /// The folder is a merged view or an ordinary one, which has none.
    Ignore,
}

/// Packs everything beneath `root`, without the root itself, in sorted order.
///
/// Sockets are left out: they mean nothing without their process. A file that changes its size meanwhile is cut or
/// filled with zeros, so that the archive stays whole.
pub fn pack<W: Write>(
    root: BorrowedFd<'_>,
    tar: &mut TarWriter<W>,
    marks: Marks,
) -> io::Result<()> {
    let mut packer = Packer {
        tar,
        marks,
        links: HashMap::new(),
        buffer: vec![0; 128 << 10],
    };
    packer.tree(root, b"", b"")
}

/// Packs `name` of the folder `parent`, a file or a tree, under the name `as_name`.
pub fn pack_one<W: Write>(
    parent: BorrowedFd<'_>,
    name: &[u8],
    as_name: &[u8],
    tar: &mut TarWriter<W>,
) -> io::Result<()> {
    let mut packer = Packer {
        tar,
        marks: Marks::Ignore,
        links: HashMap::new(),
        buffer: vec![0; 128 << 10],
    };
    let name = CString::new(name)?;
    if packer.one(parent, &name, as_name.to_vec())? {
        let directory = open_directory(parent, &name)?;
        packer.tree(directory.as_fd(), b"", as_name)?;
    }
    Ok(())
}

struct Packer<'a, W> {
    tar: &'a mut TarWriter<W>,
    marks: Marks,
    /// Where a file with several names was packed first.
    links: HashMap<(u64, u64), Vec<u8>>,
    buffer: Vec<u8>,
}

fn open_directory(parent: BorrowedFd<'_>, name: &CString) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(
        parent,
        &**name,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

pub(crate) fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    if folder.is_empty() {
        name.to_vec()
    } else {
        [folder, b"/", name].concat()
    }
}

impl<W: Write> Packer<'_, W> {
    /// Packs what is in `root/top`, calling it `prefix/…`.
    fn tree(&mut self, root: BorrowedFd<'_>, top: &[u8], prefix: &[u8]) -> io::Result<()> {
        let mut pending: Vec<(Vec<u8>, Vec<u8>)> = vec![(top.to_vec(), prefix.to_vec())];
        while let Some((path, called)) = pending.pop() {
            let directory = tree::open_in(root, &path, OFlags::RDONLY | OFlags::DIRECTORY)?;
            if self.marks == Marks::Translate && tree::is_opaque(directory.as_fd()) {
                self.tar.entry(&Entry::new(
                    EntryKind::File,
                    join(&called, b".wh..wh..opq"),
                    0o600,
                ))?;
            }
            let mut folders = Vec::new();
            for name in tree::names(&directory)? {
                let called = join(&called, name.as_bytes());
                if self.one(directory.as_fd(), &name, called.clone())? {
                    folders.push((join(&path, name.as_bytes()), called));
                }
            }
            pending.extend(folders.into_iter().rev());
        }
        Ok(())
    }

    /// Packs one file; true where it is a folder whose content is still to come.
    fn one(&mut self, parent: BorrowedFd<'_>, name: &CString, called: Vec<u8>) -> io::Result<bool> {
        let Some(stat) = tree::stat_at(parent, name.as_bytes())? else {
            return Ok(false);
        };
        let kind = tree::file_type(&stat);
        if self.marks == Marks::Translate && tree::is_whiteout(&stat) {
            let (folder, last) = tree::split(&called);
            let mark = join(folder, &[b".wh.", last].concat());
            self.tar.entry(&Entry::new(EntryKind::File, mark, 0o600))?;
            return Ok(false);
        }
        let entry_kind = match kind {
            FileType::RegularFile => EntryKind::File,
            FileType::Directory => EntryKind::Directory,
            FileType::Symlink => EntryKind::Symlink,
            FileType::CharacterDevice => EntryKind::Char,
            FileType::BlockDevice => EntryKind::Block,
            FileType::Fifo => EntryKind::Fifo,
            _ => return Ok(false),
        };
        let mut entry = describe(entry_kind, called, &stat);
        if kind != FileType::Directory && stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)) {
                entry.kind = EntryKind::HardLink;
                entry.link = first.clone();
                entry.size = 0;
                self.tar.entry(&entry)?;
                return Ok(false);
            }
            self.links
                .insert((stat.st_dev, stat.st_ino), entry.path.clone());
        }
        match kind {
            FileType::Symlink => {
                entry.link = rustix::fs::readlinkat(parent, &**name, Vec::new())?.into_bytes();
                self.tar.entry(&entry)?;
                Ok(false)
            }
            FileType::Directory => {
                let directory = open_directory(parent, name)?;
                entry.xattrs = kept_attributes(directory.as_fd())?;
                self.tar.entry(&entry)?;
                Ok(true)
            }
            FileType::RegularFile => {
                let file = rustix::fs::openat(
                    parent,
                    &**name,
                    OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC,
                    Mode::empty(),
                )?;
                entry.xattrs = kept_attributes(file.as_fd())?;
                self.tar.entry(&entry)?;
                self.content(File::from(file), entry.size)?;
                Ok(false)
            }
            _ => {
                self.tar.entry(&entry)?;
                Ok(false)
            }
        }
    }

    fn content(&mut self, mut file: File, size: u64) -> io::Result<()> {
        let mut left = size;
        while left > 0 {
            let part = (self.buffer.len() as u64).min(left) as usize;
            let read = match file.read(&mut self.buffer[..part])? {
                0 => {
                    self.buffer[..part].fill(0);
                    part
                }
                read => read,
            };
            self.tar.write_all(&self.buffer[..read])?;
            left -= read as u64;
        }
        Ok(())
    }
}

/// An entry as a stat describes it.
pub(crate) fn describe(kind: EntryKind, path: Vec<u8>, stat: &Stat) -> Entry {
    Entry {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: if kind == EntryKind::File {
            stat.st_size.max(0) as u64
        } else {
            0
        },
        mtime: (stat.st_mtime, stat.st_mtime_nsec as u32),
        major: rustix::fs::major(stat.st_rdev),
        minor: rustix::fs::minor(stat.st_rdev),
        ..Entry::new(kind, path, 0)
    }
}

pub(crate) fn kept_attributes(
    file: BorrowedFd<'_>,
) -> io::Result<std::collections::BTreeMap<Vec<u8>, Vec<u8>>> {
    Ok(tree::attributes(&tree::proc_path(file))?
        .into_iter()
        // Labels belong to the host; capabilities, user attributes and access lists to the file.
        .filter(|(name, _)| {
            !is_overlay_attribute(name)
                && (!name.starts_with(b"security.") || name == b"security.capability")
        })
        .collect())
}
