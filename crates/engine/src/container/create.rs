//! Making a container: from what was asked for, over its image's defaults, to a record on disk.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use base::Id;
use base::file::{self, Durability};

use crate::Engine;
use crate::container::config::{ContainerConfig, HealthConfig};
use crate::container::host_config::HostConfig;
use crate::container::inspect::Created;
use crate::container::networking::NetworkingConfig;
use crate::container::record::{Container, Phase, Record, VERSION};
use crate::container::{capabilities, limits, links, mounts, network, spec};
use crate::error::{Error, Result};
use crate::wire::Words;

impl Engine {
    /// Makes a container; it is `created` then. `name` without a slash; `None` invents one. The image must be for
    /// `platform` (`linux/arm64/v8`); empty takes any.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`], [`Error::NameInUse`], [`Error::Invalid`] for what cannot be, and [`Error::NotFound`] where
    /// the image is for another platform: clients pull then.
    pub async fn create_container(
        self: &Arc<Self>,
        name: Option<&str>,
        platform: &str,
        config: ContainerConfig,
        host: HostConfig,
        networking: NetworkingConfig,
    ) -> Result<Created> {
        let platform = crate::image::platform(platform)?;
        self.create_as(name, platform, config, host, networking, false)
            .await
    }

    /// A container for one step of a build.
    pub(crate) async fn create_step(
        self: &Arc<Self>,
        config: ContainerConfig,
        host: HostConfig,
    ) -> Result<Created> {
        self.create_as(None, None, config, host, NetworkingConfig::default(), true)
            .await
    }

    async fn create_as(
        self: &Arc<Self>,
        name: Option<&str>,
        platform: Option<::image::Platform>,
        config: ContainerConfig,
        host: HostConfig,
        networking: NetworkingConfig,
        step: bool,
    ) -> Result<Created> {
        let engine = self.clone();
        let name = name.map(|name| name.strip_prefix('/').unwrap_or(name).to_owned());
        // Layers, volumes and records: files all the way. A caller that goes away does not stop it half-way.
        blocking(move || {
            engine.make(
                name.filter(|name| !name.is_empty()),
                platform.as_ref(),
                config,
                host,
                networking,
                step,
            )
        })
        .await
    }

    fn make(
        self: &Arc<Self>,
        name: Option<String>,
        platform: Option<&::image::Platform>,
        config: ContainerConfig,
        host: HostConfig,
        networking: NetworkingConfig,
        step: bool,
    ) -> Result<Created> {
        if config.image.is_empty() {
            return Err(Error::Invalid(
                "no image was specified: Config.Image is empty".into(),
            ));
        }
        let image =
            self.images.inspect(&config.image).map_err(|error| {
                match base::Classified::kind(&error) {
                    base::Kind::NotFound => Error::NoSuchImage(with_tag(&config.image)),
                    _ => Error::room(error),
                }
            })?;
        if let Some(wanted) = platform.filter(|wanted| wanted.accepts(&image.platform).is_none()) {
            return Err(Error::NotFound(format!(
                "image with reference {} was found but does not match the specified platform: wanted {wanted}, actual: {}",
                config.image, image.platform
            )));
        }
        // From here on nothing is a 404, which clients take for a missing image, and pull: what a new container names and
        // is not there makes its definition wrong.
        let asked_platform = platform.is_some();
        self.define(name, &image, asked_platform, config, host, networking, step)
            .map_err(|error| match base::Classified::kind(&error) {
                base::Kind::NotFound => Error::Invalid(error.to_string()),
                _ => error,
            })
    }

