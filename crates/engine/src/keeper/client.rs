//! The daemon's side of the keeper's socket.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base::pidfd::ProcessKey;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};

use crate::error::{Error, Result};
use crate::keeper::protocol::{
    self, Exit, Held, MAX_MESSAGE, ProtocolError, Reply, Request, VERSION,
};

/// How long a keeper may take to greet.
const GREETING: Duration = Duration::from_secs(20);

/// What the keeper tells unasked.
#[derive(Debug)]
pub(crate) enum Notice {
    Exited {
        id: String,
        exit: Exit,
    },
    Detached {
        id: String,
    },
    /// The connection is lost; the keeper died or hangs.
    Lost,
}

/// A connection to the keeper. Requests may be made from any task.
pub(crate) struct Keeper {
    socket: Arc<AsyncFd<OwnedFd>>,
    pending: Arc<Mutex<HashMap<u64, oneshot::Sender<Reply>>>>,
    serial: AtomicU64,
    /// The order on the wire is the order in which sending began.
    sending: tokio::sync::Mutex<()>,
    lost: Arc<AtomicBool>,
    version: u32,
    pub pid: i32,
}

/// Why a keeper did not greet.
enum Greeting {
    /// It is there and says nothing.
    Late,
    Failed(Error),
}

impl From<Error> for Greeting {
    fn from(error: Error) -> Greeting {
        Greeting::Failed(error)
    }
}

impl Keeper {
    /// Whether the connection has ended.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Connects to the keeper of a run folder, starting one where there is none; with what it holds.
    pub async fn connect(
        run: &Path,
        command: &[PathBuf],
    ) -> Result<(Keeper, Vec<Held>, mpsc::UnboundedReceiver<Notice>)> {
        let path = protocol::socket_path(run);
        if let Ok(socket) = connect(&path) {
            match Keeper::greet(socket).await {
                // One of another version that holds nothing makes room for ours.
                Ok((keeper, held, _)) if keeper.version != VERSION && held.is_empty() => {
                    let _ = keeper.quit().await;
                }
                Ok(keeper) => return Ok(keeper),
                // Another one would take its containers for dead, and end them.
                Err(Greeting::Late) => {
                    return Err(Error::Keeper(format!(
                        "it has not answered for {} s: a start of a container may hang in it (in a network file system, or \
                         a hook). Its containers run on: mend what it waits for and try again, or end them all by killing \
                         the process berth-keeper that holds {}",
                        GREETING.as_secs(),
                        path.display()
                    )));
                }
                Err(Greeting::Failed(error)) => {
                    tracing::warn!(%error, "the keeper that was there is lost")
                }
            }
        }
        base::companion::start("keeper", run, &path, command)
            .map_err(Error::io("starting the container keeper"))?;
        let socket = connect(&path).map_err(Error::io("connecting to the container keeper"))?;
        Keeper::greet(socket).await.map_err(|error| match error {
            Greeting::Late => Error::Keeper("it does not greet".into()),
            Greeting::Failed(error) => error,
        })
    }

