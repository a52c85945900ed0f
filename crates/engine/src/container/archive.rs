//! Files in and out of containers: `cp`, `export`, `diff`, `commit`.

use std::ffi::CString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use ::image::layer::tar::{Entry, EntryKind, TarReader, TarWriter};
use ::image::layer::{compression, pack, tree};
use bytes::Bytes;
use futures_util::StreamExt;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use tokio::io::AsyncRead;
use tokio::sync::mpsc;

use crate::Engine;
use crate::container::create::blocking;
use crate::container::inspect::{Change, PathStat};
use crate::container::record::{Container, Phase};
use crate::container::{ArchivePutOptions, CommitOptions, TarStream, processes};
use crate::error::{Error, Result};
use crate::volume::VolumeSource;

/// A tree with a path in it.
struct Place {
    root: OwnedFd,
    /// Without slashes at its ends; empty is the root.
    path: Vec<u8>,
    /// The name its archive begins with.
    name: String,
    /// The path ended in a slash or a dot: a link at its end is followed.
    follow: bool,
    writable: bool,
}

/// Takes a path apart; `..` goes up within the root. Whether a link at its end is followed, and whether it ends in a dot.
fn normal(path: &str) -> (Vec<u8>, bool, bool) {
    let dot = path.ends_with("/.") || path == ".";
    let follow = dot || path.ends_with('/');
    (tree::normal(path.as_bytes()), follow, dot)
}

impl Engine {
    /// A container's file system with a path of it: the living one, with all its mounts, or the layers of a stopped one.
    fn place(&self, container: &Container, path: &str, write: bool) -> Result<Place> {
        if path.is_empty() || path.contains('\0') {
            return Err(Error::Invalid(
                "invalid path: it is empty or holds a NUL byte".into(),
            ));
        }
        let record = container.record().clone();
        let (inside, follow, dot) = normal(path);
        let base = inside
            .rsplit(|byte| *byte == b'/')
            .next()
            .unwrap_or_default();
        let name = match String::from_utf8_lossy(base).into_owned() {
            _ if dot => ".".to_owned(),
            name if name.is_empty() => "/".into(),
            name => name,
        };
        let mount = record
            .mounts
            .iter()
            .filter(|mount| {
                Path::new("/")
                    .join(tree::os(&inside))
                    .starts_with(&mount.point.destination)
            })
            .max_by_key(|mount| mount.point.destination.len());
        let writable = match mount {
            Some(mount) => mount.point.rw,
            None => !record.host.readonly_rootfs,
        };
        if write && !writable {
            return Err(Error::Forbidden(
                "mounted volume or container rootfs is marked read-only".into(),
            ));
        }
        let opening = || format!("opening the file system of container {}", container.id);
        if let (true, Some(process)) = (record.phase.lives(), record.process) {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            match rustix::fs::open(format!("/proc/{}/root", process.pid), flags, Mode::empty()) {
                Ok(root) => {
                    return Ok(Place {
                        root,
                        path: inside,
                        name,
                        follow,
                        writable,
                    });
                }
                // It has just ended, which is not noted yet.
                Err(Errno::NOENT | Errno::SRCH) => {}
                Err(error) => return Err(Error::io(opening())(error.into())),
            }
        }
        if let Some(mount) = mount
            && let Some(source) = match mount.point.kind.as_str() {
                "bind" => Some(mount.point.source.clone().into()),
                "volume" => match self.volumes.source(&mount.point.name)? {
                    VolumeSource::Directory(directory) => Some(directory),
                    VolumeSource::Mount { .. } => None,
                },
                _ => None,
            }
            && source.is_dir()
        {
            let root = tree::open_root(&source).map_err(Error::io(opening()))?;
            let depth = mount.point.destination.trim_matches('/').len();
            let rest = inside.get(depth + 1..).unwrap_or_default().to_vec();
            return Ok(Place {
                root,
                path: rest,
                name,
                follow,
                writable,
            });
        }
        let layers = self
            .images
            .snapshot_layers(&container.id)
            .map_err(Error::room)?;
        let root = ::image::mount_detached(&layers, write).map_err(Error::room)?;
        Ok(Place {
            root,
            path: inside,
            name,
            follow,
            writable,
        })
    }

