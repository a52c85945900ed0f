//! Stopping, killing, pausing, waiting, renaming, updating.

use std::sync::Arc;
use std::time::Duration;

use base::file::Durability;

use crate::Engine;
use crate::container::create::{blocking, check_name, check_restart};
use crate::container::host_config::UpdateConfig;
use crate::container::inspect::{Updated, WaitError, WaitResult};
use crate::container::record::{Container, Milestones, Phase, Record};
use crate::container::start::detached;
use crate::container::{Wait, WaitCondition, cgroup, limits, processes, signal};
use crate::error::{Error, Result};

/// How long a killed container may take to be gone and cleaned up: many at once on a busy host take their time.
const KILL_WAIT: Duration = Duration::from_secs(60);

/// The number of a signal that a request names; an empty text names none.
fn asked(signal: Option<&str>) -> Result<Option<i32>> {
    let named = signal.filter(|signal| !signal.is_empty());
    named.map(signal::number).transpose()
}

/// Keeps a container down that waits to be started again; false where it does not. The caller holds its operation lock.
fn keep_down(container: &Container) -> Result<bool> {
    if container.phase() != Phase::Restarting {
        return Ok(false);
    }
    container.end_tasks();
    container.change(Durability::Process, |record| {
        record.stopped_by_user = true;
        record.phase = Phase::Exited;
    })?;
    container
        .milestones
        .send_modify(|milestones| milestones.rests += 1);
    Ok(true)
}

impl Engine {
    /// Stops it: `signal` (its own stop signal), then after `timeout` seconds (its own; negative: never) SIGKILL.
    /// [`Error::NotModified`] where it does not run.
    pub async fn stop(
        self: &Arc<Self>,
        container: &str,
        timeout: Option<i64>,
        signal: Option<&str>,
    ) -> Result<()> {
        let container = self.inventory.find(container)?;
        let signal = asked(signal)?;
        let engine = self.clone();
        detached(async move {
            let _operation = container.operation.lock().await;
            engine.halt(&container, timeout, signal).await
        })
        .await
    }

    /// [`Engine::stop`] of a container whose operation lock the caller holds.
    async fn halt(
        self: &Arc<Self>,
        container: &Arc<Container>,
        timeout: Option<i64>,
        signal: Option<i32>,
    ) -> Result<()> {
        let mut ends = container.milestones.subscribe();
        let before = ends.borrow_and_update().exits;
        // After that: an end that is not seen here is still to come.
        let record = container.record().clone();
        if keep_down(container)? {
            self.tell(container, "stop");
            return Ok(());
        }
        if !record.phase.lives() {
            return Err(Error::NotModified("container is already stopped".into()));
        }
        let (own, patience) = self.stop_terms(&record, timeout);
        container.note(|record| record.stopped_by_user = true);
        self.send(container, signal.unwrap_or(own)).await?;
        if record.phase == Phase::Paused {
            self.thaw(container).await?;
        }
        let gone = async {
            let _ = ends
                .wait_for(|milestones| milestones.exits != before || milestones.removed)
                .await;
        };
        let stopped = match patience {
            Some(patience) => tokio::time::timeout(patience, gone).await.is_ok(),
            None => {
                gone.await;
                true
            }
        };
        if !stopped {
            self.kill_and_wait(container).await?;
        }
        // Its end may have been judged before this was asked for.
        keep_down(container)?;
        self.tell(container, "stop");
        Ok(())
    }

    /// The signal that stops a container, and how long it may take then: `timeout` seconds, else its own, else the
    /// daemon's; none where that is negative, which is for ever.
    pub(crate) fn stop_terms(
        &self,
        record: &Record,
        timeout: Option<i64>,
    ) -> (i32, Option<Duration>) {
        let own = &record.config.stop_signal;
        let patience = match timeout.or(record.config.stop_timeout) {
            Some(seconds) => u64::try_from(seconds).ok().map(Duration::from_secs),
            None => Some(self.config.stop_timeout),
        };
        (signal::number(own).unwrap_or(libc::SIGTERM), patience)
    }

