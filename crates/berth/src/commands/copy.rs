//! `berth cp`: files between a container and the host, as tar streams.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;

use base64::Engine;
use clap::Args;
use hyper::Method;
use hyper::header::CONTENT_TYPE;
use serde_json::Value;
use tokio_util::io::{ReaderStream, SyncIoBridge};

use super::Context;
use super::container::body_reader;
use crate::client::{collect, empty, encode, stream_body};
use crate::failure::Failure;

#[derive(Debug, Args)]
pub struct CopyArgs {
    /// Keep owner and group.
    #[arg(short, long)]
    pub archive: bool,
    /// Copy what a symbolic link points at.
    #[arg(short = 'L', long)]
    pub follow_link: bool,
    /// No summary.
    #[arg(short, long)]
    pub quiet: bool,
    /// CONTAINER:PATH, a path of the host, or - for a tar stream on standard input.
    pub source: String,
    /// CONTAINER:PATH, a path of the host, or - for a tar stream on standard output.
    pub target: String,
}

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side<'a> {
    Host(&'a str),
    Container(&'a str, &'a str),
}

fn side(text: &str) -> Side<'_> {
    if text == "-" || text.starts_with('/') || text.starts_with('.') {
        return Side::Host(text);
    }
    match text.split_once(':') {
        Some((container, path)) if !container.contains('/') => Side::Container(container, path),
        _ => Side::Host(text),
    }
}

pub async fn run(context: &Context, args: CopyArgs) -> Result<ExitCode, Failure> {
    match (side(&args.source), side(&args.target)) {
        (Side::Container(container, path), Side::Host(target)) => {
            from_container(context, container, path, target, &args).await
        }
        (Side::Host(source), Side::Container(container, path)) => {
            to_container(context, source, container, path, &args).await
        }
        (Side::Host(_), Side::Host(_)) => Err(Failure::invalid("one side must be CONTAINER:PATH")),
        _ => Err(
            Failure::invalid("a copy between two containers goes over the host")
                .with_fix("berth cp A:/path - | berth cp - B:/folder"),
        ),
    }
}

/// What the daemon says of a path: name, size, mode (Go's bits), link target.
async fn stat(context: &Context, container: &str, path: &str) -> Result<Value, Failure> {
    let query = [("path", path.to_owned())];
    let target = format!("/containers/{}/archive", encode(container));
    let response = context
        .client
        .send(Method::HEAD, &target, &query, empty(), &[])
        .await
        .map_err(|mut f| {
            if f.code == base::Kind::NotFound.exit_code() {
                f.message =
                    format!("there is no {path} in container {container}, or no such container");
            }
            f
        })?;
    let header = response
        .headers()
        .get("X-Docker-Container-Path-Stat")
        .and_then(|h| {
            base64::engine::general_purpose::STANDARD
                .decode(h.as_bytes())
                .ok()
        })
        .and_then(|bytes| serde_json::from_slice(&bytes).ok());
    header.ok_or_else(|| Failure::internal("the daemon did not describe the path"))
}

/// Go's `os.ModeDir` and `os.ModeSymlink`.
const MODE_DIR: u64 = 1 << 31;
const MODE_LINK: u64 = 1 << 27;

