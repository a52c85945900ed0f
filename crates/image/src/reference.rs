//! Names of images, read and written exactly as Docker does (the grammar of `distribution/reference`).
//!
//! ```text
//! reference   [domain "/"] path [":" tag] ["@" digest]
//! domain      host [":" port]      only if it holds "." or ":" or is "localhost" or has upper case
//! path        component {"/" component}    component  [a-z0-9]+ ((_|__|-+|.) [a-z0-9]+)*
//! tag         [A-Za-z0-9_] [A-Za-z0-9_.-]{0,127}
//! ```

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Digest, Error, Result};

/// The registry of names that name none.
pub const DEFAULT_DOMAIN: &str = "docker.io";
const OFFICIAL: &str = "library/";

/// A normalised image name: where, what, which.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reference {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Reads a name as a user writes it; without tag and digest it stays without ([`Reference::or_latest`]).
    ///
    /// # Errors
    /// [`Error::Reference`] with what is wrong with it.
    pub fn parse(text: &str) -> Result<Reference> {
        let wrong = |why| Error::Reference(text.chars().take(300).collect(), why);
        if text.is_empty() {
            return Err(wrong("it is empty"));
        }
        if text.len() > 4096 {
            return Err(wrong("it is too long"));
        }
        if text.len() == 64 && Digest::from_hex(text).is_ok() {
            return Err(wrong(
                "a name cannot be 64 hexadecimal digits, which is an image id",
            ));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (
                rest,
                Some(
                    digest
                        .parse()
                        .map_err(|_| wrong("the digest after @ is not sha256 and 64 digits"))?,
                ),
            ),
            None => (text, None),
        };
        // A colon after the last slash begins the tag; one before it belongs to a port.
        let after_slash = rest.rfind('/').map_or(0, |i| i + 1);
        let (name, tag) = match rest[after_slash..].find(':') {
            Some(colon) => (
                &rest[..after_slash + colon],
                Some(&rest[after_slash + colon + 1..]),
            ),
            None => (rest, None),
        };
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            return Err(wrong(
                "the tag after : must be 1 to 128 letters, digits, _ . or -",
            ));
        }
        let (domain, path) = match name.split_once('/') {
            Some((first, remainder))
                if first.contains(['.', ':'])
                    || first == "localhost"
                    || first.bytes().any(|b| b.is_ascii_uppercase()) =>
            {
                (first, remainder.to_owned())
            }
            _ => (DEFAULT_DOMAIN, name.to_owned()),
        };
        let domain = if domain == "index.docker.io" {
            DEFAULT_DOMAIN
        } else {
            domain
        };
        if !is_domain(domain) {
            return Err(wrong("the registry's host name is malformed"));
        }
        let path = if domain == DEFAULT_DOMAIN && !path.contains('/') {
            format!("{OFFICIAL}{path}")
        } else {
            path
        };
        if path.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(wrong("repository name must be lowercase"));
        }
        if path.len() + domain.len() > 255 {
            return Err(wrong("the repository name is longer than 255 characters"));
        }
        if !path.split('/').all(is_component) {
            return Err(wrong(
                "each part must be lower-case letters and digits, parted by single . or _ or __ or dashes",
            ));
        }
        Ok(Reference {
            domain: domain.to_owned(),
            path,
            tag: tag.map(str::to_owned),
            digest,
        })
    }

    /// This name, with the tag `latest` where it has neither tag nor digest.
    pub fn or_latest(mut self) -> Reference {
        if self.tag.is_none() && self.digest.is_none() {
            self.tag = Some("latest".to_owned());
        }
        self
    }

    /// The registry's host and port; `docker.io` where none was named.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The path in the registry, `library/debian`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The tag, if any.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if any.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// `docker.io/library/debian`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// `debian`: the repository as Docker shows it.
    pub fn familiar_repository(&self) -> String {
        if self.domain != DEFAULT_DOMAIN {
            return self.repository();
        }
        match self.path.strip_prefix(OFFICIAL) {
            Some(short) if !short.contains('/') => short.to_owned(),
            _ => self.path.clone(),
        }
    }

    /// `debian:12`, `debian@sha256:…`: the whole name as Docker shows it.
    pub fn familiar(&self) -> String {
        self.with_repository(self.familiar_repository())
    }

    fn with_repository(&self, mut name: String) -> String {
        if let Some(tag) = &self.tag {
            name.push(':');
            name.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            name.push('@');
            name.push_str(&digest.to_string());
        }
        name
    }

    /// The same repository with this tag alone.
    ///
    /// # Errors
    /// [`Error::Reference`] where it is no tag.
    pub fn with_tag(&self, tag: &str) -> Result<Reference> {
        if !is_tag(tag) {
            return Err(Error::Reference(tag.to_owned(), "it is not a tag"));
        }
        Ok(Reference {
            tag: Some(tag.to_owned()),
            digest: None,
            ..self.clone()
        })
    }

    /// The same repository with this digest alone.
    pub fn with_digest(&self, digest: Digest) -> Reference {
        Reference {
            tag: None,
            digest: Some(digest),
            ..self.clone()
        }
    }
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (1..=128).contains(&tag.len())
        && word(tag.as_bytes()[0])
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

