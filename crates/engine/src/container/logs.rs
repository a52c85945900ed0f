//! Reading logs: json-file, over rotated files, and following a log that is being written.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::StreamExt;
use jiff::Timestamp;
use serde::Deserialize;
use tokio::sync::mpsc;

use crate::Engine;
use crate::container::host_config::LogConfig;
use crate::container::record::{Container, Phase, Record};
use crate::container::{LogStream, LogsOptions};
use crate::error::{Error, Result};
use crate::keeper::log::rotated;
use crate::keeper::protocol::LogRecord;

/// The longest record that is read; the writer cuts lines far below it.
const MAX_RECORD: u64 = 1 << 20;
/// Files of one log, at most.
const MOST_ROTATED: u32 = 1000;
/// How often a followed log is looked at. Docker's clients are line-oriented; nobody sees the difference.
const POLL: Duration = Duration::from_millis(50);

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow)]
    log: std::borrow::Cow<'a, str>,
    #[serde(borrow)]
    stream: std::borrow::Cow<'a, str>,
    #[serde(borrow)]
    time: std::borrow::Cow<'a, str>,
    #[serde(default)]
    attrs: std::collections::BTreeMap<String, String>,
}

/// Refuses log drivers and options that are not there.
pub(crate) fn check(config: &LogConfig) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    match config.kind.as_str() {
        "" | "json-file" | "local" => {
            for (key, value) in &config.config {
                match key.as_str() {
                    "max-size" if value != "-1" => {
                        base::units::parse_size(value)
                            .map_err(|error| Error::Invalid(error.to_string()))?;
                    }
                    "max-file"
                        if value
                            .parse::<u32>()
                            .ok()
                            .filter(|n| (1..=1000).contains(n))
                            .is_none() =>
                    {
                        return Err(Error::Invalid(format!(
                            "max-file cannot be {value:?}: 1 to 1000 are possible"
                        )));
                    }
                    "tag" => drop(tag(value, &Record::default())?),
                    "labels-regex" | "env-regex" => warnings.push(format!(
                        "log opt {key} is not applied: name what is wanted with labels and env"
                    )),
                    "max-size" | "max-file" | "labels" | "env" | "compress" | "mode"
                    | "max-buffer-size" => {}
                    other => {
                        return Err(Error::Invalid(format!(
                            "unknown log opt '{other}' for json-file log driver"
                        )));
                    }
                }
            }
            Ok(warnings)
        }
        "none" => Ok(warnings),
        other => Err(Error::Invalid(format!(
            "logger: no log driver named '{other}' is registered: json-file, local and none are known"
        ))),
    }
}

/// `--log-opt tag`: text with a container's names in it, as `{{.Name}}/{{.ID}}`.
///
/// # Errors
/// [`Error::Invalid`] for what is no such name.
fn tag(template: &str, record: &Record) -> Result<String> {
    let short = |id: &str| {
        let id = id.rsplit(':').next().unwrap_or(id);
        id.get(..12).unwrap_or(id).to_owned()
    };
    let mut pieces = template.split("{{");
    let mut text = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let (name, rest) = piece.split_once("}}").unwrap_or((piece, ""));
        text.push_str(&match name.trim() {
            ".ID" => short(&record.id),
            ".FullID" => record.id.clone(),
            ".Name" => record.name.clone(),
            ".ImageID" => short(&record.image),
            ".ImageFullID" => record.image.clone(),
            ".ImageName" => record.config.image.clone(),
            ".DaemonName" => "berth".to_owned(),
            other => {
                return Err(Error::Invalid(format!(
                    "log opt tag: {{{{{other}}}}} is not known: .ID, .FullID, .Name, .ImageID, .ImageFullID, .ImageName and .DaemonName are"
                )));
            }
        });
        text.push_str(rest);
    }
    Ok(text)
}

/// What the keeper is told about a container's log.
pub(crate) fn record(record: &Record, path: PathBuf) -> LogRecord {
    let config = &record.host.log_config;
    if config.kind == "none" {
        return LogRecord::default();
    }
    let option = |key: &str| {
        config
            .config
            .get(key)
            .map(String::as_str)
            .unwrap_or_default()
    };
    // `local` bounds its logs by itself: 20 MB, five files.
    let (size, files) = if config.kind == "local" {
        (20 << 20, 5)
    } else {
        (0, 1)
    };
    let mut attributes = std::collections::BTreeMap::new();
    for key in option("labels").split(',').map(str::trim) {
        if let Some(value) = record.config.labels.get(key) {
            attributes.insert(key.to_owned(), value.clone());
        }
    }
    for key in option("env")
        .split(',')
        .map(str::trim)
        .filter(|key| !key.is_empty())
    {
        let value = record
            .config
            .env
            .iter()
            .filter_map(|entry| entry.split_once('='))
            .find(|(name, _)| *name == key);
        if let Some((_, value)) = value {
            attributes.insert(key.to_owned(), value.to_owned());
        }
    }
    match tag(option("tag"), record) {
        Ok(tag) if !tag.is_empty() => drop(attributes.insert("tag".to_owned(), tag)),
        _ => {}
    }
    LogRecord {
        path: Some(path),
        max_size: base::units::parse_size(option("max-size")).unwrap_or(size),
        max_files: option("max-file").parse().unwrap_or(files),
        attributes,
    }
}

