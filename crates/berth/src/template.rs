//! `--format '{{.Names}}'`: Go templates (text/template), with the functions docker's command line adds, over the same JSON
//! that `--format json` writes.

use std::collections::BTreeMap;
use std::sync::Arc;

use gotmpl::{MissingKey, TemplateError, Value as Field};
use serde_json::Value;

use crate::failure::Failure;

/// A template whose syntax has been checked. `table …` in front wants a heading and aligned columns.
#[derive(Clone, Copy)]
pub struct Template {
    /// What a command line says lives as long as the program.
    text: &'static str,
    compiled: &'static gotmpl::Template,
    heading: Option<&'static gotmpl::Template>,
}

impl PartialEq for Template {
    fn eq(&self, other: &Template) -> bool {
        (self.text, self.heading.is_some()) == (other.text, other.heading.is_some())
    }
}

impl Eq for Template {}

impl std::fmt::Debug for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Template").field(&self.text).finish()
    }
}

type Function = fn(&[Field]) -> Result<Field, TemplateError>;

/// Docker's own (cli/templates), besides those of Go.
const FUNCTIONS: [(&str, Function); 8] = [
    ("json", json),
    ("lower", lower),
    ("upper", upper),
    ("title", title),
    ("join", join),
    ("split", split),
    ("truncate", truncate),
    ("pad", pad),
];

impl Template {
    /// Checks the syntax. `\t` and `\n` stand for a tab and a new line, as docker reads them.
    ///
    /// # Errors
    /// What is wrong with it, in words for the user.
    pub fn parse(text: &str) -> Result<Template, String> {
        let (heading, text) = match text.strip_prefix("table ") {
            Some(text) => (true, text.trim_start()),
            None => (false, text),
        };
        let text = text.replace("\\t", "\t").replace("\\n", "\n");
        let compiled = compile(&text, |function| function)?;
        // A title is no value: docker's functions leave it as it is.
        let heading = heading.then(|| compile(&text, |_| first)).transpose()?;
        let leak = |template| &*Box::leak(Box::new(template));
        Ok(Template {
            compiled: leak(compiled),
            heading: heading.map(leak),
            text: Box::leak(text.into_boxed_str()),
        })
    }

    /// Whether a heading is wanted.
    pub fn has_heading(&self) -> bool {
        self.heading.is_some()
    }

    /// What it says of `value`.
    pub fn render(&self, value: &Value) -> Result<String, Failure> {
        self.execute(self.compiled, value)
    }

    /// The heading, where `titles` has a title for each field.
    pub fn render_heading(&self, titles: &Value) -> Result<String, Failure> {
        self.execute(self.heading.unwrap_or(self.compiled), titles)
    }

    fn execute(&self, template: &gotmpl::Template, value: &Value) -> Result<String, Failure> {
        template.execute_to_string(&field(value)).map_err(|why| {
            Failure::invalid(format!("--format {:?}: {why}", self.text))
                .with_fix("see the fields there are: --format json")
        })
    }
}

fn compile(text: &str, as_used: fn(Function) -> Function) -> Result<gotmpl::Template, String> {
    FUNCTIONS
        .iter()
        .fold(gotmpl::Template::new(""), |template, &(name, function)| {
            template.func(name, as_used(function))
        })
        .missing_key(MissingKey::Error)
        .parse(text)
        .map_err(|why| why.to_string())
}

