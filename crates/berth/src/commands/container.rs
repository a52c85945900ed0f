//! The verbs of containers that need no stream of their own.

use std::io::Write;
use std::process::ExitCode;

use base::units::{format_size, format_size_decimal, parse_size};
use clap::Args;
use hyper::Method;
use serde_json::{Value, json};

use super::show::{clip, filters, list, point, seconds, short, since, text};
use super::{Context, ListOptions, ShowOptions};
use crate::client::{each_json, empty, encode};
use crate::failure::Failure;
use crate::output::{self, Format, Table};

fn path_of(container: &str, verb: &str) -> String {
    format!("/containers/{}/{verb}", encode(container))
}

/// Does `one` for every name, prints what it returns, goes on after failures and reports each.
pub async fn for_each<F>(names: &[String], one: F) -> Result<ExitCode, Failure>
where
    F: AsyncFn(&str) -> Result<Option<String>, Failure>,
{
    let mut worst = None;
    for name in names {
        match one(name).await {
            Ok(Some(line)) => output::line(line),
            Ok(None) => {}
            Err(failure) => {
                failure.report();
                worst = Some(failure.code);
            }
        }
    }
    Ok(worst.map_or(ExitCode::SUCCESS, ExitCode::from))
}

#[derive(Debug, Args)]
pub struct PsArgs {
    /// Stopped ones too.
    #[arg(short, long)]
    pub all: bool,
    /// Only those that match: status=running, name=web, label=key=value, ancestor=IMAGE …
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub filter: Vec<String>,
    /// The last N made, running or not.
    #[arg(short = 'n', long, value_name = "N")]
    pub last: Option<u32>,
    /// The last one made.
    #[arg(short, long)]
    pub latest: bool,
    /// Show sizes.
    #[arg(short, long)]
    pub size: bool,
    /// Do not shorten.
    #[arg(long)]
    pub no_trunc: bool,
    #[command(flatten)]
    pub list: ListOptions,
}

fn ports(container: &Value) -> String {
    let mut shown: Vec<String> = list(container, "/Ports")
        .iter()
        .map(|port| {
            let inside = format!("{}/{}", text(port, "/PrivatePort"), text(port, "/Type"));
            if port["PublicPort"].is_null() {
                return inside;
            }
            let address = text(port, "/IP");
            let address = if address.contains(':') {
                format!("[{address}]")
            } else {
                address
            };
            format!("{address}:{}->{inside}", text(port, "/PublicPort"))
        })
        .collect();
    shown.sort();
    shown.dedup();
    shown.join(", ")
}

pub async fn ps(context: &Context, args: PsArgs) -> Result<ExitCode, Failure> {
    let mut query = Vec::new();
    if args.all || args.latest || args.last.is_some() {
        query.push(("all", "1".to_owned()));
    }
    if let Some(limit) = args.last.or(args.latest.then_some(1)) {
        query.push(("limit", limit.to_string()));
    }
    if args.size {
        query.push(("size", "1".into()));
    }
    if let Some(filters) = filters(&args.filter)? {
        query.push(("filters", filters));
    }
    let containers: Vec<Value> = context.client.get("/containers/json", &query).await?;
    if args.list.quiet {
        for container in &containers {
            let id = text(container, "/Id");
            output::line(if args.no_trunc { id } else { short(&id) });
        }
        return Ok(ExitCode::SUCCESS);
    }
    if args.list.format != Format::Table {
        output::document(args.list.format, &containers)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut heading = vec![
        "CONTAINER ID",
        "IMAGE",
        "COMMAND",
        "CREATED",
        "STATUS",
        "PORTS",
        "NAMES",
    ];
    if args.size {
        heading.push("SIZE");
    }
    let mut table = Table::new(&heading);
    for container in &containers {
        let id = text(container, "/Id");
        let command = text(container, "/Command");
        let image = text(container, "/Image");
        let names: Vec<String> = list(container, "/Names")
            .iter()
            .filter_map(Value::as_str)
            .map(|name| name.trim_start_matches('/').to_owned())
            .collect();
        let mut row = vec![
            if args.no_trunc { id } else { short(&id) },
            if image.starts_with("sha256:") && !args.no_trunc {
                short(&image)
            } else {
                image
            },
            format!(
                "\"{}\"",
                if args.no_trunc {
                    command
                } else {
                    clip(&command, 20)
                }
            ),
            since(container["Created"].as_i64().unwrap_or(0)),
            text(container, "/Status"),
            ports(container),
            names.join(","),
        ];
        if args.size {
            row.push(format!(
                "{} (virtual {})",
                format_size_decimal(container["SizeRw"].as_u64().unwrap_or(0)),
                format_size_decimal(container["SizeRootFs"].as_u64().unwrap_or(0))
            ));
        }
        table.row(row);
    }
    output::print(&table.render());
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Args)]
pub struct Names {
    /// The containers.
    #[arg(required = true)]
    pub containers: Vec<String>,
}

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
pub struct LogsArgs {
    /// Go on with what is written from now.
    #[arg(short, long)]
    pub follow: bool,
    /// Only what is newer: a time, or a duration back from now.
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Only what is older.
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// The last N lines.
    #[arg(short = 'n', long, value_name = "N", default_value = "all")]
    pub tail: String,
    /// Show when each line was written.
    #[arg(short, long)]
    pub timestamps: bool,
    /// The container.
    pub container: String,
}

