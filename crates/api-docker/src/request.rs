//! Reading requests: query parameters with Go's notion of truth, and JSON bodies with dockerd's refusals.

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, FromRequestParts, Query};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Request, StatusCode, header};
use engine::Filters;
use serde::de::DeserializeOwned;

use crate::error::ApiError;

/// Longest JSON body. The largest real ones (a container with thousands of labels) are below 1 MiB.
const LONGEST_BODY: usize = 8 << 20;

/// The query parameters, in order.
#[derive(Debug, Clone, Default)]
pub struct Params(Vec<(String, String)>);

impl Params {
    /// The first value of `name`; `None` where absent or empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
            .filter(|v| !v.is_empty())
    }

    /// The first value of `name`, or the empty text.
    pub fn text(&self, name: &str) -> String {
        self.get(name).unwrap_or_default().to_owned()
    }

    /// All values of `name`.
    pub fn all(&self, name: &str) -> Vec<String> {
        self.0
            .iter()
            .filter(|(key, _)| key == name)
            .map(|(_, value)| value.clone())
            .collect()
    }

    /// Whether `name` is true: present, and none of `0`, `no`, `false`, `none`.
    pub fn flag(&self, name: &str) -> bool {
        self.flag_or(name, false)
    }

    /// [`Params::flag`] with what an absent one means.
    pub fn flag_or(&self, name: &str, absent: bool) -> bool {
        match self
            .get(name)
            .map(|value| value.trim().to_ascii_lowercase())
        {
            None => absent,
            Some(value) => !matches!(value.as_str(), "" | "0" | "no" | "false" | "none"),
        }
    }

    /// A whole number.
    ///
    /// # Errors
    /// 400 for anything else.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, ApiError> {
        let Some(text) = self.get(name) else {
            return Ok(None);
        };
        text.parse().map(Some).map_err(|_| {
            ApiError::bad_request(format!(
                "invalid value {text:?} of parameter {name}: a number is wanted"
            ))
        })
    }

    /// A point in time; `0` and an empty text are none.
    ///
    /// # Errors
    /// 400 where it is no time.
    pub fn moment(&self, name: &str) -> Result<Option<jiff::Timestamp>, ApiError> {
        match self.get(name) {
            None | Some("0") => Ok(None),
            Some(text) => base::time::parse_moment(text).map(Some).map_err(|error| {
                ApiError::bad_request(format!("invalid value for {name:?}: {error}"))
            }),
        }
    }

    /// The parameter `filters`.
    ///
    /// # Errors
    /// 400 where it is malformed.
    pub fn filters(&self) -> Result<Filters, ApiError> {
        Ok(Filters::parse(self.get("filters").unwrap_or_default())?)
    }

    /// A parameter that holds JSON; `None` where absent.
    ///
    /// # Errors
    /// 400 where it is malformed.
    pub fn json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, ApiError> {
        let Some(text) = self.get(name) else {
            return Ok(None);
        };
        serde_json::from_str(text).map_err(|error| {
            ApiError::bad_request(format!("invalid JSON in parameter {name}: {error}"))
        })
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Params, ApiError> {
        let query = Query::<Vec<(String, String)>>::from_request_parts(parts, state).await;
        let Query(pairs) =
            query.map_err(|error| ApiError::bad_request(format!("malformed query: {error}")))?;
        Ok(Params(pairs))
    }
}

/// What older clients send and no engine heeds any more.
const FORGOTTEN: [&str; 10] = [
    "KernelMemory",
    "KernelMemoryTCP",
    "DiskQuota",
    "PublishService",
    "CheckDuplicate",
    "Cpuset",
    // Of an exec: said in the path, at its start, and in another spelling.
    "Container",
    "Detach",
    "detachKeys",
    // Said in HostConfig, which is where it is read.
    "Runtime",
];

/// Refuses fields that nobody reads, where they say something: a misspelt limit must not be none. Told by what `value`,
/// read from `input`, would write again; a field that is null, empty, zero or false says nothing.
///
/// # Errors
/// 400 with the name of the first.
pub fn refuse_unknown(
    input: &serde_json::Value,
    value: &impl serde::Serialize,
) -> Result<(), ApiError> {
    let written = serde_json::to_value(value)
        .map_err(|error| ApiError::bad_request(format!("invalid JSON: {error}")))?;
    match unknown(input, &written, &mut String::new()) {
        None => Ok(()),
        Some(name) => Err(ApiError::bad_request(format!(
            "invalid JSON: unknown field {name:?}: this daemon would not heed it; check its spelling, or leave it out"
        ))),
    }
}

