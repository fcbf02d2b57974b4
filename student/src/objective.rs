//! The objective of a training: weighted divergences from the teacher, and cross-entropy on the text.

use potstill_datasets::Arm;
use potstill_datasets::range::{Fraction, NonNegative, Positive, Share};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::Error;
use crate::loss::{CustomDivergence, Divergence, Tail};

/// Weighted sum of divergences and cross-entropy, by row: `loss` of `[train]`. `docs/losses.md` says which loss suits
/// which case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Objective {
    /// Weight of the forward KL divergence.
    #[serde(with = "NonNegative", default, skip_serializing_if = "is_zero")]
    pub forward_kl: f64,
    /// Weight of the reverse KL divergence.
    #[serde(with = "NonNegative", default, skip_serializing_if = "is_zero")]
    pub reverse_kl: f64,
    /// Weight of the total variation.
    #[serde(with = "NonNegative", default, skip_serializing_if = "is_zero")]
    pub total_variation: f64,
    /// Generalised Jensen-Shannon divergence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jsd: Option<Jsd>,
    /// Forward KL divergence to a mixture of the student and a share of the teacher.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skew_kl: Option<Skew>,
    /// Reverse KL divergence to a mixture of the teacher and a share of the student.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skew_reverse_kl: Option<Skew>,
    /// Forward and reverse KL divergence, weighted at each position by the student's errors on the head and on the tail.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adaptive_kl: Option<AdaptiveKl>,
    /// α-divergence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha_divergence: Option<AlphaDivergence>,
    /// Weight of the cross-entropy on the text, at temperature 1.
    #[serde(with = "NonNegative", default, skip_serializing_if = "is_zero")]
    pub cross_entropy: f64,
    /// Share of the cross-entropy that is spread over the whole vocabulary.
    #[serde(with = "Fraction", default, skip_serializing_if = "is_zero")]
    pub label_smoothing: f64,
    /// Treatment, in divergences, of the tokens outside the support.
    #[serde(default, skip_serializing_if = "is_bucket")]
    pub tail: Tail,
    /// Temperature of the divergences: divides the logits of teacher and student. A temperature other than 1 must be one
    /// of the `temperatures` of the signals.
    #[serde(with = "Positive", default = "one", skip_serializing_if = "is_one")]
    pub temperature: f64,
    /// Whether to multiply the divergences by the square of the temperature (Hinton, Vinyals and Dean 2015, §2), so that
    /// their gradient keeps its size.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub temperature_squared: bool,
    /// Divergences that a program adds. A run file cannot name them.
    #[serde(skip)]
    pub custom: Vec<WeightedDivergence>,
}

/// `jsd` of `loss`
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Jsd {
    /// Weight of this divergence.
    #[serde(with = "NonNegative", default = "one")]
    pub weight: f64,
    /// The teacher's share of the mixture: 0 gives forward KL, 1 gives reverse KL.
    #[serde(with = "Fraction")]
    pub beta: f64,
}

/// `skew_kl` and `skew_reverse_kl` of `loss`
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Skew {
    /// Weight of this divergence.
    #[serde(with = "NonNegative", default = "one")]
    pub weight: f64,
    /// Share that is mixed in.
    #[serde(with = "Share")]
    pub alpha: f64,
}

/// `adaptive_kl` of `loss`
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AdaptiveKl {
    /// Weight of this divergence.
    #[serde(with = "NonNegative", default = "one")]
    pub weight: f64,
    /// Probability mass of the teacher's most likely tokens that form the head.
    #[serde(with = "Share", default = "half")]
    pub head_mass: f64,
}

/// `alpha_divergence` of `loss`
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AlphaDivergence {
    /// Weight of this divergence.
    #[serde(with = "NonNegative", default = "one")]
    pub weight: f64,
    /// The teacher's exponent: 1 gives forward KL, 0 gives reverse KL.
    #[serde(with = "Fraction")]
    pub alpha: f64,
}

fn one() -> f64 {
    1.0
}

fn half() -> f64 {
    0.5
}

fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

fn is_one(value: &f64) -> bool {
    *value == 1.0
}

fn is_bucket(tail: &Tail) -> bool {
    *tail == Tail::Bucket
}

/// A divergence and its weight.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WeightedDivergence {
    /// The divergence.
    pub divergence: Divergence,
    /// Weight of the divergence in the objective, 0 or more.
    pub weight: f64,
}

