//! Pull and push against Debian's `docker-registry`, on this machine's own address.

mod support;

use std::fs;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use image::{Cancel, Event, Platform, PullOptions, PushOptions, Reference, RemoveOptions, Store};

use support::{Registry, make_image, runtime};

#[test]
fn what_is_pushed_is_pulled_again() {
    let directory = tempfile::tempdir().unwrap();
    let Some(registry) = Registry::start(directory.path()) else {
        return;
    };
    let here = Store::open(&directory.path().join("here")).unwrap();
    let name = format!("127.0.0.1:{}/me/app:1", registry.port);
    let other = format!("127.0.0.1:{}/me/copy:1", registry.port);
    make_image(&here, &name, b"hello registry");
    let reference: Reference = name.parse().unwrap();
    let said: Arc<Mutex<Vec<String>>> = Arc::default();
    let listener = {
        let said = said.clone();
        Arc::new(move |event: Event| said.lock().unwrap().push(event.status))
    };
    let runtime = runtime();
    let push = |reference: &Reference| {
        runtime.block_on(image::push(
            &here,
            reference,
            &PushOptions::default(),
            listener.clone(),
            Cancel::default(),
        ))
    };
    let pushed = push(&reference).unwrap();
    assert!(said.lock().unwrap().contains(&"Pushed".to_owned()));
    push(&reference).unwrap();
    assert!(
        said.lock()
            .unwrap()
            .contains(&"Layer already exists".to_owned())
    );
    here.tag(&name, &other.parse().unwrap()).unwrap();
    push(&other.parse().unwrap()).unwrap();
    assert!(
        said.lock()
            .unwrap()
            .contains(&"Mounted from me/app".to_owned())
    );

    let there = Store::open(&directory.path().join("there")).unwrap();
    let pull = |reference: &Reference, options: &PullOptions| {
        runtime.block_on(image::pull(
            &there,
            reference,
            options,
            listener.clone(),
            Cancel::default(),
        ))
    };
    let pulled = pull(&reference, &PullOptions::default()).unwrap();
    assert_eq!(pulled.digest, pushed.digest);
    assert_eq!(pulled.id, here.resolve(&name).unwrap());
    assert!(!pulled.up_to_date);
    assert_eq!(
        fs::read(there.layer_folders(&pulled.id).unwrap()[0].join("hello")).unwrap(),
        b"hello registry"
    );
    assert!(
        pull(&reference, &PullOptions::default())
            .unwrap()
            .up_to_date
    );
    pull(
        &reference.with_digest(pushed.digest),
        &PullOptions::default(),
    )
    .unwrap();
    assert_eq!(there.inspect(&name).unwrap().repo_digests.len(), 1);
    let missing = format!("127.0.0.1:{}/me/app:nothing", registry.port)
        .parse()
        .unwrap();
    let error = pull(&missing, &PullOptions::default()).unwrap_err();
    assert_eq!(base::Classified::kind(&error), base::Kind::NotFound);

    // A download that broke off goes on where it ended.
    let blob = there.inspect(&name).unwrap().record.layers[0].blob.clone();
    let bytes = fs::read(there.content().path(&blob.digest)).unwrap();
    there
        .remove(&name, RemoveOptions::default(), &|_| Vec::new())
        .unwrap();
    let partial = directory
        .path()
        .join(format!("there/ingest/{}.partial", blob.digest.hex()));
    fs::write(&partial, &bytes[..bytes.len() / 2]).unwrap();
    pull(&reference, &PullOptions::default()).unwrap();
    assert!(!partial.exists() && there.content().has(&blob.digest));
    // One that was torn meanwhile is thrown away, and the next try is clean.
    there
        .remove(&name, RemoveOptions::default(), &|_| Vec::new())
        .unwrap();
    fs::write(&partial, vec![b'x'; bytes.len() / 2]).unwrap();
    assert!(pull(&reference, &PullOptions::default()).is_err());
    assert!(!partial.exists());
    pull(&reference, &PullOptions::default()).unwrap();

    if let Ok(output) = Command::new("skopeo")
        .args(["inspect", "--tls-verify=false", &format!("docker://{name}")])
        .stdin(Stdio::null())
        .output()
    {
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(String::from_utf8_lossy(&output.stdout).contains(&pushed.digest.to_string()));
    } else {
        eprintln!("SKIPPED: skopeo is not installed");
    }
}

