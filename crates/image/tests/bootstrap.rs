//! Whose archive an image may be made from: a small archive of the test's own, as apt and mmdebstrap see it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use image::{BootstrapOptions, Cancel, Digest, Error, Event, Store};

fn gpg(home: &Path, arguments: &[&str]) -> bool {
    Command::new("gpg")
        .arg("--homedir")
        .arg(home)
        .args(["--batch", "--quiet", "--yes", "--pinentry-mode", "loopback"])
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// A key and the file apt takes it from.
fn key(directory: &Path, name: &str) -> Option<(PathBuf, PathBuf)> {
    let (home, keyring) = (directory.join(name), directory.join(format!("{name}.gpg")));
    fs::create_dir(&home).unwrap();
    rustix::fs::chmod(&home, rustix::fs::Mode::RWXU).unwrap();
    let user = format!("{name}@test.invalid");
    let made = gpg(
        &home,
        &["--passphrase", "", "--quick-gen-key", &user, "rsa2048"],
    ) && gpg(
        &home,
        &["--output", keyring.to_str().unwrap(), "--export", &user],
    );
    made.then_some((home, keyring))
}

/// The gpg agent that signing started ends with the test.
struct Agents(Vec<PathBuf>);

impl Drop for Agents {
    fn drop(&mut self) {
        for home in &self.0 {
            let _ = Command::new("gpgconf")
                .env("GNUPGHOME", home)
                .args(["--kill", "all"])
                .stderr(Stdio::null())
                .status();
        }
    }
}

/// An archive with a suite `sid` that holds one package nobody can install, signed with the key in `home`.
fn archive(top: &Path, home: &Path) {
    let suite = top.join("dists/sid");
    let folder = suite.join("main/binary-amd64");
    fs::create_dir_all(&folder).unwrap();
    let packages = "Package: base-files\nEssential: yes\nArchitecture: all\nVersion: 1\nMaintainer: nobody\n\
        Depends: what-nobody-has\nFilename: pool/base-files.deb\nSize: 1\nSHA256: 0\nDescription: none\n\n";
    fs::write(folder.join("Packages"), packages).unwrap();
    let release = format!(
        "Origin: Test\nSuite: sid\nCodename: sid\nDate: {}\nArchitectures: amd64 arm64\nComponents: main\nSHA256:\n {} {} main/binary-amd64/Packages\n",
        jiff::Timestamp::now().strftime("%a, %d %b %Y %H:%M:%S UTC"),
        Digest::of(packages.as_bytes()).hex(),
        packages.len()
    );
    fs::write(suite.join("Release"), release).unwrap();
    let signed = suite.join("InRelease");
    let _ = fs::remove_file(&signed);
    let done = gpg(
        home,
        &[
            "--output",
            signed.to_str().unwrap(),
            "--clearsign",
            suite.join("Release").to_str().unwrap(),
        ],
    );
    assert!(done);
}

#[test]
fn only_an_archive_with_a_trusted_signature_and_untouched_lists_is_taken() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    if !rustix::process::geteuid().is_root()
        || Command::new("mmdebstrap")
            .arg("--version")
            .output()
            .is_err()
    {
        eprintln!("SKIPPED: root and mmdebstrap are needed (apt-get install mmdebstrap)");
        return;
    }
    let (Some((home, keyring)), Some((_, stranger))) = (key(here, "ours"), key(here, "stranger"))
    else {
        eprintln!("SKIPPED: gpg cannot make keys here (apt-get install gnupg)");
        return;
    };
    let _agents = Agents(vec![home.clone(), here.join("stranger")]);
    rustix::fs::chmod(here, rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
    let store = Store::open(&here.join("store")).unwrap();
    let top = here.join("archive");
    let attempt = |keyring: &Path| {
        let options = BootstrapOptions {
            mirror: Some(format!("file://{}", top.display())),
            components: vec!["main".to_owned()],
            keyring: Some(keyring.to_owned()),
            arch: "amd64".to_owned(),
            ..BootstrapOptions::named("debian:sid").unwrap()
        };
        let silent = |_: Event| {};
        let error = image::bootstrap(&store, &options, &silent, &Cancel::default()).unwrap_err();
        let Error::Program { last_words, .. } = error else {
            panic!("{error}")
        };
        last_words
    };
    let distrusts = |said: &str| {
        ["NO_PUBKEY", "BADSIG", "signature", "not signed", "Hash Sum"]
            .iter()
            .any(|word| said.contains(word))
    };
    // Signed and whole: believed, and then its one package lacks what it needs.
    archive(&top, &home);
    let said = attempt(&keyring);
    assert!(!distrusts(&said), "{said}");
    let said = attempt(&stranger);
    assert!(distrusts(&said), "{said}");
    // A list that was changed after signing.
    let packages = top.join("dists/sid/main/binary-amd64/Packages");
    let text = fs::read_to_string(&packages).unwrap();
    fs::write(&packages, text.replace("nobody-has", "nobody-had")).unwrap();
    let said = attempt(&keyring);
    assert!(distrusts(&said), "{said}");
    // The signed document itself.
    archive(&top, &home);
    let signed = top.join("dists/sid/InRelease");
    let text = fs::read_to_string(&signed).unwrap();
    fs::write(&signed, text.replace("Origin: Test", "Origin: Pest")).unwrap();
    let said = attempt(&keyring);
    assert!(distrusts(&said), "{said}");
    // No signature at all.
    fs::remove_file(&signed).unwrap();
    let said = attempt(&keyring);
    assert!(distrusts(&said), "{said}");
    assert!(store.list(&image::Filter::default()).unwrap().is_empty());
    let left: Vec<_> = fs::read_dir(here.join("store/ingest")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}
