//! The one nftables table of a daemon, made and changed through the `nft` program.
//!
//! The rules are made once; networks and published ports are elements of sets and maps. Everything is in the table
//! `inet berth-TAG`, so removing the table removes all of it, and nothing of the host's own rules is touched.
//!
//! - `guard` (prerouting, raw): nothing on a bridge reaches the host's 127.0.0.0/8, although `route_localnet` is on.
//! - `prerouting`/`output` (nat): a packet to an address of this host and a published port goes to its container.
//! - `postrouting` (nat): masquerades what leaves a network, what came from 127.0.0.1, and what comes back to its
//!   own network through a published port.
//! - `forward` (filter, priority 0): between networks nothing but what was published; nothing in or out of an internal one.
//!
//! An `accept` here ends this table's chain only: every other base chain of the host still sees the packet and may
//! drop it. So a `drop` in the host's own `forward` chains holds for published ports too; one in its `input` chains
//! does not, since a published packet is forwarded. Bind the port to 127.0.0.1 to keep it on the host.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use crate::address::Subnet;
use crate::endpoint::{Protocol, PublishedPort};
use crate::error::{Context, Error, Result};

pub(crate) struct Firewall {
    table: String,
    /// nft transactions are serialized by the kernel anyway; this keeps one from failing by another's generation.
    turn: Mutex<()>,
}

/// What the table holds of one network.
#[derive(Debug, Clone)]
pub(crate) struct NetworkRules {
    pub bridge: String,
    pub subnets: Vec<Subnet>,
    pub internal: bool,
    pub masquerade: bool,
}

/// A published port and where it leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Forward {
    pub port: PublishedPort,
    pub to: IpAddr,
}

impl Firewall {
    pub(crate) fn new(tag: &str) -> Firewall {
        Firewall {
            table: format!("inet berth-{tag}"),
            turn: Mutex::new(()),
        }
    }

    fn run(&self, script: &str) -> Result<()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        run_nft(&["-f", "-"], script).map(drop)
    }

    /// Puts the whole table in place of whatever a former daemon left, in one transaction.
    pub(crate) fn install(&self, networks: &[NetworkRules], forwards: &[Forward]) -> Result<()> {
        let table = &self.table;
        // `add` first, so that `delete` finds one.
        let mut script = format!("add table {table}\ndelete table {table}\n");
        let _ = write!(script, "table {table} {{\n{BODY}}}\n");
        for network in networks {
            self.elements(&mut script, "add", network);
        }
        self.forward_elements(&mut script, "add", forwards);
        self.run(&script)
    }

    pub(crate) fn add_network(&self, network: &NetworkRules) -> Result<()> {
        let mut script = String::new();
        self.elements(&mut script, "add", network);
        self.run(&script)
    }

    pub(crate) fn remove_network(&self, network: &NetworkRules) -> Result<()> {
        let mut script = String::new();
        self.elements(&mut script, "delete", network);
        self.run(&script)
    }

    pub(crate) fn add_forwards(&self, forwards: &[Forward]) -> Result<()> {
        self.change_forwards("add", forwards)
    }

    pub(crate) fn remove_forwards(&self, forwards: &[Forward]) -> Result<()> {
        self.change_forwards("delete", forwards)
    }

    fn change_forwards(&self, verb: &str, forwards: &[Forward]) -> Result<()> {
        if forwards.is_empty() {
            return Ok(());
        }
        let mut script = String::new();
        self.forward_elements(&mut script, verb, forwards);
        self.run(&script)
    }

    /// Whether the table is there.
    pub(crate) fn exists(&self) -> bool {
        let script = format!("list table {}\n", self.table);
        run_nft(&["-t", "-f", "-"], &script).is_ok()
    }

    /// Removes the table.
    pub(crate) fn remove(&self) -> Result<()> {
        self.run(&format!("add table {0}\ndelete table {0}\n", self.table))
    }

    fn elements(&self, script: &mut String, verb: &str, network: &NetworkRules) {
        let bridge = &network.bridge;
        let mut element = |set: &str, value: String| {
            let _ = writeln!(script, "{verb} element {} {set} {{ {value} }}", self.table);
        };
        element("bridges", format!("\"{bridge}\""));
        element("same", format!("\"{bridge}\" . \"{bridge}\""));
        if network.internal {
            element("internal", format!("\"{bridge}\""));
        }
        for subnet in &network.subnets {
            let subnet = subnet.network();
            let family = if subnet.is_v4() { 4 } else { 6 };
            element(&format!("nets{family}"), subnet.to_string());
            element(&format!("hairpin{family}"), format!("{subnet} . {subnet}"));
            if network.masquerade && !network.internal {
                element(&format!("masq{family}"), subnet.to_string());
            }
        }
    }

    fn forward_elements(&self, script: &mut String, verb: &str, forwards: &[Forward]) {
        for Forward { port, to } in forwards {
            if port.host_ip.is_ipv4() != to.is_ipv4() {
                continue; // the proxy's work
            }
            let family = if to.is_ipv4() { 4 } else { 6 };
            let key = format!("{} . {}", port.protocol.name(), port.host_port);
            let value = format!("{to} . {}", port.container_port);
            let (map, key) = if port.host_ip.is_unspecified() {
                (format!("pub{family}"), key)
            } else {
                (format!("pub{family}a"), format!("{} . {key}", port.host_ip))
            };
            let _ = writeln!(
                script,
                "{verb} element {} {map} {{ {key} : {value} }}",
                self.table
            );
        }
    }
}

