//! The tar format, read and written: POSIX ustar and pax, GNU long names and base-256 numbers, and GNU's sparse
//! files of versions 0.0, 0.1 and 1.0 in pax and of the old header (POSIX.1-2024 pax; GNU tar manual, "Tar
//! Internals").
//!
//! The reader holds at most [`MAX_META`] bytes of an entry's own description, whatever the archive says.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

/// The size of everything in a tar.
pub const BLOCK: usize = 512;
/// The most that one entry's pax records, long name or sparse map may take.
pub const MAX_META: u64 = 1 << 20;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    File,
    HardLink,
    Symlink,
    Char,
    Block,
    Directory,
    Fifo,
}

/// One entry's description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub kind: EntryKind,
    /// As written: may be absolute, may hold `..`.
    pub path: Vec<u8>,
    /// The target of a link.
    pub link: Vec<u8>,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Bytes of content as the file has them.
    pub size: u64,
    /// Seconds and nanoseconds since 1970.
    pub mtime: (i64, u32),
    pub major: u32,
    pub minor: u32,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Offset and length of what a sparse file really holds.
    pub sparse: Option<Vec<(u64, u64)>>,
}

impl Entry {
    /// An entry owned by root, of the year 1970, without content.
    pub fn new(kind: EntryKind, path: impl Into<Vec<u8>>, mode: u32) -> Entry {
        Entry {
            kind,
            path: path.into(),
            link: Vec::new(),
            mode,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: (0, 0),
            major: 0,
            minor: 0,
            xattrs: BTreeMap::new(),
            sparse: None,
        }
    }
}

