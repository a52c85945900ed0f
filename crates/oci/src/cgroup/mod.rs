//! Control groups: v2, v1, and the hybrid of both, under one handle.
//!
//! On a host with v1 controllers, a container joins those that hold limits or answer `stats`, and the v2 tree where
//! it is mounted, which alone can freeze and kill atomically. `cpuset` and the rarer controllers are joined when a
//! limit asks for them: every joined hierarchy costs a directory and a migration.

mod devices;
mod hierarchies;
pub(crate) mod rdt;
mod resources;
mod stats;
mod systemd;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::{LinuxIntelRdt, LinuxResources, Spec};
use rustix::fs::{CWD, Mode, OFlags};
use serde::{Deserialize, Serialize};

pub use hierarchies::Hierarchies;
pub use rdt::ResctrlGroup;
pub use stats::{BlkioEntry, CpuStats, MemoryStats, PidsStats, Stats};

use crate::error::{Context, Error, Result};

/// Where a container's cgroup is to be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum CgroupTarget {
    /// The caller's own cgroups are kept; limits are then an error.
    #[default]
    None,
    /// A path below each hierarchy's root, as `/berth/ID`.
    Path(String),
    /// A transient scope of systemd, as `slice:prefix:name` says it.
    Systemd {
        slice: String,
        prefix: String,
        name: String,
    },
}

impl CgroupTarget {
    /// The target a bundle asks for: its `linux.cgroupsPath`, or `/ID`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a path with `..` and for a systemd path not of three parts.
    pub fn of(spec: &Spec, id: &str, systemd: bool) -> Result<CgroupTarget> {
        let path = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.cgroups_path().as_deref());
        let path = path
            .map(|path| path.to_string_lossy().into_owned())
            .filter(|path| !path.is_empty());
        if systemd {
            let Some(path) = path else {
                return Ok(CgroupTarget::Systemd {
                    slice: String::new(),
                    prefix: "berth".into(),
                    name: id.to_owned(),
                });
            };
            let parts: Vec<&str> = path.split(':').collect();
            let [slice, prefix, name] = parts[..] else {
                return Err(Error::invalid(format!(
                    "config.json: linux.cgroupsPath {path:?} is not slice:prefix:name, as --systemd-cgroup wants it"
                )));
            };
            return Ok(CgroupTarget::Systemd {
                slice: slice.into(),
                prefix: prefix.into(),
                name: name.into(),
            });
        }
        Ok(CgroupTarget::Path(clean_path(
            &path.unwrap_or_else(|| id.to_owned()),
        )?))
    }
}

/// An absolute path below a hierarchy's root, without `.` and never with `..`.
fn clean_path(path: &str) -> Result<String> {
    let mut clean = String::new();
    for part in path
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
    {
        if part == ".." || part.contains(['\0', '\n']) {
            return Err(Error::invalid(format!(
                "the cgroup path {path:?} must not hold {part:?}"
            )));
        }
        clean.push('/');
        clean.push_str(part);
    }
    if clean.is_empty() {
        return Err(Error::invalid(
            "the cgroup path must not be the root of the hierarchy",
        ));
    }
    Ok(clean)
}

/// Joined by every container on a v1 host.
const ALWAYS_V1: [&str; 6] = ["cpu", "cpuacct", "memory", "devices", "blkio", "pids"];

/// A container's cgroup in every hierarchy it is in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Cgroup {
    /// Below each hierarchy's root.
    pub path: String,
    /// Its directory in the v2 tree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unified: Option<PathBuf>,
    /// Its directory by v1 controller.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub v1: BTreeMap<String, PathBuf>,
    /// The scope systemd keeps for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// Its part of resctrl, which lives and dies as a cgroup does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resctrl: Option<ResctrlGroup>,
}

