//! Commands that hold on to a running program: `run`, `attach`, `exec`, `start --attach`.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Args;
use hyper::Method;
use hyper::header::CONTENT_TYPE;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, split};
use tokio::signal::unix::{SignalKind, signal};

use super::Context;
use super::create::{ContainerOptions, Pull, environment};
use super::image::pull_image;
use crate::client::{Client, collect, empty, encode, json_body, read_json};
use crate::failure::{Failure, RUN_FAILED};
use crate::terminal::{DetachKeys, InputEnd, RawMode, copy_input, copy_output, size};

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Leave it running and print its id.
    #[arg(short, long)]
    pub detach: bool,
    /// Keys that leave the container running.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub detach_keys: String,
    /// Do not hand signals on to the program.
    #[arg(long)]
    pub no_sig_proxy: bool,
    #[command(flatten)]
    pub container: ContainerOptions,
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    #[command(flatten)]
    pub container: ContainerOptions,
}

#[derive(Debug, Args)]
pub struct AttachArgs {
    /// Keys that leave the container running.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub detach_keys: String,
    /// Do not attach standard input.
    #[arg(long)]
    pub no_stdin: bool,
    /// Do not hand signals on to the program.
    #[arg(long)]
    pub no_sig_proxy: bool,
    /// The container.
    pub container: String,
}

#[derive(Debug, Args)]
pub struct StartArgs {
    /// Attach to the output and wait for the end.
    #[arg(short, long)]
    pub attach: bool,
    /// Attach standard input too.
    #[arg(short, long)]
    pub interactive: bool,
    /// Keys that leave the container running.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub detach_keys: String,
    /// The containers.
    #[arg(required = true)]
    pub containers: Vec<String>,
}

#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Do not wait for the program's end.
    #[arg(short, long)]
    pub detach: bool,
    /// Keep standard input open.
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the program a terminal.
    #[arg(short, long)]
    pub tty: bool,
    /// Environment variable: NAME=VALUE, or NAME to hand on your own.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// File of environment variables, one a line.
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<std::path::PathBuf>,
    /// User and group.
    #[arg(short, long)]
    pub user: Option<String>,
    /// Working folder.
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// All capabilities and devices.
    #[arg(long)]
    pub privileged: bool,
    /// Keys that leave the program running.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub detach_keys: String,
    /// The container.
    pub container: String,
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

fn path_of(container: &str, verb: &str) -> String {
    format!("/containers/{}/{verb}", encode(container))
}

fn exit_code(status: i64) -> ExitCode {
    ExitCode::from((status & 0xff) as u8)
}

/// Creates the container, fetching its image first where that is wanted and needed. Its id.
async fn create(
    client: &Client,
    options: &ContainerOptions,
    attach: bool,
) -> Result<String, Failure> {
    let body = options.body(attach)?;
    if options.pull == Pull::Always {
        pull_image(client, &options.image, options.platform.as_deref(), false).await?;
    }
    let mut query = Vec::new();
    if let Some(name) = &options.name {
        query.push(("name", name.clone()));
    }
    if let Some(platform) = &options.platform {
        query.push(("platform", platform.clone()));
    }
    if let Some(file) = &options.cidfile
        && file.exists()
    {
        return Err(Failure::new(
            base::Kind::Conflict,
            format!("the file {} exists already", file.display()),
        )
        .with_fix("remove it, or name another with --cidfile"));
    }
    let created: Result<Value, Failure> = client.post("/containers/create", &query, &body).await;
    let created = match created {
        // The image is missing: dockerd answers 404 and names it.
        Err(failure)
            if failure.code == base::Kind::NotFound.exit_code()
                && options.pull == Pull::Missing
                && failure.message.to_lowercase().contains("image") =>
        {
            eprintln!(
                "berth: image {} is not stored here; pulling it",
                options.image
            );
            pull_image(client, &options.image, options.platform.as_deref(), false).await.map_err(|mut e| {
                e.fix.get_or_insert_with(|| {
                    format!("see what is stored: berth images; or make it: berth image bootstrap {}", options.image)
                });
                e
            })?;
            client.post("/containers/create", &query, &body).await?
        }
        other => other?,
    };
    for warning in created["Warnings"].as_array().into_iter().flatten() {
        eprintln!("berth: warning: {}", warning.as_str().unwrap_or_default());
    }
    let id = created["Id"].as_str().unwrap_or_default().to_owned();
    if let Some(file) = &options.cidfile {
        std::fs::write(file, &id)
            .map_err(|e| Failure::io(format!("cannot write {}", file.display()), &e))?;
    }
    Ok(id)
}

