//! The disk of a machine, made of an image: its files with a few of our own above, as an ext4 file system.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use image::{ImageId, Layers, Store};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use super::record::MachineSpec;
use crate::{Error, Result};

/// What a machine boots with.
pub struct BootFiles {
    pub initrd: bool,
}

/// File names inside a machine's folder.
pub const DISK: &str = "disk.raw";
pub const KERNEL: &str = "vmlinuz";
pub const INITRD: &str = "initrd";

/// Makes disk and kernel of `image` in `folder`. `resolver` is the name server the guest shall ask.
///
/// # Errors
/// Where the image has no kernel, or mke2fs is missing or fails. The folder is the caller's to remove.
pub fn make(
    store: &Store,
    image: &ImageId,
    spec: &MachineSpec,
    folder: &Path,
    resolver: &str,
) -> Result<BootFiles> {
    let own = folder.join("own");
    let failed = |what: &str| Error::io(format!("{what} in {}", folder.display()));
    let mut lower = store.layer_folders(image).map_err(Error::room)?;
    let plain = mount(folder, lower.clone())?;
    let shadow = read(&plain, "etc/shadow").unwrap_or_default();
    let boot = copy_kernel(&plain, folder, &spec.image)?;
    drop(plain);
    write_own_files(&own, spec, resolver, &shadow)
        .map_err(failed("cannot write the machine's own files"))?;
    lower.insert(0, own.clone());
    let tree = mount(folder, lower)?;
    let made = make_file_system(&tree, &folder.join(DISK), spec.disk);
    drop(tree);
    for scratch in [own, folder.join("upper"), folder.join("work")] {
        let _ = fs::remove_dir_all(scratch);
    }
    made?;
    Ok(boot)
}

/// The merged files, mounted nowhere.
fn mount(folder: &Path, lower: Vec<PathBuf>) -> Result<OwnedFd> {
    let (upper, work) = (folder.join("upper"), folder.join("work"));
    for path in [&upper, &work] {
        fs::create_dir_all(path).map_err(Error::io(format!("cannot make {}", path.display())))?;
    }
    let layers = Layers {
        lower,
        upper,
        work,
        userxattr: false,
    };
    image::mount_detached(&layers, false).map_err(Error::room)
}

/// Opens a file of the tree; its links cannot lead out of it.
fn open(tree: &OwnedFd, path: &str) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    Ok(openat2(tree, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)?.into())
}

fn read(tree: &OwnedFd, path: &str) -> io::Result<String> {
    use io::Read;
    let mut text = String::new();
    open(tree, path)?.take(1 << 20).read_to_string(&mut text)?;
    Ok(text)
}

fn copy_kernel(tree: &OwnedFd, folder: &Path, image: &str) -> Result<BootFiles> {
    let no_kernel = || {
        Error::Invalid(format!(
            "the image {image} has no kernel in /boot; make one that has: berth image bootstrap debian:bookworm --kernel"
        ))
    };
    let boot = open(tree, "boot").map_err(|_| no_kernel())?;
    let failed = || Error::io("cannot list /boot of the image".to_owned());
    let mut kernels: Vec<String> = rustix::fs::Dir::read_from(&boot)
        .map_err(io::Error::from)
        .map_err(failed())?
        .filter_map(|entry| entry.ok()?.file_name().to_str().ok().map(str::to_owned))
        .filter(|name| name.starts_with("vmlinuz-"))
        .collect();
    kernels.sort();
    let kernel = kernels.pop().ok_or_else(no_kernel)?;
    let version = kernel.trim_start_matches("vmlinuz-").to_owned();
    copy(tree, &format!("boot/{kernel}"), &folder.join(KERNEL))?;
    let config = read(tree, &format!("boot/config-{version}")).unwrap_or_default();
    let built_in = |option: &str| {
        config
            .lines()
            .any(|line| line.strip_prefix(option) == Some("=y"))
    };
    // With the drivers of its disk inside, a kernel needs no initial RAM disk, which would only cost time.
    let needs_initrd = !(built_in("CONFIG_BLK_DEV_NVME") && built_in("CONFIG_EXT4_FS"));
    let initrd = needs_initrd
        && copy(
            tree,
            &format!("boot/initrd.img-{version}"),
            &folder.join(INITRD),
        )
        .is_ok();
    Ok(BootFiles { initrd })
}

fn copy(tree: &OwnedFd, from: &str, to: &Path) -> Result<()> {
    let done = (|| {
        let mut source = open(tree, from)?;
        if !source.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no file"));
        }
        io::copy(&mut source, &mut File::create(to)?)
    })();
    done.map(drop)
        .map_err(Error::io(format!("cannot copy /{from} of the image")))
}

