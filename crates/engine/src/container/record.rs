//! What is kept of a container, in memory and in `container.json`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard};

use base::file::{self, Durability};
use base::pidfd::ProcessKey;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::container::config::ContainerConfig;
use crate::container::host_config::HostConfig;
use crate::container::inspect::{ContainerState, Health, MountPoint};
use crate::container::links::Link;
use crate::container::networking::EndpointSettings;
use crate::error::{Error, Result};

/// The form of `container.json` this build writes.
pub(crate) const VERSION: u32 = 1;

/// A container's state.
///
/// ```text
///            start                exit, no restart
/// Created ──────────▶ Running ─────────────────────▶ Exited
///    │                 │   ▲ ▲                         │ start
///    │           pause │   │ └─────────────────────────┘
///    │                 ▼   │ unpause
///    │                Paused            exit, policy wants it again
///    │                        Running ───────────────▶ Restarting ──(back-off)──▶ Running
///    │                                                     │ stop ▶ Exited
///    └── remove, and from any state with force ▶ Removing ▶ (gone) | Dead (what could not be removed)
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Phase {
    #[default]
    Created,
    Running,
    Paused,
    Restarting,
    Exited,
    Removing,
    Dead,
}

impl Phase {
    /// Docker's word.
    pub fn word(self) -> &'static str {
        match self {
            Phase::Created => "created",
            Phase::Running => "running",
            Phase::Paused => "paused",
            Phase::Restarting => "restarting",
            Phase::Exited => "exited",
            Phase::Removing => "removing",
            Phase::Dead => "dead",
        }
    }

    /// Whether there is a process.
    pub fn lives(self) -> bool {
        matches!(self, Phase::Running | Phase::Paused)
    }
}

/// A mount of a container, resolved at creation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct MountRecord {
    pub point: MountPoint,
    /// Of a volume that is to be removed with the container.
    #[serde(default)]
    pub anonymous: bool,
    /// Below the root of the volume or image.
    #[serde(default)]
    pub subpath: String,
    /// Recursive bind.
    #[serde(default)]
    pub recursive: bool,
    /// tmpfs options.
    #[serde(default)]
    pub options: Vec<String>,
    /// Of `--tmpfs`, which docker shows among the host's settings alone.
    #[serde(default)]
    pub unlisted: bool,
    /// Whether image content is copied into the (empty) volume.
    #[serde(default)]
    pub copy: bool,
    /// Of an image mount: the snapshot that is mounted, this container's own.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub snapshot: String,
}

/// `container.json`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Record {
    pub version: u32,
    pub id: String,
    /// Without a slash.
    pub name: String,
    /// RFC 3339.
    pub created: String,
    /// `sha256:…`
    pub image: String,
    pub platform: String,
    pub config: ContainerConfig,
    pub host: HostConfig,
    pub mounts: Vec<MountRecord>,
    /// Network name to what is asked of it and, while running, what it got.
    pub networks: BTreeMap<String, EndpointSettings>,
    /// Legacy links, on the default bridge.
    #[serde(default)]
    pub links: Vec<Link>,
    /// As the network manager gave them, while running.
    #[serde(default)]
    pub endpoints: Vec<net::Endpoint>,
    pub phase: Phase,
    #[serde(default)]
    pub process: Option<ProcessKey>,
    /// The boot in which `process` was started: its numbers mean nothing in another.
    #[serde(default)]
    pub boot: String,
    pub exit_code: i32,
    pub oom_killed: bool,
    pub error: String,
    pub started_at: String,
    pub finished_at: String,
    pub restart_count: u32,
    /// Stopped by a person, which `unless-stopped` heeds.
    pub stopped_by_user: bool,
    /// It runs one step of a build, and goes with the daemon that builds.
    #[serde(default)]
    pub step: bool,
    /// Warnings of health checks survive a daemon.
    #[serde(default)]
    pub health: Option<Health>,
}

impl Record {
    /// The mounts, as docker lists them.
    pub fn listed_mounts(&self) -> Vec<MountPoint> {
        self.mounts
            .iter()
            .filter(|mount| !mount.unlisted)
            .map(|mount| mount.point.clone())
            .collect()
    }

    /// The program and its arguments: entrypoint and command together.
    pub fn arguments(&self) -> Vec<String> {
        let entrypoint = self
            .config
            .entrypoint
            .iter()
            .flat_map(|words| words.0.iter());
        let command = self.config.cmd.iter().flat_map(|words| words.0.iter());
        entrypoint.chain(command).cloned().collect()
    }

    /// Whether it has the host's network, another container's, or none of its own for another reason.
    pub fn shares_network(&self) -> Option<&str> {
        self.host.network_mode.strip_prefix("container:")
    }

