//! What daemon and keeper say to each other.
//!
//! One `SOCK_SEQPACKET` unix socket, one JSON document per packet, descriptors beside it (`SCM_RIGHTS`). The
//! socket keeps the boundaries, so there is no length to lie about; a packet above [`MAX_MESSAGE`] ends the
//! connection. Anything long (the OCI spec, the layers, the environment) lies in a file of the container's run folder.
//!
//! ```text
//! daemon                                  keeper
//!   Hello { version }            ──▶
//!                                ◀──  Hello { version, pid }
//!                                ◀──  Process { … }            one per process it holds, exits missed included
//!                                ◀──  Ready
//!   Create { id, directory } +netns ──▶      the init is made and waits
//!                                ◀──  Spawned { pid } | Failed
//!   Start { id }                 ──▶         it execs
//!                                ◀──  Done | Failed
//!   Attach { id, … } +socket     ──▶         before or after Create
//!                                ◀──  Attached
//!                                ◀──  Exited { id, exit }      unasked; exit.json was written before
//!   Forget { id }                ──▶         the exit has been taken note of
//! ```
//!
//! Requests carry a serial which their answer repeats. A newer daemon may speak to an older keeper (it outlives
//! upgrades): fields are only added, and [`VERSION`] grows when that is not enough.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use base::{Kind, pidfd::ProcessKey};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

/// The protocol this build speaks.
pub const VERSION: u32 = 2;
/// The longest packet, bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// The most descriptors beside one packet.
pub const MAX_FDS: usize = 2;

/// From the daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// The first message of a connection; an older connection is then closed.
    Hello { version: u32 },
    /// Makes the init of a container from `directory/launch.json` and `directory/config.json`.
    /// Beside it: the network namespace, where it has one of its own.
    Create {
        serial: u64,
        id: String,
        directory: PathBuf,
    },
    /// Lets a created init exec.
    Start { serial: u64, id: String },
    /// Kills a created init that was never started.
    Discard { serial: u64, id: String },
    /// Starts a process in the container `container` from the [`Exec`] record in `record`.
    Exec {
        serial: u64,
        id: String,
        container: String,
        record: PathBuf,
    },
    /// Beside it: one end of a stream socket, the other end of which is the client's.
    Attach {
        serial: u64,
        id: String,
        stdin: bool,
        stdout: bool,
        stderr: bool,
        detach_keys: Vec<u8>,
    },
    /// Sends a signal to one process.
    Signal {
        serial: u64,
        id: String,
        signal: i32,
    },
    /// Sets a terminal's size.
    Resize {
        serial: u64,
        id: String,
        rows: u16,
        columns: u16,
    },
    /// An exit has been taken note of.
    Forget { id: String },
    /// Exit, if nothing is held.
    Quit,
}

/// From the keeper.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    Hello {
        version: u32,
        pid: i32,
    },
    Process(Held),
    Ready,
    /// To Create and Exec.
    Spawned {
        serial: u64,
        process: ProcessKey,
    },
    /// To Attach; the log holds exactly what was output before `at`.
    Attached {
        serial: u64,
        at: String,
    },
    Done {
        serial: u64,
    },
    Failed {
        serial: u64,
        kind: FailureKind,
        message: String,
    },
    Exited {
        id: String,
        exit: Exit,
    },
    /// A client typed the detach keys.
    Detached {
        id: String,
    },
}

/// A process the keeper holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Held {
    pub id: String,
    /// The container it was exec'd in; `None` for an init.
    #[serde(default)]
    pub container: Option<String>,
    pub process: ProcessKey,
    /// `None` while it lives.
    #[serde(default)]
    pub exit: Option<Exit>,
}

/// How a process ended. Also the content of `exit.json` in a container's run folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// The exit status, or 128 plus the signal's number.
    pub code: i32,
    /// Whether the kernel killed a process of it for want of memory.
    #[serde(default)]
    pub oom: bool,
    /// RFC 3339.
    pub finished: String,
    /// Which process, so that a record of an earlier run is not taken for this one's.
    pub pid: i32,
}

/// [`Kind`], on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    Invalid,
    NotFound,
    Conflict,
    Capacity,
    Permission,
    Unsupported,
    Internal,
}

impl From<Kind> for FailureKind {
    fn from(kind: Kind) -> FailureKind {
        match kind {
            Kind::Invalid => FailureKind::Invalid,
            Kind::NotFound => FailureKind::NotFound,
            Kind::Conflict | Kind::NotModified => FailureKind::Conflict,
            Kind::Capacity => FailureKind::Capacity,
            Kind::Permission => FailureKind::Permission,
            Kind::Unsupported => FailureKind::Unsupported,
            Kind::Internal => FailureKind::Internal,
        }
    }
}

