//! The registry client (OCI distribution specification 1.1, and Docker's token authentication).

mod auth;
mod client;
mod pull;
mod push;

pub use auth::{Credentials, fuzz_challenge};
pub use client::Client;
pub use pull::{PullOptions, Pulled, pull};
pub use push::{PushOptions, Pushed, push};

use crate::Result;

/// Which registries may be spoken to without TLS, or with a certificate nobody vouches for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Insecure(
    /// Hosts, with their port where it is not the usual one.
    pub Vec<String>,
);

impl Insecure {
    /// Whether `domain` is listed, or is this machine itself.
    pub fn allows(&self, domain: &str) -> bool {
        is_local(domain)
            || self
                .0
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
pub async fn login(domain: &str, credentials: &Credentials, insecure: &Insecure) -> Result<()> {
    let domain = domain
        .trim_start_matches("https://")
        .trim_start_matches("http://");
    let domain = domain.split('/').next().unwrap_or(domain);
    Client::connect(domain, Some(credentials.clone()), insecure)
        .await?
        .check()
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_and_listed_hosts_may_be_without_tls() {
        let listed = Insecure(vec![
            "registry.test:5000".to_owned(),
            "plain.test".to_owned(),
        ]);
        for local in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:1",
            "127.9.9.9",
            "[::1]:5000",
        ] {
            assert!(Insecure::default().allows(local), "{local}");
        }
        assert!(listed.allows("registry.test:5000") && listed.allows("plain.test:80"));
        for other in [
            "registry.test",
            "docker.io",
            "localhost.test",
            "10.0.0.1:5000",
        ] {
            assert!(!listed.allows(other), "{other}");
        }
    }
}
