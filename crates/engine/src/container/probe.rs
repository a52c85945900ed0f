//! Whether a path of the host answers at all: a dead NFS or FUSE server lets every look at it wait for ever, and the
//! keeper, which looks at all containers' mounts, must not be the one that waits.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use crate::error::{Error, Result};

/// How long a file system may take to say what a path is.
const PATIENCE: Duration = Duration::from_secs(10);

/// Paths that somebody still waits for: the next to ask is refused at once, instead of waiting beside the first.
static SILENT: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn silent() -> std::sync::MutexGuard<'static, BTreeSet<PathBuf>> {
    SILENT.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refusal(path: &Path) -> Error {
    Error::Room {
        message: format!(
            "the file system of {} does not answer (a network or FUSE mount whose server is gone?)",
            path.display()
        ),
        kind: base::Kind::Conflict,
        fix: Some(format!(
            "bring its server back, or let go of it: umount -l \"$(findmnt -no TARGET -T {})\"",
            path.display()
        )),
    }
}

/// Whether there is something at `path`. Blocks for ten seconds at most.
///
/// # Errors
/// [`Error::Room`] where its file system does not answer.
pub(crate) fn exists(path: &Path) -> Result<bool> {
    look(path, PATIENCE, |path| path.exists())
}

fn look(
    path: &Path,
    patience: Duration,
    ask: impl FnOnce(&Path) -> bool + Send + 'static,
) -> Result<bool> {
    if silent().contains(path) {
        return Err(refusal(path));
    }
    let (sender, receiver) = mpsc::channel();
    let asked = path.to_owned();
    // Not joined: where the file system never answers, the kernel keeps the thread.
    std::thread::Builder::new()
        .name("berth-probe".into())
        .stack_size(64 * 1024)
        .spawn(move || {
            let there = ask(&asked);
            let mut silent = silent();
            if sender.send(there).is_err() {
                silent.remove(&asked);
            }
        })
        .map_err(Error::io("starting a thread"))?;
    match receiver.recv_timeout(patience) {
        Ok(there) => Ok(there),
        Err(_) => {
            // Given up under the lock, so that the answer either is here by now or finds nobody.
            let mut silent = silent();
            if let Ok(there) = receiver.try_recv() {
                return Ok(there);
            }
            silent.insert(path.to_owned());
            drop(receiver);
            Err(refusal(path))
        }
    }
}

/// Where a bind's source is not there: makes it as a folder.
///
/// # Errors
/// Where it cannot be made, or its file system does not answer.
pub(crate) fn exists_or_made(path: &Path) -> Result<()> {
    if exists(path)? {
        return Ok(());
    }
    match std::fs::create_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(Error::Invalid(format!(
            "error while creating mount source path '{}': {error}",
            path.display()
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_does_not_answer_is_refused_and_forgiven_when_it_does() {
        let path = Path::new("/nowhere/that/answers");
        let (release, held) = mpsc::channel::<()>();
        let hang = move |_: &Path| {
            let _ = held.recv();
            true
        };
        let error = look(path, Duration::from_millis(20), hang).unwrap_err();
        assert!(error.to_string().contains("does not answer"), "{error}");
        // While the first waits, the second does not.
        assert!(exists(path).is_err());
        release.send(()).unwrap();
        for _ in 0..500 {
            if let Ok(there) = exists(path) {
                assert!(!there);
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("an answer that came late was not noticed");
    }

    #[test]
    fn what_answers_is_found_or_not() {
        assert!(exists(Path::new("/proc/self")).unwrap());
        assert!(!exists(Path::new("/proc/self/nothing")).unwrap());
    }
}
