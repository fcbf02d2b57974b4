//! Measurements of all models of a run, and the results that are computed from them.

use potstill_datasets::{OwnText, RunModel, SequenceValues};

use crate::accuracy::{Accuracy, Graded, accuracy};
use crate::bootstrap::{interval, teacher_nll};
use crate::calibration::calibration;
use crate::error::Error;
use crate::metric::{Figure, Metric};
use crate::results::{
    Comparison, SeedFigures, StudentResult, TeacherResult, compare, compare_accuracy,
};
use crate::seeds::include_seed_variance;

/// Pairs of models that are compared, left − right.
const PAIRS: [(RunModel, RunModel); 4] = [
    (RunModel::STUDENT, RunModel::SFT),
    (RunModel::STUDENT, RunModel::Base),
    (RunModel::STUDENT, RunModel::SHUFFLED),
    (RunModel::SFT, RunModel::SHUFFLED),
];

/// Measurements of the base, the student and the controls, all over the same held-out text.
#[derive(Debug, Clone)]
pub struct Measurements {
    /// Measurements of each model.
    pub models: Vec<ModelMeasurements>,
    /// Whether the teacher's distributions are stored. Without them there is neither KL nor agreement.
    pub has_distributions: bool,
    /// Number of bootstrap resamples for an interval.
    pub resamples: usize,
    /// Seed of the bootstrap.
    pub seed: u64,
}

/// Measurements of one model, by training seed.
#[derive(Debug, Clone)]
pub struct ModelMeasurements {
    /// The model, with its first seed.
    pub model: RunModel,
    /// Measurements of each seed, at least one.
    pub seeds: Vec<SeedMeasurements>,
}

/// Measurements of a model that was trained with one seed.
#[derive(Debug, Clone)]
pub struct SeedMeasurements {
    /// Seed of the training.
    pub seed: u64,
    /// Values of the held-out sequences.
    pub values: Vec<SequenceValues>,
    /// Graded answers; `None` if the models did not answer.
    pub graded: Option<Vec<Graded>>,
    /// Reverse KL on the model's own text; `None` if the models wrote no text or the teacher cannot score it.
    pub own_text: Option<Vec<OwnText>>,
}

/// Facts about a model that are not measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFacts {
    /// Description of what the model learned from.
    pub learned_from: String,
    /// Number of parameters.
    pub parameters: Option<u64>,
    /// Number of optimizer steps.
    pub steps: u64,
}

impl Measurements {
    /// Values of the held-out sequences, of the first model. Text and teacher are the same for all models.
    #[must_use]
    pub fn heldout(&self) -> &[SequenceValues] {
        let first = self.models.first().and_then(|model| model.seeds.first());
        first.map_or(&[], |seed| &seed.values)
    }

    /// Computes the figures of the teacher from its name, its number of parameters and its graded answers.
    ///
    /// # Errors
    /// If no sequence has a token, or `graded` is empty.
    pub fn teacher_result(
        &self,
        name: String,
        parameters: Option<u64>,
        graded: Option<&[Graded]>,
    ) -> Result<TeacherResult, Error> {
        Ok(TeacherResult {
            name,
            parameters,
            nll: teacher_nll(self.heldout(), self.resamples, self.seed)?,
            accuracy: self.accuracy(graded)?,
        })
    }

    /// Computes the figures of a model over all its seeds, and of each seed.
    ///
    /// # Errors
    /// If no sequence has a token, a value is not finite, or there are no answers to grade.
    pub fn student_result(
        &self,
        model: &ModelMeasurements,
        facts: ModelFacts,
    ) -> Result<StudentResult, Error> {
        let count = model.seeds.len();
        let values = model.values(count);
        let figure = |metric| interval(&values, metric, self.resamples, self.seed);
        let with_distributions = |metric| {
            let wanted = self.has_distributions.then(|| figure(metric));
            wanted.transpose()
        };
        Ok(StudentResult {
            name: model.model,
            learned_from: facts.learned_from,
            parameters: facts.parameters,
            steps: facts.steps,
            kl: with_distributions(Metric::Kl)?,
            nll: figure(Metric::Nll)?,
            agreement: with_distributions(Metric::Agreement)?,
            accuracy: self.accuracy(model.graded(count).as_deref())?,
            own_text_kl: None,
            calibration: Some(calibration(
                &values,
                self.has_distributions,
                self.resamples,
                self.seed,
            )?),
            seeds: (model.seeds.iter())
                .map(|seed| seed.figures(self.has_distributions))
                .collect(),
        })
    }

    /// Compares the student with its controls and with the base, and the controls with each other. The intervals
    /// include the variance between seeds of `results`.
    ///
    /// # Errors
    /// If two models were measured over different sequences.
    pub fn comparisons(&self, results: &[StudentResult]) -> Result<Vec<Comparison>, Error> {
        let find = |model| self.models.iter().find(|m| m.model == model);
        let (resamples, seed) = (self.resamples, self.seed);
        let mut comparisons = Vec::new();
        for (left, right) in PAIRS {
            let (Some(a), Some(b)) = (find(left), find(right)) else {
                continue;
            };
            let count = a.seeds.len().max(b.seeds.len());
            let values = (a.values(count), b.values(count));
            let mut by_metric = compare((left, &values.0), (right, &values.1), resamples, seed)?;
            by_metric.retain(|c| self.has_distributions || c.metric == Figure::Nll);
            comparisons.extend(by_metric);
            if let (Some(a), Some(b)) = (a.graded(count), b.graded(count)) {
                comparisons.push(compare_accuracy((left, &a), (right, &b), resamples, seed)?);
            }
        }
        include_seed_variance(&mut comparisons, results);
        Ok(comparisons)
    }

    fn accuracy(&self, graded: Option<&[Graded]>) -> Result<Option<Accuracy>, Error> {
        let measured = graded.map(|graded| accuracy(graded, self.resamples, self.seed));
        measured.transpose()
    }
}

impl ModelMeasurements {
    /// Values of `count` seeds, one after the other, so that a prompt is resampled with the values of all seeds. A
    /// model with fewer seeds repeats them.
    fn values(&self, count: usize) -> Vec<SequenceValues> {
        let seeds = self.seeds.iter().cycle().take(count);
        seeds.flat_map(|s| s.values.iter().cloned()).collect()
    }

    /// Graded answers of `count` seeds, in the order of [`values`](Self::values).
    fn graded(&self, count: usize) -> Option<Vec<Graded>> {
        let seeds = self.seeds.iter().cycle().take(count);
        let graded: Option<Vec<_>> = seeds.map(|s| s.graded.clone()).collect();
        Some(graded?.into_iter().flatten().collect())
    }
}

impl SeedMeasurements {
    fn figures(&self, has_distributions: bool) -> SeedFigures {
        let tokens: f64 = self.values.iter().map(|v| f64::from(v.tokens)).sum();
        let mean = |metric: Metric| metric.total(&self.values) / tokens;
        let share = |graded: &Vec<Graded>| {
            graded.iter().filter(|g| g.correct).count() as f64 / graded.len() as f64
        };
        SeedFigures {
            seed: self.seed,
            kl: has_distributions.then(|| mean(Metric::Kl)),
            nll: mean(Metric::Nll),
            agreement: has_distributions.then(|| mean(Metric::Agreement)),
            accuracy: self.graded.as_ref().map(share),
            own_text_kl: None,
        }
    }
}
