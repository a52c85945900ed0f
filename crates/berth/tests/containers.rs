//! The `berth` command and its daemon, as a user meets them.

mod host;

use std::process::Stdio;

use host::start;

#[test]
fn a_program_runs_and_its_exit_code_and_output_come_back() {
    let Some(host) = start() else { return };
    let output = host.berth(&[
        "run",
        "--rm",
        "busybox",
        "sh",
        "-c",
        "echo out; echo err >&2; exit 7",
    ]);
    assert_eq!(output.status.code(), Some(7), "{}", host.log());
    assert_eq!(output.stdout, b"out\n");
    assert_eq!(output.stderr, b"err\n");
    assert_eq!(host.ok(&["ps", "-aq"]), "");
    let output = host.with_input(
        &["run", "-i", "--rm", "busybox", "cat"],
        b"through the container",
    );
    assert_eq!(output.stdout, b"through the container");
    let (code, error) = host.fails(&["run", "--rm", "busybox", "/no/such/program"]);
    assert_eq!(code, 127, "{error}");
    let (code, error) = host.fails(&["run", "--rm", "--pull", "never", "no-such-image"]);
    assert_eq!(code, 125);
    assert!(error.contains("no-such-image"), "{error}");
}

#[test]
fn a_container_lives_through_its_whole_life() {
    let Some(host) = start() else { return };
    let id = host.ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "-e",
        "A=1",
        "busybox",
        "sh",
        "-c",
        "echo hello; sleep 300",
    ]);
    assert_eq!(id.len(), 64);
    host.eventually("the log", || host.ok(&["logs", "web"]) == "hello");
    assert!(host.ok(&["ps"]).contains("web"));
    assert_eq!(
        host.ok(&["exec", "web", "sh", "-c", "echo $A; hostname"]),
        format!("1\n{}", &id[..12])
    );
    assert_eq!(
        host.berth(&["exec", "web", "sh", "-c", "exit 9"])
            .status
            .code(),
        Some(9)
    );
    host.ok(&["pause", "web"]);
    assert!(host.ok(&["ps"]).contains("Paused"));
    host.ok(&["unpause", "web"]);
    host.ok(&["rename", "web", "site"]);
    assert!(host.ok(&["top", "site"]).contains("sleep"));
    let json: serde_json::Value = serde_json::from_str(&host.ok(&["inspect", "site"])).unwrap();
    assert_eq!(json[0]["State"]["Running"], true);
    assert_eq!(
        host.ok(&["ps", "--format", "{{.Names}} {{.State}} {{.Image}}"]),
        "site running busybox"
    );
    assert_eq!(
        host.ok(&["inspect", "-f", "{{.State.Status}}", "site"]),
        "running"
    );
    let (code, error) = host.fails(&["inspect", "-f", "{{.State.Nope}}", "site"]);
    assert_eq!(code, 2, "{error}");
    let (code, error) = host.fails(&["ps", "--format", "{{.Names"]);
    assert_eq!(code, 2, "{error}");
    let (code, error) = host.fails(&["rm", "site"]);
    assert_eq!(code, 4, "{error}");
    host.ok(&["stop", "-t", "1", "site"]);
    assert!(host.ok(&["ps", "-a"]).contains("Exited"));
    host.ok(&["start", "site"]);
    host.ok(&["restart", "-t", "1", "site"]);
    host.ok(&["kill", "site"]);
    assert_eq!(host.ok(&["wait", "site"]), "137");
    host.ok(&["rm", "site"]);
    let (code, _) = host.fails(&["inspect", "site"]);
    assert_eq!(code, 3);
}

#[test]
fn files_go_in_and_out_and_changes_become_an_image() {
    let Some(host) = start() else { return };
    host.ok(&["run", "-d", "--name", "box", "busybox", "sleep", "300"]);
    let file = host.scratch().join("file");
    std::fs::write(&file, "content").unwrap();
    host.ok(&["cp", file.to_str().unwrap(), "box:/tmp/inside"]);
    assert_eq!(host.ok(&["exec", "box", "cat", "/tmp/inside"]), "content");
    let back = host.scratch().join("back");
    host.ok(&["cp", "box:/tmp/inside", back.to_str().unwrap()]);
    assert_eq!(std::fs::read_to_string(&back).unwrap(), "content");
    assert!(host.ok(&["diff", "box"]).contains("A /tmp/inside"));
    host.ok(&[
        "commit",
        "-c",
        "CMD [\"cat\", \"/tmp/inside\"]",
        "box",
        "derived:1",
    ]);
    assert_eq!(host.ok(&["run", "--rm", "derived:1"]), "content");
    let archive = host.scratch().join("derived.tar");
    host.ok(&["save", "-o", archive.to_str().unwrap(), "derived:1"]);
    host.ok(&["rmi", "derived:1"]);
    host.ok(&["load", "-i", archive.to_str().unwrap()]);
    assert_eq!(host.ok(&["run", "--rm", "derived:1"]), "content");
}

