//! `ps`.

use std::process::ExitCode;

use base::units::format_size_decimal;
use clap::Args;
use serde_json::Value;

use super::super::show::{clip, filters, list, short, since, text};
use super::super::{Context, ListOptions};
use crate::failure::Failure;
use crate::output::{self, Table};

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
    if args.list.format.is_document() {
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
        table.row_of(container, row);
    }
    table.print(args.list.format)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_port_seen_on_two_addresses_is_shown_twice_but_never_doubled() {
        let port = json!({"IP": "0.0.0.0", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"});
        let shown = ports(&json!({"Ports": [port, port]}));
        assert_eq!(shown, "0.0.0.0:8080->80/tcp");
    }
}
