//! Volumes: folders (or mounts) that outlive containers. The `local` driver of Docker.
//!
//! ```text
//! STATE/volumes/NAME/volume.json   the record; a volume exists as soon as this does
//!                   /_data         its content
//! STATE/volumes/.gone-NAME-N       a volume whose removal has begun; swept at the next start
//! ```
//!
//! A volume with options (`type=nfs`, `type=tmpfs`, `type=none,o=bind`) is mounted only inside the containers
//! that use it, never on the host; so a crash leaves no mount.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::ToSocketAddrs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use base::file::{self, Durability};
use serde::{Deserialize, Serialize};

use crate::Engine;
use crate::error::{Error, Result};
use crate::filters::Filters;
use crate::wire::wire;

/// The label that marks a volume nobody named.
pub const ANONYMOUS_LABEL: &str = "com.docker.volume.anonymous";

wire! {
    /// A volume as `GET /volumes/NAME` shows it.
    pub struct Volume {
        pub created_at: String,
        pub driver: String,
        pub labels: Option<BTreeMap<String, String>>,
        pub mountpoint: String,
        pub name: String,
        pub options: Option<BTreeMap<String, String>>,
        pub scope: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub usage_data: Option<VolumeUsage>,
    }

    /// What a volume takes, as `system df` shows it.
    pub struct VolumeUsage {
        /// Containers that use it.
        pub ref_count: i64,
        /// Bytes; -1 where it is not stored on this host.
        pub size: i64,
    }

    /// The body of `POST /volumes/create`.
    pub struct VolumeCreate {
        /// Empty for an anonymous one.
        pub name: String,
        /// `local` or empty.
        pub driver: String,
        pub driver_opts: Option<BTreeMap<String, String>>,
        pub labels: Option<BTreeMap<String, String>>,
        pub cluster_volume_spec: Option<serde_json::Value>,
    }

    /// The answer of `POST /volumes/prune`.
    pub struct VolumesPruned {
        pub volumes_deleted: Vec<String>,
        /// Bytes.
        pub space_reclaimed: u64,
    }
}

/// What a container mounts to use a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeSource {
    /// A folder of this host, to be bound.
    Directory(PathBuf),
    /// A file system to be mounted in the container's namespace, as mount(8) is told.
    Mount {
        kind: String,
        device: String,
        options: Vec<String>,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    name: String,
    created: String,
    labels: Option<BTreeMap<String, String>>,
    options: BTreeMap<String, String>,
}

/// The volumes of one daemon.
///
/// One lock guards the table; the file system is changed under it (creation and the rename that begins a
/// removal, each a few system calls), the deletion of contents after it.
#[derive(Debug)]
pub struct Volumes {
    directory: PathBuf,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    volumes: BTreeMap<String, Record>,
    /// Volume name to the ids of the containers that use it.
    holders: BTreeMap<String, BTreeSet<String>>,
    removals: u64,
}

