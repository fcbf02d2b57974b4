//! Measurements of all models of a run, and the results that are computed from them.

use potstill_datasets::{OwnText, RunModel, SequenceValues};

use crate::accuracy::{Graded, accuracy, answer_sums};
use crate::calibration::{Calibration, calibration, distance};
use crate::comparison::{Comparison, Pair, compare};
use crate::error::Error;
use crate::estimate::{Estimate, PromptSums};
use crate::figures::{check_same_sequences, metric_sums, teacher_nll, token_sums};
use crate::interval::Interval;
use crate::metric::{Figure, Metric};
use crate::results::{SeedFigures, StudentResult, TeacherResult};

/// Pairs of models that are compared, left − right.
const PAIRS: [(RunModel, RunModel); 8] = [
    (RunModel::STUDENT, RunModel::SFT),
    (RunModel::STUDENT, RunModel::SAME_TOKEN),
    (RunModel::STUDENT, RunModel::SMOOTHING),
    (RunModel::STUDENT, RunModel::SHUFFLED),
    (RunModel::STUDENT, RunModel::Base),
    (RunModel::STUDENT, RunModel::Unigram),
    (RunModel::SFT, RunModel::Unigram),
    (RunModel::SFT, RunModel::SHUFFLED),
];

/// Figures that student and SFT control are compared by.
const ALL_FIGURES: [Figure; 6] = [
    Figure::Kl,
    Figure::Nll,
    Figure::Agreement,
    Figure::Calibration,
    Figure::Accuracy,
    Figure::OwnTextKl,
];

/// Measurements of the base, the student and the controls, all over the same text of test.
#[derive(Debug, Clone)]
pub struct Measurements {
    /// Measurements of each model.
    pub models: Vec<ModelMeasurements>,
    /// Whether the teacher's distributions are stored. Without them there is neither KL nor agreement.
    pub has_distributions: bool,
    /// Number of bootstrap resamples for the interval of the calibration error.
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
    /// Values of the sequences of test.
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
    /// Values of the sequences of test, of the first model. Text and teacher are the same for all models.
    #[must_use]
    pub fn test_values(&self) -> &[SequenceValues] {
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
            nll: teacher_nll(self.test_values())?,
            accuracy: graded.map(|graded| accuracy(&[graded])).transpose()?,
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
        let all: Vec<&SeedMeasurements> = model.seeds.iter().collect();
        let mut seeds: Vec<SeedFigures> =
            all.iter().map(|seed| SeedFigures::new(seed.seed)).collect();
        let mut figure = |figure| -> Result<Option<Interval>, Error> {
            let Some(sums) = self.sums(&all, figure)? else {
                return Ok(None);
            };
            for (i, seed) in seeds.iter_mut().enumerate() {
                seed.set(figure, sums.ratio_of_seed(i));
            }
            Ok(Some(Estimate::of(&sums).interval()))
        };
        let kl = figure(Figure::Kl)?;
        let nll = figure(Figure::Nll)?.ok_or(Error::NoTokens)?;
        let agreement = figure(Figure::Agreement)?;
        let own_text_kl = figure(Figure::OwnTextKl)?;
        let distance = figure(Figure::Calibration)?;
        figure(Figure::Accuracy)?;
        let graded: Option<Vec<&[Graded]>> = all.iter().map(|s| s.graded.as_deref()).collect();
        Ok(StudentResult {
            name: model.model,
            learned_from: facts.learned_from,
            parameters: facts.parameters,
            steps: facts.steps,
            kl,
            nll,
            agreement,
            accuracy: graded.map(|graded| accuracy(&graded)).transpose()?,
            own_text_kl,
            calibration: self.calibration(&all, distance)?,
            seeds,
        })
    }

    /// Compares student and SFT control on every figure, and the other pairs of models on the distance to the teacher and
    /// on accuracy. Pairs and figures that were not measured are left out.
    ///
    /// # Errors
    /// If two models were measured over different sequences, or a value is not finite.
    pub fn comparisons(&self) -> Result<Vec<Comparison>, Error> {
        let distance = match self.has_distributions {
            true => Figure::Kl,
            false => Figure::Nll,
        };
        let find = |model| self.models.iter().find(|m| m.model == model);
        let mut pairs = Vec::new();
        for models in PAIRS {
            let (Some(left), Some(right)) = (find(models.0), find(models.1)) else {
                continue;
            };
            let is_finding = models == (RunModel::STUDENT, RunModel::SFT);
            let figures = match is_finding {
                true => ALL_FIGURES.as_slice(),
                false => &[distance, Figure::Accuracy],
            };
            let seeds = paired_seeds(left, right);
            check_text(&seeds)?;
            for &figure in figures {
                let sums = (self.sums(&seeds.0, figure)?, self.sums(&seeds.1, figure)?);
                let (Some(left), Some(right)) = sums else {
                    continue;
                };
                left.check_same_prompts(&right)?;
                pairs.push(Pair {
                    figure,
                    models,
                    sums: (left, right),
                    is_primary: is_finding && figure == distance,
                });
            }
        }
        Ok(compare(&pairs))
    }

