//! Sockets between host and guest (section 5.10), behind unix sockets on the host.
//!
//! ```text
//!   host program ── connect ──▶ PATH        "CONNECT 1024\n" ──▶ REQUEST to the guest's port 1024
//!                ◀──────────── "OK 5\n"                      ◀── RESPONSE (5 is our port)
//!                ◀══════════ bytes both ways ═══════════════▶ RW, with credit
//!
//!   guest program ── connects to port 52 of the host (cid 2) ──▶ REQUEST ──▶ connect to PATH_52
//! ```
//!
//! The guest's promises of buffer space are kept (5.10.6.3), and a guest that breaks ours loses its connection. A machine
//! that was saved comes back without connections, and its guest is told so (5.10.6.7).

mod connection;
mod packet;

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use self::connection::{Connection, Greeting, Phase, WINDOW};
use self::packet::operation::{
    CREDIT_REQUEST, CREDIT_UPDATE, DATA, REQUEST, RESET, RESPONSE, SHUTDOWN,
};
use self::packet::{HEADER, HOST_CID, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM};
use super::queue::Queue;
use super::{Backend, QueueError, Queues, config_bytes};
use crate::memory::Dma;
use crate::process::jail::Thread;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
/// Data in one packet, at most.
const CHUNK: usize = 16 * 1024;
const CONNECTIONS: usize = 256;
/// Packets of the guest taken in one go.
const TURN: usize = 256;
const LISTENER: u64 = u64::MAX;
/// Bytes of a unix socket's path (unix(7)), and of an underscore and the longest port.
const SOCKET_PATH: usize = 107;
const LONGEST_SUFFIX: usize = 11;
/// Our own ports begin here, far from those that host programs listen on.
const FIRST_PORT: u32 = 1 << 31;

/// A header-only packet on its way to the guest.
#[derive(Debug, Clone, Copy)]
struct Control {
    host_port: u32,
    guest_port: u32,
    operation: u16,
    flags: u32,
}

#[derive(Default)]
struct Inner {
    /// By a number of ours, which is also what epoll says.
    connections: BTreeMap<u32, Connection>,
    /// The number of each connection the guest knows of, by host's port and guest's port.
    known: BTreeMap<(u32, u32), u32>,
    control: VecDeque<Control>,
    next: u32,
    /// The guest gives no buffers now.
    starved: bool,
    /// Packets of the guest wait until answers to earlier ones are gone.
    held: bool,
    /// The guest must be told that all its connections are gone.
    lost: bool,
}

impl Inner {
    fn tell(&mut self, number: u32, operation: u16, flags: u32) {
        if let Some(connection) = self.connections.get(&number) {
            self.control.push_back(Control {
                host_port: connection.host_port,
                guest_port: connection.guest_port,
                operation,
                flags,
            });
        }
    }

    /// A number that is free, and our port of the same meaning.
    fn number(&mut self) -> u32 {
        loop {
            let number = self.next & !FIRST_PORT;
            self.next = number + 1;
            if !self.connections.contains_key(&number) {
                return number;
            }
        }
    }

    /// No more answers are kept for a guest that takes none.
    fn is_full(&self) -> bool {
        self.control.len() >= CONNECTIONS * 4
    }
}

/// See the module.
pub struct Vsock {
    guest_cid: u64,
    listener: UnixListener,
    /// How the names of the sockets begin that the guest reaches.
    prefix: OsString,
    /// The folder that the prefix leads through.
    _folder: Option<File>,
    epoll: OwnedFd,
    inner: Mutex<Inner>,
}

