//! Images: list, move between hosts and registries, make from Debian's archive, remove.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use base::units::format_size_decimal;
use clap::Args;
use http_body_util::BodyExt;
use hyper::Method;
use hyper::header::CONTENT_TYPE;
use serde_json::{Value, json};

use super::container::for_each;
use super::show::{clip, filters, list, short, since, text};
use super::{Context, ListOptions};
use crate::client::{Body, Client, each_json, empty, encode, json_body, stream_body};
use crate::failure::Failure;
use crate::output::{self, Table};
use crate::progress::Progress;

/// Splits `registry:5000/name:tag` at the tag's colon.
pub fn split_tag(reference: &str) -> (&str, Option<&str>) {
    if reference.contains('@') {
        return (reference, None);
    }
    match reference.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (reference, None),
    }
}

/// Fetches an image, showing progress.
pub async fn pull_image(
    client: &Client,
    reference: &str,
    platform: Option<&str>,
    quiet: bool,
) -> Result<(), Failure> {
    let (name, tag) = split_tag(reference);
    let mut query = vec![("fromImage", name.to_owned())];
    if !reference.contains('@') {
        query.push(("tag", tag.unwrap_or("latest").to_owned()));
    }
    if let Some(platform) = platform {
        query.push(("platform", platform.to_owned()));
    }
    let mut headers = Vec::new();
    if let Some(auth) = super::credentials::header_for(reference) {
        headers.push(("X-Registry-Auth", auth));
    }
    let response = client
        .send(Method::POST, "/images/create", &query, empty(), &headers)
        .await?;
    Progress::new(quiet).follow(response).await.map(drop)
}

#[derive(Debug, Args)]
pub struct PullArgs {
    /// Every tag of the repository.
    #[arg(short, long)]
    pub all_tags: bool,
    /// Platform, as in linux/arm64.
    #[arg(long)]
    pub platform: Option<String>,
    /// No progress.
    #[arg(short, long)]
    pub quiet: bool,
    /// The image.
    pub image: String,
}

pub async fn pull(context: &Context, args: PullArgs) -> Result<ExitCode, Failure> {
    if args.all_tags {
        let (name, _) = split_tag(&args.image);
        let mut headers = Vec::new();
        if let Some(auth) = super::credentials::header_for(name) {
            headers.push(("X-Registry-Auth", auth));
        }
        let query = [("fromImage", name.to_owned())];
        let response = context
            .client
            .send(Method::POST, "/images/create", &query, empty(), &headers)
            .await?;
        Progress::new(args.quiet).follow(response).await?;
    } else {
        pull_image(
            &context.client,
            &args.image,
            args.platform.as_deref(),
            args.quiet,
        )
        .await?;
    }
    output::line(&args.image);
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Args)]
pub struct PushArgs {
    /// No progress.
    #[arg(short, long)]
    pub quiet: bool,
    /// The image.
    pub image: String,
}

pub async fn push(context: &Context, args: PushArgs) -> Result<ExitCode, Failure> {
    let (name, tag) = split_tag(&args.image);
    let path = format!("/images/{name}/push");
    let query = [("tag", tag.unwrap_or("latest").to_owned())];
    // The engine demands the header even where there are no credentials.
    let auth = super::credentials::header_for(name).unwrap_or_else(super::credentials::none);
    let response = context
        .client
        .send(
            Method::POST,
            &path,
            &query,
            empty(),
            &[("X-Registry-Auth", auth)],
        )
        .await?;
    Progress::new(args.quiet).follow(response).await?;
    output::line(&args.image);
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Args)]
pub struct ImagesArgs {
    /// Intermediate images too.
    #[arg(short, long)]
    pub all: bool,
    /// Show digests.
    #[arg(long)]
    pub digests: bool,
    /// Do not shorten.
    #[arg(long)]
    pub no_trunc: bool,
    /// Only those that match: dangling=true, label=…, before=…, since=…, reference=…
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub filter: Vec<String>,
    #[command(flatten)]
    pub list: ListOptions,
    /// Only this repository or tag.
    pub name: Option<String>,
}

