//! Machines on networks, with containers and the host beside them. The guest is Debian's kernel with busybox.

mod guest;
mod host;

use guest::{Tool, guest_says, inspect, logs, start_tiny_machine, start_with_tiny, type_line};
use host::Host;

/// What a page at an address has, asked for from the host.
fn fetched(host: &Host, url: &str) -> String {
    let output = host.in_network(&["busybox", "wget", "-qO-", url]);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The host's address on the default network.
fn gateway(host: &Host) -> String {
    let words = "ip -4 -o addr show | awk '/172/ {print $4}' | cut -d/ -f1";
    let output = host.in_network(&["sh", "-c", words]);
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[test]
fn machine_and_container_meet_by_name_both_ways_and_the_world_meets_the_machine_at_its_port() {
    let Some(host) = start_with_tiny(&[]) else {
        return;
    };
    start_tiny_machine(&host, "vm", &["-p", "18082:80"]);
    host.ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "busybox",
        "sh",
        "-c",
        "mkdir -p /www; echo page of a container > /www/index.html; httpd -f -p 80 -h /www",
    ]);
    guest_says(&host, "vm", "wget -qO- http://web/", "page of a container");
    let fetch = ["run", "--rm", "busybox", "wget", "-qO-", "http://vm/"];
    assert_eq!(host.ok(&fetch), "page of a machine");
    // From the host, at its loop-back address and at another.
    for address in ["127.0.0.1".to_owned(), gateway(&host)] {
        let url = format!("http://{address}:18082/");
        assert_eq!(fetched(&host, &url), "page of a machine\n");
    }
    // A container that is gone is not found any more, and a machine under its new name is.
    host.ok(&["rm", "-f", "web"]);
    guest_says(
        &host,
        "vm",
        "wget -qO- http://web/ || echo NOT''-THERE",
        "NOT-THERE",
    );
    host.ok(&["machine", "rename", "vm", "house"]);
    let fetch = ["run", "--rm", "busybox", "wget", "-qO-", "http://house/"];
    assert_eq!(host.ok(&fetch), "page of a machine");
}

#[test]
fn a_machine_without_a_network_has_no_card_and_runs() {
    let Some(host) = start_with_tiny(&[]) else {
        return;
    };
    let create = ["machine", "create", "vm", "--image", "tiny", "--network"];
    let (code, error) = host.fails(&[&create[..], &["none", "-p", "8080:80"]].concat());
    assert_eq!(code, 2, "{error}");
    assert!(
        error.contains("without a network cannot publish"),
        "{error}"
    );
    let (code, error) = host.fails(&[&create[..], &["host"]].concat());
    assert_eq!(code, 2, "{error}");
    assert!(error.contains("cannot be on the network host"), "{error}");
    start_tiny_machine(&host, "vm", &["--network", "none"]);
    let shown = inspect(&host, "vm");
    assert_eq!(shown["network"], "none");
    assert!(
        shown["mac"].is_null() && shown["address"].is_null(),
        "{shown}"
    );
    guest_says(
        &host,
        "vm",
        "echo CA''RDS $(ls /sys/class/net | wc -l)",
        "CARDS 1",
    );
    let stats = host.ok(&["machine", "stats", "vm", "--format", "json"]);
    assert!(stats.contains("\"received\": null"), "{stats}");
}

#[test]
fn a_published_udp_port_leads_to_the_machine() {
    let Some(tool) = Tool::build("crates/berth/tests/guest/network.c") else {
        return;
    };
    let Some(host) = start_with_tiny(&["python3"]) else {
        return;
    };
    let words = ["-p", "18083:9000/udp", "--drive", &tool.drive()];
    start_tiny_machine(&host, "vm", &words);
    tool.unpack(&host, "vm", "/dev/nvme0n2");
    type_line(&host, "vm", "/tool echo 9000 &");
    host.eventually("the guest echoes", || logs(&host, "vm").contains("ECHOES"));
    let ask = |address: &str| {
        let program = "import socket, sys\n\
             s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)\n\
             s.settimeout(1)\n\
             for _ in range(30):\n\
             \x20   s.sendto(b'word', (sys.argv[1], 18083))\n\
             \x20   try: print(s.recv(99).decode()); break\n\
             \x20   except OSError: pass\n";
        let output = host.in_network(&["python3", "-c", program, address]);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for address in ["127.0.0.1".to_owned(), gateway(&host), "::1".to_owned()] {
        assert_eq!(ask(&address), "WORD\n", "at {address}");
    }
    let list = host.ok(&["machine", "list"]);
    assert!(list.contains("18083->9000/udp"), "{list}");
    // The port is its own while it runs, and free afterwards.
    host.ok(&[
        "machine",
        "create",
        "other",
        "--image",
        "tiny",
        "--disk",
        "512M",
        "-p",
        "18083:9000/udp",
    ]);
    let (code, error) = host.fails(&["machine", "start", "other"]);
    assert_eq!(code, 4, "{error}");
    host.ok(&["machine", "kill", "vm"]);
    host.ok(&["machine", "start", "other"]);
}

#[test]
fn a_machine_on_an_ipv6_network_gets_its_address_and_meets_containers_by_name() {
    let Some(tool) = Tool::build("crates/berth/tests/guest/network.c") else {
        return;
    };
    let Some(host) = start_with_tiny(&[]) else {
        return;
    };
    host.ok(&["network", "create", "--ipv6", "six"]);
    let words = [
        "--network",
        "six",
        "-p",
        "18084:80",
        "--drive",
        &tool.drive(),
    ];
    start_tiny_machine(&host, "vm", &words);
    let address = inspect(&host, "vm")["address6"]
        .as_str()
        .unwrap()
        .to_owned();
    tool.unpack(&host, "vm", "/dev/nvme0n2");
    // The router by its advertisement, the address by DHCPv6.
    guest_says(
        &host,
        "vm",
        "ip -6 route | grep -q default && echo ROU''TER",
        "ROUTER",
    );
    let line = "own=$(/tool dhcp6 eth0) && ip -6 addr add $own/64 dev eth0; echo OW''N $own.";
    guest_says(&host, "vm", line, &format!("OWN {address}."));
    // By name both ways, and by the address itself.
    host.ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "--network",
        "six",
        "busybox",
        "sh",
        "-c",
        "mkdir -p /www; echo page of a container > /www/index.html; httpd -f -p [::]:80 -h /www",
    ]);
    let own: serde_json::Value = serde_json::from_str(&host.ok(&["inspect", "web"])).unwrap();
    let web = &own[0]["NetworkSettings"]["Networks"]["six"]["GlobalIPv6Address"];
    let line = format!("wget -qO- http://[{}]/", web.as_str().unwrap());
    guest_says(&host, "vm", &line, "page of a container");
    let inside = |url: &str| {
        let words = [
            "run",
            "--rm",
            "--network",
            "six",
            "busybox",
            "wget",
            "-qO-",
            url,
        ];
        host.berth(&words).stdout
    };
    host.eventually("the address is the guest's", || {
        inside(&format!("http://[{address}]/")) == b"page of a machine\n"
    });
    assert_eq!(inside("http://vm/"), b"page of a machine\n");
    let names = host.ok(&[
        "run",
        "--rm",
        "--network",
        "six",
        "busybox",
        "nslookup",
        "-type=aaaa",
        "vm",
    ]);
    assert!(names.contains(&address), "{names}");
    // The world meets it at its port.
    assert_eq!(fetched(&host, "http://[::1]:18084/"), "page of a machine\n");
    host.ok(&["machine", "kill", "vm"]);
    host.ok(&["machine", "remove", "vm"]);
}