fn is_domain(domain: &str) -> bool {
    let (host, port) = if let Some(end) = domain.strip_prefix('[') {
        let Some((address, rest)) = end.split_once(']') else {
            return false;
        };
        if address.is_empty() || !address.bytes().all(|b| b.is_ascii_hexdigit() || b == b':') {
            return false;
        }
        match rest.strip_prefix(':') {
            Some(port) => ("v6", Some(port)),
            None if rest.is_empty() => ("v6", None),
            None => return false,
        }
    } else {
        match domain.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (domain, None),
        }
    };
    let label = |label: &str| {
        !label.is_empty()
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    host.split('.').all(label)
        && port.is_none_or(|p| !p.is_empty() && p.len() <= 5 && p.parse::<u16>().is_ok())
}

fn is_component(component: &str) -> bool {
    let mut separator = 0usize;
    let mut before = 0u8;
    for byte in component.bytes() {
        match byte {
            b'a'..=b'z' | b'0'..=b'9' => separator = 0,
            b'.' | b'_' | b'-' => {
                separator += 1;
                let allowed = match byte {
                    b'-' => separator == 1 || before == b'-',
                    b'_' => separator == 1 || (separator == 2 && before == b'_'),
                    _ => separator == 1,
                };
                if !allowed || before == 0 {
                    return false;
                }
            }
            _ => return false,
        }
        before = byte;
    }
    before != 0 && separator == 0
}

impl fmt::Display for Reference {
    /// The canonical form, `docker.io/library/debian:12`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.with_repository(self.repository()))
    }
}

impl FromStr for Reference {
    type Err = Error;
    fn from_str(text: &str) -> Result<Reference> {
        Reference::parse(text)
    }
}

impl TryFrom<String> for Reference {
    type Error = Error;
    fn try_from(text: String) -> Result<Reference> {
        Reference::parse(&text)
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> String {
        reference.to_string()
    }
}

/// Fuzz entry: no text panics, and what is read is read again from its own form.
pub fn fuzz_reference(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(reference) = Reference::parse(text)
    {
        assert_eq!(
            Reference::parse(&reference.to_string()).ok(),
            Some(reference.clone())
        );
        assert_eq!(
            Reference::parse(&reference.familiar()).ok(),
            Some(reference)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn canonical(text: &str) -> String {
        Reference::parse(text).unwrap().or_latest().to_string()
    }

    #[test]
    fn names_are_completed_as_docker_does() {
        assert_eq!(canonical("debian"), "docker.io/library/debian:latest");
        assert_eq!(canonical("debian:12"), "docker.io/library/debian:12");
        assert_eq!(canonical("me/app"), "docker.io/me/app:latest");
        assert_eq!(
            canonical("index.docker.io/debian"),
            "docker.io/library/debian:latest"
        );
        assert_eq!(canonical("localhost/x"), "localhost/x:latest");
        assert_eq!(canonical("localhost:5000/x"), "localhost:5000/x:latest");
        assert_eq!(canonical("127.0.0.1:5000/a/b:t"), "127.0.0.1:5000/a/b:t");
        assert_eq!(canonical("[::1]:5000/a"), "[::1]:5000/a:latest");
        let digest = Digest::of(b"");
        assert_eq!(
            canonical(&format!("debian@{digest}")),
            format!("docker.io/library/debian@{digest}")
        );
        assert_eq!(
            canonical(&format!("debian:12@{digest}")),
            format!("docker.io/library/debian:12@{digest}")
        );
    }

    #[test]
    fn names_are_shown_short() {
        for text in [
            "debian:12",
            "me/app:latest",
            "localhost:5000/x:1",
            "quay.io/a/b:c",
        ] {
            assert_eq!(Reference::parse(text).unwrap().familiar(), text);
        }
    }

    #[test]
    fn what_docker_refuses_is_refused() {
        let id = "a".repeat(64);
        for text in [
            "",
            "Debian",
            "a//b",
            "a:",
            ":a",
            "a:b:c",
            "a@",
            "a@sha256:1",
            "../x",
            "a/../b",
            "/a",
            "a/",
            "a__b__",
            "a..b",
            "a.-b",
            "-a",
            "a:-x",
            "localhost:port/x",
            "a b",
            "a\n",
            "http://a/b",
            &id,
        ] {
            assert!(Reference::parse(text).is_err(), "{text:?}");
        }
        for text in [
            "a__b",
            "a---b",
            "a.b",
            "a_b/c-d",
            "a-.b".trim_end_matches("-.b"),
        ] {
            assert!(Reference::parse(text).is_ok(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_read_again_from_its_form(text in "[a-zA-Z0-9./:@_\\-\\[\\] ]{0,60}") {
            fuzz_reference(text.as_bytes());
        }
    }
}
