//! Tables of a qcow2 image in memory, and the order in which they reach the disk.
//!
//! A crash at any point leaves a readable image whose flushed data is there; at worst, clusters are leaked:
//!
//! ```text
//! flush:  data + counts that grew ──fdatasync──▶ L2 tables ──fdatasync──▶ L1 table ──fdatasync──▶ counts that fell
//! ```
//!
//! A cluster freed before a flush is not handed out again before that flush has let go of it on disk, nor while a transfer
//! that began before still moves to or from it ([`Leases`]).

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::header::Header;
use super::leases::Leases;

/// Of L1 and L2 entries: bits 9..=55 are the host offset.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The cluster is referred to exactly once, so it may be written in place.
pub const COPIED: u64 = 1 << 63;
pub const COMPRESSED: u64 = 1 << 62;
/// Version 3: the cluster reads as zeros, whatever lies at its offset.
pub const ZERO: u64 = 1;

/// L2 tables kept in memory; each covers 512 MiB of the disk at 64 KiB clusters.
const TABLES_KEPT: usize = 32;
const BLOCKS_KEPT: usize = 16;
const FREED_KEPT: usize = 4096;
/// Tables looked through when an image is opened: 128 GiB of data at 64 KiB clusters, 16 MiB to read.
const TABLES_CHECKED: usize = 256;

pub(super) fn invalid(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!(
            "the image is damaged: {what}. Keep a copy of it, look at it with qemu-img check, mend it with qemu-img check -r all"
        ),
    )
}

fn to_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

fn to_words(bytes: &[u8]) -> Vec<u64> {
    bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|chunk| u64::from_be_bytes(*chunk))
        .collect()
}

struct Table {
    entries: Vec<u64>,
    dirty: bool,
    /// A flush is writing it as it was.
    writing: bool,
    used: u64,
}

impl Table {
    fn new(entries: Vec<u64>, dirty: bool, used: u64) -> Table {
        Table {
            entries,
            dirty,
            writing: false,
            used,
        }
    }
}

/// What one flush brings to the disk, as it was when the flush began.
pub struct Batch {
    tables: Vec<(u64, Vec<u8>)>,
    l1: Option<(u64, Vec<u8>)>,
    freed: Vec<(u64, u64)>,
}

impl Batch {
    /// Writes it, in the order that the module describes. No lock is needed, but only one batch may be written at a time.
    pub fn write(&self, file: &File) -> io::Result<()> {
        file.sync_data()?;
        for (offset, bytes) in &self.tables {
            file.write_all_at(bytes, *offset)?;
        }
        if !self.tables.is_empty() {
            file.sync_data()?;
        }
        if let Some((offset, bytes)) = &self.l1 {
            file.write_all_at(bytes, *offset)?;
            file.sync_data()?;
        }
        Ok(())
    }
}

struct Block {
    bytes: Vec<u8>,
    dirty: bool,
    used: u64,
}

/// All that is known of where things are.
pub struct Metadata {
    pub header: Header,
    l1: Vec<u64>,
    l1_dirty: bool,
    /// By host offset.
    tables: HashMap<u64, Table>,
    refcount_table: Vec<u64>,
    refcount_table_dirty: bool,
    blocks: HashMap<u64, Block>,
    /// Clusters whose count falls once the tables no longer name them on disk, and the moment of that.
    freed: Vec<(u64, u64)>,
    /// One more with each cluster freed.
    moment: u64,
    pub leases: Arc<Leases>,
    /// A [`Batch`] is being written.
    flushing: bool,
    /// Clusters that hold the header and tables: never to be taken for data.
    tables_at: HashSet<u64>,
    /// No free cluster lies below this one.
    hint: u64,
    /// Clusters of the file, rounded up.
    end: u64,
    clock: u64,
}

