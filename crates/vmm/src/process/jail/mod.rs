//! What a machine process takes from itself before a guest runs: the host's networks, names and mounts, its root
//! file system, its capabilities, every file but its own, and the system calls it has no use for. The daemon started
//! it as the first process of a process namespace, so it sees no other.
//!
//! The order matters: namespaces and the root need capabilities; landlock and seccomp need `no_new_privs`; threads inherit all
//! of it, so this runs while there is one thread. Each thread then narrows itself further with [`confine`].

mod calls;
mod root;

use std::fs;
use std::io;
use std::path::Path;

use landlock::{
    ABI, Access as _, AccessFs, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
    path_beneath_rules,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

pub use calls::{Thread, confine};
use root::Access;

/// What stays in reach.
#[derive(Debug, Clone, Copy)]
pub struct Reach<'a> {
    /// The machine's own folder, absolute, whose files it may read.
    pub folder: &'a Path,
    pub readable: &'a [&'a Path],
    pub writable: &'a [&'a Path],
    /// The host's network, for a user-mode network in this process.
    pub network: bool,
}

/// Confines this process. What it could not take away comes back as sentences for people; the guest still runs,
/// as it does under peers on such hosts.
#[must_use]
pub fn enter(reach: Reach<'_>) -> Vec<String> {
    // What is read once of the kernel's parameters is read now, while that is allowed.
    let _ = rustix::param::page_size();
    let mut weaknesses = Vec::new();
    let mut step = |what: &str, result: Result<(), String>| {
        if let Err(why) = result {
            weaknesses.push(format!("the machine's process keeps {what}: {why}"));
        }
    };
    let left = leave_namespaces(reach.network);
    let alone = left.is_ok();
    step("the host's namespaces", left.map_err(|e| e.to_string()));
    if alone {
        // Without a mount namespace of its own it would take the host's root away.
        let entered = leave_root(reach);
        step("the host's root", entered.map_err(|e| e.to_string()));
    }
    // The first of its process namespace; the daemon could not make one where it is not.
    if std::process::id() != 1 {
        step(
            "sight of the host's processes",
            Err("it was started in the host's process namespace".into()),
        );
    }
    step(
        "its capabilities",
        base::privileges::drop_all().map_err(|e| e.to_string()),
    );
    step("sight of the host's files", restrict_files(reach));
    step(
        "system calls it does not need",
        calls::restrict(reach.network),
    );
    weaknesses
}

fn leave_namespaces(keep_network: bool) -> io::Result<()> {
    let mut flags =
        UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWNS | UnshareFlags::NEWCGROUP;
    if !keep_network {
        flags |= UnshareFlags::NEWNET;
    }
    let user = rustix::process::geteuid();
    let (uid, gid) = (user.as_raw(), rustix::process::getegid().as_raw());
    if !user.is_root() {
        flags |= UnshareFlags::NEWUSER;
    }
    // SAFETY: this is the only thread, and it shares no file system state with another process.
    unsafe { unshare_unsafe(flags) }?;
    if !user.is_root() {
        // Without a mapping its own files would belong to nobody.
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
        fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))?;
    }
    Ok(())
}

const KVM: &str = "/dev/kvm";
/// The host's resolvers, which a user-mode network asks.
const RESOLVERS: &str = "/etc/resolv.conf";

fn leave_root(reach: Reach<'_>) -> io::Result<()> {
    let readable = reach.readable.iter().map(|path| (*path, Access::Read));
    let writable = reach.writable.iter().map(|path| (*path, Access::Write));
    let mut files: Vec<(&Path, Access)> = readable
        .chain(writable)
        // What is missing is said by who opens it.
        .filter(|(path, _)| path.exists())
        .collect();
    if Path::new(KVM).exists() {
        files.push((Path::new(KVM), Access::Device));
    }
    if reach.network && Path::new(RESOLVERS).exists() {
        files.push((Path::new(RESOLVERS), Access::Read));
    }
    root::enter(reach.folder, &files)
}

