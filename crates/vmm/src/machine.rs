//! One machine: memory, CPUs, buses and devices put together, and the threads that run its CPUs.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use base::{Classified, Kind};
use cpu::x86::CpuState;
use cpu::{CpuError, CpuIo, CpuModel, Exit, GuestMemory, Vcpu, Vm, VmConfig};
use cpu_kvm::{KvmVm, Probe};
use disk::Disk;
use serde::{Deserialize, Serialize};

use crate::bus::{Bus, BusDevice, BusError};
use crate::control::{Control, Outcome};
use crate::devices::debug_exit::DebugExit;
use crate::devices::i8042::KeyboardController;
use crate::devices::ioapic::IoApic;
use crate::devices::pic::Pic;
use crate::devices::pit::{Pit, SystemControl};
use crate::devices::power::{self, Power};
use crate::devices::pvpanic::PanicPort;
use crate::devices::rtc::Rtc;
use crate::devices::serial::Serial;
use crate::devices::{pin, port};
use crate::memory::{
    self, Dma, IOAPIC_LEN, IOAPIC_START, MemoryError, PCI_ECAM_LEN, PCI_ECAM_START,
};
use crate::nvme::Controller;
use crate::pci::Root;
use crate::pci::root::{ConfigPorts, Ecam, PciError};
use crate::state::{Persist, Saved, StateError};
use crate::virtio::Transport;

/// Local APIC ids are eight bits, and 255 is broadcast.
pub const CPU_LIMIT: u32 = 254;

/// Which CPU back end runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CpuChoice {
    /// KVM where it is real, else the software CPU.
    #[default]
    Auto,
    Kvm,
    Soft,
}

impl std::str::FromStr for CpuChoice {
    type Err = String;
    fn from_str(text: &str) -> Result<CpuChoice, String> {
        match text {
            "auto" => Ok(CpuChoice::Auto),
            "kvm" => Ok(CpuChoice::Kvm),
            "soft" => Ok(CpuChoice::Soft),
            _ => Err(format!("{text:?} is no CPU: auto, kvm or soft")),
        }
    }
}

/// What a machine is made of, apart from what it boots.
#[derive(Debug, Clone)]
pub struct MachineConfig {
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory: u64,
    pub cpu: CpuChoice,
    pub model: CpuModel,
    /// Host bytes for translated code (software CPU only).
    pub code_cache: usize,
    /// Gives the guest a port that ends the machine with a code. For tests.
    pub debug_exit: bool,
}

impl Default for MachineConfig {
    fn default() -> MachineConfig {
        MachineConfig {
            cpus: 1,
            memory: 512 << 20,
            cpu: CpuChoice::Auto,
            model: CpuModel::Max,
            code_cache: 256 << 20,
            debug_exit: false,
        }
    }
}

/// A machine could not be made or started.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("a machine has between 1 and {CPU_LIMIT} CPUs; {0} were asked for")]
    Cpus(u32),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Cpu(#[from] CpuError),
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error(transparent)]
    Pci(#[from] PciError),
    #[error("the host gives no thread for a CPU or a device: {0}")]
    Thread(std::io::Error),
    #[error("the host gives no descriptor for a device: {0}")]
    Event(std::io::Error),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("the machine was started already")]
    Started,
}

impl Classified for MachineError {
    fn kind(&self) -> Kind {
        match self {
            MachineError::Cpus(_) | MachineError::Memory(MemoryError::Size(_)) => Kind::Invalid,
            MachineError::Memory(_)
            | MachineError::Thread(_)
            | MachineError::Event(_)
            | MachineError::Pci(_) => Kind::Capacity,
            MachineError::Cpu(CpuError::NoVirtualization(_)) => Kind::Unsupported,
            MachineError::Cpu(CpuError::State(_)) | MachineError::State(_) => Kind::Invalid,
            MachineError::Started => Kind::Conflict,
            MachineError::Cpu(_) | MachineError::Bus(_) => Kind::Internal,
        }
    }
}

