//! Exact sparse distributions of a teacher over given texts.
//!
//! For each position with loss, with logits z over the whole vocabulary of v tokens:
//!
//! - log p(i) = z_i − log Σ_j exp(z_j), at temperature 1;
//! - the support S is the top-k, the realised token and the control tokens, each once;
//! - the tail is log Σ_{i ∉ S} p(i), summed over the tail itself in f64: 1 − Σ_S p(i) would lose every
//!   digit of a small tail;
//! - the entropy is −Σ_i p(i) log p(i) over the whole vocabulary, in nats;
//! - log_z_at[T] = log Σ_i exp(log p(i) / T), of the normalised log-probabilities, so that
//!   log p_T(i) = log p(i) / T − log_z_at[T], whatever constant the logits carry.

use std::ops::ControlFlow;

use potstill_datasets::{Encoded, Signal, SignalRow};
use potstill_model::{Int, Tensor, TensorData};
use rayon::prelude::*;

use super::Local;
use crate::Error;

/// What is kept of each distribution.
#[derive(Debug, Clone, PartialEq)]
pub struct Scoring {
    /// How many of the likeliest tokens; at least 1. More than the vocabulary keeps all of it.
    pub top_k: usize,
    /// The temperatures of `log_z_at`, above 0.
    pub temperatures: Vec<f32>,
    /// Rows of logits held at once, at least 1: `chunk_rows` × v numbers.
    pub chunk_rows: usize,
}

/// A text to score.
#[derive(Debug, Clone)]
pub struct Text {
    /// The prompt's id.
    pub prompt_id: String,
    /// Which sample of the prompt, from 0.
    pub sample_index: u32,
    /// The token ids, and on which of them distributions are wanted.
    pub encoded: Encoded,
}

