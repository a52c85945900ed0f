//! Builds from a Dockerfile, in the words of Docker's classic builder.
//!
//! Each instruction makes an image on top of the one before, untagged, with that one as its parent; these images are
//! the cache, found by a key of parent, instruction and the hash of what it copies. Running a step is the caller's:
//! [`StepRunner`].

mod add;
mod change;
mod copy;
mod fetch;
mod heredoc;
pub mod ignore;
mod mount;
mod run;
mod stage;
pub mod words;

pub use change::apply_changes;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use parse_dockerfile::{Dockerfile, Instruction};

use crate::error::At;
use crate::layer::tree::{self, Scratch};
use crate::progress::Cancel;
use crate::snapshot::Layers;
use crate::store::Lease;
use crate::{Digest, Error, ImageId, Platform, Reference, Result, RunConfig, Store};

/// What to build.
#[derive(Debug, Clone, Default)]
pub struct BuildOptions {
    /// The Dockerfile's place in the context; `Dockerfile` where empty.
    pub dockerfile: String,
    /// The Dockerfile's text, instead of one in the context.
    pub text: Option<String>,
    pub tags: Vec<Reference>,
    /// The stage to build, by name or number; the last where not given.
    pub target: Option<String>,
    /// Values of ARGs; none takes the default of the Dockerfile.
    pub args: BTreeMap<String, Option<String>>,
    pub labels: BTreeMap<String, String>,
    /// What `RUN --mount=type=secret` hands to steps, by id.
    pub secrets: BTreeMap<String, Secret>,
    pub no_cache: bool,
    /// Ask the registry for newer base images.
    pub pull: bool,
    pub platform: Option<Platform>,
    /// Accepted, and without effect: everything in the store is looked through anyway.
    pub cache_from: Vec<String>,
    /// Refused.
    pub squash: bool,
}

/// Bytes that steps may read and that no log shows.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(pub Vec<u8>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secret({} bytes)", self.0.len())
    }
}

/// A step to run.
#[derive(Debug, Clone, PartialEq)]
pub struct RunStep {
    /// The snapshot it runs on; for the container's name.
    pub key: String,
    /// The whole command, shell included.
    pub command: Vec<String>,
    /// With the values of ARGs in it, which do not stay in the image.
    pub env: Vec<String>,
    pub user: String,
    /// Exists in the layers, or is made by the runner.
    pub working_dir: String,
    pub mounts: Vec<StepMount>,
    /// `--network`: `default`, `none` or `host`.
    pub network: Option<String>,
    /// The image's configuration, for what else a container takes from it.
    pub config: RunConfig,
}

/// A mount of one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepMount {
    pub kind: StepMountKind,
    /// Absolute in the container.
    pub target: String,
    pub read_only: bool,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StepMountKind {
    /// A file or folder of the host: of the context, or a copy of what another image holds.
    Bind(PathBuf),
    /// A folder that stays from build to build.
    Cache(PathBuf),
    /// Memory; bytes, 0 for the default.
    Tmpfs(u64),
    /// A file with this content, mode and owner, that must not outlive the step.
    Secret {
        content: Secret,
        mode: u32,
        uid: u32,
        gid: u32,
    },
}

/// What the builder cannot do itself.
pub trait StepRunner: Send + Sync {
    /// Runs one command in a container over `layers` and waits for it; its output goes to `output`. Returns the exit
    /// code.
    ///
    /// # Errors
    /// Where it could not be run at all.
    fn run(&self, layers: &Layers, step: &RunStep, output: &dyn Output) -> Result<i32>;

    /// Brings a base image into the store.
    ///
    /// # Errors
    /// Those of pulling.
    fn pull(
        &self,
        reference: &Reference,
        platform: Option<&Platform>,
        output: &dyn Output,
    ) -> Result<ImageId>;
}

/// Where the build's words go: text with its line ends, the stream of `docker build`.
pub trait Output: Send + Sync {
    /// Takes some text.
    fn write(&self, text: &str);
}

impl<F: Fn(&str) + Send + Sync> Output for F {
    fn write(&self, text: &str) {
        self(text)
    }
}

/// A build context: a folder, given or unpacked from a tar into a scratch one.
#[derive(Debug)]
pub struct Context {
    path: PathBuf,
    _scratch: Option<Scratch>,
}

impl Context {
    /// A folder of this host.
    pub fn folder(path: &Path) -> Context {
        Context {
            path: path.to_owned(),
            _scratch: None,
        }
    }

