//! Every device driven through its registers and rings, as a guest's driver does it.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use disk::{Disk, RawDisk};
use proptest::prelude::*;

use super::balloon::Balloon;
use super::block::Block;
use super::console::Console;
use super::net::{Net, Port};
use super::queue::tests::{Driver, dma};
use super::rng::Rng;
use super::*;
use crate::devices::test_board::{Recorder, keeps_its_state};
use crate::pci::PciDevice;
use crate::state::Persist;

const DATA: u64 = 0x40_0000;

struct Rig {
    dma: Dma,
    device: Arc<Transport>,
    queues: Vec<Driver>,
}

fn made(backend: Arc<dyn Backend>) -> Rig {
    let dma = dma();
    let device = Transport::new(
        "device0",
        dma.clone(),
        Arc::new(Recorder::default()),
        backend,
    )
    .unwrap();
    Rig {
        dma,
        device,
        queues: Vec::new(),
    }
}

impl Rig {
    fn set(&self, offset: u64, data: &[u8]) {
        self.device.write_bar(0, offset, data);
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.device.read_bar(0, 20, &mut status);
        status[0]
    }

    fn start(&mut self) -> &mut Rig {
        let mut features = [0; 4];
        self.set(20, &[3]);
        for select in 0..2u32 {
            self.set(0, &select.to_le_bytes());
            self.device.read_bar(0, 4, &mut features);
            let mut accepted = u32::from_le_bytes(features);
            if select == 0 {
                // No event index: the test looks at the ring.
                accepted &= !(1 << 29);
            }
            self.set(8, &select.to_le_bytes());
            self.set(12, &accepted.to_le_bytes());
        }
        self.set(20, &[11]);
        assert_eq!(self.status(), 11, "the features are accepted");
        let mut count = [0; 2];
        self.device.read_bar(0, 18, &mut count);
        for index in 0..u16::from_le_bytes(count) {
            let driver = Driver::new(0x1_0000 + u64::from(index) * 0x1000);
            self.set(22, &index.to_le_bytes());
            self.set(24, &16u16.to_le_bytes());
            for (offset, address) in [
                (32, driver.base),
                (40, driver.base + 0x100),
                (48, driver.base + 0x200),
            ] {
                self.set(offset, &(address as u32).to_le_bytes());
                self.set(offset + 4, &[0; 4]);
            }
            self.set(28, &1u16.to_le_bytes());
            self.queues.push(driver);
        }
        self.set(20, &[15]);
        assert_eq!(self.status(), 15);
        self
    }

    fn offer(&mut self, queue: usize, first: u16, buffers: &[(u64, u32, bool)]) {
        self.queues[queue].offer(&self.dma, first, buffers);
        self.set(0x3000 + queue as u64 * 4, &(queue as u16).to_le_bytes());
    }

    /// Waits for the next used chain of a queue; its length.
    fn used(&mut self, queue: usize) -> u32 {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some((_, len)) = self.queues[queue].used(&self.dma) {
                return len;
            }
            assert!(Instant::now() < deadline, "nothing was given back");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.dma.read(address, &mut bytes).unwrap();
        bytes
    }
}

#[test]
fn entropy_fills_a_buffer_and_interrupts_by_the_pin() {
    let mut rig = made(Arc::new(Rng));
    rig.start().offer(0, 0, &[(DATA, 64, true)]);
    assert_eq!(rig.used(0), 64);
    assert_ne!(rig.bytes(DATA, 64), [0; 64]);
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut isr = [0];
    while isr == [0] {
        rig.device.read_bar(0, 0x1000, &mut isr);
        assert!(Instant::now() < deadline);
    }
    assert_eq!(isr, [1]);
}

fn block(len: u64) -> (tempfile::NamedTempFile, Arc<dyn Disk>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    let disk = RawDisk::open(file.path(), false).unwrap();
    (file, Arc::new(disk))
}

