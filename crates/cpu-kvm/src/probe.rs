//! What this host's `/dev/kvm` is worth.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io;
use std::sync::OnceLock;

/// See [`probe`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// Hardware virtualization.
    Usable,
    /// The device answers, but the CPU has neither VT-x nor AMD-V: every instruction is emulated, at about
    /// two million a second.
    EmulatedOnly,
    /// The device is there and may not be opened, or lacks what we need; why.
    Denied(String),
    /// There is no such device.
    Missing,
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Probe::Usable => f.write_str("KVM is usable"),
            Probe::EmulatedOnly => {
                f.write_str("/dev/kvm only emulates (the CPU shows neither vmx nor svm)")
            }
            Probe::Denied(reason) => write!(f, "/dev/kvm cannot be used ({reason})"),
            Probe::Missing => f.write_str("there is no /dev/kvm"),
        }
    }
}

/// Looks at `/dev/kvm` and, the first time, at `/proc/cpuinfo`, which a jailed process no longer sees. Makes no machine.
pub fn probe() -> Probe {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Probe::Missing,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Probe::Denied("permission denied; add this user to the group kvm".into());
        }
        Err(error) => return Probe::Denied(error.to_string()),
        Ok(_) => {}
    }
    let kvm = match kvm_ioctls::Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return Probe::Denied(error.to_string()),
    };
    if kvm.get_api_version() != 12 {
        return Probe::Denied(format!(
            "its interface has version {}, not 12",
            kvm.get_api_version()
        ));
    }
    for (capability, name) in [
        (kvm_ioctls::Cap::SplitIrqchip, "split interrupt controllers"),
        (kvm_ioctls::Cap::SignalMsi, "interrupt messages"),
        (kvm_ioctls::Cap::ImmediateExit, "immediate exits"),
    ] {
        if !kvm.check_extension(capability) {
            return Probe::Denied(format!(
                "it lacks {name}; a Linux kernel from 4.12 on has them"
            ));
        }
    }
    static VIRTUALIZATION: OnceLock<bool> = OnceLock::new();
    let virtualization = VIRTUALIZATION.get_or_init(|| {
        has_virtualization(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
    });
    if *virtualization {
        Probe::Usable
    } else {
        Probe::EmulatedOnly
    }
}

fn has_virtualization(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter_map(|line| line.strip_prefix("flags"))
        .any(|flags| {
            flags
                .split_ascii_whitespace()
                .any(|flag| flag == "vmx" || flag == "svm")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtualization_is_a_whole_flag() {
        assert!(has_virtualization("model\t: 1\nflags\t\t: fpu vmx sse\n"));
        assert!(!has_virtualization(
            "flags\t\t: fpu svm_lock\nvmx flags\t: vnmi\n"
        ));
        assert!(!has_virtualization(""));
    }

    #[test]
    fn probing_answers_whatever_this_host_is() {
        assert!(!probe().to_string().is_empty());
    }
}
