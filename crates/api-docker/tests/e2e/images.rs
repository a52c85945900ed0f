//! `docker image …`, `docker import`.

use crate::daemon::{busybox_archive, has_docker, shared};

crate::tests! {
    an_imported_image_is_listed_inspected_tagged_and_removed,
    a_broken_archive_is_refused_and_leaves_nothing,
    unknown_images_are_not_found_in_dockerds_words,
    dangling_images_are_pruned,
    searching_says_that_it_is_not_there,
}

fn small_archive(content: &str) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(content.len() as u64);
    archive
        .append_data(&mut header, "file", content.as_bytes())
        .unwrap();
    archive.into_inner().unwrap()
}

fn an_imported_image_is_listed_inspected_tagged_and_removed() {
    if !has_docker("import") {
        return;
    }
    let daemon = shared();
    let archive = busybox_archive().unwrap_or_else(|| small_archive("imported"));
    let imported = daemon.docker_with(&["import", "-m", "words", "-", "img-one:v1"], &archive);
    assert!(
        imported.status.success(),
        "{}",
        String::from_utf8_lossy(&imported.stderr)
    );
    let id = String::from_utf8_lossy(&imported.stdout).trim().to_owned();
    assert!(id.starts_with("sha256:") && id.len() == 71, "{id}");
    assert_eq!(
        daemon.docker(&["images", "-q", "--no-trunc", "img-one"]),
        id
    );
    let shown = daemon.docker(&[
        "image",
        "inspect",
        "-f",
        "{{.Id}} {{.Os}} {{index .RepoTags 0}}",
        "img-one:v1",
    ]);
    assert_eq!(shown, format!("{id} linux img-one:v1"));
    let history = daemon.docker(&[
        "history",
        "--no-trunc",
        "--format",
        "{{.ID}} {{.Comment}}",
        "img-one:v1",
    ]);
    assert_eq!(history, format!("{id} words"));
    daemon.docker(&["tag", "img-one:v1", "localhost:5000/img-one:v2"]);
    let named = daemon.docker(&[
        "images",
        "--format",
        "{{.Repository}}:{{.Tag}}",
        "--filter",
        "reference=localhost:5000/*",
    ]);
    assert_eq!(named, "localhost:5000/img-one:v2");
    let removed = daemon.docker(&["rmi", "img-one:v1"]);
    assert_eq!(removed, "Untagged: img-one:v1");
    let removed = daemon.docker(&["rmi", &id[7..19]]);
    assert!(
        removed.contains("Untagged: localhost:5000/img-one:v2")
            && removed.contains("Deleted: sha256:"),
        "{removed}"
    );
    assert_eq!(daemon.docker(&["images", "-q", "img-one"]), "");
}

fn a_broken_archive_is_refused_and_leaves_nothing() {
    if !has_docker("import") {
        return;
    }
    let daemon = shared();
    let mut broken = small_archive("cut short in the middle of it all");
    broken.truncate(520);
    let imported = daemon.docker_with(&["import", "-", "img-broken"], &broken);
    assert!(!imported.status.success());
    assert!(!String::from_utf8_lossy(&imported.stderr).is_empty());
    assert_eq!(daemon.docker(&["images", "-q", "img-broken"]), "");
    let refused = daemon.docker_with(&["import", "-", "IMG/Upper"], &small_archive("x"));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("lowercase"));
}

fn unknown_images_are_not_found_in_dockerds_words() {
    if !has_docker("images") {
        return;
    }
    let daemon = shared();
    for args in [
        &["image", "inspect", "nobody"][..],
        &["history", "nobody"],
        &["rmi", "nobody"],
        &["tag", "nobody", "x"],
    ] {
        assert!(
            daemon
                .docker_fails(args)
                .to_lowercase()
                .contains("no such image: nobody"),
            "{args:?}"
        );
    }
}

fn dangling_images_are_pruned() {
    if !has_docker("images") {
        return;
    }
    let daemon = shared();
    let imported = daemon.docker_with(&["import", "-"], &small_archive("dangling"));
    let id = String::from_utf8_lossy(&imported.stdout).trim().to_owned();
    assert!(
        daemon
            .docker(&["images", "-q", "--no-trunc", "--filter", "dangling=true"])
            .contains(&id)
    );
    let pruned = daemon.docker(&["image", "prune", "-f", "--filter", "until=1s"]);
    assert!(!pruned.contains(&id), "{pruned}");
    let pruned = daemon.docker(&["image", "prune", "-f"]);
    assert!(pruned.contains(&id), "{pruned}");
}

fn searching_says_that_it_is_not_there() {
    if !has_docker("search") {
        return;
    }
    assert!(
        shared()
            .docker_fails(&["search", "debian"])
            .contains("searching is not supported")
    );
}
