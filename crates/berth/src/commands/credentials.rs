//! Credentials of registries: kept, read and forgotten where docker keeps them (`~/.docker/config.json`, or the
//! credential helpers it names), so that both commands know the same registries.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use base::file::{self, Durability};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use clap::Args;
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use serde_json::{Map, Value, json};

use super::Context;
use crate::failure::Failure;

/// What docker's files call Docker Hub.
const HUB: &str = "https://index.docker.io/v1/";

#[derive(Debug, Args)]
pub struct LoginArgs {
    /// User name; asked for if not given.
    #[arg(short, long)]
    pub username: Option<String>,
    /// Password. Others of this host can see it: --password-stdin is better.
    #[arg(short, long, conflicts_with = "password_stdin")]
    pub password: Option<String>,
    /// Read the password from standard input.
    #[arg(long, requires = "username")]
    pub password_stdin: bool,
    /// The registry, as in localhost:5000; Docker Hub if not given.
    pub registry: Option<String>,
}

#[derive(Debug, Args)]
pub struct LogoutArgs {
    /// The registry, as in localhost:5000; Docker Hub if not given.
    pub registry: Option<String>,
}

/// The registry a reference points at, as docker's credential files name it.
fn registry_of(reference: &str) -> &str {
    match reference.split_once('/') {
        Some((first, _)) if first.contains('.') || first.contains(':') || first == "localhost" => {
            first
        }
        _ => HUB,
    }
}

fn config_path() -> Result<PathBuf, Failure> {
    let folder = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker"));
    folder
        .or_else(home)
        .map(|folder| folder.join("config.json"))
        .ok_or_else(|| Failure::invalid("neither HOME nor DOCKER_CONFIG is set"))
}

fn read_config() -> Result<Value, Failure> {
    file::read_json(&config_path()?)
        .map(|found| found.unwrap_or_else(|| json!({})))
        .map_err(|e| Failure::io("cannot read docker's configuration", &e))
}

fn write_config(config: &Value) -> Result<PathBuf, Failure> {
    let path = config_path()?;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)
            .map_err(|e| Failure::io(format!("cannot make {}", folder.display()), &e))?;
    }
    file::write_json(&path, config, Durability::Host)
        .map_err(|e| Failure::io(format!("cannot write {}", path.display()), &e))?;
    Ok(path)
}

/// The program that keeps the credentials of `registry`, where the configuration names one.
fn helper_of(config: &Value, registry: &str) -> Option<String> {
    config["credHelpers"][registry]
        .as_str()
        .or_else(|| config["credsStore"].as_str())
        .filter(|name| !name.is_empty())
        .map(|name| format!("docker-credential-{name}"))
}

/// One exchange with a credential helper (docker-credential-helpers, "Development"): a verb, a line in, JSON out.
fn ask_helper(program: &str, verb: &str, input: &str) -> Result<Vec<u8>, Failure> {
    let failed = |e: &io::Error| {
        Failure::io(format!("the credential helper {program} cannot run"), e).with_fix(
            "install it, or take it out of credsStore and credHelpers in docker's config.json",
        )
    };
    let mut child = Command::new(program)
        .arg(verb)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(|e| failed(&e))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that does not read is one that answers anyway.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(|e| failed(&e))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        return Err(Failure::invalid(format!(
            "the credential helper {program} refused to {verb}: {said}"
        )));
    }
    Ok(output.stdout)
}

/// User and password of an `auths` entry or a helper's answer.
fn pair_of(config: &Value, registry: &str) -> Option<(String, String)> {
    if let Some(program) = helper_of(config, registry) {
        // A helper without an entry fails; the pull then goes on without credentials, as docker's does.
        let answer: Value =
            serde_json::from_slice(&ask_helper(&program, "get", registry).ok()?).ok()?;
        let word = |key: &str| answer[key].as_str().map(str::to_owned);
        return word("Username").zip(word("Secret"));
    }
    let decoded = STANDARD
        .decode(config["auths"][registry]["auth"].as_str()?)
        .ok()?;
    let pair = String::from_utf8(decoded).ok()?;
    let (user, password) = pair.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}

/// What docker's own configuration knows of the registry of `reference`, as `X-Registry-Auth` wants it.
pub fn header_for(reference: &str) -> Option<String> {
    let auth = auth_of(&read_config().ok()?, registry_of(reference))?;
    Some(URL_SAFE.encode(auth.to_string()))
}

fn auth_of(config: &Value, registry: &str) -> Option<Value> {
    let (user, password) = pair_of(config, registry)?;
    // An identity token stands in the password's place under this name.
    Some(if user == "<token>" {
        json!({"identitytoken": password, "serveraddress": registry})
    } else {
        json!({"username": user, "password": password, "serveraddress": registry})
    })
}

