//! What this host says of itself: its boot, its kernel, its programs, its size.

use std::path::PathBuf;

/// The kernel's name for this boot; empty where it has none.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

/// The running kernel's release, as `6.1.0-13-amd64`.
pub fn kernel_release() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

/// Major and minor number of the running kernel.
pub fn kernel_version() -> (u32, u32) {
    version_of(&kernel_release())
}

/// The first two numbers of a release; 0 for what is none.
fn version_of(release: &str) -> (u32, u32) {
    let mut numbers = release
        .split(|letter: char| !letter.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Bytes of memory this host has.
pub fn memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram as u64 * u64::from(info.mem_unit.max(1))
}

/// The logical processors this process may use.
pub fn processors() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| count.get() as u32)
}

/// Where a program is: in PATH, or where the system's own are even if PATH does not say so.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/bin".into(), "/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read_by_number() {
        assert_eq!(version_of("6.1.0-13-cloud-amd64"), (6, 1));
        assert_eq!(version_of("6.10.3"), (6, 10));
        assert_eq!(version_of("7.0"), (7, 0));
        assert_eq!(version_of("6.18-rc1+"), (6, 18));
        assert_eq!(version_of(""), (0, 0));
        assert!(kernel_version() > (4, 0));
    }

    #[test]
    fn programs_are_found_and_missing_ones_are_not() {
        assert!(program("sh").is_some_and(|file| file.ends_with("sh")));
        assert_eq!(program("no-such-program"), None);
    }
}