impl Volumes {
    /// Opens the volumes in `directory`, and finishes creations and removals that a crash cut short.
    ///
    /// # Errors
    /// The folder cannot be read or made. A damaged record hides its volume (and is logged), no other.
    pub fn open(directory: &Path) -> Result<Volumes> {
        make_directory(directory).map_err(Error::io(format!("making {}", directory.display())))?;
        let reading = || format!("reading {}", directory.display());
        let mut table = Table::default();
        for entry in fs::read_dir(directory).map_err(Error::io(reading()))? {
            let entry = entry.map_err(Error::io(reading()))?;
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(".gone-") {
                std::thread::spawn(move || delete(&path));
                continue;
            }
            if check_name(&name).is_err() {
                continue;
            }
            match file::read_json::<Record>(&path.join("volume.json")) {
                Ok(Some(record)) if record.name == name => {
                    let _ = file::sweep_temporaries(&path);
                    table.volumes.insert(name, record);
                }
                Ok(Some(record)) => {
                    tracing::error!(path = %path.display(), name = record.name, "a volume's record names another volume; it is left alone");
                }
                // A creation that was cut short: nothing was in it yet, and rmdir removes nothing else.
                Ok(None) => {
                    let _ = file::sweep_temporaries(&path);
                    let _ = fs::remove_dir(path.join("_data"));
                    let _ = fs::remove_dir(&path);
                }
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "a volume's record is damaged; it is left alone");
                }
            }
        }
        Ok(Volumes {
            directory: directory.to_owned(),
            table: Mutex::new(table),
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Creates a volume, or finds the one of this name. True where it is new.
    ///
    /// # Errors
    /// [`Error::Invalid`] for the name or the options, [`Error::NotFound`] for another driver.
    pub fn create(&self, wanted: VolumeCreate) -> Result<(Volume, bool)> {
        self.create_and_hold(wanted, None)
    }

    /// [`Volumes::create`], and holds it for `holder` before anyone can remove it.
    ///
    /// # Errors
    /// As [`Volumes::create`].
    pub fn create_and_hold(
        &self,
        wanted: VolumeCreate,
        holder: Option<&str>,
    ) -> Result<(Volume, bool)> {
        if wanted.cluster_volume_spec.is_some() {
            return Err(Error::Unsupported(
                "cluster volumes need a swarm, and this node is not in one".into(),
            ));
        }
        if !matches!(wanted.driver.as_str(), "" | "local") {
            return Err(Error::NotFound(format!(
                "create {}: error looking up volume plugin {}: plugin {:?} not found",
                wanted.name, wanted.driver, wanted.driver
            )));
        }
        let mut labels = wanted.labels;
        let name = if wanted.name.is_empty() {
            labels
                .get_or_insert_default()
                .insert(ANONYMOUS_LABEL.into(), String::new());
            base::Id::random().to_string()
        } else {
            check_name(&wanted.name)?;
            wanted.name
        };
        let options = wanted.driver_opts.unwrap_or_default();
        check_options(&name, &options)?;
        let mut table = self.table();
        let existing = table.volumes.get(&name).cloned();
        let (record, new) = match existing {
            Some(record) => (record, false),
            None => {
                let record = Record {
                    name: name.clone(),
                    created: now_to_the_second(),
                    labels,
                    options,
                };
                self.write(&record)?;
                table.volumes.insert(name.clone(), record.clone());
                (record, true)
            }
        };
        if let Some(holder) = holder {
            table
                .holders
                .entry(name)
                .or_default()
                .insert(holder.to_owned());
        }
        Ok((self.show(&record), new))
    }

    fn write(&self, record: &Record) -> Result<()> {
        let home = self.directory.join(&record.name);
        let made = (|| {
            match make_directory(&home) {
                // What an earlier, failed creation left; `_data` of a volume whose record is damaged stays.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other?,
            }
            let data = home.join("_data");
            match fs::DirBuilder::new().mode(0o755).create(&data) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other?,
            }
            file::write_json(&home.join("volume.json"), record, Durability::Host)?;
            fs::File::open(&self.directory)?.sync_all()
        })();
        made.map_err(|error| {
            let _ = fs::remove_dir(home.join("_data"));
            let _ = fs::remove_dir(&home);
            Error::io(format!(
                "create {}: writing {}",
                record.name,
                home.display()
            ))(error)
        })
    }

    /// The volume of this name.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn get(&self, name: &str) -> Result<Volume> {
        self.table()
            .volumes
            .get(name)
            .map(|record| self.show(record))
            .ok_or_else(|| Error::NotFound(format!("get {name}: no such volume")))
    }

    /// All volumes that pass `name`, `driver`, `label`, `label!` and `dangling`, by name.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another filter.
    pub fn list(&self, filters: &Filters) -> Result<Vec<Volume>> {
        filters.only(&["name", "driver", "label", "label!", "dangling"])?;
        let dangling = filters.boolean("dangling")?;
        let table = self.table();
        let none = BTreeMap::new();
        Ok(table
            .volumes
            .values()
            .filter(|record| {
                let labels = record.labels.as_ref().unwrap_or(&none);
                let held = table.is_held(&record.name);
                filters.any("name", |part| record.name.contains(part))
                    && filters.exact("driver", "local")
                    && filters.labels("label", labels)
                    && filters.not_labels("label!", labels)
                    && dangling.is_none_or(|dangling| dangling != held)
            })
            .map(|record| self.show(record))
            .collect())
    }

    /// [`Volumes::list`] with what each takes on disk. Walks them all: call it off the reactor.
    ///
    /// # Errors
    /// As [`Volumes::list`].
    pub fn list_with_usage(&self, filters: &Filters) -> Result<Vec<Volume>> {
        let mut volumes = self.list(filters)?;
        for volume in &mut volumes {
            volume.usage_data = Some(VolumeUsage {
                ref_count: self.holders(&volume.name).len() as i64,
                size: self.size(volume),
            });
        }
        Ok(volumes)
    }

    fn size(&self, volume: &Volume) -> i64 {
        if volume
            .options
            .as_ref()
            .is_some_and(|options| options.contains_key("type"))
        {
            return -1;
        }
        i64::try_from(tree_size(Path::new(&volume.mountpoint))).unwrap_or(i64::MAX)
    }

    /// What a container mounts for this volume. May ask the resolver for an NFS server: call it off the reactor.
    ///
    /// # Errors
    /// [`Error::NotFound`] for the volume, [`Error::Invalid`] where its server's name has no address.
    pub fn source(&self, name: &str) -> Result<VolumeSource> {
        let record = self.table().volumes.get(name).cloned();
        let record =
            record.ok_or_else(|| Error::NotFound(format!("get {name}: no such volume")))?;
        let Some(kind) = record.options.get("type").filter(|kind| !kind.is_empty()) else {
            return Ok(VolumeSource::Directory(
                self.directory.join(name).join("_data"),
            ));
        };
        let mut options: Vec<String> = record.options.get("o").map_or_else(Vec::new, |text| {
            text.split(',')
                .filter(|option| !option.is_empty())
                .map(str::to_owned)
                .collect()
        });
        // The kernel's NFS and CIFS clients take addresses, not names.
        if matches!(kind.as_str(), "nfs" | "nfs4" | "cifs") {
            for option in &mut options {
                let Some(host) = option.strip_prefix("addr=") else {
                    continue;
                };
                let mut found = (host, 0u16).to_socket_addrs().map_err(|error| {
                    Error::Invalid(format!("volume {name}: resolving {host}: {error}"))
                })?;
                let address = found.next().ok_or_else(|| {
                    Error::Invalid(format!("volume {name}: {host} has no address"))
                })?;
                *option = format!("addr={}", address.ip());
            }
        }
        let device = record.options.get("device").cloned().unwrap_or_default();
        Ok(VolumeSource::Mount {
            kind: kind.clone(),
            device,
            options,
        })
    }

    /// Notes that container `holder` uses the volume.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn hold(&self, name: &str, holder: &str) -> Result<()> {
        let mut table = self.table();
        if !table.volumes.contains_key(name) {
            return Err(Error::NotFound(format!("get {name}: no such volume")));
        }
        table
            .holders
            .entry(name.to_owned())
            .or_default()
            .insert(holder.to_owned());
        Ok(())
    }

    /// Forgets all that `holder` held.
    pub fn release(&self, holder: &str) {
        self.table().holders.retain(|_, holders| {
            holders.remove(holder);
            !holders.is_empty()
        });
    }

    /// The containers that use the volume.
    pub fn holders(&self, name: &str) -> Vec<String> {
        self.table()
            .holders
            .get(name)
            .map_or_else(Vec::new, |ids| ids.iter().cloned().collect())
    }

    /// Removes a volume and its content. Deletes files: call it off the reactor.
    ///
    /// # Errors
    /// [`Error::Conflict`] where a container uses it, [`Error::NotFound`] unless `force`.
    pub fn remove(&self, name: &str, force: bool) -> Result<bool> {
        let gone = {
            let mut table = self.table();
            if !table.volumes.contains_key(name) {
                return match force {
                    true => Ok(false),
                    false => Err(Error::NotFound(format!("get {name}: no such volume"))),
                };
            }
            if let Some(holders) = table
                .holders
                .get(name)
                .filter(|holders| !holders.is_empty())
            {
                let holders: Vec<&str> = holders.iter().map(String::as_str).collect();
                return Err(Error::Conflict(format!(
                    "remove {name}: volume is in use - [{}]",
                    holders.join(", ")
                )));
            }
            self.begin_removal(&mut table, name)?
        };
        delete(&gone);
        Ok(true)
    }

    /// After this the volume is gone, whatever happens to its content.
    fn begin_removal(&self, table: &mut Table, name: &str) -> Result<PathBuf> {
        let home = self.directory.join(name);
        let gone = loop {
            table.removals += 1;
            let gone = self
                .directory
                .join(format!(".gone-{name}-{}", table.removals));
            if !gone.exists() {
                break gone;
            }
        };
        match fs::rename(&home, &gone) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io(format!("remove {name}"))(error));
            }
            _ => {}
        }
        table.volumes.remove(name);
        Ok(gone)
    }

    /// Removes what no container uses: anonymous volumes, and with `all=true` named ones too.
    /// Deletes files: call it off the reactor.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a filter other than `all`, `label`, `label!`.
    pub fn prune(&self, filters: &Filters) -> Result<VolumesPruned> {
        filters.only(&["all", "label", "label!"])?;
        let all = filters.boolean("all")?.unwrap_or(false);
        let none = BTreeMap::new();
        let mut gone = Vec::new();
        let mut report = VolumesPruned::default();
        {
            let mut table = self.table();
            let names: Vec<String> = table
                .volumes
                .values()
                .filter(|record| {
                    let labels = record.labels.as_ref().unwrap_or(&none);
                    !table.is_held(&record.name)
                        && (all || labels.contains_key(ANONYMOUS_LABEL))
                        && filters.labels("label", labels)
                        && filters.not_labels("label!", labels)
                })
                .map(|record| record.name.clone())
                .collect();
            for name in names {
                match self.begin_removal(&mut table, &name) {
                    Ok(path) => {
                        gone.push(path);
                        report.volumes_deleted.push(name);
                    }
                    Err(error) => tracing::warn!(%error, "a volume could not be pruned"),
                }
            }
        }
        for path in gone {
            report.space_reclaimed += tree_size(&path.join("_data"));
            delete(&path);
        }
        Ok(report)
    }

    fn show(&self, record: &Record) -> Volume {
        Volume {
            created_at: record.created.clone(),
            driver: "local".into(),
            labels: record.labels.clone(),
            mountpoint: self
                .directory
                .join(&record.name)
                .join("_data")
                .display()
                .to_string(),
            name: record.name.clone(),
            options: (!record.options.is_empty()).then(|| record.options.clone()),
            scope: "local".into(),
            usage_data: None,
        }
    }
}

