//! `berth serve`: the daemon's start-up and end. What it does all day is the engine's business.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use base::Kind;
use base::paths::Paths;
use clap::Args;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::config::{Config, LogFormat};
use crate::failure::Failure;

#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Folder for everything this daemon keeps; a daemon with another folder is another daemon.
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// The daemon's own socket.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// The Docker Engine API socket.
    #[arg(long, value_name = "PATH")]
    pub docker_socket: Option<PathBuf>,
    /// Group that may use the sockets.
    #[arg(long)]
    pub group: Option<String>,
    /// Configuration file.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// error, warn, info, debug, trace; or a filter by room, as in info,net=debug.
    #[arg(long, value_name = "LEVEL", env = "BERTH_LOG")]
    pub log_level: Option<String>,
    /// text or json.
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// Starts this user's daemon behind the command's back; the path of its log.
pub fn start_in_background() -> Result<PathBuf, Failure> {
    let paths = Paths::of_this_user();
    fs::create_dir_all(&paths.state)
        .map_err(|e| Failure::io(format!("cannot make {}", paths.state.display()), &e))?;
    let log = paths.state.join("daemon.log");
    let opened = fs::OpenOptions::new().create(true).append(true).open(&log);
    let file = opened.map_err(|e| Failure::io(format!("cannot write {}", log.display()), &e))?;
    let copy = file
        .try_clone()
        .map_err(|e| Failure::io("cannot share the log", &e))?;
    let mut command = std::process::Command::new("/proc/self/exe");
    command
        .arg0("berth")
        .arg("serve")
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(copy)
        .current_dir("/");
    // SAFETY: setsid is async-signal-safe and touches no memory of the parent.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
    command
        .spawn()
        .map_err(|e| Failure::io("cannot start the daemon", &e))?;
    Ok(log)
}

/// The folders and sockets after the file and the options had their say.
fn paths_of(args: &ServeArgs, host: Option<PathBuf>) -> Result<(Paths, Config), Failure> {
    let mut paths = args
        .state_dir
        .as_deref()
        .map_or_else(Paths::of_this_user, Paths::beneath);
    if let Some(file) = &args.config {
        paths.config.clone_from(file);
    }
    let config = Config::load(&paths.config, args.config.is_some())?;
    if let (None, Some(state)) = (&args.state_dir, &config.state_dir) {
        let file = paths.config;
        paths = Paths {
            config: file,
            ..Paths::beneath(state)
        };
    }
    // Everything else hangs off these: a relative path would change its meaning with the working folder.
    let absolute = |path: &Path| {
        std::path::absolute(path).map_err(|e| Failure::io("cannot resolve a path", &e))
    };
    if let Some(socket) = args
        .socket
        .clone()
        .or(host)
        .or_else(|| config.socket.clone())
    {
        paths.socket = socket;
    }
    if let Some(socket) = args
        .docker_socket
        .clone()
        .or_else(|| config.docker_socket.clone())
    {
        paths.docker_socket = socket;
    }
    paths.state = absolute(&paths.state)?;
    paths.run = absolute(&paths.run)?;
    paths.socket = absolute(&paths.socket)?;
    paths.docker_socket = absolute(&paths.docker_socket)?;
    for socket in [&paths.socket, &paths.docker_socket] {
        if socket.as_os_str().len() > 107 {
            return Err(Failure::invalid(format!(
                "the socket path {} is longer than the 107 bytes a unix socket may have",
                socket.display()
            ))
            .with_fix("choose a shorter one with --socket and --docker-socket"));
        }
    }
    Ok((paths, config))
}

