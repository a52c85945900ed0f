//! Removing containers.

use std::sync::Arc;

use base::file::Durability;

use crate::Engine;
use crate::container::RemoveOptions;
use crate::container::create::blocking;
use crate::container::inspect::PruneReport;
use crate::container::record::{Container, Phase};
use crate::container::start::detached;
use crate::error::{Error, Result};
use crate::filters::Filters;

impl Engine {
    /// Removes it.
    ///
    /// # Errors
    /// [`Error::Conflict`] where it runs and is not to be killed.
    pub async fn remove(self: &Arc<Self>, container: &str, options: RemoveOptions) -> Result<()> {
        if options.link {
            let (engine, name) = (self.clone(), container.to_owned());
            return blocking(move || engine.remove_link(&name)).await;
        }
        let container = self.inventory.find(container)?;
        let engine = self.clone();
        detached(async move {
            let _operation = container.operation.lock().await;
            let phase = container.phase();
            let name = container.name();
            let running = match phase {
                Phase::Running => {
                    Some("running: stop the container before removing or force remove")
                }
                Phase::Paused => Some("paused and must be unpaused first"),
                Phase::Restarting => {
                    Some("restarting: stop the container before removing or force remove")
                }
                _ => None,
            };
            if let Some(why) = running {
                if !options.force {
                    return Err(Error::Conflict(format!(
                        "cannot remove container \"/{name}\": container is {why}"
                    )));
                }
                container.note(|record| {
                    record.stopped_by_user = true;
                    // Its removal is this one's work.
                    record.host.auto_remove = false;
                });
                container.end_tasks();
                if phase.lives() {
                    engine.kill_and_wait(&container).await?;
                }
            }
            // Removed by another call while this one waited.
            if engine.inventory.get(&container.id).is_none() {
                return Err(Error::NoSuchContainer(name));
            }
            engine.discard(&container, options.volumes).await
        })
        .await
    }

    /// Removes a container that does not run; the caller holds its operation lock.
    pub(crate) async fn discard(
        self: &Arc<Self>,
        container: &Arc<Container>,
        volumes: bool,
    ) -> Result<()> {
        container.end_tasks();
        container.change(Durability::Process, |record| {
            record.phase = Phase::Removing;
            record.host.auto_remove = volumes;
        })?;
        if let Ok(keeper) = self.keeper().await {
            let _ = keeper.forget(&container.id).await;
        }
        let (engine, own) = (self.clone(), container.clone());
        let erased = blocking(move || engine.erase(&own, volumes)).await;
        if let Err(error) = erased {
            container.note(|record| {
                record.phase = Phase::Dead;
                record.error = error.to_string();
            });
            container
                .milestones
                .send_modify(|milestones| milestones.failed_removals += 1);
            return Err(error);
        }
        // The name is free from here on.
        self.inventory.remove(&container.id);
        self.forget_execs(container);
        self.tell(container, "destroy");
        container
            .milestones
            .send_modify(|milestones| milestones.removed = true);
        Ok(())
    }

    /// Deletes the files of a container. What is gone already is no error, so that a removal can be finished later.
    pub(crate) fn erase(&self, container: &Container, volumes: bool) -> Result<()> {
        let record = container.record().clone();
        self.networks.release(&container.id);
        self.images
            .remove_snapshot(&container.id)
            .map_err(Error::room)?;
        if record.mounts.iter().any(|mount| !mount.snapshot.is_empty()) {
            super::mounts::release_images(&container.id, &self.images)?;
        }
        self.volumes.release(&container.id);
        if volumes {
            for mount in record.mounts.iter().filter(|mount| mount.anonymous) {
                // In use by another (--volumes-from), or removed by hand: then it is not ours to remove.
                let _ = self.volumes.remove(&mount.point.name, true);
            }
        }
        let gone = |path: &std::path::Path| match std::fs::remove_dir_all(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("removing {}", path.display()))(error))
            }
            _ => Ok(()),
        };
        gone(&container.run)?;
        gone(&container.directory)
    }

    /// Removes stopped containers; filters `until`, `label`, `label!`.
    pub async fn prune_containers(self: &Arc<Self>, filters: Filters) -> Result<PruneReport> {
        filters.only(&["until", "label", "label!"])?;
        let until = match filters.get("until") {
            [] => None,
            [one] => Some(
                base::time::parse_moment(one).map_err(|error| Error::Invalid(error.to_string()))?,
            ),
            _ => {
                return Err(Error::Invalid(
                    "more than one until filter specified".into(),
                ));
            }
        };
        let mut report = PruneReport::default();
        for container in self.inventory.all() {
            {
                let record = container.record();
                let young = until.is_some_and(|until| {
                    record
                        .created
                        .parse::<jiff::Timestamp>()
                        .is_ok_and(|at| at > until)
                });
                let idle = matches!(record.phase, Phase::Created | Phase::Exited | Phase::Dead);
                let labels = &record.config.labels;
                if !idle
                    || young
                    || !filters.labels("label", labels)
                    || !filters.not_labels("label!", labels)
                {
                    continue;
                }
            }
            let (engine, own) = (self.clone(), container.clone());
            match detached(async move { engine.discard_idle(&own).await }).await {
                Ok(Some(size)) => {
                    report.containers_deleted.push(container.id.clone());
                    report.space_reclaimed += size;
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(container = container.id, %error, "a container is not pruned")
                }
            }
        }
        let attributes = [("reclaimed".to_owned(), report.space_reclaimed.to_string())].into();
        self.events.publish("container", "prune", "", attributes);
        Ok(report)
    }

    /// Removes a container unless it is used after all; how many bytes it had written.
    async fn discard_idle(self: &Arc<Self>, container: &Arc<Container>) -> Result<Option<u64>> {
        let _operation = container.operation.lock().await;
        if !matches!(
            container.phase(),
            Phase::Created | Phase::Exited | Phase::Dead
        ) {
            return Ok(None);
        }
        let (images, id) = (self.images.clone(), container.id.clone());
        let size =
            blocking(move || Ok(images.snapshot_usage(&id).map_or(0, |usage| usage.bytes))).await?;
        self.discard(container, false).await?;
        Ok(Some(size))
    }
}
