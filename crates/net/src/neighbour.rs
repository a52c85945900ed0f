//! The host's other firewalls: Docker's, ufw's, firewalld's.
//!
//! A packet must be accepted by every base chain of its hook, so a `drop` policy elsewhere cannot be overridden from our
//! table. Where Docker runs, it has a chain made for additions, `DOCKER-USER`, and there our bridges are let
//! through (our own table still decides what reaches them); what else stands in the way is only reported, with the
//! command that allows it.

use std::process::Command;

use serde::Deserialize;

use crate::error::{Context, Error, Result};
use crate::firewall::run_nft;

/// Something on this host that keeps networks from working.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub what: String,
    /// The command that helps.
    pub fix: String,
}

#[derive(Debug, Deserialize)]
struct Listing {
    nftables: Vec<Item>,
}

#[derive(Debug, Deserialize)]
struct Item {
    chain: Option<Chain>,
}

#[derive(Debug, Clone, Deserialize, PartialEq, Eq)]
struct Chain {
    family: String,
    table: String,
    name: String,
    hook: Option<String>,
    policy: Option<String>,
}

fn chains() -> Result<Vec<Chain>> {
    parse(&run_nft(&["-j", "list", "chains"], "")?)
}

fn parse(json: &str) -> Result<Vec<Chain>> {
    let listing: Listing = serde_json::from_str(json)
        .map_err(|error| Error::Nft(format!("unreadable list of chains: {error}")))?;
    Ok(listing
        .nftables
        .into_iter()
        .filter_map(|item| item.chain)
        .collect())
}

/// What stands in the way of the networks on `bridges`.
pub(crate) fn findings(bridges: &[String]) -> Vec<Finding> {
    match chains() {
        Ok(chains) => judge(&chains, bridges),
        Err(error) => vec![Finding {
            what: error.to_string(),
            fix: base::Classified::fix(&error).unwrap_or_else(|| "run the daemon as root".into()),
        }],
    }
}

fn judge(chains: &[Chain], bridges: &[String]) -> Vec<Finding> {
    let mut found = Vec::new();
    let has = |table: &str, name: &str| chains.iter().any(|c| c.table == table && c.name == name);
    let each = |command: &dyn Fn(&str) -> String| {
        bridges
            .iter()
            .map(|b| command(b))
            .collect::<Vec<_>>()
            .join(" && ")
    };
    if chains.iter().any(|c| c.table == "firewalld") {
        found.push(Finding {
            what: "firewalld rejects what no zone of it allows".into(),
            fix: each(&|b| format!("firewall-cmd --permanent --zone=trusted --add-interface={b}"))
                + " && firewall-cmd --reload",
        });
    }
    let ufw = has("filter", "ufw-user-forward");
    for chain in chains
        .iter()
        .filter(|c| c.policy.as_deref() == Some("drop"))
    {
        let place = format!("{} {} {}", chain.family, chain.table, chain.name);
        match chain.hook.as_deref() {
            Some("forward") if has(&chain.table, "DOCKER-USER") => {}
            Some("forward") => found.push(Finding {
                what: format!("the host's chain {place} drops forwarded packets: containers do not reach the outside"),
                fix: each(&|b| match () {
                    () if ufw => format!("ufw route allow in on {b} && ufw route allow out on {b}"),
                    () if chain.table == "filter" => {
                        format!("iptables -I {0} -i {b} -j ACCEPT && iptables -I {0} -o {b} -j ACCEPT", chain.name)
                    }
                    () => format!("nft insert rule {place} iifname {b} accept && nft insert rule {place} oifname {b} accept"),
                }),
            }),
            Some("input") => found.push(Finding {
                what: format!("the host's chain {place} drops what it does not know: containers may lack names, machines an address"),
                fix: each(&|b| match () {
                    () if ufw => format!("ufw allow in on {b} to any port 53 && ufw allow in on {b} to any port 67 proto udp"),
                    () if chain.table == "filter" => format!("iptables -I {} -i {b} -p udp -m multiport --dports 53,67 -j ACCEPT", chain.name),
                    () => format!("nft insert rule {place} iifname {b} udp dport {{ 53, 67 }} accept"),
                }),
            }),
            _ => {}
        }
    }
    found
}

