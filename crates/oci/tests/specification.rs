//! The runtime specification field by field, where a container can tell whether it was followed. They need root and a
//! static busybox, and say so.

use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

mod bundle;
use bundle::{Bundle, V2_VIEW, in_user_namespace, text, until};

#[test]
fn a_time_namespace_has_its_own_clocks() {
    let Some(mut b) = Bundle::new() else { return };
    if !Path::new("/proc/self/ns/time").exists() {
        eprintln!("SKIPPED: this kernel has no time namespaces");
        return;
    }
    b.config["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "time"}));
    b.config["linux"]["timeOffsets"] = json!({"boottime": {"secs": 5_000_000, "nanosecs": 0}, "monotonic": {"secs": 1000, "nanosecs": 7}});
    let (code, out, err) = b.shell("cat /proc/uptime /proc/self/timens_offsets");
    assert_eq!(code, 0, "{err}");
    let uptime: f64 = out.split_whitespace().next().unwrap().parse().unwrap();
    assert!(uptime > 5_000_000.0, "{out}");
    b.config["linux"]["timeOffsets"] = json!({"realtime": {"secs": 1, "nanosecs": 0}});
    assert!(b.go().2.contains("neither monotonic nor boottime"));
    b.nothing_is_left();
}

#[test]
fn an_id_mapped_bind_in_a_user_namespace_shows_the_containers_own_ids() {
    let Some(mut b) = Bundle::new() else { return };
    in_user_namespace(&mut b);
    let chown = Command::new("chown")
        .args(["-R", "100000:200000"])
        .arg(b.path("rootfs"))
        .status();
    assert!(chown.unwrap().success());
    fs::create_dir_all(b.path("data/below")).unwrap();
    fs::write(b.path("data/below/file"), "x").unwrap();
    let source = b.path("data");
    for options in [json!(["bind"]), json!(["rbind", "ridmap"])] {
        let mapped = options[1] == "ridmap";
        let count = b.config["mounts"].as_array().unwrap().len();
        b.config["mounts"].as_array_mut().unwrap().push(
            json!({"destination": "/data", "type": "bind", "source": source, "options": options}),
        );
        let (code, out, err) = b.shell("stat -c %u:%g /data/below/file; echo y > /data/below/new && stat -c %u:%g /data/below/new");
        if err.contains("id-mapped mounts") {
            eprintln!("SKIPPED: {} cannot be id-mapped", source.display());
            return;
        }
        if mapped {
            assert_eq!((code, out.as_str()), (0, "0:0\n0:0\n"), "{err}");
        } else {
            assert_eq!(out, "65534:65534\n", "{err}");
        }
        b.config["mounts"].as_array_mut().unwrap().truncate(count);
    }
    use std::os::unix::fs::MetadataExt;
    let made = fs::metadata(b.path("data/below/new")).unwrap();
    assert_eq!((made.uid(), made.gid()), (0, 0), "ids on the host");
    b.nothing_is_left();
}

/// A seccomp agent: takes the listener, answers one mkdir(2) with errno 7, and gives back the state that came along.
fn refuse_one(listener: UnixListener) -> Value {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let (stream, _) = listener.accept().unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0u8; 8192];
    let got = recvmsg(
        &stream,
        &mut [std::io::IoSliceMut::new(&mut bytes)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )
    .unwrap();
    let fd: OwnedFd = ancillary
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
        .unwrap();
    // struct seccomp_notif: id, pid, flags, data; struct seccomp_notif_resp: id, val, error, flags.
    const RECV: u64 = 0xc050_2100;
    const SEND: u64 = 0xc018_2101;
    let mut request = [0u64; 10];
    // SAFETY: the buffer has the 80 bytes of struct seccomp_notif.
    let received = unsafe { libc::ioctl(fd.as_raw_fd(), RECV, request.as_mut_ptr()) };
    assert_eq!(received, 0, "{}", std::io::Error::last_os_error());
    let mut answer = [request[0], 0, (-7i32) as u32 as u64];
    // SAFETY: the buffer has the 24 bytes of struct seccomp_notif_resp.
    let sent = unsafe { libc::ioctl(fd.as_raw_fd(), SEND, answer.as_mut_ptr()) };
    assert_eq!(sent, 0, "{}", std::io::Error::last_os_error());
    serde_json::from_slice(&bytes[..got.bytes]).unwrap()
}

#[test]
fn a_seccomp_agent_answers_a_call_of_the_container() {
    let Some(mut b) = Bundle::new() else { return };
    let socket = b.path("agent");
    let listener = UnixListener::bind(&socket).unwrap();
    b.config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": socket,
        "listenerMetadata": "whose", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}]});
    let agent = std::thread::spawn(move || refuse_one(listener));
    let (code, _, err) = b.shell("mkdir /dev/shm/x");
    assert!(code == 1 && err.contains("Argument list too long"), "{err}");
    let state = agent.join().unwrap();
    assert_eq!(state["metadata"], "whose");
    assert_eq!(state["fds"], json!(["seccompFd"]));
    assert_eq!(state["state"]["id"], b.id.as_str());
    b.nothing_is_left();
}

