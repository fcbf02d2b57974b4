//! The part of `eval` that lets the models answer test prompts greedily, and grades the answers.
//!
//! The prompts are all test prompts, which must have a reference, also if the teacher gave no answer to them. A
//! selection of the prompts that the teacher answered right would bias the accuracy.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use potstill_datasets::{
    ChatTemplate, Completion, FinishReason, Prompt, RunModel, Split, TaskSample, read_shard,
    replace_file, write_shard,
};
use potstill_eval::{EvalAnswers, Grader};
use potstill_teacher::{Ask, Local, LocalSettings, Sampling};
use serde_json::json;

use super::models::{answers_home, load, model_key, results_file};
use super::{
    Context, StageOutcome, StageSummary, checkpoint, counts, grade, import, known, run_stage,
};
use crate::interrupt;
use crate::run_dir::{StagePlan, settings_of};

const SAMPLES_FILE: &str = "samples.parquet";

/// Lets one model answer, if the run file has `answers` in `[eval]`.
pub(super) fn answer_one(context: &Context, model: RunModel) -> anyhow::Result<StageOutcome> {
    let run = &context.run;
    let Some(settings) = &run.settings.eval.answers else {
        return Ok(StageOutcome::UpToDate);
    };
    let (stage, home) = (format!("answer {model}"), answers_home(model));
    let plan = || plan(context, settings, model);
    let Some(plan) = known(context, &stage, &home, plan)? else {
        return Ok(StageOutcome::WouldRun);
    };
    run_stage(context, &plan, |out| {
        let prompts = graded_prompts(context, settings.grader)?;
        let local = open(context, model)?;
        let Some(samples) = samples(context, settings, &plan.stage, &local, &prompts)? else {
            return Ok(None);
        };
        let home = answers_home(model);
        write_shard(&out.join(&home).join(SAMPLES_FILE), &samples, &[])?;
        let right = samples.iter().filter(|s| s.correct).count();
        let results = json!({ "prompts": samples.len(), "right": right });
        let results = serde_json::to_string_pretty(&results)? + "\n";
        replace_file(&out.join(results_file(&home)), results.as_bytes())?;
        Ok(Some(StageSummary::new(counts([
            ("prompts", samples.len()),
            ("right", right),
            ("tokens", samples.iter().map(|s| s.tokens as usize).sum()),
        ]))))
    })
}

fn plan(context: &Context, settings: &EvalAnswers, model: RunModel) -> anyhow::Result<StagePlan> {
    let run = &context.run;
    let prompts = context.dir.require("prompts", "import", run)?;
    Ok(StagePlan {
        stage: format!("answer {model}"),
        home: answers_home(model),
        outputs: vec![answers_home(model), results_file(&answers_home(model))],
        settings: json!({
            "answers": settings_of(settings)?,
            "test": run.settings.curate.test,
            "seed": run.settings.run.seed,
            "reasoning": settings_of(&run.settings.collect.reasoning)?,
            "template": folder_and_template(context, model)?.1.hash(),
        }),
        inputs: BTreeMap::from([
            ("prompts".to_owned(), prompts.content_hash()),
            ("model".to_owned(), model_key(context, model)?),
        ]),
    })
}

/// Returns the test prompts, each with a reference.
pub(crate) fn graded_prompts(context: &Context, grader: Grader) -> anyhow::Result<Vec<Prompt>> {
    let prompts = test_prompts(context)?;
    for prompt in &prompts {
        grade::reference(grader, prompt)?;
    }
    Ok(prompts)
}

/// Returns the test prompts.
pub(super) fn test_prompts(context: &Context) -> anyhow::Result<Vec<Prompt>> {
    let file = &context.run.settings;
    let mut prompts = import::published(&context.dir.verified("prompts")?)?;
    prompts.retain(|p| file.curate.split(file.run.seed, &p.id) == Split::Test);
    if prompts.is_empty() {
        bail!("there is no test prompt\nhint: raise `test` in [curate], or import more prompts");
    }
    Ok(prompts)
}

