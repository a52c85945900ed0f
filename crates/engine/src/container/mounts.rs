//! Volumes, binds and tmpfs: from what was asked for to what is mounted.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde_json::{Value, json};

use crate::Engine;
use crate::container::config::ContainerConfig;
use crate::container::host_config::{HostConfig, Mount};
use crate::container::inspect::MountPoint;
use crate::container::inventory::Inventory;
use crate::container::probe;
use crate::container::record::{Container, MountRecord};
use crate::error::{Error, Result};
use crate::volume::{ANONYMOUS_LABEL, VolumeCreate, VolumeSource, Volumes};

const PROPAGATIONS: [&str; 6] = [
    "private", "rprivate", "shared", "rshared", "slave", "rslave",
];

fn invalid<T>(text: impl Into<String>) -> Result<T> {
    Err(Error::Invalid(text.into()))
}

/// A path in a container, without `.` and `..`.
///
/// # Errors
/// [`Error::Invalid`] for one that is not absolute, and for the root.
pub(crate) fn target(path: &str) -> Result<String> {
    if !path.starts_with('/') {
        return invalid(format!(
            "invalid mount config: invalid mount path: '{path}' mount path must be absolute"
        ));
    }
    let mut parts: Vec<&str> = Vec::new();
    for component in Path::new(path).components() {
        match component {
            Component::Normal(part) => parts.push(part.to_str().unwrap_or_default()),
            Component::ParentDir => drop(parts.pop()),
            _ => {}
        }
    }
    if parts.is_empty() {
        return invalid("invalid specification: destination can't be '/'");
    }
    Ok(format!("/{}", parts.join("/")))
}

/// Reads `source:target[:options]` or, of a volume, `name:target`.
///
/// # Errors
/// [`Error::Invalid`] in dockerd's words.
pub(crate) fn parse_bind(text: &str) -> Result<MountRecord> {
    let wrong = || Error::Invalid(format!("invalid volume specification: '{text}'"));
    let parts: Vec<&str> = text.split(':').collect();
    let (source, destination, mode) = match parts[..] {
        [destination] => ("", destination, ""),
        [source, destination] => (source, destination, ""),
        [source, destination, mode] => (source, destination, mode),
        _ => return Err(wrong()),
    };
    if destination.is_empty() || (parts.len() > 1 && source.is_empty()) {
        return Err(wrong());
    }
    let bind = source.starts_with('/');
    let mut record = MountRecord {
        point: MountPoint {
            kind: if bind { "bind" } else { "volume" }.into(),
            destination: target(destination)?,
            mode: mode.into(),
            rw: true,
            ..Default::default()
        },
        recursive: true,
        copy: !bind,
        ..Default::default()
    };
    if bind {
        record.point.source = source.into();
        record.point.propagation = "rprivate".into();
    } else {
        record.point.name = source.into();
        record.point.driver = "local".into();
    }
    for option in mode.split(',').filter(|option| !option.is_empty()) {
        match option {
            "rw" => {}
            "ro" => record.point.rw = false,
            // SELinux labels and consistency: nothing to do on hosts without.
            "z" | "Z" | "consistent" | "cached" | "delegated" => {}
            "nocopy" => record.copy = false,
            "volume-nocopy" => record.copy = false,
            other if bind && PROPAGATIONS.contains(&other) => {
                record.point.propagation = other.into()
            }
            _ => return invalid(format!("invalid mode: {mode}")),
        }
    }
    Ok(record)
}

