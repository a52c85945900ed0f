//! A machine's ways onto its networks: taps that the daemon passed, and user-mode networks of this process's own.

use std::any::Any;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;

use super::jail::{self, Thread};
use super::{ProcessNetwork, UserNetworks};
use crate::boot::BootError;
use crate::virtio::net::{Net, Port};

/// One network interface's way out; it outlives each machine of a reset.
pub(super) struct Link {
    fd: OwnedFd,
    network: ProcessNetwork,
    /// The user-mode network at the other end.
    _user: Option<Box<dyn Any + Send>>,
}

impl Link {
    pub(super) fn open(
        network: &ProcessNetwork,
        user_networks: UserNetworks,
    ) -> Result<Link, BootError> {
        let (fd, user) = match &network.user {
            None => {
                // SAFETY: the daemon passed these descriptors to this process alone and wrote their numbers;
                // this is the only place that takes them, once.
                (unsafe { OwnedFd::from_raw_fd(network.descriptor) }, None)
            }
            Some(wish) => {
                let (ours, theirs) = datagrams().map_err(BootError::Link)?;
                let confine = || jail::confine(Thread::Network);
                let user = user_networks(wish, network.mac, theirs, confine)
                    .map_err(|why| BootError::Network { why })?;
                (ours, Some(user))
            }
        };
        Ok(Link {
            fd,
            network: network.clone(),
            _user: user,
        })
    }

    pub(super) fn card(&self, index: usize) -> Result<Net, BootError> {
        let port = rustix::io::fcntl_dupfd_cloexec(&self.fd, 0)
            .map_err(std::io::Error::from)
            .and_then(|fd| match self.network.user {
                None => Port::tap(fd),
                Some(_) => Port::datagrams(fd),
            })
            .map_err(|source| BootError::Read {
                what: "the network interface",
                path: PathBuf::from(format!("net{index}")),
                source,
            })?;
        let mtu = self.network.mtu.unwrap_or(1500);
        Ok(Net::new(port, self.network.mac, mtu))
    }
}

/// Two ends of a link on which each datagram is a frame.
///
/// # Errors
/// Where the host gives no sockets.
pub fn datagrams() -> std::io::Result<(OwnedFd, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}
