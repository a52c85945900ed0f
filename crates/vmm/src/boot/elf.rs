//! Loading an ELF kernel (System V ABI, AMD64 supplement; PVH entry note as in Xen's `docs/misc/pvh`).

use std::fs::File;
use std::ops::Range;

use cpu::GuestMemory;
use rustix::mm::{MapFlags, ProtFlags, mmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::BootError;
use crate::memory::KERNEL_FLOOR;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_X86_64: u16 = 62;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// Physical address of the 64-bit entry.
    pub entry: u64,
    /// Of the 32-bit PVH entry, where the kernel has one.
    pub pvh_entry: Option<u32>,
    /// First address past the kernel and its zeroed data.
    pub end: u64,
}

/// One loadable piece: `(file offset, bytes in the file, physical address, bytes in memory)`.
type Segment = (usize, usize, u64, u64);

/// What of the headers matters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Headers {
    entry: u64,
    pvh_entry: Option<u32>,
    segments: Vec<Segment>,
}

fn wrong(reason: &'static str) -> BootError {
    BootError::Elf(reason)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(
        bytes.get(at..at.checked_add(2)?)?.try_into().ok()?,
    ))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(
        bytes.get(at..at.checked_add(4)?)?.try_into().ok()?,
    ))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(
        bytes.get(at..at.checked_add(8)?)?.try_into().ok()?,
    ))
}

/// Reads the headers of a 64-bit x86 ELF file.
///
/// # Errors
/// [`BootError::Elf`] where it is not one, or where its pieces do not lie within the file.
pub fn parse(file: &[u8]) -> Result<Headers, BootError> {
    if !file.starts_with(b"\x7fELF\x02\x01") {
        return Err(wrong("it is no 64-bit little-endian ELF file"));
    }
    if u16_at(file, 18) != Some(EM_X86_64) {
        return Err(wrong("it is for another architecture than x86-64"));
    }
    let cut = || wrong("its headers reach past its end");
    let entry = u64_at(file, 24).ok_or_else(cut)?;
    let table = usize::try_from(u64_at(file, 32).ok_or_else(cut)?).map_err(|_| cut())?;
    let size = usize::from(u16_at(file, 54).ok_or_else(cut)?);
    let count = usize::from(u16_at(file, 56).ok_or_else(cut)?);
    if size < 56 {
        return Err(wrong("its program headers are too small"));
    }
    let mut headers = Headers {
        entry,
        pvh_entry: None,
        segments: Vec::new(),
    };
    for index in 0..count {
        let at = table.checked_add(index * size).ok_or_else(cut)?;
        let header = file
            .get(at..at.checked_add(56).ok_or_else(cut)?)
            .ok_or_else(cut)?;
        let field = |offset| u64_at(header, offset).unwrap_or(0);
        let offset = usize::try_from(field(8)).map_err(|_| cut())?;
        let in_file = usize::try_from(field(32)).map_err(|_| cut())?;
        let content = file.get(offset..offset.checked_add(in_file).ok_or_else(cut)?);
        match u32_at(header, 0) {
            Some(PT_LOAD) => {
                content.ok_or_else(cut)?;
                let in_memory = field(40);
                if in_memory < in_file as u64 {
                    return Err(wrong("a segment is larger in the file than in memory"));
                }
                if in_memory > 0 {
                    headers
                        .segments
                        .push((offset, in_file, field(24), in_memory));
                }
            }
            Some(PT_NOTE) => {
                headers.pvh_entry = headers.pvh_entry.or(pvh_note(content.ok_or_else(cut)?));
            }
            _ => {}
        }
    }
    if headers.segments.is_empty() {
        return Err(wrong("it has nothing to load"));
    }
    Ok(headers)
}

