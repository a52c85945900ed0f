//! The guest's two address spaces, memory-mapped and port I/O, as sorted lists of ranges.
//!
//! Lock order: the list's lock is only held while a range is looked up or changed, never while a device is
//! called. A device may therefore move its own range (a PCI BAR) from inside a write.

use std::sync::{Arc, PoisonError, RwLock};

/// Something that answers at a range of addresses. Called from every CPU thread at once.
///
/// `offset` counts from the start of the range; `data` is 1, 2, 4 or 8 bytes, little endian, and lies within
/// the range.
pub trait BusDevice: Send + Sync {
    /// Fills `data`; where there is no register, all ones or zeros, as the device's specification says.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data`; a write to no register does nothing.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A range could not be given to a device.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    #[error("the range {base:#x}+{len:#x} is taken or empty")]
    Taken { base: u64, len: u64 },
}

struct Range {
    base: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// One address space.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<Vec<Range>>,
}

impl Bus {
    pub fn new() -> Bus {
        Bus::default()
    }

    /// Gives `[base, base + len)` to `device`.
    ///
    /// # Errors
    /// [`BusError::Taken`] where it overlaps another range, is empty or wraps.
    pub fn insert(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let taken = BusError::Taken { base, len };
        let Some(end) = base.checked_add(len).filter(|_| len > 0) else {
            return Err(taken);
        };
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let at = ranges.partition_point(|range| range.base < base);
        if at > 0 && ranges[at - 1].base + ranges[at - 1].len > base {
            return Err(taken);
        }
        if ranges.get(at).is_some_and(|next| next.base < end) {
            return Err(taken);
        }
        ranges.insert(at, Range { base, len, device });
        Ok(())
    }

    /// Takes the range that starts at `base` away; false where there is none.
    pub fn remove(&self, base: u64) -> bool {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        match ranges.binary_search_by_key(&base, |range| range.base) {
            Ok(at) => {
                ranges.remove(at);
                true
            }
            Err(_) => false,
        }
    }

    /// Takes every range away.
    pub fn clear(&self) {
        // Dropped outside of the lock: a device may look at the bus while it goes.
        let ranges =
            std::mem::take(&mut *self.ranges.write().unwrap_or_else(PoisonError::into_inner));
        drop(ranges);
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let at = ranges
            .partition_point(|range| range.base <= address)
            .checked_sub(1)?;
        let range = &ranges[at];
        let offset = address - range.base;
        (offset.checked_add(len as u64)? <= range.len).then(|| (offset, range.device.clone()))
    }

    /// Reads; nothing at the address gives all ones and false.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes; false where nothing is at the address.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }
}

/// The low bytes of `value`, as many as `data` holds; the rest becomes zero.
pub fn put(data: &mut [u8], value: u64) {
    let bytes = value.to_le_bytes();
    for (to, from) in data
        .iter_mut()
        .zip(bytes.iter().chain(std::iter::repeat(&0)))
    {
        *to = *from;
    }
}

/// `data` as a little-endian number; bytes past the eighth are ignored.
pub fn get(data: &[u8]) -> u64 {
    let mut bytes = [0u8; 8];
    for (to, from) in bytes.iter_mut().zip(data) {
        *to = *from;
    }
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Echo(u8);
    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0.wrapping_add(offset as u8));
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }

    #[test]
    fn an_access_across_the_end_of_a_range_reads_all_ones() {
        let bus = Bus::new();
        bus.insert(0x100, 4, Arc::new(Echo(7))).unwrap();
        let mut data = [0u8; 4];
        assert!(bus.read(0x100, &mut data) && data == [7; 4]);
        assert!(!bus.read(0x102, &mut data) && data == [0xff; 4]);
        assert!(!bus.read(u64::MAX, &mut data));
        assert!(bus.remove(0x100) && !bus.write(0x100, &data));
    }

    proptest! {
        #[test]
        fn ranges_never_overlap_and_lookups_agree(inserts in prop::collection::vec((0u64..64, 0u64..16), 0..20)) {
            let bus = Bus::new();
            let mut owner = [None; 96];
            for (n, (base, len)) in inserts.into_iter().enumerate() {
                let free = len > 0 && (base..base + len).all(|a| owner[a as usize].is_none());
                prop_assert_eq!(bus.insert(base, len, Arc::new(Echo(0))).is_ok(), free);
                if free {
                    (base..base + len).for_each(|a| owner[a as usize] = Some(n));
                }
            }
            for address in 0..96u64 {
                prop_assert_eq!(bus.read(address, &mut [0]), owner[address as usize].is_some());
            }
        }
    }
}
