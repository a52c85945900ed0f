//! What the daemon asks of the gateway: one request, one answer, each a JSON packet on a seqpacket socket.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::endpoint::Protocol;

/// Of the packets. A daemon that finds another ends the gateway and starts its own for the same namespace, so `Hello`
/// and `End` stay as they are.
pub(super) const VERSION: u32 = 1;
const MOST_BYTES: usize = 4096;

pub(super) fn socket_path(run: &Path) -> PathBuf {
    run.join("gateway.sock")
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// First of all. It may carry the namespace to serve, for a gateway that has none yet.
    Hello,
    /// Listens at `address` on the host for connections (or datagrams) to `target` in the namespace. Asked again for what is
    /// there already, it stays.
    Publish {
        protocol: Protocol,
        address: SocketAddr,
        target: SocketAddr,
    },
    Withdraw {
        protocol: Protocol,
        address: SocketAddr,
    },
    /// Ends what a former daemon published and this one did not ask for.
    Settle,
    End,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    /// Carries the namespace.
    Hello {
        version: u32,
        pid: i32,
    },
    Done,
    /// The port, which the kernel chose where 0 was asked for.
    Published {
        port: u16,
    },
    /// `errno` where the kernel refused.
    Failed {
        errno: Option<i32>,
        message: String,
    },
}

/// Sends one packet.
pub(super) fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if let Some(fd) = &fd {
        ancillary.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(fd)));
    }
    loop {
        match sendmsg(
            socket,
            &[IoSlice::new(&bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        ) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits for one packet and the descriptor it may carry.
///
/// # Errors
/// `UnexpectedEof` where the other side has closed, `InvalidData` for what is no message.
pub(super) fn receive<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> io::Result<(T, Option<OwnedFd>)> {
    let mut bytes = [0u8; MOST_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        match recvmsg(
            socket.as_fd(),
            &mut buffers,
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    let fd = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "an oversized packet",
        ));
    }
    let message = serde_json::from_slice(&bytes[..received.bytes])?;
    Ok((message, fd))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    #[test]
    fn a_packet_brings_its_descriptor_and_nonsense_is_refused() {
        let pair = || {
            let flags = SocketFlags::CLOEXEC;
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
        };
        let (one, two) = pair();
        let file = tempfile::tempfile().unwrap();
        send(one.as_fd(), &Request::Hello, Some(file.as_fd())).unwrap();
        let (request, fd) = receive::<Request>(two.as_fd()).unwrap();
        assert!(matches!(request, Request::Hello) && fd.is_some());
        let target = "10.0.0.2:80".parse().unwrap();
        let address = "[::]:8080".parse().unwrap();
        let protocol = Protocol::Udp;
        send(
            one.as_fd(),
            &Request::Publish {
                protocol,
                address,
                target,
            },
            None,
        )
        .unwrap();
        let (request, fd) = receive::<Request>(two.as_fd()).unwrap();
        assert!(fd.is_none());
        assert!(matches!(request, Request::Publish { address: a, .. } if a == address));
        rustix::io::write(&one, b"{\"what\":1}").unwrap();
        let error = receive::<Request>(two.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(one);
        let error = receive::<Request>(two.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
