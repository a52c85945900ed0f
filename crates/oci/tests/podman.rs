//! The runtime in runc's place under Debian's podman, with storage of the test's own. It needs root, podman and a static
//! busybox, and says so.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

struct Podman {
    scratch: tempfile::TempDir,
}

impl Podman {
    /// A podman with the image `busybox`, or `None` and a word on stderr.
    fn new() -> Option<Podman> {
        let busybox = ["/bin/busybox", "/usr/bin/busybox"]
            .into_iter()
            .map(Path::new)
            .find(|path| path.exists());
        let found = Command::new("podman")
            .arg("--version")
            .output()
            .is_ok_and(|output| output.status.success());
        let (true, true, Some(busybox)) = (rustix::process::geteuid().is_root(), found, busybox)
        else {
            eprintln!("SKIPPED: root, podman and busybox-static are needed");
            return None;
        };
        let scratch = tempfile::Builder::new()
            .prefix("berth-podman-")
            .tempdir()
            .unwrap();
        let podman = Podman { scratch };
        symlink(env!("CARGO_BIN_EXE_berth-oci"), podman.path("berth-oci")).unwrap();
        let bin = podman.path("rootfs/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::copy(busybox, bin.join("busybox")).unwrap();
        for name in [
            "sh", "sleep", "echo", "cat", "id", "true", "ls", "ps", "stat", "mknod", "mkdir",
            "grep", "tty", "trap",
        ] {
            symlink("busybox", bin.join(name)).unwrap();
        }
        let tar = Command::new("tar")
            .arg("-C")
            .arg(podman.path("rootfs"))
            .arg("-cf")
            .arg(podman.path("image.tar"))
            .arg(".")
            .status();
        assert!(tar.unwrap().success());
        podman.ok(&[
            "import",
            podman.path("image.tar").to_str().unwrap(),
            "busybox",
        ]);
        Some(podman)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("podman");
        for (flag, name) in [
            ("--root", "root"),
            ("--runroot", "run"),
            ("--tmpdir", "tmp"),
            ("--runtime", "berth-oci"),
        ] {
            command.arg(flag).arg(self.path(name));
        }
        command.args([
            "--storage-driver",
            "vfs",
            "--cgroup-manager",
            "cgroupfs",
            "--events-backend",
            "file",
        ]);
        command.args(args).stdin(Stdio::null());
        command
    }

    /// Its output goes to files: conmon would keep a pipe open.
    fn podman(&self, args: &[&str]) -> Output {
        let (out, err) = (self.path("out"), self.path("err"));
        let mut child = self
            .command(args)
            .stdout(fs::File::create(&out).unwrap())
            .stderr(fs::File::create(&err).unwrap())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                child.kill().unwrap();
                panic!("podman {args:?} hangs");
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        Output {
            status,
            stdout: fs::read(out).unwrap(),
            stderr: fs::read(err).unwrap(),
        }
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.podman(args);
        assert!(
            output.status.success(),
            "podman {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// `podman run` with limits that a root without CAP_SYS_RESOURCE can give.
    fn run(&self, args: &[&str]) -> Output {
        let fixed = [
            "run",
            "--network",
            "none",
            "--ulimit",
            "nofile=1000:1000",
            "--ulimit",
            "nproc=10000:10000",
        ];
        self.podman(&[&fixed[..], args].concat())
    }

    fn run_ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(
            output.status.success(),
            "podman run {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = self.podman(&["rm", "--all", "--force", "--time", "0"]);
        let _ = self.podman(&["rmi", "--all", "--force"]);
        // podman leaves the cgroup above its containers; in use, it stays.
        let _ = Command::new("find")
            .args(["/sys/fs/cgroup", "-depth", "-type", "d", "("])
            .args([
                "-path",
                "*/libpod_parent/conmon",
                "-o",
                "-name",
                "libpod_parent",
                ")",
            ])
            .args(["-exec", "rmdir", "{}", ";"])
            .stderr(Stdio::null())
            .status();
    }
}

#[test]
fn podman_runs_containers_to_their_end() {
    let Some(p) = Podman::new() else { return };
    let output = p.run(&[
        "--rm",
        "busybox",
        "sh",
        "-c",
        "echo out; echo err >&2; exit 7",
    ]);
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(
        (&output.stdout[..], &output.stderr[..]),
        (&b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!(
        p.run(&["--rm", "busybox", "no-such-program"]).status.code(),
        Some(127)
    );
    assert_eq!(p.run(&["--rm", "busybox", "/bin"]).status.code(), Some(126));
    assert_eq!(
        p.run_ok(&[
            "--rm",
            "--user",
            "5:6",
            "busybox",
            "sh",
            "-c",
            "id -u; id -g"
        ]),
        "5\n6\n"
    );
    assert_eq!(
        p.run_ok(&["--rm", "-t", "busybox", "tty"]).trim(),
        "/dev/pts/0"
    );
    let limited = p.run_ok(&["--rm", "--memory", "32m", "--pids-limit", "50", "--read-only", "busybox", "sh", "-c", "cat /sys/fs/cgroup/*/memory.limit_in_bytes /sys/fs/cgroup/*/pids.max /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max 2>/dev/null; mkdir /x || echo refused"]);
    assert!(
        limited.contains("33554432") && limited.contains("50\n") && limited.ends_with("refused\n"),
        "{limited}"
    );
    fs::write(p.path("note"), "noted\n").unwrap();
    let bind = format!("{}:/note:ro", p.path("note").display());
    assert_eq!(
        p.run_ok(&[
            "--rm",
            "-v",
            &bind,
            "--tmpfs",
            "/scratch",
            "busybox",
            "sh",
            "-c",
            "cat /note; echo x > /note || echo refused; echo y > /scratch/y && echo fine"
        ]),
        "noted\nrefused\nfine\n"
    );
    // podman's own seccomp profile stands.
    assert!(
        p.run_ok(&["--rm", "busybox", "grep", "Seccomp:", "/proc/self/status"])
            .contains('2')
    );
    let privileged = p.run_ok(&[
        "--rm",
        "--privileged",
        "busybox",
        "grep",
        "Seccomp:",
        "/proc/self/status",
    ]);
    assert!(privileged.contains('0'), "{privileged}");
}

#[test]
fn podman_leads_a_container_through_its_life() {
    let Some(p) = Podman::new() else { return };
    let script = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.1; done";
    p.run_ok(&["-d", "--name", "one", "busybox", "sh", "-c", script]);
    assert_eq!(
        p.ok(&[
            "exec",
            "-e",
            "A=b",
            "-w",
            "/bin",
            "one",
            "sh",
            "-c",
            "echo $A; pwd"
        ]),
        "b\n/bin\n"
    );
    assert_eq!(
        p.podman(&["exec", "one", "sh", "-c", "exit 9"])
            .status
            .code(),
        Some(9)
    );
    assert_eq!(
        p.podman(&["exec", "one", "no-such"]).status.code(),
        Some(127)
    );
    assert_eq!(p.ok(&["exec", "-t", "one", "tty"]).trim(), "/dev/pts/0");
    assert_eq!(p.ok(&["logs", "one"]), "up\n");
    assert!(p.ok(&["top", "one"]).contains("sh"));
    let inspected: Value = serde_json::from_str(&p.ok(&["inspect", "one"])).unwrap();
    assert_eq!(inspected[0]["State"]["Status"], "running");
    assert!(
        inspected[0]["OCIRuntime"]
            .as_str()
            .unwrap()
            .ends_with("berth-oci")
    );
    p.ok(&["pause", "one"]);
    assert!(
        p.ok(&["ps", "--all", "--format", "{{.Status}}"])
            .contains("aused")
    );
    p.ok(&["unpause", "one"]);
    fs::write(p.path("file"), "copied\n").unwrap();
    p.ok(&["cp", p.path("file").to_str().unwrap(), "one:/file"]);
    assert_eq!(p.ok(&["exec", "one", "cat", "/file"]), "copied\n");
    assert!(p.ok(&["stats", "--no-stream", "one"]).contains("one"));
    p.ok(&["stop", "--time", "10", "one"]);
    assert_eq!(p.ok(&["wait", "one"]).trim(), "5");
    assert_eq!(p.ok(&["logs", "one"]), "up\nbye\n");
    p.ok(&["start", "one"]);
    assert_eq!(p.ok(&["exec", "one", "cat", "/file"]), "copied\n");
    p.ok(&["restart", "--time", "10", "one"]);
    p.ok(&["kill", "--signal", "KILL", "one"]);
    assert_eq!(p.ok(&["wait", "one"]).trim(), "137");
    p.ok(&["rm", "one"]);
    assert_eq!(p.ok(&["ps", "--all", "--quiet"]), "");
}

#[test]
fn podman_joins_the_namespaces_of_another_container() {
    let Some(p) = Podman::new() else { return };
    p.run_ok(&["-d", "--name", "first", "busybox", "sleep", "100"]);
    let seen = p.podman(&[
        "run",
        "--rm",
        "--network",
        "container:first",
        "--pid",
        "container:first",
        "--ipc",
        "container:first",
        "--ulimit",
        "nofile=1000:1000",
        "--ulimit",
        "nproc=10000:10000",
        "busybox",
        "cat",
        "/proc/1/cmdline",
    ]);
    assert!(
        String::from_utf8_lossy(&seen.stdout).starts_with("sleep"),
        "{}",
        String::from_utf8_lossy(&seen.stderr)
    );
    let mapped = p.run(&[
        "--rm",
        "--uidmap",
        "0:100000:5000",
        "--gidmap",
        "0:100000:5000",
        "busybox",
        "cat",
        "/proc/self/uid_map",
    ]);
    let said = String::from_utf8_lossy(&mapped.stdout).into_owned();
    assert_eq!(
        said.split_whitespace().collect::<Vec<_>>(),
        ["0", "100000", "5000"],
        "{}",
        String::from_utf8_lossy(&mapped.stderr)
    );
    p.ok(&["rm", "--force", "--time", "0", "first"]);
}
