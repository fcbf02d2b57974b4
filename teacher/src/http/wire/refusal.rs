//! Replies that are no answers.

use super::super::{Failure, Reason};

/// What a status other than 2xx says. `retry_after` is the header's value: seconds or an HTTP date.
pub(in super::super) fn failure(status: u16, _retry_after: Option<&str>, _body: &[u8]) -> Failure {
    Failure {
        status: Some(status),
        ..Failure::new(Reason::ServerError, "")
    }
}