#[test]
fn preserved_descriptors_come_through_and_no_others() {
    let Some(mut b) = Bundle::new() else { return };
    fs::write(b.path("three"), "third\n").unwrap();
    b.args(&["sh", "-c", "cat <&3; ls /proc/self/fd | cat"]);
    let script = "exec 3<three 4<three 7<three && exec \"$@\"";
    let id = b.id.clone();
    let output = b.wrapped(
        &["sh", "-c", script, "sh"],
        &["run", "--preserve-fds", "1", &id],
    );
    assert!(output.status.success(), "{}", text(&output));
    let said = text(&output);
    let numbers: Vec<&str> = said.lines().skip(1).collect();
    assert!(said.starts_with("third\n"), "{said}");
    // 4 is the directory ls reads.
    assert_eq!(numbers, ["0", "1", "2", "3", "4"], "{said}");
    b.nothing_is_left();
}

#[test]
fn limits_can_be_changed_while_it_runs() {
    let Some(mut b) = Bundle::new() else { return };
    let directory = Path::new("/sys/fs/cgroup/pids").join(&b.id);
    if !Path::new("/sys/fs/cgroup/pids").exists() {
        eprintln!("SKIPPED: the v1 pids controller is needed");
        return;
    }
    b.args(&["sleep", "100"]);
    let id = b.id.clone();
    b.ok(&["run", "--detach", &id]);
    let limit = |name: &str, file: &str| {
        let path = Path::new("/sys/fs/cgroup").join(name).join(&id).join(file);
        fs::read_to_string(path).unwrap().trim().to_owned()
    };
    b.ok(&[
        "update",
        "--pids-limit",
        "33",
        "--memory",
        "64m",
        "--cpu-share",
        "300",
        &id,
    ]);
    assert_eq!(limit("pids", "pids.max"), "33");
    assert_eq!(
        limit("memory", "memory.limit_in_bytes"),
        (64 << 20).to_string()
    );
    assert_eq!(limit("cpu", "cpu.shares"), "300");
    fs::write(
        b.path("limits"),
        r#"{"pids":{"limit":-1},"cpu":{"quota":20000,"period":100000}}"#,
    )
    .unwrap();
    b.ok(&[
        "update",
        "--resources",
        b.path("limits").to_str().unwrap(),
        &id,
    ]);
    assert_eq!(limit("pids", "pids.max"), "max");
    assert_eq!(limit("cpu", "cpu.cfs_quota_us"), "20000");
    let refused = b.run(&["update", "--memory", "lots", &id]);
    assert_eq!(refused.status.code(), Some(1));
    b.ok(&["delete", "--force", &id]);
    assert!(!directory.exists());
    assert_eq!(
        b.run(&["update", "--pids-limit", "3", &id]).status.code(),
        Some(1)
    );
    b.nothing_is_left();
}

