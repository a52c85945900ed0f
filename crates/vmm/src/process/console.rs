//! A console of a machine without a terminal: into a log that cannot fill the disk (the serial line's), to everyone
//! attached, and with a little of the past for those who attach late.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::jail::{Thread, confine};

/// The log is renamed to `.1` at this size; one older file is kept.
const LOG_LIMIT: u64 = 4 << 20;
/// What a newcomer is shown.
const HISTORY: usize = 16 << 10;
/// Bytes that wait for one who is attached; the guest's device is busy beyond.
const WAITING_LIMIT: usize = 256 << 10;
/// Bytes of one write.
const CHUNK: usize = 16 << 10;
/// How long somebody who is attached may take none: then what is written is left out for them, and said.
const PATIENCE: Duration = Duration::from_secs(2);

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

/// What waits for one who is attached.
#[derive(Default)]
struct Waiting {
    bytes: VecDeque<u8>,
    /// Bytes that were left out after those, since it did not read.
    skipped: u64,
    /// Its thread writes some at this moment.
    writing: bool,
    /// Chunks it has taken, to see whether it reads.
    taken: u64,
    /// Nothing more will come.
    closed: bool,
    /// It takes nothing any more.
    gone: bool,
}

/// One who is attached. A thread of its own writes to it, and ends with it.
struct Reader {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    /// What was left out is in the log.
    logged: bool,
}

