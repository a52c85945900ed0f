//! Guest memory as Rust code of this crate reaches it: by guest-virtual address with precise faults.
//!
//! Accesses that cross a page are checked on both pages before the first byte moves.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::state::{Access, Cpu, Fault, Rights};

/// Plain integers that guest memory holds, little-endian.
pub trait Scalar: Copy + Default + 'static {
    const SIZE: usize;
    fn from_bytes(bytes: &[u8]) -> Self;
    fn to_bytes(self, out: &mut [u8]);
    /// Compare-and-swap at an aligned host address.
    ///
    /// # Safety
    /// `at` is valid for reads and writes of `SIZE` bytes and aligned to it.
    unsafe fn compare_exchange(at: *mut u8, old: Self, new: Self) -> Result<Self, Self>;
}

macro_rules! scalar {
    ($($t:ty, $a:ty);*) => {$(
        impl Scalar for $t {
            const SIZE: usize = size_of::<$t>();
            fn from_bytes(bytes: &[u8]) -> Self {
                let mut b = [0u8; size_of::<$t>()];
                b.copy_from_slice(&bytes[..size_of::<$t>()]);
                <$t>::from_le_bytes(b)
            }
            fn to_bytes(self, out: &mut [u8]) {
                out[..size_of::<$t>()].copy_from_slice(&self.to_le_bytes());
            }
            unsafe fn compare_exchange(at: *mut u8, old: Self, new: Self) -> Result<Self, Self> {
                // SAFETY: the caller's promise; guest memory is only ever reached by atomic or volatile accesses.
                let atomic = unsafe { <$a>::from_ptr(at.cast()) };
                atomic.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
            }
        }
    )*};
}
scalar!(u8, AtomicU8; u16, AtomicU16; u32, AtomicU32; u64, AtomicU64);

/// Where a guest page leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// RAM: the host address of the byte asked for.
    Ram(*mut u8),
    /// Anything else: its guest-physical address.
    Device(u64),
}

const PAGE: u64 = 4096;

impl Cpu {
    /// Finds the byte at `va` for an access of its page (accessed and dirty bits are set as the walk demands).
    /// For a `Write`, translated code of the page is dropped first: the caller does write.
    pub fn place(&mut self, va: u64, access: Access, rights: Rights) -> Result<Place, Fault> {
        let gpa = crate::system::paging::walk(self, va, access, rights)?.gpa;
        match self.machine.ram_at(gpa) {
            Some(host) => {
                if access == Access::Write {
                    self.note_store(gpa);
                }
                Ok(Place::Ram(host))
            }
            None => Ok(Place::Device(gpa)),
        }
    }

    /// Reads a scalar.
    pub fn read<T: Scalar>(&mut self, va: u64, rights: Rights) -> Result<T, Fault> {
        let mut bytes = [0u8; 8];
        self.read_bytes(va, &mut bytes[..T::SIZE], rights)?;
        Ok(T::from_bytes(&bytes))
    }

    /// Writes a scalar.
    pub fn write<T: Scalar>(&mut self, va: u64, value: T, rights: Rights) -> Result<(), Fault> {
        let mut bytes = [0u8; 8];
        value.to_bytes(&mut bytes);
        self.write_bytes(va, &bytes[..T::SIZE], rights)
    }

    /// Alignment checks and data breakpoints, of accesses that the guest's program makes.
    fn look(&mut self, va: u64, len: usize, write: bool, rights: Rights) -> Result<(), Fault> {
        if rights != Rights::Current {
            return Ok(());
        }
        if self.debug.watches {
            self.watch(va, len as u64, write);
        }
        if matches!(len, 2 | 4 | 8) && !va.is_multiple_of(len as u64) && self.alignment_checked() {
            return Err(Fault::AC);
        }
        Ok(())
    }

    /// Reads `out.len()` bytes (at most one page); faults before anything is read from a device.
    pub fn read_bytes(&mut self, va: u64, out: &mut [u8], rights: Rights) -> Result<(), Fault> {
        self.look(va, out.len(), false, rights)?;
        let first = ((PAGE - (va & (PAGE - 1))) as usize).min(out.len());
        let a = self.place(va, Access::Read, rights)?;
        let b = if first < out.len() {
            Some(self.place(va.wrapping_add(first as u64), Access::Read, rights)?)
        } else {
            None
        };
        self.read_place(a, &mut out[..first]);
        if let Some(b) = b {
            self.read_place(b, &mut out[first..]);
        }
        Ok(())
    }

