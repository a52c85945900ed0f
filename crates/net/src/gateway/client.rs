//! The daemon's side of the gateway.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::protocol::{Reply, Request, VERSION, receive, send, socket_path};
use crate::endpoint::Protocol;
use crate::error::{Error, Result};
use crate::manager::lock;
use crate::namespace::within;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two attempts to start a gateway.
const PAUSE: Duration = Duration::from_secs(5);

thread_local! {
    /// Whether the calling thread is in the networks' namespace.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// The daemon's hold of its gateway, and so of the namespace its networks are in.
pub struct Gateway {
    run: PathBuf,
    command: Vec<PathBuf>,
    netns: OwnedFd,
    /// Also held while a request is answered.
    connection: Mutex<Connection>,
    /// What a new gateway must be told again: where on the host, and where it leads.
    published: Mutex<BTreeMap<(Protocol, SocketAddr), SocketAddr>>,
    stop: OwnedFd,
}

struct Connection {
    socket: Arc<OwnedFd>,
    pid: i32,
}

impl std::fmt::Debug for Gateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gateway")
            .field("run", &self.run)
            .finish_non_exhaustive()
    }
}

impl Gateway {
    /// Connects to the gateway of a run folder, or starts one with `command` (a program and its first arguments) where none
    /// lives, or one of other namespaces than the caller's.
    ///
    /// # Errors
    /// Where the host allows no such networks.
    pub fn open(run: &Path, command: &[PathBuf]) -> Result<Arc<Gateway>> {
        let refused = |source| Error::Gateway(source);
        let mut found = connect(run).and_then(|socket| hello(socket, None)).ok();
        if let Some((connection, version, netns)) = &found {
            // One that was left by a daemon of another user namespace, or of another version.
            let ours = within(netns.as_fd(), || Ok(())).is_ok();
            if !ours || *version != VERSION {
                let netns = found.take().filter(|_| ours).map(|(connection, _, netns)| {
                    let _ = send(connection.socket.as_fd(), &Request::End, None);
                    netns
                });
                let made = start(run, command, netns.as_ref().map(AsFd::as_fd));
                found = Some(made.map_err(refused)?);
            } else {
                tracing::info!(pid = connection.pid, "found the networks' gateway again");
            }
        }
        let (connection, _, netns) = match found {
            Some(found) => found,
            None => start(run, command, None).map_err(refused)?,
        };
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Arc::new(Gateway {
            run: run.to_owned(),
            command: command.to_vec(),
            netns,
            connection: Mutex::new(connection),
            published: Mutex::default(),
            stop: eventfd(0, flags).map_err(|errno| refused(errno.into()))?,
        }))
    }

    /// The gateway's process, which keeps the namespaces it was started in.
    pub fn pid(&self) -> i32 {
        lock(&self.connection).pid
    }

    /// Starts another gateway where this one dies, from now on; `changed` gets its process.
    ///
    /// # Errors
    /// Where there can be no thread for it.
    pub fn supervise(
        self: &Arc<Gateway>,
        changed: impl Fn(i32) + Send + 'static,
    ) -> io::Result<()> {
        let stop = self.stop.try_clone()?;
        let gateway = Arc::downgrade(self);
        thread::Builder::new()
            .name("berth-gateway".into())
            .stack_size(256 * 1024)
            .spawn(move || watch(&gateway, &stop, &changed))?;
        Ok(())
    }

    /// Runs `work` in the networks' namespace, on a thread of its own unless the caller's is there.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        if INSIDE.get() {
            return work();
        }
        within(self.netns.as_fd(), || {
            INSIDE.set(true);
            Ok(work())
        })
        .map_err(Error::Namespace)?
    }

    /// Listens at `address` on the host for `target` in the namespace; the port, which may have been 0.
    pub(crate) fn publish(
        self: &Arc<Gateway>,
        protocol: Protocol,
        address: SocketAddr,
        target: SocketAddr,
    ) -> io::Result<(u16, Published)> {
        let request = Request::Publish {
            protocol,
            address,
            target,
        };
        let port = match self.ask(&request)? {
            Reply::Published { port } => port,
            other => return Err(unexpected(&other)),
        };
        let address = SocketAddr::new(address.ip(), port);
        lock(&self.published).insert((protocol, address), target);
        let published = Published {
            gateway: Arc::clone(self),
            protocol,
            address,
        };
        Ok((port, published))
    }

    /// Ends what a former daemon published and this one did not.
    pub(crate) fn settle(&self) -> io::Result<()> {
        self.ask(&Request::Settle).map(drop)
    }

    fn ask(&self, request: &Request) -> io::Result<Reply> {
        let mut connection = lock(&self.connection);
        match exchange(&connection.socket, request) {
            Err(error) if is_lost(&error) => {
                self.restart(&mut connection)?;
                exchange(&connection.socket, request)
            }
            other => other,
        }
    }

    /// Starts another gateway for the same namespace, with all that was published.
    fn restart(&self, connection: &mut Connection) -> io::Result<()> {
        let (made, _, _) = start(&self.run, &self.command, Some(self.netns.as_fd()))?;
        *connection = made;
        tracing::warn!(
            pid = connection.pid,
            "the networks' gateway died and was started anew: connections to the outside were lost"
        );
        let published = lock(&self.published).clone();
        for ((protocol, address), target) in published {
            let request = Request::Publish {
                protocol,
                address,
                target,
            };
            if let Err(error) = exchange(&connection.socket, &request) {
                tracing::error!(%error, %address, "a published port is lost");
            }
        }
        Ok(())
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }
}

