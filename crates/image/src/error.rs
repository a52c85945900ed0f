//! What can go wrong with images, in words a person can act on.

use std::io;
use std::path::Path;

use base::{Classified, Kind};

use crate::Digest;

/// The result of everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of the image room.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },

    #[error("{0:?} is not a valid image reference: {1}")]
    Reference(String, &'static str),

    #[error("{0:?} is not a digest: sha256: and 64 lower-case hexadecimal digits are wanted")]
    Digest(String),

    #[error("No such image: {0}")]
    NoSuchImage(String),

    #[error("image id prefix {0:?} is ambiguous: it fits more than one image")]
    Ambiguous(String),

    #[error("no content {0} in the store")]
    NoSuchBlob(Digest),

    #[error("no snapshot {0:?}")]
    NoSuchSnapshot(String),

    #[error("snapshot {0:?} exists already")]
    SnapshotExists(String),

    #[error("{what}: the content is {actual}, but {expected} was promised; it was thrown away")]
    DigestMismatch {
        what: String,
        expected: Digest,
        actual: Digest,
    },

    #[error("{what}: {actual} bytes came, but {expected} were promised; they were thrown away")]
    SizeMismatch {
        what: String,
        expected: u64,
        actual: u64,
    },

    #[error("the layer is refused: entry {entry:?}: {why}")]
    HostileEntry { entry: String, why: String },

    #[error("the layer is refused: {0}")]
    LayerLimit(String),

    #[error("the layer is damaged: {0}")]
    DamagedLayer(String),

    #[error("{what} is malformed: {why}")]
    Malformed { what: String, why: String },

    #[error("conflict: {0}")]
    Conflict(String),

    #[error("not enough room: {0}")]
    NoRoom(String),

    #[error("{0}")]
    Unsupported(String),

    #[error("{0}")]
    Invalid(String),

    #[error("{what} not found: {why}")]
    NotFound { what: String, why: String },

    #[error("no image for platform {wanted} in {reference}: it has {available}")]
    NoSuchPlatform {
        reference: String,
        wanted: String,
        available: String,
    },

    #[error("the registry {registry} cannot be reached: {why}")]
    Unreachable { registry: String, why: String },

    #[error(
        "the registry {registry} has a certificate that nobody trusted here vouches for: {why}"
    )]
    Untrusted { registry: String, why: String },

    #[error("the registry {registry} refused access to {what}: {why}")]
    Denied {
        registry: String,
        what: String,
        why: String,
    },

    #[error("the registry {registry} answered {status} to {what}: {why}")]
    Registry {
        registry: String,
        what: String,
        status: u16,
        why: String,
    },

    #[error("{program} is not installed, and it is needed to {purpose}")]
    MissingProgram {
        program: &'static str,
        purpose: &'static str,
        fix: &'static str,
    },

    #[error("{program} failed ({status}): {last_words}")]
    Program {
        program: String,
        status: String,
        last_words: String,
    },

    #[error("no Debian archive is configured on this host for suite {suite:?}: {why}")]
    NoArchive { suite: String, why: String },

    #[error("Dockerfile: {0}")]
    Dockerfile(String),

    #[error("The command '{command}' returned a non-zero code: {code}")]
    Step { command: String, code: i32 },

    /// What runs the steps of a build and pulls its base images says so.
    #[error("{message}")]
    Runner {
        message: String,
        kind: Kind,
        fix: Option<String>,
    },

    #[error("cancelled")]
    Cancelled,
}

impl Error {
    pub(crate) fn malformed(what: impl Into<String>, why: impl ToString) -> Error {
        Error::Malformed {
            what: what.into(),
            why: why.to_string(),
        }
    }
}

impl Classified for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Io { source, .. } => match base::error::kind_of_io(source) {
                // A file of ours that is missing is a defect, not a user's wrong name.
                Kind::NotFound => Kind::Internal,
                kind => kind,
            },
            Error::NoSuchImage(_)
            | Error::NoSuchBlob(_)
            | Error::NoSuchSnapshot(_)
            | Error::NoSuchPlatform { .. }
            | Error::NoArchive { .. }
            | Error::NotFound { .. } => Kind::NotFound,
            Error::Reference(..)
            | Error::Digest(_)
            | Error::Ambiguous(_)
            | Error::DigestMismatch { .. }
            | Error::SizeMismatch { .. }
            | Error::HostileEntry { .. }
            | Error::LayerLimit(_)
            | Error::DamagedLayer(_)
            | Error::Malformed { .. }
            | Error::Invalid(_)
            | Error::Dockerfile(_) => Kind::Invalid,
            Error::SnapshotExists(_) | Error::Conflict(_) => Kind::Conflict,
            Error::NoRoom(_) => Kind::Capacity,
            Error::Unsupported(_) | Error::MissingProgram { .. } => Kind::Unsupported,
            Error::Denied { .. } | Error::Untrusted { .. } => Kind::Permission,
            Error::Registry { status: 404, .. } => Kind::NotFound,
            Error::Registry {
                status: 401 | 403, ..
            } => Kind::Permission,
            Error::Runner { kind, .. } => *kind,
            Error::Unreachable { .. }
            | Error::Registry { .. }
            | Error::Program { .. }
            | Error::Step { .. }
            | Error::Cancelled => Kind::Internal,
        }
    }

    fn fix(&self) -> Option<String> {
        match self {
            Error::MissingProgram { fix, .. } => Some((*fix).to_owned()),
            Error::Runner { fix, .. } => fix.clone(),
            Error::NoSuchImage(name) => Some(format!("berth pull {name}")),
            Error::NoRoom(_) => Some("berth system prune".to_owned()),
            Error::NoArchive { .. } => Some("name the archive: --mirror URL".to_owned()),
            Error::Untrusted { .. } => Some(
                "name its authority's certificate (PEM) in the configuration: [registries] authorities = [\"…\"]"
                    .to_owned(),
            ),
            Error::Denied { registry, .. } => Some(format!("berth login {registry}")),
            Error::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("berth system prune".to_owned())
            }
            _ => None,
        }
    }
}

/// Says at which file an operating-system error happened.
pub(crate) trait At<T> {
    fn at(self, path: &Path) -> Result<T>;
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> At<T> for std::result::Result<T, E> {
    fn at(self, path: &Path) -> Result<T> {
        self.map_err(|e| Error::Io {
            what: path.display().to_string(),
            source: e.into(),
        })
    }
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::Io {
            what: what(),
            source: e.into(),
        })
    }
}
