//! A container's cgroup by its path.

use oci::cgroup::Cgroup;

use crate::container::host_config::Resources;
use crate::container::limits;
use crate::error::{Error, Result};

fn open(path: &str) -> Result<Cgroup> {
    Cgroup::open(&format!("/{path}")).map_err(Error::room)
}

/// Kills whatever is in it.
pub(crate) fn kill(path: &str) {
    if let Ok(group) = open(path) {
        let _ = group.kill();
    }
}

/// Removes it, if it is there.
pub(crate) fn remove(path: &str) {
    if let Ok(group) = open(path)
        && let Err(error) = group.remove()
        && base::Classified::kind(&error) != base::Kind::NotFound
    {
        tracing::warn!(path, %error, "a cgroup is not removed");
    }
}

/// Stops or continues all its processes.
pub(crate) fn freeze(path: &str, frozen: bool) -> Result<()> {
    let mut group = open(path)?;
    if frozen {
        group.freeze().map_err(Error::room)
    } else {
        group.thaw().map_err(Error::room)
    }
}

/// The pids in it and below it.
pub(crate) fn processes(path: &str) -> Result<Vec<i32>> {
    open(path)?.processes().map_err(Error::room)
}

/// What it uses.
pub(crate) fn stats(path: &str) -> Result<oci::cgroup::Stats> {
    open(path)?.stats().map_err(Error::room)
}

/// Sets new limits.
pub(crate) fn update(path: &str, resources: &Resources) -> Result<()> {
    let value = serde_json::Value::Object(limits::oci(resources)?);
    let limits: oci_spec::runtime::LinuxResources = serde_json::from_value(value)
        .map_err(|error| Error::Invalid(format!("limits: {error}")))?;
    open(path)?.apply(&limits).map_err(Error::room)
}

/// The cgroups of containers below a parent, by the last part of their path.
pub(crate) fn children(parent: &str) -> Vec<String> {
    let mut names = std::collections::BTreeSet::new();
    let mut roots = vec![std::path::PathBuf::from("/sys/fs/cgroup")];
    if let Ok(entries) = std::fs::read_dir("/sys/fs/cgroup") {
        roots.extend(
            entries
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| path.is_dir()),
        );
    }
    for root in roots {
        for entry in std::fs::read_dir(root.join(parent))
            .into_iter()
            .flatten()
            .flatten()
        {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                names.insert(entry.file_name().to_string_lossy().into_owned());
            }
        }
    }
    names.into_iter().collect()
}
