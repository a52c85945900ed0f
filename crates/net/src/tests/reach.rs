//! Who reaches whom: containers of one network, of two, the world outside.

use super::*;

#[test]
fn two_containers_of_a_network_reach_each_other_and_the_outside() {
    on_a_host_of_its_own(|directory| {
        let world = outside();
        let manager = open(directory);
        manager.restore(&[]).unwrap();
        let (one, two) = (manager.sandbox().unwrap(), manager.sandbox().unwrap());
        let a = manager.connect(&one, spec("bridge", "a")).unwrap();
        let b = manager.connect(&two, spec("bridge", "b")).unwrap();
        assert_ne!(a.v4, b.v4);
        serve(&one.netns, "0.0.0.0:80");
        assert_eq!(
            ask(&two.netns, to(&a, 80)).unwrap(),
            b.ipv4().unwrap().to_string()
        );
        serve(&world, "0.0.0.0:7");
        // Masqueraded: the world sees the host.
        assert_eq!(
            ask(&two.netns, "192.0.2.9:7".parse().unwrap()).unwrap(),
            "192.0.2.1"
        );
    });
}

#[test]
fn networks_are_kept_apart_and_internal_ones_from_the_world() {
    on_a_host_of_its_own(|directory| {
        let world = outside();
        serve(&world, "0.0.0.0:7");
        let manager = open(directory);
        manager.create_network(NetworkSpec::bridge("left")).unwrap();
        manager
            .create_network(NetworkSpec::bridge("right"))
            .unwrap();
        let inner = NetworkSpec {
            internal: true,
            ..NetworkSpec::bridge("inner")
        };
        manager.create_network(inner).unwrap();
        let boxes: Vec<_> = (0..4).map(|_| manager.sandbox().unwrap()).collect();
        let a = manager.connect(&boxes[0], spec("left", "a")).unwrap();
        manager.connect(&boxes[1], spec("right", "b")).unwrap();
        let c = manager.connect(&boxes[2], spec("inner", "c")).unwrap();
        manager.connect(&boxes[3], spec("inner", "d")).unwrap();
        serve(&boxes[0].netns, "0.0.0.0:80");
        serve(&boxes[2].netns, "0.0.0.0:80");
        let world_at = "192.0.2.9:7".parse().unwrap();
        assert!(ask(&boxes[1].netns, to(&a, 80)).is_err());
        assert!(ask(&boxes[1].netns, world_at).is_ok());
        assert!(ask(&boxes[3].netns, to(&c, 80)).is_ok());
        assert!(ask(&boxes[3].netns, world_at).is_err());
        assert!(ask(&boxes[1].netns, to(&c, 80)).is_err());
        // Nor does a neighbour of the host get in by routing to the container's address.
        within(world.as_fd(), || {
            let mut netlink = Netlink::open()?;
            let index = netlink.link("world")?.unwrap().index;
            netlink.replace_default_route("192.0.2.1".parse().unwrap(), index)
        })
        .unwrap();
        assert!(ask(&world, to(&a, 80)).is_err());
    });
}

#[test]
fn ipv6_works_inside_outside_and_published() {
    on_a_host_of_its_own(|directory| {
        let world = outside();
        let manager = open(directory);
        let network = NetworkSpec {
            ipv6: true,
            ..NetworkSpec::bridge("six")
        };
        let network = manager.create_network(network).unwrap();
        assert!(network.gateway_v6().is_some());
        let (one, two) = (manager.sandbox().unwrap(), manager.sandbox().unwrap());
        let a = manager.connect(&one, spec("six", "a")).unwrap();
        let b = manager.connect(&two, spec("six", "b")).unwrap();
        serve(&one.netns, "[::]:80");
        serve(&world, "[::]:7");
        let at = SocketAddr::new(a.ipv6().unwrap().into(), 80);
        assert_eq!(ask(&two.netns, at).unwrap(), b.ipv6().unwrap().to_string());
        assert_eq!(
            ask(&two.netns, "[2001:db8::9]:7".parse().unwrap()).unwrap(),
            "2001:db8::1"
        );
        manager.publish(&a, &[port(None, 8080, 80)]).unwrap();
        assert_eq!(
            ask(&world, "[2001:db8::1]:8080".parse().unwrap()).unwrap(),
            "2001:db8::9"
        );
        assert!(ask(&current().unwrap(), "[::1]:8080".parse().unwrap()).is_ok());
    });
}

