//! Hostile guests: a device on a board, driven by bytes. Whatever they say, nothing may panic, hang, run on without end
//! or reach anything but the guest's memory; and the state of a device, saved at any moment and given to a fresh one, is
//! the same state.
//!
//! The property tests of this module run these functions on random bytes, and so does the `fuzz` project.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cpu::{CpuError, GuestMemory, Vcpu, Vm};
use disk::{Disk, RawDisk};

use crate::bus::{Bus, BusDevice};
use crate::control::Control;
use crate::devices::i8042::KeyboardController;
use crate::devices::ioapic::{IoApic, IrqLine};
use crate::devices::pic::Pic;
use crate::devices::pit::{Pit, SystemControl};
use crate::devices::power::{self, Power};
use crate::devices::pvpanic::PanicPort;
use crate::devices::rtc::Rtc;
use crate::devices::serial::Serial;
use crate::devices::{pin, port};
use crate::memory::{Dma, IOAPIC_LEN, IOAPIC_START, PCI_ECAM_LEN, PCI_ECAM_START};
use crate::nvme::Controller;
use crate::pci::root::{ConfigPorts, Ecam};
use crate::pci::{PciDevice, Root};
use crate::state::Persist;
use crate::virtio::Transport;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::console::Console;
use crate::virtio::net::{Net, Port};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;

/// Guest memory of the board.
const RAM: u64 = 16 << 20;
/// Where rings, descriptors and data lie, so that they meet.
const ARENA: u64 = 0x1_0000;
const ARENA_LEN: u64 = 0x1_0000;
/// The slot of the one device.
const SLOT: u64 = 1;

/// The devices on PCI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Nvme,
    Block,
    Net,
    Console,
    Rng,
    Balloon,
    Vsock,
}

impl Kind {
    pub const ALL: [Kind; 7] = [
        Kind::Nvme,
        Kind::Block,
        Kind::Net,
        Kind::Console,
        Kind::Rng,
        Kind::Balloon,
        Kind::Vsock,
    ];
}

/// A machine without CPUs, whose interrupts reach nobody.
struct Silent;

impl Vm for Silent {
    fn name(&self) -> &'static str {
        "silent"
    }
    fn set_memory(&self, _: Arc<GuestMemory>) -> Result<(), CpuError> {
        Ok(())
    }
    fn create_vcpu(&self, _: u32) -> Result<Box<dyn Vcpu>, CpuError> {
        Err(CpuError::Broken("there are no CPUs here".into()))
    }
    fn signal_msi(&self, _: u64, _: u32) -> Result<(), CpuError> {
        Ok(())
    }
    fn memory_written(&self, gpa: u64, len: u64) {
        assert!(
            gpa.checked_add(len).is_some_and(|end| end <= RAM),
            "a write outside memory: {gpa:#x}+{len:#x}"
        );
    }
}

/// The bytes, taken as choices; zeros once they are used up.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }
    fn number(&mut self, bytes: usize) -> u64 {
        (0..bytes).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }
    fn width(&mut self) -> usize {
        1 << (self.byte() % 4)
    }
    /// An address that is likely to be one that matters: in the arena, at the edge of memory, on device registers.
    fn address(&mut self) -> u64 {
        match self.byte() % 16 {
            0 => RAM - 8 + self.number(1) % 16,
            1 => IOAPIC_START,
            2 => PCI_ECAM_START + (SLOT << 15),
            3 => 0xc000_0000 + self.number(2),
            4 => u64::MAX - self.number(1),
            5 => self.number(8),
            _ => ARENA + self.number(2) % ARENA_LEN,
        }
    }
}

/// The board: one device in slot 1.
struct Rig {
    dma: Dma,
    mmio: Arc<Bus>,
    ports: ConfigPorts,
    ecam: Ecam,
    device: Arc<dyn Persist>,
    registers: Arc<dyn PciDevice>,
    outside: Outside,
    kind: Kind,
    /// NVMe: submission queue tails as the driver keeps them.
    tails: [u32; 3],
}

