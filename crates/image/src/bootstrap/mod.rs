//! Images from a distribution's own package archive, with its signatures verified, and no registry.
//!
//! Debian's `mmdebstrap` does the work of apt and dpkg in a fresh root and writes a tar; this module says from where,
//! what with, and makes an image of it.

pub mod sources;

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::config::{History, ImageConfig, RunConfig};
use crate::error::At;
use crate::layer::tree::Scratch;
use crate::manifest::{go_architecture, is_architecture};
use crate::progress::{Cancel, Event, Progress};
use crate::{Error, ImageId, Platform, Reference, RemoveOptions, Result, Store};

/// What image to make.
#[derive(Debug, Clone, Default)]
pub struct BootstrapOptions {
    /// Only `debian` is known.
    pub distribution: String,
    /// `bookworm`, `sid`, `stable`, or a number (`12`).
    pub suite: String,
    /// In Go's or Debian's words, or a platform (`linux/arm64`); this host's where empty.
    pub arch: String,
    /// Packages beyond the minimum.
    pub packages: Vec<String>,
    /// The archive's address; without, the one this host's apt uses.
    pub mirror: Option<String>,
    /// `main` and whatever else; those of the host's archive where empty.
    pub components: Vec<String>,
    /// The keyring that signs the archive; apt's own trust where not given.
    pub keyring: Option<PathBuf>,
    /// Add a kernel, an init and network set-up, so that the image boots as a machine.
    pub with_kernel: bool,
    /// The image's names; without, `debian:SUITE` and `debian:NUMBER`.
    pub tags: Vec<Reference>,
}

impl BootstrapOptions {
    /// The options that a name like `debian:bookworm` or `debian:12` stands for.
    ///
    /// # Errors
    /// [`Error::Invalid`] for other distributions.
    pub fn named(name: &str) -> Result<BootstrapOptions> {
        let (distribution, suite) = name.split_once(':').unwrap_or((name, "stable"));
        let options = BootstrapOptions {
            distribution: distribution.to_owned(),
            suite: sources::suite_of(suite),
            ..BootstrapOptions::default()
        };
        options.check()?;
        Ok(options)
    }

    fn check(&self) -> Result<()> {
        if self.distribution != "debian" {
            return Err(Error::Invalid(format!(
                "only debian can be bootstrapped, not {:?}: write debian:bookworm",
                self.distribution
            )));
        }
        self.architecture()?;
        // These end on the command lines of apt and in a sources.list.
        let word = |text: &str| {
            !text.is_empty()
                && !text.starts_with('-')
                && text
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"+-._:~=/".contains(&b))
        };
        let wrong = |what: &str, text: &str| Err(Error::Invalid(format!("{text:?} is not {what}")));
        if !word(&self.suite) {
            return wrong("a suite", &self.suite);
        }
        for package in &self.packages {
            if !word(package) {
                return wrong("a package name", package);
            }
        }
        for component in &self.components {
            if !word(component) {
                return wrong("a component", component);
            }
        }
        if let Some(mirror) = &self.mirror
            && (mirror.contains(char::is_whitespace)
                || mirror.contains(['[', ']', '#'])
                || !mirror.contains(':'))
        {
            return wrong("an archive's address (http://HOST/debian)", mirror);
        }
        Ok(())
    }

    /// The architecture in Go's words.
    fn architecture(&self) -> Result<String> {
        if self.arch.is_empty() {
            return Ok(Platform::host().architecture);
        }
        match Platform::parse(&self.arch)? {
            Platform {
                os, architecture, ..
            } if os == "linux" && is_architecture(&architecture) => Ok(architecture),
            other => Err(Error::Invalid(format!(
                "debian is not made for {other}: name an architecture as in amd64 or arm64"
            ))),
        }
    }

    /// The names the image gets.
    pub fn references(&self) -> Result<Vec<Reference>> {
        if !self.tags.is_empty() {
            return Ok(self
                .tags
                .iter()
                .cloned()
                .map(Reference::or_latest)
                .collect());
        }
        let suite = sources::suite_of(&self.suite);
        let suffix = if self.with_kernel { "-machine" } else { "" };
        let mut names = vec![format!("debian:{}{suffix}", suite.replace('/', "-"))];
        if let Some(number) = sources::number_of(&suite) {
            names.push(format!("debian:{number}{suffix}"));
        }
        names.iter().map(|name| Reference::parse(name)).collect()
    }
}

