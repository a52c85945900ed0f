//! What flows out of (and into) containers: attach, logs, stats.

use std::sync::Arc;

use axum::Extension;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{Request, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use engine::Engine;
use engine::container::{AttachOptions, LogsOptions};
use futures_util::StreamExt;

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

async fn attach(
    State(engine): State<Arc<Engine>>,
    Extension(version): Extension<ApiVersion>,
    Path(name): Path<String>,
    params: Params,
    request: Request<Body>,
) -> Answer {
    let options = AttachOptions {
        stdin: params.flag("stdin"),
        stdout: params.flag("stdout"),
        stderr: params.flag("stderr"),
        logs: params.flag("logs"),
        stream: params.flag("stream"),
        detach_keys: params.text("detachKeys"),
    };
    let stream = engine.attach(&name, options).await?;
    let kind = hijack::media_type(stream.tty, version);
    Ok(hijack::join(request, kind, stream))
}

async fn attach_ws() -> Answer {
    Err(ApiError::new(
        StatusCode::NOT_IMPLEMENTED,
        "attaching through a WebSocket is not supported; use POST /containers/X/attach with Upgrade: tcp",
    ))
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