fn of_mount(mount: &Mount) -> Result<MountRecord> {
    let destination = target(&mount.target)?;
    let mut record = MountRecord {
        point: MountPoint {
            kind: mount.kind.clone(),
            destination,
            rw: !mount.read_only,
            ..Default::default()
        },
        recursive: true,
        ..Default::default()
    };
    match mount.kind.as_str() {
        "bind" => {
            if !mount.source.starts_with('/') {
                return invalid(format!(
                    "invalid mount config for type \"bind\": invalid mount path: '{}' mount path must be absolute",
                    mount.source
                ));
            }
            let options = mount.bind_options.clone().unwrap_or_default();
            if !probe::exists(Path::new(&mount.source))? {
                if !options.create_mountpoint {
                    return invalid(format!(
                        "invalid mount config for type \"bind\": bind source path does not exist: {}",
                        mount.source
                    ));
                }
                probe::exists_or_made(Path::new(&mount.source))?;
            }
            record.point.source = mount.source.clone();
            record.recursive = !options.non_recursive;
            record.point.propagation = match options.propagation.as_str() {
                "" => "rprivate".into(),
                known if PROPAGATIONS.contains(&known) => known.into(),
                other => {
                    return invalid(format!(
                        "invalid mount config for type \"bind\": invalid propagation mode: {other}"
                    ));
                }
            };
        }
        "volume" => {
            let options = mount.volume_options.clone().unwrap_or_default();
            record.point.name = mount.source.clone();
            record.point.driver = "local".into();
            record.copy = !options.no_copy;
            record.subpath = subpath(&options.subpath, "volume")?;
        }
        "image" => {
            if mount.source.is_empty() {
                return invalid(
                    "invalid mount config for type \"image\": field Source must not be empty",
                );
            }
            let options = mount.image_options.clone().unwrap_or_default();
            record.point.source = mount.source.clone();
            // An image is never written.
            record.point.rw = false;
            record.subpath = subpath(&options.subpath, "image")?;
        }
        "tmpfs" => {
            if !mount.source.is_empty() {
                return invalid(
                    "invalid mount config for type \"tmpfs\": field Source must not be specified",
                );
            }
            let options = mount.tmpfs_options.clone().unwrap_or_default();
            if options.size_bytes > 0 {
                record.options.push(format!("size={}", options.size_bytes));
            }
            if let Some(mode) = options.mode {
                record.options.push(format!("mode={mode:o}"));
            }
            record
                .options
                .extend(options.options.iter().map(|pair| pair.join("=")));
        }
        other => {
            return invalid(format!(
                "invalid mount config: unknown mount type {other:?}: bind, volume, tmpfs and image are known"
            ));
        }
    }
    Ok(record)
}

/// The options of `--tmpfs`, but for the access, which is kept elsewhere.
///
/// # Errors
/// [`Error::Invalid`] for one that tmpfs(5) and mount(8) do not know.
fn tmpfs_options(text: &str) -> Result<Vec<String>> {
    const FLAGS: [&str; 22] = [
        "async",
        "atime",
        "defaults",
        "dev",
        "diratime",
        "dirsync",
        "exec",
        "inode64",
        "mand",
        "noatime",
        "nodev",
        "nodiratime",
        "noexec",
        "nomand",
        "norelatime",
        "nostrictatime",
        "nosuid",
        "noswap",
        "relatime",
        "strictatime",
        "suid",
        "sync",
    ];
    const VALUES: [&str; 8] = [
        "gid",
        "huge",
        "mode",
        "mpol",
        "nr_blocks",
        "nr_inodes",
        "size",
        "uid",
    ];
    let mut options = Vec::new();
    for option in text
        .split(',')
        .filter(|option| !matches!(*option, "" | "rw" | "ro"))
    {
        let known = match option.split_once('=') {
            Some((name, _)) => VALUES.contains(&name),
            None => FLAGS.contains(&option) || PROPAGATIONS.contains(&option),
        };
        if !known {
            return invalid(format!("invalid tmpfs option [{option:?}]"));
        }
        options.push(option.to_owned());
    }
    Ok(options)
}

fn subpath(path: &str, of: &str) -> Result<String> {
    let inside = Path::new(path)
        .components()
        .all(|component| matches!(component, Component::Normal(_) | Component::CurDir));
    if inside {
        Ok(path.to_owned())
    } else {
        invalid(format!(
            "invalid mount config: the subpath must be a relative path within the {of}"
        ))
    }
}

/// The container whose snapshot this is, by its key.
pub(crate) fn owner(key: &str) -> Option<&str> {
    let id = key.split_once(IMAGE_MOUNT).map_or(key, |(id, _)| id);
    id.parse::<base::Id>().is_ok().then_some(id)
}