    /// Adds up a figure by prompt and seed; `None` if it was not measured for each seed.
    fn sums<'a>(
        &self,
        seeds: &[&'a SeedMeasurements],
        figure: Figure,
    ) -> Result<Option<PromptSums<'a>>, Error> {
        if figure.needs_distributions() && !self.has_distributions {
            return Ok(None);
        }
        let mut all: Option<PromptSums<'a>> = None;
        for seed in seeds {
            let Some(of_seed) = seed.sums(figure)? else {
                return Ok(None);
            };
            all = Some(match all {
                None => of_seed,
                Some(sums) => sums.with_seed(of_seed)?,
            });
        }
        Ok(all)
    }

    /// Computes the reliability table and the calibration error over all seeds; `None` if the probabilities are not
    /// stored.
    fn calibration(
        &self,
        seeds: &[&SeedMeasurements],
        distance: Option<Interval>,
    ) -> Result<Option<Calibration>, Error> {
        if !seeds.iter().all(|seed| seed.has_probabilities()) {
            return Ok(None);
        }
        let values = seeds.iter().flat_map(|seed| seed.values.iter().cloned());
        let values: Vec<SequenceValues> = values.collect();
        let found = calibration(&values, self.has_distributions, self.resamples, self.seed)?;
        Ok(Some(Calibration { distance, ..found }))
    }
}

/// Measurements of two models, in the order of the seeds that both were trained with. A model that was not trained has
/// the same measurements for each seed.
fn paired_seeds<'a>(
    left: &'a ModelMeasurements,
    right: &'a ModelMeasurements,
) -> (Vec<&'a SeedMeasurements>, Vec<&'a SeedMeasurements>) {
    let all = |model: &'a ModelMeasurements| model.seeds.iter().collect();
    let is_trained = |model: &ModelMeasurements| matches!(model.model, RunModel::Trained(_));
    if !is_trained(left) || !is_trained(right) {
        return (all(left), all(right));
    }
    let of_seed = |seed| right.seeds.iter().find(|measured| measured.seed == seed);
    let pairs = left.seeds.iter();
    pairs.filter_map(|l| Some((l, of_seed(l.seed)?))).unzip()
}

/// Checks that all measurements are over the same sequences.
fn check_text(
    (left, right): &(Vec<&SeedMeasurements>, Vec<&SeedMeasurements>),
) -> Result<(), Error> {
    let mut all = left.iter().chain(right);
    let first = all.next();
    let mut same = |seed: &&SeedMeasurements| match first {
        Some(first) => check_same_sequences(&first.values, &seed.values),
        None => Ok(()),
    };
    all.try_for_each(&mut same)
}

impl SeedMeasurements {
    /// Adds up a figure by prompt; `None` if it was not measured.
    fn sums(&self, figure: Figure) -> Result<Option<PromptSums<'_>>, Error> {
        let sums = match figure {
            Figure::Kl => metric_sums(&self.values, Metric::Kl)?,
            Figure::Nll => metric_sums(&self.values, Metric::Nll)?,
            Figure::Agreement => metric_sums(&self.values, Metric::Agreement)?,
            Figure::Calibration if !self.has_probabilities() => return Ok(None),
            Figure::Calibration => token_sums(&self.values, distance)?,
            Figure::Accuracy => match &self.graded {
                Some(graded) => answer_sums(&[graded], |_| true)?,
                None => return Ok(None),
            },
            Figure::OwnTextKl => match &self.own_text {
                Some(texts) => own_text_sums(texts)?,
                None => return Ok(None),
            },
        };
        Ok(Some(sums))
    }

    fn has_probabilities(&self) -> bool {
        self.values.iter().any(|value| !value.confidence.is_empty())
    }
}

/// Adds up the reverse KL of a model's own text by prompt, with the number of its tokens as the weight.
fn own_text_sums(texts: &[OwnText]) -> Result<PromptSums<'_>, Error> {
    if let Some(text) = texts.iter().find(|text| !text.reverse_kl_nats.is_finite()) {
        return Err(Error::NotFinite {
            prompt_id: text.prompt_id.clone(),
            sample_index: text.sample_index,
            metric: Figure::OwnTextKl.name(),
            value: text.reverse_kl_nats,
        });
    }
    if texts.iter().all(|text| text.tokens == 0) {
        return Err(Error::NoTokens);
    }
    let records = texts.iter().map(|text| {
        let prompt = text.prompt_id.as_str();
        (prompt, text.reverse_kl_nats, f64::from(text.tokens))
    });
    Ok(PromptSums::of_seed(records))
}
