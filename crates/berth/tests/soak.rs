//! Many containers, and daemons that die at the wrong moment: what must not be left behind.
//!
//! `BERTH_SOAK=300 BERTH_SOAK_AT_ONCE=100` is the full load; `make test` takes a small one.

mod host;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use host::{Host, start};

fn number(name: &str, default: usize) -> usize {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

/// What a daemon's containers have on this host, counted.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Footprint {
    processes: usize,
    mounts: usize,
    cgroups: usize,
    interfaces: usize,
    rules: usize,
    files: BTreeMap<String, usize>,
    descriptors: [usize; 2],
}

fn files_below(folder: &Path) -> usize {
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => 1 + files_below(&entry.path()),
            _ => 1,
        })
        .sum()
}

fn keeper_pid(host: &Host) -> u32 {
    host::keeper_of(&host.state()).expect("a keeper runs")
}

/// Every process that descends from `pid`, itself not counted.
fn descendants(pid: u32) -> usize {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    children
        .unwrap_or_default()
        .split_whitespace()
        .map(|child| 1 + child.parse().map_or(0, descendants))
        .sum()
}

fn cgroups(folder: &Path, parent: &str, depth: usize) -> usize {
    if depth == 0 {
        return 0;
    }
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| {
            if entry.file_name().to_string_lossy() == parent {
                files_below_folders(&entry.path())
            } else {
                cgroups(&entry.path(), parent, depth - 1)
            }
        })
        .sum()
}

fn files_below_folders(folder: &Path) -> usize {
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| 1 + files_below_folders(&entry.path()))
        .sum()
}

/// The folder in the cgroup trees that this daemon's containers are in.
fn cgroup_parent(host: &Host) -> String {
    let id = host.ok(&["run", "-d", "busybox", "sleep", "60"]);
    let pid = host.ok(&["inspect", "--format", "json", &id]);
    let json: serde_json::Value = serde_json::from_str(&pid).unwrap();
    let pid = json[0]["State"]["Pid"].as_u64().unwrap();
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let parent = text
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2)?.strip_suffix(&id))
        .map(|path| path.trim_matches('/').to_owned())
        .next()
        .expect("the container has a cgroup of its own");
    host.ok(&["rm", "-f", &id]);
    parent.rsplit('/').next().unwrap().to_owned()
}

impl Footprint {
    fn of(host: &Host, parent: &str) -> Footprint {
        let keeper = keeper_pid(host);
        let lines = |args: &[&str], part: &str| {
            let output = host.in_network(args);
            String::from_utf8_lossy(&output.stdout)
                .lines()
                .filter(|line| line.contains(part))
                .count()
        };
        let mounts = |pid: u32| {
            std::fs::read_to_string(format!("/proc/{pid}/mountinfo"))
                .unwrap_or_default()
                .lines()
                .count()
        };
        let descriptors =
            |pid: u32| std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        let state = host.state();
        let files = ["containers", "volumes", "images", "run", "networks"]
            .iter()
            .map(|name| ((*name).to_owned(), files_below(&state.join(name))))
            .collect();
        Footprint {
            processes: descendants(keeper),
            mounts: mounts(host.daemon_pid()) + mounts(keeper),
            cgroups: cgroups(Path::new("/sys/fs/cgroup"), parent, 3),
            interfaces: lines(&["ip", "-o", "link"], ": "),
            rules: lines(&["nft", "list", "ruleset"], ""),
            files,
            descriptors: [descriptors(host.daemon_pid()), descriptors(keeper)],
        }
    }

    /// Whether nothing is left of what was not in `before`. Pools (namespaces made ahead, connections, threads'
    /// descriptors) may hold a few more or less.
    fn is_no_more_than(&self, before: &Footprint) -> bool {
        self.processes <= before.processes
            && self.mounts <= before.mounts
            && self.cgroups <= before.cgroups
            && self.rules <= before.rules
            && self.files == before.files
            && self.interfaces <= before.interfaces + 16
            && self.descriptors[0] <= before.descriptors[0] + 40
            && self.descriptors[1] <= before.descriptors[1] + 2
    }
}

/// Bytes of anonymous memory of a process.
fn memory(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find(|l| l.starts_with("Anonymous:")).unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        * 1024
}

