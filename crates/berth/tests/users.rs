//! The daemon of an ordinary user.

mod host;

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// A command as `nobody`, with an environment of its own.
fn as_nobody(home: &Path, program: &Path, args: &[&str]) -> std::process::Command {
    let mut command = std::process::Command::new("setpriv");
    command
        .args([
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
            "--",
        ])
        .arg(program)
        .args(args)
        .env("HOME", home)
        .env("XDG_RUNTIME_DIR", home.join("run"))
        .env("XDG_DATA_HOME", home.join("data"))
        .env("NO_COLOR", "1")
        .env_remove("BERTH_SOCKET")
        .current_dir(home);
    command
}

/// Ends a user's daemon however the test ends.
struct UsersDaemon<'a> {
    home: &'a Path,
    program: &'a Path,
}

impl Drop for UsersDaemon<'_> {
    fn drop(&mut self) {
        if !self.home.join("run/berth/berth.sock").exists() {
            return;
        }
        for args in [&["rm", "-f", "stays"][..], &["system", "stop"]] {
            let _ = as_nobody(self.home, self.program, args)
                .stdin(Stdio::null())
                .output();
        }
    }
}

#[test]
fn the_daemon_of_an_ordinary_user_runs_containers_and_finds_them_again() {
    use std::os::unix::fs::PermissionsExt;
    if !rustix::process::geteuid().is_root() || !host::has("setpriv") || !host::has("busybox") {
        eprintln!("SKIPPED: needs root (to become nobody), setpriv and busybox");
        return;
    }
    let directory = tempfile::Builder::new()
        .prefix("berth-e2e-")
        .tempdir()
        .unwrap();
    let home = directory.path();
    std::fs::set_permissions(home, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::chown(home, Some(65534), Some(65534)).unwrap();
    let program = home.join("berth");
    std::fs::copy(host::BERTH, &program).unwrap();
    let allowed = as_nobody(
        home,
        Path::new("/usr/bin/unshare"),
        &["--user", "--mount", "true"],
    )
    .output()
    .is_ok_and(|output| output.status.success());
    if !allowed {
        eprintln!("SKIPPED: this host gives ordinary users no user namespaces");
        return;
    }
    let berth = |args: &[&str]| {
        as_nobody(home, &program, args)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let ok = |args: &[&str]| {
        let output = berth(args);
        let log = std::fs::read_to_string(home.join("data/berth/daemon.log")).unwrap_or_default();
        assert!(
            output.status.success(),
            "{args:?}: {}\n{log}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout)
            .unwrap()
            .trim_end()
            .to_owned()
    };
    let _ended = UsersDaemon {
        home,
        program: &program,
    };
    // The first command starts the daemon, as for anybody.
    let mut import = as_nobody(home, &program, &["import", "-", "busybox"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut import.stdin.take().unwrap(), &host::busybox_archive()).unwrap();
    assert!(import.wait().unwrap().success());
    let sockets = home.join("run/berth");
    assert!(
        sockets.join("docker.sock").exists(),
        "the sockets are not where a user's are"
    );
    assert_eq!(
        ok(&["run", "--rm", "--network", "none", "busybox", "id", "-u"]),
        "0"
    );
    let links = ok(&[
        "run",
        "--rm",
        "--network",
        "none",
        "busybox",
        "ip",
        "-o",
        "link",
    ]);
    assert_eq!(links.lines().count(), 1, "{links}");
    let own = std::fs::read_link("/proc/self/ns/net").unwrap();
    assert_eq!(
        ok(&[
            "run",
            "--rm",
            "--network",
            "host",
            "busybox",
            "readlink",
            "/proc/self/ns/net"
        ]),
        own.display().to_string()
    );
    // Without a word it is a bridge in a namespace of the daemon's (tests/users_networks.rs has more).
    let bridged = ok(&["run", "--rm", "busybox", "ip", "-o", "-4", "address"]);
    assert!(bridged.contains("eth0"), "{bridged}");
    ok(&[
        "run",
        "-d",
        "--name",
        "stays",
        "--network",
        "none",
        "busybox",
        "sh",
        "-c",
        "echo begun; sleep 300",
    ]);
    // The daemon dies; the next joins the namespaces of the container that lives.
    let daemon = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .find(|entry| {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
            let needle = home.as_os_str().as_encoded_bytes();
            line == b"berth\0serve\0" && environment.windows(needle.len()).any(|w| w == needle)
        })
        .and_then(|entry| entry.file_name().to_str()?.parse().ok())
        .expect("the daemon runs");
    let daemon = rustix::process::Pid::from_raw(daemon).unwrap();
    rustix::process::kill_process(daemon, rustix::process::Signal::KILL).unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    while rustix::process::test_kill_process(daemon).is_ok() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(ok(&["exec", "stays", "id", "-u"]), "0");
    assert_eq!(ok(&["logs", "stays"]), "begun");
    ok(&["rm", "-f", "stays"]);
    ok(&["system", "stop"]);
    let run = sockets;
    let end = Instant::now() + Duration::from_secs(30);
    while run.join("docker.sock").exists() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
}
