//! Containers: what they are, and everything that is done to them.
//!
//! All operations take a container by id, by a unique prefix of its id, or by name (with or without the slash).

mod archive;
pub(crate) mod attach;
pub(crate) mod capabilities;
pub(crate) mod cgroup;
pub mod config;
pub(crate) mod create;
mod end;
mod health;
pub mod host_config;
pub mod inspect;
pub(crate) mod inventory;
mod limits;
mod links;
mod list;
pub(crate) mod logs;
mod memory;
mod mounts;
mod name;
pub(crate) mod network;
pub mod networking;
mod power;
mod probe;
mod processes;
pub(crate) mod record;
mod remove;
mod reopen;
mod root;
mod sampling;
mod seccomp;
mod signal;
pub(crate) mod spec;
pub(crate) mod start;
pub mod stats;
mod stop;
mod top;
mod user;

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
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

use crate::error::Result;
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
    /// Of the log, before what comes.
    pub(crate) past: Bytes,
    pub(crate) stream: UnixStream,
}

impl AsyncRead for AttachStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.past.has_remaining() {
            let count = self.past.remaining().min(buf.remaining());
            buf.put_slice(&self.past.split_to(count));
            return Poll::Ready(Ok(()));
        }
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
    pub(crate) result: Pin<Box<dyn Future<Output = WaitResult> + Send>>,
}

impl Future for Wait {
    type Output = WaitResult;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<WaitResult> {
        self.result.as_mut().poll(cx)
    }
}

/// An archive coming out of a container.
pub type TarStream = BoxStream<'static, std::io::Result<Bytes>>;

impl Engine {
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
