//! The answers that the data has.

use std::path::Path;
use std::sync::Arc;

use anyhow::{anyhow, bail};
use potstill_datasets::{Completion, FolderRows, ImportSettings, Imported, Prompt, Provenance};
use potstill_teacher::{AnswerRequest, GivenTeacher, Teacher};

use crate::stages::{Context, import};

/// Provenance of the answers of a file or folder, whose content has this hash.
pub(super) fn provenance(path: &Path, hash: String) -> Provenance {
    let name = path.file_name().unwrap_or_default();
    Provenance {
        teacher: name.to_string_lossy().into_owned(),
        revision: hash,
        engine: "given".to_owned(),
        dtype: String::new(),
        tokenizer: String::new(),
        template: String::new(),
        sampling: "{}".to_owned(),
        temperatures: Vec::new(),
        licence: None,
    }
}

pub(super) fn teacher(provenance: Provenance) -> Teacher {
    Teacher::Given(Box::new(GivenTeacher { provenance }))
}

/// Counts the answers to each prompt of `prompts/`.
///
/// # Errors
/// A prompt without an answer; data that are not those of `prompts/`.
pub(super) fn count(context: &Context) -> anyhow::Result<Vec<u32>> {
    let settings = import::settings_of(&context.run, context.limit)?;
    let mut prompts = FolderRows::<Prompt>::open(&context.dir.verified("prompts")?)?;
    let mut samples: Vec<u32> = Vec::new();
    for row in import::rows(&context.run, &settings)? {
        let row = row?;
        if row.is_new_prompt {
            let published = prompts.next().transpose()?;
            if published.is_none_or(|published| published.id != row.prompt.id) {
                bail!(
                    "{} is not in its place in `prompts/`: the file or the limit changed\nhint: run `import` again",
                    row.prompt.source
                );
            }
            samples.push(0);
        }
        if let Some(samples) = samples.get_mut(row.prompt_number) {
            *samples += u32::try_from(row.answers.len())?;
        }
    }
    let Some(unanswered) = samples.iter().position(|samples| *samples == 0) else {
        return Ok(samples);
    };
    let prompt = FolderRows::<Prompt>::open(&context.dir.verified("prompts")?)?.nth(unanswered);
    match prompt.transpose()? {
        Some(prompt) => Err(no_answer(&prompt)),
        None => Ok(samples),
    }
}

/// The answers of the data as requests, in the data's order. `samples` is the number of answers to each prompt.
pub(super) fn requests<'a>(
    context: &'a Context,
    settings: &'a ImportSettings,
    samples: &[u32],
) -> anyhow::Result<impl Iterator<Item = anyhow::Result<(u32, AnswerRequest)>> + use<'a>> {
    let first_ordinals: Vec<u32> = samples
        .iter()
        .scan(0, |next, samples| {
            let first = *next;
            *next += samples;
            Some(first)
        })
        .collect();
    let rows = import::rows(&context.run, settings)?;
    Ok(rows.flat_map(move |row| {
        let row = match row {
            Ok(row) => row,
            Err(error) => return vec![Err(error)],
        };
        let Some(first) = first_ordinals.get(row.prompt_number) else {
            return Vec::new();
        };
        let prompt = Arc::new(row.prompt);
        let request = |given: Completion| {
            let ordinal = first + given.sample_index;
            let request = AnswerRequest {
                ordinal,
                prompt: prompt.clone(),
                sample_index: given.sample_index,
                given: Some(given),
            };
            Ok((ordinal, request))
        };
        row.answers.into_iter().map(request).collect()
    }))
}

fn no_answer(prompt: &Prompt) -> anyhow::Error {
    anyhow!(
        "{} has no answer, and `answers` of [import] is \"given\"\nhint: add an assistant turn at the end of `messages`, or name the column of answers (`answer` beside `question`, `output` beside `instruction`); or remove the row; or let a teacher answer",
        prompt.source
    )
}

/// Refuses data in which a prompt has no answer.
pub(in crate::stages) fn check_answered(imported: &Imported) -> anyhow::Result<()> {
    let mut answers = imported.answers.iter().peekable();
    for prompt in &imported.prompts {
        let mut is_answered = false;
        while answers.next_if(|a| a.prompt_id == prompt.id).is_some() {
            is_answered = true;
        }
        if !is_answered {
            return Err(no_answer(prompt));
        }
    }
    Ok(())
}