    /// What is at a path inside.
    ///
    /// # Errors
    /// [`Error::NotFound`] in dockerd's words.
    pub async fn archive_stat(self: &Arc<Self>, container: &str, path: &str) -> Result<PathStat> {
        let container = self.inventory.find(container)?;
        let (engine, path) = (self.clone(), path.to_owned());
        blocking(move || {
            let place = engine.place(&container, &path, false)?;
            Ok(look(&place, &container, &path)?.0)
        })
        .await
    }

    /// A tar archive of a path inside.
    ///
    /// # Errors
    /// As [`Engine::archive_stat`].
    pub async fn archive_get(
        self: &Arc<Self>,
        container: &str,
        path: &str,
    ) -> Result<(PathStat, TarStream)> {
        let container = self.inventory.find(container)?;
        let (engine, path, own) = (self.clone(), path.to_owned(), container.clone());
        let (stat, place) = blocking(move || {
            let mut place = engine.place(&own, &path, false)?;
            let (stat, folder) = look(&place, &own, &path)?;
            if place.follow && !folder {
                return Err(Error::Invalid(format!("not a directory: {path}")));
            }
            if place.follow {
                // The link at its end is followed by packing what it leads to.
                let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                let target = tree::open_in(&place.root, &place.path, flags)
                    .map_err(|error| Error::io(path.clone())(error.into()))?;
                place.root = target;
                place.path = Vec::new();
            }
            Ok((stat, place))
        })
        .await?;
        self.tell(&container, "archive-path");
        let stream = produce(move |sink| {
            let mut tar = TarWriter::new(io::BufWriter::with_capacity(128 << 10, sink));
            let (folder, name) = tree::split(&place.path);
            let parent = tree::open_in(&place.root, folder, OFlags::RDONLY | OFlags::DIRECTORY)?;
            let name: &[u8] = if name.is_empty() { b"." } else { name };
            pack::pack_one(parent.as_fd(), name, place.name.as_bytes(), &mut tar)?;
            tar.finish()?.flush()
        })?;
        Ok((stat, stream))
    }

    /// Unpacks a tar archive (plain, gzip or zstd) into a folder inside.
    ///
    /// # Errors
    /// [`Error::NotFound`] where the folder is not there, [`Error::Invalid`] for a broken archive.
    pub async fn archive_put(
        self: &Arc<Self>,
        container: &str,
        path: &str,
        options: ArchivePutOptions,
        archive: Pin<Box<dyn AsyncRead + Send>>,
    ) -> Result<()> {
        let container = self.inventory.find(container)?;
        let (engine, path, own) = (self.clone(), path.to_owned(), container.clone());
        let reader = crate::bridge::BlockingReader::new(archive);
        blocking(move || {
            let place = engine.place(&own, &path, true)?;
            debug_assert!(place.writable);
            let (_, folder) = look(
                &Place {
                    follow: true,
                    ..place_again(&place)?
                },
                &own,
                &path,
            )?;
            if !folder {
                return Err(Error::Invalid("extraction point is not a directory".into()));
            }
            let (_, source) = compression::reader(io::BufReader::with_capacity(128 << 10, reader))
                .map_err(Error::room)?;
            let mut tar = TarReader::new(source);
            let owner = engine.archive_owner(&own, options)?;
            unpack(&place, &mut tar, options, owner).map_err(|error| match error.kind() {
                io::ErrorKind::InvalidData
                | io::ErrorKind::UnexpectedEof
                | io::ErrorKind::InvalidInput => {
                    Error::Invalid(format!("the archive cannot be unpacked: {error}"))
                }
                _ => Error::io("unpacking the archive")(error),
            })
        })
        .await?;
        self.tell(&container, "extract-to-dir");
        Ok(())
    }

    /// With `-a`, what is copied into a container with a user belongs to that user, as dockerd has it; else the archive
    /// says to whom.
    fn archive_owner(
        &self,
        container: &Container,
        options: ArchivePutOptions,
    ) -> Result<Option<(u32, u32)>> {
        let record = container.record().clone();
        if !options.copy_uid_gid || record.config.user.is_empty() {
            return Ok(None);
        }
        let layers = self
            .images
            .snapshot_layers(&container.id)
            .map_err(Error::room)?;
        let user = self.user_of(&record.config.user, &record, &layers)?;
        Ok(Some((user.uid, user.gid)))
    }

