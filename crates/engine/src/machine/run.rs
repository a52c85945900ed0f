//! Starting machines, following them to their end, and what happens then.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use base::Kind;
use base::file::{Durability, write_json};
use base::pidfd::{PidFd, ProcessKey};
use base::units::format_size;
use net::{Endpoint, EndpointSpec, Mac, Protocol, PublishedPort, TapOptions};
use vmm::boot::DiskBus;
use vmm::process::protocol::{Request, State};
use vmm::process::{
    self, ExitReason, ExitRecord, Forward, ProcessConfig, ProcessDisk, ProcessNetwork, UserNetwork,
};

use super::create::SMALLEST_MEMORY;
use super::power::{end_process, power_off};
use super::process::{FIRST_PASSED, ask, has_ended, make_cgroup, reap, spawn};
use super::record::{Machine, NO_NETWORK, Restart, Run, USER_NETWORK};
use super::{Machines, Slot, bases, disk};
use crate::{Error, Result};

/// A machine that ran this long starts anew with its restarts.
const STEADY: Duration = Duration::from_secs(30);
/// Between an end and the restart that the policy wants: doubled each time, up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How long a process that was killed can take to end.
const HOPELESS: Duration = Duration::from_secs(120);

/// A machine's way onto its network.
struct Access {
    /// Absent where it has none.
    network: Option<ProcessNetwork>,
    queues: Vec<std::os::fd::OwnedFd>,
    endpoint: Option<Endpoint>,
    ports: Vec<PublishedPort>,
    mac: Option<Mac>,
}

/// A locally administered address that follows from the machine's id.
fn mac_of(machine: &Machine) -> Mac {
    machine.mac.unwrap_or_else(|| {
        let id = machine.id.as_str().as_bytes();
        let mut mac = [0x52u8, 0x54, 0, 0, 0, 0];
        for (index, byte) in id.iter().enumerate() {
            let slot = &mut mac[2 + index % 4];
            *slot = slot.rotate_left(3) ^ byte;
        }
        Mac(mac)
    })
}

/// What a process that ended at once says of it: its last line, or the message of a defect.
fn last_words(log: &str) -> &str {
    let mut lines = log.lines().skip_while(|line| !line.contains("panicked at"));
    match (lines.next(), lines.next()) {
        (Some(_), Some(message)) => message,
        _ => log
            .lines()
            .rev()
            .find(|line| !line.trim().is_empty())
            .unwrap_or("it said nothing"),
    }
}

/// What mends the failed start of a machine.
fn fix_of(name: &str, record: &ExitRecord) -> Option<String> {
    match &record.option {
        Some(option) => Some(format!("berth machine update {name} {option}")),
        None => record.fix.clone(),
    }
}

impl Machines {
    /// Starts a machine.
    ///
    /// # Errors
    /// [`Error::NotModified`] where it runs; what the host has no room for; what its process says.
    pub fn start(self: &Arc<Machines>, name: &str) -> Result<()> {
        let slot = self.find(name)?;
        self.start_slot(&slot)
    }

    fn start_slot(self: &Arc<Machines>, slot: &Arc<Slot>) -> Result<()> {
        let mut machine = slot.lock();
        let name = machine.spec.name.clone();
        if slot.gone.load(Ordering::SeqCst) {
            return Err(Error::NotFound(format!("there is no machine {name}")));
        }
        if machine.run.is_some() {
            return Err(Error::NotModified(format!("machine {name} runs already")));
        }
        let (id, memory) = (machine.id.clone(), machine.spec.memory);
        self.ledger.admit(&id, memory, |others| {
            self.check_capacity(&machine.spec, others)
        })?;
        let pidfd = self.begin(slot, &mut machine).inspect_err(|_| {
            self.clear_up(&machine);
            machine.run = None;
            let _ = self.save(slot, &machine);
        })?;
        drop(machine);
        self.watch(slot.clone(), pidfd);
        Ok(())
    }

    /// Removes what a run had of the host.
    fn clear_up(&self, machine: &Machine) {
        self.ledger.strike(&machine.id);
        self.engine.networks().release(machine.id.as_str());
        crate::container::cgroup::remove(&self.cgroup_of(machine));
    }