pub async fn run_create(context: &Context, args: CreateArgs) -> Result<ExitCode, Failure> {
    let id = create(&context.client, &args.container, false).await?;
    crate::output::line(id);
    Ok(ExitCode::SUCCESS)
}

pub async fn run_run(context: &Context, args: RunArgs) -> Result<ExitCode, Failure> {
    let outcome = run_inner(context, args).await;
    // docker's promise: 125 says that Berth failed, everything else is the program's own.
    outcome.map_err(|mut failure| {
        if ![126, 127].contains(&failure.code) {
            failure.code = match failure.message.to_lowercase() {
                m if m.contains("executable file not found")
                    || m.contains("no such file or directory") =>
                {
                    127
                }
                m if m.contains("permission denied") && m.contains("exec") => 126,
                _ => RUN_FAILED,
            };
        }
        failure
    })
}

async fn run_inner(context: &Context, args: RunArgs) -> Result<ExitCode, Failure> {
    let client = &context.client;
    let keys = DetachKeys::parse(&args.detach_keys).map_err(Failure::invalid)?;
    let options = &args.container;
    check_terminal(options.tty && options.interactive && !args.detach)?;
    let id = create(client, options, !args.detach).await?;
    if args.detach {
        client.act(&path_of(&id, "start"), &[]).await?;
        crate::output::line(id);
        return Ok(ExitCode::SUCCESS);
    }
    let session = Session {
        client,
        tty: options.tty,
        stdin: options.interactive,
        keys: options.tty.then_some(keys),
        proxy_signals: !args.no_sig_proxy,
    };
    session
        .attach_and_wait(
            &id,
            if options.rm { "removed" } else { "next-exit" },
            true,
            false,
        )
        .await
}

fn check_terminal(wanted: bool) -> Result<(), Failure> {
    if wanted && !std::io::stdin().is_terminal() {
        return Err(
            Failure::invalid("a terminal was asked for (-t), but standard input is none")
                .with_fix("leave out -t, or run this in a terminal"),
        );
    }
    Ok(())
}

/// One attachment to a container.
struct Session<'a> {
    client: &'a Client,
    tty: bool,
    stdin: bool,
    keys: Option<DetachKeys>,
    proxy_signals: bool,
}

