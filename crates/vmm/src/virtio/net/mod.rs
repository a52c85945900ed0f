//! A network card (section 5.1) over a tap device or a socket of datagrams, one frame each.
//!
//! ```text
//!   queues: receive 0, transmit 0, receive 1, transmit 1 …, control          a thread for each pair, which has a port
//! ```
//!
//! Over a tap with IFF_VNET_HDR the guest's packets pass with their offloads: segmentation and checksums are the
//! host's work, or nobody's between two machines. Frames move between descriptor and guest memory without a copy of ours,
//! but for the rest of one that is larger than the buffers made ready for it.

mod control;
mod port;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_memory::VolatileSlice;

use self::control::Action;
pub use self::port::Port;
use super::queue::{Chain, Queue, pieces};
use super::{Backend, QueueError, Queues, config_bytes};
use crate::memory::{Dma, vectored};

const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;
/// Queue pairs, at most.
const PAIR_LIMIT: usize = 16;

/// Of a packet, before it: flags, segmentation, offsets, number of buffers (5.1.6).
const HEADER: usize = 12;
/// Of an Ethernet frame: a buffer for less is against the rules (5.1.6.3.1).
const ETHERNET: usize = 14;
/// A whole segmented packet with its header.
const FRAME_LIMIT: usize = HEADER + 65_536 + 64;
/// Room made ready for a frame of which nothing is known.
const SMALL: usize = 2048;
/// Frames moved in one go, so that the other direction gets its turn.
const TURN: usize = 256;

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const CONTROL_OFFLOADS: u64 = 1 << 2;
const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const GUEST_ECN: u64 = 1 << 9;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const HOST_ECN: u64 = 1 << 13;
const MERGEABLE: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
const CONTROL: u64 = 1 << 17;
const CONTROL_RX: u64 = 1 << 18;
const CONTROL_VLAN: u64 = 1 << 19;
const CONTROL_RX_EXTRA: u64 = 1 << 20;
const MULTI_QUEUE: u64 = 1 << 22;
const CONTROL_MAC: u64 = 1 << 23;

#[derive(Default)]
struct Receiver {
    /// A frame with its header that found no buffer.
    pending: Option<Vec<u8>>,
    /// No buffer was left: the guest tells when there is.
    starved: bool,
    /// The last frame was larger than [`SMALL`]: the next is likely to be.
    large: bool,
    /// Takes what has no room in the buffers made ready.
    spill: Vec<u8>,
}

/// Buffers of the guest, taken from its queue and not yet filled.
#[derive(Default)]
struct Ready<'a> {
    chains: VecDeque<(Chain, usize)>,
    /// The chains' memory, in order.
    slices: VecDeque<VolatileSlice<'a>>,
    room: usize,
}

impl<'a> Ready<'a> {
    /// Takes buffers until there is room for `wanted` bytes, or for one buffer where they are not merged; false where
    /// the guest has offered no more.
    fn gather(
        &mut self,
        queue: &mut Queue,
        dma: &'a Dma,
        wanted: usize,
        merge: bool,
    ) -> Result<bool, QueueError> {
        while self.chains.is_empty() || merge && self.room < wanted {
            let Some(chain) = queue.pop(dma)? else {
                return Ok(false);
            };
            for (address, len) in &chain.writable {
                self.slices.push_back(dma.slice(*address, *len as usize)?);
            }
            let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
            if room < HEADER + if merge { 0 } else { ETHERNET } {
                return Err(QueueError::Small);
            }
            self.room = self.room.saturating_add(room);
            self.chains.push_back((chain, room));
        }
        Ok(true)
    }