/// The host's side of a device.
enum Outside {
    Nothing,
    Network(UnixDatagram),
    Console(Arc<Console>),
    Balloon(Arc<Balloon>),
}

impl Rig {
    fn new(kind: Kind, disk: &Arc<dyn Disk>, folder: &Path) -> std::io::Result<Rig> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let memory = crate::memory::allocate(RAM).map_err(std::io::Error::other)?;
        let vm: Arc<dyn Vm> = Arc::new(Silent);
        let dma = Dma::new(Arc::new(memory), vm.clone());
        let mmio = Arc::new(Bus::new());
        let ioapic = IoApic::new(vm.clone());
        let root = Root::new(mmio.clone(), ioapic, Control::new());
        let mut outside = Outside::Nothing;
        let (device, registers): (Arc<dyn Persist>, Arc<dyn PciDevice>) = if kind == Kind::Nvme {
            let disks = vec![disk.clone()];
            let controller = Controller::new("nvme0", dma.clone(), vm, disks, 2, 7)?;
            (controller.clone(), controller)
        } else {
            let backend: Arc<dyn crate::virtio::Backend> = match kind {
                Kind::Block => Arc::new(Block::new(disk.clone(), 2, "fuzz")?),
                Kind::Net => {
                    let (ours, theirs) = UnixDatagram::pair()?;
                    theirs.set_nonblocking(true)?;
                    outside = Outside::Network(theirs);
                    Arc::new(Net::new(
                        Port::datagrams(OwnedFd::from(ours))?,
                        [2, 0, 0, 0, 0, 1],
                        1500,
                    ))
                }
                Kind::Console => {
                    let console = Arc::new(Console::new(Box::new(std::io::sink()))?);
                    outside = Outside::Console(console.clone());
                    console
                }
                Kind::Balloon => {
                    let balloon = Arc::new(Balloon::new()?);
                    outside = Outside::Balloon(balloon.clone());
                    balloon
                }
                Kind::Vsock => Arc::new(Vsock::new(&folder.join(format!("vsock{number}")), 3)?),
                Kind::Rng | Kind::Nvme => Arc::new(Rng),
            };
            let transport = Transport::new("device0", dma.clone(), vm, backend)?;
            (transport.clone(), transport)
        };
        root.attach(registers.clone())
            .map_err(std::io::Error::other)?;
        let rig = Rig {
            dma,
            mmio,
            ports: ConfigPorts(root.clone()),
            ecam: Ecam(root),
            device,
            registers,
            outside,
            kind,
            tails: [0; 3],
        };
        // Memory decoding and bus mastering.
        rig.ecam.write(SLOT << 15 | 4, &[6, 0]);
        Ok(rig)
    }

    fn set(&self, offset: u64, value: u64, width: usize) {
        self.registers
            .write_bar(0, offset, &value.to_le_bytes()[..width]);
    }

    /// What a driver does before it works: from here on random bytes reach deep.
    fn bring_up(&mut self) {
        if self.kind == Kind::Nvme {
            self.set(0x14, 0, 4);
            self.set(0x24, 0x000f_000f, 4);
            self.set(0x28, ARENA, 8);
            self.set(0x30, ARENA + 0x1000, 8);
            self.set(0x14, 0x0046_0001, 4);
            self.tails = [0; 3];
            self.command(0, 5, ARENA + 0x3000, [0xf_0001, 0x1_0003]);
            self.command(0, 1, ARENA + 0x2000, [0xf_0001, 0x1_0001]);
            return;
        }
        self.set(20, 0, 1);
        self.set(20, 3, 1);
        for select in 0..2u64 {
            let mut offered = [0; 4];
            self.set(0, select, 4);
            self.registers.read_bar(0, 4, &mut offered);
            self.set(8, select, 4);
            self.set(12, u64::from(u32::from_le_bytes(offered)), 4);
        }
        self.set(20, 11, 1);
        let mut count = [0; 2];
        self.registers.read_bar(0, 18, &mut count);
        for queue in 0..u64::from(u16::from_le_bytes(count)) {
            let at = ring(queue);
            self.set(22, queue, 2);
            self.set(24, 16, 2);
            self.set(32, at, 8);
            self.set(40, at + 0x100, 8);
            self.set(48, at + 0x200, 8);
            self.set(28, 1, 2);
        }
        self.set(20, 15, 1);
    }

    /// An NVMe command into a queue, and its doorbell.
    fn command(&mut self, queue: usize, opcode: u8, prp: u64, words: [u32; 2]) {
        let base = [ARENA, ARENA + 0x2000, ARENA + 0x4000][queue];
        let mut entry = [0u8; 64];
        entry[0] = opcode;
        entry[4] = 1;
        entry[24..32].copy_from_slice(&prp.to_le_bytes());
        entry[32..40].copy_from_slice(&(ARENA + 0x8000).to_le_bytes());
        entry[40..44].copy_from_slice(&words[0].to_le_bytes());
        entry[44..48].copy_from_slice(&words[1].to_le_bytes());
        let tail = &mut self.tails[queue];
        let _ = self.dma.write(base + u64::from(*tail) * 64, &entry);
        *tail = (*tail + 1) % 16;
        let tail = *tail;
        self.set(0x1000 + queue as u64 * 8, u64::from(tail), 4);
    }

    /// A chain of descriptors in a virtqueue, mostly well-formed, and its announcement.
    fn offer(&self, choices: &mut Choices<'_>) {
        let queue = u64::from(choices.byte() % 4);
        let at = ring(queue);
        let first = choices.byte() % 16;
        let count = choices.byte() % 5 + 1;
        for step in 0..count {
            let index = (first + step) % 16;
            let kind = choices.byte();
            let next = if kind & 0x80 == 0 {
                index.wrapping_add(1) % 16
            } else {
                choices.byte()
            };
            let last = step + 1 == count;
            let flags = u16::from(kind & 7) & !1 | u16::from(!last || kind & 0x40 != 0);
            let mut bytes = choices.address().to_le_bytes().to_vec();
            let len = match choices.byte() % 8 {
                0 => choices.number(4) as u32,
                1 => 16,
                2 => 512,
                3 => 1,
                4 => 0,
                _ => 44 + u32::from(choices.byte()) * 8,
            };
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(u16::from(next).to_le_bytes());
            let _ = self.dma.write(at + u64::from(index) * 16, &bytes);
        }
        let available = self.dma.read_u16(at + 0x102).unwrap_or(0);
        let _ = self.dma.write(
            at + 0x104 + u64::from(available % 16) * 2,
            &u16::from(first).to_le_bytes(),
        );
        let step = if choices.byte() == 0 { 40 } else { 1 };
        let _ = self
            .dma
            .write(at + 0x102, &available.wrapping_add(step).to_le_bytes());
        self.set(0x3000 + queue * 4, queue, 2);
    }

    fn step(&mut self, choices: &mut Choices<'_>) {
        match choices.byte() % 16 {
            0 => {
                let offset = choices.number(2) % 0x4000;
                let width = choices.width();
                self.set(offset, choices.number(8), width);
            }
            1 => {
                // Where the registers are dense.
                let offset = u64::from(choices.byte() % 64);
                let width = choices.width();
                self.set(offset, choices.number(8), width);
            }
            2 => {
                let offset = choices.number(2) % 0x4000;
                let width = choices.width();
                self.registers.read_bar(0, offset, &mut [0; 8][..width]);
            }
            3 => {
                let (offset, width) = (choices.number(2), choices.width());
                self.ecam.write(
                    SLOT << 15 | offset & 0xfff,
                    &choices.number(8).to_le_bytes()[..width],
                );
                self.ecam
                    .read(SLOT << 15 | offset & 0xfff, &mut [0; 8][..width]);
            }
            4 => {
                let address = choices.number(4);
                self.ports.write(0, &(address as u32).to_le_bytes());
                let width = choices.width().min(4);
                let value = choices.number(4).to_le_bytes();
                self.ports.write(4, &value[..width]);
                self.ports.read(4, &mut [0; 4][..width]);
            }
            5 => {
                let (address, width) = (choices.address(), choices.width());
                let value = choices.number(8).to_le_bytes();
                let _ = self.dma.write(address, &value[..width]);
            }
            6 => {
                // Anywhere on the memory bus: BARs where they are now, MSI-X tables.
                let (address, width) = (choices.address(), choices.width());
                let value = choices.number(8).to_le_bytes();
                self.mmio.write(address, &value[..width]);
                self.mmio.read(address, &mut [0; 8][..width]);
            }
            7 => self.bring_up(),
            8 => self.act_outside(choices),
            9 if self.kind != Kind::Nvme => self.set(20, 0, 1),
            _ if self.kind == Kind::Nvme => {
                let opcode = match choices.byte() {
                    any @ 0..32 => any,
                    other => [0, 1, 2, 8, 9][usize::from(other % 5)],
                };
                let queue = usize::from(choices.byte() % 2);
                let prp = choices.address() & !3;
                let words = [choices.number(1) as u32, choices.number(4) as u32];
                self.command(queue, opcode, prp, words);
                if choices.byte().is_multiple_of(4) {
                    // The guest has seen some completions.
                    let head = u64::from(choices.byte() % 16);
                    self.set(0x1000 + queue as u64 * 8 + 4, head, 4);
                }
            }
            _ => self.offer(choices),
        }
    }

    fn act_outside(&self, choices: &mut Choices<'_>) {
        let len = usize::from(choices.byte()) * 16;
        match &self.outside {
            Outside::Nothing => {}
            Outside::Network(socket) => {
                let _ = socket.send(&vec![len as u8; len]);
                let _ = socket.recv(&mut [0; 64]);
            }
            Outside::Console(console) => console.receive(&vec![b'x'; len]),
            Outside::Balloon(balloon) => balloon.want(choices.number(4)),
        }
    }

    /// Saves, gives the state to a fresh device with the same memory, saves that: both must be the same.
    fn keeps_its_state(&self, disk: &Arc<dyn Disk>, folder: &Path) -> std::io::Result<()> {
        let fresh = Rig::new(self.kind, disk, folder)?;
        self.device.quiesce();
        fresh.device.quiesce();
        let saved = self.device.save().map_err(std::io::Error::other)?;
        fresh
            .device
            .restore(&saved)
            .map_err(std::io::Error::other)?;
        let again = fresh.device.save().map_err(std::io::Error::other)?;
        assert_eq!(saved, again, "the state changed on its way");
        self.device.wake();
        Ok(())
    }
}

