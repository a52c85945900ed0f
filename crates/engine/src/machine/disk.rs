//! The disks of one machine: an overlay on the shared base with the machine's own files, a copy of a disk image, and
//! further drives.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use base::units::format_size;
use disk::qcow2::{Backing, CreateOptions};
use disk::{BackingFiles, Disk as _, Format, Qcow2Disk};

use super::bases::{self, Base};
use super::create::Surroundings;
use super::record::{Drive, DriveSpec, MachineSpec};
use crate::{Error, Result};

/// The unit in which a changed file system is compared and written.
const BLOCK: usize = 4096;
const SCRATCH: &str = "meta.raw";
const OWN: &str = "own";

/// The root disk's file in a machine's folder.
pub fn file_name(format: Format) -> &'static str {
    match format {
        Format::Raw => "disk.raw",
        Format::Qcow2 => "disk.qcow2",
    }
}

/// Makes the root disk of a machine of an image, in `folder`.
///
/// # Errors
/// Where the image does not fit, a tool fails, or there is no room. The folder is the caller's to remove.
pub fn make_overlay(
    base: &Base,
    spec: &MachineSpec,
    folder: &Path,
    surroundings: &Surroundings,
) -> Result<()> {
    if spec.disk < base.size {
        return Err(Error::Capacity(format!(
            "the image does not fit on a disk of {}: it needs {}; give a larger --disk",
            format_size(spec.disk),
            format_size(base.size)
        )));
    }
    if spec.disk > bases::LARGEST_DISK {
        return Err(Error::Capacity(format!(
            "a root disk has at most {}; give the rest as a --drive",
            format_size(bases::LARGEST_DISK)
        )));
    }
    let failed = |what: &str| Error::io(format!("{what} in {}", folder.display()));
    let (own, scratch) = (folder.join(OWN), folder.join(SCRATCH));
    let meta = base.folder.join(bases::META);
    copy_sparse(&meta, &scratch).map_err(failed("cannot copy the file system's tables"))?;
    write_own_files(&own, spec, surroundings, &base.shadow)
        .map_err(failed("cannot write the machine's own files"))?;
    let size = format!("{}K", spec.disk / 1024);
    bases::tool(
        "resize2fs",
        &["-f".as_ref(), scratch.as_os_str(), size.as_ref()],
    )?;
    place_own_files(&own, &scratch, folder)?;
    let disk = folder.join(file_name(Format::Qcow2));
    let options = CreateOptions {
        size: spec.disk,
        backing: Some(Backing {
            file: backing_name(base),
            format: Some("raw".into()),
        }),
        ..CreateOptions::default()
    };
    Qcow2Disk::create(&disk, &options).map_err(Error::room)?;
    let image = Qcow2Disk::open(&disk, false, BackingFiles::Allowed).map_err(Error::room)?;
    copy_changes(&meta, &scratch, &image)?;
    image.flush().map_err(Error::room)?;
    drop(image);
    let _ = fs::remove_file(scratch);
    let _ = fs::remove_dir_all(own);
    Ok(())
}

/// The base's disk as a machine's disk names it: beside it, so that the state folder may move.
fn backing_name(base: &Base) -> String {
    let name = base.folder.file_name().unwrap_or_default();
    format!(
        "../../machine-bases/{}/{}",
        name.to_string_lossy(),
        bases::DISK
    )
}

/// Calls `each` with offset and content of every block of `file` that is no hole.
fn each_block(file: &File, mut each: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
    let failed = || Error::io("cannot read the file system's tables".to_owned());
    let mut at = 0;
    let mut block = [0u8; BLOCK];
    loop {
        let start = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(failed()(error.into())),
        };
        let end = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start))
            .map_err(|error| failed()(error.into()))?;
        let mut offset = start - start % BLOCK as u64;
        while offset < end {
            let count = read_full(file, &mut block, offset).map_err(failed())?;
            block[count..].fill(0);
            each(offset, &block)?;
            offset += BLOCK as u64;
        }
        at = end;
    }
}

