//! The control socket of a machine process: one JSON object a line, a request and its answer.
//!
//! ```text
//! ▶ {"op":"status"}      ◀ {"ok":true,"state":"running","cpu":"soft","resets":0,"uptime_ms":1234}
//! ▶ {"op":"stats"}       ◀ {"ok":true,"stats":{"disks":[{"reads":1,…},…],"memory":{"balloon":0,…}}}
//! ▶ {"op":"pause"}       ◀ {"ok":true}          also: resume, power-button, reset, kill
//! ▶ {"op":"balloon","bytes":1048576}  ◀ {"ok":true}     also: resize
//! ▶ {"op":"grow-disk","disk":0,"size":4294967296}   ◀ {"ok":true}
//! ▶ {"op":"console"}     ◀ {"ok":true}          then raw bytes of a console, both ways, until either end closes
//! ▶ anything else        ◀ {"ok":false,"error":"…"}
//! ```

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};

use super::disks::DiskCounts;
use super::jail::{self, Thread};
use super::{Handles, Running};
use crate::control::Outcome;
use crate::defect::BYSTANDERS;
use crate::virtio::balloon::Statistics;

/// A request longer than this is none.
const LINE_LIMIT: u64 = 4096;
/// Connections at once; the daemon needs few.
const CONNECTION_LIMIT: usize = 64;

/// What is asked of a machine process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    Status,
    Stats,
    Pause,
    Resume,
    /// Presses the ACPI power button: the guest shuts down if it listens.
    PowerButton,
    /// Ends the guest at once and starts it again.
    Reset,
    /// Ends the machine at once.
    Kill,
    /// Asks this much of the guest's memory back; 0 returns all.
    Balloon {
        bytes: u64,
    },
    /// Sets the size of the virtio console.
    Resize {
        columns: u16,
        rows: u16,
    },
    /// Makes a disk larger, by its number; the guest is told.
    GrowDisk {
        disk: usize,
        size: u64,
    },
    Console {
        /// Begin with what was written lately.
        #[serde(default)]
        history: bool,
        #[serde(default)]
        line: Line,
    },
}

/// A console of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// The serial line, which is there from the kernel's first word to its last.
    #[default]
    Serial,
    /// The virtio console: quicker, with a size, and there once the guest has its driver.
    Virtio,
}

/// What it answers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    pub ok: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stats: Option<Stats>,
}

/// What went through the machine's devices.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// By disk, the root disk first.
    pub disks: Vec<DiskCounts>,
    /// Absent while it starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<GuestMemory>,
}

/// The guest's memory, all in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMemory {
    /// Asked back of it.
    pub wanted: u64,
    /// What it gave of that.
    pub balloon: u64,
    /// Dropped on the host since the guest's start, by the balloon and by the guest's reports of free pages.
    pub dropped: u64,
    /// What the guest last told of itself; empty where it has no driver.
    pub guest: Statistics,
}

/// How the machine is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub state: State,
    /// `kvm` or `soft`; empty while starting.
    pub cpu: String,
    /// Why this CPU serves, where that is worth saying.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Times it was reset since it was started.
    pub resets: u64,
    pub uptime_ms: u64,
    /// What keeps it from running, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// The crash after which it was started again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_crash: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    Starting,
    Running,
    Paused,
}

/// Reads a request from a line.
///
/// # Errors
/// For people: what is wrong with it.
pub fn parse(line: &str) -> Result<Request, String> {
    serde_json::from_str(line).map_err(|error| format!("this is no request: {error}"))
}

/// Serves the socket from a thread of its own.
pub(super) fn serve(listener: UnixListener, running: Arc<Running>) -> io::Result<()> {
    let count = Arc::new(());
    std::thread::Builder::new()
        .name(BYSTANDERS[0].into())
        .spawn(move || {
            jail::confine(Thread::Control);
            for stream in listener.incoming() {
                let Ok(stream) = stream else { continue };
                if Arc::strong_count(&count) > CONNECTION_LIMIT {
                    continue;
                }
                let (running, held) = (running.clone(), count.clone());
                let _ = std::thread::Builder::new()
                    .name(BYSTANDERS[1].into())
                    .stack_size(128 << 10)
                    .spawn(move || {
                        let _held = held;
                        // A client that goes away in the middle is no news.
                        let _ = converse(&stream, &running);
                    });
            }
        })?;
    Ok(())
}

fn converse(stream: &UnixStream, running: &Running) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if (&mut reader).take(LINE_LIMIT).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let request = match parse(&line) {
            Ok(request) => request,
            Err(error) => {
                send(stream, &refusal(error))?;
                return Ok(());
            }
        };
        if let Request::Console { history, line } = request {
            send(
                stream,
                &Answer {
                    ok: true,
                    ..Answer::default()
                },
            )?;
            let console = match line {
                Line::Serial => &running.console,
                Line::Virtio => &running.terminal,
            };
            let _attached = console.attach(stream.try_clone()?, history)?;
            type_into(reader, running, line)?;
            // Its input ended; it may go on reading until it is gone.
            let mut gone = [PollFd::new(stream, PollFlags::empty())];
            while poll(&mut gone, None) == Err(rustix::io::Errno::INTR) {}
            return Ok(());
        }
        send(stream, &answer(&request, running))?;
    }
}