async fn from_container(
    context: &Context,
    container: &str,
    path: &str,
    target: &str,
    args: &CopyArgs,
) -> Result<ExitCode, Failure> {
    let mut path = path.to_owned();
    let mut about = stat(context, container, &path).await?;
    if args.follow_link && about["mode"].as_u64().unwrap_or(0) & MODE_LINK != 0 {
        let link = about["linkTarget"].as_str().unwrap_or_default().to_owned();
        path = if link.starts_with('/') {
            link
        } else {
            Path::new(&path)
                .parent()
                .unwrap_or(Path::new("/"))
                .join(link)
                .display()
                .to_string()
        };
        about = stat(context, container, &path).await?;
    }
    let query = [("path", path.clone())];
    let url = format!("/containers/{}/archive", encode(container));
    let response = context
        .client
        .send(Method::GET, &url, &query, empty(), &[])
        .await?;
    if target == "-" {
        return super::image::save_body(response, None).await;
    }
    let is_folder = about["mode"].as_u64().unwrap_or(0) & MODE_DIR != 0;
    let target_path = PathBuf::from(target);
    let contents_only = path.ends_with("/.") || path == "/" || path == ".";
    // docker's rules: into an existing folder, or under a new name beside an existing parent.
    let (folder, rename) = if target_path.is_dir() {
        (target_path, None)
    } else {
        if target.ends_with('/') && !is_folder {
            return Err(
                Failure::new(base::Kind::NotFound, format!("there is no folder {target}"))
                    .with_fix(format!("mkdir -p {target}")),
            );
        }
        let parent = target_path
            .parent()
            .filter(|p| !p.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        if !parent.is_dir() {
            return Err(Failure::new(
                base::Kind::NotFound,
                format!("there is no folder {}", parent.display()),
            )
            .with_fix(format!("mkdir -p {}", parent.display())));
        }
        let name = target_path
            .file_name()
            .ok_or_else(|| Failure::invalid(format!("{target} names no file")))?
            .to_owned();
        (parent.to_owned(), Some(PathBuf::from(name)))
    };
    let archive = args.archive;
    let reader = SyncIoBridge::new(body_reader(response));
    let bytes = tokio::task::spawn_blocking(move || {
        unpack(reader, &folder, rename.as_deref(), contents_only, archive)
    })
    .await
    .map_err(|e| Failure::internal(format!("the copy ended early: {e}")))?
    .map_err(|e| Failure::io("cannot write the copy", &e))?;
    if !args.quiet {
        eprintln!(
            "Copied {} to {target}",
            base::units::format_size_decimal(bytes)
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Unpacks below `folder`; the archive's first name is replaced by `rename` (or dropped). A hostile
/// container cannot write elsewhere: `tar` refuses `..` and links out of the folder.
fn unpack(
    reader: impl Read,
    folder: &Path,
    rename: Option<&Path>,
    contents_only: bool,
    owners: bool,
) -> io::Result<u64> {
    let mut archive = tar::Archive::new(reader);
    archive.set_preserve_ownerships(owners);
    let mut bytes = 0;
    let mut base_folder: Option<PathBuf> = None;
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = entry.path()?.into_owned();
        let mut parts = name
            .components()
            .filter(|c| !matches!(c, Component::CurDir));
        let first = parts.next();
        let rest: PathBuf = parts.collect();
        let relative: PathBuf = match rename {
            Some(new) => new.components().chain(rest.components()).collect(),
            None if contents_only => rest,
            None => first.into_iter().chain(rest.components()).collect(),
        };
        if relative.as_os_str().is_empty() {
            continue;
        }
        if relative
            .components()
            .any(|c| !matches!(c, Component::Normal(_)))
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "the archive names {}, which leads out of the target",
                    name.display()
                ),
            ));
        }
        bytes += entry.header().size().unwrap_or(0);
        let target = folder.join(&relative);
        // A symbolic link made earlier by the same archive must not lead a later entry astray.
        let parent = target.parent().unwrap_or(folder).to_owned();
        fs::create_dir_all(&parent)?;
        let root = base_folder.get_or_insert(folder.canonicalize()?);
        if !parent.canonicalize()?.starts_with(&*root) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "{} leads out of the target through a symbolic link",
                    name.display()
                ),
            ));
        }
        if target.is_symlink() || (target.exists() && !entry.header().entry_type().is_dir()) {
            fs::remove_file(&target)?;
        }
        if entry.header().entry_type().is_hard_link() {
            let link = entry.link_name()?.unwrap_or_default().into_owned();
            let mut parts = link.components();
            let first = parts.next();
            let rest: PathBuf = parts.collect();
            let from: PathBuf = match rename {
                Some(new) => new.components().chain(rest.components()).collect(),
                None if contents_only => rest,
                None => first.into_iter().chain(rest.components()).collect(),
            };
            if from
                .components()
                .any(|c| !matches!(c, Component::Normal(_)))
            {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a hard link leads out of the target",
                ));
            }
            fs::hard_link(folder.join(from), &target)?;
            continue;
        }
        entry.unpack(&target)?;
    }
    Ok(bytes)
}

