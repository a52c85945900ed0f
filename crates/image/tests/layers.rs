//! Layers from good and hostile tars, through the store's own doors.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use image::layer::tar::{Entry, EntryKind, TarWriter};
use image::layer::{Limits, apply::apply};
use image::{
    Cancel, ChangeKind, CommitOptions, Error, ImportOptions, Reference, RemoveOptions, Removed,
    Store,
};

fn tar(entries: &[(Entry, &[u8])]) -> Vec<u8> {
    let mut tar = TarWriter::new(Vec::new());
    for (entry, content) in entries {
        let entry = Entry {
            size: content.len() as u64,
            ..entry.clone()
        };
        tar.entry(&entry).unwrap();
        tar.write_all(content).unwrap();
    }
    tar.finish().unwrap()
}

fn file(path: &str) -> Entry {
    Entry::new(EntryKind::File, path, 0o644)
}

fn folder(path: &str) -> Entry {
    Entry::new(EntryKind::Directory, path, 0o755)
}

fn link(kind: EntryKind, path: &str, target: &str) -> Entry {
    Entry {
        link: target.into(),
        ..Entry::new(kind, path, 0o777)
    }
}

fn unpack(
    bytes: &[u8],
    target: &Path,
    lowest: bool,
) -> image::Result<image::layer::apply::Applied> {
    fs::create_dir_all(target).unwrap();
    apply(
        bytes,
        target,
        lowest,
        Limits {
            keep_free: 0,
            ..Limits::default()
        },
        &Cancel::default(),
    )
}

fn store(directory: &Path) -> Store {
    Store::open(&directory.join("store")).unwrap()
}

fn litter(directory: &Path) -> Vec<String> {
    let count = |sub: &str| {
        fs::read_dir(directory.join("store").join(sub))
            .unwrap()
            .flatten()
            .map(|e| format!("{sub}/{}", e.file_name().to_string_lossy()))
            .collect::<Vec<_>>()
    };
    [
        count("ingest"),
        count("layers"),
        count("blobs/sha256"),
        count("images"),
    ]
    .concat()
}

fn is_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: {test} needs root");
    }
    root
}

#[test]
fn hostile_archives_are_refused_and_leave_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let store = store(directory.path());
    let outside = directory.path().join("outside");
    fs::write(&outside, b"untouched").unwrap();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("..", tar(&[(file("../outside"), b"x")])),
        (
            "deep ..",
            tar(&[(folder("a"), b""), (file("a/../../outside"), b"x")]),
        ),
        (
            "link out",
            tar(&[(link(EntryKind::HardLink, "stolen", "../../outside"), b"")]),
        ),
        (
            "link absolute",
            tar(&[(link(EntryKind::HardLink, "stolen", "/etc/passwd"), b"")]),
        ),
        (
            "link to folder",
            tar(&[
                (folder("a"), b""),
                (link(EntryKind::HardLink, "b", "a"), b""),
            ]),
        ),
        ("root replaced", tar(&[(file("."), b"x")])),
        (
            "loop",
            tar(&[
                (link(EntryKind::Symlink, "a", "b"), b""),
                (link(EntryKind::Symlink, "b", "a"), b""),
                (file("a/x"), b"x"),
            ]),
        ),
        (
            "through a file",
            tar(&[(file("a"), b"x"), (file("a/b"), b"x")]),
        ),
        (
            "NUL",
            tar(&[(
                Entry::new(
                    EntryKind::File,
                    vec![b'a'; 300]
                        .into_iter()
                        .chain([0, b'b'])
                        .collect::<Vec<_>>(),
                    0o644,
                ),
                b"x",
            )]),
        ),
        (
            "no tar",
            b"this is no tar at all, whatever its name says ".repeat(30),
        ),
        ("cut", {
            let mut bytes = tar(&[(file("a"), &[7; 4000])]);
            bytes.truncate(2000);
            bytes
        }),
        ("lying gzip", {
            let mut bytes = vec![0x1f, 0x8b, 8, 0];
            bytes.extend([0xee; 500]);
            bytes
        }),
        ("xz", b"\xfd7zXZ\0\0\0\0\0\0\0".to_vec()),
    ];
    for (name, bytes) in cases {
        let result = store.import(&bytes[..], &ImportOptions::default(), &Cancel::default());
        assert!(result.is_err(), "{name} was taken");
        assert_eq!(
            litter(directory.path()),
            Vec::<String>::new(),
            "{name} left something"
        );
    }
    assert_eq!(fs::read(&outside).unwrap(), b"untouched");
}

