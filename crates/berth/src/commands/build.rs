//! `berth build`: the folder as a tar stream to the daemon's builder.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use hyper::Method;
use hyper::header::CONTENT_TYPE;
use serde_json::{Map, Value, json};
use tokio_util::io::{ReaderStream, SyncIoBridge};

use super::Context;
use crate::client::stream_body;
use crate::failure::Failure;
use crate::output;
use crate::progress::Progress;

#[derive(Debug, Args)]
pub struct BuildArgs {
    /// Name of the image; may be given many times.
    #[arg(short, long, value_name = "NAME[:TAG]")]
    pub tag: Vec<String>,
    /// The Dockerfile, if not DIR/Dockerfile.
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Build argument: NAME=VALUE, or NAME to hand on your own.
    #[arg(long, value_name = "NAME[=VALUE]")]
    pub build_arg: Vec<String>,
    /// Label: KEY=VALUE.
    #[arg(long, value_name = "KEY=VALUE")]
    pub label: Vec<String>,
    /// Stop at this stage.
    #[arg(long, value_name = "STAGE")]
    pub target: Option<String>,
    /// Do not use what earlier builds made.
    #[arg(long)]
    pub no_cache: bool,
    /// Fetch the base images anew.
    #[arg(long)]
    pub pull: bool,
    /// Platform, as in linux/arm64.
    #[arg(long)]
    pub platform: Option<String>,
    /// Network of the RUN steps.
    #[arg(long)]
    pub network: Option<String>,
    /// Print the image's id only.
    #[arg(short, long)]
    pub quiet: bool,
    /// Write the image's id to this file.
    #[arg(long, value_name = "FILE")]
    pub iidfile: Option<PathBuf>,
    /// The folder to build from.
    #[arg(value_name = "DIR")]
    pub context: PathBuf,
}

pub async fn run(context: &Context, args: BuildArgs) -> Result<ExitCode, Failure> {
    if !args.context.is_dir() {
        return Err(Failure::new(
            base::Kind::NotFound,
            format!("{} is no folder to build from", args.context.display()),
        ));
    }
    let folder = args
        .context
        .canonicalize()
        .map_err(|e| Failure::io("cannot resolve the folder", &e))?;
    let file = args
        .file
        .clone()
        .unwrap_or_else(|| folder.join("Dockerfile"));
    let file = file.canonicalize().map_err(|e| {
        Failure::io(format!("cannot read the Dockerfile {}", file.display()), &e)
            .with_fix("name it with -f FILE")
    })?;
    // One outside the folder is sent along under a name of its own, as docker does.
    let (name, extra) = match file.strip_prefix(&folder) {
        Ok(inside) => (inside.display().to_string(), None),
        Err(_) => (".dockerfile.berth".to_owned(), Some(file.clone())),
    };
    let mut query = vec![("dockerfile", name.clone()), ("rm", "1".to_owned())];
    for tag in &args.tag {
        query.push(("t", tag.clone()));
    }
    let mut build_args = Map::new();
    for arg in &args.build_arg {
        match arg.split_once('=') {
            Some((key, value)) => build_args.insert(key.to_owned(), json!(value)),
            None => build_args.insert(
                arg.clone(),
                std::env::var(arg).map_or(Value::Null, Value::from),
            ),
        };
    }
    query.push(("buildargs", Value::Object(build_args).to_string()));
    query.push((
        "labels",
        Value::Object(super::network::map_of("label", &args.label)?).to_string(),
    ));
    for (key, flag) in [
        ("nocache", args.no_cache),
        ("pull", args.pull),
        ("q", args.quiet),
    ] {
        if flag {
            query.push((key, "1".into()));
        }
    }
    for (key, value) in [
        ("target", args.target),
        ("platform", args.platform),
        ("networkmode", args.network),
    ] {
        if let Some(value) = value {
            query.push((key, value));
        }
    }
    // A file beside the Dockerfile wins over the folder's own, as docker reads them.
    let mut special = file.clone().into_os_string();
    special.push(".dockerignore");
    let patterns = [PathBuf::from(special), folder.join(".dockerignore")]
        .iter()
        .find_map(|path| std::fs::read_to_string(path).ok())
        .unwrap_or_default();
    let ignore = image::build::ignore::Ignore::parse(&patterns);
    let (reader, writer) = tokio::io::duplex(256 * 1024);
    let pack = tokio::task::spawn_blocking(move || -> io::Result<()> {
        let mut builder = tar::Builder::new(SyncIoBridge::new(writer));
        builder.follow_symlinks(false);
        pack(&mut builder, &folder, Path::new(""), &|path| {
            path == Path::new(&name)
                || path == Path::new(".dockerignore")
                || !ignore.excludes(&path.to_string_lossy())
        })?;
        if let Some(extra) = extra {
            builder.append_path_with_name(extra, &name)?;
        }
        builder.into_inner()?.flush()
    });
    let headers = [(CONTENT_TYPE.as_str(), "application/x-tar".to_owned())];
    let body = stream_body(ReaderStream::new(reader));
    let response = context
        .client
        .send(Method::POST, "/build", &query, body, &headers)
        .await;
    let packed = pack
        .await
        .map_err(|e| Failure::internal(format!("the upload ended early: {e}")))?;
    let response = response?;
    let aux = Progress::new(args.quiet).follow(response).await?;
    packed.map_err(|e| Failure::io("cannot read the folder to build from", &e))?;
    let id = aux
        .iter()
        .rev()
        .find_map(|a| a["ID"].as_str())
        .unwrap_or_default()
        .to_owned();
    if let Some(file) = args.iidfile {
        std::fs::write(&file, &id)
            .map_err(|e| Failure::io(format!("cannot write {}", file.display()), &e))?;
    }
    output::line(id);
    Ok(ExitCode::SUCCESS)
}

/// Everything below `folder` that `wanted` says yes to; a refused folder is still walked, since a later
/// pattern may bring back what is in it.
fn pack<W: Write>(
    builder: &mut tar::Builder<W>,
    folder: &Path,
    relative: &Path,
    wanted: &dyn Fn(&Path) -> bool,
) -> io::Result<()> {
    let mut entries: Vec<_> =
        std::fs::read_dir(folder.join(relative))?.collect::<Result<_, _>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let inside = relative.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            if wanted(&inside) {
                builder.append_dir(&inside, entry.path())?;
            }
            pack(builder, folder, &inside, wanted)?;
        } else if wanted(&inside) && (kind.is_file() || kind.is_symlink()) {
            builder.append_path_with_name(entry.path(), &inside)?;
        }
    }
    Ok(())
}
