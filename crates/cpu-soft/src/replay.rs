//! Two runs of one guest, compared: the first records what it was told from outside, the second is told the same and must
//! pass through the same states. Time is the count of instructions, and interrupts are taken only behind instructions
//! carried out in Rust, which are the same in every mode; so a run in chained blocks and one of single instructions or in
//! the interpreter must agree to the bit. One CPU; nothing may write guest memory but the CPU.
//!
//! Before each control-flow instruction the registers are hashed (arithmetic flags apart: dead ones are not kept); every
//! [`Options::every`] such points the hash is written or compared.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};

use cpu::{CpuError, CpuIo};
use iced_x86::{FlowControl, Instruction, Mnemonic};

use crate::state::{Cpu, FS, GS};

/// What `BERTH_SOFT_MODE` asks for: words with commas between them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Translate one instruction at a time and never chain.
    pub single: bool,
    /// Blocks of one instruction, chained as others: nothing is planned for several instructions together.
    pub short: bool,
    /// Execute every instruction in the interpreter.
    pub interpret: bool,
    pub trace: bool,
    pub profile: bool,
    /// Write the log of a run to this file.
    pub record: Option<String>,
    /// Follow the log in this file.
    pub replay: Option<String>,
    /// Control-flow instructions from one hash in the log to the next (4096).
    pub every: u32,
    /// Between these instruction counts each hash is in the log, and `trace` prints the registers.
    pub window: (u64, u64),
}

impl Options {
    /// Reads the words; an error names the one that is not known.
    pub fn parse(words: &str) -> Result<Options, String> {
        let mut options = Options {
            every: 4096,
            ..Options::default()
        };
        for word in words.split(',').filter(|w| !w.is_empty()) {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let number = || {
                value
                    .parse::<u64>()
                    .map_err(|_| format!("BERTH_SOFT_MODE: {word} wants a number"))
            };
            match name {
                "single" => options.single = true,
                "short" => options.short = true,
                "interpret" => options.interpret = true,
                "trace" => options.trace = true,
                "profile" => options.profile = true,
                "record" => options.record = Some(value.to_owned()),
                "replay" => options.replay = Some(value.to_owned()),
                "every" => options.every = number()?.clamp(1, u64::from(u32::MAX)) as u32,
                "from" => options.window.0 = number()?,
                "to" => options.window.1 = number()?,
                _ => {
                    return Err(format!(
                        "BERTH_SOFT_MODE does not know {word}: single, short, interpret, trace, profile, record=FILE, \
                         replay=FILE, every=N, from=COUNT, to=COUNT"
                    ));
                }
            }
        }
        Ok(options)
    }

    /// As the environment says.
    pub fn from_environment() -> Result<Options, String> {
        Options::parse(&std::env::var("BERTH_SOFT_MODE").unwrap_or_default())
    }

    /// Whether time is counted and not measured.
    pub fn counts(&self) -> bool {
        self.record.is_some() || self.replay.is_some()
    }
}

/// What came from outside between two instructions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mail {
    pub vectors: [u64; 4],
    pub level: [u64; 4],
    pub requests: u32,
    pub external: bool,
}

/// Kinds of the log's records: one byte, then the payload in little-endian words of eight bytes.
mod kind {
    /// Address, value.
    pub const READ: u8 = 1;
    /// Count, then the mail.
    pub const MAIL: u8 = 2;
    /// Count, hash, rip; inside the window also the general registers.
    pub const HASH: u8 = 3;
    /// Vector + 1, 0 for none.
    pub const PIC: u8 = 4;
    /// Count: the run ended here.
    pub const END: u8 = 5;
}

enum Log {
    Out(BufWriter<File>),
    In(BufReader<File>),
}

/// The log of a run, written or followed.
pub struct Replay {
    log: Log,
    options: Options,
    /// The next record's kind and its words, when following.
    next: Option<(u8, Vec<u64>)>,
    hash: u64,
    since: u32,
    /// Hashes compared or written.
    pub points: u64,
    /// What went wrong: the run ends with it.
    pub failure: Option<String>,
}

/// Ticks of the counted clock in one instruction.
pub const TICKS: u64 = 2;
/// Where the counted clock starts.
const START: u64 = 1 << 40;

impl Replay {
    pub fn open(options: &Options) -> Result<Option<Box<Replay>>, CpuError> {
        let host = |what: &'static str| move |source: io::Error| CpuError::Host { what, source };
        let log = if let Some(path) = &options.record {
            Log::Out(BufWriter::new(
                File::create(path).map_err(host("creating the log of BERTH_SOFT_MODE=record"))?,
            ))
        } else if let Some(path) = &options.replay {
            Log::In(BufReader::new(
                File::open(path).map_err(host("opening the log of BERTH_SOFT_MODE=replay"))?,
            ))
        } else {
            return Ok(None);
        };
        let mut replay = Box::new(Replay {
            log,
            options: options.clone(),
            next: None,
            hash: 0,
            since: 0,
            points: 0,
            failure: None,
        });
        replay.advance();
        Ok(Some(replay))
    }

