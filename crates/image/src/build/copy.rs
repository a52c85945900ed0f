//! COPY and ADD: what is copied, its hash, and the copying itself.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::ignore::Ignore;
use crate::digest::Hasher;
use crate::error::At;
use crate::layer::tar::{EntryKind, TarWriter};
use crate::layer::unpack::{CopyInto, lossy};
use crate::layer::{compression, pack, tree};
use crate::store::wildcard;
use crate::{Digest, Error, Result};

/// One file or folder to copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    /// In the source's root, clean.
    pub from: Vec<u8>,
    /// Beneath the target; empty for the target itself.
    pub to: Vec<u8>,
    pub kind: FileType,
    /// The place in the list of sources as written.
    pub source: usize,
    /// Whether the source as written is a folder, whose content is copied.
    pub of_folder: bool,
}

/// Which of the files found are copied, and what they are called.
pub(super) struct Choice<'a> {
    /// Of the context; paths in the root.
    pub ignore: &'a Ignore,
    /// `--exclude`; paths in the source as written.
    pub excluded: &'a Ignore,
    /// `--parents`: sources keep their folders, from a `/./` in them on.
    pub parents: bool,
}

/// Finds what `sources` mean in `root`. Links at the end of a source are followed, inside the root.
pub(super) fn find(root: &OwnedFd, sources: &[String], choice: &Choice<'_>) -> Result<Vec<Item>> {
    let ignore = choice.ignore;
    let mut items = Vec::new();
    for (number, source) in sources.iter().enumerate() {
        let path = tree::normal_inside(source.as_bytes()).ok_or_else(|| {
            Error::Dockerfile(format!(
                "Forbidden path outside the build context: {source}"
            ))
        })?;
        let text = String::from_utf8_lossy(&path).into_owned();
        let matches = if text.contains(['*', '?', '[', '\\']) {
            expand(root, &text, ignore)?
        } else {
            vec![path]
        };
        let pivot = match source.split_once("/./") {
            Some((before, _)) if choice.parents => {
                tree::clean(before.as_bytes()).map_or(0, |b| b.len() + 1)
            }
            _ => 0,
        };
        let mut found = false;
        for path in matches {
            let shown = lossy(&path);
            let first = items.len();
            if !path.is_empty() && ignore.excludes(&shown) && !ignore.has_exceptions() {
                continue;
            }
            let fd = match tree::open_in(root, &path, OFlags::PATH) {
                Ok(fd) => fd,
                Err(Errno::NOENT | Errno::NOTDIR) => continue,
                Err(errno) => {
                    return Err(Error::Io {
                        what: shown,
                        source: errno.into(),
                    });
                }
            };
            found = true;
            let kind = tree::file_type(&rustix::fs::fstat(&fd).at(shown.as_ref())?);
            if kind == FileType::Directory {
                let top = Item {
                    from: path.clone(),
                    to: Vec::new(),
                    kind,
                    source: number,
                    of_folder: true,
                };
                items.push(top);
                walk(root, &path, number, ignore, &mut items)?;
            } else {
                let (_, name) = tree::split(&path);
                items.push(Item {
                    from: path.clone(),
                    to: name.to_vec(),
                    kind,
                    source: number,
                    of_folder: false,
                });
            }
            let new = items.split_off(first);
            let kept = new
                .into_iter()
                .filter(|item| !choice.excluded.excludes(&lossy(&item.to)));
            items.extend(kept.map(|mut item| {
                if choice.parents {
                    item.to = item.from.get(pivot..).unwrap_or_default().to_vec();
                }
                item
            }));
        }
        if !found {
            return Err(Error::Dockerfile(format!(
                "COPY failed: file not found in build context or excluded by .dockerignore: stat {source}: file does not exist"
            )));
        }
    }
    Ok(items)
}

fn expand(root: &OwnedFd, pattern: &str, ignore: &Ignore) -> Result<Vec<Vec<u8>>> {
    let mut found: Vec<Vec<u8>> = vec![Vec::new()];
    for component in pattern.split('/') {
        let mut next = Vec::new();
        for folder in found {
            let Ok(directory) = tree::open_in(root, &folder, OFlags::RDONLY | OFlags::DIRECTORY)
            else {
                continue;
            };
            for name in tree::names(&directory).doing(|| pattern.to_owned())? {
                if wildcard(component.as_bytes(), name.as_bytes()) {
                    next.push(pack::join(&folder, name.as_bytes()));
                }
            }
        }
        found = next;
    }
    found.retain(|path| !ignore.excludes(&lossy(path)));
    Ok(found)
}

