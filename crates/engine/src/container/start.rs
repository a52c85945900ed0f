//! Starting a container.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use base::Kind;
use base::file::{self, Durability};
use base::pidfd::ProcessKey;

use crate::Engine;
use crate::container::create::blocking;
use crate::container::record::{Container, Phase, Record};
use crate::container::spec::{self, Surroundings};
use crate::container::user::{self, User};
use crate::container::{cgroup, logs, mounts, network, root};
use crate::error::{Error, Result};
use crate::keeper::protocol::{Launch, Root, StdioRecord};

/// The word before each refusal of the runtime, which clients look for.
const RUNTIME: &str =
    "failed to create task for container: failed to create shim task: OCI runtime create failed";

/// Runs an operation to its end, even if the caller goes away.
pub(crate) async fn detached<T: Send + 'static>(
    operation: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    match tokio::spawn(operation).await {
        Ok(result) => result,
        Err(error) => Err(Error::Keeper(format!(
            "an operation of the engine failed: {error}"
        ))),
    }
}

impl Engine {
    /// Starts it. [`Error::NotModified`] where it runs already.
    ///
    /// # Errors
    /// Where the program cannot be executed, a port is taken, a mount's source is gone.
    pub async fn start(self: &Arc<Self>, container: &str) -> Result<()> {
        let container = self.inventory.find(container)?;
        let engine = self.clone();
        detached(async move {
            let _operation = container.operation.lock().await;
            match container.phase() {
                Phase::Running | Phase::Restarting => {
                    return Err(Error::NotModified("container is already started".into()));
                }
                Phase::Paused => {
                    return Err(Error::Conflict(
                        "cannot start a paused container, try unpause instead".into(),
                    ));
                }
                Phase::Removing | Phase::Dead => {
                    return Err(Error::Conflict(
                        "container is marked for removal and cannot be started".into(),
                    ));
                }
                Phase::Created | Phase::Exited => {}
            }
            container.note(|record| {
                record.stopped_by_user = false;
                record.restart_count = 0;
            });
            let result = engine.launch(&container).await;
            if result.is_err() && container.record().host.auto_remove {
                let _ = engine.discard(&container, true).await;
            }
            result
        })
        .await
    }

    /// Starts a process of a container whose operation lock the caller holds.
    pub(crate) async fn launch(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        let _turn = container.turn.lock().await;
        let keeper = self.keeper().await?;
        let record = container.record().clone();
        let shared = record.shares_network().map(str::to_owned);
        let own_network = shared.is_none() && record.host.network_mode != "host";
        let started = async {
            let sandbox = if own_network {
                let engine = self.clone();
                let bare = record.networks.keys().all(|name| name == "none");
                let make = move || match bare {
                    true => engine.networks.bare_sandbox().map_err(Error::room),
                    false => engine.networks.sandbox().map_err(Error::room),
                };
                Some(Arc::new(blocking(make).await?))
            } else {
                None
            };
            // The network is laid while the bundle is written and the init is made.
            let endpoints = {
                let (engine, record, sandbox) = (self.clone(), record.clone(), sandbox.clone());
                tokio::task::spawn_blocking(move || match sandbox {
                    Some(sandbox) => network::connect_all(&engine.networks, &record, &sandbox),
                    None => Ok(Vec::new()),
                })
            };
            let made = async {
                let (engine, container, record) = (self.clone(), container.clone(), record.clone());
                blocking(move || engine.bundle(&container, &record)).await?;
                let netns = match &sandbox {
                    Some(sandbox) => Some(
                        sandbox
                            .netns
                            .as_fd()
                            .try_clone_to_owned()
                            .map_err(Error::io("sharing a network namespace"))?,
                    ),
                    None => None,
                };
                Ok::<_, Error>(netns)
            }
            .await;
            let created = match made {
                Ok(netns) => keeper.create(&container.id, &container.run, netns).await,
                Err(error) => Err(error),
            };
            // Awaited in any case: what it made must be known to be taken back.
            let endpoints = endpoints.await.unwrap_or_else(|error| {
                Err(Error::Keeper(format!(
                    "a task of the engine failed: {error}"
                )))
            });
            let (process, endpoints) = (created?, endpoints?);
            let (engine, own, laid) = (self.clone(), container.clone(), endpoints.clone());
            blocking(move || {
                let linked = engine.linked_hosts(&own.record().clone());
                network::write_files(&own, &laid, &engine.networks, &linked)
            })
            .await?;
            // Noted before it runs: a daemon that dies now is followed by one that finds its network.
            if !(endpoints.is_empty() && container.record().endpoints.is_empty()) {
                container.note(|record| network::show_all(record, &endpoints));
            }
            keeper.start(&container.id).await?;
            Ok::<_, Error>((process, endpoints))
        }
        .await;
        match started {
            Ok((process, endpoints)) => {
                self.started(container, process, endpoints);
                Ok(())
            }
            Err(error) => {
                let _ = keeper.discard(&container.id).await;
                let _ = keeper.forget(&container.id).await;
                let (engine, id, cgroup) =
                    (self.clone(), container.id.clone(), self.cgroup_of(&record));
                let _ = blocking(move || {
                    engine.networks.release(&id);
                    cgroup::remove(&cgroup);
                    Ok(())
                })
                .await;
                let (error, code) = explain(error);
                let error = self.explain_platform(error, &record);
                container.note(|record| {
                    record.endpoints.clear();
                    record.networks.values_mut().for_each(network::hide);
                    record.error = error.to_string();
                    record.exit_code = code;
                    record.process = None;
                });
                Err(error)
            }
        }
    }