/// What makes this machine this one.
fn write_own_files(own: &Path, spec: &MachineSpec, resolver: &str, shadow: &str) -> io::Result<()> {
    let file = |path: &str, text: &str, mode: u32| -> io::Result<()> {
        let path = own.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let mut file = File::create(&path)?;
        file.write_all(text.as_bytes())?;
        fs::set_permissions(&path, Permissions::from_mode(mode))
    };
    file("etc/hostname", &format!("{}\n", spec.name), 0o644)?;
    file(
        "etc/hosts",
        &format!(
            "127.0.0.1 localhost\n127.0.1.1 {}\n::1 localhost ip6-localhost\n",
            spec.name
        ),
        0o644,
    )?;
    // A fresh identity is made at the first boot.
    file("etc/machine-id", "", 0o444)?;
    file(
        "etc/fstab",
        "/dev/nvme0n1 / ext4 errors=remount-ro,x-systemd.growfs 0 1\n",
        0o644,
    )?;
    file(
        "etc/resolv.conf",
        &format!("nameserver {resolver}\n"),
        0o644,
    )?;
    file(
        "etc/systemd/network/80-berth.network",
        "[Match]\nName=en* eth*\n\n[Network]\nDHCP=ipv4\nIPv6AcceptRA=no\n\n[DHCPv4]\nUseMTU=yes\n",
        0o644,
    )?;
    let wants = own.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants)?;
    symlink(
        "/lib/systemd/system/systemd-networkd.service",
        wants.join("systemd-networkd.service"),
    )?;
    // Nothing waits for the network: a login must not.
    let system = own.join("etc/systemd/system");
    symlink(
        "/dev/null",
        system.join("systemd-networkd-wait-online.service"),
    )?;
    // The cloud kernel has no such devices; without this a boot waits for them.
    for service in ["systemd-rfkill.service", "systemd-rfkill.socket"] {
        symlink("/dev/null", system.join(service))?;
    }
    if spec.autologin {
        file(
            "etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf",
            "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --keep-baud 115200,57600,38400,9600 - $TERM\n",
            0o644,
        )?;
    }
    if let Some(hash) = &spec.password_hash {
        let mut found = false;
        let mut lines: Vec<String> = shadow
            .lines()
            .map(|line| match line.strip_prefix("root:") {
                Some(rest) => {
                    found = true;
                    let tail = rest.split_once(':').map_or("::::::", |(_, tail)| tail);
                    format!("root:{hash}:{tail}")
                }
                None => line.to_owned(),
            })
            .collect();
        if !found {
            lines.push(format!("root:{hash}:::::::"));
        }
        file("etc/shadow", &(lines.join("\n") + "\n"), 0o640)?;
        std::os::unix::fs::chown(own.join("etc/shadow"), Some(0), Some(42))?;
    }
    if !spec.ssh_keys.is_empty() {
        file(
            "root/.ssh/authorized_keys",
            &(spec.ssh_keys.join("\n") + "\n"),
            0o600,
        )?;
        fs::set_permissions(own.join("root"), Permissions::from_mode(0o700))?;
        fs::set_permissions(own.join("root/.ssh"), Permissions::from_mode(0o700))?;
    }
    Ok(())
}

fn make_file_system(tree: &OwnedFd, disk: &Path, size: u64) -> Result<()> {
    let file =
        File::create_new(disk).map_err(Error::io(format!("cannot make {}", disk.display())))?;
    file.set_len(size)
        .map_err(Error::io(format!("cannot size {}", disk.display())))?;
    drop(file);
    let inherited = rustix::io::fcntl_dupfd_cloexec(tree, 10)
        .map_err(io::Error::from)
        .map_err(Error::io("cannot share the tree".to_owned()))?;
    rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty())
        .map_err(io::Error::from)
        .map_err(Error::io("cannot share the tree".to_owned()))?;
    let output = Command::new("mke2fs")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-L",
            "root",
            "-m",
            "1",
            "-E",
            "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0",
        ])
        .arg("-d")
        .arg(format!("/proc/self/fd/{}", inherited.as_raw_fd()))
        .arg(disk)
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let _ = fs::remove_file(disk);
            let words = String::from_utf8_lossy(&output.stderr);
            let last = words
                .lines()
                .rev()
                .find(|line| !line.trim().is_empty())
                .unwrap_or("no reason given")
                .to_owned();
            Err(
                if last.contains("No space") || last.contains("Could not allocate") {
                    Error::Capacity(format!(
                        "the image does not fit on a disk of {}: {last}; give a larger --disk",
                        base::units::format_size(size)
                    ))
                } else {
                    Error::Conflict(format!("mke2fs cannot make the disk: {last}"))
                },
            )
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::Unsupported(
            "mke2fs is missing, which makes disks of images: apt-get install e2fsprogs".into(),
        )),
        Err(error) => Err(Error::io("cannot run mke2fs".to_owned())(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_replaces_roots_and_nobody_elses() {
        let directory = tempfile::tempdir().unwrap();
        let spec = MachineSpec {
            name: "web".into(),
            password_hash: Some("$6$x$y".into()),
            ..MachineSpec::default()
        };
        let shadow = "root:*:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\n";
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: needs root to give /etc/shadow its group");
            return;
        }
        write_own_files(directory.path(), &spec, "10.0.0.1", shadow).unwrap();
        let text = fs::read_to_string(directory.path().join("etc/shadow")).unwrap();
        assert_eq!(
            text,
            "root:$6$x$y:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\n"
        );
        assert_eq!(
            fs::read_to_string(directory.path().join("etc/hostname")).unwrap(),
            "web\n"
        );
    }
}
