//! Networks.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::container::{InspectArgs, for_each, inspect};
use super::show::{filters, list, short, text};
use super::{Context, ListOptions};
use crate::client::encode;
use crate::failure::Failure;
use crate::output::{self, Table};

#[derive(Debug, Subcommand)]
pub enum NetworkCommand {
    /// List networks.
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Make a network whose containers and machines find each other by name.
    Create(CreateArgs),
    /// Show networks in full.
    Inspect(InspectArgs),
    /// Connect a container.
    Connect(ConnectArgs),
    /// Disconnect a container.
    Disconnect(DisconnectArgs),
    /// Remove networks.
    #[command(visible_alias = "remove")]
    Rm(RmArgs),
    /// Remove networks nobody uses.
    Prune(super::container::PruneArgs),
}

#[derive(Debug, Args)]
pub struct LsArgs {
    /// Only those that match: driver=bridge, name=…, label=…
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub filter: Vec<String>,
    /// Do not shorten.
    #[arg(long)]
    pub no_trunc: bool,
    #[command(flatten)]
    pub list: ListOptions,
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Kind of network.
    #[arg(short, long, default_value = "bridge")]
    pub driver: String,
    /// Subnet, as in 10.9.0.0/24; may be given once for IPv4 and once for IPv6.
    #[arg(long, value_name = "CIDR")]
    pub subnet: Vec<String>,
    /// Gateway's address.
    #[arg(long, value_name = "ADDRESS")]
    pub gateway: Vec<String>,
    /// Part of the subnet to give addresses from.
    #[arg(long, value_name = "CIDR")]
    pub ip_range: Vec<String>,
    /// No way out of the network.
    #[arg(long)]
    pub internal: bool,
    /// IPv6 too.
    #[arg(long)]
    pub ipv6: bool,
    /// Standalone containers may join (always so here).
    #[arg(long)]
    pub attachable: bool,
    /// Option of the kind: KEY=VALUE.
    #[arg(short, long = "opt", value_name = "KEY=VALUE")]
    pub options: Vec<String>,
    /// Label: KEY=VALUE.
    #[arg(long, value_name = "KEY=VALUE")]
    pub label: Vec<String>,
    /// Name of the network.
    pub name: String,
}

#[derive(Debug, Args)]
pub struct ConnectArgs {
    /// IPv4 address.
    #[arg(long, value_name = "ADDRESS")]
    pub ip: Option<String>,
    /// IPv6 address.
    #[arg(long, value_name = "ADDRESS")]
    pub ip6: Option<String>,
    /// Further name on this network.
    #[arg(long, value_name = "NAME")]
    pub alias: Vec<String>,
    /// The network.
    pub network: String,
    /// The container.
    pub container: String,
}

#[derive(Debug, Args)]
pub struct DisconnectArgs {
    /// Even if the container is gone.
    #[arg(short, long)]
    pub force: bool,
    /// The network.
    pub network: String,
    /// The container.
    pub container: String,
}

#[derive(Debug, Args)]
pub struct RmArgs {
    /// Do not complain of one that does not exist.
    #[arg(short, long)]
    pub force: bool,
    /// The networks.
    #[arg(required = true)]
    pub networks: Vec<String>,
}

/// `KEY=VALUE` options as a JSON object.
pub fn map_of(option: &str, specs: &[String]) -> Result<Map<String, Value>, Failure> {
    specs
        .iter()
        .map(|spec| {
            let (key, value) = spec.split_once('=').unwrap_or((spec, ""));
            if key.is_empty() {
                return Err(Failure::invalid(format!(
                    "--{option} {spec:?}: KEY=VALUE is wanted"
                )));
            }
            Ok((key.to_owned(), json!(value)))
        })
        .collect()
}

