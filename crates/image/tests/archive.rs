//! Archives out and in again, and those that are not to be believed.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use image::layer::tar::{Entry, EntryKind, TarReader, TarWriter};
use image::{Cancel, Digest, ImportOptions, Silent, Store};

fn layer(name: &str) -> Vec<u8> {
    let mut tar = TarWriter::new(Vec::new());
    tar.file(name, 0o644, name.as_bytes()).unwrap();
    tar.finish().unwrap()
}

fn store(directory: &Path, name: &str) -> Store {
    Store::open(&directory.join(name)).unwrap()
}

fn import(store: &Store, file: &str, name: &str) -> Digest {
    let options = ImportOptions {
        reference: Some(name.parse().unwrap()),
        ..ImportOptions::default()
    };
    store
        .import(&layer(file)[..], &options, &Cancel::default())
        .unwrap()
}

fn load(store: &Store, bytes: &[u8]) -> image::Result<Vec<image::Loaded>> {
    store.load(bytes, None, &Silent, &Cancel::default())
}

#[test]
fn what_is_saved_is_loaded_again_under_its_names() {
    let directory = tempfile::tempdir().unwrap();
    let here = store(directory.path(), "here");
    let (a, b) = (import(&here, "a", "a:1"), import(&here, "b", "b:2"));
    here.tag("a:1", &"localhost:5000/other:3".parse().unwrap())
        .unwrap();
    let mut archive = Vec::new();
    let names = ["a:1", "b:2", "localhost:5000/other:3"].map(str::to_owned);
    here.save(&names, None, &mut archive).unwrap();
    let there = store(directory.path(), "there");
    let loaded = load(&there, &zstd::encode_all(&archive[..], 1).unwrap()).unwrap();
    assert_eq!(loaded.len(), 2);
    assert_eq!(loaded[0].names, ["a:1", "localhost:5000/other:3"]);
    assert_eq!(there.resolve("a:1").unwrap(), a);
    assert_eq!(there.resolve("b:2").unwrap(), b);
    assert_eq!(
        there.inspect("a:1").unwrap().record.manifest.digest,
        here.inspect("a:1").unwrap().record.manifest.digest
    );
    // The OCI half alone serves as well.
    let mut without = TarWriter::new(Vec::new());
    let mut reader = TarReader::new(&archive[..]);
    while let Some(entry) = reader.next_entry().unwrap() {
        let mut content = Vec::new();
        reader.read_to_end(&mut content).unwrap();
        if entry.path != b"manifest.json" {
            without.entry(&entry).unwrap();
            std::io::Write::write_all(&mut without, &content).unwrap();
        }
    }
    let third = store(directory.path(), "third");
    load(&third, &without.finish().unwrap()).unwrap();
    assert_eq!(third.resolve("localhost:5000/other:3").unwrap(), a);
    assert!(
        here.save(&["nothing".to_owned()], None, &mut Vec::new())
            .is_err()
    );
}

#[test]
fn an_archive_of_an_older_docker_is_loaded() {
    let directory = tempfile::tempdir().unwrap();
    let layer = layer("old");
    let diff = Digest::of(&layer);
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["{diff}","{diff}"]}}}}"#
    );
    let id = Digest::of(config.as_bytes());
    let mut tar = TarWriter::new(Vec::new());
    tar.file("one/layer.tar", 0o644, &layer).unwrap();
    let link = Entry {
        link: b"../one/layer.tar".to_vec(),
        ..Entry::new(EntryKind::Symlink, "two/layer.tar", 0o777)
    };
    tar.entry(&link).unwrap();
    tar.file(&format!("{}.json", id.hex()), 0o644, config.as_bytes())
        .unwrap();
    let manifest = format!(
        r#"[{{"Config":"{}.json","RepoTags":["old:1"],"Layers":["one/layer.tar","two/layer.tar"]}}]"#,
        id.hex()
    );
    tar.file("manifest.json", 0o644, manifest.as_bytes())
        .unwrap();
    let store = store(directory.path(), "store");
    load(&store, &tar.finish().unwrap()).unwrap();
    assert_eq!(store.resolve("old:1").unwrap(), id);
    assert_eq!(store.layer_folders(&id).unwrap().len(), 2);
}

