//! What lasts and what goes: daemons, rules, refusals, the pool.

use super::*;

#[test]
fn the_hosts_rules_and_settings_are_as_before_when_we_are_gone() {
    on_a_host_of_its_own(|directory| {
        let script = "table ip mine { chain c { type filter hook input priority 0; policy accept; tcp dport 22 accept; }; }";
        firewall::run_nft(&["-f", "-"], script).unwrap();
        let before = (ruleset(), links(), sysctl::read("ipv4/ip_forward").unwrap());
        let manager = open(directory);
        let sandbox = manager.sandbox().unwrap();
        let a = manager.connect(&sandbox, spec("bridge", "a")).unwrap();
        manager.publish(&a, &[port(None, 8080, 80)]).unwrap();
        manager
            .create_network(NetworkSpec {
                ipv6: true,
                ..NetworkSpec::bridge("n")
            })
            .unwrap();
        assert_eq!(sysctl::read("ipv4/ip_forward").unwrap(), "1");
        assert!(ruleset().starts_with(&before.0));
        manager.cleanup().unwrap();
        assert_eq!(
            (ruleset(), links(), sysctl::read("ipv4/ip_forward").unwrap()),
            before
        );
    });
}

#[test]
fn a_hundred_at_once_leave_nothing() {
    on_a_host_of_its_own(|directory| {
        let manager = open(directory);
        manager.restore(&[]).unwrap();
        manager.wait_ready();
        let bare = links();
        let began = Instant::now();
        thread::scope(|scope| {
            for n in 0..100 {
                let manager = &manager;
                scope.spawn(move || {
                    let sandbox = manager.sandbox().unwrap();
                    let name = format!("c{n}");
                    manager.connect(&sandbox, spec("bridge", &name)).unwrap();
                    manager.release(&name);
                });
            }
        });
        eprintln!("100 sandboxes at once: {:?}", began.elapsed());
        manager.settle();
        assert!(
            manager
                .endpoints(&manager.inspect("bridge").unwrap().id)
                .is_empty()
        );
        let count = |names: &[String]| names.iter().filter(|n| n.starts_with("bv")).count();
        // Only the pool's own remain; the pool may just be refilling.
        manager.wait_ready();
        assert!(count(&links()) <= count(&bare) + 1, "{:?}", links());
        manager.cleanup().unwrap();
        assert_eq!(links(), ["lo"]);
    });
}

#[test]
fn a_new_daemon_takes_over_what_lives_and_sweeps_the_rest() {
    on_a_host_of_its_own(|directory| {
        let world = outside();
        let first = open(directory);
        let network = first.create_network(NetworkSpec::bridge("n")).unwrap();
        let (one, two) = (first.sandbox().unwrap(), first.sandbox().unwrap());
        let a = first.connect(&one, spec("n", "a")).unwrap();
        let b = first.connect(&two, spec("n", "b")).unwrap();
        first.publish(&a, &[port(None, 8080, 80)]).unwrap();
        first.publish(&b, &[port(None, 8081, 80)]).unwrap();
        let a = first.endpoints_of("a").remove(0);
        serve(&one.netns, "0.0.0.0:80");
        drop(first);
        // The record survives its text form, as the engine keeps it.
        let a: Endpoint = serde_json::from_str(&serde_json::to_string(&a).unwrap()).unwrap();
        let second = open(directory);
        second.restore(std::slice::from_ref(&a)).unwrap();
        second.settle();
        assert_eq!(second.inspect("n").unwrap(), network);
        assert!(ask(&world, "192.0.2.1:8080".parse().unwrap()).is_ok());
        assert!(!ruleset().contains("8081"));
        assert!(!links().contains(&b.host_interface) && links().contains(&a.host_interface));
        // Its address is not handed out again.
        let three = second.sandbox().unwrap();
        let c = second.connect(&three, spec("n", "c")).unwrap();
        assert_ne!(c.v4, a.v4);
        assert!(matches!(
            second.remove_network("n"),
            Err(Error::NetworkInUse { .. })
        ));
        second.release("a");
        second.release("c");
        second.remove_network("n").unwrap();
        second.cleanup().unwrap();
        assert!(!links().iter().any(|l| l.starts_with("br-")));
    });
}