pub async fn run(context: &Context, command: NetworkCommand) -> Result<ExitCode, Failure> {
    match command {
        NetworkCommand::Ls(args) => ls(context, args).await,
        NetworkCommand::Create(args) => create(context, args).await,
        NetworkCommand::Inspect(args) => inspect(context, &["/networks/{}"], args).await,
        NetworkCommand::Connect(args) => {
            let body = json!({
                "Container": args.container,
                "EndpointConfig": {
                    "Aliases": args.alias,
                    "IPAMConfig": {
                        "IPv4Address": args.ip.unwrap_or_default(),
                        "IPv6Address": args.ip6.unwrap_or_default(),
                    },
                },
            });
            let path = format!("/networks/{}/connect", encode(&args.network));
            let _: Value = context.client.post(&path, &[], &body).await?;
            Ok(ExitCode::SUCCESS)
        }
        NetworkCommand::Disconnect(args) => {
            let body = json!({"Container": args.container, "Force": args.force});
            let path = format!("/networks/{}/disconnect", encode(&args.network));
            let _: Value = context.client.post(&path, &[], &body).await?;
            Ok(ExitCode::SUCCESS)
        }
        NetworkCommand::Rm(args) => {
            for_each(&args.networks, async |name| {
                match context
                    .client
                    .delete(&format!("/networks/{}", encode(name)), &[])
                    .await
                {
                    Err(failure)
                        if args.force && failure.code == base::Kind::NotFound.exit_code() =>
                    {
                        Ok(None)
                    }
                    other => other.map(|_| Some(name.to_owned())),
                }
            })
            .await
        }
        NetworkCommand::Prune(args) => {
            super::system::confirm(
                args.force,
                "This removes all networks that no container uses.",
            )?;
            let mut query = Vec::new();
            if let Some(filters) = filters(&args.filter)? {
                query.push(("filters", filters));
            }
            let answer: Value = context
                .client
                .post("/networks/prune", &query, &Value::Null)
                .await?;
            for name in list(&answer, "/NetworksDeleted") {
                output::line(text(name, ""));
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn ls(context: &Context, args: LsArgs) -> Result<ExitCode, Failure> {
    let mut query = Vec::new();
    if let Some(filters) = filters(&args.filter)? {
        query.push(("filters", filters));
    }
    let networks: Vec<Value> = context.client.get("/networks", &query).await?;
    let id_of = |network: &Value| {
        let id = text(network, "/Id");
        if args.no_trunc { id } else { short(&id) }
    };
    if args.list.quiet {
        for network in &networks {
            output::line(id_of(network));
        }
        return Ok(ExitCode::SUCCESS);
    }
    if args.list.format.is_document() {
        output::document(args.list.format, &networks)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&["NETWORK ID", "NAME", "DRIVER", "SUBNET", "INTERNAL"]);
    for network in &networks {
        let subnets: Vec<String> = list(network, "/IPAM/Config")
            .iter()
            .map(|c| text(c, "/Subnet"))
            .collect();
        table.row_of(
            network,
            vec![
                id_of(network),
                text(network, "/Name"),
                text(network, "/Driver"),
                subnets.join(", "),
                if network["Internal"] == true {
                    "yes"
                } else {
                    "no"
                }
                .to_owned(),
            ],
        );
    }
    table.print(args.list.format)?;
    Ok(ExitCode::SUCCESS)
}

async fn create(context: &Context, args: CreateArgs) -> Result<ExitCode, Failure> {
    let config: Vec<Value> = args
        .subnet
        .iter()
        .enumerate()
        .map(|(index, subnet)| {
            let mut entry = json!({"Subnet": subnet});
            if let Some(gateway) = args.gateway.get(index) {
                entry["Gateway"] = json!(gateway);
            }
            if let Some(range) = args.ip_range.get(index) {
                entry["IPRange"] = json!(range);
            }
            entry
        })
        .collect();
    if args.subnet.is_empty() && !(args.gateway.is_empty() && args.ip_range.is_empty()) {
        return Err(Failure::invalid("--gateway and --ip-range need a --subnet"));
    }
    let body = json!({
        "Name": args.name,
        "CheckDuplicate": true,
        "Driver": args.driver,
        "Internal": args.internal,
        "Attachable": args.attachable,
        "EnableIPv6": args.ipv6,
        "IPAM": {"Driver": "default", "Config": config},
        "Options": map_of("opt", &args.options)?,
        "Labels": map_of("label", &args.label)?,
    });
    let answer: Value = context.client.post("/networks/create", &[], &body).await?;
    if let Some(warning) = answer["Warning"].as_str().filter(|w| !w.is_empty()) {
        eprintln!("berth: warning: {warning}");
    }
    output::line(text(&answer, "/Id"));
    Ok(ExitCode::SUCCESS)
}
