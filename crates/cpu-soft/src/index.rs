//! Which block begins where: by guest-physical page, then by the address it is seen at and mode, then by offset. What one run
//! of guest code looks for lies together, and whatever lies in one page is found at once when the page is written.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::cache::Key;

/// The multiply-rotate hash of rustc, enough for addresses.
#[derive(Default)]
pub struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u64(u64::from(*b));
        }
    }
    fn write_u64(&mut self, v: u64) {
        self.0 = (self.0.rotate_left(5) ^ v).wrapping_mul(0x517c_c1b7_2722_0a95);
        self.0 ^= self.0 >> 29;
    }
}

type AddressMap<K, V> = HashMap<K, V, BuildHasherDefault<AddressHasher>>;

/// Where the blocks of one code cache begin.
#[derive(Default)]
pub struct Index {
    pages: AddressMap<u64, Page>,
}

#[derive(Default)]
struct Page {
    /// The one used last is first.
    views: Vec<View>,
    /// Blocks that begin in the page before and end in this one.
    tails: Vec<u32>,
}

/// A page as one address space sees it in one mode.
struct View {
    page: u64,
    mode: u8,
    used: u32,
    /// Open addressing by offset; a slot is offset << 32 | number.
    slots: Vec<u64>,
}

const FREE: u64 = u64::MAX;

impl View {
    fn at(&self, offset: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = (offset.wrapping_mul(0x9e37_79b1) >> 7) as usize & mask;
        while self.slots[at] != FREE && self.slots[at] >> 32 != offset {
            at = (at + 1) & mask;
        }
        at
    }

    fn find(&self, offset: u64) -> Option<u32> {
        let slot = self.slots[self.at(offset)];
        (slot != FREE).then_some(slot as u32)
    }

    fn insert(&mut self, offset: u64, number: u32) {
        if (self.used as usize + 1) * 2 > self.slots.len() {
            self.rebuild(self.slots.len() * 2, |_| true);
        }
        let at = self.at(offset);
        self.used += u32::from(self.slots[at] == FREE);
        self.slots[at] = offset << 32 | u64::from(number);
    }

    fn rebuild(&mut self, size: usize, mut keep: impl FnMut(u32) -> bool) {
        let old = std::mem::replace(&mut self.slots, vec![FREE; size]);
        self.used = 0;
        for slot in old {
            if slot != FREE && keep(slot as u32) {
                let at = self.at(slot >> 32);
                self.slots[at] = slot;
                self.used += 1;
            }
        }
    }
}

impl Index {
    fn position(page: &Page, key: &Key) -> Option<usize> {
        page.views
            .iter()
            .position(|v| v.page == key.rip >> 12 && v.mode == key.mode)
    }

    pub fn find(&self, key: &Key) -> Option<u32> {
        let page = self.pages.get(&(key.gpa >> 12))?;
        page.views[Index::position(page, key)?].find(key.gpa & 0xfff)
    }

    /// As [`Index::find`]; the next look-up in the same view is quicker.
    pub fn find_next(&mut self, key: &Key) -> Option<u32> {
        let page = self.pages.get_mut(&(key.gpa >> 12))?;
        let n = Index::position(page, key)?;
        page.views.swap(0, n);
        page.views[0].find(key.gpa & 0xfff)
    }

    /// Blocks of the same code as seen at other addresses.
    pub fn elsewhere(&self, key: &Key) -> impl Iterator<Item = u32> {
        let views = self.pages.get(&(key.gpa >> 12)).map(|page| &page.views);
        let (mode, offset) = (key.mode, key.gpa & 0xfff);
        views
            .into_iter()
            .flatten()
            .filter(move |v| v.mode == mode)
            .filter_map(move |v| v.find(offset))
    }

    /// `tail`: the page its last bytes lie in, where that is another.
    pub fn insert(&mut self, key: &Key, tail: Option<u64>, number: u32) {
        let page = self.pages.entry(key.gpa >> 12).or_default();
        let n = Index::position(page, key).unwrap_or_else(|| {
            page.views.push(View {
                page: key.rip >> 12,
                mode: key.mode,
                used: 0,
                slots: vec![FREE; 8],
            });
            page.views.len() - 1
        });
        page.views.swap(0, n);
        page.views[0].insert(key.gpa & 0xfff, number);
        if let Some(tail) = tail {
            self.pages.entry(tail >> 12).or_default().tails.push(number);
        }
    }

    /// Takes the blocks out of the page of `gpa` for which `goes` says so.
    pub fn take(&mut self, gpa: u64, mut goes: impl FnMut(u32) -> bool) -> Vec<u32> {
        let mut gone = Vec::new();
        let Some(page) = self.pages.get_mut(&(gpa >> 12)) else {
            return gone;
        };
        let mut keep = |n: u32| {
            let goes = goes(n);
            if goes {
                gone.push(n);
            }
            !goes
        };
        page.tails.retain(|n| keep(*n));
        for view in &mut page.views {
            view.rebuild(view.slots.len(), &mut keep);
        }
        page.views.retain(|v| v.used != 0);
        if page.views.is_empty() && page.tails.is_empty() {
            self.pages.remove(&(gpa >> 12));
        }
        gone
    }

    pub fn clear(&mut self) {
        self.pages.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_found_by_place_address_and_mode_until_they_are_taken_out() {
        let mut index = Index::default();
        let key = |n: u64, view: u64, mode: u8| Key {
            gpa: 0x5000 | (n * 7),
            rip: (view << 12) | (n * 7),
            mode,
        };
        for n in 0..300 {
            index.insert(&key(n, 1, 0), None, n as u32);
            index.insert(&key(n, 2, 0), None, 1000 + n as u32);
        }
        index.insert(&key(3, 1, 4), Some(0x6000), 5000);
        for n in 0..300 {
            assert_eq!(index.find(&key(n, 1, 0)), Some(n as u32));
            assert_eq!(index.find_next(&key(n, 2, 0)), Some(1000 + n as u32));
        }
        assert_eq!(index.find(&key(3, 1, 4)), Some(5000));
        assert_eq!(index.find(&key(4, 1, 4)), None);
        let mut both: Vec<_> = index.elsewhere(&key(9, 77, 0)).collect();
        both.sort();
        assert_eq!(both, [9, 1009]);
        assert_eq!(index.take(0x6000, |_| true), [5000]);
        let mut gone = index.take(0x5000, |n| n < 2000 && n % 1000 < 100);
        gone.sort();
        assert_eq!(gone.len(), 200);
        assert_eq!(index.find(&key(99, 2, 0)), None);
        assert_eq!(index.find(&key(100, 2, 0)), Some(1100));
        index.insert(&key(99, 2, 0), None, 42);
        assert_eq!(index.find(&key(99, 2, 0)), Some(42));
        assert_eq!(index.find(&key(3, 1, 4)), Some(5000));
    }
}
