//! Headers in which a server states its rate limits, and the wait that it asks for.
//!
//! OpenAI and its copies send `x-ratelimit-remaining-requests` and `x-ratelimit-reset-requests` (and the same for
//! `tokens`), Anthropic sends `anthropic-ratelimit-requests-remaining` and `…-reset`. Others send `x-ratelimit-remaining`
//! and `x-ratelimit-reset`, or these without `x-`. Times are durations (`1.5`, `6m0s`, `20ms`), dates, or Unix times.

use std::time::{SystemTime, UNIX_EPOCH};

/// Unix times begin here; smaller numbers are seconds from now.
const FIRST_UNIX_TIME: f64 = 1e9;

/// The state of the rate limits, as a server reports it with a response.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(in crate::http) struct RateState {
    /// Time after which the server accepts a retry, seconds (`Retry-After`).
    pub(in crate::http) retry_after_seconds: Option<f64>,
    /// Number of requests that the server still accepts before `reset_seconds`.
    pub(in crate::http) remaining_requests: Option<u64>,
    /// Time until the limit that is closest to its end is reset, seconds.
    pub(in crate::http) reset_seconds: Option<f64>,
}

/// Reads the state of the rate limits from the headers of a response.
pub(in crate::http) fn rate_state(header: impl Fn(&str) -> Option<String>) -> RateState {
    let now = SystemTime::now();
    let limit = |kind: &str| {
        let names = |what: &str| match kind {
            "" => vec![format!("x-ratelimit-{what}"), format!("ratelimit-{what}")],
            kind => vec![
                format!("x-ratelimit-{what}-{kind}"),
                format!("anthropic-ratelimit-{kind}-{what}"),
            ],
        };
        let first = |what: &str| names(what).iter().find_map(|name| header(name));
        let remaining: Option<u64> = first("remaining")?.trim().parse().ok();
        let reset = first("reset").and_then(|text| seconds_until(&text, now));
        Some((remaining?, reset))
    };
    let requests = limit("requests").or_else(|| limit(""));
    // Without tokens that remain, no request is accepted.
    let tokens = limit("tokens").filter(|(remaining, _)| *remaining == 0);
    let closest = tokens.or(requests);
    RateState {
        retry_after_seconds: header("retry-after").and_then(|text| seconds_until(&text, now)),
        remaining_requests: closest.map(|(remaining, _)| remaining),
        reset_seconds: closest.and_then(|(_, reset)| reset),
    }
}

/// Parses a wait to seconds from `now`: a number, a duration such as `6m0s`, an HTTP date (RFC 9110, section 10.2.3), an
/// ISO 8601 date, or a Unix time. `None` for anything else, and for waits below 0.
pub(super) fn seconds_until(text: &str, now: SystemTime) -> Option<f64> {
    let text = text.trim();
    let now = now.duration_since(UNIX_EPOCH).ok()?.as_secs_f64();
    if let Ok(seconds) = text.parse::<f64>() {
        let is_wait = seconds.is_finite() && seconds >= 0.0;
        let is_time = (FIRST_UNIX_TIME..now + 1e9).contains(&seconds);
        let seconds = if is_time {
            (seconds - now).max(0.0)
        } else {
            seconds
        };
        return is_wait.then_some(seconds);
    }
    if let Some(seconds) = duration(text) {
        return Some(seconds);
    }
    let at = http_date(text).or_else(|| iso_date(text))?;
    Some((at - now).max(0.0))
}

/// Parses durations of numbers with units, such as `1h2m3.5s` or `20ms`.
fn duration(text: &str) -> Option<f64> {
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at(digits);
        let unit = after.find(|c: char| !c.is_ascii_alphabetic());
        let (unit, after) = after.split_at(unit.unwrap_or(after.len()));
        let scale = match unit {
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => return None,
        };
        seconds += number.parse::<f64>().ok()? * scale;
        rest = after;
    }
    (!text.is_empty() && seconds.is_finite()).then_some(seconds)
}

/// Parses an HTTP date such as `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, section 5.6.7) to seconds since 1970. The two
/// obsolete forms are not supported.
fn http_date(date: &str) -> Option<f64> {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let (_, date) = date.split_once(", ")?;
    let parts: Vec<&str> = date.split_ascii_whitespace().collect();
    let &[day, month, year, clock, "GMT"] = parts.as_slice() else {
        return None;
    };
    let month = MONTHS.iter().position(|&name| name == month)? as i64 + 1;
    let seconds = clock_seconds(clock)?;
    Some(day_seconds(number(year, 4)?, month, number(day, 2)?) + seconds)
}

