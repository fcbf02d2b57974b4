//! Signals, the distributions that a student learns from, and the rules that every stored signal keeps.

use serde::{Deserialize, Serialize};

use crate::encode::Encoded;
use crate::error::Error;

/// A teacher's distributions over one text: one for each position t ≥ 1 with `loss_mask[t]`, in order. Row i is the
/// distribution of `token_ids[t_i]` given the tokens before it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Signal {
    /// Id of the prompt.
    pub prompt_id: String,
    /// Number of the sample among those of its prompt, from 0.
    pub sample_index: u32,
    /// Token ids of prompt and completion.
    pub token_ids: Vec<u32>,
    /// For each of `token_ids`, whether it carries loss. Position 0 never does, because nothing precedes it.
    pub loss_mask: Vec<bool>,
    /// The distributions at the loss positions.
    pub rows: Vec<SignalRow>,
    /// Index into the list of provenances in the file's footer.
    pub provenance: u32,
}

/// Length of a stored sequence, which is known without its distributions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceLength {
    /// Number of tokens, prompt included.
    pub tokens: usize,
    /// The first position that carries loss; `None` if there is none.
    pub first_loss: Option<usize>,
}

impl SequenceLength {
    /// The length of a signal.
    #[must_use]
    pub fn of(signal: &Signal) -> SequenceLength {
        SequenceLength {
            tokens: signal.token_ids.len(),
            first_loss: signal.loss_positions().next(),
        }
    }
}

/// The distribution at one position: exact on the support S, and one number for the tail.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SignalRow {
    /// The support S: distinct ids, the most probable first, and the lower id first among equals. The target token is in S.
    pub ids: Vec<u32>,
    /// Log-probabilities of `ids` at T = 1, in nats.
    pub logprobs: Vec<f32>,
    /// Log of the exact tail mass, in nats; -inf if S is the whole vocabulary.
    pub tail_logprob: f32,
    /// Entropy of the full distribution, in nats.
    pub entropy: f32,
    /// For each T of [`Provenance::temperatures`](crate::Provenance::temperatures), log Σ_v exp(logprob_v / T) over the
    /// whole vocabulary, in nats, so that log p_T(i) = logprob_i / T − log_z. `None` if the teacher does not provide it.
    pub log_z_at: Vec<Option<f32>>,
    /// Distinct tokens drawn from the tail with probability p(id) / p(tail), ascending. Empty if no draws were taken or
    /// the tail has no mass.
    pub draw_ids: Vec<u32>,
    /// Number of times that each of `draw_ids` was drawn. The counts sum to m, the number of draws.
    pub draw_counts: Vec<u32>,
}

/// Largest excess of a row's mass over 1 that rounding may cause. The target rescales such a row; a larger excess is
/// refused.
pub const MASS_TOLERANCE: f64 = 1e-3;

impl Signal {
    /// Creates the signal of a text without distributions: at each loss position, all mass is on the target token. The
    /// loss of such a signal is cross-entropy, and its KL is the negative log-likelihood.
    pub fn of_text(prompt_id: String, sample_index: u32, text: Encoded) -> Signal {
        let Encoded {
            token_ids,
            loss_mask,
        } = text;
        let tokens = token_ids.iter().zip(&loss_mask).skip(1);
        let rows = tokens.filter(|(_, loss)| **loss).map(|(id, _)| SignalRow {
            ids: vec![*id],
            logprobs: vec![0.0],
            tail_logprob: f32::NEG_INFINITY,
            entropy: 0.0,
            log_z_at: Vec::new(),
            draw_ids: Vec::new(),
            draw_counts: Vec::new(),
        });
        Signal {
            prompt_id,
            sample_index,
            rows: rows.collect(),
            token_ids,
            loss_mask,
            provenance: 0,
        }
    }

