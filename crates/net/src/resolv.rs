//! The files a container's resolver reads: resolv.conf(5) and hosts(5).

use std::fmt::Write as _;
use std::net::IpAddr;

use crate::endpoint::Endpoint;

/// What the user asks for with `--dns`, `--dns-search`, `--dns-option`; empty is the host's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResolvOptions {
    pub servers: Vec<IpAddr>,
    pub search: Vec<String>,
    pub options: Vec<String>,
}

/// The servers a resolv.conf names.
pub(crate) fn name_servers(text: &str) -> Vec<IpAddr> {
    let lines = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"));
    // A zone (fe80::1%eth0) means nothing elsewhere.
    lines
        .filter_map(|rest| {
            rest.trim()
                .split(['%', ' ', '\t', '#'])
                .next()?
                .parse()
                .ok()
        })
        .collect()
}

/// The resolv.conf of a container on `endpoints`: our name service on the gateways' addresses. `host` is the text
/// of the host's own. Servers asked for are not written here but asked by the name service (see
/// [`crate::EndpointSpec::dns`]), so that names of containers are found with them too. With no bridge network (`host`, `none`)
/// the host's servers are, or those asked for.
pub fn resolv_conf(
    endpoints: &[Endpoint],
    gateways: &[IpAddr],
    host: &str,
    asked: &ResolvOptions,
) -> String {
    let mut text = String::from("# Written by Berth\n");
    let on_bridge = endpoints.iter().any(|e| !e.interface.is_empty()) && !gateways.is_empty();
    let servers = match () {
        () if on_bridge => gateways.to_vec(),
        () if !asked.servers.is_empty() => asked.servers.clone(),
        () => name_servers(host),
    };
    for server in servers.iter().take(3) {
        let _ = writeln!(text, "nameserver {server}");
    }
    let search = if asked.search.is_empty() {
        host_words(host, "search")
    } else {
        asked.search.clone()
    };
    let search: Vec<_> = search
        .iter()
        .filter(|s| is_plain(s))
        .map(String::as_str)
        .collect();
    // `--dns-search .` means none.
    if !search.is_empty() && search != ["."] {
        let _ = writeln!(text, "search {}", search.join(" "));
    }
    let mut options = if asked.options.is_empty() {
        host_words(host, "options")
    } else {
        asked.options.clone()
    };
    // What only systemd-resolved's stub wants.
    options.retain(|o| is_plain(o) && o != "edns0" && o != "trust-ad");
    if !options.is_empty() {
        let _ = writeln!(text, "options {}", options.join(" "));
    }
    text
}

/// The hosts file: the usual names, the container's own, and what was asked for with `--add-host` (name, address),
/// where the address `host-gateway` is the gateway's.
pub fn hosts_file(
    endpoints: &[Endpoint],
    hostname: &str,
    domain: Option<&str>,
    extra: &[(String, String)],
    gateways: &[IpAddr],
) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\n\
         ff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    for (name, address) in extra.iter().filter(|(name, _)| is_plain(name)) {
        if address == "host-gateway" {
            for gateway in gateways {
                let _ = writeln!(text, "{gateway}\t{name}");
            }
        } else if let Ok(address) = address.parse::<IpAddr>() {
            let _ = writeln!(text, "{address}\t{name}");
        }
    }
    if is_plain(hostname) {
        let names = match domain.filter(|d| is_plain(d)) {
            Some(domain) => format!("{hostname}.{domain} {hostname}"),
            None => hostname.to_owned(),
        };
        for address in endpoints.iter().flat_map(|e| [e.v4, e.v6]).flatten() {
            let _ = writeln!(text, "{}\t{names}", address.address());
        }
    }
    text
}

/// Nothing that would begin another word or line.
fn is_plain(word: &str) -> bool {
    !word.is_empty()
        && word
            .chars()
            .all(|c| !c.is_whitespace() && !c.is_control() && c != '#')
}

/// The words of the last line of this kind, as resolv.conf(5) has it.
fn host_words(text: &str, keyword: &str) -> Vec<String> {
    let mut lines = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix(keyword));
    let last = lines
        .rfind(|rest| rest.starts_with([' ', '\t']))
        .unwrap_or_default();
    last.split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOST: &str = "# x\nnameserver 127.0.0.53\nnameserver fe80::1%eth0\nsearch a b\noptions edns0 trust-ad ndots:2\n";

    #[test]
    fn without_a_bridge_the_hosts_resolvers_are_used() {
        let text = resolv_conf(&[], &[], HOST, &ResolvOptions::default());
        assert_eq!(
            text,
            "# Written by Berth\nnameserver 127.0.0.53\nnameserver fe80::1\nsearch a b\noptions ndots:2\n"
        );
        let asked = ResolvOptions {
            servers: vec!["9.9.9.9".parse().unwrap()],
            search: vec![".".into()],
            ..Default::default()
        };
        assert_eq!(
            resolv_conf(&[], &[], "", &asked),
            "# Written by Berth\nnameserver 9.9.9.9\n"
        );
    }

    #[test]
    fn a_host_name_cannot_add_lines() {
        let extra = [
            ("a\n6.6.6.6 b".to_owned(), "1.1.1.1".to_owned()),
            ("h".into(), "host-gateway".into()),
        ];
        let text = hosts_file(&[], "x\ny", None, &extra, &["10.0.0.1".parse().unwrap()]);
        assert!(
            !text.contains("6.6.6.6") && !text.contains('y') && text.ends_with("10.0.0.1\th\n")
        );
    }

    proptest! {
        #[test]
        fn any_host_file_is_read(text in ".{0,200}") {
            let _ = resolv_conf(&[], &[], &text, &ResolvOptions::default());
        }
    }
}
