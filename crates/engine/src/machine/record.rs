//! What is known of one machine, on disk and to people.

use std::collections::BTreeMap;
use std::path::PathBuf;

use base::Id;
use base::pidfd::ProcessKey;
use disk::Format;
use net::{Endpoint, PortMap, PublishedPort};
use serde::{Deserialize, Serialize};
use vmm::boot::DiskBus;
use vmm::machine::CpuChoice;
use vmm::process::disks::DiskCounts;
use vmm::process::protocol::GuestMemory;
use vmm::process::{ExitRecord, OnCrash, OnDiskFull};

/// The network of a machine whose process reaches out by itself, with the rights of its user.
pub const USER_NETWORK: &str = "user";

/// No network: the machine has no card.
pub const NO_NETWORK: &str = "none";

/// What a person asks for.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MachineSpec {
    pub name: String,
    /// An image with a kernel in `/boot`.
    pub image: String,
    /// Host logical processors the guest sees; 0 stands for 1.
    pub cpus: u32,
    /// Bytes; 0 stands for 1 GiB.
    pub memory: u64,
    /// Bytes of the root disk; 0 stands for 10 GiB, or for what `disk_file` has.
    pub disk: u64,
    /// A disk image (raw or qcow2) of which the root disk is a copy, instead of the image's files.
    pub disk_file: Option<PathBuf>,
    /// A kernel instead of the image's, copied at creation.
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    /// Further disks, in order.
    pub drives: Vec<DriveSpec>,
    pub cpu: CpuChoice,
    /// A bridge network, [`USER_NETWORK`] or [`NO_NETWORK`]; the default network where empty.
    pub network: String,
    pub ports: Vec<PortMap>,
    pub on_crash: OnCrash,
    pub on_disk_full: OnDiskFull,
    pub restart: Restart,
    /// Allow more memory than the host has.
    pub overcommit: bool,
    /// Words for the kernel's command line.
    pub append: String,
    /// The root password as crypt(3) writes it; without it root cannot log in with one.
    pub password_hash: Option<String>,
    /// Lines of root's `authorized_keys`.
    pub ssh_keys: Vec<String>,
    /// The console logs root in without a question.
    pub autologin: bool,
}

/// A further disk: a file of the user's, or a new one of a size.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DriveSpec {
    /// Used where it lies; the machine's removal leaves it.
    pub path: Option<PathBuf>,
    /// Bytes of a new disk, where there is no path.
    pub size: u64,
    pub read_only: bool,
    pub bus: DiskBus,
    /// Looked up once, at creation, where it is not said.
    pub format: Option<Format>,
}

/// A further disk as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    pub path: PathBuf,
    pub format: Format,
    pub read_only: bool,
    #[serde(default)]
    pub bus: DiskBus,
    /// Bytes the guest sees.
    pub size: u64,
    /// It lies in the machine's folder and goes with it.
    pub own: bool,
}

/// When a machine that ended is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    #[default]
    No,
    /// Where it crashed, or its process was killed or the host went down.
    OnFailure,
    /// Whatever its end, and at the daemon's start.
    Always,
    /// As always, but not once a person stopped it.
    UnlessStopped,
}

/// What may be changed of a machine; what is absent stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MachineChange {
    pub cpus: Option<u32>,
    pub memory: Option<u64>,
    pub disk: Option<u64>,
    /// New sizes of further disks, bytes, by their place.
    pub drives: Option<BTreeMap<usize, u64>>,
    pub cpu: Option<CpuChoice>,
    pub on_crash: Option<OnCrash>,
    pub on_disk_full: Option<OnDiskFull>,
    pub restart: Option<Restart>,
    pub overcommit: Option<bool>,
    pub append: Option<String>,
}

/// A machine as it is recorded. The state machine:
///
/// ```text
/// created ──start──▶ running ──power-off, stop, kill, crash──▶ stopped ──start, restart policy──▶ running
///     └──────────────── remove ◀───────────────────────────────────┘
/// ```
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    /// Of this structure: 1.
    pub version: u32,
    pub id: Id,
    pub spec: MachineSpec,
    pub image_id: String,
    /// RFC 3339.
    pub created: String,
    /// Kept over restarts, so that the guest keeps its lease.
    pub mac: Option<net::Mac>,
    pub initrd: bool,
    /// The folder of the image's files that its disk lies on, below `machine-bases`.
    #[serde(default)]
    pub base: Option<String>,
    /// Of the root disk.
    #[serde(default = "raw")]
    pub format: Format,
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// Present while a process runs it.
    pub run: Option<Run>,
    /// A person ended it.
    #[serde(default)]
    pub stopped: bool,
    pub last_exit: Option<ExitRecord>,
}

fn raw() -> Format {
    Format::Raw
}

/// A running machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    pub process: ProcessKey,
    /// RFC 3339.
    pub started: String,
    /// Absent without a network of the host's.
    pub endpoint: Option<Endpoint>,
    pub ports: Vec<PublishedPort>,
    /// Its cgroup's path below each hierarchy.
    #[serde(default)]
    pub cgroup: Option<String>,
    /// It was ended because the host went down.
    #[serde(default)]
    pub host_went_down: bool,
}

/// A machine as people see it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineView {
    pub id: Id,
    pub name: String,
    pub image: String,
    pub image_id: String,
    /// `created`, `starting`, `running`, `paused`, `unresponsive` (its process does not answer) or `stopped`.
    pub state: String,
    /// What keeps it from running, as a full disk of the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    pub cpus: u32,
    pub memory: u64,
    pub disk: u64,
    /// Bytes the disk takes on the host, without what it shares with other machines of its image.
    pub disk_used: u64,
    pub disk_format: Format,
    pub drives: Vec<Drive>,
    /// `kvm` or `soft`, while running.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_note: Option<String>,
    pub network: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address6: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    pub ports: Vec<PublishedPort>,
    pub on_crash: OnCrash,
    #[serde(default)]
    pub on_disk_full: OnDiskFull,
    pub restart: Restart,
    pub created: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
    pub resets: u64,
    /// The crash after which the guest was started again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_crash: Option<String>,
    pub last_exit: Option<ExitRecord>,
    pub folder: PathBuf,
}

/// What a running machine uses.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct MachineStats {
    pub name: String,
    pub cpus: u32,
    /// Host CPU time since its start, nanoseconds.
    pub cpu_time: u64,
    /// When that was read, nanoseconds of the host's monotonic clock: two readings give a rate.
    pub read_at: u64,
    /// Resident bytes of its process, the guest's memory included.
    pub memory_used: u64,
    pub memory: u64,
    pub disk_used: u64,
    pub disk: u64,
    /// What the guest has and says of its memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_memory: Option<GuestMemory>,
    /// By disk, the root disk first.
    pub disks: Vec<DiskCounts>,
    /// Bytes the guest received and sent; absent without a network of the host's.
    pub received: Option<u64>,
    pub sent: Option<u64>,
}
