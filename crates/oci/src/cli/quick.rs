//! The command lines engines use for every container, read without clap: its tree of all words costs more time and
//! memory than the rest of a short call. Whatever is not plainly one of these is left to clap, which also has all the
//! errors; a test holds the two to the same answer.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use super::exec::ExecArgs;
use super::{Cli, Command, CreateArgs, LogFormat, RunArgs};

/// The words after a flag that takes one, and the flags that take none.
struct Words<'a> {
    rest: std::slice::Iter<'a, OsString>,
}

enum Word<'a> {
    /// A flag, and its value where it came as `--flag=value`.
    Flag(&'a str, Option<&'a str>),
    Plain(&'a str),
}

impl<'a> Words<'a> {
    /// `None` at the end, and (inside) for what clap must look at.
    fn next(&mut self) -> Option<Option<Word<'a>>> {
        let word = self.rest.next()?.to_str();
        Some(word.and_then(|word| {
            if let Some(flag) = word.strip_prefix("--") {
                let (name, value) = match flag.split_once('=') {
                    Some((name, value)) => (name, Some(value)),
                    None => (flag, None),
                };
                return (!name.is_empty()).then_some(Word::Flag(name, value));
            }
            match word {
                "-b" => Some(Word::Flag("bundle", None)),
                "-d" => Some(Word::Flag("detach", None)),
                "-f" => Some(Word::Flag("force", None)),
                "-a" => Some(Word::Flag("all", None)),
                "-e" => Some(Word::Flag("env", None)),
                "-t" => Some(Word::Flag("tty", None)),
                "-u" => Some(Word::Flag("user", None)),
                "-p" => Some(Word::Flag("process", None)),
                _ => (!word.starts_with('-') && !word.is_empty()).then_some(Word::Plain(word)),
            }
        }))
    }

    /// The value of a flag: what came with it, or the next word.
    fn value(&mut self, with: Option<&'a str>) -> Option<&'a str> {
        let value = match with {
            Some(value) => value,
            None => self.rest.next()?.to_str()?,
        };
        (!value.is_empty() && !value.starts_with('-')).then_some(value)
    }
}

/// Sets a value that has not been set.
fn once<T>(place: &mut Option<T>, value: T) -> Option<()> {
    place.is_none().then(|| *place = Some(value))
}

/// Sets a switch, which takes no value and comes once.
fn switch(place: &mut bool, with: Option<&str>) -> Option<()> {
    (!*place && with.is_none()).then(|| *place = true)
}

/// The command line, its first word the program's name; `None` is for clap.
pub(super) fn parse(arguments: &[OsString]) -> Option<Cli> {
    let mut words = Words {
        rest: arguments.get(1..)?.iter(),
    };
    let mut cli = Cli {
        root: None,
        log: None,
        log_format: LogFormat::Text,
        debug: false,
        systemd_cgroup: false,
        rootless: "auto".into(),
        criu: None,
        command: Command::Features,
    };
    let (mut format, mut rootless) = (None, None);
    let name = loop {
        match words.next()?? {
            Word::Flag("root", with) => once(&mut cli.root, path(words.value(with)?))?,
            Word::Flag("log", with) => once(&mut cli.log, path(words.value(with)?))?,
            Word::Flag("log-format", with) => once(
                &mut format,
                match words.value(with)? {
                    "text" => LogFormat::Text,
                    "json" => LogFormat::Json,
                    _ => return None,
                },
            )?,
            Word::Flag("rootless", with) => once(&mut rootless, words.value(with)?.to_owned())?,
            Word::Flag("debug", with) => switch(&mut cli.debug, with)?,
            Word::Flag("systemd-cgroup", with) => switch(&mut cli.systemd_cgroup, with)?,
            Word::Plain(name) => break name,
            Word::Flag(..) => return None,
        }
    };
    cli.log_format = format.unwrap_or(LogFormat::Text);
    cli.rootless = rootless.unwrap_or_else(|| "auto".into());
    cli.command = match name {
        "run" => Command::Run(run(&mut words)?),
        "create" => {
            let run = run(&mut words)?;
            // What only `run` knows.
            if run.detach || run.keep || run.no_subreaper {
                return None;
            }
            Command::Create(run.create)
        }
        "exec" => Command::Exec(exec(&mut words)?),
        "start" => Command::Start {
            id: only(&mut words)?,
        },
        "state" => Command::State {
            id: only(&mut words)?,
        },
        "delete" => {
            let (mut force, mut id) = (false, None);
            while let Some(word) = words.next() {
                match word? {
                    Word::Flag("force", with) => switch(&mut force, with)?,
                    Word::Plain(word) => once(&mut id, word.to_owned())?,
                    Word::Flag(..) => return None,
                }
            }
            Command::Delete { force, id: id? }
        }
        "kill" => {
            let (mut all, mut id, mut signal) = (false, None, None);
            while let Some(word) = words.next() {
                match word? {
                    Word::Flag("all", with) => switch(&mut all, with)?,
                    Word::Plain(word) if id.is_none() => id = Some(word.to_owned()),
                    Word::Plain(word) => once(&mut signal, word.to_owned())?,
                    Word::Flag(..) => return None,
                }
            }
            Command::Kill {
                all,
                id: id?,
                signal: signal.unwrap_or_else(|| "SIGTERM".into()),
            }
        }
        _ => return None,
    };
    Some(cli)
}

