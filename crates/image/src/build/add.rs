//! COPY and ADD: where their sources come from, and the layer they make.

use std::os::fd::OwnedFd;

use parse_dockerfile::{Flag, Instruction, Source};

use super::copy::{self, Choice, Manner};
use super::ignore::Ignore;
use super::stage::{Made, Stage, Temporary};
use super::words::{Lookup, expand};
use super::{Build, change, fetch, heredoc};
use crate::error::At;
use crate::layer::tree::{self, Scratch};
use crate::snapshot::mount_detached;
use crate::{Digest, Error, Result};

/// One COPY or ADD as it is written.
pub(super) struct Written<'a, 'text> {
    pub add: bool,
    /// For the cache's key.
    pub shown: &'a str,
    /// The text the instruction stands in.
    pub text: &'a str,
    pub options: &'a [Flag<'text>],
    pub sources: &'a [Source<'text>],
    pub dest: &'a str,
}

impl<'a, 'text> Written<'a, 'text> {
    /// None where the instruction is another.
    pub fn of(
        instruction: &'a Instruction<'text>,
        shown: &'a str,
        text: &'a str,
    ) -> Option<Written<'a, 'text>> {
        let (add, options, sources, dest) = match instruction {
            Instruction::Copy(i) => (false, &i.options, &i.src, &i.dest),
            Instruction::Add(i) => (true, &i.options, &i.src, &i.dest),
            _ => return None,
        };
        Some(Written {
            add,
            shown,
            text,
            options,
            sources,
            dest: &dest.value,
        })
    }

    fn word(&self) -> &'static str {
        if self.add { "ADD" } else { "COPY" }
    }
}

#[derive(Default)]
struct Flags {
    from: Option<String>,
    chown: Option<String>,
    mode: Option<u32>,
    checksum: Option<Digest>,
    parents: bool,
    excluded: Vec<String>,
}

impl Flags {
    fn parse(written: &Written<'_, '_>, escape: char, lookup: Lookup<'_>) -> Result<Flags> {
        let word = written.word();
        let mut flags = Flags::default();
        for option in written.options {
            let name = &*option.name.value;
            let value = option
                .value
                .as_ref()
                .map(|v| v.value.as_ref())
                .unwrap_or_default();
            let value = expand(value, escape, lookup)?;
            let truth = || match value.as_str() {
                "" | "true" | "1" => Ok(true),
                "false" | "0" => Ok(false),
                other => Err(Error::Dockerfile(format!(
                    "{word} --{name}={other}: true or false is wanted"
                ))),
            };
            match name {
                "from" if !written.add => flags.from = Some(value),
                "chown" => flags.chown = Some(value),
                "chmod" => {
                    let bits = u32::from_str_radix(&value, 8).ok().filter(|m| *m <= 0o7777);
                    flags.mode = Some(bits.ok_or_else(|| {
                        Error::Dockerfile(format!(
                            "invalid chmod parameter: {value:?}. it should be octal string"
                        ))
                    })?);
                }
                "exclude" => flags.excluded.push(value),
                "parents" if !written.add => flags.parents = truth()?,
                "checksum" if written.add => flags.checksum = Some(value.parse()?),
                // Every copy is a layer of its own already.
                "link" => drop(truth()?),
                other => {
                    return Err(Error::Unsupported(format!(
                        "{word} --{other} is not supported"
                    )));
                }
            }
        }
        Ok(flags)
    }
}

/// What is copied, by where it comes from.
#[derive(Default)]
struct Sources {
    paths: Vec<String>,
    web: Option<String>,
    /// Here-documents: the name each has in a folder, and its content.
    inline: Vec<(String, String)>,
}

impl Sources {
    fn parse(
        written: &Written<'_, '_>,
        flags: &Flags,
        escape: char,
        lookup: Lookup<'_>,
    ) -> Result<Sources> {
        let word = written.word();
        let mut sources = Sources::default();
        for source in written.sources {
            match source {
                Source::Path(path) => {
                    let path = expand(&path.value, escape, lookup)?;
                    if written.add && fetch::is_web(&path) && !path.ends_with(".git") {
                        sources.web = Some(path);
                    } else if written.add && (path.contains("://") || path.starts_with("git@")) {
                        return Err(Error::Unsupported(format!(
                            "ADD {path}: repositories are not fetched, only files by http:// and https://; RUN git clone instead"
                        )));
                    } else {
                        sources.paths.push(path);
                    }
                }
                Source::HereDoc(document) => {
                    let name = heredoc::name_of(written.text, document.span.end).to_owned();
                    let content = if document.expand {
                        heredoc::expand_document(&document.value, lookup)
                    } else {
                        document.value.clone().into_owned()
                    };
                    sources.inline.push((name, content));
                }
                _ => return Err(Error::Dockerfile(format!("{word} with an unknown source"))),
            }
        }
        let count = written.sources.len();
        if flags.checksum.is_some() && (sources.web.is_none() || count != 1) {
            return Err(Error::Dockerfile(
                "ADD --checksum is for one http:// or https:// source".to_owned(),
            ));
        }
        if sources.web.is_some() && count > 1 {
            return Err(Error::Unsupported(
                "ADD of an address together with other sources: write one ADD for each".to_owned(),
            ));
        }
        if !sources.inline.is_empty() && (!sources.paths.is_empty() || flags.from.is_some()) {
            return Err(Error::Unsupported(format!(
                "{word} of here-documents together with files: write one {word} for each"
            )));
        }
        Ok(sources)
    }
}

