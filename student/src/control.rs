//! The controls: models that are trained like the student except for one thing.

mod same_token;
mod shuffled;
mod smoothing;

use potstill_datasets::{Arm, Signal};

pub(crate) use shuffled::shuffle;

use same_token::SameTokenRows;
use smoothing::MeanEntropy;

/// Facts about the whole training set that a control needs, collected before the first step by reading every row once.
#[derive(Debug)]
pub(crate) enum ControlData {
    /// The arm needs nothing.
    Nothing,
    /// Distributions by target token, for [`Arm::SameToken`].
    SameToken(Box<SameTokenRows>),
    /// The teacher's mean entropy and the size of the vocabulary, for [`Arm::Smoothing`].
    Smoothing(MeanEntropy, usize),
}

impl ControlData {
    /// Creates the empty data of an arm.
    pub(crate) fn new(arm: Arm, seed: u64, vocab: usize) -> Self {
        match arm {
            Arm::SameToken => Self::SameToken(Box::new(SameTokenRows::new(seed, vocab))),
            Arm::Smoothing => Self::Smoothing(MeanEntropy::default(), vocab),
            Arm::Student | Arm::Sft | Arm::Shuffled => Self::Nothing,
        }
    }

    /// Whether the control needs the distributions of all rows before the first step.
    pub(crate) fn reads_rows(&self) -> bool {
        !matches!(self, Self::Nothing)
    }

    /// Takes a training row into account.
    pub(crate) fn read(&mut self, signal: &Signal) {
        match self {
            Self::Nothing => {}
            Self::SameToken(rows) => rows.read(signal),
            Self::Smoothing(entropy, _) => entropy.read(signal),
        }
    }

    /// Replaces the distributions of a training row, if the control does that. `order_position` is the number of
    /// sequences that were trained on before this one.
    pub(crate) fn replace_rows(&self, signal: &mut Signal, order_position: u64) {
        if let Self::SameToken(rows) = self {
            rows.replace_rows(signal, order_position);
        }
    }

    /// Number of training positions whose target token occurs in no other context, as far as [`Arm::SameToken`] keeps
    /// distributions.
    pub(crate) fn unique_positions(&self) -> u64 {
        match self {
            Self::SameToken(rows) => rows.unique_positions(),
            _ => 0,
        }
    }

    /// Label smoothing that gives the targets of [`Arm::Smoothing`] the teacher's mean entropy.
    pub(crate) fn label_smoothing(&self) -> Option<f64> {
        match self {
            Self::Smoothing(entropy, vocab) => Some(entropy.label_smoothing(*vocab)),
            _ => None,
        }
    }
}
