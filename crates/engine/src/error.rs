//! What goes wrong in the engine, in dockerd's words where clients read them.

use std::io;

use base::{Classified, Kind};

/// The engine's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of an engine operation. [`Classified::kind`] says which HTTP status or exit code it is.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("No such container: {0}")]
    NoSuchContainer(String),
    #[error("multiple IDs found with provided prefix: {0}")]
    AmbiguousContainer(String),
    #[error("No such exec instance: {0}")]
    NoSuchExec(String),
    #[error("No such image: {0}")]
    NoSuchImage(String),
    #[error(
        "Conflict. The container name \"/{name}\" is already in use by container \"{id}\". \
         You have to remove (or rename) that container to be able to reuse that name."
    )]
    NameInUse { name: String, id: String },
    #[error("container {0} is not running")]
    NotRunning(String),
    #[error("Container {0} is paused, unpause the container before stopping or killing")]
    Paused(String),
    /// The request is malformed or contradicts itself; the text says how.
    #[error("{0}")]
    Invalid(String),
    /// Something named in the request is not there; the text says what.
    #[error("{0}")]
    NotFound(String),
    /// The object is in the wrong state for this, or in use; the text says which.
    #[error("{0}")]
    Conflict(String),
    /// Already so.
    #[error("{0}")]
    NotModified(String),
    /// This host or this version cannot do it.
    #[error("{0}")]
    Unsupported(String),
    /// The caller may not do this.
    #[error("{0}")]
    Forbidden(String),
    /// Credentials that are not accepted.
    #[error("{0}")]
    Unauthorized(String),
    /// No room.
    #[error("{0}")]
    Capacity(String),
    /// The keeper (the process that holds the containers) does not answer or answered nonsense.
    #[error("the container keeper: {0}")]
    Keeper(String),
    /// The runtime refused to create or start the container's process.
    #[error("{message}")]
    Runtime { message: String, kind: Kind },
    /// An operating-system call failed.
    #[error("{what}: {source}")]
    Io {
        what: String,
        #[source]
        source: io::Error,
    },
    /// A command of a build failed.
    #[error("{message}")]
    Step { message: String, code: i32 },
    /// An error of another room, with its kind and its fix.
    #[error("{message}")]
    Room {
        message: String,
        kind: Kind,
        fix: Option<String>,
    },
}

impl Error {
    /// Wraps an operating-system error with what was being done.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let what = what.into();
        move |source| Error::Io { what, source }
    }

    /// Carries an error of another crate over, with its kind, its fix and its sources' texts.
    pub fn room(error: impl Classified) -> Error {
        let mut message = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            let text = cause.to_string();
            if !message.contains(&text) {
                message.push_str(": ");
                message.push_str(&text);
            }
            source = cause.source();
        }
        Error::Room {
            message,
            kind: error.kind(),
            fix: error.fix(),
        }
    }
}

impl Classified for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::NoSuchContainer(_)
            | Error::NoSuchExec(_)
            | Error::NoSuchImage(_)
            | Error::NotFound(_) => Kind::NotFound,
            Error::AmbiguousContainer(_) | Error::Invalid(_) => Kind::Invalid,
            Error::NameInUse { .. }
            | Error::NotRunning(_)
            | Error::Paused(_)
            | Error::Conflict(_) => Kind::Conflict,
            Error::NotModified(_) => Kind::NotModified,
            Error::Unsupported(_) => Kind::Unsupported,
            Error::Forbidden(_) | Error::Unauthorized(_) => Kind::Permission,
            Error::Capacity(_) => Kind::Capacity,
            Error::Keeper(_) | Error::Step { .. } => Kind::Internal,
            Error::Runtime { kind, .. } | Error::Room { kind, .. } => *kind,
            Error::Io { source, .. } => match base::error::kind_of_io(source) {
                // A file missing inside the daemon is its own defect, never the client's 404.
                Kind::NotFound | Kind::Invalid => Kind::Internal,
                kind => kind,
            },
        }
    }

    fn fix(&self) -> Option<String> {
        match self {
            Error::Room { fix, .. } => fix.clone(),
            Error::NameInUse { name, .. } => Some(format!("berth rm {name}")),
            Error::NotRunning(id) => Some(format!("berth start {id}")),
            Error::Paused(id) => Some(format!("berth unpause {id}")),
            Error::NoSuchContainer(_) | Error::AmbiguousContainer(_) => {
                Some("see what there is: berth ps -a".into())
            }
            Error::NoSuchImage(_) => Some("see what is stored: berth images".into()),
            _ => None,
        }
    }
}