/// A frame of the multiplexed stream.
pub(crate) fn frame(stream: u8, bytes: &[u8], out: &mut BytesMut) {
    out.reserve(8 + bytes.len());
    out.put_slice(&[stream, 0, 0, 0]);
    out.put_u32(bytes.len() as u32);
    out.put_slice(bytes);
}

/// Which lines are wanted, and in which form.
struct Choice {
    options: LogsOptions,
    tty: bool,
}

enum Chosen {
    Out(Bytes),
    Skipped,
    /// Past `until`: nothing more is wanted.
    Over,
}

impl Choice {
    fn take(&self, text: &[u8]) -> Chosen {
        let Ok(text) = std::str::from_utf8(text) else {
            return Chosen::Skipped;
        };
        // A record torn by a crash is left out; the next begins on its own line.
        let Ok(line) = serde_json::from_str::<Line<'_>>(text.trim_end()) else {
            return Chosen::Skipped;
        };
        let o = &self.options;
        if o.since.is_some() || o.until.is_some() {
            let Ok(time) = line.time.parse::<Timestamp>() else {
                return Chosen::Skipped;
            };
            if o.since.is_some_and(|since| time < since) {
                return Chosen::Skipped;
            }
            if o.until.is_some_and(|until| time > until) {
                return Chosen::Over;
            }
        }
        let stream = if line.stream == "stderr" { 2 } else { 1 };
        if (stream == 1 && !o.stdout) || (stream == 2 && !o.stderr) {
            return Chosen::Skipped;
        }
        let mut bytes = Vec::with_capacity(line.log.len() + 40);
        if o.timestamps {
            bytes.extend_from_slice(line.time.as_bytes());
            bytes.push(b' ');
        }
        if o.details {
            let details: Vec<String> = line
                .attrs
                .iter()
                .map(|(key, value)| format!("{key}={value}"))
                .collect();
            bytes.extend_from_slice(details.join(",").as_bytes());
            bytes.push(b' ');
        }
        bytes.extend_from_slice(line.log.as_bytes());
        if self.tty {
            return Chosen::Out(bytes.into());
        }
        let mut out = BytesMut::new();
        frame(stream, &bytes, &mut out);
        Chosen::Out(out.freeze())
    }
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The files of a log, oldest first, opened before any can be rotated away.
fn open_all(path: &Path) -> io::Result<Vec<File>> {
    // The newest first: whatever is rotated meanwhile is met further on.
    let newest = open(path)?;
    let inode = newest.as_ref().map(inode_of).transpose()?;
    let mut files = Vec::new();
    let mut met = HashSet::new();
    for index in places(path).filter(|index| *index > 0) {
        let Some(file) = open(&rotated(path, index))? else {
            continue;
        };
        let found = inode_of(&file)?;
        if Some(found) == inode {
            // The ones before it are newer still.
            files.clear();
        } else if met.insert(found) {
            // Else it was met before, and has moved on since.
            files.push(file);
        }
    }
    files.reverse();
    files.extend(newest);
    Ok(files)
}

/// The places that files of a log have, 0 the newest. One may be empty for a moment, while the files move on.
fn places(path: &Path) -> impl Iterator<Item = u32> {
    let mut gap = false;
    (0..=MOST_ROTATED)
        .map_while(move |index| {
            let there = place(path, index).exists();
            let more = there || !gap;
            gap = !there;
            more.then_some((index, there))
        })
        .filter_map(|(index, there)| there.then_some(index))
}

fn place(path: &Path, index: u32) -> PathBuf {
    match index {
        0 => path.to_owned(),
        index => rotated(path, index),
    }
}

/// Where the file with this inode lies now.
fn place_of(path: &Path, inode: u64) -> Option<u32> {
    places(path).find(|index| {
        std::fs::metadata(place(path, *index)).is_ok_and(|found| found.ino() == inode)
    })
}

