//! Standard output: tables for people, JSON and YAML for programs. Colours only on a terminal and
//! without `NO_COLOR`.

use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use serde::Serialize;

use crate::failure::Failure;

/// How answers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// Aligned columns for people.
    #[default]
    Table,
    /// One JSON document (one object a line for streams).
    Json,
    /// YAML.
    Yaml,
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

/// Writes `value` as JSON or YAML.
pub fn document<T: Serialize>(format: Format, value: &T) -> Result<(), Failure> {
    match format {
        Format::Yaml => {
            let text = serde_yaml_ng::to_string(value)
                .map_err(|e| Failure::internal(format!("cannot write YAML: {e}")))?;
            print(&text);
        }
        Format::Json | Format::Table => {
            let text = serde_json::to_string_pretty(value)
                .map_err(|e| Failure::internal(format!("cannot write JSON: {e}")))?;
            line(text);
        }
    }
    Ok(())
}

/// A table: a heading and rows of cells.
#[derive(Debug, Default)]
pub struct Table {
    heading: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(heading: &[&'static str]) -> Table {
        Table {
            heading: heading.to_vec(),
            rows: Vec::new(),
        }
    }

    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// Columns as wide as their widest cell, three spaces apart. Control characters of a cell are
    /// shown as `?`: names come from images and guests.
    pub fn render(&self) -> String {
        let clean = |cell: &str| -> String {
            cell.chars()
                .map(|c| if c.is_control() { '?' } else { c })
                .collect()
        };
        let rows: Vec<Vec<String>> = self
            .rows
            .iter()
            .map(|row| row.iter().map(|cell| clean(cell)).collect())
            .collect();
        let mut widths: Vec<usize> = self.heading.iter().map(|h| h.chars().count()).collect();
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        let heading: Vec<String> = self.heading.iter().map(|&h| h.to_owned()).collect();
        for row in std::iter::once(&heading).chain(&rows) {
            let last = row.len().saturating_sub(1);
            for (column, cell) in row.iter().enumerate() {
                text.push_str(cell);
                if column < last {
                    let pad = widths[column] + 3 - cell.chars().count();
                    text.extend(std::iter::repeat_n(' ', pad));
                }
            }
            text.push('\n');
        }
        text
    }
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
    fn spans_use_one_unit() {
        assert_eq!(span(1), "1 second");
        assert_eq!(span(61), "About a minute");
        assert_eq!(span(3 * 3600), "3 hours");
    }
}
