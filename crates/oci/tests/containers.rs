//! End to end: real containers of a busybox, by the command. They need root and a static busybox, and say so.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

mod bundle;
use bundle::{Bundle, in_user_namespace, receive};

#[test]
fn exit_codes_and_output_come_through() {
    let Some(mut b) = Bundle::new() else { return };
    let (code, out, err) = b.shell("echo out; echo err >&2; hostname; exit 7");
    assert_eq!(
        (code, out.as_str(), err.as_str()),
        (7, "out\nberth\n", "err\n")
    );
    b.nothing_is_left();
}

#[test]
fn a_container_goes_through_its_whole_life() {
    let Some(mut b) = Bundle::new() else { return };
    b.args(&["sleep", "100"]);
    let id = b.id.clone();
    let pid_file = b.path("pid");
    b.ok(&["create", "--pid-file", pid_file.to_str().unwrap(), &id]);
    let state: Value = serde_json::from_str(&b.ok(&["state", &id])).unwrap();
    assert_eq!(state["status"], "created");
    assert_eq!(
        state["pid"].to_string(),
        fs::read_to_string(&pid_file).unwrap()
    );
    assert!(
        !b.run(&["create", &id]).status.success(),
        "an id is used once"
    );
    b.ok(&["start", &id]);
    assert!(
        !b.run(&["start", &id]).status.success(),
        "a container is started once"
    );
    assert!(
        b.ok(&["exec", &id, "sh", "-c", "cat /proc/1/cmdline; id -u"])
            .starts_with("sleep\x00100")
    );
    assert_eq!(
        b.run(&["exec", &id, "sh", "-c", "exit 5"]).status.code(),
        Some(5)
    );
    assert_eq!(b.run(&["exec", &id, "no-such"]).status.code(), Some(255));
    assert_eq!(
        b.ok(&[
            "exec",
            "--user",
            "7:8",
            "--env",
            "A=b",
            "--cwd",
            "/bin",
            &id,
            "sh",
            "-c",
            "id -u; id -g; echo $A; pwd"
        ]),
        "7\n8\nb\n/bin\n"
    );
    b.ok(&["pause", &id]);
    assert!(b.ok(&["list"]).contains("paused"));
    assert!(!b.run(&["exec", &id, "true"]).status.success());
    b.ok(&["resume", &id]);
    let pids: Vec<i32> = serde_json::from_str(&b.ok(&["ps", "--format", "json", &id])).unwrap();
    assert_eq!(pids.len(), 1);
    let stats: Value = serde_json::from_str(&b.ok(&["events", "--stats", &id])).unwrap();
    assert_eq!(stats["type"], "stats");
    assert!(
        !b.run(&["delete", &id]).status.success(),
        "a running container is not deleted"
    );
    b.ok(&["kill", &id, "KILL"]);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !b.ok(&["state", &id]).contains("stopped") && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    b.ok(&["delete", &id]);
    assert!(!b.run(&["state", &id]).status.success());
    b.nothing_is_left();
}

#[test]
fn many_short_containers_lose_no_exit_code() {
    let Some(mut b) = Bundle::new() else { return };
    for round in 0..40 {
        b.args(&["sh", "-c", &format!("exit {}", round % 7)]);
        assert_eq!(b.go().0, round % 7);
    }
    b.nothing_is_left();
}

#[test]
fn a_missing_program_is_an_error_and_leaves_nothing() {
    let Some(mut b) = Bundle::new() else { return };
    let log = b.path("log");
    b.args(&["no-such-program"]);
    let id = b.id.clone();
    let output = b.run(&[
        "--log",
        log.to_str().unwrap(),
        "--log-format",
        "json",
        "run",
        &id,
    ]);
    assert_eq!(output.status.code(), Some(1));
    let line: Value = serde_json::from_str(fs::read_to_string(log).unwrap().trim()).unwrap();
    assert_eq!(line["level"], "error");
    assert!(
        line["msg"]
            .as_str()
            .unwrap()
            .contains("executable file not found in $PATH")
    );
    b.nothing_is_left();
}

type Spoil = fn(&mut Value);

