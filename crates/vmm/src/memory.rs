//! Guest RAM and where everything lies in the guest's physical address space.
//!
//! ```text
//!   0x0000_0000_0000  RAM (boot structures below 0x9_fc00, ACPI tables in 0xe_0000..0x10_0000)
//!   0x0000_c000_0000  32-bit PCI window: BARs
//!   0x0000_e800_0000  PCI configuration space (ECAM), bus 0
//!   0x0000_fec0_0000  IOAPIC
//!   0x0000_fee0_0000  local APIC (the CPU back end's), interrupt messages
//!   0x0001_0000_0000  RAM past 3 GiB
//!   0x0010_0000_0000  64-bit PCI window (or past the RAM's end, whichever is higher)
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cpu::{GuestMemory, Vm};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    VolatileSlice,
};

/// Low RAM ends here at the latest, and the 32-bit PCI window begins.
pub const LOW_RAM_END: u64 = 0xc000_0000;
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
pub const PCI_WINDOW32: std::ops::Range<u64> = LOW_RAM_END..0xe000_0000;
pub const PCI_ECAM_START: u64 = 0xe800_0000;
/// One bus: 32 devices of 8 functions of 4 KiB.
pub const PCI_ECAM_LEN: u64 = 1 << 20;
pub const PCI_WINDOW64_FLOOR: u64 = 0x10_0000_0000;
pub const PCI_WINDOW64_LEN: u64 = 32 << 30;
pub const IOAPIC_START: u64 = 0xfec0_0000;
pub const IOAPIC_LEN: u64 = 0x1000;
pub const LAPIC_START: u64 = 0xfee0_0000;
/// Base memory as the BIOS would report it.
pub const BASE_MEMORY_END: u64 = 0x9_fc00;
pub const ACPI_START: u64 = 0xe_0000;
pub const ACPI_END: u64 = 0x10_0000;
/// The first address a kernel may be loaded at.
pub const KERNEL_FLOOR: u64 = 0x10_0000;

/// Guest RAM could not be made or reached.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error(
        "a machine needs between 16 MiB and 16 TiB of memory, in whole 4 KiB pages; {0} bytes were asked for"
    )]
    Size(u64),
    #[error("the host does not give {0} bytes of address space for guest memory: {1}")]
    Map(u64, String),
    #[error("the guest named memory it does not have: {len:#x} bytes at {address:#x}")]
    Outside { address: u64, len: u64 },
}

/// Makes `size` bytes of guest RAM, as a lazily filled mapping: nothing is used before the guest touches it.
///
/// # Errors
/// [`MemoryError::Size`], or [`MemoryError::Map`] where the host refuses.
pub fn allocate(size: u64) -> Result<GuestMemory, MemoryError> {
    if !(16 << 20..=16 << 40).contains(&size) || !size.is_multiple_of(4096) {
        return Err(MemoryError::Size(size));
    }
    let low = size.min(LOW_RAM_END);
    let mut regions = vec![region(0, low)?];
    if size > low {
        regions.push(region(HIGH_RAM_START, size - low)?);
    }
    GuestMemory::from_regions(regions).map_err(|error| MemoryError::Map(size, error.to_string()))
}

fn region(base: u64, size: u64) -> Result<GuestRegionMmap<()>, MemoryError> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let mapping = MmapRegion::build(
        None,
        size as usize,
        libc::PROT_READ | libc::PROT_WRITE,
        flags,
    )
    .map_err(|error| MemoryError::Map(size, error.to_string()))?;
    // SAFETY: the range is the mapping just made, which outlives the call; both hints change no content.
    unsafe {
        libc::madvise(mapping.as_ptr().cast(), size as usize, libc::MADV_HUGEPAGE);
        libc::madvise(mapping.as_ptr().cast(), size as usize, libc::MADV_DONTDUMP);
    }
    GuestRegionMmap::new(mapping, GuestAddress(base))
        .ok_or_else(|| MemoryError::Map(size, "the region wraps".into()))
}

/// RAM as ranges `(start, length)`, ascending.
pub fn ranges(memory: &GuestMemory) -> Vec<(u64, u64)> {
    memory
        .iter()
        .map(|region| (region.start_addr().0, region.len()))
        .collect()
}

/// End of the RAM below 4 GiB.
pub fn low_end(memory: &GuestMemory) -> u64 {
    ranges(memory)
        .iter()
        .map(|(start, len)| start + len)
        .filter(|end| *end <= LOW_RAM_END)
        .max()
        .unwrap_or(0)
}

/// Where the 64-bit PCI window begins: past all RAM.
pub fn window64(memory: &GuestMemory) -> std::ops::Range<u64> {
    let end = ranges(memory).last().map_or(0, |(start, len)| start + len);
    let start = end.next_multiple_of(1 << 30).max(PCI_WINDOW64_FLOOR);
    start..start + PCI_WINDOW64_LEN
}

/// How a kind of memory is reported to the guest (ACPI 6.4, table 15.10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Kind {
    Ram = 1,
    Reserved = 2,
}

/// The memory map as firmware would report it: `(start, length, kind)`, ascending and without overlap.
pub fn e820(memory: &GuestMemory) -> Vec<(u64, u64, E820Kind)> {
    let mut map = vec![
        (0, BASE_MEMORY_END, E820Kind::Ram),
        (
            BASE_MEMORY_END,
            0xa_0000 - BASE_MEMORY_END,
            E820Kind::Reserved,
        ),
        (ACPI_START, ACPI_END - ACPI_START, E820Kind::Reserved),
        (KERNEL_FLOOR, low_end(memory) - KERNEL_FLOOR, E820Kind::Ram),
        (PCI_ECAM_START, PCI_ECAM_LEN, E820Kind::Reserved),
    ];
    for (start, len) in ranges(memory) {
        if start >= HIGH_RAM_START {
            map.push((start, len, E820Kind::Ram));
        }
    }
    map
}