impl From<FailureKind> for Kind {
    fn from(kind: FailureKind) -> Kind {
        match kind {
            FailureKind::Invalid => Kind::Invalid,
            FailureKind::NotFound => Kind::NotFound,
            FailureKind::Conflict => Kind::Conflict,
            FailureKind::Capacity => Kind::Capacity,
            FailureKind::Permission => Kind::Permission,
            FailureKind::Unsupported => Kind::Unsupported,
            FailureKind::Internal => Kind::Internal,
        }
    }
}

/// `launch.json`: what `Create` needs beside the OCI spec.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Launch {
    pub root: Root,
    /// The cgroup's path below each hierarchy's root.
    pub cgroup: String,
    /// The init of the container whose `/dev/shm` is this one's too.
    #[serde(default)]
    pub shared_memory_of: Option<i32>,
    pub stdio: StdioRecord,
    pub log: LogRecord,
}

/// What the container's root is mounted from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Root {
    /// Topmost first.
    pub lower: Vec<PathBuf>,
    pub upper: PathBuf,
    pub work: PathBuf,
}

/// How a process's standard streams are made.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StdioRecord {
    pub terminal: bool,
    /// Whether stdin is open at all.
    pub stdin: bool,
    /// Whether stdin ends with the first client that attached to it.
    pub stdin_once: bool,
    #[serde(default)]
    pub rows: u16,
    #[serde(default)]
    pub columns: u16,
}

/// How output is logged.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LogRecord {
    /// `None` logs nothing.
    pub path: Option<PathBuf>,
    /// Bytes; 0 never rotates.
    pub max_size: u64,
    pub max_files: u32,
    /// Written to each line, for `logs --details`.
    #[serde(default)]
    pub attributes: std::collections::BTreeMap<String, String>,
}

/// The record `Exec` reads: an OCI process and its streams.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Exec {
    pub process: oci_spec::runtime::Process,
    pub stdio: StdioRecord,
}

/// A packet cannot be sent or understood.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    #[error("the other side has closed the connection")]
    Closed,
    #[error("a message of {0} bytes is above the limit of {MAX_MESSAGE}")]
    TooLong(usize),
    #[error(
        "a message was cut off: it is above the limit of {MAX_MESSAGE} bytes or carries too many descriptors"
    )]
    Truncated,
    #[error("a message cannot be read: {0}")]
    Malformed(#[from] serde_json::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The bytes of a message.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, ProtocolError> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE {
        Err(ProtocolError::TooLong(bytes.len()))
    } else {
        Ok(bytes)
    }
}

/// The message in `bytes`.
pub fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, ProtocolError> {
    Ok(serde_json::from_slice(bytes)?)
}

/// Sends one packet.
///
/// # Errors
/// [`ProtocolError::Io`] with `WouldBlock` where the socket's buffer is full.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ProtocolError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(ProtocolError::Truncated);
    }
    match sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    ) {
        Ok(_) => Ok(()),
        Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => Err(ProtocolError::Closed),
        Err(error) => Err(ProtocolError::Io(error.into())),
    }
}

/// Receives one packet into `buffer` (of at least [`MAX_MESSAGE`] bytes).
///
/// # Errors
/// [`ProtocolError::Truncated`] for what does not fit; descriptors received with it are closed.
pub fn receive(
    socket: impl AsFd,
    buffer: &mut [u8],
) -> Result<(&[u8], Vec<OwnedFd>), ProtocolError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = match recvmsg(
        socket,
        &mut [IoSliceMut::new(buffer)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    ) {
        Ok(received) => received,
        Err(rustix::io::Errno::CONNRESET) => return Err(ProtocolError::Closed),
        Err(error) => return Err(ProtocolError::Io(error.into())),
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            fds.extend(passed);
        }
    }
    if received
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(ProtocolError::Truncated);
    }
    if received.bytes == 0 {
        return Err(ProtocolError::Closed);
    }
    Ok((&buffer[..received.bytes], fds))
}

/// Where the keeper of a run folder listens.
pub fn socket_path(run: &Path) -> PathBuf {
    run.join("keeper.sock")
}

