//! The daemon and the host as a whole.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use base::units::{format_size, format_size_decimal};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::show::{filters, list, text};
use super::{Context, ShowOptions};
use crate::failure::Failure;
use crate::output::{self, Format, Table};

#[derive(Debug, Subcommand)]
pub enum SystemCommand {
    /// Show what takes disk space.
    Df(DfArgs),
    /// Remove what nobody uses.
    Prune(PruneArgs),
    /// Show the daemon and the host.
    Info(InfoArgs),
    /// Follow what happens.
    Events(super::container::EventsArgs),
    /// End the daemon; containers go on.
    Stop,
}

#[derive(Debug, Args)]
pub struct InfoArgs {
    /// table, json, yaml, or a Go template as '{{.Name}}'.
    #[arg(long, default_value_t, value_name = "FORMAT")]
    pub format: Format,
}

#[derive(Debug, Args)]
pub struct DfArgs {
    /// Each image, container and volume.
    #[arg(short, long)]
    pub verbose: bool,
    /// table, json, yaml, or a Go template as '{{.Name}}'.
    #[arg(long, default_value_t, value_name = "FORMAT")]
    pub format: Format,
}

#[derive(Debug, Args)]
pub struct PruneArgs {
    /// All unused images, not only untagged ones.
    #[arg(short, long)]
    pub all: bool,
    /// Volumes too.
    #[arg(long)]
    pub volumes: bool,
    /// Do not ask.
    #[arg(short, long, visible_alias = "yes")]
    pub force: bool,
    /// Say what would be removed and remove nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Only those that match: until=24h, label=…
    #[arg(long, value_name = "KEY=VALUE")]
    pub filter: Vec<String>,
}

/// Asks before something is lost, unless told not to.
pub fn confirm(force: bool, what: &str) -> Result<(), Failure> {
    if force {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(
            Failure::invalid(format!("{what} Nobody is there to confirm it."))
                .with_fix("say --force"),
        );
    }
    eprint!("{what} Go on? [y/N] ");
    let _ = std::io::stderr().flush();
    let mut answer = String::new();
    std::io::stdin()
        .read_line(&mut answer)
        .map_err(|e| Failure::io("cannot read the answer", &e))?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        Ok(())
    } else {
        Err(Failure {
            message: "nothing was removed".into(),
            fix: None,
            code: 1,
        })
    }
}

pub async fn run(context: &Context, command: SystemCommand) -> Result<ExitCode, Failure> {
    match command {
        SystemCommand::Df(args) => df(context, args).await,
        SystemCommand::Prune(args) => prune(context, args).await,
        SystemCommand::Info(args) => info(context, args).await,
        SystemCommand::Events(args) => super::container::events(context, args).await,
        SystemCommand::Stop => {
            context.client.act("/berth/v1/shutdown", &[]).await?;
            eprintln!(
                "berth: the daemon ends; containers go on and are found again by the next one"
            );
            Ok(ExitCode::SUCCESS)
        }
    }
}

struct Usage {
    kind: &'static str,
    total: usize,
    active: usize,
    size: u64,
    reclaimable: u64,
}

fn usage(df: &Value) -> [Usage; 4] {
    let number = |value: &Value, key: &str| value[key].as_i64().unwrap_or(0).max(0) as u64;
    let images = list(df, "/Images");
    let containers = list(df, "/Containers");
    let volumes = list(df, "/Volumes");
    let cache = list(df, "/BuildCache");
    let used_image = |image: &&Value| image["Containers"].as_i64().unwrap_or(0) > 0;
    let running = |container: &&Value| container["State"] == "running";
    let in_use = |volume: &&Value| volume["UsageData"]["RefCount"].as_i64().unwrap_or(0) > 0;
    let volume_size = |volume: &Value| number(&volume["UsageData"], "Size");
    [
        Usage {
            kind: "Images",
            total: images.len(),
            active: images.iter().filter(used_image).count(),
            size: number(df, "LayersSize"),
            // As docker counts: all layers but those that only images in use have.
            reclaimable: number(df, "LayersSize").saturating_sub(
                images
                    .iter()
                    .filter(used_image)
                    .map(|i| number(i, "Size").saturating_sub(number(i, "SharedSize")))
                    .sum(),
            ),
        },
        Usage {
            kind: "Containers",
            total: containers.len(),
            active: containers.iter().filter(running).count(),
            size: containers.iter().map(|c| number(c, "SizeRw")).sum(),
            reclaimable: containers
                .iter()
                .filter(|c| !running(c))
                .map(|c| number(c, "SizeRw"))
                .sum(),
        },
        Usage {
            kind: "Local Volumes",
            total: volumes.len(),
            active: volumes.iter().filter(in_use).count(),
            size: volumes.iter().map(volume_size).sum(),
            reclaimable: volumes.iter().filter(|v| !in_use(v)).map(volume_size).sum(),
        },
        Usage {
            kind: "Build Cache",
            total: cache.len(),
            active: cache.iter().filter(|c| c["InUse"] == true).count(),
            size: cache.iter().map(|c| number(c, "Size")).sum(),
            reclaimable: cache
                .iter()
                .filter(|c| c["InUse"] != true)
                .map(|c| number(c, "Size"))
                .sum(),
        },
    ]
}

