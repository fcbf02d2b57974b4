//! What asking will take, said before the first request and while it goes on.

use potstill_teacher::http::{self, CollectProgress, Spending};

use super::Served;
use crate::run_file::Budget;

/// One text in so many is tokenized; the rest is reckoned from their bytes.
const TOKENIZED: usize = 64;
/// Bytes of a token where no tokenizer says better.
const BYTES_PER_TOKEN: f64 = 4.0;

/// The texts that are sent, summed up on the way.
#[derive(Debug, Default)]
pub(super) struct Measured {
    texts: usize,
    bytes: u64,
    /// Of those that were tokenized.
    sample_bytes: u64,
    sample_tokens: u64,
}

impl Measured {
    /// A text of so many bytes. `tokens` counts what is sent of it, where that can be done.
    pub(super) fn add(
        &mut self,
        bytes: usize,
        tokens: impl FnOnce() -> anyhow::Result<Option<usize>>,
    ) -> anyhow::Result<()> {
        let bytes = bytes as u64;
        if self.texts.is_multiple_of(TOKENIZED)
            && let Some(tokens) = tokens()?
        {
            self.sample_bytes += bytes;
            self.sample_tokens += tokens as u64;
        }
        self.texts += 1;
        self.bytes += bytes;
        Ok(())
    }

    /// Tokens of so many of these texts, about.
    pub(super) fn tokens_of(&self, texts: usize) -> u64 {
        let bytes = self.bytes as f64 / self.texts.max(1) as f64;
        let tokens = match self.sample_tokens {
            0 => bytes / BYTES_PER_TOKEN,
            tokens => bytes * tokens as f64 / self.sample_bytes.max(1) as f64,
        };
        (tokens * texts as f64).round() as u64
    }
}

/// What `missing` answers to the measured prompts take.
pub(super) fn of_answers(
    served: &Served<'_>,
    measured: &Measured,
    missing: usize,
    spent: &Spending,
) -> String {
    let prompt = measured.tokens_of(missing);
    let answer = (served.run.file.collect.max_new_tokens.get() * missing) as u64;
    let what = format!(
        "{missing} answers to ask {} for: about {} tokens of prompts, at most {} of answers",
        served.model,
        large(prompt),
        large(answer)
    );
    said(served, what, prompt, answer, spent)
}

/// What the distributions over `missing` answers take, which are so many tokens with their prompts.
pub(super) fn of_scores(
    served: &Served<'_>,
    tokens: u64,
    missing: usize,
    spent: &Spending,
) -> String {
    let what = format!(
        "{missing} answers to have scored by {}: about {} tokens with their prompts",
        served.model,
        large(tokens)
    );
    // A server generates one token at least.
    said(served, what, tokens, missing as u64, spent)
}

fn said(
    served: &Served<'_>,
    mut text: String,
    prompt: u64,
    answer: u64,
    spent: &Spending,
) -> String {
    match http::forecast_usd(served.price.as_ref(), prompt, answer) {
        Some(usd) => text += &format!(", at most {} without retries", dollars(usd)),
        None => text += "; what they cost is not known (`price` of [teacher])",
    }
    if spent.requests > 0 {
        text += &format!("; {} requests and {} spent so far", spent.requests, {
            match served.price {
                Some(_) => dollars(spent.usd),
                None => format!("{} tokens", large(spent.tokens)),
            }
        });
    }
    let caps = caps(&served.run.file.budget);
    if !caps.is_empty() {
        text += &format!("; capped at {}", caps.join(", "));
    }
    text
}

/// The caps in words.
pub(super) fn caps(budget: &Budget) -> Vec<String> {
    let mut caps = Vec::new();
    if let Some(usd) = budget.usd {
        caps.push(dollars(usd.get()));
    }
    if let Some(tokens) = budget.tokens {
        caps.push(format!("{} tokens", large(tokens.get())));
    }
    if let Some(requests) = budget.requests {
        caps.push(format!("{} requests", requests.get()));
    }
    if let Some(bytes) = budget.disk_bytes {
        caps.push(format!("{} bytes on disk", large(bytes.get())));
    }
    if let Some(hours) = budget.hours {
        caps.push(format!("{} h", hours.get()));
    }
    caps
}

/// What the live line says: spent of what cap, what all will cost at this rate, requests in flight.
pub(super) fn live(
    served: &Served<'_>,
    budget: &Budget,
    before: &Spending,
    missing: usize,
    progress: &CollectProgress,
) -> String {
    let spent = &progress.spent;
    let mut facts = Vec::new();
    let of = |cap: Option<String>| cap.map_or_else(String::new, |cap| format!(" of {cap}"));
    if served.price.is_some() {
        let over = progress.answered + progress.failed;
        let mut fact = format!(
            "{}{} spent",
            dollars(spent.usd),
            of(budget.usd.map(|usd| dollars(usd.get())))
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
            large(tokens.get())
        ));
    }
    if let Some(requests) = budget.requests {
        facts.push(format!("{} of {} requests", spent.requests, requests.get()));
    }
    if let Some(hours) = budget.hours {
        facts.push(format!(
            "{:.2} of {} h",
            spent.seconds / 3600.0,
            hours.get()
        ));
    }
    facts.push(format!("{} in flight", progress.in_flight));
    if progress.failed > 0 {
        facts.push(format!("{} failed", progress.failed));
    }
    facts.join(", ")
}

/// USD with as many digits as matter.
pub(super) fn dollars(usd: f64) -> String {
    match usd {
        usd if usd == 0.0 || usd >= 10.0 => format!("${usd:.2}"),
        usd if usd >= 0.01 => format!("${usd:.3}"),
        usd => format!("${usd:.6}"),
    }
}

/// A count as people read it.
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
        let said = [0.0, 0.000_123, 0.05, 4.5, 123.456].map(dollars);
        assert_eq!(said, ["$0.00", "$0.000123", "$0.050", "$4.500", "$123.46"]);
        let said = [9_999, 10_000, 2_560_000, 31_000_000, 12_000_000_000].map(large);
        let expected = [
            "9999",
            "10.0 thousand",
            "2.6 million",
            "31.0 million",
            "12.0 billion",
        ];
        assert_eq!(said, expected);
    }
}