#[test]
fn events_come_until_the_container_ends() {
    let Some(mut b) = Bundle::new() else { return };
    b.args(&["sleep", "100"]);
    let id = b.id.clone();
    b.ok(&["run", "--detach", &id]);
    let mut events = b
        .command(&["events", "--interval", "20ms", &id])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    b.ok(&["kill", &id, "KILL"]);
    let mut said = String::new();
    events
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert!(events.wait().unwrap().success());
    let lines: Vec<Value> = said
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(lines.len() > 1, "{said}");
    assert!(
        lines
            .iter()
            .all(|line| line["type"] == "stats" && line["id"] == id.as_str())
    );
    let first = &lines[0]["data"];
    assert!(
        first["cpu"].is_object() && first["pids"].is_object(),
        "{first}"
    );
}

#[test]
fn features_are_told_as_the_specification_writes_them() {
    let Some(b) = Bundle::new() else { return };
    let said = b.ok(&["features"]);
    let features: oci_spec::runtime::Features = serde_json::from_str(&said).unwrap();
    assert_eq!(features.oci_version_max(), "1.3.0");
    let linux = features.linux().as_ref().unwrap();
    let enabled = linux.net_devices().as_ref().and_then(|it| *it.enabled());
    assert_eq!(enabled, Some(true));
    assert_eq!(linux.namespaces().as_ref().unwrap().len(), 8);
    assert!(features.hooks().as_ref().unwrap().len() == 6);
}

#[test]
fn network_devices_move_in_with_their_addresses() {
    let Some(mut b) = Bundle::new() else { return };
    symlink("busybox", b.path("rootfs/bin/ip")).unwrap();
    b.config["linux"]["netDevices"] = json!({"berth-a": {"name": "eth0"}, "berth-c": {}});
    b.args(&[
        "sh",
        "-c",
        "ip addr show eth0; ip addr show berth-c; ip link show | grep -c mtu",
    ]);
    let id = b.id.clone();
    // Devices of a network namespace made for this, not of the host.
    let script = "ip link add berth-a type veth peer name berth-b && ip link add berth-c type veth peer name berth-d && \
        ip link set berth-a mtu 1400 up && ip addr add 10.99.7.2/24 dev berth-a && \
        ip -6 addr add fd00:99::2/64 dev berth-a nodad && exec \"$@\"";
    let wrapper = ["unshare", "-n", "sh", "-c", script, "sh"];
    let output = b.wrapped(&wrapper, &["run", &id]);
    let said = text(&output);
    if said.contains("Operation not supported") || said.contains("Unknown device type") {
        eprintln!("SKIPPED: this host has no veth devices");
        return;
    }
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("10.99.7.2/24") && said.contains("fd00:99::2/64"),
        "{said}"
    );
    assert!(said.contains("mtu 1400") && said.contains("UP"), "{said}");
    assert!(said.contains("berth-c") && said.ends_with("3\n"), "{said}");
    b.nothing_is_left();
    // What cannot be is told, and leaves nothing.
    b.config["linux"]["netDevices"] = json!({"no-such-dev": {}});
    let said = text(&b.wrapped(&wrapper, &["run", &id]));
    assert!(said.contains("no-such-dev"), "{said}");
    b.nothing_is_left();
    b.config["linux"]["netDevices"] = json!({"berth-a": {"name": "a/b"}});
    assert!(b.go().2.contains("no name of a network device"));
    b.config["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .retain(|entry| entry["type"] != "network");
    b.config["linux"]["netDevices"] = json!({"berth-a": {}});
    assert!(b.go().2.contains("without a network namespace"));
    b.nothing_is_left();
}