impl Cgroup {
    /// The cgroup at `path` as it is now, in whichever hierarchies it exists.
    ///
    /// # Errors
    /// [`Error::Conflict`]-like system errors; `NotFound` where no hierarchy has it.
    pub fn open(path: &str) -> Result<Cgroup> {
        let hierarchies = Hierarchies::of_host()?;
        let path = clean_path(path)?;
        let mut cgroup = Cgroup {
            path: path.clone(),
            ..Cgroup::default()
        };
        let below =
            |root: &Path| Some(root.join(&path[1..])).filter(|directory| directory.is_dir());
        cgroup.unified = hierarchies.unified.as_deref().and_then(below);
        for (controllers, root) in &hierarchies.v1 {
            if let Some(directory) = below(root) {
                cgroup.v1.extend(
                    controllers
                        .iter()
                        .map(|name| (name.clone(), directory.clone())),
                );
            }
        }
        if cgroup.unified.is_none() && cgroup.v1.is_empty() {
            return Err(Error::System {
                what: format!("open the cgroup {path}"),
                source: io::Error::from(io::ErrorKind::NotFound),
            });
        }
        Ok(cgroup)
    }

    /// Refuses a path where there are processes already, which would end with the container, or that is frozen.
    ///
    /// # Errors
    /// [`Error::Conflict`].
    pub(crate) fn refuse_used(path: &str, hierarchies: &Hierarchies) -> Result<()> {
        let clean = clean_path(path)?;
        let pids = hierarchies
            .v1
            .iter()
            .find(|(controllers, _)| controllers.iter().any(|name| name == "pids"))
            .map(|(_, root)| root);
        let there = hierarchies
            .unified
            .iter()
            .chain(pids)
            .any(|root| root.join(&clean[1..]).is_dir());
        if !there {
            return Ok(());
        }
        let cgroup = Cgroup::open(path)?;
        let used = if cgroup.is_frozen() {
            "is frozen"
        } else if !cgroup.processes()?.is_empty() {
            "is not empty"
        } else {
            return Ok(());
        };
        Err(Error::Conflict(format!(
            "the container's cgroup {clean} {used}: it may be another's; name one that does not exist (linux.cgroupsPath)"
        )))
    }

    /// Makes a cgroup at `path` with limits, for a process that is no container's. Nothing is left where it fails.
    ///
    /// # Errors
    /// Names the file and the value the kernel refused.
    pub fn make(path: &str, limits: &LinuxResources) -> Result<Cgroup> {
        let hierarchies = Hierarchies::of_host()?;
        let mut cgroup = Cgroup::begin(path, &hierarchies)?;
        if let Err(error) = cgroup.complete(&hierarchies, Some(limits), false) {
            let _ = cgroup.remove_now();
            return Err(error);
        }
        Ok(cgroup)
    }