impl Metadata {
    /// Reads the tables that are kept whole.
    pub fn load(file: &File, header: Header) -> io::Result<Metadata> {
        let len = file.metadata()?.len();
        let mut l1 = vec![0; header.l1_entries as usize * 8];
        let mut table = vec![0; (header.refcount_table_clusters as usize) << header.cluster_bits];
        for (offset, bytes, what) in [
            (header.l1_offset, &mut l1, "the first-level table"),
            (
                header.refcount_table_offset,
                &mut table,
                "the table of reference counts",
            ),
        ] {
            file.read_exact_at(bytes, offset)
                .map_err(|error| match error.kind() {
                    io::ErrorKind::UnexpectedEof => invalid(&format!("{what} is cut off")),
                    _ => error,
                })?;
        }
        let end = len.div_ceil(1 << header.cluster_bits);
        let mut metadata = Metadata {
            header,
            l1: to_words(&l1),
            l1_dirty: false,
            tables: HashMap::new(),
            refcount_table: to_words(&table),
            refcount_table_dirty: false,
            blocks: HashMap::new(),
            freed: Vec::new(),
            moment: 1,
            leases: Arc::default(),
            flushing: false,
            tables_at: HashSet::new(),
            hint: 0,
            end,
            clock: 0,
        };
        metadata.find_tables()?;
        Ok(metadata)
    }

    /// Notes where all tables lie, which must be within the file.
    fn find_tables(&mut self) -> io::Result<()> {
        let mut at = HashSet::from([0]);
        at.extend(self.clusters_of(self.header.l1_offset, u64::from(self.header.l1_entries) * 8));
        let counts = u64::from(self.header.refcount_table_clusters) << self.header.cluster_bits;
        at.extend(self.clusters_of(self.header.refcount_table_offset, counts));
        for (entries, what) in [
            (&self.l1, "a second-level table"),
            (&self.refcount_table, "a block of reference counts"),
        ] {
            for entry in entries.iter().filter(|entry| **entry & OFFSET != 0) {
                at.insert(self.place(*entry, what)? >> self.header.cluster_bits);
            }
        }
        self.tables_at = at;
        Ok(())
    }

    fn clusters_of(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        let bits = self.header.cluster_bits;
        offset >> bits..(offset + len).div_ceil(1 << bits)
    }

    /// Whether a cluster of the file, by its offset, holds the header or a table.
    pub fn is_table(&self, host: u64) -> bool {
        self.tables_at.contains(&(host >> self.header.cluster_bits))
    }

    /// Looks whether everything the tables name is within the file and counted, before anything is written: a cluster in
    /// use that counts as free would be given to other data.
    pub fn check(&mut self, file: &File) -> io::Result<()> {
        let mut clusters: Vec<u64> = self.tables_at.iter().copied().collect();
        clusters.sort_unstable();
        for cluster in clusters {
            self.check_counted(file, cluster, "its tables")?;
        }
        let tables: Vec<u64> = self
            .l1
            .iter()
            .copied()
            .filter(|entry| entry & OFFSET != 0)
            .collect();
        if tables.len() > TABLES_CHECKED {
            return Ok(());
        }
        let mut bytes = vec![0; self.cluster() as usize];
        for table in tables {
            file.read_exact_at(&mut bytes, table & OFFSET)?;
            let mut named: Vec<u64> = to_words(&bytes)
                .into_iter()
                .map(|entry| self.header.host_range(entry))
                .flat_map(|range| self.clusters_of(range.start, range.end - range.start))
                .collect();
            // In order, each block of counts is read once.
            named.sort_unstable();
            named.dedup();
            for cluster in named {
                if cluster >= self.end {
                    return Err(invalid(&format!(
                        "it is cut off; its file has {} bytes, and data lies at {}",
                        self.end << self.header.cluster_bits,
                        cluster << self.header.cluster_bits
                    )));
                }
                self.check_counted(file, cluster, "data")?;
            }
        }
        Ok(())
    }

    fn check_counted(&mut self, file: &File, cluster: u64, what: &str) -> io::Result<()> {
        if self.count(file, cluster)? == 0 {
            return Err(invalid(&format!(
                "its reference counts call cluster {cluster} free, which holds {what}"
            )));
        }
        Ok(())
    }