/// Returns the folder with the tokenizer that a model answers with, and its chat template.
pub(super) fn folder_and_template(
    context: &Context,
    model: RunModel,
) -> anyhow::Result<(PathBuf, ChatTemplate)> {
    let run = &context.run;
    match model {
        RunModel::Teacher => {
            let folder = checkpoint::teacher(run)?;
            let template = checkpoint::template(run, &folder)?;
            Ok((folder, template))
        }
        RunModel::Base | RunModel::Unigram | RunModel::Trained(_) => {
            let folder = checkpoint::student(run)?;
            let template = checkpoint::student_template(run, &folder)?;
            Ok((folder, template))
        }
    }
}

/// Loads a model to answer prompts, with the teacher's template and reasoning markers.
pub(super) fn open(context: &Context, model: RunModel) -> anyhow::Result<Local> {
    let run = &context.run;
    let (folder, template) = folder_and_template(context, model)?;
    let model = load(context, model)?;
    let settings = LocalSettings {
        template: Some(template),
        dir: folder,
        dtype: model.dtype(),
        device: context.device.clone(),
        reasoning: run.settings.collect.reasoning.clone(),
        licence: None,
        origin: None,
    };
    Ok(Local::with_model(model, settings)?)
}

fn samples(
    context: &Context,
    settings: &EvalAnswers,
    stage: &str,
    model: &Local,
    prompts: &[Prompt],
) -> anyhow::Result<Option<Vec<TaskSample>>> {
    let grader = settings.grader;
    let sampling = Sampling {
        max_new_tokens: settings.max_new_tokens,
        temperature: 0.0,
        ..Sampling::default()
    };
    let sample = |prompt: &Prompt, completion: Completion| {
        let reference = grade::reference(grader, prompt)?;
        let grade = grader.grade(&completion.answer, reference);
        Ok(TaskSample {
            tokens: completion.tokens.len() as u32,
            prompt_id: completion.prompt_id,
            reasoning: completion.reasoning,
            answer: completion.answer,
            extracted: grade.extracted,
            correct: grade.correct,
            finished: completion.finish_reason == FinishReason::Stop,
        })
    };
    let batches = AnswerBatches {
        stage,
        model,
        sampling,
        seed: 0,
        batch: settings.batch,
    };
    batches.collect(context, prompts, sample)
}

/// A model that answers prompts, a batch at a time.
pub(super) struct AnswerBatches<'a> {
    pub(super) stage: &'a str,
    pub(super) model: &'a Local,
    pub(super) sampling: Sampling,
    pub(super) seed: u64,
    /// Number of prompts that are answered at a time.
    pub(super) batch: usize,
}

impl AnswerBatches<'_> {
    /// Answers each prompt once, with progress output, and makes a record of each answer. `None` if it was stopped.
    pub(super) fn collect<R>(
        &self,
        context: &Context,
        prompts: &[Prompt],
        record: impl Fn(&Prompt, Completion) -> anyhow::Result<R>,
    ) -> anyhow::Result<Option<Vec<R>>> {
        let total = prompts.len() as u64;
        let mut work = context.console.progress(self.stage, "answers", 0, total);
        let (mut records, mut tokens) = (Vec::with_capacity(prompts.len()), 0);
        for batch in prompts.chunks(self.batch) {
            let ask = |prompt| Ask {
                prompt,
                sample_index: 0,
            };
            let asks: Vec<Ask<'_>> = batch.iter().map(ask).collect();
            let go_on = &mut |_: usize| ControlFlow::Continue(());
            let completions = (self.model).sample(&asks, &self.sampling, &[], self.seed, go_on)?;
            let completions = completions.context("the model stopped without being asked to")?;
            for (prompt, completion) in batch.iter().zip(completions) {
                tokens += completion.tokens.len() as u64;
                records.push(record(prompt, completion)?);
            }
            work.update(records.len() as u64, tokens, "");
            if interrupt::is_requested() && records.len() < prompts.len() {
                return Ok(None);
            }
        }
        Ok(Some(records))
    }
}

/// Reads a model's published answers, in the order of `prompts/`.
pub(crate) fn published(context: &Context, model: RunModel) -> anyhow::Result<Vec<TaskSample>> {
    let path = context
        .dir
        .verified(&answers_home(model))?
        .join(SAMPLES_FILE);
    let mut samples = Vec::new();
    for sample in read_shard::<TaskSample>(&path)? {
        samples.push(sample?);
    }
    Ok(samples)
}