    /// Gives the guest the first buffers, which hold the `len` bytes of a frame from the first byte on.
    fn complete(&mut self, queue: &mut Queue, dma: &Dma, mut len: usize) -> Result<(), QueueError> {
        let mut count = 0u16;
        let mut first = None;
        while count == 0 || len > 0 {
            let Some((chain, room)) = self.chains.pop_front() else {
                break;
            };
            self.slices.drain(..chain.writable.len());
            self.room -= room;
            let written = len.min(room);
            len -= written;
            let mut left = written as u64;
            for (address, piece) in &chain.writable {
                let piece = left.min(u64::from(*piece));
                dma.written(*address, piece);
                left -= piece;
            }
            queue.push_unseen(dma, count, chain.head, written as u32)?;
            first.get_or_insert(chain);
            count += 1;
        }
        if let Some(chain) = first {
            // The header's last field.
            chain.write(dma, 10, &count.to_le_bytes())?;
        }
        queue.publish(dma, count)
    }
}

/// See the module.
pub struct Net {
    ports: Vec<Port>,
    /// As the card was made, and as the guest has set it.
    made_mac: [u8; 6],
    mac: Mutex<[u8; 6]>,
    mtu: u16,
    /// Queue pairs in use.
    pairs: AtomicU16,
    receivers: Vec<Mutex<Receiver>>,
}

impl Net {
    pub fn new(port: Port, mac: [u8; 6], mtu: u16) -> Net {
        Net::with_ports(vec![port], mac, mtu)
    }

    /// A card with a queue pair for each of `ports`, which are queues of one interface; those past the sixteenth are
    /// not used.
    ///
    /// # Panics
    /// Where there are none.
    pub fn with_ports(mut ports: Vec<Port>, mac: [u8; 6], mtu: u16) -> Net {
        assert!(!ports.is_empty(), "a card has a port");
        ports.truncate(PAIR_LIMIT);
        let net = Net {
            receivers: ports.iter().map(|_| Mutex::default()).collect(),
            ports,
            made_mac: mac,
            mac: Mutex::new(mac),
            mtu,
            pairs: AtomicU16::new(1),
        };
        net.set_pairs(1);
        net
    }

    fn set_pairs(&self, count: u16) {
        self.pairs.store(count, Ordering::Release);
        for (number, port) in self.ports.iter().enumerate() {
            port.set_active(number < usize::from(count));
        }
    }

    fn receiver(&self, pair: usize) -> MutexGuard<'_, Receiver> {
        self.receivers[pair]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn mac(&self) -> MutexGuard<'_, [u8; 6]> {
        self.mac.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The control queue comes after the pairs there may be, of which there is one without multi-queue (5.1.2).
    fn control_index(&self, features: u64) -> usize {
        if features & MULTI_QUEUE != 0 {
            self.ports.len() * 2
        } else {
            2
        }
    }

    fn receive(&self, pair: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        let merge = queues.features & MERGEABLE != 0;
        let mut receiver = self.receiver(pair);
        queues.with(pair * 2, |queue, dma| {
            if !queue.enabled {
                // Frames wait on the descriptor, as for a card without buffers.
                receiver.starved = true;
                return Ok(());
            }
            let mut ready = Ready::default();
            for _ in 0..TURN {
                if !self.receive_one(pair, &mut receiver, queue, dma, merge, &mut ready)? {
                    break;
                }
            }
            // What was not filled is next again.
            ready.chains.iter().for_each(|_| queue.unpop());
            Ok(())
        })
    }

