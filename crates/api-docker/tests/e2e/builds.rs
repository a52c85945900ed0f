//! `docker build` with the classic builder: every option that changes what is built.

use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};

use crate::daemon::{Daemon, has_busybox};

crate::tests! {
    what_a_build_is_given_reaches_its_steps,
    a_build_takes_its_dockerfile_and_context_from_standard_input,
    stages_labels_and_the_cache_are_chosen,
    what_a_build_cannot_be_given_is_refused,
    an_entry_point_of_the_base_image_is_cleared,
}

/// A context with one Dockerfile.
fn context(dockerfile: &str) -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("Dockerfile"), dockerfile).unwrap();
    home
}

/// `docker build ARGS` in a folder, with bytes as its input.
#[track_caller]
fn try_build(daemon: &Daemon, folder: &Path, args: &[&str], input: &[u8]) -> Output {
    let mut command = daemon.command(&["build"]);
    let mut child = command
        .args(args)
        .current_dir(folder)
        .env("DOCKER_BUILDKIT", "0")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A client that reads nothing of it is no failure.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

/// [`try_build`] that must succeed; its output.
#[track_caller]
fn build(daemon: &Daemon, folder: &Path, args: &[&str], input: &[u8]) -> String {
    let output = try_build(daemon, folder, args, input);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "docker build {args:?}: {said}");
    String::from_utf8_lossy(&output.stdout)
        .trim_end()
        .to_owned()
}

/// [`try_build`] that must fail; its exit code and what it said.
#[track_caller]
fn build_fails(daemon: &Daemon, folder: &Path, args: &[&str], input: &[u8]) -> (i32, String) {
    let output = try_build(daemon, folder, args, input);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "docker build {args:?} succeeded");
    (output.status.code().unwrap(), said)
}

fn what_a_build_is_given_reaches_its_steps() {
    let Some(daemon) = has_busybox("build options") else {
        return;
    };
    let home = context(
        "FROM busybox\nARG WORD=none\nRUN ulimit -Sn > /n; ulimit -Hn >> /n; ip -o link | wc -l > /links; \
         cp /etc/hosts /seen; df -k /dev/shm | tail -1 > /shm; echo $WORD > /word\nCMD cat /n /links /word\n",
    );
    let options = [
        "-q",
        "-t",
        "given:one",
        "--ulimit",
        "nofile=111:222",
        "--network",
        "none",
        "--add-host",
        "friend:192.0.2.7",
        "--shm-size",
        "2m",
        "--build-arg",
        "WORD=said",
        ".",
    ];
    build(&daemon, home.path(), &options, b"");
    assert_eq!(
        daemon.docker(&["run", "--rm", "given:one"]),
        "111\n222\n1\nsaid"
    );
    let seen = daemon.docker(&["run", "--rm", "given:one", "cat", "/seen", "/shm"]);
    assert!(seen.contains("192.0.2.7\tfriend"), "{seen}");
    assert_eq!(
        seen.lines()
            .last()
            .and_then(|l| l.split_whitespace().nth(1)),
        Some("2048"),
        "{seen}"
    );
    let said = build(
        &daemon,
        home.path(),
        &["--build-arg", "STRANGE=1", "."],
        b"",
    );
    assert!(
        said.contains("[Warning] One or more build-args [STRANGE] were not consumed"),
        "{said}"
    );
    daemon.docker(&["rmi", "-f", "given:one"]);
}

fn a_build_takes_its_dockerfile_and_context_from_standard_input() {
    let Some(daemon) = has_busybox("build -") else {
        return;
    };
    let home = context("FROM busybox\nCMD echo of the context\n");
    std::fs::write(home.path().join("file"), "content\n").unwrap();
    // A Dockerfile alone.
    let text = b"FROM busybox\nRUN echo alone > /made\nCMD cat /made\n";
    build(
        &daemon,
        home.path(),
        &["-q", "-t", "stdin:alone", "-"],
        text,
    );
    assert_eq!(daemon.docker(&["run", "--rm", "stdin:alone"]), "alone");
    // A Dockerfile beside a context: the client's archive ends right behind the last file then.
    let text = b"FROM busybox\nCOPY file /copied\nCMD cat /copied\n";
    build(
        &daemon,
        home.path(),
        &["-q", "-t", "stdin:beside", "-f", "-", "."],
        text,
    );
    assert_eq!(daemon.docker(&["run", "--rm", "stdin:beside"]), "content");
    // A whole context as an archive, plain and compressed.
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_dir_all(".", home.path()).unwrap();
    let archive = archive.into_inner().unwrap();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&archive).unwrap();
    for bytes in [archive, gzip.finish().unwrap()] {
        build(
            &daemon,
            home.path(),
            &["-q", "-t", "stdin:whole", "-"],
            &bytes,
        );
        assert_eq!(
            daemon.docker(&["run", "--rm", "stdin:whole"]),
            "of the context"
        );
    }
    daemon.docker(&["rmi", "-f", "stdin:alone", "stdin:beside", "stdin:whole"]);
}

