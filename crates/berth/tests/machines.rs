//! Virtual machines with Debian's own kernel, as a user meets them.
//!
//! They need the kernel that `scripts/guest-kernel` fetches into `build/guest` (`make test` does).

mod guest;
mod host;

use std::process::Command;

use guest::{boot, initrd_of, kernel_package, logs, ready, start_tiny, start_with_tiny};
use host::{BERTH, has_all};

fn boot_to_power_off(cpus: &str) {
    let Some(package) = kernel_package() else {
        return;
    };
    if !has_all(&["busybox", "python3"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let script = "#!/bin/sh\n/bin/busybox mount -t proc none /proc\necho CPUS $(grep -c ^processor /proc/cpuinfo)\necho BOOT-OK\npoweroff -f\n";
    let initrd = initrd_of(directory.path(), script, &[]);
    let words = ["--memory", "256M", "--cpus", cpus];
    let output = boot(&package, &initrd, 300, &words);
    let text = String::from_utf8_lossy(&output.stdout);
    let tail: String = text
        .chars()
        .rev()
        .take(3000)
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
        .collect();
    assert!(
        output.status.success(),
        "{}\n{tail}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(text.contains("BOOT-OK"), "{tail}");
    assert!(text.contains(&format!("CPUS {cpus}")), "{tail}");
}

#[test]
fn debians_kernel_boots_on_the_software_cpu_and_its_power_off_ends_the_command() {
    boot_to_power_off("1");
}

#[test]
fn a_guest_with_two_cpus_starts_both() {
    boot_to_power_off("2");
}

#[test]
fn a_missing_kernel_is_named() {
    let output = Command::new(BERTH)
        .args(["machine", "boot", "--kernel", "/no/such/kernel"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/no/such/kernel"));
}

#[test]
fn a_machine_meets_containers_on_its_network_and_loses_nothing_it_synced() {
    let Some(mut host) = start_with_tiny(&[]) else {
        return;
    };
    let (code, error) = host.fails(&[
        "machine", "create", "huge", "--image", "tiny", "--memory", "900T",
    ]);
    assert_eq!(code, 5, "{error}");
    assert!(error.contains("this host has"), "{error}");
    let (code, error) = host.fails(&["machine", "create", "none", "--image", "busybox"]);
    assert_eq!(code, 2, "{error}");
    assert!(error.contains("kernel"), "{error}");
    start_tiny(
        &host,
        "vm",
        "256M",
        "512M",
        &["--append", "init=/sbin/init"],
    );
    ready(&host, "vm", 1);
    let logs = |host: &host::Host| logs(host, "vm");
    assert!(logs(&host).contains("STAMP-WRITTEN"), "{}", logs(&host));
    assert!(logs(&host).contains("LEASE"), "{}", logs(&host));
    let fetch = ["run", "--rm", "busybox", "wget", "-qO-", "http://vm/"];
    host.eventually("a container fetches the machine's page", || {
        host.berth(&fetch).stdout == b"page of a machine\n"
    });
    host.kill_daemon();
    host.start_daemon();
    assert!(
        host.ok(&["machine", "list"]).contains("running"),
        "the machine outlives the daemon"
    );
    assert_eq!(host.ok(&fetch), "page of a machine");
    host.ok(&["machine", "pause", "vm"]);
    assert!(host.ok(&["machine", "list"]).contains("paused"));
    host.ok(&["machine", "resume", "vm"]);
    // The process is cut off as by a power cut of the machine.
    let json: serde_json::Value =
        serde_json::from_str(&host.ok(&["machine", "inspect", "vm"])).unwrap();
    let pid = json[0]["pid"].as_i64().unwrap() as i32;
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    host.eventually("its end is seen", || {
        host.ok(&["machine", "list"]).contains("stopped")
    });
    host.ok(&["machine", "start", "vm"]);
    ready(&host, "vm", 2);
    assert!(
        logs(&host).contains("STAMP-FOUND precious"),
        "{}",
        logs(&host)
    );
    let typed = host.with_input(&["machine", "console", "vm"], b"off\n");
    assert!(typed.status.success());
    host.eventually("the guest powered off", || {
        host.ok(&["machine", "list"]).contains("stopped")
    });
    let json: serde_json::Value =
        serde_json::from_str(&host.ok(&["machine", "inspect", "vm"])).unwrap();
    assert_eq!(json[0]["last_exit"]["reason"], "power-off");
    host.ok(&["machine", "remove", "vm"]);
    assert_eq!(host.ok(&["machine", "list", "-q"]), "");
    assert_eq!(
        std::fs::read_dir(host.state().join("machines"))
            .unwrap()
            .count(),
        0
    );
}
