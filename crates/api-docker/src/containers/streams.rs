//! What flows out of (and into) containers: attach, logs, stats.

use std::sync::Arc;

use axum::Extension;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::http::{Request, header};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use engine::Engine;
use engine::container::{AttachOptions, AttachStream, LogsOptions};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::streamed;
use crate::error::{Answer, ApiError};
use crate::hijack;
use crate::request::Params;
use crate::version::ApiVersion;

pub(super) fn router() -> Router<Arc<Engine>> {
    Router::new()
        .route("/containers/{name}/attach", post(attach))
        .route("/containers/{name}/attach/ws", get(attach_ws))
        .route("/containers/{name}/logs", get(logs))
        .route("/containers/{name}/stats", get(stats))
}

fn wanted(params: &Params) -> AttachOptions {
    AttachOptions {
        stdin: params.flag("stdin"),
        stdout: params.flag("stdout"),
        stderr: params.flag("stderr"),
        logs: params.flag("logs"),
        stream: params.flag("stream"),
        detach_keys: params.text("detachKeys"),
    }
}

async fn attach(
    State(engine): State<Arc<Engine>>,
    Extension(version): Extension<ApiVersion>,
    Path(name): Path<String>,
    params: Params,
    request: Request<Body>,
) -> Answer {
    let stream = engine.attach(&name, wanted(&params)).await?;
    let kind = hijack::media_type(stream.tty, version);
    Ok(hijack::join(request, kind, stream))
}

/// Attaching through a WebSocket (RFC 6455): each output is a binary message, without frames of 8 bytes; each message of
/// the client is input, and its closing is only the end of that.
async fn attach_ws(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    params: Params,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Answer {
    let upgrade = upgrade.map_err(|error| {
        ApiError::new(
            error.status(),
            format!(
                "attach/ws wants a WebSocket handshake: {}",
                error.body_text()
            ),
        )
    })?;
    let stream = engine.attach(&name, wanted(&params)).await?;
    Ok(upgrade.on_upgrade(move |socket| converse(socket, stream)))
}

async fn converse(socket: WebSocket, stream: AttachStream) {
    let terminal = stream.tty;
    let (mut output, mut input) = tokio::io::split(stream);
    let (mut to_client, mut from_client) = socket.split();
    let sending = async {
        let mut buffer = vec![0u8; 32 * 1024];
        let mut left = 0usize;
        loop {
            if !terminal && left == 0 {
                let mut head = [0u8; 8];
                if output.read_exact(&mut head).await.is_err() {
                    break;
                }
                left = u32::from_be_bytes([head[4], head[5], head[6], head[7]]) as usize;
                continue;
            }
            let most = if terminal {
                buffer.len()
            } else {
                left.min(buffer.len())
            };
            let Ok(count @ 1..) = output.read(&mut buffer[..most]).await else {
                break;
            };
            left = left.saturating_sub(count);
            let message = Message::Binary(Bytes::copy_from_slice(&buffer[..count]));
            if to_client.send(message).await.is_err() {
                return;
            }
        }
        let _ = to_client.send(Message::Close(None)).await;
    };
    let receiving = async {
        while let Some(Ok(message)) = from_client.next().await {
            let bytes = match message {
                Message::Binary(bytes) => bytes,
                Message::Text(text) => text.into(),
                Message::Close(_) => break,
                Message::Ping(_) | Message::Pong(_) => continue,
            };
            if input.write_all(&bytes).await.is_err() {
                break;
            }
        }
        let _ = input.shutdown().await;
        // Output ends the conversation, not input.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = sending => {}
        () = receiving => {}
    }
}

async fn logs(
    State(engine): State<Arc<Engine>>,
    Extension(version): Extension<ApiVersion>,
    Path(name): Path<String>,
    params: Params,
) -> Answer {
    let options = LogsOptions {
        stdout: params.flag("stdout"),
        stderr: params.flag("stderr"),
        since: params.moment("since")?,
        until: params.moment("until")?,
        timestamps: params.flag("timestamps"),
        follow: params.flag("follow"),
        // `all`, a negative number and nonsense mean all, as to dockerd.
        tail: params
            .get("tail")
            .and_then(|tail| tail.parse::<usize>().ok()),
        details: params.flag("details"),
    };
    if !options.stdout && !options.stderr {
        return Err(ApiError::bad_request(
            "Bad parameters: you must choose at least one stream",
        ));
    }
    let log = engine.logs(&name, options).await?;
    let kind = hijack::media_type(log.tty, version);
    Ok((
        [(header::CONTENT_TYPE, kind)],
        Body::from_stream(log.stream),
    )
        .into_response())
}

async fn stats(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    params: Params,
) -> Answer {
    let stream = params.flag_or("stream", true);
    let one_shot = params.flag("one-shot");
    if stream && one_shot {
        return Err(ApiError::bad_request(
            "cannot have stream=true and one-shot=true",
        ));
    }
    let mut samples = engine.stats(&name, stream, one_shot).await?;
    // What fails at once is an ordinary error.
    let first = match samples.next().await {
        Some(Err(error)) => return Err(error.into()),
        first => first,
    };
    let lines = futures_util::stream::iter(first)
        .chain(samples)
        .map(|sample| {
            let sample = sample.map_err(std::io::Error::other)?;
            let mut line = serde_json::to_vec(&sample).map_err(std::io::Error::other)?;
            line.push(b'\n');
            Ok(Bytes::from(line))
        });
    Ok(streamed("application/json", lines))
}
