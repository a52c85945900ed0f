//! The run loop: finds or makes the block for rip, runs it, and serves what it left for.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cpu::x86::Activity;
use cpu::{CpuError, CpuIo, Exit as RunExit};

use crate::cache::{Block, Cache, Key, mode};
use crate::clock;
use crate::host::Guard;
use crate::machine::granule_mask;
use crate::state::{Access, CS, Cpu, Fault, Flow, Frame, JUMP_ENTRIES, Rights, flag, request};
use crate::stubs::{self, Entries, LEFT, TRAPPED};
use crate::system::{self, paging};
use crate::tlb::Notes;
use crate::translate::emit::Code;
use crate::translate::{Lists, Request, Site, Stubs, Workshop, jump_index, leave};

/// The translator's side of one CPU.
pub struct Engine {
    pub(crate) cache: Cache,
    stubs: Stubs,
    workshop: Workshop,
    lists: Lists,
    code: Code,
    pub(crate) notes: Notes,
    /// Entries of the jump tables that are set, per level.
    jumps: [Vec<u16>; 2],
    /// Guest addresses of the jump tables' entries, per level: what a flushed page must find.
    jump_targets: [Vec<u64>; 2],
    /// Filter of the pages that jump table entries lead to.
    jump_pages: [u64; 256],
    /// Entries of the supervisor's jump table from pages that are not global.
    supervisor_nonglobal: bool,
    /// Set when a Rust function makes translated code leave.
    pending: Option<Pending>,
    /// The next block is one instruction long: an access that blocks cannot do in place.
    single: bool,
    tsc_offset: u64,
    always_single: bool,
    trace: bool,
    profile: bool,
    pub(crate) counters: Counters,
}

/// Why a Rust function made translated code leave.
enum Pending {
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
    pub mnemonics: std::collections::HashMap<iced_x86::Mnemonic, (u64, u64)>,
}

impl Engine {
    pub(crate) fn new(frame: &Frame, cache_bytes: usize) -> Result<Engine, CpuError> {
        let mut cache = Cache::new(cache_bytes).map_err(|source| CpuError::Host {
            what: "mapping the code cache",
            source,
        })?;
        let entries = Entries {
            memory: memory_entry as *const () as u64,
            instruction: instruction_entry as *const () as u64,
        };
        let stubs = stubs::install(&mut cache, std::ptr::from_ref(frame) as u64, entries);
        let debug = std::env::var("BERTH_SOFT_MODE").unwrap_or_default();
        Ok(Engine {
            cache,
            stubs,
            workshop: Workshop::new(),
            lists: Lists::default(),
            code: Code::new(0),
            notes: Notes::new(),
            jumps: [Vec::new(), Vec::new()],
            jump_targets: [vec![u64::MAX; JUMP_ENTRIES], vec![u64::MAX; JUMP_ENTRIES]],
            jump_pages: [0; 256],
            supervisor_nonglobal: false,
            pending: None,
            single: false,
            tsc_offset: 0,
            always_single: debug.split(',').any(|w| w == "single"),
            trace: debug.split(',').any(|w| w == "trace"),
            profile: debug.split(',').any(|w| w == "profile"),
            counters: Counters::default(),
        })
    }

