//! Containers under a real cgroup v2 and through a real reboot: inside a machine, whatever this host has.
//!
//! The guest is Debian's kernel (`scripts/guest-kernel`) with busybox and this build's `berth`; `guest/cgroups.sh` is
//! what runs there.

mod guest;
mod host;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use guest::{boot, kernel_package, modules_of, root};
use host::{BERTH, has_all};

/// The files a program needs to run, as `ldd` names them: the linker's own path, and the libraries.
fn libraries(program: &Path) -> Vec<(String, PathBuf)> {
    let output = Command::new("ldd").arg(program).output().unwrap();
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(|path| {
            let name = path.rsplit('/').next().unwrap();
            let place = if name.starts_with("ld-linux") {
                "lib64"
            } else {
                "lib"
            };
            (format!("{place}/{name}"), PathBuf::from(path))
        })
        .collect()
}

#[test]
fn under_cgroup_v2_limits_hold_and_a_reboot_restarts_what_its_policy_says() {
    let Some(package) = kernel_package() else {
        return;
    };
    if !has_all(&["busybox", "python3", "mke2fs", "ldd", "strip"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let run = |command: &mut Command| {
        let output = command.stdin(Stdio::null()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{command:?}: {text}");
    };
    run(Command::new("strip")
        .args(["--strip-debug", "-o"])
        .arg(path("berth"))
        .arg(BERTH));
    let overlay = modules_of(&package).join("fs/overlayfs/overlay.ko");
    let mut command = Command::new(root().join("scripts/guest-initrd"));
    command
        .arg(path("initrd"))
        .arg(root().join("crates/berth/tests/guest/cgroups.sh"))
        .arg(format!("bin/berth={}", path("berth").display()))
        .arg(format!("modules/overlay.ko={}", overlay.display()));
    for (place, file) in libraries(Path::new(BERTH)) {
        command.arg(format!("{place}={}", file.display()));
    }
    run(&mut command);
    let disk = std::fs::File::create(path("disk")).unwrap();
    disk.set_len(512 << 20).unwrap();
    run(Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4"])
        .arg(path("disk")));
    let disk = path("disk");
    let words = [
        "--memory",
        "768M",
        "--reboot",
        "--append",
        "quiet",
        "--disk",
        disk.to_str().unwrap(),
    ];
    let output = boot(&package, &path("initrd"), 900, &words);
    let text = String::from_utf8_lossy(&output.stdout).replace('\r', "");
    let said = format!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(!text.contains("FAIL"), "{said}");
    assert!(output.status.success(), "{}\n{said}", output.status);
    // Every check of the script was reached.
    let script = include_str!("guest/cgroups.sh");
    let mut of_systemd = false;
    for line in script.lines() {
        match line.trim() {
            "if [ -n \"$systemd\" ]; then" => of_systemd = true,
            "fi" => of_systemd = false,
            _ => {}
        }
        if of_systemd {
            continue;
        }
        let line = line.trim_start();
        let name = line
            .strip_prefix("check \"")
            .or_else(|| line.strip_prefix("holds \""))
            .and_then(|rest| rest.split('"').next());
        if let Some(name) = name {
            assert!(text.contains(&format!("PASS {name} (")), "{name}: {said}");
        }
    }
    assert!(
        text.contains("REBOOT\n") && text.contains("END\n"),
        "{said}"
    );
}
