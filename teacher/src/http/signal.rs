//! Converts the log-probabilities of servers to stored signals.
//!
//! Servers give the most likely tokens of each position, and the target token. These tokens are the support, and the
//! tail is exactly the remaining mass, 1 − Σ. The entropy is that of this coarse distribution, a lower bound of the full
//! distribution's entropy, since the distribution within the tail is not known. Nothing is known at other
//! temperatures, so there is no `log_z_at`.

use std::collections::HashMap;

use potstill_datasets::{
    Completion, Distributions, MASS_TOLERANCE, SampledToken, Signal, SignalRow, Tokenizer, TopToken,
};

use super::PromptLogprobs;

/// Largest value that servers write for −∞, which JSON does not have.
const NO_PROBABILITY: f32 = -9990.0;

/// Largest difference of two log-probabilities of the same token and position, nats. A server's rounding is smaller.
const MAX_DUPLICATE_DIFFERENCE: f32 = 1e-3;

/// Token ids by their bytes, for servers that give strings without ids.
///
/// Building the table takes some milliseconds for each 10,000 ids, so one table should serve many answers.
#[derive(Debug)]
pub struct Spellings {
    ids: HashMap<Vec<u8>, SpellingIds>,
}

#[derive(Debug, Clone, Copy)]
enum SpellingIds {
    One(u32),
    Several(u32, u32),
}

impl Spellings {
    /// Builds the table for all ids of a tokenizer.
    #[must_use]
    pub fn new(tokenizer: &Tokenizer) -> Spellings {
        let mut ids: HashMap<Vec<u8>, SpellingIds> = HashMap::new();
        for id in 0..tokenizer.vocab_size() as u32 {
            let bytes = tokenizer.token_bytes(id);
            if bytes.is_empty() {
                continue;
            }
            ids.entry(bytes)
                .and_modify(|spelled| {
                    if let SpellingIds::One(first) = *spelled {
                        *spelled = SpellingIds::Several(first, id);
                    }
                })
                .or_insert(SpellingIds::One(id));
        }
        Spellings { ids }
    }

    /// The only id that spells these bytes.
    fn id(&self, bytes: &[u8]) -> Result<u32, String> {
        let shown = String::from_utf8_lossy(bytes);
        // Servers without bytes write the replacement character for every part of a character.
        if shown.contains(char::REPLACEMENT_CHARACTER) {
            return Err(format!(
                "the server gives no token ids, and {shown:?} can be any part of a character"
            ));
        }
        match self.ids.get(bytes) {
            Some(SpellingIds::One(id)) => Ok(*id),
            Some(SpellingIds::Several(a, b)) => Err(format!(
                "the server gives no token ids, and {shown:?} is ambiguous: ids {a} and {b} both spell it"
            )),
            None => Err(format!(
                "the server gives no token ids, and no id of the tokenizer spells {shown:?}; it may not be the teacher's tokenizer"
            )),
        }
    }
}

/// Makes the signal of an answer from the most likely tokens at each position: prompt and answer, with loss on the
/// answer.
///
/// `prompt_ids` is the rendered prompt. If the server gave no ids, `spellings` recovers them from the tokens' bytes; an
/// alternative whose id is not found goes into the tail. At most `top_k` tokens and the sampled token are kept.
///
/// # Errors
/// A description of the defect: an answer without tokens; a sampled token whose id is not known; ids outside the
/// vocabulary; log-probabilities that are not numbers, are above 0, disagree, or have a mass above 1.
pub fn answer_signal(
    vocab_size: usize,
    spellings: Option<&Spellings>,
    prompt_ids: &[u32],
    completion: &Completion,
    top_k: usize,
) -> Result<Signal, String> {
    if completion.tokens.is_empty() {
        return Err("the answer has no tokens (request log-probabilities)".into());
    }
    if prompt_ids.is_empty() {
        return Err("the prompt has no tokens".into());
    }
    let mut token_ids = prompt_ids.to_vec();
    let mut rows = Distributions::default();
    for (at, token) in completion.tokens.iter().enumerate() {
        let (id, row) = sampled_row(spellings, token, top_k)
            .map_err(|why| format!("token {at} of the answer: {why}"))?;
        token_ids.push(id);
        rows.push_row(row.view());
    }
    let loss_mask = (0..token_ids.len())
        .map(|at| at >= prompt_ids.len())
        .collect();
    checked(
        Signal {
            prompt_id: completion.prompt_id.clone(),
            sample_index: completion.sample_index,
            token_ids,
            loss_mask,
            rows,
            provenance: 0,
        },
        vocab_size,
    )
}

