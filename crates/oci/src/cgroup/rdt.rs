//! Intel RDT (runtime-spec 1.3, config-linux "IntelRdt"): a class of service and a monitoring group of resctrl, which
//! the container's processes join (Documentation/filesystems/resctrl.rst).

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxIntelRdt;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};

/// Where resctrl is mounted.
const ROOT: &str = "/sys/fs/resctrl";

/// What a container has of resctrl.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResctrlGroup {
    class: PathBuf,
    /// The class was made for this container and goes with it.
    made: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    monitor: Option<PathBuf>,
}

/// What can be told wrong before anything is made.
///
/// # Errors
/// [`Error::Unsupported`] where resctrl is not mounted, [`Error::Invalid`] for a `closID` that is no name.
pub(crate) fn validate(config: &LinuxIntelRdt) -> Result<()> {
    if let Some(name) = config.clos_id().as_deref().filter(|name| *name != "/")
        && (name.is_empty()
            || name.contains(['/', '\n', '\0'])
            || matches!(name, "." | ".." | "info" | "mon_groups" | "mon_data"))
    {
        return Err(Error::invalid(format!(
            "config.json: linux.intelRdt.closID {name:?} is no name of a class of service"
        )));
    }
    if !Path::new(ROOT).join("schemata").exists() {
        return Err(Error::unsupported(
            "config.json: linux.intelRdt is asked for, but resctrl is not mounted on this host: mount -t resctrl resctrl /sys/fs/resctrl (needs a CPU with Intel RDT or AMD QoS)",
        ));
    }
    Ok(())
}

impl ResctrlGroup {
    /// Makes or finds the class `config` names (or else one named by the container's id), sets its schemata, makes the
    /// monitoring group asked for, and puts `pid` into both.
    pub(super) fn begin(config: &LinuxIntelRdt, id: &str, pid: i32) -> Result<ResctrlGroup> {
        Self::begin_in(Path::new(ROOT), config, id, pid)
    }

    fn begin_in(root: &Path, config: &LinuxIntelRdt, id: &str, pid: i32) -> Result<ResctrlGroup> {
        let schemata: Vec<&str> = [config.l3_cache_schema(), config.mem_bw_schema()]
            .into_iter()
            .flatten()
            .chain(config.schemata().iter().flatten())
            .map(String::as_str)
            .flat_map(str::lines)
            .filter(|line| !line.trim().is_empty())
            .collect();
        let class = match config.clos_id().as_deref() {
            Some("/") => root.to_owned(),
            Some(name) => root.join(name),
            None => root.join(id),
        };
        let mut group = ResctrlGroup {
            class,
            made: false,
            monitor: None,
        };
        let begun = group.fill(config, &schemata, id, pid);
        if begun.is_err() {
            group.remove();
        }
        begun.map(|()| group)
    }

    fn fill(
        &mut self,
        config: &LinuxIntelRdt,
        schemata: &[&str],
        id: &str,
        pid: i32,
    ) -> Result<()> {
        let class = self.class.clone();
        if !class.is_dir() {
            if config.clos_id().is_some() && schemata.is_empty() {
                return Err(Error::invalid(format!(
                    "config.json: linux.intelRdt names the class {} without a schema for it, and it does not exist",
                    class.display()
                )));
            }
            fs::create_dir(&class).during(|| {
                format!(
                    "make the class of service {} (how many the CPU has says {ROOT}/info/*/num_closids)",
                    class.display()
                )
            })?;
            self.made = true;
        }
        for line in schemata {
            write(&class.join("schemata"), line)
                .during(|| format!("write {line:?} to {}/schemata", class.display()))?;
        }
        if config.enable_monitoring() == &Some(true) {
            let monitor = class.join("mon_groups").join(id);
            fs::create_dir(&monitor)
                .during(|| format!("make the monitoring group {}", monitor.display()))?;
            self.monitor = Some(monitor);
        }
        for directory in [Some(&class), self.monitor.as_ref()].into_iter().flatten() {
            write(&directory.join("tasks"), &pid.to_string())
                .during(|| format!("put process {pid} into {}", directory.display()))?;
        }
        Ok(())
    }

    /// Removes what was made for this container alone; its processes have ended.
    pub(super) fn remove(&self) {
        if let Some(monitor) = &self.monitor {
            let _ = fs::remove_dir(monitor);
        }
        if self.made {
            let _ = fs::remove_dir(&self.class);
        }
    }
}

fn write(path: &Path, line: &str) -> io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(format!("{line}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with the files of resctrl's root, and of a class `gold` made before.
    fn fake() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for class in ["", "gold"] {
            let class = root.path().join(class);
            fs::create_dir_all(class.join("mon_groups")).unwrap();
            fs::write(class.join("schemata"), "").unwrap();
            fs::write(class.join("tasks"), "").unwrap();
        }
        root
    }

    fn config(json: &str) -> LinuxIntelRdt {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_class_made_before_is_joined_and_stays() {
        let root = fake();
        let config = config(r#"{"closID": "gold", "schemata": ["L3:0=f"]}"#);
        let group = ResctrlGroup::begin_in(root.path(), &config, "c1", 42).unwrap();
        let read = |name: &str| fs::read_to_string(root.path().join("gold").join(name)).unwrap();
        assert_eq!(
            (read("tasks").as_str(), read("schemata").as_str()),
            ("42\n", "L3:0=f\n")
        );
        group.remove();
        assert!(root.path().join("gold").is_dir());
    }

    #[test]
    fn a_class_that_is_missing_needs_a_schema() {
        let root = fake();
        let missing = config(r#"{"closID": "silver"}"#);
        let error = ResctrlGroup::begin_in(root.path(), &missing, "c1", 42).unwrap_err();
        assert!(error.to_string().contains("silver"), "{error}");
        // The kernel puts the files into a new class; here nobody does, so it fails after the class was made.
        let new = config(r#"{"closID": "silver", "memBwSchema": "MB:0=50"}"#);
        assert!(ResctrlGroup::begin_in(root.path(), &new, "c1", 42).is_err());
        assert!(
            !root.path().join("silver").exists(),
            "a failure leaves a class behind"
        );
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["..", "a/b", "", "info"] {
            let config = config(&format!(r#"{{"closID": "{name}"}}"#));
            assert!(
                validate(&config)
                    .unwrap_err()
                    .to_string()
                    .contains("closID"),
                "{name}"
            );
        }
    }
}
