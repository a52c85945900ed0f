//! Files by their address: build contexts and archives that a client names instead of sending.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};

use crate::registry::chain;
use crate::{Error, Result};

/// A file on its way.
pub struct Fetched {
    /// Bytes, where the server says.
    pub length: Option<u64>,
    /// When the file was last changed, where the server says; seconds since 1970.
    pub modified: Option<i64>,
    pub body: std::pin::Pin<Box<dyn Stream<Item = std::io::Result<Bytes>> + Send>>,
}

/// Fetches `url` by HTTP; redirects are followed, proxies are the environment's.
///
/// # Errors
/// [`Error::Invalid`] for an address that is none, [`Error::Unreachable`], and [`Error::NotFound`] for any answer that
/// is not the file.
pub async fn fetch(url: &str) -> Result<Fetched> {
    let parsed = reqwest::Url::parse(url)
        .map_err(|error| Error::Invalid(format!("{url:?} is not an address: {error}")))?;
    if !matches!(parsed.scheme(), "http" | "https") {
        return Err(Error::Invalid(format!(
            "{url:?}: only http:// and https:// can be fetched"
        )));
    }
    let host = parsed.host_str().unwrap_or_default().to_owned();
    let unreachable = |error: &reqwest::Error| Error::Unreachable {
        registry: host.clone(),
        why: chain(error),
    };
    let client = reqwest::Client::builder()
        .user_agent(concat!("berth/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(Duration::from_secs(15))
        .read_timeout(Duration::from_secs(60))
        .build()
        .map_err(|error| unreachable(&error))?;
    let response = client
        .get(parsed)
        .send()
        .await
        .map_err(|error| unreachable(&error))?;
    if !response.status().is_success() {
        return Err(Error::NotFound {
            what: url.to_owned(),
            why: format!("the server answers {}", response.status()),
        });
    }
    let modified = response
        .headers()
        .get("last-modified")
        .and_then(|value| jiff::fmt::rfc2822::parse(value.to_str().ok()?).ok())
        .map(|time| time.timestamp().as_second());
    Ok(Fetched {
        length: response.content_length(),
        modified,
        body: Box::pin(response.bytes_stream().map_err(std::io::Error::other)),
    })
}
