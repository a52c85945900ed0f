//! Networks of an ordinary user's daemon: no root, no bridge on the host, and the same words.

mod host;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use host::{Host, has, start_as_with, start_as_without_networks};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// An address of the host that is not its loopback.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);

/// A host whose resolver is on its loopback, as systemd's is, with an address on a wire to nowhere. `user`: an id that no
/// account has, and no other test.
fn start(user: u32) -> Option<Host> {
    let limit = std::fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default();
    if limit.trim() == "0" {
        eprintln!("SKIPPED: this host gives no user namespaces");
        return None;
    }
    let host = start_as_with(user, |folder| {
        let path = folder.join("resolv.conf");
        std::fs::write(&path, "nameserver 127.0.0.53\n").unwrap();
        vec![(path, "/etc/resolv.conf")]
    })?;
    for words in [
        "ip link add h0 type veth peer name h1",
        "ip address add 10.99.0.1/24 dev h0",
        "ip link set h0 up",
        "ip link set h1 up",
        "ip route add default via 10.99.0.2",
        "ip route add 172.18.0.0/16 via 10.99.0.2",
    ] {
        let words: Vec<&str> = words.split(' ').collect();
        assert!(host.in_network(&words).status.success());
    }
    Some(host)
}

/// Runs `work` in the network namespace of a process; its sockets stay there.
fn inside<T: Send>(pid: u32, work: impl FnOnce() -> T + Send) -> T {
    let namespace = std::fs::File::open(format!("/proc/{pid}/ns/net")).unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            move_into_link_name_space(
                std::os::fd::AsFd::as_fd(&namespace),
                Some(LinkNameSpaceType::Network),
            )
            .unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

/// A server that tells each caller its address.
fn greet(pid: u32, at: SocketAddr) {
    let listener = inside(pid, || TcpListener::bind(at).unwrap());
    std::thread::spawn(move || {
        while let Ok((mut stream, peer)) = listener.accept() {
            let _ = writeln!(stream, "hello {}", peer.ip());
        }
    });
}

/// A server that sends datagrams back.
fn echo(pid: u32, at: SocketAddr) {
    let socket = inside(pid, || UdpSocket::bind(at).unwrap());
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], peer);
        }
    });
}

/// Whether `data` comes back from `to`, asked from the namespace of `pid`.
fn is_echoed(pid: u32, to: SocketAddr, data: &[u8]) -> bool {
    inside(pid, || {
        let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }
            .parse()
            .unwrap();
        let socket = UdpSocket::bind(any).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        let mut buffer = vec![0; 65_536];
        // A datagram may be lost.
        (0..10).any(|_| {
            socket.send_to(data, to).unwrap();
            matches!(socket.recv(&mut buffer), Ok(length) if buffer[..length] == *data)
        })
    })
}

/// Words that fetch a page in a container on `network`.
fn fetch<'a>(network: &'a str, address: &'a str) -> [&'a str; 8] {
    [
        "run",
        "--rm",
        "--network",
        network,
        "busybox",
        "wget",
        "-qO-",
        address,
    ]
}

fn page(host: &Host, address: &str) -> String {
    let words = ["busybox", "wget", "-qO-", address];
    let output = host.in_network(&words);
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A web server on the network `app`.
const WEB: &[&str] = &[
    "run",
    "-d",
    "--name",
    "web",
    "--network",
    "app",
    "--network-alias",
    "www",
    "-p",
    "18080:80",
    "-p",
    "127.0.0.1:18053:5353/udp",
    "busybox",
    "sh",
    "-c",
    "echo the page > /tmp/index.html; exec httpd -f -p 80 -h /tmp",
];

fn pid_of(host: &Host, container: &str) -> u32 {
    let pid = host.ok(&["inspect", "-f", "{{.State.Pid}}", container]);
    pid.parse().unwrap()
}

/// The processes of a user with such a command line.
fn processes(user: u32, words: &str) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let status = std::fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(words) && status.contains(&format!("\nUid:\t{user}\t")) {
            found.extend(
                entry
                    .file_name()
                    .to_str()
                    .and_then(|n| n.parse::<i32>().ok()),
            );
        }
    }
    found
}

