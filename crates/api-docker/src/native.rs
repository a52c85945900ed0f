//! `/berth/v1/…`: what Docker has no word for.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use engine::Engine;
use image::{BootstrapOptions, Reference};
use serde::Deserialize;

use crate::error::{Answer, ApiError};
use crate::progress;
use crate::request::JsonBody;

pub(crate) fn router() -> Router<Arc<Engine>> {
    Router::new().route("/berth/v1/images/bootstrap", post(bootstrap))
}

/// The body of `POST /berth/v1/images/bootstrap`. Either `Name` (`debian:bookworm`) or `Distribution` and `Suite`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default, deny_unknown_fields)]
struct Bootstrap {
    name: String,
    distribution: String,
    suite: String,
    arch: String,
    packages: Vec<String>,
    components: Vec<String>,
    mirror: Option<String>,
    keyring: Option<PathBuf>,
    with_kernel: bool,
    /// The image's names; without, those that follow from the suite.
    tags: Vec<String>,
}

/// Streams progress as a pull does; the last line has the image's id in `aux.ID`.
async fn bootstrap(State(engine): State<Arc<Engine>>, body: JsonBody<Bootstrap>) -> Answer {
    let body = body.required("the body is missing: write {\"Name\": \"debian:bookworm\"}")?;
    let mut options = match (body.name.as_str(), body.suite.as_str()) {
        ("", "") => {
            return Err(ApiError::bad_request(
                "a Name such as debian:bookworm is needed, or a Suite",
            ));
        }
        ("", _) => BootstrapOptions {
            distribution: if body.distribution.is_empty() {
                "debian".into()
            } else {
                body.distribution
            },
            suite: body.suite,
            ..BootstrapOptions::default()
        },
        (name, "") => BootstrapOptions::named(name).map_err(|error| ApiError::of(&error))?,
        _ => return Err(ApiError::bad_request("give either Name or Suite, not both")),
    };
    options.arch = body.arch;
    options.packages = body.packages;
    options.components = body.components;
    options.mirror = body.mirror;
    options.keyring = body.keyring;
    options.with_kernel = body.with_kernel;
    let tags = body.tags.iter().map(|tag| Reference::parse(tag));
    options.tags = tags
        .collect::<Result<_, _>>()
        .map_err(|error| ApiError::of(&error))?;
    progress::respond(move |lines, cancel| async move {
        let id = engine
            .bootstrap_image(options, Arc::new(lines.clone()), cancel)
            .await?;
        lines.aux(serde_json::json!({ "ID": id }));
        Ok(())
    })
    .await
}
