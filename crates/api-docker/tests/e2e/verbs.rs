//! Options of `docker run` and its siblings that are easily forgotten.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

use crate::daemon::{eventually, has_busybox};

crate::tests! {
    links_give_names_addresses_and_variables,
    a_link_follows_its_container_to_a_new_address,
    an_image_for_another_platform_is_not_run,
    what_a_new_container_names_must_be_there_and_is_not_pulled_for,
    shared_memory_is_joined_and_bounded,
    the_hosts_ipc_namespace_can_be_used,
    a_kill_for_want_of_memory_is_told_while_the_container_runs,
    an_archive_copy_belongs_to_the_containers_user,
    the_primary_group_is_a_group_too,
    a_burst_of_output_is_rotated,
    logs_are_chosen_by_time_and_number,
    a_websocket_carries_input_and_output,
    misspelt_fields_are_refused_by_name,
    an_upload_that_is_refused_early_hears_why,
    processes_see_what_they_are_given,
    terminals_take_a_new_size,
}

fn links_give_names_addresses_and_variables() {
    let Some(daemon) = has_busybox("links") else {
        return;
    };
    daemon.docker(&[
        "run", "-d", "--name", "link-db", "--expose", "5432", "-e", "SECRET=x", "busybox", "sleep",
        "1000",
    ]);
    let address = daemon.docker(&["inspect", "-f", "{{.NetworkSettings.IPAddress}}", "link-db"]);
    daemon.docker(&[
        "run",
        "-d",
        "--name",
        "link-web",
        "--link",
        "link-db:data",
        "busybox",
        "sleep",
        "1000",
    ]);
    let hosts = daemon.docker(&["exec", "link-web", "cat", "/etc/hosts"]);
    for name in ["data", "link-db"] {
        assert!(hosts.contains(&format!("{address}\t{name}")), "{hosts}");
    }
    let env = daemon.docker(&["exec", "link-web", "env"]);
    for line in [
        format!("DATA_PORT=tcp://{address}:5432"),
        format!("DATA_PORT_5432_TCP_ADDR={address}"),
        "DATA_NAME=/link-web/data".to_owned(),
        "DATA_ENV_SECRET=x".to_owned(),
    ] {
        assert!(env.lines().any(|l| l == line), "{line} is not in {env}");
    }
    daemon.docker(&["exec", "link-web", "ping", "-c", "1", "-w", "5", "data"]);
    assert_eq!(
        daemon.docker(&["inspect", "-f", "{{json .HostConfig.Links}}", "link-web"]),
        "[\"/link-db:/link-web/data\"]"
    );
    let (_, body) = daemon.get("/containers/json?filters=%7B%22name%22%3A%5B%22link-db%22%5D%7D");
    assert!(body.contains("\"/link-web/data\""), "{body}");
    daemon.docker(&["rm", "--link", "/link-web/data"]);
    assert_eq!(
        daemon.docker(&["inspect", "-f", "{{json .HostConfig.Links}}", "link-web"]),
        "null"
    );
    daemon.docker(&["rm", "-f", "link-web", "link-db"]);
}

