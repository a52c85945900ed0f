//! From rip to a block: look-up, translation, and what makes blocks and jump tables stale.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::engine::{SPLIT, page_bit, user};
use crate::cache::{Block, Key, mode};
use crate::machine::granule_mask;
use crate::state::{Access, Cpu, Fault, JUMP_ENTRIES, Rights};
use crate::system::{cr, paging};
use crate::translate::{Request, jump_index, place};

use super::Engine;

impl Cpu {
    /// Forgets indirect jump targets of the first table; `global`: also of global supervisor pages, and the second table's.
    pub(crate) fn flush_jumps(&mut self, global: bool) {
        let Some(engine) = self.engine_mut() else {
            return;
        };
        let (miss, gone) = (engine.stubs.jump_miss, engine.stubs.jump_gone);
        let all = global || engine.supervisor_nonglobal;
        if all {
            engine.supervisor_nonglobal = false;
        }
        if global {
            engine.jump_pages.fill(0);
            self.wipe_second_jumps(gone);
        }
        self.unlist_jumps(true, miss);
        if all {
            self.unlist_jumps(false, miss);
        }
    }

    /// Empties the first table of one level.
    fn unlist_jumps(&mut self, user: bool, miss: u64) {
        let n = usize::from(user);
        let count = std::mem::take(&mut self.second().listed[n]) as usize;
        for at in 0..count {
            let slot = usize::from(self.second().list[n][at]);
            self.levels()[n].jump[slot] = miss;
        }
    }

    /// Forgets indirect jump targets in the page of `va`, and those that run into it from the page before.
    pub(crate) fn flush_jumps_of(&mut self, va: u64) {
        let (miss, gone) = (self.engine().stubs.jump_miss, self.engine().stubs.jump_gone);
        // The first table does not know its addresses; it fills again from the second.
        self.unlist_jumps(true, miss);
        self.unlist_jumps(false, miss);
        self.drop_second_jumps(va, gone);
    }

    /// A store to guest RAM by Rust code somewhere in the page of `gpa`: drops the page's translated code.
    pub(crate) fn note_store(&mut self, gpa: u64) {
        let dirty = self
            .machine
            .granules(gpa)
            .is_some_and(|bits| bits.load(Ordering::Relaxed) != 0);
        if dirty {
            self.drop_code(gpa & !0xfff, 4096);
        }
    }

    /// Drops translated code of these bytes (inside one page), here and on all other CPUs.
    pub(super) fn drop_code(&mut self, gpa: u64, len: u64) {
        let machine = Arc::clone(&self.machine);
        let id = self.id;
        machine.drop_code(gpa, len, Some(id));
        if let Some(engine) = self.engine_mut() {
            let miss = engine.stubs.jump_gone;
            let first = gpa & !63;
            let last = (gpa + len + 63) & !63;
            if engine.cache.invalidate(first, last - first, miss) {
                engine.counters.invalidations += 1;
            }
        }
    }

    /// Guest-physical page of the code at `va`.
    pub(super) fn fetch_page(&mut self, va: u64) -> Result<(u64, bool), Fault> {
        let user = user(self);
        let context = self.second().context;
        if let Some(known) = self.engine().notes.fetch(va, user, context) {
            return Ok(known);
        }
        let found = paging::walk(self, va, Access::Fetch, Rights::Current)?;
        self.engine()
            .notes
            .note_fetch(va, user, found.gpa, found.global, context);
        Ok((found.gpa & !0xfff, found.global))
    }

    /// The block at rip, translated if need be. The flag says that its pages are global.
    pub(super) fn block(&mut self, single: bool) -> Result<(u32, bool), Fault> {
        let rip = self.rip;
        let (page, global) = self.fetch_page(rip)?;
        let mut mode = if user(self) { mode::USER } else { 0 };
        if self.cr0 & (cr::CR0_EM | cr::CR0_TS) != 0 || self.cr4 & cr::CR4_OSFXSR == 0 {
            mode |= mode::NO_FPU;
        }
        if self.cr4 & cr::CR4_OSXSAVE == 0 || self.xcr0 & 6 != 6 {
            mode |= mode::NO_AVX;
        }
        if single {
            mode |= mode::SINGLE;
        }
        let key = Key {
            gpa: page | rip & 0xfff,
            rip,
            mode,
        };
        if let Some(n) = self.engine().cache.index.find_next(&key) {
            let Some(second) = self.engine().cache.blocks[n as usize].second else {
                return Ok((n, global));
            };
            let (now, global_too) = self.fetch_page((rip | 0xfff).wrapping_add(1))?;
            if now == second {
                return Ok((n, global && global_too));
            }
            let miss = self.engine().stubs.jump_gone;
            self.engine().cache.invalidate(key.gpa, 1, miss);
            self.flush_jumps(true);
        }
        if let Some(n) = self.copy_block(&key) {
            return Ok((n, global));
        }
        self.translate(key, global)
    }