fn ring(queue: u64) -> u64 {
    ARENA + queue % 16 * 0x400
}

/// A device that was driven and is left as it is.
pub struct Driven {
    rig: Rig,
    disk: Arc<dyn Disk>,
    folder: Scratch,
}

impl Drop for Driven {
    fn drop(&mut self) {
        self.rig.device.close();
    }
}

/// Drives a device of `kind` by `data`.
///
/// # Errors
/// Where the host gives no file or thread.
pub fn drive(kind: Kind, data: &[u8]) -> std::io::Result<Driven> {
    let folder = Scratch::new()?;
    let path = folder.0.join("disk");
    std::fs::File::create(&path)?.set_len(1 << 20)?;
    let disk: Arc<dyn Disk> = Arc::new(RawDisk::open(&path, false).map_err(std::io::Error::other)?);
    let rig = Rig::new(kind, &disk, &folder.0)?;
    let mut driven = Driven { rig, disk, folder };
    let mut choices = Choices(data);
    if data.first().is_none_or(|first| first & 1 != 0) {
        driven.rig.bring_up();
    }
    let mut steps = 0u32;
    while !choices.0.is_empty() {
        driven.rig.step(&mut choices);
        steps += 1;
        if steps.is_multiple_of(64) {
            driven.keeps_its_state()?;
        }
    }
    Ok(driven)
}

