//! Reads the results of each model from the run directory for the report.

use potstill_datasets::{Arm, Manifest, Prompt, RunModel, SequenceValues, TaskSample, Variant};
use potstill_eval::{
    Accuracy, Calibration, Comparison, Figure, Graded, Metric, Sample, SampleAnswer, SeedFigures,
    SequenceBins, StudentResult, TeacherResult, accuracy, calibration, compare, compare_accuracy,
    interval, teacher_nll,
};
use potstill_model::Config;

use crate::stages::eval::values;
use crate::stages::models::export_home;
use crate::stages::{Context, answers, checkpoint, export, train};

/// Pairs of models that are compared; a difference is left minus right.
const PAIRS: [(RunModel, RunModel); 4] = [
    (RunModel::STUDENT, RunModel::SFT),
    (RunModel::STUDENT, RunModel::Base),
    (RunModel::STUDENT, RunModel::SHUFFLED),
    (RunModel::SFT, RunModel::SHUFFLED),
];

/// Number of held-out prompts whose answers the report shows.
const SAMPLES: usize = 60;

/// The measured values and answers of all models.
pub(super) struct Models {
    students: Vec<Student>,
    /// Prompts that the models answered; empty if `[eval] answers` is not set.
    prompts: Vec<Prompt>,
    /// Answers of each model's first seed, the teacher's first.
    answers: Vec<(RunModel, Vec<TaskSample>)>,
    /// Whether the teacher's distributions are stored. Without them there is neither KL nor agreement.
    distributions: bool,
    resamples: usize,
    seed: u64,
}

/// A model's values and graded answers by seed. A bootstrap receives the seeds' values concatenated, so
/// that each prompt has the values of all seeds.
struct Student {
    model: RunModel,
    seeds: Vec<Seed>,
}

struct Seed {
    seed: u64,
    values: Vec<SequenceValues>,
    graded: Option<Vec<Graded>>,
}

impl Student {
    /// Concatenates the values of `times` seeds, repeating the seeds if there are fewer.
    fn values(&self, times: usize) -> Vec<SequenceValues> {
        let seeds = self.seeds.iter().cycle().take(times);
        seeds.flat_map(|s| s.values.iter().cloned()).collect()
    }

    fn graded(&self, times: usize) -> Option<Vec<Graded>> {
        let seeds = self.seeds.iter().cycle().take(times);
        let graded: Option<Vec<_>> = seeds.map(|s| s.graded.clone()).collect();
        Some(graded?.into_iter().flatten().collect())
    }
}

impl Seed {
    fn figures(&self, distributions: bool) -> SeedFigures {
        let tokens: f64 = self.values.iter().map(|v| f64::from(v.tokens)).sum();
        let mean = |metric: Metric| metric.total(&self.values) / tokens;
        let share = |graded: &Vec<Graded>| {
            graded.iter().filter(|g| g.correct).count() as f64 / graded.len() as f64
        };
        SeedFigures {
            seed: self.seed,
            kl: distributions.then(|| mean(Metric::Kl)),
            nll: mean(Metric::Nll),
            agreement: distributions.then(|| mean(Metric::Agreement)),
            accuracy: self.graded.as_ref().map(share),
        }
    }
}

impl Models {
    pub(super) fn read(context: &Context, run_models: &[RunModel]) -> anyhow::Result<Models> {
        let file = &context.run.file;
        let mut models = Models {
            students: Vec::new(),
            prompts: Vec::new(),
            answers: Vec::new(),
            distributions: file.has_signals(),
            resamples: file.eval.resamples,
            seed: u64::from(file.run.seed),
        };
        if let Some(settings) = &file.eval.answers {
            models.prompts = answers::heldout_prompts(context, settings.grader)?;
            let teacher = file.local().map(|_| RunModel::Teacher);
            for model in teacher.into_iter().chain(run_models.iter().copied()) {
                let answers = answers::published(context, model)?;
                models.answers.push((model, answers));
            }
        }
        for &model in run_models {
            let by_seed: Vec<RunModel> = match model {
                RunModel::Trained(Variant { arm, .. }) => {
                    context.variants_of(arm).map(RunModel::Trained).collect()
                }
                RunModel::Base | RunModel::Teacher => vec![model],
            };
            let mut seeds = Vec::new();
            for (seed_index, model) in (0..).zip(by_seed) {
                let graded = match &file.eval.answers {
                    Some(_) => Some(models.grades(&answers::published(context, model)?)),
                    None => None,
                };
                seeds.push(Seed {
                    seed: train::seed(file, seed_index),
                    values: values(context, model)?,
                    graded,
                });
            }
            models.students.push(Student { model, seeds });
        }
        Ok(models)
    }

    /// Returns the values of one model. Any model serves, since all are measured on the same text.
    pub(super) fn heldout(&self) -> &[SequenceValues] {
        let first = self.students.first().and_then(|s| s.seeds.first());
        first.map_or(&[], |seed| &seed.values)
    }

