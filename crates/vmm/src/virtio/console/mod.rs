//! A console (section 5.3): the terminal itself, and where asked named ports between programs of the guest and the host.
//!
//! ```text
//!   queues: input 0, output 0, control in, control out, input 1, output 1 …        port 0 is the terminal
//!
//!   guest READY ──▶ ADD each port ──▶ guest READY of a port ──▶ CONSOLE and RESIZE, or NAME and OPEN
//! ```
//!
//! Lock order: a queue, then the terminal's input, then the ports.

mod port;

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};

use self::port::Port;
use super::{Backend, Chain, QueueError, Queues, config_bytes};
use crate::devices::outlet::Outlet;
use crate::memory::Dma;

const INPUT: usize = 0;
const OUTPUT: usize = 1;
const CONTROL_IN: usize = 2;
const CONTROL_OUT: usize = 3;
const INPUT_LIMIT: usize = 64 * 1024;
const OUTPUT_LIMIT: usize = 64 * 1024;
/// Bytes of one chain that are taken or given, at most.
const CHUNK: usize = 64 * 1024;
/// Chains served in one go, so that a reset or a pause gets its turn.
const TURN: usize = 256;
/// Control messages that wait for buffers of the guest; a guest that takes none gets no more.
const MESSAGES: usize = 256;

const SIZE: u64 = 1 << 0;
const MULTIPORT: u64 = 1 << 1;

/// Events of control messages (5.3.6.2).
mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const CONSOLE_PORT: u16 = 4;
    pub const RESIZE: u16 = 5;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// Token of our own event; those of ports are their numbers, of their listeners that and this.
const OWN: u64 = u64::MAX;
const LISTENER: u64 = 1 << 32;

fn message(port: u32, event: u16, value: u16, rest: &[u8]) -> Vec<u8> {
    let mut message = port.to_le_bytes().to_vec();
    message.extend(event.to_le_bytes());
    message.extend(value.to_le_bytes());
    message.extend(rest);
    message
}

#[derive(Default)]
struct Named {
    /// Port 1 and on.
    ports: Vec<Port>,
    messages: VecDeque<Vec<u8>>,
    /// The guest's driver spoke of ports.
    ready: bool,
}

impl Named {
    fn tell(&mut self, message: Vec<u8>) {
        if self.messages.len() < MESSAGES {
            self.messages.push_back(message);
        }
    }
}

#[derive(Serialize, Deserialize)]
struct SavedConsole {
    input: VecDeque<u8>,
    size: (u16, u16),
    ready: bool,
    guest_open: Vec<bool>,
    messages: VecDeque<Vec<u8>>,
}

/// See the module.
pub struct Console {
    outlet: Outlet,
    input: Mutex<VecDeque<u8>>,
    /// Columns and rows.
    size: Mutex<(u16, u16)>,
    named: Mutex<Named>,
    /// Input, room or a size has come.
    event: Arc<OwnedFd>,
    epoll: OwnedFd,
}

impl Console {
    /// A console whose output goes to `sink`.
    ///
    /// # Errors
    /// Where the host gives no event.
    pub fn new(sink: Box<dyn Write + Send>) -> std::io::Result<Console> {
        Console::with_ports(sink, Vec::new())
    }

