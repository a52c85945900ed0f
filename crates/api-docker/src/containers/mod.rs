//! `/containers/…`: the life of containers.

mod archive;
mod exec;
mod streams;

use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use engine::Engine;
use engine::container::{
    CommitOptions, ContainerConfig, HostConfig, ListOptions, NetworkingConfig, RemoveOptions,
    UpdateConfig, WaitCondition,
};
use serde::Deserialize;
use serde_json::Value;

use crate::error::{Answer, ApiError};
use crate::request::{JsonBody, Params, StrictBody, refuse_unknown};

pub(crate) fn router() -> Router<Arc<Engine>> {
    Router::new()
        .route("/containers/json", get(list))
        .route("/containers/create", post(create))
        .route("/containers/prune", post(prune))
        .route("/containers/{name}", delete(remove))
        .route("/containers/{name}/json", get(inspect))
        .route("/containers/{name}/top", get(top))
        .route("/containers/{name}/changes", get(changes))
        .route("/containers/{name}/start", post(start))
        .route("/containers/{name}/stop", post(stop))
        .route("/containers/{name}/restart", post(restart))
        .route("/containers/{name}/kill", post(kill))
        .route("/containers/{name}/pause", post(pause))
        .route("/containers/{name}/unpause", post(unpause))
        .route("/containers/{name}/wait", post(wait))
        .route("/containers/{name}/rename", post(rename))
        .route("/containers/{name}/update", post(update))
        .route("/containers/{name}/resize", post(resize))
        .route("/commit", post(commit))
        .merge(archive::router())
        .merge(exec::router())
        .merge(streams::router())
}

/// The body of `POST /containers/create`: a [`ContainerConfig`] with two objects beside its fields.
#[derive(Debug, Default, PartialEq)]
pub struct CreateBody {
    pub config: ContainerConfig,
    pub host: HostConfig,
    pub networking: NetworkingConfig,
}

impl TryFrom<Value> for CreateBody {
    type Error = ApiError;
    fn try_from(value: Value) -> Result<CreateBody, ApiError> {
        let Value::Object(mut fields) = value else {
            return Err(ApiError::bad_request(
                "invalid JSON: the body must be an object",
            ));
        };
        let host = fields.remove("HostConfig").unwrap_or_default();
        let networking = fields.remove("NetworkingConfig").unwrap_or_default();
        Ok(CreateBody {
            config: read(Value::Object(fields), "")?,
            host: read(host, "HostConfig")?,
            networking: read(networking, "NetworkingConfig")?,
        })
    }
}

/// One part of the body; `name` is its field, empty for the body itself.
fn read<T>(input: Value, name: &str) -> Result<T, ApiError>
where
    T: Default + serde::Serialize + for<'a> Deserialize<'a>,
{
    if input.is_null() {
        return Ok(T::default());
    }
    let what = match name {
        "" => "the configuration",
        name => name,
    };
    let value: T = serde_json::from_value(input.clone())
        .map_err(|error| ApiError::bad_request(format!("invalid JSON: {what}: {error}")))?;
    match name {
        "" => refuse_unknown(&input, &value)?,
        name => refuse_unknown(
            &serde_json::json!({ name: input }),
            &serde_json::json!({ name: &value }),
        )?,
    }
    Ok(value)
}

async fn list(State(engine): State<Arc<Engine>>, params: Params) -> Answer {
    let limit = params
        .number::<i64>("limit")?
        .and_then(|limit| usize::try_from(limit).ok());
    let options = ListOptions {
        all: params.flag("all"),
        limit: limit.filter(|limit| *limit > 0),
        size: params.flag("size"),
        filters: params.filters()?,
    };
    Ok(Json(engine.list(options).await?).into_response())
}

async fn create(
    State(engine): State<Arc<Engine>>,
    params: Params,
    body: JsonBody<Value>,
) -> Answer {
    let body = body.required("config cannot be empty in order to create a container")?;
    let body = CreateBody::try_from(body)?;
    let platform = crate::images::platform(&params)?;
    let created = engine
        .create_container(
            params.get("name"),
            &platform,
            body.config,
            body.host,
            body.networking,
        )
        .await?;
    Ok((StatusCode::CREATED, Json(created)).into_response())
}

async fn inspect(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    params: Params,
) -> Answer {
    Ok(Json(engine.inspect(&name, params.flag("size")).await?).into_response())
}

async fn top(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    params: Params,
) -> Answer {
    let arguments = params.get("ps_args").unwrap_or("-ef");
    Ok(Json(engine.top(&name, arguments).await?).into_response())
}

async fn changes(State(engine): State<Arc<Engine>>, Path(name): Path<String>) -> Answer {
    Ok(Json(engine.changes(&name).await?).into_response())
}

