//! What a server says of probabilities, as stored signals.
//!
//! Servers give the likeliest tokens of each position, and the realised one. The support is made of these, and the
//! tail is exactly the rest: 1 − Σ. The entropy is that of this coarse distribution, which is a lower bound of the
//! full one's: the server does not say how the tail is spread. Nothing is known at other temperatures, so there is
//! no `log_z_at`.

use std::collections::HashMap;

use potstill_datasets::{
    Completion, MASS_TOLERANCE, SampledToken, Signal, SignalRow, Tokenizer, TopToken,
};

use super::PromptLogprobs;

/// Servers write this or less where a token has no probability, JSON having no infinity.
const NO_PROBABILITY: f32 = -9990.0;

/// How far two numbers for one token at one position may be apart, nats: more than a server's rounding.
const SAME_LOGPROB: f32 = 1e-3;

/// Which ids spell which bytes, for servers that give strings alone.
///
/// Building it takes some milliseconds for each 10,000 ids: once for many answers.
#[derive(Debug)]
pub struct Spellings {
    ids: HashMap<Vec<u8>, Spelled>,
}

#[derive(Debug, Clone, Copy)]
enum Spelled {
    By(u32),
    BySeveral(u32, u32),
}

impl Spellings {
    /// The spellings of all ids of a tokenizer.
    #[must_use]
    pub fn new(tokenizer: &Tokenizer) -> Spellings {
        let mut ids: HashMap<Vec<u8>, Spelled> = HashMap::new();
        for id in 0..tokenizer.vocab_size() as u32 {
            let bytes = tokenizer.token_bytes(id);
            if bytes.is_empty() {
                continue;
            }
            ids.entry(bytes)
                .and_modify(|spelled| {
                    if let Spelled::By(first) = *spelled {
                        *spelled = Spelled::BySeveral(first, id);
                    }
                })
                .or_insert(Spelled::By(id));
        }
        Spellings { ids }
    }

    /// The one id that spells these bytes.
    fn id(&self, bytes: &[u8]) -> Result<u32, String> {
        let shown = String::from_utf8_lossy(bytes);
        // A server that writes strings writes this for each part of a character.
        if shown.contains(char::REPLACEMENT_CHARACTER) {
            return Err(format!(
                "the server gives no token ids, and {shown:?} may stand for any part of a character"
            ));
        }
        match self.ids.get(bytes) {
            Some(Spelled::By(id)) => Ok(*id),
            Some(Spelled::BySeveral(a, b)) => Err(format!(
                "the server gives no token ids, and {shown:?} is ambiguous: ids {a} and {b} both spell it"
            )),
            None => Err(format!(
                "the server gives no token ids, and no id of the tokenizer spells {shown:?}: is it the teacher's tokenizer?"
            )),
        }
    }
}

/// The signal of an answer, from the likeliest tokens that came with each sampled one: prompt and answer, with
/// loss on the answer.
///
/// `prompt_ids` is the rendered prompt. Where the server gave no ids they are recovered through what tokens
/// spell; an alternative for which that fails goes into the tail. At most `top_k` tokens are kept, and the
/// sampled one. For many answers of a server without ids use [`answer_signal_with`].
///
/// # Errors
/// In words: an answer without tokens; a sampled token whose id cannot be known; ids outside the vocabulary;
/// log-probabilities that are not numbers, are above 0, disagree, or hold more mass than 1.
pub fn answer_signal(
    tokenizer: &Tokenizer,
    prompt_ids: &[u32],
    completion: &Completion,
    top_k: usize,
) -> Result<Signal, String> {
    let lacking =
        |token: &SampledToken| token.id.is_none() || token.top.iter().any(|top| top.id.is_none());
    let spellings = completion
        .tokens
        .iter()
        .any(lacking)
        .then(|| Spellings::new(tokenizer));
    answer_signal_with(
        tokenizer.vocab_size(),
        spellings.as_ref(),
        prompt_ids,
        completion,
        top_k,
    )
}

