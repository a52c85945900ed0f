//! What machines are and use, their logs and consoles.

use std::process::ExitCode;
use std::time::Duration;

use base::units::format_size;
use clap::Args;
use hyper::Method;
use serde_json::{Value, json};

use super::{MACHINES, Names, path_of};
use crate::client::{Client, empty, encode};
use crate::commands::container::body_reader;
use crate::commands::show::{list as items, text};
use crate::commands::{ListOptions, ShowOptions};
use crate::failure::Failure;
use crate::output::{self, Format, Table};
use crate::terminal::copy_output;

#[derive(Debug, Args)]
pub struct InspectArgs {
    #[command(flatten)]
    pub show: ShowOptions,
    #[command(flatten)]
    pub names: Names,
}

#[derive(Debug, Args)]
pub struct StatsArgs {
    /// table, json, yaml, or a Go template as '{{.Name}}'.
    #[arg(long, default_value_t, value_name = "FORMAT")]
    pub format: Format,
    /// One answer, as is given anyway.
    #[arg(long, hide = true)]
    pub no_stream: bool,
    /// The machines; all running ones if not given.
    pub machines: Vec<String>,
}

#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on with what is written from now, until the machine ends.
    #[arg(short, long)]
    pub follow: bool,
    /// The last lines only.
    #[arg(short = 'n', long, value_name = "LINES")]
    pub tail: Option<usize>,
    /// The machine.
    pub machine: String,
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or(0)
}

/// `0.0.0.0:8080->80/tcp`, comma-separated.
fn ports_of(machine: &Value) -> String {
    let ports: Vec<String> = items(machine, "/ports")
        .iter()
        .map(|port| {
            format!(
                "{}:{}->{}/{}",
                text(port, "/host_ip"),
                text(port, "/host_port"),
                text(port, "/container_port"),
                text(port, "/protocol")
            )
        })
        .collect();
    ports.join(", ")
}

/// The address by which it is found: of a network without IPv4 the other.
fn address_of(machine: &Value) -> String {
    match text(machine, "/address") {
        none if none.is_empty() => text(machine, "/address6"),
        v4 => v4,
    }
}

#[derive(Debug, Args)]
pub struct ListArgs {
    /// Only machines with this state, name, image or network. Given many times, all must hold.
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub filter: Vec<String>,
    /// Only those that run or are paused.
    #[arg(short, long)]
    pub running: bool,
    /// All machines, as is done anyway.
    #[arg(short, long, hide = true)]
    pub all: bool,
    #[command(flatten)]
    pub options: ListOptions,
}

const FILTERS: [&str; 4] = ["state", "name", "image", "network"];

fn filters(words: &[String]) -> Result<Vec<(&str, &str)>, Failure> {
    words
        .iter()
        .map(|word| match word.split_once('=') {
            Some((key, value)) if FILTERS.contains(&key) => Ok((key, value)),
            _ => Err(Failure::invalid(format!(
                "--filter {word:?} is not KEY=VALUE with one of the keys {}",
                FILTERS.join(", ")
            ))),
        })
        .collect()
}

