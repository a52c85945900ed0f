//! Registries that want to know who asks: a live `docker-registry` with passwords, with a token server of the
//! test's own, and with a certificate nobody but the configuration vouches for.

mod support;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use base::{Classified, Kind};
use base64::Engine as _;
use image::registry::Trust;
use image::{
    Cancel, Credentials, Event, PullOptions, Pulled, PushOptions, Pushed, Reference, Result, Store,
};

use support::{Registry, make_image, runtime};

/// `user` and `secret`, as `htpasswd -B` writes them.
const PASSWORDS: &str = "user:$2y$05$dZoTMBlMmUFnhyn2G82aTO4kP5vF1TSQXEEjX.nXOulron.Y.kVwC\n";

fn user(password: &str) -> Option<Credentials> {
    Some(Credentials {
        username: "user".to_owned(),
        password: password.to_owned(),
        ..Credentials::default()
    })
}

fn push(store: &Store, name: &str, credentials: Option<Credentials>) -> (Result<Pushed>, String) {
    push_with(
        store,
        name,
        &PushOptions {
            credentials,
            ..PushOptions::default()
        },
    )
}

fn push_with(store: &Store, name: &str, options: &PushOptions) -> (Result<Pushed>, String) {
    let said: Arc<Mutex<String>> = Arc::default();
    let listener = {
        let said = said.clone();
        Arc::new(move |event: Event| {
            let mut said = said.lock().unwrap();
            said.push_str(&event.status);
            said.push('\n');
        })
    };
    let reference: Reference = name.parse().unwrap();
    let pushed = runtime().block_on(image::push(
        store,
        &reference,
        options,
        listener,
        Cancel::default(),
    ));
    let said = said.lock().unwrap().clone();
    (pushed, said)
}

fn pull(store: &Store, name: &str, options: &PullOptions) -> Result<Pulled> {
    runtime().block_on(image::pull(
        store,
        &name.parse().unwrap(),
        options,
        Arc::new(image::Silent),
        Cancel::default(),
    ))
}

fn as_user(credentials: Option<Credentials>) -> PullOptions {
    PullOptions {
        credentials,
        ..PullOptions::default()
    }
}

#[test]
fn a_registry_with_passwords_lets_only_their_owner_in() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("passwords");
    std::fs::write(&file, PASSWORDS).unwrap();
    let auth = format!(
        "auth: {{htpasswd: {{realm: test, path: {}}}}}",
        file.display()
    );
    let Some(registry) = Registry::with(directory.path(), "127.0.0.1", &auth, "") else {
        return;
    };
    let here = Store::open(&directory.path().join("here")).unwrap();
    let domain = format!("127.0.0.1:{}", registry.port);
    let name = format!("{domain}/a:1");
    make_image(&here, &name, b"secret image");
    for credentials in [None, user("wrong")] {
        let error = push(&here, &name, credentials).0.unwrap_err();
        assert_eq!(error.kind(), Kind::Permission, "{error}");
        assert_eq!(
            error.fix(),
            Some(format!("berth login {domain}")),
            "{error}"
        );
    }
    let pushed = push(&here, &name, user("secret")).0.unwrap();
    let there = Store::open(&directory.path().join("there")).unwrap();
    let error = pull(&there, &name, &PullOptions::default()).unwrap_err();
    assert_eq!(error.kind(), Kind::Permission, "{error}");
    let pulled = pull(&there, &name, &as_user(user("secret"))).unwrap();
    assert_eq!(pulled.digest, pushed.digest);
    let login = |password| {
        runtime().block_on(image::registry::login(
            &domain,
            &user(password).unwrap(),
            &Trust::default(),
        ))
    };
    login("secret").unwrap();
    assert_eq!(login("wrong").unwrap_err().kind(), Kind::Permission);
}

/// A key and a certificate of it, self-signed.
fn certificate(directory: &Path, name: &str) -> Option<(PathBuf, PathBuf)> {
    let (key, certificate) = (directory.join("key.pem"), directory.join("cert.pem"));
    let made = Command::new("openssl")
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
        ])
        .args(["-subj", "/CN=test", "-addext"])
        .arg(format!("subjectAltName={name}"))
        .args(["-addext", "basicConstraints=critical,CA:TRUE"])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if made.is_ok_and(|status| status.success()) {
        Some((key, certificate))
    } else {
        eprintln!("SKIPPED: openssl is needed to make a certificate (apt-get install openssl)");
        None
    }
}

fn url64(bytes: &[u8]) -> String {
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes)
}

