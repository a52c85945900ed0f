//! Finding images and telling about them.

use std::collections::HashSet;
use std::sync::Arc;

use super::{ImageRecord, State, Store, Stored};
use crate::config::ImageConfig;
use crate::{Digest, Error, ImageId, Platform, Reference, Result};

/// An image with its names.
#[derive(Debug, Clone)]
pub struct Image {
    pub id: ImageId,
    /// As Docker shows them: `debian:12`.
    pub repo_tags: Vec<String>,
    /// `debian@sha256:…`: the digests of manifests it was pulled or pushed by.
    pub repo_digests: Vec<String>,
    /// RFC 3339, as the configuration says; the point "never" where it does not.
    pub created: String,
    pub platform: Platform,
    pub config: Arc<ImageConfig>,
    pub record: ImageRecord,
}

/// One line of `docker history`, newest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryLine {
    /// None where the image of that step is not here (`<missing>`).
    pub id: Option<ImageId>,
    pub created: Option<String>,
    pub created_by: String,
    pub comment: String,
    /// Bytes of the layer; 0 for a step that made none.
    pub size: u64,
    pub tags: Vec<String>,
}

/// Which images to list.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Intermediate images of builds too.
    pub all: bool,
    /// Only those without (or only those with) a tag.
    pub dangling: Option<bool>,
    /// `key` or `key=value`; all must fit.
    pub labels: Vec<String>,
    /// Labels that must not fit.
    pub without_labels: Vec<String>,
    /// Patterns with `*`, `?`, `[…]`; one must fit.
    pub references: Vec<String>,
    /// Made before, or since, this image.
    pub before: Option<String>,
    pub since: Option<String>,
    /// Made before this point in time.
    pub until: Option<jiff::Timestamp>,
}

impl Image {
    fn new(state: &State, id: ImageId, stored: &Stored) -> Image {
        let (mut repo_tags, mut repo_digests) = (Vec::new(), Vec::new());
        for (name, _) in state.references.iter().filter(|(_, target)| **target == id) {
            let Ok(reference) = Reference::parse(name) else {
                continue;
            };
            if reference.digest().is_some() {
                repo_digests.push(reference.familiar());
            } else {
                repo_tags.push(reference.familiar());
            }
        }
        let config = stored.config.clone();
        Image {
            id,
            repo_tags,
            repo_digests,
            created: config
                .created
                .clone()
                .unwrap_or_else(|| base::time::ZERO.to_owned()),
            platform: Platform {
                os: config.os.clone(),
                architecture: config.architecture.clone(),
                variant: (!config.variant.is_empty()).then(|| config.variant.clone()),
                os_version: None,
            },
            config,
            record: stored.record.clone(),
        }
    }

    /// Bytes of all layers.
    pub fn size(&self) -> u64 {
        self.record.size
    }

    fn created_at(&self) -> Option<jiff::Timestamp> {
        self.created.parse().ok()
    }
}

impl Store {
    /// The id of the image that `name` names: a reference, an id, or the beginning of one.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`], [`Error::Ambiguous`].
    pub fn resolve(&self, name: &str) -> Result<ImageId> {
        resolve(&self.state(), name)
    }

    /// One image, by name or id.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`], [`Error::Ambiguous`].
    pub fn inspect(&self, name: &str) -> Result<Image> {
        let state = self.state();
        let id = resolve(&state, name)?;
        let stored = state
            .images
            .get(&id)
            .ok_or_else(|| Error::NoSuchImage(name.to_owned()))?;
        Ok(Image::new(&state, id, stored))
    }

    /// The images that fit, newest first.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`] for what `before` and `since` name.
    pub fn list(&self, filter: &Filter) -> Result<Vec<Image>> {
        let state = self.state();
        let time_of = |name: &Option<String>| -> Result<Option<jiff::Timestamp>> {
            let Some(name) = name else { return Ok(None) };
            let id = resolve(&state, name)?;
            Ok(state
                .images
                .get(&id)
                .and_then(|stored| Image::new(&state, id, stored).created_at()))
        };
        let (before, since) = (time_of(&filter.before)?, time_of(&filter.since)?);
        let mut images: Vec<Image> = state
            .images
            .iter()
            .map(|(id, stored)| Image::new(&state, *id, stored))
            .filter(|image| {
                let dangling = image.repo_tags.is_empty() && image.repo_digests.is_empty();
                let untagged = image.repo_tags.is_empty();
                if dangling && !filter.all && has_children(&state, &image.id) {
                    return false;
                }
                let empty = Default::default();
                let labels = image.config.config.as_ref().map_or(&empty, |c| &c.labels);
                let fits = |wanted: &String| match wanted.split_once('=') {
                    Some((key, value)) => labels.get(key).is_some_and(|v| v == value),
                    None => labels.contains_key(wanted),
                };
                let at = image.created_at();
                filter.dangling.is_none_or(|wanted| wanted == untagged)
                    && filter.labels.iter().all(fits)
                    && !filter.without_labels.iter().any(fits)
                    && before.is_none_or(|b| at.is_some_and(|a| a < b))
                    && since.is_none_or(|s| at.is_some_and(|a| a > s))
                    && filter.until.is_none_or(|u| at.is_none_or(|a| a < u))
            })
            .collect();
        if !filter.references.is_empty() {
            let fits = |name: &String| filter.references.iter().any(|p| reference_fits(p, name));
            images.retain_mut(|image| {
                image.repo_tags.retain(&fits);
                image.repo_digests.retain(&fits);
                !(image.repo_tags.is_empty() && image.repo_digests.is_empty())
            });
        }
        images.sort_by(|a, b| {
            b.created
                .cmp(&a.created)
                .then_with(|| a.repo_tags.cmp(&b.repo_tags))
        });
        Ok(images)
    }

