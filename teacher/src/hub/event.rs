//! Reports of a download to its caller.

use std::ops::ControlFlow;

/// A report of a download.
#[derive(Debug, Clone, PartialEq)]
pub enum FetchEvent {
    /// Bytes of the snapshot that are complete or received.
    Progress {
        /// Bytes so far.
        done: u64,
        /// Bytes of all files of the snapshot.
        total: u64,
        /// Path of the current file in the repository.
        file: String,
    },
    /// A request failed and is repeated after a pause.
    Waiting {
        /// The request.
        what: String,
        /// Reason of the failure.
        why: String,
        /// Length of the pause, seconds.
        seconds: f64,
    },
    /// A remark for people.
    Remark(String),
    /// Nothing happened for a moment; the caller may ask to stop.
    Tick,
}

/// Takes the reports of a download. It asks to stop by [`ControlFlow::Break`].
pub type Observer<'a> = &'a mut dyn FnMut(FetchEvent) -> ControlFlow<()>;
