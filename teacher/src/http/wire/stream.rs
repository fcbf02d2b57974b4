//! Replies in pieces.

use potstill_datasets::Completion;

use super::super::{Asking, Billed, Call, Failure, Reason, Reply};

/// A streamed reply, as far as it came.
#[derive(Debug)]
pub(in super::super) struct Stream;

impl Stream {
    /// For the reply to one request.
    pub(in super::super) fn new(_asking: &Asking, _call: &Call) -> Stream {
        Stream
    }

    /// Takes what came, cut anywhere.
    pub(in super::super) fn feed(&mut self, _chunk: &[u8]) -> Result<(), Failure> {
        Ok(())
    }

    /// Whether the server said that this is all.
    pub(in super::super) fn is_done(&self) -> bool {
        false
    }

    /// What the server says it counted, so far.
    pub(in super::super) fn billed(&self) -> Option<Billed> {
        None
    }

    /// The answer as far as it came, to go on from; `None` where nothing came.
    pub(in super::super) fn so_far(&self) -> Option<Completion> {
        None
    }

    /// The reply. [`Reason::Cut`] where the stream ended before it was done.
    pub(in super::super) fn finish(self) -> Result<Reply, Failure> {
        Err(Failure::new(Reason::Cut, "not yet"))
    }
}
