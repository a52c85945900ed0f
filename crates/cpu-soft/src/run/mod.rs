//! The run loop: finds or makes the block for rip, runs it, and serves what it left for.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cpu::x86::Activity;
use cpu::{CpuError, CpuIo, Exit as RunExit};

use crate::clock;
use crate::host::Guard;
use crate::replay::{self, Witness};
use crate::state::{CS, Cpu, Fault, Flow, flag, request};
use crate::stubs::{self, LEFT, TRAPPED};
use crate::system::{self, cr};
use crate::translate::leave;
use engine::Pending;

mod blocks;
mod engine;
mod entry;
mod trap;
#[cfg(test)]
mod workbench;

pub use engine::Engine;

impl Cpu {
    pub(crate) fn engine_mut(&mut self) -> Option<&mut Engine> {
        // SAFETY: null, or the engine its owner (`SoftVcpu`) keeps apart from the frame for as long; only this thread uses it.
        unsafe { self.engine.as_mut() }
    }

    fn engine(&mut self) -> &mut Engine {
        // SAFETY: as in `engine_mut`; every path here starts at `run`, which needs an engine.
        unsafe { &mut *self.engine }
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
        let mut witness = self.replay.as_deref_mut().map(|replay| Witness {
            io: &mut *io,
            replay: std::ptr::from_mut(replay),
        });
        let bus: *mut dyn CpuIo = match &mut witness {
            Some(witness) => witness,
            None => io,
        };
        // SAFETY: only the lifetime changes; taken back below before `io`'s borrow ends.
        let bus: *mut (dyn CpuIo + 'static) = unsafe { std::mem::transmute(bus) };
        self.io = Some(bus);
        self.ran = true;
        self.count_time();
        if self.replay.is_some() && self.count == 0 {
            system::msr::begin_counting(self);
        }
        self.x87_load();
        let result = self.run_loop();
        self.x87_store();
        self.end_alone();
        clock::count(0);
        if let Some(replay) = &mut self.replay
            && matches!(result, Ok(RunExit::Stopped | RunExit::TripleFault))
        {
            replay.finish(self.count);
            match replay.failure.take() {
                Some(failure) => return Err(CpuError::Broken(failure)),
                None => eprintln!(
                    "{} states compared or logged in {} instructions",
                    replay.points, self.count
                ),
            }
        }
        if self.engine().options.profile {
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
                self.open_point = true;
                self.debug.hit = 0;
                if self.engine().options.trace {
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
            if self.replay.is_some() {
                // Interrupts come at points that are the same in every mode; the bell only stops the run.
                self.count_time();
                if let Some(failure) = self.replay.as_mut().and_then(|r| r.failure.take()) {
                    return Err(CpuError::Broken(failure));
                }
                poll = self.open_point;
            }
            if (poll || self.attention.load(Ordering::Relaxed) != 0) && !self.interrupt_shadow {
                if let Some(exit) = self.attend(poll || self.replay.is_none())? {
                    return Ok(exit);
                }
                poll = false;
                self.open_point = false;
                if self.system.activity != Activity::Running {
                    if self.system.activity == Activity::Halted && system::wakes(self) {
                        self.system.activity = Activity::Running;
                    } else {
                        self.doze();
                        poll = true;
                        self.open_point = true;
                        continue;
                    }
                }
            }
            let trap = self.rflags & flag::TF != 0;
            // The first instruction after a breakpoint's handler runs; the next ones stop again.
            let resumed = self.debug.executes && self.rflags & flag::RF != 0;
            let shadow = std::mem::take(&mut self.interrupt_shadow);
            let long = self.efer >> 10 & 1 != 0 && self.segments[CS].attributes >> 13 & 1 != 0;
            if !long || self.interpreted() {
                match self.interpret_one() {
                    Ok(flow) => {
                        if let Some(exit) = self.after(flow, &mut poll) {
                            return Ok(exit);
                        }
                        poll |= shadow || self.interrupt_waits != 0;
                        if resumed {
                            self.rflags &= !flag::RF;
                        }
                        if let Some(fault) = self.debug_trap(trap) {
                            deliver!(fault);
                        }
                    }
                    Err(fault) => deliver!(fault),
                }
                continue;
            }
            let watched = self.debug.executes;
            if watched && let Some(fault) = self.code_breakpoint() {
                deliver!(fault);
                continue;
            }
            let single = std::mem::take(&mut self.engine().single)
                || trap
                || shadow
                || watched
                || self.engine().options.single;
            if !self.made_for_now() {
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
            if self.engine().options.trace {
                self.trace_block(rip);
            }
            self.engine().counters.dispatches += 1;
            self.engine().counters.singles += u64::from(single);
            let stubs = self.engine().stubs;
            if several {
                self.go_inside();
            }
            // SAFETY: the guard set GS to this frame; the block was just found, and its cache is this CPU's.
            let left = unsafe { stubs::enter(&stubs, direct) };
            if several {
                self.mailbox.inside.store(false, Ordering::SeqCst);
                self.mailbox.storing.store(0, Ordering::Relaxed);
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
            let bounced = done && self.bounce.len != 0;
            if bounced {
                self.write_bounce();
            }
            self.end_alone();
            if bounced && self.io().is_some_and(|io| io.stop_requested()) {
                return Ok(RunExit::Stopped);
            }
            if done && shadow {
                poll = true;
            }
            if done && resumed {
                self.rflags &= !flag::RF;
            }
            if done && let Some(fault) = self.debug_trap(trap) {
                deliver!(fault);
            }
        }
    }

    /// Whether what the translated code takes for given still holds.
    fn made_for_now(&mut self) -> bool {
        let (tsc, calls) = (self.tsc_offset, self.efer & cr::EFER_SCE != 0);
        let engine = self.engine();
        engine.tsc_offset == tsc && engine.calls == calls
    }

    /// Whether every instruction goes by the interpreter now.
    fn interpreted(&mut self) -> bool {
        self.engine().options.interpret || self.alignment_checked()
    }

    /// One instruction in the interpreter.
    fn interpret_one(&mut self) -> Result<Flow, Fault> {
        if self.debug.executes
            && let Some(fault) = self.code_breakpoint()
        {
            return Err(fault);
        }
        let instruction = system::interp::fetch(self)?;
        if self.replay.is_some() {
            self.count += 1;
            self.count_time();
            if replay::compared(&instruction) {
                self.checkpoint();
            }
            self.open_point |= replay::opens(&instruction);
        }
        system::execute(self, &instruction)
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
    fn attend(&mut self, interrupts: bool) -> Result<Option<RunExit>, CpuError> {
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
        if !interrupts {
            return Ok(None);
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

    /// Announces that write entries may be in use from now on.
    fn go_inside(&mut self) {
        loop {
            self.mailbox.inside.store(true, Ordering::SeqCst);
            if self.mailbox.forbids.load(Ordering::SeqCst) {
                self.take_forbidden();
            }
            if self.alone || !self.machine.alone.wanted() {
                return;
            }
            self.mailbox.inside.store(false, Ordering::SeqCst);
            self.machine.alone.wait();
        }
    }

    /// Keeps all other CPUs outside of translated code until [`Cpu::end_alone`]: for an access in several steps that must be
    /// atomic.
    pub(crate) fn be_alone(&mut self) {
        if self.machine.vcpus < 2 || self.alone {
            return;
        }
        // Two that want it must not wait for each other.
        let inside = self.mailbox.inside.swap(false, Ordering::SeqCst);
        let machine = Arc::clone(&self.machine);
        machine.stop_others(self.id);
        self.alone = true;
        if inside {
            self.go_inside();
        }
    }

    pub(crate) fn end_alone(&mut self) {
        if std::mem::take(&mut self.alone) {
            self.machine.alone.give();
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
        let miss = engine.stubs.jump_gone;
        for (gpa, len) in stale {
            engine.cache.invalidate(gpa, len, miss);
            engine.counters.invalidations += 1;
        }
    }

    /// Sleeps until something may have happened.
    fn doze(&mut self) {
        let mailbox = Arc::clone(&self.mailbox);
        if let Some(replay) = &self.replay {
            let follows = replay.knows_what_comes();
            if let Some(deadline) = system::apic::next_deadline(self) {
                self.skip_to(deadline);
            } else {
                mailbox.sleep(follows.then_some(Duration::from_millis(20)));
            }
            return;
        }
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

    pub(crate) fn x87_store(&mut self) {
        let image = &raw mut self.x87;
        // SAFETY: 512 bytes, 16-byte aligned, ours.
        unsafe {
            core::arch::x86_64::_fxsave64(image.cast());
            std::arch::asm!("fninit", options(nostack));
        }
    }
}