#[test]
fn links_inside_a_layer_lead_to_its_own_files_only() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("layer");
    fs::create_dir(directory.path().join("victim")).unwrap();
    let victim = directory.path().join("victim").display().to_string();
    let bytes = tar(&[
        (folder("usr/lib"), b""),
        (link(EntryKind::Symlink, "lib", "usr/lib"), b""),
        (file("lib/inside"), b"1"),
        (link(EntryKind::Symlink, "up", "../../../../../../.."), b""),
        (file("up/file"), b"2"),
        (link(EntryKind::Symlink, "absolute", &victim), b""),
        (file("/rooted"), b"3"),
    ]);
    unpack(&bytes, &target, true).unwrap();
    assert_eq!(fs::read(target.join("usr/lib/inside")).unwrap(), b"1");
    assert_eq!(fs::read(target.join("file")).unwrap(), b"2");
    assert_eq!(fs::read(target.join("rooted")).unwrap(), b"3");
    let through = tar(&[
        (link(EntryKind::Symlink, "absolute", &victim), b""),
        (file("absolute/file"), b"x"),
    ]);
    let error = unpack(&through, &directory.path().join("second"), true).unwrap_err();
    assert!(matches!(error, Error::HostileEntry { .. }), "{error}");
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 0);
}

#[test]
fn limits_stop_bombs() {
    let directory = tempfile::tempdir().unwrap();
    let limits = Limits {
        entries: 10,
        bytes: 1 << 20,
        keep_free: 0,
    };
    let target = directory.path().join("a");
    fs::create_dir(&target).unwrap();
    let many: Vec<(Entry, &[u8])> = (0..20)
        .map(|i| (file(&format!("f{i}")), &b""[..]))
        .collect();
    let error = apply(&tar(&many)[..], &target, true, limits, &Cancel::default()).unwrap_err();
    assert!(matches!(error, Error::LayerLimit(_)), "{error}");
    let big = tar(&[(file("big"), &vec![0; 2 << 20])]);
    let bomb = zstd::encode_all(&big[..], 3).unwrap();
    assert!(bomb.len() < 2000);
    let target = directory.path().join("b");
    fs::create_dir(&target).unwrap();
    let error = apply(&bomb[..], &target, true, limits, &Cancel::default()).unwrap_err();
    assert!(matches!(error, Error::LayerLimit(_)), "{error}");
    // What folders are to have in the end is remembered until then.
    let heavy = |number: u32| Entry {
        xattrs: BTreeMap::from([(b"user.x".to_vec(), vec![b'x'; 900 << 10])]),
        ..folder(&format!("d{number}"))
    };
    let folders: Vec<(Entry, &[u8])> = (0..150).map(|number| (heavy(number), &b""[..])).collect();
    let heavy = zstd::encode_all(&tar(&folders)[..], 1).unwrap();
    drop(folders);
    let error = unpack(&heavy, &directory.path().join("d"), true).unwrap_err();
    assert!(matches!(error, Error::LayerLimit(_)), "{error}");
    let cancel = Cancel::default();
    cancel.cancel();
    let target = directory.path().join("c");
    fs::create_dir(&target).unwrap();
    assert!(matches!(
        apply(&big[..], &target, true, Limits::default(), &cancel),
        Err(Error::Cancelled)
    ));
}

#[test]
fn owners_modes_times_links_and_attributes_are_kept() {
    if !is_root("owners_modes_times_links_and_attributes_are_kept") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("layer");
    let mut setuid = Entry {
        uid: 7,
        gid: 8,
        mtime: (1_000_000_000, 5),
        ..Entry::new(EntryKind::File, "bin/su", 0o4755)
    };
    setuid.xattrs = BTreeMap::from([
        (b"user.note".to_vec(), b"hello".to_vec()),
        (b"trusted.overlay.redirect".to_vec(), b"/etc".to_vec()),
    ]);
    let device = Entry {
        major: 1,
        minor: 3,
        ..Entry::new(EntryKind::Char, "dev/null", 0o666)
    };
    let bytes = tar(&[
        (
            Entry {
                mtime: (900_000_000, 0),
                ..Entry::new(EntryKind::Directory, "bin", 0o750)
            },
            b"",
        ),
        (setuid, b"program"),
        (link(EntryKind::HardLink, "bin/sudo", "bin/su"), b""),
        (link(EntryKind::HardLink, "bin/sudo", "/bin/su"), b""),
        (device, b""),
        (Entry::new(EntryKind::Fifo, "run/pipe", 0o600), b""),
        (file("twice"), b"first"),
        (file("twice"), b"second"),
    ]);
    let applied = unpack(&bytes, &target, true).unwrap();
    let su = fs::metadata(target.join("bin/su")).unwrap();
    assert_eq!(
        (su.uid(), su.gid(), su.mode() & 0o7777, su.nlink()),
        (7, 8, 0o4755, 2)
    );
    assert_eq!((su.mtime(), su.mtime_nsec()), (1_000_000_000, 5));
    let bin = fs::metadata(target.join("bin")).unwrap();
    assert_eq!(
        (bin.mtime(), bin.permissions().mode() & 0o7777),
        (900_000_000, 0o750)
    );
    let mut value = [0; 16];
    let length = rustix::fs::getxattr(target.join("bin/su"), "user.note", &mut value[..]);
    assert!(length.is_err() || value.starts_with(b"hello"));
    assert!(
        rustix::fs::getxattr(
            target.join("bin/su"),
            "trusted.overlay.redirect",
            &mut value[..]
        )
        .is_err()
    );
    assert_eq!(fs::read(target.join("twice")).unwrap(), b"second");
    let null = fs::symlink_metadata(target.join("dev/null")).unwrap();
    assert!(null.file_type().is_char_device() && null.rdev() == rustix::fs::makedev(1, 3));
    assert!(applied.unpacked.implied.contains(&b"run"[..]));
}