    /// Writes `data` (at most one page); faults before the first byte is written.
    pub fn write_bytes(&mut self, va: u64, data: &[u8], rights: Rights) -> Result<(), Fault> {
        self.look(va, data.len(), true, rights)?;
        let first = ((PAGE - (va & (PAGE - 1))) as usize).min(data.len());
        let a = self.place(va, Access::Write, rights)?;
        let b = if first < data.len() {
            Some(self.place(va.wrapping_add(first as u64), Access::Write, rights)?)
        } else {
            None
        };
        self.write_place(a, &data[..first]);
        if let Some(b) = b {
            self.write_place(b, &data[first..]);
        }
        Ok(())
    }

    /// Compare-and-swap; `Ok(Err(found))` where another value was found. Not atomic on devices.
    pub fn compare_exchange<T: Scalar + PartialEq>(
        &mut self,
        va: u64,
        old: T,
        new: T,
        rights: Rights,
    ) -> Result<Result<T, T>, Fault> {
        if va.is_multiple_of(T::SIZE as u64)
            && let Place::Ram(at) = self.place(va, Access::Write, rights)?
        {
            // SAFETY: `at` is in guest RAM, aligned as va is (pages are aligned), inside one page.
            let done = unsafe { T::compare_exchange(at, old, new) };
            self.stored(at);
            return Ok(done);
        }
        self.write_probe(va, T::SIZE, rights)?;
        // A block of one instruction may be alone already, until what it bounced is written.
        let nested = self.alone;
        self.be_alone();
        let done = self.read(va, rights).and_then(|found: T| {
            self.write(va, if found == old { new } else { found }, rights)?;
            Ok(found)
        });
        if !nested {
            self.end_alone();
        }
        let found = done?;
        Ok(if found == old { Ok(found) } else { Err(found) })
    }

    /// Raises the fault a write of `len` bytes at `va` would raise, without writing.
    pub fn write_probe(&mut self, va: u64, len: usize, rights: Rights) -> Result<(), Fault> {
        self.place(va, Access::Write, rights)?;
        let last = va.wrapping_add(len as u64 - 1);
        if (va ^ last) & !(PAGE - 1) != 0 {
            self.place(last, Access::Write, rights)?;
        }
        Ok(())
    }

    pub(crate) fn read_place(&mut self, place: Place, out: &mut [u8]) {
        match place {
            // SAFETY: `place` answers addresses inside guest RAM and callers stay inside the page.
            Place::Ram(at) => unsafe { load(at, out) },
            Place::Device(gpa) => self.device_read(gpa, out),
        }
    }

    pub(crate) fn write_place(&mut self, place: Place, data: &[u8]) {
        match place {
            Place::Ram(at) => {
                // SAFETY: as in `read_place`.
                unsafe { store(at, data) };
                self.stored(at);
            }
            Place::Device(gpa) => self.device_write(gpa, data),
        }
    }

    /// Behind a store by Rust code to the page of `at`: another CPU may have translated the old bytes between the look at
    /// the code bits ([`Cpu::place`]) and the store, and must drop that.
    pub(crate) fn stored(&mut self, at: *const u8) {
        if self.machine.vcpus < 2 {
            return;
        }
        // Whoever translates sets the bits before it reads the bytes.
        std::sync::atomic::fence(Ordering::SeqCst);
        if let Some(gpa) = self.machine.gpa_of(at) {
            self.note_store(gpa);
        }
    }

    /// Reads guest-physical memory or a device; nothing there reads as all ones.
    pub fn physical_read<T: Scalar>(&mut self, gpa: u64) -> T {
        let mut bytes = [0u8; 8];
        match self.machine.ram_at(gpa) {
            // SAFETY: in RAM; an aligned scalar does not leave its page.
            Some(at) if gpa % PAGE + T::SIZE as u64 <= PAGE => unsafe {
                load(at, &mut bytes[..T::SIZE])
            },
            _ => self.device_read(gpa, &mut bytes[..T::SIZE]),
        }
        T::from_bytes(&bytes)
    }

