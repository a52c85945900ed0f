//! The checks themselves. Each looks at the host and changes nothing.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use base::host::{kernel_release, kernel_version, program};
use base::units::format_size;

use super::Check;

/// All checks, in the order in which people stumble.
pub fn all(state: &Path) -> Vec<Check> {
    vec![
        virtualization(),
        privileges(),
        cgroups(),
        overlay(),
        user_namespaces(),
        subordinate_ids(),
        nftables(),
        firewall(),
        forwarding(),
        tunnel(),
        space(state),
        promised(state),
        reflinks(state),
        ports(),
        resolver(),
        clock(),
        certificates(),
        bootstrap(),
        kernel(),
    ]
}

fn cpu_flags() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    info.lines()
        .find(|line| line.starts_with("flags") || line.starts_with("Features"))
        .unwrap_or_default()
        .to_owned()
}

fn virtualization() -> Check {
    const NAME: &str = "virtualization";
    let flags = cpu_flags();
    let hardware = flags
        .split_whitespace()
        .any(|flag| flag == "vmx" || flag == "svm");
    match fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        Ok(_) if hardware => Check::pass(
            NAME,
            "/dev/kvm, backed by the processor: machines run at full speed",
        ),
        Ok(_) => Check::warn(
            NAME,
            "/dev/kvm opens, but the processor shows no vmx or svm: the kernel only emulates behind it. Machines run on the software CPU",
            "on a virtual host, switch on nested virtualization; nothing else is needed",
        ),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Check::warn(
            NAME,
            "/dev/kvm is there, but not for this user. Machines run on the software CPU",
            "sudo usermod -aG kvm $USER, then log in again",
        ),
        Err(_) if hardware => Check::warn(
            NAME,
            "the processor has it, but there is no /dev/kvm. Machines run on the software CPU",
            "modprobe kvm_intel || modprobe kvm_amd",
        ),
        Err(_) => Check::warn(
            NAME,
            "none. Machines run on the software CPU",
            "switch on VT-x or AMD-V in the firmware, or nested virtualization on a virtual host",
        ),
    }
}