/// A JSON web token for `access`, signed with RS256 by `openssl`.
fn token(key: &Path, certificate: &Path, access: &[(String, Vec<String>)]) -> String {
    let pem = std::fs::read_to_string(certificate).unwrap();
    let der: String = pem.lines().filter(|l| !l.starts_with("-----")).collect();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let access: Vec<serde_json::Value> = access
        .iter()
        .map(|(name, actions)| {
            serde_json::json!({"type": "repository", "name": name, "actions": actions})
        })
        .collect();
    let header = serde_json::json!({"typ": "JWT", "alg": "RS256", "x5c": [der]});
    let claims = serde_json::json!({
        "iss": "test", "aud": "registry.test", "sub": "user", "jti": "1",
        "nbf": now - 60, "iat": now - 60, "exp": now + 600, "access": access,
    });
    let signed = format!(
        "{}.{}",
        url64(header.to_string().as_bytes()),
        url64(claims.to_string().as_bytes())
    );
    let mut signer = Command::new("openssl")
        .args(["dgst", "-sha256", "-sign"])
        .arg(key)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    signer
        .stdin
        .take()
        .unwrap()
        .write_all(signed.as_bytes())
        .unwrap();
    let signature = signer.wait_with_output().unwrap().stdout;
    format!("{signed}.{}", url64(&signature))
}

/// Hands tokens to `user:secret` for whatever is asked, and to others for pulling what is under `public/`. Returns
/// its address and the scopes it was asked for.
fn token_server(key: PathBuf, certificate: PathBuf) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/token", listener.local_addr().unwrap());
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let log = asked.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
                head.push(byte[0]);
            }
            let head = String::from_utf8_lossy(&head).into_owned();
            let query = head
                .split_whitespace()
                .nth(1)
                .and_then(|t| t.split_once('?'))
                .map_or("", |(_, q)| q)
                .to_owned();
            let known = format!(
                "Basic {}",
                base64::engine::general_purpose::STANDARD.encode("user:secret")
            );
            let credentials = head
                .lines()
                .filter_map(|l| l.split_once(": "))
                .find(|(key, _)| key.eq_ignore_ascii_case("authorization"))
                .map(|(_, value)| value.to_owned());
            if credentials.as_ref().is_some_and(|c| *c != known) {
                let _ = stream.write_all(
                    b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                );
                continue;
            }
            let mut access: BTreeMap<String, Vec<String>> = BTreeMap::new();
            for (_, scope) in query
                .split('&')
                .filter_map(|p| p.split_once('='))
                .filter(|(key, _)| *key == "scope")
            {
                let scope = scope
                    .replace("%3A", ":")
                    .replace("%2F", "/")
                    .replace("%2C", ",");
                log.lock().unwrap().push(scope.clone());
                let parts: Vec<&str> = scope.split(':').collect();
                let [_, name, actions] = parts[..] else {
                    continue;
                };
                let granted = actions
                    .split(',')
                    .filter(|action| {
                        credentials.is_some() || (*action == "pull" && name.starts_with("public/"))
                    })
                    .map(str::to_owned)
                    .collect();
                access.insert(name.to_owned(), granted);
            }
            let access: Vec<_> = access.into_iter().collect();
            let body = serde_json::json!({"token": token(&key, &certificate, &access)}).to_string();
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
        }
    });
    (address, asked)
}

#[test]
fn tokens_are_fetched_for_what_is_done_and_a_mount_asks_for_both_repositories() {
    let directory = tempfile::tempdir().unwrap();
    let Some((key, certificate)) = certificate(directory.path(), "DNS:test") else {
        return;
    };
    let (realm, asked) = token_server(key, certificate.clone());
    let auth = format!(
        "auth: {{token: {{realm: \"{realm}\", service: registry.test, issuer: test, rootcertbundle: {}}}}}",
        certificate.display()
    );
    let Some(registry) = Registry::with(directory.path(), "127.0.0.1", &auth, "") else {
        return;
    };
    let here = Store::open(&directory.path().join("here")).unwrap();
    let name = |path: &str| format!("127.0.0.1:{}/{path}:1", registry.port);
    make_image(&here, &name("public/a"), b"token image");
    for credentials in [None, user("wrong")] {
        let error = push(&here, &name("public/a"), credentials).0.unwrap_err();
        assert_eq!(error.kind(), Kind::Permission, "{error}");
    }
    let pushed = push(&here, &name("public/a"), user("secret")).0.unwrap();
    here.tag(&name("public/a"), &name("mine/b").parse().unwrap())
        .unwrap();
    let (copied, said) = push(&here, &name("mine/b"), user("secret"));
    assert_eq!(copied.unwrap().digest, pushed.digest);
    assert!(said.contains("Mounted from public/a"), "{said}");
    let there = Store::open(&directory.path().join("there")).unwrap();
    assert_eq!(
        pull(&there, &name("public/a"), &PullOptions::default())
            .unwrap()
            .digest,
        pushed.digest
    );
    let error = pull(&there, &name("mine/b"), &PullOptions::default()).unwrap_err();
    assert_eq!(error.kind(), Kind::Permission, "{error}");
    pull(&there, &name("mine/b"), &as_user(user("secret"))).unwrap();
    let asked = asked.lock().unwrap();
    assert!(asked.contains(&"repository:public/a:pull".to_owned()));
    assert!(asked.contains(&"repository:mine/b:pull,push".to_owned()));
}