    fn follows(&self) -> bool {
        matches!(self.log, Log::In(_))
    }

    /// Reads the next record.
    fn advance(&mut self) {
        let Log::In(file) = &mut self.log else { return };
        let mut head = [0u8; 2];
        self.next = file.read_exact(&mut head).ok().and_then(|()| {
            let mut words = vec![0u64; usize::from(head[1])];
            for word in &mut words {
                let mut bytes = [0u8; 8];
                file.read_exact(&mut bytes).ok()?;
                *word = u64::from_le_bytes(bytes);
            }
            Some((head[0], words))
        });
    }

    fn write(&mut self, kind: u8, words: &[u64]) {
        let Log::Out(file) = &mut self.log else {
            return;
        };
        let mut record = vec![kind, words.len() as u8];
        for word in words {
            record.extend(word.to_le_bytes());
        }
        if let Err(e) = file.write_all(&record) {
            self.failure = Some(format!("writing the log: {e}"));
        }
    }

    fn fail(&mut self, what: String) {
        if self.failure.is_none() {
            self.failure = Some(what);
        }
    }

    /// The next record must be of `kind`; its words.
    fn take(&mut self, kind: u8, what: &str) -> Option<Vec<u64>> {
        match self.next.take() {
            Some((found, words)) if found == kind => {
                self.advance();
                Some(words)
            }
            other => {
                self.fail(format!("{what}, where the log has {other:x?}"));
                None
            }
        }
    }

    fn read(&mut self, address: u64, data: &mut [u8]) {
        let mut bytes = [0u8; 8];
        if self.follows() {
            if let Some(words) = self.take(kind::READ, &format!("device {address:#x} is read")) {
                if words[0] != address {
                    self.fail(format!(
                        "device {address:#x} is read, where the log has {:#x}",
                        words[0]
                    ));
                }
                bytes = words[1].to_le_bytes();
            }
            let len = data.len();
            data.copy_from_slice(&bytes[..len]);
        } else {
            bytes[..data.len()].copy_from_slice(data);
            self.write(kind::READ, &[address, u64::from_le_bytes(bytes)]);
        }
    }

    /// What is taken in at instruction `count`, given what truly came.
    pub fn mail(&mut self, count: u64, came: Mail) -> Mail {
        if !self.follows() {
            if came != Mail::default() {
                let mut words = vec![count];
                words.extend(came.vectors);
                words.extend(came.level);
                words.extend([u64::from(came.requests), u64::from(came.external)]);
                self.write(kind::MAIL, &words);
            }
            return came;
        }
        match &self.next {
            Some((kind::MAIL, words)) if words[0] == count => {
                let mut mail = Mail::default();
                mail.vectors.copy_from_slice(&words[1..5]);
                mail.level.copy_from_slice(&words[5..9]);
                mail.requests = words[9] as u32;
                mail.external = words[10] != 0;
                self.advance();
                mail
            }
            Some((kind::MAIL, words)) if words[0] < count => {
                let at = words[0];
                self.fail(format!(
                    "at instruction {count}: interrupts of {at} were not taken"
                ));
                Mail::default()
            }
            _ => Mail::default(),
        }
    }

    /// A halted CPU may wait for what comes: true while following, where it is in the log or never comes.
    pub fn knows_what_comes(&self) -> bool {
        self.follows()
    }

    fn check(&mut self, count: u64, hash: u64, rip: u64, registers: &[u64]) {
        self.points += 1;
        let mut ours = vec![count, hash, rip];
        ours.extend(registers);
        if !self.follows() {
            self.write(kind::HASH, &ours);
            return;
        }
        if matches!(self.next, Some((kind::END, _)) | None) {
            return;
        }
        if let Some(words) = self.take(kind::HASH, &format!("instruction {count} at {rip:#x}"))
            && words != ours
        {
            let registers: Vec<String> = (3..words.len().min(ours.len()))
                .filter(|n| words[*n] != ours[*n])
                .map(|n| format!("register {}: {:x}, not {:x}", n - 3, words[n], ours[n]))
                .collect();
            self.fail(format!(
                "states differ at or before instruction {count} at {rip:#x}: the log has {} at {:#x} with {:x}, not {hash:x}. {}",
                words[0],
                words.get(2).copied().unwrap_or(0),
                words.get(1).copied().unwrap_or(0),
                if words.len() > 3 {
                    registers.join("; ")
                } else {
                    "Narrow it down with every=1,from=COUNT,to=COUNT in both runs".into()
                }
            ));
        }
    }