impl Table {
    fn is_held(&self, name: &str) -> bool {
        self.holders
            .get(name)
            .is_some_and(|holders| !holders.is_empty())
    }
}

impl Engine {
    /// Creates a volume (or finds it), and tells the listeners.
    ///
    /// # Errors
    /// As [`Volumes::create`].
    pub async fn create_volume(&self, wanted: VolumeCreate) -> Result<Volume> {
        let volumes = self.volumes().clone();
        let (volume, new) = blocking(move || volumes.create(wanted)).await?;
        if new {
            self.volume_event("create", &volume.name);
        }
        Ok(volume)
    }

    /// Removes a volume that no container uses.
    ///
    /// # Errors
    /// As [`Volumes::remove`].
    pub async fn remove_volume(&self, name: &str, force: bool) -> Result<()> {
        let volumes = self.volumes().clone();
        let owned = name.to_owned();
        if blocking(move || volumes.remove(&owned, force)).await? {
            self.volume_event("destroy", name);
        }
        Ok(())
    }

    /// Removes unused volumes.
    ///
    /// # Errors
    /// As [`Volumes::prune`].
    pub async fn prune_volumes(&self, filters: Filters) -> Result<VolumesPruned> {
        let volumes = self.volumes().clone();
        let report = blocking(move || volumes.prune(&filters)).await?;
        for name in &report.volumes_deleted {
            self.volume_event("destroy", name);
        }
        let reclaimed = BTreeMap::from([("reclaimed".into(), report.space_reclaimed.to_string())]);
        self.events().publish("volume", "prune", "", reclaimed);
        Ok(report)
    }

