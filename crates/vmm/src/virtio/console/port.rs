//! A named port: a program of the guest has `/dev/virtio-ports/NAME` open, one of the host is connected to a unix socket.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::epoll::{self, EventData, EventFlags};

/// Bytes of the guest that the host's program has not read; the guest waits beyond.
const BACKLOG: usize = 64 * 1024;

/// See the module.
pub struct Port {
    pub name: String,
    listener: UnixListener,
    stream: Option<UnixStream>,
    backlog: VecDeque<u8>,
    /// The guest's program has it open.
    pub guest_open: bool,
    /// The guest gave no buffer for what the host's program wrote.
    pub starved: bool,
    interest: EventFlags,
}

impl Port {
    pub fn new(name: String, listener: UnixListener) -> std::io::Result<Port> {
        listener.set_nonblocking(true)?;
        Ok(Port {
            name,
            listener,
            stream: None,
            backlog: VecDeque::new(),
            guest_open: false,
            starved: false,
            interest: EventFlags::empty(),
        })
    }

    /// Has `epoll` say of a new program, with `token`.
    pub fn watch(&self, epoll: &OwnedFd, token: u64) -> std::io::Result<()> {
        let data = EventData::new_u64(token);
        Ok(epoll::add(epoll, &self.listener, data, EventFlags::IN)?)
    }

    pub fn is_connected(&self) -> bool {
        self.stream.is_some()
    }

    /// Takes a new program of the host, where there is none; others are turned away. True where one was taken.
    pub fn accept(&mut self) -> bool {
        let mut taken = false;
        while let Ok((stream, _)) = self.listener.accept() {
            if self.stream.is_none() && stream.set_nonblocking(true).is_ok() {
                self.stream = Some(stream);
                taken = true;
            }
        }
        taken
    }

    /// Room for the guest's data. Without a program there is any: it goes nowhere.
    pub fn has_room(&self) -> bool {
        self.stream.is_none() || self.backlog.len() < BACKLOG
    }

    /// Takes the guest's data; false where the host's program is gone.
    pub fn take(&mut self, data: &[u8]) -> bool {
        if self.stream.is_some() {
            self.backlog.extend(data);
        }
        self.drain()
    }

    /// Gives the host's program what it takes; false where it is gone.
    pub fn drain(&mut self) -> bool {
        let Some(stream) = &mut self.stream else {
            return true;
        };
        while !self.backlog.is_empty() {
            match stream.write(self.backlog.as_slices().0) {
                Ok(count) => drop(self.backlog.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// What the host's program wrote, as much as fits; 0 where there is nothing now, `None` where it is gone.
    pub fn read(&mut self, data: &mut [u8]) -> Option<usize> {
        let stream = self.stream.as_mut()?;
        loop {
            match stream.read(data) {
                Ok(0) => return None,
                Ok(count) => return Some(count),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Some(0),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
    }

    /// Forgets the host's program.
    pub fn disconnect(&mut self, epoll: &OwnedFd) {
        if let Some(stream) = self.stream.take()
            && !self.interest.is_empty()
        {
            let _ = epoll::delete(epoll, &stream);
        }
        self.interest = EventFlags::empty();
        self.backlog.clear();
        self.starved = false;
    }

    /// Brings the waiting in line with what may be read and is to be written.
    pub fn update(&mut self, epoll: &OwnedFd, token: u64) {
        let Some(stream) = &self.stream else { return };
        let mut wanted = EventFlags::empty();
        if self.guest_open && !self.starved {
            wanted |= EventFlags::IN;
        }
        if !self.backlog.is_empty() {
            wanted |= EventFlags::OUT;
        }
        let before = std::mem::replace(&mut self.interest, wanted);
        let data = EventData::new_u64(token);
        // One without interest is not waited on at all: a hang-up would be reported again and again.
        let _ = match (before.is_empty(), wanted.is_empty()) {
            (true, false) => epoll::add(epoll, stream, data, wanted),
            (false, true) => epoll::delete(epoll, stream),
            (false, false) if wanted != before => epoll::modify(epoll, stream, data, wanted),
            _ => Ok(()),
        };
    }
}