fn bad(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

/// Reads a tar, entry after entry.
pub struct TarReader<R> {
    source: R,
    /// Content of the current entry not yet read, and the padding after it.
    left: u64,
    padding: u64,
    global: BTreeMap<Vec<u8>, Vec<u8>>,
    ended: bool,
}

impl<R: Read> TarReader<R> {
    /// Reads from `source`, which should be buffered.
    pub fn new(source: R) -> TarReader<R> {
        TarReader {
            source,
            left: 0,
            padding: 0,
            global: BTreeMap::new(),
            ended: false,
        }
    }

    /// The source, wherever it stands.
    pub fn into_inner(self) -> R {
        self.source
    }

    /// The next entry; what of the last one's content was not read is skipped.
    ///
    /// # Errors
    /// `InvalidData` where this is no tar, `UnexpectedEof` where it is cut.
    pub fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        if self.ended {
            return Ok(None);
        }
        let mut pax: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        let mut sparse_chunks: Vec<(u64, u64)> = Vec::new();
        let mut long_path: Option<Vec<u8>> = None;
        let mut long_link: Option<Vec<u8>> = None;
        let mut headers = 0;
        loop {
            self.skip_content()?;
            let mut header = [0u8; BLOCK];
            if !read_block(&mut self.source, &mut header)? {
                // An archive that ends without its two zero blocks is common; one cut inside an entry is not.
                self.ended = true;
                return if headers == 0 {
                    Ok(None)
                } else {
                    Err(bad("it ends after an extended header"))
                };
            }
            if header.iter().all(|b| *b == 0) {
                self.ended = true;
                return if headers == 0 {
                    Ok(None)
                } else {
                    Err(bad("it ends after an extended header"))
                };
            }
            verify_checksum(&header)?;
            headers += 1;
            if headers > 64 {
                return Err(bad("too many extended headers before one entry"));
            }
            let size =
                number(&header[124..136]).ok_or_else(|| bad("a header's size is no number"))?;
            let flag = header[156];
            match flag {
                b'x' | b'g' => {
                    let records = self.read_meta(size)?;
                    parse_pax(&records, |key, value| {
                        match key {
                            b"GNU.sparse.offset" => {
                                sparse_chunks.push((decimal(value)?, 0));
                            }
                            b"GNU.sparse.numbytes" => {
                                let last = sparse_chunks
                                    .last_mut()
                                    .ok_or_else(|| bad("a sparse length without offset"))?;
                                last.1 = decimal(value)?;
                            }
                            _ => {
                                let table = if flag == b'g' {
                                    &mut self.global
                                } else {
                                    &mut pax
                                };
                                table.insert(key.to_vec(), value.to_vec());
                            }
                        }
                        Ok(())
                    })?;
                }
                b'L' => long_path = Some(until_nul(self.read_meta(size)?)),
                b'K' => long_link = Some(until_nul(self.read_meta(size)?)),
                // GNU volume labels and Solaris extended attributes say nothing about files.
                b'V' | b'X' | b'M' | b'N' => {
                    self.left = size;
                    self.padding = pad(size);
                }
                _ => {
                    return self
                        .entry(
                            &header,
                            flag,
                            size,
                            pax,
                            sparse_chunks,
                            long_path,
                            long_link,
                        )
                        .map(Some);
                }
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn entry(
        &mut self,
        header: &[u8; BLOCK],
        flag: u8,
        size: u64,
        pax: BTreeMap<Vec<u8>, Vec<u8>>,
        chunks: Vec<(u64, u64)>,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> io::Result<Entry> {
        let field = |range: std::ops::Range<usize>| number(&header[range]);
        let ustar = &header[257..262] == b"ustar";
        let gnu = &header[257..265] == b"ustar  \0";
        let mut path = until_nul(header[0..100].to_vec());
        if ustar && !gnu && header[345] != 0 {
            let mut prefix = until_nul(header[345..500].to_vec());
            prefix.push(b'/');
            prefix.extend_from_slice(&path);
            path = prefix;
        }
        let mut entry = Entry {
            kind: match flag {
                0 | b'0' | b'7' | b'S' => EntryKind::File,
                b'1' => EntryKind::HardLink,
                b'2' => EntryKind::Symlink,
                b'3' => EntryKind::Char,
                b'4' => EntryKind::Block,
                b'5' => EntryKind::Directory,
                b'6' => EntryKind::Fifo,
                other => return Err(bad(format!("an entry of unknown type {:?}", other as char))),
            },
            path: long_path.unwrap_or(path),
            link: long_link.unwrap_or_else(|| until_nul(header[157..257].to_vec())),
            mode: field(100..108).unwrap_or(0) as u32 & 0o7777,
            uid: field(108..116)
                .and_then(|v| u32::try_from(v).ok())
                .unwrap_or(0),
            gid: field(116..124)
                .and_then(|v| u32::try_from(v).ok())
                .unwrap_or(0),
            size,
            mtime: (signed(&header[136..148]).unwrap_or(0), 0),
            major: if ustar {
                field(329..337).unwrap_or(0) as u32
            } else {
                0
            },
            minor: if ustar {
                field(337..345).unwrap_or(0) as u32
            } else {
                0
            },
            xattrs: BTreeMap::new(),
            sparse: None,
        };
        // In the oldest tars a directory is a file whose name ends with a slash.
        if entry.kind == EntryKind::File && flag != b'S' && entry.path.ends_with(b"/") {
            entry.kind = EntryKind::Directory;
        }
        let (mut stored, mut real_size, mut sparse_major, mut sparse_map) =
            (size, None, None, None);
        let records = self
            .global
            .iter()
            .filter(|(key, _)| !pax.contains_key(*key))
            .chain(pax.iter());
        for (key, value) in records {
            match key.as_slice() {
                b"path" => entry.path = value.clone(),
                b"GNU.sparse.name" => {}
                b"linkpath" => entry.link = value.clone(),
                b"size" => stored = decimal(value)?,
                b"uid" => {
                    entry.uid = decimal(value)?
                        .try_into()
                        .map_err(|_| bad("a uid past 32 bits"))?
                }
                b"gid" => {
                    entry.gid = decimal(value)?
                        .try_into()
                        .map_err(|_| bad("a gid past 32 bits"))?
                }
                b"mtime" => {
                    entry.mtime =
                        pax_time(value).ok_or_else(|| bad("an mtime that is no number"))?
                }
                b"GNU.sparse.realsize" | b"GNU.sparse.size" => real_size = Some(decimal(value)?),
                b"GNU.sparse.major" => sparse_major = Some(decimal(value)?),
                b"GNU.sparse.map" => sparse_map = Some(value.clone()),
                _ => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        entry.xattrs.insert(name.to_vec(), value.clone());
                    }
                }
            }
        }
        if let Some(name) = pax.get(&b"GNU.sparse.name"[..]) {
            entry.path = name.clone();
        }
        let has_content = entry.kind == EntryKind::File;
        if !has_content {
            // Some writers put a size on links and directories without any content behind it.
            stored = match entry.kind {
                EntryKind::HardLink | EntryKind::Symlink | EntryKind::Directory => 0,
                _ => 0,
            };
        }
        entry.size = stored;
        self.left = stored;
        self.padding = pad(stored);
        if has_content {
            if flag == b'S' {
                let (map, real) = self.old_sparse(header)?;
                entry.sparse = Some(map);
                entry.size = real;
            } else if sparse_major == Some(1) {
                let map = self.sparse_one()?;
                entry.size = real_size.unwrap_or(stored);
                entry.sparse = Some(map);
            } else if let Some(text) = sparse_map {
                let numbers: Vec<u64> = text
                    .split(|b| *b == b',')
                    .map(decimal)
                    .collect::<io::Result<Vec<u64>>>()?;
                entry.sparse = Some(numbers.chunks_exact(2).map(|c| (c[0], c[1])).collect());
                entry.size = real_size.unwrap_or(stored);
            } else if !chunks.is_empty() {
                entry.sparse = Some(chunks);
                entry.size = real_size.unwrap_or(stored);
            }
            if let Some(map) = &entry.sparse {
                self.check_sparse(map, entry.size)?;
            }
        }
        Ok(entry)
    }

    fn check_sparse(&self, map: &[(u64, u64)], size: u64) -> io::Result<()> {
        let (mut end, mut held) = (0u64, 0u64);
        for (offset, length) in map {
            if *offset < end {
                return Err(bad("a sparse map that goes backwards"));
            }
            end = offset
                .checked_add(*length)
                .filter(|e| *e <= size)
                .ok_or_else(|| bad("a sparse map past the file"))?;
            held += length;
        }
        if held != self.left {
            Err(bad("a sparse map that does not fit the content"))
        } else {
            Ok(())
        }
    }

    fn old_sparse(&mut self, header: &[u8; BLOCK]) -> io::Result<(Vec<(u64, u64)>, u64)> {
        let real =
            number(&header[483..495]).ok_or_else(|| bad("a sparse file without its size"))?;
        let mut map = Vec::new();
        let mut take = |table: &[u8]| -> io::Result<()> {
            for pair in table.chunks_exact(24) {
                if pair[0] == 0 {
                    break;
                }
                let offset = number(&pair[..12]).ok_or_else(|| bad("a broken sparse map"))?;
                let length = number(&pair[12..]).ok_or_else(|| bad("a broken sparse map"))?;
                if length > 0 {
                    map.push((offset, length));
                }
            }
            Ok(())
        };
        take(&header[386..482])?;
        let mut more = header[482] != 0;
        let mut blocks = 0;
        while more {
            let mut block = [0u8; BLOCK];
            self.source.read_exact(&mut block)?;
            take(&block[..504])?;
            more = block[504] != 0;
            blocks += 1;
            if blocks * BLOCK as u64 > MAX_META {
                return Err(bad("a sparse map without end"));
            }
        }
        Ok((map, real))
    }

    /// The map at the head of the content: decimal numbers, a line each, padded to a block.
    fn sparse_one(&mut self) -> io::Result<Vec<(u64, u64)>> {
        let mut line = Vec::new();
        let (mut numbers, mut wanted, mut taken) = (Vec::new(), None, 0u64);
        while wanted.is_none_or(|n: u64| (numbers.len() as u64) < n) {
            let mut block = [0u8; BLOCK];
            if self.left < BLOCK as u64 {
                return Err(bad("a sparse map longer than the content"));
            }
            self.source.read_exact(&mut block)?;
            self.left -= BLOCK as u64;
            taken += BLOCK as u64;
            if taken > MAX_META {
                return Err(bad("a sparse map without end"));
            }
            for byte in block {
                if byte != b'\n' {
                    line.push(byte);
                    continue;
                }
                if wanted.is_some_and(|n| numbers.len() as u64 >= n) {
                    break;
                }
                let value = decimal(&line)?;
                line.clear();
                match wanted {
                    None => {
                        wanted = Some(
                            value
                                .checked_mul(2)
                                .ok_or_else(|| bad("a broken sparse map"))?,
                        )
                    }
                    Some(_) => numbers.push(value),
                }
            }
        }
        Ok(numbers
            .chunks_exact(2)
            .map(|c| (c[0], c[1]))
            .filter(|c| c.1 > 0)
            .collect())
    }

    fn read_meta(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > MAX_META {
            return Err(bad(format!(
                "an extended header of {size} bytes, past the limit of {MAX_META}"
            )));
        }
        let mut bytes = vec![0; size as usize];
        self.source.read_exact(&mut bytes)?;
        self.left = 0;
        self.padding = pad(size);
        Ok(bytes)
    }

    fn skip_content(&mut self) -> io::Result<()> {
        let mut skip = self.left + self.padding;
        let mut sink = [0u8; 4096];
        while skip > 0 {
            let part = skip.min(sink.len() as u64) as usize;
            self.source.read_exact(&mut sink[..part])?;
            skip -= part as u64;
        }
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    /// Reads the source to its end, so that a hash over it sees every byte; returns how many were left.
    pub fn drain(&mut self) -> io::Result<u64> {
        self.ended = true;
        io::copy(&mut self.source, &mut io::sink())
    }
}

impl<R: Read> Read for TarReader<R> {
    /// The stored content of the current entry (of a sparse file: its pieces one after the other).
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let part = (buffer.len() as u64).min(self.left) as usize;
        if part == 0 {
            return Ok(0);
        }
        let read = self.source.read(&mut buffer[..part])?;
        if read == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the archive is cut inside an entry",
            ));
        }
        self.left -= read as u64;
        Ok(read)
    }
}

