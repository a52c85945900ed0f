//! The person's terminal as a console of the guest: raw mode while the machine runs, the escape key, and the signals
//! that would end this process with the terminal left raw.
//!
//! `Ctrl-A x` ends the machine, `Ctrl-A p` presses its power button, `Ctrl-A Ctrl-A` sends a Ctrl-A,
//! `Ctrl-A h` shows these.

mod signals;

use std::io::IsTerminal;
use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use self::signals::{Signal, Signals};

const ESCAPE: u8 = 0x01;
/// What the escape key does, for people.
pub const KEYS: &str =
    "Ctrl-A x ends the machine, Ctrl-A p presses its power button, Ctrl-A Ctrl-A sends Ctrl-A";

/// What the person wants of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    Bytes(Vec<u8>),
    Quit,
    PowerButton,
    Help,
    /// The terminal has this size now.
    Window {
        columns: u16,
        rows: u16,
    },
}

/// The size of the terminal on standard output, where there is one.
fn window() -> Option<Input> {
    let size = tcgetwinsize(std::io::stdout()).ok()?;
    (size.ws_row > 0).then_some(Input::Window {
        columns: size.ws_col,
        rows: size.ws_row,
    })
}

/// Splits what was typed into bytes for the guest and commands.
#[derive(Debug, Default)]
pub struct Escape {
    pending: bool,
}

impl Escape {
    pub fn feed(&mut self, typed: &[u8]) -> Vec<Input> {
        let mut out = Vec::new();
        let mut bytes = Vec::new();
        for &byte in typed {
            if !std::mem::take(&mut self.pending) {
                if byte == ESCAPE {
                    self.pending = true;
                } else {
                    bytes.push(byte);
                }
                continue;
            }
            let command = match byte {
                b'x' | b'X' => Input::Quit,
                b'p' | b'P' => Input::PowerButton,
                ESCAPE => {
                    bytes.push(ESCAPE);
                    continue;
                }
                _ => Input::Help,
            };
            if !bytes.is_empty() {
                out.push(Input::Bytes(std::mem::take(&mut bytes)));
            }
            out.push(command);
        }
        if !bytes.is_empty() {
            out.push(Input::Bytes(bytes));
        }
        out
    }
}

/// Standard input in raw mode, read by a thread; given back as it was when dropped.
pub struct Terminal {
    before: Option<Termios>,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Terminal {
    /// Takes standard input. A pipe or a file is read as it is; `handle` runs on the reading thread.
    ///
    /// # Errors
    /// Where the host gives no event descriptor or thread.
    pub fn open(mut handle: impl FnMut(Input) + Send + 'static) -> std::io::Result<Terminal> {
        let stdin = std::io::stdin();
        let mut before = None;
        if stdin.is_terminal()
            && let Ok(mode) = tcgetattr(&stdin)
        {
            let mut raw = mode.clone();
            raw.make_raw();
            // Output goes on being processed, so that the host's own messages look right.
            raw.output_modes = mode.output_modes;
            tcsetattr(&stdin, OptionalActions::Now, &raw)?;
            before = Some(mode);
        }
        let interactive = before.is_some();
        if interactive {
            eprintln!("berth: {KEYS}\r");
        }
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        let stopped = rustix::io::dup(&stop)?;
        let signals = Signals::take()?;
        let thread = std::thread::Builder::new()
            .name("terminal".into())
            .spawn(move || {
                let stdin = std::io::stdin();
                let mut escape = Escape::default();
                let mut buffer = [0u8; 4096];
                window().into_iter().for_each(&mut handle);
                // Signals are taken to the end, also where there is no more input.
                let mut open = true;
                loop {
                    let input = stdin.as_fd();
                    let mut wanted = [
                        PollFd::new(&stopped, PollFlags::IN),
                        PollFd::new(&signals, PollFlags::IN),
                        PollFd::new(&input, PollFlags::IN),
                    ];
                    match poll(&mut wanted[..if open { 3 } else { 2 }], None) {
                        Err(rustix::io::Errno::INTR) => continue,
                        Err(_) => return,
                        Ok(_) if !wanted[0].revents().is_empty() => return,
                        Ok(_) => {}
                    }
                    if !wanted[1].revents().is_empty() {
                        for signal in signals.arrived() {
                            match signal {
                                Signal::Window => window().into_iter().for_each(&mut handle),
                                Signal::End => handle(Input::Quit),
                            }
                        }
                    }
                    if !open || wanted[2].revents().is_empty() {
                        continue;
                    }
                    match rustix::io::read(input, &mut buffer) {
                        Ok(0) => open = false,
                        Ok(count) if interactive => escape
                            .feed(&buffer[..count])
                            .into_iter()
                            .for_each(&mut handle),
                        Ok(count) => handle(Input::Bytes(buffer[..count].to_vec())),
                        Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                        Err(_) => open = false,
                    }
                }
            });
        let mut terminal = Terminal {
            before,
            stop,
            thread: None,
        };
        terminal.thread = Some(thread?);
        Ok(terminal)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Some(mode) = &self.before {
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, mode);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_key_works_across_reads_and_can_be_sent() {
        let mut escape = Escape::default();
        assert_eq!(escape.feed(b"ab\x01"), [Input::Bytes(b"ab".to_vec())]);
        assert_eq!(
            escape.feed(b"xcd"),
            [Input::Quit, Input::Bytes(b"cd".to_vec())]
        );
        assert_eq!(
            escape.feed(b"\x01\x01\x01p"),
            [Input::Bytes(vec![1]), Input::PowerButton]
        );
        assert_eq!(escape.feed(b"\x01?"), [Input::Help]);
    }
}