fn stages_labels_and_the_cache_are_chosen() {
    let Some(daemon) = has_busybox("build stages") else {
        return;
    };
    let home = context(
        "FROM busybox AS one\nRUN cat /proc/sys/kernel/random/uuid > /unique\nCMD cat /unique\nFROM one AS two\nLABEL x=y\nCMD echo two\n",
    );
    let id_file = home.path().join("id");
    let id_text = id_file.display().to_string();
    let first = build(
        &daemon,
        home.path(),
        &["-q", "--target", "one", "--iidfile", &id_text, "."],
        b"",
    );
    assert!(first.starts_with("sha256:") && first.len() == 71, "{first}");
    assert_eq!(std::fs::read_to_string(&id_file).unwrap().trim(), first);
    let again = build(&daemon, home.path(), &["-q", "--target", "one", "."], b"");
    assert_eq!(again, first, "the cache was not used");
    let unique = daemon.docker(&["run", "--rm", &first]);
    let anew = build(
        &daemon,
        home.path(),
        &["-q", "--no-cache", "--target", "one", "."],
        b"",
    );
    assert_ne!(
        daemon.docker(&["run", "--rm", &anew]),
        unique,
        "the cache was used"
    );
    let whole = build(
        &daemon,
        home.path(),
        &["-q", "--label", "l=1", "--label", "x=z", "."],
        b"",
    );
    assert_eq!(daemon.docker(&["run", "--rm", &whole]), "two");
    assert_eq!(
        daemon.docker(&["inspect", "-f", "{{json .Config.Labels}}", &whole]),
        r#"{"l":"1","x":"z"}"#
    );
    daemon.docker(&["rmi", "-f", &whole, &first, &anew]);
}

fn what_a_build_cannot_be_given_is_refused() {
    let Some(daemon) = has_busybox("build refusals") else {
        return;
    };
    let home = context("FROM busybox\nRUN exit 3\n");
    let (code, said) = build_fails(&daemon, home.path(), &["."], b"");
    assert_eq!(code, 3, "the step's own code is the client's: {said}");
    for (args, why) in [
        (&["--target", "nosuch", "."][..], "nosuch"),
        (&["--ulimit", "bogus=1", "."], "ulimit"),
        (
            &["--platform", "bogus", "."],
            "unknown operating system or architecture",
        ),
        (&["--network", "nowhere", "."], "nowhere"),
        (&["--isolation", "hyperv", "."], "isolation"),
        (&["--security-opt", "x=y", "."], "security options"),
        (&["-t", "BAD", "."], "lower"),
        (&["-m", "4m", "."], "Minimum memory limit"),
    ] {
        let (code, said) = build_fails(&daemon, home.path(), args, b"");
        assert!(code != 0 && said.contains(why), "{args:?}: {said}");
    }
    for (text, why) in [
        (&b"FROM busybox\nBOGUS x\n"[..], "unknown instruction"),
        (b"RUN x\n", "FROM"),
        (b"FROM busybox\nCOPY nosuch /\n", "nosuch"),
        (b"FROM scratch\n", "No image was generated"),
    ] {
        let (_, said) = build_fails(&daemon, home.path(), &["-"], text);
        assert!(said.contains(why), "{said}");
        assert!(!said.contains("Dockerfile: Dockerfile"), "{said}");
    }
}

fn an_entry_point_of_the_base_image_is_cleared() {
    let Some(daemon) = has_busybox("build entry point") else {
        return;
    };
    let home = tempfile::tempdir().unwrap();
    let base = b"FROM busybox\nENTRYPOINT [\"cat\"]\nCMD [\"/nosuch\"]\nONBUILD ENTRYPOINT []\n";
    build(&daemon, home.path(), &["-q", "-t", "entry:base", "-"], base);
    assert_eq!(
        daemon.docker(&["inspect", "-f", "{{.Config.OnBuild}}", "entry:base"]),
        "[ENTRYPOINT []]"
    );
    let said = build(
        &daemon,
        home.path(),
        &["-t", "entry:none", "-"],
        b"FROM entry:base\nENTRYPOINT [\"false\"]\nENTRYPOINT []\nCMD [\"echo\", \"free\"]\n",
    );
    assert!(said.contains(" : ENTRYPOINT []\n"), "{said}");
    assert_eq!(daemon.docker(&["run", "--rm", "entry:none"]), "free");
    daemon.docker(&["rmi", "-f", "entry:none", "entry:base"]);
}
