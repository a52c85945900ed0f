//! Processes started in a running container: `docker exec`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::Engine;
use crate::container::attach::detach_keys;
use crate::container::create::blocking;
use crate::container::record::{Container, Phase, lock};
use crate::container::start::detached;
use crate::container::{AttachStream, capabilities, spec};
use crate::error::{Error, Result};
use crate::keeper::protocol;
use crate::wire::{Words, wire};

wire! {
    /// The body of `POST /containers/X/exec`.
    pub struct ExecConfig {
        pub user: String,
        pub privileged: bool,
        pub tty: bool,
        pub console_size: Option<[u16; 2]>,
        pub attach_stdin: bool,
        pub attach_stdout: bool,
        pub attach_stderr: bool,
        pub detach: bool,
        pub detach_keys: String,
        pub env: Vec<String>,
        pub working_dir: String,
        pub cmd: Words,
    }

    /// The body of `POST /exec/X/start`.
    pub struct ExecStart {
        pub detach: bool,
        pub tty: bool,
        pub console_size: Option<[u16; 2]>,
    }

    /// The answer of `GET /exec/X/json`.
    pub struct ExecInspect {
        #[serde(rename = "ID")]
        pub id: String,
        pub running: bool,
        pub exit_code: Option<i32>,
        pub process_config: ExecProcess,
        pub open_stdin: bool,
        pub open_stderr: bool,
        pub open_stdout: bool,
        pub can_remove: bool,
        #[serde(rename = "ContainerID")]
        pub container_id: String,
        pub detach_keys: String,
        pub pid: i32,
    }

    /// What an exec runs.
    pub struct ExecProcess {
        pub tty: bool,
        pub entrypoint: String,
        pub arguments: Vec<String>,
        pub privileged: bool,
        #[serde(skip_serializing_if = "String::is_empty")]
        pub user: String,
    }
}

/// One exec.
pub(crate) struct Exec {
    pub id: String,
    pub container: String,
    config: ExecConfig,
    state: watch::Sender<ExecState>,
}

#[derive(Debug, Clone, Default)]
struct ExecState {
    started: bool,
    pid: i32,
    exit_code: Option<i32>,
    ended: Option<Instant>,
}

/// How long a process may take to be in its container, on a busy host.
const LAUNCH: Duration = Duration::from_secs(60);
/// How long an exec that has ended can be asked for.
const KEPT: Duration = Duration::from_secs(300);

impl Engine {
    fn exec(&self, id: &str) -> Result<Arc<Exec>> {
        let execs = lock(&self.execs);
        if let Some(exec) = execs.get(id) {
            return Ok(exec.clone());
        }
        let mut matching = execs
            .values()
            .filter(|exec| id.len() >= 3 && exec.id.starts_with(id));
        match (matching.next(), matching.next()) {
            (Some(one), None) => Ok(one.clone()),
            _ => Err(Error::NoSuchExec(id.to_owned())),
        }
    }

    /// Prepares a process in a running container; answers its id.
    ///
    /// # Errors
    /// [`Error::Conflict`] where the container does not run or is paused, [`Error::Invalid`] without a command.
    pub async fn exec_create(
        self: &Arc<Self>,
        container: &str,
        config: ExecConfig,
    ) -> Result<String> {
        let container = self.inventory.find(container)?;
        match container.phase() {
            Phase::Running => {}
            Phase::Paused => {
                return Err(Error::Conflict(format!(
                    "Container {} is paused, unpause the container before exec",
                    container.id
                )));
            }
            _ => {
                return Err(Error::Conflict(format!(
                    "container {} is not running",
                    container.id
                )));
            }
        }
        if config.cmd.is_empty() {
            return Err(Error::Invalid("No exec command specified".into()));
        }
        detach_keys(&config.detach_keys)?;
        let id = base::Id::random().to_string();
        let words = config.cmd.join(" ");
        let exec = Arc::new(Exec {
            id: id.clone(),
            container: container.id.clone(),
            config,
            state: watch::Sender::new(ExecState::default()),
        });
        {
            let mut execs = lock(&self.execs);
            execs.retain(|_, exec| {
                exec.state
                    .borrow()
                    .ended
                    .is_none_or(|ended| ended.elapsed() < KEPT)
            });
            execs.insert(id.clone(), exec);
            lock(&container.execs).retain(|id| execs.contains_key(id));
        }
        lock(&container.execs).push(id.clone());
        self.tell_with(
            &container,
            &format!("exec_create: {words}"),
            &[("execID", id.clone())],
        );
        Ok(id)
    }

