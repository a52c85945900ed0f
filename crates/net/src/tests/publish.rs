//! Published ports.

use super::*;

#[test]
fn a_published_port_is_reached_from_everywhere_it_should_be() {
    on_a_host_of_its_own(|directory| {
        let world = outside();
        let host = current().unwrap();
        let manager = open(directory);
        let (one, two) = (manager.sandbox().unwrap(), manager.sandbox().unwrap());
        let a = manager.connect(&one, spec("bridge", "a")).unwrap();
        let b = manager.connect(&two, spec("bridge", "b")).unwrap();
        manager
            .create_network(NetworkSpec::bridge("other"))
            .unwrap();
        let three = manager.sandbox().unwrap();
        manager.connect(&three, spec("other", "c")).unwrap();
        serve(&one.netns, "0.0.0.0:80");
        let ports = [
            port(None, 8080, 80),
            port(Some("127.0.0.1"), 8081, 80),
            port(None, 0, 80),
        ];
        let published = manager.publish(&a, &ports).unwrap();
        assert_eq!(published.iter().filter(|p| p.host_port == 8080).count(), 2);
        let at = |text: &str| text.parse().unwrap();
        // From outside, with its own address to be seen; in IPv6 by the proxy.
        assert_eq!(ask(&world, at("192.0.2.1:8080")).unwrap(), "192.0.2.9");
        assert!(ask(&world, at("[2001:db8::1]:8080")).is_ok());
        // From the host, by all its addresses.
        for address in [
            "127.0.0.1:8080",
            "192.0.2.1:8080",
            "[::1]:8080",
            "127.0.0.1:8081",
        ] {
            assert!(ask(&host, at(address)).is_ok(), "{address}");
        }
        // From a neighbour, from another network, and from itself.
        for (who, netns) in [
            ("neighbour", &two.netns),
            ("other network", &three.netns),
            ("itself", &one.netns),
        ] {
            assert!(ask(netns, at("192.0.2.1:8080")).is_ok(), "{who}");
        }
        assert!(ask(&world, at("192.0.2.1:8081")).is_err());
        let random = published.last().unwrap().host_port;
        assert!(
            ask(
                &world,
                SocketAddr::new("192.0.2.1".parse().unwrap(), random)
            )
            .is_ok()
        );
        // Clashes name the port and who has it.
        let clash = manager
            .publish(&b, &[port(None, 8080, 81)])
            .unwrap_err()
            .to_string();
        assert_eq!(
            clash,
            "port 0.0.0.0:8080/tcp is already in use by container a"
        );
        let taken = TcpListener::bind("127.0.0.1:9000").unwrap();
        let clash = manager
            .publish(&b, &[port(Some("127.0.0.1"), 9000, 81)])
            .unwrap_err();
        assert!(
            matches!(clash, Error::PortInUse { port: 9000, .. }),
            "{clash}"
        );
        drop(taken);
        let foreign = manager
            .publish(&b, &[port(Some("203.0.113.5"), 9000, 81)])
            .unwrap_err();
        assert!(matches!(foreign, Error::NotOurAddress { .. }), "{foreign}");
        let range = PortMap {
            host_ports: Some((8080, 8083)),
            ..port(None, 0, 80)
        };
        assert_eq!(manager.publish(&b, &[range]).unwrap()[0].host_port, 8082);
        // A drop in the host's own forward chain holds.
        let script = "table inet mine { chain f { type filter hook forward priority 10; tcp dport 80 drop; }; }";
        firewall::run_nft(&["-f", "-"], script).unwrap();
        assert!(ask(&world, at("192.0.2.1:8080")).is_err());
        firewall::run_nft(&["delete", "table", "inet", "mine"], "").unwrap();
        manager.release("a");
        assert!(ask(&world, at("192.0.2.1:8080")).is_err());
        assert!(!ruleset().contains("8080"));
    });
}

#[test]
fn a_udp_flow_follows_its_published_port_from_container_to_container() {
    on_a_host_of_its_own(|directory| {
        let world = outside();
        let manager = open(directory);
        let (one, two) = (manager.sandbox().unwrap(), manager.sandbox().unwrap());
        let a = manager.connect(&one, spec("bridge", "a")).unwrap();
        let b = manager.connect(&two, spec("bridge", "b")).unwrap();
        for (netns, name) in [(&one.netns, "a"), (&two.netns, "b")] {
            let server = within(netns.as_fd(), || UdpSocket::bind("0.0.0.0:53")).unwrap();
            thread::spawn(move || {
                let mut buffer = [0; 16];
                while let Ok((_, peer)) = server.recv_from(&mut buffer) {
                    let _ = server.send_to(name.as_bytes(), peer);
                }
            });
        }
        // One socket and one target: one flow to the kernel, kept alive by every try.
        let client = within(world.as_fd(), || UdpSocket::bind("192.0.2.9:4000")).unwrap();
        client
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let mut buffer = [0; 16];
        let mut ask = |tries: u32| {
            (0..tries).find_map(|_| {
                client.send_to(b"?", "192.0.2.1:5353").unwrap();
                let (length, _) = client.recv_from(&mut buffer).ok()?;
                Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
            })
        };
        assert_eq!(ask(2), None);
        let wish = PortMap {
            protocol: Protocol::Udp,
            ..port(None, 5353, 53)
        };
        manager.publish(&a, std::slice::from_ref(&wish)).unwrap();
        assert_eq!(ask(20).as_deref(), Some("a"));
        manager.unpublish(&a.id);
        assert_eq!(ask(2), None);
        manager.publish(&b, &[wish]).unwrap();
        assert_eq!(ask(20).as_deref(), Some("b"));
    });
}
