//! Machines as the host sees them: the jail of their processes, limits, policies, and what is left behind. Their guest
//! is a kernel of three bytes.

mod guest;
mod host;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use guest::{import_idle, inspect};
use host::{Host, has_all, start};

fn start_with_idle() -> Option<Host> {
    if !has_all(&["mke2fs", "debugfs"]) {
        return None;
    }
    let host = start()?;
    import_idle(&host);
    Some(host)
}

fn create(host: &Host, name: &str, more: &[&str]) {
    let mut words = vec![
        "machine", "create", name, "--image", "idle", "--memory", "64M", "--disk", "128M", "--cpu",
        "soft",
    ];
    words.extend(more);
    host.ok(&words);
}

fn state(host: &Host, name: &str) -> String {
    inspect(host, name)["state"].as_str().unwrap().to_owned()
}

fn pid(host: &Host, name: &str) -> i32 {
    inspect(host, name)["pid"].as_i64().unwrap() as i32
}

fn kill_process(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

fn fields(path: &Path) -> BTreeMap<String, String> {
    std::fs::read_to_string(path)
        .unwrap()
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
        .collect()
}

/// Folders of a cgroup in whichever hierarchies have it.
fn cgroup_folders(path: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = std::fs::read_dir(root).unwrap().flatten();
    hierarchies
        .map(|entry| entry.path())
        .chain([root.to_owned()])
        .map(|hierarchy| hierarchy.join(path))
        .filter(|folder| folder.is_dir())
        .collect()
}

#[test]
fn a_machines_process_is_jailed_and_each_kind_of_thread_more_narrowly() {
    let Some(host) = start_with_idle() else {
        return;
    };
    create(&host, "vm", &[]);
    host.ok(&["machine", "start", "vm"]);
    let process = PathBuf::from(format!("/proc/{}", pid(&host, "vm")));
    let status = fields(&process.join("status"));
    assert_eq!(status["Seccomp"], "2", "{status:?}");
    assert_eq!(status["NoNewPrivs"], "1");
    for set in ["CapEff", "CapPrm", "CapInh", "CapBnd"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    for kind in ["net", "ipc", "uts", "mnt", "cgroup"] {
        let of = |process: &Path| std::fs::read_link(process.join("ns").join(kind)).unwrap();
        let daemon = PathBuf::from(format!("/proc/{}", host.daemon_pid()));
        assert_ne!(of(&process), of(&daemon), "{kind}");
    }
    // The first thread has the process's filters, the others one more of their own.
    let mut filters = BTreeMap::new();
    for task in std::fs::read_dir(process.join("task")).unwrap().flatten() {
        let status = fields(&task.path().join("status"));
        let count: u32 = status["Seccomp_filters"].parse().unwrap();
        filters.insert(status["Name"].clone(), count);
    }
    let first: u32 = status["Seccomp_filters"].parse().unwrap();
    for thread in ["cpu0", "nvme0-0", "net0-0", "serial0", "control"] {
        assert_eq!(
            filters.get(thread),
            Some(&(first + 1)),
            "{thread} of {filters:?}"
        );
    }
    // Nothing but its own files is open: no file of another machine, of the daemon, or of the host's root.
    let folder = inspect(&host, "vm")["folder"].as_str().unwrap().to_owned();
    let bases = host.state().join("machine-bases");
    for fd in std::fs::read_dir(process.join("fd")).unwrap().flatten() {
        let Ok(target) = std::fs::read_link(fd.path()) else {
            continue;
        };
        let own = target.starts_with(&folder)
            || target.starts_with(&bases)
            || target.starts_with("/dev")
            || !target.starts_with("/")
            || target.to_string_lossy().starts_with("/memfd:");
        assert!(own, "{} is open", target.display());
    }
    let log = std::fs::read_to_string(Path::new(&folder).join("process.log")).unwrap();
    assert!(!log.contains("keeps"), "{log}");
}

/// Files and folders below `root` as a process with it as its root names them; folders that lead on are left out.
fn leaves(root: &Path, at: &Path, found: &mut Vec<String>) {
    let here = root.join(at);
    let mut entries: Vec<_> = std::fs::read_dir(&here).unwrap().flatten().collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let inside = at.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            leaves(root, &inside, found);
        } else {
            found.push(format!("/{}", inside.display()));
        }
    }
}

