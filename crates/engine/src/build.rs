//! Builds from a Dockerfile: the context comes in as an archive, each `RUN` is a container of this engine.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::Engine;
use crate::bridge::BlockingReader;
use crate::error::{Error, Result};
use crate::image::{ArchiveReader, Credentials};
use crate::progress::{Cancel, Progress};
use crate::volume::blocking;

/// The most that a context may hold: files, and bytes when unpacked.
const MOST_ENTRIES: u64 = 1_000_000;
const MOST_BYTES: u64 = 64 << 30;

/// Who listens to a build: its progress (pulls), and its words (steps, output of commands).
pub trait BuildOutput: Progress {
    /// Takes a piece of text.
    fn write(&self, text: &str);
}

/// What to build, and how.
#[derive(Debug, Clone, Default)]
pub struct BuildOptions {
    /// Path in the context.
    pub dockerfile: String,
    pub tags: Vec<String>,
    /// `ARG` values; one without a value leaves the Dockerfile's own.
    pub arguments: BTreeMap<String, Option<String>>,
    pub labels: BTreeMap<String, String>,
    /// The stage to stop at; empty is the last.
    pub target: String,
    pub no_cache: bool,
    /// Ask the registry for newer base images.
    pub pull: bool,
    pub platform: String,
    /// The network of `RUN`.
    pub network: String,
    /// Bytes; 0 is no limit. As the others, of each `RUN`.
    pub memory: i64,
    pub cpu_quota: i64,
    pub cpu_period: i64,
    pub cpu_shares: i64,
    pub cpuset_cpus: String,
    pub shm_size: i64,
    /// `name:address` lines for `/etc/hosts`.
    pub extra_hosts: Vec<String>,
    /// By registry.
    pub credentials: BTreeMap<String, Credentials>,
}

/// The folder of one build; removed with it.
struct Workplace(PathBuf);

impl Workplace {
    fn create(parent: &Path) -> Result<Workplace> {
        let path = parent.join(base::Id::random().short());
        let context = path.join("context");
        fs::create_dir_all(&context).map_err(Error::io(format!("making {}", context.display())))?;
        Ok(Workplace(path))
    }

    fn context(&self) -> PathBuf {
        self.0.join("context")
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a build's folder could not be removed");
        }
    }
}

fn builds(state: &Path) -> PathBuf {
    state.join("builds")
}

/// Removes what builds of a killed daemon left.
pub(crate) fn sweep(state: &Path) {
    let builds = builds(state);
    if builds.exists()
        && let Err(error) = fs::remove_dir_all(&builds)
    {
        tracing::warn!(path = %builds.display(), %error, "leftovers of builds could not be removed");
    }
}

impl Engine {
    /// Builds an image of `context`, a tar archive (plain, gzip or zstd); answers its id.
    ///
    /// # Errors
    /// A context or Dockerfile that is none, a step that failed, what the store refuses. Nothing is left.
    pub async fn build_image(
        self: &Arc<Self>,
        context: ArchiveReader,
        options: BuildOptions,
        output: Arc<dyn BuildOutput>,
        cancel: Cancel,
    ) -> Result<String> {
        let archive = BlockingReader::new(context);
        let engine = self.clone();
        blocking(move || {
            let workplace = Workplace::create(&builds(&engine.config().paths.state))?;
            unpack(archive, &workplace.context(), &cancel)?;
            engine.build_in(&workplace.context(), options, output, cancel)
        })
        .await
    }

    fn build_in(
        self: &Arc<Self>,
        context: &Path,
        options: BuildOptions,
        output: Arc<dyn BuildOutput>,
        cancel: Cancel,
    ) -> Result<String> {
        let _ = (context, options, output, cancel);
        Err(Error::Unsupported(
            "the builder is not in this build yet".into(),
        ))
    }

    /// Forgets what builds kept for the next ones; answers the bytes given back.
    ///
    /// # Errors
    /// Where the store refuses.
    pub async fn prune_builds(self: &Arc<Self>, all: bool) -> Result<u64> {
        let _ = all;
        Ok(0)
    }
}