/// A port of the host that is ours while this lives.
pub(crate) struct Published {
    gateway: Arc<Gateway>,
    protocol: Protocol,
    address: SocketAddr,
}

impl Drop for Published {
    fn drop(&mut self) {
        let (protocol, address) = (self.protocol, self.address);
        lock(&self.gateway.published).remove(&(protocol, address));
        if let Err(error) = self.gateway.ask(&Request::Withdraw { protocol, address }) {
            tracing::warn!(%error, %address, "a port could not be taken back");
        }
    }
}

fn watch(gateway: &Weak<Gateway>, stop: &OwnedFd, changed: &dyn Fn(i32)) {
    loop {
        let Some(socket) = gateway
            .upgrade()
            .map(|g| Arc::clone(&lock(&g.connection).socket))
        else {
            return;
        };
        // Answers are the askers'; an end is ours.
        let mut fds = [
            PollFd::new(stop, PollFlags::IN),
            PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::RDHUP),
        ];
        if poll(&mut fds, None).is_err_and(|error| error != rustix::io::Errno::INTR) {
            return;
        }
        if !fds[0].revents().is_empty() {
            return;
        }
        if fds[1].revents().is_empty() {
            continue;
        }
        let Some(gateway) = gateway.upgrade() else {
            return;
        };
        let mut connection = lock(&gateway.connection);
        // An asker may have found it first.
        let restarted = if Arc::ptr_eq(&connection.socket, &socket) {
            gateway.restart(&mut connection)
        } else {
            Ok(())
        };
        let pid = connection.pid;
        drop(connection);
        match restarted {
            Ok(()) => changed(pid),
            Err(error) => {
                tracing::error!(%error, "networks have no way out: their gateway cannot be started");
                thread::sleep(PAUSE);
            }
        }
    }
}

fn connect(run: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(socket_path(run))?)?;
    Ok(socket)
}

fn hello(socket: OwnedFd, netns: Option<BorrowedFd<'_>>) -> io::Result<(Connection, u32, OwnedFd)> {
    send(socket.as_fd(), &Request::Hello, netns)?;
    match receive::<Reply>(socket.as_fd())? {
        (Reply::Hello { version, pid }, Some(netns)) => {
            let socket = Arc::new(socket);
            Ok((Connection { socket, pid }, version, netns))
        }
        (other, _) => Err(unexpected(&other)),
    }
}

fn exchange(socket: &OwnedFd, request: &Request) -> io::Result<Reply> {
    send(socket.as_fd(), request, None)?;
    match receive::<Reply>(socket.as_fd())?.0 {
        failed @ Reply::Failed { .. } => Err(unexpected(&failed)),
        reply => Ok(reply),
    }
}

/// Whether the gateway is gone, as opposed to one that refused.
fn is_lost(error: &io::Error) -> bool {
    // An answer that is late would be taken for that of the next request.
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    ) || matches!(error.raw_os_error(), Some(libc::EPIPE | libc::ECONNRESET))
}

fn unexpected(reply: &Reply) -> io::Error {
    match reply {
        Reply::Failed {
            errno: Some(errno), ..
        } => io::Error::from_raw_os_error(*errno),
        Reply::Failed { message, .. } => io::Error::other(message.clone()),
        other => io::Error::other(format!("an unexpected answer of the gateway: {other:?}")),
    }
}

/// Starts a gateway and says what namespace to serve.
fn start(
    run: &Path,
    command: &[PathBuf],
    netns: Option<BorrowedFd<'_>>,
) -> io::Result<(Connection, u32, OwnedFd)> {
    base::companion::start("gateway", run, &socket_path(run), command)?;
    hello(connect(run)?, netns)
}
