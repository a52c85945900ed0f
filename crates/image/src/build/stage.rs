//! One stage: its base image and its instructions, one image after the other.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use parse_dockerfile::{Command, Flag, FromInstruction, Instruction, Source};
use rustix::fs::OFlags;

use super::copy::{self, Choice, Manner};
use super::fetch;
use super::ignore::Ignore;
use super::words::{expand, join_lines};
use super::{Build, PROXIES, RunStep, StepMount, StepMountKind, change};
use crate::config::{History, ImageConfig};
use crate::error::At;
use crate::layer::tree::{self, Scratch};
use crate::manifest::Descriptor;
use crate::snapshot::mount_detached;
use crate::store::Lease;
use crate::{Digest, Error, ImageId, Platform, Reference, Result, RunConfig};

static SERIAL: AtomicU64 = AtomicU64::new(0);

/// Where a stage stands.
struct Stage {
    /// The image so far; none before the first step on `scratch`.
    id: Option<ImageId>,
    config: ImageConfig,
    blobs: Vec<Descriptor>,
    /// Declared ARGs with their values.
    args: BTreeMap<String, String>,
    /// Whether a CMD stood in this stage, which an ENTRYPOINT then leaves.
    own_cmd: bool,
}

/// A snapshot that is removed whatever happens.
struct Temporary<'a> {
    build: &'a Build<'a>,
    key: String,
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.build.store.remove_snapshot(&self.key) {
            tracing::warn!(key = self.key, %error, "a build's snapshot could not be removed");
        }
    }
}

