//! The Docker Engine API (versions 1.24 to 1.50) over the engine, and Berth's own endpoints beside it.
//!
//! Every path is served with and without `/v1.NN`. What Docker has no word for is below `/berth/v1/`.
//! This crate translates; what is done, the engine does.

pub mod absent;
pub mod auth;
pub mod build;
pub mod containers;
pub mod error;
pub mod hijack;
pub mod images;
pub mod native;
pub mod networks;
pub mod progress;
pub mod request;
pub mod serve;
pub mod sniff;
pub mod system;
pub mod version;
pub mod volumes;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use engine::Engine;

pub use error::ApiError;
pub use serve::serve;

/// The whole API over `engine`. More routes (`/berth/v1/doctor`, machines) are merged into it by [`Router::merge`].
pub fn router(engine: Arc<Engine>) -> Router {
    let inner = Router::new()
        .merge(absent::router())
        .merge(build::router())
        .merge(containers::router())
        .merge(images::router())
        .merge(native::router())
        .merge(networks::router())
        .merge(system::router())
        .merge(volumes::router())
        .method_not_allowed_fallback(async || no_such_page())
        .fallback(async || no_such_page())
        // Archives and build contexts are as large as they are; JSON bodies have a limit of their own.
        .layer(DefaultBodyLimit::disable())
        .with_state(engine);
    Router::new().fallback_service(version::Versioned::new(inner))
}

/// dockerd's answer to a path that it does not know.
pub(crate) fn no_such_page() -> ApiError {
    ApiError::not_found("page not found")
}
