//! How a crash of the guest's kernel is told from its restart.
//!
//! Linux tells the panic device ([`crate::devices::pvpanic`]), but its driver is a module that is not there when it matters
//! most, early, and it knows no reason. What every Linux does is to say `Kernel panic - not syncing: …` on its console before it
//! resets (`panic=-1`) or halts, so the serial line is read along. A guest's program that writes the same words only makes its
//! own next reset a crash.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::control::{Control, Outcome};

const PANIC: &str = "Kernel panic - not syncing:";
/// What follows a panic after which the kernel does not reset.
const HALTED: &str = "---[ end Kernel panic - not syncing";
/// The part of a line that is looked at.
const LINE_LIMIT: usize = 512;

#[derive(Default)]
struct Inner {
    line: Vec<u8>,
    panic: Option<String>,
    control: Option<Arc<Control>>,
}

/// Reads a guest's console along. Its lock is taken before that of [`Control`].
#[derive(Default)]
pub struct CrashWatch {
    inner: Mutex<Inner>,
}

impl CrashWatch {
    pub fn new() -> Arc<CrashWatch> {
        Arc::new(CrashWatch::default())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new machine begins; it is ended where its kernel halts after a panic.
    pub fn begin(&self, control: Arc<Control>) {
        *self.lock() = Inner {
            control: Some(control),
            ..Inner::default()
        };
    }

    /// What the guest wrote.
    pub fn output(&self, bytes: &[u8]) {
        let mut inner = self.lock();
        for byte in bytes {
            match byte {
                b'\n' | b'\r' => {
                    let line = std::mem::take(&mut inner.line);
                    inner.look_at(&String::from_utf8_lossy(&line));
                }
                _ if inner.line.len() < LINE_LIMIT => inner.line.push(*byte),
                _ => {}
            }
        }
    }

    /// What the end at hand was, in truth: a reset after a panic is a crash, and a crash after it has its reason.
    pub fn judge(&self, outcome: Outcome) -> Outcome {
        match (outcome, self.lock().panic.take()) {
            (Outcome::Reset | Outcome::Crash(_), Some(reason)) => {
                Outcome::Crash(format!("kernel panic: {reason}"))
            }
            (outcome, _) => outcome,
        }
    }
}

impl Inner {
    fn look_at(&mut self, line: &str) {
        // "[    0.512345] Kernel panic - not syncing: VFS: …"
        let text = match line.trim_start().strip_prefix('[') {
            Some(rest) => rest.split_once("] ").map_or("", |(_, text)| text),
            None => line,
        };
        if let Some(reason) = text.trim_start().strip_prefix(PANIC) {
            self.panic = Some(reason.trim().to_owned());
        } else if text.contains(HALTED)
            && let Some(reason) = self.panic.clone()
            && let Some(control) = &self.control
        {
            control.end(Outcome::Crash(format!("kernel panic: {reason}")));
        }
    }
}

/// A console that is read along.
pub struct Watched<W> {
    pub watch: Arc<CrashWatch>,
    pub to: W,
}

impl<W: Write> Write for Watched<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.watch.output(&bytes[..written]);
        Ok(written)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_after_a_panic_is_a_crash_and_one_without_is_none() {
        let watch = CrashWatch::new();
        watch.begin(Control::new());
        watch.output(b"booting\r\nall is well\r\n");
        assert_eq!(watch.judge(Outcome::Reset), Outcome::Reset);
        watch.output(b"[    0.51] Kernel panic - not sync");
        watch.output(b"ing: VFS: Unable to mount root fs\r\n[    0.52] CPU: 0\r\n");
        assert_eq!(
            watch.judge(Outcome::Reset),
            Outcome::Crash("kernel panic: VFS: Unable to mount root fs".into())
        );
        assert_eq!(watch.judge(Outcome::PowerOff), Outcome::PowerOff);
    }

    #[test]
    fn words_within_a_line_are_no_panic() {
        let watch = CrashWatch::new();
        watch.output(b"log: Kernel panic - not syncing: yesterday\n");
        assert_eq!(watch.judge(Outcome::Reset), Outcome::Reset);
    }

    #[test]
    fn a_kernel_that_halts_after_its_panic_is_ended() {
        let (watch, control) = (CrashWatch::new(), Control::new());
        watch.begin(control.clone());
        watch.output(b"Kernel panic - not syncing: Oops\n");
        assert_eq!(control.outcome(), None);
        watch.output(b"[ 1.0] ---[ end Kernel panic - not syncing: Oops ]---\n");
        assert_eq!(
            control.outcome(),
            Some(Outcome::Crash("kernel panic: Oops".into()))
        );
    }
}