pub async fn list(client: &Client, args: &ListArgs) -> Result<ExitCode, Failure> {
    let (wanted, options) = (filters(&args.filter)?, &args.options);
    let mut machines: Vec<Value> = client.get(MACHINES, &[]).await?;
    machines.retain(|machine| {
        let matches = |(key, value): &(&str, &str)| machine[*key] == *value;
        wanted.iter().all(matches) && !(args.running && machine["pid"].is_null())
    });
    if options.quiet {
        machines
            .iter()
            .for_each(|machine| output::line(text(machine, "/name")));
        return Ok(ExitCode::SUCCESS);
    }
    if options.format != Format::Table {
        output::document(options.format, &machines)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&[
        "NAME", "STATE", "CPUS", "MEMORY", "DISK", "CPU", "ADDRESS", "PORTS", "IMAGE",
    ]);
    for machine in &machines {
        table.row(vec![
            text(machine, "/name"),
            text(machine, "/state"),
            text(machine, "/cpus"),
            format_size(number(machine, "memory")),
            format!(
                "{} of {}",
                format_size(number(machine, "disk_used")),
                format_size(number(machine, "disk"))
            ),
            text(machine, "/cpu"),
            address_of(machine),
            ports_of(machine),
            text(machine, "/image"),
        ]);
    }
    output::print(&table.render());
    for machine in &machines {
        let problem = text(machine, "/problem");
        if !problem.is_empty() {
            eprintln!("berth: {}: {problem}", text(machine, "/name"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub async fn inspect(client: &Client, args: InspectArgs) -> Result<ExitCode, Failure> {
    let mut found = Vec::new();
    for name in &args.names.machines {
        found.push(
            client
                .get::<Value>(&format!("{MACHINES}/{}", encode(name)), &[])
                .await?,
        );
    }
    output::document(args.show.format, &found)?;
    Ok(ExitCode::SUCCESS)
}

/// The time between the two readings that a rate is made of.
const APART: Duration = Duration::from_millis(400);

async fn read_stats(client: &Client, names: &[String]) -> Result<Vec<Value>, Failure> {
    let mut all = Vec::new();
    for name in names {
        all.push(client.get(&path_of(name, "stats"), &[]).await?);
    }
    Ok(all)
}

/// What the guest's programs use of the memory it has now, as it tells.
fn guest_memory(stats: &Value) -> String {
    let told = |key: &str| stats["guest_memory"]["guest"][key].as_u64();
    match (told("total"), told("available")) {
        (Some(total), Some(available)) => format!(
            "{} of {}",
            format_size(total.saturating_sub(available)),
            format_size(total)
        ),
        _ => "-".to_owned(),
    }
}

pub async fn stats(client: &Client, args: StatsArgs) -> Result<ExitCode, Failure> {
    let names = if args.machines.is_empty() {
        let machines: Vec<Value> = client.get(MACHINES, &[]).await?;
        machines
            .iter()
            .filter(|m| !m["pid"].is_null())
            .map(|m| text(m, "/name"))
            .collect()
    } else {
        args.machines
    };
    let before = read_stats(client, &names).await?;
    if !names.is_empty() {
        tokio::time::sleep(APART).await;
    }
    let mut after = read_stats(client, &names).await?;
    for (before, after) in before.iter().zip(&mut after) {
        let ran = number(after, "cpu_time").saturating_sub(number(before, "cpu_time"));
        let passed = number(after, "read_at").saturating_sub(number(before, "read_at"));
        let percent = ran as f64 * 100.0 / passed.max(1) as f64;
        after["cpu_percent"] = json!((percent * 10.0).round() / 10.0);
    }
    if args.format != Format::Table {
        output::document(args.format, &after)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&[
        "NAME", "CPU %", "CPU TIME", "MEMORY", "GUEST", "DISK", "DISK I/O", "NET I/O",
    ]);
    for stats in &after {
        let of = |key: &str| format_size(number(stats, key));
        let sum = |key: &str| {
            let disks = items(stats, "/disks").iter();
            format_size(disks.map(|disk| number(disk, key)).sum())
        };
        let net = match stats["received"].as_u64() {
            Some(_) => format!("{} / {}", of("received"), of("sent")),
            None => "-".to_owned(),
        };
        table.row(vec![
            text(stats, "/name"),
            text(stats, "/cpu_percent"),
            format!("{:.1}s", number(stats, "cpu_time") as f64 / 1e9),
            format!("{} of {}", of("memory_used"), of("memory")),
            guest_memory(stats),
            format!("{} of {}", of("disk_used"), of("disk")),
            format!("{} / {}", sum("read_bytes"), sum("written_bytes")),
            net,
        ]);
    }
    output::print(&table.render());
    Ok(ExitCode::SUCCESS)
}

/// What a running guest has of its memory and what the host got back.
pub async fn memory(client: &Client, name: &str) -> Result<ExitCode, Failure> {
    let stats: Value = client.get(&path_of(name, "stats"), &[]).await?;
    let guest = &stats["guest_memory"];
    let (all, wanted, balloon) = (
        number(&stats, "memory"),
        number(guest, "wanted"),
        number(guest, "balloon"),
    );
    output::line(format!(
        "{name}: the guest has {} of {}{}; {} of the host's memory are in use",
        format_size(all.saturating_sub(balloon)),
        format_size(all),
        if wanted == balloon {
            String::new()
        } else {
            format!(
                ", on its way to {}",
                format_size(all.saturating_sub(wanted))
            )
        },
        format_size(number(&stats, "memory_used")),
    ));
    Ok(ExitCode::SUCCESS)
}

pub async fn logs(client: &Client, args: LogsArgs) -> Result<ExitCode, Failure> {
    let mut query = vec![("follow", args.follow.to_string())];
    if let Some(lines) = args.tail {
        query.push(("tail", lines.to_string()));
    }
    let response = client
        .send(
            Method::GET,
            &path_of(&args.machine, "logs"),
            &query,
            empty(),
            &[],
        )
        .await?;
    copy_output(body_reader(response), true)
        .await
        .map_err(|e| Failure::io("the log broke off", &e))?;
    Ok(ExitCode::SUCCESS)
}

/// Waits for the ends of machines; writes how each ended. Exit code 0 where all powered off by themselves.
pub async fn wait(client: &Client, names: Names) -> Result<ExitCode, Failure> {
    let mut code = ExitCode::SUCCESS;
    for name in &names.machines {
        let record = loop {
            let query = [("timeout", "30".to_owned())];
            let response = client
                .send(Method::POST, &path_of(name, "wait"), &query, empty(), &[])
                .await?;
            let record: Value = crate::client::read_json(response).await?;
            if !record.is_null() {
                break record;
            }
        };
        let (reason, message) = (text(&record, "/reason"), text(&record, "/message"));
        if reason != "power-off" {
            code = ExitCode::FAILURE;
        }
        output::line(if message.is_empty() {
            reason
        } else {
            format!("{reason}: {message}")
        });
    }
    Ok(code)
}
