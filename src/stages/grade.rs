//! `grade`: compares each answer with the reference of its prompt and writes `verdicts/`, with the same
//! shards and rows as `completions/`.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context as _, bail};
use potstill_datasets::{Completion, Prompt, ShardWriter, Verdict, read_shard, shard_name, shards};
use potstill_eval::Grader;
use serde_json::json;

use super::{Context, StageOutcome, StageSummary, counts, import, known, run_stage};
use crate::run_dir::StagePlan;

/// Folder of the verdicts.
const HOME: &str = "verdicts";

/// Grades every answer.
///
/// # Errors
/// When nothing was collected, or a prompt has no reference that the grader can use.
pub fn grade(context: &Context) -> anyhow::Result<StageOutcome> {
    let run = &context.run;
    let Some(settings) = &run.settings.grade else {
        bail!(
            "{} has no table [grade]\nhint: add [grade] with `grader = \"exact\"` or `grader = \"number\"`",
            run.path.display()
        );
    };
    let grader = settings.grader;
    let Some(plan) = known(context, "grade", HOME, || plan(context, grader))? else {
        return Ok(StageOutcome::WouldRun);
    };
    run_stage(context, &plan, |out| {
        let prompts = import::published_by_id(&context.dir.verified("prompts")?)?;
        let completions = context.dir.verified("completions")?;
        let (mut right, mut wrong) = (0, 0);
        for (index, shard) in shards(&completions)?.iter().enumerate() {
            let path = out.join("verdicts").join(shard_name(index));
            let mut verdicts = ShardWriter::<Verdict>::new(&path, &[])?;
            for completion in read_shard::<Completion>(shard)? {
                let completion = completion?;
                let verdict = verdict(grader, &prompts, completion)?;
                match verdict.correct {
                    true => right += 1,
                    false => wrong += 1,
                }
                verdicts.push(verdict)?;
            }
            verdicts.finish()?;
        }
        Ok(Some(StageSummary::new(counts([
            ("right", right),
            ("wrong", wrong),
        ]))))
    })
}

fn plan(context: &Context, grader: Grader) -> anyhow::Result<StagePlan> {
    let (dir, run) = (&context.dir, &context.run);
    let prompts = dir.require("prompts", "import", run)?;
    let completions = dir.require("completions", "collect", run)?;
    Ok(StagePlan {
        stage: "grade".to_owned(),
        home: HOME.to_owned(),
        outputs: vec![HOME.to_owned()],
        settings: json!({ "grader": grader.name() }),
        inputs: BTreeMap::from([
            ("prompts".to_owned(), prompts.content_hash()),
            ("completions".to_owned(), completions.content_hash()),
        ]),
    })
}

fn verdict(
    grader: Grader,
    prompts: &HashMap<String, Prompt>,
    completion: Completion,
) -> anyhow::Result<Verdict> {
    let prompt = prompts.get(&completion.prompt_id);
    let prompt =
        prompt.with_context(|| format!("`prompts/` has no prompt {}", completion.prompt_id))?;
    let grade = grader.grade(&completion.answer, reference(grader, prompt)?);
    Ok(Verdict {
        prompt_id: completion.prompt_id,
        sample_index: completion.sample_index,
        grader: grader.name().to_owned(),
        correct: grade.correct,
        extracted: grade.extracted,
    })
}

/// Returns the reference of a prompt, if the grader can compare answers with it.
pub(super) fn reference(grader: Grader, prompt: &Prompt) -> anyhow::Result<&str> {
    let Some(reference) = &prompt.reference else {
        bail!(
            "the prompt of {} has no reference, so its answers cannot be graded\nhint: set `answer` in `columns` of [import] to the column of references, or remove the row",
            prompt.source
        );
    };
    if grader.expected(reference).is_none() {
        bail!(
            "the reference {reference:?} of {} contains nothing that the grader `{}` can compare\nhint: correct the reference, or set another `grader`",
            prompt.source,
            grader.name()
        );
    }
    Ok(reference)
}

/// Reads the verdicts on a shard of `completions/`, row for row.
pub(super) fn verdicts(dir: &Path, shard: usize) -> anyhow::Result<Vec<Verdict>> {
    let mut verdicts = Vec::new();
    for verdict in read_shard::<Verdict>(&dir.join(shard_name(shard)))? {
        verdicts.push(verdict?);
    }
    Ok(verdicts)
}
