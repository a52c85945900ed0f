//! Pulls from a registry that breaks off, forgets, or lies.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use image::layer::tar::TarWriter;
use image::{Cancel, Digest, Error, PullOptions, Pulled, Silent, Store};

/// What the server does with one path.
#[derive(Clone, Default)]
struct Answer {
    body: Vec<u8>,
    kind: &'static str,
    /// How many answers are cut in the middle before one is whole.
    cuts: usize,
    /// Whether `Range` is heeded.
    ranges: bool,
    /// The `Docker-Content-Digest` header.
    digest: Option<Digest>,
}

#[derive(Default)]
struct Shared {
    answers: HashMap<String, Answer>,
    /// Path and `Range` header of each request for a blob.
    asked: Vec<(String, Option<String>)>,
}

struct Server {
    address: String,
    shared: Arc<Mutex<Shared>>,
}

impl Server {
    fn start() -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shared: Arc<Mutex<Shared>> = Arc::default();
        let theirs = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = theirs.clone();
                std::thread::spawn(move || drop(answer(stream, &shared)));
            }
        });
        Server { address, shared }
    }

    fn serve(&self, path: &str, answer: Answer) {
        let path = format!("/v2/app/{path}");
        self.shared.lock().unwrap().answers.insert(path, answer);
    }

    fn blob(&self, body: &[u8], answer: Answer) -> Digest {
        let digest = Digest::of(body);
        let body = body.to_vec();
        self.serve(&format!("blobs/{digest}"), Answer { body, ..answer });
        digest
    }

    /// An image `app:TAG` of these layers (content of the diff, blob).
    fn image(&self, tag: &str, layers: &[(&[u8], &[u8], Answer)]) {
        let diffs: Vec<String> = layers
            .iter()
            .map(|(diff, ..)| Digest::of(diff).to_string())
            .collect();
        let config = serde_json::json!({"architecture": arch(), "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": diffs}})
        .to_string();
        let config_digest = self.blob(config.as_bytes(), Answer::default());
        let layers: Vec<serde_json::Value> = layers
            .iter()
            .map(|(_, blob, answer)| {
                let digest = self.blob(blob, answer.clone());
                serde_json::json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest.to_string(),
                    "size": blob.len()})
            })
            .collect();
        let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest.to_string(),
                "size": config.len()},
            "layers": layers});
        self.manifest(tag, MANIFEST, manifest.to_string().into_bytes());
    }

    fn manifest(&self, tag: &str, kind: &'static str, body: Vec<u8>) {
        let answer = Answer {
            body,
            kind,
            ..Answer::default()
        };
        self.serve(&format!("manifests/{tag}"), answer);
    }

    fn asked(&self, digest: &Digest) -> Vec<Option<String>> {
        let path = format!("/v2/app/blobs/{digest}");
        let shared = self.shared.lock().unwrap();
        shared
            .asked
            .iter()
            .filter(|(asked, _)| *asked == path)
            .map(|(_, range)| range.clone())
            .collect()
    }

    async fn pull(&self, store: &Store, tag: &str) -> image::Result<Pulled> {
        let reference = format!("{}/app:{tag}", self.address).parse().unwrap();
        let options = PullOptions::default();
        image::pull(
            store,
            &reference,
            &options,
            Arc::new(Silent),
            Cancel::default(),
        )
        .await
    }
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

fn arch() -> String {
    image::Platform::host().architecture
}