    /// The files through which a process that has one thread joins all of it: it writes `0` to each.
    ///
    /// # Errors
    /// Where one cannot be opened.
    pub fn doors(&self) -> Result<Vec<OwnedFd>> {
        let mut doors = self.task_files()?;
        if let Some(directory) = &self.unified {
            let file = directory.join("cgroup.procs");
            let door =
                rustix::fs::openat(CWD, &file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
                    .during(|| format!("open {}", file.display()))?;
            doors.push(door);
        }
        Ok(doors)
    }

    /// Makes the v2 directory, in which a process can be born. [`Cgroup::complete`] makes the rest.
    pub(crate) fn begin(path: &str, hierarchies: &Hierarchies) -> Result<Cgroup> {
        let mut cgroup = Cgroup {
            path: clean_path(path)?,
            ..Cgroup::default()
        };
        if let Some(root) = &hierarchies.unified {
            let directory = root.join(&cgroup.path[1..]);
            make_directories(root, &directory, hierarchies.is_v2())?;
            cgroup.unified = Some(directory);
        }
        Ok(cgroup)
    }

    /// Makes the v1 directories and sets all limits. `full`: join every hierarchy, as a container that is to manage
    /// cgroups itself needs.
    pub(crate) fn complete(
        &mut self,
        hierarchies: &Hierarchies,
        limits: Option<&LinuxResources>,
        full: bool,
    ) -> Result<()> {
        for (controllers, root) in &hierarchies.v1 {
            let wanted = full
                || controllers.iter().any(|name| {
                    ALWAYS_V1.contains(&name.as_str())
                        || (name == "freezer" && self.unified.is_none())
                        || limits.is_some_and(|limits| resources::needs_v1(limits, name))
                });
            if wanted {
                self.add_v1(controllers, root)?;
            }
        }
        let given = limits.and_then(|limits| limits.devices().as_deref());
        match devices::apply(self, given.unwrap_or_default()) {
            // In a user namespace no program can be loaded, and no device be used that its user may not use anyway.
            Err(error) if base::userns::inside() && error.errno() == libc::EPERM => {}
            other => other?,
        }
        if let Some(limits) = limits {
            resources::apply(self, limits)?;
        }
        Ok(())
    }

    fn add_v1(&mut self, controllers: &[String], root: &Path) -> Result<()> {
        let directory = root.join(&self.path[1..]);
        let cpuset = controllers.iter().any(|name| name == "cpuset");
        match fs::create_dir(&directory) {
            Ok(()) if !cpuset => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !cpuset => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound && !cpuset => {
                fs::create_dir_all(&directory)
                    .during(|| format!("make the cgroup {}", directory.display()))?;
            }
            Err(error)
                if error.kind() != io::ErrorKind::NotFound
                    && error.kind() != io::ErrorKind::AlreadyExists =>
            {
                return Err(error).during(|| format!("make the cgroup {}", directory.display()));
            }
            _ => {
                fs::create_dir_all(&directory)
                    .during(|| format!("make the cgroup {}", directory.display()))?;
                resources::inherit_cpuset(root, &directory)?;
            }
        }
        self.v1.extend(
            controllers
                .iter()
                .map(|name| (name.clone(), directory.clone())),
        );
        Ok(())
    }

    /// Sets limits on a cgroup that exists; what `limits` does not name stays as it is.
    ///
    /// # Errors
    /// Names the file and the value the kernel refused.
    pub fn apply(&mut self, limits: &LinuxResources) -> Result<()> {
        if let Some(unit) = &self.unit {
            systemd::update(unit, limits, self.v1.is_empty())?;
        }
        if !self.v1.is_empty() {
            let hierarchies = Hierarchies::of_host()?;
            for (controllers, root) in &hierarchies.v1 {
                let wanted = controllers
                    .iter()
                    .any(|name| !self.v1.contains_key(name) && resources::needs_v1(limits, name));
                if wanted {
                    self.add_v1(controllers, root)?;
                    self.move_processes(&root.join(&self.path[1..]))?;
                }
            }
        }
        if let Some(rules) = limits
            .devices()
            .as_deref()
            .filter(|rules| !rules.is_empty())
        {
            devices::apply(self, rules)?;
        }
        resources::apply(self, limits)
    }

    /// Moves every process of this cgroup into one more hierarchy; forks in between are caught by looking again.
    fn move_processes(&self, directory: &Path) -> Result<()> {
        let procs = directory.join("cgroup.procs");
        for _ in 0..100 {
            let present = read_pids(&procs).unwrap_or_default();
            let missing: Vec<i32> = self
                .processes()?
                .into_iter()
                .filter(|pid| !present.contains(pid))
                .collect();
            if missing.is_empty() {
                return Ok(());
            }
            for pid in missing {
                match fs::write(&procs, pid.to_string()) {
                    Ok(()) => {}
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                    Err(error) => {
                        return Err(error)
                            .during(|| format!("move process {pid} into {}", directory.display()));
                    }
                }
            }
        }
        Ok(())
    }

    /// The usage of every controller this cgroup has.
    ///
    /// # Errors
    /// `NotFound` where the cgroup has gone.
    pub fn stats(&self) -> Result<Stats> {
        stats::read(self)
    }

    /// Stops every process until [`Cgroup::thaw`].
    ///
    /// # Errors
    /// [`Error::Unsupported`] where neither the v2 tree nor the freezer is there.
    pub fn freeze(&mut self) -> Result<()> {
        self.set_frozen(true)
    }

    /// Lets the processes go on.
    pub fn thaw(&mut self) -> Result<()> {
        self.set_frozen(false)
    }

    fn set_frozen(&mut self, frozen: bool) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        if let Some(directory) = self
            .unified
            .as_ref()
            .filter(|directory| directory.join("cgroup.freeze").exists())
        {
            let wanted = if frozen { "1" } else { "0" };
            fs::write(directory.join("cgroup.freeze"), wanted)
                .during(|| format!("write {}/cgroup.freeze", directory.display()))?;
            while field(&read(&directory.join("cgroup.events"))?, "frozen")
                != Some(u64::from(frozen))
            {
                if Instant::now() > deadline {
                    let _ = fs::write(directory.join("cgroup.freeze"), "0");
                    return Err(Error::Conflict(format!(
                        "the cgroup {} did not freeze within 10 s",
                        self.path
                    )));
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            return Ok(());
        }
        let Some(directory) = self.v1.get("freezer") else {
            return Err(Error::unsupported(
                "this container has no cgroup that can be frozen (neither v2 nor the v1 freezer)",
            ));
        };
        let wanted = if frozen { "FROZEN" } else { "THAWED" };
        let file = directory.join("freezer.state");
        loop {
            fs::write(&file, wanted).during(|| format!("write {wanted} to {}", file.display()))?;
            if read(&file)?.trim() == wanted {
                return Ok(());
            }
            if Instant::now() > deadline {
                let _ = fs::write(&file, "THAWED");
                return Err(Error::Conflict(format!(
                    "the cgroup {} did not freeze within 10 s",
                    self.path
                )));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether it is frozen.
    pub fn is_frozen(&self) -> bool {
        if let Some(directory) = &self.unified {
            return fs::read_to_string(directory.join("cgroup.freeze"))
                .is_ok_and(|text| text.trim() == "1");
        }
        self.v1.get("freezer").is_some_and(|directory| {
            fs::read_to_string(directory.join("freezer.state"))
                .is_ok_and(|text| text.trim() != "THAWED")
        })
    }

    /// Kills every process in it and below it.
    ///
    /// # Errors
    /// Where the kernel refuses; a cgroup that has gone is no error.
    pub fn kill(&self) -> Result<()> {
        if let Some(directory) = &self.unified {
            match fs::write(directory.join("cgroup.kill"), "1") {
                Ok(()) => return Ok(()),
                // Before Linux 5.14, or gone.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(error)
                        .during(|| format!("write {}/cgroup.kill", directory.display()));
                }
            }
        }
        for _ in 0..100 {
            let pids = self.processes()?;
            if pids.is_empty() {
                break;
            }
            for pid in pids {
                if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
            // A frozen v1 cgroup keeps even killed processes.
            if let Some(directory) = self.v1.get("freezer") {
                let _ = fs::write(directory.join("freezer.state"), "THAWED");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// The pids in it and below it, as this process's pid namespace numbers them.
    ///
    /// # Errors
    /// Where a directory cannot be read; one that has gone is empty.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let directory = self
            .unified
            .as_ref()
            .or_else(|| self.v1.get("pids"))
            .or_else(|| self.v1.values().next());
        let mut pids = Vec::new();
        if let Some(directory) = directory {
            collect(directory, &mut pids)
                .during(|| format!("list the processes of {}", directory.display()))?;
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Removes it in every hierarchy with all that is below. Processes just killed may take a moment to go: this
    /// waits for up to 5 s.
    ///
    /// # Errors
    /// Names the directory that is still in use.
    pub fn remove(&self) -> Result<()> {
        let mut directories: Vec<&PathBuf> = self.v1.values().chain(&self.unified).collect();
        directories.sort_unstable();
        directories.dedup();
        self.stop_unit();
        for directory in directories {
            let deadline = Instant::now() + Duration::from_secs(5);
            let mut pause = Duration::from_micros(200);
            loop {
                match remove_tree(directory) {
                    Ok(()) => break,
                    Err(error)
                        if error.raw_os_error() == Some(libc::EBUSY)
                            && Instant::now() < deadline =>
                    {
                        std::thread::sleep(pause);
                        pause = (pause * 2).min(Duration::from_millis(50));
                    }
                    Err(error) => {
                        return Err(error)
                            .during(|| format!("remove the cgroup {}", directory.display()));
                    }
                }
            }
        }
        self.forget_the_rest();
        Ok(())
    }

    /// Removes it if it is empty now: one try per directory.
    ///
    /// # Errors
    /// Where a process or a cgroup is left in it.
    pub(crate) fn remove_now(&self) -> Result<()> {
        if self.unit.is_some() && !self.processes()?.is_empty() {
            return Err(Error::Conflict(format!(
                "processes are left in the cgroup {}",
                self.path
            )));
        }
        self.stop_unit();
        let mut last = None;
        for directory in self.v1.values().chain(&self.unified) {
            if last == Some(directory) {
                continue;
            }
            last = Some(directory);
            match fs::remove_dir(directory) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(error)
                        .during(|| format!("remove the cgroup {}", directory.display()));
                }
            }
        }
        self.forget_the_rest();
        Ok(())
    }

    /// The directories of a unit are the manager's to remove: one that is taken from under it is kept as running.
    fn stop_unit(&self) {
        if let Some(unit) = &self.unit {
            let directories: Vec<&PathBuf> = self.unified.iter().collect();
            systemd::stop(unit, &directories);
        }
    }

    fn forget_the_rest(&self) {
        if let Some(resctrl) = &self.resctrl {
            resctrl.remove();
        }
    }

    /// Gives the container, whose first process is `pid`, its part of resctrl.
    pub(crate) fn join_resctrl(
        &mut self,
        config: &LinuxIntelRdt,
        id: &str,
        pid: i32,
    ) -> Result<()> {
        self.resctrl = Some(ResctrlGroup::begin(config, id, pid)?);
        Ok(())
    }

    /// The v2 directory as clone3(2) wants it.
    pub(crate) fn birthplace(&self) -> Result<Option<OwnedFd>> {
        let Some(directory) = &self.unified else {
            return Ok(None);
        };
        rustix::fs::open(
            directory,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .during(|| format!("open the cgroup {}", directory.display()))
        .map(Some)
    }

    /// The v1 `tasks` files. A process that writes `0` there moves itself, for which the kernel needs no lock over
    /// all processes of the host, as it does for a pid in `cgroup.procs`: milliseconds are saved per container.
    pub(crate) fn task_files(&self) -> Result<Vec<OwnedFd>> {
        let mut directories: Vec<&PathBuf> = self.v1.values().collect();
        directories.sort_unstable();
        directories.dedup();
        directories
            .into_iter()
            .map(|directory| {
                rustix::fs::openat(
                    CWD,
                    directory.join("tasks"),
                    OFlags::WRONLY | OFlags::CLOEXEC,
                    Mode::empty(),
                )
                .during(|| format!("open {}/tasks", directory.display()))
            })
            .collect()
    }

    /// A scope of systemd with `pid`, which has one thread, in it.
    ///
    /// # Errors
    /// What systemd or the kernel refused; the scope then ends with its process.
    pub(crate) fn systemd_scope(
        slice: &str,
        prefix: &str,
        name: &str,
        pid: i32,
        limits: Option<&LinuxResources>,
        hierarchies: &Hierarchies,
    ) -> Result<Cgroup> {
        let mut cgroup = systemd::start(slice, prefix, name, pid, limits, hierarchies)?;
        cgroup.complete(hierarchies, limits, false)?;
        // The manager makes v1 directories for what it manages itself.
        let mut directories: Vec<PathBuf> = cgroup.v1.values().cloned().collect();
        directories.sort_unstable();
        directories.dedup();
        for directory in directories {
            let procs = directory.join("cgroup.procs");
            fs::write(&procs, pid.to_string())
                .during(|| format!("move process {pid} to {}", directory.display()))?;
        }
        Ok(cgroup)
    }
}

/// Makes a v2 cgroup below `root`, handing down all controllers on the way where they are v2's.
fn make_directories(root: &Path, directory: &Path, delegate: bool) -> Result<()> {
    if !delegate {
        return match fs::create_dir(directory) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(_) => fs::create_dir_all(directory)
                .during(|| format!("make the cgroup {}", directory.display())),
        };
    }
    let below = directory.strip_prefix(root).unwrap_or(Path::new(""));
    let mut at = root.to_owned();
    for part in below.components() {
        let available = fs::read_to_string(at.join("cgroup.controllers")).unwrap_or_default();
        let enabled = fs::read_to_string(at.join("cgroup.subtree_control")).unwrap_or_default();
        let enabled: Vec<&str> = enabled.split_ascii_whitespace().collect();
        for controller in available
            .split_ascii_whitespace()
            .filter(|name| !enabled.contains(name))
        {
            // One by one: a controller that cannot be handed down (cpu with realtime tasks, processes in the way)
            // must not take the others with it. A limit that needs it fails later and says so.
            let _ = fs::write(at.join("cgroup.subtree_control"), format!("+{controller}"));
        }
        at.push(part);
        match fs::create_dir(&at) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).during(|| format!("make the cgroup {}", at.display())),
        }
    }
    Ok(())
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    match fs::remove_dir(directory) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error)
            if error.raw_os_error() != Some(libc::EBUSY)
                && error.raw_os_error() != Some(libc::ENOTEMPTY) =>
        {
            return Err(error);
        }
        Err(_) => {}
    }
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn collect(directory: &Path, pids: &mut Vec<i32>) -> io::Result<()> {
    match read_pids(&directory.join("cgroup.procs")) {
        Ok(found) => pids.extend(found),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => {
            return Ok(());
        }
        // A threaded cgroup lists its processes at its domain.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(error) => return Err(error),
    }
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), pids)?;
        }
    }
    Ok(())
}