    /// Kills all of it and waits until that has been handled.
    pub(crate) async fn kill_and_wait(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        let mut ends = container.milestones.subscribe();
        let before = ends.borrow_and_update().exits;
        if !container.phase().lives() {
            return Ok(());
        }
        self.send(container, libc::SIGKILL).await?;
        if container.phase() == Phase::Paused {
            self.thaw(container).await?;
        }
        let gone = ends.wait_for(|milestones| milestones.exits != before || milestones.removed);
        match tokio::time::timeout(KILL_WAIT, gone).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::Runtime {
                message: format!(
                    "container {} does not end after SIGKILL: a process of it hangs in the kernel (disk or network file system?)",
                    container.id
                ),
                kind: base::Kind::Internal,
            }),
        }
    }

    async fn send(self: &Arc<Self>, container: &Container, number: i32) -> Result<()> {
        let keeper = self.keeper().await?;
        self.tell_with(container, "kill", &[("signal", number.to_string())]);
        match keeper.signal(&container.id, number).await {
            // It has ended by itself meanwhile, which is what was wanted.
            Err(Error::Runtime {
                kind: base::Kind::NotFound,
                ..
            }) => Ok(()),
            other => other,
        }
    }

    /// Stops (where it runs) and starts it.
    pub async fn restart(
        self: &Arc<Self>,
        container: &str,
        timeout: Option<i64>,
        signal: Option<&str>,
    ) -> Result<()> {
        let container = self.inventory.find(container)?;
        let signal = asked(signal)?;
        let engine = self.clone();
        detached(async move {
            let _operation = container.operation.lock().await;
            // A container of `--rm` must survive its own restart.
            let auto_remove = container.note(|record| std::mem::take(&mut record.host.auto_remove));
            let stopped = match engine.halt(&container, timeout, signal).await {
                Err(Error::NotModified(_)) => Ok(()),
                other => other,
            };
            container.note(|record| {
                record.host.auto_remove = auto_remove;
                record.stopped_by_user = false;
            });
            stopped?;
            engine.launch(&container).await?;
            engine.tell(&container, "restart");
            Ok(())
        })
        .await
    }

    /// Sends a signal by name or number (`KILL`, `SIGKILL`, `9`; empty is SIGKILL).
    pub async fn kill(self: &Arc<Self>, container: &str, signal: &str) -> Result<()> {
        let container = self.inventory.find(container)?;
        let number = if signal.is_empty() {
            libc::SIGKILL
        } else {
            signal::number(signal)?
        };
        let record = container.record().clone();
        match record.phase {
            Phase::Running => {}
            Phase::Paused if number == libc::SIGKILL => {}
            Phase::Paused => return Err(Error::Paused(container.id.clone())),
            _ => {
                return Err(Error::Conflict(format!(
                    "cannot kill container: {}: container {} is not running",
                    record.name, container.id
                )));
            }
        }
        let (stop, _) = self.stop_terms(&record, None);
        if number == libc::SIGKILL || number == stop {
            container.note(|record| {
                if record.phase.lives() {
                    record.stopped_by_user = true;
                }
            });
        }
        if number == libc::SIGKILL {
            let engine = self.clone();
            return detached(async move {
                engine.kill_and_wait(&container).await?;
                if container.phase() == Phase::Restarting {
                    // Its end was judged before this was asked for.
                    let _operation = container.operation.lock().await;
                    if !keep_down(&container)? && container.phase().lives() {
                        container.note(|record| record.stopped_by_user = true);
                        engine.kill_and_wait(&container).await?;
                    }
                }
                Ok(())
            })
            .await;
        }
        self.send(&container, number).await
    }

    /// Freezes all its processes.
    pub async fn pause(self: &Arc<Self>, container: &str) -> Result<()> {
        let container = self.inventory.find(container)?;
        let engine = self.clone();
        detached(async move { engine.pause_whole(&container).await }).await
    }

    async fn pause_whole(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        let _operation = container.operation.lock().await;
        match container.phase() {
            Phase::Running => {}
            Phase::Paused => {
                return Err(Error::Conflict(format!(
                    "container {} is already paused",
                    container.id
                )));
            }
            _ => return Err(Error::NotRunning(container.id.clone())),
        }
        let record = container.record().clone();
        let group = self.cgroup_of(&record);
        let _alone = container.freezing.write().await;
        blocking(move || processes::hold(&record, &group, true)).await?;
        container.note(|record| {
            if record.phase == Phase::Running {
                record.phase = Phase::Paused;
            }
        });
        self.tell(container, "pause");
        Ok(())
    }

    /// Thaws them.
    pub async fn unpause(self: &Arc<Self>, container: &str) -> Result<()> {
        let container = self.inventory.find(container)?;
        let engine = self.clone();
        detached(async move {
            let _operation = container.operation.lock().await;
            if container.phase() != Phase::Paused {
                return Err(Error::Conflict(format!(
                    "Container {} is not paused",
                    container.id
                )));
            }
            engine.thaw(&container).await?;
            engine.tell(&container, "unpause");
            Ok(())
        })
        .await
    }

    pub(crate) async fn thaw(&self, container: &Container) -> Result<()> {
        let record = container.record().clone();
        let group = self.cgroup_of(&record);
        blocking(move || processes::hold(&record, &group, false)).await?;
        container.note(|record| {
            if record.phase == Phase::Paused {
                record.phase = Phase::Running;
            }
        });
        Ok(())
    }

    /// Registers a wait and returns it pending.
    pub async fn wait(self: &Arc<Self>, container: &str, condition: WaitCondition) -> Result<Wait> {
        let container = self.inventory.find(container)?;
        let mut ends = container.milestones.subscribe();
        let now = *ends.borrow_and_update();
        let (phase, code) = {
            let record = container.record();
            (record.phase, record.exit_code)
        };
        let of = container.clone();
        let result = async move {
            let failed = |milestones: &Milestones| {
                !milestones.removed && milestones.failed_removals != now.failed_removals
            };
            let rests = phase.lives() || phase == Phase::Restarting;
            let over = ends
                .wait_for(|milestones| match condition {
                    WaitCondition::NotRunning => {
                        !rests || milestones.rests != now.rests || milestones.removed
                    }
                    WaitCondition::NextExit => milestones.exits != now.exits || milestones.removed,
                    WaitCondition::Removed => milestones.removed || failed(milestones),
                })
                .await
                .map(|milestones| *milestones);
            let why = match (condition, &over) {
                (WaitCondition::Removed, Ok(milestones)) if failed(milestones) => {
                    let message = of.record().error.clone();
                    Some(WaitError { message })
                }
                _ => None,
            };
            let code = match over {
                Ok(milestones) if milestones.exits == now.exits => code,
                Ok(milestones) => milestones.code,
                Err(_) => code,
            };
            WaitResult {
                status_code: i64::from(code),
                error: why,
            }
        };
        Ok(Wait {
            result: Box::pin(result),
        })
    }

    /// Renames it.
    pub async fn rename(self: &Arc<Self>, container: &str, name: &str) -> Result<()> {
        let container = self.inventory.find(container)?;
        let (engine, name) = (self.clone(), name.to_owned());
        detached(async move { engine.rename_whole(&container, &name).await }).await
    }

    async fn rename_whole(self: &Arc<Self>, container: &Arc<Container>, name: &str) -> Result<()> {
        let _operation = container.operation.lock().await;
        let name = name.strip_prefix('/').unwrap_or(name).to_owned();
        if name.is_empty() {
            return Err(Error::Invalid(
                "Neither old nor new names may be empty".into(),
            ));
        }
        check_name(&name)?;
        let old = container.name();
        if old == name {
            return Err(Error::Invalid(
                "Renaming a container with the same name as its current name".into(),
            ));
        }
        self.inventory.reserve(&name, &container.id)?;
        if let Err(error) = container.change(Durability::Host, |record| record.name = name.clone())
        {
            self.inventory.free(&name, &container.id);
            return Err(error);
        }
        self.inventory.free(&old, &container.id);
        let (engine, id) = (self.clone(), container.id.clone());
        let names = [name, container.record().config.hostname.clone()];
        let _ = blocking(move || {
            engine.networks.rename(&id, &names);
            Ok(())
        })
        .await;
        self.tell_with(container, "rename", &[("oldName", format!("/{old}"))]);
        Ok(())
    }

    /// Changes limits (fields that are zero stay) and the restart policy.
    pub async fn update(
        self: &Arc<Self>,
        container: &str,
        update: UpdateConfig,
    ) -> Result<Updated> {
        let container = self.inventory.find(container)?;
        let engine = self.clone();
        detached(async move { engine.update_whole(&container, update).await }).await
    }

    async fn update_whole(
        self: &Arc<Self>,
        container: &Arc<Container>,
        update: UpdateConfig,
    ) -> Result<Updated> {
        let _operation = container.operation.lock().await;
        let record = container.record().clone();
        if matches!(record.phase, Phase::Removing | Phase::Dead) {
            return Err(Error::Conflict(
                "Container is marked for removal and cannot be \"update\".".into(),
            ));
        }
        let mut host = record.host.clone();
        host.resources = limits::merge(&host.resources, &update.resources)?;
        let warnings = limits::check(&host.resources)?;
        if let Some(policy) = update
            .restart_policy
            .filter(|policy| !policy.name.is_empty())
        {
            if host.auto_remove && policy.name != "no" {
                return Err(Error::Invalid(
                    "Restart policy cannot be updated because AutoRemove is enabled for the container".into(),
                ));
            }
            host.restart_policy = policy;
            check_restart(&host)?;
        }
        if record.phase.lives() && host.resources != record.host.resources {
            let (group, resources) = (self.cgroup_of(&record), host.resources.clone());
            blocking(move || cgroup::update(&group, &resources)).await?;
        }
        container.change(Durability::Host, |record| record.host = host)?;
        self.tell(container, "update");
        Ok(Updated { warnings })
    }
}
