//! Where this host's own apt gets Debian from (sources.list(5), both of its forms).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// One archive, suite and set of components, as apt is told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    pub uri: String,
    pub suite: String,
    pub components: Vec<String>,
    /// A keyring's path.
    pub signed_by: Option<String>,
}

/// All binary archives in `/etc/apt`-like `directory`, in the order apt reads them. What cannot be read is left out.
pub fn read(directory: &Path) -> Vec<Source> {
    let mut sources = Vec::new();
    if let Ok(text) = fs::read_to_string(directory.join("sources.list")) {
        sources.extend(parse_list(&text));
    }
    let parts = directory.join("sources.list.d");
    let mut files: Vec<_> = fs::read_dir(parts)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .collect();
    files.sort();
    for path in files {
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        match path.extension().and_then(|e| e.to_str()) {
            Some("list") => sources.extend(parse_list(&text)),
            Some("sources") => sources.extend(parse_deb822(&text)),
            _ => {}
        }
    }
    sources
}

/// The one-line form: `deb [signed-by=KEYRING] URI SUITE COMPONENT…`.
pub fn parse_list(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some(rest) = line
            .strip_prefix("deb")
            .filter(|r| r.starts_with([' ', '\t']))
        else {
            continue;
        };
        let rest = rest.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(inner) => match inner.split_once(']') {
                Some((options, rest)) => (options, rest),
                None => continue,
            },
            None => ("", rest),
        };
        let signed_by = options
            .split_whitespace()
            .filter_map(|o| o.split_once('='))
            .find(|(key, _)| key.eq_ignore_ascii_case("signed-by"))
            .map(|(_, value)| value.to_owned());
        let mut words = rest.split_whitespace().map(str::to_owned);
        if let (Some(uri), Some(suite)) = (words.next(), words.next()) {
            sources.push(Source {
                uri,
                suite,
                components: words.collect(),
                signed_by,
            });
        }
    }
    sources
}

/// The deb822 form: stanzas of `Types`, `URIs`, `Suites`, `Components`, `Signed-By`, `Enabled`.
pub fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut stanza: BTreeMap<String, String> = BTreeMap::new();
    let mut last = None;
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            sources.extend(stanza_sources(&std::mem::take(&mut stanza)));
            last = None;
        } else if line.starts_with([' ', '\t']) {
            if let Some(value) = last.as_ref().and_then(|key| stanza.get_mut(key)) {
                value.push('\n');
                value.push_str(line.trim());
            }
        } else if let Some((key, value)) = line.split_once(':') {
            let key = key.trim().to_ascii_lowercase();
            stanza.insert(key.clone(), value.trim().to_owned());
            last = Some(key);
        }
    }
    sources
}

fn stanza_sources(stanza: &BTreeMap<String, String>) -> Vec<Source> {
    let words = |key: &str| -> Vec<String> {
        stanza
            .get(key)
            .map(|v| v.split_whitespace().map(str::to_owned).collect())
            .unwrap_or_default()
    };
    let off = stanza
        .get("enabled")
        .is_some_and(|v| ["no", "false", "0", "off"].contains(&v.to_ascii_lowercase().as_str()));
    if off || !words("types").iter().any(|t| t == "deb") {
        return Vec::new();
    }
    // A key may also stand there in full; then apt's own trust decides.
    let signed_by = stanza
        .get("signed-by")
        .filter(|v| v.starts_with('/') && !v.contains('\n'))
        .cloned();
    let components = words("components");
    let mut sources = Vec::new();
    for uri in words("uris") {
        for suite in words("suites") {
            sources.push(Source {
                uri: uri.clone(),
                suite,
                components: components.clone(),
                signed_by: signed_by.clone(),
            });
        }
    }
    sources
}

/// Debian's releases by name and number; the distro-info data of the host comes first where it is installed.
const RELEASES: [(&str, &str); 8] = [
    ("stretch", "9"),
    ("buster", "10"),
    ("bullseye", "11"),
    ("bookworm", "12"),
    ("trixie", "13"),
    ("forky", "14"),
    ("duke", "15"),
    ("sid", ""),
];