impl Vsock {
    /// A device for the guest `guest_cid` (from 3 on), with the socket at `path` for host programs to connect to. The
    /// guest reaches what listens at `path`, an underscore and the port's number.
    ///
    /// # Errors
    /// Where there is something at `path` already, or the host gives no descriptors.
    pub fn new(path: &Path, guest_cid: u64) -> std::io::Result<Vsock> {
        let invalid = || std::io::Error::from(std::io::ErrorKind::InvalidInput);
        let name = path.file_name().ok_or_else(invalid)?;
        let (path, folder) = if path.as_os_str().len() + LONGEST_SUFFIX <= SOCKET_PATH {
            (path.to_owned(), None)
        } else {
            // A folder's path may be longer than a socket's: its descriptor is short.
            let folder = File::open(path.parent().unwrap_or(Path::new(".")))?;
            let short = format!("/proc/self/fd/{}", folder.as_raw_fd());
            (Path::new(&short).join(name), Some(folder))
        };
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            &listener,
            EventData::new_u64(LISTENER),
            EventFlags::IN,
        )?;
        let mut prefix = path.into_os_string();
        prefix.push("_");
        Ok(Vsock {
            guest_cid,
            listener,
            prefix,
            _folder: folder,
            epoll,
            inner: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(&self, inner: &mut Inner) {
        while let Ok((stream, _)) = self.listener.accept() {
            if inner.connections.len() < CONNECTIONS && stream.set_nonblocking(true).is_ok() {
                let number = inner.number();
                let connection = Connection::new(stream, Phase::Greeting, FIRST_PORT | number, 0);
                inner.connections.insert(number, connection);
            }
        }
    }

    /// Connects to the host program that listens for `port`; at once or not at all.
    fn reach(&self, port: u32) -> std::io::Result<UnixStream> {
        let mut path = self.prefix.clone();
        path.push(port.to_string());
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(&path)?)?;
        Ok(UnixStream::from(socket))
    }

    /// Forgets a connection.
    fn forget(&self, inner: &mut Inner, number: u32) {
        if let Some(connection) = inner.connections.remove(&number) {
            if !connection.interest.is_empty() {
                let _ = epoll::delete(&self.epoll, &connection.stream);
            }
            inner
                .known
                .remove(&(connection.host_port, connection.guest_port));
        }
    }

    /// Forgets a connection, telling the guest where it knows of it.
    fn drop_connection(&self, inner: &mut Inner, number: u32) {
        if inner
            .connections
            .get(&number)
            .is_some_and(|connection| connection.phase != Phase::Greeting)
        {
            inner.tell(number, RESET, 0);
        }
        self.forget(inner, number);
    }

    /// Reads the greeting; asks the guest once it is whole.
    fn greet(&self, inner: &mut Inner, number: u32) {
        let Some(connection) = inner.connections.get_mut(&number) else {
            return;
        };
        match connection.greet() {
            Greeting::Unfinished => {}
            Greeting::Broken => self.drop_connection(inner, number),
            Greeting::Port(guest_port) => {
                connection.guest_port = guest_port;
                connection.phase = Phase::Asked;
                let key = (connection.host_port, guest_port);
                inner.known.insert(key, number);
                inner.tell(number, REQUEST, 0);
            }
        }
    }

    /// Handles what came from the host's side.
    fn poll(&self, inner: &mut Inner, queue: &mut Queue, dma: &Dma) -> Result<(), QueueError> {
        let mut events = Vec::with_capacity(CONNECTIONS + 1);
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let _ = epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut events),
            Some(&now),
        );
        for event in events {
            let (token, flags) = (event.data.u64(), event.flags);
            if token == LISTENER {
                self.accept(inner);
                continue;
            }
            let number = token as u32;
            let Some(connection) = inner.connections.get_mut(&number) else {
                continue;
            };
            if flags.contains(EventFlags::OUT) {
                if !connection.drain() || connection.is_over() {
                    self.drop_connection(inner, number);
                    continue;
                }
                inner.tell(number, CREDIT_UPDATE, 0);
            }
            match inner.connections.get(&number).map(|c| c.phase) {
                Some(Phase::Greeting) => self.greet(inner, number),
                Some(Phase::Open) => self.send(inner, number, queue, dma)?,
                Some(Phase::Asked) | None => {}
            }
        }
        self.flush(inner, queue, dma)
    }

    fn header(&self, control: Control, len: u32, taken: u32) -> [u8; HEADER] {
        Header {
            source_cid: HOST_CID,
            destination_cid: self.guest_cid,
            source_port: control.host_port,
            destination_port: control.guest_port,
            len,
            kind: STREAM,
            operation: control.operation,
            flags: control.flags,
            buffer: WINDOW,
            forwarded: taken,
        }
        .bytes()
    }

    /// Sends what the host program wrote, as far as the guest has room.
    fn send(
        &self,
        inner: &mut Inner,
        number: u32,
        queue: &mut Queue,
        dma: &Dma,
    ) -> Result<(), QueueError> {
        loop {
            let Some(connection) = inner.connections.get_mut(&number) else {
                return Ok(());
            };
            if connection.host_done || connection.credit() == 0 {
                return Ok(());
            }
            let Some(chain) = queue.pop(dma)? else {
                inner.starved = true;
                return Ok(());
            };
            let room = chain
                .writable_len()
                .saturating_sub(HEADER as u64)
                .min(u64::from(connection.credit()));
            if room == 0 {
                return Err(QueueError::Small);
            }
            let mut packet = vec![0; HEADER + (room as usize).min(CHUNK)];
            match (&connection.stream).read(&mut packet[HEADER..]) {
                Ok(0) => {
                    queue.unpop();
                    connection.host_done = true;
                    // It sends no more; it may still receive.
                    if connection.is_over() {
                        self.drop_connection(inner, number);
                    } else {
                        inner.tell(number, SHUTDOWN, SHUTDOWN_SEND);
                    }
                    return Ok(());
                }
                Ok(count) => {
                    let control = Control {
                        host_port: connection.host_port,
                        guest_port: connection.guest_port,
                        operation: DATA,
                        flags: 0,
                    };
                    packet[..HEADER].copy_from_slice(&self.header(
                        control,
                        count as u32,
                        connection.taken,
                    ));
                    let written = chain.write(dma, 0, &packet[..HEADER + count])?;
                    connection.sent = connection.sent.wrapping_add(count as u32);
                    queue.push(dma, chain.head, written as u32)?;
                }
                Err(error) => {
                    queue.unpop();
                    match error.kind() {
                        std::io::ErrorKind::WouldBlock => {}
                        std::io::ErrorKind::Interrupted => continue,
                        _ => self.drop_connection(inner, number),
                    }
                    return Ok(());
                }
            }
        }
    }

    /// Sends header-only packets and brings the waiting in line with what may be read.
    fn flush(&self, inner: &mut Inner, queue: &mut Queue, dma: &Dma) -> Result<(), QueueError> {
        while let Some(control) = inner.control.front().copied() {
            let Some(chain) = queue.pop(dma)? else {
                inner.starved = true;
                break;
            };
            let taken = inner
                .known
                .get(&(control.host_port, control.guest_port))
                .and_then(|number| inner.connections.get(number))
                .map_or(0, |connection| connection.taken);
            let written = chain.write(dma, 0, &self.header(control, 0, taken))?;
            queue.push(dma, chain.head, written as u32)?;
            inner.control.pop_front();
        }
        let starved = inner.starved;
        for (number, connection) in &mut inner.connections {
            let wanted = connection.wanted(starved);
            let before = std::mem::replace(&mut connection.interest, wanted);
            let data = EventData::new_u64(u64::from(*number));
            // One without interest is not waited on at all: a hang-up would be reported again and again.
            let _ = match (before.is_empty(), wanted.is_empty()) {
                (true, false) => epoll::add(&self.epoll, &connection.stream, data, wanted),
                (false, true) => epoll::delete(&self.epoll, &connection.stream),
                (false, false) if wanted != before => {
                    epoll::modify(&self.epoll, &connection.stream, data, wanted)
                }
                _ => Ok(()),
            };
        }
        Ok(())
    }

    /// The guest wants to connect to a port of the host.
    fn connect(&self, inner: &mut Inner, header: &Header) -> bool {
        if inner.connections.len() >= CONNECTIONS {
            return false;
        }
        let stream = match self.reach(header.destination_port) {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(
                    "the guest asked for port {}: {error}",
                    header.destination_port
                );
                return false;
            }
        };
        let number = inner.number();
        let (host_port, guest_port) = (header.destination_port, header.source_port);
        let mut connection = Connection::new(stream, Phase::Open, host_port, guest_port);
        connection.guest_window = header.buffer;
        connection.guest_taken = header.forwarded;
        inner.connections.insert(number, connection);
        inner.known.insert((host_port, guest_port), number);
        inner.tell(number, RESPONSE, 0);
        true
    }

    /// One packet of the guest.
    fn receive(&self, inner: &mut Inner, header: &Header, data: &[u8]) {
        let key = (header.destination_port, header.source_port);
        let ours = header.source_cid == self.guest_cid && header.destination_cid == HOST_CID;
        let known = inner.known.get(&key).copied();
        let (true, Some(number)) = (ours && header.kind == STREAM, known) else {
            let connected = ours
                && header.kind == STREAM
                && header.operation == REQUEST
                && self.connect(inner, header);
            // A stranger is told so, once per packet, and never for a reset.
            if !connected && header.operation != RESET {
                inner.control.push_back(Control {
                    host_port: key.0,
                    guest_port: key.1,
                    operation: RESET,
                    flags: 0,
                });
            }
            return;
        };
        let Some(connection) = inner.connections.get_mut(&number) else {
            return;
        };
        connection.guest_window = header.buffer;
        connection.guest_taken = header.forwarded;
        let keep = match header.operation {
            RESPONSE if connection.phase == Phase::Asked => {
                connection.phase = Phase::Open;
                let greeting = format!("OK {}\n", connection.host_port);
                (&connection.stream).write_all(greeting.as_bytes()).is_ok()
            }
            DATA if connection.phase == Phase::Open => {
                let taken = connection.take(data);
                if taken && connection.backlog.is_empty() {
                    inner.tell(number, CREDIT_UPDATE, 0);
                }
                taken
            }
            SHUTDOWN => {
                connection.guest_done |= header.flags & SHUTDOWN_SEND != 0;
                connection.host_done |= header.flags & SHUTDOWN_RECEIVE != 0;
                connection.drain() && !connection.is_over()
            }
            CREDIT_UPDATE => true,
            CREDIT_REQUEST => {
                inner.tell(number, CREDIT_UPDATE, 0);
                true
            }
            RESET => return self.forget(inner, number),
            _ => false,
        };
        if !keep {
            self.drop_connection(inner, number);
        }
    }

    fn take_packets(&self, inner: &mut Inner, queues: &Queues<'_>) -> Result<(), QueueError> {
        queues.with(TRANSMIT, |queue, dma| {
            for _ in 0..TURN {
                // Answers wait for buffers of the guest; one that gives none is not served on and on.
                inner.held = inner.is_full();
                if inner.held {
                    return Ok(());
                }
                let Some(chain) = queue.pop(dma)? else {
                    return Ok(());
                };
                let len = chain.readable_len().min((HEADER + WINDOW as usize) as u64) as usize;
                let mut packet = vec![0; len];
                chain.read(dma, 0, &mut packet)?;
                if let Some((header, data)) = packet.split_first_chunk::<HEADER>() {
                    let header = Header::parse(header);
                    let claimed = data.len().min(header.len as usize);
                    self.receive(inner, &header, &data[..claimed]);
                }
                queue.push(dma, chain.head, 0)?;
            }
            queues.again(TRANSMIT);
            Ok(())
        })
    }

    /// Tells the guest that its connections are gone, where they are and it gives a buffer for it.
    fn tell_loss(&self, inner: &mut Inner, queues: &Queues<'_>) -> Result<(), QueueError> {
        if !inner.lost {
            return Ok(());
        }
        queues.with(EVENT, |queue, dma| {
            let Some(chain) = queue.pop(dma)? else {
                return Ok(());
            };
            // VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
            let written = chain.write(dma, 0, &0u32.to_le_bytes())?;
            queue.push(dma, chain.head, written as u32)?;
            inner.lost = false;
            Ok(())
        })
    }
}

