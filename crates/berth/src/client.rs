//! The daemon as the command line sees it: HTTP over its unix socket, one connection a request.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use base::Kind;
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::failure::Failure;

/// A request body.
pub type Body = BoxBody<Bytes, io::Error>;

/// Query parameters, encoded by [`query`].
pub type Query<'a> = &'a [(&'a str, String)];

/// The daemon behind one socket.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    /// Whether a missing daemon may be started: only at the default socket.
    start: bool,
}

/// No body.
pub fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed()
}

/// A JSON body.
pub fn json_body<T: Serialize>(value: &T) -> Result<Body, Failure> {
    let bytes = serde_json::to_vec(value)
        .map_err(|e| Failure::internal(format!("cannot write the request: {e}")))?;
    Ok(Full::new(Bytes::from(bytes))
        .map_err(|never| match never {})
        .boxed())
}

/// A body that is sent as it is produced.
pub fn stream_body<S>(stream: S) -> Body
where
    S: Stream<Item = io::Result<Bytes>> + Send + Sync + 'static,
{
    BodyExt::boxed(StreamBody::new(stream.map(|chunk| chunk.map(Frame::data))))
}

/// Percent-encodes every byte but the unreserved ones (RFC 3986, 2.3).
pub fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(byte as char);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn query(path: &str, parameters: Query<'_>) -> String {
    let mut target = path.to_owned();
    for (index, (key, value)) in parameters.iter().enumerate() {
        target.push(if index == 0 { '?' } else { '&' });
        target.push_str(&format!("{}={}", encode(key), encode(value)));
    }
    target
}

impl Client {
    pub fn new(socket: PathBuf, start: bool) -> Client {
        Client { socket, start }
    }

    async fn connect(&self) -> Result<UnixStream, Failure> {
        let first = match UnixStream::connect(&self.socket).await {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        let absent = matches!(
            first.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
        );
        if !absent {
            let failure = Failure::io(
                format!("cannot reach the daemon at {}", self.socket.display()),
                &first,
            );
            return Err(if first.kind() == io::ErrorKind::PermissionDenied {
                failure.with_fix("run as root, or join the socket's group: sudo usermod -aG berth $USER, then log in again")
            } else {
                failure
            });
        }
        if !self.start {
            return Err(Failure::new(
                Kind::NotFound,
                format!("no daemon answers at {}", self.socket.display()),
            )
            .with_fix(format!("berth serve --socket {}", self.socket.display())));
        }
        let log = crate::serve::start_in_background()?;
        for _ in 0..200 {
            if let Ok(stream) = UnixStream::connect(&self.socket).await {
                eprintln!(
                    "berth: no daemon was running; started one (log: {}; end it with `berth system stop`)",
                    log.display()
                );
                return Ok(stream);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(
            Failure::internal("the daemon was started but does not answer").with_fix(format!(
                "read {}, or run `berth serve` in the foreground to see why",
                log.display()
            )),
        )
    }

    /// Sends one request; an error status becomes a [`Failure`].
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        parameters: Query<'_>,
        body: Body,
        headers: &[(&str, String)],
    ) -> Result<Response<Incoming>, Failure> {
        let response = self
            .send_raw(method, path, parameters, body, headers)
            .await?;
        if response.status().is_success() || response.status().as_u16() == 101 {
            return Ok(response);
        }
        if response.status().as_u16() == 304 {
            return Ok(response);
        }
        Err(failure_of(response).await)
    }

    async fn send_raw(
        &self,
        method: Method,
        path: &str,
        parameters: Query<'_>,
        body: Body,
        headers: &[(&str, String)],
    ) -> Result<Response<Incoming>, Failure> {
        let stream = self.connect().await?;
        let lost = |e: &dyn std::fmt::Display| {
            Failure::internal(format!("the connection to the daemon broke: {e}"))
        };
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| lost(&e))?;
        tokio::spawn(connection.with_upgrades());
        let mut request = Request::builder()
            .method(method)
            .uri(query(path, parameters))
            .header(HOST, "berth");
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let request = request
            .body(body)
            .map_err(|e| Failure::invalid(format!("cannot form the request: {e}")))?;
        sender.send_request(request).await.map_err(|e| lost(&e))
    }

    /// A GET whose answer is JSON.
    pub async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        parameters: Query<'_>,
    ) -> Result<T, Failure> {
        let response = self
            .send(Method::GET, path, parameters, empty(), &[])
            .await?;
        read_json(response).await
    }

