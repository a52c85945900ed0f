//! One pass over a layer: compressed bytes in; inflating, hashing and unpacking each in a thread of their own.
//!
//! ```text
//! source ─▶ inflate ─┬─▶ sha256 of the diff
//!                    └─▶ untar (the calling thread)
//! ```

use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;

use super::Limits;
use super::compression::{self, Compression};
use super::tar::TarReader;
use super::unpack::{Unpacked, Unpacker, damaged};
use crate::digest::Hasher;
use crate::progress::Cancel;
use crate::{Digest, Error, Result};

const CHUNK: usize = 256 << 10;
const QUEUE: usize = 8;
/// What may follow the end of an archive: padding to a tape's record, not a second bomb.
const MAX_TRAILER: u64 = 64 << 20;

/// A layer that was unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    pub diff_id: Digest,
    pub compression: Compression,
    pub unpacked: Unpacked,
}

/// Reads what another thread sends, chunk by chunk; the sender's going away is the end.
pub struct ChunkReader {
    receiver: Receiver<io::Result<Bytes>>,
    current: Bytes,
}

impl ChunkReader {
    /// The two ends of a bounded queue of chunks.
    pub fn channel() -> (SyncSender<io::Result<Bytes>>, ChunkReader) {
        let (sender, receiver) = sync_channel(QUEUE);
        (
            sender,
            ChunkReader {
                receiver,
                current: Bytes::new(),
            },
        )
    }
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let part = available.len().min(buffer.len());
        buffer[..part].copy_from_slice(&available[..part]);
        self.consume(part);
        Ok(part)
    }
}

impl BufRead for ChunkReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.is_empty() {
            match self.receiver.recv() {
                Ok(chunk) => self.current = chunk?,
                Err(_) => break,
            }
        }
        Ok(&self.current)
    }
    fn consume(&mut self, amount: usize) {
        let _ = self.current.split_to(amount);
    }
}

/// Unpacks the layer that `source` holds, compressed or not, into the empty folder `target`.
///
/// # Errors
/// Those of [`Unpacker::unpack`]; the folder's content is then the caller's to remove.
pub fn apply<R: Read + Send>(
    source: R,
    target: &Path,
    lowest: bool,
    limits: Limits,
    cancel: &Cancel,
) -> Result<Applied> {
    let unpacker = Unpacker::new(target, lowest, limits, cancel)?;
    let (to_untar, from_inflate) = ChunkReader::channel();
    let (to_hash, from_inflate_too) = sync_channel::<Bytes>(QUEUE);
    std::thread::scope(|scope| {
        let inflating = scope.spawn(move || -> Result<Compression> {
            let (kind, mut reader) =
                match compression::reader(BufReader::with_capacity(CHUNK, source)) {
                    Ok(opened) => opened,
                    Err(error) => {
                        // The untarring thread must not take the silence for an empty archive.
                        let _ = to_untar.send(Err(io::Error::other("unreadable")));
                        return Err(error);
                    }
                };
            loop {
                match fill(&mut reader) {
                    Ok(chunk) if chunk.is_empty() => return Ok(kind),
                    Ok(chunk) => {
                        // Either end hangs up only after an error of its own, which is the one reported.
                        if to_hash.send(chunk.clone()).is_err() || to_untar.send(Ok(chunk)).is_err()
                        {
                            return Ok(kind);
                        }
                    }
                    Err(error) => {
                        let _ = to_untar.send(Err(error));
                        return Ok(kind);
                    }
                }
            }
        });
        let hashing = scope.spawn(move || {
            let mut hasher = Hasher::default();
            for chunk in from_inflate_too {
                hasher.update(&chunk);
            }
            hasher.finish()
        });
        let mut tar = TarReader::new(from_inflate);
        let unpacked = unpacker.unpack(&mut tar).and_then(|unpacked| {
            let mut rest = tar.into_inner().take(MAX_TRAILER + 1);
            match io::copy(&mut rest, &mut io::sink()).map_err(damaged)? {
                trailer if trailer > MAX_TRAILER => Err(Error::LayerLimit(
                    "it goes on long after the archive's end".to_owned(),
                )),
                _ => Ok(unpacked),
            }
        });
        let panicked = |_| Error::DamagedLayer("an unpacking thread failed".to_owned());
        let compression = inflating.join().map_err(panicked)?;
        let diff_id = hashing.join().map_err(panicked)?;
        // What the inflater refused explains what the unpacker then missed.
        let compression = compression?;
        Ok(Applied {
            diff_id,
            compression,
            unpacked: unpacked?,
        })
    })
}

fn fill(reader: &mut impl Read) -> io::Result<Bytes> {
    let mut buffer = vec![0; CHUNK];
    let mut filled = 0;
    while filled < CHUNK {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer.truncate(filled);
    Ok(Bytes::from(buffer))
}

/// Fuzz entry: unpacks any bytes into a scratch folder.
pub fn fuzz_layer(data: &[u8]) {
    static SERIAL: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let serial = SERIAL.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path =
        std::env::temp_dir().join(format!("berth-fuzz-layer-{}-{serial}", std::process::id()));
    let Ok(scratch) = super::tree::Scratch::create(path) else {
        return;
    };
    let limits = Limits {
        entries: 1000,
        bytes: 1 << 20,
        keep_free: 0,
    };
    let _ = apply(data, scratch.path(), false, limits, &Cancel::default());
}