fn answer(mut stream: TcpStream, shared: &Mutex<Shared>) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte)? == 0 {
            return Ok(());
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let range = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("range")
            .then(|| value.trim().to_owned())
    });
    let answer = {
        let mut shared = shared.lock().unwrap();
        if path.contains("/blobs/") {
            shared.asked.push((path.clone(), range.clone()));
        }
        match shared.answers.get_mut(&path) {
            Some(answer) => {
                let now = answer.clone();
                answer.cuts = answer.cuts.saturating_sub(1);
                Some(now)
            }
            None if path == "/v2/" => Some(Answer::default()),
            None => None,
        }
    };
    let Some(answer) = answer else {
        return write!(
            stream,
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    };
    let from = range.filter(|_| answer.ranges).and_then(|range| {
        range
            .strip_prefix("bytes=")?
            .strip_suffix('-')?
            .parse::<usize>()
            .ok()
    });
    let body = &answer.body[from.unwrap_or(0).min(answer.body.len())..];
    let status = if from.is_some() {
        "206 Partial Content"
    } else {
        "200 OK"
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n",
        body.len()
    )?;
    if !answer.kind.is_empty() {
        write!(stream, "Content-Type: {}\r\n", answer.kind)?;
    }
    if let Some(digest) = answer.digest {
        write!(stream, "Docker-Content-Digest: {digest}\r\n")?;
    }
    stream.write_all(b"\r\n")?;
    let sent = if answer.cuts > 0 {
        body.len() / 2
    } else {
        body.len()
    };
    stream.write_all(&body[..sent])
}

/// A layer with one file of noise, and what it is called in it.
fn layer(name: &str) -> Vec<u8> {
    let mut tar = TarWriter::new(Vec::new());
    let noise: Vec<u8> = (0u64..400_000)
        .map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 41) as u8)
        .collect();
    tar.file(name, 0o644, &noise).unwrap();
    tar.finish().unwrap()
}

