//! Builds with a runner that only pretends: it writes what it was asked to run into the layers.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Mutex;

use image::build::{BuildOptions, Context, Output, RunStep, StepRunner, build};
use image::{Cancel, Digest, Error, Layers, Platform, Reference, Result, Store};

#[derive(Default)]
struct Pretender(Mutex<Vec<RunStep>>);

impl StepRunner for Pretender {
    fn run(&self, layers: &Layers, step: &RunStep, output: &dyn Output) -> Result<i32> {
        self.0.lock().unwrap().push(step.clone());
        let root = image::mount_detached(layers, true)?;
        let line = step.command.last().cloned().unwrap_or_default();
        if line == "false" {
            return Ok(3);
        }
        output.write("running\n");
        let path = format!("/proc/self/fd/{}/ran", root.as_raw_fd());
        fs::write(path, line).map_err(|e| Error::Invalid(e.to_string()))?;
        Ok(0)
    }
    fn pull(&self, reference: &Reference, _: Option<&Platform>, _: &dyn Output) -> Result<Digest> {
        Err(Error::NoSuchImage(reference.familiar()))
    }
}

/// Removes all that can be removed while a step runs.
struct Remover<'a> {
    store: &'a Store,
    runner: Pretender,
}

impl StepRunner for Remover<'_> {
    fn run(&self, layers: &Layers, step: &RunStep, output: &dyn Output) -> Result<i32> {
        let forced = image::RemoveOptions {
            force: true,
            ..Default::default()
        };
        let _ = self.store.remove("base:1", forced, &|_| Vec::new());
        let everything = image::Filter {
            dangling: Some(false),
            ..Default::default()
        };
        self.store.prune(&everything, &|_| Vec::new())?;
        self.runner.run(layers, step, output)
    }
    fn pull(&self, reference: &Reference, _: Option<&Platform>, _: &dyn Output) -> Result<Digest> {
        Err(Error::NoSuchImage(reference.familiar()))
    }
}

#[test]
fn what_a_build_stands_on_is_not_pruned_from_under_it() {
    let Some(bench) = Bench::new() else { return };
    let mut tar = image::layer::tar::TarWriter::new(Vec::new());
    tar.file("base", 0o644, b"base").unwrap();
    let options = image::ImportOptions {
        reference: Some("base:1".parse().unwrap()),
        ..Default::default()
    };
    let tar = tar.finish().unwrap();
    let base = bench
        .store
        .import(&tar[..], &options, &Cancel::default())
        .unwrap();
    bench.file("Dockerfile", "FROM base:1 AS one\nENV A=1\nRUN one\nFROM base:1 AS two\nRUN two\nCOPY --from=one /ran /one\n");
    let context = Context::folder(&bench.directory.path().join("context"));
    let runner = Remover {
        store: &bench.store,
        runner: Pretender::default(),
    };
    let said = Said(Mutex::default());
    let attempt = || {
        let options = BuildOptions::default();
        build(
            &bench.store,
            &context,
            &options,
            &runner,
            &said,
            &Cancel::default(),
        )
    };
    let built = attempt();
    // Its name went, which is what a build of several stages then misses; nothing it had begun with did.
    let error = built.unwrap_err().to_string();
    assert!(error.contains("base:1"), "{error}");
    assert!(
        bench.store.inspect(&base.to_string()).is_err() || bench.store.resolve("base:1").is_err()
    );
    let again = bench.store.import(
        &tar[..],
        &image::ImportOptions::default(),
        &Cancel::default(),
    );
    bench.file("Dockerfile", &format!("FROM {} AS one\nENV A=1\nRUN one\nRUN two\nFROM scratch\nCOPY --from=one /ran /base /\n", again.unwrap()));
    let id = attempt().unwrap();
    bench.show(&id, |root| {
        assert_eq!(fs::read(root.join("base")).unwrap(), b"base");
        assert_eq!(fs::read(root.join("ran")).unwrap(), b"two");
    });
    // Once nothing holds them, they go.
    let left = bench
        .store
        .prune(&image::Filter::default(), &|_| Vec::new())
        .unwrap();
    assert!(!left.removed.is_empty());
    assert!(
        bench
            .store
            .list(&image::Filter {
                all: true,
                ..Default::default()
            })
            .unwrap()
            .is_empty()
    );
}

struct Said(Mutex<String>);

impl Output for Said {
    fn write(&self, text: &str) {
        self.0.lock().unwrap().push_str(text);
    }
}

