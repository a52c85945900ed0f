//! What the daemon fetches itself: contexts and archives by their address, and what a registry says of a name.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::daemon::{busybox_archive, has_busybox};
use crate::images::Registry;

crate::tests! {
    images_are_imported_from_an_address,
    contexts_are_built_from_an_address,
    contexts_are_built_from_a_git_repository,
    a_registry_tells_of_a_name_without_a_pull,
}

/// The files of a folder by HTTP on the loopback interface; ends with its value.
struct Files {
    address: String,
    stop: Arc<AtomicBool>,
}

impl Files {
    fn serve(root: &Path) -> Files {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let stop = Arc::new(AtomicBool::new(false));
        let (root, stopped) = (root.to_owned(), stop.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let root = root.clone();
                std::thread::spawn(move || answer(stream, &root));
            }
        });
        Files { address, stop }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.address)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(&self.address);
    }
}

fn answer(stream: TcpStream, root: &Path) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut request = String::new();
    let _ = reader.read_line(&mut request);
    let mut line = String::new();
    while reader.read_line(&mut line).is_ok_and(|count| count > 2) {
        line.clear();
    }
    let path = request.split(' ').nth(1).unwrap_or_default();
    let path: PathBuf = path
        .split('?')
        .next()
        .unwrap_or_default()
        .trim_start_matches('/')
        .into();
    let (status, body) = match std::fs::read(root.join(path)) {
        Ok(body) => ("200 OK", body),
        Err(_) => ("404 Not Found", Vec::new()),
    };
    let mut stream = stream;
    let _ = write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let _ = stream.write_all(&body);
}

fn images_are_imported_from_an_address() {
    let Some(daemon) = has_busybox("import-url") else {
        return;
    };
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("root.tar"), busybox_archive().unwrap()).unwrap();
    let files = Files::serve(home.path());
    daemon.docker(&["import", &files.url("root.tar"), "fetched:1"]);
    assert_eq!(
        daemon.docker(&["run", "--rm", "fetched:1", "echo", "runs"]),
        "runs"
    );
    daemon.docker(&["rmi", "fetched:1"]);
    let error = daemon.docker_fails(&["import", &files.url("nothing.tar"), "fetched:2"]);
    assert!(error.contains("404"), "{error}");
    let (head, body) = daemon.post("/images/create?fromSrc=ftp%3A%2F%2F127.0.0.1%2Fx", "");
    assert!(
        head.starts_with("HTTP/1.1 400") && body.contains("only http"),
        "{head} {body}"
    );
}

/// `POST /build?remote=…`: the docker command line fetches addresses itself, other clients leave it to the daemon.
fn build(daemon: &crate::daemon::Daemon, remote: &str, tag: &str) -> (String, String) {
    let escaped: String = remote
        .bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'-' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect();
    daemon.post(&format!("/v1.41/build?t={tag}&remote={escaped}"), "")
}

fn contexts_are_built_from_an_address() {
    let Some(daemon) = has_busybox("build-url") else {
        return;
    };
    let home = tempfile::tempdir().unwrap();
    let dockerfile = "FROM busybox\nRUN echo built > /built\nCMD [\"cat\", \"/built\"]\n";
    std::fs::write(home.path().join("alone"), dockerfile).unwrap();
    let mut archive = tar::Builder::new(Vec::new());
    for (name, text) in [
        (
            "Dockerfile",
            "FROM busybox\nCOPY file /file\nCMD [\"cat\", \"/file\"]\n",
        ),
        ("file", "from the archive"),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        archive
            .append_data(&mut header, name, text.as_bytes())
            .unwrap();
    }
    std::fs::write(
        home.path().join("context.tar"),
        archive.into_inner().unwrap(),
    )
    .unwrap();
    std::fs::write(home.path().join("garbage"), [0xffu8; 4096]).unwrap();
    let files = Files::serve(home.path());
    for (file, tag, said) in [
        ("alone", "remote:alone", "built"),
        ("context.tar", "remote:archive", "from the archive"),
    ] {
        let (head, body) = build(&daemon, &files.url(file), tag);
        assert!(
            head.starts_with("HTTP/1.1 200") && body.contains("Successfully built"),
            "{head}\n{body}"
        );
        assert_eq!(daemon.docker(&["run", "--rm", tag]), said);
        daemon.docker(&["rmi", tag]);
    }
    let (head, body) = build(&daemon, &files.url("garbage"), "remote:garbage");
    assert!(head.starts_with("HTTP/1.1 400"), "{head}");
    assert!(body.contains("neither an archive"), "{body}");
    let (head, body) = build(&daemon, &files.url("nothing"), "remote:nothing");
    assert!(head.starts_with("HTTP/1.1 404"), "{head} {body}");
    let (head, body) = build(&daemon, "nonsense", "remote:nonsense");
    assert!(
        head.starts_with("HTTP/1.1 400") && body.contains("nonsense"),
        "{body}"
    );
}

