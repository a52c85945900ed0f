//! One stage: its base image and its instructions, one image after the other.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use parse_dockerfile::{FromInstruction, Instruction};
use rustix::fs::OFlags;

use super::add::Written;
use super::words::expand;
use super::{Build, PROXIES, change, copy, heredoc, run};
use crate::config::{History, ImageConfig};
use crate::layer::tree;
use crate::manifest::Descriptor;
use crate::snapshot::mount_detached;
use crate::store::{Image, Lease};
use crate::{Digest, Error, ImageId, Platform, Reference, Result, RunConfig};

/// Where programs are looked for in an image that does not say; `ENV PATH=/mine:$PATH` adds to it.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

static SERIAL: AtomicU64 = AtomicU64::new(0);

/// Where a stage stands.
pub(super) struct Stage {
    /// The image so far; none before the first step on `scratch`.
    id: Option<ImageId>,
    config: ImageConfig,
    blobs: Vec<Descriptor>,
    /// Declared ARGs with their values.
    pub args: BTreeMap<String, String>,
    /// Whether a CMD stood in this stage, which an ENTRYPOINT then leaves.
    own_cmd: bool,
}

/// A snapshot that is removed whatever happens.
pub(super) struct Temporary<'a> {
    build: &'a Build<'a>,
    pub key: String,
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.build.store.remove_snapshot(&self.key) {
            tracing::warn!(key = self.key, %error, "a build's snapshot could not be removed");
        }
    }
}

/// What a new image is made of.
pub(super) struct Made<'a> {
    pub text: String,
    pub layer: Option<(Digest, Descriptor)>,
    pub key: Option<&'a Digest>,
}

