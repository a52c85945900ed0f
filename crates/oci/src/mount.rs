//! The mounts of a container (runtime-spec, config "Mounts"), made with the new mount API: each is built
//! detached, with all its attributes, and only then attached at a target held by descriptor.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

use crate::error::{Context, Error, Result};
use crate::namespace::{self, Range};
use crate::syscall::{self, MountAttr, attr, resolve};

pub(crate) const PROC_SUPER_MAGIC: i64 = 0x9fa0;

/// How the ids of a bind mount are shifted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IdMap {
    One,
    Recursive,
}

/// A mount's options, sorted by what the kernel does with them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    pub set: u64,
    pub clear: u64,
    pub recursive_set: u64,
    pub recursive_clear: u64,
    /// `MS_PRIVATE` and its kin, and whether for the whole tree.
    pub propagation: Vec<(u64, bool)>,
    pub bind: bool,
    pub recursive: bool,
    pub idmap: Option<IdMap>,
    pub copy_up: bool,
    /// Flags of the super block rather than of the mount.
    pub super_flags: Vec<&'static str>,
    /// For the file system: `key=value` or `key`.
    pub data: Vec<String>,
}

impl Options {
    /// What a new file system takes of them: attributes, flags of the super block, data.
    pub fn of_filesystem(&self) -> Options {
        Options {
            set: self.set,
            clear: self.clear,
            super_flags: self.super_flags.clone(),
            data: self.data.clone(),
            ..Options::default()
        }
    }
}

/// Sorts the options as mount(8) and the runtime specification name them; unknown ones are the file system's.
pub(crate) fn parse_options(mount: &Mount) -> Result<Options> {
    let mut options = Options {
        bind: mount.typ().as_deref() == Some("bind"),
        ..Options::default()
    };
    for option in mount.options().iter().flatten() {
        apply_option(&mut options, option);
    }
    if options.idmap.is_none()
        && mount
            .uid_mappings()
            .as_ref()
            .is_some_and(|map| !map.is_empty())
    {
        options.idmap = Some(if options.recursive {
            IdMap::Recursive
        } else {
            IdMap::One
        });
    }
    if options.idmap.is_some() && !options.bind {
        return Err(Error::invalid(format!(
            "config.json: mount {}: id mappings are for bind mounts only",
            mount.destination().display()
        )));
    }
    Ok(options)
}

fn apply_option(options: &mut Options, option: &str) {
    // name, attribute, whether it is set, whether a recursive form (`r` before it) exists
    const ATTRIBUTES: [(&str, u64, bool); 15] = [
        ("ro", attr::RDONLY, true),
        ("rw", attr::RDONLY, false),
        ("nosuid", attr::NOSUID, true),
        ("suid", attr::NOSUID, false),
        ("nodev", attr::NODEV, true),
        ("dev", attr::NODEV, false),
        ("noexec", attr::NOEXEC, true),
        ("exec", attr::NOEXEC, false),
        ("nodiratime", attr::NODIRATIME, true),
        ("diratime", attr::NODIRATIME, false),
        ("nosymfollow", attr::NOSYMFOLLOW, true),
        ("symfollow", attr::NOSYMFOLLOW, false),
        ("noatime", attr::NOATIME, true),
        ("strictatime", attr::STRICTATIME, true),
        // The access time mode without bits.
        ("relatime", 0, true),
    ];
    const PROPAGATION: [(&str, u64); 4] = [
        ("private", libc::MS_PRIVATE),
        ("shared", libc::MS_SHARED),
        ("slave", libc::MS_SLAVE),
        ("unbindable", libc::MS_UNBINDABLE),
    ];
    let atime = |name: &str| {
        matches!(
            name,
            "noatime" | "strictatime" | "relatime" | "atime" | "norelatime" | "nostrictatime"
        )
    };
    let (recursive, name) = match option.strip_prefix('r') {
        Some(rest)
            if ATTRIBUTES.iter().any(|a| a.0 == rest)
                || PROPAGATION.iter().any(|p| p.0 == rest)
                || rest == "atime" =>
        {
            (true, rest)
        }
        _ => (false, option),
    };
    if let Some((_, flag)) = PROPAGATION.iter().find(|p| p.0 == name) {
        options.propagation.push((*flag, recursive));
        return;
    }
    let known = ATTRIBUTES
        .iter()
        .find(|a| a.0 == name)
        .map(|a| (a.1, a.2))
        .or(match name {
            "atime" | "norelatime" | "nostrictatime" => Some((0, true)),
            _ => None,
        });
    if let Some((bits, set)) = known {
        let (sets, clears) = if recursive {
            (&mut options.recursive_set, &mut options.recursive_clear)
        } else {
            (&mut options.set, &mut options.clear)
        };
        if atime(name) {
            *sets = *sets & !attr::ATIME | bits;
            *clears |= attr::ATIME;
        } else if set {
            *sets |= bits;
            *clears &= !bits;
        } else {
            *clears |= bits;
            *sets &= !bits;
        }
        return;
    }
    match name {
        "defaults" | "remount" | "async" | "nomand" | "nolazytime" | "loud" | "noiversion" => {}
        "bind" => options.bind = true,
        "rbind" => {
            options.bind = true;
            options.recursive = true;
        }
        "idmap" => options.idmap = Some(IdMap::One),
        "ridmap" => options.idmap = Some(IdMap::Recursive),
        "tmpcopyup" => options.copy_up = true,
        "notmpcopyup" => options.copy_up = false,
        "sync" => options.super_flags.push("sync"),
        "dirsync" => options.super_flags.push("dirsync"),
        "mand" => options.super_flags.push("mand"),
        "lazytime" => options.super_flags.push("lazytime"),
        "silent" => options.super_flags.push("silent"),
        "iversion" => options.super_flags.push("iversion"),
        // Engines' notes to themselves.
        "copy" | "nocopy" | "z" | "Z" | "U" | "O" => {}
        "" => {}
        other => options.data.push(other.to_owned()),
    }
}

