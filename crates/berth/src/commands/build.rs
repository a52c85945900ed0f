//! `berth build`: the folder as a tar stream to the daemon's builder.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
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
    /// The Dockerfile, if not DIR/Dockerfile; - reads it from standard input.
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
    /// A line for /etc/hosts of the RUN steps.
    #[arg(long, value_name = "HOST:ADDRESS")]
    pub add_host: Vec<String>,
    /// A file or variable that RUN --mount=type=secret may read: id=ID,src=FILE or id=ID,env=NAME.
    #[arg(long, value_name = "id=ID[,src=FILE|,env=NAME]")]
    pub secret: Vec<String>,
    /// An image whose steps may be taken over. All that are here are looked through anyway.
    #[arg(long, value_name = "IMAGE")]
    pub cache_from: Vec<String>,
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
        let fix = if args.context == Path::new("-") {
            "unpack the archive into a folder and name that; a Dockerfile alone is read with: berth build -f - DIR"
        } else {
            "name a folder that holds what the Dockerfile copies; . is this one"
        };
        return Err(Failure::new(
            base::Kind::NotFound,
            format!("{} is no folder to build from", args.context.display()),
        )
        .with_fix(fix));
    }
    let folder = args
        .context
        .canonicalize()
        .map_err(|e| Failure::io("cannot resolve the folder", &e))?;
    let file = dockerfile(args.file.as_deref(), &folder)?;
    // One outside the folder is sent along under a name of its own, as docker does.
    let (name, extra) = match &file {
        Dockerfile::Text(text) => (".dockerfile.berth".to_owned(), Some(text.clone())),
        Dockerfile::File(file) => match file.strip_prefix(&folder) {
            Ok(inside) => (inside.display().to_string(), None),
            Err(_) => {
                let text = std::fs::read(file).map_err(|e| {
                    Failure::io(format!("cannot read the Dockerfile {}", file.display()), &e)
                })?;
                (".dockerfile.berth".to_owned(), Some(text))
            }
        },
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
    for host in &args.add_host {
        query.push(("extrahosts", host.clone()));
    }
    if !args.cache_from.is_empty() {
        query.push(("cachefrom", json!(args.cache_from).to_string()));
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
    let special = match &file {
        Dockerfile::File(file) => {
            let mut special = file.clone().into_os_string();
            special.push(".dockerignore");
            Some(PathBuf::from(special))
        }
        Dockerfile::Text(_) => None,
    };
    let patterns = special
        .into_iter()
        .chain([folder.join(".dockerignore")])
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
        if let Some(text) = extra {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(text.len() as u64);
            builder.append_data(&mut header, &name, &text[..])?;
        }
        builder.into_inner()?.flush()
    });
    let mut headers = vec![(CONTENT_TYPE.as_str(), "application/x-tar".to_owned())];
    if let Some(config) = super::credentials::header_for_all() {
        headers.push(("X-Registry-Config", config));
    }
    if let Some(secrets) = secrets(&args.secret)? {
        headers.push(("X-Berth-Build-Secrets", secrets));
    }
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

enum Dockerfile {
    File(PathBuf),
    Text(Vec<u8>),
}

fn dockerfile(file: Option<&Path>, folder: &Path) -> Result<Dockerfile, Failure> {
    if file == Some(Path::new("-")) {
        let mut text = Vec::new();
        io::stdin()
            .lock()
            .read_to_end(&mut text)
            .map_err(|e| Failure::io("cannot read the Dockerfile from standard input", &e))?;
        return Ok(Dockerfile::Text(text));
    }
    let file = file.map_or_else(|| folder.join("Dockerfile"), Path::to_owned);
    file.canonicalize().map(Dockerfile::File).map_err(|e| {
        Failure::io(format!("cannot read the Dockerfile {}", file.display()), &e)
            .with_fix("name it with -f FILE")
    })
}

/// The most bytes of all secrets of a build: they travel in a header.
const MOST_SECRET: usize = 128 << 10;

/// `--secret`s as the daemon's `X-Berth-Build-Secrets` wants them.
fn secrets(given: &[String]) -> Result<Option<String>, Failure> {
    let mut encoded = Map::new();
    let mut bytes = 0;
    for secret in given {
        let wrong = |why: &str| {
            Failure::invalid(format!("--secret {secret}: {why}"))
                .with_fix("write --secret id=ID,src=FILE or --secret id=ID,env=NAME")
        };
        let (mut id, mut source, mut variable) = (None, None, None);
        for field in secret.split(',') {
            match field.split_once('=') {
                Some(("id", value)) => id = Some(value),
                Some(("src" | "source", value)) => source = Some(value),
                Some(("env", value)) => variable = Some(value),
                Some(("type", "file" | "env")) => {}
                _ => return Err(wrong(&format!("{field:?} is not known"))),
            }
        }
        let id = id
            .filter(|id| !id.is_empty())
            .ok_or_else(|| wrong("it has no id"))?;
        let content = match (source, variable) {
            (Some(file), None) => std::fs::read(file)
                .map_err(|e| Failure::io(format!("cannot read the secret {file}"), &e))?,
            (None, variable) => std::env::var_os(variable.unwrap_or(id))
                .map(std::os::unix::ffi::OsStringExt::into_vec)
                .ok_or_else(|| {
                    wrong(&format!("there is no variable {}", variable.unwrap_or(id)))
                })?,
            (Some(_), Some(_)) => return Err(wrong("it has both src and env")),
        };
        bytes += content.len();
        encoded.insert(id.to_owned(), Value::String(STANDARD.encode(content)));
    }
    if bytes > MOST_SECRET {
        return Err(Failure::invalid(format!(
            "the secrets of a build may have {} together, and these have {}",
            base::units::format_size(MOST_SECRET as u64),
            base::units::format_size(bytes as u64)
        )));
    }
    Ok((!encoded.is_empty()).then(|| URL_SAFE.encode(Value::Object(encoded).to_string())))
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
