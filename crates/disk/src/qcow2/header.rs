//! The header of a qcow2 image (QEMU: docs/interop/qcow2.txt). A hostile image is expected here: every field
//! is checked before anything is allocated or sought by it.

use super::metadata::{COMPRESSED, COPIED, OFFSET};

/// `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;

const DIRTY: u64 = 1 << 0;
pub(super) const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;

/// QEMU's own bound on the L1 table, bytes.
const L1_LIMIT: u64 = 32 << 20;
/// QEMU's own bound on the refcount table, bytes.
pub(super) const REFCOUNT_TABLE_LIMIT: u64 = 8 << 20;
/// A disk of more than this is a lie: 1 EiB.
const SIZE_LIMIT: u64 = 1 << 60;

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    Deflate,
    Zstd,
}

/// What the header says, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    /// Bytes of the disk.
    pub size: u64,
    pub backing: Option<Backing>,
    pub l1_entries: u32,
    pub l1_offset: u64,
    pub refcount_table_offset: u64,
    pub refcount_table_clusters: u32,
    /// Bits of one reference count: 2 to this.
    pub refcount_order: u32,
    pub snapshots: u32,
    pub autoclear: u64,
    pub compression: Compression,
    /// Written to and not closed with its counts in order (lazy refcounts).
    pub dirty: bool,
    pub corrupt: bool,
}

/// The image below.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    pub file: String,
    /// `raw` or `qcow2`; absent in old images.
    pub format: Option<String>,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..at + 4)
        .map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from(u32_at(bytes, at)?) << 32 | u64::from(u32_at(bytes, at + 4)?))
}

impl Header {
    /// Reads a header from the first bytes of an image (64 KiB are enough for any).
    ///
    /// # Errors
    /// What is wrong with it, for people.
    pub fn parse(bytes: &[u8]) -> Result<Header, String> {
        let word =
            |at: usize| u32_at(bytes, at).ok_or_else(|| "its header is cut short".to_owned());
        let long =
            |at: usize| u64_at(bytes, at).ok_or_else(|| "its header is cut short".to_owned());
        if word(0)? != MAGIC {
            return Err("it is no qcow2 image".into());
        }
        let version = word(4)?;
        if version != 2 && version != 3 {
            return Err(format!("it is of version {version}; 2 and 3 are known"));
        }
        let cluster_bits = word(20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(format!(
                "its clusters have 2^{cluster_bits} bytes; 2^9 to 2^21 are allowed"
            ));
        }
        if word(32)? != 0 {
            return Err("it is encrypted; decrypt it with qemu-img convert".into());
        }
        let (incompatible, autoclear, refcount_order, header_length) = if version == 3 {
            (long(72)?, long(88)?, word(96)?, word(100)?)
        } else {
            (0, 0, 4, 72)
        };
        if incompatible & EXTERNAL_DATA != 0 {
            return Err(
                "its data lies in another file; put it into one with qemu-img convert".into(),
            );
        }
        let unknown = incompatible & !(DIRTY | CORRUPT | COMPRESSION_TYPE);
        if unknown != 0 {
            return Err(format!(
                "it needs features {unknown:#x} that are not known here; rewrite it with qemu-img convert -O qcow2"
            ));
        }
        if refcount_order > 6 {
            return Err(format!(
                "its reference counts have 2^{refcount_order} bits; at most 64 are allowed"
            ));
        }
        if version == 3 && (header_length < 104 || u64::from(header_length) > 1 << cluster_bits) {
            return Err("its header's length is impossible".into());
        }
        let compression = match bytes.get(104) {
            Some(&kind) if header_length >= 112 => match kind {
                0 => Compression::Deflate,
                1 => Compression::Zstd,
                _ => return Err(format!("its compression {kind} is not known")),
            },
            _ => Compression::Deflate,
        };
        let size = long(24)?;
        let cluster = 1u64 << cluster_bits;
        let l1_entries = word(36)?;
        let l1_offset = long(40)?;
        let covered_by_l2 = cluster * (cluster / 8);
        if size > SIZE_LIMIT {
            return Err(format!("its size of {size} bytes is impossible"));
        }
        if u64::from(l1_entries) * 8 > L1_LIMIT {
            return Err("its first-level table is too large".into());
        }
        if u64::from(l1_entries) < size.div_ceil(covered_by_l2) {
            return Err("its first-level table is too small for its size".into());
        }
        let refcount_table_offset = long(48)?;
        let refcount_table_clusters = word(56)?;
        if u64::from(refcount_table_clusters) << cluster_bits > REFCOUNT_TABLE_LIMIT
            || refcount_table_clusters == 0
        {
            return Err("its table of reference counts has an impossible size".into());
        }
        for offset in [l1_offset, refcount_table_offset] {
            if offset % cluster != 0 || offset >= 1 << 56 || (offset == 0 && l1_entries > 0) {
                return Err("a table of it is out of place".into());
            }
        }
        let backing = Header::backing(bytes, header_length as usize, cluster)?;
        Ok(Header {
            version,
            cluster_bits,
            size,
            backing,
            l1_entries,
            l1_offset,
            refcount_table_offset,
            refcount_table_clusters,
            refcount_order,
            snapshots: word(60)?,
            autoclear,
            compression,
            dirty: incompatible & DIRTY != 0,
            corrupt: incompatible & CORRUPT != 0,
        })
    }