#[test]
fn a_machines_process_sees_its_own_files_and_no_other_process() {
    let Some(host) = start_with_idle() else {
        return;
    };
    let drive = host.scratch().join("drive.img");
    std::fs::write(&drive, vec![0; 1 << 20]).unwrap();
    std::fs::write(host.scratch().join("secret"), "x").unwrap();
    create(
        &host,
        "vm",
        &["--drive", &format!("{},ro", drive.display())],
    );
    create(&host, "other", &[]);
    host.ok(&["machine", "start", "other", "vm"]);
    let process = PathBuf::from(format!("/proc/{}", pid(&host, "vm")));
    // It is the first process of a namespace of its own, in which there is no other.
    let status = fields(&process.join("status"));
    let numbers: Vec<&str> = status["NSpid"].split_ascii_whitespace().collect();
    assert!(
        numbers.len() >= 2 && numbers.last() == Some(&"1"),
        "{numbers:?}"
    );
    let of = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).unwrap();
    assert_ne!(of(pid(&host, "vm")), of(pid(&host, "other")));
    assert_ne!(of(pid(&host, "vm")), of(host.daemon_pid() as i32));
    // All files there are, below its root.
    let folder = inspect(&host, "vm")["folder"].as_str().unwrap().to_owned();
    let mut found = Vec::new();
    leaves(&process.join("root"), Path::new(""), &mut found);
    let bases = host.state().join("machine-bases");
    let allowed = |file: &str| {
        Path::new(file).starts_with(&folder)
            || (Path::new(file).starts_with(&bases) && file.ends_with("/disk.raw"))
            || file == "/dev/kvm"
            || Path::new(file) == drive
    };
    let strange: Vec<_> = found.iter().filter(|file| !allowed(file)).collect();
    assert!(strange.is_empty(), "{strange:?}");
    assert!(
        found.iter().any(|file| file.ends_with("/disk.qcow2")),
        "{found:?}"
    );
    // All mounts there are: its root and those files, and only its disk and one folder may be written to.
    let mounts = std::fs::read_to_string(process.join("mountinfo")).unwrap();
    for mount in mounts.lines() {
        let words: Vec<&str> = mount.split(' ').collect();
        let (place, options) = (words[4], words[5]);
        assert!(place == "/" || place == folder || allowed(place), "{mount}");
        let read_only = options.split(',').any(|option| option == "ro");
        let own = place.strip_prefix(&folder);
        let writable = matches!(own, Some("/run" | "/disk.qcow2")) || place == "/dev/kvm";
        assert_eq!(read_only, !writable, "{mount}");
    }
    // The old root is nowhere: what the process has as its root cannot be left by going up.
    assert!(std::fs::metadata(process.join("root/../etc/passwd")).is_err());
    // Its death is one death.
    let (before, inside) = (pid(&host, "vm"), process.clone());
    kill_process(before);
    host.eventually("its end is seen", || state(&host, "vm") == "stopped");
    let line = std::fs::read(inside.join("cmdline")).unwrap_or_default();
    assert!(line.is_empty());
    host.ok(&["machine", "start", "vm"]);
}

#[test]
fn a_machine_whose_process_hangs_is_shown_so_and_is_ended_all_the_same() {
    let Some(host) = start_with_idle() else {
        return;
    };
    create(&host, "vm", &[]);
    host.ok(&["machine", "start", "vm"]);
    let process = rustix::process::Pid::from_raw(pid(&host, "vm")).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::STOP).unwrap();
    assert_eq!(state(&host, "vm"), "unresponsive");
    // Long before the time that a guest has to power off.
    host.ok(&["machine", "stop", "--time", "600", "vm"]);
    assert_eq!(state(&host, "vm"), "stopped");
    host.ok(&["machine", "start", "vm"]);
    assert_eq!(state(&host, "vm"), "running");
}

