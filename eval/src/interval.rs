use serde::{Deserialize, Serialize};

/// A mean with its 95 % interval, in the metric's unit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Ratio of sums over all sequences.
    pub mean: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// Number of prompts that were resampled.
    pub prompts: usize,
}