fn has_nothing_left(directory: &Path) {
    let left: Vec<_> = fs::read_dir(directory.join("store/ingest"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

fn set_up() -> (tempfile::TempDir, Store, Server) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("store")).unwrap();
    (directory, store, Server::start())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_that_is_cut_goes_on_where_it_ended_with_ranges_and_without() {
    let (directory, store, server) = set_up();
    let (one, two) = (layer("one"), layer("two"));
    let cut = |ranges| Answer {
        cuts: 3,
        ranges,
        ..Answer::default()
    };
    server.image("cut", &[(&one, &one, cut(true)), (&two, &two, cut(false))]);
    let pulled = server.pull(&store, "cut").await.unwrap();
    let folders = store.layer_folders(&pulled.id).unwrap();
    assert!(folders[1].join("one").exists() && folders[0].join("two").exists());
    let asked = server.asked(&Digest::of(&one));
    assert_eq!(asked.len(), 4);
    assert!(
        asked[0].is_none() && asked[1..].iter().all(Option::is_some),
        "{asked:?}"
    );
    assert_eq!(server.asked(&Digest::of(&two)).len(), 4);
    has_nothing_left(directory.path());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_come_in_every_compression() {
    let (_directory, store, server) = set_up();
    let diffs: Vec<Vec<u8>> = ["gz", "zst", "xz", "plain"]
        .iter()
        .map(|name| layer(name))
        .collect();
    let mut gzip = image::layer::compression::gzip(Vec::new());
    gzip.write_all(&diffs[0]).unwrap();
    let blobs = [
        gzip.finish().unwrap(),
        zstd::encode_all(&diffs[1][..], 3).unwrap(),
        liblzma::encode_all(&diffs[2][..], 1).unwrap(),
        diffs[3].clone(),
    ];
    let layers: Vec<(&[u8], &[u8], Answer)> = diffs
        .iter()
        .zip(&blobs)
        .map(|(diff, blob)| (&diff[..], &blob[..], Answer::default()))
        .collect();
    server.image("all", &layers);
    let pulled = server.pull(&store, "all").await.unwrap();
    let folders = store.layer_folders(&pulled.id).unwrap();
    for (folder, name) in folders.iter().zip(["plain", "xz", "zst", "gz"]) {
        assert!(folder.join(name).exists(), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pulls_at_once_fetch_a_layer_they_share_once() {
    let (directory, store, server) = set_up();
    let (shared, own) = (layer("shared"), layer("own"));
    server.image("a", &[(&shared, &shared, Answer::default())]);
    server.image(
        "b",
        &[
            (&shared, &shared, Answer::default()),
            (&own, &own, Answer::default()),
        ],
    );
    let (a, b, again) = tokio::join!(
        server.pull(&store, "a"),
        server.pull(&store, "b"),
        server.pull(&store, "a")
    );
    let (a, b) = (a.unwrap(), b.unwrap());
    assert_eq!(again.unwrap().id, a.id);
    assert_eq!(server.asked(&Digest::of(&shared)).len(), 1);
    assert_eq!(
        store.layer_folders(&a.id).unwrap()[0],
        store.layer_folders(&b.id).unwrap()[1]
    );
    has_nothing_left(directory.path());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_lies_is_refused_and_leaves_nothing() {
    let (directory, store, server) = set_up();
    let (good, evil) = (layer("good"), layer("evil"));
    let digest = Digest::of(&good);
    // The blob is another one of the same size, cut short, or longer than was said.
    server.image("lies", &[(&good, &good, Answer::default())]);
    for (body, what) in [
        (evil.clone(), "the content is"),
        ([&good[..], b"more"].concat(), "bytes came"),
    ] {
        let answer = Answer {
            body,
            ..Answer::default()
        };
        server.serve(&format!("blobs/{digest}"), answer);
        let error = server.pull(&store, "lies").await.unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
        has_nothing_left(directory.path());
    }
    // The blob is as promised, and its content is not what the configuration says.
    server.image("diff", &[(&evil, &good, Answer::default())]);
    let error = server.pull(&store, "diff").await.unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
    has_nothing_left(directory.path());
    // A manifest under a digest that is not its own.
    server.image("manifest", &[(&good, &good, Answer::default())]);
    let mut wrong = server.shared.lock().unwrap().answers["/v2/app/manifests/manifest"].clone();
    wrong.digest = Some(Digest::of(b"something else"));
    server.serve("manifests/manifest", wrong);
    let error = server.pull(&store, "manifest").await.unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
    // A configuration that is another one.
    server.image("config", &[(&good, &good, Answer::default())]);
    let path = {
        let shared = server.shared.lock().unwrap();
        let manifest = &shared.answers["/v2/app/manifests/config"].body;
        let manifest: serde_json::Value = serde_json::from_slice(manifest).unwrap();
        format!("blobs/{}", manifest["config"]["digest"].as_str().unwrap())
    };
    let answer = Answer {
        body: b"{}".to_vec(),
        ..Answer::default()
    };
    server.serve(&path, answer);
    let error = server.pull(&store, "config").await.unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
    assert!(store.list(&image::Filter::default()).unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_of_other_schemas_are_named_in_the_refusal() {
    let (_directory, store, server) = set_up();
    let old = "application/vnd.docker.distribution.manifest.v1+prettyjws";
    let schema1 = br#"{"schemaVersion":1,"name":"app","tag":"old","architecture":"amd64","fsLayers":[],"history":[],"signatures":[]}"#;
    server.manifest("old", old, schema1.to_vec());
    let error = server.pull(&store, "old").await.unwrap_err().to_string();
    assert!(error.contains("schema"), "{error}");
    // An artifact: a manifest, but of no image.
    let artifact = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
        "config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},
        "layers":[{"mediaType":"text/plain","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2}]}"#;
    server.manifest("artifact", MANIFEST, artifact.to_vec());
    server.blob(b"{}", Answer::default());
    assert!(server.pull(&store, "artifact").await.is_err());
    for (tag, body) in [
        ("empty", &b""[..]),
        ("garbage", b"<html>"),
        ("list", b"[]"),
        ("deep", "[".repeat(100_000).as_bytes()),
    ] {
        server.manifest(tag, MANIFEST, body.to_vec());
        let error = server.pull(&store, tag).await.unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{tag}: {error}");
    }
}