fn can_mount(directory: &Path) -> bool {
    let layers = Layers {
        lower: Vec::new(),
        upper: directory.join("probe/upper"),
        work: directory.join("probe/work"),
        userxattr: false,
    };
    fs::create_dir_all(&layers.upper).unwrap();
    fs::create_dir_all(&layers.work).unwrap();
    let can = rustix::process::geteuid().is_root() && image::mount_detached(&layers, true).is_ok();
    if !can {
        eprintln!("SKIPPED: overlays cannot be mounted here (root is needed)");
    }
    can
}

struct Bench {
    directory: tempfile::TempDir,
    store: Store,
    runner: Pretender,
}

impl Bench {
    fn new() -> Option<Bench> {
        let directory = tempfile::tempdir().unwrap();
        if !can_mount(directory.path()) {
            return None;
        }
        let store = Store::open(&directory.path().join("store")).unwrap();
        fs::create_dir(directory.path().join("context")).unwrap();
        Some(Bench {
            directory,
            store,
            runner: Pretender::default(),
        })
    }

    fn file(&self, name: &str, text: &str) {
        let path = self.directory.path().join("context").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn build(&self, dockerfile: &str, options: BuildOptions) -> (Result<Digest>, String) {
        self.file("Dockerfile", dockerfile);
        let said = Said(Mutex::default());
        let context = Context::folder(&self.directory.path().join("context"));
        let result = build(
            &self.store,
            &context,
            &options,
            &self.runner,
            &said,
            &Cancel::default(),
        );
        (result, said.0.into_inner().unwrap())
    }

    fn show<T>(&self, id: &Digest, look: impl FnOnce(&Path) -> T) -> T {
        let layers = self.store.snapshot("look", id).unwrap();
        let root = image::mount_detached(&layers, false).unwrap();
        let found = look(&Path::new("/proc/self/fd").join(root.as_raw_fd().to_string()));
        drop(root);
        self.store.remove_snapshot("look").unwrap();
        found
    }
}

#[test]
fn stages_copies_and_variables_make_the_image_and_the_second_build_is_cached() {
    let Some(bench) = Bench::new() else { return };
    bench.file("src/a.txt", "a");
    bench.file("src/deep/b.txt", "b");
    bench.file("src/left.out", "x");
    bench.file("one.conf", "1");
    bench.file("two.conf", "2");
    bench.file(".dockerignore", "**/*.out\n");
    let dockerfile = "# a comment\nARG BASE=scratch\nFROM ${BASE} AS first\nARG WHO=world\nENV GREETING=\"hello $WHO\"\n\
        RUN echo one && \\\n    # why\n    echo two\nCOPY src/ /app/src/\n\n\
        FROM scratch\nWORKDIR /srv\nCOPY --from=first --chown=7:8 --chmod=600 /app/src/deep/b.txt data/\n\
        COPY *.conf ./etc/\nADD one.conf renamed\nENV A=1 B=${A:-none}\nEXPOSE 80\nCMD [\"/run\", \"me\"]\n\
        COPY <<EOF /motd\nhi $A\nEOF\nONBUILD ENV LATE=1\n";
    let options = || BuildOptions {
        tags: vec!["made:1".parse().unwrap()],
        ..BuildOptions::default()
    };
    let (result, said) = bench.build(dockerfile, options());
    let id = result.unwrap_or_else(|e| panic!("{e}\n{said}"));
    assert!(said.contains("Step 1/16 : ARG BASE=scratch\n"), "{said}");
    assert!(
        said.contains("Step 5/16 : RUN echo one &&     echo two\n ---> Running in "),
        "{said}"
    );
    assert!(
        said.ends_with(&format!(
            "Successfully built {}\nSuccessfully tagged made:1\n",
            id.short()
        )),
        "{said}"
    );
    bench.show(&id, |root| {
        assert_eq!(
            fs::read_to_string(root.join("srv/data/b.txt")).unwrap(),
            "b"
        );
        let b = fs::metadata(root.join("srv/data/b.txt")).unwrap();
        assert_eq!(
            (b.uid(), b.gid(), b.permissions().mode() & 0o777),
            (7, 8, 0o600)
        );
        assert_eq!(
            fs::read_to_string(root.join("srv/etc/two.conf")).unwrap(),
            "2"
        );
        assert_eq!(fs::read_to_string(root.join("srv/renamed")).unwrap(), "1");
        assert_eq!(fs::read_to_string(root.join("motd")).unwrap(), "hi 1\n");
        assert!(!root.join("ran").exists());
    });
    let run = bench.store.inspect("made:1").unwrap().config.run();
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(run.env, [path, "A=1", "B=none"]);
    assert_eq!(run.cmd.unwrap(), ["/run", "me"]);
    assert_eq!(run.on_build, ["ENV LATE=1"]);
    let ran = bench.runner.0.lock().unwrap().clone();
    assert_eq!(ran.len(), 1);
    assert_eq!(
        ran[0].command,
        ["/bin/sh", "-c", "echo one &&     echo two"]
    );
    assert!(
        ran[0].env.contains(&"GREETING=hello world".to_owned())
            && ran[0].env.contains(&"WHO=world".to_owned())
    );

    let (again, said) = bench.build(dockerfile, options());
    assert_eq!(again.unwrap(), id);
    assert!(said.contains("Using cache"), "{said}");
    assert_eq!(bench.runner.0.lock().unwrap().len(), 1);
    bench.file("src/left.out", "ignored files do not matter");
    assert_eq!(bench.build(dockerfile, options()).0.unwrap(), id);
    bench.file("src/deep/b.txt", "changed");
    assert_ne!(bench.build(dockerfile, options()).0.unwrap(), id);
    let args = [
        ("WHO".to_owned(), Some("you".to_owned())),
        ("NOBODY".to_owned(), None),
    ]
    .into();
    let (other, said) = bench.build(
        dockerfile,
        BuildOptions {
            args,
            target: Some("first".into()),
            ..BuildOptions::default()
        },
    );
    let other = other.unwrap();
    assert!(
        said.contains("NOBODY") && said.contains("were not consumed"),
        "{said}"
    );
    bench.show(&other, |root| {
        assert!(root.join("ran").exists() && root.join("app/src/a.txt").exists());
        assert!(!root.join("app/src/left.out").exists());
    });
    let (child, said) = bench.build("FROM made:1\nLABEL x=y\n", BuildOptions::default());
    let child = bench
        .store
        .inspect(&child.unwrap().to_string())
        .unwrap()
        .config
        .run();
    assert!(
        child.env.contains(&"LATE=1".to_owned()) && child.on_build.is_empty(),
        "{said}"
    );
}

#[test]
fn a_failing_step_and_a_wrong_dockerfile_say_so_and_leave_no_snapshot() {
    let Some(bench) = Bench::new() else { return };
    bench.file("a", "a");
    let fails = |dockerfile: &str| {
        bench
            .build(dockerfile, BuildOptions::default())
            .0
            .unwrap_err()
            .to_string()
    };
    let error = fails("FROM scratch\nCOPY a /\nRUN false\n");
    assert_eq!(
        error,
        "The command '/bin/sh -c false' returned a non-zero code: 3"
    );
    assert!(fails("FROM scratch\nCOPY missing /\n").contains("missing"));
    assert!(fails("FROM scratch\nCOPY ../../etc/passwd /\n").contains("outside the build context"));
    assert!(fails("FROM nowhere:1\n").contains("nowhere:1"));
    assert!(fails("FROM scratch\nADD git@example.test:x.git /\n").contains("git clone"));
    assert!(fails("FROM scratch\nADD http://127.0.0.1:1/x /\n").contains("http://127.0.0.1:1/x"));
    assert!(fails("FROM scratch\nADD http://127.0.0.1:1/ /x/\n").contains("filename"));
    assert!(fails("FROM scratch\nADD --checksum=sha256:00 http://h/x /\n").contains("sha256"));
    let sum = format!("sha256:{}", "0".repeat(64));
    assert!(fails(&format!("FROM scratch\nADD --checksum={sum} a /\n")).contains("--checksum"));
    assert!(fails("FROM scratch\nNONSENSE\n").contains("Dockerfile"));
    assert!(fails("FROM scratch\nCOPY --from=nostage a /\n").contains("nostage"));
    assert!(bench.store.snapshots().is_empty());
    let squash = BuildOptions {
        squash: true,
        ..BuildOptions::default()
    };
    assert!(matches!(
        bench.build("FROM scratch\n", squash).0,
        Err(Error::Unsupported(_))
    ));
}

#[test]
fn an_archive_is_unpacked_by_add_and_a_link_does_not_lead_a_copy_out() {
    let Some(bench) = Bench::new() else { return };
    let mut tar = image::layer::tar::TarWriter::new(Vec::new());
    tar.file("inner/file", 0o644, b"packed").unwrap();
    let packed = zstd::encode_all(&tar.finish().unwrap()[..], 1).unwrap();
    let context = bench.directory.path().join("context");
    fs::write(context.join("x.tar.zst"), packed).unwrap();
    fs::write(bench.directory.path().join("secret"), "outside").unwrap();
    std::os::unix::fs::symlink("../secret", context.join("leak")).unwrap();
    let (id, said) = bench.build(
        "FROM scratch\nADD x.tar.zst /opt/\n",
        BuildOptions::default(),
    );
    let id = id.unwrap_or_else(|e| panic!("{e}\n{said}"));
    bench.show(&id, |root| {
        assert_eq!(fs::read(root.join("opt/inner/file")).unwrap(), b"packed")
    });
    assert!(
        bench
            .build("FROM scratch\nCOPY leak /leak\n", BuildOptions::default())
            .0
            .is_err()
    );
}

/// Answers every request with `body`, last modified at second 1445412480.
fn web_server(body: &'static [u8]) -> String {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
                head.push(byte[0]);
            }
            let status = if head.starts_with(b"GET /missing") {
                "404 Not Found"
            } else {
                "200 OK"
            };
            let _ = write!(
                stream,
                "HTTP/1.1 {status}\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            let _ = stream.write_all(body);
        }
    });
    address
}

