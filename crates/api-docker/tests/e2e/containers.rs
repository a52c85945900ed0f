//! `docker run` and everything that is done to containers.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

use crate::daemon::{eventually, has_busybox};

crate::tests! {
    run_gives_output_and_exit_code_and_leaves_nothing,
    run_passes_stdin_and_its_end,
    run_with_a_terminal_has_one,
    run_of_what_is_not_there_fails_as_with_dockerd,
    a_container_goes_through_its_life,
    ps_filters_and_formats,
    logs_are_kept_followed_and_cut,
    exec_has_streams_exit_codes_and_environment,
    attach_joins_a_running_container,
    a_hijack_without_upgrade_is_served_raw,
    files_are_copied_in_and_out,
    diff_commit_and_export_show_what_was_written,
    volumes_and_binds_outlive_their_container,
    ports_are_published,
    containers_of_a_network_find_each_other,
    stats_and_top_show_processes,
    events_tell_a_containers_life,
    a_health_check_is_run,
    images_in_use_are_kept,
    info_version_and_df_count_what_is_there,
    wait_answers_its_headers_at_once,
    prune_removes_what_has_stopped,
}

fn run_gives_output_and_exit_code_and_leaves_nothing() {
    let Some(daemon) = has_busybox("run") else {
        return;
    };
    assert_eq!(
        daemon.docker(&[
            "run", "--rm", "--name", "run-one", "busybox", "echo", "hello"
        ]),
        "hello"
    );
    let output = daemon.try_docker(&[
        "run",
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
    eventually("the container is gone", || {
        daemon
            .docker(&["ps", "-aq", "--filter", "name=run-one"])
            .is_empty()
    });
    let output = daemon.docker(&[
        "run",
        "--rm",
        "-e",
        "A=b c",
        "-w",
        "/tmp",
        "-u",
        "user",
        "-h",
        "host",
        "busybox",
        "sh",
        "-c",
        "echo $A; pwd; id -un; hostname",
    ]);
    assert_eq!(output, "b c\n/tmp\nuser\nhost");
}

fn run_passes_stdin_and_its_end() {
    let Some(daemon) = has_busybox("run -i") else {
        return;
    };
    let output = daemon.docker_with(&["run", "--rm", "-i", "busybox", "cat"], b"through\n");
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(0), &b"through\n"[..])
    );
    let large = vec![b'x'; 3 << 20];
    let output = daemon.docker_with(&["run", "--rm", "-i", "busybox", "wc", "-c"], &large);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        large.len().to_string()
    );
}

fn run_with_a_terminal_has_one() {
    let Some(daemon) = has_busybox("run -t") else {
        return;
    };
    let output = daemon.docker(&[
        "run",
        "--rm",
        "-t",
        "busybox",
        "sh",
        "-c",
        "test -t 1 && echo terminal",
    ]);
    assert_eq!(output, "terminal");
}