    /// A console with a further port for each name, to which host programs connect by its socket, one at a time.
    ///
    /// # Errors
    /// Where the host gives no event.
    pub fn with_ports(
        sink: Box<dyn Write + Send>,
        ports: Vec<(String, UnixListener)>,
    ) -> std::io::Result<Console> {
        let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &*event, EventData::new_u64(OWN), EventFlags::IN)?;
        let ports = ports
            .into_iter()
            .map(|(name, listener)| Port::new(name, listener))
            .collect::<std::io::Result<Vec<Port>>>()?;
        for (index, port) in ports.iter().enumerate() {
            port.watch(&epoll, LISTENER | index as u64)?;
        }
        let taken = event.clone();
        Ok(Console {
            outlet: Outlet::new("console", OUTPUT_LIMIT, sink, move || ring(&taken)),
            input: Mutex::default(),
            size: Mutex::new((80, 24)),
            named: Mutex::new(Named {
                ports,
                ..Named::default()
            }),
            event,
            epoll,
        })
    }

    fn input(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn size(&self) -> MutexGuard<'_, (u16, u16)> {
        self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn named(&self) -> MutexGuard<'_, Named> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Input from outside; what has no room is dropped.
    pub fn receive(&self, bytes: &[u8]) {
        let mut input = self.input();
        let room = INPUT_LIMIT.saturating_sub(input.len());
        input.extend(&bytes[..bytes.len().min(room)]);
        drop(input);
        ring(&self.event);
    }

    /// Sets columns and rows; the transport must then tell of the changed configuration.
    pub fn resize(&self, columns: u16, rows: u16) {
        *self.size() = (columns, rows);
        let mut named = self.named();
        if named.ready {
            let message = self.resize_message();
            named.tell(message);
        }
        drop(named);
        ring(&self.event);
    }

    /// Rows come first, as Linux has always read them; the specification's text has columns first.
    fn resize_message(&self) -> Vec<u8> {
        let (columns, rows) = *self.size();
        let rest = [rows.to_le_bytes(), columns.to_le_bytes()].concat();
        message(0, event::RESIZE, 0, &rest)
    }

    fn give(&self, queues: &Queues<'_>) -> Result<(), QueueError> {
        queues.with(INPUT, |queue, dma| {
            let mut input = self.input();
            while !input.is_empty() {
                let Some(chain) = queue.pop(dma)? else {
                    return Ok(());
                };
                let len = input
                    .len()
                    .min(chain.writable_len().min(CHUNK as u64) as usize);
                let bytes: Vec<u8> = input.drain(..len).collect();
                let written = chain.write(dma, 0, &bytes)?;
                queue.push(dma, chain.head, written as u32)?;
            }
            Ok(())
        })
    }

    /// Takes the output of the terminal, or of port `port`, as far as the outside has room.
    fn take(&self, port: usize, index: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        queues.with(index, |queue, dma| {
            for _ in 0..TURN {
                // The outlet, or the stream, says when there is room again.
                let room = match port {
                    0 => self.outlet.has_room(),
                    _ => self.named().ports[port - 1].has_room(),
                };
                if !room {
                    return Ok(());
                }
                let Some(chain) = queue.pop(dma)? else {
                    return Ok(());
                };
                let bytes = readable(&chain, dma)?;
                if port == 0 {
                    self.outlet.push(&bytes);
                } else {
                    let mut named = self.named();
                    if !named.ports[port - 1].take(&bytes) {
                        self.disconnect(&mut named, port - 1);
                    }
                    named.ports[port - 1].update(&self.epoll, port as u64 - 1);
                }
                queue.push(dma, chain.head, 0)?;
            }
            queues.again(index);
            Ok(())
        })
    }

    fn disconnect(&self, named: &mut Named, index: usize) {
        named.ports[index].disconnect(&self.epoll);
        named.tell(message(index as u32 + 1, event::PORT_OPEN, 0, &[]));
    }

    /// Gives the guest what a program of the host wrote to a port.
    fn give_port(&self, index: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        queues.with(4 + index * 2, |queue, dma| {
            let mut named = self.named();
            let mut bytes = vec![0; CHUNK];
            for _ in 0..TURN {
                let port = &mut named.ports[index];
                if !port.guest_open || !port.is_connected() {
                    break;
                }
                let Some(chain) = queue.pop(dma)? else {
                    port.starved = true;
                    break;
                };
                let room = chain.writable_len().min(CHUNK as u64) as usize;
                if room == 0 {
                    return Err(QueueError::Small);
                }
                match port.read(&mut bytes[..room]) {
                    Some(0) => {
                        queue.unpop();
                        break;
                    }
                    Some(count) => {
                        let written = chain.write(dma, 0, &bytes[..count])?;
                        queue.push(dma, chain.head, written as u32)?;
                    }
                    None => {
                        queue.unpop();
                        self.disconnect(&mut named, index);
                    }
                }
            }
            named.ports[index].update(&self.epoll, index as u64);
            Ok(())
        })
    }

    /// Sends control messages as far as the guest has buffers.
    fn send_messages(&self, queues: &Queues<'_>) -> Result<(), QueueError> {
        queues.with(CONTROL_IN, |queue, dma| {
            let mut named = self.named();
            while let Some(message) = named.messages.front() {
                let Some(chain) = queue.pop(dma)? else {
                    return Ok(());
                };
                let written = chain.write(dma, 0, message)?;
                queue.push(dma, chain.head, written as u32)?;
                named.messages.pop_front();
            }
            Ok(())
        })
    }

    fn control(&self, queues: &Queues<'_>) -> Result<(), QueueError> {
        queues.with(CONTROL_OUT, |queue, dma| {
            for _ in 0..TURN {
                let Some(chain) = queue.pop(dma)? else {
                    return Ok(());
                };
                let mut head = [0; 8];
                if chain.read(dma, 0, &mut head)? == head.len() {
                    let port = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
                    let what = u16::from_le_bytes([head[4], head[5]]);
                    self.command(port, what, u16::from_le_bytes([head[6], head[7]]));
                }
                queue.push(dma, chain.head, 0)?;
            }
            queues.again(CONTROL_OUT);
            Ok(())
        })?;
        self.send_messages(queues)
    }

    /// One control message of the guest.
    fn command(&self, port: u32, what: u16, value: u16) {
        let mut named = self.named();
        let index = (port as usize).checked_sub(1);
        match (what, index) {
            (event::DEVICE_READY, _) => {
                named.ready = value == 1;
                let count = if named.ready {
                    named.ports.len() as u32 + 1
                } else {
                    0
                };
                for number in 0..count {
                    named.tell(message(number, event::PORT_ADD, 1, &[]));
                }
            }
            (event::PORT_READY, None) if value == 1 => {
                named.tell(message(0, event::CONSOLE_PORT, 1, &[]));
                let size = self.resize_message();
                named.tell(size);
                named.tell(message(0, event::PORT_OPEN, 1, &[]));
            }
            (event::PORT_READY, Some(index)) if value == 1 => {
                let Some(found) = named.ports.get(index) else {
                    return;
                };
                let (name, open) = (found.name.clone(), found.is_connected());
                named.tell(message(port, event::PORT_NAME, 1, name.as_bytes()));
                named.tell(message(port, event::PORT_OPEN, u16::from(open), &[]));
            }
            (event::PORT_OPEN, Some(index)) => {
                if let Some(found) = named.ports.get_mut(index) {
                    found.guest_open = value == 1;
                    found.update(&self.epoll, index as u64);
                }
            }
            _ => {}
        }
    }

    /// What epoll says of, each once.
    fn happened(&self) -> Vec<(u64, EventFlags)> {
        let mut events = Vec::with_capacity(16);
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let _ = epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut events),
            Some(&now),
        );
        events
            .iter()
            .map(|event: &epoll::Event| (event.data.u64(), event.flags))
            .collect()
    }
}

