//! Points in time as the container world writes them: RFC 3339 with nanoseconds, in UTC.

/// Now, as `2026-01-02T03:04:05.123456789Z`.
pub fn now_rfc3339() -> String {
    rfc3339(jiff::Timestamp::now())
}

/// `timestamp` with nine digits of a second.
pub fn rfc3339(timestamp: jiff::Timestamp) -> String {
    format!("{timestamp:.9}")
}

/// Now, as [`rfc3339_nano`] writes it.
pub fn now_rfc3339_nano() -> String {
    rfc3339_nano(jiff::Timestamp::now())
}

/// `timestamp` without the zeros that end its fraction (`time.RFC3339Nano` of Go). Image configurations take this form: tools in
/// Go that read and write one come to the same bytes then, and so to the same digest.
pub fn rfc3339_nano(timestamp: jiff::Timestamp) -> String {
    timestamp.to_string()
}

/// The point "never", as Docker writes it.
pub const ZERO: &str = "0001-01-01T00:00:00Z";

/// The text is no point in time.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "invalid time {0:?}: write RFC 3339, seconds since 1970, or a duration back from now such as 10m"
)]
pub struct InvalidTime(String);

/// A point in time as people and Docker's clients write it: RFC 3339 (without a zone: the local one), a date,
/// seconds since 1970 with up to nine decimals, or a duration back from now (`1h30m`).
///
/// # Errors
/// [`InvalidTime`] for anything else.
pub fn parse_moment(text: &str) -> Result<jiff::Timestamp, InvalidTime> {
    let text = text.trim();
    let wrong = || InvalidTime(text.chars().take(80).collect());
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    if let Ok(seconds) = seconds.parse::<i64>() {
        if fraction.len() > 9 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong());
        }
        let nanoseconds: i32 = format!("{fraction:0<9}").parse().map_err(|_| wrong())?;
        return jiff::Timestamp::new(seconds, nanoseconds).map_err(|_| wrong());
    }
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Ok(time);
    }
    if let Ok(time) = text.parse::<jiff::civil::DateTime>() {
        return jiff::tz::TimeZone::system()
            .to_timestamp(time)
            .map_err(|_| wrong());
    }
    let back = crate::units::parse_duration(text).map_err(|_| wrong())?;
    let back = jiff::SignedDuration::try_from(back).map_err(|_| wrong())?;
    jiff::Timestamp::now()
        .checked_sub(back)
        .map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::parse_moment;
    use proptest::prelude::*;

    #[test]
    fn times_are_read_in_every_form_of_the_clients() {
        assert_eq!(
            parse_moment("10.5").unwrap().as_nanosecond(),
            10_500_000_000
        );
        assert_eq!(
            parse_moment("1970-01-01T00:00:10Z").unwrap().as_second(),
            10
        );
        assert_eq!(
            parse_moment("1970-01-01T02:00:10+02:00")
                .unwrap()
                .as_second(),
            10
        );
        assert!(parse_moment("10m").unwrap() < jiff::Timestamp::now());
        assert!(parse_moment("2024-01-02").is_ok());
        assert!(parse_moment("soon").is_err());
        assert!(parse_moment("").is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,40}") {
            let _ = parse_moment(&text);
        }
    }

    #[test]
    fn the_form_of_go_ends_with_no_zero() {
        for (nanoseconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (500_000_000, "1970-01-01T00:00:00.5Z"),
            (123_456_780, "1970-01-01T00:00:00.12345678Z"),
            (1, "1970-01-01T00:00:00.000000001Z"),
        ] {
            let t = jiff::Timestamp::new(0, nanoseconds).unwrap();
            assert_eq!(super::rfc3339_nano(t), text);
        }
    }

    #[test]
    fn a_whole_second_still_has_nine_digits() {
        let t = jiff::Timestamp::from_second(0).unwrap();
        assert_eq!(super::rfc3339(t), "1970-01-01T00:00:00.000000000Z");
    }
}
