//! Connections: unix sockets in, the router on each, a shutdown that lets answers finish.

use std::io;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::sniff::Sniffed;

/// How long a connection may take to send a request's head, and may idle between two (dockerd: 5 minutes).
const HEAD_TIMEOUT: Duration = Duration::from_secs(300);

/// How long a shutdown waits for answers that are being written.
const GRACE: Duration = Duration::from_secs(5);

/// Serves `router` on every listener until `shutdown` is cancelled.
///
/// Answers under way get five seconds to finish; hijacked streams (attach, exec) belong to the containers,
/// end with the connection, and are not waited for.
///
/// # Errors
/// The first failure of accept(2) that is not the loss of one connection or a passing lack of descriptors.
pub async fn serve(
    listeners: Vec<UnixListener>,
    router: Router,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let connections = TaskTracker::new();
    let stop = shutdown.child_token();
    let mut acceptors = tokio::task::JoinSet::new();
    for listener in listeners {
        acceptors.spawn(accept(
            listener,
            router.clone(),
            stop.clone(),
            connections.clone(),
        ));
    }
    let mut outcome = Ok(());
    while let Some(ended) = acceptors.join_next().await {
        if let Err(error) = ended.map_err(io::Error::other).and_then(|inner| inner) {
            outcome = Err(error);
            stop.cancel();
        }
    }
    stop.cancel();
    connections.close();
    let _ = tokio::time::timeout(GRACE, connections.wait()).await;
    outcome
}

async fn accept(
    listener: UnixListener,
    router: Router,
    stop: CancellationToken,
    connections: TaskTracker,
) -> io::Result<()> {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return Ok(()),
        };
        match accepted {
            Ok((stream, _)) => {
                connections.spawn(connection(stream, router.clone(), stop.clone()));
            }
            Err(error) if passing(&error) => {
                tracing::warn!(%error, "a connection was lost before it was accepted");
                // Without descriptors accept(2) fails at once, again and again.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(error) => return Err(error),
        }
    }
}

fn passing(error: &io::Error) -> bool {
    use io::ErrorKind as E;
    // EMFILE, ENFILE, ENOBUFS and ENOMEM have no stable kinds of their own.
    matches!(
        error.kind(),
        E::ConnectionAborted | E::ConnectionReset | E::Interrupted | E::OutOfMemory
    ) || matches!(error.raw_os_error(), Some(23 | 24 | 105))
}

async fn connection(stream: UnixStream, router: Router, stop: CancellationToken) {
    let service = TowerToHyperService::new(router);
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(Sniffed::new(stream)), service)
        .with_upgrades();
    tokio::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        // A client that hangs up in the middle (`docker logs -f`, Ctrl-C) is everyday life.
        tracing::debug!(%error, "connection ended");
    }
}
