//! The look-aside buffers and the tables of jump targets: filling and flushing.
//!
//! Two stages each. The first ([`Level`]) is what translated code looks into by itself. Its entries are keyed by address only, so
//! whatever changes what an address means flushes. The second ([`Second`]) is what the stubs look into next, still without
//! Rust. Its entries carry a *context*: a number that stands for one PCID since its last flush. MOV to CR3 thus changes the
//! number and flushes the first stage, which fills up again from the second at a few nanoseconds an entry. Numbers are not
//! used again before the second stage was emptied.

use crate::state::{
    Cpu, Frame, JumpEntry, Level, MANY_WRITERS, SECOND_JUMPS, SECOND_TLB, Second, TLB_ENTRIES,
    TlbEntry, WRITERS,
};
use crate::system::cr;

/// The highest number of a context: an empty entry's tag has all ones.
pub(crate) const LAST_CONTEXT: u16 = 0xffe;
/// In [`Second::mix`]: ring 3.
const MIX_USER: u64 = 1 << 60;
const MIX_SHIFT: u32 = 48;

/// Index of a page in [`Level::read`] and [`Level::write`].
#[inline]
pub const fn index(va: u64) -> usize {
    (va >> 12) as usize & (TLB_ENTRIES - 1)
}

/// The entry that no address matches: the tag's page has another index.
const fn empty(at: usize) -> TlbEntry {
    TlbEntry {
        tag: ((at ^ 1) as u64) << 12,
        host: 0,
    }
}

static EMPTY: [TlbEntry; TLB_ENTRIES] = {
    let mut entries = [empty(0); TLB_ENTRIES];
    let mut at = 0;
    while at < TLB_ENTRIES {
        entries[at] = empty(at);
        at += 1;
    }
    entries
};

/// Index in [`Second::jump`].
#[inline]
pub(crate) const fn second_jump(rip: u64) -> usize {
    (rip ^ rip >> 12) as usize & (SECOND_JUMPS - 1)
}

/// Index in [`Second::tlb`].
#[inline]
const fn second_index(va: u64) -> usize {
    (va >> 12) as usize & (SECOND_TLB - 1)
}

/// Index in [`Second::writers`].
#[inline]
pub(crate) const fn writer(host_page: u64) -> usize {
    (host_page >> 12) as usize & (WRITERS - 1)
}

impl Second {
    fn written(&mut self, place: usize) -> &mut TlbEntry {
        &mut self.tlb[1 + place / SECOND_TLB * 2][place % SECOND_TLB]
    }

    /// An entry for writing was filled at `place`. Whatever valid entries there are of pages with this index, `writers` leads
    /// to them.
    fn note_writer(&mut self, host_page: u64, place: usize) {
        let index = writer(host_page);
        let known = self.writers[index];
        let here = place as u16 + 1;
        self.writers[index] = match known {
            0 => here,
            MANY_WRITERS => MANY_WRITERS,
            _ if known == here => here,
            _ => {
                let entry = *self.written(usize::from(known) - 1);
                let lives = entry.tag != NO_ENTRY.tag && writer(entry.host) == index;
                if lives { MANY_WRITERS } else { here }
            }
        };
    }

    /// Drops the entries for writing to a page.
    fn drop_writers(&mut self, host_page: u64) {
        let index = writer(host_page);
        match self.writers[index] {
            0 => {}
            MANY_WRITERS => {
                let mut left = 0;
                for place in 0..2 * SECOND_TLB {
                    let entry = self.written(place);
                    if entry.host == host_page {
                        *entry = NO_ENTRY;
                    } else if entry.tag != NO_ENTRY.tag && writer(entry.host) == index {
                        left = if left == 0 {
                            place as u16 + 1
                        } else {
                            MANY_WRITERS
                        };
                    }
                }
                self.writers[index] = left;
            }
            known => {
                let entry = self.written(usize::from(known) - 1);
                if entry.host == host_page {
                    *entry = NO_ENTRY;
                    self.writers[index] = 0;
                }
            }
        }
    }

    fn empty_tlb(&mut self) {
        self.tlb.as_flattened_mut().fill(NO_ENTRY);
        self.writers.fill(0);
    }
}

const NO_ENTRY: TlbEntry = TlbEntry {
    tag: u64::MAX,
    host: 0,
};

/// Pages of code by virtual address. One per CPU, in its engine.
pub(crate) struct Notes {
    fetch: Vec<Fetch>,
}

#[derive(Clone, Copy)]
struct Fetch {
    page: u64,
    gpa: u64,
    global: bool,
    context: u64,
}

const NO_FETCH: Fetch = Fetch {
    page: u64::MAX,
    gpa: 0,
    global: false,
    context: 0,
};
const FETCHES: usize = 512;

impl Notes {
    pub(crate) fn new() -> Notes {
        Notes {
            fetch: vec![NO_FETCH; 2 * FETCHES],
        }
    }