/// Reads up to the file's end; how much that was.
fn read_full(file: &File, data: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < data.len() {
        match file.read_at(&mut data[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Copies a file without its holes.
pub fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let (source, target) = (File::open(from)?, File::create_new(to)?);
    // A file system that can share blocks copies nothing at all.
    if rustix::fs::ioctl_ficlone(&target, &source).is_ok() {
        return Ok(());
    }
    let len = source.metadata()?.len();
    target.set_len(len)?;
    let mut buffer = vec![0u8; 1 << 20];
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(&source, rustix::fs::SeekFrom::Data(at)) {
        let end = rustix::fs::seek(&source, rustix::fs::SeekFrom::Hole(start))?;
        let mut offset = start;
        while offset < end {
            let wanted = buffer.len().min((end - offset) as usize);
            let count = read_full(&source, &mut buffer[..wanted], offset)?;
            if count == 0 {
                break;
            }
            target.write_all_at(&buffer[..count], offset)?;
            offset += count as u64;
        }
        at = end;
    }
    Ok(())
}

/// Writes to `image` what `scratch` has and `meta` has not.
fn copy_changes(meta: &Path, scratch: &Path, image: &Qcow2Disk) -> Result<()> {
    let failed = || Error::io("cannot compare the file system's tables".to_owned());
    let (meta, scratch) = (
        File::open(meta).map_err(failed())?,
        File::open(scratch).map_err(failed())?,
    );
    let mut before = [0u8; BLOCK];
    each_block(&scratch, |offset, after| {
        let count = read_full(&meta, &mut before, offset).map_err(failed())?;
        before[count..].fill(0);
        if before != after {
            image.write_at(offset, after).map_err(Error::room)?;
        }
        Ok(())
    })
}

/// What makes this machine this one.
fn write_own_files(
    own: &Path,
    spec: &MachineSpec,
    surroundings: &Surroundings,
    shadow: &str,
) -> io::Result<()> {
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
        &surroundings
            .resolver
            .as_ref()
            .map_or_else(String::new, |address| format!("nameserver {address}\n")),
        0o644,
    )?;
    file(
        "etc/systemd/network/80-berth.network",
        &format!(
            "[Match]\nName=en* eth*\n\n[Network]\n{}\n\n[DHCPv4]\nUseMTU=yes\n",
            // Where there is no router to hear of, waiting for one only costs.
            if surroundings.v6 {
                "DHCP=yes\nIPv6AcceptRA=yes"
            } else {
                "DHCP=ipv4\nIPv6AcceptRA=no"
            }
        ),
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
    // A login on the virtio console once its driver has come, which is too late for systemd to find it by itself. The unit is not
    // wanted from the start: where there is no such console, gettys wait five seconds for its job and the boot a minute and a half.
    file(
        "etc/udev/rules.d/80-berth-console.rules",
        "ACTION==\"add\", SUBSYSTEM==\"tty\", KERNEL==\"hvc0\", TAG+=\"systemd\", \
         ENV{SYSTEMD_WANTS}+=\"serial-getty@hvc0.service\"\n",
        0o644,
    )?;
    if spec.autologin {
        for line in ["ttyS0", "hvc0"] {
            file(
                &format!("etc/systemd/system/serial-getty@{line}.service.d/autologin.conf"),
                "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --keep-baud 115200,57600,38400,9600 - $TERM\n",
                0o644,
            )?;
        }
    }
    if let Some(hash) = &spec.password_hash {
        file("etc/shadow", &with_password(shadow, hash), 0o640)?;
    }
    if !spec.ssh_keys.is_empty() {
        file(
            "root/.ssh/authorized_keys",
            &(spec.ssh_keys.join("\n") + "\n"),
            0o600,
        )?;
    }
    Ok(())
}

/// An `/etc/shadow` with root's password replaced.
fn with_password(shadow: &str, hash: &str) -> String {
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
    lines.join("\n") + "\n"
}

/// Debugfs commands that put the files below `own` in place of what the file system has there.
fn script(own: &Path) -> io::Result<String> {
    let mut lines = vec![];
    let mut open = vec![own.to_owned()];
    while let Some(folder) = open.pop() {
        let mut entries: Vec<_> = fs::read_dir(folder)?.collect::<io::Result<_>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            let inside = path
                .strip_prefix(own)
                .unwrap_or(&path)
                .display()
                .to_string();
            let about = path.symlink_metadata()?;
            if about.is_dir() {
                // Where it is there already, debugfs says so and goes on.
                lines.push(format!("mkdir /{inside}"));
                open.push(path);
                continue;
            }
            lines.push(format!("rm /{inside}"));
            if about.is_symlink() {
                let to = fs::read_link(&path)?;
                lines.push(format!("symlink /{inside} {}", to.display()));
            } else {
                lines.push(format!("write {OWN}/{inside} /{inside}"));
                let mode = about.permissions().mode() & 0o7777;
                lines.push(format!("set_inode_field /{inside} mode 0100{mode:03o}"));
            }
        }
    }
    // Debian's group shadow; and ssh refuses keys in a folder that others may read.
    if own.join("etc/shadow").exists() {
        lines.push("set_inode_field /etc/shadow gid 42".into());
    }
    if own.join("root/.ssh").exists() {
        lines.push("set_inode_field /root/.ssh mode 040700".into());
    }
    Ok(lines.join("\n") + "\n")
}

fn place_own_files(own: &Path, scratch: &Path, folder: &Path) -> Result<()> {
    let commands = folder.join("own.debugfs");
    script(own)
        .and_then(|text| fs::write(&commands, text))
        .map_err(Error::io(format!("cannot write in {}", folder.display())))?;
    // It reads names relative to its working folder, in which no name of ours has a space.
    let output = std::process::Command::new("debugfs")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .env("LC_ALL", "C")
        .current_dir(folder)
        .args(["-w", "-f", "own.debugfs"])
        .arg(scratch)
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(Error::io("cannot run debugfs (e2fsprogs)".to_owned()))?;
    let _ = fs::remove_file(commands);
    // It succeeds whatever its commands do; they say so on standard error, by their names.
    let words = String::from_utf8_lossy(&output.stderr);
    let complaint = words.lines().find(|line| {
        [
            "write:",
            "symlink:",
            "set_inode_field:",
            "do_write_internal:",
        ]
        .iter()
        .any(|name| line.starts_with(name))
            || line.contains("Could not allocate")
    });
    match complaint {
        None if output.status.success() => Ok(()),
        complaint => Err(Error::Conflict(format!(
            "debugfs cannot place the machine's own files: {}",
            complaint.unwrap_or("no reason given")
        ))),
    }
}

/// What a disk image is, looked at once.
fn format_of(path: &Path, said: Option<Format>) -> Result<Format> {
    match said {
        Some(format) => Ok(format),
        None => disk::probe(path).map_err(Error::room),
    }
}

/// Copies a disk image to be the root disk; its format and size. A size of 0 keeps the image's.
///
/// # Errors
/// Where it is damaged, in use, on top of another, or larger than `size`.
pub fn import(from: &Path, size: u64, folder: &Path) -> Result<(Format, u64)> {
    let format = format_of(from, None)?;
    let len = disk::open(from, format, true, BackingFiles::Refused)
        .map_err(Error::room)?
        .len();
    if size != 0 && size < len {
        return Err(Error::Invalid(format!(
            "the disk {} has {}; it cannot be made smaller, {}",
            from.display(),
            format_size(len),
            format_size(size)
        )));
    }
    let to = folder.join(file_name(format));
    copy_sparse(from, &to).map_err(Error::io(format!("cannot copy {}", from.display())))?;
    fs::set_permissions(&to, Permissions::from_mode(0o600))
        .map_err(Error::io(format!("cannot use {}", to.display())))?;
    if size > len {
        grow(&to, format, size)?;
    }
    Ok((format, size.max(len)))
}

/// Makes a disk larger, which no machine may use meanwhile.
///
/// # Errors
/// Where it is in use or damaged.
pub fn grow(path: &Path, format: Format, size: u64) -> Result<()> {
    disk::grow(path, format, size).map_err(Error::room)
}

/// Makes or looks at the further disks.
///
/// # Errors
/// Names the drive that cannot be used.
pub fn drives(wishes: &[DriveSpec], folder: &Path) -> Result<Vec<Drive>> {
    let mut drives = Vec::new();
    for (number, wish) in wishes.iter().enumerate() {
        drives.push(match &wish.path {
            Some(path) => {
                if !path.is_absolute() {
                    return Err(Error::Invalid(format!(
                        "the drive {} needs a path from the root",
                        path.display()
                    )));
                }
                let format = format_of(path, wish.format)?;
                let opened = disk::open(path, format, true, BackingFiles::Refused);
                Drive {
                    path: fs::canonicalize(path)
                        .map_err(Error::io(format!("cannot use {}", path.display())))?,
                    format,
                    read_only: wish.read_only,
                    bus: wish.bus,
                    size: opened.map_err(Error::room)?.len(),
                    own: false,
                }
            }
            None => {
                if wish.size < 1 << 20 {
                    return Err(Error::Invalid(format!(
                        "a drive of {} is none: give at least 1 MiB",
                        format_size(wish.size)
                    )));
                }
                let path: PathBuf = folder.join(format!("drive-{number}.qcow2"));
                let options = CreateOptions {
                    size: wish.size,
                    ..CreateOptions::default()
                };
                Qcow2Disk::create(&path, &options).map_err(Error::room)?;
                Drive {
                    path,
                    format: Format::Qcow2,
                    read_only: wish.read_only,
                    bus: wish.bus,
                    size: wish.size.next_multiple_of(512),
                    own: true,
                }
            }
        });
    }
    Ok(drives)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_replaces_roots_and_nobody_elses() {
        let shadow = "root:*:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\n";
        assert_eq!(
            with_password(shadow, "$6$x$y"),
            "root:$6$x$y:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\n"
        );
        assert_eq!(with_password("", "h"), "root:h:::::::\n");
    }

    #[test]
    fn own_files_replace_the_images_and_links_stay_links() {
        let directory = tempfile::tempdir().unwrap();
        let spec = MachineSpec {
            name: "web".into(),
            ssh_keys: vec!["ssh-ed25519 AAAA me".into()],
            ..MachineSpec::default()
        };
        let surroundings = Surroundings {
            resolver: Some("10.0.0.1".into()),
            v6: true,
        };
        write_own_files(directory.path(), &spec, &surroundings, "").unwrap();
        let network = directory
            .path()
            .join("etc/systemd/network/80-berth.network");
        assert!(fs::read_to_string(network).unwrap().contains("DHCP=yes"));
        let text = script(directory.path()).unwrap();
        for line in [
            "rm /etc/hostname",
            "write own/etc/hostname /etc/hostname",
            "set_inode_field /etc/machine-id mode 0100444",
            "symlink /etc/systemd/system/systemd-rfkill.socket /dev/null",
            "write own/etc/udev/rules.d/80-berth-console.rules /etc/udev/rules.d/80-berth-console.rules",
            "set_inode_field /root/.ssh mode 040700",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        // A unit of a device that may not come would hold up whoever starts when the machine idles: every login.
        assert!(!text.contains("wants/serial-getty"), "{text}");
        let folder = text.find("mkdir /etc/systemd\n").unwrap();
        assert!(
            folder < text.find("write own/etc/systemd/").unwrap(),
            "{text}"
        );
    }

    #[test]
    fn a_sparse_copy_is_equal_and_sparse() {
        use std::os::unix::fs::MetadataExt;
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("a"), directory.path().join("b"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(b"middle", 33_333_333).unwrap();
        copy_sparse(&from, &to).unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 4 << 20);
    }
}