    /// The run ends at instruction `count`.
    pub fn finish(&mut self, count: u64) {
        if self.follows() {
            match self.next.take() {
                Some((kind::END, words)) if words[0] == count => {}
                other => self.fail(format!(
                    "the run ended at instruction {count}, where the log has {other:x?}"
                )),
            }
        } else {
            self.write(kind::END, &[count]);
        }
        if let Log::Out(file) = &mut self.log
            && let Err(e) = file.flush()
        {
            self.failure = Some(format!("writing the log: {e}"));
        }
    }
}

/// Instructions behind which a counted run takes interrupts; they are carried out in Rust then.
pub(crate) fn opens(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Hlt
            | M::In
            | M::Out
            | M::Iret
            | M::Iretd
            | M::Iretq
            | M::Syscall
            | M::Sysret
            | M::Sysretq
            | M::Wrmsr
            | M::Sti
            | M::Popf
            | M::Popfd
            | M::Popfq
            | M::Rdtsc
            | M::Rdtscp
            | M::Rdrand
            | M::Rdseed
            | M::Pause
            | M::Cpuid
    )
}

/// Instructions before which the states of two runs are compared: all control flow.
pub(crate) fn compared(i: &Instruction) -> bool {
    i.flow_control() != FlowControl::Next
}

fn mix(hash: u64, value: u64) -> u64 {
    (hash.rotate_left(7) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Cpu {
    /// Before a control-flow instruction at rip: `false` where the run cannot go on.
    pub(crate) fn checkpoint(&mut self) {
        let Some(mut replay) = self.replay.take() else {
            return;
        };
        let mut hash = replay.hash;
        for value in self.gpr {
            hash = mix(hash, value);
        }
        for value in [
            self.rip,
            self.cr3,
            self.segments[FS].base,
            self.segments[GS].base,
            u64::from(self.cpl) << 32 | u64::from(self.mxcsr),
        ] {
            hash = mix(hash, value);
        }
        if replay.since.is_multiple_of(16) {
            for value in self.ymm.as_flattened() {
                hash = mix(hash, *value);
            }
        }
        replay.hash = hash;
        replay.since += 1;
        let inside = (replay.options.window.0..replay.options.window.1).contains(&self.count);
        if inside && replay.options.trace {
            eprintln!(
                "{} at {:#x} cpl {} hash {hash:016x} registers {:x?}",
                self.count, self.rip, self.cpl, self.gpr
            );
        }
        if replay.since >= replay.options.every || inside {
            replay.since = 0;
            let registers: &[u64] = if inside { &self.gpr } else { &[] };
            replay.check(self.count, hash, self.rip, registers);
        }
        self.replay = Some(replay);
    }

    /// The counted clock, made current for this thread.
    pub(crate) fn count_time(&mut self) {
        if self.replay.is_some() {
            crate::clock::count(START + self.count * TICKS + self.skipped);
        }
    }

    /// A halted CPU goes on when its timer is due: the clock jumps there. False where no timer runs.
    pub(crate) fn skip_to(&mut self, deadline: u64) {
        let now = START + self.count * TICKS + self.skipped;
        self.skipped += deadline.saturating_sub(now);
        self.count_time();
    }
}

/// The bus with its answers recorded or replaced.
pub(crate) struct Witness<'a> {
    pub io: &'a mut dyn CpuIo,
    /// Of the CPU that runs, which does not touch it during a callback.
    pub replay: *mut Replay,
}

impl Witness<'_> {
    fn replay(&mut self) -> &mut Replay {
        // SAFETY: boxed, owned by the CPU for longer than the run that made this value, and used by this thread alone.
        unsafe { &mut *self.replay }
    }
}

impl CpuIo for Witness<'_> {
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) {
        self.io.mmio_read(gpa, data);
        self.replay().read(gpa, data);
    }
    fn mmio_write(&mut self, gpa: u64, data: &[u8]) {
        self.io.mmio_write(gpa, data);
    }
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        self.io.pio_read(port, data);
        self.replay().read(u64::from(port), data);
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        self.io.pio_write(port, data);
    }
    fn eoi(&mut self, vector: u8) {
        self.io.eoi(vector);
    }
    fn pic_interrupt(&mut self) -> Option<u8> {
        let mut found = self.io.pic_interrupt();
        let replay = self.replay();
        if replay.follows() {
            let words = replay.take(kind::PIC, "the interrupt controller is asked")?;
            found = (words[0] as u8).checked_sub(1);
        } else {
            replay.write(kind::PIC, &[found.map_or(0, |v| u64::from(v) + 1)]);
        }
        found
    }
    fn stop_requested(&self) -> bool {
        self.io.stop_requested()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_words_of_the_mode_are_refused_by_name() {
        assert!(Options::parse("single,replay=/x,every=7").is_ok_and(|o| o.single && o.every == 7));
        assert!(Options::parse("singel").is_err_and(|e| e.contains("singel")));
        assert!(Options::parse("every=x").is_err());
    }
}
