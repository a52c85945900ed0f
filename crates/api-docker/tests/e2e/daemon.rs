//! A daemon of a test: its own state folder and socket, its clients, and its end.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use base::paths::Paths;
use engine::{Engine, EngineConfig};
use tokio_util::sync::CancellationToken;

/// A network namespace of the tests' own: what a daemon does to bridges, rules and routes ends with it.
pub fn isolate() {
    if !is_root() {
        return;
    }
    // SAFETY: called before any other thread exists, so nothing else in this process is surprised by it.
    let isolated = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
    match isolated {
        Ok(()) => {
            let up = Command::new("ip")
                .args(["link", "set", "lo", "up"])
                .status();
            if !up.is_ok_and(|status| status.success()) {
                eprintln!("the loopback interface stays down: ip(8) is missing");
            }
        }
        Err(error) => eprintln!("the tests run in the host's own network namespace: {error}"),
    }
}

/// The keeper's part of this binary.
pub fn role(args: &[String]) -> Option<ExitCode> {
    match args.first().map(String::as_str) {
        Some("keeper") => Some(engine::keeper::main(args[1..].to_vec())),
        _ => None,
    }
}

pub struct Daemon {
    _engine: Arc<Engine>,
    pub home: tempfile::TempDir,
    socket: PathBuf,
    stop: CancellationToken,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

static SHARED: OnceLock<Arc<Daemon>> = OnceLock::new();

/// The daemon that most tests share: they name what they make after themselves.
pub fn shared() -> Arc<Daemon> {
    SHARED.get_or_init(|| Arc::new(Daemon::start())).clone()
}

/// Ends the shared daemon, as statics are not dropped.
pub fn stop_shared() {
    if let Some(daemon) = SHARED.get() {
        daemon.end();
    }
}

impl Daemon {
    pub fn start() -> Daemon {
        let home = tempfile::Builder::new()
            .prefix("berth-e2e-")
            .tempdir()
            .unwrap();
        let mut config = EngineConfig::new(Paths::beneath(&home.path().join("state")));
        let me = std::env::current_exe().unwrap();
        config.keeper_command = vec![me, "keeper".into()];
        let socket = home.path().join("docker.sock");
        let stop = CancellationToken::new();
        let (sender, receiver) = std::sync::mpsc::channel();
        let (token, path) = (stop.clone(), socket.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let engine = Engine::open(config).await.unwrap();
                let listener = tokio::net::UnixListener::bind(&path).unwrap();
                let router = api_docker::router(engine.clone());
                sender.send(engine.clone()).unwrap();
                api_docker::serve(vec![listener], router, token)
                    .await
                    .unwrap();
                // Cgroups, bridges and rules are for the daemon's lifetime.
                let _ = engine.leave_host().await;
            });
            runtime.shutdown_timeout(Duration::from_secs(2));
        });
        let engine = receiver
            .recv_timeout(Duration::from_secs(30))
            .expect("the daemon starts");
        Daemon {
            _engine: engine,
            home,
            socket,
            stop,
            thread: Mutex::new(Some(thread)),
        }
    }

    fn end(&self) {
        if let Some(thread) = self.thread.lock().unwrap().take() {
            let ids = self.try_docker(&["ps", "-aq"]);
            let ids = String::from_utf8_lossy(&ids.stdout).into_owned();
            for id in ids.split_whitespace() {
                let _ = self.try_docker(&["rm", "-fv", id]);
            }
            let networks = self.try_docker(&["network", "ls", "-q", "--filter", "type=custom"]);
            for id in String::from_utf8_lossy(&networks.stdout).split_whitespace() {
                let _ = self.try_docker(&["network", "rm", id]);
            }
            self.stop.cancel();
            let _ = thread.join();
            let _ = std::fs::remove_dir_all(self.home.path());
        }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// docker's command line, pointed at this daemon, bounded in time.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["60", "docker"])
            .args(args)
            .env("DOCKER_HOST", format!("unix://{}", self.socket.display()))
            .env("DOCKER_CONFIG", self.home.path().join("client"))
            .env("DOCKER_CLI_HINTS", "false")
            .env_remove("DOCKER_CONTEXT")
            .stdin(Stdio::null());
        command
    }

    pub fn try_docker(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("timeout(1) runs")
    }

    /// Runs docker, wants success, answers its output without the last newline.
    #[track_caller]
    pub fn docker(&self, args: &[&str]) -> String {
        let output = self.try_docker(args);
        assert!(
            output.status.success(),
            "docker {args:?}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout)
            .trim_end()
            .to_owned()
    }

    /// Runs docker, wants failure, answers its error.
    #[track_caller]
    pub fn docker_fails(&self, args: &[&str]) -> String {
        let output = self.try_docker(args);
        assert!(!output.status.success(), "docker {args:?} succeeded");
        String::from_utf8_lossy(&output.stderr)
            .trim_end()
            .to_owned()
    }

    /// Runs docker with bytes as its input.
    #[track_caller]
    pub fn docker_with(&self, args: &[&str], input: &[u8]) -> Output {
        let mut command = self.command(args);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let writer = std::thread::spawn(move || {
            let _ = stdin.write_all(&input);
        });
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        output
    }

    /// One bare HTTP request on a connection of its own; the head and the body of the answer, raw.
    pub fn http(&self, request: &str) -> (String, String) {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        // A daemon that refuses a long body closes before it has all of it.
        let _ = stream.write_all(request.as_bytes());
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        let text = String::from_utf8_lossy(&all).into_owned();
        match text.split_once("\r\n\r\n") {
            Some((head, body)) => (head.to_owned(), body.to_owned()),
            None => (text, String::new()),
        }
    }

    /// `GET path`, with the connection closed after it.
    pub fn get(&self, path: &str) -> (String, String) {
        self.http(&format!(
            "GET {path} HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n"
        ))
    }

    /// `POST path` with a JSON body.
    pub fn post(&self, path: &str, body: &str) -> (String, String) {
        self.http(&format!(
            "POST {path} HTTP/1.1\r\nHost: d\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.end();
    }
}

/// Whether docker's command line is there; says so where not.
pub fn has_docker(test: &str) -> bool {
    let there = Command::new("docker")
        .arg("--version")
        .output()
        .is_ok_and(|o| o.status.success());
    if !there {
        eprintln!("SKIPPED: {test}: the docker command line is not installed");
    }
    there
}

/// Whether containers can run here: root, and a static busybox for an image. Imports it once.
pub fn has_busybox(test: &str) -> Option<Arc<Daemon>> {
    if !has_docker(test) {
        return None;
    }
    if !is_root() {
        eprintln!("SKIPPED: {test}: containers of this test need root");
        return None;
    }
    let Some(archive) = busybox_archive() else {
        eprintln!(
            "SKIPPED: {test}: there is no static /bin/busybox (apt-get install busybox-static)"
        );
        return None;
    };
    let daemon = shared();
    static IMPORT: Mutex<bool> = Mutex::new(false);
    let mut done = IMPORT
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    if !*done {
        let imported = daemon.docker_with(&["import", "-", "busybox:latest"], &archive);
        assert!(
            imported.status.success(),
            "import: {}",
            String::from_utf8_lossy(&imported.stderr)
        );
        *done = true;
    }
    drop(done);
    Some(daemon)
}

pub fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0)
}

