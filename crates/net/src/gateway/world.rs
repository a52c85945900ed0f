//! The networks' namespace and its way out.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};
use rustix::thread::UnshareFlags;
use tokio::runtime::{Builder, Handle};

use crate::address::{Mac, Subnet};
use crate::namespace::{alone, enter, settle, within};
use crate::netlink::{LinkChange, Netlink};
use crate::user::{Header, UserConfig};

/// The interface in the networks' namespace, and its other end.
const UPLINK: &str = "uplink";
const WIRE: &str = "wire";
/// The addresses of a translator's own link (RFC 7335), which lead nowhere else and so hide nobody.
const OWN: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 1);
const PREFIX: u8 = 29;
/// The longest packet.
const MTU: u32 = 65_535;

// <linux/if_packet.h>, <linux/if_ether.h>
const SOL_PACKET: libc::c_int = 263;
const PACKET_VNET_HDR: libc::c_int = 15;
const ETH_P_ALL: u16 = 3;

/// A namespace with an uplink, and a thread that makes sockets in it.
pub(super) struct World {
    pub netns: OwnedFd,
    /// Frames of the uplink, each after a virtio header.
    pub link: OwnedFd,
    /// What the user-mode network must know of them.
    pub config: UserConfig,
    /// Tasks that connect to containers.
    pub inside: Handle,
    interfaces: Netlink,
}

impl World {
    /// Lays the uplink in `netns`, or in a namespace made for it. All of it ends with this process, but for what else
    /// holds the namespace.
    pub(super) fn lay(netns: Option<OwnedFd>) -> io::Result<World> {
        let (made, wait) = mpsc::channel();
        // Sockets belong to the namespace of the thread that makes them: this one stays inside.
        thread::Builder::new()
            .name("berth-inside".into())
            .spawn(move || {
                let laid = lay_here(netns).and_then(|laid| {
                    let runtime = Builder::new_current_thread().enable_all().build()?;
                    base::privileges::drop_all()?;
                    Ok((laid, runtime))
                });
                match laid {
                    Ok((laid, runtime)) => {
                        let world = World {
                            inside: runtime.handle().clone(),
                            netns: laid.netns,
                            link: laid.link,
                            config: laid.config,
                            interfaces: laid.interfaces,
                        };
                        if made.send(Ok(world)).is_ok() {
                            runtime.block_on(std::future::pending::<()>());
                        }
                    }
                    Err(error) => drop(made.send(Err(error))),
                }
            })?;
        wait.recv()
            .unwrap_or_else(|_| Err(io::Error::other("the namespace thread panicked")))
    }

    /// Whether a container or a machine has an interface in the namespace.
    pub(super) fn is_used(&mut self) -> bool {
        // Where that cannot be known, nobody is cut off.
        self.interfaces.links().map_or(true, |links| {
            links
                .iter()
                .any(|link| link.name.starts_with("bv") || link.name.starts_with("bt"))
        })
    }
}

/// A [`World`] without its thread.
struct Laid {
    netns: OwnedFd,
    link: OwnedFd,
    config: UserConfig,
    interfaces: Netlink,
}

fn lay_here(netns: Option<OwnedFd>) -> io::Result<Laid> {
    let netns = match netns {
        Some(netns) => {
            enter(netns.as_fd())?;
            netns
        }
        None => {
            // SAFETY: only this thread's network namespace changes; it has no sockets yet.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
            settle()?
        }
    };
    let mut netlink = Netlink::open()?;
    let outer = alone()?;
    // That of a gateway that died goes a moment after it.
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        netlink.remove_link(UPLINK)?;
        match netlink.add_veth(UPLINK, WIRE, outer.netns.as_fd()) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) && Instant::now() < end => {
                thread::sleep(Duration::from_millis(20));
            }
            other => break other?,
        }
    }
    let missing = || io::Error::new(io::ErrorKind::NotFound, "the new uplink is gone");
    let link = netlink.link(UPLINK)?.ok_or_else(missing)?;
    let guest = Subnet::new(OWN.into(), PREFIX).ok_or(io::ErrorKind::InvalidInput)?;
    let up = LinkChange {
        up: Some(true),
        mtu: Some(MTU),
        ..LinkChange::default()
    };
    let wire = within(outer.netns.as_fd(), || {
        let mut netlink = Netlink::open()?;
        let wire = netlink.link(WIRE)?.ok_or_else(missing)?;
        netlink.set_link(wire.index, &up)?;
        open_wire(wire.index)
    })?;
    netlink.add_address(link.index, guest)?;
    netlink.set_link(link.index, &up)?;
    netlink.replace_default_route(GATEWAY.into(), link.index)?;
    let mut config = UserConfig::new(link.mac.unwrap_or(Mac([2, 0, 0, 0, 0, 1])));
    config.guest = guest;
    config.gateway = GATEWAY;
    config.header = Header::Virtio;
    config.most_flows = 8192;
    Ok(Laid {
        netns,
        link: wire,
        config,
        interfaces: netlink,
    })
}

/// A packet socket on an interface of the calling thread's namespace: all it receives, each frame after a
/// `virtio_net_hdr`.
fn open_wire(index: u32) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    // Of no protocol until it is bound, lest it hear other interfaces.
    let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None)?;
    let on: libc::c_int = 1;
    // SAFETY: the option reads one int, which `on` is, alive over the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            SOL_PACKET,
            PACKET_VNET_HDR,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    // As much as the host allows.
    let _ = sockopt::set_socket_recv_buffer_size(&socket, 16 << 20);
    let _ = sockopt::set_socket_send_buffer_size(&socket, 16 << 20);
    // SAFETY: sockaddr_ll is plain data for which all zeroes is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ETH_P_ALL.to_be();
    address.sll_ifindex = index.cast_signed();
    // SAFETY: the pointer and the length are those of `address`, alive over the call.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if bound < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

/// Tries whether the calling user could have such networks, and leaves nothing. For a process with one thread that ends next.
///
/// # Errors
/// What the host refuses.
pub(super) fn probe() -> io::Result<()> {
    let failed =
        |what: &str, error: &dyn std::fmt::Display| io::Error::other(format!("{what}: {error}"));
    if !rustix::process::geteuid().is_root() {
        let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
        // SAFETY: there is one thread, and no descriptor changes its meaning.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) }
            .map_err(|errno| failed("no user namespace", &errno))?;
        std::fs::write("/proc/self/setgroups", "deny")?;
        std::fs::write("/proc/self/uid_map", format!("0 {} 1", user.as_raw()))?;
        std::fs::write("/proc/self/gid_map", format!("0 {} 1", group.as_raw()))?;
    }
    let laid =
        lay_here(None).map_err(|error| failed("no network namespace with a way out", &error))?;
    // It is in that namespace now, and so is what it runs.
    let table = "add table inet berth-probe\ndelete table inet berth-probe\n";
    crate::firewall::run_nft(&["-f", "-"], table)
        .map_err(|error| failed("no firewall rules", &error))?;
    drop(laid);
    Ok(())
}