impl Build<'_> {
    pub(super) fn stage(
        &mut self,
        from: &FromInstruction<'_>,
        header: &str,
        instructions: &[(&Instruction<'_>, String)],
        last: bool,
    ) -> Result<Option<ImageId>> {
        self.announce(header);
        let mut stage = self.base(from)?;
        if let Some(id) = stage.id {
            self.output.write(&format!(" ---> {}\n", id.short()));
        }
        let triggers = std::mem::take(&mut stage.config.config.get_or_insert_default().on_build);
        if !triggers.is_empty() {
            let s = if triggers.len() == 1 { "" } else { "s" };
            self.output.write(&format!(
                "# Executing {} build trigger{s}\n",
                triggers.len()
            ));
            let text = format!("FROM scratch\n{}\n", triggers.join("\n"));
            let text = heredoc::fold(&text, '\\');
            let file = parse_dockerfile::parse(&text)
                .map_err(|e| Error::Dockerfile(format!("an ONBUILD of the base image: {e}")))?;
            for (instruction, trigger) in file.instructions.iter().skip(1).zip(&triggers) {
                self.instruction(&mut stage, instruction, trigger, &text)?;
            }
        }
        let text = self.text;
        for (instruction, shown) in instructions {
            self.cancel.check()?;
            self.announce(shown);
            self.instruction(&mut stage, instruction, shown, text)?;
        }
        if last && !self.options.labels.is_empty() {
            let labels: Vec<String> = self
                .options
                .labels
                .iter()
                .map(|(k, v)| format!("{k}={v:?}"))
                .collect();
            let shown = format!("LABEL {}", labels.join(" "));
            self.announce(&shown);
            let labels = self.options.labels.clone();
            stage
                .config
                .config
                .get_or_insert_default()
                .labels
                .extend(labels);
            self.finish_cheap(&mut stage, &shown)?;
        }
        Ok(stage.id)
    }

    fn base(&mut self, from: &FromInstruction<'_>) -> Result<Stage> {
        let globals = self.globals.clone();
        let lookup = |name: &str| globals.get(name).cloned();
        let name = expand(&from.image.value, self.escape, &lookup)?;
        if name.is_empty() {
            return Err(Error::Dockerfile(format!(
                "base name ({}) should not be blank",
                from.image.value
            )));
        }
        let mut platform = self.options.platform.clone();
        for option in &from.options {
            let value = option
                .value
                .as_ref()
                .map(|v| v.value.as_ref())
                .unwrap_or_default();
            match &*option.name.value {
                "platform" => {
                    platform = Some(Platform::parse(&expand(value, self.escape, &lookup)?)?)
                }
                other => return Err(Error::Dockerfile(format!("FROM: Unknown flag: {other}"))),
            }
        }
        let mut stage = if name == "scratch" {
            Stage {
                id: None,
                config: ImageConfig::blank(&platform.unwrap_or_else(Platform::host)),
                blobs: Vec::new(),
                args: BTreeMap::new(),
                own_cmd: false,
            }
        } else {
            let id = match self.stage_image(&name)? {
                Some(id) => id,
                None => self.image(&name, platform.as_ref())?,
            };
            self.lease.hold(id);
            Stage::of(&self.store.inspect(&id.to_string())?)
        };
        let env = &mut stage.config.config.get_or_insert_default().env;
        if change::variable(env, "PATH").is_none() {
            env.push(format!("PATH={DEFAULT_PATH}"));
        }
        Ok(stage)
    }

    /// The image of an earlier stage, or else of this name.
    pub(super) fn named_image(&self, name: &str) -> Result<ImageId> {
        let id = match self.stage_image(name)? {
            Some(id) => id,
            None => self.image(name, self.options.platform.as_ref())?,
        };
        self.lease.hold(id);
        Ok(id)
    }

    /// The image of an earlier stage of this name or number.
    fn stage_image(&self, name: &str) -> Result<Option<ImageId>> {
        let by_name = self
            .stages
            .iter()
            .rposition(|(n, _)| n.as_deref() == Some(&*name.to_ascii_lowercase()));
        let number = by_name.or_else(|| {
            name.parse::<usize>()
                .ok()
                .filter(|n| *n < self.stages.len())
        });
        match number {
            None => Ok(None),
            Some(number) => match self.stages[number].1 {
                Some(id) => Ok(Some(id)),
                None => Err(Error::Dockerfile(format!("stage {name} made no image"))),
            },
        }
    }

    fn image(&self, name: &str, platform: Option<&Platform>) -> Result<ImageId> {
        if !self.options.pull {
            let found = self.store.resolve(name).ok();
            let fits = |id: &ImageId| {
                platform.is_none_or(|wanted| {
                    self.store
                        .inspect(&id.to_string())
                        .is_ok_and(|i| wanted.accepts(&i.platform).is_some())
                })
            };
            if let Some(id) = found.filter(fits) {
                return Ok(id);
            }
        }
        let reference = Reference::parse(name)?.or_latest();
        self.runner.pull(&reference, platform, self.output)
    }

    fn instruction(
        &mut self,
        stage: &mut Stage,
        instruction: &Instruction<'_>,
        shown: &str,
        text: &str,
    ) -> Result<()> {
        let escape = self.escape;
        let known = self.variables(stage);
        let lookup = move |name: &str| known.get(name).cloned();
        if let Some(written) = Written::of(instruction, shown, text) {
            return self.copy_step(stage, &written, &lookup);
        }
        match instruction {
            Instruction::From(_) => Err(Error::Dockerfile("FROM is not allowed here".to_owned())),
            Instruction::Arg(argument) => {
                let declared = self.declare(&argument.arguments.value, &lookup)?;
                for (name, value) in declared {
                    if let Some(value) = value.or_else(|| self.globals.get(&name).cloned()) {
                        stage.args.insert(name, value);
                    }
                }
                self.finish_cheap(stage, shown)
            }
            Instruction::Maintainer(maintainer) => {
                stage.config.author = maintainer.name.value.clone().into_owned();
                self.finish_cheap(stage, shown)
            }
            Instruction::Run(run) => {
                let command = run::command(&stage.run(), run, escape)?;
                self.run_step(stage, command, &run.options, &lookup)
            }
            other => {
                let run = stage.config.config.get_or_insert_default();
                let cmd = run.cmd.clone();
                if !change::apply(run, other, text, escape, &lookup)? {
                    return Err(Error::Unsupported(format!(
                        "the instruction {shown:?} is not supported"
                    )));
                }
                match other {
                    Instruction::Cmd(_) => stage.own_cmd = true,
                    Instruction::Entrypoint(_) if stage.own_cmd => run.cmd = cmd,
                    _ => {}
                }
                if matches!(other, Instruction::Workdir(_)) {
                    return self.workdir_step(stage, shown);
                }
                self.finish_cheap(stage, shown)
            }
        }
    }

    fn variables(&self, stage: &Stage) -> BTreeMap<String, String> {
        let mut known: BTreeMap<String, String> = PROXIES
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), self.options.args.get(*name)?.clone()?)))
            .collect();
        known.extend(stage.args.clone());
        // The environment of the image wins over an ARG of the same name.
        for pair in &stage.run().env {
            if let Some((name, value)) = pair.split_once('=') {
                known.insert(name.to_owned(), value.to_owned());
            }
        }
        known
    }

    /// An image that differs only in its configuration.
    fn finish_cheap(&mut self, stage: &mut Stage, shown: &str) -> Result<()> {
        let run = serde_json::to_string(&stage.config.config).unwrap_or_default();
        let key = self.key(stage, shown, &format!("{run}\n{}", stage.config.author));
        if self.reuse(stage, &key)? {
            return Ok(());
        }
        self.finish(
            stage,
            Made {
                text: format!("/bin/sh -c #(nop)  {shown}"),
                layer: None,
                key: Some(&key),
            },
        )
    }

    pub(super) fn key(&self, stage: &Stage, shown: &str, extra: &str) -> Digest {
        let parent = stage
            .id
            .map_or_else(|| stage.config.architecture.clone(), |id| id.to_string());
        Digest::of(format!("2\0{parent}\0{shown}\0{extra}").as_bytes())
    }

    /// Takes the image an earlier build made, if there is one.
    pub(super) fn reuse(&self, stage: &mut Stage, key: &Digest) -> Result<bool> {
        let Some(id) = self.lookup(key) else {
            self.cached.set(false);
            return Ok(false);
        };
        let after = Stage::of(&self.store.inspect(&id.to_string())?);
        (stage.id, stage.config, stage.blobs) = (after.id, after.config, after.blobs);
        self.output
            .write(&format!(" ---> Using cache\n ---> {}\n", id.short()));
        Ok(true)
    }

    /// Makes the image after a step.
    pub(super) fn finish(&mut self, stage: &mut Stage, made: Made<'_>) -> Result<()> {
        let now = base::time::now_rfc3339_nano();
        stage.config.created = Some(now.clone());
        stage.config.history.push(History {
            created: Some(now),
            created_by: made.text,
            empty_layer: made.layer.is_none(),
            ..History::default()
        });
        if let Some((diff, blob)) = made.layer {
            stage.config.rootfs.diff_ids.push(diff);
            stage.blobs.push(blob);
        }
        self.lease.hold(Digest::of(&stage.config.to_bytes()));
        let id = self
            .store
            .assemble(&stage.config, stage.blobs.clone(), stage.id, &[])?;
        if let Some(key) = made.key {
            self.remember(key, &id)?;
        }
        stage.id = Some(id);
        self.output.write(&format!(" ---> {}\n", id.short()));
        Ok(())
    }

    pub(super) fn temporary(&self, stage: &Stage) -> Result<(Temporary<'_>, crate::Layers)> {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let key = format!(
            "{}{}-{serial}",
            crate::BUILD_SNAPSHOT,
            base::Id::random().short()
        );
        let chain = Digest::chains(&stage.config.rootfs.diff_ids);
        let layers = self.store.snapshot_of_chain(&key, stage.id, chain)?;
        Ok((Temporary { build: self, key }, layers))
    }

    pub(super) fn layer_of(
        &self,
        snapshot: &Temporary<'_>,
        lease: &Lease,
    ) -> Result<(Digest, Descriptor)> {
        let (layer, blob) = self
            .store
            .layer_from_snapshot(&snapshot.key, lease, self.cancel)?;
        Ok((layer.diff_id, blob))
    }

    fn workdir_step(&mut self, stage: &mut Stage, shown: &str) -> Result<()> {
        let path = stage.run().working_dir;
        let key = self.key(stage, shown, &path);
        if self.reuse(stage, &key)? {
            return Ok(());
        }
        let lease = self.store.lease();
        let layer = {
            let (snapshot, layers) = self.temporary(stage)?;
            let root = mount_detached(&layers, true)?;
            let clean = tree::clean(path.as_bytes()).unwrap_or_default();
            if tree::open_in(&root, &clean, OFlags::PATH | OFlags::DIRECTORY).is_ok() {
                None
            } else {
                let user = stage.run().user;
                let owner = match user.as_str() {
                    "" => (0, 0),
                    // A user that only another layer knows is none here.
                    user => copy::owner(&root, user).unwrap_or((0, 0)),
                };
                copy::make_folder(&root, &clean, owner)?;
                drop(root);
                Some(self.layer_of(&snapshot, &lease)?)
            }
        };
        self.finish(
            stage,
            Made {
                text: format!("/bin/sh -c #(nop) {shown}"),
                layer,
                key: Some(&key),
            },
        )
    }
}

impl Stage {
    /// A stage that stands at `image`.
    pub(super) fn of(image: &Image) -> Stage {
        Stage {
            id: Some(image.id),
            config: ImageConfig::clone(&image.config),
            blobs: image.record.layers.iter().map(|l| l.blob.clone()).collect(),
            args: BTreeMap::new(),
            own_cmd: false,
        }
    }

    pub(super) fn run(&self) -> RunConfig {
        self.config.run()
    }
}
