//! The divergences as a closed set for settings, and a door for others.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::{
    adaptive_kl, alpha_divergence, forward_kl, jsd, reverse_kl, skew_kl, skew_reverse_kl,
    total_variation,
};

/// Which divergence, with its parameters; each is the function of the same name.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Divergence {
    /// D(teacher ‖ student).
    #[default]
    ForwardKl,
    /// D(student ‖ teacher).
    ReverseKl,
    /// Generalised Jensen–Shannon.
    Jsd {
        /// The teacher's share of the mixture; 0 is forward KL, 1 reverse KL.
        beta: f64,
    },
    /// Forward KL to the student with some of the teacher mixed in.
    SkewKl {
        /// The teacher's share.
        alpha: f64,
    },
    /// Reverse KL to the teacher with some of the student mixed in.
    SkewReverseKl {
        /// The student's share.
        alpha: f64,
    },
    /// Forward and reverse KL, weighted by where the student is wrong.
    AdaptiveKl {
        /// Mass of the teacher's likeliest buckets that are the head.
        head_mass: f64,
    },
    /// Half the sum of absolute differences.
    TotalVariation,
    /// α-divergence; 1 is forward KL, 0 reverse KL.
    Alpha {
        /// The teacher's exponent.
        alpha: f64,
    },
    /// A program's own.
    Custom(Custom),
}

/// A divergence that a program brings: log p and log q, both [n, k+1], to a loss by row, `[n]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Custom {
    /// As in checkpoints and metrics.
    pub name: String,
    /// The function. A checkpoint doesn't hold it, so a program that resumes gives it again.
    #[serde(skip)]
    pub function: Option<fn(Tensor<2>, Tensor<2>) -> Tensor<1>>,
}

impl PartialEq for Custom {
    /// By name: a function has no equality.
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Divergence {
    /// The loss by row, `[n]`, from log p and log q, both [n, k+1]. NaN for a custom divergence whose
    /// function is missing.
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
            Self::Custom(Custom {
                function: Some(function),
                ..
            }) => function(log_p_nk, log_q_nk),
            Self::Custom(Custom { function: None, .. }) => {
                forward_kl(log_p_nk, log_q_nk) * f64::NAN
            }
        }
    }

    /// As in the run file and in metrics.
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

    /// Why its parameter is none, in words; `None` if it is in range.
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

    /// Whether weighted draws give its gradient without bias: it must be linear in p.
    #[must_use]
    pub fn works_on_draws(&self) -> bool {
        matches!(self, Self::ForwardKl)
    }
}
