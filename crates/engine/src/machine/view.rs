//! Machines as people see them.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base::Kind;
use vmm::process;
use vmm::process::protocol::{Line, Request, State, Status};

use super::process::{ask, connect, exchange, greet};
use super::record::{MachineStats, MachineView};
use super::{Machines, Slot, capacity};
use crate::{Error, Result};

/// Received and sent bytes of an interface of this network namespace, from its own side (proc_net_dev, proc(5)).
fn traffic(table: &str, interface: &str) -> Option<(u64, u64)> {
    let line = table
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(interface)?.strip_prefix(':'))?;
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    Some((fields.first()?.parse().ok()?, fields.get(8)?.parse().ok()?))
}

/// Nanoseconds of the host's monotonic clock.
fn monotonic() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl Machines {
    fn view(&self, slot: &Slot) -> MachineView {
        let machine = slot.lock().clone();
        let answer = machine
            .run
            .as_ref()
            .map(|_| ask(&slot.folder, &Request::Status));
        let silent = matches!(&answer, Some(Err(Error::Io { source, .. })) if matches!(
            source.kind(),
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
        ));
        let status: Option<Status> = answer.and_then(|answer| answer.ok()?.status);
        let state = match (&machine.run, &status, &machine.last_exit) {
            // It was stopped from outside, or waits for a disk.
            (Some(_), None, _) if silent => "unresponsive",
            (Some(_), Some(status), _) => match status.state {
                State::Starting => "starting",
                State::Running => "running",
                State::Paused => "paused",
            },
            (Some(_), None, _) => "starting",
            (None, _, Some(_)) => "stopped",
            (None, _, None) => "created",
        };
        let (_, disk_used) = capacity::disks_of(&slot.folder, &machine);
        let run = machine.run;
        let of_status = |field: fn(&Status) -> Option<String>| status.as_ref().and_then(field);
        MachineView {
            id: machine.id,
            name: machine.spec.name,
            image: machine.spec.image,
            image_id: machine.image_id,
            state: state.into(),
            problem: of_status(|s| s.problem.clone()),
            cpus: machine.spec.cpus,
            memory: machine.spec.memory,
            disk: machine.spec.disk,
            disk_used,
            disk_format: machine.format,
            drives: machine.drives,
            cpu: of_status(|s| Some(s.cpu.clone())).filter(|c| !c.is_empty()),
            cpu_note: of_status(|s| s.note.clone()),
            network: machine.spec.network,
            address: run
                .as_ref()
                .and_then(|r| r.endpoint.as_ref()?.v4)
                .map(|v4| v4.address().to_string()),
            address6: run
                .as_ref()
                .and_then(|r| r.endpoint.as_ref()?.v6)
                .map(|v6| v6.address().to_string()),
            mac: machine.mac.map(|mac| mac.to_string()),
            ports: run.as_ref().map_or_else(Vec::new, |r| r.ports.clone()),
            on_crash: machine.spec.on_crash,
            on_disk_full: machine.spec.on_disk_full,
            restart: machine.spec.restart,
            created: machine.created,
            started: run.as_ref().map(|r| r.started.clone()),
            pid: run.as_ref().map(|r| r.process.pid),
            cgroup: run.as_ref().and_then(|r| r.cgroup.clone()),
            resets: status.as_ref().map_or(0, |s| s.resets),
            last_crash: of_status(|s| s.last_crash.clone()),
            last_exit: machine.last_exit,
            folder: slot.folder.clone(),
        }
    }

    /// One machine in full.
    ///
    /// # Errors
    /// Where there is no such machine.
    pub fn inspect(&self, name: &str) -> Result<MachineView> {
        Ok(self.view(&*self.find(name)?))
    }

    /// All machines, by name.
    pub fn list(&self) -> Vec<MachineView> {
        let mut views: Vec<_> = self.all().iter().map(|slot| self.view(slot)).collect();
        views.sort_by(|a, b| a.name.cmp(&b.name));
        views
    }

    /// What a running machine uses.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn stats(&self, name: &str) -> Result<MachineStats> {
        let (slot, key) = self.running(name)?;
        let stat = fs::read_to_string(format!("/proc/{}/stat", key.pid)).unwrap_or_default();
        let fields: Vec<u64> = stat
            .rsplit_once(')')
            .map_or("", |(_, rest)| rest)
            .split_ascii_whitespace()
            .skip(1)
            .map(|field| field.parse().unwrap_or(0))
            .collect();
        let field = |number: usize| fields.get(number).copied().unwrap_or(0);
        let tick = 1_000_000_000 / rustix::param::clock_ticks_per_second();
        let counts = ask(&slot.folder, &Request::Stats)
            .ok()
            .and_then(|answer| answer.stats);
        let machine = slot.lock();
        let (disk, disk_used) = capacity::disks_of(&slot.folder, &machine);
        // What the tap receives is what the guest sends.
        let traffic = machine
            .run
            .as_ref()
            .and_then(|run| run.endpoint.as_ref())
            .and_then(|endpoint| {
                let table = fs::read_to_string("/proc/thread-self/net/dev").ok()?;
                traffic(&table, &endpoint.host_interface)
            });
        Ok(MachineStats {
            name: machine.spec.name.clone(),
            cpus: machine.spec.cpus,
            // utime and stime, fields 14 and 15 of proc(5); rss is field 24, in pages.
            cpu_time: (field(10) + field(11)) * tick,
            read_at: monotonic(),
            memory_used: fs::read_to_string(format!("/proc/{}/smaps_rollup", key.pid))
                .ok()
                .and_then(|rollup| proportional(&rollup))
                .unwrap_or(field(20) * rustix::param::page_size() as u64),
            memory: machine.spec.memory,
            disk_used,
            disk,
            guest_memory: counts.as_ref().and_then(|counts| counts.memory.clone()),
            disks: counts.map(|counts| counts.disks).unwrap_or_default(),
            received: traffic.map(|(_, to_guest)| to_guest),
            sent: traffic.map(|(from_guest, _)| from_guest),
        })
    }

    /// What the serial line wrote, to be read to its end and beyond.
    ///
    /// # Errors
    /// Where there is no such machine.
    pub fn logs(self: &Arc<Machines>, name: &str) -> Result<LogReader> {
        let slot = self.find(name)?;
        let path = slot.folder.join(process::CONSOLE_LOG);
        Ok(LogReader {
            older: older(&path).filter(|older| older.exists()),
            path,
            slot,
            open: None,
        })
    }

    /// A console, both ways.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn console(&self, name: &str, line: Line) -> Result<UnixStream> {
        let (slot, _) = self.running(name)?;
        let failed = || Error::io(format!("the machine's process of {name} does not answer"));
        let stream = connect(&slot.folder, process::CONTROL).map_err(failed())?;
        let history = true;
        let answer = exchange(&stream, &Request::Console { history, line }).map_err(failed())?;
        match answer.error {
            None => Ok(stream),
            Some(error) => Err(Error::Conflict(error)),
        }
    }

    /// A connection to a port of the guest (vsock).
    ///
    /// # Errors
    /// Where it does not run, or nothing of its guest listens there.
    pub fn connect(&self, name: &str, port: u32) -> Result<UnixStream> {
        let (slot, _) = self.running(name)?;
        let failed = || Error::io(format!("the sockets of machine {name} do not answer"));
        let stream = connect(&slot.folder, process::VSOCK).map_err(failed())?;
        greet(&stream, port).map_err(failed())?.then_some(stream).ok_or_else(|| {
            Error::Room {
                message: format!("nothing in machine {name} listens on vsock port {port}"),
                kind: Kind::NotFound,
                fix: Some(format!(
                    "in the guest: socat VSOCK-LISTEN:{port},fork TCP:127.0.0.1:22, with the module vmw_vsock_virtio_transport"
                )),
            }
        })
    }
}