pub async fn images(context: &Context, args: ImagesArgs) -> Result<ExitCode, Failure> {
    let mut specs = args.filter.clone();
    if let Some(name) = &args.name {
        specs.push(format!("reference={name}"));
    }
    let mut query = Vec::new();
    if args.all {
        query.push(("all", "1".to_owned()));
    }
    if args.digests {
        query.push(("digests", "1".to_owned()));
    }
    if let Some(filters) = filters(&specs)? {
        query.push(("filters", filters));
    }
    let images: Vec<Value> = context.client.get("/images/json", &query).await?;
    let id_of = |image: &Value| {
        let id = text(image, "/Id");
        if args.no_trunc { id } else { short(&id) }
    };
    if args.list.quiet {
        for image in &images {
            output::line(id_of(image));
        }
        return Ok(ExitCode::SUCCESS);
    }
    if args.list.format.is_document() {
        output::document(args.list.format, &images)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = if args.digests {
        Table::new(&["REPOSITORY", "TAG", "DIGEST", "IMAGE ID", "CREATED", "SIZE"])
    } else {
        Table::new(&["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"])
    };
    for image in &images {
        let tags: Vec<&str> = list(image, "/RepoTags")
            .iter()
            .filter_map(Value::as_str)
            .collect();
        let tags = if tags.is_empty() {
            vec!["<none>:<none>"]
        } else {
            tags
        };
        for tag in tags {
            let (repository, tag) = split_tag(tag);
            let mut row = vec![repository.to_owned(), tag.unwrap_or("<none>").to_owned()];
            if args.digests {
                let digest = list(image, "/RepoDigests")
                    .iter()
                    .filter_map(Value::as_str)
                    .find_map(|d| d.strip_prefix(repository).and_then(|r| r.strip_prefix('@')))
                    .unwrap_or("<none>");
                row.push(digest.to_owned());
            }
            row.extend([
                id_of(image),
                since(image["Created"].as_i64().unwrap_or(0)),
                format_size_decimal(image["Size"].as_u64().unwrap_or(0)),
            ]);
            table.row_of(image, row);
        }
    }
    table.print(args.list.format)?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Args)]
pub struct TagArgs {
    /// The image.
    pub source: String,
    /// Its further name.
    pub target: String,
}

pub async fn tag(context: &Context, args: TagArgs) -> Result<ExitCode, Failure> {
    let (repository, tag) = split_tag(&args.target);
    let query = [
        ("repo", repository.to_owned()),
        ("tag", tag.unwrap_or("latest").to_owned()),
    ];
    context
        .client
        .act(&format!("/images/{}/tag", encode(&args.source)), &query)
        .await?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Args)]
pub struct RmiArgs {
    /// Untag and remove it though stopped containers use it.
    #[arg(short, long)]
    pub force: bool,
    /// Keep untagged parents.
    #[arg(long)]
    pub no_prune: bool,
    /// The images.
    #[arg(required = true)]
    pub images: Vec<String>,
}

pub async fn rmi(context: &Context, args: RmiArgs) -> Result<ExitCode, Failure> {
    let query = [
        ("force", args.force.to_string()),
        ("noprune", args.no_prune.to_string()),
    ];
    for_each(&args.images, async |name| {
        let answer = context
            .client
            .delete(&format!("/images/{name}"), &query)
            .await?;
        for entry in list(&answer, "") {
            for word in ["Untagged", "Deleted"] {
                if let Some(what) = entry[word].as_str() {
                    output::line(format!("{word}: {what}"));
                }
            }
        }
        Ok(None)
    })
    .await
}

#[derive(Debug, Args)]
pub struct HistoryArgs {
    /// Do not shorten.
    #[arg(long)]
    pub no_trunc: bool,
    #[command(flatten)]
    pub list: ListOptions,
    /// The image.
    pub image: String,
}

pub async fn history(context: &Context, args: HistoryArgs) -> Result<ExitCode, Failure> {
    let steps: Vec<Value> = context
        .client
        .get(&format!("/images/{}/history", encode(&args.image)), &[])
        .await?;
    if args.list.quiet {
        for step in &steps {
            output::line(short(&text(step, "/Id")));
        }
        return Ok(ExitCode::SUCCESS);
    }
    if args.list.format.is_document() {
        output::document(args.list.format, &steps)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&["IMAGE", "CREATED", "CREATED BY", "SIZE", "COMMENT"]);
    for step in &steps {
        let id = text(step, "/Id");
        let by = text(step, "/CreatedBy");
        table.row_of(
            step,
            vec![
                if args.no_trunc { id } else { short(&id) },
                since(step["Created"].as_i64().unwrap_or(0)),
                if args.no_trunc { by } else { clip(&by, 45) },
                format_size_decimal(step["Size"].as_u64().unwrap_or(0)),
                text(step, "/Comment"),
            ],
        );
    }
    table.print(args.list.format)?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Args)]
pub struct SaveArgs {
    /// Write to this file and not to standard output.
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// The images.
    #[arg(required = true)]
    pub images: Vec<String>,
}

