//! Where a range of a disk lies in files, for those who move it there themselves.

use std::any::Any;
use std::fs::File;
use std::sync::Arc;

use vm_memory::VolatileSlice;

/// Pieces of memory in one system call: Linux takes 1,024.
pub(crate) const VECTORS: usize = 1024;

/// Which way a transfer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    FromFile,
    ToFile,
}

/// One piece of a range.
#[derive(Debug, Clone)]
pub enum Part {
    /// `len` bytes of a file, from `offset` on.
    File {
        file: Arc<File>,
        offset: u64,
        len: u64,
    },
    /// It reads as zeros.
    Zeros { len: u64 },
}

impl Part {
    pub fn len(&self) -> u64 {
        match self {
            Part::File { len, .. } | Part::Zeros { len } => *len,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A range's pieces, in order. As long as it lives, what they name is used for nothing else.
pub struct Place {
    pub parts: Vec<Part>,
    pub(crate) lease: Option<Box<dyn Any + Send + Sync>>,
}

impl Place {
    /// Requests that a move of it takes.
    pub fn files(&self) -> usize {
        self.parts
            .iter()
            .filter(|part| matches!(part, Part::File { .. }))
            .count()
    }

    /// Adds a part, as one with the last where it goes on there.
    pub(crate) fn add(&mut self, part: Part) {
        match (self.parts.last_mut(), &part) {
            (
                Some(Part::File { file, offset, len }),
                Part::File {
                    file: next,
                    offset: at,
                    len: more,
                },
            ) if Arc::ptr_eq(file, next) && *offset + *len == *at => *len += more,
            (Some(Part::Zeros { len }), Part::Zeros { len: more }) => *len += more,
            _ => self.parts.push(part),
        }
    }
}

/// The pieces of `buffers` for each part of `place`, all in one list, and how many each part has. `None` where their lengths
/// differ or a part has more pieces than a system call takes.
pub(crate) fn split(
    place: &Place,
    buffers: &[VolatileSlice<'_>],
) -> Option<(Vec<libc::iovec>, Vec<usize>)> {
    let mut vectors = Vec::with_capacity(buffers.len() + place.parts.len());
    let mut counts = Vec::with_capacity(place.parts.len());
    let mut rest = buffers.iter().filter(|buffer| !buffer.is_empty());
    let mut current = rest.next();
    let mut used = 0;
    for part in &place.parts {
        let (before, mut left) = (vectors.len(), part.len());
        while left > 0 {
            let buffer = current?;
            let take = ((buffer.len() - used) as u64).min(left) as usize;
            vectors.push(libc::iovec {
                iov_base: buffer.ptr_guard_mut().as_ptr().wrapping_add(used).cast(),
                iov_len: take,
            });
            left -= take as u64;
            used += take;
            if used == buffer.len() {
                current = rest.next();
                used = 0;
            }
        }
        let count = vectors.len() - before;
        if count > VECTORS {
            return None;
        }
        counts.push(count);
    }
    current.is_none().then_some((vectors, counts))
}

/// How many bytes `buffers` hold together.
pub fn total(buffers: &[VolatileSlice<'_>]) -> u64 {
    buffers.iter().map(|buffer| buffer.len() as u64).sum()
}

/// Fills a vector of [`split`] with zeros.
pub(crate) fn zero(vector: &libc::iovec) {
    // SAFETY: the vector is memory that a volatile slice lends to the caller for longer than this call; a guest may write
    // it too, which is what volatile slices are for.
    unsafe { std::ptr::write_bytes(vector.iov_base.cast::<u8>(), 0, vector.iov_len) };
}
