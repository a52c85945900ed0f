//! What a container is given and what it is not: mounts of images, limits, privileges, names; by docker's command line.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use crate::daemon::has_busybox;

crate::tests! {
    an_image_is_mounted_read_only_and_kept_while_it_is,
    limits_reach_the_kernel,
    privileges_are_given_only_where_asked_for,
    name_servers_and_files_of_variables_are_passed_on,
    stats_go_on_until_the_client_has_enough,
    a_prune_of_all_takes_what_nobody_uses,
}

fn an_image_is_mounted_read_only_and_kept_while_it_is() {
    let Some(daemon) = has_busybox("image mounts") else {
        return;
    };
    let build = daemon.docker_with(
        &["build", "-q", "-t", "mounted:1", "-"],
        b"FROM busybox\nRUN mkdir -p /data/deep && echo tool > /data/deep/file && echo one > /data/one\nRUN rm /data/one\n",
    );
    assert!(build.status.success(), "{build:?}");
    let mount = "type=image,source=mounted:1,target=/other";
    let script = "cat /other/data/deep/file; ls /other/data; echo x > /other/data/new || echo refused; umount /other || echo held";
    let said = daemon.docker(&[
        "run", "--rm", "--mount", mount, "busybox", "sh", "-c", script,
    ]);
    assert_eq!(said, "tool\ndeep\nrefused\nheld");
    let below = format!("{mount},image-subpath=data/deep");
    let said = daemon.docker(&["run", "--rm", "--mount", &below, "busybox", "ls", "/other"]);
    assert_eq!(said, "file");
    for (bad, words) in [
        ("type=image,source=no-such-image,target=/x", "no-such-image"),
        ("type=image,target=/x", "Source"),
        (
            "type=image,source=mounted:1,target=/x,image-subpath=../..",
            "subpath",
        ),
    ] {
        let error = daemon.docker_fails(&["create", "--mount", bad, "busybox", "true"]);
        assert!(error.contains(words), "{bad}: {error}");
    }
    let missing = format!("{mount},image-subpath=nowhere");
    let error = daemon.docker_fails(&["run", "--rm", "--mount", &missing, "busybox", "true"]);
    assert!(error.contains("/other"), "{error}");
    // The files stay as long as a container has them, whatever becomes of the name; restarts find them.
    daemon.docker(&[
        "run",
        "-d",
        "--name",
        "has-image",
        "--mount",
        mount,
        "busybox",
        "sleep",
        "1000",
    ]);
    daemon.docker(&["rmi", "-f", "mounted:1"]);
    daemon.docker(&["restart", "-t", "0", "has-image"]);
    let read = ["exec", "has-image", "cat", "/other/data/deep/file"];
    assert_eq!(daemon.docker(&read), "tool");
    let format = "{{range .Mounts}}{{.Type}} {{.Destination}} {{.RW}}{{end}}";
    let shown = daemon.docker(&["inspect", "-f", format, "has-image"]);
    assert_eq!(shown, "image /other false");
    daemon.docker(&["rm", "-f", "has-image"]);
    let snapshots = daemon.home.path().join("state/images/snapshots");
    let left: Vec<_> = std::fs::read_dir(snapshots)
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().contains("-image-"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

fn limits_reach_the_kernel() {
    let Some(daemon) = has_busybox("limits") else {
        return;
    };
    if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        eprintln!("SKIPPED: limits: v2 is tested in a machine (machines_cgroups)");
        return;
    }
    let disk = std::fs::read_dir("/sys/block")
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .find(|name| std::path::Path::new("/dev").join(name).exists());
    let rate = disk.map(|disk| format!("/dev/{disk}:1mb"));
    let mut words = vec![
        "run",
        "-d",
        "--name",
        "limited",
        "--cpus",
        "0.5",
        "--cpu-shares",
        "512",
        "--cpuset-cpus",
        "0",
        "--pids-limit",
        "21",
        "-m",
        "32m",
        "--memory-swap",
        "32m",
        "--blkio-weight",
        "300",
    ];
    if let Some(rate) = &rate {
        words.extend(["--device-write-bps", rate]);
    }
    words.extend(["--ulimit", "nofile=100:200", "--oom-score-adj", "300"]);
    words.extend(["busybox", "sleep", "1000"]);
    daemon.docker(&words);
    // What is executed later is bound as the container's own process is.
    let script = "ulimit -Sn; ulimit -Hn; cat /proc/self/oom_score_adj";
    assert_eq!(
        daemon.docker(&["exec", "limited", "sh", "-c", script]),
        "100\n200\n300"
    );
    let pid = daemon.docker(&["inspect", "-f", "{{.State.Pid}}", "limited"]);
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let value = |controller: &str, file: &str| {
        let path = groups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let names = parts.next()?;
            names
                .split(',')
                .any(|name| name == controller)
                .then(|| parts.next())?
        });
        let path = path.unwrap_or_else(|| panic!("no {controller} in {groups}"));
        let file = format!("/sys/fs/cgroup/{controller}{path}/{file}");
        let text = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{file}: {e}"));
        text.trim().to_owned()
    };
    assert_eq!(value("cpu", "cpu.cfs_quota_us"), "50000");
    assert_eq!(value("cpu", "cpu.shares"), "512");
    assert_eq!(value("cpuset", "cpuset.cpus"), "0");
    assert_eq!(value("pids", "pids.max"), "21");
    assert_eq!(value("memory", "memory.limit_in_bytes"), "33554432");
    if rate.is_some() {
        let written = value("blkio", "blkio.throttle.write_bps_device");
        assert!(written.ends_with(" 1048576"), "{written}");
    }
    daemon.docker(&["update", "--pids-limit", "30", "--cpus", "0.25", "limited"]);
    assert_eq!(value("pids", "pids.max"), "30");
    assert_eq!(value("cpu", "cpu.cfs_quota_us"), "25000");
    let script = "i=0; while [ $i -lt 40 ]; do sleep 5 & i=$((i+1)); done";
    let error = daemon.docker_fails(&["exec", "limited", "sh", "-c", script]);
    assert!(error.contains("fork"), "{error}");
    daemon.docker(&["rm", "-f", "limited"]);
}

