//! `loss` of `[train]`.

use potstill_student::loss::Divergence;
use potstill_student::{Objective, WeightedDivergence};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::default_of;
use super::ranges::{Fraction, NonNegative, Positive, Share};

/// `loss` of `[train]`: weights, and what they are weights of. `docs/losses.md` says when to use which.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Loss {
    /// Weight of the forward KL from the teacher.
    #[serde(default = "zero", skip_serializing_if = "is_zero")]
    pub forward_kl: NonNegative,
    /// Weight of the reverse KL.
    #[serde(default = "zero", skip_serializing_if = "is_zero")]
    pub reverse_kl: NonNegative,
    /// Weight of the total variation.
    #[serde(default = "zero", skip_serializing_if = "is_zero")]
    pub total_variation: NonNegative,
    /// The generalised Jensen-Shannon divergence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jsd: Option<Jsd>,
    /// Forward KL to a student with some of the teacher mixed in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skew_kl: Option<Skew>,
    /// Reverse KL to a teacher with some of the student mixed in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skew_reverse_kl: Option<Skew>,
    /// Forward and reverse KL, each as much as the student is wrong where it matters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adaptive_kl: Option<Adaptive>,
    /// The α-divergence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha_divergence: Option<Alpha>,
    /// Weight of the cross-entropy of the teacher's text.
    #[serde(default = "zero", skip_serializing_if = "is_zero")]
    pub cross_entropy: NonNegative,
    /// Share of the cross-entropy that is spread over the vocabulary.
    #[serde(default = "no_share", skip_serializing_if = "is_no_share")]
    pub label_smoothing: Fraction,
    /// How divergences see the tokens that the signals do not name.
    #[serde(default, skip_serializing_if = "is_bucket")]
    pub tail: Tail,
    /// Divides the logits of teacher and student under the divergences; other than 1, it is one of the
    /// signals' `temperatures`.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub temperature: Positive,
    /// Multiply the divergences with the temperature's square.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub temperature_squared: bool,
}

impl Default for Loss {
    fn default() -> Self {
        Loss {
            forward_kl: weight(),
            reverse_kl: zero(),
            total_variation: zero(),
            jsd: None,
            skew_kl: None,
            skew_reverse_kl: None,
            adaptive_kl: None,
            alpha_divergence: None,
            cross_entropy: zero(),
            label_smoothing: no_share(),
            tail: Tail::Bucket,
            temperature: one(),
            temperature_squared: false,
        }
    }
}

impl Loss {
    /// Whether anything is learned from the teacher's distributions.
    pub fn has_divergence(&self) -> bool {
        self.divergences().next().is_some()
    }

    /// As the trainer takes it.
    pub fn objective(&self) -> Objective {
        Objective {
            divergences: self.divergences().collect(),
            cross_entropy: self.cross_entropy.get(),
            label_smoothing: self.label_smoothing.get(),
            tail: match self.tail {
                Tail::Bucket => potstill_student::loss::Tail::Bucket,
                Tail::Renormalize => potstill_student::loss::Tail::Renormalize,
                Tail::Ignore => potstill_student::loss::Tail::Ignore,
                Tail::Draws => potstill_student::loss::Tail::Draws,
            },
            temperature: self.temperature.get(),
            temperature_squared: self.temperature_squared,
        }
    }

    /// Those with a weight.
    fn divergences(&self) -> impl Iterator<Item = WeightedDivergence> {
        let named = [
            Some((Divergence::ForwardKl, self.forward_kl)),
            Some((Divergence::ReverseKl, self.reverse_kl)),
            Some((Divergence::TotalVariation, self.total_variation)),
            self.jsd.map(|jsd| {
                let beta = jsd.beta.get();
                (Divergence::Jsd { beta }, jsd.weight)
            }),
            self.skew_kl.map(|skew| {
                let alpha = skew.alpha.get();
                (Divergence::SkewKl { alpha }, skew.weight)
            }),
            self.skew_reverse_kl.map(|skew| {
                let alpha = skew.alpha.get();
                (Divergence::SkewReverseKl { alpha }, skew.weight)
            }),
            self.adaptive_kl.map(|adaptive| {
                let head_mass = adaptive.head_mass.get();
                (Divergence::AdaptiveKl { head_mass }, adaptive.weight)
            }),
            self.alpha_divergence.map(|of| {
                let alpha = of.alpha.get();
                (Divergence::Alpha { alpha }, of.weight)
            }),
        ];
        let weighted = named
            .into_iter()
            .flatten()
            .map(|(divergence, weight)| WeightedDivergence {
                divergence,
                weight: weight.get(),
            });
        weighted.filter(|term| term.weight > 0.0)
    }
}

/// `jsd` of `loss`
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Jsd {
    /// Its weight.
    #[serde(default = "weight")]
    pub weight: NonNegative,
    /// The teacher's share of the mixture: 0 is forward KL, 1 is reverse KL.
    pub beta: Fraction,
}

/// `skew_kl` and `skew_reverse_kl` of `loss`
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Skew {
    /// Its weight.
    #[serde(default = "weight")]
    pub weight: NonNegative,
    /// The share that is mixed in.
    pub alpha: Share,
}

/// `adaptive_kl` of `loss`
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Adaptive {
    /// Its weight.
    #[serde(default = "weight")]
    pub weight: NonNegative,
    /// Mass of the teacher's likeliest tokens that count as the head.
    #[serde(default = "half")]
    pub head_mass: Share,
}

/// `alpha_divergence` of `loss`
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Alpha {
    /// Its weight.
    #[serde(default = "weight")]
    pub weight: NonNegative,
    /// The teacher's exponent: 1 is forward KL, 0 is reverse KL.
    pub alpha: Fraction,
}

/// `tail` of `loss`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Tail {
    /// As one bucket with the mass that is left.
    #[default]
    Bucket,
    /// Not at all; both sides are made to sum to 1 on the others.
    Renormalize,
    /// Not at all; sums are cut.
    Ignore,
    /// By the tokens that were drawn from it (`tail_draws`): the whole distribution, on average.
    Draws,
}

fn zero() -> NonNegative {
    default_of(0.0)
}

fn weight() -> NonNegative {
    default_of(1.0)
}

fn half() -> Share {
    default_of(0.5)
}

fn one() -> Positive {
    default_of(1.0)
}

fn no_share() -> Fraction {
    default_of(0.0)
}

fn is_zero(value: &NonNegative) -> bool {
    *value == zero()
}

fn is_no_share(value: &Fraction) -> bool {
    *value == no_share()
}

fn is_one(value: &Positive) -> bool {
    *value == one()
}

fn is_bucket(tail: &Tail) -> bool {
    *tail == Tail::Bucket
}
