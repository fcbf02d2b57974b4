//! Settings of a collection over HTTP, and their check.

use std::sync::Arc;

use super::transport::EndpointClient;
use super::{
    BudgetSettings, Endpoint, OnBreak, OnLength, Price, RequestSettings, Spending, Timeouts,
};
use crate::Error;

/// Settings of a collection over HTTP.
#[derive(Debug, Clone, PartialEq)]
pub struct ClientSettings {
    /// Settings that all requests share.
    pub request: RequestSettings,
    /// Servers that requests are sent to; at least one.
    pub endpoints: Vec<Endpoint>,
    /// Time limits of a request.
    pub timeouts: Timeouts,
    /// Maximum number of requests for one call before it fails. Requests that found no connection are not counted:
    /// they say nothing about the call, and repeated ones take the endpoint out of use.
    pub attempts: u32,
    /// Upper bound of the first random wait before a retry, seconds. The bound doubles with each attempt.
    pub first_backoff_seconds: f64,
    /// Largest value of that bound, seconds.
    pub max_backoff_seconds: f64,
    /// Largest decoded body of a response, bytes.
    pub max_body_bytes: u64,
    /// Limits of what the collection may spend.
    pub caps: BudgetSettings,
    /// Spending of earlier sessions of this collection. Requests are numbered on from its `requests`.
    pub spent: Spending,
    /// Price of the tokens.
    pub price: Option<Price>,
    /// Treatment of an answer that was cut at the token limit.
    pub on_length: OnLength,
    /// Treatment of a stream that breaks off.
    pub on_break: OnBreak,
    /// Seed of the random waits.
    pub jitter_seed: u64,
    /// Whether no socket may be opened; every collection is then an error.
    pub offline: bool,
}

impl ClientSettings {
    /// Checks the settings and sets up a client for each endpoint. No socket is opened.
    pub(super) fn clients(&self) -> Result<Vec<Arc<EndpointClient>>, Error> {
        if self.offline {
            return Err(Error::Offline);
        }
        let refuse = |why: &str| {
            Err(Error::Collection {
                why: why.to_owned(),
            })
        };
        if self.endpoints.is_empty() {
            return refuse("no endpoint is given\nhint: set `url`, `provider` or `endpoints`");
        }
        if self.attempts == 0 {
            return refuse(
                "`attempts` is 0, so no request would be sent\nhint: set it to 1 or more",
            );
        }
        let waits = [self.first_backoff_seconds, self.max_backoff_seconds];
        if !waits.iter().all(|w| w.is_finite() && *w >= 0.0) {
            return refuse("a backoff time is negative or not a number");
        }
        if self.caps.usd.is_some() && self.price.is_none() {
            return refuse(
                "the budget has a cap in USD, and the price of a token is not known\nhint: set `price`, or cap tokens instead",
            );
        }
        self.endpoints
            .iter()
            .map(|e| EndpointClient::new(e, self.timeouts, self.max_body_bytes).map(Arc::new))
            .collect()
    }
}