    /// The bytes of the file that an entry of a second-level table names; none for one that names nothing.
    pub fn host_range(&self, entry: u64) -> std::ops::Range<u64> {
        if entry & COMPRESSED == 0 {
            let start = entry & OFFSET;
            let len = if start == 0 {
                0
            } else {
                1 << self.cluster_bits
            };
            return start..start + len;
        }
        // Bits below 62 - (cluster_bits - 8) are the offset, those above it sectors less one.
        let bits = 62 - (self.cluster_bits - 8);
        let start = entry & ((1 << bits) - 1) & 0x00ff_ffff_ffff_ffff;
        let sectors = ((entry & !(COMPRESSED | COPIED)) >> bits) + 1;
        start..start - start % 512 + sectors * 512
    }

    fn backing(
        bytes: &[u8],
        header_length: usize,
        cluster: u64,
    ) -> Result<Option<Backing>, String> {
        let offset = u64_at(bytes, 8).unwrap_or(0);
        let length = u32_at(bytes, 16).unwrap_or(0) as usize;
        if offset == 0 {
            return Ok(None);
        }
        if length > 1023 || offset > cluster || offset as usize + length > bytes.len() {
            return Err("the name of its backing file is out of place".into());
        }
        let name = &bytes[offset as usize..offset as usize + length];
        let file = String::from_utf8(name.to_vec())
            .map_err(|_| "the name of its backing file is no text")?;
        let mut format = None;
        let mut at = header_length;
        // Extensions lie between the header and the backing file's name.
        while let (Some(kind), Some(size)) = (u32_at(bytes, at), u32_at(bytes, at + 4)) {
            if kind == EXTENSION_END || at as u64 >= offset {
                break;
            }
            let size = size as usize;
            let Some(data) = bytes.get(at + 8..).and_then(|rest| rest.get(..size)) else {
                return Err("an extension of its header is cut short".into());
            };
            if kind == EXTENSION_BACKING_FORMAT {
                format = String::from_utf8(data.to_vec()).ok();
            }
            at += 8 + size.next_multiple_of(8);
        }
        Ok(Some(Backing { file, format }))
    }

    /// The first cluster of a new image.
    pub fn write(&self) -> Vec<u8> {
        let mut bytes = vec![0u8; 1 << self.cluster_bits];
        let mut put = |at: usize, data: &[u8]| bytes[at..at + data.len()].copy_from_slice(data);
        put(0, &MAGIC.to_be_bytes());
        put(4, &3u32.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(36, &self.l1_entries.to_be_bytes());
        put(40, &self.l1_offset.to_be_bytes());
        put(48, &self.refcount_table_offset.to_be_bytes());
        put(56, &self.refcount_table_clusters.to_be_bytes());
        put(96, &self.refcount_order.to_be_bytes());
        put(100, &112u32.to_be_bytes());
        let mut at = 112;
        if let Some(backing) = &self.backing {
            if let Some(format) = &backing.format {
                put(at, &EXTENSION_BACKING_FORMAT.to_be_bytes());
                put(at + 4, &(format.len() as u32).to_be_bytes());
                put(at + 8, format.as_bytes());
                at += 8 + format.len().next_multiple_of(8);
            }
            at += 8; // the end of the extensions, zeros
            put(8, &(at as u64).to_be_bytes());
            put(16, &(backing.file.len() as u32).to_be_bytes());
            put(at, backing.file.as_bytes());
        }
        bytes
    }
}

/// Entry point for fuzzing: a header of any bytes.
pub fn fuzz_header(data: &[u8]) {
    let _ = Header::parse(data);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Header {
        Header {
            version: 3,
            cluster_bits: 16,
            size: 10 << 30,
            backing: Some(Backing {
                file: "base.img".into(),
                format: Some("raw".into()),
            }),
            l1_entries: 20,
            l1_offset: 3 << 16,
            refcount_table_offset: 1 << 16,
            refcount_table_clusters: 1,
            refcount_order: 4,
            snapshots: 0,
            autoclear: 0,
            compression: Compression::Deflate,
            dirty: false,
            corrupt: false,
        }
    }

    #[test]
    fn a_header_survives_its_bytes() {
        assert_eq!(Header::parse(&sample().write()).unwrap(), sample());
    }

    #[test]
    fn a_table_too_small_for_the_size_is_refused() {
        let mut bytes = sample().write();
        bytes[24..32].copy_from_slice(&(1u64 << 50).to_be_bytes());
        assert!(Header::parse(&bytes).unwrap_err().contains("too small"));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(at in 0usize..200, value: u64, cut in 0usize..65536) {
            let mut bytes = sample().write();
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
            let _ = Header::parse(&bytes);
            bytes.truncate(cut);
            let _ = Header::parse(&bytes);
        }
    }
}
