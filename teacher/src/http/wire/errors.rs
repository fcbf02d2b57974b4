//! Failures: the meaning of error responses and of bodies that cannot be parsed.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::expected::Expected;
use super::json::{UsageOnlyJson, usage};
use super::token::ABOUT_LOGPROBS;
use crate::http::{Failure, FailureReason, TokenUsage};
use crate::reply_json;

/// Longest message that is kept, bytes.
const MAX_MESSAGE_BYTES: usize = 500;

/// Number of bytes that are read of an error response.
const MAX_BODY_BYTES: usize = 1 << 16;

/// The failure of a response with a status other than 2xx. `retry_after` is the header's value: seconds or an HTTP date.
pub(in crate::http) fn failure(status: u16, retry_after: Option<&str>, body: &[u8]) -> Failure {
    let body = body.get(..MAX_BODY_BYTES).unwrap_or(body);
    let value: Option<Value> = reply_json::value(body).ok();
    let error = match &value {
        Some(value) => error_body(value),
        None => ErrorBody {
            message: String::from_utf8_lossy(body).into_owned(),
            code: String::new(),
        },
    };
    Failure {
        reason: reason(status, &error),
        status: Some(status),
        message: printable(&error.message),
        retry_after_seconds: retry_after.and_then(|text| seconds_until(text, SystemTime::now())),
        billed: None,
        is_usage_implausible: false,
    }
}

/// The failure of an error inside a response of status 200 or inside a stream.
pub(super) fn inside(error: &Value) -> Failure {
    let error = error_body(error);
    let status = error.code.parse().unwrap_or(200);
    let reason = match reason(status, &error) {
        // Failures that a retry cannot cure keep their names.
        known @ (FailureReason::OutOfCredit
        | FailureReason::ContextTooLong
        | FailureReason::ContentFilter) => known,
        _ => FailureReason::ErrorInside,
    };
    Failure {
        status: Some(200),
        ..Failure::new(reason, printable(&error.message))
    }
}

struct ErrorBody {
    message: String,
    /// Type and code of the error, in lower case.
    code: String,
}

/// Reads `{"error": {"message", "type", "code"}}`, `{"error": "…"}`, `{"message": …}` and `{"detail": …}`.
fn error_body(value: &Value) -> ErrorBody {
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
    ErrorBody {
        message: text(found.unwrap_or(error)),
        code: codes.join(" ").to_lowercase(),
    }
}

fn reason(status: u16, error: &ErrorBody) -> FailureReason {
    let message = error.message.to_lowercase();
    let has = |words: &[&str]| {
        words
            .iter()
            .any(|word| message.contains(word) || error.code.contains(word))
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

/// Makes a message printable: one line of at most [`MAX_MESSAGE_BYTES`].
pub(super) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len().min(MAX_MESSAGE_BYTES));
    let mut was_space = true;
    for character in text.chars() {
        let is_space = character.is_whitespace() || character.is_control();
        if is_space && was_space {
            continue;
        }
        was_space = is_space;
        let character = if is_space { ' ' } else { character };
        if shown.len() + character.len_utf8() > MAX_MESSAGE_BYTES {
            break;
        }
        shown.push(character);
    }
    shown.truncate(shown.trim_end().len());
    shown
}

/// Parses a `Retry-After` header (RFC 9110, section 10.2.3) to seconds from `now`.
fn seconds_until(text: &str, now: SystemTime) -> Option<f64> {
    let text = text.trim();
    if let Ok(seconds) = text.parse::<f64>() {
        return (seconds.is_finite() && seconds >= 0.0).then_some(seconds);
    }
    let at = unix_seconds(text)?;
    let now = now.duration_since(UNIX_EPOCH).ok()?.as_secs_f64();
    Some((at - now).max(0.0))
}

/// Parses an HTTP date such as `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, section 5.6.7) to seconds since 1970. The two
/// obsolete forms are not supported.
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

/// The failure of a body that cannot be parsed, with the usage if that can be read.
pub(super) fn unreadable(expected: &Expected, body: &[u8], text: &str) -> Failure {
    let failure = if let Some((_, why)) = text.split_once(ABOUT_LOGPROBS) {
        // The lines after the first show the parser's position.
        bad_logprobs(why.lines().next().unwrap_or(why))
    } else if has_bare_nan(body) {
        bad_logprobs("the response contains NaN or Infinity")
    } else {
        let defect = match std::str::from_utf8(body) {
            Ok(_) => "does not have the protocol's form",
            Err(_) => "is not UTF-8",
        };
        Failure {
            status: Some(200),
            ..Failure::new(
                FailureReason::Malformed,
                printable(&format!("the response {defect}: {text}")),
            )
        }
    };
    let usage = usage_of(body);
    let billed = usage.and_then(|usage| expected.believed(usage));
    Failure {
        billed,
        is_usage_implausible: usage.is_some() && billed.is_none(),
        ..failure
    }
}

/// The failure of a response whose log-probabilities are not usable.
pub(super) fn bad_logprobs(why: &str) -> Failure {
    let why = why.replace(ABOUT_LOGPROBS, "");
    Failure {
        status: Some(200),
        ..Failure::new(
            FailureReason::BadLogprobs,
            printable(&format!("{ABOUT_LOGPROBS}{why}")),
        )
    }
}

fn usage_of(body: &[u8]) -> Option<TokenUsage> {
    let json: UsageOnlyJson = reply_json::parse(body).ok()?;
    usage(json.usage.as_ref())
}

/// Whether a JSON text contains NaN or Infinity outside of strings, as Python writes them.
fn has_bare_nan(body: &[u8]) -> bool {
    let mut in_string = false;
    let mut at = 0;
    while let Some(&byte) = body.get(at) {
        match byte {
            b'\\' if in_string => at += 1,
            b'"' => in_string = !in_string,
            b'N' | b'I' if !in_string => {
                let rest = body.get(at..).unwrap_or_default();
                if rest.starts_with(b"NaN") || rest.starts_with(b"Infinity") {
                    return true;
                }
            }
            _ => {}
        }
        at += 1;
    }
    false
}
