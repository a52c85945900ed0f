//! Output of a device that a thread of its own writes out, so that a slow or stopped terminal never stops the guest.

use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Bytes beyond the limit that are kept, at most.
const EXCESS: usize = 1 << 20;

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    writing: bool,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module. Its lock is a leaf.
pub struct Outlet {
    shared: Arc<Shared>,
    limit: usize,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl Outlet {
    /// An outlet into `sink` that calls itself full from `limit` bytes on. `taken` is called, without a lock, each time
    /// the thread has taken what waits.
    pub fn new(
        name: &str,
        limit: usize,
        mut sink: Box<dyn Write + Send>,
        taken: impl Fn() + Send + 'static,
    ) -> Outlet {
        let shared = Arc::new(Shared::default());
        let waited = shared.clone();
        let writer = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                crate::process::jail::confine(crate::process::jail::Thread::Console);
                loop {
                    let bytes = {
                        let mut state = waited.lock();
                        while state.bytes.is_empty() && !state.closed {
                            state = waited
                                .changed
                                .wait(state)
                                .unwrap_or_else(PoisonError::into_inner);
                        }
                        if state.bytes.is_empty() {
                            return;
                        }
                        state.writing = true;
                        std::mem::take(&mut state.bytes)
                    };
                    taken();
                    // A terminal that is gone takes no output; the guest goes on.
                    let _ = sink.write_all(&bytes).and_then(|()| sink.flush());
                    waited.lock().writing = false;
                }
            });
        Outlet {
            shared,
            limit,
            writer: Mutex::new(writer.ok()),
        }
    }

    /// False while the outside is too slow. A closed outlet takes everything, and drops it.
    pub fn has_room(&self) -> bool {
        let state = self.shared.lock();
        state.closed || state.bytes.len() < self.limit
    }

    /// Takes `bytes`, whether or not there is room; the caller looks first. What a caller gives that never looks is
    /// dropped in the end.
    pub fn push(&self, bytes: &[u8]) {
        let mut state = self.shared.lock();
        if state.closed || bytes.is_empty() || state.bytes.len() + bytes.len() > self.limit + EXCESS
        {
            return;
        }
        let idle = state.bytes.is_empty() && !state.writing;
        state.bytes.extend_from_slice(bytes);
        if idle {
            self.shared.changed.notify_all();
        }
    }

    /// Waits until all is written and ends the thread. Later output is dropped.
    pub fn close(&self) {
        self.end();
        let writer = self
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(writer) = writer {
            crate::defect::join(writer);
        }
    }

    fn end(&self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl Drop for Outlet {
    /// The thread writes what there is and ends by itself: nobody waits for a stopped terminal.
    fn drop(&mut self) {
        self.end();
    }
}