    #[allow(clippy::too_many_arguments)]
    fn define(
        self: &Arc<Self>,
        name: Option<String>,
        image: &::image::Image,
        asked_platform: bool,
        config: ContainerConfig,
        mut host: HostConfig,
        networking: NetworkingConfig,
        step: bool,
    ) -> Result<Created> {
        let id = Id::random();
        network::check_conflicts(&config, &host)?;
        let mut config = over_image(config, image.config.config.as_ref())?;
        let mut warnings = self.complete(&mut config, &mut host, &id)?;
        let own = ::image::Platform::host();
        if !asked_platform && image.platform.architecture != own.architecture {
            warnings.push(format!(
                "The requested image's platform ({}) does not match the detected host platform ({own}) and no specific platform was requested",
                image.platform
            ));
        }
        let networks = network::wanted(
            &self.networks,
            &config,
            &mut host,
            networking,
            &self.inventory,
        )?;
        let bridged = networks
            .keys()
            .find(|name| !matches!(name.as_str(), "host" | "none"));
        if let Some(name) = bridged {
            self.need_bridges(name)?;
        }
        if !self.config.cgroups && !limits::oci(&host.resources)?.is_empty() {
            return Err(Error::Room {
                message: "limits need a cgroup, and this daemon of an ordinary user has none that is its own".into(),
                kind: base::Kind::Unsupported,
                fix: Some(
                    "on a host with cgroup v2 alone: systemd-run --user --unit berth -p Delegate=yes berth serve; elsewhere run the daemon as root: sudo berth serve"
                        .into(),
                ),
            });
        }
        let links = links::wanted(&host, &self.inventory)?;
        for reference in [&host.ipc_mode, &host.pid_mode, &host.network_mode] {
            if let Some(other) = reference.strip_prefix("container:") {
                self.inventory.find(other)?;
            }
        }
        let id = id.to_string();
        let name = self.take_name(name, &id)?;
        let record = Record {
            version: VERSION,
            id: id.clone(),
            name: name.clone(),
            created: base::time::now_rfc3339(),
            image: image.id.to_string(),
            platform: image.platform.os.clone(),
            config,
            host,
            networks,
            links,
            step,
            phase: Phase::Created,
            started_at: base::time::ZERO.into(),
            finished_at: base::time::ZERO.into(),
            ..Default::default()
        };
        match self.furnish(record, &image.id) {
            Ok(container) => {
                self.inventory.insert(container.clone());
                self.tell(&container, "create");
            }
            Err(error) => {
                self.unmake(&id);
                self.inventory.free(&name, &id);
                return Err(error);
            }
        }
        warnings.dedup();
        Ok(Created { id, warnings })
    }

