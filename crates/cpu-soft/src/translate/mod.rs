//! Same-ISA translation: guest instructions are copied to the code cache, with memory operands sent through the inline
//! look-aside buffer, r10 and r11 kept in memory, control flow made into exits, and system instructions into calls.
//!
//! While translated code runs: host GS = the CPU's [`Frame`], fourteen guest registers in their own host registers, host
//! r10 and r11 free, guest flags in EFLAGS. Two conventions join blocks:
//! - a *direct* entry (same guest page): flags in EFLAGS;
//! - an *indirect* entry: guest target in r10, flags in the slot [`FLAGS_SLOT`] (LAHF and SETO form). It compares r10 with
//!   its own address, since the table it was reached by is a hash, and polls [`Cpu::attention`].
//!
//! A memory check leaves r10 = offset in the page and r11 = host address of the page. It destroys EFLAGS, so where the
//! block's liveness says that flags are still needed they are first saved to the slot. Flags that are dead are not kept, even
//! where the instruction then faults: the handler sees some value in them.

pub mod emit;
mod group;
mod instruction;
pub mod kind;
mod memory;
pub mod place;
mod repeat;
#[cfg(test)]
mod tests;

use std::mem::offset_of;

use iced_x86::{Decoder, DecoderError, DecoderOptions, Encoder, Instruction};

use crate::cache::{Key, mode};
use crate::state::{Cpu, Frame, JUMP_ENTRIES, Level};
use emit::*;
use kind::{ALL_FLAGS, Way};

pub(crate) const GPR: usize = offset_of!(Cpu, gpr);
pub(crate) const SCRATCH: usize = offset_of!(Cpu, scratch);
/// AX after LAHF and SETO AL.
pub(crate) const FLAGS_SLOT: usize = SCRATCH;
pub(crate) const SAVED_RAX: usize = SCRATCH + 8;
const SAVED_OPERAND: usize = SCRATCH + 16;
const SAVED_LOW: usize = SCRATCH + 24;
pub(crate) const TARGET: usize = SCRATCH + 32;
pub(crate) const RETURN: usize = SCRATCH + 40;

pub(crate) fn level_offset(user: bool) -> usize {
    offset_of!(Frame, levels) + if user { size_of::<Level>() } else { 0 }
}

/// Index of a guest address in [`Level::jump`].
pub fn jump_index(rip: u64) -> usize {
    rip as usize & (JUMP_ENTRIES - 1)
}

/// Why translated code leaves for Rust: the low byte of the first descriptor word, which `r11` points at.
pub mod leave {
    /// A memory access missed the inline buffer. Second word: displacement of the place to go on at, from the descriptor.
    pub const MEMORY: u32 = 1;
    /// An instruction for Rust. Second word: its number in the engine's list.
    pub const INSTRUCTION: u32 = 2;
    /// A direct exit not yet chained. Second word: number of the exit.
    pub const CHAIN: u32 = 3;
    /// As CHAIN, but only the target is meant: a poll saw attention, or a single-instruction block ended.
    pub const TARGET: u32 = 4;
    /// Guest target in r10.
    pub const INDIRECT: u32 = 5;
    /// At the start of the block itself. Second word: the block's number.
    pub const START: u32 = 6;

    /// With MEMORY: atomic, which a host makes very dear (or refuses) across cache lines.
    pub const LOCK: u32 = 1 << 7;
    /// Flags are in the slot.
    pub const SLOT: u32 = 1 << 8;
    pub const WRITE: u32 = 1 << 9;
    /// A stretch of several accesses: where it cannot be had whole, its first instruction runs alone.
    pub const GROUP: u32 = 1 << 11;
    /// A write that also reads.
    pub const MODIFY: u32 = 1 << 10;
    pub const SIZE_SHIFT: u32 = 12;
    /// Guest offset of the instruction from the block's start.
    pub const OFFSET_SHIFT: u32 = 20;
}