/// Debian's word for an architecture in Go's.
fn debian_architecture(name: &str) -> &str {
    match go_architecture(name) {
        "arm" => "armhf",
        "386" => "i386",
        "ppc64le" => "ppc64el",
        "mips64le" => "mips64el",
        other => other,
    }
}

/// What containers do not need and Debian's own slim images leave out.
const EXCLUDED: [&str; 6] = [
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
];

/// Makes an image and names it.
///
/// # Errors
/// [`Error::MissingProgram`] with the command that installs it, [`Error::NoArchive`], [`Error::Program`] with the
/// tool's last words, [`Error::Cancelled`]. Nothing is left.
pub fn bootstrap(
    store: &Store,
    options: &BootstrapOptions,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<ImageId> {
    options.check()?;
    let references = options.references()?;
    let suite = sources::suite_of(&options.suite);
    let architecture = options.architecture()?;
    let keyring = options
        .keyring
        .as_ref()
        .map(|k| k.to_string_lossy().into_owned());
    let lines = sources::for_suite(
        &sources::read(Path::new("/etc/apt")),
        &suite,
        options.mirror.as_deref(),
        &options.components,
        keyring.as_deref(),
    );
    if lines.is_empty() {
        return Err(Error::NoArchive {
            suite,
            why: "neither /etc/apt/sources.list nor /etc/apt/sources.list.d names a Debian archive"
                .to_owned(),
        });
    }
    if base::host::program("mmdebstrap").is_none() {
        return Err(Error::MissingProgram {
            program: "mmdebstrap",
            purpose: "make an image from Debian's archive",
            fix: "apt-get install mmdebstrap",
        });
    }
    check_emulation(&architecture, Path::new(BINFMT))?;
    // In the day's first second: the same packages give the same image all day.
    let epoch = std::env::var("SOURCE_DATE_EPOCH")
        .ok()
        .and_then(|v| v.parse::<i64>().ok())
        .unwrap_or_else(|| {
            let now = jiff::Timestamp::now().as_second();
            now - now.rem_euclid(86_400)
        });
    let path = store.content().scratch_path("bootstrap");
    let scratch = Scratch::create(path.clone()).at(&path)?;
    // apt's own user must be able to walk through.
    rustix::fs::chmod(&path, rustix::fs::Mode::from_raw_mode(0o755)).at(&path)?;
    for line in &lines {
        progress.report(Event::message(format!(
            "Archive: {} {}",
            line.uri, line.suite
        )));
    }
    let mut command = command(
        options,
        &suite,
        &architecture,
        &lines,
        epoch,
        scratch.path(),
    );
    tracing::debug!(?command, "bootstrap");
    let mut child = Running::start(&mut command)?;
    let stdout = child.process.stdout.take().ok_or(Error::Cancelled)?;
    let stderr = child.process.stderr.take().ok_or(Error::Cancelled)?;
    let last_words = Arc::new(Mutex::new(VecDeque::new()));
    let (done, waiting) = std::sync::mpsc::channel::<()>();
    let group = child.group;
    let result = std::thread::scope(|scope| {
        let words = last_words.clone();
        scope.spawn(move || listen(BufReader::new(stderr), &words, progress));
        // The untarring thread sits in a read; ending the tool ends that.
        scope.spawn(move || {
            while waiting.recv_timeout(Duration::from_millis(100))
                == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                if cancel.is_cancelled() {
                    end_group(group);
                    return;
                }
            }
        });
        let imported = import(
            store,
            options,
            &suite,
            &architecture,
            epoch,
            &lines,
            stdout,
            cancel,
        );
        if imported.is_err() {
            end_group(group);
        }
        let status = child.wait();
        drop(done);
        (imported, status)
    });
    let (imported, status) = result;
    cancel.check()?;
    let status = status?;
    if !status.success() {
        // What it wrote until then may have been a whole archive.
        if let Ok(id) = &imported
            && let Ok(image) = store.inspect(&id.to_string())
            && image.repo_tags.is_empty()
        {
            store.remove(&id.to_string(), RemoveOptions::default(), &|_| Vec::new())?;
        }
        let words = last_words.lock().unwrap_or_else(PoisonError::into_inner);
        return Err(explain(&words, &suite, &architecture, &status.to_string()));
    }
    let id = imported?;
    for reference in &references {
        store.tag(&id.to_string(), reference)?;
        progress.report(Event::message(format!("Tagged {}", reference.familiar())));
    }
    Ok(id)
}

