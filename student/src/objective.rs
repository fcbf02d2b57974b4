//! What a student is trained to make small: divergences from the teacher, cross-entropy on the text.

use potstill_datasets::Arm;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::loss::{Divergence, Tail};

/// A weighted sum of divergences and of the cross-entropy on the realised tokens, by row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Objective {
    /// Divergences from the teacher's distributions.
    pub divergences: Vec<Weighted>,
    /// Weight of the cross-entropy, which is taken at temperature 1.
    pub cross_entropy: f64,
    /// Share of the cross-entropy that is spread over the vocabulary.
    pub label_smoothing: f64,
    /// How divergences see the tokens that the teacher's record does not name.
    pub tail: Tail,
    /// Divides the logits of both sides under the divergences.
    pub temperature: f64,
    /// Whether the divergences are multiplied with the temperature's square (Hinton, Vinyals and Dean
    /// 2015, §2), so that their gradient keeps its size.
    pub temperature_squared: bool,
}

/// A divergence and its weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Weighted {
    /// Which.
    pub divergence: Divergence,
    /// What it is multiplied with, 0 or more.
    pub weight: f64,
}

impl Default for Objective {
    /// Forward KL to the coarse distribution.
    fn default() -> Self {
        Self::of(Divergence::ForwardKl)
    }
}

impl Objective {
    /// One divergence, at temperature 1, with the tail as one bucket.
    #[must_use]
    pub fn of(divergence: Divergence) -> Self {
        let weight = 1.0;
        Self {
            divergences: vec![Weighted { divergence, weight }],
            cross_entropy: 0.0,
            label_smoothing: 0.0,
            tail: Tail::Bucket,
            temperature: 1.0,
            temperature_squared: false,
        }
    }

    /// Forward KL and cross-entropy with these weights.
    #[must_use]
    pub fn mixed(forward_kl: f64, cross_entropy: f64) -> Self {
        let mut objective = Self {
            cross_entropy,
            ..Self::default()
        };
        objective.divergences[0].weight = forward_kl;
        objective
    }

    /// The objective of an arm: [`Arm::Sft`] puts all weight on the cross-entropy.
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

    /// What a divergence's row is multiplied with.
    pub(crate) fn weight(&self, term: &Weighted) -> f64 {
        match self.temperature_squared {
            true => term.weight * self.temperature * self.temperature,
            false => term.weight,
        }
    }

    /// Whether anything can be learned by it.
    pub(crate) fn is_empty(&self) -> bool {
        self.total() == 0.0
    }

    /// Checks that the parts go together.
    ///
    /// # Errors
    /// [`Error::NoLoss`] without a weight above 0; [`Error::BadObjective`] for a weight, temperature or
    /// smoothing out of range, for a custom divergence without its function, and for what weighted
    /// draws give no unbiased gradient of.
    pub fn check(&self) -> Result<(), Error> {
        let bad = |why: String| Err(Error::BadObjective { why });
        for (i, Weighted { divergence, weight }) in self.divergences.iter().enumerate() {
            let name = divergence.name();
            let earlier = self.divergences.iter().take(i);
            if earlier
                .into_iter()
                .any(|term| term.divergence.name() == name)
            {
                return bad(format!("{name} is there twice: add up the weights"));
            }
            if !(weight.is_finite() && *weight >= 0.0) {
                return bad(format!("the weight of {name} is {weight}"));
            }
            if let Divergence::Custom(custom) = divergence
                && custom.function.is_none()
            {
                return bad(format!(
                    "the divergence {name} has no function: a checkpoint does not hold it, so give it again"
                ));
            }
            if let Some(range) = divergence.out_of_range() {
                return bad(format!("of {name}, {range}"));
            }
            if self.tail == Tail::Draws && *weight > 0.0 && !divergence.works_on_draws() {
                return bad(format!(
                    "{name} has no unbiased gradient on draws: use forward_kl, or tail = \"bucket\""
                ));
            }
        }
        if self.tail == Tail::Draws && self.temperature != 1.0 {
            return bad(format!(
                "draws are of the distribution at temperature 1, and the loss has {}: use tail = \"bucket\"",
                self.temperature
            ));
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return bad(format!("the temperature is {}", self.temperature));
        }
        if !(0.0..=1.0).contains(&self.label_smoothing) {
            return bad(format!("label smoothing is {}", self.label_smoothing));
        }
        if !(self.cross_entropy.is_finite() && self.cross_entropy >= 0.0) {
            return bad(format!(
                "the weight of cross_entropy is {}",
                self.cross_entropy
            ));
        }
        match self.is_empty() {
            true => Err(Error::NoLoss),
            false => Ok(()),
        }
    }
}
