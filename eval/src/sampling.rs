//! The sampling test: whether an answer's tokens are a sample of the distributions that are stored for them.
//!
//! If a token is drawn from the distribution p that is stored for its position, the expectation of −log p(token) is the
//! entropy of p. The differences NLL − entropy then have mean 0 given everything before them, so they are uncorrelated
//! from position to position, from answer to answer and from sample to sample, and the variance of their sum is the sum
//! of the known variances V = Var(−log p). No clustering and no bootstrap is needed. z = Σ d / √max(Σ V, Σ d²): the two
//! sums have the same expectation, and each protects one side where most positions are nearly certain. If no rare token
//! was drawn, Σ d² is close to 0 and Σ d / √(Σ d²) would be far below 0 by chance; if one more was drawn than expected,
//! Σ d / √(Σ V) would be far above 0.
//!
//! The stored support contains the target token also where it is not among the k most likely tokens. A test on the
//! support would see p only where the token is unlikely, and be biased. So each row is reduced to its k most likely
//! tokens and one bucket for all other tokens, which does not depend on the token that was drawn.
//!
//! The test has one blind spot: nearly uniform distributions, such as those of an untrained model, give every text an NLL
//! of about their entropy.
//!
//! Text that was sampled with a temperature, a nucleus or a top-k has another law r. It is tested with the same values
//! −log p against their expectation under r, given that the token is one of the k most likely: this law follows from
//! the stored probabilities alone, whatever the tail is. Positions at which the end of the nucleus depends on the
//! unknown tail are skipped, which is no bias because the choice does not depend on the drawn token.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::wording;

/// Describes how the text was drawn that a model learns from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SamplingLaw {
    /// The teacher wrote the text, with these settings of `[collect]`.
    Sampled {
        /// Sampling temperature; 0 takes the most likely token.
        temperature: f64,
        /// Number of most likely tokens to sample from; `None` for all tokens.
        top_k: Option<usize>,
        /// Probability mass of the most likely tokens to sample from.
        top_p: f64,
        /// Smallest probability to sample, as a share of the most likely token's.
        min_p: f64,
        /// Penalty on tokens that occurred before; 1 for none.
        repetition_penalty: f64,
    },
    /// The text is the data's own (`answers = "given"`), so no law of the teacher is known for it.
    Given,
}

impl SamplingLaw {
    /// The teacher's own distribution: temperature 1 and all tokens.
    pub const PLAIN: SamplingLaw = SamplingLaw::Sampled {
        temperature: 1.0,
        top_k: None,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
    };

    /// Whether the text is a sample of the teacher's own distribution.
    pub fn is_plain(&self) -> bool {
        *self == SamplingLaw::PLAIN
    }

    /// Formats the settings that differ from the teacher's own distribution: `temperature 0.7, top_p 0.95`.
    pub fn describe(&self) -> String {
        let SamplingLaw::Sampled {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
        } = *self
        else {
            return "given".to_owned();
        };
        let mut parts = vec![format!("temperature {temperature}")];
        parts.extend(top_k.map(|k| format!("top_k {k}")));
        let others = [
            ("top_p", top_p, 1.0),
            ("min_p", min_p, 0.0),
            ("repetition_penalty", repetition_penalty, 1.0),
        ];
        let others = others.iter().filter(|(_, value, plain)| value != plain);
        parts.extend(others.map(|(name, value, _)| format!("{name} {value}")));
        parts.join(", ")
    }
}

/// Result of the sampling test over the answers of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingCheck {
    /// Number of loss positions.
    pub positions: u64,
    /// Mean of NLL − entropy, nats per token. Its expectation is 0 for text that is sampled at temperature 1.
    pub mean_nats: f64,
    /// Mean entropy, nats per token. All tokens outside the k most likely count as one.
    pub entropy_nats: f64,
    /// `mean_nats` in standard errors under sampling at temperature 1.
    pub z: f64,
    /// Law by which the run file says that the text was drawn.
    pub law: SamplingLaw,
    /// Mean of NLL − its expectation under `law`, nats per token; `None` if the expectation is not known.
    pub law_mean_nats: Option<f64>,
    /// `law_mean_nats` in standard errors under `law`.
    pub law_z: Option<f64>,
    /// Smallest mean KL(teacher ‖ model) in nats per token of a model that has the temperature of `law` and is perfect
    /// otherwise; `None` at temperatures 1 and 0 and for given text. The cut mass comes on top of it.
    pub floor_nats: Option<f64>,
    /// Mean share of the teacher's probability on tokens that `law` never draws; `None` if it draws all tokens.
    pub cut_mass: Option<f64>,
}

/// Largest |z| that chance explains. Of 975,000 texts of 50 to 20,000 positions that were simulated from the stored
/// distributions of three teachers, 7 exceeded it; a normal z does so once in 16,000 times.
pub const MAX_Z: f64 = 4.0;

/// Smallest mean difference that is a warning, as a share of the mean entropy. Servers compute the distributions of
/// sampling and of scoring in batches of different shapes and in half precision, so with very many tokens z exceeds any
/// bound for differences that do not matter.
pub const MIN_SHARE: f64 = 0.005;