    fn volume_event(&self, action: &str, name: &str) {
        let attributes = BTreeMap::from([("driver".into(), "local".into())]);
        self.events().publish("volume", action, name, attributes);
    }
}

/// Runs what waits for the disk off the reactor.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| {
            Err(Error::Io {
                what: "a worker".into(),
                source: io::Error::other(error),
            })
        })
}

/// dockerd stamps volumes to the second.
fn now_to_the_second() -> String {
    format!("{:.0}", jiff::Timestamp::now())
}

fn make_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(!path.exists())
        .mode(0o711)
        .create(path)
        .or_else(|error| {
            if path.is_dir() && error.kind() == io::ErrorKind::AlreadyExists {
                Ok(())
            } else {
                Err(error)
            }
        })
}

fn delete(path: &Path) {
    if let Err(error) = fs::remove_dir_all(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "a removed volume's files could not all be deleted; the next start tries again");
    }
}

/// `[a-zA-Z0-9][a-zA-Z0-9_.-]+`, at most 255 bytes.
fn check_name(name: &str) -> Result<()> {
    if name.len() == 1 {
        return Err(Error::Invalid(
            "volume name is too short, names should be at least two alphanumeric characters".into(),
        ));
    }
    let fits = name.len() <= 240
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    if fits {
        return Ok(());
    }
    let shown: String = name.chars().take(100).collect();
    Err(Error::Invalid(format!(
        "create {shown}: {shown:?} includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path"
    )))
}

