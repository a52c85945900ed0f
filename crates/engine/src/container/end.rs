//! What happens when a container's process ends: cleaning up, restarting, removing.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::Engine;
use crate::container::cgroup;
use crate::container::create::blocking;
use crate::container::network;
use crate::container::record::{Container, Phase, Record, lock};
use crate::keeper::protocol::Exit;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A container that ran as long starts its pauses anew.
const GOOD_RUN: Duration = Duration::from_secs(10);

impl Engine {
    /// Handles the end of a container's process.
    pub(crate) async fn ended(self: &Arc<Self>, container: Arc<Container>, exit: Exit) {
        let turn = container.turn.lock().await;
        let stale = {
            let record = container.record();
            !record.phase.lives()
                || record
                    .process
                    .is_some_and(|process| process.pid != exit.pid)
        };
        if stale {
            if let Ok(keeper) = self.keeper().await {
                let _ = keeper.forget(&container.id).await;
            }
            return;
        }
        container.end_tasks();
        let record = container.record().clone();
        let (engine, id, group) = (self.clone(), container.id.clone(), self.cgroup_of(&record));
        let _ = blocking(move || {
            // With the host's pid namespace, processes may have outlived the first.
            cgroup::kill(&group);
            cgroup::remove(&group);
            engine.networks.release(&id);
            Ok(())
        })
        .await;
        let ran =
            Timestamp::now().duration_since(record.started_at.parse().unwrap_or(Timestamp::now()));
        let ran = Duration::try_from(ran).unwrap_or_default();
        let networks: Vec<_> = record
            .endpoints
            .iter()
            .map(|endpoint| endpoint.network.clone())
            .collect();
        let again = container.note(|record| {
            // Somebody may have stopped it meanwhile.
            let again = wants_restart(record, exit.code);
            record.phase = if again {
                Phase::Restarting
            } else {
                Phase::Exited
            };
            record.process = None;
            record.exit_code = exit.code;
            // A kill that was told while it ran stays.
            record.oom_killed |= exit.oom;
            record.finished_at = exit.finished.clone();
            record.endpoints.clear();
            record.networks.values_mut().for_each(network::hide);
            if let (Some(health), false) = (&mut record.health, again) {
                health.status = "unhealthy".into();
            }
            if again {
                record.restart_count += 1;
            }
            again
        });
        let _ = std::fs::remove_dir_all(&container.run);
        if let Ok(keeper) = self.keeper().await {
            let _ = keeper.forget(&container.id).await;
        }
        if exit.oom && !record.oom_killed {
            self.tell(&container, "oom");
        }
        self.tell_with(
            &container,
            "die",
            &[
                ("exitCode", exit.code.to_string()),
                ("execDuration", ran.as_secs().to_string()),
            ],
        );
        for network in networks {
            if let Ok(network) = self.networks.inspect(network.as_str()) {
                self.tell_network("disconnect", &network, &container);
            }
        }
        self.tell_mounts("unmount", &container);
        container.milestones.send_modify(|milestones| {
            milestones.exits += 1;
            milestones.code = exit.code;
            if !again {
                milestones.rests += 1;
            }
        });
        drop(turn);
        if again {
            self.restart_later(container, ran);
        } else if record.host.auto_remove {
            let removing = async {
                let _operation = container.operation.lock().await;
                if container.phase() == Phase::Exited {
                    self.discard(&container, true).await
                } else {
                    Ok(())
                }
            };
            if let Err(error) = removing.await {
                tracing::error!(container = container.id, %error, "a container of --rm is not removed");
            }
        }
    }

    /// Starts a container again after a pause that grows with each short run.
    pub(crate) fn restart_later(self: &Arc<Self>, container: Arc<Container>, ran: Duration) {
        let pause = {
            let mut pause = lock(&container.pause);
            *pause = match *pause {
                _ if ran >= GOOD_RUN => FIRST_PAUSE,
                Duration::ZERO => FIRST_PAUSE,
                last => (last * 2).min(LONGEST_PAUSE),
            };
            *pause
        };
        let (engine, own) = (self.clone(), container.clone());
        let task = tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            // From here on nobody may abort it half-way.
            tokio::spawn(engine.restart_now(own));
        });
        container.add_task(task.abort_handle());
    }

    // Boxed: a restart may lead to another.
    fn restart_now(
        self: Arc<Self>,
        container: Arc<Container>,
    ) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            let _operation = container.operation.lock().await;
            if container.phase() != Phase::Restarting {
                return;
            }
            let Err(error) = self.launch(&container).await else {
                return;
            };
            tracing::warn!(container = container.id, %error, "a restart failed");
            let again = container.note(|record| {
                let again = wants_restart(record, record.exit_code.max(1));
                record.restart_count += 1;
                if !again {
                    record.phase = Phase::Exited;
                }
                again
            });
            if again {
                self.restart_later(container.clone(), Duration::ZERO);
            } else {
                container
                    .milestones
                    .send_modify(|milestones| milestones.rests += 1);
            }
        })
    }
}

/// Whether a restart policy wants a container running again after it ended with this code.
pub(crate) fn wants_restart(record: &Record, code: i32) -> bool {
    let policy = &record.host.restart_policy;
    if record.stopped_by_user {
        return false;
    }
    match policy.name.as_str() {
        "always" | "unless-stopped" => true,
        "on-failure" => {
            code != 0
                && (policy.maximum_retry_count == 0
                    || i64::from(record.restart_count) < policy.maximum_retry_count)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_container_is_restarted_as_often_as_allowed() {
        let mut record = Record::default();
        record.host.restart_policy.name = "on-failure".into();
        record.host.restart_policy.maximum_retry_count = 2;
        assert!(!wants_restart(&record, 0));
        assert!(wants_restart(&record, 1));
        record.restart_count = 2;
        assert!(!wants_restart(&record, 1));
        record.host.restart_policy.name = "always".into();
        assert!(wants_restart(&record, 0));
        record.stopped_by_user = true;
        assert!(!wants_restart(&record, 0));
    }
}
