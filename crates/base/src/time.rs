//! Points in time as the container world writes them: RFC 3339 with nanoseconds, in UTC.

/// Now, as `2026-01-02T03:04:05.123456789Z`.
pub fn now_rfc3339() -> String {
    rfc3339(jiff::Timestamp::now())
}

/// `timestamp` with nine digits of a second.
pub fn rfc3339(timestamp: jiff::Timestamp) -> String {
    format!("{timestamp:.9}")
}

/// The point "never", as Docker writes it.
pub const ZERO: &str = "0001-01-01T00:00:00Z";

#[cfg(test)]
mod tests {
    #[test]
    fn a_whole_second_still_has_nine_digits() {
        let t = jiff::Timestamp::from_second(0).unwrap();
        assert_eq!(super::rfc3339(t), "1970-01-01T00:00:00.000000000Z");
    }
}