fn ring(event: &OwnedFd) {
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

fn readable(chain: &Chain, dma: &Dma) -> Result<Vec<u8>, QueueError> {
    let mut bytes = vec![0; chain.readable_len().min(CHUNK as u64) as usize];
    let len = chain.read(dma, 0, &mut bytes)?;
    bytes.truncate(len);
    Ok(bytes)
}

impl Backend for Console {
    fn kind(&self) -> u16 {
        3
    }
    fn class(&self) -> u32 {
        0x07_8000
    }
    fn features(&self) -> u64 {
        if self.named().ports.is_empty() {
            SIZE
        } else {
            SIZE | MULTIPORT
        }
    }
    /// Linux reads the terminal's size when it is told that it changed, and not before.
    fn tells_config_at_start(&self) -> bool {
        true
    }
    fn queue_sizes(&self) -> Vec<u16> {
        match self.named().ports.len() {
            0 => vec![64; 2],
            more => vec![64; 4 + more * 2],
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = *self.size();
        let ports = self.named().ports.len() as u32 + 1;
        let mut config = [0u8; 12];
        config[..2].copy_from_slice(&columns.to_le_bytes());
        config[2..4].copy_from_slice(&rows.to_le_bytes());
        config[4..8].copy_from_slice(&ports.to_le_bytes());
        config_bytes(&config, offset, data);
    }

    fn serve(&self, index: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        match index {
            INPUT => self.give(queues),
            OUTPUT => self.take(0, OUTPUT, queues),
            CONTROL_IN => self.send_messages(queues),
            CONTROL_OUT => self.control(queues),
            input if input % 2 == 0 => {
                let port = (input - 4) / 2;
                self.named().ports[port].starved = false;
                self.give_port(port, queues)
            }
            output => self.take((output - 3) / 2, output, queues),
        }
    }

    fn event_source(&self, _: usize) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn serve_event(&self, _: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        let several = !self.named().ports.is_empty();
        for (token, flags) in self.happened() {
            let index = token as u32 as usize;
            if token == OWN {
                let _ = rustix::io::read(&*self.event, &mut [0; 8]);
                self.give(queues)?;
                self.take(0, OUTPUT, queues)?;
            } else if token & LISTENER != 0 {
                let mut named = self.named();
                if named.ports[index].accept() {
                    named.ports[index].update(&self.epoll, token & !LISTENER);
                    named.tell(message(index as u32 + 1, event::PORT_OPEN, 1, &[]));
                }
            } else {
                if flags.contains(EventFlags::OUT) {
                    let mut named = self.named();
                    if !named.ports[index].drain() {
                        self.disconnect(&mut named, index);
                    }
                    named.ports[index].update(&self.epoll, token);
                    drop(named);
                    self.take(index + 1, 5 + index * 2, queues)?;
                }
                self.give_port(index, queues)?;
            }
        }
        if several {
            self.send_messages(queues)?;
        }
        Ok(())
    }

    fn reset(&self) {
        let mut named = self.named();
        named.messages.clear();
        named.ready = false;
        for (index, port) in named.ports.iter_mut().enumerate() {
            port.guest_open = false;
            port.starved = false;
            port.update(&self.epoll, index as u64);
        }
    }

    fn save(&self) -> serde_json::Value {
        let (input, size) = (self.input().clone(), *self.size());
        let named = self.named();
        serde_json::json!(SavedConsole {
            input,
            size,
            ready: named.ready,
            guest_open: named.ports.iter().map(|port| port.guest_open).collect(),
            messages: named.messages.clone(),
        })
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), String> {
        let saved = SavedConsole::deserialize(state).map_err(|error| error.to_string())?;
        let mut named = self.named();
        if saved.input.len() > INPUT_LIMIT
            || saved.messages.len() > MESSAGES
            || saved.guest_open.len() != named.ports.len()
        {
            return Err("more than a console of these ports holds".into());
        }
        named.ready = saved.ready;
        named.messages = saved.messages;
        for (index, open) in saved.guest_open.into_iter().enumerate() {
            named.ports[index].guest_open = open;
            named.ports[index].update(&self.epoll, index as u64);
        }
        drop(named);
        *self.size() = saved.size;
        *self.input() = saved.input;
        Ok(())
    }

    fn close(&self) {
        self.outlet.close();
    }
}