/// Unpacks a build's context. Names that lead out of it, and devices, are refused.
fn unpack(archive: impl Read + Send, context: &Path, cancel: &Cancel) -> Result<()> {
    let bad = |error: io::Error| match error.raw_os_error() {
        None => Error::Invalid(format!("the build context is no good archive: {error}")),
        Some(_) => Error::Io {
            what: "unpacking the build context".into(),
            source: error,
        },
    };
    let (_, reader) =
        ::image::layer::compression::reader(BufReader::with_capacity(64 << 10, archive))
            .map_err(Error::room)?;
    let mut archive = tar::Archive::new(reader);
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.set_overwrite(true);
    let (mut entries, mut bytes) = (0u64, 0u64);
    for entry in archive.entries().map_err(bad)? {
        if cancel.is_cancelled() {
            return Err(Error::Conflict("the build was cancelled".into()));
        }
        let mut entry = entry.map_err(bad)?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        entries += 1;
        bytes = bytes.saturating_add(entry.size());
        if entries > MOST_ENTRIES || bytes > MOST_BYTES {
            return Err(Error::Capacity(format!(
                "the build context is too large: more than {MOST_ENTRIES} files or {} unpacked; leave out what is not needed with .dockerignore",
                base::units::format_size(MOST_BYTES)
            )));
        }
        let kind = entry.header().entry_type();
        if kind.is_block_special() || kind.is_character_special() || kind.is_fifo() {
            return Err(Error::Invalid(format!(
                "the build context holds a device or pipe: {name}"
            )));
        }
        if kind.is_pax_global_extensions() {
            continue;
        }
        if !entry.unpack_in(context).map_err(bad)? {
            return Err(Error::Invalid(format!(
                "the build context holds a name that leads out of it: {name}"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(entries: &[(tar::EntryType, &str, &str)]) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        for (kind, name, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o644);
            // Written raw: the setters refuse what a hostile archive holds.
            header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
            if kind.is_symlink() || kind.is_hard_link() {
                header.set_size(0);
                header.as_mut_bytes()[157..157 + content.len()].copy_from_slice(content.as_bytes());
                header.set_cksum();
                archive.append(&header, io::empty()).unwrap();
            } else {
                header.set_size(content.len() as u64);
                header.set_cksum();
                archive.append(&header, content.as_bytes()).unwrap();
            }
        }
        archive.into_inner().unwrap()
    }

    #[test]
    fn a_context_stays_within_its_folder() {
        use tar::EntryType as T;
        let home = tempfile::tempdir().unwrap();
        let outside = home.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let target = outside.display().to_string();
        for entries in [
            vec![(T::Regular, "../outside/x", "evil")],
            vec![
                (T::Symlink, "link", target.as_str()),
                (T::Regular, "link/x", "evil"),
            ],
            vec![
                (T::Symlink, "link", "../outside"),
                (T::Regular, "link/x", "evil"),
            ],
            vec![(T::Char, "null", "")],
        ] {
            let context = home.path().join(base::Id::random().short());
            fs::create_dir(&context).unwrap();
            assert!(
                unpack(&archive(&entries)[..], &context, &Cancel::default()).is_err(),
                "{entries:?}"
            );
            assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "{entries:?}");
        }
        let context = home.path().join("good");
        fs::create_dir(&context).unwrap();
        let good = archive(&[
            (T::Regular, "Dockerfile", "FROM x"),
            (T::Regular, "/a", "b"),
        ]);
        unpack(&good[..], &context, &Cancel::default()).unwrap();
        assert_eq!(fs::read_to_string(context.join("a")).unwrap(), "b");
        assert!(unpack(&good[..700], &context, &Cancel::default()).is_err());
    }

    #[test]
    fn a_builds_folder_goes_with_it() {
        let home = tempfile::tempdir().unwrap();
        let workplace = Workplace::create(home.path()).unwrap();
        assert!(workplace.context().is_dir());
        drop(workplace);
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    }
}