fn unknown(
    input: &serde_json::Value,
    written: &serde_json::Value,
    path: &mut String,
) -> Option<String> {
    use serde_json::Value;
    let says_something = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::Bool(true) => true,
    };
    let length = path.len();
    let mut below = |name: &str, input: &Value, written: Option<&Value>| {
        path.truncate(length);
        if length > 0 {
            path.push('.');
        }
        path.push_str(name);
        match written {
            Some(written) => unknown(input, written, path),
            None => (says_something(input) && !FORGOTTEN.contains(&name)).then(|| path.clone()),
        }
    };
    match (input, written) {
        (Value::Object(input), Value::Object(written)) => input
            .iter()
            .find_map(|(name, value)| below(name, value, written.get(name))),
        (Value::Array(input), Value::Array(written)) => input
            .iter()
            .zip(written)
            .enumerate()
            .find_map(|(index, (value, written))| below(&index.to_string(), value, Some(written))),
        _ => None,
    }
}

/// A JSON body; `None` where the request has none.
#[derive(Debug)]
pub struct JsonBody<T>(pub Option<T>);

/// A JSON body of which every field that says something is known.
#[derive(Debug)]
pub struct StrictBody<T>(pub Option<T>);

impl<T> StrictBody<T> {
    /// The body, or 400 with `missing`.
    ///
    /// # Errors
    /// 400 where there is none.
    pub fn required(self, missing: &str) -> Result<T, ApiError> {
        JsonBody(self.0).required(missing)
    }
}

impl<T: DeserializeOwned + serde::Serialize, S: Send + Sync> FromRequest<S> for StrictBody<T> {
    type Rejection = ApiError;
    async fn from_request(request: Request<Body>, state: &S) -> Result<StrictBody<T>, ApiError> {
        let JsonBody(Some(input)) =
            JsonBody::<serde_json::Value>::from_request(request, state).await?
        else {
            return Ok(StrictBody(None));
        };
        let value = T::deserialize(&input)
            .map_err(|error| ApiError::bad_request(format!("invalid JSON: {error}")))?;
        refuse_unknown(&input, &value)?;
        Ok(StrictBody(Some(value)))
    }
}

impl<T> JsonBody<T> {
    /// The body, or 400 with `missing`.
    ///
    /// # Errors
    /// 400 where there is none.
    pub fn required(self, missing: &str) -> Result<T, ApiError> {
        self.0.ok_or_else(|| ApiError::bad_request(missing))
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;
    async fn from_request(request: Request<Body>, _: &S) -> Result<JsonBody<T>, ApiError> {
        let (parts, body) = request.into_parts();
        let bytes = read_limited(body, LONGEST_BODY).await?;
        parse_json(&parts.headers, &bytes).map(JsonBody)
    }
}

/// The whole body, up to `limit` bytes.
///
/// # Errors
/// 413 where it is longer, 400 where the client broke off.
pub async fn read_limited(body: Body, limit: usize) -> Result<Bytes, ApiError> {
    axum::body::to_bytes(body, limit).await.map_err(|error| {
        let mut source: Option<&dyn std::error::Error> = Some(&error);
        while let Some(cause) = source {
            if cause.is::<http_body_util::LengthLimitError>() {
                return ApiError::new(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    format!("the request body is longer than {limit} bytes"),
                );
            }
            source = cause.source();
        }
        ApiError::bad_request(format!("the request body could not be read: {error}"))
    })
}

/// Reads a body as dockerd does: an empty one is none, the type must be JSON, nothing may follow the value.
///
/// # Errors
/// 400 with what is wrong.
pub fn parse_json<T: DeserializeOwned>(
    headers: &HeaderMap,
    bytes: &[u8],
) -> Result<Option<T>, ApiError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let kind = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    if essence.is_empty() {
        return Err(ApiError::bad_request(
            "malformed Content-Type header (): mime: no media type",
        ));
    }
    if !essence.eq_ignore_ascii_case("application/json") {
        return Err(ApiError::bad_request(format!(
            "unsupported Content-Type header ({kind}): must be 'application/json'"
        )));
    }
    let mut values = serde_json::Deserializer::from_slice(bytes).into_iter::<Option<T>>();
    let value = match values.next() {
        None => {
            return Err(ApiError::bad_request(
                "invalid JSON: got EOF while reading request body",
            ));
        }
        Some(Err(error)) if error.is_eof() => {
            return Err(ApiError::bad_request("invalid JSON: unexpected EOF"));
        }
        Some(Err(error)) => return Err(ApiError::bad_request(format!("invalid JSON: {error}"))),
        Some(Ok(value)) => value,
    };
    if bytes[values.byte_offset()..]
        .iter()
        .any(|b| !b.is_ascii_whitespace())
    {
        return Err(ApiError::bad_request("unexpected content after JSON"));
    }
    Ok(value)
}

/// How long what a client still sends is read away after its request was refused.
const LINGER: std::time::Duration = std::time::Duration::from_secs(10);

/// A request's body that is read to its end even when nobody wants the rest: a client that is still sending when it is
/// refused reads the answer only if its connection is not broken meanwhile.
pub struct Lingering(Option<Body>);

impl Lingering {
    pub fn body(inner: Body) -> Body {
        Body::new(Lingering(Some(inner)))
    }
}