fn privileges() -> Check {
    const NAME: &str = "privileges";
    if !rustix::process::geteuid().is_root() {
        let user = rustix::process::geteuid().as_raw();
        let (limits, fix) = match crate::rootless::delegated_cgroup(user) {
            Some(_) => ("limits by the cgroup of the user's own systemd", ""),
            None => (
                "no limits",
                "for limits, with cgroup v2 alone: systemd-run --user --unit berth -p Delegate=yes berth serve; elsewhere: sudo berth serve",
            ),
        };
        let found = format!(
            "not root: the daemon is root of a user namespace of its own; its containers have {limits}"
        );
        return match fix {
            "" => Check::pass(NAME, found),
            fix => Check::warn(NAME, found, fix),
        };
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let capabilities = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    const SYS_ADMIN: u64 = 1 << 21;
    const SYS_RESOURCE: u64 = 1 << 24;
    const NET_ADMIN: u64 = 1 << 12;
    if capabilities & SYS_ADMIN == 0 || capabilities & NET_ADMIN == 0 {
        return Check::fail(
            NAME,
            "root without CAP_SYS_ADMIN or CAP_NET_ADMIN, as inside another container",
            "run on the host, or give the outer container --privileged",
        );
    }
    if capabilities & SYS_RESOURCE == 0 {
        return Check::warn(
            NAME,
            "root without CAP_SYS_RESOURCE: --ulimit cannot go above this process's own limits",
            "give the outer service that capability if containers need higher limits",
        );
    }
    Check::pass(NAME, "root, with all that containers need")
}

fn cgroups() -> Check {
    const NAME: &str = "control groups";
    let unified = Path::new("/sys/fs/cgroup/cgroup.controllers");
    let wanted = ["cpu", "memory", "pids"];
    if let Ok(text) = fs::read_to_string(unified) {
        let missing: Vec<&str> = wanted
            .into_iter()
            .filter(|c| !text.split_whitespace().any(|have| have == *c))
            .collect();
        return if missing.is_empty() {
            Check::pass(NAME, format!("v2: {}", text.trim()))
        } else {
            Check::warn(
                NAME,
                format!(
                    "v2 without {}: those limits have no effect",
                    missing.join(", ")
                ),
                "boot with the controllers enabled (cgroup_enable=memory on some boards)",
            )
        };
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let has = |controller: &str| {
        mounts.lines().any(|line| {
            line.split_once(" - cgroup ").is_some_and(|(_, tail)| {
                tail.rsplit(' ')
                    .next()
                    .unwrap_or_default()
                    .split(',')
                    .any(|c| c == controller)
            })
        })
    };
    let missing: Vec<&str> = wanted.into_iter().filter(|c| !has(c)).collect();
    let hybrid = mounts.contains(" - cgroup2 ");
    let kind = if hybrid {
        "hybrid (v1 controllers, v2 beside them)"
    } else {
        "v1"
    };
    if missing.len() == wanted.len() {
        return Check::fail(
            NAME,
            "no controllers are mounted",
            "mount -t cgroup2 none /sys/fs/cgroup",
        );
    }
    if missing.is_empty() {
        Check::pass(NAME, kind)
    } else {
        Check::warn(
            NAME,
            format!("{kind}, without {}", missing.join(", ")),
            "mount the missing controllers",
        )
    }
}

fn filesystem_known(name: &str) -> bool {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    known
        .lines()
        .any(|line| line.split_whitespace().next_back() == Some(name))
}

/// Whether this kernel can load a module when it is needed.
fn has_module(name: &str) -> bool {
    let release = kernel_release();
    let list = fs::read_to_string(format!("/lib/modules/{release}/modules.dep"));
    let needle = format!("/{name}.ko");
    list.is_ok_and(|text| {
        text.lines()
            .filter_map(|line| line.split(':').next())
            .any(|path| path.contains(&needle))
    })
}

fn overlay() -> Check {
    const NAME: &str = "overlayfs";
    if filesystem_known("overlay") {
        Check::pass(NAME, "in the kernel")
    } else if has_module("overlay") {
        Check::pass(NAME, "a module, which the first container loads")
    } else {
        Check::fail(
            NAME,
            "the kernel has none: containers cannot share their image",
            "modprobe overlay",
        )
        .mended_by(&["modprobe", "overlay"])
    }
}

fn user_namespaces() -> Check {
    const NAME: &str = "user namespaces";
    if !Path::new("/proc/self/ns/user").exists() {
        return Check::warn(
            NAME,
            "the kernel has none: no containers for ordinary users",
            "use a kernel with CONFIG_USER_NS",
        );
    }
    let number = |path: &str| {
        fs::read_to_string(path)
            .ok()
            .and_then(|t| t.trim().parse::<u64>().ok())
    };
    if number("/proc/sys/kernel/unprivileged_userns_clone") == Some(0) {
        return Check::warn(
            NAME,
            "ordinary users may not make them",
            "sysctl -w kernel.unprivileged_userns_clone=1",
        );
    }
    if number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1) {
        return Check::warn(
            NAME,
            "AppArmor keeps ordinary users from them",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        );
    }
    match number("/proc/sys/user/max_user_namespaces") {
        Some(0) => Check::warn(
            NAME,
            "none may be made",
            "sysctl -w user.max_user_namespaces=15000",
        ),
        Some(most) => Check::pass(NAME, format!("up to {most}")),
        None => Check::pass(NAME, "there"),
    }
}

fn subordinate_ids() -> Check {
    const NAME: &str = "subordinate ids";
    let helper = program("newuidmap").is_some();
    let lines = fs::read_to_string("/etc/subuid").unwrap_or_default();
    if rustix::process::geteuid().is_root() {
        return Check::pass(NAME, "not needed by root");
    }
    let user = std::env::var("USER").unwrap_or_default();
    if !helper {
        return Check::warn(
            NAME,
            "newuidmap is missing: containers see one user only",
            "sudo apt-get install uidmap",
        );
    }
    if lines
        .lines()
        .any(|line| line.split(':').next() == Some(&user))
    {
        Check::pass(NAME, "newuidmap, with a range for this user")
    } else {
        Check::warn(
            NAME,
            format!("no range for {user} in /etc/subuid"),
            format!("sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"),
        )
    }
}

fn nftables() -> Check {
    const NAME: &str = "nftables";
    match program("nft") {
        None => Check::fail(
            NAME,
            "the program nft is missing: no networks for containers",
            "apt-get install nftables",
        )
        .mended_by(&["apt-get", "install", "-y", "nftables"]),
        Some(_) if !rustix::process::geteuid().is_root() => users_networks(),
        Some(nft) => {
            let listed = std::process::Command::new(nft)
                .args(["list", "tables"])
                .output();
            match listed {
                Ok(output) if output.status.success() => Check::pass(NAME, "nft works"),
                Ok(output) => {
                    let why = String::from_utf8_lossy(&output.stderr);
                    let why = why.lines().next().unwrap_or("no reason given").to_owned();
                    Check::fail(
                        NAME,
                        format!("nft fails: {why}"),
                        "run as root, on a kernel with CONFIG_NF_TABLES",
                    )
                }
                Err(error) => Check::fail(
                    NAME,
                    format!("nft cannot be run: {error}"),
                    "apt-get install --reinstall nftables",
                ),
            }
        }
    }
}

/// Whether an ordinary user's daemon can have networks: a process tries.
fn users_networks() -> Check {
    const NAME: &str = "networks without root";
    let tried = std::process::Command::new("/proc/self/exe")
        .args(["gateway", "--probe"])
        .output();
    match tried {
        Ok(output) if output.status.success() => Check::pass(
            NAME,
            "bridges, names and published ports, in a namespace of the daemon's",
        ),
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr);
            let why = why.lines().next().unwrap_or("no reason given");
            Check::warn(
                NAME,
                format!(
                    "only host and none: {}",
                    why.trim_start_matches("berth gateway: ")
                ),
                "sudo sysctl -w user.max_user_namespaces=15000 user.max_net_namespaces=15000, on a kernel with CONFIG_NF_TABLES, CONFIG_VETH and CONFIG_PACKET; or sudo berth serve",
            )
        }
        Err(error) => Check::warn(
            NAME,
            format!("cannot be tried: {error}"),
            "mount -t proc proc /proc",
        ),
    }
}

