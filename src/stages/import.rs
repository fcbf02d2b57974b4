//! `import`: prompts from the run file's source into `prompts/`.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use potstill_datasets::{
    AnswerSource, Completion, Error, FolderRows, ImportSettings, Imported, PROMPTS_PER_SHARD,
    Prompt, Reasoning, hash_file, shard_name, split_reasoning, write_shard,
};
use serde_json::json;

use super::{Context, StageOutcome, StageSummary, counts, run_stage};
use crate::run_dir::StagePlan;
use crate::run_file::Loaded;

/// Reads the prompts and publishes them.
///
/// # Errors
/// When the source is absent or a line of it is no prompt.
pub fn import(context: &Context) -> anyhow::Result<StageOutcome> {
    let path = source(&context.run)?;
    let mut settings = json!({
        "columns": context.run.file.import.columns,
        "system": context.run.file.import.system,
        "limit": limit(&context.run, context.limit),
        // A prompt's source names the file.
        "name": path.file_name().map(|name| name.to_string_lossy()),
    });
    // Rows that repeat a question count as duplicates unless their answers are learned from.
    let import = &context.run.file.import;
    if import.answers == AnswerSource::Given && import.columns.answer.is_some() {
        settings["answers"] = json!("given");
    }
    let plan = StagePlan {
        stage: "import".to_owned(),
        home: "prompts".to_owned(),
        outputs: vec!["prompts".to_owned()],
        settings,
        inputs: BTreeMap::from([("source".to_owned(), hash_file(&path)?.sha256)]),
    };
    run_stage(context, &plan, |out| {
        let Imported {
            prompts,
            duplicates,
            ..
        } = read(&context.run, context.limit)?;
        for (index, shard) in prompts.chunks(PROMPTS_PER_SHARD).enumerate() {
            write_shard(&out.join("prompts").join(shard_name(index)), shard, &[])?;
        }
        Ok(Some(StageSummary::new(counts([
            ("prompts", prompts.len()),
            ("duplicates merged", duplicates),
        ]))))
    })
}

/// The source of the run file, which must be a file.
pub(crate) fn source(run: &Loaded) -> anyhow::Result<PathBuf> {
    let path = run.file.import.path.as_path().to_owned();
    match std::fs::metadata(&path) {
        Ok(found) if found.is_file() => Ok(path),
        Ok(_) => Err(run
            .problem(
                &["import", "path"],
                format!("{} is a folder; name a file in it", path.display()),
            )
            .into()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(run
            .problem(
                &["import", "path"],
                format!("there is no file {}", path.display()),
            )
            .into()),
        Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
    }
}

fn limit(run: &Loaded, flag: Option<usize>) -> Option<usize> {
    flag.or(run.file.import.limit)
}

/// Reads the source.
pub(crate) fn read(run: &Loaded, flag: Option<usize>) -> anyhow::Result<Imported> {
    source(run)?;
    let settings = ImportSettings {
        limit: limit(run, flag),
        ..run.file.import.clone()
    };
    match potstill_datasets::import(&settings) {
        Ok(mut imported) => {
            if let Some(marks) = run.file.collect.reasoning.clone() {
                imported.answers.iter_mut().for_each(|a| part(a, &marks));
            }
            Ok(imported)
        }
        Err(e @ Error::MissingColumn { .. }) => {
            Err(run.problem(&["import", "columns"], e.to_string()).into())
        }
        Err(e @ Error::NoPrompts { .. }) => Err(anyhow!(
            "{e}; put prompts into it, or name another file in `path` of [import]"
        )),
        Err(e) => Err(e.into()),
    }
}

/// Takes the reasoning out of an answer that has it in its text.
fn part(answer: &mut Completion, marks: &Reasoning) {
    if answer.reasoning.is_none() {
        (answer.reasoning, answer.answer) = split_reasoning(&answer.answer, marks);
    }
}

/// The published prompts, in order.
pub(crate) fn published(dir: &Path) -> anyhow::Result<Vec<Prompt>> {
    Ok(FolderRows::open(dir)?.collect::<Result<_, _>>()?)
}

/// The published prompts by id.
pub(crate) fn published_by_id(dir: &Path) -> anyhow::Result<HashMap<String, Prompt>> {
    let prompts = FolderRows::<Prompt>::open(dir)?;
    let by_id = prompts.map(|prompt| prompt.map(|prompt| (prompt.id.clone(), prompt)));
    Ok(by_id.collect::<Result<_, _>>()?)
}
