//! `.dockerignore` (Dockerfile reference, ".dockerignore file"): the last pattern that fits decides, `!` takes back,
//! `**` crosses folders.

use crate::store::wildcard;

/// The patterns of a context.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ignore(Vec<(bool, Vec<String>)>);

impl Ignore {
    /// Reads the file's text.
    pub fn parse(text: &str) -> Ignore {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let patterns = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .filter_map(|line| {
                let (back, pattern) = match line.strip_prefix('!') {
                    Some(rest) => (true, rest.trim()),
                    None => (false, line),
                };
                let mut components: Vec<String> = Vec::new();
                for component in pattern.split('/') {
                    match component {
                        "" | "." => {}
                        ".." => {
                            components.pop();
                        }
                        other => components.push(other.to_owned()),
                    }
                }
                (!components.is_empty()).then_some((back, components))
            })
            .collect();
        Ignore(patterns)
    }

    /// Whether `path`, relative to the context's root, is left out.
    pub fn excludes(&self, path: &str) -> bool {
        let components: Vec<&str> = path.split('/').filter(|c| !c.is_empty()).collect();
        let mut excluded = false;
        for (back, pattern) in &self.0 {
            if *back == excluded {
                // A pattern that fits a folder fits all beneath it.
                let fits = (1..=components.len())
                    .any(|end| fits(pattern, &components[..end], &mut 10_000));
                if fits {
                    excluded = !*back;
                }
            }
        }
        excluded
    }

    /// Whether something beneath an excluded folder may be taken back.
    pub fn has_exceptions(&self) -> bool {
        self.0.iter().any(|(back, _)| *back)
    }
}

/// `budget` bounds the ways that many `**` could be tried.
fn fits(pattern: &[String], path: &[&str], budget: &mut u32) -> bool {
    if *budget == 0 {
        return false;
    }
    *budget -= 1;
    match (pattern.split_first(), path.split_first()) {
        (None, None) => true,
        (None, Some(_)) => false,
        (Some((first, rest)), _) if first == "**" => {
            // At the end it fits anything, but not nothing.
            if rest.is_empty() {
                return !path.is_empty();
            }
            (0..=path.len()).any(|skip| fits(rest, &path[skip..], budget))
        }
        (Some(_), None) => false,
        (Some((first, rest)), Some((name, deeper))) => {
            wildcard(first.as_bytes(), name.as_bytes()) && fits(rest, deeper, budget)
        }
    }
}

/// Fuzz entry.
pub fn fuzz_ignore(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let ignore = Ignore::parse(&text);
    for path in ["a", "a/b/c", "", "x.y/z"] {
        let _ = ignore.excludes(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn patterns_fit_as_docker_fits_them() {
        let ignore = Ignore::parse(
            "# no\n*.log\n**/*.tmp\nnode_modules\n/docs/**\n!docs/keep.md\nsecret*\n!secret.ok\n",
        );
        for (path, excluded) in [
            ("a.log", true),
            ("d/a.log", false),
            ("d/e/a.tmp", true),
            ("a.tmp", true),
            ("node_modules/x/y", true),
            ("sub/node_modules", false),
            ("docs/a", true),
            ("docs/keep.md", false),
            ("docs", false),
            ("secret.txt", true),
            ("secret.ok", false),
            ("src/main.rs", false),
        ] {
            assert_eq!(ignore.excludes(path), excluded, "{path}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_or_hangs(text in "[*!/a.\n#\\[\\]?]{0,60}") {
            fuzz_ignore(text.as_bytes());
        }
    }
}
