//! What overlayfs would show of stacked folders, looked up without mounting anything.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{FileType, Mode, OFlags, Stat};

use super::tree;

/// Folders of layers, topmost first.
#[derive(Debug)]
pub struct Stack(Vec<OwnedFd>);

/// Something found in a stack.
#[derive(Debug)]
pub struct Found {
    /// The folder it is in.
    pub parent: OwnedFd,
    pub name: CString,
    pub stat: Stat,
}

impl Stack {
    /// Opens folders, topmost first, as overlayfs' `lowerdir` lists them.
    pub fn open(layers: &[PathBuf]) -> io::Result<Stack> {
        layers
            .iter()
            .map(|path| tree::open_root(path))
            .collect::<io::Result<_>>()
            .map(Stack)
    }

    /// The topmost file or folder by the clean path `path`, links not followed; the empty path is the root.
    pub fn find(&self, path: &[u8]) -> io::Result<Option<Found>> {
        let components: Vec<&[u8]> = path
            .split(|b| *b == b'/')
            .filter(|c| !c.is_empty())
            .collect();
        'layers: for root in &self.0 {
            let mut here = rustix::fs::openat(
                root,
                ".",
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            let Some((last, folders)) = components.split_last() else {
                let stat = rustix::fs::fstat(&here)?;
                return Ok(Some(Found {
                    parent: here,
                    name: c".".to_owned(),
                    stat,
                }));
            };
            let mut opaque = false;
            for (i, component) in folders.iter().chain([last]).enumerate() {
                let Some(stat) = tree::stat_at(&here, component)? else {
                    if opaque {
                        return Ok(None);
                    }
                    continue 'layers;
                };
                if tree::is_whiteout(&stat) {
                    return Ok(None);
                }
                if i == folders.len() {
                    return Ok(Some(Found {
                        parent: here,
                        name: CString::new(*component)?,
                        stat,
                    }));
                }
                if tree::file_type(&stat) != FileType::Directory {
                    return Ok(None);
                }
                here = rustix::fs::openat(
                    &here,
                    *component,
                    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                    Mode::empty(),
                )?;
                opaque |= tree::is_opaque(here.as_fd());
            }
        }
        Ok(None)
    }

    /// The names in a folder as the stack shows it, sorted; none where it is no folder.
    pub fn names(&self, path: &[u8]) -> io::Result<Vec<CString>> {
        let mut shown = std::collections::BTreeMap::new();
        for (depth, root) in self.0.iter().enumerate() {
            let upper = Stack(
                self.0[..depth]
                    .iter()
                    .map(OwnedFd::try_clone)
                    .collect::<io::Result<_>>()?,
            );
            // Hidden as a whole by what lies above?
            if depth > 0 && upper.hides(path)? {
                break;
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            let Ok(directory) = tree::open_in(root, path, flags) else {
                continue;
            };
            for name in tree::names(&directory)? {
                if let Some(stat) = tree::stat_at(&directory, name.as_bytes())? {
                    shown.entry(name).or_insert(!tree::is_whiteout(&stat));
                }
            }
        }
        Ok(shown
            .into_iter()
            .filter(|(_, visible)| *visible)
            .map(|(name, _)| name)
            .collect())
    }

    /// Whether these layers hide what lies beneath them at `path`.
    fn hides(&self, path: &[u8]) -> io::Result<bool> {
        let components: Vec<&[u8]> = path
            .split(|b| *b == b'/')
            .filter(|c| !c.is_empty())
            .collect();
        'layers: for root in &self.0 {
            let mut here = rustix::fs::openat(
                root,
                ".",
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            for component in &components {
                let Some(stat) = tree::stat_at(&here, component)? else {
                    continue 'layers;
                };
                if tree::file_type(&stat) != FileType::Directory {
                    return Ok(true);
                }
                here = rustix::fs::openat(
                    &here,
                    *component,
                    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                    Mode::empty(),
                )?;
                if tree::is_opaque(here.as_fd()) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}
