//! What a machine's guest and its host give each other: memory, sockets, a console with a size. The guest is Debian's
//! kernel with busybox.

mod guest;
mod host;

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use guest::{Tool, inspect, logs, start_tiny_machine, start_with_tiny, type_line};
use host::{BERTH, Host, has};

/// A host with a machine `vm` of the tiny image that is ready.
fn start_with_machine(more: &[&str]) -> Option<Host> {
    let host = start_with_tiny(&[])?;
    start_tiny_machine(&host, "vm", more);
    Some(host)
}

fn stats(host: &Host) -> serde_json::Value {
    let text = host.ok(&["machine", "stats", "vm", "--format", "json"]);
    serde_json::from_str::<serde_json::Value>(&text).unwrap()[0].clone()
}

fn load(host: &Host, modules: &[&str]) {
    for module in modules {
        type_line(host, "vm", &format!("insmod /modules/{module}.ko"));
    }
}

#[test]
fn memory_that_a_machine_frees_is_the_hosts_again_and_more_can_be_asked_back() {
    let Some(host) = start_with_machine(&[]) else {
        return;
    };
    load(&host, &["virtio_balloon"]);
    type_line(
        &host,
        "vm",
        "mkdir -p /big; mount -t tmpfs -o size=300m none /big",
    );
    type_line(
        &host,
        "vm",
        "dd if=/dev/zero of=/big/file bs=1M count=180 && echo FIL''LED",
    );
    host.eventually("the guest filled its memory", || {
        logs(&host, "vm").contains("FILLED")
    });
    let full = stats(&host)["memory_used"].as_u64().unwrap();
    assert!(full > 180 << 20, "{full}");
    type_line(&host, "vm", "rm /big/file");
    host.eventually("the process is smaller", || {
        stats(&host)["memory_used"].as_u64().unwrap() < full - (140 << 20)
    });
    // What the guest tells of itself.
    host.eventually("the guest tells of its memory", || {
        stats(&host)["guest_memory"]["guest"]["total"].is_u64()
    });
    let told = stats(&host);
    let total = told["guest_memory"]["guest"]["total"].as_u64().unwrap();
    assert!((200 << 20..384 << 20).contains(&total), "{told}");
    assert!(host.ok(&["machine", "stats"]).contains("GUEST"));
    // Asked back, and returned.
    let balloon = |host: &Host| stats(host)["guest_memory"]["balloon"].as_u64().unwrap();
    let said = host.ok(&["machine", "balloon", "vm", "256M"]);
    assert!(said.contains("of 384MiB"), "{said}");
    host.eventually("the balloon is filled", || balloon(&host) == 128 << 20);
    let said = host.ok(&["machine", "balloon", "vm"]);
    assert!(said.contains("the guest has 256MiB of 384MiB;"), "{said}");
    let (code, error) = host.fails(&["machine", "balloon", "vm", "1G"]);
    assert_eq!(code, 2, "{error}");
    assert!(error.contains("between 64MiB and 384MiB"), "{error}");
    host.ok(&["machine", "balloon", "vm", "384M"]);
    host.eventually("the balloon is empty", || balloon(&host) == 0);
}

#[test]
fn programs_of_host_and_guest_reach_each_other_by_vsock() {
    let Some(tool) = Tool::build("crates/vmm/tests/guest/vsock.c") else {
        return;
    };
    let Some(host) = start_with_machine(&["--drive", &tool.drive()]) else {
        return;
    };
    let (code, error) = host.fails(&["machine", "vsock", "vm", "77"]);
    assert_eq!(code, 3, "{error}");
    assert!(error.contains("nothing in machine vm listens"), "{error}");
    load(
        &host,
        &[
            "vsock",
            "vmw_vsock_virtio_transport_common",
            "vmw_vsock_virtio_transport",
        ],
    );
    tool.unpack(&host, "vm", "/dev/nvme0n2");
    type_line(&host, "vm", "/tool listen 77 &");
    host.eventually("the guest listens", || {
        logs(&host, "vm").contains("LISTENING")
    });
    // More than the windows of either side hold.
    let sent: Vec<u8> = (0..1_000_000u32).map(|n| b'a' + (n % 26) as u8).collect();
    let output = host.with_input(&["machine", "vsock", "vm", "77"], &sent);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        output.stdout == sent.to_ascii_uppercase(),
        "{} bytes",
        output.stdout.len()
    );
    // The other way: what listens in the machine's folder.
    let folder = PathBuf::from(inspect(&host, "vm")["folder"].as_str().unwrap());
    let listener = UnixListener::bind(folder.join("run/vsock.sock_52"))
        .or_else(|_| {
            // A socket's path is short, a test's folder may be long.
            std::env::set_current_dir(folder.join("run"))?;
            UnixListener::bind("vsock.sock_52")
        })
        .unwrap();
    type_line(&host, "vm", "/tool connect 52 word");
    let (mut accepted, _) = listener.accept().unwrap();
    let mut word = String::new();
    accepted.read_to_string(&mut word).unwrap();
    accepted
        .write_all(format!("from the host: {word}").as_bytes())
        .unwrap();
    drop(accepted);
    host.eventually("the guest has the answer", || {
        logs(&host, "vm").contains("ANSWER from the host: word")
    });
    // A reset makes the device anew, at the same place.
    host.ok(&["machine", "reset", "vm"]);
    host.eventually("the guest is ready again", || {
        logs(&host, "vm").matches("READY").count() == 2
    });
    let (code, error) = host.fails(&["machine", "vsock", "vm", "77"]);
    assert_eq!(code, 3, "{error}");
}

#[test]
fn the_virtio_console_is_a_terminal_with_the_size_of_the_window() {
    let Some(host) = start_with_machine(&[]) else {
        return;
    };
    if !has("script") {
        eprintln!("SKIPPED: needs script (bsdutils)");
        return;
    }
    load(&host, &["virtio_console"]);
    type_line(
        &host,
        "vm",
        "(while true; do sh < /dev/hvc0 > /dev/hvc0 2>&1; done) & echo HV''C",
    );
    host.eventually("a shell is on hvc0", || logs(&host, "vm").contains("HVC"));
    // A terminal of 33 rows and 101 columns.
    let socket = host.socket();
    let command = format!(
        "stty rows 33 cols 101; exec {BERTH} machine console --virtio --detach-keys ctrl-] vm"
    );
    let mut child = Command::new("script")
        .args(["-qefc", &command, "/dev/null"])
        .env("BERTH_SOCKET", &socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut output = child.stdout.take().unwrap();
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let reading = std::thread::spawn({
        let seen = seen.clone();
        move || {
            let mut buffer = [0; 4096];
            while let Ok(count) = output.read(&mut buffer) {
                if count == 0 {
                    return;
                }
                seen.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        }
    });
    host.eventually("the guest's terminal has the size", || {
        // What is typed too early goes to nobody.
        input.write_all(b"stty size\n").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(500));
        String::from_utf8_lossy(&seen.lock().unwrap()).contains("33 101")
    });
    input.write_all(b"\x1d").unwrap();
    drop(input);
    assert!(child.wait().unwrap().success());
    reading.join().unwrap();
    // The serial line's log has nothing of it.
    assert!(!logs(&host, "vm").contains("33 101"));
}