fn path(text: &str) -> PathBuf {
    OsStr::new(text).into()
}

fn only(words: &mut Words<'_>) -> Option<String> {
    match (words.next()??, words.next()) {
        (Word::Plain(id), None) => Some(id.to_owned()),
        _ => None,
    }
}

fn run(words: &mut Words<'_>) -> Option<RunArgs> {
    let mut run = RunArgs {
        create: CreateArgs {
            bundle: PathBuf::new(),
            console_socket: None,
            pidfd_socket: None,
            pid_file: None,
            no_pivot: false,
            no_new_keyring: false,
            preserve_fds: 0,
            id: String::new(),
        },
        detach: false,
        keep: false,
        no_subreaper: false,
    };
    let (mut bundle, mut id, mut preserve) = (None, None, None);
    let create = &mut run.create;
    while let Some(word) = words.next() {
        match word? {
            Word::Flag("bundle", with) => once(&mut bundle, path(words.value(with)?))?,
            Word::Flag("console-socket", with) => {
                once(&mut create.console_socket, path(words.value(with)?))?;
            }
            Word::Flag("pidfd-socket", with) => {
                once(&mut create.pidfd_socket, path(words.value(with)?))?;
            }
            Word::Flag("pid-file", with) => once(&mut create.pid_file, path(words.value(with)?))?,
            Word::Flag("preserve-fds", with) => {
                let count = words.value(with)?;
                let plain = count.bytes().all(|byte| byte.is_ascii_digit());
                once(&mut preserve, count.parse::<u32>().ok().filter(|_| plain)?)?;
            }
            Word::Flag("no-pivot", with) => switch(&mut create.no_pivot, with)?,
            Word::Flag("no-new-keyring", with) => switch(&mut create.no_new_keyring, with)?,
            Word::Flag("detach", with) => switch(&mut run.detach, with)?,
            Word::Flag("keep", with) => switch(&mut run.keep, with)?,
            Word::Flag("no-subreaper", with) => switch(&mut run.no_subreaper, with)?,
            Word::Plain(word) => once(&mut id, word.to_owned())?,
            Word::Flag(..) => return None,
        }
    }
    create.bundle = bundle.unwrap_or_else(|| ".".into());
    create.preserve_fds = preserve.unwrap_or(0);
    create.id = id?;
    Some(run)
}