#[test]
fn two_starts_at_once_never_get_the_same_memory() {
    let Some(mut host) = start_with_idle() else {
        return;
    };
    let info = fields(Path::new("/proc/meminfo"));
    let total: u64 = info["MemTotal"].trim_end_matches(" kB").parse().unwrap();
    let memory = format!("{}M", total / 1024 * 2 / 5);
    let names = ["a", "b", "c", "d", "e", "f"];
    for name in names {
        host.ok(&[
            "machine", "create", name, "--image", "idle", "--memory", &memory, "--disk", "128M",
            "--cpu", "soft",
        ]);
    }
    let children = names.map(|name| {
        host.command(&["machine", "start", name])
            .stderr(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap()
    });
    let outputs = children.map(|child| child.wait_with_output().unwrap());
    let started = outputs.iter().filter(|o| o.status.success()).count();
    assert_eq!(started, 2, "{outputs:?}");
    for output in outputs.iter().filter(|o| !o.status.success()) {
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(5), "{error}");
        assert!(error.contains("running machines have"), "{error}");
    }
    // The next daemon counts what runs.
    host.kill_daemon();
    host.start_daemon();
    let stopped = names
        .iter()
        .find(|name| state(&host, name) != "running")
        .unwrap();
    let (code, error) = host.fails(&["machine", "start", stopped]);
    assert_eq!(code, 5, "{error}");
    let running = names
        .iter()
        .find(|name| state(&host, name) == "running")
        .unwrap();
    host.ok(&["machine", "kill", running]);
    host.ok(&["machine", "start", stopped]);
}

#[test]
fn a_machines_process_has_limits_of_its_own_which_go_with_it() {
    let Some(host) = start_with_idle() else {
        return;
    };
    create(&host, "vm", &[]);
    host.ok(&["machine", "start", "vm"]);
    let shown = inspect(&host, "vm");
    let Some(cgroup) = shown["cgroup"].as_str() else {
        eprintln!("SKIPPED: this host gives no cgroups: {}", host.log());
        return;
    };
    let member = std::fs::read_to_string(format!("/proc/{}/cgroup", shown["pid"])).unwrap();
    assert!(member.contains(cgroup), "{member}");
    let folders = cgroup_folders(cgroup);
    let limit = |names: [&str; 2]| -> String {
        folders
            .iter()
            .flat_map(|folder| names.map(|name| folder.join(name)))
            .find_map(|file| std::fs::read_to_string(file).ok())
            .unwrap_or_else(|| panic!("none of {names:?} in {folders:?}"))
            .trim()
            .to_owned()
    };
    let memory: u64 = limit(["memory.max", "memory.limit_in_bytes"])
        .parse()
        .unwrap();
    assert!(memory > 64 << 20 && memory < 1 << 30, "{memory}");
    let pids: u64 = limit(["pids.max", "pids.max"]).parse().unwrap();
    assert!((64..1000).contains(&pids), "{pids}");
    let cpu = limit(["cpu.max", "cpu.cfs_quota_us"]);
    assert!(cpu.starts_with("200000"), "{cpu}");
    host.ok(&["machine", "kill", "vm"]);
    assert_eq!(cgroup_folders(cgroup), Vec::<PathBuf>::new());
}