/// Parses a date such as `2026-01-27T12:00:05Z` (RFC 3339 in UTC) to seconds since 1970.
fn iso_date(date: &str) -> Option<f64> {
    let (day, clock) = date.split_once('T')?;
    let parts: Vec<&str> = day.split('-').collect();
    let &[year, month, day] = parts.as_slice() else {
        return None;
    };
    let clock = clock.strip_suffix('Z').or(clock.strip_suffix("+00:00"))?;
    let month = number(month, 2).filter(|month| (1..=12).contains(month))?;
    Some(day_seconds(number(year, 4)?, month, number(day, 2)?) + clock_seconds(clock)?)
}

/// A number of at most `digits` digits.
fn number(text: &str, digits: usize) -> Option<i64> {
    let is_number = text.len() <= digits && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| is_number)
}

/// Seconds of a day until a time such as `08:49:37.5`.
fn clock_seconds(clock: &str) -> Option<f64> {
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, "0"));
    let fraction: f64 = format!("0.{fraction}").parse().ok()?;
    let parts: Option<Vec<i64>> = clock.split(':').map(|part| number(part, 2)).collect();
    let &[hour, minute, second] = parts?.as_slice() else {
        return None;
    };
    #[expect(clippy::cast_precision_loss, reason = "of two digits each")]
    Some((hour * 3_600 + minute * 60 + second) as f64 + fraction)
}

/// Seconds from 1970-01-01 to the beginning of a day of the Gregorian calendar.
fn day_seconds(year: i64, month: i64, day: i64) -> f64 {
    // Years begin in March here.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * year + year.div_euclid(4) - year.div_euclid(100)
        + year.div_euclid(400)
        + (153 * month + 2) / 5
        + day
        - 719_469;
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let seconds = (days * 86_400) as f64;
    seconds
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn waits_of_every_form_are_read_and_garbage_is_not() {
        // date -u -d @1700000000: Tue Nov 14 22:13:20 UTC 2023
        let now = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let seconds = |text: &str| seconds_until(text, now);
        for (text, wait) in [
            ("0", 0.0),
            (" 1.5 ", 1.5),
            ("99999999999", 99_999_999_999.0),
            ("6m0s", 360.0),
            ("1h2m3.5s", 3723.5),
            ("20ms", 0.02),
            ("1700000060", 60.0),
            ("Tue, 14 Nov 2023 22:14:20 GMT", 60.0),
            ("2023-11-14T22:14:20Z", 60.0),
            ("2023-11-14T22:14:20.250Z", 60.25),
            ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),
        ] {
            let read = seconds(text).unwrap();
            assert!((read - wait).abs() < 1e-3, "{text}: {read}");
        }
        assert!(seconds("Fri, 31 Dec 9999 23:59:59 GMT").unwrap() > 2e11);
        for garbage in [
            "",
            "-1",
            "soon",
            "inf",
            "1e999",
            "NaN",
            "5x",
            "s",
            "..s",
            "Fri, 31 Dec 9223372036854775807 23:59:59 GMT",
            "Fri, 31 Dec 2100 9223372036854775807:59:59 GMT",
            "2023-13-14T22:14:20Z",
            "2023-11-14T22:14:20.xZ",
            "T",
            "1m-5s",
        ] {
            assert_eq!(seconds(garbage), None, "{garbage}");
        }
    }

    #[test]
    fn the_closest_limit_is_read_from_the_headers() {
        let state = |headers: &[(&str, &str)]| {
            rate_state(|name| {
                let found = headers.iter().find(|(header, _)| *header == name);
                found.map(|(_, value)| (*value).to_owned())
            })
        };
        let openai = state(&[
            ("x-ratelimit-remaining-requests", "59"),
            ("x-ratelimit-reset-requests", "1s"),
            ("x-ratelimit-remaining-tokens", "149984"),
            ("x-ratelimit-reset-tokens", "6m0s"),
        ]);
        assert_eq!(
            (openai.remaining_requests, openai.reset_seconds),
            (Some(59), Some(1.0))
        );
        let tokens = state(&[
            ("anthropic-ratelimit-requests-remaining", "59"),
            ("anthropic-ratelimit-tokens-remaining", "0"),
            ("anthropic-ratelimit-tokens-reset", "30s"),
        ]);
        assert_eq!(
            (tokens.remaining_requests, tokens.reset_seconds),
            (Some(0), Some(30.0))
        );
        let other = state(&[("x-ratelimit-remaining", "3"), ("retry-after", "7")]);
        assert_eq!(other.remaining_requests, Some(3));
        assert_eq!(other.retry_after_seconds, Some(7.0));
        assert_eq!(
            state(&[("x-ratelimit-remaining", "-3")]),
            RateState::default()
        );
    }
}
