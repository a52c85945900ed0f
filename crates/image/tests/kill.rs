//! A process that uses the store is killed at random moments; what is there afterwards is whole.

use std::collections::HashSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use image::layer::tar::TarWriter;
use image::{Cancel, CommitOptions, Digest, Filter, ImportOptions, RemoveOptions, Store};

const STORE: &str = "BERTH_TEST_STORE";

fn layer(number: u64) -> Vec<u8> {
    let mut tar = TarWriter::new(Vec::new());
    tar.file("name", 0o644, number.to_string().as_bytes())
        .unwrap();
    for file in 0..20 {
        let bytes: Vec<u8> = (0..5000u64)
            .map(|i| (i.wrapping_mul(number + file).wrapping_mul(0x9e37_79b9) >> 13) as u8)
            .collect();
        tar.file(&format!("folder/{file}"), 0o600, &bytes).unwrap();
    }
    tar.finish().unwrap()
}

/// What is killed: imports, commits, names, removes and collects without end.
#[test]
fn worker() {
    let Ok(directory) = std::env::var(STORE) else {
        return;
    };
    let store = Store::open(Path::new(&directory)).unwrap();
    let seed = u64::from(std::process::id());
    for number in 0.. {
        let name = format!("made:{}", number % 5);
        let options = ImportOptions {
            reference: Some(name.parse().unwrap()),
            ..ImportOptions::default()
        };
        let tar = layer(seed * 1000 + number);
        let id = store
            .import(&tar[..], &options, &Cancel::default())
            .unwrap();
        let key = format!("snapshot-{seed}-{number}");
        let layers = store.snapshot(&key, &id).unwrap();
        fs::write(layers.upper.join("added"), number.to_string()).unwrap();
        let commit = CommitOptions {
            reference: Some(format!("committed:{}", number % 3).parse().unwrap()),
            ..CommitOptions::default()
        };
        store.commit(&key, &commit).unwrap();
        if number % 2 == 0 {
            store.remove_snapshot(&key).unwrap();
        }
        if number % 3 == 2 {
            let options = RemoveOptions {
                force: true,
                ..RemoveOptions::default()
            };
            let _ = store.remove(&name, options, &|_| Vec::new());
        }
        if number % 4 == 3 {
            store.prune(&Filter::default(), &|_| Vec::new()).unwrap();
        }
    }
}

/// Every image has all its parts, and every part belongs to something.
fn check(directory: &Path) {
    let store = Store::open(directory).unwrap();
    store.gc().unwrap();
    let mut wanted: HashSet<Digest> = HashSet::new();
    let mut folders: HashSet<std::path::PathBuf> = HashSet::new();
    for image in store
        .list(&Filter {
            all: true,
            ..Filter::default()
        })
        .unwrap()
    {
        wanted.insert(image.id);
        wanted.insert(image.record.manifest.digest);
        for layer in &image.record.layers {
            wanted.insert(layer.blob.digest);
        }
        for folder in store.layer_folders(&image.id).unwrap() {
            assert!(
                folder.join("name").exists() || folder.join("added").exists(),
                "{folder:?} of {} is not whole",
                image.id
            );
            folders.insert(folder);
        }
    }
    for digest in &wanted {
        let bytes = fs::read(store.content().path(digest)).unwrap();
        assert_eq!(Digest::of(&bytes), *digest);
    }
    for (key, image) in store.snapshots() {
        let layers = store.snapshot_layers(&key).unwrap();
        assert!(layers.upper.is_dir() && layers.work.is_dir());
        folders.extend(layers.lower.clone());
        assert!(
            layers.lower.iter().all(|folder| folder.is_dir()),
            "{image:?}"
        );
        store.remove_snapshot(&key).unwrap();
    }
    let there = fs::read_dir(directory.join("layers")).unwrap().count();
    assert_eq!(there, folders.len(), "layers nobody wants, or too few");
    assert_eq!(fs::read_dir(directory.join("ingest")).unwrap().count(), 0);
    store.gc().unwrap();
    let blobs: HashSet<Digest> = store.content().list().unwrap().into_iter().collect();
    assert_eq!(blobs, wanted);
    for sub in ["images", "."] {
        for entry in fs::read_dir(directory.join(sub)).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            assert!(!name.contains("tmp"), "{name} was left");
        }
    }
}

#[test]
fn a_store_whose_process_was_killed_at_any_moment_is_whole() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let mut random = [0; 2];
    for _ in 0..25 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "worker", "--nocapture"])
            .env(STORE, &path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        getrandom::fill(&mut random).unwrap();
        let pause = 50 + u64::from(u16::from_ne_bytes(random)) % 400;
        std::thread::sleep(Duration::from_millis(pause));
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(
            status.signal(),
            Some(9),
            "the worker ended by itself: {status}"
        );
        check(&path);
    }
}
