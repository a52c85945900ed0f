//! `/volumes/…`.

use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use engine::Engine;
use engine::volume::VolumeCreate;

use crate::error::{Answer, ApiError};
use crate::request::{Params, StrictBody};

pub(crate) fn router() -> Router<Arc<Engine>> {
    Router::new()
        .route("/volumes", get(list))
        .route("/volumes/create", post(create))
        .route("/volumes/prune", post(prune))
        .route("/volumes/{name}", get(inspect).delete(remove).put(update))
}

async fn list(State(engine): State<Arc<Engine>>, params: Params) -> Answer {
    let volumes = engine.volumes().list(&params.filters()?)?;
    Ok(Json(serde_json::json!({ "Volumes": volumes, "Warnings": null })).into_response())
}

async fn create(State(engine): State<Arc<Engine>>, body: StrictBody<VolumeCreate>) -> Answer {
    let volume = engine.create_volume(body.0.unwrap_or_default()).await?;
    Ok((StatusCode::CREATED, Json(volume)).into_response())
}

async fn inspect(State(engine): State<Arc<Engine>>, Path(name): Path<String>) -> Answer {
    Ok(Json(engine.volumes().get(&name)?).into_response())
}

/// Only cluster volumes can be updated, and there is no cluster.
async fn update(State(engine): State<Arc<Engine>>, Path(name): Path<String>) -> Answer {
    engine.volumes().get(&name)?;
    Err(ApiError::new(
        StatusCode::SERVICE_UNAVAILABLE,
        crate::absent::NO_SWARM,
    ))
}

async fn remove(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    params: Params,
) -> Answer {
    engine.remove_volume(&name, params.flag("force")).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn prune(
    State(engine): State<Arc<Engine>>,
    axum::Extension(version): axum::Extension<crate::version::ApiVersion>,
    params: Params,
) -> Answer {
    let mut filters = params.filters()?;
    // Before API 1.42 a prune took named volumes too.
    if version < crate::version::ApiVersion::minor(42) && !filters.has("all") {
        filters.add("all", "true");
    }
    Ok(Json(engine.prune_volumes(filters).await?).into_response())
}