fn request(rig: &mut Rig, kind: u32, sector: u64, data: (u64, u32, bool)) -> u8 {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    rig.dma.write(DATA, &header).unwrap();
    rig.dma.write(DATA + 16, &[0xee]).unwrap();
    rig.offer(0, 0, &[(DATA, 16, false), data, (DATA + 16, 1, true)]);
    rig.used(0);
    rig.bytes(DATA + 16, 1)[0]
}

#[test]
fn a_disk_reads_writes_flushes_and_refuses() {
    let (_file, disk) = block(1 << 20);
    let mut rig = made(Arc::new(Block::new(disk.clone(), 2, "serial").unwrap()));
    rig.start();
    rig.dma.write(DATA + 0x1000, &[7; 1024]).unwrap();
    assert_eq!(request(&mut rig, 1, 9, (DATA + 0x1000, 1024, false)), 0);
    assert_eq!(request(&mut rig, 0, 10, (DATA + 0x2000, 512, true)), 0);
    assert_eq!(rig.bytes(DATA + 0x2000, 512), [7; 512]);
    assert_eq!(request(&mut rig, 4, 0, (DATA + 0x2000, 1, true)), 0);
    assert_eq!(request(&mut rig, 8, 0, (DATA + 0x3000, 20, true)), 0);
    assert_eq!(&rig.bytes(DATA + 0x3000, 6), b"serial");
    let mut range = 9u64.to_le_bytes().to_vec();
    range.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    rig.dma.write(DATA + 0x1000, &range).unwrap();
    assert_eq!(request(&mut rig, 13, 0, (DATA + 0x1000, 16, false)), 0);
    let mut sector = [1; 512];
    disk.read_at(9 * 512, &mut sector).unwrap();
    assert_eq!(sector, [0; 512]);
    for (kind, sector, len) in [(0, 2048, 512), (0, u64::MAX, 512), (0, 0, 100), (99, 0, 1)] {
        assert_ne!(
            request(&mut rig, kind, sector, (DATA + 0x2000, len, true)),
            0,
            "{kind} {sector}"
        );
    }
}

