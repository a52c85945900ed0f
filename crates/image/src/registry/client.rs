//! Requests to one registry: where it is, who we are, and trying again.

use std::collections::HashMap;
use std::sync::OnceLock;
use std::time::Duration;

use base64::Engine as _;
use futures_util::StreamExt;
use reqwest::header::{AUTHORIZATION, HeaderMap, WWW_AUTHENTICATE};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::auth::{Challenge, Credentials, parse_challenge};
use super::{Trust, is_local};
use crate::config::MAX_DOCUMENT;
use crate::error::At;
use crate::reference::DEFAULT_DOMAIN;
use crate::{Error, Result};

/// How often a request is tried, with doubling pauses from 200 ms.
pub(crate) const ATTEMPTS: u32 = 5;

/// A connection to one registry.
pub struct Client {
    http: reqwest::Client,
    /// For long bodies; see [`Client::for_uploads`].
    uploads: OnceLock<reqwest::Client>,
    authorities: Vec<reqwest::Certificate>,
    /// Whether nobody need vouch for the registry's certificate.
    unproven: bool,
    /// `https://registry.test:5000`.
    base: String,
    domain: String,
    credentials: Option<Credentials>,
    /// The Authorization header by scope; `*` for all.
    authorization: Mutex<HashMap<String, String>>,
}

#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
}

#[derive(Deserialize)]
struct Errors {
    errors: Vec<OneError>,
}

