//! Forecasts of what a teacher behind a server will cost, before the first request and while requests are sent.

use potstill_teacher::HttpTeacher;
use potstill_teacher::http::{
    self, BudgetSettings, CollectProgress, OnLength, Price, ReservedTokens, Spending, TokenEstimate,
};

/// Describes what `missing` answers to the prompts of `estimate` will cost.
pub(super) fn of_answers(
    http: &HttpTeacher,
    budget: &BudgetSettings,
    estimate: &TokenEstimate,
    missing: usize,
    spent: &Spending,
) -> String {
    let request = &http.client.request;
    let about = estimate.tokens(missing);
    let most = estimate.most(missing).tokens;
    let answer = u64::from(request.max_tokens.unwrap_or(0)) * missing as u64;
    let text = format!(
        "{missing} answers to ask {} for: {}, at most {} of answers",
        request.model,
        prompt_tokens(about, most, "of prompts"),
        at_most(answer)
    );
    with_cost(
        http,
        budget,
        text,
        about,
        Some((most, answer)),
        answer,
        spent,
    )
}

/// Describes what the distributions over `missing` answers will cost; `tokens` counts these answers with their prompts.
/// `most` is what the requests reserve, if the answers are there already.
pub(super) fn of_scores(
    http: &HttpTeacher,
    budget: &BudgetSettings,
    tokens: u64,
    most: Option<ReservedTokens>,
    missing: usize,
    spent: &Spending,
) -> String {
    const WHAT: &str = "with their prompts";
    let counted = match most {
        Some(most) => prompt_tokens(tokens, most.tokens, WHAT),
        None => format!("about {} tokens {WHAT}", large(tokens)),
    };
    let text = format!(
        "{missing} answers to have scored by {}: {counted}",
        http.client.request.model,
    );
    // A server generates at least one token for each request.
    let most = most.map(|most| (most.tokens, most.requests));
    with_cost(http, budget, text, tokens, most, missing as u64, spent)
}

/// An estimate of tokens, and the most that is reserved for them.
fn prompt_tokens(about: u64, most: u64, what: &str) -> String {
    format!(
        "about {} tokens {what} (at most {})",
        large(about.min(most)),
        at_most(most)
    )
}

/// Adds the cost: about that of `prompt` and `answer` tokens, and at most that of the tokens of `most`.
fn with_cost(
    http: &HttpTeacher,
    budget: &BudgetSettings,
    mut text: String,
    prompt: u64,
    most: Option<(u64, u64)>,
    answer: u64,
    spent: &Spending,
) -> String {
    let price = http.client.price.as_ref();
    match (http::forecast_usd(price, prompt, answer), most) {
        (None, _) => text += "; what they cost is not known (`price` of [teacher])",
        (Some(usd), None) => text += &format!(", about {}", dollars(usd)),
        (Some(_), Some((prompt, answer))) => {
            let most = http::forecast_usd(price, prompt, answer).unwrap_or(0.0);
            text += &format!(", at most {} without retries", dollars_at_most(most));
            if http.client.on_length == OnLength::Continue {
                text += " and continuations";
            }
        }
    }
    if spent.requests > 0 {
        text += &format!("; {} requests and {} spent so far", spent.requests, {
            match price {
                Some(_) => dollars(spent.usd),
                None => format!("{} tokens", large(spent.tokens)),
            }
        });
    }
    let caps = caps(budget);
    if !caps.is_empty() {
        text += &format!("; capped at {}", caps.join(", "));
    }
    text
}

/// The caps of a budget in words.
fn caps(budget: &BudgetSettings) -> Vec<String> {
    let mut caps = Vec::new();
    if let Some(usd) = budget.usd {
        caps.push(dollars(usd));
    }
    if let Some(tokens) = budget.tokens {
        caps.push(format!("{} tokens", large(tokens)));
    }
    if let Some(requests) = budget.requests {
        caps.push(format!("{} requests", requests));
    }
    if let Some(bytes) = budget.disk_bytes {
        caps.push(format!("{} bytes on disk", large(bytes)));
    }
    if let Some(hours) = budget.hours {
        caps.push(format!("{} h", hours));
    }
    caps
}