    /// Its whole file system as a tar archive.
    pub async fn export(self: &Arc<Self>, container: &str) -> Result<TarStream> {
        let container = self.inventory.find(container)?;
        let (engine, own) = (self.clone(), container.clone());
        let (root, scratch) = blocking(move || {
            let layers = engine
                .images
                .snapshot_layers(&own.id)
                .map_err(Error::room)?;
            if !own.phase().lives() {
                return Ok((
                    ::image::mount_detached(&layers, false).map_err(Error::room)?,
                    None,
                ));
            }
            // The layers are mounted for writing in the container, and no two mounts may write one: here they all are
            // lower ones. What is mounted in the container does not belong to an export.
            let scratch = empty_folders(&own.directory)?;
            let mut lower = vec![layers.upper];
            lower.extend(layers.lower);
            let view = ::image::Layers {
                lower,
                upper: scratch.path().join("upper"),
                work: scratch.path().join("work"),
                userxattr: layers.userxattr,
            };
            Ok((
                ::image::mount_detached(&view, false).map_err(Error::room)?,
                Some(scratch),
            ))
        })
        .await?;
        self.tell(&container, "export");
        produce(move |sink| {
            let done = ::image::export(&root, sink).map_err(io::Error::other);
            drop(root);
            drop(scratch);
            done
        })
    }

    /// What differs from its image.
    pub async fn changes(self: &Arc<Self>, container: &str) -> Result<Vec<Change>> {
        let container = self.inventory.find(container)?;
        let images = self.images.clone();
        blocking(move || {
            let changes = images
                .snapshot_changes(&container.id)
                .map_err(Error::room)?;
            let changes = changes.into_iter().map(|change| Change {
                path: change.path,
                kind: change.kind as u8,
            });
            Ok(without_mount_points(changes.collect()))
        })
        .await
    }

    /// An image of it; answers the image's id (`sha256:…`).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a name or for changes that cannot be.
    pub async fn commit(
        self: &Arc<Self>,
        container: &str,
        options: CommitOptions,
    ) -> Result<String> {
        let container = self.inventory.find(container)?;
        let engine = self.clone();
        crate::container::start::detached(async move {
            let _operation = container.operation.lock().await;
            let record = container.record().clone();
            if matches!(record.phase, Phase::Removing | Phase::Dead) {
                return Err(Error::Conflict(format!(
                    "You cannot commit container {} which is being removed",
                    record.id
                )));
            }
            let reference = match options.repository.as_str() {
                "" => None,
                name if options.tag.is_empty() => Some(name.to_owned()),
                name => Some(format!("{name}:{}", options.tag)),
            };
            let reference = reference
                .map(|name| ::image::Reference::parse(&name).map(::image::Reference::or_latest))
                .transpose()
                .map_err(Error::room)?;
            let named = reference.as_ref().map(::image::Reference::familiar);
            let config = match options.config {
                Some(config) if config != Default::default() => {
                    // What is not said stays as the container has it.
                    let own = serde_json::to_value(&record.config)
                        .and_then(serde_json::from_value::<::image::RunConfig>)
                        .map_err(|error| Error::Invalid(error.to_string()))?;
                    crate::container::create::over_image(config, Some(&own))?
                }
                _ => record.config.clone(),
            };
            let mut config = serde_json::to_value(config).unwrap_or_default();
            if let Some(map) = config.as_object_mut() {
                // Of one container, not of an image.
                for key in [
                    "Image",
                    "Hostname",
                    "AttachStdin",
                    "AttachStdout",
                    "AttachStderr",
                    "Tty",
                    "OpenStdin",
                    "StdinOnce",
                    "Domainname",
                    "MacAddress",
                ] {
                    map.remove(key);
                }
            }
            let config = serde_json::from_value(config)
                .map_err(|error| Error::Invalid(error.to_string()))?;
            let comment = options.comment.clone();
            let wanted = ::image::CommitOptions {
                reference,
                author: options.author,
                comment: options.comment,
                config: Some(config),
                changes: options.changes,
                created_by: record.arguments().join(" "),
            };
            let held = (options.pause && record.phase == Phase::Running)
                .then(|| (record.clone(), engine.cgroup_of(&record)));
            let (images, id) = (engine.images.clone(), record.id.clone());
            let made = blocking(move || {
                if let Some((record, group)) = &held {
                    processes::hold(record, group, true)?;
                }
                let made = images.commit(&id, &wanted).map_err(Error::room);
                if let Some((record, group)) = &held {
                    processes::hold(record, group, false)?;
                }
                made
            })
            .await?;
            let made = made.to_string();
            let mut attributes = vec![("imageID", made.clone()), ("comment", comment)];
            if let Some(named) = named {
                engine.image_event("tag", &made, &named);
                attributes.push(("imageRef", named));
            }
            engine.tell_with(&container, "commit", &attributes);
            Ok(made)
        })
        .await
    }
}