#[derive(Deserialize)]
struct OneError {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

fn builder(
    domain: &str,
    unproven: bool,
    authorities: &[reqwest::Certificate],
) -> reqwest::ClientBuilder {
    let builder = reqwest::Client::builder()
        .user_agent(concat!("berth/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(Duration::from_secs(15))
        .http1_only()
        .danger_accept_invalid_certs(unproven);
    let builder = match is_local(domain) {
        true => builder.no_proxy(),
        false => builder,
    };
    authorities
        .iter()
        .cloned()
        .fold(builder, reqwest::ClientBuilder::add_root_certificate)
}

impl Client {
    /// Finds out how the registry speaks.
    ///
    /// # Errors
    /// [`Error::Unreachable`], [`Error::Untrusted`], and [`Error::Io`] for an authority's file.
    pub async fn connect(
        domain: &str,
        credentials: Option<Credentials>,
        trust: &Trust,
    ) -> Result<Client> {
        let host = if domain == DEFAULT_DOMAIN {
            "registry-1.docker.io"
        } else {
            domain
        };
        let lax = trust.is_lax(domain);
        let mut authorities = Vec::new();
        for path in &trust.authorities {
            let pem = tokio::fs::read(path).await.at(path)?;
            authorities.extend(
                reqwest::Certificate::from_pem_bundle(&pem)
                    .map_err(|e| Error::malformed(path.display().to_string(), chain(&e)))?,
            );
        }
        let unreachable = |why: String| Error::Unreachable {
            registry: domain.to_owned(),
            why,
        };
        let unproven = lax || is_local(domain);
        let http = builder(domain, unproven, &authorities)
            .read_timeout(Duration::from_secs(60))
            .build()
            .map_err(|e| unreachable(chain(&e)))?;
        let mut base = format!("https://{host}");
        if lax {
            // A plain registry on this machine is the usual case; one with TLS answers 400 to plain requests.
            let plain = format!("http://{host}");
            let answer = http.get(format!("{plain}/v2/")).send().await;
            match answer {
                Ok(response) if response.status() != StatusCode::BAD_REQUEST => base = plain,
                Err(error) if error.is_connect() && is_local(domain) => {
                    return Err(unreachable(chain(&error)));
                }
                _ => {}
            }
        }
        Ok(Client {
            http,
            uploads: OnceLock::new(),
            authorities,
            unproven,
            base,
            domain: domain.to_owned(),
            credentials,
            authorization: Mutex::new(HashMap::new()),
        })
    }

    /// The registry's name.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Whether the registry answers and takes the credentials.
    pub async fn check(&self) -> Result<()> {
        let response = self.send(Method::GET, "/v2/", "", |r| r).await?;
        self.expect(response, "a version check").await.map(drop)
    }

    /// The address of a path of the registry, or of the absolute or relative address a `Location` header holds.
    pub(crate) fn address(&self, path: &str) -> String {
        if path.starts_with("http://") || path.starts_with("https://") {
            path.to_owned()
        } else if path.starts_with('/') {
            format!("{}{path}", self.base)
        } else {
            format!("{}/{path}", self.base)
        }
    }

    /// Sends a request without a body of its own that could be sent but once; answers to overload and cut
    /// connections are tried again.
    ///
    /// # Errors
    /// [`Error::Unreachable`], [`Error::Denied`]; other answers are the caller's to judge.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        scope: &str,
        shape: impl Fn(RequestBuilder) -> RequestBuilder,
    ) -> Result<Response> {
        let mut pause = Duration::from_millis(200);
        for attempt in 1.. {
            let result = self
                .send_once(&self.http, method.clone(), path, scope, &shape)
                .await;
            let again = match &result {
                Ok(response) => {
                    response.status() == StatusCode::TOO_MANY_REQUESTS
                        || response.status().is_server_error()
                }
                Err(Error::Unreachable { .. }) => true,
                Err(_) => false,
            };
            if !again || attempt >= ATTEMPTS {
                return result;
            }
            let asked = result.as_ref().ok().and_then(|r| retry_after(r.headers()));
            tokio::time::sleep(asked.unwrap_or(pause)).await;
            pause *= 2;
        }
        unreachable!("the loop returns at the last attempt")
    }

    /// What long bodies are sent with: it waits for an answer without end, since that time includes their sending.
    ///
    /// # Errors
    /// [`Error::Unreachable`].
    pub(crate) fn for_uploads(&self) -> Result<&reqwest::Client> {
        if let Some(made) = self.uploads.get() {
            return Ok(made);
        }
        let made = builder(&self.domain, self.unproven, &self.authorities)
            .build()
            .map_err(|error| self.unreachable(&error))?;
        Ok(self.uploads.get_or_init(|| made))
    }

    /// [`Client::send`] once by `http`, but again with an authorization where the registry demands one; `shape` is asked for
    /// each try.
    pub(crate) async fn send_once(
        &self,
        http: &reqwest::Client,
        method: Method,
        path: &str,
        scope: &str,
        shape: impl Fn(RequestBuilder) -> RequestBuilder,
    ) -> Result<Response> {
        let address = self.address(path);
        // An upload may be taken by another host, which has no business with our tokens.
        let own = address.starts_with(&self.base);
        for attempt in 0..2 {
            let mut request = shape(http.request(method.clone(), &address));
            if own && let Some(header) = self.authorization_for(scope).await {
                request = request.header(AUTHORIZATION, header);
            }
            let response = request.send().await.map_err(|e| self.unreachable(&e))?;
            if response.status() != StatusCode::UNAUTHORIZED || !own {
                return Ok(response);
            }
            if attempt == 0 && self.authorize(&response, scope).await? {
                continue;
            }
            return Err(self.denied(scope, error_text(response).await));
        }
        unreachable!("the second attempt returns")
    }

    async fn authorization_for(&self, scope: &str) -> Option<String> {
        let kept = self.authorization.lock().await;
        kept.get("*").or_else(|| kept.get(scope)).cloned()
    }

    /// Answers the challenge; false where there is nothing new to offer.
    async fn authorize(&self, response: &Response, scope: &str) -> Result<bool> {
        let challenge = response
            .headers()
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|h| parse_challenge(h.to_str().ok()?))
            .max_by_key(|c| matches!(c, Challenge::Bearer { .. }));
        let (of, header) = match (challenge, &self.credentials) {
            (None, _) | (Some(Challenge::Basic), None) => return Ok(false),
            (Some(Challenge::Basic), Some(credentials)) => ("*".to_owned(), basic(credentials)),
            (
                Some(Challenge::Bearer {
                    realm,
                    service,
                    scope: asked,
                }),
                credentials,
            ) => {
                let wanted = if scope.is_empty() {
                    asked.unwrap_or_default()
                } else {
                    scope.to_owned()
                };
                let token = self
                    .token(&realm, service.as_deref(), &wanted, credentials.as_ref())
                    .await?;
                (scope.to_owned(), format!("Bearer {token}"))
            }
        };
        self.authorization.lock().await.insert(of, header);
        Ok(true)
    }

    async fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: &str,
        credentials: Option<&Credentials>,
    ) -> Result<String> {
        if let Some(token) = credentials
            .map(|c| &c.registrytoken)
            .filter(|t| !t.is_empty())
        {
            return Ok(token.clone());
        }
        if self.base.starts_with("https:") && !realm.starts_with("https:") {
            return Err(self.denied(
                scope,
                format!("it wants the credentials sent without TLS, to {realm}"),
            ));
        }
        let mut query: Vec<(&str, &str)> = Vec::new();
        if let Some(service) = service {
            query.push(("service", service));
        }
        // Several scopes are several parameters here, and words of one in a form (RFC 6749).
        let scopes = scope
            .split(' ')
            .filter(|s| !s.is_empty())
            .map(|s| ("scope", s));
        let request = match credentials {
            Some(c) if !c.identitytoken.is_empty() => {
                query.extend([
                    ("scope", scope),
                    ("grant_type", "refresh_token"),
                    ("refresh_token", c.identitytoken.as_str()),
                    ("client_id", "berth"),
                ]);
                let form: Vec<String> = query
                    .iter()
                    .map(|(key, value)| format!("{key}={}", escape(value)))
                    .collect();
                self.http
                    .post(realm)
                    .header("content-type", "application/x-www-form-urlencoded")
                    .body(form.join("&"))
            }
            Some(c) => {
                query.extend(scopes);
                query.push(("account", c.username.as_str()));
                self.http
                    .get(realm)
                    .query(&query)
                    .header(AUTHORIZATION, basic(c))
            }
            None => {
                query.extend(scopes);
                self.http.get(realm).query(&query)
            }
        };
        let response = request.send().await.map_err(|e| self.unreachable(&e))?;
        if !response.status().is_success() {
            return Err(self.denied(scope, error_text(response).await));
        }
        let body = read_limited(response, 1 << 20)
            .await
            .map_err(|why| self.denied(scope, why))?;
        let token: Token = serde_json::from_slice(&body)
            .map_err(|e| self.denied(scope, format!("an unreadable token: {e}")))?;
        let text = if token.token.is_empty() {
            token.access_token
        } else {
            token.token
        };
        if text.is_empty() {
            Err(self.denied(scope, "an empty token".to_owned()))
        } else {
            Ok(text)
        }
    }