    /// Fills in what was not said, and checks what was; answers warnings.
    fn complete(
        &self,
        config: &mut ContainerConfig,
        host: &mut HostConfig,
        id: &Id,
    ) -> Result<Vec<String>> {
        let mut warnings = limits::check(&host.resources)?;
        // How clients say that nothing is said.
        let resources = &mut host.resources;
        resources.memory_swappiness = resources.memory_swappiness.filter(|value| *value >= 0);
        resources.pids_limit = resources.pids_limit.filter(|limit| *limit > 0);
        if host.network_mode == "host" && (host.publish_all_ports || !host.port_bindings.is_empty())
        {
            warnings.push("Published ports are discarded when using host network mode".to_owned());
        }
        if config.entrypoint.as_ref().is_none_or(|w| w.is_empty())
            && config.cmd.as_ref().is_none_or(|w| w.is_empty())
        {
            return Err(Error::Invalid("no command specified".into()));
        }
        if config.hostname.is_empty() {
            config.hostname = match host.uts_mode.as_str() {
                "host" => rustix::system::uname()
                    .nodename()
                    .to_string_lossy()
                    .into_owned(),
                _ => id.short().to_owned(),
            };
        } else if config.hostname.len() > 63
            || !config
                .hostname
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
        {
            return Err(Error::Invalid(format!(
                "invalid hostname format: {}",
                config.hostname
            )));
        }
        if !config.working_dir.is_empty() {
            if !config.working_dir.starts_with('/') {
                return Err(Error::Invalid(format!(
                    "the working directory '{}' is invalid, it needs to be an absolute path",
                    config.working_dir
                )));
            }
            config.working_dir = mounts::target(&config.working_dir).unwrap_or_else(|_| "/".into());
        }
        if let Some(wrong) = config
            .env
            .iter()
            .find(|entry| entry.is_empty() || entry.starts_with('='))
        {
            return Err(Error::Invalid(format!(
                "invalid environment variable: {wrong}"
            )));
        }
        if !config.stop_signal.is_empty() {
            crate::container::signal::number(&config.stop_signal)?;
        }
        check_health(config.healthcheck.as_ref())?;
        let empty = Words::default();
        capabilities::of(
            host.privileged,
            host.cap_add.as_ref().unwrap_or(&empty),
            host.cap_drop.as_ref().unwrap_or(&empty),
        )?;
        let security = spec::security(host)?;
        warnings.extend(security.warnings);
        if security.unmask {
            host.masked_paths = Some(Vec::new());
            host.readonly_paths = Some(Vec::new());
        }
        host.masked_paths.get_or_insert_with(spec::masked_paths);
        host.readonly_paths.get_or_insert_with(spec::readonly_paths);
        match host.runtime.as_str() {
            "" | "runc" | "io.containerd.runc.v2" | "berth-oci" => {
                host.runtime = "berth-oci".into()
            }
            other => {
                return Err(Error::Invalid(format!(
                    "unknown or invalid runtime name: {other}"
                )));
            }
        }
        if !matches!(host.isolation.as_str(), "" | "default") {
            return Err(Error::Invalid(format!(
                "invalid isolation '{}' on linux",
                host.isolation
            )));
        }
        if host.shm_size < 0 {
            return Err(Error::Invalid("SHM size can not be less than 0".into()));
        }
        if host.shm_size == 0 {
            host.shm_size = self.config.shm_size as i64;
        }
        mode(
            &mut host.ipc_mode,
            "IPC mode",
            "private",
            &["private", "shareable", "host", "none"],
            true,
        )?;
        mode(&mut host.pid_mode, "PID mode", "", &["", "host"], true)?;
        mode(&mut host.uts_mode, "UTS mode", "", &["", "host"], false)?;
        mode(
            &mut host.userns_mode,
            "user namespace mode",
            "",
            &["", "host"],
            false,
        )?;
        let cgroup = if limits::is_unified() && !host.privileged {
            "private"
        } else {
            "host"
        };
        mode(
            &mut host.cgroupns_mode,
            "cgroup namespace mode",
            cgroup,
            &["private", "host"],
            false,
        )?;
        for (key, value) in &host.sysctls {
            check_sysctl(key, value, host)?;
        }
        check_restart(host)?;
        if host.log_config.kind.is_empty() {
            let asked = std::mem::take(&mut host.log_config.config);
            host.log_config = self.config.log.clone();
            host.log_config.config.extend(asked);
        }
        warnings.extend(crate::container::logs::check(&host.log_config)?);
        if host.storage_opt.contains_key("size") {
            return Err(Error::Invalid(
                "--storage-opt size is not supported by the overlay store".into(),
            ));
        }
        if !(-1000..=1000).contains(&host.oom_score_adj) {
            return Err(Error::Invalid(format!(
                "Invalid value {}, range for oom score adj is [-1000, 1000]",
                host.oom_score_adj
            )));
        }
        if host.auto_remove && !matches!(host.restart_policy.name.as_str(), "" | "no") {
            return Err(Error::Invalid(
                "can't create 'AutoRemove' container with restart policy".into(),
            ));
        }
        if host.restart_policy.name.is_empty() {
            host.restart_policy.name = "no".into();
        }
        Ok(warnings)
    }

