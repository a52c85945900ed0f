//! `docker image …`, `docker import`.

use std::io::Write;
use std::process::{Child, Command, Stdio};

use crate::daemon::{busybox_archive, eventually, has_busybox, has_docker, shared};

crate::tests! {
    an_imported_image_is_listed_inspected_tagged_and_removed,
    a_broken_archive_is_refused_and_leaves_nothing,
    unknown_images_are_not_found_in_dockerds_words,
    dangling_images_are_pruned,
    searching_says_that_it_is_not_there,
    images_go_to_a_registry_and_come_back,
    a_login_opens_a_registry_until_the_logout,
    images_are_saved_and_loaded,
    a_dockerfile_is_built_with_its_cache,
    a_build_that_fails_says_where,
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

/// Debian's `docker-registry` on a free port of the loopback interface; ends with its value.
pub struct Registry {
    process: Child,
    pub address: String,
    _home: tempfile::TempDir,
}

impl Registry {
    pub fn start(test: &str) -> Option<Registry> {
        Registry::with(test, None)
    }

    /// One that lets in only those whom a file of `htpasswd -B` names.
    fn with(test: &str, passwords: Option<&str>) -> Option<Registry> {
        let home = tempfile::tempdir().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let address = format!("127.0.0.1:{port}");
        let config = home.path().join("config.yml");
        let root = home.path().join("root");
        let mut text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {address}}}\n",
            root.display()
        );
        if let Some(passwords) = passwords {
            let file = home.path().join("passwords");
            std::fs::write(&file, passwords).unwrap();
            text.push_str(&format!(
                "auth: {{htpasswd: {{realm: test, path: {}}}}}\n",
                file.display()
            ));
        }
        std::fs::write(&config, text).unwrap();
        let started = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(process) = started else {
            eprintln!("SKIPPED: {test}: docker-registry is not installed");
            return None;
        };
        eventually("the registry listens", || {
            std::net::TcpStream::connect(&address).is_ok()
        });
        Some(Registry {
            process,
            address,
            _home: home,
        })
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn images_go_to_a_registry_and_come_back() {
    if !has_docker("push") {
        return;
    }
    let Some(registry) = Registry::start("push") else {
        return;
    };
    let daemon = shared();
    let archive = small_archive(&"to the registry and back ".repeat(10_000));
    let name = format!("{}/app/one:v1", registry.address);
    let imported = daemon.docker_with(&["import", "-", &name], &archive);
    let id = String::from_utf8_lossy(&imported.stdout).trim().to_owned();
    let pushed = daemon.docker(&["push", &name]);
    assert!(
        pushed.contains("Pushed") && pushed.contains("v1: digest: sha256:"),
        "{pushed}"
    );
    let again = daemon.docker(&["push", &name]);
    assert!(again.contains("Layer already exists"), "{again}");
    daemon.docker(&["rmi", "-f", &id]);
    let pulled = daemon.docker(&["pull", &name]);
    assert!(
        pulled.contains(&format!("Status: Downloaded newer image for {name}")),
        "{pulled}"
    );
    assert_eq!(daemon.docker(&["images", "-q", "--no-trunc", &name]), id);
    let digests = daemon.docker(&["image", "inspect", "-f", "{{index .RepoDigests 0}}", &name]);
    assert!(digests.contains("/app/one@sha256:"), "{digests}");
    assert!(
        daemon
            .docker(&["pull", &name])
            .contains("Image is up to date")
    );
    let unknown = format!("{}/app/two", registry.address);
    let error = daemon.docker_fails(&["pull", &unknown]);
    assert!(
        error.contains("not found") || error.contains("unknown"),
        "{error}"
    );
    assert!(
        daemon
            .docker_fails(&["push", &unknown])
            .contains("An image does not exist locally with the tag")
    );
    assert!(
        daemon
            .docker_fails(&["pull", "127.0.0.1:1/none"])
            .contains("127.0.0.1:1")
    );
    let login = daemon.docker_with(
        &["login", "-u", "me", "--password-stdin", &registry.address],
        b"secret",
    );
    assert!(
        login.status.success(),
        "{}",
        String::from_utf8_lossy(&login.stderr)
    );
    daemon.docker(&["rmi", &name]);
}