/// One container through a life with a network, a port, a volume, an exec, a stop, a restart and a kill.
fn one_life(host: &Host, index: usize) {
    let name = format!("soak-{index}");
    host.ok(&[
        "run",
        "-d",
        "--name",
        &name,
        "-p",
        "127.0.0.1::80",
        "-v",
        "/data",
        "busybox",
        "sh",
        "-c",
        "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done",
    ]);
    host.eventually("its first words", || host.ok(&["logs", &name]) == "ready");
    assert_eq!(host.ok(&["exec", &name, "echo", &name]), name);
    host.ok(&["stop", "-t", "60", &name]);
    assert_eq!(host.ok(&["wait", &name]), "3");
    host.ok(&["start", &name]);
    host.ok(&["kill", &name]);
    assert_eq!(host.ok(&["wait", &name]), "137");
    host.ok(&["rm", "-v", &name]);
}

fn lives(host: &Host, count: usize, at_once: usize) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..at_once.min(count) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        return;
                    }
                    one_life(host, index);
                }
            });
        }
    });
}

#[test]
fn containers_in_a_loop_leave_nothing_behind_and_the_daemon_does_not_grow() {
    let Some(host) = start() else { return };
    let (count, at_once) = (
        number("BERTH_SOAK", 24),
        number("BERTH_SOAK_AT_ONCE", 8).max(1),
    );
    let parent = cgroup_parent(&host);
    host.ok(&["run", "--rm", "-p", "127.0.0.1::80", "busybox", "true"]);
    let before = Footprint::of(&host, &parent);
    // The first rounds fill pools and the allocator's arenas.
    lives(&host, at_once * 2, at_once);
    let warm = (memory(host.daemon_pid()), memory(keeper_pid(&host)));
    let begun = Instant::now();
    lives(&host, count, at_once);
    let took = begun.elapsed();
    let after = (memory(host.daemon_pid()), memory(keeper_pid(&host)));
    println!(
        "{count} containers, {at_once} at once: {:.1} s; daemon {} -> {} KiB, keeper {} -> {} KiB of anonymous memory",
        took.as_secs_f32(),
        warm.0 >> 10,
        after.0 >> 10,
        warm.1 >> 10,
        after.1 >> 10,
    );
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let now = Footprint::of(&host, &parent);
        if now.is_no_more_than(&before) {
            break;
        }
        assert!(
            Instant::now() < end,
            "left behind:\nbefore {before:?}\nafter  {now:?}\n{}",
            host.log()
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    // A leak of 10 KiB a container is one of 3 MiB here; the allocator's own noise is less than 4 MiB.
    assert!(
        after.0 < warm.0 + (4 << 20) + 1024 * count as u64,
        "the daemon grows: {warm:?} -> {after:?}"
    );
    assert!(
        after.1 < warm.1 + (1 << 20),
        "the keeper grows: {warm:?} -> {after:?}"
    );
    for line in host.log().lines() {
        assert!(!line.contains("ERROR"), "{line}");
    }
}

#[test]
fn rules_that_another_program_flushes_come_back() {
    let Some(host) = start() else { return };
    host.ok(&["network", "create", "guarded"]);
    host.ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "--network",
        "guarded",
        "-p",
        "127.0.0.1:8099:80",
        "busybox",
        "sh",
        "-c",
        "mkdir /www; echo page > /www/index.html; exec httpd -f -p 80 -h /www",
    ]);
    let fetch = || {
        host.in_network(&["busybox", "wget", "-qO-", "http://127.0.0.1:8099/"])
            .stdout
            == b"page\n"
    };
    let rules = || {
        let output = host.in_network(&["nft", "list", "ruleset"]);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    host.eventually("the page", fetch);
    let before = rules();
    assert!(before.contains("table"), "{before}");
    assert!(
        host.in_network(&["nft", "flush", "ruleset"])
            .status
            .success()
    );
    host.eventually("the rules are back", || {
        rules().lines().count() == before.lines().count()
    });
    host.eventually("the page through the new rules", fetch);
    assert!(host.log().contains("they are put back"), "{}", host.log());
}

/// Cheap randomness; the seed is printed so that a failure can be had again.
struct Dice(u64);

