//! New images.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{Backing, Compression, Header, Qcow2Disk};
use crate::DiskError;

/// Options of a new image.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Bytes of the disk; taken from the backing image where 0.
    pub size: u64,
    /// 2 to this bytes are allocated at a time: 9 to 21.
    pub cluster_bits: u32,
    pub backing: Option<Backing>,
}

impl Default for CreateOptions {
    fn default() -> CreateOptions {
        CreateOptions {
            size: 0,
            cluster_bits: 16,
            backing: None,
        }
    }
}

impl Qcow2Disk {
    /// Makes an empty image; the file must not exist.
    ///
    /// # Errors
    /// Where the file cannot be made; nothing is left then.
    pub fn create(path: &Path, options: &CreateOptions) -> Result<(), DiskError> {
        let failed = |source| DiskError::Open {
            path: path.to_owned(),
            source,
        };
        let unusable = |reason: &str| DiskError::Unusable {
            path: path.to_owned(),
            reason: reason.into(),
        };
        let mut size = options.size;
        if let Some(below) = &options.backing {
            let below = Qcow2Disk::open_backing(path, below, 0)?;
            if size == 0 {
                size = below.len();
            }
        }
        let bits = options.cluster_bits;
        if !(9..=21).contains(&bits) {
            return Err(unusable(
                "its clusters would have a size that is not allowed: 2^9 to 2^21 bytes are",
            ));
        }
        let cluster = 1u64 << bits;
        let size = size.next_multiple_of(512);
        let l1_entries = size.div_ceil(cluster * (cluster / 8)).max(1);
        if size == 0 || l1_entries * 8 > 32 << 20 {
            return Err(unusable(
                "its size is impossible; choose larger clusters for a larger disk",
            ));
        }
        if options
            .backing
            .as_ref()
            .is_some_and(|b| b.file.len() > 1023.min(cluster as usize - 160))
        {
            return Err(unusable("the name of the image below it is too long"));
        }
        // Header, reference counts' table, one block of them, first-level table.
        let l1_clusters = (l1_entries * 8).div_ceil(cluster);
        let table_clusters = (size.div_ceil(cluster * cluster * 4) * 2 * 8)
            .div_ceil(cluster)
            .clamp(1, (8 << 20) / cluster);
        let used = 1 + table_clusters + 1 + l1_clusters;
        if used > cluster * 8 / 16 {
            return Err(unusable("its clusters are too small for its size"));
        }
        let header = Header {
            version: 3,
            cluster_bits: bits,
            size,
            backing: options.backing.clone(),
            l1_entries: l1_entries as u32,
            l1_offset: (2 + table_clusters) * cluster,
            refcount_table_offset: cluster,
            refcount_table_clusters: table_clusters as u32,
            refcount_order: 4,
            snapshots: 0,
            autoclear: 0,
            compression: Compression::Deflate,
            dirty: false,
            corrupt: false,
        };
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(failed)?;
        let written = (|| {
            let block = (1 + table_clusters) * cluster;
            file.set_len(used * cluster)?;
            file.write_all_at(&block.to_be_bytes(), cluster)?;
            let counts: Vec<u8> = (0..used).flat_map(|_| 1u16.to_be_bytes()).collect();
            file.write_all_at(&counts, block)?;
            file.write_all_at(&header.write(), 0)?;
            file.sync_all()
        })();
        written.map_err(|source| {
            let _ = std::fs::remove_file(path);
            failed(source)
        })
    }
}