#[test]
fn a_snapshot_shows_commits_and_forgets_its_changes() {
    if !is_root("a_snapshot_shows_commits_and_forgets_its_changes") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let store = store(directory.path());
    let base = tar(&[
        (
            Entry {
                uid: 5,
                ..Entry::new(EntryKind::Directory, "kept", 0o700)
            },
            b"",
        ),
        (file("kept/old"), b"old"),
        (file("gone"), b"gone"),
        (folder("replaced"), b""),
        (file("replaced/a"), b"a"),
    ]);
    let name: Reference = "base:1".parse().unwrap();
    let options = ImportOptions {
        reference: Some(name),
        ..ImportOptions::default()
    };
    let id = store
        .import(&base[..], &options, &Cancel::default())
        .unwrap();
    let layers = store.snapshot("one", &id).unwrap();
    assert!(matches!(
        store.snapshot("one", &id),
        Err(Error::SnapshotExists(_))
    ));
    let mounted = match image::mount_detached(&layers, true) {
        Ok(mounted) => mounted,
        Err(error) => {
            eprintln!("SKIPPED: overlays cannot be mounted here: {error}");
            return;
        }
    };
    use std::os::fd::AsRawFd;
    let root = Path::new("/proc/self/fd").join(mounted.as_raw_fd().to_string());
    fs::write(root.join("kept/new"), b"new").unwrap();
    fs::remove_file(root.join("gone")).unwrap();
    fs::remove_dir_all(root.join("replaced")).unwrap();
    fs::create_dir(root.join("replaced")).unwrap();
    fs::write(root.join("replaced/b"), b"b").unwrap();
    let changes: Vec<(String, ChangeKind)> = store
        .snapshot_changes("one")
        .unwrap()
        .into_iter()
        .map(|c| (c.path, c.kind))
        .collect();
    use ChangeKind::{Added, Deleted, Modified};
    let expected = [
        ("/gone", Deleted),
        ("/kept", Modified),
        ("/kept/new", Added),
        ("/replaced", Modified),
        ("/replaced/a", Deleted),
        ("/replaced/b", Added),
    ];
    assert_eq!(
        changes,
        expected.map(|(path, kind)| (path.to_owned(), kind))
    );
    assert!(store.snapshot_usage("one").unwrap().bytes >= 4);
    let mut exported = Vec::new();
    image::export(&mounted, &mut exported).unwrap();
    drop(mounted);
    let committed = CommitOptions {
        reference: Some("made:2".parse().unwrap()),
        ..CommitOptions::default()
    };
    let made = store.commit("one", &committed).unwrap();
    assert_eq!(store.inspect("made:2").unwrap().record.layers.len(), 2);
    let second = store.snapshot("two", &made).unwrap();
    let mounted = image::mount_detached(&second, true).unwrap();
    let mut again = Vec::new();
    image::export(&mounted, &mut again).unwrap();
    drop(mounted);
    let names = |bytes: &[u8]| {
        let mut reader = image::layer::tar::TarReader::new(bytes);
        let mut found = Vec::new();
        while let Some(entry) = reader.next_entry().unwrap() {
            found.push((
                String::from_utf8(entry.path).unwrap(),
                entry.uid,
                entry.mode,
            ));
        }
        found
    };
    assert_eq!(names(&exported), names(&again));
    assert!(names(&again).contains(&("kept/".to_owned(), 5, 0o700)));
    assert!(matches!(
        store.remove("base:1", RemoveOptions::default(), &|_| vec![
            image::InUse {
                container: "c".into(),
                running: true
            }
        ]),
        Err(Error::Conflict(_))
    ));
    for key in ["one", "two"] {
        store.remove_snapshot(key).unwrap();
        store.remove_snapshot(key).unwrap();
    }
    let removed = store
        .remove("made:2", RemoveOptions::default(), &|_| Vec::new())
        .unwrap();
    assert!(
        removed.contains(&Removed::Untagged("made:2".into()))
            && removed.contains(&Removed::Deleted(made))
    );
    store
        .remove("base:1", RemoveOptions::default(), &|_| Vec::new())
        .unwrap();
    assert_eq!(litter(directory.path()), Vec::<String>::new());
}