/// The back end that serves, and why, where that is worth saying.
pub fn open_cpus(
    choice: CpuChoice,
    config: VmConfig,
) -> Result<(Arc<dyn Vm>, Option<String>), CpuError> {
    if choice == CpuChoice::Soft {
        return Ok((soft_cpus(config)?, None));
    }
    match (cpu_kvm::probe(), choice) {
        (Probe::Usable, _) => Ok((Arc::new(KvmVm::new(config)?), None)),
        (Probe::EmulatedOnly, CpuChoice::Kvm) => {
            let note = format!("{}: this will be very slow", Probe::EmulatedOnly);
            Ok((Arc::new(KvmVm::new(config)?), Some(note)))
        }
        (probe, CpuChoice::Kvm) => Err(CpuError::NoVirtualization(probe.to_string())),
        (probe, _) => Ok((
            soft_cpus(config)?,
            Some(format!("{probe}: the software CPU runs this machine")),
        )),
    }
}

fn soft_cpus(config: VmConfig) -> Result<Arc<dyn Vm>, CpuError> {
    Ok(Arc::new(cpu_soft::SoftVm::new(&config)?))
}

const MACHINE_STATE_VERSION: u32 = 1;

/// A machine's state apart from its memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    pub version: u32,
    /// Bytes of RAM.
    pub memory: u64,
    pub cpus: Vec<CpuState>,
    pub devices: Vec<Saved>,
}

/// A CPU of a machine, with the lock its thread holds while it runs.
type SharedVcpu = Arc<Mutex<Box<dyn Vcpu>>>;

/// One machine. Dropping it ends it and waits for its threads.
pub struct Machine {
    pub config: MachineConfig,
    pub vm: Arc<dyn Vm>,
    /// Why this CPU back end and not the hoped-for one.
    pub cpu_note: Option<String>,
    pub memory: Arc<GuestMemory>,
    pub dma: Dma,
    pub mmio: Arc<Bus>,
    pub pio: Arc<Bus>,
    pub control: Arc<Control>,
    pub ioapic: Arc<IoApic>,
    pub serial: Arc<Serial>,
    pub power: Arc<Power>,
    pub pci: Arc<Root>,
    /// Everything with a state, in the order in which it is restored.
    pub devices: Vec<Arc<dyn Persist>>,
    transports: Vec<Arc<Transport>>,
    vcpus: Vec<SharedVcpu>,
    threads: Vec<JoinHandle<()>>,
}

