//! Images' files as file systems, made once and shared by the disks of all machines of an image.
//!
//! ```text
//! STATE/machine-bases/IMAGE/disk.raw      an ext4 file system of the image's files, as small as they allow; never written again
//!                           meta.raw      the same without the files' content: on it, a machine's own files are placed
//!                           vmlinuz, vmlinux, initrd   the kernel, packed and unpacked
//!                           base.json     written last; without it nothing was promised
//! ```
//!
//! A machine's disk is a qcow2 image on top. It differs from the base in what resize2fs and debugfs change on a copy of
//! `meta.raw`: a few megabytes, in a fraction of a second, with nothing mounted.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use base::file::{Durability, read_json, write_json};
use image::{ImageId, Layers, Store};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use serde::{Deserialize, Serialize};

use super::capacity::allocated;
use crate::{Error, Result};

pub const DISK: &str = "disk.raw";
pub const META: &str = "meta.raw";
pub const KERNEL: &str = "vmlinuz";
pub const UNPACKED: &str = "vmlinux";
pub const INITRD: &str = "initrd";
const RECORD: &str = "base.json";

/// The largest root disk: the file system has room for the tables of this many 4 KiB blocks.
pub const LARGEST_DISK: u64 = 4 << 40;
const BLOCK: u64 = 4096;
/// No base is smaller.
const SMALLEST: u64 = 96 << 20;

/// A shared base.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Base {
    /// Of this structure: 1.
    version: u32,
    pub image: String,
    /// Bytes of its disk.
    pub size: u64,
    pub initrd: bool,
    /// The kernel could be unpacked.
    pub unpacked: bool,
    /// The image's `/etc/shadow`.
    pub shadow: String,
    #[serde(skip)]
    pub folder: PathBuf,
}

/// All bases of a daemon.
pub struct Bases {
    folder: PathBuf,
    /// One is made at a time: they take all of the disk's speed.
    making: Mutex<()>,
}

/// The folder name of an image's base.
pub fn name_of(image: &ImageId) -> String {
    image.to_string().replace(':', "-")
}

fn run(program: &str, arguments: &[&std::ffi::OsStr]) -> Result<std::process::Output> {
    let output = Command::new(program)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .env("LC_ALL", "C")
        .args(arguments)
        .stdin(Stdio::null())
        .output();
    output.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::Unsupported(format!(
            "{program} is missing, which makes disks of images: apt-get install e2fsprogs"
        )),
        _ => Error::io(format!("cannot run {program}"))(error),
    })
}

/// Runs one of e2fsprogs, which must succeed.
pub(super) fn tool(program: &str, arguments: &[&std::ffi::OsStr]) -> Result<std::process::Output> {
    let output = run(program, arguments)?;
    if output.status.success() {
        return Ok(output);
    }
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    let last = words
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("no reason given");
    let message = format!("{program} cannot make the disk: {last}");
    if last.contains("No space") {
        Err(Error::Capacity(message))
    } else {
        Err(Error::Conflict(message))
    }
}

impl Bases {
    pub fn open(folder: PathBuf) -> io::Result<Bases> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)?;
        for entry in fs::read_dir(&folder)?.flatten() {
            if !entry.path().join(RECORD).exists() {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        Ok(Bases {
            folder,
            making: Mutex::new(()),
        })
    }

    pub fn folder_of(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Bytes that all of them take.
    pub fn used(&self) -> u64 {
        let folders = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        folders
            .flat_map(|entry| fs::read_dir(entry.path()).into_iter().flatten().flatten())
            .map(|file| allocated(&file.path()))
            .sum()
    }

    pub fn get(&self, name: &str) -> Option<Base> {
        let folder = self.folder.join(name);
        let mut base: Base = read_json(&folder.join(RECORD)).ok()??;
        base.folder = folder;
        Some(base)
    }

    /// Removes what no machine needs and whose image is gone.
    pub fn sweep(&self, needed: &HashSet<String>, store: &Store) {
        let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let here = self
                .get(&name)
                .is_some_and(|base| store.resolve(&base.image).is_ok());
            if !here && !needed.contains(&name) {
                let _ = fs::remove_file(entry.path().join(RECORD));
                if let Err(error) = fs::remove_dir_all(entry.path()) {
                    tracing::warn!(path = %entry.path().display(), %error, "a machine base is not removed");
                }
            }
        }
    }

    /// The base of an image, made now where there is none.
    ///
    /// # Errors
    /// Where the image has no kernel, there is no room, or a tool is missing or fails. Nothing is left then.
    pub fn of_image(&self, store: &Store, image: &ImageId, called: &str) -> Result<Base> {
        let name = name_of(image);
        let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(base) = self.get(&name) {
            return Ok(base);
        }
        let folder = self.folder.join(&name);
        let _ = fs::remove_dir_all(&folder);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .map_err(Error::io(format!("cannot make {}", folder.display())))?;
        let made = make(store, image, called, &folder);
        for scratch in ["upper", "work"] {
            let _ = fs::remove_dir_all(folder.join(scratch));
        }
        made.inspect_err(|_| {
            let _ = fs::remove_dir_all(&folder);
        })
    }
}

