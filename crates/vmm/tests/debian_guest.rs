//! Debian's own kernels, unmodified, with every device, on the software CPU.
//!
//! They need the kernels that `scripts/guest-kernel` fetches into `build/guest` (`make test` does), busybox-static, and for
//! vsock gcc.

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use disk::{Disk, RawDisk};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm::boot::{BootError, Kernel, Protocol, command_line, place};
use vmm::control::Outcome;
use vmm::machine::{CpuChoice, Machine, MachineConfig};
use vmm::virtio::balloon::Balloon;
use vmm::virtio::block::Block;
use vmm::virtio::rng::Rng;
use vmm::virtio::vsock::Vsock;

const CLOUD: &str = "linux-image-cloud-amd64";
/// In the order in which they are loaded.
const MODULES: [&str; 27] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_balloon",
    "virtio_console",
    "rng-core",
    "virtio-rng",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
    "pvpanic",
    "pvpanic-mmio",
    "crct10dif_common",
    "crc-t10dif",
    "crc64",
    "crc64-rocksoft",
    "t10-pi",
    "nvme-core",
    "nvme",
    "crc16",
    "crc32c_generic",
    "mbcache",
    "jbd2",
    "ext4",
];
const WAIT: Duration = Duration::from_secs(120);

const SETUP: &str = r#"#!/bin/sh
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev; mount -t tmpfs none /tmp
for module in /modules/*.ko; do insmod $module || echo "no $module"; done
check() { if "$@"; then echo "PASS $*"; else echo "FAIL $*"; fi }
"#;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn find(folder: &Path, name: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
    let mut entries: Vec<_> = std::fs::read_dir(folder)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    entries.sort();
    entries.into_iter().find_map(|path| {
        if path.is_dir() && !path.is_symlink() {
            find(&path, name)
        } else {
            name(path.file_name()?.to_str()?).then_some(path)
        }
    })
}

/// The kernel of a package, or a word that the test is skipped.
fn kernel(package: &str) -> Option<PathBuf> {
    let folder = root().join("build/guest").join(package);
    let found = find(&folder, &|name| name.starts_with("vmlinuz-"));
    if found.is_none() {
        eprintln!("SKIPPED: no {package}; scripts/guest-kernel build/guest {package} fetches it");
    }
    found
}

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Guest {
    machine: Machine,
    sink: Sink,
    folder: tempfile::TempDir,
}

impl Guest {
    /// A machine for `package`'s kernel that runs `script` after its modules are loaded. `None` where something it needs
    /// is missing.
    fn new(
        package: &str,
        cpus: u32,
        protocol: Protocol,
        script: &str,
        programs: &[(&str, &Path)],
        devices: impl FnOnce(&mut Machine, &Path),
    ) -> Option<Guest> {
        let kernel_file = kernel(package)?;
        let folder = tempfile::tempdir().unwrap();
        let init = folder.path().join("init");
        std::fs::write(&init, format!("{SETUP}{script}\npoweroff -f\n")).unwrap();
        let initrd = folder.path().join("initrd");
        let modules = kernel_file.parent()?.parent()?.join("lib/modules");
        let mut command = Command::new(root().join("scripts/guest-initrd"));
        command.arg(&initrd).arg(&init);
        for (place, module) in MODULES.iter().enumerate() {
            if let Some(file) = find(&modules, &|name| name == format!("{module}.ko")) {
                command.arg(format!("modules/{place:02}.ko={}", file.display()));
            }
        }
        for (name, file) in programs {
            command.arg(format!("bin/{name}={}", file.display()));
        }
        let made = command.output().unwrap();
        if !made.status.success() {
            eprintln!("SKIPPED: {}", String::from_utf8_lossy(&made.stderr));
            return None;
        }
        let sink = Sink::default();
        let config = MachineConfig {
            cpus,
            memory: 512 << 20,
            cpu: CpuChoice::Soft,
            ..MachineConfig::default()
        };
        let mut machine = Machine::new(config, Box::new(sink.clone())).unwrap();
        devices(&mut machine, folder.path());
        let kernel = Kernel::open(&kernel_file, protocol).unwrap();
        let initrd = std::fs::read(&initrd).unwrap();
        let rsdp = vmm::acpi::write(&machine.memory, cpus).unwrap();
        let memory = machine.memory.clone();
        machine
            .set_start::<BootError>(|state| {
                let words = command_line("quiet", false, true);
                place(
                    &memory,
                    &kernel,
                    Some(&initrd),
                    &words,
                    rsdp,
                    protocol,
                    state,
                )
            })
            .unwrap();
        machine.start().unwrap();
        Some(Guest {
            machine,
            sink,
            folder,
        })
    }

    fn output(&self) -> String {
        String::from_utf8_lossy(&self.sink.0.lock().unwrap()).into_owned()
    }

    fn wait_for(&self, word: &str) {
        let deadline = Instant::now() + WAIT;
        while !self.output().contains(word) {
            assert!(
                Instant::now() < deadline && self.machine.control.outcome().is_none(),
                "no {word:?} came:\n{}",
                self.output()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn type_line(&self, line: &str) {
        self.machine.serial.receive(format!("{line}\n").as_bytes());
    }

    /// Waits for the power-off; every check of the script must have passed, `count` of them.
    fn passes(mut self, count: usize) -> tempfile::TempDir {
        let outcome = self.machine.control.wait_for_end_until(WAIT);
        let output = self.output();
        assert_eq!(outcome, Some(Outcome::PowerOff), "{output}");
        self.machine.wait();
        assert!(!output.contains("FAIL"), "{output}");
        assert_eq!(output.matches("PASS").count(), count, "{output}");
        self.folder
    }
}

fn disk(folder: &Path, name: &str, mib: u64) -> Arc<dyn Disk> {
    let path = folder.join(name);
    std::fs::File::create(&path)
        .unwrap()
        .set_len(mib << 20)
        .unwrap();
    Arc::new(RawDisk::open(&path, false).unwrap())
}

/// Both disks: a file system made, filled, read back after the caches were dropped, its free space given back, and queues
/// for each CPU.
const DISKS: &str = r#"
for disk in nvme0n1 vda; do
  check [ $(ls /sys/block/$disk/mq | wc -l) -eq 2 ]
  check mke2fs -q /dev/$disk
  mount -o discard /dev/$disk /mnt || mount /dev/$disk /mnt
  dd if=/dev/urandom of=/mnt/file bs=64k count=512 2>/dev/null
  sum=$(md5sum </mnt/file); sync; umount /mnt
  echo 3 >/proc/sys/vm/drop_caches
  mount -o discard /dev/$disk /mnt || mount /dev/$disk /mnt
  check [ "$sum" = "$(md5sum </mnt/file)" ]
  for n in 1 2 3 4; do (for m in 1 2 3 4 5 6 7 8; do dd if=/mnt/file of=/dev/null bs=4k skip=$((n * 1000)) count=500 iflag=direct 2>/dev/null; done) & done; wait
  dd if=/mnt/file of=/mnt/copy bs=4k count=256 oflag=direct conv=fsync 2>/dev/null
  check cmp -n 1048576 /mnt/file /mnt/copy
  check fstrim /mnt
  umount /mnt
  echo "USED-$disk"; sync; read line
  check blkdiscard /dev/$disk
done
"#;

fn disks_work_with(package: &str, protocol: Protocol) {
    let guest = Guest::new(package, 2, protocol, DISKS, &[], |machine, folder| {
        machine.add_nvme(vec![disk(folder, "nvme", 64)], 7).unwrap();
        let block = Block::new(disk(folder, "virtio", 64), 2, "disk1").unwrap();
        machine.add_virtio("disk1", Arc::new(block)).unwrap();
        machine.add_virtio("rng0", Arc::new(Rng)).unwrap();
    });
    let Some(guest) = guest else { return };
    let used = |name: &str| {
        let meta = std::fs::metadata(guest.folder.path().join(name)).unwrap();
        meta.blocks() * 512
    };
    for (disk, file) in [("nvme0n1", "nvme"), ("vda", "virtio")] {
        guest.wait_for(&format!("USED-{disk}"));
        assert!(used(file) > 30 << 20, "{file} holds {} bytes", used(file));
        guest.type_line("");
    }
    let folder = guest.passes(12);
    for file in ["nvme", "virtio"] {
        let meta = std::fs::metadata(folder.path().join(file)).unwrap();
        assert!(
            meta.blocks() * 512 < 1 << 20,
            "a discard gives the host its space back: {} bytes are used",
            meta.blocks() * 512
        );
    }
}

#[test]
fn the_cloud_kernel_uses_nvme_and_virtio_disks() {
    disks_work_with(CLOUD, Protocol::Linux64);
}

#[test]
fn the_generic_kernel_boots_through_pvh_and_uses_nvme_and_virtio_disks() {
    disks_work_with("linux-image-amd64", Protocol::Pvh);
}

#[test]
fn the_cloud_kernel_unpacks_itself_where_asked() {
    let script = "check [ -c /dev/rtc0 ]\ncheck hwclock -r -u";
    if let Some(guest) = Guest::new(CLOUD, 1, Protocol::BzImage, script, &[], |_, _| {}) {
        guest.passes(2);
    }
}

#[test]
fn a_virtio_disk_grows_while_the_guest_uses_it() {
    let script = r#"
check [ $(cat /sys/block/vda/size) = 131072 ]
echo SMALL; until [ $(cat /sys/block/vda/size) = 196608 ]; do sleep 0.1; done
check dd if=/dev/urandom of=/dev/vda bs=1M seek=90 count=1 oflag=direct
check sync
"#;
    let mut parts = None;
    let Some(guest) = Guest::new(
        CLOUD,
        1,
        Protocol::Linux64,
        script,
        &[],
        |machine, folder| {
            let block = Arc::new(Block::new(disk(folder, "virtio", 64), 1, "disk0").unwrap());
            let transport = machine.add_virtio("disk0", block.clone()).unwrap();
            parts = Some((block, transport));
        },
    ) else {
        return;
    };
    let (block, transport) = parts.unwrap();
    guest.wait_for("SMALL");
    let refused = block.grow(32 << 20).unwrap_err();
    assert!(refused.contains("cannot be made smaller"), "{refused}");
    block.grow(96 << 20).unwrap();
    transport.config_changed();
    let folder = guest.passes(3);
    let file = std::fs::read(folder.path().join("virtio")).unwrap();
    assert_eq!(file.len(), 96 << 20);
    assert!(file[90 << 20..91 << 20].iter().any(|byte| *byte != 0));
}

/// Bytes of the guest's memory that the host holds.
fn resident(machine: &Machine) -> u64 {
    machine
        .memory
        .iter()
        .map(|region| {
            let start = region
                .get_host_address(vm_memory::MemoryRegionAddress(0))
                .unwrap();
            let mut pages = vec![0u8; (region.len() / 4096) as usize];
            // SAFETY: the range is one whole mapping of the machine, and the vector has a byte for each of its pages.
            let result =
                unsafe { libc::mincore(start.cast(), region.len() as usize, pages.as_mut_ptr()) };
            assert_eq!(result, 0);
            pages
                .iter()
                .map(|page| u64::from(page & 1) * 4096)
                .sum::<u64>()
        })
        .sum()
}

#[test]
fn memory_that_the_guest_frees_comes_back_to_the_host() {
    let script = r#"
dd if=/dev/zero of=/tmp/file bs=1M count=200 2>/dev/null
echo FILLED; read line; rm /tmp/file; echo FREED; read line
echo TOLD; read line
check [ $(awk '/MemFree/ { print int($2 / 1024) }' /proc/meminfo) -gt 300 ]
"#;
    let balloon = Arc::new(Balloon::new().unwrap());
    let (given, mut transport) = (balloon.clone(), None);
    let Some(guest) = Guest::new(CLOUD, 1, Protocol::Linux64, script, &[], |machine, _| {
        transport = Some(machine.add_virtio("balloon0", given).unwrap());
    }) else {
        return;
    };
    let until = |what: &str, done: &dyn Fn() -> bool| {
        let deadline = Instant::now() + WAIT;
        while !done() {
            assert!(Instant::now() < deadline, "{what}: {:?}", balloon.figures());
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    guest.wait_for("FILLED");
    let full = resident(&guest.machine);
    assert!(full > 200 << 20, "{full}");
    guest.type_line("");
    guest.wait_for("FREED");
    until("free pages are reported", &|| {
        resident(&guest.machine) < full - (150 << 20)
    });
    balloon.refresh();
    until("statistics are told", &|| {
        balloon.statistics().total.is_some()
    });
    let total = balloon.statistics().total.unwrap();
    assert!((300 << 20..512 << 20).contains(&total), "{total}");
    let transport = transport.unwrap();
    balloon.want(100 << 20);
    transport.config_changed();
    until("the balloon is filled", &|| {
        balloon.figures().0 == 100 << 20
    });
    guest.type_line("");
    guest.wait_for("TOLD");
    balloon.want(0);
    transport.config_changed();
    until("the balloon is emptied", &|| balloon.figures().0 == 0);
    guest.type_line("");
    guest.passes(1);
}

#[test]
fn host_and_guest_reach_each_other_by_vsock() {
    let tools = tempfile::tempdir().unwrap();
    let program = tools.path().join("vsock");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/vsock.c");
    let built = Command::new("gcc")
        .args(["-O1", "-static", "-o"])
        .args([&program, &source])
        .status();
    if !built.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: gcc and static libc are needed for the guest's program");
        return;
    }
    let script = r#"
vsock listen 77
check [ "$(vsock connect 52 word)" = "ANSWER from the host: word" ]
if vsock connect 53 word; then echo FAIL; fi
"#;
    let programs = [("vsock", program.as_path())];
    let Some(guest) = Guest::new(
        CLOUD,
        1,
        Protocol::Linux64,
        script,
        &programs,
        |machine, folder| {
            let vsock = Vsock::new(&folder.join("socket"), 3).unwrap();
            machine.add_virtio("vsock0", Arc::new(vsock)).unwrap();
        },
    ) else {
        return;
    };
    let listener = UnixListener::bind(guest.folder.path().join("socket_52")).unwrap();
    guest.wait_for("LISTENING");
    let mut stream = UnixStream::connect(guest.folder.path().join("socket")).unwrap();
    stream.write_all(b"CONNECT 77\n").unwrap();
    let mut byte = [0];
    let mut line = Vec::new();
    while byte != *b"\n" {
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    assert!(line.starts_with(b"OK "), "{line:?}");
    // More than the windows of either side hold.
    let sent: Vec<u8> = (0..3_000_000u32).map(|n| b'a' + (n % 26) as u8).collect();
    let mut writer = stream.try_clone().unwrap();
    let copy = sent.clone();
    let writing = std::thread::spawn(move || {
        writer.write_all(&copy).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut came = Vec::new();
    stream.read_to_end(&mut came).unwrap();
    writing.join().unwrap();
    assert!(came == sent.to_ascii_uppercase(), "{} bytes", came.len());
    let (mut accepted, _) = listener.accept().unwrap();
    let mut word = String::new();
    accepted.read_to_string(&mut word).unwrap();
    accepted
        .write_all(format!("from the host: {word}").as_bytes())
        .unwrap();
    drop(accepted);
    guest.passes(1);
}

#[test]
fn a_panic_of_the_kernel_is_a_crash_of_the_machine() {
    let script = "echo READY; read line; echo c >/proc/sysrq-trigger";
    let Some(mut guest) = Guest::new(CLOUD, 1, Protocol::Linux64, script, &[], |_, _| {}) else {
        return;
    };
    guest.wait_for("READY");
    guest.type_line("");
    let outcome = guest.machine.control.wait_for_end_until(WAIT);
    assert!(
        matches!(&outcome, Some(Outcome::Crash(why)) if why.contains("panic")),
        "{outcome:?}\n{}",
        guest.output()
    );
    guest.machine.wait();
}

#[test]
fn a_disk_that_the_host_cannot_write_fails_in_the_guest_and_nowhere_else() {
    // A device of the host that is always full takes the place of a full host disk.
    let script = r#"
if dd if=/dev/zero of=/dev/nvme0n1 bs=4k count=1 conv=fsync 2>/dev/null; then echo FAIL nvme; else echo PASS; fi
if dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync 2>/dev/null; then echo FAIL virtio; else echo PASS; fi
check dd if=/dev/nvme0n1 of=/dev/null bs=4k count=1
check dd if=/dev/vda of=/dev/null bs=4k count=1
"#;
    let Some(guest) = Guest::new(CLOUD, 1, Protocol::Linux64, script, &[], |machine, _| {
        machine.add_nvme(vec![Arc::new(Full)], 7).unwrap();
        let block = Block::new(Arc::new(Full), 1, "disk1").unwrap();
        machine.add_virtio("disk1", Arc::new(block)).unwrap();
    }) else {
        return;
    };
    guest.passes(4);
}

/// A disk without room: it reads as zeros and takes no write.
struct Full;

fn full() -> disk::DiskError {
    disk::DiskError::Io {
        what: "writing",
        offset: 0,
        len: 0,
        source: std::io::Error::from(std::io::ErrorKind::StorageFull),
    }
}

impl Disk for Full {
    fn len(&self) -> u64 {
        8 << 20
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, _: u64, data: &mut [u8]) -> Result<(), disk::DiskError> {
        data.fill(0);
        Ok(())
    }
    fn write_at(&self, _: u64, _: &[u8]) -> Result<(), disk::DiskError> {
        Err(full())
    }
    fn flush(&self) -> Result<(), disk::DiskError> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), disk::DiskError> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64) -> Result<(), disk::DiskError> {
        Err(full())
    }
    fn grow(&self, _: u64) -> Result<(), disk::DiskError> {
        Err(full())
    }
}