fn releases() -> Vec<(String, String)> {
    let mut known: Vec<(String, String)> = RELEASES
        .iter()
        .map(|(name, number)| ((*name).to_owned(), (*number).to_owned()))
        .collect();
    if let Ok(table) = fs::read_to_string("/usr/share/distro-info/debian.csv") {
        for line in table.lines().skip(1) {
            let mut fields = line.split(',');
            if let (Some(number), _, Some(name)) = (fields.next(), fields.next(), fields.next())
                && !known.iter().any(|(known, _)| known == name)
            {
                known.push((name.to_owned(), number.to_owned()));
            }
        }
    }
    known
}

/// The number of a release by its name: `bookworm` → `12`.
pub fn number_of(suite: &str) -> Option<String> {
    releases()
        .into_iter()
        .find(|(name, number)| name == suite && !number.is_empty())
        .map(|(_, number)| number)
}

/// The suite that a tag means: `12` → `bookworm`, others as they are; `latest` is `stable`.
pub fn suite_of(tag: &str) -> String {
    let tag = tag.strip_suffix("-slim").unwrap_or(tag);
    if tag == "latest" {
        return "stable".to_owned();
    }
    let wanted = tag.split('.').next().unwrap_or(tag);
    releases()
        .into_iter()
        .find(|(_, number)| !number.is_empty() && number == wanted)
        .map_or_else(|| tag.to_owned(), |(name, _)| name)
}

fn is_debian_suite(suite: &str) -> bool {
    let base = suite.split(['-', '/']).next().unwrap_or(suite);
    [
        "stable",
        "testing",
        "unstable",
        "oldstable",
        "oldoldstable",
        "experimental",
    ]
    .contains(&base)
        || releases().iter().any(|(name, _)| name == base)
}

fn is_security(source: &Source) -> bool {
    source.suite.ends_with("-security") || source.suite.ends_with("/updates")
}

/// The lines to build `suite` from: its archive, its updates and its security updates, as far as the host knows them.
///
/// `mirror` takes the place of the host's archive. Empty where neither names one.
pub fn for_suite(
    sources: &[Source],
    suite: &str,
    mirror: Option<&str>,
    components: &[String],
    keyring: Option<&str>,
) -> Vec<Source> {
    // Other vendors' archives may use Debian's names for their suites; Debian's own are called so.
    let debian: Vec<&Source> = sources
        .iter()
        .filter(|s| is_debian_suite(&s.suite) && s.components.iter().any(|c| c == "main"))
        .filter(|s| {
            s.uri
                .trim_end_matches('/')
                .rsplit('/')
                .next()
                .is_some_and(|last| last.starts_with("debian"))
        })
        .collect();
    let archive = debian.iter().find(|s| {
        !is_security(s) && !s.suite.ends_with("-updates") && !s.suite.ends_with("-backports")
    });
    let security = debian.iter().find(|s| is_security(s));
    let has_updates = debian.iter().any(|s| s.suite.ends_with("-updates"));
    let wanted = |source: Option<&&Source>| {
        if components.is_empty() {
            source.map_or_else(|| vec!["main".to_owned()], |s| s.components.clone())
        } else {
            components.to_vec()
        }
    };
    let signed = |source: Option<&&Source>| {
        keyring
            .map(str::to_owned)
            .or_else(|| source.and_then(|s| s.signed_by.clone()))
    };
    let rolling = ["sid", "unstable", "experimental"].contains(&suite);
    let mut lines = Vec::new();
    let uri = mirror
        .map(str::to_owned)
        .or_else(|| archive.map(|s| s.uri.clone()));
    let Some(uri) = uri else { return lines };
    let mut line = |uri: &str, suite: String, source: Option<&&Source>| {
        lines.push(Source {
            uri: uri.to_owned(),
            suite,
            components: wanted(source),
            signed_by: signed(source),
        });
    };
    line(&uri, suite.to_owned(), archive);
    if !rolling {
        if has_updates && mirror.is_none() {
            line(&uri, format!("{suite}-updates"), archive);
        }
        if let Some(source) = security {
            // Until buster the suite was called buster/updates.
            let old = ["stretch", "buster"].contains(&suite);
            let suite = if old {
                format!("{suite}/updates")
            } else {
                format!("{suite}-security")
            };
            line(&source.uri, suite, Some(source));
        }
    }
    lines
}

