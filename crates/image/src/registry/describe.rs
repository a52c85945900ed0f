//! What a name stands for at its registry, without pulling it.

use super::pull::manifest;
use super::{Client, Credentials, Trust};
use crate::config::ImageConfig;
use crate::manifest::{Descriptor, Document};
use crate::{Digest, Error, Platform, Reference, Result};

/// A manifest or index at a registry, and what it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    pub descriptor: Descriptor,
    pub platforms: Vec<Platform>,
}

/// Asks the registry of `reference` what it has under that name.
///
/// # Errors
/// [`Error::NotFound`], [`Error::Denied`], [`Error::Unreachable`], [`Error::Malformed`].
pub async fn describe(
    reference: &Reference,
    credentials: Option<Credentials>,
    trust: &Trust,
) -> Result<Described> {
    let reference = reference.clone().or_latest();
    let client = Client::connect(reference.domain(), credentials, trust).await?;
    let scope = format!("repository:{}:pull", reference.path());
    let which = reference.digest().map_or_else(
        || reference.tag().unwrap_or("latest").to_owned(),
        |digest| digest.to_string(),
    );
    let (bytes, digest, media_type) =
        manifest(&client, &reference, &which, &scope, reference.digest()).await?;
    let platforms = match Document::parse(&bytes)? {
        Document::Index(index) => index
            .manifests
            .into_iter()
            .filter_map(|entry| entry.platform)
            // Attestations are for no platform.
            .filter(|platform| platform.os != "unknown")
            .collect(),
        Document::Manifest(manifest) => {
            let path = format!("/v2/{}/blobs/{}", reference.path(), manifest.config.digest);
            let response = client
                .send(reqwest::Method::GET, &path, &scope, |request| request)
                .await?;
            let response = client.expect(response, "the image configuration").await?;
            let config = client.document(response, "the image configuration").await?;
            let actual = Digest::of(&config);
            if actual != manifest.config.digest {
                return Err(Error::DigestMismatch {
                    what: "the image configuration".to_owned(),
                    expected: manifest.config.digest,
                    actual,
                });
            }
            let config = ImageConfig::parse(&config)?;
            vec![Platform {
                os: config.os,
                architecture: config.architecture,
                variant: Some(config.variant).filter(|variant| !variant.is_empty()),
                os_version: None,
            }]
        }
    };
    Ok(Described {
        descriptor: Descriptor::new(&media_type, digest, bytes.len() as u64),
        platforms,
    })
}