/// Guest memory as a device reaches it: every range is checked, and writes are told to the CPUs, whose
/// translated code may come from there. It reaches RAM alone, never another device's registers.
#[derive(Clone)]
pub struct Dma {
    memory: Arc<GuestMemory>,
    vm: Arc<dyn Vm>,
}

impl Dma {
    pub fn new(memory: Arc<GuestMemory>, vm: Arc<dyn Vm>) -> Dma {
        Dma { memory, vm }
    }

    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Copies guest memory out.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let len = data.len() as u64;
        self.memory
            .read_slice(data, GuestAddress(address))
            .map_err(|_| MemoryError::Outside { address, len })
    }

    /// Copies into guest memory.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), MemoryError> {
        let len = data.len() as u64;
        self.memory
            .write_slice(data, GuestAddress(address))
            .map_err(|_| MemoryError::Outside { address, len })?;
        self.vm.memory_written(address, len);
        Ok(())
    }

    pub fn read_u16(&self, address: u64) -> Result<u16, MemoryError> {
        let mut bytes = [0; 2];
        self.read(address, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    pub fn read_u32(&self, address: u64) -> Result<u32, MemoryError> {
        let mut bytes = [0; 4];
        self.read(address, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Writes four bytes at once, after everything written before: what a guest polls on.
    ///
    /// # Errors
    /// [`MemoryError::Outside`] where they are not aligned RAM.
    pub fn store_u32(&self, address: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let outside = MemoryError::Outside { address, len: 4 };
        let Ok(bytes) = <[u8; 4]>::try_from(bytes) else {
            return Err(outside);
        };
        self.memory
            .store(
                u32::from_le_bytes(bytes).to_le(),
                GuestAddress(address),
                Ordering::Release,
            )
            .map_err(|_| outside)?;
        self.vm.memory_written(address, 4);
        Ok(())
    }

    /// A range as host memory, for system calls that fill or drain it; call [`Dma::written`] after filling.
    ///
    /// # Errors
    /// [`MemoryError::Outside`] where the range is not within one piece of RAM.
    pub fn slice(&self, address: u64, len: usize) -> Result<VolatileSlice<'_, ()>, MemoryError> {
        GuestMemoryBackend::get_slice(&*self.memory, GuestAddress(address), len).map_err(|_| {
            MemoryError::Outside {
                address,
                len: len as u64,
            }
        })
    }

    /// Several ranges as host memory; see [`Dma::slice`].
    ///
    /// # Errors
    /// As [`Dma::slice`].
    pub fn slices(
        &self,
        pieces: &[(u64, usize)],
    ) -> Result<Vec<VolatileSlice<'_, ()>>, MemoryError> {
        pieces
            .iter()
            .map(|(address, len)| self.slice(*address, *len))
            .collect()
    }

    /// Tells the CPUs of a write through [`Dma::slice`].
    pub fn written(&self, address: u64, len: u64) {
        self.vm.memory_written(address, len);
    }
}

/// System calls that move data between a descriptor and guest memory, without a copy in between.
pub mod vectored {
    use std::os::fd::{AsRawFd, BorrowedFd};

    use rustix::io::Errno;
    use vm_memory::VolatileSlice;

    /// Pieces of one call: Linux takes 1,024.
    const LIMIT: usize = 1024;

    fn vectors<'a>(slices: impl Iterator<Item = VolatileSlice<'a>>) -> Vec<libc::iovec> {
        slices
            .take(LIMIT)
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect()
    }

    fn counted(result: isize) -> Result<usize, Errno> {
        usize::try_from(result).map_err(|_| {
            Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
        })
    }

    /// Reads once into `slices`; how much came.
    pub fn read<'a>(
        fd: BorrowedFd<'_>,
        slices: impl Iterator<Item = VolatileSlice<'a>>,
    ) -> Result<usize, Errno> {
        let vectors = vectors(slices);
        // SAFETY: each vector is memory that a volatile slice lends for `'a`, which outlives the call; the kernel writes
        // it as another CPU of the guest might, which is what volatile slices are for.
        counted(unsafe { libc::readv(fd.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32) })
    }

    /// Writes `slices` once; how much was taken.
    pub fn write<'a>(
        fd: BorrowedFd<'_>,
        slices: impl Iterator<Item = VolatileSlice<'a>>,
    ) -> Result<usize, Errno> {
        let vectors = vectors(slices);
        // SAFETY: as for reading; the kernel only reads it.
        counted(unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_past_three_gibibytes_continues_at_four() {
        let memory = allocate(5 << 30).unwrap();
        assert_eq!(
            ranges(&memory),
            [(0, LOW_RAM_END), (HIGH_RAM_START, 2 << 30)]
        );
        let map = e820(&memory);
        assert!(
            map.windows(2)
                .all(|pair| pair[0].0 + pair[0].1 <= pair[1].0),
            "{map:x?}"
        );
        assert_eq!(window64(&memory).start, PCI_WINDOW64_FLOOR);
    }

    #[test]
    fn a_size_nobody_can_boot_is_refused() {
        assert!(matches!(allocate(4096), Err(MemoryError::Size(4096))));
        assert!(matches!(
            allocate((64 << 20) + 1),
            Err(MemoryError::Size(_))
        ));
    }
}