/// What went wrong, from the tool's last words.
fn explain(words: &VecDeque<String>, suite: &str, architecture: &str, status: &str) -> Error {
    // What the tool says of itself after apt has said why.
    const NOISE: [&str; 5] = [
        "E: mmdebstrap failed",
        "E: apt-get ",
        "E: setup failed",
        "E: Some index files failed",
        "E: Unable to correct problems",
    ];
    let errors: Vec<&str> = words
        .iter()
        .filter(|line| line.starts_with("E:") && !NOISE.iter().any(|noise| line.starts_with(noise)))
        .map(|line| line[2..].trim())
        .collect();
    let packages: Vec<&str> = errors
        .iter()
        .filter_map(|line| line.strip_prefix("Unable to locate package "))
        .collect();
    if !packages.is_empty() {
        return Error::NotFound {
            what: format!("package {}", packages.join(", ")),
            why: format!("the archive has none of this name in {suite} for {architecture}"),
        };
    }
    let missing = errors.iter().find_map(|line| {
        let (_, rest) = line.split_once("The repository '")?;
        let (repository, _) = rest.split_once(" Release' does not have a Release file")?;
        repository.split_once(' ')
    });
    if let Some((uri, name)) = missing {
        return Error::NotFound {
            what: format!("suite {name}"),
            why: format!("the archive {uri} has none of this name, see {uri}/dists/"),
        };
    }
    let mut said = if errors.is_empty() {
        words.iter().rev().take(5).rev().cloned().collect()
    } else {
        errors
            .iter()
            .map(|line| (*line).to_owned())
            .collect::<Vec<_>>()
    };
    if errors.iter().any(|line| line.contains("is expired")) {
        said.push(format!(
            "this host's clock says {}: where that is right, the archive is no longer kept up, and --mirror URL names another",
            base::time::now_rfc3339()
        ));
    }
    Error::Program {
        program: "mmdebstrap".to_owned(),
        status: status.to_owned(),
        last_words: said.join("; "),
    }
}

#[allow(clippy::too_many_arguments)]
fn import(
    store: &Store,
    options: &BootstrapOptions,
    suite: &str,
    architecture: &str,
    epoch: i64,
    lines: &[sources::Source],
    tar: impl std::io::Read + Send,
    cancel: &Cancel,
) -> Result<ImageId> {
    let created = jiff::Timestamp::from_second(epoch)
        .map(base::time::rfc3339_nano)
        .ok();
    let mut config = ImageConfig::blank(&Platform::linux(architecture));
    config.created.clone_from(&created);
    let mut labels = std::collections::BTreeMap::new();
    labels.insert(
        "org.opencontainers.image.title".to_owned(),
        "debian".to_owned(),
    );
    labels.insert(
        "org.opencontainers.image.version".to_owned(),
        suite.to_owned(),
    );
    labels.insert("berth.bootstrap.suite".to_owned(), suite.to_owned());
    if options.with_kernel {
        labels.insert("berth.bootable".to_owned(), "true".to_owned());
    }
    config.config = Some(RunConfig {
        env: vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()],
        cmd: Some(vec!["bash".to_owned()]),
        labels,
        ..RunConfig::default()
    });
    let from: Vec<&str> = lines.iter().map(|l| l.suite.as_str()).collect();
    let history = History {
        created,
        created_by: format!("berth image bootstrap debian:{suite} # {}", from.join(" ")),
        ..History::default()
    };
    store.single_layer(tar, config, history, &[], cancel)
}

