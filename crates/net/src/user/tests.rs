//! A guest made of a namespace with a tap, whose other side is the user-mode network.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use rustix::thread::UnshareFlags;

use super::*;
use crate::namespace::{current, within};
use crate::netlink::{LinkChange, Netlink};
use crate::tap::{self, TapOptions};
use crate::tests::on_a_host_of_its_own;

#[test]
fn a_guest_reaches_the_world_and_is_reached_but_not_the_hosts_loopback() {
    on_a_host_of_its_own(|_| {
        if !std::path::Path::new("/dev/net/tun").exists() {
            eprintln!("SKIPPED: no /dev/net/tun");
            return;
        }
        let up = LinkChange {
            up: Some(true),
            ..LinkChange::default()
        };
        // The "world" is another address of this host.
        Netlink::open()
            .unwrap()
            .add_address(1, "192.0.2.1/24".parse().unwrap())
            .unwrap();
        let mac = Mac([2, 0, 0, 0, 0, 9]);
        let (guest, link) = thread::spawn(move || {
            // SAFETY: only this thread's network namespace changes; it holds no sockets yet.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            let queues = tap::make(
                "eth0",
                TapOptions {
                    vnet_header: false,
                    queues: 1,
                },
            )
            .unwrap();
            let mut netlink = Netlink::open().unwrap();
            let index = netlink.link("eth0").unwrap().unwrap().index;
            netlink
                .set_link(
                    index,
                    &LinkChange {
                        mac: Some(mac),
                        ..LinkChange::default()
                    },
                )
                .unwrap();
            netlink
                .add_address(index, "10.0.2.15/24".parse().unwrap())
                .unwrap();
            netlink.set_link(index, &up).unwrap();
            netlink.set_link(1, &up).unwrap();
            netlink
                .replace_default_route("10.0.2.2".parse().unwrap(), index)
                .unwrap();
            (current().unwrap(), queues)
        })
        .join()
        .unwrap();
        let config = UserConfig {
            forwards: vec![("127.0.0.1:0".parse().unwrap(), 80)],
            udp_forwards: vec![("127.0.0.1:0".parse().unwrap(), 99)],
            ..UserConfig::new(mac)
        };
        let network = UserNet::spawn(link.into_iter().next().unwrap(), config).unwrap();
        let server = TcpListener::bind("0.0.0.0:7").unwrap();
        // Echoes until the guest's end, then ends.
        let echo = thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            stream.write_all(&all).unwrap();
        });
        let data: Vec<u8> = (0..700_000u32).map(|n| (n * 7 / 3) as u8).collect();
        let back = within(guest.as_fd(), || {
            let mut stream = TcpStream::connect("192.0.2.1:7")?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            let mut writer = stream.try_clone()?;
            let sent = data.clone();
            let sending = thread::spawn(move || {
                writer.write_all(&sent)?;
                writer.shutdown(std::net::Shutdown::Write)
            });
            let mut back = Vec::new();
            stream.read_to_end(&mut back)?;
            sending.join().unwrap()?;
            Ok(back)
        })
        .unwrap();
        echo.join().unwrap();
        assert!(
            back == data,
            "{} of {} bytes came back",
            back.len(),
            data.len()
        );
        // Nobody listens: refused at once. The host's loopback: not there.
        let _secret = TcpListener::bind("127.0.0.1:22").unwrap();
        for address in ["192.0.2.1:9", "10.0.2.2:22"] {
            let result = within(guest.as_fd(), || TcpStream::connect(address));
            assert_eq!(
                result.unwrap_err().kind(),
                io::ErrorKind::ConnectionRefused,
                "{address}"
            );
        }
        let server = UdpSocket::bind("0.0.0.0:7").unwrap();
        let echo = thread::spawn(move || {
            let mut buffer = [0; 100];
            let (length, from) = server.recv_from(&mut buffer).unwrap();
            server.send_to(&buffer[..length], from).unwrap();
        });
        let answer = within(guest.as_fd(), || {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.set_read_timeout(Some(Duration::from_secs(5)))?;
            socket.send_to(b"hello", "192.0.2.1:7")?;
            let mut buffer = [0; 100];
            let (length, from) = socket.recv_from(&mut buffer)?;
            Ok((buffer[..length].to_vec(), from.ip()))
        });
        assert_eq!(
            answer.unwrap(),
            (b"hello".to_vec(), "192.0.2.1".parse::<IpAddr>().unwrap())
        );
        echo.join().unwrap();
        // And in, by the forwarded port.
        let inside = within(guest.as_fd(), || TcpListener::bind("0.0.0.0:80")).unwrap();
        let serving = thread::spawn(move || {
            let (mut stream, peer) = inside.accept().unwrap();
            write!(stream, "{}", peer.ip()).unwrap();
        });
        let mut stream = TcpStream::connect(network.forwards[0]).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "10.0.2.2");
        serving.join().unwrap();
        let inside = within(guest.as_fd(), || UdpSocket::bind("0.0.0.0:99")).unwrap();
        let serving = thread::spawn(move || {
            let mut buffer = [0; 100];
            let (length, peer) = inside.recv_from(&mut buffer).unwrap();
            inside.send_to(&buffer[..length], peer).unwrap();
        });
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        socket.send_to(b"knock", network.udp_forwards[0]).unwrap();
        let mut buffer = [0; 100];
        let length = socket.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"knock");
        serving.join().unwrap();
        // A ping of the world leaves by a ping socket of this user.
        let allowed = std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
        if allowed.is_ok() {
            let answered = within(guest.as_fd(), || {
                use rustix::net::{
                    AddressFamily, RecvFlags, SendFlags, SocketType, connect, ipproto, recv, send,
                    socket,
                };
                let ping = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP))?;
                let target: std::net::SocketAddr = "192.0.2.1:0".parse().unwrap();
                connect(&ping, &target)?;
                let patience = Some(Duration::from_secs(20));
                rustix::net::sockopt::set_socket_timeout(
                    &ping,
                    rustix::net::sockopt::Timeout::Recv,
                    patience,
                )?;
                // Type 8, identifier 0x1234, sequence 1, checksum of all of it.
                let mut request = vec![8, 0, 0, 0, 0x12, 0x34, 0, 1];
                request.extend(b"ping");
                let sum: u32 = request
                    .chunks(2)
                    .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
                    .sum();
                let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
                request[2..4].copy_from_slice(&sum.to_be_bytes());
                send(&ping, &request, SendFlags::empty())?;
                let mut buffer = [0; 100];
                let (length, _) = recv(&ping, &mut buffer[..], RecvFlags::empty())?;
                // A raw socket shows the IPv4 header too.
                Ok(buffer[20..length].to_vec())
            });
            let answer = answered.unwrap();
            assert_eq!(answer[0], 0, "an echo reply");
            assert_eq!(&answer[4..], b"\x12\x34\0\x01ping");
        }
    });
}
