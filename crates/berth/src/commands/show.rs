//! Small readings of the API's JSON for tables.

use serde_json::Value;

/// Text at a JSON pointer; empty where there is none.
pub fn text(value: &Value, pointer: &str) -> String {
    match value.pointer(pointer) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    }
}

/// Twelve digits of an id, without its algorithm.
pub fn short(id: &str) -> String {
    id.strip_prefix("sha256:")
        .unwrap_or(id)
        .chars()
        .take(12)
        .collect()
}

/// Shortens to `width` characters with an ellipsis.
pub fn clip(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let mut out: String = text.chars().take(width - 1).collect();
    out.push('…');
    out
}

/// `2 hours ago` for seconds since 1970.
pub fn since(seconds: i64) -> String {
    if seconds <= 0 {
        return "N/A".to_owned();
    }
    crate::output::ago(jiff::Timestamp::now().as_second() - seconds)
}

/// Seconds since 1970 of an RFC 3339 text; 0 where it is none.
pub fn seconds(text: &str) -> i64 {
    text.parse::<jiff::Timestamp>().map_or(0, |t| t.as_second())
}

/// The array at a key; empty where there is none.
pub fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

/// `-f key=value` options as the API's filter parameter.
pub fn filters(specs: &[String]) -> Result<Option<String>, crate::failure::Failure> {
    let mut map: std::collections::BTreeMap<&str, Vec<&str>> = std::collections::BTreeMap::new();
    for spec in specs {
        let (key, value) = spec.split_once('=').ok_or_else(|| {
            crate::failure::Failure::invalid(format!("--filter {spec:?}: KEY=VALUE is wanted"))
        })?;
        map.entry(key).or_default().push(value);
    }
    if map.is_empty() {
        return Ok(None);
    }
    serde_json::to_string(&map)
        .map(Some)
        .map_err(|e| crate::failure::Failure::internal(format!("cannot write the filter: {e}")))
}

/// A point in time as the API takes it: seconds since 1970 from an RFC 3339 text, a number, or a
/// duration back from now (`10m`).
pub fn point(text: &str) -> Result<String, crate::failure::Failure> {
    if text.parse::<f64>().is_ok() {
        return Ok(text.to_owned());
    }
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Ok(format!(
            "{}.{:09}",
            time.as_second(),
            time.subsec_nanosecond()
        ));
    }
    let back = base::units::parse_duration(text).map_err(|_| {
        crate::failure::Failure::invalid(format!(
            "{text:?} is no point in time: write 10m, 2026-01-02T03:04:05Z or seconds since 1970"
        ))
    })?;
    Ok((jiff::Timestamp::now().as_second() - back.as_secs() as i64).to_string())
}
