//! Where translated code calls Rust: memory accesses that missed the buffers, and instructions of the system side.

use std::sync::atomic::Ordering;

use cpu::x86::Activity;

use super::engine::{Pending, SPLIT, user};
use crate::cache::mode;
use crate::machine::granule_mask;
use crate::replay;
use crate::state::{Access, CS, Cpu, Fault, Flow, Rights, flag};
use crate::system::{self, paging};
use crate::translate::{CHECKPOINT, jump_index, leave};

impl Cpu {
    /// Merges flags that translated code left in the slot.
    pub(super) fn flags_from_slot(&mut self) {
        let slot = self.scratch[0];
        let low = slot >> 8 & 0xd5;
        let of = if slot & 1 != 0 { flag::OF } else { 0 };
        let mask = flag::NATIVE & !flag::DF;
        self.rflags = self.rflags & !mask | low | of;
    }

    /// Guest rip of the descriptor's instruction; flags made complete.
    pub(super) fn settle(&mut self, descriptor: u64, word: u32) -> Option<u32> {
        let number = self.engine().cache.block_at(descriptor)?;
        let start = self.engine().cache.blocks[number as usize].key.rip;
        self.rip = start.wrapping_add(u64::from(word >> leave::OFFSET_SHIFT));
        if word & leave::SLOT != 0 {
            self.flags_from_slot();
        }
        Some(number)
    }

    /// Carries out the store that the last instruction made into the bounce buffer.
    pub(super) fn write_bounce(&mut self) {
        let len = std::mem::take(&mut self.bounce.len) as usize;
        let data = self.bounce.data;
        let address = self.bounce.address;
        let offset = self.bounce.offset as usize;
        // Both pages were probed before the instruction ran; a page table changed since by another CPU loses the store, as
        // it could on a processor that had the old translation.
        let _ = self.write_bytes(address, &data[offset..][..len], Rights::Current);
    }
}

/// Whether the bytes lie in two cache lines.
fn splits(va: u64, size: u64) -> bool {
    (va & 63) + size > 64
}

/// Called by the memory stub: makes `va` reachable and answers the host address of its page, or leaves.
pub(super) unsafe extern "sysv64" fn memory_entry(cpu: *mut Cpu, va: u64, descriptor: u64) -> u64 {
    // SAFETY: the stub passes its own CPU, whose translated code is not running now.
    let cpu = unsafe { &mut *cpu };
    let word = cpu.engine().cache.word(descriptor);
    let back = cpu.engine().cache.word(descriptor + 4);
    cpu.engine().counters.memory += 1;
    cpu.count_time();
    cpu.scratch[4] = descriptor.wrapping_add(back as i32 as i64 as u64);
    cpu.scratch[6] = va & 0xfff;
    match cpu.reach(va, descriptor, word) {
        Ok(page) => page,
        Err(pending) => {
            cpu.settle(descriptor, word);
            if cpu.replay.is_some() && matches!(pending, Pending::Single) {
                // Counted when it runs.
                cpu.count -= 1;
            }
            cpu.engine().pending = Some(pending);
            0
        }
    }
}

/// Called by the instruction stub: 0 to leave.
pub(super) unsafe extern "sysv64" fn instruction_entry(cpu: *mut Cpu, descriptor: u64) -> u64 {
    // SAFETY: as in `memory_entry`.
    let cpu = unsafe { &mut *cpu };
    let word = cpu.engine().cache.word(descriptor);
    let payload = cpu.engine().cache.word(descriptor + 4);
    if payload == CHECKPOINT {
        cpu.settle(descriptor, word & !leave::SLOT);
        cpu.checkpoint();
        cpu.scratch[4] = descriptor + 8;
        return 1;
    }
    cpu.engine().counters.rust += 1;
    cpu.count_time();
    let (instruction, block) = cpu.engine().lists.instructions[payload as usize];
    cpu.rip = instruction.ip();
    if word & leave::SLOT != 0 {
        cpu.flags_from_slot();
    }
    if cpu.engine().options.profile {
        cpu.engine().counters.of(&instruction).0 += 1;
    }
    let generation = cpu.engine().cache.generation;
    let start = cpu.rip;
    let opens = cpu.replay.is_some() && replay::opens(&instruction);
    cpu.open_point |= opens;
    let pending = match system::execute(cpu, &instruction) {
        Ok(Flow::Continue) => {
            let engine = cpu.engine();
            let alive =
                engine.cache.generation == generation && !engine.cache.blocks[block as usize].dead;
            if alive
                && !opens
                && !cpu.interrupt_shadow
                && cpu.debug.hit == 0
                // Code that others wrote before is the new code behind what serializes.
                && (cpu.replay.is_some() || cpu.attention.load(Ordering::Relaxed) == 0)
                && cpu.rip == start.wrapping_add(instruction.len() as u64)
            {
                cpu.scratch[4] = descriptor + 8;
                return 1;
            }
            Pending::Again
        }
        Ok(Flow::EndBlock) if let Some(host) = cpu.straight_on() => {
            cpu.scratch[4] = host;
            return 1;
        }
        Ok(flow) => {
            if cpu.engine().options.profile {
                cpu.engine().counters.of(&instruction).1 += 1;
            }
            Pending::Flow(flow)
        }
        Err(fault) => Pending::Fault(fault),
    };
    cpu.engine().pending = Some(pending);
    0
}