    /// The folders, files, volumes and layers of a new container. The record is written last: without it there is none.
    fn furnish(&self, mut record: Record, image: &::image::ImageId) -> Result<Arc<Container>> {
        let id = record.id.clone();
        let directory = self.containers_folder().join(&id);
        std::fs::create_dir(&directory)
            .map_err(Error::io(format!("making {}", directory.display())))?;
        record.mounts = mounts::resolve(
            &id,
            &directory,
            &record.config,
            &record.host,
            &self.inventory,
            &self.volumes,
        )?;
        mounts::hold_images(&id, &mut record.mounts, &self.images)?;
        let layers = self.images.snapshot(&id, image).map_err(Error::room)?;
        crate::container::root::copy_into_volumes(&layers, &record, &self.volumes)?;
        for name in ["hostname", "hosts", "resolv.conf"] {
            let path = directory.join(name);
            std::fs::write(&path, "").map_err(Error::io(format!("writing {}", path.display())))?;
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
            std::fs::set_permissions(&path, mode)
                .map_err(Error::io(format!("writing {}", path.display())))?;
        }
        let container = Container::new(record, directory, self.run_folder().join(&id));
        // Its name must not lead to an empty file after a power cut.
        container.change(Durability::Host, |_| ())?;
        mounts::kept(&container.directory);
        Ok(container)
    }

    /// Takes back what a failed creation made.
    pub(crate) fn unmake(&self, id: &str) {
        let directory = self.containers_folder().join(id);
        self.volumes.release(id);
        for volume in mounts::promised(&directory) {
            let _ = self.volumes.remove(&volume, true);
        }
        if let Err(error) = self.images.remove_snapshot(id) {
            tracing::warn!(container = id, %error, "a failed creation leaves a snapshot");
        }
        if let Err(error) = mounts::release_images(id, &self.images) {
            tracing::warn!(container = id, %error, "a failed creation leaves a snapshot");
        }
        let _ = std::fs::remove_dir_all(&directory);
    }

    fn take_name(&self, wanted: Option<String>, id: &str) -> Result<String> {
        if let Some(name) = wanted {
            check_name(&name)?;
            self.inventory.reserve(&name, id)?;
            return Ok(name);
        }
        for attempt in 0..100 {
            let name = crate::container::name::invent(attempt);
            if self.inventory.reserve(&name, id).is_ok() {
                return Ok(name);
            }
        }
        self.inventory.reserve(id, id)?;
        Ok(id.to_owned())
    }

    /// Publishes an event of a container.
    pub(crate) fn tell(&self, container: &Container, action: &str) {
        self.tell_with(container, action, &[]);
    }

    /// [`Engine::tell`] with further attributes.
    pub(crate) fn tell_with(&self, container: &Container, action: &str, more: &[(&str, String)]) {
        let mut attributes = container.attributes();
        attributes.extend(
            more.iter()
                .map(|(key, value)| (key.to_string(), value.clone())),
        );
        self.events
            .publish("container", action, &container.id, attributes);
    }
}

/// Runs file work off the reactor, to its end even if the caller goes away.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::Keeper(format!(
            "a task of the engine failed: {error}"
        ))),
    }
}

/// Refuses names that Docker refuses.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let mut bytes = name.bytes();
    let good = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && name.len() >= 2
        && name.len() <= 255
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    if good {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed"
    )))
}

fn with_tag(image: &str) -> String {
    let last = image.rsplit('/').next().unwrap_or(image);
    if last.contains(':') || image.starts_with("sha256:") {
        image.to_owned()
    } else {
        format!("{image}:latest")
    }
}

fn mode(
    value: &mut String,
    what: &str,
    default: &str,
    known: &[&str],
    container: bool,
) -> Result<()> {
    if value.is_empty() {
        *value = default.to_owned();
    }
    let joined = container
        && value
            .strip_prefix("container:")
            .is_some_and(|name| !name.is_empty());
    if joined || known.contains(&value.as_str()) {
        return Ok(());
    }
    Err(Error::Invalid(format!("invalid {what}: {value}")))
}

