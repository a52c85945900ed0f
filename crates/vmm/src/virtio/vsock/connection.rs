//! One connection between a port of the guest and a program of the host.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use rustix::event::epoll::EventFlags;

/// What we promise to hold of one connection's data.
pub const WINDOW: u32 = 64 * 1024;
/// "CONNECT 4294967295\n"
const GREETING: usize = 19;

/// How far a connection is.
///
/// ```text
///   host connects ─▶ Greeting ─ "CONNECT n" ─▶ Asked ─ RESPONSE ─▶ Open       guest connects ─▶ Open
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The host program has not yet said which port it wants.
    Greeting,
    /// The guest was asked.
    Asked,
    Open,
}

/// See the module.
pub struct Connection {
    pub stream: UnixStream,
    pub phase: Phase,
    greeting: Vec<u8>,
    pub host_port: u32,
    pub guest_port: u32,
    /// What the guest promised, and what it has taken.
    pub guest_window: u32,
    pub guest_taken: u32,
    pub sent: u32,
    /// What we have taken of the guest's data.
    pub taken: u32,
    /// Data of the guest that the host program has not read.
    pub backlog: VecDeque<u8>,
    /// The guest said that it sends no more.
    pub guest_done: bool,
    /// The host program sends no more and the guest was told, or the guest receives no more.
    pub host_done: bool,
    /// What its stream is waited for; empty where it is not waited on at all.
    pub interest: EventFlags,
}

/// What a greeting says so far.
pub enum Greeting {
    Unfinished,
    /// The guest's port that is wanted.
    Port(u32),
    Broken,
}

impl Connection {
    pub fn new(stream: UnixStream, phase: Phase, host_port: u32, guest_port: u32) -> Connection {
        Connection {
            stream,
            phase,
            greeting: Vec::new(),
            host_port,
            guest_port,
            guest_window: 0,
            guest_taken: 0,
            sent: 0,
            taken: 0,
            backlog: VecDeque::new(),
            guest_done: false,
            host_done: false,
            interest: EventFlags::empty(),
        }
    }

    /// Bytes the guest has room for.
    pub fn credit(&self) -> u32 {
        self.guest_window
            .saturating_sub(self.sent.wrapping_sub(self.guest_taken))
    }

    /// What its stream should be waited for.
    pub fn wanted(&self, starved: bool) -> EventFlags {
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

    /// True where both sides are done and everything is delivered.
    pub fn is_over(&self) -> bool {
        self.guest_done && self.host_done && self.backlog.is_empty()
    }

    /// Reads the greeting as far as it has come.
    pub fn greet(&mut self) -> Greeting {
        let mut byte = [0];
        // One byte at a time: what follows the line is the guest's.
        loop {
            match (&self.stream).read(&mut byte) {
                Ok(1) if byte == *b"\n" => break,
                Ok(1) if self.greeting.len() < GREETING => self.greeting.push(byte[0]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    return Greeting::Unfinished;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                _ => return Greeting::Broken,
            }
        }
        std::str::from_utf8(&self.greeting)
            .ok()
            .and_then(|text| text.trim_end().strip_prefix("CONNECT "))
            .and_then(|number| number.trim().parse().ok())
            .map_or(Greeting::Broken, Greeting::Port)
    }

    /// Takes data of the guest; false where it is more than was promised to be held, or the host program is gone.
    pub fn take(&mut self, data: &[u8]) -> bool {
        if self.guest_done || self.backlog.len() + data.len() > WINDOW as usize {
            return false;
        }
        self.backlog.extend(data);
        self.drain()
    }

    /// Gives the host program what it takes; false where it is gone.
    pub fn drain(&mut self) -> bool {
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
