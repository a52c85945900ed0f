//! The host goes down.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::Engine;
use crate::container::create::blocking;
use crate::container::record::{Container, Phase};
use crate::container::signal;

/// The longest a container is waited for, whatever it asks: an init system waits 90 s for the daemon (systemd.service(5),
/// `TimeoutStopSec`).
const LONGEST: Duration = Duration::from_secs(60);

impl Engine {
    /// From here on what ends does so with the host: it is not cleaned up after, and no policy starts it again.
    pub fn note_host_stop(&self) {
        self.host_stops.store(true, Ordering::SeqCst);
    }

    /// Whether the host goes down.
    pub fn host_goes_down(&self) -> bool {
        self.host_stops.load(Ordering::SeqCst)
    }

    /// Ends all containers as their stop signals and timeouts say. Their records stay as they are, as if the power had gone:
    /// after the boot the restart policies decide. Nothing else can be done with this engine afterwards.
    pub async fn host_stops(self: &Arc<Self>) {
        self.note_host_stop();
        let living: Vec<Arc<Container>> = self
            .inventory
            .all()
            .into_iter()
            .filter(|container| container.phase().lives())
            .collect();
        let ends = living.iter().map(|container| self.end_with_host(container));
        futures_util::future::join_all(ends).await;
    }

    async fn end_with_host(self: &Arc<Self>, container: &Arc<Container>) {
        let record = container.record().clone();
        let (Some(process), Ok(keeper)) = (record.process, self.keeper().await) else {
            return;
        };
        let asked = Some(record.config.stop_signal.as_str()).filter(|name| !name.is_empty());
        let number = asked
            .and_then(|name| signal::number(name).ok())
            .unwrap_or(libc::SIGTERM);
        let timeout = match record.config.stop_timeout {
            Some(seconds) => u64::try_from(seconds).map_or(LONGEST, Duration::from_secs),
            None => self.config.stop_timeout,
        };
        let over = move |patience: Duration| {
            blocking(move || {
                let end = Instant::now() + patience;
                while matches!(process.open(), Ok(Some(_))) {
                    if Instant::now() > end {
                        return Ok(false);
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
                Ok(true)
            })
        };
        let _ = keeper.signal(&container.id, number).await;
        if record.phase == Phase::Paused {
            let _ = self.thaw(container).await;
        }
        if !matches!(over(timeout.min(LONGEST)).await, Ok(true)) {
            let _ = keeper.signal(&container.id, libc::SIGKILL).await;
            let _ = over(Duration::from_secs(10)).await;
        }
        // The keeper ends when nothing is left that it must tell of.
        let _ = keeper.forget(&container.id).await;
    }
}
