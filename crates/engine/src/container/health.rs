//! Health checks.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt;

use crate::Engine;
use crate::container::config::HealthConfig;
use crate::container::inspect::{Health, HealthResult};
use crate::container::record::{Container, Phase};
use crate::error::Result;
use crate::exec::ExecConfig;

const INTERVAL: Duration = Duration::from_secs(30);
const TIMEOUT: Duration = Duration::from_secs(30);
const START_INTERVAL: Duration = Duration::from_secs(5);
const RETRIES: i64 = 3;
/// How many results are kept.
const KEPT: usize = 5;
/// How much output of a check is kept, bytes.
const MAX_OUTPUT: usize = 4096;

fn or(nanoseconds: i64, default: Duration) -> Duration {
    u64::try_from(nanoseconds)
        .ok()
        .filter(|n| *n > 0)
        .map_or(default, Duration::from_nanos)
}

impl Engine {
    /// Begins to check a container that has just started (or has been found again), if it is to be checked.
    pub(crate) fn watch_health(self: &Arc<Self>, container: &Arc<Container>) {
        let config = container.record().config.healthcheck.clone();
        let Some(config) = config.filter(|config| {
            !matches!(config.test.first().map(String::as_str), None | Some("NONE"))
        }) else {
            return;
        };
        container.note(|record| {
            record.health = Some(Health {
                status: "starting".into(),
                ..Default::default()
            })
        });
        let (engine, own) = (self.clone(), container.clone());
        let task = tokio::spawn(async move { engine.check_forever(own, config).await });
        container.add_task(task.abort_handle());
    }

    async fn check_forever(self: Arc<Self>, container: Arc<Container>, config: HealthConfig) {
        let started = tokio::time::Instant::now();
        let period = or(config.start_period, Duration::ZERO);
        loop {
            let starting = started.elapsed() < period
                && container
                    .record()
                    .health
                    .as_ref()
                    .is_some_and(|health| health.status == "starting");
            let pause = if starting {
                or(config.start_interval, START_INTERVAL)
            } else {
                or(config.interval, INTERVAL)
            };
            tokio::time::sleep(pause).await;
            match container.phase() {
                Phase::Running => {}
                Phase::Paused => continue,
                _ => return,
            }
            let result = self.check(&container, &config).await;
            if !container.phase().lives() {
                return;
            }
            let changed = container.note(|record| {
                let health = record.health.get_or_insert_default();
                note(health, result, &config, started.elapsed() < period)
            });
            if let Some(status) = changed {
                self.tell(&container, &format!("health_status: {status}"));
            }
        }
    }

    /// Runs the check once.
    async fn check(
        self: &Arc<Self>,
        container: &Arc<Container>,
        config: &HealthConfig,
    ) -> HealthResult {
        let start = base::time::now_rfc3339();
        let timeout = or(config.timeout, TIMEOUT);
        let mut output = Vec::new();
        let mut id = None;
        let run = async {
            let made = self
                .exec_create(&container.id, self.probe(container, config))
                .await?;
            id = Some(made.clone());
            let stream = self.exec_start(&made, Default::default()).await?;
            if let Some(mut stream) = stream {
                let mut header = [0u8; 8];
                while stream.read_exact(&mut header).await.is_ok() {
                    let length =
                        u32::from_be_bytes([header[4], header[5], header[6], header[7]]) as usize;
                    let mut bytes = vec![0; length.min(64 << 10)];
                    if stream.read_exact(&mut bytes).await.is_err() {
                        break;
                    }
                    let room = MAX_OUTPUT - output.len();
                    output.extend_from_slice(&bytes[..bytes.len().min(room)]);
                }
            }
            self.exec_wait(&made).await
        };
        let ended: Result<Result<i32>, _> = tokio::time::timeout(timeout, run).await;
        let (exit_code, text) = match ended {
            Ok(Ok(code)) => (code, String::from_utf8_lossy(&output).into_owned()),
            Ok(Err(error)) => (-1, error.to_string()),
            Err(_) => {
                if let Some(id) = id.take() {
                    let engine = self.clone();
                    tokio::spawn(async move { engine.exec_kill(&id).await });
                }
                (
                    -1,
                    format!(
                        "Health check exceeded timeout ({timeout:?}): {}",
                        String::from_utf8_lossy(&output)
                    ),
                )
            }
        };
        HealthResult {
            start,
            end: base::time::now_rfc3339(),
            exit_code,
            output: text,
        }
    }

    fn probe(&self, container: &Container, config: &HealthConfig) -> ExecConfig {
        let rest = config.test[1..].to_vec();
        let command = if config.test[0] == "CMD" {
            rest
        } else {
            let shell = container
                .record()
                .config
                .shell
                .clone()
                .unwrap_or_default()
                .0;
            let mut words = if shell.is_empty() {
                vec!["/bin/sh".into(), "-c".into()]
            } else {
                shell
            };
            words.extend(rest);
            words
        };
        ExecConfig {
            cmd: command.into(),
            attach_stdout: true,
            attach_stderr: true,
            ..Default::default()
        }
    }
}

/// Takes a result into account; the new status where it has changed.
fn note(
    health: &mut Health,
    result: HealthResult,
    config: &HealthConfig,
    in_start_period: bool,
) -> Option<String> {
    let code = result.exit_code;
    health.log.push(result);
    if health.log.len() > KEPT {
        health.log.remove(0);
    }
    let retries = if config.retries > 0 {
        config.retries
    } else {
        RETRIES
    };
    let before = health.status.clone();
    if code == 0 {
        health.failing_streak = 0;
        health.status = "healthy".into();
    } else if !(in_start_period && health.status == "starting") {
        health.failing_streak += 1;
        if health.failing_streak >= retries {
            health.status = "unhealthy".into();
        }
    }
    (health.status != before).then(|| health.status.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_count_only_after_the_start_period() {
        let config = HealthConfig {
            retries: 2,
            ..Default::default()
        };
        let mut health = Health {
            status: "starting".into(),
            ..Default::default()
        };
        let result = |exit_code| HealthResult {
            exit_code,
            ..Default::default()
        };
        assert_eq!(note(&mut health, result(1), &config, true), None);
        assert_eq!(note(&mut health, result(1), &config, false), None);
        assert_eq!(
            note(&mut health, result(1), &config, false),
            Some("unhealthy".into())
        );
        assert_eq!(
            note(&mut health, result(0), &config, false),
            Some("healthy".into())
        );
        for _ in 0..9 {
            note(&mut health, result(0), &config, false);
        }
        assert_eq!(health.log.len(), KEPT);
    }
}