#[test]
fn more_than_the_host_has_is_refused_with_figures() {
    let Some(host) = start_with_idle() else {
        return;
    };
    let create = |more: &[&str]| {
        let mut words = vec!["machine", "create", "vm", "--image", "idle"];
        words.extend(more);
        host.fails(&words)
    };
    let cpus = std::thread::available_parallelism().unwrap().get();
    let (code, error) = create(&["--cpus", &(cpus + 1).to_string()]);
    assert_eq!(code, 5, "{error}");
    assert!(
        error.contains(&format!("{cpus} logical processors")),
        "{error}"
    );
    let (code, error) = create(&["--memory", "900T"]);
    assert_eq!(code, 5, "{error}");
    assert!(error.contains("--overcommit"), "{error}");
    let (code, error) = create(&["--disk", "16M"]);
    assert_eq!(code, 2, "{error}");
    // Running machines count: two of two thirds do not fit, but each may be made.
    let info = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total: u64 = info
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok())
        .unwrap();
    let memory = format!("{}M", total / 1024 * 2 / 3);
    for name in ["one", "two"] {
        let words = [
            "machine", "create", name, "--image", "idle", "--memory", &memory, "--disk", "128M",
            "--cpu", "soft",
        ];
        host.ok(&words);
    }
    host.ok(&["machine", "start", "one"]);
    let (code, error) = host.fails(&["machine", "start", "two"]);
    assert_eq!(code, 5, "{error}");
    assert!(error.contains("running machines have"), "{error}");
    host.ok(&["machine", "update", "two", "--overcommit", "true"]);
    host.ok(&["machine", "start", "two"]);
}

#[test]
fn promised_space_is_shown_and_warned_of_before_it_is_missing() {
    let Some(host) = start_with_idle() else {
        return;
    };
    create(&host, "small", &[]);
    let usage = host.ok(&["system", "df"]);
    assert!(usage.contains("Machines"), "{usage}");
    assert!(usage.contains("still to grow"), "{usage}");
    let words = [
        "machine", "create", "large", "--image", "idle", "--memory", "64M", "--disk", "3T",
    ];
    host.ok(&words);
    let output = host.berth(&["system", "df"]);
    let warning = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        warning.contains("more disk space is promised to machines than there is"),
        "{warning}"
    );
    assert!(
        host.log().contains("more disk space is promised"),
        "{}",
        host.log()
    );
    let state = host.state().display().to_string();
    let doctor = host.berth(&["doctor", "--state-dir", &state, "--format", "json"]);
    let doctor = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(doctor.contains("more disk space is promised"), "{doctor}");
    host.ok(&["machine", "rm", "large"]);
    let output = host.berth(&["system", "df"]);
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn a_machine_is_started_again_as_its_policy_says() {
    let Some(mut host) = start_with_idle() else {
        return;
    };
    create(&host, "again", &["--restart", "on-failure"]);
    create(&host, "once", &[]);
    host.ok(&["machine", "start", "again", "once"]);
    let before = pid(&host, "again");
    kill_process(before);
    kill_process(pid(&host, "once"));
    host.eventually("it runs again, in another process", || {
        let shown = inspect(&host, "again");
        shown["state"] == "running" && shown["pid"].as_i64() != Some(before.into())
    });
    let shown = inspect(&host, "once");
    assert_eq!(shown["state"], "stopped");
    assert_eq!(shown["last_exit"]["reason"], "killed");
    // A person's stop is no failure.
    host.ok(&["machine", "kill", "again"]);
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert_eq!(state(&host, "again"), "stopped");
    // The host goes down: daemon and processes die together, and the next daemon starts what the policy wants.
    host.ok(&["machine", "update", "once", "--restart", "unless-stopped"]);
    host.ok(&["machine", "start", "again", "once"]);
    let lost = [pid(&host, "again"), pid(&host, "once")];
    host.kill_daemon();
    lost.into_iter().for_each(kill_process);
    host.start_daemon();
    for name in ["again", "once"] {
        host.eventually("it runs after the host's end", || {
            let shown = inspect(&host, name);
            shown["state"] == "running"
                && !lost.contains(&(shown["pid"].as_i64().unwrap_or(0) as i32))
        });
    }
}

