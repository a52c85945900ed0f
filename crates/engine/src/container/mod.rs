//! Containers: what they are, and everything that is done to them.
//!
//! All operations take a container by id, by a unique prefix of its id, or by name (with or without the slash).

pub mod config;
pub mod host_config;
pub mod init;
pub mod inspect;
pub mod networking;
pub mod stats;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;

pub use config::{ContainerConfig, HealthConfig};
pub use host_config::{
    BindOptions, DeviceMapping, HostConfig, LogConfig, Mount, PortBinding, Resources,
    RestartPolicy, TmpfsOptions, Ulimit, UpdateConfig, VolumeOptions,
};
pub use inspect::{
    Change, ContainerInspect, ContainerState, ContainerSummary, Created, Health, MountPoint,
    PathStat, Port, PruneReport, Top, Updated, WaitResult,
};
pub use networking::{EndpointIpamConfig, EndpointSettings, NetworkSettings, NetworkingConfig};
pub use stats::Stats;

use crate::error::{Error, Result};
use crate::exec::{ExecConfig, ExecInspect, ExecStart};
use crate::filters::Filters;
use crate::{Engine, Event};

/// What to attach to.
#[derive(Debug, Clone, Default)]
pub struct AttachOptions {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    /// Send what the log holds first.
    pub logs: bool,
    /// Go on with what comes; without it, only `logs` are sent.
    pub stream: bool,
    /// Docker's notation (`ctrl-p,ctrl-q`); empty is that default. Heeded with a terminal only.
    pub detach_keys: String,
}

/// Which lines of a log.
#[derive(Debug, Clone, Default)]
pub struct LogsOptions {
    pub stdout: bool,
    pub stderr: bool,
    pub since: Option<Timestamp>,
    pub until: Option<Timestamp>,
    pub timestamps: bool,
    pub follow: bool,
    /// The last so many lines; `None` is all.
    pub tail: Option<usize>,
    pub details: bool,
}

/// When `wait` is over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WaitCondition {
    /// At once, where it is not running.
    #[default]
    NotRunning,
    NextExit,
    Removed,
}

/// How `ps` chooses.
#[derive(Debug, Clone, Default)]
pub struct ListOptions {
    pub all: bool,
    pub limit: Option<usize>,
    pub size: bool,
    pub filters: Filters,
}

/// How `rm` removes.
#[derive(Debug, Clone, Copy, Default)]
pub struct RemoveOptions {
    pub force: bool,
    /// Anonymous volumes too.
    pub volumes: bool,
    /// The legacy link of this name, not the container.
    pub link: bool,
}

/// What `commit` makes.
#[derive(Debug, Clone, Default)]
pub struct CommitOptions {
    pub repository: String,
    pub tag: String,
    pub comment: String,
    pub author: String,
    /// Freeze the container meanwhile.
    pub pause: bool,
    /// Dockerfile instructions over the configuration.
    pub changes: Vec<String>,
    /// In place of the container's own.
    pub config: Option<ContainerConfig>,
}

/// How `cp` into a container behaves.
#[derive(Debug, Clone, Copy, Default)]
pub struct ArchivePutOptions {
    /// Refuse to replace a folder by a file, and a file by a folder.
    pub no_overwrite_dir_non_dir: bool,
    /// Keep the archive's owners.
    pub copy_uid_gid: bool,
}

/// Output of a log or an attach without stdin. Framed ([`AttachStream`]) unless `tty`.
pub struct LogStream {
    pub tty: bool,
    pub stream: BoxStream<'static, std::io::Result<Bytes>>,
}

/// The duplex of an attached client. Reading gives the output: raw with a terminal, else frames of 8 bytes
/// (`[stream, 0, 0, 0, length as u32 big-endian]`, stream 1 stdout, 2 stderr) with the bytes after them. Writing is
/// the container's stdin; shutting the writing side down is its end of file. Dropping it detaches.
#[derive(Debug)]
pub struct AttachStream {
    /// Whether the container has a terminal: output is then raw.
    pub tty: bool,
    stream: UnixStream,
}

impl AsyncRead for AttachStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for AttachStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A pending `wait`: it is registered when this exists, so nothing is missed between it and a `start`.
pub struct Wait {
    result: Pin<Box<dyn Future<Output = WaitResult> + Send>>,
}