#[test]
fn networks_have_names_ports_and_an_end() {
    let Some(host) = start() else { return };
    host.ok(&["network", "create", "front"]);
    host.serve_page("front", "127.0.0.1:8080:80", &["--network-alias", "site"]);
    host.eventually("the page by name", || {
        host.berth(&[
            "run",
            "--rm",
            "--network",
            "front",
            "busybox",
            "wget",
            "-qO-",
            "http://site/",
        ])
        .stdout
            == b"page\n"
    });
    let fetched = host.in_network(&["busybox", "wget", "-qO-", "http://127.0.0.1:8080/"]);
    assert_eq!(
        fetched.stdout,
        b"page\n",
        "{}",
        String::from_utf8_lossy(&fetched.stderr)
    );
    assert_eq!(host.ok(&["port", "web", "80"]), "127.0.0.1:8080");
    let other = host.berth(&["run", "--rm", "busybox", "wget", "-qO-", "http://site/"]);
    assert!(
        !other.status.success(),
        "a name of another network was found"
    );
    let (code, error) = host.fails(&["network", "rm", "front"]);
    assert!(code == 4 || code == 6, "{code} {error}");
    host.ok(&["rm", "-f", "web"]);
    host.ok(&["network", "rm", "front"]);
}

#[test]
fn volumes_outlive_their_containers() {
    let Some(host) = start() else { return };
    host.ok(&[
        "run",
        "--rm",
        "-v",
        "data:/data",
        "busybox",
        "sh",
        "-c",
        "echo kept > /data/f",
    ]);
    assert_eq!(
        host.ok(&[
            "run",
            "--rm",
            "-v",
            "data:/data:ro",
            "busybox",
            "cat",
            "/data/f"
        ]),
        "kept"
    );
    let read_only = host.berth(&[
        "run",
        "--rm",
        "-v",
        "data:/data:ro",
        "busybox",
        "sh",
        "-c",
        "echo x > /data/f",
    ]);
    assert!(!read_only.status.success());
    host.ok(&["volume", "rm", "data"]);
    assert_eq!(host.ok(&["volume", "ls", "-q"]), "");
}

#[test]
fn a_killed_daemon_loses_no_container_no_log_and_no_exit_code() {
    let Some(mut host) = start() else { return };
    host.ok(&[
        "run",
        "-d",
        "--name",
        "ends",
        "busybox",
        "sh",
        "-c",
        "sleep 1; echo last words; exit 7",
    ]);
    host.ok(&[
        "run",
        "-d",
        "--name",
        "stays",
        "busybox",
        "sh",
        "-c",
        "i=0; while [ $i -lt 3000 ]; do echo $i; i=$((i+1)); sleep 0.05; done",
    ]);
    host.eventually("output", || !host.ok(&["logs", "stays"]).is_empty());
    host.kill_daemon();
    std::thread::sleep(std::time::Duration::from_secs(2));
    host.start_daemon();
    assert_eq!(host.ok(&["wait", "ends"]), "7");
    assert_eq!(host.ok(&["logs", "ends"]), "last words");
    let json: serde_json::Value = serde_json::from_str(&host.ok(&["inspect", "stays"])).unwrap();
    assert_eq!(json[0]["State"]["Running"], true);
    let text = host.ok(&["logs", "stays"]);
    let numbers: Vec<usize> = text.lines().map(|line| line.parse().unwrap()).collect();
    assert!(
        numbers.len() > 30,
        "nothing was logged while the daemon was away"
    );
    assert!(
        numbers
            .iter()
            .enumerate()
            .all(|(index, number)| index == *number),
        "lines are missing: {numbers:?}"
    );
    assert_eq!(
        host.ok(&["exec", "stays", "echo", "still here"]),
        "still here"
    );
}

