//! The old hijack, for clients that take a connection over without saying `Upgrade`.
//!
//! Docker's attach and exec turn an HTTP connection into a raw stream. Today's clients ask with
//! `Upgrade: tcp` and get `101 UPGRADED`; older ones (and shell scripts with socat) just post and expect
//! `200 OK` followed by raw bytes until the connection closes. HTTP libraries know only the first way, so this
//! wrapper around the socket turns the second into it: it looks at the head of a connection's first request,
//! and if it is a hijack without `Upgrade`, adds the header on the way in and restores the 200 on the way out.
//!
//! ```text
//! client                         Sniffed                              hyper
//!   POST …/attach HTTP/1.1  ──▶  + Connection: Upgrade, Upgrade: tcp ──▶
//!   raw stdin, half-close   ──▶  held back until the head is answered
//!   HTTP/1.1 200 OK         ◀──  rewritten                           ◀── HTTP/1.1 101 UPGRADED
//! ```
//!
//! Holding the bytes back also lets a client send its whole stdin and half-close before it reads the answer,
//! which hyper would take for a client that went away.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Longest request head that is looked at; hyper itself refuses heads well below its own limit after that.
const LONGEST_HEAD: usize = 64 * 1024;

/// A socket whose first request is looked at.
#[derive(Debug)]
pub struct Sniffed<S> {
    socket: S,
    input: Input,
    output: Output,
    /// Woken when the answer's head is out and held-back input may flow.
    reader: Option<Waker>,
}

#[derive(Debug)]
enum Input {
    /// The head of the first request is not complete.
    Head(BytesMut),
    /// Bytes already read, to be given to hyper; then all the rest.
    Replay(BytesMut),
    /// A hijack: `now` belongs to the request, what follows to the stream, after the answer.
    Hijack {
        now: BytesMut,
        body_left: usize,
        after: BytesMut,
    },
    Pass,
}

#[derive(Debug)]
enum Output {
    Pass,
    /// The head of the answer to a hijack; `legacy` wants its 101 turned into a 200.
    Head {
        seen: BytesMut,
        legacy: bool,
    },
    /// A head that was looked at, on its way out.
    Drain(BytesMut),
}

/// What the head of a first request asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Head {
    /// More bytes are needed.
    Incomplete,
    /// Any request but a hijack.
    Ordinary,
    /// Attach or exec start; its head is `length` bytes long, its body `body`.
    Hijack {
        length: usize,
        body: usize,
        upgrade: bool,
    },
}

/// Reads the head of a request (RFC 9112) just far enough to know a hijack.
pub fn read_head(bytes: &[u8]) -> Head {
    const METHOD: &[u8] = b"POST ";
    let seen = bytes.len().min(METHOD.len());
    if bytes[..seen] != METHOD[..seen] {
        return Head::Ordinary;
    }
    let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else {
        return if bytes.len() > LONGEST_HEAD {
            Head::Ordinary
        } else {
            Head::Incomplete
        };
    };
    let Ok(text) = std::str::from_utf8(&bytes[..end]) else {
        return Head::Ordinary;
    };
    let mut lines = text.split("\r\n");
    let mut request = lines.next().unwrap_or_default().split(' ');
    let path = request.nth(1).unwrap_or_default();
    let path = path.split(['?', '#']).next().unwrap_or_default();
    if request.next() != Some("HTTP/1.1") || !is_hijack(path) {
        return Head::Ordinary;
    }
    let (mut body, mut upgrade) = (0, false);
    for line in lines {
        let Some((name, value)) = line.split_once(':') else {
            return Head::Ordinary;
        };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => match value.trim().parse::<usize>() {
                Ok(length) if length <= 1 << 20 => body = length,
                _ => return Head::Ordinary,
            },
            // The length of a chunked body is unknown here, so nothing can be held back.
            "transfer-encoding" => return Head::Ordinary,
            "upgrade" => upgrade = true,
            _ => {}
        }
    }
    Head::Hijack {
        length: end + 4,
        body,
        upgrade,
    }
}

fn is_hijack(path: &str) -> bool {
    let mut parts = path.trim_start_matches('/').split('/').peekable();
    if parts
        .peek()
        .is_some_and(|p| p.starts_with('v') && p[1..].starts_with(|c: char| c.is_ascii_digit()))
    {
        parts.next();
    }
    let parts: Vec<&str> = parts.collect();
    matches!(
        parts[..],
        ["containers", _, "attach"] | ["exec", _, "start"]
    )
}

