//! The host goes down with machines on it. The guests are Debian's kernel with busybox, and one that hears no button.

mod guest;
mod host;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use guest::{import_idle, inspect, logs, start_tiny_machine, start_with_tiny, type_line};

#[test]
fn when_the_host_goes_down_guests_are_shut_down_and_come_back_as_their_policies_say() {
    let Some(mut host) = start_with_tiny(&[]) else {
        return;
    };
    import_idle(&host);
    // From here on systemd seems to have booted this host; what it says of itself is in a file.
    host.end_daemon();
    let folder = host.scratch().join("systemd");
    let says = folder.join("says");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(&says, "running\n").unwrap();
    let program = folder.join("systemctl");
    std::fs::write(&program, format!("#!/bin/sh\ncat {}\n", says.display())).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    host.systemd = Some(folder);
    let config = host.state().join("berth.toml");
    std::fs::write(config, "[machines]\nstop-timeout = 30\n").unwrap();
    host.start_daemon();

    start_tiny_machine(&host, "again", &["--restart", "on-failure"]);
    start_tiny_machine(&host, "once", &[]);
    host.ok(&[
        "machine",
        "create",
        "deaf",
        "--start",
        "--image",
        "idle",
        "--memory",
        "64M",
        "--disk",
        "128M",
        "--cpu",
        "soft",
        "--restart",
        "unless-stopped",
    ]);
    for name in ["again", "once"] {
        type_line(
            &host,
            name,
            "insmod /modules/button.ko; insmod /modules/evdev.ko; sleep 1; \
             (head -c 1 /dev/input/event0 >/dev/null; echo BUT''TON; sync; poweroff -f) & echo LIS''TENS",
        );
        host.eventually("it listens", || logs(&host, name).contains("LISTENS"));
    }
    let names = ["again", "once", "deaf"];
    let before = names.map(|name| inspect(&host, name));
    let process = |shown: &serde_json::Value| format!("/proc/{}", shown["pid"]);
    let exit = |shown: &serde_json::Value| {
        let file = Path::new(shown["folder"].as_str().unwrap()).join("run/exit.json");
        std::fs::read_to_string(file).unwrap()
    };

    // The daemon's end alone ends no machine.
    host.end_daemon();
    assert!(
        before
            .iter()
            .all(|shown| Path::new(&process(shown)).exists())
    );
    host.start_daemon();

    std::fs::write(&says, "stopping\n").unwrap();
    let begun = Instant::now();
    host.end_daemon();
    assert!(
        begun.elapsed() >= Duration::from_secs(30),
        "the deaf one has its time"
    );
    for shown in &before {
        assert!(!Path::new(&process(shown)).exists(), "{shown}");
    }
    for shown in &before[..2] {
        let console = Path::new(shown["folder"].as_str().unwrap()).join("run/console.log");
        assert!(std::fs::read_to_string(console).unwrap().contains("BUTTON"));
        assert!(exit(shown).contains("power-off"), "{}", exit(shown));
    }
    assert!(exit(&before[2]).contains("killed"), "{}", exit(&before[2]));
    assert!(
        host.log().contains("it did not power off within 30 s"),
        "{}",
        host.log()
    );

    std::fs::write(&says, "running\n").unwrap();
    host.start_daemon();
    for name in ["again", "deaf"] {
        host.eventually("it runs again", || {
            inspect(&host, name)["state"] == "running"
        });
    }
    let once = inspect(&host, "once");
    assert_eq!(once["state"], "stopped");
    assert_eq!(once["last_exit"]["reason"], "power-off");
    assert_eq!(once["last_exit"]["message"], "the host went down");
    // The guest found its file system as it had synced it.
    host.eventually("the guest is ready again", || {
        logs(&host, "again").matches("READY").count() == 2
    });
    assert!(logs(&host, "again").contains("STAMP-FOUND precious"));
}
