//! Signals, the distributions that a student learns from, and the rules that every stored signal keeps.

use serde::{Deserialize, Serialize};

use crate::distributions::{DistributionRow, Distributions};
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
    pub rows: Distributions,
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
        let mut rows = Distributions::default();
        for (id, _) in token_ids
            .iter()
            .zip(&loss_mask)
            .skip(1)
            .filter(|(_, loss)| **loss)
        {
            rows.push_row(DistributionRow {
                ids: &[*id],
                logprobs: &[0.0],
                tail_logprob: f32::NEG_INFINITY,
                entropy: 0.0,
                log_z_at: &[],
                draw_ids: &[],
                draw_counts: &[],
            });
        }
        Signal {
            prompt_id,
            sample_index,
            rows,
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
            .chain(self.rows.ids.values())
            .chain(self.rows.draw_ids.values());
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
        if !self.rows.is_sound() {
            return Err("the columns of its distributions do not fit together".into());
        }
        let temperatures = self.rows.row(0).log_z_at.len();
        let mut seen = SeenIds::new(self.rows.ids.values());
        // The number of draws from the first tail that has mass.
        let mut expected_draws = None;
        for (position, row) in self.loss_positions().zip(&self.rows) {
            let target = self.token_ids.get(position).copied();
            check_row(row, target, temperatures, &mut seen)
                .and_then(|()| check_draws(row, &mut expected_draws))
                .map_err(|why| format!("position {position}: {why}"))?;
        }
        Ok(())
    }
}

fn check_row(
    row: DistributionRow<'_>,
    target: Option<u32>,
    temperatures: usize,
    seen: &mut SeenIds,
) -> Result<(), String> {
    if row.ids.len() != row.logprobs.len() {
        return Err(format!(
            "{} support ids have {} logprobs",
            row.ids.len(),
            row.logprobs.len()
        ));
    }
    if row.log_z_at.len() != temperatures {
        return Err(format!(
            "{} values of log_z_at, though the first row has {temperatures}",
            row.log_z_at.len()
        ));
    }
    if target.is_none_or(|id| !row.ids.contains(&id)) {
        return Err(match target {
            Some(id) => format!("the target token {id} is not in the support"),
            None => "there is no target token".into(),
        });
    }
    if let Some(id) = seen.repeated(row.ids) {
        return Err(format!("token {id} is twice in the support"));
    }
    check_numbers(row)
}

/// Checks the draws of a row. Every row whose tail has mass has the same number of draws, and the others have none.
fn check_draws(row: DistributionRow<'_>, expected: &mut Option<u64>) -> Result<(), String> {
    if row.draw_ids.len() != row.draw_counts.len() {
        return Err(format!(
            "{} drawn ids have {} counts",
            row.draw_ids.len(),
            row.draw_counts.len()
        ));
    }
    if !row.draw_ids.is_sorted_by(|a, b| a < b) {
        return Err("the drawn ids are not ascending".into());
    }
    if row.draw_counts.contains(&0) {
        return Err("a token is drawn 0 times".into());
    }
    let is_drawn = |id: &&u32| row.draw_ids.binary_search(id).is_ok();
    if !row.draw_ids.is_empty()
        && let Some(id) = row.ids.iter().find(is_drawn)
    {
        return Err(format!("token {id} of the support is drawn from the tail"));
    }
    let found = row.draw_counts.iter().map(|count| u64::from(*count)).sum();
    let expected = match row.tail_logprob > f32::NEG_INFINITY {
        true => *expected.get_or_insert(found),
        false => 0,
    };
    match found == expected {
        true => Ok(()),
        false => Err(format!(
            "{found} draws from the tail, and {expected} are expected"
        )),
    }
}

fn check_numbers(row: DistributionRow<'_>) -> Result<(), String> {
    if let Some(value) = row.logprobs.iter().find(|value| !value.is_finite()) {
        return Err(format!("a logprob is {value}"));
    }
    if !row.logprobs.is_sorted_by(|a, b| a >= b) {
        return Err("the support is not sorted by descending logprob".into());
    }
    if row.tail_logprob.is_nan() || row.tail_logprob == f32::INFINITY {
        return Err(format!("tail_logprob is {}", row.tail_logprob));
    }
    if !row.entropy.is_finite() {
        return Err(format!("entropy is {}", row.entropy));
    }
    if let Some(value) = row
        .log_z_at
        .iter()
        .flatten()
        .find(|value| !value.is_finite())
    {
        return Err(format!("a value of log_z_at is {value}"));
    }
    // The approximate mass decides, unless it is so close to the limit that its error matters.
    let tail = f64::from(row.tail_logprob).exp();
    let approximate: f32 = row
        .logprobs
        .iter()
        .map(|value| approximate_exp(*value))
        .sum();
    if f64::from(approximate) + tail < 1.0 + 0.5 * MASS_TOLERANCE {
        return Ok(());
    }
    let support: f64 = row
        .logprobs
        .iter()
        .map(|value| f64::from(*value).exp())
        .sum();
    let mass = support + tail;
    if mass > 1.0 + MASS_TOLERANCE {
        return Err(format!(
            "support and tail have a mass of {mass:.6}, which exceeds 1 by more than {MASS_TOLERANCE}"
        ));
    }
    Ok(())
}

