//! Results of a run: figures of the text of test, of each model, and of the differences between models.

use potstill_datasets::{Arm, RunModel, SequenceValues};
use serde::{Deserialize, Serialize};

use crate::accuracy::Accuracy;
use crate::calibration::Calibration;
use crate::error::Error;
use crate::interval::Interval;
use crate::metric::Figure;

/// Size of the test text, and the teacher's likelihood of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TestText {
    /// Number of distinct prompts.
    pub prompts: usize,
    /// Number of sequences: prompts times samples.
    pub sequences: usize,
    /// Number of loss positions.
    pub tokens: u64,
    /// The teacher's negative log-likelihood of the target tokens, nats per token, which a student that equals the
    /// teacher would have.
    pub teacher_nll: f64,
}

impl TestText {
    /// Counts the sequences and tokens of `values`, which may be the values of any model.
    ///
    /// # Errors
    /// If `values` have no token.
    pub fn from_values(values: &[SequenceValues]) -> Result<TestText, Error> {
        let mut prompts: Vec<&str> = values.iter().map(|v| v.prompt_id.as_str()).collect();
        prompts.sort_unstable();
        prompts.dedup();
        let tokens: u64 = values.iter().map(|v| u64::from(v.tokens)).sum();
        if tokens == 0 {
            return Err(Error::NoTokens);
        }
        let teacher_nll: f64 = values.iter().map(|v| v.teacher_nll_nats).sum();
        Ok(TestText {
            prompts: prompts.len(),
            sequences: values.len(),
            tokens,
            teacher_nll: teacher_nll / tokens as f64,
        })
    }
}

/// Figures of the teacher.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TeacherResult {
    /// Name or path of the model.
    pub name: String,
    /// Number of parameters.
    pub parameters: Option<u64>,
    /// Negative log-likelihood of the target tokens, nats per token; see [`teacher_nll`](crate::teacher_nll).
    pub nll: Interval,
    /// Share of right answers.
    pub accuracy: Option<Accuracy>,
}

/// Test figures of a student, a control, the base or the unigram.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StudentResult {
    /// The base, the student or a control.
    pub name: RunModel,
    /// Description of what the model learned from.
    pub learned_from: String,
    /// Number of parameters.
    pub parameters: Option<u64>,
    /// Number of optimizer steps.
    pub steps: u64,
    /// Forward KL from the teacher, nats per token; `None` if the teacher's distributions are not stored.
    pub kl: Option<Interval>,
    /// Negative log-likelihood of the target tokens, nats per token.
    pub nll: Interval,
    /// Top-1 agreement with the teacher, 0 to 1; `None` if the teacher's distributions are not stored.
    pub agreement: Option<Interval>,
    /// Share of right answers.
    pub accuracy: Option<Accuracy>,
    /// Reverse KL from the teacher on the model's own text, nats per token; `None` if the models wrote no text or the
    /// teacher cannot score it.
    pub own_text_kl: Option<Interval>,
    /// Reliability table and expected calibration error.
    pub calibration: Option<Calibration>,
    /// Figures of each seed; the figures above are over all seeds.
    pub seeds: Vec<SeedFigures>,
}

/// A learning rate that was tried for an arm, with its value on the dev prompts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TunedRate {
    /// The arm that was trained.
    pub arm: Arm,
    /// Learning rate of the training.
    pub learning_rate: f64,
    /// KL on the dev prompts, nats per token; the NLL if the teacher's distributions are not stored. `None` if the training
    /// diverged.
    pub dev: Option<f64>,
    /// Whether the arm is trained with this rate.
    pub chosen: bool,
}

/// Figures of a model that was trained with one seed, each over all text or answers of test.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SeedFigures {
    /// Seed of the training.
    pub seed: u64,
    /// Forward KL from the teacher, nats per token.
    pub kl: Option<f64>,
    /// Negative log-likelihood of the target tokens, nats per token.
    pub nll: f64,
    /// Top-1 agreement with the teacher, 0 to 1.
    pub agreement: Option<f64>,
    /// Share of right answers, 0 to 1.
    pub accuracy: Option<f64>,
    /// Reverse KL from the teacher on the model's own text, nats per token.
    pub own_text_kl: Option<f64>,
}

impl SeedFigures {
    /// Figures of a seed, before any is set.
    pub(crate) fn new(seed: u64) -> SeedFigures {
        SeedFigures {
            seed,
            kl: None,
            nll: f64::NAN,
            agreement: None,
            accuracy: None,
            own_text_kl: None,
        }
    }

    pub(crate) fn figure(&self, figure: Figure) -> Option<f64> {
        match figure {
            Figure::Kl => self.kl,
            Figure::Nll => Some(self.nll),
            Figure::Agreement => self.agreement,
            Figure::Accuracy => self.accuracy,
            Figure::OwnTextKl => self.own_text_kl,
            Figure::Calibration => None,
        }
    }

    /// Sets a figure. The calibration has no figures by seed.
    pub(crate) fn set(&mut self, figure: Figure, value: f64) {
        match figure {
            Figure::Kl => self.kl = Some(value),
            Figure::Nll => self.nll = value,
            Figure::Agreement => self.agreement = Some(value),
            Figure::Accuracy => self.accuracy = Some(value),
            Figure::OwnTextKl => self.own_text_kl = Some(value),
            Figure::Calibration => {}
        }
    }
}