    /// Says of a program that the kernel cannot run that it is another processor's, where it is.
    fn explain_platform(&self, error: Error, record: &Record) -> Error {
        let host = ::image::Platform::host();
        match (error, self.images.inspect(&record.image)) {
            (Error::Runtime { message, kind }, Ok(image))
                if message.contains("exec format error")
                    && image.platform.architecture != host.architecture =>
            {
                Error::Room {
                    message: format!(
                        "{message}: the image is for {}, and this host runs {host}",
                        image.platform
                    ),
                    kind,
                    fix: Some(format!(
                        "take an image for {host}, or have the kernel emulate the other: apt-get install qemu-user-static binfmt-support"
                    )),
                }
            }
            (error, _) => error,
        }
    }

    /// Notes that it runs.
    fn started(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: ProcessKey,
        endpoints: Vec<net::Endpoint>,
    ) {
        container.note(|record| {
            record.phase = Phase::Running;
            record.process = Some(process);
            record.boot = base::host::boot_id();
            record.started_at = base::time::now_rfc3339();
            record.exit_code = 0;
            record.oom_killed = false;
            record.error.clear();
        });
        for endpoint in &endpoints {
            if let Ok(network) = self.networks.inspect(endpoint.network.as_str()) {
                self.tell_network("connect", &network, container);
            }
        }
        self.tell_mounts("mount", container);
        self.tell(container, "start");
        self.watch_health(container);
        self.watch_memory(container);
        let (engine, own) = (self.clone(), container.clone());
        tokio::task::spawn_blocking(move || engine.refresh_links_to(&own));
    }