/// The file that comes after the one with this inode, which was rotated; the oldest there is where that is gone already.
/// `None` while the files move on.
fn file_after(path: &Path, inode: u64) -> io::Result<Option<File>> {
    let at = place_of(path, inode);
    let next = match at {
        Some(0) => return Ok(None),
        Some(at) => at - 1,
        None => places(path).last().unwrap_or(0),
    };
    let file = open(&place(path, next))?;
    let still = place_of(path, inode) == at;
    Ok(file.filter(|_| still))
}

fn read_record(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    reader.take(MAX_RECORD).read_until(b'\n', line)?;
    Ok(line.last() == Some(&b'\n'))
}

/// Reads a whole log into `send`; answers the last file, at its end, unless the receiver is gone or `until` is past.
fn read_past(
    files: Vec<File>,
    choice: &Choice,
    mut send: impl FnMut(Bytes) -> bool,
) -> io::Result<Option<(BufReader<File>, Vec<u8>)>> {
    let mut last = None;
    let mut line = Vec::new();
    let mut kept: VecDeque<Bytes> = VecDeque::new();
    let mut over = false;
    for file in files {
        let mut reader = BufReader::with_capacity(64 << 10, file);
        while !over && read_record(&mut reader, &mut line)? {
            match choice.take(&line) {
                Chosen::Skipped => {}
                Chosen::Over => over = true,
                Chosen::Out(bytes) => match choice.options.tail {
                    Some(0) => {}
                    Some(tail) => {
                        if kept.len() == tail {
                            kept.pop_front();
                        }
                        kept.push_back(bytes);
                    }
                    None if !send(bytes) => return Ok(None),
                    None => {}
                },
            }
        }
        last = Some((reader, if over { Vec::new() } else { line.clone() }));
    }
    for bytes in kept {
        if !send(bytes) {
            return Ok(None);
        }
    }
    Ok(if over { None } else { last })
}

impl Engine {
    /// Its log.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where its log driver keeps nothing.
    pub async fn logs(
        self: &Arc<Self>,
        container: &str,
        options: LogsOptions,
    ) -> Result<LogStream> {
        let container = self.inventory.find(container)?;
        let (tty, kind) = {
            let record = container.record();
            (record.config.tty, record.host.log_config.kind.clone())
        };
        if kind == "none" {
            return Err(Error::Unsupported(
                "configured logging driver does not support reading".into(),
            ));
        }
        if !options.stdout && !options.stderr {
            return Err(Error::Invalid(
                "Bad parameters: you must choose at least one stream".into(),
            ));
        }
        let follow = options.follow;
        let choice = Choice { options, tty };
        let (sender, receiver) = mpsc::channel(64);
        let path = container.log_path();
        // Threads of their own: those who follow stay for as long as they like, and the reactor's are counted.
        aside("berth-logs", move || {
            let alive = follow.then_some(container);
            if let Err(error) = stream(&path, &choice, alive.as_deref(), &sender) {
                let _ = sender.blocking_send(Err(error));
            }
        })?;
        let stream = futures_util::stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|item| (item, receiver))
        });
        Ok(LogStream {
            tty,
            stream: stream.boxed(),
        })
    }

    /// What the log holds up to a point in time, in one piece.
    pub(crate) fn log_until(&self, container: &Container, options: LogsOptions) -> Result<Bytes> {
        let tty = container.record().config.tty;
        let mut all = BytesMut::new();
        let files = open_all(&container.log_path()).map_err(Error::io("reading the log"))?;
        read_past(files, &Choice { options, tty }, |bytes| {
            all.put_slice(&bytes);
            true
        })
        .map_err(Error::io("reading the log"))?;
        Ok(all.freeze())
    }
}

/// Runs work that waits for a client on a thread with a small stack.
///
/// # Errors
/// Where the host has no room for a thread.
pub(crate) fn aside(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = std::thread::Builder::new()
        .name(name.into())
        .stack_size(256 << 10);
    thread
        .spawn(work)
        .map(drop)
        .map_err(Error::io("starting a thread"))
}

type Sender = mpsc::Sender<io::Result<Bytes>>;