impl Default for Objective {
    /// Forward KL to the coarse distribution.
    fn default() -> Self {
        Self::mixed(1.0, 0.0)
    }
}

impl Objective {
    /// One divergence, at temperature 1, with the tail as one bucket.
    #[must_use]
    pub fn of(divergence: Divergence) -> Self {
        Self::mixed(0.0, 0.0).with(divergence, 1.0)
    }

    /// Forward KL and cross-entropy with these weights.
    #[must_use]
    pub fn mixed(forward_kl: f64, cross_entropy: f64) -> Self {
        Self {
            forward_kl,
            reverse_kl: 0.0,
            total_variation: 0.0,
            jsd: None,
            skew_kl: None,
            skew_reverse_kl: None,
            adaptive_kl: None,
            alpha_divergence: None,
            cross_entropy,
            label_smoothing: 0.0,
            tail: Tail::Bucket,
            temperature: 1.0,
            temperature_squared: false,
            custom: Vec::new(),
        }
    }

    /// Sets the weight of a divergence. A divergence of the same kind is replaced; custom divergences are added.
    #[must_use]
    pub fn with(mut self, divergence: Divergence, weight: f64) -> Self {
        match divergence {
            Divergence::ForwardKl => self.forward_kl = weight,
            Divergence::ReverseKl => self.reverse_kl = weight,
            Divergence::TotalVariation => self.total_variation = weight,
            Divergence::Jsd { beta } => self.jsd = Some(Jsd { weight, beta }),
            Divergence::SkewKl { alpha } => self.skew_kl = Some(Skew { weight, alpha }),
            Divergence::SkewReverseKl { alpha } => {
                self.skew_reverse_kl = Some(Skew { weight, alpha });
            }
            Divergence::AdaptiveKl { head_mass } => {
                self.adaptive_kl = Some(AdaptiveKl { weight, head_mass });
            }
            Divergence::Alpha { alpha } => {
                self.alpha_divergence = Some(AlphaDivergence { weight, alpha });
            }
            Divergence::Custom(_) => self.custom.push(WeightedDivergence { divergence, weight }),
        }
        self
    }

    /// Returns the divergences whose weight is not 0, in a fixed order.
    #[must_use]
    pub fn divergences(&self) -> Vec<WeightedDivergence> {
        let skew = |skew: Option<Skew>, kind: fn(f64) -> Divergence| {
            skew.map(|skew| (kind(skew.alpha), skew.weight))
        };
        let built_in = [
            Some((Divergence::ForwardKl, self.forward_kl)),
            Some((Divergence::ReverseKl, self.reverse_kl)),
            Some((Divergence::TotalVariation, self.total_variation)),
            self.jsd
                .map(|Jsd { weight, beta }| (Divergence::Jsd { beta }, weight)),
            skew(self.skew_kl, |alpha| Divergence::SkewKl { alpha }),
            skew(self.skew_reverse_kl, |alpha| Divergence::SkewReverseKl {
                alpha,
            }),
            self.adaptive_kl.map(|AdaptiveKl { weight, head_mass }| {
                (Divergence::AdaptiveKl { head_mass }, weight)
            }),
            self.alpha_divergence
                .map(|AlphaDivergence { weight, alpha }| (Divergence::Alpha { alpha }, weight)),
        ];
        let built_in = built_in.into_iter().flatten();
        let built_in =
            built_in.map(|(divergence, weight)| WeightedDivergence { divergence, weight });
        let all = built_in.chain(self.custom.iter().cloned());
        all.filter(|term| term.weight != 0.0).collect()
    }

    /// Number of terms whose weight is not 0.
    pub(crate) fn terms(&self) -> usize {
        self.divergences().len() + usize::from(self.cross_entropy > 0.0)
    }

    /// Whether the teacher's distributions have any weight.
    #[must_use]
    pub fn has_divergence(&self) -> bool {
        !self.divergences().is_empty()
    }

    /// Returns the objective in the form of checkpoints, manifests and their keys.
    pub(crate) fn identity(&self) -> Value {
        json!({
            "divergences": self.divergences(),
            "cross_entropy": self.cross_entropy,
            "label_smoothing": self.label_smoothing,
            "tail": self.tail,
            "temperature": self.temperature,
            "temperature_squared": self.temperature_squared,
        })
    }

