//! Machines on the networks: DHCP, DHCPv6, router advertisements.

use super::*;

#[test]
fn a_machine_gets_its_address_by_dhcp_and_its_name_is_known() {
    on_a_host_of_its_own(|directory| {
        if !std::path::Path::new("/dev/net/tun").exists() {
            eprintln!("SKIPPED: no /dev/net/tun");
            return;
        }
        let manager = open(directory);
        let options = TapOptions {
            vnet_header: false,
            queues: 1,
        };
        let tap = manager.tap(spec("bridge", "machine"), options).unwrap();
        let mac = tap.endpoint.mac.unwrap();
        let message = dhcp::client_message(1, mac, &[]);
        let mut frame = vec![0xff; 6];
        frame.extend(mac.0);
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((message.len() as u16 + 28).to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
        let sum: u32 = frame[14..34]
            .chunks(2)
            .map(|c| u32::from(c[0]) << 8 | u32::from(c[1]))
            .sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        frame.extend([0, 68, 0, 67]);
        frame.extend((message.len() as u16 + 8).to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(message);
        let began = Instant::now();
        let mut asked = None::<Instant>;
        let offer = loop {
            assert!(began.elapsed() < Duration::from_secs(20), "no offer");
            // As clients do: again, until there is an answer.
            if asked.is_none_or(|at| at.elapsed() > Duration::from_millis(500)) {
                asked = Some(Instant::now());
                let _ = rustix::io::write(&tap.queues[0], &frame);
            }
            let mut buffer = [0; 2048];
            match rustix::io::read(&tap.queues[0], &mut buffer) {
                Ok(n) if n > 282 && buffer[23] == 17 && buffer[34..36] == [0, 67] => break buffer,
                Ok(_) => {}
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        };
        assert_eq!(
            offer[42 + 16..42 + 20],
            tap.endpoint.ipv4().unwrap().octets()
        );
        // Restored after a restart of the daemon, and gone with the machine.
        let endpoint = tap.endpoint.clone();
        drop(manager);
        let manager = open(directory);
        manager.restore(std::slice::from_ref(&endpoint)).unwrap();
        let sandbox = manager.sandbox().unwrap();
        manager.connect(&sandbox, spec("bridge", "c")).unwrap();
        let gateway = endpoint.gateway_v4.unwrap().into();
        let known = look_up(&sandbox.netns, gateway, "machine.").unwrap();
        assert_eq!(known, (0, vec![endpoint.ipv4().unwrap().to_string()]));
        manager.release("machine");
        drop(tap);
        manager.settle();
        assert!(!links().contains(&endpoint.host_interface));
    });
}

#[test]
fn a_machine_gets_its_ipv6_address_and_router_and_a_container_beside_it_does_not() {
    on_a_host_of_its_own(|directory| {
        if !std::path::Path::new("/dev/net/tun").exists() {
            eprintln!("SKIPPED: no /dev/net/tun");
            return;
        }
        let manager = open(directory);
        let mut network = NetworkSpec::bridge("six");
        network.ipv6 = true;
        let network = manager.create_network(network).unwrap();
        let tap = manager.tap(
            spec("six", "machine"),
            TapOptions {
                vnet_header: false,
                queues: 1,
            },
        );
        let tap = tap.unwrap();
        // The guest is the kernel itself: a namespace with the machine's MAC address on the same bridge.
        let guest = thread::spawn(|| {
            // SAFETY: as above.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            current().unwrap()
        })
        .join()
        .unwrap();
        let mut netlink = Netlink::open().unwrap();
        netlink.add_veth("guest0", "eth0", guest.as_fd()).unwrap();
        let bridge = netlink.link(&network.bridge).unwrap().unwrap().index;
        let index = netlink.link("guest0").unwrap().unwrap().index;
        let up = LinkChange {
            up: Some(true),
            master: Some(bridge),
            ..LinkChange::default()
        };
        netlink.set_link(index, &up).unwrap();
        let mac = tap.endpoint.mac;
        within(guest.as_fd(), || {
            for (key, value) in [
                ("accept_ra", "1"),
                ("accept_dad", "0"),
                ("router_solicitation_delay", "0"),
            ] {
                crate::sysctl::write(&format!("ipv6/conf/eth0/{key}"), value)?;
            }
            let mut netlink = Netlink::open()?;
            let index = netlink.link("eth0")?.unwrap().index;
            netlink.set_link(
                index,
                &LinkChange {
                    mac,
                    up: Some(true),
                    ..LinkChange::default()
                },
            )
        })
        .unwrap();
        let began = Instant::now();
        let routes = |netns: &OwnedFd| {
            within(netns.as_fd(), || {
                Ok(Netlink::open()?
                    .routes()?
                    .into_iter()
                    .filter(|r| {
                        !r.destination.is_v4() && r.destination.prefix() == 0 && r.has_gateway
                    })
                    .count())
            })
            .unwrap()
        };
        while routes(&guest) == 0 {
            assert!(
                began.elapsed() < Duration::from_secs(30),
                "no router was advertised"
            );
            thread::sleep(Duration::from_millis(100));
        }
        // Its address by DHCPv6, as a client on the link asks.
        let address = within(guest.as_fd(), || {
            let index = Netlink::open()?.link("eth0")?.unwrap().index;
            let socket = UdpSocket::bind("[::]:546")?;
            socket.set_read_timeout(Some(Duration::from_millis(500)))?;
            let servers: std::net::Ipv6Addr = "ff02::1:2".parse().unwrap();
            let to = std::net::SocketAddrV6::new(servers, 547, 0, index);
            let mut buffer = [0; 1024];
            for _ in 0..40 {
                // Solicit with rapid commit.
                let _ = socket.send_to(&dhcp6::tests::client_message(1, &[0, 14, 0, 0]), to);
                if let Ok((length, _)) = socket.recv_from(&mut buffer) {
                    return Ok(buffer[..length].to_vec());
                }
            }
            Err(io::ErrorKind::TimedOut.into())
        })
        .unwrap();
        let wanted = tap.endpoint.ipv6().unwrap().octets();
        assert_eq!(address[0], 7);
        assert!(address.windows(16).any(|w| w == wanted));
        drop(tap);
    });
}
