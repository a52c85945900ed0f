//! What changes a container's life: stop, kill, pause, wait, rename, update, remove.

use std::process::ExitCode;

use base::units::{format_size_decimal, parse_size};
use clap::Args;
use hyper::Method;
use serde_json::{Value, json};

use super::super::Context;
use super::super::show::{filters, list, text};
use super::{Names, for_each, path_of};
use crate::client::{empty, encode};
use crate::failure::Failure;
use crate::output;

#[derive(Debug, Args)]
pub struct StopArgs {
    /// Seconds to wait before the kill; -1 waits for ever.
    #[arg(
        short,
        long,
        visible_alias = "timeout",
        value_name = "SECONDS",
        allow_hyphen_values = true
    )]
    pub time: Option<i64>,
    /// Signal to send first.
    #[arg(short, long)]
    pub signal: Option<String>,
    #[command(flatten)]
    pub names: Names,
}

/// `stop` and `restart`.
pub async fn stop(context: &Context, verb: &str, args: StopArgs) -> Result<ExitCode, Failure> {
    let mut query = Vec::new();
    if let Some(time) = args.time {
        query.push(("t", time.to_string()));
    }
    if let Some(signal) = args.signal {
        query.push(("signal", signal));
    }
    for_each(&args.names.containers, async |name| {
        context.client.act(&path_of(name, verb), &query).await?;
        Ok(Some(name.to_owned()))
    })
    .await
}

/// `pause` and `unpause`.
pub async fn plain(context: &Context, verb: &str, names: Names) -> Result<ExitCode, Failure> {
    for_each(&names.containers, async |name| {
        context.client.act(&path_of(name, verb), &[]).await?;
        Ok(Some(name.to_owned()))
    })
    .await
}

#[derive(Debug, Args)]
pub struct KillArgs {
    /// The signal.
    #[arg(short, long, default_value = "KILL")]
    pub signal: String,
    #[command(flatten)]
    pub names: Names,
}

pub async fn kill(context: &Context, args: KillArgs) -> Result<ExitCode, Failure> {
    for_each(&args.names.containers, async |name| {
        context
            .client
            .act(&path_of(name, "kill"), &[("signal", args.signal.clone())])
            .await?;
        Ok(Some(name.to_owned()))
    })
    .await
}

#[derive(Debug, Args)]
pub struct RmArgs {
    /// Kill it first if it runs.
    #[arg(short, long)]
    pub force: bool,
    /// Remove its anonymous volumes too.
    #[arg(short, long)]
    pub volumes: bool,
    #[command(flatten)]
    pub names: Names,
}

pub async fn rm(context: &Context, args: RmArgs) -> Result<ExitCode, Failure> {
    let query = [
        ("force", args.force.to_string()),
        ("v", args.volumes.to_string()),
    ];
    for_each(&args.names.containers, async |name| {
        context
            .client
            .delete(&format!("/containers/{}", encode(name)), &query)
            .await?;
        Ok(Some(name.to_owned()))
    })
    .await
}

#[derive(Debug, Args)]
pub struct RenameArgs {
    /// The container.
    pub container: String,
    /// Its new name.
    pub name: String,
}

pub async fn rename(context: &Context, args: RenameArgs) -> Result<ExitCode, Failure> {
    context
        .client
        .act(&path_of(&args.container, "rename"), &[("name", args.name)])
        .await?;
    Ok(ExitCode::SUCCESS)
}

pub async fn wait(context: &Context, names: Names) -> Result<ExitCode, Failure> {
    for_each(&names.containers, async |name| {
        let response = context
            .client
            .send(Method::POST, &path_of(name, "wait"), &[], empty(), &[])
            .await?;
        let status: Value = crate::client::read_json(response).await?;
        Ok(Some(text(&status, "/StatusCode")))
    })
    .await
}