fn a_link_follows_its_container_to_a_new_address() {
    let Some(daemon) = has_busybox("link-moves") else {
        return;
    };
    daemon.docker(&["run", "-d", "--name", "moving", "busybox", "sleep", "1000"]);
    daemon.docker(&[
        "run",
        "-d",
        "--name",
        "follower",
        "--link",
        "moving:there",
        "busybox",
        "sleep",
        "1000",
    ]);
    let address = || daemon.docker(&["inspect", "-f", "{{.NetworkSettings.IPAddress}}", "moving"]);
    let first = address();
    daemon.docker(&["stop", "-t", "0", "moving"]);
    assert!(
        daemon
            .docker_fails(&["run", "--rm", "--link", "moving:gone", "busybox", "true"])
            .contains("Cannot link to a non running container: /moving AS")
    );
    // Somebody else takes the address meanwhile.
    daemon.docker(&[
        "run", "-d", "--name", "squatter", "--ip", &first, "busybox", "sleep", "1000",
    ]);
    daemon.docker(&["start", "moving"]);
    let second = address();
    assert_ne!(first, second);
    eventually("the follower knows the new address", || {
        daemon
            .docker(&["exec", "follower", "cat", "/etc/hosts"])
            .contains(&format!("{second}\tthere"))
    });
    // On a network of one's own, a link is a name for one container alone.
    daemon.docker(&["network", "create", "link-net"]);
    daemon.docker(&[
        "run",
        "-d",
        "--name",
        "link-far",
        "--network",
        "link-net",
        "busybox",
        "sleep",
        "1000",
    ]);
    daemon.docker(&[
        "run",
        "--rm",
        "--network",
        "link-net",
        "--link",
        "link-far:near",
        "busybox",
        "ping",
        "-c",
        "1",
        "-w",
        "5",
        "near",
    ]);
    daemon.docker(&["rm", "-f", "moving", "follower", "squatter", "link-far"]);
    daemon.docker(&["network", "rm", "link-net"]);
}

fn an_image_for_another_platform_is_not_run() {
    let Some(daemon) = has_busybox("platform") else {
        return;
    };
    let error = daemon.docker_fails(&[
        "create",
        "--pull",
        "never",
        "--platform",
        "linux/s390x",
        "busybox",
        "true",
    ]);
    assert!(
        error.contains("does not match the specified platform"),
        "{error}"
    );
    let own = daemon.docker(&[
        "image",
        "inspect",
        "-f",
        "{{.Os}}/{{.Architecture}}",
        "busybox",
    ]);
    daemon.docker(&["run", "--rm", "--platform", &own, "busybox", "true"]);
    if std::path::Path::new("/proc/sys/fs/binfmt_misc/register").exists() {
        eprintln!("SKIPPED: platform: this kernel may run programs of other processors");
        return;
    }
    // An image for another processor, with a program of its: warned of, and its end says why.
    let foreign = match own.as_str() {
        "linux/arm64" => "linux/amd64",
        _ => "linux/arm64",
    };
    let mut program = b"\x7fELF\x02\x01\x01".to_vec();
    program.resize(16, 0);
    // A program (ET_EXEC) for EM_X86_64 or EM_AARCH64, and nothing more (elf(5)).
    let machine = if foreign == "linux/amd64" { 62 } else { 183 };
    program.extend([2, 0, machine, 0, 1, 0, 0, 0]);
    program.resize(64, 0);
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o755);
    header.set_size(program.len() as u64);
    archive
        .append_data(&mut header, "bin/foreign", &program[..])
        .unwrap();
    let archive = archive.into_inner().unwrap();
    let import = ["import", "--platform", foreign, "-", "foreign"];
    assert!(daemon.docker_with(&import, &archive).status.success());
    for asked in [&[][..], &["--platform", foreign]] {
        let mut args = vec!["run", "--rm"];
        args.extend(asked);
        args.extend(["foreign", "/bin/foreign"]);
        let said = daemon.docker_fails(&args);
        assert!(
            said.contains(&format!(
                "the image is for {foreign}, and this host runs {own}"
            )),
            "{said}"
        );
        assert_eq!(
            said.contains("does not match the detected host platform"),
            asked.is_empty(),
            "{said}"
        );
    }
    daemon.docker(&["rmi", "foreign"]);
}

fn what_a_new_container_names_must_be_there_and_is_not_pulled_for() {
    let Some(daemon) = has_busybox("names") else {
        return;
    };
    for options in [
        ["--network", "nowhere"],
        ["--network", "container:nobody"],
        ["--ipc", "container:nobody"],
        ["--pid", "container:nobody"],
        ["--volumes-from", "nobody"],
        ["--link", "nobody"],
    ] {
        let error =
            daemon.docker_fails(&["run", "--rm", options[0], options[1], "busybox", "true"]);
        assert!(
            !error.contains("Unable to find image"),
            "{options:?}: {error}"
        );
        assert!(
            error.contains("nowhere") || error.contains("nobody"),
            "{error}"
        );
    }
}