/// Between a container's id and the number of the mount.
const IMAGE_MOUNT: &str = "-image-";

/// Makes a snapshot of each image that is mounted: while it stands, the image's files do.
///
/// # Errors
/// [`Error::Invalid`] for an image that is not there.
pub(crate) fn hold_images(
    id: &str,
    mounts: &mut [MountRecord],
    images: &::image::Store,
) -> Result<()> {
    let wanted = mounts
        .iter_mut()
        .filter(|mount| mount.point.kind == "image");
    for (number, mount) in wanted.enumerate() {
        let reference = &mount.point.source;
        let image = images
            .inspect(reference)
            .map_err(|error| match base::Classified::kind(&error) {
                base::Kind::NotFound => Error::Invalid(format!(
                    "invalid mount config for type \"image\": the image {reference} is not on this host: pull or build it first"
                )),
                _ => Error::room(error),
            })?;
        mount.snapshot = format!("{id}{IMAGE_MOUNT}{number}");
        images
            .snapshot(&mount.snapshot, &image.id)
            .map_err(Error::room)?;
    }
    Ok(())
}

/// Removes the snapshots that image mounts of a container have, whether it has a record or was never finished.
pub(crate) fn release_images(id: &str, images: &::image::Store) -> Result<()> {
    let prefix = format!("{id}{IMAGE_MOUNT}");
    for (key, _) in images.snapshots() {
        if key.starts_with(&prefix) {
            images.remove_snapshot(&key).map_err(Error::room)?;
        }
    }
    Ok(())
}

/// All mounts of a new container, with its volumes made and held for it.
///
/// # Errors
/// [`Error::Invalid`] where two share a target or one is malformed.
pub(crate) fn resolve(
    id: &str,
    directory: &Path,
    config: &ContainerConfig,
    host: &HostConfig,
    inventory: &Inventory,
    volumes: &Volumes,
) -> Result<Vec<MountRecord>> {
    let mut found: BTreeMap<String, MountRecord> = BTreeMap::new();
    for reference in host.volumes_from.iter().flatten() {
        let (name, mode) = reference.split_once(':').unwrap_or((reference, "rw"));
        let read_only = mode.split(',').any(|option| option == "ro");
        let other = inventory.find(name)?;
        for mount in &other.record().mounts {
            if mount.point.kind == "tmpfs" {
                continue;
            }
            let mut mount = MountRecord {
                copy: false,
                anonymous: false,
                ..mount.clone()
            };
            mount.point.rw &= !read_only;
            found.insert(mount.point.destination.clone(), mount);
        }
    }
    let mut own: BTreeMap<String, MountRecord> = BTreeMap::new();
    let mut add = |record: MountRecord| match own.insert(record.point.destination.clone(), record) {
        Some(twice) => invalid(format!(
            "Duplicate mount point: {}",
            twice.point.destination
        )),
        None => Ok(()),
    };
    for text in host.binds.iter().flatten() {
        let record = parse_bind(text)?;
        if record.point.kind == "bind" {
            probe::exists_or_made(Path::new(&record.point.source))?;
        }
        add(record)?;
    }
    for mount in &host.mounts {
        add(of_mount(mount)?)?;
    }
    for (path, options) in &host.tmpfs {
        add(MountRecord {
            point: MountPoint {
                kind: "tmpfs".into(),
                destination: target(path)?,
                mode: options.clone(),
                rw: !options.split(',').any(|option| option == "ro"),
                ..Default::default()
            },
            options: tmpfs_options(options)?,
            unlisted: true,
            ..Default::default()
        })?;
    }
    found.extend(own);
    for path in config.volumes.iter().flat_map(|set| set.iter()) {
        let record = MountRecord {
            anonymous: true,
            ..parse_bind(path)?
        };
        found
            .entry(record.point.destination.clone())
            .or_insert(record);
    }
    let mut mounts: Vec<MountRecord> = found.into_values().collect();
    for mount in mounts
        .iter_mut()
        .filter(|mount| mount.point.kind == "volume")
    {
        let asked = host.mounts.iter().find(|m| {
            m.kind == "volume" && target(&m.target).ok().as_ref() == Some(&mount.point.destination)
        });
        let options = asked
            .and_then(|m| m.volume_options.clone())
            .unwrap_or_default();
        let driver = options.driver_config.unwrap_or_default();
        let mut labels = options.labels;
        if mount.point.name.is_empty() {
            mount.anonymous = true;
            mount.point.name = base::Id::random().to_string();
            labels.insert(ANONYMOUS_LABEL.into(), String::new());
            promise(directory, &mount.point.name)?;
        }
        let wanted = VolumeCreate {
            name: mount.point.name.clone(),
            driver: if driver.name.is_empty() {
                host.volume_driver.clone()
            } else {
                driver.name
            },
            driver_opts: Some(driver.options),
            labels: Some(labels),
            cluster_volume_spec: None,
        };
        let (volume, _) = volumes.create_and_hold(wanted, Some(id))?;
        mount.point.name = volume.name;
        mount.point.source = volume.mountpoint;
        mount.point.driver = volume.driver;
        if mount.point.mode.is_empty() {
            mount.point.mode = "z".into();
        }
    }
    Ok(mounts)
}