/// Note of the progress output: spending and caps, the cost of all answers at the present rate, requests in flight.
/// `before` is what was spent before this process.
pub(super) fn live(
    price: Option<&Price>,
    budget: &BudgetSettings,
    before: &Spending,
    missing: usize,
    progress: &CollectProgress,
) -> String {
    let spent = &progress.spent;
    let mut facts = Vec::new();
    if let Some(seconds) = progress.server_wait_seconds {
        facts.push(format!(
            "waiting as the server asks, {} s left",
            seconds.ceil()
        ));
    }
    let of = |cap: Option<String>| cap.map_or_else(String::new, |cap| format!(" of {cap}"));
    if price.is_some() {
        let over = progress.answered + progress.failed;
        let mut fact = format!(
            "{}{} spent",
            dollars(spent.usd),
            of(budget.usd.map(dollars))
        );
        if over > 0 {
            let each = (spent.usd - before.usd) / over as f64;
            fact += &format!(
                ", about {} in all",
                dollars(before.usd + each * missing as f64)
            );
        }
        facts.push(fact);
    }
    if let Some(tokens) = budget.tokens {
        facts.push(format!(
            "{} of {} tokens",
            large(spent.tokens),
            large(tokens)
        ));
    }
    if let Some(requests) = budget.requests {
        facts.push(format!("{} of {} requests", spent.requests, requests));
    }
    if let Some(hours) = budget.hours {
        facts.push(format!("{:.2} of {} h", spent.seconds / 3600.0, hours));
    }
    facts.push(format!("{} in flight", progress.in_flight));
    if progress.failed > 0 {
        facts.push(format!("{} failed", progress.failed));
    }
    facts.join(", ")
}

/// An amount in USD with as many digits as matter.
pub(super) fn dollars(usd: f64) -> String {
    match usd {
        usd if usd == 0.0 || usd >= 10.0 => format!("${usd:.2}"),
        usd if usd >= 0.01 => format!("${usd:.3}"),
        usd => format!("${usd:.6}"),
    }
}

/// An amount in USD, rounded up.
fn dollars_at_most(usd: f64) -> String {
    let digits = match usd {
        usd if usd == 0.0 || usd >= 10.0 => 2,
        usd if usd >= 0.01 => 3,
        _ => 6,
    };
    let scale = 10_f64.powi(digits);
    // A sum of many reservations may differ from the product in its last bits.
    dollars((usd * scale * (1.0 - 1e-12)).ceil() / scale)
}

/// A large count in words.
pub(super) fn large(count: u64) -> String {
    in_words(count, f64::round)
}

/// A large count in words, rounded up.
fn at_most(count: u64) -> String {
    in_words(count, f64::ceil)
}

fn in_words(count: u64, round: fn(f64) -> f64) -> String {
    let (unit, name) = match count {
        0..10_000 => return count.to_string(),
        10_000..1_000_000 => (1e3, "thousand"),
        1_000_000..1_000_000_000 => (1e6, "million"),
        _ => (1e9, "billion"),
    };
    format!("{:.1} {name}", round(count as f64 / unit * 10.0) / 10.0)
}

#[cfg(test)]
mod tests {
    use super::{at_most, dollars, dollars_at_most, large};

    #[test]
    fn money_and_counts_read_well() {
        let amounts = [0.0, 0.000_123, 0.05, 4.5, 123.456].map(dollars);
        assert_eq!(
            amounts,
            ["$0.00", "$0.000123", "$0.050", "$4.500", "$123.46"]
        );
        let counts = [9_999, 10_000, 2_560_000, 31_000_000, 12_000_000_000].map(large);
        let most = [
            0.0,
            0.000_123_1,
            0.050_1,
            0.009_999_9,
            4.500_1,
            9.999_9,
            123.451,
        ];
        assert_eq!(
            most.map(dollars_at_most),
            [
                "$0.00",
                "$0.000124",
                "$0.051",
                "$0.010",
                "$4.501",
                "$10.00",
                "$123.46"
            ]
        );
        assert_eq!(at_most(2_510_001), "2.6 million");
        let expected = [
            "9999",
            "10.0 thousand",
            "2.6 million",
            "31.0 million",
            "12.0 billion",
        ];
        assert_eq!(counts, expected);
    }
}
