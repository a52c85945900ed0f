//! Builds from a Dockerfile: the builder is the image room's, each `RUN` is a container of this engine.
//!
//! The builder gives a step a snapshot of its own. The container that runs it is an ordinary one, made of the same
//! image; for the time of the step the two trade their upper folders, so that what the command writes is the step's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use ::image::build::Secret;
use ::image::build::{Context, Output, RunStep, StepMountKind, StepRunner};
use ::image::{ImageId, Layers, Platform, Reference};
use rustix::fs::RenameFlags;
use tokio::io::AsyncReadExt;
use tokio::runtime::Handle;

use crate::Engine;
use crate::bridge::BlockingReader;
use crate::container::{
    AttachOptions, AttachStream, ContainerConfig, HealthConfig, HostConfig, Mount, RemoveOptions,
    TmpfsOptions, Ulimit, WaitCondition,
};
use crate::error::{Error, Result};
use crate::image::{ArchiveReader, Credentials};
use crate::progress::{Cancel, Event, Progress};
use crate::volume::blocking;
use crate::wire::Words;

/// Who listens to a build: its progress (pulls), and its words (steps, output of commands).
pub trait BuildOutput: Progress {
    /// Takes a piece of text.
    fn write(&self, text: &str);
}

/// What to build, and how.
#[derive(Debug, Clone, Default)]
pub struct BuildOptions {
    /// Path in the context.
    pub dockerfile: String,
    pub tags: Vec<String>,
    /// `ARG` values; one without a value leaves the Dockerfile's own.
    pub arguments: BTreeMap<String, Option<String>>,
    pub labels: BTreeMap<String, String>,
    /// What `RUN --mount=type=secret` hands to steps, by id.
    pub secrets: BTreeMap<String, Secret>,
    /// The stage to stop at; empty is the last.
    pub target: String,
    pub no_cache: bool,
    /// Ask the registry for newer base images.
    pub pull: bool,
    pub platform: String,
    /// The network of `RUN`.
    pub network: String,
    /// Bytes; 0 is no limit. As the others, of each `RUN`.
    pub memory: i64,
    pub cpu_quota: i64,
    pub cpu_period: i64,
    pub cpu_shares: i64,
    pub cpuset_cpus: String,
    pub shm_size: i64,
    pub ulimits: Vec<Ulimit>,
    /// `name:address` lines for `/etc/hosts`.
    pub extra_hosts: Vec<String>,
    /// By registry.
    pub credentials: BTreeMap<String, Credentials>,
}

impl Engine {
    /// Builds an image of `context`, a tar archive (plain, gzip or zstd); answers its id.
    ///
    /// # Errors
    /// A context or Dockerfile that is none, a step that failed, what the store refuses. Nothing is left but what the
    /// cache keeps of the steps that succeeded.
    pub async fn build_image(
        self: &Arc<Self>,
        context: ArchiveReader,
        options: BuildOptions,
        output: Arc<dyn BuildOutput>,
        cancel: Cancel,
    ) -> Result<String> {
        let tags = options
            .tags
            .iter()
            .map(|tag| Reference::parse(tag).map(Reference::or_latest));
        let told: Vec<Reference> = tags.collect::<::image::Result<_>>().map_err(Error::room)?;
        let build = ::image::build::BuildOptions {
            dockerfile: options.dockerfile.clone(),
            tags: told.clone(),
            target: Some(options.target.clone()).filter(|target| !target.is_empty()),
            args: options.arguments.clone(),
            labels: options.labels.clone(),
            secrets: options.secrets.clone(),
            no_cache: options.no_cache,
            pull: options.pull,
            platform: crate::image::platform(&options.platform)?,
            ..Default::default()
        };
        let archive = BlockingReader::new(context);
        let runner = Runner {
            engine: self.clone(),
            options,
            reactor: Handle::current(),
            output: output.clone(),
            cancel: cancel.clone(),
        };
        let engine = self.clone();
        let id = blocking(move || {
            let context = Context::from_tar(engine.images(), archive).map_err(Error::room)?;
            let words = |text: &str| output.write(text);
            ::image::build::build(engine.images(), &context, &build, &runner, &words, &cancel)
                .map_err(|error| match error {
                    ::image::Error::Step { code, .. } => Error::Step {
                        message: error.to_string(),
                        code,
                    },
                    error => Error::room(error),
                })
        })
        .await?
        .to_string();
        for name in told {
            self.image_event("tag", &id, &name.familiar());
        }
        Ok(id)
    }