/// Leaves out what the runtime had to make to mount something on: nobody changed it.
fn without_mount_points(mut changes: Vec<Change>) -> Vec<Change> {
    const POINTS: [&str; 6] = [
        "/dev",
        "/proc",
        "/sys",
        "/etc/hostname",
        "/etc/hosts",
        "/etc/resolv.conf",
    ];
    let before = changes.len();
    changes.retain(|change| change.kind != 1 || !POINTS.contains(&change.path.as_str()));
    if changes.len() != before
        && !changes
            .iter()
            .any(|change| change.path.starts_with("/etc/"))
    {
        changes.retain(|change| change.path != "/etc");
    }
    changes
}

/// What the names of scratch folders in a container's begin with. A crash leaves them; the next start removes them.
pub(crate) const SCRATCH: &str = "export-";

/// Empty folders for a mount that is only read.
fn empty_folders(directory: &Path) -> Result<tree::Scratch> {
    let path = directory.join(format!("{SCRATCH}{}", base::Id::random().short()));
    let made = tree::Scratch::create(path).and_then(|scratch| {
        for name in ["upper", "work"] {
            std::fs::create_dir(scratch.path().join(name))?;
        }
        Ok(scratch)
    });
    made.map_err(Error::io("making a scratch folder"))
}

fn place_again(place: &Place) -> Result<Place> {
    let root = place
        .root
        .try_clone()
        .map_err(Error::io("opening a file system"))?;
    Ok(Place {
        root,
        path: place.path.clone(),
        name: place.name.clone(),
        follow: place.follow,
        writable: place.writable,
    })
}

/// What is at a place, and whether it is a folder.
fn look(place: &Place, container: &Container, path: &str) -> Result<(PathStat, bool)> {
    let missing = |error: Errno| match error {
        Errno::NOENT | Errno::NOTDIR => Error::NotFound(format!(
            "Could not find the file {path} in container {}",
            container.id
        )),
        other => Error::io(format!("looking at {path}"))(other.into()),
    };
    let flags = if place.follow {
        OFlags::PATH
    } else {
        OFlags::PATH | OFlags::NOFOLLOW
    };
    let fd = tree::open_in(&place.root, &place.path, flags).map_err(missing)?;
    let stat = rustix::fs::fstat(&fd).map_err(missing)?;
    let kind = tree::file_type(&stat);
    let link = match kind {
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(&fd, c"", Vec::new()).map_err(missing)?;
            let target = target.to_string_lossy().into_owned();
            if target.starts_with('/') {
                target
            } else {
                let folder = tree::split(&place.path).0;
                let (joined, ..) =
                    normal(&format!("/{}/{target}", String::from_utf8_lossy(folder)));
                format!("/{}", String::from_utf8_lossy(&joined))
            }
        }
        _ => String::new(),
    };
    let mtime = jiff::Timestamp::new(stat.st_mtime as i64, stat.st_mtime_nsec as i32)
        .unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    let stat = PathStat {
        name: place.name.clone(),
        size: stat.st_size,
        mode: go_mode(stat.st_mode),
        mtime: base::time::rfc3339(mtime),
        link_target: link,
    };
    Ok((stat, kind == FileType::Directory))
}

/// Mode bits as Go's `fs.FileMode` has them.
fn go_mode(mode: u32) -> u32 {
    let kind = match mode & 0o170000 {
        0o040000 => 1 << 31,
        0o120000 => 1 << 27,
        0o060000 => 1 << 26,
        0o020000 => 1 << 26 | 1 << 21,
        0o010000 => 1 << 25,
        0o140000 => 1 << 24,
        _ => 0,
    };
    let special = [(0o4000, 1 << 23), (0o2000, 1 << 22), (0o1000, 1 << 20)];
    special
        .iter()
        .filter(|(bit, _)| mode & bit != 0)
        .fold(kind | (mode & 0o777), |all, (_, bit)| all | bit)
}

