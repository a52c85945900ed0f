//! Disks of machines, with Debian's kernel and busybox as the guest, and QEMU's tools as the judge.

mod guest;
mod host;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use guest::{Small, inspect, logs, start_with_tiny, type_line};
use host::Host;

const PROGRAMS: [&str; 2] = ["qemu-img", "e2fsck"];

fn create(host: &Host, name: &str, more: &[&str]) {
    let mut words = vec![
        "machine", "create", name, "--image", "tiny", "--memory", "256M", "--cpu", "soft",
    ];
    if !more.contains(&"--disk") {
        words.extend(["--disk", "512M"]);
    }
    words.extend(more);
    host.ok(&words);
}

fn boot(host: &Host, name: &str) {
    host.ok(&["machine", "start", name]);
    wait_for(host, name, "READY");
}

fn wait_for(host: &Host, name: &str, text: &str) {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(240);
    while !logs(host, name).contains(text) {
        assert!(
            std::time::Instant::now() < end,
            "never: {text}\n{}",
            logs(host, name)
        );
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// Runs a line in the guest; `mark` is new in its log when that is done.
fn guest(host: &Host, name: &str, line: &str, mark: &str) {
    // The typed line is echoed: the mark must not be in it as it is.
    let (first, rest) = mark.split_at(1);
    type_line(host, name, &format!("{line}; echo {first}\"\"{rest}"));
    wait_for(host, name, mark);
}

fn power_off(host: &Host, name: &str) {
    type_line(host, name, "off");
    host.eventually("the guest powered off", || {
        inspect(host, name)["state"] == "stopped"
    });
}

fn disk_of(host: &Host, name: &str) -> PathBuf {
    let shown = inspect(host, name);
    Path::new(shown["folder"].as_str().unwrap()).join("disk.qcow2")
}

/// qemu-img check finds no error and no leak.
fn check(disk: &Path) {
    let output = Command::new("qemu-img")
        .arg("check")
        .arg(disk)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// The whole disk as a raw file, by qemu-img.
fn flatten(disk: &Path, to: &Path) {
    let output = Command::new("qemu-img")
        .args(["convert", "-O", "raw"])
        .arg(disk)
        .arg(to)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let compare = Command::new("qemu-img")
        .args(["compare", "-F", "raw"])
        .args([disk, to])
        .output()
        .unwrap();
    assert!(compare.status.success(), "{compare:?}");
}

fn fsck(file_system: &Path) {
    let output = Command::new("e2fsck")
        .arg("-fn")
        .arg(file_system)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

fn file_in(file_system: &Path, path: &str) -> String {
    let output = Command::new("debugfs")
        .args(["-R", &format!("cat {path}")])
        .arg(file_system)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn machines_of_an_image_share_its_files_and_differ_in_their_own() {
    let Some(host) = start_with_tiny(&PROGRAMS) else {
        return;
    };
    let begun = std::time::Instant::now();
    create(&host, "first", &[]);
    let first = begun.elapsed();
    let begun = std::time::Instant::now();
    let key = host.scratch().join("key.pub");
    std::fs::write(&key, "ssh-ed25519 AAAA someone\n").unwrap();
    create(
        &host,
        "second",
        &[
            "--disk",
            "3G",
            "--ssh-key",
            key.to_str().unwrap(),
            "--password-hash",
            "$6$salt$hash",
        ],
    );
    eprintln!("created in {first:?}, the second in {:?}", begun.elapsed());
    let bases: Vec<_> = std::fs::read_dir(host.state().join("machine-bases"))
        .unwrap()
        .flatten()
        .collect();
    assert_eq!(bases.len(), 1, "{bases:?}");
    for name in ["first", "second"] {
        let disk = disk_of(&host, name);
        check(&disk);
        let used = std::fs::metadata(&disk).unwrap().blocks() * 512;
        assert!(used < 48 << 20, "{name} takes {used}");
        let raw = host.scratch().join("flat.raw");
        flatten(&disk, &raw);
        fsck(&raw);
        assert_eq!(file_in(&raw, "/etc/hostname").trim(), name);
        assert_eq!(file_in(&raw, "/www/index.html"), "page of a machine\n");
        if name == "second" {
            assert_eq!(std::fs::metadata(&raw).unwrap().len(), 3 << 30);
            assert!(file_in(&raw, "/root/.ssh/authorized_keys").contains("someone"));
            assert!(file_in(&raw, "/etc/shadow").starts_with("root:$6$salt$hash:"));
        }
        std::fs::remove_file(raw).unwrap();
    }
    // The image may go; its files stay as long as a machine lies on them.
    host.ok(&["rmi", "tiny"]);
    host.ok(&["machine", "rm", "second"]);
    boot(&host, "first");
    power_off(&host, "first");
    check(&disk_of(&host, "first"));
    host.ok(&["machine", "rm", "first"]);
    let bases = std::fs::read_dir(host.state().join("machine-bases")).unwrap();
    assert_eq!(bases.count(), 0);
}

#[test]
fn a_disk_grows_gives_space_back_and_further_drives_are_seen() {
    let Some(host) = start_with_tiny(&PROGRAMS) else {
        return;
    };
    let extra = host.scratch().join("extra.img");
    std::fs::File::create(&extra)
        .unwrap()
        .set_len(96 << 20)
        .unwrap();
    let file = extra.to_str().unwrap();
    create(&host, "vm", &["--drive", "64M", "--drive", file]);
    let (code, error) = host.fails(&["machine", "update", "vm", "--disk", "128M"]);
    assert_eq!(code, 2, "{error}");
    assert!(error.contains("cannot be made smaller"), "{error}");
    host.ok(&["machine", "update", "vm", "--disk", "1G"]);
    boot(&host, "vm");
    guest(
        &host,
        "vm",
        "echo SIZES $(cat /sys/block/nvme0n1/size /sys/block/nvme0n2/size /sys/block/nvme0n3/size)",
        "SHOWN-SIZES",
    );
    let sizes = format!(
        "SIZES {} {} {}",
        (1 << 30) / 512,
        (64 << 20) / 512,
        (96 << 20) / 512
    );
    assert!(logs(&host, "vm").contains(&sizes), "{}", logs(&host, "vm"));
    let disk = disk_of(&host, "vm");
    let blocks = |path: &Path| std::fs::metadata(path).unwrap().blocks() * 512;
    let before = blocks(&disk);
    guest(
        &host,
        "vm",
        "dd if=/dev/urandom of=/fill bs=1M count=64 && sync",
        "FILLED-IT",
    );
    let full = blocks(&disk);
    assert!(full > before + (48 << 20), "{before} {full}");
    guest(
        &host,
        "vm",
        "rm /fill; sync; fstrim -v /; sync",
        "TRIMMED-IT",
    );
    host.eventually("the space is the host's again", || {
        blocks(&disk) < before + (24 << 20)
    });
    // The user's own file is written where it lies, and left when the machine goes.
    guest(
        &host,
        "vm",
        "echo written-by-the-guest > /dev/nvme0n3; sync; dd if=/dev/zero of=/dev/nvme0n2 bs=1M count=8; sync",
        "WROTE-DRIVES",
    );
    let stats: serde_json::Value =
        serde_json::from_str(&host.ok(&["machine", "stats", "vm", "--format", "json"])).unwrap();
    assert!(
        stats[0]["disks"][0]["written_bytes"].as_u64().unwrap() > 60 << 20,
        "{stats}"
    );
    assert!(stats[0]["sent"].as_u64().unwrap() > 0, "{stats}");
    power_off(&host, "vm");
    check(&disk);
    check(&disk.with_file_name("drive-0.qcow2"));
    host.ok(&["machine", "rm", "vm"]);
    assert!(
        std::fs::read(&extra)
            .unwrap()
            .starts_with(b"written-by-the-guest")
    );
}

#[test]
fn a_running_guest_is_told_that_its_disk_grew_and_uses_what_is_new() {
    let Some(host) = start_with_tiny(&PROGRAMS) else {
        return;
    };
    create(&host, "vm", &[]);
    boot(&host, "vm");
    let (code, error) = host.fails(&["machine", "set", "vm", "--disk", "128M"]);
    assert_eq!(code, 2, "{error}");
    assert!(error.contains("cannot be made smaller"), "{error}");
    host.ok(&["machine", "set", "vm", "--disk", "3G"]);
    assert_eq!(inspect(&host, "vm")["disk"], 3u64 << 30);
    // The kernel reads the new size by itself, told by an event of the controller.
    guest(
        &host,
        "vm",
        &format!(
            "until [ $(cat /sys/block/nvme0n1/size) = {} ]; do sleep 0.1; done",
            (3u64 << 30) / 512
        ),
        "IT-GREW",
    );
    guest(
        &host,
        "vm",
        "echo beyond-the-old-end | dd of=/dev/nvme0n1 bs=1M seek=3000 conv=fsync",
        "WROTE-BEYOND",
    );
    let disk = disk_of(&host, "vm");
    power_off(&host, "vm");
    check(&disk);
    let raw = host.scratch().join("flat.raw");
    flatten(&disk, &raw);
    assert_eq!(std::fs::metadata(&raw).unwrap().len(), 3 << 30);
    let mut text = [0; 18];
    std::os::unix::fs::FileExt::read_exact_at(
        &std::fs::File::open(&raw).unwrap(),
        &mut text,
        3000 << 20,
    )
    .unwrap();
    assert_eq!(&text, b"beyond-the-old-end");
    fsck(&raw);
    std::fs::remove_file(raw).unwrap();
    let text = logs(&host, "vm").len();
    host.ok(&["machine", "start", "vm"]);
    host.eventually("the guest is ready again", || {
        logs(&host, "vm")[text..].contains("READY")
    });
    assert!(logs(&host, "vm")[text..].contains("STAMP-FOUND"));
    power_off(&host, "vm");
}

#[test]
fn a_disk_image_is_imported_as_a_copy() {
    let Some(host) = start_with_tiny(&PROGRAMS) else {
        return;
    };
    create(&host, "source", &[]);
    let disk = disk_of(&host, "source");
    let kernel = std::fs::read_dir(host.state().join("machine-bases"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path()
        .join("vmlinuz");
    for format in ["raw", "qcow2"] {
        let image = host.scratch().join(format!("import.{format}"));
        let converted = Command::new("qemu-img")
            .args(["convert", "-O", format])
            .args([&disk, &image])
            .status()
            .unwrap();
        assert!(converted.success());
        let before = std::fs::read(&image).unwrap();
        let name = format!("from-{format}");
        let words = [
            "machine",
            "create",
            &name,
            "--kernel",
            kernel.to_str().unwrap(),
            "--disk",
            image.to_str().unwrap(),
            "--disk-size",
            "600M",
            "--memory",
            "256M",
            "--cpu",
            "soft",
        ];
        host.ok(&words);
        let shown = inspect(&host, &name);
        assert_eq!(shown["disk"], 600 << 20);
        assert_eq!(shown["disk_format"], format);
        boot(&host, &name);
        assert!(logs(&host, &name).contains("STAMP-WRITTEN"));
        power_off(&host, &name);
        assert!(
            std::fs::read(&image).unwrap() == before,
            "the image is untouched"
        );
    }
    // An image that lies on another could name any file of the host.
    let words = [
        "machine",
        "create",
        "sly",
        "--kernel",
        kernel.to_str().unwrap(),
        "--disk",
        disk.to_str().unwrap(),
    ];
    let (code, error) = host.fails(&words);
    assert_eq!(code, 2, "{error}");
    assert!(error.contains("qemu-img convert"), "{error}");
}

#[test]
fn a_full_host_disk_pauses_the_machine_and_loses_nothing() {
    let Some(host) = start_with_tiny(&PROGRAMS) else {
        return;
    };
    let small = Small::mount(host.scratch().join("small"), "12m");
    let file = small.0.join("data.img");
    std::fs::File::create(&file)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    create(&host, "vm", &["--drive", file.to_str().unwrap()]);
    boot(&host, "vm");
    type_line(
        &host,
        "vm",
        "dd if=/dev/urandom of=/dev/nvme0n2 bs=64k count=512 && sync && echo 3 > /proc/sys/vm/drop_caches && md5sum /dev/nvme0n2 && echo SUM\"\"MED",
    );
    host.eventually("the machine is paused and says why", || {
        let shown = inspect(&host, "vm");
        shown["state"] == "paused"
            && shown["problem"]
                .as_str()
                .is_some_and(|text| text.contains("no room") && text.contains("data.img"))
    });
    let (code, error) = host.fails(&["machine", "resume", "vm"]);
    assert_eq!(code, 4, "{error}");
    assert!(error.contains("no room"), "{error}");
    small.resize("128m");
    wait_for(&host, "vm", "SUMMED");
    assert!(inspect(&host, "vm")["problem"].is_null());
    let output = Command::new("md5sum").arg(&file).output().unwrap();
    let sum = String::from_utf8_lossy(&output.stdout)[..32].to_owned();
    let log = logs(&host, "vm");
    assert!(log.contains(&sum), "{sum} is not in {log}");
    assert!(!log.contains("I/O error"), "{log}");
    power_off(&host, "vm");
    host.ok(&["machine", "rm", "vm"]);
}

#[test]
fn what_the_guest_flushed_survives_its_process() {
    let Some(host) = start_with_tiny(&PROGRAMS) else {
        return;
    };
    create(&host, "vm", &["--drive", "32M"]);
    boot(&host, "vm");
    // Many small files, each synced on its own, and a raw drive written past the cache.
    guest(
        &host,
        "vm",
        "for n in 1 2 3 4 5 6 7 8 9 10; do echo content-$n > /f$n; sync -d /f$n; done; sync; dd if=/f1 of=/dev/nvme0n2 conv=fsync",
        "ALL-SYNCED",
    );
    let pid = inspect(&host, "vm")["pid"].as_i64().unwrap() as i32;
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    host.eventually("its end is seen", || {
        inspect(&host, "vm")["state"] == "stopped"
    });
    let shown = inspect(&host, "vm");
    assert_eq!(shown["last_exit"]["reason"], "killed");
    // No error: leaked clusters may be, what was named must be there.
    let disk = disk_of(&host, "vm");
    let checked = Command::new("qemu-img")
        .arg("check")
        .arg(&disk)
        .output()
        .unwrap();
    assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");
    let text = logs(&host, "vm").len();
    host.ok(&["machine", "start", "vm"]);
    host.eventually("the guest is ready again", || {
        logs(&host, "vm")[text..].contains("READY")
    });
    guest(
        &host,
        "vm",
        "echo KEPT $(cat /f1 /f2 /f3 /f4 /f5 /f6 /f7 /f8 /f9 /f10 | md5sum) $(head -c 9 /dev/nvme0n2)",
        "LOOKED-AGAIN",
    );
    let all: String = (1..=10).map(|n| format!("content-{n}\n")).collect();
    let sum = Command::new("sh")
        .args(["-c", "printf '%s' \"$0\" | md5sum", &all])
        .output()
        .unwrap();
    let sum = String::from_utf8_lossy(&sum.stdout)[..32].to_owned();
    assert!(
        logs(&host, "vm").contains(&format!("KEPT {sum} - content-1")),
        "{}",
        logs(&host, "vm")
    );
    power_off(&host, "vm");
}
