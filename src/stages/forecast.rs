//! Forecasts of what a teacher behind a server will cost, before the first request and while requests are sent.

use potstill_teacher::HttpTeacher;
use potstill_teacher::http::{
    self, BudgetSettings, CollectProgress, Price, Spending, TokenEstimate,
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
    let prompt = estimate.tokens(missing);
    let answer = u64::from(request.max_tokens.unwrap_or(0)) * missing as u64;
    let text = format!(
        "{missing} answers to ask {} for: about {} tokens of prompts, at most {} of answers",
        request.model,
        large(prompt),
        large(answer)
    );
    with_cost(http, budget, text, prompt, answer, spent)
}

/// Describes what the distributions over `missing` answers will cost; `tokens` counts these answers with their prompts.
pub(super) fn of_scores(
    http: &HttpTeacher,
    budget: &BudgetSettings,
    tokens: u64,
    missing: usize,
    spent: &Spending,
) -> String {
    let text = format!(
        "{missing} answers to have scored by {}: about {} tokens with their prompts",
        http.client.request.model,
        large(tokens)
    );
    // A server generates at least one token for each.
    with_cost(http, budget, text, tokens, missing as u64, spent)
}

fn with_cost(
    http: &HttpTeacher,
    budget: &BudgetSettings,
    mut text: String,
    prompt: u64,
    answer: u64,
    spent: &Spending,
) -> String {
    let price = http.client.price.as_ref();
    match http::forecast_usd(price, prompt, answer) {
        Some(usd) => text += &format!(", at most {} without retries", dollars(usd)),
        None => text += "; what they cost is not known (`price` of [teacher])",
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

/// A large count in words.
fn large(count: u64) -> String {
    match count {
        0..10_000 => count.to_string(),
        10_000..1_000_000 => format!("{:.1} thousand", count as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} million", count as f64 / 1e6),
        _ => format!("{:.1} billion", count as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::{dollars, large};

    #[test]
    fn money_and_counts_read_well() {
        let amounts = [0.0, 0.000_123, 0.05, 4.5, 123.456].map(dollars);
        assert_eq!(
            amounts,
            ["$0.00", "$0.000123", "$0.050", "$4.500", "$123.46"]
        );
        let counts = [9_999, 10_000, 2_560_000, 31_000_000, 12_000_000_000].map(large);
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