/// Runs a writer on a thread of its own; what it writes comes out as a stream that holds it back.
fn produce(work: impl FnOnce(Sink) -> io::Result<()> + Send + 'static) -> Result<TarStream> {
    let (sender, receiver) = mpsc::channel(16);
    let errors = sender.clone();
    crate::container::logs::aside("berth-archive", move || {
        if let Err(error) = work(Sink(sender))
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            let _ = errors.blocking_send(Err(error));
        }
    })?;
    Ok(
        futures_util::stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|item| (item, receiver))
        })
        .boxed(),
    )
}

struct Sink(mpsc::Sender<io::Result<Bytes>>);

impl Write for Sink {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self.0.blocking_send(Ok(Bytes::copy_from_slice(buffer))) {
            Ok(()) => Ok(buffer.len()),
            Err(_) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn bad(entry: &Entry, why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{:?}: {why}", String::from_utf8_lossy(&entry.path)),
    )
}

/// Unpacks below a place. Links that lie in the container are followed within it, as its own programs would.
fn unpack<R: Read>(
    place: &Place,
    tar: &mut TarReader<R>,
    options: ArchivePutOptions,
    owner: Option<(u32, u32)>,
) -> io::Result<()> {
    let mut folders: Vec<(Vec<u8>, (i64, u32))> = Vec::new();
    while let Some(entry) = tar.next_entry()? {
        let path = tree::clean(&entry.path)
            .ok_or_else(|| bad(&entry, "its name holds \"..\" or a NUL byte"))?;
        let full = if path.is_empty() {
            place.path.clone()
        } else if place.path.is_empty() {
            path.clone()
        } else {
            [&place.path[..], b"/", &path].concat()
        };
        if path.is_empty() {
            continue;
        }
        let (folder, name) = tree::split(&full);
        let parent = match tree::open_in(&place.root, folder, OFlags::PATH | OFlags::DIRECTORY) {
            Ok(parent) => parent,
            Err(Errno::NOENT) => {
                crate::container::root::make_folders(&place.root, folder)?;
                tree::open_in(&place.root, folder, OFlags::PATH | OFlags::DIRECTORY)?
            }
            Err(error) => return Err(error.into()),
        };
        let name = CString::new(name)?;
        let there = tree::stat_at(&parent, name.as_bytes())?.map(|stat| tree::file_type(&stat));
        let is_folder = entry.kind == EntryKind::Directory;
        match there {
            Some(FileType::Directory) if !is_folder => {
                if options.no_overwrite_dir_non_dir {
                    return Err(bad(&entry, "cannot overwrite directory with non-directory"));
                }
                tree::remove_at(&parent, &name)?;
            }
            Some(kind) if is_folder && kind != FileType::Directory => {
                if options.no_overwrite_dir_non_dir {
                    return Err(bad(&entry, "cannot overwrite non-directory with directory"));
                }
                tree::remove_at(&parent, &name)?;
            }
            Some(_) if !is_folder => tree::remove_at(&parent, &name)?,
            _ => {}
        }
        let mode = Mode::from_raw_mode(entry.mode & 0o7777);
        match entry.kind {
            EntryKind::Directory => {
                match rustix::fs::mkdirat(&parent, &*name, Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => folders.push((full.clone(), entry.mtime)),
                    Err(error) => return Err(error.into()),
                }
            }
            EntryKind::File => {
                let flags = OFlags::WRONLY
                    | OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(&parent, &*name, flags, Mode::from_raw_mode(0o600))?;
                let mut file = std::fs::File::from(fd);
                io::copy(tar, &mut file)?;
            }
            EntryKind::Symlink => {
                let target = CString::new(entry.link.clone())?;
                rustix::fs::symlinkat(&*target, &parent, &*name)?;
            }
            EntryKind::HardLink => {
                let target = tree::clean(&entry.link)
                    .ok_or_else(|| bad(&entry, "its link leaves the archive"))?;
                let target = if place.path.is_empty() {
                    target
                } else {
                    [&place.path[..], b"/", &target].concat()
                };
                let (folder, old) = tree::split(&target);
                let from = tree::open_in(&place.root, folder, OFlags::PATH | OFlags::DIRECTORY)?;
                rustix::fs::linkat(
                    &from,
                    &*CString::new(old)?,
                    &parent,
                    &*name,
                    AtFlags::empty(),
                )?;
                continue;
            }
            EntryKind::Fifo => rustix::fs::mknodat(&parent, &*name, FileType::Fifo, mode, 0)?,
            EntryKind::Char | EntryKind::Block => {
                let kind = if entry.kind == EntryKind::Char {
                    FileType::CharacterDevice
                } else {
                    FileType::BlockDevice
                };
                rustix::fs::mknodat(
                    &parent,
                    &*name,
                    kind,
                    mode,
                    rustix::fs::makedev(entry.major, entry.minor),
                )?;
            }
        }
        let (uid, gid) = owner.unwrap_or((entry.uid, entry.gid));
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::fs::chownat(
            &parent,
            &*name,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
        if entry.kind != EntryKind::Symlink {
            // By the parent's descriptor, not following: what was made a moment ago may have been replaced.
            let fd = rustix::fs::openat(
                &parent,
                &*name,
                OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            let magic = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
            rustix::fs::chmod(&magic, mode)?;
        }
        for (key, value) in &entry.xattrs {
            if let (Ok(key), EntryKind::File | EntryKind::Directory) =
                (std::str::from_utf8(key), entry.kind)
                && let Ok(fd) = rustix::fs::openat(
                    &parent,
                    &*name,
                    OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                    Mode::empty(),
                )
            {
                let _ = rustix::fs::fsetxattr(&fd, key, value, rustix::fs::XattrFlags::empty());
            }
        }
        set_time(&parent, &name, entry.mtime);
    }
    for (path, mtime) in folders.into_iter().rev() {
        let (folder, name) = tree::split(&path);
        if let (Ok(parent), Ok(name)) = (
            tree::open_in(&place.root, folder, OFlags::PATH | OFlags::DIRECTORY),
            CString::new(name),
        ) {
            set_time(&parent, &name, mtime);
        }
    }
    Ok(())
}

fn set_time(parent: &OwnedFd, name: &CString, mtime: (i64, u32)) {
    let time = Timespec {
        tv_sec: mtime.0,
        tv_nsec: i64::from(mtime.1),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    let _ = rustix::fs::utimensat(parent, &**name, &times, AtFlags::SYMLINK_NOFOLLOW);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(directory: &Path) -> Place {
        let root = tree::open_root(directory).unwrap();
        Place {
            root,
            path: Vec::new(),
            name: "/".into(),
            follow: true,
            writable: true,
        }
    }

    #[test]
    fn modes_are_gos() {
        assert_eq!(go_mode(0o040755), 1 << 31 | 0o755);
        assert_eq!(go_mode(0o104755), 1 << 23 | 0o755);
        assert_eq!(go_mode(0o120777), 1 << 27 | 0o777);
    }

    #[test]
    fn an_archive_does_not_leave_the_container() {
        let directory = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), directory.path().join("link")).unwrap();
        let mut writer = TarWriter::new(Vec::new());
        let mut entry = Entry::new(EntryKind::File, "link/evil", 0o644);
        entry.uid = rustix::process::getuid().as_raw();
        entry.gid = rustix::process::getgid().as_raw();
        writer.entry(&entry).unwrap();
        let bytes = writer.finish().unwrap();
        let _ = unpack(
            &place(directory.path()),
            &mut TarReader::new(&bytes[..]),
            ArchivePutOptions::default(),
            None,
        );
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
        let mut writer = TarWriter::new(Vec::new());
        writer
            .entry(&Entry::new(EntryKind::File, "../evil", 0o644))
            .unwrap();
        let bytes = writer.finish().unwrap();
        assert!(
            unpack(
                &place(directory.path()),
                &mut TarReader::new(&bytes[..]),
                ArchivePutOptions::default(),
                None,
            )
            .is_err()
        );
    }

    #[test]
    fn paths_never_rise_above_the_root() {
        assert_eq!(normal("/../../etc/./passwd").0, b"etc/passwd");
        assert_eq!(normal("/dir/."), (b"dir".to_vec(), true, true));
    }
}