    /// Forgets what builds kept for the next ones; answers the bytes given back.
    ///
    /// # Errors
    /// Where files cannot be removed.
    pub async fn prune_builds(self: &Arc<Self>) -> Result<u64> {
        let store = self.images().clone();
        blocking(move || store.prune_build_cache().map_err(Error::room)).await
    }
}

/// A step's secret in a file, for as long as this value lives.
struct SecretFile(PathBuf);

impl Drop for SecretFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Engine {
    /// Where secrets lie during their step; only this daemon's user may look into it.
    fn secrets_folder(&self) -> PathBuf {
        self.config.paths.run.join("build-secrets")
    }

    /// Removes the secrets of builds that a killed daemon was at.
    pub(crate) fn sweep_secrets(&self) {
        let _ = std::fs::remove_dir_all(self.secrets_folder());
    }

    fn secret_file(
        &self,
        content: &Secret,
        mode: u32,
        owner: (u32, u32),
    ) -> std::io::Result<SecretFile> {
        use std::io::Write;
        use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, fchown};
        let folder = self.secrets_folder();
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)?;
        let file = SecretFile(folder.join(base::Id::random().to_string()));
        let mut opened = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&file.0)?;
        opened.write_all(&content.0)?;
        if owner != (0, 0) {
            fchown(&opened, Some(owner.0), Some(owner.1))?;
        }
        opened.set_permissions(std::fs::Permissions::from_mode(mode))?;
        Ok(file)
    }
}

/// Runs the steps of one build. Called on the build's own thread.
struct Runner {
    engine: Arc<Engine>,
    options: BuildOptions,
    reactor: Handle,
    output: Arc<dyn BuildOutput>,
    cancel: Cancel,
}

/// Carries an engine's error through the image room as it is.
fn carried(error: Error) -> ::image::Error {
    use base::Classified;
    ::image::Error::Runner {
        message: error.to_string(),
        kind: error.kind(),
        fix: error.fix(),
    }
}

impl StepRunner for Runner {
    fn run(&self, layers: &Layers, step: &RunStep, output: &dyn Output) -> ::image::Result<i32> {
        self.reactor
            .block_on(self.run_step(layers, step, output))
            .map_err(carried)
    }

    fn pull(
        &self,
        reference: &Reference,
        platform: Option<&Platform>,
        _: &dyn Output,
    ) -> ::image::Result<ImageId> {
        let platform = platform.map_or_else(String::new, ToString::to_string);
        let credentials = self.credentials(reference.domain());
        let listener: Arc<dyn Progress> = Arc::new(Listener(self.output.clone()));
        let name = reference.to_string();
        let pull =
            self.engine
                .pull_image(&name, &platform, credentials, listener, self.cancel.clone());
        let id = self.reactor.block_on(pull).map_err(carried)?;
        id.parse()
    }
}

struct Listener(Arc<dyn BuildOutput>);

impl Progress for Listener {
    fn report(&self, event: Event) {
        self.0.report(event);
    }
}

impl Runner {
    fn credentials(&self, domain: &str) -> Credentials {
        // Clients name Docker Hub by the address of its index.
        let names = match domain {
            "docker.io" => vec!["docker.io", "https://index.docker.io/v1/"],
            other => vec![other],
        };
        names
            .iter()
            .find_map(|name| self.options.credentials.get(*name))
            .cloned()
            .unwrap_or_default()
    }

    async fn run_step(&self, layers: &Layers, step: &RunStep, output: &dyn Output) -> Result<i32> {
        let snapshots = self.engine.images().snapshots();
        let image = snapshots
            .into_iter()
            .find_map(|(key, image)| (key == step.key).then_some(image).flatten());
        let image = image.ok_or_else(|| {
            Error::Invalid(
                "RUN needs files to run, and the image is still empty (FROM scratch)".into(),
            )
        })?;
        let (config, mut host) = self.definition(step, &image)?;
        let (mounts, _secrets) = self.mounts(step)?;
        host.mounts = mounts;
        let created = self.engine.create_step(config, host).await?;
        let outcome = self.run_container(&created.id, layers, output).await;
        let removal = RemoveOptions {
            force: true,
            volumes: true,
            link: false,
        };
        let removed = self.engine.remove(&created.id, removal).await;
        let code = outcome?;
        removed?;
        Ok(code)
    }