fn check_options(name: &str, options: &BTreeMap<String, String>) -> Result<()> {
    let invalid = |why: String| Err(Error::Invalid(format!("create {name}: {why}")));
    if let Some(option) = options
        .keys()
        .find(|o| !matches!(o.as_str(), "type" | "o" | "device" | "size"))
    {
        return invalid(format!("invalid option: {option:?}"));
    }
    if options.contains_key("size") {
        return invalid("quota size requested but no quota support".into());
    }
    for (option, needs) in [
        ("device", &["type"][..]),
        ("type", &["device"]),
        ("o", &["device", "type"]),
    ] {
        if let Some(missing) = needs
            .iter()
            .find(|n| options.contains_key(option) && !options.contains_key(**n))
        {
            return invalid(format!("missing required option: {missing:?}"));
        }
    }
    if options.values().any(|value| value.contains('\0')) {
        return invalid("an option holds a NUL byte".into());
    }
    Ok(())
}

/// Bytes of all files below `path`, each inode once, no symbolic link followed, one file system.
pub(crate) fn tree_size(path: &Path) -> u64 {
    let Ok(top) = fs::symlink_metadata(path) else {
        return 0;
    };
    let mut seen = BTreeSet::new();
    let mut total = 0u64;
    let mut open = vec![path.to_owned()];
    while let Some(directory) = open.pop() {
        let Ok(entries) = fs::read_dir(&directory) else {
            continue;
        };
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if metadata.dev() != top.dev() {
                continue;
            }
            if metadata.is_dir() {
                open.push(entry.path());
            } else if metadata.nlink() == 1 || seen.insert(metadata.ino()) {
                total += metadata.len();
            }
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> VolumeCreate {
        VolumeCreate {
            name: name.into(),
            ..VolumeCreate::default()
        }
    }

    #[test]
    fn a_volume_is_there_after_a_restart_and_gone_after_its_removal() {
        let home = tempfile::tempdir().unwrap();
        let volumes = Volumes::open(home.path()).unwrap();
        let (volume, new) = volumes.create(named("data")).unwrap();
        assert!(new && Path::new(&volume.mountpoint).is_dir());
        fs::write(Path::new(&volume.mountpoint).join("file"), b"12345").unwrap();
        assert!(!volumes.create(named("data")).unwrap().1);
        let volumes = Volumes::open(home.path()).unwrap();
        assert_eq!(volumes.get("data").unwrap(), volume);
        assert_eq!(
            volumes.list_with_usage(&Filters::default()).unwrap()[0]
                .usage_data
                .as_ref()
                .unwrap()
                .size,
            5
        );
        assert!(volumes.remove("data", false).unwrap());
        assert!(volumes.get("data").is_err());
        assert!(volumes.remove("data", false).is_err());
        assert!(!volumes.remove("data", true).unwrap());
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_creation_cut_short_leaves_nothing_and_a_removal_cut_short_is_finished() {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir_all(home.path().join("half/_data")).unwrap();
        fs::create_dir_all(home.path().join(".gone-x-1/_data/deep")).unwrap();
        let volumes = Volumes::open(home.path()).unwrap();
        assert!(volumes.get("half").is_err());
        for _ in 0..500 {
            if fs::read_dir(home.path()).unwrap().count() == 0 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("litter was left");
    }

    #[test]
    fn data_without_a_record_is_never_deleted() {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir_all(home.path().join("precious/_data")).unwrap();
        fs::write(home.path().join("precious/_data/file"), b"x").unwrap();
        Volumes::open(home.path()).unwrap();
        assert!(home.path().join("precious/_data/file").exists());
    }

    #[test]
    fn a_volume_in_use_is_not_removed() {
        let home = tempfile::tempdir().unwrap();
        let volumes = Volumes::open(home.path()).unwrap();
        volumes.create_and_hold(named("used"), Some("c1")).unwrap();
        let (anonymous, _) = volumes.create(VolumeCreate::default()).unwrap();
        volumes.create(named("named")).unwrap();
        assert!(matches!(
            volumes.remove("used", true),
            Err(Error::Conflict(_))
        ));
        assert_eq!(
            volumes.prune(&Filters::default()).unwrap().volumes_deleted,
            [anonymous.name]
        );
        let mut all = Filters::default();
        all.add("all", "true");
        assert_eq!(volumes.prune(&all).unwrap().volumes_deleted, ["named"]);
        volumes.release("c1");
        assert_eq!(volumes.prune(&all).unwrap().volumes_deleted, ["used"]);
    }

    #[test]
    fn names_and_options_that_are_no_good_are_refused() {
        let home = tempfile::tempdir().unwrap();
        let volumes = Volumes::open(home.path()).unwrap();
        for name in ["a", "../x", ".hidden", "a/b", "a b", "-x", "a\0b"] {
            assert!(
                matches!(volumes.create(named(name)), Err(Error::Invalid(_))),
                "{name:?}"
            );
        }
        let with = |pairs: &[(&str, &str)]| VolumeCreate {
            driver_opts: Some(
                pairs
                    .iter()
                    .map(|(k, v)| (k.to_string(), v.to_string()))
                    .collect(),
            ),
            ..named("opts")
        };
        assert!(volumes.create(with(&[("type", "tmpfs")])).is_err());
        assert!(volumes.create(with(&[("color", "red")])).is_err());
        assert!(
            volumes
                .create(VolumeCreate {
                    driver: "rexray".into(),
                    ..named("xx")
                })
                .is_err()
        );
        volumes
            .create(with(&[
                ("type", "tmpfs"),
                ("device", "tmpfs"),
                ("o", "size=1m,uid=7"),
            ]))
            .unwrap();
        assert_eq!(
            volumes.source("opts").unwrap(),
            VolumeSource::Mount {
                kind: "tmpfs".into(),
                device: "tmpfs".into(),
                options: vec!["size=1m".into(), "uid=7".into()]
            }
        );
    }
}
