//! The same Dockerfiles built here and by buildah, of the same base image: files with their owners, modes, links and
//! times, and the configuration, must be the same.

mod host;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use host::{Host, start};
use serde_json::{Value, json};

/// What a file system says of one path, as text: kind, mode, owner, link target or content, and its time where the
/// build has no say in it.
type Tree = BTreeMap<String, String>;

/// Times of what was copied are those of the context; of the rest, those of the build.
fn is_timed(path: &str) -> bool {
    path.starts_with("copied/") || path.starts_with("unpacked/")
}

fn tree(tar: &[u8]) -> Tree {
    let mut archive = tar::Archive::new(tar);
    let mut tree = Tree::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let path = path
            .trim_start_matches("./")
            .trim_end_matches('/')
            .to_owned();
        // Mounted over while a step runs, by each engine in its own way.
        let mounted = [
            "dev",
            "proc",
            "sys",
            "run",
            "etc/hosts",
            "etc/resolv.conf",
            "etc/hostname",
        ];
        if path.is_empty()
            || mounted.iter().any(|m| {
                path.strip_prefix(m)
                    .is_some_and(|r| r.is_empty() || r.starts_with('/'))
            })
        {
            continue;
        }
        let header = entry.header().clone();
        let kind = header.entry_type();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        let link = entry
            .link_name_bytes()
            .map(|name| {
                String::from_utf8_lossy(&name)
                    .trim_start_matches("./")
                    .to_owned()
            })
            .unwrap_or_default();
        let mut text = format!(
            "{kind:?} {:o} {}:{} {link} {}",
            header.mode().unwrap() & 0o7777,
            header.uid().unwrap(),
            header.gid().unwrap(),
            if content.len() < 200 {
                String::from_utf8_lossy(&content).into_owned()
            } else {
                format!("{} bytes", content.len())
            },
        );
        if is_timed(&path) && kind.is_file() {
            text.push_str(&format!(" at {}", header.mtime().unwrap()));
        }
        tree.insert(path, text);
    }
    tree
}

/// The parts of a configuration that a Dockerfile decides.
fn decided(config: &Value) -> Value {
    let mut decided = serde_json::Map::new();
    for key in [
        "Env",
        "Cmd",
        "Entrypoint",
        "WorkingDir",
        "User",
        "ExposedPorts",
        "Volumes",
        "Labels",
        "Healthcheck",
        "Shell",
        "OnBuild",
        "StopSignal",
    ] {
        let mut value = config[key].clone();
        if key == "Labels"
            && let Some(labels) = value.as_object_mut()
        {
            labels.remove("io.buildah.version");
        }
        let empty = match &value {
            Value::Null => true,
            Value::String(text) => text.is_empty() || (key == "WorkingDir" && text == "/"),
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        if !empty {
            decided.insert(key.to_owned(), value);
        }
    }
    Value::Object(decided)
}

struct Buildah(tempfile::TempDir);

impl Buildah {
    fn run(&self, args: &[&str]) -> Vec<u8> {
        let output = Command::new("buildah")
            .arg("--root")
            .arg(self.0.path().join("root"))
            .arg("--runroot")
            .arg(self.0.path().join("run"))
            .args(["--storage-driver", "vfs"])
            .args(args)
            .env("BUILDAH_ISOLATION", "chroot")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "buildah {args:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        output.stdout
    }

    /// An image's tree and configuration, of an archive: `buildah from` would execute its ONBUILD.
    fn look(&self, image: &str) -> (Tree, Value) {
        let inspected: Value =
            serde_json::from_slice(&self.run(&["inspect", "--type", "image", image])).unwrap();
        let archive = self.0.path().join("image.tar");
        let _ = fs::remove_file(&archive);
        self.run(&[
            "push",
            image,
            &format!("docker-archive:{}", archive.display()),
        ]);
        (
            flatten(&archive, self.0.path()),
            decided(&inspected["Docker"]["config"]),
        )
    }
}

impl Drop for Buildah {
    fn drop(&mut self) {
        let _ = Command::new("buildah")
            .arg("--root")
            .arg(self.0.path().join("root"))
            .arg("--runroot")
            .arg(self.0.path().join("run"))
            .args(["--storage-driver", "vfs", "rm", "--all"])
            .output();
    }
}

/// Stacks the layers of a docker archive with GNU tar, which knows nothing of either builder.
fn flatten(archive: &Path, scratch: &Path) -> Tree {
    let parts = scratch.join("parts");
    let root = scratch.join("flat");
    for folder in [&parts, &root] {
        let _ = fs::remove_dir_all(folder);
        fs::create_dir(folder).unwrap();
    }
    let tar = |args: &[&str], folder: &Path| {
        let output = Command::new("tar")
            .args(args)
            .arg("-C")
            .arg(folder)
            .arg(".")
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        output.stdout
    };
    let unpack = |file: &Path, folder: &Path| {
        let status = Command::new("tar")
            .args(["--numeric-owner", "-xpf"])
            .arg(file)
            .arg("-C")
            .arg(folder)
            .status()
            .unwrap();
        assert!(status.success());
    };
    unpack(archive, &parts);
    let manifest: Value =
        serde_json::from_slice(&fs::read(parts.join("manifest.json")).unwrap()).unwrap();
    for layer in manifest[0]["Layers"].as_array().unwrap() {
        unpack(&parts.join(layer.as_str().unwrap()), &root);
        // Whiteouts take away what lies beneath, and are not files themselves.
        let mut marks = Vec::new();
        find_marks(&root, &mut marks);
        for mark in marks {
            let name = mark.file_name().unwrap().to_string_lossy().into_owned();
            let hidden = mark.with_file_name(name.trim_start_matches(".wh."));
            assert_ne!(
                name, ".wh..wh..opq",
                "opaque folders are not part of these builds"
            );
            if hidden.is_dir() && !hidden.is_symlink() {
                fs::remove_dir_all(&hidden).unwrap();
            } else {
                let _ = fs::remove_file(&hidden);
            }
            fs::remove_file(&mark).unwrap();
        }
    }
    tree(&tar(&["--numeric-owner", "--sort=name", "-c"], &root))
}

fn find_marks(folder: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with(".wh.") {
            found.push(entry.path());
        } else if entry.file_type().unwrap().is_dir() {
            find_marks(&entry.path(), found);
        }
    }
}