fn walk(
    root: &OwnedFd,
    top: &[u8],
    source: usize,
    ignore: &Ignore,
    items: &mut Vec<Item>,
) -> Result<()> {
    let mut pending = vec![(top.to_vec(), Vec::new())];
    while let Some((from, to)) = pending.pop() {
        let directory =
            tree::open_in(root, &from, OFlags::RDONLY | OFlags::DIRECTORY).map_err(|errno| {
                Error::Io {
                    what: lossy(&from),
                    source: errno.into(),
                }
            })?;
        for name in tree::names(&directory).doing(|| lossy(&from))? {
            let (from, to) = (
                pack::join(&from, name.as_bytes()),
                pack::join(&to, name.as_bytes()),
            );
            let Some(stat) = tree::stat_at(&directory, name.as_bytes()).doing(|| lossy(&from))?
            else {
                continue;
            };
            let kind = tree::file_type(&stat);
            let excluded = ignore.excludes(&lossy(&from));
            if kind == FileType::Directory && (!excluded || ignore.has_exceptions()) {
                pending.push((from.clone(), to.clone()));
            }
            if !excluded {
                items.push(Item {
                    from,
                    to,
                    kind,
                    source,
                    of_folder: true,
                });
            }
        }
    }
    Ok(())
}

/// The hash of names, kinds, modes and contents; times do not count, and owners where they are kept.
pub(super) fn hash(root: &OwnedFd, items: &[Item], owners: bool) -> Result<Digest> {
    let mut sorted: Vec<&Item> = items.iter().collect();
    sorted.sort_by(|a, b| (a.source, &a.to).cmp(&(b.source, &b.to)));
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; 128 << 10];
    for item in sorted {
        let at = || lossy(&item.from);
        hasher.update(&(item.to.len() as u64).to_le_bytes());
        hasher.update(&item.to);
        let (parent, name) = opened(root, item)?;
        let Some(stat) = tree::stat_at(&parent, name.as_bytes()).doing(at)? else {
            continue;
        };
        hasher.update(&stat.st_mode.to_le_bytes());
        if owners {
            hasher.update(&stat.st_uid.to_le_bytes());
            hasher.update(&stat.st_gid.to_le_bytes());
        }
        match tree::file_type(&stat) {
            FileType::RegularFile => {
                hasher.update(&stat.st_size.to_le_bytes());
                let mut file = tree::file(open_file(&parent, &name).doing(at)?);
                loop {
                    let read = file.read(&mut buffer).doing(at)?;
                    if read == 0 {
                        break;
                    }
                    hasher.update(&buffer[..read]);
                }
            }
            FileType::Symlink => {
                hasher.update(
                    rustix::fs::readlinkat(&parent, &*name, Vec::new())
                        .doing(at)?
                        .as_bytes(),
                );
            }
            _ => {}
        }
    }
    Ok(hasher.finish())
}

/// The folder of an item and its name there. A source that was named itself is followed to what it is.
fn opened(root: &OwnedFd, item: &Item) -> Result<(OwnedFd, CString)> {
    let at = || lossy(&item.from);
    let mut path = item.from.clone();
    if !item.of_folder {
        // Up to the target, whose own name is not the copy's.
        for _ in 0..40 {
            let (folder, name) = tree::split(&path);
            let parent = tree::open_in(root, folder, OFlags::PATH | OFlags::DIRECTORY).doing(at)?;
            let Some(stat) = tree::stat_at(&parent, name).doing(at)? else {
                break;
            };
            if tree::file_type(&stat) != FileType::Symlink {
                break;
            }
            let target = rustix::fs::readlinkat(&parent, name, Vec::new())
                .doing(at)?
                .into_bytes();
            let joined = if target.starts_with(b"/") {
                target
            } else {
                pack::join(folder, &target)
            };
            path = tree::normal(&joined);
        }
    }
    let (folder, name) = tree::split(&path);
    let parent = tree::open_in(root, folder, OFlags::PATH | OFlags::DIRECTORY).doing(at)?;
    let name = if name.is_empty() {
        c".".to_owned()
    } else {
        CString::new(name).unwrap_or_default()
    };
    Ok((parent, name))
}