/// [`answer_signal`] for a vocabulary whose spellings are known already; `None` where the server gives ids.
///
/// # Errors
/// Those of [`answer_signal`].
pub fn answer_signal_with(
    vocab_size: usize,
    spellings: Option<&Spellings>,
    prompt_ids: &[u32],
    completion: &Completion,
    top_k: usize,
) -> Result<Signal, String> {
    if completion.tokens.is_empty() {
        return Err("the answer came without its tokens: ask for log-probabilities".into());
    }
    if prompt_ids.is_empty() {
        return Err("the prompt has no tokens".into());
    }
    let mut token_ids = prompt_ids.to_vec();
    let mut rows = Vec::with_capacity(completion.tokens.len());
    for (at, token) in completion.tokens.iter().enumerate() {
        let (id, row) = sampled_row(spellings, token, top_k)
            .map_err(|why| format!("token {at} of the answer: {why}"))?;
        token_ids.push(id);
        rows.push(row);
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

/// The signal of a given text from the distributions that a server gave for its positions, with loss from
/// position `from` on (from 1 where it is 0: nothing precedes the first token).
///
/// # Errors
/// In words: another number of positions than of tokens; a position without a distribution or without the
/// token that stands there; ids outside the vocabulary; numbers that are none, are above 0, disagree, or hold
/// more mass than 1.
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
            "the server gave {} positions for {} tokens: its text is not the one that was sent",
            given.len(),
            token_ids.len()
        ));
    }
    let from = from.max(1);
    let mut rows = Vec::with_capacity(token_ids.len().saturating_sub(from));
    for (at, (id, position)) in token_ids.iter().zip(given).enumerate().skip(from) {
        let Some(position) = position else {
            return Err(format!("position {at}: the server gave no distribution"));
        };
        let row = row(*id, None, position.iter().copied(), top_k)
            .map_err(|why| format!("position {at}: {why}"))?;
        rows.push(row);
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
    // Left out of the support, an alternative is part of the tail, which stays exact.
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

/// One position: the `top_k` likeliest of what was given and the realised token, the rest as the tail.
fn row(
    realised: u32,
    logprob: Option<f32>,
    given: impl Iterator<Item = (u32, f32)>,
    top_k: usize,
) -> Result<SignalRow, String> {
    let mut support: Vec<(u32, f32)> = logprob.map(|value| (realised, value)).into_iter().collect();
    for (id, value) in given {
        // JSON's -0.0 and rounding just above 0 are 0; more is no log-probability.
        if value.is_nan() || value > 1e-5 {
            return Err(format!("the log-probability of token {id} is {value}"));
        }
        support.push((id, value.min(0.0)));
    }
    match support.iter().find(|(id, _)| *id == realised) {
        None => {
            return Err(format!(
                "token {realised}, which stands there, has no log-probability"
            ));
        }
        Some((_, value)) if !(NO_PROBABILITY..=1e-5).contains(value) => {
            return Err(format!(
                "token {realised}, which stands there, has the log-probability {value}: that is none"
            ));
        }
        Some(_) => {}
    }
    support.retain(|(_, value)| *value > NO_PROBABILITY);
    support.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
    if let Some((a, b)) = support
        .iter()
        .zip(support.iter().skip(1))
        .find(|(a, b)| a.0 == b.0 && a.1 - b.1 > SAME_LOGPROB)
    {
        return Err(format!(
            "token {} has two log-probabilities, {} and {}",
            a.0, a.1, b.1
        ));
    }
    support.dedup_by_key(|(id, _)| *id);
    support.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    keep(&mut support, realised, top_k);
    finish(support)
}

/// The first `top_k` and the realised token, which takes no other's place.
fn keep(support: &mut Vec<(u32, f32)>, realised: u32, top_k: usize) {
    let mut place = 0;
    support.retain(|(id, _)| {
        place += 1;
        place <= top_k || *id == realised
    });
}

fn finish(support: Vec<(u32, f32)>) -> Result<SignalRow, String> {
    let sum: f64 = support
        .iter()
        .map(|(_, value)| f64::from(*value).exp())
        .sum();
    if sum > 1.0 + MASS_TOLERANCE {
        return Err(format!(
            "the likeliest tokens hold a mass of {sum:.6}, over 1 by more than {MASS_TOLERANCE}: these are not log-probabilities"
        ));
    }
    let shift = if sum > 1.0 { sum.ln() } else { 0.0 };
    let (ids, logprobs): (Vec<u32>, Vec<f32>) = support
        .iter()
        .map(|(id, value)| (*id, (f64::from(*value) - shift) as f32))
        .unzip();
    // Mass below f32's rounding of the sum is none that can be known.
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

/// A part of a long text that a server is asked to score by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoringWindow {
    /// The first token that is sent.
    pub start: usize,
    /// One past the last.
    pub end: usize,
    /// The first whose distribution is taken from this window, counted in the text.
    pub from: usize,
}

/// A text of `tokens` tokens, scored from `from` on, in windows of at most `most`.
///
/// A text that fits is one window, and exact. In a longer one each window but the first begins with `context`
/// tokens that the one before has scored: its distributions know `context` tokens of what came before, or more,
/// and not the whole text. A server holds logits for each token of a prompt whose log-probabilities it is asked
/// for, so `most` bounds its memory.
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
    // What precedes `from` is context only: the first window that scores anything.
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

/// The distributions of a whole text from those of its windows.
///
/// # Errors
/// In words, where a window's are not as many as its tokens.
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
        for (place, position) in whole.iter_mut().skip(window.from).zip(taken) {
            *place = position;
        }
    }
    Ok(whole)
}

#[cfg(test)]
mod tests;
