//! Noticing that the kernel killed something of a container for want of memory, when it happens.
//!
//! cgroups v2: `memory.events` changes, which inotify tells. v1: an eventfd that is registered for `memory.oom_control`
//! (Documentation/admin-guide/cgroup-v1/memory.rst, section 10). Both only say "look": the counter says what happened.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::inotify;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::Engine;
use crate::container::record::Container;

/// How long after the kernel's word its counter may take to rise.
const LOOKS: u32 = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

struct Watch {
    /// The file with the counter `oom_kill`.
    file: PathBuf,
    signal: AsyncFd<OwnedFd>,
}

/// A descriptor that the reactor tells to be readable.
pub(super) fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by what is made here and closed only with it, so it stays the one registered.
    let watched = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
    Ok(watched?)
}

impl Watch {
    fn open(group: &str) -> io::Result<Watch> {
        let unified = Path::new("/sys/fs/cgroup")
            .join(group)
            .join("memory.events");
        if unified.exists() {
            let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
            inotify::add_watch(&fd, &unified, inotify::WatchFlags::MODIFY)?;
            return Ok(Watch {
                file: unified,
                signal: watched(fd)?,
            });
        }
        let folder = Path::new("/sys/fs/cgroup/memory").join(group);
        let file = folder.join("memory.oom_control");
        let control = std::fs::File::open(&file)?;
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        std::fs::write(
            folder.join("cgroup.event_control"),
            format!("{} {}", fd.as_raw_fd(), control.as_fd().as_raw_fd()),
        )?;
        Ok(Watch {
            file,
            signal: watched(fd)?,
        })
    }

    /// How often the kernel has killed in this group; `None` where the group is gone.
    fn kills(&self) -> Option<u64> {
        let text = std::fs::read_to_string(&self.file).ok()?;
        text.lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(name, _)| *name == "oom_kill")
            .and_then(|(_, count)| count.trim().parse().ok())
    }

    async fn signalled(&self) -> io::Result<()> {
        loop {
            let mut guard = self.signal.readable().await?;
            let mut buffer = [0u8; 256];
            let read = guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut buffer)?));
            if let Ok(result) = read {
                return result.map(drop);
            }
        }
    }
}

impl Engine {
    /// Tells `oom` as it happens, of a container that has a limit and has just started or been found again.
    pub(crate) fn watch_memory(self: &Arc<Self>, container: &Arc<Container>) {
        let record = container.record().clone();
        if record.host.resources.memory <= 0 {
            return;
        }
        let watch = match Watch::open(&self.cgroup_of(&record)) {
            Ok(watch) => watch,
            Err(error) => {
                tracing::debug!(container = container.id, %error, "want of memory is noticed only at its end");
                return;
            }
        };
        let (engine, own) = (self.clone(), container.clone());
        let task = tokio::spawn(async move {
            let mut known = if own.record().oom_killed {
                watch.kills().unwrap_or(0)
            } else {
                0
            };
            loop {
                for _ in 0..LOOKS {
                    let Some(count) = watch.kills() else { return };
                    if count > known {
                        known = count;
                        own.note(|record| record.oom_killed = true);
                        engine.tell(&own, "oom");
                        break;
                    }
                    tokio::time::sleep(BETWEEN_LOOKS).await;
                }
                if watch.signalled().await.is_err() {
                    return;
                }
            }
        });
        container.add_task(task.abort_handle());
    }
}
