//! Where in memory a static program lies, chosen once for the copy of it that is kept in /run.
//!
//! A position-independent program is relocated by itself each time it starts: it writes to a page in three of the small
//! one's data, which is copied for that. Here the addresses are written into the file once. They are chosen at random
//! for each host and boot, so that they stay unknown to who would need them.

use std::ops::Range;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const TYPE_FIXED: u16 = 2; // ET_EXEC
const TYPE_ANYWHERE: u16 = 3; // ET_DYN
const LOAD: u32 = 1;
const DYNAMIC: u32 = 2;
const INTERPRETER: u32 = 3;
const RELR_SIZE: u64 = 35;
const RELR: u64 = 36;

/// Lays the 64-bit little-endian static ELF program `image` at `base`, a page's address: its packed relocations
/// (`DT_RELR`) are applied, and its segments are told to the kernel as fixed. The addresses that its own start-up code
/// goes by, in all other headers and in the dynamic section, stay relative to where it finds itself.
///
/// `None`, with the image as it was, where it is not of that kind.
pub fn fix(image: &mut [u8], base: u64) -> Option<()> {
    let magic = image.get(..6)? == b"\x7fELF\x02\x01";
    if !magic || read::<2>(image, 16)? != u64::from(TYPE_ANYWHERE) {
        return None;
    }
    let headers = read::<8>(image, 32)? as usize;
    let count = read::<2>(image, 56)? as usize;
    let mut segments: Vec<(usize, Range<u64>, u64)> = Vec::with_capacity(count);
    let mut dynamic = None;
    for at in (0..count).map(|number| headers.saturating_add(number * PROGRAM_HEADER)) {
        let offset = read::<8>(image, at.checked_add(8)?)?;
        let address = read::<8>(image, at.checked_add(16)?)?;
        let length = read::<8>(image, at.checked_add(32)?)?;
        match read::<4>(image, at)? as u32 {
            LOAD => segments.push((at, address..address.checked_add(length)?, offset)),
            DYNAMIC => dynamic = Some((offset as usize, length as usize)),
            INTERPRETER => return None,
            _ => {}
        }
    }
    let place = |address: u64| {
        let (_, range, offset) = segments.iter().find(|it| it.1.contains(&address))?;
        usize::try_from(address - range.start + offset).ok()
    };
    let (start, length) = dynamic?;
    let (mut table, mut size, mut size_at) = (None, 0, 0);
    for at in (0..length / 16).map(|number| start.saturating_add(number * 16)) {
        let value = read::<8>(image, at.checked_add(8)?)?;
        match read::<8>(image, at)? {
            RELR => table = Some(value),
            RELR_SIZE => (size, size_at) = (value as usize, at + 8),
            _ => {}
        }
    }
    let table = place(table?)?;
    let entries = image.get(table..table.checked_add(size)?)?.to_vec();
    let mut words = Vec::new();
    for address in relocated(&entries) {
        let at = place(address)?;
        let value = read::<8>(image, at)?.checked_add(base)?;
        words.push((at, value));
    }
    let entry = read::<8>(image, 24)?.checked_add(base)?;
    for (_, range, _) in &segments {
        range.end.checked_add(base)?;
    }
    // From here on nothing fails.
    for (at, value) in words {
        write(image, at, &value.to_le_bytes());
    }
    for (at, range, _) in &segments {
        let address = (range.start + base).to_le_bytes();
        write(image, at + 16, &address);
        write(image, at + 24, &address);
    }
    write(image, size_at, &0u64.to_le_bytes());
    write(image, 24, &entry.to_le_bytes());
    write(image, 16, &TYPE_FIXED.to_le_bytes());
    debug_assert!(image.len() >= HEADER);
    Some(())
}

/// A base for this boot: 34 random bits of a page's address, below where the kernel puts stacks and libraries.
pub fn random_base() -> Option<u64> {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer is as long as is said.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    let random = u64::from_le_bytes(bytes) & ((1 << 34) - 1);
    (got == bytes.len() as isize).then_some(0x1000_0000_0000 + (random << 12))
}

/// The addresses a table of packed relocations names: an even entry is one, an odd entry is a map of the 63 words that
/// follow what has been named.
fn relocated(table: &[u8]) -> Vec<u64> {
    let mut addresses = Vec::new();
    let mut next = 0u64;
    for entry in table.chunks_exact(8) {
        let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
        if entry & 1 == 0 {
            addresses.push(entry);
            next = entry.wrapping_add(8);
        } else {
            let set = (0..63).filter(|bit| entry >> (bit + 1) & 1 == 1);
            addresses.extend(set.map(|bit| next.wrapping_add(bit * 8)));
            next = next.wrapping_add(63 * 8);
        }
    }
    addresses
}