/// Bytes of the proportional set of a process (smaps_rollup, proc(5)): what it has mapped twice, as the software CPU has its
/// code, counts once.
fn proportional(rollup: &str) -> Option<u64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

fn older(path: &Path) -> Option<PathBuf> {
    let mut name = path.file_name()?.to_owned();
    name.push(".1");
    Some(path.with_file_name(name))
}

/// Reads the console's log: the older file, the newer one, and what comes after.
pub struct LogReader {
    slot: Arc<Slot>,
    path: PathBuf,
    older: Option<PathBuf>,
    open: Option<fs::File>,
}

impl LogReader {
    /// Whether more may come.
    pub fn is_live(&self) -> bool {
        self.slot.lock().run.is_some()
    }

    /// Begins so that at most `lines` lines of what is there are read.
    ///
    /// # Errors
    /// Where the log cannot be read.
    pub fn tail(&mut self, lines: usize) -> Result<()> {
        self.older = None;
        let failed = || Error::io(format!("cannot read {}", self.path.display()));
        let Some(mut file) = open(&self.path).map_err(failed())? else {
            return Ok(());
        };
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(failed())?;
        let end = text.len() - usize::from(text.last() == Some(&b'\n'));
        let begin = match lines {
            0 => text.len(),
            _ => text[..end]
                .iter()
                .enumerate()
                .rev()
                .filter(|(_, byte)| **byte == b'\n')
                .nth(lines - 1)
                .map_or(0, |(at, _)| at + 1),
        };
        file.seek(SeekFrom::Start(begin as u64)).map_err(failed())?;
        self.open = Some(file);
        Ok(())
    }