/// What a new image is made of.
struct Made<'a> {
    text: String,
    layer: Option<(Digest, Descriptor)>,
    key: Option<&'a Digest>,
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
        let mut stage = Stage {
            id: None,
            config: ImageConfig::blank(&platform.clone().unwrap_or_else(Platform::host)),
            blobs: Vec::new(),
            args: BTreeMap::new(),
            own_cmd: false,
        };
        if name == "scratch" {
            return Ok(stage);
        }
        let id = match self.stage_image(&name)? {
            Some(id) => id,
            None => self.image(&name, platform.as_ref())?,
        };
        let image = self.store.inspect(&id.to_string())?;
        stage.id = Some(id);
        stage.config = ImageConfig::clone(&image.config);
        stage.blobs = image.record.layers.iter().map(|l| l.blob.clone()).collect();
        Ok(stage)
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
                let command = match run.here_docs.first() {
                    Some(script) => script_command(&stage.run(), &script.value),
                    None => match &run.arguments {
                        Command::Exec(_) => change::command(&stage.run(), &run.arguments, escape),
                        Command::Shell(line) => {
                            let mut words = change::shell(&stage.run());
                            words.push(join_lines(line.value, escape));
                            words
                        }
                        _ => return Err(Error::Dockerfile("RUN in an unknown form".to_owned())),
                    },
                };
                self.run_step(stage, command, &run.options, &lookup)
            }
            Instruction::Copy(i) => self.copy_step(
                stage,
                shown,
                &i.options,
                &i.src,
                &i.dest.value,
                false,
                &lookup,
            ),
            Instruction::Add(i) => self.copy_step(
                stage,
                shown,
                &i.options,
                &i.src,
                &i.dest.value,
                true,
                &lookup,
            ),
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

    fn key(&self, stage: &Stage, shown: &str, extra: &str) -> Digest {
        let parent = stage
            .id
            .map_or_else(|| stage.config.architecture.clone(), |id| id.to_string());
        Digest::of(format!("1\0{parent}\0{shown}\0{extra}").as_bytes())
    }

    /// Takes the image an earlier build made, if there is one.
    fn reuse(&mut self, stage: &mut Stage, key: &Digest) -> Result<bool> {
        let Some(id) = self.lookup(key) else {
            self.cached = false;
            return Ok(false);
        };
        let image = self.store.inspect(&id.to_string())?;
        stage.id = Some(id);
        stage.config = ImageConfig::clone(&image.config);
        stage.blobs = image.record.layers.iter().map(|l| l.blob.clone()).collect();
        self.output
            .write(&format!(" ---> Using cache\n ---> {}\n", id.short()));
        Ok(true)
    }

    /// Makes the image after a step.
    fn finish(&mut self, stage: &mut Stage, made: Made<'_>) -> Result<()> {
        let now = base::time::now_rfc3339();
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

    fn temporary(&self, stage: &Stage) -> Result<(Temporary<'_>, crate::Layers)> {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let key = format!("build-{}-{serial}", base::Id::random().short());
        let chain = Digest::chains(&stage.config.rootfs.diff_ids);
        let layers = self.store.snapshot_of_chain(&key, stage.id, chain)?;
        Ok((Temporary { build: self, key }, layers))
    }

    fn layer_of(&self, snapshot: &Temporary<'_>, lease: &Lease) -> Result<(Digest, Descriptor)> {
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
                copy::make_folder(&root, &clean)?;
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

    fn run_step(
        &mut self,
        stage: &mut Stage,
        command: Vec<String>,
        options: &[Flag<'_>],
        lookup: super::words::Lookup<'_>,
    ) -> Result<()> {
        let mut mounts = Vec::new();
        let mut network = None;
        for option in options {
            let value = option
                .value
                .as_ref()
                .map(|v| v.value.as_ref())
                .unwrap_or_default();
            match &*option.name.value {
                "mount" => {
                    mounts.push(self.mount(&expand(value, self.escape, lookup)?, &stage.run())?)
                }
                "network" => network = Some(value.to_owned()),
                other => {
                    return Err(Error::Unsupported(format!(
                        "RUN --{other} is not supported"
                    )));
                }
            }
        }
        let run = stage.run();
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
        let identity = serde_json::to_string(&(&command, &run.env, &run.user, &run.working_dir))
            .unwrap_or_default();
        let key = self.key(stage, &text, &identity);
        if self.reuse(stage, &key)? {
            return Ok(());
        }
        let mut env = run.env.clone();
        for name in PROXIES {
            if let Some(Some(value)) = self.options.args.get(name) {
                env.push(format!("{name}={value}"));
            }
        }
        env.extend(visible);
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
                mounts,
                network,
                config: run,
            };
            let short: String = snapshot.key.chars().skip("build-".len()).take(12).collect();
            self.output.write(&format!(" ---> Running in {short}\n"));
            let code = self.runner.run(&layers, &step, self.output)?;
            self.cancel.check()?;
            if code != 0 {
                return Err(Error::Step {
                    command: command.join(" "),
                    code,
                });
            }
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

    fn mount(&self, text: &str, run: &RunConfig) -> Result<StepMount> {
        let mut fields: BTreeMap<&str, &str> = BTreeMap::new();
        for field in text.split(',') {
            let (key, value) = field.split_once('=').unwrap_or((field, "true"));
            fields.insert(key.trim(), value.trim());
        }
        let first = |keys: &[&str]| keys.iter().find_map(|key| fields.get(key).copied());
        let target = first(&["target", "dst", "destination"])
            .map(|path| change::absolute(&run.working_dir, path))
            .ok_or_else(|| Error::Dockerfile(format!("--mount={text}: it has no target")))?;
        let on = |keys: &[&str]| first(keys).is_some_and(|v| v == "true" || v == "1");
        let read_only = on(&["ro", "readonly"]);
        match fields.get("type").copied().unwrap_or("bind") {
            "tmpfs" => {
                let size = fields
                    .get("size")
                    .map_or(Ok(0), |v| base::units::parse_size(v));
                let size = size.map_err(|e| Error::Dockerfile(e.to_string()))?;
                Ok(StepMount {
                    kind: StepMountKind::Tmpfs(size),
                    target,
                    read_only: false,
                })
            }
            "cache" => {
                let id = fields.get("id").copied().unwrap_or(&target);
                let folder = self
                    .store
                    .directory()
                    .join("build-cache/mounts")
                    .join(Digest::of(id.as_bytes()).hex());
                std::fs::create_dir_all(&folder).at(&folder)?;
                Ok(StepMount {
                    kind: StepMountKind::Cache(folder),
                    target,
                    read_only,
                })
            }
            "bind" if fields.contains_key("from") => Err(Error::Unsupported(
                "RUN --mount=type=bind,from=… is not supported: COPY --from it instead".to_owned(),
            )),
            "bind" => {
                let source = first(&["source", "src"]).unwrap_or(".");
                let outside = || {
                    Error::Dockerfile(format!(
                        "--mount={text}: its source is not in the build context"
                    ))
                };
                let clean = tree::clean(source.as_bytes()).ok_or_else(outside)?;
                let top = self.context.path().canonicalize().at(self.context.path())?;
                let path = top
                    .join(tree::os(&clean))
                    .canonicalize()
                    .map_err(|_| outside())?;
                if !path.starts_with(&top) {
                    return Err(outside());
                }
                let read_only = !on(&["rw", "readwrite"]);
                Ok(StepMount {
                    kind: StepMountKind::Bind(path),
                    target,
                    read_only,
                })
            }
            other => Err(Error::Unsupported(format!(
                "RUN --mount=type={other} is not supported"
            ))),
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn copy_step(
        &mut self,
        stage: &mut Stage,
        shown: &str,
        options: &[Flag<'_>],
        sources: &[Source<'_>],
        dest: &str,
        add: bool,
        lookup: super::words::Lookup<'_>,
    ) -> Result<()> {
        let word = if add { "ADD" } else { "COPY" };
        let (mut from, mut chown, mut mode, mut checksum) = (None, None, None, None);
        let (mut parents, mut excluded) = (false, Vec::new());
        for option in options {
            let value = option
                .value
                .as_ref()
                .map(|v| v.value.as_ref())
                .unwrap_or_default();
            let value = expand(value, self.escape, lookup)?;
            match &*option.name.value {
                "from" if !add => from = Some(value),
                "chown" => chown = Some(value),
                "chmod" => {
                    let bits = u32::from_str_radix(&value, 8).ok().filter(|m| *m <= 0o7777);
                    mode = Some(bits.ok_or_else(|| {
                        Error::Dockerfile(format!(
                            "invalid chmod parameter: {value:?}. it should be octal string"
                        ))
                    })?);
                }
                "exclude" => excluded.push(value),
                "parents" if !add => {
                    parents = match value.as_str() {
                        "" | "true" => true,
                        "false" => false,
                        other => {
                            return Err(Error::Dockerfile(format!(
                                "{word} --parents={other}: true or false is wanted"
                            )));
                        }
                    };
                }
                "checksum" if add => checksum = Some(value.parse::<Digest>()?),
                // Every copy is a layer of its own already.
                "link" => {}
                other => {
                    return Err(Error::Unsupported(format!(
                        "{word} --{other} is not supported"
                    )));
                }
            }
        }
        let mut paths = Vec::new();
        let mut web = Vec::new();
        let mut inline = None;
        for source in sources {
            match source {
                Source::Path(path) => {
                    let path = expand(&path.value, self.escape, lookup)?;
                    if add && fetch::is_web(&path) && !path.ends_with(".git") {
                        web.push(path);
                        continue;
                    }
                    if add && (path.contains("://") || path.starts_with("git@")) {
                        return Err(Error::Unsupported(format!(
                            "ADD {path}: only http:// and https:// are fetched; RUN git clone instead"
                        )));
                    }
                    paths.push(path);
                }
                Source::HereDoc(document) => {
                    let text = document.value.clone().into_owned();
                    inline = Some(if document.expand {
                        expand_document(&text, lookup)
                    } else {
                        text
                    });
                }
                _ => return Err(Error::Dockerfile(format!("{word} with an unknown source"))),
            }
        }
        let dest = expand(dest, self.escape, lookup)?;
        let ends_with_slash =
            dest.ends_with('/') || dest.ends_with("/.") || dest == "." || dest == "..";
        if checksum.is_some() && (web.len() != 1 || !paths.is_empty()) {
            return Err(Error::Dockerfile(
                "ADD --checksum is for one http:// or https:// source".to_owned(),
            ));
        }
        if !web.is_empty() && web.len() + paths.len() + usize::from(inline.is_some()) > 1 {
            return Err(Error::Unsupported(
                "ADD of an address together with other sources: write one ADD for each".to_owned(),
            ));
        }
        if paths.len() > 1 && !ends_with_slash {
            return Err(Error::Dockerfile(format!(
                "When using {word} with more than one source file, the destination must be a directory and end with a /"
            )));
        }
        let mut target = change::absolute(&stage.run().working_dir, &dest);
        if ends_with_slash && target != "/" {
            target.push('/');
        }
        // Where the files come from: the context, another image, or the Dockerfile itself.
        let mut foreign = None;
        let mut written = None;
        let none = Ignore::default();
        let (root, ignore) = if let Some(text) = inline {
            let path = self.store.content().scratch_path("heredoc");
            let scratch = Scratch::create(path.clone()).at(&path)?;
            let name = target
                .rsplit('/')
                .find(|part| !part.is_empty())
                .unwrap_or("EOF")
                .to_owned();
            std::fs::write(path.join(&name), text).at(&path)?;
            rustix::fs::chmod(path.join(&name), rustix::fs::Mode::from_raw_mode(0o644))
                .at(&path)?;
            paths.push(name);
            written = Some(scratch);
            (tree::open_root(&path).at(&path)?, &none)
        } else if let Some(address) = web.first() {
            // In the tree it is called as the target says, or as the address does in a folder.
            let name = fetch::file_name(address);
            let name = if target.ends_with('/') {
                name?
            } else {
                name.unwrap_or("file".to_owned())
            };
            self.output.write(&format!("Downloading {address}\n"));
            let scratch = fetch::fetch(self.store, address, &name, checksum, self.cancel)?;
            let root = tree::open_root(scratch.path()).at(scratch.path())?;
            paths.push(name);
            written = Some(scratch);
            (root, &none)
        } else if let Some(name) = &from {
            let id = match self.stage_image(name)? {
                Some(id) => id,
                None => self.image(name, self.options.platform.as_ref())?,
            };
            let image = self.store.inspect(&id.to_string())?;
            let whole = Stage {
                id: Some(id),
                config: ImageConfig::clone(&image.config),
                blobs: Vec::new(),
                args: BTreeMap::new(),
                own_cmd: false,
            };
            let (snapshot, layers) = self.temporary(&whole)?;
            let root = mount_detached(&layers, false)?;
            foreign = Some(snapshot);
            (root, &none)
        } else {
            let path = self.context.path();
            (tree::open_root(path).at(path)?, &self.ignore)
        };
        let choice = Choice {
            ignore,
            excluded: &Ignore::parse(&excluded.join("\n")),
            parents,
        };
        let items = copy::find(&root, &paths, &choice)?;
        let hash = copy::hash(&root, &items)?;
        let kind = if from.is_some() || sources.len() > 1 {
            "multi"
        } else {
            "file"
        };
        let key = self.key(
            stage,
            shown,
            &format!("{kind}:{hash}\0{target}\0{chown:?}\0{mode:?}"),
        );
        let found = self.lookup(&key);
        let lease = self.store.lease();
        let layer = if found.is_some() {
            None
        } else {
            let (snapshot, layers) = self.temporary(stage)?;
            let into = mount_detached(&layers, true)?;
            let owner = chown
                .as_deref()
                .map(|text| copy::owner(&into, text))
                .transpose()?
                .unwrap_or((0, 0));
            copy::copy(
                &root,
                &items,
                &into,
                &target,
                &Manner {
                    owner,
                    mode,
                    extract: add && web.is_empty(),
                    into_folder: parents,
                },
            )?;
            // The overlay must be gone before its upper folder is read as it is.
            drop(into);
            Some(self.layer_of(&snapshot, &lease)?)
        };
        // The source's mount goes before its folders do.
        drop(root);
        drop(foreign);
        drop(written);
        if found.is_some() {
            self.reuse(stage, &key)?;
            return Ok(());
        }
        self.cached = false;
        let text = format!(
            "/bin/sh -c #(nop) {word} {kind}:{} in {target} ",
            hash.hex()
        );
        self.finish(
            stage,
            Made {
                text,
                layer,
                key: Some(&key),
            },
        )
    }
}

impl Stage {
    fn run(&self) -> RunConfig {
        self.config.run()
    }
}

/// A here-document as a command: through the shell, or through the interpreter its first line names.
fn script_command(run: &RunConfig, script: &str) -> Vec<String> {
    if let Some(line) = script
        .strip_prefix("#!")
        .and_then(|rest| rest.lines().next())
    {
        let mut words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let program = words
            .last()
            .map(|w| w.rsplit('/').next().unwrap_or(w).to_owned())
            .unwrap_or_default();
        if !words.is_empty() {
            let flag = if ["perl", "ruby", "node"].contains(&program.as_str()) {
                "-e"
            } else {
                "-c"
            };
            words.extend([flag.to_owned(), script.to_owned()]);
            return words;
        }
    }
    let mut words = change::shell(run);
    words.push(script.to_owned());
    words
}

/// Variables in a here-document; quotes are ordinary characters there.
fn expand_document(text: &str, lookup: super::words::Lookup<'_>) -> String {
    text.split_inclusive('\n')
        .map(|line| {
            let quoted: String = line
                .chars()
                .flat_map(|c| match c {
                    '"' => vec!['\\', '"'],
                    c => vec![c],
                })
                .collect();
            expand(&format!("\"{quoted}\""), '\\', lookup).unwrap_or_else(|_| line.to_owned())
        })
        .collect()
}