/// A file system of busybox and its links, as a tar archive.
pub fn busybox_archive() -> Option<Vec<u8>> {
    let program = std::fs::read("/bin/busybox").ok()?;
    // A program with an interpreter (PT_INTERP) needs libraries, which the image would lack.
    if program.windows(9).any(|w| w == b"/ld-linux")
        || program.windows(12).any(|w| w == b"/lib64/ld-li")
    {
        return None;
    }
    let mut archive = tar::Builder::new(Vec::new());
    for directory in ["bin/", "tmp/", "etc/", "root/", "proc/", "sys/", "dev/"] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(if directory == "tmp/" { 0o1777 } else { 0o755 });
        header.set_size(0);
        archive.append_data(&mut header, directory, &[][..]).ok()?;
    }
    let mut file = |path: &str, mode: u32, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_mode(mode);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, path, content).ok()
    };
    file("bin/busybox", 0o755, &program)?;
    file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n",
    )?;
    file("etc/group", 0o644, b"root:x:0:\nuser:x:1000:\n")?;
    let applets = Command::new("/bin/busybox").arg("--list").output().ok()?;
    for applet in String::from_utf8_lossy(&applets.stdout)
        .lines()
        .filter(|name| *name != "busybox")
    {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_mode(0o777);
        header.set_size(0);
        archive
            .append_link(&mut header, format!("bin/{applet}"), "busybox")
            .ok()?;
    }
    archive.into_inner().ok()
}

/// Waits for something to become true, five seconds at most.
#[track_caller]
pub fn eventually(what: &str, mut test: impl FnMut() -> bool) {
    for _ in 0..250 {
        if test() {
            return;
        }
        std::thread::sleep(Duration::from_millis(40));
    }
    panic!("in ten seconds it did not come true that {what}");
}
