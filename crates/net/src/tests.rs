//! The room as a whole, each test in a fresh network namespace that stands for the host.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::UnshareFlags;

use crate::namespace::{current, within};
use crate::netlink::{LinkChange, Netlink};
use crate::*;

mod life;
mod machines;
mod names;
mod publish;
mod reach;

/// Runs `test` on a thread whose network namespace is new, or says why not.
pub(crate) fn on_a_host_of_its_own(test: impl FnOnce(&std::path::Path) + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: network namespaces need root");
        return;
    }
    if matches!(firewall::run_nft(&["--version"], ""), Err(Error::NoNft)) {
        eprintln!("SKIPPED: the nft program is missing");
        return;
    }
    let finished = thread::spawn(move || {
        // SAFETY: only this thread's network namespace changes; it holds no sockets yet.
        if let Err(error) = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) } {
            eprintln!("SKIPPED: no new network namespace: {error}");
            return;
        }
        let up = LinkChange {
            up: Some(true),
            ..LinkChange::default()
        };
        Netlink::open().unwrap().set_link(1, &up).unwrap();
        let directory = tempfile::tempdir().unwrap();
        test(directory.path());
    });
    if let Err(panic) = finished.join() {
        std::panic::resume_unwind(panic);
    }
}

fn open(directory: &std::path::Path) -> Manager {
    Manager::open(NetConfig {
        sandboxes: 2,
        ..NetConfig::new(directory)
    })
    .unwrap()
}

fn spec(network: &str, container: &str) -> EndpointSpec {
    EndpointSpec {
        network: network.into(),
        container: container.into(),
        names: vec![container.into()],
        ..EndpointSpec::default()
    }
}

/// A server in `netns` that answers each connection with the address it sees.
fn serve(netns: &OwnedFd, at: &str) {
    let at: SocketAddr = at.parse().unwrap();
    let listener = within(netns.as_fd(), || TcpListener::bind(at)).unwrap();
    thread::spawn(move || {
        while let Ok((mut stream, peer)) = listener.accept() {
            let _ = write!(stream, "{}", peer.ip());
        }
    });
}

/// What a server at `to` answers to `netns`.
fn ask(netns: &OwnedFd, to: SocketAddr) -> io::Result<String> {
    within(netns.as_fd(), || {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_millis(1500))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })
}

fn to(endpoint: &Endpoint, port: u16) -> SocketAddr {
    SocketAddr::new(endpoint.ipv4().unwrap().into(), port)
}

fn ruleset() -> String {
    firewall::run_nft(&["list", "ruleset"], "").unwrap()
}

fn links() -> Vec<String> {
    let mut names: Vec<_> = Netlink::open()
        .unwrap()
        .links()
        .unwrap()
        .into_iter()
        .map(|l| l.name)
        .collect();
    names.sort();
    names
}

/// A second namespace on a wire to this one: the world outside, 192.0.2.9 and 2001:db8::9; we are .1.
fn outside() -> OwnedFd {
    let world = thread::spawn(|| {
        // SAFETY: as above.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        current().unwrap()
    })
    .join()
    .unwrap();
    let up = LinkChange {
        up: Some(true),
        ..LinkChange::default()
    };
    let mut netlink = Netlink::open().unwrap();
    netlink.add_veth("uplink", "world", world.as_fd()).unwrap();
    let index = netlink.link("uplink").unwrap().unwrap().index;
    netlink
        .add_address(index, "192.0.2.1/24".parse().unwrap())
        .unwrap();
    netlink
        .add_address(index, "2001:db8::1/64".parse().unwrap())
        .unwrap();
    netlink.set_link(index, &up).unwrap();
    within(world.as_fd(), || {
        let mut netlink = Netlink::open()?;
        netlink.set_link(1, &up)?;
        let index = netlink.link("world")?.unwrap().index;
        netlink.add_address(index, "192.0.2.9/24".parse().unwrap())?;
        netlink.add_address(index, "2001:db8::9/64".parse().unwrap())?;
        netlink.set_link(index, &up)
    })
    .unwrap();
    world
}

fn port(host_ip: Option<&str>, host: u16, container: u16) -> PortMap {
    PortMap {
        container_port: container,
        protocol: Protocol::Tcp,
        host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        host_ports: (host != 0).then_some((host, host)),
    }
}

/// A DNS question asked from `netns`; the answer's code and data.
fn look_up(netns: &OwnedFd, server: IpAddr, name: &str) -> io::Result<(u8, Vec<String>)> {
    use hickory_proto::op::{Message, Query};
    use hickory_proto::rr::{Name, RecordType};
    let mut query = Message::query();
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    let bytes = query.to_vec().unwrap();
    let answer = within(netns.as_fd(), || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(Duration::from_secs(3)))?;
        socket.send_to(&bytes, (server, 53))?;
        let mut buffer = [0; 512];
        let (length, _) = socket.recv_from(&mut buffer)?;
        Ok(buffer[..length].to_vec())
    })?;
    let answer = Message::from_vec(&answer).unwrap();
    let data = answer.answers.iter().map(|r| r.data.to_string()).collect();
    Ok((answer.metadata.response_code.low(), data))
}
