//! Where translated code lives: one memfd mapped twice, once writable and once executable, and the index of its blocks.

use std::io;
use std::os::fd::AsFd;

use rustix::mm::{MapFlags, ProtFlags};

use crate::index::Index;

/// What blocks are told apart by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    pub rip: u64,
    /// See [`mode`].
    pub mode: u8,
}

/// Bits of [`Key::mode`].
pub mod mode {
    pub const USER: u8 = 1;
    /// CR0.TS or CR0.EM: floating point faults.
    pub const NO_FPU: u8 = 2;
    /// One instruction, then back to the run loop.
    pub const SINGLE: u8 = 4;
    /// CR4.OSXSAVE or XCR0 do not allow AVX.
    pub const NO_AVX: u8 = 8;
}

/// A stretch of translated guest code.
#[derive(Debug, Clone)]
pub struct Block {
    pub key: Key,
    /// Guest-physical page of the bytes beyond the first page, for the one kind of block that crosses: a single instruction.
    pub second: Option<u64>,
    /// Host address of the entry for indirect jumps (checks r10, polls).
    pub indirect: u64,
    /// Host address of the entry with flags in EFLAGS.
    pub direct: u64,
    /// Host address of code that leaves for the run loop with rip at the block's start: the first of the block's code.
    pub leave: u64,
    pub end: u64,
    /// Guest bytes.
    pub len: u32,
    pub flags_live: bool,
    pub dead: bool,
    /// In the lists of the translator: what of its code depends on its addresses (`None`: it cannot be moved), and the
    /// instructions that may trap.
    pub places: Option<(u32, u32)>,
    pub sites: (u32, u32),
}

/// The code cache of one CPU.
pub struct Cache {
    writable: *mut u8,
    executable: *const u8,
    size: usize,
    /// Bytes of stubs at the front, which survive a flush.
    reserved: usize,
    used: usize,
    /// In the order of their host addresses.
    pub blocks: Vec<Block>,
    pub index: Index,
    /// Counts flushes: numbers of blocks from before mean nothing after.
    pub generation: u64,
}

// SAFETY: the mappings belong to this value alone.
unsafe impl Send for Cache {}

impl Cache {
    pub fn new(size: usize) -> io::Result<Cache> {
        let size = size.next_multiple_of(4096).max(1 << 20);
        let fd = rustix::fs::memfd_create("translated-code", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, size as u64)?;
        let map = |prot| {
            // SAFETY: a new mapping of our own file, at an address the kernel chooses.
            unsafe {
                rustix::mm::mmap(
                    std::ptr::null_mut(),
                    size,
                    prot,
                    MapFlags::SHARED,
                    fd.as_fd(),
                    0,
                )
            }
        };
        let writable = map(ProtFlags::READ | ProtFlags::WRITE)?.cast::<u8>();
        let executable = map(ProtFlags::READ | ProtFlags::EXEC)?.cast::<u8>();
        Ok(Cache {
            writable,
            executable,
            size,
            reserved: 0,
            used: 0,
            blocks: Vec::new(),
            index: Index::default(),
            generation: 0,
        })
    }

    /// Host address the next code will get.
    pub fn next(&self) -> u64 {
        self.executable as u64 + self.used as u64
    }

    pub fn room(&self) -> usize {
        self.size - self.used
    }

    pub fn used(&self) -> usize {
        self.used
    }

    /// True for addresses of translated code and stubs.
    pub fn contains(&self, host: u64) -> bool {
        host.wrapping_sub(self.executable as u64) < self.size as u64
    }

    /// Host addresses of the executable mapping.
    pub fn range(&self) -> (u64, u64) {
        (
            self.executable as u64,
            self.executable as u64 + self.size as u64,
        )
    }

