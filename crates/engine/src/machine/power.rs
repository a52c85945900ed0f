//! Ending guests: the power button, and what follows where nobody hears it. The host goes down.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base::pidfd::ProcessKey;
use vmm::process::protocol::Request;

use super::process::ask;
use super::{Machines, Slot};

/// How long a process has to end by itself once told to.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two presses of the power button.
const PRESS_AGAIN: Duration = Duration::from_secs(3);
/// How long the process of a machine has to end once it is killed while the host goes down.
const LAST_PATIENCE: Duration = Duration::from_secs(10);

/// Asks the guest of a folder to power off: whether it was over within `timeout`.
pub fn power_off(folder: &Path, timeout: Duration, over: impl Fn() -> bool) -> bool {
    let end = Instant::now() + timeout;
    // One that does not answer will not hear its button either.
    let hears = ask(folder, &Request::Resume).is_ok();
    // A guest that is still booting does not hear the button: it is pressed again.
    let mut next_press = Instant::now();
    while hears && Instant::now() < end {
        if over() {
            return true;
        }
        if Instant::now() >= next_press {
            if ask(folder, &Request::PowerButton).is_err() {
                break;
            }
            next_press = Instant::now() + PRESS_AGAIN;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    // It may be ending at this moment.
    over()
}

/// Ends the process of a folder by a word and then by force: whether it was over before that was hopeless.
pub fn end_process(
    folder: &Path,
    key: ProcessKey,
    hopeless: Duration,
    over: impl Fn() -> bool,
) -> bool {
    let asked = ask(folder, &Request::Kill).is_ok_and(|answer| answer.ok);
    let begun = Instant::now();
    let patience = if asked { PATIENCE } else { Duration::ZERO };
    while !over() {
        if begun.elapsed() > hopeless {
            return false;
        }
        if begun.elapsed() > patience
            && let Ok(Some(pidfd)) = key.open()
        {
            let _ = pidfd.signal(libc::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

impl Machines {
    /// Shuts all guests down, side by side, and ends those that take longer than the configuration allows. Their records keep
    /// that they ran: after the boot the restart policies decide. The engine must know that the host goes down.
    pub fn host_stops(self: &Arc<Machines>) {
        let ends: Vec<_> = self
            .all()
            .into_iter()
            .filter_map(|slot| {
                let machines = self.clone();
                let key = self.note_host_stop(&slot)?;
                std::thread::Builder::new()
                    .name("machine-down".into())
                    .spawn(move || machines.end_with_host(&slot, key))
                    .ok()
            })
            .collect();
        for end in ends {
            let _ = end.join();
        }
    }

    /// Records that the host ends the machine; its process, where it runs.
    fn note_host_stop(&self, slot: &Slot) -> Option<ProcessKey> {
        let mut machine = slot.lock();
        let run = machine.run.as_mut()?;
        run.host_went_down = true;
        let key = run.process;
        if let Err(error) = self.save(slot, &machine) {
            tracing::warn!(%error, machine = machine.spec.name, "that the host ends it is not recorded");
        }
        Some(key)
    }

    fn end_with_host(&self, slot: &Slot, key: ProcessKey) {
        let name = slot.lock().spec.name.clone();
        let over = || !matches!(key.open(), Ok(Some(_)));
        let timeout = self.engine.config().machine_stop_timeout;
        if power_off(&slot.folder, timeout, over) {
            tracing::info!(machine = name, "powered off, since the host goes down");
            return;
        }
        tracing::warn!(
            machine = name,
            "it did not power off within {} s and is ended",
            timeout.as_secs()
        );
        if !end_process(&slot.folder, key, LAST_PATIENCE, over) {
            tracing::error!(machine = name, "its process does not end");
        }
    }
}
