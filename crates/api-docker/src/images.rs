//! `/images/…`, `/distribution/…`. Names hold slashes, so what comes after them is told by the last part.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use axum::Extension;
use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use engine::Engine;
use engine::image::{Credentials, ImageInspect, ImportOptions};
use futures_util::TryStreamExt;
use serde_json::{Value, json};
use tokio_util::io::StreamReader;

use crate::auth::RegistryAuth;
use crate::containers::streamed;
use crate::error::{Answer, ApiError};
use crate::progress;
use crate::request::{Params, header_text};
use crate::version::ApiVersion;

pub(crate) fn router() -> Router<Arc<Engine>> {
    Router::new()
        .route("/images/json", get(list))
        .route("/images/create", post(create))
        .route("/images/load", post(load))
        .route("/images/get", get(save))
        .route("/images/prune", post(prune))
        .route("/images/search", get(search))
        .route("/images/{*rest}", any(one))
        .route("/distribution/{*rest}", get(distribution))
}

impl From<RegistryAuth> for Credentials {
    fn from(auth: RegistryAuth) -> Credentials {
        Credentials {
            username: auth.username,
            password: auth.password,
            identity_token: auth.identitytoken,
            registry_token: auth.registrytoken,
        }
    }
}

pub(crate) fn credentials(headers: &HeaderMap) -> Result<Credentials, ApiError> {
    Ok(RegistryAuth::from_header(header_text(headers, "x-registry-auth"))?.into())
}

/// A body as a reader.
pub(crate) fn reader(body: Body) -> engine::image::ArchiveReader {
    Box::pin(StreamReader::new(
        body.into_data_stream().map_err(io::Error::other),
    ))
}

/// `"linux/arm64/v8"`, or JSON as newer clients send it; empty is this host's.
pub(crate) fn platform(params: &Params) -> Result<String, ApiError> {
    let Some(text) = params.get("platform") else {
        return Ok(String::new());
    };
    if !text.starts_with('{') {
        return Ok(text.to_owned());
    }
    let fields: BTreeMap<String, Value> = params.json("platform")?.unwrap_or_default();
    let field = |name: &str| fields.get(name).and_then(Value::as_str).unwrap_or_default();
    let all = [field("os"), field("architecture"), field("variant")];
    Ok(all
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("/"))
}

async fn list(
    State(engine): State<Arc<Engine>>,
    Extension(version): Extension<ApiVersion>,
    params: Params,
) -> Answer {
    let mut filters = params.filters()?;
    if let Some(name) = params.get("filter") {
        filters.add("reference", name);
    }
    let images = engine
        .list_images(params.flag("all"), filters, params.flag("shared-size"))
        .await?;
    let mut rows = serde_json::to_value(images).map_err(internal)?;
    for row in rows.as_array_mut().into_iter().flatten() {
        if version < ApiVersion::minor(44) {
            row["VirtualSize"] = row["Size"].clone();
        }
        if version < ApiVersion::minor(43) {
            for (field, none) in [
                ("RepoTags", "<none>:<none>"),
                ("RepoDigests", "<none>@<none>"),
            ] {
                if row[field].as_array().is_none_or(Vec::is_empty) {
                    row[field] = json!([none]);
                }
            }
        }
    }
    Ok(Json(rows).into_response())
}

fn internal(error: serde_json::Error) -> ApiError {
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
}

/// Pull (`fromImage`) or import (`fromSrc`).
async fn create(
    State(engine): State<Arc<Engine>>,
    params: Params,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    let platform = platform(&params)?;
    if let Some(from) = params.get("fromImage") {
        let tag = params.text("tag");
        let name = match tag.as_str() {
            "" => from.to_owned(),
            tag if tag.starts_with("sha256:") => format!("{from}@{tag}"),
            tag => format!("{from}:{tag}"),
        };
        let credentials = credentials(&headers)?;
        return progress::respond(move |lines, cancel| async move {
            engine
                .pull_image(&name, &platform, credentials, Arc::new(lines), cancel)
                .await?;
            Ok(())
        })
        .await;
    }
    let source = params
        .get("fromSrc")
        .ok_or_else(|| {
            ApiError::bad_request("one of the parameters fromImage and fromSrc is needed")
        })?
        .to_owned();
    let options = ImportOptions {
        repository: params.text("repo"),
        tag: params.text("tag"),
        message: params.text("message"),
        platform,
        changes: params
            .all("changes")
            .into_iter()
            .filter(|change| !change.is_empty())
            .collect(),
    };
    progress::respond(move |lines, cancel| async move {
        let archive = match source.as_str() {
            "-" => reader(body),
            address => {
                // dockerd takes an address without a scheme for http.
                let address = match address.contains("://") {
                    true => address.to_owned(),
                    false => format!("http://{address}"),
                };
                let archive = engine.fetch(&address).await?;
                lines.send(&progress::Line {
                    status: Some(format!("Downloading from {address}")),
                    ..Default::default()
                });
                archive
            }
        };
        let id = engine.import_image(archive, options, cancel).await?;
        lines.send(&progress::Line {
            status: Some(id),
            ..Default::default()
        });
        Ok(())
    })
    .await
}

