//! `/containers/X/exec` and `/exec/…`: processes beside a container's first one.

use std::sync::Arc;

use axum::Extension;
use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{Request, StatusCode};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use base::{Classified, Kind};
use engine::Engine;
use engine::exec::{ExecConfig, ExecStart};

use crate::error::{Answer, ApiError};
use crate::hijack;
use crate::request::{Params, StrictBody, parse_json, read_limited};
use crate::version::ApiVersion;

pub(super) fn router() -> Router<Arc<Engine>> {
    Router::new()
        .route("/containers/{name}/exec", post(create))
        .route("/exec/{id}/start", post(start))
        .route("/exec/{id}/resize", post(resize))
        .route("/exec/{id}/json", get(inspect))
}

async fn create(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    body: StrictBody<ExecConfig>,
) -> Answer {
    let config = body.0.unwrap_or_default();
    if config.cmd.is_empty() {
        return Err(ApiError::bad_request("No exec command specified"));
    }
    let id = engine.exec_create(&name, config).await?;
    Ok((StatusCode::CREATED, Json(serde_json::json!({ "Id": id }))).into_response())
}

async fn start(
    State(engine): State<Arc<Engine>>,
    Extension(version): Extension<ApiVersion>,
    Path(id): Path<String>,
    request: Request<Body>,
) -> Answer {
    let (parts, body) = request.into_parts();
    let bytes = read_limited(body, 64 * 1024).await?;
    let options: ExecStart = parse_json(&parts.headers, &bytes)?.unwrap_or_default();
    let request = Request::from_parts(parts, Body::empty());
    let detach = options.detach;
    let terminal = engine.exec_inspect(&id).await?.process_config.tty;
    match engine.exec_start(&id, options).await {
        Ok(None) => Ok(StatusCode::OK.into_response()),
        Ok(Some(stream)) => {
            let kind = hijack::media_type(stream.tty, version);
            let engine = engine.clone();
            let exec = id.clone();
            let settled = async move { engine.exec_settled(&exec).await };
            Ok(hijack::join(
                request,
                kind,
                hijack::Held::new(stream, settled),
            ))
        }
        Err(error) if detach || matches!(error.kind(), Kind::NotFound | Kind::Conflict) => {
            Err(error.into())
        }
        // As dockerd: what could not be run says so on the stream, and the exit code (126, 127) is the exec's.
        Err(error) => {
            let text = format!("{error}\r\n");
            let said = if terminal {
                text.into_bytes().into()
            } else {
                hijack::frame(1, text.as_bytes())
            };
            let (here, there) = tokio::io::duplex(said.len().max(64));
            tokio::spawn(async move {
                use tokio::io::{AsyncReadExt, AsyncWriteExt};
                let (mut input, mut output) = tokio::io::split(here);
                let _ = output.write_all(&said).await;
                let _ = output.shutdown().await;
                // Input is read away so that the client sees a stream that ended, not one that broke.
                let mut rest = [0u8; 4096];
                while matches!(input.read(&mut rest).await, Ok(count) if count > 0) {}
            });
            Ok(hijack::join(
                request,
                hijack::media_type(terminal, version),
                there,
            ))
        }
    }
}

async fn resize(
    State(engine): State<Arc<Engine>>,
    Path(id): Path<String>,
    params: Params,
) -> Answer {
    let (rows, columns) = super::size(&params)?;
    engine.exec_resize(&id, rows, columns).await?;
    Ok(StatusCode::OK.into_response())
}

async fn inspect(State(engine): State<Arc<Engine>>, Path(id): Path<String>) -> Answer {
    Ok(Json(engine.exec_inspect(&id).await?).into_response())
}