fn read_block(source: &mut impl Read, block: &mut [u8; BLOCK]) -> io::Result<bool> {
    let mut filled = 0;
    while filled < BLOCK {
        match source.read(&mut block[filled..]) {
            Ok(0) if filled == 0 => return Ok(false),
            Ok(0) => {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the archive is cut inside a header",
                ));
            }
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

const fn pad(size: u64) -> u64 {
    (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|b| *b == 0) {
        bytes.truncate(end);
    }
    bytes
}

fn verify_checksum(header: &[u8; BLOCK]) -> io::Result<()> {
    let written = number(&header[148..156])
        .ok_or_else(|| bad("this is not a tar: a header has no checksum"))?;
    let sum = |signed: bool| -> i64 {
        header
            .iter()
            .enumerate()
            .map(|(i, b)| match i {
                148..156 => i64::from(b' '),
                _ if signed => i64::from(*b as i8),
                _ => i64::from(*b),
            })
            .sum()
    };
    if written as i64 == sum(false) || written as i64 == sum(true) {
        Ok(())
    } else {
        Err(bad("this is not a tar: a header's checksum is wrong"))
    }
}

/// Octal digits, or base 256 with the top bit set; an empty field is 0.
fn number(field: &[u8]) -> Option<u64> {
    signed(field).and_then(|v| u64::try_from(v).ok())
}

fn signed(field: &[u8]) -> Option<i64> {
    if field[0] & 0x80 != 0 {
        let negative = field[0] & 0x40 != 0;
        let mut value: i64 = if negative { -1 } else { 0 };
        for (i, byte) in field.iter().enumerate() {
            let byte = if i == 0 {
                byte & 0x7f | if negative { 0x80 } else { 0 }
            } else {
                *byte
            };
            let wanted = if negative { -1 } else { 0 };
            if value >> 55 != wanted {
                return None;
            }
            value = value << 8 | i64::from(byte);
        }
        return Some(value);
    }
    let mut digits = field
        .iter()
        .copied()
        .skip_while(|b| *b == b' ')
        .take_while(|b| *b != 0 && *b != b' ');
    digits.try_fold(0i64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

fn decimal(text: &[u8]) -> io::Result<u64> {
    std::str::from_utf8(text)
        .ok()
        .and_then(|t| t.parse().ok())
        .ok_or_else(|| bad("an extended header's number is none"))
}

fn pax_time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = seconds.parse().ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    if text.starts_with('-') && nanoseconds > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds));
    }
    Some((seconds, nanoseconds))
}