    /// How the image came to be, newest step first.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`].
    pub fn history(&self, name: &str) -> Result<Vec<HistoryLine>> {
        let image = self.inspect(name)?;
        let state = self.state();
        let mut layers = image.record.layers.iter();
        let mut lines: Vec<HistoryLine> = image
            .config
            .history
            .iter()
            .map(|step| HistoryLine {
                id: None,
                created: step.created.clone(),
                created_by: step.created_by.clone(),
                comment: step.comment.clone(),
                size: if step.empty_layer {
                    0
                } else {
                    layers
                        .next()
                        .and_then(|l| state.layers.get(&l.chain_id))
                        .map_or(0, |l| l.size)
                },
                tags: Vec::new(),
            })
            .collect();
        lines.reverse();
        if lines.is_empty() {
            lines.push(HistoryLine {
                id: None,
                created: image.config.created.clone(),
                created_by: String::new(),
                comment: String::new(),
                size: image.size(),
                tags: Vec::new(),
            });
        }
        let mut id = Some(image.id);
        for line in &mut lines {
            let Some(own) = id else { break };
            let Some(stored) = state.images.get(&own) else {
                break;
            };
            line.id = Some(own);
            line.tags = Image::new(&state, own, stored).repo_tags;
            id = stored.record.parent;
        }
        Ok(lines)
    }

    /// Bytes of all blobs and unpacked layers, each counted once.
    pub fn disk_usage(&self) -> u64 {
        let layers: u64 = self.state().layers.values().map(|l| l.size).sum();
        let blobs: u64 = self
            .content()
            .list()
            .unwrap_or_default()
            .iter()
            .filter_map(|d| self.content().size(d))
            .sum();
        layers + blobs
    }

    /// Bytes of the unpacked layers, each counted once (`LayersSize` of `docker system df`).
    pub fn layers_size(&self) -> u64 {
        self.state().layers.values().map(|l| l.size).sum()
    }

    /// Bytes of this image's layers that other images have too. Images that are only steps on the way to
    /// another one (not the end of a line of builds) do not count, as in a list without `all`.
    pub fn shared_size(&self, id: &ImageId) -> u64 {
        let state = self.state();
        let Some(own) = state.images.get(id) else {
            return 0;
        };
        let steps: HashSet<ImageId> = state
            .images
            .values()
            .filter_map(|stored| stored.record.parent)
            .collect();
        own.record
            .layers
            .iter()
            .filter(|layer| {
                state.images.iter().any(|(other, stored)| {
                    other != id
                        && (!steps.contains(other)
                            || !Image::new(&state, *other, stored).repo_tags.is_empty())
                        && stored
                            .record
                            .layers
                            .iter()
                            .any(|l| l.chain_id == layer.chain_id)
                })
            })
            .filter_map(|layer| state.layers.get(&layer.chain_id))
            .map(|layer| layer.size)
            .sum()
    }
}

pub(super) fn has_children(state: &State, id: &ImageId) -> bool {
    state
        .images
        .values()
        .any(|stored| stored.record.parent == Some(*id))
}