    fn definition(&self, step: &RunStep, image: &ImageId) -> Result<(ContainerConfig, HostConfig)> {
        let (program, arguments) = step
            .command
            .split_first()
            .ok_or_else(|| Error::Invalid("RUN has no command".into()))?;
        let config = ContainerConfig {
            image: image.to_string(),
            entrypoint: Some(Words(vec![program.clone()])),
            cmd: Some(Words(arguments.to_vec())),
            env: step.env.clone(),
            user: step.user.clone(),
            working_dir: step.working_dir.clone(),
            attach_stdout: true,
            attach_stderr: true,
            // A health check of the base image has no meaning in a step.
            healthcheck: Some(HealthConfig {
                test: vec!["NONE".into()],
                ..HealthConfig::default()
            }),
            ..ContainerConfig::default()
        };
        let mut host = HostConfig {
            network_mode: match step.network.as_deref() {
                None | Some("default") => self.options.network.clone(),
                Some(other) => other.to_owned(),
            },
            extra_hosts: (!self.options.extra_hosts.is_empty())
                .then(|| self.options.extra_hosts.clone()),
            shm_size: self.options.shm_size,
            ..HostConfig::default()
        };
        host.log_config.kind = "none".into();
        host.resources.memory = self.options.memory;
        host.resources.ulimits =
            (!self.options.ulimits.is_empty()).then(|| self.options.ulimits.clone());
        host.resources.cpu_quota = self.options.cpu_quota;
        host.resources.cpu_period = self.options.cpu_period;
        host.resources.cpu_shares = self.options.cpu_shares;
        host.resources
            .cpuset_cpus
            .clone_from(&self.options.cpuset_cpus);
        Ok((config, host))
    }

    fn mounts(&self, step: &RunStep) -> Result<(Vec<Mount>, Vec<SecretFile>)> {
        let (mut mounts, mut secrets) = (Vec::new(), Vec::new());
        for mount in &step.mounts {
            let mut wanted = Mount {
                kind: "bind".into(),
                target: mount.target.clone(),
                read_only: mount.read_only,
                ..Mount::default()
            };
            match &mount.kind {
                StepMountKind::Bind(path) | StepMountKind::Cache(path) => {
                    wanted.source = path.display().to_string();
                }
                StepMountKind::Tmpfs(bytes) => {
                    wanted.kind = "tmpfs".into();
                    wanted.tmpfs_options = (*bytes > 0).then(|| TmpfsOptions {
                        size_bytes: i64::try_from(*bytes).unwrap_or(i64::MAX),
                        ..TmpfsOptions::default()
                    });
                }
                StepMountKind::Secret {
                    content,
                    mode,
                    uid,
                    gid,
                } => {
                    let file = self
                        .engine
                        .secret_file(content, *mode, (*uid, *gid))
                        .map_err(|source| Error::Io {
                            what: format!("the secret for {}", mount.target),
                            source,
                        })?;
                    wanted.source = file.0.display().to_string();
                    secrets.push(file);
                }
            }
            mounts.push(wanted);
        }
        Ok((mounts, secrets))
    }