#[test]
fn twenty_machines_come_and_go_and_leave_nothing_behind() {
    let Some(mut host) = start_with_idle() else {
        return;
    };
    let names: Vec<String> = (0..20).map(|n| format!("vm{n}")).collect();
    let all: Vec<&str> = names.iter().map(String::as_str).collect();
    let verb = |host: &Host, verb: &[&str]| {
        let mut words = vec!["machine"];
        words.extend(verb);
        words.extend(&all);
        host.ok(&words)
    };
    let begun = std::time::Instant::now();
    for name in &all {
        create(&host, name, &[]);
    }
    eprintln!("20 created in {:?}", begun.elapsed());
    let begun = std::time::Instant::now();
    verb(&host, &["start"]);
    eprintln!("20 started in {:?}", begun.elapsed());
    let processes: Vec<i32> = all.iter().map(|name| pid(&host, name)).collect();
    let cgroups: Vec<String> = all
        .iter()
        .filter_map(|name| inspect(&host, name)["cgroup"].as_str().map(str::to_owned))
        .collect();
    // The daemon dies in the middle, and the next one knows them all.
    host.kill_daemon();
    host.start_daemon();
    let listed = host.ok(&["machine", "list"]);
    assert_eq!(listed.matches("running").count(), 20, "{listed}");
    verb(&host, &["kill"]);
    verb(&host, &["rm"]);
    assert_eq!(host.ok(&["machine", "list", "-q"]), "");
    for pid in processes {
        // Its parent died: a zombie is what the host's init has not looked at yet, and has no command line.
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        assert!(line.is_empty(), "{pid} lives");
    }
    for cgroup in cgroups {
        assert_eq!(cgroup_folders(&cgroup), Vec::<PathBuf>::new());
    }
    let links = host.in_network(&["ip", "-o", "link"]);
    let links = String::from_utf8_lossy(&links.stdout).into_owned();
    assert!(!links.contains(" bt"), "a tap is left: {links}");
    let left = |folder: &str| {
        std::fs::read_dir(host.state().join(folder))
            .unwrap()
            .count()
    };
    assert_eq!(left("machines"), 0);
    assert_eq!(left("machine-bases"), 1, "the image is still here");
    host.ok(&["rmi", "idle"]);
    let (code, _) = host.fails(&["machine", "start", "vm0"]);
    assert_eq!(code, 3);
    host.kill_daemon();
    host.start_daemon();
    assert_eq!(left_after(&host), 0, "the base goes with its image");
}

fn left_after(host: &Host) -> usize {
    let bases = host.state().join("machine-bases");
    std::fs::read_dir(bases).unwrap().count()
}