    /// Starts it; `None` where detached.
    ///
    /// # Errors
    /// [`Error::Conflict`] where it has been started, the runtime's refusal where it cannot be executed.
    pub async fn exec_start(
        self: &Arc<Self>,
        exec: &str,
        start: ExecStart,
    ) -> Result<Option<AttachStream>> {
        let exec = self.exec(exec)?;
        let container = self.inventory.find(&exec.container)?;
        if !container.phase().lives() {
            return Err(Error::Conflict(format!(
                "container {} is not running",
                container.id
            )));
        }
        if container.phase() == Phase::Paused {
            return Err(Error::Conflict(format!(
                "container {} is paused",
                container.id
            )));
        }
        let first = exec
            .state
            .send_if_modified(|state| !std::mem::replace(&mut state.started, true));
        if !first {
            return Err(Error::Conflict(format!(
                "Error: Exec command {} is already running",
                exec.id
            )));
        }
        let engine = self.clone();
        detached(async move {
            let result = engine.exec_launch(&exec, &container, &start).await;
            if result.is_err() {
                let failed = result
                    .as_ref()
                    .err()
                    .map_or(126, |error| match error.to_string() {
                        text if text.contains("not found") || text.contains("no such file") => 127,
                        _ => 126,
                    });
                exec.state.send_modify(|state| {
                    state.exit_code = Some(failed);
                    state.ended = Some(Instant::now());
                });
            }
            result
        })
        .await
    }

    async fn exec_launch(
        self: &Arc<Self>,
        exec: &Arc<Exec>,
        container: &Arc<Container>,
        start: &ExecStart,
    ) -> Result<Option<AttachStream>> {
        let keeper = self.keeper().await?;
        let config = &exec.config;
        let size = start
            .console_size
            .or(config.console_size)
            .unwrap_or_default();
        let record = {
            let (engine, container, exec, interactive) =
                (self.clone(), container.clone(), exec.clone(), !start.detach);
            blocking(move || engine.exec_record(&container, &exec, size, interactive)).await?
        };
        let stream = if start.detach {
            None
        } else {
            let keys = if config.tty {
                detach_keys(&config.detach_keys)?
            } else {
                Vec::new()
            };
            Some(
                keeper
                    .attach(
                        &exec.id,
                        config.attach_stdin,
                        config.attach_stdout,
                        config.attach_stderr,
                        keys,
                    )
                    .await?
                    .0,
            )
        };
        // Told before it can end.
        let words = config.cmd.join(" ");
        self.tell_with(
            container,
            &format!("exec_start: {words}"),
            &[("execID", exec.id.clone())],
        );
        let started = {
            let _living = container.freezing.read().await;
            match container.phase() {
                Phase::Paused => Err(Error::Conflict(format!(
                    "container {} is paused",
                    container.id
                ))),
                _ => keeper.exec(&exec.id, &container.id, &record).await,
            }
        };
        let _ = std::fs::remove_file(&record);
        let process = started.map_err(|error| match error {
            Error::Runtime { message, kind } => Error::Runtime {
                message: format!(
                    "OCI runtime exec failed: exec failed: unable to start container process: {message}: unknown"
                ),
                kind: if kind == base::Kind::NotFound { base::Kind::Invalid } else { kind },
            },
            other => other,
        })?;
        exec.state.send_modify(|state| {
            if state.exit_code.is_none() {
                state.pid = process.pid;
            }
        });
        Ok(stream.map(|stream| AttachStream {
            tty: config.tty,
            past: Default::default(),
            stream,
        }))
    }

    fn exec_record(
        &self,
        container: &Container,
        exec: &Exec,
        size: [u16; 2],
        interactive: bool,
    ) -> Result<std::path::PathBuf> {
        let mut record = container.record().clone();
        if let Ok(linked) = self.linked_environment(&record) {
            record.config.env.splice(0..0, linked);
        }
        let config = &exec.config;
        let layers = self
            .images
            .snapshot_layers(&container.id)
            .map_err(Error::room)?;
        let user = self.user_of(
            if config.user.is_empty() {
                &record.config.user
            } else {
                &config.user
            },
            &record,
            &layers,
        )?;
        let words = |words: &Option<Words>| words.clone().unwrap_or_default().0;
        let host = &record.host;
        let set = capabilities::of(
            host.privileged || config.privileged,
            &words(&host.cap_add),
            &words(&host.cap_drop),
        )?;
        let own: Vec<String> = config
            .env
            .iter()
            .filter_map(|entry| entry.split('=').next())
            .map(str::to_owned)
            .collect();
        let mut environment = spec::environment(&record, &user);
        if !config.user.is_empty()
            && !record
                .config
                .env
                .iter()
                .any(|entry| entry.starts_with("HOME="))
        {
            environment.retain(|entry| !entry.starts_with("HOME="));
            environment.push(format!("HOME={}", user.home));
        }
        environment.retain(|entry| !own.iter().any(|name| entry.split('=').next() == Some(name)));
        environment.extend(
            config
                .env
                .iter()
                .filter(|entry| entry.contains('='))
                .cloned(),
        );
        if config.tty && !environment.iter().any(|entry| entry.starts_with("TERM=")) {
            environment.push("TERM=xterm".into());
        }
        let directory = match (
            config.working_dir.as_str(),
            record.config.working_dir.as_str(),
        ) {
            ("", "") => "/",
            ("", own) => own,
            (wanted, _) => wanted,
        };
        let security = spec::security(host)?;
        let mut process = spec::process(
            &config.cmd,
            environment,
            directory,
            &user,
            config.tty,
            size,
            &set,
            security.no_new_privileges,
        );
        spec::bound(&mut process, host);
        let process = serde_json::from_value(process)
            .map_err(|error| Error::Invalid(format!("exec: {error}")))?;
        let made = protocol::Exec {
            process,
            stdio: protocol::StdioRecord {
                terminal: config.tty,
                stdin: config.attach_stdin && interactive,
                stdin_once: true,
                rows: size[0],
                columns: size[1],
            },
        };
        let path = container.run.join(format!("exec-{}.json", exec.id));
        base::file::write_json(&path, &made, base::file::Durability::Process)
            .map_err(Error::io(format!("writing {}", path.display())))?;
        Ok(path)
    }

