//! Guests with several CPUs on the software CPU: results that depend on real atomicity, order and shootdowns, and CPUs that come
//! and go. (The work is `benches/guest/smp.c`.)

mod guest;
mod host;

use std::path::Path;
use std::process::Command;

use guest::{boot, initrd_of, kernel_package, root};
use host::has_all;

/// What a guest with that many CPUs printed whose init is this script, with the `smp` program in it.
fn run(folder: &Path, cpus: u32, script: &str) -> Option<String> {
    let package = kernel_package()?;
    if !has_all(&["busybox", "python3", "gcc"]) {
        return None;
    }
    let program = folder.join("smp");
    let built = Command::new("gcc")
        .args(["-O2", "-static", "-pthread", "-mcx16", "-o"])
        .arg(&program)
        .arg(root().join("benches/guest/smp.c"))
        .status()
        .unwrap();
    assert!(built.success());
    let mounts = "/bin/busybox mount -t proc none /proc\nmount -t sysfs none /sys\nmount -t devtmpfs none /dev\n";
    let script = format!("#!/bin/sh\n{mounts}{script}\npoweroff -f\n");
    let initrd = initrd_of(folder, &script, &[format!("smp={}", program.display())]);
    let cpus = cpus.to_string();
    let words = ["--memory", "256M", "--append", "quiet", "--cpus", &cpus];
    let output = boot(&package, &initrd, 900, &words);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    eprintln!("{text}");
    assert!(
        output.status.success(),
        "{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(!text.contains("Oops") && !text.contains("Call Trace"));
    Some(text)
}

/// Locks, atomics (across lines and pages too), moved and protected pages, forks, code rewritten by another CPU, futexes.
fn check(cpus: u32) {
    let folder = tempfile::tempdir().unwrap();
    let script = format!("/smp check {cpus} 1500");
    if let Some(text) = run(folder.path(), cpus, &script) {
        assert!(text.contains("SMP-OK"));
    }
}

#[test]
fn what_two_cpus_do_together_comes_out_right() {
    check(2);
}

#[test]
fn what_four_cpus_do_together_comes_out_right() {
    check(4);
}

#[test]
fn a_guests_cpu_goes_offline_and_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let script = "\
        cpu=/sys/devices/system/cpu\n\
        for round in 1 2 3; do\n\
        echo 0 > $cpu/cpu1/online && echo OFF $(cat $cpu/online)\n\
        /smp check 1 200 | grep -q SMP-OK && echo ALONE\n\
        echo 1 > $cpu/cpu1/online && echo ON $(cat $cpu/online)\n\
        /smp check 2 200 | grep -q SMP-OK && echo BOTH\n\
        done";
    let Some(text) = run(folder.path(), 2, script) else {
        return;
    };
    for (what, times) in [("OFF 0\r", 3), ("ALONE", 3), ("ON 0-1\r", 3), ("BOTH", 3)] {
        assert_eq!(text.matches(what).count(), times, "{what}");
    }
}