fn make(store: &Store, image: &ImageId, called: &str, folder: &Path) -> Result<Base> {
    let lower = store.layer_folders(image).map_err(Error::room)?;
    let tree = mount(folder, lower)?;
    let initrd = copy_kernel(&tree, folder, called)?;
    let kernel = folder.join(KERNEL);
    // Unpacked once, here, instead of at each start. What cannot be unpacked does it itself, in the guest.
    let unpacked = vmm::boot::Kernel::open(&kernel, vmm::boot::Protocol::default())
        .map_err(|error| {
            Error::Invalid(format!(
                "the kernel of the image {called} is unusable: {error}"
            ))
        })?
        .unpacked()
        .map(|plain| fs::write(folder.join(UNPACKED), plain))
        .transpose()
        .map_err(Error::io(format!("cannot write in {}", folder.display())))?
        .is_some();
    let size = make_file_system(&tree, folder)?;
    let base = Base {
        version: 1,
        image: image.to_string(),
        size,
        initrd,
        unpacked,
        shadow: read(&tree, "etc/shadow").unwrap_or_default(),
        folder: folder.to_owned(),
    };
    for file in [DISK, META] {
        File::open(folder.join(file))
            .and_then(|file| file.sync_all())
            .map_err(Error::io(format!("cannot write {file} to the disk")))?;
    }
    write_json(&folder.join(RECORD), &base, Durability::Host)
        .map_err(Error::io(format!("cannot write in {}", folder.display())))?;
    Ok(base)
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

/// Copies the newest kernel of `/boot`, and its initial RAM disk where it needs one; whether it does.
fn copy_kernel(tree: &OwnedFd, folder: &Path, called: &str) -> Result<bool> {
    let no_kernel = || super::no_kernel(called);
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
    let initrd = format!("boot/initrd.img-{version}");
    Ok(needs_initrd && copy(tree, &initrd, &folder.join(INITRD)).is_ok())
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

/// Bytes of the content in whole blocks, and the number of inodes.
fn weigh(folder: &Path) -> io::Result<(u64, u64)> {
    let (mut bytes, mut inodes) = (0, 0);
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let about = entry.path().symlink_metadata()?;
            inodes += 1;
            if about.is_dir() {
                open.push(entry.path());
                bytes += about.size().max(BLOCK).next_multiple_of(BLOCK);
            } else if about.is_file() {
                bytes += about.size().next_multiple_of(BLOCK);
            }
        }
    }
    Ok((bytes, inodes))
}

/// Makes `disk.raw` and `meta.raw`; the bytes of the disk.
fn make_file_system(tree: &OwnedFd, folder: &Path) -> Result<u64> {
    let inherited = rustix::io::fcntl_dupfd_cloexec(tree, 10)
        .map_err(io::Error::from)
        .map_err(Error::io("cannot share the tree".to_owned()))?;
    rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty())
        .map_err(io::Error::from)
        .map_err(Error::io("cannot share the tree".to_owned()))?;
    let content = format!("/proc/self/fd/{}", inherited.as_raw_fd());
    let (bytes, inodes) = weigh(&Path::new(&content).join(".")).map_err(Error::io(
        "cannot look through the image's files".to_owned(),
    ))?;
    let journal = if bytes > 256 << 20 {
        64 << 20
    } else {
        16 << 20
    };
    let size = (bytes + bytes / 12 + inodes * 512 + journal + (24 << 20))
        .max(SMALLEST)
        .next_multiple_of(32 << 20);
    // Bytes per inode, from mke2fs's own 16 KiB down to what the files need with some to spare.
    let ratio = (size / (inodes + inodes / 2 + 1024)).clamp(2048, 16_384);
    let disk = folder.join(DISK);
    File::create_new(&disk)
        .and_then(|file| file.set_len(size))
        .map_err(Error::io(format!("cannot make {}", disk.display())))?;
    // Reserved tables let the file system grow without moving a block: what is moved would be lost in `meta.raw`.
    let options = format!(
        "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0,resize={}",
        LARGEST_DISK / BLOCK
    );
    let (journal, ratio) = (format!("size={}", journal >> 20), ratio.to_string());
    tool(
        "mke2fs",
        &[
            "-q", "-F", "-t", "ext4", "-b", "4096", "-L", "root", "-m", "1", "-i", &ratio, "-J",
            &journal, "-E", &options, "-d", &content,
        ]
        .map(std::ffi::OsStr::new)
        .into_iter()
        .chain([disk.as_os_str()])
        .collect::<Vec<_>>(),
    )?;
    let meta = folder.join(META);
    tool(
        "e2image",
        &["-r".as_ref(), disk.as_os_str(), meta.as_os_str()],
    )?;
    Ok(size)
}
