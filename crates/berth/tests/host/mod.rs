//! A daemon of its own in a network namespace of its own, for tests that drive the real binary.

// Each test program uses its own part of this.
#![allow(dead_code)]

pub mod footprint;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The binary under test.
pub const BERTH: &str = env!("CARGO_BIN_EXE_berth");

/// One daemon and all it made; both go with this value.
pub struct Host {
    directory: tempfile::TempDir,
    daemon: Option<Child>,
    /// Keeps the network namespace while no daemon runs.
    sleeper: Option<Child>,
    /// The ordinary user whose daemon this is.
    user: Option<u32>,
    /// What the daemon and all it starts see as the kernel's boot id, where it is another.
    pub boot_id: Option<PathBuf>,
    /// Files that the daemon and all it starts see in other places: what, where.
    binds: Vec<(PathBuf, &'static str)>,
    /// Words before the daemon's, once it is the user's.
    within: &'static str,
    /// A folder with a `systemctl` of the test's own, which the daemon finds on a host that systemd seems to have booted.
    pub systemd: Option<PathBuf>,
}

/// Whether `program` is installed.
pub fn has(program: &str) -> bool {
    base::host::program(program).is_some()
}

/// Whether all of `programs` are installed; says which one is not.
pub fn has_all(programs: &[&str]) -> bool {
    let missing = programs.iter().find(|program| !has(program));
    if let Some(missing) = missing {
        eprintln!("SKIPPED: needs {missing} (scripts/setup installs it)");
    }
    missing.is_none()
}

/// Starts a daemon, or says why this machine cannot.
pub fn start() -> Option<Host> {
    start_with(None, |_| Vec::new(), "")
}

/// Starts the daemon of an ordinary user without any rights, or says why this machine cannot.
pub fn start_as(user: u32) -> Option<Host> {
    start_with(Some(user), |_| Vec::new(), "")
}

/// The same on a host where other files are in some places: `binds` makes them in the folder it is given.
pub fn start_as_with(
    user: u32,
    binds: impl FnOnce(&Path) -> Vec<(PathBuf, &'static str)>,
) -> Option<Host> {
    start_with(Some(user), binds, "")
}

/// The same on a host that gives its users no network namespaces.
pub fn start_as_without_networks(user: u32) -> Option<Host> {
    let none = r#"unshare -Ur sh -c 'echo 0 > /proc/sys/user/max_net_namespaces
        exec unshare -U --map-user=1000 --map-group=1000 "$@"' sh "#;
    start_with(Some(user), |_| Vec::new(), none)
}

/// `/dev/net/tun` as udev makes it: for everybody.
pub fn open_tun(folder: &Path) -> (PathBuf, &'static str) {
    let path = folder.join("tun");
    let made = Command::new("mknod")
        .arg(&path)
        .args(["c", "10", "200", "-m", "666"])
        .status();
    assert!(made.unwrap().success());
    (path, "/dev/net/tun")
}

fn start_with(
    user: Option<u32>,
    binds: impl FnOnce(&Path) -> Vec<(PathBuf, &'static str)>,
    within: &'static str,
) -> Option<Host> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: needs root");
        return None;
    }
    for program in ["nft", "ip", "unshare", "busybox", "setpriv"] {
        if !has(program) {
            eprintln!("SKIPPED: needs {program} (scripts/setup installs it)");
            return None;
        }
    }
    let mut host = Host {
        directory: tempfile::Builder::new()
            .prefix("berth-e2e-")
            .tempdir()
            .unwrap(),
        daemon: None,
        sleeper: None,
        user,
        boot_id: None,
        binds: Vec::new(),
        within,
        systemd: None,
    };
    host.binds = binds(host.scratch());
    if let Some(user) = user {
        // The user reaches neither the build's folder nor one of root's.
        std::fs::copy(BERTH, host.scratch().join("berth")).unwrap();
        std::os::unix::fs::chown(host.scratch(), Some(user), Some(user)).unwrap();
    }
    host.start_daemon();
    host.import_busybox();
    Some(host)
}

impl Host {
    pub fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("n.sock")
    }

    pub fn docker_socket(&self) -> PathBuf {
        self.directory.path().join("d.sock")
    }

    /// A folder for the test's own files.
    pub fn scratch(&self) -> &Path {
        self.directory.path()
    }