    /// Returns the positions that have a distribution, in order: t ≥ 1 with `loss_mask[t]`.
    pub fn loss_positions(&self) -> impl Iterator<Item = usize> {
        self.loss_mask
            .iter()
            .enumerate()
            .skip(1)
            .filter(|(_, loss)| **loss)
            .map(|(position, _)| position)
    }

    /// Checks the rules that every stored signal keeps.
    ///
    /// # Errors
    /// [`Error::BadSignal`] if the mask is not as long as the tokens or is set at position 0; if the number of
    /// distributions is not the number of loss positions; if a support is empty, repeats an id, is not sorted or lacks
    /// the target token; if a number is not finite (a tail of -inf is legal); if a mass exceeds 1 + [`MASS_TOLERANCE`];
    /// if rows differ in the number of temperatures; if draws are not ascending, are in the support or come from an
    /// empty tail; or if rows with a tail differ in the number of draws.
    pub fn validate(&self) -> Result<(), Error> {
        self.check().map_err(|why| self.bad(why))
    }

    /// Checks that every id is below the size of a vocabulary.
    ///
    /// # Errors
    /// [`Error::BadSignal`], which names the first larger id.
    pub fn validate_vocabulary(&self, vocab_size: usize) -> Result<(), Error> {
        let mut ids = self
            .token_ids
            .iter()
            .chain(self.rows.iter().flat_map(|row| &row.ids))
            .chain(self.rows.iter().flat_map(|row| &row.draw_ids));
        match ids.find(|id| **id as usize >= vocab_size) {
            None => Ok(()),
            Some(id) => Err(self.bad(format!(
                "token id {id} is outside a vocabulary of {vocab_size}"
            ))),
        }
    }

    fn bad(&self, why: String) -> Error {
        Error::BadSignal {
            prompt_id: self.prompt_id.clone(),
            sample_index: self.sample_index,
            why,
        }
    }

    fn check(&self) -> Result<(), String> {
        if self.loss_mask.len() != self.token_ids.len() {
            return Err(format!(
                "{} tokens have a loss mask of {}",
                self.token_ids.len(),
                self.loss_mask.len()
            ));
        }
        if self.loss_mask.first() == Some(&true) {
            return Err("position 0 carries loss, though nothing precedes it".into());
        }
        let positions = self.loss_positions().count();
        if positions != self.rows.len() {
            return Err(format!(
                "{positions} loss positions have {} distributions",
                self.rows.len()
            ));
        }
        let temperatures = self.rows.first().map_or(0, |row| row.log_z_at.len());
        let mut scratch = Vec::new();
        for (position, row) in self.loss_positions().zip(&self.rows) {
            let target = self.token_ids.get(position).copied();
            row.check(target, temperatures, &mut scratch)
                .map_err(|why| format!("position {position}: {why}"))?;
        }
        self.check_draws()
    }

    /// Checks that every position whose tail has mass has the same number of draws, and that the others have none.
    fn check_draws(&self) -> Result<(), String> {
        let draws = |row: &SignalRow| row.draw_counts.iter().map(|count| u64::from(*count)).sum();
        let with_tail = self
            .rows
            .iter()
            .find(|row| row.tail_logprob > f32::NEG_INFINITY);
        let m: u64 = with_tail.map_or(0, draws);
        for (position, row) in self.loss_positions().zip(&self.rows) {
            row.check_draws()
                .map_err(|why| format!("position {position}: {why}"))?;
            let (found, expected) = match row.tail_logprob > f32::NEG_INFINITY {
                true => (draws(row), m),
                false => (draws(row), 0),
            };
            if found != expected {
                return Err(format!(
                    "position {position}: {found} draws from the tail, and {expected} are expected"
                ));
            }
        }
        Ok(())
    }
}

