//! Guest page tables (SDM vol. 3, chapter 4): four-level, PAE and two-level 32-bit paging.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::cr;
use crate::state::{Access, Cpu, Fault, Rights, flag};

/// Physical address bits shown to the guest (leaf 0x8000_0008).
pub const PHYSICAL_BITS: u32 = 46;
/// Address bits of a paging-structure entry.
pub(super) const ADDRESS: u64 = ((1 << PHYSICAL_BITS) - 1) & !0xfff;
/// Bits between MAXPHYADDR and bit 51 are reserved in every entry.
const RESERVED_HIGH: u64 = 0x000f_ffff_ffff_ffff & !((1 << PHYSICAL_BITS) - 1);

/// Bits of a paging-structure entry.
mod entry {
    pub const PRESENT: u64 = 1;
    pub const WRITE: u64 = 1 << 1;
    pub const USER: u64 = 1 << 2;
    pub const ACCESSED: u64 = 1 << 5;
    pub const DIRTY: u64 = 1 << 6;
    pub const LARGE: u64 = 1 << 7;
    pub const GLOBAL: u64 = 1 << 8;
    pub const NO_EXECUTE: u64 = 1 << 63;
}

/// Bits of a page fault's error code (SDM vol. 3, 4.7).
pub mod error {
    pub const PRESENT: u32 = 1;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RESERVED: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
}

/// What a walk found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// Guest-physical address of the byte asked for.
    pub gpa: u64,
    /// Writes with the same rights need no further walk: permitted, and the dirty bit is set.
    pub writable: bool,
    pub global: bool,
    /// The page belongs to ring 3: under SMAP, a supervisor may use the translation only while RFLAGS.AC stands as it did.
    pub user: bool,
}

/// True where bits 63..=47 of `va` are equal (4-level paging).
#[inline]
pub const fn canonical(va: u64) -> bool {
    ((va as i64) << 16 >> 16) as u64 == va
}

/// The permissions in force for a walk.
struct Permissions {
    user: bool,
    write: bool,
    fetch: bool,
    write_protect: bool,
    /// Supervisor fetches from user pages fault.
    smep: bool,
    /// Supervisor data accesses to user pages fault.
    smap: bool,
    no_execute: bool,
}

impl Permissions {
    fn of(cpu: &Cpu, access: Access, rights: Rights) -> Permissions {
        let user = match rights {
            Rights::Current => cpu.cpl == 3,
            Rights::Supervisor => false,
            Rights::User => true,
        };
        // Implicit supervisor accesses at CPL 3 are not excused by AC (SDM vol. 3, 4.6).
        let excused = cpu.rflags & flag::AC != 0 && cpu.cpl != 3;
        Permissions {
            user,
            write: access == Access::Write,
            fetch: access == Access::Fetch,
            write_protect: cpu.cr0 & cr::CR0_WP != 0,
            smep: cpu.cr4 & cr::CR4_SMEP != 0,
            smap: cpu.cr4 & cr::CR4_SMAP != 0 && !excused,
            no_execute: cpu.efer & cr::EFER_NXE != 0 && (cpu.cr4 & cr::CR4_PAE != 0),
        }
    }

    fn error(&self, bits: u32) -> u32 {
        bits | if self.write { error::WRITE } else { 0 }
            | if self.user { error::USER } else { 0 }
            | if self.fetch && (self.no_execute || self.smep) {
                error::FETCH
            } else {
                0
            }
    }

    /// Whether a page with these combined rights may be used so.
    fn allows(&self, page_user: bool, page_write: bool, page_nx: bool) -> bool {
        if self.user && !page_user {
            return false;
        }
        if !self.user && page_user && ((self.fetch && self.smep) || (!self.fetch && self.smap)) {
            return false;
        }
        if self.fetch && page_nx {
            return false;
        }
        !self.write || self.may_write(page_write)
    }

    fn may_write(&self, page_write: bool) -> bool {
        page_write || (!self.user && !self.write_protect)
    }
}