/// Writes a response body to a file (whole or not at all) or to standard output.
pub async fn save_body(
    response: hyper::Response<hyper::body::Incoming>,
    to: Option<&Path>,
) -> Result<ExitCode, Failure> {
    let mut body = response.into_body();
    let broke = |e: hyper::Error| Failure::internal(format!("the daemon's answer broke off: {e}"));
    let Some(path) = to else {
        if std::io::stdout().is_terminal() {
            return Err(Failure::invalid("an archive is not written to a terminal")
                .with_fix("use -o FILE, or a pipe"));
        }
        let mut out = std::io::stdout().lock();
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame.map_err(broke)?.into_data() {
                out.write_all(&data)
                    .map_err(|e| Failure::io("cannot write the archive", &e))?;
            }
        }
        return Ok(ExitCode::SUCCESS);
    };
    let temporary = path.with_extension("berth-partial");
    let failed = |e: &std::io::Error| Failure::io(format!("cannot write {}", path.display()), e);
    let written = async {
        let mut file = std::fs::File::create(&temporary).map_err(|e| failed(&e))?;
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame.map_err(broke)?.into_data() {
                file.write_all(&data).map_err(|e| failed(&e))?;
            }
        }
        std::fs::rename(&temporary, path).map_err(|e| failed(&e))
    }
    .await;
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written.map(|()| ExitCode::SUCCESS)
}

pub async fn save(context: &Context, args: SaveArgs) -> Result<ExitCode, Failure> {
    let query: Vec<(&str, String)> = args
        .images
        .iter()
        .map(|name| ("names", name.clone()))
        .collect();
    let response = context
        .client
        .send(Method::GET, "/images/get", &query, empty(), &[])
        .await?;
    save_body(response, args.output.as_deref()).await
}

/// A file, or standard input for `-`, as a request body.
pub async fn file_body(path: Option<&Path>) -> Result<Body, Failure> {
    match path {
        Some(path) if path != Path::new("-") => {
            let file = tokio::fs::File::open(path)
                .await
                .map_err(|e| Failure::io(format!("cannot read {}", path.display()), &e))?;
            Ok(stream_body(tokio_util::io::ReaderStream::with_capacity(
                file,
                256 * 1024,
            )))
        }
        _ => Ok(stream_body(tokio_util::io::ReaderStream::with_capacity(
            tokio::io::stdin(),
            256 * 1024,
        ))),
    }
}

#[derive(Debug, Args)]
pub struct LoadArgs {
    /// Read this file and not standard input.
    #[arg(short, long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// No progress.
    #[arg(short, long)]
    pub quiet: bool,
}

pub async fn load(context: &Context, args: LoadArgs) -> Result<ExitCode, Failure> {
    if args.input.is_none() && std::io::stdin().is_terminal() {
        return Err(Failure::invalid("an archive is expected on standard input")
            .with_fix("berth load -i FILE"));
    }
    let query = [("quiet", if args.quiet { "1" } else { "0" }.to_owned())];
    let headers = [(CONTENT_TYPE.as_str(), "application/x-tar".to_owned())];
    let body = file_body(args.input.as_deref()).await?;
    let response = context
        .client
        .send(Method::POST, "/images/load", &query, body, &headers)
        .await?;
    each_json(response, |message| {
        if let Some(error) = message["error"].as_str() {
            return Err(Failure::invalid(error));
        }
        if let Some(text) = message["stream"].as_str() {
            output::print(text);
        }
        Ok(())
    })
    .await?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// Dockerfile instruction to apply: 'CMD ["x"]'.
    #[arg(short, long, value_name = "INSTRUCTION")]
    pub change: Vec<String>,
    /// Message of the import.
    #[arg(short, long)]
    pub message: Option<String>,
    /// Platform of the files.
    #[arg(long)]
    pub platform: Option<String>,
    /// Archive of a file system; `-` for standard input.
    pub file: PathBuf,
    /// Name of the image.
    pub image: Option<String>,
}

