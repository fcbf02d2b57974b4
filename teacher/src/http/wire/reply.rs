//! Whole replies.

use potstill_datasets::Completion;

use super::super::{Asking, Call, Failure, Reason, Reply};

pub(super) fn parse(_asking: &Asking, _call: &Call, _body: &[u8]) -> Result<Reply, Failure> {
    Err(Failure::new(Reason::Malformed, "not yet"))
}

pub(super) fn joined(first: Completion, _rest: Completion) -> Completion {
    first
}
