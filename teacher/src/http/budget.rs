//! What a collection may cost and what it has: every request in flight is reserved in full, so that a cap holds
//! whatever comes back.

use super::{Billed, Price};

/// Caps on a whole collection, earlier sessions included.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Caps {
    /// USD.
    pub usd: Option<f64>,
    /// Tokens, of prompts and answers.
    pub tokens: Option<u64>,
    /// Requests, failed ones too.
    pub requests: Option<u64>,
    /// Seconds. What is under way at the end still lands.
    pub seconds: Option<f64>,
}

/// What was spent.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Spent {
    /// USD.
    pub usd: f64,
    /// Tokens, of prompts and answers.
    pub tokens: u64,
    /// Requests, failed ones too.
    pub requests: u64,
    /// Seconds of collecting.
    pub seconds: f64,
}

/// What so many tokens cost, USD; `None` without a price.
#[must_use]
pub fn forecast(price: Option<&Price>, prompt_tokens: u64, completion_tokens: u64) -> Option<f64> {
    price.map(|price| {
        cost(
            Some(price),
            &Billed {
                prompt_tokens,
                completion_tokens,
                ..Billed::default()
            },
        )
    })
}

/// What was billed in USD; 0 without a price.
pub(super) fn cost(price: Option<&Price>, billed: &Billed) -> f64 {
    let Some(price) = price else { return 0.0 };
    let cached = billed.cached_tokens.min(billed.prompt_tokens);
    let fresh = billed.prompt_tokens - cached;
    (fresh as f64 * price.input
        + cached as f64 * price.cached_input.unwrap_or(price.input)
        + billed.completion_tokens as f64 * price.output)
        / 1e6
}
