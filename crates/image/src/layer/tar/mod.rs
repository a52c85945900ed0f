//! The tar format, read and written: POSIX ustar and pax, GNU long names and base-256 numbers, and GNU's sparse
//! files of versions 0.0, 0.1 and 1.0 in pax and of the old header (POSIX.1-2024 pax; GNU tar manual, "Tar
//! Internals").
//!
//! The reader holds at most [`MAX_META`] bytes of an entry's own description, whatever the archive says.

mod read;
mod write;

pub use read::TarReader;
pub use write::TarWriter;

use std::collections::BTreeMap;
use std::io::{self, Read};

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

/// Zeros after content of this size.
const fn pad(size: u64) -> u64 {
    (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64
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
    use super::write::{octal, seal};
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

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
    fn a_long_name_whose_first_hundred_bytes_end_with_a_slash_is_a_files() {
        let path = format!("{}/{}", "a".repeat(99), "b".repeat(150));
        let mut writer = TarWriter::new(Vec::new());
        writer.file(&path, 0o644, b"content").unwrap();
        writer.file("next", 0o644, b"").unwrap();
        let bytes = writer.finish().unwrap();
        let mut reader = TarReader::new(&bytes[..]);
        let entry = reader.next_entry().unwrap().unwrap();
        assert_eq!(
            (entry.kind, entry.path),
            (EntryKind::File, path.into_bytes())
        );
        let next = reader.next_entry().unwrap().unwrap();
        assert_eq!(next.path, b"next");
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
