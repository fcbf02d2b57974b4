//! Measurements and answers of each model, read from the run directory for the report.

use potstill_datasets::{Arm, Manifest, Prompt, RunModel, TaskSample, Variant};
use potstill_eval::{
    Graded, Measurements, ModelFacts, ModelMeasurements, Sample, SampleAnswer, SeedMeasurements,
    StudentResult, TeacherResult,
};
use potstill_model::Config;

use crate::stages::eval::values;
use crate::stages::models::export_home;
use crate::stages::{Context, answers, checkpoint, export, own_text, start};

/// Number of test prompts whose answers the report shows.
const SAMPLES: usize = 60;

/// Measurements and answers of every model.
pub(super) struct Measured {
    pub(super) measurements: Measurements,
    /// Prompts that the models answered; empty if they did not answer.
    prompts: Vec<Prompt>,
    /// Answers of each model with its first seed, the teacher first.
    answers: Vec<(RunModel, Vec<TaskSample>)>,
}

/// The models that can write text: all but the unigram.
fn networks(models: &[RunModel]) -> impl Iterator<Item = RunModel> {
    let models = models.iter().copied();
    models.filter(|model| *model != RunModel::Unigram)
}

impl Measured {
    pub(super) fn read(context: &Context, models: &[RunModel]) -> anyhow::Result<Measured> {
        let file = &context.run.settings;
        let mut measured = Measured {
            measurements: Measurements {
                models: Vec::new(),
                has_distributions: file.has_signals(),
                resamples: file.eval.resamples,
                seed: u64::from(file.run.seed),
            },
            prompts: Vec::new(),
            answers: Vec::new(),
        };
        if let Some(settings) = &file.eval.answers {
            measured.prompts = answers::graded_prompts(context, settings.grader)?;
            let teacher = file.local().map(|_| RunModel::Teacher);
            for model in teacher.into_iter().chain(networks(models)) {
                let answers = answers::published(context, model)?;
                measured.answers.push((model, answers));
            }
        }
        for &model in models {
            let by_seed: Vec<RunModel> = match model {
                RunModel::Trained(Variant { arm, .. }) => {
                    context.variants_of(arm).map(RunModel::Trained).collect()
                }
                RunModel::Base | RunModel::Unigram | RunModel::Teacher => vec![model],
            };
            let mut seeds = Vec::new();
            for (seed_index, model) in (0..).zip(by_seed) {
                let is_network = model != RunModel::Unigram;
                let graded = match &file.eval.answers {
                    Some(_) if is_network => {
                        Some(measured.grades(&answers::published(context, model)?))
                    }
                    _ => None,
                };
                seeds.push(SeedMeasurements {
                    seed: start::seed(file, seed_index),
                    values: values(context, model)?,
                    graded,
                    own_text: match is_network {
                        true => own_text::published(context, model)?,
                        false => None,
                    },
                });
            }
            let models = &mut measured.measurements.models;
            models.push(ModelMeasurements { model, seeds });
        }
        Ok(measured)
    }

    /// Figures of the teacher; `None` if the run has no teacher.
    pub(super) fn teacher(&self, context: &Context) -> anyhow::Result<Option<TeacherResult>> {
        if context.run.settings.teacher.is_none() {
            return Ok(None);
        }
        let parameters = match context.run.settings.local() {
            Some(_) => {
                let folder = checkpoint::teacher(&context.run)?;
                Some(Config::from_dir(&folder)?.parameters())
            }
            None => None,
        };
        let name = export::provenance(context)?.into_iter().next();
        let name = name.map_or_else(String::new, |p| p.teacher);
        let answers = self.answers.iter();
        let graded = answers
            .filter(|(model, _)| *model == RunModel::Teacher)
            .map(|(_, answers)| self.grades(answers))
            .next();
        let measurements = &self.measurements;
        Ok(Some(measurements.teacher_result(
            name,
            parameters,
            graded.as_deref(),
        )?))
    }

    /// Figures of the base, the student and the controls.
    pub(super) fn students(&self, context: &Context) -> anyhow::Result<Vec<StudentResult>> {
        let exported = Manifest::read(&context.dir.path(&export_home(Arm::Student.first())))?;
        let parameters = exported.and_then(|m| m.counts.get("parameters").copied());
        let mut students = Vec::new();
        for measured in &self.measurements.models {
            let model = measured.model;
            let trained = Manifest::read(&context.dir.path(&format!("students/{model}")))?;
            let steps = trained.and_then(|m| m.counts.get("steps").copied());
            let facts = ModelFacts {
                learned_from: export::learned_from(&context.run.settings, model),
                parameters: parameters.filter(|_| model != RunModel::Unigram),
                steps: steps.unwrap_or_default(),
            };
            students.push(self.measurements.student_result(measured, facts)?);
        }
        Ok(students)
    }

    /// The first test prompts with the answer of every model.
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
            let messages: Vec<&str> = prompt.messages.iter().map(|m| m.content.as_str()).collect();
            samples.push(Sample {
                prompt_id: prompt.id.clone(),
                group: prompt.group.clone(),
                prompt: messages.join("\n\n"),
                reference: prompt.reference.clone(),
                answers,
            });
        }
        Ok(samples)
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
}