#[test]
fn frames_go_out_and_come_in_and_wait_for_buffers() {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    let port = Port::datagrams(OwnedFd::from(ours)).unwrap();
    let mut rig = made(Arc::new(Net::new(port, [2, 0, 0, 0, 0, 1], 1500)));
    rig.start();
    theirs.send(b"before any buffer").unwrap();
    rig.dma.write(DATA, &[0; 12]).unwrap();
    rig.dma.write(DATA + 12, b"a frame of the guest").unwrap();
    rig.offer(1, 0, &[(DATA, 32, false)]);
    rig.used(1);
    let mut frame = [0; 64];
    let len = theirs.recv(&mut frame).unwrap();
    assert_eq!(&frame[..len], b"a frame of the guest");
    rig.offer(0, 0, &[(DATA + 0x1000, 20, true)]);
    rig.offer(0, 1, &[(DATA + 0x2000, 200, true)]);
    assert_eq!(
        (rig.used(0), rig.used(0)),
        (20, 9),
        "merged over two buffers"
    );
    assert_eq!(&rig.bytes(DATA + 0x100a, 10), b"\x02\x00before a");
    assert_eq!(&rig.bytes(DATA + 0x2000, 9), b"ny buffer");
    let mut mac = [0; 6];
    rig.device.read_bar(0, 0x2000, &mut mac);
    assert_eq!(mac, [2, 0, 0, 0, 0, 1]);
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

#[test]
fn a_console_carries_both_ways() {
    let sink = Sink::default();
    let console = Arc::new(Console::new(Box::new(sink.clone())).unwrap());
    let mut rig = made(console.clone());
    rig.start();
    rig.dma.write(DATA, b"login: ").unwrap();
    rig.offer(1, 0, &[(DATA, 7, false)]);
    rig.used(1);
    let deadline = Instant::now() + Duration::from_secs(10);
    while &*sink.0.lock().unwrap() != b"login: " {
        assert!(Instant::now() < deadline, "the output came not out");
        std::thread::yield_now();
    }
    console.receive(b"root\n");
    rig.offer(0, 0, &[(DATA + 0x100, 64, true)]);
    assert_eq!(rig.used(0), 5);
    assert_eq!(&rig.bytes(DATA + 0x100, 5), b"root\n");
}

#[test]
fn a_host_program_talks_to_a_port_of_the_guest() {
    use std::io::{BufRead, BufReader, Read};
    use std::os::unix::net::{UnixListener, UnixStream};

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    let vsock = super::vsock::Vsock::new(&path, 3).unwrap();
    let mut rig = made(Arc::new(vsock));
    rig.start();
    for buffer in 0..6 {
        rig.offer(
            0,
            buffer,
            &[(DATA + u64::from(buffer) * 0x1000, 0x1000, true)],
        );
    }
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"CONNECT 77\nhello").unwrap();
    assert_eq!(rig.used(0), 44);
    let request = rig.bytes(DATA, 44);
    assert_eq!((request[30], request[20]), (1, 77));
    let ours = request[16..20].to_vec();
    let mut sent = 0u16;
    let mut send_to = |rig: &mut Rig, to: &[u8], operation: u8, flags: u8, data: &[u8]| {
        let mut packet = vec![0; 44];
        packet[0] = 3;
        packet[8] = 2;
        packet[16] = 77;
        packet[20..24].copy_from_slice(to);
        packet[24] = data.len() as u8;
        packet[28] = 1;
        packet[30] = operation;
        packet[32] = flags;
        packet[37] = 0x10;
        packet.extend(data);
        rig.dma.write(DATA + 0x8000, &packet).unwrap();
        rig.offer(1, sent % 16, &[(DATA + 0x8000, packet.len() as u32, false)]);
        rig.used(1);
        sent += 1;
    };
    let mut send =
        |rig: &mut Rig, operation, flags, data: &[u8]| send_to(rig, &ours, operation, flags, data);
    send(&mut rig, 2, 0, b"");
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with("OK "), "{line}");
    assert_eq!(rig.used(0), 49);
    assert_eq!(&rig.bytes(DATA + 0x1000 + 44, 5), b"hello");
    send(&mut rig, 5, 0, b"world");
    let mut word = [0; 5];
    reader.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"world");
    assert_eq!(rig.used(0), 44, "credit");
    send(&mut rig, 4, 3, b"");
    assert_eq!(reader.read(&mut word).unwrap(), 0);
    assert_eq!(
        (rig.used(0), rig.bytes(DATA + 0x3000 + 30, 1)[0]),
        (44, 3),
        "a connection that both sides have ended is reset"
    );
    // The guest's own connections reach what listens on the host, and are refused where nothing does.
    let port = 52u32.to_le_bytes();
    send_to(&mut rig, &port, 1, 0, b"");
    assert_eq!((rig.used(0), rig.bytes(DATA + 0x4000 + 30, 1)[0]), (44, 3));
    let service = UnixListener::bind(directory.path().join("vsock_52")).unwrap();
    send_to(&mut rig, &port, 1, 0, b"");
    assert_eq!((rig.used(0), rig.bytes(DATA + 0x5000 + 30, 1)[0]), (44, 2));
    let (mut accepted, _) = service.accept().unwrap();
    send_to(&mut rig, &port, 5, 0, b"hello");
    accepted.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"hello");
}

#[test]
fn ballooned_pages_are_dropped() {
    let balloon = Arc::new(Balloon::new().unwrap());
    let mut rig = made(balloon.clone());
    rig.start();
    rig.dma.write(0x50_0000, &[9; 8192]).unwrap();
    rig.dma
        .write(
            DATA,
            &[0x500u32.to_le_bytes(), 0x501u32.to_le_bytes()].concat(),
        )
        .unwrap();
    rig.offer(0, 0, &[(DATA, 8, false)]);
    rig.used(0);
    assert_eq!(rig.bytes(0x50_0000, 8192), [0; 8192]);
    rig.dma.write(0x60_0000, &[9; 4096]).unwrap();
    rig.offer(3, 0, &[(0x60_0000, 4096, true)]);
    rig.used(3);
    assert_eq!(balloon.figures().1, 3 * 4096);
    // Pages the guest does not have are its own mistake.
    rig.dma.write(DATA, &u32::MAX.to_le_bytes()).unwrap();
    rig.offer(0, 3, &[(DATA, 4, false)]);
    rig.used(0);
    rig.offer(3, 3, &[(u64::MAX - 7, 4, true)]);
    rig.used(3);
}

