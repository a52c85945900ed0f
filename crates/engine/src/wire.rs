//! Reading JSON as tolerantly as dockerd does: a missing or `null` field is the zero value, an
//! unknown one is ignored, and some fields are written in two ways.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

/// `null` reads as the default.
pub(crate) fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// Declares wire structs: PascalCase names, every field optional on input, `null` as absent.
macro_rules! wire {
    ($( $(#[$meta:meta])* pub struct $name:ident {
        $( $(#[$field_meta:meta])* pub $field:ident : $type:ty ),* $(,)?
    } $(flatten { $( $(#[$flat_meta:meta])* pub $flat:ident : $flat_type:ty ),* $(,)? })? )*) => { $(
        $(#[$meta])*
        #[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(rename_all = "PascalCase", default)]
        pub struct $name {
            $( #[serde(deserialize_with = "crate::wire::null_is_default")] $(#[$field_meta])* pub $field: $type, )*
            $($( #[serde(flatten)] $(#[$flat_meta])* pub $flat: $flat_type, )*)?
        }
    )* };
}
pub(crate) use wire;

/// A list of words that may also be written as one string (Go's `strslice.StrSlice`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Words(pub Vec<String>);

impl<'de> Deserialize<'de> for Words {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Words, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Words;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Words, E> {
                Ok(Words(vec![text.to_owned()]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Words, A::Error> {
                let mut words = Vec::new();
                while let Some(word) = list.next_element::<String>()? {
                    words.push(word);
                }
                Ok(Words(words))
            }
            fn visit_unit<E: de::Error>(self) -> Result<Words, E> {
                Ok(Words::default())
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

impl From<Vec<String>> for Words {
    fn from(words: Vec<String>) -> Words {
        Words(words)
    }
}

impl std::ops::Deref for Words {
    type Target = Vec<String>;
    fn deref(&self) -> &Vec<String> {
        &self.0
    }
}

/// A set written as Go's `map[string]struct{}`: `{"80/tcp": {}}`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeySet(pub std::collections::BTreeSet<String>);

impl Serialize for KeySet {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeMap;
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for key in &self.0 {
            map.serialize_entry(key, &BTreeMap::<String, String>::new())?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for KeySet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<KeySet, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = KeySet;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object whose keys are the members")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<KeySet, A::Error> {
                let mut set = KeySet::default();
                while let Some((key, _)) = map.next_entry::<String, de::IgnoredAny>()? {
                    set.0.insert(key);
                }
                Ok(set)
            }
            fn visit_unit<E: de::Error>(self) -> Result<KeySet, E> {
                Ok(KeySet::default())
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

impl FromIterator<String> for KeySet {
    fn from_iter<I: IntoIterator<Item = String>>(keys: I) -> KeySet {
        KeySet(keys.into_iter().collect())
    }
}

impl std::ops::Deref for KeySet {
    type Target = std::collections::BTreeSet<String>;
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    wire! {
        /// A sample.
        pub struct Sample {
            pub command: Option<Words>,
            pub ports: KeySet,
            #[serde(rename = "IPCount")]
            pub ip_count: u32,
        }
    }

    #[test]
    fn null_missing_and_unknown_fields_read_as_dockerd_reads_them() {
        let sample: Sample = serde_json::from_str(
            r#"{"Command":"ls","Ports":{"80/tcp":{},"81/udp":null},"IPCount":null,"Other":[1]}"#,
        )
        .unwrap();
        assert_eq!(sample.command.unwrap().0, ["ls"]);
        assert_eq!(sample.ports.len(), 2);
        assert_eq!(sample.ip_count, 0);
        assert_eq!(
            serde_json::from_str::<Sample>("{}").unwrap(),
            Sample::default()
        );
    }
}
