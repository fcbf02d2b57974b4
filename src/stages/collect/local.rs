//! A teacher that runs here, from the run file's tables.

use std::path::Path;

use anyhow::Context as _;
use potstill_datasets::{Error as DataError, Prompt, bos_problem};
use potstill_model::Config;
use potstill_teacher::{
    Local, LocalSettings, LocalTeacher, Origin, ScoringOptions, Teacher, TextEncoder,
};
use serde_json::{Value, json};

use crate::run_dir::settings_of;
use crate::run_file::{Loaded, RunFile};
use crate::stages::{Context, checkpoint};

/// Settings that an answer depends on, besides its prompt and sample index.
pub(super) fn answer_settings(run: &Loaded, folder: &Path) -> anyhow::Result<Value> {
    let RunFile {
        collect, run: head, ..
    } = &run.settings;
    let teacher = checkpoint::teacher_table(run)?;
    Ok(json!({
        "teacher": checkpoint::content_hash(folder)?,
        "dtype": settings_of(&teacher.dtype)?,
        "template": checkpoint::template(run, folder)?.hash(),
        "licence": teacher.licence,
        "seed": head.seed,
        "max_new_tokens": collect.max_new_tokens,
        "temperature": collect.temperature,
        "top_k": collect.top_k,
        "top_p": collect.top_p,
        "min_p": collect.min_p,
        "repetition_penalty": collect.repetition_penalty,
        "stop": collect.stop,
        "signals": settings_of(&collect.signals)?,
        "reasoning": settings_of(&collect.reasoning)?,
    }))
}

/// Loads the teacher with its settings for answers.
pub(super) fn teacher(context: &Context, folder: &Path) -> anyhow::Result<Teacher> {
    let RunFile { collect, run, .. } = &context.run.settings;
    let seed = u64::from(run.seed);
    Ok(Teacher::Local(Box::new(LocalTeacher {
        local: open_local(context, folder)?,
        batch: collect.batch,
        sampling: collect.sampling(),
        stop: collect.stop.clone(),
        seed,
        signals: collect.signals.clone().map(|signals| ScoringOptions {
            signals,
            seed,
            batch: collect.batch,
            window: None,
        }),
    })))
}

/// Loads the checkpoint of the run file's teacher.
pub(crate) fn open_local(context: &Context, folder: &Path) -> anyhow::Result<Local> {
    let teacher = checkpoint::teacher_table(&context.run)?;
    Ok(Local::open(LocalSettings {
        dir: folder.to_owned(),
        dtype: checkpoint::dtype(teacher.dtype),
        device: context.device.clone(),
        template: Some(checkpoint::template(&context.run, folder)?),
        reasoning: context.run.settings.collect.reasoning.clone(),
        licence: teacher.licence.clone(),
        origin: context.run.hub.get("teacher").map(|source| Origin {
            name: source.repository.clone(),
            revision: source.commit.clone(),
        }),
    })?)
}

/// The findings of [`check_prompts`] about prompts that fit.
pub(crate) struct CheckedPrompts {
    /// Tokens of the longest prompt.
    pub(crate) longest: usize,
    /// The problem of the first prompt that does not begin as it should.
    pub(crate) bos_problem: Option<String>,
}

/// Checks that every prompt fits into the teacher's context with its answer.
///
/// # Errors
/// The first prompt that does not fit, or that the template cannot render.
pub(crate) fn check_prompts(
    run: &Loaded,
    folder: &Path,
    prompts: impl Iterator<Item = Result<Prompt, DataError>>,
) -> anyhow::Result<CheckedPrompts> {
    let encoder = TextEncoder::new(
        checkpoint::tokenizer(folder)?,
        checkpoint::template(run, folder)?,
        run.settings.collect.reasoning.clone(),
    );
    let context = Config::from_dir(folder)?.max_position_embeddings;
    let answer = run.settings.collect.max_new_tokens;
    let mut checked = CheckedPrompts {
        longest: 0,
        bos_problem: None,
    };
    for prompt in prompts {
        let prompt = prompt?;
        let ids = encoder.prompt_ids(&prompt);
        let ids = ids.with_context(|| format!("cannot render the prompt of {}", prompt.source))?;
        let tokens = ids.len();
        if tokens + answer > context {
            let hint = match context.saturating_sub(tokens) {
                0 => "shorten it, or take it out of the source".to_owned(),
                room => {
                    format!("shorten it, or set `max_new_tokens` in [collect] to {room} or less")
                }
            };
            anyhow::bail!(
                "the prompt of {} has {tokens} tokens, and with {answer} for the answer that is more than the teacher's context of {context}\nhint: {hint}",
                prompt.source,
            );
        }
        checked.longest = checked.longest.max(tokens);
        if checked.bos_problem.is_none() {
            checked.bos_problem = bos_problem(encoder.tokenizer(), &ids);
        }
    }
    Ok(checked)
}
