//! The identify data structures (NVMe Base 1.4, 5.15.2).

use disk::Disk;

use super::log;

pub const LEN: usize = 4096;
/// Largest transfer, as a power of two of pages: 512 KiB.
pub const MAX_TRANSFER_SHIFT: u8 = 7;
pub const VERSION: u32 = 0x0001_0400;
/// Of the events that can be told: a namespace's data changed.
pub const NAMESPACE_EVENTS: u32 = 1 << 8;
/// Asynchronous event requests kept at once, less one.
pub const EVENT_REQUESTS: u8 = 3;

const BLOCK_SHIFT: u32 = 9;
/// Blocks in a page of the host.
const PREFERRED_BLOCKS: u16 = 8;

/// Twelve hexadecimal digits that name the controller.
pub fn serial(identity: u64) -> String {
    format!("BERTH{identity:015X}")
}

fn text(field: &mut [u8], value: &str) {
    field.fill(b' ');
    for (to, from) in field.iter_mut().zip(value.bytes()) {
        *to = from;
    }
}

pub fn controller(identity: u64, namespaces: u32) -> Vec<u8> {
    let mut data = vec![0u8; LEN];
    data[0..2].copy_from_slice(&super::VENDOR.to_le_bytes());
    data[2..4].copy_from_slice(&super::VENDOR.to_le_bytes());
    text(&mut data[4..24], &serial(identity));
    text(&mut data[24..64], "Berth NVMe disk");
    text(&mut data[64..72], "1");
    data[77] = MAX_TRANSFER_SHIFT;
    data[78] = 1;
    data[80..84].copy_from_slice(&VERSION.to_le_bytes());
    data[92..96].copy_from_slice(&NAMESPACE_EVENTS.to_le_bytes());
    // An I/O controller.
    data[111] = 1;
    // Format NVM.
    data[256..258].copy_from_slice(&0x02u16.to_le_bytes());
    data[259] = EVENT_REQUESTS;
    // One read-only firmware slot.
    data[260] = 0b11;
    // Effects log; parts of log pages.
    data[261] = 0b110;
    data[262] = (log::ERRORS - 1) as u8;
    // Warning and critical temperature, kelvin.
    data[266..268].copy_from_slice(&343u16.to_le_bytes());
    data[268..270].copy_from_slice(&353u16.to_le_bytes());
    data[512] = 0x66;
    data[513] = 0x44;
    data[516..520].copy_from_slice(&namespaces.to_le_bytes());
    // Dataset management and write zeroes.
    data[520..522].copy_from_slice(&0x0cu16.to_le_bytes());
    // A volatile write cache; a flush may name all namespaces.
    data[525] = 0b111;
    let name = format!("nqn.2014-08.org.nvmexpress:uuid:{}", uuid_text(identity, 0));
    data[768..768 + name.len()].copy_from_slice(name.as_bytes());
    // The one power state: 25 W at most, in hundredths.
    data[2048..2050].copy_from_slice(&2500u16.to_le_bytes());
    data
}

pub fn namespace(disk: &dyn Disk, identity: u64, number: u32) -> Vec<u8> {
    let mut data = vec![0u8; LEN];
    let blocks = disk.len() >> BLOCK_SHIFT;
    for at in [0, 8, 16] {
        data[at..at + 8].copy_from_slice(&blocks.to_le_bytes());
    }
    // Thin provisioning; the sizes that the host likes best are told: its pages.
    data[24] = 1 | 1 << 4;
    for at in [64, 66, 68, 70, 72] {
        data[at..at + 2].copy_from_slice(&(PREFERRED_BLOCKS - 1).to_le_bytes());
    }
    data[99] = u8::from(disk.read_only());
    data[104..120].copy_from_slice(&uuid(identity, number));
    // The one format: 512-byte blocks without metadata.
    data[128..132].copy_from_slice(&(BLOCK_SHIFT << 16).to_le_bytes());
    data
}

/// The list of a namespace's identifiers: its UUID.
pub fn descriptors(identity: u64, number: u32) -> Vec<u8> {
    let mut data = vec![0u8; LEN];
    data[0] = 3;
    data[1] = 16;
    data[4..20].copy_from_slice(&uuid(identity, number));
    data
}

/// Namespace numbers above `after`.
pub fn active(count: u32, after: u32) -> Vec<u8> {
    let mut data = vec![0u8; LEN];
    for (slot, number) in data
        .chunks_exact_mut(4)
        .zip(after.saturating_add(1)..=count)
    {
        slot.copy_from_slice(&number.to_le_bytes());
    }
    data
}

/// A stable name-based identifier in the form of a version 8 UUID (RFC 9562, 5.8).
fn uuid(identity: u64, number: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..8].copy_from_slice(&identity.to_be_bytes());
    bytes[8..12].copy_from_slice(b"brth");
    bytes[12..16].copy_from_slice(&number.to_be_bytes());
    bytes[6] = bytes[6] & 0xf | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}

fn uuid_text(identity: u64, number: u32) -> String {
    let hex: String = uuid(identity, number)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}