    /// Mode `profile`: what left translated code, to standard error.
    fn report(&self) {
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

    /// Whether the jump tables may hold entries of the page.
    pub(crate) fn jumps_to(&self, va: u64) -> bool {
        let bit = page_bit(va);
        self.jump_pages[bit / 64] >> (bit % 64) & 1 != 0
    }
}

fn page_bit(va: u64) -> usize {
    ((va >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 50) as usize
}

/// Rights bits of a page fault are found by the walk; levels by privilege.
fn user(cpu: &Cpu) -> bool {
    cpu.cpl == 3
}

impl Cpu {
    pub(crate) fn engine_mut(&mut self) -> Option<&mut Engine> {
        // SAFETY: null, or the engine its owner (`SoftVcpu`) keeps apart from the frame for as long; only this thread uses it.
        unsafe { self.engine.as_mut() }
    }

    fn engine(&mut self) -> &mut Engine {
        // SAFETY: as in `engine_mut`; every path here starts at `run`, which needs an engine.
        unsafe { &mut *self.engine }
    }

    /// Forgets indirect jump targets; `global`: also of global supervisor pages.
    pub(crate) fn flush_jumps(&mut self, global: bool) {
        let Some(engine) = self.engine_mut() else {
            return;
        };
        let miss = engine.stubs.jump_miss;
        let global = global || engine.supervisor_nonglobal;
        if global {
            engine.supervisor_nonglobal = false;
            engine.jump_pages = [0; 256];
        }
        let mut lists = std::mem::take(&mut engine.jumps);
        for (n, list) in lists.iter_mut().enumerate() {
            if n == 1 || global {
                let level = &mut self.levels()[n];
                for at in list.drain(..) {
                    level.jump[usize::from(at)] = miss;
                }
            }
        }
        self.engine().jumps = lists;
    }

    /// Forgets indirect jump targets in the page of `va`, and those that run into it from the page before.
    pub(crate) fn flush_jumps_of(&mut self, va: u64) {
        let page = va & !0xfff;
        let miss = self.engine().stubs.jump_miss;
        for level in 0..2 {
            let first = jump_index(page);
            for at in (first..first + 4096)
                .chain(jump_index(page.wrapping_sub(15))..jump_index(page.wrapping_sub(1)) + 1)
            {
                let target = self.engine().jump_targets[level][at];
                if target & !0xfff == page || target.wrapping_sub(page.wrapping_sub(15)) < 15 {
                    self.levels()[level].jump[at] = miss;
                    self.engine().jump_targets[level][at] = u64::MAX;
                }
            }
        }
    }

    /// A store to guest RAM by Rust code somewhere in the page of `gpa`: drops the page's translated code.
    pub(crate) fn note_store(&mut self, gpa: u64, _va: u64) {
        let dirty = self
            .machine
            .granules(gpa)
            .is_some_and(|bits| bits.load(Ordering::Relaxed) != 0);
        if dirty {
            self.drop_code(gpa & !0xfff, 4096);
        }
    }

    /// Drops translated code of these bytes (inside one page), here and on all other CPUs.
    fn drop_code(&mut self, gpa: u64, len: u64) {
        let machine = Arc::clone(&self.machine);
        let id = self.id;
        machine.drop_code(gpa, len, Some(id));
        if let Some(engine) = self.engine_mut() {
            let miss = engine.stubs.jump_miss;
            let first = gpa & !63;
            let last = (gpa + len + 63) & !63;
            if engine.cache.invalidate(first, last - first, miss) {
                engine.counters.invalidations += 1;
            }
        }
    }

    /// Guest-physical page of the code at `va`.
    fn fetch_page(&mut self, va: u64) -> Result<(u64, bool), Fault> {
        let user = user(self);
        if let Some(known) = self.engine().notes.fetch(va, user) {
            return Ok(known);
        }
        let found = paging::walk(self, va, Access::Fetch, Rights::Current)?;
        self.engine()
            .notes
            .note_fetch(va, user, found.gpa, found.global);
        Ok((found.gpa & !0xfff, found.global))
    }

    /// The block at rip, translated if need be. The flag says that its pages are global.
    fn block(&mut self, single: bool) -> Result<(u32, bool), Fault> {
        let rip = self.rip;
        let (page, global) = self.fetch_page(rip)?;
        let mut mode = if user(self) { mode::USER } else { 0 };
        if self.cr0 & 0xc != 0 {
            mode |= mode::NO_FPU;
        }
        if single {
            mode |= mode::SINGLE;
        }
        let key = Key {
            gpa: page | rip & 0xfff,
            rip,
            mode,
        };
        if let Some(n) = self.engine().cache.find(&key) {
            let Some(second) = self.engine().cache.blocks[n as usize].second else {
                return Ok((n, global));
            };
            let (now, global_too) = self.fetch_page((rip | 0xfff).wrapping_add(1))?;
            if now == second {
                return Ok((n, global && global_too));
            }
            let miss = self.engine().stubs.jump_miss;
            self.engine().cache.invalidate(key.gpa, 1, miss);
            self.flush_jumps(true);
        }
        self.translate(key, global)
    }

    fn translate(&mut self, key: Key, global: bool) -> Result<(u32, bool), Fault> {
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
        loop {
            let cpu_tsc = self.tsc_offset;
            let engine = self.engine();
            engine.tsc_offset = cpu_tsc;
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
                let miss = self.engine().stubs.jump_miss;
                self.engine().cache.invalidate(key.gpa, 1, miss);
                return self.translate(key, global);
            }
            return Ok((number, global));
        }
    }

    /// Notes that granules of a page hold translated code; from then on no write entry leads to it.
    fn mark_code(&mut self, page: u64, host_page: u64, mask: u64) {
        let machine = Arc::clone(&self.machine);
        let Some(bits) = machine.granules(page) else {
            return;
        };
        let before = bits.fetch_or(mask, Ordering::SeqCst);
        if before == 0 {
            self.forbid_writes(host_page);
            machine.forbid_writes(host_page, self.id);
        }
    }

    /// Forgets all translated code of this CPU.
    fn flush_code(&mut self) {
        let engine = self.engine();
        engine.cache.flush();
        engine.lists.exits.clear();
        engine.lists.instructions.clear();
        engine.lists.sites.clear();
        engine.counters.flushes += 1;
        self.flush_jumps(true);
    }

    /// Merges flags that translated code left in the slot.
    fn flags_from_slot(&mut self) {
        let slot = self.scratch[0];
        let low = slot >> 8 & 0xd5;
        let of = if slot & 1 != 0 { flag::OF } else { 0 };
        let mask = flag::NATIVE & !flag::DF;
        self.rflags = self.rflags & !mask | low | of;
    }

    /// Guest rip of the descriptor's instruction; flags made complete.
    fn settle(&mut self, descriptor: u64, word: u32) -> Option<u32> {
        let number = self.engine().cache.block_at(descriptor)?;
        let start = self.engine().cache.blocks[number as usize].key.rip;
        self.rip = start.wrapping_add(u64::from(word >> leave::OFFSET_SHIFT));
        if word & leave::SLOT != 0 {
            self.flags_from_slot();
        }
        Some(number)
    }

    /// Runs until there is a reason to come back to the machine.
    pub(crate) fn run(&mut self, io: &mut dyn CpuIo) -> Result<RunExit, CpuError> {
        let frame = std::ptr::from_mut(self) as u64;
        let (range, host_fault) = {
            let engine = self.engine();
            (engine.cache.range(), engine.stubs.host_fault)
        };
        let guard = Guard::new(frame, range, host_fault).map_err(|source| CpuError::Host {
            what: "preparing the thread",
            source,
        })?;
        // SAFETY: only the lifetime changes; taken back below before `io`'s borrow ends.
        let io: *mut (dyn CpuIo + 'static) = unsafe { std::mem::transmute(std::ptr::from_mut(io)) };
        self.io = Some(io);
        self.x87_load();
        let result = self.run_loop();
        self.x87_store();
        if self.engine().profile {
            self.engine().report();
        }
        self.io = None;
        drop(guard);
        result
    }

    fn run_loop(&mut self) -> Result<RunExit, CpuError> {
        macro_rules! deliver {
            ($fault:expr) => {{
                let fault = $fault;
                self.engine().counters.faults += 1;
                if self.engine().trace {
                    eprintln!("fault {fault:x?} at {:#x} cpl {}", self.rip, self.cpl);
                }
                if system::deliver(self, fault).is_err() {
                    return Ok(RunExit::TripleFault);
                }
            }};
        }
        let several = self.machine.vcpus > 1;
        let mut poll = true;
        loop {
            if (poll || self.attention.load(Ordering::Relaxed) != 0) && !self.interrupt_shadow {
                poll = false;
                if let Some(exit) = self.attend()? {
                    return Ok(exit);
                }
                if self.system.activity != Activity::Running {
                    if self.system.activity == Activity::Halted && system::wakes(self) {
                        self.system.activity = Activity::Running;
                    } else {
                        self.doze();
                        poll = true;
                        continue;
                    }
                }
            }
            if self.efer >> 10 & 1 == 0 || self.segments[CS].attributes >> 13 & 1 == 0 {
                let shadow = std::mem::take(&mut self.interrupt_shadow);
                match system::interpret(self) {
                    Ok(flow) => {
                        if let Some(exit) = self.after(flow, &mut poll) {
                            return Ok(exit);
                        }
                        poll |= shadow || self.interrupt_waits != 0;
                    }
                    Err(fault) => deliver!(fault),
                }
                continue;
            }
            let trap = self.rflags & flag::TF != 0;
            let shadow = std::mem::take(&mut self.interrupt_shadow);
            let single = std::mem::take(&mut self.engine().single)
                || trap
                || shadow
                || self.engine().always_single;
            if self.engine().tsc_offset != self.tsc_offset {
                self.flush_code();
            }
            let (number, global) = match self.block(single) {
                Ok(found) => found,
                Err(fault) => {
                    deliver!(fault);
                    continue;
                }
            };
            let block = &self.engine().cache.blocks[number as usize];
            let (direct, indirect, rip) = (block.direct, block.indirect, block.key.rip);
            if !single {
                self.note_jump(rip, indirect, global);
            }
            if self.engine().trace {
                self.trace_block(rip);
            }
            self.engine().counters.dispatches += 1;
            self.engine().counters.singles += u64::from(single);
            let stubs = self.engine().stubs;
            if several {
                self.mailbox.inside.store(true, Ordering::SeqCst);
                if self.mailbox.forbids.load(Ordering::SeqCst) {
                    self.take_forbidden();
                }
            }
            // SAFETY: the guard set GS to this frame; the block was just found, and its cache is this CPU's.
            let left = unsafe { stubs::enter(&stubs, direct) };
            if several {
                self.mailbox.inside.store(false, Ordering::SeqCst);
            }
            let mut done = true;
            match left {
                LEFT => match self.engine().pending.take() {
                    Some(Pending::Fault(fault)) => {
                        done = false;
                        self.bounce.len = 0;
                        deliver!(fault);
                    }
                    Some(Pending::Flow(flow)) => {
                        if let Some(exit) = self.after(flow, &mut poll) {
                            return Ok(exit);
                        }
                    }
                    Some(Pending::Single) => {
                        self.engine().single = true;
                        // Nothing has run yet of an instruction that the shadow was to cover.
                        self.interrupt_shadow = shadow;
                        done = false;
                    }
                    Some(Pending::Again) | None => {}
                },
                TRAPPED => {
                    done = false;
                    self.bounce.len = 0;
                    let fault = self.host_trap()?;
                    deliver!(fault);
                }
                descriptor => self.left(descriptor)?,
            }
            if done && self.bounce.len != 0 {
                self.write_bounce();
                if self.io().is_some_and(|io| io.stop_requested()) {
                    return Ok(RunExit::Stopped);
                }
            }
            if done && shadow {
                poll = true;
            }
            if done && trap {
                self.dr[6] |= 1 << 14;
                deliver!(Fault::DB);
            }
        }
    }

    /// What an instruction in Rust asked for.
    fn after(&mut self, flow: Flow, poll: &mut bool) -> Option<RunExit> {
        match flow {
            Flow::Continue => {}
            // Whoever set IF may let a waiting interrupt in.
            Flow::EndBlock => *poll |= self.interrupt_waits != 0 && !self.interrupt_shadow,
            Flow::Halt => {
                self.system.activity = Activity::Halted;
                *poll = true;
            }
            Flow::Stop => return Some(RunExit::Stopped),
        }
        None
    }

    /// Serves the mailbox.
    fn attend(&mut self) -> Result<Option<RunExit>, CpuError> {
        self.attention.store(0, Ordering::SeqCst);
        let mailbox = Arc::clone(&self.mailbox);
        if mailbox.requests.load(Ordering::SeqCst) & (request::KICK | request::SAFE_POINT) != 0 {
            let bits = mailbox
                .requests
                .fetch_and(!(request::KICK | request::SAFE_POINT), Ordering::SeqCst);
            if bits & request::SAFE_POINT != 0 {
                self.drop_stale();
            }
            if bits & request::KICK != 0 {
                return Ok(Some(RunExit::Kicked));
            }
        }
        if self.io().is_some_and(|io| io.stop_requested()) {
            return Ok(Some(RunExit::Stopped));
        }
        match system::poll_interrupts(self) {
            Ok(delivered) => {
                if delivered && self.system.activity == Activity::Halted {
                    self.system.activity = Activity::Running;
                }
                Ok(None)
            }
            Err(_) => Ok(Some(RunExit::TripleFault)),
        }
    }

    /// Drops write entries of pages that came to hold code of other CPUs.
    fn take_forbidden(&mut self) {
        let mailbox = Arc::clone(&self.mailbox);
        let mut pages = mailbox.forbidden.lock().unwrap_or_else(|e| e.into_inner());
        for page in pages.drain(..) {
            self.forbid_writes(page);
        }
        mailbox.forbids.store(false, Ordering::SeqCst);
    }

    /// Drops code that other CPUs or devices have written.
    fn drop_stale(&mut self) {
        let stale =
            std::mem::take(&mut *self.mailbox.stale.lock().unwrap_or_else(|e| e.into_inner()));
        let engine = self.engine();
        let miss = engine.stubs.jump_miss;
        for (gpa, len) in stale {
            engine.cache.invalidate(gpa, len, miss);
            engine.counters.invalidations += 1;
        }
    }

    /// Sleeps until something may have happened.
    fn doze(&mut self) {
        let mailbox = Arc::clone(&self.mailbox);
        let alarm = mailbox.alarm.load(Ordering::SeqCst);
        let limit = if alarm == 0 {
            None
        } else {
            let left = alarm.saturating_sub(clock::host_tsc());
            if left == 0 {
                if mailbox
                    .alarm
                    .compare_exchange(alarm, 0, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok()
                {
                    mailbox.requests.fetch_or(request::ALARM, Ordering::SeqCst);
                }
                return;
            }
            Some(clock::ticks_to_duration(left))
        };
        mailbox.sleep(limit);
    }

    /// Makes an indirect entry known to translated code.
    fn note_jump(&mut self, rip: u64, indirect: u64, global: bool) {
        let level = usize::from(user(self));
        let at = jump_index(rip);
        let miss = self.engine().stubs.jump_miss;
        let slot = &mut self.levels()[level].jump[at];
        if *slot == indirect {
            return;
        }
        let fresh = *slot == miss;
        *slot = indirect;
        let engine = self.engine();
        engine.jump_targets[level][at] = rip;
        if fresh {
            engine.jumps[level].push(at as u16);
        }
        engine.supervisor_nonglobal |= level == 0 && !global;
        let bit = page_bit(rip);
        engine.jump_pages[bit / 64] |= 1 << (bit % 64);
    }

    /// Translated code left by itself, with this descriptor.
    fn left(&mut self, descriptor: u64) -> Result<(), CpuError> {
        let word = self.engine().cache.word(descriptor);
        let payload = self.engine().cache.word(descriptor + 4);
        self.engine().counters.reasons[(word & 7) as usize] += 1;
        match word & 0xff {
            leave::INDIRECT => self.flags_from_slot(),
            leave::START => {
                // A jump chained to a block that died: from now on it leads to the one in its place.
                let block = &self.engine().cache.blocks[payload as usize];
                let (at, rip) = (block.direct, block.key.rip);
                self.rip = rip;
                self.chain(payload, at, true);
            }
            leave::TARGET => {
                if word & leave::SLOT != 0 {
                    self.flags_from_slot();
                }
                self.rip = self.engine().lists.exits[payload as usize].target;
            }
            leave::CHAIN => {
                if word & leave::SLOT != 0 {
                    self.flags_from_slot();
                }
                let exit = self.engine().lists.exits[payload as usize];
                self.rip = exit.target;
                self.chain(exit.block, exit.site, false);
            }
            other => {
                return Err(CpuError::Broken(format!(
                    "translated code left with unknown reason {other}"
                )));
            }
        }
        Ok(())
    }

    /// Joins the exit at `site` (`entry`: the entry of a dead block) to the block at rip, where that is of the same page.
    fn chain(&mut self, from: u32, site: u64, entry: bool) {
        if self.attention.load(Ordering::Relaxed) != 0 {
            return;
        }
        let generation = self.engine().cache.generation;
        let block = &self.engine().cache.blocks[from as usize];
        let page = block.key.rip >> 12;
        if block.dead != entry || self.rip >> 12 != page {
            return;
        }
        let Ok((to, _)) = self.block(false) else {
            return;
        };
        let engine = self.engine();
        if engine.cache.generation != generation {
            return;
        }
        let to = &engine.cache.blocks[to as usize];
        if to.second.is_none() {
            let direct = to.direct;
            if entry {
                engine.cache.patch_jump(site, direct);
            } else {
                engine.cache.patch(site, direct);
            }
        }
    }

    /// Carries out the store that the last instruction made into the bounce buffer.
    fn write_bounce(&mut self) {
        let len = std::mem::take(&mut self.bounce.len) as usize;
        let data = self.bounce.data;
        let address = self.bounce.address;
        // Both pages were probed before the instruction ran; a page table changed since by another CPU loses the store, as
        // it could on a processor that had the old translation.
        let _ = self.write_bytes(
            address,
            &data[(address & 63) as usize..][..len],
            Rights::Current,
        );
    }

    /// The guest's exception for a trap of the host in translated code.
    fn host_trap(&mut self) -> Result<Fault, CpuError> {
        let value = self.scratch[7];
        let host = value & ((1 << 56) - 1);
        let signal = (value >> 56) as i32;
        let sites = &self.engine().lists.sites;
        let after = sites.partition_point(|s| s.host <= host);
        let site = after
            .checked_sub(1)
            .map(|n| sites[n])
            .filter(|s| host < s.end);
        let Some(Site { rip, slot, .. }) = site else {
            let block = self
                .engine()
                .cache
                .block_at(host)
                .map(|n| self.engine().cache.blocks[n as usize].clone());
            return Err(CpuError::Broken(format!(
                "signal {signal} in translated code at {host:#x}, block {block:x?}"
            )));
        };
        self.rip = rip;
        if slot {
            self.flags_from_slot();
        }
        Ok(match signal {
            libc::SIGFPE => self.arithmetic_fault(),
            libc::SIGILL => Fault::UD,
            _ => Fault::GP,
        })
    }

    /// SIGFPE is division, x87 or SSE: told apart by the instruction.
    fn arithmetic_fault(&mut self) -> Fault {
        let mut bytes = [0u8; 15];
        let rip = self.rip;
        let len = (4096 - (rip & 0xfff)).min(15) as usize;
        let _ = self.read_bytes(rip, &mut bytes[..len], Rights::Current);
        let instruction = iced_x86::Decoder::with_ip(64, &bytes, rip, 0).decode();
        match instruction.mnemonic() {
            iced_x86::Mnemonic::Div | iced_x86::Mnemonic::Idiv => Fault::DE,
            _ if instruction.cpuid_features().iter().any(|f| {
                matches!(f, iced_x86::CpuidFeature::FPU | iced_x86::CpuidFeature::MMX)
            }) =>
            {
                Fault::MF
            }
            _ => Fault::XM,
        }
    }

    /// One line per block with a hash of the registers: two runs are compared by `diff`.
    fn trace_block(&mut self, rip: u64) {
        let mut hash = 0u64;
        for g in self.gpr {
            hash = (hash.rotate_left(7) ^ g).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        eprintln!(
            "block {rip:#x} cpl {} regs {hash:016x} rax {:x} rsp {:x} fl {:x}",
            self.cpl, self.gpr[0], self.gpr[4], self.rflags
        );
    }

    /// x87 and MMX state from the frame's FXSAVE image to the host.
    pub(crate) fn x87_load(&mut self) {
        let image = &raw const self.x87;
        // SAFETY: a 16-byte aligned FXSAVE image with MXCSR masked to what every host takes.
        unsafe { core::arch::x86_64::_fxrstor64(image.cast()) };
        // SAFETY: Rust's own setting.
        unsafe {
            std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const self.host_mxcsr, options(nostack))
        };
    }

    fn x87_store(&mut self) {
        let image = &raw mut self.x87;
        // SAFETY: 512 bytes, 16-byte aligned, ours.
        unsafe {
            core::arch::x86_64::_fxsave64(image.cast());
            std::arch::asm!("fninit", options(nostack));
        }
    }

    /// Makes every jump table entry lead to the miss stub.
    pub(crate) fn reset_jumps(&mut self) {
        let miss = self.engine().stubs.jump_miss;
        for level in self.levels() {
            level.jump = [miss; JUMP_ENTRIES];
        }
    }
}

/// Called by the memory stub: makes `va` reachable and answers the host address of its page, or leaves.
unsafe extern "sysv64" fn memory_entry(cpu: *mut Cpu, va: u64, descriptor: u64) -> u64 {
    // SAFETY: the stub passes its own CPU, whose translated code is not running now.
    let cpu = unsafe { &mut *cpu };
    let word = cpu.engine().cache.word(descriptor);
    let back = cpu.engine().cache.word(descriptor + 4);
    cpu.engine().counters.memory += 1;
    cpu.scratch[4] = descriptor.wrapping_add(back as i32 as i64 as u64);
    cpu.scratch[6] = va & 0xfff;
    match cpu.reach(va, descriptor, word) {
        Ok(page) => page,
        Err(pending) => {
            cpu.settle(descriptor, word);
            cpu.engine().pending = Some(pending);
            0
        }
    }
}

/// Called by the instruction stub: 0 to leave.
unsafe extern "sysv64" fn instruction_entry(cpu: *mut Cpu, descriptor: u64) -> u64 {
    // SAFETY: as in `memory_entry`.
    let cpu = unsafe { &mut *cpu };
    let word = cpu.engine().cache.word(descriptor);
    let payload = cpu.engine().cache.word(descriptor + 4);
    cpu.engine().counters.rust += 1;
    let (instruction, block) = cpu.engine().lists.instructions[payload as usize];
    cpu.rip = instruction.ip();
    if word & leave::SLOT != 0 {
        cpu.flags_from_slot();
    }
    if cpu.engine().profile {
        cpu.engine()
            .counters
            .mnemonics
            .entry(instruction.mnemonic())
            .or_default()
            .0 += 1;
    }
    let generation = cpu.engine().cache.generation;
    let start = cpu.rip;
    let pending = match system::execute(cpu, &instruction) {
        Ok(Flow::Continue) => {
            let engine = cpu.engine();
            let alive =
                engine.cache.generation == generation && !engine.cache.blocks[block as usize].dead;
            if alive
                && !cpu.interrupt_shadow
                && cpu.rip == start.wrapping_add(instruction.len() as u64)
            {
                cpu.scratch[4] = descriptor + 8;
                return 1;
            }
            Pending::Again
        }
        Ok(flow) => {
            if cpu.engine().profile {
                cpu.engine()
                    .counters
                    .mnemonics
                    .entry(instruction.mnemonic())
                    .or_default()
                    .1 += 1;
            }
            Pending::Flow(flow)
        }
        Err(fault) => Pending::Fault(fault),
    };
    cpu.engine().pending = Some(pending);
    0
}

impl Cpu {
    /// The host address of the page of `va` for the access a descriptor describes.
    fn reach(&mut self, va: u64, descriptor: u64, word: u32) -> Result<u64, Pending> {
        let write = word & leave::WRITE != 0;
        let size = u64::from(word >> leave::SIZE_SHIFT & 0xff);
        let access = if write { Access::Write } else { Access::Read };
        if (va & 0xfff) + size > 4096 {
            return self.bounce_access(va, size as usize, descriptor, word);
        }
        let found = paging::walk(self, va, access, Rights::Current).map_err(Pending::Fault)?;
        let Some(host) = self.machine.ram_at(found.gpa) else {
            return self.bounce_access(va, size as usize, descriptor, word);
        };
        let page = host as u64 & !0xfff;
        let user = user(self);
        if !write {
            self.fill_tlb(user, false, va, page, found.global);
            return Ok(page);
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

    /// An access that cannot be made in place, by way of the bounce buffer. Writes only in blocks of one instruction.
    fn bounce_access(
        &mut self,
        va: u64,
        size: usize,
        descriptor: u64,
        word: u32,
    ) -> Result<u64, Pending> {
        let write = word & leave::WRITE != 0;
        // Aligned as the guest's address is, for instructions that look at it.
        let offset = (va & 63) as usize;
        if size > self.bounce.data.len() / 2 {
            return Err(Pending::Fault(Fault::UD));
        }
        if write {
            let engine = self.engine();
            let single = engine
                .cache
                .block_at(descriptor)
                .is_some_and(|n| engine.cache.blocks[n as usize].key.mode & mode::SINGLE != 0);
            if !single {
                return Err(Pending::Single);
            }
            self.write_probe(va, size, Rights::Current)
                .map_err(Pending::Fault)?;
        }
        if !write || word & leave::MODIFY != 0 {
            let mut data = [0u8; 512];
            self.read_bytes(va, &mut data[..size], Rights::Current)
                .map_err(Pending::Fault)?;
            self.bounce.data[offset..offset + size].copy_from_slice(&data[..size]);
        }
        if write {
            self.bounce.address = va;
            self.bounce.len = size as u32;
        }
        Ok((&raw const self.bounce.data as u64 + offset as u64).wrapping_sub(va & 0xfff))
    }
}

#[cfg(test)]
impl Cpu {
    /// Stubs, and where raw code appended next will lie.
    pub(crate) fn workbench(&mut self) -> (Stubs, u64) {
        if self.engine().cache.room() < 128 << 10 {
            self.flush_code();
        }
        (self.engine().stubs, self.engine().cache.next())
    }

    pub(crate) fn append_raw(&mut self, code: &[u8]) {
        assert!(self.engine().cache.append(code));
    }

    /// Frame, code and trap stub, for [`Guard::new`].
    pub(crate) fn place_of_code(&mut self) -> (u64, (u64, u64), u64) {
        let frame = std::ptr::from_mut(self) as u64;
        (
            frame,
            self.engine().cache.range(),
            self.engine().stubs.host_fault,
        )
    }

    /// Runs until rip is `end`; true when the host trapped or a fault came up.
    pub(crate) fn run_to(&mut self, end: u64, single: bool) -> bool {
        let mut alone = single;
        while self.rip != end {
            let Ok((number, _)) = self.block(alone) else {
                return true;
            };
            let direct = self.engine().cache.blocks[number as usize].direct;
            let stubs = self.engine().stubs;
            // SAFETY: the test holds a guard for this frame.
            let left = unsafe { stubs::enter(&stubs, direct) };
            alone = single;
            match left {
                LEFT => match self.engine().pending.take() {
                    Some(Pending::Single) => {
                        alone = true;
                        continue;
                    }
                    Some(Pending::Fault(_)) => return true,
                    _ => {}
                },
                TRAPPED => {
                    self.bounce.len = 0;
                    return self.host_trap().is_ok();
                }
                descriptor => self.left(descriptor).expect("a known reason"),
            }
            if self.bounce.len != 0 {
                self.write_bounce();
            }
        }
        false
    }
}
