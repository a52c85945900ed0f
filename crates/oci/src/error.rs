//! What can go wrong between a bundle and a running container.

use std::io;
use std::path::PathBuf;

use base::{Classified, Kind};

/// The result of the runtime's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of the runtime, of a container's set-up, or of what a caller asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `config.json` or a request contradicts the specification; the text names the field.
    #[error("{0}")]
    Invalid(String),
    /// The operating system refused; `what` says the step and the path.
    #[error("{what}: {source}")]
    System {
        what: String,
        #[source]
        source: io::Error,
    },
    /// A file the runtime needs is not the JSON it should be.
    #[error("{path} is not valid: {source}")]
    Json {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    /// The container's program cannot be executed. The words are runc's, because engines match them.
    #[error("exec: {name:?}: {reason}")]
    Executable {
        name: String,
        reason: String,
        status: u8,
    },
    /// A failure inside the container's first process, reported over its channel.
    #[error("{message}")]
    Init {
        message: String,
        kind: Kind,
        errno: i32,
        status: u8,
    },
    /// This host or this version cannot do it.
    #[error("{0}")]
    Unsupported(String),
    #[error("container {0:?} does not exist")]
    NotFound(String),
    /// It exists already or is in the wrong state.
    #[error("{0}")]
    Conflict(String),
}

impl Error {
    pub(crate) fn invalid(text: impl Into<String>) -> Error {
        Error::Invalid(text.into())
    }

    pub(crate) fn unsupported(text: impl Into<String>) -> Error {
        Error::Unsupported(text.into())
    }

    /// The errno behind this, `0` where there is none.
    pub fn errno(&self) -> i32 {
        match self {
            Error::System { source, .. } => source.raw_os_error().unwrap_or(0),
            Error::Init { errno, .. } => *errno,
            _ => 0,
        }
    }

    /// The status a shell would give: 127 where the program is missing, 126 where it cannot be executed, else 1.
    pub fn exit_status(&self) -> u8 {
        match self {
            Error::Executable { status, .. } | Error::Init { status, .. } => *status,
            _ => 1,
        }
    }
}

impl Classified for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Invalid(_) | Error::Json { .. } => Kind::Invalid,
            Error::System { source, .. } => base::error::kind_of_io(source),
            Error::Executable { status: 126, .. } => Kind::Permission,
            Error::Executable { .. } | Error::NotFound(_) => Kind::NotFound,
            Error::Init { kind, .. } => *kind,
            Error::Unsupported(_) => Kind::Unsupported,
            Error::Conflict(_) => Kind::Conflict,
        }
    }
}

/// Says what was being done when the operating system refused.
pub(crate) trait Context<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::System {
            what: what(),
            source,
        })
    }
}

impl<T> Context<T> for rustix::io::Result<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|errno| Error::System {
            what: what(),
            source: errno.into(),
        })
    }
}