impl Session<'_> {
    /// Attaches, waits and (optionally) starts, in the order that loses neither output nor exit code.
    async fn attach_and_wait(
        &self,
        id: &str,
        condition: &str,
        start: bool,
        logs: bool,
    ) -> Result<ExitCode, Failure> {
        let mut query = vec![
            ("stream", "1".to_owned()),
            ("stdout", "1".into()),
            ("stderr", "1".into()),
        ];
        if self.stdin {
            query.push(("stdin", "1".into()));
        }
        if logs {
            query.push(("logs", "1".into()));
        }
        let (stream, raw) = self
            .client
            .upgrade(&path_of(id, "attach"), &query, empty())
            .await?;
        let wait = self
            .client
            .send(
                Method::POST,
                &path_of(id, "wait"),
                &[("condition", condition.to_owned())],
                empty(),
                &[],
            )
            .await?;
        if start && let Err(failure) = self.client.act(&path_of(id, "start"), &[]).await {
            // A container that never ran and was to vanish at its end vanishes now.
            if condition == "removed" {
                let _ = self
                    .client
                    .delete(
                        &format!("/containers/{id}"),
                        &[("force", "1".into()), ("v", "1".into())],
                    )
                    .await;
            }
            return Err(failure);
        }
        let _forward = self
            .proxy_signals
            .then(|| forward_signals(self.client.clone(), id.to_owned(), self.tty));
        let target = path_of(id, "resize");
        let end = self.pump(stream, raw || self.tty, &target).await?;
        if end == StreamEnd::Detached {
            eprintln!(
                "\r\nberth: detached; it runs on (berth attach {})",
                &id[..id.len().min(12)]
            );
            return Ok(ExitCode::SUCCESS);
        }
        let status: Value = read_json(wait).await?;
        if let Some(message) = status["Error"]["Message"]
            .as_str()
            .filter(|m| !m.is_empty())
        {
            return Err(Failure {
                message: message.to_owned(),
                fix: None,
                code: RUN_FAILED,
            });
        }
        Ok(exit_code(
            status["StatusCode"]
                .as_i64()
                .unwrap_or(i64::from(RUN_FAILED)),
        ))
    }

    /// Moves bytes both ways until the output ends or the user detaches.
    async fn pump<S>(&self, stream: S, raw: bool, resize: &str) -> Result<StreamEnd, Failure>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (reader, mut writer) = split(stream);
        let _raw_mode = if self.tty && self.stdin {
            Some(
                RawMode::enter()
                    .map_err(|e| Failure::io("cannot set the terminal to raw mode", &e))?,
            )
        } else {
            None
        };
        let _resizer = self
            .tty
            .then(|| follow_size(self.client.clone(), resize.to_owned()));
        let output = copy_output(reader, raw);
        let input = async {
            if !self.stdin {
                return std::future::pending().await;
            }
            match copy_input(&mut writer, self.keys.as_ref()).await {
                Ok(InputEnd::Detached) => StreamEnd::Detached,
                // The program may go on writing after our input ended.
                Ok(InputEnd::Eof) | Err(_) => {
                    let _ = writer.flush().await;
                    std::future::pending().await
                }
            }
        };
        tokio::select! {
            result = output => match result {
                Ok(()) => Ok(StreamEnd::Ended),
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(StreamEnd::Ended),
                Err(error) => Err(Failure::io("the container's stream broke", &error)),
            },
            end = input => Ok(end),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum StreamEnd {
    Ended,
    Detached,
}

/// A task that ends with its handle.
pub(super) struct Background(tokio::task::JoinHandle<()>);

impl Drop for Background {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Tells the terminal's size to a path of the daemon, now and whenever it changes.
pub(super) fn follow_size(client: Client, path: String) -> Background {
    Background(tokio::spawn(async move {
        let Ok(mut changes) = signal(SignalKind::window_change()) else {
            return;
        };
        // The program may not have its terminal yet: a few tries in the beginning.
        let mut first = 0;
        loop {
            let mut done = false;
            if let Some((rows, columns)) = size() {
                let query = [("h", rows.to_string()), ("w", columns.to_string())];
                done = client.act(&path, &query).await.is_ok();
            }
            if !done && first < 20 {
                first += 1;
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                continue;
            }
            if changes.recv().await.is_none() {
                return;
            }
        }
    }))
}

fn forward_signals(client: Client, id: String, tty: bool) -> Background {
    Background(tokio::spawn(async move {
        let kinds = [
            (SignalKind::terminate(), "SIGTERM"),
            (SignalKind::hangup(), "SIGHUP"),
            (SignalKind::quit(), "SIGQUIT"),
            (SignalKind::user_defined1(), "SIGUSR1"),
            (SignalKind::user_defined2(), "SIGUSR2"),
            (SignalKind::interrupt(), "SIGINT"),
        ];
        let (sender, mut received) = tokio::sync::mpsc::unbounded_channel();
        let mut tasks = Vec::new();
        for (kind, name) in kinds {
            // On a raw terminal the keys reach the program as bytes.
            if tty && (name == "SIGINT" || name == "SIGQUIT") && std::io::stdin().is_terminal() {
                continue;
            }
            let Ok(mut stream) = signal(kind) else {
                continue;
            };
            let sender = sender.clone();
            tasks.push(Background(tokio::spawn(async move {
                while stream.recv().await.is_some() {
                    if sender.send(name).is_err() {
                        return;
                    }
                }
            })));
        }
        while let Some(name) = received.recv().await {
            let _ = client
                .act(&path_of(&id, "kill"), &[("signal", name.to_owned())])
                .await;
        }
    }))
}

pub async fn run_attach(context: &Context, args: AttachArgs) -> Result<ExitCode, Failure> {
    let client = &context.client;
    let keys = DetachKeys::parse(&args.detach_keys).map_err(Failure::invalid)?;
    let about: Value = client.get(&path_of(&args.container, "json"), &[]).await?;
    if about["State"]["Running"] != true {
        return Err(Failure::new(
            base::Kind::Conflict,
            format!("container {} is not running", args.container),
        )
        .with_fix(format!("berth start --attach {}", args.container)));
    }
    let tty = about["Config"]["Tty"] == true;
    let stdin = !args.no_stdin && about["Config"]["OpenStdin"] == true;
    let session = Session {
        client,
        tty,
        stdin,
        keys: tty.then_some(keys),
        proxy_signals: !args.no_sig_proxy,
    };
    let id = about["Id"].as_str().unwrap_or(&args.container).to_owned();
    session
        .attach_and_wait(&id, "not-running", false, false)
        .await
}

pub async fn run_start(context: &Context, args: StartArgs) -> Result<ExitCode, Failure> {
    let client = &context.client;
    if !args.attach && !args.interactive {
        return super::container::for_each(&args.containers, async |name| {
            client.act(&path_of(name, "start"), &[]).await?;
            Ok(Some(name.to_owned()))
        })
        .await;
    }
    let [name] = args.containers.as_slice() else {
        return Err(Failure::invalid(
            "one container at a time can be started and attached",
        ));
    };
    let keys = DetachKeys::parse(&args.detach_keys).map_err(Failure::invalid)?;
    let about: Value = client.get(&path_of(name, "json"), &[]).await?;
    let tty = about["Config"]["Tty"] == true;
    let stdin = args.interactive && about["Config"]["OpenStdin"] == true;
    let remove = about["HostConfig"]["AutoRemove"] == true;
    let session = Session {
        client,
        tty,
        stdin,
        keys: tty.then_some(keys),
        proxy_signals: true,
    };
    let id = about["Id"].as_str().unwrap_or(name).to_owned();
    session
        .attach_and_wait(
            &id,
            if remove { "removed" } else { "next-exit" },
            true,
            false,
        )
        .await
}

pub async fn run_exec(context: &Context, args: ExecArgs) -> Result<ExitCode, Failure> {
    let client = &context.client;
    let keys = DetachKeys::parse(&args.detach_keys).map_err(Failure::invalid)?;
    check_terminal(args.tty && args.interactive && !args.detach)?;
    let mut body = json!({
        "AttachStdin": args.interactive && !args.detach,
        "AttachStdout": !args.detach,
        "AttachStderr": !args.detach,
        "Detach": args.detach,
        "Tty": args.tty,
        "Env": environment(&args.env_file, &args.env)?,
        "User": args.user.clone().unwrap_or_default(),
        "WorkingDir": args.workdir.clone().unwrap_or_default(),
        "Privileged": args.privileged,
        "Cmd": args.command,
    });
    if let Some((rows, columns)) = size().filter(|_| args.tty) {
        body["ConsoleSize"] = json!([rows, columns]);
    }
    let created: Value = client
        .post(&path_of(&args.container, "exec"), &[], &body)
        .await?;
    let id = created["Id"].as_str().unwrap_or_default().to_owned();
    let start = json!({"Detach": args.detach, "Tty": args.tty});
    let path = format!("/exec/{id}/start");
    if args.detach {
        let headers = [(CONTENT_TYPE.as_str(), "application/json".to_owned())];
        let response = client
            .send(Method::POST, &path, &[], json_body(&start)?, &headers)
            .await?;
        collect(response).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let (stream, raw) = client.upgrade(&path, &[], json_body(&start)?).await?;
    let session = Session {
        client,
        tty: args.tty,
        stdin: args.interactive,
        keys: args.tty.then_some(keys),
        proxy_signals: false,
    };
    if session
        .pump(stream, raw || args.tty, &format!("/exec/{id}/resize"))
        .await?
        == StreamEnd::Detached
    {
        return Ok(ExitCode::SUCCESS);
    }
    // The stream may close a moment before the end is recorded.
    for _ in 0..200 {
        let about: Value = client.get(&format!("/exec/{id}/json"), &[]).await?;
        if about["Running"] != true {
            return Ok(exit_code(about["ExitCode"].as_i64().unwrap_or(0)));
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    Ok(ExitCode::SUCCESS)
}