/// The mappings an id-mapped mount uses: its own, or else the container's.
pub(crate) fn idmap_ranges(
    mount: &Mount,
    container: (&[Range], &[Range]),
) -> Result<(Vec<Range>, Vec<Range>)> {
    let own = (
        namespace::ranges(mount.uid_mappings().as_deref()),
        namespace::ranges(mount.gid_mappings().as_deref()),
    );
    match (own.0.is_empty(), own.1.is_empty()) {
        (false, false) => Ok(own),
        (true, true) if !container.0.is_empty() => Ok((container.0.to_vec(), container.1.to_vec())),
        _ => Err(Error::invalid(format!(
            "config.json: mount {} is id-mapped, but has not both uidMappings and gidMappings, and neither has the container",
            mount.destination().display()
        ))),
    }
}

/// The source of a bind, made absolute by the bundle.
pub(crate) fn bind_source(mount: &Mount, bundle: &Path) -> Result<PathBuf> {
    let source = mount
        .source()
        .as_deref()
        .filter(|source| !source.as_os_str().is_empty())
        .ok_or_else(|| {
            Error::invalid(format!(
                "config.json: bind mount {} has no source",
                mount.destination().display()
            ))
        })?;
    Ok(bundle.join(source))
}

/// A detached copy of a bind's source with its attributes; id-mapped where `user_namespace` is given.
pub(crate) fn detached_bind(
    source: &Path,
    options: &Options,
    user_namespace: Option<BorrowedFd<'_>>,
) -> Result<OwnedFd> {
    let tree = syscall::clone_tree(CWD, source, options.recursive)
        .during(|| format!("bind mount {}", source.display()))?;
    set_attributes(tree.as_fd(), options)
        .during(|| format!("set the options of the bind mount {}", source.display()))?;
    if let Some(namespace) = user_namespace {
        use std::os::fd::AsRawFd;
        let recursive = options.idmap == Some(IdMap::Recursive);
        let attributes = MountAttr {
            attr_set: attr::IDMAP,
            userns_fd: namespace.as_raw_fd() as u64,
            ..MountAttr::default()
        };
        syscall::mount_setattr(tree.as_fd(), recursive, &attributes).during(|| {
            format!(
                "map the ids of the mount {} (does its file system support id-mapped mounts?)",
                source.display()
            )
        })?;
    }
    Ok(tree)
}

fn set_attributes(tree: BorrowedFd<'_>, options: &Options) -> std::io::Result<()> {
    if options.recursive_set != 0 || options.recursive_clear != 0 {
        let attributes = MountAttr {
            attr_set: options.recursive_set,
            attr_clr: options.recursive_clear,
            ..MountAttr::default()
        };
        syscall::mount_setattr(tree, true, &attributes)?;
    }
    if options.set != 0 || options.clear != 0 {
        let attributes = MountAttr {
            attr_set: options.set,
            attr_clr: options.clear,
            ..MountAttr::default()
        };
        syscall::mount_setattr(tree, false, &attributes)?;
    }
    Ok(())
}