fn restrict_files(reach: Reach<'_>) -> Result<(), String> {
    let abi = ABI::V6;
    let all = AccessFs::from_all(abi);
    let read = AccessFs::from_read(abi) & !AccessFs::Execute;
    let resolvers = reach.network.then_some(Path::new(RESOLVERS));
    let readable = reach
        .readable
        .iter()
        .copied()
        .chain([reach.folder])
        .chain(resolvers);
    let writable = reach.writable.iter().copied().chain([Path::new(KVM)]);
    let status = (|| {
        Ruleset::default()
            .handle_access(all)?
            .scope(Scope::AbstractUnixSocket | Scope::Signal)?
            .create()?
            .add_rules(path_beneath_rules(readable, read))?
            .add_rules(path_beneath_rules(writable, all & !AccessFs::Execute))?
            .restrict_self()
    })()
    .map_err(|error: landlock::RulesetError| error.to_string())?;
    if status.ruleset == RulesetStatus::NotEnforced {
        return Err("this kernel has no landlock".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Runs `test` of this file in a process of its own, since a jail cannot be left.
    fn alone(test: &str) -> bool {
        if std::env::var_os("BERTH_JAIL_TEST").is_some() {
            return true;
        }
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env("BERTH_JAIL_TEST", "1")
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        false
    }

    #[test]
    fn a_jailed_process_reaches_its_own_files_and_nothing_else() {
        if !alone("process::jail::tests::a_jailed_process_reaches_its_own_files_and_nothing_else") {
            return;
        }
        let own = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let secret = other.path().join("secret");
        std::fs::write(&secret, "x").unwrap();
        let weaknesses = std::thread::spawn({
            let (own, secret) = (own.path().to_owned(), secret.clone());
            move || {
                std::fs::create_dir(own.join("run")).unwrap();
                std::fs::write(own.join("record"), "mine").unwrap();
                let weaknesses = enter(Reach {
                    folder: &own,
                    readable: &[],
                    writable: &[&own.join("run")],
                    network: false,
                });
                if weaknesses.iter().any(|w| w.contains("files")) {
                    eprintln!("SKIPPED: {weaknesses:?}");
                    return weaknesses;
                }
                std::fs::write(own.join("run/mine"), "y").unwrap();
                // What the daemon trusts is not the guest's to write.
                assert!(std::fs::read(own.join("record")).is_ok());
                assert!(std::fs::write(own.join("record"), "forged").is_err());
                assert!(std::fs::rename(own.join("run/mine"), own.join("record")).is_err());
                assert!(std::fs::write(own.join("more"), "y").is_err());
                assert!(std::fs::read(&secret).is_err());
                assert!(std::fs::File::open("/etc/passwd").is_err());
                assert!(std::os::unix::net::UnixStream::connect("/run/x").is_err());
                assert!(Command::new("/bin/true").status().is_err());
                assert!(std::thread::spawn(|| 7).join().is_ok());
                weaknesses
            }
        })
        .join()
        .unwrap();
        assert!(
            !weaknesses.iter().any(|w| w.contains("system calls")),
            "{weaknesses:?}"
        );
    }

    #[test]
    fn each_kind_of_thread_may_do_its_own_work_and_no_others() {
        let name = "process::jail::tests::each_kind_of_thread_may_do_its_own_work_and_no_others";
        if !alone(name) {
            return;
        }
        let own = tempfile::tempdir().unwrap();
        let path = own.path().join("disk");
        std::fs::write(&path, [7; 4096]).unwrap();
        let disk = std::sync::Arc::new(
            std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .unwrap(),
        );
        let on = |kind: Thread, work: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::spawn(move || {
                confine(kind);
                work();
            });
            assert!(thread.join().is_ok(), "{kind:?}");
        };
        let has_rings = disk::Ring::<()>::new(None).is_ok();
        let whole = std::thread::spawn(move || {
            let weaknesses = enter(Reach {
                folder: own.path(),
                readable: &[],
                writable: &[own.path()],
                network: true,
            });
            assert!(
                !weaknesses.iter().any(|w| w.contains("system calls")),
                "{weaknesses:?}"
            );
            let opens = {
                let path = path.clone();
                move || std::fs::File::open(&path).is_ok()
            };
            let socket = || std::net::TcpListener::bind("127.0.0.1:0").is_ok();
            assert!(opens() && socket(), "the first thread makes the machine");
            let ring = disk::Ring::<()>::new(None);
            assert_eq!(ring.is_ok(), has_rings, "and its rings");
            let (open, file) = (opens.clone(), disk.clone());
            on(
                Thread::Io,
                Box::new(move || {
                    use std::os::unix::fs::FileExt;
                    let mut data = [0; 512];
                    file.read_exact_at(&mut data, 0).unwrap();
                    file.write_all_at(&data, 512).unwrap();
                    file.sync_data().unwrap();
                    assert!(!open() && !socket());
                    assert!(std::thread::Builder::new().spawn(|| ()).is_err());
                    assert!(disk::Ring::<()>::new(None).is_err(), "it only uses them");
                    if let Ok(ring) = ring {
                        // SAFETY: a sync has no memory.
                        let pushed = unsafe { ring.push(disk::Task::Sync(file), ()) };
                        assert!(pushed.is_ok());
                        ring.wait();
                        ring.reap(|(), done| assert!(done));
                        assert!(!ring.is_busy());
                    }
                }),
            );
            let (open, file) = (opens.clone(), disk.clone());
            on(
                Thread::Cpu,
                Box::new(move || {
                    use std::os::unix::fs::FileExt;
                    assert!(!open() && !socket());
                    assert!(
                        file.read_exact_at(&mut [0; 8], 0).is_err(),
                        "disks are not its"
                    );
                    // Translated code needs memory that can be executed; nobody else does.
                    assert!(executable_memory());
                }),
            );
            let open = opens.clone();
            on(
                Thread::Console,
                Box::new(move || {
                    assert!(open() && !socket() && !executable_memory());
                }),
            );
            let open = opens.clone();
            on(
                Thread::Control,
                Box::new(move || {
                    assert!(!open() && !socket() && !executable_memory());
                    std::thread::spawn(|| ()).join().unwrap();
                }),
            );
            on(
                Thread::Network,
                Box::new(move || {
                    assert!(socket() && !executable_memory());
                    // SAFETY: kill with signal 0 asks only whether it may be sent.
                    assert!(unsafe { libc::kill(1, 0) } != 0);
                }),
            );
        });
        assert!(whole.join().is_ok());
    }

    fn executable_memory() -> bool {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        let protection = ProtFlags::READ | ProtFlags::EXEC;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, protection, MapFlags::PRIVATE) }.is_ok()
    }
}