impl SignalRow {
    fn check(
        &self,
        target: Option<u32>,
        temperatures: usize,
        scratch: &mut Vec<u32>,
    ) -> Result<(), String> {
        if self.ids.len() != self.logprobs.len() {
            return Err(format!(
                "{} support ids have {} logprobs",
                self.ids.len(),
                self.logprobs.len()
            ));
        }
        if self.log_z_at.len() != temperatures {
            return Err(format!(
                "{} values of log_z_at, though the first row has {temperatures}",
                self.log_z_at.len()
            ));
        }
        if target.is_none_or(|id| !self.ids.contains(&id)) {
            return Err(match target {
                Some(id) => format!("the target token {id} is not in the support"),
                None => "there is no target token".into(),
            });
        }
        scratch.clear();
        scratch.extend_from_slice(&self.ids);
        scratch.sort_unstable();
        if let Some(id) = scratch
            .iter()
            .zip(scratch.iter().skip(1))
            .find(|(a, b)| a == b)
            .map(|(id, _)| id)
        {
            return Err(format!("token {id} is twice in the support"));
        }
        self.check_numbers()
    }

    fn check_draws(&self) -> Result<(), String> {
        if self.draw_ids.len() != self.draw_counts.len() {
            return Err(format!(
                "{} drawn ids have {} counts",
                self.draw_ids.len(),
                self.draw_counts.len()
            ));
        }
        if !self.draw_ids.is_sorted_by(|a, b| a < b) {
            return Err("the drawn ids are not ascending".into());
        }
        if self.draw_counts.contains(&0) {
            return Err("a token is drawn 0 times".into());
        }
        match self
            .ids
            .iter()
            .find(|id| self.draw_ids.binary_search(id).is_ok())
        {
            Some(id) => Err(format!("token {id} of the support is drawn from the tail")),
            None => Ok(()),
        }
    }