#[test]
fn add_fetches_from_the_web_and_holds_it_to_its_checksum() {
    let Some(bench) = Bench::new() else { return };
    let server = web_server(b"from the web");
    let sum = Digest::of(b"from the web");
    let dockerfile = format!(
        "FROM scratch\nADD {server}/a/tool.bin?v=1 /opt/\nADD --checksum={sum} --chmod=755 {server}/x /bin/tool\n"
    );
    let (id, said) = bench.build(&dockerfile, BuildOptions::default());
    let id = id.unwrap_or_else(|e| panic!("{e}\n{said}"));
    bench.show(&id, |root| {
        let plain = root.join("opt/tool.bin");
        assert_eq!(fs::read(&plain).unwrap(), b"from the web");
        let about = fs::metadata(&plain).unwrap();
        assert_eq!(about.permissions().mode() & 0o7777, 0o600);
        assert_eq!(about.mtime(), 1_445_412_480);
        let about = fs::metadata(root.join("bin/tool")).unwrap();
        assert_eq!(about.permissions().mode() & 0o7777, 0o755);
    });
    let (again, said) = bench.build(&dockerfile, BuildOptions::default());
    assert_eq!(again.unwrap(), id);
    assert_eq!(said.matches("Using cache").count(), 2, "{said}");
    let other = Digest::of(b"something else");
    let lies = format!("FROM scratch\nADD --checksum={other} {server}/x /x\n");
    assert!(matches!(
        bench.build(&lies, BuildOptions::default()).0,
        Err(Error::DigestMismatch { .. })
    ));
    let missing = format!("FROM scratch\nADD {server}/missing /x\n");
    let error = bench
        .build(&missing, BuildOptions::default())
        .0
        .unwrap_err();
    assert!(error.to_string().contains("404"), "{error}");
    let left: Vec<_> = fs::read_dir(bench.directory.path().join("store/ingest"))
        .unwrap()
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_copy_leaves_out_what_it_is_told_and_keeps_parents_from_the_pivot_on() {
    let Some(bench) = Bench::new() else { return };
    for name in ["src/a.txt", "src/a.md", "src/deep/b.md", "src/deep/c.txt"] {
        bench.file(name, name);
    }
    let (id, said) = bench.build(
        "FROM scratch\nCOPY --exclude=*.md --exclude=deep/*.txt src /kept/\n\
         COPY --parents src/deep/b.md src/./deep/c.txt /all/\nCOPY --parents src/./deep /folder/\n",
        BuildOptions::default(),
    );
    let id = id.unwrap_or_else(|e| panic!("{e}\n{said}"));
    bench.show(&id, |root| {
        let files = |top: &str| {
            let mut found = Vec::new();
            let mut pending = vec![root.join(top)];
            while let Some(folder) = pending.pop() {
                for entry in fs::read_dir(folder).unwrap() {
                    let entry = entry.unwrap();
                    if entry.file_type().unwrap().is_dir() {
                        pending.push(entry.path());
                    } else {
                        let path = entry.path();
                        let path = path.strip_prefix(root).unwrap();
                        found.push(path.to_string_lossy().into_owned());
                    }
                }
            }
            found.sort();
            found
        };
        assert_eq!(files("kept"), ["kept/a.txt", "kept/deep/b.md"]);
        assert_eq!(files("all"), ["all/deep/c.txt", "all/src/deep/b.md"]);
        assert_eq!(files("folder"), ["folder/deep/b.md", "folder/deep/c.txt"]);
    });
}
