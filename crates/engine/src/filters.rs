//! The `filters` parameter of list, prune and events calls.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::error::{Error, Result};

/// Filter names with their values. Values of one name are alternatives, names must all hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filters(BTreeMap<String, Vec<String>>);

#[derive(Deserialize)]
#[serde(untagged)]
enum Values {
    List(Vec<String>),
    // How clients before API 1.22 write it, and the docker CLI still does.
    Set(BTreeMap<String, bool>),
}

impl Filters {
    /// Reads the JSON text of the query parameter; an empty text is no filter.
    ///
    /// # Errors
    /// [`Error::Invalid`] where it is not an object of lists or of sets.
    pub fn parse(text: &str) -> Result<Filters> {
        if text.is_empty() || text == "null" {
            return Ok(Filters::default());
        }
        let map: BTreeMap<String, Values> = serde_json::from_str(text)
            .map_err(|error| Error::Invalid(format!("invalid filter: {error}")))?;
        Ok(Filters(
            map.into_iter()
                .map(|(name, values)| {
                    let values = match values {
                        Values::List(list) => list,
                        Values::Set(set) => set
                            .into_iter()
                            .filter(|(_, on)| *on)
                            .map(|(v, _)| v)
                            .collect(),
                    };
                    (name, values)
                })
                .collect(),
        ))
    }

    /// Adds one value.
    pub fn add(&mut self, name: &str, value: impl Into<String>) {
        self.0
            .entry(name.to_owned())
            .or_default()
            .push(value.into());
    }

    /// Whether there is no filter at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this name is filtered on.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The values of one name; none where it is not filtered on.
    pub fn get(&self, name: &str) -> &[String] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// The names filtered on.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Refuses names outside of `known`.
    ///
    /// # Errors
    /// [`Error::Invalid`] in dockerd's words.
    pub fn only(&self, known: &[&str]) -> Result<()> {
        match self.names().find(|name| !known.contains(name)) {
            Some(name) => Err(Error::Invalid(format!("invalid filter '{name}'"))),
            None => Ok(()),
        }
    }

    /// Whether `value` is one of the values of `name`, or nothing is asked of `name`.
    pub fn exact(&self, name: &str, value: &str) -> bool {
        let values = self.get(name);
        values.is_empty() || values.iter().any(|wanted| wanted == value)
    }

    /// Whether one of the values of `name` satisfies `test`, or nothing is asked of `name`.
    pub fn any(&self, name: &str, test: impl Fn(&str) -> bool) -> bool {
        let values = self.get(name);
        values.is_empty() || values.iter().any(|wanted| test(wanted))
    }

    /// Whether all `key` or `key=value` values of `name` hold for `labels`.
    pub fn labels(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        self.get(name).iter().all(|wanted| holds(wanted, labels))
    }

    /// Whether none of the `label!` values holds for `labels`.
    pub fn not_labels(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        !self.get(name).iter().any(|wanted| holds(wanted, labels))
    }

    /// A filter of one boolean: `true`, `1`, `false`, `0`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for anything else.
    pub fn boolean(&self, name: &str) -> Result<Option<bool>> {
        match self.get(name) {
            [] => Ok(None),
            [value] => match value.as_str() {
                "true" | "1" | "True" | "TRUE" => Ok(Some(true)),
                "false" | "0" | "False" | "FALSE" => Ok(Some(false)),
                _ => Err(Error::Invalid(format!("invalid filter '{name}={value}'"))),
            },
            _ => Err(Error::Invalid(format!(
                "invalid filter '{name}': one value is wanted"
            ))),
        }
    }
}

fn holds(wanted: &str, labels: &BTreeMap<String, String>) -> bool {
    match wanted.split_once('=') {
        Some((key, value)) => labels.get(key).is_some_and(|v| v == value),
        None => labels.contains_key(wanted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_spellings_mean_the_same() {
        let list = Filters::parse(r#"{"label":["a=1","b"]}"#).unwrap();
        let set = Filters::parse(r#"{"label":{"a=1":true,"b":true,"c":false}}"#).unwrap();
        assert_eq!(list, set);
        let labels = BTreeMap::from([("a".into(), "1".into()), ("b".into(), String::new())]);
        assert!(list.labels("label", &labels));
        assert!(list.only(&["name"]).is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,60}") {
            let _ = Filters::parse(&text);
        }
    }
}