#[test]
fn many_containers_at_once_leave_nothing_behind() {
    let Some(host) = start() else { return };
    let links = |host: &host::Host| {
        String::from_utf8(host.in_network(&["ip", "-o", "link"]).stdout)
            .unwrap()
            .lines()
            .filter(|l| l.contains("veth"))
            .count()
    };
    // The pool of namespaces made ahead settles first.
    host.ok(&["run", "--rm", "busybox", "true"]);
    for round in 0..2 {
        let children: Vec<_> = (0..25)
            .map(|index| {
                host.command(&[
                    "run",
                    "--rm",
                    "busybox",
                    "sh",
                    "-c",
                    &format!("exit {index}"),
                ])
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
            })
            .collect();
        for (index, child) in children.into_iter().enumerate() {
            let output = child.wait_with_output().unwrap();
            assert_eq!(
                output.status.code(),
                Some(index as i32),
                "round {round}: {}\n{}",
                String::from_utf8_lossy(&output.stderr),
                host.log()
            );
        }
    }
    assert_eq!(host.ok(&["ps", "-aq"]), "");
    host.eventually("veths go", || links(&host) <= 24);
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(
        !mounts.contains(host.state().to_str().unwrap()),
        "a mount is left"
    );
    let containers = std::fs::read_dir(host.state().join("containers")).map_or(0, |d| d.count());
    assert_eq!(containers, 0, "records are left");
}

#[test]
fn limits_are_applied_and_changed() {
    let Some(host) = start() else { return };
    host.ok(&[
        "run",
        "-d",
        "--name",
        "small",
        "--memory",
        "64m",
        "--pids-limit",
        "20",
        "--cpus",
        "0.5",
        "busybox",
        "sleep",
        "300",
    ]);
    let json: serde_json::Value = serde_json::from_str(&host.ok(&["inspect", "small"])).unwrap();
    assert_eq!(json[0]["HostConfig"]["Memory"], 64 << 20);
    let stats: serde_json::Value =
        serde_json::from_str(&host.ok(&["stats", "--no-stream", "--format", "json", "small"]))
            .unwrap();
    let limit = stats[0]["memory_stats"]["limit"].as_u64().unwrap_or(0);
    if limit == 64 << 20 {
        host.ok(&["update", "--memory", "96m", "--memory-swap", "-1", "small"]);
        let json: serde_json::Value =
            serde_json::from_str(&host.ok(&["inspect", "small"])).unwrap();
        assert_eq!(json[0]["HostConfig"]["Memory"], 96 << 20);
    } else {
        eprintln!("SKIPPED in part: this host has no memory controller (limit {limit})");
    }
}

#[test]
fn a_second_daemon_shares_nothing() {
    let (Some(one), Some(two)) = (start(), start()) else {
        return;
    };
    one.ok(&["run", "-d", "--name", "same", "busybox", "sleep", "300"]);
    two.ok(&["run", "-d", "--name", "same", "busybox", "sleep", "300"]);
    one.ok(&["rm", "-f", "same"]);
    assert!(two.ok(&["ps"]).contains("same"));
}

#[test]
fn lists_come_as_tables_json_and_yaml() {
    let Some(host) = start() else { return };
    let json: serde_json::Value =
        serde_json::from_str(&host.ok(&["images", "--format", "json"])).unwrap();
    assert_eq!(json[0]["RepoTags"][0], "busybox:latest");
    assert!(
        host.ok(&["images", "--format", "yaml"])
            .contains("busybox:latest")
    );
    assert!(host.ok(&["network", "ls"]).contains("bridge"));
    assert!(host.ok(&["system", "df"]).contains("Images"));
    assert!(host.ok(&["info"]).contains("Berth"));
    let events = host.ok(&["events", "--since", "1h", "--until", "0s"]);
    assert!(events.contains("image") || events.is_empty());
}

#[test]
fn the_options_of_the_command_line_are_checked() {
    let Some(host) = start() else { return };
    for (args, code) in [
        (vec!["run", "--no-such-option", "busybox"], 2),
        (vec!["run", "-p", "nonsense", "busybox"], 125),
        (vec!["create", "--memory", "much", "busybox"], 2),
        (vec!["stop", "nobody"], 3),
        (vec!["network", "rm", "nobody"], 3),
        (vec!["volume", "inspect", "nobody"], 3),
    ] {
        let (got, error) = host.fails(&args);
        assert_eq!(got, code, "{args:?}: {error}");
        assert!(!error.is_empty());
    }
}
