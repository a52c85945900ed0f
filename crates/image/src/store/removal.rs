//! Removing images, and collecting what nothing refers to any more.

use std::collections::HashSet;

use super::query::{has_children, resolve};
use super::{Filter, Store};
use crate::error::At;
use crate::layer::tree;
use crate::{Digest, Error, ImageId, Reference, Result};

/// A container that uses an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InUse {
    /// Its id or name, for the message.
    pub container: String,
    pub running: bool,
}

/// How to remove.
#[derive(Debug, Clone, Copy, Default)]
pub struct RemoveOptions {
    /// Also where several names or a stopped container refer to it.
    pub force: bool,
    /// Leave untagged parents.
    pub keep_parents: bool,
}

/// What became of one thing, in Docker's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removed {
    Untagged(String),
    Deleted(Digest),
}

/// What pruning did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pruned {
    pub removed: Vec<Removed>,
    /// Bytes given back.
    pub space: u64,
}

impl Store {
    /// Removes a name of an image, and with the last one the image. `in_use` tells which containers use an image.
    ///
    /// # Errors
    /// [`Error::Conflict`] with Docker's reasons.
    pub fn remove(
        &self,
        name: &str,
        options: RemoveOptions,
        in_use: &dyn Fn(&ImageId) -> Vec<InUse>,
    ) -> Result<Vec<Removed>> {
        let id = self.resolve(name)?;
        // Asked before the lock is taken: the answer may need this store.
        let users = in_use(&id);
        let mut removed = Vec::new();
        {
            let mut state = self.state();
            let id_now = resolve(&state, name)?;
            if id_now != id {
                return Err(Error::Conflict(format!(
                    "{name} was changed at the same time; try again"
                )));
            }
            let own: Vec<String> = state
                .references
                .iter()
                .filter(|(_, target)| **target == id)
                .map(|(name, _)| name.clone())
                .collect();
            let by_id = is_id(name, &id);
            let short = id.short();
            let running = users.iter().find(|u| u.running);
            let last_names: Vec<String> = if by_id {
                let repositories: HashSet<String> = own
                    .iter()
                    .filter_map(|n| Reference::parse(n).ok())
                    .map(|r| r.repository())
                    .collect();
                if repositories.len() > 1 && !options.force {
                    return Err(Error::Conflict(format!(
                        "unable to delete {short} (must be forced) - image is referenced in multiple repositories"
                    )));
                }
                let tags = own.iter().filter(|n| !n.contains('@')).count();
                if tags > 1 && !options.force {
                    return Err(Error::Conflict(format!(
                        "unable to delete {short} (must be forced) - image is referenced by several tags"
                    )));
                }
                own.clone()
            } else {
                let reference = Reference::parse(name)?.or_latest();
                let key = match reference.digest() {
                    Some(digest) => reference.with_digest(digest).to_string(),
                    None => reference.to_string(),
                };
                let repository = reference.repository();
                let others_here = own
                    .iter()
                    .filter(|n| **n != key && !n.contains('@'))
                    .filter_map(|n| Reference::parse(n).ok())
                    .any(|r| r.repository() == repository);
                // With the last tag of a repository its digests go too.
                own.iter()
                    .filter(|n| {
                        **n == key
                            || (!others_here
                                && n.contains('@')
                                && Reference::parse(n).is_ok_and(|r| r.repository() == repository))
                    })
                    .cloned()
                    .collect()
            };
            let deletes = last_names.len() == own.len();
            if deletes {
                if let Some(user) = running {
                    if by_id || !options.force {
                        let why = if by_id {
                            "cannot be forced"
                        } else {
                            "must force"
                        };
                        return Err(Error::Conflict(if by_id {
                            format!(
                                "unable to delete {short} ({why}) - image is being used by running container {}",
                                user.container
                            )
                        } else {
                            format!(
                                "unable to remove repository reference {name:?} ({why}) - container {} is using its referenced image {short}",
                                user.container
                            )
                        }));
                    }
                } else if let Some(user) = users.first()
                    && !options.force
                {
                    return Err(Error::Conflict(if by_id {
                        format!(
                            "unable to delete {short} (must be forced) - image is being used by stopped container {}",
                            user.container
                        )
                    } else {
                        format!(
                            "unable to remove repository reference {name:?} (must force) - container {} is using its referenced image {short}",
                            user.container
                        )
                    }));
                }
                if has_children(&state, &id) && by_id {
                    return Err(Error::Conflict(format!(
                        "unable to delete {short} (cannot be forced) - image has dependent child images"
                    )));
                }
            }
            let mut changed = state.references.clone();
            for key in &last_names {
                changed.remove(key);
                let shown = Reference::parse(key).map_or_else(|_| key.clone(), |r| r.familiar());
                removed.push(Removed::Untagged(shown));
            }
            self.write_references(&mut state, changed)?;
            // A running container, or a build, keeps its image, without a name.
            if !deletes || running.is_some() || has_children(&state, &id) || state.leased(&id) {
                return Ok(removed);
            }
        }
        self.delete_chain(id, options.keep_parents, in_use, &mut removed)?;
        self.gc()?;
        Ok(removed)
    }

    /// Removes an untagged image and, unless told not to, its untagged parents.
    fn delete_chain(
        &self,
        id: ImageId,
        keep_parents: bool,
        in_use: &dyn Fn(&ImageId) -> Vec<InUse>,
        removed: &mut Vec<Removed>,
    ) -> Result<()> {
        let mut next = Some(id);
        let mut first = true;
        while let Some(id) = next {
            if !first && !in_use(&id).is_empty() {
                break;
            }
            let mut state = self.state();
            let named = state.references.values().any(|target| *target == id);
            let Some(stored) = state.images.get(&id) else {
                break;
            };
            if named || has_children(&state, &id) || state.leased(&id) {
                break;
            }
            next = if keep_parents {
                None
            } else {
                stored.record.parent
            };
            let path = self.record_path(&id);
            std::fs::remove_file(&path).at(&path)?;
            state.images.remove(&id);
            removed.push(Removed::Deleted(id));
            first = false;
        }
        Ok(())
    }