fn open_file(parent: &OwnedFd, name: &CString) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(
        parent,
        &**name,
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

/// What a copy does besides copying.
#[derive(Debug, Clone, Default)]
pub(super) struct Manner {
    /// Of all that is copied; as it is in the source where not given.
    pub owner: Option<(u32, u32)>,
    pub mode: Option<u32>,
    /// ADD: archives are unpacked.
    pub extract: bool,
    /// The target is a folder, whatever it looks like.
    pub into_folder: bool,
}

/// Copies the items into `target` (a path in the tree `into`): a folder where it ends with a slash, is one already,
/// or more than one thing is copied.
pub(super) fn copy(
    root: &OwnedFd,
    items: &[Item],
    into: &OwnedFd,
    target: &str,
    manner: &Manner,
) -> Result<()> {
    let cleaned = tree::normal(target.as_bytes());
    let folder_owner = manner.owner.unwrap_or((0, 0));
    let files = items.iter().filter(|i| !i.of_folder).count();
    let is_folder = manner.into_folder
        || target.ends_with('/')
        || target.ends_with("/.")
        || cleaned.is_empty()
        || files != 1
        || items.len() > 1
        || tree::open_in(into, &cleaned, OFlags::PATH | OFlags::DIRECTORY).is_ok();
    let mut plain = Vec::new();
    for item in items {
        if manner.extract && !item.of_folder && item.kind == FileType::RegularFile {
            let (parent, name) = opened(root, item)?;
            let file = || {
                open_file(&parent, &name)
                    .map(tree::file)
                    .doing(|| lossy(&item.from))
            };
            if let Some(tar) = archive(file()?, file()?)? {
                make_folder(into, &cleaned, folder_owner)?;
                let copy = CopyInto {
                    folder: cleaned.clone(),
                    keep_folders: true,
                    ..CopyInto::default()
                };
                crate::copy::unpack_into(into.try_clone().doing(|| target.to_owned())?, copy, tar)?;
                continue;
            }
        }
        plain.push(item);
    }
    if plain.is_empty() {
        return Ok(());
    }
    let (folder, rename) = if is_folder {
        (cleaned, None)
    } else {
        let (folder, name) = tree::split(&cleaned);
        (folder.to_vec(), Some(name.to_vec()))
    };
    make_folder(into, &folder, folder_owner)?;
    let (reader, writer) = io::pipe().doing(|| "a pipe".to_owned())?;
    let copy = CopyInto {
        folder,
        owner: manner.owner,
        mode: manner.mode,
        keep_folders: true,
        ..CopyInto::default()
    };
    let into = into.try_clone().doing(|| target.to_owned())?;
    std::thread::scope(|scope| {
        let writing = scope.spawn(move || -> Result<()> {
            let mut tar = TarWriter::new(io::BufWriter::with_capacity(256 << 10, writer));
            for item in plain {
                write_item(root, item, rename.as_deref(), &mut tar)?;
            }
            tar.finish().map(drop).doing(|| "copying".to_owned())
        });
        let unpacked = crate::copy::unpack_into(into, copy, reader);
        let written = writing.join().unwrap_or(Err(Error::Cancelled));
        unpacked.and(written)
    })
}

fn write_item(
    root: &OwnedFd,
    item: &Item,
    rename: Option<&[u8]>,
    tar: &mut TarWriter<impl Write>,
) -> Result<()> {
    let at = || lossy(&item.from);
    if item.to.is_empty() {
        return Ok(());
    }
    let (parent, name) = opened(root, item)?;
    let Some(stat) = tree::stat_at(&parent, name.as_bytes()).doing(at)? else {
        return Ok(());
    };
    let kind = match tree::file_type(&stat) {
        FileType::RegularFile => EntryKind::File,
        FileType::Directory => EntryKind::Directory,
        FileType::Symlink => EntryKind::Symlink,
        FileType::Fifo => EntryKind::Fifo,
        FileType::CharacterDevice => EntryKind::Char,
        FileType::BlockDevice => EntryKind::Block,
        _ => return Ok(()),
    };
    let to = rename.unwrap_or(&item.to).to_vec();
    let mut entry = pack::describe(kind, to, &stat);
    match kind {
        EntryKind::File => {
            let file = open_file(&parent, &name).doing(at)?;
            entry.xattrs = pack::kept_attributes(file.as_fd()).doing(at)?;
            tar.entry(&entry).doing(at)?;
            let copied = io::copy(&mut tree::file(file).take(entry.size), tar).doing(at)?;
            // A file that shrank meanwhile is filled up, so that the stream stays whole.
            io::copy(&mut io::repeat(0).take(entry.size - copied), tar)
                .map(drop)
                .doing(at)
        }
        EntryKind::Symlink => {
            entry.link = rustix::fs::readlinkat(&parent, &*name, Vec::new())
                .doing(at)?
                .into_bytes();
            tar.entry(&entry).doing(at)
        }
        _ => tar.entry(&entry).doing(at),
    }
}

/// Makes a folder and those above it; what is new belongs to `owner`.
pub(super) fn make_folder(root: &OwnedFd, path: &[u8], owner: (u32, u32)) -> Result<()> {
    let mut end = 0;
    for component in path.split(|b| *b == b'/').filter(|c| !c.is_empty()) {
        let parent = tree::open_in(root, &path[..end], OFlags::PATH | OFlags::DIRECTORY)
            .doing(|| lossy(path))?;
        end += component.len() + usize::from(end > 0);
        match rustix::fs::mkdirat(&parent, component, Mode::RWXU) {
            Ok(()) => {
                if owner != (0, 0) {
                    rustix::fs::chownat(
                        &parent,
                        component,
                        Some(rustix::fs::Uid::from_raw(owner.0)),
                        Some(rustix::fs::Gid::from_raw(owner.1)),
                        rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
                    )
                    .doing(|| lossy(path))?;
                }
                rustix::fs::chmodat(
                    &parent,
                    component,
                    Mode::from_raw_mode(0o755),
                    rustix::fs::AtFlags::empty(),
                )
                .doing(|| lossy(path))?;
            }
            Err(Errno::EXIST) => {
                tree::open_in(root, &path[..end], OFlags::PATH | OFlags::DIRECTORY).map_err(
                    |_| Error::Dockerfile(format!("{:?} is not a folder", lossy(&path[..end]))),
                )?;
            }
            Err(errno) => {
                return Err(Error::Io {
                    what: lossy(path),
                    source: errno.into(),
                });
            }
        }
    }
    Ok(())
}

/// The tar in a file, if it is one, uncompressed.
fn archive(mut probe: std::fs::File, file: std::fs::File) -> Result<Option<Box<dyn Read + Send>>> {
    let mut head = [0u8; 6];
    let read = probe.read(&mut head).doing(|| "an archive".to_owned())?;
    let program = match &head[..read] {
        [b'B', b'Z', b'h', ..] => Some(("bzip2", "unpack a .bz2 archive", "apt-get install bzip2")),
        _ => None,
    };
    if let Some((program, purpose, fix)) = program {
        let output = Command::new(program)
            .arg("-dc")
            .stdin(Stdio::from(file))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|_| Error::MissingProgram {
                program,
                purpose,
                fix,
            })?;
        return Ok(Some(Box::new(Piped(output))));
    }
    use std::io::Seek;
    probe.rewind().doing(|| "an archive".to_owned())?;
    let (_, mut reader) = compression::reader(BufReader::new(probe))?;
    let mut block = Vec::new();
    // What cannot be read is no archive, and is copied as it is.
    if reader.by_ref().take(512).read_to_end(&mut block).is_err()
        || block.len() < 512
        || &block[257..262] != b"ustar"
    {
        return Ok(None);
    }
    Ok(Some(Box::new(BufReader::new(file))))
}