fn a_login_opens_a_registry_until_the_logout() {
    /// `user` and `secret`, as `htpasswd -B` writes them.
    const PASSWORDS: &str = "user:$2y$05$dZoTMBlMmUFnhyn2G82aTO4kP5vF1TSQXEEjX.nXOulron.Y.kVwC\n";
    if !has_docker("login") {
        return;
    }
    let Some(registry) = Registry::with("login", Some(PASSWORDS)) else {
        return;
    };
    let daemon = shared();
    let name = format!("{}/private:1", registry.address);
    let imported = daemon.docker_with(&["import", "-", &name], &small_archive("private"));
    assert!(imported.status.success());
    let refused = |what: &[&str]| {
        let said = daemon.docker_fails(what);
        assert!(
            said.contains("no basic auth credentials") || said.contains("refused access"),
            "{what:?}: {said}"
        );
    };
    refused(&["push", &name]);
    let login = |password: &[u8]| {
        daemon.docker_with(
            &["login", "-u", "user", "--password-stdin", &registry.address],
            password,
        )
    };
    let wrong = login(b"wrong");
    assert!(!wrong.status.success(), "{wrong:?}");
    refused(&["push", &name]);
    let right = login(b"secret");
    assert!(
        right.status.success()
            && String::from_utf8_lossy(&right.stdout).contains("Login Succeeded"),
        "{right:?}"
    );
    let pushed = daemon.docker(&["push", &name]);
    assert!(pushed.contains("1: digest: sha256:"), "{pushed}");
    daemon.docker(&["rmi", &name]);
    daemon.docker(&["pull", &name]);
    // A build's base image is pulled with the same credentials.
    daemon.docker(&["rmi", &name]);
    let mut build = daemon.command(&["build", "-q", "-"]);
    build.env("DOCKER_BUILDKIT", "0").stdin(Stdio::piped());
    let mut build = build.stdout(Stdio::null()).spawn().unwrap();
    let text = format!("FROM {name}\nLABEL built=here\n");
    build
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    assert!(build.wait().unwrap().success());
    let gone = daemon.docker(&["logout", &registry.address]);
    assert!(gone.contains("Removing login credentials"), "{gone}");
    refused(&["pull", &name]);
    refused(&["push", &name]);
    daemon.docker(&["rmi", "-f", &name]);
}

fn images_are_saved_and_loaded() {
    if !has_docker("save") {
        return;
    }
    let daemon = shared();
    let imported = daemon.docker_with(&["import", "-", "saved:one"], &small_archive("saved"));
    let id = String::from_utf8_lossy(&imported.stdout).trim().to_owned();
    let saved = daemon.try_docker(&["save", "saved:one"]);
    assert!(
        saved.status.success(),
        "{}",
        String::from_utf8_lossy(&saved.stderr)
    );
    daemon.docker(&["rmi", "saved:one"]);
    let loaded = daemon.docker_with(&["load"], &saved.stdout);
    assert_eq!(
        String::from_utf8_lossy(&loaded.stdout).trim(),
        "Loaded image: saved:one"
    );
    assert_eq!(daemon.docker(&["images", "-q", "--no-trunc", "saved"]), id);
    daemon.docker(&["rmi", "saved:one"]);
    let broken = daemon.docker_with(&["load"], &saved.stdout[..saved.stdout.len() / 2]);
    assert!(!broken.status.success());
    assert_eq!(daemon.docker(&["images", "-q", "saved"]), "");
    assert!(
        daemon
            .docker_fails(&["save", "nobody"])
            .to_lowercase()
            .contains("no such image")
    );
}

fn build(
    daemon: &crate::daemon::Daemon,
    folder: &std::path::Path,
    args: &[&str],
) -> std::process::Output {
    let folder = folder.display().to_string();
    let mut all = vec!["build"];
    all.extend_from_slice(args);
    all.push(&folder);
    daemon
        .command(&all)
        .env("DOCKER_BUILDKIT", "0")
        .output()
        .unwrap()
}

fn a_dockerfile_is_built_with_its_cache() {
    let Some(daemon) = has_busybox("build") else {
        return;
    };
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("Dockerfile"), "FROM busybox AS first\nARG WORD=none\nCOPY file /copied\nRUN echo $WORD > /word\nFROM busybox\nLABEL a=b\nCOPY --from=first /word /copied /\nWORKDIR /\nCMD [\"cat\", \"/word\", \"/copied\"]\n").unwrap();
    std::fs::write(home.path().join("file"), "content\n").unwrap();
    std::fs::write(home.path().join("ignored"), "x").unwrap();
    std::fs::write(home.path().join(".dockerignore"), "ignored\n").unwrap();
    let output = build(
        &daemon,
        home.path(),
        &[
            "-t",
            "built:one",
            "--build-arg",
            "WORD=given",
            "--label",
            "c=d",
        ],
    );
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        text.contains("Successfully built ") && text.contains("Successfully tagged built:one"),
        "{text}"
    );
    assert_eq!(
        daemon.docker(&["run", "--rm", "built:one"]),
        "given\ncontent"
    );
    assert_eq!(
        daemon.docker(&[
            "image",
            "inspect",
            "-f",
            "{{json .Config.Labels}}",
            "built:one"
        ]),
        r#"{"a":"b","c":"d"}"#
    );
    let id = daemon.docker(&["images", "-q", "--no-trunc", "built:one"]);
    let output = build(
        &daemon,
        home.path(),
        &["-q", "--build-arg", "WORD=given", "--label", "c=d"],
    );
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        id,
        "the cache was not used"
    );
    daemon.docker(&["rmi", "built:one"]);
}

fn a_build_that_fails_says_where() {
    let Some(daemon) = has_busybox("build") else {
        return;
    };
    let home = tempfile::tempdir().unwrap();
    std::fs::write(
        home.path().join("Dockerfile"),
        "FROM busybox\nRUN echo before; exit 3\n",
    )
    .unwrap();
    let output = build(&daemon, home.path(), &["-t", "failed"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(error.contains("returned a non-zero code: 3"), "{error}");
    assert_eq!(daemon.docker(&["images", "-q", "failed"]), "");
    std::fs::write(home.path().join("Dockerfile"), "FORM busybox\n").unwrap();
    assert!(!build(&daemon, home.path(), &[]).status.success());
    assert!(
        !build(&daemon, home.path(), &["-f", "missing"])
            .status
            .success()
    );
}
