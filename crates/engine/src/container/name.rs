//! Names for containers nobody named.

const FIRST: [&str; 48] = [
    "able", "amber", "awake", "blithe", "bold", "brave", "bright", "brisk", "calm", "candid",
    "clear", "clever", "coral", "crisp", "deft", "eager", "early", "fair", "fleet", "fond",
    "frank", "gentle", "glad", "golden", "happy", "hardy", "keen", "kind", "lively", "lucid",
    "merry", "mild", "neat", "noble", "open", "patient", "plain", "proud", "quick", "quiet",
    "ready", "silver", "steady", "sunny", "swift", "tidy", "warm", "wise",
];
const SECOND: [&str; 48] = [
    "anchor", "barge", "beacon", "bell", "bollard", "bow", "breeze", "brig", "buoy", "canal",
    "cape", "capstan", "channel", "clipper", "compass", "coast", "crane", "cutter", "deck",
    "dinghy", "dock", "ferry", "galley", "gull", "harbor", "helm", "hull", "jetty", "keel",
    "ketch", "lagoon", "lantern", "ledge", "mast", "mooring", "oar", "pier", "pilot", "quay",
    "rudder", "sail", "schooner", "sextant", "shoal", "sloop", "tide", "trawler", "wharf",
];

/// A name; with a number where the first attempts were taken.
pub(crate) fn invent(attempt: u32) -> String {
    let mut bytes = [0u8; 3];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    let first = FIRST[usize::from(bytes[0]) % FIRST.len()];
    let second = SECOND[usize::from(bytes[1]) % SECOND.len()];
    if attempt < 5 {
        format!("{first}_{second}")
    } else {
        format!("{first}_{second}{}", bytes[2])
    }
}