fn run_of_what_is_not_there_fails_as_with_dockerd() {
    let Some(daemon) = has_busybox("run") else {
        return;
    };
    let output = daemon.try_docker(&["run", "--rm", "busybox", "no-such-program"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(127), "{error}");
    assert!(error.contains("no-such-program"), "{error}");
    let output = daemon.try_docker(&["run", "--rm", "busybox", "/etc"]);
    assert_eq!(
        output.status.code(),
        Some(126),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let output = daemon.try_docker(&["run", "--rm", "--pull", "never", "no-such-image", "true"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("No such image: no-such-image:latest")
    );
    assert!(
        daemon
            .docker_fails(&["start", "no-such-container"])
            .contains("No such container: no-such-container")
    );
    daemon.docker(&["create", "--name", "run-twice", "busybox", "sh"]);
    let error = daemon.docker_fails(&["create", "--name", "run-twice", "busybox", "sh"]);
    assert!(
        error.contains("The container name \"/run-twice\" is already in use by container"),
        "{error}"
    );
    daemon.docker(&["rm", "run-twice"]);
}

fn a_container_goes_through_its_life() {
    let Some(daemon) = has_busybox("life") else {
        return;
    };
    let state = |name: &str| daemon.docker(&["inspect", "-f", "{{.State.Status}}", name]);
    let id = daemon.docker(&[
        "create", "--name", "life", "--memory", "64m", "busybox", "sleep", "1000",
    ]);
    assert_eq!((id.len(), state("life").as_str()), (64, "created"));
    daemon.docker(&["start", "life"]);
    assert_eq!(state(&id[..12]), "running");
    daemon.docker(&["pause", "life"]);
    assert_eq!(state("life"), "paused");
    daemon.docker(&["unpause", "life"]);
    daemon.docker(&["rename", "life", "life-two"]);
    daemon.docker(&[
        "update",
        "--memory",
        "128m",
        "--memory-swap",
        "-1",
        "--restart",
        "no",
        "life-two",
    ]);
    assert_eq!(
        daemon.docker(&["inspect", "-f", "{{.HostConfig.Memory}}", "life-two"]),
        (128 << 20).to_string()
    );
    daemon.docker(&["restart", "-t", "0", "life-two"]);
    assert_eq!(state("life-two"), "running");
    assert!(
        daemon
            .docker_fails(&["rm", "life-two"])
            .contains("container is running")
    );
    daemon.docker(&["kill", "-s", "KILL", "life-two"]);
    assert_eq!(daemon.docker(&["wait", "life-two"]), "137");
    assert_eq!(state("life-two"), "exited");
    daemon.docker(&["start", "life-two"]);
    daemon.docker(&["stop", "-t", "0", "life-two"]);
    assert_eq!(state("life-two"), "exited");
    // Stopping what has stopped is no error.
    daemon.docker(&["stop", "life-two"]);
    daemon.docker(&["rm", "life-two"]);
    assert!(
        daemon
            .docker_fails(&["inspect", "life-two"])
            .to_lowercase()
            .contains("no such object")
    );
}

fn ps_filters_and_formats() {
    let Some(daemon) = has_busybox("ps") else {
        return;
    };
    let id = daemon.docker(&[
        "run", "-d", "--name", "ps-one", "--label", "k=ps", "busybox", "sleep", "1000",
    ]);
    let row = daemon.docker(&[
        "ps",
        "--no-trunc",
        "--filter",
        "label=k=ps",
        "--format",
        "{{.ID}} {{.Image}} {{.Names}} {{.State}}",
    ]);
    assert_eq!(row, format!("{id} busybox ps-one running"));
    let status = daemon.docker(&["ps", "--filter", "name=ps-one", "--format", "{{.Status}}"]);
    assert!(status.starts_with("Up "), "{status}");
    assert_eq!(
        daemon.docker(&[
            "ps",
            "-aq",
            "--filter",
            "label=k=ps",
            "--filter",
            "status=exited"
        ]),
        ""
    );
    assert_eq!(
        daemon.docker(&[
            "ps",
            "-q",
            "--no-trunc",
            "--filter",
            "ancestor=busybox",
            "--filter",
            "name=ps-one"
        ]),
        id
    );
    daemon.docker(&["rm", "-f", "ps-one"]);
}

fn logs_are_kept_followed_and_cut() {
    let Some(daemon) = has_busybox("logs") else {
        return;
    };
    daemon.docker(&[
        "run",
        "-d",
        "--name",
        "logs",
        "busybox",
        "sh",
        "-c",
        "echo one; echo two >&2; sleep 1; echo three",
    ]);
    let followed = daemon.try_docker(&["logs", "-f", "logs"]);
    assert_eq!(
        (&followed.stdout[..], &followed.stderr[..]),
        (&b"one\nthree\n"[..], &b"two\n"[..])
    );
    assert_eq!(daemon.docker(&["logs", "--tail", "1", "logs"]), "three");
    let stamped = daemon.docker(&["logs", "-t", "--tail", "1", "logs"]);
    assert!(
        stamped.ends_with("Z three") && stamped.contains('T'),
        "{stamped}"
    );
    assert_eq!(
        daemon.docker(&["logs", "--since", "1h", "--until", "1h", "logs"]),
        ""
    );
    daemon.docker(&["rm", "logs"]);
}

fn exec_has_streams_exit_codes_and_environment() {
    let Some(daemon) = has_busybox("exec") else {
        return;
    };
    daemon.docker(&["run", "-d", "--name", "exec", "busybox", "sleep", "1000"]);
    assert_eq!(
        daemon.docker(&[
            "exec",
            "-e",
            "A=b",
            "-w",
            "/tmp",
            "exec",
            "sh",
            "-c",
            "echo $A $PWD"
        ]),
        "b /tmp"
    );
    let output = daemon.docker_with(&["exec", "-i", "exec", "sh", "-c", "cat; exit 3"], b"typed");
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(3), &b"typed"[..])
    );
    let output = daemon.try_docker(&["exec", "exec", "no-such-program"]);
    assert_eq!(output.status.code(), Some(127), "{output:?}");
    // A folder that is not there is not made for an exec, as it is for the container's own process.
    let output = daemon.try_docker(&["exec", "-w", "/nowhere", "exec", "pwd"]);
    assert_eq!(output.status.code(), Some(126), "{output:?}");
    assert_eq!(daemon.docker(&["diff", "exec"]), "");
    daemon.docker(&["exec", "-d", "exec", "touch", "/tmp/detached"]);
    eventually("a detached exec runs", || {
        daemon
            .try_docker(&["exec", "exec", "test", "-e", "/tmp/detached"])
            .status
            .success()
    });
    assert_eq!(
        daemon.docker(&[
            "exec",
            "-t",
            "exec",
            "sh",
            "-c",
            "test -t 1 && echo terminal"
        ]),
        "terminal"
    );
    daemon.docker(&["kill", "exec"]);
    assert!(
        daemon
            .docker_fails(&["exec", "exec", "true"])
            .contains("is not running")
    );
    daemon.docker(&["rm", "exec"]);
}

fn attach_joins_a_running_container() {
    let Some(daemon) = has_busybox("attach") else {
        return;
    };
    daemon.docker(&[
        "run",
        "-d",
        "-i",
        "--name",
        "attach",
        "busybox",
        "sh",
        "-c",
        "read line; echo got $line; exit 5",
    ]);
    let output = daemon.docker_with(&["attach", "attach"], b"words\n");
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(5), &b"got words\n"[..])
    );
    daemon.docker(&["rm", "attach"]);
}

