//! `POST /build`: the classic builder, as `DOCKER_BUILDKIT=0 docker build` speaks to it.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::routing::post;
use engine::Engine;
use engine::build::{BuildOptions, BuildOutput};
use engine::progress::{Event, Progress};

use crate::auth::{build_secrets, registry_config};
use crate::error::{Answer, ApiError};
use crate::images::{platform, reader};
use crate::progress::{self, Lines};
use crate::request::{Params, header_text};

pub(crate) fn router() -> Router<Arc<Engine>> {
    Router::new()
        .route("/build", post(build))
        .route("/build/prune", post(prune))
        .route("/build/cancel", post(async || StatusCode::NO_CONTENT))
}

/// To those who ask for BuildKit: what to do instead.
pub(crate) const NO_BUILDKIT: &str = "BuildKit is not part of Berth, whose own builder speaks the classic protocol: run `DOCKER_BUILDKIT=0 docker build …`, or `berth build …`";

/// A build's words as lines; with `q`, only its result.
struct Output {
    lines: Lines,
    quiet: bool,
}

impl BuildOutput for Output {
    fn write(&self, text: &str) {
        if !self.quiet {
            self.lines.stream(text);
        }
    }
}

impl Progress for Output {
    fn report(&self, event: Event) {
        if !self.quiet {
            self.lines.report(event);
        }
    }
}

fn options(params: &Params, headers: &HeaderMap) -> Result<BuildOptions, ApiError> {
    if params.get("version").is_some_and(|version| version != "1") {
        return Err(ApiError::new(StatusCode::NOT_IMPLEMENTED, NO_BUILDKIT));
    }
    if params.flag("squash") {
        return Err(ApiError::bad_request(
            "squash is only supported with experimental mode",
        ));
    }
    if params
        .get("securityopt")
        .is_some_and(|list| !matches!(list, "null" | "[]"))
    {
        return Err(ApiError::bad_request(
            "The daemon on this platform does not support setting security options on build",
        ));
    }
    if let Some(other) = params.get("isolation").filter(|name| *name != "default") {
        return Err(ApiError::bad_request(format!(
            "Unsupported isolation: {other:?}"
        )));
    }
    let tags = params
        .all("t")
        .into_iter()
        .filter(|tag| !tag.is_empty())
        .collect();
    let credentials = registry_config(header_text(headers, "x-registry-config"))?;
    Ok(BuildOptions {
        dockerfile: params.get("dockerfile").unwrap_or("Dockerfile").to_owned(),
        tags,
        arguments: params
            .json::<BTreeMap<String, Option<String>>>("buildargs")?
            .unwrap_or_default(),
        labels: params
            .json::<BTreeMap<String, String>>("labels")?
            .unwrap_or_default(),
        secrets: build_secrets(header_text(headers, "x-berth-build-secrets"))?,
        target: params.text("target"),
        no_cache: params.flag("nocache"),
        pull: params.flag("pull"),
        platform: platform(params)?,
        network: params.text("networkmode"),
        memory: params.number("memory")?.unwrap_or(0),
        cpu_quota: params.number("cpuquota")?.unwrap_or(0),
        cpu_period: params.number("cpuperiod")?.unwrap_or(0),
        cpu_shares: params.number("cpushares")?.unwrap_or(0),
        cpuset_cpus: params.text("cpusetcpus"),
        shm_size: params.number("shmsize")?.unwrap_or(0),
        ulimits: params
            .json::<Option<Vec<_>>>("ulimits")?
            .flatten()
            .unwrap_or_default(),
        extra_hosts: params
            .all("extrahosts")
            .into_iter()
            .filter(|host| !host.is_empty())
            .collect(),
        credentials: credentials
            .into_iter()
            .map(|(server, auth)| (server, auth.into()))
            .collect(),
    })
}

async fn build(
    State(engine): State<Arc<Engine>>,
    params: Params,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    let options = options(&params, &headers)?;
    let quiet = params.flag("q");
    let context = match params.get("remote") {
        None => reader(body),
        Some("client-session") => {
            return Err(ApiError::new(StatusCode::NOT_IMPLEMENTED, NO_BUILDKIT));
        }
        Some(address) => engine.remote_context(address).await?,
    };
    progress::respond(move |lines, cancel| async move {
        let output = Arc::new(Output {
            lines: lines.clone(),
            quiet,
        });
        let id = engine.build_image(context, options, output, cancel).await?;
        lines.aux(serde_json::json!({ "ID": id }));
        if quiet {
            lines.stream(format!("{id}\n"));
        }
        Ok(())
    })
    .await
}

async fn prune(State(engine): State<Arc<Engine>>) -> Answer {
    let space = engine.prune_builds().await?;
    Ok(Json(serde_json::json!({ "CachesDeleted": [], "SpaceReclaimed": space })).into_response())
}
