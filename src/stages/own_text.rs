//! The part of `eval` that lets the models answer test prompts at temperature 1, and measures how far they are from a
//! local teacher on their own answers.

use std::collections::BTreeMap;

use anyhow::bail;
use potstill_datasets::{
    Completion, Encoded, OwnText, Prompt, RunModel, read_shard, replace_file, write_shard,
};
use potstill_eval::EvalOwnText;
use potstill_model::Decoder;
use potstill_student::own_text_kl;
use potstill_teacher::{Local, Sampling};
use serde_json::json;

use super::answers::AnswerBatches;
use super::models::{load, model_key, own_text_home, results_file};
use super::{Context, StageOutcome, StageSummary, answers, checkpoint, counts, known, run_stage};
use crate::run_dir::{StagePlan, settings_of};

const SAMPLES_FILE: &str = "samples.parquet";

/// Measures one model on its own text, if the run file has `own_text` in `[eval]`.
pub(super) fn own_text_one(context: &Context, model: RunModel) -> anyhow::Result<StageOutcome> {
    let Some(settings) = &context.run.settings.eval.own_text else {
        return Ok(StageOutcome::UpToDate);
    };
    let (stage, home) = (format!("own text {model}"), own_text_home(model));
    let plan = || plan(context, settings, model);
    let Some(plan) = known(context, &stage, &home, plan)? else {
        return Ok(StageOutcome::WouldRun);
    };
    run_stage(context, &plan, |out| {
        check_tokenizers(context)?;
        let prompts = first_prompts(context, settings.prompts)?;
        let local = answers::open(context, model)?;
        let teacher = load(context, RunModel::Teacher)?;
        let Some(texts) = own_texts(context, settings, &plan.stage, (&local, &teacher), &prompts)?
        else {
            return Ok(None);
        };
        write_shard(&out.join(&home).join(SAMPLES_FILE), &texts, &[])?;
        let tokens: usize = texts.iter().map(|text| text.tokens as usize).sum();
        let nats: f64 = texts.iter().map(|text| text.reverse_kl_nats).sum();
        let results = json!({
            "prompts": texts.len(),
            "tokens": tokens,
            "reverse_kl": nats / tokens.max(1) as f64,
        });
        let results = serde_json::to_string_pretty(&results)? + "\n";
        replace_file(&out.join(results_file(&home)), results.as_bytes())?;
        Ok(Some(StageSummary::new(counts([
            ("prompts", texts.len()),
            ("tokens", tokens),
        ]))))
    })
}

fn plan(context: &Context, settings: &EvalOwnText, model: RunModel) -> anyhow::Result<StagePlan> {
    let run = &context.run;
    let file = &run.settings;
    let prompts = context.dir.require("prompts", "import", run)?;
    let home = own_text_home(model);
    Ok(StagePlan {
        stage: format!("own text {model}"),
        home: home.clone(),
        outputs: vec![home.clone(), results_file(&home)],
        settings: json!({
            "own_text": settings_of(settings)?,
            "test": file.curate.test,
            "seed": file.run.seed,
            "reasoning": settings_of(&file.collect.reasoning)?,
            "chunk_rows": file.train.chunk_rows,
            "template": answers::folder_and_template(context, model)?.1.hash(),
        }),
        inputs: BTreeMap::from([
            ("prompts".to_owned(), prompts.content_hash()),
            ("model".to_owned(), model_key(context, model)?),
            ("teacher".to_owned(), model_key(context, RunModel::Teacher)?),
        ]),
    })
}

/// Checks that the student's token ids are the teacher's, because the teacher scores the ids that a student sampled.
fn check_tokenizers(context: &Context) -> anyhow::Result<()> {
    let run = &context.run;
    let (student, teacher) = (checkpoint::student(run)?, checkpoint::teacher(run)?);
    let fingerprint = |folder| -> anyhow::Result<String> {
        Ok(checkpoint::tokenizer(folder)?.fingerprint().to_owned())
    };
    if fingerprint(&student)? != fingerprint(&teacher)? {
        bail!(
            "the student's tokenizer in {} differs from the teacher's in {}, so the teacher cannot score the student's text\nhint: leave `own_text` of [eval] out, or name a checkpoint of the teacher's family in [student]",
            student.display(),
            teacher.display()
        );
    }
    Ok(())
}

/// Returns at most `limit` test prompts, those with the smallest ids: the ids are hashes, so the choice does not depend
/// on the order of the data.
fn first_prompts(context: &Context, limit: usize) -> anyhow::Result<Vec<Prompt>> {
    let mut prompts = answers::test_prompts(context)?;
    prompts.sort_by(|a, b| a.id.cmp(&b.id));
    prompts.truncate(limit);
    Ok(prompts)
}

/// Lets a model answer the prompts and scores the answers with the teacher. An answer's randomness follows from the run's
/// seed and the prompt, so it is the same for all models.
fn own_texts(
    context: &Context,
    settings: &EvalOwnText,
    stage: &str,
    (model, teacher): (&Local, &Decoder),
    prompts: &[Prompt],
) -> anyhow::Result<Option<Vec<OwnText>>> {
    let file = &context.run.settings;
    let sampling = Sampling {
        max_new_tokens: settings.max_new_tokens,
        temperature: 1.0,
        ..Sampling::default()
    };
    let own_text = |prompt: &Prompt, completion: Completion| {
        let mut token_ids = model.prompt_ids(prompt)?.to_vec();
        let prompt_tokens = token_ids.len();
        token_ids.extend(completion.tokens.iter().filter_map(|token| token.id));
        let text = Encoded {
            loss_mask: (0..token_ids.len()).map(|t| t >= prompt_tokens).collect(),
            token_ids,
        };
        Ok(OwnText {
            prompt_id: completion.prompt_id,
            sample_index: completion.sample_index,
            tokens: (text.token_ids.len() - prompt_tokens) as u32,
            reverse_kl_nats: own_text_kl(model.model(), teacher, text, file.train.chunk_rows)?,
        })
    };
    let batches = AnswerBatches {
        stage,
        model,
        sampling,
        seed: u64::from(file.run.seed),
        batch: settings.batch,
    };
    batches.collect(context, prompts, own_text)
}

/// Reads a model's published own text; `None` if the run file does not ask for it.
pub(crate) fn published(
    context: &Context,
    model: RunModel,
) -> anyhow::Result<Option<Vec<OwnText>>> {
    if context.run.settings.eval.own_text.is_none() {
        return Ok(None);
    }
    let path = context
        .dir
        .verified(&own_text_home(model))?
        .join(SAMPLES_FILE);
    let texts: Result<Vec<OwnText>, _> = read_shard::<OwnText>(&path)?.collect();
    Ok(Some(texts?))
}
