//! Sockets between host and guest (section 5.10), behind a listening unix socket on the host.
//!
//! ```text
//!   host program ── connect ──▶ unix socket     "CONNECT 1024\n" ──▶ REQUEST to the guest's port 1024
//!                ◀──────────── "OK 5\n"                          ◀── RESPONSE (5 is our port)
//!                ◀══════════ bytes both ways ═══════════════════▶ RW, with credit
//! ```
//!
//! Connections begin on the host; a guest that begins one is refused. Its promises of buffer space are kept
//! (section 5.10.6.3), and a guest that breaks ours loses its connection.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use super::queue::Queue;
use super::{Backend, QueueError, Queues, config_bytes};
use crate::memory::Dma;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const HOST_CID: u64 = 2;
const HEADER: usize = 44;
/// What we promise to hold of one connection's data.
const WINDOW: u32 = 64 * 1024;
/// Data in one packet, at most.
const CHUNK: usize = 16 * 1024;
const CONNECTIONS: usize = 256;
/// "CONNECT 4294967295\n"
const GREETING: usize = 19;
const LISTENER: u64 = u64::MAX;

const STREAM: u16 = 1;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The host program has not yet said which port it wants.
    Greeting,
    /// The guest was asked.
    Asked,
    Open,
}

struct Connection {
    stream: UnixStream,
    phase: Phase,
    greeting: Vec<u8>,
    guest_port: u32,
    /// What the guest promised, and what it has taken.
    guest_window: u32,
    guest_taken: u32,
    sent: u32,
    /// What we have taken of the guest's data.
    taken: u32,
    /// Data of the guest that the host program has not read.
    backlog: VecDeque<u8>,
    /// The guest said that it sends no more.
    guest_done: bool,
    /// The host program sends no more, and the guest was told.
    host_done: bool,
    interest: EventFlags,
}

#[derive(Default)]
struct Inner {
    /// By our port.
    connections: BTreeMap<u32, Connection>,
    /// Header-only packets on their way: our port, guest's port, operation, flags.
    control: VecDeque<(u32, u32, u16, u32)>,
    next_port: u32,
    /// The guest gives no buffers now.
    starved: bool,
}

/// See the module.
pub struct Vsock {
    guest_cid: u64,
    listener: UnixListener,
    epoll: OwnedFd,
    inner: Mutex<Inner>,
}

impl Connection {
    fn credit(&self) -> u32 {
        self.guest_window
            .saturating_sub(self.sent.wrapping_sub(self.guest_taken))
    }

    fn wanted(&self, starved: bool) -> EventFlags {
        let mut wanted = EventFlags::empty();
        let listens = match self.phase {
            Phase::Greeting => true,
            Phase::Asked => false,
            Phase::Open => !self.host_done && !starved && self.credit() > 0,
        };
        if listens {
            wanted |= EventFlags::IN;
        }
        if !self.backlog.is_empty() {
            wanted |= EventFlags::OUT;
        }
        wanted
    }