impl Future for Wait {
    type Output = WaitResult;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<WaitResult> {
        self.result.as_mut().poll(cx)
    }
}

/// An archive coming out of a container.
pub type TarStream = BoxStream<'static, std::io::Result<Bytes>>;

fn absent<T>(what: &str) -> Result<T> {
    Err(Error::Unsupported(format!("{what} is not in this build")))
}

impl Engine {
    /// Makes a container; it is `created` then. `name` without a slash; `None` invents one.
    pub async fn create_container(
        self: &Arc<Self>,
        name: Option<&str>,
        config: ContainerConfig,
        host: HostConfig,
        networking: NetworkingConfig,
    ) -> Result<Created> {
        let _ = (name, config, host, networking);
        absent("create")
    }

    /// Starts it. [`Error::NotModified`] where it runs already.
    pub async fn start(self: &Arc<Self>, container: &str) -> Result<()> {
        let _ = container;
        absent("start")
    }

    /// Stops it: `signal` (its own stop signal), then after `timeout` seconds (its own; negative: never) SIGKILL.
    /// [`Error::NotModified`] where it does not run.
    pub async fn stop(
        self: &Arc<Self>,
        container: &str,
        timeout: Option<i64>,
        signal: Option<&str>,
    ) -> Result<()> {
        let _ = (container, timeout, signal);
        absent("stop")
    }

    /// Stops (where it runs) and starts it.
    pub async fn restart(
        self: &Arc<Self>,
        container: &str,
        timeout: Option<i64>,
        signal: Option<&str>,
    ) -> Result<()> {
        let _ = (container, timeout, signal);
        absent("restart")
    }

    /// Sends a signal by name or number (`KILL`, `SIGKILL`, `9`; empty is SIGKILL).
    pub async fn kill(self: &Arc<Self>, container: &str, signal: &str) -> Result<()> {
        let _ = (container, signal);
        absent("kill")
    }

    /// Freezes all its processes.
    pub async fn pause(self: &Arc<Self>, container: &str) -> Result<()> {
        let _ = container;
        absent("pause")
    }

    /// Thaws them.
    pub async fn unpause(self: &Arc<Self>, container: &str) -> Result<()> {
        let _ = container;
        absent("unpause")
    }

    /// Registers a wait and returns it pending.
    pub async fn wait(self: &Arc<Self>, container: &str, condition: WaitCondition) -> Result<Wait> {
        let _ = (container, condition);
        absent("wait")
    }

    /// Renames it.
    pub async fn rename(self: &Arc<Self>, container: &str, name: &str) -> Result<()> {
        let _ = (container, name);
        absent("rename")
    }

    /// Changes limits (fields that are zero stay) and the restart policy.
    pub async fn update(
        self: &Arc<Self>,
        container: &str,
        update: UpdateConfig,
    ) -> Result<Updated> {
        let _ = (container, update);
        absent("update")
    }

    /// Removes it.
    pub async fn remove(self: &Arc<Self>, container: &str, options: RemoveOptions) -> Result<()> {
        let _ = (container, options);
        absent("remove")
    }

    /// Everything about it; with the sizes of its layers where `size`.
    pub async fn inspect(
        self: &Arc<Self>,
        container: &str,
        size: bool,
    ) -> Result<ContainerInspect> {
        let _ = (container, size);
        absent("inspect")
    }

    /// The rows of `ps`, newest first.
    pub async fn list(self: &Arc<Self>, options: ListOptions) -> Result<Vec<ContainerSummary>> {
        let _ = options;
        absent("list")
    }

    /// Its processes by ps(1) options (`-ef` where empty).
    pub async fn top(self: &Arc<Self>, container: &str, ps_args: &str) -> Result<Top> {
        let _ = (container, ps_args);
        absent("top")
    }

    /// What differs from its image.
    pub async fn changes(self: &Arc<Self>, container: &str) -> Result<Vec<Change>> {
        let _ = container;
        absent("changes")
    }

    /// Attaches to its standard streams; works before `start` too.
    pub async fn attach(
        self: &Arc<Self>,
        container: &str,
        options: AttachOptions,
    ) -> Result<AttachStream> {
        let _ = (container, options);
        absent("attach")
    }

