//! Volumes.

use std::process::ExitCode;

use base::units::format_size_decimal;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::container::{InspectArgs, for_each, inspect};
use super::network::map_of;
use super::show::{filters, list, text};
use super::{Context, ListOptions};
use crate::client::encode;
use crate::failure::Failure;
use crate::output::{self, Table};

#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// List volumes.
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Make a volume.
    Create(CreateArgs),
    /// Show volumes in full.
    Inspect(InspectArgs),
    /// Remove volumes and what is in them.
    #[command(visible_alias = "remove")]
    Rm(RmArgs),
    /// Remove anonymous volumes nobody uses; with --all, named ones too.
    Prune(PruneArgs),
}

#[derive(Debug, Args)]
pub struct LsArgs {
    /// Only those that match: dangling=true, name=…, label=…
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub filter: Vec<String>,
    #[command(flatten)]
    pub list: ListOptions,
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Kind of volume.
    #[arg(short, long, default_value = "local")]
    pub driver: String,
    /// Option of the kind: type=tmpfs, device=…, o=…
    #[arg(short, long = "opt", value_name = "KEY=VALUE")]
    pub options: Vec<String>,
    /// Label: KEY=VALUE.
    #[arg(long, value_name = "KEY=VALUE")]
    pub label: Vec<String>,
    /// Name; a random one if not given.
    pub name: Option<String>,
}

#[derive(Debug, Args)]
pub struct RmArgs {
    /// Do not complain of one that does not exist.
    #[arg(short, long)]
    pub force: bool,
    /// The volumes.
    #[arg(required = true)]
    pub volumes: Vec<String>,
}

#[derive(Debug, Args)]
pub struct PruneArgs {
    /// Named volumes too.
    #[arg(short, long)]
    pub all: bool,
    /// Do not ask.
    #[arg(short, long, visible_alias = "yes")]
    pub force: bool,
    /// Only those that match: label=…
    #[arg(long, value_name = "KEY=VALUE")]
    pub filter: Vec<String>,
}

pub async fn run(context: &Context, command: VolumeCommand) -> Result<ExitCode, Failure> {
    match command {
        VolumeCommand::Ls(args) => ls(context, args).await,
        VolumeCommand::Create(args) => {
            let body = json!({
                "Name": args.name.unwrap_or_default(),
                "Driver": args.driver,
                "DriverOpts": map_of("opt", &args.options)?,
                "Labels": map_of("label", &args.label)?,
            });
            let answer: Value = context.client.post("/volumes/create", &[], &body).await?;
            output::line(text(&answer, "/Name"));
            Ok(ExitCode::SUCCESS)
        }
        VolumeCommand::Inspect(args) => inspect(context, &["/volumes/{}"], args).await,
        VolumeCommand::Rm(args) => {
            let query = [("force", args.force.to_string())];
            for_each(&args.volumes, async |name| {
                context
                    .client
                    .delete(&format!("/volumes/{}", encode(name)), &query)
                    .await?;
                Ok(Some(name.to_owned()))
            })
            .await
        }
        VolumeCommand::Prune(args) => {
            super::system::confirm(
                args.force,
                "This removes volumes that no container uses, with what is in them.",
            )?;
            let mut specs = args.filter;
            if args.all {
                specs.push("all=true".into());
            }
            let mut query = Vec::new();
            if let Some(filters) = filters(&specs)? {
                query.push(("filters", filters));
            }
            let answer: Value = context
                .client
                .post("/volumes/prune", &query, &Value::Null)
                .await?;
            for name in list(&answer, "/VolumesDeleted") {
                output::line(text(name, ""));
            }
            eprintln!(
                "Total reclaimed space: {}",
                format_size_decimal(answer["SpaceReclaimed"].as_u64().unwrap_or(0))
            );
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn ls(context: &Context, args: LsArgs) -> Result<ExitCode, Failure> {
    let mut query = Vec::new();
    if let Some(filters) = filters(&args.filter)? {
        query.push(("filters", filters));
    }
    let answer: Value = context.client.get("/volumes", &query).await?;
    let volumes = list(&answer, "/Volumes");
    if args.list.quiet {
        for volume in volumes {
            output::line(text(volume, "/Name"));
        }
        return Ok(ExitCode::SUCCESS);
    }
    if args.list.format.is_document() {
        output::document(args.list.format, &volumes)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&["DRIVER", "VOLUME NAME", "CREATED"]);
    for volume in volumes {
        table.row_of(
            volume,
            vec![
                text(volume, "/Driver"),
                text(volume, "/Name"),
                super::container::age(&text(volume, "/CreatedAt")),
            ],
        );
    }
    table.print(args.list.format)?;
    Ok(ExitCode::SUCCESS)
}
