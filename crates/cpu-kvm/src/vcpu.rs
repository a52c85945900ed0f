//! One CPU of KVM, and how another thread gets it out of the guest.
//!
//! A kick sets a flag and sends the CPU's thread a signal. The handler, which runs on that thread, sets
//! `immediate_exit` in the thread's `kvm_run`: whether the signal comes just before KVM_RUN or during it, the
//! call returns with EINTR (Linux `Documentation/virt/kvm/api.rst`, section 5).

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering, compiler_fence};
use std::sync::{Arc, Once};

use cpu::{CpuError, CpuIo, Exit, Kick, Vcpu, x86};
use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, Msrs, kvm_msr_entry,
    kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

use crate::{host, state};

thread_local! {
    static RUNNING: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

fn signal() -> i32 {
    libc::SIGRTMIN() + 3
}

extern "C" fn on_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = RUNNING.with(Cell::get);
    if !run.is_null() {
        // SAFETY: the pointer is set only while this thread is in `KvmVcpu::run`, which owns the mapping; the
        // handler runs on the same thread, and the field is one byte.
        unsafe { ptr::addr_of_mut!((*run).immediate_exit).write_volatile(1) };
    }
}

fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: `action` is fully set; the handler touches only a thread-local without destructor and memory
        // that outlives it, which is safe in a signal handler.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_kick as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(signal(), &action, ptr::null_mut());
        }
    });
}

/// See the module.
struct Kicker {
    wanted: AtomicBool,
    /// The thread inside `run`, 0 for none.
    thread: AtomicI32,
}

impl Kick for Kicker {
    fn kick(&self) {
        self.wanted.store(true, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: no pointers. Should the thread have left `run` meanwhile, the handler does nothing in it.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }
}

/// See the module.
pub(crate) struct KvmVcpu {
    pub(crate) fd: VcpuFd,
    pub(crate) msrs: Vec<u32>,
    /// Its MSR list and CPU are of this machine, which must outlive it.
    _vm: Arc<VmFd>,
    kicker: Arc<Kicker>,
    exits: [u64; EXITS.len()],
}

const EXITS: [&str; 5] = [
    "exits_pio",
    "exits_mmio",
    "exits_eoi",
    "exits_interrupted",
    "exits_other",
];

impl KvmVcpu {
    pub(crate) fn new(vm: Arc<VmFd>, fd: VcpuFd, msrs: Vec<u32>) -> Result<KvmVcpu, CpuError> {
        install_handler();
        // As firmware leaves them: MTRRs on, write-back by default; fast strings on.
        let boot = [(0x2ff, 1 << 11 | 6), (0x1a0, 1)].map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        });
        let boot = Msrs::from_entries(&boot)
            .map_err(|_| CpuError::Broken("two MSRs do not fit".into()))?;
        fd.set_msrs(&boot).map_err(host("setting MSRs"))?;
        let kicker = Arc::new(Kicker {
            wanted: AtomicBool::new(false),
            thread: AtomicI32::new(0),
        });
        Ok(KvmVcpu {
            fd,
            msrs,
            _vm: vm,
            kicker,
            exits: [0; EXITS.len()],
        })
    }

    fn run_once(
        &mut self,
        run: *mut kvm_run,
        io: &mut dyn CpuIo,
    ) -> Result<Option<Exit>, CpuError> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {
                self.exits[3] += 1;
                self.fd.set_kvm_immediate_exit(0);
                return Ok(None);
            }
            Err(error) => return Err(host("running the CPU")(error)),
        };
        match exit {
            VcpuExit::IoIn(port, data) => {
                self.exits[0] += 1;
                data.chunks_mut(width(run))
                    .for_each(|item| io.pio_read(port, item));
            }
            VcpuExit::IoOut(port, data) => {
                self.exits[0] += 1;
                data.chunks(width(run))
                    .for_each(|item| io.pio_write(port, item));
            }
            VcpuExit::MmioRead(gpa, data) => {
                self.exits[1] += 1;
                io.mmio_read(gpa, data);
            }
            VcpuExit::MmioWrite(gpa, data) => {
                self.exits[1] += 1;
                io.mmio_write(gpa, data);
            }
            VcpuExit::IoapicEoi(vector) => {
                self.exits[2] += 1;
                io.eoi(vector);
            }
            VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt | VcpuExit::SetTpr => {
                self.exits[4] += 1
            }
            VcpuExit::Shutdown => return Ok(Some(Exit::TripleFault)),
            VcpuExit::SystemEvent(kind, _) => match kind {
                KVM_SYSTEM_EVENT_SHUTDOWN | KVM_SYSTEM_EVENT_RESET | KVM_SYSTEM_EVENT_CRASH => {
                    return Ok(Some(Exit::TripleFault));
                }
                _ => self.exits[4] += 1,
            },
            VcpuExit::FailEntry(reason, cpu) => {
                return Err(CpuError::Broken(format!(
                    "the host CPU {cpu} refused to enter the guest: reason {reason:#x}"
                )));
            }
            VcpuExit::InternalError => {
                // SAFETY: an internal error was just reported, for which the kernel fills this member.
                let suberror = unsafe { (*run).__bindgen_anon_1.internal.suberror };
                let at = self.fd.get_regs().map_or(0, |regs| regs.rip);
                let what = if suberror == 1 {
                    " (an instruction KVM cannot emulate)"
                } else {
                    ""
                };
                return Err(CpuError::Broken(format!(
                    "KVM gave up at {at:#x}: suberror {suberror}{what}"
                )));
            }
            other => {
                return Err(CpuError::Broken(format!(
                    "KVM stopped for an unknown reason: {other:?}"
                )));
            }
        }
        Ok(None)
    }

    fn run_until(&mut self, run: *mut kvm_run, io: &mut dyn CpuIo) -> Result<Exit, CpuError> {
        loop {
            if self.kicker.wanted.swap(false, Ordering::SeqCst) {
                return Ok(Exit::Kicked);
            }
            if let Some(exit) = self.run_once(run, io)? {
                return Ok(exit);
            }
            if io.stop_requested() {
                return Ok(Exit::Stopped);
            }
        }
    }
}

