//! The split virtqueue, as the device sees it (Virtual I/O Device 1.2, section 2.7). Everything in it is the
//! guest's word: every index, address and length is checked, and a chain ends after as many buffers as the
//! queue has entries.

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{Dma, MemoryError};

/// Entries of the largest queue we offer.
pub const SIZE_LIMIT: u16 = 1024;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// The guest broke the queue's rules; only a reset of the device helps.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("descriptor {0} is outside its table")]
    Descriptor(u16),
    #[error("a chain has more buffers than the queue has entries")]
    Loop,
    #[error("a buffer to read follows one to write")]
    Order,
    #[error("an indirect table is nested, empty or not a whole number of descriptors")]
    Indirect,
    #[error("a buffer is smaller than the device's rules allow")]
    Small,
    #[error("more chains are offered than the queue has entries")]
    Available,
}

/// A chain of buffers the guest offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    pub head: u16,
    /// Address and length of what the device reads.
    pub readable: Vec<(u64, u32)>,
    /// Of what it writes.
    pub writable: Vec<(u64, u32)>,
}

fn total(buffers: &[(u64, u32)]) -> u64 {
    buffers.iter().map(|(_, len)| u64::from(*len)).sum()
}

impl Chain {
    pub fn readable_len(&self) -> u64 {
        total(&self.readable)
    }

    pub fn writable_len(&self) -> u64 {
        total(&self.writable)
    }

    /// Copies from the readable part at `offset` into `data`; how much there was.
    pub fn read(&self, dma: &Dma, offset: u64, data: &mut [u8]) -> Result<usize, MemoryError> {
        let mut done = 0;
        for (address, len) in pieces(&self.readable, offset, data.len()) {
            dma.read(address, &mut data[done..done + len])?;
            done += len;
        }
        Ok(done)
    }

    /// Copies `data` into the writable part at `offset`; how much had room.
    pub fn write(&self, dma: &Dma, offset: u64, data: &[u8]) -> Result<usize, MemoryError> {
        let mut done = 0;
        for (address, len) in pieces(&self.writable, offset, data.len()) {
            dma.write(address, &data[done..done + len])?;
            done += len;
        }
        Ok(done)
    }
}

/// The pieces of `buffers` from `offset` on, `wanted` bytes at most.
pub(crate) fn pieces(
    buffers: &[(u64, u32)],
    mut offset: u64,
    mut wanted: usize,
) -> Vec<(u64, usize)> {
    let mut pieces = Vec::new();
    for (address, len) in buffers {
        let len = u64::from(*len);
        if offset >= len {
            offset -= len;
            continue;
        }
        let take = (len - offset).min(wanted as u64) as usize;
        if take == 0 {
            break;
        }
        // A wrapping address is outside memory, which the copy says.
        pieces.push((address.wrapping_add(offset), take));
        wanted -= take;
        offset = 0;
    }
    pieces
}

/// One queue: where it lies, and how far both sides are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queue {
    pub max_size: u16,
    pub size: u16,
    pub enabled: bool,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    /// MSI-X vector.
    pub vector: u16,
    /// VIRTIO_F_RING_EVENT_IDX.
    pub event_index: bool,
    /// VIRTIO_F_RING_INDIRECT_DESC.
    pub indirect: bool,
    next_available: u16,
    next_used: u16,
    /// Where `next_used` stood when the guest was last told.
    told: u16,
    /// The queue is looked at all the time: the guest need not tell of the next chain.
    #[serde(skip)]
    pub watched: bool,
}

impl Queue {
    pub fn new(max_size: u16) -> Queue {
        Queue {
            max_size,
            size: max_size,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
            vector: 0xffff,
            event_index: false,
            indirect: false,
            next_available: 0,
            next_used: 0,
            told: 0,
            watched: false,
        }
    }

    /// Back to how it was made.
    pub fn reset(&mut self) {
        *self = Queue::new(self.max_size);
    }