fn shared_memory_is_joined_and_bounded() {
    let Some(daemon) = has_busybox("shm") else {
        return;
    };
    daemon.docker(&[
        "run",
        "-d",
        "--name",
        "shm-donor",
        "--ipc",
        "shareable",
        "--shm-size",
        "4m",
        "busybox",
        "sh",
        "-c",
        "dd if=/dev/zero of=/dev/shm/big bs=1M count=16 2>/dev/null; rm /dev/shm/big; echo words > /dev/shm/words; sleep 1000",
    ]);
    eventually("the donor has written", || {
        daemon.docker(&["exec", "shm-donor", "ls", "/dev/shm"]) == "words"
    });
    let seen = daemon.docker(&[
        "run",
        "--rm",
        "--ipc",
        "container:shm-donor",
        "busybox",
        "sh",
        "-c",
        "cat /dev/shm/words; df -k /dev/shm | tail -1; echo back > /dev/shm/back; readlink /proc/self/ns/ipc",
    ]);
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!(lines[0], "words");
    assert_eq!(
        lines[1].split_whitespace().nth(1),
        Some("4096"),
        "not bounded: {seen}"
    );
    assert_eq!(
        daemon.docker(&["exec", "shm-donor", "cat", "/dev/shm/back"]),
        "back"
    );
    assert_eq!(
        daemon.docker(&["exec", "shm-donor", "readlink", "/proc/self/ns/ipc"]),
        lines[2]
    );
    daemon.docker(&["rm", "-f", "shm-donor"]);
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&daemon.home.path().display().to_string()));
}

fn the_hosts_ipc_namespace_can_be_used() {
    let Some(daemon) = has_busybox("ipc") else {
        return;
    };
    let own = std::fs::read_link("/proc/self/ns/ipc").unwrap();
    assert_eq!(
        daemon.docker(&[
            "run",
            "--rm",
            "--ipc",
            "host",
            "busybox",
            "readlink",
            "/proc/self/ns/ipc"
        ]),
        own.display().to_string()
    );
}

fn a_kill_for_want_of_memory_is_told_while_the_container_runs() {
    let Some(daemon) = has_busybox("oom") else {
        return;
    };
    let v1 = std::path::Path::new("/sys/fs/cgroup/memory/memory.oom_control").exists();
    let v2 = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")
        .is_ok_and(|text| text.contains("memory"));
    if !v1 && !v2 {
        eprintln!("SKIPPED: oom: this host has no memory controller");
        return;
    }
    daemon.docker(&[
        "run",
        "-d",
        "--name",
        "oom-lives",
        "-m",
        "24m",
        "--memory-swap",
        "24m",
        "busybox",
        "sh",
        "-c",
        "tail /dev/zero; echo survived; sleep 1000",
    ]);
    eventually("the shell outlives its child", || {
        daemon.docker(&["logs", "oom-lives"]).contains("survived")
    });
    let told = || {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs_f64();
        let (_, past) = daemon.get(&format!(
            "/events?since=0.1&until={now}&filters=%7B%22container%22%3A%5B%22oom-lives%22%5D%2C%22event%22%3A%5B%22oom%22%5D%7D"
        ));
        past.contains("\"Action\":\"oom\"")
    };
    eventually("the event is there", told);
    assert_eq!(
        daemon.docker(&[
            "inspect",
            "-f",
            "{{.State.Running}} {{.State.OOMKilled}}",
            "oom-lives"
        ]),
        "true true"
    );
    daemon.docker(&["rm", "-f", "oom-lives"]);
}