    /// Moves one frame into the guest; false where there is none, or no room for it.
    fn receive_one<'a>(
        &self,
        pair: usize,
        receiver: &mut Receiver,
        queue: &mut Queue,
        dma: &'a Dma,
        merge: bool,
        ready: &mut Ready<'a>,
    ) -> Result<bool, QueueError> {
        if let Some(frame) = receiver.pending.take() {
            if !ready.gather(queue, dma, frame.len(), merge)? {
                receiver.pending = Some(frame);
                receiver.starved = true;
                return Ok(false);
            }
            copy(ready, 0, &frame);
            // Without merging a frame that is larger than its buffer is cut, which its receiver notices.
            let len = frame.len().min(ready.room);
            ready.complete(queue, dma, len)?;
            return Ok(true);
        }
        let wanted = if receiver.large { FRAME_LIMIT } else { SMALL };
        if !ready.gather(queue, dma, wanted, merge)? && ready.chains.is_empty() {
            receiver.starved = true;
            return Ok(false);
        }
        let missing = self.ports[pair].missing_header();
        let spill_len = if merge {
            FRAME_LIMIT.saturating_sub(ready.room)
        } else {
            0
        };
        receiver.spill.resize(spill_len, 0);
        if missing > 0 {
            copy(ready, 0, &[0; HEADER]);
        }
        let read = {
            let spill = VolatileSlice::from(&mut receiver.spill[..]);
            let target = skip(ready.slices.iter().copied(), missing).chain([spill]);
            vectored::read(self.ports[pair].as_fd(), target)
        };
        let len = match read {
            // An empty datagram is no frame.
            Ok(0) => return Ok(missing > 0),
            Ok(count) => missing + count,
            Err(rustix::io::Errno::INTR) => return Ok(true),
            Err(rustix::io::Errno::AGAIN) => return Ok(false),
            // What the host could not hand over is lost, as networks lose frames.
            Err(
                rustix::io::Errno::INVAL | rustix::io::Errno::NOMEM | rustix::io::Errno::NOBUFS,
            ) => return Ok(true),
            Err(error) => {
                // An interface that is gone would say so again and again: the guest's next buffer asks next.
                tracing::debug!("a frame could not be taken: {error}");
                receiver.starved = !queue.unwatch(dma)?;
                return Ok(false);
            }
        };
        receiver.large = len > SMALL;
        let begun = ready.room;
        if len > begun && merge {
            let spilled = receiver.spill[..len - begun].to_vec();
            if !ready.gather(queue, dma, len, merge)? {
                let mut frame = taken(ready, begun);
                frame.extend(spilled);
                receiver.pending = Some(frame);
                receiver.starved = true;
                return Ok(false);
            }
            copy(ready, begun, &spilled);
        }
        ready.complete(queue, dma, len.min(ready.room))?;
        Ok(true)
    }

    fn transmit(&self, pair: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        let port = &self.ports[pair];
        queues.with(pair * 2 + 1, |queue, dma| {
            for _ in 0..TURN {
                let Some(chain) = queue.pop(dma)? else {
                    return Ok(());
                };
                let len = chain.readable_len();
                if len > HEADER as u64 && len <= FRAME_LIMIT as u64 {
                    let skipped = port.missing_header() as u64;
                    let parts = pieces(&chain.readable, skipped, len as usize);
                    let slices = dma.slices(&parts)?;
                    // A full network drops, as networks do.
                    let _ = vectored::write(port.as_fd(), slices.into_iter());
                }
                queue.push(dma, chain.head, 0)?;
            }
            queues.again(pair * 2 + 1);
            Ok(())
        })
    }

    fn control(&self, index: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        queues.with(index, |queue, dma| {
            while let Some(chain) = queue.pop(dma)? {
                let mut command = vec![0; chain.readable_len().min(control::LIMIT) as usize];
                chain.read(dma, 0, &mut command)?;
                let answer =
                    match control::parse(&command, self.ports.len() as u16, queues.features) {
                        Action::Answer(answer) => answer,
                        Action::Address(address) => {
                            *self.mac() = address;
                            0
                        }
                        Action::Pairs(count) => {
                            self.set_pairs(count);
                            0
                        }
                        Action::Offloads(offloads) => {
                            self.ports
                                .iter()
                                .for_each(|port| port.set_offloads(offloads));
                            0
                        }
                    };
                let written = chain.write(dma, 0, &[answer])?;
                queue.push(dma, chain.head, written as u32)?;
            }
            Ok(())
        })
    }
}

/// `slices` without their first `count` bytes.
fn skip<'a, I: Iterator<Item = VolatileSlice<'a>>>(
    slices: I,
    mut count: usize,
) -> impl Iterator<Item = VolatileSlice<'a>> {
    slices.filter_map(move |slice| {
        let skipped = count.min(slice.len());
        count -= skipped;
        slice.offset(skipped).ok().filter(|rest| !rest.is_empty())
    })
}