async fn start(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    // Some clients send `{}` or `null` with a length; a HostConfig at start was removed with API 1.24.
    let length = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if body.len() > 7 || length.is_some_and(|length| length > 7) {
        return Err(ApiError::bad_request(
            "starting container with non-empty request body was deprecated since API v1.22 and removed in v1.24",
        ));
    }
    engine.start(&name).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn stop(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    params: Params,
) -> Answer {
    engine
        .stop(&name, params.number("t")?, params.get("signal"))
        .await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn restart(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    params: Params,
) -> Answer {
    engine
        .restart(&name, params.number("t")?, params.get("signal"))
        .await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn kill(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    params: Params,
) -> Answer {
    engine
        .kill(&name, params.get("signal").unwrap_or("KILL"))
        .await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn pause(State(engine): State<Arc<Engine>>, Path(name): Path<String>) -> Answer {
    engine.pause(&name).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn unpause(State(engine): State<Arc<Engine>>, Path(name): Path<String>) -> Answer {
    engine.unpause(&name).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// The headers go out as soon as the wait is registered: `docker run` starts the container only after them.
async fn wait(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    params: Params,
) -> Answer {
    let condition = match params.get("condition") {
        None | Some("not-running") => WaitCondition::NotRunning,
        Some("next-exit") => WaitCondition::NextExit,
        Some("removed") => WaitCondition::Removed,
        Some(other) => {
            return Err(ApiError::bad_request(format!(
                "invalid condition: {other:?}"
            )));
        }
    };
    let wait = engine.wait(&name, condition).await?;
    let body = futures_util::stream::once(async move {
        let mut line = serde_json::to_vec(&wait.await).map_err(std::io::Error::other)?;
        line.push(b'\n');
        Ok::<_, std::io::Error>(Bytes::from(line))
    });
    Ok((
        [(header::CONTENT_TYPE, "application/json")],
        Body::from_stream(body),
    )
        .into_response())
}

async fn rename(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    params: Params,
) -> Answer {
    let new = params
        .get("name")
        .ok_or_else(|| ApiError::bad_request("Neither old nor new names may be empty"))?;
    engine.rename(&name, new).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn update(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    body: StrictBody<UpdateConfig>,
) -> Answer {
    Ok(Json(engine.update(&name, body.0.unwrap_or_default()).await?).into_response())
}

async fn resize(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    params: Params,
) -> Answer {
    let (rows, columns) = size(&params)?;
    engine.resize(&name, rows, columns).await?;
    Ok(StatusCode::OK.into_response())
}

/// `h` and `w` of a terminal.
fn size(params: &Params) -> Result<(u16, u16), ApiError> {
    let side = |name: &str| {
        params
            .number::<u16>(name)?
            .ok_or_else(|| ApiError::bad_request(format!("parameter {name} is missing")))
    };
    Ok((side("h")?, side("w")?))
}

async fn remove(
    State(engine): State<Arc<Engine>>,
    Path(name): Path<String>,
    params: Params,
) -> Answer {
    let options = RemoveOptions {
        force: params.flag("force"),
        volumes: params.flag("v"),
        link: params.flag("link"),
    };
    engine.remove(&name, options).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn prune(State(engine): State<Arc<Engine>>, params: Params) -> Answer {
    Ok(Json(engine.prune_containers(params.filters()?).await?).into_response())
}

async fn commit(
    State(engine): State<Arc<Engine>>,
    params: Params,
    body: JsonBody<ContainerConfig>,
) -> Answer {
    let container = params
        .get("container")
        .ok_or_else(|| ApiError::bad_request("parameter container is missing"))?;
    let options = CommitOptions {
        repository: params.text("repo"),
        tag: params.text("tag"),
        comment: params.text("comment"),
        author: params.text("author"),
        pause: params.flag_or("pause", true),
        changes: params
            .all("changes")
            .into_iter()
            .filter(|change| !change.is_empty())
            .collect(),
        // The CLI sends `null`, docker-py `{}` or null: an empty configuration replaces nothing.
        config: body
            .0
            .filter(|config| *config != ContainerConfig::default()),
    };
    let id = engine.commit(container, options).await?;
    Ok((StatusCode::CREATED, Json(serde_json::json!({ "Id": id }))).into_response())
}

/// An answer that is a stream of bytes.
pub(crate) fn streamed<S>(kind: &'static str, stream: S) -> Response
where
    S: futures_util::Stream<Item = std::io::Result<Bytes>> + Send + 'static,
{
    ([(header::CONTENT_TYPE, kind)], Body::from_stream(stream)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_create_body_falls_into_its_three_parts() {
        let body = serde_json::json!({
            "Image": "busybox", "Cmd": "true", "Labels": null, "Unheard": {},
            "HostConfig": {"AutoRemove": true, "Memory": 1024},
            "NetworkingConfig": {"EndpointsConfig": {"net": {"Aliases": ["a"]}}},
        });
        let body = CreateBody::try_from(body).unwrap();
        assert_eq!(body.config.image, "busybox");
        assert!(body.host.auto_remove);
        assert_eq!(body.host.resources.memory, 1024);
        assert!(body.networking.endpoints_config.contains_key("net"));
        let null = CreateBody::try_from(serde_json::json!({"HostConfig": null})).unwrap();
        assert_eq!(null, CreateBody::default());
        assert!(CreateBody::try_from(serde_json::json!([])).is_err());
        let wrong = CreateBody::try_from(serde_json::json!({"HostConfig": {"Memory": "much"}}));
        assert!(
            wrong
                .unwrap_err()
                .message
                .starts_with("invalid JSON: HostConfig: ")
        );
    }
}
