//! How streams end: input that nobody reads, terminals that are closed and opened again, logs that are rotated while they
//! are followed.

use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::daemon::has_busybox;

crate::tests!(
    input_that_nobody_reads_is_no_error,
    a_terminal_can_be_closed_and_opened_again,
    no_line_of_a_followed_log_is_lost_as_it_is_rotated,
    a_container_that_restarts_is_stopped_for_good,
);

fn input_that_nobody_reads_is_no_error() {
    let Some(daemon) = has_busybox("input_that_nobody_reads_is_no_error") else {
        return;
    };
    let much = vec![b'y'; 8 << 20];
    let one = ["run", "--rm", "-i", "busybox", "head", "-c", "3"];
    for _ in 0..5 {
        let output = daemon.docker_with(&one, &much);
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        assert_eq!(
            (output.status.code(), &*output.stdout),
            (Some(0), &b"yyy"[..])
        );
    }
    daemon.docker(&["run", "-d", "--name", "unread", "busybox", "sleep", "1000"]);
    for _ in 0..5 {
        let exec = ["exec", "-i", "unread", "sh", "-c", "echo said; exit 7"];
        let output = daemon.docker_with(&exec, &much);
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        assert_eq!(
            (output.status.code(), &*output.stdout),
            (Some(7), &b"said\n"[..])
        );
    }
    // The other way round: a client that goes with output unread ends the input.
    let mut client = daemon
        .command(&[
            "exec",
            "-i",
            "unread",
            "sh",
            "-c",
            "yes | head -c 300000; cat >/dev/null; touch /over",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let input = client.stdin.take();
    std::thread::sleep(Duration::from_millis(300));
    client.kill().unwrap();
    let _ = client.wait();
    drop((input, client));
    let begun = Instant::now();
    while !daemon
        .try_docker(&["exec", "unread", "test", "-e", "/over"])
        .status
        .success()
    {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "cat still waits for its input"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    daemon.docker(&["rm", "-f", "unread"]);
}

fn a_terminal_can_be_closed_and_opened_again() {
    let Some(daemon) = has_busybox("a_terminal_can_be_closed_and_opened_again") else {
        return;
    };
    let script =
        "echo first; exec <&- >&- 2>&-; sleep 0.5; echo later >/dev/console; exec sleep 1000";
    daemon.docker(&[
        "run", "-dt", "--name", "reopened", "busybox", "sh", "-c", script,
    ]);
    let begun = Instant::now();
    while daemon.docker(&["logs", "reopened"]) != "first\r\nlater" {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "{:?}",
            daemon.docker(&["logs", "reopened"])
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    daemon.docker(&["rm", "-f", "reopened"]);
}

fn no_line_of_a_followed_log_is_lost_as_it_is_rotated() {
    let Some(daemon) = has_busybox("no_line_of_a_followed_log_is_lost_as_it_is_rotated") else {
        return;
    };
    let options = ["--log-opt", "max-size=20k", "--log-opt", "max-file=500"];
    let script = "for n in $(seq 300); do seq $((n * 100)) $((n * 100 + 99)); done";
    daemon.docker(
        &[
            &["run", "-d", "--name", "rotated"],
            &options[..],
            &["busybox", "sh", "-c", script],
        ]
        .concat(),
    );
    let wanted: Vec<String> = (100..30_100).map(|n| n.to_string()).collect();
    let followed = daemon.docker(&["logs", "-f", "rotated"]);
    let told = daemon.docker(&["logs", "rotated"]);
    for said in [followed, told] {
        let lines: Vec<&str> = said.lines().collect();
        let missing = wanted
            .iter()
            .zip(&lines)
            .find(|(wanted, line)| wanted != line);
        assert_eq!((missing, lines.len()), (None, wanted.len()));
    }
    daemon.docker(&["rm", "-f", "rotated"]);
}

fn a_container_that_restarts_is_stopped_for_good() {
    let Some(daemon) = has_busybox("a_container_that_restarts_is_stopped_for_good") else {
        return;
    };
    for (round, how) in ["stop", "kill", "stop", "kill", "stop", "kill"]
        .iter()
        .enumerate()
    {
        let name = format!("again{round}");
        daemon.docker(&[
            "run",
            "-d",
            "--name",
            &name,
            "--restart",
            "always",
            "busybox",
            "sleep",
            "0.1",
        ]);
        std::thread::sleep(Duration::from_millis(70 + 25 * round as u64));
        let ended = daemon.try_docker(&[how, &name]);
        if !ended.status.success() {
            // It was between two runs.
            assert_eq!(*how, "kill");
            daemon.docker(&["stop", &name]);
        }
        std::thread::sleep(Duration::from_millis(400));
        let status = daemon.docker(&["inspect", "-f", "{{.State.Status}}", &name]);
        assert_eq!(status, "exited", "after {how}, round {round}");
        daemon.docker(&["rm", &name]);
    }
}