    /// The image turned out to be damaged while it was written: that is marked in it, and nothing more is written.
    fn damaged(&mut self, file: &File, what: &str) -> io::Error {
        if !std::mem::replace(&mut self.header.corrupt, true) && self.header.version >= 3 {
            let mut features = [0; 8];
            if file.read_exact_at(&mut features, 72).is_ok() {
                features[7] |= super::header::CORRUPT as u8;
                let _ = file.write_all_at(&features, 72);
            }
        }
        invalid(&format!(
            "{what}; nothing more is written to it. Power the machine off"
        ))
    }

    /// # Errors
    /// Where the image turned out to be damaged.
    pub fn check_writable(&self) -> io::Result<()> {
        if self.header.corrupt {
            return Err(invalid(
                "it was found out before; nothing more is written to it. Power the machine off",
            ));
        }
        Ok(())
    }

    /// Whether a cluster, by its offset, may be written as data without a further look.
    pub fn is_sound(&self, host: u64) -> bool {
        !self.header.corrupt && !self.is_table(host)
    }

    /// # Errors
    /// Where data would be written over the image's own tables, or past where they are kept.
    pub fn check_data(&mut self, file: &File, host: u64) -> io::Result<()> {
        if self.is_table(host) || !host.is_multiple_of(self.cluster()) {
            return Err(self.damaged(
                file,
                &format!("a table names the bytes at {host} as data, which are the image's own or no cluster"),
            ));
        }
        Ok(())
    }

    /// Stands for the present moment in [`Leases::take`].
    pub fn moment(&self) -> u64 {
        self.moment
    }

