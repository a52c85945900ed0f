//! Large buffers for kernels. Touching fresh memory page by page costs more than decompressing into it: these
//! ask for huge pages.

use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// From here on a mapping of its own is worth it.
const MAPPED_FROM: usize = 4 << 20;

/// A buffer of bytes of fixed length.
pub enum Bytes {
    Heap(Vec<u8>),
    Mapped(Mapping),
}

/// A private mapping of its own.
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is owned by this value alone, as a `Vec`'s memory is.
unsafe impl Send for Mapping {}
// SAFETY: shared references only read it.
unsafe impl Sync for Mapping {}

impl Bytes {
    /// `len` zeros.
    pub fn zeroed(len: usize) -> Bytes {
        if len >= MAPPED_FROM
            && let Some(mapping) = Mapping::new(len)
        {
            return Bytes::Mapped(mapping);
        }
        Bytes::Heap(vec![0; len])
    }
}

impl Bytes {
    /// A file's content as it lies in the page cache, nothing copied. The file must be one that nobody changes: what
    /// is cut off it later cannot be read.
    ///
    /// # Errors
    /// What the kernel says to the mapping.
    pub fn of_file(file: &File) -> io::Result<Bytes> {
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        if len == 0 {
            return Ok(Bytes::Heap(Vec::new()));
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh private mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                protection,
                MapFlags::PRIVATE,
                file,
                0,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Bytes::Mapped(Mapping { start, len }))
    }
}

impl Mapping {
    fn new(len: usize) -> Option<Mapping> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), len, protection, MapFlags::PRIVATE) }
                .ok()?;
        // SAFETY: the range is the mapping just made; the advice changes no content. It may be refused.
        let _ = unsafe { madvise(start, len, Advice::LinuxHugepage) };
        Some(Mapping {
            start: NonNull::new(start.cast())?,
            len,
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own mapping, and no reference into it outlives the value.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Heap(bytes) => bytes,
            // SAFETY: the mapping holds `len` initialised bytes for as long as `self` lives.
            Bytes::Mapped(mapping) => unsafe {
                std::slice::from_raw_parts(mapping.start.as_ptr(), mapping.len)
            },
        }
    }
}

impl DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Bytes::Heap(bytes) => bytes,
            // SAFETY: as above, and `self` is borrowed alone.
            Bytes::Mapped(mapping) => unsafe {
                std::slice::from_raw_parts_mut(mapping.start.as_ptr(), mapping.len)
            },
        }
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Bytes {
        Bytes::Heap(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_ones_start_as_zeros_and_take_bytes() {
        for len in [10, MAPPED_FROM + 1] {
            let mut bytes = Bytes::zeroed(len);
            assert!(bytes.len() == len && bytes.iter().all(|byte| *byte == 0));
            bytes[len - 1] = 7;
            assert_eq!(bytes[len - 1], 7);
        }
    }
}