    /// Its log.
    pub async fn logs(
        self: &Arc<Self>,
        container: &str,
        options: LogsOptions,
    ) -> Result<LogStream> {
        let _ = (container, options);
        absent("logs")
    }

    /// Sets the size of its terminal.
    pub async fn resize(self: &Arc<Self>, container: &str, rows: u16, columns: u16) -> Result<()> {
        let _ = (container, rows, columns);
        absent("resize")
    }

    /// Samples once a second; one sample where not `stream` (two readings apart, so that percentages can be
    /// computed, unless `one_shot`). Ends with the container's removal; a stopped one gives zeros.
    pub async fn stats(
        self: &Arc<Self>,
        container: &str,
        stream: bool,
        one_shot: bool,
    ) -> Result<BoxStream<'static, Result<Stats>>> {
        let _ = (container, stream, one_shot);
        absent("stats")
    }

    /// What is at a path inside.
    pub async fn archive_stat(self: &Arc<Self>, container: &str, path: &str) -> Result<PathStat> {
        let _ = (container, path);
        absent("archive")
    }

    /// A tar archive of a path inside.
    pub async fn archive_get(
        self: &Arc<Self>,
        container: &str,
        path: &str,
    ) -> Result<(PathStat, TarStream)> {
        let _ = (container, path);
        absent("archive")
    }

    /// Unpacks a tar archive (plain, gzip or zstd) into a folder inside.
    pub async fn archive_put(
        self: &Arc<Self>,
        container: &str,
        path: &str,
        options: ArchivePutOptions,
        archive: Pin<Box<dyn AsyncRead + Send>>,
    ) -> Result<()> {
        let _ = (container, path, options, archive);
        absent("archive")
    }

    /// Its whole file system as a tar archive.
    pub async fn export(self: &Arc<Self>, container: &str) -> Result<TarStream> {
        let _ = container;
        absent("export")
    }

    /// An image of it; answers the image's id (`sha256:…`).
    pub async fn commit(
        self: &Arc<Self>,
        container: &str,
        options: CommitOptions,
    ) -> Result<String> {
        let _ = (container, options);
        absent("commit")
    }

    /// Removes stopped containers; filters `until`, `label`, `label!`.
    pub async fn prune_containers(self: &Arc<Self>, filters: Filters) -> Result<PruneReport> {
        let _ = filters;
        absent("prune")
    }

    /// Connects a container to a network, now where it runs.
    pub async fn connect_network(
        self: &Arc<Self>,
        network: &str,
        container: &str,
        endpoint: EndpointSettings,
    ) -> Result<()> {
        let _ = (network, container, endpoint);
        absent("network connect")
    }

    /// Takes a container off a network.
    pub async fn disconnect_network(
        self: &Arc<Self>,
        network: &str,
        container: &str,
        force: bool,
    ) -> Result<()> {
        let _ = (network, container, force);
        absent("network disconnect")
    }

    /// Prepares a process in a running container; answers its id.
    pub async fn exec_create(
        self: &Arc<Self>,
        container: &str,
        config: ExecConfig,
    ) -> Result<String> {
        let _ = (container, config);
        absent("exec")
    }

    /// Starts it; `None` where detached.
    pub async fn exec_start(
        self: &Arc<Self>,
        exec: &str,
        start: ExecStart,
    ) -> Result<Option<AttachStream>> {
        let _ = (exec, start);
        absent("exec")
    }

    /// How it stands.
    pub async fn exec_inspect(self: &Arc<Self>, exec: &str) -> Result<ExecInspect> {
        let _ = exec;
        absent("exec")
    }

    /// Sets the size of its terminal.
    pub async fn exec_resize(self: &Arc<Self>, exec: &str, rows: u16, columns: u16) -> Result<()> {
        let _ = (exec, rows, columns);
        absent("exec")
    }

    /// Events of the past (from `since`) and to come (to `until`).
    pub fn subscribe(
        &self,
        since: Option<Timestamp>,
        until: Option<Timestamp>,
        filters: Filters,
    ) -> Result<BoxStream<'static, Event>> {
        self.events.subscribe(since, until, filters)
    }
}
