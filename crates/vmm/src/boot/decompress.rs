//! Kernel payloads, decompressed on the host: it is hundreds of times faster there than in a guest on a
//! software CPU.

use std::io::Read;

use super::BootError;
use super::bytes::Bytes;

/// No kernel is larger; the limit stops a small file from filling the host's memory.
pub const LIMIT: usize = 1 << 30;

const LZ4_LEGACY: u32 = 0x184c_2102;
/// Blocks of the legacy LZ4 format hold this much, the last one what is left (lz4 block format, "legacy frame").
const LZ4_BLOCK: usize = 8 << 20;

fn broken(method: &'static str, reason: impl ToString) -> BootError {
    BootError::Payload {
        method,
        reason: reason.to_string(),
    }
}

/// The decompressed form of `payload`, as the Linux build appends it (`scripts/Makefile.lib`): for all but
/// gzip the last four bytes are the decompressed size.
///
/// # Errors
/// [`BootError::Payload`] for damaged data, [`BootError::Compression`] for a method we lack.
pub fn decompress(payload: &[u8]) -> Result<Bytes, BootError> {
    let start = |magic: &[u8]| payload.starts_with(magic);
    if start(b"\x7fELF") {
        Ok(payload.to_vec().into())
    } else if start(&[0x1f, 0x8b]) {
        bounded("gzip", flate2::read::GzDecoder::new(payload), hint(payload))
    } else if start(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let decoder =
            zstd::stream::read::Decoder::new(payload).map_err(|error| broken("zstd", error))?;
        bounded("zstd", decoder.single_frame(), hint(payload))
    } else if start(&[0xfd, b'7', b'z', b'X', b'Z', 0]) {
        let stream = liblzma::stream::Stream::new_stream_decoder(u64::MAX, 0)
            .map_err(|error| broken("xz", error))?;
        bounded(
            "xz",
            liblzma::read::XzDecoder::new_stream(payload, stream),
            hint(payload),
        )
    } else if start(&[0x5d, 0, 0]) {
        let stream = liblzma::stream::Stream::new_lzma_decoder(u64::MAX)
            .map_err(|error| broken("lzma", error))?;
        bounded(
            "lzma",
            liblzma::read::XzDecoder::new_stream(payload, stream),
            hint(payload),
        )
    } else if start(&LZ4_LEGACY.to_le_bytes()) {
        lz4_legacy(payload)
    } else {
        let name = if start(b"BZh") {
            "bzip2"
        } else if start(&[0x89, b'L', b'Z', b'O']) {
            "lzo"
        } else {
            "an unknown method"
        };
        Err(BootError::Compression(name))
    }
}

/// The decompressed size a payload claims, as a first guess at the buffer.
fn hint(payload: &[u8]) -> usize {
    trailer(payload).unwrap_or(0).min(256 << 20)
}

fn trailer(payload: &[u8]) -> Option<usize> {
    let bytes = payload.last_chunk::<4>()?;
    Some(u32::from_le_bytes(*bytes) as usize)
}

fn bounded(method: &'static str, reader: impl Read, hint: usize) -> Result<Bytes, BootError> {
    let mut out = Vec::with_capacity(hint);
    let count = reader
        .take(LIMIT as u64 + 1)
        .read_to_end(&mut out)
        .map_err(|error| broken(method, error))?;
    if count > LIMIT {
        Err(broken(method, "it is larger than 1 GiB"))
    } else {
        Ok(out.into())
    }
}

/// Blocks are independent: they are decompressed side by side.
fn lz4_legacy(payload: &[u8]) -> Result<Bytes, BootError> {
    let size = trailer(payload).unwrap_or(0);
    let body = payload
        .get(4..payload.len().saturating_sub(4))
        .unwrap_or_default();
    let mut blocks = Vec::new();
    let mut rest = body;
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let block = after
            .get(..length)
            .ok_or_else(|| broken("lz4", "a block reaches past the end"))?;
        blocks.push(block);
        rest = &after[length..];
    }
    if size > LIMIT || size.div_ceil(LZ4_BLOCK) != blocks.len() {
        return Err(broken("lz4", "its size and its blocks disagree"));
    }
    let mut out = Bytes::zeroed(size);
    let work: Vec<(&[u8], &mut [u8])> = blocks.into_iter().zip(out.chunks_mut(LZ4_BLOCK)).collect();
    let queue = std::sync::Mutex::new(work.into_iter());
    let helpers = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(8);
    let decode = || {
        loop {
            let next = queue
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .next();
            let Some((block, to)) = next else {
                return Ok(());
            };
            let want = to.len();
            match lz4_flex::block::decompress_into(block, to) {
                Ok(got) if got == want => {}
                Ok(_) => return Err(broken("lz4", "a block is too short")),
                Err(error) => return Err(broken("lz4", error)),
            }
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..helpers).map(|_| scope.spawn(decode)).collect();
        let mut result = decode();
        for thread in threads {
            result = result.and(
                thread
                    .join()
                    .unwrap_or_else(|_| Err(broken("lz4", "the decoder stopped"))),
            );
        }
        result
    })?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn sample() -> Vec<u8> {
        (0..300_000u32)
            .flat_map(|n| (n / 7).to_le_bytes())
            .collect()
    }

    #[test]
    fn every_method_gives_the_kernel_back() {
        let plain = sample();
        let size = (plain.len() as u32).to_le_bytes();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        assert_eq!(decompress(&gzip.finish().unwrap()).unwrap()[..], plain);
        let mut packed = zstd::encode_all(&plain[..], 1).unwrap();
        packed.extend(size);
        assert_eq!(decompress(&packed).unwrap()[..], plain);
        let mut packed = liblzma::encode_all(&plain[..], 1).unwrap();
        packed.extend(size);
        assert_eq!(decompress(&packed).unwrap()[..], plain);
        let mut packed = LZ4_LEGACY.to_le_bytes().to_vec();
        for chunk in plain.chunks(LZ4_BLOCK) {
            let block = lz4_flex::block::compress(chunk);
            packed.extend((block.len() as u32).to_le_bytes());
            packed.extend(block);
        }
        packed.extend(size);
        assert_eq!(decompress(&packed).unwrap()[..], plain);
        packed.truncate(packed.len() - 9);
        assert!(decompress(&packed).is_err());
    }

    #[test]
    fn a_method_we_lack_is_named() {
        assert!(matches!(
            decompress(b"BZh91AY"),
            Err(BootError::Compression("bzip2"))
        ));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(magic in 0usize..6, bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let magics: [&[u8]; 6] = [&[0x1f, 0x8b, 8, 0], &[0x28, 0xb5, 0x2f, 0xfd], b"\xfd7zXZ\0", &[0x5d, 0, 0],
                &[0x02, 0x21, 0x4c, 0x18], &[]];
            let mut payload = magics[magic].to_vec();
            payload.extend(bytes);
            let _ = decompress(&payload);
        }
    }
}
