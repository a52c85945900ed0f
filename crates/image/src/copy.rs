//! Files in and out of a container's tree (`docker cp`): functions over the tree's root descriptor. Every path is
//! resolved inside that root by openat2(2), so a container cannot lead the copy out of itself.

use std::ffi::CString;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use crate::error::At;
use crate::layer::tar::{TarReader, TarWriter};
use crate::layer::unpack::{CopyInto, Unpacker, damaged};
use crate::layer::{Limits, pack, tree};
use crate::progress::Cancel;
use crate::{Error, Result};

/// What `X-Docker-Container-Path-Stat` says of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathStat {
    /// The last name of the path.
    pub name: String,
    pub size: u64,
    /// `st_mode` as stat(2) gives it.
    pub mode: u32,
    /// Seconds and nanoseconds since 1970.
    pub mtime: (i64, u32),
    /// Where a link points, as it is written in it.
    pub link_target: String,
}

/// How to write into a tree.
#[derive(Debug, Clone, Default)]
pub struct WriteOptions {
    /// Everything gets this owner and group; without, those the archive says.
    pub owner: Option<(u32, u32)>,
    /// Refuse to replace a folder by a file or a file by a folder.
    pub no_overwrite_dir_non_dir: bool,
}

/// A file in a tree, by its folder and name.
struct Place {
    parent: OwnedFd,
    name: CString,
    /// What the user called it.
    shown: String,
}

fn missing(path: &str, errno: Errno) -> Error {
    match errno {
        Errno::NOENT => Error::NotFound {
            what: path.to_owned(),
            why: "no such file or folder in the container".to_owned(),
        },
        Errno::NOTDIR => Error::Invalid(format!("{path}: a part of the path is not a folder")),
        Errno::LOOP => Error::Invalid(format!("{path}: a loop of links")),
        errno => Error::Io {
            what: path.to_owned(),
            source: errno.into(),
        },
    }
}

/// Finds `path`. A link at its end is followed only where the path ends with `/` or `/.`.
fn place(root: impl AsFd, path: &str) -> Result<Place> {
    let follows = path.ends_with('/') || path.ends_with("/.") || path.is_empty() || path == ".";
    // `..` is taken as written, before any link is resolved, as Docker's client does.
    let joined = tree::normal(path.as_bytes());
    let (folder, last) = tree::split(&joined);
    let name = (!last.is_empty()).then(|| String::from_utf8_lossy(last).into_owned());
    let shown = match name {
        None => "/".to_owned(),
        Some(_) if path.ends_with("/.") => ".".to_owned(),
        Some(ref name) => name.clone(),
    };
    if follows || name.is_none() {
        let fd = tree::open_in(&root, &joined, OFlags::PATH | OFlags::DIRECTORY)
            .map_err(|errno| missing(path, errno))?;
        return Ok(Place {
            parent: fd,
            name: c".".to_owned(),
            shown,
        });
    }
    let parent = tree::open_in(&root, folder, OFlags::PATH | OFlags::DIRECTORY)
        .map_err(|e| missing(path, e))?;
    let name =
        CString::new(last).map_err(|_| Error::Invalid("a path with a NUL byte".to_owned()))?;
    Ok(Place {
        parent,
        name,
        shown,
    })
}

/// Describes a path.
///
/// # Errors
/// [`Error::NotFound`].
pub fn stat(root: impl AsFd, path: &str) -> Result<PathStat> {
    let place = place(root, path)?;
    let stat = rustix::fs::statat(
        &place.parent,
        &*place.name,
        rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
    )
    .map_err(|errno| missing(path, errno))?;
    let link_target = if tree::file_type(&stat) == FileType::Symlink {
        rustix::fs::readlinkat(&place.parent, &*place.name, Vec::new())
            .map(|target| target.to_string_lossy().into_owned())
            .map_err(|errno| missing(path, errno))?
    } else {
        String::new()
    };
    Ok(PathStat {
        name: place.shown,
        size: stat.st_size.max(0) as u64,
        mode: stat.st_mode,
        mtime: (stat.st_mtime, stat.st_mtime_nsec as u32),
        link_target,
    })
}

