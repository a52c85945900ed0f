//! Machines of an ordinary user's daemon: no root, no bridge, no cgroup, and the same jail.

mod guest;
mod host;

use std::path::{Path, PathBuf};

use guest::{import_idle, import_tiny, inspect, kernel_package, logs, ready};
use host::{Host, has_all, start_as};

/// An id that no account has.
const USER: u32 = 54321;

fn start_daemon() -> Option<Host> {
    if !has_all(&["mke2fs", "debugfs"]) {
        return None;
    }
    let limit = std::fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default();
    if limit.trim() == "0" {
        eprintln!("SKIPPED: this host gives no user namespaces");
        return None;
    }
    start_as(USER)
}

fn create(host: &Host, name: &str, more: &[&str]) {
    let mut words = vec![
        "machine", "create", name, "--memory", "256M", "--disk", "256M", "--cpu", "soft",
    ];
    words.extend(more);
    host.ok(&words);
}

fn status(pid: i64, key: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.unwrap().trim_start_matches(':').trim().to_owned()
}

#[test]
fn the_machine_of_an_ordinary_user_is_jailed_as_roots_is() {
    let Some(mut host) = start_daemon() else {
        return;
    };
    import_idle(&host);
    create(&host, "vm", &["--image", "idle"]);
    let shown = inspect(&host, "vm");
    assert_eq!(
        shown["network"], "user",
        "without a word it is the network it can have"
    );
    let (code, error) = host.fails(&[
        "machine",
        "create",
        "no",
        "--image",
        "idle",
        "--network",
        "bridge",
    ]);
    assert_eq!(code, 6, "{error}");
    assert!(error.contains("--network user"), "{error}");
    host.ok(&["machine", "start", "vm"]);
    let shown = inspect(&host, "vm");
    let pid = shown["pid"].as_i64().unwrap();
    assert!(status(pid, "Uid").starts_with(&USER.to_string()));
    assert_eq!(status(pid, "Seccomp"), "2");
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    assert!(
        status(pid, "NSpid").ends_with("\t1"),
        "{}",
        status(pid, "NSpid")
    );
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let names: Vec<String> = std::fs::read_dir(&root)
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    assert!(
        !names.iter().any(|name| name == "usr" || name == "proc"),
        "{names:?}"
    );
    let folder = PathBuf::from(shown["folder"].as_str().unwrap());
    let inside = root.join(folder.strip_prefix("/").unwrap());
    assert!(inside.join("disk.qcow2").exists());
    let log = std::fs::read_to_string(folder.join("process.log")).unwrap();
    assert!(!log.contains("keeps"), "{log}");
    // It outlives its daemon, and the next one ends it.
    host.kill_daemon();
    assert!(Path::new(&format!("/proc/{pid}/root")).exists());
    host.start_daemon();
    let shown = inspect(&host, "vm");
    assert_eq!(shown["state"], "running");
    assert_eq!(shown["pid"].as_i64(), Some(pid));
    host.ok(&["machine", "kill", "vm"]);
    assert_eq!(inspect(&host, "vm")["state"], "stopped");
}

#[test]
fn the_guest_of_an_ordinary_user_is_reached_by_a_published_port() {
    let Some(package) = kernel_package() else {
        return;
    };
    let Some(host) = start_daemon() else { return };
    import_tiny(&host, &package);
    create(
        &host,
        "vm",
        &[
            "--image",
            "tiny",
            "--append",
            "init=/sbin/init",
            "-p",
            "127.0.0.1:18081:80",
        ],
    );
    host.ok(&["machine", "start", "vm"]);
    ready(&host, "vm", 1);
    assert!(logs(&host, "vm").contains("LEASE 10.0.2.15"));
    let words = ["busybox", "wget", "-qO-", "http://127.0.0.1:18081/"];
    assert_eq!(host.in_network(&words).stdout, b"page of a machine\n");
}