fn command(
    options: &BootstrapOptions,
    suite: &str,
    architecture: &str,
    lines: &[sources::Source],
    epoch: i64,
    scratch: &Path,
) -> Command {
    let root = rustix::process::geteuid().is_root();
    let mut command = if root {
        // Its mounts of /proc and /dev must not outlive it, however it ends.
        let mut command = Command::new("unshare");
        command.args([
            "--mount",
            "--propagation",
            "private",
            "mmdebstrap",
            "--mode=root",
        ]);
        command
    } else {
        let mut command = Command::new("mmdebstrap");
        command.arg("--mode=auto");
        command
    };
    let debian = debian_architecture(architecture);
    if is_foreign(architecture) {
        // It would want a further program to find out what `check_emulation` knows.
        command.arg("--skip=check/qemu");
    }
    command
        .args(["--variant=minbase", "--format=tar"])
        .arg(format!("--architectures={debian}"));
    let mut packages = options.packages.clone();
    if options.with_kernel {
        let kernel = match debian {
            "amd64" | "arm64" => format!("linux-image-cloud-{debian}"),
            "i386" => "linux-image-686-pae".to_owned(),
            "armhf" => "linux-image-armmp".to_owned(),
            "ppc64el" => "linux-image-powerpc64le".to_owned(),
            other => format!("linux-image-{other}"),
        };
        packages.push(kernel);
        for package in ["systemd-sysv", "dbus", "udev", "iproute2", "kmod"] {
            packages.push(package.to_owned());
        }
    }
    // apt-get must be able to fetch from where this image came from.
    if lines.iter().any(|line| line.uri.starts_with("https:")) {
        packages.push("ca-certificates".to_owned());
    }
    if !packages.is_empty() {
        command.arg(format!("--include={}", packages.join(",")));
    }
    for option in EXCLUDED {
        command.arg(format!("--dpkgopt={option}"));
    }
    command.arg("--dpkgopt=force-unsafe-io");
    for option in host_apt_options() {
        command.arg(format!("--aptopt={option}"));
    }
    command.arg("--aptopt=APT::Sandbox::User \"root\"");
    command.arg("--aptopt=Acquire::Languages \"none\"");
    if let Some(keyring) = &options.keyring {
        command.arg("--keyring").arg(keyring);
    }
    // What was only for this run (the host's proxies) must not stay in the image.
    let mut hooks = vec![
        r#"rm -f "$1/etc/apt/apt.conf.d/99mmdebstrap""#.to_owned(),
        r#"printf 'Acquire::Languages "none";\n' > "$1/etc/apt/apt.conf.d/90berth""#.to_owned(),
        r#"rm -rf "$1"/var/cache/debconf/*-old "$1"/var/lib/dpkg/*-old "$1"/var/log/apt "$1"/var/log/dpkg.log"#.to_owned(),
        // A keyring at a path of this host says nothing inside; Debian's own is installed there.
        r#"sed -i -E 's/ ?\[signed-by=[^]]*\]//' "$1/etc/apt/sources.list""#.to_owned(),
    ];
    if options.with_kernel {
        hooks.extend([
            r#"mkdir -p "$1/etc/systemd/network" && printf '[Match]\nType=ether\n\n[Network]\nDHCP=yes\n' > "$1/etc/systemd/network/80-berth.network""#.to_owned(),
            r#"chroot "$1" systemctl enable systemd-networkd.service"#.to_owned(),
            // Without a network service for it, the wait would hold up the boot of machines that have no network.
            r#"chroot "$1" systemctl disable systemd-networkd-wait-online.service || true"#.to_owned(),
            r#"chroot "$1" passwd -d root"#.to_owned(),
            r#": > "$1/etc/machine-id""#.to_owned(),
        ]);
    } else {
        // As in Docker's images: installing a package must not start its services in a build.
        hooks.push(
            r#"printf '#!/bin/sh\nexit 101\n' > "$1/usr/sbin/policy-rc.d" && chmod 755 "$1/usr/sbin/policy-rc.d""#.to_owned(),
        );
    }
    for hook in hooks {
        command.arg(format!("--customize-hook={hook}"));
    }
    command.arg(suite).arg("-");
    for line in lines {
        command.arg(line.line());
    }
    command
        .env("SOURCE_DATE_EPOCH", epoch.to_string())
        .env("TMPDIR", scratch)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    command
}