    async fn greet(
        socket: OwnedFd,
    ) -> std::result::Result<(Keeper, Vec<Held>, mpsc::UnboundedReceiver<Notice>), Greeting> {
        let lost = |error: ProtocolError| Error::Keeper(error.to_string());
        // SAFETY: the descriptor is owned by what is made here and closed only with it, so it stays the one registered.
        let socket = unsafe {
            AsyncFd::register_with_interest(socket, Interest::READABLE | Interest::WRITABLE)
        }
        .map_err(|error| Error::Keeper(format!("watching its socket: {error:?}")))?;
        let socket = Arc::new(socket);
        let hello = protocol::encode(&Request::Hello { version: VERSION }).map_err(lost)?;
        send(&socket, &hello, &[]).await.map_err(lost)?;
        let mut buffer = vec![0; MAX_MESSAGE];
        let mut held = Vec::new();
        let (mut keeper_pid, mut keeper_version) = (0, VERSION);
        loop {
            let reply = tokio::time::timeout(GREETING, receive(&socket, &mut buffer))
                .await
                .map_err(|_| Greeting::Late)?
                .map_err(lost)?;
            match reply {
                Reply::Hello { version, pid } => {
                    if version > VERSION {
                        tracing::warn!(version, "the keeper is newer than this daemon");
                    }
                    (keeper_pid, keeper_version) = (pid, version);
                }
                Reply::Process(process) => held.push(process),
                Reply::Ready => break,
                // An exit between the greeting and its end is in the list, or will be told again as held.
                _ => {}
            }
        }
        let pending: Arc<Mutex<HashMap<u64, oneshot::Sender<Reply>>>> = Arc::default();
        let (sender, notices) = mpsc::unbounded_channel();
        let lost = Arc::new(AtomicBool::new(false));
        tokio::spawn(listen(
            socket.clone(),
            buffer,
            pending.clone(),
            sender,
            lost.clone(),
        ));
        let keeper = Keeper {
            socket,
            pending,
            serial: AtomicU64::new(1),
            sending: tokio::sync::Mutex::new(()),
            lost,
            version: keeper_version,
            pid: keeper_pid,
        };
        Ok((keeper, held, notices))
    }

