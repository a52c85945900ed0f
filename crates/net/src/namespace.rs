//! Network namespaces without names, and the pool of those made ahead.
//!
//! Making a namespace and a veth pair costs more than using them, so a thread keeps a few ready. A namespace lives
//! by its descriptor, so a crash leaves none, and the veth inside goes with it.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::error::{Error, Result};
use crate::netlink::{LinkChange, Netlink};

/// A network namespace that is nobody's yet, with the loopback interface up.
///
/// Give `netns` to the container's first process, and connect networks before it starts. Dropping it with no process
/// inside ends the namespace.
#[derive(Debug)]
pub struct Sandbox {
    pub netns: OwnedFd,
    /// The host's end of the pair whose other end is `eth0` inside.
    pub(crate) veth: Mutex<Option<Prepared>>,
}

#[derive(Debug)]
pub(crate) struct Prepared {
    pub host_name: String,
    pub host_index: u32,
}

impl Sandbox {
    /// The namespace of a living process, for later connects and after the daemon's restart.
    ///
    /// # Errors
    /// Where there is no such process (any more).
    pub fn of_process(pid: i32) -> Result<Sandbox> {
        let file = File::open(format!("/proc/{pid}/ns/net")).map_err(Error::Namespace)?;
        Ok(Sandbox {
            netns: file.into(),
            veth: Mutex::new(None),
        })
    }

    /// A namespace by descriptor.
    pub fn of_fd(netns: OwnedFd) -> Sandbox {
        Sandbox {
            netns,
            veth: Mutex::new(None),
        }
    }
}

/// The namespace of the calling thread. (`/proc/self` would be the main thread's.)
pub(crate) fn current() -> io::Result<OwnedFd> {
    File::open("/proc/thread-self/ns/net").map(OwnedFd::from)
}

/// Moves the calling thread.
pub(crate) fn enter(netns: BorrowedFd<'_>) -> io::Result<()> {
    move_into_link_name_space(netns, Some(LinkNameSpaceType::Network)).map_err(Into::into)
}

/// Runs `work` on a thread of its own inside the namespace. No thread that outlives this call ever is inside.
pub(crate) fn within<T: Send>(
    netns: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    thread::scope(|scope| {
        let inside = thread::Builder::new()
            .name("berth-netns".into())
            .stack_size(128 * 1024)
            .spawn_scoped(scope, move || enter(netns).and_then(|()| work()))?;
        inside
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the namespace thread panicked")))
    })
}

/// A new namespace with loopback up and nothing else. Made on a thread that ends in it, as only the host's root may come
/// back out.
pub(crate) fn alone() -> io::Result<Sandbox> {
    thread::scope(|scope| {
        let maker = thread::Builder::new()
            .name("berth-netns".into())
            .stack_size(128 * 1024)
            .spawn_scoped(scope, || {
                // SAFETY: as in `make`; this thread does nothing else.
                unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
                settle()
            })?;
        maker
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the namespace thread panicked")))
    })
    .map(Sandbox::of_fd)
}

/// Sets up the namespace the calling thread is in.
pub(crate) fn settle() -> io::Result<OwnedFd> {
    let netns = current()?;
    Netlink::open()?.set_link(
        1,
        &LinkChange {
            up: Some(true),
            ..LinkChange::default()
        },
    )?;
    // Interfaces made from now on announce their address, and have IPv6 only where their network has it.
    for (key, value) in [
        ("ipv4/conf/default/arp_notify", "1"),
        ("ipv6/conf/default/ndisc_notify", "1"),
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv6/conf/default/accept_ra", "0"),
        ("ipv6/conf/default/disable_ipv6", "1"),
    ] {
        match fs::write(format!("/proc/sys/net/{key}"), value) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {} // a kernel without IPv6
            Err(error) => return Err(error),
        }
    }
    Ok(netns)
}

/// A new namespace with loopback up; the calling thread is back in `home` afterwards.
fn make(home: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: unsharing the network namespace of this thread invalidates no memory and no descriptor; sockets keep
    // the namespace they were made in.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
    let made = settle();
    enter(home)?;
    made
}

/// The namespaces made ahead.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    size: usize,
    filler: Mutex<Option<thread::JoinHandle<()>>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    home: OwnedFd,
    prefix: String,
}