    fn cgroup_of(&self, machine: &Machine) -> String {
        format!(
            "{}/machine-{}",
            self.engine.config().cgroup_parent,
            machine.id
        )
    }

    fn access(&self, machine: &Machine) -> Result<Access> {
        let spec = &machine.spec;
        if spec.network == NO_NETWORK {
            return Ok(Access {
                network: None,
                queues: Vec::new(),
                endpoint: None,
                ports: Vec::new(),
                mac: None,
            });
        }
        if spec.network == USER_NETWORK {
            let mac = mac_of(machine);
            let mut forwards = Vec::new();
            let mut ports = Vec::new();
            for port in &spec.ports {
                let any = std::net::Ipv4Addr::UNSPECIFIED.into();
                let (host_ip, (host_port, _)) = (
                    port.host_ip.unwrap_or(any),
                    port.host_ports.unwrap_or((0, 0)),
                );
                forwards.push(Forward {
                    udp: port.protocol == Protocol::Udp,
                    host: (host_ip, host_port).into(),
                    guest: port.container_port,
                });
                ports.push(PublishedPort {
                    host_ip,
                    host_port,
                    container_port: port.container_port,
                    protocol: port.protocol,
                });
            }
            let network = ProcessNetwork {
                mac: mac.0,
                descriptor: -1,
                user: Some(UserNetwork {
                    hostname: spec.name.clone(),
                    forwards,
                }),
                mtu: None,
            };
            return Ok(Access {
                network: Some(network),
                queues: Vec::new(),
                endpoint: None,
                ports,
                mac: Some(mac),
            });
        }
        let networks = self.engine.networks();
        let wish = EndpointSpec {
            network: spec.network.clone(),
            container: machine.id.to_string(),
            names: vec![spec.name.clone()],
            mac: machine.mac,
            ..EndpointSpec::default()
        };
        let tap = networks
            .tap(wish, TapOptions::default())
            .map_err(Error::room)?;
        let ports = networks
            .publish(&tap.endpoint, &spec.ports)
            .map_err(Error::room)?;
        let mac = tap
            .endpoint
            .mac
            .ok_or_else(|| Error::Invalid("the network gave no hardware address".into()))?;
        let network = ProcessNetwork {
            mac: mac.0,
            descriptor: FIRST_PASSED,
            user: None,
            mtu: tap.mtu.and_then(|m| u16::try_from(m).ok()),
        };
        Ok(Access {
            network: Some(network),
            queues: tap.queues,
            endpoint: Some(tap.endpoint),
            ports,
            mac: Some(mac),
        })
    }

    /// What the machine's process is to run, with the files it may only read.
    fn process_config(
        &self,
        folder: &Path,
        machine: &Machine,
        network: Option<ProcessNetwork>,
    ) -> Result<ProcessConfig> {
        let spec = &machine.spec;
        let base = match &machine.base {
            Some(name) => Some(self.bases.get(name).ok_or_else(|| {
                Error::NotFound(format!(
                    "the image's files below the disk of machine {} are gone: {} is missing",
                    spec.name,
                    self.bases.folder_of(name).display()
                ))
            })?),
            None => None,
        };
        let own_kernel = folder.join(bases::KERNEL);
        let (kernel, unpacked) = match &base {
            Some(base) if !own_kernel.exists() => (
                base.folder.join(bases::KERNEL),
                base.unpacked.then(|| base.folder.join(bases::UNPACKED)),
            ),
            _ => (own_kernel, None),
        };
        let own_initrd = folder.join(bases::INITRD);
        let initrd = match &base {
            Some(base) if !own_initrd.exists() => base.folder.join(bases::INITRD),
            _ => own_initrd,
        };
        let mut disks = vec![ProcessDisk {
            path: folder.join(disk::file_name(machine.format)),
            format: machine.format,
            read_only: false,
            bus: DiskBus::Nvme,
        }];
        disks.extend(machine.drives.iter().map(|drive| ProcessDisk {
            path: drive.path.clone(),
            format: drive.format,
            read_only: drive.read_only,
            bus: drive.bus,
        }));
        Ok(ProcessConfig {
            version: 1,
            kernel,
            unpacked,
            initrd: machine.initrd.then_some(initrd),
            append: format!("root=/dev/nvme0n1 rw quiet {}", spec.append),
            cpus: spec.cpus,
            memory: spec.memory,
            cpu: spec.cpu,
            model: Default::default(),
            disks,
            below: base
                .iter()
                .map(|base| base.folder.join(bases::DISK))
                .collect(),
            networks: network.into_iter().collect(),
            on_crash: spec.on_crash,
            on_disk_full: spec.on_disk_full,
        })
    }