impl hyper::body::Body for Lingering {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Bytes>, axum::Error>>> {
        match &mut self.0 {
            Some(inner) => std::pin::Pin::new(inner).poll_frame(context),
            None => std::task::Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(hyper::body::Body::is_end_stream)
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.0
            .as_ref()
            .map(hyper::body::Body::size_hint)
            .unwrap_or_default()
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        let Some(body) = self.0.take() else { return };
        if hyper::body::Body::is_end_stream(&body) {
            return;
        }
        if let Ok(reactor) = tokio::runtime::Handle::try_current() {
            reactor.spawn(tokio::time::timeout(LINGER, async move {
                use futures_util::StreamExt;
                let mut rest = body.into_data_stream();
                while let Some(Ok(_)) = rest.next().await {}
            }));
        }
    }
}

/// A header's text, where it is there and is text.
pub fn header_text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Fuzz entry: any body of a container's creation is read or refused.
pub fn fuzz_json_body(data: &[u8]) {
    let mut headers = HeaderMap::new();
    headers.insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static("application/json"),
    );
    if let Ok(Some(value)) = parse_json::<serde_json::Value>(&headers, data) {
        if let Ok(body) = crate::containers::CreateBody::try_from(value.clone()) {
            let _ = refuse_unknown(&value, &body.host);
        }
        let _ = serde_json::from_value::<engine::container::UpdateConfig>(value.clone());
        let _ = serde_json::from_value::<engine::exec::ExecConfig>(value.clone());
        let _ = serde_json::from_value::<engine::network::NetworkCreate>(value.clone());
        let _ = serde_json::from_value::<engine::volume::VolumeCreate>(value);
    }
    let _ = Filters::parse(&String::from_utf8_lossy(data));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn json(kind: &'static str, body: &str) -> Result<Option<serde_json::Value>, ApiError> {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
        parse_json(&headers, body.as_bytes())
    }

    #[test]
    fn bodies_are_refused_in_dockerds_words() {
        let message = |result: Result<_, ApiError>| result.unwrap_err().message;
        assert_eq!(json("text/plain", "").unwrap(), None);
        assert!(
            message(json("text/plain", "{}"))
                .starts_with("unsupported Content-Type header (text/plain)")
        );
        assert!(message(json("application/json", "{")).starts_with("invalid JSON: "));
        assert_eq!(
            message(json("application/json", " ")),
            "invalid JSON: got EOF while reading request body"
        );
        assert_eq!(
            message(json("application/json", "{} {}")),
            "unexpected content after JSON"
        );
        assert!(
            json("application/json; charset=utf-8", "{}\n")
                .unwrap()
                .is_some()
        );
        assert!(message(json("", "{}")).starts_with("malformed Content-Type"));
    }

    #[test]
    fn truth_is_what_go_clients_call_it() {
        let params = Params(vec![
            ("a".into(), "1".into()),
            ("b".into(), "False".into()),
            ("c".into(), "".into()),
        ]);
        assert!(
            params.flag("a") && !params.flag("b") && !params.flag("c") && params.flag_or("d", true)
        );
    }

    #[test]
    fn a_misspelt_field_is_refused_by_name_and_an_empty_one_is_not() {
        let refused = |text: &str| {
            let value: serde_json::Value = serde_json::from_str(text).unwrap();
            crate::containers::CreateBody::try_from(value).map_err(|error| error.message)
        };
        for (text, name) in [
            (r#"{"Image":"a","Imagee":"b"}"#, "Imagee"),
            (r#"{"HostConfig":{"Memroy":1}}"#, "HostConfig.Memroy"),
            (
                r#"{"HostConfig":{"Mounts":[{"Type":"bind","Sauce":"/x"}]}}"#,
                "HostConfig.Mounts.0.Sauce",
            ),
            (
                r#"{"NetworkingConfig":{"EndpointsConfig":{"n":{"Alias":["x"]}}}}"#,
                "NetworkingConfig.EndpointsConfig.n.Alias",
            ),
        ] {
            let error = refused(text).unwrap_err();
            assert!(error.contains(&format!("{name:?}")), "{error}");
        }
        for text in [
            r#"{"Image":"a","New":null,"HostConfig":{"Newer":false,"Newest":[],"KernelMemory":5}}"#,
            r#"{"Cmd":"words","ExposedPorts":{"80/tcp":{}},"Volumes":{"/x":{}},"Labels":{"Any":"1"}}"#,
            r#"{"HostConfig":{"PortBindings":{"80/tcp":[{"HostPort":"1"}]},"LogConfig":{"Type":"none","Config":{"a":"b"}}}}"#,
        ] {
            refused(text).unwrap();
        }
    }

    proptest! {
        #[test]
        fn no_body_panics(text in r#"[{}\[\]":,a-zA-Z0-9 ]{0,80}"#) {
            fuzz_json_body(text.as_bytes());
        }

        #[test]
        fn no_field_of_a_known_name_panics(name in "(Image|Cmd|HostConfig|NetworkingConfig|Env|Labels|ExposedPorts)", value in r#"(null|1|"x"|\[\]|\[1\]|\{\}|\{"a":1\}|\{"Binds":"x"\})"#) {
            fuzz_json_body(format!("{{{name:?}:{value}}}").as_bytes());
        }
    }
}
