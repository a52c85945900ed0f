//! Guests that crash, and guests on a network of their own.

mod guest;
mod host;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use guest::{
    file_like, initrd, inspect, kernel_package, logs, machine_of_tiny, ready, start_tiny,
    start_with_tiny, type_line,
};
use host::{BERTH, has_all};

fn boot(folder: &Path, script: &str, more: &[&str]) -> Option<Output> {
    let package = kernel_package()?;
    if !has_all(&["busybox", "python3"]) {
        return None;
    }
    let initrd = initrd(folder, &package, script);
    let words = [&["--memory", "256M"], more].concat();
    Some(guest::boot(&package, &initrd, 300, &words))
}

#[test]
fn a_kernel_panic_is_a_crash_with_its_reason() {
    let directory = tempfile::tempdir().unwrap();
    let Some(output) = boot(directory.path(), "#!/bin/sh\nexit 3\n", &[]) else {
        return;
    };
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.contains("the guest crashed: kernel panic: Attempted to kill init"),
        "{error}"
    );
}

#[test]
fn a_panicked_kernel_that_does_not_reset_is_ended() {
    let directory = tempfile::tempdir().unwrap();
    let more = ["--append", "panic=0"];
    let Some(output) = boot(directory.path(), "#!/bin/sh\nexit 3\n", &more) else {
        return;
    };
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("kernel panic"), "{error}");
}

#[test]
fn a_broken_initial_ram_disk_is_a_crash_that_names_the_root_file_system() {
    let Some(package) = kernel_package() else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let broken = directory.path().join("initrd");
    std::fs::write(&broken, vec![0x5a; 70_000]).unwrap();
    let output = guest::boot(&package, &broken, 300, &["--memory", "256M"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("Unable to mount root fs"), "{error}");
}

#[test]
fn a_triple_fault_is_a_crash_and_a_reset_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let script = "#!/bin/sh\nreboot -f\n";
    let Some(output) = boot(directory.path(), script, &["--append", "reboot=t,force"]) else {
        return;
    };
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("triple fault"), "{error}");
    let output = boot(directory.path(), script, &[]).unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{error}");
    assert!(error.contains("asked for a reset"), "{error}");
}