    pub fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().unwrap().id()
    }

    pub fn start_daemon(&mut self) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.directory.path().join("daemon.log"))
            .unwrap();
        // The namespace lives on in the keeper's namespace file so that a second daemon joins the first one's.
        let drop_rights = self.user.map_or_else(String::new, |user| {
            let within = self.within;
            format!("setpriv --reuid {user} --regid {user} --clear-groups env HOME=\"$1\" XDG_RUNTIME_DIR=\"$1\" {within}")
        });
        let script = format!(
            r#"ip link set lo up; [ -z "$4" ] || mount --bind "$4" /proc/sys/kernel/random/boot_id || exit
            [ -z "$5" ] || {{ mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system; }} || exit
            PATH=${{5:+$5:}}$PATH; export PATH
            state=$1 socket=$2 docker=$3; shift 5
            while [ $# -gt 0 ]; do mount --bind "$1" "$2" || exit; shift 2; done
            set -- "$state" "$socket" "$docker"
            exec {drop_rights}"$0" serve --state-dir "$1" --socket "$2" --docker-socket "$3" --log-level info"#
        );
        let program = match self.user {
            Some(_) => self.scratch().join("berth"),
            None => BERTH.into(),
        };
        let namespace = self.directory.path().join("pid-of-namespace");
        let mut command = match self.network_command() {
            Some(command) => command,
            None => {
                let mut command = Command::new("unshare");
                command.arg("--net");
                command
            }
        };
        if self.boot_id.is_some() || self.systemd.is_some() || !self.binds.is_empty() {
            command.args(["unshare", "--mount", "--propagation", "private"]);
        }
        command
            .args(["sh", "-c", &script])
            .arg(program)
            .arg(self.state())
            .arg(self.socket())
            .arg(self.docker_socket())
            .arg(self.boot_id.as_deref().unwrap_or(Path::new("")))
            .arg(self.systemd.as_deref().unwrap_or(Path::new("")));
        for (what, place) in &self.binds {
            command.arg(what).arg(place);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        if !namespace.exists() {
            self.wait_for_socket();
            let sleeper = Command::new("nsenter")
                .args(["-t", &child.id().to_string(), "-n", "sleep", "600"])
                .stdin(Stdio::null())
                .spawn()
                .unwrap();
            std::fs::write(&namespace, sleeper.id().to_string()).unwrap();
            self.sleeper = Some(sleeper);
        }
        self.daemon = Some(child);
        self.wait_for_socket();
    }

    /// A command in the daemon's network namespace, whether a daemon runs or not; `None` before the first one.
    pub fn network_command(&self) -> Option<Command> {
        let file = self.directory.path().join("pid-of-namespace");
        let pid = std::fs::read_to_string(file).ok()?;
        let mut command = Command::new("nsenter");
        command.args(["-t", pid.trim(), "-n"]);
        Some(command)
    }

    /// A container `web` in `network` that answers with a page at its published port; `more` are further options.
    pub fn serve_page(&self, network: &str, port: &str, more: &[&str]) {
        let script = "mkdir /www; echo page > /www/index.html; exec httpd -f -p 80 -h /www";
        let words = [
            "run",
            "-d",
            "--name",
            "web",
            "--network",
            network,
            "-p",
            port,
        ];
        let program = ["busybox", "sh", "-c", script];
        self.ok(&[&words[..], more, &program].concat());
    }

    fn wait_for_socket(&self) {
        let end = Instant::now() + Duration::from_secs(60);
        while std::os::unix::net::UnixStream::connect(self.socket()).is_err() {
            assert!(
                Instant::now() < end,
                "the daemon does not answer: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("daemon.log")).unwrap_or_default()
    }

    /// kill -9, as the worst case.
    pub fn kill_daemon(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// Asks the daemon to end, as an init system does, and waits until it has.
    pub fn end_daemon(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        let pid = rustix::process::Pid::from_child(&daemon);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        daemon.wait().unwrap();
    }

    /// `berth ARGS` against this daemon.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(BERTH);
        command
            .args(args)
            .env("BERTH_SOCKET", self.socket())
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
        command
    }

    pub fn berth(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Standard output of a command that must succeed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.berth(args);
        assert!(
            output.status.success(),
            "berth {args:?}: {}\n{}\n{}\n--- daemon ---\n{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        String::from_utf8(output.stdout)
            .unwrap()
            .trim_end()
            .to_owned()
    }

    /// Exit code and standard error of a command that must fail.
    pub fn fails(&self, args: &[&str]) -> (i32, String) {
        let output = self.berth(args);
        assert!(!output.status.success(), "berth {args:?} succeeded");
        (
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    /// Runs a command with standard input.
    pub fn with_input(&self, args: &[&str], input: &[u8]) -> Output {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let writer = std::thread::spawn(move || {
            let _ = stdin.write_all(&input);
        });
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        output
    }

    /// Runs a program inside the daemon's network namespace.
    pub fn in_network(&self, args: &[&str]) -> Output {
        let pid = self.daemon_pid().to_string();
        Command::new("nsenter")
            .args(["-t", &pid, "-n"])
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// An image `busybox` of the host's static busybox.
    fn import_busybox(&self) {
        let archive = busybox_archive();
        let output = self.with_input(&["import", "-c", "CMD [\"sh\"]", "-", "busybox"], &archive);
        assert!(
            output.status.success(),
            "{}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
    }

    /// Waits until `probe` holds.
    pub fn eventually(&self, what: &str, mut probe: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(240);
        while !probe() {
            assert!(
                Instant::now() < end,
                "never: {what}\n--- daemon ---\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The host's static busybox with its links, as a file system in a tar archive.
pub fn busybox_archive() -> Vec<u8> {
    let busybox = base::host::program("busybox").unwrap();
    let mut builder = tar::Builder::new(Vec::new());
    let program = std::fs::read(&busybox).unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_size(program.len() as u64);
    header.set_mode(0o755);
    builder
        .append_data(&mut header, "bin/busybox", &program[..])
        .unwrap();
    let list = Command::new(&busybox).arg("--list").output().unwrap();
    for applet in String::from_utf8(list.stdout)
        .unwrap()
        .lines()
        .filter(|a| *a != "busybox")
    {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        header.set_mode(0o777);
        builder
            .append_link(&mut header, format!("bin/{applet}"), "busybox")
            .unwrap();
    }
    for (name, text) in [
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        ),
        ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, name, text.as_bytes())
            .unwrap();
    }
    for folder in ["tmp", "root", "var"] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_size(0);
        header.set_mode(if folder == "tmp" { 0o1777 } else { 0o755 });
        builder.append_data(&mut header, folder, &[][..]).unwrap();
    }
    builder.into_inner().unwrap()
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.daemon.is_none() {
            self.start_daemon();
        }
        let machines = self.berth(&["machine", "list", "-q"]);
        for name in String::from_utf8_lossy(&machines.stdout).split_whitespace() {
            self.berth(&["machine", "rm", "-f", name]);
        }
        let ids = self.berth(&["ps", "-aq"]);
        for id in String::from_utf8_lossy(&ids.stdout).split_whitespace() {
            self.berth(&["rm", "-f", "-v", id]);
        }
        if let Some(mut daemon) = self.daemon.take() {
            self.berth(&["system", "stop"]);
            let end = Instant::now() + Duration::from_secs(20);
            while daemon.try_wait().ok().flatten().is_none() {
                if Instant::now() > end {
                    let _ = daemon.kill();
                    let _ = daemon.wait();
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        if let Some(mut sleeper) = self.sleeper.take() {
            let _ = sleeper.kill();
            let _ = sleeper.wait();
        }
        // The state folder is not removed before the keeper, which ends by itself, has let go of it.
        let state = self.state();
        let end = Instant::now() + Duration::from_secs(20);
        while keeper_of(&state).is_some() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The keeper of this state folder, where one lives: its messages go to the folder's `keeper.log`.
pub fn keeper_of(state: &Path) -> Option<u32> {
    let log = state.join("run/keeper.log");
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .find(|entry| {
            let comm = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            comm.trim_end() == "berth-keeper"
                && std::fs::read_link(entry.path().join("fd/2")).is_ok_and(|path| {
                    let path = path.to_string_lossy().into_owned();
                    Path::new(path.trim_end_matches(" (deleted)")) == log
                })
        })
        .and_then(|entry| entry.file_name().to_str()?.parse().ok())
}
