//! Reading: entry after entry, with what pax and GNU add to a header.

use std::collections::BTreeMap;
use std::io::{self, Read};

use super::{BLOCK, Entry, EntryKind, MAX_META, bad, pad};

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
                    let held: usize = self.global.iter().map(|(k, v)| k.len() + v.len()).sum();
                    if held as u64 > MAX_META {
                        return Err(bad("its global headers are too long"));
                    }
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
        // In the oldest tars a directory is a file whose name ends with a slash: the whole name, since the header's own
        // may be a longer one's beginning.
        if entry.kind == EntryKind::File && flag != b'S' && entry.path.ends_with(b"/") {
            entry.kind = EntryKind::Directory;
        }
        let has_content = entry.kind == EntryKind::File;
        if !has_content {
            // Some writers put a size on links and directories without any content behind it.
            stored = 0;
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
        let left = self.left;
        io::copy(&mut self.by_ref().take(left), &mut io::sink())?;
        // docker's client ends the archive of `build -f -` right behind its last file's content.
        let mut padding = (&mut self.source).take(self.padding);
        io::copy(&mut padding, &mut io::sink())?;
        self.padding = 0;
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
