//! What `RUN --mount` asks for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::copy::{self, Choice};
use super::ignore::Ignore;
use super::stage::Stage;
use super::{Build, Secret, StepMount, StepMountKind, change};
use crate::error::At;
use crate::layer::tree::{self, Scratch};
use crate::snapshot::mount_detached;
use crate::{Cancel, Digest, Error, Result, RunConfig};

/// Mounts of one step, with what they need to live.
#[derive(Default)]
pub(super) struct Mounts {
    pub mounts: Vec<StepMount>,
    /// `NAME=VALUE` of secrets that are wanted in the environment.
    pub env: Vec<String>,
    /// What of them counts for the cache.
    pub identity: String,
    copies: Vec<Copy>,
    /// Copies of what other images hold.
    scratches: Vec<Scratch>,
    /// Locks of caches that one step at a time may use.
    locks: BTreeMap<Digest, Arc<tokio::sync::Mutex<()>>>,
}

/// A bind mount that is a copy, made once it is known that the step runs: [`Build::make_copies`].
struct Copy {
    /// Its place in [`Mounts::mounts`].
    mount: usize,
    /// The stage or image, or none for the context.
    from: Option<String>,
    source: String,
    /// The option, for errors.
    text: String,
}

/// How often a cache that others use is tried.
const WAIT: std::time::Duration = std::time::Duration::from_millis(50);

impl Mounts {
    /// Waits for the caches that others use. Held until the guards are dropped. All steps take them in one order.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub fn lock(&self, cancel: &Cancel) -> Result<Vec<tokio::sync::OwnedMutexGuard<()>>> {
        let mut held = Vec::new();
        for lock in self.locks.values() {
            held.push(loop {
                match lock.clone().try_lock_owned() {
                    Ok(guard) => break guard,
                    Err(_) => cancel.check()?,
                }
                std::thread::sleep(WAIT);
            });
        }
        Ok(held)
    }
}

fn bad(text: &str, why: &str) -> Error {
    Error::Dockerfile(format!("--mount={text}: {why}"))
}

struct Fields<'a> {
    text: &'a str,
    fields: BTreeMap<&'a str, &'a str>,
}

impl<'a> Fields<'a> {
    fn parse(text: &'a str) -> Fields<'a> {
        let fields = text
            .split(',')
            .map(|field| field.split_once('=').unwrap_or((field, "true")))
            .map(|(key, value)| (key.trim(), value.trim()))
            .collect();
        Fields { text, fields }
    }

    fn bad(&self, why: &str) -> Error {
        bad(self.text, why)
    }

    /// Refuses keys that mean nothing here, so that none is silently without effect.
    fn only(&self, known: &[&[&str]]) -> Result<()> {
        match self
            .fields
            .keys()
            .find(|key| **key != "type" && !known.iter().any(|keys| keys.contains(key)))
        {
            None => Ok(()),
            Some(key) => Err(self.bad(&format!("unexpected key {key:?}"))),
        }
    }

    fn first(&self, keys: &[&str]) -> Option<&'a str> {
        keys.iter().find_map(|key| self.fields.get(key).copied())
    }

    fn on(&self, keys: &[&str]) -> Result<Option<bool>> {
        match self.first(keys) {
            None => Ok(None),
            Some("true" | "1") => Ok(Some(true)),
            Some("false" | "0") => Ok(Some(false)),
            Some(other) => Err(self.bad(&format!("{other:?} is neither true nor false"))),
        }
    }

    fn number(&self, key: &str, radix: u32) -> Result<Option<u32>> {
        self.first(&[key])
            .map(|text| {
                u32::from_str_radix(text, radix)
                    .map_err(|_| self.bad(&format!("{key}={text} is not a number")))
            })
            .transpose()
    }

    fn target(&self, run: &RunConfig) -> Result<String> {
        self.first(&TARGET)
            .map(|path| change::absolute(&run.working_dir, path))
            .filter(|path| path != "/")
            .ok_or_else(|| self.bad("it has no target"))
    }
}

const TARGET: [&str; 3] = ["target", "dst", "destination"];
const READ_ONLY: [&str; 2] = ["ro", "readonly"];
const WRITABLE: [&str; 2] = ["rw", "readwrite"];
const SOURCE: [&str; 2] = ["source", "src"];
const OWNERSHIP: [&str; 3] = ["mode", "uid", "gid"];

