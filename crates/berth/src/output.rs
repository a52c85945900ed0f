//! Standard output: tables for people, JSON, YAML and templates for programs. Colours only on a terminal and
//! without `NO_COLOR`.

use std::fmt;
use std::io::{self, IsTerminal, Write};

use clap::builder::{PossibleValue, TypedValueParser, ValueParserFactory};
use serde::Serialize;
use serde_json::Value;

use crate::failure::Failure;
use crate::template::Template;

/// How answers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Aligned columns for people.
    #[default]
    Table,
    /// One JSON document (one object a line for streams).
    Json,
    /// YAML.
    Yaml,
    /// A Go template, as docker's command line takes it.
    Template(Template),
}

impl Format {
    /// Whether the answer is written as it came, not as rows.
    pub fn is_document(self) -> bool {
        matches!(self, Format::Json | Format::Yaml)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Table => "table",
            Format::Json => "json",
            Format::Yaml => "yaml",
            Format::Template(_) => "template",
        })
    }
}

/// Reads `--format`.
#[derive(Debug, Clone)]
pub struct FormatParser;

impl ValueParserFactory for Format {
    type Parser = FormatParser;

    fn value_parser() -> FormatParser {
        FormatParser
    }
}

impl TypedValueParser for FormatParser {
    type Value = Format;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<Format, clap::Error> {
        let text = value.to_string_lossy();
        let why = match text.as_ref() {
            "table" => return Ok(Format::Table),
            "json" => return Ok(Format::Json),
            "yaml" => return Ok(Format::Yaml),
            template if template.contains("{{") => match Template::parse(template) {
                Ok(template) => return Ok(Format::Template(template)),
                Err(why) => why,
            },
            _ => "table, json, yaml or a template as '{{.Name}}' is wanted".to_owned(),
        };
        let name = argument.map_or_else(|| "--format".to_owned(), ToString::to_string);
        Err(clap::Error::raw(
            clap::error::ErrorKind::ValueValidation,
            format!("invalid value '{text}' for '{name}': {why}\n"),
        )
        .with_cmd(command))
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(
            ["table", "json", "yaml"]
                .into_iter()
                .map(PossibleValue::new),
        ))
    }
}

/// Escape sequences, empty where colours are unwanted.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    pub red: &'static str,
    pub green: &'static str,
    pub yellow: &'static str,
    pub dim: &'static str,
    pub reset: &'static str,
}

const PLAIN: Style = Style {
    red: "",
    green: "",
    yellow: "",
    dim: "",
    reset: "",
};
const COLOURS: Style = Style {
    red: "\x1b[31m",
    green: "\x1b[32m",
    yellow: "\x1b[33m",
    dim: "\x1b[2m",
    reset: "\x1b[0m",
};

fn style(terminal: bool) -> Style {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty())
        || std::env::var_os("TERM").is_some_and(|v| v == "dumb");
    if terminal && !refused { COLOURS } else { PLAIN }
}

/// For what is written to standard output.
pub fn stdout_style() -> Style {
    style(io::stdout().is_terminal())
}

/// For what is written to standard error.
pub fn stderr_style() -> Style {
    style(io::stderr().is_terminal())
}

/// Writes to standard output; a reader that went away ends the program quietly, as a pipe into `head` does.
pub fn print(text: &str) {
    let mut out = io::stdout().lock();
    if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush())
        && error.kind() == io::ErrorKind::BrokenPipe
    {
        std::process::exit(0);
    }
}

/// A line on standard output.
pub fn line(text: impl AsRef<str>) {
    print(&format!("{}\n", text.as_ref()));
}

/// Writes `value` as JSON or YAML, or what a template says of it or, where it is a list, of each of its elements.
pub fn document<T: Serialize>(format: Format, value: &T) -> Result<(), Failure> {
    match format {
        Format::Template(template) => {
            let value = serde_json::to_value(value)
                .map_err(|e| Failure::internal(format!("cannot write JSON: {e}")))?;
            match value {
                Value::Array(items) => items
                    .iter()
                    .try_for_each(|item| template.render(item).map(line))?,
                value => line(template.render(&value)?),
            }
        }
        Format::Yaml => {
            let text = serde_yaml_ng::to_string(value)
                .map_err(|e| Failure::internal(format!("cannot write YAML: {e}")))?;
            print(&quoted(&text));
        }
        Format::Json | Format::Table => {
            let text = serde_json::to_string_pretty(value)
                .map_err(|e| Failure::internal(format!("cannot write JSON: {e}")))?;
            line(text);
        }
    }
    Ok(())
}

