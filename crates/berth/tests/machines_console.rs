//! A machine's consoles under bursts. The guest is Debian's kernel with busybox.

mod guest;
mod host;

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Duration;

use guest::{logs, start_tiny_machine, start_with_tiny, type_line};
use host::Host;

const LINES: u32 = 60_000;

/// Attaches to a console, lets the guest write a burst of numbered lines after which it powers off, and checks that
/// every line has come, in order, while we read slowly.
fn burst(host: &Host, line: &[&str], device: &str) {
    let mut words = vec!["machine", "console", "vm"];
    words.extend(line);
    let mut child = host
        .command(&words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut output = child.stdout.take().unwrap();
    let mut input = child.stdin.take().unwrap();
    // Once something of ours comes back, we are attached.
    type_line(host, "vm", &format!("echo AT''TACHED > {device}"));
    let mut text = Vec::new();
    let mut part = vec![0; 8192];
    let find = |text: &[u8], word: &[u8]| text.windows(word.len()).position(|at| at == word);
    while find(&text, b"ATTACHED").is_none() {
        let count = output.read(&mut part).unwrap();
        assert!(count > 0, "{}", String::from_utf8_lossy(&text));
        text.extend(&part[..count]);
    }
    type_line(
        host,
        "vm",
        &format!(
            "awk 'BEGIN {{ for (n = 1; n <= {LINES}; n++) printf \"BURST%08d\\n\", n }}' > {device}; sync; poweroff -f"
        ),
    );
    let mut pauses = 0;
    loop {
        let count = output.read(&mut part).unwrap();
        text.extend(&part[..count]);
        if count == 0 {
            break;
        }
        // What we type while the machine ends must not cost us what it still had to say.
        let _ = input.write_all(b"x");
        if pauses < 200 {
            std::thread::sleep(Duration::from_millis(5));
            pauses += 1;
        }
    }
    drop(input);
    assert!(child.wait().unwrap().success());
    // Less what the guest may have echoed.
    let text = String::from_utf8_lossy(&text).replace('x', "");
    let mut next = 1;
    for line in text.split(['\n', '\r']) {
        if let Some(number) = line.strip_prefix("BURST") {
            assert_eq!(number, format!("{next:08}"), "after line {next}");
            next += 1;
        }
    }
    assert_eq!(
        next,
        LINES + 1,
        "{:?}",
        &text[text.len().saturating_sub(300)..]
    );
    assert!(!text.contains("left out"));
}

#[test]
fn no_byte_of_a_burst_is_lost_to_an_attached_console_even_when_the_machine_ends_behind_it() {
    let Some(host) = start_with_tiny(&[]) else {
        return;
    };
    start_tiny_machine(&host, "vm", &[]);
    burst(&host, &[], "/dev/ttyS0");
    host.eventually("it is off", || {
        host.ok(&["machine", "list"]).contains("stopped")
    });
    host.ok(&["machine", "start", "vm"]);
    host.eventually("the guest is ready again", || {
        logs(&host, "vm").matches("READY").count() == 2
    });
    // Its ports come after the module: a line that is written before makes a file of that name.
    type_line(
        &host,
        "vm",
        "insmod /modules/virtio_console.ko; until test -c /dev/hvc0; do sleep 0.1; done",
    );
    burst(&host, &["--virtio"], "/dev/hvc0");
}