fn privileges_are_given_only_where_asked_for() {
    let Some(daemon) = has_busybox("privileges") else {
        return;
    };
    let script = "grep CapEff /proc/self/status | cut -f2; mount -t tmpfs t /tmp 2>/dev/null && echo mounted; [ -c /dev/kmsg ] && echo devices; grep Seccomp: /proc/self/status | cut -f2";
    let run = |more: &[&str]| {
        let mut words = vec!["run", "--rm"];
        words.extend(more);
        words.extend(["busybox", "sh", "-c", script]);
        daemon.docker(&words)
    };
    assert_eq!(run(&[]), "00000000a80425fb\n2");
    let privileged = run(&["--privileged"]);
    assert!(privileged.contains("mounted\ndevices\n0"), "{privileged}");
    let some = run(&["--cap-drop", "ALL", "--cap-add", "NET_RAW"]);
    assert_eq!(some, "0000000000002000\n2");
    let open = run(&["--security-opt", "seccomp=unconfined"]);
    assert_eq!(open, "00000000a80425fb\n0");
    let script = "readlink /proc/self/ns/cgroup";
    let host = std::fs::read_link("/proc/self/ns/cgroup").unwrap();
    let host = host.display().to_string();
    for (mode, same) in [("host", true), ("private", false)] {
        let own = daemon.docker(&[
            "run",
            "--rm",
            "--cgroupns",
            mode,
            "busybox",
            "sh",
            "-c",
            script,
        ]);
        assert_eq!(own == host, same, "{mode}: {own}");
    }
}

fn name_servers_and_files_of_variables_are_passed_on() {
    let Some(daemon) = has_busybox("names") else {
        return;
    };
    let file = daemon.home.path().join("variables");
    std::fs::write(&file, "ONE=1\n# no\nTWO=a b\n").unwrap();
    let said = daemon.docker(&[
        "run",
        "--rm",
        "--network",
        "host",
        "--dns",
        "192.0.2.53",
        "--dns-search",
        "example.org",
        "--dns-option",
        "ndots:3",
        "--env-file",
        file.to_str().unwrap(),
        "busybox",
        "sh",
        "-c",
        "cat /etc/resolv.conf; echo $ONE $TWO",
    ]);
    for part in [
        "nameserver 192.0.2.53",
        "search example.org",
        "ndots:3",
        "1 a b",
    ] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
}

fn stats_go_on_until_the_client_has_enough() {
    let Some(daemon) = has_busybox("live stats") else {
        return;
    };
    daemon.docker(&[
        "run",
        "-d",
        "--name",
        "watched",
        "busybox",
        "sh",
        "-c",
        "while :; do :; done",
    ]);
    let mut child = daemon
        .command(&["stats", "--format", "{{.Name}} {{.CPUPerc}}", "watched"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let busy = lines
        .map_while(Result::ok)
        .filter(|line| {
            let share = line.rsplit("watched ").next().unwrap_or_default();
            let share = share.split('%').next().unwrap_or_default();
            line.contains("watched") && share.parse::<f32>().is_ok_and(|share| share > 1.0)
        })
        .take(2)
        .count();
    let _ = child.kill();
    let _ = child.wait();
    assert_eq!(busy, 2);
    daemon.docker(&["rm", "-f", "watched"]);
}

fn a_prune_of_all_takes_what_nobody_uses() {
    if has_busybox("prune").is_none() {
        return;
    }
    // A daemon of its own: a prune does not ask whose things they are.
    let daemon = crate::daemon::Daemon::start();
    let archive = crate::daemon::busybox_archive().unwrap();
    daemon.docker_with(&["import", "-", "busybox"], &archive);
    daemon.docker_with(&["import", "-", "spare"], &archive[..archive.len()]);
    daemon.docker(&["network", "create", "prune-net"]);
    daemon.docker(&["volume", "create", "prune-named"]);
    daemon.docker(&[
        "create",
        "-v",
        "/data",
        "--name",
        "prune-done",
        "busybox",
        "true",
    ]);
    daemon.docker(&[
        "run",
        "-d",
        "--name",
        "prune-runs",
        "-v",
        "/data",
        "busybox",
        "sleep",
        "1000",
    ]);
    let said = daemon.docker(&["system", "prune", "-f", "--volumes"]);
    assert!(
        said.contains("Deleted Containers") && said.contains("Total reclaimed space"),
        "{said}"
    );
    assert_eq!(
        daemon.docker(&["ps", "-a", "--format", "{{.Names}}"]),
        "prune-runs"
    );
    assert_eq!(
        daemon.docker(&["network", "ls", "-q", "--filter", "type=custom"]),
        ""
    );
    assert_eq!(
        daemon
            .docker(&["volume", "ls", "-q", "--filter", "dangling=false"])
            .lines()
            .count(),
        1
    );
    // Named volumes are kept, as dockerd keeps them.
    assert!(
        daemon
            .docker(&["volume", "ls", "-q"])
            .contains("prune-named")
    );
    daemon.docker(&["system", "prune", "-a", "-f"]);
    let left = daemon.docker(&["images", "--format", "{{.Repository}}"]);
    assert_eq!(left, "busybox");
}