#[test]
fn the_default_route_follows_the_priority_of_networks() {
    on_a_host_of_its_own(|directory| {
        let manager = open(directory);
        for name in ["x", "y"] {
            manager.create_network(NetworkSpec::bridge(name)).unwrap();
        }
        let sandbox = manager.sandbox().unwrap();
        let gateway_index = || {
            within(sandbox.netns.as_fd(), || {
                let routes = Netlink::open()?.routes()?;
                let default = routes.iter().find(|r| r.destination.prefix() == 0);
                let index = default.and_then(|r| r.interface);
                let links = Netlink::open()?.links()?;
                Ok(links
                    .into_iter()
                    .find(|l| Some(l.index) == index)
                    .map(|l| l.name))
            })
            .unwrap()
        };
        manager.connect(&sandbox, spec("y", "a")).unwrap();
        assert_eq!(gateway_index().as_deref(), Some("eth0"));
        let high = EndpointSpec {
            gateway_priority: 5,
            ..spec("x", "a")
        };
        let second = manager.connect(&sandbox, high).unwrap();
        assert_eq!(
            (second.interface.as_str(), gateway_index().as_deref()),
            ("eth1", Some("eth1"))
        );
        assert!(matches!(
            manager.connect(&sandbox, spec("x", "a")),
            Err(Error::AlreadyConnected { .. })
        ));
        manager.disconnect(Some(&sandbox), "a", "x").unwrap();
        assert_eq!(gateway_index().as_deref(), Some("eth0"));
    });
}

#[test]
fn containers_of_a_network_without_icc_do_not_reach_each_other() {
    on_a_host_of_its_own(|directory| {
        let world = outside();
        serve(&world, "0.0.0.0:7");
        let manager = open(directory);
        let mut network = NetworkSpec::bridge("n");
        network.options.insert(OPTION_ICC.into(), "false".into());
        manager.create_network(network).unwrap();
        let (one, two) = (manager.sandbox().unwrap(), manager.sandbox().unwrap());
        let a = manager.connect(&one, spec("n", "a")).unwrap();
        manager.connect(&two, spec("n", "b")).unwrap();
        serve(&one.netns, "0.0.0.0:80");
        assert!(ask(&two.netns, to(&a, 80)).is_err());
        assert!(ask(&two.netns, "192.0.2.9:7".parse().unwrap()).is_ok());
    });
}

#[test]
fn our_networks_work_beside_dockers_forward_drop() {
    on_a_host_of_its_own(|directory| {
        let iptables = |line: &str| {
            let done = std::process::Command::new("iptables")
                .args(line.split(' '))
                .output();
            done.is_ok_and(|o| o.status.success())
        };
        if !iptables("-N DOCKER-USER") {
            eprintln!("SKIPPED: the iptables program is missing");
            return;
        }
        for line in [
            "-A DOCKER-USER -j RETURN",
            "-I FORWARD -j DOCKER-USER",
            "-P FORWARD DROP",
        ] {
            assert!(iptables(line));
        }
        let world = outside();
        serve(&world, "0.0.0.0:7");
        let before = ruleset();
        let manager = open(directory);
        let sandbox = manager.sandbox().unwrap();
        let a = manager.connect(&sandbox, spec("bridge", "a")).unwrap();
        assert!(ask(&sandbox.netns, "192.0.2.9:7".parse().unwrap()).is_ok());
        serve(&sandbox.netns, "0.0.0.0:80");
        manager.publish(&a, &[port(None, 8080, 80)]).unwrap();
        assert!(ask(&world, "192.0.2.1:8080".parse().unwrap()).is_ok());
        assert_eq!(manager.findings(), []);
        manager.cleanup().unwrap();
        let strip = |text: String| text.replace(|c: char| c.is_ascii_digit(), "");
        assert_eq!(strip(ruleset()), strip(before));
    });
}

#[test]
fn the_network_none_has_only_loopback() {
    on_a_host_of_its_own(|directory| {
        let manager = open(directory);
        let inside = |sandbox: &Sandbox| {
            let listed = within(sandbox.netns.as_fd(), || Netlink::open()?.links()).unwrap();
            listed.into_iter().map(|l| l.name).collect::<Vec<_>>()
        };
        let bare = manager.bare_sandbox().unwrap();
        assert_eq!(inside(&bare), ["lo"]);
        let sandbox = manager.sandbox().unwrap();
        let endpoint = manager.connect(&sandbox, spec("none", "a")).unwrap();
        assert_eq!(
            (inside(&sandbox), endpoint.interface.as_str()),
            (vec!["lo".to_owned()], "")
        );
        assert!(manager.publish(&endpoint, &[port(None, 80, 80)]).is_err());
        manager.release("a");
    });
}
