//! What a power cut may have torn.
//!
//! Flushing a gigabyte to the disk would make every pull wait for the disk, so layers and blobs are made visible
//! first and flushed behind. Until that is done their names stand in `unsettled.json` together with the kernel's
//! boot id. A store opened under another boot id takes what is named there for suspect: blobs are hashed again,
//! layers unpacked again from their blobs, and images whose blobs are torn are dropped with a warning.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use base::file::{Durability, read_json, write_json};
use serde::{Deserialize, Serialize};

use super::{ImageRecord, Inner, State, Store};
use crate::error::{At, Error};
use crate::progress::Cancel;
use crate::{Digest, ImageId, Result};

#[derive(Debug, Default, Serialize, Deserialize)]
struct Unsettled {
    boot: String,
    digests: BTreeSet<Digest>,
}

/// Blobs and layers (by chain id) that an earlier boot did not flush.
pub(super) fn suspects(inner: &Inner) -> Result<Vec<Digest>> {
    let path = inner.directory.join("unsettled.json");
    let unsettled: Unsettled = match read_json(&path) {
        Ok(found) => found.unwrap_or_default(),
        // Torn itself: it is written durably, so this is damage from outside; everything else is intact.
        Err(error) => {
            tracing::warn!(%error, "the list of unflushed content is unreadable");
            Unsettled::default()
        }
    };
    if unsettled.boot == base::host::boot_id() {
        inner.state().fresh.extend(unsettled.digests);
        return Ok(Vec::new());
    }
    Ok(unsettled.digests.into_iter().collect())
}

/// Hashes suspect blobs again and unpacks missing layers again.
pub(super) fn repair(store: &Store, suspects: &[Digest]) -> Result<()> {
    for digest in suspects {
        if store.content().has(digest) && !store.content().is_whole(digest) {
            tracing::warn!(%digest, "a blob was torn by a power cut and is removed");
            store.content().remove(digest)?;
        }
    }
    let images: Vec<(ImageId, ImageRecord)> = store
        .state()
        .images
        .iter()
        .map(|(id, stored)| (*id, stored.record.clone()))
        .collect();
    for (id, record) in images {
        match restore(store, &record) {
            Ok(()) => {}
            Err(
                error @ (Error::NoSuchBlob(_)
                | Error::DigestMismatch { .. }
                | Error::DamagedLayer { .. }),
            ) => {
                tracing::warn!(%id, %error, "an image lost a part and is dropped; pull or load it again");
                store.forget(&id)?;
            }
            // Its blobs are there: a full disk, say, is no reason to lose them.
            Err(error) => {
                tracing::error!(%id, %error, "layers of an image are not unpacked: it cannot be used before the next start")
            }
        }
    }
    if !suspects.is_empty() {
        settle(store)?;
    }
    Ok(())
}

fn restore(store: &Store, record: &ImageRecord) -> Result<()> {
    store.content().reader(&record.manifest.digest)?;
    let lease = store.lease();
    let mut parent = None;
    for layer in &record.layers {
        let blob = store.content().reader(&layer.blob.digest)?;
        if store.layer(&layer.chain_id).is_none() {
            let staged = store.stage(
                blob,
                parent.is_none(),
                Some(layer.diff_id),
                &Cancel::default(),
            )?;
            store.place(staged, parent, &lease)?;
        }
        parent = Some(layer.chain_id);
    }
    Ok(())
}

/// Writes down, durably, what of an image about to be recorded is not flushed yet.
pub(super) fn note(
    inner: &Inner,
    state: &mut State,
    record: &ImageRecord,
    id: &ImageId,
) -> Result<()> {
    state.fresh.insert(*id);
    let own = record
        .layers
        .iter()
        .flat_map(|l| [l.blob.digest, l.chain_id]);
    if own.clone().any(|d| state.fresh.contains(&d)) {
        write(inner, state)?;
    }
    Ok(())
}

fn write(inner: &Inner, state: &State) -> Result<()> {
    let path = inner.directory.join("unsettled.json");
    let unsettled = Unsettled {
        boot: base::host::boot_id(),
        digests: state.fresh.iter().copied().collect(),
    };
    write_json(&path, &unsettled, Durability::Host).at(&path)
}

/// Flushes in the background.
pub(super) fn later(store: &Store) {
    if store.state().fresh.is_empty() || store.0.settling.swap(true, Ordering::AcqRel) {
        return;
    }
    // A weak hold: closing the store must not wait for the disk.
    let inner = Arc::downgrade(&store.0);
    let spawned = std::thread::Builder::new()
        .name("image-settle".to_owned())
        .spawn(move || {
            std::thread::sleep(std::time::Duration::from_secs(2));
            if let Some(inner) = inner.upgrade() {
                inner.settling.store(false, Ordering::Release);
                if let Err(error) = settle(&Store(inner)) {
                    tracing::warn!(%error, "the image store could not be flushed");
                }
            }
        });
    if spawned.is_err() {
        store.0.settling.store(false, Ordering::Release);
    }
}

fn settle(store: &Store) -> Result<()> {
    let before: Vec<Digest> = store.state().fresh.iter().copied().collect();
    let directory = std::fs::File::open(store.directory()).at(store.directory())?;
    rustix::fs::syncfs(&directory).at(store.directory())?;
    let mut state = store.state();
    for digest in before {
        state.fresh.remove(&digest);
    }
    write(&store.0, &state)
}
