//! Instructions that only change how an image runs.

use parse_dockerfile::{Command, HealthcheckArguments, Instruction, JsonOrStringArray};
use serde_json::{Map, Value};

use super::heredoc;
use super::words::{Lookup, expand, join_lines, pairs, split};
use crate::config::{Healthcheck, RunConfig};
use crate::layer::tree;
use crate::{Error, Result};

/// Applies Dockerfile instructions to a configuration, as `commit --change` and `import --change` do.
///
/// # Errors
/// [`Error::Dockerfile`] for what is no instruction, or not one that only changes the configuration.
pub fn apply_changes(run: &mut RunConfig, changes: &[String]) -> Result<()> {
    for change in changes {
        let text = format!("FROM scratch\n{change}\n");
        let text = heredoc::fold(&text, '\\');
        let file = parse_dockerfile::parse(&text)
            .map_err(|e| Error::Dockerfile(format!("{change:?}: {e}")))?;
        for instruction in file.instructions.iter().skip(1) {
            let env = run.env.clone();
            let lookup = |name: &str| variable(&env, name);
            if !apply(run, instruction, &text, '\\', &lookup)? {
                return Err(Error::Dockerfile(format!(
                    "{change:?} is not a valid change command"
                )));
            }
        }
    }
    Ok(())
}

/// The value of a variable in a list of `NAME=VALUE`.
pub(super) fn variable(env: &[String], name: &str) -> Option<String> {
    env.iter().rev().find_map(|pair| {
        pair.split_once('=')
            .filter(|(n, _)| *n == name)
            .map(|(_, v)| v.to_owned())
    })
}

/// Sets a variable in a list of `NAME=VALUE`, in its place where it is there.
pub(super) fn set_variable(env: &mut Vec<String>, name: &str, value: &str) {
    let pair = format!("{name}={value}");
    match env
        .iter_mut()
        .find(|p| p.split_once('=').is_some_and(|(n, _)| n == name))
    {
        Some(place) => *place = pair,
        None => env.push(pair),
    }
}

/// The shell of shell-form commands.
pub(super) fn shell(run: &RunConfig) -> Vec<String> {
    run.shell
        .clone()
        .unwrap_or_else(|| vec!["/bin/sh".to_owned(), "-c".to_owned()])
}

/// A command as it will be executed.
pub(super) fn command(run: &RunConfig, command: &Command<'_>, escape: char) -> Vec<String> {
    match command {
        Command::Exec(words) => words
            .value
            .iter()
            .map(|w| w.value.clone().into_owned())
            .collect(),
        Command::Shell(text) => {
            let mut words = shell(run);
            words.push(join_lines(text.value, escape));
            words
        }
        _ => Vec::new(),
    }
}

fn nanoseconds(text: &str) -> Result<i64> {
    base::units::parse_duration(text)
        .ok()
        .and_then(|d| i64::try_from(d.as_nanos()).ok())
        .ok_or_else(|| Error::Dockerfile(format!("{text:?} is not a duration: write 30s or 1m30s")))
}

