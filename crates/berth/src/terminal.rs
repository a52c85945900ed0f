//! The user's terminal: raw mode that is always undone, its size, and the two ends of a container's stream.

use std::io::{self, IsTerminal, Write};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

/// Puts the terminal of standard input into raw mode until dropped.
pub struct RawMode(Option<Termios>);

impl RawMode {
    /// Does nothing where standard input is no terminal.
    pub fn enter() -> io::Result<RawMode> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(RawMode(None));
        }
        let saved = tcgetattr(&stdin)?;
        let mut raw = saved.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(RawMode(Some(saved)))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Some(saved) = &self.0 {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, saved);
        }
    }
}

/// Rows and columns of the terminal on standard output, if it is one.
pub fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdout()).ok()?;
    (size.ws_row > 0).then_some((size.ws_row, size.ws_col))
}

/// Copies a container's output to standard output and error until it ends. `raw` is a terminal's bytes;
/// otherwise each frame has the header `[stream, 0, 0, 0, length: u32 big-endian]`.
pub async fn copy_output(mut from: impl AsyncRead + Unpin, raw: bool) -> io::Result<()> {
    let mut buffer = vec![0u8; 32 * 1024];
    if raw {
        loop {
            let n = from.read(&mut buffer).await?;
            if n == 0 {
                return Ok(());
            }
            let mut out = io::stdout().lock();
            out.write_all(&buffer[..n])?;
            out.flush()?;
        }
    }
    loop {
        let mut header = [0u8; 8];
        match from.read_exact(&mut header).await {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
        let mut left = u32::from_be_bytes([header[4], header[5], header[6], header[7]]) as usize;
        while left > 0 {
            let want = left.min(buffer.len());
            let n = from.read(&mut buffer[..want]).await?;
            if n == 0 {
                return Ok(());
            }
            left -= n;
            if header[0] == 2 || header[0] == 3 {
                io::stderr().lock().write_all(&buffer[..n])?;
            } else {
                let mut out = io::stdout().lock();
                out.write_all(&buffer[..n])?;
                out.flush()?;
            }
        }
    }
}

/// The keys that leave a container running: ctrl-p ctrl-q unless told otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetachKeys(Vec<u8>);

impl DetachKeys {
    /// `ctrl-p,ctrl-q`: letters, or `ctrl-` with a letter or one of `@[\]^_`.
    pub fn parse(text: &str) -> Result<DetachKeys, String> {
        text.split(',')
            .map(|key| match (key.strip_prefix("ctrl-"), key.as_bytes()) {
                (Some(c), _) if c.len() == 1 => {
                    let c = c.as_bytes()[0].to_ascii_uppercase();
                    if (b'@'..=b'_').contains(&c) {
                        Ok(c & 0x1f)
                    } else {
                        Err(())
                    }
                }
                (None, [c]) => Ok(*c),
                _ => Err(()),
            })
            .collect::<Result<Vec<u8>, ()>>()
            .map(DetachKeys)
            .map_err(|()| format!("{text:?} is no key sequence: write keys like ctrl-p,ctrl-q"))
    }
}

impl Default for DetachKeys {
    fn default() -> DetachKeys {
        DetachKeys(vec![16, 17])
    }
}

/// How the input side ended.
#[derive(Debug, PartialEq, Eq)]
pub enum InputEnd {
    Eof,
    Detached,
}

/// Copies standard input to `to` until its end or, on a terminal, the detach keys.
pub async fn copy_input(
    to: &mut (impl tokio::io::AsyncWrite + Unpin),
    keys: Option<&DetachKeys>,
) -> io::Result<InputEnd> {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0u8; 16 * 1024];
    let mut matched = 0;
    loop {
        let n = stdin.read(&mut buffer).await?;
        if n == 0 {
            to.shutdown().await?;
            return Ok(InputEnd::Eof);
        }
        let Some(DetachKeys(keys)) = keys else {
            to.write_all(&buffer[..n]).await?;
            continue;
        };
        let mut out = Vec::with_capacity(n + keys.len());
        for &byte in &buffer[..n] {
            if byte == keys[matched] {
                matched += 1;
                if matched == keys.len() {
                    to.write_all(&out).await?;
                    return Ok(InputEnd::Detached);
                }
                continue;
            }
            // What looked like the sequence was the user's own typing.
            out.extend_from_slice(&keys[..matched]);
            matched = 0;
            if byte == keys[0] {
                matched = 1;
            } else {
                out.push(byte);
            }
        }
        to.write_all(&out).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detach_keys_are_read_as_docker_reads_them() {
        assert_eq!(
            DetachKeys::parse("ctrl-p,ctrl-q"),
            Ok(DetachKeys::default())
        );
        assert_eq!(
            DetachKeys::parse("a,ctrl-["),
            Ok(DetachKeys(vec![b'a', 27]))
        );
        assert!(DetachKeys::parse("ctrl-").is_err());
        assert!(DetachKeys::parse("").is_err());
    }
}