const FIRST: u32 = 54322;

#[test]
fn containers_of_an_ordinary_user_have_networks_names_and_published_ports() {
    let Some(mut host) = start(FIRST) else { return };
    let daemon = host.daemon_pid();
    host.ok(&["network", "create", "app"]);
    let subnet = host.ok(&[
        "network",
        "inspect",
        "-f",
        "{{(index .IPAM.Config 0).Subnet}}",
        "app",
    ]);
    assert_ne!(subnet, "172.18.0.0/16", "the host's route is hidden");
    host.ok(WEB);
    let web = pid_of(&host, "web");
    echo(web, "0.0.0.0:5353".parse().unwrap());
    host.eventually("the page is there", || {
        page(&host, "http://127.0.0.1:18080/") == "the page"
    });

    // By name and by alias, from a container of the same network and from no other.
    let ask = |network: &str, to: &str| host.berth(&fetch(network, to));
    for name in ["http://web/", "http://www/", "http://web.app/"] {
        assert_eq!(ask("app", name).stdout, b"the page\n", "{name}");
    }
    assert!(!ask("bridge", "http://web/").status.success());

    // From the host, by all of its addresses; and not where it was not published.
    for address in ["10.99.0.1:18080", "[::1]:18080"] {
        assert_eq!(page(&host, &format!("http://{address}/")), "the page");
    }
    assert!(is_echoed(
        daemon,
        "127.0.0.1:18053".parse().unwrap(),
        b"there and back"
    ));
    let refused = inside(daemon, || TcpStream::connect("10.99.0.1:18053"));
    assert!(refused.is_err());

    // Out: a server of the host sees the host, not the container.
    greet(daemon, SocketAddr::from((OUTSIDE, 7001)));
    let greeting = |network: &str| {
        host.berth(&[
            "run",
            "--rm",
            "--network",
            network,
            "busybox",
            "nc",
            "-w",
            "5",
            "10.99.0.1",
            "7001",
        ])
    };
    assert_eq!(greeting("app").stdout, b"hello 10.99.0.1\n");
    echo(daemon, SocketAddr::from((OUTSIDE, 7004)));
    assert!(is_echoed(
        web,
        SocketAddr::from((OUTSIDE, 7004)),
        b"out and back"
    ));
    // What nobody serves is refused, as it would be on the host.
    let refused = inside(web, || TcpStream::connect((OUTSIDE, 7999)).unwrap_err());
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    // What the host serves on its loopback is its own.
    greet(daemon, "127.0.0.1:7002".parse().unwrap());
    for address in ["127.0.0.1:7002", "192.0.0.1:7002"] {
        let address: SocketAddr = address.parse().unwrap();
        assert!(inside(web, || TcpStream::connect(address)).is_err());
    }

    // An internal network leads nowhere.
    host.ok(&["network", "create", "--internal", "shut"]);
    assert!(!greeting("shut").status.success());
    // The host's own network is what it was.
    let own = std::fs::read_link(format!("/proc/{daemon}/ns/net")).unwrap();
    let link = ["readlink", "/proc/self/ns/net"];
    let words = [&["run", "--rm", "--network", "host", "busybox"][..], &link].concat();
    assert_eq!(host.ok(&words), own.display().to_string());
    let (code, error) = host.fails(&["run", "--rm", "-p", "80:80", "busybox", "true"]);
    assert_eq!(code, 125, "{error}");
    assert!(error.contains("ip_unprivileged_port_start=80"), "{error}");
    // A port that a program of the host has.
    let taken = inside(daemon, || TcpListener::bind("0.0.0.0:18099").unwrap());
    let (code, error) = host.fails(&["run", "--rm", "-p", "18099:80", "busybox", "true"]);
    assert_eq!(code, 125, "{error}");
    assert!(
        error.contains("0.0.0.0:18099/tcp is already in use"),
        "{error}"
    );
    drop(taken);

    // The daemon dies: everything goes on, and the next one knows of it.
    let gateway = processes(FIRST, "gateway");
    assert_eq!(gateway.len(), 1);
    host.kill_daemon();
    std::thread::sleep(Duration::from_secs(2));
    let output = host.network_command().unwrap();
    let output = { output }
        .args(["busybox", "wget", "-qO-", "http://127.0.0.1:18080/"])
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"the page\n", "without a daemon");
    host.start_daemon();
    assert_eq!(processes(FIRST, "gateway"), gateway);
    assert_eq!(page(&host, "http://127.0.0.1:18080/"), "the page");
    let daemon = host.daemon_pid();
    assert!(is_echoed(
        daemon,
        "127.0.0.1:18053".parse().unwrap(),
        b"again"
    ));
    assert_eq!(host.ok(&fetch("app", "http://web/")), "the page");
    assert_eq!(
        host.ok(&["exec", "web", "nc", "10.99.0.1", "7001"]),
        "hello 10.99.0.1"
    );

    // The gateway dies: another has its ports and its way out.
    let killed = rustix::process::Pid::from_raw(gateway[0]).unwrap();
    rustix::process::kill_process(killed, rustix::process::Signal::KILL).unwrap();
    host.eventually("the port is published again", || {
        page(&host, "http://127.0.0.1:18080/") == "the page"
    });
    assert_eq!(
        host.ok(&["exec", "web", "nc", "10.99.0.1", "7001"]),
        "hello 10.99.0.1"
    );

    // A stopped container's ports are free, and a started one's are its own again.
    host.ok(&["stop", "-t", "0", "web"]);
    let taken = inside(daemon, || TcpListener::bind("0.0.0.0:18080").unwrap());
    assert!(!host.berth(&["start", "web"]).status.success());
    drop(taken);
    host.ok(&["start", "web"]);
    host.eventually("the page is there again", || {
        page(&host, "http://127.0.0.1:18080/") == "the page"
    });

    // With the last container and the daemon all of it goes.
    host.ok(&["rm", "-f", "web"]);
    host.ok(&["system", "stop"]);
    let end = Instant::now() + Duration::from_secs(60);
    while !(processes(FIRST, "gateway").is_empty() && processes(FIRST, "keeper").is_empty()) {
        assert!(Instant::now() < end, "the gateway or the keeper stays");
        std::thread::sleep(Duration::from_millis(50));
    }
    host.kill_daemon();
}