    /// True where size, alignment and memory allow its use (2.7, table of alignments).
    pub fn is_sound(&self, dma: &Dma) -> bool {
        let size = u64::from(self.size);
        let within = |address: u64, len: u64| dma.slice(address, len as usize).is_ok();
        self.size.is_power_of_two()
            && self.size <= self.max_size
            && self.max_size <= SIZE_LIMIT
            && self.taken() <= self.size
            && self.descriptors.is_multiple_of(16)
            && self.available.is_multiple_of(2)
            && self.used.is_multiple_of(4)
            && within(self.descriptors, size * 16)
            && within(self.available, 6 + size * 2)
            && within(self.used, 6 + size * 8)
    }

    fn load_u16(&self, dma: &Dma, address: u64) -> Result<u16, MemoryError> {
        dma.memory()
            .load::<u16>(GuestAddress(address), Ordering::Acquire)
            .map(u16::from_le)
            .map_err(|_| MemoryError::Outside { address, len: 2 })
    }

    fn store_u16(&self, dma: &Dma, address: u64, value: u16) -> Result<(), MemoryError> {
        dma.memory()
            .store(value.to_le(), GuestAddress(address), Ordering::Release)
            .map_err(|_| MemoryError::Outside { address, len: 2 })?;
        dma.written(address, 2);
        Ok(())
    }

    /// The next chain, `None` where the guest has offered no more. The guest is asked to tell of the next, unless the
    /// queue is watched.
    pub fn pop(&mut self, dma: &Dma) -> Result<Option<Chain>, QueueError> {
        if !self.enabled {
            return Ok(None);
        }
        if !self.has_more(dma)? && (self.watched || !self.unwatch(dma)?) {
            return Ok(None);
        }
        let index_at = self.available.wrapping_add(2);
        let offered = self
            .load_u16(dma, index_at)?
            .wrapping_sub(self.next_available);
        // Those that the device has count too: what it holds of a guest is bounded.
        if offered > self.size || self.taken() >= self.size {
            return Err(QueueError::Available);
        }
        let slot = u64::from(self.next_available % self.size);
        let head = dma.read_u16(self.available.wrapping_add(4 + slot * 2))?;
        let chain = self.walk(dma, head)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(chain))
    }

    /// Whether the guest has offered a chain that was not taken.
    pub fn has_more(&self, dma: &Dma) -> Result<bool, MemoryError> {
        if !self.enabled {
            return Ok(false);
        }
        let index = self.load_u16(dma, self.available.wrapping_add(2))?;
        Ok(index != self.next_available)
    }

    /// Asks the guest to tell of the next chain; true where one has come before it knew of that.
    pub fn unwatch(&mut self, dma: &Dma) -> Result<bool, MemoryError> {
        self.watched = false;
        if !self.enabled {
            return Ok(false);
        }
        self.want_notification(dma)?;
        self.has_more(dma)
    }

    /// Chains that were taken and not given back.
    fn taken(&self) -> u16 {
        self.next_available.wrapping_sub(self.next_used)
    }

    /// Takes back the last [`Queue::pop`]: its chain is the next one again.
    pub fn unpop(&mut self) {
        self.next_available = self.next_available.wrapping_sub(1);
    }

    fn want_notification(&mut self, dma: &Dma) -> Result<(), MemoryError> {
        if self.event_index {
            let event_at = self.used.wrapping_add(4 + u64::from(self.size) * 8);
            self.store_u16(dma, event_at, self.next_available)?;
        }
        fence(Ordering::SeqCst);
        Ok(())
    }

    fn walk(&self, dma: &Dma, head: u16) -> Result<Chain, QueueError> {
        let mut chain = Chain {
            head,
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let (mut table, mut entries, mut index) = (self.descriptors, self.size, head);
        let mut in_table = false;
        // An indirect chain may have as many buffers as the queue has entries, after one descriptor of its own.
        for _ in 0..=self.size {
            if index >= entries {
                return Err(QueueError::Descriptor(index));
            }
            let mut bytes = [0; 16];
            dma.read(table.wrapping_add(u64::from(index) * 16), &mut bytes)?;
            let address = u64::from_le_bytes(bytes[0..8].try_into().unwrap_or_default());
            let len = u32::from_le_bytes(bytes[8..12].try_into().unwrap_or_default());
            let flags = u16::from_le_bytes([bytes[12], bytes[13]]);
            if flags & INDIRECT != 0 {
                let count = len / 16;
                let fits = len % 16 == 0 && (1..=u32::from(self.size)).contains(&count);
                if in_table || !self.indirect || !fits || flags & NEXT != 0 {
                    return Err(QueueError::Indirect);
                }
                (table, entries, index, in_table) = (address, count as u16, 0, true);
                continue;
            }
            if flags & WRITE != 0 {
                chain.writable.push((address, len));
            } else if chain.writable.is_empty() {
                chain.readable.push((address, len));
            } else {
                return Err(QueueError::Order);
            }
            if flags & NEXT == 0 {
                return Ok(chain);
            }
            index = u16::from_le_bytes([bytes[14], bytes[15]]);
        }
        Err(QueueError::Loop)
    }

    /// Gives a chain back with `written` bytes filled.
    pub fn push(&mut self, dma: &Dma, head: u16, written: u32) -> Result<(), QueueError> {
        self.push_unseen(dma, 0, head, written)?;
        self.publish(dma, 1)
    }

    /// Puts a chain `ahead` places past the end of the used ring, where the guest does not look yet.
    pub fn push_unseen(
        &mut self,
        dma: &Dma,
        ahead: u16,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        let slot = u64::from(self.next_used.wrapping_add(ahead) % self.size);
        let mut entry = [0; 8];
        entry[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        entry[4..].copy_from_slice(&written.to_le_bytes());
        Ok(dma.write(self.used.wrapping_add(4 + slot * 8), &entry)?)
    }

    /// Shows the guest `count` chains of [`Queue::push_unseen`].
    pub fn publish(&mut self, dma: &Dma, count: u16) -> Result<(), QueueError> {
        self.next_used = self.next_used.wrapping_add(count);
        Ok(self.store_u16(dma, self.used.wrapping_add(2), self.next_used)?)
    }

    /// Whether the guest wants to be interrupted for what was given back since it last was.
    pub fn wants_interrupt(&mut self, dma: &Dma) -> Result<bool, QueueError> {
        if self.next_used == self.told {
            return Ok(false);
        }
        // The used index must be seen before the guest's wish is read (2.7.7).
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let event = self.load_u16(
                dma,
                self.available.wrapping_add(4 + u64::from(self.size) * 2),
            )?;
            self.next_used.wrapping_sub(event).wrapping_sub(1)
                < self.next_used.wrapping_sub(self.told)
        } else {
            self.load_u16(dma, self.available)? & NO_INTERRUPT == 0
        };
        self.told = self.next_used;
        Ok(wanted)
    }

    /// Tells a guest without event index that it need not notify us, or must again.
    pub fn suppress(&mut self, dma: &Dma, quiet: bool) -> Result<(), QueueError> {
        if self.event_index {
            return Ok(());
        }
        Ok(self.store_u16(dma, self.used, if quiet { NO_NOTIFY } else { 0 })?)
    }
}

