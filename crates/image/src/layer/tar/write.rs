//! Writing: ustar, with pax records where it has no words.

use std::io::{self, Write};

use super::{BLOCK, Entry, EntryKind, pad};

/// Writes a tar: ustar, with pax records where ustar has no words. The same entries give the same bytes.
pub struct TarWriter<W> {
    sink: W,
    left: u64,
    padding: u64,
}

impl<W: Write> TarWriter<W> {
    /// Writes to `sink`, which should be buffered.
    pub fn new(sink: W) -> TarWriter<W> {
        TarWriter {
            sink,
            left: 0,
            padding: 0,
        }
    }

    /// Begins an entry; `entry.size` bytes of content must follow through [`Write`].
    ///
    /// # Errors
    /// `InvalidInput` where the content of the one before is not complete.
    pub fn entry(&mut self, entry: &Entry) -> io::Result<()> {
        if self.left > 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the entry before lacks content",
            ));
        }
        self.sink.write_all(&[0; BLOCK][..self.padding as usize])?;
        let mut pax: Vec<u8> = Vec::new();
        let mut record = |key: &[u8], value: &[u8]| {
            // The length counts its own digits.
            let body = key.len() + value.len() + 3;
            let mut length = body + 1;
            while body + length.to_string().len() != length {
                length = body + length.to_string().len();
            }
            pax.extend_from_slice(length.to_string().as_bytes());
            pax.push(b' ');
            pax.extend_from_slice(key);
            pax.push(b'=');
            pax.extend_from_slice(value);
            pax.push(b'\n');
        };
        let mut header = [0u8; BLOCK];
        let mut path = entry.path.clone();
        if entry.kind == EntryKind::Directory && !path.ends_with(b"/") {
            path.push(b'/');
        }
        if path.len() <= 100 {
            header[..path.len()].copy_from_slice(&path);
        } else if let Some(slash) = split_prefix(&path) {
            header[345..345 + slash].copy_from_slice(&path[..slash]);
            header[..path.len() - slash - 1].copy_from_slice(&path[slash + 1..]);
        } else {
            record(b"path", &path);
            header[..100].copy_from_slice(&path[..100]);
        }
        if entry.link.len() <= 100 {
            header[157..157 + entry.link.len()].copy_from_slice(&entry.link);
        } else {
            record(b"linkpath", &entry.link);
            header[157..257].copy_from_slice(&entry.link[..100]);
        }
        octal(&mut header[100..108], u64::from(entry.mode & 0o7777));
        if !octal(&mut header[108..116], u64::from(entry.uid)) {
            record(b"uid", entry.uid.to_string().as_bytes());
        }
        if !octal(&mut header[116..124], u64::from(entry.gid)) {
            record(b"gid", entry.gid.to_string().as_bytes());
        }
        let size = if entry.kind == EntryKind::File {
            entry.size
        } else {
            0
        };
        if !octal(&mut header[124..136], size) {
            record(b"size", size.to_string().as_bytes());
        }
        let (seconds, nanoseconds) = entry.mtime;
        let fits = seconds >= 0 && octal(&mut header[136..148], seconds as u64);
        if !fits {
            octal(&mut header[136..148], 0);
        }
        if !fits || nanoseconds > 0 {
            record(b"mtime", pax_time_text(seconds, nanoseconds).as_bytes());
        }
        for (name, value) in &entry.xattrs {
            record(&[b"SCHILY.xattr.", &name[..]].concat(), value);
        }
        header[156] = match entry.kind {
            EntryKind::File => b'0',
            EntryKind::HardLink => b'1',
            EntryKind::Symlink => b'2',
            EntryKind::Char => b'3',
            EntryKind::Block => b'4',
            EntryKind::Directory => b'5',
            EntryKind::Fifo => b'6',
        };
        header[257..265].copy_from_slice(b"ustar\x0000");
        if matches!(entry.kind, EntryKind::Char | EntryKind::Block) {
            octal(&mut header[329..337], u64::from(entry.major));
            octal(&mut header[337..345], u64::from(entry.minor));
        }
        if !pax.is_empty() {
            let mut extended = [0u8; BLOCK];
            extended[..11].copy_from_slice(b"PaxHeaders/");
            octal(&mut extended[100..108], 0o644);
            octal(&mut extended[108..116], 0);
            octal(&mut extended[116..124], 0);
            octal(&mut extended[124..136], pax.len() as u64);
            octal(&mut extended[136..148], 0);
            extended[156] = b'x';
            extended[257..265].copy_from_slice(b"ustar\x0000");
            seal(&mut extended);
            self.sink.write_all(&extended)?;
            self.sink.write_all(&pax)?;
            self.sink
                .write_all(&[0; BLOCK][..pad(pax.len() as u64) as usize])?;
        }
        seal(&mut header);
        self.sink.write_all(&header)?;
        self.left = size;
        self.padding = pad(size);
        Ok(())
    }

    /// Writes a whole file entry.
    pub fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
        let mut entry = Entry::new(EntryKind::File, path, mode);
        entry.size = bytes.len() as u64;
        self.entry(&entry)?;
        self.write_all(bytes)
    }

    /// Ends the archive.
    pub fn finish(mut self) -> io::Result<W> {
        if self.left > 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the last entry lacks content",
            ));
        }
        self.sink.write_all(&[0; BLOCK][..self.padding as usize])?;
        self.sink.write_all(&[0; 2 * BLOCK])?;
        self.sink.flush()?;
        Ok(self.sink)
    }
}

impl<W: Write> Write for TarWriter<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let part = (buffer.len() as u64).min(self.left) as usize;
        if part == 0 && !buffer.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "more content than the entry said",
            ));
        }
        let written = self.sink.write(&buffer[..part])?;
        self.left -= written as u64;
        Ok(written)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

fn split_prefix(path: &[u8]) -> Option<usize> {
    (0..path.len().min(156)).rev().find(|i| {
        path[*i] == b'/' && *i > 0 && *i <= 155 && (1..=100).contains(&(path.len() - i - 1))
    })
}

/// Writes octal digits and a NUL; false where they do not fit, and then zeros.
pub(super) fn octal(field: &mut [u8], value: u64) -> bool {
    let width = field.len() - 1;
    let text = format!("{value:0width$o}");
    let fits = text.len() <= width;
    let text = if fits { text } else { "0".repeat(width) };
    field[..width].copy_from_slice(text.as_bytes());
    fits
}

pub(super) fn seal(header: &mut [u8; BLOCK]) {
    header[148..156].fill(b' ');
    let sum: u64 = header.iter().map(|b| u64::from(*b)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}

fn pax_time_text(seconds: i64, nanoseconds: u32) -> String {
    if seconds < 0 && nanoseconds > 0 {
        // -1.25 is second -2 and 750,000,000 ns.
        let (whole, part) = (seconds + 1, 1_000_000_000 - nanoseconds);
        let sign = if whole == 0 { "-" } else { "" };
        return format!("{sign}{whole}.{part:09}");
    }
    if nanoseconds == 0 {
        format!("{seconds}")
    } else {
        format!("{seconds}.{nanoseconds:09}")
    }
}