pub async fn logs(context: &Context, args: LogsArgs) -> Result<ExitCode, Failure> {
    let about: Value = context
        .client
        .get(&path_of(&args.container, "json"), &[])
        .await?;
    let mut query = vec![
        ("stdout", "1".to_owned()),
        ("stderr", "1".into()),
        ("tail", args.tail),
    ];
    if args.follow {
        query.push(("follow", "1".into()));
    }
    if args.timestamps {
        query.push(("timestamps", "1".into()));
    }
    for (key, value) in [("since", args.since), ("until", args.until)] {
        if let Some(value) = value {
            query.push((key, point(&value)?));
        }
    }
    let response = context
        .client
        .send(
            Method::GET,
            &path_of(&args.container, "logs"),
            &query,
            empty(),
            &[],
        )
        .await?;
    let reader = body_reader(response);
    match crate::terminal::copy_output(reader, about["Config"]["Tty"] == true).await {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        Err(error) => Err(Failure::io("the log broke off", &error)),
    }
}

/// A response body as an asynchronous reader.
pub fn body_reader(
    response: hyper::Response<hyper::body::Incoming>,
) -> impl tokio::io::AsyncRead + Unpin + Send {
    use futures_util::StreamExt;
    use http_body_util::BodyExt;
    let stream = BodyExt::into_data_stream(response.into_body())
        .map(|chunk| chunk.map_err(std::io::Error::other));
    tokio_util::io::StreamReader::new(stream)
}

#[derive(Debug, Args)]
pub struct TopArgs {
    /// The container.
    pub container: String,
    /// Options of ps.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub options: Vec<String>,
}

pub async fn top(context: &Context, args: TopArgs) -> Result<ExitCode, Failure> {
    let mut query = Vec::new();
    if !args.options.is_empty() {
        query.push(("ps_args", args.options.join(" ")));
    }
    let top: Value = context
        .client
        .get(&path_of(&args.container, "top"), &query)
        .await?;
    let titles: Vec<String> = list(&top, "/Titles").iter().map(|t| text(t, "")).collect();
    let mut lines = vec![titles];
    lines.extend(
        list(&top, "/Processes")
            .iter()
            .map(|p| list(p, "").iter().map(|c| text(c, "")).collect()),
    );
    let mut table = Table::new(&[]);
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let heading: Vec<&'static str> = vec![""; columns];
    if columns > 0 {
        table = Table::new(&heading);
        for line in lines {
            table.row(line);
        }
    }
    // The titles come from the daemon: the table's own heading stays empty and is cut off.
    let rendered = table.render();
    output::print(rendered.split_once('\n').map_or("", |(_, rest)| rest));
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Args)]
pub struct OneArgs {
    /// The container.
    pub container: String,
}

