//! `docker network …`.

use std::io::Read;
use std::time::Duration;

use crate::daemon::{eventually, has_busybox, has_docker, is_root, shared};

crate::tests! {
    networks_are_made_listed_inspected_and_removed,
    networks_that_cannot_be_are_refused,
    an_ipv6_network_carries_addresses_names_and_ports,
    a_container_in_anothers_network_asks_for_none_of_its_own,
}

fn networks_are_made_listed_inspected_and_removed() {
    if !has_docker("networks") {
        return;
    }
    if !is_root() {
        eprintln!("SKIPPED: networks: bridges need root");
        return;
    }
    let daemon = shared();
    let listed = daemon.docker(&[
        "network",
        "ls",
        "--format",
        "{{.Name}} {{.Driver}} {{.Scope}}",
    ]);
    for network in ["bridge bridge local", "host host local", "none null local"] {
        assert!(listed.contains(network), "{listed}");
    }
    let id = daemon.docker(&[
        "network",
        "create",
        "--label",
        "a=b",
        "--internal",
        "net-one",
    ]);
    assert_eq!(id.len(), 64);
    let shown = daemon.docker(&[
        "network",
        "inspect",
        "-f",
        "{{.Id}} {{.Internal}} {{(index .IPAM.Config 0).Subnet}}",
        "net-one",
    ]);
    assert!(
        shown.starts_with(&format!("{id} true ")) && shown.contains('/'),
        "{shown}"
    );
    assert_eq!(
        daemon.docker(&["network", "ls", "-q", "--no-trunc", "--filter", "label=a=b"]),
        id
    );
    assert!(
        daemon
            .docker_fails(&["network", "create", "net-one"])
            .contains("already exists")
    );
    assert_eq!(daemon.docker(&["network", "rm", "net-one"]), "net-one");
    assert!(
        daemon
            .docker_fails(&["network", "inspect", "net-one"])
            .contains("not found")
    );
    daemon.docker(&["network", "create", "net-two"]);
    assert!(
        daemon
            .docker(&["network", "prune", "-f"])
            .contains("net-two")
    );
}

fn networks_that_cannot_be_are_refused() {
    if !has_docker("networks") {
        return;
    }
    let daemon = shared();
    assert!(
        daemon
            .docker_fails(&["network", "create", "-d", "overlay", "net-bad"])
            .contains("plugin")
    );
    assert!(
        daemon
            .docker_fails(&["network", "rm", "bridge"])
            .contains("pre-defined")
    );
    assert!(
        daemon
            .docker_fails(&["network", "create", "--subnet", "10.0.0.0/99", "net-bad"])
            .contains("10.0.0.0/99")
    );
    assert!(
        daemon
            .docker_fails(&["network", "rm", "nobody"])
            .contains("not found")
    );
}

fn an_ipv6_network_carries_addresses_names_and_ports() {
    let Some(daemon) = has_busybox("ipv6") else {
        return;
    };
    if !std::path::Path::new("/proc/sys/net/ipv6").exists() {
        eprintln!("SKIPPED: ipv6: this kernel has no IPv6");
        return;
    }
    daemon.docker(&[
        "network",
        "create",
        "--ipv6",
        "--subnet",
        "fd00:be::/64",
        "--gateway",
        "fd00:be::1",
        "six",
    ]);
    let shown = daemon.docker(&[
        "network",
        "inspect",
        "-f",
        "{{.EnableIPv6}} {{json .IPAM.Config}}",
        "six",
    ]);
    assert!(
        shown.starts_with("true ") && shown.contains(r#""Subnet":"fd00:be::/64""#),
        "{shown}"
    );
    daemon.docker(&[
        "run",
        "-d",
        "--name",
        "six-web",
        "--network",
        "six",
        "--ip6",
        "fd00:be::77",
        "--network-alias",
        "web",
        "-p",
        "[::1]::8080",
        "busybox",
        "sh",
        "-c",
        "while true; do echo served | nc -l -p 8080; done",
    ]);
    assert_eq!(
        daemon.docker(&[
            "inspect",
            "-f",
            "{{with .NetworkSettings.Networks.six}}{{.GlobalIPv6Address}}/{{.GlobalIPv6PrefixLen}} {{.IPv6Gateway}}{{end}}",
            "six-web",
        ]),
        "fd00:be::77/64 fd00:be::1"
    );
    for name in ["fd00:be::77", "six-web", "web"] {
        daemon.docker(&[
            "run",
            "--rm",
            "--network",
            "six",
            "busybox",
            "ping",
            "-6",
            "-c",
            "1",
            "-w",
            "10",
            name,
        ]);
    }
    let port = daemon.docker(&["port", "six-web", "8080/tcp"]);
    assert!(port.starts_with("[::1]:"), "{port}");
    eventually("the port answers on [::1]", || {
        let Ok(mut stream) = std::net::TcpStream::connect(&port) else {
            return false;
        };
        let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
        let mut text = String::new();
        stream.read_to_string(&mut text).is_ok() && text == "served\n"
    });
    daemon.docker(&["rm", "-f", "six-web"]);
    daemon.docker(&["network", "rm", "six"]);
}

fn a_container_in_anothers_network_asks_for_none_of_its_own() {
    let Some(daemon) = has_busybox("joined network") else {
        return;
    };
    daemon.docker(&[
        "run",
        "-d",
        "--name",
        "join-host",
        "busybox",
        "sleep",
        "1000",
    ]);
    let joined = ["run", "--rm", "--network", "container:join-host"];
    for (options, why) in [
        (&["-h", "own"][..], "hostname and the network mode"),
        (&["--dns", "192.0.2.1"], "dns and the network mode"),
        (
            &["--add-host", "a:192.0.2.1"],
            "custom host-to-IP mapping and the network mode",
        ),
        (
            &["--expose", "80"],
            "port exposing and the container type network mode",
        ),
        (
            &["-p", "80"],
            "port publishing and the container type network mode",
        ),
    ] {
        let mut args = joined.to_vec();
        args.extend(options);
        args.extend(["busybox", "true"]);
        let said = daemon.docker_fails(&args);
        assert!(said.contains(why), "{options:?}: {said}");
    }
    let said = daemon.docker_fails(&[
        "run", "--rm", "--uts", "host", "-h", "own", "busybox", "true",
    ]);
    assert!(said.contains("hostname and the UTS mode"), "{said}");
    let said = daemon.docker_fails(&["network", "connect", "none", "join-host"]);
    assert!(said.contains("private (none) mode"), "{said}");
    let warned = daemon.try_docker(&[
        "run",
        "--rm",
        "--network",
        "host",
        "-p",
        "80:80",
        "busybox",
        "true",
    ]);
    assert!(warned.status.success());
    let warned = String::from_utf8_lossy(&warned.stderr);
    assert!(
        warned.contains("Published ports are discarded when using host network mode"),
        "{warned}"
    );
    let hosts = daemon.docker(&[
        "run",
        "--rm",
        "-h",
        "box.example.org",
        "busybox",
        "cat",
        "/etc/hosts",
    ]);
    assert!(hosts.ends_with("\tbox.example.org box"), "{hosts}");
    daemon.docker(&["rm", "-f", "join-host"]);
}