pub(super) fn resolve(state: &State, name: &str) -> Result<ImageId> {
    let missing = || Error::NoSuchImage(name.chars().take(300).collect());
    let digits = name.strip_prefix("sha256:").unwrap_or(name);
    let is_hexadecimal = !digits.is_empty()
        && digits
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if is_hexadecimal && digits.len() == 64 {
        let id = Digest::from_hex(digits)?;
        return if state.images.contains_key(&id) {
            Ok(id)
        } else {
            Err(missing())
        };
    }
    if let Ok(reference) = Reference::parse(name) {
        let reference = reference.or_latest();
        // A digest says which; a tag beside it is only for readers.
        let key = match reference.digest() {
            Some(digest) => reference.with_digest(digest).to_string(),
            None => reference.to_string(),
        };
        if let Some(id) = state.references.get(&key) {
            return Ok(*id);
        }
        if let Some(digest) = reference.digest() {
            let repository = format!("{}:", reference.repository());
            let by_manifest = state.images.iter().find(|(id, stored)| {
                stored.record.manifest.digest == digest
                    && state
                        .references
                        .iter()
                        .any(|(name, target)| target == *id && name.starts_with(&repository))
            });
            return by_manifest.map(|(id, _)| *id).ok_or_else(missing);
        }
    }
    if is_hexadecimal {
        let mut found = state
            .images
            .keys()
            .filter(|id| id.hex().starts_with(digits));
        return match (found.next(), found.next()) {
            (Some(id), None) => Ok(*id),
            (Some(_), Some(_)) => Err(Error::Ambiguous(name.to_owned())),
            _ => Err(missing()),
        };
    }
    Err(missing())
}

/// Docker's `reference` filter: the pattern fits the familiar name, or its repository alone.
fn reference_fits(pattern: &str, name: &str) -> bool {
    let fits = |text: &str| wildcard(pattern.as_bytes(), text.as_bytes());
    let repository = name.split_once('@').map_or(name, |(r, _)| r);
    let repository = match repository.rfind(':') {
        Some(colon) if !repository[colon..].contains('/') => &repository[..colon],
        _ => repository,
    };
    fits(name) || fits(repository)
}

/// Go's `path.Match`: `*` and `?` do not cross slashes, `[a-z]` is a class, `\` takes the next as it is.
pub(crate) fn wildcard(pattern: &[u8], text: &[u8]) -> bool {
    // Where to go on after the last star, and how much of the text it has taken.
    let (mut p, mut t, mut star) = (0, 0, None::<(usize, usize)>);
    loop {
        let matched = match pattern.get(p) {
            None if t == text.len() => return true,
            Some(b'*') => {
                star = Some((p + 1, t));
                p += 1;
                continue;
            }
            Some(_) if t == text.len() => None,
            Some(b'?') if text[t] != b'/' => Some(1),
            Some(b'[') => {
                class(&pattern[p..], text[t]).and_then(|(length, fits)| fits.then_some(length))
            }
            Some(b'\\') if pattern.get(p + 1) == Some(&text[t]) => Some(2),
            Some(c) if *c == text[t] && *c != b'\\' => Some(1),
            _ => None,
        };
        match (matched, star) {
            (Some(length), _) => (p, t) = (p + length, t + 1),
            (None, Some((next, taken))) if taken < text.len() && text[taken] != b'/' => {
                star = Some((next, taken + 1));
                (p, t) = (next, taken + 1);
            }
            _ => return false,
        }
    }
}

/// The length of the class at the head of `pattern`, and whether `byte` is in it.
fn class(pattern: &[u8], byte: u8) -> Option<(usize, bool)> {
    let negated = pattern.get(1) == Some(&b'^');
    let mut i = if negated { 2 } else { 1 };
    let (mut fits, first) = (false, i);
    loop {
        let mut low = *pattern.get(i)?;
        if low == b']' && i > first {
            return Some((i + 1, (fits != negated) && byte != b'/'));
        }
        if low == b'\\' {
            i += 1;
            low = *pattern.get(i)?;
        }
        let mut high = low;
        if pattern.get(i + 1) == Some(&b'-') && pattern.get(i + 2).is_some_and(|b| *b != b']') {
            high = *pattern.get(i + 2)?;
            i += 2;
        }
        fits |= (low..=high).contains(&byte);
        i += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_as_in_go() {
        for (pattern, text, fits) in [
            ("*", "debian", true),
            ("*", "me/app", false),
            ("me/*", "me/app", true),
            ("deb?an", "debian", true),
            ("[a-d]ebian", "debian", true),
            ("[^a-d]ebian", "debian", false),
            ("a*b*c", "aXbYbZc", true),
            ("a*b", "a/b", false),
            ("[", "a", false),
            ("\\*", "*", true),
            ("", "", true),
            ("a*", "", false),
        ] {
            assert_eq!(
                wildcard(pattern.as_bytes(), text.as_bytes()),
                fits,
                "{pattern} {text}"
            );
        }
        assert!(reference_fits("debian", "debian:12"));
        assert!(reference_fits("localhost:5000/*", "localhost:5000/x:1"));
        assert!(!reference_fits("deb", "debian:12"));
    }
}