/// The name service of a bridge on another port, where the host has a server on port 53 of every address.
pub(crate) fn dns_forwards(gateway: IpAddr, port: u16) -> [Forward; 2] {
    [Protocol::Udp, Protocol::Tcp].map(|protocol| Forward {
        port: PublishedPort {
            host_ip: gateway,
            host_port: 53,
            container_port: port,
            protocol,
        },
        to: gateway,
    })
}

const BODY: &str = "
  set bridges { type ifname; }
  set internal { type ifname; }
  set same { type ifname . ifname; }
  set nets4 { type ipv4_addr; flags interval; }
  set nets6 { type ipv6_addr; flags interval; }
  set masq4 { type ipv4_addr; flags interval; }
  set masq6 { type ipv6_addr; flags interval; }
  set hairpin4 { type ipv4_addr . ipv4_addr; flags interval; }
  set hairpin6 { type ipv6_addr . ipv6_addr; flags interval; }
  map pub4 { type inet_proto . inet_service : ipv4_addr . inet_service; }
  map pub6 { type inet_proto . inet_service : ipv6_addr . inet_service; }
  map pub4a { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }
  map pub6a { type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service; }
  chain publish {
    dnat ip to ip daddr . meta l4proto . th dport map @pub4a
    dnat ip to meta l4proto . th dport map @pub4
    dnat ip6 to ip6 daddr . meta l4proto . th dport map @pub6a
    dnat ip6 to meta l4proto . th dport map @pub6
  }
  chain prerouting {
    type nat hook prerouting priority -100; policy accept;
    fib daddr type local jump publish
  }
  chain output {
    type nat hook output priority -100; policy accept;
    ip6 daddr ::1 return
    fib daddr type local jump publish
  }
  chain postrouting {
    type nat hook postrouting priority 100; policy accept;
    ip saddr 127.0.0.0/8 oifname @bridges masquerade
    ip saddr . ip daddr @hairpin4 ct status dnat masquerade
    ip6 saddr . ip6 daddr @hairpin6 ct status dnat masquerade
    ip saddr @masq4 ip daddr != @nets4 masquerade
    ip6 saddr @masq6 ip6 daddr != @nets6 masquerade
  }
  chain guard {
    type filter hook prerouting priority -300; policy accept;
    iifname @bridges ip daddr 127.0.0.0/8 drop
  }
  chain forward {
    type filter hook forward priority 0; policy accept;
    iifname . oifname @same accept
    iifname @internal drop
    oifname @bridges jump inward
  }
  chain inward {
    oifname @internal drop
    ct state established,related accept
    ct status dnat accept
    drop
  }
";

/// Runs `nft` with `script` on its standard input and gives its output.
pub(crate) fn run_nft(arguments: &[&str], script: &str) -> Result<String> {
    // A daemon started by a user's shell may lack the sbin folders.
    let path = format!(
        "{}:/usr/sbin:/sbin:/usr/local/sbin",
        std::env::var("PATH").unwrap_or_else(|_| "/usr/bin:/bin".into())
    );
    let spawned = Command::new("nft")
        .args(arguments)
        .env("PATH", path)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::NoNft),
        Err(error) => return Err(error).context(|| "starting nft".into()),
    };
    if let Some(mut input) = child.stdin.take() {
        // A broken pipe is explained by what nft says.
        let _ = input.write_all(script.as_bytes());
    }
    let output = child
        .wait_with_output()
        .context(|| "waiting for nft".into())?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let first: Vec<_> = text
        .lines()
        .filter(|l| !l.trim().is_empty())
        .take(3)
        .collect();
    Err(Error::Nft(first.join("; ").chars().take(600).collect()))
}