/// The number in the `N` bytes at `at`.
fn read<const N: usize>(image: &[u8], at: usize) -> Option<u64> {
    let mut bytes = [0u8; 8];
    bytes[..N].copy_from_slice(image.get(at..at.checked_add(N)?)?);
    Some(u64::from_le_bytes(bytes))
}

fn write(image: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = image.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BASE: u64 = 0x1234_5678_9000;

    /// Two segments, the second at another address than its place in the file, with a dynamic section, a table of
    /// relocations in the first, and 80 words in the second of which some are addresses.
    fn program() -> Vec<u8> {
        let mut image = vec![0u8; 0x1000 + 80 * 8];
        let mut put = |at: usize, value: u64, length: usize| {
            image[at..at + length].copy_from_slice(&value.to_le_bytes()[..length]);
        };
        put(0, 0x0001_0102_464c_457f, 8);
        put(16, 3, 2);
        put(24, 0x80, 8);
        put(32, 64, 8);
        put(56, 3, 2);
        let segments = [
            (1, 0, 0, 0x1000),
            (1, 0x1000, 0x3000, 80 * 8),
            (2, 0x200, 0x200, 48),
        ];
        for (number, (kind, offset, address, length)) in segments.into_iter().enumerate() {
            let at = 64 + number * 56;
            put(at, kind, 4);
            put(at + 8, offset, 8);
            put(at + 16, address, 8);
            put(at + 32, length, 8);
        }
        for (number, word) in [RELR, 0x300, RELR_SIZE, 24, 0, 0].into_iter().enumerate() {
            put(0x200 + number * 8, word, 8);
        }
        // The word at 0x3000; those 1 and 63 behind it; the one after these.
        for (number, word) in [0x3000, 1 | 1 << 1 | 1 << 63, 0b11].into_iter().enumerate() {
            put(0x300 + number * 8, word, 8);
        }
        for word in 0..80 {
            put(0x1000 + word * 8, word as u64, 8);
        }
        image
    }

    #[test]
    fn addresses_are_written_once_and_other_words_stay() {
        let mut image = program();
        fix(&mut image, BASE).unwrap();
        for word in 0..80u64 {
            let moved = [0, 1, 63, 64].contains(&word);
            let wanted = if moved { word + BASE } else { word };
            assert_eq!(read::<8>(&image, 0x1000 + word as usize * 8), Some(wanted));
        }
        assert_eq!(read::<2>(&image, 16), Some(2));
        assert_eq!(read::<8>(&image, 24), Some(0x80 + BASE));
        let address = |number: usize| read::<8>(&image, 64 + number * 56 + 16);
        assert_eq!(address(0), Some(BASE));
        assert_eq!(address(1), Some(BASE + 0x3000));
        assert_eq!(address(2), Some(0x200));
        assert_eq!(
            read::<8>(&image, 0x200 + 24),
            Some(0),
            "they are not to be applied again"
        );
        let once = image.clone();
        assert_eq!(fix(&mut image, BASE), None);
        assert_eq!(image, once);
    }

    #[test]
    fn a_program_with_an_interpreter_stays_as_it_is() {
        let mut image = std::fs::read("/proc/self/exe").unwrap();
        let before = image.clone();
        assert_eq!(fix(&mut image, BASE), None);
        assert!(image == before);
    }

    #[test]
    fn bases_are_pages_and_differ() {
        let bases = [random_base().unwrap(), random_base().unwrap()];
        assert!(bases[0] != bases[1] && bases.iter().all(|base| base % 4096 == 0));
        assert!(
            bases
                .iter()
                .all(|base| (0x1000_0000_0000..0x5000_0000_0000).contains(base))
        );
    }

    proptest! {
        #[test]
        fn broken_programs_stay_as_they_are(changes in prop::collection::vec((0usize..0x400, any::<u8>()), 1..6), length in 0usize..0x1280) {
            let mut image = program();
            for (at, byte) in changes {
                image[at] = byte;
            }
            image.truncate(length);
            let before = image.clone();
            if fix(&mut image, BASE).is_none() {
                prop_assert_eq!(image, before);
            }
        }
    }
}
