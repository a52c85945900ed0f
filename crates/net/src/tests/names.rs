//! Names and their resolution.

use super::*;

/// A resolver at 192.0.2.9 in `world`: one address in UDP, many (of which UDP gets none, and "truncated") in TCP.
/// Before each of its answers in UDP it sends one to another question and one with another number.
fn resolver(world: &OwnedFd) {
    use hickory_proto::op::Message;
    use hickory_proto::rr::{RData, Record, rdata::A};
    let answer = |query: &[u8], tcp: bool| {
        let query = Message::from_vec(query).unwrap();
        let name = query.queries[0].name().clone();
        let many = name.to_ascii().starts_with("many.");
        let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
        answer.add_queries(query.queries.iter().cloned());
        answer.metadata.truncation = many && !tcp;
        let count = if many { 100 } else { 1 };
        for n in (1..=count).take_while(|_| tcp || !many) {
            let data = RData::A(A(Ipv4Addr::new(203, 0, 113, n)));
            answer.add_answer(Record::from_rdata(name.clone(), 60, data));
        }
        answer.to_vec().unwrap()
    };
    let (udp, tcp) = within(world.as_fd(), || {
        Ok((
            UdpSocket::bind("192.0.2.9:53")?,
            TcpListener::bind("192.0.2.9:53")?,
        ))
    })
    .unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((length, peer)) = udp.recv_from(&mut buffer) {
            let right = answer(&buffer[..length], false);
            let mut other_number = right.clone();
            other_number[0] ^= 0xff;
            let mut other_question = right.clone();
            other_question[13] ^= 1;
            for bytes in [other_number, other_question, right] {
                let _ = udp.send_to(&bytes, peer);
            }
        }
    });
    thread::spawn(move || {
        while let Ok((mut stream, _)) = tcp.accept() {
            let mut length = [0; 2];
            while stream.read_exact(&mut length).is_ok() {
                let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
                stream.read_exact(&mut query).unwrap();
                let answer = answer(&query, true);
                stream
                    .write_all(&(answer.len() as u16).to_be_bytes())
                    .unwrap();
                stream.write_all(&answer).unwrap();
            }
        }
    });
}

#[test]
fn containers_find_each_other_by_name_even_where_port_53_is_taken() {
    for taken in [false, true] {
        on_a_host_of_its_own(move |directory| {
            let _holder = taken.then(|| std::net::UdpSocket::bind("0.0.0.0:53").unwrap());
            let manager = open(directory);
            let inner = NetworkSpec {
                internal: true,
                ..NetworkSpec::bridge("n")
            };
            let network = manager.create_network(inner).unwrap();
            let gateway = IpAddr::V4(network.gateway_v4().unwrap());
            let (one, two) = (manager.sandbox().unwrap(), manager.sandbox().unwrap());
            let a = manager
                .connect(
                    &one,
                    EndpointSpec {
                        aliases: vec!["www".into()],
                        ..spec("n", "a")
                    },
                )
                .unwrap();
            let b = manager.connect(&two, spec("n", "b")).unwrap();
            assert_eq!(manager.name_servers(std::slice::from_ref(&b)), [gateway]);
            let own = a.ipv4().unwrap().to_string();
            for name in ["a.", "www.", "a.n."] {
                assert_eq!(
                    look_up(&two.netns, gateway, name).unwrap(),
                    (0, vec![own.clone()])
                );
            }
            assert_eq!(
                look_up(&two.netns, gateway, "nobody.example.").unwrap().0,
                3
            );
            manager.rename("a", &["z".into()]);
            assert_eq!(look_up(&two.netns, gateway, "z.").unwrap().0, 0);
            manager.release("a");
            assert_eq!(look_up(&two.netns, gateway, "z.").unwrap().0, 3);
            manager.release("b");
            manager.remove_network("n").unwrap();
        });
    }
}

#[test]
fn other_names_are_asked_of_the_containers_own_servers_over_udp_and_tcp() {
    use hickory_proto::op::{Message, Query};
    use hickory_proto::rr::{Name, RecordType};
    on_a_host_of_its_own(|directory| {
        let world = outside();
        resolver(&world);
        let manager = open(directory);
        manager
            .create_network(NetworkSpec {
                internal: true,
                ..NetworkSpec::bridge("inside")
            })
            .unwrap();
        let sandbox = manager.sandbox().unwrap();
        let spec = |network: &str, container: &str| EndpointSpec {
            dns: vec!["192.0.2.9".parse().unwrap()],
            ..spec(network, container)
        };
        let endpoint = manager.connect(&sandbox, spec("bridge", "a")).unwrap();
        let gateway = IpAddr::V4(endpoint.gateway_v4.unwrap());
        assert_eq!(
            look_up(&sandbox.netns, gateway, "one.test.").unwrap(),
            (0, vec!["203.0.113.1".to_owned()])
        );
        // Cut short in UDP, whole in TCP: two questions on one connection.
        assert_eq!(
            look_up(&sandbox.netns, gateway, "many.test.").unwrap(),
            (0, vec![])
        );
        let answers = within(sandbox.netns.as_fd(), || {
            let mut stream = TcpStream::connect((gateway, 53))?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            let mut answers = Vec::new();
            for name in ["many.test.", "a."] {
                let mut query = Message::query();
                query.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
                let bytes = query.to_vec().unwrap();
                stream.write_all(&(bytes.len() as u16).to_be_bytes())?;
                stream.write_all(&bytes)?;
                let mut length = [0; 2];
                stream.read_exact(&mut length)?;
                let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
                stream.read_exact(&mut answer)?;
                answers.push(Message::from_vec(&answer).unwrap().answers.len());
            }
            Ok(answers)
        })
        .unwrap();
        assert_eq!(answers, [100, 1]);
        // Nothing is asked for a container that has only an internal network.
        let alone = manager.sandbox().unwrap();
        let inside = manager.connect(&alone, spec("inside", "b")).unwrap();
        let network = manager.inspect("inside").unwrap();
        let server = IpAddr::V4(network.gateway_v4().unwrap());
        assert!(inside.gateway_v4.is_none());
        assert_eq!(look_up(&alone.netns, server, "one.test.").unwrap().0, 3);
    });
}
