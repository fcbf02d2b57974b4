//! Colours of the models.

use potstill_datasets::RunModel;

use crate::report::Report;

/// Number of colours of the page, `--m0` to `--m6`. Colours repeat if there are more models.
pub(super) const COLOURS: usize = 7;

/// Returns the number of a model's colour: 0 for the teacher, and the position among the students for the others.
pub(super) fn colour(report: &Report, model: RunModel) -> usize {
    let position = report.students.iter().position(|s| s.name == model);
    position.map_or(0, |i| 1 + i % (COLOURS - 1))
}

/// Writes a small square of a colour.
pub(super) fn swatch(colour: usize) -> String {
    format!("<span class=\"swatch m{colour}\" aria-hidden=\"true\"></span>")
}