/// Sets the propagation of an attached mount.
pub(crate) fn set_propagation(tree: BorrowedFd<'_>, options: &Options) -> std::io::Result<()> {
    for (propagation, recursive) in &options.propagation {
        syscall::mount_setattr(
            tree,
            *recursive,
            &MountAttr {
                propagation: *propagation,
                ..MountAttr::default()
            },
        )?;
    }
    Ok(())
}

/// A detached mount of a file system by type.
pub(crate) fn detached_filesystem(
    kind: &str,
    source: Option<&Path>,
    options: &Options,
    extra: &[(&str, String)],
) -> std::io::Result<OwnedFd> {
    if kind == "overlay" {
        return detached_overlay(source, options);
    }
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    if let Some(source) = source {
        fsconfig_set_string(&context, "source", source)?;
    }
    for flag in &options.super_flags {
        fsconfig_set_flag(&context, *flag)?;
    }
    // Pseudo file systems are shared by all their mounts: read-only is the mount's own.
    let shared = matches!(
        kind,
        "tmpfs" | "proc" | "sysfs" | "cgroup" | "cgroup2" | "mqueue" | "devpts"
    );
    if options.set & attr::RDONLY != 0 && !shared {
        fsconfig_set_flag(&context, "ro")?;
    }
    for option in &options.data {
        match option.split_once('=') {
            Some((key, value)) => fsconfig_set_string(&context, key, value)?,
            None => fsconfig_set_flag(&context, option.as_str())?,
        }
    }
    for (key, value) in extra {
        fsconfig_set_string(&context, *key, value.as_str())?;
    }
    fsconfig_create(&context).map_err(|errno| base::overlay::explain(&context, errno))?;
    let set = (options.set & !attr::RDONLY) | options.recursive_set;
    let mount = fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::from_bits_retain(set as u32),
    )?;
    // Read-only only now, so that a tmpfs can be filled first by the caller if it must.
    if options.set & attr::RDONLY != 0 && !options.copy_up {
        let attributes = MountAttr {
            attr_set: attr::RDONLY,
            ..MountAttr::default()
        };
        syscall::mount_setattr(mount.as_fd(), false, &attributes)?;
    }
    Ok(mount)
}

/// An overlay, whose options may be longer than those of other file systems.
fn detached_overlay(source: Option<&Path>, options: &Options) -> std::io::Result<OwnedFd> {
    let folders = Overlay::of(&options.data);
    let source = source.map(Path::to_string_lossy).unwrap_or_default();
    let mut overlay = base::overlay::Overlay {
        lower: folders.lower.iter().map(PathBuf::as_path).collect(),
        writable: folders.upper.as_deref().zip(folders.work.as_deref()),
        options: options.super_flags.clone(),
        tried: Vec::new(),
        source: &source,
    };
    if options.set & attr::RDONLY != 0 {
        overlay.options.push("ro");
    }
    let rest = options.data.iter().map(String::as_str).filter(|option| {
        let key = option.split_once('=').map_or("", |(key, _)| key);
        !Overlay::KEYS.contains(&key)
    });
    overlay.options.extend(rest);
    let set = options.set | options.recursive_set;
    let mount = overlay.mount(MountAttrFlags::from_bits_retain(set as u32))?;
    let Some(below) = folders.subpath else {
        return Ok(mount);
    };
    let how = resolve::IN_ROOT | resolve::NO_MAGICLINKS;
    let below = syscall::openat2(mount.as_fd(), &below, libc::O_PATH, 0, how)?;
    syscall::clone_tree(below.as_fd(), Path::new(""), false)
}

/// The options of an overlay that name directories: they may be longer than a file system's options otherwise are.
#[derive(Debug, Default, PartialEq, Eq)]
struct Overlay {
    lower: Vec<PathBuf>,
    upper: Option<PathBuf>,
    work: Option<PathBuf>,
    /// Ours: only what is below this path of the overlay is mounted.
    subpath: Option<PathBuf>,
}

impl Overlay {
    const KEYS: [&str; 4] = ["lowerdir", "upperdir", "workdir", "berth.subpath"];

    fn of(data: &[String]) -> Overlay {
        let mut overlay = Overlay::default();
        for (key, value) in data.iter().filter_map(|option| option.split_once('=')) {
            match key {
                "lowerdir" => overlay.lower = split_paths(value),
                "upperdir" => overlay.upper = Some(value.into()),
                "workdir" => overlay.work = Some(value.into()),
                "berth.subpath" => overlay.subpath = Some(value.into()),
                _ => {}
            }
        }
        overlay
    }
}