impl Engine {
    /// Tells that a container's volumes are mounted or no longer are.
    pub(crate) fn tell_mounts(&self, action: &str, container: &Container) {
        let mounts = container.record().mounts.clone();
        for point in mounts.iter().map(|mount| &mount.point) {
            if point.kind != "volume" {
                continue;
            }
            let mut attributes = BTreeMap::from([
                ("container".to_owned(), container.id.clone()),
                ("driver".to_owned(), point.driver.clone()),
            ]);
            if action == "mount" {
                attributes.extend([
                    ("destination".to_owned(), point.destination.clone()),
                    ("propagation".to_owned(), point.propagation.clone()),
                    ("read/write".to_owned(), point.rw.to_string()),
                ]);
            }
            self.events
                .publish("volume", action, &point.name, attributes);
        }
    }
}

/// Where a container that is being made says which volumes go with it if it never is.
const PROMISES: &str = "anonymous-volumes";

/// Notes a volume before it is made.
fn promise(directory: &Path, name: &str) -> Result<()> {
    use std::io::Write;
    let path = directory.join(PROMISES);
    std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(&path)
        .and_then(|mut file| writeln!(file, "{name}"))
        .map_err(Error::io(format!("writing {}", path.display())))
}

/// The volumes of a container that was never finished.
pub(crate) fn promised(directory: &Path) -> Vec<String> {
    std::fs::read_to_string(directory.join(PROMISES))
        .unwrap_or_default()
        .lines()
        .map(str::to_owned)
        .collect()
}

/// The container is made: from here on its record says what is its own.
pub(crate) fn kept(directory: &Path) {
    let _ = std::fs::remove_file(directory.join(PROMISES));
}

