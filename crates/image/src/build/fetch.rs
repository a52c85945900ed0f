//! ADD of a web address.

use std::fs::File;
use std::io::Write;

use futures_util::StreamExt;

use crate::digest::Hasher;
use crate::error::At;
use crate::layer::tree::{self, Scratch};
use crate::layer::unpack;
use crate::progress::Cancel;
use crate::{Digest, Error, Result, Store};

/// Whether a source of ADD is fetched from the web.
pub(super) fn is_web(source: &str) -> bool {
    source.starts_with("http://") || source.starts_with("https://")
}

/// The file's name in a folder: the last part of the address' path.
///
/// # Errors
/// [`Error::Dockerfile`] where there is none.
pub(super) fn file_name(address: &str) -> Result<String> {
    let rest = address.split_once("://").map_or("", |(_, rest)| rest);
    let path = rest.split(['?', '#']).next().unwrap_or(rest);
    let name = path.split_once('/').map_or("", |(_, path)| path);
    let name = name.rsplit('/').next().unwrap_or(name);
    if name.is_empty() || name == "." || name == ".." || name.contains('\0') {
        return Err(Error::Dockerfile(format!(
            "cannot determine filename from url: {address}: end the destination with the file's name, not with /"
        )));
    }
    Ok(name.to_owned())
}

/// Fetches `address` into a file `name` of mode 0600 in a scratch folder.
///
/// # Errors
/// [`Error::Dockerfile`] with the server's status or the network's error, [`Error::DigestMismatch`],
/// [`Error::NoRoom`], [`Error::Cancelled`].
pub(super) fn fetch(
    store: &Store,
    address: &str,
    name: &str,
    expected: Option<Digest>,
    cancel: &Cancel,
) -> Result<Scratch> {
    let path = store.content().scratch_path("add");
    let scratch = Scratch::create(path.clone()).at(&path)?;
    let file = File::create(path.join(name)).at(&path)?;
    rustix::fs::fchmod(&file, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).at(&path)?;
    // A thread of its own: the caller's may belong to a runtime already.
    let actual = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .doing(|| "starting a download".to_owned())?
                    .block_on(download(store, address, file, cancel))
            })
            .join()
            .unwrap_or(Err(Error::Cancelled))
    })?;
    match expected {
        Some(expected) if expected != actual => Err(Error::DigestMismatch {
            what: address.to_owned(),
            expected,
            actual,
        }),
        _ => Ok(scratch),
    }
}

async fn download(store: &Store, address: &str, file: File, cancel: &Cancel) -> Result<Digest> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::Dockerfile(format!("ADD failed: {address}: {error}"))
    };
    let fetched = crate::fetch::fetch(address).await.map_err(|e| match e {
        Error::NotFound { why, .. } => failed(&why),
        other => failed(&other),
    })?;
    let mut file = std::io::BufWriter::with_capacity(256 << 10, file);
    let mut hasher = Hasher::default();
    let mut stream = fetched.body;
    let mut until_check = 0usize;
    while let Some(chunk) = stream.next().await {
        cancel.check()?;
        let chunk = chunk.map_err(|e| failed(&e))?;
        if until_check < chunk.len() {
            until_check = 64 << 20;
            if tree::free_bytes(file.get_ref()).is_ok_and(|free| free < store.0.limits.keep_free) {
                return Err(Error::NoRoom(format!(
                    "ADD of {address} would fill the disk"
                )));
            }
        }
        until_check -= chunk.len().min(until_check);
        hasher.update(&chunk);
        file.write_all(&chunk)
            .doing(|| format!("fetching {address}"))?;
    }
    file.flush().doing(|| format!("fetching {address}"))?;
    if let Some(modified) = fetched.modified {
        rustix::fs::futimens(file.get_ref(), &unpack::times((modified, 0)))
            .doing(|| format!("fetching {address}"))?;
    }
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_fetched_file_is_the_last_of_its_path() {
        assert_eq!(file_name("http://h/a/b.tar.gz?x=/y#z").unwrap(), "b.tar.gz");
        for nameless in ["http://h", "http://h/", "http://h/a/", "http://h/.."] {
            assert!(file_name(nameless).is_err(), "{nameless}");
        }
    }
}
