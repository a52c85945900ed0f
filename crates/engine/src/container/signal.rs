//! Signals by name and number.

use crate::error::{Error, Result};

const NAMES: [(&str, i32); 34] = [
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("ILL", libc::SIGILL),
    ("TRAP", libc::SIGTRAP),
    ("ABRT", libc::SIGABRT),
    ("IOT", libc::SIGIOT),
    ("BUS", libc::SIGBUS),
    ("FPE", libc::SIGFPE),
    ("KILL", libc::SIGKILL),
    ("USR1", libc::SIGUSR1),
    ("SEGV", libc::SIGSEGV),
    ("USR2", libc::SIGUSR2),
    ("PIPE", libc::SIGPIPE),
    ("ALRM", libc::SIGALRM),
    ("TERM", libc::SIGTERM),
    ("STKFLT", libc::SIGSTKFLT),
    ("CHLD", libc::SIGCHLD),
    ("CLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("STOP", libc::SIGSTOP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
    ("VTALRM", libc::SIGVTALRM),
    ("PROF", libc::SIGPROF),
    ("WINCH", libc::SIGWINCH),
    ("IO", libc::SIGIO),
    ("POLL", libc::SIGPOLL),
    ("PWR", libc::SIGPWR),
    ("SYS", libc::SIGSYS),
];

/// The number of `KILL`, `SIGKILL`, `9`, `RTMIN+3`.
///
/// # Errors
/// [`Error::Invalid`] for anything else.
pub(crate) fn number(text: &str) -> Result<i32> {
    let wrong = || Error::Invalid(format!("invalid signal: {text}"));
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=64).contains(&number) {
            Ok(number)
        } else {
            Err(wrong())
        };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Ok(*number);
    }
    let real_time = |rest: &str, base: i32, sign: i32| -> Option<i32> {
        let offset = if rest.is_empty() {
            0
        } else {
            rest[1..].parse().ok()?
        };
        let number = base + sign * offset;
        (libc::SIGRTMIN()..=libc::SIGRTMAX())
            .contains(&number)
            .then_some(number)
    };
    match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) if rest.is_empty() || rest.starts_with('+') => {
            real_time(rest, libc::SIGRTMIN(), 1)
        }
        (_, Some(rest)) if rest.is_empty() || rest.starts_with('-') => {
            real_time(rest, libc::SIGRTMAX(), -1)
        }
        _ => None,
    }
    .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn signals_are_read_by_name_and_number() {
        for text in ["KILL", "sigkill", "9"] {
            assert_eq!(number(text).unwrap(), 9);
        }
        assert_eq!(number("RTMIN+3").unwrap(), libc::SIGRTMIN() + 3);
        for wrong in ["", "0", "65", "SIGNOPE", "RTMIN+99", "-9"] {
            assert!(number(wrong).is_err(), "{wrong}");
        }
    }
}