fn contexts_are_built_from_a_git_repository() {
    let Some(daemon) = has_busybox("build-git") else {
        return;
    };
    let home = tempfile::tempdir().unwrap();
    let work = home.path().join("work");
    std::fs::create_dir_all(work.join("sub")).unwrap();
    std::fs::write(
        work.join("sub/Dockerfile"),
        "FROM busybox\nCOPY . /context\nCMD [\"ls\", \"-A\", \"/context\"]\n",
    )
    .unwrap();
    std::fs::write(work.join("sub/file"), "x").unwrap();
    let git = |folder: &Path, args: &[&str]| {
        Command::new("git")
            .args([
                "-c",
                "user.name=t",
                "-c",
                "user.email=t@t",
                "-c",
                "init.defaultBranch=main",
            ])
            .args(args)
            .current_dir(folder)
            .env("HOME", home.path())
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .output()
    };
    if git(&work, &["init", "-q"]).is_err() {
        eprintln!("SKIPPED: build-git: git is not installed");
        return;
    }
    for args in [
        &["add", "-A"][..],
        &["commit", "-q", "-m", "one"],
        &["tag", "v1"],
        &["clone", "-q", "--bare", ".", "../repository.git"],
    ] {
        let output = git(&work, args).unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
    }
    git(&home.path().join("repository.git"), &["update-server-info"]).unwrap();
    let files = Files::serve(home.path());
    for reference in ["v1:sub", ":sub"] {
        let address = format!("{}#{reference}", files.url("repository.git"));
        let (head, body) = build(&daemon, &address, "remote:git");
        assert!(
            head.starts_with("HTTP/1.1 200") && body.contains("Successfully built"),
            "{head}\n{body}"
        );
        assert_eq!(
            daemon.docker(&["run", "--rm", "remote:git"]),
            "Dockerfile\nfile"
        );
        daemon.docker(&["rmi", "remote:git"]);
    }
    let address = format!("{}#nothing", files.url("repository.git"));
    let (head, body) = build(&daemon, &address, "remote:git");
    assert!(
        head.starts_with("HTTP/1.1 400") && body.contains("git: "),
        "{head} {body}"
    );
    let address = format!("{}#v1:../..", files.url("repository.git"));
    let (head, body) = build(&daemon, &address, "remote:git");
    assert!(
        head.starts_with("HTTP/1.1 400") && body.contains("no folder of the repository"),
        "{head} {body}"
    );
    assert!(
        !daemon
            .home
            .path()
            .join("state/tmp")
            .read_dir()
            .is_ok_and(|mut folder| folder.next().is_some()),
        "a context is left"
    );
}

fn a_registry_tells_of_a_name_without_a_pull() {
    let Some(registry) = Registry::start("distribution") else {
        return;
    };
    let Some(daemon) = has_busybox("distribution") else {
        return;
    };
    let name = format!("{}/told/one:v1", registry.address);
    daemon.docker(&["tag", "busybox", &name]);
    let pushed = daemon.docker(&["push", &name]);
    let digest = pushed
        .split_whitespace()
        .find(|word| word.starts_with("sha256:"))
        .unwrap()
        .to_owned();
    daemon.docker(&["rmi", &name]);
    let (head, body) = daemon.get(&format!("/distribution/{name}/json"));
    assert!(head.starts_with("HTTP/1.1 200"), "{head} {body}");
    let json: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(json["Descriptor"]["digest"], digest);
    assert!(json["Descriptor"]["size"].as_u64().unwrap() > 0);
    assert_eq!(json["Platforms"][0]["os"], "linux");
    let (head, _) = daemon.get(&format!("/distribution/{}/none/json", registry.address));
    assert!(head.starts_with("HTTP/1.1 404"), "{head}");
    assert!(
        !daemon
            .docker(&["images", "--format", "{{.Repository}}"])
            .contains("/told/one"),
        "asking pulled it"
    );
}