fn field(value: &Value) -> Field {
    match value {
        Value::Null => Field::Nil,
        Value::Bool(value) => Field::Bool(*value),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Field::Int(number),
            (None, Some(number)) => Field::Uint(number),
            (None, None) => Field::Float(number.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(text) => Field::String(text.as_str().into()),
        Value::Array(items) => Field::List(items.iter().map(field).collect()),
        Value::Object(map) => Field::Map(Arc::new(
            map.iter()
                .map(|(key, value)| (key.as_str().into(), field(value)))
                .collect::<BTreeMap<_, _>>(),
        )),
    }
}

/// The way back.
fn value(field: &Field) -> Value {
    match field {
        Field::Nil | Field::Function(_) => Value::Null,
        Field::Bool(value) => (*value).into(),
        Field::Int(number) => (*number).into(),
        Field::Uint(number) => (*number).into(),
        Field::Float(number) => (*number).into(),
        Field::String(text) => (&**text).into(),
        Field::List(items) => items.iter().map(value).collect(),
        Field::Map(map) => map
            .iter()
            .map(|(key, field)| (key.to_string(), value(field)))
            .collect(),
    }
}

/// The arguments of `function`, which takes `N`.
fn taken<'a, const N: usize>(
    function: &str,
    arguments: &'a [Field],
) -> Result<&'a [Field; N], TemplateError> {
    arguments.try_into().map_err(|_| TemplateError::ArgCount {
        name: function.to_owned(),
        expected: N,
        got: arguments.len(),
    })
}

fn text(of: &str) -> Field {
    Field::String(of.into())
}

fn length(of: &Field) -> Result<usize, TemplateError> {
    of.as_int()
        .and_then(|number| usize::try_from(number).ok())
        .filter(|&number| number <= MOST_PADDING)
        .ok_or_else(|| TemplateError::Exec(format!("{of} is no length")))
}

/// What no screen is wider than.
const MOST_PADDING: usize = 65_535;

fn first(arguments: &[Field]) -> Result<Field, TemplateError> {
    Ok(arguments.first().cloned().unwrap_or(Field::Nil))
}

fn json(arguments: &[Field]) -> Result<Field, TemplateError> {
    let [of] = taken("json", arguments)?;
    Ok(text(&value(of).to_string()))
}

fn lower(arguments: &[Field]) -> Result<Field, TemplateError> {
    let [of] = taken("lower", arguments)?;
    Ok(text(&of.to_string().to_lowercase()))
}

fn upper(arguments: &[Field]) -> Result<Field, TemplateError> {
    let [of] = taken("upper", arguments)?;
    Ok(text(&of.to_string().to_uppercase()))
}

/// Each word's first letter as a capital, as Go's `strings.Title` has words.
fn title(arguments: &[Field]) -> Result<Field, TemplateError> {
    let [of] = taken("title", arguments)?;
    let mut within = false;
    let mut titled = String::new();
    for letter in of.to_string().chars() {
        if within {
            titled.push(letter);
        } else {
            titled.extend(letter.to_uppercase());
        }
        within = letter.is_alphanumeric() || matches!(letter, '_' | '\'');
    }
    Ok(text(&titled))
}

fn join(arguments: &[Field]) -> Result<Field, TemplateError> {
    let [items, by] = taken("join", arguments)?;
    let Field::List(items) = items else {
        return Err(TemplateError::TypeMismatch {
            expected: "list",
            got: items.type_name(),
        });
    };
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    Ok(text(&items.join(&by.to_string())))
}

fn split(arguments: &[Field]) -> Result<Field, TemplateError> {
    let [of, by] = taken("split", arguments)?;
    let (of, by) = (of.to_string(), by.to_string());
    let parts = if by.is_empty() {
        of.chars().map(|letter| text(&letter.to_string())).collect()
    } else {
        of.split(&by).map(text).collect()
    };
    Ok(Field::List(parts))
}

fn truncate(arguments: &[Field]) -> Result<Field, TemplateError> {
    let [of, most] = taken("truncate", arguments)?;
    let most = length(most)?;
    Ok(text(&of.to_string().chars().take(most).collect::<String>()))
}

