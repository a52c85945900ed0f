//! The traits of crate `cpu` for the software CPU.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cpu::x86::CpuState;
use cpu::{CpuError, CpuIo, Exit, GuestMemory, Kick, Vcpu, Vm, VmConfig};

use crate::clock;
use crate::machine::Machine;
use crate::replay::{Options, Replay};
use crate::run::Engine;
use crate::state::{Cpu, Frame, Mailbox, request};
use crate::system;

/// One machine on the software CPU.
pub struct SoftVm {
    machine: Arc<Machine>,
    code_cache: usize,
}

impl SoftVm {
    /// A machine without memory yet. Fails on hosts that are not x86-64 with the few features translation needs.
    pub fn new(config: &VmConfig) -> Result<SoftVm, CpuError> {
        if !std::arch::is_x86_feature_detected!("sse4.2")
            || !std::arch::is_x86_feature_detected!("popcnt")
        {
            return Err(CpuError::Broken(
                "this host's processor is older than x86-64-v2, which the guest is shown".into(),
            ));
        }
        Ok(SoftVm {
            machine: Arc::new(Machine::new(config.vcpus, config.model)),
            code_cache: config.code_cache,
        })
    }

    /// Makes CPU `id`, as its own type; they are made in order.
    pub fn make(&self, id: u32) -> Result<SoftVcpu, CpuError> {
        let mailbox = Arc::new(Mailbox::new());
        {
            let mut mailboxes = self
                .machine
                .mailboxes
                .lock()
                .unwrap_or_else(|e| e.into_inner());
            if mailboxes.len() != id as usize {
                return Err(CpuError::State(format!(
                    "CPU {id} must be made after the {} before it",
                    mailboxes.len()
                )));
            }
            mailboxes.push(Arc::clone(&mailbox));
        }
        clock::register(&mailbox);
        let per_cpu = (self.code_cache / self.machine.vcpus.max(1) as usize).max(8 << 20);
        SoftVcpu::new(id, Arc::clone(&self.machine), mailbox, per_cpu)
    }

    /// The shared side, for tests.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }
}

impl Vm for SoftVm {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn set_memory(&self, memory: Arc<GuestMemory>) -> Result<(), CpuError> {
        if self.machine.set_memory(memory) {
            Ok(())
        } else {
            Err(CpuError::State(
                "guest memory was set twice, or a region is not page-aligned".into(),
            ))
        }
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, CpuError> {
        Ok(Box::new(self.make(id)?))
    }

    fn signal_msi(&self, address: u64, data: u32) -> Result<(), CpuError> {
        system::signal_msi(&self.machine, address, data);
        Ok(())
    }

    fn memory_written(&self, gpa: u64, len: u64) {
        // What was written comes before the look at the marks.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.machine.drop_code(gpa, len, None);
    }
}

/// One CPU: its frame (what translated code sees) and its engine (code cache and run loop).
pub struct SoftVcpu {
    // Dropped in this order: nothing runs any more.
    frame: Box<Frame>,
    engine: Box<Engine>,
    mailbox: Arc<Mailbox>,
}

// SAFETY: the raw pointers inside lead to memory this value owns, or to the bus during `run`, which borrows it.
unsafe impl Send for SoftVcpu {}

impl SoftVcpu {
    fn new(
        id: u32,
        machine: Arc<Machine>,
        mailbox: Arc<Mailbox>,
        cache: usize,
    ) -> Result<SoftVcpu, CpuError> {
        let mut frame = Frame::new(id, machine, Arc::clone(&mailbox));
        let options = Options::from_environment().map_err(CpuError::State)?;
        let mut engine = Box::new(Engine::new(&frame, cache, Options::default())?);
        let cpu = frame.cpu.get_mut();
        cpu.engine = &raw mut *engine;
        cpu.reset_jumps();
        mailbox
            .attention
            .set((&raw const cpu.attention).cast_mut().cast::<AtomicU32>());
        let mut vcpu = SoftVcpu {
            frame,
            engine,
            mailbox,
        };
        vcpu.debug(&options)?;
        Ok(vcpu)
    }

    /// Debugging as `options` say, before the first run. An error: a counted run has one CPU.
    pub fn debug(&mut self, options: &Options) -> Result<(), CpuError> {
        let cpu = self.frame.cpu.get_mut();
        if options.counts() && cpu.machine.vcpus > 1 {
            return Err(CpuError::State(
                "BERTH_SOFT_MODE record and replay are for machines with one CPU".into(),
            ));
        }
        cpu.replay = Replay::open(options)?;
        self.engine.options = options.clone();
        Ok(())
    }

    /// The CPU itself, for tests and loaders of this workspace.
    pub fn cpu(&mut self) -> &mut Cpu {
        self.frame.cpu.get_mut()
    }
}

impl Drop for SoftVcpu {
    fn drop(&mut self) {
        self.mailbox.attention.set(std::ptr::null_mut());
        self.frame.cpu.get_mut().engine = std::ptr::null_mut();
        let _ = &self.engine;
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self, io: &mut dyn CpuIo) -> Result<Exit, CpuError> {
        self.cpu().run(io)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(Bell(Arc::clone(&self.mailbox)))
    }

    fn save(&mut self) -> Result<CpuState, CpuError> {
        let mut state = self.cpu().save_state();
        system::save(self.cpu(), &mut state);
        Ok(state)
    }

    fn restore(&mut self, state: &CpuState) -> Result<(), CpuError> {
        self.cpu().restore_state(state)?;
        system::restore(self.cpu(), state).map_err(CpuError::State)?;
        self.cpu().flush_tlb();
        Ok(())
    }

    fn translate(&mut self, gva: u64) -> Option<u64> {
        system::paging::walk(
            self.cpu(),
            gva,
            crate::state::Access::Read,
            crate::state::Rights::Supervisor,
        )
        .ok()
        .map(|t| t.gpa)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.engine.list()
    }
}

struct Bell(Arc<Mailbox>);

impl Kick for Bell {
    fn kick(&self) {
        self.0.requests.fetch_or(request::KICK, Ordering::SeqCst);
        self.0.ring();
    }
}
