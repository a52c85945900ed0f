//! The processes of a container.

use std::sync::Arc;

use crate::Engine;
use crate::container::create::blocking;
use crate::container::inspect::Top;
use crate::container::processes;
use crate::error::{Error, Result};

impl Engine {
    /// Its processes by ps(1) options (`-ef` where empty).
    ///
    /// # Errors
    /// [`Error::NotRunning`]; [`Error::Invalid`] for options ps(1) refuses.
    pub async fn top(self: &Arc<Self>, container: &str, ps_args: &str) -> Result<Top> {
        let container = self.inventory.find(container)?;
        let record = container.record().clone();
        if !record.phase.lives() {
            return Err(Error::NotRunning(container.id.clone()));
        }
        let group = self.cgroup_of(&record);
        let arguments: Vec<String> = ps_args
            .split_ascii_whitespace()
            .map(str::to_owned)
            .collect();
        let top = blocking(move || {
            let pids = processes::of(&record, &group)?;
            if arguments.is_empty() || arguments == ["-ef"] {
                Ok(full(&pids))
            } else {
                by_ps(&pids, &arguments)
            }
        })
        .await?;
        self.tell(&container, "top");
        Ok(top)
    }
}

/// What `ps -ef` shows, read from /proc: ps need not be there.
fn full(pids: &[i32]) -> Top {
    let titles = ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]
        .map(str::to_owned)
        .to_vec();
    let boot = std::fs::read_to_string("/proc/stat").ok().and_then(|text| {
        text.lines()
            .find_map(|line| line.strip_prefix("btime ")?.trim().parse::<i64>().ok())
    });
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let user = |uid: u32| {
        users
            .lines()
            .find(|line| line.split(':').nth(2) == Some(&uid.to_string()))
            .and_then(|line| line.split(':').next())
            .map_or_else(|| uid.to_string(), str::to_owned)
    };
    // One that ended meanwhile is left out.
    let rows = pids.iter().filter_map(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let name = &stat[stat.find('(')? + 1..stat.rfind(')')?];
        let fields: Vec<&str> = stat[stat.rfind(')')? + 1..]
            .split_ascii_whitespace()
            .collect();
        let number = |index: usize| {
            fields
                .get(index)
                .and_then(|field| field.parse::<i64>().ok())
                .unwrap_or(0)
        };
        let uid =
            std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(format!("/proc/{pid}")).ok()?);
        let ticks = number(11) + number(12);
        let started = boot.unwrap_or(0) + number(19) / 100;
        let now = jiff::Timestamp::now().as_second();
        let age = (now - started).max(1);
        let begun =
            jiff::tz::TimeZone::system().to_datetime(jiff::Timestamp::from_second(started).ok()?);
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let command: Vec<String> = command
            .split(|byte| *byte == 0)
            .filter(|word| !word.is_empty())
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect();
        let (major, minor) = (
            (number(4) >> 8) & 0xfff,
            (number(4) & 0xff) | ((number(4) >> 12) & 0xfff00),
        );
        let tty = match number(4) {
            0 => "?".to_owned(),
            _ if major == 136 => format!("pts/{minor}"),
            _ => format!("tty{minor}"),
        };
        let seconds = ticks / 100;
        Some(vec![
            user(uid),
            pid.to_string(),
            number(1).to_string(),
            (ticks / age).min(99).to_string(),
            begun
                .strftime(if age < 86_400 { "%H:%M" } else { "%b%d" })
                .to_string(),
            tty,
            format!(
                "{:02}:{:02}:{:02}",
                seconds / 3600,
                seconds / 60 % 60,
                seconds % 60
            ),
            if command.is_empty() {
                format!("[{name}]")
            } else {
                command.join(" ")
            },
        ])
    });
    Top {
        processes: rows.collect(),
        titles,
    }
}

fn by_ps(pids: &[i32], arguments: &[String]) -> Result<Top> {
    let output = std::process::Command::new("ps")
        .args(arguments)
        .output()
        .map_err(|error| {
            Error::Unsupported(format!(
                "ps(1) cannot be run on this host ({error}); without options it is not needed"
            ))
        })?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(Error::Invalid(format!(
            "ps: {}",
            text.lines().next().unwrap_or("refused")
        )));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let titles: Vec<String> = lines
        .next()
        .unwrap_or_default()
        .split_ascii_whitespace()
        .map(str::to_owned)
        .collect();
    let Some(column) = titles.iter().position(|title| title == "PID") else {
        return Err(Error::Invalid(
            "Couldn't find PID field in ps output".into(),
        ));
    };
    let processes = lines
        .filter_map(|line| {
            let mut fields: Vec<String> =
                line.split_ascii_whitespace().map(str::to_owned).collect();
            let pid = fields.get(column)?.parse::<i32>().ok()?;
            if !pids.contains(&pid) || fields.len() < titles.len() {
                return None;
            }
            let rest = fields.split_off(titles.len() - 1).join(" ");
            fields.push(rest);
            Some(fields)
        })
        .collect();
    Ok(Top { titles, processes })
}