/// A document of YAML 1.2 whose words are words to readers of YAML 1.1 too, to whom a plain `no` is false: `restart: "no"`.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    // Lines of a text that are indented by more than this are its own.
    let mut block: Option<usize> = None;
    for line in text.lines() {
        let indent = line.len() - line.trim_start().len();
        if block.is_some_and(|of| indent > of || line.is_empty()) {
            out.push_str(line);
            out.push('\n');
            continue;
        }
        block = None;
        let value = match line.rsplit_once(": ") {
            Some((_, value)) => value,
            None => line.trim_start().trim_start_matches("- "),
        };
        let before = &line[..line.len() - value.len()];
        match value.to_ascii_lowercase().as_str() {
            "no" | "yes" | "on" | "off" | "n" | "y" => {
                out.push_str(&format!("{before}\"{value}\"\n"));
            }
            "|" | "|-" | "|+" | ">" | ">-" | ">+" => {
                block = Some(indent);
                out.push_str(&format!("{line}\n"));
            }
            _ => out.push_str(&format!("{line}\n")),
        }
    }
    out
}

/// A table: a heading and rows of cells.
#[derive(Debug, Default)]
pub struct Table {
    heading: Vec<&'static str>,
    rows: Vec<Vec<String>>,
    /// What each row is of, for templates.
    subjects: Vec<Value>,
}

/// The name by which docker's templates know a column.
fn field(heading: &str) -> String {
    match heading {
        "CONTAINER ID" | "IMAGE ID" | "NETWORK ID" => "ID".to_owned(),
        "CREATED" => "CreatedSince".to_owned(),
        "VOLUME NAME" => "Name".to_owned(),
        "CPU %" => "CPUPerc".to_owned(),
        "MEM %" => "MemPerc".to_owned(),
        "MEM USAGE / LIMIT" => "MemUsage".to_owned(),
        "NET I/O" => "NetIO".to_owned(),
        "BLOCK I/O" => "BlockIO".to_owned(),
        "PIDS" => "PIDs".to_owned(),
        "TOTAL" => "TotalCount".to_owned(),
        words => words
            .split(|c: char| !c.is_ascii_alphanumeric())
            .filter(|word| !word.is_empty())
            .map(|word| format!("{}{}", &word[..1], word[1..].to_ascii_lowercase()))
            .collect(),
    }
}

