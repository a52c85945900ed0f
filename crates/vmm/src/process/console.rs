//! A console of a machine without a terminal: into a log that cannot fill the disk (the serial line's), to everyone
//! attached, and with a little of the past for those who attach late.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The log is renamed to `.1` at this size; one older file is kept.
const LOG_LIMIT: u64 = 4 << 20;
/// What a newcomer is shown.
const HISTORY: usize = 16 << 10;

/// The log and what is in it.
struct Log {
    path: PathBuf,
    file: File,
    written: u64,
}

impl Log {
    fn write(&mut self, bytes: &[u8]) {
        if self.written + bytes.len() as u64 > LOG_LIMIT {
            let mut older = self.path.clone().into_os_string();
            older.push(".1");
            if fs::rename(&self.path, older).is_ok()
                && let Ok(file) = open_log(&self.path)
            {
                self.file = file;
                self.written = 0;
            }
        }
        // A full disk must not stop the guest: its console goes on without a log.
        if self.file.write_all(bytes).is_ok() {
            self.written += bytes.len() as u64;
        }
    }
}

struct Inner {
    log: Option<Log>,
    history: VecDeque<u8>,
    attached: Vec<UnixStream>,
}

/// See the module. Its lock is a leaf.
pub struct Console {
    inner: Mutex<Inner>,
}

fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

impl Console {
    /// Opens (and continues) a log.
    pub fn open(path: &Path) -> io::Result<Arc<Console>> {
        let file = open_log(path)?;
        let written = file.metadata()?.len();
        Ok(Console::with(Some(Log {
            path: path.to_owned(),
            file,
            written,
        })))
    }

    /// A console that only those see who attach.
    pub fn unlogged() -> Arc<Console> {
        Console::with(None)
    }

    fn with(log: Option<Log>) -> Arc<Console> {
        Arc::new(Console {
            inner: Mutex::new(Inner {
                log,
                history: VecDeque::new(),
                attached: Vec::new(),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the guest wrote.
    pub fn output(&self, bytes: &[u8]) {
        let mut inner = self.lock();
        if let Some(log) = &mut inner.log {
            log.write(bytes);
        }
        inner.history.extend(bytes);
        let excess = inner.history.len().saturating_sub(HISTORY);
        inner.history.drain(..excess);
        // Whoever does not read fast enough is let go: the guest waits for nobody.
        inner
            .attached
            .retain_mut(|stream| stream.write_all(bytes).is_ok());
    }

    /// A line of ours among the guest's output.
    pub fn note(&self, text: &str) {
        self.output(format!("\r\n[berth: {text}]\r\n").as_bytes());
    }

    /// Sends the recent past and everything from now on to `stream`, which must not block.
    pub fn attach(&self, mut stream: UnixStream, history: bool) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let mut inner = self.lock();
        if history {
            let (a, b) = inner.history.as_slices();
            stream.write_all(a)?;
            stream.write_all(b)?;
        }
        inner.attached.push(stream);
        Ok(())
    }

    /// The console as a device writes to it.
    pub fn writer(self: &Arc<Console>) -> ConsoleWriter {
        ConsoleWriter(self.clone())
    }
}

/// See [`Console::writer`].
pub struct ConsoleWriter(Arc<Console>);

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.output(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_late_reader_sees_the_past_and_a_slow_one_stops_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let console = Console::open(&directory.path().join("log")).unwrap();
        console.output(b"past ");
        let (mut reader, writer) = UnixStream::pair().unwrap();
        console.attach(writer, true).unwrap();
        console.output(b"present");
        let mut text = [0; 12];
        reader.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"past present");
        for _ in 0..100 {
            console.output(&[b'x'; 65536]);
        }
        assert!(console.lock().attached.is_empty());
    }

    #[test]
    fn the_log_stays_below_its_bound() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let console = Console::open(&path).unwrap();
        for _ in 0..200 {
            console.output(&[b'y'; 65536]);
        }
        let total: u64 = fs::read_dir(directory.path())
            .unwrap()
            .map(|e| e.unwrap().metadata().unwrap().len())
            .sum();
        assert!(total <= 2 * LOG_LIMIT, "{total}");
        assert!(fs::metadata(&path).unwrap().len() > 0);
    }
}
