//! Physical region pages: where a command's data lies in guest memory (NVMe Base 1.4, 4.3).

use super::command::{Command, Status};
use crate::memory::Dma;

pub const PAGE: u64 = 4096;
/// Pages of lists one command may chain through; the largest transfer needs one, and one more for its offset.
const LIST_LIMIT: usize = 4;

/// Address and length of each piece of guest memory.
pub type Pieces = Vec<(u64, usize)>;

/// The pieces of guest memory that hold `len` bytes of the command's data, merged where they touch.
///
/// # Errors
/// [`Status::INVALID_PRP`] for a list that is misaligned or chains on and on, [`Status::DATA_TRANSFER`] for one
/// outside memory. Whether the pieces are within memory shows when they are used.
pub fn pieces(dma: &Dma, command: &Command, len: u64) -> Result<Pieces, Status> {
    // SGLs are not offered.
    if command.flags >> 6 != 0 {
        return Err(Status::INVALID_FIELD);
    }
    if command.prp1 & 3 != 0 {
        return Err(Status::INVALID_PRP);
    }
    let mut pieces = Pieces::new();
    let mut left = len;
    let mut add = |address: u64, left: &mut u64| {
        let piece = (*left).min(PAGE - address % PAGE);
        *left -= piece;
        let piece = piece as usize;
        match pieces.last_mut() {
            Some((start, len)) if start.checked_add(*len as u64) == Some(address) => *len += piece,
            _ => pieces.push((address, piece)),
        }
    };
    add(command.prp1, &mut left);
    if left == 0 {
        return Ok(pieces);
    }
    if left <= PAGE {
        if !command.prp2.is_multiple_of(PAGE) {
            return Err(Status::INVALID_PRP);
        }
        add(command.prp2, &mut left);
        return Ok(pieces);
    }
    let mut list = command.prp2;
    if list & 7 != 0 {
        return Err(Status::INVALID_PRP);
    }
    for _ in 0..LIST_LIMIT {
        let wanted = left.div_ceil(PAGE);
        let room = (PAGE - list % PAGE) / 8;
        let mut bytes = vec![0; wanted.min(room) as usize * 8];
        dma.read(list, &mut bytes)
            .map_err(|_| Status::DATA_TRANSFER)?;
        let mut entries = bytes
            .chunks_exact(8)
            .map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap_or_default()));
        // The last slot of a page points to the next list where more than it could name is wanted.
        let chained = wanted > room;
        for _ in 0..wanted.min(room) - u64::from(chained) {
            let entry = entries.next().unwrap_or(1);
            if !entry.is_multiple_of(PAGE) {
                return Err(Status::INVALID_PRP);
            }
            add(entry, &mut left);
        }
        if !chained {
            return Ok(pieces);
        }
        list = entries.next().unwrap_or(1);
        if !list.is_multiple_of(PAGE) {
            return Err(Status::INVALID_PRP);
        }
    }
    Err(Status::INVALID_PRP)
}

/// Copies guest memory into `data`.
pub fn gather(dma: &Dma, pieces: &[(u64, usize)], mut data: &mut [u8]) -> Result<(), Status> {
    for (address, len) in pieces {
        let (piece, rest) = data.split_at_mut_checked(*len).ok_or(Status::INTERNAL)?;
        dma.read(*address, piece)
            .map_err(|_| Status::DATA_TRANSFER)?;
        data = rest;
    }
    Ok(())
}

/// Copies `data` into guest memory.
pub fn scatter(dma: &Dma, pieces: &[(u64, usize)], mut data: &[u8]) -> Result<(), Status> {
    for (address, len) in pieces {
        let (piece, rest) = data.split_at_checked(*len).ok_or(Status::INTERNAL)?;
        dma.write(*address, piece)
            .map_err(|_| Status::DATA_TRANSFER)?;
        data = rest;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::test_board::Recorder;
    use proptest::prelude::*;
    use std::sync::Arc;

    fn command(prp1: u64, prp2: u64) -> Command {
        Command {
            opcode: 2,
            flags: 0,
            id: 1,
            namespace: 1,
            prp1,
            prp2,
            words: [0; 6],
        }
    }

    fn dma() -> Dma {
        Dma::new(
            Arc::new(crate::memory::allocate(16 << 20).unwrap()),
            Arc::new(Recorder::default()),
        )
    }

    #[test]
    fn one_page_two_pages_and_a_list() {
        let dma = dma();
        assert_eq!(pieces(&dma, &command(0x1ffc, 0), 4).unwrap(), [(0x1ffc, 4)]);
        assert_eq!(
            pieces(&dma, &command(0x1800, 0x9000), 4096).unwrap(),
            [(0x1800, 0x800), (0x9000, 0x800)]
        );
        for (slot, page) in [0x2_0000u64, 0x2_1000, 0x5_0000].into_iter().enumerate() {
            dma.write(0x8000 + slot as u64 * 8, &page.to_le_bytes())
                .unwrap();
        }
        assert_eq!(
            pieces(&dma, &command(0x1000, 0x8000), 4 * 4096).unwrap(),
            [(0x1000, 0x1000), (0x2_0000, 0x2000), (0x5_0000, 0x1000)]
        );
    }

    #[test]
    fn a_list_that_points_to_itself_ends() {
        let dma = dma();
        dma.write(0x8ff8, &0x8000u64.to_le_bytes()).unwrap();
        assert!(pieces(&dma, &command(0x1000, 0x8ff8), 8 << 20).is_err());
        assert_eq!(
            pieces(&dma, &command(0x1000, !0xfff), 8 << 20),
            Err(Status::DATA_TRANSFER)
        );
    }

    proptest! {
        #[test]
        fn any_list_gives_the_length_or_an_error(
            prp1 in any::<u64>(), prp2 in 0u64..0x1_0000, len in 1u64..(1 << 20),
            list in prop::collection::vec(any::<u64>(), 0..600),
        ) {
            let dma = dma();
            let bytes: Vec<u8> = list.iter().flat_map(|entry| (entry & 0xff_f000).to_le_bytes()).collect();
            dma.write(0x4000, &bytes).unwrap();
            if let Ok(found) = pieces(&dma, &command(prp1 & 0xff_fffc, prp2 & !7), len) {
                prop_assert_eq!(found.iter().map(|(_, len)| *len as u64).sum::<u64>(), len);
            }
        }
    }
}