    fn slot(va: u64, user: bool) -> usize {
        (va >> 12) as usize % FETCHES + if user { FETCHES } else { 0 }
    }

    /// Guest-physical page of code at `va`, where it is known.
    pub(crate) fn fetch(&self, va: u64, user: bool, context: u64) -> Option<(u64, bool)> {
        let f = &self.fetch[Notes::slot(va, user)];
        (f.page == va & !0xfff && (f.global || f.context == context)).then_some((f.gpa, f.global))
    }

    pub(crate) fn note_fetch(&mut self, va: u64, user: bool, gpa: u64, global: bool, context: u64) {
        self.fetch[Notes::slot(va, user)] = Fetch {
            page: va & !0xfff,
            gpa: gpa & !0xfff,
            global,
            context,
        };
    }
}

impl Cpu {
    /// The look-aside buffers that belong to this CPU.
    pub(crate) fn levels(&mut self) -> &mut [Level; 2] {
        let frame: *mut Frame = std::ptr::from_mut(self).cast();
        // SAFETY: a Cpu only exists as the first field of its Frame (`repr(C)`); the two fields are disjoint.
        unsafe { &mut *(*frame).levels.get() }
    }

    /// The second stage of this CPU.
    pub(crate) fn second(&mut self) -> &mut Second {
        let frame: *mut Frame = std::ptr::from_mut(self).cast();
        // SAFETY: as in `levels`.
        unsafe { &mut *(*frame).second.get() }
    }

    /// Fills one entry of each stage.
    pub(crate) fn fill_tlb(
        &mut self,
        user: bool,
        write: bool,
        va: u64,
        host_page: u64,
        global: bool,
    ) {
        if self.debug.watches && self.watched_page(va) {
            return;
        }
        let at = index(va);
        let level = &mut self.levels()[usize::from(user)];
        let table = if write {
            &mut level.write
        } else {
            &mut level.read
        };
        table[at] = TlbEntry {
            tag: va & !0xfff,
            host: host_page,
        };
        let second = self.second();
        let table = usize::from(user) * 2 + usize::from(write);
        let word = &mut second.nonglobal[table][at / 64];
        if global {
            *word &= !(1 << (at % 64));
        } else {
            *word |= 1 << (at % 64);
        }
        // The stub of ring 3 looks for its own pages only.
        let context = if global && !user { 0 } else { second.context };
        second.tlb[table][second_index(va)] = TlbEntry {
            tag: va & !0xfff | context,
            host: host_page,
        };
        if write {
            second.note_writer(host_page, usize::from(user) * SECOND_TLB + second_index(va));
        }
    }

    /// The indirect entry for `rip` in the second stage.
    pub(crate) fn second_jump(&mut self, rip: u64, user: bool) -> Option<u64> {
        let second = self.second();
        let key = if user { rip ^ second.mix } else { rip };
        let entry = second.jump[second_jump(rip)];
        (entry.key == key).then_some(entry.host)
    }

    pub(crate) fn note_second_jump(&mut self, rip: u64, user: bool, host: u64) {
        let second = self.second();
        let key = if user { rip ^ second.mix } else { rip };
        second.jump[second_jump(rip)] = JumpEntry { key, host };
    }

    /// Empties the second table of jump targets. `nowhere`: the stub that leaves for the run loop.
    pub(crate) fn wipe_second_jumps(&mut self, nowhere: u64) {
        self.second().jump.fill(JumpEntry {
            key: u64::MAX,
            host: nowhere,
        });
    }

    /// Forgets jump targets in the page of `va` and in the page before it, whose last instruction may go on here.
    pub(crate) fn drop_second_jumps(&mut self, va: u64, nowhere: u64) {
        // Without what `mix` may have changed, and without the offset.
        const PAGE: u64 = 0x0000_ffff_ffff_f000;
        const { assert!(SECOND_JUMPS >= 4096) };
        let before = va.wrapping_sub(4096);
        // Targets of one page differ in the low twelve bits of their index only.
        let window = second_jump(va) & !0xfff;
        let ends = (4096 - 15..4096).map(|n| (before, second_jump(before & !0xfff | n)));
        let all = (window..window + 4096).map(|at| (va, at));
        let jump = &mut self.second().jump;
        for (page, at) in all.chain(ends) {
            if (jump[at].key ^ page) & PAGE == 0 {
                jump[at] = JumpEntry {
                    key: u64::MAX,
                    host: nowhere,
                };
            }
        }
    }

    /// Gives the current address space a number that nothing in the second stage has.
    fn renew_context(&mut self) {
        let pcid = self.pcid();
        if self.second().given >= LAST_CONTEXT {
            let nowhere = self.engine_mut().map_or(0, |e| e.nowhere());
            self.wipe_second_jumps(nowhere);
            let second = self.second();
            second.empty_tlb();
            second.contexts.fill(0);
            second.given = 0;
            if let Some(engine) = self.engine_mut() {
                engine.notes.fetch.fill(NO_FETCH);
            }
        }
        let second = self.second();
        second.given += 1;
        second.contexts[pcid] = second.given;
        let given = second.given;
        self.enter_context(given);
    }