impl<S> Sniffed<S> {
    /// Wraps a fresh connection.
    pub fn new(socket: S) -> Sniffed<S> {
        Sniffed {
            socket,
            input: Input::Head(BytesMut::new()),
            output: Output::Pass,
            reader: None,
        }
    }

    fn head_done(&mut self, mut seen: BytesMut, at_end: bool) -> bool {
        match read_head(&seen) {
            Head::Incomplete if !at_end => {
                self.input = Input::Head(seen);
                return false;
            }
            Head::Incomplete | Head::Ordinary => self.input = Input::Replay(seen),
            Head::Hijack {
                length,
                body,
                upgrade,
            } => {
                let mut rest = seen.split_off(length);
                let mut now = seen;
                if !upgrade {
                    now.truncate(length - 2);
                    now.extend_from_slice(b"Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n");
                }
                let inside = rest.len().min(body);
                now.extend_from_slice(&rest.split_to(inside));
                self.input = Input::Hijack {
                    now,
                    body_left: body - inside,
                    after: rest,
                };
                self.output = Output::Head {
                    seen: BytesMut::new(),
                    legacy: !upgrade,
                };
            }
        }
        true
    }
}

fn give(from: &mut BytesMut, to: &mut ReadBuf<'_>) {
    let count = from.len().min(to.remaining());
    to.put_slice(&from.split_to(count));
}

impl<S: AsyncRead + Unpin> AsyncRead for Sniffed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            match &mut this.input {
                Input::Pass => return Pin::new(&mut this.socket).poll_read(cx, buffer),
                Input::Replay(rest) => {
                    give(rest, buffer);
                    if rest.is_empty() {
                        this.input = Input::Pass;
                    }
                    if !buffer.filled().is_empty() {
                        return Poll::Ready(Ok(()));
                    }
                }
                Input::Head(seen) => {
                    let mut chunk = [0u8; 4096];
                    let mut fresh = ReadBuf::new(&mut chunk);
                    ready!(Pin::new(&mut this.socket).poll_read(cx, &mut fresh))?;
                    let at_end = fresh.filled().is_empty();
                    let mut seen = std::mem::take(seen);
                    seen.extend_from_slice(fresh.filled());
                    this.head_done(seen, at_end);
                }
                Input::Hijack {
                    now,
                    body_left,
                    after,
                } => {
                    if !now.is_empty() {
                        give(now, buffer);
                        return Poll::Ready(Ok(()));
                    }
                    if *body_left > 0 {
                        let limit = (*body_left).min(buffer.remaining());
                        let mut part = buffer.take(limit);
                        // `take` shares the buffer's memory and says how much of it was initialised.
                        ready!(Pin::new(&mut this.socket).poll_read(cx, &mut part))?;
                        let count = part.filled().len();
                        *body_left = if count == 0 { 0 } else { *body_left - count };
                        let copy = part.filled().to_vec();
                        buffer.put_slice(&copy);
                        return Poll::Ready(Ok(()));
                    }
                    if matches!(this.output, Output::Head { .. }) {
                        this.reader = Some(cx.waker().clone());
                        return Poll::Pending;
                    }
                    this.input = Input::Replay(std::mem::take(after));
                }
            }
        }
    }
}

/// The answer's head as the client that asked without `Upgrade` expects it.
fn without_upgrade(head: &[u8]) -> BytesMut {
    let text = String::from_utf8_lossy(head);
    let mut out = BytesMut::from(&b"HTTP/1.1 200 OK\r\n"[..]);
    for line in text.split("\r\n").skip(1).filter(|line| !line.is_empty()) {
        let name = line
            .split(':')
            .next()
            .unwrap_or_default()
            .to_ascii_lowercase();
        if name != "connection" && name != "upgrade" {
            out.put_slice(line.as_bytes());
            out.put_slice(b"\r\n");
        }
    }
    out.put_slice(b"\r\n");
    out
}

