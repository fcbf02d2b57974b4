//! A global batch, ready for the model: the plan of one optimizer step.

use potstill_datasets::{Arm, Signal, pack};

use crate::control::shuffle;
use crate::error::Error;
use crate::micro_batch::MicroBatch;
use crate::objective::Objective;
use crate::settings::TrainSettings;
use crate::target::{Target, teacher_nll};

/// All sequences of one optimizer step, with their targets, divided into micro-batches. It holds no tensors, so another
/// thread may make it while the step before is computed.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Number of the step, counted from 1.
    pub step: u64,
    /// The objective of the arm that is trained.
    pub objective: Objective,
    /// Micro-batches in order. Each has up to `micro_batch` packed rows.
    pub micro_batches: Vec<MicroBatch>,
    /// Number of loss positions of all micro-batches.
    pub rows: usize,
    /// Number of tokens of all sequences, prompts included.
    pub tokens: usize,
    /// The teacher's negative log-likelihood of the target tokens, summed, nats.
    pub teacher_nll: f64,
    /// Number of rows whose stored mass was over 1 and was rescaled.
    pub rescaled_rows: usize,
    /// The sequences, from which rows that are not finite are found.
    pub signals: Vec<Signal>,
}

impl Batch {
    /// Plans a step. `vocab` is the number of the model's [tokens](potstill_model::Decoder::token_count); `step` seeds the
    /// permutation of [`Arm::Shuffled`]. For [`Arm::SameToken`] the signals already hold the distributions of the other
    /// positions, and for [`Arm::Smoothing`] `settings` already hold the label smoothing.
    ///
    /// # Errors
    /// A signal that breaks its rules, an id that is not below `vocab`, or an objective without a term.
    pub fn new(
        signals: Vec<Signal>,
        arm: Arm,
        settings: &TrainSettings,
        step: u64,
        vocab: usize,
    ) -> Result<Self, Error> {
        let objective = settings.objective.of_arm(arm);
        objective.check()?;
        let (mut targets, rescaled_rows) = targets(&signals, &objective, arm, settings, step)?;
        let rows = targets.iter().map(|target| target.rows.len()).sum();
        let mut micro_batches = Vec::new();
        let packed_rows = packed_rows(&signals, settings);
        for packed_rows in packed_rows.chunks(micro_batch_rows(packed_rows.len(), settings)) {
            let mut sequence =
                |&index: &usize| (&signals[index], std::mem::take(&mut targets[index]));
            let packed_row = |row: &Vec<usize>| row.iter().map(&mut sequence).collect();
            let packed_rows = packed_rows.iter().map(packed_row).collect();
            micro_batches.push(MicroBatch::packed(packed_rows, vocab)?);
        }
        Ok(Self {
            step,
            objective,
            micro_batches,
            rows,
            tokens: signals.iter().map(|signal| signal.token_ids.len()).sum(),
            teacher_nll: signals.iter().map(teacher_nll).sum(),
            rescaled_rows,
            signals,
        })
    }

    /// Weight of a loss position: each term is divided by the number of positions of the global batch.
    #[must_use]
    pub fn row_weight(&self) -> f64 {
        1.0 / self.rows.max(1) as f64
    }
}

/// Number of packed rows of a micro-batch: `micro_batch`, or fewer where all replicas then have as much to do.
fn micro_batch_rows(packed_rows: usize, settings: &TrainSettings) -> usize {
    let (most, replicas) = (settings.micro_batch.max(1), settings.replicas.max(1));
    match replicas {
        1 => most,
        _ => {
            let rounds = packed_rows.div_ceil(replicas * most).max(1);
            packed_rows.div_ceil(replicas * rounds).max(1)
        }
    }
}

/// Returns the targets of a global batch, one for each signal, and the number of rescaled rows.
pub(crate) fn targets(
    signals: &[Signal],
    objective: &Objective,
    arm: Arm,
    settings: &TrainSettings,
    step: u64,
) -> Result<(Vec<Target>, usize), Error> {
    let mut targets = Vec::with_capacity(signals.len());
    let mut rescaled_rows = 0;
    for signal in signals {
        let (target, rescaled) = Target::new(signal, objective.tail, objective.temperature)?;
        rescaled_rows += rescaled;
        targets.push(target);
    }
    if arm == Arm::Shuffled {
        shuffle(&mut targets, settings.seed, step);
    }
    Ok((targets, rescaled_rows))
}

/// Returns the indices of the sequences that share each packed row.
fn packed_rows(signals: &[Signal], settings: &TrainSettings) -> Vec<Vec<usize>> {
    if settings.packing {
        let lengths: Vec<usize> = signals.iter().map(|s| s.token_ids.len()).collect();
        pack(&lengths, settings.max_length)
    } else {
        (0..signals.len()).map(|index| vec![index]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_get_micro_batches_of_about_the_same_size() {
        let rows = |packed_rows, micro_batch, replicas| {
            let settings = TrainSettings {
                micro_batch,
                replicas,
                ..TrainSettings::default()
            };
            micro_batch_rows(packed_rows, &settings)
        };
        assert_eq!(rows(8, 4, 1), 4);
        assert_eq!(rows(8, 4, 2), 4);
        assert_eq!(rows(8, 4, 4), 2);
        assert_eq!(rows(12, 4, 2), 3);
        assert_eq!(rows(3, 4, 8), 1);
        assert_eq!(rows(0, 4, 2), 1);
        assert_eq!(rows(5, 1, 2), 1);
    }
}