    /// Appends code, which must have been made for [`Cache::next`]. False when it does not fit.
    #[must_use]
    pub fn append(&mut self, code: &[u8]) -> bool {
        if code.len() > self.room() {
            return false;
        }
        // SAFETY: inside the writable mapping, which nothing else borrows.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(self.used), code.len())
        };
        self.used = (self.used + code.len()).next_multiple_of(16).min(self.size);
        true
    }

    /// Keeps everything so far through flushes.
    pub fn reserve(&mut self) {
        self.reserved = self.used;
    }

    /// Emitted code from host address `start` to `end`.
    pub fn bytes(&self, start: u64, end: u64) -> &[u8] {
        let at = (start - self.executable as u64) as usize;
        let len = (end - start) as usize;
        assert!(at + len <= self.size);
        // SAFETY: in bounds, just checked; nothing writes while this is borrowed.
        unsafe { std::slice::from_raw_parts(self.writable.add(at), len) }
    }

    /// Reads a word of emitted code.
    pub fn word(&self, host: u64) -> u32 {
        let at = (host - self.executable as u64) as usize;
        assert!(at + 4 <= self.size);
        // SAFETY: in bounds, just checked.
        unsafe { self.writable.add(at).cast::<u32>().read_unaligned() }
    }

    /// Points the 32-bit displacement at host address `site` to `target`.
    pub fn patch(&mut self, site: u64, target: u64) {
        let at = (site - self.executable as u64) as usize;
        assert!(at + 4 <= self.size);
        let delta = target.wrapping_sub(site + 4) as u32;
        // SAFETY: in bounds, just checked; only this thread runs this cache's code, and it is not in it now.
        unsafe { self.writable.add(at).cast::<u32>().write_unaligned(delta) };
    }

    /// Writes `jmp target` over the code at `site`.
    pub fn patch_jump(&mut self, site: u64, target: u64) {
        let at = (site - self.executable as u64) as usize;
        assert!(at + 5 <= self.size);
        // SAFETY: in bounds, just checked.
        unsafe { self.writable.add(at).write(0xe9) };
        self.patch(site + 1, target);
    }

    pub fn find(&self, key: &Key) -> Option<u32> {
        self.index.find(key)
    }

    pub fn insert(&mut self, block: Block) -> u32 {
        let number = self.blocks.len() as u32;
        self.index.insert(&block.key, block.second, number);
        self.blocks.push(block);
        number
    }

    /// The block whose code holds `host`.
    pub fn block_at(&self, host: u64) -> Option<u32> {
        let after = self.blocks.partition_point(|b| b.leave <= host);
        let number = after.checked_sub(1)?;
        (host < self.blocks[number].end).then_some(number as u32)
    }

    /// Drops the blocks that hold any of the guest-physical bytes; true where there was one.
    pub fn invalidate(&mut self, gpa: u64, len: u64, jump_miss: u64) -> bool {
        let blocks = &self.blocks;
        let gone = self.index.take(gpa, |n| {
            let b = &blocks[n as usize];
            b.second.is_some() || (gpa < b.key.gpa + u64::from(b.len) && b.key.gpa < gpa + len)
        });
        for n in &gone {
            let (first, second) = (
                self.blocks[*n as usize].key.gpa,
                self.blocks[*n as usize].second,
            );
            if let Some(second) = second {
                for page in [first, second] {
                    self.index.take(page, |m| m == *n);
                }
            }
            let b = &mut self.blocks[*n as usize];
            if b.dead {
                continue;
            }
            b.dead = true;
            let (indirect, direct, leave) = (b.indirect, b.direct, b.leave);
            self.patch_jump(indirect, jump_miss);
            self.patch_jump(direct, leave);
        }
        !gone.is_empty()
    }

    /// Forgets every block.
    pub fn flush(&mut self) {
        self.used = self.reserved;
        self.blocks.clear();
        self.index.clear();
        self.generation += 1;
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        // SAFETY: our own mappings, not used after this.
        unsafe {
            let _ = rustix::mm::munmap(self.writable.cast(), self.size);
            let _ = rustix::mm::munmap(self.executable.cast_mut().cast(), self.size);
        }
    }
}
