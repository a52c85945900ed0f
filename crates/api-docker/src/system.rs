//! The daemon itself: `/_ping`, `/version`, `/info`, `/events`, `/system/df`, `/auth`.

use std::sync::Arc;

use axum::Extension;
use axum::Json;
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderName, header};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use engine::Engine;
use engine::system::UsageKind;
use futures_util::StreamExt;

use crate::auth::RegistryAuth;
use crate::containers::streamed;
use crate::error::{Answer, ApiError};
use crate::request::{JsonBody, Params};
use crate::version::ApiVersion;

pub(crate) fn router() -> Router<Arc<Engine>> {
    Router::new()
        .route("/_ping", get(ping))
        .route("/version", get(version))
        .route("/info", get(info))
        .route("/events", get(events))
        .route("/system/df", get(disk_usage))
        .route("/auth", post(auth))
}

/// `HEAD` is answered by the same handler, without the body.
async fn ping() -> impl IntoResponse {
    let headers = [
        (HeaderName::from_static("builder-version"), "1"),
        (HeaderName::from_static("swarm"), "inactive"),
        (header::CACHE_CONTROL, "no-cache, no-store, must-revalidate"),
        (header::PRAGMA, "no-cache"),
        (header::CONTENT_TYPE, "text/plain; charset=utf-8"),
    ];
    (headers, "OK")
}

async fn version(State(engine): State<Arc<Engine>>) -> Answer {
    Ok(Json(engine.version()).into_response())
}

async fn info(State(engine): State<Arc<Engine>>) -> Answer {
    Ok(Json(engine.info().await?).into_response())
}

async fn events(State(engine): State<Arc<Engine>>, params: Params) -> Answer {
    let (since, until) = (params.moment("since")?, params.moment("until")?);
    let events = engine.subscribe(since, until, params.filters()?)?;
    let lines = events.map(|event| {
        let mut line = serde_json::to_vec(&event).map_err(std::io::Error::other)?;
        line.push(b'\n');
        Ok(Bytes::from(line))
    });
    Ok(streamed("application/json", lines))
}

async fn disk_usage(
    State(engine): State<Arc<Engine>>,
    Extension(version): Extension<ApiVersion>,
    params: Params,
) -> Answer {
    let kinds = params.all("type");
    let kinds = kinds
        .iter()
        .map(|kind| kind.parse::<UsageKind>())
        .collect::<Result<Vec<_>, _>>()?;
    let usage = engine.disk_usage(&kinds).await?;
    let mut value = serde_json::to_value(usage).map_err(|error| {
        ApiError::new(
            axum::http::StatusCode::INTERNAL_SERVER_ERROR,
            error.to_string(),
        )
    })?;
    if version < ApiVersion::minor(42) {
        value["BuilderSize"] = 0.into();
    }
    Ok(Json(value).into_response())
}

async fn auth(State(engine): State<Arc<Engine>>, body: JsonBody<RegistryAuth>) -> Answer {
    let mut auth = body.required("the body is missing")?;
    auth.unfold();
    let server = auth.serveraddress.clone();
    let token = engine.authenticate(&server, auth.into()).await?;
    Ok(
        Json(serde_json::json!({ "Status": "Login Succeeded", "IdentityToken": token }))
            .into_response(),
    )
}