impl Machine {
    /// Makes a machine whose serial line writes to `console`. Nothing runs yet.
    ///
    /// # Errors
    /// See [`MachineError`].
    pub fn new(
        config: MachineConfig,
        console: Box<dyn Write + Send>,
    ) -> Result<Machine, MachineError> {
        if !(1..=CPU_LIMIT).contains(&config.cpus) {
            return Err(MachineError::Cpus(config.cpus));
        }
        let memory = Arc::new(memory::allocate(config.memory)?);
        let vm_config = VmConfig {
            vcpus: config.cpus,
            model: config.model,
            code_cache: config.code_cache,
        };
        let (vm, cpu_note) = open_cpus(config.cpu, vm_config)?;
        vm.set_memory(memory.clone())?;
        let control = Control::new();
        let (mmio, pio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let ioapic = IoApic::new(vm.clone());
        mmio.insert(IOAPIC_START, IOAPIC_LEN, ioapic.clone())?;
        let serial = Serial::new("serial0", ioapic.line(pin::COM1), console);
        let power = Power::new(control.clone(), ioapic.line(pin::POWER));
        let (master, slave) = (Pic::new("pic0"), Pic::new("pic1"));
        let (pit, rtc) = (Pit::new(), Rtc::new());
        let keyboard = |command| KeyboardController::new(control.clone(), command);
        let board: [(u64, u64, Arc<dyn BusDevice>); 10] = [
            (port::PIC_MASTER, 2, master.clone()),
            (port::PIC_SLAVE, 2, slave.clone()),
            (port::PIT, 4, pit.clone()),
            (
                port::SYSTEM_CONTROL,
                1,
                Arc::new(SystemControl(pit.clone())),
            ),
            (port::KEYBOARD_DATA, 1, keyboard(false)),
            (port::KEYBOARD_COMMAND, 1, keyboard(true)),
            (port::RTC, 2, rtc.clone()),
            (port::COM1, 8, serial.clone()),
            (port::PANIC, 1, PanicPort::new(control.clone())),
            (port::POWER, power::LEN, power.clone()),
        ];
        for (base, len, device) in board {
            pio.insert(base, len, device)?;
        }
        let pci = Root::new(mmio.clone(), ioapic.clone(), control.clone());
        mmio.insert(PCI_ECAM_START, PCI_ECAM_LEN, Arc::new(Ecam(pci.clone())))?;
        pio.insert(port::PCI_CONFIG, 8, Arc::new(ConfigPorts(pci.clone())))?;
        if config.debug_exit {
            pio.insert(port::DEBUG_EXIT, 1, DebugExit::new(control.clone()))?;
        }
        let devices: Vec<Arc<dyn Persist>> = vec![
            ioapic.clone(),
            master,
            slave,
            pit,
            rtc,
            serial.clone(),
            power.clone(),
        ];
        let mut vcpus = Vec::new();
        for id in 0..config.cpus {
            let vcpu = vm.create_vcpu(id)?;
            control.add_kick(vcpu.kicker());
            vcpus.push(Arc::new(Mutex::new(vcpu)));
        }
        let dma = Dma::new(memory.clone(), vm.clone());
        Ok(Machine {
            config,
            vm,
            cpu_note,
            memory,
            dma,
            mmio,
            pio,
            control,
            ioapic,
            serial,
            power,
            pci,
            devices,
            transports: Vec::new(),
            vcpus,
            threads: Vec::new(),
        })
    }

    /// Adds an NVMe controller with a namespace for each disk; `identity` makes its serial number.
    ///
    /// # Errors
    /// Where there is no slot or no thread for it.
    pub fn add_nvme(
        &mut self,
        disks: Vec<Arc<dyn Disk>>,
        identity: u64,
    ) -> Result<Arc<Controller>, MachineError> {
        let number = self
            .devices
            .iter()
            .filter(|device| device.identity().starts_with("nvme"))
            .count();
        let name = format!("nvme{number}");
        let (dma, vm) = (self.dma.clone(), self.vm.clone());
        let controller = Controller::new(name, dma, vm, disks, self.config.cpus, identity)
            .map_err(MachineError::Thread)?;
        self.pci.attach(controller.clone())?;
        self.devices.push(controller.clone());
        Ok(controller)
    }

    /// Adds a virtio device called `name` (`net0`); its transport is what tells the driver of a changed configuration.
    ///
    /// # Errors
    /// Where there is no slot or no thread for it.
    pub fn add_virtio(
        &mut self,
        name: impl Into<String>,
        backend: Arc<dyn crate::virtio::Backend>,
    ) -> Result<Arc<Transport>, MachineError> {
        let transport = Transport::new(name, self.dma.clone(), self.vm.clone(), backend)
            .map_err(MachineError::Thread)?;
        self.pci.attach(transport.clone())?;
        self.transports.push(transport.clone());
        self.devices.push(transport.clone());
        Ok(transport)
    }

    /// Stops the CPUs and all I/O; false where the machine has ended.
    pub fn pause(&self) -> bool {
        let paused = self.control.pause();
        if paused {
            self.devices.iter().for_each(|device| device.quiesce());
        }
        paused
    }

    /// Ends [`Machine::pause`]; false where the machine has ended.
    pub fn resume(&self) -> bool {
        self.devices.iter().for_each(|device| device.wake());
        self.control.resume()
    }

    /// Changes the state that the first CPU starts in.
    ///
    /// # Errors
    /// What the back end says of the state; [`MachineError::Started`] where it runs already.
    pub fn set_start<E: From<CpuError> + From<MachineError>>(
        &mut self,
        change: impl FnOnce(&mut CpuState) -> Result<(), E>,
    ) -> Result<(), E> {
        if !self.threads.is_empty() {
            return Err(MachineError::Started.into());
        }
        let mut vcpu = self.vcpus[0].lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = vcpu.save()?;
        change(&mut state)?;
        vcpu.restore(&state)?;
        Ok(())
    }

    /// Lets the CPUs run, each in a thread of its own.
    ///
    /// # Errors
    /// [`MachineError::Started`] the second time; [`MachineError::Thread`].
    pub fn start(&mut self) -> Result<(), MachineError> {
        if !self.threads.is_empty() {
            return Err(MachineError::Started);
        }
        for (id, vcpu) in self.vcpus.iter().enumerate() {
            let (vcpu, control) = (vcpu.clone(), self.control.clone());
            let mut port = CpuPort {
                mmio: self.mmio.clone(),
                pio: self.pio.clone(),
                ioapic: self.ioapic.clone(),
                control: control.clone(),
            };
            let thread = std::thread::Builder::new()
                .name(format!("cpu{id}"))
                .spawn(move || {
                    crate::process::jail::confine(crate::process::jail::Thread::Cpu);
                    // A defect in a device or a CPU ends this machine with a word, not the process.
                    let run = std::panic::AssertUnwindSafe(|| run_cpu(&vcpu, &control, &mut port));
                    if let Err(panic) = std::panic::catch_unwind(run) {
                        control.end(crate::defect::crash(&format!("cpu{id}"), &*panic));
                    }
                })
                .map_err(|error| {
                    self.control.end(Outcome::Killed);
                    MachineError::Thread(error)
                })?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Waits for the end and for every thread, with all output written.
    pub fn wait(&mut self) -> Outcome {
        let outcome = self.control.wait_for_end();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.devices.iter().for_each(|device| device.close());
        outcome
    }

    /// The CPUs' counters, summed over CPUs.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut sums: Vec<(&'static str, u64)> = Vec::new();
        for vcpu in &self.vcpus {
            for (name, value) in vcpu
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .counters()
            {
                match sums.iter_mut().find(|(known, _)| *known == name) {
                    Some((_, sum)) => *sum += value,
                    None => sums.push((name, value)),
                }
            }
        }
        sums
    }

    /// Everything but the content of memory; the machine must be paused ([`Machine::pause`]) or not yet started.
    ///
    /// # Errors
    /// Where a CPU or a device cannot be saved now.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        let devices = self
            .devices
            .iter()
            .map(|device| device.save())
            .collect::<Result<_, _>>()?;
        let cpus = self.cpu_states()?;
        Ok(MachineState {
            version: MACHINE_STATE_VERSION,
            memory: self.config.memory,
            cpus,
            devices,
        })
    }

    /// Gives a machine that was just made, with the same devices, a saved state. The content of memory must be
    /// back in place before.
    ///
    /// # Errors
    /// [`MachineError::Started`] for one that runs; [`MachineError::State`] for a state of another machine.
    pub fn restore(&mut self, state: &MachineState) -> Result<(), MachineError> {
        if !self.threads.is_empty() {
            return Err(MachineError::Started);
        }
        let same = state.version == MACHINE_STATE_VERSION
            && state.memory == self.config.memory
            && state.cpus.len() == self.vcpus.len()
            && state.devices.len() == self.devices.len();
        if !same {
            let damaged = StateError::Damaged {
                device: "machine".into(),
                reason: "it is of another version, or has other memory, CPUs or devices".into(),
            };
            return Err(damaged.into());
        }
        for (device, saved) in self.devices.iter().zip(&state.devices) {
            device.restore(saved)?;
        }
        self.pci.remap_all();
        for (vcpu, saved) in self.vcpus.iter().zip(&state.cpus) {
            vcpu.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .restore(saved)?;
        }
        Ok(())
    }

    /// Every CPU's state; the machine must be paused or not yet started.
    pub fn cpu_states(&self) -> Result<Vec<CpuState>, CpuError> {
        self.vcpus
            .iter()
            .map(|vcpu| vcpu.lock().unwrap_or_else(PoisonError::into_inner).save())
            .collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.control.end(Outcome::Killed);
        self.wait();
        // Buses hold devices and devices their bus: only this lets go of them.
        self.mmio.clear();
        self.pio.clear();
    }
}

fn run_cpu(vcpu: &SharedVcpu, control: &Control, port: &mut CpuPort) {
    while control.enter() {
        let exit = vcpu
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .run(port);
        control.leave();
        match exit {
            Ok(Exit::Kicked | Exit::Stopped) => {}
            Ok(Exit::TripleFault) => control.end(Outcome::Crash(
                "the guest's CPU shut down (triple fault)".into(),
            )),
            Err(error) => control.end(Outcome::Crash(error.to_string())),
        }
    }
}

/// The board as one CPU reaches it.
struct CpuPort {
    mmio: Arc<Bus>,
    pio: Arc<Bus>,
    ioapic: Arc<IoApic>,
    control: Arc<Control>,
}

impl CpuIo for CpuPort {
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) {
        if !self.mmio.read(gpa, data) {
            tracing::trace!("read of nothing at {gpa:#x}");
        }
    }
    fn mmio_write(&mut self, gpa: u64, data: &[u8]) {
        if !self.mmio.write(gpa, data) {
            tracing::trace!("write to nothing at {gpa:#x}");
        }
    }
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        self.pio.read(u64::from(port), data);
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        self.pio.write(u64::from(port), data);
    }
    fn eoi(&mut self, vector: u8) {
        self.ioapic.end_of_interrupt(vector);
    }
    fn stop_requested(&self) -> bool {
        self.control.has_ended()
    }
}
