//! Daemons that die at the wrong moment, and hosts: what must not be lost, and what must not be half-made.
//!
//! `BERTH_KILLS=100` is the full load; `make test` takes a small one.

mod host;

use std::process::{Child, Stdio};
use std::time::Duration;

use host::footprint::{Footprint, cgroup_parent, files_below, keeper_pid, number};
use host::{Host, start};

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

/// Debian's `docker-registry` in the daemon's network namespace; ends with its value.
struct Registry {
    process: Child,
    log: std::path::PathBuf,
}

/// An image `name` of what `script` changes in `base`.
fn make_of(host: &Host, base: &str, script: &str, name: &str) {
    let run = [
        "run",
        "--name",
        "filler",
        "--network",
        "none",
        base,
        "sh",
        "-c",
        script,
    ];
    host.ok(&run);
    host.ok(&["commit", "filler", name]);
    host.ok(&["rm", "filler"]);
}

impl Registry {
    const ADDRESS: &str = "127.0.0.1:5000";

    fn start(host: &Host) -> Option<Registry> {
        if !host::has("docker-registry") {
            eprintln!("SKIPPED: kills during pull and push need docker-registry");
            return None;
        }
        let folder = host.scratch().join("registry");
        std::fs::create_dir(&folder).unwrap();
        let config = folder.join("config.yml");
        let text = format!(
            "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{}'}}\n",
            folder.join("root").display(),
            Registry::ADDRESS
        );
        std::fs::write(&config, text).unwrap();
        let log = folder.join("log");
        let process = host
            .network_command()?
            .args(["docker-registry", "serve"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&log).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        host.eventually("the registry listens", || {
            host.in_network(&["busybox", "wget", "-qO-", "http://127.0.0.1:5000/v2/"])
                .status
                .success()
        });
        Some(Registry { process, log })
    }

    /// Makes an image of four layers there, which is not in the daemon's store afterwards, and answers its name.
    fn fill(&self, host: &Host) -> String {
        let name = format!("{}/large:1", Registry::ADDRESS);
        host.ok(&["tag", "busybox", &name]);
        for layer in 1..=3 {
            let script = format!(
                "dd if=/dev/urandom of=/layer-{layer} bs=1M count=5 && sha256sum /layer-* > /sums"
            );
            make_of(host, &name, &script, &name);
        }
        host.ok(&["push", "-q", &name]);
        host.ok(&["rmi", &name]);
        name
    }

    /// How often a part of a blob was asked for.
    fn partial_answers(&self) -> usize {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().filter(|line| line.contains("\" 206 ")).count()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Bytes of downloads that broke off.
fn broken_off(host: &Host) -> u64 {
    std::fs::read_dir(host.state().join("images/ingest"))
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|e| e == "partial"))
        .map(|entry| entry.metadata().map_or(0, |metadata| metadata.len()))
        .sum()
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
    let registry = Registry::start(&host);
    let large = registry.as_ref().map(|registry| registry.fill(&host));
    let large = large.as_deref().unwrap_or("none");
    let mut resumed = 0;
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
        let pushed = format!("{}/pushed:{round}", Registry::ADDRESS);
        if registry.is_some() {
            // Nothing of it is in the registry yet.
            let script = format!("dd if=/dev/urandom of=/data bs=1M count=5; echo {round} > /n");
            make_of(&host, "busybox", &script, &pushed);
        }
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
        let (get, forget) = (["pull", "-q", large], ["rmi", large]);
        let pull: [&[&str]; 3] = [&get, &forget, &get];
        let give = ["push", "-q", pushed.as_str()];
        let push: [&[&str]; 1] = [&give];
        let mut scripts = scripts.to_vec();
        if registry.is_some() {
            scripts.push(&pull);
            scripts.push(&push);
        }
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
        let left = broken_off(&host);
        host.start_daemon();
        if let Some(registry) = &registry {
            let before = registry.partial_answers();
            host.ok(&["pull", "-q", large]);
            let check = [
                "run",
                "--rm",
                "--network",
                "none",
                large,
                "sha256sum",
                "-c",
                "/sums",
            ];
            assert_eq!(host.ok(&check).matches(": OK").count(), 3, "round {round}");
            host.ok(&["rmi", large]);
            assert_eq!(broken_off(&host), 0, "round {round}: a download is left");
            resumed += usize::from(left > 0 && registry.partial_answers() > before);
            host.ok(&["push", "-q", &pushed]);
            host.ok(&["rmi", &pushed]);
            host.ok(&["pull", "-q", &pushed]);
            let read = ["run", "--rm", "--network", "none", &pushed, "cat", "/n"];
            assert_eq!(host.ok(&read), round.to_string());
            host.ok(&["rmi", &pushed]);
        }
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
    println!(
        "{rounds} kills; {resumed} times the next pull went on where the killed one had stopped"
    );
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
    // What was noted of processes is of another boot: these numbers, start time and all, are another process's now.
    let mut stranger = std::process::Command::new("sleep")
        .arg("600")
        .spawn()
        .unwrap();
    let key = base::pidfd::ProcessKey::of(stranger.id() as i32).unwrap();
    let own = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    for entry in std::fs::read_dir(host.state().join("containers")).unwrap() {
        let path = entry.unwrap().path().join("container.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        if json["process"].is_object() {
            assert_eq!(json["boot"], own.trim());
            json["process"] = serde_json::to_value(key).unwrap();
        }
        std::fs::write(&path, json.to_string()).unwrap();
    }
    let boot = host.scratch().join("boot_id");
    std::fs::write(&boot, "01234567-89ab-4cde-8f01-23456789abcd\n").unwrap();
    host.boot_id = Some(boot);
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
    assert!(
        stranger.try_wait().unwrap().is_none(),
        "a process that only has a container's numbers was killed"
    );
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}