impl Local {
    /// The teacher's distributions over all of `texts`, run as one batch; see [`Signal`].
    ///
    /// `progress` is told after each chunk how many distributions there are so far; when it breaks, the
    /// result is `None`. The rows' `provenance` is 0.
    ///
    /// # Errors
    /// A text that exceeds the context, or whose ids are outside of the vocabulary; loss at position 0;
    /// a mask of another length; logits that are not finite; settings out of range.
    pub fn score(
        &self,
        texts: &[Text],
        scoring: &Scoring,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<Signal>>, Error> {
        check_scoring(scoring)?;
        for text in texts {
            self.check_text(text)?;
        }
        let width = texts
            .iter()
            .map(|text| text.encoded.token_ids.len())
            .max()
            .unwrap_or(0);
        let places = places(texts);
        let mut rows = Vec::with_capacity(places.len());
        if !places.is_empty() {
            let hidden_nd = self.hidden(texts, width);
            for chunk in places.chunks(scoring.chunk_rows) {
                let logits = self.logits(&hidden_nd, chunk, width)?;
                rows.extend(self.chunk_rows(texts, chunk, &logits, scoring)?);
                if progress(rows.len()).is_break() {
                    return Ok(None);
                }
            }
        }
        let mut rows = rows.into_iter();
        let signals = texts.iter().map(|text| Signal {
            prompt_id: text.prompt_id.clone(),
            sample_index: text.sample_index,
            token_ids: text.encoded.token_ids.clone(),
            loss_mask: text.encoded.loss_mask.clone(),
            rows: rows.by_ref().take(loss_positions(text).count()).collect(),
            provenance: 0,
        });
        Ok(Some(signals.collect()))
    }

    fn check_text(&self, text: &Text) -> Result<(), Error> {
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
        let v = config.vocab_size;
        match token_ids.iter().find(|id| **id as usize >= v) {
            Some(id) => bad(format!(
                "token id {id} is outside of the teacher's vocabulary of {v}"
            )),
            None => Ok(()),
        }
    }

    /// Hidden states of all texts, padded on the right to `width`: `[n, d]`, n = texts × width.
    fn hidden(&self, texts: &[Text], width: usize) -> Tensor<2> {
        let mut ids = Vec::with_capacity(texts.len() * width);
        for text in texts {
            let tokens = &text.encoded.token_ids;
            ids.extend(tokens.iter().map(|id| *id as i32));
            ids.resize(ids.len() + width - tokens.len(), 0);
        }
        let data = TensorData::new(ids, [texts.len(), width]);
        let ids_bt = Tensor::<2, Int>::from_data(data, &self.model.device());
        let hidden_btd = self.model.hidden(ids_bt);
        let [b, t, d] = hidden_btd.dims();
        hidden_btd.reshape([b * t, d])
    }

    /// Logits of the rows that predict `places`, row after row.
    fn logits(
        &self,
        hidden_nd: &Tensor<2>,
        places: &[Place],
        width: usize,
    ) -> Result<Vec<f32>, Error> {
        let rows: Vec<i32> = places
            .iter()
            .map(|place| (place.text * width + place.position - 1) as i32)
            .collect();
        let data = TensorData::new(rows, [places.len()]);
        let rows = Tensor::<1, Int>::from_data(data, &self.model.device());
        let logits = self.model.logits(hidden_nd.clone().select(0, rows));
        logits.try_into_vec_as::<f32>().map_err(|error| {
            Error::Model(potstill_model::Error::Device {
                what: "logits",
                why: error.to_string(),
            })
        })
    }

    fn chunk_rows(
        &self,
        texts: &[Text],
        places: &[Place],
        logits: &[f32],
        scoring: &Scoring,
    ) -> Result<Vec<SignalRow>, Error> {
        let v = self.model.config().vocab_size;
        logits
            .par_chunks(v)
            .zip(places)
            .map(|(logits_v, place)| {
                let mut kept = self.control_ids.clone();
                kept.push(place.realised);
                row(logits_v, &kept, scoring).ok_or_else(|| not_finite(texts, place))
            })
            .collect()
    }
}

/// A position that wants a distribution.
#[derive(Debug, Clone, Copy)]
struct Place {
    text: usize,
    position: usize,
    realised: u32,
}

fn places(texts: &[Text]) -> Vec<Place> {
    let of_text = |(text, item): (usize, &Text)| {
        let places = loss_positions(item).map(move |(position, realised)| Place {
            text,
            position,
            realised,
        });
        places.collect::<Vec<_>>()
    };
    texts.iter().enumerate().flat_map(of_text).collect()
}

/// Positions with loss and the token at each; position 0 has no distribution.
fn loss_positions(text: &Text) -> impl Iterator<Item = (usize, u32)> {
    let Encoded {
        token_ids,
        loss_mask,
    } = &text.encoded;
    let tokens = token_ids.iter().zip(loss_mask).enumerate().skip(1);
    tokens.filter_map(|(position, (id, loss))| loss.then_some((position, *id)))
}

fn not_finite(texts: &[Text], place: &Place) -> Error {
    let text = texts.get(place.text);
    Error::NotFinite {
        prompt_id: text.map_or_else(String::new, |text| text.prompt_id.clone()),
        sample_index: text.map_or(0, |text| text.sample_index),
        position: place.position,
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
    if scoring.top_k == 0 {
        return wrong("top_k", 0.0, "it is at least 1");
    }
    if scoring.chunk_rows == 0 {
        return wrong("chunk_rows", 0.0, "it is at least 1");
    }
    let bad = |t: &&f32| !(**t > 0.0 && t.is_finite());
    match scoring.temperatures.iter().find(bad) {
        Some(t) => wrong("temperatures", f64::from(*t), "each is above 0"),
        None => Ok(()),
    }
}

/// One distribution, from the logits of the whole vocabulary; `None` when they are not finite.
///
/// `kept` are ids that the support holds besides the top-k.
fn row(logits_v: &[f32], kept: &[u32], scoring: &Scoring) -> Option<SignalRow> {
    let mut largest = f32::NEG_INFINITY;
    for &logit in logits_v {
        if logit.is_nan() {
            return None;
        }
        largest = largest.max(logit);
    }
    if !largest.is_finite() {
        return None;
    }
    let shifted = |logit: f32| f64::from(logit - largest);
    let mut exps: Vec<f64> = logits_v.iter().map(|z| shifted(*z).exp()).collect();
    let total: f64 = exps.iter().sum();
    let log_total = total.ln();
    let weighted: f64 = exps
        .iter()
        .zip(logits_v)
        .filter(|(exp, _)| **exp > 0.0)
        .map(|(exp, z)| exp * shifted(*z))
        .sum();
    let log_z_at = scoring.temperatures.iter().map(|&temperature| {
        let t = f64::from(temperature);
        let sum: f64 = logits_v.iter().map(|z| (shifted(*z) / t).exp()).sum();
        Some((sum.ln() - log_total / t) as f32)
    });

    let mut support: Vec<(u32, f32)> = support(logits_v, kept, scoring.top_k)
        .into_iter()
        .map(|id| {
            let logit = logits_v.get(id as usize).copied().unwrap_or(largest);
            (id, (shifted(logit) - log_total) as f32)
        })
        .collect();
    if support.iter().any(|(_, logprob)| !logprob.is_finite()) {
        return None;
    }
    support.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    for (id, _) in &support {
        if let Some(exp) = exps.get_mut(*id as usize) {
            *exp = 0.0;
        }
    }
    let tail: f64 = exps.iter().sum();
    let (ids, logprobs) = support.into_iter().unzip();
    Some(SignalRow {
        ids,
        logprobs,
        tail_logprob: (tail.ln() - log_total) as f32,
        entropy: (log_total - weighted / total).max(0.0) as f32,
        log_z_at: log_z_at.collect(),
    })
}

/// Ids of the `top_k` largest logits, the lower id first among equals, and of `kept`; each once.
fn support(logits_v: &[f32], kept: &[u32], top_k: usize) -> Vec<u32> {
    let logit = |id: &u32| {
        logits_v
            .get(*id as usize)
            .copied()
            .unwrap_or(f32::NEG_INFINITY)
    };
    let mut ids: Vec<u32> = (0..logits_v.len() as u32).collect();
    if top_k < ids.len() {
        ids.select_nth_unstable_by(top_k, |a, b| logit(b).total_cmp(&logit(a)).then(a.cmp(b)));
        ids.truncate(top_k);
    }
    ids.extend(kept);
    ids.sort_unstable();
    ids.dedup();
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scoring(top_k: usize, temperatures: &[f32]) -> Scoring {
        Scoring {
            top_k,
            temperatures: temperatures.to_vec(),
            chunk_rows: 1,
        }
    }

    /// Numbers that look random, and repeat so that ties are common.
    fn logits(length: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            ((state >> 33) % 50) as f32 * 0.3 - 7.0
        };
        (0..length).map(|_| next()).collect()
    }

    #[test]
    fn a_row_equals_brute_force_in_f64() {
        for (length, top_k) in [(1, 1), (7, 3), (300, 8), (1000, 64), (50, 50), (50, 200)] {
            let logits = logits(length, length as u64);
            let kept = [0, (length - 1) as u32];
            let row = row(&logits, &kept, &scoring(top_k, &[1.0, 2.0, 0.25])).unwrap();

            let wide: Vec<f64> = logits.iter().map(|z| f64::from(*z)).collect();
            let lse = wide.iter().map(|z| z.exp()).sum::<f64>().ln();
            let mut order: Vec<usize> = (0..length).collect();
            order.sort_by(|a, b| wide[*b].total_cmp(&wide[*a]).then(a.cmp(b)));
            let mut expected: Vec<usize> = order.iter().copied().take(top_k).collect();
            for id in kept {
                if !expected.contains(&(id as usize)) {
                    expected.push(id as usize);
                }
            }
            expected.sort_by(|a, b| wide[*b].total_cmp(&wide[*a]).then(a.cmp(b)));
            let found: Vec<usize> = row.ids.iter().map(|id| *id as usize).collect();
            assert_eq!(found, expected);
            for (id, logprob) in expected.iter().zip(&row.logprobs) {
                assert!((f64::from(*logprob) - (wide[*id] - lse)).abs() < 1e-5);
            }
            let outside = (0..length).filter(|id| !expected.contains(id));
            let tail: f64 = outside.map(|id| (wide[id] - lse).exp()).sum();
            if expected.len() == length {
                assert_eq!(row.tail_logprob, f32::NEG_INFINITY);
            } else {
                assert!((f64::from(row.tail_logprob) - tail.ln()).abs() < 1e-5);
            }
            let entropy: f64 = wide.iter().map(|z| -(z - lse) * (z - lse).exp()).sum();
            assert!((f64::from(row.entropy) - entropy).abs() < 1e-5);
            assert!(row.log_z_at[0].unwrap().abs() < 1e-6);
            for (at, t) in [(1, 2.0), (2, 0.25)] {
                let expected = wide.iter().map(|z| ((z - lse) / t).exp()).sum::<f64>().ln();
                assert!((f64::from(row.log_z_at[at].unwrap()) - expected).abs() < 1e-5);
            }
        }
    }

    /// 1 − Σ would give 0 here, or noise: the tail's own sum keeps all its digits.
    #[test]
    fn a_tiny_tail_keeps_its_digits() {
        let mut logits = vec![-60.0f32; 1000];
        logits[3] = 0.0;
        let row = row(&logits, &[], &scoring(1, &[])).unwrap();
        assert_eq!(row.ids, [3]);
        let expected = 999f64.ln() - 60.0;
        assert!((f64::from(row.tail_logprob) - expected).abs() < 1e-5);
    }

    #[test]
    fn logits_that_are_not_finite_are_refused() {
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(row(&[0.0, bad, 1.0], &[], &scoring(2, &[])).is_none());
        }
        assert!(row(&[f32::NEG_INFINITY; 3], &[], &scoring(2, &[])).is_none());
        // A token that is ruled out is no part of the tail, but cannot be in the support.
        assert!(row(&[0.0, f32::NEG_INFINITY], &[], &scoring(1, &[])).is_some());
        assert!(row(&[0.0, f32::NEG_INFINITY], &[1], &scoring(1, &[])).is_none());
    }
}