/// Computes e^x with a relative error below 1e-5 for −80 ≤ x ≤ 1; smaller and larger arguments count as these bounds.
/// The compiler turns loops over this function into vector code, which it does not do for `exp`.
fn approximate_exp(x: f32) -> f32 {
    /// 1.5 · 2^23: a sum with it is rounded to whole numbers, which are then its low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-80.0, 1.0) * std::f32::consts::LOG2_E;
    let shifted = x + ROUND;
    let rest = (x - (shifted - ROUND)) * std::f32::consts::LN_2;
    // Taylor's series for |rest| ≤ ln 2 / 2, whose next term is at most 2.4e-6.
    let series =
        1.0 + rest * (1.0 + rest * (0.5 + rest * (1.0 / 6.0 + rest * (1.0 / 24.0 + rest / 120.0))));
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    f32::from_bits((series.to_bits() as i32).wrapping_add(exponent << 23) as u32)
}

/// Finds repeated ids in supports, in linear time and with memory for all rows together.
struct SeenIds {
    /// One bit for each id up to the largest; empty between two rows. `None` if the largest id is too large.
    bits: Option<Vec<u64>>,
    sorted: Vec<u32>,
}

impl SeenIds {
    /// Supports with larger ids are sorted instead. The bits of smaller ids take up to 512 KiB.
    const MOST_BITS: usize = 1 << 22;

    fn new(ids: &[u32]) -> SeenIds {
        let largest = ids.iter().copied().max().unwrap_or(0) as usize;
        SeenIds {
            bits: (largest < Self::MOST_BITS).then(|| vec![0; largest / 64 + 1]),
            sorted: Vec::new(),
        }
    }

