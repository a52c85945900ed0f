//! What a failure means to the person or program that sees it.
//!
//! Every crate keeps its own error enum (`thiserror`); each enum says by [`Classified`] which of the few
//! kinds below a failure is. Faces translate the kind: the command line into an exit code, the HTTP APIs
//! into a status.

use serde::{Deserialize, Serialize};

/// The kinds of failure that a caller can act on differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The request itself is malformed or contradicts itself.
    Invalid,
    /// What was named does not exist.
    NotFound,
    /// It exists already, is in use, or is in the wrong state for this.
    Conflict,
    /// The host or a quota has no room for it.
    Capacity,
    /// The caller may not do this.
    Permission,
    /// This host cannot do it at all.
    Unsupported,
    /// Nothing to do: it is already so (Docker's 304).
    NotModified,
    /// A defect, or the operating system refused something that should have worked.
    Internal,
}

impl Kind {
    /// The stable exit code of the `berth` command for this kind.
    pub const fn exit_code(self) -> u8 {
        match self {
            Kind::NotModified => 0,
            Kind::Internal => 1,
            Kind::Invalid => 2,
            Kind::NotFound => 3,
            Kind::Conflict => 4,
            Kind::Capacity => 5,
            Kind::Permission => 6,
            Kind::Unsupported => 7,
        }
    }

    /// The HTTP status the Docker Engine API uses for this kind.
    pub const fn http_status(self) -> u16 {
        match self {
            Kind::NotModified => 304,
            Kind::Invalid => 400,
            Kind::Permission => 403,
            Kind::NotFound => 404,
            Kind::Conflict => 409,
            Kind::Unsupported => 501,
            Kind::Capacity | Kind::Internal => 500,
        }
    }
}

/// An error that knows its [`Kind`] and, where there is one, the command that fixes it.
pub trait Classified: std::error::Error {
    /// What sort of failure this is.
    fn kind(&self) -> Kind;
    /// The command or step that fixes it.
    fn fix(&self) -> Option<String> {
        None
    }
}

/// Classifies an operating-system error by its errno.
pub fn kind_of_io(error: &std::io::Error) -> Kind {
    use std::io::ErrorKind as E;
    match error.kind() {
        E::NotFound => Kind::NotFound,
        E::PermissionDenied => Kind::Permission,
        E::AlreadyExists | E::ResourceBusy | E::DirectoryNotEmpty => Kind::Conflict,
        E::StorageFull | E::QuotaExceeded | E::OutOfMemory => Kind::Capacity,
        E::InvalidInput | E::InvalidData => Kind::Invalid,
        E::Unsupported => Kind::Unsupported,
        _ => Kind::Internal,
    }
}