    /// Writes guest-physical memory or a device.
    pub fn physical_write<T: Scalar>(&mut self, gpa: u64, value: T) {
        let mut bytes = [0u8; 8];
        value.to_bytes(&mut bytes);
        match self.machine.ram_at(gpa) {
            Some(at) if gpa % PAGE + T::SIZE as u64 <= PAGE => {
                self.note_store(gpa);
                // SAFETY: as in `physical_read`.
                unsafe { store(at, &bytes[..T::SIZE]) };
                self.stored(at);
            }
            _ => self.device_write(gpa, &bytes[..T::SIZE]),
        }
    }

    /// The bus. Without a run loop (unit tests) reads give all ones.
    fn device_read(&mut self, gpa: u64, out: &mut [u8]) {
        if crate::system::apic_read(self, gpa, out) {
            return;
        }
        let Some(io) = self.io() else {
            out.fill(0xff);
            return;
        };
        for (address, chunk) in chunks(gpa, out.len()) {
            io.mmio_read(address, &mut out[(address - gpa) as usize..][..chunk]);
        }
    }

    fn device_write(&mut self, gpa: u64, data: &[u8]) {
        if crate::system::apic_write(self, gpa, data) {
            return;
        }
        let Some(io) = self.io() else { return };
        for (address, chunk) in chunks(gpa, data.len()) {
            io.mmio_write(address, &data[(address - gpa) as usize..][..chunk]);
        }
    }

    /// The bus of the run that is under way.
    pub fn io(&mut self) -> Option<&mut (dyn cpu::CpuIo + 'static)> {
        // SAFETY: set by the run loop for the time of its own exclusive borrow, cleared when it returns.
        self.io.map(|p| unsafe { &mut *p })
    }
}

/// Cuts an access into naturally sized pieces of 1, 2, 4 or 8 bytes.
fn chunks(start: u64, len: usize) -> impl Iterator<Item = (u64, usize)> {
    let end = start + len as u64;
    let mut at = start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let mut size = 8u64;
        while size > end - at {
            size /= 2;
        }
        let piece = (at, size as usize);
        at += size;
        Some(piece)
    })
}

/// Reads guest RAM that other CPUs may be writing.
///
/// # Safety
/// `at..at+out.len()` lies inside guest RAM.
unsafe fn load(at: *const u8, out: &mut [u8]) {
    // SAFETY: the caller's promise; volatile because other threads write guest memory.
    unsafe {
        match out.len() {
            1 => out[0] = at.read_volatile(),
            2 if at.cast::<u16>().is_aligned() => {
                out.copy_from_slice(&at.cast::<u16>().read_volatile().to_le_bytes())
            }
            4 if at.cast::<u32>().is_aligned() => {
                out.copy_from_slice(&at.cast::<u32>().read_volatile().to_le_bytes())
            }
            8 if at.cast::<u64>().is_aligned() => {
                out.copy_from_slice(&at.cast::<u64>().read_volatile().to_le_bytes())
            }
            n => std::ptr::copy_nonoverlapping(at, out.as_mut_ptr(), n),
        }
    }
}

/// Writes guest RAM that other CPUs may be reading.
///
/// # Safety
/// As [`load`].
unsafe fn store(at: *mut u8, data: &[u8]) {
    // SAFETY: as in `load`.
    unsafe {
        match data.len() {
            1 => at.write_volatile(data[0]),
            2 if at.cast::<u16>().is_aligned() => {
                at.cast::<u16>().write_volatile(u16::from_bytes(data))
            }
            4 if at.cast::<u32>().is_aligned() => {
                at.cast::<u32>().write_volatile(u32::from_bytes(data))
            }
            8 if at.cast::<u64>().is_aligned() => {
                at.cast::<u64>().write_volatile(u64::from_bytes(data))
            }
            n => std::ptr::copy_nonoverlapping(data.as_ptr(), at, n),
        }
    }
}