/// Paths between colons; a backslash takes its meaning from a colon or another backslash.
fn split_paths(text: &str) -> Vec<PathBuf> {
    let mut paths = vec![String::new()];
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match letter {
            ':' => paths.push(String::new()),
            '\\' => paths
                .last_mut()
                .expect("never empty")
                .extend(letters.next()),
            _ => paths.last_mut().expect("never empty").push(letter),
        }
    }
    paths
        .into_iter()
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
        .collect()
}

/// The only entries of /proc that may be mounted over: what lxcfs and engines replace.
const PROC_REPLACEABLE: [&str; 11] = [
    "cpuinfo",
    "diskstats",
    "meminfo",
    "stat",
    "swaps",
    "uptime",
    "loadavg",
    "slabinfo",
    "net/dev",
    "sys/kernel/ns_last_pid",
    "sys/crypto/fips_enabled",
];

/// Refuses a mount inside the container's /proc, which would let it feign /proc/self/attr and its like
/// (CVE-2019-16884).
pub(crate) fn check_proc_target(
    target: &Path,
    root: &Path,
    is_proc: bool,
    destination: &Path,
) -> Result<()> {
    let inside = if root == Path::new("/") {
        target
    } else {
        target.strip_prefix(root).unwrap_or(target)
    };
    let inside = inside.strip_prefix("/").unwrap_or(inside);
    let Ok(rest) = inside.strip_prefix("proc") else {
        return Ok(());
    };
    let allowed = if rest.as_os_str().is_empty() {
        is_proc
    } else {
        PROC_REPLACEABLE.iter().any(|name| rest == Path::new(name))
    };
    if allowed {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "config.json: mount {} cannot be made: it is inside /proc",
        destination.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::MountBuilder;
    use proptest::prelude::*;

    #[test]
    fn the_directories_of_an_overlay_are_split_at_colons() {
        let data = ["lowerdir=/a\\:b:/c\\\\d", "upperdir=/u", "index=off"].map(str::to_owned);
        let overlay = Overlay::of(&data);
        assert_eq!(overlay.lower, [Path::new("/a:b"), Path::new("/c\\d")]);
        assert_eq!(overlay.upper.as_deref(), Some(Path::new("/u")));
        assert_eq!(overlay.work, None);
    }

    fn options(list: &[&str]) -> Options {
        let mount = MountBuilder::default()
            .destination("/x")
            .typ("bind")
            .options(list.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>())
            .build()
            .unwrap();
        parse_options(&mount).unwrap()
    }

    #[test]
    fn later_options_win_over_earlier_ones() {
        assert_eq!(options(&["ro", "rw"]).set, 0);
        assert_eq!(options(&["rw", "ro"]).set, attr::RDONLY);
        let atime = options(&["noatime", "strictatime"]);
        assert_eq!((atime.set, atime.clear), (attr::STRICTATIME, attr::ATIME));
    }

    #[test]
    fn recursive_forms_are_told_from_plain_names_that_begin_with_r() {
        let o = options(&["rbind", "rro", "rprivate", "relatime", "rw"]);
        assert!(o.recursive && o.bind);
        assert_eq!(o.recursive_set, attr::RDONLY);
        assert_eq!(o.propagation, [(libc::MS_PRIVATE, true)]);
        assert_eq!(o.clear, attr::ATIME | attr::RDONLY);
    }

    #[test]
    fn what_no_table_knows_goes_to_the_file_system() {
        assert_eq!(
            options(&["size=64k", "mode=755"]).data,
            ["size=64k", "mode=755"]
        );
    }

    #[test]
    fn only_known_entries_of_proc_can_be_replaced() {
        let check = |target: &str, is_proc| {
            check_proc_target(Path::new(target), Path::new("/r"), is_proc, Path::new("/d"))
        };
        assert!(check("/r/proc", true).is_ok());
        assert!(check("/r/proc", false).is_err());
        assert!(check("/r/proc/cpuinfo", false).is_ok());
        assert!(check("/r/proc/self/attr", false).is_err());
        assert!(check("/r/procfs", false).is_ok());
    }

    proptest! {
        #[test]
        fn no_option_panics(option in ".{0,30}") {
            let _ = options(&[&option]);
        }
    }
}