#[test]
fn a_guest_tells_of_its_memory_when_asked() {
    let balloon = Arc::new(Balloon::new().unwrap());
    let mut rig = made(balloon.clone());
    rig.start();
    let tell = |rig: &mut Rig, free: u64| {
        let mut list = vec![4, 0];
        list.extend(free.to_le_bytes());
        list.extend([5, 0]);
        list.extend(u64::MAX.to_le_bytes());
        rig.dma.write(DATA, &list).unwrap();
        rig.offer(2, 0, &[(DATA, 20, false)]);
        let deadline = Instant::now() + Duration::from_secs(10);
        while balloon.statistics().free != Some(free) {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
    };
    tell(&mut rig, 77);
    assert_eq!(balloon.statistics().total, None);
    assert_eq!(rig.queues[2].used(&rig.dma), None, "the buffer is kept");
    balloon.refresh();
    assert_eq!(rig.used(2), 0);
    tell(&mut rig, 78);
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_a_reset_helps() {
    let mut rig = made(Arc::new(Rng));
    rig.start();
    rig.queues[0].announce(&rig.dma, 77);
    rig.set(0x3000, &[0, 0]);
    let deadline = Instant::now() + Duration::from_secs(10);
    while rig.status() & 64 == 0 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_micros(100));
    }
    rig.set(20, &[0]);
    assert_eq!(rig.status(), 0);
    rig.dma.write(0x1_0000, &[0; 0x1000]).unwrap();
    rig.queues.clear();
    rig.start().offer(0, 0, &[(DATA, 8, true)]);
    assert_eq!(rig.used(0), 8);
}

#[test]
fn every_device_keeps_its_state() {
    let (_file, disk) = block(1 << 20);
    let net = || {
        let (ours, _) = UnixDatagram::pair().unwrap();
        Net::new(Port::datagrams(OwnedFd::from(ours)).unwrap(), [2; 6], 1500)
    };
    let console = || Console::new(Box::new(Sink::default())).unwrap();
    let pairs: Vec<[Arc<dyn Backend>; 2]> = vec![
        [Arc::new(Rng), Arc::new(Rng)],
        [
            Arc::new(Block::new(disk.clone(), 2, "x").unwrap()),
            Arc::new(Block::new(disk, 2, "x").unwrap()),
        ],
        [Arc::new(net()), Arc::new(net())],
        [Arc::new(console()), Arc::new(console())],
        [
            Arc::new(Balloon::new().unwrap()),
            Arc::new(Balloon::new().unwrap()),
        ],
    ];
    for [used, fresh] in pairs {
        let mut rig = made(used);
        rig.start();
        rig.device.quiesce();
        keeps_its_state(&*rig.device, &*made(fresh).device);
    }
}

#[test]
fn nothing_moves_while_quiet_and_everything_after() {
    let mut rig = made(Arc::new(Rng));
    rig.start();
    rig.device.quiesce();
    rig.offer(0, 0, &[(DATA, 8, true)]);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(rig.queues[0].used(&rig.dma), None);
    rig.device.wake();
    assert_eq!(rig.used(0), 8);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn no_register_access_panics(accesses in prop::collection::vec((0u64..0x3010, 0u32..4, any::<u64>()), 0..100)) {
        let rig = made(Arc::new(Rng));
        for (offset, size, value) in accesses {
            let len = 1usize << size;
            // Mostly the common configuration, where the meaning is.
            let offset = if value & 3 == 0 { offset } else { offset % 64 };
            rig.set(offset, &value.to_le_bytes()[..len]);
            rig.device.read_bar(0, offset, &mut [0; 8][..len]);
        }
    }
}