fn start_logging(args: &ServeArgs, config: &Config) -> Result<(), Failure> {
    let level = args
        .log_level
        .clone()
        .or_else(|| config.log.level.clone())
        .unwrap_or_else(|| "info".into());
    let filter = tracing_subscriber::EnvFilter::try_new(&level).map_err(|e| {
        Failure::invalid(format!("the log level {level:?} cannot be understood: {e}"))
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    match args.log_format.or(config.log.format).unwrap_or_default() {
        LogFormat::Text => builder
            .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
            .init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

/// Sockets handed over by systemd (sd_listen_fds(3)).
fn inherited() -> Vec<std::os::unix::net::UnixListener> {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<i32>().ok());
    if number("LISTEN_PID") != Some(std::process::id() as i32) {
        return Vec::new();
    }
    let count = number("LISTEN_FDS").unwrap_or(0).clamp(0, 16);
    (3..3 + count)
        .map(|fd| {
            // SAFETY: the service manager passed these descriptors to this process alone, and this is
            // the only place that takes them, once.
            std::os::unix::net::UnixListener::from(unsafe { OwnedFd::from_raw_fd(fd) })
        })
        .collect()
}

fn bind(path: &Path, group: Option<u32>) -> Result<std::os::unix::net::UnixListener, Failure> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)
            .map_err(|e| Failure::io(format!("cannot make {}", folder.display()), &e))?;
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => {
            return Err(Failure::new(
                Kind::Conflict,
                format!("somebody already serves {}", path.display()),
            )
            .with_fix("choose other sockets with --socket and --docker-socket"));
        }
        // Left by a daemon that was killed.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path)
                .map_err(|e| Failure::io(format!("cannot replace {}", path.display()), &e))?;
        }
        Err(_) => {}
    }
    let failed = |e: &io::Error| Failure::io(format!("cannot listen on {}", path.display()), e);
    let listener = std::os::unix::net::UnixListener::bind(path).map_err(|e| failed(&e))?;
    let mode = if group.is_some() { 0o660 } else { 0o600 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|e| failed(&e))?;
    if let Some(group) = group {
        chown(path, None, Some(group)).map_err(|e| failed(&e))?;
    }
    Ok(listener)
}

/// The number of a group by its name.
fn group_number(name: &str) -> Result<u32, Failure> {
    let groups =
        fs::read_to_string("/etc/group").map_err(|e| Failure::io("cannot read /etc/group", &e))?;
    groups
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(name))
                .then(|| fields.nth(1)?.parse().ok())
                .flatten()
        })
        .next()
        .ok_or_else(|| {
            Failure::new(Kind::NotFound, format!("there is no group {name}"))
                .with_fix(format!("groupadd --system {name}"))
        })
}

/// Tells systemd of a change (sd_notify(3)); nothing without it.
fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let Ok(socket) = std::os::unix::net::UnixDatagram::unbound() else {
        return;
    };
    let bytes = path.as_encoded_bytes();
    if let Some(name) = bytes.strip_prefix(b"@") {
        use std::os::linux::net::SocketAddrExt;
        if let Ok(address) = std::os::unix::net::SocketAddr::from_abstract_name(name) {
            let _ = socket.send_to_addr(state.as_bytes(), &address);
        }
    } else {
        let _ = socket.send_to(state.as_bytes(), Path::new(&path));
    }
}

/// Runs the daemon until it is told to end.
pub fn run(args: ServeArgs, host: Option<PathBuf>) -> Result<ExitCode, Failure> {
    let (paths, config) = paths_of(&args, host)?;
    start_logging(&args, &config)?;
    crate::rootless::enter(&paths)?;
    for folder in [&paths.state, &paths.run] {
        fs::create_dir_all(folder)
            .map_err(|e| Failure::io(format!("cannot make {}", folder.display()), &e))?;
        fs::set_permissions(folder, fs::Permissions::from_mode(0o711))
            .map_err(|e| Failure::io(format!("cannot protect {}", folder.display()), &e))?;
    }
    bound_arenas();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8)))
        .max_blocking_threads(256)
        .thread_keep_alive(Duration::from_secs(2))
        .enable_all()
        .build()
        .map_err(|e| Failure::io("cannot start", &e))?;
    let result = runtime.block_on(serve(&args, paths, config));
    runtime.shutdown_timeout(Duration::from_secs(2));
    result
}

/// How often memory that a burst of work left free is given back.
const TRIM: Duration = Duration::from_secs(30);

