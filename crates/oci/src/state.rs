//! Where the command keeps what it must know of a container between two calls: a directory per container with
//! `state.json` (a record, and the bundle's configuration as it was) and `start.sock`, on which init waits.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use base::file::Durability;
use base::pidfd::{PidFd, ProcessKey};
use oci_spec::runtime::Spec;
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};

use crate::cgroup::Cgroup;
use crate::error::{Context, Error, Result};

/// The states of runtime-spec, "State".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    pub const fn name(self) -> &'static str {
        match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        }
    }
}

/// What is kept of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    pub oci_version: String,
    pub id: String,
    pub pid: i32,
    pub key: Option<ProcessKey>,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    pub created: String,
    pub owner: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<Cgroup>,
    #[serde(default)]
    pub rootless: bool,
}

#[derive(Deserialize)]
struct Configured {
    config: Spec,
}

/// The directory of all containers of one `--root`.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    pub fn new(root: PathBuf) -> Store {
        Store { root }
    }

    pub fn directory(&self, id: &str) -> PathBuf {
        self.root.join(id)
    }

    /// Takes an id: makes its directory.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is no id, [`Error::Conflict`] for one in use.
    pub fn reserve(&self, id: &str) -> Result<PathBuf> {
        check_id(id)?;
        let directory = self.directory(id);
        let make = || {
            use std::os::unix::fs::DirBuilderExt;
            fs::DirBuilder::new().mode(0o700).create(&directory)
        };
        let made = match make() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(&self.root)
                    .during(|| format!("make {}", self.root.display()))?;
                make()
            }
            other => other,
        };
        match made {
            Ok(()) => Ok(directory),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(Error::Conflict(
                format!("container with id {id} exists already"),
            )),
            Err(error) => Err(error).during(|| format!("make {}", directory.display())),
        }
    }

    /// Writes the record, with the configuration's bytes behind it.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn write(&self, record: &Record, config: &[u8]) -> Result<()> {
        let path = self.directory(&record.id).join("state.json");
        let mut bytes = serde_json::to_vec(record).map_err(|source| Error::Json {
            path: path.clone(),
            source,
        })?;
        bytes.pop();
        bytes.extend_from_slice(b",\"config\":");
        bytes.extend_from_slice(config.trim_ascii());
        bytes.push(b'}');
        base::file::write_atomic(&path, &bytes, Durability::Process)
            .during(|| format!("write {}", path.display()))
    }

    /// Reads a container's record.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn read(&self, id: &str) -> Result<Record> {
        let (path, bytes) = self.bytes(id)?;
        serde_json::from_slice(&bytes).map_err(|source| Error::Json { path, source })
    }

    /// Reads the configuration the container was made with.
    ///
    /// # Errors
    /// As [`Store::read`].
    pub fn config(&self, id: &str) -> Result<Spec> {
        let (path, bytes) = self.bytes(id)?;
        serde_json::from_slice(&bytes)
            .map(|whole: Configured| whole.config)
            .map_err(|source| Error::Json { path, source })
    }

    fn bytes(&self, id: &str) -> Result<(PathBuf, Vec<u8>)> {
        check_id(id)?;
        let path = self.directory(id).join("state.json");
        match fs::read(&path) {
            Ok(bytes) => Ok((path, bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(Error::NotFound(id.to_owned()))
            }
            Err(error) => Err(error).during(|| format!("read {}", path.display())),
        }
    }

    /// Rewrites the record and keeps the configuration.
    ///
    /// # Errors
    /// As [`Store::write`].
    pub fn update(&self, record: &Record) -> Result<()> {
        let config =
            serde_json::to_vec(&self.config(&record.id)?).map_err(|source| Error::Json {
                path: self.directory(&record.id),
                source,
            })?;
        self.write(record, &config)
    }

    /// The ids of all containers.
    ///
    /// # Errors
    /// Whatever the file system says; a root that does not exist has none.
    pub fn ids(&self) -> Result<Vec<String>> {
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.during(|| format!("list {}", self.root.display()))?,
        };
        let mut ids = Vec::new();
        for entry in entries {
            let entry = entry.during(|| format!("list {}", self.root.display()))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if check_id(&name).is_ok() && entry.path().join("state.json").exists() {
                ids.push(name);
            }
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// Forgets a container.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn remove(&self, id: &str) -> Result<()> {
        check_id(id)?;
        let directory = self.directory(id);
        // The three files that can be there, then the directory; anything else is swept with it.
        let _ = fs::remove_file(directory.join("start.sock"));
        let _ = fs::remove_file(directory.join("state.json"));
        match fs::remove_dir(&directory) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(_) => {
                fs::remove_dir_all(&directory).during(|| format!("remove {}", directory.display()))
            }
        }
    }

    /// The socket init will wait at.
    ///
    /// # Errors
    /// Whatever the system says.
    pub fn listen(&self, id: &str) -> Result<OwnedFd> {
        let what = || "make the socket the container waits at".to_owned();
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .during(what)?;
        let (_directory, address) = self.address(id)?;
        rustix::net::bind(&socket, &address).during(what)?;
        rustix::net::listen(&socket, 1).during(what)?;
        Ok(socket)
    }

    /// Connects to a container that waits; the name is taken away, so that it is started once.
    ///
    /// # Errors
    /// [`Error::Conflict`] where it does not wait.
    pub fn connect(&self, id: &str) -> Result<OwnedFd> {
        let what = || "connect to the waiting container".to_owned();
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .during(what)?;
        let (_directory, address) = self.address(id)?;
        let connected = rustix::net::connect(&socket, &address);
        match connected {
            Ok(()) => {}
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => {
                return Err(Error::Conflict(
                    "cannot start a container that is not in state created".into(),
                ));
            }
            Err(errno) => return Err(errno).during(what),
        }
        let _ = fs::remove_file(self.directory(id).join("start.sock"));
        Ok(socket)
    }

    /// Socket addresses hold 108 bytes: the directory is named by descriptor.
    fn address(&self, id: &str) -> Result<(OwnedFd, SocketAddrUnix)> {
        let directory = self.directory(id);
        let fd = rustix::fs::open(
            &directory,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .during(|| format!("open {}", directory.display()))?;
        let address = SocketAddrUnix::new(format!(
            "/proc/self/fd/{}/start.sock",
            fd.as_fd().as_raw_fd()
        ))
        .during(|| "a socket's address".into())?;
        Ok((fd, address))
    }

    /// The state a container is in now.
    pub fn status(&self, record: &Record) -> Status {
        if record.key.is_none() {
            return Status::Creating;
        }
        if !matches!(open(record), Ok(Some(_))) {
            return Status::Stopped;
        }
        if record.cgroup.as_ref().is_some_and(Cgroup::is_frozen) {
            return Status::Paused;
        }
        if self.directory(&record.id).join("start.sock").exists() {
            Status::Created
        } else {
            Status::Running
        }
    }
}

