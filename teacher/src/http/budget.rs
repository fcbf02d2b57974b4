//! The budget of a collection. The most that a request can cost is reserved while the request is in flight, so that no
//! cap is passed whatever the server answers.

use std::time::Instant;

use potstill_datasets::range::{Amount, Optional, Positive};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Call, CallTask, Price, RequestSettings, TokenUsage};

/// `[budget]`: limits on what a teacher behind a server may cost. All requests that the run directory's `requests.jsonl`
/// lists count. A request in flight counts with the most that it can cost.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BudgetSettings {
    /// Largest cost, USD.
    #[serde(with = "Optional::<Positive>")]
    pub usd: Option<f64>,
    /// Largest number of tokens, of prompts and answers together.
    #[serde(with = "Optional::<Amount>")]
    pub tokens: Option<u64>,
    /// Largest number of requests, failed ones included.
    #[serde(with = "Optional::<Amount>")]
    pub requests: Option<u64>,
    /// Largest size on disk of unpublished answers and of the list of requests, bytes.
    #[serde(with = "Optional::<Amount>")]
    pub disk_bytes: Option<u64>,
    /// Longest time of collecting, hours. Requests in flight at the end are still completed.
    #[serde(with = "Optional::<Positive>")]
    pub hours: Option<f64>,
}

impl BudgetSettings {
    /// Whether nothing is limited.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == BudgetSettings::default()
    }
}

/// Spending of a collection.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Spending {
    /// Cost, USD.
    pub usd: f64,
    /// Tokens of prompts and answers.
    pub tokens: u64,
    /// Requests, failed ones included.
    pub requests: u64,
    /// Time of collecting, seconds.
    pub seconds: f64,
}

/// Computes the cost of a number of tokens, USD; `None` without a price.
#[must_use]
pub fn forecast_usd(
    price: Option<&Price>,
    prompt_tokens: u64,
    completion_tokens: u64,
) -> Option<f64> {
    price.map(|price| {
        cost(
            Some(price),
            &TokenUsage {
                prompt_tokens,
                completion_tokens,
                ..TokenUsage::default()
            },
        )
    })
}

/// Computes the cost of a token usage, USD; 0 without a price.
pub(super) fn cost(price: Option<&Price>, billed: &TokenUsage) -> f64 {
    let Some(price) = price else { return 0.0 };
    let cached = billed.cached_tokens.min(billed.prompt_tokens);
    let fresh = billed.prompt_tokens - cached;
    (fresh as f64 * price.input
        + cached as f64 * price.cached_input.unwrap_or(price.input)
        + billed.completion_tokens as f64 * price.output)
        / 1e6
}

/// The most tokens that a request can be billed for. The `so_far_tokens` of an answer that the request continues are
/// part of its prompt.
pub(super) fn most(settings: &RequestSettings, call: &Call, so_far_tokens: u64) -> TokenUsage {
    let completion_tokens = match call.task {
        CallTask::Score { .. } => 1,
        CallTask::Answer | CallTask::AnswerIds(_) => u64::from(settings.max_tokens.unwrap_or(0)),
    };
    TokenUsage {
        prompt_tokens: u64::from(call.max_prompt_tokens) + so_far_tokens,
        completion_tokens,
        ..TokenUsage::default()
    }
}

/// Spending of a collection, and the reservations of its requests in flight.
#[derive(Debug)]
pub(super) struct Budget {
    caps: BudgetSettings,
    price: Option<Price>,
    spent: Spending,
    began: Instant,
    reserved_usd: f64,
    reserved_tokens: u64,
    in_flight: u64,
}

impl Budget {
    /// A budget from which earlier sessions took `spent`.
    pub(super) fn new(
        caps: BudgetSettings,
        price: Option<Price>,
        spent: Spending,
        now: Instant,
    ) -> Budget {
        Budget {
            caps,
            price,
            spent,
            began: now,
            reserved_usd: 0.0,
            reserved_tokens: 0,
            in_flight: 0,
        }
    }

    /// The cap that one more request of at most `most` tokens could pass, with its value and unit.
    pub(super) fn cap_reached_with(&self, most: &TokenUsage, now: Instant) -> Option<String> {
        let spent = self.spent(now);
        if let Some(cap) = self.caps.hours
            && spent.seconds >= cap * 3600.0
        {
            return Some(format!("{cap} hours"));
        }
        if let Some(cap) = self.caps.requests
            && spent.requests + self.in_flight + 1 > cap
        {
            return Some(format!("{cap} requests"));
        }
        if let Some(cap) = self.caps.tokens
            && spent.tokens + self.reserved_tokens + most.total() > cap
        {
            return Some(format!("{cap} tokens"));
        }
        if let Some(cap) = self.caps.usd
            && spent.usd + self.reserved_usd + cost(self.price.as_ref(), most) > cap
        {
            return Some(format!("{cap} USD"));
        }
        None
    }

