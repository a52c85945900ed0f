//! Network devices of the host that move into a container (runtime-spec 1.3, config-linux "Network Devices").
//!
//! One rtnetlink(7) request moves a device and names it; its permanent addresses of global scope, which the kernel
//! drops on the way, are read before and given back, and the device is set up. What happens to the device when the
//! namespace ends is the kernel's: a physical one comes back to the host.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use oci_spec::runtime::LinuxNetDevice;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::error::{Context, Error, Result};
use crate::syscall;

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CREATE_EXCL: u16 = 0x600;
const IFLA_IFNAME: u16 = 3;
const IFLA_NET_NS_FD: u16 = 28;
const IFA_CACHEINFO: u16 = 6;
const IFA_FLAGS: u16 = 8;
const IFA_F_PERMANENT: u32 = 0x80;
/// No duplicate address detection: the address was in use on this device a moment ago.
const IFA_F_NODAD: u32 = 0x02;
const HEADER: usize = 16;

/// What can be told wrong from the configuration alone.
///
/// # Errors
/// [`Error::Invalid`] naming the device.
pub(crate) fn validate(devices: &HashMap<String, LinuxNetDevice>) -> Result<()> {
    for (name, device) in devices {
        let inside = device.name().as_deref().filter(|inside| !inside.is_empty());
        if !is_name(name) || name.contains('%') {
            return Err(Error::invalid(format!(
                "config.json: linux.netDevices: {name:?} is no name of a network device"
            )));
        }
        if let Some(inside) = inside.filter(|inside| !is_name(inside)) {
            return Err(Error::invalid(format!(
                "config.json: linux.netDevices.{name}: {inside:?} is no name of a network device"
            )));
        }
    }
    Ok(())
}

/// As the kernel's `dev_valid_name`.
fn is_name(name: &str) -> bool {
    (1..16).contains(&name.len())
        && name != "."
        && name != ".."
        && !name
            .bytes()
            .any(|byte| byte == b'/' || byte == b':' || byte == 0 || byte.is_ascii_whitespace())
}

/// Moves the devices from this process's network namespace into `target`.
pub(crate) fn move_all(
    devices: &HashMap<String, LinuxNetDevice>,
    target: BorrowedFd<'_>,
) -> Result<()> {
    if devices.is_empty() {
        return Ok(());
    }
    let mut here = Netlink::open().during(|| "open a netlink socket".into())?;
    let mut there = open_inside(target)?;
    let mut names: Vec<_> = devices.iter().collect();
    names.sort_unstable_by_key(|(name, _)| *name);
    for (name, device) in names {
        let inside = device.name().as_deref().filter(|inside| !inside.is_empty());
        let inside = inside.unwrap_or(name);
        move_one(&mut here, &mut there, target, name, inside)
            .during(|| format!("move the network device {name} into the container as {inside}"))?;
    }
    Ok(())
}

/// A socket belongs to the namespace it was made in, so this process is there only for that moment.
fn open_inside(target: BorrowedFd<'_>) -> Result<Netlink> {
    let own = rustix::fs::open(
        "/proc/self/ns/net",
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .during(|| "open the own network namespace".into())?;
    syscall::setns(target, libc::CLONE_NEWNET)
        .during(|| "enter the container's network namespace".into())?;
    let socket = Netlink::open();
    syscall::setns(own.as_fd(), libc::CLONE_NEWNET)
        .during(|| "return to the own network namespace".into())?;
    socket.during(|| "open a netlink socket in the container's network namespace".into())
}

fn move_one(
    here: &mut Netlink,
    there: &mut Netlink,
    target: BorrowedFd<'_>,
    name: &str,
    inside: &str,
) -> io::Result<()> {
    let links = here.request(RTM_GETLINK, NLM_F_DUMP, &link_header(0, false), &[])?;
    let index = links
        .iter()
        .find(|link| attribute(link, HEADER, IFLA_IFNAME).is_some_and(|it| text(it) == name))
        .and_then(|link| index_of(link))
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
    let addresses = here.request(RTM_GETADDR, NLM_F_DUMP, &[0; 8], &[])?;
    let addresses: Vec<&[u8]> = addresses
        .iter()
        .map(Vec::as_slice)
        .filter(|address| keeps(address, index))
        .collect();
    let indices = |there: &mut Netlink| -> io::Result<Vec<i32>> {
        let links = there.request(RTM_GETLINK, NLM_F_DUMP, &link_header(0, false), &[])?;
        Ok(links.iter().filter_map(|link| index_of(link)).collect())
    };
    let before = indices(there)?;
    let mut attributes = Vec::new();
    push(
        &mut attributes,
        IFLA_NET_NS_FD,
        &target.as_raw_fd().to_ne_bytes(),
    );
    push(
        &mut attributes,
        IFLA_IFNAME,
        &[inside.as_bytes(), &[0]].concat(),
    );
    here.request(
        RTM_SETLINK,
        NLM_F_ACK,
        &link_header(index, false),
        &attributes,
    )?;
    // Its number, and with a pattern for a name (`eth%d`) its name too, may be others there.
    let moved = indices(there)?
        .into_iter()
        .find(|index| !before.contains(index))
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
    for address in addresses {
        let (header, attributes) = readdress(address, moved);
        there.request(
            RTM_NEWADDR,
            NLM_F_ACK | NLM_F_CREATE_EXCL,
            &header,
            &attributes,
        )?;
    }
    there.request(RTM_NEWLINK, NLM_F_ACK, &link_header(moved, true), &[])?;
    Ok(())
}

/// `struct ifinfomsg`; `up` sets IFF_UP and leaves the rest.
fn link_header(index: i32, up: bool) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    if up {
        header[8..12].copy_from_slice(&1u32.to_ne_bytes());
        header[12..16].copy_from_slice(&1u32.to_ne_bytes());
    }
    header
}