pub async fn import(context: &Context, args: ImportArgs) -> Result<ExitCode, Failure> {
    let mut query = vec![("fromSrc", "-".to_owned())];
    if let Some(image) = &args.image {
        let (repository, tag) = split_tag(image);
        query.push(("repo", repository.to_owned()));
        query.push(("tag", tag.unwrap_or("latest").to_owned()));
    }
    for change in args.change {
        query.push(("changes", change));
    }
    for (key, value) in [("message", args.message), ("platform", args.platform)] {
        if let Some(value) = value {
            query.push((key, value));
        }
    }
    let body = file_body(Some(&args.file)).await?;
    let headers = [(CONTENT_TYPE.as_str(), "application/x-tar".to_owned())];
    let response = context
        .client
        .send(Method::POST, "/images/create", &query, body, &headers)
        .await?;
    let mut last = String::new();
    each_json(response, |message| {
        if let Some(error) = message["error"].as_str() {
            return Err(Failure::invalid(error));
        }
        last = text(&message, "/status");
        Ok(())
    })
    .await?;
    output::line(last);
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Args)]
pub struct PruneArgs {
    /// All images no container uses, not only the untagged ones.
    #[arg(short, long)]
    pub all: bool,
    /// Do not ask.
    #[arg(short, long, visible_alias = "yes")]
    pub force: bool,
    /// Only those that match: until=24h, label=…
    #[arg(long, value_name = "KEY=VALUE")]
    pub filter: Vec<String>,
}

pub async fn prune(context: &Context, args: PruneArgs) -> Result<ExitCode, Failure> {
    let what = if args.all {
        "This removes all images that no container uses."
    } else {
        "This removes all untagged images."
    };
    super::system::confirm(args.force, what)?;
    let mut specs = args.filter;
    specs.push(format!("dangling={}", !args.all));
    let query = [("filters", filters(&specs)?.unwrap_or_default())];
    let answer: Value = context
        .client
        .post("/images/prune", &query, &Value::Null)
        .await?;
    for entry in list(&answer, "/ImagesDeleted") {
        for word in ["Untagged", "Deleted"] {
            if let Some(what) = entry[word].as_str() {
                output::line(format!("{word}: {what}"));
            }
        }
    }
    eprintln!(
        "Total reclaimed space: {}",
        format_size_decimal(answer["SpaceReclaimed"].as_u64().unwrap_or(0))
    );
    Ok(ExitCode::SUCCESS)
}

/// Makes an image from a distribution's own package archive; no registry is needed.
#[derive(Debug, Args)]
pub struct BootstrapArgs {
    /// Architecture in the distribution's words or as a platform, as in arm64 or linux/arm64; the host's own if not given.
    #[arg(long, visible_alias = "platform")]
    pub arch: Option<String>,
    /// Further package; may be given many times, or as a comma-separated list.
    #[arg(
        short,
        long = "package",
        visible_alias = "include",
        value_delimiter = ',',
        value_name = "NAME"
    )]
    pub packages: Vec<String>,
    /// Address of the archive; that of the host's own apt configuration if not given.
    #[arg(long, value_name = "URL")]
    pub mirror: Option<String>,
    /// Keyring the archive's signature is checked with; the distribution's own if not given.
    #[arg(long, value_name = "FILE")]
    pub keyring: Option<PathBuf>,
    /// Archive components.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub components: Vec<String>,
    /// Put in a kernel and an init system, so that a machine can boot the image too.
    #[arg(long)]
    pub kernel: bool,
    /// Name of the image; the argument itself if not given.
    #[arg(short, long, value_name = "NAME")]
    pub tag: Vec<String>,
    /// No progress.
    #[arg(short, long)]
    pub quiet: bool,
    /// Distribution and suite, as in debian:bookworm or debian:12.
    pub image: String,
}

pub async fn bootstrap(context: &Context, args: BootstrapArgs) -> Result<ExitCode, Failure> {
    let body = json!({
        "Name": args.image,
        "Arch": args.arch.unwrap_or_default(),
        "Packages": args.packages,
        "Mirror": args.mirror,
        "Components": args.components,
        "Keyring": args.keyring,
        "WithKernel": args.kernel,
        "Tags": args.tag,
    });
    let headers = [(CONTENT_TYPE.as_str(), "application/json".to_owned())];
    let response = context
        .client
        .send(
            Method::POST,
            "/berth/v1/images/bootstrap",
            &[],
            json_body(&body)?,
            &headers,
        )
        .await?;
    let aux = Progress::new(args.quiet).follow(response).await?;
    let id = aux
        .iter()
        .rev()
        .find_map(|a| a["ID"].as_str().or(a["Id"].as_str()))
        .unwrap_or_default();
    output::line(if id.is_empty() {
        args.image
    } else {
        id.to_owned()
    });
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_port_is_not_a_tag() {
        assert_eq!(
            split_tag("localhost:5000/app"),
            ("localhost:5000/app", None)
        );
        assert_eq!(
            split_tag("localhost:5000/app:1"),
            ("localhost:5000/app", Some("1"))
        );
        assert_eq!(split_tag("debian"), ("debian", None));
    }
}