/// The container's init, if it lives; a zombie does not.
///
/// # Errors
/// Where /proc cannot be read.
pub fn open(record: &Record) -> io::Result<Option<PidFd>> {
    let Some(key) = record.key else {
        return Ok(None);
    };
    let Some(fd) = key.open()? else {
        return Ok(None);
    };
    let stat = fs::read_to_string(format!("/proc/{}/stat", key.pid)).unwrap_or_default();
    let state = stat
        .rfind(')')
        .and_then(|at| stat[at + 1..].trim_start().chars().next());
    Ok(if matches!(state, None | Some('Z' | 'X')) {
        None
    } else {
        Some(fd)
    })
}

/// An id names a directory: letters, digits and `_+-.`, as runc has it.
///
/// # Errors
/// [`Error::Invalid`].
pub fn check_id(id: &str) -> Result<()> {
    let good = !id.is_empty()
        && id.len() <= 1024
        && id != "."
        && id != ".."
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte));
    if good {
        Ok(())
    } else {
        Err(Error::invalid(format!(
            "invalid container ID format: {id:?}: letters, digits, and any of _+-. are allowed"
        )))
    }
}

/// The root of the state where `--root` does not say: `/run/berth-oci`, or below XDG_RUNTIME_DIR for users.
pub fn default_root() -> PathBuf {
    if rustix::process::geteuid().is_root() && std::env::var_os("ROOTLESS").is_none() {
        return PathBuf::from("/run/berth-oci");
    }
    match std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
    {
        Some(path) => path.join("berth-oci"),
        None => {
            Path::new("/tmp").join(format!("berth-oci-{}", rustix::process::geteuid().as_raw()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_no_path() {
        assert!(check_id("a_b+c-d.e1").is_ok());
        for id in ["", ".", "..", "a/b", "a b", "é"] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_its_id_is_taken_once() {
        let scratch = tempfile::tempdir().unwrap();
        let store = Store::new(scratch.path().join("deep/root"));
        store.reserve("c1").unwrap();
        assert!(matches!(store.reserve("c1"), Err(Error::Conflict(_))));
        let record = Record {
            oci_version: "1.2.1".into(),
            id: "c1".into(),
            pid: 7,
            key: ProcessKey::of(std::process::id() as i32).ok(),
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: base::time::now_rfc3339(),
            owner: "root".into(),
            cgroup: None,
            rootless: false,
        };
        store
            .write(&record, b" {\"ociVersion\":\"1.0.0\",\"hostname\":\"h\"}\n")
            .unwrap();
        assert_eq!(store.read("c1").unwrap(), record);
        assert_eq!(store.config("c1").unwrap().hostname().as_deref(), Some("h"));
        assert_eq!(store.ids().unwrap(), ["c1"]);
        assert_eq!(store.status(&record), Status::Running);
        store.remove("c1").unwrap();
        assert!(matches!(store.read("c1"), Err(Error::NotFound(_))));
    }
}
