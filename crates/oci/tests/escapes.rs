//! Ways out of a container that were open in one runtime or another: each is really tried here, from inside. They need
//! root and a static busybox, and say so.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

mod bundle;
use bundle::{Bundle, receive, text};

#[test]
fn known_ways_out_are_closed() {
    let Some(mut b) = Bundle::new() else { return };
    b.capabilities(&[
        "CAP_SYS_ADMIN",
        "CAP_DAC_OVERRIDE",
        "CAP_SYS_PTRACE",
        "CAP_MKNOD",
    ]);
    b.config["process"]["noNewPrivileges"] = json!(false);
    let exe = fs::read(env!("CARGO_BIN_EXE_berth-oci")).unwrap();
    // CVE-2019-5736: the runtime's executable through /proc/self/exe.
    b.args(&["/proc/self/exe", "--version"]);
    let _ = b.go();
    let (_, out, _) = b.shell("echo x > /proc/sysrq-trigger || echo sysrq; echo x > /proc/sys/kernel/core_pattern || echo core; for f in /sys/fs/cgroup/*/release_agent; do test -e $f && echo x > $f && echo OPEN; done; echo end");
    assert!(out.contains("sysrq") || out.contains("core"), "{out}");
    assert!(!out.contains("OPEN") && out.ends_with("end\n"), "{out}");
    assert_eq!(fs::read(env!("CARGO_BIN_EXE_berth-oci")).unwrap(), exe);
    // An exec'd process is visible in the container from its first moment: its executable must not be writable.
    b.args(&["sh", "-c", "while :; do for p in /proc/[0-9]*; do [ \"$p\" = /proc/1 ] || { (echo overwritten > $p/exe) 2>/dev/null && echo WROTE > /dev/shm/wrote; }; done; done"]);
    let id = b.id.clone();
    b.ok(&["run", "--detach", &id]);
    for _ in 0..10 {
        assert_eq!(
            b.ok(&[
                "exec",
                &id,
                "sh",
                "-c",
                "test -e /dev/shm/wrote && echo wrote || echo safe"
            ]),
            "safe\n"
        );
    }
    assert_eq!(fs::read(env!("CARGO_BIN_EXE_berth-oci")).unwrap(), exe);
    b.ok(&["delete", "--force", &id]);
    b.nothing_is_left();
}

#[test]
fn a_mount_through_a_planted_link_stays_inside() {
    let Some(mut b) = Bundle::new() else { return };
    let outside = b.path("outside");
    fs::create_dir(&outside).unwrap();
    symlink(
        format!("../../../../../../..{}", outside.display()),
        b.path("rootfs/escape"),
    )
    .unwrap();
    b.config["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/escape/new", "type": "tmpfs", "source": "tmpfs"}));
    let (code, _, err) = b.shell("echo x > /escape/new/file");
    assert_eq!(code, 0, "{err}");
    assert_eq!(
        fs::read_dir(&outside).unwrap().count(),
        0,
        "something was made outside"
    );
    // /proc as a link (CVE-2019-16884), and a mount inside /proc.
    symlink("/etc", b.path("rootfs/proc2")).unwrap();
    b.config["mounts"].as_array_mut().unwrap().pop();
    let good = b.config.clone();
    b.config["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/proc2", "type": "proc", "source": "proc"}));
    assert!(b.go().2.contains("ordinary directory"));
    b.config = good;
    b.config["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/proc/self", "type": "tmpfs", "source": "tmpfs"}));
    assert!(b.go().2.contains("inside /proc"));
    b.nothing_is_left();
}

/// Files by which a container could command the host's kernel, where this kernel has them.
const KNOBS: [&str; 8] = [
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/modprobe",
    "/proc/sys/kernel/hotplug",
    "/proc/sys/vm/panic_on_oom",
    "/proc/sys/fs/binfmt_misc/register",
    "/proc/sysrq-trigger",
    "/proc/irq/default_smp_affinity",
    "/sys/kernel/uevent_helper",
];

fn knobs() -> Vec<(&'static str, String)> {
    KNOBS
        .into_iter()
        .map(|path| (path, fs::read_to_string(path).unwrap_or_default()))
        .collect()
}