/// Makes the signal of a text from the distributions that a server gave for its positions, with loss from position
/// `from` on. For `from = 0` the loss begins at position 1, since nothing precedes the first token.
///
/// # Errors
/// A description of the defect: different numbers of positions and tokens; a position without a distribution or without
/// its target token; ids outside the vocabulary; log-probabilities that are not numbers, are above 0, disagree, or have
/// a mass above 1.
pub fn prompt_signal(
    prompt_id: &str,
    sample_index: u32,
    token_ids: &[u32],
    from: usize,
    given: &PromptLogprobs,
    top_k: usize,
    vocab_size: usize,
) -> Result<Signal, String> {
    if given.len() != token_ids.len() {
        return Err(format!(
            "the server gave {} positions for {} tokens, so it scored another text than the one that was sent",
            given.len(),
            token_ids.len()
        ));
    }
    let from = from.max(1);
    let mut rows = Distributions::default();
    for (at, (id, position)) in token_ids.iter().zip(given).enumerate().skip(from) {
        let Some(position) = position else {
            return Err(format!("position {at}: the server gave no distribution"));
        };
        let row = row(*id, None, position.iter().copied(), top_k)
            .map_err(|why| format!("position {at}: {why}"))?;
        rows.push_row(row.view());
    }
    let loss_mask = (0..token_ids.len()).map(|at| at >= from).collect();
    checked(
        Signal {
            prompt_id: prompt_id.to_owned(),
            sample_index,
            token_ids: token_ids.to_vec(),
            loss_mask,
            rows,
            provenance: 0,
        },
        vocab_size,
    )
}

fn checked(signal: Signal, vocab_size: usize) -> Result<Signal, String> {
    signal
        .validate()
        .and_then(|()| signal.validate_vocabulary(vocab_size))
        .map_err(|error| error.to_string())?;
    Ok(signal)
}

fn sampled_row(
    spellings: Option<&Spellings>,
    token: &SampledToken,
    top_k: usize,
) -> Result<(u32, SignalRow), String> {
    let id = known(spellings, token.id, &token.bytes)?;
    // An alternative that is left out of the support is part of the tail, which stays exact.
    let alternative = |top: &TopToken| {
        let id = known(spellings, top.id, &top.bytes).ok()?;
        Some((id, top.logprob))
    };
    let top = token.top.iter().filter_map(alternative);
    let row = row(id, Some(token.logprob), top, top_k)?;
    Ok((id, row))
}

fn known(spellings: Option<&Spellings>, id: Option<u32>, bytes: &[u8]) -> Result<u32, String> {
    match (id, spellings) {
        (Some(id), _) => Ok(id),
        (None, Some(spellings)) => spellings.id(bytes),
        (None, None) => Err("the server gives no token ids".into()),
    }
}

/// Makes the row of a position: the `top_k` most likely tokens and the target token, with the rest as the tail.
fn row(
    target: u32,
    logprob: Option<f32>,
    given: impl Iterator<Item = (u32, f32)>,
    top_k: usize,
) -> Result<SignalRow, String> {
    let mut support: Vec<(u32, f32)> = logprob.map(|value| (target, value)).into_iter().collect();
    for (id, value) in given {
        // −0.0 and rounding errors just above 0 are 0; larger values are no log-probabilities.
        if value.is_nan() || value > 1e-5 {
            return Err(format!("the log-probability of token {id} is {value}"));
        }
        support.push((id, value.min(0.0)));
    }
    match support.iter().find(|(id, _)| *id == target) {
        None => {
            return Err(format!("the target token {target} has no log-probability"));
        }
        Some((_, value)) if !(NO_PROBABILITY..=1e-5).contains(value) => {
            return Err(format!(
                "the value {value} of the target token {target} is no log-probability"
            ));
        }
        Some(_) => {}
    }
    support.retain(|(_, value)| *value > NO_PROBABILITY);
    support.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
    if let Some((a, b)) = support
        .iter()
        .zip(support.iter().skip(1))
        .find(|(a, b)| a.0 == b.0 && a.1 - b.1 > MAX_DUPLICATE_DIFFERENCE)
    {
        return Err(format!(
            "token {} has two log-probabilities, {} and {}",
            a.0, a.1, b.1
        ));
    }
    support.dedup_by_key(|(id, _)| *id);
    support.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    truncate(&mut support, target, top_k);
    finish(support)
}