#[derive(Debug, Args)]
pub struct UpdateArgs {
    /// Memory limit.
    #[arg(short, long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Memory and swap together; -1 for no limit of swap.
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub memory_swap: Option<String>,
    /// Memory below which the kernel reclaims last.
    #[arg(long, value_name = "SIZE")]
    pub memory_reservation: Option<String>,
    /// CPUs as a fraction.
    #[arg(long, value_name = "N")]
    pub cpus: Option<f64>,
    /// Relative weight of CPU time.
    #[arg(short, long, value_name = "WEIGHT")]
    pub cpu_shares: Option<i64>,
    /// Length of a CPU period in microseconds.
    #[arg(long, value_name = "US")]
    pub cpu_period: Option<i64>,
    /// CPU time in each period in microseconds.
    #[arg(long, value_name = "US")]
    pub cpu_quota: Option<i64>,
    /// CPUs to run on.
    #[arg(long, value_name = "CPUS")]
    pub cpuset_cpus: Option<String>,
    /// Most processes and threads at once.
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub pids_limit: Option<i64>,
    /// Relative weight of block I/O.
    #[arg(long, value_name = "WEIGHT")]
    pub blkio_weight: Option<u16>,
    /// What to do when the program ends.
    #[arg(long, value_name = "POLICY")]
    pub restart: Option<String>,
    #[command(flatten)]
    pub names: Names,
}

pub async fn update(context: &Context, args: UpdateArgs) -> Result<ExitCode, Failure> {
    let size = |option: &str, text: &Option<String>| -> Result<Option<i64>, Failure> {
        text.as_deref()
            .map(|t| {
                if t == "-1" {
                    Ok(-1)
                } else {
                    parse_size(t).map(|n| n as i64)
                }
            })
            .transpose()
            .map_err(|e| Failure::invalid(format!("--{option}: {e}")))
    };
    let mut body = json!({});
    let numbers = [
        ("Memory", size("memory", &args.memory)?),
        ("MemorySwap", size("memory-swap", &args.memory_swap)?),
        (
            "MemoryReservation",
            size("memory-reservation", &args.memory_reservation)?,
        ),
        ("NanoCpus", args.cpus.map(|c| (c * 1e9) as i64)),
        ("CpuShares", args.cpu_shares),
        ("CpuPeriod", args.cpu_period),
        ("CpuQuota", args.cpu_quota),
        ("PidsLimit", args.pids_limit),
        ("BlkioWeight", args.blkio_weight.map(i64::from)),
    ];
    for (key, value) in numbers {
        if let Some(value) = value {
            body[key] = json!(value);
        }
    }
    if let Some(cpus) = &args.cpuset_cpus {
        body["CpusetCpus"] = json!(cpus);
    }
    if let Some(policy) = &args.restart {
        let (name, tries) = policy.split_once(':').unwrap_or((policy, "0"));
        let tries: i64 = tries
            .parse()
            .map_err(|_| Failure::invalid("--restart: on-failure:TRIES is wanted"))?;
        body["RestartPolicy"] = json!({"Name": name, "MaximumRetryCount": tries});
    }
    for_each(&args.names.containers, async |name| {
        let answer: Value = context
            .client
            .post(&path_of(name, "update"), &[], &body)
            .await?;
        for warning in list(&answer, "/Warnings") {
            eprintln!("berth: warning: {}", text(warning, ""));
        }
        Ok(Some(name.to_owned()))
    })
    .await
}

#[derive(Debug, Args)]
pub struct PruneArgs {
    /// Do not ask.
    #[arg(short, long, visible_alias = "yes")]
    pub force: bool,
    /// Only those that match: until=24h, label=…
    #[arg(long, value_name = "KEY=VALUE")]
    pub filter: Vec<String>,
}

pub async fn prune(context: &Context, args: PruneArgs) -> Result<ExitCode, Failure> {
    super::super::system::confirm(args.force, "This removes all stopped containers.")?;
    let mut query = Vec::new();
    if let Some(filters) = filters(&args.filter)? {
        query.push(("filters", filters));
    }
    let answer: Value = context
        .client
        .post("/containers/prune", &query, &Value::Null)
        .await?;
    for id in list(&answer, "/ContainersDeleted") {
        output::line(text(id, ""));
    }
    eprintln!(
        "Total reclaimed space: {}",
        format_size_decimal(answer["SpaceReclaimed"].as_u64().unwrap_or(0))
    );
    Ok(ExitCode::SUCCESS)
}