/// Translates `va` (SDM vol. 3, chapter 4), setting accessed and dirty bits.
///
/// A non-canonical address is a general protection fault.
pub fn walk(cpu: &mut Cpu, va: u64, access: Access, rights: Rights) -> Result<Translation, Fault> {
    if cpu.cr0 & cr::CR0_PG == 0 {
        return Ok(Translation {
            gpa: va & 0xffff_ffff,
            writable: true,
            global: false,
            user: true,
        });
    }
    let permissions = Permissions::of(cpu, access, rights);
    loop {
        let found = if cpu.efer & cr::EFER_LMA != 0 {
            if !canonical(va) {
                return Err(Fault::GP);
            }
            walk_wide(cpu, va, &permissions, cpu.cr3 & ADDRESS, 39)
        } else if cpu.cr4 & cr::CR4_PAE != 0 {
            walk_pae(cpu, va & 0xffff_ffff, &permissions)
        } else {
            walk_narrow(cpu, va & 0xffff_ffff, &permissions)
        };
        match found {
            Ok(Some(translation)) => return Ok(translation),
            // Another CPU changed an entry between our look and our setting of its bits.
            Ok(None) => continue,
            Err(bits) => return Err(Fault::page(va, permissions.error(bits))),
        }
    }
}

/// Translates without setting bits and without permissions, as a debugger does.
pub fn peek(cpu: &mut Cpu, va: u64) -> Option<u64> {
    if cpu.cr0 & cr::CR0_PG == 0 {
        return Some(va & 0xffff_ffff);
    }
    if cpu.efer & cr::EFER_LMA == 0 {
        return walk(cpu, va, Access::Read, Rights::Supervisor)
            .ok()
            .map(|t| t.gpa);
    }
    if !canonical(va) {
        return None;
    }
    let mut table = cpu.cr3 & ADDRESS;
    for shift in [39u32, 30, 21, 12] {
        let value = load64(cpu, table + ((va >> shift) & 0x1ff) * 8);
        if value & entry::PRESENT == 0 {
            return None;
        }
        if shift == 12 || (shift < 39 && value & entry::LARGE != 0) {
            let mask = (1u64 << shift) - 1;
            return Some((value & ADDRESS & !mask) | (va & mask));
        }
        table = value & ADDRESS;
    }
    None
}

fn load64(cpu: &Cpu, gpa: u64) -> u64 {
    match cpu.machine.ram_at(gpa) {
        // SAFETY: inside guest RAM and 8-aligned, as tables are page- or 32-byte-aligned and entries 8 bytes.
        Some(at) => unsafe { AtomicU64::from_ptr(at.cast()) }.load(Ordering::Acquire),
        None => u64::MAX,
    }
}

fn load32(cpu: &Cpu, gpa: u64) -> u32 {
    match cpu.machine.ram_at(gpa) {
        // SAFETY: as in `load64`, with entries of 4 bytes.
        Some(at) => unsafe { AtomicU32::from_ptr(at.cast()) }.load(Ordering::Acquire),
        None => u32::MAX,
    }
}

/// Sets `bits` in the entry at `gpa` if it still holds `old`; false: it does not.
fn mark64(cpu: &mut Cpu, gpa: u64, old: u64, bits: u64) -> bool {
    if old & bits == bits {
        return true;
    }
    let Some(at) = cpu.machine.ram_at(gpa) else {
        return true;
    };
    cpu.note_store(gpa);
    // SAFETY: as in `load64`.
    unsafe { AtomicU64::from_ptr(at.cast()) }
        .compare_exchange(old, old | bits, Ordering::SeqCst, Ordering::Relaxed)
        .is_ok()
}

fn mark32(cpu: &mut Cpu, gpa: u64, old: u32, bits: u32) -> bool {
    if old & bits == bits {
        return true;
    }
    let Some(at) = cpu.machine.ram_at(gpa) else {
        return true;
    };
    cpu.note_store(gpa);
    // SAFETY: as in `load32`.
    unsafe { AtomicU32::from_ptr(at.cast()) }
        .compare_exchange(old, old | bits, Ordering::SeqCst, Ordering::Relaxed)
        .is_ok()
}

