//! What was measured of each model, read from the run directory for the report.

use potstill_datasets::{Manifest, Prompt, SequenceValues, TaskSample};
use potstill_eval::{
    Accuracy, Calibration, Comparison, Graded, Metric, Sample, SampleAnswer, SequenceBins,
    StudentResult, TeacherResult, accuracy, calibration, compare, compare_accuracy, interval,
    teacher_nll,
};
use potstill_model::Config;

use crate::stages::eval::{UNTRAINED, values};
use crate::stages::{Context, answers, checkpoint, export};

/// The pairs that are compared: left less right.
const PAIRS: [(&str, &str); 4] = [
    ("student", "sft"),
    ("student", UNTRAINED),
    ("student", "shuffled"),
    ("sft", "shuffled"),
];

/// Held-out prompts whose answers are shown.
const SAMPLES: usize = 60;

/// The values and answers of every model.
pub(super) struct Models<'a> {
    students: Vec<(&'a str, Vec<SequenceValues>)>,
    /// The prompts that models answered; none where they were not asked.
    prompts: Vec<Prompt>,
    /// By model, the teacher first.
    answers: Vec<(&'a str, Vec<TaskSample>)>,
    resamples: usize,
    seed: u64,
}

impl<'a> Models<'a> {
    pub(super) fn read(context: &Context, names: &[&'a str]) -> anyhow::Result<Models<'a>> {
        let file = &context.run.file;
        let mut models = Models {
            students: Vec::new(),
            prompts: Vec::new(),
            answers: Vec::new(),
            resamples: file.eval.resamples.get(),
            seed: u64::from(file.run.seed),
        };
        for name in names {
            models.students.push((name, values(context, name)?));
        }
        if let Some(settings) = &file.eval.answers {
            models.prompts = answers::heldout_prompts(context, settings.grader.into())?;
            let teacher = file.teacher.as_ref().map(|_| answers::TEACHER);
            for name in teacher.into_iter().chain(names.iter().copied()) {
                models
                    .answers
                    .push((name, answers::published(context, name)?));
            }
        }
        Ok(models)
    }

    /// Any model's values: they are of the same text.
    pub(super) fn heldout(&self) -> &[SequenceValues] {
        self.students.first().map_or(&[], |(_, values)| values)
    }

    pub(super) fn teacher(&self, context: &Context) -> anyhow::Result<Option<TeacherResult>> {
        if context.run.file.teacher.is_none() {
            return Ok(None);
        }
        let folder = checkpoint::teacher(&context.run)?;
        let name = export::provenance(context)?.into_iter().next();
        Ok(Some(TeacherResult {
            name: name.map_or_else(String::new, |p| p.teacher),
            parameters: Some(Config::from_dir(&folder)?.parameters()),
            nll: teacher_nll(self.heldout(), self.resamples, self.seed)?,
            accuracy: self.accuracy(answers::TEACHER)?,
        }))
    }

    pub(super) fn students(&self, context: &Context) -> anyhow::Result<Vec<StudentResult>> {
        let trained = |name: &str| Manifest::read(&context.dir.path(&format!("students/{name}")));
        let exported = Manifest::read(&context.dir.path("students/student/export"))?;
        let parameters = exported.and_then(|m| m.counts.get("parameters").copied());
        let mut students = Vec::new();
        for (name, values) in &self.students {
            let figure = |metric| interval(values, metric, self.resamples, self.seed);
            students.push(StudentResult {
                name: (*name).to_owned(),
                learned_from: export::learned_from(name).to_owned(),
                parameters,
                steps: trained(name)?
                    .and_then(|m| m.counts.get("steps").copied())
                    .unwrap_or_default(),
                kl: figure(Metric::Kl)?,
                nll: figure(Metric::Nll)?,
                agreement: figure(Metric::Agreement)?,
                accuracy: self.accuracy(name)?,
                calibration: Some(self.calibration(values)?),
            });
        }
        Ok(students)
    }

    pub(super) fn comparisons(&self) -> anyhow::Result<Vec<Comparison>> {
        let values = |name: &str| self.students.iter().find(|(n, _)| *n == name);
        let mut comparisons = Vec::new();
        for (left, right) in PAIRS {
            let (Some((_, a)), Some((_, b))) = (values(left), values(right)) else {
                continue;
            };
            comparisons.extend(compare((left, a), (right, b), self.resamples, self.seed)?);
            if let (Some(a), Some(b)) = (self.graded(left), self.graded(right)) {
                comparisons.push(compare_accuracy(
                    (left, &a),
                    (right, &b),
                    self.resamples,
                    self.seed,
                )?);
            }
        }
        Ok(comparisons)
    }

    /// The first held-out prompts with every model's answer.
    pub(super) fn samples(&self, context: &Context) -> anyhow::Result<Vec<Sample>> {
        let mut samples = Vec::new();
        for (i, prompt) in self.prompts.iter().take(SAMPLES).enumerate() {
            let answer = |(model, answers): &(&str, Vec<TaskSample>)| {
                let answer = answers.get(i).filter(|a| a.prompt_id == prompt.id)?;
                Some(SampleAnswer {
                    model: (*model).to_owned(),
                    reasoning: answer.reasoning.clone(),
                    answer: answer.answer.clone(),
                    correct: Some(answer.correct),
                    finished: answer.finished,
                })
            };
            let answers: Option<Vec<SampleAnswer>> = self.answers.iter().map(answer).collect();
            let answers = answers.ok_or_else(|| {
                anyhow::anyhow!(
                    "the answers in {} are to other prompts: delete the `eval/answers` folders below it and run `eval` again",
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

    fn accuracy(&self, name: &str) -> anyhow::Result<Option<Accuracy>> {
        let graded = self.graded(name);
        Ok(graded
            .map(|graded| accuracy(&graded, self.resamples, self.seed))
            .transpose()?)
    }

    fn graded(&self, name: &str) -> Option<Vec<Graded>> {
        let (_, answers) = self.answers.iter().find(|(n, _)| *n == name)?;
        let graded = answers
            .iter()
            .zip(&self.prompts)
            .map(|(answer, prompt)| Graded {
                prompt_id: answer.prompt_id.clone(),
                group: prompt.group.clone(),
                correct: answer.correct,
            });
        Some(graded.collect())
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
