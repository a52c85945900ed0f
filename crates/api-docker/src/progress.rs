//! Long operations as newline-delimited JSON: each line a step, an error as the last one.
//!
//! The status line waits for the first word of the operation: what fails at once (a name nobody knows) is an
//! ordinary error with its status; what fails later arrives inside the stream, as `errorDetail`.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use engine::progress::{Cancel, Event, Progress};
use serde::Serialize;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::error::{Answer, ApiError};

/// Counts of one part are sent this often at most; words are always sent.
const PACE: Duration = Duration::from_millis(100);
/// Lines waiting for a slow client beyond which counts are dropped.
const BACKLOG: usize = 512;
/// Lines waiting for a slow client beyond which whoever makes them waits too.
const LONGEST_BACKLOG: usize = 4096;

/// One line, as Docker's `jsonmessage.JSONMessage`.
#[derive(Debug, Default, Serialize)]
pub struct Line {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    #[serde(rename = "progressDetail", skip_serializing_if = "Option::is_none")]
    pub detail: Option<Detail>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aux: Option<serde_json::Value>,
    #[serde(rename = "errorDetail", skip_serializing_if = "Option::is_none")]
    pub error_detail: Option<serde_json::Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The command that fixes the error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

/// How far a part is.
#[derive(Debug, Default, Serialize)]
pub struct Detail {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
}

/// The writing end of a stream of lines. Clones write to the same stream.
#[derive(Clone)]
pub struct Lines {
    inner: Arc<Inner>,
}

struct Inner {
    sender: UnboundedSender<Bytes>,
    waiting: Arc<AtomicUsize>,
    last: Mutex<HashMap<String, (String, Instant)>>,
}

impl Lines {
    /// Sends one line. A client that has gone is no error here: [`respond`] cancels the operation then.
    pub fn send(&self, line: &Line) {
        if let Ok(mut text) = serde_json::to_vec(line) {
            text.extend_from_slice(b"\r\n");
            self.inner.waiting.fetch_add(1, Ordering::Relaxed);
            let _ = self.inner.sender.send(text.into());
        }
    }