/// For fuzzing: a queue of arbitrary content is drained without end, panic or access outside memory.
pub fn fuzz_queue(data: &[u8], dma: &Dma) {
    let _ = dma.memory().write(data, GuestAddress(0x1_0000));
    let mut queue = Queue::new(16);
    queue.enabled = true;
    (queue.descriptors, queue.available, queue.used) = (0x1_0000, 0x1_0100, 0x1_0200);
    queue.indirect = data.first().is_some_and(|byte| byte & 1 != 0);
    queue.event_index = data.first().is_some_and(|byte| byte & 2 != 0);
    for _ in 0..32 {
        match queue.pop(dma) {
            Ok(Some(chain)) => {
                let mut bytes = [0; 64];
                let _ = chain.read(dma, 3, &mut bytes);
                let _ = chain.write(dma, 5, &bytes);
                let _ = queue.push(dma, chain.head, 7);
                let _ = queue.wants_interrupt(dma);
            }
            _ => return,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::devices::test_board::Recorder;
    use proptest::prelude::*;
    use std::sync::Arc;

    pub fn dma() -> Dma {
        Dma::new(
            Arc::new(crate::memory::allocate(16 << 20).unwrap()),
            Arc::new(Recorder::default()),
        )
    }

    /// The driver's side of a queue at `base`, of 16 entries.
    pub struct Driver {
        pub base: u64,
        next: u16,
        pub seen: u16,
    }

    impl Driver {
        pub fn new(base: u64) -> Driver {
            Driver {
                base,
                next: 0,
                seen: 0,
            }
        }

        pub fn set_up(&self, queue: &mut Queue) {
            queue.size = 16;
            queue.enabled = true;
            (queue.descriptors, queue.available, queue.used) =
                (self.base, self.base + 0x100, self.base + 0x200);
        }

        pub fn descriptor(
            &self,
            dma: &Dma,
            index: u16,
            (address, len, flags, next): (u64, u32, u16, u16),
        ) {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            dma.write(self.base + u64::from(index) * 16, &bytes)
                .unwrap();
        }

        /// Offers a chain of buffers `(address, length, device writes)`, from descriptor `first` on.
        pub fn offer(&mut self, dma: &Dma, first: u16, buffers: &[(u64, u32, bool)]) {
            for (at, (address, len, writes)) in buffers.iter().enumerate() {
                let index = first + at as u16;
                let last = at + 1 == buffers.len();
                let flags = if *writes { WRITE } else { 0 } | if last { 0 } else { NEXT };
                self.descriptor(dma, index, (*address, *len, flags, index + 1));
            }
            self.announce(dma, first);
        }

        pub fn announce(&mut self, dma: &Dma, head: u16) {
            dma.write(
                self.base + 0x104 + u64::from(self.next % 16) * 2,
                &head.to_le_bytes(),
            )
            .unwrap();
            self.next += 1;
            dma.write(self.base + 0x102, &self.next.to_le_bytes())
                .unwrap();
        }

        /// The next used entry: head and length.
        pub fn used(&mut self, dma: &Dma) -> Option<(u32, u32)> {
            if dma.read_u16(self.base + 0x202).unwrap() == self.seen {
                return None;
            }
            let at = self.base + 0x204 + u64::from(self.seen % 16) * 8;
            self.seen += 1;
            Some((dma.read_u32(at).unwrap(), dma.read_u32(at + 4).unwrap()))
        }
    }

    fn pair() -> (Dma, Driver, Queue) {
        let dma = dma();
        let driver = Driver::new(0x1_0000);
        let mut queue = Queue::new(16);
        driver.set_up(&mut queue);
        assert!(queue.is_sound(&dma));
        (dma, driver, queue)
    }

    #[test]
    fn a_chain_is_read_written_and_given_back() {
        let (dma, mut driver, mut queue) = pair();
        dma.write(0x2_0000, b"hello").unwrap();
        driver.offer(
            &dma,
            3,
            &[
                (0x2_0000, 2, false),
                (0x2_0002, 3, false),
                (0x3_0000, 4, true),
                (0x3_0010, 4, true),
            ],
        );
        let chain = queue.pop(&dma).unwrap().unwrap();
        let mut text = [0; 4];
        assert_eq!(chain.read(&dma, 1, &mut text).unwrap(), 4);
        assert_eq!(&text, b"ello");
        assert_eq!(chain.write(&dma, 2, b"abcdefgh").unwrap(), 6);
        queue.push(&dma, chain.head, 8).unwrap();
        assert!(queue.wants_interrupt(&dma).unwrap() && !queue.wants_interrupt(&dma).unwrap());
        assert_eq!(driver.used(&dma), Some((3, 8)));
        let mut back = [0; 4];
        dma.read(0x3_0010, &mut back).unwrap();
        assert_eq!(&back, b"cdef");
        assert_eq!(queue.pop(&dma).unwrap(), None);
    }

    #[test]
    fn loops_nested_tables_and_wild_indices_are_errors() {
        let (dma, mut driver, mut queue) = pair();
        queue.indirect = true;
        driver.descriptor(&dma, 0, (0x2_0000, 1, NEXT, 1));
        driver.descriptor(&dma, 1, (0x2_0000, 1, NEXT, 0));
        driver.announce(&dma, 0);
        assert!(matches!(queue.pop(&dma), Err(QueueError::Loop)));
        driver.descriptor(&dma, 0, (0x2_0000, 1, NEXT, 99));
        assert!(matches!(queue.pop(&dma), Err(QueueError::Descriptor(99))));
        driver.descriptor(&dma, 0, (0x1_0000, 16, INDIRECT, 0));
        assert!(matches!(queue.pop(&dma), Err(QueueError::Indirect)));
        driver.descriptor(&dma, 0, (u64::MAX - 7, 16, INDIRECT, 0));
        assert!(matches!(queue.pop(&dma), Err(QueueError::Memory(_))));
        dma.write(0x1_0102, &500u16.to_le_bytes()).unwrap();
        assert!(matches!(queue.pop(&dma), Err(QueueError::Available)));
    }

    #[test]
    fn chains_offered_again_while_the_device_has_them_break_the_queue() {
        let (dma, mut driver, mut queue) = pair();
        for _ in 0..16 {
            driver.offer(&dma, 0, &[(0x2_0000, 1, true)]);
            assert!(queue.pop(&dma).unwrap().is_some());
        }
        driver.offer(&dma, 0, &[(0x2_0000, 1, true)]);
        assert!(matches!(queue.pop(&dma), Err(QueueError::Available)));
        queue.push(&dma, 0, 1).unwrap();
        assert!(queue.pop(&dma).unwrap().is_some(), "one was given back");
    }

    #[test]
    fn a_watched_queue_is_not_told_of_and_nothing_is_missed_at_its_end() {
        let (dma, mut driver, mut queue) = pair();
        queue.event_index = true;
        let event = |dma: &Dma| dma.read_u16(0x1_0000 + 0x204 + 128).unwrap();
        assert_eq!(queue.pop(&dma).unwrap(), None);
        queue.watched = true;
        driver.offer(&dma, 0, &[(0x2_0000, 1, true)]);
        assert!(queue.pop(&dma).unwrap().is_some());
        assert_eq!(queue.pop(&dma).unwrap(), None);
        assert_eq!(event(&dma), 0, "the guest need not tell of the second");
        driver.offer(&dma, 1, &[(0x2_0000, 1, true)]);
        assert!(queue.unwatch(&dma).unwrap(), "it came before the wish");
        assert!(queue.pop(&dma).unwrap().is_some());
        assert_eq!(queue.pop(&dma).unwrap(), None);
        assert_eq!(event(&dma), 2);
    }

    #[test]
    fn the_event_index_decides_who_is_told() {
        let (dma, mut driver, mut queue) = pair();
        queue.event_index = true;
        dma.write(0x1_0000 + 0x104 + 32, &1u16.to_le_bytes())
            .unwrap();
        for index in 0..2 {
            driver.offer(&dma, index, &[(0x2_0000, 1, true)]);
            let chain = queue.pop(&dma).unwrap().unwrap();
            queue.push(&dma, chain.head, 1).unwrap();
            assert_eq!(
                queue.wants_interrupt(&dma).unwrap(),
                index == 1,
                "after the second one, it said"
            );
        }
        assert_eq!(queue.pop(&dma).unwrap(), None);
        assert_eq!(
            dma.read_u16(0x1_0000 + 0x204 + 128).unwrap(),
            2,
            "told to notify of the third"
        );
    }

    proptest! {
        #[test]
        fn no_ring_content_panics_or_hangs(data in prop::collection::vec(any::<u8>(), 0..0x300)) {
            fuzz_queue(&data, &dma());
        }

        #[test]
        fn small_descriptors_do_neither(
            descriptors in prop::collection::vec((0u64..0x1_1000, 0u32..80, 0u16..8, 0u16..20), 16),
            heads in prop::collection::vec(0u16..17, 0..16), indirect: bool,
        ) {
            let (dma, mut driver, mut queue) = pair();
            queue.indirect = indirect;
            for (index, descriptor) in descriptors.into_iter().enumerate() {
                driver.descriptor(&dma, index as u16, descriptor);
            }
            for head in heads {
                driver.announce(&dma, head);
                if let Ok(Some(chain)) = queue.pop(&dma) {
                    prop_assert!(chain.readable.len() + chain.writable.len() <= 16);
                    let _ = chain.write(&dma, 0, &[0; 100]);
                    let _ = queue.push(&dma, chain.head, 0);
                }
            }
        }
    }
}