    pub fn cluster(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    fn split(&self, guest: u64) -> (usize, usize) {
        let entries = self.cluster() / 8;
        let index = guest >> self.header.cluster_bits;
        ((index / entries) as usize, (index % entries) as usize)
    }

    /// A table's offset from an entry that names one.
    fn place(&self, entry: u64, what: &str) -> io::Result<u64> {
        let offset = entry & OFFSET;
        if !offset.is_multiple_of(self.cluster()) || offset >> self.header.cluster_bits >= self.end
        {
            return Err(invalid(&format!("{what} lies outside of the file")));
        }
        Ok(offset)
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// The entry of a cluster if its table is in memory, without touching anything: for readers that share.
    pub fn peek(&self, guest: u64) -> Option<u64> {
        let (l1, l2) = self.split(guest);
        let offset = self.l1.get(l1)? & OFFSET;
        if offset == 0 {
            return Some(0);
        }
        Some(self.tables.get(&offset)?.entries[l2])
    }

    /// The L2 entry of the cluster that holds `guest`.
    pub fn entry(&mut self, file: &File, guest: u64) -> io::Result<u64> {
        let (l1, l2) = self.split(guest);
        let entry = *self
            .l1
            .get(l1)
            .ok_or_else(|| invalid("an access lies beyond the first-level table"))?;
        if entry & OFFSET == 0 {
            return Ok(0);
        }
        let offset = self.place(entry, "a second-level table")?;
        Ok(self.table(file, offset)?.entries[l2])
    }

    fn table(&mut self, file: &File, offset: u64) -> io::Result<&mut Table> {
        let used = self.tick();
        if !self.tables.contains_key(&offset) {
            self.make_room(file)?;
            let mut bytes = vec![0; self.cluster() as usize];
            file.read_exact_at(&mut bytes, offset)?;
            self.tables
                .insert(offset, Table::new(to_words(&bytes), false, used));
        }
        let table = self
            .tables
            .get_mut(&offset)
            .ok_or_else(|| invalid("a table vanished"))?;
        table.used = used;
        Ok(table)
    }

    fn make_room(&mut self, file: &File) -> io::Result<()> {
        if self.tables.len() < TABLES_KEPT {
            return Ok(());
        }
        // While a flush is under way, its tables and those changed meanwhile stay.
        if !self.flushing && self.tables.values().all(|table| table.dirty) {
            self.flush(file)?;
        }
        let oldest = self
            .tables
            .iter()
            .filter(|(_, t)| !t.dirty && !t.writing)
            .min_by_key(|(_, t)| t.used)
            .map(|(o, _)| *o);
        if let Some(offset) = oldest {
            self.tables.remove(&offset);
        }
        Ok(())
    }

    /// Sets the entry of a cluster, making (or un-sharing) its table where that is needed.
    pub fn set_entry(&mut self, file: &File, guest: u64, entry: u64) -> io::Result<()> {
        let (l1, l2) = self.split(guest);
        let current = *self
            .l1
            .get(l1)
            .ok_or_else(|| invalid("an access lies beyond the first-level table"))?;
        let offset = if current & OFFSET == 0 {
            self.make_room(file)?;
            let offset = self.allocate(file, 1)?;
            let entries = vec![0; (self.cluster() / 8) as usize];
            let used = self.tick();
            self.tables.insert(offset, Table::new(entries, true, used));
            self.tables_at.insert(offset >> self.header.cluster_bits);
            self.l1[l1] = offset | COPIED;
            self.l1_dirty = true;
            offset
        } else if current & COPIED == 0 {
            // Shared with a snapshot: its copy is ours.
            let shared = self.place(current, "a second-level table")?;
            let entries = self.table(file, shared)?.entries.clone();
            self.make_room(file)?;
            let offset = self.allocate(file, 1)?;
            let used = self.tick();
            self.tables.insert(offset, Table::new(entries, true, used));
            self.tables_at.insert(offset >> self.header.cluster_bits);
            self.free(shared, 1);
            self.tables_at.remove(&(shared >> self.header.cluster_bits));
            self.l1[l1] = offset | COPIED;
            self.l1_dirty = true;
            offset
        } else {
            self.place(current, "a second-level table")?
        };
        let table = self.table(file, offset)?;
        table.entries[l2] = entry;
        table.dirty = true;
        Ok(())
    }

    fn counts_per_block(&self) -> u64 {
        (self.cluster() * 8) >> self.header.refcount_order
    }

    fn block(&mut self, file: &File, index: usize) -> io::Result<Option<&mut Block>> {
        let Some(&entry) = self.refcount_table.get(index) else {
            return Ok(None);
        };
        if entry & OFFSET == 0 {
            return Ok(None);
        }
        let offset = self.place(entry, "a block of reference counts")?;
        let used = self.tick();
        if !self.blocks.contains_key(&offset) {
            if self.blocks.len() >= BLOCKS_KEPT {
                let oldest = self
                    .blocks
                    .iter()
                    .min_by_key(|(_, b)| b.used)
                    .map(|(o, _)| *o);
                if let Some(oldest) = oldest {
                    // A count that is too high early is only a leak. One that cannot be written stays.
                    if let Some(block) = self.blocks.get(&oldest)
                        && block.dirty
                    {
                        file.write_all_at(&block.bytes, oldest)?;
                    }
                    self.blocks.remove(&oldest);
                }
            }
            let mut bytes = vec![0; self.cluster() as usize];
            file.read_exact_at(&mut bytes, offset)?;
            self.blocks.insert(
                offset,
                Block {
                    bytes,
                    dirty: false,
                    used,
                },
            );
        }
        let block = self
            .blocks
            .get_mut(&offset)
            .ok_or_else(|| invalid("a block vanished"))?;
        block.used = used;
        Ok(Some(block))
    }

    /// The reference count of a cluster by its number in the file.
    pub fn count(&mut self, file: &File, cluster: u64) -> io::Result<u64> {
        let per_block = self.counts_per_block();
        let order = self.header.refcount_order;
        let Some(block) = self.block(file, (cluster / per_block) as usize)? else {
            return Ok(0);
        };
        Ok(get_count(&block.bytes, cluster % per_block, order))
    }

    fn set_count(&mut self, file: &File, cluster: u64, count: u64) -> io::Result<()> {
        let per_block = self.counts_per_block();
        let order = self.header.refcount_order;
        let block = self.block(file, (cluster / per_block) as usize)?;
        let block = block.ok_or_else(|| invalid("a used cluster has no reference count"))?;
        put_count(&mut block.bytes, cluster % per_block, order, count);
        block.dirty = true;
        Ok(())
    }

    /// Makes the block that counts `cluster`, at or after cluster `from` of the file.
    fn need_block(&mut self, file: &File, cluster: u64, from: u64) -> io::Result<()> {
        let index = (cluster / self.counts_per_block()) as usize;
        let Some(&entry) = self.refcount_table.get(index) else {
            return Err(io::Error::other(
                "the image's table of reference counts is full; make a roomier image with qemu-img convert -O qcow2",
            ));
        };
        if entry & OFFSET != 0 {
            return Ok(());
        }
        let own = self.end.max(from);
        self.end = own + 1;
        let offset = own << self.header.cluster_bits;
        self.refcount_table[index] = offset;
        self.refcount_table_dirty = true;
        self.tables_at.insert(own);
        let used = self.tick();
        self.blocks.insert(
            offset,
            Block {
                bytes: vec![0; self.cluster() as usize],
                dirty: true,
                used,
            },
        );
        self.need_block(file, own, own + 1)?;
        self.set_count(file, own, 1)
    }

    /// `count` adjacent free clusters with a reference count of one; the host offset of the first.
    pub fn allocate(&mut self, file: &File, count: u64) -> io::Result<u64> {
        let mut first = self.hint.max(1);
        let mut run = 0;
        let mut at = first;
        while run < count {
            let free = at >= self.end || self.count(file, at)? == 0;
            if free && self.tables_at.contains(&at) {
                return Err(self.damaged(
                    file,
                    &format!("its reference counts call cluster {at} free, which holds its tables"),
                ));
            }
            if free {
                run += 1;
            } else {
                run = 0;
                first = at + 1;
            }
            at += 1;
        }
        for cluster in first..first + count {
            self.need_block(file, cluster, first + count)?;
        }
        for cluster in first..first + count {
            self.set_count(file, cluster, 1)?;
        }
        if count == 1 {
            self.hint = first + 1;
        }
        self.end = self.end.max(first + count);
        Ok(first << self.header.cluster_bits)
    }

    /// Lets go of clusters, from the next flush on.
    pub fn free(&mut self, offset: u64, clusters: u64) {
        let first = offset >> self.header.cluster_bits;
        let moment = self.moment;
        self.freed
            .extend((first..first + clusters).map(|cluster| (cluster, moment)));
        self.moment += 1;
    }

    /// Whether so much is waiting that the caller should flush.
    pub fn wants_flush(&self) -> bool {
        self.freed.len() > FREED_KEPT && !self.flushing
    }

    /// Brings everything to the disk, in the order that the module describes. No [`Batch`] may be under way.
    pub fn flush(&mut self, file: &File) -> io::Result<()> {
        let batch = self.begin_flush(file)?;
        let written = batch.write(file);
        self.end_flush(file, batch, written)
    }

    /// Writes counts that grew, and takes what is to be written after them.
    pub fn begin_flush(&mut self, file: &File) -> io::Result<Batch> {
        self.write_counts(file)
            .inspect_err(|_| self.forget_written_counts())?;
        let mut tables = Vec::new();
        for (offset, table) in self.tables.iter_mut().filter(|(_, t)| t.dirty) {
            tables.push((*offset, to_bytes(&table.entries)));
            (table.dirty, table.writing) = (false, true);
        }
        let l1 =
            std::mem::take(&mut self.l1_dirty).then(|| (self.header.l1_offset, to_bytes(&self.l1)));
        self.flushing = true;
        Ok(Batch {
            tables,
            l1,
            freed: std::mem::take(&mut self.freed),
        })
    }

    fn write_counts(&mut self, file: &File) -> io::Result<()> {
        for (offset, block) in self.blocks.iter_mut().filter(|(_, b)| b.dirty) {
            file.write_all_at(&block.bytes, *offset)?;
            block.dirty = false;
        }
        if self.refcount_table_dirty {
            file.sync_data()?;
            file.write_all_at(
                &to_bytes(&self.refcount_table),
                self.header.refcount_table_offset,
            )?;
            self.refcount_table_dirty = false;
        }
        Ok(())
    }

    /// After a failure the kernel may take for written what is not (fsync(2)): all that is here is written again.
    fn forget_written_counts(&mut self) {
        self.blocks
            .values_mut()
            .for_each(|block| block.dirty = true);
        self.refcount_table_dirty = true;
    }

    /// Lets go of the clusters that a written batch no longer names; one that was not written stays to be written.
    pub fn end_flush(
        &mut self,
        file: &File,
        batch: Batch,
        written: io::Result<()>,
    ) -> io::Result<()> {
        self.flushing = false;
        for (offset, _) in &batch.tables {
            if let Some(table) = self.tables.get_mut(offset) {
                table.writing = false;
                table.dirty |= written.is_err();
            }
        }
        if let Err(error) = written {
            self.l1_dirty |= batch.l1.is_some();
            self.freed.extend(batch.freed);
            self.forget_written_counts();
            return Err(error);
        }
        let oldest = self.leases.oldest().unwrap_or(u64::MAX);
        for (cluster, moment) in batch.freed {
            if moment >= oldest {
                // Something that began before still moves to or from it.
                self.freed.push((cluster, moment));
                continue;
            }
            let count = self.count(file, cluster)?;
            self.set_count(file, cluster, count.saturating_sub(1))?;
            if count <= 1 {
                self.hint = self.hint.min(cluster);
            }
        }
        Ok(())
    }

    /// [`Metadata::flush`], and the counts that fell too: for the end.
    pub fn close(&mut self, file: &File) -> io::Result<()> {
        self.flush(file)?;
        self.flush(file)
    }

    /// Makes the disk larger: a longer first-level table where that is needed, then the header.
    pub fn grow(&mut self, file: &File, size: u64) -> io::Result<()> {
        let covered = self.cluster() * (self.cluster() / 8);
        let wanted = size.div_ceil(covered);
        if wanted > u64::from(self.header.l1_entries) {
            if wanted * 8 > 32 << 20 {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "a disk of this size needs larger clusters",
                ));
            }
            let clusters = (wanted * 8).div_ceil(self.cluster());
            let offset = self.allocate(file, clusters)?;
            let old = (
                self.header.l1_offset,
                (u64::from(self.header.l1_entries) * 8).div_ceil(self.cluster()),
            );
            self.flush(file)?;
            // Until the header names the new one, the old table is the one that is written, and as long as it is.
            let mut longer = self.l1.clone();
            longer.resize(wanted as usize, 0);
            let mut bytes = to_bytes(&longer);
            bytes.resize((clusters * self.cluster()) as usize, 0);
            file.write_all_at(&bytes, offset)?;
            file.sync_data()?;
            // Both fields lie side by side: one write moves the table.
            let mut fields = [0u8; 12];
            fields[..4].copy_from_slice(&(wanted as u32).to_be_bytes());
            fields[4..].copy_from_slice(&offset.to_be_bytes());
            file.write_all_at(&fields, 36)?;
            self.l1 = longer;
            self.header.l1_entries = wanted as u32;
            self.header.l1_offset = offset;
            file.sync_data()?;
            self.move_table(old, (offset, clusters));
        }
        self.grow_counts(file, size)?;
        file.write_all_at(&size.to_be_bytes(), 24)?;
        self.header.size = size;
        self.close(file)
    }