fn firewall() -> Check {
    const NAME: &str = "other firewalls";
    if !rustix::process::geteuid().is_root() {
        return Check::pass(
            NAME,
            "what containers send is this user's own, and treated as such",
        );
    }
    let run = |name: &str, args: &[&str]| -> Option<String> {
        let output = std::process::Command::new(program(name)?)
            .args(args)
            .output()
            .ok()?;
        output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let rules = run("nft", &["list", "ruleset"]).unwrap_or_default();
    let drops_forward = rules
        .lines()
        .any(|l| l.contains("hook forward") && l.contains("policy drop"))
        || run("iptables", &["-S", "FORWARD"]).is_some_and(|t| t.contains("-P FORWARD DROP"));
    if rules.contains("table inet firewalld") {
        return Check::warn(
            NAME,
            "firewalld is active: its zones decide about Berth's bridges too",
            "firewall-cmd --permanent --zone=trusted --add-interface=br-berth0 && firewall-cmd --reload",
        );
    }
    if drops_forward {
        return Check::warn(
            NAME,
            "another table drops what is forwarded (Docker sets this): containers may not get out",
            "iptables -I DOCKER-USER -i 'br-+' -j ACCEPT, or set that chain's policy to accept",
        );
    }
    Check::pass(NAME, "none in the way")
}

fn forwarding() -> Check {
    const NAME: &str = "IP forwarding";
    if !rustix::process::geteuid().is_root() {
        return Check::pass(
            NAME,
            "not needed: an ordinary user's networks lead out by sockets",
        );
    }
    let on = |path: &str| fs::read_to_string(path).is_ok_and(|t| t.trim() == "1");
    if on("/proc/sys/net/ipv4/ip_forward") {
        Check::pass(NAME, "on")
    } else {
        Check::pass(
            NAME,
            "off; the daemon switches it on with its first network and off after its last",
        )
    }
}

fn tunnel() -> Check {
    const NAME: &str = "tun, vxlan";
    let tun = Path::new("/dev/net/tun").exists();
    let opened = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    if matches!(&opened, Err(error) if error.kind() == io::ErrorKind::PermissionDenied) {
        return Check::warn(
            NAME,
            "this user may not open /dev/net/tun: machines have the network user alone",
            "sudo chmod 666 /dev/net/tun, and for good: echo 'KERNEL==\"tun\", MODE=\"0666\"' | sudo tee /etc/udev/rules.d/60-tun.rules",
        );
    }
    if tun {
        Check::pass(NAME, "/dev/net/tun is there: machines can join networks")
    } else {
        Check::warn(
            NAME,
            "/dev/net/tun is missing: machines cannot join networks",
            "modprobe tun",
        )
        .mended_by(&["modprobe", "tun"])
    }
}

/// The nearest existing folder at or above `path`.
fn existing(path: &Path) -> PathBuf {
    path.ancestors()
        .find(|p| p.is_dir())
        .unwrap_or(Path::new("/"))
        .to_owned()
}

/// Whether the disks that machines were promised fit.
fn promised(state: &Path) -> Check {
    const NAME: &str = "machines' disks";
    let storage = engine::machine::Storage::of_state(state);
    match storage.warning {
        Some(warning) => Check::warn(
            NAME,
            warning,
            "berth system df; berth machine rm, berth system prune, or another --state-dir",
        ),
        None if storage.machines == 0 => Check::pass(NAME, "no machine has one"),
        None => Check::pass(
            NAME,
            format!(
                "{} promised to {} machines, {} used, {} free",
                format_size(storage.promised),
                storage.machines,
                format_size(storage.used),
                format_size(storage.free)
            ),
        ),
    }
}

fn space(state: &Path) -> Check {
    const NAME: &str = "disk space";
    let folder = existing(state);
    match rustix::fs::statvfs(&folder) {
        Ok(stat) => {
            let free = stat.f_bavail * stat.f_frsize;
            let inodes = stat.f_favail;
            let found = format!("{} free for {}", format_size(free), state.display());
            if free < 2 << 30 {
                Check::fail(NAME, found, "berth system prune, or another --state-dir")
            } else if free < 10 << 30 {
                Check::warn(NAME, found, "berth system prune, or another --state-dir")
            } else if stat.f_files > 0 && inodes < 100_000 {
                Check::warn(
                    NAME,
                    format!("{found}, but only {inodes} files more"),
                    "berth system prune, or another --state-dir",
                )
            } else {
                Check::pass(NAME, found)
            }
        }
        Err(error) => Check::warn(
            NAME,
            format!("cannot look at {}: {error}", folder.display()),
            "check the folder's file system",
        ),
    }
}

fn reflinks(state: &Path) -> Check {
    const NAME: &str = "cheap copies";
    let folder = existing(state);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let kind = mounts
        .lines()
        .filter_map(|line| {
            let (head, tail) = line.split_once(" - ")?;
            let point = head.split(' ').nth(4)?;
            folder.starts_with(point).then(|| {
                (
                    point.len(),
                    tail.split(' ').next().unwrap_or_default().to_owned(),
                )
            })
        })
        .max_by_key(|(length, _)| *length)
        .map(|(_, kind)| kind)
        .unwrap_or_default();
    if ["btrfs", "xfs", "bcachefs"].contains(&kind.as_str()) {
        Check::pass(NAME, format!("{kind}: clones of disks share blocks"))
    } else if kind == "overlay" {
        Check::fail(
            NAME,
            "the state folder lies on overlayfs, which cannot carry further overlays",
            "choose a folder on a real disk with --state-dir",
        )
    } else {
        Check::warn(
            NAME,
            format!("{kind}: clones of disks are copied or use qcow2 backing files"),
            "a btrfs or xfs file system for the state folder makes them instant",
        )
    }
}

fn ports() -> Check {
    const NAME: &str = "ports";
    let low = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        .ok()
        .and_then(|t| t.trim().parse::<u32>().ok())
        .unwrap_or(1024);
    if rustix::process::geteuid().is_root() || low <= 80 {
        Check::pass(NAME, "all may be published")
    } else {
        Check::warn(
            NAME,
            format!("ports below {low} are root's"),
            "sysctl -w net.ipv4.ip_unprivileged_port_start=80, or publish higher ones",
        )
    }
}

fn resolver() -> Check {
    const NAME: &str = "name resolution";
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers: Vec<&str> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .map(str::trim)
        .collect();
    if servers.is_empty() {
        return Check::warn(
            NAME,
            "/etc/resolv.conf names no server: containers find each other, but nothing outside",
            "set network.dns in berth.toml",
        );
    }
    let loopback = servers.iter().all(|s| s.starts_with("127.") || *s == "::1");
    if loopback && !Path::new("/run/systemd/resolve/resolv.conf").exists() {
        return Check::pass(
            NAME,
            format!(
                "{} on loopback; the daemon asks it for the containers",
                servers.join(", ")
            ),
        );
    }
    Check::pass(NAME, servers.join(", "))
}

fn clock() -> Check {
    const NAME: &str = "clock";
    let now = jiff::Timestamp::now().as_second();
    // Certificates and signatures of archives are judged by it.
    const BUILT_AFTER: i64 = 1_750_000_000;
    if now < BUILT_AFTER {
        Check::fail(
            NAME,
            "it is set to the past: signatures and certificates will be refused",
            "timedatectl set-ntp true",
        )
    } else {
        Check::pass(
            NAME,
            jiff::Timestamp::now()
                .strftime("%Y-%m-%d %H:%M UTC")
                .to_string(),
        )
    }
}

fn certificates() -> Check {
    const NAME: &str = "certificates";
    let places = [
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/tls/certs/ca-bundle.crt",
        "/etc/ssl/cert.pem",
    ];
    if places.iter().any(|p| Path::new(p).exists()) || std::env::var_os("SSL_CERT_FILE").is_some() {
        Check::pass(NAME, "there")
    } else {
        Check::warn(
            NAME,
            "none: registries over HTTPS cannot be trusted",
            "apt-get install ca-certificates",
        )
        .mended_by(&["apt-get", "install", "-y", "ca-certificates"])
    }
}

fn bootstrap() -> Check {
    const NAME: &str = "images from Debian's archive";
    if program("mmdebstrap").is_some() {
        Check::pass(NAME, "mmdebstrap is there")
    } else {
        Check::warn(
            NAME,
            "mmdebstrap is missing: `berth image bootstrap` cannot work",
            "apt-get install mmdebstrap",
        )
        .mended_by(&["apt-get", "install", "-y", "mmdebstrap"])
    }
}

fn kernel() -> Check {
    const NAME: &str = "kernel";
    let (release, version) = (kernel_release(), kernel_version());
    if version < (5, 12) {
        Check::fail(
            NAME,
            format!("{release}: older than 5.12, without the mount interface Berth uses"),
            "use a newer kernel",
        )
    } else if version < (5, 14) {
        Check::warn(
            NAME,
            format!("{release}: without cgroup.kill"),
            "use a newer kernel",
        )
    } else {
        Check::pass(NAME, release)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    #[test]
    fn whatever_is_not_well_has_a_fix() {
        for check in all(Path::new("/var/lib/berth")) {
            assert_eq!(
                check.verdict != Verdict::Pass,
                check.fix.is_some(),
                "{}",
                check.name
            );
            assert!(!check.found.is_empty(), "{}", check.name);
        }
    }
}
