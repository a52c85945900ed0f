//! Machines as the host sees them: the jail of their processes, limits, policies, and what is left behind. Their guest
//! is a kernel of three bytes.

mod guest;
mod host;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use guest::{import_idle, inspect};
use host::{Host, has, start};

fn start_with_idle() -> Option<Host> {
    if !has("mke2fs") || !has("debugfs") {
        eprintln!("SKIPPED: needs mke2fs and debugfs (e2fsprogs)");
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
    let (_, error) = host.fails(&["machine", "start", "vm"]);
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
    host.ok(&["machine", "start", "vm"]);
    assert_eq!(state(&host, "vm"), "running");
}
