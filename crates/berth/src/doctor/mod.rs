//! `berth doctor`: what this host can do, in the order in which people stumble, each with a fix.

mod checks;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use crate::failure::Failure;
use crate::output::{self, Format};

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Mend what can be mended without asking: IP forwarding, missing packages.
    #[arg(long)]
    pub fix: bool,
    /// Say what --fix would do and do nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Folder whose file system is looked at; the daemon's state folder if not given.
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// table, json, yaml, or a Go template as '{{.Name}}'.
    #[arg(long, default_value_t, value_name = "FORMAT")]
    pub format: Format,
}

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    Pass,
    /// Something works less well, or not for everybody.
    Warn,
    /// Containers or machines will not work.
    Fail,
}

/// One line of the answer.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
    /// A command that mends it without a question.
    #[serde(skip)]
    pub command: Option<Vec<String>>,
}

impl Check {
    fn pass(name: &'static str, found: impl Into<String>) -> Check {
        Check {
            name,
            verdict: Verdict::Pass,
            found: found.into(),
            fix: None,
            command: None,
        }
    }

    fn warn(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Check {
        Check {
            name,
            verdict: Verdict::Warn,
            found: found.into(),
            fix: Some(fix.into()),
            command: None,
        }
    }

    fn fail(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Check {
        Check {
            name,
            verdict: Verdict::Fail,
            found: found.into(),
            fix: Some(fix.into()),
            command: None,
        }
    }

    /// The fix can be run as it stands.
    fn mended_by(mut self, command: &[&str]) -> Check {
        self.command = Some(command.iter().map(|&word| word.to_owned()).collect());
        self
    }
}

/// Prints every check; exit code 7 where one failed.
pub fn run(args: DoctorArgs) -> Result<ExitCode, Failure> {
    let state = args
        .state_dir
        .clone()
        .unwrap_or_else(|| base::paths::Paths::of_this_user().state);
    let mut all = checks::all(&state);
    if args.fix || args.dry_run {
        let mut ran = false;
        for check in all.iter().filter(|c| c.verdict != Verdict::Pass) {
            let Some(command) = &check.command else {
                continue;
            };
            eprintln!("{}: {}", check.name, command.join(" "));
            if args.dry_run {
                continue;
            }
            ran = true;
            let status = std::process::Command::new(&command[0])
                .args(&command[1..])
                .status();
            match status {
                Ok(status) if status.success() => {}
                Ok(status) => eprintln!("berth: {} ended with {status}", command[0]),
                Err(error) => eprintln!("berth: cannot run {}: {error}", command[0]),
            }
        }
        if ran {
            all = checks::all(&state);
        }
    }
    if args.format == Format::Table {
        let style = output::stdout_style();
        let width = all.iter().map(|c| c.name.len()).max().unwrap_or(0);
        for check in &all {
            let (word, colour) = match check.verdict {
                Verdict::Pass => ("PASS", style.green),
                Verdict::Warn => ("WARN", style.yellow),
                Verdict::Fail => ("FAIL", style.red),
            };
            output::line(format!(
                "{colour}{word}{}  {:<width$}  {}",
                style.reset, check.name, check.found
            ));
            if let Some(fix) = &check.fix {
                output::line(format!(
                    "      {:<width$}  {}fix:{} {fix}",
                    "", style.dim, style.reset
                ));
            }
        }
    } else {
        output::document(args.format, &all)?;
    }
    let failed = all.iter().any(|c| c.verdict == Verdict::Fail);
    Ok(if failed {
        ExitCode::from(base::Kind::Unsupported.exit_code())
    } else {
        ExitCode::SUCCESS
    })
}
