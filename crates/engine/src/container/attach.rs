//! Attaching to a container's standard streams.

use std::sync::Arc;

use crate::Engine;
use crate::container::record::Phase;
use crate::container::start::detached;
use crate::container::{AttachOptions, AttachStream, LogsOptions};
use crate::error::{Error, Result};

/// Ctrl-P, Ctrl-Q.
const DEFAULT_KEYS: [u8; 2] = [16, 17];

/// Reads `ctrl-p,ctrl-q` or `a,ctrl-x`.
///
/// # Errors
/// [`Error::Invalid`] for what is no key.
pub(crate) fn detach_keys(text: &str) -> Result<Vec<u8>> {
    if text.is_empty() {
        return Ok(DEFAULT_KEYS.to_vec());
    }
    text.split(',')
        .map(|key| {
            let wrong = || Error::Invalid(format!("Invalid detach keys ({text}) provided"));
            match key.as_bytes() {
                [one] => Ok(*one),
                other => match other.strip_prefix(b"ctrl-") {
                    Some([letter @ b'a'..=b'z']) => Ok(letter - b'a' + 1),
                    Some(b"@") => Ok(0),
                    Some([symbol @ b'['..=b'_']) => Ok(symbol - b'@'),
                    _ => Err(wrong()),
                },
            }
        })
        .collect()
}

impl Engine {
    /// Attaches to its standard streams; works before `start` too.
    ///
    /// # Errors
    /// [`Error::Conflict`] where it is paused or restarting.
    pub async fn attach(
        self: &Arc<Self>,
        container: &str,
        options: AttachOptions,
    ) -> Result<AttachStream> {
        let container = self.inventory.find(container)?;
        let keys = detach_keys(&options.detach_keys)?;
        let (phase, tty, open_stdin) = {
            let record = container.record();
            (record.phase, record.config.tty, record.config.open_stdin)
        };
        match phase {
            Phase::Paused => {
                return Err(Error::Conflict(format!(
                    "container {} is paused, unpause the container before attach",
                    container.id
                )));
            }
            Phase::Restarting => {
                return Err(Error::Conflict(format!(
                    "container {} is restarting, wait until the container is running",
                    container.id
                )));
            }
            _ => {}
        }
        let (engine, own) = (self.clone(), container.clone());
        let want = options.clone();
        let (stream, at) = detached(async move {
            let keeper = engine.keeper().await?;
            let keys = if tty { keys } else { Vec::new() };
            if want.stream {
                return keeper
                    .attach(
                        &own.id,
                        want.stdin && open_stdin,
                        want.stdout,
                        want.stderr,
                        keys,
                    )
                    .await;
            }
            // Only what is past: a stream that has ended.
            let (ours, theirs) =
                tokio::net::UnixStream::pair().map_err(Error::io("making a socket pair"))?;
            drop(theirs);
            Ok((ours, base::time::now_rfc3339()))
        })
        .await?;
        let past = if options.logs {
            let (engine, own) = (self.clone(), container.clone());
            let wanted = LogsOptions {
                stdout: options.stdout,
                stderr: options.stderr,
                until: at.parse().ok(),
                ..Default::default()
            };
            crate::container::create::blocking(move || engine.log_until(&own, wanted)).await?
        } else {
            Default::default()
        };
        self.tell(&container, "attach");
        Ok(AttachStream { tty, past, stream })
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// [`Error::Conflict`] where it does not run.
    pub async fn resize(self: &Arc<Self>, container: &str, rows: u16, columns: u16) -> Result<()> {
        let container = self.inventory.find(container)?;
        if !container.phase().lives() {
            return Err(Error::NotRunning(container.id.clone()));
        }
        self.keeper()
            .await?
            .resize(&container.id, rows, columns)
            .await?;
        self.tell_with(
            &container,
            "resize",
            &[("height", rows.to_string()), ("width", columns.to_string())],
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::detach_keys;

    #[test]
    fn keys_are_read_as_the_docker_command_writes_them() {
        assert_eq!(detach_keys("").unwrap(), [16, 17]);
        assert_eq!(detach_keys("a,ctrl-x,ctrl-[").unwrap(), [b'a', 24, 27]);
        assert!(detach_keys("ctrl-").is_err());
        assert!(detach_keys("ab").is_err());
    }
}