/// Keeps the first `top_k` tokens and the target token, which replaces none of them.
fn truncate(support: &mut Vec<(u32, f32)>, target: u32, top_k: usize) {
    let mut rank = 0;
    support.retain(|(id, _)| {
        rank += 1;
        rank <= top_k || *id == target
    });
}

fn finish(support: Vec<(u32, f32)>) -> Result<SignalRow, String> {
    let sum: f64 = support
        .iter()
        .map(|(_, value)| f64::from(*value).exp())
        .sum();
    if sum > 1.0 + MASS_TOLERANCE {
        return Err(format!(
            "the most likely tokens have a mass of {sum:.6}, above 1 by more than {MASS_TOLERANCE}, so the values are not log-probabilities"
        ));
    }
    let shift = if sum > 1.0 { sum.ln() } else { 0.0 };
    let (ids, logprobs): (Vec<u32>, Vec<f32>) = support
        .iter()
        .map(|(id, value)| (*id, (f64::from(*value) - shift) as f32))
        .unzip();
    // A server reports no tail, so the tail is what the reported values leave of 1. A smaller mass is lost in their
    // rounding.
    let tail = if 1.0 - sum > 1e-7 { 1.0 - sum } else { 0.0 };
    let nats = |mass: f64| if mass > 0.0 { -mass * mass.ln() } else { 0.0 };
    let entropy: f64 = logprobs
        .iter()
        .map(|value| nats(f64::from(*value).exp()))
        .sum::<f64>()
        + nats(tail);
    Ok(SignalRow {
        ids,
        logprobs,
        tail_logprob: tail.ln() as f32,
        entropy: entropy as f32,
        log_z_at: Vec::new(),
        draw_ids: Vec::new(),
        draw_counts: Vec::new(),
    })
}

/// A part of a long text that is scored by a request of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoringWindow {
    /// Position in the text of the first token that is sent.
    pub start: usize,
    /// Position after the last token that is sent.
    pub end: usize,
    /// Position in the text of the first distribution that is taken from this window.
    pub from: usize,
}

/// Splits a text of `tokens` tokens, to be scored from position `from` on, into windows of at most `most` tokens.
///
/// A text that fits is one window, and its scores are exact. In a longer text each window but the first begins with
/// `context` tokens that the window before has scored, so its distributions are conditioned on at least `context` tokens
/// and not on the whole text. A server holds logits for each scored token of a prompt, so `most` bounds its memory.
#[must_use]
pub fn scoring_windows(
    tokens: usize,
    from: usize,
    most: usize,
    context: usize,
) -> Vec<ScoringWindow> {
    let from = from.max(1);
    if from >= tokens {
        return Vec::new();
    }
    let most = most.max(2);
    let context = context.clamp(1, most - 1);
    let mut windows = Vec::new();
    let mut next = from;
    // Tokens before `from` are context only.
    let mut start = if tokens <= most || from < most {
        0
    } else {
        from - context
    };
    while next < tokens {
        let end = tokens.min(start + most);
        windows.push(ScoringWindow {
            start,
            end,
            from: next,
        });
        next = end;
        start = end - context.min(end);
    }
    windows
}

/// Joins the distributions of the windows of a text.
///
/// # Errors
/// A description of the defect, if a window has different numbers of distributions and tokens.
pub fn join_scoring_windows(
    tokens: usize,
    parts: Vec<(ScoringWindow, PromptLogprobs)>,
) -> Result<PromptLogprobs, String> {
    let mut whole: PromptLogprobs = vec![None; tokens];
    for (window, given) in parts {
        if given.len() != window.end - window.start {
            return Err(format!(
                "the server gave {} positions for tokens {} to {}",
                given.len(),
                window.start,
                window.end
            ));
        }
        let taken = given.into_iter().skip(window.from - window.start);
        for (slot, position) in whole.iter_mut().skip(window.from).zip(taken) {
            *slot = position;
        }
    }
    Ok(whole)
}

#[cfg(test)]
mod tests;