#[test]
fn bad_networks_are_refused_with_the_reason() {
    on_a_host_of_its_own(|directory| {
        let _world = outside();
        let manager = open(directory);
        let with = |subnet: &str| {
            let mut spec = NetworkSpec::bridge("n");
            let subnet = Some(subnet.parse().unwrap());
            spec.ipam.config = vec![IpamConfig {
                subnet,
                ..IpamConfig::default()
            }];
            manager.create_network(spec)
        };
        assert!(matches!(with("192.0.2.0/25"), Err(Error::Overlap { .. })));
        assert!(matches!(with("0.0.0.0/0"), Err(Error::Invalid(_))));
        assert!(matches!(with("10.1.2.3/31"), Err(Error::Invalid(_))));
        let made = with("10.1.2.3/24").unwrap();
        assert_eq!(made.gateway_v4(), Some(Ipv4Addr::new(10, 1, 2, 1)));
        assert!(matches!(with("10.5.0.0/24"), Err(Error::NetworkExists(_))));
        assert!(
            manager
                .create_network(NetworkSpec::bridge("a; drop"))
                .is_err()
        );
        assert!(matches!(
            manager.remove_network("bridge"),
            Err(Error::Predefined(_))
        ));
        assert!(matches!(
            manager.inspect("nothing"),
            Err(Error::NoSuchNetwork(_))
        ));
        let sandbox = manager.sandbox().unwrap();
        let fixed = |v4: &str| EndpointSpec {
            v4: Some(v4.parse().unwrap()),
            ..spec("n", "a")
        };
        assert!(manager.connect(&sandbox, fixed("10.9.9.9")).is_err());
        assert!(matches!(
            manager.connect(&sandbox, fixed("10.1.2.1")),
            Err(Error::AddressInUse(_))
        ));
        let a = manager.connect(&sandbox, fixed("10.1.2.77")).unwrap();
        assert_eq!(a.ipv4().map(IpAddr::V4), Some("10.1.2.77".parse().unwrap()));
        assert_eq!(manager.prune(|_| false).len(), 0);
        manager.release("a");
        assert_eq!(manager.prune(|_| false).len(), 1);
    });
}

#[test]
fn a_container_from_the_pool_is_reachable_as_soon_as_it_is_connected() {
    on_a_host_of_its_own(|directory| {
        let manager = open(directory);
        manager
            .connect(&manager.sandbox().unwrap(), spec("bridge", "warm"))
            .unwrap();
        let (mut best, mut usable) = (Duration::MAX, Duration::MAX);
        let warm = manager.sandbox().unwrap();
        let server = manager.connect(&warm, spec("bridge", "server")).unwrap();
        serve(&warm.netns, "0.0.0.0:80");
        for n in 0..8 {
            manager.wait_ready();
            let began = Instant::now();
            let sandbox = manager.sandbox().unwrap();
            let endpoint = manager
                .connect(&sandbox, spec("bridge", &format!("c{n}")))
                .unwrap();
            best = best.min(began.elapsed());
            let seen = ask(&sandbox.netns, to(&server, 80)).unwrap();
            usable = usable.min(began.elapsed());
            assert_eq!(seen, endpoint.ipv4().unwrap().to_string());
        }
        eprintln!("sandbox and connect: {best:?}, first answer: {usable:?}");
    });
}

#[test]
fn a_flushed_ruleset_gets_our_table_back() {
    on_a_host_of_its_own(|directory| {
        let manager = std::sync::Arc::new(open(directory));
        manager.guard_rules().unwrap();
        let sandbox = manager.sandbox().unwrap();
        let a = manager.connect(&sandbox, spec("bridge", "a")).unwrap();
        manager.publish(&a, &[port(None, 8080, 80)]).unwrap();
        let before = ruleset();
        firewall::run_nft(&["flush", "ruleset"], "").unwrap();
        let began = Instant::now();
        while ruleset() != before {
            assert!(
                began.elapsed() < Duration::from_secs(10),
                "the table is not put back"
            );
            thread::sleep(Duration::from_millis(20));
        }
        // Our own removal is not undone.
        manager.cleanup().unwrap();
        thread::sleep(Duration::from_millis(200));
        assert_eq!(ruleset(), "");
    });
}