fn pvh_note(mut notes: &[u8]) -> Option<u32> {
    loop {
        let name_len = u32_at(notes, 0)? as usize;
        let content_len = u32_at(notes, 4)? as usize;
        let kind = u32_at(notes, 8)?;
        let name = notes.get(12..12usize.checked_add(name_len)?)?;
        let content_at = 12usize.checked_add(name_len.checked_next_multiple_of(4)?)?;
        let content = notes.get(content_at..content_at.checked_add(content_len)?)?;
        if name == b"Xen\0" && kind == XEN_ELFNOTE_PHYS32_ENTRY {
            return u32_at(content, 0);
        }
        notes = notes.get(content_at.checked_add(content_len.checked_next_multiple_of(4)?)?..)?;
    }
}

/// Puts the kernel's segments at their physical addresses. Guest memory must be fresh: what a segment leaves
/// out of the file is taken to be zero there.
///
/// With `pages`, the file that `file` is the content of, whole pages are not copied: they are the guest's until it writes
/// them (`MAP_PRIVATE`). Nobody may change that file.
///
/// # Errors
/// [`BootError::Elf`] for a broken file, [`BootError::NoRoom`] where a segment is not within RAM past 1 MiB.
pub fn load(memory: &GuestMemory, file: &[u8], pages: Option<&File>) -> Result<Loaded, BootError> {
    let headers = parse(file)?;
    let mut end = 0;
    for (offset, in_file, address, in_memory) in headers.segments {
        let past = address
            .checked_add(in_memory)
            .ok_or(wrong("a segment wraps"))?;
        let no_room = || BootError::NoRoom {
            what: "kernel",
            address,
            len: in_memory,
        };
        let within = crate::memory::ranges(memory)
            .iter()
            .any(|(start, len)| address >= (*start).max(KERNEL_FLOOR) && past <= start + len);
        if !within {
            return Err(no_room());
        }
        let mapped = match pages {
            Some(pages) => map_pages(memory, pages, offset, in_file, address),
            None => 0..0,
        };
        for part in [0..mapped.start, mapped.end..in_file] {
            let at = GuestAddress(address + part.start as u64);
            memory
                .write_slice(&file[offset + part.start..offset + part.end], at)
                .map_err(|_| no_room())?;
        }
        end = end.max(past);
    }
    Ok(Loaded {
        entry: headers.entry,
        pvh_entry: headers.pvh_entry,
        end,
    })
}