/// Host addresses of the stubs that blocks jump to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stubs {
    pub enter: u64,
    pub memory: u64,
    pub instruction: u64,
    /// SYSCALL with the address of the next instruction in rcx, and SYSRET to 64-bit code, with a descriptor.
    pub syscall: u64,
    pub sysret: u64,
    pub exit: u64,
    /// For what the first table of jump targets does not know: looks into the second, then leaves for the run loop.
    pub jump_miss: u64,
    /// Leaves for the run loop at once: blocks that died, blocks of one instruction.
    pub jump_gone: u64,
    pub host_fault: u64,
}

/// What to translate.
pub struct Request<'a> {
    pub key: Key,
    /// The number the block will have.
    pub number: u32,
    /// Guest bytes from rip on, to the end of the page; a few of the next page's behind them only when `crossing`.
    pub bytes: &'a [u8],
    /// How many of the bytes are of the first page.
    pub first_page: usize,
    pub stubs: Stubs,
    /// Whether a block of the same page is known for an address, and whether flags are live there.
    pub known: &'a dyn Fn(u64) -> Option<bool>,
    /// The page's bytes, for a look at the flags jump targets need.
    pub page: &'a [u8],
    pub tsc_shifted: bool,
    /// Instructions are counted, for [`crate::replay`].
    pub counted: bool,
    /// Accesses by one register may be checked together.
    pub groups: bool,
    /// The machine has other CPUs.
    pub several: bool,
    /// What depends on addresses is to be listed, for [`place::copy`].
    pub movable: bool,
    /// EFER.SCE.
    pub calls: bool,
    /// One instruction a block, though chained as others.
    pub short: bool,
    /// Whether the guest's CPUID shows what an instruction needs.
    pub offers: &'a dyn Fn(&Instruction) -> bool,
}

impl Request<'_> {
    /// How an instruction is carried out in this block; `last`: the block ends with it.
    fn way(&self, instruction: &Instruction, last: bool) -> Way {
        let k = kind::kind(instruction);
        let elsewhere = (k.fpu && self.key.mode & mode::NO_FPU != 0)
            || (k.avx && self.key.mode & mode::NO_AVX != 0)
            || (self.counted && crate::replay::opens(instruction))
            || (k.ring0 && self.key.mode & mode::USER != 0)
            // The shadow of STI reaches over the next instruction, which must be in the same block.
            || (last && instruction.mnemonic() == iced_x86::Mnemonic::Sti)
            || (matches!(
                instruction.mnemonic(),
                iced_x86::Mnemonic::Syscall | iced_x86::Mnemonic::Sysretq
            ) && (!self.calls || self.key.mode & mode::SINGLE != 0))
            // Whoever waits for another CPU may keep the host from running it.
            || (self.several && instruction.mnemonic() == iced_x86::Mnemonic::Pause)
            || (k.extended && !(self.offers)(instruction));
        if elsewhere { Way::Rust } else { k.way }
    }
}

/// In place of an instruction's number: hash the registers and go on, with EFLAGS and the slot as they are.
pub const CHECKPOINT: u32 = u32::MAX;

/// A direct exit.
#[derive(Debug, Clone, Copy)]
pub struct Exit {
    pub target: u64,
    /// Host address of the displacement to patch, of a jump or a conditional one; 0: never chained.
    pub site: u64,
    /// What the displacement is before that: it leads to the way out through the run loop.
    pub unchained: u32,
    /// Number of the block it belongs to.
    pub block: u32,
}

/// An instruction that may trap on the host: where, and which.
#[derive(Debug, Clone, Copy)]
pub struct Site {
    pub host: u64,
    pub end: u64,
    pub rip: u64,
    pub slot: bool,
}

/// What came of a [`Request`], beside the code.
pub struct Built {
    pub indirect: u64,
    pub direct: u64,
    pub leave: u64,
    pub len: u32,
    pub crossing: bool,
    pub flags_live: bool,
    pub instructions: u32,
    /// As in [`crate::cache::Block`].
    pub places: Option<(u32, u32)>,
    pub sites: (u32, u32),
}

