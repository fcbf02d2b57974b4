//! Requests.

use potstill_datasets::Completion;

use super::super::{Asking, Call, Failure, Reason};
use super::Body;

pub(super) fn request(
    _asking: &Asking,
    _call: &Call,
    _so_far: Option<&Completion>,
) -> Result<Body, Failure> {
    Err(Failure::new(Reason::BadRequest, "not yet"))
}