    /// A tar, compressed or not, as `docker build` sends it. Unpacked as hostile; removed with the context.
    ///
    /// # Errors
    /// What the unpacker refuses.
    pub fn from_tar(store: &Store, tar: impl Read + Send) -> Result<Context> {
        let path = store.content().scratch_path("context");
        let scratch = Scratch::create(path.clone()).at(&path)?;
        let root = tree::open_root(&path).at(&path)?;
        crate::copy::unpack_into(root, crate::layer::unpack::CopyInto::default(), tar)?;
        Ok(Context {
            path,
            _scratch: Some(scratch),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn read(&self, name: &str) -> Result<Option<String>> {
        use rustix::fs::OFlags;
        use rustix::io::Errno;
        let root = tree::open_root(&self.path).at(&self.path)?;
        let name = name.trim_start_matches("./").trim_start_matches('/');
        let fd = match tree::open_in(&root, name.as_bytes(), OFlags::RDONLY | OFlags::NONBLOCK) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(errno) => {
                return Err(Error::Io {
                    what: name.to_owned(),
                    source: errno.into(),
                });
            }
        };
        let mut bytes = Vec::new();
        tree::file(fd)
            .take(4 << 20)
            .read_to_end(&mut bytes)
            .doing(|| name.to_owned())?;
        String::from_utf8(bytes)
            .map(|text| Some(text.replace("\r\n", "\n")))
            .map_err(|_| Error::Dockerfile(format!("{name} is not UTF-8 text")))
    }
}

/// Variables every build knows without an ARG, and that do not count for the cache.
const PROXIES: [&str; 10] = [
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "FTP_PROXY",
    "ftp_proxy",
    "NO_PROXY",
    "no_proxy",
    "ALL_PROXY",
    "all_proxy",
];

/// One build on its way.
struct Build<'a> {
    store: &'a Store,
    options: &'a BuildOptions,
    context: &'a Context,
    ignore: ignore::Ignore,
    runner: &'a dyn StepRunner,
    output: &'a dyn Output,
    cancel: &'a Cancel,
    text: &'a str,
    escape: char,
    /// Holds every image the build stands on or has made.
    lease: Lease,
    /// ARGs before the first FROM.
    globals: BTreeMap<String, String>,
    /// Finished stages, by number and name.
    stages: Vec<(Option<String>, Option<ImageId>)>,
    step: usize,
    steps: usize,
    /// Build args that an ARG declared.
    consumed: BTreeSet<String>,
    /// Once a step was not in the cache, none after it is.
    cached: Cell<bool>,
}

/// Builds an image and names it.
///
/// # Errors
/// [`Error::Dockerfile`], [`Error::Step`] where a command failed, and those of the runner.
pub fn build(
    store: &Store,
    context: &Context,
    options: &BuildOptions,
    runner: &dyn StepRunner,
    output: &dyn Output,
    cancel: &Cancel,
) -> Result<ImageId> {
    if options.squash {
        return Err(Error::Unsupported(
            "--squash is not supported: build in a stage and COPY --from it into a small one"
                .to_owned(),
        ));
    }
    let name = if options.dockerfile.is_empty() {
        "Dockerfile"
    } else {
        &options.dockerfile
    };
    let text = match &options.text {
        Some(text) => text.clone(),
        None => context.read(name)?.ok_or_else(|| {
            Error::Dockerfile(format!("Cannot locate specified Dockerfile: {name}"))
        })?,
    };
    let text = heredoc::fold(&text, escape_of(&text));
    let file = parse_dockerfile::parse(&text).map_err(|e| Error::Dockerfile(e.to_string()))?;
    let ignored = match context.read(&format!("{name}.dockerignore"))? {
        Some(text) => Some(text),
        None => context.read(".dockerignore")?,
    };
    let escape = file
        .parser_directives
        .escape
        .as_ref()
        .map_or('\\', |d| d.value.value);
    if let Some(syntax) = &file.parser_directives.syntax
        && !syntax.value.value.contains("docker/dockerfile")
    {
        output.write(&format!(
            "[Warning] # syntax={} is not used: the builder reads Dockerfiles itself\n",
            syntax.value.value
        ));
    }
    let last = target(&file, options.target.as_deref())?;
    let extra = usize::from(!options.labels.is_empty());
    let steps = file.global_args().len()
        + file
            .stages()
            .take(last + 1)
            .map(|stage| 1 + stage.instructions.len())
            .sum::<usize>()
        + extra;
    let mut build = Build {
        store,
        options,
        context,
        ignore: ignore::Ignore::parse(&ignored.unwrap_or_default()),
        runner,
        output,
        cancel,
        text: &text,
        escape,
        lease: store.lease(),
        globals: BTreeMap::new(),
        stages: Vec::new(),
        step: 0,
        steps,
        consumed: BTreeSet::new(),
        cached: Cell::new(!options.no_cache),
    };
    let id = build.run(&file, last)?;
    let unused: Vec<&str> = options
        .args
        .keys()
        .map(String::as_str)
        .filter(|name| !build.consumed.contains(*name) && !PROXIES.contains(name))
        .collect();
    if !unused.is_empty() {
        output.write(&format!(
            "[Warning] One or more build-args [{}] were not consumed\n",
            unused.join(" ")
        ));
    }
    output.write(&format!("Successfully built {}\n", id.short()));
    for tag in &options.tags {
        store.tag(&id.to_string(), tag)?;
        output.write(&format!(
            "Successfully tagged {}\n",
            tag.clone().or_latest().familiar()
        ));
    }
    Ok(id)
}

/// The escape character that a directive at the head of the text names.
fn escape_of(text: &str) -> char {
    text.lines()
        .map_while(|line| line.trim().strip_prefix('#')?.split_once('='))
        .find(|(name, _)| name.trim().eq_ignore_ascii_case("escape"))
        .and_then(|(_, value)| value.trim().chars().next())
        .unwrap_or('\\')
}

/// The number of the stage to build.
fn target(file: &Dockerfile<'_>, wanted: Option<&str>) -> Result<usize> {
    let count = file.stages().len();
    let Some(wanted) = wanted.filter(|w| !w.is_empty()) else {
        return count
            .checked_sub(1)
            .ok_or_else(|| Error::Dockerfile("it has no FROM".to_owned()));
    };
    let by_name = file.stages().position(|stage| {
        stage
            .from
            .as_
            .as_ref()
            .is_some_and(|(_, name)| name.value.eq_ignore_ascii_case(wanted))
    });
    by_name
        .or_else(|| wanted.parse().ok().filter(|n| *n < count))
        .ok_or_else(|| Error::Dockerfile(format!("target stage {wanted:?} could not be found")))
}

/// Fuzz entry: what is done with a Dockerfile's text before anything runs.
pub fn fuzz_dockerfile(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let text = heredoc::fold(&text, escape_of(&text));
    let Ok(file) = parse_dockerfile::parse(&text) else {
        return;
    };
    let _ = target(&file, None);
    let _ = target(&file, Some("one"));
    let mut run = RunConfig::default();
    for instruction in &file.instructions {
        let _ = words::join_lines(&text[start(instruction)..], '\\');
        let env = run.env.clone();
        let lookup = |name: &str| change::variable(&env, name);
        let _ = change::apply(&mut run, instruction, &text, '\\', &lookup);
    }
}

impl Build<'_> {
    fn run(&mut self, file: &Dockerfile<'_>, last: usize) -> Result<ImageId> {
        let starts: Vec<usize> = file.instructions.iter().map(|i| start(i)).collect();
        let shown = |instruction: &Instruction<'_>| {
            let begin = start(instruction);
            let end = starts
                .iter()
                .copied()
                .filter(|s| *s > begin)
                .min()
                .unwrap_or(self.text.len());
            let shown = words::join_lines(&self.text[begin..end], self.escape);
            match instruction {
                Instruction::Run(run) => run
                    .here_docs
                    .first()
                    .and_then(|script| heredoc::unfold(&shown, &script.value))
                    .unwrap_or(shown),
                _ => heredoc::written(shown),
            }
        };
        let text_of: BTreeMap<usize, String> = file
            .instructions
            .iter()
            .map(|i| (start(i), shown(i)))
            .collect();
        let text = |instruction: &Instruction<'_>| {
            text_of
                .get(&start(instruction))
                .cloned()
                .unwrap_or_default()
        };
        self.predefine();
        for (argument, instruction) in file.global_args().zip(&file.instructions) {
            self.announce(&text(instruction));
            let globals = self.globals.clone();
            let declared = self.declare(&argument.arguments.value, &|name| {
                globals.get(name).cloned()
            })?;
            for (name, value) in declared {
                if let Some(value) = value {
                    self.globals.insert(name, value);
                }
            }
        }
        let mut id = None;
        for (number, stage) in file.stages().take(last + 1).enumerate() {
            let name = stage
                .from
                .as_
                .as_ref()
                .map(|(_, name)| name.value.to_ascii_lowercase());
            let begin = start_of_from(stage.from);
            let header = text_of.get(&begin).cloned().unwrap_or_default();
            let instructions: Vec<(&Instruction<'_>, String)> =
                stage.instructions.iter().map(|i| (i, text(i))).collect();
            let built = self.stage(stage.from, &header, &instructions, number == last)?;
            self.stages.push((name, built));
            id = built;
        }
        id.ok_or_else(|| {
            Error::Dockerfile("No image was generated. Is your Dockerfile empty?".to_owned())
        })
    }

    fn predefine(&mut self) {
        let host = Platform::host();
        let target = self.options.platform.clone().unwrap_or_else(Platform::host);
        for (prefix, platform) in [("BUILD", host), ("TARGET", target)] {
            self.globals
                .insert(format!("{prefix}PLATFORM"), platform.to_string());
            self.globals
                .insert(format!("{prefix}OS"), platform.os.clone());
            self.globals
                .insert(format!("{prefix}ARCH"), platform.architecture.clone());
            self.globals.insert(
                format!("{prefix}VARIANT"),
                platform.variant.clone().unwrap_or_default(),
            );
        }
    }

    /// The names an ARG declares, with their values where they have one.
    fn declare(
        &mut self,
        text: &str,
        lookup: words::Lookup<'_>,
    ) -> Result<Vec<(String, Option<String>)>> {
        let mut declared = Vec::new();
        for word in words::split(text, self.escape) {
            let (name, default) = match word.split_once('=') {
                Some((name, value)) => (
                    name.to_owned(),
                    Some(words::expand(value, self.escape, lookup)?),
                ),
                None => (word.clone(), None),
            };
            let given = self.options.args.get(&name);
            if given.is_some() {
                self.consumed.insert(name.clone());
            }
            declared.push((name, given.cloned().flatten().or(default)));
        }
        Ok(declared)
    }

    fn announce(&mut self, text: &str) {
        self.step += 1;
        self.output
            .write(&format!("Step {}/{} : {text}\n", self.step, self.steps));
    }

    /// The image that an earlier build made by the same step.
    fn lookup(&self, key: &Digest) -> Option<ImageId> {
        if !self.cached.get() {
            return None;
        }
        let text = fs::read_to_string(self.cache_path(key)).ok()?;
        let id: ImageId = text.trim().parse().ok()?;
        self.lease.hold(id);
        self.store
            .inspect(&id.to_string())
            .ok()
            .map(|image| image.id)
    }

    fn remember(&self, key: &Digest, id: &ImageId) -> Result<()> {
        let path = self.cache_path(key);
        fs::create_dir_all(path.parent().unwrap_or(&path)).at(&path)?;
        base::file::write_atomic(
            &path,
            id.to_string().as_bytes(),
            base::file::Durability::Process,
        )
        .at(&path)
    }

    fn cache_path(&self, key: &Digest) -> PathBuf {
        self.store
            .directory()
            .join("build-cache/steps")
            .join(key.hex())
    }
}

