//! Asking the host's resolvers.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

const ROUNDS: usize = 2;
const PATIENCE: Duration = Duration::from_millis(2500);

/// The servers of the host's resolv.conf. Loopback ones (systemd-resolved's stub, dnsmasq) are fine: we ask from the
/// host's side.
pub(super) fn host_servers() -> Vec<IpAddr> {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let mut servers = crate::resolv::name_servers(&text);
    servers.truncate(3);
    servers
}

/// The answer of the first server that has one. A failure (SERVFAIL, REFUSED) is kept only if nobody does better.
pub(super) async fn forward(query: &[u8], over_tcp: bool, servers: &[IpAddr]) -> Option<Vec<u8>> {
    let question = question_end(query)?;
    let mut second_best = None;
    for _ in 0..ROUNDS {
        for server in servers {
            let asked = if over_tcp {
                ask_tcp(query, *server).await
            } else {
                ask_udp(query, question, *server).await
            };
            let Ok(mut answer) = asked else { continue };
            answer[..2].copy_from_slice(&query[..2]);
            if matches!(answer[3] & 0x0f, 2 | 5) {
                second_best = Some(answer);
                continue;
            }
            return Some(answer);
        }
        if second_best.is_some() {
            break;
        }
    }
    second_best
}

/// Where the question section of a one-question query ends; `None` if it is not well-formed.
pub(super) fn question_end(message: &[u8]) -> Option<usize> {
    let mut at = 12;
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1;
        match length {
            0 => break,
            1..=63 => at += length,
            _ => return None, // compression has nothing to point to here
        }
    }
    (at + 4 <= message.len()).then_some(at + 4)
}

/// A port and an id of its own per query, and the question compared: forged answers must guess both.
async fn ask_udp(query: &[u8], question: usize, server: IpAddr) -> io::Result<Vec<u8>> {
    let any: IpAddr = if server.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect((server, 53)).await?;
    let mut sent = query.to_vec();
    getrandom::fill(&mut sent[..2]).map_err(|_| io::Error::other("no random numbers"))?;
    socket.send(&sent).await?;
    let mut buffer = vec![0; 4096];
    let receive = async {
        loop {
            let length = socket.recv(&mut buffer).await?;
            let answer = &buffer[..length];
            if length >= question
                && answer[..2] == sent[..2]
                && answer[2] & 0x80 != 0
                && answer[12..question].eq_ignore_ascii_case(&sent[12..question])
            {
                let mut answer = answer.to_vec();
                if length == buffer.len() {
                    // Cut off: whoever asked asks again by TCP.
                    answer[2] |= 2;
                }
                return Ok(answer);
            }
        }
    };
    timeout(PATIENCE, receive).await?
}

async fn ask_tcp(query: &[u8], server: IpAddr) -> io::Result<Vec<u8>> {
    let exchange = async {
        let mut stream = TcpStream::connect((server, 53)).await?;
        let length = u16::try_from(query.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut framed = length.to_be_bytes().to_vec();
        framed.extend(query);
        stream.write_all(&framed).await?;
        let mut answer = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut answer).await?;
        if answer.len() < 12 || answer[..2] != query[..2] || answer[2] & 0x80 == 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(answer)
    };
    timeout(PATIENCE * 2, exchange).await?
}