/// The allocator makes an arena for almost every thread of a burst, and keeps what each has ever held.
fn bound_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) only sets a parameter of the allocator; there is one thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Gives free memory back to the kernel, now and then: a daemon that was busy is as small afterwards as one that was not.
async fn trim() {
    loop {
        tokio::time::sleep(TRIM).await;
        #[cfg(target_env = "gnu")]
        // SAFETY: malloc_trim(3) may be called at any time from any thread.
        unsafe {
            libc::malloc_trim(0);
        }
    }
}

fn engine_config(paths: Paths, config: &Config) -> Result<engine::EngineConfig, Failure> {
    let mut settings = engine::EngineConfig::new(paths);
    settings.rootless = base::userns::owner().is_some();
    if settings.rootless {
        match base::userns::owner().and_then(crate::rootless::delegated_cgroup) {
            Some(parent) => settings.cgroup_parent = format!("{parent}/{}", settings.cgroup_parent),
            None => settings.cgroups = false,
        }
    }
    let containers = &config.containers;
    if let Some(driver) = &containers.log_driver {
        settings.log.kind.clone_from(driver);
    }
    for (key, value) in &containers.log_options {
        settings.log.config.insert(key.clone(), value.clone());
    }
    if let Some(init) = containers.init {
        settings.init = init;
    }
    if let Some(seconds) = containers.stop_timeout {
        settings.stop_timeout = Duration::from_secs(seconds);
    }
    if let Some(seconds) = config.machines.stop_timeout {
        settings.machine_stop_timeout = Duration::from_secs(seconds);
    }
    if let Some(size) = &containers.shm_size {
        settings.shm_size = base::units::parse_size(size)
            .map_err(|e| Failure::invalid(format!("containers.shm-size: {e}")))?;
    }
    if let Some(parent) = &containers.cgroup_parent {
        settings.cgroup_parent.clone_from(parent);
    }
    settings.registries = image::registry::Trust {
        insecure: config.registries.insecure.clone(),
        authorities: config.registries.authorities.clone(),
    };
    if let Some(subnet) = &config.network.default_subnet {
        let parsed = subnet
            .parse()
            .map_err(|e| Failure::invalid(format!("network.default-subnet: {e}")))?;
        settings.networks.bridge_subnet = Some(parsed);
    }
    for server in &config.network.dns {
        let parsed = server
            .parse()
            .map_err(|_| Failure::invalid(format!("network.dns: {server:?} is no IP address")))?;
        settings.networks.dns.push(parsed);
    }
    Ok(settings)
}

