//! Tap interfaces (Linux `Documentation/networking/tuntap.rst`) for machines.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::endpoint::Endpoint;

/// How a machine wants its interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TapOptions {
    /// Each frame begins with the 12 bytes of `virtio_net_hdr_mrg_rxbuf`.
    pub vnet_header: bool,
    /// Queues, one descriptor each; 1 for a single queue, at most 16.
    pub queues: u16,
}

impl Default for TapOptions {
    fn default() -> TapOptions {
        TapOptions {
            vnet_header: true,
            queues: 1,
        }
    }
}

/// A machine's interface on a network. It is gone when the last descriptor is closed.
#[derive(Debug)]
pub struct Tap {
    /// Non-blocking; as many as queues were asked for. One read or write is one Ethernet frame.
    pub queues: Vec<OwnedFd>,
    /// What the guest shall have: its MAC address above all. Its IPv4 address comes by DHCP.
    pub endpoint: Endpoint,
    /// Bytes, where the network says.
    pub mtu: Option<u32>,
}

// <linux/if_tun.h>
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
const IFF_MULTI_QUEUE: i16 = 0x0100;
/// The size of `virtio_net_hdr_mrg_rxbuf`, bytes.
static HEADER: libc::c_int = 12;

/// Makes the interface in the calling thread's network namespace.
pub(crate) fn make(name: &str, options: TapOptions) -> io::Result<Vec<OwnedFd>> {
    (0..options.queues.max(1))
        .map(|_| open_queue(name, options))
        .collect()
}

fn open_queue(name: &str, options: TapOptions) -> io::Result<OwnedFd> {
    use std::os::unix::fs::OpenOptionsExt;
    let file: File = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    // SAFETY: ifreq is plain data for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let mut flags = IFF_TAP | IFF_NO_PI;
    if options.vnet_header {
        flags |= IFF_VNET_HDR;
    }
    if options.queues > 1 {
        flags |= IFF_MULTI_QUEUE;
    }
    request.ifr_ifru.ifru_flags = flags;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is, alive over the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    if options.vnet_header {
        // SAFETY: TUNSETVNETHDRSZ reads one int, which `HEADER` is, alive over the call.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const HEADER) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(file.into())
}
