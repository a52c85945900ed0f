//! What overlayfs would show of stacked folders, looked up without mounting anything.

use std::ffi::{CStr, CString};
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
        for root in &self.0 {
            match walk(root, path)? {
                Walk::Absent { opaque: false } => {}
                Walk::Absent { opaque: true } | Walk::Hidden => return Ok(None),
                Walk::Here { found, .. } => return Ok(Some(found)),
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
        for root in &self.0 {
            let hidden = match walk(root, path)? {
                Walk::Absent { opaque } => opaque,
                Walk::Hidden => true,
                Walk::Here { found, opaque } => {
                    opaque
                        || tree::file_type(&found.stat) != FileType::Directory
                        || tree::is_opaque(open_folder(&found.parent, &found.name)?.as_fd())
                }
            };
            if hidden {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// What one layer says of a path.
enum Walk {
    /// Nothing; `opaque`: and what lower layers have there does not show either.
    Absent { opaque: bool },
    /// It was removed, or a part of the path is no folder here.
    Hidden,
    /// It has it; `opaque`: in a folder that hides what lower layers have.
    Here { found: Found, opaque: bool },
}

/// Follows the clean path `path` in one layer, links not followed.
fn walk(root: &OwnedFd, path: &[u8]) -> io::Result<Walk> {
    let mut here = open_folder(root, c".")?;
    let components: Vec<&[u8]> = path
        .split(|b| *b == b'/')
        .filter(|c| !c.is_empty())
        .collect();
    let Some((last, folders)) = components.split_last() else {
        let stat = rustix::fs::fstat(&here)?;
        let found = Found {
            parent: here,
            name: c".".to_owned(),
            stat,
        };
        return Ok(Walk::Here {
            found,
            opaque: false,
        });
    };
    let mut opaque = false;
    for folder in folders {
        match tree::stat_at(&here, folder)? {
            None => return Ok(Walk::Absent { opaque }),
            Some(stat) if tree::file_type(&stat) != FileType::Directory => return Ok(Walk::Hidden),
            Some(_) => {}
        }
        here = open_folder(&here, &CString::new(*folder)?)?;
        opaque |= tree::is_opaque(here.as_fd());
    }
    Ok(match tree::stat_at(&here, last)? {
        None => Walk::Absent { opaque },
        Some(stat) if tree::is_whiteout(&stat) => Walk::Hidden,
        Some(stat) => Walk::Here {
            found: Found {
                parent: here,
                name: CString::new(*last)?,
                stat,
            },
            opaque,
        },
    })
}

fn open_folder(parent: &OwnedFd, name: &CStr) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(
        parent,
        name,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}