impl Cpu {
    /// The entry of the block at rip, where the run loop would have nothing to do but go there.
    pub(super) fn straight_on(&mut self) -> Option<u64> {
        let quiet = self.attention.load(Ordering::Relaxed) == 0
            && self.interrupt_waits == 0
            && !self.interrupt_shadow
            && self.rflags & flag::TF == 0
            && self.replay.is_none()
            && !self.debug.executes
            && self.debug.hit == 0
            && self.system.activity == Activity::Running
            && self.efer >> 10 & 1 != 0
            && self.segments[CS].attributes >> 13 & 1 != 0
            && !self.interpreted();
        let engine = self.engine();
        let (miss, single) = (
            engine.stubs.jump_miss,
            engine.options.single || engine.options.trace,
        );
        if !quiet || single || !self.made_for_now() {
            return None;
        }
        let user = user(self);
        let (level, at) = (usize::from(user), jump_index(self.rip));
        let mut host = self.levels()[level].jump[at];
        if host == miss {
            host = self.second_jump(self.rip, user)?;
        }
        // As LAHF and SETO leave them.
        self.scratch[0] = (self.rflags & 0xff) << 8 | self.rflags >> 11 & 1;
        Some(host)
    }

    /// The host address of the page of `va` for the access a descriptor describes.
    pub(super) fn reach(&mut self, va: u64, descriptor: u64, word: u32) -> Result<u64, Pending> {
        let write = word & leave::WRITE != 0;
        let size = u64::from(word >> leave::SIZE_SHIFT & 0xff);
        let access = if write { Access::Write } else { Access::Read };
        let group = word & leave::GROUP != 0;
        if (va & 0xfff) + size > 4096 || (word & leave::LOCK != 0 && splits(va, size)) {
            if group {
                return Err(self.split(descriptor));
            }
            return self.bounce_access(va, size as usize, descriptor, word);
        }
        if self.debug.watches && self.watch(va, size, write) && !self.alone(descriptor) {
            self.debug.hit = 0;
            return Err(Pending::Single);
        }
        let found = match paging::walk(self, va, access, Rights::Current) {
            Ok(found) => found,
            // Precisely, by the access that faults.
            Err(_) if group => return Err(Pending::Single),
            Err(fault) => return Err(Pending::Fault(fault)),
        };
        let Some(host) = self.machine.ram_at(found.gpa) else {
            if group {
                return Err(self.split(descriptor));
            }
            return self.bounce_access(va, size as usize, descriptor, word);
        };
        let page = host as u64 & !0xfff;
        let user = user(self);
        if !write {
            self.fill_tlb(user, false, va, page, found.global);
            return Ok(page);
        }
        if self.machine.vcpus > 1 {
            // Before the look at the bits: whoever sets one later waits until this store is done.
            self.mailbox
                .storing
                .store((found.gpa >> 12) + 1, Ordering::SeqCst);
        }
        let bits = self
            .machine
            .granules(found.gpa)
            .map_or(0, |b| b.load(Ordering::SeqCst));
        if bits == 0 {
            if found.writable {
                self.fill_tlb(user, true, va, page, found.global);
            }
            return Ok(page);
        }
        if bits & granule_mask(found.gpa, size) != 0 {
            let number = self.engine().cache.block_at(descriptor);
            self.drop_code(found.gpa, size);
            let engine = self.engine();
            if let Some(n) = number {
                let block = &engine.cache.blocks[n as usize];
                if block.dead && block.key.mode & mode::SINGLE == 0 {
                    return Err(Pending::Single);
                }
            }
        }
        Ok(page)
    }

    /// A group of accesses cannot be had whole: its first instruction runs alone, and the block is made anew where that
    /// comes again and again.
    pub(super) fn split(&mut self, descriptor: u64) -> Pending {
        let engine = self.engine();
        if let Some(n) = engine.cache.block_at(descriptor) {
            let gpa = engine.cache.blocks[n as usize].key.gpa;
            let times = engine.split.entry(gpa).or_default();
            *times = times.saturating_add(1);
            if *times == SPLIT {
                let miss = engine.stubs.jump_gone;
                engine.cache.invalidate(gpa, 1, miss);
            }
        }
        Pending::Single
    }

    /// Whether the descriptor's block is of one instruction.
    pub(super) fn alone(&mut self, descriptor: u64) -> bool {
        let engine = self.engine();
        engine
            .cache
            .block_at(descriptor)
            .is_some_and(|n| engine.cache.blocks[n as usize].key.mode & mode::SINGLE != 0)
    }

    /// An access that cannot be made in place, by way of the bounce buffer. Writes only in blocks of one instruction.
    pub(super) fn bounce_access(
        &mut self,
        va: u64,
        size: usize,
        descriptor: u64,
        word: u32,
    ) -> Result<u64, Pending> {
        let write = word & leave::WRITE != 0;
        let atomic = word & leave::LOCK != 0 && splits(va, size as u64);
        // Aligned as the guest's address is, for instructions that look at it.
        let offset = if atomic && size <= 8 {
            0
        } else {
            (va & 63) as usize
        };
        if size > self.bounce.data.len() / 2 {
            return Err(Pending::Fault(Fault::UD));
        }
        let watched = self.debug.watches && self.watch(va, size as u64, write);
        if (write || watched) && !self.alone(descriptor) {
            return Err(Pending::Single);
        }
        if write {
            self.write_probe(va, size, Rights::Current)
                .map_err(Pending::Fault)?;
        }
        if atomic {
            self.be_alone();
        }
        if !write || word & leave::MODIFY != 0 {
            let mut data = [0u8; 512];
            self.read_bytes(va, &mut data[..size], Rights::Current)
                .map_err(Pending::Fault)?;
            self.bounce.data[offset..offset + size].copy_from_slice(&data[..size]);
        }
        if write {
            self.bounce.address = va;
            self.bounce.offset = offset as u32;
            self.bounce.len = size as u32;
        }
        Ok((&raw const self.bounce.data as u64 + offset as u64).wrapping_sub(va & 0xfff))
    }
}