    /// Whether a block for `key` may be a copy, and be copied.
    fn movable(&mut self, key: &Key) -> bool {
        let options = &self.engine().options;
        let plain = !options.counts() && !options.trace;
        plain && key.mode & (mode::USER | mode::SINGLE) == mode::USER && place::movable(key.rip)
    }

    /// A copy of the block that was made of the same bytes as another address space sees them.
    fn copy_block(&mut self, key: &Key) -> Option<u32> {
        if !self.movable(key) || self.engine().split.contains_key(&key.gpa) {
            return None;
        }
        let page = key.gpa & !0xfff;
        let host = self.machine.ram_at(page)?;
        let current = self.made_for_now();
        let Engine {
            cache,
            lists,
            code,
            counters,
            ..
        } = self.engine();
        if !current || cache.room() < 64 << 10 {
            return None;
        }
        let donor = cache
            .index
            .elsewhere(key)
            .find(|n| cache.blocks[*n as usize].places.is_some())?;
        let donor = cache.blocks[donor as usize].clone();
        code.bytes.clear();
        code.bytes
            .extend_from_slice(cache.bytes(donor.leave, donor.end));
        let number = cache.blocks.len() as u32;
        let block = place::copy(&donor, &mut code.bytes, *key, cache.next(), number, lists)?;
        if !cache.append(&code.bytes) {
            return None;
        }
        let number = cache.insert(block);
        counters.copies += 1;
        self.mark_code(page, host as u64, granule_mask(key.gpa, donor.len.into()));
        Some(number)
    }

