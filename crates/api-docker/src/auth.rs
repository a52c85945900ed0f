//! Registry credentials in headers: `X-Registry-Auth`, `X-Registry-Config`.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::alphabet::URL_SAFE;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use engine::build::Secret;
use serde::{Deserialize, Serialize};

use crate::error::ApiError;

/// Clients differ in padding; the alphabet is the URL-safe one (RFC 4648, section 5).
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The credentials for one registry, as Docker's clients send them.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RegistryAuth {
    pub username: String,
    pub password: String,
    /// `user:password` in base64, instead of the two.
    pub auth: String,
    pub email: String,
    pub serveraddress: String,
    pub identitytoken: String,
    pub registrytoken: String,
}

// Passwords do not belong into logs.
impl std::fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryAuth")
            .field("username", &self.username)
            .field("serveraddress", &self.serveraddress)
            .finish_non_exhaustive()
    }
}

impl RegistryAuth {
    /// Reads `X-Registry-Auth`; an absent or empty header means no credentials.
    ///
    /// # Errors
    /// 400 where it is no base64 of JSON.
    pub fn from_header(header: Option<&str>) -> Result<RegistryAuth, ApiError> {
        let Some(text) = header.map(str::trim).filter(|text| !text.is_empty()) else {
            return Ok(RegistryAuth::default());
        };
        let mut auth: RegistryAuth = decode(text, "X-Registry-Auth")?;
        auth.unfold();
        Ok(auth)
    }

    /// Splits `auth` into user and password where only it is given.
    pub fn unfold(&mut self) {
        if !self.username.is_empty() || self.auth.is_empty() {
            return;
        }
        let standard = GeneralPurpose::new(
            &base64::alphabet::STANDARD,
            GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
        );
        let Ok(bytes) = standard
            .decode(&self.auth)
            .or_else(|_| BASE64.decode(&self.auth))
        else {
            return;
        };
        if let Some((user, password)) = String::from_utf8_lossy(&bytes).split_once(':') {
            self.username = user.to_owned();
            self.password = password.trim_end_matches('\0').to_owned();
        }
    }

    /// Whether there is nothing in it to authenticate with.
    pub fn is_anonymous(&self) -> bool {
        self.username.is_empty() && self.identitytoken.is_empty() && self.registrytoken.is_empty()
    }
}

/// Reads `X-Registry-Config` (the builder's credentials, by registry).
///
/// # Errors
/// 400 where it is no base64 of JSON.
pub fn registry_config(header: Option<&str>) -> Result<BTreeMap<String, RegistryAuth>, ApiError> {
    let Some(text) = header.map(str::trim).filter(|text| !text.is_empty()) else {
        return Ok(BTreeMap::new());
    };
    let mut all: BTreeMap<String, RegistryAuth> =
        decode::<Option<_>>(text, "X-Registry-Config")?.unwrap_or_default();
    all.values_mut().for_each(RegistryAuth::unfold);
    Ok(all)
}

/// Reads `X-Berth-Build-Secrets`: base64 of a JSON object, of each secret's content in base64 by its id.
///
/// # Errors
/// 400 where it is not that.
pub fn build_secrets(header: Option<&str>) -> Result<BTreeMap<String, Secret>, ApiError> {
    const NAME: &str = "X-Berth-Build-Secrets";
    let Some(text) = header.map(str::trim).filter(|text| !text.is_empty()) else {
        return Ok(BTreeMap::new());
    };
    let encoded: BTreeMap<String, String> = decode(text, NAME)?;
    encoded
        .into_iter()
        .map(|(id, content)| {
            let content = base64::engine::general_purpose::STANDARD
                .decode(content)
                .map_err(|error| {
                    ApiError::bad_request(format!("invalid {NAME} header: secret {id:?}: {error}"))
                })?;
            Ok((id, Secret(content)))
        })
        .collect()
}

fn decode<T: for<'a> Deserialize<'a>>(text: &str, header: &str) -> Result<T, ApiError> {
    let wrong = |why: String| ApiError::bad_request(format!("invalid {header} header: {why}"));
    // Some clients use the standard alphabet; the two differ in two characters only.
    let text: String = text
        .chars()
        .map(|c| match c {
            '+' => '-',
            '/' => '_',
            c => c,
        })
        .collect();
    let bytes = BASE64
        .decode(text)
        .map_err(|error| wrong(error.to_string()))?;
    serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))
}

/// `value` as the URL-safe base64 of its JSON, as `X-Docker-Container-Path-Stat` carries it.
pub fn encode_json(value: &impl Serialize) -> String {
    let json = serde_json::to_vec(value).unwrap_or_default();
    base64::engine::general_purpose::STANDARD.encode(json)
}

/// Fuzz entry: any header is read or refused.
pub fn fuzz_registry_auth(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let _ = RegistryAuth::from_header(Some(&text));
    let _ = registry_config(Some(&text));
    let _ = build_secrets(Some(&text));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn credentials_come_through_every_spelling_of_base64() {
        let json = br#"{"username":"u","password":"p?>~","serveraddress":"r:5000"}"#;
        for text in [
            base64::engine::general_purpose::URL_SAFE.encode(json),
            base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(json),
            base64::engine::general_purpose::STANDARD.encode(json),
        ] {
            let auth = RegistryAuth::from_header(Some(&text)).unwrap();
            assert_eq!(
                (auth.username.as_str(), auth.password.as_str()),
                ("u", "p?>~")
            );
        }
        assert!(RegistryAuth::from_header(None).unwrap().is_anonymous());
        assert!(RegistryAuth::from_header(Some("{}")).is_err());
    }

    #[test]
    fn a_folded_pair_is_unfolded_and_never_printed() {
        let mut auth = RegistryAuth {
            auth: "dTpzZWNyZXQ=".into(),
            ..Default::default()
        };
        auth.unfold();
        assert_eq!(
            (auth.username.as_str(), auth.password.as_str()),
            ("u", "secret")
        );
        assert!(!format!("{auth:?}").contains("secret"));
    }

    proptest! {
        #[test]
        fn no_header_panics(text in ".{0,80}") {
            fuzz_registry_auth(text.as_bytes());
        }

        #[test]
        fn no_json_inside_panics(text in r#"[{}\[\]":,a0-9usernamepassword]{0,60}"#) {
            fuzz_registry_auth(base64::engine::general_purpose::URL_SAFE.encode(text).as_bytes());
        }
    }
}
