//! Sizes and durations as people write them.

use std::time::Duration;

/// The text is not a size or a duration.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UnitError {
    #[error(
        "{0:?} is not a size: write a number with b, k, m, g, t or KiB, MiB, GiB, TiB, as in 512m or 20G"
    )]
    Size(String),
    #[error("{0:?} is not a duration: write numbers with ns, us, ms, s, m, h or d, as in 1m30s")]
    Duration(String),
}

/// Bytes from `512m`, `20G`, `1.5GiB`, `1048576`. Units are binary, as Docker and QEMU read them.
///
/// # Errors
/// [`UnitError::Size`] for anything else, for negative numbers, and past 2^63 - 1.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let wrong = || UnitError::Size(text.to_owned());
    let trimmed = text.trim();
    let split = trimmed
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "p" | "pb" | "pib" => 50,
        _ => return Err(wrong()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        let bytes = whole.checked_mul(1 << shift).ok_or_else(wrong)?;
        return if bytes <= i64::MAX as u64 {
            Ok(bytes)
        } else {
            Err(wrong())
        };
    }
    let value: f64 = number.parse().map_err(|_| wrong())?;
    let bytes = value * (1u64 << shift) as f64;
    if bytes.is_finite() && bytes < i64::MAX as f64 {
        Ok(bytes as u64)
    } else {
        Err(wrong())
    }
}

/// `1.5GiB`, `512MiB`, `17B`: binary units, at most four significant digits.
pub fn format_size(bytes: u64) -> String {
    scaled(
        bytes,
        1024.0,
        &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"],
    )
}

/// `1.5GB`, `512MB`, `17B`: decimal units, as `docker images` shows sizes.
pub fn format_size_decimal(bytes: u64) -> String {
    scaled(bytes, 1000.0, &["B", "kB", "MB", "GB", "TB", "PB", "EB"])
}

fn scaled(bytes: u64, base: f64, units: &[&str]) -> String {
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= base && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 1000.0 {
        0
    } else if value >= 100.0 {
        1
    } else {
        2
    };
    let text = format!("{value:.digits$}");
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    format!("{text}{}", units[unit])
}

/// A duration from `1m30s`, `500ms`, `2h`, `1d`, or bare seconds.
///
/// # Errors
/// [`UnitError::Duration`] for anything else.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let wrong = || UnitError::Duration(text.to_owned());
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(wrong());
    }
    if let Ok(seconds) = rest.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).map_err(|_| wrong());
    }
    let mut total = 0f64;
    while !rest.is_empty() {
        let split = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(wrong)?;
        let value: f64 = rest[..split].parse().map_err(|_| wrong())?;
        rest = &rest[split..];
        let end = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        total += value
            * match &rest[..end] {
                "ns" => 1e-9,
                "us" | "µs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                "d" => 86400.0,
                _ => return Err(wrong()),
            };
        rest = &rest[end..];
    }
    Duration::try_from_secs_f64(total).map_err(|_| wrong())
}

/// Fuzz entry: sizes, durations and moments as users write them.
pub fn fuzz_words(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let _ = parse_size(&text);
    let _ = parse_duration(&text);
    let _ = crate::time::parse_moment(&text);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_read_as_docker_reads_them() {
        assert_eq!(parse_size("512m"), Ok(512 << 20));
        assert_eq!(parse_size("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_size("20G"), Ok(20 << 30));
        assert!(parse_size("-1").is_err());
        assert!(parse_size("16000000T").is_err());
        assert!(parse_size("ten").is_err());
    }

    #[test]
    fn durations_add_up() {
        assert_eq!(parse_duration("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert!(parse_duration("5 minutes").is_err());
        assert!(parse_duration("").is_err());
    }

    #[test]
    fn sizes_are_shown_short() {
        assert_eq!(format_size(3 << 29), "1.5GiB");
        assert_eq!(format_size_decimal(118_000_000), "118MB");
        assert_eq!(format_size(0), "0B");
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,40}") {
            let _ = parse_size(&text);
            let _ = parse_duration(&text);
        }
    }
}