fn a_hijack_without_upgrade_is_served_raw() {
    let Some(daemon) = has_busybox("hijack") else {
        return;
    };
    let id = daemon.docker(&["create", "-i", "--name", "hijack", "busybox", "cat"]);
    let mut stream = UnixStream::connect(daemon.socket()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    write!(
        stream,
        "POST /v1.41/containers/{id}/attach?stream=1&stdin=1&stdout=1 HTTP/1.1\r\nHost: d\r\n\r\n"
    )
    .unwrap();
    let mut head = vec![0; 1024];
    let count = stream.read(&mut head).unwrap();
    let head = String::from_utf8_lossy(&head[..count]).into_owned();
    assert!(
        head.starts_with("HTTP/1.1 200 OK\r\n") && head.ends_with("\r\n\r\n"),
        "{head}"
    );
    assert!(!head.to_lowercase().contains("transfer-encoding"), "{head}");
    daemon.docker(&["start", "hijack"]);
    stream.write_all(b"raw").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"\x01\0\0\0\0\0\0\x03raw");
    daemon.docker(&["rm", "-f", "hijack"]);
}

fn files_are_copied_in_and_out() {
    let Some(daemon) = has_busybox("cp") else {
        return;
    };
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("file"), "content").unwrap();
    std::fs::create_dir(home.path().join("folder")).unwrap();
    std::fs::write(home.path().join("folder/inner"), "inside").unwrap();
    let path = |name: &str| home.path().join(name).display().to_string();
    daemon.docker(&["run", "-d", "--name", "cp", "busybox", "sleep", "1000"]);
    daemon.docker(&["cp", &path("file"), "cp:/tmp/renamed"]);
    daemon.docker(&["cp", &path("folder"), "cp:/tmp/"]);
    assert_eq!(
        daemon.docker(&["exec", "cp", "cat", "/tmp/renamed", "/tmp/folder/inner"]),
        "contentinside"
    );
    daemon.docker(&["cp", "cp:/tmp/folder", &path("back")]);
    assert_eq!(
        std::fs::read_to_string(home.path().join("back/inner")).unwrap(),
        "inside"
    );
    assert!(
        daemon
            .docker_fails(&["cp", "cp:/nothing", &path("x")])
            .contains("Could not find the file /nothing")
    );
    daemon.docker(&["kill", "cp"]);
    // From a stopped one too.
    daemon.docker(&["cp", "cp:/tmp/renamed", &path("again")]);
    assert_eq!(
        std::fs::read_to_string(home.path().join("again")).unwrap(),
        "content"
    );
    daemon.docker(&["rm", "-f", "cp"]);
}