impl<S: AsyncWrite + Unpin> Sniffed<S> {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Output::Drain(rest) = &mut self.output {
            if rest.is_empty() {
                self.output = Output::Pass;
                break;
            }
            let count = ready!(Pin::new(&mut self.socket).poll_write(cx, rest))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            rest.advance(count);
        }
        Poll::Ready(Ok(()))
    }

    fn look_at(&mut self, bytes: &[u8]) {
        let Output::Head { seen, legacy } = &mut self.output else {
            return;
        };
        seen.extend_from_slice(bytes);
        let Some(end) = seen.windows(4).position(|w| w == b"\r\n\r\n") else {
            return;
        };
        let mut seen = std::mem::take(seen);
        let rest = seen.split_off(end + 4);
        let mut out = if *legacy && seen.starts_with(b"HTTP/1.1 101") {
            without_upgrade(&seen)
        } else {
            seen
        };
        out.unsplit(rest);
        self.output = Output::Drain(out);
        if let Some(waker) = self.reader.take() {
            waker.wake();
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Sniffed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if matches!(this.output, Output::Head { .. }) {
            this.look_at(bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.socket).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if matches!(this.output, Output::Pass) {
            return Pin::new(&mut this.socket).poll_write_vectored(cx, parts);
        }
        let first = parts
            .iter()
            .find(|part| !part.is_empty())
            .map_or(&[][..], |part| &part[..]);
        Pin::new(this).poll_write(cx, first)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Output::Head { seen, .. } = &mut this.output {
            let seen = std::mem::take(seen);
            this.output = Output::Drain(seen);
        }
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.socket).poll_shutdown(cx)
    }
}

/// Fuzz entry: no head makes the reader panic or claim bytes that are not there.
pub fn fuzz_read_head(data: &[u8]) {
    if let Head::Hijack { length, .. } = read_head(data) {
        assert!(length <= data.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[test]
    fn only_attach_and_exec_start_are_hijacks() {
        let attach = b"POST /v1.41/containers/a/attach?stream=1 HTTP/1.1\r\nHost: x\r\n\r\n";
        assert_eq!(
            read_head(attach),
            Head::Hijack {
                length: attach.len(),
                body: 0,
                upgrade: false
            }
        );
        let exec = b"POST /exec/a/start HTTP/1.1\r\nUpgrade: tcp\r\nContent-Length: 2\r\n\r\n{}";
        assert_eq!(
            read_head(exec),
            Head::Hijack {
                length: exec.len() - 2,
                body: 2,
                upgrade: true
            }
        );
        assert_eq!(
            read_head(b"GET /exec/a/start HTTP/1.1\r\n\r\n"),
            Head::Ordinary
        );
        assert_eq!(
            read_head(b"POST /containers/a/start HTTP/1.1\r\n\r\n"),
            Head::Ordinary
        );
        assert_eq!(read_head(b"PO"), Head::Incomplete);
    }

    #[tokio::test]
    async fn a_hijack_without_upgrade_gets_200_and_its_early_input() {
        let (client, server) = tokio::io::duplex(1 << 16);
        let mut sniffed = Sniffed::new(server);
        let (mut read, mut write) = tokio::io::split(client);
        write
            .write_all(b"POST /exec/a/start HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}early")
            .await
            .unwrap();
        write.shutdown().await.unwrap();
        let mut head = vec![0; 4096];
        let count = sniffed.read(&mut head).await.unwrap();
        let head = String::from_utf8_lossy(&head[..count]).into_owned();
        assert!(head.ends_with("Upgrade: tcp\r\n\r\n{}"), "{head}");
        sniffed
            .write_all(b"HTTP/1.1 101 UPGRADED\r\nContent-Type: t\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nout")
            .await
            .unwrap();
        let mut rest = String::new();
        sniffed.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "early");
        sniffed.shutdown().await.unwrap();
        let mut answer = String::new();
        read.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "HTTP/1.1 200 OK\r\nContent-Type: t\r\n\r\nout");
    }

    proptest! {
        #[test]
        fn no_head_panics(data in proptest::collection::vec(any::<u8>(), 0..400)) {
            fuzz_read_head(&data);
        }

        #[test]
        fn no_hijack_head_panics(tail in "[ -~\r\n]{0,200}") {
            fuzz_read_head(format!("POST /containers/a/attach{tail}\r\n\r\n").as_bytes());
        }
    }
}
