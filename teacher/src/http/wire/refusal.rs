//! Replies that are no answers: what their status, headers and body say.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::http::{Failure, FailureReason};

/// Longest message that is kept, bytes.
const MESSAGE_BYTES: usize = 500;

/// More of a refusal is not read.
const BODY_BYTES: usize = 1 << 16;

/// What a status other than 2xx says. `retry_after` is the header's value: seconds or an HTTP date.
pub(in crate::http) fn failure(status: u16, retry_after: Option<&str>, body: &[u8]) -> Failure {
    let body = body.get(..BODY_BYTES).unwrap_or(body);
    let value: Option<Value> = serde_json::from_slice(body).ok();
    let said = match &value {
        Some(value) => said(value),
        None => Said {
            message: String::from_utf8_lossy(body).into_owned(),
            code: String::new(),
        },
    };
    Failure {
        reason: reason(status, &said),
        status: Some(status),
        message: shown(&said.message),
        retry_after_seconds: retry_after.and_then(|text| seconds_until(text, SystemTime::now())),
        billed: None,
    }
}

/// An error inside of a reply of status 200, or of a stream.
pub(super) fn inside(error: &Value) -> Failure {
    let said = said(error);
    let status = said.code.parse().unwrap_or(200);
    let reason = match reason(status, &said) {
        // What asking again does not help keeps its name.
        known @ (FailureReason::OutOfCredit
        | FailureReason::ContextTooLong
        | FailureReason::ContentFilter) => known,
        _ => FailureReason::ErrorInside,
    };
    Failure {
        status: Some(200),
        ..Failure::new(reason, shown(&said.message))
    }
}

struct Said {
    message: String,
    /// Type and code, in lower case.
    code: String,
}

/// Reads `{"error": {"message", "type", "code"}}`, `{"error": "…"}`, `{"message": …}` and `{"detail": …}`.
fn said(value: &Value) -> Said {
    let error = value.get("error").filter(|error| !error.is_null());
    let error = error.unwrap_or(value);
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let found = ["message", "detail", "msg"]
        .iter()
        .find_map(|key| error.get(key));
    let codes = ["code", "type"].iter().filter_map(|key| error.get(key));
    let codes: Vec<String> = codes.filter(|code| !code.is_null()).map(text).collect();
    Said {
        message: text(found.unwrap_or(error)),
        code: codes.join(" ").to_lowercase(),
    }
}

fn reason(status: u16, said: &Said) -> FailureReason {
    let message = said.message.to_lowercase();
    let has = |words: &[&str]| {
        words
            .iter()
            .any(|word| message.contains(word) || said.code.contains(word))
    };
    let is_credit = || {
        has(&[
            "insufficient_quota",
            "insufficient balance",
            "exceeded your current quota",
            "billing_hard_limit",
            "insufficient credits",
        ])
    };
    let is_context = || {
        has(&[
            "context_length_exceeded",
            "exceed_context_size",
            "maximum context length",
            "context length is",
            "context size",
            "longer than the model's context",
        ])
    };
    let is_filtered = || has(&["content_filter", "content_policy"]);
    match status {
        402 => FailureReason::OutOfCredit,
        _ if is_credit() => FailureReason::OutOfCredit,
        200 | 400 | 413 | 422 | 500 if is_context() => FailureReason::ContextTooLong,
        200 | 400 | 403 if is_filtered() => FailureReason::ContentFilter,
        300..=399 => FailureReason::Redirected,
        401 => FailureReason::Unauthorized,
        403 => FailureReason::Forbidden,
        404 => FailureReason::NotFound,
        408 => FailureReason::RequestTimeout,
        429 => FailureReason::RateLimited,
        409 | 425 | 502 | 503 | 504 | 529 => FailureReason::Overloaded,
        400..=499 => FailureReason::BadRequest,
        _ => FailureReason::ServerError,
    }
}

/// A message as it may be shown: on one line, and short.
pub(super) fn shown(text: &str) -> String {
    let mut shown = String::with_capacity(text.len().min(MESSAGE_BYTES));
    let mut was_space = true;
    for character in text.chars() {
        let is_space = character.is_whitespace() || character.is_control();
        if is_space && was_space {
            continue;
        }
        was_space = is_space;
        let character = if is_space { ' ' } else { character };
        if shown.len() + character.len_utf8() > MESSAGE_BYTES {
            break;
        }
        shown.push(character);
    }
    shown.truncate(shown.trim_end().len());
    shown
}

/// Seconds from `now`, of a `Retry-After` header: RFC 9110, section 10.2.3.
fn seconds_until(text: &str, now: SystemTime) -> Option<f64> {
    let text = text.trim();
    if let Ok(seconds) = text.parse::<f64>() {
        return (seconds.is_finite() && seconds >= 0.0).then_some(seconds);
    }
    let at = unix_seconds(text)?;
    let now = now.duration_since(UNIX_EPOCH).ok()?.as_secs_f64();
    Some((at - now).max(0.0))
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`: RFC 9110, section 5.6.7. The two obsolete forms are not read.
fn unix_seconds(date: &str) -> Option<f64> {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let (_, date) = date.split_once(", ")?;
    let parts: Vec<&str> = date.split_ascii_whitespace().collect();
    let &[day, month, year, clock, "GMT"] = parts.as_slice() else {
        return None;
    };
    let month = MONTHS.iter().position(|&name| name == month)? as i64 + 1;
    let (day, year): (i64, i64) = (day.parse().ok()?, year.parse().ok()?);
    let clock: Vec<i64> = clock
        .split(':')
        .map(|part| part.parse().ok())
        .collect::<Option<_>>()?;
    let &[hour, minute, second] = clock.as_slice() else {
        return None;
    };
    // Days from 1970-01-01 in the Gregorian calendar, with years that begin in March.
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
    Some((days * 86_400 + hour * 3_600 + minute * 60 + second) as f64)
}