#[test]
fn the_kernels_knobs_are_out_of_reach() {
    let Some(mut b) = Bundle::new() else { return };
    b.capabilities(&[
        "CAP_DAC_OVERRIDE",
        "CAP_CHOWN",
        "CAP_FOWNER",
        "CAP_SETUID",
        "CAP_MKNOD",
        "CAP_NET_ADMIN",
    ]);
    let before = knobs();
    let mut script = String::new();
    for path in KNOBS {
        script.push_str(&format!("if [ -e {path} ]; then echo tried; chmod 666 {path}; (echo '|/evil' > {path}) && echo WROTE {path}; fi;"));
    }
    // And by a fresh mount, or by undoing the one that is read-only.
    script.push_str("mount -t proc proc /dev/shm && echo MOUNTED; mount -o remount,rw /proc/sys && echo REMOUNTED; umount /proc/sysrq-trigger && echo UNCOVERED; true");
    let (code, out, err) = b.shell(&script);
    assert_eq!(code, 0, "{err}");
    assert!(
        out.lines().count() >= 2 && out.lines().all(|line| line == "tried"),
        "{out}"
    );
    assert_eq!(knobs(), before);
    b.nothing_is_left();
}

#[test]
fn a_descriptor_of_the_runtimes_executable_cannot_be_written_later() {
    let Some(mut b) = Bundle::new() else { return };
    b.capabilities(&["CAP_DAC_OVERRIDE", "CAP_SYS_PTRACE"]);
    b.config["root"]["readonly"] = json!(false);
    let exe = fs::read(env!("CARGO_BIN_EXE_berth-oci")).unwrap();
    // CVE-2019-5736 as it was: the container's program is the runtime itself, by way of a script's first line, so that
    // its libraries come from the image; here a process meanwhile keeps a descriptor of each executable it sees and
    // writes through it once nobody executes it.
    fs::write(b.path("rootfs/bin/again"), "#!/proc/self/exe\n").unwrap();
    let chmod = std::process::Command::new("chmod")
        .arg("755")
        .arg(b.path("rootfs/bin/again"))
        .status();
    assert!(chmod.unwrap().success());
    b.args(&["/bin/again"]);
    let (code, ..) = b.go();
    assert_ne!(code, 0);
    b.args(&["sh", "-c", "while :; do for p in /proc/[0-9]*; do [ $p = /proc/1 ] && continue; { echo held >> /dev/shm/held; sleep 0; (echo overwritten > /proc/self/fd/9) && echo WROTE >> /dev/shm/wrote; } 9<$p/exe; done 2>/dev/null; done"]);
    let id = b.id.clone();
    b.ok(&["run", "--detach", &id]);
    for _ in 0..20 {
        b.ok(&["exec", &id, "/bin/true"]);
    }
    assert_eq!(
        b.ok(&[
            "exec",
            &id,
            "sh",
            "-c",
            "test -e /dev/shm/wrote && cat /dev/shm/wrote; echo end"
        ]),
        "end\n"
    );
    b.ok(&["delete", "--force", &id]);
    assert_eq!(fs::read(env!("CARGO_BIN_EXE_berth-oci")).unwrap(), exe);
    b.nothing_is_left();
}

/// Swaps two names for each other, as fast as it can, until told to stop.
fn swap(one: std::path::PathBuf, other: std::path::PathBuf, stop: &AtomicBool) -> u32 {
    let mut swaps = 0;
    while !stop.load(Ordering::Relaxed) {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        swaps += u32::from(renameat_with(CWD, &one, CWD, &other, RenameFlags::EXCHANGE).is_ok());
    }
    swaps
}