/// Fuzz entry: no bytes make either side panic.
pub fn fuzz_messages(data: &[u8]) {
    let _ = decode::<Request>(data);
    let _ = decode::<Reply>(data);
    let _ = decode::<Launch>(data);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap()
    }

    fn survives<T: Serialize + for<'a> Deserialize<'a> + PartialEq + std::fmt::Debug>(message: T) {
        let (a, b) = pair();
        let mut buffer = vec![0; MAX_MESSAGE];
        send(&a, &encode(&message).unwrap(), &[]).unwrap();
        let (bytes, fds) = receive(&b, &mut buffer).unwrap();
        assert_eq!(decode::<T>(bytes).unwrap(), message);
        assert!(fds.is_empty());
    }

    macro_rules! round_trips {
        ($($name:ident: $message:expr;)*) => { $( #[test] fn $name() { survives($message); } )* };
    }

    fn key() -> ProcessKey {
        ProcessKey {
            pid: 7,
            start_ticks: 8,
        }
    }

    fn exit() -> Exit {
        Exit {
            code: 137,
            oom: true,
            finished: base::time::now_rfc3339(),
            pid: 7,
        }
    }

    round_trips! {
        hello_survives_the_socket: Request::Hello { version: VERSION };
        create_survives_the_socket: Request::Create { serial: 1, id: "a".into(), directory: "/run/a".into() };
        start_survives_the_socket: Request::Start { serial: 2, id: "a".into() };
        discard_survives_the_socket: Request::Discard { serial: 2, id: "a".into() };
        exec_survives_the_socket: Request::Exec { serial: 3, id: "e".into(), container: "a".into(), record: "/run/e".into() };
        attach_survives_the_socket: Request::Attach { serial: 4, id: "a".into(), stdin: true, stdout: true, stderr: false, detach_keys: vec![16, 17] };
        signal_survives_the_socket: Request::Signal { serial: 5, id: "a".into(), signal: 15 };
        resize_survives_the_socket: Request::Resize { serial: 6, id: "a".into(), rows: 24, columns: 80 };
        forget_survives_the_socket: Request::Forget { id: "a".into() };
        quit_survives_the_socket: Request::Quit;
        hello_reply_survives_the_socket: Reply::Hello { version: VERSION, pid: 3 };
        process_survives_the_socket: Reply::Process(Held { id: "a".into(), container: None, process: key(), exit: Some(exit()) });
        ready_survives_the_socket: Reply::Ready;
        spawned_survives_the_socket: Reply::Spawned { serial: 1, process: key() };
        attached_survives_the_socket: Reply::Attached { serial: 1, at: base::time::now_rfc3339() };
        done_survives_the_socket: Reply::Done { serial: 1 };
        failed_survives_the_socket: Reply::Failed { serial: 1, kind: FailureKind::NotFound, message: "exec: \"x\"".into() };
        exited_survives_the_socket: Reply::Exited { id: "a".into(), exit: exit() };
        detached_survives_the_socket: Reply::Detached { id: "a".into() };
    }

    #[test]
    fn descriptors_arrive_beside_their_message() {
        let (a, b) = pair();
        let (passed, kept) = rustix::pipe::pipe().unwrap();
        send(&a, b"1", &[passed.as_fd()]).unwrap();
        drop(passed);
        let mut buffer = vec![0; MAX_MESSAGE];
        let (_, fds) = receive(&b, &mut buffer).unwrap();
        rustix::io::write(&kept, b"x").unwrap();
        let mut byte = [0u8; 1];
        rustix::io::read(&fds[0], &mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn a_packet_above_the_limit_is_refused_by_both_sides() {
        let long = Request::Forget {
            id: "x".repeat(MAX_MESSAGE),
        };
        assert!(matches!(encode(&long), Err(ProtocolError::TooLong(_))));
        let (a, b) = pair();
        send(&a, &vec![b' '; MAX_MESSAGE + 1], &[]).unwrap();
        let mut buffer = vec![0; MAX_MESSAGE];
        assert!(matches!(
            receive(&b, &mut buffer),
            Err(ProtocolError::Truncated)
        ));
    }

    #[test]
    fn too_many_descriptors_are_refused_and_closed() {
        let (a, b) = pair();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [writer.as_fd(); 16];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&a, &[IoSlice::new(b"1")], &mut control, SendFlags::empty()).unwrap();
        let mut buffer = vec![0; MAX_MESSAGE];
        assert!(matches!(
            receive(&b, &mut buffer),
            Err(ProtocolError::Truncated)
        ));
        drop(writer);
        let mut byte = [0u8; 1];
        assert_eq!(
            rustix::io::read(&reader, &mut byte).unwrap(),
            0,
            "all copies are closed"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            fuzz_messages(&bytes);
        }
    }
}