/// Proxies, certificates and clocks the host's apt is told of, without which the archive may be out of reach.
fn host_apt_options() -> Vec<String> {
    let Ok(output) = Command::new("apt-config")
        .args(["dump", "--no-empty"])
        .stdin(Stdio::null())
        .output()
    else {
        return Vec::new();
    };
    let wanted = [
        "Acquire::http::Proxy",
        "Acquire::https::Proxy",
        "Acquire::https::CAInfo",
        "Acquire::https::CaInfo",
        "Acquire::https::Verify-Peer",
        "Acquire::https::Verify-Host",
        "Acquire::ForceIPv4",
        "Acquire::Check-Date",
        "Acquire::Check-Valid-Until",
        "Acquire::Max-FutureTime",
    ];
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter(|line| wanted.iter().any(|w| line.starts_with(w)))
        .map(|line| line.trim_end_matches(';').to_owned())
        .collect()
}

/// Where the kernel shows which emulators it runs foreign programs with.
const BINFMT: &str = "/proc/sys/fs/binfmt_misc";

fn is_foreign(architecture: &str) -> bool {
    let host = Platform::host().architecture;
    let runs_anyway = matches!(
        (host.as_str(), architecture),
        ("amd64", "386") | ("arm64", "arm")
    );
    host != architecture && !runs_anyway
}

/// Programs of another architecture run only where the kernel was told which emulator runs them, and loaded it
/// beforehand (`F`): in the new root there is none.
fn check_emulation(architecture: &str, handlers: &Path) -> Result<()> {
    if !is_foreign(architecture) {
        return Ok(());
    }
    let kernel = match architecture {
        "amd64" => "x86_64",
        "arm64" => "aarch64",
        "386" => "i386",
        other => other,
    };
    let missing = |fix| Error::MissingProgram {
        program: "qemu-user-static",
        purpose: "run the package scripts of another architecture",
        fix,
    };
    if !handlers.join("register").exists() {
        return Err(missing(
            "apt-get install qemu-user-static binfmt-support, and where the kernel's table is not mounted: mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc && update-binfmts --enable",
        ));
    }
    let handler = std::fs::read_to_string(handlers.join(format!("qemu-{kernel}")));
    let said = |word: &str, part: &str| {
        handler.as_ref().is_ok_and(|text| {
            text.lines()
                .any(|line| line.starts_with(word) && line[word.len()..].contains(part))
        })
    };
    if !said("enabled", "") {
        return Err(missing(
            "apt-get install qemu-user-static binfmt-support && update-binfmts --enable",
        ));
    }
    if !said("flags:", "F") {
        return Err(Error::Unsupported(format!(
            "the emulator for {architecture} is looked for in the new root, where it is not: register it with the flag F (apt-get install --reinstall qemu-user-static)"
        )));
    }
    Ok(())
}

fn listen(stderr: impl BufRead, words: &Mutex<VecDeque<String>>, progress: &dyn Progress) {
    for line in stderr.split(b'\n').map_while(|line| line.ok()) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        // Its progress bars are drawn over each other with carriage returns.
        let line = line
            .rsplit('\r')
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned();
        if line.is_empty() {
            continue;
        }
        if let Some(text) = line.strip_prefix("I: ") {
            // The hooks' scripts mean nothing to who waits.
            if text.starts_with("running --") {
                continue;
            }
            progress.report(Event::message(text));
        } else if line.starts_with("W: ") || line.starts_with("E: ") {
            progress.report(Event::message(line.clone()));
        }
        let mut words = words.lock().unwrap_or_else(PoisonError::into_inner);
        if words.len() >= 50 {
            words.pop_front();
        }
        words.push_back(line);
    }
}

/// A tool with all its children, ended when dropped.
struct Running {
    process: Child,
    group: i32,
}

impl Running {
    fn start(command: &mut Command) -> Result<Running> {
        let process = command.spawn().doing(|| "starting mmdebstrap".to_owned())?;
        let group = process.id() as i32;
        Ok(Running { process, group })
    }

    fn wait(&mut self) -> Result<std::process::ExitStatus> {
        self.process
            .wait()
            .doing(|| "waiting for mmdebstrap".to_owned())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.process.try_wait(), Ok(None)) {
            end_group(self.group);
            let _ = self.process.wait();
        }
    }
}