    /// Gives the host program what it takes; false where it is gone.
    fn drain(&mut self) -> bool {
        while !self.backlog.is_empty() {
            let (front, _) = self.backlog.as_slices();
            match (&self.stream).write(front) {
                Ok(count) => {
                    self.backlog.drain(..count);
                    self.taken = self.taken.wrapping_add(count as u32);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        if self.guest_done && self.backlog.is_empty() {
            let _ = self.stream.shutdown(std::net::Shutdown::Write);
        }
        true
    }
}

impl Vsock {
    /// A device for the guest `guest_cid` (from 3 on); `listener` is what host programs connect to.
    ///
    /// # Errors
    /// Where the host gives no epoll descriptor.
    pub fn new(listener: UnixListener, guest_cid: u64) -> std::io::Result<Vsock> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            &listener,
            EventData::new_u64(LISTENER),
            EventFlags::IN,
        )?;
        Ok(Vsock {
            guest_cid,
            listener,
            epoll,
            inner: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(&self, inner: &mut Inner) {
        while let Ok((stream, _)) = self.listener.accept() {
            if inner.connections.len() >= CONNECTIONS || stream.set_nonblocking(true).is_err() {
                continue;
            }
            while inner.next_port < 1024 || inner.connections.contains_key(&inner.next_port) {
                inner.next_port = inner.next_port.wrapping_add(1).max(1024);
            }
            let port = inner.next_port;
            inner.next_port = port.wrapping_add(1);
            let data = EventData::new_u64(u64::from(port));
            if epoll::add(&self.epoll, &stream, data, EventFlags::IN).is_err() {
                continue;
            }
            let connection = Connection {
                stream,
                phase: Phase::Greeting,
                greeting: Vec::new(),
                guest_port: 0,
                guest_window: 0,
                guest_taken: 0,
                sent: 0,
                taken: 0,
                backlog: VecDeque::new(),
                guest_done: false,
                host_done: false,
                interest: EventFlags::IN,
            };
            inner.connections.insert(port, connection);
        }
    }

    /// Forgets a connection, telling the guest where it knows of it.
    fn drop_connection(&self, inner: &mut Inner, port: u32) {
        if let Some(connection) = inner.connections.remove(&port) {
            let _ = epoll::delete(&self.epoll, &connection.stream);
            if connection.phase != Phase::Greeting {
                inner
                    .control
                    .push_back((port, connection.guest_port, RESET, 0));
            }
        }
    }

    /// Reads the greeting; asks the guest once it is whole.
    fn greet(&self, inner: &mut Inner, port: u32) {
        let Some(connection) = inner.connections.get_mut(&port) else {
            return;
        };
        let mut byte = [0];
        // One byte at a time: what follows the line is the guest's.
        loop {
            match (&connection.stream).read(&mut byte) {
                Ok(1) if byte == *b"\n" => break,
                Ok(1) if connection.greeting.len() < GREETING => connection.greeting.push(byte[0]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                _ => return self.drop_connection(inner, port),
            }
        }
        let wanted = std::str::from_utf8(&connection.greeting)
            .ok()
            .and_then(|text| text.trim_end().strip_prefix("CONNECT "))
            .and_then(|number| number.trim().parse::<u32>().ok());
        match wanted {
            Some(guest_port) => {
                connection.guest_port = guest_port;
                connection.phase = Phase::Asked;
                inner.control.push_back((port, guest_port, REQUEST, 0));
            }
            None => self.drop_connection(inner, port),
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
            let token = event.data.u64();
            if token == LISTENER {
                self.accept(inner);
                continue;
            }
            let port = token as u32;
            let Some(connection) = inner.connections.get_mut(&port) else {
                continue;
            };
            let flags = event.flags;
            if flags.contains(EventFlags::OUT) {
                if connection.drain() {
                    let guest_port = connection.guest_port;
                    inner
                        .control
                        .push_back((port, guest_port, CREDIT_UPDATE, 0));
                } else {
                    self.drop_connection(inner, port);
                    continue;
                }
            }
            let Some(connection) = inner.connections.get(&port) else {
                continue;
            };
            match connection.phase {
                Phase::Greeting => self.greet(inner, port),
                Phase::Asked => {}
                Phase::Open => self.send(inner, port, queue, dma)?,
            }
        }
        self.flush(inner, queue, dma)
    }

    fn header(
        &self,
        ports: (u32, u32),
        len: u32,
        operation: u16,
        flags: u32,
        taken: u32,
    ) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[0..8].copy_from_slice(&HOST_CID.to_le_bytes());
        header[8..16].copy_from_slice(&self.guest_cid.to_le_bytes());
        header[16..20].copy_from_slice(&ports.0.to_le_bytes());
        header[20..24].copy_from_slice(&ports.1.to_le_bytes());
        header[24..28].copy_from_slice(&len.to_le_bytes());
        header[28..30].copy_from_slice(&STREAM.to_le_bytes());
        header[30..32].copy_from_slice(&operation.to_le_bytes());
        header[32..36].copy_from_slice(&flags.to_le_bytes());
        header[36..40].copy_from_slice(&WINDOW.to_le_bytes());
        header[40..44].copy_from_slice(&taken.to_le_bytes());
        header
    }

    /// Sends what the host program wrote, as far as the guest has room.
    fn send(
        &self,
        inner: &mut Inner,
        port: u32,
        queue: &mut Queue,
        dma: &Dma,
    ) -> Result<(), QueueError> {
        loop {
            let Some(connection) = inner.connections.get_mut(&port) else {
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
            let mut packet = vec![0; HEADER + (room as usize).min(CHUNK)];
            let result = (&connection.stream).read(&mut packet[HEADER..]);
            match result {
                Ok(0) if packet.len() > HEADER => {
                    queue.unpop();
                    connection.host_done = true;
                    // It sends no more; it may still receive.
                    let guest_port = connection.guest_port;
                    inner.control.push_back((port, guest_port, SHUTDOWN, 2));
                    return Ok(());
                }
                Ok(count) if count > 0 => {
                    let ports = (port, connection.guest_port);
                    let header = self.header(ports, count as u32, DATA, 0, connection.taken);
                    packet[..HEADER].copy_from_slice(&header);
                    let written = chain.write(dma, 0, &packet[..HEADER + count])?;
                    connection.sent = connection.sent.wrapping_add(count as u32);
                    queue.push(dma, chain.head, written as u32)?;
                }
                // A buffer too small for any data: the guest's loss.
                Ok(_) => {
                    queue.push(dma, chain.head, 0)?;
                    return Ok(());
                }
                Err(error) => {
                    queue.unpop();
                    match error.kind() {
                        std::io::ErrorKind::WouldBlock => {}
                        std::io::ErrorKind::Interrupted => continue,
                        _ => self.drop_connection(inner, port),
                    }
                    return Ok(());
                }
            }
        }
    }

    /// Sends header-only packets and brings the waiting in line with what may be read.
    fn flush(&self, inner: &mut Inner, queue: &mut Queue, dma: &Dma) -> Result<(), QueueError> {
        while let Some((port, guest_port, operation, flags)) = inner.control.front().copied() {
            let Some(chain) = queue.pop(dma)? else {
                inner.starved = true;
                break;
            };
            let taken = inner
                .connections
                .get(&port)
                .map_or(0, |connection| connection.taken);
            let header = self.header((port, guest_port), 0, operation, flags, taken);
            let written = chain.write(dma, 0, &header)?;
            queue.push(dma, chain.head, written as u32)?;
            inner.control.pop_front();
        }
        let starved = inner.starved;
        for (port, connection) in &mut inner.connections {
            let wanted = connection.wanted(starved);
            let before = std::mem::replace(&mut connection.interest, wanted);
            let data = EventData::new_u64(u64::from(*port));
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

    /// One packet of the guest.
    fn receive(&self, inner: &mut Inner, packet: &[u8]) {
        let word =
            |at: usize| u32::from_le_bytes(packet[at..at + 4].try_into().unwrap_or_default());
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let (guest_port, port) = (word(16), word(20));
        let operation = (word(28) >> 16) as u16;
        let known = inner.connections.get_mut(&port).filter(|connection| {
            connection.phase != Phase::Greeting
                && connection.guest_port == guest_port
                && word(28) as u16 == STREAM
        });
        let ours = long(0) == self.guest_cid && long(8) == HOST_CID;
        let Some(connection) = known.filter(|_| ours) else {
            // A stranger is told so, once per packet, and never for a reset.
            if operation != RESET && inner.control.len() < CONNECTIONS * 4 {
                inner.control.push_back((port, guest_port, RESET, 0));
            }
            return;
        };
        connection.guest_window = word(36);
        connection.guest_taken = word(40);
        let keep = match operation {
            RESPONSE if connection.phase == Phase::Asked => {
                connection.phase = Phase::Open;
                (&connection.stream)
                    .write_all(format!("OK {port}\n").as_bytes())
                    .is_ok()
            }
            DATA if connection.phase == Phase::Open => {
                let fits = connection.backlog.len() + packet.len() - HEADER <= WINDOW as usize;
                connection.backlog.extend(&packet[HEADER..]);
                let drained = fits && connection.drain();
                if drained && connection.backlog.is_empty() {
                    inner
                        .control
                        .push_back((port, guest_port, CREDIT_UPDATE, 0));
                }
                drained
            }
            SHUTDOWN => {
                connection.guest_done |= word(32) & 2 != 0;
                connection.host_done |= word(32) & 1 != 0;
                let drained = connection.drain();
                // Both directions done and delivered: the connection is over.
                drained && !(word(32) & 3 == 3 && connection.backlog.is_empty())
            }
            CREDIT_UPDATE => true,
            CREDIT_REQUEST => {
                inner
                    .control
                    .push_back((port, guest_port, CREDIT_UPDATE, 0));
                true
            }
            RESET => {
                if let Some(connection) = inner.connections.remove(&port) {
                    let _ = epoll::delete(&self.epoll, &connection.stream);
                }
                return;
            }
            _ => false,
        };
        if !keep {
            self.drop_connection(inner, port);
        }
    }
}

impl Backend for Vsock {
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
                queues.with(RECEIVE, |queue, dma| self.flush(&mut inner, queue, dma))
            }
            TRANSMIT => {
                queues.with(TRANSMIT, |queue, dma| {
                    // Answers wait for buffers of the guest; one that gives none is not served on and on.
                    while inner.control.len() < CONNECTIONS * 4 {
                        let Some(chain) = queue.pop(dma)? else { break };
                        let len =
                            chain.readable_len().min((HEADER + WINDOW as usize) as u64) as usize;
                        let mut packet = vec![0; len];
                        chain.read(dma, 0, &mut packet)?;
                        if len >= HEADER {
                            let claimed =
                                u32::from_le_bytes(packet[24..28].try_into().unwrap_or_default())
                                    as usize;
                            packet.truncate(HEADER.saturating_add(claimed));
                            self.receive(&mut inner, &packet);
                        }
                        queue.push(dma, chain.head, 0)?;
                    }
                    Ok(())
                })?;
                queues.with(RECEIVE, |queue, dma| self.flush(&mut inner, queue, dma))
            }
            // The event queue: there are no events before the machine is moved.
            _ => Ok(()),
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
        for connection in inner.connections.values() {
            let _ = epoll::delete(&self.epoll, &connection.stream);
        }
        *inner = Inner::default();
    }
}
