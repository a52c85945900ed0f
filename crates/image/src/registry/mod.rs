//! The registry client (OCI distribution specification 1.1, and Docker's token authentication).

mod auth;
mod client;
mod describe;
mod pull;
mod push;

pub use auth::{Credentials, fuzz_challenge};
pub use client::Client;
pub(crate) use client::chain;
pub use describe::{Described, describe};
pub use pull::{PullOptions, Pulled, pull};
pub use push::{PushOptions, Pushed, push};

use std::path::PathBuf;

use crate::Result;

/// Whom to believe beyond what the system's certificates say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trust {
    /// Hosts, with their port where it is not the usual one, that may be spoken to without TLS, or with a
    /// certificate nobody vouches for.
    pub insecure: Vec<String>,
    /// PEM files with certificates of further authorities.
    pub authorities: Vec<PathBuf>,
}

impl Trust {
    /// Whether `domain` is listed as insecure, or is this machine itself.
    pub fn is_lax(&self, domain: &str) -> bool {
        is_local(domain)
            || self
                .insecure
                .iter()
                .any(|listed| listed == domain || domain.split(':').next() == Some(listed))
    }
}

/// Whether a registry's host is this machine.
pub(crate) fn is_local(domain: &str) -> bool {
    let host = match domain.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => domain.rsplit_once(':').map_or(domain, |(host, _)| host),
    };
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

/// Asks the registry whether it takes these credentials (`docker login`).
///
/// # Errors
/// [`crate::Error::Denied`], [`crate::Error::Unreachable`].
pub async fn login(domain: &str, credentials: &Credentials, trust: &Trust) -> Result<()> {
    let domain = domain
        .trim_start_matches("https://")
        .trim_start_matches("http://");
    let domain = domain.split('/').next().unwrap_or(domain);
    Client::connect(domain, Some(credentials.clone()), trust)
        .await?
        .check()
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_and_listed_hosts_may_be_without_tls() {
        let listed = Trust {
            insecure: vec!["registry.test:5000".to_owned(), "plain.test".to_owned()],
            ..Trust::default()
        };
        for local in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:1",
            "127.9.9.9",
            "[::1]:5000",
        ] {
            assert!(Trust::default().is_lax(local), "{local}");
        }
        assert!(listed.is_lax("registry.test:5000") && listed.is_lax("plain.test:80"));
        for other in [
            "registry.test",
            "docker.io",
            "localhost.test",
            "10.0.0.1:5000",
        ] {
            assert!(!listed.is_lax(other), "{other}");
        }
    }
}