    /// A table of `clusters` lies at another offset now.
    fn move_table(&mut self, from: (u64, u64), to: (u64, u64)) {
        let bits = self.header.cluster_bits;
        for cluster in 0..from.1 {
            self.tables_at.remove(&((from.0 >> bits) + cluster));
        }
        self.tables_at
            .extend((0..to.1).map(|cluster| (to.0 >> bits) + cluster));
        self.free(from.0, from.1);
    }

    /// Makes the table of reference counts long enough for a disk of `size` that is full.
    fn grow_counts(&mut self, file: &File, size: u64) -> io::Result<()> {
        let (cluster, bits) = (self.cluster(), self.header.cluster_bits);
        // Its data, and as much again for tables and for what was discarded and is not yet let go.
        let entries = size
            .div_ceil(cluster)
            .saturating_mul(2)
            .div_ceil(self.counts_per_block());
        let clusters = (entries * 8)
            .div_ceil(cluster)
            .min(super::header::REFCOUNT_TABLE_LIMIT >> bits);
        let old = u64::from(self.header.refcount_table_clusters);
        if clusters <= old {
            return Ok(());
        }
        let offset = self.allocate(file, clusters)?;
        self.flush(file)?;
        let mut table = self.refcount_table.clone();
        table.resize((clusters * cluster / 8) as usize, 0);
        file.write_all_at(&to_bytes(&table), offset)?;
        file.sync_data()?;
        // Both fields lie side by side: one write moves the table.
        let mut fields = [0u8; 12];
        fields[..8].copy_from_slice(&offset.to_be_bytes());
        fields[8..].copy_from_slice(&(clusters as u32).to_be_bytes());
        file.write_all_at(&fields, 48)?;
        let from = (self.header.refcount_table_offset, old);
        self.refcount_table = table;
        self.header.refcount_table_offset = offset;
        self.header.refcount_table_clusters = clusters as u32;
        file.sync_data()?;
        self.move_table(from, (offset, clusters));
        Ok(())
    }
}

