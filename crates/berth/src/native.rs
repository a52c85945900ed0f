//! The daemon's own few endpoints beside the Docker Engine API: its end.

use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::post;
use engine::Engine;
use tokio_util::sync::CancellationToken;

/// Everything the daemon answers.
pub fn router(engine: Arc<Engine>, stop: CancellationToken) -> Router {
    let own = Router::new().route(
        "/berth/v1/shutdown",
        post(move || {
            let stop = stop.clone();
            async move {
                // The answer goes out before the listeners close.
                tokio::spawn(async move {
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    stop.cancel();
                });
                StatusCode::NO_CONTENT
            }
        }),
    );
    api_docker::router(engine).merge(own)
}
