//! Docker's json-file log: one JSON object per line of output, rotated by size.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::keeper::protocol::LogRecord;

/// The longest piece of a line in one record, as dockerd cuts them.
const MAX_LINE: usize = 16 * 1024;

/// Which stream output came from. The number is that of the multiplexed frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Stdout = 1,
    Stderr = 2,
}

/// A log being written.
pub struct JsonLog {
    path: PathBuf,
    file: File,
    size: u64,
    max_size: u64,
    max_files: u32,
    /// `,"attrs":{…}` or nothing.
    attributes: String,
    partial: [Vec<u8>; 2],
    line: Vec<u8>,
}

impl JsonLog {
    /// Opens (and appends to) the log of a record; `None` where it has none.
    pub fn open(record: &LogRecord) -> io::Result<Option<JsonLog>> {
        let Some(path) = &record.path else {
            return Ok(None);
        };
        let file = append(path)?;
        let size = file.metadata()?.len();
        Ok(Some(JsonLog {
            path: path.clone(),
            file,
            size,
            max_size: record.max_size,
            max_files: record.max_files.max(1),
            attributes: attributes(&record.attributes),
            partial: Default::default(),
            line: Vec::new(),
        }))
    }

    /// Takes output; whole lines are written at once, the rest when it is whole or long.
    pub fn write(&mut self, source: Source, mut bytes: &[u8]) {
        let now = base::time::now_rfc3339();
        let slot = source as usize - 1;
        let mut records = std::mem::take(&mut self.line);
        records.clear();
        while !bytes.is_empty() {
            let room = MAX_LINE - self.partial[slot].len();
            let (take, whole) = match bytes.iter().take(room).position(|b| *b == b'\n') {
                Some(at) => (at + 1, true),
                None if bytes.len() >= room => (room, true),
                None => (bytes.len(), false),
            };
            if whole && self.partial[slot].is_empty() {
                record(&mut records, &bytes[..take], source, &self.attributes, &now);
            } else {
                self.partial[slot].extend_from_slice(&bytes[..take]);
                if whole {
                    record(
                        &mut records,
                        &self.partial[slot],
                        source,
                        &self.attributes,
                        &now,
                    );
                    self.partial[slot].clear();
                }
            }
            bytes = &bytes[take..];
        }
        self.append(&records);
        self.line = records;
    }

    /// Writes what never became a whole line.
    pub fn finish(&mut self) {
        let now = base::time::now_rfc3339();
        let mut records = Vec::new();
        for (slot, source) in [Source::Stdout, Source::Stderr].into_iter().enumerate() {
            if !self.partial[slot].is_empty() {
                record(
                    &mut records,
                    &self.partial[slot],
                    source,
                    &self.attributes,
                    &now,
                );
                self.partial[slot] = Vec::new();
            }
        }
        self.append(&records);
    }

    // A full disk must not stop a container: what cannot be written is lost, the next is tried again.
    fn append(&mut self, mut records: &[u8]) {
        while !records.is_empty() {
            if self.max_size > 0 && self.size >= self.max_size {
                let _ = self.rotate();
            }
            let fits = self.fitting(records);
            let (now, later) = records.split_at(fits);
            if self.file.write_all(now).is_ok() {
                self.size += now.len() as u64;
            }
            records = later;
        }
    }

    /// How many bytes of these whole records go into this file: up to the one that reaches the limit, as dockerd does.
    fn fitting(&self, records: &[u8]) -> usize {
        let room = match self.max_size.saturating_sub(self.size) {
            _ if self.max_size == 0 => return records.len(),
            room => usize::try_from(room).unwrap_or(usize::MAX),
        };
        if room >= records.len() {
            return records.len();
        }
        let from = room.saturating_sub(1);
        let end = records[from..].iter().position(|byte| *byte == b'\n');
        end.map_or(records.len(), |end| from + end + 1)
    }

    fn rotate(&mut self) -> io::Result<()> {
        if self.path.exists() {
            self.make_room()?;
        }
        // Else that has been done, and no new file could be had then.
        self.file = append(&self.path)?;
        self.size = 0;
        Ok(())
    }

