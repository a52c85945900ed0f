//! Words of a Dockerfile: quotes, escapes and variables (Dockerfile reference, "Environment replacement").

use crate::store::wildcard;
use crate::{Error, Result};

/// Looks up a variable.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A shell-form command on one line: continued lines joined, comment lines between them left out.
pub fn join_lines(text: &str, escape: char) -> String {
    let mut joined = String::new();
    for line in text.lines() {
        if line.trim_start().starts_with('#') && !joined.is_empty() {
            continue;
        }
        match line.trim_end().strip_suffix(escape) {
            Some(continued) => joined.push_str(continued),
            None => {
                joined.push_str(line);
                break;
            }
        }
    }
    joined.trim().to_owned()
}

/// Splits at white space that is not quoted. Quotes stay.
pub fn split(text: &str, escape: char) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    let mut characters = text.chars();
    while let Some(c) = characters.next() {
        match (quote, c) {
            (None, c) if c.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            (None, '\'' | '"') => {
                quote = Some(c);
                word.push(c);
            }
            (Some(q), c) if c == q => {
                quote = None;
                word.push(c);
            }
            (q, c) if c == escape && q != Some('\'') => {
                word.push(c);
                word.extend(characters.next());
            }
            (_, c) => word.push(c),
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// Removes quotes and escapes and puts in variables.
///
/// # Errors
/// [`Error::Dockerfile`] for a quote or brace that is not closed, an unknown modifier, and what `${x:?why}` demands.
pub fn expand(word: &str, escape: char, lookup: Lookup<'_>) -> Result<String> {
    let mut expander = Expander {
        characters: word.chars().collect(),
        at: 0,
        escape,
        lookup,
        depth: 0,
    };
    let text = expander.until(None)?;
    Ok(text)
}

struct Expander<'a> {
    characters: Vec<char>,
    at: usize,
    escape: char,
    lookup: Lookup<'a>,
    depth: u32,
}

impl Expander<'_> {
    fn next(&mut self) -> Option<char> {
        let c = self.characters.get(self.at).copied();
        self.at += 1;
        c
    }

    fn peek(&self) -> Option<char> {
        self.characters.get(self.at).copied()
    }

    fn until(&mut self, end: Option<char>) -> Result<String> {
        let mut text = String::new();
        while let Some(c) = self.next() {
            if Some(c) == end {
                return Ok(text);
            }
            match c {
                '\'' => loop {
                    match self.next() {
                        Some('\'') => break,
                        Some(c) => text.push(c),
                        None => {
                            return Err(Error::Dockerfile(
                                "a single quote is not closed".to_owned(),
                            ));
                        }
                    }
                },
                '"' => loop {
                    match self.next() {
                        Some('"') => break,
                        Some('$') => text.push_str(&self.variable()?),
                        Some(c) if c == self.escape => match self.next() {
                            Some(c @ ('"' | '$')) => text.push(c),
                            Some(c) if c == self.escape => text.push(c),
                            Some(other) => text.extend([c, other]),
                            None => {
                                return Err(Error::Dockerfile("a quote is not closed".to_owned()));
                            }
                        },
                        Some(c) => text.push(c),
                        None => {
                            return Err(Error::Dockerfile(
                                "a double quote is not closed".to_owned(),
                            ));
                        }
                    }
                },
                '$' => text.push_str(&self.variable()?),
                c if c == self.escape => text.extend(self.next()),
                c => text.push(c),
            }
        }
        match end {
            None => Ok(text),
            Some(_) => Err(Error::Dockerfile(
                "a brace of ${…} is not closed".to_owned(),
            )),
        }
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        if let Some(c) = self.peek().filter(char::is_ascii_digit) {
            self.at += 1;
            return c.to_string();
        }
        while let Some(c) = self
            .peek()
            .filter(|c| c.is_ascii_alphanumeric() || *c == '_')
        {
            name.push(c);
            self.at += 1;
        }
        name
    }

    fn variable(&mut self) -> Result<String> {
        if self.peek() != Some('{') {
            let name = self.name();
            return Ok(if name.is_empty() {
                "$".to_owned()
            } else {
                (self.lookup)(&name).unwrap_or_default()
            });
        }
        self.at += 1;
        self.depth += 1;
        if self.depth > 64 {
            return Err(Error::Dockerfile("variables nested too deep".to_owned()));
        }
        let name = self.name();
        let value = (self.lookup)(&name);
        let bad = |what: String| {
            Error::Dockerfile(format!("unsupported modifier {what:?} in ${{{name}…}}"))
        };
        if name.is_empty() {
            return Err(Error::Dockerfile("${} without a name".to_owned()));
        }
        let result = match self.next() {
            Some('}') => Ok(value.unwrap_or_default()),
            Some(first @ (':' | '-' | '+' | '?')) => {
                let operator = if first == ':' {
                    self.next().unwrap_or(' ')
                } else {
                    first
                };
                let word = self.until(Some('}'))?;
                let set = value.filter(|v| first != ':' || !v.is_empty());
                match (operator, set) {
                    ('-', set) => Ok(set.unwrap_or(word)),
                    ('+', set) => Ok(set.map_or(String::new(), |_| word)),
                    ('?', Some(value)) => Ok(value),
                    ('?', None) => Err(Error::Dockerfile(format!(
                        "{name}: {}",
                        if word.is_empty() {
                            "not allowed to be unset"
                        } else {
                            &word
                        }
                    ))),
                    (other, _) => Err(bad(format!(":{other}"))),
                }
            }
            Some(side @ ('#' | '%')) => {
                let longest = self.peek() == Some(side);
                if longest {
                    self.at += 1;
                }
                let pattern = self.until(Some('}'))?;
                Ok(trim(
                    &value.unwrap_or_default(),
                    &pattern,
                    side == '#',
                    longest,
                ))
            }
            Some(other) => Err(bad(other.to_string())),
            None => Err(Error::Dockerfile(
                "a brace of ${…} is not closed".to_owned(),
            )),
        };
        self.depth -= 1;
        result
    }
}

