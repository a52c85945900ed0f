//! Between the reactor and threads that block: byte streams with back-pressure.
//!
//! The rooms below read and write as `std::io` does, on their own threads; the faces above stream. A bridge holds at
//! most a few chunks, so neither side runs away from the other, and either side's end is the other's.

use std::io::{self, Read, Write};

use bytes::{Buf, Bytes};
use futures_util::Stream;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;

/// Bytes of one chunk.
const CHUNK: usize = 64 * 1024;
/// Chunks between the two sides.
const DEPTH: usize = 4;

/// An async reader read by a thread.
pub struct BlockingReader {
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    current: Bytes,
}

impl BlockingReader {
    /// Reads `source` on the reactor for a thread to read. Must be called on the reactor.
    pub fn new<R: AsyncRead + Send + Unpin + 'static>(mut source: R) -> BlockingReader {
        let (sender, receiver) = mpsc::channel(DEPTH);
        tokio::spawn(async move {
            loop {
                let mut chunk = Vec::with_capacity(CHUNK);
                let read = tokio::select! {
                    read = source.read_buf(&mut chunk) => read,
                    () = sender.closed() => return,
                };
                let item = match read {
                    Ok(0) => return,
                    Ok(_) => Ok(Bytes::from(chunk)),
                    Err(error) => Err(error),
                };
                let failed = item.is_err();
                if sender.send(item).await.is_err() || failed {
                    return;
                }
            }
        });
        BlockingReader {
            receiver,
            current: Bytes::new(),
        }
    }
}

impl Read for BlockingReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        while self.current.is_empty() {
            match self.receiver.blocking_recv() {
                Some(Ok(chunk)) => self.current = chunk,
                Some(Err(error)) => return Err(error),
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

/// A thread's output as a stream.
pub struct BlockingWriter {
    sender: mpsc::Sender<io::Result<Bytes>>,
    buffer: Vec<u8>,
}

impl BlockingWriter {
    fn send(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK));
        self.sender
            .blocking_send(Ok(chunk.into()))
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for BlockingWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..count]);
        if self.buffer.len() >= CHUNK {
            self.send()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}

/// Runs `work` on a thread of its own pool; what it writes is the stream, its error the stream's last item.
pub fn stream_from<F>(work: F) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static
where
    F: FnOnce(&mut BlockingWriter) -> io::Result<()> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(DEPTH);
    tokio::task::spawn_blocking(move || {
        let mut writer = BlockingWriter {
            sender: sender.clone(),
            buffer: Vec::with_capacity(CHUNK),
        };
        if let Err(error) = work(&mut writer).and_then(|()| writer.flush()) {
            let _ = sender.blocking_send(Err(error));
        }
    });
    futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|item| (item, receiver))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt;

    #[tokio::test]
    async fn bytes_cross_both_ways_unchanged() {
        let all: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
        let mut reader = BlockingReader::new(io::Cursor::new(all.clone()));
        let stream = stream_from(move |writer| io::copy(&mut reader, writer).map(drop));
        let got: Vec<u8> = stream.map(|chunk| chunk.unwrap().to_vec()).concat().await;
        assert_eq!(got, all);
    }

    #[tokio::test]
    async fn a_listener_that_goes_ends_the_work() {
        let (done, ended) = tokio::sync::oneshot::channel();
        let stream = stream_from(move |writer| {
            let result = io::copy(&mut io::repeat(1), writer).map(drop);
            let _ = done.send(result.as_ref().map_err(io::Error::kind).err());
            result
        });
        drop(stream);
        assert_eq!(ended.await.unwrap(), Some(io::ErrorKind::BrokenPipe));
    }

    #[tokio::test]
    async fn an_error_is_the_last_item() {
        let items: Vec<_> = stream_from(|writer| {
            writer.write_all(b"abc")?;
            writer.flush()?;
            Err(io::Error::other("no more"))
        })
        .collect()
        .await;
        assert_eq!(items.len(), 2);
        assert!(items[0].is_ok() && items[1].is_err());
    }
}