fn send(mut stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn handles(running: &Running) -> Option<Handles> {
    running
        .machine
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone()
}

fn type_into(mut reader: impl Read, running: &Running, line: Line) -> io::Result<()> {
    let mut buffer = [0; 1024];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                if let Some(machine) = handles(running) {
                    match line {
                        Line::Serial => machine.serial.receive(&buffer[..n]),
                        Line::Virtio => machine.terminal.device.receive(&buffer[..n]),
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn refusal(error: String) -> Answer {
    Answer {
        error: Some(error),
        ..Answer::default()
    }
}

fn status(running: &Running, machine: Option<Handles>) -> Status {
    let state = match &machine {
        None => State::Starting,
        Some(machine) if machine.control.is_paused() => State::Paused,
        Some(_) => State::Running,
    };
    Status {
        state,
        cpu: machine.as_ref().map_or("", |m| m.cpu).to_owned(),
        problem: machine.as_ref().and_then(|m| m.room.problem()),
        note: machine.and_then(|m| m.note),
        resets: running.resets.load(Ordering::Relaxed),
        last_crash: running
            .last_crash
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone(),
        uptime_ms: running.started.elapsed().as_millis() as u64,
    }
}

/// What is known of the guest's memory now; it is asked to tell anew, for the next time.
fn memory_of(running: &Running, machine: &Handles) -> GuestMemory {
    let device = &machine.balloon.device;
    device.refresh();
    let (balloon, dropped) = device.figures();
    GuestMemory {
        wanted: running.wanted.load(Ordering::Relaxed),
        balloon,
        dropped,
        guest: device.statistics(),
    }
}

/// Ends the machine that is, and the one that is being made.
fn kill(running: &Running) {
    running.leave();
    if let Some(machine) = handles(running) {
        machine.control.end(Outcome::Killed);
    }
}

fn answer(request: &Request, running: &Running) -> Answer {
    let machine = handles(running);
    match request {
        Request::Status => {
            return Answer {
                ok: true,
                status: Some(status(running, machine)),
                ..Answer::default()
            };
        }
        Request::Stats => {
            let disks = running.disks.iter().map(|counters| counters.now());
            return Answer {
                ok: true,
                stats: Some(Stats {
                    disks: disks.collect(),
                    memory: machine.map(|machine| memory_of(running, &machine)),
                }),
                ..Answer::default()
            };
        }
        _ => {}
    }
    let Some(machine) = machine else {
        // Between a crash and the next boot there is no guest to ask.
        if matches!(request, Request::Kill | Request::PowerButton) {
            kill(running);
            return Answer {
                ok: true,
                ..Answer::default()
            };
        }
        return refusal("the machine is starting; try again".into());
    };
    let done = match request {
        Request::Pause => {
            machine.room.keep_paused();
            let paused = machine.control.pause();
            // A write that began to wait meanwhile must not let it go on either.
            machine.room.keep_paused();
            paused
        }
        Request::Resume => {
            // Its CPUs would only wait for the disk, and time out.
            if let Some(problem) = machine.room.obstacle() {
                return refusal(problem);
            }
            machine.control.resume()
        }
        Request::PowerButton => {
            machine.power.press_button();
            true
        }
        Request::Reset => {
            machine.control.end(Outcome::Reset);
            true
        }
        Request::GrowDisk { disk, size } => {
            let grown = match machine.disks.get(*disk) {
                Some(plugged) => plugged.grow(*size),
                None => Err(format!("it has no disk {disk}")),
            };
            match grown {
                Ok(()) => true,
                Err(why) => return refusal(why),
            }
        }
        Request::Kill => {
            kill(running);
            true
        }
        Request::Balloon { bytes } => {
            running.wanted.store(*bytes, Ordering::Relaxed);
            machine.balloon.device.want(*bytes);
            machine.balloon.transport.config_changed();
            !machine.control.has_ended()
        }
        Request::Resize { columns, rows } => {
            *running
                .window
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = (*columns, *rows);
            machine.terminal.device.resize(*columns, *rows);
            machine.terminal.transport.config_changed();
            !machine.control.has_ended()
        }
        Request::Status | Request::Stats | Request::Console { .. } => true,
    };
    if done {
        Answer {
            ok: true,
            ..Answer::default()
        }
    } else {
        refusal("the machine has ended".into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_have_one_written_form() {
        assert_eq!(parse(r#"{"op":"power-button"}"#), Ok(Request::PowerButton));
        assert_eq!(
            parse(r#"{"op":"grow-disk","disk":1,"size":4096}"#),
            Ok(Request::GrowDisk {
                disk: 1,
                size: 4096
            })
        );
        assert_eq!(
            parse(r#"{"op":"console"}"#),
            Ok(Request::Console {
                history: false,
                line: Line::Serial
            })
        );
        assert!(parse(r#"{"op":"format"}"#).is_err());
    }

    proptest! {
        #[test]
        fn no_line_panics(line in ".{0,200}") {
            let _ = parse(&line);
        }
    }
}