impl Reader {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`, as long as chunks are taken: false where none is for a while.
    fn wait<'a>(
        &self,
        mut waiting: MutexGuard<'a, Waiting>,
        done: impl Fn(&Waiting) -> bool,
    ) -> (MutexGuard<'a, Waiting>, bool) {
        let (mut taken, mut since) = (waiting.taken, Instant::now());
        while !done(&waiting) {
            if waiting.taken != taken {
                (taken, since) = (waiting.taken, Instant::now());
            }
            let Some(left) = PATIENCE.checked_sub(since.elapsed()) else {
                return (waiting, false);
            };
            (waiting, _) = self
                .changed
                .wait_timeout(waiting, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        (waiting, true)
    }

    /// Gives it `bytes`, and waits for room as long as it reads at all; false where it is gone. Who has fallen behind is not
    /// waited for, and told of the gap.
    fn push(&self, bytes: &[u8]) -> bool {
        let waiting = self.lock();
        let has_room = |waiting: &Waiting| {
            waiting.gone || waiting.skipped > 0 || waiting.bytes.len() < WAITING_LIMIT
        };
        let (mut waiting, in_time) = self.wait(waiting, has_room);
        if waiting.gone || waiting.closed {
            return !waiting.gone;
        }
        if in_time && waiting.skipped == 0 {
            waiting.bytes.extend(bytes);
        } else {
            waiting.skipped += bytes.len() as u64;
        }
        self.changed.notify_all();
        true
    }

    /// Writes what waits until nothing more will come.
    fn write_out(&self, mut stream: UnixStream) {
        let mut chunk = Vec::with_capacity(CHUNK);
        loop {
            let skipped = {
                let mut waiting = self.lock();
                waiting.writing = false;
                self.changed.notify_all();
                while waiting.bytes.is_empty() && waiting.skipped == 0 {
                    if waiting.closed || waiting.gone {
                        return;
                    }
                    waiting = self
                        .changed
                        .wait(waiting)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                let count = waiting.bytes.len().min(CHUNK);
                chunk.clear();
                chunk.extend(waiting.bytes.drain(..count));
                waiting.writing = true;
                waiting.taken += 1;
                self.changed.notify_all();
                match waiting.bytes.is_empty() {
                    true => std::mem::take(&mut waiting.skipped),
                    false => 0,
                }
            };
            if skipped > 0 {
                let place = if self.logged {
                    "; the log has them"
                } else {
                    ""
                };
                let gap = format!(
                    "\r\n[berth: {skipped} bytes are left out here, since this console was not read{place}]\r\n"
                );
                chunk.extend(gap.as_bytes());
            }
            if stream.write_all(&chunk).is_err() {
                self.leave();
                return;
            }
        }
    }

    /// It takes nothing any more.
    fn leave(&self) {
        self.lock().gone = true;
        self.changed.notify_all();
    }
}

struct Inner {
    log: Option<Log>,
    history: VecDeque<u8>,
    attached: Vec<Arc<Reader>>,
}

/// See the module. Lock order: the console, then one reader; a reader is waited for with neither.
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

    /// What the guest wrote. Its device is busy meanwhile: who is attached and reads gets every byte, and who does not is waited
    /// for once, and shortly.
    pub fn output(&self, bytes: &[u8]) {
        let attached = {
            let mut inner = self.lock();
            if let Some(log) = &mut inner.log {
                log.write(bytes);
            }
            inner.history.extend(bytes);
            let excess = inner.history.len().saturating_sub(HISTORY);
            inner.history.drain(..excess);
            inner.attached.clone()
        };
        let mut left = false;
        for reader in attached {
            left |= !reader.push(bytes);
        }
        if left {
            self.lock().attached.retain(|reader| !reader.lock().gone);
        }
    }

    /// A line of ours among the guest's output.
    pub fn note(&self, text: &str) {
        self.output(format!("\r\n[berth: {text}]\r\n").as_bytes());
    }

    /// Sends the recent past and everything from now on to `stream`, until that is closed or the guard dropped.
    ///
    /// # Errors
    /// Where the host gives no thread.
    pub fn attach(self: &Arc<Console>, stream: UnixStream, history: bool) -> io::Result<Attached> {
        let mut inner = self.lock();
        let reader = Arc::new(Reader {
            waiting: Mutex::default(),
            changed: Condvar::new(),
            logged: inner.log.is_some(),
        });
        if history {
            reader.lock().bytes.extend(&inner.history);
        }
        let writer = reader.clone();
        std::thread::Builder::new()
            .name("reader".into())
            .stack_size(128 << 10)
            .spawn(move || {
                confine(Thread::Console);
                writer.write_out(stream);
            })?;
        inner.attached.push(reader.clone());
        Ok(Attached {
            console: self.clone(),
            reader,
        })
    }

    /// Waits until those who are attached and read have everything. Nothing is given to anybody afterwards.
    pub fn close(&self) {
        let attached = std::mem::take(&mut self.lock().attached);
        for reader in &attached {
            reader.lock().closed = true;
            reader.changed.notify_all();
        }
        for reader in &attached {
            let rests = |waiting: &Waiting| {
                let written = waiting.bytes.is_empty() && waiting.skipped == 0 && !waiting.writing;
                waiting.gone || written
            };
            drop(reader.wait(reader.lock(), rests));
        }
    }

    /// The console as a device writes to it.
    pub fn writer(self: &Arc<Console>) -> ConsoleWriter {
        ConsoleWriter(self.clone())
    }
}

/// One who is attached, until dropped.
pub struct Attached {
    console: Arc<Console>,
    reader: Arc<Reader>,
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.reader.leave();
        let mut inner = self.console.lock();
        inner
            .attached
            .retain(|reader| !Arc::ptr_eq(reader, &self.reader));
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
    fn a_late_reader_sees_the_past() {
        let directory = tempfile::tempdir().unwrap();
        let console = Console::open(&directory.path().join("log")).unwrap();
        console.output(b"past ");
        let (mut reader, writer) = UnixStream::pair().unwrap();
        let attached = console.attach(writer, true).unwrap();
        console.output(b"present");
        let mut text = [0; 12];
        reader.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"past present");
        drop(attached);
        assert!(console.lock().attached.is_empty());
    }

    /// Numbered lines: `00000000`, `00000001`, …
    fn lines(numbers: std::ops::Range<u32>) -> Vec<u8> {
        numbers
            .flat_map(|n| format!("{n:08}\n").into_bytes())
            .collect()
    }

    #[test]
    fn a_burst_reaches_a_slow_reader_whole_and_the_end_waits_for_it() {
        let console = Console::unlogged();
        let (mut reader, writer) = UnixStream::pair().unwrap();
        let _attached = console.attach(writer, false).unwrap();
        let burst = lines(0..400_000);
        let wanted = burst.clone();
        let guest = std::thread::spawn(move || {
            burst.chunks(5000).for_each(|part| console.output(part));
            console.close();
        });
        let mut text: Vec<u8> = Vec::new();
        let mut part = vec![0; 8192];
        while text.len() < wanted.len() {
            let count = reader.read(&mut part).unwrap();
            assert!(count > 0, "closed after {} bytes", text.len());
            text.extend(&part[..count]);
            if text.len() < 1 << 20 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert!(text == wanted);
        guest.join().unwrap();
    }

    #[test]
    fn who_does_not_read_stops_nobody_and_is_told_what_is_missing() {
        let directory = tempfile::tempdir().unwrap();
        let console = Console::open(&directory.path().join("log")).unwrap();
        let (mut reader, writer) = UnixStream::pair().unwrap();
        let attached = console.attach(writer, false).unwrap();
        let burst = lines(0..400_000);
        burst.chunks(5000).for_each(|part| console.output(part));
        // Once it reads again it gets what waited, the gap, and what comes then.
        reader
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let mut text: Vec<u8> = Vec::new();
        let mut part = vec![0; 8192];
        while !text.ends_with(b"]\r\n") {
            let count = reader.read(&mut part).unwrap();
            text.extend(&part[..count]);
        }
        let gap = text.iter().rposition(|byte| *byte == b'[').unwrap();
        let said = String::from_utf8(text[gap..].to_vec()).unwrap();
        let missing: usize = said.split(' ').nth(1).unwrap().parse().unwrap();
        assert!(said.contains("the log has them"), "{said}");
        assert!(text[..gap - 2] == burst[..burst.len() - missing]);
        console.output(b"again");
        let mut again = [0; 5];
        reader.read_exact(&mut again).unwrap();
        assert_eq!(&again, b"again");
        drop(reader);
        drop(attached);
        console.output(b"to nobody");
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
