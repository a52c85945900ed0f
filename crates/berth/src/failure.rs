//! What the command line tells a person when something fails, and the exit code that goes with it.

use std::fmt;
use std::process::ExitCode;

use base::{Classified, Kind};

/// A failed command: what and why, the step that fixes it, and the exit code.
#[derive(Debug, Clone)]
pub struct Failure {
    pub message: String,
    pub fix: Option<String>,
    pub code: u8,
}

/// Exit code of `run` when Berth itself failed before the container's program began (docker's 125).
pub const RUN_FAILED: u8 = 125;

impl Failure {
    pub fn new(kind: Kind, message: impl Into<String>) -> Failure {
        Failure {
            message: message.into(),
            fix: None,
            code: kind.exit_code(),
        }
    }

    pub fn invalid(message: impl Into<String>) -> Failure {
        Failure::new(Kind::Invalid, message)
    }

    pub fn internal(message: impl Into<String>) -> Failure {
        Failure::new(Kind::Internal, message)
    }

    #[must_use]
    pub fn with_fix(mut self, fix: impl Into<String>) -> Failure {
        self.fix = Some(fix.into());
        self
    }

    /// Any classified error of a room.
    pub fn of<E: Classified>(error: &E) -> Failure {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(inner) = source {
            let text = inner.to_string();
            if !message.contains(&text) {
                message = format!("{message}: {text}");
            }
            source = inner.source();
        }
        Failure {
            message,
            fix: error.fix(),
            code: error.kind().exit_code(),
        }
    }

    /// An operating-system error while doing `what`.
    pub fn io(what: impl fmt::Display, error: &std::io::Error) -> Failure {
        Failure::new(base::error::kind_of_io(error), format!("{what}: {error}"))
    }

    /// Prints the failure to standard error and gives its exit code.
    pub fn report(&self) -> ExitCode {
        let style = crate::output::stderr_style();
        if !self.message.is_empty() {
            eprintln!("{}berth:{} {}", style.red, style.reset, self.message);
        }
        if let Some(fix) = &self.fix {
            eprintln!("{}  fix:{} {fix}", style.dim, style.reset);
        }
        ExitCode::from(self.code)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
