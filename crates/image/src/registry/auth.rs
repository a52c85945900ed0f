//! Who asks: credentials, and the challenges registries answer with (RFC 7235; Docker registry token specification).

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use serde::Deserialize;

use crate::{Error, Result};

/// What `docker login` keeps and the `X-Registry-Auth` header carries.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Credentials {
    pub username: String,
    pub password: String,
    pub serveraddress: String,
    /// A refresh token, instead of a password.
    pub identitytoken: String,
    /// A bearer token to use as it is.
    pub registrytoken: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({:?}, …)", self.username)
    }
}

impl Credentials {
    /// Reads the header: base64 (either alphabet, padded or not) of JSON. Empty or `{}`: none.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn from_header(header: &str) -> Result<Option<Credentials>> {
        let text: String = header
            .trim()
            .trim_end_matches('=')
            .chars()
            .map(|c| match c {
                '-' => '+',
                '_' => '/',
                c => c,
            })
            .collect();
        if text.is_empty() {
            return Ok(None);
        }
        let wrong = || {
            Error::Invalid("the X-Registry-Auth header is not base64 of a JSON object".to_owned())
        };
        let json = base64::engine::general_purpose::STANDARD_NO_PAD
            .decode(text)
            .map_err(|_| wrong())?;
        let credentials: Credentials = serde_json::from_slice(&json).map_err(|_| wrong())?;
        let empty = credentials.username.is_empty()
            && credentials.identitytoken.is_empty()
            && credentials.registrytoken.is_empty();
        Ok((!empty).then_some(credentials))
    }
}

/// What a registry demands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

/// Reads a `WWW-Authenticate` header.
pub(crate) fn parse_challenge(header: &str) -> Option<Challenge> {
    let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let mut values = parameters(rest);
    Some(Challenge::Bearer {
        realm: values.remove("realm")?,
        service: values.remove("service"),
        scope: values.remove("scope"),
    })
}

/// `key="value",key=value`, quotes with `\` before what is taken as it is.
fn parameters(text: &str) -> BTreeMap<String, String> {
    let mut values = BTreeMap::new();
    let mut characters = text.chars().peekable();
    loop {
        let key: String = std::iter::from_fn(|| characters.next_if(|c| *c != '=')).collect();
        if characters.next().is_none() {
            return values;
        }
        let mut value = String::new();
        if characters.next_if_eq(&'"').is_some() {
            while let Some(c) = characters.next() {
                match c {
                    '"' => break,
                    '\\' => value.extend(characters.next()),
                    c => value.push(c),
                }
            }
        } else {
            value.extend(std::iter::from_fn(|| characters.next_if(|c| *c != ',')));
        }
        values.insert(
            key.trim_matches([' ', ',']).to_ascii_lowercase(),
            value.trim().to_owned(),
        );
    }
}

/// Fuzz entry.
pub fn fuzz_challenge(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let _ = parse_challenge(&text);
    let _ = Credentials::from_header(&text);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn challenges_are_read() {
        let header = r#"Bearer realm="https://auth.test/token",service="registry.test",scope="repository:a/b:pull,push""#;
        assert_eq!(
            parse_challenge(header),
            Some(Challenge::Bearer {
                realm: "https://auth.test/token".to_owned(),
                service: Some("registry.test".to_owned()),
                scope: Some("repository:a/b:pull,push".to_owned()),
            })
        );
        assert_eq!(parse_challenge("Basic realm=\"x\""), Some(Challenge::Basic));
        assert_eq!(parse_challenge("Negotiate"), None);
    }

    #[test]
    fn credentials_come_out_of_the_header_and_stay_out_of_the_log() {
        let header = base64::engine::general_purpose::URL_SAFE
            .encode(r#"{"username":"u","password":"p?>"}"#);
        let credentials = Credentials::from_header(&header).unwrap().unwrap();
        assert_eq!(
            (credentials.username.as_str(), credentials.password.as_str()),
            ("u", "p?>")
        );
        assert!(!format!("{credentials:?}").contains("p?>"));
        assert_eq!(Credentials::from_header("e30=").unwrap(), None);
        assert_eq!(Credentials::from_header("").unwrap(), None);
        assert!(Credentials::from_header("%%%").is_err());
    }

    proptest! {
        #[test]
        fn no_header_panics(text in "(Bearer |Basic |[a-z=\",\\\\ ]){0,20}") {
            fuzz_challenge(text.as_bytes());
        }
    }
}