    /// Drops an image and its names without asking.
    pub(super) fn forget(&self, id: &ImageId) -> Result<()> {
        let mut state = self.state();
        let changed = state
            .references
            .iter()
            .filter(|(_, target)| *target != id)
            .map(|(n, t)| (n.clone(), *t))
            .collect();
        self.write_references(&mut state, changed)?;
        state.images.remove(id);
        let path = self.record_path(id);
        std::fs::remove_file(&path).at(&path)
    }

    /// Removes a name alone; the image stays, dangling if it was the last.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`].
    pub fn untag(&self, reference: &Reference) -> Result<()> {
        let mut state = self.state();
        let key = reference.clone().or_latest().to_string();
        let mut changed = state.references.clone();
        changed.remove(&key).ok_or(Error::NoSuchImage(key))?;
        self.write_references(&mut state, changed)
    }

    /// Removes unused images that fit: the dangling ones, or with `dangling: Some(false)` all that no container uses.
    pub fn prune(
        &self,
        filter: &Filter,
        in_use: &dyn Fn(&ImageId) -> Vec<InUse>,
    ) -> Result<Pruned> {
        let only_dangling = filter.dangling != Some(false);
        let wanted = Filter {
            dangling: None,
            all: true,
            ..filter.clone()
        };
        let before = self.disk_usage();
        let mut pruned = Pruned::default();
        for image in self.list(&wanted)? {
            let untagged = image.repo_tags.is_empty();
            if (only_dangling && !untagged) || !in_use(&image.id).is_empty() {
                continue;
            }
            {
                let mut state = self.state();
                if (has_children(&state, &image.id) && untagged) || state.leased(&image.id) {
                    continue;
                }
                // A container was made of it since they were counted.
                if state.snapshots.values().any(|s| s.image == Some(image.id)) {
                    continue;
                }
                let names: Vec<String> = state
                    .references
                    .iter()
                    .filter(|(_, target)| **target == image.id)
                    .map(|(name, _)| name.clone())
                    .collect();
                // Named since the list was made.
                if only_dangling && names.iter().any(|name| !name.contains('@')) {
                    continue;
                }
                let mut changed = state.references.clone();
                for key in &names {
                    changed.remove(key);
                    let shown =
                        Reference::parse(key).map_or_else(|_| key.clone(), |r| r.familiar());
                    pruned.removed.push(Removed::Untagged(shown));
                }
                if !names.is_empty() {
                    self.write_references(&mut state, changed)?;
                }
            }
            self.delete_chain(image.id, false, in_use, &mut pruned.removed)?;
        }
        self.gc()?;
        pruned.space = before.saturating_sub(self.disk_usage());
        Ok(pruned)
    }

    /// Removes blobs and layers that no image, snapshot or lease refers to. Returns the bytes given back.
    pub fn gc(&self) -> Result<u64> {
        let mut freed = 0;
        let mut folders = Vec::new();
        {
            let mut state = self.state();
            if state.incomplete {
                tracing::warn!(
                    "nothing is collected while a record of the image store is unreadable"
                );
                return Ok(0);
            }
            let mut live: HashSet<Digest> = HashSet::new();
            for (id, stored) in &state.images {
                live.insert(*id);
                live.insert(stored.record.manifest.digest);
                for layer in &stored.record.layers {
                    live.extend([layer.blob.digest, layer.chain_id]);
                }
            }
            for snapshot in state.snapshots.values() {
                live.extend(&snapshot.chain);
            }
            let parents: Vec<Option<Digest>> = state
                .layers
                .values()
                .filter(|l| live.contains(&l.chain_id) || state.leased(&l.chain_id))
                .map(|l| Some(l.chain_id))
                .collect();
            // A layer needs all beneath it.
            for mut next in parents {
                while let Some(chain) = next {
                    live.insert(chain);
                    next = state.layers.get(&chain).and_then(|l| l.parent);
                }
            }
            let dead: Vec<Digest> = state
                .layers
                .keys()
                .filter(|chain| !live.contains(*chain))
                .copied()
                .collect();
            for chain in dead {
                if let Some(info) = state.layers.remove(&chain) {
                    freed += info.size;
                    // Renamed under the lock, so that nobody finds it, and removed without it.
                    let folder = self
                        .0
                        .directory
                        .join("layers")
                        .join(info.number.to_string());
                    let aside = self.0.content.scratch_path("removing");
                    std::fs::rename(&folder, &aside).at(&folder)?;
                    folders.push(aside);
                }
            }
            for digest in self.0.content.list()? {
                if !live.contains(&digest) && !state.leased(&digest) {
                    freed += self.0.content.remove(&digest)?;
                    state.fresh.remove(&digest);
                }
            }
        }
        for folder in folders {
            tree::remove_all(&folder).at(&folder)?;
        }
        Ok(freed)
    }

    /// Removes downloads that broke off and would be taken up again. Returns the bytes given back.
    pub fn remove_partial_downloads(&self) -> u64 {
        let state = self.state();
        self.0
            .content
            .remove_partials(|digest| state.leased(digest))
    }
}

fn is_id(name: &str, id: &ImageId) -> bool {
    let digits = name.strip_prefix("sha256:").unwrap_or(name);
    id.hex().starts_with(digits)
}