#[derive(Default)]
struct State {
    ready: VecDeque<Sandbox>,
    closing: bool,
    /// A failure is not tried again before the next taker.
    failed: bool,
}

impl Pool {
    /// Keeps `size` ready. `prefix` begins the names of the host's veth ends.
    pub(crate) fn open(prefix: String, size: usize) -> Result<Pool> {
        let home = current().map_err(Error::Namespace)?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            home,
            prefix,
        });
        let pool = Pool {
            shared,
            size,
            filler: Mutex::new(None),
        };
        if size > 0 {
            let shared = Arc::clone(&pool.shared);
            let filler = thread::Builder::new()
                .name("berth-net-pool".into())
                .stack_size(256 * 1024)
                .spawn(move || fill(&shared, size))
                .map_err(Error::Namespace)?;
            *pool.filler.lock().unwrap_or_else(PoisonError::into_inner) = Some(filler);
        }
        Ok(pool)
    }

    /// One from the pool, or a fresh one where it is empty.
    pub(crate) fn take(&self) -> Result<Sandbox> {
        let taken = {
            let mut state = self
                .shared
                .state
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            state.failed = false;
            state.ready.pop_front()
        };
        self.shared.changed.notify_all();
        match taken {
            Some(sandbox) => Ok(sandbox),
            // A thread of its own: the caller's must not be seen in another namespace even for a moment.
            None => thread::scope(|scope| {
                let maker = thread::Builder::new()
                    .name("berth-netns".into())
                    .spawn_scoped(scope, || {
                        enter(self.shared.home.as_fd())?;
                        prepare(&self.shared)
                    })?;
                maker
                    .join()
                    .unwrap_or_else(|_| Err(io::Error::other("the namespace thread panicked")))
            })
            .map_err(Error::Namespace),
        }
    }

    /// Waits until the pool is full (tests and benchmarks).
    pub(crate) fn wait_full(&self) {
        let mut state = self
            .shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        while state.ready.len() < self.size && !state.failed && !state.closing {
            state = self
                .shared
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends the filler and all that are ready.
    pub(crate) fn close(&self) {
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .closing = true;
        self.shared.changed.notify_all();
        let filler = self
            .filler
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(filler) = filler {
            let _ = filler.join();
        }
        let ready: Vec<_> = {
            let mut state = self
                .shared
                .state
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            state.ready.drain(..).collect()
        };
        let _ = within(self.shared.home.as_fd(), || {
            let mut netlink = Netlink::open()?;
            for sandbox in ready {
                if let Some(veth) = sandbox
                    .veth
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .take()
                {
                    let _ = netlink.remove_link(&veth.host_name);
                }
            }
            Ok(())
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.close();
    }
}

fn prepare(shared: &Shared) -> io::Result<Sandbox> {
    let netns = make(shared.home.as_fd())?;
    let mut netlink = Netlink::open()?;
    let host_name = random_name(&shared.prefix);
    netlink.add_veth(&host_name, "eth0", netns.as_fd())?;
    let host_index = netlink
        .link(&host_name)?
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the new veth is gone"))?
        .index;
    // The host's end has no address of its own, not even a link-local one.
    let _ = fs::write(
        format!("/proc/sys/net/ipv6/conf/{host_name}/disable_ipv6"),
        "1",
    );
    Ok(Sandbox {
        netns,
        veth: Mutex::new(Some(Prepared {
            host_name,
            host_index,
        })),
    })
}

fn fill(shared: &Shared, size: usize) {
    loop {
        {
            let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
            while !state.closing && (state.failed || state.ready.len() >= size) {
                state = shared
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            if state.closing {
                return;
            }
        }
        let made = prepare(shared);
        let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        match made {
            Ok(sandbox) => state.ready.push_back(sandbox),
            Err(error) => {
                tracing::warn!(%error, "no network namespace could be made ahead");
                state.failed = true;
            }
        }
        drop(state);
        shared.changed.notify_all();
    }
}

/// `prefix` and eight random hexadecimal digits.
pub(crate) fn random_name(prefix: &str) -> String {
    let mut bytes = [0u8; 4];
    getrandom::fill(&mut bytes).expect("the kernel's random source answers");
    format!("{prefix}{:08x}", u32::from_ne_bytes(bytes))
}