#[test]
fn mount_targets_swapped_for_links_meanwhile_lead_nowhere_outside() {
    let Some(mut b) = Bundle::new() else { return };
    let outside = b.path("outside");
    fs::create_dir_all(outside.join("below")).unwrap();
    // What another container with the same volume could do while this one is made: CVE-2021-30465.
    fs::create_dir_all(b.path("rootfs/vol/dir/below")).unwrap();
    symlink(&outside, b.path("rootfs/vol/link")).unwrap();
    let mounts = b.config["mounts"].as_array_mut().unwrap();
    for below in ["below", "made", "deep/er"] {
        mounts.push(json!({"destination": format!("/vol/dir/{below}"), "type": "tmpfs", "source": "tmpfs", "options": ["size=64k"]}));
    }
    b.config["linux"]["maskedPaths"] = json!(["/vol/dir/below"]);
    let stop = AtomicBool::new(false);
    let (one, other) = (b.path("rootfs/vol/dir"), b.path("rootfs/vol/link"));
    std::thread::scope(|scope| {
        let swapper = scope.spawn(|| swap(one, other, &stop));
        for _ in 0..60 {
            b.args(&[
                "sh",
                "-c",
                "echo x > /vol/dir/below/file; echo x > /vol/dir/made/file; true",
            ]);
            // It may fail, with words; it must not reach outside.
            let (code, _, err) = b.go();
            assert!(code == 0 || err.contains("berth oci: "), "{code} {err}");
            let names: Vec<_> = fs::read_dir(&outside)
                .unwrap()
                .flatten()
                .map(|entry| entry.file_name())
                .collect();
            assert_eq!(names, ["below"], "something was made outside");
            assert_eq!(fs::read_dir(outside.join("below")).unwrap().count(), 0);
        }
        stop.store(true, Ordering::Relaxed);
        assert!(swapper.join().unwrap() > 100, "nothing was swapped");
    });
    b.nothing_is_left();
}

#[test]
fn masks_do_not_trust_the_images_dev_null() {
    let Some(mut b) = Bundle::new() else { return };
    // CVE-2025-31133: masks were binds of the container's /dev/null, which the image or a racing container made a link
    // to a knob. Here /dev is the image's own directory.
    b.config["mounts"].as_array_mut().unwrap().retain(|mount| {
        mount["destination"] != "/dev"
            && mount["destination"]
                .as_str()
                .unwrap()
                .strip_prefix("/dev/")
                .is_none()
    });
    fs::create_dir_all(b.path("rootfs/dev/shm")).unwrap();
    b.config["root"]["readonly"] = json!(false);
    b.config["linux"]["maskedPaths"] = json!(["/proc/version", "/proc/uptime"]);
    for target in ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger"] {
        let _ = fs::remove_file(b.path("rootfs/dev/null"));
        symlink(target, b.path("rootfs/dev/null")).unwrap();
        let before = knobs();
        let (code, out, err) = b.shell("stat -c %t:%T /dev/null /proc/version /proc/uptime; (echo x > /proc/sys/kernel/core_pattern) || echo refused; (echo x > /proc/version) && echo sunk");
        assert_eq!(code, 0, "{err}");
        assert_eq!(out, "1:3\n1:3\n1:3\nrefused\nsunk\n", "{err}");
        assert_eq!(knobs(), before);
    }
    b.nothing_is_left();
}