    pub(super) fn teacher(&self, context: &Context) -> anyhow::Result<Option<TeacherResult>> {
        if context.run.file.teacher.is_none() {
            return Ok(None);
        }
        let parameters = match context.run.file.local() {
            Some(_) => {
                let folder = checkpoint::teacher(&context.run)?;
                Some(Config::from_dir(&folder)?.parameters())
            }
            None => None,
        };
        let name = export::provenance(context)?.into_iter().next();
        Ok(Some(TeacherResult {
            name: name.map_or_else(String::new, |p| p.teacher),
            parameters,
            nll: teacher_nll(self.heldout(), self.resamples, self.seed)?,
            accuracy: self.accuracy(self.teacher_grades())?,
        }))
    }

    pub(super) fn students(&self, context: &Context) -> anyhow::Result<Vec<StudentResult>> {
        let trained = |model| Manifest::read(&context.dir.path(&format!("students/{model}")));
        let exported = Manifest::read(&context.dir.path(&export_home(Arm::Student.first())))?;
        let parameters = exported.and_then(|m| m.counts.get("parameters").copied());
        let mut students = Vec::new();
        for student in &self.students {
            let (model, times) = (student.model, student.seeds.len());
            let values = student.values(times);
            let figure = |metric| interval(&values, metric, self.resamples, self.seed);
            students.push(StudentResult {
                name: model,
                learned_from: export::learned_from(&context.run.file, model),
                parameters,
                steps: trained(model)?
                    .and_then(|m| m.counts.get("steps").copied())
                    .unwrap_or_default(),
                kl: self.distributions.then(|| figure(Metric::Kl)).transpose()?,
                nll: figure(Metric::Nll)?,
                agreement: (self.distributions)
                    .then(|| figure(Metric::Agreement))
                    .transpose()?,
                accuracy: self.accuracy(student.graded(times))?,
                calibration: Some(self.calibration(&values)?),
                seeds: (student.seeds.iter())
                    .map(|seed| seed.figures(self.distributions))
                    .collect(),
            });
        }
        Ok(students)
    }

    pub(super) fn comparisons(&self) -> anyhow::Result<Vec<Comparison>> {
        let student = |model| self.students.iter().find(|s| s.model == model);
        let (resamples, seed) = (self.resamples, self.seed);
        let mut comparisons = Vec::new();
        for (left, right) in PAIRS {
            let (Some(a), Some(b)) = (student(left), student(right)) else {
                continue;
            };
            let times = a.seeds.len().max(b.seeds.len());
            let values = (a.values(times), b.values(times));
            let mut found = compare((left, &values.0), (right, &values.1), resamples, seed)?;
            found.retain(|c| self.distributions || c.metric == Figure::Nll);
            comparisons.extend(found);
            if let (Some(a), Some(b)) = (a.graded(times), b.graded(times)) {
                comparisons.push(compare_accuracy((left, &a), (right, &b), resamples, seed)?);
            }
        }
        Ok(comparisons)
    }

    /// Returns the first held-out prompts with each model's answer.
    pub(super) fn samples(&self, context: &Context) -> anyhow::Result<Vec<Sample>> {
        let mut samples = Vec::new();
        for (i, prompt) in self.prompts.iter().take(SAMPLES).enumerate() {
            let answer = |(model, answers): &(RunModel, Vec<TaskSample>)| {
                let answer = answers.get(i).filter(|a| a.prompt_id == prompt.id)?;
                Some(SampleAnswer {
                    model: *model,
                    reasoning: answer.reasoning.clone(),
                    answer: answer.answer.clone(),
                    correct: Some(answer.correct),
                    finished: answer.finished,
                })
            };
            let answers: Option<Vec<SampleAnswer>> = self.answers.iter().map(answer).collect();
            let answers = answers.ok_or_else(|| {
                anyhow::anyhow!(
                    "the answers below {} belong to other prompts\nhint: delete the folders `eval/answers` below it and run `eval` again",
                    context.dir.path("students").display()
                )
            })?;
            let asked: Vec<&str> = prompt.messages.iter().map(|m| m.content.as_str()).collect();
            samples.push(Sample {
                prompt_id: prompt.id.clone(),
                group: prompt.group.clone(),
                prompt: asked.join("\n\n"),
                reference: prompt.reference.clone(),
                answers,
            });
        }
        Ok(samples)
    }

    fn accuracy(&self, graded: Option<Vec<Graded>>) -> anyhow::Result<Option<Accuracy>> {
        Ok(graded
            .map(|graded| accuracy(&graded, self.resamples, self.seed))
            .transpose()?)
    }

    fn teacher_grades(&self) -> Option<Vec<Graded>> {
        let (_, answers) = (self.answers.iter()).find(|(model, _)| *model == RunModel::Teacher)?;
        Some(self.grades(answers))
    }

    fn grades(&self, answers: &[TaskSample]) -> Vec<Graded> {
        let graded = answers
            .iter()
            .zip(&self.prompts)
            .map(|(answer, prompt)| Graded {
                prompt_id: answer.prompt_id.clone(),
                group: prompt.group.clone(),
                correct: answer.correct,
            });
        graded.collect()
    }

    fn calibration(&self, values: &[SequenceValues]) -> anyhow::Result<Calibration> {
        let bins: Vec<SequenceBins<'_>> = values
            .iter()
            .map(|v| SequenceBins {
                prompt_id: &v.prompt_id,
                tokens: &v.bin_tokens,
                confidence: &v.bin_confidence,
                correct: &v.bin_correct,
            })
            .collect();
        Ok(calibration(&bins, self.resamples, self.seed)?)
    }
}
