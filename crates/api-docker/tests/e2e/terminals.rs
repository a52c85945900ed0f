//! docker's command line on a real terminal: the keys that leave a container running.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::daemon::{Daemon, eventually, has_busybox};

crate::tests! {
    detach_keys_leave_a_container_running,
    detach_keys_leave_an_attached_and_an_executed_process,
}

/// docker on a terminal of its own.
struct Session {
    keys: File,
    said: Arc<Mutex<String>>,
    child: Child,
}

impl Session {
    fn start(daemon: &Daemon, args: &[&str]) -> Session {
        let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&controller).unwrap();
        unlockpt(&controller).unwrap();
        let name = ptsname(&controller, Vec::new()).unwrap();
        let terminal = File::options()
            .read(true)
            .write(true)
            .open(name.to_str().unwrap())
            .unwrap();
        let wanted = daemon.command(args);
        // Under `timeout` in the foreground, so that docker reads the terminal.
        let mut command = Command::new("timeout");
        command.args(["--foreground", "60", "docker"]).args(args);
        for (name, value) in wanted.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let child = command
            .stdin(Stdio::from(terminal.try_clone().unwrap()))
            .stdout(Stdio::from(terminal.try_clone().unwrap()))
            .stderr(Stdio::from(terminal))
            .spawn()
            .unwrap();
        let keys = File::from(controller);
        let said: Arc<Mutex<String>> = Arc::default();
        let (mut reader, heard) = (keys.try_clone().unwrap(), said.clone());
        std::thread::spawn(move || {
            let mut buffer = [0u8; 1024];
            // A terminal that nobody holds any more answers EIO.
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..count]);
                heard.lock().unwrap().push_str(&text);
            }
        });
        Session { keys, said, child }
    }

    #[track_caller]
    fn waits_for(&self, text: &str) {
        eventually(&format!("the terminal shows {text:?}"), || {
            self.said.lock().unwrap().contains(text)
        });
    }

    fn types(&mut self, keys: &[u8]) {
        self.keys.write_all(keys).unwrap();
    }

    /// The exit code of docker.
    fn ends(mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

fn detach_keys_leave_a_container_running() {
    let Some(daemon) = has_busybox("detach keys") else {
        return;
    };
    let shell = "echo rea''dy; while read line; do echo got $line; done";
    for (name, keys, typed) in [
        ("keys-default", None, &b"\x10\x11"[..]),
        ("keys-own", Some("ctrl-x,a"), b"\x18a"),
    ] {
        let mut args = vec!["run", "-it", "--name", name];
        if let Some(keys) = keys {
            args.extend(["--detach-keys", keys]);
        }
        args.extend(["busybox", "sh", "-c", shell]);
        let mut session = Session::start(&daemon, &args);
        session.waits_for("ready");
        // Half of the keys and another is input like any other.
        session.types(&[&typed[..1], b"one\r"].concat());
        session.waits_for("got ");
        session.types(typed);
        assert_eq!(session.ends(), Some(0), "{name}");
        assert_eq!(
            daemon.docker(&["inspect", "-f", "{{.State.Running}}", name]),
            "true",
            "{name}"
        );
        // The next one to attach types to the same shell.
        let mut session = Session::start(&daemon, &["attach", "--detach-keys", "ctrl-e", name]);
        session.types(b"two\r");
        session.waits_for("got two");
        session.types(b"\x05");
        session.waits_for("read escape sequence");
        // As with dockerd: attach calls it a failure, run does not.
        assert_eq!(session.ends(), Some(1), "{name}");
        daemon.docker(&["rm", "-f", name]);
    }
    let wrong = [
        "run",
        "-t",
        "--name",
        "keys-wrong",
        "--detach-keys",
        "nokey",
    ];
    let said = daemon.docker_fails(&[&wrong[..], &["busybox", "true"]].concat());
    assert!(said.contains("received 400"), "{said}");
    daemon.docker(&["rm", "-f", "keys-wrong"]);
}

fn detach_keys_leave_an_attached_and_an_executed_process() {
    let Some(daemon) = has_busybox("exec detach keys") else {
        return;
    };
    daemon.docker(&[
        "run",
        "-d",
        "--name",
        "keys-exec",
        "busybox",
        "sleep",
        "1000",
    ]);
    let shell = "echo rea''dy; read line; echo $line > /typed; sleep 1000";
    let mut session = Session::start(
        &daemon,
        &[
            "exec",
            "-it",
            "--detach-keys",
            "ctrl-q",
            "keys-exec",
            "sh",
            "-c",
            shell,
        ],
    );
    session.waits_for("ready");
    session.types(b"word\r");
    eventually("the line was read", || {
        daemon
            .try_docker(&["exec", "keys-exec", "cat", "/typed"])
            .stdout
            == b"word\n"
    });
    session.types(b"\x11");
    session.waits_for("read escape sequence");
    session.ends();
    let processes = daemon.docker(&["top", "keys-exec"]);
    assert!(
        processes.contains("pts/") && processes.matches("sleep 1000").count() == 2,
        "the executed process went with its terminal: {processes}"
    );
    daemon.docker(&["rm", "-f", "keys-exec"]);
}