/// Numbers that exits, instructions and sites get, and where they are put.
#[derive(Default)]
pub struct Lists {
    pub exits: Vec<Exit>,
    /// Instructions for Rust, with the number of their block.
    pub instructions: Vec<(Instruction, u32)>,
    pub sites: Vec<Site>,
    pub places: Vec<place::Place>,
}

/// Instructions in a block at most.
const BLOCK_LIMIT: usize = 48;
/// Conditional jumps that a block goes on behind, at most.
const SIDES: usize = 4;

/// Where the guest's flags are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flags {
    Host,
    Slot,
    Both,
}

struct Slow {
    branch: Patch,
    /// How r10 becomes the guest address again.
    address: Address,
    words: u32,
    back: u64,
}

enum Address {
    /// `xor r10, gs:[r11 + table]`.
    Undo(usize),
    /// Known; the flag: it moves with the block.
    Constant(u64, bool),
    /// It still is.
    Same,
}

/// A way out through the run loop, behind the block.
struct Out {
    branch: Patch,
    word: u32,
    exit: u32,
}

/// A conditional jump that cannot be chained: how it goes on, behind the block.
struct Side {
    branch: Patch,
    at: Instruction,
    flags: Flags,
    live: bool,
}

struct Translator<'a> {
    request: &'a Request<'a>,
    /// Something in it cannot be moved.
    fixed: bool,
    code: &'a mut Code,
    lists: &'a mut Lists,
    encoder: Encoder,
    slow: Vec<Slow>,
    outs: Vec<Out>,
    sides: Vec<Side>,
    detours: Vec<repeat::Detour>,
    part: Option<group::Part>,
    bmi2: bool,
    flags: Flags,
    user: bool,
    single: bool,
    /// Of the instruction under way.
    at: Instruction,
    live_before: u32,
    live_after: u32,
    /// Whether flags may be needed where it branches to.
    live_taken: bool,
}

/// The reusable parts of a translator.
pub struct Workshop {
    decoded: Vec<Instruction>,
    /// How each is carried out.
    ways: Vec<Way>,
    live: Vec<u32>,
    /// Whether flags may be needed where it branches to.
    taken: Vec<bool>,
    parts: Vec<Option<group::Part>>,
}

impl Workshop {
    pub fn new() -> Workshop {
        Workshop {
            decoded: Vec::with_capacity(64),
            ways: Vec::with_capacity(64),
            live: Vec::with_capacity(64),
            taken: Vec::with_capacity(64),
            parts: Vec::with_capacity(64),
        }
    }

    /// Translates one block into `code` (made for the address it will have). `None`: not even one instruction could be
    /// decoded from the bytes given, because it goes on in the next page.
    pub fn build(
        &mut self,
        request: &Request<'_>,
        code: &mut Code,
        lists: &mut Lists,
    ) -> Option<Built> {
        let single = request.key.mode & mode::SINGLE != 0;
        let limit = if single || request.short {
            1
        } else {
            BLOCK_LIMIT
        };
        self.decoded.clear();
        self.ways.clear();
        let mut sides = 0;
        let mut decoder =
            Decoder::with_ip(64, request.bytes, request.key.rip, DecoderOptions::NONE);
        let mut crossing = false;
        let mut ended = false;
        while self.decoded.len() < limit && !ended {
            let before = decoder.position();
            if before >= request.first_page {
                break;
            }
            let mut instruction = Instruction::default();
            decoder.decode_out(&mut instruction);
            if instruction.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
                if self.decoded.is_empty() {
                    return None;
                }
                break;
            }
            if decoder.position() > request.first_page {
                if !self.decoded.is_empty() {
                    break;
                }
                crossing = true;
                ended = true;
            }
            let way = request.way(&instruction, false);
            // Behind a conditional jump the block goes on, unless there is one already.
            let side = way == Way::Own
                && instruction.is_jcc_short_or_near()
                && sides < SIDES
                && (request.known)(instruction.next_ip()).is_none();
            sides += usize::from(side);
            ended |= match way {
                Way::Own => instruction.flow_control() != iced_x86::FlowControl::Next && !side,
                Way::Rust => {
                    instruction.is_invalid()
                        || instruction.flow_control() != iced_x86::FlowControl::Next
                }
                _ => false,
            };
            self.decoded.push(instruction);
            self.ways.push(way);
        }
        if let (Some(last), Some(way)) = (self.decoded.last(), self.ways.last_mut()) {
            *way = request.way(last, true);
        }
        let len = self.decoded.iter().map(Instruction::len).sum::<usize>();
        let next = request.key.rip.wrapping_add(len as u64);