    /// Gives every file the next name; the oldest goes.
    fn make_room(&self) -> io::Result<()> {
        for index in (1..self.max_files.saturating_sub(1)).rev() {
            match fs::rename(rotated(&self.path, index), rotated(&self.path, index + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        if self.max_files > 1 {
            fs::rename(&self.path, rotated(&self.path, 1))?;
        } else {
            // A new file rather than a truncated one: a reader that follows sees where the old one ended.
            fs::remove_file(&self.path)?;
        }
        Ok(())
    }
}

/// The path of the `index`-th rotated file; 1 is the newest.
pub fn rotated(path: &Path, index: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{index}"));
    name.into()
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        .open(path)
}

fn attributes(map: &BTreeMap<String, String>) -> String {
    if map.is_empty() {
        return String::new();
    }
    format!(
        ",\"attrs\":{}",
        serde_json::to_string(map).unwrap_or_else(|_| "{}".into())
    )
}

fn record(out: &mut Vec<u8>, line: &[u8], source: Source, attributes: &str, now: &str) {
    out.extend_from_slice(b"{\"log\":\"");
    for chunk in line.utf8_chunks() {
        escape(out, chunk.valid());
        if !chunk.invalid().is_empty() {
            out.extend_from_slice(b"\\ufffd");
        }
    }
    out.extend_from_slice(match source {
        Source::Stdout => b"\",\"stream\":\"stdout\"",
        Source::Stderr => b"\",\"stream\":\"stderr\"",
    });
    out.extend_from_slice(attributes.as_bytes());
    out.extend_from_slice(b",\"time\":\"");
    out.extend_from_slice(now.as_bytes());
    out.extend_from_slice(b"\"}\n");
}

fn escape(out: &mut Vec<u8>, text: &str) {
    for byte in text.bytes() {
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            0..0x20 | 0x7f => out.extend_from_slice(format!("\\u{byte:04x}").as_bytes()),
            _ => out.push(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn open(directory: &Path, max_size: u64, max_files: u32) -> JsonLog {
        let path = Some(directory.join("c-json.log"));
        JsonLog::open(&LogRecord {
            path,
            max_size,
            max_files,
            ..Default::default()
        })
        .unwrap()
        .unwrap()
    }

    fn lines(directory: &Path) -> Vec<serde_json::Value> {
        fs::read_to_string(directory.join("c-json.log"))
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[test]
    fn lines_are_cut_at_newlines_and_the_rest_waits_for_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = open(directory.path(), 0, 1);
        log.write(Source::Stdout, b"one\ntw");
        log.write(Source::Stderr, b"err\n");
        log.write(Source::Stdout, b"o\nend \xff\x01");
        log.finish();
        let texts: Vec<String> = lines(directory.path())
            .iter()
            .map(|l| l["log"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(texts, ["one\n", "err\n", "two\n", "end \u{fffd}\u{1}"]);
        assert_eq!(lines(directory.path())[1]["stream"], "stderr");
    }

    #[test]
    fn rotation_keeps_as_many_files_as_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = open(directory.path(), 200, 3);
        for _ in 0..20 {
            log.write(Source::Stdout, b"a line of some length\n");
        }
        let mut names: Vec<_> = fs::read_dir(directory.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["c-json.log", "c-json.log.1", "c-json.log.2"]);
    }

    #[test]
    fn a_burst_that_comes_in_one_piece_is_rotated_too() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = open(directory.path(), 500, 3);
        let burst: String = (0..200).map(|n| format!("line {n}\n")).collect();
        log.write(Source::Stdout, burst.as_bytes());
        for name in ["c-json.log", "c-json.log.1", "c-json.log.2"] {
            let text = fs::read_to_string(directory.path().join(name)).unwrap();
            assert!(text.len() < 700, "{name}: {}", text.len());
            for line in text.lines() {
                serde_json::from_str::<serde_json::Value>(line).unwrap();
            }
        }
        assert_eq!(lines(directory.path()).last().unwrap()["log"], "line 199\n");
    }

    proptest! {
        #[test]
        fn any_output_is_logged_as_json_that_says_it_again(bytes in proptest::collection::vec(any::<u8>(), 0..40_000)) {
            let directory = tempfile::tempdir().unwrap();
            let mut log = open(directory.path(), 0, 1);
            log.write(Source::Stdout, &bytes);
            log.finish();
            let all: String = lines(directory.path()).iter().map(|l| l["log"].as_str().unwrap().to_owned()).collect();
            let ascii: Vec<u8> = bytes.iter().copied().filter(u8::is_ascii).collect();
            let kept: Vec<u8> = all.bytes().filter(u8::is_ascii).collect();
            prop_assert_eq!(kept, ascii);
        }
    }
}