pub async fn diff(context: &Context, args: OneArgs) -> Result<ExitCode, Failure> {
    let changes: Value = context
        .client
        .get(&path_of(&args.container, "changes"), &[])
        .await?;
    for change in list(&changes, "") {
        let kind = ["C", "A", "D"][change["Kind"].as_u64().unwrap_or(0).min(2) as usize];
        output::line(format!("{kind} {}", text(change, "/Path")));
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Args)]
pub struct PortArgs {
    /// The container.
    pub container: String,
    /// Only this port, as in 80 or 53/udp.
    pub port: Option<String>,
}

pub async fn port(context: &Context, args: PortArgs) -> Result<ExitCode, Failure> {
    let about: Value = context
        .client
        .get(&path_of(&args.container, "json"), &[])
        .await?;
    let wanted = args.port.map(|p| {
        if p.contains('/') {
            p
        } else {
            format!("{p}/tcp")
        }
    });
    let mut found = false;
    let map = about["NetworkSettings"]["Ports"]
        .as_object()
        .cloned()
        .unwrap_or_default();
    for (port, bindings) in &map {
        if wanted.as_ref().is_some_and(|w| w != port) {
            continue;
        }
        for binding in list(bindings, "") {
            found = true;
            let address = text(binding, "/HostIp");
            let address = if address.contains(':') {
                format!("[{address}]")
            } else {
                address
            };
            let line = format!("{address}:{}", text(binding, "/HostPort"));
            output::line(if wanted.is_some() {
                line
            } else {
                format!("{port} -> {line}")
            });
        }
    }
    match wanted {
        Some(port) if !found => Err(Failure::new(
            base::Kind::NotFound,
            format!(
                "port {port} of container {} is not published",
                args.container
            ),
        )),
        _ => Ok(ExitCode::SUCCESS),
    }
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Compute sizes too.
    #[arg(short, long)]
    pub size: bool,
    #[command(flatten)]
    pub show: ShowOptions,
    /// What to show.
    #[arg(required = true)]
    pub names: Vec<String>,
}