    async fn ask(&self, make: impl FnOnce(u64) -> Request, fd: Option<OwnedFd>) -> Result<Reply> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        lock(&self.pending).insert(serial, sender);
        if self.is_lost() {
            // Nobody listens for the answer any more.
            lock(&self.pending).remove(&serial);
        }
        if let Err(error) = self.tell(&make(serial), fd).await {
            lock(&self.pending).remove(&serial);
            return Err(error);
        }
        match answer.await {
            Ok(Reply::Failed { kind, message, .. }) => Err(Error::Runtime {
                message,
                kind: kind.into(),
            }),
            Ok(reply) => Ok(reply),
            Err(_) => Err(Error::Keeper("the connection was lost".into())),
        }
    }

    async fn tell(&self, request: &Request, fd: Option<OwnedFd>) -> Result<()> {
        let bytes = protocol::encode(request).map_err(|error| Error::Keeper(error.to_string()))?;
        let _order = self.sending.lock().await;
        let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
        send(&self.socket, &bytes, &fds)
            .await
            .map_err(|error| Error::Keeper(error.to_string()))
    }

    /// Makes the init of a container; it waits.
    pub async fn create(
        &self,
        id: &str,
        directory: &Path,
        net_ns: Option<OwnedFd>,
    ) -> Result<ProcessKey> {
        let make = |serial| Request::Create {
            serial,
            id: id.into(),
            directory: directory.into(),
        };
        spawned(self.ask(make, net_ns).await?)
    }

    /// Lets it exec.
    pub async fn start(&self, id: &str) -> Result<()> {
        self.ask(
            |serial| Request::Start {
                serial,
                id: id.into(),
            },
            None,
        )
        .await
        .map(drop)
    }

    /// Kills a created init that was not started.
    pub async fn discard(&self, id: &str) -> Result<()> {
        self.ask(
            |serial| Request::Discard {
                serial,
                id: id.into(),
            },
            None,
        )
        .await
        .map(drop)
    }

    /// Starts a process in a container.
    pub async fn exec(&self, id: &str, container: &str, record: &Path) -> Result<ProcessKey> {
        let make = |serial| Request::Exec {
            serial,
            id: id.into(),
            container: container.into(),
            record: record.into(),
        };
        spawned(self.ask(make, None).await?)
    }

    /// Attaches a client; answers our end of its stream, and up to when the log holds what it missed.
    pub async fn attach(
        &self,
        id: &str,
        stdin: bool,
        stdout: bool,
        stderr: bool,
        detach_keys: Vec<u8>,
    ) -> Result<(tokio::net::UnixStream, String)> {
        let (ours, theirs) =
            std::os::unix::net::UnixStream::pair().map_err(Error::io("making a socket pair"))?;
        ours.set_nonblocking(true)
            .map_err(Error::io("making a socket pair"))?;
        let make = |serial| Request::Attach {
            serial,
            id: id.into(),
            stdin,
            stdout,
            stderr,
            detach_keys,
        };
        match self.ask(make, Some(theirs.into())).await? {
            Reply::Attached { at, .. } => {
                let stream =
                    tokio::net::UnixStream::from_std(ours).map_err(Error::io("attaching"))?;
                Ok((stream, at))
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Sends a signal to one process.
    pub async fn signal(&self, id: &str, signal: i32) -> Result<()> {
        self.ask(
            |serial| Request::Signal {
                serial,
                id: id.into(),
                signal,
            },
            None,
        )
        .await
        .map(drop)
    }

    /// Sets a terminal's size.
    pub async fn resize(&self, id: &str, rows: u16, columns: u16) -> Result<()> {
        self.ask(
            |serial| Request::Resize {
                serial,
                id: id.into(),
                rows,
                columns,
            },
            None,
        )
        .await
        .map(drop)
    }

    /// Says that an exit has been recorded, or that nothing of this id will ever run.
    pub async fn forget(&self, id: &str) -> Result<()> {
        self.tell(&Request::Forget { id: id.into() }, None).await
    }

    /// Ends the keeper, if it holds nothing.
    async fn quit(&self) -> Result<()> {
        self.tell(&Request::Quit, None).await
    }
}

fn spawned(reply: Reply) -> Result<ProcessKey> {
    match reply {
        Reply::Spawned { process, .. } => Ok(process),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(reply: &Reply) -> Error {
    Error::Keeper(format!("an unexpected answer: {reply:?}"))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

async fn listen(
    socket: Arc<AsyncFd<OwnedFd>>,
    mut buffer: Vec<u8>,
    pending: Arc<Mutex<HashMap<u64, oneshot::Sender<Reply>>>>,
    notices: mpsc::UnboundedSender<Notice>,
    lost: Arc<AtomicBool>,
) {
    loop {
        let reply = match receive(&socket, &mut buffer).await {
            Ok(reply) => reply,
            Err(error) => {
                tracing::error!(%error, "the keeper's connection is lost");
                lost.store(true, Ordering::Relaxed);
                lock(&pending).clear();
                let _ = notices.send(Notice::Lost);
                return;
            }
        };
        let serial = match &reply {
            Reply::Spawned { serial, .. }
            | Reply::Attached { serial, .. }
            | Reply::Done { serial }
            | Reply::Failed { serial, .. } => *serial,
            Reply::Exited { .. } | Reply::Detached { .. } => {
                let notice = match reply {
                    Reply::Exited { id, exit } => Notice::Exited { id, exit },
                    Reply::Detached { id } => Notice::Detached { id },
                    _ => continue,
                };
                if notices.send(notice).is_err() {
                    return;
                }
                continue;
            }
            Reply::Hello { .. } | Reply::Process(_) | Reply::Ready => continue,
        };
        if let Some(sender) = lock(&pending).remove(&serial) {
            let _ = sender.send(reply);
        }
    }
}

async fn send(
    socket: &AsyncFd<OwnedFd>,
    bytes: &[u8],
    fds: &[std::os::fd::BorrowedFd<'_>],
) -> Result<(), ProtocolError> {
    loop {
        let mut guard = socket.writable().await?;
        match guard.try_io(|inner| match protocol::send(inner.get_ref(), bytes, fds) {
            Err(ProtocolError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(error)
            }
            other => Ok(other),
        }) {
            Ok(result) => return result?,
            Err(_would_block) => {}
        }
    }
}

async fn receive(socket: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> Result<Reply, ProtocolError> {
    loop {
        let mut guard = socket.readable().await?;
        match guard.try_io(|inner| match protocol::receive(inner.get_ref(), buffer) {
            Err(ProtocolError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(error)
            }
            Err(other) => Ok(Err(other)),
            Ok((bytes, _fds)) => Ok(protocol::decode(bytes)),
        }) {
            Ok(result) => return result?,
            Err(_would_block) => {}
        }
    }
}

fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}