async fn serve(args: &ServeArgs, paths: Paths, config: Config) -> Result<ExitCode, Failure> {
    let group = args.group.clone().or_else(|| config.group.clone());
    let group = group.as_deref().map(group_number).transpose()?;
    let settings = engine_config(paths.clone(), &config)?;
    let engine = engine::Engine::open(settings)
        .await
        .map_err(|e| Failure::of(&e))?;
    let keeper = engine.keeper_pid().await.ok();
    let gateway = engine.networks().gateway().cloned();
    let keepers = move |gateway: Option<i32>| keeper.into_iter().chain(gateway).collect::<Vec<_>>();
    crate::rootless::note(
        &paths,
        &keepers(gateway.as_ref().map(|gateway| gateway.pid())),
    );
    if let Some(gateway) = gateway {
        let paths = paths.clone();
        let noted = move |pid| crate::rootless::note(&paths, &keepers(Some(pid)));
        if let Err(error) = gateway.supervise(noted) {
            warn!(%error, "should the networks' gateway die, only the next request starts another");
        }
    }
    let machines = {
        let engine = engine.clone();
        tokio::task::spawn_blocking(move || engine::machine::Machines::open(engine))
            .await
            .map_err(|e| Failure::internal(format!("cannot look for machines: {e}")))?
            .map_err(|e| Failure::of(&e))?
    };
    let mut listeners = inherited();
    let own_sockets = listeners.is_empty();
    if own_sockets {
        listeners.push(bind(&paths.socket, group)?);
        listeners.push(bind(&paths.docker_socket, group)?);
    }
    let listeners = listeners
        .into_iter()
        .map(|listener| {
            listener.set_nonblocking(true)?;
            UnixListener::from_std(listener)
        })
        .collect::<io::Result<Vec<_>>>()
        .map_err(|e| Failure::io("cannot use the sockets", &e))?;
    let stop = CancellationToken::new();
    watch_storage(machines.clone(), stop.clone());
    let router = crate::native::router(engine.clone(), machines.clone(), stop.clone());
    info!(
        state = %paths.state.display(),
        socket = %paths.socket.display(),
        docker_socket = %paths.docker_socket.display(),
        version = env!("CARGO_PKG_VERSION"),
        "serving"
    );
    notify("READY=1");
    let signals = tokio::spawn(stop_on_signal(stop.clone()));
    let trimming = tokio::spawn(trim());
    let result = api_docker::serve(listeners, router, stop).await;
    signals.abort();
    trimming.abort();
    notify("STOPPING=1");
    if own_sockets {
        let _ = fs::remove_file(&paths.socket);
        let _ = fs::remove_file(&paths.docker_socket);
    }
    if let Err(error) = result {
        error!(%error, "the API ended");
        return Err(Failure::io("the API ended", &error));
    }
    if host_stops().await {
        info!(
            "the host goes down: containers and machines are ended; what their restart policies say comes back with it"
        );
        let longest = engine.config().machine_stop_timeout + HOST_STOP_REST;
        notify(&format!("EXTEND_TIMEOUT_USEC={}", longest.as_micros()));
        engine.note_host_stop();
        let machines = tokio::task::spawn_blocking(move || machines.host_stops());
        let (_, ended) = tokio::join!(engine.host_stops(), machines);
        if let Err(error) = ended {
            error!(%error, "machines could not be shut down");
        }
        return Ok(ExitCode::SUCCESS);
    }
    match engine.leave_host().await {
        Ok(true) => info!("ended; nothing runs, and the networks are taken off the host"),
        Ok(false) => info!("ended; what runs goes on"),
        Err(error) => warn!(%error, "ended; the networks could not be taken off the host"),
    }
    Ok(ExitCode::SUCCESS)
}

/// What the ends of containers, and of machines that had to be killed, take beside the machines' own time.
const HOST_STOP_REST: Duration = Duration::from_secs(90);

/// Whether the init system is taking the host down. Then processes that outlive the daemon would only hold it up: systemd
/// waits a minute and a half for those that do not end by SIGTERM, and what is pid 1 of a container seldom does.
async fn host_stops() -> bool {
    if !std::path::Path::new("/run/systemd/system").is_dir() {
        return false;
    }
    let mut command = tokio::process::Command::new("systemctl");
    command
        .arg("is-system-running")
        .stdin(std::process::Stdio::null());
    let asked = tokio::time::timeout(Duration::from_secs(5), command.output()).await;
    matches!(asked, Ok(Ok(output)) if output.stdout.starts_with(b"stopping"))
}

/// Looks now and then whether the space that machines were promised is there.
fn watch_storage(machines: std::sync::Arc<engine::machine::Machines>, stop: CancellationToken) {
    const PAUSE: Duration = Duration::from_secs(300);
    tokio::spawn(async move {
        while stop
            .run_until_cancelled(tokio::time::sleep(PAUSE))
            .await
            .is_some()
        {
            let machines = machines.clone();
            let _ = tokio::task::spawn_blocking(move || machines.watch_storage()).await;
        }
    });
}

async fn stop_on_signal(stop: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt), Ok(mut hangup)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
        signal(SignalKind::hangup()),
    ) else {
        warn!("cannot listen for signals");
        return;
    };
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            // A closed terminal is no reason to end.
            _ = hangup.recv() => {}
        }
    }
    info!("told to end");
    stop.cancel();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_daemons_socket_is_replaced_and_a_living_ones_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(bind(&path, None).unwrap());
        let living = bind(&path, None).unwrap();
        assert!(bind(&path, None).is_err());
        drop(living);
    }
}
