//! Errors as clients get them: a status and `{"message": …}`.

use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use base::{Classified, Kind};

/// What a handler answers.
pub type Answer<T = Response> = Result<T, ApiError>;

/// A refusal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// The command that fixes it; a field of our own, which Docker's clients do not read.
    pub fix: Option<String>,
    /// Of a command that failed in a build: clients end with it.
    pub code: Option<i32>,
}

impl ApiError {
    /// Any status with any text.
    pub fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError {
            status,
            message: message.into(),
            fix: None,
            code: None,
        }
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, message)
    }

    /// 404.
    pub fn not_found(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, message)
    }

    /// An error of any room, by its kind.
    pub fn of(error: &impl Classified) -> ApiError {
        let status = StatusCode::from_u16(error.kind().http_status());
        ApiError {
            status: status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            message: error.to_string(),
            fix: error.fix(),
            code: None,
        }
    }
}

impl From<engine::Error> for ApiError {
    fn from(error: engine::Error) -> ApiError {
        if error.kind() == Kind::Internal && !matches!(error, engine::Error::Step { .. }) {
            tracing::warn!(%error, "request failed");
        }
        let mut answer = ApiError::of(&error);
        match error {
            engine::Error::Unauthorized(_) => answer.status = StatusCode::UNAUTHORIZED,
            engine::Error::Step { code, .. } => answer.code = Some(code),
            _ => {}
        }
        answer
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.status == StatusCode::NOT_MODIFIED {
            return self.status.into_response();
        }
        let mut body = serde_json::json!({ "message": self.message });
        if let Some(fix) = self.fix {
            body["fix"] = fix.into();
        }
        let headers = [(header::CONTENT_TYPE, "application/json")];
        (self.status, headers, Body::from(format!("{body}\n"))).into_response()
    }
}
