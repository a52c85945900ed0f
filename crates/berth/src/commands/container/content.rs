//! A container's files as an image or an archive.

use std::process::ExitCode;

use clap::Args;
use hyper::Method;
use serde_json::Value;

use super::super::Context;
use super::super::show::text;
use super::path_of;
use crate::client::empty;
use crate::failure::Failure;
use crate::output;

#[derive(Debug, Args)]
pub struct CommitArgs {
    /// Author of the change.
    #[arg(short, long)]
    pub author: Option<String>,
    /// Dockerfile instruction to apply: 'CMD ["x"]'.
    #[arg(short, long, value_name = "INSTRUCTION")]
    pub change: Vec<String>,
    /// Message of the commit.
    #[arg(short, long)]
    pub message: Option<String>,
    /// Do not pause the container meanwhile.
    #[arg(long)]
    pub no_pause: bool,
    /// The container.
    pub container: String,
    /// Name of the image.
    pub image: Option<String>,
}

pub async fn commit(context: &Context, args: CommitArgs) -> Result<ExitCode, Failure> {
    let mut query = vec![
        ("container", args.container),
        ("pause", (!args.no_pause).to_string()),
    ];
    if let Some(image) = args.image {
        let (repository, tag) = super::super::image::split_tag(&image);
        query.push(("repo", repository.to_owned()));
        query.push(("tag", tag.unwrap_or("latest").to_owned()));
    }
    for (key, value) in [("author", args.author), ("comment", args.message)] {
        if let Some(value) = value {
            query.push((key, value));
        }
    }
    for change in args.change {
        query.push(("changes", change));
    }
    let answer: Value = context.client.post("/commit", &query, &Value::Null).await?;
    output::line(text(&answer, "/Id"));
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Write to this file and not to standard output.
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<std::path::PathBuf>,
    /// The container.
    pub container: String,
}

pub async fn export(context: &Context, args: ExportArgs) -> Result<ExitCode, Failure> {
    let response = context
        .client
        .send(
            Method::GET,
            &path_of(&args.container, "export"),
            &[],
            empty(),
            &[],
        )
        .await?;
    super::super::image::save_body(response, args.output.as_deref()).await
}
