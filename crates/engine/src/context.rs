//! Build contexts that a client names instead of sending: a git repository, an archive, or a lone Dockerfile.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use ::image::layer::compression::{self, Compression};
use ::image::layer::tree::Scratch;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

use crate::Engine;
use crate::error::{Error, Result};
use crate::image::ArchiveReader;
use crate::volume::blocking;

/// The longest Dockerfile that is taken for one.
const LONGEST_DOCKERFILE: usize = 4 << 20;
/// What an archive and a text are told apart by.
const LOOK: usize = 512;

/// A git repository's address with what is to be checked out of it: `URL#REF:FOLDER`.
#[derive(Debug, PartialEq, Eq)]
struct Repository<'a> {
    address: &'a str,
    reference: &'a str,
    folder: &'a str,
}

/// Whether an address is a git repository's, as dockerd's `urlutil.IsGitURL` tells; `None` where it is not.
fn repository(text: &str) -> Option<Repository<'_>> {
    let (address, fragment) = text.split_once('#').unwrap_or((text, ""));
    let web = address.starts_with("http://") || address.starts_with("https://");
    let git = (web && address.ends_with(".git"))
        || ["git://", "git@", "ssh://", "github.com/"]
            .iter()
            .any(|start| address.starts_with(start));
    let (reference, folder) = fragment.split_once(':').unwrap_or((fragment, ""));
    git.then_some(Repository {
        address,
        reference,
        folder,
    })
}

impl Engine {
    /// Where contexts lie while they are read; a crash leaves them to the next start.
    fn scratch_root(&self) -> PathBuf {
        self.config.paths.state.join("tmp")
    }

    /// Removes what a daemon that was killed left of contexts.
    pub(crate) fn sweep_contexts(&self) {
        let _ = std::fs::remove_dir_all(self.scratch_root());
    }

    fn scratch(&self) -> Result<Scratch> {
        let root = self.scratch_root();
        let path = root.join(format!("context-{}", base::Id::random().short()));
        std::fs::create_dir_all(&root)
            .and_then(|()| Scratch::create(path))
            .map_err(Error::io(format!("making a folder in {}", root.display())))
    }

    /// The archive that `address` stands for.
    ///
    /// # Errors
    /// An address that is none, what cannot be reached, a reference or folder that is not in the repository.
    pub async fn remote_context(self: &Arc<Self>, address: &str) -> Result<ArchiveReader> {
        match repository(address) {
            Some(repository) => self.git_context(&repository).await,
            None if address.starts_with("http://") || address.starts_with("https://") => {
                self.fetched_context(address).await
            }
            None => Err(Error::Invalid(format!(
                "the remote context {address:?} is neither a git repository nor an http address"
            ))),
        }
    }

    async fn fetched_context(&self, address: &str) -> Result<ArchiveReader> {
        let mut body = self.fetch(address).await?;
        let failed = |error: io::Error| Error::Invalid(format!("{address}: {error}"));
        let mut head = vec![0u8; LOOK];
        let mut count = 0;
        while count < LOOK {
            match body.read(&mut head[count..]).await.map_err(failed)? {
                0 => break,
                more => count += more,
            }
        }
        head.truncate(count);
        if is_archive(&head)? {
            return Ok(Box::pin(io::Cursor::new(head).chain(body)));
        }
        let mut text = head;
        let limit = (LONGEST_DOCKERFILE - text.len()) as u64;
        let mut rest = body.take(limit + 1);
        rest.read_to_end(&mut text).await.map_err(failed)?;
        if text.len() > LONGEST_DOCKERFILE || std::str::from_utf8(&text).is_err() {
            return Err(Error::Invalid(format!(
                "{address} is neither an archive (tar, plain or with gzip, xz or zstd) nor a Dockerfile"
            )));
        }
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        let mut archive = tar::Builder::new(Vec::new());
        archive
            .append_data(&mut header, "Dockerfile", &text[..])
            .and_then(|()| archive.into_inner())
            .map(|bytes| Box::pin(io::Cursor::new(bytes)) as ArchiveReader)
            .map_err(failed)
    }

