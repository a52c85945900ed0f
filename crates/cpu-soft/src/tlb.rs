//! The inline look-aside buffers: filling and flushing. Entries are keyed by virtual page only, so whatever changes
//! what a virtual page means flushes.

use crate::state::{Cpu, Frame, Level, TLB_ENTRIES, TlbEntry};

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

/// What is known of entries beside what translated code needs. One per CPU, in its engine.
pub(crate) struct Notes {
    /// For each of (level, write): entries filled from pages that are not global.
    nonglobal: [[u64; TLB_ENTRIES / 64]; 4],
    fetch: Vec<Fetch>,
}

#[derive(Clone, Copy)]
struct Fetch {
    page: u64,
    gpa: u64,
    global: bool,
}

const NO_FETCH: Fetch = Fetch {
    page: u64::MAX,
    gpa: 0,
    global: false,
};
const FETCHES: usize = 512;

impl Notes {
    pub(crate) fn new() -> Notes {
        Notes {
            nonglobal: [[0; TLB_ENTRIES / 64]; 4],
            fetch: vec![NO_FETCH; 2 * FETCHES],
        }
    }

    fn slot(va: u64, user: bool) -> usize {
        (va >> 12) as usize % FETCHES + if user { FETCHES } else { 0 }
    }

    /// Guest-physical page of code at `va`, where it is known.
    pub(crate) fn fetch(&self, va: u64, user: bool) -> Option<(u64, bool)> {
        let f = &self.fetch[Notes::slot(va, user)];
        (f.page == va & !0xfff).then_some((f.gpa, f.global))
    }

    pub(crate) fn note_fetch(&mut self, va: u64, user: bool, gpa: u64, global: bool) {
        self.fetch[Notes::slot(va, user)] = Fetch {
            page: va & !0xfff,
            gpa: gpa & !0xfff,
            global,
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

    /// Fills one entry.
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
        if let Some(engine) = self.engine_mut() {
            let word =
                &mut engine.notes.nonglobal[usize::from(user) * 2 + usize::from(write)][at / 64];
            if global {
                *word &= !(1 << (at % 64));
            } else {
                *word |= 1 << (at % 64);
            }
        }
    }

    /// Forgets every translation: CR0, CR4, EFER changed, INVPCID of everything.
    pub fn flush_tlb(&mut self) {
        for level in self.levels() {
            level.read = EMPTY;
            level.write = EMPTY;
        }
        if let Some(engine) = self.engine_mut() {
            engine.notes.nonglobal = [[0; TLB_ENTRIES / 64]; 4];
            engine.notes.fetch.fill(NO_FETCH);
        }
        self.flush_jumps(true);
    }

    /// Forgets translations of pages that are not global: MOV to CR3.
    pub fn flush_tlb_nonglobal(&mut self) {
        let Some(engine) = self.engine_mut() else {
            return self.flush_tlb();
        };
        let marks = std::mem::replace(&mut engine.notes.nonglobal, [[0; TLB_ENTRIES / 64]; 4]);
        for f in &mut engine.notes.fetch {
            if !f.global {
                *f = NO_FETCH;
            }
        }
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
    }
}
