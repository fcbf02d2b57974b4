//! Exact sparse distributions of a teacher over given texts.
//!
//! [`capture`] says what is kept of each distribution. The support is the top-k, the target token and the control
//! tokens. Texts run in batches of similar length, so that little of a batch is padding. The head computes the loss
//! positions alone, `chunk_rows` at a time, so that logits of all tokens `[tokens, v]` are never held.

use std::collections::HashMap;
use std::ops::ControlFlow;

use potstill_datasets::{Distributions, Encoded, Signal, SignalRow};
use potstill_kernels::{CaptureOptions, CaptureRow, Captured, capture};
use potstill_model::{Device, Int, Tensor, TensorData};
use sha2::{Digest, Sha256};

use super::checkpoint::Local;
use super::text::ScoringText;
use crate::{Error, SignalSettings};

/// Parts of each distribution that are kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Scoring {
    /// Parts of each distribution to store.
    pub signals: SignalSettings,
    /// Seed of the draws, whose randomness is a function of this seed, the text's prompt and sample, and the position.
    pub seed: u64,
    /// Number of rows of logits held at once, at least 1: `chunk_rows` × v numbers.
    pub chunk_rows: usize,
}

impl Local {
    /// Computes the teacher's distributions over `texts`, in their order; see [`Signal`].
    ///
    /// `progress` is called after each chunk with the number of distributions so far; if it breaks, the result is
    /// `None`. The `provenance` of all rows is 0.
    ///
    /// # Errors
    /// A text that exceeds the context or whose ids are outside the vocabulary; loss at position 0; a mask of another
    /// length; logits that are not finite; settings out of range.
    pub fn score(
        &self,
        texts: &[ScoringText],
        scoring: &Scoring,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<Signal>>, Error> {
        check_scoring(scoring)?;
        for text in texts {
            self.check_text(text)?;
        }
        let mut rows: HashMap<usize, Distributions> = HashMap::new();
        let mut done = 0;
        for batch in batches(texts, batch_tokens(&self.model.device())) {
            let width = batch.first().map_or(0, |(_, text)| tokens_needed(text));
            let hidden_nd = self.hidden(&batch, width);
            let positions = loss_positions_of(&batch, scoring.seed);
            for chunk in positions.chunks(scoring.chunk_rows) {
                let captured = self.capture(texts, chunk, &hidden_nd, width, scoring)?;
                for (at, captured) in chunk.iter().zip(captured) {
                    rows.entry(at.text).or_default().push_row(captured.view());
                }
                done += chunk.len();
                if progress(done).is_break() {
                    return Ok(None);
                }
            }
        }
        let signals = texts.iter().enumerate().map(|(index, text)| Signal {
            prompt_id: text.prompt_id.clone(),
            sample_index: text.sample_index,
            token_ids: text.encoded.token_ids.clone(),
            loss_mask: text.encoded.loss_mask.clone(),
            rows: rows.remove(&index).unwrap_or_default(),
            provenance: 0,
        });
        Ok(Some(signals.collect()))
    }

    fn check_text(&self, text: &ScoringText) -> Result<(), Error> {
        let Encoded {
            token_ids,
            loss_mask,
        } = &text.encoded;
        let config = self.model.config();
        let bad = |why: String| {
            Err(Error::BadText {
                prompt_id: text.prompt_id.clone(),
                sample_index: text.sample_index,
                why,
            })
        };
        if token_ids.len() > config.max_position_embeddings {
            return Err(Error::TextTooLong {
                prompt_id: text.prompt_id.clone(),
                sample_index: text.sample_index,
                tokens: token_ids.len(),
                limit: config.max_position_embeddings,
            });
        }
        if loss_mask.len() != token_ids.len() {
            let (tokens, mask) = (token_ids.len(), loss_mask.len());
            return bad(format!("{tokens} tokens come with a loss mask of {mask}"));
        }
        if loss_mask.first() == Some(&true) {
            return bad("its first token carries loss, and nothing precedes it".to_owned());
        }
        let v = self.model.token_count();
        match token_ids.iter().find(|id| **id as usize >= v) {
            Some(id) => bad(format!(
                "token id {id} is outside of the teacher's vocabulary of {v}"
            )),
            None => Ok(()),
        }
    }

    /// Computes the hidden states of a batch of texts, each padded on the right to `width`: `[n, d]`, n = texts × width.
    fn hidden(&self, batch: &[(usize, &ScoringText)], width: usize) -> Tensor<2> {
        let mut ids = Vec::with_capacity(batch.len() * width);
        for (_, text) in batch {
            let tokens = &text.encoded.token_ids;
            ids.extend(tokens.iter().take(width).map(|id| *id as i32));
            ids.resize(ids.len() + width - tokens.len().min(width), 0);
        }
        let data = TensorData::new(ids, [batch.len(), width]);
        let ids_bt = Tensor::<2, Int>::from_data(data, &self.model.device());
        let hidden_btd = self.model.hidden(ids_bt);
        let [b, t, d] = hidden_btd.dims();
        hidden_btd.reshape([b * t, d])
    }

    /// Captures the distributions that predict the tokens at `positions`, from the hidden states of their batch.
    fn capture(
        &self,
        texts: &[ScoringText],
        positions: &[LossPosition],
        hidden_nd: &Tensor<2>,
        width: usize,
        scoring: &Scoring,
    ) -> Result<Vec<SignalRow>, Error> {
        let rows: Vec<i32> = positions
            .iter()
            .map(|at| (at.row_in_batch * width + at.position - 1) as i32)
            .collect();
        let data = TensorData::new(rows, [positions.len()]);
        let rows = Tensor::<1, Int>::from_data(data, &self.model.device());
        let logits_nv = self.model.raw_logits(hidden_nd.clone().select(0, rows));
        let capture_row = |at: &LossPosition| {
            let mut kept = self.control_ids.clone();
            kept.push(at.target);
            CaptureRow {
                kept,
                seed: at.seed,
                position: at.position as u64,
            }
        };
        let rows: Vec<CaptureRow> = positions.iter().map(capture_row).collect();
        let signals = &scoring.signals;
        let temperatures: Vec<f32> = signals.temperatures.iter().map(|t| *t as f32).collect();
        let settings = CaptureOptions {
            head: self.model.logit_transform(),
            top_k: signals.top_k,
            temperatures: &temperatures,
            draws: signals.tail_draws,
        };
        let captured = capture(logits_nv, &rows, &settings).map_err(|error| {
            Error::Model(potstill_model::Error::Device {
                what: "logits",
                why: error.to_string(),
            })
        })?;
        let rows = positions.iter().zip(captured);
        rows.map(|(at, row)| row.map(signal_row).ok_or_else(|| not_finite(texts, at)))
            .collect()
    }
}

fn signal_row(row: Captured) -> SignalRow {
    SignalRow {
        ids: row.ids,
        logprobs: row.logprobs,
        tail_logprob: row.tail_logprob,
        entropy: row.entropy,
        log_z_at: row.log_z_at.into_iter().map(Some).collect(),
        draw_ids: row.draw_ids,
        draw_counts: row.draw_counts,
    }
}

/// Largest number of tokens in a batch, padding included, unless one text alone has more. The number keeps a GPU busy,
/// and on a CPU keeps a batch within the caches.
fn batch_tokens(device: &Device) -> usize {
    if *device == Device::flex() { 512 } else { 4096 }
}

/// Groups texts, each with its index, into batches of similar length, the longest first. Texts without loss positions
/// are left out.
fn batches(texts: &[ScoringText], batch_tokens: usize) -> Vec<Vec<(usize, &ScoringText)>> {
    let mut order: Vec<(usize, &ScoringText)> = texts.iter().enumerate().collect();
    order.retain(|(_, text)| tokens_needed(text) > 0);
    order.sort_by_key(|(_, text)| std::cmp::Reverse(tokens_needed(text)));
    let mut batches: Vec<Vec<(usize, &ScoringText)>> = Vec::new();
    let mut width = 0;
    for item in order {
        match batches.last_mut() {
            Some(batch) if (batch.len() + 1) * width <= batch_tokens => batch.push(item),
            _ => {
                // A batch is as wide as its first text.
                width = tokens_needed(item.1);
                batches.push(vec![item]);
            }
        }
    }
    batches
}

/// Number of tokens before the last loss position: later tokens are not needed to predict it.
fn tokens_needed(text: &ScoringText) -> usize {
    let last = text.encoded.loss_mask.iter().rposition(|loss| *loss);
    last.unwrap_or(0)
}

/// A loss position of a text in a batch.
#[derive(Debug, Clone, Copy)]
struct LossPosition {
    /// Index of the text among all texts.
    text: usize,
    /// Index of the text in its batch.
    row_in_batch: usize,
    position: usize,
    /// The target token.
    target: u32,
    /// Seed of the text's tail draws.
    seed: u64,
}

fn loss_positions_of(batch: &[(usize, &ScoringText)], seed: u64) -> Vec<LossPosition> {
    let mut positions = Vec::new();
    for (row_in_batch, (text, item)) in batch.iter().enumerate() {
        let seed = tail_seed(seed, item);
        positions.extend(loss_positions(item).map(|(position, target)| LossPosition {
            text: *text,
            row_in_batch,
            position,
            target,
            seed,
        }));
    }
    positions
}

/// Seed of a text's tail draws. It differs from the seed that the answer was sampled with, so that the draws are
/// independent of the answer.
fn tail_seed(seed: u64, text: &ScoringText) -> u64 {
    let mut hasher = Sha256::new();
    hasher.update(b"tail");
    hasher.update(seed.to_le_bytes());
    hasher.update(text.sample_index.to_le_bytes());
    hasher.update(text.prompt_id.as_bytes());
    let digest = hasher.finalize();
    let bytes = digest.iter().take(8);
    bytes.fold(0, |seed, byte| seed << 8 | u64::from(*byte))
}

/// Positions with loss and the target token at each; position 0 has no distribution.
fn loss_positions(text: &ScoringText) -> impl Iterator<Item = (usize, u32)> {
    let Encoded {
        token_ids,
        loss_mask,
    } = &text.encoded;
    let tokens = token_ids.iter().zip(loss_mask).enumerate().skip(1);
    tokens.filter_map(|(position, (id, loss))| loss.then_some((position, *id)))
}

fn not_finite(texts: &[ScoringText], at: &LossPosition) -> Error {
    let text = texts.get(at.text);
    Error::NotFinite {
        prompt_id: text.map_or_else(String::new, |text| text.prompt_id.clone()),
        sample_index: text.map_or(0, |text| text.sample_index),
        position: at.position,
    }
}

fn check_scoring(scoring: &Scoring) -> Result<(), Error> {
    let wrong = |setting, value, range| {
        Err(Error::Scoring {
            setting,
            value,
            range,
        })
    };
    if scoring.signals.top_k == 0 {
        return wrong("top_k", 0.0, "it is at least 1");
    }
    if scoring.chunk_rows == 0 {
        return wrong("chunk_rows", 0.0, "it is at least 1");
    }
    let bad = |t: &&f64| !(**t > 0.0 && t.is_finite());
    match scoring.signals.temperatures.iter().find(bad) {
        Some(t) => wrong("temperatures", *t, "each is above 0"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(tokens: usize, last_loss: Option<usize>) -> ScoringText {
        ScoringText {
            prompt_id: "p".to_owned(),
            sample_index: 0,
            encoded: Encoded {
                token_ids: vec![1; tokens],
                loss_mask: (0..tokens).map(|at| Some(at) == last_loss).collect(),
            },
        }
    }

    #[test]
    fn batches_are_of_similar_length_and_within_the_budget() {
        let mut texts: Vec<ScoringText> = (2..300).map(|n| text(n, Some(n - 1))).collect();
        texts.push(text(9000, Some(8999)));
        texts.push(text(50, None));
        texts.push(text(9000, Some(4)));
        let budget = 4096;
        let batches = batches(&texts, budget);
        let mut seen: Vec<usize> = batches.iter().flatten().map(|(index, _)| *index).collect();
        seen.sort_unstable();
        // All texts except the one without loss.
        let expected: Vec<usize> = (0..texts.len()).filter(|index| *index != 299).collect();
        assert_eq!(seen, expected);
        let (mut padded, mut needed) = (0, 0);
        for batch in &batches {
            let width = tokens_needed(batch[0].1);
            assert!(batch.len() == 1 || batch.len() * width <= budget);
            assert!(batch.iter().all(|(_, text)| tokens_needed(text) <= width));
            padded += batch.len() * width;
            needed += batch
                .iter()
                .map(|(_, text)| tokens_needed(text))
                .sum::<usize>();
        }
        assert_eq!(tokens_needed(batches[0][0].1), 8999);
        assert!(padded < needed + needed / 10, "{padded} for {needed}");
    }
}
