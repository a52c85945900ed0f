//! The same Dockerfiles built by `berth build` and by `buildah bud`: the same files, owners, modes and configuration.

mod host;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use image::layer::tar::{EntryKind, TarReader, TarWriter};
use serde_json::Value;

/// Kind, mode, owner, group, and content or target of each file, by its path.
type Files = BTreeMap<String, (EntryKind, u32, u32, u32, Vec<u8>)>;

/// What a runtime puts there itself says nothing of a builder.
const RUNTIMES: [&str; 7] = [
    "dev",
    "proc",
    "sys",
    "run",
    "etc/hosts",
    "etc/hostname",
    "etc/resolv.conf",
];

fn files(tar: &[u8]) -> Files {
    let mut reader = TarReader::new(tar);
    let mut files = Files::new();
    while let Some(entry) = reader.next_entry().unwrap() {
        let path = String::from_utf8_lossy(&entry.path).into_owned();
        let path = path.trim_start_matches("./").trim_matches('/').to_owned();
        let mut content = entry.link.clone();
        reader.read_to_end(&mut content).unwrap();
        let of_runtime = RUNTIMES
            .iter()
            .any(|r| path == *r || path.starts_with(&format!("{r}/")));
        if path.is_empty() || path == ".dockerenv" || of_runtime {
            continue;
        }
        files.insert(
            path,
            (entry.kind, entry.mode, entry.uid, entry.gid, content),
        );
    }
    // Which of two hard links is called the file is chance.
    let linked: Vec<(String, String)> = files
        .iter()
        .filter(|(_, f)| f.0 == EntryKind::HardLink)
        .map(|(path, f)| {
            let target = String::from_utf8_lossy(&f.4);
            let target = target.trim_start_matches("./").trim_matches('/');
            (path.clone(), target.to_owned())
        })
        .collect();
    for (path, target) in linked {
        let file = files[&target].clone();
        files.insert(path, file);
    }
    files
}

struct Buildah<'a>(&'a Path);

impl Buildah<'_> {
    fn run(&self, arguments: &[&str]) -> Vec<u8> {
        let output = Command::new("buildah")
            .arg("--root")
            .arg(self.0.join("buildah"))
            .arg("--runroot")
            .arg(self.0.join("buildah-run"))
            .args(["--storage-driver", "vfs"])
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "buildah {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        output.stdout
    }

    fn text(&self, arguments: &[&str]) -> String {
        String::from_utf8(self.run(arguments))
            .unwrap()
            .trim()
            .to_owned()
    }
}

/// A configuration without what is empty, whose ways of being written differ.
fn config(value: &Value) -> BTreeMap<String, Value> {
    const COMPARED: [&str; 13] = [
        "User",
        "ExposedPorts",
        "Env",
        "Entrypoint",
        "Cmd",
        "Volumes",
        "WorkingDir",
        "Labels",
        "StopSignal",
        "Shell",
        "OnBuild",
        "Healthcheck",
        "ArgsEscaped",
    ];
    COMPARED
        .iter()
        .filter_map(|key| {
            let found = value.get(*key)?.clone();
            let empty = match &found {
                Value::Null | Value::Bool(false) => true,
                Value::String(s) => s.is_empty(),
                Value::Array(a) => a.is_empty(),
                Value::Object(o) => o.is_empty(),
                _ => false,
            };
            (!empty).then_some(((*key).to_owned(), found))
        })
        .collect()
}

const APPLICATION: &str = r#"# An application with all a Dockerfile of 2023 has.
ARG BASE=localhost/base:1
ARG UNUSED
FROM ${BASE} AS first
ARG WHO=nobody
ARG FLAG
ENV GREETING="hello $WHO" DEFAULTED=${NOTHING:-fallback} SET=${WHO:+yes}
RUN mkdir -p /out/sub && echo "$GREETING $FLAG" > /out/greeting && \
    # in between
    ln -s greeting /out/link && ln /out/greeting /out/hard && \
    chmod 4755 /out/greeting && chown 3:4 /out/sub
COPY --chown=7:8 src/ /app/
COPY *.conf single /etc/confs/
ADD packed.tar.gz /opt/
RUN ["/bin/busybox", "touch", "/exec form"]

FROM localhost/base:1 AS last
LABEL a=b "c d"="e f" multi="x \
y"
WORKDIR /srv
WORKDIR deep/er
COPY --from=first /out /out
COPY --from=first /app/a.txt ./renamed
COPY --from=0 --chown=0:5 /app/deep ./copied/
RUN rm /bin/yes && rm -r /out/sub && pwd > where
USER 12:34
EXPOSE 80 53/udp
VOLUME /data /more
STOPSIGNAL SIGINT
ENTRYPOINT ["/bin/busybox", "echo"]
CMD ["x", "y"]
ONBUILD COPY . /later
HEALTHCHECK --interval=5s --timeout=3s --retries=2 CMD true
SHELL ["/bin/sh", "-ec"]
ENV LAST=$GREETING

