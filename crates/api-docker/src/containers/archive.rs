//! Files in and out of containers: `docker cp`, `docker export`.

use std::io;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use engine::Engine;
use engine::container::{ArchivePutOptions, PathStat};
use futures_util::TryStreamExt;
use tokio_util::io::StreamReader;

use super::streamed;
use crate::auth::encode_json;
use crate::error::{Answer, ApiError};
use crate::request::Params;

pub(super) fn router() -> Router<Arc<Engine>> {
    Router::new()
        .route(
            "/containers/{name}/archive",
            get(read).head(stat).put(write),
        )
        .route("/containers/{name}/export", get(export))
}

fn path(params: &Params) -> Result<&str, ApiError> {
    params
        .get("path")
        .ok_or_else(|| ApiError::bad_request("bad parameter: path cannot be empty"))
}

fn with_stat(stat: &PathStat, mut response: Response) -> Answer {
    let value = HeaderValue::try_from(encode_json(stat)).map_err(|error| {
        ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("the path's status is no header: {error}"),
        )
    })?;
    response
        .headers_mut()
        .insert("x-docker-container-path-stat", value);
    Ok(response)
}

async fn stat(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    params: Params,
) -> Answer {
    let stat = engine.archive_stat(&name, path(&params)?).await?;
    with_stat(&stat, StatusCode::OK.into_response())
}

async fn read(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    params: Params,
) -> Answer {
    let (stat, archive) = engine.archive_get(&name, path(&params)?).await?;
    with_stat(&stat, streamed("application/x-tar", archive))
}

async fn write(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    params: Params,
    body: Body,
) -> Answer {
    let options = ArchivePutOptions {
        no_overwrite_dir_non_dir: params.flag("noOverwriteDirNonDir"),
        copy_uid_gid: params.flag("copyUIDGID"),
    };
    let archive = StreamReader::new(body.into_data_stream().map_err(io::Error::other));
    engine
        .archive_put(&name, path(&params)?, options, Box::pin(archive))
        .await?;
    Ok(StatusCode::OK.into_response())
}

async fn export(State(engine): State<Arc<Engine>>, Path(name): Path<String>) -> Answer {
    Ok(streamed(
        "application/octet-stream",
        engine.export(&name).await?,
    ))
}