    fn check_numbers(&self) -> Result<(), String> {
        if let Some(value) = self.logprobs.iter().find(|value| !value.is_finite()) {
            return Err(format!("a logprob is {value}"));
        }
        if !self.logprobs.is_sorted_by(|a, b| a >= b) {
            return Err("the support is not sorted by descending logprob".into());
        }
        if self.tail_logprob.is_nan() || self.tail_logprob == f32::INFINITY {
            return Err(format!("tail_logprob is {}", self.tail_logprob));
        }
        if !self.entropy.is_finite() {
            return Err(format!("entropy is {}", self.entropy));
        }
        if let Some(value) = self
            .log_z_at
            .iter()
            .flatten()
            .find(|value| !value.is_finite())
        {
            return Err(format!("a value of log_z_at is {value}"));
        }
        let support: f64 = self
            .logprobs
            .iter()
            .map(|value| f64::from(*value).exp())
            .sum();
        let mass = support + f64::from(self.tail_logprob).exp();
        if mass > 1.0 + MASS_TOLERANCE {
            return Err(format!(
                "support and tail have a mass of {mass:.6}, which exceeds 1 by more than {MASS_TOLERANCE}"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signal() -> Signal {
        let row = |ids: [u32; 2]| SignalRow {
            ids: ids.into(),
            logprobs: vec![0.5_f32.ln(), 0.25_f32.ln()],
            tail_logprob: 0.25_f32.ln(),
            entropy: 1.0,
            log_z_at: vec![None, Some(0.5)],
            draw_ids: vec![3, 5],
            draw_counts: vec![1, 2],
        };
        Signal {
            prompt_id: "p".into(),
            sample_index: 3,
            token_ids: vec![7, 8, 9],
            loss_mask: vec![false, true, true],
            rows: vec![row([8, 1]), row([2, 9])],
            provenance: 0,
        }
    }

    #[track_caller]
    fn refused(change: impl FnOnce(&mut Signal), why: &str) {
        let mut signal = signal();
        change(&mut signal);
        let message = signal.validate().unwrap_err().to_string();
        assert_eq!(
            message,
            format!("the signal of prompt p, sample 3, is not valid: {why}")
        );
    }

    #[test]
    fn a_valid_signal_passes() {
        let mut signal = signal();
        signal.validate().unwrap();
        assert_eq!(signal.loss_positions().collect::<Vec<_>>(), [1, 2]);
        // Rows without draws, and then a support that is the whole vocabulary with rounding up to the tolerance.
        for row in &mut signal.rows {
            (row.draw_ids, row.draw_counts) = (vec![], vec![]);
        }
        signal.validate().unwrap();
        for row in &mut signal.rows {
            row.tail_logprob = f32::NEG_INFINITY;
            row.logprobs = vec![0.7503_f32.ln(), 0.2503_f32.ln()];
        }
        signal.validate().unwrap();
        signal.validate_vocabulary(10).unwrap();
        let message = signal.validate_vocabulary(9).unwrap_err().to_string();
        assert!(
            message.ends_with("token id 9 is outside a vocabulary of 9"),
            "{message}"
        );
    }

    #[test]
    fn a_signal_that_breaks_a_rule_is_refused() {
        refused(|s| s.loss_mask.push(true), "3 tokens have a loss mask of 4");
        refused(
            |s| s.loss_mask[0] = true,
            "position 0 carries loss, though nothing precedes it",
        );
        refused(
            |s| s.rows.truncate(1),
            "2 loss positions have 1 distributions",
        );
        refused(
            |s| s.loss_mask[1] = false,
            "1 loss positions have 2 distributions",
        );
        refused(
            |s| s.rows[1].ids.push(4),
            "position 2: 3 support ids have 2 logprobs",
        );
        refused(
            |s| s.rows[0].ids = vec![1, 2],
            "position 1: the target token 8 is not in the support",
        );
        refused(
            |s| s.rows[1].ids = vec![9, 9],
            "position 2: token 9 is twice in the support",
        );
        refused(
            |s| s.rows[1].log_z_at = vec![],
            "position 2: 0 values of log_z_at, though the first row has 2",
        );
        refused(
            |s| s.rows[0].logprobs[1] = f32::NEG_INFINITY,
            "position 1: a logprob is -inf",
        );
        refused(
            |s| s.rows[0].logprobs[0] = f32::NAN,
            "position 1: a logprob is NaN",
        );
        refused(
            |s| s.rows[0].logprobs.reverse(),
            "position 1: the support is not sorted by descending logprob",
        );
        refused(
            |s| s.rows[0].tail_logprob = f32::NAN,
            "position 1: tail_logprob is NaN",
        );
        refused(
            |s| s.rows[0].tail_logprob = f32::INFINITY,
            "position 1: tail_logprob is inf",
        );
        refused(
            |s| s.rows[0].entropy = f32::INFINITY,
            "position 1: entropy is inf",
        );
        refused(
            |s| s.rows[1].log_z_at[1] = Some(f32::NAN),
            "position 2: a value of log_z_at is NaN",
        );
        refused(
            |s| s.rows[0].draw_ids.push(9),
            "position 1: 3 drawn ids have 2 counts",
        );
        refused(
            |s| s.rows[1].draw_ids = vec![5, 5],
            "position 2: the drawn ids are not ascending",
        );
        refused(
            |s| s.rows[1].draw_counts = vec![3, 0],
            "position 2: a token is drawn 0 times",
        );
        refused(
            |s| s.rows[1].draw_ids = vec![3, 9],
            "position 2: token 9 of the support is drawn from the tail",
        );
        refused(
            |s| s.rows[1].draw_counts[0] = 2,
            "position 2: 4 draws from the tail, and 3 are expected",
        );
        refused(
            |s| s.rows[1].tail_logprob = f32::NEG_INFINITY,
            "position 2: 3 draws from the tail, and 0 are expected",
        );
        refused(
            |s| s.rows[0].tail_logprob = 0.2515_f32.ln(),
            "position 1: support and tail have a mass of 1.001500, which exceeds 1 by more than 0.001",
        );
    }
}
