//! Finding everything again: what runs, what has ended meanwhile, what was half-made.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base::Id;
use tokio::sync::mpsc;

use crate::Engine;
use crate::container::cgroup;
use crate::container::create::{blocking, read_record};
use crate::container::end::wants_restart;
use crate::container::network;
use crate::container::record::{Container, Phase};
use crate::error::{Error, Result};
use crate::keeper::client::{Keeper, Notice};
use crate::keeper::protocol::{Exit, Held};

const RECONNECT: Duration = Duration::from_secs(1);
const LONGEST_RECONNECT: Duration = Duration::from_secs(30);

/// The end of a process that nobody has seen.
fn unseen(pid: i32) -> Exit {
    Exit {
        code: 255,
        oom: false,
        finished: base::time::now_rfc3339(),
        pid,
    }
}

impl Engine {
    pub(crate) fn containers_folder(&self) -> PathBuf {
        self.config.paths.state.join("containers")
    }

    pub(crate) fn run_folder(&self) -> PathBuf {
        self.config.paths.run.join("containers")
    }

    /// The connection to the keeper, made anew where it was lost.
    pub(crate) async fn keeper(self: &Arc<Self>) -> Result<Arc<Keeper>> {
        let mut slot = self.keeper.lock().await;
        if let Some(keeper) = slot.as_ref().filter(|keeper| !keeper.is_lost()) {
            return Ok(keeper.clone());
        }
        let (keeper, held, notices) =
            Keeper::connect(&self.config.paths.run, &self.config.keeper_command).await?;
        let keeper = Arc::new(keeper);
        *slot = Some(keeper.clone());
        self.listen(notices);
        // A keeper that died took the streams of its containers with it: they are ended, so that none runs unseen. Before
        // anybody starts one with the new keeper, which is not among those it held.
        self.settle_with(&held);
        self.settle_execs_with(&held);
        drop(slot);
        let (engine, own) = (self.clone(), keeper.clone());
        tokio::spawn(async move { engine.forget_others(&own, &held).await });
        Ok(keeper)
    }

    /// The keeper's process.
    ///
    /// # Errors
    /// Where it cannot be reached.
    pub async fn keeper_pid(self: &Arc<Self>) -> Result<i32> {
        Ok(self.keeper().await?.pid)
    }

    fn listen(self: &Arc<Self>, mut notices: mpsc::UnboundedReceiver<Notice>) {
        let engine = Arc::downgrade(self);
        tokio::spawn(async move {
            while let Some(notice) = notices.recv().await {
                let Some(engine) = engine.upgrade() else {
                    return;
                };
                match notice {
                    Notice::Exited { id, exit } => engine.exited(id, exit).await,
                    Notice::Detached { id } => {
                        if let Some(container) = engine.inventory.get(&id) {
                            engine.tell(&container, "detach");
                        }
                    }
                    Notice::Lost => {
                        // Found out now rather than at the next request: what ended meanwhile must be handled.
                        tokio::spawn(async move {
                            let mut pause = RECONNECT;
                            while let Err(error) = engine.keeper().await {
                                tracing::error!(%error, "the container keeper cannot be reached");
                                tokio::time::sleep(pause).await;
                                pause = (pause * 2).min(LONGEST_RECONNECT);
                            }
                        });
                        return;
                    }
                }
            }
        });
    }

    async fn exited(self: &Arc<Self>, id: String, exit: Exit) {
        if self.host_goes_down() {
            return;
        }
        match self.inventory.get(&id) {
            Some(container) => {
                // Each on its own: one that hangs in its cleaning up must not hold up the others.
                tokio::spawn(self.clone().ended_boxed(container, exit));
            }
            None => {
                self.exec_ended(&id, &exit);
                if let Some(keeper) = self.keeper.lock().await.clone() {
                    let _ = keeper.forget(&id).await;
                }
            }
        }
    }

