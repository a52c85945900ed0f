//! A network card (section 5.1) over a tap device or a socket of datagrams, one frame each.
//!
//! Over a tap with IFF_VNET_HDR the guest's packets pass with their offloads: segmentation and checksums are the
//! host's work, or nobody's between two machines.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Backend, QueueError, Queues, config_bytes};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZE: u16 = 256;

/// Of a packet, before it: flags, segmentation, offsets, number of buffers (5.1.6).
const HEADER: usize = 12;
/// A whole segmented packet with its header.
const FRAME_LIMIT: usize = HEADER + 65_536 + 64;
/// Frames moved in one go, so that the other direction gets its turn.
const TURN: usize = 128;

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const MERGEABLE: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;

// linux/if_tun.h
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const IFF_VNET_HDR: i16 = 0x4000;
const TUN_F_CSUM: libc::c_uint = 1;
const TUN_F_TSO4: libc::c_uint = 2;
const TUN_F_TSO6: libc::c_uint = 4;

/// How a card reaches its network.
pub struct Port {
    fd: OwnedFd,
    /// Frames carry the virtio header on the descriptor too.
    headers: bool,
}

impl Port {
    /// A tap device, attached to its interface.
    ///
    /// # Errors
    /// Where the descriptor is no tap.
    pub fn tap(fd: OwnedFd) -> std::io::Result<Port> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        // SAFETY: all zeros are a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF fills one ifreq, which `request` is.
        if unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, &mut request) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: TUNGETIFF sets this member.
        let headers = unsafe { request.ifr_ifru.ifru_flags } & IFF_VNET_HDR != 0;
        if headers {
            let size = HEADER as libc::c_int;
            // SAFETY: TUNSETVNETHDRSZ reads one int.
            if unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &size) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(Port { fd, headers })
    }

    /// A socket on which each datagram is one Ethernet frame.
    ///
    /// # Errors
    /// Where it cannot be made non-blocking.
    pub fn datagrams(fd: OwnedFd) -> std::io::Result<Port> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Port { fd, headers: false })
    }

    fn set_offloads(&self, features: u64) {
        if !self.headers {
            return;
        }
        let mut offloads = 0;
        for (feature, offload) in [
            (GUEST_CSUM, TUN_F_CSUM),
            (GUEST_TSO4, TUN_F_TSO4),
            (GUEST_TSO6, TUN_F_TSO6),
        ] {
            if features & feature != 0 {
                offloads |= offload;
            }
        }
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        if unsafe {
            libc::ioctl(
                self.fd.as_raw_fd(),
                TUNSETOFFLOAD,
                libc::c_ulong::from(offloads),
            )
        } < 0
        {
            tracing::warn!(
                "the tap refuses offloads {offloads:#x}: {}",
                std::io::Error::last_os_error()
            );
        }
    }
}

#[derive(Default)]
struct Receiver {
    /// A frame with its header that found no buffer.
    pending: Option<Vec<u8>>,
    /// No buffer was left: the guest tells when there is.
    starved: bool,
    buffer: Vec<u8>,
}

/// See the module.
pub struct Net {
    port: Port,
    mac: [u8; 6],
    mtu: u16,
    receiver: Mutex<Receiver>,
}

impl Net {
    pub fn new(port: Port, mac: [u8; 6], mtu: u16) -> Net {
        Net {
            port,
            mac,
            mtu,
            receiver: Mutex::default(),
        }
    }

    fn receiver(&self) -> MutexGuard<'_, Receiver> {
        self.receiver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next frame, with a header before it.
    fn next_frame(&self, receiver: &mut Receiver) -> Option<Vec<u8>> {
        if let Some(frame) = receiver.pending.take() {
            return Some(frame);
        }
        let start = if self.port.headers { 0 } else { HEADER };
        receiver.buffer.resize(FRAME_LIMIT, 0);
        receiver.buffer[..HEADER].fill(0);
        loop {
            match rustix::io::read(&self.port.fd, &mut receiver.buffer[start..]) {
                Ok(count) if start + count > HEADER => {
                    return Some(receiver.buffer[..start + count].to_vec());
                }
                // An empty datagram is no frame.
                Ok(0) if self.port.headers => return None,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return None,
            }
        }
    }

    fn receive(&self, queues: &Queues<'_>) -> Result<(), QueueError> {
        let mut receiver = self.receiver();
        queues.with(RECEIVE, |queue, dma| {
            for _ in 0..TURN {
                let Some(mut frame) = self.next_frame(&mut receiver) else {
                    return Ok(());
                };
                let mut chains = Vec::new();
                let mut room = 0;
                while room < frame.len() as u64 {
                    if !chains.is_empty() && queues.features & MERGEABLE == 0 {
                        break;
                    }
                    let Some(chain) = queue.pop(dma)? else {
                        chains.iter().for_each(|_| queue.unpop());
                        receiver.pending = Some(frame);
                        receiver.starved = true;
                        return Ok(());
                    };
                    room += chain.writable_len();
                    chains.push(chain);
                }
                // Without merging a frame that is larger than its buffer is cut, which its receiver notices.
                frame[10..12].copy_from_slice(&(chains.len() as u16).to_le_bytes());
                let mut done = 0;
                for (ahead, chain) in chains.iter().enumerate() {
                    let written = chain.write(dma, 0, &frame[done..])?;
                    done += written;
                    queue.push_unseen(dma, ahead as u16, chain.head, written as u32)?;
                }
                queue.publish(dma, chains.len() as u16)?;
            }
            Ok(())
        })
    }

    fn transmit(&self, queues: &Queues<'_>) -> Result<(), QueueError> {
        queues.with(TRANSMIT, |queue, dma| {
            let mut frame = Vec::new();
            while let Some(chain) = queue.pop(dma)? {
                let len = chain.readable_len();
                if len > HEADER as u64 && len <= FRAME_LIMIT as u64 {
                    frame.resize(len as usize, 0);
                    chain.read(dma, 0, &mut frame)?;
                    let sent = if self.port.headers {
                        &frame[..]
                    } else {
                        &frame[HEADER..]
                    };
                    // A full network drops, as networks do.
                    let _ = rustix::io::write(&self.port.fd, sent);
                }
                queue.push(dma, chain.head, 0)?;
            }
            Ok(())
        })
    }
}

impl Backend for Net {
    fn kind(&self) -> u16 {
        1
    }
    fn class(&self) -> u32 {
        0x02_0000
    }
    fn features(&self) -> u64 {
        let offloads = if self.port.headers {
            CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6
        } else {
            0
        };
        MAC | STATUS | MTU | MERGEABLE | offloads
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0u8; 12];
        config[..6].copy_from_slice(&self.mac);
        // The link is up.
        config[6] = 1;
        config[10..12].copy_from_slice(&self.mtu.to_le_bytes());
        config_bytes(&config, offset, data);
    }

    fn serve(&self, index: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        if index == TRANSMIT {
            return self.transmit(queues);
        }
        self.receiver().starved = false;
        self.receive(queues)
    }

    fn event_source(&self, _: usize) -> Option<BorrowedFd<'_>> {
        (!self.receiver().starved).then(|| self.port.fd.as_fd())
    }

    fn serve_event(&self, _: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        self.receive(queues)
    }

    fn start(&self, features: u64) {
        self.port.set_offloads(features);
    }

    fn reset(&self) {
        let mut receiver = self.receiver();
        receiver.pending = None;
        receiver.starved = false;
    }
}