    /// Returns an id that is more than once in `ids`, which must be among the ids given to [`Self::new`].
    fn repeated(&mut self, ids: &[u32]) -> Option<u32> {
        let Some(bits) = &mut self.bits else {
            self.sorted.clear();
            self.sorted.extend_from_slice(ids);
            self.sorted.sort_unstable();
            let next = self.sorted.iter().skip(1);
            let mut pairs = self.sorted.iter().zip(next);
            return pairs.find(|(a, b)| a == b).map(|(id, _)| *id);
        };
        let mut repeated = None;
        for id in ids {
            if let Some(word) = bits.get_mut(*id as usize / 64) {
                let bit = 1 << (id % 64);
                if *word & bit != 0 {
                    repeated = Some(*id);
                }
                *word |= bit;
            }
        }
        for id in ids {
            if let Some(word) = bits.get_mut(*id as usize / 64) {
                *word = 0;
            }
        }
        repeated
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::distributions::SignalRow;

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
            rows: [row([8, 1]), row([2, 9])].into_iter().collect(),
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

    /// Changes the distribution at `index`.
    #[track_caller]
    fn refused_row(index: usize, change: impl Fn(&mut SignalRow), why: &str) {
        let change_it = |at, row: &mut SignalRow| {
            if at == index {
                change(row);
            }
        };
        refused(|signal| signal.rows.change_rows(change_it), why);
    }

    #[test]
    fn a_valid_signal_passes() {
        let mut signal = signal();
        signal.validate().unwrap();
        assert_eq!(signal.loss_positions().collect::<Vec<_>>(), [1, 2]);
        // Rows without draws, and then a support that is the whole vocabulary with rounding up to the tolerance.
        signal
            .rows
            .change_rows(|_, row| (row.draw_ids, row.draw_counts) = (vec![], vec![]));
        signal.validate().unwrap();
        signal.rows.change_rows(|_, row| {
            row.tail_logprob = f32::NEG_INFINITY;
            row.logprobs = vec![0.7503_f32.ln(), 0.2503_f32.ln()];
        });
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
        refused_row(
            1,
            |row| row.ids.push(4),
            "position 2: 3 support ids have 2 logprobs",
        );
        refused_row(
            0,
            |row| row.ids = vec![1, 2],
            "position 1: the target token 8 is not in the support",
        );
        refused_row(
            1,
            |row| row.ids = vec![9, 9],
            "position 2: token 9 is twice in the support",
        );
        refused_row(
            1,
            |row| row.log_z_at = vec![],
            "position 2: 0 values of log_z_at, though the first row has 2",
        );
        refused_row(
            0,
            |row| row.logprobs[1] = f32::NEG_INFINITY,
            "position 1: a logprob is -inf",
        );
        refused_row(
            0,
            |row| row.logprobs[0] = f32::NAN,
            "position 1: a logprob is NaN",
        );
        refused_row(
            0,
            |row| row.logprobs.reverse(),
            "position 1: the support is not sorted by descending logprob",
        );
        refused_row(
            0,
            |row| row.tail_logprob = f32::NAN,
            "position 1: tail_logprob is NaN",
        );
        refused_row(
            0,
            |row| row.tail_logprob = f32::INFINITY,
            "position 1: tail_logprob is inf",
        );
        refused_row(
            0,
            |row| row.entropy = f32::INFINITY,
            "position 1: entropy is inf",
        );
        refused_row(
            1,
            |row| row.log_z_at[1] = Some(f32::NAN),
            "position 2: a value of log_z_at is NaN",
        );
        refused_row(
            0,
            |row| row.draw_ids.push(9),
            "position 1: 3 drawn ids have 2 counts",
        );
        refused_row(
            1,
            |row| row.draw_ids = vec![5, 5],
            "position 2: the drawn ids are not ascending",
        );
        refused_row(
            1,
            |row| row.draw_counts = vec![3, 0],
            "position 2: a token is drawn 0 times",
        );
        refused_row(
            1,
            |row| row.draw_ids = vec![3, 9],
            "position 2: token 9 of the support is drawn from the tail",
        );
        refused_row(
            1,
            |row| row.draw_counts[0] = 2,
            "position 2: 4 draws from the tail, and 3 are expected",
        );
        refused_row(
            1,
            |row| row.tail_logprob = f32::NEG_INFINITY,
            "position 2: 3 draws from the tail, and 0 are expected",
        );
        refused_row(
            0,
            |row| row.tail_logprob = 0.2515_f32.ln(),
            "position 1: support and tail have a mass of 1.001500, which exceeds 1 by more than 0.001",
        );
    }

    #[test]
    fn columns_that_do_not_fit_together_are_refused() {
        let why = "the columns of its distributions do not fit together";
        refused(|s| s.rows.entropy.truncate(1), why);
        refused(|s| s.rows.tail_logprob.push(0.0), why);
        refused(|s| s.rows.draw_ids.truncate(1), why);
        // A journal holds offsets as they were written.
        let broken = |offsets: &str| {
            let text = serde_json::to_string(&signal().rows).unwrap();
            let changed = text.replacen(r#""offsets":[0,2,4]"#, offsets, 1);
            assert_ne!(changed, text);
            serde_json::from_str(&changed).unwrap()
        };
        for offsets in [
            "[0,3,2]",
            "[1,2,4]",
            "[0,2,5]",
            "[0,2,3]",
            "[0,4000000000,4]",
        ] {
            let rows: Distributions = broken(&format!(r#""offsets":{offsets}"#));
            refused(|s| s.rows = rows, why);
        }
    }

    #[test]
    fn repeated_ids_are_found_whatever_their_size() {
        for large in [
            0,
            SeenIds::MOST_BITS as u32 - 100,
            SeenIds::MOST_BITS as u32,
            u32::MAX - 99,
        ] {
            let ids: Vec<u32> = (0..99).map(|id| large + id).collect();
            let mut seen = SeenIds::new(&ids);
            for _ in 0..2 {
                assert_eq!(seen.repeated(&ids), None);
                assert_eq!(seen.repeated(&[ids[9], ids[70], ids[9]]), Some(ids[9]));
            }
        }
    }

    #[test]
    fn the_approximate_exponential_is_close() {
        for step in -80_000..=1000 {
            let x = step as f32 / 1000.0;
            let (found, exact) = (f64::from(approximate_exp(x)), f64::from(x).exp());
            assert!(
                (found - exact).abs() < 1e-5 * exact,
                "{x}: {found}, {exact}"
            );
        }
        assert!(approximate_exp(f32::MIN) < 1e-30);
        assert!(approximate_exp(f32::MAX) > 2.7);
    }
}