fn look_here(host: &Host, image: &str) -> (Tree, Value) {
    let inspected: Value = serde_json::from_str(&host.ok(&["image", "inspect", image])).unwrap();
    let archive = host.scratch().join("image.tar");
    let _ = fs::remove_file(&archive);
    host.ok(&["save", "-o", archive.to_str().unwrap(), image]);
    (
        flatten(&archive, host.scratch()),
        decided(&inspected[0]["Config"]),
    )
}

/// A context with all that copying could get wrong.
fn context(folder: &Path) {
    let file = |name: &str, text: &str, mode: u32, owner: u32| {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        chown(&path, Some(owner), Some(owner + 1)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_500_000_000);
        fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_modified(time)
            .unwrap();
    };
    file("src/plain.txt", "plain\n", 0o644, 0);
    file("src/tool", "#!/bin/sh\n", 0o755, 1000);
    file("src/private", "secret\n", 0o600, 1234);
    file("src/deep/er/leaf", "leaf\n", 0o640, 7);
    file("src/skip.log", "no\n", 0o644, 0);
    file("src/keep.log", "yes\n", 0o644, 0);
    file("other/one.conf", "1\n", 0o644, 0);
    file("other/two.conf", "2\n", 0o644, 0);
    fs::create_dir_all(folder.join("src/empty")).unwrap();
    fs::set_permissions(folder.join("src/empty"), fs::Permissions::from_mode(0o750)).unwrap();
    symlink("plain.txt", folder.join("src/link")).unwrap();
    symlink("/nowhere/at/all", folder.join("src/dangling")).unwrap();
    symlink("deep", folder.join("src/to-folder")).unwrap();
    fs::write(folder.join(".dockerignore"), "**/*.log\n!src/keep.log\n").unwrap();
    let mut builder = tar::Builder::new(Vec::new());
    for (name, text, mode, owner) in [("in/a", "a", 0o4755, 5), ("in/b", "b", 0o600, 0)] {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(mode);
        header.set_uid(owner);
        header.set_gid(owner);
        header.set_mtime(1_400_000_000);
        builder
            .append_data(&mut header, name, text.as_bytes())
            .unwrap();
    }
    fs::write(folder.join("packed.tar"), builder.into_inner().unwrap()).unwrap();
}

