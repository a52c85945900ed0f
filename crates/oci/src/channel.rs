//! The conversation between the runtime and a container's first process, over a SEQPACKET socket pair.
//!
//! ```text
//! runtime ──m──▶ init   go on: id mappings, scope, network devices stand (only where one is asked for)
//! runtime ──p──▶ init   proceed: host pid, descriptors of v1 `tasks` files to join
//! init    ──T──▶ runtime   the terminal's master, by SCM_RIGHTS
//! init    ──H──▶ runtime   namespaces and mounts stand, the root is not switched: run the runtime's hooks
//! runtime ──h──▶ init   they ran
//! init    ──R──▶ runtime   ready, waiting at the gate
//! runtime ──s──▶ init   start
//! init    ──N──▶ runtime   number of the seccomp listener in init, which waits for `n`
//! init    ──X──▶ runtime   the next thing is execve: a closed channel after this means success
//! init    ──E──▶ runtime   it failed, and why
//! ```

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use base::Kind;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use crate::error::{Context, Error, Result};

/// More descriptors than one message ever carries.
const MOST_FDS: usize = 24;

/// One end of the conversation.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

/// One message: its letter, its bytes, its descriptors.
pub(crate) struct Message {
    pub tag: u8,
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Channel {
    /// Both ends, close-on-exec.
    pub fn pair() -> Result<(Channel, Channel)> {
        let (a, b) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .during(|| "socketpair".into())?;
        Ok((Channel(a), Channel(b)))
    }

    pub fn from_owned(fd: OwnedFd) -> Channel {
        Channel(fd)
    }

    pub fn send(&self, tag: u8, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let parts = [IoSlice::new(std::slice::from_ref(&tag)), IoSlice::new(body)];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Error::invalid("too many descriptors for one message"));
        }
        rustix::net::sendmsg(&self.0, &parts, &mut ancillary, SendFlags::NOSIGNAL)
            .during(|| "send to the other side of the container's channel".into())
            .map(drop)
    }

    /// A message by plain write(2), which every sensible seccomp profile lets pass.
    pub fn write(&self, tag: u8, body: &[u8]) -> Result<()> {
        let mut bytes = Vec::with_capacity(body.len() + 1);
        bytes.push(tag);
        bytes.extend_from_slice(body);
        rustix::io::write(&self.0, &bytes)
            .during(|| "write to the container's channel".into())
            .map(drop)
    }

    /// The next message; `None` when the other side has closed.
    pub fn receive(&self) -> Result<Option<Message>> {
        let mut bytes = vec![0u8; 16 * 1024];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
        loop {
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let received = rustix::net::recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            );
            let received = match received {
                Ok(received) => received,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                Err(errno) => return Err(errno).during(|| "read the container's channel".into()),
            };
            if received.bytes == 0 {
                return Ok(None);
            }
            let mut fds = Vec::new();
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
            let tag = bytes[0];
            bytes.truncate(received.bytes);
            bytes.remove(0);
            return Ok(Some(Message {
                tag,
                body: bytes,
                fds,
            }));
        }
    }

    /// One byte by plain read(2); `None` when the other side has closed.
    pub fn read_tag(&self) -> Option<u8> {
        let mut byte = [0u8; 1];
        loop {
            match rustix::io::read(&self.0, &mut byte) {
                Ok(1) => return Some(byte[0]),
                Err(rustix::io::Errno::INTR) => continue,
                _ => return None,
            }
        }
    }

    /// Waits for `tag`; an error message of the other side, or its end, is an error here.
    pub fn expect(&self, tag: u8) -> Result<Message> {
        match self.receive()? {
            Some(message) if message.tag == tag => Ok(message),
            Some(message) if message.tag == b'E' => Err(decode_error(&message.body)),
            Some(message) => Err(Error::invalid(format!(
                "unexpected message {:?} on the channel",
                message.tag as char
            ))),
            None => Err(Error::invalid(
                "the other side of the container's channel has gone",
            )),
        }
    }

    pub fn send_error(&self, error: &Error) {
        // Nothing can be done where even this fails: the other side then sees the end of the channel.
        let _ = self.write(b'E', &encode_error(error));
    }
}

fn encode_error(error: &Error) -> Vec<u8> {
    use base::Classified;
    let mut bytes = vec![kind_number(error.kind()), error.exit_status()];
    bytes.extend_from_slice(&error.errno().to_le_bytes());
    let text = error.to_string();
    bytes.extend_from_slice(&text.as_bytes()[..text.len().min(12 * 1024)]);
    bytes
}

/// Reads what [`encode_error`] wrote; whatever else comes becomes an internal error.
pub(crate) fn decode_error(bytes: &[u8]) -> Error {
    let (kind, status, errno) = match bytes {
        [kind, status, a, b, c, d, ..] => (*kind, *status, i32::from_le_bytes([*a, *b, *c, *d])),
        _ => (0, 1, 0),
    };
    let message = String::from_utf8_lossy(bytes.get(6..).unwrap_or_default()).into_owned();
    Error::Init {
        message,
        kind: kind_of_number(kind),
        errno,
        status,
    }
}

const KINDS: [Kind; 7] = [
    Kind::Internal,
    Kind::Invalid,
    Kind::NotFound,
    Kind::Conflict,
    Kind::Capacity,
    Kind::Permission,
    Kind::Unsupported,
];

fn kind_number(kind: Kind) -> u8 {
    KINDS.iter().position(|known| *known == kind).unwrap_or(0) as u8
}

fn kind_of_number(number: u8) -> Kind {
    KINDS
        .get(usize::from(number))
        .copied()
        .unwrap_or(Kind::Internal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::Classified;
    use proptest::prelude::*;

    #[test]
    fn an_error_keeps_its_kind_and_words_across_the_channel() {
        let error = Error::Executable {
            name: "x".into(),
            reason: "not found".into(),
            status: 127,
        };
        let back = decode_error(&encode_error(&error));
        assert_eq!(back.kind(), error.kind());
        assert_eq!(back.exit_status(), 127);
        assert_eq!(back.to_string(), error.to_string());
    }

    #[test]
    fn a_closed_channel_is_no_message() {
        let (a, b) = Channel::pair().unwrap();
        drop(b);
        assert!(a.receive().unwrap().is_none());
        assert!(a.send(b'm', &[], &[]).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode_error(&bytes).to_string();
        }
    }
}