/// The answer to a question for an address: always the same.
fn answer_names(socket: &UdpSocket) {
    let mut buffer = [0; 512];
    while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
        let mut answer = buffer[..length].to_vec();
        let end = 12 + answer[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
        let wants_v4 = answer[end - 3] == 1;
        answer.truncate(end);
        answer[2..4].copy_from_slice(&[0x81, 0x80]);
        answer[4..12].copy_from_slice(&[0, 1, 0, u8::from(wants_v4), 0, 0, 0, 0]);
        if wants_v4 {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4]);
            answer.extend(OUTSIDE.octets());
        }
        let _ = socket.send_to(&answer, peer);
    }
}

#[test]
fn names_of_the_outside_are_asked_of_a_resolver_on_the_hosts_loopback() {
    let Some(host) = start(54323) else { return };
    let daemon = host.daemon_pid();
    let resolver = inside(daemon, || UdpSocket::bind("127.0.0.53:53").unwrap());
    std::thread::spawn(move || answer_names(&resolver));
    greet(daemon, SocketAddr::from((OUTSIDE, 7001)));
    let words = [
        "run",
        "--rm",
        "busybox",
        "nc",
        "-w",
        "5",
        "far.example",
        "7001",
    ];
    assert_eq!(host.ok(&words), "hello 10.99.0.1");
}