/// The output of a child that is ended with it.
struct Piped(std::process::Child);

impl Read for Piped {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.stdout.as_mut().map_or(Ok(0), |out| out.read(buffer))
    }
}

impl Drop for Piped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The owner that `--chown` or USER names, looked up in the tree's own `/etc/passwd` and `/etc/group`.
pub(super) fn owner(tree_root: &OwnedFd, text: &str) -> Result<(u32, u32)> {
    let table = |path: &str| -> BTreeMap<String, (Option<u32>, Option<u32>)> {
        let mut text = String::new();
        if let Ok(fd) = tree::open_in(
            tree_root,
            path.as_bytes(),
            OFlags::RDONLY | OFlags::NONBLOCK,
        ) {
            let _ = tree::file(fd).take(1 << 20).read_to_string(&mut text);
        }
        text.lines()
            .filter_map(|line| {
                let mut fields = line.split(':');
                let name = fields.next()?.to_owned();
                let (_, id, group) = (fields.next(), fields.next(), fields.next());
                Some((name, (id?.parse().ok(), group.and_then(|g| g.parse().ok()))))
            })
            .collect()
    };
    let missing = |what: &str, name: &str| {
        Error::Dockerfile(format!("unable to find {what} {name}: no matching entries"))
    };
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let (uid, own_group) = match user.parse::<u32>() {
        Ok(uid) => (uid, None),
        Err(_) => match table("etc/passwd").get(user) {
            Some((Some(uid), gid)) => (*uid, *gid),
            _ => return Err(missing("user", user)),
        },
    };
    let gid = match group {
        // Docker takes a lone number for both.
        None => own_group.unwrap_or(uid),
        Some(group) => match group.parse::<u32>() {
            Ok(gid) => gid,
            Err(_) => match table("etc/group").get(group) {
                Some((Some(gid), _)) => *gid,
                _ => return Err(missing("group", group)),
            },
        },
    };
    Ok((uid, gid))
}