    async fn run_container(&self, id: &str, layers: &Layers, output: &dyn Output) -> Result<i32> {
        let own = self
            .engine
            .images()
            .snapshot_layers(id)
            .map_err(Error::room)?;
        let options = AttachOptions {
            stdout: true,
            stderr: true,
            stream: true,
            ..AttachOptions::default()
        };
        let stream = self.engine.attach(id, options).await?;
        let wait = self.engine.wait(id, WaitCondition::NextExit).await?;
        let traded = Traded::trade(own.upper.clone(), layers.upper.clone())?;
        self.engine.start(id).await?;
        let cancelled = async {
            while !self.cancel.is_cancelled() {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        let finished = async {
            copy_output(stream, output).await;
            wait.await
        };
        let result = tokio::select! {
            result = finished => result,
            () = cancelled => {
                let _ = self.engine.kill(id, "KILL").await;
                let _ = self.engine.wait(id, WaitCondition::NotRunning).await?.await;
                return Err(Error::Conflict("the build was cancelled".into()));
            }
        };
        traded.back()?;
        i32::try_from(result.status_code)
            .map_err(|_| Error::Conflict("the step has no exit code".into()))
    }
}

/// Two upper folders that stand in each other's place, until this is dropped.
struct Traded {
    pair: Option<(PathBuf, PathBuf)>,
}

impl Traded {
    fn trade(one: PathBuf, other: PathBuf) -> Result<Traded> {
        exchange(&one, &other)?;
        Ok(Traded {
            pair: Some((one, other)),
        })
    }

    fn back(mut self) -> Result<()> {
        match self.pair.take() {
            Some((one, other)) => exchange(&one, &other),
            None => Ok(()),
        }
    }
}

impl Drop for Traded {
    fn drop(&mut self) {
        if let Some((one, other)) = self.pair.take()
            && let Err(error) = exchange(&one, &other)
        {
            tracing::error!(%error, "a build step's folders could not be put back");
        }
    }
}

fn exchange(one: &Path, other: &Path) -> Result<()> {
    rustix::fs::renameat_with(
        rustix::fs::CWD,
        one,
        rustix::fs::CWD,
        other,
        RenameFlags::EXCHANGE,
    )
    .map_err(|errno| Error::Io {
        what: format!("trading {}", one.display()),
        source: errno.into(),
    })
}

/// Passes on what a container says, whole characters at a time.
async fn copy_output(mut stream: AttachStream, output: &dyn Output) {
    let mut held = Vec::new();
    let mut head = [0u8; 8];
    while stream.read_exact(&mut head).await.is_ok() {
        let mut left = u32::from_be_bytes([head[4], head[5], head[6], head[7]]) as usize;
        while left > 0 {
            let mut chunk = vec![0u8; left.min(64 * 1024)];
            let Ok(count @ 1..) = stream.read(&mut chunk).await else {
                return;
            };
            left -= count;
            held.extend_from_slice(&chunk[..count]);
            let whole = whole_characters(&held);
            if whole > 0 {
                output.write(&String::from_utf8_lossy(&held[..whole]));
                held.drain(..whole);
            }
        }
    }
    if !held.is_empty() {
        output.write(&String::from_utf8_lossy(&held));
    }
}

/// How many bytes can be shown without cutting a character of UTF-8 that has only begun.
fn whole_characters(bytes: &[u8]) -> usize {
    let mut rest = bytes;
    loop {
        match std::str::from_utf8(rest) {
            Ok(_) => return bytes.len(),
            Err(error) => match error.error_len() {
                None => return bytes.len() - (rest.len() - error.valid_up_to()),
                Some(bad) => rest = &rest[error.valid_up_to() + bad..],
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_not_cut_and_garbage_is_not_held_back() {
        assert_eq!(whole_characters("aé".as_bytes()), 3);
        assert_eq!(whole_characters(&"aé".as_bytes()[..2]), 1);
        assert_eq!(whole_characters(b"a\xffb"), 3);
        assert_eq!(whole_characters(b"a\xff\xc3"), 2);
        assert_eq!(whole_characters(b""), 0);
    }

    #[test]
    fn traded_folders_go_back_however_the_step_ends() {
        let home = tempfile::tempdir().unwrap();
        let path = |name: &str| home.path().join(name);
        for name in ["one", "other"] {
            std::fs::create_dir(path(name)).unwrap();
            std::fs::write(path(name).join("name"), name).unwrap();
        }
        let name_in = |folder: &str| std::fs::read_to_string(path(folder).join("name")).unwrap();
        let traded = Traded::trade(path("one"), path("other")).unwrap();
        assert_eq!(name_in("one"), "other");
        drop(traded);
        assert_eq!(name_in("one"), "one");
        Traded::trade(path("one"), path("other"))
            .unwrap()
            .back()
            .unwrap();
        assert_eq!(name_in("other"), "other");
    }
}
