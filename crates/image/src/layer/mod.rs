//! Layers: tars that are unpacked once into folders overlayfs stacks, and packed again from them.

pub mod apply;
pub mod compression;
pub mod merged;
pub mod pack;
pub mod tar;
pub mod tree;
pub mod unpack;

/// The most that one layer may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Files, folders, links and devices.
    pub entries: u64,
    /// Bytes of all files together, uncompressed.
    pub bytes: u64,
    /// Bytes that must stay free on the file system.
    pub keep_free: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            entries: 4_000_000,
            bytes: 512 << 30,
            keep_free: 64 << 20,
        }
    }
}

/// Whether overlayfs on this host keeps its marks in `user.overlay.*` (mounted with `userxattr`, for callers
/// without privileges) rather than in `trusted.overlay.*`.
pub fn uses_user_xattrs() -> bool {
    base::userns::is_rootless()
}

/// The attribute that marks a folder as hiding everything beneath it in lower layers.
pub fn opaque_attribute() -> &'static str {
    if uses_user_xattrs() {
        "user.overlay.opaque"
    } else {
        "trusted.overlay.opaque"
    }
}

/// Attributes overlayfs keeps for itself; they never enter or leave through a tar.
pub(crate) fn is_overlay_attribute(name: &[u8]) -> bool {
    name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.")
}