fn diff_commit_and_export_show_what_was_written() {
    let Some(daemon) = has_busybox("commit") else {
        return;
    };
    daemon.docker(&[
        "run",
        "--name",
        "commit",
        "busybox",
        "sh",
        "-c",
        "echo new > /tmp/new; rm /etc/group",
    ]);
    let diff = daemon.docker(&["diff", "commit"]);
    for line in ["A /tmp/new", "C /etc", "D /etc/group"] {
        assert!(diff.lines().any(|l| l == line), "{diff}");
    }
    let id = daemon.docker(&[
        "commit",
        "-m",
        "words",
        "-a",
        "me",
        "-c",
        "CMD [\"cat\", \"/tmp/new\"]",
        "commit",
        "committed:one",
    ]);
    assert!(id.starts_with("sha256:"), "{id}");
    assert_eq!(daemon.docker(&["run", "--rm", "committed:one"]), "new");
    let export = daemon.try_docker(&["export", "commit"]);
    let names: Vec<String> = tar::Archive::new(&export.stdout[..])
        .entries()
        .unwrap()
        .map(|entry| String::from_utf8_lossy(&entry.unwrap().path_bytes()).into_owned())
        .collect();
    assert!(
        names.iter().any(|name| name.ends_with("tmp/new"))
            && !names.iter().any(|name| name.ends_with("etc/group"))
    );
    daemon.docker(&["rm", "commit"]);
    daemon.docker(&["rmi", "committed:one"]);
}

fn volumes_and_binds_outlive_their_container() {
    let Some(daemon) = has_busybox("volumes") else {
        return;
    };
    let home = tempfile::tempdir().unwrap();
    let bind = format!("{}:/bind", home.path().display());
    daemon.docker(&[
        "run",
        "--rm",
        "-v",
        "run-vol:/data",
        "-v",
        &bind,
        "--tmpfs",
        "/scratch",
        "busybox",
        "sh",
        "-c",
        "echo kept > /data/file; echo bound > /bind/file; echo x > /scratch/x",
    ]);
    assert_eq!(
        std::fs::read_to_string(home.path().join("file")).unwrap(),
        "bound\n"
    );
    assert_eq!(
        daemon.docker(&[
            "run",
            "--rm",
            "--mount",
            "type=volume,src=run-vol,dst=/data,readonly",
            "busybox",
            "cat",
            "/data/file"
        ]),
        "kept"
    );
    let output = daemon.try_docker(&[
        "run",
        "--rm",
        "-v",
        "run-vol:/data:ro",
        "busybox",
        "touch",
        "/data/no",
    ]);
    assert!(!output.status.success());
    daemon.docker(&[
        "create",
        "--name",
        "vol-user",
        "-v",
        "run-vol:/data",
        "-v",
        "/anonymous",
        "busybox",
        "sh",
    ]);
    assert!(
        daemon
            .docker_fails(&["volume", "rm", "run-vol"])
            .contains("volume is in use")
    );
    let anonymous = daemon.docker(&[
        "inspect",
        "-f",
        "{{range .Mounts}}{{if eq .Destination \"/anonymous\"}}{{.Name}}{{end}}{{end}}",
        "vol-user",
    ]);
    assert_eq!(anonymous.len(), 64);
    daemon.docker(&["rm", "-v", "vol-user"]);
    assert!(!daemon.docker(&["volume", "ls", "-q"]).contains(&anonymous));
    daemon.docker(&["volume", "rm", "run-vol"]);
}

