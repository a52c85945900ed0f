//! `docker network …`.

use crate::daemon::{has_docker, is_root, shared};

crate::tests! {
    networks_are_made_listed_inspected_and_removed,
    networks_that_cannot_be_are_refused,
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