impl Dice {
    fn new(name: &str) -> Dice {
        let seed = number("BERTH_SEED", 0) as u64;
        let seed = if seed == 0 {
            std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap()
                .as_nanos() as u64
                | 1
        } else {
            seed
        };
        println!("{name}: BERTH_SEED={seed}");
        Dice(seed)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[test]
fn a_daemon_killed_at_any_moment_leaves_nothing_half_made() {
    let Some(mut host) = start() else { return };
    let mut dice = Dice::new("killed at any moment");
    let rounds = number("BERTH_KILLS", 12);
    let parent = cgroup_parent(&host);
    let context = host.scratch().join("context");
    std::fs::create_dir(&context).unwrap();
    std::fs::write(
        context.join("Dockerfile"),
        "FROM busybox\nARG N\nRUN echo $N > /n\nRUN dd if=/dev/zero of=/big bs=1M count=4\nCOPY Dockerfile /\n",
    )
    .unwrap();
    let archive = host.scratch().join("image.tar");
    host.ok(&["save", "-o", archive.to_str().unwrap(), "busybox"]);
    host.ok(&[
        "run",
        "-d",
        "--name",
        "witness",
        "--restart",
        "always",
        "busybox",
        "sh",
        "-c",
        "i=0; while :; do echo $i; i=$((i+1)); sleep 0.1; done",
    ]);
    let mut codes: Vec<(String, i32)> = Vec::new();
    for round in 0..rounds {
        // A container whose end falls into the time without a daemon, or near it.
        let ends = format!("ends-{round}");
        let code = 10 + round as i32 % 100;
        host.ok(&[
            "run",
            "-d",
            "--name",
            &ends,
            "busybox",
            "sh",
            "-c",
            &format!("sleep 0.{}; exit {code}", dice.below(10)),
        ]);
        codes.push((ends, code));
        let busy = format!("busy-{round}");
        let tag = format!("built:{round}");
        let argument = format!("N={round}");
        let scripts: [&[&[&str]]; 3] = [
            &[
                &[
                    "create", "--name", &busy, "-v", "/v", "busybox", "sleep", "300",
                ],
                &["start", &busy],
                &["exec", &busy, "true"],
                &["stop", "-t", "1", &busy],
                &["rm", "-v", &busy],
                &["run", "--rm", "busybox", "true"],
            ],
            &[
                &[
                    "build",
                    "-q",
                    "--build-arg",
                    &argument,
                    "-t",
                    &tag,
                    context.to_str().unwrap(),
                ],
                &["rmi", &tag],
            ],
            &[
                &["load", "-q", "-i", archive.to_str().unwrap()],
                &["network", "create", &busy],
                &["volume", "create", &busy],
                &["network", "rm", &busy],
                &["volume", "rm", &busy],
            ],
        ];
        let children: Vec<_> = scripts
            .iter()
            .map(|script| {
                let commands: Vec<Vec<String>> = script
                    .iter()
                    .map(|command| command.iter().map(|word| (*word).to_owned()).collect())
                    .collect();
                let socket = host.socket();
                std::thread::spawn(move || {
                    for command in commands {
                        // Whatever becomes of it: the daemon dies under it. None may start one of its own.
                        let _ = std::process::Command::new(host::BERTH)
                            .args(command)
                            .env("BERTH_SOCKET", &socket)
                            .stdin(Stdio::null())
                            .stdout(Stdio::null())
                            .stderr(Stdio::null())
                            .status();
                    }
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(dice.below(900)));
        host.kill_daemon();
        for child in children {
            child.join().unwrap();
        }
        host.start_daemon();
        for (name, code) in &codes {
            assert_eq!(
                host.ok(&["wait", name]),
                code.to_string(),
                "round {round}: {name}"
            );
        }
        let json: serde_json::Value =
            serde_json::from_str(&host.ok(&["inspect", "witness"])).unwrap();
        assert_eq!(json[0]["State"]["Running"], true, "round {round}");
        assert_eq!(json[0]["RestartCount"], 0, "round {round}");
        // Whatever was left of the busy one is a whole container: it can be started or removed like any other.
        if host.berth(&["inspect", &busy]).status.success() {
            if !host.berth(&["start", &busy]).status.success() {
                let (_, error) = host.fails(&["start", &busy]);
                panic!("round {round}: half a container: {error}\n{}", host.log());
            }
            host.ok(&["rm", "-f", "-v", &busy]);
        }
        host.ok(&["run", "--rm", "--name", &busy, "busybox", "true"]);
        for (kind, name) in [("network", &busy), ("volume", &busy)] {
            if host.berth(&[kind, "inspect", name]).status.success() {
                host.ok(&[kind, "rm", name]);
            }
        }
        if host.berth(&["image", "inspect", &tag]).status.success() {
            assert_eq!(
                host.ok(&["run", "--rm", &tag, "cat", "/n"]),
                round.to_string()
            );
            host.ok(&["rmi", &tag]);
        }
    }
    let text = host.ok(&["logs", "witness"]);
    for (index, line) in text.lines().enumerate() {
        assert_eq!(line, index.to_string(), "a line of the log is missing");
    }
    for (name, _) in &codes {
        host.ok(&["rm", name]);
    }
    host.ok(&["rm", "-f", "witness"]);
    assert_eq!(host.ok(&["ps", "-aq"]), "");
    assert_eq!(host.ok(&["volume", "ls", "-q"]), "");
    host.eventually("nothing is left", || {
        let now = Footprint::of(&host, &parent);
        let gone = now.processes == 0
            && now.cgroups == 0
            && now.files["containers"] == 0
            && files_below(&host.state().join("run/containers")) == 0;
        if !gone {
            eprintln!("{now:?}");
        }
        gone
    });
}

#[test]
fn after_a_reboot_what_its_policy_says_runs_again() {
    let Some(mut host) = start() else { return };
    for (name, policy) in [
        ("always", "always"),
        ("unless", "unless-stopped"),
        ("stopped", "unless-stopped"),
        ("failure", "on-failure"),
        ("never", "no"),
    ] {
        host.ok(&[
            "run",
            "-d",
            "--name",
            name,
            "--restart",
            policy,
            "busybox",
            "sleep",
            "600",
        ]);
    }
    host.ok(&["stop", "-t", "0", "stopped"]);
    let keeper = keeper_pid(&host);
    let pids: Vec<i32> = ["always", "unless", "failure", "never"]
        .iter()
        .map(|name| {
            let json: serde_json::Value =
                serde_json::from_str(&host.ok(&["inspect", name])).unwrap();
            json[0]["State"]["Pid"].as_i64().unwrap() as i32
        })
        .collect();
    // The power goes: daemon, keeper and containers at once, and the runtime folder with them.
    host.kill_daemon();
    let kill = |pid: i32| {
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    };
    kill(keeper as i32);
    for pid in pids {
        kill(pid);
    }
    host.eventually("the keeper is gone", || {
        host::keeper_of(&host.state()).is_none()
    });
    std::fs::remove_dir_all(host.state().join("run")).unwrap();
    // What was noted of processes is of another boot: their numbers may be anybody's now.
    for entry in std::fs::read_dir(host.state().join("containers")).unwrap() {
        let path = entry.unwrap().path().join("container.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        if json["process"].is_object() {
            json["process"]["pid"] = std::process::id().into();
        }
        std::fs::write(&path, json.to_string()).unwrap();
    }
    host.start_daemon();
    let status = |name: &str| {
        let json: serde_json::Value = serde_json::from_str(&host.ok(&["inspect", name])).unwrap();
        json[0]["State"]["Status"].as_str().unwrap().to_owned()
    };
    host.eventually("always and unless-stopped run", || {
        status("always") == "running" && status("unless") == "running"
    });
    host.eventually("on-failure runs: its container did not end well", || {
        status("failure") == "running"
    });
    assert_eq!(status("stopped"), "exited");
    assert_eq!(status("never"), "exited");
    assert_eq!(host.ok(&["exec", "always", "echo", "well"]), "well");
}

/// A FUSE file system that nobody serves: every look at it waits. Gone with its value.
struct DeadMount {
    path: std::path::PathBuf,
    _device: std::fs::File,
}

impl DeadMount {
    fn make(path: std::path::PathBuf) -> Option<DeadMount> {
        use std::os::fd::AsRawFd;
        let device = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .ok()?;
        std::fs::create_dir(&path).unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            device.as_raw_fd()
        );
        let options = std::ffi::CString::new(options).unwrap();
        let flags = rustix::mount::MountFlags::NOSUID | rustix::mount::MountFlags::NODEV;
        rustix::mount::mount("dead", &path, "fuse", flags, &*options).ok()?;
        Some(DeadMount {
            path,
            _device: device,
        })
    }
}

impl Drop for DeadMount {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.path, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn a_bind_whose_server_is_dead_holds_up_nobody_else() {
    let Some(host) = start() else { return };
    let Some(dead) = DeadMount::make(host.scratch().join("dead")) else {
        eprintln!("SKIPPED: needs /dev/fuse");
        return;
    };
    let bind = format!("{}:/data", dead.path.display());
    let waiting = host
        .command(&["run", "--rm", "-v", &bind, "busybox", "true"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    for _ in 0..3 {
        host.ok(&["run", "--rm", "busybox", "true"]);
        host.ok(&["ps"]);
    }
    let others = begun.elapsed();
    let output = waiting.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(error.contains("does not answer"), "{error}");
    assert!(
        begun.elapsed() > others,
        "the others waited for the dead one: {others:?}"
    );
    // Asked again while the first look still waits, it is refused at once.
    let (_, error) = host.fails(&["create", "-v", &bind, "busybox", "true"]);
    assert!(error.contains("does not answer"), "{error}");
    drop(dead);
    assert_eq!(host.ok(&["ps", "-aq"]), "");
}

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
    let refused = berth(&["run", "--rm", "busybox", "true"]);
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && error.contains("--network host or --network none"),
        "{error}"
    );
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
