//! The controller as a guest's driver drives it, and as a hostile one does.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::devices::test_board::{Recorder, keeps_its_state};

const ASQ: u64 = 0x10_0000;
const ACQ: u64 = 0x10_1000;
const SQ: u64 = 0x10_2000;
const CQ: u64 = 0x10_3000;
const DATA: u64 = 0x20_0000;

struct Rig {
    vm: Arc<Recorder>,
    dma: Dma,
    controller: Arc<Controller>,
    disk: Arc<dyn Disk>,
    tails: [u32; 2],
    heads: [u32; 2],
    _file: tempfile::NamedTempFile,
}

fn rig() -> Rig {
    let vm = Arc::new(Recorder::default());
    let dma = Dma::new(
        Arc::new(crate::memory::allocate(16 << 20).unwrap()),
        vm.clone(),
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4 << 20).unwrap();
    let disk: Arc<dyn Disk> = Arc::new(disk::RawDisk::open(file.path(), false).unwrap());
    let controller =
        Controller::new("nvme0", dma.clone(), vm.clone(), vec![disk.clone()], 2, 7).unwrap();
    Rig {
        vm,
        dma,
        controller,
        disk,
        tails: [0; 2],
        heads: [0; 2],
        _file: file,
    }
}

impl Rig {
    fn set(&self, offset: u64, value: u32) {
        self.controller.write_bar(0, offset, &value.to_le_bytes());
    }

    fn status(&self) -> u32 {
        let mut word = [0; 4];
        self.controller.read_bar(0, 0x1c, &mut word);
        u32::from_le_bytes(word)
    }

    fn enable(&mut self) {
        self.set(0x24, 0x001f_001f);
        self.controller.write_bar(0, 0x28, &ASQ.to_le_bytes());
        self.controller.write_bar(0, 0x30, &ACQ.to_le_bytes());
        self.set(0x14, 0x0046_0001);
        assert_eq!(self.status(), 1);
    }

    fn submit(&mut self, queue: usize, opcode: u8, namespace: u32, prp: [u64; 2], words: [u32; 6]) {
        let base = [ASQ, SQ][queue];
        let mut entry = [0u8; 64];
        entry[0] = opcode;
        entry[2] = self.tails[queue] as u8;
        entry[4..8].copy_from_slice(&namespace.to_le_bytes());
        entry[24..32].copy_from_slice(&prp[0].to_le_bytes());
        entry[32..40].copy_from_slice(&prp[1].to_le_bytes());
        for (index, word) in words.iter().enumerate() {
            entry[40 + index * 4..44 + index * 4].copy_from_slice(&word.to_le_bytes());
        }
        self.dma
            .write(base + u64::from(self.tails[queue]) * 64, &entry)
            .unwrap();
        self.tails[queue] = (self.tails[queue] + 1) % 32;
        self.set(DOORBELLS + queue as u64 * 8, self.tails[queue]);
    }

    /// The next completion: status and result. The queue has 32 entries and the test uses it less than once around.
    fn completed(&mut self, queue: usize) -> (u16, u32) {
        let base = [ACQ, CQ][queue] + u64::from(self.heads[queue]) * 16;
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let word = self.dma.read_u32(base + 12).unwrap();
            if word >> 16 & 1 == 1 {
                self.heads[queue] += 1;
                self.set(DOORBELLS + queue as u64 * 8 + 4, self.heads[queue]);
                return (
                    (word >> 17) as u16 & 0x7ff,
                    self.dma.read_u32(base).unwrap(),
                );
            }
            assert!(Instant::now() < deadline, "no completion came");
            std::thread::yield_now();
        }
    }

    fn admin(&mut self, opcode: u8, namespace: u32, prp: u64, words: [u32; 6]) -> (u16, u32) {
        self.submit(0, opcode, namespace, [prp, 0], words);
        self.completed(0)
    }

    fn with_io(&mut self) {
        self.enable();
        assert_eq!(
            self.admin(0x05, 0, CQ, [31 << 16 | 1, 1 << 16 | 3, 0, 0, 0, 0])
                .0,
            0
        );
        assert_eq!(
            self.admin(0x01, 0, SQ, [31 << 16 | 1, 1 << 16 | 1, 0, 0, 0, 0])
                .0,
            0
        );
    }

    fn io(&mut self, opcode: u8, prp: [u64; 2], words: [u32; 6]) -> u16 {
        self.submit(1, opcode, 1, prp, words);
        self.completed(1).0
    }
}

