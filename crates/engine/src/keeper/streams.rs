//! Bytes between a process and the clients attached to it.
//!
//! A client has a bounded queue. While one is full, the process's output is not read, so that a slow but living
//! client (a pager, a pipe into gzip) loses nothing; a client that takes nothing for [`STALL_LIMIT`] is dropped, so
//! that it cannot stop the container for ever.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventFlags};
use rustix::io::Errno;

use crate::keeper::launch::Failure;
use crate::keeper::log::Source;
use crate::keeper::process::Keeper;
use crate::keeper::protocol::Reply;

/// A queue above this stops reading the process.
const HIGH_WATER: usize = 256 * 1024;
/// Below this it is read again.
const LOW_WATER: usize = 64 * 1024;
/// The most stdin that waits for the process.
const INPUT_LIMIT: usize = 64 * 1024;
/// The most that is read of a process after its end; its pipes hold less, unless others still write.
const LAST_WORDS: usize = 4 << 20;
/// How long a client may take nothing while output waits for it.
pub(super) const STALL_LIMIT: Duration = Duration::from_secs(120);

/// One of a process's outputs.
pub(super) struct Output {
    pub fd: OwnedFd,
    pub token: u64,
    pub armed: bool,
}

/// An attached client: our end of a stream socket.
pub(super) struct Client {
    process: Rc<str>,
    socket: OwnedFd,
    armed: bool,
    /// Its input goes to the process's stdin.
    stdin: bool,
    /// Its input has not ended.
    reads: bool,
    wants: [bool; 2],
    /// Whether output has 8-byte headers.
    pub framed: bool,
    pub queue: VecDeque<u8>,
    /// When the queue last shrank, or began.
    progress: Instant,
    /// To be closed when the queue is empty.
    closing: bool,
    detach_keys: Vec<u8>,
    detach_matched: usize,
}

impl Keeper {
    pub(super) fn attach(
        &mut self,
        id: Rc<str>,
        socket: OwnedFd,
        stdin: bool,
        wants: [bool; 2],
        detach_keys: Vec<u8>,
    ) -> Result<(), Failure> {
        rustix::io::ioctl_fionbio(&socket, true)
            .map_err(|error| Failure::system("attaching", error.into()))?;
        let process = self.processes.get(&id);
        let closing = process.is_some_and(|process| process.exit.is_some());
        let framed = process.is_none_or(|process| !process.stdio.terminal);
        let key = self.client_token();
        self.clients.insert(
            key,
            Client {
                process: id.clone(),
                socket,
                armed: false,
                stdin,
                reads: true,
                wants,
                framed,
                queue: VecDeque::new(),
                progress: Instant::now(),
                closing,
                detach_keys,
                detach_matched: 0,
            },
        );
        if closing {
            self.drop_client(key);
        } else {
            self.attached.entry(id).or_default().push(key);
            self.arm_client(key);
        }
        Ok(())
    }

    /// Waits for what a client can do now.
    pub(super) fn arm_client(&mut self, key: u64) {
        let epoll = self.epoll();
        let Some(client) = self.clients.get_mut(&key) else {
            return;
        };
        let process = self.processes.get(&client.process);
        let room = process.is_some_and(|process| process.input_queue.len() < INPUT_LIMIT);
        let reading = client.reads && (process.is_some() && (!client.stdin || room));
        let mut flags = EventFlags::empty();
        if reading {
            flags |= EventFlags::IN | EventFlags::RDHUP;
        }
        if !client.queue.is_empty() {
            flags |= EventFlags::OUT;
        }
        // With input waiting that cannot be taken, a hang-up would be reported again and again.
        let blocked =
            client.reads && client.stdin && process.is_some() && !room && client.queue.is_empty();
        let flags = if blocked { None } else { Some(flags) };
        Keeper::watch(&epoll, client.socket.as_fd(), key, flags, &mut client.armed);
    }

