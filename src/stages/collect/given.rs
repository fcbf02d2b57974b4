//! The answers that the data has.

use std::path::Path;

use anyhow::bail;
use potstill_datasets::{Completion, FolderRows, Imported, Prompt, Provenance, hash_file};
use potstill_teacher::{GivenTeacher, Teacher};

use crate::stages::{Context, import};

/// Provenance of the answers of a file.
pub(super) fn provenance(path: &Path) -> anyhow::Result<Provenance> {
    let name = path.file_name().unwrap_or_default();
    Ok(Provenance {
        teacher: name.to_string_lossy().into_owned(),
        revision: hash_file(path)?.sha256,
        engine: "given".to_owned(),
        dtype: String::new(),
        tokenizer: String::new(),
        template: String::new(),
        sampling: "{}".to_owned(),
        temperatures: Vec::new(),
        licence: None,
    })
}

pub(super) fn teacher(provenance: Provenance) -> Teacher {
    Teacher::Given(Box::new(GivenTeacher { provenance }))
}

/// Reads the answers, in the order of `prompts/`, with the number of answers to each prompt.
pub(super) fn read(context: &Context) -> anyhow::Result<(Vec<u32>, Vec<Completion>)> {
    let imported = import::read(&context.run, context.limit)?;
    check_answered(&imported)?;
    let mut answers = imported.answers.iter().peekable();
    let mut samples = Vec::with_capacity(imported.prompts.len());
    for prompt in FolderRows::<Prompt>::open(&context.dir.path("prompts"))? {
        let id = prompt?.id;
        let mut count = 0;
        while answers.next_if(|answer| answer.prompt_id == id).is_some() {
            count += 1;
        }
        samples.push(count);
    }
    if let Some(answer) = answers.next() {
        bail!(
            "the source has an answer to prompt {}, which `prompts/` does not have: the file changed while it was read\nhint: run `import` again",
            answer.prompt_id
        );
    }
    Ok((samples, imported.answers))
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
            bail!(
                "{} has no answer, and `answers` of [import] is \"given\"\nhint: add an assistant turn at the end of `messages`, or name the column of answers (`answer` beside `question`, `output` beside `instruction`); or remove the row; or let a teacher answer",
                prompt.source
            );
        }
    }
    Ok(())
}