/// Left out is where buildah 1.28 itself is alone: a shell-form CMD after SHELL, which the Dockerfile reference has in that
/// shell and buildah in /bin/sh.
const DOCKERFILES: &[(&str, &str)] = &[
    (
        "copies",
        "FROM busybox\nCOPY src /copied/src/\nCOPY src/plain.txt /copied/renamed\nCOPY src/link /copied/followed\n\
         COPY other/*.conf /copied/conf/\nCOPY --chown=12:34 src/deep /copied/owned/\nCOPY --chown=nobody src/tool /copied/\n\
         WORKDIR /made/by/workdir\nCOPY src/plain.txt ./\nCOPY src/plain.txt relative\nADD src/tool /copied/added\n\
         ADD packed.tar /unpacked/\nADD --chown=3:4 src/private /copied/private\n",
    ),
    (
        "configuration",
        "ARG BASE=busybox\nFROM ${BASE}\nARG WHO=world\nARG UNSET\nENV GREETING=\"hello $WHO\" OTHER=a\\ b\nENV old style value\n\
         ENV PATH=/opt/bin:$PATH\nLABEL a=b \"c d\"='e f' multi=\"x y\"\nEXPOSE 80 443/tcp 53/udp\nVOLUME /data /x\n\
         VOLUME [\"/a b\", \"/c\"]\nUSER 65534:65534\nWORKDIR /w\nWORKDIR sub\nENTRYPOINT [\"/bin/sh\", \"-c\"]\n\
         CMD [\"echo\", \"hi\"]\nHEALTHCHECK --interval=5s --timeout=1m30s --start-period=2s --retries=7 CMD test -e /bin\n\
         STOPSIGNAL SIGQUIT\nONBUILD RUN echo late\nONBUILD ENV A=b\n",
    ),
    (
        "shell forms",
        "FROM busybox\nCMD [\"base\"]\nENTRYPOINT exec top -b\nCMD run me\nSHELL [\"/bin/busybox\", \"sh\", \"-ec\"]\n\
         RUN echo $0 > /shell\nHEALTHCHECK NONE\n",
    ),
    (
        "steps",
        "FROM busybox AS first\nARG V=1\nRUN echo v=$V > /made && chmod 640 /made && chown 9:8 /made\n\
         RUN mkdir -p /a/b && ln -s b /a/link && ln /made /a/hard && rm /etc/group\nRUN [\"/bin/sh\", \"-c\", \"echo exec > /exec\"]\n\
         FROM busybox\nCOPY --from=first /made /a /from/\nCOPY --from=first --chown=1:2 /exec /from/exec\nCOPY --from=0 /exec /zero\n\
         USER nobody\nRUN id -u > /tmp/who; pwd > /tmp/where\nENV X=1\nRUN echo $X > /tmp/env\n",
    ),
    (
        "triggers",
        "FROM built-configuration\nUSER 0\nENTRYPOINT [\"/x\"]\n",
    ),
];

#[test]
fn images_are_what_buildah_makes_of_the_same_dockerfiles() {
    if !host::has("buildah") {
        eprintln!("SKIPPED: needs buildah to compare with (scripts/setup installs it)");
        return;
    }
    let Some(host) = start() else { return };
    let buildah = Buildah(tempfile::tempdir().unwrap());
    let base = host.scratch().join("base.tar");
    host.ok(&["save", "-o", base.to_str().unwrap(), "busybox"]);
    buildah.run(&["pull", &format!("docker-archive:{}", base.display())]);
    let folder = host.scratch().join("context");
    context(&folder);
    let shown = folder.to_str().unwrap();
    let mut differences = Vec::new();
    for (name, text) in DOCKERFILES {
        let file = host.scratch().join("Dockerfile");
        fs::write(&file, text).unwrap();
        let file = file.to_str().unwrap();
        let tag = format!("built-{}", name.replace(' ', "-"));
        let words = [
            "-q",
            "-t",
            &tag,
            "--build-arg",
            "WHO=you",
            "-f",
            file,
            shown,
        ];
        host.ok(&[&["build"][..], &words].concat());
        buildah.run(&[&["bud", "--format", "docker", "--pull-never"][..], &words].concat());
        let (tree, config) = look_here(&host, &tag);
        let (peer_tree, peer_config) = buildah.look(&format!("localhost/{tag}"));
        assert!(tree.len() > 100, "{name}: {} files", tree.len());
        for path in tree.keys().chain(peer_tree.keys()) {
            if tree.get(path) != peer_tree.get(path) {
                differences.push(format!(
                    "{name}: /{path}\n  berth   {:?}\n  buildah {:?}",
                    tree.get(path),
                    peer_tree.get(path)
                ));
            }
        }
        for key in config
            .as_object()
            .unwrap()
            .keys()
            .chain(peer_config.as_object().unwrap().keys())
        {
            if config[key] != peer_config[key] {
                differences.push(format!(
                    "{name}: {key}\n  berth   {}\n  buildah {}",
                    config[key], peer_config[key]
                ));
            }
        }
    }
    differences.sort();
    differences.dedup();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    // The comparison itself sees what it is there for.
    assert_ne!(
        decided(&json!({"User": "a"})),
        decided(&json!({"User": "b"}))
    );
}