    /// The state as clients see it.
    pub fn state(&self) -> ContainerState {
        let lives = self.phase.lives();
        ContainerState {
            status: self.phase.word().into(),
            running: lives || self.phase == Phase::Restarting,
            paused: self.phase == Phase::Paused,
            restarting: self.phase == Phase::Restarting,
            oom_killed: self.oom_killed,
            dead: self.phase == Phase::Dead,
            pid: if lives {
                self.process.map_or(0, |key| key.pid)
            } else {
                0
            },
            exit_code: self.exit_code,
            error: self.error.clone(),
            started_at: self.started_at.clone(),
            finished_at: self.finished_at.clone(),
            health: self.health.clone(),
        }
    }
}

/// What waiters look at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Milestones {
    /// How often a process of it has ended.
    pub exits: u64,
    /// How often it has come to rest: ended with no restart to come.
    pub rests: u64,
    pub code: i32,
    pub removed: bool,
    /// How often its removal was tried in vain.
    pub failed_removals: u64,
}

/// A container in the inventory.
///
/// Lock order: `operation`, then the inventory's tables, then `record`. `record` is never held across an await.
pub(crate) struct Container {
    pub id: String,
    /// `STATE/containers/ID`
    pub directory: PathBuf,
    /// `RUN/containers/ID`: the bundle, the exit record.
    pub run: PathBuf,
    /// One lifecycle operation at a time.
    pub operation: tokio::sync::Mutex<()>,
    record: RwLock<Record>,
    pub milestones: watch::Sender<Milestones>,
    /// Health checks, stats and back-off of this run; aborted when it ends.
    pub tasks: Mutex<Vec<tokio::task::AbortHandle>>,
    pub execs: Mutex<Vec<String>>,
    /// Held while a process of it is being started, and while its end is handled. After `operation`.
    pub turn: tokio::sync::Mutex<()>,
    /// Written while its processes are frozen, read while another is being made: one that is born frozen says nothing, and
    /// the keeper would wait for it.
    pub freezing: tokio::sync::RwLock<()>,
    /// The last pause before a restart.
    pub pause: Mutex<std::time::Duration>,
}

impl Container {
    pub fn new(record: Record, directory: PathBuf, run: PathBuf) -> Arc<Container> {
        Arc::new(Container {
            id: record.id.clone(),
            directory,
            run,
            operation: tokio::sync::Mutex::new(()),
            milestones: watch::Sender::new(Milestones {
                code: record.exit_code,
                ..Default::default()
            }),
            record: RwLock::new(record),
            tasks: Mutex::default(),
            execs: Mutex::default(),
            turn: tokio::sync::Mutex::new(()),
            freezing: tokio::sync::RwLock::new(()),
            pause: Mutex::default(),
        })
    }

    pub fn record(&self) -> RwLockReadGuard<'_, Record> {
        self.record
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Changes the record, on disk first.
    ///
    /// # Errors
    /// Where it cannot be written; the record is then as before.
    pub fn change<T>(
        &self,
        durability: Durability,
        change: impl FnOnce(&mut Record) -> T,
    ) -> Result<T> {
        let mut guard = self
            .record
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut new = guard.clone();
        let result = change(&mut new);
        self.write(&new, durability)?;
        *guard = new;
        Ok(result)
    }

    /// Changes the record and writes it if that is possible: for what has happened anyway.
    pub fn note<T>(&self, change: impl FnOnce(&mut Record) -> T) -> T {
        let mut guard = self
            .record
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let result = change(&mut guard);
        if let Err(error) = self.write(&guard, Durability::Process) {
            tracing::error!(container = self.id, %error, "a container's record is not written");
        }
        result
    }

    fn write(&self, record: &Record, durability: Durability) -> Result<()> {
        let path = self.directory.join("container.json");
        file::write_json(&path, record, durability)
            .map_err(Error::io(format!("writing {}", path.display())))
    }

    pub fn name(&self) -> String {
        self.record().name.clone()
    }

    pub fn phase(&self) -> Phase {
        self.record().phase
    }

    pub fn log_path(&self) -> PathBuf {
        self.directory.join(format!("{}-json.log", self.id))
    }

    /// The attributes of its events.
    pub fn attributes(&self) -> BTreeMap<String, String> {
        let record = self.record();
        let mut attributes = record.config.labels.clone();
        attributes.insert("image".into(), record.config.image.clone());
        attributes.insert("name".into(), record.name.clone());
        attributes
    }

    /// Notes a task that ends with this run.
    pub fn add_task(&self, task: tokio::task::AbortHandle) {
        let mut tasks = lock(&self.tasks);
        tasks.retain(|task| !task.is_finished());
        tasks.push(task);
    }

    /// Ends the tasks of this run.
    pub fn end_tasks(&self) {
        for task in std::mem::take(&mut *lock(&self.tasks)) {
            task.abort();
        }
    }
}

/// Locks, whatever a panicking holder did: the tables are changed in single steps.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}
