//! Results of the run's models, read from the run directory for the report.

use potstill_datasets::{Arm, Manifest, Prompt, RunModel, SequenceValues, TaskSample, Variant};
use potstill_eval::{
    Comparison, FigureOptions, Graded, ModelResults, Sample, SampleAnswer, SeedResults,
    StudentResult, TeacherResult, TrainingFacts, compare_models, teacher_nll,
};
use potstill_model::Config;

use crate::stages::eval::values;
use crate::stages::models::export_home;
use crate::stages::{Context, answers, checkpoint, export, train};

/// Number of held-out prompts whose answers are shown.
const SAMPLES: usize = 60;

/// The values and answers of every model.
pub(super) struct RunResults {
    models: Vec<ModelResults>,
    /// The prompts that models answered; empty if they were not asked.
    prompts: Vec<Prompt>,
    /// Each model's answers with the first seed; the teacher comes first.
    answers: Vec<(RunModel, Vec<TaskSample>)>,
    options: FigureOptions,
}

impl RunResults {
    pub(super) fn read(context: &Context, run_models: &[RunModel]) -> anyhow::Result<RunResults> {
        let file = &context.run.file;
        let mut results = RunResults {
            models: Vec::new(),
            prompts: Vec::new(),
            answers: Vec::new(),
            options: FigureOptions {
                has_distributions: file.has_signals(),
                resamples: file.eval.resamples,
                seed: u64::from(file.run.seed),
            },
        };
        if let Some(settings) = &file.eval.answers {
            results.prompts = answers::heldout_prompts(context, settings.grader)?;
            let teacher = file.local().map(|_| RunModel::Teacher);
            for model in teacher.into_iter().chain(run_models.iter().copied()) {
                let answers = answers::published(context, model)?;
                results.answers.push((model, answers));
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
                    Some(_) => Some(results.grades(&answers::published(context, model)?)),
                    None => None,
                };
                seeds.push(SeedResults {
                    seed: train::seed(file, seed_index),
                    values: values(context, model)?,
                    graded,
                });
            }
            results.models.push(ModelResults { model, seeds });
        }
        Ok(results)
    }

    /// The held-out values of one model. Those that describe the text are the same for all models.
    pub(super) fn heldout(&self) -> &[SequenceValues] {
        let first = self.models.first().and_then(|s| s.seeds.first());
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
            nll: teacher_nll(self.heldout(), self.options.resamples, self.options.seed)?,
            accuracy: self.options.accuracy(self.teacher_grades().as_deref())?,
        }))
    }

    pub(super) fn students(&self, context: &Context) -> anyhow::Result<Vec<StudentResult>> {
        let trained = |model| Manifest::read(&context.dir.path(&format!("students/{model}")));
        let exported = Manifest::read(&context.dir.path(&export_home(Arm::Student.first())))?;
        let parameters = exported.and_then(|m| m.counts.get("parameters").copied());
        let mut students = Vec::new();
        for results in &self.models {
            let training = TrainingFacts {
                learned_from: export::learned_from(&context.run.file, results.model),
                parameters,
                steps: trained(results.model)?
                    .and_then(|m| m.counts.get("steps").copied())
                    .unwrap_or_default(),
            };
            students.push(results.figures(training, &self.options)?);
        }
        Ok(students)
    }

    pub(super) fn comparisons(&self) -> anyhow::Result<Vec<Comparison>> {
        Ok(compare_models(&self.models, &self.options)?)
    }

    /// The first held-out prompts with the answers of all models.
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
}
