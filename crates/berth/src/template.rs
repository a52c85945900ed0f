//! `--format '{{.Names}}'`: Go templates (text/template), with the functions docker's command line adds, over the same JSON
//! that `--format json` writes.

use std::collections::HashMap;

use gtmpl::{FuncError, Value as Field};
use serde_json::Value;

use crate::failure::Failure;

/// A template whose syntax has been checked. `table …` in front wants a heading and aligned columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Template {
    /// What a command line says lives as long as the program.
    text: &'static str,
    pub heading: bool,
}

type Function = fn(&[Field]) -> Result<Field, FuncError>;

const FUNCTIONS: [(&str, Function); 8] = [
    ("json", json),
    ("lower", lower),
    ("upper", upper),
    ("title", title),
    ("join", join),
    ("split", split),
    ("truncate", truncate),
    ("slice", slice),
];

impl Template {
    /// Checks the syntax. `\t` and `\n` stand for a tab and a new line, as docker reads them.
    ///
    /// # Errors
    /// What is wrong with it, in words for the user.
    pub fn parse(text: &str) -> Result<Template, String> {
        let heading = text.starts_with("table ");
        let text = text.strip_prefix("table ").unwrap_or(text).trim_start();
        let text = text.replace("\\t", "\t").replace("\\n", "\n");
        compiled(&text)?;
        Ok(Template {
            text: Box::leak(text.into_boxed_str()),
            heading,
        })
    }

    /// What it says of `value`.
    pub fn render(&self, value: &Value) -> Result<String, Failure> {
        let template = compiled(self.text).map_err(Failure::invalid)?;
        template
            .render(&gtmpl::Context::from(field(value)))
            .map_err(|error| {
                let error = error.to_string();
                // The library prints the whole value behind the name of the missing field.
                let why = error.split(" for {").next().unwrap_or_default();
                Failure::invalid(format!("--format {:?}: {why}", self.text))
                    .with_fix("see the fields there are: --format json")
            })
    }
}

fn compiled(text: &str) -> Result<gtmpl::Template, String> {
    let mut template = gtmpl::Template::default();
    template.add_funcs(&FUNCTIONS);
    match template.parse(text) {
        Ok(()) => Ok(template),
        Err(error) => Err(error.to_string()),
    }
}

fn field(value: &Value) -> Field {
    match value {
        Value::Null => Field::Nil,
        Value::Bool(value) => Field::Bool(*value),
        Value::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(number), _) => Field::from(number),
            (None, Some(number)) => Field::from(number),
            (None, None) => Field::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(text) => Field::String(text.clone()),
        Value::Array(items) => Field::Array(items.iter().map(field).collect()),
        Value::Object(map) => Field::Object(
            map.iter()
                .map(|(key, value)| (key.clone(), field(value)))
                .collect::<HashMap<_, _>>(),
        ),
    }
}

/// The way back, with keys in order, since a map of the template language has none.
fn value(field: &Field) -> Value {
    match field {
        Field::NoValue | Field::Nil | Field::Function(_) => Value::Null,
        Field::Bool(value) => Value::Bool(*value),
        Field::String(text) => Value::String(text.clone()),
        Field::Array(items) => items.iter().map(value).collect(),
        Field::Object(map) | Field::Map(map) => {
            let mut keys: Vec<&String> = map.keys().collect();
            keys.sort();
            keys.into_iter()
                .map(|key| (key.clone(), value(&map[key])))
                .collect()
        }
        Field::Number(number) => number
            .as_u64()
            .map(Value::from)
            .or_else(|| number.as_i64().map(Value::from))
            .or_else(|| number.as_f64().map(Value::from))
            .unwrap_or(Value::Null),
    }
}

fn wanted(function: &str, arguments: &[Field], count: usize) -> Result<(), FuncError> {
    if arguments.len() == count {
        return Ok(());
    }
    Err(FuncError::ExactlyXArgs(function.to_owned(), count))
}

fn words(of: &Field) -> String {
    match of {
        Field::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn json(arguments: &[Field]) -> Result<Field, FuncError> {
    wanted("json", arguments, 1)?;
    Ok(Field::String(value(&arguments[0]).to_string()))
}

fn lower(arguments: &[Field]) -> Result<Field, FuncError> {
    wanted("lower", arguments, 1)?;
    Ok(Field::String(words(&arguments[0]).to_lowercase()))
}

fn upper(arguments: &[Field]) -> Result<Field, FuncError> {
    wanted("upper", arguments, 1)?;
    Ok(Field::String(words(&arguments[0]).to_uppercase()))
}

fn title(arguments: &[Field]) -> Result<Field, FuncError> {
    wanted("title", arguments, 1)?;
    let text = words(&arguments[0]);
    let mut letters = text.chars();
    let first = letters.next().map(|c| c.to_uppercase().to_string());
    Ok(Field::String(first.unwrap_or_default() + letters.as_str()))
}

fn join(arguments: &[Field]) -> Result<Field, FuncError> {
    wanted("join", arguments, 2)?;
    let Field::Array(items) = &arguments[0] else {
        return Err(FuncError::Generic("join wants a list first".to_owned()));
    };
    let items: Vec<String> = items.iter().map(words).collect();
    Ok(Field::String(items.join(&words(&arguments[1]))))
}

fn split(arguments: &[Field]) -> Result<Field, FuncError> {
    wanted("split", arguments, 2)?;
    let (text, by) = (words(&arguments[0]), words(&arguments[1]));
    Ok(Field::Array(
        text.split(&by)
            .map(|part| Field::String(part.to_owned()))
            .collect(),
    ))
}

fn number(of: &Field) -> Result<usize, FuncError> {
    match of {
        Field::Number(number) => number.as_u64().and_then(|n| usize::try_from(n).ok()),
        _ => None,
    }
    .ok_or_else(|| FuncError::Generic("a length or an index is wanted".to_owned()))
}

fn truncate(arguments: &[Field]) -> Result<Field, FuncError> {
    wanted("truncate", arguments, 2)?;
    let length = number(&arguments[1])?;
    Ok(Field::String(
        words(&arguments[0]).chars().take(length).collect(),
    ))
}

/// Go's `slice TEXT FROM TO`, by characters.
fn slice(arguments: &[Field]) -> Result<Field, FuncError> {
    wanted("slice", arguments, 3)?;
    let (from, to) = (number(&arguments[1])?, number(&arguments[2])?);
    let text = words(&arguments[0]);
    if from > to || to > text.chars().count() {
        return Err(FuncError::Generic(format!(
            "slice {from} to {to} is outside of {text:?}"
        )));
    }
    Ok(Field::String(
        text.chars().skip(from).take(to - from).collect(),
    ))
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
            ("{{truncate .Id 3}}{{slice .Id 1 2}}", "abcb"),
            ("{{.Id}}\\t{{.Id}}\\n", "abcdef\tabcdef\n"),
        ] {
            assert_eq!(said(text).as_deref(), Ok(wanted), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_without_the_whole_value() {
        let missing = said("{{.State.Nope}}").unwrap_err();
        assert!(missing.contains("no field Nope"), "{missing}");
        assert!(!missing.contains("Pid"), "{missing}");
        assert!(said("{{.Id").is_err());
        assert!(said("{{nope .Id}}").is_err());
        assert!(said("{{slice .Id 4 99}}").unwrap_err().contains("outside"));
        assert!(said("{{join .Id 1}}").is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_template_breaks_the_program(text in "[{}a-z.|$:=\" ()0-9-]{0,40}") {
            let _ = said(&text);
        }
    }
}