    async fn git_context(&self, wanted: &Repository<'_>) -> Result<ArchiveReader> {
        if wanted.reference.starts_with('-') || wanted.address.starts_with('-') {
            return Err(Error::Invalid(format!(
                "invalid git reference: {}",
                wanted.reference
            )));
        }
        let scratch = self.scratch()?;
        let folder = scratch.path().join("repository");
        let address = match wanted.address.strip_prefix("github.com/") {
            Some(path) => format!("https://github.com/{path}"),
            None => wanted.address.to_owned(),
        };
        let reference = if wanted.reference.is_empty() {
            "HEAD"
        } else {
            wanted.reference
        };
        let text = folder.display().to_string();
        git(scratch.path(), &["init", "--quiet", &text]).await?;
        let inside = |rest: &[&str]| -> Vec<String> {
            ["-C", &text]
                .iter()
                .chain(rest)
                .map(|word| (*word).to_owned())
                .collect()
        };
        let shallow = inside(&["fetch", "--quiet", "--depth", "1", &address, reference]);
        // Not every server can leave history out.
        if git(scratch.path(), &shallow).await.is_err() {
            git(
                scratch.path(),
                &inside(&["fetch", "--quiet", &address, reference]),
            )
            .await?;
        }
        git(
            scratch.path(),
            &inside(&["checkout", "--quiet", "FETCH_HEAD", "--"]),
        )
        .await?;
        if folder.join(".gitmodules").exists() {
            git(
                scratch.path(),
                &inside(&["submodule", "update", "--quiet", "--init", "--recursive"]),
            )
            .await?;
        }
        let subfolder = wanted.folder.to_owned();
        let file = blocking(move || {
            // The guard goes with the closure: the archive is open then, and needs no name.
            let scratch = scratch;
            packed(scratch.path(), &folder, &subfolder)
        })
        .await?;
        Ok(Box::pin(tokio::fs::File::from_std(file)))
    }
}

/// Runs git without the host's configuration, questions, or protocols that run programs.
async fn git<S: AsRef<std::ffi::OsStr>>(home: &Path, arguments: &[S]) -> Result<()> {
    let output = Command::new("git")
        .args(["-c", "protocol.file.allow=never"])
        .args(arguments)
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_ALLOW_PROTOCOL", "http:https:git:ssh")
        .env("GIT_SSH_COMMAND", "ssh -o BatchMode=yes")
        .env("HOME", home)
        .env_remove("GIT_DIR")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::Room {
                message: "a git repository is to be built, and git is not installed".into(),
                kind: base::Kind::Unsupported,
                fix: Some("apt-get install git".into()),
            },
            _ => Error::io("running git")(error),
        })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::Invalid(format!(
        "git: {}",
        said.trim().lines().last().unwrap_or("it failed")
    )))
}

/// A folder of a repository as an archive without a name.
fn packed(scratch: &Path, repository: &Path, folder: &str) -> Result<std::fs::File> {
    let failed = |error: io::Error| {
        Error::Invalid(format!(
            "the folder {folder:?} of the repository cannot be read: {error}"
        ))
    };
    let root = repository.canonicalize().map_err(failed)?;
    let from = root
        .join(folder.trim_start_matches('/'))
        .canonicalize()
        .map_err(failed)?;
    if !from.starts_with(&root) || !from.is_dir() {
        return Err(Error::Invalid(format!(
            "{folder:?} is no folder of the repository"
        )));
    }
    let path = scratch.join("context.tar");
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .map_err(failed)?;
    let mut archive = tar::Builder::new(io::BufWriter::new(file));
    archive.follow_symlinks(false);
    for entry in std::fs::read_dir(&from).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name() == ".git" {
            continue;
        }
        if entry.file_type().map_err(failed)?.is_dir() {
            archive.append_dir_all(entry.file_name(), entry.path())
        } else {
            archive.append_path_with_name(entry.path(), entry.file_name())
        }
        .map_err(failed)?;
    }
    let mut file = archive
        .into_inner()
        .and_then(|writer| writer.into_inner().map_err(io::IntoInnerError::into_error))
        .map_err(failed)?;
    io::Seek::rewind(&mut file).map_err(failed)?;
    Ok(file)
}

/// Whether bytes begin an archive, compressed or not.
///
/// # Errors
/// A compression that is not read.
fn is_archive(head: &[u8]) -> Result<bool> {
    let compression = compression::detect(head).map_err(Error::room)?;
    Ok(compression != Compression::None || head.get(257..262) == Some(b"ustar"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn repositories_are_told_from_files() {
        let found = repository("https://host/app.git#v1:sub/dir").unwrap();
        assert_eq!(
            found,
            Repository {
                address: "https://host/app.git",
                reference: "v1",
                folder: "sub/dir"
            }
        );
        assert_eq!(repository("git://host/app").unwrap().reference, "");
        assert!(repository("https://host/app.tar.gz").is_none());
        assert!(repository("https://host/Dockerfile").is_none());
    }

    #[test]
    fn a_folder_outside_of_the_repository_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let repository = home.path().join("repository");
        std::fs::create_dir_all(repository.join("sub")).unwrap();
        std::fs::write(repository.join("sub/Dockerfile"), "FROM scratch").unwrap();
        std::os::unix::fs::symlink("/etc", repository.join("link")).unwrap();
        for wrong in ["..", "link", "nothing", "sub/Dockerfile"] {
            assert!(packed(home.path(), &repository, wrong).is_err(), "{wrong}");
            let _ = std::fs::remove_file(home.path().join("context.tar"));
        }
        let file = packed(home.path(), &repository, "sub").unwrap();
        let mut archive = tar::Archive::new(file);
        let names: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().into_owned())
            .collect();
        assert_eq!(names, [PathBuf::from("Dockerfile")]);
    }

    proptest! {
        #[test]
        fn no_address_panics(text in ".{0,60}") {
            let _ = repository(&text);
        }
    }
}