/// Levels of eight-byte entries from the table that `top` bits index. `Ok(None)`: an entry changed, walk again;
/// `Err`: the error code's bits.
fn walk_wide(
    cpu: &mut Cpu,
    va: u64,
    permissions: &Permissions,
    root: u64,
    top: u32,
) -> Result<Option<Translation>, u32> {
    let mut table = root;
    let mut shift = top;
    let (mut user, mut write, mut nx) = (true, true, false);
    let mut seen = [(0u64, 0u64); 4];
    let mut depth = 0;
    loop {
        let at = table + ((va >> shift) & 0x1ff) * 8;
        let value = load64(cpu, at);
        if value & entry::PRESENT == 0 {
            return Err(0);
        }
        let large = value & entry::LARGE != 0 && (shift == 30 || shift == 21);
        let mut reserved = RESERVED_HIGH;
        if !permissions.no_execute {
            reserved |= entry::NO_EXECUTE;
        }
        if top == 30 || cpu.efer & cr::EFER_LMA == 0 {
            // Legacy PAE: bits 62..=52 are reserved as well.
            reserved |= 0x7ff0_0000_0000_0000;
        }
        if shift == 39 {
            reserved |= entry::LARGE;
        }
        if large {
            reserved |= ((1u64 << shift) - 1) & !0x1fff;
        }
        if value & reserved != 0 {
            return Err(error::PRESENT | error::RESERVED);
        }
        user &= value & entry::USER != 0;
        write &= value & entry::WRITE != 0;
        nx |= value & entry::NO_EXECUTE != 0;
        seen[depth] = (at, value);
        if !large && shift > 12 {
            table = value & ADDRESS;
            shift -= 9;
            depth += 1;
            continue;
        }
        if !permissions.allows(user, write, nx) {
            return Err(error::PRESENT);
        }
        for &(at, value) in &seen[..depth] {
            if !mark64(cpu, at, value, entry::ACCESSED) {
                return Ok(None);
            }
        }
        let dirty = if permissions.write { entry::DIRTY } else { 0 };
        if !mark64(cpu, at, value, entry::ACCESSED | dirty) {
            return Ok(None);
        }
        let mask = (1u64 << shift) - 1;
        return Ok(Some(Translation {
            gpa: (value & ADDRESS & !mask) | (va & mask),
            writable: permissions.may_write(write) && (value | dirty) & entry::DIRTY != 0,
            global: value & entry::GLOBAL != 0,
            user,
        }));
    }
}

/// PAE paging: a pointer from one of four PDPTEs, then two levels.
fn walk_pae(cpu: &mut Cpu, va: u64, permissions: &Permissions) -> Result<Option<Translation>, u32> {
    let pointer = load64(cpu, (cpu.cr3 & 0xffff_ffe0) + (va >> 30) * 8);
    if pointer & entry::PRESENT == 0 {
        return Err(0);
    }
    if pointer & (RESERVED_HIGH | 0x1e6 | 0xfff0_0000_0000_0000) != 0 {
        return Err(error::PRESENT | error::RESERVED);
    }
    walk_wide(cpu, va, permissions, pointer & ADDRESS, 21)
}

/// Two levels of four-byte entries, 4 MiB pages with CR4.PSE.
fn walk_narrow(
    cpu: &mut Cpu,
    va: u64,
    permissions: &Permissions,
) -> Result<Option<Translation>, u32> {
    let directory_at = (cpu.cr3 & 0xffff_f000) + (va >> 22) * 4;
    let directory = load32(cpu, directory_at);
    if directory & 1 == 0 {
        return Err(0);
    }
    let large = u64::from(directory) & entry::LARGE != 0 && cpu.cr4 & cr::CR4_PSE != 0;
    let (at, value) = if large {
        (directory_at, directory)
    } else {
        let at = u64::from(directory & 0xffff_f000) + ((va >> 12) & 0x3ff) * 4;
        (at, load32(cpu, at))
    };
    if value & 1 == 0 {
        return Err(0);
    }
    if large && value & (1 << 21) != 0 {
        return Err(error::PRESENT | error::RESERVED);
    }
    let both = u64::from(directory & value);
    let (user, write) = (both & entry::USER != 0, both & entry::WRITE != 0);
    if !permissions.allows(user, write, false) {
        return Err(error::PRESENT);
    }
    if !large && !mark32(cpu, directory_at, directory, entry::ACCESSED as u32) {
        return Ok(None);
    }
    let dirty = if permissions.write {
        entry::DIRTY as u32
    } else {
        0
    };
    if !mark32(cpu, at, value, entry::ACCESSED as u32 | dirty) {
        return Ok(None);
    }
    let gpa = if large {
        // Bits 20..=13 are address bits 39..=32 (PSE-36).
        (u64::from(value) & 0xffc0_0000) | (u64::from(value >> 13) & 0xff) << 32 | (va & 0x3f_ffff)
    } else {
        (u64::from(value) & 0xffff_f000) | (va & 0xfff)
    };
    Ok(Some(Translation {
        gpa,
        writable: permissions.may_write(write) && (value | dirty) & entry::DIRTY as u32 != 0,
        global: u64::from(value) & entry::GLOBAL != 0,
        user,
    }))
}