async fn df(context: &Context, args: DfArgs) -> Result<ExitCode, Failure> {
    let mut df: Value = context.client.get("/system/df", &[]).await?;
    let machines: Value = context.client.get("/berth/v1/storage", &[]).await?;
    df["Machines"] = machines.clone();
    if args.format.is_document() {
        output::document(args.format, &df)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&["TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"]);
    for row in usage(&df) {
        let percent = (row.reclaimable.min(row.size) * 100)
            .checked_div(row.size)
            .map_or_else(String::new, |percent| format!(" ({percent}%)"));
        table.row(vec![
            row.kind.to_owned(),
            row.total.to_string(),
            row.active.to_string(),
            format_size_decimal(row.size),
            format!("{}{percent}", format_size_decimal(row.reclaimable)),
        ]);
    }
    let figure = |key: &str| machines[key].as_u64().unwrap_or(0);
    table.row(vec![
        "Machines".to_owned(),
        figure("machines").to_string(),
        figure("running").to_string(),
        format_size_decimal(figure("used") + figure("shared")),
        format_size_decimal(figure("reclaimable")),
    ]);
    table.print(args.format)?;
    if args.format != Format::Table {
        return Ok(ExitCode::SUCCESS);
    }
    if figure("machines") > 0 {
        output::line(format!(
            "\nMachines' disks: {} promised, {} used.",
            format_size_decimal(figure("promised")),
            format_size_decimal(figure("used")),
        ));
        for place in list(&machines, "/file_systems") {
            let figure = |key: &str| format_size_decimal(place[key].as_u64().unwrap_or(0));
            output::line(format!(
                "On the file system of {}: {} still to grow; {} are free.",
                text(place, "/path"),
                figure("outstanding"),
                figure("free"),
            ));
        }
    }
    if let Some(warning) = machines["warning"].as_str() {
        eprintln!("berth: warning: {warning}");
    }
    if args.verbose {
        let mut table = Table::new(&["KIND", "NAME", "SIZE"]);
        for image in list(&df, "/Images") {
            let name = list(image, "/RepoTags")
                .first()
                .map_or_else(|| text(image, "/Id"), |t| text(t, ""));
            table.row(vec![
                "image".into(),
                name,
                format_size_decimal(image["Size"].as_u64().unwrap_or(0)),
            ]);
        }
        for container in list(&df, "/Containers") {
            let name = list(container, "/Names")
                .first()
                .map_or_else(String::new, |t| text(t, ""));
            table.row(vec![
                "container".into(),
                name.trim_start_matches('/').to_owned(),
                format_size_decimal(container["SizeRw"].as_u64().unwrap_or(0)),
            ]);
        }
        for volume in list(&df, "/Volumes") {
            let size = volume["UsageData"]["Size"].as_i64().unwrap_or(0).max(0) as u64;
            table.row(vec![
                "volume".into(),
                text(volume, "/Name"),
                format_size_decimal(size),
            ]);
        }
        output::line("");
        output::print(&table.render());
    }
    if let Some(warning) = df["Warning"].as_str().filter(|w| !w.is_empty()) {
        eprintln!("berth: warning: {warning}");
    }
    Ok(ExitCode::SUCCESS)
}