    /// Writes `config.json` and `launch.json` of a run.
    fn bundle(&self, container: &Container, record: &Record) -> Result<()> {
        let layers = self
            .images
            .snapshot_layers(&container.id)
            .map_err(Error::room)?;
        let mut record = record.clone();
        // Before the container's own, which win.
        let linked = self.linked_environment(&record)?;
        record.config.env.splice(0..0, linked);
        let record = &record;
        let user = self.user_of(&record.config.user, record, &layers)?;
        let cgroup = self.cgroup_of(record);
        let of = |mode: &str| -> Result<Option<i32>> {
            let Some(other) = mode.strip_prefix("container:") else {
                return Ok(None);
            };
            let other = self.inventory.find(other)?;
            let record = other.record();
            match record.process {
                Some(process) if record.phase.lives() => Ok(Some(process.pid)),
                _ => Err(Error::Conflict(format!(
                    "cannot join namespace of a non running container: {}",
                    other.id
                ))),
            }
        };
        let wants_init = record.host.init.unwrap_or(self.config.init);
        let list = mounts::oci(&record.mounts, &self.volumes, &self.images)?;
        let ipc_of = of(&record.host.ipc_mode)?;
        if let Some(other) = record.host.ipc_mode.strip_prefix("container:") {
            let other = self.inventory.find(other)?;
            if other.record().host.ipc_mode != "shareable" {
                return Err(Error::Conflict(format!(
                    "cannot join IPC namespace of container {}: non-shareable IPC (hint: use IpcMode:shareable for the donor container)",
                    other.id
                )));
            }
        }
        let spec = spec::build(
            record,
            Surroundings {
                user,
                directory: &container.directory,
                cgroup: &cgroup,
                mounts: list,
                pid_of: of(&record.host.pid_mode)?,
                ipc_of,
                network_of: of(&record.host.network_mode)?,
                own_network: record.shares_network().is_none()
                    && record.host.network_mode != "host",
                init_program: wants_init.then(|| self.init_program()).as_deref(),
            },
        )?;
        if !record.config.working_dir.is_empty() {
            root::make_folder(&layers, &record.config.working_dir, &record.mounts)?;
        }
        let launch = Launch {
            root: Root {
                lower: layers.lower,
                upper: layers.upper,
                work: layers.work,
            },
            cgroup,
            shared_memory_of: ipc_of,
            stdio: StdioRecord {
                terminal: record.config.tty,
                stdin: record.config.open_stdin,
                stdin_once: record.config.stdin_once,
                rows: record.host.console_size[0],
                columns: record.host.console_size[1],
            },
            log: logs::record(record, container.log_path()),
        };
        let run = &container.run;
        let writing = || format!("writing the bundle {}", run.display());
        std::fs::create_dir_all(run).map_err(Error::io(writing()))?;
        let _ = std::fs::remove_file(run.join("exit.json"));
        file::write_json(&run.join("config.json"), &spec, Durability::Process)
            .map_err(Error::io(writing()))?;
        file::write_json(&run.join("launch.json"), &launch, Durability::Process)
            .map_err(Error::io(writing()))
    }

    /// Who `user` is in a container.
    pub(crate) fn user_of(
        &self,
        user: &str,
        record: &Record,
        layers: &::image::Layers,
    ) -> Result<User> {
        let passwd = root::read_text(layers, "etc/passwd");
        let group = root::read_text(layers, "etc/group");
        user::resolve(
            user,
            record.host.group_add.as_deref().unwrap_or_default(),
            &passwd,
            &group,
        )
    }

    /// The cgroup of a container, below each hierarchy's root.
    pub(crate) fn cgroup_of(&self, record: &Record) -> String {
        let parent = record.host.resources.cgroup_parent.trim_matches('/');
        let parent = if parent.is_empty() {
            self.config.cgroup_parent.as_str()
        } else {
            parent
        };
        format!("{parent}/{}", record.id)
    }

    pub(crate) fn init_program(&self) -> PathBuf {
        self.config.paths.state.join("docker-init")
    }
}

/// A failed start in the words clients look for, and the exit code they show for it.
fn explain(error: Error) -> (Error, i32) {
    let Error::Runtime { message, kind } = error else {
        return (error, 128);
    };
    let has = |part: &str| message.contains(part);
    let (kind, code) = if has("executable file not found")
        || has("no such file or directory")
        || has("No such file or directory")
    {
        (Kind::Invalid, 127)
    } else if has("ermission denied")
        || has("not a directory")
        || has("is a directory")
        || has("exec format error")
    {
        (Kind::Invalid, 126)
    } else {
        (
            if kind == Kind::NotFound {
                Kind::Invalid
            } else {
                kind
            },
            128,
        )
    };
    let message = if kind == Kind::Invalid && message.starts_with("exec:") {
        format!(
            "{RUNTIME}: runc create failed: unable to start container process: error during container init: {message}: unknown"
        )
    } else {
        format!("{RUNTIME}: {message}")
    };
    (Error::Runtime { message, kind }, code)
}