#[test]
fn a_driver_identifies_makes_queues_writes_and_reads_back() {
    let mut rig = rig();
    rig.with_io();
    assert_eq!(rig.admin(0x06, 0, DATA, [1, 0, 0, 0, 0, 0]).0, 0);
    let mut model = [0; 5];
    rig.dma.read(DATA + 24, &mut model).unwrap();
    assert_eq!(&model, b"Berth");
    assert_eq!(rig.admin(0x06, 1, DATA, [0; 6]).0, 0);
    assert_eq!(
        rig.dma.read_u32(DATA).unwrap(),
        8192,
        "4 MiB are 8192 blocks"
    );
    let content: Vec<u8> = (0..8192u32).map(|n| (n * 7) as u8).collect();
    rig.dma.write(DATA, &content).unwrap();
    assert_eq!(rig.io(1, [DATA, DATA + 4096], [100, 0, 15, 0, 0, 0]), 0);
    assert_eq!(
        rig.io(2, [DATA + 0x1_0200, DATA + 0x2_0000], [108, 0, 7, 0, 0, 0]),
        0
    );
    let mut back = vec![0; 3584];
    rig.dma.read(DATA + 0x1_0200, &mut back).unwrap();
    assert_eq!(back, content[4096..4096 + 3584]);
    rig.dma.read(DATA + 0x2_0000, &mut back[..512]).unwrap();
    assert_eq!(back[..512], content[7680..]);
    assert_eq!(rig.io(0, [0; 2], [0; 6]), 0);
    assert_eq!(rig.io(8, [0; 2], [100, 0, 15, 0, 0, 0]), 0);
    let mut zeros = vec![1; 8192];
    rig.disk.read_at(51200, &mut zeros).unwrap();
    assert!(zeros.iter().all(|byte| *byte == 0));
    let mut range = [0u8; 16];
    range[4] = 8;
    rig.dma.write(DATA, &range).unwrap();
    assert_eq!(rig.io(9, [DATA, 0], [0, 4, 0, 0, 0, 0]), 0);
}

#[test]
fn what_a_driver_may_not_ask_is_refused() {
    let mut rig = rig();
    rig.with_io();
    assert_eq!(rig.io(2, [DATA, 0], [8192, 0, 0, 0, 0, 0]), 0x80);
    assert_eq!(rig.io(2, [DATA, 0], [u32::MAX, u32::MAX, 0, 0, 0, 0]), 0x80);
    assert_eq!(rig.io(2, [1 << 40, 0], [0; 6]), 0x04);
    assert_eq!(
        rig.io(2, [DATA, 0], [0, 0, 2047, 0, 0, 0]),
        0x02,
        "larger than the largest transfer"
    );
    assert_eq!(rig.io(0x55, [0; 2], [0; 6]), 0x01);
    rig.submit(1, 2, 2, [DATA, 0], [0; 6]);
    assert_eq!(rig.completed(1).0, 0x0b);
    assert_eq!(
        rig.admin(0x05, 0, CQ, [31 << 16 | 1, 3, 0, 0, 0, 0]).0,
        0x101,
        "the number is taken"
    );
    assert_eq!(
        rig.admin(0x05, 0, CQ, [31 << 16 | 9, 3, 0, 0, 0, 0]).0,
        0x101
    );
    assert_eq!(rig.admin(0x05, 0, CQ, [2, 3, 0, 0, 0, 0]).0, 0x102);
    assert_eq!(
        rig.admin(0x05, 0, CQ, [31 << 16 | 2, 99 << 16 | 3, 0, 0, 0, 0])
            .0,
        0x108
    );
    assert_eq!(
        rig.admin(0x04, 0, 0, [1, 0, 0, 0, 0, 0]).0,
        0x10c,
        "a submission queue still uses it"
    );
    assert_eq!(
        rig.admin(0x09, 0, 0, [7, 0x003f_003f, 0, 0, 0, 0]),
        (0, 0x0001_0001)
    );
}