async fn prune(context: &Context, args: PruneArgs) -> Result<ExitCode, Failure> {
    let mut what = vec!["all stopped containers", "all networks no container uses"];
    what.push(if args.all {
        "all images no container uses"
    } else {
        "all untagged images"
    });
    what.push("the build cache");
    if args.volumes {
        what.push("all anonymous volumes no container uses");
    }
    if args.dry_run {
        let df: Value = context.client.get("/system/df", &[]).await?;
        output::line(format!("Would remove: {}.", what.join(", ")));
        let total: u64 = usage(&df)
            .iter()
            .filter(|u| args.volumes || u.kind != "Local Volumes")
            .map(|u| u.reclaimable)
            .sum();
        output::line(format!(
            "At most {} would come free.",
            format_size_decimal(total)
        ));
        return Ok(ExitCode::SUCCESS);
    }
    confirm(args.force, &format!("This removes {}.", what.join(", ")))?;
    let mut reclaimed = 0;
    let mut step = async |path: &str, specs: Vec<String>, removed: &str| -> Result<(), Failure> {
        let mut query = Vec::new();
        if let Some(filters) = filters(&specs)? {
            query.push(("filters", filters));
        }
        let answer: Value = context.client.post(path, &query, &json!(null)).await?;
        reclaimed += answer["SpaceReclaimed"].as_u64().unwrap_or(0);
        for entry in list(&answer, removed) {
            match entry {
                Value::String(name) => output::line(name),
                other => {
                    for word in ["Untagged", "Deleted"] {
                        if let Some(name) = other[word].as_str() {
                            output::line(format!("{word}: {name}"));
                        }
                    }
                }
            }
        }
        Ok(())
    };
    step(
        "/containers/prune",
        args.filter.clone(),
        "/ContainersDeleted",
    )
    .await?;
    step("/networks/prune", args.filter.clone(), "/NetworksDeleted").await?;
    if args.volumes {
        let labels = args
            .filter
            .iter()
            .filter(|f| f.starts_with("label"))
            .cloned()
            .collect();
        step("/volumes/prune", labels, "/VolumesDeleted").await?;
    }
    let mut specs = args.filter.clone();
    specs.push(format!("dangling={}", !args.all));
    step("/images/prune", specs, "/ImagesDeleted").await?;
    step("/build/prune", Vec::new(), "/CachesDeleted").await?;
    eprintln!("Total reclaimed space: {}", format_size_decimal(reclaimed));
    Ok(ExitCode::SUCCESS)
}

pub async fn info(context: &Context, args: InfoArgs) -> Result<ExitCode, Failure> {
    let info: Value = context.client.get("/info", &[]).await?;
    if args.format != Format::Table {
        output::document(args.format, &info)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows = [
        ("Berth", text(&info, "/ServerVersion")),
        ("Host", text(&info, "/Name")),
        ("System", text(&info, "/OperatingSystem")),
        ("Kernel", text(&info, "/KernelVersion")),
        ("Architecture", text(&info, "/Architecture")),
        ("CPUs", text(&info, "/NCPU")),
        (
            "Memory",
            format_size(info["MemTotal"].as_u64().unwrap_or(0)),
        ),
        ("State", text(&info, "/DockerRootDir")),
        ("Storage", text(&info, "/Driver")),
        (
            "Cgroups",
            format!(
                "{} (v{})",
                text(&info, "/CgroupDriver"),
                text(&info, "/CgroupVersion")
            ),
        ),
        (
            "Containers",
            format!(
                "{} ({} running, {} paused, {} stopped)",
                text(&info, "/Containers"),
                text(&info, "/ContainersRunning"),
                text(&info, "/ContainersPaused"),
                text(&info, "/ContainersStopped")
            ),
        ),
        ("Images", text(&info, "/Images")),
        ("Runtime", text(&info, "/DefaultRuntime")),
    ];
    for (name, value) in rows {
        output::line(format!("{name:<14}{value}"));
    }
    for warning in list(&info, "/Warnings") {
        let warning = text(warning, "");
        eprintln!(
            "berth: warning: {}",
            warning.trim_start_matches("WARNING: ")
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// `berth version`.
pub async fn version(
    context: &Context,
    show: ShowOptions,
    format_given: bool,
) -> Result<ExitCode, Failure> {
    let server: Result<Value, Failure> = context.client.get("/version", &[]).await;
    let client = json!({
        "Version": env!("CARGO_PKG_VERSION"),
        "Os": std::env::consts::OS,
        "Arch": std::env::consts::ARCH,
    });
    if format_given {
        let code = server.as_ref().err().map_or(0, |failure| failure.code);
        let server = server.unwrap_or(Value::Null);
        output::document(show.format, &json!({"Client": client, "Server": server}))?;
        return Ok(ExitCode::from(code));
    }
    output::line(format!(
        "Client: berth {} ({})",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH
    ));
    match server {
        Ok(server) => output::line(format!(
            "Server: berth {} (Docker Engine API {} to {}, kernel {})",
            text(&server, "/Version"),
            text(&server, "/MinAPIVersion"),
            text(&server, "/ApiVersion"),
            text(&server, "/KernelVersion")
        )),
        Err(failure) => {
            output::line("Server: none");
            return Err(failure);
        }
    }
    Ok(ExitCode::SUCCESS)
}
