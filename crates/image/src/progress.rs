//! What a long operation tells while it runs, in the words the Docker Engine API streams.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Error, Result};

/// One line of progress.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Event {
    /// What it is about: a layer's short digest, a tag; empty for the whole.
    pub id: String,
    /// `Downloading`, `Extracting`, `Pull complete`, or a sentence.
    pub status: String,
    /// Bytes (or steps) done, where counted.
    pub current: Option<u64>,
    /// Bytes (or steps) in all, where known.
    pub total: Option<u64>,
}

impl Event {
    /// A sentence about the whole.
    pub fn message(status: impl Into<String>) -> Event {
        Event {
            status: status.into(),
            ..Event::default()
        }
    }

    /// A word about one part.
    pub fn about(id: impl Into<String>, status: impl Into<String>) -> Event {
        Event {
            id: id.into(),
            status: status.into(),
            ..Event::default()
        }
    }

    /// A count about one part.
    pub fn counted(
        id: impl Into<String>,
        status: impl Into<String>,
        current: u64,
        total: u64,
    ) -> Event {
        Event {
            id: id.into(),
            status: status.into(),
            current: Some(current),
            total: (total > 0).then_some(total),
        }
    }
}

/// Who listens. Called from several threads; must not block for long.
pub trait Progress: Send + Sync {
    /// Takes one event.
    fn report(&self, event: Event);
}

impl<F: Fn(Event) + Send + Sync> Progress for F {
    fn report(&self, event: Event) {
        self(event)
    }
}

/// Nobody listens.
pub struct Silent;

impl Progress for Silent {
    fn report(&self, _: Event) {}
}

/// A shared listener.
pub type Listener = Arc<dyn Progress>;

/// A flag that ends a long blocking operation early, from any thread.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks the operation to end and clean up.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether that was asked.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// # Errors
    /// [`Error::Cancelled`] once asked.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            Err(Error::Cancelled)
        } else {
            Ok(())
        }
    }
}