impl Driven {
    fn keeps_its_state(&self) -> std::io::Result<()> {
        self.rig.keeps_its_state(&self.disk, &self.folder.0)
    }
}

/// Drives a device of `kind` by `data` and looks at its state then.
///
/// # Errors
/// Where the host gives no file or thread.
pub fn fuzz_device(kind: Kind, data: &[u8]) -> std::io::Result<()> {
    drive(kind, data)?.keeps_its_state()
}

/// Drains a virtqueue whose rings and descriptors are `data`.
pub fn fuzz_virtqueue(data: &[u8]) {
    // One memory for all runs: what an earlier run left is as good as any other content.
    static MEMORY: std::sync::OnceLock<Option<Dma>> = std::sync::OnceLock::new();
    let dma = MEMORY.get_or_init(|| {
        let memory = crate::memory::allocate(RAM).ok()?;
        Some(Dma::new(Arc::new(memory), Arc::new(Silent)))
    });
    if let Some(dma) = dma {
        crate::virtio::queue::fuzz_queue(data, dma);
    }
}

/// Reads `data` as a line of the control socket.
pub fn fuzz_control(data: &[u8]) {
    use crate::process::protocol::{Answer, Request, parse};
    let text = String::from_utf8_lossy(data);
    if let Ok(request) = parse(&text) {
        let written = serde_json::to_string(&request).unwrap_or_default();
        assert_eq!(parse(&written), Ok::<Request, String>(request));
    }
    let _ = serde_json::from_str::<Answer>(&text);
}

