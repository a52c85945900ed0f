//! How a card reaches its network: a tap device of the host, or a socket of datagrams.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::{GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, HEADER};

// linux/if_tun.h
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const IFF_TAP: i16 = 0x0002;
const IFF_MULTI_QUEUE: i16 = 0x0100;
const IFF_ATTACH_QUEUE: i16 = 0x0200;
const IFF_DETACH_QUEUE: i16 = 0x0400;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
const TUN_F_CSUM: libc::c_uint = 1;
const TUN_F_TSO4: libc::c_uint = 2;
const TUN_F_TSO6: libc::c_uint = 4;
const TUN_F_TSO_ECN: libc::c_uint = 8;

/// One queue of an interface.
pub struct Port {
    fd: OwnedFd,
    /// Frames carry the virtio header on the descriptor too.
    pub(super) headers: bool,
    /// One of several queues of its interface, which can be taken out of service.
    detachable: bool,
}

fn socket() -> std::io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    Ok(socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

fn empty_request() -> libc::ifreq {
    // SAFETY: all zeros are a valid ifreq.
    unsafe { std::mem::zeroed() }
}

/// Name and flags of the interface behind a tap's descriptor.
fn interface(tap: &OwnedFd) -> std::io::Result<libc::ifreq> {
    let mut request = empty_request();
    // SAFETY: TUNGETIFF fills one ifreq, which `request` is.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNGETIFF, &mut request) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(request)
}

impl Port {
    /// A tap interface of the host by its name, with offloads.
    ///
    /// # Errors
    /// Where there is no such interface, or it is not this user's.
    pub fn open_tap(name: &str) -> std::io::Result<Port> {
        let mut request = empty_request();
        // The kernel would make a missing one, or one of a name cut short.
        if name.len() >= request.ifr_name.len()
            || rustix::net::netdevice::name_to_index(&socket()?, name).is_err()
        {
            return Err(std::io::Error::from(std::io::ErrorKind::NotFound));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")?;
        // SAFETY: TUNSETIFF reads one ifreq, which `request` is.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &request) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Port::tap(file.into())
    }

    /// A queue of a tap device, attached to its interface.
    ///
    /// # Errors
    /// Where the descriptor is no tap.
    pub fn tap(fd: OwnedFd) -> std::io::Result<Port> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        let request = interface(&fd)?;
        // SAFETY: TUNGETIFF set this member.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let headers = flags & IFF_VNET_HDR != 0;
        if headers {
            let size = HEADER as libc::c_int;
            // SAFETY: TUNSETVNETHDRSZ reads one int.
            if unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &size) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(Port {
            fd,
            headers,
            detachable: flags & IFF_MULTI_QUEUE != 0,
        })
    }

    /// A socket on which each datagram is one Ethernet frame.
    ///
    /// # Errors
    /// Where it cannot be made non-blocking.
    pub fn datagrams(fd: OwnedFd) -> std::io::Result<Port> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Port {
            fd,
            headers: false,
            detachable: false,
        })
    }

    /// The interface's largest packet.
    ///
    /// # Errors
    /// Where the host does not say.
    pub fn mtu(&self) -> std::io::Result<u16> {
        let mut request = interface(&self.fd)?;
        // SAFETY: SIOCGIFMTU reads the name and fills the MTU of one ifreq, which `request` is.
        if unsafe { libc::ioctl(socket()?.as_raw_fd(), libc::SIOCGIFMTU, &mut request) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: SIOCGIFMTU set this member.
        Ok(unsafe { request.ifr_ifru.ifru_mtu }.clamp(68, 65535) as u16)
    }

    /// Lets the host leave to the guest what the guest's features say that it can do itself.
    pub(super) fn set_offloads(&self, features: u64) {
        if !self.headers {
            return;
        }
        let mut offloads = 0;
        for (feature, offload) in [
            (GUEST_CSUM, TUN_F_CSUM),
            (GUEST_TSO4, TUN_F_TSO4),
            (GUEST_TSO6, TUN_F_TSO6),
            (GUEST_ECN, TUN_F_TSO_ECN),
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
            tracing::debug!(
                "the tap refuses offloads {offloads:#x}: {}",
                std::io::Error::last_os_error()
            );
        }
    }

    /// Puts this queue into or out of service: the host spreads frames over those in service alone.
    pub(super) fn set_active(&self, active: bool) {
        if !self.detachable {
            return;
        }
        let mut request = empty_request();
        request.ifr_ifru.ifru_flags = if active {
            IFF_ATTACH_QUEUE
        } else {
            IFF_DETACH_QUEUE
        };
        // SAFETY: TUNSETQUEUE reads one ifreq. It fails where the queue is so already, which is what is wanted.
        unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETQUEUE, &request) };
    }

    /// Bytes of the header that the guest's buffers have and the descriptor does not.
    pub(super) fn missing_header(&self) -> usize {
        if self.headers { 0 } else { HEADER }
    }
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