/// `${value#pattern}` and its three like.
fn trim(value: &str, pattern: &str, front: bool, longest: bool) -> String {
    let mut cuts: Vec<usize> = value
        .char_indices()
        .map(|(i, _)| i)
        .chain([value.len()])
        .collect();
    if front == longest {
        cuts.reverse();
    }
    for cut in cuts {
        let (head, tail) = value.split_at(cut);
        let (removed, kept) = if front { (head, tail) } else { (tail, head) };
        // Here a star crosses slashes, so they are hidden from the matcher.
        let hide = |text: &str| text.replace('/', "\u{1}");
        if wildcard(hide(pattern).as_bytes(), hide(removed).as_bytes()) {
            return kept.to_owned();
        }
    }
    value.to_owned()
}

/// `KEY=VALUE …`, or the old form `KEY the rest`.
///
/// # Errors
/// [`Error::Dockerfile`] where it is neither.
pub fn pairs(
    text: &str,
    escape: char,
    lookup: Lookup<'_>,
    what: &str,
) -> Result<Vec<(String, String)>> {
    let words = split(text, escape);
    let first = words
        .first()
        .ok_or_else(|| Error::Dockerfile(format!("{what} requires at least one argument")))?;
    if !first.contains('=') {
        let rest = text
            .trim()
            .strip_prefix(first.as_str())
            .unwrap_or_default()
            .trim();
        if rest.is_empty() {
            return Err(Error::Dockerfile(format!("{what} must have two arguments")));
        }
        return Ok(vec![(
            expand(first, escape, lookup)?,
            expand(rest, escape, lookup)?,
        )]);
    }
    words
        .iter()
        .map(|word| {
            let (key, value) = word.split_once('=').ok_or_else(|| {
                Error::Dockerfile(format!(
                    "Syntax error - can't find = in {word:?}. Must be of the form: name=value"
                ))
            })?;
            if key.is_empty() {
                return Err(Error::Dockerfile(format!("{what} names can not be blank")));
            }
            Ok((expand(key, escape, lookup)?, expand(value, escape, lookup)?))
        })
        .collect()
}

/// Fuzz entry.
pub fn fuzz_words(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let lookup = |name: &str| (name.len() < 3).then(|| name.to_uppercase());
    let _ = expand(&text, '\\', &lookup);
    let _ = pairs(&text, '\\', &lookup, "ENV");
    let _ = join_lines(&text, '\\');
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn with(word: &str) -> Result<String> {
        let lookup = |name: &str| match name {
            "x" => Some("value".to_owned()),
            "empty" => Some(String::new()),
            "path" => Some("a/b/c.tar.gz".to_owned()),
            _ => None,
        };
        expand(word, '\\', &lookup)
    }

    #[test]
    fn variables_are_put_in_as_the_reference_says() {
        for (word, expected) in [
            ("$x", "value"),
            ("${x}s", "values"),
            ("$none", ""),
            ("${none:-y}", "y"),
            ("${empty:-y}", "y"),
            ("${empty-y}", ""),
            ("${x:+y}", "y"),
            ("${none:+y}", ""),
            ("${none:-${x}}", "value"),
            ("'$x'", "$x"),
            ("\"$x\"", "value"),
            ("\\$x", "$x"),
            ("\"\\$x\"", "$x"),
            ("a\\ b", "a b"),
            ("$", "$"),
            ("$$x", "$value"),
            ("${path##*/}", "c.tar.gz"),
            ("${path%.*}", "a/b/c.tar"),
            ("${path%%.*}", "a/b/c"),
            ("${path#*/}", "b/c.tar.gz"),
        ] {
            assert_eq!(with(word).unwrap(), expected, "{word}");
        }
        for word in ["${x", "'a", "\"a", "${x^y}", "${none:?why}", "${}"] {
            assert!(with(word).is_err(), "{word}");
        }
    }

    #[test]
    fn pairs_are_read_in_both_forms() {
        let read = |text: &str| pairs(text, '\\', &|_| None, "ENV").unwrap();
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(
            read(r#"a=1 b="two words" c=x\ y"#),
            [pair("a", "1"), pair("b", "two words"), pair("c", "x y")]
        );
        assert_eq!(
            read("name the whole rest"),
            [pair("name", "the whole rest")]
        );
        assert!(pairs("a=1 b", '\\', &|_| None, "ENV").is_err());
    }

    #[test]
    fn continued_lines_are_joined_and_comments_between_left_out() {
        assert_eq!(
            join_lines("a && \\\n  # why\n  b \\\n && c\nnext", '\\'),
            "a &&   b  && c"
        );
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[a-z$\\{\\}:\\-+?#%'\"\\\\ =/*\n\\[\\]]{0,40}") {
            fuzz_words(text.as_bytes());
        }
    }
}