    /// Reserves the most that a request can cost.
    pub(super) fn reserve(&mut self, most: &TokenUsage) {
        self.reserved_usd += cost(self.price.as_ref(), most);
        self.reserved_tokens += most.total();
        self.in_flight += 1;
    }

    /// Replaces a reservation by the charge for `billed`. Returns the charge, USD.
    pub(super) fn settle(&mut self, most: &TokenUsage, billed: &TokenUsage) -> f64 {
        self.in_flight -= 1;
        self.reserved_tokens -= most.total();
        self.reserved_usd -= cost(self.price.as_ref(), most);
        if self.in_flight == 0 {
            // Rounding errors of the sum must not add up.
            self.reserved_usd = 0.0;
        }
        let usd = cost(self.price.as_ref(), billed);
        self.spent.usd += usd;
        self.spent.tokens += billed.total();
        self.spent.requests += 1;
        usd
    }

    /// Spending, earlier sessions included.
    pub(super) fn spent(&self, now: Instant) -> Spending {
        Spending {
            seconds: self.spent.seconds + now.saturating_duration_since(self.began).as_secs_f64(),
            ..self.spent
        }
    }

    /// Sum of the reservations, USD.
    pub(super) fn reserved_usd(&self) -> f64 {
        self.reserved_usd.max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRICE: Price = Price {
        input: 1.0,
        cached_input: Some(0.5),
        output: 4.0,
    };

    fn billed(prompt_tokens: u64, completion_tokens: u64) -> TokenUsage {
        TokenUsage {
            prompt_tokens,
            completion_tokens,
            ..TokenUsage::default()
        }
    }

    #[test]
    fn cached_tokens_cost_less_and_answers_more() {
        let all = TokenUsage {
            prompt_tokens: 1_000_000,
            cached_tokens: 400_000,
            completion_tokens: 500_000,
            reasoning_tokens: 0,
        };
        assert!((cost(Some(&PRICE), &all) - (0.6 + 0.2 + 2.0)).abs() < 1e-12);
        assert!((cost(None, &all)).abs() < 1e-12);
        assert_eq!(forecast_usd(None, 1, 1), None);
        assert_eq!(forecast_usd(Some(&PRICE), 1_000_000, 1_000_000), Some(5.0));
    }

    #[test]
    fn requests_in_flight_count_in_full_until_they_are_settled() {
        let now = Instant::now();
        let caps = BudgetSettings {
            usd: Some(10e-6),
            ..BudgetSettings::default()
        };
        let mut budget = Budget::new(caps, Some(PRICE), Spending::default(), now);
        let most = billed(1, 1);
        assert_eq!(budget.cap_reached_with(&most, now), None);
        budget.reserve(&most);
        assert_eq!(budget.cap_reached_with(&most, now), None);
        budget.reserve(&most);
        assert_eq!(
            budget.cap_reached_with(&most, now),
            Some("0.00001 USD".into())
        );
        budget.settle(&most, &billed(1, 0));
        budget.settle(&most, &most);
        assert_eq!(budget.spent(now).tokens, 3);
        assert!((budget.spent(now).usd - 6e-6).abs() < 1e-15);
        assert_eq!(budget.cap_reached_with(&billed(0, 1), now), None);
        assert_eq!(
            budget.cap_reached_with(&most, now),
            Some("0.00001 USD".into()),
            "6e-6 USD are spent, and 5e-6 more would pass 10e-6"
        );
    }

    #[test]
    fn earlier_sessions_count_towards_every_cap() {
        let now = Instant::now();
        let spent = Spending {
            usd: 1.0,
            tokens: 100,
            requests: 5,
            seconds: 1800.0,
        };
        let refused = |caps: BudgetSettings| {
            Budget::new(caps, Some(PRICE), spent, now).cap_reached_with(&billed(10, 10), now)
        };
        assert_eq!(
            refused(BudgetSettings {
                usd: Some(1.0),
                ..BudgetSettings::default()
            }),
            Some("1 USD".into())
        );
        assert_eq!(
            refused(BudgetSettings {
                tokens: Some(119),
                ..BudgetSettings::default()
            }),
            Some("119 tokens".into())
        );
        assert_eq!(
            refused(BudgetSettings {
                tokens: Some(120),
                ..BudgetSettings::default()
            }),
            None
        );
        assert_eq!(
            refused(BudgetSettings {
                requests: Some(5),
                ..BudgetSettings::default()
            }),
            Some("5 requests".into())
        );
        assert_eq!(
            refused(BudgetSettings {
                hours: Some(0.5),
                ..BudgetSettings::default()
            }),
            Some("0.5 hours".into())
        );
    }
}
