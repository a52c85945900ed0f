//! Booting a Linux kernel without firmware, and `berth machine boot`: a machine in the foreground.
//!
//! A bzImage is decompressed on the host and its vmlinux entered directly, by the 64-bit boot protocol or PVH.
//! The kernel then runs at its link address: it is its decompressor that would have moved it (KASLR). With
//! [`Protocol::BzImage`], and where we lack the compression method, the decompressor runs in the guest instead.

pub use bytes::Bytes;

mod bytes;
pub mod bzimage;
pub mod cache;
pub mod decompress;
pub mod elf;
mod entry;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base::error::kind_of_io;
use base::{Classified, Kind};
use cpu::{CpuError, CpuModel, GuestMemory};
use disk::{BackingFiles, Disk, DiskError, Format};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes as _, GuestAddress};

pub use crate::control::Outcome;
use crate::crash::{CrashWatch, Watched};
use crate::machine::{CpuChoice, Machine, MachineConfig, MachineError};
use crate::memory::MemoryError;
use crate::process::GUEST_CID;
use crate::process::disks::{GuardedDisk, OnDiskFull, Room};
use crate::terminal::{Input, KEYS, Terminal};
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::console::Console;
use crate::virtio::net::{Net, Port};
use crate::virtio::vsock::Vsock;

/// Kernels and initrds larger than this are mistakes.
const FILE_LIMIT: u64 = 2 << 30;