    pub(super) fn translate(&mut self, key: Key, global: bool) -> Result<(u32, bool), Fault> {
        let mut global = global;
        let page = key.gpa & !0xfff;
        let Some(host) = self.machine.ram_at(page) else {
            // Code in a device or nowhere: as a bus that answers all ones would read.
            return Err(Fault::UD);
        };
        if self.engine().cache.room() < 64 << 10 {
            self.flush_code();
        }
        // From now on stores to the page are seen. The bits come before the bytes are read.
        self.mark_code(page, host as u64, granule_mask(key.gpa, 1));
        let mut bytes = [0u8; 4096];
        // SAFETY: a page of guest RAM; guest CPUs may write it meanwhile, which then drops the block.
        unsafe { std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), 4096) };
        let offset = (key.rip & 0xfff) as usize;
        let mut joined = [0u8; 32];
        let mut second = None;
        let mut source: &[u8] = &bytes[offset..];
        let mut first_page = source.len();
        let cpuid = Arc::clone(&self.system.cpuid);
        let several = self.machine.vcpus > 1;
        let movable = self.movable(&key);
        loop {
            let cpu_tsc = self.tsc_offset;
            let calls = self.efer & cr::EFER_SCE != 0;
            let engine = self.engine();
            (engine.tsc_offset, engine.calls) = (cpu_tsc, calls);
            let splits = engine.split.get(&key.gpa).copied().unwrap_or(0);
            let movable = movable && splits == 0;
            let counted = engine.options.counts();
            let short = engine.options.short;
            let groups = splits < SPLIT;
            let Engine {
                cache,
                workshop,
                lists,
                code,
                stubs,
                ..
            } = engine;
            code.origin = cache.next();
            code.bytes.clear();
            let known = |target: u64| {
                let key = Key {
                    gpa: page | target & 0xfff,
                    rip: target,
                    mode: key.mode,
                };
                cache
                    .find(&key)
                    .map(|n| cache.blocks[n as usize].flags_live)
            };
            let request = Request {
                key,
                bytes: source,
                first_page,
                stubs: *stubs,
                known: &known,
                page: &bytes,
                tsc_shifted: cpu_tsc != 0,
                counted,
                groups,
                several,
                movable,
                calls,
                short,
                offers: &|i| cpuid.offers(i),
                number: cache.blocks.len() as u32,
            };
            let Some(built) = workshop.build(&request, code, lists) else {
                // The first instruction goes on in the next page.
                if second.is_some() {
                    return Err(Fault::UD);
                }
                let next = (key.rip | 0xfff).wrapping_add(1);
                let (gpa, global_too) = self.fetch_page(next)?;
                global &= global_too;
                let Some(next_host) = self.machine.ram_at(gpa) else {
                    return Err(Fault::UD);
                };
                self.mark_code(gpa, next_host as u64, 1);
                let tail = 4096 - offset;
                joined[..tail].copy_from_slice(&bytes[offset..]);
                // SAFETY: the first bytes of a page of guest RAM.
                unsafe {
                    std::ptr::copy_nonoverlapping(next_host, joined[tail..].as_mut_ptr(), 15)
                };
                source = &joined[..tail + 15];
                first_page = tail;
                second = Some(gpa);
                continue;
            };
            if !cache.append(&code.bytes) {
                return Err(Fault::UD);
            }
            let block = Block {
                key,
                second,
                indirect: built.indirect,
                direct: built.direct,
                leave: built.leave,
                end: code.origin + code.bytes.len() as u64,
                len: built.len,
                flags_live: built.flags_live,
                dead: false,
                places: built.places,
                sites: built.sites,
            };
            let number = cache.insert(block);
            engine.counters.blocks += 1;
            engine.counters.instructions += u64::from(built.instructions);
            let in_first = u64::from(built.len).min(4096 - offset as u64);
            self.mark_code(page, host as u64, granule_mask(key.gpa, in_first));
            // Another CPU may have written beyond the granule that was marked first.
            // SAFETY: inside the page; compared as bytes that others may change.
            let now = unsafe { std::slice::from_raw_parts(host.add(offset), in_first as usize) };
            if now != &bytes[offset..offset + in_first as usize] {
                let miss = self.engine().stubs.jump_gone;
                self.engine().cache.invalidate(key.gpa, 1, miss);
                return self.translate(key, global);
            }
            return Ok((number, global));
        }
    }

    /// Notes that granules of a page hold translated code; from then on no write entry leads to it.
    pub(super) fn mark_code(&mut self, page: u64, host_page: u64, mask: u64) {
        let machine = Arc::clone(&self.machine);
        let Some(bits) = machine.granules(page) else {
            return;
        };
        if machine.mark(bits, mask, page, host_page, self.id) {
            self.forbid_writes(host_page);
        }
    }

    /// Forgets all translated code of this CPU.
    pub(super) fn flush_code(&mut self) {
        let engine = self.engine();
        engine.cache.flush();
        engine.lists.exits.clear();
        engine.lists.instructions.clear();
        engine.lists.sites.clear();
        engine.lists.places.clear();
        engine.split.clear();
        engine.counters.flushes += 1;
        self.flush_jumps(true);
    }

    /// Makes an indirect entry known to translated code.
    pub(super) fn note_jump(&mut self, rip: u64, indirect: u64, global: bool) {
        let user = user(self);
        let level = usize::from(user);
        let at = jump_index(rip);
        let miss = self.engine().stubs.jump_miss;
        if user || global {
            self.note_second_jump(rip, user, indirect);
        }
        let slot = &mut self.levels()[level].jump[at];
        if *slot == indirect {
            return;
        }
        let fresh = *slot == miss;
        *slot = indirect;
        if fresh {
            let second = self.second();
            let end = second.listed[level] as usize;
            second.list[level][end] = at as u16;
            second.listed[level] += 1;
        }
        let engine = self.engine();
        engine.supervisor_nonglobal |= level == 0 && !global;
        let bit = page_bit(rip);
        engine.jump_pages[bit / 64] |= 1 << (bit % 64);
    }

    /// Makes every jump table entry lead to the miss stub.
    pub(crate) fn reset_jumps(&mut self) {
        let miss = self.engine().stubs.jump_miss;
        for level in self.levels() {
            level.jump = [miss; JUMP_ENTRIES];
        }
        self.second().listed = [0; 2];
        let gone = self.engine().stubs.jump_gone;
        self.wipe_second_jumps(gone);
    }
}