fn check_sysctl(key: &str, value: &str, host: &HostConfig) -> Result<()> {
    let wrong = |why: &str| {
        Err(Error::Invalid(format!(
            "sysctl '{key}' is not allowed{why}"
        )))
    };
    if key.contains("..") || key.contains('/') || value.contains('\n') {
        return wrong("");
    }
    let ipc = key.starts_with("fs.mqueue.")
        || matches!(
            key,
            "kernel.msgmax"
                | "kernel.msgmnb"
                | "kernel.msgmni"
                | "kernel.sem"
                | "kernel.shmall"
                | "kernel.shmmax"
                | "kernel.shmmni"
                | "kernel.shm_rmid_forced"
        );
    match key {
        _ if key.starts_with("net.") && host.network_mode == "host" => {
            wrong(" in the host's network namespace")
        }
        _ if ipc && host.ipc_mode == "host" => wrong(" in the host's IPC namespace"),
        "kernel.domainname" | "kernel.hostname" if host.uts_mode == "host" => {
            wrong(" in the host's UTS namespace")
        }
        "kernel.domainname" | "kernel.hostname" => Ok(()),
        _ if ipc || key.starts_with("net.") => Ok(()),
        _ => wrong(": it belongs to the whole host"),
    }
}

/// Refuses restart policies that contradict themselves.
pub(crate) fn check_restart(host: &HostConfig) -> Result<()> {
    let policy = &host.restart_policy;
    match policy.name.as_str() {
        "" | "no" | "always" | "unless-stopped" if policy.maximum_retry_count != 0 => {
            Err(Error::Invalid(
                "invalid restart policy: maximum retry count can only be used with 'on-failure'"
                    .into(),
            ))
        }
        "on-failure" if policy.maximum_retry_count < 0 => Err(Error::Invalid(
            "invalid restart policy: maximum retry count cannot be negative".into(),
        )),
        "" | "no" | "always" | "unless-stopped" | "on-failure" => Ok(()),
        other => Err(Error::Invalid(format!(
            "invalid restart policy: unknown policy '{other}'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'"
        ))),
    }
}

fn check_health(health: Option<&HealthConfig>) -> Result<()> {
    const LEAST: i64 = 1_000_000;
    let Some(health) = health else { return Ok(()) };
    for (name, value) in [
        ("Interval", health.interval),
        ("Timeout", health.timeout),
        ("StartPeriod", health.start_period),
        ("StartInterval", health.start_interval),
    ] {
        if value != 0 && value < LEAST {
            return Err(Error::Invalid(format!(
                "{name} in Healthcheck cannot be less than 1ms"
            )));
        }
    }
    if health.retries < 0 {
        return Err(Error::Invalid(
            "Retries in Healthcheck cannot be negative".into(),
        ));
    }
    match health.test.first().map(String::as_str) {
        None | Some("NONE" | "CMD" | "CMD-SHELL") => Ok(()),
        Some(other) => Err(Error::Invalid(format!(
            "Unknown health check type in Healthcheck.Test: {other:?}"
        ))),
    }
}