    /// Handles the end of an exec'd process. False where there is none by this id.
    pub(crate) fn exec_ended(self: &Arc<Self>, id: &str, exit: &protocol::Exit) -> bool {
        let exec = lock(&self.execs).get(id).cloned();
        let Some(exec) = exec else { return false };
        exec.state.send_modify(|state| {
            state.exit_code = Some(exit.code);
            state.pid = 0;
            state.ended = Some(Instant::now());
        });
        if let Some(container) = self.inventory.get(&exec.container) {
            let more = [
                ("execID", exec.id.clone()),
                ("exitCode", exit.code.to_string()),
            ];
            self.tell_with(&container, "exec_die", &more);
        }
        true
    }

    /// Those whose process has started and not ended.
    pub(crate) fn running_execs(&self) -> Vec<String> {
        let execs = lock(&self.execs);
        execs
            .values()
            .filter(|exec| {
                let state = exec.state.borrow();
                state.pid != 0 && state.exit_code.is_none()
            })
            .map(|exec| exec.id.clone())
            .collect()
    }

    /// Forgets the execs of a container that is no more.
    pub(crate) fn forget_execs(&self, container: &Container) {
        lock(&self.execs).retain(|_, exec| exec.container != container.id);
    }

    /// Waits for its end; its exit code.
    pub(crate) async fn exec_wait(&self, id: &str) -> Result<i32> {
        let mut state = self.exec(id)?.state.subscribe();
        let ended = state.wait_for(|state| state.exit_code.is_some()).await;
        Ok(ended.ok().and_then(|state| state.exit_code).unwrap_or(-1))
    }

    /// Waits until the exit of an exec whose output has ended is known, so that whoever asks next is told it. One that
    /// closed its output and goes on is waited for no longer than a second.
    pub async fn exec_settled(&self, id: &str) {
        let _ = tokio::time::timeout(Duration::from_secs(1), self.exec_wait(id)).await;
    }

    /// Kills its process, which may still be on its way into the container.
    pub(crate) async fn exec_kill(self: &Arc<Self>, id: &str) -> Result<()> {
        let exec = self.exec(id)?;
        let mut state = exec.state.subscribe();
        let there = state.wait_for(|state| state.pid != 0 || state.exit_code.is_some());
        let _ = tokio::time::timeout(LAUNCH, there).await;
        self.keeper().await?.signal(&exec.id, libc::SIGKILL).await
    }

    /// How it stands.
    pub async fn exec_inspect(self: &Arc<Self>, exec: &str) -> Result<ExecInspect> {
        let exec = self.exec(exec)?;
        let state = exec.state.borrow().clone();
        let mut words = exec.config.cmd.0.clone();
        let entrypoint = if words.is_empty() {
            String::new()
        } else {
            words.remove(0)
        };
        Ok(ExecInspect {
            id: exec.id.clone(),
            running: state.started && state.exit_code.is_none(),
            exit_code: state.exit_code,
            process_config: ExecProcess {
                tty: exec.config.tty,
                entrypoint,
                arguments: words,
                privileged: exec.config.privileged,
                user: exec.config.user.clone(),
            },
            open_stdin: exec.config.attach_stdin,
            open_stderr: exec.config.attach_stderr,
            open_stdout: exec.config.attach_stdout,
            can_remove: state.exit_code.is_some(),
            container_id: exec.container.clone(),
            detach_keys: exec.config.detach_keys.clone(),
            pid: state.pid,
        })
    }

    /// Sets the size of its terminal.
    pub async fn exec_resize(self: &Arc<Self>, exec: &str, rows: u16, columns: u16) -> Result<()> {
        let exec = self.exec(exec)?;
        self.keeper().await?.resize(&exec.id, rows, columns).await
    }
}