#[test]
fn a_console_planted_as_a_link_covers_nothing_else() {
    let Some(mut b) = Bundle::new() else { return };
    // CVE-2025-52565: the bind of the terminal over /dev/console followed a link of the image.
    b.config["mounts"]
        .as_array_mut()
        .unwrap()
        .retain(|mount| mount["destination"] != "/dev");
    fs::create_dir_all(b.path("rootfs/dev")).unwrap();
    b.config["root"]["readonly"] = json!(false);
    b.config["process"]["terminal"] = json!(true);
    symlink(
        "/proc/sys/kernel/core_pattern",
        b.path("rootfs/dev/console"),
    )
    .unwrap();
    b.args(&["sh", "-c", "stat -c %t:%T:%F /proc/sys/kernel/core_pattern; (echo x > /proc/sys/kernel/core_pattern) || echo refused"]);
    let before = knobs();
    let socket = b.path("console.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let id = b.id.clone();
    let output = b.run(&["create", "--console-socket", socket.to_str().unwrap(), &id]);
    if output.status.success() {
        let mut master = fs::File::from(receive(listener));
        b.ok(&["start", &id]);
        let mut said = Vec::new();
        let _ = std::io::Read::read_to_end(&mut master, &mut said);
        let said = String::from_utf8_lossy(&said);
        assert!(
            said.contains("0:0:regular") && said.contains("refused"),
            "{said}"
        );
    } else {
        assert!(text(&output).contains("/dev/console"), "{}", text(&output));
    }
    assert_eq!(knobs(), before);
    b.ok(&["delete", "--force", &id]);
    b.nothing_is_left();
}

#[test]
fn a_working_directory_by_a_leaked_descriptor_does_not_exist() {
    let Some(mut b) = Bundle::new() else { return };
    fs::write(b.path("host-marker"), "x").unwrap();
    // CVE-2024-21626: `cwd` was /proc/self/fd/N of a directory of the host that the runtime had open.
    let held = "exec 5</ 6<. 9</sys/fs/cgroup && exec \"$@\"";
    let script = "ls host-marker ../host-marker ../../host-marker sys/kernel ../sys/kernel 2>/dev/null; pwd; true";
    let id = b.id.clone();
    for number in 3..24 {
        let cwd = format!("/proc/self/fd/{number}");
        b.config["process"]["cwd"] = json!(cwd);
        b.args(&["sh", "-c", script]);
        let output = b.wrapped(&["sh", "-c", held, "sh"], &["run", &id]);
        let said = text(&output);
        assert!(
            !output.status.success() || !said.contains("marker"),
            "{number}: {said}"
        );
        assert!(!said.contains("unreachable)"), "{number}: {said}");
    }
    b.config["process"]["cwd"] = json!("/");
    b.args(&["sleep", "100"]);
    b.ok(&["run", "--detach", &id]);
    for number in 3..24 {
        let cwd = format!("/proc/self/fd/{number}");
        let output = b.wrapped(
            &["sh", "-c", held, "sh"],
            &["exec", "--cwd", &cwd, &id, "sh", "-c", script],
        );
        let said = text(&output);
        assert!(
            !output.status.success() || !said.contains("marker"),
            "{number}: {said}"
        );
    }
    // An exec'd process shows no descriptor of the runtime, not even for a moment, that leads outside.
    let spy = "for i in 1 2 3 4 5; do for f in /proc/[0-9]*/fd/*; do ls $f/host-marker 2>/dev/null && echo SEEN; done; done; echo end";
    let exec = b
        .command(&["exec", &id, "sh", "-c", spy])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    for _ in 0..10 {
        let output = b.wrapped(&["sh", "-c", held, "sh"], &["exec", &id, "true"]);
        assert!(output.status.success(), "{}", text(&output));
    }
    let said = exec.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&said.stdout), "end\n");
    b.ok(&["delete", "--force", &id]);
    b.nothing_is_left();
}

#[test]
fn no_release_agent_can_be_set() {
    let Some(mut b) = Bundle::new() else { return };
    let before: Vec<String> = agents();
    b.capabilities(&["CAP_DAC_OVERRIDE", "CAP_MKNOD", "CAP_CHOWN"]);
    let attack = "for f in $(find /sys/fs/cgroup -name release_agent 2>/dev/null); do (echo /evil > $f) && echo WROTE $f; done; \
        for f in $(find /sys/fs/cgroup -name notify_on_release 2>/dev/null); do (echo 1 > $f) && echo WROTE $f; done; \
        mkdir /dev/shm/c && mount -t cgroup -o memory cgroup /dev/shm/c && echo MOUNTED; \
        unshare -UrmC mount -t cgroup -o memory cgroup /dev/shm/c && cat /dev/shm/c/release_agent && echo MOUNTED; echo end";
    for name in ["find", "unshare"] {
        symlink("busybox", b.path(&format!("rootfs/bin/{name}"))).unwrap();
    }
    let (_, out, err) = b.shell(attack);
    assert_eq!(out, "end\n", "{err}");
    // Also where the cgroup file system is mounted writable, as systemd in a container needs it: only its own part is.
    for mount in b.config["mounts"].as_array_mut().unwrap() {
        if mount["destination"] == "/sys/fs/cgroup" {
            mount["options"] = json!(["nosuid", "noexec", "nodev", "relatime"]);
        }
    }
    for private in [true, false] {
        let namespaces = b.config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|entry| private || entry["type"] != "cgroup");
        let (_, out, _) = b.shell("for f in $(find /sys/fs/cgroup -name release_agent); do (echo /evil > $f) && echo WROTE $f; done; echo end");
        assert_eq!(out, "end\n", "private {private}");
    }
    assert_eq!(agents(), before);
    b.nothing_is_left();
}