/// A count of 2^order bits; below a byte, the first count is in the lowest bits.
fn get_count(bytes: &[u8], index: u64, order: u32) -> u64 {
    let index = index as usize;
    if order < 3 {
        let bits = 1usize << order;
        let bit = index * bits;
        return u64::from(bytes[bit / 8] >> (bit % 8)) & ((1 << bits) - 1);
    }
    let width = 1usize << (order - 3);
    bytes[index * width..(index + 1) * width]
        .iter()
        .fold(0, |count, byte| count << 8 | u64::from(*byte))
}

fn put_count(bytes: &mut [u8], index: u64, order: u32, count: u64) {
    let index = index as usize;
    if order < 3 {
        let bits = 1usize << order;
        let bit = index * bits;
        let mask = ((1u16 << bits) - 1) as u8;
        let byte = &mut bytes[bit / 8];
        *byte = *byte & !(mask << (bit % 8)) | (count as u8 & mask) << (bit % 8);
        return;
    }
    let width = 1usize << (order - 3);
    bytes[index * width..(index + 1) * width].copy_from_slice(&count.to_be_bytes()[8 - width..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::{BackingFiles, CreateOptions, Qcow2Disk};

    #[test]
    fn a_table_that_counts_as_free_is_not_given_away() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.qcow2");
        let options = CreateOptions {
            size: 8 << 20,
            ..CreateOptions::default()
        };
        Qcow2Disk::create(&path, &options).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let header = Header::parse(&std::fs::read(&path).unwrap()).unwrap();
        let first_level = header.l1_offset >> header.cluster_bits;
        let mut metadata = Metadata::load(&file, header).unwrap();
        metadata.check(&file).unwrap();
        metadata.set_count(&file, first_level, 0).unwrap();
        let error = metadata.allocate(&file, 1).unwrap_err().to_string();
        assert!(error.contains("holds its tables"), "{error}");
        assert!(metadata.check_writable().is_err());
        // The next one who opens it hears of it too.
        let error = Qcow2Disk::open(&path, false, BackingFiles::Refused).err();
        assert!(error.unwrap().to_string().contains("marked as damaged"));
    }

    #[test]
    fn counts_of_every_width_keep_their_neighbours() {
        for order in 0..=6 {
            let mut bytes = vec![0xffu8; 64];
            put_count(&mut bytes, 3, order, 0);
            put_count(&mut bytes, 3, order, 1);
            assert_eq!(get_count(&bytes, 3, order), 1, "order {order}");
            let full = if order == 6 {
                u64::MAX
            } else {
                (1u64 << (1 << order)) - 1
            };
            assert_eq!(get_count(&bytes, 2, order), full);
            assert_eq!(get_count(&bytes, 4, order), full);
        }
    }
}
