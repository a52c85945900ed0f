//! `/networks/…`.

use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use engine::Engine;
use engine::container::EndpointSettings;
use engine::network::NetworkCreate;
use serde::Deserialize;

use crate::error::{Answer, ApiError};
use crate::request::{JsonBody, Params, StrictBody};

pub(crate) fn router() -> Router<Arc<Engine>> {
    Router::new()
        .route("/networks", get(list))
        .route("/networks/create", post(create))
        .route("/networks/prune", post(prune))
        .route("/networks/{id}", get(inspect).delete(remove))
        .route("/networks/{id}/connect", post(connect))
        .route("/networks/{id}/disconnect", post(disconnect))
}

async fn list(State(engine): State<Arc<Engine>>, params: Params) -> Answer {
    let mut networks = engine.list_networks(params.filters()?).await?;
    // As dockerd: who is on a network is told by inspect alone.
    for network in &mut networks {
        network.containers.clear();
    }
    Ok(Json(networks).into_response())
}

async fn inspect(
    State(engine): State<Arc<Engine>>,
    Path(id): Path<String>,
    params: Params,
) -> Answer {
    if params.get("scope").is_some_and(|scope| scope != "local") {
        return Err(ApiError::not_found(format!("network {id} not found")));
    }
    Ok(Json(engine.inspect_network(&id).await?).into_response())
}

async fn create(State(engine): State<Arc<Engine>>, body: StrictBody<NetworkCreate>) -> Answer {
    let created = engine
        .create_network(body.required("the body is missing")?)
        .await?;
    Ok((StatusCode::CREATED, Json(created)).into_response())
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[derive(Default)]
struct Connect {
    container: String,
    endpoint_config: Option<EndpointSettings>,
    force: bool,
}

async fn connect(
    State(engine): State<Arc<Engine>>,
    Path(id): Path<String>,
    body: JsonBody<Connect>,
) -> Answer {
    let body = body.0.unwrap_or_default();
    engine
        .connect_network(
            &id,
            &body.container,
            body.endpoint_config.unwrap_or_default(),
        )
        .await?;
    Ok(StatusCode::OK.into_response())
}

async fn disconnect(
    State(engine): State<Arc<Engine>>,
    Path(id): Path<String>,
    body: JsonBody<Connect>,
) -> Answer {
    let body = body.0.unwrap_or_default();
    engine
        .disconnect_network(&id, &body.container, body.force)
        .await?;
    Ok(StatusCode::OK.into_response())
}

async fn remove(State(engine): State<Arc<Engine>>, Path(id): Path<String>) -> Answer {
    engine.remove_network(&id).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn prune(State(engine): State<Arc<Engine>>, params: Params) -> Answer {
    Ok(Json(engine.prune_networks(params.filters()?).await?).into_response())
}
