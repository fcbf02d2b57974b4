//! The guard of a training: what is done with a step whose loss or gradient is not finite, or whose gradient jumps.

use potstill_datasets::range::{CountOrZero, Positive, Share};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Treatment of a loss that is not finite or that jumps: the table `[train.guard]` of the run file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GuardSettings {
    /// Steps that may be skipped in a row because their loss or gradient is not finite or jumps. After that, training goes
    /// back to the last checkpoint.
    #[serde(with = "CountOrZero")]
    pub skips: u64,
    /// Number of times that training may go back to a checkpoint before it stops with an error.
    #[serde(with = "CountOrZero")]
    pub returns: u64,
    /// Factor on the learning rate after each return.
    #[serde(with = "Share")]
    pub rate_factor: f64,
    /// A step jumps if its gradient norm is more than this many times the running mean of the norms.
    #[serde(with = "Positive")]
    pub spike: f64,
}

impl Default for GuardSettings {
    fn default() -> Self {
        Self {
            skips: 3,
            returns: 2,
            rate_factor: 0.5,
            spike: 100.0,
        }
    }
}

/// Steps that must have been made before a gradient norm can count as a jump.
const FIRST_STEPS: u64 = 3;
/// Number of steps over which the mean of the norms runs.
const MEAN_STEPS: u64 = 50;

/// Treatment of a step with a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Leave weights and optimizer as they are, and go on with the next batch.
    Skip,
    /// Go back to the checkpoint after this step.
    Return(u64),
    /// Stop with an error.
    Stop,
}

/// A fault of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fault {
    /// The loss or the gradient norm is NaN or infinite.
    NotFinite {
        /// The quantity that is at fault.
        quantity: &'static str,
        /// Its value.
        value: f64,
    },
    /// The gradient norm is far above the norms before.
    Jump {
        /// The gradient norm.
        norm: f64,
        /// Mean of the norms before.
        mean: f64,
    },
}

/// The guard's memory of the steps so far. Part of a checkpoint, so that a training that is resumed decides as the
/// one that was not interrupted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Guard {
    /// Number of steps that were made.
    steps: u64,
    /// Running mean of their gradient norms. An f32 is the same after it was written as text and read back.
    mean_norm: f32,
    /// Number of steps that were skipped since the last one that was made.
    skipped: u64,
    /// Number of returns to a checkpoint.
    returns: u64,
    /// Step of the last checkpoint that is not from the middle of skipped steps, to which training returns.
    checkpoint: Option<u64>,
}

impl Guard {
    /// Finds what is wrong with a step.
    pub(crate) fn fault(&self, loss: f64, norm: f64, settings: &GuardSettings) -> Option<Fault> {
        let quantities = [("loss", loss), ("gradient norm", norm)];
        let bad = quantities.into_iter().find(|(_, value)| !value.is_finite());
        if let Some((quantity, value)) = bad {
            return Some(Fault::NotFinite { quantity, value });
        }
        let mean = f64::from(self.mean_norm);
        let jumps = self.steps >= FIRST_STEPS && norm > settings.spike * mean && mean > 0.0;
        jumps.then_some(Fault::Jump { norm, mean })
    }

    /// Counts a step without a fault.
    pub(crate) fn made(&mut self, norm: f64) {
        self.steps += 1;
        self.skipped = 0;
        let weight = 1.0 / self.steps.min(MEAN_STEPS) as f64;
        let mean = f64::from(self.mean_norm);
        self.mean_norm = (mean + (norm - mean) * weight) as f32;
    }

    /// Decides what is done about a step with a fault. `can_skip` is whether other rows could do better.
    pub(crate) fn decide(&mut self, can_skip: bool, settings: &GuardSettings) -> Action {
        if can_skip && self.skipped < settings.skips {
            self.skipped += 1;
            return Action::Skip;
        }
        match self.checkpoint {
            Some(step) if self.returns < settings.returns => {
                self.returns += 1;
                self.skipped = 0;
                Action::Return(step)
            }
            _ => Action::Stop,
        }
    }

    /// Factor on the learning rate.
    pub(crate) fn rate_factor(&self, settings: &GuardSettings) -> f64 {
        (0..self.returns).map(|_| settings.rate_factor).product()
    }

    /// Notes that a checkpoint is about to be saved after `step`. One that is saved because the program is stopped does not
    /// count: a training that is not interrupted would not have it.
    pub(crate) fn will_save(&mut self, step: u64, every: u64) {
        if self.skipped == 0 && step.is_multiple_of(every.max(1)) {
            self.checkpoint = Some(step);
        }
    }

    /// Step of the checkpoint to which training returns.
    pub(crate) fn checkpoint(&self) -> Option<u64> {
        self.checkpoint
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: GuardSettings = GuardSettings {
        skips: 2,
        returns: 1,
        rate_factor: 0.5,
        spike: 10.0,
    };

    /// Returns what is done about a step, if anything is.
    fn step(guard: &mut Guard, norm: f64) -> Option<Action> {
        match guard.fault(1.0, norm, &SETTINGS) {
            Some(_) => Some(guard.decide(true, &SETTINGS)),
            None => {
                guard.made(norm);
                None
            }
        }
    }

    #[test]
    fn faults_are_skipped_then_answered_by_a_return_and_then_by_an_error() {
        let mut guard = Guard::default();
        // The first norms have nothing to be compared with.
        for norm in [0.1, 50.0, 1.0] {
            assert_eq!(step(&mut guard, norm), None);
        }
        guard.will_save(3, 3);
        guard.will_save(4, 3);
        assert_eq!(step(&mut guard, 1e4), Some(Action::Skip));
        assert_eq!(step(&mut guard, f64::NAN), Some(Action::Skip));
        // A step that is made ends a row of skipped ones.
        assert_eq!(step(&mut guard, 2.0), None);
        assert_eq!(step(&mut guard, 1e4), Some(Action::Skip));
        guard.will_save(6, 3);
        assert_eq!(step(&mut guard, f64::INFINITY), Some(Action::Skip));
        assert_eq!(guard.rate_factor(&SETTINGS), 1.0);
        assert_eq!(step(&mut guard, 1e4), Some(Action::Return(3)));
        assert_eq!(guard.rate_factor(&SETTINGS), 0.5);
        assert_eq!(step(&mut guard, 1e4), Some(Action::Skip));
        assert_eq!(step(&mut guard, 1e4), Some(Action::Skip));
        assert_eq!(step(&mut guard, 1e4), Some(Action::Stop));
    }

    #[test]
    fn without_a_checkpoint_nothing_can_be_gone_back_to() {
        let mut guard = Guard::default();
        let actions: Vec<Action> = (0..3).filter_map(|_| step(&mut guard, f64::NAN)).collect();
        assert_eq!(actions, [Action::Skip, Action::Skip, Action::Stop]);
        // Where no rows could do better, nothing is skipped.
        assert_eq!(Guard::default().decide(false, &SETTINGS), Action::Stop);
    }
}
