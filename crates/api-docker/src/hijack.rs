//! Connections that become streams: attach and exec.
//!
//! ```text
//! client                                       daemon
//!   POST …/attach  Upgrade: tcp          ──▶
//!                                        ◀──   101 UPGRADED, Upgrade: tcp, Content-Type: (raw|multiplexed)
//!   stdin, then half-close               ──▶
//!                                        ◀──   output: raw with a terminal, else frames of 8 bytes
//!                                              [stream, 0, 0, 0, length as u32 big-endian] and the bytes
//! ```
//!
//! On a connection that cannot be upgraded (HTTP/1.0, a request that is not a connection's first and says no
//! `Upgrade`), the output is the response's body and stdin the request's.

use std::io;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::TryStreamExt;
use hyper::ext::ReasonPhrase;
use hyper_util::rt::TokioIo;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio_util::io::{ReaderStream, StreamReader};

use crate::version::ApiVersion;

/// Bytes copied at a time; also how far a slow client may be behind beyond the socket's own buffer.
const BUFFER: usize = 32 * 1024;

/// The media type of a container's output.
pub fn media_type(terminal: bool, version: ApiVersion) -> HeaderValue {
    if terminal || version < ApiVersion::minor(42) {
        HeaderValue::from_static("application/vnd.docker.raw-stream")
    } else {
        HeaderValue::from_static("application/vnd.docker.multiplexed-stream")
    }
}

/// One frame of a multiplexed stream.
pub fn frame(stream: u8, payload: &[u8]) -> Bytes {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(8 + payload.len());
    out.extend_from_slice(&[stream, 0, 0, 0]);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(&payload[..length as usize]);
    out.into()
}

/// How long output waits for the client to have read the head of the answer: the Python client loses what it reads
/// together with it.
const HEAD_START: Duration = Duration::from_millis(10);

/// A stream that begins a moment late, see [`HEAD_START`], and whose end is held back until something else has happened:
/// clients ask for an exec's exit code as soon as its output ends.
pub struct Held<S> {
    stream: S,
    begins: Option<Pin<Box<tokio::time::Sleep>>>,
    settled: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl<S> Held<S> {
    pub fn new(stream: S, settled: impl Future<Output = ()> + Send + 'static) -> Held<S> {
        Held {
            stream,
            begins: Some(Box::pin(tokio::time::sleep(HEAD_START))),
            settled: Some(Box::pin(settled)),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Held<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(begins) = &mut self.begins {
            ready!(begins.as_mut().poll(context));
            self.begins = None;
        }
        let before = buffer.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(context, buffer));
        // A stream whose input was not read to its end ends in an error.
        let ended = read.is_err() || (buffer.filled().len() == before && buffer.remaining() > 0);
        if ended && let Some(settled) = &mut self.settled {
            ready!(settled.as_mut().poll(context));
            self.settled = None;
        }
        Poll::Ready(read)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Held<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Answers `request` by joining its connection with `container`.
pub fn join<C>(mut request: Request<Body>, kind: HeaderValue, container: C) -> Response
where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let wants = request.headers().contains_key(header::UPGRADE);
    if !wants
        || request
            .extensions()
            .get::<hyper::upgrade::OnUpgrade>()
            .is_none()
    {
        return plain(request, kind, container);
    }
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(client) => pump(TokioIo::new(client), container).await,
            Err(error) => {
                tracing::debug!(%error, "the client left before its connection was taken over")
            }
        }
    });
    let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("tcp"));
    response
        .extensions_mut()
        .insert(ReasonPhrase::from_static(b"UPGRADED"));
    response
}

fn plain<C>(request: Request<Body>, kind: HeaderValue, container: C) -> Response
where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (output, mut input) = tokio::io::split(container);
    let mut body = StreamReader::new(
        request
            .into_body()
            .into_data_stream()
            .map_err(io::Error::other),
    );
    tokio::spawn(async move {
        if tokio::io::copy(&mut body, &mut input).await.is_ok() {
            let _ = input.shutdown().await;
        }
    });
    let body = Body::from_stream(ReaderStream::with_capacity(output, BUFFER));
    ([(header::CONTENT_TYPE, kind)], body).into_response()
}

