//! The runtime for a user without privileges. It needs root to become such a user, newuidmap and a static busybox, and
//! says so.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::json;

mod bundle;
use bundle::{Bundle, text};

/// A program that runs another as `nobody`, with ids of its own in /etc/subuid that no one else sees.
fn wrapper(b: &Bundle) -> Vec<String> {
    for name in ["subuid", "subgid"] {
        fs::write(b.path(name), "nobody:300000:65536\n").unwrap();
    }
    let script = format!(
        "touch /etc/subuid /etc/subgid; mount --bind {0}/subuid /etc/subuid && mount --bind {0}/subgid /etc/subgid && exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\"",
        b.scratch.path().display()
    );
    [
        "unshare",
        "-m",
        "--propagation=private",
        "sh",
        "-c",
        &script,
        "sh",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// The bundle, with a copy of the runtime that this user can execute.
fn rootless() -> Option<(Bundle, Vec<String>)> {
    let b = Bundle::new()?;
    if !["/usr/bin/newuidmap", "/bin/newuidmap"]
        .iter()
        .any(|path| Path::new(path).exists())
    {
        eprintln!("SKIPPED: newuidmap is needed (Debian: apt install uidmap)");
        return None;
    }
    if fs::read_to_string("/proc/sys/user/max_user_namespaces").is_ok_and(|text| text.trim() == "0")
    {
        eprintln!("SKIPPED: user namespaces are switched off");
        return None;
    }
    fs::copy(env!("CARGO_BIN_EXE_berth-oci"), b.path("berth-oci")).unwrap();
    fs::remove_file(b.path("config.json")).unwrap();
    let wrapper = wrapper(&b);
    for (program, args) in [("chown", ["-R", "65534:65534"]), ("chmod", ["755", "."])] {
        let done = Command::new(program)
            .args(args)
            .arg(b.scratch.path())
            .current_dir(b.scratch.path())
            .status();
        assert!(done.unwrap().success());
    }
    Some((b, wrapper))
}

fn go(b: &Bundle, wrapper: &[String], args: &[&str]) -> (Option<i32>, String) {
    if !b.config.is_null() {
        fs::write(b.path("config.json"), b.config.to_string()).unwrap();
    }
    let (out, runtime) = (b.path("said"), b.path("berth-oci"));
    let file = fs::File::create(&out).unwrap();
    let status = Command::new(&wrapper[0])
        .args(&wrapper[1..])
        .arg(runtime)
        .arg("--root")
        .arg(b.path("state"))
        .args(args)
        .current_dir(b.scratch.path())
        .stdin(std::process::Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .status()
        .unwrap();
    (status.code(), fs::read_to_string(out).unwrap())
}

#[test]
fn an_ordinary_user_runs_the_template_for_such() {
    let Some((mut b, wrapper)) = rootless() else {
        return;
    };
    b.config = serde_json::Value::Null;
    let (code, said) = go(&b, &wrapper, &["spec", "--rootless"]);
    assert_eq!(code, Some(0), "{said}");
    let mut config: serde_json::Value =
        serde_json::from_slice(&fs::read(b.path("config.json")).unwrap()).unwrap();
    config["process"]["terminal"] = json!(false);
    config["process"]["args"] = json!([
        "sh",
        "-c",
        "id -u; cat /proc/self/uid_map; echo x > /dev/null; exit 6"
    ]);
    b.config = config;
    let id = b.id.clone();
    let (code, said) = go(&b, &wrapper, &["run", &id]);
    assert_eq!(code, Some(6), "{said}");
    assert_eq!(
        said.split_whitespace().collect::<Vec<_>>(),
        ["0", "0", "65534", "1"],
        "{said}"
    );
    b.nothing_is_left();
}

#[test]
fn an_ordinary_user_has_the_ids_of_its_subuid_range() {
    let Some((mut b, wrapper)) = rootless() else {
        return;
    };
    b.config = serde_json::Value::Null;
    assert_eq!(go(&b, &wrapper, &["spec", "--rootless"]).0, Some(0));
    b.config = serde_json::from_slice(&fs::read(b.path("config.json")).unwrap()).unwrap();
    let map = json!([{"containerID": 0, "hostID": 65534, "size": 1}, {"containerID": 1, "hostID": 300_000, "size": 65535}]);
    b.config["linux"]["uidMappings"] = map.clone();
    b.config["linux"]["gidMappings"] = map;
    b.config["process"]["terminal"] = json!(false);
    b.config["root"]["readonly"] = json!(false);
    for set in ["bounding", "effective", "permitted"] {
        b.config["process"]["capabilities"][set] = json!(["CAP_CHOWN", "CAP_SETUID", "CAP_SETGID"]);
    }
    b.config["process"]["args"] = json!(["sleep", "100"]);
    let id = b.id.clone();
    let (code, said) = go(&b, &wrapper, &["run", "--detach", &id]);
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = go(
        &b,
        &wrapper,
        &[
            "exec",
            &id,
            "sh",
            "-c",
            "echo x > /made && busybox chown 7:8 /made && stat -c %u:%g /made",
        ],
    );
    assert_eq!((code, said.as_str()), (Some(0), "7:8\n"));
    use std::os::unix::fs::MetadataExt;
    let made = fs::metadata(b.path("rootfs/made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (300_006, 300_007));
    let (code, said) = go(&b, &wrapper, &["exec", "--user", "3:4", &id, "id", "-u"]);
    assert_eq!((code, said.as_str()), (Some(0), "3\n"));
    assert!(go(&b, &wrapper, &["state", &id]).1.contains("running"));
    assert!(go(&b, &wrapper, &["list"]).1.contains(&id));
    let (code, said) = go(&b, &wrapper, &["kill", &id, "KILL"]);
    assert_eq!(code, Some(0), "{said}");
    bundle::until("it lives on", || {
        go(&b, &wrapper, &["state", &id]).1.contains("stopped")
    });
    let (code, said) = go(&b, &wrapper, &["delete", &id]);
    assert_eq!(code, Some(0), "{said}");
    // What was not given to this user is refused, by name.
    b.config["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 0, "size": 1}]);
    let (code, said) = go(&b, &wrapper, &["run", &id]);
    assert!(code == Some(1) && said.contains("/etc/subuid"), "{said}");
    let output = b.wrapped(&["true"], &[]);
    assert_eq!(text(&output), "");
    b.nothing_is_left();
}