impl Source {
    /// The one-line form.
    pub fn line(&self) -> String {
        let options = self
            .signed_by
            .as_ref()
            .map(|k| format!("[signed-by={k}] "))
            .unwrap_or_default();
        format!(
            "deb {options}{} {} {}",
            self.uri,
            self.suite,
            self.components.join(" ")
        )
    }
}

/// Fuzz entry.
pub fn fuzz_sources(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut sources = parse_list(&text);
    sources.extend(parse_deb822(&text));
    let _ = for_suite(&sources, "bookworm", None, &[], None);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEB822: &str = "Types: deb deb-src\n# a comment\nURIs: http://mirror.test/debian\nSuites: trixie trixie-updates\n\
        Components: main contrib\nSigned-By: /k.gpg\n\nTypes: deb\nURIs: http://mirror.test/debian-security\n\
        Suites: trixie-security\nComponents: main\n\nEnabled: no\nTypes: deb\nURIs: http://off.test/debian\nSuites: sid\nComponents: main\n";

    #[test]
    fn another_suite_is_built_from_the_archives_the_host_uses() {
        let lines: Vec<String> = for_suite(
            &parse_deb822(DEB822),
            "bookworm",
            None,
            &["main".to_owned()],
            None,
        )
        .iter()
        .map(Source::line)
        .collect();
        assert_eq!(
            lines,
            [
                "deb [signed-by=/k.gpg] http://mirror.test/debian bookworm main",
                "deb [signed-by=/k.gpg] http://mirror.test/debian bookworm-updates main",
                "deb http://mirror.test/debian-security bookworm-security main",
            ]
        );
        assert_eq!(
            for_suite(&parse_deb822(DEB822), "sid", None, &[], None).len(),
            1
        );
    }

    #[test]
    fn the_one_line_form_is_read() {
        let text = "# deb http://no.test/debian x main\ndeb [arch=amd64 signed-by=/k.gpg] http://a.test/debian/ bookworm main # end\n\
            deb-src http://a.test/debian bookworm main\ndeb http://vendor.test/apt nodistro main\n";
        let sources = parse_list(text);
        assert_eq!(sources.len(), 2);
        let lines = for_suite(&sources, "bookworm", None, &[], None);
        assert_eq!(lines.len(), 1);
        assert_eq!(
            lines[0].line(),
            "deb [signed-by=/k.gpg] http://a.test/debian/ bookworm main"
        );
    }

    #[test]
    fn a_host_without_debian_has_no_lines_and_a_flag_helps() {
        let ubuntu = parse_list("deb http://archive.test/ubuntu noble main");
        assert!(for_suite(&ubuntu, "bookworm", None, &[], None).is_empty());
        let lines = for_suite(
            &ubuntu,
            "bookworm",
            Some("http://m.test/debian"),
            &[],
            Some("/k"),
        );
        assert_eq!(
            lines[0].line(),
            "deb [signed-by=/k] http://m.test/debian bookworm main"
        );
    }

    #[test]
    fn numbers_and_names_are_the_same_release() {
        assert_eq!(suite_of("12"), "bookworm");
        assert_eq!(suite_of("12-slim"), "bookworm");
        assert_eq!(suite_of("bookworm"), "bookworm");
        assert_eq!(suite_of("latest"), "stable");
        assert_eq!(number_of("bookworm").as_deref(), Some("12"));
        assert_eq!(number_of("sid"), None);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(deb|Types:|URIs:| |\n|\\[|\\]|[a-z/:=#.-]){0,60}") {
            fuzz_sources(text.as_bytes());
        }
    }
}
