//! The daemon's own endpoints beside the Docker Engine API, under `/berth/v1`: machines, and the daemon's end.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base::{Classified, Kind};
use engine::Engine;
use engine::machine::{Line, MachineChange, MachineSpec, Machines};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::json;
use tokio_util::sync::CancellationToken;

/// An engine's error as an answer.
struct Refusal(engine::Error);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let kind = self.0.kind();
        let status =
            StatusCode::from_u16(kind.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let word = match kind {
            Kind::Capacity => "capacity",
            Kind::Unsupported => "unsupported",
            _ => "",
        };
        let body = json!({"message": self.0.to_string(), "kind": word, "fix": self.0.fix()});
        (status, Json(body)).into_response()
    }
}

type Answer<T> = Result<T, Refusal>;

/// Runs what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> engine::Result<T> + Send + 'static,
) -> Answer<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Refusal),
        Err(error) => Err(Refusal(engine::Error::Runtime {
            message: error.to_string(),
            kind: Kind::Internal,
        })),
    }
}

/// Everything the daemon answers.
pub fn router(engine: Arc<Engine>, machines: Arc<Machines>, stop: CancellationToken) -> Router {
    let machine_routes = Router::new()
        .route("/berth/v1/machines", get(list).post(create))
        .route("/berth/v1/machines/{name}", get(inspect).delete(remove))
        .route("/berth/v1/machines/{name}/stats", get(stats))
        .route("/berth/v1/machines/{name}/logs", get(logs))
        .route("/berth/v1/machines/{name}/console", post(console))
        .route("/berth/v1/machines/{name}/vsock", post(vsock))
        .route("/berth/v1/machines/{name}/balloon", post(balloon))
        .route("/berth/v1/machines/{name}/resize", post(resize))
        .route("/berth/v1/machines/{name}/update", post(update))
        .route("/berth/v1/machines/{name}/rename", post(rename))
        .route("/berth/v1/machines/{name}/wait", post(wait))
        .route("/berth/v1/machines/{name}/{verb}", post(act))
        .route("/berth/v1/storage", get(storage))
        .with_state(machines);
    let own = Router::new().route(
        "/berth/v1/shutdown",
        post(move || {
            let stop = stop.clone();
            async move {
                // The answer goes out before the listeners close.
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    stop.cancel();
                });
                StatusCode::NO_CONTENT
            }
        }),
    );
    api_docker::router(engine).merge(own).merge(machine_routes)
}

async fn list(State(machines): State<Arc<Machines>>) -> Answer<impl IntoResponse> {
    Ok(Json(blocking(move || Ok(machines.list())).await?))
}

async fn create(
    State(machines): State<Arc<Machines>>,
    body: axum::body::Bytes,
) -> Answer<impl IntoResponse> {
    let spec: MachineSpec = serde_json::from_slice(&body).map_err(|e| {
        Refusal(engine::Error::Invalid(format!(
            "this is no description of a machine: {e}"
        )))
    })?;
    let id = blocking(move || machines.create(spec)).await?;
    Ok((StatusCode::CREATED, Json(json!({"id": id}))))
}