/// A tree that is copied from, and what keeps it.
struct Opened<'a> {
    root: OwnedFd,
    paths: Vec<String>,
    in_context: bool,
    // The mount goes before its folders do: fields are dropped in this order.
    _snapshot: Option<Temporary<'a>>,
    _scratch: Option<Scratch>,
}

impl Build<'_> {
    pub(super) fn copy_step(
        &mut self,
        stage: &mut Stage,
        written: &Written<'_, '_>,
        lookup: Lookup<'_>,
    ) -> Result<()> {
        let word = written.word();
        let flags = Flags::parse(written, self.escape, lookup)?;
        let sources = Sources::parse(written, &flags, self.escape, lookup)?;
        let dest = expand(written.dest, self.escape, lookup)?;
        let into_folder =
            dest.ends_with('/') || dest.ends_with("/.") || dest == "." || dest == "..";
        if written.sources.len() > 1 && !into_folder {
            return Err(Error::Dockerfile(format!(
                "When using {word} with more than one source file, the destination must be a directory and end with a /"
            )));
        }
        let mut target = change::absolute(&stage.run().working_dir, &dest);
        if into_folder && target != "/" {
            target.push('/');
        }
        let fetched = sources.web.is_some();
        let opened = self.open_sources(&flags, sources, &target)?;
        let none = Ignore::default();
        let choice = Choice {
            ignore: if opened.in_context {
                &self.ignore
            } else {
                &none
            },
            excluded: &Ignore::parse(&flags.excluded.join("\n")),
            parents: flags.parents,
        };
        let items = copy::find(&opened.root, &opened.paths, &choice)?;
        let hash = copy::hash(&opened.root, &items, flags.from.is_some())?;
        let kind = if flags.from.is_some() || written.sources.len() > 1 {
            "multi"
        } else {
            "file"
        };
        let key = self.key(
            stage,
            written.shown,
            &format!(
                "{kind}:{hash}\0{target}\0{:?}\0{:?}",
                flags.chown, flags.mode
            ),
        );
        if self.reuse(stage, &key)? {
            return Ok(());
        }
        let lease = self.store.lease();
        let layer = {
            let (snapshot, layers) = self.temporary(stage)?;
            let into = mount_detached(&layers, true)?;
            // A context's owners mean nothing here; those of a stage or an image are kept.
            let owner = match &flags.chown {
                Some(text) => Some(copy::owner(&into, text)?),
                None => flags.from.is_none().then_some((0, 0)),
            };
            let manner = Manner {
                owner,
                mode: flags.mode,
                extract: written.add && !fetched,
                into_folder: flags.parents,
            };
            copy::copy(&opened.root, &items, &into, &target, &manner)?;
            // The overlay must be gone before its upper folder is read as it is.
            drop(into);
            self.layer_of(&snapshot, &lease)?
        };
        drop(opened);
        let text = format!(
            "/bin/sh -c #(nop) {word} {kind}:{} in {target} ",
            hash.hex()
        );
        self.finish(
            stage,
            Made {
                text,
                layer: Some(layer),
                key: Some(&key),
            },
        )
    }

    /// Where the files come from: the Dockerfile itself, the web, another image, or the context.
    fn open_sources(&self, flags: &Flags, sources: Sources, target: &str) -> Result<Opened<'_>> {
        let in_folder = target.ends_with('/');
        let of_scratch = |scratch: Scratch, paths: Vec<String>| -> Result<Opened<'_>> {
            Ok(Opened {
                root: tree::open_root(scratch.path()).at(scratch.path())?,
                paths,
                in_context: false,
                _snapshot: None,
                _scratch: Some(scratch),
            })
        };
        if !sources.inline.is_empty() {
            let path = self.store.content().scratch_path("heredoc");
            let scratch = Scratch::create(path.clone()).at(&path)?;
            let mut names = Vec::new();
            for (name, content) in sources.inline {
                if name.contains('/') || name == "." || name == ".." {
                    return Err(Error::Dockerfile(format!(
                        "a here-document called {name:?} is no file's name"
                    )));
                }
                let file = path.join(&name);
                std::fs::write(&file, content).at(&file)?;
                rustix::fs::chmod(&file, rustix::fs::Mode::from_raw_mode(0o644)).at(&file)?;
                names.push(name);
            }
            return of_scratch(scratch, names);
        }
        if let Some(address) = &sources.web {
            // In the tree it is called as the target says, or as the address does in a folder.
            let name = fetch::file_name(address);
            let name = if in_folder {
                name?
            } else {
                name.unwrap_or("file".to_owned())
            };
            self.output.write(&format!("Downloading {address}\n"));
            let scratch = fetch::fetch(self.store, address, &name, flags.checksum, self.cancel)?;
            return of_scratch(scratch, vec![name]);
        }
        if let Some(name) = &flags.from {
            let id = self.named_image(name)?;
            let whole = Stage::of(&self.store.inspect(&id.to_string())?);
            let (snapshot, layers) = self.temporary(&whole)?;
            return Ok(Opened {
                root: mount_detached(&layers, false)?,
                paths: sources.paths,
                in_context: false,
                _snapshot: Some(snapshot),
                _scratch: None,
            });
        }
        let path = self.context.path();
        Ok(Opened {
            root: tree::open_root(path).at(path)?,
            paths: sources.paths,
            in_context: true,
            _snapshot: None,
            _scratch: None,
        })
    }
}
