//! How a layer is compressed, told by its first bytes rather than by what a manifest says.

use std::io::{self, BufRead, Read};

use crate::{Error, Result};

/// The compressions in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
    Xz,
}

/// Bytes that an archive may make the xz decoder take: `xz -9` needs 65 MiB, its largest dictionary 1.5 GiB.
const XZ_MEMORY: u64 = 256 << 20;

/// Tells the compression of content that begins with `head`.
///
/// # Errors
/// [`Error::Unsupported`] for bzip2, with the way around.
pub fn detect(head: &[u8]) -> Result<Compression> {
    let other = |name: &str, program: &str| {
        Err(Error::Unsupported(format!(
            "the archive is compressed with {name}, which is not read: uncompress it first ({program} -d FILE)"
        )))
    };
    match head {
        [0x1f, 0x8b, ..] => Ok(Compression::Gzip),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Compression::Zstd),
        // A skippable frame in front, as zstd:chunked and eStargz-like tools may write.
        [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Compression::Zstd),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Ok(Compression::Xz),
        [b'B', b'Z', b'h', ..] => other("bzip2", "bzip2"),
        _ => Ok(Compression::None),
    }
}

/// The uncompressed content of `source`, and how it was compressed.
///
/// # Errors
/// Those of [`detect`] and of reading.
pub fn reader<'a, R: BufRead + Send + 'a>(
    mut source: R,
) -> Result<(Compression, Box<dyn Read + Send + 'a>)> {
    let head = peek(&mut source).map_err(|e| Error::DamagedLayer(e.to_string()))?;
    let kind = detect(&head)?;
    let source = io::Cursor::new(head).chain(source);
    let reader: Box<dyn Read + Send + 'a> = match kind {
        Compression::None => Box::new(source),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(source)),
        Compression::Zstd => Box::new(
            zstd::stream::read::Decoder::with_buffer(source)
                .map_err(|e| Error::DamagedLayer(e.to_string()))?,
        ),
        Compression::Xz => {
            let stream = liblzma::stream::Stream::new_stream_decoder(
                XZ_MEMORY,
                liblzma::stream::CONCATENATED,
            )
            .map_err(|e| Error::DamagedLayer(e.to_string()))?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(source, stream))
        }
    };
    Ok((kind, reader))
}

/// The first six bytes, or all where there are fewer.
fn peek(source: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(6);
    while head.len() < 6 {
        let available = source.fill_buf()?;
        if available.is_empty() {
            break;
        }
        let part = available.len().min(6 - head.len());
        head.extend_from_slice(&available[..part]);
        source.consume(part);
    }
    Ok(head)
}

/// The compressor for layers made here: gzip, which every registry and engine reads, at its fastest.
pub fn gzip<W: io::Write>(sink: W) -> flate2::write::GzEncoder<W> {
    flate2::GzBuilder::new()
        .mtime(0)
        .write(sink, flate2::Compression::new(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn content_is_told_by_its_first_bytes() {
        let text = b"hello layers".repeat(100);
        let mut gz = gzip(Vec::new());
        gz.write_all(&text).unwrap();
        let zst = zstd::encode_all(&text[..], 1).unwrap();
        for (bytes, kind) in [
            (gz.finish().unwrap(), Compression::Gzip),
            (zst, Compression::Zstd),
            (liblzma::encode_all(&text[..], 6).unwrap(), Compression::Xz),
            (text.clone(), Compression::None),
        ] {
            let (found, mut reader) = reader(&bytes[..]).unwrap();
            assert_eq!(found, kind);
            let mut read = Vec::new();
            reader.read_to_end(&mut read).unwrap();
            assert_eq!(read, text);
        }
        assert!(matches!(detect(b"BZh9"), Err(Error::Unsupported(_))));
        assert_eq!(detect(b"").unwrap(), Compression::None);
    }
}