    /// A POST with a JSON body whose answer is JSON.
    pub async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        parameters: Query<'_>,
        body: &B,
    ) -> Result<T, Failure> {
        let headers = [(CONTENT_TYPE.as_str(), "application/json".to_owned())];
        let response = self
            .send(Method::POST, path, parameters, json_body(body)?, &headers)
            .await?;
        read_json(response).await
    }

    /// A POST without a body whose answer does not matter.
    pub async fn act(&self, path: &str, parameters: Query<'_>) -> Result<(), Failure> {
        let response = self
            .send(Method::POST, path, parameters, empty(), &[])
            .await?;
        drain(response).await
    }

    /// A DELETE; the answer's JSON, or null where it has none.
    pub async fn delete(&self, path: &str, parameters: Query<'_>) -> Result<Value, Failure> {
        let response = self
            .send(Method::DELETE, path, parameters, empty(), &[])
            .await?;
        let bytes = collect(response).await?;
        Ok(serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }

    /// A POST that turns the connection into a raw duplex stream (`101 UPGRADED`). The flag says whether
    /// the stream is raw (a terminal) and not framed.
    pub async fn upgrade(
        &self,
        path: &str,
        parameters: Query<'_>,
        body: Body,
    ) -> Result<(TokioIo<hyper::upgrade::Upgraded>, bool), Failure> {
        let headers = [
            (CONNECTION.as_str(), "Upgrade".to_owned()),
            (UPGRADE.as_str(), "tcp".to_owned()),
            (CONTENT_TYPE.as_str(), "application/json".to_owned()),
        ];
        let response = self
            .send(Method::POST, path, parameters, body, &headers)
            .await?;
        let raw = response
            .headers()
            .get(CONTENT_TYPE)
            .is_some_and(|value| value.as_bytes() == b"application/vnd.docker.raw-stream");
        let upgraded = hyper::upgrade::on(response)
            .await
            .map_err(|e| Failure::internal(format!("the daemon did not open the stream: {e}")))?;
        Ok((TokioIo::new(upgraded), raw))
    }
}

/// The whole answer.
pub async fn collect(response: Response<Incoming>) -> Result<Bytes, Failure> {
    let body = response.into_body().collect().await;
    Ok(body
        .map_err(|e| Failure::internal(format!("the daemon's answer broke off: {e}")))?
        .to_bytes())
}

async fn drain(response: Response<Incoming>) -> Result<(), Failure> {
    collect(response).await.map(drop)
}

/// The answer as JSON.
pub async fn read_json<T: DeserializeOwned>(response: Response<Incoming>) -> Result<T, Failure> {
    let bytes = collect(response).await?;
    let bytes = if bytes.is_empty() {
        Bytes::from_static(b"null")
    } else {
        bytes
    };
    serde_json::from_slice(&bytes).map_err(|e| {
        Failure::internal(format!(
            "the daemon's answer is not what this command understands: {e}"
        ))
        .with_fix("berth version   # client and daemon should be of one version")
    })
}

/// What kind of failure a status is, or the word beside it.
pub fn kind_of(word: Option<&str>, status: u16) -> Kind {
    match (word, status) {
        (Some("capacity"), _) | (_, 507) => Kind::Capacity,
        (Some("unsupported"), _) | (_, 501) => Kind::Unsupported,
        (_, 400 | 422) => Kind::Invalid,
        (_, 401 | 403) => Kind::Permission,
        (_, 404) => Kind::NotFound,
        (_, 409) => Kind::Conflict,
        _ => Kind::Internal,
    }
}

async fn failure_of(response: Response<Incoming>) -> Failure {
    let status = response.status().as_u16();
    let bytes = collect(response).await.unwrap_or_default();
    let body: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    let message = body["message"].as_str().map_or_else(
        || String::from_utf8_lossy(&bytes).trim().to_owned(),
        str::to_owned,
    );
    let mut failure = Failure::new(
        kind_of(body["kind"].as_str(), status),
        if message.is_empty() {
            format!("the daemon answered {status}")
        } else {
            message
        },
    );
    failure.fix = body["fix"].as_str().map(str::to_owned);
    failure
}

/// Calls `each` with every JSON value of a newline-delimited stream; it ends the stream with an error.
pub async fn each_json(
    response: Response<Incoming>,
    mut each: impl FnMut(Value) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut body = response.into_body();
    let mut buffer: Vec<u8> = Vec::new();
    loop {
        let frame = match body.frame().await {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                return Err(Failure::internal(format!(
                    "the daemon's answer broke off: {error}"
                )));
            }
            None => break,
        };
        let Ok(data) = frame.into_data() else {
            continue;
        };
        buffer.extend_from_slice(&data);
        let mut values = serde_json::Deserializer::from_slice(&buffer).into_iter::<Value>();
        let mut consumed = 0;
        loop {
            match values.next() {
                Some(Ok(value)) => {
                    consumed = values.byte_offset();
                    each(value)?;
                }
                Some(Err(error)) if error.is_eof() => break,
                Some(Err(error)) => {
                    return Err(Failure::internal(format!(
                        "the daemon sent no JSON: {error}"
                    )));
                }
                None => break,
            }
        }
        buffer.drain(..consumed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_value_cannot_add_parameters() {
        assert_eq!(
            query("/x", &[("a", "b&c=d/é".into())]),
            "/x?a=b%26c%3Dd%2F%C3%A9"
        );
    }
}