#[test]
fn broken_bundles_are_refused_by_name_and_leave_nothing() {
    let Some(b) = Bundle::new() else { return };
    let good = b.config.clone();
    let cases: [(&str, Spoil, &str); 8] = [
        (
            "/process/cwd",
            |c| c["process"]["cwd"] = json!("relative"),
            "cwd",
        ),
        (
            "/root",
            |c| c["root"] = json!({"path": "nowhere"}),
            "nowhere",
        ),
        (
            "/mounts",
            |c| c["mounts"][3]["type"] = json!("nosuchfs"),
            "nosuchfs",
        ),
        (
            "bind",
            |c| {
                c["mounts"] =
                    json!([{"destination": "/x", "type": "bind", "source": "/no/such/source"}])
            },
            "/no/such/source",
        ),
        (
            "sysctl",
            |c| c["linux"]["sysctl"] = json!({"kernel.panic": "1"}),
            "kernel.panic",
        ),
        (
            "cgroup",
            |c| c["linux"]["cgroupsPath"] = json!("/a/../../b"),
            "..",
        ),
        (
            "limit",
            |c| c["linux"]["resources"]["memory"] = json!({"limit": 1000}),
            "memory",
        ),
        (
            "apparmor",
            |c| c["process"]["apparmorProfile"] = json!("no-such-profile"),
            "no-such-profile",
        ),
    ];
    let mut b = b;
    for (name, spoil, word) in cases {
        b.config = good.clone();
        b.args(&["true"]);
        spoil(&mut b.config);
        let (code, _, err) = b.go();
        if name == "limit" && code == 0 {
            continue; // rounded up to a page and enough for `true`
        }
        assert!(
            code == 1 && err.contains(word) || name == "limit",
            "{name}: {code} {err}"
        );
        b.nothing_is_left();
    }
    fs::write(b.path("config.json"), b"{ not json").unwrap();
    b.config = Value::Null;
    let id = b.id.clone();
    assert!(
        String::from_utf8_lossy(&b.run(&["run", &id]).stderr).contains("config.json is not valid")
    );
    b.nothing_is_left();
}

#[test]
fn a_terminal_goes_to_the_console_socket() {
    let Some(mut b) = Bundle::new() else { return };
    b.config["process"]["terminal"] = json!(true);
    b.config["process"]["consoleSize"] = json!({"height": 40, "width": 100});
    b.args(&[
        "sh",
        "-c",
        "tty; stat -c %t:%T /dev/console; read x; echo got $x",
    ]);
    symlink("busybox", b.path("rootfs/bin/stty")).unwrap();
    let socket = b.path("console");
    let listener = UnixListener::bind(&socket).unwrap();
    let id = b.id.clone();
    b.ok(&["create", "--console-socket", socket.to_str().unwrap(), &id]);
    let master = receive(listener);
    let window = rustix::termios::tcgetwinsize(master.as_fd()).unwrap();
    assert_eq!((window.ws_row, window.ws_col), (40, 100));
    b.ok(&["start", &id]);
    let mut master = fs::File::from(master);
    master.write_all(b"hello\n").unwrap();
    let mut said = Vec::new();
    let _ = master.read_to_end(&mut said); // EIO at the end
    let said = String::from_utf8_lossy(&said);
    assert!(
        said.contains("/dev/pts/0") && said.contains("88:0") && said.contains("got hello"),
        "{said}"
    );
}

#[test]
fn hooks_run_in_their_order_with_the_state_on_stdin() {
    let Some(mut b) = Bundle::new() else { return };
    let log = b.path("hooks");
    let hook = |name: &str| {
        let script = format!("s=$(cat); echo \"{name} $s\" >> {}", log.display());
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
    };
    b.config["hooks"] = json!({
        "prestart": hook("prestart"), "createRuntime": hook("createRuntime"), "createContainer": hook("createContainer"),
        "poststart": hook("poststart"), "poststop": hook("poststop"),
        "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "cat > /dev/shm/start"]}],
    });
    let (code, out, err) = b.shell("cat /dev/shm/start");
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("\"status\":\"created\""), "{out}");
    let said = fs::read_to_string(&log).unwrap();
    let names: Vec<&str> = said
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert_eq!(
        names,
        [
            "prestart",
            "createRuntime",
            "createContainer",
            "poststart",
            "poststop"
        ]
    );
    assert!(
        said.lines()
            .take(4)
            .all(|line| line.contains(&b.id) && line.contains("\"pid\":")),
        "{said}"
    );
    b.config["hooks"] = json!({"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", "sleep 60"], "timeout": 1}]});
    let (code, _, err) = b.go();
    assert!(code == 1 && err.contains("within 1 seconds"), "{err}");
    b.nothing_is_left();
}

#[test]
fn seccomp_refuses_what_the_profile_refuses() {
    let Some(mut b) = Bundle::new() else { return };
    b.config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]});
    let (code, _, err) = b.shell("mkdir /dev/shm/x");
    assert!(
        code == 1 && err.contains("Function not implemented"),
        "{err}"
    );
    b.config["process"]["noNewPrivileges"] = json!(false);
    assert!(
        b.shell("mkdir /dev/shm/x")
            .2
            .contains("Function not implemented")
    );
    b.nothing_is_left();
}

#[test]
fn a_seccomp_listener_reaches_its_agent() {
    let Some(mut b) = Bundle::new() else { return };
    let socket = b.path("agent");
    let listener = UnixListener::bind(&socket).unwrap();
    b.config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": socket, "listenerMetadata": "m",
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]});
    b.args(&["true"]);
    let agent = std::thread::spawn(move || drop(receive(listener)));
    assert_eq!(b.go().0, 0);
    agent.join().unwrap();
}

