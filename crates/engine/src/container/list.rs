//! Showing containers: `ps` and `inspect`.

use std::sync::Arc;

use jiff::Timestamp;

use crate::Engine;
use crate::container::create::blocking;
use crate::container::inspect::{
    ContainerInspect, ContainerSummary, GraphDriver, SummaryHostConfig, SummaryNetworkSettings,
};
use crate::container::record::{Container, Phase, Record, lock};
use crate::container::{HostConfig, ListOptions, network};
use crate::error::{Error, Result};
use crate::filters::Filters;

const FILTERS: [&str; 16] = [
    "ancestor",
    "before",
    "expose",
    "exited",
    "health",
    "id",
    "isolation",
    "is-task",
    "label",
    "name",
    "network",
    "publish",
    "since",
    "status",
    "volume",
    "label!",
];

impl Engine {
    /// Everything about it; with the sizes of its layers where `size`.
    pub async fn inspect(
        self: &Arc<Self>,
        container: &str,
        size: bool,
    ) -> Result<ContainerInspect> {
        let container = self.inventory.find(container)?;
        let engine = self.clone();
        blocking(move || Ok(engine.show(&container, size))).await
    }

    fn show(&self, container: &Container, size: bool) -> ContainerInspect {
        let record = container.record().clone();
        let mut words = record.arguments();
        let path = if words.is_empty() {
            String::new()
        } else {
            words.remove(0)
        };
        let file = |name: &str| container.directory.join(name).display().to_string();
        let mut driver = GraphDriver {
            name: "overlay2".into(),
            ..Default::default()
        };
        if let Ok(layers) = self.images.snapshot_layers(&container.id) {
            let lower: Vec<String> = layers
                .lower
                .iter()
                .map(|path| path.display().to_string())
                .collect();
            driver.data = [
                ("LowerDir".to_owned(), lower.join(":")),
                ("UpperDir".to_owned(), layers.upper.display().to_string()),
                ("WorkDir".to_owned(), layers.work.display().to_string()),
            ]
            .into();
        }
        let (size_rw, size_root_fs) = if size {
            self.sizes(&record)
        } else {
            (None, None)
        };
        let execs = lock(&container.execs).clone();
        ContainerInspect {
            id: record.id.clone(),
            created: record.created.clone(),
            path,
            args: words,
            state: record.state(),
            image: record.image.clone(),
            resolv_conf_path: file("resolv.conf"),
            hostname_path: file("hostname"),
            hosts_path: file("hosts"),
            log_path: if record.host.log_config.kind == "none" {
                String::new()
            } else {
                container.log_path().display().to_string()
            },
            name: format!("/{}", record.name),
            restart_count: record.restart_count,
            driver: "overlay2".into(),
            platform: record.platform.clone(),
            exec_ids: if execs.is_empty() { None } else { Some(execs) },
            graph_driver: driver,
            size_rw,
            size_root_fs,
            mounts: record.listed_mounts(),
            network_settings: network::settings(&record),
            host_config: HostConfig {
                links: self.shown_links(&record),
                ..record.host
            },
            config: record.config,
            ..Default::default()
        }
    }

    fn sizes(&self, record: &Record) -> (Option<i64>, Option<i64>) {
        let own = self
            .images
            .snapshot_usage(&record.id)
            .map_or(0, |usage| usage.bytes as i64);
        let image = self
            .images
            .inspect(&record.image)
            .map_or(0, |image| image.size() as i64);
        (Some(own), Some(image + own))
    }

    /// The rows of `ps`, newest first.
    ///
    /// # Errors
    /// [`Error::Invalid`] for filters that are not there.
    pub async fn list(self: &Arc<Self>, options: ListOptions) -> Result<Vec<ContainerSummary>> {
        let engine = self.clone();
        blocking(move || engine.rows(&options)).await
    }

    fn rows(&self, options: &ListOptions) -> Result<Vec<ContainerSummary>> {
        let filters = &options.filters;
        filters.only(&FILTERS)?;
        for status in filters.get("status") {
            if !matches!(
                status.as_str(),
                "created" | "running" | "paused" | "restarting" | "removing" | "exited" | "dead"
            ) {
                return Err(Error::Invalid(format!("invalid filter 'status={status}'")));
            }
        }
        check_values(filters)?;
        let edge = |name: &str| -> Result<Option<String>> {
            match filters.get(name).first() {
                Some(reference) => Ok(Some(
                    self.inventory.find(reference)?.record().created.clone(),
                )),
                None => Ok(None),
            }
        };
        let (before, since) = (edge("before")?, edge("since")?);
        let ancestors: Vec<String> = filters
            .get("ancestor")
            .iter()
            .map(|name| {
                self.images
                    .inspect(name)
                    .map_or_else(|_| name.clone(), |image| image.id.to_string())
            })
            .collect();
        // `-n` and some filters look at stopped ones too.
        let all = options.all
            || options.limit.is_some()
            || ["status", "exited", "before", "since"]
                .iter()
                .any(|name| filters.has(name));
        let links = self.links_by_target();
        let mut rows = Vec::new();
        for container in self.inventory.all() {
            let record = container.record().clone();
            let state = record.state();
            let fits = (all || state.running)
                && before.as_ref().is_none_or(|edge| record.created < *edge)
                && since.as_ref().is_none_or(|edge| record.created > *edge)
                && (!filters.has("ancestor") || ancestors.contains(&record.image))
                && matches(&record, filters);
            if !fits {
                continue;
            }
            let links = links.get(&record.id).map_or(&[][..], Vec::as_slice);
            rows.push(self.row(&record, links, options.size));
            if options
                .limit
                .is_some_and(|limit| limit > 0 && rows.len() == limit)
            {
                break;
            }
        }
        Ok(rows)
    }