    /// The next bytes; empty where there are none now.
    ///
    /// # Errors
    /// Where the log cannot be read.
    pub fn read(&mut self) -> Result<Vec<u8>> {
        let failed = |path: &Path| Error::io(format!("cannot read {}", path.display()));
        let mut buffer = vec![0; 64 << 10];
        loop {
            let Some(file) = &mut self.open else {
                let path = self.older.take().unwrap_or_else(|| self.path.clone());
                match open(&path).map_err(failed(&path))? {
                    Some(file) => self.open = Some(file),
                    None => return Ok(Vec::new()),
                }
                continue;
            };
            let count = file.read(&mut buffer).map_err(failed(&self.path))?;
            if count > 0 {
                buffer.truncate(count);
                return Ok(buffer);
            }
            // The older file is done, or the newer one was renamed and there is a newer one still.
            let here = file.metadata().map(|about| about.ino()).ok();
            let now = fs::metadata(&self.path).map(|about| about.ino()).ok();
            if now.is_none() || here == now {
                return Ok(Vec::new());
            }
            self.open = None;
        }
    }
}

fn open(path: &Path) -> std::io::Result<Option<fs::File>> {
    match process::open_plain(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proportional_set_is_read() {
        let rollup = "55d0-7ffd ---p 00000000 00:00 0    [rollup]\nRss:            2048 kB\nPss:            1234 kB\nPss_Dirty: 9 kB\n";
        assert_eq!(proportional(rollup), Some(1234 * 1024));
        assert_eq!(proportional("Pss: many kB\n"), None);
        assert_eq!(proportional("Pss_Anon: 1 kB\n"), None);
    }

    #[test]
    fn traffic_is_read_by_the_interfaces_name() {
        let table = "Inter-|   Receive  |  Transmit\n face |bytes packets\n\
                     bt1: 100 2 0 0 0 0 0 0 300 4 0 0 0 0 0 0\n  bt12: 5 1 0 0 0 0 0 0 7 1 0 0 0 0 0 0\n";
        assert_eq!(traffic(table, "bt1"), Some((100, 300)));
        assert_eq!(traffic(table, "bt12"), Some((5, 7)));
        assert_eq!(traffic(table, "bt2"), None);
    }
}
