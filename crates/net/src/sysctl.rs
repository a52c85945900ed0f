//! Settings of the host that a bridge network needs, remembered so that they can be put back.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use base::file::{Durability, read_json, write_json};

use crate::error::{Context, Result};

/// What the settings were before us, by path below `/proc/sys/net`; on disk before the first is changed.
pub(crate) struct Settings {
    record: PathBuf,
    before: BTreeMap<String, String>,
}

impl Settings {
    pub(crate) fn open(directory: &Path) -> Result<Settings> {
        let record = directory.join("sysctl.json");
        let before = match read_json(&record) {
            Ok(before) => before.unwrap_or_default(),
            // Cut off with the host's power: what was is not known any more, and nothing to refuse all networks for.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                tracing::warn!(%error, "the host's settings from before cannot be read");
                BTreeMap::new()
            }
            Err(error) => return Err(error).context(|| "reading the saved settings".into()),
        };
        Ok(Settings { record, before })
    }

    /// Sets `key` and remembers what it was.
    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let now = match read(key) {
            Ok(now) => now,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).context(|| format!("reading net/{key}")),
        };
        if now == value {
            return Ok(());
        }
        if !self.before.contains_key(key) {
            self.before.insert(key.to_owned(), now);
            write_json(&self.record, &self.before, Durability::Host)
                .context(|| "saving the settings".into())?;
        }
        write(key, value).context(|| format!("setting net/{key} to {value}"))
    }

    /// Lets the host forward packets of one family.
    pub(crate) fn forward(&mut self, v4: bool) -> Result<()> {
        if v4 {
            return self.set("ipv4/ip_forward", "1");
        }
        if read("ipv6/conf/all/forwarding").is_ok_and(|now| now == "1") {
            return Ok(());
        }
        // A forwarding host stops listening to router advertisements unless told 2, and would lose its own IPv6.
        for entry in fs::read_dir("/proc/sys/net/ipv6/conf")
            .into_iter()
            .flatten()
            .flatten()
        {
            let key = format!(
                "ipv6/conf/{}/accept_ra",
                entry.file_name().to_string_lossy()
            );
            if read(&key).is_ok_and(|now| now == "1") {
                self.set(&key, "2")?;
            }
        }
        self.set("ipv6/conf/all/forwarding", "1")
    }

    /// Puts everything back that still is as we set it.
    pub(crate) fn restore(&mut self) {
        // Forwarding last set, first undone: the reverse order of the names does.
        for (key, value) in self.before.iter().rev() {
            let ours = if key.ends_with("accept_ra") { "2" } else { "1" };
            if read(key).is_ok_and(|now| now == ours)
                && let Err(error) = write(key, value)
            {
                tracing::warn!(key, %error, "a host setting could not be put back");
            }
        }
        self.before.clear();
        let _ = fs::remove_file(&self.record);
    }
}

/// Reads `/proc/sys/net/KEY` of the calling thread's namespace.
pub(crate) fn read(key: &str) -> io::Result<String> {
    fs::read_to_string(format!("/proc/sys/net/{key}")).map(|text| text.trim().to_owned())
}

/// Writes `/proc/sys/net/KEY` of the calling thread's namespace.
pub(crate) fn write(key: &str, value: &str) -> io::Result<()> {
    fs::write(format!("/proc/sys/net/{key}"), value)
}