#[test]
fn a_large_blob_goes_up_in_pieces() {
    let directory = tempfile::tempdir().unwrap();
    let Some(registry) = Registry::start(directory.path()) else {
        return;
    };
    let here = Store::open(&directory.path().join("here")).unwrap();
    let name = format!("127.0.0.1:{}/pieces:1", registry.port);
    make_image(&here, &name, b"pieces");
    let options = PushOptions {
        chunk: 10_000,
        ..PushOptions::default()
    };
    let pushed = push_with(&here, &name, &options).0.unwrap();
    let there = Store::open(&directory.path().join("there")).unwrap();
    let pulled = pull(&there, &name, &PullOptions::default()).unwrap();
    assert_eq!(pulled.digest, pushed.digest);
}

/// Gives this thread, and what it starts, a network of its own with the address 10.99.0.1.
fn own_network() -> bool {
    // SAFETY: only this thread's network namespace changes, and it ends with the test.
    let own = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
    let ip = |arguments: &[&str]| {
        Command::new("ip")
            .args(arguments)
            .status()
            .is_ok_and(|status| status.success())
    };
    let ready = own
        && ip(&["link", "set", "lo", "up"])
        && ip(&["address", "add", "10.99.0.1/32", "dev", "lo"]);
    if !ready {
        eprintln!("SKIPPED: no network namespace can be made here (root and iproute2 are needed)");
    }
    ready
}

#[test]
fn a_registry_with_a_certificate_of_its_own_is_trusted_when_the_configuration_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let Some((authority, certificate)) = certificate(directory.path(), "DNS:authority") else {
        return;
    };
    let (key, leaf) = (
        directory.path().join("leaf.key"),
        directory.path().join("leaf.pem"),
    );
    let made = Command::new("openssl")
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
        ])
        .args(["-subj", "/CN=registry"])
        .args(["-addext", "subjectAltName=IP:10.99.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-CA")
        .arg(&certificate)
        .arg("-CAkey")
        .arg(&authority)
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&leaf)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(made.success());
    if !own_network() {
        return;
    }
    let tls = format!(
        ", tls: {{certificate: \"{}\", key: \"{}\"}}",
        leaf.display(),
        key.display()
    );
    let Some(registry) = Registry::with(directory.path(), "10.99.0.1", "", &tls) else {
        return;
    };
    let here = Store::open(&directory.path().join("here")).unwrap();
    let name = format!("10.99.0.1:{}/tls:1", registry.port);
    make_image(&here, &name, b"tls");
    let error = push(&here, &name, None).0.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    assert!(error.fix().unwrap().contains("registries"), "{error}");
    let trust = Trust {
        authorities: vec![certificate],
        ..Trust::default()
    };
    let options = PushOptions {
        trust: trust.clone(),
        ..PushOptions::default()
    };
    let pushed = push_with(&here, &name, &options).0.unwrap();
    let there = Store::open(&directory.path().join("there")).unwrap();
    let pulled = pull(
        &there,
        &name,
        &PullOptions {
            trust,
            ..PullOptions::default()
        },
    );
    assert_eq!(pulled.unwrap().digest, pushed.digest);
    // A listed insecure registry is taken with the certificate it has.
    let lax = PullOptions {
        trust: Trust {
            insecure: vec![format!("10.99.0.1:{}", registry.port)],
            ..Trust::default()
        },
        ..PullOptions::default()
    };
    pull(&there, &name, &lax).unwrap();
    let missing = PullOptions {
        trust: Trust {
            authorities: vec![directory.path().join("nothing.pem")],
            ..Trust::default()
        },
        ..PullOptions::default()
    };
    let error = pull(&there, &name, &missing).unwrap_err().to_string();
    assert!(error.contains("nothing.pem"), "{error}");
}
