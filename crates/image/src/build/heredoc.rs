//! Here-documents (Dockerfile reference, "Here-documents"), and what else is put into words the parser reads.

use std::borrow::Cow;

use super::change;
use super::words::{Lookup, expand, split};
use crate::RunConfig;

/// The word that ends a command put into a here-document by [`fold`].
const FOLDED: &str = "BERTH-FOLDED-HERE-DOCUMENT";

/// The word of `ENTRYPOINT []`, which the parser takes only with one.
const NO_WORD: &str = "BERTH-NO-ENTRYPOINT";
/// The brackets with it.
const NO_ENTRYPOINT: &str = "[\"BERTH-NO-ENTRYPOINT\"]";

/// Puts `RUN` commands that have here-documents among their words (`RUN cat <<EOF >/x`) into one here-document each,
/// which is what their shell gets: the parser reads here-documents only where they are the whole command. An entry point
/// without words gets one: [`words_of_entrypoint`].
pub(super) fn fold(text: &str, escape: char) -> Cow<'_, str> {
    let empty = text
        .lines()
        .any(|line| without_words(line, escape).is_some());
    if (!text.contains("<<") && !empty) || text.contains(FOLDED) {
        return Cow::Borrowed(text);
    }
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let mut folded = String::with_capacity(text.len() + 128);
    let mut changed = false;
    let mut at = 0;
    while at < lines.len() {
        let end = logical_end(&lines, at, escape);
        let line = lines[at..end].concat();
        let word = line.trim_start();
        let name = word.split_whitespace().next().unwrap_or_default();
        let takes = ["RUN", "COPY", "ADD"]
            .iter()
            .any(|known| name.eq_ignore_ascii_case(known));
        let delimiters = if takes && !word.starts_with('#') {
            delimiters(&line, escape)
        } else {
            Vec::new()
        };
        let Some(body_end) = bodies_end(&lines, end, &delimiters) else {
            // One that never ends is the parser's to refuse.
            folded.push_str(&line);
            at = end;
            continue;
        };
        let body = lines[end..body_end].concat();
        if name.eq_ignore_ascii_case("RUN") && !delimiters.is_empty() && !is_whole(&line, escape) {
            let (head, command) = after_flags(&line, name.len());
            folded.push_str(head);
            folded.push_str(&format!("<<'{FOLDED}'\n{command}"));
            folded.push_str(&body);
            if !folded.ends_with('\n') {
                folded.push('\n');
            }
            folded.push_str(FOLDED);
            folded.push('\n');
            changed = true;
        } else if let Some(head) = without_words(&line, escape) {
            folded.push_str(head);
            folded.push_str(NO_ENTRYPOINT);
            folded.push('\n');
            changed = true;
        } else {
            folded.push_str(&line);
            folded.push_str(&body);
        }
        at = body_end;
    }
    if changed {
        Cow::Owned(folded)
    } else {
        Cow::Borrowed(text)
    }
}

/// How a folded command is shown: as it was written.
pub(super) fn unfold(shown: &str, script: &str) -> Option<String> {
    let head = shown.strip_suffix(&format!("<<'{FOLDED}'"))?;
    Some(format!(
        "{head}{}",
        script.lines().next().unwrap_or_default()
    ))
}

/// What stands before the brackets of an `ENTRYPOINT []`, also as an `ONBUILD`.
fn without_words(line: &str, escape: char) -> Option<&str> {
    let words = split(line, escape);
    let instruction = words
        .iter()
        .position(|word| !word.eq_ignore_ascii_case("ONBUILD"))?;
    let entrypoint = words[instruction].eq_ignore_ascii_case("ENTRYPOINT");
    (entrypoint && words[instruction + 1..].concat() == "[]")
        .then(|| &line[..line.rfind('[').unwrap_or(line.len())])
}

/// The words of an entry point as they were written before [`fold`].
pub(super) fn words_of_entrypoint(words: Vec<String>) -> Vec<String> {
    match words.as_slice() {
        [word] if word == NO_WORD => Vec::new(),
        _ => words,
    }
}

/// An instruction as it was written before [`fold`] gave its entry point a word.
pub(super) fn written(shown: String) -> String {
    match shown.strip_suffix(NO_ENTRYPOINT) {
        Some(head) => format!("{head}[]"),
        None => shown,
    }
}

/// The line after the one that `start` goes on to.
fn logical_end(lines: &[&str], start: usize, escape: char) -> usize {
    if lines[start].trim_start().starts_with('#') {
        return start + 1;
    }
    let mut end = start;
    while end < lines.len() {
        let line = lines[end].trim();
        end += 1;
        // Comments between continued lines do not end them.
        let comment = end > start + 1 && line.starts_with('#');
        if !comment && !line.ends_with(escape) {
            break;
        }
    }
    end
}

/// The words that end the here-documents a line begins, each with whether tabs before it do not count.
fn delimiters(line: &str, escape: char) -> Vec<(String, bool)> {
    split(line, escape)
        .iter()
        .filter_map(|word| {
            let rest = word
                .trim_start_matches(|c: char| c.is_ascii_digit())
                .strip_prefix("<<")?;
            let (rest, tabs) = match rest.strip_prefix('-') {
                Some(rest) => (rest, true),
                None => (rest, false),
            };
            let name: String = rest.chars().filter(|c| !['"', '\''].contains(c)).collect();
            (!name.is_empty() && !name.contains('<')).then_some((name, tabs))
        })
        .collect()
}