/// Bytes of one item of a (possibly repeated) port access.
fn width(run: *mut kvm_run) -> usize {
    // SAFETY: called for a port access just reported, for which the kernel fills this member; the mapping is the
    // running CPU's own.
    usize::from(unsafe { (*run).__bindgen_anon_1.io.size }).max(1)
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, io: &mut dyn CpuIo) -> Result<Exit, CpuError> {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        RUNNING.with(|running| running.set(run));
        compiler_fence(Ordering::SeqCst);
        // SAFETY: gettid takes and gives no pointer.
        self.kicker
            .thread
            .store(unsafe { libc::gettid() }, Ordering::SeqCst);
        let exit = self.run_until(run, io);
        self.kicker.thread.store(0, Ordering::SeqCst);
        RUNNING.with(|running| running.set(ptr::null_mut()));
        compiler_fence(Ordering::SeqCst);
        self.fd.set_kvm_immediate_exit(0);
        exit
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kicker.clone()
    }

    fn save(&mut self) -> Result<x86::CpuState, CpuError> {
        self.settle()?;
        state::save(self)
    }

    fn restore(&mut self, state: &x86::CpuState) -> Result<(), CpuError> {
        state::restore(self, state)
    }

    fn translate(&mut self, gva: u64) -> Option<u64> {
        let found = self.fd.translate_gva(gva).ok()?;
        (found.valid != 0).then_some(found.physical_address)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        EXITS.into_iter().zip(self.exits).collect()
    }
}

impl KvmVcpu {
    /// Lets KVM finish an instruction whose device access was answered last: its registers are only then whole.
    fn settle(&mut self) -> Result<(), CpuError> {
        self.fd.set_kvm_immediate_exit(1);
        let result = match self.fd.run() {
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => Ok(()),
            Err(error) => Err(host("finishing an instruction")(error)),
            Ok(_) => Ok(()),
        };
        self.fd.set_kvm_immediate_exit(0);
        result
    }
}
