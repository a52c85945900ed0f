//! Guests for tests: Debian's kernel with busybox, and a kernel of three bytes of code.

// Each test program uses its own part of this.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::host::{BERTH, Host, has_all, start};

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

/// The folder of the unpacked kernel package, with `boot` and `lib/modules`.
pub fn kernel_package() -> Option<PathBuf> {
    let folder = root().join("build/guest/linux-image-cloud-amd64");
    if cfg!(not(target_arch = "x86_64")) {
        eprintln!("SKIPPED: the guest's kernel is for x86-64");
        return None;
    }
    if !folder.is_dir() {
        eprintln!("SKIPPED: no guest kernel; scripts/guest-kernel fetches it");
        return None;
    }
    Some(folder)
}

pub fn file_like(folder: &Path, start: &str) -> PathBuf {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.file_name().unwrap().to_str().unwrap().starts_with(start))
        .unwrap()
}

/// The folder of the package's drivers.
pub fn modules_of(package: &Path) -> PathBuf {
    file_like(&package.join("lib/modules"), "").join("kernel")
}

/// Makes an image of an archive of files.
fn import(host: &Host, name: &str, files: tar::Builder<Vec<u8>>) {
    let archive = files.into_inner().unwrap();
    let output = host.with_input(&["import", "-", name], &archive);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A daemon with the image `tiny`, where this host has what that takes and these programs.
pub fn start_with_tiny(programs: &[&str]) -> Option<Host> {
    let package = kernel_package()?;
    if !has_all(&["mke2fs", "debugfs"]) || !has_all(programs) {
        return None;
    }
    let host = start()?;
    import_tiny(&host, &package);
    Some(host)
}

/// Drivers in the order in which they need each other.
pub const MODULES: [&str; 8] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
];

/// Further drivers, which lie in `/modules` and are loaded where a test wants them.
pub const MORE_MODULES: [&str; 8] = [
    "drivers/acpi/button.ko",
    "drivers/input/evdev.ko",
    "drivers/block/virtio_blk.ko",
    "drivers/virtio/virtio_balloon.ko",
    "drivers/char/virtio_console.ko",
    "net/vmw_vsock/vsock.ko",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common.ko",
    "net/vmw_vsock/vmw_vsock_virtio_transport.ko",
];

/// An image `tiny` of busybox and Debian's kernel that serves a page and keeps a stamp on its disk.
pub fn import_tiny(host: &Host, package: &Path) {
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |name: &str, mode: u32, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(mode);
        builder.append_data(&mut header, name, bytes).unwrap();
    };
    let busybox = base::host::program("busybox").unwrap();
    add("bin/busybox", 0o755, &std::fs::read(busybox).unwrap());
    for name in ["vmlinuz-", "config-"] {
        let file = file_like(&package.join("boot"), name);
        add(
            &format!("boot/{}", file.file_name().unwrap().to_str().unwrap()),
            0o644,
            &std::fs::read(&file).unwrap(),
        );
    }
    let modules = modules_of(package);
    let mut load = String::new();
    for module in MODULES.iter().chain(&MORE_MODULES) {
        let name = module.rsplit('/').next().unwrap();
        add(
            &format!("modules/{name}"),
            0o644,
            &std::fs::read(modules.join(*module)).unwrap(),
        );
        if MODULES.contains(module) {
            load.push_str(&format!("insmod /modules/{name}\n"));
        }
    }
    add("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n");
    add("bin/off", 0o755, b"#!/bin/busybox sh\npoweroff -f\n");
    add("proc/.keep", 0o644, b"");
    add("sys/.keep", 0o644, b"");
    add("dev/.keep", 0o644, b"");
    add("www/index.html", 0o644, b"page of a machine\n");
    add(
        "etc/udhcpc.script",
        0o755,
        b"#!/bin/busybox sh\n[ \"$1\" = bound ] && /bin/busybox ip addr add $ip/$mask dev $interface && echo LEASE $ip\n",
    );
    let init = format!(
        "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nexport PATH=/bin\nmount -t proc none /proc\nmount -t sysfs none /sys\nmount -t devtmpfs none /dev\n\
         if [ -e /stamp ]; then echo STAMP-FOUND $(cat /stamp); else echo precious > /stamp; sync; echo STAMP-WRITTEN; fi\n\
         {load}ip link set eth0 up\nudhcpc -i eth0 -s /etc/udhcpc.script -q -n -t 20\nhttpd -p 80 -h /www\necho READY\n\
         while true; do sh < /dev/ttyS0; done\n"
    );
    add("sbin/init", 0o755, init.as_bytes());
    import(host, "tiny", builder);
}

/// An ELF kernel that halts its CPU for good.
pub fn idle_kernel() -> Vec<u8> {
    const ADDRESS: u64 = 0x100_0000;
    // hlt; jmp back
    const CODE: [u8; 3] = [0xf4, 0xeb, 0xfd];
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes()); // executable
    file.extend(62u16.to_le_bytes()); // x86-64
    file.extend(1u32.to_le_bytes());
    file.extend(ADDRESS.to_le_bytes());
    file.extend(64u64.to_le_bytes()); // program headers
    file.extend(0u64.to_le_bytes());
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes()); // loadable
    file.extend(5u32.to_le_bytes());
    for field in [120, ADDRESS, ADDRESS, CODE.len() as u64, 4096, 4096] {
        file.extend(u64::to_le_bytes(field));
    }
    file.extend(CODE);
    file
}

/// An image `idle` of [`idle_kernel`] and next to nothing else: machines of it are cheap.
pub fn import_idle(host: &Host) {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in [
        ("boot/vmlinuz-idle", &idle_kernel()[..]),
        ("etc/hostname", b"image\n"),
        ("etc/shadow", b"root:*:19000:0:99999:7:::\n"),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, bytes).unwrap();
    }
    import(host, "idle", builder);
}

