//! Data that the two threads of a collection exchange, and events that the caller receives.

use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::http::settings::ClientSettings;
use crate::http::{
    Attempt, Call, ChargeBasis, Failure, FailureReason, Response, Spending, TokenUsage,
};

/// A request that is about to be sent, with the most that it can cost: a line of the ledger.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reservation {
    /// Number of the request, unique in a collection.
    pub request: u64,
    /// Id of the prompt.
    pub prompt_id: String,
    /// Index of the sample among those of its prompt.
    pub sample_index: u32,
    /// Number of the attempt at this call, from 1.
    pub attempt: u32,
    /// Name of the endpoint.
    pub endpoint: String,
    /// Time of sending, milliseconds since 1970.
    pub sent_unix_ms: u64,
    /// The most tokens that the request can be billed for.
    pub reserved: TokenUsage,
    /// The most that the request can cost, USD; 0 without a price.
    pub reserved_usd: f64,
}

impl Reservation {
    /// The ledger's line for a request whose end is not known, because the process died while the request was in
    /// flight: the whole reservation is charged.
    #[must_use]
    pub fn charged_in_full(self) -> Attempt {
        Attempt {
            request: self.request,
            prompt_id: self.prompt_id,
            sample_index: self.sample_index,
            attempt: self.attempt,
            endpoint: self.endpoint,
            sent_unix_ms: self.sent_unix_ms,
            seconds: 0.0,
            status: None,
            bytes: 0,
            failed: Some(FailureReason::Cut),
            billed: self.reserved,
            usd: self.reserved_usd,
            charge: ChargeBasis::Reserved,
        }
    }
}

/// A call that needs no further request.
#[derive(Debug, Clone, PartialEq)]
pub struct CompletedCall {
    /// The call.
    pub call: Call,
    /// Number of requests that were sent for it.
    pub attempts: u32,
    /// The response, or why there is none.
    pub result: Result<Response, Failure>,
}

/// An event that a collection hands to its caller.
#[derive(Debug, Clone, PartialEq)]
pub enum CallEvent {
    /// A request has ended.
    Attempt(Attempt),
    /// A call is completed; its attempts were reported before.
    Completed(Box<CompletedCall>),
}

/// Progress of a collection.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct CollectProgress {
    /// Calls of this session that were answered.
    pub answered: u64,
    /// Calls of this session that failed.
    pub failed: u64,
    /// Requests in flight.
    pub in_flight: u64,
    /// Calls that wait for the concurrency limit, a rate limit or a retry.
    pub waiting: u64,
    /// Spending, earlier sessions included.
    pub spent: Spending,
    /// Sum of the reservations of the requests in flight, USD.
    pub reserved_usd: f64,
    /// Tokens of the answers of this session.
    pub tokens: u64,
    /// Sum of the endpoints' present concurrency limits.
    pub concurrency: u32,
    /// Time for which nothing is sent because the servers ask for that, seconds; `None` if an endpoint may be asked.
    pub server_wait_seconds: Option<f64>,
    /// Number of replies whose token counts cannot be right, such as −5. They are charged in full.
    pub implausible_usages: u64,
}

/// Why a collection ended.
#[derive(Debug, Clone, PartialEq)]
pub enum CollectionEnd {
    /// Every call is completed.
    Finished,
    /// The caller asked to stop; the requests that were in flight are completed.
    Stopped,
    /// The next request could pass a cap of the budget.
    CapReached {
        /// The cap, with its value and unit.
        cap: String,
    },
    /// The caller's event handler ended the collection.
    StoppedByCaller {
        /// The reason that the handler gave.
        why: String,
    },
    /// No endpoint is available: all have failed.
    EndpointsDown {
        /// The last failure of one of them.
        last: Failure,
    },
}

pub use crate::error::CallbackError;

/// A message from the caller's thread to the dispatcher.
pub(super) enum Order {
    /// Complete these calls.
    Calls(Vec<Call>),
    /// No more calls will come.
    NoMore,
    /// Send nothing new.
    Stop,
}

/// State that the dispatcher publishes for the caller's thread.
pub(super) struct SharedState {
    /// Number of calls that may be open at a time: in flight, or waiting in the dispatcher.
    pub(super) capacity: AtomicU64,
    progress: Mutex<CollectProgress>,
}

impl SharedState {
    pub(super) fn new(settings: &ClientSettings) -> SharedState {
        let limits = settings.endpoints.iter().map(|e| e.in_flight_limit());
        SharedState {
            capacity: AtomicU64::new(limits.map(u64::from).sum::<u64>() * 2),
            progress: Mutex::new(CollectProgress {
                spent: settings.spent,
                ..CollectProgress::default()
            }),
        }
    }

    pub(super) fn progress(&self) -> MutexGuard<'_, CollectProgress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