#[test]
fn machines_are_renamed_waited_for_and_shown_in_every_format() {
    let Some(host) = start_with_idle() else {
        return;
    };
    create(&host, "old", &["--publish", "127.0.0.1:8087:80"]);
    let (code, error) = host.fails(&["machine", "create", "old", "--image", "idle"]);
    assert_eq!(code, 4, "{error}");
    host.ok(&["machine", "rename", "old", "new"]);
    host.ok(&["machine", "start", "new"]);
    let (code, error) = host.fails(&["machine", "rm", "new"]);
    assert_eq!(code, 4, "{error}");
    assert!(error.contains("berth machine stop new"), "{error}");
    let (code, error) = host.fails(&["machine", "update", "new", "--memory", "128M"]);
    assert_eq!(code, 4, "{error}");
    let table = host.ok(&["machine", "list"]);
    assert!(table.contains("127.0.0.1:8087->80/tcp"), "{table}");
    let json: serde_json::Value =
        serde_json::from_str(&host.ok(&["machine", "list", "--format", "json"])).unwrap();
    assert_eq!(json[0]["name"], "new");
    assert!(
        host.ok(&["machine", "list", "--format", "yaml"])
            .contains("name: new")
    );
    assert_eq!(host.ok(&["machine", "list", "-q"]), "new");
    let stats: serde_json::Value =
        serde_json::from_str(&host.ok(&["machine", "stats", "--format", "json"])).unwrap();
    assert_eq!(stats[0]["name"], "new");
    assert!(stats[0]["memory_used"].as_u64().unwrap() > 0, "{stats}");
    assert!(stats[0]["received"].is_u64(), "{stats}");
    let waiting = host
        .command(&["machine", "wait", "new"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    host.ok(&["machine", "kill", "new"]);
    let waited = waiting.wait_with_output().unwrap();
    assert_eq!(waited.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&waited.stdout).trim(), "killed");
    let (code, error) = host.fails(&["machine", "console", "new"]);
    assert_eq!(code, 4, "{error}");
    assert!(error.contains("berth machine start new"), "{error}");
    let (code, error) = host.fails(&["machine", "start", "nobody"]);
    assert_eq!(code, 3, "{error}");
}

#[test]
fn what_a_machine_lacks_is_named_when_it_starts() {
    let Some(host) = start_with_idle() else {
        return;
    };
    let (code, error) = host.fails(&["machine", "create", "vm", "--image", "busybox"]);
    assert_eq!(code, 2, "{error}");
    assert!(error.contains("no kernel in /boot"), "{error}");
    assert!(
        error.contains("berth image bootstrap debian:12 --kernel"),
        "{error}"
    );
    // Looked at when the machine is made: what is no kernel, and what is not there.
    let text = host.scratch().join("text");
    std::fs::write(&text, "no kernel\n").unwrap();
    for (kernel, wanted) in [(text.to_str().unwrap(), 2), ("/no/such/kernel", 3)] {
        let words = [
            "machine", "create", "vm", "--image", "idle", "--kernel", kernel,
        ];
        let (code, error) = host.fails(&words);
        assert_eq!(code, wanted, "{error}");
        assert!(error.contains("kernel"), "{error}");
    }
    create(&host, "vm", &[]);
    let folder = PathBuf::from(inspect(&host, "vm")["folder"].as_str().unwrap());
    // A damaged disk.
    let disk = folder.join("disk.qcow2");
    let whole = std::fs::read(&disk).unwrap();
    std::fs::write(&disk, &whole[..100]).unwrap();
    let (code, error) = host.fails(&["machine", "start", "vm"]);
    assert_ne!(code, 0);
    assert!(error.contains("disk.qcow2"), "{error}");
    assert_eq!(state(&host, "vm"), "created");
    std::fs::write(&disk, &whole).unwrap();
    // A missing kernel.
    let base = std::fs::read_dir(host.state().join("machine-bases"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let kernel = base.join("vmlinuz");
    std::fs::rename(&kernel, base.join("away")).unwrap();
    let (code, error) = host.fails(&["machine", "start", "vm"]);
    assert_eq!(code, 3, "{error}");
    assert!(
        error.contains("kernel") && error.contains("vmlinuz"),
        "{error}"
    );
    std::fs::rename(base.join("away"), &kernel).unwrap();
    // A missing base.
    std::fs::rename(base.join("base.json"), base.join("away")).unwrap();
    let (code, error) = host.fails(&["machine", "start", "vm"]);
    assert_eq!(code, 3, "{error}");
    std::fs::rename(base.join("away"), base.join("base.json")).unwrap();
    // Another's drive, which is not the machine's to read.
    let drive = host.scratch().join("foreign.img");
    std::fs::write(&drive, vec![0; 1 << 20]).unwrap();
    std::os::unix::fs::chown(&drive, Some(54321), Some(54321)).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&drive, mode).unwrap();
    create(&host, "foreign", &["--drive", &drive.display().to_string()]);
    let (code, error) = host.fails(&["machine", "start", "foreign"]);
    assert_eq!(code, 6, "{error}");
    assert!(
        error.contains("foreign.img") && error.contains("chown 0 "),
        "{error}"
    );
    // More than the guest has room for.
    let initrd = host.scratch().join("initrd");
    std::fs::File::create(&initrd)
        .unwrap()
        .set_len(96 << 20)
        .unwrap();
    let kernel = host.scratch().join("vmlinuz");
    std::fs::write(&kernel, guest::idle_kernel()).unwrap();
    create(
        &host,
        "narrow",
        &[
            "--kernel",
            &kernel.display().to_string(),
            "--initrd",
            &initrd.display().to_string(),
        ],
    );
    let (code, error) = host.fails(&["machine", "start", "narrow"]);
    assert_eq!(code, 5, "{error}");
    assert!(
        error.contains("berth machine update narrow --memory SIZE"),
        "{error}"
    );
    host.ok(&["machine", "start", "vm"]);
    assert_eq!(state(&host, "vm"), "running");
}

#[test]
fn a_start_that_this_host_cannot_do_exits_with_7_and_names_the_option_that_mends_it() {
    let Some(mut host) = start_with_idle() else {
        return;
    };
    // A daemon to which /dev/kvm is something else, in a mount namespace of its own.
    if !Path::new("/dev/kvm").exists() {
        eprintln!("SKIPPED: needs /dev/kvm, to hide it");
        return;
    }
    let id = host.scratch().join("boot-id");
    std::fs::copy("/proc/sys/kernel/random/boot_id", &id).unwrap();
    host.kill_daemon();
    host.boot_id = Some(id);
    host.start_daemon();
    let daemon = host.daemon_pid().to_string();
    let hidden = std::process::Command::new("nsenter")
        .args([
            "-t",
            &daemon,
            "-m",
            "mount",
            "--bind",
            "/dev/null",
            "/dev/kvm",
        ])
        .status();
    assert!(hidden.unwrap().success());
    create(&host, "vm", &[]);
    host.ok(&["machine", "update", "vm", "--cpu", "kvm"]);
    let (code, error) = host.fails(&["machine", "start", "vm"]);
    assert_eq!(code, 7, "{error}");
    assert!(
        error.contains("berth machine update vm --cpu soft"),
        "{error}"
    );
    assert_eq!(state(&host, "vm"), "created");
    host.ok(&["machine", "update", "vm", "--cpu", "soft"]);
    host.ok(&["machine", "start", "vm"]);
}

#[test]
fn a_kernel_in_the_foreground_fails_with_the_kind_of_what_it_lacks() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("vmlinuz");
    std::fs::write(&kernel, guest::idle_kernel()).unwrap();
    let kernel = kernel.display().to_string();
    let initrd = directory.path().join("initrd");
    std::fs::File::create(&initrd)
        .unwrap()
        .set_len(96 << 20)
        .unwrap();
    let boot = |more: &[&str]| {
        let output = std::process::Command::new(host::BERTH)
            .args(["machine", "boot", "--kernel", &kernel, "--cpu", "soft"])
            .args(more)
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code().unwrap(), error)
    };
    let (code, error) = boot(&["--memory", "1"]);
    assert_eq!(code, 2, "{error}");
    let (code, error) = boot(&["--disk", "/no/such/disk"]);
    assert_eq!(code, 3, "{error}");
    let narrow = ["--memory", "64M", "--initrd", &initrd.display().to_string()];
    let (code, error) = boot(&narrow);
    assert_eq!(code, 5, "{error}");
    // No KVM, for one who insists on it.
    let mask = r#"mount -t tmpfs none /dev && exec "$0" machine boot --cpu kvm --kernel "$1""#;
    let output = std::process::Command::new("unshare")
        .args(["--mount", "sh", "-c", mask, host::BERTH, &kernel])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: needs root to hide /dev/kvm");
        return;
    }
    assert_eq!(output.status.code(), Some(7), "{error}");
    assert!(error.contains("--cpu soft"), "{error}");
    // A kernel that a user may not read.
    let secret = directory.path().join("secret");
    std::fs::copy(&kernel, &secret).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&secret, mode).unwrap();
    std::fs::copy(host::BERTH, directory.path().join("berth")).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(directory.path(), mode).unwrap();
    let output = std::process::Command::new("setpriv")
        .args(["--reuid", "54321", "--regid", "54321", "--clear-groups"])
        .arg(directory.path().join("berth"))
        .args(["machine", "boot", "--kernel"])
        .arg(&secret)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(6), "{error}");
}