/// The mounts as the OCI spec writes them, shallow targets first. May ask a resolver (NFS volumes): call it off the reactor.
///
/// # Errors
/// Where a bind's source or a volume is gone.
pub(crate) fn oci(
    mounts: &[MountRecord],
    volumes: &Volumes,
    images: &::image::Store,
) -> Result<Vec<Value>> {
    let mut sorted: Vec<&MountRecord> = mounts.iter().collect();
    sorted.sort_by_key(|mount| mount.point.destination.matches('/').count());
    let mut list = Vec::new();
    for mount in sorted {
        let point = &mount.point;
        let access = if point.rw { "rw" } else { "ro" };
        list.push(match point.kind.as_str() {
            "tmpfs" => {
                let mut options = vec!["noexec".to_owned(), "nosuid".into(), "nodev".into(), access.into()];
                for option in &mount.options {
                    // What is asked for wins over the default it contradicts.
                    options.retain(|default| format!("no{option}") != *default);
                    options.push(option.clone());
                }
                json!({ "destination": point.destination, "type": "tmpfs", "source": "tmpfs", "options": options })
            }
            "image" => {
                let layers = images.snapshot_layers(&mount.snapshot).map_err(Error::room)?;
                json!({ "destination": point.destination, "type": "overlay", "source": "overlay",
                    "options": overlay(&layers, &mount.subpath) })
            }
            "volume" => match volumes.source(&point.name)? {
                VolumeSource::Directory(directory) => {
                    let source = if mount.subpath.is_empty() { directory } else { below(&directory, &mount.subpath)? };
                    json!({ "destination": point.destination, "type": "bind", "source": source,
                        "options": ["rbind", "rprivate", access] })
                }
                VolumeSource::Mount { kind, device, mut options } => {
                    let bind = options.iter().any(|option| matches!(option.as_str(), "bind" | "rbind"));
                    options.push(access.into());
                    if bind && !probe::exists(Path::new(&device))? {
                        return invalid(format!(
                            "error while mounting volume '{}': failed to mount local volume: mount {device}: no such file or directory",
                            point.name
                        ));
                    }
                    let kind = if bind { "bind".to_owned() } else { kind };
                    json!({ "destination": point.destination, "type": kind, "source": device, "options": options })
                }
            },
            _ => {
                if !probe::exists(Path::new(&point.source))? {
                    return invalid(format!(
                        "invalid mount config for type \"bind\": bind source path does not exist: {}",
                        point.source
                    ));
                }
                let bind = if mount.recursive { "rbind" } else { "bind" };
                json!({ "destination": point.destination, "type": "bind", "source": point.source,
                    "options": [bind, point.propagation, access] })
            }
        });
    }
    Ok(list)
}

/// The options of a read-only overlay of a snapshot.
fn overlay(layers: &::image::Layers, subpath: &str) -> Vec<String> {
    let text = |path: &Path| path.display().to_string();
    let escaped = |path: &std::path::PathBuf| text(path).replace('\\', "\\\\").replace(':', "\\:");
    let mut options = vec![
        "ro".to_owned(),
        "nosuid".into(),
        "nodev".into(),
        format!(
            "lowerdir={}",
            layers
                .lower
                .iter()
                .map(escaped)
                .collect::<Vec<_>>()
                .join(":")
        ),
        format!("upperdir={}", text(&layers.upper)),
        format!("workdir={}", text(&layers.work)),
    ];
    if layers.userxattr {
        options.push("userxattr".into());
    }
    if !subpath.is_empty() {
        options.push(format!("berth.subpath={subpath}"));
    }
    options
}

/// A folder below another, with no link on the way that leaves it.
fn below(directory: &Path, subpath: &str) -> Result<std::path::PathBuf> {
    let real = directory
        .join(subpath)
        .canonicalize()
        .map_err(Error::io(format!("volume subpath {subpath}")))?;
    let root = directory.canonicalize().map_err(Error::io("volume"))?;
    if real.starts_with(&root) {
        Ok(real)
    } else {
        invalid(format!("volume subpath {subpath} leaves the volume"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn binds_are_read_as_dockerd_reads_them() {
        let bind = parse_bind("/src:/dst/../dst/x:ro,rshared").unwrap();
        assert_eq!(
            (bind.point.kind.as_str(), bind.point.destination.as_str()),
            ("bind", "/dst/x")
        );
        assert!(!bind.point.rw);
        assert_eq!(bind.point.propagation, "rshared");
        let volume = parse_bind("data:/data").unwrap();
        assert_eq!(
            (volume.point.kind.as_str(), volume.point.name.as_str()),
            ("volume", "data")
        );
        for wrong in ["/a:", ":/b", "/a:/", "/a:b", "a:/b:c:d", "/a:/b:fast"] {
            assert!(parse_bind(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn targets_never_keep_parent_folders(path in "/[a-z./]{0,20}") {
            if let Ok(clean) = target(&path) {
                prop_assert!(!clean.split('/').any(|part| part == ".." || part == "."));
                prop_assert!(clean.len() > 1);
            }
        }
    }
}
