//! What dockerd has and Berth has not: answered clearly, in dockerd's words where clients read them.

use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::extract::Path;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::{any, get, post};
use engine::Engine;

use crate::error::{Answer, ApiError};

/// dockerd's words for every swarm call on a node outside of one.
pub(crate) const NO_SWARM: &str = "This node is not a swarm manager. Use \"docker swarm init\" or \"docker swarm join\" to connect this node to swarm and try again.";

pub(crate) fn router() -> Router<Arc<Engine>> {
    let mut router = Router::new();
    for kind in ["swarm", "nodes", "services", "tasks", "secrets", "configs"] {
        router = router
            .route(&format!("/{kind}"), any(swarm))
            .route(&format!("/{kind}/{{*rest}}"), any(swarm));
    }
    router
        .route("/plugins", get(async || Json(serde_json::json!([]))))
        .route("/plugins/pull", post(plugins))
        .route("/plugins/privileges", get(plugins))
        .route("/plugins/create", post(plugins))
        .route("/plugins/{*rest}", any(plugin))
        .route("/session", post(session))
        .route("/grpc", post(session))
        .route("/containers/{name}/checkpoints", any(checkpoints))
        .route(
            "/containers/{name}/checkpoints/{checkpoint}",
            any(checkpoints),
        )
}

async fn swarm() -> Answer {
    Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, NO_SWARM))
}

async fn plugins() -> Answer {
    Err(ApiError::new(
        StatusCode::NOT_IMPLEMENTED,
        "Docker plugins are not supported by Berth",
    ))
}

async fn plugin(Path(rest): Path<String>) -> Answer {
    let name = rest.trim_end_matches("/json");
    Err(ApiError::not_found(format!("plugin {name:?} not found")))
}

async fn session() -> impl IntoResponse {
    ApiError::new(StatusCode::NOT_IMPLEMENTED, crate::build::NO_BUILDKIT)
}

async fn checkpoints() -> Answer {
    Err(ApiError::new(
        StatusCode::NOT_IMPLEMENTED,
        "checkpoint is not supported: Berth's containers are not saved, its machines are (`berth machine`)",
    ))
}
