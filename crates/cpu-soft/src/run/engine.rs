//! The translator's side of one CPU: code cache, tables, counters.

use std::collections::HashMap;

use cpu::CpuError;

use super::entry::{instruction_entry, memory_entry};
use crate::cache::Cache;
use crate::replay::Options;
use crate::state::{Cpu, Fault, Flow, Frame};
use crate::stubs::{self, Entries};
use crate::tlb::Notes;
use crate::translate::emit::Code;
use crate::translate::{Lists, Stubs, Workshop};

/// See [`Engine::split`].
pub(super) const SPLIT: u8 = 8;

/// The translator's side of one CPU.
pub struct Engine {
    pub(crate) cache: Cache,
    pub(super) stubs: Stubs,
    pub(super) workshop: Workshop,
    pub(super) lists: Lists,
    pub(super) code: Code,
    pub(crate) notes: Notes,
    /// Filter of the pages that jump table entries lead to.
    pub(super) jump_pages: Vec<u64>,
    /// Entries of the supervisor's jump table from pages that are not global.
    pub(super) supervisor_nonglobal: bool,
    /// Set when a Rust function makes translated code leave.
    pub(super) pending: Option<Pending>,
    /// The next block is one instruction long: an access that blocks cannot do in place.
    pub(super) single: bool,
    /// What all blocks were made for: the offset of the guest's TSC, and EFER.SCE.
    pub(super) tsc_offset: u64,
    pub(super) calls: bool,
    pub(crate) options: Options,
    /// How often a block's group of accesses could not be had whole, by the guest-physical address of the block: from [`SPLIT`] on
    /// it is made without groups.
    pub(super) split: HashMap<u64, u8>,
    pub(crate) counters: Counters,
}

/// Why a Rust function made translated code leave.
pub(super) enum Pending {
    Fault(Fault),
    Flow(Flow),
    /// Repeat the instruction at rip alone.
    Single,
    /// The block died under the instruction; go on at rip.
    Again,
}

#[derive(Default)]
pub(crate) struct Counters {
    pub blocks: u64,
    /// Blocks made by [`crate::translate::place::copy`].
    pub copies: u64,
    pub instructions: u64,
    pub dispatches: u64,
    pub memory: u64,
    pub rust: u64,
    pub singles: u64,
    pub flushes: u64,
    pub faults: u64,
    pub invalidations: u64,
    /// Exits by reason, and Rust instructions by mnemonic: kept in mode `profile` only.
    pub reasons: [u64; 8],
    pub mnemonics: HashMap<iced_x86::Mnemonic, (u64, u64)>,
}

impl Counters {
    /// How often Rust ran such an instruction, and how often it did not go straight on from there.
    pub(super) fn of(&mut self, instruction: &iced_x86::Instruction) -> &mut (u64, u64) {
        self.mnemonics.entry(instruction.mnemonic()).or_default()
    }
}

impl Engine {
    pub(crate) fn new(
        frame: &Frame,
        cache_bytes: usize,
        options: Options,
    ) -> Result<Engine, CpuError> {
        let mut cache = Cache::new(cache_bytes).map_err(|source| CpuError::Host {
            what: "mapping the code cache",
            source,
        })?;
        let entries = Entries {
            memory: memory_entry as *const () as u64,
            instruction: instruction_entry as *const () as u64,
        };
        let stubs = stubs::install(&mut cache, std::ptr::from_ref(frame) as u64, entries);
        Ok(Engine {
            cache,
            stubs,
            workshop: Workshop::new(),
            lists: Lists::default(),
            code: Code::new(0),
            notes: Notes::new(),
            jump_pages: vec![0; 2048],
            supervisor_nonglobal: false,
            pending: None,
            single: false,
            tsc_offset: 0,
            calls: false,
            options,
            split: HashMap::new(),
            counters: Counters::default(),
        })
    }

    /// Mode `profile`: what left translated code, to standard error.
    pub(super) fn report(&self) {
        let c = &self.counters;
        eprintln!(
            "exits: chain {} target {} indirect {} start {}",
            c.reasons[3], c.reasons[4], c.reasons[5], c.reasons[6]
        );
        let mut list: Vec<_> = c.mnemonics.iter().collect();
        list.sort_by_key(|(_, n)| std::cmp::Reverse(n.0));
        for (mnemonic, (all, ended)) in list.iter().take(40) {
            eprintln!("{mnemonic:?}: {all}, {ended} ended the block");
        }
    }

    /// Counters for people.
    pub(crate) fn list(&self) -> Vec<(&'static str, u64)> {
        let c = &self.counters;
        vec![
            ("blocks translated", c.blocks),
            ("blocks copied", c.copies),
            ("instructions translated", c.instructions),
            ("code bytes", self.cache.used() as u64),
            ("dispatches", c.dispatches),
            ("memory misses", c.memory),
            ("instructions in rust", c.rust),
            ("single steps", c.singles),
            ("cache flushes", c.flushes),
            ("faults", c.faults),
            ("code invalidations", c.invalidations),
        ]
    }

    /// The stub that leaves for the run loop at the target in r10.
    pub(crate) fn nowhere(&self) -> u64 {
        self.stubs.jump_gone
    }

    /// Whether the jump tables may hold entries of the page.
    pub(crate) fn jumps_to(&self, va: u64) -> bool {
        let bit = page_bit(va);
        self.jump_pages[bit / 64] >> (bit % 64) & 1 != 0
    }
}

pub(super) fn page_bit(va: u64) -> usize {
    ((va >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 47) as usize
}

/// Rights bits of a page fault are found by the walk; levels by privilege.
pub(super) fn user(cpu: &Cpu) -> bool {
    cpu.cpl == 3
}
