//! The first instruction: boot structures in guest memory and the CPU's state, for the two protocols.
//!
//! ```text
//!   0x0500  GDT                         0x6000  PVH start info, module list, memory map
//!   0x7000  zero page (boot_params)     0x9000  page tables: PML4, PDPT, four page directories (4 GiB, 2 MiB pages)
//!   0x2_0000  command line
//! ```

use cpu::GuestMemory;
use cpu::x86::{CpuState, RBP, RBX, RSI, RSP, Segment, TableRegister};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, bzimage};
use crate::memory::{E820Kind, KERNEL_FLOOR, e820, low_end};

const GDT: u64 = 0x500;
const PVH_INFO: u64 = 0x6000;
const ZERO_PAGE: u64 = 0x7000;
const STACK: u64 = 0x8ff0;
const PAGE_TABLES: u64 = 0x9000;
const COMMAND_LINE: u64 = 0x2_0000;
/// Linux's own limit is 2048; others take more.
pub const COMMAND_LINE_LIMIT: usize = 0x1_0000;

/// What both protocols tell the kernel.
pub struct Handover<'a> {
    pub memory: &'a GuestMemory,
    pub command_line: &'a str,
    /// Address and length.
    pub initrd: Option<(u64, u64)>,
    pub rsdp: u64,
}

fn put(memory: &GuestMemory, address: u64, bytes: &[u8]) -> Result<(), BootError> {
    let no_room = |_| BootError::NoRoom {
        what: "boot structures",
        address,
        len: bytes.len() as u64,
    };
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(no_room)
}

fn put_command_line(handover: &Handover<'_>, limit: usize) -> Result<(), BootError> {
    let length = handover.command_line.len();
    let limit = limit.min(COMMAND_LINE_LIMIT - 1);
    if length > limit {
        return Err(BootError::CommandLine { length, limit });
    }
    if handover.command_line.contains('\0') {
        return Err(BootError::CommandLineNul);
    }
    put(
        handover.memory,
        COMMAND_LINE,
        handover.command_line.as_bytes(),
    )?;
    put(handover.memory, COMMAND_LINE + length as u64, &[0])
}

/// Puts the initrd as high in low memory as the kernel allows, page-aligned, and says where.
///
/// # Errors
/// [`BootError::NoRoom`] where it would reach into the kernel.
pub fn place_initrd(
    memory: &GuestMemory,
    initrd: &[u8],
    kernel_end: u64,
    max: u32,
) -> Result<(u64, u64), BootError> {
    let top = low_end(memory).min(u64::from(max) + 1);
    let len = initrd.len() as u64;
    let address = top.checked_sub(len).map(|address| address & !0xfff);
    match address {
        Some(address) if address >= kernel_end.max(KERNEL_FLOOR) => {
            put(memory, address, initrd)?;
            Ok((address, len))
        }
        _ => Err(BootError::NoRoom {
            what: "initrd",
            address: address.unwrap_or(0),
            len,
        }),
    }
}

fn segment(selector: u16, attributes: u16) -> Segment {
    Segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        attributes,
        unusable: false,
    }
}

fn unusable() -> Segment {
    Segment {
        unusable: true,
        ..Segment::default()
    }
}

fn flat_segments(state: &mut CpuState, code: u16) {
    let data = segment(0x18, 0xc093);
    state.segments = [data, segment(0x10, code), data, data, data, data];
    state.tr = Segment {
        base: 0,
        limit: 0x67,
        selector: 0x20,
        attributes: 0x8b,
        unusable: false,
    };
    state.ldtr = unusable();
}

fn put_gdt(memory: &GuestMemory, state: &mut CpuState) -> Result<(), BootError> {
    // null, unused, code (0x10), data (0x18), TSS (0x20, two slots); the code's L and D bits follow the mode.
    let code = &state.segments[1];
    let descriptor = |attributes: u16| -> u64 {
        0xffff
            | u64::from(attributes & 0xff) << 40
            | 0xf << 48
            | u64::from(attributes >> 12 & 0xf) << 52
    };
    let table = [
        0,
        0,
        descriptor(code.attributes),
        descriptor(0xc093),
        0x67 | 0x8b << 40,
        0,
    ];
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    put(memory, GDT, &bytes)?;
    state.gdtr = TableRegister {
        base: GDT,
        limit: (bytes.len() - 1) as u16,
    };
    state.idtr = TableRegister { base: 0, limit: 0 };
    Ok(())
}