    /// A piece of a builder's output. It waits for a client that is far behind: call it where waiting is allowed.
    pub fn stream(&self, text: impl Into<String>) {
        while self.inner.waiting.load(Ordering::Relaxed) > LONGEST_BACKLOG
            && !self.inner.sender.is_closed()
        {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.send(&Line {
            stream: Some(text.into()),
            ..Line::default()
        });
    }

    /// A result for programs.
    pub fn aux(&self, value: serde_json::Value) {
        self.send(&Line {
            aux: Some(value),
            ..Line::default()
        });
    }

    fn is_due(&self, event: &Event) -> bool {
        let mut last = self
            .inner
            .last
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let now = Instant::now();
        let finished = event.current.is_some() && event.current == event.total;
        let shown = last.get(&event.id);
        let unchanged = shown.filter(|(status, _)| *status == event.status && !finished);
        if let Some((_, when)) = unchanged
            && (now.duration_since(*when) < PACE
                || self.inner.waiting.load(Ordering::Relaxed) > BACKLOG)
        {
            return false;
        }
        last.insert(event.id.clone(), (event.status.clone(), now));
        true
    }
}

impl Progress for Lines {
    fn report(&self, event: Event) {
        if event.current.is_some() && !self.is_due(&event) {
            return;
        }
        let bar = event.current.map(|current| bar(current, event.total));
        let about = !event.id.is_empty();
        self.send(&Line {
            status: Some(event.status),
            detail: about.then_some(Detail {
                current: event.current,
                total: event.total,
            }),
            progress: bar,
            id: about.then_some(event.id),
            ..Line::default()
        });
    }
}

/// `[====>   ]  1.5MB/3MB`, which clients of before API 1.22 print as it is (and docker-compose 1.29 still).
fn bar(current: u64, total: Option<u64>) -> String {
    let size = base::units::format_size_decimal;
    let Some(total) = total.filter(|total| *total > 0 && current <= *total) else {
        return size(current);
    };
    let filled = (current as u128 * 50 / total as u128) as usize;
    let head = if filled < 50 { ">" } else { "" };
    let space = 50 - filled - head.len();
    format!(
        "[{}{head}{}] {:>8}/{}",
        "=".repeat(filled),
        " ".repeat(space),
        size(current),
        size(total)
    )
}

/// Cancels when the response body is dropped before its end.
struct Guard(Cancel);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Runs `operation` and streams what it says.
///
/// # Errors
/// Where it fails before it said anything.
pub async fn respond<F, Fut>(operation: F) -> Answer
where
    F: FnOnce(Lines, Cancel) -> Fut,
    Fut: Future<Output = Result<(), ApiError>> + Send + 'static,
{
    let (sender, mut receiver) = unbounded_channel();
    let waiting = Arc::new(AtomicUsize::new(0));
    let inner = Inner {
        sender,
        waiting: waiting.clone(),
        last: Mutex::default(),
    };
    let lines = Lines {
        inner: Arc::new(inner),
    };
    let cancel = Cancel::default();
    let guard = Guard(cancel.clone());
    let mut task = tokio::spawn(operation(lines, cancel));
    let first = tokio::select! {
        biased;
        line = receiver.recv() => line,
        ended = &mut task => {
            outcome(ended)?;
            let rest = drain(&mut receiver);
            return Ok(json_lines(Body::from(rest)));
        }
    };
    // The operation holds the sender, so no line at all means that it has ended.
    let Some(first) = first else {
        outcome(task.await)?;
        return Ok(json_lines(Body::empty()));
    };
    let stream = futures_util::stream::unfold(
        (Some(first), receiver, Some(task), guard),
        move |(first, mut receiver, task, guard)| {
            let waiting = waiting.clone();
            async move {
                let line = match first {
                    Some(line) => Some(line),
                    None => receiver.recv().await,
                };
                if let Some(line) = line {
                    waiting.fetch_sub(1, Ordering::Relaxed);
                    return Some((Ok::<_, std::io::Error>(line), (None, receiver, task, guard)));
                }
                let error = outcome(task?.await).err()?;
                Some((Ok(error_line(&error)), (None, receiver, None, guard)))
            }
        },
    );
    Ok(json_lines(Body::from_stream(stream)))
}

fn drain(receiver: &mut UnboundedReceiver<Bytes>) -> Vec<u8> {
    let mut all = Vec::new();
    while let Ok(line) = receiver.try_recv() {
        all.extend_from_slice(&line);
    }
    all
}

fn outcome(ended: Result<Result<(), ApiError>, tokio::task::JoinError>) -> Result<(), ApiError> {
    ended.unwrap_or_else(|error| {
        tracing::error!(%error, "an operation ended by a defect");
        Err(ApiError::new(
            axum::http::StatusCode::INTERNAL_SERVER_ERROR,
            "the operation ended by a defect of the daemon; its log has more",
        ))
    })
}

/// The last line of an operation that failed.
fn error_line(error: &ApiError) -> Bytes {
    // The status and the fix are fields of our own.
    let mut detail =
        serde_json::json!({ "message": error.message, "status": error.status.as_u16() });
    if let Some(code) = error.code {
        detail["code"] = code.into();
    }
    let line = Line {
        error_detail: Some(detail),
        error: Some(error.message.clone()),
        fix: error.fix.clone(),
        ..Line::default()
    };
    let mut text = serde_json::to_vec(&line).unwrap_or_default();
    text.extend_from_slice(b"\r\n");
    text.into()
}

fn json_lines(body: Body) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn text(answer: Answer) -> String {
        let bytes = axum::body::to_bytes(answer.unwrap().into_body(), 1 << 20)
            .await
            .unwrap();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn an_early_failure_has_its_status_and_a_late_one_is_a_line() {
        let early = respond(|_, _| async { Err(ApiError::not_found("no such thing")) }).await;
        assert_eq!(early.unwrap_err().status, 404);
        let late = respond(|lines, _| async move {
            lines.report(Event::message("begun"));
            tokio::task::yield_now().await;
            Err(ApiError::not_found("gone"))
        });
        let late = text(late.await).await;
        assert!(late.starts_with("{\"status\":\"begun\"}\r\n"), "{late}");
        assert!(
            late.ends_with(
                "{\"errorDetail\":{\"message\":\"gone\",\"status\":404},\"error\":\"gone\"}\r\n"
            ),
            "{late}"
        );
    }

    #[tokio::test]
    async fn counts_are_paced_and_the_last_one_is_not_lost() {
        let all = respond(|lines, _| async move {
            for current in 0..=1000 {
                lines.report(Event::counted("abc", "Downloading", current, 1000));
            }
            Ok(())
        });
        let all = text(all.await).await;
        assert!(all.lines().count() < 20, "{all}");
        assert!(all.contains("\"current\":1000,\"total\":1000"));
        assert!(all.contains("==================================================]"));
    }

    #[tokio::test]
    async fn a_client_that_goes_cancels_the_operation() {
        let (seen, was) = tokio::sync::oneshot::channel();
        let answer = respond(|lines, cancel| async move {
            lines.report(Event::message("begun"));
            while !cancel.is_cancelled() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let _ = seen.send(());
            Ok(())
        });
        drop(answer.await);
        tokio::time::timeout(Duration::from_secs(10), was)
            .await
            .unwrap()
            .unwrap();
    }
}
