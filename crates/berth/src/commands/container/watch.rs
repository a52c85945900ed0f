//! What goes on in containers: logs, stats, processes, events.

use std::io::Write;
use std::process::ExitCode;

use base::units::{format_size, format_size_decimal};
use clap::Args;
use hyper::Method;
use serde_json::Value;

use super::super::Context;
use super::super::show::{filters, list, point, short, text};
use super::path_of;
use crate::client::{each_json, empty};
use crate::failure::Failure;
use crate::output::{self, Format, Table};

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
    /// table, json, yaml, or a Go template as '{{.Name}}'.
    #[arg(long, default_value_t, value_name = "FORMAT")]
    pub format: Format,
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
    if args.format != Format::Table {
        output::document(args.format, &top)?;
        return Ok(ExitCode::SUCCESS);
    }
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
pub struct StatsArgs {
    /// Stopped ones too.
    #[arg(short, long)]
    pub all: bool,
    /// One reading only.
    #[arg(long)]
    pub no_stream: bool,
    /// table, json, yaml, or a Go template as '{{.Name}}'.
    #[arg(long, default_value_t, value_name = "FORMAT")]
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
                    table.row_of(&stats, stats_row(&stats));
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
            Format::Template(_) => table.print(args.format)?,
            format => {
                if format == Format::Yaml && !args.no_stream {
                    output::line("---");
                }
                output::document(format, &all)?;
            }
        }
        if args.no_stream {
            return Ok(ExitCode::SUCCESS);
        }
        let _ = std::io::stdout().flush();
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
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
    /// table, json, yaml, or a Go template as '{{.Name}}'.
    #[arg(long, default_value_t, value_name = "FORMAT")]
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
        } else if args.format == Format::Yaml {
            // A stream of YAML documents.
            output::line("---");
            output::document(Format::Yaml, &event)?;
        } else if let Format::Template(template) = args.format {
            output::line(template.render(&event)?);
        } else {
            output::line(event.to_string());
        }
        Ok(())
    })
    .await?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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
}