        self.liveness(request, next, single || crossing);
        let flags_live = self.live[0] != 0;
        if request.groups {
            group::plan(request, &self.decoded, &self.ways, &mut self.parts);
        } else {
            self.parts.clear();
        }

        let (first_place, first_site) = (lists.places.len(), lists.sites.len());
        let mut t = Translator {
            request,
            fixed: crossing || !request.movable,
            code,
            lists,
            encoder: Encoder::new(64),
            slow: Vec::new(),
            outs: Vec::new(),
            sides: Vec::new(),
            detours: Vec::new(),
            part: None,
            bmi2: std::arch::is_x86_feature_detected!("bmi2"),
            flags: Flags::Host,
            user: request.key.mode & mode::USER != 0,
            single,
            at: Instruction::default(),
            live_before: 0,
            live_after: 0,
            live_taken: true,
        };
        // The way out at the start, for polls and for blocks that died.
        let leave = t.code.here();
        t.leave(leave::START, request.number);
        let indirect = t.code.here();
        t.indirect_entry(flags_live);
        let direct = t.code.here();
        let mut open = true;
        for (n, instruction) in self.decoded.iter().enumerate() {
            t.at = *instruction;
            t.live_before = self.live[n];
            t.part = self.parts.get(n).copied().flatten();
            t.live_after = self.live[n + 1];
            t.live_taken = self.taken[n];
            if request.counted && !instruction.is_invalid() {
                t.count();
            }
            open = t.instruction(self.ways[n]);
        }
        if open {
            t.exit_to(next, self.live[self.decoded.len()] != 0);
        }
        t.finish();
        let fixed = t.fixed;
        if fixed {
            t.lists.places.truncate(first_place);
        }
        let places = (
            first_place as u32,
            (t.lists.places.len() - first_place) as u32,
        );
        let sites = (first_site as u32, (t.lists.sites.len() - first_site) as u32);
        let instructions = self.decoded.len() as u32;
        Some(Built {
            places: (!fixed).then_some(places),
            sites,
            indirect,
            direct,
            leave,
            len: len as u32,
            crossing,
            flags_live,
            instructions,
        })
    }

    /// Which flags are needed before each instruction; `blind`: what comes behind the last is not looked at.
    fn liveness(&mut self, request: &Request<'_>, next: u64, blind: bool) {
        use iced_x86::FlowControl;
        let count = self.decoded.len();
        self.live.clear();
        self.live.resize(count + 1, 0);
        self.taken.clear();
        self.taken.resize(count, true);
        let needed = |target| {
            if blind || needs_flags(request, target) {
                ALL_FLAGS
            } else {
                0
            }
        };
        let mut live = match (self.decoded.last(), self.ways.last()) {
            (Some(last), Some(way)) => match last.flow_control() {
                FlowControl::UnconditionalBranch if *way == Way::Own => {
                    needed(last.near_branch_target())
                }
                FlowControl::ConditionalBranch if last.is_jcc_short_or_near() => needed(next),
                FlowControl::ConditionalBranch if *way == Way::Own => {
                    needed(next) | needed(last.near_branch_target())
                }
                FlowControl::Next if *way != Way::Rust => needed(next),
                _ => ALL_FLAGS,
            },
            _ => ALL_FLAGS,
        };
        self.live[count] = live;
        for (n, instruction) in self.decoded.iter().enumerate().rev() {
            if self.ways[n] == Way::Rust {
                live = ALL_FLAGS;
            } else {
                if instruction.is_jcc_short_or_near() {
                    let taken = needed(instruction.near_branch_target());
                    self.taken[n] = taken != 0;
                    live |= taken;
                }
                let (reads, kills) = kind::flags(instruction);
                live = (live & !kills) | reads;
            }
            self.live[n] = live;
        }
    }
}