fn ports_are_published() {
    let Some(daemon) = has_busybox("ports") else {
        return;
    };
    daemon.docker(&[
        "run",
        "-d",
        "--name",
        "ports",
        "-p",
        "127.0.0.1::8000",
        "busybox",
        "sh",
        "-c",
        "while true; do echo served | nc -l -p 8000; done",
    ]);
    let port = daemon.docker(&["port", "ports", "8000/tcp"]);
    assert!(port.starts_with("127.0.0.1:"), "{port}");
    eventually("the port answers", || {
        let Ok(mut stream) = std::net::TcpStream::connect(&port) else {
            return false;
        };
        let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
        let mut text = String::new();
        stream.read_to_string(&mut text).is_ok() && text == "served\n"
    });
    daemon.docker(&["rm", "-f", "ports"]);
}

fn containers_of_a_network_find_each_other() {
    let Some(daemon) = has_busybox("networks") else {
        return;
    };
    daemon.docker(&["network", "create", "find-net"]);
    daemon.docker(&[
        "run",
        "-d",
        "--name",
        "find-one",
        "--network",
        "find-net",
        "--network-alias",
        "alias",
        "busybox",
        "sleep",
        "1000",
    ]);
    let ping = |name: &str| {
        daemon.try_docker(&[
            "run",
            "--rm",
            "--network",
            "find-net",
            "busybox",
            "ping",
            "-c",
            "1",
            "-w",
            "5",
            name,
        ])
    };
    for name in ["find-one", "alias"] {
        let output = ping(name);
        assert!(output.status.success(), "{name}: {output:?}");
    }
    let shown = daemon.docker(&[
        "network",
        "inspect",
        "-f",
        "{{range .Containers}}{{.Name}}{{end}}",
        "find-net",
    ]);
    assert_eq!(shown, "find-one");
    assert!(
        daemon
            .docker_fails(&["network", "rm", "find-net"])
            .contains("has active endpoints")
    );
    daemon.docker(&["network", "disconnect", "find-net", "find-one"]);
    daemon.docker(&[
        "network", "connect", "--alias", "again", "find-net", "find-one",
    ]);
    assert!(ping("again").status.success());
    daemon.docker(&["rm", "-f", "find-one"]);
    daemon.docker(&["network", "rm", "find-net"]);
}

fn stats_and_top_show_processes() {
    let Some(daemon) = has_busybox("stats") else {
        return;
    };
    daemon.docker(&["run", "-d", "--name", "stats", "busybox", "sleep", "1000"]);
    let top = daemon.docker(&["top", "stats"]);
    assert!(
        top.starts_with("UID") && top.contains("sleep 1000"),
        "{top}"
    );
    let stats = daemon.docker(&[
        "stats",
        "--no-stream",
        "--format",
        "{{.Name}} {{.PIDs}} {{.MemUsage}}",
        "stats",
    ]);
    assert!(stats.starts_with("stats 1 "), "{stats}");
    daemon.docker(&["rm", "-f", "stats"]);
}