async fn inspect(
    State(machines): State<Arc<Machines>>,
    Path(name): Path<String>,
) -> Answer<impl IntoResponse> {
    Ok(Json(blocking(move || machines.inspect(&name)).await?))
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RemoveQuery {
    force: bool,
}

async fn remove(
    State(machines): State<Arc<Machines>>,
    Path(name): Path<String>,
    Query(query): Query<RemoveQuery>,
) -> Answer<StatusCode> {
    blocking(move || machines.remove(&name, query.force)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn stats(
    State(machines): State<Arc<Machines>>,
    Path(name): Path<String>,
) -> Answer<impl IntoResponse> {
    Ok(Json(blocking(move || machines.stats(&name)).await?))
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LogsQuery {
    follow: bool,
    /// The last lines only.
    tail: Option<usize>,
}

/// Between two looks at a log that is followed.
const LOOK: Duration = Duration::from_millis(100);

async fn logs(
    State(machines): State<Arc<Machines>>,
    Path(name): Path<String>,
    Query(query): Query<LogsQuery>,
) -> Answer<impl IntoResponse> {
    let mut reader = blocking(move || {
        let mut reader = machines.logs(&name)?;
        if let Some(lines) = query.tail {
            reader.tail(lines)?;
        }
        Ok(reader)
    })
    .await?;
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Vec<u8>, std::io::Error>>(4);
    tokio::task::spawn_blocking(move || {
        loop {
            // Whether it ended is asked before the last read, so that nothing is missed.
            let live = reader.is_live();
            match reader.read() {
                Ok(bytes) if bytes.is_empty() => {
                    if !query.follow || !live || sender.is_closed() {
                        return;
                    }
                    std::thread::sleep(LOOK);
                }
                Ok(bytes) => {
                    if sender.blocking_send(Ok(bytes)).is_err() {
                        return;
                    }
                }
                Err(error) => {
                    let _ = sender.blocking_send(Err(std::io::Error::other(error.to_string())));
                    return;
                }
            }
        }
    });
    let stream = futures_util::stream::unfold(receiver, async |mut receiver| {
        receiver.recv().await.map(|bytes| (bytes, receiver))
    });
    Ok((
        [(header::CONTENT_TYPE, "application/octet-stream")],
        Body::from_stream(stream),
    ))
}

async fn update(
    State(machines): State<Arc<Machines>>,
    Path(name): Path<String>,
    body: axum::body::Bytes,
) -> Answer<StatusCode> {
    let change: MachineChange = serde_json::from_slice(&body).map_err(|e| {
        Refusal(engine::Error::Invalid(format!(
            "this is no change of a machine: {e}"
        )))
    })?;
    blocking(move || machines.update(&name, &change)).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RenameQuery {
    name: String,
}

async fn rename(
    State(machines): State<Arc<Machines>>,
    Path(name): Path<String>,
    Query(query): Query<RenameQuery>,
) -> Answer<StatusCode> {
    blocking(move || machines.rename(&name, &query.name)).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct WaitQuery {
    /// Seconds, at most a minute.
    timeout: Option<u64>,
}

/// How a machine ended: null where it still runs after the timeout.
async fn wait(
    State(machines): State<Arc<Machines>>,
    Path(name): Path<String>,
    Query(query): Query<WaitQuery>,
) -> Answer<impl IntoResponse> {
    let timeout = Duration::from_secs(query.timeout.unwrap_or(30).min(60));
    Ok(Json(blocking(move || machines.wait(&name, timeout)).await?))
}

async fn storage(State(machines): State<Arc<Machines>>) -> Answer<impl IntoResponse> {
    Ok(Json(blocking(move || Ok(machines.storage())).await?))
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct StopQuery {
    /// Seconds to wait for the guest.
    timeout: Option<u64>,
}

async fn act(
    State(machines): State<Arc<Machines>>,
    Path((name, verb)): Path<(String, String)>,
    Query(query): Query<StopQuery>,
) -> Answer<StatusCode> {
    blocking(move || match verb.as_str() {
        "start" => machines.start(&name),
        "stop" => machines.stop(&name, Duration::from_secs(query.timeout.unwrap_or(90))),
        "kill" => machines.kill(&name),
        "pause" => machines.pause(&name),
        "resume" => machines.resume(&name),
        "reset" => machines.reset(&name),
        other => Err(engine::Error::NotFound(format!("a machine cannot {other}"))),
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct BalloonQuery {
    /// Bytes the guest keeps.
    memory: u64,
}

async fn balloon(
    State(machines): State<Arc<Machines>>,
    Path(name): Path<String>,
    Query(query): Query<BalloonQuery>,
) -> Answer<StatusCode> {
    blocking(move || machines.balloon(&name, query.memory)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Docker's words for a terminal's size.
#[derive(Debug, Deserialize)]
struct ResizeQuery {
    w: u16,
    h: u16,
}

async fn resize(
    State(machines): State<Arc<Machines>>,
    Path(name): Path<String>,
    Query(query): Query<ResizeQuery>,
) -> Answer<StatusCode> {
    blocking(move || machines.resize(&name, query.w, query.h)).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ConsoleQuery {
    line: Line,
}

/// A console over an upgraded connection, raw.
async fn console(
    State(machines): State<Arc<Machines>>,
    Path(name): Path<String>,
    Query(query): Query<ConsoleQuery>,
    request: axum::extract::Request,
) -> Answer<Response> {
    upgraded(request, move || machines.console(&name, query.line)).await
}

#[derive(Debug, Deserialize)]
struct VsockQuery {
    port: u32,
}

/// A socket of the guest over an upgraded connection, raw.
async fn vsock(
    State(machines): State<Arc<Machines>>,
    Path(name): Path<String>,
    Query(query): Query<VsockQuery>,
    request: axum::extract::Request,
) -> Answer<Response> {
    upgraded(request, move || machines.connect(&name, query.port)).await
}

/// Joins an upgraded connection with a stream of a machine.
async fn upgraded(
    request: axum::extract::Request,
    open: impl FnOnce() -> engine::Result<std::os::unix::net::UnixStream> + Send + 'static,
) -> Answer<Response> {
    if !request.headers().contains_key(header::UPGRADE) {
        return Err(Refusal(engine::Error::Invalid(
            "this needs a connection upgrade (Upgrade: tcp)".into(),
        )));
    }
    let stream = blocking(open).await?;
    tokio::spawn(async move {
        let Ok(upgraded) = hyper::upgrade::on(request).await else {
            return;
        };
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        let Ok(machine) = tokio::net::UnixStream::from_std(stream) else {
            return;
        };
        api_docker::hijack::pump(TokioIo::new(upgraded), machine).await;
    });
    let response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "tcp")
        .header(header::CONTENT_TYPE, "application/vnd.docker.raw-stream")
        .body(Body::empty());
    response.map_err(|e| {
        Refusal(engine::Error::Runtime {
            message: e.to_string(),
            kind: Kind::Internal,
        })
    })
}
