//! Device nodes (config-linux "Devices" and "Default Devices").

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Uid, chownat, mknodat, symlinkat, unlinkat};
use rustix::io::Errno;

use crate::error::{Context, Error, Result};
use crate::rootfs::Root;
use crate::syscall;

/// Path, major, minor of the devices every container has.
const DEFAULTS: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Makes the default nodes and those of the specification. In a user namespace, where mknod(2) is refused, the
/// host's nodes are bound.
pub(crate) fn make_nodes(root: &Root, devices: &[LinuxDevice], bind: bool) -> Result<()> {
    let dev = root
        .directory(Path::new("/dev"))
        .during(|| "make /dev".into())?;
    for (path, major, minor) in DEFAULTS {
        if devices
            .iter()
            .any(|device| device.path() == Path::new(path))
        {
            continue;
        }
        let path = Path::new(path);
        if bind {
            bind_node(root, path, path).during(|| format!("bind the device {}", path.display()))?;
            continue;
        }
        let name = path.file_name().unwrap_or_default();
        make_node(
            dev.as_fd(),
            name.as_ref(),
            FileType::CharacterDevice,
            (major, minor),
            0o666,
        )
        .during(|| format!("make the device {}", path.display()))?;
    }
    for device in devices {
        make_one(root, device, bind)?;
    }
    Ok(())
}

fn make_one(root: &Root, device: &LinuxDevice, bind: bool) -> Result<()> {
    let path = device.path();
    let kind = match device.typ() {
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::A => {
            return Err(Error::invalid(format!(
                "config.json: device {}: \"a\" is no device type",
                path.display()
            )));
        }
    };
    if !path.is_absolute() {
        return Err(Error::invalid(format!(
            "config.json: device {} is not an absolute path",
            path.display()
        )));
    }
    // Engines list what every container gets anyway.
    if path == Path::new("/dev/ptmx") {
        return Ok(());
    }
    if bind {
        return bind_node(root, path, path)
            .during(|| format!("bind the device {}", path.display()));
    }
    let number = |value: i64| {
        u32::try_from(value).map_err(|_| {
            Error::invalid(format!(
                "config.json: device {}: {value} is no device number",
                path.display()
            ))
        })
    };
    let numbers = if kind == FileType::Fifo {
        (0, 0)
    } else {
        (number(device.major())?, number(device.minor())?)
    };
    let mode = device.file_mode().unwrap_or(0o666) & 0o7777;
    let made = (|| {
        let parent = root.directory(path.parent().unwrap_or(Path::new("/")))?;
        let name = path
            .file_name()
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        make_node(parent.as_fd(), Path::new(name), kind, numbers, mode)?;
        let (uid, gid) = (device.uid().unwrap_or(0), device.gid().unwrap_or(0));
        if uid != 0 || gid != 0 {
            let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            chownat(&parent, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    })();
    let made: io::Result<()> = made;
    made.during(|| format!("make the device {}", path.display()))
}

fn make_node(
    directory: std::os::fd::BorrowedFd<'_>,
    name: &Path,
    kind: FileType,
    numbers: (u32, u32),
    mode: u32,
) -> io::Result<()> {
    let number = rustix::fs::makedev(numbers.0, numbers.1);
    match mknodat(directory, name, kind, Mode::from_raw_mode(mode), number) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => {
            // What is there must be that device, and not a file or link the image planted.
            let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if FileType::from_raw_mode(stat.st_mode) == kind
                && (kind == FileType::Fifo || stat.st_rdev == number)
            {
                return Ok(());
            }
            unlinkat(directory, name, AtFlags::empty())?;
            Ok(mknodat(
                directory,
                name,
                kind,
                Mode::from_raw_mode(mode),
                number,
            )?)
        }
        Err(errno) => Err(errno.into()),
    }
}

fn bind_node(root: &Root, source: &Path, path: &Path) -> io::Result<()> {
    let tree = syscall::clone_tree(CWD, source, false)?;
    let target = root.file(path)?;
    syscall::attach(tree.as_fd(), target.as_fd())
}

/// The links every container's /dev has, and /dev/ptmx, which must be the container's own.
pub(crate) fn make_links(root: &Root) -> Result<()> {
    const LINKS: [(&str, &str); 5] = [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("core", "/proc/kcore"),
    ];
    let dev = root
        .directory(Path::new("/dev"))
        .during(|| "open /dev".into())?;
    for (name, target) in LINKS {
        if name == "core" && !PathBuf::from(target).exists() {
            continue;
        }
        match symlinkat(target, &dev, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno).during(|| format!("make the link /dev/{name}")),
        }
    }
    let made = match symlinkat("pts/ptmx", &dev, "ptmx") {
        Err(Errno::EXIST) => unlinkat(&dev, "ptmx", AtFlags::empty())
            .and_then(|()| symlinkat("pts/ptmx", &dev, "ptmx")),
        other => other,
    };
    match made {
        // A bound /dev of the host is left as it is.
        Ok(()) | Err(Errno::BUSY | Errno::ROFS) => Ok(()),
        Err(errno) => Err(errno).during(|| "make the link /dev/ptmx".into()),
    }
}