/// Lets a bridge through Docker's forward chains, or no longer.
pub(crate) fn pass_docker(tag: &str, bridge: &str, let_through: bool) -> Result<()> {
    let chains = chains()?;
    for (family, program) in [("ip", "iptables"), ("ip6", "ip6tables")] {
        if !chains
            .iter()
            .any(|c| c.family == family && c.table == "filter" && c.name == "DOCKER-USER")
        {
            continue;
        }
        let comment = format!("berth-{tag}");
        for direction in ["-i", "-o"] {
            let rule = [
                direction,
                bridge,
                "-m",
                "comment",
                "--comment",
                &comment,
                "-j",
                "ACCEPT",
            ];
            let there = |verb: &str| {
                run(
                    program,
                    &[&["-w", "5", verb, "DOCKER-USER"], &rule[..]].concat(),
                )
            };
            // As often as it is there, should a crash have left it.
            if !let_through {
                for _ in 0..8 {
                    if there("-D").is_err() {
                        break;
                    }
                }
                continue;
            }
            if there("-C").is_ok() {
                continue;
            }
            // After the user's own rules, before the final RETURN of older Dockers.
            let listed = run(program, &["-w", "5", "-S", "DOCKER-USER"])?;
            let rules: Vec<_> = listed.lines().filter(|l| l.starts_with("-A ")).collect();
            let before_return = rules
                .last()
                .is_some_and(|l| l.trim() == "-A DOCKER-USER -j RETURN");
            let position = (rules.len() + usize::from(!before_return)).to_string();
            let place = ["-w", "5", "-I", "DOCKER-USER", &position];
            run(program, &[&place, &rule[..]].concat())?;
        }
    }
    Ok(())
}

fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let path = format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_else(|_| "/usr/bin:/bin".into())
    );
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", path)
        .env("LC_ALL", "C")
        .output()
        .context(|| format!("running {program}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text: String = String::from_utf8_lossy(&output.stderr)
        .trim()
        .chars()
        .take(300)
        .collect();
    Err(Error::Nft(format!("{program}: {text}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(table: &str, name: &str, hook: Option<&str>, policy: Option<&str>) -> Chain {
        Chain {
            family: "ip".into(),
            table: table.into(),
            name: name.into(),
            hook: hook.map(str::to_owned),
            policy: policy.map(str::to_owned),
        }
    }

    #[test]
    fn a_drop_policy_is_reported_with_the_command_that_helps() {
        let bridges = ["br0".to_owned()];
        let drop = chain("filter", "FORWARD", Some("forward"), Some("drop"));
        let found = judge(std::slice::from_ref(&drop), &bridges);
        assert_eq!(
            found[0].fix,
            "iptables -I FORWARD -i br0 -j ACCEPT && iptables -I FORWARD -o br0 -j ACCEPT"
        );
        let docker = chain("filter", "DOCKER-USER", None, None);
        assert_eq!(judge(&[drop.clone(), docker], &bridges), []);
        let ufw = chain("filter", "ufw-user-forward", None, None);
        assert!(
            judge(&[drop, ufw], &bridges)[0]
                .fix
                .starts_with("ufw route allow")
        );
        let accept = chain("filter", "INPUT", Some("input"), Some("accept"));
        assert_eq!(judge(&[accept], &bridges), []);
    }

    #[test]
    fn the_list_of_chains_is_read_as_nft_prints_it() {
        let text = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}}, {"chain": {"family": "ip",
            "table": "filter", "name": "FORWARD", "handle": 3, "type": "filter", "hook": "forward", "prio": 0,
            "policy": "drop"}}]}"#;
        assert_eq!(
            parse(text).unwrap(),
            [chain("filter", "FORWARD", Some("forward"), Some("drop"))]
        );
        assert!(parse("[]").is_err());
    }
}