    pub(super) fn client_ready(&mut self, key: u64, flags: EventFlags) {
        if flags.contains(EventFlags::OUT) {
            self.flush_client(key);
        }
        if flags.intersects(EventFlags::IN | EventFlags::RDHUP) {
            self.read_client(key);
        }
        if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            self.read_last(key);
            self.drop_client(key);
        }
    }

    /// What a client sent before it went still counts.
    fn read_last(&mut self, key: u64) {
        while self.clients.get(&key).is_some_and(|c| c.reads && c.stdin) && self.read_client(key) {}
    }

    /// Takes input of a client. False when there is no more for now.
    fn read_client(&mut self, key: u64) -> bool {
        let Some(client) = self.clients.get_mut(&key) else {
            return false;
        };
        if !client.reads {
            return false;
        }
        let id = client.process.clone();
        let mut buffer = std::mem::take(&mut self.buffer);
        let room = self
            .processes
            .get(&id)
            .map_or(0, |p| INPUT_LIMIT.saturating_sub(p.input_queue.len()));
        let limit = if client.stdin {
            room.min(buffer.len())
        } else {
            buffer.len()
        };
        let result = if limit == 0 {
            Err(Errno::AGAIN)
        } else {
            rustix::io::read(&client.socket, &mut buffer[..limit])
        };
        let mut detached = false;
        let more = match result {
            Ok(0) => {
                client.reads = false;
                if client.stdin {
                    self.input_ended(&id);
                }
                false
            }
            Ok(count) => {
                if client.stdin {
                    let (bytes, keys_typed) = client.detect_detach(&buffer[..count]);
                    detached = keys_typed;
                    if let Some(process) = self.processes.get_mut(&id)
                        && process.input.is_some()
                        && !process.input_ends
                    {
                        process.input_queue.extend(bytes);
                    }
                }
                true
            }
            Err(Errno::AGAIN | Errno::INTR) => false,
            // It has gone, with output in its socket that it did not read.
            Err(_) => {
                client.reads = false;
                if client.stdin {
                    self.input_ended(&id);
                }
                false
            }
        };
        self.buffer = buffer;
        if detached {
            self.reply(&Reply::Detached { id: id.to_string() });
            // Detaching is no end of stdin.
            if let Some(client) = self.clients.get_mut(&key) {
                client.stdin = false;
            }
            self.drop_client(key);
        }
        self.feed(&id);
        self.arm_client(key);
        more
    }

    fn input_ended(&mut self, id: &Rc<str>) {
        if let Some(process) = self.processes.get_mut(id)
            && process.stdio.stdin_once
            && !process.stdio.terminal
        {
            process.input_ends = true;
        }
    }

    /// Writes waiting stdin to the process.
    pub(super) fn feed(&mut self, id: &Rc<str>) {
        let epoll = self.epoll();
        let Some(process) = self.processes.get_mut(id) else {
            return;
        };
        let Some(input) = &process.input else { return };
        let before = process.input_queue.len();
        let mut broken = false;
        while !process.input_queue.is_empty() {
            match rustix::io::write(input, process.input_queue.as_slices().0) {
                Ok(count) => drop(process.input_queue.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    broken = true;
                    break;
                }
            }
        }
        let waits = !process.input_queue.is_empty() && !broken;
        let token = process.input_token;
        let flags = waits.then_some(EventFlags::OUT);
        Keeper::watch(
            &epoll,
            input.as_fd(),
            token,
            flags,
            &mut process.input_armed,
        );
        if broken || (process.input_ends && !waits) {
            process.input = None;
            process.input_queue = VecDeque::new();
            process.input_armed = false;
        }
        if process.input_queue.len() < before || broken {
            for key in self.attached.get(id).cloned().unwrap_or_default() {
                self.arm_client(key);
            }
        }
    }

    /// Reads a process's output once.
    pub(super) fn pump(&mut self, id: &Rc<str>, index: usize) -> usize {
        let mut buffer = std::mem::take(&mut self.buffer);
        let count = self.pump_into(id, index, &mut buffer);
        self.buffer = buffer;
        count
    }

    fn pump_into(&mut self, id: &Rc<str>, index: usize, buffer: &mut [u8]) -> usize {
        let Some(process) = self.processes.get_mut(id) else {
            return 0;
        };
        let Some(output) = &process.outputs[index] else {
            return 0;
        };
        match rustix::io::read(&output.fd, &mut *buffer) {
            Ok(0) => {
                self.end_output(id, index);
                0
            }
            Ok(count) => {
                let source = if index == 0 {
                    Source::Stdout
                } else {
                    Source::Stderr
                };
                if let Some(log) = &mut process.log {
                    log.write(source, &buffer[..count]);
                }
                self.deliver(id, source, &buffer[..count]);
                count
            }
            Err(Errno::AGAIN | Errno::INTR) => 0,
            // A terminal whose last holder is gone says EIO.
            Err(_) => {
                self.end_output(id, index);
                0
            }
        }
    }

    fn end_output(&mut self, id: &Rc<str>, index: usize) {
        if let Some(process) = self.processes.get_mut(id)
            && let Some(output) = process.outputs[index].take()
        {
            // A terminal has more descriptors of the same file, which would keep it in the set.
            let _ = epoll::delete(self.epoll(), &output.fd);
            self.release(output.token);
            self.settle(id);
        }
    }

    fn deliver(&mut self, id: &Rc<str>, source: Source, bytes: &[u8]) {
        let Some(keys) = self.attached.get(id) else {
            return;
        };
        let mut full = false;
        for key in keys.clone() {
            if let Some(client) = self.clients.get_mut(&key)
                && client.wants[source as usize - 1]
                && !client.closing
            {
                if client.queue.is_empty() {
                    client.progress = Instant::now();
                }
                if client.framed {
                    let length = (bytes.len() as u32).to_be_bytes();
                    client.queue.extend([source as u8, 0, 0, 0]);
                    client.queue.extend(length);
                }
                client.queue.extend(bytes);
                self.flush_client(key);
                full |= self
                    .clients
                    .get(&key)
                    .is_some_and(|client| client.queue.len() > HIGH_WATER);
            }
        }
        if full {
            self.arm_outputs(id, false);
        }
    }

    fn arm_outputs(&mut self, id: &Rc<str>, on: bool) {
        let epoll = self.epoll();
        let Some(process) = self.processes.get_mut(id) else {
            return;
        };
        for output in process.outputs.iter_mut().flatten() {
            if output.armed != on {
                let flags = on.then_some(EventFlags::IN);
                Keeper::watch(
                    &epoll,
                    output.fd.as_fd(),
                    output.token,
                    flags,
                    &mut output.armed,
                );
            }
        }
    }

    fn flush_client(&mut self, key: u64) {
        let Some(client) = self.clients.get_mut(&key) else {
            return;
        };
        let before = client.queue.len();
        let mut broken = false;
        while !client.queue.is_empty() {
            match rustix::net::send(
                &client.socket,
                client.queue.as_slices().0,
                rustix::net::SendFlags::NOSIGNAL,
            ) {
                Ok(count) => drop(client.queue.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    broken = true;
                    break;
                }
            }
        }
        if client.queue.len() < before {
            client.progress = Instant::now();
        }
        if client.queue.is_empty() {
            client.queue.shrink_to(LOW_WATER);
        }
        let low = client.queue.len() < LOW_WATER;
        let id = client.process.clone();
        if broken {
            self.read_last(key);
            self.drop_client(key);
        } else if client.closing && client.queue.is_empty() {
            self.drop_client(key);
        } else {
            self.arm_client(key);
            if low {
                self.thaw(&id);
            }
        }
    }

    /// Reads the process again, if no client is behind.
    fn thaw(&mut self, id: &Rc<str>) {
        let behind = self.attached.get(id).is_some_and(|keys| {
            keys.iter().any(|key| {
                self.clients
                    .get(key)
                    .is_some_and(|c| c.queue.len() > LOW_WATER)
            })
        });
        if !behind {
            self.arm_outputs(id, true);
        }
    }

    pub(super) fn drop_client(&mut self, key: u64) {
        let Some(client) = self.clients.remove(&key) else {
            return;
        };
        self.release(key);
        let id = client.process;
        if let Some(keys) = self.attached.get_mut(&id) {
            keys.retain(|other| *other != key);
            if keys.is_empty() {
                self.attached.remove(&id);
            }
        }
        if client.stdin && client.reads {
            self.input_ended(&id);
            self.feed(&id);
        }
        self.thaw(&id);
    }

    /// The process has ended: its clients get what waits for them, and then the end.
    pub(super) fn close_clients(&mut self, id: &Rc<str>) {
        for key in self.attached.remove(id).unwrap_or_default() {
            if let Some(client) = self.clients.get_mut(&key) {
                client.closing = true;
                client.stdin = false;
                client.reads = false;
                self.flush_client(key);
            }
        }
    }

    /// Reads what a process that has ended left in its pipes.
    pub(super) fn drain(&mut self, id: &Rc<str>) {
        for index in 0..2 {
            let mut left = LAST_WORDS;
            while left > 0 {
                match self.pump(id, index) {
                    0 => break,
                    count => left = left.saturating_sub(count),
                }
            }
        }
        self.arm_outputs(id, true);
    }

    pub(super) fn drop_stalled(&mut self) {
        let stalled: Vec<u64> = self
            .clients
            .iter()
            .filter(|(_, client)| {
                !client.queue.is_empty() && client.progress.elapsed() > STALL_LIMIT
            })
            .map(|(key, _)| *key)
            .collect();
        for key in stalled {
            self.drop_client(key);
        }
    }
}

impl Client {
    /// What of `input` goes on to the process, and whether the detach keys were typed in it.
    fn detect_detach(&mut self, input: &[u8]) -> (Vec<u8>, bool) {
        if self.detach_keys.is_empty() || self.framed {
            return (input.to_vec(), false);
        }
        let mut out = Vec::with_capacity(input.len());
        for byte in input {
            if *byte == self.detach_keys[self.detach_matched] {
                self.detach_matched += 1;
                if self.detach_matched == self.detach_keys.len() {
                    return (out, true);
                }
                continue;
            }
            out.extend_from_slice(&self.detach_keys[..self.detach_matched]);
            self.detach_matched = usize::from(*byte == self.detach_keys[0]);
            if self.detach_matched == 0 {
                out.push(*byte);
            }
        }
        (out, false)
    }
}