    /// `links`: the names by which links of others lead to it.
    fn row(&self, record: &Record, links: &[String], size: bool) -> ContainerSummary {
        let (size_rw, size_root_fs) = if size {
            self.sizes(record)
        } else {
            (None, None)
        };
        // An image that has lost its name is shown by its id.
        let named = self
            .images
            .resolve(&record.config.image)
            .is_ok_and(|id| id.to_string() == record.image);
        let mut names = vec![format!("/{}", record.name)];
        names.extend_from_slice(links);
        ContainerSummary {
            id: record.id.clone(),
            names,
            image: if named {
                record.config.image.clone()
            } else {
                record.image.clone()
            },
            image_id: record.image.clone(),
            command: command(&record.arguments()),
            created: record
                .created
                .parse::<Timestamp>()
                .map_or(0, |at| at.as_second()),
            ports: network::ports(record),
            size_rw,
            size_root_fs,
            labels: record.config.labels.clone(),
            state: record.phase.word().into(),
            status: status(record, Timestamp::now()),
            host_config: SummaryHostConfig {
                network_mode: record.host.network_mode.clone(),
                annotations: record.host.annotations.clone(),
            },
            network_settings: SummaryNetworkSettings {
                networks: record.networks.clone(),
            },
            mounts: record.listed_mounts(),
        }
    }
}

/// A command in one line, as dockerd shows it: words with spaces in them are quoted.
fn command(words: &[String]) -> String {
    let quoted =
        words
            .iter()
            .enumerate()
            .map(|(number, word)| match word.contains(' ') && number > 0 {
                true => format!("'{word}'"),
                false => word.clone(),
            });
    quoted.collect::<Vec<_>>().join(" ")
}

/// Refuses values that fit nothing, so that a misspelt one is not an empty list.
fn check_values(filters: &Filters) -> Result<()> {
    let wrong =
        |name: &str, value: &str| Err(Error::Invalid(format!("invalid filter '{name}={value}'")));
    for code in filters.get("exited") {
        if code.parse::<i32>().is_err() {
            return wrong("exited", code);
        }
    }
    for health in filters.get("health") {
        if !matches!(
            health.as_str(),
            "none" | "starting" | "healthy" | "unhealthy"
        ) {
            return Err(Error::Invalid(format!(
                "unrecognized filter value for health: {health}"
            )));
        }
    }
    for name in ["publish", "expose"] {
        for value in filters.get(name) {
            if ports_of(value).is_none() {
                return wrong(name, value);
            }
        }
    }
    filters.boolean("is-task").map(drop)
}

/// `80`, `80-90`, `53/udp`.
fn ports_of(wanted: &str) -> Option<(std::ops::RangeInclusive<u16>, &str)> {
    let (numbers, protocol) = wanted.split_once('/').unwrap_or((wanted, "tcp"));
    let (first, last) = numbers.split_once('-').unwrap_or((numbers, numbers));
    let known = matches!(protocol, "tcp" | "udp" | "sctp");
    let range = first.parse().ok()?..=last.parse().ok()?;
    known.then_some((range, protocol))
}

fn matches(record: &Record, filters: &Filters) -> bool {
    let ports = network::ports(record);
    let port = |wanted: &str, public: bool| {
        let Some((range, protocol)) = ports_of(wanted) else {
            return false;
        };
        ports.iter().any(|port| {
            let number = if public {
                port.public_port
            } else {
                Some(port.private_port)
            };
            port.protocol == protocol && number.is_some_and(|number| range.contains(&number))
        })
    };
    let health = record
        .health
        .as_ref()
        .map_or("none", |health| health.status.as_str());
    filters.any("id", |wanted| record.id.starts_with(wanted))
        && filters.any("name", |wanted| named(&record.name, wanted))
        && filters.exact("status", record.phase.word())
        && filters.exact("health", health)
        && filters.any("exited", |code| {
            record.phase == Phase::Exited && code.parse() == Ok(record.exit_code)
        })
        && filters.labels("label", &record.config.labels)
        && filters.not_labels("label!", &record.config.labels)
        && filters.any("volume", |wanted| {
            record
                .mounts
                .iter()
                .any(|mount| mount.point.name == wanted || mount.point.destination == wanted)
        })
        && filters.any("network", |wanted| {
            record.networks.iter().any(|(name, settings)| {
                name == wanted || (wanted.len() >= 12 && settings.network_id.starts_with(wanted))
            })
        })
        && filters.any("publish", |wanted| port(wanted, true))
        && filters.any("expose", |wanted| port(wanted, false))
        // No container here belongs to a task of a swarm.
        && filters.boolean("is-task").ok().flatten() != Some(true)
}