    /// The response, if it is a success.
    ///
    /// # Errors
    /// [`Error::Registry`] with the registry's own words.
    pub(crate) async fn expect(&self, response: Response, what: &str) -> Result<Response> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let why = error_text(response).await;
        if status == StatusCode::FORBIDDEN {
            return Err(Error::Denied {
                registry: self.domain.clone(),
                what: what.to_owned(),
                why,
            });
        }
        Err(Error::Registry {
            registry: self.domain.clone(),
            what: what.to_owned(),
            status: status.as_u16(),
            why,
        })
    }

    /// A small document.
    pub(crate) async fn document(&self, response: Response, what: &str) -> Result<Vec<u8>> {
        read_limited(response, MAX_DOCUMENT)
            .await
            .map_err(|why| Error::Malformed {
                what: what.to_owned(),
                why,
            })
    }

    fn unreachable(&self, error: &reqwest::Error) -> Error {
        let (registry, mut why) = (self.domain.clone(), chain(error));
        if why.contains("CaUsedAsEndEntity") {
            why = "its certificate is an authority's own (CA:TRUE): give the server one that the authority signed"
                .to_owned();
            return Error::Untrusted { registry, why };
        }
        if why.contains("invalid peer certificate") {
            Error::Untrusted { registry, why }
        } else {
            Error::Unreachable { registry, why }
        }
    }

    fn denied(&self, scope: &str, why: String) -> Error {
        let what = scope
            .split(':')
            .nth(1)
            .filter(|r| !r.is_empty())
            .unwrap_or("it")
            .to_owned();
        Error::Denied {
            registry: self.domain.clone(),
            what,
            why,
        }
    }
}

fn basic(credentials: &Credentials) -> String {
    let pair = format!("{}:{}", credentials.username, credentials.password);
    format!(
        "Basic {}",
        base64::engine::general_purpose::STANDARD.encode(pair)
    )
}

/// Percent-encodes all but the unreserved characters (RFC 3986, section 2.3).
pub(crate) fn escape(text: &str) -> String {
    text.bytes()
        .map(|b| match b {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(b).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect()
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: u64 = headers.get("retry-after")?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds.min(30)))
}

async fn read_limited(response: Response, limit: u64) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    let mut stream = response.bytes_stream();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|e| chain(&e))?;
        if body.len() as u64 + chunk.len() as u64 > limit {
            return Err(format!(
                "it is larger than {}",
                base::units::format_size(limit)
            ));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

async fn error_text(response: Response) -> String {
    let status = response.status();
    let body = read_limited(response, 64 << 10).await.unwrap_or_default();
    if let Ok(errors) = serde_json::from_slice::<Errors>(&body)
        && let Some(first) = errors.errors.first()
    {
        return if first.message.is_empty() {
            first.code.clone()
        } else {
            first.message.clone()
        };
    }
    status.canonical_reason().unwrap_or("no reason").to_owned()
}

/// An error with its causes, which reqwest keeps from its own text.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}