#[test]
fn completions_wait_for_room_and_a_reset_ends_everything() {
    let mut rig = rig();
    rig.with_io();
    for _ in 0..3 {
        // 31 commands fill the submission queue; the completion queue of as many entries holds 31 of them.
        for _ in 0..10 {
            rig.submit(1, 0, 1, [0; 2], [0; 6]);
        }
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while rig.dma.read_u32(CQ + 29 * 16 + 12).unwrap() >> 16 & 1 == 0 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    rig.set(0x14, 0x0046_0000);
    let deadline = Instant::now() + Duration::from_secs(10);
    while rig.status() != 0 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    rig.tails = [0; 2];
    rig.heads = [0; 2];
    rig.dma.write(ACQ, &[0; 4096]).unwrap();
    rig.with_io();
}

#[test]
fn a_completion_interrupts_by_its_vector() {
    let mut rig = rig();
    let mut capability = [0];
    rig.controller
        .function()
        .config_bytes(0x34, &mut capability);
    let root = crate::pci::root::tests::board().root;
    root.attach(rig.controller.clone()).unwrap();
    let ecam = crate::pci::root::Ecam(root);
    use crate::bus::BusDevice;
    ecam.write(
        (1 << 15) + u64::from(capability[0]) + 2,
        &0x8000u16.to_le_bytes(),
    );
    let controller = rig.controller.clone();
    let msix = controller.function().msix().unwrap();
    assert!(msix.enabled());
    rig.enable();
    rig.submit(0, 0x08, 0, [0; 2], [0; 6]);
    rig.completed(0);
    let deadline = Instant::now() + Duration::from_secs(10);
    // The vector is still masked in the table: the interrupt shows as pending.
    while !serde_json::to_string(&msix.save())
        .unwrap()
        .contains("\"pending\":true")
    {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert!(rig.vm.messages.lock().unwrap().is_empty());
}

#[test]
fn a_disk_that_grew_is_told_by_one_event_until_its_log_page_is_read() {
    const EVENT: (u16, u32) = (0, 2 | 4 << 16);
    let mut rig = rig();
    rig.with_io();
    assert_eq!(rig.admin(0x09, 0, 0, [0x0b, 1 << 8, 0, 0, 0, 0]).0, 0);
    rig.submit(0, 0x0c, 0, [0; 2], [0; 6]);
    rig.controller.grow(0, 8 << 20).unwrap();
    assert_eq!(rig.completed(0), EVENT);
    rig.submit(0, 0x0c, 0, [0; 2], [0; 6]);
    rig.controller.grow(0, 9 << 20).unwrap();
    let page = [4 | 0x3ff << 16, 0, 0, 0, 0, 0];
    assert_eq!(
        rig.admin(0x02, u32::MAX, DATA, page),
        (0, 0),
        "no second event"
    );
    assert_eq!(rig.dma.read_u32(DATA).unwrap(), 1);
    assert_eq!(rig.dma.read_u32(DATA + 4).unwrap(), 0);
    rig.controller.grow(0, 10 << 20).unwrap();
    assert_eq!(rig.completed(0), EVENT);
    assert_eq!(rig.admin(0x06, 1, DATA, [0; 6]).0, 0);
    assert_eq!(rig.dma.read_u32(DATA).unwrap(), (10 << 20) / 512);
    assert_eq!(rig.io(2, [DATA, 0], [9 << 11, 0, 7, 0, 0, 0]), 0);
    let error = rig.controller.grow(0, 1 << 20).unwrap_err();
    assert!(error.contains("cannot be made smaller"), "{error}");
    assert!(rig.controller.grow(1, 1 << 30).is_err());
}

#[test]
fn the_state_survives() {
    let mut used = rig();
    used.with_io();
    used.admin(0x09, 0, 0, [0x0b, 5, 0, 0, 0, 0]);
    used.controller.quiesce();
    keeps_its_state(&*used.controller, &*rig().controller);
}

#[test]
fn shutdown_flushes_and_says_so() {
    let mut rig = rig();
    rig.enable();
    rig.set(0x14, 0x0046_4001);
    let deadline = Instant::now() + Duration::from_secs(10);
    while rig.status() >> 2 & 3 != 2 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn no_guest_can_break_it(
        registers in prop::collection::vec((0u64..0x1040, any::<u32>()), 0..40),
        commands in prop::collection::vec((0usize..2, 0u8..16, 0u32..3, any::<[u64; 2]>(), any::<[u32; 6]>()), 0..25),
    ) {
        let mut rig = rig();
        rig.with_io();
        for (queue, opcode, namespace, prp, words) in commands {
            rig.submit(queue, opcode, namespace, prp.map(|p| p & 0x1ff_ffff), words.map(|word| word & 0x00ff_001f));
        }
        for (offset, value) in registers {
            rig.set(offset & !3, value);
            rig.controller.read_bar(0, offset, &mut [0; 4]);
        }
        rig.controller.close();
    }
}