/// Copies `data` into the buffers made ready, from `offset` on, as far as it fits.
fn copy(ready: &Ready<'_>, offset: usize, mut data: &[u8]) {
    for slice in skip(ready.slices.iter().copied(), offset) {
        let (now, later) = data.split_at(data.len().min(slice.len()));
        slice.copy_from(now);
        data = later;
        if data.is_empty() {
            return;
        }
    }
}

/// The first `len` bytes of the buffers made ready.
fn taken(ready: &Ready<'_>, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut at = 0;
    for slice in &ready.slices {
        let part = slice.len().min(len - at);
        slice.copy_to(&mut bytes[at..at + part]);
        at += part;
    }
    bytes
}

impl Backend for Net {
    fn kind(&self) -> u16 {
        1
    }
    fn class(&self) -> u32 {
        0x02_0000
    }
    fn features(&self) -> u64 {
        let offloads = if self.ports[0].headers {
            CSUM | GUEST_CSUM
                | GUEST_TSO4
                | GUEST_TSO6
                | GUEST_ECN
                | HOST_TSO4
                | HOST_TSO6
                | HOST_ECN
                | CONTROL_OFFLOADS
        } else {
            0
        };
        let several = if self.ports.len() > 1 { MULTI_QUEUE } else { 0 };
        let control = CONTROL | CONTROL_RX | CONTROL_RX_EXTRA | CONTROL_VLAN | CONTROL_MAC;
        MAC | STATUS | MTU | MERGEABLE | control | several | offloads
    }
    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; self.ports.len() * 2];
        sizes.push(CONTROL_SIZE);
        sizes
    }
    fn threads(&self) -> Vec<Vec<usize>> {
        let mut threads: Vec<Vec<usize>> = (0..self.ports.len())
            .map(|pair| vec![pair * 2, pair * 2 + 1])
            .collect();
        threads[0].push(self.ports.len() * 2);
        threads
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0u8; 12];
        config[..6].copy_from_slice(&*self.mac());
        // The link is up.
        config[6] = 1;
        config[8..10].copy_from_slice(&(self.ports.len() as u16).to_le_bytes());
        config[10..12].copy_from_slice(&self.mtu.to_le_bytes());
        config_bytes(&config, offset, data);
    }

    fn serve(&self, index: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        if index == self.control_index(queues.features) {
            return self.control(index, queues);
        }
        let pair = index / 2;
        if pair >= self.ports.len() {
            return Ok(());
        }
        if index % 2 == 1 {
            return self.transmit(pair, queues);
        }
        self.receiver(pair).starved = false;
        self.receive(pair, queues)
    }

    fn event_source(&self, thread: usize) -> Option<BorrowedFd<'_>> {
        let used = thread < usize::from(self.pairs.load(Ordering::Acquire));
        (used && !self.receiver(thread).starved).then(|| self.ports[thread].as_fd())
    }

    fn serve_event(&self, thread: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        self.receive(thread, queues)
    }

    fn start(&self, features: u64) {
        self.ports
            .iter()
            .for_each(|port| port.set_offloads(features));
    }

    fn reset(&self) {
        for pair in 0..self.ports.len() {
            *self.receiver(pair) = Receiver::default();
        }
        *self.mac() = self.made_mac;
        self.set_pairs(1);
    }

    fn save(&self) -> serde_json::Value {
        // A frame that waits for a buffer is dropped, as any network may.
        serde_json::json!({ "mac": *self.mac(), "pairs": self.pairs.load(Ordering::Acquire) })
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), String> {
        let mac = serde_json::from_value(state["mac"].clone()).map_err(|e| e.to_string())?;
        let pairs = state["pairs"]
            .as_u64()
            .filter(|count| (1..=self.ports.len() as u64).contains(count))
            .ok_or("it uses queue pairs that this card does not have")?;
        *self.mac() = mac;
        self.set_pairs(pairs as u16);
        Ok(())
    }
}
