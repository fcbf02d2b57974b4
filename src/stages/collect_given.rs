//! `collect` where the data has its own answers: they become `completions/` as they are.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{anyhow, bail};
use potstill_datasets::{
    Completion, Imported, PROMPTS_PER_SHARD, Prompt, Provenance, ShardWriter, hash_file, shard_name,
};
use serde_json::json;

use super::{Context, Done, Outcome, counts, import, stage};
use crate::run_dir::{Plan, settings_of};

/// Publishes the answers of the data.
pub(super) fn collect(context: &Context) -> anyhow::Result<Outcome> {
    let run = &context.run;
    let prompts = context.dir.require("prompts", "import", run)?;
    let path = import::source(run)?;
    let source = hash_file(&path)?.sha256;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let plan = Plan {
        stage: "collect".to_owned(),
        home: "completions".to_owned(),
        outputs: vec!["completions".to_owned()],
        // Which columns are the answer's: the prompts do not tell.
        settings: json!({
            "given": name,
            "columns": settings_of(&run.file.import.columns)?,
            "reasoning": settings_of(&run.file.collect.reasoning)?,
        }),
        inputs: BTreeMap::from([
            ("prompts".to_owned(), prompts.content_hash()),
            ("source".to_owned(), source.clone()),
        ]),
    };
    stage(context, &plan, |out| {
        let imported = import::read(run, context.limit)?;
        check_answered(&imported)?;
        let provenance = Provenance {
            teacher: name.to_string(),
            revision: source,
            engine: "given".to_owned(),
            dtype: String::new(),
            tokenizer: String::new(),
            template: String::new(),
            sampling: "{}".to_owned(),
            temperatures: Vec::new(),
            licence: None,
        };
        let published = import::published(&context.dir.path("prompts"))?;
        let answers = write(out, &published, imported.answers, provenance)?;
        Ok(Some(Done::new(counts([("answers", answers)]))))
    })
}

/// Refuses data in which a prompt has no answer.
pub(super) fn check_answered(imported: &Imported) -> anyhow::Result<()> {
    let mut answers = imported.answers.iter().peekable();
    for prompt in &imported.prompts {
        let mut answered = false;
        while answers.next_if(|a| a.prompt_id == prompt.id).is_some() {
            answered = true;
        }
        if !answered {
            bail!(
                "{} has no answer, and `answers` of [import] is \"given\"\nhint: add an assistant turn at the end of `messages`, or name the column of answers (`answer` beside `question`, `output` beside `instruction`); or remove the row; or let a teacher answer",
                prompt.source
            );
        }
    }
    Ok(())
}

fn write(
    out: &Path,
    prompts: &[Prompt],
    answers: Vec<Completion>,
    provenance: Provenance,
) -> anyhow::Result<usize> {
    let provenance = [provenance];
    let mut answers = answers.into_iter().peekable();
    let mut written = 0;
    for (index, prompts) in prompts.chunks(PROMPTS_PER_SHARD).enumerate() {
        let path = out.join("completions").join(shard_name(index));
        let mut shard = ShardWriter::<Completion>::new(&path, &provenance)?;
        for prompt in prompts {
            while let Some(answer) = answers.next_if(|a| a.prompt_id == prompt.id) {
                shard.push(answer)?;
                written += 1;
            }
        }
        shard.finish()?;
    }
    match answers.next() {
        None => Ok(written),
        Some(answer) => Err(anyhow!(
            "the source has an answer to prompt {}, which `prompts/` does not have: the file changed while it was read; run `import` again",
            answer.prompt_id
        )),
    }
}
