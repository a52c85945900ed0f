//! The Linux/x86 boot image (kernel `Documentation/arch/x86/boot.rst`, "the real-mode kernel header").

use super::BootError;

/// The header begins here in the file and, in the zero page, at the same offset.
pub const HEADER_AT: usize = 0x1f1;
/// The header is within so many bytes of the file.
pub const HEADER_LIMIT: usize = 4096;
const XLF_KERNEL_64: u16 = 1;
/// Where the 64-bit entry of a compressed kernel lies.
pub const ENTRY_64: u64 = 0x200;

/// What of a bzImage's header matters to a loader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BzImage<'a> {
    /// The header's bytes, from offset 0x1f1 on.
    pub header: &'a [u8],
    /// The protected-mode part: decompressor and payload.
    pub code: &'a [u8],
    /// The compressed vmlinux.
    pub payload: &'a [u8],
    /// Where the decompressor wants to lie.
    pub pref_address: u64,
    /// Memory it needs from there on, to decompress in place.
    pub init_size: u32,
    pub initrd_max: u32,
    pub cmdline_max: u32,
    /// The 64-bit boot protocol is offered.
    pub has_64bit_entry: bool,
}

/// Reads the header; `None` where the file is no bzImage.
///
/// # Errors
/// [`BootError::BzImage`] where it is one and broken, or older than protocol 2.12 (Linux 3.8).
pub fn parse(file: &[u8]) -> Result<Option<BzImage<'_>>, BootError> {
    if file.get(0x202..0x206) != Some(b"HdrS") || file.get(0x1fe..0x200) != Some(&[0x55, 0xaa]) {
        return Ok(None);
    }
    let cut = || BootError::BzImage("it is cut short");
    let u16_at = |at: usize| {
        file.get(at..at + 2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]))
            .ok_or_else(cut)
    };
    let u32_at = |at: usize| {
        file.get(at..at + 4)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .ok_or_else(cut)
    };
    if u16_at(0x206)? < 0x20c {
        return Err(BootError::BzImage(
            "its boot protocol is older than 2.12 (Linux 3.8)",
        ));
    }
    if file.get(0x211).ok_or_else(cut)? & 1 == 0 {
        return Err(BootError::BzImage("it is a zImage, which loads low"));
    }
    let setup_sectors = match file[HEADER_AT] {
        0 => 4,
        n => usize::from(n),
    };
    let code = file.get((setup_sectors + 1) * 512..).ok_or_else(cut)?;
    let (offset, length) = (u32_at(0x248)? as usize, u32_at(0x24c)? as usize);
    let payload = code
        .get(offset..offset.checked_add(length).ok_or_else(cut)?)
        .ok_or_else(cut)?;
    let header_end = (0x202 + usize::from(file[0x201])).clamp(0x264, 0x290);
    Ok(Some(BzImage {
        header: file.get(HEADER_AT..header_end).ok_or_else(cut)?,
        code,
        payload,
        pref_address: u64::from(u32_at(0x258)?) | u64::from(u32_at(0x25c)?) << 32,
        init_size: u32_at(0x260)?,
        initrd_max: u32_at(0x22c)?,
        cmdline_max: u32_at(0x238)?,
        has_64bit_entry: u16_at(0x236)? & XLF_KERNEL_64 != 0,
    }))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A bzImage around `payload`.
    pub fn image(payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0u8; 1024];
        file[HEADER_AT] = 1;
        file[0x1fe..0x206].copy_from_slice(&[0x55, 0xaa, 0xeb, 0x62, b'H', b'd', b'r', b'S']);
        file[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        file[0x211] = 1;
        file[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        file[0x236] = 1;
        file[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
        file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        file[0x258..0x25c].copy_from_slice(&0x100_0000u32.to_le_bytes());
        file.extend(payload);
        file
    }

    #[test]
    fn the_payload_is_found() {
        let file = image(b"payload");
        let parsed = parse(&file).unwrap().unwrap();
        assert_eq!(
            (parsed.payload, parsed.cmdline_max, parsed.has_64bit_entry),
            (&b"payload"[..], 2047, true)
        );
        assert_eq!(parse(b"\x7fELF").unwrap(), None);
    }

    proptest! {
        #[test]
        fn no_file_panics(changes in prop::collection::vec((HEADER_AT..0x270, any::<u8>()), 0..12), cut in 0usize..1100) {
            let mut file = image(b"payload");
            for (at, value) in changes {
                file[at] = value;
            }
            file.truncate(cut);
            let _ = parse(&file);
        }
    }
}