    fn begin(&self, slot: &Slot, machine: &mut Machine) -> Result<PidFd> {
        let access = self.access(machine)?;
        machine.mac = access.mac.or(machine.mac);
        let folder = &slot.folder;
        let config = self.process_config(folder, machine, access.network)?;
        let write = |name: &str| Error::io(format!("cannot write {}", folder.join(name).display()));
        write_json(&folder.join(process::CONFIG), &config, Durability::Process)
            .map_err(write(process::CONFIG))?;
        let _ = fs::remove_file(folder.join(process::EXIT));
        let _ = fs::remove_file(folder.join(process::CONTROL));
        let log = fs::File::create(folder.join("process.log")).map_err(write("process.log"))?;
        let path = self.cgroup_of(machine);
        let (cgroup, doors) = match make_cgroup(&path, machine) {
            Ok((_, doors)) => (Some(path), doors),
            // As with a user's own daemon, to which nobody delegated any.
            Err(error) => {
                tracing::warn!(%error, machine = machine.spec.name, "it runs without limits of its own");
                (None, Vec::new())
            }
        };
        let child = spawn(folder, access.queues, doors, log)?;
        let key = ProcessKey::of(child.id() as i32)
            .map_err(Error::io("cannot find the machine's process".to_owned()))?;
        let pidfd = PidFd::open(key.pid)
            .map_err(Error::io("cannot hold the machine's process".to_owned()))?;
        reap(child);
        machine.run = Some(Run {
            process: key,
            started: base::time::now_rfc3339(),
            endpoint: access.endpoint,
            ports: access.ports,
            cgroup,
            host_went_down: false,
        });
        machine.last_exit = None;
        machine.stopped = false;
        let begun = self
            .save(slot, machine)
            .and_then(|()| self.wait_until_it_answers(&machine.spec.name, folder, &pidfd));
        if let Err(error) = begun {
            let _ = pidfd.signal(libc::SIGKILL);
            let end = Instant::now() + Duration::from_secs(10);
            while !has_ended(&pidfd) && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(5));
            }
            return Err(error);
        }
        Ok(pidfd)
    }

    /// A process that ends at once says why here and not in some log.
    fn wait_until_it_answers(&self, name: &str, folder: &Path, pidfd: &PidFd) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(60);
        let failed = |message: String| {
            Err(Error::Runtime {
                message,
                kind: Kind::Internal,
            })
        };
        loop {
            let ended = has_ended(pidfd);
            match process::read_exit(folder) {
                Some(record) if record.reason == ExitReason::Failed => {
                    return Err(Error::Room {
                        kind: record.kind.unwrap_or(Kind::Internal),
                        fix: fix_of(name, &record),
                        message: format!("machine {name} cannot start: {}", record.message),
                    });
                }
                // It may have run and powered off within our pause.
                Some(_) => return Ok(()),
                None => {}
            }
            if ask(folder, &Request::Status)
                .is_ok_and(|answer| answer.status.is_some_and(|s| s.state != State::Starting))
            {
                return Ok(());
            }
            if ended {
                let log = fs::read_to_string(folder.join("process.log")).unwrap_or_default();
                return failed(format!(
                    "the machine's process ended at once: {}",
                    last_words(&log)
                ));
            }
            if Instant::now() > end {
                return failed("the machine's process does not answer".into());
            }
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    /// Follows a process to its end.
    pub(super) fn watch(self: &Arc<Machines>, slot: Arc<Slot>, pidfd: PidFd) {
        let machines = self.clone();
        let watched = std::thread::Builder::new()
            .name("machine-end".into())
            .stack_size(128 << 10)
            .spawn(move || {
                let begun = Instant::now();
                let mut fds = [rustix::event::PollFd::new(
                    &pidfd,
                    rustix::event::PollFlags::IN,
                )];
                while rustix::event::poll(&mut fds, None).is_err() {}
                if begun.elapsed() > STEADY {
                    slot.restarts.store(0, Ordering::Relaxed);
                }
                machines.ended(&slot);
            });
        if let Err(error) = watched {
            tracing::error!(%error, "no thread to follow a machine: its end is seen when the daemon starts next");
        }
    }

    pub(super) fn ended(self: &Arc<Machines>, slot: &Arc<Slot>) {
        if self.engine.host_goes_down() {
            return;
        }
        let mut machine = slot.lock();
        let Some(run) = machine.run.take() else {
            return;
        };
        let record = process::read_exit(&slot.folder);
        let mut record = record.unwrap_or_else(|| {
            ExitRecord::now(
                ExitReason::Killed,
                "its process was killed, or the host went down",
            )
        });
        if run.host_went_down {
            record.message = "the host went down".into();
        }
        let again = match machine.spec.restart {
            Restart::No => false,
            Restart::OnFailure => {
                (record.reason != ExitReason::PowerOff || run.host_went_down) && !machine.stopped
            }
            Restart::Always | Restart::UnlessStopped => !machine.stopped,
        };
        tracing::info!(machine = machine.spec.name, reason = ?record.reason, message = record.message, "a machine ended");
        machine.last_exit = Some(record);
        self.clear_up(&machine);
        if !slot.gone.load(Ordering::SeqCst)
            && let Err(error) = self.save(slot, &machine)
        {
            tracing::error!(%error, "a machine's end cannot be recorded");
        }
        drop(machine);
        if again {
            self.restart_soon(slot);
        }
    }

    /// Starts a machine after a pause that grows with each time.
    pub(super) fn restart_soon(self: &Arc<Machines>, slot: &Arc<Slot>) {
        let times = slot.restarts.fetch_add(1, Ordering::Relaxed);
        let pause = Duration::from_millis(500 << times.min(10)).min(LONGEST_PAUSE);
        let (machines, slot) = (self.clone(), slot.clone());
        let started = std::thread::Builder::new()
            .name("machine-again".into())
            .stack_size(256 << 10)
            .spawn(move || {
                std::thread::sleep(pause);
                let name = {
                    let machine = slot.lock();
                    // A person may have stopped, started or removed it meanwhile.
                    let gone = slot.gone.load(Ordering::SeqCst);
                    if machine.run.is_some() || gone || machines.engine.host_goes_down() {
                        return;
                    }
                    if machine.stopped {
                        return;
                    }
                    machine.spec.name.clone()
                };
                match machines.start_slot(&slot) {
                    Ok(()) => tracing::info!(machine = name, "started again, as its policy says"),
                    Err(Error::NotModified(_) | Error::NotFound(_)) => {}
                    Err(error) => {
                        tracing::error!(machine = name, %error, "cannot be started again");
                        machines.restart_soon(&slot);
                    }
                }
            });
        if let Err(error) = started {
            tracing::error!(%error, "no thread to start a machine again");
        }
    }

    pub(super) fn running(&self, name: &str) -> Result<(Arc<Slot>, ProcessKey)> {
        let slot = self.find(name)?;
        let run = slot.lock().run.as_ref().map(|run| run.process);
        let key = run.ok_or_else(|| Error::Room {
            message: format!("machine {name} is not running"),
            kind: Kind::Conflict,
            fix: Some(format!("berth machine start {name}")),
        })?;
        Ok((slot, key))
    }

    fn command(&self, name: &str, request: &Request) -> Result<()> {
        let (slot, _) = self.running(name)?;
        let answer = ask(&slot.folder, request)?;
        match answer.error {
            None => Ok(()),
            Some(error) => Err(Error::Conflict(format!("machine {name}: {error}"))),
        }
    }

    /// Records that a person ends it, so that no policy starts it again.
    fn note_stop(&self, slot: &Slot) {
        let mut machine = slot.lock();
        machine.stopped = true;
        if let Err(error) = self.save(slot, &machine) {
            tracing::warn!(%error, "a machine's stop is not recorded");
        }
    }

    /// Whether the run that `key` names is over and recorded.
    fn is_over(slot: &Slot, key: ProcessKey) -> bool {
        let machine = slot.lock();
        machine.run.as_ref().is_none_or(|run| run.process != key)
    }

    /// Asks the guest to power off, and ends it after `timeout`.
    ///
    /// # Errors
    /// [`Error::NotModified`] where it does not run; no policy starts it then either.
    pub fn stop(&self, name: &str, timeout: Duration) -> Result<()> {
        let slot = self.find(name)?;
        self.note_stop(&slot);
        let run = slot.lock().run.as_ref().map(|run| run.process);
        let Some(key) = run else {
            return Err(Error::NotModified(format!("machine {name} is not running")));
        };
        if power_off(&slot.folder, timeout, || Self::is_over(&slot, key)) {
            return Ok(());
        }
        self.kill_slot(&slot, key)
    }

    /// Ends a machine at once.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn kill(&self, name: &str) -> Result<()> {
        let (slot, key) = self.running(name)?;
        self.note_stop(&slot);
        self.kill_slot(&slot, key)
    }

    /// Ends the run that `key` names, by a word and then by force.
    pub(super) fn kill_slot(&self, slot: &Slot, key: ProcessKey) -> Result<()> {
        if end_process(&slot.folder, key, HOPELESS, || Self::is_over(slot, key)) {
            return Ok(());
        }
        Err(Error::Conflict(format!(
            "process {} of the machine does not end: it hangs in the kernel, perhaps on a disk that does not answer",
            key.pid
        )))
    }

    /// Stops the CPUs.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn pause(&self, name: &str) -> Result<()> {
        self.command(name, &Request::Pause)
    }

    /// Lets paused CPUs go on.
    ///
    /// # Errors
    /// Where it does not run, or cannot while the host's disk is full.
    pub fn resume(&self, name: &str) -> Result<()> {
        self.command(name, &Request::Resume)
    }

    /// Resets the guest, as the button of a real one does.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn reset(&self, name: &str) -> Result<()> {
        self.command(name, &Request::Reset)
    }

    /// Leaves a running guest `bytes` of its memory and asks the rest back, up to its end.
    ///
    /// # Errors
    /// Where it does not run; less than a guest needs, or more than the machine has.
    pub fn balloon(&self, name: &str, bytes: u64) -> Result<()> {
        let (slot, _) = self.running(name)?;
        let memory = slot.lock().spec.memory;
        if !(SMALLEST_MEMORY..=memory).contains(&bytes) {
            return Err(Error::Invalid(format!(
                "machine {name} can keep between {} and {} of its memory; {} were asked for",
                format_size(SMALLEST_MEMORY),
                format_size(memory),
                format_size(bytes)
            )));
        }
        self.command(
            name,
            &Request::Balloon {
                bytes: memory - bytes,
            },
        )
    }

    /// Sets the size of the virtio console, as its guest sees it.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn resize(&self, name: &str, columns: u16, rows: u16) -> Result<()> {
        self.command(name, &Request::Resize { columns, rows })
    }

    /// Waits for a machine's end, up to `timeout`: how it ended last, where it does not run.
    ///
    /// # Errors
    /// Where there is no such machine.
    pub fn wait(&self, name: &str, timeout: Duration) -> Result<Option<ExitRecord>> {
        let slot = self.find(name)?;
        let end = Instant::now() + timeout;
        loop {
            {
                let machine = slot.lock();
                if machine.run.is_none() {
                    let never = || ExitRecord {
                        finished: String::new(),
                        ..ExitRecord::now(ExitReason::Failed, "it never ran")
                    };
                    return Ok(Some(machine.last_exit.clone().unwrap_or_else(never)));
                }
            }
            if Instant::now() >= end {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(25));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_that_mends_a_start_is_one_of_the_machine() {
        let mut record = ExitRecord::now(ExitReason::Failed, "it has no room");
        record.fix = Some("chmod o+r /x".into());
        assert_eq!(fix_of("web", &record).unwrap(), "chmod o+r /x");
        record.option = Some("--cpu soft".into());
        assert_eq!(
            fix_of("web", &record).unwrap(),
            "berth machine update web --cpu soft"
        );
    }

    #[test]
    fn a_defects_message_is_found_among_its_notes() {
        let log =
            "thread 'main' panicked at src/x.rs:1:2:\nit broke\nnote: run with RUST_BACKTRACE=1\n";
        assert_eq!(last_words(log), "it broke");
        assert_eq!(last_words("one\ntwo\n\n"), "two");
        assert_eq!(last_words(""), "it said nothing");
    }
}