    fn enter_context(&mut self, number: u16) {
        let second = self.second();
        second.context = u64::from(number);
        second.mix = u64::from(number) << MIX_SHIFT | MIX_USER;
    }

    fn pcid(&self) -> usize {
        if self.cr4 & cr::CR4_PCIDE != 0 {
            (self.cr3 & 0xfff) as usize
        } else {
            0
        }
    }

    /// CR3 was loaded; `keep`: with the translations that its PCID has.
    pub(crate) fn switch_context(&mut self, keep: bool) {
        let pcid = self.pcid();
        let known = self.second().contexts[pcid];
        if keep && known != 0 {
            self.flush_first_nonglobal();
            self.enter_context(known);
        } else {
            self.flush_tlb_nonglobal();
        }
    }

    /// Forgets the translations of one PCID that are not global.
    pub(crate) fn flush_pcid(&mut self, pcid: u64) {
        if pcid == self.pcid() as u64 {
            self.flush_tlb_nonglobal();
        } else {
            self.second().contexts[(pcid & 0xfff) as usize] = 0;
        }
    }

    /// Forgets the translations of all PCIDs that are not global.
    pub(crate) fn flush_pcids(&mut self) {
        self.second().contexts.fill(0);
        self.flush_tlb_nonglobal();
    }

    /// Forgets every translation: CR0, CR4, EFER changed, INVPCID of everything.
    pub fn flush_tlb(&mut self) {
        for level in self.levels() {
            level.read = EMPTY;
            level.write = EMPTY;
        }
        let second = self.second();
        second.nonglobal = [[0; TLB_ENTRIES / 64]; 4];
        second.empty_tlb();
        second.contexts.fill(0);
        if let Some(engine) = self.engine_mut() {
            engine.notes.fetch.fill(NO_FETCH);
        }
        self.flush_jumps(true);
        self.renew_context();
    }

    /// Forgets translations of this address space that are not global: MOV to CR3.
    pub fn flush_tlb_nonglobal(&mut self) {
        self.flush_first_nonglobal();
        self.renew_context();
    }

    fn flush_first_nonglobal(&mut self) {
        let second = self.second();
        let marks = std::mem::replace(&mut second.nonglobal, [[0; TLB_ENTRIES / 64]; 4]);
        for (n, marks) in marks.iter().enumerate() {
            let level = &mut self.levels()[n / 2];
            let table = if n % 2 == 1 {
                &mut level.write
            } else {
                &mut level.read
            };
            for (word, bits) in marks.iter().enumerate() {
                let mut bits = *bits;
                while bits != 0 {
                    let at = word * 64 + bits.trailing_zeros() as usize;
                    table[at] = empty(at);
                    bits &= bits - 1;
                }
            }
        }
        self.flush_jumps(false);
    }

    /// Forgets the translation of one page: INVLPG.
    pub fn flush_tlb_page(&mut self, va: u64) {
        let at = index(va);
        for level in self.levels() {
            level.read[at] = empty(at);
            level.write[at] = empty(at);
        }
        for table in &mut self.second().tlb {
            table[second_index(va)] = NO_ENTRY;
        }
        if let Some(engine) = self.engine_mut() {
            let mut known = false;
            for user in [false, true] {
                let f = &mut engine.notes.fetch[Notes::slot(va, user)];
                known |= f.page == va & !0xfff;
                *f = NO_FETCH;
            }
            if known || engine.jumps_to(va) || engine.jumps_to(va.wrapping_sub(4096)) {
                self.flush_jumps_of(va);
            }
        }
    }

    /// Forgets that a page of RAM may be written without a look at its code bits.
    pub(crate) fn forbid_writes(&mut self, host_page: u64) {
        for level in self.levels() {
            for (at, entry) in level.write.iter_mut().enumerate() {
                if entry.host == host_page {
                    *entry = empty(at);
                }
            }
        }
        self.second().drop_writers(host_page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_entry_for_writing_is_left_of_a_page_that_may_not_be_written() {
        // SAFETY: plain integers, for which zero is a value.
        let mut second: Box<Second> = unsafe { Box::<Second>::new_zeroed().assume_init() };
        second.empty_tlb();
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        for round in 0..20_000 {
            // Few places and pages, half of which share an index with another.
            let place = next(64) as usize * 128;
            let page = 0x7f00_0000_0000 + (next(24) << 12) + (next(2) * WRITERS as u64 * 4096);
            match next(4) {
                0 => {
                    second.drop_writers(page);
                    let left = (0..2 * SECOND_TLB).any(|at| second.written(at).host == page);
                    assert!(!left, "round {round}");
                }
                1 => *second.written(place) = NO_ENTRY,
                _ => {
                    *second.written(place) = TlbEntry {
                        tag: (place as u64) << 12,
                        host: page,
                    };
                    second.note_writer(page, place);
                }
            }
        }
    }
}