/// Maps the whole pages of a segment; the part of it that this covers. Empty where pages of the file and of the guest
/// do not lie alike.
fn map_pages(
    memory: &GuestMemory,
    pages: &File,
    offset: usize,
    in_file: usize,
    address: u64,
) -> Range<usize> {
    let page = rustix::param::page_size();
    let before = (address as usize).next_multiple_of(page) - address as usize;
    if in_file < before + page || !(offset + before).is_multiple_of(page) {
        return 0..0;
    }
    let len = (in_file - before) / page * page;
    let Ok(range) = memory.get_slice(GuestAddress(address + before as u64), len) else {
        return 0..0;
    };
    let host = range.ptr_guard_mut().as_ptr();
    if !(host as usize).is_multiple_of(page) {
        return 0..0;
    }
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED;
    // SAFETY: the range is `len` bytes of guest memory, which `memory` owns as one mapping and which nothing but the guest
    // will use; it stays mapped, readable and writable, and goes with the rest of that mapping.
    let done = unsafe {
        mmap(
            host.cast(),
            len,
            protection,
            flags,
            pages,
            (offset + before) as u64,
        )
    };
    match done {
        Ok(_) => before..before + len,
        Err(_) => 0..0,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A minimal kernel: one segment of `code` at `address`, entered at its start both ways.
    pub fn kernel(code: &[u8], address: u64) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(64 + 2 * 56, 0);
        file[16] = 2;
        file[18] = EM_X86_64 as u8;
        file[24..32].copy_from_slice(&address.to_le_bytes());
        file[32] = 64;
        file[54] = 56;
        file[56] = 2;
        let note: Vec<u8> = [4u32, 4, XEN_ELFNOTE_PHYS32_ENTRY]
            .iter()
            .flat_map(|n| n.to_le_bytes())
            .chain(*b"Xen\0")
            .chain((address as u32).to_le_bytes())
            .collect();
        let note_at = file.len() as u64;
        file.extend(&note);
        let code_at = file.len() as u64;
        file.extend(code);
        let header = |kind: u32, at: u64, len: u64| -> Vec<u8> {
            let mut h = kind.to_le_bytes().to_vec();
            h.extend([0; 4]);
            for value in [at, address, address, len, len, 1] {
                h.extend(value.to_le_bytes());
            }
            h
        };
        file[64..120].copy_from_slice(&header(PT_LOAD, code_at, code.len() as u64));
        file[120..176].copy_from_slice(&header(PT_NOTE, note_at, note.len() as u64));
        file
    }

    #[test]
    fn a_kernel_lands_where_it_says() {
        let memory = crate::memory::allocate(16 << 20).unwrap();
        let loaded = load(&memory, &kernel(b"code", 0x20_0000), None).unwrap();
        assert_eq!(
            loaded,
            Loaded {
                entry: 0x20_0000,
                pvh_entry: Some(0x20_0000),
                end: 0x20_0004
            }
        );
        let mut code = [0; 4];
        memory
            .read_slice(&mut code, GuestAddress(0x20_0000))
            .unwrap();
        assert_eq!(&code, b"code");
    }

    #[test]
    fn a_kernel_outside_memory_or_over_the_boot_structures_is_refused() {
        let memory = crate::memory::allocate(16 << 20).unwrap();
        for address in [0x7000, 16 << 20, u64::MAX - 1] {
            assert!(
                load(&memory, &kernel(b"code", address), None).is_err(),
                "{address:#x}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_file_panics(changes in prop::collection::vec((0usize..200, any::<u8>()), 0..12), cut in 0usize..220) {
            let memory = crate::memory::allocate(16 << 20).unwrap();
            let mut file = kernel(b"some code", 0x20_0000);
            for (at, value) in changes {
                let at = at % file.len();
                file[at] = value;
            }
            file.truncate(cut.max(8));
            let _ = load(&memory, &file, None);
        }
    }

    #[test]
    fn a_kernel_whose_pages_are_mapped_is_the_same_as_a_copied_one() {
        use std::io::Write;
        let content: Vec<u8> = (0..50_000u32).map(|n| (n * 7 / 3) as u8).collect();
        let mut elf = kernel(&content, 0x20_0000);
        // Page-aligned in the file as real kernels are.
        let offset = u64::from_le_bytes(elf[72..80].try_into().unwrap()) as usize;
        let padding = offset.next_multiple_of(4096) - offset;
        elf.splice(offset..offset, vec![0; padding]);
        elf[72..80].copy_from_slice(&((offset + padding) as u64).to_le_bytes());
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&elf).unwrap();
        let (copied, mapped) = (
            crate::memory::allocate(16 << 20).unwrap(),
            crate::memory::allocate(16 << 20).unwrap(),
        );
        assert_eq!(
            load(&copied, &elf, None).unwrap(),
            load(&mapped, &elf, Some(&file)).unwrap()
        );
        let read = |memory: &GuestMemory| {
            let mut bytes = vec![0; content.len() + 5000];
            memory
                .read_slice(&mut bytes, GuestAddress(0x20_0000))
                .unwrap();
            bytes
        };
        assert!(read(&copied) == read(&mapped));
        assert!(read(&mapped).starts_with(&content));
        // What the guest writes is its own.
        mapped
            .write_slice(b"changed", GuestAddress(0x20_0000))
            .unwrap();
        let mut again = vec![0; 7];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut again, (offset + padding) as u64)
            .unwrap();
        assert_eq!(again, content[..7]);
    }
}