impl SamplingCheck {
    /// Writes the figures to the manifest of a stage, each by its name.
    pub fn to_measures(&self) -> BTreeMap<String, f64> {
        let figures = [
            (POSITIONS, Some(self.positions as f64)),
            (MEAN, Some(self.mean_nats)),
            (ENTROPY, Some(self.entropy_nats)),
            (Z, Some(self.z)),
            (LAW_MEAN, self.law_mean_nats),
            (LAW_Z, self.law_z),
            (FLOOR, self.floor_nats),
            (CUT, self.cut_mass),
        ];
        let figures = figures.into_iter();
        figures
            .filter_map(|(name, value)| Some((name.to_owned(), value?)))
            .collect()
    }

    /// Reads the figures from the manifest of a stage; `None` if it has none.
    pub fn from_measures(
        measures: &BTreeMap<String, f64>,
        law: SamplingLaw,
    ) -> Option<SamplingCheck> {
        let figure = |name: &str| measures.get(name).copied();
        Some(SamplingCheck {
            positions: figure(POSITIONS)? as u64,
            mean_nats: figure(MEAN)?,
            entropy_nats: figure(ENTROPY)?,
            z: figure(Z)?,
            law,
            law_mean_nats: figure(LAW_MEAN),
            law_z: figure(LAW_Z),
            floor_nats: figure(FLOOR),
            cut_mass: figure(CUT),
        })
    }

    /// Whether a difference is neither chance nor too small to matter.
    fn is_beyond(&self, mean: f64, z: f64) -> bool {
        z.abs() > MAX_Z && mean.abs() > MIN_SHARE * self.entropy_nats
    }

    /// The figures in one line.
    pub fn summary(&self) -> String {
        let law = match (self.law, self.law_mean_nats, self.law_z) {
            (law, Some(mean), Some(z)) if !law.is_plain() => {
                let law = law.describe();
                format!("; NLL − its expectation at {law} {mean:+.4} (z = {z:.1})")
            }
            (SamplingLaw::Given, ..) => "; the answers are the data's own".to_owned(),
            _ => String::new(),
        };
        format!(
            "NLL − entropy {:+.4} nats per token at {} positions, of an entropy of {:.4} (z = {:.1} at temperature 1){law}",
            self.mean_nats,
            wording::count(self.positions),
            self.entropy_nats,
            self.z,
        )
    }

    /// The fault that the test found, with its likely causes: the text is not a sample of the stored distributions as
    /// the run file says. `None` if there is no fault, or if the law of the text is not known.
    pub fn fault(&self) -> Option<String> {
        let (mean, z) = (self.law_mean_nats?, self.law_z?);
        if !self.is_beyond(mean, z) {
            return None;
        }
        let law = match self.law.is_plain() {
            true => "temperature 1".to_owned(),
            false => self.law.describe(),
        };
        let cause = match (mean > 0.0, self.is_beyond(self.mean_nats, self.z)) {
            // The text fits the distributions as they are, so they were given after temperature and nucleus.
            (_, false) => {
                "the server ignores these settings, or its log-probabilities are those after temperature and nucleus, which are not the teacher's own distributions"
            }
            (true, _) if mean > self.entropy_nats.max(0.5) => {
                "the distributions belong to other positions (a shift by one), to another text (a stale cache) or to another model"
            }
            (true, _) => {
                "the distributions are of another model, another number format or another chat template, or the text was sampled at a higher temperature or tokenised anew"
            }
            (false, _) => {
                "the text was sampled at a lower temperature or from a nucleus (a server's own default), or answers were selected"
            }
        };
        Some(format!(
            "The answers are not a sample of the stored distributions at {law}: NLL exceeds its expectation by {mean:+.4} nats per token at {} positions (z = {z:.1}). Likely causes: {cause}.",
            wording::count(self.positions),
        ))
    }

    /// The bias of a comparison with the SFT control where the text was not sampled at temperature 1; `None` for text
    /// that was, and for given text.
    pub fn sft_bias(&self) -> Option<String> {
        if self.law.is_plain() || self.law == SamplingLaw::Given {
            return None;
        }
        let law = self.law.describe();
        let floor = self.floor_nats.map(|floor| {
            format!("for the temperature alone a perfect SFT is {floor:.3} nats per token from the teacher")
        });
        let cut = self.cut_mass.filter(|cut| *cut > 0.0).map(|cut| {
            format!(
                "{:.1} % of the teacher's probability is on tokens that are never drawn, for which no distance is finite",
                100.0 * cut
            )
        });
        let parts: Vec<String> = floor.into_iter().chain(cut).collect();
        let parts = match parts.is_empty() {
            true => String::new(),
            false => format!(" ({})", parts.join("; ")),
        };
        Some(format!(
            "The text was not sampled from the teacher's own distribution ({law}), so a model that learns from text alone cannot reach the teacher's distribution at temperature 1{parts}. Part of the difference between student and SFT is due to that; sample at `temperature = 1` without `top_p` and `top_k` to compare the methods."
        ))
    }
}

const POSITIONS: &str = "sampling_positions";
const MEAN: &str = "sampling_mean_nats";
const ENTROPY: &str = "sampling_entropy_nats";
const Z: &str = "sampling_z";
const LAW_MEAN: &str = "sampling_law_mean_nats";
const LAW_Z: &str = "sampling_law_z";
const FLOOR: &str = "sampling_floor_nats";
const CUT: &str = "sampling_cut_mass";
