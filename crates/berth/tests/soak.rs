//! Many containers in a loop: what must not be left behind, and what must not hold up others.
//!
//! `BERTH_SOAK=300 BERTH_SOAK_AT_ONCE=100` is the full load; `make test` takes a small one.

mod host;

use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use host::footprint::{Footprint, cgroup_parent, keeper_pid, memory, number};
use host::{Host, start};

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
    host.serve_page("guarded", "127.0.0.1:8099:80", &[]);
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