/// The 64-bit boot protocol (boot.rst, "64-bit boot protocol"): long mode, identity-mapped, RSI at the zero page.
///
/// # Errors
/// Where the command line is too long or memory too small.
pub fn linux64(
    handover: &Handover<'_>,
    image: Option<&bzimage::BzImage<'_>>,
    entry: u64,
    state: &mut CpuState,
) -> Result<(), BootError> {
    let memory = handover.memory;
    put_command_line(
        handover,
        image.map_or(COMMAND_LINE_LIMIT, |image| image.cmdline_max as usize),
    )?;
    let mut page = vec![0u8; 4096];
    match image {
        Some(image) => page[bzimage::HEADER_AT..bzimage::HEADER_AT + image.header.len()]
            .copy_from_slice(image.header),
        None => {
            // A bare vmlinux has no header of its own: the least that the kernel reads.
            page[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
            page[0x202..0x206].copy_from_slice(b"HdrS");
            page[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
            page[0x211] = 1;
            page[0x230..0x234].copy_from_slice(&0x100_0000u32.to_le_bytes());
        }
    }
    let mut set = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    set(0x070, &handover.rsdp.to_le_bytes());
    // A loader without an assigned id.
    set(0x210, &[0xff]);
    if let Some((address, len)) = handover.initrd {
        set(0x218, &(address as u32).to_le_bytes());
        set(0x21c, &(len as u32).to_le_bytes());
        set(0x0c0, &((address >> 32) as u32).to_le_bytes());
        set(0x0c4, &((len >> 32) as u32).to_le_bytes());
    }
    set(0x228, &(COMMAND_LINE as u32).to_le_bytes());
    let map = e820(memory);
    set(0x1e8, &[map.len() as u8]);
    for (index, (start, len, kind)) in map.iter().enumerate() {
        let at = 0x2d0 + index * 20;
        set(at, &start.to_le_bytes());
        set(at + 8, &len.to_le_bytes());
        set(at + 16, &(*kind as u32).to_le_bytes());
    }
    put(memory, ZERO_PAGE, &page)?;

    let mut tables = vec![0u64; 6 * 512];
    tables[0] = (PAGE_TABLES + 0x1000) | 3;
    for gibibyte in 0..4 {
        tables[512 + gibibyte] = (PAGE_TABLES + 0x2000 + gibibyte as u64 * 0x1000) | 3;
    }
    for page in 0..2048 {
        // Present, writable, 2 MiB.
        tables[1024 + page] = (page as u64) << 21 | 0x83;
    }
    put(
        memory,
        PAGE_TABLES,
        &tables
            .iter()
            .flat_map(|entry| entry.to_le_bytes())
            .collect::<Vec<u8>>(),
    )?;

    flat_segments(state, 0xa09b);
    put_gdt(memory, state)?;
    state.cr0 = 0x8005_0033;
    state.cr3 = PAGE_TABLES;
    state.cr4 = 0x20;
    state.efer = 0x500;
    state.rflags = 2;
    state.rip = entry;
    state.gpr = [0; 16];
    state.gpr[RSI] = ZERO_PAGE;
    state.gpr[RSP] = STACK;
    state.gpr[RBP] = STACK;
    Ok(())
}

/// The PVH entry (Xen `docs/misc/pvh.pandoc`, `hvm_start_info` version 1): 32-bit protected mode, paging off,
/// EBX at the start info.
///
/// # Errors
/// As [`linux64`].
pub fn pvh(handover: &Handover<'_>, entry: u32, state: &mut CpuState) -> Result<(), BootError> {
    let memory = handover.memory;
    put_command_line(handover, COMMAND_LINE_LIMIT)?;
    let modules = PVH_INFO + 0x40;
    let map_at = PVH_INFO + 0x80;
    let map = e820(memory);
    let mut info = Vec::with_capacity(0x300);
    info.extend(0x336e_c578u32.to_le_bytes());
    info.extend(1u32.to_le_bytes());
    info.extend(0u32.to_le_bytes());
    info.extend(u32::from(handover.initrd.is_some()).to_le_bytes());
    info.extend(
        if handover.initrd.is_some() {
            modules
        } else {
            0
        }
        .to_le_bytes(),
    );
    info.extend(COMMAND_LINE.to_le_bytes());
    info.extend(handover.rsdp.to_le_bytes());
    info.extend(map_at.to_le_bytes());
    info.extend((map.len() as u32).to_le_bytes());
    info.resize(0x40, 0);
    if let Some((address, len)) = handover.initrd {
        for value in [address, len, 0, 0] {
            info.extend(value.to_le_bytes());
        }
    }
    info.resize(0x80, 0);
    for (start, len, kind) in map {
        info.extend(start.to_le_bytes());
        info.extend(len.to_le_bytes());
        let kind: E820Kind = kind;
        info.extend((kind as u32).to_le_bytes());
        info.extend([0; 4]);
    }
    put(memory, PVH_INFO, &info)?;

    flat_segments(state, 0xc09b);
    put_gdt(memory, state)?;
    state.cr0 = 0x11;
    state.cr3 = 0;
    state.cr4 = 0;
    state.efer = 0;
    state.rflags = 2;
    state.rip = u64::from(entry);
    state.gpr = [0; 16];
    state.gpr[RBX] = PVH_INFO;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_zero_page_says_where_everything_is() {
        let memory = crate::memory::allocate(64 << 20).unwrap();
        let initrd = place_initrd(&memory, &[7; 5000], 0x200_0000, 0x37ff_ffff).unwrap();
        assert_eq!(initrd, (0x400_0000 - 0x2000, 5000));
        let handover = Handover {
            memory: &memory,
            command_line: "quiet",
            initrd: Some(initrd),
            rsdp: 0xe_0000,
        };
        let mut state = CpuState::default();
        linux64(&handover, None, 0x100_0000, &mut state).unwrap();
        let read = |at: u64| {
            memory
                .read_obj::<u32>(GuestAddress(ZERO_PAGE + at))
                .unwrap()
        };
        assert_eq!(
            (read(0x218), read(0x21c), read(0x70)),
            (initrd.0 as u32, 5000, 0xe_0000)
        );
        assert_eq!(state.gpr[RSI], ZERO_PAGE);
        let mut text = [0; 6];
        memory
            .read_slice(&mut text, GuestAddress(u64::from(read(0x228))))
            .unwrap();
        assert_eq!(&text, b"quiet\0");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let memory = crate::memory::allocate(16 << 20).unwrap();
        assert!(place_initrd(&memory, &vec![0; 8 << 20], 9 << 20, u32::MAX).is_err());
        let long = "x".repeat(70_000);
        let handover = Handover {
            memory: &memory,
            command_line: &long,
            initrd: None,
            rsdp: 0,
        };
        assert!(matches!(
            linux64(&handover, None, 0, &mut CpuState::default()),
            Err(BootError::CommandLine { length: 70_000, .. })
        ));
    }
}