#[test]
fn of_an_index_the_wanted_platform_is_pulled() {
    let directory = tempfile::tempdir().unwrap();
    let Some(registry) = Registry::start(directory.path()) else {
        return;
    };
    let store = Store::open(&directory.path().join("store")).unwrap();
    let name = format!("127.0.0.1:{}/multi:1", registry.port);
    make_image(&store, &name, b"multi");
    let runtime = runtime();
    let silent = Arc::new(image::Silent);
    let reference: Reference = name.parse().unwrap();
    let pushed = runtime
        .block_on(image::push(
            &store,
            &reference,
            &PushOptions::default(),
            silent.clone(),
            Cancel::default(),
        ))
        .unwrap();
    let index = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{{"mediaType":
        "application/vnd.oci.image.manifest.v1+json","digest":"{}","size":{},"platform":{{"os":"linux","architecture":"s390x"}}}}]}}"#,
        pushed.digest, pushed.size
    );
    let address = format!("http://127.0.0.1:{}/v2/multi/manifests/all", registry.port);
    let status = runtime
        .block_on(
            reqwest::Client::builder()
                .no_proxy()
                .build()
                .unwrap()
                .put(address)
                .header("content-type", "application/vnd.oci.image.index.v1+json")
                .body(index)
                .send(),
        )
        .unwrap()
        .status();
    assert!(status.is_success(), "{status}");
    let all: Reference = format!("127.0.0.1:{}/multi:all", registry.port)
        .parse()
        .unwrap();
    let pull = |platform: &str| {
        let options = PullOptions {
            platform: Some(Platform::parse(platform).unwrap()),
            ..PullOptions::default()
        };
        runtime.block_on(image::pull(
            &store,
            &all,
            &options,
            silent.clone(),
            Cancel::default(),
        ))
    };
    assert!(pull("linux/s390x").is_ok());
    let error = pull("linux/arm64").unwrap_err().to_string();
    assert!(error.contains("linux/s390x"), "{error}");
}

#[test]
fn a_registry_that_is_not_there_is_named_in_the_error() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("store")).unwrap();
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let reference: Reference = format!("127.0.0.1:{port}/x").parse().unwrap();
    let error = runtime()
        .block_on(image::pull(
            &store,
            &reference,
            &PullOptions::default(),
            Arc::new(image::Silent),
            Cancel::default(),
        ))
        .unwrap_err();
    assert!(
        error.to_string().contains(&format!("127.0.0.1:{port}")),
        "{error}"
    );
}

#[test]
fn collecting_garbage_takes_nothing_from_pulls_on_their_way() {
    let directory = tempfile::tempdir().unwrap();
    let Some(registry) = Registry::start(directory.path()) else {
        return;
    };
    let here = Store::open(&directory.path().join("here")).unwrap();
    let runtime = runtime();
    let silent = Arc::new(image::Silent);
    let names: Vec<Reference> = (0..3)
        .map(|n| format!("127.0.0.1:{}/many/{n}:1", registry.port))
        .map(|name| {
            make_image(&here, &name, name.as_bytes());
            let reference: Reference = name.parse().unwrap();
            runtime
                .block_on(image::push(
                    &here,
                    &reference,
                    &PushOptions::default(),
                    silent.clone(),
                    Cancel::default(),
                ))
                .unwrap();
            reference
        })
        .collect();
    let there = Store::open(&directory.path().join("there")).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    struct Stop<'a>(&'a std::sync::atomic::AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, std::sync::atomic::Ordering::Release);
        }
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Acquire) {
                there.gc().unwrap();
            }
        });
        // However this ends, the collector ends too.
        let _stop = Stop(&done);
        let options = PullOptions::default();
        for round in 0..10 {
            // Each twice at once.
            let pulls = names.iter().chain(&names).map(|reference| {
                image::pull(
                    &there,
                    reference,
                    &options,
                    silent.clone(),
                    Cancel::default(),
                )
            });
            for pulled in runtime.block_on(futures_util::future::join_all(pulls)) {
                let id = pulled.unwrap_or_else(|e| panic!("round {round}: {e}")).id;
                let image = there.inspect(&id.to_string()).unwrap();
                for layer in &image.record.layers {
                    assert!(there.content().has(&layer.blob.digest));
                }
                let folders = there.layer_folders(&id).unwrap();
                assert!(folders.iter().all(|folder| folder.join("hello").exists()));
            }
            for reference in &names {
                there
                    .remove(
                        &reference.to_string(),
                        RemoveOptions {
                            force: true,
                            ..RemoveOptions::default()
                        },
                        &|_| Vec::new(),
                    )
                    .unwrap();
            }
        }
    });
    there.gc().unwrap();
    assert!(there.content().list().unwrap().is_empty());
    assert_eq!(
        fs::read_dir(directory.path().join("there/layers"))
            .unwrap()
            .count(),
        0
    );
}
