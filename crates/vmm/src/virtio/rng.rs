//! Entropy (section 5.4): every buffer is filled from the host's random source.

use super::{Backend, QueueError, Queues};

/// Bytes given for one buffer; a guest that offers gigabytes gets this much of each.
const LIMIT: u64 = 64 * 1024;

/// See the module.
pub struct Rng;

impl Backend for Rng {
    fn kind(&self) -> u16 {
        4
    }
    fn class(&self) -> u32 {
        0xff_0000
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![64]
    }
    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn serve(&self, index: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        queues.with(index, |queue, dma| {
            let mut bytes = Vec::new();
            while let Some(chain) = queue.pop(dma)? {
                bytes.resize(chain.writable_len().min(LIMIT) as usize, 0);
                let mut filled = 0;
                while filled < bytes.len() {
                    match rustix::rand::getrandom(
                        &mut bytes[filled..],
                        rustix::rand::GetRandomFlags::empty(),
                    ) {
                        Ok(count) => filled += count,
                        Err(rustix::io::Errno::INTR) => {}
                        Err(_) => break,
                    }
                }
                let written = chain.write(dma, 0, &bytes[..filled])?;
                queue.push(dma, chain.head, written as u32)?;
            }
            Ok(())
        })
    }
}
