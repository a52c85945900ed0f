//! RUN: a command in a container over the image so far.

use parse_dockerfile::{Command, Flag, RunInstruction};
use rustix::fs::{AtFlags, FileType, OFlags};

use super::mount::Mounts;
use super::stage::{Made, Stage};
use super::words::{Lookup, expand, join_lines};
use super::{Build, PROXIES, RunStep, change, heredoc};
use crate::error::At;
use crate::layer::tree;
use crate::layer::unpack::{lossy, times};
use crate::snapshot::{Layers, mount_detached};
use crate::{Error, Result, RunConfig};

/// The command of a RUN.
pub(super) fn command(
    run: &RunConfig,
    instruction: &RunInstruction<'_>,
    escape: char,
) -> Result<Vec<String>> {
    if let Some(script) = instruction.here_docs.first() {
        return Ok(heredoc::script_command(run, &script.value));
    }
    match &instruction.arguments {
        Command::Exec(_) => Ok(change::command(run, &instruction.arguments, escape)),
        Command::Shell(line) => {
            let mut words = change::shell(run);
            words.push(join_lines(line.value, escape));
            Ok(words)
        }
        _ => Err(Error::Dockerfile("RUN in an unknown form".to_owned())),
    }
}

impl Build<'_> {
    pub(super) fn run_step(
        &mut self,
        stage: &mut Stage,
        command: Vec<String>,
        options: &[Flag<'_>],
        lookup: Lookup<'_>,
    ) -> Result<()> {
        let run = stage.run();
        let mut mounts = Mounts::default();
        let mut network = None;
        for option in options {
            let value = option
                .value
                .as_ref()
                .map(|v| v.value.as_ref())
                .unwrap_or_default();
            let value = expand(value, self.escape, lookup)?;
            match (&*option.name.value, value.as_str()) {
                ("mount", _) => self.mount(&value, &run, &mut mounts)?,
                ("network", "default" | "none" | "host") => network = Some(value),
                ("network", other) => {
                    return Err(Error::Dockerfile(format!(
                        "RUN --network={other}: default, none or host is wanted"
                    )));
                }
                ("security", "sandbox") => {}
                (other, value) => {
                    return Err(Error::Unsupported(format!(
                        "RUN --{other}={value} is not supported"
                    )));
                }
            }
        }
        let visible: Vec<String> = stage
            .args
            .iter()
            .filter(|(name, _)| {
                !PROXIES.contains(&name.as_str()) && change::variable(&run.env, name).is_none()
            })
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        let line = command.join(" ");
        let text = if visible.is_empty() {
            line
        } else {
            format!("|{} {} {line}", visible.len(), visible.join(" "))
        };
        let identity = serde_json::to_string(&(
            &command,
            &run.env,
            &run.user,
            &run.working_dir,
            &mounts.identity,
            &network,
        ))
        .unwrap_or_default();
        let key = self.key(stage, &text, &identity);
        if self.reuse(stage, &key)? {
            return Ok(());
        }
        self.make_copies(&mut mounts)?;
        let mut env = run.env.clone();
        for name in PROXIES {
            if let Some(Some(value)) = self.options.args.get(name) {
                env.push(format!("{name}={value}"));
            }
        }
        env.extend(visible);
        env.append(&mut mounts.env);
        let lease = self.store.lease();
        let layer = {
            let (snapshot, layers) = self.temporary(stage)?;
            let step = RunStep {
                key: snapshot.key.clone(),
                command: command.clone(),
                env,
                user: run.user.clone(),
                working_dir: if run.working_dir.is_empty() {
                    "/".to_owned()
                } else {
                    run.working_dir.clone()
                },
                mounts: std::mem::take(&mut mounts.mounts),
                network,
                config: run,
            };
            let short: String = snapshot
                .key
                .chars()
                .skip(crate::BUILD_SNAPSHOT.len())
                .take(12)
                .collect();
            let stubs = Stubs::before(&layers, &step)?;
            let used = mounts.lock(self.cancel)?;
            self.output.write(&format!(" ---> Running in {short}\n"));
            let code = self.runner.run(&layers, &step, self.output)?;
            drop(used);
            self.cancel.check()?;
            if code != 0 {
                return Err(Error::Step {
                    command: command.join(" "),
                    code,
                });
            }
            stubs.remove(&layers)?;
            let layer = self.layer_of(&snapshot, &lease)?;
            self.output
                .write(&format!(" ---> Removed intermediate container {short}\n"));
            layer
        };
        self.finish(
            stage,
            Made {
                text,
                layer: Some(layer),
                key: Some(&key),
            },
        )
    }
}

/// Files and folders that are in the image only because something was mounted on them for a step.
struct Stubs {
    /// Clean paths, the deepest of each mount first, with the time of the folder above the topmost.
    paths: Vec<Vec<u8>>,
    above: Vec<(Vec<u8>, (i64, u32))>,
}

impl Stubs {
    fn before(layers: &Layers, step: &RunStep) -> Result<Stubs> {
        let mut stubs = Stubs {
            paths: Vec::new(),
            above: Vec::new(),
        };
        if step.mounts.is_empty() {
            return Ok(stubs);
        }
        let root = mount_detached(layers, false)?;
        for mount in &step.mounts {
            let mut path = tree::clean(mount.target.as_bytes()).unwrap_or_default();
            let mut missing = false;
            while !path.is_empty() {
                match tree::open_in(&root, &path, OFlags::PATH) {
                    Ok(found) => {
                        if missing {
                            let stat = rustix::fs::fstat(found).doing(|| lossy(&path))?;
                            let time = (stat.st_mtime, stat.st_mtime_nsec as u32);
                            stubs.above.push((path, time));
                        }
                        break;
                    }
                    Err(_) => {
                        missing = true;
                        stubs.paths.push(path.clone());
                        path = tree::split(&path).0.to_vec();
                    }
                }
            }
        }
        Ok(stubs)
    }

    /// Removes those that are still empty.
    fn remove(self, layers: &Layers) -> Result<()> {
        if self.paths.is_empty() {
            return Ok(());
        }
        let root = mount_detached(layers, true)?;
        for path in &self.paths {
            let (folder, name) = tree::split(path);
            let Ok(parent) = tree::open_in(&root, folder, OFlags::PATH | OFlags::DIRECTORY) else {
                continue;
            };
            let Some(stat) = tree::stat_at(&parent, name).doing(|| lossy(path))? else {
                continue;
            };
            let flags = match tree::file_type(&stat) {
                FileType::Directory => AtFlags::REMOVEDIR,
                FileType::RegularFile if stat.st_size == 0 => AtFlags::empty(),
                _ => continue,
            };
            // A folder the step put something into stays.
            let _ = rustix::fs::unlinkat(&parent, name, flags);
        }
        for (path, time) in self.above {
            if let Ok(folder) = tree::open_in(&root, &path, OFlags::RDONLY | OFlags::DIRECTORY) {
                rustix::fs::futimens(&folder, &times(time)).doing(|| lossy(&path))?;
            }
        }
        Ok(())
    }
}
