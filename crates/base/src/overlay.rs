//! Overlays (Documentation/filesystems/overlayfs.rst), mounted detached with the mount API on every kernel that has it.
//!
//! `fsconfig(2)` takes strings of up to 255 bytes, so directories are handed over as short names of open descriptors. Since
//! Linux 6.8 lower directories are given one by one; before, all of them must fit into one such string.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

/// What an overlay is made of.
#[derive(Debug, Clone, Default)]
pub struct Overlay<'a> {
    /// Topmost first; at least one.
    pub lower: Vec<&'a Path>,
    /// The upper and the work directory.
    pub writable: Option<(&'a Path, &'a Path)>,
    /// Further options, `key=value` or `key`.
    pub options: Vec<&'a str>,
    /// Options that are left out where the kernel does not know them: it then has nothing to turn off.
    pub tried: Vec<&'a str>,
    /// The source that mount tables show; `overlay` where empty.
    pub source: &'a str,
}

/// Options by which an upper directory alone says what was changed, whatever this kernel's defaults are.
pub const PLAIN: [&str; 3] = ["redirect_dir=nofollow", "metacopy=off", "index=off"];

impl Overlay<'_> {
    /// Mounts it detached.
    ///
    /// # Errors
    /// A directory that cannot be opened, options the kernel refuses (with its words), and too many lower directories for
    /// a kernel before 6.8 (63 always fit).
    pub fn mount(&self, attributes: MountAttrFlags) -> io::Result<OwnedFd> {
        if self.lower.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "an overlay needs a lower directory",
            ));
        }
        let lower = self.lower.iter().map(|path| open(path));
        let lower = lower.collect::<io::Result<Vec<_>>>()?;
        let writable = match self.writable {
            Some((upper, work)) => Some((open(upper)?, open(work)?)),
            None => None,
        };
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let source = Some(self.source).filter(|source| !source.is_empty());
        fsconfig_set_string(&context, "source", source.unwrap_or("overlay"))?;
        for option in &self.options {
            set(&context, option)?;
        }
        for option in &self.tried {
            let _ = set(&context, option);
        }
        if let Some((upper, work)) = &writable {
            fsconfig_set_string(&context, "upperdir", name(upper).as_str())?;
            fsconfig_set_string(&context, "workdir", name(work).as_str())?;
        }
        let create = || fsconfig_create(&context).map_err(|errno| explain(&context, errno));
        // Asked of the version: a kernel before 6.5 takes any option, and refuses it only at the end.
        if !(takes_one_by_one() && append(&context, &lower)?) {
            let joined = join(&lower, name);
            if joined.len() <= LONGEST {
                fsconfig_set_string(&context, "lowerdir", joined.as_str())?;
                create()?;
            } else {
                let short = join(&lower, |fd| fd.as_raw_fd().to_string());
                if short.len() > LONGEST {
                    return Err(io::Error::new(
                        io::ErrorKind::Unsupported,
                        format!(
                            "{} layers are more than this kernel takes: Linux 6.8 takes more, or make the image anew with fewer",
                            lower.len()
                        ),
                    ));
                }
                among_descriptors(|| {
                    fsconfig_set_string(&context, "lowerdir", short.as_str())?;
                    create()
                })?;
            }
        } else {
            create()?;
        }
        Ok(fsmount(
            &context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            attributes,
        )?)
    }
}

/// What `fsconfig(2)` takes.
const LONGEST: usize = 255;

fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| {
        let kind = io::Error::from(errno).kind();
        io::Error::new(kind, format!("{}: {errno}", path.display()))
    })
}

fn name(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn join(folders: &[OwnedFd], name: impl Fn(&OwnedFd) -> String) -> String {
    folders.iter().map(name).collect::<Vec<_>>().join(":")
}

fn set(context: &OwnedFd, option: &str) -> Result<(), Errno> {
    match option.split_once('=') {
        Some((key, value)) => fsconfig_set_string(context, key, value),
        None => fsconfig_set_flag(context, option),
    }
}

/// Whether this kernel says to know `lowerdir+`.
fn takes_one_by_one() -> bool {
    crate::host::kernel_version() >= (6, 8)
}

/// Gives the lower directories one by one; false where the kernel does not know how.
fn append(context: &OwnedFd, lower: &[OwnedFd]) -> io::Result<bool> {
    for (number, fd) in lower.iter().enumerate() {
        match fsconfig_set_string(context, "lowerdir+", name(fd).as_str()) {
            Ok(()) => {}
            Err(Errno::INVAL) if number == 0 => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(true)
}

/// Does something with the directory of descriptors as the working directory. That is the process's, unless it has other
/// threads: then a thread of its own does it, with a working directory of its own.
fn among_descriptors(work: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    let there = || rustix::process::chdir("/proc/self/fd");
    let alone = std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1);
    if alone {
        let before = open(Path::new("."))?;
        there()?;
        let done = work();
        rustix::process::fchdir(&before)?;
        return done;
    }
    let apart = || {
        // SAFETY: the thread has just been made and shares nothing by its working directory, root or mask that another
        // would miss; descriptors stay shared.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }?;
        there()?;
        work()
    };
    std::thread::scope(|scope| scope.spawn(apart).join())
        .unwrap_or_else(|_| Err(io::Error::other("a thread that mounts has died")))
}

/// The kernel's own words about a refused file system, which can be read from its context.
pub fn explain(context: &OwnedFd, errno: Errno) -> io::Error {
    let error = io::Error::from(errno);
    let mut text = [0u8; 512];
    match rustix::io::read(context, &mut text) {
        Ok(length) if length > 2 => {
            let words = String::from_utf8_lossy(&text[2..length]).trim().to_owned();
            io::Error::new(error.kind(), format!("{error} ({words})"))
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_layers_have_short_names_where_they_must() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: needs root");
            return;
        }
        let scratch = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (0..40)
            .map(|number| {
                let path = scratch.path().join(format!("layer-{number}"));
                std::fs::create_dir(&path).unwrap();
                std::fs::write(path.join(number.to_string()), "").unwrap();
                path
            })
            .collect();
        let lower: Vec<OwnedFd> = paths.iter().map(|path| open(path).unwrap()).collect();
        assert!(join(&lower, name).len() > LONGEST);
        // As a kernel before 6.8 is told.
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        let short = join(&lower, |fd| fd.as_raw_fd().to_string());
        let before = std::env::current_dir().unwrap();
        among_descriptors(|| {
            fsconfig_set_string(&context, "lowerdir", short.as_str())?;
            fsconfig_create(&context).map_err(|errno| explain(&context, errno))
        })
        .unwrap();
        assert_eq!(std::env::current_dir().unwrap(), before);
        let mount = fsmount(&context, FsMountFlags::empty(), MountAttrFlags::empty()).unwrap();
        assert_eq!(
            std::fs::read_dir(format!("/proc/self/fd/{}", mount.as_raw_fd()))
                .unwrap()
                .count(),
            40
        );
    }
}