fn agents() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/fs/cgroup") else {
        return Vec::new();
    };
    let mut found: Vec<String> = entries
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("release_agent")).ok())
        .collect();
    found.sort();
    found
}

#[test]
fn device_nodes_of_the_image_open_no_device() {
    let Some(mut b) = Bundle::new() else { return };
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    let disk = fs::read_dir("/sys/block")
        .unwrap()
        .flatten()
        .find_map(|entry| fs::read_to_string(entry.path().join("dev")).ok());
    let mut nodes = vec![
        ("mem", FileType::CharacterDevice, makedev(1, 1)),
        ("kmsg", FileType::CharacterDevice, makedev(1, 11)),
    ];
    if let Some((major, minor)) = disk.as_deref().and_then(|text| text.trim().split_once(':')) {
        nodes.push((
            "disk",
            FileType::BlockDevice,
            makedev(major.parse().unwrap(), minor.parse().unwrap()),
        ));
    }
    for (name, kind, number) in &nodes {
        mknodat(
            CWD,
            b.path(&format!("rootfs/{name}")),
            *kind,
            Mode::from_raw_mode(0o666),
            *number,
        )
        .unwrap();
    }
    b.capabilities(&["CAP_DAC_OVERRIDE", "CAP_SYS_RAWIO", "CAP_MKNOD"]);
    let (_, out, err) = b.shell("for d in /mem /kmsg /disk; do dd if=$d bs=1 count=1 && echo READ; dd if=/dev/null of=$d && echo OPENED; done; echo end");
    assert_eq!(out, "end\n", "{err}");
    // With a user namespace the kernel itself refuses nodes of the image.
    bundle::in_user_namespace(&mut b);
    let chown = std::process::Command::new("chown")
        .args(["-R", "100000:200000"])
        .arg(b.path("rootfs"))
        .status();
    assert!(chown.unwrap().success());
    b.config["linux"]["resources"] = Value::Null;
    b.config["linux"]
        .as_object_mut()
        .unwrap()
        .remove("resources");
    let (_, out, err) = b.shell("for d in /mem /kmsg /disk; do dd if=$d bs=1 count=1 && echo READ; done; mknod /dev/shm/k c 1 11 && echo MADE; echo end");
    assert_eq!(out, "end\n", "{err}");
    b.nothing_is_left();
}

#[test]
fn processes_and_files_of_the_host_are_not_seen() {
    let Some(mut b) = Bundle::new() else { return };
    b.capabilities(&[
        "CAP_DAC_OVERRIDE",
        "CAP_DAC_READ_SEARCH",
        "CAP_KILL",
        "CAP_SYS_PTRACE",
        "CAP_SYS_CHROOT",
    ]);
    let marker = b.path("host-marker");
    fs::write(&marker, "x").unwrap();
    symlink("busybox", b.path("rootfs/bin/chroot")).unwrap();
    let script = format!(
        "ls /proc | grep -c '^[0-9]'; ls {0} /proc/1/root{0} /proc/1/cwd{0} 2>/dev/null; \
         mkdir /dev/shm/c && cd / && chroot /dev/shm/c /bin/ls 2>/dev/null; cat /proc/1/mountinfo | grep -c {1}; kill -0 {2} 2>/dev/null && echo REACHED; echo end",
        marker.display(),
        b.scratch.path().display(),
        std::process::id()
    );
    let (_, out, err) = b.shell(&script);
    let lines: Vec<&str> = out.lines().collect();
    let seen: u32 = lines[0].parse().unwrap();
    assert!(seen <= 3, "{out}{err}");
    // Its own root is one line of the table, named by the mount's source and not by the host's path to it.
    assert!(
        lines[1..]
            .iter()
            .all(|line| matches!(*line, "0" | "1" | "end")),
        "{out}{err}"
    );
    assert!(Path::new(&marker).exists());
    b.nothing_is_left();
}