/// Applies one instruction; false where it is not of this kind.
pub(super) fn apply(
    run: &mut RunConfig,
    instruction: &Instruction<'_>,
    text: &str,
    escape: char,
    lookup: Lookup<'_>,
) -> Result<bool> {
    let empty = || Value::Object(Map::new());
    match instruction {
        Instruction::Env(env) => {
            for (name, value) in pairs(&env.arguments.value, escape, lookup, "ENV")? {
                set_variable(&mut run.env, &name, &value);
            }
        }
        Instruction::Label(label) => {
            for (name, value) in pairs(&label.arguments.value, escape, lookup, "LABEL")? {
                run.labels.insert(name, value);
            }
        }
        Instruction::Cmd(cmd) => run.cmd = Some(command(run, &cmd.arguments, escape)),
        Instruction::Entrypoint(entrypoint) => {
            let words = command(run, &entrypoint.arguments, escape);
            run.entrypoint = Some(heredoc::words_of_entrypoint(words));
            // A command of the base image was meant for its own entry point.
            run.cmd = None;
        }
        Instruction::Expose(expose) => {
            for argument in &expose.arguments {
                for port in split(&expand(&argument.value, escape, lookup)?, escape) {
                    let (number, protocol) = port.split_once('/').unwrap_or((&port, "tcp"));
                    let protocol = protocol.to_ascii_lowercase();
                    let (first, last) = number.split_once('-').unwrap_or((number, number));
                    let range = first
                        .parse::<u16>()
                        .ok()
                        .zip(last.parse::<u16>().ok())
                        .filter(|(a, b)| a <= b);
                    let Some((first, last)) =
                        range.filter(|_| ["tcp", "udp", "sctp"].contains(&protocol.as_str()))
                    else {
                        return Err(Error::Dockerfile(format!("invalid containerPort: {port}")));
                    };
                    for number in first..=last {
                        run.exposed_ports
                            .insert(format!("{number}/{protocol}"), empty());
                    }
                }
            }
        }
        Instruction::Volume(volume) => {
            let paths: Vec<String> = match &volume.arguments {
                JsonOrStringArray::Json(words) => words
                    .value
                    .iter()
                    .map(|w| w.value.clone().into_owned())
                    .collect(),
                JsonOrStringArray::String(words) => {
                    words.iter().map(|w| w.value.clone().into_owned()).collect()
                }
            };
            for path in paths {
                let path = expand(&path, escape, lookup)?;
                if path.is_empty() {
                    return Err(Error::Dockerfile(
                        "VOLUME specified can not be an empty string".to_owned(),
                    ));
                }
                run.volumes.insert(path, empty());
            }
        }
        Instruction::User(user) => run.user = expand(&user.arguments.value, escape, lookup)?,
        Instruction::Workdir(workdir) => {
            let path = expand(&workdir.arguments.value, escape, lookup)?;
            run.working_dir = absolute(&run.working_dir, &path);
        }
        Instruction::Stopsignal(signal) => {
            let name = expand(&signal.arguments.value, escape, lookup)?;
            let good = |b: u8| b.is_ascii_alphanumeric() || b == b'+' || b == b'-';
            if name.is_empty() || !name.bytes().all(good) {
                return Err(Error::Dockerfile(format!("Unknown signal: {name:?}")));
            }
            run.stop_signal = Some(name);
        }
        Instruction::Shell(shell) => {
            run.shell = Some(
                shell
                    .arguments
                    .iter()
                    .map(|w| w.value.clone().into_owned())
                    .collect(),
            );
        }
        Instruction::Onbuild(onbuild) => {
            let trigger = text[onbuild.onbuild.span.end..].trim_start();
            if matches!(
                *onbuild.instruction,
                Instruction::Onbuild(_) | Instruction::From(_) | Instruction::Maintainer(_)
            ) {
                return Err(Error::Dockerfile(
                    "Chaining ONBUILD, FROM and MAINTAINER is not allowed".to_owned(),
                ));
            }
            run.on_build
                .push(heredoc::written(join_lines(trigger, escape)));
        }
        Instruction::Healthcheck(check) => {
            let mut health = Healthcheck::default();
            for option in &check.options {
                let value = option
                    .value
                    .as_ref()
                    .map(|v| v.value.clone().into_owned())
                    .unwrap_or_default();
                match &*option.name.value {
                    "interval" => health.interval = nanoseconds(&value)?,
                    "timeout" => health.timeout = nanoseconds(&value)?,
                    "start-period" => health.start_period = nanoseconds(&value)?,
                    "start-interval" => health.start_interval = nanoseconds(&value)?,
                    "retries" => {
                        health.retries =
                            value.parse().ok().filter(|n| *n >= 0).ok_or_else(|| {
                                Error::Dockerfile(format!("--retries: {value:?} is not a number"))
                            })?;
                    }
                    other => return Err(Error::Dockerfile(format!("Unknown flag: {other}"))),
                }
            }
            match &check.arguments {
                HealthcheckArguments::Cmd { arguments, .. } => {
                    health.test = match arguments {
                        Command::Shell(text) => {
                            vec!["CMD-SHELL".to_owned(), join_lines(text.value, escape)]
                        }
                        exec => [vec!["CMD".to_owned()], command(run, exec, escape)].concat(),
                    };
                }
                _ => {
                    health = Healthcheck {
                        test: vec!["NONE".to_owned()],
                        ..Healthcheck::default()
                    }
                }
            }
            run.healthcheck = Some(health);
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// `path` from the folder `from`, without `.` and `..`.
pub(super) fn absolute(from: &str, path: &str) -> String {
    let joined = if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("{from}/{path}")
    };
    let normal = tree::normal(joined.as_bytes());
    format!("/{}", String::from_utf8_lossy(&normal))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_applied_as_instructions() {
        let mut run = RunConfig {
            env: vec!["A=1".to_owned()],
            ..RunConfig::default()
        };
        let changes = [
            "ENV B=$A C=\"x y\"",
            "CMD [\"run\", \"it\"]",
            "ENTRYPOINT echo hi",
            "EXPOSE 80 90-91/udp",
            "VOLUME /data",
            "USER me:us",
            "WORKDIR /a",
            "WORKDIR b/../c",
            "LABEL k=v",
            "STOPSIGNAL SIGINT",
            "HEALTHCHECK --interval=5s --retries=2 CMD true",
        ]
        .map(str::to_owned);
        apply_changes(&mut run, &changes).unwrap();
        assert_eq!(run.env, ["A=1", "B=1", "C=x y"]);
        assert_eq!(
            run.entrypoint.as_deref().unwrap(),
            ["/bin/sh", "-c", "echo hi"]
        );
        assert_eq!(
            run.exposed_ports.keys().collect::<Vec<_>>(),
            ["80/tcp", "90/udp", "91/udp"]
        );
        assert_eq!(
            (run.user.as_str(), run.working_dir.as_str()),
            ("me:us", "/a/c")
        );
        let health = run.healthcheck.unwrap();
        assert_eq!((health.interval, health.retries), (5_000_000_000, 2));
        assert_eq!(health.test, ["CMD-SHELL", "true"]);
        let mut run = RunConfig::default();
        for bad in ["RUN true", "COPY a b", "NONSENSE", "EXPOSE x", ""] {
            let result = apply_changes(&mut run, &[bad.to_owned()]);
            assert!(result.is_err() || bad.is_empty(), "{bad}");
        }
    }
}
