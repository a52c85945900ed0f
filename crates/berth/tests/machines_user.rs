//! Machines of an ordinary user's daemon: no root, no cgroup, and the same jail.

mod guest;
mod host;

use std::path::{Path, PathBuf};

use guest::{import_idle, import_tiny, inspect, kernel_package, logs, ready, start_tiny};
use host::{Host, has_all, open_tun, start_as, start_as_with};

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

/// On a host that lets everybody have taps, as Debian's does.
fn start_with_taps() -> Option<Host> {
    if !has_all(&["mke2fs", "debugfs", "mknod"]) {
        return None;
    }
    start_as_with(USER + 1, |folder| vec![open_tun(folder)])
}

fn create(host: &Host, name: &str, more: &[&str]) {
    let mut words = vec![
        "machine", "create", name, "--memory", "256M", "--disk", "256M", "--cpu", "soft",
    ];
    words.extend(more);
    host.ok(&words);
}

fn users_may_open_tun() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/dev/net/tun").is_ok_and(|file| file.mode() & 0o006 == 0o006)
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
    if users_may_open_tun() {
        eprintln!("SKIPPED in part: this host lets every user have taps");
    } else {
        assert_eq!(
            shown["network"], "user",
            "without a word it is the network it can have"
        );
        let words = "machine create no --image idle --network bridge";
        let (code, error) = host.fails(&words.split(' ').collect::<Vec<_>>());
        assert_eq!(code, 6, "{error}");
        assert!(error.contains("--network user"), "{error}");
    }
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
    start_tiny(
        &host,
        "vm",
        "256M",
        "256M",
        &[
            "--append",
            "init=/sbin/init",
            "--network",
            "user",
            "-p",
            "127.0.0.1:18081:80",
        ],
    );
    ready(&host, "vm", 1);
    assert!(logs(&host, "vm").contains("LEASE 10.0.2.15"));
    let words = ["busybox", "wget", "-qO-", "http://127.0.0.1:18081/"];
    assert_eq!(host.in_network(&words).stdout, b"page of a machine\n");
}

#[test]
fn a_machine_and_a_container_of_an_ordinary_user_reach_each_other_by_name() {
    let Some(package) = kernel_package() else {
        return;
    };
    let Some(mut host) = start_with_taps() else {
        return;
    };
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
            "127.0.0.1:18082:80",
        ],
    );
    assert_eq!(inspect(&host, "vm")["network"], "bridge");
    host.ok(&["machine", "start", "vm"]);
    ready(&host, "vm", 1);
    let words = ["run", "--rm", "busybox", "wget", "-qO-", "http://vm/"];
    assert_eq!(host.ok(&words), "page of a machine");
    let published = ["busybox", "wget", "-qO-", "http://127.0.0.1:18082/"];
    assert_eq!(host.in_network(&published).stdout, b"page of a machine\n");
    // Its namespace outlives the daemon, though no container keeps it.
    host.kill_daemon();
    std::thread::sleep(std::time::Duration::from_secs(3));
    host.start_daemon();
    assert_eq!(host.ok(&words), "page of a machine");
    assert_eq!(host.in_network(&published).stdout, b"page of a machine\n");
    host.ok(&["machine", "kill", "vm"]);
}