impl Store {
    /// Forgets the build cache: its index and the folders of `RUN --mount=type=cache`. Intermediate images go with
    /// [`Store::prune`]. Returns the bytes given back.
    ///
    /// # Errors
    /// Those of removing files.
    pub fn prune_build_cache(&self) -> Result<u64> {
        let path = self.directory().join("build-cache");
        let freed = crate::snapshot::usage(&path).map_or(0, |usage| usage.bytes);
        tree::remove_all(&path).at(&path)?;
        Ok(freed)
    }
}

fn start_of_from(from: &parse_dockerfile::FromInstruction<'_>) -> usize {
    from.from.span.start
}

/// Where an instruction begins in the text.
fn start(instruction: &Instruction<'_>) -> usize {
    match instruction {
        Instruction::Add(i) => i.add.span.start,
        Instruction::Arg(i) => i.arg.span.start,
        Instruction::Cmd(i) => i.cmd.span.start,
        Instruction::Copy(i) => i.copy.span.start,
        Instruction::Entrypoint(i) => i.entrypoint.span.start,
        Instruction::Env(i) => i.env.span.start,
        Instruction::Expose(i) => i.expose.span.start,
        Instruction::From(i) => i.from.span.start,
        Instruction::Healthcheck(i) => i.healthcheck.span.start,
        Instruction::Label(i) => i.label.span.start,
        Instruction::Maintainer(i) => i.maintainer.span.start,
        Instruction::Onbuild(i) => i.onbuild.span.start,
        Instruction::Run(i) => i.run.span.start,
        Instruction::Shell(i) => i.shell.span.start,
        Instruction::Stopsignal(i) => i.stopsignal.span.start,
        Instruction::User(i) => i.user.span.start,
        Instruction::Volume(i) => i.volume.span.start,
        Instruction::Workdir(i) => i.workdir.span.start,
        _ => 0,
    }
}
