//! The values and answers of a run's models on held-out prompts, and the figures that the report makes of
//! them.

use potstill_datasets::{RunModel, SequenceValues};

use crate::accuracy::{Accuracy, Graded, accuracy};
use crate::bootstrap::interval;
use crate::calibration::{Calibration, SequenceBins, calibration};
use crate::error::Error;
use crate::metric::{Figure, Metric};
use crate::report::{Comparison, StudentResult, compare, compare_accuracy};
use crate::seeds::SeedFigures;

/// The pairs of models that are compared; a difference is the first less the second.
const COMPARED: [(RunModel, RunModel); 4] = [
    (RunModel::STUDENT, RunModel::SFT),
    (RunModel::STUDENT, RunModel::Base),
    (RunModel::STUDENT, RunModel::SHUFFLED),
    (RunModel::SFT, RunModel::SHUFFLED),
];

/// Options of the figures.
#[derive(Debug, Clone, Copy)]
pub struct FigureOptions {
    /// Whether the teacher's distributions are stored. Text alone has neither KL nor agreement.
    pub has_distributions: bool,
    /// Number of bootstrap draws.
    pub resamples: usize,
    /// Seed of the bootstrap.
    pub seed: u64,
}

/// The values and graded answers of one seed of a model.
#[derive(Debug, Clone)]
pub struct SeedResults {
    /// The seed that the model was trained with.
    pub seed: u64,
    /// Values of the held-out sequences.
    pub values: Vec<SequenceValues>,
    /// Graded answers; `None` if the model was not asked.
    pub graded: Option<Vec<Graded>>,
}

/// The values and graded answers of a model, by seed.
///
/// A bootstrap gets the values of all seeds one after the other, so that a prompt that is drawn brings
/// those of all seeds.
#[derive(Debug, Clone)]
pub struct ModelResults {
    /// The model.
    pub model: RunModel,
    /// Results of each seed, at least one.
    pub seeds: Vec<SeedResults>,
}

/// What training says about a model.
#[derive(Debug, Clone)]
pub struct TrainingFacts {
    /// What the model learned from, in words.
    pub learned_from: String,
    /// Number of parameters.
    pub parameters: Option<u64>,
    /// Number of optimizer steps.
    pub steps: u64,
}

impl ModelResults {
    /// Values of `times` seeds; those of a single seed are repeated.
    fn values(&self, times: usize) -> Vec<SequenceValues> {
        let seeds = self.seeds.iter().cycle().take(times);
        seeds.flat_map(|s| s.values.iter().cloned()).collect()
    }

    /// Graded answers of `times` seeds; those of a single seed are repeated.
    fn graded(&self, times: usize) -> Option<Vec<Graded>> {
        let seeds = self.seeds.iter().cycle().take(times);
        let graded: Option<Vec<_>> = seeds.map(|s| s.graded.clone()).collect();
        Some(graded?.into_iter().flatten().collect())
    }

    /// Computes the figures of the model over all of its seeds.
    ///
    /// # Errors
    /// Those of [`interval`], [`accuracy`] and [`calibration`].
    pub fn figures(
        &self,
        training: TrainingFacts,
        options: &FigureOptions,
    ) -> Result<StudentResult, Error> {
        let values = self.values(self.seeds.len());
        let figure = |metric| interval(&values, metric, options.resamples, options.seed);
        let of_distributions = |metric| {
            let stored = options.has_distributions;
            stored.then(|| figure(metric)).transpose()
        };
        Ok(StudentResult {
            name: self.model,
            learned_from: training.learned_from,
            parameters: training.parameters,
            steps: training.steps,
            kl: of_distributions(Metric::Kl)?,
            nll: figure(Metric::Nll)?,
            agreement: of_distributions(Metric::Agreement)?,
            accuracy: options.accuracy(self.graded(self.seeds.len()).as_deref())?,
            calibration: Some(options.calibration(&values)?),
            seeds: (self.seeds.iter())
                .map(|seed| seed.figures(options))
                .collect(),
        })
    }
}

impl SeedResults {
    fn figures(&self, options: &FigureOptions) -> SeedFigures {
        let tokens: f64 = self.values.iter().map(|v| f64::from(v.tokens)).sum();
        let mean = |metric: Metric| metric.total(&self.values) / tokens;
        let share = |graded: &Vec<Graded>| {
            graded.iter().filter(|g| g.correct).count() as f64 / graded.len() as f64
        };
        SeedFigures {
            seed: self.seed,
            kl: options.has_distributions.then(|| mean(Metric::Kl)),
            nll: mean(Metric::Nll),
            agreement: options.has_distributions.then(|| mean(Metric::Agreement)),
            accuracy: self.graded.as_ref().map(share),
        }
    }
}

impl FigureOptions {
    /// The share of right answers, if there are answers.
    ///
    /// # Errors
    /// Those of [`accuracy`].
    pub fn accuracy(&self, graded: Option<&[Graded]>) -> Result<Option<Accuracy>, Error> {
        graded
            .map(|graded| accuracy(graded, self.resamples, self.seed))
            .transpose()
    }

    fn calibration(&self, values: &[SequenceValues]) -> Result<Calibration, Error> {
        let bins: Vec<SequenceBins<'_>> = values
            .iter()
            .map(|v| SequenceBins {
                prompt_id: &v.prompt_id,
                tokens: &v.bin_tokens,
                confidence: &v.bin_confidence,
                correct: &v.bin_correct,
            })
            .collect();
        calibration(&bins, self.resamples, self.seed)
    }
}

/// Compares the student with the models that it should beat, and `sft` with `shuffled`, as far as they are
/// there.
///
/// # Errors
/// Those of [`compare`] and [`compare_accuracy`].
pub fn compare_models(
    models: &[ModelResults],
    options: &FigureOptions,
) -> Result<Vec<Comparison>, Error> {
    let results = |model| models.iter().find(|results| results.model == model);
    let (resamples, seed) = (options.resamples, options.seed);
    let mut comparisons = Vec::new();
    for (left, right) in COMPARED {
        let (Some(a), Some(b)) = (results(left), results(right)) else {
            continue;
        };
        let times = a.seeds.len().max(b.seeds.len());
        let values = (a.values(times), b.values(times));
        let mut found = compare((left, &values.0), (right, &values.1), resamples, seed)?;
        found.retain(|c| options.has_distributions || c.metric == Figure::Nll);
        comparisons.extend(found);
        if let (Some(a), Some(b)) = (a.graded(times), b.graded(times)) {
            comparisons.push(compare_accuracy((left, &a), (right, &b), resamples, seed)?);
        }
    }
    Ok(comparisons)
}
