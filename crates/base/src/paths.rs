//! Where a daemon keeps what it has: the system's folders for root, the XDG ones for users.

use std::env;
use std::path::{Path, PathBuf};

/// The folders and sockets of one daemon. Two daemons with different state folders share nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// Records, images, volumes, logs: survives a reboot.
    pub state: PathBuf,
    /// Sockets and what a reboot makes void; on a tmpfs where there is one.
    pub run: PathBuf,
    /// The daemon's own socket.
    pub socket: PathBuf,
    /// The Docker Engine API socket.
    pub docker_socket: PathBuf,
    /// The configuration file.
    pub config: PathBuf,
}

impl Paths {
    /// `/var/lib/berth`, `/run/berth`, `/etc/berth` for root; the XDG base directories for others.
    pub fn of_this_user() -> Paths {
        let rootless = crate::userns::owner();
        if rustix::process::geteuid().is_root() && rootless.is_none() {
            return Paths {
                state: "/var/lib/berth".into(),
                run: "/run/berth".into(),
                socket: "/run/berth/berth.sock".into(),
                docker_socket: "/run/berth/docker.sock".into(),
                config: "/etc/berth/berth.toml".into(),
            };
        }
        let home = PathBuf::from(env::var_os("HOME").unwrap_or_else(|| "/".into()));
        let xdg = |name: &str, fallback: PathBuf| {
            env::var_os(name)
                .map(PathBuf::from)
                .filter(|p| p.is_absolute())
                .unwrap_or(fallback)
        };
        let uid = rootless.unwrap_or_else(|| rustix::process::geteuid().as_raw());
        let run = xdg("XDG_RUNTIME_DIR", format!("/tmp/berth-run-{uid}").into()).join("berth");
        Paths {
            state: xdg("XDG_DATA_HOME", home.join(".local/share")).join("berth"),
            socket: run.join("berth.sock"),
            docker_socket: run.join("docker.sock"),
            run,
            config: xdg("XDG_CONFIG_HOME", home.join(".config")).join("berth/berth.toml"),
        }
    }

    /// Everything of a second daemon, inside `state`.
    pub fn beneath(state: &Path) -> Paths {
        let run = state.join("run");
        Paths {
            state: state.to_owned(),
            socket: run.join("berth.sock"),
            docker_socket: run.join("docker.sock"),
            run,
            config: state.join("berth.toml"),
        }
    }
}