fn events_tell_a_containers_life() {
    let Some(daemon) = has_busybox("events") else {
        return;
    };
    let mut command = daemon.command(&[
        "events",
        "--filter",
        "container=eventful",
        "--format",
        "{{.Action}}",
    ]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    daemon.docker(&["run", "--name", "eventful", "busybox", "true"]);
    daemon.docker(&["rm", "eventful"]);
    std::thread::sleep(Duration::from_millis(500));
    child.kill().unwrap();
    let _ = child.wait();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs_f64();
    let (_, past) = daemon.get(&format!(
        "/events?since={}&until={now}&filters=%7B%22container%22%3A%5B%22eventful%22%5D%7D",
        now - 60.0
    ));
    let mut at = 0;
    for action in ["create", "attach", "start", "die", "destroy"] {
        let found = past[at..].find(&format!("\"Action\":\"{action}\""));
        at += found.unwrap_or_else(|| panic!("no {action} in {past}"));
    }
}

fn a_health_check_is_run() {
    let Some(daemon) = has_busybox("health") else {
        return;
    };
    daemon.docker(&[
        "run",
        "-d",
        "--name",
        "health",
        "--health-cmd",
        "test -e /tmp/well",
        "--health-interval",
        "200ms",
        "--health-retries",
        "1",
        "busybox",
        "sleep",
        "1000",
    ]);
    let health = || daemon.docker(&["inspect", "-f", "{{.State.Health.Status}}", "health"]);
    eventually("it is unhealthy", || health() == "unhealthy");
    daemon.docker(&["exec", "health", "touch", "/tmp/well"]);
    eventually("it is healthy", || health() == "healthy");
    daemon.docker(&["rm", "-f", "health"]);
}

fn images_in_use_are_kept() {
    let Some(daemon) = has_busybox("rmi") else {
        return;
    };
    daemon.docker(&["tag", "busybox", "used-image"]);
    daemon.docker(&["create", "--name", "image-user", "used-image", "sh"]);
    daemon.docker(&["rmi", "used-image"]);
    let id = daemon.docker(&["inspect", "-f", "{{.Image}}", "image-user"]);
    assert!(
        daemon
            .docker_fails(&["rmi", &id])
            .contains("image is being used by")
    );
    daemon.docker(&["rm", "image-user"]);
}

fn info_version_and_df_count_what_is_there() {
    let Some(daemon) = has_busybox("info") else {
        return;
    };
    daemon.docker(&["create", "--name", "counted", "busybox", "sh"]);
    let info = daemon.docker(&[
        "info",
        "-f",
        "{{.OSType}} {{.Driver}} {{.NCPU}} {{.Swarm.LocalNodeState}}",
    ]);
    assert!(
        info.starts_with("linux overlay2 ") && info.ends_with(" inactive"),
        "{info}"
    );
    let count: u32 = daemon
        .docker(&["info", "-f", "{{.Containers}}"])
        .parse()
        .unwrap();
    assert!(count >= 1);
    assert_eq!(
        daemon.docker(&[
            "version",
            "-f",
            "{{.Server.APIVersion}} {{.Server.MinAPIVersion}}"
        ]),
        "1.50 1.24"
    );
    let df = daemon.docker(&["system", "df", "--format", "{{.Type}} {{.TotalCount}}"]);
    assert!(
        df.contains("Images ") && df.contains("Containers ") && df.contains("Local Volumes "),
        "{df}"
    );
    daemon.docker(&["system", "df", "-v"]);
    daemon.docker(&["rm", "counted"]);
}

fn wait_answers_its_headers_at_once() {
    let Some(daemon) = has_busybox("wait") else {
        return;
    };
    let id = daemon.docker(&[
        "create", "--name", "waited", "busybox", "sh", "-c", "exit 9",
    ]);
    let mut stream = UnixStream::connect(daemon.socket()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    write!(stream, "POST /v1.41/containers/{id}/wait?condition=next-exit HTTP/1.1\r\nHost: d\r\nConnection: close\r\nContent-Length: 0\r\n\r\n").unwrap();
    let mut head = [0; 64];
    stream.read_exact(&mut head[..15]).unwrap();
    assert_eq!(&head[..15], b"HTTP/1.1 200 OK");
    daemon.docker(&["start", "waited"]);
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("{\"StatusCode\":9}"), "{rest}");
    daemon.docker(&["rm", "waited"]);
}

fn prune_removes_what_has_stopped() {
    let Some(daemon) = has_busybox("prune") else {
        return;
    };
    let id = daemon.docker(&["run", "-d", "--label", "prune=me", "busybox", "true"]);
    daemon.docker(&["wait", &id]);
    let pruned = daemon.docker(&["container", "prune", "-f", "--filter", "label=prune=me"]);
    assert!(pruned.contains(&id), "{pruned}");
}