/// Records of the form `LENGTH KEY=VALUE\n`.
fn parse_pax(
    mut records: &[u8],
    mut take: impl FnMut(&[u8], &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let broken = || bad("a broken extended header");
    while !records.is_empty() && records[0] != 0 {
        let space = records
            .iter()
            .take(20)
            .position(|b| *b == b' ')
            .ok_or_else(broken)?;
        let length = decimal(&records[..space])? as usize;
        if length <= space + 2 || length > records.len() || records[length - 1] != b'\n' {
            return Err(broken());
        }
        let record = &records[space + 1..length - 1];
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(broken)?;
        take(&record[..equals], &record[equals + 1..])?;
        records = &records[length..];
    }
    Ok(())
}

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
fn octal(field: &mut [u8], value: u64) -> bool {
    let width = field.len() - 1;
    let text = format!("{value:0width$o}");
    let fits = text.len() <= width;
    let text = if fits { text } else { "0".repeat(width) };
    field[..width].copy_from_slice(text.as_bytes());
    fits
}

fn seal(header: &mut [u8; BLOCK]) {
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

/// Fuzz entry: no bytes panic or take more memory than the limits say.
pub fn fuzz_tar(data: &[u8]) {
    let mut reader = TarReader::new(data);
    for _ in 0..10_000 {
        match reader.next_entry() {
            Ok(Some(_)) => {
                let mut piece = [0; 64];
                let _ = reader.read(&mut piece);
            }
            _ => break,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn arbitrary_entry() -> impl Strategy<Value = (Entry, Vec<u8>)> {
        let name = prop::collection::vec(1u8..=255, 1..300);
        (
            name.clone(),
            name,
            0u32..0o10000,
            any::<u32>(),
            any::<u32>(),
            -5_000_000_000i64..20_000_000_000,
            0u32..1_000_000_000,
            prop::collection::vec(any::<u8>(), 0..1500),
            0u8..6,
        )
            .prop_map(
                |(mut path, link, mode, uid, gid, seconds, nanoseconds, content, kind)| {
                    while path.last() == Some(&b'/') {
                        path.pop();
                    }
                    path.push(b'x');
                    let kind = [
                        EntryKind::File,
                        EntryKind::HardLink,
                        EntryKind::Symlink,
                        EntryKind::Char,
                        EntryKind::Directory,
                        EntryKind::Fifo,
                    ][kind as usize];
                    if kind == EntryKind::Directory {
                        path.push(b'/');
                    }
                    let mut entry = Entry::new(kind, path, mode);
                    (entry.uid, entry.gid, entry.mtime) = (uid, gid, (seconds, nanoseconds));
                    if matches!(kind, EntryKind::HardLink | EntryKind::Symlink) {
                        entry.link = link;
                    }
                    entry.xattrs.insert(
                        b"user.x".to_vec(),
                        content.iter().copied().take(40).collect(),
                    );
                    let content = if kind == EntryKind::File {
                        content
                    } else {
                        Vec::new()
                    };
                    entry.size = content.len() as u64;
                    (entry, content)
                },
            )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_written_is_read_again(entries in prop::collection::vec(arbitrary_entry(), 0..5)) {
            let mut writer = TarWriter::new(Vec::new());
            for (entry, content) in &entries {
                writer.entry(entry).unwrap();
                writer.write_all(content).unwrap();
            }
            let bytes = writer.finish().unwrap();
            let mut reader = TarReader::new(&bytes[..]);
            for (entry, content) in &entries {
                prop_assert_eq!(&reader.next_entry().unwrap().unwrap(), entry);
                let mut read = Vec::new();
                reader.read_to_end(&mut read).unwrap();
                prop_assert_eq!(&read, content);
            }
            prop_assert!(reader.next_entry().unwrap().is_none());
        }

        #[test]
        fn no_bytes_panic(mut bytes in prop::collection::vec(any::<u8>(), 512..2048), honest in any::<bool>()) {
            if honest {
                let mut header: [u8; BLOCK] = bytes[..BLOCK].try_into().unwrap();
                header[124..136].copy_from_slice(b"00000000100\0");
                seal(&mut header);
                bytes[..BLOCK].copy_from_slice(&header);
            }
            fuzz_tar(&bytes);
        }
    }

    #[test]
    fn a_name_without_end_is_refused_before_it_is_read() {
        let mut header = [0u8; BLOCK];
        octal(&mut header[124..136], 1 << 30);
        header[156] = b'L';
        seal(&mut header);
        let mut reader = TarReader::new(io::Read::chain(&header[..], io::repeat(b'a')));
        assert!(
            reader
                .next_entry()
                .unwrap_err()
                .to_string()
                .contains("past the limit")
        );
    }
}
