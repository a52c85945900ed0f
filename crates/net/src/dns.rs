//! The name service of a bridge: names of containers from the [`Directory`], everything else from the host's resolvers.
//!
//! An asker is known by its source address. It is told names only of networks it is on; an unknown one is refused,
//! so this is no open resolver.

mod upstream;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::directory::Directory;

/// Seconds: containers move, and asking is cheap.
const TTL: u32 = 5;
/// Queries being forwarded at once, and TCP connections at once, per server.
const MOST_FORWARDED: usize = 512;
const MOST_CONNECTIONS: usize = 64;
const TCP_IDLE: Duration = Duration::from_secs(10);

/// Serves one address until dropped.
pub(crate) struct Server {
    tasks: [JoinHandle<()>; 2],
    /// 53, or another where that is taken.
    pub(crate) port: u16,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

#[derive(Clone)]
struct Shared {
    directory: Arc<RwLock<Directory>>,
    forwards: Arc<Semaphore>,
}

impl Server {
    /// Binds `address`, in the calling thread's network namespace.
    pub(crate) fn start(
        runtime: &Handle,
        directory: Arc<RwLock<Directory>>,
        address: IpAddr,
    ) -> io::Result<Server> {
        let (udp, tcp) = bind(address, 53).or_else(|error| match error.kind() {
            io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied => bind(address, 0),
            _ => Err(error),
        })?;
        let port = udp.local_addr()?.port();
        udp.set_nonblocking(true)?;
        tcp.set_nonblocking(true)?;
        let _entered = runtime.enter();
        let (udp, tcp) = (UdpSocket::from_std(udp)?, TcpListener::from_std(tcp)?);
        let shared = Shared {
            directory,
            forwards: Arc::new(Semaphore::new(MOST_FORWARDED)),
        };
        let tasks = [
            runtime.spawn(serve_udp(Arc::new(udp), shared.clone())),
            runtime.spawn(serve_tcp(tcp, shared)),
        ];
        Ok(Server { tasks, port })
    }
}

fn bind(address: IpAddr, port: u16) -> io::Result<(std::net::UdpSocket, std::net::TcpListener)> {
    // With port 0, one that is free in both.
    for _ in 0..16 {
        let udp = std::net::UdpSocket::bind((address, port))?;
        match std::net::TcpListener::bind((address, udp.local_addr()?.port())) {
            Ok(tcp) => return Ok((udp, tcp)),
            Err(error) if port != 0 || error.kind() != io::ErrorKind::AddrInUse => {
                return Err(error);
            }
            Err(_) => {}
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

async fn serve_udp(socket: Arc<UdpSocket>, shared: Shared) {
    let mut buffer = vec![0; 4096];
    loop {
        let Ok((length, sender)) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        match respond(&buffer[..length], sender.ip(), &shared.directory) {
            Response::None => {}
            Response::Ready { bytes, .. } => {
                let _ = socket.try_send_to(&bytes, sender);
            }
            Response::Forward { failure, servers } => {
                let Ok(permit) = Arc::clone(&shared.forwards).try_acquire_owned() else {
                    let _ = socket.try_send_to(&failure, sender);
                    continue;
                };
                let (query, socket) = (buffer[..length].to_vec(), Arc::clone(&socket));
                tokio::spawn(async move {
                    let answer = upstream::forward(&query, false, &servers)
                        .await
                        .unwrap_or(failure);
                    let _ = socket.send_to(&answer, sender).await;
                    drop(permit);
                });
            }
        }
    }
}

async fn serve_tcp(listener: TcpListener, shared: Shared) {
    let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, peer)) => {
                let shared = shared.clone();
                tokio::spawn(async move {
                    let _ = converse(stream, peer, shared).await;
                    drop(permit);
                });
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// RFC 1035 section 4.2.2: each message after its length.
async fn converse(mut stream: TcpStream, peer: SocketAddr, shared: Shared) -> io::Result<()> {
    loop {
        let length = timeout(TCP_IDLE, stream.read_u16()).await??;
        let mut query = vec![0; usize::from(length)];
        timeout(TCP_IDLE, stream.read_exact(&mut query)).await??;
        let answer = match respond(&query, peer.ip(), &shared.directory) {
            Response::None => return Ok(()),
            Response::Ready { whole, .. } => whole,
            Response::Forward { failure, servers } => upstream::forward(&query, true, &servers)
                .await
                .unwrap_or(failure),
        };
        let mut framed = Vec::with_capacity(answer.len() + 2);
        framed.extend(u16::try_from(answer.len()).unwrap_or(0).to_be_bytes());
        framed.extend(answer);
        timeout(TCP_IDLE, stream.write_all(&framed)).await??;
    }
}

/// What to do with a query.
#[derive(Debug)]
enum Response {
    /// Not a query; no answer, lest two servers answer each other for ever.
    None,
    /// `bytes` for UDP, cut to what the asker takes; `whole` for TCP.
    Ready { bytes: Vec<u8>, whole: Vec<u8> },
    /// To be asked elsewhere; `failure` is the answer where nobody answers.
    Forward {
        failure: Vec<u8>,
        servers: Vec<IpAddr>,
    },
}

fn respond(query: &[u8], asker: IpAddr, directory: &RwLock<Directory>) -> Response {
    // Below a header, or an answer (QR): silence.
    if query.len() < 12 || query[2] & 0x80 != 0 {
        return Response::None;
    }
    let Ok(message) = Message::from_vec(query) else {
        let id = u16::from_be_bytes([query[0], query[1]]);
        return ready(
            Message::error_msg(id, OpCode::Query, ResponseCode::FormErr),
            512,
        );
    };
    let limit = message.max_payload().clamp(512, 4096);
    let mut answer = Message::response(message.metadata.id, message.metadata.op_code);
    answer.metadata.message_type = MessageType::Response;
    answer.metadata.recursion_desired = message.metadata.recursion_desired;
    answer.metadata.recursion_available = true;
    answer.add_queries(message.queries.iter().cloned());
    if message.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(4096);
        answer.set_edns(edns);
    }
    let refuse = |mut answer: Message, code| {
        answer.metadata.response_code = code;
        ready(answer, limit)
    };
    if message.metadata.op_code != OpCode::Query {
        return refuse(answer, ResponseCode::NotImp);
    }
    let [question] = &message.queries[..] else {
        return refuse(answer, ResponseCode::FormErr);
    };
    let name = question.name().clone();
    let text = name.to_ascii().trim_end_matches('.').to_ascii_lowercase();
    let directory = directory.read().unwrap_or_else(PoisonError::into_inner);
    if !directory.knows(asker) {
        return refuse(answer, ResponseCode::Refused);
    }
    let inside = matches!(question.query_class(), DNSClass::IN | DNSClass::ANY);
    if inside && let Some(addresses) = directory.find(asker, &text) {
        let kind = question.query_type();
        for address in addresses {
            let data = match address {
                IpAddr::V4(v4) if matches!(kind, RecordType::A | RecordType::ANY) => {
                    RData::A(A(v4))
                }
                IpAddr::V6(v6) if matches!(kind, RecordType::AAAA | RecordType::ANY) => {
                    RData::AAAA(AAAA(v6))
                }
                _ => continue,
            };
            answer.add_answer(Record::from_rdata(name.clone(), TTL, data));
        }
        answer.metadata.authoritative = true;
        return ready(answer, limit);
    }
    if inside
        && question.query_type() == RecordType::PTR
        && let Ok(subnet) = name.parse_arpa_name()
        && let Some(found) = directory.name_of(asker, subnet.addr())
        && let Ok(mut target) = Name::from_ascii(found)
    {
        target.set_fqdn(true);
        answer.add_answer(Record::from_rdata(name, TTL, RData::PTR(PTR(target))));
        answer.metadata.authoritative = true;
        return ready(answer, limit);
    }
    let servers = match directory.servers(asker) {
        _ if !directory.may_ask_outside(asker) => Vec::new(),
        own if !own.is_empty() => own.to_vec(),
        _ => upstream::host_servers(),
    };
    if servers.is_empty() {
        return refuse(answer, ResponseCode::NXDomain);
    }
    answer.metadata.response_code = ResponseCode::ServFail;
    Response::Forward {
        failure: answer.to_vec().unwrap_or_default(),
        servers,
    }
}

fn ready(message: Message, limit: u16) -> Response {
    let Ok(whole) = message.to_vec() else {
        return Response::None;
    };
    let bytes = if whole.len() > usize::from(limit) {
        message.truncate().to_vec().unwrap_or_default()
    } else {
        whole.clone()
    };
    Response::Ready { bytes, whole }
}

/// Entry for fuzzing: any bytes as a query, from a known and an unknown asker.
pub fn fuzz_dns(data: &[u8]) {
    let directory = RwLock::new(Directory::example());
    for asker in ["10.0.0.2", "10.9.9.9"] {
        let _ = respond(data, asker.parse().expect("an address"), &directory);
    }
    let _ = upstream::question_end(data);
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::Query;
    use proptest::prelude::*;

    fn ask(asker: &str, name: &str, kind: RecordType) -> (ResponseCode, Vec<String>) {
        let directory = RwLock::new(Directory::example());
        let mut query = Message::query();
        query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        match respond(&query.to_vec().unwrap(), asker.parse().unwrap(), &directory) {
            Response::Ready { bytes, .. } => {
                let answer = Message::from_vec(&bytes).unwrap();
                let data = answer.answers.iter().map(|r| r.data.to_string()).collect();
                (answer.metadata.response_code, data)
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn names_are_answered_to_who_shares_a_network() {
        let ok = |a: &str| (ResponseCode::NoError, vec![a.to_owned()]);
        for name in ["web.", "WEB.", "web.inner.", "www.", "aaaaaaaaaaaa."] {
            assert_eq!(
                ask("10.0.0.3", name, RecordType::A),
                ok("10.0.0.2"),
                "{name}"
            );
        }
        assert_eq!(
            ask("10.0.0.3", "web.", RecordType::AAAA),
            (ResponseCode::NoError, vec![])
        );
        assert_eq!(
            ask("10.0.0.3", "2.0.0.10.in-addr.arpa.", RecordType::PTR),
            ok("web.inner.")
        );
        // Another network's, and on internal networks anything else, does not exist.
        assert_eq!(
            ask("10.0.0.3", "far.", RecordType::A).0,
            ResponseCode::NXDomain
        );
        assert_eq!(
            ask("10.0.0.3", "1.1.0.10.in-addr.arpa.", RecordType::PTR).0,
            ResponseCode::NXDomain
        );
        assert_eq!(
            ask("10.7.7.7", "web.", RecordType::A).0,
            ResponseCode::Refused
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_or_ignored(data in proptest::collection::vec(any::<u8>(), 0..600)) {
            fuzz_dns(&data);
        }

        #[test]
        fn a_damaged_query_is_answered_or_ignored(at in 0usize..40, byte: u8) {
            let mut query = Message::query();
            query.add_query(Query::query(Name::from_ascii("web.inner.").unwrap(), RecordType::A));
            let mut bytes = query.to_vec().unwrap();
            let at = at % bytes.len();
            bytes[at] = byte;
            fuzz_dns(&bytes);
        }
    }
}