impl Build<'_> {
    /// Takes up one `--mount`.
    pub(super) fn mount(&self, text: &str, run: &RunConfig, mounts: &mut Mounts) -> Result<()> {
        let fields = Fields::parse(text);
        mounts.identity.push_str(text);
        mounts.identity.push('\n');
        match fields.fields.get("type").copied().unwrap_or("bind") {
            "tmpfs" => {
                fields.only(&[&TARGET, &["size"]])?;
                let size = fields
                    .first(&["size"])
                    .map_or(Ok(0), base::units::parse_size)
                    .map_err(|e| fields.bad(&e.to_string()))?;
                mounts.mounts.push(StepMount {
                    kind: StepMountKind::Tmpfs(size),
                    target: fields.target(run)?,
                    read_only: false,
                });
                Ok(())
            }
            "cache" => self.cache_mount(&fields, run, mounts),
            "bind" => self.bind_mount(&fields, run, mounts),
            "secret" => self.secret_mount(&fields, run, mounts),
            "ssh" => Err(Error::Unsupported(
                "RUN --mount=type=ssh is not supported: hand the key in as a secret (RUN --mount=type=secret,id=…, berth build --secret id=…,src=FILE)".to_owned(),
            )),
            other => Err(Error::Unsupported(format!(
                "RUN --mount=type={other} is not supported: bind, cache, tmpfs and secret are"
            ))),
        }
    }

    fn cache_mount(&self, fields: &Fields<'_>, run: &RunConfig, mounts: &mut Mounts) -> Result<()> {
        let own = ["id", "sharing", "from"];
        fields.only(&[&TARGET, &READ_ONLY, &WRITABLE, &SOURCE, &OWNERSHIP, &own])?;
        let target = fields.target(run)?;
        let id = fields.first(&["id"]).unwrap_or(&target);
        let key = Digest::of(id.as_bytes());
        let folder = self
            .store
            .directory()
            .join("build-cache/mounts")
            .join(key.hex());
        match fields.first(&["sharing"]).unwrap_or("shared") {
            "shared" => {}
            // A private one may be any other's that nobody uses now.
            "locked" | "private" => {
                mounts.locks.insert(key, self.store.busy(&key));
            }
            other => return Err(fields.bad(&format!("unknown sharing {other:?}"))),
        }
        if !folder.exists() {
            self.make_cache(fields, &folder)?;
        }
        mounts.mounts.push(StepMount {
            kind: StepMountKind::Cache(folder),
            target,
            read_only: fields.on(&READ_ONLY)?.unwrap_or(false),
        });
        Ok(())
    }

    /// A new cache, which is there whole or not at all.
    fn make_cache(&self, fields: &Fields<'_>, folder: &Path) -> Result<()> {
        let mode = fields.number("mode", 8)?.unwrap_or(0o755);
        let (uid, gid) = (fields.number("uid", 10)?, fields.number("gid", 10)?);
        let scratch = self.scratch("cache")?;
        let path = scratch.path();
        if let Some(from) = fields.first(&["from"]) {
            let source = fields.first(&SOURCE).unwrap_or("/");
            self.copy_out(fields.text, from, source, path)?;
        }
        rustix::fs::chmod(path, rustix::fs::Mode::from_raw_mode(mode)).at(path)?;
        if uid.is_some() || gid.is_some() {
            std::os::unix::fs::chown(path, uid, gid).at(path)?;
        }
        if let Some(above) = folder.parent() {
            std::fs::create_dir_all(above).at(above)?;
        }
        match scratch.keep_as(folder) {
            // Another build was first: its cache it is.
            Err(_) if folder.exists() => Ok(()),
            kept => kept.at(folder),
        }
    }

    /// A fresh folder beside what the store keeps.
    fn scratch(&self, what: &str) -> Result<Scratch> {
        let path = self.store.content().scratch_path(what);
        Scratch::create(path.clone()).at(&path)
    }

    fn bind_mount(&self, fields: &Fields<'_>, run: &RunConfig, mounts: &mut Mounts) -> Result<()> {
        fields.only(&[&TARGET, &READ_ONLY, &WRITABLE, &SOURCE, &["from"]])?;
        let target = fields.target(run)?;
        let source = fields.first(&SOURCE).unwrap_or("/");
        let writable = fields.on(&WRITABLE)?.unwrap_or(false)
            || fields.on(&READ_ONLY)?.is_some_and(|read_only| !read_only);
        let from = fields.first(&["from"]);
        let path = match from {
            None => self.in_context(fields, source, mounts)?,
            Some(from) => {
                let id = self.named_image(from)?;
                mounts.identity.push_str(&format!("{id}\n"));
                PathBuf::new()
            }
        };
        // What a step writes there is lost with it, so it works on a copy.
        if from.is_some() || writable {
            mounts.copies.push(Copy {
                mount: mounts.mounts.len(),
                from: from.map(str::to_owned),
                source: source.to_owned(),
                text: fields.text.to_owned(),
            });
        }
        mounts.mounts.push(StepMount {
            kind: StepMountKind::Bind(path),
            target,
            read_only: !writable,
        });
        Ok(())
    }

    /// Makes the copies that the step's mounts are of.
    pub(super) fn make_copies(&self, mounts: &mut Mounts) -> Result<()> {
        for wanted in std::mem::take(&mut mounts.copies) {
            let scratch = self.scratch("mount")?;
            let copy = scratch.path();
            rustix::fs::chmod(copy, rustix::fs::Mode::from_raw_mode(0o755)).at(copy)?;
            let path = match &wanted.from {
                Some(from) => self.copy_out(&wanted.text, from, &wanted.source, copy)?,
                None => {
                    let root = tree::open_root(self.context.path()).at(self.context.path())?;
                    copy_tree(&root, &wanted.source, &self.ignore, copy)?
                }
            };
            mounts.mounts[wanted.mount].kind = StepMountKind::Bind(path);
            mounts.scratches.push(scratch);
        }
        Ok(())
    }

    /// A file or folder of the context, where it is.
    fn in_context(
        &self,
        fields: &Fields<'_>,
        source: &str,
        mounts: &mut Mounts,
    ) -> Result<PathBuf> {
        let outside = || fields.bad("its source is not in the build context");
        let clean = tree::clean(source.as_bytes()).ok_or_else(outside)?;
        let top = self.context.path().canonicalize().at(self.context.path())?;
        let path = top
            .join(tree::os(&clean))
            .canonicalize()
            .map_err(|_| outside())?;
        if !path.starts_with(&top) {
            return Err(outside());
        }
        let root = tree::open_root(&top).at(&top)?;
        let items = copy::find(&root, &[source.to_owned()], &choice(&self.ignore))?;
        let hash = copy::hash(&root, &items, false)?;
        mounts.identity.push_str(&format!("{hash}\n"));
        Ok(path)
    }

    /// Copies `source` of a stage or image into the folder `into`; says where it is then.
    fn copy_out(&self, text: &str, from: &str, source: &str, into: &Path) -> Result<PathBuf> {
        let id = self.named_image(from)?;
        let (_snapshot, layers) =
            self.temporary(&Stage::of(&self.store.inspect(&id.to_string())?))?;
        let root = mount_detached(&layers, false)?;
        copy_tree(&root, source, &Ignore::default(), into).map_err(|error| match error {
            Error::Dockerfile(_) => bad(text, &format!("there is no {source} in {from}")),
            other => other,
        })
    }

    fn secret_mount(
        &self,
        fields: &Fields<'_>,
        run: &RunConfig,
        mounts: &mut Mounts,
    ) -> Result<()> {
        fields.only(&[&TARGET, &OWNERSHIP, &["id", "required", "env"]])?;
        let target = fields.target(run).ok();
        let id = match (fields.first(&["id"]), &target) {
            (Some(id), _) => id,
            (None, Some(target)) => target.rsplit('/').next().unwrap_or(target),
            (None, None) => return Err(fields.bad("it has neither id nor target")),
        };
        let Some(Secret(content)) = self.options.secrets.get(id) else {
            if fields.on(&["required"])?.unwrap_or(false) {
                return Err(Error::Invalid(format!(
                    "the step needs the secret {id:?}: give it with berth build --secret id={id},src=FILE (the docker command line has no way without BuildKit)"
                )));
            }
            return Ok(());
        };
        if let Some(name) = fields.first(&["env"]) {
            let text = std::str::from_utf8(content)
                .ok()
                .filter(|text| !text.contains('\0'))
                .ok_or_else(|| fields.bad("the secret is no text that a variable could hold"))?;
            mounts.env.push(format!("{name}={text}"));
            if target.is_none() {
                return Ok(());
            }
        }
        mounts.mounts.push(StepMount {
            kind: StepMountKind::Secret {
                content: Secret(content.clone()),
                mode: fields.number("mode", 8)?.unwrap_or(0o400) & 0o777,
                uid: fields.number("uid", 10)?.unwrap_or(0),
                gid: fields.number("gid", 10)?.unwrap_or(0),
            },
            target: target
                .clone()
                .unwrap_or_else(|| format!("/run/secrets/{id}")),
            read_only: true,
        });
        Ok(())
    }
}

