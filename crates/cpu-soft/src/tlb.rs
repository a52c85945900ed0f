//! The inline look-aside buffers: filling and flushing. Entries are keyed by virtual page only, so whatever changes
//! what a virtual page means flushes.

use crate::state::{Cpu, Frame, JUMP_ENTRIES, Level, TLB_ENTRIES, TlbEntry};

const EMPTY: TlbEntry = TlbEntry {
    tag: u64::MAX,
    addend: 0,
};

/// Index of a page in [`Level::read`] and [`Level::write`].
#[inline]
pub fn index(va: u64) -> usize {
    (va >> 12) as usize & (TLB_ENTRIES - 1)
}

impl Cpu {
    /// The look-aside buffers that belong to this CPU.
    pub(crate) fn levels(&mut self) -> &mut [Level; 2] {
        let frame: *mut Frame = std::ptr::from_mut(self).cast();
        // SAFETY: a Cpu only exists as the first field of its Frame (`repr(C)`), made by `run`; the two fields are disjoint.
        unsafe { &mut *(*frame).levels.get() }
    }

    /// Forgets every translation: CR3, CR0, CR4, EFER changed, INVPCID of everything.
    /// Translations of global pages are not kept apart.
    pub fn flush_tlb(&mut self) {
        for level in self.levels() {
            level.read.fill(EMPTY);
            level.write.fill(EMPTY);
        }
        self.flush_jumps();
    }

    /// Forgets translations of pages that are not global: MOV to CR3.
    pub fn flush_tlb_nonglobal(&mut self) {
        self.flush_tlb();
    }

    /// Forgets the translation of one page: INVLPG.
    pub fn flush_tlb_page(&mut self, va: u64) {
        let at = index(va);
        for level in self.levels() {
            level.read[at] = EMPTY;
            level.write[at] = EMPTY;
        }
        self.flush_jumps();
    }

    /// Forgets indirect jump targets.
    pub(crate) fn flush_jumps(&mut self) {
        let miss = crate::run::jump_miss(self);
        for level in self.levels() {
            level.jump = [miss; JUMP_ENTRIES];
        }
    }
}
