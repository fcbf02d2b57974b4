//! The objective that training minimises: divergences from the teacher and cross-entropy on the text.

use potstill_datasets::Arm;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::loss::{CustomDivergence, Divergence, Tail};

/// A weighted sum of divergences and of the cross-entropy on the target tokens, for each row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Objective {
    /// Divergences from the teacher's distributions.
    pub divergences: Vec<WeightedDivergence>,
    /// Weight of the cross-entropy, which is taken at temperature 1.
    pub cross_entropy: f64,
    /// Share of the cross-entropy that is spread over the vocabulary.
    pub label_smoothing: f64,
    /// Treatment of the tail in the divergences.
    pub tail: Tail,
    /// Temperature that divides the logits of teacher and student in the divergences.
    pub temperature: f64,
    /// Whether the divergences are multiplied by the square of the temperature (Hinton, Vinyals and Dean
    /// 2015, §2), so that the size of their gradient does not change with the temperature.
    pub temperature_squared: bool,
}

/// A divergence and its weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WeightedDivergence {
    /// The divergence.
    pub divergence: Divergence,
    /// Weight in the sum, 0 or more.
    pub weight: f64,
}

impl Default for Objective {
    /// Forward KL on the coarse vocabulary.
    fn default() -> Self {
        Self::of(Divergence::ForwardKl)
    }
}

impl Objective {
    /// Returns the objective of one divergence, at temperature 1, with the tail as one bucket.
    #[must_use]
    pub fn of(divergence: Divergence) -> Self {
        let weight = 1.0;
        Self {
            divergences: vec![WeightedDivergence { divergence, weight }],
            cross_entropy: 0.0,
            label_smoothing: 0.0,
            tail: Tail::Bucket,
            temperature: 1.0,
            temperature_squared: false,
        }
    }

    /// Returns the objective of forward KL and cross-entropy with these weights.
    #[must_use]
    pub fn mixed(forward_kl: f64, cross_entropy: f64) -> Self {
        let mut objective = Self {
            cross_entropy,
            ..Self::default()
        };
        objective.divergences[0].weight = forward_kl;
        objective
    }

    /// Returns the objective that an arm minimises: [`Arm::Sft`] puts all weight on the cross-entropy.
    pub(crate) fn of_arm(&self, arm: Arm) -> Self {
        let mut objective = self.clone();
        if arm == Arm::Sft {
            objective.cross_entropy = self.total();
            objective.divergences.clear();
        }
        objective
    }

    /// Sum of all weights.
    fn total(&self) -> f64 {
        let divergences: f64 = self.divergences.iter().map(|term| term.weight).sum();
        divergences + self.cross_entropy
    }

    /// Factor of a divergence's rows in the loss.
    pub(crate) fn weight(&self, term: &WeightedDivergence) -> f64 {
        match self.temperature_squared {
            true => term.weight * self.temperature * self.temperature,
            false => term.weight,
        }
    }

    /// Whether all weights are 0.
    pub(crate) fn is_empty(&self) -> bool {
        self.total() == 0.0
    }

    /// Checks every value, and that the parts do not contradict one another.
    ///
    /// # Errors
    /// [`Error::NoLoss`] without a weight above 0; [`Error::InvalidObjective`] for a weight, temperature or
    /// smoothing out of range, for a custom divergence without its function, and for a divergence whose
    /// gradient on weighted draws is biased.
    pub fn check(&self) -> Result<(), Error> {
        for (i, term) in self.divergences.iter().enumerate() {
            self.check_divergence(term)?;
            let name = term.divergence.name();
            let mut earlier = self.divergences.iter().take(i);
            if earlier.any(|term| term.divergence.name() == name) {
                return invalid(format!(
                    "{name} is there twice\nhint: give it once, with the sum of the weights"
                ));
            }
        }
        check_weight("cross_entropy", self.cross_entropy)?;
        let temperature = self.temperature;
        if self.tail == Tail::Draws && temperature != 1.0 {
            return invalid(format!(
                "tail draws are taken at temperature 1, and the loss has temperature {temperature}\n\
                 hint: set tail = \"bucket\""
            ));
        }
        if !(temperature.is_finite() && temperature > 0.0) {
            return invalid(format!(
                "the temperature is {temperature}\nhint: a temperature is a number above 0"
            ));
        }
        if !(0.0..=1.0).contains(&self.label_smoothing) {
            return invalid(format!(
                "label smoothing is {}\nhint: label smoothing is from 0 to 1",
                self.label_smoothing
            ));
        }
        match self.is_empty() {
            true => Err(Error::NoLoss),
            false => Ok(()),
        }
    }

    fn check_divergence(&self, term: &WeightedDivergence) -> Result<(), Error> {
        let WeightedDivergence { divergence, weight } = term;
        let name = divergence.name();
        check_weight(name, *weight)?;
        if let Divergence::Custom(CustomDivergence { function: None, .. }) = divergence {
            return invalid(format!(
                "the divergence {name} has no function\n\
                 hint: a checkpoint does not hold the function, so set it again before training"
            ));
        }
        if let Some(problem) = divergence.out_of_range() {
            return invalid(format!("{name}: {problem}"));
        }
        if self.tail == Tail::Draws && *weight > 0.0 && !divergence.works_on_draws() {
            return invalid(format!(
                "the gradient of {name} on draws is biased\nhint: use forward_kl, or tail = \"bucket\""
            ));
        }
        Ok(())
    }
}

fn check_weight(name: &str, weight: f64) -> Result<(), Error> {
    if weight.is_finite() && weight >= 0.0 {
        return Ok(());
    }
    invalid(format!(
        "the weight of {name} is {weight}\nhint: a weight is a number from 0 up"
    ))
}

fn invalid(reason: String) -> Result<(), Error> {
    Err(Error::InvalidObjective { reason })
}
