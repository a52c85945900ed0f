//! The gateway's process: `berth gateway`.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;

use base::Kind;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SocketFlags, accept_with};

use super::protocol::{Reply, Request, VERSION, receive, send};
use super::world::World;
use crate::endpoint::Protocol;
use crate::proxy::{Proxy, bound_port, listen, start};
use crate::user::UserNet;

/// How often it looks whether it is needed, while no daemon is there.
const LOOK: Duration = Duration::from_secs(1);
/// How long the first daemon may take to ask.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs the gateway until no daemon is connected and nothing has an interface in its namespace: `berth gateway`, with the
/// listening socket as descriptor 0. Call it before anything else runs in the process.
///
/// With `--probe` it only says whether this host lets the calling user have such networks.
///
/// It answers twice: the process it was started as ends at once, so that its parent has nothing to reap.
pub fn main(args: impl IntoIterator<Item = String>) -> ExitCode {
    if let Some(other) = args.into_iter().next() {
        if other == "--probe" {
            return match super::world::probe() {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("berth gateway: {error}");
                    ExitCode::from(Kind::Unsupported.exit_code())
                }
            };
        }
        eprintln!(
            "berth gateway: {other:?} is not understood; the daemon starts the gateway itself"
        );
        return ExitCode::from(Kind::Invalid.exit_code());
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("berth gateway: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    let listener = base::companion::take_listener("gateway")?;
    // SAFETY: this process has one thread.
    if !unsafe { base::companion::detach(c"berth-gateway") }? {
        return Ok(());
    }
    // What is sent to the daemon's group is not meant for what outlives it.
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM] {
        // SAFETY: a signal is ignored; no handler runs.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    rustix::io::ioctl_fionbio(&listener, true)?;
    let Some((daemon, world)) = first(&listener)? else {
        return Ok(());
    };
    base::privileges::drop_all()?;
    serve(&listener, daemon, world)
}

/// The first daemon, which says what namespace to serve; `None` where it went away.
fn first(listener: &OwnedFd) -> io::Result<Option<(OwnedFd, World)>> {
    if !readable(listener, PATIENCE)? {
        return Ok(None);
    }
    let daemon = accept_with(listener, SocketFlags::CLOEXEC)?;
    let (request, netns) = match receive::<Request>(daemon.as_fd()) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    };
    if !matches!(request, Request::Hello) {
        return Ok(None);
    }
    match World::lay(netns) {
        Ok(world) => {
            greet(&daemon, &world)?;
            Ok(Some((daemon, world)))
        }
        Err(error) => {
            send(daemon.as_fd(), &failed(&error), None)?;
            Ok(None)
        }
    }
}

fn greet(daemon: &OwnedFd, world: &World) -> io::Result<()> {
    let hello = Reply::Hello {
        version: VERSION,
        pid: rustix::process::getpid().as_raw_nonzero().get(),
    };
    send(daemon.as_fd(), &hello, Some(world.netns.as_fd()))
}

fn failed(error: &io::Error) -> Reply {
    Reply::Failed {
        errno: error.raw_os_error(),
        message: error.to_string(),
    }
}

/// Waits until there is something to read; false where the time passed first.
fn readable(fd: &OwnedFd, patience: Duration) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    let timeout = Timespec {
        tv_sec: patience.as_secs().cast_signed(),
        tv_nsec: patience.subsec_nanos().into(),
    };
    match poll(&mut fds, Some(&timeout)) {
        Ok(count) => Ok(count > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// A published port.
struct Published {
    target: SocketAddr,
    /// The daemon that is there asked for it.
    wanted: bool,
    _proxy: Proxy,
}

struct Server {
    world: World,
    /// By where it is on the host.
    published: HashMap<(Protocol, SocketAddr), Published>,
}

fn serve(listener: &OwnedFd, daemon: OwnedFd, world: World) -> io::Result<()> {
    let link = world.link.try_clone()?;
    // Its sockets are the host's: this thread has never left there.
    let network = UserNet::spawn(link, world.config.clone()).map_err(io::Error::other)?;
    std::thread::Builder::new()
        .stack_size(128 * 1024)
        .spawn(move || {
            network.wait();
            eprintln!("berth gateway: the user-mode network ended");
            // The daemon starts another.
            std::process::exit(1);
        })?;
    let mut server = Server {
        world,
        published: HashMap::new(),
    };
    let mut daemon = Some(daemon);
    loop {
        match &daemon {
            Some(socket) => match receive::<Request>(socket.as_fd()) {
                Ok((Request::End, _)) => return Ok(()),
                Ok((request, _)) => {
                    if server.answer(socket, request).is_err() {
                        daemon = None;
                    }
                }
                Err(_) => daemon = None,
            },
            None => {
                if readable(listener, LOOK)? {
                    if let Ok(socket) = accept_with(listener, SocketFlags::CLOEXEC) {
                        server.published.values_mut().for_each(|p| p.wanted = false);
                        daemon = Some(socket);
                    }
                } else if !server.world.is_used() {
                    return Ok(());
                }
            }
        }
    }
}

impl Server {
    fn answer(&mut self, daemon: &OwnedFd, request: Request) -> io::Result<()> {
        let reply = match request {
            Request::Hello => return greet(daemon, &self.world),
            Request::Publish {
                protocol,
                address,
                target,
            } => match self.publish(protocol, address, target) {
                Ok(port) => Reply::Published { port },
                Err(error) => failed(&error),
            },
            Request::Withdraw { protocol, address } => {
                self.published.remove(&(protocol, address));
                Reply::Done
            }
            Request::Settle => {
                self.published.retain(|_, published| published.wanted);
                Reply::Done
            }
            Request::End => Reply::Done,
        };
        send(daemon.as_fd(), &reply, None)
    }

    fn publish(
        &mut self,
        protocol: Protocol,
        address: SocketAddr,
        target: SocketAddr,
    ) -> io::Result<u16> {
        if protocol == Protocol::Sctp {
            return Err(io::ErrorKind::Unsupported.into());
        }
        if let Some(published) = self.published.get_mut(&(protocol, address)) {
            if published.target == target {
                published.wanted = true;
                return Ok(address.port());
            }
            if published.wanted {
                return Err(io::Error::from_raw_os_error(libc::EADDRINUSE));
            }
            // What a container had that is gone.
            self.published.remove(&(protocol, address));
        }
        let socket = listen(address, protocol)?;
        let port = bound_port(&socket)?;
        let proxy = start(&self.world.inside, socket, protocol, target)?;
        let published = Published {
            target,
            wanted: true,
            _proxy: proxy,
        };
        let address = SocketAddr::new(address.ip(), port);
        self.published.insert((protocol, address), published);
        Ok(port)
    }
}