fn exec(words: &mut Words<'_>) -> Option<ExecArgs> {
    let mut exec = ExecArgs {
        console_socket: None,
        pidfd_socket: None,
        cwd: None,
        env: Vec::new(),
        tty: false,
        user: None,
        additional_gids: Vec::new(),
        process: None,
        detach: false,
        pid_file: None,
        process_label: None,
        apparmor: None,
        no_new_privs: false,
        cap: Vec::new(),
        preserve_fds: 0,
        cgroup: None,
        ignore_paused: false,
        no_subreaper: false,
        id: String::new(),
        command: Vec::new(),
    };
    loop {
        match words.next()?? {
            Word::Flag("console-socket", with) => {
                once(&mut exec.console_socket, path(words.value(with)?))?;
            }
            Word::Flag("pidfd-socket", with) => {
                once(&mut exec.pidfd_socket, path(words.value(with)?))?;
            }
            Word::Flag("pid-file", with) => once(&mut exec.pid_file, path(words.value(with)?))?,
            Word::Flag("process", with) => once(&mut exec.process, path(words.value(with)?))?,
            Word::Flag("cwd", with) => once(&mut exec.cwd, path(words.value(with)?))?,
            Word::Flag("user", with) => once(&mut exec.user, words.value(with)?.to_owned())?,
            Word::Flag("env", with) => exec.env.push(words.value(with)?.to_owned()),
            Word::Flag("tty", with) => switch(&mut exec.tty, with)?,
            Word::Flag("detach", with) => switch(&mut exec.detach, with)?,
            Word::Plain(id) => {
                exec.id = id.to_owned();
                break;
            }
            Word::Flag(..) => return None,
        }
    }
    let command: Option<Vec<&str>> = words.rest.by_ref().map(|word| word.to_str()).collect();
    let command = command?;
    // Flags may come behind the id, and only from the command on all words are its own.
    if command.first().is_some_and(|word| word.starts_with('-')) {
        return None;
    }
    exec.command = command.into_iter().map(str::to_owned).collect();
    Some(exec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use proptest::prelude::*;

    fn words(line: &[String]) -> Vec<OsString> {
        std::iter::once("berth-oci")
            .chain(line.iter().map(String::as_str))
            .map(OsString::from)
            .collect()
    }

    #[test]
    fn what_engines_say_needs_no_clap() {
        for line in [
            "--root /r --log /l --log-format json run --bundle /b c1",
            "--systemd-cgroup create -b /b --pid-file /p --console-socket /s c1",
            "--root=/r start c1",
            "kill c1 15",
            "kill --all c1 KILL",
            "delete --force c1",
            "state c1",
            "exec --pid-file /p --process /j --detach c1",
            "exec -e A=b -u 1:2 -t c1 sh -c exit",
        ] {
            let line: Vec<String> = line.split(' ').map(str::to_owned).collect();
            assert!(parse(&words(&line)).is_some(), "{line:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn clap_says_the_same(line in proptest::collection::vec(prop_oneof![
            4 => proptest::sample::select(vec![
                "run", "create", "start", "state", "exec", "-e", "--env=A=b", "-t", "-u", "1:2", "-p", "--process", "--cwd", "kill", "delete", "--root", "--root=/r", "--log", "--log-format",
                "--log-format=json", "json", "--rootless", "true", "--rootless=false", "--debug", "--systemd-cgroup", "-b",
                "--bundle", "/b", "--bundle=", "--pid-file", "--console-socket", "--preserve-fds", "--preserve-fds=2", "3",
                "-d", "--detach", "--detach=x", "--keep", "--no-pivot", "-f", "--force", "-a", "--all", "c1", "c2", "KILL",
                "--", "-", "--no-subreaper", "--no-new-keyring", "+3",
            ]).prop_map(str::to_owned),
            1 => "[a-z=/-]{0,5}",
        ], 1..9)) {
            let words = words(&line);
            if let Some(quick) = parse(&words) {
                match Cli::try_parse_from(&words) {
                    Ok(slow) => prop_assert_eq!(format!("{quick:?}"), format!("{slow:?}")),
                    Err(error) => prop_assert!(false, "{line:?}: {error}"),
                }
            }
        }
    }
}