#[test]
fn a_store_opened_again_has_everything_and_no_half_made_things() {
    let directory = tempfile::tempdir().unwrap();
    let id = {
        let store = store(directory.path());
        assert!(matches!(
            Store::open(&directory.path().join("store")),
            Err(Error::Conflict(_))
        ));
        let bytes = tar(&[(file("a"), b"x")]);
        let options = ImportOptions {
            reference: Some("a:1".parse().unwrap()),
            ..ImportOptions::default()
        };
        let id = store
            .import(&bytes[..], &options, &Cancel::default())
            .unwrap();
        store.snapshot("key", &id).unwrap();
        id
    };
    let root = directory.path().join("store");
    fs::create_dir_all(root.join("layers/77/fs")).unwrap();
    fs::create_dir_all(root.join("snapshots/half/upper")).unwrap();
    fs::write(root.join("ingest/blob-9"), b"half").unwrap();
    let store = Store::open(&root).unwrap();
    assert_eq!(store.resolve("a:1").unwrap(), id);
    assert_eq!(store.resolve(&id.short()).unwrap(), id);
    assert_eq!(store.snapshots(), [("key".to_owned(), Some(id))]);
    assert!(!root.join("layers/77").exists() && !root.join("snapshots/half").exists());
    assert!(!root.join("ingest/blob-9").exists());
    store.gc().unwrap();
    assert!(store.layer_folders(&id).unwrap()[0].join("a").exists());
}

#[test]
fn what_a_power_cut_tore_is_unpacked_again_or_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("store");
    let bytes = tar(&[(file("a"), b"whole")]);
    let options = ImportOptions {
        reference: Some("a:1".parse().unwrap()),
        ..ImportOptions::default()
    };
    let (layer, blob) = {
        let store = store(directory.path());
        let id = store
            .import(&bytes[..], &options, &Cancel::default())
            .unwrap();
        let image = store.inspect("a:1").unwrap();
        let blob = image.record.layers[0].blob.digest;
        (
            store.layer_folders(&id).unwrap().remove(0),
            store.content().path(&blob),
        )
    };
    let other_boot = |text: &str| {
        let (_, rest) = text.split_once("\",").unwrap();
        format!("{{\"boot\":\"another\",{rest}")
    };
    let unsettled = root.join("unsettled.json");
    let noted = fs::read_to_string(&unsettled).unwrap();
    fs::write(layer.join("a"), b"").unwrap();
    fs::write(&unsettled, other_boot(&noted)).unwrap();
    {
        let store = Store::open(&root).unwrap();
        let id = store.resolve("a:1").unwrap();
        let folder = store.layer_folders(&id).unwrap().remove(0);
        assert_eq!(fs::read(folder.join("a")).unwrap(), b"whole");
    }
    fs::write(&blob, b"torn").unwrap();
    fs::write(&unsettled, other_boot(&noted)).unwrap();
    let store = Store::open(&root).unwrap();
    assert!(matches!(store.resolve("a:1"), Err(Error::NoSuchImage(_))));
}

#[test]
fn a_mark_at_the_root_of_a_layer_hides_everything_beneath_it() {
    let directory = tempfile::tempdir().unwrap();
    let store = store(directory.path());
    let lease = store.lease();
    let layer = |bytes: Vec<u8>, parent| {
        store
            .layer_from_tar(&bytes[..], parent, &lease, &Cancel::default())
            .unwrap()
    };
    let (lowest, first) = layer(tar(&[(file("old"), b"1")]), None);
    let marks = tar(&[(file(".wh..wh..opq"), b""), (file("new"), b"2")]);
    let (marked, second) = layer(marks, Some(lowest.chain_id));
    let (top, third) = layer(tar(&[(file("newest"), b"3")]), Some(marked.chain_id));
    let mut config = image::ImageConfig::blank(&image::Platform::host());
    config.rootfs.diff_ids = vec![lowest.diff_id, marked.diff_id, top.diff_id];
    let id = store
        .assemble(&config, vec![first, second, third], None, &[])
        .unwrap();
    let folders = store.layer_folders(&id).unwrap();
    assert_eq!(folders.len(), 2);
    assert!(folders[0].join("newest").exists() && folders[1].join("new").exists());
    assert!(!folders[1].join(".wh..wh..opq").exists());
    assert_eq!(store.snapshot("s", &id).unwrap().lower, folders);
    drop(lease);
    drop(store);
    // The next daemon knows it too, and the hidden layer is kept: the image has it.
    let store = self::store(directory.path());
    assert_eq!(store.layer_folders(&id).unwrap(), folders);
    store.gc().unwrap();
    assert!(store.layer(&lowest.chain_id).is_some());
}
