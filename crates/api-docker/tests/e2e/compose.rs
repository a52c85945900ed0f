//! Debian's `docker-compose` (1.29, in Python), unchanged.

use std::process::Command;

use crate::daemon::has_busybox;

crate::tests! {
    compose_brings_a_project_up_and_down,
}

fn compose_brings_a_project_up_and_down() {
    let Some(daemon) = has_busybox("compose") else {
        return;
    };
    let version = Command::new("docker-compose").arg("version").output();
    if !version.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: compose: docker-compose is not installed");
        return;
    }
    let home = tempfile::Builder::new()
        .prefix("composed")
        .tempdir()
        .unwrap();
    std::fs::write(
        home.path().join("docker-compose.yml"),
        r#"version: "3.8"
services:
  web:
    image: busybox
    command: sh -c 'while true; do echo served | nc -l -p 80; done'
    volumes: ["data:/data"]
    ports: ["127.0.0.1::80"]
  client:
    image: busybox
    command: sleep 1000
    depends_on: [web]
    environment: {A: b}
volumes:
  data:
"#,
    )
    .unwrap();
    let compose = |args: &[&str]| {
        let output = Command::new("timeout")
            .args(["100", "docker-compose", "--no-ansi", "-p", "composed"])
            .args(args)
            .current_dir(home.path())
            .env(
                "DOCKER_HOST",
                format!("unix://{}", daemon.socket().display()),
            )
            .output()
            .unwrap();
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "docker-compose {args:?}: {text}");
        text
    };
    compose(&["up", "-d"]);
    let listed = compose(&["ps"]);
    assert!(listed.contains("web") && listed.contains("Up"), "{listed}");
    let served = compose(&[
        "exec",
        "-T",
        "client",
        "sh",
        "-c",
        "nc -w 5 web 80 </dev/null",
    ]);
    assert!(served.contains("served"), "{served}");
    // Nothing has changed, so nothing is made anew.
    let again = compose(&["up", "-d"]);
    assert!(
        again.contains("up-to-date") || again.contains("Running"),
        "{again}"
    );
    compose(&["logs", "web"]);
    // What has changed is made anew, with its volume.
    compose(&["exec", "-T", "web", "sh", "-c", "echo kept > /data/file"]);
    compose(&["up", "-d", "--force-recreate", "-t", "0", "web"]);
    assert!(
        compose(&["exec", "-T", "web", "cat", "/data/file"]).contains("kept"),
        "the volume is another"
    );
    compose(&["up", "-d", "-t", "0", "--scale", "client=2"]);
    assert!(compose(&["ps"]).contains("client_2"));
    assert!(compose(&["run", "--rm", "-T", "client", "echo", "ran"]).contains("ran"));
    compose(&["pause", "client"]);
    compose(&["unpause", "client"]);
    assert!(compose(&["top", "client"]).contains("sleep"));
    assert!(compose(&["port", "web", "80"]).contains("127.0.0.1:"));
    compose(&["stop", "-t", "0"]);
    compose(&["start"]);
    compose(&["restart", "-t", "0"]);
    compose(&["down", "-v", "-t", "0"]);
    assert_eq!(
        daemon.docker(&[
            "ps",
            "-aq",
            "--filter",
            "label=com.docker.compose.project=composed"
        ]),
        ""
    );
    assert_eq!(
        daemon.docker(&["volume", "ls", "-q", "--filter", "name=composed_data"]),
        ""
    );
}
