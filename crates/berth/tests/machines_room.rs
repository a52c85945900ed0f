//! `berth machine boot` on a host without room, and with disks that are broken.

mod guest;
mod host;

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use guest::{Small, file_like, initrd, kernel_package};
use host::{BERTH, has, has_all};

/// A guest that fills its first disk, and says what it wrote and what it reads back.
const FILLS: &str = r#"#!/bin/sh
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev
dd if=/dev/urandom of=/tmp/data bs=1M count=16 2>/dev/null
if dd if=/tmp/data of=/dev/nvme0n1 bs=64k conv=fsync 2>/dev/null; then echo WRITTEN; else echo REFUSED; fi
echo 3 > /proc/sys/vm/drop_caches
echo SUMS $(md5sum < /tmp/data) $(head -c 16777216 /dev/nvme0n1 | md5sum)
poweroff -f
"#;

struct Boot {
    child: Child,
    /// A line of standard error at a time.
    words: BufReader<std::process::ChildStderr>,
}

impl Boot {
    fn start(kernel: &Path, initrd: &Path, disk: &str, more: &[&str]) -> Boot {
        let mut child = Command::new("timeout")
            .args([
                "500", BERTH, "machine", "boot", "--cpu", "soft", "--memory", "256M", "--append",
                "quiet", "--kernel",
            ])
            .arg(kernel)
            .arg("--initrd")
            .arg(initrd)
            .args(["--disk", disk])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let words = BufReader::new(child.stderr.take().unwrap());
        Boot { child, words }
    }

    /// Reads on until a line has this in it.
    fn says(&mut self, text: &str) -> String {
        let mut all = String::new();
        loop {
            let mut line = String::new();
            let count = self.words.read_line(&mut line).unwrap();
            all.push_str(&line);
            if line.contains(text) {
                return line;
            }
            assert!(count > 0, "it ended without {text:?}: {all}");
        }
    }

    /// Its exit code, the guest's words, and the rest of its own.
    fn end(mut self) -> (Option<i32>, String, String) {
        let mut errors = String::new();
        let mut output = String::new();
        self.child
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut output)
            .unwrap();
        self.words.read_to_string(&mut errors).unwrap();
        (self.child.wait().unwrap().code(), output, errors)
    }
}

/// Kernel and initial RAM disk, where this host can have them.
fn ready(folder: &Path) -> Option<(PathBuf, PathBuf)> {
    let package = kernel_package()?;
    if !has_all(&["busybox", "python3"]) {
        return None;
    }
    let initrd = initrd(folder, &package, FILLS);
    Some((file_like(&package.join("boot"), "vmlinuz-"), initrd))
}

fn root_only() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: a tmpfs can be mounted by root alone");
    }
    root
}

/// The two sums that the guest saw.
fn sums(output: &str) -> Vec<String> {
    let line = output.lines().find(|line| line.contains("SUMS ")).unwrap();
    line.split_ascii_whitespace()
        .filter(|word| word.len() == 32)
        .map(str::to_owned)
        .collect()
}

#[test]
fn a_kernel_booted_by_hand_waits_for_room_and_goes_on_with_nothing_lost() {
    let directory = tempfile::tempdir().unwrap();
    let Some((kernel, initrd)) = ready(directory.path()) else {
        return;
    };
    if !root_only() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let small = Small::mount(directory.path().join(format), "6m");
        let disk = small.0.join(format!("disk.{format}"));
        if format == "raw" {
            let file = std::fs::File::create(&disk).unwrap();
            file.set_len(32 << 20).unwrap();
        } else if has("qemu-img") {
            let made = Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2"])
                .arg(&disk)
                .arg("32M")
                .status();
            assert!(made.unwrap().success());
        } else {
            eprintln!("SKIPPED: needs qemu-img");
            continue;
        }
        let mut boot = Boot::start(&kernel, &initrd, disk.to_str().unwrap(), &[]);
        let word = boot.says("no room");
        assert!(word.contains(disk.to_str().unwrap()), "{word}");
        small.resize("64m");
        boot.says("room again");
        let (code, output, errors) = boot.end();
        assert_eq!(code, Some(0), "{output}{errors}");
        assert!(output.contains("WRITTEN"), "{output}");
        let sums = sums(&output);
        assert!(sums.len() == 2 && sums[0] == sums[1], "{sums:?}");
        if format == "qcow2" {
            let checked = Command::new("qemu-img").arg("check").arg(&disk).output();
            let checked = checked.unwrap();
            assert!(checked.status.success(), "{checked:?}");
        }
    }
}

#[test]
fn with_the_policy_error_a_guest_on_a_full_host_sees_a_broken_write_and_runs_on() {
    let directory = tempfile::tempdir().unwrap();
    let Some((kernel, initrd)) = ready(directory.path()) else {
        return;
    };
    if !root_only() {
        return;
    }
    let small = Small::mount(directory.path().join("small"), "6m");
    let disk = small.0.join("disk.img");
    let file = std::fs::File::create(&disk).unwrap();
    file.set_len(32 << 20).unwrap();
    let policy = ["--on-disk-full", "error"];
    let mut boot = Boot::start(&kernel, &initrd, disk.to_str().unwrap(), &policy);
    boot.says("--on-disk-full error");
    let (code, output, errors) = boot.end();
    assert_eq!(code, Some(0), "{output}{errors}");
    assert!(output.contains("REFUSED"), "{output}");
}

#[test]
fn a_disk_that_is_cut_off_is_refused_before_the_guest_runs_and_left_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    if !has("qemu-img") {
        eprintln!("SKIPPED: needs qemu-img");
        return;
    }
    let kernel = directory.path().join("kernel");
    std::fs::write(&kernel, guest::idle_kernel()).unwrap();
    let raw = directory.path().join("disk.raw");
    std::fs::write(&raw, vec![7; 4 << 20]).unwrap();
    let disk = directory.path().join("disk.qcow2");
    let made = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([&raw, &disk])
        .status();
    assert!(made.unwrap().success());
    let file = std::fs::File::options().write(true).open(&disk).unwrap();
    file.set_len(2 << 20).unwrap();
    let before = std::fs::read(&disk).unwrap();
    let output = Command::new("timeout")
        .args(["60", BERTH, "machine", "boot", "--cpu", "soft", "--kernel"])
        .arg(&kernel)
        .arg("--disk")
        .arg(&disk)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    for word in ["disk.qcow2", "cut off", "qemu-img check"] {
        assert!(error.contains(word), "{error}");
    }
    assert!(std::fs::read(&disk).unwrap() == before);
}
