//! A bundle with a busybox, and the runtime's command upon it: what every test of real containers begins with.
#![allow(dead_code)] // each test program uses its own part

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

static SERIAL: AtomicU32 = AtomicU32::new(0);

/// A bundle with a busybox, and a state root of its own.
pub struct Bundle {
    pub scratch: tempfile::TempDir,
    pub id: String,
    pub config: Value,
}

impl Bundle {
    /// `None`, and a word on stderr, where this host cannot run containers.
    pub fn new() -> Option<Bundle> {
        let busybox = ["/bin/busybox", "/usr/bin/busybox"]
            .into_iter()
            .map(Path::new)
            .find(|path| path.exists());
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: root is needed");
            return None;
        }
        let Some(busybox) = busybox else {
            eprintln!("SKIPPED: busybox-static is needed");
            return None;
        };
        let scratch = tempfile::Builder::new()
            .prefix("berth-oci-test-")
            .tempdir()
            .unwrap();
        let bin = scratch.path().join("rootfs/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::copy(busybox, bin.join("busybox")).unwrap();
        for name in [
            "sh", "cat", "true", "sleep", "id", "mount", "mknod", "dd", "stat", "ls", "mkdir",
            "tty", "grep", "echo", "hostname", "umount",
        ] {
            symlink("busybox", bin.join(name)).unwrap();
        }
        let id = format!(
            "berth-test-{}-{}",
            std::process::id(),
            SERIAL.fetch_add(1, Ordering::Relaxed)
        );
        let mut bundle = Bundle {
            scratch,
            id,
            config: Value::Null,
        };
        assert!(bundle.run(&["spec"]).status.success());
        let text = fs::read(bundle.path("config.json")).unwrap();
        bundle.config = serde_json::from_slice(&text).unwrap();
        bundle.config["process"]["terminal"] = json!(false);
        Some(bundle)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    pub fn args(&mut self, args: &[&str]) -> &mut Bundle {
        self.config["process"]["args"] = json!(args);
        self
    }

    pub fn capabilities(&mut self, names: &[&str]) {
        for set in ["bounding", "effective", "permitted"] {
            self.config["process"]["capabilities"][set] = json!(names);
        }
    }

    pub fn command(&self, args: &[&str]) -> Command {
        if !self.config.is_null() {
            fs::write(self.path("config.json"), self.config.to_string()).unwrap();
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_berth-oci"));
        command
            .arg("--root")
            .arg(self.path("state"))
            .args(args)
            .current_dir(self.scratch.path())
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        // Files, not pipes: a container left running would keep a pipe open.
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let (out, err) = (
            self.path(&format!("out-{serial}")),
            self.path(&format!("err-{serial}")),
        );
        let mut child = self
            .command(args)
            .stdout(fs::File::create(&out).unwrap())
            .stderr(fs::File::create(&err).unwrap())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                child.kill().unwrap();
                panic!("{args:?} hangs");
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        Output {
            status,
            stdout: fs::read(out).unwrap(),
            stderr: fs::read(err).unwrap(),
        }
    }

    /// Runs the container in the foreground: its exit code, stdout, stderr.
    pub fn go(&self) -> (i32, String, String) {
        let output = self.run(&["run", &self.id]);
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        (
            output.status.code().unwrap_or(-1),
            text(output.stdout),
            text(output.stderr),
        )
    }

    /// Runs `script` in a shell of the container.
    pub fn shell(&mut self, script: &str) -> (i32, String, String) {
        self.args(&["sh", "-c", script]);
        self.go()
    }

    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(
            output.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    pub fn nothing_is_left(&self) {
        assert!(!self.path("state").join(&self.id).exists(), "state is left");
        for directory in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            assert!(
                !directory.path().join(&self.id).exists(),
                "a cgroup is left in {}",
                directory.path().display()
            );
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(
            !mounts.contains(self.scratch.path().to_str().unwrap()),
            "a mount is left"
        );
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = self
            .command(&["delete", "--force", &self.id])
            .stderr(Stdio::null())
            .status();
    }
}

/// Receives the descriptor a runtime sends to a console socket.
pub fn receive(listener: UnixListener) -> OwnedFd {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let (stream, _) = listener.accept().unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0u8; 64];
    recvmsg(
        &stream,
        &mut [std::io::IoSliceMut::new(&mut bytes)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )
    .unwrap();
    ancillary
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
        .unwrap()
}

pub fn in_user_namespace(b: &mut Bundle) {
    b.config["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "user"}));
    b.config["linux"]["uidMappings"] =
        json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    b.config["linux"]["gidMappings"] =
        json!([{"containerID": 0, "hostID": 200_000, "size": 65536}]);
}

impl Bundle {
    /// As [`Bundle::run`], by way of another program: `wrapper` and then the runtime's whole command line.
    pub fn wrapped(&self, wrapper: &[&str], args: &[&str]) -> Output {
        let inner = self.command(args);
        Command::new(wrapper[0])
            .args(&wrapper[1..])
            .arg(inner.get_program())
            .args(inner.get_args())
            .current_dir(self.scratch.path())
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }
}

/// The wrapper that shows what it runs a host with the v2 tree alone, whatever this one has.
pub const V2_VIEW: [&str; 7] = [
    "unshare",
    "-m",
    "--propagation=private",
    "sh",
    "-c",
    "umount -R /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec \"$@\"",
    "sh",
];

pub fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Waits until `done`, or fails with `what`.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