impl Table {
    pub fn new(heading: &[&'static str]) -> Table {
        Table {
            heading: heading.to_vec(),
            rows: Vec::new(),
            subjects: Vec::new(),
        }
    }

    pub fn row(&mut self, cells: Vec<String>) {
        self.row_of(&Value::Null, cells);
    }

    /// A row that says of `subject` what is worth a column; a template reaches the rest of it too.
    pub fn row_of(&mut self, subject: &Value, cells: Vec<String>) {
        self.subjects.push(subject.clone());
        self.rows.push(cells);
    }

    /// Writes it as a table or by a template, row by row.
    pub fn print(&self, format: Format) -> Result<(), Failure> {
        match format {
            Format::Template(template) => print(&self.by(template)?),
            _ => print(&self.render()),
        }
        Ok(())
    }

    fn by(&self, template: Template) -> Result<String, Failure> {
        let fields: Vec<String> = self.heading.iter().map(|heading| field(heading)).collect();
        let mut lines = Vec::new();
        for (subject, cells) in self.subjects.iter().zip(&self.rows) {
            let mut about = subject.as_object().cloned().unwrap_or_default();
            for (field, cell) in fields.iter().zip(cells) {
                about.insert(field.clone(), Value::String(cell.clone()));
                if field == "CreatedSince" {
                    about.insert("RunningFor".to_owned(), Value::String(cell.clone()));
                }
            }
            // docker's word for them in a row.
            if let Some(Value::Object(labels)) = about.get("Labels") {
                let labels: Vec<String> = labels
                    .iter()
                    .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
                    .collect();
                about.insert("Labels".to_owned(), Value::String(labels.join(",")));
            }
            if template.has_heading() && lines.is_empty() {
                let titles = about
                    .keys()
                    .map(|key| {
                        let title = fields.iter().position(|field| field == key);
                        let title = title.map_or(key.to_uppercase(), |at| self.heading[at].into());
                        (key.clone(), Value::String(title))
                    })
                    .collect();
                lines.push(template.render_heading(&Value::Object(titles))?);
            }
            lines.push(template.render(&Value::Object(about))?);
        }
        if !template.has_heading() {
            return Ok(lines.iter().map(|line| format!("{line}\n")).collect());
        }
        let mut rows = lines
            .iter()
            .map(|line| line.split('\t').map(str::to_owned).collect());
        let heading: Vec<String> = rows.next().unwrap_or_default();
        Ok(aligned(&heading, rows.collect()))
    }

    /// Columns as wide as their widest cell, three spaces apart. Control characters of a cell are
    /// shown as `?`: names come from images and guests.
    pub fn render(&self) -> String {
        let heading: Vec<String> = self.heading.iter().map(|&h| h.to_owned()).collect();
        aligned(&heading, self.rows.clone())
    }
}

fn aligned(heading: &[String], mut rows: Vec<Vec<String>>) -> String {
    let width = |cell: &String| cell.chars().count();
    let mut widths: Vec<usize> = heading.iter().map(width).collect();
    for row in &mut rows {
        for (column, cell) in row.iter_mut().enumerate() {
            *cell = cell
                .chars()
                .map(|c| if c.is_control() { '?' } else { c })
                .collect();
            if column == widths.len() {
                widths.push(0);
            }
            widths[column] = widths[column].max(width(cell));
        }
    }
    let mut text = String::new();
    for row in std::iter::once(heading).chain(rows.iter().map(Vec::as_slice)) {
        let last = row.len().saturating_sub(1);
        for (column, cell) in row.iter().enumerate() {
            text.push_str(cell);
            if column < last {
                let pad = widths[column] + 3 - width(cell);
                text.extend(std::iter::repeat_n(' ', pad));
            }
        }
        text.push('\n');
    }
    text
}

/// `2 hours ago`, `Less than a second ago`, as docker words it. `seconds` since then.
pub fn ago(seconds: i64) -> String {
    format!("{} ago", span(seconds))
}

/// A length of time in one coarse unit.
pub fn span(seconds: i64) -> String {
    let plural = |n: i64, one: &str| {
        if n == 1 {
            format!("1 {one}")
        } else {
            format!("{n} {one}s")
        }
    };
    match seconds {
        i64::MIN..=0 => "Less than a second".to_owned(),
        1..60 => plural(seconds, "second"),
        60..120 => "About a minute".to_owned(),
        120..3600 => plural(seconds / 60, "minute"),
        3600..7200 => "About an hour".to_owned(),
        7200..172_800 => plural(seconds / 3600, "hour"),
        172_800..1_209_600 => plural(seconds / 86_400, "day"),
        1_209_600..5_184_000 => plural(seconds / 604_800, "week"),
        5_184_000..63_072_000 => plural(seconds / 2_592_000, "month"),
        _ => plural(seconds / 31_536_000, "year"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_older_readers_take_for_truth_values_are_quoted() {
        let value = serde_json::json!({
            "restart": "no", "list": ["on", "a- no", true, "x: yes"], "text": "a: no\nb: off\n", "next": "Off", "not": "nobody",
        });
        let text = quoted(&serde_yaml_ng::to_string(&value).unwrap());
        for line in [
            "restart: \"no\"",
            "- \"on\"",
            "next: \"Off\"",
            "not: nobody",
            "- a- no",
            "  a: no",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert_eq!(serde_yaml_ng::from_str::<Value>(&text).unwrap(), value);
    }

    #[test]
    fn columns_line_up_and_control_characters_are_harmless() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(vec!["a\x1b[31mlong".into(), "running".into()]);
        table.row(vec!["b".into(), "exited".into()]);
        assert_eq!(
            table.render(),
            "NAME         STATE\na?[31mlong   running\nb            exited\n"
        );
    }

    #[test]
    fn a_template_sees_the_columns_by_dockers_names_and_the_rest_of_what_a_row_is_of() {
        let mut table = Table::new(&["CONTAINER ID", "NAMES", "CREATED"]);
        let subject =
            serde_json::json!({"State": "running", "Labels": {"a": "b"}, "Names": ["/web"]});
        table.row_of(
            &subject,
            vec!["abc".into(), "web".into(), "2 hours ago".into()],
        );
        let by = |text: &str| table.by(Template::parse(text).unwrap()).unwrap();
        assert_eq!(
            by("{{.ID}} {{.Names}} {{.State}} {{.Labels}}"),
            "abc web running a=b\n"
        );
        assert_eq!(by("{{.RunningFor}}"), "2 hours ago\n");
        assert_eq!(
            by("table {{.ID}}\t{{.Names}}"),
            "CONTAINER ID   NAMES\nabc            web\n"
        );
        assert!(table.by(Template::parse("{{.Nope}}").unwrap()).is_err());
    }

    #[test]
    fn spans_use_one_unit() {
        assert_eq!(span(1), "1 second");
        assert_eq!(span(61), "About a minute");
        assert_eq!(span(3 * 3600), "3 hours");
    }
}