/// Asks a process group to end, and after five seconds makes it.
fn end_group(group: i32) {
    use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
    let Some(group) = Pid::from_raw(group) else {
        return;
    };
    let _ = kill_process_group(group, Signal::TERM);
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
        if test_kill_process_group(group).is_err() {
            return;
        }
    }
    let _ = kill_process_group(group, Signal::KILL);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_the_suite_and_the_image_gets_both_names() {
        let options = BootstrapOptions::named("debian:12").unwrap();
        assert_eq!(options.suite, "bookworm");
        let names: Vec<String> = options
            .references()
            .unwrap()
            .iter()
            .map(Reference::familiar)
            .collect();
        assert_eq!(names, ["debian:bookworm", "debian:12"]);
        assert!(BootstrapOptions::named("ubuntu:noble").is_err());
    }

    #[test]
    fn a_foreign_architecture_needs_an_emulator_that_is_loaded_already() {
        let foreign = if Platform::host().architecture == "riscv64" {
            "arm64"
        } else {
            "riscv64"
        };
        let name = if foreign == "arm64" {
            "qemu-aarch64"
        } else {
            "qemu-riscv64"
        };
        let handlers = tempfile::tempdir().unwrap();
        let check = || check_emulation(foreign, handlers.path()).map_err(|e| e.to_string());
        assert!(matches!(
            check_emulation(foreign, handlers.path()),
            Err(Error::MissingProgram { fix, .. }) if fix.contains("mount -t binfmt_misc")
        ));
        std::fs::write(handlers.path().join("register"), "").unwrap();
        assert!(check().unwrap_err().contains("qemu-user-static"));
        let write = |text: &str| std::fs::write(handlers.path().join(name), text).unwrap();
        write("disabled\ninterpreter /x\nflags: POF\n");
        assert!(check().is_err());
        write("enabled\ninterpreter /x\nflags: PO\n");
        assert!(check().unwrap_err().contains("flag F"));
        write("enabled\ninterpreter /x\nflags: POF\n");
        check().unwrap();
        assert!(check_emulation(&Platform::host().architecture, handlers.path()).is_ok());
    }

    #[test]
    fn what_the_archive_lacks_is_said_by_its_name() {
        let told = |lines: &[&str]| {
            let words = lines.iter().map(|line| (*line).to_owned()).collect();
            explain(&words, "bookworm", "amd64", "exit status: 25")
        };
        let error = told(&[
            "E: Unable to locate package nosuch",
            "E: setup failed: E: apt-get failed",
            "E: mmdebstrap failed to run",
        ]);
        assert!(matches!(&error, Error::NotFound { what, .. } if what == "package nosuch"));
        let error = told(&[
            "Err:4 http://host/debian nosuch Release",
            "E: The repository 'http://host/debian nosuch Release' does not have a Release file.",
            "E: apt-get update --error-on=any failed",
        ]);
        assert!(
            matches!(&error, Error::NotFound { what, why } if what == "suite nosuch" && why.contains("http://host/debian/dists/"))
        );
        let error = told(&[
            "E: Failed to fetch http://host/x  Could not connect",
            "E: mmdebstrap failed to run",
        ]);
        assert_eq!(
            error.to_string(),
            "mmdebstrap failed (exit status: 25): Failed to fetch http://host/x  Could not connect"
        );
        let error = told(&["E: Release file for http://host/InRelease is expired (since 1d)."]);
        assert!(error.to_string().contains("clock says"), "{error}");
    }

    #[test]
    fn an_architecture_may_be_a_platform() {
        let of = |arch: &str| {
            let options = BootstrapOptions {
                arch: arch.to_owned(),
                ..BootstrapOptions::named("debian:12").unwrap()
            };
            options.check().and_then(|()| options.architecture()).ok()
        };
        for arch in ["arm64", "aarch64", "linux/arm64", "linux/arm64/v8"] {
            assert_eq!(of(arch).as_deref(), Some("arm64"), "{arch}");
        }
        for wrong in ["bogus", "windows/amd64", "a/b/c/d", "linux/", "linux/bogus"] {
            assert_eq!(of(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn words_that_would_be_options_are_refused() {
        for bad in ["--hook", "a b", "a,b;c", "$(x)"] {
            let options = BootstrapOptions {
                packages: vec![bad.to_owned()],
                ..BootstrapOptions::named("debian:12").unwrap()
            };
            assert!(options.check().is_err(), "{bad}");
        }
    }
}