/// `pad TEXT BEFORE AFTER`: with so many spaces around it; an empty text stays empty.
fn pad(arguments: &[Field]) -> Result<Field, TemplateError> {
    let [of, before, after] = taken("pad", arguments)?;
    let (before, after) = (length(before)?, length(after)?);
    let of = of.to_string();
    if of.is_empty() {
        return Ok(text(""));
    }
    Ok(text(&format!("{:before$}{of}{:after$}", "", "")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn said(text: &str) -> Result<String, String> {
        let value = json!({"Id": "abcdef", "State": {"Pid": 12, "Running": true}, "Names": ["/a", "/b"],
            "Labels": {"z.y": "w", "a": "b"}, "Nothing": null});
        let template = Template::parse(text)?;
        template
            .render(&value)
            .map_err(|failure| failure.to_string())
    }

    #[test]
    fn fields_ranges_conditions_and_dockers_functions_work() {
        for (text, wanted) in [
            ("{{.Id}} {{.State.Pid}}", "abcdef 12"),
            ("{{range .Names}}{{.}},{{end}}", "/a,/b,"),
            ("{{index .Labels \"z.y\"}}", "w"),
            ("{{if .State.Running}}up{{else}}down{{end}}", "up"),
            ("{{with .Nothing}}x{{else}}none{{end}}", "none"),
            ("{{json .Labels}}", r#"{"a":"b","z.y":"w"}"#),
            ("{{join .Names \" \"}}", "/a /b"),
            ("{{index (split \"a:b\" \":\") 1}}", "b"),
            ("{{upper .Id}}{{title .Id | lower}}", "ABCDEFabcdef"),
            ("{{title \"up two days\"}}", "Up Two Days"),
            ("{{truncate .Id 3}}{{slice .Id 1 2}}", "abcb"),
            ("{{pad .Id 1 2}}|{{pad \"\" 1 2}}|", " abcdef  ||"),
            ("{{len (split .Id \"\")}}", "6"),
            ("{{printf \"%.3s %5d\" .Id .State.Pid}}", "abc    12"),
            (
                "{{range $key, $value := .Labels}}{{$key}}={{$value}} {{end}}",
                "a=b z.y=w ",
            ),
            ("{{if and .State.Running (eq .Id \"abcdef\")}}é{{end}}", "é"),
            ("{{.Id}}\\t{{.Id}}\\n", "abcdef\tabcdef\n"),
        ] {
            assert_eq!(said(text).as_deref(), Ok(wanted), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_without_the_whole_value() {
        let missing = said("{{.State.Nope}}").unwrap_err();
        assert!(missing.contains("no entry for key: Nope"), "{missing}");
        assert!(!missing.contains("Pid"), "{missing}");
        assert!(said("{{.Id").is_err());
        assert!(said("{{nope .Id}}").is_err());
        assert!(said("{{slice .Id 4 99}}").unwrap_err().contains("range"));
        assert!(said("{{join .Id 1}}").is_err());
        assert!(said("{{pad .Id 9999999999 1}}").is_err());
    }

    #[test]
    fn what_would_never_end_is_refused() {
        for text in [
            "{{ ",
            "{{ é",
            "{{.Id ",
            "{{define \"a\"}}{{template \"a\"}}{{end}}{{template \"a\"}}",
            "{{range 4000000000}}{{end}}",
        ] {
            assert!(said(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_heading_is_not_changed_by_functions() {
        let template = Template::parse("table {{json .Id}}\\t{{lower .Id}}").unwrap();
        assert!(template.has_heading());
        let titles = template.render_heading(&json!({"Id": "ID"})).unwrap();
        assert_eq!(titles, "ID\tID");
        let row = template.render(&json!({"Id": "Ab"})).unwrap();
        assert_eq!(row, "\"Ab\"\tab");
    }

    /// Words of the language, and letters it has no use for.
    const PIECES: &str = r#"\{\{-? ?|-?\}\}|\{\{end\}\}|(if|range|with|else|define|template|block|break) |\.(Id|Names|Nope|State)|\$[a-z]? ?(:?=)?|(json|pad|printf|index|slice|split) |"[a-z%é]{0,3}"?|-?[0-9]{1,3}[.e]?|[|() `'/*é]|[a-z]"#;

    proptest::proptest! {
        #[test]
        fn no_template_breaks_the_program(text in proptest::collection::vec(PIECES, 0..20)) {
            let _ = said(&text.concat());
        }
    }
}