fn an_archive_copy_belongs_to_the_containers_user() {
    let Some(daemon) = has_busybox("cp-a") else {
        return;
    };
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("file");
    std::fs::write(&file, "content").unwrap();
    std::os::unix::fs::chown(&file, Some(1234), Some(4321)).unwrap();
    let file = file.display().to_string();
    daemon.docker(&[
        "run", "-d", "--name", "cp-a", "--user", "user", "busybox", "sleep", "1000",
    ]);
    daemon.docker(&["cp", &file, "cp-a:/tmp/plain"]);
    daemon.docker(&["cp", "-a", &file, "cp-a:/tmp/archive"]);
    let owner = |path: &str| daemon.docker(&["exec", "cp-a", "stat", "-c", "%u:%g", path]);
    assert_eq!(owner("/tmp/plain"), "1234:4321");
    assert_eq!(owner("/tmp/archive"), "1000:1000");
    // A link: followed with -L, else copied as one. And tar streams both ways.
    daemon.docker(&["exec", "cp-a", "ln", "-s", "/tmp/plain", "/tmp/link"]);
    let out = |name: &str| home.path().join(name).display().to_string();
    daemon.docker(&["cp", "-L", "cp-a:/tmp/link", &out("followed")]);
    assert_eq!(
        std::fs::read_to_string(home.path().join("followed")).unwrap(),
        "content"
    );
    daemon.docker(&["cp", "cp-a:/tmp/link", &out("link")]);
    assert_eq!(
        std::fs::read_link(home.path().join("link")).unwrap(),
        std::path::Path::new("/tmp/plain")
    );
    let stream = daemon.try_docker(&["cp", "cp-a:/tmp/plain", "-"]);
    assert!(stream.status.success());
    let back = daemon.docker_with(&["cp", "-", "cp-a:/var/tmp"], &stream.stdout);
    assert!(
        !back.status.success(),
        "a folder that is not there was copied into"
    );
    daemon.docker(&["exec", "-u", "0", "cp-a", "mkdir", "-p", "/var/tmp"]);
    let back = daemon.docker_with(&["cp", "-", "cp-a:/var/tmp"], &stream.stdout);
    assert!(back.status.success(), "{back:?}");
    assert_eq!(owner("/var/tmp/plain"), "1234:4321");
    daemon.docker(&["rm", "-f", "cp-a"]);
}

fn the_primary_group_is_a_group_too() {
    let Some(daemon) = has_busybox("groups") else {
        return;
    };
    let id = daemon.docker(&[
        "run",
        "--rm",
        "--user",
        "1000:1000",
        "--group-add",
        "77",
        "busybox",
        "id",
        "-G",
    ]);
    let mut groups: Vec<&str> = id.split_whitespace().collect();
    groups.dedup();
    assert_eq!(groups, ["1000", "77"]);
}

fn a_burst_of_output_is_rotated() {
    let Some(daemon) = has_busybox("rotate") else {
        return;
    };
    daemon.docker(&[
        "run",
        "--name",
        "rotate",
        "--log-opt",
        "max-size=2k",
        "--log-opt",
        "max-file=3",
        "busybox",
        "sh",
        "-c",
        "seq 1 1000",
    ]);
    let path = daemon.docker(&["inspect", "-f", "{{.LogPath}}", "rotate"]);
    for name in [path.clone(), format!("{path}.1"), format!("{path}.2")] {
        let size = std::fs::metadata(&name).unwrap().len();
        assert!(size < 2300, "{name} has {size} bytes");
    }
    assert!(!std::path::Path::new(&format!("{path}.3")).exists());
    let logs = daemon.docker(&["logs", "rotate"]);
    let numbers: Vec<u32> = logs.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(numbers.last(), Some(&1000));
    assert!(
        numbers.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "{logs}"
    );
    daemon.docker(&["rm", "rotate"]);
}