#[test]
fn a_machines_crash_stops_it_or_starts_its_guest_again_as_its_policy_says() {
    let Some(host) = start_with_tiny(&[]) else {
        return;
    };
    for (name, policy) in [("ends", "stop"), ("returns", "restart")] {
        start_tiny(&host, name, "256M", "256M", &["--on-crash", policy]);
    }
    for name in ["ends", "returns"] {
        ready(&host, name, 1);
        type_line(&host, name, "echo c > /proc/sysrq-trigger");
    }
    host.eventually("the crash ends the machine", || {
        inspect(&host, "ends")["state"] == "stopped"
    });
    let shown = inspect(&host, "ends");
    assert_eq!(shown["last_exit"]["reason"], "crashed", "{shown}");
    let message = shown["last_exit"]["message"].as_str().unwrap();
    assert!(
        message.contains("kernel panic: sysrq triggered crash"),
        "{message}"
    );
    ready(&host, "returns", 2);
    let shown = inspect(&host, "returns");
    assert_eq!(shown["resets"], 1, "{shown}");
    assert!(
        shown["last_crash"].as_str().unwrap().contains("sysrq"),
        "{shown}"
    );
    // A restart that the guest asked for is no crash.
    type_line(&host, "returns", "reboot -f");
    ready(&host, "returns", 3);
    assert_eq!(inspect(&host, "returns")["resets"], 2);
    let followed = host
        .command(&["machine", "logs", "-f", "--tail", "0", "returns"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    type_line(&host, "returns", "echo FOLLOW\"\"ED; off");
    let output = followed.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("FOLLOWED"), "{text}");
    assert!(!text.contains("READY"), "only what is new: {text}");
}

#[test]
fn a_guest_that_crashes_at_every_boot_can_be_stopped_between_two() {
    let Some(host) = start_with_tiny(&[]) else {
        return;
    };
    let more = ["--on-crash", "restart", "--append", "init=/none"];
    start_tiny(&host, "vm", "256M", "256M", &more);
    host.eventually("it crashed twice", || {
        inspect(&host, "vm")["resets"].as_u64() >= Some(2)
    });
    // Not after the time that a guest has to power off: there is none that could.
    host.ok(&["machine", "stop", "--time", "600", "vm"]);
    let shown = inspect(&host, "vm");
    assert_eq!(shown["state"], "stopped");
    assert_eq!(shown["last_exit"]["reason"], "killed", "{shown}");
}

/// Answers every question for an IPv4 address with 192.0.2.7.
const NAME_SERVER: &str = r#"
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("192.0.2.1", 53))
while True:
    q, a = s.recvfrom(512)
    end = q.index(b"\0", 12) + 5
    four = q[end-4:end-2] == b"\0\1"
    head = q[:2] + b"\x81\x80\0\1" + (b"\0\1" if four else b"\0\0") + b"\0\0\0\0"
    s.sendto(head + q[12:end] + (b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\xc0\0\2\7" if four else b""), a)
"#;

const USER_GUEST: &str = r#"#!/bin/sh
mount -t proc none /proc
for m in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci failover net_failover virtio_net; do insmod /$m.ko; done
cat > /lease <<'END'
#!/bin/sh
if [ "$1" = bound ]; then
  ip addr add $ip/$mask dev $interface
  ip route add default via $router
  echo "nameserver $dns" > /etc/resolv.conf
  echo LEASE $ip
fi
END
chmod +x /lease
ip link set lo up
ip link set eth0 up
udhcpc -i eth0 -s /lease -q -n -t 20
echo "PAGE $(wget -qO- http://192.0.2.1/page)"
ping -c 1 192.0.2.1 && echo PINGED
ping -c 1 10.0.2.2 && echo GATEWAY-PINGED
nslookup somewhere.test | grep -q 192.0.2.7 && echo NAME-FOUND
wget -qO- http://10.0.2.2:8099/ || echo LOOPBACK-CLOSED
mkdir /www; echo from-the-guest > /www/index.html
httpd -p 80 -h /www
echo SERVING
while [ ! -e /asked ]; do wget -qO- http://192.0.2.1/asked 2>/dev/null | grep -q yes && touch /asked; sleep 1; done
poweroff -f
"#;

/// The test's own side: a network namespace whose world is 192.0.2.1, with a web server and a name server.
const USER_HOST: &str = r#"
set -e
ip link set lo up
ip addr add 192.0.2.1/24 dev lo
echo "0 2147483647" > /proc/sys/net/ipv4/ping_group_range
mount --bind "$DIR/resolv.conf" /etc/resolv.conf
busybox httpd -f -p 192.0.2.1:80 -h "$DIR/www" & web=$!
busybox httpd -f -p 127.0.0.1:8099 -h "$DIR/www" & secret=$!
python3 "$DIR/names.py" & names=$!
trap 'kill $web $secret $names 2>/dev/null || true' EXIT
setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=-all --bounding-set=-all \
  env HOME=/nonexistent timeout 280 "$BERTH" machine boot --cpu soft --memory 256M --kernel "$KERNEL" --initrd "$DIR/initrd" \
  --net user,hostfwd=tcp:127.0.0.1:8080-:80 > "$DIR/out" 2> "$DIR/err" < /dev/null & machine=$!
for _ in $(seq 2000); do grep -q SERVING "$DIR/out" && break; kill -0 $machine || break; sleep 0.1; done
echo "FORWARDED $(busybox wget -qO- http://127.0.0.1:8080/)"
echo yes > "$DIR/www/asked"
wait $machine
"#;

#[test]
fn a_user_without_rights_boots_a_guest_that_reaches_the_world_and_is_reached() {
    let Some(package) = kernel_package() else {
        return;
    };
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: needs root for a network namespace of the test's own");
        return;
    }
    if !has_all(&["busybox", "python3", "unshare", "setpriv", "ip"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let folder = directory.path();
    let kernel = folder.join("kernel");
    std::fs::copy(file_like(&package.join("boot"), "vmlinuz-"), &kernel).unwrap();
    let berth = folder.join("berth");
    std::fs::copy(BERTH, &berth).unwrap();
    initrd(folder, &package, USER_GUEST);
    std::fs::create_dir(folder.join("www")).unwrap();
    std::fs::write(folder.join("www/page"), "of-the-world\n").unwrap();
    std::fs::write(folder.join("resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
    std::fs::write(folder.join("names.py"), NAME_SERVER).unwrap();
    // The user that runs it has no rights to a private folder.
    let opened = Command::new("chmod")
        .args(["-R", "a+rX"])
        .arg(folder)
        .status();
    assert!(opened.unwrap().success());
    let output = Command::new("unshare")
        .args(["--net", "--mount", "sh", "-c", USER_HOST])
        .env("DIR", folder)
        .env("BERTH", &berth)
        .env("KERNEL", &kernel)
        .output()
        .unwrap();
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
    let guest = read("out");
    let all = format!(
        "{guest}\n{}\n{}\n{}",
        read("err"),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    for mark in [
        "LEASE 10.0.2.15",
        "PAGE of-the-world",
        "PINGED",
        "GATEWAY-PINGED",
        "NAME-FOUND",
        "LOOPBACK-CLOSED",
    ] {
        assert!(guest.contains(mark), "no {mark} in {all}");
    }
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(out.contains("FORWARDED from-the-guest"), "{all}");
    assert!(output.status.success(), "{all}");
}

#[test]
fn a_machine_on_the_user_network_publishes_its_port_by_itself() {
    let Some(mut host) = start_with_tiny(&[]) else {
        return;
    };
    let words = [
        &machine_of_tiny("vm", "256M", "256M")[..],
        &["--network", "user", "-p"],
    ]
    .concat();
    let (code, error) = host.fails(&[&words[..], &["80"]].concat());
    assert_eq!(code, 2, "{error}");
    host.ok(&[&words[..], &["127.0.0.1:8088:80"]].concat());
    host.ok(&["machine", "start", "vm"]);
    let logs = logs(&host, "vm");
    ready(&host, "vm", 1);
    assert!(!logs.contains("keeps"), "{logs}");
    let fetch = |host: &host::Host| {
        let words = ["busybox", "wget", "-qO-", "http://127.0.0.1:8088/"];
        String::from_utf8_lossy(&host.in_network(&words).stdout).into_owned()
    };
    assert_eq!(fetch(&host), "page of a machine\n");
    // Nothing of the network is the daemon's.
    host.kill_daemon();
    host.start_daemon();
    assert_eq!(fetch(&host), "page of a machine\n");
    let threads = inspect(&host, "vm")["pid"].as_i64().unwrap();
    let names: Vec<String> = std::fs::read_dir(format!("/proc/{threads}/task"))
        .unwrap()
        .flatten()
        .map(|task| std::fs::read_to_string(task.path().join("comm")).unwrap())
        .collect();
    assert!(
        names.iter().any(|name| name.trim() == "berth-usernet"),
        "{names:?}"
    );
}