#[test]
fn streams_and_large_datagrams_cross_the_gateway_whole() {
    let Some(host) = start(54324) else { return };
    let daemon = host.daemon_pid();
    let listener = inside(daemon, || TcpListener::bind((OUTSIDE, 7001)).unwrap());
    // Sends back what it gets, half closed and all.
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            std::thread::spawn(move || {
                let mut all = Vec::new();
                let _ = stream.read_to_end(&mut all);
                let _ = stream.write_all(&all);
            });
        }
    });
    host.ok(&[
        "run", "-d", "--name", "cc", "-p", "18080:80", "busybox", "sleep", "600",
    ]);
    let container = pid_of(&host, "cc");
    let data: Vec<u8> = (0..8 << 20)
        .map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let through = |from: u32, to: SocketAddr| {
        let mut stream = inside(from, || TcpStream::connect(to).unwrap());
        let mut writer = stream.try_clone().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                writer.write_all(&data).unwrap();
                writer.shutdown(std::net::Shutdown::Write).unwrap();
            });
            let mut back = Vec::new();
            stream.read_to_end(&mut back).unwrap();
            assert!(
                back == data,
                "{} bytes came back of {}",
                back.len(),
                data.len()
            );
        });
    };
    through(container, SocketAddr::from((OUTSIDE, 7001)));
    let listener = inside(container, || TcpListener::bind("0.0.0.0:80").unwrap());
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let mut all = Vec::new();
            let _ = stream.read_to_end(&mut all);
            let _ = stream.write_all(&all);
        }
    });
    through(daemon, "127.0.0.1:18080".parse().unwrap());
    echo(daemon, SocketAddr::from((OUTSIDE, 7004)));
    let to = SocketAddr::from((OUTSIDE, 7004));
    for size in [0, 1, 1472, 1473, 9000, 60_000] {
        assert!(is_echoed(container, to, &data[..size]), "{size} bytes");
    }
}

#[test]
fn the_docker_command_publishes_ports_of_an_ordinary_users_containers() {
    if !has("docker") {
        eprintln!("SKIPPED: needs docker (scripts/setup installs it)");
        return;
    }
    let Some(host) = start(54325) else { return };
    let docker = |words: &[&str]| {
        let output = Command::new("docker")
            .args(words)
            .env(
                "DOCKER_HOST",
                format!("unix://{}", host.docker_socket().display()),
            )
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.success(),
            "docker {words:?}: {error}\n{}",
            host.log()
        );
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    docker(&["network", "create", "app"]);
    let serve = "echo by docker > /tmp/index.html; exec httpd -f -p 80 -h /tmp";
    docker(&[
        "run",
        "-d",
        "--name",
        "dk",
        "--network",
        "app",
        "-p",
        "127.0.0.1:18081:80",
        "busybox",
        "sh",
        "-c",
        serve,
    ]);
    assert_eq!(docker(&["port", "dk", "80"]), "127.0.0.1:18081");
    host.eventually("the page is there", || {
        page(&host, "http://127.0.0.1:18081/") == "by docker"
    });
    assert_eq!(docker(&fetch("app", "http://dk/")), "by docker");
    // A network that is connected later.
    docker(&["network", "create", "other"]);
    docker(&["network", "connect", "other", "dk"]);
    assert_eq!(docker(&fetch("other", "http://dk/")), "by docker");
    docker(&["rm", "-f", "dk"]);
    docker(&["network", "rm", "app", "other"]);
    assert!(Path::new(&host.docker_socket()).exists());
}

#[test]
fn where_the_host_gives_no_namespaces_networks_are_refused_with_the_reason() {
    let limit = std::fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default();
    if limit.trim() == "0" {
        eprintln!("SKIPPED: this host gives no user namespaces");
        return;
    }
    let Some(host) = start_as_without_networks(54327) else {
        return;
    };
    for words in [
        &["run", "--rm", "busybox", "true"][..],
        &["network", "create", "app"],
    ] {
        let (_, error) = host.fails(words);
        assert!(error.contains("No space left on device"), "{error}");
        assert!(
            error.contains("--network host or --network none"),
            "{error}"
        );
    }
    let words = [
        "run",
        "--rm",
        "--network",
        "host",
        "busybox",
        "echo",
        "there",
    ];
    assert_eq!(host.ok(&words), "there");
}