/// What was asked for, over the image's defaults.
pub(crate) fn over_image(
    mut asked: ContainerConfig,
    image: Option<&::image::RunConfig>,
) -> Result<ContainerConfig> {
    let defaults: ContainerConfig = match image {
        // One set of names on the wire: the image's document reads as ours.
        Some(image) => serde_json::to_value(image)
            .and_then(serde_json::from_value)
            .map_err(|error| Error::Invalid(format!("the image's configuration: {error}")))?,
        None => ContainerConfig::default(),
    };
    if asked.user.is_empty() {
        asked.user = defaults.user;
    }
    let key = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    let asked_keys: Vec<String> = asked.env.iter().map(|entry| key(entry)).collect();
    let mut env: Vec<String> = defaults
        .env
        .into_iter()
        .filter(|entry| !asked_keys.contains(&key(entry)))
        .collect();
    env.append(&mut asked.env);
    asked.env = env;
    let given = |words: &Option<Words>| words.as_ref().is_some_and(|words| !words.is_empty());
    if asked.entrypoint.is_none() {
        if !given(&asked.cmd) {
            asked.cmd = defaults.cmd;
        }
        asked.entrypoint = defaults.entrypoint;
    }
    // The command line's `--entrypoint ""`: none, not even the image's.
    if asked
        .entrypoint
        .as_ref()
        .is_some_and(|words| words.0 == [""])
    {
        asked.entrypoint = None;
    }
    if asked.working_dir.is_empty() {
        asked.working_dir = defaults.working_dir;
    }
    if let Some(volumes) = defaults.volumes {
        asked.volumes.get_or_insert_default().0.extend(volumes.0);
    }
    if let Some(ports) = defaults.exposed_ports {
        asked
            .exposed_ports
            .get_or_insert_default()
            .0
            .extend(ports.0);
    }
    let mut labels: BTreeMap<String, String> = defaults.labels;
    labels.append(&mut asked.labels);
    asked.labels = labels;
    if asked.stop_signal.is_empty() {
        asked.stop_signal = defaults.stop_signal;
    }
    asked.stop_timeout = asked.stop_timeout.or(defaults.stop_timeout);
    if asked.shell.is_none() {
        asked.shell = defaults.shell;
    }
    asked.healthcheck = match (asked.healthcheck, defaults.healthcheck) {
        (None, defaults) => defaults,
        (Some(own), None) => Some(own),
        (Some(mut own), Some(defaults)) => {
            if own.test.is_empty() {
                own.test = defaults.test;
            }
            for (value, default) in [
                (&mut own.interval, defaults.interval),
                (&mut own.timeout, defaults.timeout),
                (&mut own.start_period, defaults.start_period),
                (&mut own.start_interval, defaults.start_interval),
                (&mut own.retries, defaults.retries),
            ] {
                if *value == 0 {
                    *value = default;
                }
            }
            Some(own)
        }
    };
    Ok(asked)
}

/// Reads a record of a container folder.
pub(crate) fn read_record(directory: &Path) -> std::io::Result<Option<Record>> {
    file::read_json(&directory.join("container.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &[&str]) -> Option<Words> {
        Some(Words(list.iter().map(|word| word.to_string()).collect()))
    }

    #[test]
    fn an_own_entrypoint_drops_the_images_command() {
        let image = ::image::RunConfig {
            entrypoint: Some(vec!["/entry".into()]),
            cmd: Some(vec!["serve".into()]),
            env: vec!["A=1".into(), "B=2".into()],
            ..Default::default()
        };
        let asked = ContainerConfig {
            entrypoint: words(&["sh"]),
            env: vec!["B=3".into()],
            ..Default::default()
        };
        let config = over_image(asked, Some(&image)).unwrap();
        assert_eq!(
            (config.cmd, config.env),
            (None, vec!["A=1".to_owned(), "B=3".into()])
        );
        let config = over_image(
            ContainerConfig {
                cmd: words(&["x"]),
                ..Default::default()
            },
            Some(&image),
        )
        .unwrap();
        assert_eq!(
            (config.entrypoint, config.cmd),
            (words(&["/entry"]), words(&["x"]))
        );
    }

    #[test]
    fn names_that_docker_refuses_are_refused() {
        assert!(check_name("web-1.a_b").is_ok());
        for wrong in ["", "a", "-ab", "a/b", "ä1", "a b"] {
            assert!(check_name(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sysctls_of_the_whole_host_are_refused() {
        let host = HostConfig::default();
        assert!(check_sysctl("net.ipv4.ip_forward", "1", &host).is_ok());
        assert!(check_sysctl("kernel.panic", "1", &host).is_err());
        assert!(check_sysctl("net/../kernel.panic", "1", &host).is_err());
    }
}