impl Backend for Vsock {
    fn thread(&self) -> Thread {
        Thread::Sockets
    }
    fn kind(&self) -> u16 {
        19
    }
    fn class(&self) -> u32 {
        0x02_8000
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![128, 128, 16]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_bytes(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn serve(&self, index: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        let mut inner = self.lock();
        match index {
            RECEIVE => {
                inner.starved = false;
                queues.with(RECEIVE, |queue, dma| self.flush(&mut inner, queue, dma))?;
                if std::mem::take(&mut inner.held) {
                    queues.again(TRANSMIT);
                }
                Ok(())
            }
            TRANSMIT => {
                self.take_packets(&mut inner, queues)?;
                queues.with(RECEIVE, |queue, dma| self.flush(&mut inner, queue, dma))
            }
            _ => self.tell_loss(&mut inner, queues),
        }
    }

    fn event_source(&self, _: usize) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn serve_event(&self, _: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        let mut inner = self.lock();
        queues.with(RECEIVE, |queue, dma| self.poll(&mut inner, queue, dma))
    }

    fn reset(&self) {
        let mut inner = self.lock();
        let numbers: Vec<u32> = inner.connections.keys().copied().collect();
        for number in numbers {
            self.forget(&mut inner, number);
        }
        *inner = Inner::default();
    }

    fn save(&self) -> serde_json::Value {
        serde_json::json!({ "cid": self.guest_cid })
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), String> {
        if state["cid"] != self.guest_cid {
            return Err("its guest has another number".into());
        }
        self.lock().lost = true;
        Ok(())
    }
}