    /// Returns the objective of an arm: [`Arm::Sft`] and [`Arm::Smoothing`] put all weight on the cross-entropy.
    /// The trainer sets the label smoothing of [`Arm::Smoothing`].
    pub(crate) fn of_arm(&self, arm: Arm) -> Self {
        match arm {
            Arm::Sft | Arm::Smoothing => Self {
                label_smoothing: self.label_smoothing,
                tail: self.tail,
                temperature: self.temperature,
                temperature_squared: self.temperature_squared,
                ..Self::mixed(0.0, self.total())
            },
            Arm::Student | Arm::SameToken | Arm::Shuffled => self.clone(),
        }
    }

    /// Sum of all weights.
    fn total(&self) -> f64 {
        let divergences: f64 = self.divergences().iter().map(|term| term.weight).sum();
        divergences + self.cross_entropy
    }

    /// Factor of a divergence's value in the loss.
    pub(crate) fn weight(&self, term: &WeightedDivergence) -> f64 {
        match self.temperature_squared {
            true => term.weight * self.temperature * self.temperature,
            false => term.weight,
        }
    }

    /// Whether all weights are 0, so that nothing can be learned.
    pub(crate) fn is_empty(&self) -> bool {
        self.total() == 0.0
    }

    /// Returns the rules between keys that this objective breaks: for each rule the key, and a message with a hint on a
    /// line of its own. The key is empty if the rule is about the whole objective.
    #[must_use]
    pub fn broken_rules(&self) -> Vec<(&'static str, String)> {
        let mut broken = Vec::new();
        if self.is_empty() {
            broken.push(("", "every weight is 0, so nothing can be learned\nhint: give `forward_kl` or `cross_entropy` a weight".to_owned()));
        }
        if self.tail != Tail::Draws {
            return broken;
        }
        if self.temperature != 1.0 {
            broken.push(("temperature", format!(
                "tail draws are from the distribution at temperature 1, and the temperature is {}\nhint: leave `temperature` out, or set `tail = \"bucket\"`",
                self.temperature
            )));
        }
        let biased = self.divergences();
        let biased = biased.iter().find(|term| !term.divergence.works_on_draws());
        if let Some(term) = biased {
            broken.push(("tail", format!(
                "{} has no unbiased gradient on tail draws\nhint: use `forward_kl` as the only divergence, or set `tail = \"bucket\"`",
                term.divergence.name()
            )));
        }
        broken
    }

    /// Checks the objective.
    ///
    /// # Errors
    /// [`Error::NoLoss`] without a weight above 0; [`Error::InvalidObjective`] for a weight, temperature or
    /// smoothing out of range, for a custom divergence without its function or with the name of another
    /// divergence, and for a rule of [`broken_rules`](Self::broken_rules).
    pub fn check(&self) -> Result<(), Error> {
        let terms = self.divergences();
        for (i, term) in terms.iter().enumerate() {
            let name = term.divergence.name();
            if terms[..i].iter().any(|term| term.divergence.name() == name) {
                return invalid(format!(
                    "two divergences are named {name}\nhint: add up their weights, or rename the custom one"
                ));
            }
            term.check()?;
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return invalid(format!("the temperature is {}", self.temperature));
        }
        if !(0.0..=1.0).contains(&self.label_smoothing) {
            return invalid(format!("the label smoothing is {}", self.label_smoothing));
        }
        if !(self.cross_entropy.is_finite() && self.cross_entropy >= 0.0) {
            return invalid(format!(
                "the weight of cross_entropy is {}",
                self.cross_entropy
            ));
        }
        if self.is_empty() {
            return Err(Error::NoLoss);
        }
        match self.broken_rules().into_iter().next() {
            Some((_, reason)) => invalid(reason),
            None => Ok(()),
        }
    }
}

impl WeightedDivergence {
    fn check(&self) -> Result<(), Error> {
        let Self { divergence, weight } = self;
        let name = divergence.name();
        if !(weight.is_finite() && *weight > 0.0) {
            return invalid(format!("the weight of {name} is {weight}"));
        }
        if let Divergence::Custom(CustomDivergence { function: None, .. }) = divergence {
            return invalid(format!(
                "the divergence {name} has no function, because a checkpoint does not hold it\nhint: set `function` again"
            ));
        }
        match divergence.out_of_range() {
            Some(problem) => invalid(format!("{name}: {problem}")),
            None => Ok(()),
        }
    }
}

fn invalid(reason: String) -> Result<(), Error> {
    Err(Error::InvalidObjective { reason })
}