/// All that docker's own configuration knows of registries, as `X-Registry-Config` wants it.
pub fn header_for_all() -> Option<String> {
    let config = read_config().ok()?;
    let known: Map<String, Value> = ["auths", "credHelpers"]
        .iter()
        .filter_map(|key| config[key].as_object())
        .flat_map(Map::keys)
        .filter_map(|registry| Some((registry.clone(), auth_of(&config, registry)?)))
        .collect();
    (!known.is_empty()).then(|| URL_SAFE.encode(Value::Object(known).to_string()))
}

/// `X-Registry-Auth` for a registry that nothing is known of; a push must have the header.
pub fn none() -> String {
    URL_SAFE.encode("{}")
}

fn read_line(what: &str) -> Result<String, Failure> {
    let mut line = String::new();
    io::stdin()
        .lock()
        .read_line(&mut line)
        .map_err(|e| Failure::io(format!("cannot read the {what}"), &e))?;
    let line = line.trim_end_matches(['\r', '\n']).to_owned();
    if line.is_empty() {
        return Err(Failure::invalid(format!("the {what} is empty")));
    }
    Ok(line)
}

/// Reads a line from the terminal without showing it.
fn read_secret() -> Result<String, Failure> {
    let stdin = io::stdin();
    let before = tcgetattr(&stdin)
        .map_err(|e| Failure::io("cannot read the terminal's settings", &e.into()))?;
    let mut silent = before.clone();
    silent.local_modes.remove(LocalModes::ECHO);
    eprint!("Password: ");
    let set = |mode| tcsetattr(&stdin, OptionalActions::Flush, mode);
    set(&silent).map_err(|e| Failure::io("cannot silence the terminal", &e.into()))?;
    let line = read_line("password");
    let _ = set(&before);
    eprintln!();
    line
}

fn asked(args: &LoginArgs) -> Result<(String, String), Failure> {
    let terminal = io::stdin().is_terminal();
    let nobody = || {
        Failure::invalid("nobody is there to type user name and password")
            .with_fix("echo PASSWORD | berth login --username USER --password-stdin REGISTRY")
    };
    let user = match &args.username {
        Some(user) => user.clone(),
        None if terminal => {
            eprint!("Username: ");
            read_line("user name")?
        }
        None => return Err(nobody()),
    };
    let password = match &args.password {
        Some(password) => password.clone(),
        None if args.password_stdin => read_line("password")?,
        None if terminal => read_secret()?,
        None => return Err(nobody()),
    };
    Ok((user, password))
}

/// Checks credentials with the registry and keeps them.
pub async fn login(context: &Context, args: LoginArgs) -> Result<ExitCode, Failure> {
    let (user, password) = asked(&args)?;
    let registry = args.registry.as_deref().unwrap_or(HUB);
    let body = json!({"username": user, "password": password, "serveraddress": registry});
    let _: Value = context.client.post("/auth", &[], &body).await?;
    let mut config = read_config()?;
    let place = if let Some(program) = helper_of(&config, registry) {
        let entry = json!({"ServerURL": registry, "Username": user, "Secret": password});
        ask_helper(&program, "store", &entry.to_string())?;
        program
    } else {
        let auth = STANDARD.encode(format!("{user}:{password}"));
        config["auths"][registry] = json!({"auth": auth});
        write_config(&config)?.display().to_string()
    };
    eprintln!("Login succeeded; the credentials are in {place}");
    Ok(ExitCode::SUCCESS)
}

/// Forgets credentials.
pub fn logout(args: &LogoutArgs) -> Result<ExitCode, Failure> {
    let registry = args.registry.as_deref().unwrap_or(HUB);
    let mut config = read_config()?;
    if let Some(program) = helper_of(&config, registry) {
        ask_helper(&program, "erase", registry)?;
    } else {
        let known = config["auths"]
            .as_object_mut()
            .and_then(|auths| auths.shift_remove(registry));
        if known.is_none() {
            eprintln!("Not logged in to {registry}");
            return Ok(ExitCode::SUCCESS);
        }
        write_config(&config)?;
    }
    eprintln!("Removed the credentials of {registry}");
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_kept_by_registry() {
        assert_eq!(registry_of("localhost:5000/app"), "localhost:5000");
        assert_eq!(registry_of("library/debian"), HUB);
    }

    #[test]
    fn a_password_may_hold_colons() {
        let config = json!({"auths": {"r.test": {"auth": STANDARD.encode("user:a:b")}}});
        assert_eq!(
            pair_of(&config, "r.test"),
            Some(("user".into(), "a:b".into()))
        );
        assert_eq!(pair_of(&config, "other.test"), None);
    }

    #[test]
    fn a_registrys_own_helper_goes_before_the_general_one() {
        let config = json!({"credsStore": "pass", "credHelpers": {"r.test": "secretservice"}});
        assert_eq!(
            helper_of(&config, "r.test").as_deref(),
            Some("docker-credential-secretservice")
        );
        assert_eq!(
            helper_of(&config, "s.test").as_deref(),
            Some("docker-credential-pass")
        );
        assert_eq!(helper_of(&json!({}), "r.test"), None);
    }
}