async fn to_container(
    context: &Context,
    source: &str,
    container: &str,
    path: &str,
    args: &CopyArgs,
) -> Result<ExitCode, Failure> {
    let url = format!("/containers/{}/archive", encode(container));
    let headers = [(CONTENT_TYPE.as_str(), "application/x-tar".to_owned())];
    let keep_owners = args.archive;
    if source == "-" {
        let query = [
            ("path", path.to_owned()),
            ("noOverwriteDirNonDir", "true".into()),
        ];
        let body = stream_body(ReaderStream::new(tokio::io::stdin()));
        let response = context
            .client
            .send(Method::PUT, &url, &query, body, &headers)
            .await?;
        collect(response).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let contents_only = source.ends_with("/.") || source == ".";
    let source_path = PathBuf::from(source);
    let metadata = if args.follow_link {
        fs::metadata(&source_path)
    } else {
        fs::symlink_metadata(&source_path)
    }
    .map_err(|e| Failure::io(format!("cannot read {source}"), &e))?;
    let target = stat(context, container, path).await;
    let target_is_folder = target
        .as_ref()
        .is_ok_and(|t| t["mode"].as_u64().unwrap_or(0) & MODE_DIR != 0);
    let source_name = source_path
        .canonicalize()
        .ok()
        .filter(|_| contents_only || source_path.file_name().is_none())
        .unwrap_or_else(|| source_path.clone())
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    let trimmed = path.trim_end_matches('/');
    let (folder, name) = if target_is_folder {
        let name = if contents_only {
            String::new()
        } else {
            source_name
        };
        (path.to_owned(), name)
    } else {
        if path.ends_with('/') && !metadata.is_dir() {
            return Err(Failure::new(
                base::Kind::NotFound,
                format!("there is no folder {path} in container {container}"),
            ));
        }
        let (parent, name) = trimmed.rsplit_once('/').unwrap_or(("", trimmed));
        (
            if parent.is_empty() {
                "/".to_owned()
            } else {
                parent.to_owned()
            },
            name.to_owned(),
        )
    };
    let (reader, writer) = tokio::io::duplex(256 * 1024);
    let follow = args.follow_link;
    let pack = tokio::task::spawn_blocking(move || -> io::Result<()> {
        let mut builder = tar::Builder::new(SyncIoBridge::new(writer));
        builder.follow_symlinks(follow);
        pack_into(&mut builder, &source_path, Path::new(&name), keep_owners)?;
        builder.into_inner()?.flush()
    });
    let mut query = vec![
        ("path", folder),
        ("noOverwriteDirNonDir", "true".to_owned()),
    ];
    if keep_owners {
        query.push(("copyUIDGID", "1".into()));
    }
    let response = context
        .client
        .send(
            Method::PUT,
            &url,
            &query,
            stream_body(ReaderStream::new(reader)),
            &headers,
        )
        .await;
    let packed = pack
        .await
        .map_err(|e| Failure::internal(format!("the copy ended early: {e}")))?;
    let response = response?;
    packed.map_err(|e| Failure::io(format!("cannot read {source}"), &e))?;
    collect(response).await?;
    if !args.quiet {
        eprintln!("Copied {source} to {container}:{path}");
    }
    Ok(ExitCode::SUCCESS)
}

fn pack_into<W: Write>(
    builder: &mut tar::Builder<W>,
    from: &Path,
    name: &Path,
    owners: bool,
) -> io::Result<()> {
    let metadata = fs::symlink_metadata(from)?;
    let shown = if name.as_os_str().is_empty() {
        Path::new(".")
    } else {
        name
    };
    if metadata.is_dir() {
        append(builder, from, shown, owners)?;
        let mut entries: Vec<_> = fs::read_dir(from)?.collect::<Result<_, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            pack_into(
                builder,
                &entry.path(),
                &name.join(entry.file_name()),
                owners,
            )?;
        }
        return Ok(());
    }
    append(builder, from, shown, owners)
}

fn append<W: Write>(
    builder: &mut tar::Builder<W>,
    from: &Path,
    name: &Path,
    owners: bool,
) -> io::Result<()> {
    if owners {
        return builder.append_path_with_name(from, name);
    }
    // Without --archive what arrives belongs to the container's root, as with docker.
    let metadata = fs::symlink_metadata(from)?;
    let mut header = tar::Header::new_gnu();
    header.set_metadata(&metadata);
    header.set_uid(0);
    header.set_gid(0);
    if metadata.is_symlink() {
        header.set_size(0);
        return builder.append_link(&mut header, name, fs::read_link(from)?);
    }
    if metadata.is_file() {
        return builder.append_data(
            &mut header,
            name,
            fs::File::open(from)?.take(metadata.len()),
        );
    }
    header.set_size(0);
    builder.append_data(&mut header, name, io::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_a_colon_is_still_a_path() {
        assert_eq!(side("web:/etc"), Side::Container("web", "/etc"));
        assert_eq!(side("./a:b"), Side::Host("./a:b"));
        assert_eq!(side("/x:y"), Side::Host("/x:y"));
        assert_eq!(side("-"), Side::Host("-"));
    }

    #[test]
    fn an_archive_cannot_write_through_its_own_link() {
        let directory = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        builder
            .append_link(&mut header, "x/link", outside.path())
            .unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(4);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, "x/link/evil", &b"evil"[..])
            .unwrap();
        let bytes = builder.into_inner().unwrap();
        assert!(unpack(&bytes[..], directory.path(), None, false, false).is_err());
        assert!(!outside.path().join("evil").exists());
    }
}