fn choice(ignore: &Ignore) -> Choice<'_> {
    static NOTHING: std::sync::LazyLock<Ignore> = std::sync::LazyLock::new(Ignore::default);
    Choice {
        ignore,
        excluded: &NOTHING,
        parents: false,
    }
}

/// Copies `source` of the tree `root` into the folder `into`, owners and modes as they are; says what was made of it.
fn copy_tree(
    root: &std::os::fd::OwnedFd,
    source: &str,
    ignore: &Ignore,
    into: &Path,
) -> Result<PathBuf> {
    let items = copy::find(root, &[source.to_owned()], &choice(ignore))?;
    let target = tree::open_root(into).at(into)?;
    let single = items
        .first()
        .filter(|item| !item.of_folder)
        .map(|item| into.join(tree::os(&item.to)));
    let manner = copy::Manner {
        owner: None,
        into_folder: true,
        ..copy::Manner::default()
    };
    copy::copy(root, &items, &target, "/", &manner)?;
    if single.is_none()
        && let Some(top) = items.first()
    {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
        let folder = tree::open_in(root, &top.from, flags).doing(|| source.to_owned())?;
        crate::store::copy_description(&folder, &target).at(into)?;
    }
    Ok(single.unwrap_or_else(|| into.to_owned()))
}
