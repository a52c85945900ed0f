//! What is known of one machine, on disk and to people.

use std::path::PathBuf;

use base::Id;
use base::pidfd::ProcessKey;
use net::{Endpoint, PortMap, PublishedPort};
use serde::{Deserialize, Serialize};
use vmm::machine::CpuChoice;
use vmm::process::{ExitRecord, OnCrash};

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
    /// Bytes; 0 stands for 10 GiB.
    pub disk: u64,
    pub cpu: CpuChoice,
    /// A bridge network; the default one where empty.
    pub network: String,
    pub ports: Vec<PortMap>,
    pub on_crash: OnCrash,
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

/// A machine as it is recorded. The state machine:
///
/// ```text
/// created ──start──▶ running ──power-off, stop, kill, crash──▶ stopped ──start──▶ running
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
    /// Present while a process runs it.
    pub run: Option<Run>,
    pub last_exit: Option<ExitRecord>,
}

/// A running machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    pub process: ProcessKey,
    /// RFC 3339.
    pub started: String,
    pub endpoint: Endpoint,
    pub ports: Vec<PublishedPort>,
}

/// A machine as people see it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineView {
    pub id: Id,
    pub name: String,
    pub image: String,
    pub image_id: String,
    /// `created`, `starting`, `running`, `paused` or `stopped`.
    pub state: String,
    pub cpus: u32,
    pub memory: u64,
    pub disk: u64,
    /// Bytes the disk takes on the host.
    pub disk_used: u64,
    /// `kvm` or `soft`, while running.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_note: Option<String>,
    pub network: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    pub ports: Vec<PublishedPort>,
    pub created: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    pub resets: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_exit: Option<ExitRecord>,
    pub folder: PathBuf,
}

/// What a running machine uses.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct MachineStats {
    pub name: String,
    /// Host CPU time since its start, nanoseconds.
    pub cpu_time: u64,
    /// Resident bytes of its process, the guest's memory included.
    pub memory_used: u64,
    pub memory: u64,
    pub disk_used: u64,
    pub disk: u64,
}