fn read_pids(file: &Path) -> io::Result<Vec<i32>> {
    let text = fs::read_to_string(file)?;
    // A process of another pid namespace is shown as 0.
    Ok(text
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter(|pid| *pid > 0)
        .collect())
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).during(|| format!("read {}", file.display()))
}

/// The number after `key` in a file of `key value` lines.
fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        line.strip_prefix(key)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}

/// The v2 cgroup of a process, from /proc/PID/cgroup.
pub(crate) fn unified_path_of(pid: i32) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("0::").map(str::to_owned))
}

/// Moves the calling process by the descriptors of [`Cgroup::task_files`].
pub(crate) fn join(files: &[OwnedFd]) -> Result<()> {
    for file in files {
        rustix::io::write(file.as_fd(), b"0").during(|| "join the container's cgroup".into())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::hierarchies::parse_mountinfo;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_hybrid_host_is_read_from_its_mount_table() {
        let table = "\
30 23 0:26 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
33 30 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
34 23 0:27 / /elsewhere/cpu rw - cgroup cgroup rw,cpu,cpuacct
";
        let found = parse_mountinfo(table);
        assert_eq!(found.unified, Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(found.v1.len(), 2);
        assert_eq!(found.v1[0].0, ["cpu", "cpuacct"]);
        assert_eq!(found.v1[1].0, ["name=systemd"]);
    }

    #[test]
    fn a_path_cannot_leave_its_hierarchy() {
        assert_eq!(clean_path("a//./b").unwrap(), "/a/b");
        assert!(clean_path("/a/../../b").is_err());
        assert!(clean_path("/").is_err());
    }

    #[test]
    fn a_systemd_path_has_three_parts() {
        let spec = |path: &str| -> Spec {
            serde_json::from_str(&format!(
                r#"{{"ociVersion":"1.2.0","linux":{{"cgroupsPath":"{path}"}}}}"#
            ))
            .unwrap()
        };
        assert!(CgroupTarget::of(&spec("/a/b"), "x", true).is_err());
        let target = CgroupTarget::of(&spec("system.slice:libpod:abc"), "x", true).unwrap();
        assert!(matches!(target, CgroupTarget::Systemd { slice, .. } if slice == "system.slice"));
    }

    proptest! {
        #[test]
        fn no_table_panics(table in "(.{0,40}\n){0,5}") {
            let _ = parse_mountinfo(&table);
            let _ = clean_path(&table);
        }
    }
}
