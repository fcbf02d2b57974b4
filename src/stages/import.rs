//! `import`: reads prompts from the data file into `prompts/`.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use potstill_datasets::{
    AnswerSource, Completion, Error, FolderRows, ImportSettings, Imported, ImportedRow,
    PROMPTS_PER_SHARD, Prompt, Reasoning, ShardWriter, data_files, hash_file, import_rows,
    shard_name, split_reasoning, stage_key,
};
use serde_json::json;

use super::{Context, StageOutcome, StageSummary, counts, run_stage};
use crate::run_dir::StagePlan;
use crate::run_file::Loaded;

/// Reads the prompts and publishes them.
///
/// # Errors
/// When the data file does not exist, or one of its rows is not a prompt.
pub fn import(context: &Context) -> anyhow::Result<StageOutcome> {
    let files = source(&context.run)?;
    let mut settings = json!({
        "columns": context.run.settings.import.columns,
        "system": context.run.settings.import.system,
        "limit": limit(&context.run, context.limit),
    });
    let import = &context.run.settings.import;
    if let Some(delimiter) = import.delimiter {
        settings["delimiter"] = json!(delimiter);
    }
    // A row that repeats a question is a duplicate, unless its answer is trained on.
    if import.answers == AnswerSource::Given && import.columns.answer.is_some() {
        settings["answers"] = json!("given");
    }
    let plan = StagePlan {
        stage: "import".to_owned(),
        home: "prompts".to_owned(),
        outputs: vec!["prompts".to_owned()],
        settings,
        inputs: BTreeMap::from([("source".to_owned(), hash_of(&files)?)]),
    };
    run_stage(context, &plan, |out| {
        let settings = settings_of(&context.run, context.limit)?;
        let has_groups = settings.columns.group.is_some();
        let (mut shard, mut prompts, mut duplicates) = (None, 0, 0);
        for row in rows(&context.run, &settings)? {
            let row = row?;
            duplicates += usize::from(row.is_duplicate());
            if !row.is_new_prompt {
                continue;
            }
            let mut writer: ShardWriter<Prompt> = match shard.take() {
                Some(writer) => writer,
                None => {
                    let name = shard_name(prompts / PROMPTS_PER_SHARD);
                    ShardWriter::begin(&out.join("prompts").join(name), &[], has_groups)?
                }
            };
            writer.push(row.prompt)?;
            prompts += 1;
            match prompts % PROMPTS_PER_SHARD {
                0 => writer.finish()?,
                _ => shard = Some(writer),
            }
        }
        if let Some(writer) = shard {
            writer.finish()?;
        }
        Ok(Some(StageSummary::new(counts([
            ("prompts", prompts),
            ("duplicates merged", duplicates),
        ]))))
    })
}

/// Returns the paths of the data files, which must exist: one, or those of a folder or pattern.
pub(crate) fn source(run: &Loaded) -> anyhow::Result<Vec<PathBuf>> {
    let refused = |why: String| run.problem(&["import", "path"], why).into();
    let files = match data_files(run.settings.import.path.as_path()) {
        Ok(files) => files,
        Err(e @ Error::Invalid { .. }) => return Err(refused(e.to_string())),
        Err(e) => return Err(e.into()),
    };
    for path in &files {
        match std::fs::metadata(path) {
            Ok(found) if found.is_file() => {}
            Ok(_) => {
                return Err(refused(format!(
                    "{} is not a file but a pipe, a device or a socket\nhint: copy the data to a file, and name that",
                    path.display()
                )));
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(refused(format!(
                    "the file {} does not exist\nhint: a relative path starts at the folder of the run file",
                    path.display()
                )));
            }
            Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
        }
    }
    Ok(files)
}

/// Computes the SHA-256 of a data file, or of the hashes of several.
pub(super) fn hash_of(files: &[PathBuf]) -> anyhow::Result<String> {
    let mut hashes = Vec::new();
    for file in files {
        hashes.push(hash_file(file)?.sha256);
    }
    match hashes.as_slice() {
        [one] => Ok(one.clone()),
        several => Ok(stage_key("data files", &json!(several), &BTreeMap::new())),
    }
}

fn limit(run: &Loaded, flag: Option<usize>) -> Option<usize> {
    flag.or(run.settings.import.limit)
}

/// Settings of the reader; `flag` is the limit of the command line.
pub(super) fn settings_of(run: &Loaded, flag: Option<usize>) -> anyhow::Result<ImportSettings> {
    source(run)?;
    Ok(ImportSettings {
        limit: limit(run, flag),
        ..run.settings.import.clone()
    })
}

/// Reads the whole data file.
pub(crate) fn read(run: &Loaded, flag: Option<usize>) -> anyhow::Result<Imported> {
    let settings = settings_of(run, flag)?;
    let mut imported = potstill_datasets::import(&settings).map_err(|e| named(run, e))?;
    let marks = run.settings.collect.reasoning.as_ref();
    imported
        .answers
        .iter_mut()
        .for_each(|a| separate_reasoning(a, marks));
    Ok(imported)
}

/// Reads the data file row by row.
pub(super) fn rows<'a>(
    run: &'a Loaded,
    settings: &'a ImportSettings,
) -> anyhow::Result<impl Iterator<Item = anyhow::Result<ImportedRow>>> {
    let rows = import_rows(settings).map_err(|e| named(run, e))?;
    Ok(rows.map(|row| {
        let mut row = row.map_err(|e| named(run, e))?;
        let marks = run.settings.collect.reasoning.as_ref();
        row.answers
            .iter_mut()
            .for_each(|answer| separate_reasoning(answer, marks));
        Ok(row)
    }))
}

/// An error of the reader, with the key of the run file that it concerns.
fn named(run: &Loaded, error: Error) -> anyhow::Error {
    match error {
        e @ Error::MissingColumn { .. } => {
            run.problem(&["import", "columns"], e.to_string()).into()
        }
        e => e.into(),
    }
}

/// Separates the reasoning from an answer whose text contains it.
fn separate_reasoning(answer: &mut Completion, marks: Option<&Reasoning>) {
    if let Some(marks) = marks
        && answer.reasoning.is_none()
    {
        (answer.reasoning, answer.answer) = split_reasoning(&answer.answer, marks);
    }
}

/// Reads the published prompts, in order.
pub(crate) fn published(dir: &Path) -> anyhow::Result<Vec<Prompt>> {
    Ok(FolderRows::open(dir)?.collect::<Result<_, _>>()?)
}

/// The published prompts by id.
pub(crate) fn published_by_id(dir: &Path) -> anyhow::Result<HashMap<String, Prompt>> {
    let prompts = FolderRows::<Prompt>::open(dir)?;
    let by_id = prompts.map(|prompt| prompt.map(|prompt| (prompt.id.clone(), prompt)));
    Ok(by_id.collect::<Result<_, _>>()?)
}