fn logs_are_chosen_by_time_and_number() {
    let Some(daemon) = has_busybox("logs-since") else {
        return;
    };
    daemon.docker(&[
        "run",
        "-d",
        "--name",
        "logs-since",
        "busybox",
        "sh",
        "-c",
        "echo early; sleep 2; echo late; echo wrong >&2; sleep 1000",
    ]);
    eventually("all is said", || {
        let output = daemon.try_docker(&["logs", "logs-since"]);
        output.stderr == b"wrong\n" && output.stdout == b"early\nlate\n"
    });
    let stamped = daemon.docker(&["logs", "--timestamps", "--tail", "2", "logs-since"]);
    let (time, word) = stamped.lines().next().unwrap().split_once(' ').unwrap();
    assert_eq!(word, "late");
    assert_eq!(
        daemon.docker(&["logs", "--since", time, "logs-since"]),
        "late"
    );
    assert_eq!(
        daemon
            .docker(&["logs", "--until", time, "logs-since"])
            .lines()
            .next(),
        Some("early")
    );
    assert_eq!(
        daemon.docker(&["logs", "--since", "1h", "--tail", "0", "logs-since"]),
        ""
    );
    let mut follow = daemon
        .command(&["logs", "-f", "--tail", "1", "logs-since"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(300));
    daemon.docker(&["kill", "logs-since"]);
    assert!(
        follow.wait().unwrap().success(),
        "following ends with the container"
    );
    daemon.docker(&["rm", "logs-since"]);
}

/// One unmasked frame of a server (RFC 6455, section 5.2).
fn read_frame(stream: &mut UnixStream) -> Option<(u8, Vec<u8>)> {
    let mut head = [0u8; 2];
    stream.read_exact(&mut head).ok()?;
    let length = match head[1] & 0x7f {
        126 => {
            let mut bytes = [0u8; 2];
            stream.read_exact(&mut bytes).ok()?;
            usize::from(u16::from_be_bytes(bytes))
        }
        127 => return None,
        short => usize::from(short),
    };
    let mut payload = vec![0u8; length];
    stream.read_exact(&mut payload).ok()?;
    Some((head[0] & 0x0f, payload))
}

fn a_websocket_carries_input_and_output() {
    let Some(daemon) = has_busybox("websocket") else {
        return;
    };
    daemon.docker(&[
        "run",
        "-d",
        "-i",
        "--name",
        "websocket",
        "busybox",
        "sh",
        "-c",
        "read line; echo got $line; echo wrong >&2",
    ]);
    let mut stream = UnixStream::connect(daemon.socket()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    write!(
        stream,
        "GET /v1.41/containers/websocket/attach/ws?stream=1&stdin=1&stdout=1&stderr=1 HTTP/1.1\r\nHost: d\r\n\
         Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    .unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0u8; 1];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    assert!(
        head.to_lowercase()
            .contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo="),
        "{head}"
    );
    // A masked text frame; the mask is all zeros.
    stream.write_all(b"\x81\x86\0\0\0\0words\n").unwrap();
    let mut said = Vec::new();
    while let Some((kind, payload)) = read_frame(&mut stream) {
        match kind {
            2 => said.extend(payload),
            8 => break,
            _ => {}
        }
    }
    let said = String::from_utf8(said).unwrap();
    assert!(
        said.contains("got words\n") && said.contains("wrong\n"),
        "{said:?}"
    );
    daemon.docker(&["rm", "-f", "websocket"]);
    let (head, body) = daemon.get("/containers/websocket/attach/ws");
    assert!(head.starts_with("HTTP/1.1 4"), "{head}");
    assert!(body.contains("WebSocket"), "{body}");
}

fn misspelt_fields_are_refused_by_name() {
    let Some(daemon) = has_busybox("fields") else {
        return;
    };
    for (path, body, field) in [
        (
            "/containers/create",
            r#"{"Image":"busybox","Cmd":["true"],"HostConfig":{"Memroy":67108864}}"#,
            "HostConfig.Memroy",
        ),
        ("/volumes/create", r#"{"Nmae":"x"}"#, "Nmae"),
        (
            "/networks/create",
            r#"{"Name":"x","Subnets":["y"]}"#,
            "Subnets",
        ),
        ("/containers/nobody/update", r#"{"Memroy":1}"#, "Memroy"),
        (
            "/containers/nobody/exec",
            r#"{"Cmd":["a"],"Comand":["b"]}"#,
            "Comand",
        ),
    ] {
        let (head, answer) = daemon.post(path, body);
        assert!(head.starts_with("HTTP/1.1 400"), "{path}: {head} {answer}");
        assert!(
            answer.contains("unknown field") && answer.contains(field),
            "{path}: {answer}"
        );
    }
}

fn an_upload_that_is_refused_early_hears_why() {
    let Some(daemon) = has_busybox("upload") else {
        return;
    };
    let garbage = vec![b'x'; 32 << 20];
    for (method, path, part) in [
        ("POST", "/images/load", "not a tar"),
        ("POST", "/build?remote=client-session", "DOCKER_BUILDKIT=0"),
        (
            "PUT",
            "/containers/nobody/archive?path=/",
            "No such container",
        ),
        ("POST", "/images/create?fromSrc=-&repo=UPPER", "lowercase"),
    ] {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: d\r\nConnection: close\r\nContent-Type: application/x-tar\r\nContent-Length: {}\r\n\r\n",
            garbage.len()
        )
        .unwrap();
        // The whole of it: a client that does not look at the answer before it has sent everything.
        stream
            .write_all(&garbage)
            .unwrap_or_else(|error| panic!("{path}: the connection broke: {error}"));
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 4") || answer.starts_with("HTTP/1.1 5"),
            "{path}: {answer}"
        );
        assert!(answer.contains(part), "{path}: {answer}");
    }
    let loaded = daemon.docker_with(&["load"], &garbage);
    let error = String::from_utf8_lossy(&loaded.stderr);
    assert!(
        !loaded.status.success() && error.contains("not a tar"),
        "{error}"
    );
}

fn processes_see_what_they_are_given() {
    let Some(daemon) = has_busybox("given") else {
        return;
    };
    let run = |options: &[&str], script: &str| {
        let mut args = vec!["run", "--rm"];
        args.extend(options);
        args.extend(["busybox", "sh", "-c", script]);
        daemon.docker(&args)
    };
    assert_eq!(
        run(&["--ulimit", "nofile=100:200"], "ulimit -n; ulimit -Hn"),
        "100\n200"
    );
    assert!(run(&["--device", "/dev/null:/dev/other:r"], "ls -l /dev/other").contains("1,"));
    assert!(
        run(
            &["--cap-drop", "ALL", "--cap-add", "NET_ADMIN"],
            "grep CapEff /proc/self/status"
        )
        .ends_with("0000000000001000")
    );
    assert!(
        run(
            &["--security-opt", "no-new-privileges"],
            "grep NoNew /proc/self/status"
        )
        .ends_with('1')
    );
    assert_eq!(
        run(
            &["--read-only", "--tmpfs", "/t:size=1m"],
            "touch /x 2>/dev/null || echo no; touch /t/x; df -k /t | tail -1 | awk '{print $2}'"
        ),
        "no\n1024"
    );
    assert_eq!(
        run(
            &["--sysctl", "net.core.somaxconn=77"],
            "cat /proc/sys/net/core/somaxconn"
        ),
        "77"
    );
    assert_eq!(
        run(&["--oom-score-adj", "300"], "cat /proc/self/oom_score_adj"),
        "300"
    );
    assert_eq!(run(&["--init"], "cat /proc/1/comm"), "docker-init");
    assert_eq!(
        run(&["--hostname", "h", "--domainname", "d.x"], "hostname -f"),
        "h.d.x"
    );
    assert!(run(&["--add-host", "foo:1.2.3.4"], "cat /etc/hosts").contains("1.2.3.4\tfoo"));
    assert_eq!(
        run(
            &["--mount", "type=tmpfs,dst=/t,tmpfs-size=1m,tmpfs-mode=0700"],
            "stat -c %a /t"
        ),
        "700"
    );
    // A working directory that has to be made, where only the runtime sees it.
    assert_eq!(
        run(
            &["-v", "made-vol:/m", "-w", "/m/x/y"],
            "stat -c %a /m/x /m/x/y"
        ),
        "755\n755"
    );
    daemon.docker(&["volume", "rm", "made-vol"]);
    // What lies at /etc/passwd may be anything.
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    let bind = format!("{}:/etc/passwd", pipe.display());
    assert_eq!(run(&["-v", &bind, "-e", "HOME="], "echo $HOME"), "/");
    let both = ["--tmpfs", "/a", "--mount", "type=tmpfs,dst=/b"];
    daemon.docker(
        &[
            &["create", "--name", "tmp"],
            &both[..],
            &["busybox", "true"],
        ]
        .concat(),
    );
    let template = "{{range .Mounts}}{{.Destination}} {{end}}{{json .HostConfig.Tmpfs}}";
    let listed = daemon.docker(&["inspect", "-f", template, "tmp"]);
    assert_eq!(listed.trim(), r#"/b {"/a":""}"#);
    daemon.docker(&["rm", "tmp"]);
    daemon.docker(&[
        "run",
        "--rm",
        "-v",
        "sub-vol:/v",
        "busybox",
        "mkdir",
        "/v/below",
    ]);
    run(
        &[
            "--mount",
            "type=volume,src=sub-vol,dst=/v,volume-subpath=below",
        ],
        "echo x > /v/file",
    );
    assert_eq!(run(&["-v", "sub-vol:/v:ro"], "cat /v/below/file"), "x");
    daemon.docker(&["volume", "rm", "sub-vol"]);
    daemon.docker(&[
        "volume",
        "create",
        "--opt",
        "type=tmpfs",
        "--opt",
        "device=tmpfs",
        "--opt",
        "o=size=1m",
        "tmpfs-vol",
    ]);
    assert!(run(&["-v", "tmpfs-vol:/v"], "df -k /v").contains(" 1024 "));
    daemon.docker(&["volume", "rm", "tmpfs-vol"]);
}

fn terminals_take_a_new_size() {
    let Some(daemon) = has_busybox("resize") else {
        return;
    };
    daemon.docker(&["run", "-d", "-i", "-t", "--name", "resize", "busybox", "sh"]);
    let (head, body) = daemon.post("/containers/resize/resize?h=30&w=100", "");
    assert!(head.starts_with("HTTP/1.1 200"), "{head} {body}");
    assert_eq!(
        daemon.docker(&["exec", "resize", "stty", "-F", "/proc/1/fd/0", "size"]),
        "30 100"
    );
    let (head, _) = daemon.post("/containers/resize/resize?h=x&w=100", "");
    assert!(head.starts_with("HTTP/1.1 400"), "{head}");
    let script = r#"{"Tty":true,"AttachStdout":true,"Cmd":["sh","-c","while sleep 0.1; do stty size; done"]}"#;
    let (_, body) = daemon.post("/containers/resize/exec", script);
    let json: serde_json::Value = serde_json::from_str(&body).unwrap();
    let exec = json["Id"].as_str().unwrap().to_owned();
    let mut stream = UnixStream::connect(daemon.socket()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let options = r#"{"Tty":true}"#;
    write!(
        stream,
        "POST /exec/{exec}/start HTTP/1.1\r\nHost: d\r\nUpgrade: tcp\r\nConnection: Upgrade\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{options}",
        options.len()
    )
    .unwrap();
    let mut said = String::new();
    let mut resized = false;
    while !said.contains("33 99") {
        let mut buffer = [0u8; 1024];
        let count = match stream.read(&mut buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            read => read.unwrap(),
        };
        assert!(count > 0, "it ended: {said}");
        said.push_str(&String::from_utf8_lossy(&buffer[..count]));
        assert!(said.len() < 10_000, "it never has the new size: {said}");
        if !resized && said.contains('\n') {
            resized = true;
            daemon.post(&format!("/exec/{exec}/resize?h=33&w=99"), "");
        }
    }
    daemon.docker(&["rm", "-f", "resize"]);
}
