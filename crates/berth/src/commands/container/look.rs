//! What a container is: inspect, ports, changed files.

use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::super::show::{list, text};
use super::super::{Context, ShowOptions};
use super::path_of;
use crate::client::encode;
use crate::failure::Failure;
use crate::output::{self, Format};

#[derive(Debug, Args)]
pub struct DiffArgs {
    /// table, json, yaml, or a Go template as '{{.Name}}'.
    #[arg(long, default_value_t, value_name = "FORMAT")]
    pub format: Format,
    /// The container.
    pub container: String,
}

pub async fn diff(context: &Context, args: DiffArgs) -> Result<ExitCode, Failure> {
    let changes: Value = context
        .client
        .get(&path_of(&args.container, "changes"), &[])
        .await?;
    if args.format != Format::Table {
        output::document(args.format, &changes)?;
        return Ok(ExitCode::SUCCESS);
    }
    for change in list(&changes, "") {
        let kind = ["C", "A", "D"][change["Kind"].as_u64().unwrap_or(0).min(2) as usize];
        output::line(format!("{kind} {}", text(change, "/Path")));
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Args)]
pub struct PortArgs {
    /// table, json, yaml, or a Go template as '{{.Name}}'.
    #[arg(long, default_value_t, value_name = "FORMAT")]
    pub format: Format,
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
    let mut map = about["NetworkSettings"]["Ports"]
        .as_object()
        .cloned()
        .unwrap_or_default();
    map.retain(|port, bindings| {
        !list(bindings, "").is_empty() && wanted.as_ref().is_none_or(|wanted| wanted == port)
    });
    if let Some(port) = wanted.as_ref().filter(|_| map.is_empty()) {
        let message = format!(
            "port {port} of container {} is not published",
            args.container
        );
        return Err(Failure::new(base::Kind::NotFound, message)
            .with_fix(format!("see what is: berth port {}", args.container)));
    }
    if args.format != Format::Table {
        output::document(args.format, &map)?;
        return Ok(ExitCode::SUCCESS);
    }
    for (port, bindings) in &map {
        for binding in list(bindings, "") {
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
    Ok(ExitCode::SUCCESS)
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
                    .with_fix("berth ps -a; berth images; berth network ls; berth volume ls; berth machine list")
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