FROM first AS never
RUN exit 3
"#;

const SHELLS: &str = "FROM localhost/base:1\nSHELL [\"/bin/sh\", \"-xc\"]\nENV A=1\nENV A=2 B=$A\nRUN echo $0 $B > /said\n\
    CMD echo shell form\nENTRYPOINT exec top -b\nADD single /renamed\nADD src /\nWORKDIR /\nLABEL a=1\nLABEL a=2\n";

#[test]
fn a_dockerfile_makes_the_image_that_buildah_makes() {
    if !host::has("buildah") {
        eprintln!("SKIPPED: needs buildah (apt-get install buildah)");
        return;
    }
    let Some(host) = host::start() else { return };
    let scratch = host.scratch().to_owned();
    let buildah = Buildah(&scratch);
    host.ok(&["tag", "busybox", "localhost/base:1"]);
    let archive = scratch.join("base.tar");
    host.ok(&["save", "-o", archive.to_str().unwrap(), "localhost/base:1"]);
    let from = format!("docker-archive:{}", archive.display());
    buildah.run(&["pull", "-q", &from]);

    let context = scratch.join("context");
    for (path, text) in [
        ("src/a.txt", "a"),
        ("src/deep/b.txt", "b"),
        ("src/deep/left.out", "x"),
        ("src/kept.out", "k"),
        ("one.conf", "1"),
        ("two.conf", "2"),
        ("single", "s"),
        ("secret/key", "no"),
        (
            ".dockerignore",
            "# comment\n**/*.out\n!src/kept.out\nsecret\n/Dockerfile*\n",
        ),
        ("Dockerfile", APPLICATION),
        ("Dockerfile.shells", SHELLS),
    ] {
        let path = context.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let mut tar = TarWriter::new(Vec::new());
    tar.file("inner/file", 0o640, b"packed").unwrap();
    let gz = std::fs::File::create(context.join("packed.tar.gz")).unwrap();
    let mut gzip = Command::new("gzip")
        .stdin(Stdio::piped())
        .stdout(gz)
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut gzip.stdin.take().unwrap(), &tar.finish().unwrap()).unwrap();
    assert!(gzip.wait().unwrap().success());
    let context = context.to_str().unwrap();

    for (file, more) in [
        (
            "Dockerfile",
            &[
                "--target",
                "last",
                "--build-arg",
                "WHO=world",
                "--label",
                "given=1",
            ][..],
        ),
        ("Dockerfile.shells", &[][..]),
    ] {
        let dockerfile = format!("{context}/{file}");
        let mut ours = vec!["build", "-q", "-t", "made:1", "-f", &dockerfile];
        ours.extend(more);
        ours.push(context);
        host.ok(&ours);
        let mut theirs = vec![
            "bud",
            "-q",
            "--isolation",
            "chroot",
            "--format",
            "docker",
            "--identity-label=false",
            "--pull-never",
            "-t",
            "localhost/made:1",
            "-f",
            &dockerfile,
        ];
        theirs.extend(more);
        theirs.push(context);
        buildah.run(&theirs);

        host.ok(&["create", "--name", "look", "made:1"]);
        let tar = scratch.join("ours.tar");
        host.ok(&["export", "-o", tar.to_str().unwrap(), "look"]);
        host.ok(&["rm", "look"]);
        let ours = files(&std::fs::read(&tar).unwrap());
        let container = buildah.text(&["from", "--pull-never", "localhost/made:1"]);
        let mounted = buildah.text(&["mount", &container]);
        let tar = Command::new("tar")
            .args(["-C", &mounted, "-c", "."])
            .output()
            .unwrap();
        let theirs = files(&tar.stdout);
        buildah.run(&["rm", &container]);
        let names = |files: &Files| files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&ours), names(&theirs), "{file}");
        for (path, our) in &ours {
            assert!(
                *our == theirs[path],
                "{file}: {path}: {:?} and {:?}",
                (
                    our.0,
                    our.1,
                    our.2,
                    our.3,
                    String::from_utf8_lossy(&our.4[..our.4.len().min(80)])
                ),
                (
                    theirs[path].0,
                    theirs[path].1,
                    theirs[path].2,
                    theirs[path].3
                )
            );
        }
        let text = host.ok(&["image", "inspect", "--format", "json", "made:1"]);
        let ours: Value = serde_json::from_str(&text).unwrap();
        let ours = ours.as_array().map_or(&ours, |all| &all[0])["Config"].clone();
        let theirs: Value = serde_json::from_str(&buildah.text(&[
            "inspect",
            "--type",
            "image",
            "localhost/made:1",
        ]))
        .unwrap();
        assert_eq!(config(&ours), config(&theirs["Docker"]["config"]), "{file}");
    }
}