fn index_of(link: &[u8]) -> Option<i32> {
    Some(i32::from_ne_bytes(link.get(4..8)?.try_into().ok()?))
}

/// Whether this `struct ifaddrmsg` is of the device, permanent, and of global scope.
fn keeps(address: &[u8], index: i32) -> bool {
    let Some(&[_, _, flags, scope, a, b, c, d]) = address.first_chunk::<8>() else {
        return false;
    };
    let flags = attribute(address, 8, IFA_FLAGS)
        .and_then(|bytes| Some(u32::from_ne_bytes(bytes.try_into().ok()?)))
        .unwrap_or(flags.into());
    i32::from_ne_bytes([a, b, c, d]) == index && flags & IFA_F_PERMANENT != 0 && scope == 0
}

/// The same address for another device.
fn readdress(address: &[u8], index: i32) -> ([u8; 8], Vec<u8>) {
    let mut header = [0; 8];
    header.copy_from_slice(&address[..8]);
    header[2] = 0;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    let mut attributes = Vec::new();
    for (kind, value) in each_attribute(address.get(8..).unwrap_or_default()) {
        // Its age is not kept, and of its flags none that the kernel sets itself.
        if kind != IFA_CACHEINFO && kind != IFA_FLAGS {
            push(&mut attributes, kind, value);
        }
    }
    push(
        &mut attributes,
        IFA_FLAGS,
        &(IFA_F_PERMANENT | IFA_F_NODAD).to_ne_bytes(),
    );
    (header, attributes)
}

fn push(attributes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    attributes.extend_from_slice(&(value.len() as u16 + 4).to_ne_bytes());
    attributes.extend_from_slice(&kind.to_ne_bytes());
    attributes.extend_from_slice(value);
    attributes.resize(attributes.len().next_multiple_of(4), 0);
}

/// The attributes of a message's tail; a broken one ends them.
fn each_attribute(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [a, b, c, d] = *rest.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        // The two highest bits say how it is encoded.
        Some((u16::from_ne_bytes([c, d]) & 0x3fff, value))
    })
}

fn attribute(message: &[u8], header: usize, wanted: u16) -> Option<&[u8]> {
    each_attribute(message.get(header..)?)
        .find_map(|(kind, value)| (kind == wanted).then_some(value))
}

fn text(value: &[u8]) -> &str {
    std::str::from_utf8(value)
        .unwrap_or_default()
        .trim_end_matches('\0')
}

/// A socket to the tables of one network namespace.
struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    fn open() -> io::Result<Netlink> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // NETLINK_ROUTE is protocol 0.
            None,
        )?;
        Ok(Netlink {
            socket,
            sequence: 0,
        })
    }

    /// Sends one request and returns the bodies of its answers, until the kernel's acknowledgement or the dump's end.
    fn request(
        &mut self,
        kind: u16,
        flags: u16,
        header: &[u8],
        attributes: &[u8],
    ) -> io::Result<Vec<Vec<u8>>> {
        self.sequence += 1;
        let length = HEADER + header.len() + attributes.len();
        let mut message = Vec::with_capacity(length);
        message.extend_from_slice(&(length as u32).to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
        message.extend_from_slice(&self.sequence.to_ne_bytes());
        message.extend_from_slice(&[0; 4]);
        message.extend_from_slice(header);
        message.extend_from_slice(attributes);
        rustix::net::send(&self.socket, &message, SendFlags::empty())?;
        let mut answers = Vec::new();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let (length, _) =
                rustix::net::recv(&self.socket, buffer.as_mut_slice(), RecvFlags::empty())?;
            let mut rest = &buffer[..length];
            while let Some(head) = rest.first_chunk::<HEADER>() {
                let number = |at: usize| {
                    u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]])
                };
                let length = number(0) as usize;
                let Some(body) = rest.get(HEADER..length) else {
                    return Err(io::Error::from(io::ErrorKind::InvalidData));
                };
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                if number(8) != self.sequence {
                    continue;
                }
                match u16::from_ne_bytes([head[4], head[5]]) {
                    NLMSG_DONE => return Ok(answers),
                    NLMSG_ERROR => {
                        let code = body
                            .first_chunk::<4>()
                            .map_or(-libc::EIO, |code| i32::from_ne_bytes(*code));
                        return if code == 0 {
                            Ok(answers)
                        } else {
                            Err(io::Error::from_raw_os_error(-code))
                        };
                    }
                    _ => answers.push(body.to_vec()),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_the_kernels() {
        assert!(is_name("eth0") && is_name("a.b") && is_name("net%d"));
        assert!(!is_name("") && !is_name("..") && !is_name("a/b") && !is_name("a b"));
        assert!(!is_name("sixteen-letters-"));
    }

    #[test]
    fn attributes_written_are_attributes_read() {
        let mut bytes = vec![0; 8];
        push(&mut bytes, 3, b"abc");
        push(&mut bytes, IFA_FLAGS, &0x80u32.to_ne_bytes());
        assert_eq!(attribute(&bytes, 8, 3), Some(&b"abc"[..]));
        assert!(keeps(&bytes, 0) && !keeps(&bytes, 1));
        let (header, again) = readdress(&bytes, 7);
        assert_eq!(
            i32::from_ne_bytes([header[4], header[5], header[6], header[7]]),
            7
        );
        assert_eq!(each_attribute(&again).count(), 2);
    }

    proptest! {
        #[test]
        fn no_answer_panics(bytes in proptest::collection::vec(any::<u8>(), 8..64)) {
            let _ = keeps(&bytes, 1);
            let _ = readdress(&bytes, 1);
            let _ = attribute(&bytes, HEADER, IFLA_IFNAME).map(text);
        }
    }
}
