//! `docker volume …`.

use crate::daemon::{has_docker, shared};

crate::tests! {
    volumes_are_made_listed_inspected_and_removed,
    volumes_of_bad_names_and_options_are_refused,
}

fn volumes_are_made_listed_inspected_and_removed() {
    if !has_docker("volumes") {
        return;
    }
    let daemon = shared();
    assert_eq!(
        daemon.docker(&["volume", "create", "--label", "a=b", "vol-one"]),
        "vol-one"
    );
    let anonymous = daemon.docker(&["volume", "create"]);
    assert_eq!(anonymous.len(), 64);
    let listed = daemon.docker(&["volume", "ls", "-q", "--filter", "label=a=b"]);
    assert_eq!(listed, "vol-one");
    let mountpoint = daemon.docker(&["volume", "inspect", "-f", "{{.Mountpoint}}", "vol-one"]);
    assert!(std::path::Path::new(&mountpoint).is_dir());
    let pruned = daemon.docker(&["volume", "prune", "-f"]);
    assert!(
        pruned.contains(&anonymous) && !pruned.contains("vol-one"),
        "{pruned}"
    );
    assert_eq!(daemon.docker(&["volume", "rm", "vol-one"]), "vol-one");
    assert!(
        daemon
            .docker_fails(&["volume", "inspect", "vol-one"])
            .contains("no such volume")
    );
    assert!(
        daemon
            .docker_fails(&["volume", "rm", "vol-one"])
            .contains("no such volume")
    );
    daemon.docker(&["volume", "rm", "-f", "vol-one"]);
    assert!(!std::path::Path::new(&mountpoint).exists());
}

fn volumes_of_bad_names_and_options_are_refused() {
    if !has_docker("volumes") {
        return;
    }
    let daemon = shared();
    assert!(
        daemon
            .docker_fails(&["volume", "create", "a/b"])
            .contains("includes invalid characters")
    );
    assert!(
        daemon
            .docker_fails(&["volume", "create", "-o", "color=red", "vol-bad"])
            .contains("invalid option")
    );
    assert!(
        daemon
            .docker_fails(&["volume", "create", "-d", "other", "vol-bad"])
            .contains("plugin")
    );
    assert!(!daemon.docker(&["volume", "ls", "-q"]).contains("vol-bad"));
}