async fn load(State(engine): State<Arc<Engine>>, params: Params, body: Body) -> Answer {
    let quiet = params.flag_or("quiet", false);
    let archive = reader(body);
    let platform = platform(&params)?;
    progress::respond(move |lines, cancel| async move {
        let listener: Arc<dyn engine::progress::Progress> = match quiet {
            true => Arc::new(engine::progress::Silent),
            false => Arc::new(lines.clone()),
        };
        for name in engine
            .load_images(archive, &platform, listener, cancel)
            .await?
        {
            let text = match name.starts_with("sha256:") {
                true => format!("Loaded image ID: {name}\n"),
                false => format!("Loaded image: {name}\n"),
            };
            lines.stream(text);
        }
        Ok(())
    })
    .await
}

async fn save(State(engine): State<Arc<Engine>>, params: Params) -> Answer {
    let names: Vec<String> = params
        .all("names")
        .into_iter()
        .filter(|name| !name.is_empty())
        .collect();
    if names.is_empty() {
        return Err(ApiError::bad_request("parameter names is missing"));
    }
    Ok(streamed(
        "application/x-tar",
        engine.save_images(names, &platform(&params)?).await?,
    ))
}

async fn prune(State(engine): State<Arc<Engine>>, params: Params) -> Answer {
    Ok(Json(engine.prune_images(params.filters()?).await?).into_response())
}

async fn search() -> Answer {
    Err(ApiError::new(
        StatusCode::NOT_IMPLEMENTED,
        "searching is not supported: it is a service of Docker Hub, which Berth does not ask: pull the image by its name (docker pull NAME), or list a registry's images at its /v2/_catalog",
    ))
}

/// `/images/NAME/VERB`, and `DELETE /images/NAME`.
async fn one(
    State(engine): State<Arc<Engine>>,
    Extension(version): Extension<ApiVersion>,
    Path(rest): Path<String>,
    params: Params,
    request: Request,
) -> Answer {
    if request.method() == Method::DELETE {
        let deleted = engine
            .remove_image(&rest, params.flag("force"), !params.flag("noprune"))
            .await?;
        return Ok(Json(deleted).into_response());
    }
    let Some((name, verb)) = rest.rsplit_once('/') else {
        return Err(crate::no_such_page());
    };
    match (request.method(), verb) {
        (&Method::GET, "json") => {
            let image = engine.inspect_image(name).await?;
            Ok(Json(inspect_as_of(&image, version)?).into_response())
        }
        (&Method::GET, "history") => Ok(Json(engine.image_history(name).await?).into_response()),
        (&Method::GET, "get") => Ok(streamed(
            "application/x-tar",
            engine
                .save_images(vec![name.to_owned()], &platform(&params)?)
                .await?,
        )),
        (&Method::POST, "tag") => {
            engine
                .tag_image(name, &params.text("repo"), &params.text("tag"))
                .await?;
            Ok(StatusCode::CREATED.into_response())
        }
        (&Method::POST, "push") => {
            let credentials = credentials(request.headers())?;
            let (name, tag) = (name.to_owned(), params.text("tag"));
            progress::respond(move |lines, cancel| async move {
                let listener = Arc::new(lines.clone());
                for sent in engine
                    .push_image(&name, &tag, credentials, listener, cancel)
                    .await?
                {
                    lines.aux(json!({ "Tag": sent.tag, "Digest": sent.digest, "Size": sent.size }));
                }
                Ok(())
            })
            .await
        }
        _ => Err(crate::no_such_page()),
    }
}

/// Fields that older versions of the API had.
fn inspect_as_of(image: &ImageInspect, version: ApiVersion) -> Result<Value, ApiError> {
    let mut value = serde_json::to_value(image).map_err(internal)?;
    // docker-compose 1.29 speaks the newest version and cannot recreate a container without this.
    value["ContainerConfig"] = value["Config"].clone();
    if version < ApiVersion::minor(45) {
        value["Container"] = json!("");
    }
    if version < ApiVersion::minor(44) {
        value["VirtualSize"] = value["Size"].clone();
    }
    Ok(value)
}

async fn distribution(
    State(engine): State<Arc<Engine>>,
    Path(rest): Path<String>,
    headers: HeaderMap,
) -> Answer<Response> {
    let Some(name) = rest.strip_suffix("/json") else {
        return Err(crate::no_such_page());
    };
    let found = engine.distribution(name, credentials(&headers)?).await?;
    Ok(Json(found).into_response())
}
