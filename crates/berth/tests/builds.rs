//! `berth build` with what Dockerfiles of today ask of it, in real containers.

mod host;

use std::fs;
use std::path::PathBuf;

use host::{Host, start};

struct Folder<'a> {
    host: &'a Host,
    path: PathBuf,
}

impl Folder<'_> {
    fn new<'a>(host: &'a Host, name: &str) -> Folder<'a> {
        let path = host.scratch().join(name);
        fs::create_dir(&path).unwrap();
        Folder { host, path }
    }

    fn file(&self, name: &str, text: &str) {
        let path = self.path.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Builds and says what was said on the way.
    fn build(&self, dockerfile: &str, args: &[&str]) -> String {
        let (ok, said) = self.try_build(dockerfile, args);
        assert!(ok, "{said}\n{}", self.host.log());
        said
    }

    fn refuse(&self, dockerfile: &str, args: &[&str]) -> String {
        let (ok, said) = self.try_build(dockerfile, args);
        assert!(!ok, "{said}");
        said
    }

    fn try_build(&self, dockerfile: &str, args: &[&str]) -> (bool, String) {
        self.file("Dockerfile", dockerfile);
        let mut all = vec!["build"];
        all.extend_from_slice(args);
        let path = self.path.display().to_string();
        all.push(&path);
        let output = self.host.berth(&all);
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    fn run(&self, image: &str, command: &str) -> String {
        self.host.ok(&[
            "run",
            "--rm",
            "--network",
            "none",
            image,
            "sh",
            "-c",
            command,
        ])
    }
}

#[test]
fn mounts_serve_a_step_and_leave_nothing_in_the_image() {
    let Some(host) = start() else { return };
    let folder = Folder::new(&host, "mounts");
    folder.file("token", "s3cret");
    folder.file("src/in", "context\n");
    let secret = format!("id=token,src={}", folder.path.join("token").display());
    let dockerfile = "FROM busybox AS other\nRUN mkdir -p /out/sub && echo made > /out/sub/file && chown 5:6 /out/sub/file && ln -s out /link\n\
        FROM busybox\nWORKDIR /w\n\
        RUN --mount=type=secret,id=token --mount=type=secret,id=token,target=/deep/er/token,mode=0444,uid=7 \
          --mount=type=secret,id=token,env=TOKEN --mount=type=secret,id=absent \
          stat -c '%a %u' /run/secrets/token /deep/er/token > /w/modes && cat /run/secrets/token > /dev/null && \
          test ${#TOKEN} = 6 && test ! -e /run/secrets/absent\n\
        RUN --mount=type=bind,from=other,source=/link/sub,target=/from cat /from/file > got && stat -c %u:%g /from/file >> got && ! touch /from/x\n\
        RUN --mount=type=bind,from=other,source=/out/sub/file,target=/one,rw echo more >> /one && cat /one > one\n\
        RUN --mount=type=bind,source=src,target=/src,rw cat /src/in > in && echo changed > /src/in\n\
        RUN --mount=target=/context cat /context/src/in >> in\n\
        RUN --mount=type=tmpfs,target=/scratch,size=1m echo x > /scratch/x && df /scratch | grep -q tmpfs\n\
        RUN --mount=type=cache,id=c1,target=/cache,mode=0700,uid=3 stat -c '%a %u' /cache > cache && echo kept >> /cache/kept\n\
        RUN --mount=type=cache,id=c1,target=/elsewhere,sharing=locked cat /elsewhere/kept >> cache\n";
    folder.build(dockerfile, &["-t", "mounts", "--secret", &secret]);
    assert_eq!(folder.run("mounts", "cat modes"), "400 0\n444 7");
    assert_eq!(
        folder.run("mounts", "cat got one in cache"),
        "made\n5:6\nmade\nmore\ncontext\ncontext\n700 3\nkept"
    );
    let left = folder.run("mounts", "ls -d /deep /run/secrets /from /one /src /context /scratch /cache /elsewhere 2>/dev/null; true");
    assert_eq!(left, "");
    let history = host.ok(&["history", "--no-trunc", "mounts"]);
    assert!(!history.contains("s3cret"), "{history}");
    // What was mounted decides whether the cache serves: a context's files do, a cache's do not.
    let said = folder.build(dockerfile, &["--secret", &secret]);
    assert!(!said.contains("Running in"), "{said}");
    folder.file("src/in", "other\n");
    let said = folder.build(dockerfile, &["--secret", &secret]);
    assert!(said.contains("Running in"), "{said}");
    // Nothing of a secret stays with the daemon.
    let secrets = host.state().join("run/build-secrets");
    assert_eq!(fs::read_dir(secrets).map_or(0, Iterator::count), 0);
    for (wrong, why) in [
        ("type=ssh,target=/x", "secret"),
        ("type=nonsense,target=/x", "nonsense"),
        ("type=secret,id=no,required=true", "--secret id=no"),
        ("type=cache", "target"),
        ("type=cache,target=/x,colour=red", "colour"),
        (
            "type=bind,from=busybox,source=/no/such,target=/x",
            "/no/such",
        ),
        ("type=bind,source=../..,target=/x", "context"),
    ] {
        let said = folder.refuse(&format!("FROM busybox\nRUN --mount={wrong} true\n"), &[]);
        assert!(said.contains(why), "{wrong}: {said}");
    }
}

#[test]
fn here_documents_are_scripts_input_and_files() {
    let Some(host) = start() else { return };
    let folder = Folder::new(&host, "documents");
    folder.build(
        "FROM busybox\nARG WHO=world\nRUN <<EOF\nset -e\necho one > /script\necho \"two $WHO\" >> /script\nEOF\n\
         RUN cat <<'EOF' > /input && echo after >> /input\nraw $WHO\nEOF\n\
         RUN <<-END\n#!/bin/busybox sh\n\techo tabs > /tabs\n\tEND\n\
         COPY <<one.txt <<\"two.txt\" /files/\nfor $WHO\none.txt\nfor $WHO\ntwo.txt\nCOPY --chmod=755 <<EOF /named\nnamed\nEOF\n",
        &["-t", "documents"],
    );
    assert_eq!(
        folder.run(
            "documents",
            "cat /script /input /tabs /files/one.txt /files/two.txt /named; stat -c %a /named"
        ),
        "one\ntwo world\nraw $WHO\nafter\ntabs\nfor world\nfor $WHO\nnamed\n755"
    );
    let said = folder.refuse("FROM busybox\nRUN <<EOF\nnever ends\n", &[]);
    assert!(said.contains("EOF"), "{said}");
}

#[test]
fn arguments_targets_hosts_networks_and_output_are_as_asked() {
    let Some(host) = start() else { return };
    let folder = Folder::new(&host, "options");
    folder.file("a.txt", "a");
    folder.file("b.log", "b");
    folder.file("keep.log", "k");
    folder.file("sub/c.log", "c");
    folder.file(".dockerignore", "*.log\n**/*.log\n!keep.log\nDockerfile\n");
    let dockerfile = "# escape=`\nARG BASE=nothing\nARG TAG=latest\nFROM ${BASE}:${TAG} AS build\nARG TAG\nARG WORD=none\n\
        RUN echo `\n  $TAG $WORD > /word\nCOPY . /all/\nRUN --network=none ip -o link | grep -c . > /links\n\
        RUN cat /etc/hosts > /hosts\nFROM build AS last\nRUN echo last > /last\n";
    let id_file = folder.path.join("id");
    let said = folder.build(
        dockerfile,
        &[
            "-t",
            "options:1",
            "-t",
            "options:2",
            "--target",
            "build",
            "--build-arg",
            "BASE=busybox",
            "--build-arg",
            "WORD=given",
            "--label",
            "one=two words",
            "--iidfile",
            id_file.to_str().unwrap(),
            "--add-host",
            "somewhere:192.0.2.7",
            "--cache-from",
            "busybox",
            "--network",
            "none",
        ],
    );
    assert!(said.contains("Successfully tagged options:2"), "{said}");
    assert_eq!(
        folder.run("options:1", "cat /word /links; cd /all; find . -type f | sort; ls /last 2>/dev/null; grep -o somewhere /hosts"),
        "latest given\n1\n./.dockerignore\n./a.txt\n./keep.log\nsomewhere"
    );
    let id = fs::read_to_string(&id_file).unwrap();
    let listed = host.ok(&["images", "-q", "--no-trunc", "options:1"]);
    assert_eq!(listed, id.trim());
    let shown: serde_json::Value =
        serde_json::from_str(&host.ok(&["image", "inspect", "options:1"])).unwrap();
    assert_eq!(shown[0]["Config"]["Labels"]["one"], "two words");
    let path = folder.path.display().to_string();
    let quiet = host.berth(&["build", "-q", "--build-arg", "BASE=busybox", &path]);
    assert!(
        quiet.status.success() && quiet.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&quiet.stderr)
    );
    assert_eq!(String::from_utf8_lossy(&quiet.stdout).trim().len(), 71);
    let typed = host.with_input(
        &["build", "-q", "-f", "-", &path],
        b"FROM busybox\nCOPY a.txt /typed\n",
    );
    assert!(
        typed.status.success(),
        "{}",
        String::from_utf8_lossy(&typed.stderr)
    );
    let said = folder.refuse(dockerfile, &["--target", "nowhere"]);
    assert!(said.contains("nowhere"), "{said}");
    let said = folder.refuse("FROM busybox\nRUN --network=web true\n", &[]);
    assert!(said.contains("default, none or host"), "{said}");
    let said = folder.build("# syntax=somebody/else\nFROM busybox\n", &[]);
    assert!(said.contains("somebody/else is not used"), "{said}");
    let said = folder.build("# syntax=docker/dockerfile:1.7-labs\nFROM busybox\n", &[]);
    assert!(!said.contains("is not used"), "{said}");
}