fn stream(
    path: &Path,
    choice: &Choice,
    follow: Option<&Container>,
    sender: &Sender,
) -> io::Result<()> {
    // Looked at before reading: what is written after the end of this is not missed.
    let mut lives = follow.is_some_and(will_write);
    let send = |bytes: Bytes| sender.blocking_send(Ok(bytes)).is_ok();
    let Some((mut reader, mut line)) = read_past(open_all(path)?, choice, send)? else {
        // No file yet: a container that has not been started.
        return match follow {
            Some(container) if !path.exists() => wait_for_file(path, choice, container, sender),
            _ => Ok(()),
        };
    };
    let Some(container) = follow else {
        return Ok(());
    };
    let mut inode = inode_of(reader.get_ref())?;
    // Another file has taken the name of this one.
    let mut left = false;
    loop {
        let before = line.len();
        (&mut reader)
            .take(MAX_RECORD)
            .read_until(b'\n', &mut line)?;
        if line.last() == Some(&b'\n') {
            match choice.take(&line) {
                Chosen::Skipped => {}
                Chosen::Over => return Ok(()),
                Chosen::Out(bytes) => {
                    if !send(bytes) {
                        return Ok(());
                    }
                }
            }
            line.clear();
            continue;
        }
        if line.len() > before {
            continue;
        }
        // At the end: of this file, where another has taken its name, or of what there is.
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.ino() != inode => {
                // It ended before that, so that its last words are there by now.
                if !std::mem::replace(&mut left, true) {
                    continue;
                }
                if let Some(next) = file_after(path, inode)? {
                    reader = BufReader::with_capacity(64 << 10, next);
                    inode = inode_of(reader.get_ref())?;
                    left = false;
                    line.clear();
                }
                continue;
            }
            Ok(metadata) if metadata.len() < reader.stream_position()? => {
                reader.seek(SeekFrom::Start(0))?;
                continue;
            }
            Ok(_) => {}
            Err(_) if path.parent().is_some_and(Path::exists) => {}
            Err(_) => return Ok(()),
        }
        if !lives {
            return Ok(());
        }
        if sender.is_closed() {
            return Ok(());
        }
        lives = will_write(container);
        if let Some(until) = choice.options.until
            && Timestamp::now() > until
        {
            return Ok(());
        }
        if lives {
            std::thread::sleep(POLL);
        }
    }
}

/// Whether more may come from it without anybody's doing.
fn will_write(container: &Container) -> bool {
    let phase = container.phase();
    phase.lives() || phase == Phase::Restarting
}

fn wait_for_file(
    path: &Path,
    choice: &Choice,
    container: &Container,
    sender: &Sender,
) -> io::Result<()> {
    while !sender.is_closed() {
        let lives = will_write(container);
        if path.exists() {
            return stream(path, choice, Some(container), sender);
        }
        if !lives {
            return Ok(());
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

fn inode_of(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(directory: &Path, max_size: u64) -> PathBuf {
        let path = directory.join("log");
        let record = LogRecord {
            path: Some(path.clone()),
            max_size,
            max_files: 100,
            ..Default::default()
        };
        let mut log = crate::keeper::log::JsonLog::open(&record).unwrap().unwrap();
        for number in 0..20 {
            log.write(
                crate::keeper::log::Source::Stdout,
                format!("line {number}\n").as_bytes(),
            );
        }
        path
    }

    fn texts(path: &Path, options: LogsOptions) -> Vec<String> {
        let mut lines = Vec::new();
        let choice = Choice { options, tty: true };
        read_past(open_all(path).unwrap(), &choice, |bytes| {
            lines.push(String::from_utf8(bytes.to_vec()).unwrap());
            true
        })
        .unwrap();
        lines
    }

    #[test]
    fn the_tail_reaches_over_rotated_files() {
        let directory = tempfile::tempdir().unwrap();
        let path = written(directory.path(), 200);
        let options = LogsOptions {
            stdout: true,
            tail: Some(5),
            ..Default::default()
        };
        assert_eq!(
            texts(&path, options),
            [
                "line 15\n",
                "line 16\n",
                "line 17\n",
                "line 18\n",
                "line 19\n"
            ]
        );
        assert_eq!(
            texts(
                &path,
                LogsOptions {
                    stdout: true,
                    ..Default::default()
                }
            )
            .len(),
            20
        );
    }

    #[test]
    fn a_torn_record_is_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = written(directory.path(), 0);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend_from_slice(b"{\"log\":\"half");
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(
            texts(
                &path,
                LogsOptions {
                    stdout: true,
                    ..Default::default()
                }
            )
            .len(),
            20
        );
    }

    #[test]
    fn times_bound_what_is_shown() {
        let directory = tempfile::tempdir().unwrap();
        let path = written(directory.path(), 0);
        let future = Timestamp::now() + Duration::from_secs(5);
        let options = LogsOptions {
            stdout: true,
            since: Some(future),
            ..Default::default()
        };
        assert!(texts(&path, options).is_empty());
        let options = LogsOptions {
            stdout: true,
            until: Some(Timestamp::UNIX_EPOCH),
            ..Default::default()
        };
        assert!(texts(&path, options).is_empty());
    }
}