#[test]
fn masked_and_read_only_paths_cannot_be_used() {
    let Some(mut b) = Bundle::new() else { return };
    fs::create_dir(b.path("rootfs/secret")).unwrap();
    fs::write(b.path("rootfs/secret/file"), "x").unwrap();
    fs::write(b.path("rootfs/note"), "secret").unwrap();
    // A link to /proc's own knobs must be masked by what it names inside, never outside.
    symlink("/note", b.path("rootfs/link")).unwrap();
    b.config["root"]["readonly"] = json!(false);
    b.config["linux"]["maskedPaths"] = json!(["/secret", "/link", "/absent"]);
    let (_, out, _) = b.shell("ls /secret | cat; cat /note; echo x > /proc/sys/kernel/domainname || echo refused; stat -c %t:%T /note");
    assert_eq!(out, "refused\n1:3\n");
    b.nothing_is_left();
}

#[test]
fn devices_not_allowed_cannot_be_opened() {
    let Some(mut b) = Bundle::new() else { return };
    b.capabilities(&["CAP_MKNOD"]);
    let (_, out, err) = b.shell("mknod /dev/kmsg2 c 1 11 && echo made; cat /dev/kmsg2 || echo denied; mknod /dev/disk b 254 0 && dd if=/dev/disk bs=512 count=1 || echo denied; cat /dev/null && echo fine");
    assert_eq!(out, "made\ndenied\ndenied\nfine\n", "{err}");
    assert!(err.contains("Operation not permitted"), "{err}");
    b.nothing_is_left();
}

#[test]
fn limits_hold() {
    let Some(mut b) = Bundle::new() else { return };
    if !Path::new("/sys/fs/cgroup/memory").exists()
        && !fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")
            .is_ok_and(|c| c.contains("memory"))
    {
        eprintln!("SKIPPED: the memory controller is needed");
        return;
    }
    b.config["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
    b.config["linux"]["resources"]["pids"] = json!({"limit": 6});
    b.config["linux"]["resources"]["cpu"] =
        json!({"shares": 512, "quota": 50000, "period": 100000});
    let (code, ..) = b.shell("dd if=/dev/zero of=/dev/shm/x bs=1M count=40");
    assert_ne!(code, 0, "40 MB fit into 16");
    let (_, _, err) = b.shell("for i in 1 2 3 4 5 6 7 8 9; do sleep 1 & done");
    assert!(err.contains("fork"), "{err}");
    b.nothing_is_left();
}

#[test]
fn a_user_namespace_maps_ids() {
    let Some(mut b) = Bundle::new() else { return };
    in_user_namespace(&mut b);
    let chown = Command::new("chown")
        .args(["-R", "100000:200000"])
        .arg(b.path("rootfs"))
        .status()
        .unwrap();
    assert!(chown.success());
    // The scratch directory is root's alone: its way in is opened by the runtime.
    let (code, out, err) = b.shell("id -u; id -g; cat /proc/self/uid_map; stat -c %u /bin/busybox; echo x > /dev/null && echo dev");
    assert_eq!(code, 0, "{err}");
    let lines: Vec<String> = out
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    assert_eq!(lines, ["0", "0", "0 100000 65536", "0", "dev"], "{err}");
    b.nothing_is_left();
}

#[test]
fn an_id_mapped_bind_shifts_owners() {
    let Some(mut b) = Bundle::new() else { return };
    fs::create_dir(b.path("data")).unwrap();
    fs::write(b.path("data/file"), "x").unwrap();
    let source = b.path("data");
    let map = json!([{"containerID": 0, "hostID": 5000, "size": 10}]);
    b.config["mounts"].as_array_mut().unwrap().push(
        json!({"destination": "/data", "type": "bind", "source": source, "options": ["bind"], "uidMappings": map, "gidMappings": map}),
    );
    let (code, out, err) = b.shell("stat -c %u:%g /data/file");
    if err.contains("id-mapped mounts") {
        eprintln!(
            "SKIPPED: the file system of {} cannot be id-mapped",
            source.display()
        );
        return;
    }
    assert_eq!((code, out.as_str()), (0, "5000:5000\n"), "{err}");
    b.nothing_is_left();
}

#[test]
fn a_recursively_read_only_bind_is_read_only_below_too() {
    let Some(mut b) = Bundle::new() else { return };
    let source = b.path("tree");
    fs::create_dir(&source).unwrap();
    b.config["mounts"].as_array_mut().unwrap().push(
        json!({"destination": "/sys2", "type": "bind", "source": "/dev", "options": ["rbind", "rro"]}),
    );
    let (_, out, _) = b.shell("mkdir /sys2/x || echo refused; mkdir /sys2/shm/x || echo refused");
    assert!(out.starts_with("refused\n"), "{out}");
    b.nothing_is_left();
}

#[test]
fn checkpoint_says_that_it_is_not_supported() {
    let Some(b) = Bundle::new() else { return };
    let output = b.run(&["checkpoint", "--image-path", "/x", "c"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("not supported"));
}
