//! One machine of KVM.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::sync::{Arc, Mutex, PoisonError};

use cpu::{
    CpuError, DirtyLog, Doorbells, GuestMemory, MessageLine, MessageLines, Vcpu, Vm, VmConfig,
};
use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
    kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::lines::{KvmLine, PINS, Routes};
use crate::vcpu::KvmVcpu;
use crate::{Probe, cpuid, host, probe};

/// Three pages that Intel's real-mode emulation wants, below the local APIC.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// See the module. Locks are leaves.
pub struct KvmVm {
    kvm: Kvm,
    vm: Arc<VmFd>,
    supported: CpuId,
    config: VmConfig,
    memory: Mutex<Option<Arc<GuestMemory>>>,
    routes: Arc<Routes>,
}

impl KvmVm {
    /// Makes a machine.
    ///
    /// # Errors
    /// [`CpuError::NoVirtualization`] where KVM is missing or lacks split interrupt controllers.
    pub fn new(config: VmConfig) -> Result<KvmVm, CpuError> {
        let missing = |what: &str, error: kvm_ioctls::Error| {
            CpuError::NoVirtualization(format!("{what}: {error}"))
        };
        let kvm = Kvm::new().map_err(|error| missing("/dev/kvm", error))?;
        let vm = kvm
            .create_vm()
            .map_err(|error| missing("making a machine", error))?;
        vm.set_identity_map_address(IDENTITY_MAP)
            .map_err(host("setting the identity map"))?;
        vm.set_tss_address(TSS_ADDRESS)
            .map_err(host("setting the TSS address"))?;
        let mut split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        split.args[0] = u64::from(PINS);
        vm.enable_cap(&split)
            .map_err(|error| missing("split interrupt controllers", error))?;
        let mut supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(host("reading the supported CPUID"))?;
        if probe() == Probe::EmulatedOnly {
            cpuid::emulated(&mut supported);
        }
        let vm = Arc::new(vm);
        Ok(KvmVm {
            kvm,
            routes: Routes::new(vm.clone()),
            vm,
            supported,
            config,
            memory: Mutex::new(None),
        })
    }

    fn map(&self, flags: u32) -> Result<(), CpuError> {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(memory) = &*memory else {
            return Ok(());
        };
        for (slot, region) in memory.iter().enumerate() {
            let mapping = kvm_userspace_memory_region {
                slot: slot as u32,
                flags,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is a mapping of `memory`, which `self.memory` keeps for as long as the machine.
            unsafe { self.vm.set_user_memory_region(mapping) }
                .map_err(host("giving the guest its memory"))?;
        }
        Ok(())
    }
}

impl Vm for KvmVm {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn set_memory(&self, memory: Arc<GuestMemory>) -> Result<(), CpuError> {
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = Some(memory);
        self.map(0)
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, CpuError> {
        let fd = self
            .vm
            .create_vcpu(u64::from(id))
            .map_err(host("making a CPU"))?;
        let deadline = self.kvm.check_extension(Cap::TscDeadlineTimer);
        let entries = cpuid::of(
            &self.supported,
            self.config.model,
            id,
            self.config.vcpus,
            deadline,
        );
        fd.set_cpuid2(&entries).map_err(host("setting CPUID"))?;
        let msrs = self
            .kvm
            .get_msr_index_list()
            .map_err(host("listing MSRs"))?;
        let vcpu = KvmVcpu::new(self.vm.clone(), fd, msrs.as_slice().to_vec())?;
        Ok(Box::new(vcpu))
    }

    fn signal_msi(&self, address: u64, data: u32) -> Result<(), CpuError> {
        let message = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        // Zero means that no CPU takes it (masked or absent), which is the guest's business.
        self.vm
            .signal_msi(message)
            .map(|_| ())
            .map_err(host("sending an interrupt message"))
    }

    fn ioapic_route(&self, pin: u32, message: Option<(u64, u32)>) -> Result<(), CpuError> {
        if pin >= PINS {
            return Ok(());
        }
        self.routes.set(pin, message)
    }

    fn message_lines(&self) -> Option<&dyn MessageLines> {
        let there = self.kvm.check_extension(Cap::Irqfd);
        there.then_some(self)
    }

    fn doorbells(&self) -> Option<&dyn Doorbells> {
        let there = self.kvm.check_extension(Cap::Ioeventfd);
        there.then_some(self)
    }

    fn memory_written(&self, _: u64, _: u64) {}

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        Some(self)
    }
}

/// A second descriptor of the same event.
fn event(fd: BorrowedFd<'_>) -> Result<EventFd, CpuError> {
    let failed = |source| CpuError::Host {
        what: "duplicating an event",
        source,
    };
    // SAFETY: fcntl takes no pointer here, and the descriptor is open for as long as it is borrowed.
    let copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        return Err(failed(std::io::Error::last_os_error()));
    }
    // SAFETY: the descriptor was just made and is owned by nobody else.
    Ok(unsafe { EventFd::from_raw_fd(copy) })
}

impl Doorbells for KvmVm {
    fn add_doorbell(&self, gpa: u64, len: u32, fd: BorrowedFd<'_>) -> Result<(), CpuError> {
        if len != 0 {
            return Err(CpuError::Broken(
                "doorbells take writes of any length".into(),
            ));
        }
        self.vm
            .register_ioevent(&event(fd)?, &IoEventAddress::Mmio(gpa), NoDatamatch)
            .map_err(host("adding a doorbell"))
    }

    fn remove_doorbell(&self, gpa: u64, _: u32, fd: BorrowedFd<'_>) -> Result<(), CpuError> {
        self.vm
            .unregister_ioevent(&event(fd)?, &IoEventAddress::Mmio(gpa), NoDatamatch)
            .map_err(host("removing a doorbell"))
    }
}

impl MessageLines for KvmVm {
    fn open_line(&self) -> Result<Arc<dyn MessageLine>, CpuError> {
        Ok(Arc::new(KvmLine::open(&self.routes)?))
    }
}

impl DirtyLog for KvmVm {
    fn start(&self) -> Result<(), CpuError> {
        self.map(KVM_MEM_LOG_DIRTY_PAGES)
    }

    fn take(&self) -> Result<Vec<u64>, CpuError> {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bits = Vec::new();
        for (slot, region) in memory.iter().flat_map(|memory| memory.iter()).enumerate() {
            let log = self
                .vm
                .get_dirty_log(slot as u32, region.len() as usize)
                .map_err(host("reading the log of written pages"))?;
            bits.extend(log);
        }
        Ok(bits)
    }

    fn stop(&self) -> Result<(), CpuError> {
        self.map(0)
    }
}
