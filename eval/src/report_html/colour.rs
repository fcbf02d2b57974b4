//! Colours of the models.

use potstill_datasets::{Arm, RunModel};

/// Number of colours of the page, `--m0` to `--m7`.
pub(super) const COLOURS: usize = 8;

/// Returns the number of a model's colour, which is the same in every report.
pub(super) fn colour(model: RunModel) -> usize {
    match model {
        RunModel::Teacher => 0,
        RunModel::Base => 1,
        RunModel::Unigram => 7,
        RunModel::Trained(variant) => match variant.arm {
            Arm::Student => 2,
            Arm::Sft => 3,
            Arm::SameToken => 4,
            Arm::Smoothing => 5,
            Arm::Shuffled => 6,
        },
    }
}

/// Writes a small square of a colour.
pub(super) fn swatch(colour: usize) -> String {
    format!("<span class=\"swatch m{colour}\" aria-hidden=\"true\"></span>")
}