/// Docker matches names by a regular expression; of those, clients use parts, `^` and `$`.
fn named(name: &str, wanted: &str) -> bool {
    let wanted = wanted.strip_prefix('/').unwrap_or(wanted);
    let (start, rest) = match wanted.strip_prefix('^') {
        Some(rest) => (true, rest.strip_prefix('/').unwrap_or(rest)),
        None => (false, wanted),
    };
    let (end, text) = match rest.strip_suffix('$') {
        Some(text) => (true, text),
        None => (false, rest),
    };
    let text = text.replace("\\.", ".").replace("\\-", "-");
    match (start, end) {
        (true, true) => name == text,
        (true, false) => name.starts_with(&text),
        (false, true) => name.ends_with(&text),
        (false, false) => name.contains(&text),
    }
}

/// `Up 5 minutes (healthy)`, as docker shows it.
fn status(record: &Record, now: Timestamp) -> String {
    let since = |text: &str| {
        text.parse::<Timestamp>()
            .map_or(0, |at| now.as_second() - at.as_second())
    };
    match record.phase {
        Phase::Created => "Created".into(),
        Phase::Removing => "Removal In Progress".into(),
        Phase::Dead => "Dead".into(),
        Phase::Exited => format!(
            "Exited ({}) {} ago",
            record.exit_code,
            span(since(&record.finished_at))
        ),
        Phase::Restarting => {
            format!(
                "Restarting ({}) {} ago",
                record.exit_code,
                span(since(&record.finished_at))
            )
        }
        Phase::Paused => format!("Up {} (Paused)", span(since(&record.started_at))),
        Phase::Running => {
            let up = format!("Up {}", span(since(&record.started_at)));
            match record.health.as_ref().map(|health| health.status.as_str()) {
                Some("starting") => format!("{up} (health: starting)"),
                Some(word @ ("healthy" | "unhealthy")) => format!("{up} ({word})"),
                _ => up,
            }
        }
    }
}

fn span(seconds: i64) -> String {
    let (minutes, hours) = (seconds / 60, (seconds + 1800) / 3600);
    match () {
        _ if seconds < 1 => "Less than a second".into(),
        _ if seconds == 1 => "1 second".into(),
        _ if seconds < 60 => format!("{seconds} seconds"),
        _ if minutes == 1 => "About a minute".into(),
        _ if minutes < 60 => format!("{minutes} minutes"),
        _ if hours == 1 => "About an hour".into(),
        _ if hours < 48 => format!("{hours} hours"),
        _ if hours < 24 * 14 => format!("{} days", hours / 24),
        _ if hours < 24 * 60 => format!("{} weeks", hours / 24 / 7),
        _ if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        _ => format!("{} years", hours / 24 / 365),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_matched_as_clients_ask() {
        assert!(named("web_1", "web") && named("web_1", "^/web_1$") && named("web_1", "^web"));
        assert!(!named("my_web", "^web") && !named("web_10", "^web_1$"));
    }

    #[test]
    fn commands_read_as_dockers() {
        let words = ["sh", "-c", "echo a; echo b", "x"].map(str::to_owned);
        assert_eq!(command(&words), "sh -c 'echo a; echo b' x");
        assert_eq!(command(&[]), "");
    }

    #[test]
    fn values_that_fit_nothing_are_refused() {
        for (name, value) in [
            ("exited", "x"),
            ("health", "well"),
            ("publish", "http"),
            ("expose", "80/smoke"),
            ("is-task", "maybe"),
        ] {
            let mut filters = Filters::default();
            filters.add(name, value);
            assert!(check_values(&filters).is_err(), "{name}={value}");
        }
        let good =
            r#"{"exited":["137"],"health":["none"],"publish":["80-90/udp"],"is-task":["0"]}"#;
        assert!(check_values(&Filters::parse(good).unwrap()).is_ok());
    }

    #[test]
    fn spans_read_as_dockers() {
        for (seconds, text) in [
            (0, "Less than a second"),
            (5, "5 seconds"),
            (60, "About a minute"),
            (3600, "About an hour"),
            (90000, "25 hours"),
        ] {
            assert_eq!(span(seconds), text);
        }
    }
}