#[test]
fn scheduling_limits_and_personality_are_the_processs() {
    let Some(mut b) = Bundle::new() else { return };
    symlink("busybox", b.path("rootfs/bin/uname")).unwrap();
    symlink("busybox", b.path("rootfs/bin/awk")).unwrap();
    b.config["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 5});
    b.config["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
    b.config["process"]["oomScoreAdj"] = json!(321);
    b.config["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}]);
    b.config["linux"]["personality"] = json!({"domain": "LINUX32"});
    let (code, out, err) = b.shell(
        "awk '{print $19, $41}' /proc/self/stat; cat /proc/self/oom_score_adj; ulimit -n; uname -m",
    );
    assert_eq!(code, 0, "{err}");
    let machine = if cfg!(target_arch = "x86_64") {
        "i686"
    } else {
        "armv8l"
    };
    assert_eq!(out, format!("5 3\n321\n77\n{machine}\n"), "{err}");
    b.nothing_is_left();
}

#[test]
fn a_memory_policy_binds_to_its_nodes() {
    let Some(mut b) = Bundle::new() else { return };
    if !Path::new("/proc/self/numa_maps").exists() {
        eprintln!("SKIPPED: this kernel knows no nodes of memory");
        return;
    }
    b.config["linux"]["memoryPolicy"] =
        json!({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]});
    let (code, out, err) = b.shell("cat /proc/self/numa_maps");
    assert!(code == 0 && out.contains("bind=static:0"), "{out}{err}");
    b.config["linux"]["memoryPolicy"] = json!({"mode": "MPOL_BIND", "nodes": "zero"});
    assert!(b.go().2.contains("memoryPolicy.nodes"));
    b.nothing_is_left();
}

#[test]
fn a_pure_v2_host_freezes_counts_filters_devices_and_kills() {
    let Some(mut b) = Bundle::new() else { return };
    let view = text(&b.wrapped(&V2_VIEW, &["--version"]));
    if view.contains("permission") || view.contains("mount:") || view.contains("umount:") {
        eprintln!("SKIPPED: no pure v2 view of the cgroups can be made here: {view}");
        return;
    }
    b.config["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "cgroup"}));
    let has_cgroup = b.config["linux"]["namespaces"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|entry| entry["type"] == "cgroup")
        .count();
    if has_cgroup > 1 {
        b.config["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .pop();
    }
    b.capabilities(&["CAP_MKNOD"]);
    b.args(&["sleep", "100"]);
    let id = b.id.clone();
    let go = |args: &[&str]| {
        let output = b.wrapped(&V2_VIEW, args);
        (output.status.code(), text(&output))
    };
    // Detached: the output goes to a file, so that nothing waits for the container to close it.
    let mut wrapper = V2_VIEW.to_vec();
    let script = V2_VIEW[5].replace("exec \"$@\"", "exec \"$@\" >detached 2>&1");
    wrapper[5] = &script;
    let started = b.wrapped(&wrapper, &["run", "--detach", &id]);
    let said = fs::read_to_string(b.path("detached")).unwrap_or_default();
    assert!(started.status.success(), "{said}{}", text(&started));
    let script = "cat /proc/self/cgroup; cat /sys/fs/cgroup/cgroup.procs | head -n 1; mknod /dev/k c 1 11 && cat /dev/k";
    symlink("busybox", b.path("rootfs/bin/head")).unwrap();
    let (_, said) = go(&["exec", &id, "sh", "-c", script]);
    assert!(said.contains("0::/\n1\n"), "{said}");
    assert!(said.contains("Operation not permitted"), "{said}");
    assert_eq!(go(&["pause", &id]).0, Some(0));
    assert!(go(&["state", &id]).1.contains("\"paused\""));
    assert_eq!(go(&["resume", &id]).0, Some(0));
    assert!(go(&["ps", "--format", "json", &id]).1.starts_with('['));
    let (code, said) = go(&["events", "--stats", &id]);
    assert!(code == Some(0) && said.contains("\"cpu\""), "{said}");
    assert_eq!(go(&["kill", "--all", &id, "KILL"]).0, Some(0));
    until("the container lives on", || {
        go(&["state", &id]).1.contains("\"stopped\"")
    });
    assert_eq!(go(&["delete", &id]).0, Some(0));
    b.nothing_is_left();
}

/// The manager's side of the systemd driver, played by a `busctl` of the test's own: it checks the call and moves the
/// process where systemd would.
const BUSCTL: &str = r#"#!/bin/sh
echo "$*" >> "$BERTH_TEST_CALLS"
case "$*" in
*StartTransientUnit*)
    unit=$9
    for pid; do case $pid in PIDs) take=1 ;; esac; done
    while [ "$1" != PIDs ]; do shift; done
    [ "$2 $3" = "au 1" ] || { echo "no process" >&2; exit 1; }
    mkdir -p "/sys/fs/cgroup/berth-test.slice/$unit"
    echo "$4" > "/sys/fs/cgroup/berth-test.slice/$unit/cgroup.procs"
    ;;
*StopUnit*) rmdir "/sys/fs/cgroup/berth-test.slice/$9" ;;
esac
"#;

#[test]
fn the_systemd_driver_asks_for_a_scope_and_lives_in_it() {
    let Some(mut b) = Bundle::new() else { return };
    fs::create_dir(b.path("fake")).unwrap();
    fs::write(b.path("fake/busctl"), BUSCTL).unwrap();
    let chmod = Command::new("chmod")
        .arg("755")
        .arg(b.path("fake/busctl"))
        .status();
    assert!(chmod.unwrap().success());
    let id = b.id.clone();
    b.config["linux"]["cgroupsPath"] = json!(format!("berth-test.slice:berth:{id}"));
    let resources = &mut b.config["linux"];
    resources["resources"] = json!({});
    b.args(&["sh", "-c", "cat /proc/self/cgroup"]);
    b.config["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .retain(|entry| entry["type"] != "cgroup");
    let script = format!(
        "umount -R /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system && \
         export PATH={0}:$PATH BERTH_TEST_CALLS={1} && \"$@\"; code=$?; rmdir /sys/fs/cgroup/berth-test.slice || code=99; exit $code",
        b.path("fake").display(),
        b.path("calls").display()
    );
    let wrapper = [
        "unshare",
        "-m",
        "--propagation=private",
        "sh",
        "-c",
        &script,
        "sh",
    ];
    let output = b.wrapped(&wrapper, &["--systemd-cgroup", "run", &id]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains(&format!("0::/berth-test.slice/berth-{id}.scope")),
        "{said}"
    );
    let calls = fs::read_to_string(b.path("calls")).unwrap();
    let call = calls.lines().next().unwrap();
    for part in [
        "org.freedesktop.systemd1.Manager StartTransientUnit ssa(sv)a(sa(sv))",
        &format!("berth-{id}.scope"),
        "Slice s berth-test.slice",
        "Delegate b true",
    ] {
        assert!(call.contains(part), "{part} is not in {call}");
    }
    // Without systemd, the flag is refused with words.
    if !Path::new("/run/systemd/system").exists() {
        let refused = b.run(&["--systemd-cgroup", "run", &id]);
        assert_eq!(refused.status.code(), Some(1));
        assert!(
            text(&refused).contains("systemd does not run"),
            "{}",
            text(&refused)
        );
    }
    b.nothing_is_left();
}

#[test]
fn exec_takes_its_process_from_a_file_or_from_flags() {
    let Some(mut b) = Bundle::new() else { return };
    b.args(&["sleep", "100"]);
    let id = b.id.clone();
    b.ok(&["run", "--detach", &id]);
    let process = json!({"args": ["sh", "-c", "echo $X; id -u; pwd"], "cwd": "/bin", "env": ["PATH=/bin", "X=y"], "user": {"uid": 9, "gid": 9}});
    fs::write(b.path("process.json"), process.to_string()).unwrap();
    let file = b.path("process.json");
    assert_eq!(
        b.ok(&["exec", "--process", file.to_str().unwrap(), &id]),
        "y\n9\n/bin\n"
    );
    let script = "grep CapEff /proc/self/status";
    let caps = b.ok(&["exec", "--cap", "CAP_SYS_CHROOT", &id, "sh", "-c", script]);
    let bits = u64::from_str_radix(caps.split_whitespace().last().unwrap(), 16).unwrap();
    assert_ne!(bits & 1 << 18, 0, "{caps}");
    let groups = b.ok(&["exec", "-u", "5:6", "-g", "77", &id, "id"]);
    assert!(
        groups.contains("uid=5 gid=6") && groups.contains("77"),
        "{groups}"
    );
    fs::write(&file, "{}").unwrap();
    assert_eq!(
        b.run(&["exec", "--process", file.to_str().unwrap(), &id])
            .status
            .code(),
        Some(255)
    );
    let pid_file = b.path("exec.pid");
    b.ok(&[
        "exec",
        "--detach",
        "--pid-file",
        pid_file.to_str().unwrap(),
        &id,
        "sleep",
        "50",
    ]);
    let pid: i32 = fs::read_to_string(&pid_file).unwrap().parse().unwrap();
    let pids: Vec<i32> = serde_json::from_str(&b.ok(&["ps", "--format", "json", &id])).unwrap();
    assert!(pids.contains(&pid), "{pids:?}");
    b.ok(&["delete", "--force", &id]);
    b.nothing_is_left();
}

#[test]
fn exec_joins_a_user_namespace() {
    let Some(mut b) = Bundle::new() else { return };
    in_user_namespace(&mut b);
    let chown = Command::new("chown")
        .args(["-R", "100000:200000"])
        .arg(b.path("rootfs"))
        .status();
    assert!(chown.unwrap().success());
    b.args(&["sleep", "100"]);
    let id = b.id.clone();
    b.ok(&["run", "--detach", &id]);
    assert_eq!(
        b.ok(&["exec", "-u", "3:4", &id, "sh", "-c", "id -u; id -g"]),
        "3\n4\n"
    );
    let map = b.ok(&["exec", &id, "cat", "/proc/self/uid_map"]);
    assert_eq!(
        map.split_whitespace().collect::<Vec<_>>(),
        ["0", "100000", "65536"]
    );
    b.ok(&["delete", "--force", &id]);
    b.nothing_is_left();
}

#[test]
fn namespaces_are_joined_by_path() {
    let Some(mut b) = Bundle::new() else { return };
    b.args(&["sleep", "100"]);
    let id = b.id.clone();
    b.ok(&["run", "--detach", &id]);
    let state: Value = serde_json::from_str(&b.ok(&["state", &id])).unwrap();
    let pid = state["pid"].as_i64().unwrap();
    let Some(mut other) = Bundle::new() else {
        return;
    };
    for entry in other.config["linux"]["namespaces"].as_array_mut().unwrap() {
        let kind = entry["type"].as_str().unwrap().to_owned();
        let file = match kind.as_str() {
            "mount" => continue,
            "network" => "net",
            other => other,
        };
        entry["path"] = json!(format!("/proc/{pid}/ns/{file}"));
    }
    other.config["hostname"] = Value::Null;
    other.config.as_object_mut().unwrap().remove("hostname");
    let (code, out, err) = other.shell("for n in pid net ipc uts; do stat -L -c %i /proc/self/ns/$n; done; grep -c sleep /proc/1/cmdline; hostname");
    assert_eq!(code, 0, "{err}");
    let mut lines = out.lines();
    use std::os::unix::fs::MetadataExt;
    for name in ["pid", "net", "ipc", "uts"] {
        let theirs = fs::metadata(format!("/proc/{pid}/ns/{name}"))
            .unwrap()
            .ino();
        assert_eq!(lines.next().unwrap(), theirs.to_string(), "{name}");
    }
    assert_eq!((lines.next(), lines.next()), (Some("1"), Some("berth")));
    other.nothing_is_left();
    b.ok(&["delete", "--force", &id]);
    b.nothing_is_left();
}
