//! The version prefix of a path: `/v1.41/containers/json` and `/containers/json` are the same resource.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response, Uri};
use axum::response::IntoResponse;
use tower::Service;

use crate::error::ApiError;

/// The version of the Docker Engine API that is spoken unless the path names another.
pub const CURRENT: ApiVersion = ApiVersion {
    major: 1,
    minor: 50,
};
/// The oldest version a path may name.
pub const OLDEST: ApiVersion = ApiVersion {
    major: 1,
    minor: 24,
};

/// The API version of a request, found among its extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ApiVersion {
    pub major: u16,
    pub minor: u16,
}

impl ApiVersion {
    /// Version 1.`minor`.
    pub const fn minor(minor: u16) -> ApiVersion {
        ApiVersion { major: 1, minor }
    }
}

impl std::fmt::Display for ApiVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Splits `/v1.41/rest` into the version and `/rest`; `None` where the path has no version.
pub fn split(path: &str) -> Option<(ApiVersion, &str)> {
    let (first, rest) = path.strip_prefix("/v")?.split_once('/')?;
    let (major, minor) = first.split_once('.')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(major) || !digits(minor) {
        return None;
    }
    let number = |text: &str| text.parse::<u16>().unwrap_or(u16::MAX);
    let version = ApiVersion {
        major: number(major),
        minor: number(minor),
    };
    Some((version, &path[path.len() - rest.len() - 1..]))
}

/// Takes the version off the path before the router sees it.
#[derive(Clone)]
pub struct Versioned {
    inner: Router,
}

impl Versioned {
    pub fn new(inner: Router) -> Versioned {
        Versioned { inner }
    }
}

impl Service<Request<Body>> for Versioned {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let version = match take_version(&mut request) {
            Ok(version) => version,
            Err(error) => return Box::pin(async move { Ok(error.into_response()) }),
        };
        request.extensions_mut().insert(version);
        let request = request.map(crate::request::Lingering::body);
        let answer = self.inner.clone().call(request);
        Box::pin(async move {
            let mut response = answer.await?;
            let headers = response.headers_mut();
            let text = |text: String| axum::http::HeaderValue::try_from(text).ok();
            for (name, value) in [
                ("api-version", text(CURRENT.to_string())),
                ("docker-experimental", text("false".into())),
                ("ostype", text("linux".into())),
                (
                    "server",
                    text(format!("Berth/{} (linux)", env!("CARGO_PKG_VERSION"))),
                ),
            ] {
                if let Some(value) = value {
                    headers.insert(name, value);
                }
            }
            Ok(response)
        })
    }
}

fn take_version(request: &mut Request<Body>) -> Result<ApiVersion, ApiError> {
    let own = request.uri().path().to_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    // `docker rm --link` names a link by its path, slashes and all, where everything else has one word.
    let link = |path: &str| match path.strip_prefix("/containers/") {
        Some(name)
            if request.method() == axum::http::Method::DELETE
                && query
                    .split('&')
                    .any(|part| matches!(part, "link=1" | "link=true")) =>
        {
            format!("/containers/{}", name.replace('/', "%2F"))
        }
        _ => path.to_owned(),
    };
    let (version, rest) = match split(&own) {
        Some((version, rest)) => (version, link(rest)),
        None => {
            let rest = link(&own);
            if rest == own {
                return Ok(CURRENT);
            }
            (CURRENT, rest)
        }
    };
    if version < OLDEST {
        return Err(ApiError::bad_request(format!(
            "client version {version} is too old. Minimum supported API version is {OLDEST}, please upgrade your client to a newer version"
        )));
    }
    if version > CURRENT {
        return Err(ApiError::bad_request(format!(
            "client version {version} is too new. Maximum supported API version is {CURRENT}"
        )));
    }
    let rest = match request.uri().query() {
        Some(query) => format!("{rest}?{query}"),
        None => rest,
    };
    let mut parts = request.uri().clone().into_parts();
    parts.path_and_query = Some(
        rest.parse()
            .map_err(|error| ApiError::bad_request(format!("malformed path: {error}")))?,
    );
    *request.uri_mut() = Uri::from_parts(parts)
        .map_err(|error| ApiError::bad_request(format!("malformed path: {error}")))?;
    Ok(version)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_version_is_split_off_and_nothing_else_is() {
        assert_eq!(split("/v1.41/info"), Some((ApiVersion::minor(41), "/info")));
        assert_eq!(
            split("/v1.41/volumes/a/b"),
            Some((ApiVersion::minor(41), "/volumes/a/b"))
        );
        assert_eq!(split("/volumes/a"), None);
        assert_eq!(split("/version"), None);
        assert_eq!(split("/v1.x/info"), None);
    }

    proptest! {
        #[test]
        fn no_path_panics(path in "/v?[0-9./a-zé]{0,30}") {
            let _ = split(&path);
        }
    }
}
