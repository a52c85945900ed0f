//! User-mode networks for machines: where the machine's room and the network's meet.

use std::any::Any;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;

use net::Mac;
use net::user::{UserConfig, UserNet};
use vmm::process::{Forward, UserNetwork};

use crate::failure::Failure;

/// The card of `machine boot`, whose network has no other.
pub const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

/// See [`vmm::process::UserNetworks`].
pub fn open(
    wish: &UserNetwork,
    mac: [u8; 6],
    link: OwnedFd,
    first: fn(),
) -> Result<Box<dyn Any + Send>, String> {
    let mut config = UserConfig::new(Mac(mac));
    if !wish.hostname.is_empty() {
        config.hostname.clone_from(&wish.hostname);
    }
    for forward in &wish.forwards {
        let list = if forward.udp {
            &mut config.udp_forwards
        } else {
            &mut config.forwards
        };
        list.push((forward.host, forward.guest));
    }
    match UserNet::spawn_with(link, config, first) {
        Ok(network) => Ok(Box::new(network)),
        Err(error) => Err(error.to_string()),
    }
}

/// Reads `user[,hostfwd=tcp|udp:[ADDRESS]:PORT-[GUEST]:PORT]…`.
pub fn parse(text: &str) -> Result<UserNetwork, Failure> {
    let mut words = text.split(',');
    if words.next() != Some("user") {
        return Err(Failure::invalid(format!(
            "--net {text:?}: without a daemon there is the network user; machines on networks are made with berth machine create"
        )));
    }
    let mut wish = UserNetwork::default();
    for word in words {
        match word.split_once('=') {
            Some(("hostfwd", rule)) => wish.forwards.push(parse_forward(rule)?),
            Some(("hostname", name)) if !name.is_empty() => name.clone_into(&mut wish.hostname),
            _ => {
                return Err(Failure::invalid(format!(
                    "--net: {word:?} is neither hostfwd=tcp:[ADDRESS]:PORT-:PORT nor hostname=NAME"
                )));
            }
        }
    }
    Ok(wish)
}

fn parse_forward(rule: &str) -> Result<Forward, Failure> {
    let wrong = || {
        Failure::invalid(format!(
            "--net: hostfwd={rule:?} is not tcp|udp:[ADDRESS]:PORT-:PORT, as in tcp:127.0.0.1:2222-:22"
        ))
    };
    let (protocol, rest) = rule.split_once(':').ok_or_else(wrong)?;
    let udp = match protocol {
        "tcp" => false,
        "udp" => true,
        _ => return Err(wrong()),
    };
    let (host, guest) = rest.split_once('-').ok_or_else(wrong)?;
    let (address, port) = host.rsplit_once(':').ok_or_else(wrong)?;
    // The guest has one address; it may be said.
    let guest = guest.rsplit_once(':').ok_or_else(wrong)?.1;
    let address: IpAddr = match address.trim_matches(['[', ']']) {
        // Not the whole world, where nothing is said.
        "" => Ipv4Addr::LOCALHOST.into(),
        text => text.parse().map_err(|_| wrong())?,
    };
    let guest: u16 = guest.parse().map_err(|_| wrong())?;
    if guest == 0 {
        return Err(wrong());
    }
    Ok(Forward {
        udp,
        host: SocketAddr::new(address, port.parse().map_err(|_| wrong())?),
        guest,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_are_read_as_other_machines_write_them() {
        let wish =
            parse("user,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::5353-10.0.2.15:53").unwrap();
        assert_eq!(wish.forwards.len(), 2);
        assert_eq!(wish.forwards[0].host, "127.0.0.1:2222".parse().unwrap());
        assert_eq!((wish.forwards[0].guest, wish.forwards[0].udp), (22, false));
        assert_eq!(wish.forwards[1].host, "127.0.0.1:5353".parse().unwrap());
        assert_eq!((wish.forwards[1].guest, wish.forwards[1].udp), (53, true));
        for bad in [
            "tap",
            "user,hostfwd=tcp:22",
            "user,hostfwd=sctp::1-:2",
            "user,hostfwd=tcp:x:1-:2",
            "user,hostfwd=tcp::1-:0",
            "user,what",
        ] {
            assert_eq!(parse(bad).unwrap_err().code, 2, "{bad}");
        }
    }
}
