//! The choice of a learning rate for each arm, and its file.

use anyhow::bail;
use potstill_datasets::SequenceValues;
use potstill_eval::Metric;
use serde::{Deserialize, Serialize};

/// Content of `tuning.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Choice {
    /// Metric by which the rates were chosen: KL, or NLL without distributions.
    pub(super) metric: Metric,
    /// All rates of all arms, in the order of the run file.
    pub(super) rates: Vec<TriedRate>,
}

/// A learning rate that was tried for an arm.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct TriedRate {
    /// Name of the arm.
    pub(super) arm: String,
    /// Largest learning rate of the training.
    pub(super) learning_rate: f64,
    /// Folder of the training, below the run directory.
    pub(super) training: String,
    /// Figure on dev, nats per token; `None` if the training diverged.
    pub(super) dev: Option<f64>,
    /// Whether the arm is trained at this rate.
    pub(super) chosen: bool,
}

/// Mean of a metric over the tokens of dev, nats per token.
pub(super) fn mean(values: &[SequenceValues], metric: Metric) -> f64 {
    let tokens: f64 = values.iter().map(|v| f64::from(v.tokens)).sum();
    metric.total(values) / tokens
}

/// Marks the rate of an arm with the lowest figure, the first one if several are equal.
pub(super) fn choose_lowest(rates: &mut [TriedRate], arm: &str) -> anyhow::Result<()> {
    let of_arm = rates.iter_mut().filter(|tried| tried.arm == arm);
    let lowest = of_arm.filter(|tried| tried.dev.is_some()).min_by(|a, b| {
        a.dev
            .partial_cmp(&b.dev)
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    match lowest {
        Some(tried) => tried.chosen = true,
        None => bail!(
            "`{arm}` diverged at every learning rate\nhint: name lower rates in `learning_rates` of [train]"
        ),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tried(arm: &str, learning_rate: f64, dev: Option<f64>) -> TriedRate {
        TriedRate {
            arm: arm.to_owned(),
            learning_rate,
            training: String::new(),
            dev,
            chosen: false,
        }
    }

    #[test]
    fn each_arm_keeps_the_rate_with_the_lowest_figure() {
        let mut rates = [
            tried("student", 1e-3, Some(0.5)),
            tried("student", 2e-3, Some(0.25)),
            tried("student", 4e-3, Some(0.25)),
            tried("student", 8e-3, None),
            tried("sft", 1e-3, Some(0.1)),
            tried("sft", 2e-3, Some(0.3)),
            tried("shuffled", 1e-3, None),
        ];
        choose_lowest(&mut rates, "student").unwrap();
        choose_lowest(&mut rates, "sft").unwrap();
        let chosen: Vec<bool> = rates.iter().map(|tried| tried.chosen).collect();
        assert_eq!(chosen, [false, true, false, false, true, false, false]);
        let error = choose_lowest(&mut rates, "shuffled").unwrap_err();
        assert!(error.to_string().starts_with("`shuffled` diverged"));
    }
}