/// A kernel could not be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("cannot read {what} {path}: {source}")]
    Read {
        what: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{what} {path} is too large: more than 2 GiB")]
    Large { what: &'static str, path: PathBuf },
    #[error("the kernel is neither a bzImage nor an ELF file for x86-64")]
    NotAKernel,
    #[error("the kernel image cannot be used: {0}")]
    BzImage(&'static str),
    #[error("the kernel's ELF file cannot be used: {0}")]
    Elf(&'static str),
    #[error("the kernel is compressed with {0}, which cannot be undone here")]
    Compression(&'static str),
    #[error("the kernel's {method} payload is damaged: {reason}")]
    Payload {
        method: &'static str,
        reason: String,
    },
    #[error("the kernel has no {0} entry")]
    NoEntry(&'static str),
    #[error("no room for the {what}: {len} bytes at {address:#x}. Give the machine more memory")]
    NoRoom {
        what: &'static str,
        address: u64,
        len: u64,
    },
    #[error("the kernel command line has {length} bytes; this kernel takes {limit}")]
    CommandLine { length: usize, limit: usize },
    #[error("the kernel command line holds a zero byte")]
    CommandLineNul,
    #[error("the tap interface {name} cannot be used: {source}")]
    Tap {
        name: String,
        source: std::io::Error,
    },
    #[error("the host gives no sockets for a network: {0}")]
    Link(std::io::Error),
    #[error("the user-mode network cannot be made: {why}")]
    Network { why: String },
    #[error("cannot listen at {path} for connections to the guest: {source}")]
    Socket {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the terminal cannot be used: {0}")]
    Terminal(std::io::Error),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Disk(#[from] DiskError),
}

impl From<CpuError> for BootError {
    fn from(error: CpuError) -> BootError {
        BootError::Machine(error.into())
    }
}

impl From<MemoryError> for BootError {
    fn from(error: MemoryError) -> BootError {
        BootError::Machine(error.into())
    }
}

impl Classified for BootError {
    fn kind(&self) -> Kind {
        match self {
            BootError::Read { source, .. } => kind_of_io(source),
            BootError::Compression(_) => Kind::Unsupported,
            BootError::NoRoom { .. } => Kind::Capacity,
            BootError::Tap { source, .. } => kind_of_io(source),
            // Bound by another, or left by one that was killed.
            BootError::Socket { source, .. } if source.kind() == ErrorKind::AddrInUse => {
                Kind::Conflict
            }
            BootError::Socket { source, .. } => kind_of_io(source),
            BootError::Terminal(_) | BootError::Link(_) => Kind::Internal,
            BootError::Network { .. } => Kind::Conflict,
            BootError::Machine(error) => error.kind(),
            BootError::Disk(error) => error.kind(),
            _ => Kind::Invalid,
        }
    }
    fn fix(&self) -> Option<String> {
        if let Some(option) = self.option() {
            return Some(format!("say {option}"));
        }
        match self {
            BootError::Machine(error) => error.fix(),
            // The process of a daemon's machine has given up root's privileges by then.
            BootError::Disk(DiskError::Open { path, source })
                if source.kind() == ErrorKind::PermissionDenied =>
            {
                let user = rustix::process::geteuid().as_raw();
                Some(format!("chown {user} {}", path.display()))
            }
            BootError::Socket { path, source } if source.kind() == ErrorKind::AddrInUse => {
                Some(format!(
                    "--vsock with another path; at {} there is something already",
                    path.display()
                ))
            }
            BootError::Tap { name, .. } => Some(format!(
                "ip tuntap add {name} mode tap user $USER; ip link set {name} up"
            )),
            _ => None,
        }
    }
}

impl BootError {
    /// The option of the machine that mends it, where it is one.
    pub fn option(&self) -> Option<&'static str> {
        match self {
            BootError::Machine(MachineError::Cpu(CpuError::NoVirtualization(_))) => {
                Some("--cpu soft")
            }
            BootError::NoRoom { .. } => Some("--memory SIZE, larger than now"),
            _ => None,
        }
    }
}

/// How the kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// vmlinux, in long mode.
    #[default]
    Linux64,
    /// vmlinux, in 32-bit protected mode.
    Pvh,
    /// The bzImage's own decompressor, in long mode: slower, with KASLR.
    BzImage,
}

impl std::str::FromStr for Protocol {
    type Err = String;
    fn from_str(text: &str) -> Result<Protocol, String> {
        match text {
            "linux64" => Ok(Protocol::Linux64),
            "pvh" => Ok(Protocol::Pvh),
            "bzimage" => Ok(Protocol::BzImage),
            _ => Err(format!(
                "{text:?} is no boot protocol: linux64, pvh or bzimage"
            )),
        }
    }
}

/// A kernel file, ready to be placed into memory.
pub struct Kernel {
    file: Bytes,
    /// The vmlinux inside, where it could be unpacked; the file itself where that is one.
    unpacked: Option<Bytes>,
    /// The file that `unpacked` is the content of.
    pages: Option<fs::File>,
}

impl Kernel {
    /// Reads and, where the protocol wants it, unpacks a kernel.
    pub fn open(path: &Path, protocol: Protocol) -> Result<Kernel, BootError> {
        Kernel::parse(read("kernel", path)?, protocol)
    }

    /// Reads a kernel that was unpacked before (see [`cache`]).
    ///
    /// # Errors
    /// Where either file cannot be read.
    pub fn open_unpacked(path: &Path, unpacked: &Path) -> Result<Kernel, BootError> {
        let failed = |what: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source| BootError::Read { what, path, source }
        };
        // Of the packed kernel only the header is read.
        let mut packed = fs::File::open(path).map_err(failed("kernel", path))?;
        let len = packed.metadata().map_err(failed("kernel", path))?.len();
        if len > FILE_LIMIT {
            return Err(BootError::Large {
                what: "kernel",
                path: path.to_owned(),
            });
        }
        let mut file = Bytes::zeroed(len as usize);
        let header = file.len().min(bzimage::HEADER_LIMIT);
        packed
            .read_exact(&mut file[..header])
            .map_err(failed("kernel", path))?;
        let what = "the unpacked kernel";
        let pages = fs::File::open(unpacked).map_err(failed(what, unpacked))?;
        let plain = Bytes::of_file(&pages).map_err(failed(what, unpacked))?;
        Ok(Kernel {
            file,
            unpacked: Some(plain),
            pages: Some(pages),
        })
    }

    /// Its vmlinux, where that was packed.
    pub fn unpacked(&self) -> Option<&[u8]> {
        self.unpacked.as_deref()
    }

    /// A kernel from its file's bytes.
    pub fn parse(file: impl Into<Bytes>, protocol: Protocol) -> Result<Kernel, BootError> {
        let file = file.into();
        let unpacked = match bzimage::parse(&file)? {
            None if file.starts_with(b"\x7fELF") => None,
            None => return Err(BootError::NotAKernel),
            Some(_) if protocol == Protocol::BzImage => None,
            Some(image) => match decompress::decompress(image.payload) {
                Ok(plain) => Some(plain),
                Err(BootError::Compression(_))
                    if image.has_64bit_entry && protocol == Protocol::Linux64 =>
                {
                    None
                }
                Err(error) => return Err(error),
            },
        };
        Ok(Kernel {
            file,
            unpacked,
            pages: None,
        })
    }
}

/// For fuzzing: the loaders on arbitrary bytes.
pub fn fuzz_kernel(data: &[u8]) {
    let Ok(memory) = crate::memory::allocate(64 << 20) else {
        return;
    };
    // The last byte chooses, so that a kernel's own head stays where it is.
    let choice = data.last().copied().unwrap_or(0);
    let protocol = match choice % 3 {
        0 => Protocol::Linux64,
        1 => Protocol::BzImage,
        _ => Protocol::Pvh,
    };
    let initrd = (choice & 4 != 0).then(|| &data[..data.len() / 2]);
    let words = "x".repeat(usize::from(choice >> 3) * 128);
    if let Ok(kernel) = Kernel::parse(data.to_vec(), protocol) {
        let mut state = cpu::x86::CpuState::default();
        let _ = place(&memory, &kernel, initrd, &words, 0, protocol, &mut state);
    }
}

/// Puts kernel, initrd and boot structures into fresh guest memory and sets the first CPU's state.
pub fn place(
    memory: &GuestMemory,
    kernel: &Kernel,
    initrd: Option<&[u8]>,
    command_line: &str,
    rsdp: u64,
    protocol: Protocol,
    state: &mut cpu::x86::CpuState,
) -> Result<(), BootError> {
    let image = bzimage::parse(&kernel.file)?;
    let elf = match (&kernel.unpacked, &image) {
        (Some(plain), _) => Some(elf::load(memory, plain, kernel.pages.as_ref())?),
        (None, None) => Some(elf::load(memory, &kernel.file, None)?),
        (None, Some(_)) => None,
    };
    let (kernel_end, entry) = match (&elf, &image) {
        (Some(loaded), _) => (loaded.end, loaded.entry),
        (None, Some(image)) => place_decompressor(memory, image)?,
        (None, None) => return Err(BootError::NotAKernel),
    };
    let initrd_max = image.as_ref().map_or(0x7fff_ffff, |image| image.initrd_max);
    let initrd = initrd
        .map(|bytes| entry::place_initrd(memory, bytes, kernel_end, initrd_max))
        .transpose()?;
    let handover = entry::Handover {
        memory,
        command_line,
        initrd,
        rsdp,
    };
    match protocol {
        Protocol::Pvh => {
            let entry = elf
                .and_then(|loaded| loaded.pvh_entry)
                .ok_or(BootError::NoEntry("PVH"))?;
            entry::pvh(&handover, entry, state)
        }
        Protocol::Linux64 | Protocol::BzImage => {
            entry::linux64(&handover, image.as_ref(), entry, state)
        }
    }
}

/// Puts the compressed kernel where it wants to be; gives its memory's end and 64-bit entry.
fn place_decompressor(
    memory: &GuestMemory,
    image: &bzimage::BzImage<'_>,
) -> Result<(u64, u64), BootError> {
    if !image.has_64bit_entry {
        return Err(BootError::NoEntry("64-bit"));
    }
    let address = image.pref_address;
    let len = u64::from(image.init_size).max(image.code.len() as u64);
    let no_room = BootError::NoRoom {
        what: "kernel",
        address,
        len,
    };
    match address.checked_add(len) {
        Some(end)
            if address >= crate::memory::KERNEL_FLOOR && end <= crate::memory::low_end(memory) =>
        {
            memory
                .write_slice(image.code, GuestAddress(address))
                .map_err(|_| no_room)?;
            Ok((end, address + bzimage::ENTRY_64))
        }
        _ => Err(no_room),
    }
}

pub(crate) fn read(what: &'static str, path: &Path) -> Result<Bytes, BootError> {
    let failed = |source| BootError::Read {
        what,
        path: path.to_owned(),
        source,
    };
    let mut file = fs::File::open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if meta.is_file() && meta.len() > FILE_LIMIT {
        return Err(BootError::Large {
            what,
            path: path.to_owned(),
        });
    }
    if !meta.is_file() {
        let mut bytes = Vec::new();
        let count = file
            .take(FILE_LIMIT + 1)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
        let large = count as u64 > FILE_LIMIT;
        return if large {
            Err(BootError::Large {
                what,
                path: path.to_owned(),
            })
        } else {
            Ok(bytes.into())
        };
    }
    let mut bytes = Bytes::zeroed(meta.len() as usize);
    file.read_exact(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

/// What `berth machine boot` was asked for.
#[derive(Debug, Clone, Default)]
pub struct BootConfig {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    /// Added to our own part of the command line.
    pub append: String,
    pub disks: Vec<DiskConfig>,
    /// Tap interfaces of the host, a virtio card for each.
    pub taps: Vec<String>,
    pub network: Option<NetworkConfig>,
    /// Where host programs reach the guest's sockets (see [`crate::virtio::vsock`]).
    pub vsock: Option<PathBuf>,
    /// The terminal is the virtio console, with its window's size; the serial line only writes.
    pub virtio_console: bool,
    pub machine: MachineConfig,
    pub on_disk_full: OnDiskFull,
    pub protocol: Protocol,
    /// Says on standard error which CPU serves and how long the start took.
    pub verbose: bool,
}

/// One disk of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    pub path: PathBuf,
    #[serde(default)]
    pub read_only: bool,
    #[serde(default)]
    pub bus: DiskBus,
    #[serde(default)]
    pub format: Format,
}

/// The controller a disk is behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskBus {
    /// Debian's cloud kernels have its driver built in.
    #[default]
    Nvme,
    Virtio,
}

impl std::str::FromStr for DiskConfig {
    type Err = String;
    /// `FILE[,ro][,nvme|,virtio][,format=raw|,format=qcow2]`; a comma in the file's name is part of it where no such word
    /// follows. Without a format, a file that looks like another than its name says is refused: a guest that owns a raw
    /// disk may write anything on it.
    fn from_str(text: &str) -> Result<DiskConfig, String> {
        let (mut rest, mut read_only, mut bus) = (text, false, DiskBus::default());
        let mut format = None;
        while let Some((before, word)) = rest.rsplit_once(',') {
            match word {
                "ro" => read_only = true,
                "nvme" => bus = DiskBus::Nvme,
                "virtio" => bus = DiskBus::Virtio,
                "format=raw" => format = Some(Format::Raw),
                "format=qcow2" => format = Some(Format::Qcow2),
                _ if word.starts_with("format=") => {
                    return Err(format!("{word:?}: the formats are raw and qcow2"));
                }
                _ => break,
            }
            rest = before;
        }
        if rest.is_empty() {
            return Err(format!("{text:?} names no file: FILE[,ro][,virtio]"));
        }
        let path = PathBuf::from(rest);
        let named = match path.extension() {
            Some(end) if end == "qcow2" => Format::Qcow2,
            _ => Format::Raw,
        };
        let format = match format {
            Some(format) => format,
            // What cannot be read is said when it is opened.
            None => match disk::probe(&path) {
                Ok(looks) if looks != named => {
                    let looks = if looks == Format::Raw { "raw" } else { "qcow2" };
                    return Err(format!(
                        "{rest} looks like {looks}, which its name does not say; say it: {text},format={looks}"
                    ));
                }
                _ => named,
            },
        };
        Ok(DiskConfig {
            path,
            read_only,
            bus,
            format,
        })
    }
}

/// The network card of a machine.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// A socket on which each datagram is a frame (see [`crate::process::datagrams`]).
    pub link: Arc<OwnedFd>,
    pub mac: [u8; 6],
}

/// The command line: what every guest of ours wants, then the user's part, which wins.
pub fn command_line(append: &str, has_disk: bool, has_initrd: bool) -> String {
    let mut words = vec!["console=ttyS0"];
    if !append
        .split_whitespace()
        .any(|word| word.starts_with("panic="))
    {
        // A panic resets the machine at once, so that its policy applies.
        words.push("panic=-1");
    }
    if !append
        .split_whitespace()
        .any(|word| word.starts_with("reboot="))
    {
        // On a hardware-reduced board Linux takes the firmware for EFI and jumps into nothing: the ACPI register it is.
        words.push("reboot=a");
    }
    if has_disk
        && !has_initrd
        && !append
            .split_whitespace()
            .any(|word| word.starts_with("root="))
    {
        words.push("root=/dev/nvme0n1 rw");
    }
    if !append.trim().is_empty() {
        words.push(append.trim());
    }
    words.join(" ")
}

/// Runs a kernel in the foreground, with its serial line on the terminal, until it ends.
///
/// # Errors
/// Where it cannot be started; how a started one ended is its [`Outcome`].
pub fn run(config: BootConfig) -> Result<Outcome, BootError> {
    let ms = |duration: std::time::Duration| duration.as_secs_f64() * 1000.0;
    let begun = std::time::Instant::now();
    // The software CPU measures the host's clock once, for 20 ms: beside the kernel's unpacking they cost nothing.
    let measured = std::thread::spawn(cpu_soft::clock::tsc_hz);
    let kernel = cache::open(&config.kernel, config.protocol)?;
    let initrd = config
        .initrd
        .as_deref()
        .map(|path| read("initrd", path))
        .transpose()?;
    let unpacked = begun.elapsed();
    let _ = measured.join();
    let watch = CrashWatch::new();
    let console = Watched {
        watch: watch.clone(),
        to: std::io::stdout(),
    };
    let mut machine = Machine::new(config.machine.clone(), Box::new(console))?;
    watch.begin(machine.control.clone());
    if let Some(note) = &machine.cpu_note {
        eprintln!("berth: {note}");
    }
    // The terminal is in raw mode.
    let room = Room::new(machine.control.clone(), config.on_disk_full, |text| {
        eprint!("\r\nberth: {text}\r\n");
    });
    let mut namespaces: Vec<Arc<dyn Disk>> = Vec::new();
    for (number, disk) in config.disks.iter().enumerate() {
        let backing = BackingFiles::Allowed;
        let file: Arc<dyn Disk> = Arc::new(GuardedDisk {
            disk: disk::open(&disk.path, disk.format, disk.read_only, backing)?,
            path: disk.path.clone(),
            counters: Arc::default(),
            room: room.clone(),
        });
        match disk.bus {
            DiskBus::Nvme => namespaces.push(file),
            DiskBus::Virtio => {
                let name = format!("disk{number}");
                let block =
                    Block::new(file, config.machine.cpus, &name).map_err(MachineError::Thread)?;
                machine.add_virtio(name, Arc::new(block))?;
            }
        }
    }
    let has_root = !namespaces.is_empty();
    if has_root {
        machine.add_nvme(namespaces, 0)?;
    }
    for (number, tap) in config.taps.iter().enumerate() {
        let failed = |source| BootError::Tap {
            name: tap.clone(),
            source,
        };
        let port = Port::open_tap(tap).map_err(failed)?;
        let mtu = port.mtu().map_err(failed)?;
        // Locally administered; one number for each card.
        let mac = [0x52, 0x42, 0, 0, 0, number as u8];
        machine.add_virtio(format!("net{number}"), Arc::new(Net::new(port, mac, mtu)))?;
    }
    if let Some(network) = &config.network {
        let port = rustix::io::fcntl_dupfd_cloexec(&network.link, 0)
            .map_err(std::io::Error::from)
            .and_then(Port::datagrams)
            .map_err(BootError::Link)?;
        machine.add_virtio("net0", Arc::new(Net::new(port, network.mac, 1500)))?;
    }
    machine.add_virtio("rng0", Arc::new(crate::virtio::rng::Rng))?;
    // What the guest frees goes back to the host.
    let balloon = Balloon::new().map_err(MachineError::Event)?;
    machine.add_virtio("balloon0", Arc::new(balloon))?;
    if let Some(path) = &config.vsock {
        let failed = |source| BootError::Socket {
            path: path.clone(),
            source,
        };
        remove_stale(path);
        let vsock = Vsock::new(path, GUEST_CID).map_err(failed)?;
        machine.add_virtio("vsock0", Arc::new(vsock))?;
    }
    let console = config
        .virtio_console
        .then(|| Console::new(Box::new(std::io::stdout())))
        .transpose()
        .map_err(MachineError::Event)?
        .map(Arc::new);
    let window = match &console {
        Some(console) => Some(machine.add_virtio("console0", console.clone())?),
        None => None,
    };
    let rsdp = crate::acpi::write(&machine.memory, config.machine.cpus)?;
    let command_line = command_line(&config.append, has_root, initrd.is_some());
    let memory = machine.memory.clone();
    let made = begun.elapsed();
    machine.set_start::<BootError>(|state| {
        place(
            &memory,
            &kernel,
            initrd.as_deref(),
            &command_line,
            rsdp,
            config.protocol,
            state,
        )
    })?;
    let placed = begun.elapsed();
    drop((kernel, initrd));
    let (serial, power, control) = (
        machine.serial.clone(),
        machine.power.clone(),
        machine.control.clone(),
    );
    let terminal = Terminal::open(move |input| match input {
        Input::Bytes(bytes) => match &console {
            Some(console) => console.receive(&bytes),
            None => serial.receive(&bytes),
        },
        Input::Window { columns, rows } => {
            if let (Some(console), Some(window)) = (&console, &window) {
                console.resize(columns, rows);
                window.config_changed();
            }
        }
        Input::Quit => control.end(Outcome::Killed),
        Input::PowerButton => power.press_button(),
        Input::Help => {
            let _ = std::io::stderr().write_all(format!("\r\n{KEYS}\r\n").as_bytes());
        }
    })
    .map_err(BootError::Terminal)?;
    machine.start()?;
    if config.verbose {
        eprintln!(
            "berth: started on {} in {:.1} ms (kernel unpacked {:.1}, machine made {:.1}, kernel placed {:.1})\r",
            machine.vm.name(),
            ms(begun.elapsed()),
            ms(unpacked),
            ms(made - unpacked),
            ms(placed - made),
        );
    }
    let outcome = watch.judge(machine.wait());
    drop(terminal);
    if let Some(path) = &config.vsock {
        let _ = fs::remove_file(path);
    }
    if config.verbose {
        for (name, value) in machine.counters() {
            eprintln!("berth: {name} {value}");
        }
    }
    Ok(outcome)
}

/// Removes a socket on which nobody listens any more, as one leaves that was killed.
fn remove_stale(path: &Path) {
    let refused =
        UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
    if refused && fs::metadata(path).is_ok_and(|about| about.file_type().is_socket()) {
        let _ = fs::remove_file(path);
    }
}

/// The model asked for by name: `max`, `x86-64-v2`, `x86-64-v3`.
pub fn parse_model(text: &str) -> Result<CpuModel, String> {
    match text {
        "max" => Ok(CpuModel::Max),
        "x86-64-v2" => Ok(CpuModel::X86_64V2),
        "x86-64-v3" => Ok(CpuModel::X86_64V3),
        _ => Err(format!(
            "{text:?} is no CPU model: max, x86-64-v2 or x86-64-v3"
        )),
    }
}

/// The choice of CPU by name, for command lines.
pub fn parse_cpu(text: &str) -> Result<CpuChoice, String> {
    text.parse()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_kernel_is_unpacked_and_placed() {
        let vmlinux = elf::tests::kernel(b"code", 0x100_0000);
        let mut payload = zstd::encode_all(&vmlinux[..], 1).unwrap();
        payload.extend((vmlinux.len() as u32).to_le_bytes());
        let file = bzimage::tests::image(&payload);
        let memory = crate::memory::allocate(64 << 20).unwrap();
        for protocol in [Protocol::Linux64, Protocol::Pvh] {
            let kernel = Kernel::parse(file.clone(), protocol).unwrap();
            let mut state = cpu::x86::CpuState::default();
            place(
                &memory,
                &kernel,
                Some(b"initrd"),
                "quiet",
                0xe_0000,
                protocol,
                &mut state,
            )
            .unwrap();
            assert_eq!(state.rip, 0x100_0000);
        }
    }

    #[test]
    fn a_kernel_packed_by_a_method_we_lack_unpacks_itself() {
        let file = bzimage::tests::image(b"BZh9");
        let memory = crate::memory::allocate(64 << 20).unwrap();
        let kernel = Kernel::parse(file, Protocol::Linux64).unwrap();
        let mut state = cpu::x86::CpuState::default();
        place(&memory, &kernel, None, "", 0, Protocol::Linux64, &mut state).unwrap();
        assert_eq!(state.rip, 0x100_0200);
    }

    #[test]
    fn the_users_words_win() {
        assert_eq!(
            command_line("", false, false),
            "console=ttyS0 panic=-1 reboot=a"
        );
        assert_eq!(
            command_line("panic=5 root=/dev/vda", true, false),
            "console=ttyS0 reboot=a panic=5 root=/dev/vda"
        );
        assert_eq!(
            command_line("quiet", true, false),
            "console=ttyS0 panic=-1 reboot=a root=/dev/nvme0n1 rw quiet"
        );
    }

    #[test]
    fn an_initrd_larger_than_memory_is_refused_with_what_to_do() {
        let vmlinux = elf::tests::kernel(b"code", 0x100_0000);
        let memory = crate::memory::allocate(64 << 20).unwrap();
        let kernel = Kernel::parse(vmlinux, Protocol::Linux64).unwrap();
        let mut state = cpu::x86::CpuState::default();
        for len in [60 << 20, 80 << 20] {
            let initrd = vec![0; len];
            let error = place(
                &memory,
                &kernel,
                Some(&initrd),
                "",
                0,
                Protocol::Linux64,
                &mut state,
            )
            .unwrap_err();
            assert_eq!(error.kind(), Kind::Capacity);
            assert!(error.fix().unwrap().contains("--memory"));
            assert!(error.to_string().contains("initrd"), "{error}");
        }
    }

    #[test]
    fn a_disk_is_told_from_its_words() {
        let disk = |text: &str| text.parse::<DiskConfig>().unwrap();
        assert_eq!(disk("a,b"), disk("a,b,nvme"));
        let odd = disk("a,b,virtio,ro");
        assert_eq!(
            (odd.path.to_str(), odd.read_only, odd.bus),
            (Some("a,b"), true, DiskBus::Virtio)
        );
        assert!(",ro".parse::<DiskConfig>().is_err());
    }

    #[test]
    fn a_disks_format_is_said_by_its_name_or_by_a_word_and_never_guessed_against_them() {
        let directory = tempfile::tempdir().unwrap();
        let raw = directory.path().join("a,b.img");
        fs::write(&raw, [0; 512]).unwrap();
        let disk: DiskConfig = format!("{},ro,virtio", raw.display()).parse().unwrap();
        assert!(disk.read_only && disk.bus == DiskBus::Virtio);
        assert!(disk.format == Format::Raw && disk.path == raw);
        let sly = directory.path().join("sly.img");
        fs::write(&sly, b"QFI\xfbxxxxxxxxxxxxxxxx").unwrap();
        let sly = sly.display().to_string();
        let error = sly.parse::<DiskConfig>().unwrap_err();
        assert!(error.contains("format=qcow2"), "{error}");
        let disk: DiskConfig = format!("{sly},format=raw").parse().unwrap();
        assert_eq!(disk.format, Format::Raw);
        assert!(format!("{sly},format=vdi").parse::<DiskConfig>().is_err());
        assert!(",ro".parse::<DiskConfig>().is_err());
    }

    #[test]
    fn a_file_that_is_no_kernel_is_refused() {
        assert!(matches!(
            Kernel::parse(b"hello".to_vec(), Protocol::Linux64),
            Err(BootError::NotAKernel)
        ));
    }
}