/// The line after the last here-document's end; none where one does not end.
fn bodies_end(lines: &[&str], start: usize, delimiters: &[(String, bool)]) -> Option<usize> {
    let mut at = start;
    for (name, tabs) in delimiters {
        let ends = |line: &&str| {
            let line = line.trim_end_matches(['\n', '\r']);
            let line = if *tabs {
                line.trim_start_matches('\t')
            } else {
                line
            };
            line == name
        };
        at += lines[at..].iter().position(ends)? + 1;
    }
    Some(at)
}

/// Whether the command is one here-document and nothing else.
fn is_whole(line: &str, escape: char) -> bool {
    let words = split(line, escape);
    let mut rest = words
        .iter()
        .skip(1)
        .skip_while(|word| word.starts_with("--"));
    rest.next().is_some_and(|word| word.starts_with("<<")) && rest.next().is_none()
}

/// The instruction's word with its flags, and the command after them.
fn after_flags(line: &str, word: usize) -> (&str, &str) {
    let mut at = line.len() - line.trim_start().len() + word;
    loop {
        let rest = &line[at..];
        let next = at + (rest.len() - rest.trim_start().len());
        if !line[next..].starts_with("--") {
            return line.split_at(next);
        }
        at = next
            + line[next..]
                .find(char::is_whitespace)
                .unwrap_or(line.len() - next);
    }
}

/// A here-document as a command: through the shell, or through the interpreter its first line names.
pub(super) fn script_command(run: &RunConfig, script: &str) -> Vec<String> {
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
pub(super) fn expand_document(text: &str, lookup: Lookup<'_>) -> String {
    text.split_inclusive('\n')
        .map(|line| {
            let quoted = line.replace('"', "\\\"");
            expand(&format!("\"{quoted}\""), '\\', lookup).unwrap_or_else(|_| line.to_owned())
        })
        .collect()
}

/// The word that ends the here-document whose content ends at `end` of the Dockerfile's text: the file's name.
pub(super) fn name_of(text: &str, end: usize) -> &str {
    text.get(end..)
        .and_then(|rest| rest.lines().next())
        .map_or("EOF", |line| line.trim_matches('\t'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_here_documents_among_its_words_is_one_script() {
        let text = "FROM x\nRUN --network=none cat <<EOF >/a && \\\n  cat <<-'B' >/b\n$one\nEOF\n\ttwo\n\tB\nRUN true\n";
        let folded = fold(text, '\\');
        let file = parse_dockerfile::parse(&folded).unwrap();
        assert_eq!(file.instructions.len(), 3);
        let parse_dockerfile::Instruction::Run(run) = &file.instructions[1] else {
            panic!("{folded}");
        };
        assert_eq!(run.options.len(), 1);
        assert_eq!(
            run.here_docs[0].value,
            "cat <<EOF >/a && \\\n  cat <<-'B' >/b\n$one\nEOF\n\ttwo\n\tB\n"
        );
        assert_eq!(
            unfold(
                &format!("RUN --network=none <<'{FOLDED}'"),
                &run.here_docs[0].value
            )
            .unwrap(),
            "RUN --network=none cat <<EOF >/a && \\"
        );
    }

    #[test]
    fn what_the_parser_reads_itself_stays_as_it_is() {
        for text in [
            "FROM x\nRUN <<EOF\nRUN cat <<X >y\nEOF\n",
            "FROM x\nCOPY <<A <<B /c/\nRUN cat <<Z >z\nA\nb\nB\nRUN true\n",
            "FROM x\n# RUN cat <<EOF >x\nRUN echo $((1 << 2)) \"<<EOF x\" <<<word\n",
            "FROM x\nRUN cat <<EOF >never\n",
        ] {
            assert!(matches!(fold(text, '\\'), Cow::Borrowed(_)), "{text}");
        }
    }

    #[test]
    fn an_entry_point_without_words_is_read_and_shown_as_it_was_written() {
        let text = "FROM x\nentrypoint [ ]\nRUN <<E\nENTRYPOINT []\nE\nONBUILD ENTRYPOINT []\n";
        let folded = fold(text, '\\');
        let file = parse_dockerfile::parse(&folded).unwrap();
        let parse_dockerfile::Instruction::Run(run) = &file.instructions[2] else {
            panic!("{folded}");
        };
        assert_eq!(run.here_docs[0].value, "ENTRYPOINT []\n");
        let mut image = RunConfig {
            entrypoint: Some(vec!["/of/the/base".to_owned()]),
            cmd: Some(vec!["word".to_owned()]),
            ..RunConfig::default()
        };
        for instruction in [&file.instructions[1], &file.instructions[3]] {
            assert!(change::apply(&mut image, instruction, &folded, '\\', &|_| None).unwrap());
        }
        assert_eq!(image.entrypoint, Some(Vec::new()));
        assert_eq!(image.cmd, None);
        assert_eq!(image.on_build, ["ENTRYPOINT []"]);
        let own = vec!["NO".to_owned()];
        assert_eq!(words_of_entrypoint(own.clone()), own);
        assert_eq!(
            written(format!("ENTRYPOINT {NO_ENTRYPOINT}")),
            "ENTRYPOINT []"
        );
    }

    #[test]
    fn variables_in_a_document_are_put_in_and_quotes_stay() {
        let lookup = |name: &str| (name == "x").then(|| "1".to_owned());
        assert_eq!(
            expand_document("\"$x\" '${x}' \\$x\n", &lookup),
            "\"1\" '1' $x\n"
        );
    }
}