/// Copies both ways until the container's side ends, or the client has gone; what that has typed is passed on before. The
/// client's end of input is passed on as just that.
pub async fn pump<A, B>(client: A, container: B)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_container, mut to_container) = tokio::io::split(container);
    // The client takes no more output: it has gone, or is about to. What it typed before still counts.
    let deaf = AtomicBool::new(false);
    let typed = AtomicBool::new(false);
    let input = async {
        match copy(&mut from_client, &mut to_container).await {
            Ok(()) => {
                let _ = to_container.shutdown().await;
            }
            Err(Broken::Source) => return,
            Err(Broken::Target) => {
                if read_away(&mut from_client).await.is_err() {
                    return;
                }
            }
        }
        typed.store(true, Ordering::Relaxed);
        // Output goes on after the end of input, until the container closes it.
        if !deaf.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
    };
    let output = async {
        if let Err(Broken::Target) = copy(&mut from_container, &mut to_client).await {
            deaf.store(true, Ordering::Relaxed);
            if !typed.load(Ordering::Relaxed) {
                let _ = read_away(&mut from_container).await;
            }
        }
        let _ = to_client.shutdown().await;
    };
    tokio::select! {
        () = input => {}
        () = output => {}
    }
    // Closed with input in it, the connection would break for the client instead of ending.
    let _ = tokio::time::timeout(PARTING, read_away(&mut from_client)).await;
}

/// How long a client may go on sending what nobody takes before its connection is closed on it.
const PARTING: Duration = Duration::from_secs(2);

/// Which side a copy broke at.
enum Broken {
    Source,
    Target,
}

async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
) -> Result<(), Broken> {
    use tokio::io::AsyncReadExt;
    let mut buffer = vec![0u8; BUFFER];
    loop {
        let count = from.read(&mut buffer).await.map_err(|_| Broken::Source)?;
        if count == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..count])
            .await
            .map_err(|_| Broken::Target)?;
        // Each piece goes out at once: somebody may be typing.
        to.flush().await.map_err(|_| Broken::Target)?;
    }
}

async fn read_away(from: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    tokio::io::copy(from, &mut tokio::io::sink())
        .await
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn output_flows_on_after_the_clients_end_of_input() {
        let (client, here) = tokio::io::duplex(64);
        let (container, there) = tokio::io::duplex(64);
        let pumping = tokio::spawn(pump(here, there));
        let (mut from_daemon, mut to_daemon) = tokio::io::split(client);
        to_daemon.write_all(b"in").await.unwrap();
        to_daemon.shutdown().await.unwrap();
        let (mut stdin, mut stdout) = tokio::io::split(container);
        let mut got = String::new();
        stdin.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "in");
        stdout.write_all(b"late output").await.unwrap();
        stdout.shutdown().await.unwrap();
        let mut got = String::new();
        from_daemon.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "late output");
        pumping.await.unwrap();
    }

    #[tokio::test]
    async fn what_a_client_typed_before_it_went_is_passed_on() {
        let (client, here) = tokio::io::duplex(64);
        let (mut container, there) = tokio::io::duplex(64);
        let mut client = client;
        client.write_all(b"typed").await.unwrap();
        container
            .write_all(b"output that nobody takes")
            .await
            .unwrap();
        drop(client);
        let pumping = tokio::spawn(pump(here, there));
        let mut got = String::new();
        container.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "typed");
        pumping.await.unwrap();
    }

    #[test]
    fn a_frame_has_its_stream_and_length() {
        assert_eq!(&frame(2, b"abc")[..], b"\x02\0\0\0\0\0\0\x03abc");
    }
}
