//! The divergences that settings can name, and divergences that a program brings.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::{
    adaptive_kl, alpha_divergence, forward_kl, jsd, reverse_kl, skew_kl, skew_reverse_kl,
    total_variation,
};

/// A divergence with its parameters. Each variant is computed by the function of the same name.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Divergence {
    /// D(teacher ‖ student).
    #[default]
    ForwardKl,
    /// D(student ‖ teacher).
    ReverseKl,
    /// Generalised Jensen–Shannon divergence.
    Jsd {
        /// Teacher's share β of the mixture; 0 is forward KL, 1 reverse KL.
        beta: f64,
    },
    /// Forward KL to a mixture of student and teacher.
    SkewKl {
        /// Teacher's share α of the mixture.
        alpha: f64,
    },
    /// Reverse KL to a mixture of teacher and student.
    SkewReverseKl {
        /// Student's share α of the mixture.
        alpha: f64,
    },
    /// Forward and reverse KL, weighted by the head's share of the student's error.
    AdaptiveKl {
        /// Mass μ of the teacher's likeliest buckets, which are the head.
        head_mass: f64,
    },
    /// Total variation distance: half the sum of absolute differences.
    TotalVariation,
    /// α-divergence; 1 is forward KL, 0 reverse KL.
    Alpha {
        /// Teacher's exponent α.
        alpha: f64,
    },
    /// A divergence that the program brings.
    Custom(CustomDivergence),
}

/// A divergence that the program brings.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CustomDivergence {
    /// Name in checkpoints and metrics.
    pub name: String,
    /// Function from log p and log q, both [n, k+1], to a loss for each row, `[n]`. Checkpoints do not hold the
    /// function, so a program that resumes sets it again.
    #[serde(skip)]
    pub function: Option<fn(Tensor<2>, Tensor<2>) -> Tensor<1>>,
}

impl PartialEq for CustomDivergence {
    /// Compares names, since functions cannot be compared.
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Divergence {
    /// Computes the loss of each row, `[n]`, from log p and log q, both [n, k+1]. NaN for a custom divergence
    /// without its function.
    #[must_use]
    pub fn rows(&self, log_p_nk: Tensor<2>, log_q_nk: Tensor<2>) -> Tensor<1> {
        match *self {
            Self::ForwardKl => forward_kl(log_p_nk, log_q_nk),
            Self::ReverseKl => reverse_kl(log_p_nk, log_q_nk),
            Self::Jsd { beta } => jsd(log_p_nk, log_q_nk, beta),
            Self::SkewKl { alpha } => skew_kl(log_p_nk, log_q_nk, alpha),
            Self::SkewReverseKl { alpha } => skew_reverse_kl(log_p_nk, log_q_nk, alpha),
            Self::AdaptiveKl { head_mass } => adaptive_kl(log_p_nk, log_q_nk, head_mass),
            Self::TotalVariation => total_variation(log_p_nk, log_q_nk),
            Self::Alpha { alpha } => alpha_divergence(log_p_nk, log_q_nk, alpha),
            Self::Custom(CustomDivergence {
                function: Some(function),
                ..
            }) => function(log_p_nk, log_q_nk),
            Self::Custom(CustomDivergence { function: None, .. }) => {
                forward_kl(log_p_nk, log_q_nk) * f64::NAN
            }
        }
    }

    /// Name in the run file and in metrics.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::ForwardKl => "forward_kl",
            Self::ReverseKl => "reverse_kl",
            Self::Jsd { .. } => "jsd",
            Self::SkewKl { .. } => "skew_kl",
            Self::SkewReverseKl { .. } => "skew_reverse_kl",
            Self::AdaptiveKl { .. } => "adaptive_kl",
            Self::TotalVariation => "total_variation",
            Self::Alpha { .. } => "alpha",
            Self::Custom(custom) => &custom.name,
        }
    }

    /// Describes a parameter that is out of range; `None` if the parameter is in range.
    pub(crate) fn out_of_range(&self) -> Option<String> {
        let inside = |value: f64| value > 0.0 && value < 1.0;
        match *self {
            Self::Jsd { beta } if !(0.0..=1.0).contains(&beta) => {
                Some(format!("beta is {beta}, which is not from 0 to 1"))
            }
            Self::SkewKl { alpha } | Self::SkewReverseKl { alpha } if !inside(alpha) => {
                Some(format!("alpha is {alpha}, which is not between 0 and 1"))
            }
            Self::AdaptiveKl { head_mass } if !inside(head_mass) => Some(format!(
                "head_mass is {head_mass}, which is not between 0 and 1"
            )),
            Self::Alpha { alpha } if !(0.0..=1.0).contains(&alpha) => {
                Some(format!("alpha is {alpha}, which is not from 0 to 1"))
            }
            _ => None,
        }
    }

    /// Whether weighted draws give an unbiased gradient, which they do if the divergence's gradient is linear in p.
    #[must_use]
    pub fn works_on_draws(&self) -> bool {
        matches!(self, Self::ForwardKl)
    }
}