#[test]
fn archives_that_lie_are_refused_and_leave_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let store = store(directory.path(), "store");
    let archive = |files: &[(&str, &[u8])]| {
        let mut tar = TarWriter::new(Vec::new());
        for (name, content) in files {
            tar.file(name, 0o644, content).unwrap();
        }
        tar.finish().unwrap()
    };
    let layer = layer("x");
    let wrong = format!(
        r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
        Digest::of(b"another")
    );
    let blob = format!("blobs/sha256/{}", Digest::of(b"another").hex());
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("not its digest", archive(&[(&blob, b"content")])),
        (
            "wrong diff",
            archive(&[
                ("l.tar", &layer),
                ("c.json", wrong.as_bytes()),
                (
                    "manifest.json",
                    br#"[{"Config":"c.json","RepoTags":["x:1"],"Layers":["l.tar"]}]"#,
                ),
            ]),
        ),
        (
            "missing layer",
            archive(&[
                ("c.json", wrong.as_bytes()),
                (
                    "manifest.json",
                    br#"[{"Config":"c.json","RepoTags":null,"Layers":["../../etc/passwd"]}]"#,
                ),
            ]),
        ),
        ("no json", archive(&[("manifest.json", b"{")])),
        ("nothing", archive(&[("a", b"b")])),
        ("empty", archive(&[("manifest.json", b"[]")])),
        ("..", archive(&[("../x", b"b")])),
        (
            "bad name",
            archive(&[
                ("l.tar", &layer),
                ("c.json", wrong.as_bytes()),
                (
                    "manifest.json",
                    br#"[{"Config":"c.json","RepoTags":["../x:1"],"Layers":["l.tar"]}]"#,
                ),
            ]),
        ),
    ];
    for (name, bytes) in cases {
        assert!(load(&store, &bytes).is_err(), "{name} was taken");
        for sub in ["blobs/sha256", "layers", "images", "ingest"] {
            let left = fs::read_dir(directory.path().join("store").join(sub))
                .unwrap()
                .count();
            assert_eq!(left, 0, "{name} left something in {sub}");
        }
    }
}

#[test]
fn other_tools_read_what_is_saved_and_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let here = store(directory.path(), "here");
    let id = import(&here, "a", "a:1");
    let path = directory.path().join("a.tar");
    here.save(&["a:1".to_owned()], None, fs::File::create(&path).unwrap())
        .unwrap();
    let copy = |from: String, to: String| {
        let output = Command::new("skopeo")
            .args(["copy", "--insecure-policy", &from, &to])
            .env("TMPDIR", directory.path())
            .stdin(Stdio::null())
            .output();
        let Ok(output) = output else {
            eprintln!("SKIPPED: skopeo is not installed");
            return false;
        };
        assert!(
            output.status.success(),
            "{from} {to}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        true
    };
    let (from, out) = (path.display(), directory.path().display());
    if copy(
        format!("docker-archive:{from}"),
        format!("oci-archive:{out}/oci.tar:a:1"),
    ) {
        copy(
            format!("oci-archive:{from}"),
            format!("docker-archive:{out}/docker.tar:a:1"),
        );
        for name in ["oci.tar", "docker.tar"] {
            let there = store(directory.path(), &format!("there-{name}"));
            let bytes = fs::read(directory.path().join(name)).unwrap();
            let loaded = load(&there, &bytes).unwrap();
            assert_eq!(loaded[0].id, id, "{name}");
        }
    }
}

#[test]
fn an_image_is_whole_even_if_others_are_collected_while_it_is_made() {
    let directory = tempfile::tempdir().unwrap();
    let store = store(directory.path(), "store");
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                store.gc().unwrap();
                std::thread::yield_now();
            }
        });
        for i in 0..30 {
            let id = import(&store, "file", &format!("made:{i}"));
            let image = store.inspect(&id.to_string()).unwrap();
            for digest in [id, image.record.manifest.digest] {
                assert!(store.content().has(&digest), "{i}: {digest} is gone");
            }
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