    fn ended_boxed(
        self: Arc<Self>,
        container: Arc<Container>,
        exit: Exit,
    ) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move { self.ended(container, exit).await })
    }

    /// Ends the execs that have ended unseen, and those whose process nobody holds.
    fn settle_execs_with(self: &Arc<Self>, held: &[Held]) {
        for id in self.running_execs() {
            let exit = match held.iter().find(|held| held.id == id) {
                Some(held) => held.exit.clone(),
                None => Some(unseen(0)),
            };
            if let Some(exit) = exit {
                self.exec_ended(&id, &exit);
            }
        }
    }

    /// Lets the keeper forget what is no container's own process and has ended; it keeps the others.
    async fn forget_others(&self, keeper: &Keeper, held: &[Held]) {
        for held in held {
            if self.inventory.get(&held.id).is_none() {
                let _ = keeper.forget(&held.id).await;
            }
        }
    }

    /// Compares what the records say with what the keeper holds.
    fn settle_with(self: &Arc<Self>, held: &[Held]) {
        let held: HashMap<&str, &Held> = held.iter().map(|held| (held.id.as_str(), held)).collect();
        let boot = base::host::boot_id();
        for container in self.inventory.all() {
            let record = container.record().clone();
            let missed = match held.get(container.id.as_str()) {
                Some(held) => match &held.exit {
                    Some(exit) if record.phase.lives() => Some(exit.clone()),
                    _ => None,
                },
                None if record.phase.lives() => {
                    // Its keeper is gone, and has written its exit if it saw it.
                    let written: Option<Exit> =
                        base::file::read_json(&container.run.join("exit.json"))
                            .ok()
                            .flatten();
                    let pid = record.process.map_or(0, |process| process.pid);
                    Some(
                        written
                            .filter(|exit| exit.pid == pid)
                            .unwrap_or_else(|| unseen(pid)),
                    )
                }
                None => None,
            };
            if let Some(exit) = missed {
                // Of another boot, the same numbers are somebody else's.
                if let Some(process) = record.process
                    && (record.boot.is_empty() || record.boot == boot)
                    && let Ok(Some(living)) = process.open()
                {
                    let _ = living.signal(libc::SIGKILL);
                }
                tokio::spawn(self.clone().ended_boxed(container, exit));
            }
        }
    }

    /// Reads all records, adopts what runs, and takes away what nobody owns.
    pub(crate) async fn reopen(self: &Arc<Self>) -> Result<()> {
        let engine = self.clone();
        blocking(move || {
            engine.sweep_contexts();
            engine.write_init()?;
            engine.load()
        })
        .await?;
        let (keeper, held, notices) =
            Keeper::connect(&self.config.paths.run, &self.config.keeper_command).await?;
        tracing::debug!(
            pid = keeper.pid,
            held = held.len(),
            "connected to the container keeper"
        );
        *self.keeper.lock().await = Some(Arc::new(keeper));
        let alive: HashMap<String, Held> = held
            .iter()
            .filter(|held| held.exit.is_none() && held.container.is_none())
            .map(|held| (held.id.clone(), held.clone()))
            .collect();
        for container in self.inventory.all() {
            let record = container.record().clone();
            match alive.get(&container.id) {
                // Started, and the daemon died before it could note that.
                Some(held)
                    if record.phase != Phase::Removing && record.process != Some(held.process) =>
                {
                    container.note(|record| {
                        record.phase = Phase::Running;
                        record.process = Some(held.process);
                        record.boot = base::host::boot_id();
                        record.started_at = base::time::now_rfc3339();
                    });
                }
                _ => {}
            }
        }
        let mut live: Vec<net::Endpoint> = self
            .inventory
            .all()
            .iter()
            .filter(|container| alive.contains_key(&container.id))
            .flat_map(|container| container.record().endpoints.clone())
            .collect();
        live.extend(crate::machine::live_endpoints(&self.config.paths.state));
        let engine = self.clone();
        blocking(move || {
            engine.networks.restore(&live).map_err(Error::room)?;
            engine.sweep(&alive.keys().cloned().collect());
            Ok(())
        })
        .await?;
        self.listen(notices);
        self.settle_with(&held);
        let keeper = self.keeper().await?;
        for held in held
            .iter()
            .filter(|held| self.inventory.get(&held.id).is_none())
        {
            // A container that is being removed.
            if held.container.is_none() && held.exit.is_none() {
                let _ = keeper.signal(&held.id, libc::SIGKILL).await;
            }
        }
        // Execs of a former daemon too, whose ids nobody can ask for any more.
        self.forget_others(&keeper, &held).await;
        self.resume().await;
        Ok(())
    }

    /// Goes on with what a daemon before this one began or should have done.
    async fn resume(self: &Arc<Self>) {
        for container in self.inventory.all() {
            let record = container.record().clone();
            match record.phase {
                // Its build died with the daemon before this one, and has nothing left to wait for it.
                _ if record.step => {
                    let engine = self.clone();
                    tokio::spawn(async move {
                        let options = crate::container::RemoveOptions {
                            force: true,
                            volumes: true,
                            link: false,
                        };
                        if let Err(error) = engine.remove(&container.id, options).await {
                            tracing::warn!(container = container.id, %error, "a step of a build that was cut off is not removed");
                        }
                    });
                }
                Phase::Removing => {
                    let (engine, volumes) = (self.clone(), record.host.auto_remove);
                    tokio::spawn(async move {
                        let _operation = container.operation.lock().await;
                        if let Err(error) = engine.discard(&container, volumes).await {
                            tracing::warn!(container = container.id, %error, "a removal is not finished");
                        }
                    });
                }
                Phase::Running => {
                    self.watch_health(&container);
                    self.watch_memory(&container);
                }
                Phase::Restarting => self.restart_later(container, Duration::ZERO),
                Phase::Exited | Phase::Created
                    if record.host.auto_remove && record.phase == Phase::Exited =>
                {
                    let engine = self.clone();
                    tokio::spawn(async move {
                        let _operation = container.operation.lock().await;
                        let _ = engine.discard(&container, true).await;
                    });
                }
                // Ended because the daemon or the host went down, not by itself: `always` starts even what was
                // stopped, as dockerd does.
                Phase::Exited
                    if record.host.restart_policy.name == "always"
                        || (record.host.restart_policy.name == "unless-stopped"
                            && !record.stopped_by_user) =>
                {
                    debug_assert!(record.stopped_by_user || wants_restart(&record, 1));
                    container.note(|record| {
                        record.phase = Phase::Restarting;
                        record.stopped_by_user = false;
                    });
                    self.restart_later(container, Duration::ZERO);
                }
                _ => {}
            }
        }
    }

    /// Reads the records into the inventory.
    fn load(&self) -> Result<()> {
        let folder = self.containers_folder();
        let entries = std::fs::read_dir(&folder)
            .map_err(Error::io(format!("reading {}", folder.display())))?;
        for entry in entries.flatten() {
            let directory = entry.path();
            let Ok(id) = entry.file_name().to_string_lossy().parse::<Id>() else {
                continue;
            };
            let _ = base::file::sweep_temporaries(&directory);
            for entry in std::fs::read_dir(&directory)
                .into_iter()
                .flatten()
                .flatten()
            {
                if entry
                    .file_name()
                    .to_string_lossy()
                    .starts_with(crate::container::archive::SCRATCH)
                {
                    let _ = std::fs::remove_dir_all(entry.path());
                }
            }
            match read_record(&directory) {
                Ok(Some(record)) => {
                    if let Err(error) = self.inventory.reserve(&record.name, id.as_str()) {
                        tracing::error!(container = id.short(), %error, "two containers have one name; this one is found by its id");
                    }
                    for mount in record
                        .mounts
                        .iter()
                        .filter(|mount| mount.point.kind == "volume")
                    {
                        if let Err(error) = self.volumes.hold(&mount.point.name, id.as_str()) {
                            tracing::warn!(container = id.short(), %error, "a volume of a container is gone");
                        }
                    }
                    let run = self.run_folder().join(id.as_str());
                    self.inventory
                        .insert(Container::new(record, directory, run));
                }
                // Without a record it was never made.
                Ok(None) => self.unmake(id.as_str()),
                Err(error) => {
                    tracing::error!(path = %directory.display(), %error, "a container's record is damaged; it is left alone");
                }
            }
        }
        Ok(())
    }

    /// Removes snapshots, run folders and cgroups of containers that are no more, and cgroups of those that do not run.
    fn sweep(&self, alive: &HashSet<String>) {
        for (key, _) in self.images.snapshots() {
            // A container's keys begin with its id; a build that was under way ended with its daemon.
            let stale = key.starts_with(image::BUILD_SNAPSHOT)
                || crate::container::mounts::owner(&key).is_some_and(|id| {
                    self.inventory.get(id).is_none() && !self.containers_folder().join(id).exists()
                });
            if !stale {
                continue;
            }
            if let Err(error) = self.images.remove_snapshot(&key) {
                tracing::warn!(key, %error, "a stale snapshot is not removed");
            }
        }
        for entry in std::fs::read_dir(self.run_folder())
            .into_iter()
            .flatten()
            .flatten()
        {
            if self
                .inventory
                .get(&entry.file_name().to_string_lossy())
                .is_none()
            {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        for name in cgroup::children(&self.config.cgroup_parent) {
            if name.parse::<Id>().is_ok() && !alive.contains(&name) {
                let path = format!("{}/{name}", self.config.cgroup_parent);
                cgroup::kill(&path);
                cgroup::remove(&path);
            }
        }
        for container in self
            .inventory
            .all()
            .iter()
            .filter(|container| !alive.contains(&container.id))
        {
            if !container.phase().lives() {
                container.note(|record| {
                    record.endpoints.clear();
                    record.networks.values_mut().for_each(network::hide);
                });
            }
        }
    }

    /// Writes the program that is pid 1 of `--init` containers.
    fn write_init(&self) -> Result<()> {
        let path = self.init_program();
        if std::fs::read(&path).is_ok_and(|bytes| bytes == INIT) {
            return Ok(());
        }
        base::file::write_atomic(&path, INIT, base::file::Durability::Process)
            .and_then(|()| {
                std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            })
            .map_err(Error::io(format!("writing {}", path.display())))
    }
}

/// A static program without a C library, so that it runs in any image; see `init/main.rs`.
const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/docker-init"));