impl Default for Workshop {
    fn default() -> Self {
        Workshop::new()
    }
}

/// Whether code at `target` may use flags from before it: looked up or decoded when it is in the request's page.
fn needs_flags(request: &Request<'_>, target: u64) -> bool {
    if (target ^ request.key.rip) >> 12 != 0 {
        return true;
    }
    if let Some(live) = (request.known)(target) {
        return live;
    }
    let bytes = &request.page[(target & 0xfff) as usize..];
    let mut decoder = Decoder::with_ip(64, bytes, target, DecoderOptions::NONE);
    let mut killed = 0;
    let mut instruction = Instruction::default();
    for _ in 0..6 {
        decoder.decode_out(&mut instruction);
        if instruction.is_invalid() || kind::kind(&instruction).way == Way::Rust {
            return true;
        }
        let (reads, kills) = kind::flags(&instruction);
        if reads & !killed != 0 {
            return true;
        }
        killed |= kills;
        if killed == ALL_FLAGS {
            return false;
        }
        if instruction.flow_control() != iced_x86::FlowControl::Next {
            return true;
        }
    }
    true
}

impl Translator<'_> {
    fn level(&self) -> usize {
        level_offset(self.user)
    }

    fn table(&self, write: bool) -> usize {
        self.level()
            + if write {
                offset_of!(Level, write)
            } else {
                offset_of!(Level, read)
            }
    }

    fn word(&self, reason: u32) -> u32 {
        let offset = self.at.ip().wrapping_sub(self.request.key.rip) as u32;
        let offset = if reason == leave::START || reason == leave::TARGET {
            0
        } else {
            offset
        };
        reason
            | if self.flags == Flags::Host {
                0
            } else {
                leave::SLOT
            }
            | offset << leave::OFFSET_SHIFT
    }

    /// Leaves for the run loop with a descriptor.
    fn leave(&mut self, reason: u32, payload: u32) {
        let word = self.word(reason);
        self.descriptor(self.request.stubs.exit, word, payload);
    }

    fn descriptor(&mut self, stub: u64, word: u32, payload: u32) {
        let lea = self.code.lea_r11_rip();
        self.code.jmp_to(stub);
        self.stub_displacement();
        self.code.bind(lea);
        self.code.u32(word);
        self.code.u32(payload);
        match word & 7 {
            leave::START => self.number_of_block(),
            leave::CHAIN | leave::TARGET => self.number_of_exit(),
            leave::INSTRUCTION => self.number_of_instruction(),
            _ => {}
        }
    }

    fn indirect_entry(&mut self, flags_live: bool) {
        let rip = self.request.key.rip;
        let miss = self.request.stubs.jump_miss;
        if let Ok(imm) = i32::try_from(rip as i64) {
            self.code.with_reg(true, &[0x81], 7, R10);
            self.code.u32(imm as u32);
        } else {
            self.guest_address(R11, rip);
            self.code.cmp_reg(R10, R11);
        }
        self.code.jcc_to(CC_NE, miss);
        self.stub_displacement();
        self.code
            .cmp32_mem_imm8(Mem::gs(offset_of!(Cpu, attention)), 0);
        self.code.jcc_to(CC_NE, miss);
        self.stub_displacement();
        if flags_live {
            self.restore_flags_code();
        }
    }

    /// EFLAGS from the slot; needs no scratch register.
    fn restore_flags_code(&mut self) {
        self.code.store(Mem::gs(SAVED_RAX), RAX);
        self.code.load32(RAX, Mem::gs(FLAGS_SLOT));
        self.code.raw(&[0x04, 0x7f, 0x9e]);
        self.code.load(RAX, Mem::gs(SAVED_RAX));
    }

    /// Slot from EFLAGS; destroys r11.
    fn save_flags_code(&mut self) {
        self.code.mov(R11, RAX);
        self.code.raw(&[0x9f, 0x0f, 0x90, 0xc0]);
        self.code.store32(Mem::gs(FLAGS_SLOT), RAX);
        self.code.mov(RAX, R11);
    }

    /// Before code that destroys EFLAGS: keeps the flags where `needed`.
    fn spare_flags(&mut self, needed: bool) {
        if self.flags == Flags::Host && needed {
            self.save_flags_code();
            self.flags = Flags::Both;
        }
    }

    /// Before code that uses EFLAGS.
    fn want_flags(&mut self) {
        if self.flags == Flags::Slot {
            self.restore_flags_code();
            self.flags = Flags::Both;
        }
    }

    /// Before the instruction itself: EFLAGS hold what it reads or leaves alone; afterwards they are as it leaves them.
    fn flags_for_instruction(&mut self) {
        let (reads, kills) = kind::flags(&self.at);
        if reads == 0 && kills == 0 {
            return;
        }
        if reads != 0 || self.live_after & !kills != 0 {
            self.want_flags();
        }
        if self.at.rflags_modified() & ALL_FLAGS != 0 {
            self.flags = Flags::Host;
        }
    }

    /// After code that destroyed EFLAGS.
    fn flags_destroyed(&mut self) {
        if self.flags == Flags::Both {
            self.flags = Flags::Slot;
        }
    }

    /// Counts the instruction; before control flow calls for a comparison of states.
    fn count(&mut self) {
        let count = Mem::gs(offset_of!(Cpu, count));
        self.code.load(R11, count);
        self.code.lea(R11, Mem::base(R11, 1));
        self.code.store(count, R11);
        if crate::replay::compared(&self.at) {
            let word = self.word(leave::INSTRUCTION);
            self.descriptor(self.request.stubs.instruction, word, CHECKPOINT);
        }
    }

    /// Goes to a known guest address: chained inside the page, by the table else. `live`: flags may be needed there.
    fn exit_to(&mut self, target: u64, live: bool) {
        if self.single {
            let exit = self.exit(target);
            self.leave(leave::TARGET, exit);
            return;
        }
        if !self.chainable(target) {
            self.spare_flags(true);
            self.guest_address(R10, target);
            let slot = self.level() + offset_of!(Level, jump) + jump_index(target) * 8;
            self.code.jmp_mem(Mem::gs(slot));
            self.jump_slot();
            return;
        }
        if live {
            self.want_flags();
        }
        let exit = self.exit(target);
        if target <= self.at.ip() {
            self.poll(exit, live);
        }
        let jump = self.code.jmp();
        self.chained(jump, exit);
    }

    /// A new exit of this block, not chained.
    fn exit(&mut self, target: u64) -> u32 {
        self.lists.exits.push(Exit {
            target,
            site: 0,
            unchained: 0,
            block: self.request.number,
        });
        self.lists.exits.len() as u32 - 1
    }

    /// Back edges poll: leaves for the run loop where that is wanted. Keeps EFLAGS where `live`.
    fn poll(&mut self, exit: u32, live: bool) {
        let attention = Mem::gs(offset_of!(Cpu, attention));
        let word = self.word(leave::TARGET);
        let branch = if live {
            self.code.mov(R10, RCX);
            self.code.load32(RCX, attention);
            let calm = self.code.short(JRCXZ);
            self.code.mov(RCX, R10);
            let branch = self.code.jmp();
            self.code.bind_short(calm);
            self.code.mov(RCX, R10);
            branch
        } else {
            self.code.cmp32_mem_imm8(attention, 0);
            self.code.jcc(CC_NE)
        };
        self.outs.push(Out { branch, word, exit });
    }

    /// The jump at `branch`, conditional or not, is the exit's, and will be chained.
    fn chained(&mut self, branch: Patch, exit: u32) {
        self.lists.exits[exit as usize].site = self.code.address_of(branch);
        let word = self.word(leave::CHAIN);
        self.outs.push(Out { branch, word, exit });
    }

    /// Whether a block at `target` can be chained to this one: of the same page, and all in it.
    fn chainable(&self, target: u64) -> bool {
        !self.single && (target ^ self.request.key.rip) >> 12 == 0 && !self.crosses(target)
    }

    /// Whether the instruction at `target`, in this page, goes on in the next: a block of its own, reached by the table.
    fn crosses(&self, target: u64) -> bool {
        let offset = (target & 0xfff) as usize;
        if offset <= 4096 - 15 {
            return false;
        }
        let mut decoder = Decoder::new(64, &self.request.page[offset..], DecoderOptions::NONE);
        decoder.decode().is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes
    }

    /// Goes to the guest address in r10; flags are in the slot.
    fn exit_indirect(&mut self) {
        if self.single {
            self.code.jmp_to(self.request.stubs.jump_gone);
            return;
        }
        const { assert!(JUMP_ENTRIES == 1 << 16) };
        self.code.with_reg(false, &[0x0f, 0xb7], R11, R10); // movzx r11d, r10w
        self.code.jmp_mem(Mem {
            base: None,
            index: Some((R11, 3)),
            disp: (self.level() + offset_of!(Level, jump)) as i32,
            gs: true,
        });
    }

    /// An instruction for Rust.
    fn call_rust(&mut self) {
        self.rust_by(self.request.stubs.instruction);
    }

    /// The same by way of a stub that may do without.
    fn rust_by(&mut self, stub: u64) {
        let number = self.lists.instructions.len() as u32;
        self.lists.instructions.push((self.at, self.request.number));
        let word = self.word(leave::INSTRUCTION);
        self.descriptor(stub, word, number);
        // The stub comes back behind the descriptor with everything reloaded.
        self.flags = Flags::Host;
    }

    /// The slow ways, behind the block.
    fn finish(&mut self) {
        for side in std::mem::take(&mut self.sides) {
            self.code.bind(side.branch);
            (self.at, self.flags) = (side.at, side.flags);
            self.exit_to(side.at.near_branch_target(), side.live);
        }
        for out in std::mem::take(&mut self.outs) {
            self.code.bind(out.branch);
            let exit = &mut self.lists.exits[out.exit as usize];
            if out.word & 7 == leave::CHAIN {
                exit.unchained = self.code.displacement(out.branch);
            }
            self.descriptor(self.request.stubs.exit, out.word, out.exit);
        }
        self.finish_detours();
        for slow in std::mem::take(&mut self.slow) {
            self.code.bind(slow.branch);
            match slow.address {
                Address::Undo(table) => self.code.xor_load(R10, Mem::gs_at(R11, table)),
                Address::Constant(va, true) => self.guest_address(R10, va),
                Address::Constant(va, false) => self.code.mov_imm(R10, va),
                Address::Same => {}
            }
            let lea = self.code.lea_r11_rip();
            self.code.jmp_to(self.request.stubs.memory);
            self.stub_displacement();
            self.code.bind(lea);
            let back = slow.back.wrapping_sub(self.code.here()) as u32;
            self.code.u32(slow.words);
            self.code.u32(back);
        }
    }
}