/// Writes the file or tree at `path` as a tar whose names begin with the path's last name.
///
/// # Errors
/// [`Error::NotFound`], and those of `sink`.
pub fn read_tar(root: impl AsFd, path: &str, sink: impl Write) -> Result<()> {
    let place = place(root, path)?;
    if tree::stat_at(&place.parent, place.name.as_bytes())
        .doing(|| path.to_owned())?
        .is_none()
    {
        return Err(missing(path, Errno::NOENT));
    }
    let mut tar = TarWriter::new(std::io::BufWriter::with_capacity(256 << 10, sink));
    pack::pack_one(
        place.parent.as_fd(),
        place.name.as_bytes(),
        place.shown.as_bytes(),
        &mut tar,
    )
    .and_then(|()| tar.finish().map(drop))
    .doing(|| path.to_owned())
}

/// Unpacks a tar into the folder at `path`, which must be there.
///
/// # Errors
/// [`Error::NotFound`], [`Error::Invalid`] where it is no folder, [`Error::Conflict`] where a kind would change and
/// that was forbidden, and those of hostile archives.
pub fn write_tar(
    root: impl AsFd,
    path: &str,
    source: impl Read + Send,
    options: &WriteOptions,
) -> Result<()> {
    let at = place(&root, &format!("{path}/"))?;
    drop(at);
    let folder = tree::normal(path.as_bytes());
    let root = tree::open_in(&root, b"", OFlags::RDONLY | OFlags::DIRECTORY)
        .map_err(|e| missing("/", e))?;
    let copy = CopyInto {
        folder,
        owner: options.owner,
        keep_kinds: options.no_overwrite_dir_non_dir,
        ..CopyInto::default()
    };
    unpack_into(root, copy, source)
}

/// Unpacks a tar, compressed or not, into an open tree.
pub(crate) fn unpack_into(root: OwnedFd, copy: CopyInto, source: impl Read + Send) -> Result<()> {
    let cancel = Cancel::default();
    let (_, reader) =
        crate::layer::compression::reader(std::io::BufReader::with_capacity(256 << 10, source))?;
    let mut tar = TarReader::new(reader);
    Unpacker::into_tree(root, copy, Limits::default(), &cancel).unpack(&mut tar)?;
    tar.drain().map_err(damaged)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn links_lead_nowhere_outside_and_copies_round_trip() {
        let directory = tempfile::tempdir().unwrap();
        let top = directory.path().join("root");
        fs::create_dir_all(top.join("etc/sub")).unwrap();
        fs::write(directory.path().join("secret"), b"outside").unwrap();
        fs::write(top.join("etc/name"), b"inside").unwrap();
        std::os::unix::fs::symlink("/etc", top.join("absolute")).unwrap();
        std::os::unix::fs::symlink("../../secret", top.join("escape")).unwrap();
        let root = tree::open_root(&top).unwrap();
        assert_eq!(stat(&root, "/absolute").unwrap().link_target, "/etc");
        assert_eq!(stat(&root, "/absolute/name").unwrap().size, 6);
        assert_eq!(stat(&root, "/").unwrap().name, "/");
        assert!(matches!(
            stat(&root, "/escape/"),
            Err(Error::NotFound { .. })
        ));
        assert!(matches!(
            stat(&root, "/nothing"),
            Err(Error::NotFound { .. })
        ));
        let mut tar = Vec::new();
        read_tar(&root, "/etc", &mut tar).unwrap();
        write_tar(&root, "/absolute/sub", &tar[..], &WriteOptions::default()).unwrap();
        assert_eq!(fs::read(top.join("etc/sub/etc/name")).unwrap(), b"inside");
        assert!(write_tar(&root, "/etc/name", &tar[..], &WriteOptions::default()).is_err());
        assert!(write_tar(&root, "/nothing", &tar[..], &WriteOptions::default()).is_err());
    }

    #[test]
    fn a_folder_is_not_replaced_by_a_file_where_that_is_forbidden() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("x")).unwrap();
        let mut tar = TarWriter::new(Vec::new());
        tar.file("x", 0o644, b"file").unwrap();
        let tar = tar.finish().unwrap();
        let root = tree::open_root(directory.path()).unwrap();
        let options = WriteOptions {
            no_overwrite_dir_non_dir: true,
            ..WriteOptions::default()
        };
        assert!(matches!(
            write_tar(&root, "/", &tar[..], &options),
            Err(Error::Conflict(_))
        ));
        write_tar(&root, "/", &tar[..], &WriteOptions::default()).unwrap();
        assert_eq!(fs::read(directory.path().join("x")).unwrap(), b"file");
    }
}