/// Prints the JSON of every name found at one of `paths` (tried in order; `{}` stands for the name).
pub async fn inspect(
    context: &Context,
    paths: &[&str],
    args: InspectArgs,
) -> Result<ExitCode, Failure> {
    let mut found = Vec::new();
    let mut worst = None;
    for name in &args.names {
        let mut last = None;
        for path in paths {
            let query = if args.size {
                vec![("size", "1".to_owned())]
            } else {
                Vec::new()
            };
            match context
                .client
                .get::<Value>(&path.replace("{}", &encode(name)), &query)
                .await
            {
                Ok(value) => {
                    found.push(value);
                    last = None;
                    break;
                }
                Err(failure) if failure.code == base::Kind::NotFound.exit_code() => {
                    last = Some(failure)
                }
                Err(failure) => return Err(failure),
            }
        }
        if let Some(failure) = last {
            let failure = if paths.len() > 1 {
                Failure::new(base::Kind::NotFound, format!("nothing is named {name}"))
                    .with_fix("berth ps -a; berth images; berth network ls; berth volume ls")
            } else {
                failure
            };
            failure.report();
            worst = Some(failure.code);
        }
    }
    output::document(args.show.format, &found)?;
    Ok(worst.map_or(ExitCode::SUCCESS, ExitCode::from))
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
pub struct StatsArgs {
    /// Stopped ones too.
    #[arg(short, long)]
    pub all: bool,
    /// One reading only.
    #[arg(long)]
    pub no_stream: bool,
    /// How to write the answer.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub format: Format,
    /// The containers; all running ones if not given.
    pub containers: Vec<String>,
}

/// CPU use in percent of one CPU, as docker computes it from two readings.
fn cpu_percent(stats: &Value) -> f64 {
    let number = |pointer: &str| {
        stats
            .pointer(pointer)
            .and_then(Value::as_f64)
            .unwrap_or(0.0)
    };
    let used =
        number("/cpu_stats/cpu_usage/total_usage") - number("/precpu_stats/cpu_usage/total_usage");
    let system = number("/cpu_stats/system_cpu_usage") - number("/precpu_stats/system_cpu_usage");
    let cpus = number("/cpu_stats/online_cpus").max(1.0);
    if used > 0.0 && system > 0.0 {
        used / system * cpus * 100.0
    } else {
        0.0
    }
}

fn stats_row(stats: &Value) -> Vec<String> {
    let number = |pointer: &str| stats.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
    let cache = number("/memory_stats/stats/total_inactive_file")
        .max(number("/memory_stats/stats/inactive_file"));
    let used = number("/memory_stats/usage").saturating_sub(cache);
    let limit = number("/memory_stats/limit");
    let (mut received, mut sent) = (0, 0);
    for network in stats["networks"]
        .as_object()
        .into_iter()
        .flat_map(|m| m.values())
    {
        received += network["rx_bytes"].as_u64().unwrap_or(0);
        sent += network["tx_bytes"].as_u64().unwrap_or(0);
    }
    let (mut read, mut written) = (0, 0);
    for entry in list(stats, "/blkio_stats/io_service_bytes_recursive") {
        match entry["op"]
            .as_str()
            .unwrap_or_default()
            .to_lowercase()
            .as_str()
        {
            "read" => read += entry["value"].as_u64().unwrap_or(0),
            "write" => written += entry["value"].as_u64().unwrap_or(0),
            _ => {}
        }
    }
    vec![
        short(&text(stats, "/id")),
        text(stats, "/name").trim_start_matches('/').to_owned(),
        format!("{:.2}%", cpu_percent(stats)),
        format!("{} / {}", format_size(used), format_size(limit)),
        format!(
            "{:.2}%",
            if limit > 0 {
                used as f64 / limit as f64 * 100.0
            } else {
                0.0
            }
        ),
        format!(
            "{} / {}",
            format_size_decimal(received),
            format_size_decimal(sent)
        ),
        format!(
            "{} / {}",
            format_size_decimal(read),
            format_size_decimal(written)
        ),
        text(stats, "/pids_stats/current"),
    ]
}

const STATS_HEADING: [&str; 8] = [
    "CONTAINER ID",
    "NAME",
    "CPU %",
    "MEM USAGE / LIMIT",
    "MEM %",
    "NET I/O",
    "BLOCK I/O",
    "PIDS",
];

pub async fn stats(context: &Context, args: StatsArgs) -> Result<ExitCode, Failure> {
    loop {
        let names = if args.containers.is_empty() {
            let query = if args.all {
                vec![("all", "1".to_owned())]
            } else {
                Vec::new()
            };
            let containers: Vec<Value> = context.client.get("/containers/json", &query).await?;
            containers.iter().map(|c| text(c, "/Id")).collect()
        } else {
            args.containers.clone()
        };
        let readings = names.iter().map(|name| {
            let client = context.client.clone();
            let path = path_of(name, "stats");
            async move {
                client
                    .get::<Value>(&path, &[("stream", "0".to_owned())])
                    .await
            }
        });
        let readings = futures_util::future::join_all(readings).await;
        let mut table = Table::new(&STATS_HEADING);
        let mut all = Vec::new();
        for reading in readings {
            match reading {
                Ok(stats) => {
                    table.row(stats_row(&stats));
                    all.push(stats);
                }
                // One that ended meanwhile is no failure of a list of all.
                Err(_) if args.containers.is_empty() => {}
                Err(failure) => return Err(failure),
            }
        }
        match args.format {
            Format::Table => {
                if !args.no_stream {
                    output::print("\x1b[2J\x1b[H");
                }
                output::print(&table.render());
            }
            Format::Json if !args.no_stream => {
                for stats in &all {
                    output::line(stats.to_string());
                }
            }
            format => output::document(format, &all)?,
        }
        if args.no_stream {
            return Ok(ExitCode::SUCCESS);
        }
        let _ = std::io::stdout().flush();
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
}

#[derive(Debug, Args)]
pub struct CommitArgs {
    /// Author of the change.
    #[arg(short, long)]
    pub author: Option<String>,
    /// Dockerfile instruction to apply: 'CMD ["x"]'.
    #[arg(short, long, value_name = "INSTRUCTION")]
    pub change: Vec<String>,
    /// Message of the commit.
    #[arg(short, long)]
    pub message: Option<String>,
    /// Do not pause the container meanwhile.
    #[arg(long)]
    pub no_pause: bool,
    /// The container.
    pub container: String,
    /// Name of the image.
    pub image: Option<String>,
}

pub async fn commit(context: &Context, args: CommitArgs) -> Result<ExitCode, Failure> {
    let mut query = vec![
        ("container", args.container),
        ("pause", (!args.no_pause).to_string()),
    ];
    if let Some(image) = args.image {
        let (repository, tag) = super::image::split_tag(&image);
        query.push(("repo", repository.to_owned()));
        query.push(("tag", tag.unwrap_or("latest").to_owned()));
    }
    for (key, value) in [("author", args.author), ("comment", args.message)] {
        if let Some(value) = value {
            query.push((key, value));
        }
    }
    for change in args.change {
        query.push(("changes", change));
    }
    let answer: Value = context.client.post("/commit", &query, &Value::Null).await?;
    output::line(text(&answer, "/Id"));
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Write to this file and not to standard output.
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<std::path::PathBuf>,
    /// The container.
    pub container: String,
}

pub async fn export(context: &Context, args: ExportArgs) -> Result<ExitCode, Failure> {
    let response = context
        .client
        .send(
            Method::GET,
            &path_of(&args.container, "export"),
            &[],
            empty(),
            &[],
        )
        .await?;
    super::image::save_body(response, args.output.as_deref()).await
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
    super::system::confirm(args.force, "This removes all stopped containers.")?;
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

#[derive(Debug, Args)]
pub struct EventsArgs {
    /// From this time on.
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Until this time.
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// Only those that match: container=web, event=die, type=network …
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub filter: Vec<String>,
    /// How to write the answer.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub format: Format,
}

pub async fn events(context: &Context, args: EventsArgs) -> Result<ExitCode, Failure> {
    let mut query = Vec::new();
    for (key, value) in [("since", args.since), ("until", args.until)] {
        if let Some(value) = value {
            query.push((key, point(&value)?));
        }
    }
    if let Some(filters) = filters(&args.filter)? {
        query.push(("filters", filters));
    }
    let response = context
        .client
        .send(Method::GET, "/events", &query, empty(), &[])
        .await?;
    each_json(response, |event| {
        if args.format == Format::Table {
            let attributes: Vec<String> = event["Actor"]["Attributes"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(k, v)| format!("{k}={}", text(v, "")))
                .collect();
            let nanos = event["timeNano"].as_i64().unwrap_or(0);
            let time = jiff::Timestamp::from_nanosecond(i128::from(nanos)).unwrap_or_default();
            output::line(format!(
                "{} {} {} {} ({})",
                base::time::rfc3339(time),
                text(&event, "/Type"),
                text(&event, "/Action"),
                text(&event, "/Actor/ID"),
                attributes.join(", ")
            ));
        } else {
            output::line(event.to_string());
        }
        Ok(())
    })
    .await?;
    Ok(ExitCode::SUCCESS)
}

/// Age in whole seconds of an RFC 3339 text, for tables.
pub fn age(text: &str) -> String {
    since(seconds(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_use_is_a_share_of_one_cpu() {
        let stats = json!({
            "cpu_stats": {"cpu_usage": {"total_usage": 200}, "system_cpu_usage": 1000, "online_cpus": 2},
            "precpu_stats": {"cpu_usage": {"total_usage": 100}, "system_cpu_usage": 600},
        });
        assert!((cpu_percent(&stats) - 50.0).abs() < 1e-9);
        assert!(cpu_percent(&json!({})).abs() < 1e-9);
    }

    #[test]
    fn a_port_seen_on_two_addresses_is_shown_twice_but_never_doubled() {
        let port = json!({"IP": "0.0.0.0", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"});
        let shown = ports(&json!({"Ports": [port, port]}));
        assert_eq!(shown, "0.0.0.0:8080->80/tcp");
    }
}