/// A folder that goes with its value.
struct Scratch(std::path::PathBuf);

impl Scratch {
    fn new() -> std::io::Result<Scratch> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("berth-fuzz-{}-{number}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The board's own devices on their ports.
struct Board {
    pio: Bus,
    mmio: Bus,
    devices: Vec<Arc<dyn Persist>>,
    line: IrqLine,
    serial: Arc<Serial>,
    power: Arc<Power>,
}

fn board() -> Result<Board, crate::bus::BusError> {
    let control = Control::new();
    let ioapic = IoApic::new(Arc::new(Silent));
    let serial = Serial::new("serial0", ioapic.line(pin::COM1), Box::new(std::io::sink()));
    let power = Power::new(control.clone(), ioapic.line(pin::POWER));
    let (pit, rtc) = (Pit::new(), Rtc::new());
    let (master, slave) = (Pic::new("pic0"), Pic::new("pic1"));
    let (pio, mmio) = (Bus::new(), Bus::new());
    let root = Root::new(Arc::new(Bus::new()), ioapic.clone(), control.clone());
    let ranges: [(u64, u64, Arc<dyn BusDevice>); 11] = [
        (port::PIC_MASTER, 2, master.clone()),
        (port::PIC_SLAVE, 2, slave.clone()),
        (port::PIT, 4, pit.clone()),
        (
            port::SYSTEM_CONTROL,
            1,
            Arc::new(SystemControl(pit.clone())),
        ),
        (
            port::KEYBOARD_DATA,
            1,
            KeyboardController::new(control.clone(), false),
        ),
        (
            port::KEYBOARD_COMMAND,
            1,
            KeyboardController::new(control.clone(), true),
        ),
        (port::RTC, 2, rtc.clone()),
        (port::COM1, 8, serial.clone()),
        (port::PANIC, 1, PanicPort::new(control)),
        (port::POWER, power::LEN, power.clone()),
        (port::PCI_CONFIG, 8, Arc::new(ConfigPorts(root.clone()))),
    ];
    for (base, len, device) in ranges {
        pio.insert(base, len, device)?;
    }
    mmio.insert(IOAPIC_START, IOAPIC_LEN, ioapic.clone())?;
    mmio.insert(PCI_ECAM_START, PCI_ECAM_LEN, Arc::new(Ecam(root)))?;
    let line = ioapic.line(pin::PCI[0]);
    Ok(Board {
        pio,
        mmio,
        devices: vec![
            ioapic,
            master,
            slave,
            pit,
            rtc,
            serial.clone(),
            power.clone(),
        ],
        line,
        serial,
        power,
    })
}

/// Drives the devices of the board itself by `data`: every port and register, in every width.
pub fn fuzz_board(data: &[u8]) {
    let Ok(used) = board() else { return };
    let mut choices = Choices(data);
    let bases = [
        port::PIC_MASTER,
        port::PIC_SLAVE,
        port::PIT,
        port::SYSTEM_CONTROL,
        port::KEYBOARD_DATA,
        port::RTC,
        port::COM1,
        port::PANIC,
        port::POWER,
        port::PCI_CONFIG,
    ];
    while !choices.0.is_empty() {
        let (what, width) = (choices.byte(), choices.width());
        let value = choices.number(width).to_le_bytes();
        match what % 8 {
            0..4 => {
                let at = bases[usize::from(choices.byte()) % bases.len()] + u64::from(what >> 5);
                used.pio.write(at, &value[..width]);
                used.pio.read(at, &mut [0; 8][..width]);
            }
            4 => {
                let at = IOAPIC_START + u64::from(choices.byte());
                used.mmio.write(at, &value[..width]);
                used.mmio.read(at, &mut [0; 8][..width]);
            }
            5 => {
                let at = PCI_ECAM_START + choices.number(3) % PCI_ECAM_LEN;
                used.mmio.write(at, &value[..width]);
                used.mmio.read(at, &mut [0; 8][..width]);
            }
            6 => used.serial.receive(&value),
            _ => {
                used.line.set(what & 0x80 != 0);
                used.power.press_button();
            }
        }
    }
    let Ok(fresh) = board() else { return };
    for (old, new) in used.devices.iter().zip(&fresh.devices) {
        old.quiesce();
        new.quiesce();
        let (Ok(saved), name) = (old.save(), old.identity()) else {
            continue;
        };
        let restored = new.restore(&saved);
        assert!(restored.is_ok(), "{name}: {restored:?}");
        assert_eq!(new.save().ok(), Some(saved), "{name} changed on its way");
    }
    for device in used.devices.iter().chain(&fresh.devices) {
        device.close();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    /// Fails the whole test run with a word where a device hangs.
    fn watched(kind: Kind, data: &[u8]) {
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let text = format!("{kind:?} {data:?}");
        let watch = std::thread::spawn(move || {
            if wait.recv_timeout(std::time::Duration::from_secs(300))
                == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                // Not by eprintln!, which the test harness keeps to itself until a test's end.
                let _ = writeln!(std::io::stderr(), "a device hangs: {text}");
                std::process::abort();
            }
        });
        fuzz_device(kind, data).unwrap();
        drop(done);
        watch.join().unwrap();
    }

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 0..1500)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn a_hostile_guest_gets_nowhere_with_nvme(data in bytes()) { watched(Kind::Nvme, &data); }
        #[test]
        fn a_hostile_guest_gets_nowhere_with_block(data in bytes()) { watched(Kind::Block, &data); }
        #[test]
        fn a_hostile_guest_gets_nowhere_with_net(data in bytes()) { watched(Kind::Net, &data); }
        #[test]
        fn a_hostile_guest_gets_nowhere_with_console(data in bytes()) { watched(Kind::Console, &data); }
        #[test]
        fn a_hostile_guest_gets_nowhere_with_rng(data in bytes()) { watched(Kind::Rng, &data); }
        #[test]
        fn a_hostile_guest_gets_nowhere_with_balloon(data in bytes()) { watched(Kind::Balloon, &data); }
        #[test]
        fn a_hostile_guest_gets_nowhere_with_vsock(data in bytes()) { watched(Kind::Vsock, &data); }
        #[test]
        fn a_hostile_guest_gets_nowhere_with_the_board(data in bytes()) { fuzz_board(&data); }
    }
}
