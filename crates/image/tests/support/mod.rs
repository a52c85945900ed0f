//! A live `docker-registry` and an image to push into it.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use image::layer::tar::TarWriter;
use image::{Cancel, ImportOptions, Store};

pub struct Registry {
    process: Child,
    pub port: u16,
}

impl Registry {
    pub fn start(directory: &Path) -> Option<Registry> {
        Registry::with(directory, "127.0.0.1", "", "")
    }

    /// `more` are further keys of the configuration, `http` further ones of its `http` (each `, KEY: VALUE`).
    pub fn with(directory: &Path, address: &str, more: &str, http: &str) -> Option<Registry> {
        let port = TcpListener::bind((address, 0))
            .ok()?
            .local_addr()
            .ok()?
            .port();
        let config = directory.join("registry.yml");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\n\
                 http: {{addr: \"{address}:{port}\"{http}}}\n{more}\n",
                directory.join("registry").display()
            ),
        )
        .unwrap();
        let spawned = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(process) = spawned else {
            eprintln!(
                "SKIPPED: docker-registry is not installed (apt-get install docker-registry)"
            );
            return None;
        };
        let registry = Registry { process, port };
        for _ in 0..300 {
            if TcpStream::connect((address, port)).is_ok() {
                return Some(registry);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        eprintln!("SKIPPED: docker-registry does not answer");
        None
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub fn make_image(store: &Store, name: &str, text: &[u8]) {
    let mut tar = TarWriter::new(Vec::new());
    tar.file("hello", 0o644, text).unwrap();
    // Noise does not compress, so that the blob is of some size.
    let noise: Vec<u8> = (0u64..300_000)
        .map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 37) as u8)
        .collect();
    tar.file("noise", 0o600, &noise).unwrap();
    let bytes = tar.finish().unwrap();
    let options = ImportOptions {
        reference: Some(name.parse().unwrap()),
        ..ImportOptions::default()
    };
    store
        .import(&bytes[..], &options, &Cancel::default())
        .unwrap();
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}
