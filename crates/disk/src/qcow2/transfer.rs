//! Where a range of the disk lies in files, and its way between there and memory.

use std::io;

use vm_memory::VolatileSlice;

use super::metadata::{COMPRESSED, Metadata, OFFSET, ZERO};
use super::{Qcow2Disk, in_place};
use crate::place::{Part, Place, Way, split, zero};
use crate::raw::transfer_vectors;

impl Qcow2Disk {
    /// Where `len` bytes within one cluster lie.
    pub(super) fn place_part(
        &self,
        metadata: &Metadata,
        way: Way,
        offset: u64,
        len: u64,
        place: &mut Place,
    ) -> Option<()> {
        let entry = metadata.peek(offset)?;
        let cluster = metadata.cluster();
        if entry & COMPRESSED != 0 {
            return None;
        }
        let host = entry & OFFSET;
        if way == Way::ToFile {
            if !in_place(entry) || !metadata.is_sound(host) {
                return None;
            }
        } else if entry & ZERO != 0 && metadata.header.version == 3 {
            place.add(Part::Zeros { len });
            return Some(());
        } else if host == 0 {
            let below = self.backing.as_deref();
            let there = below.map_or(0, |below| below.len().saturating_sub(offset).min(len));
            if let (Some(below), 1..) = (below, there) {
                let parts = below.place(way, offset, there)?.parts;
                parts.into_iter().for_each(|part| place.add(part));
            }
            if there < len {
                place.add(Part::Zeros { len: len - there });
            }
            return Some(());
        }
        if !host.is_multiple_of(cluster) {
            return None;
        }
        place.add(Part::File {
            file: self.file.clone(),
            offset: host + offset % cluster,
            len,
        });
        Some(())
    }

    /// Moves a placed range; false where the file ends before it does.
    pub(super) fn transfer(
        &self,
        way: Way,
        place: &Place,
        buffers: &[VolatileSlice<'_>],
    ) -> io::Result<bool> {
        let Some((mut vectors, counts)) = split(place, buffers) else {
            return Ok(false);
        };
        let mut rest = &mut vectors[..];
        for (part, count) in place.parts.iter().zip(counts) {
            let (list, later) = rest.split_at_mut(count);
            rest = later;
            match part {
                Part::File { file, offset, .. } => {
                    match transfer_vectors(file, way, &mut offset.clone(), list) {
                        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                            return Ok(false);
                        }
                        result => result?,
                    }
                }
                Part::Zeros { .. } => list.iter().for_each(zero),
            }
        }
        Ok(true)
    }
}