/// Types a line on the console of a machine and leaves it.
pub fn type_line(host: &Host, machine: &str, line: &str) {
    let typed = format!("{line}\n\x1d");
    let output = host.with_input(&["machine", "console", machine], typed.as_bytes());
    assert!(output.status.success());
}

/// A program for guests, which comes to them on a drive, as the image has no place for it.
pub struct Tool {
    folder: tempfile::TempDir,
    size: u64,
}

impl Tool {
    /// Compiles a source of this repository, where the host can.
    pub fn build(source: &str) -> Option<Tool> {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("tool");
        let built = Command::new("gcc")
            .args(["-O1", "-static", "-o"])
            .args([&program, &root().join(source)])
            .status();
        if !built.is_ok_and(|status| status.success()) {
            eprintln!("SKIPPED: gcc and static libc are needed for the guest's program");
            return None;
        }
        let size = std::fs::metadata(&program).unwrap().len();
        let file = std::fs::OpenOptions::new().write(true).open(&program);
        file.unwrap().set_len(size.next_multiple_of(4096)).unwrap();
        Some(Tool { folder, size })
    }

    /// What `--drive` is given.
    pub fn drive(&self) -> String {
        format!(
            "{},ro,format=raw",
            self.folder.path().join("tool").display()
        )
    }

    /// Puts it at `/tool` in the guest.
    pub fn unpack(&self, host: &Host, machine: &str, device: &str) {
        let line = format!(
            "head -c {} {device} > /tool; chmod 755 /tool; echo UNPA''CKED",
            self.size
        );
        type_line(host, machine, &line);
        host.eventually("the guest has the tool", || {
            logs(host, machine).contains("UNPACKED")
        });
    }
}

/// Runs a line in the guest until `word` is on the console more often than before.
pub fn guest_says(host: &Host, machine: &str, line: &str, word: &str) {
    let before = logs(host, machine).matches(word).count();
    let mut tries = 0;
    host.eventually(&format!("{word} by {line}"), || {
        if tries % 100 == 0 {
            type_line(host, machine, line);
        }
        tries += 1;
        logs(host, machine).matches(word).count() > before
    });
}

/// One machine as `inspect` shows it.
pub fn inspect(host: &Host, machine: &str) -> serde_json::Value {
    let text = host.ok(&["machine", "inspect", machine]);
    serde_json::from_str::<serde_json::Value>(&text).unwrap()[0].clone()
}

/// A small tmpfs that goes with this value.
pub struct Small(pub PathBuf);

impl Small {
    pub fn mount(path: PathBuf, size: &str) -> Small {
        std::fs::create_dir(&path).unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
            .arg(&path)
            .status()
            .unwrap();
        assert!(status.success());
        Small(path)
    }

    pub fn resize(&self, size: &str) {
        let status = Command::new("mount")
            .args(["-o", &format!("remount,size={size}")])
            .arg(&self.0)
            .status()
            .unwrap();
        assert!(status.success());
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// An initial RAM disk with this script as init, and the drivers of a virtio card.
pub fn initrd(folder: &Path, package: &Path, script: &str) -> PathBuf {
    let modules = modules_of(package);
    let files = MODULES.map(|module| {
        let name = module.rsplit('/').next().unwrap();
        format!("{name}={}", modules.join(module).display())
    });
    initrd_of(folder, script, &files)
}

/// An initial RAM disk with this script as init, and further files as `place=file`.
pub fn initrd_of(folder: &Path, script: &str, files: &[String]) -> PathBuf {
    let (init, out) = (folder.join("init"), folder.join("initrd"));
    std::fs::write(&init, script).unwrap();
    let made = Command::new(root().join("scripts/guest-initrd"))
        .arg(&out)
        .arg(&init)
        .args(files)
        .status();
    assert!(made.unwrap().success());
    out
}

/// The words that create a machine of the image `tiny` on the software CPU.
pub fn machine_of_tiny<'a>(name: &'a str, memory: &'a str, disk: &'a str) -> [&'a str; 11] {
    [
        "machine", "create", name, "--image", "tiny", "--memory", memory, "--disk", disk, "--cpu",
        "soft",
    ]
}

/// Creates and starts it; `more` are further options.
pub fn start_tiny(host: &Host, name: &str, memory: &str, disk: &str, more: &[&str]) {
    host.ok(&[&machine_of_tiny(name, memory, disk), more].concat());
    host.ok(&["machine", "start", name]);
}

/// What the serial line of a machine wrote.
pub fn logs(host: &Host, machine: &str) -> String {
    host.ok(&["machine", "logs", machine])
}

/// Waits until the guest of `tiny` has come up so many times.
pub fn ready(host: &Host, machine: &str, times: usize) {
    host.eventually("the guest is ready", || {
        logs(host, machine).matches("READY").count() == times
    });
}

/// Creates and starts one of 384 MiB, and waits until its guest is ready.
pub fn start_tiny_machine(host: &Host, name: &str, more: &[&str]) {
    start_tiny(host, name, "384M", "512M", more);
    ready(host, name, 1);
}

/// Boots the package's kernel with this initial RAM disk on the software CPU, for at most so many seconds.
pub fn boot(package: &Path, initrd: &Path, seconds: u32, more: &[&str]) -> Output {
    Command::new("timeout")
        .arg(seconds.to_string())
        .args([BERTH, "machine", "boot", "--cpu", "soft", "--kernel"])
        .arg(file_like(&package.join("boot"), "vmlinuz-"))
        .arg("--initrd")
        .arg(initrd)
        .args(more)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}
