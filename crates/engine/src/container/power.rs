//! The host goes down.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use base::pidfd::ProcessKey;

use crate::Engine;
use crate::container::memory::watched;
use crate::container::record::{Container, Phase};

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
        let (number, patience) = self.stop_terms(&record, None);
        let patience = patience.map_or(LONGEST, |patience| patience.min(LONGEST));
        let _ = keeper.signal(&container.id, number).await;
        if record.phase == Phase::Paused {
            let _ = self.thaw(container).await;
        }
        if tokio::time::timeout(patience, gone(process)).await.is_err() {
            let _ = keeper.signal(&container.id, libc::SIGKILL).await;
            let _ = tokio::time::timeout(Duration::from_secs(10), gone(process)).await;
        }
        // The keeper ends when nothing is left that it must tell of.
        let _ = keeper.forget(&container.id).await;
    }
}

/// Waits until a process is gone and its parent, the keeper, has taken its end.
async fn gone(process: ProcessKey) {
    while let Ok(Some(opened)) = process.open() {
        // A pidfd is readable as soon as its process has ended (pidfd_open(2)).
        if let Ok(end) = watched(opened.into()) {
            let _ = end.readable().await;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
