//! `curate`: splits the answers by prompt into train, dev and test, and filters those to train on.
//!
//! The split is made before anything is dropped, and dev and test hold all answers of their prompts, also wrong ones
//! and those that were cut. If they were filtered, their text would not be a sample from the teacher's distributions:
//! a model that learned the filter would have a lower NLL on it than the teacher itself.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::bail;
use potstill_datasets::{
    Completion, CurateSettings, Dropped, Failed, FinishReason, KeptAnswers, NearDuplicate, Prompt,
    Record, Selected, Split, WrongAnswers, canonical_json, near_duplicates, read_shard,
    replace_file, shard_name, shards, write_shard,
};
use serde_json::json;

use super::score::UNSCORED;
use super::{Context, StageOutcome, StageSummary, counts, grade, import, run_stage};
use crate::run_dir::{StagePlan, settings_of};

/// Writes the lists of answers for train, dev and test, and of those that are left out.
///
/// # Errors
/// When nothing was collected, or train or test would be empty.
pub fn curate(context: &Context) -> anyhow::Result<StageOutcome> {
    let completions = context
        .dir
        .require("completions", "collect", &context.run)?;
    let file = &context.run.settings;
    let settings = &file.curate;
    let prompts = context.dir.require("prompts", "import", &context.run)?;
    let mut inputs = BTreeMap::from([
        ("completions".to_owned(), completions.content_hash()),
        ("prompts".to_owned(), prompts.content_hash()),
    ]);
    let drops_wrong = file.grade.is_some() && settings.wrong == WrongAnswers::Drop;
    if drops_wrong {
        let verdicts = context.dir.require("verdicts", "grade", &context.run)?;
        inputs.insert("verdicts".to_owned(), verdicts.content_hash());
    }
    let without_signals = without_signals_folder(context, &mut inputs)?;
    let seed = context.run.settings.run.seed;
    let plan = StagePlan {
        stage: "curate".to_owned(),
        home: "train".to_owned(),
        outputs: [
            "dev",
            "test",
            "dropped",
            "near_duplicates",
            "curation.json",
            "train",
        ]
        .map(str::to_owned)
        .to_vec(),
        settings: json!({ "curate": settings_of(settings)?, "seed": seed }),
        inputs,
    };
    run_stage(context, &plan, |out| {
        let verdicts = drops_wrong.then(|| context.dir.path("verdicts"));
        let completions = context.dir.path("completions");
        let without = listed_answers(&without_signals)?;
        let lists = split(&completions, verdicts.as_deref(), &without, settings, seed)?;
        lists.check(context)?;
        for split in Split::ALL {
            write_list(&out.join(split.name()), lists.get(split))?;
        }
        write_list(&out.join("dropped"), &lists.dropped)?;
        let prompts = import::published(&context.dir.path("prompts"))?;
        let near = near_duplicates_of(&prompts, &lists.train, settings, seed);
        write_list(&out.join("near_duplicates"), &near)?;
        let counts = counts([
            ("to train on", lists.train.len()),
            ("for dev", lists.dev.len()),
            ("for test", lists.test.len()),
            ("dropped", lists.dropped.len()),
            ("near-duplicates", near.len()),
        ]);
        let near_in = |split| near.iter().filter(|near| near.split == split).count();
        let size = |split| {
            let list = lists.get(split);
            json!({ "sequences": list.len(), "prompts": prompt_ids(list).len() })
        };
        let summary = json!({
            "train": size(Split::Train),
            "dev": size(Split::Dev),
            "test": size(Split::Test),
            "dropped": lists.reasons(),
            "near_duplicates": { "dev": near_in(Split::Dev), "test": near_in(Split::Test) },
        });
        let summary = canonical_json(&summary) + "\n";
        replace_file(&out.join("curation.json"), summary.as_bytes())?;
        Ok(Some(StageSummary::new(counts)))
    })
}

/// Returns the folder that lists the answers without distributions, which only a teacher behind a server
/// leaves; adds its hash to `inputs`.
fn without_signals_folder(
    context: &Context,
    inputs: &mut BTreeMap<String, String>,
) -> anyhow::Result<Option<PathBuf>> {
    let file = &context.run.settings;
    if file.served().is_none() {
        return Ok(None);
    }
    if file.score.is_some() {
        let signals = context.dir.require("signals", "score", &context.run)?;
        inputs.insert("signals".to_owned(), signals.content_hash());
        return Ok(Some(context.dir.path(UNSCORED)));
    }
    let signals = file.collect.signals.as_ref();
    Ok(signals.map(|_| context.dir.path("failures")))
}

/// Reads the prompt ids and sample indices of a folder of failures.
fn listed_answers(folder: &Option<PathBuf>) -> anyhow::Result<HashSet<(String, u32)>> {
    let mut answers = HashSet::new();
    let Some(folder) = folder else {
        return Ok(answers);
    };
    for shard in shards(folder)? {
        for failed in read_shard::<Failed>(&shard)? {
            let failed = failed?;
            answers.insert((failed.prompt_id, failed.sample_index));
        }
    }
    Ok(answers)
}

/// The answers of each split, and those that are left out.
#[derive(Default)]
struct Lists {
    train: Vec<Selected>,
    dev: Vec<Selected>,
    test: Vec<Selected>,
    dropped: Vec<Dropped>,
}

impl Lists {
    fn get(&self, split: Split) -> &[Selected] {
        match split {
            Split::Train => &self.train,
            Split::Dev => &self.dev,
            Split::Test => &self.test,
        }
    }

    fn get_mut(&mut self, split: Split) -> &mut Vec<Selected> {
        match split {
            Split::Train => &mut self.train,
            Split::Dev => &mut self.dev,
            Split::Test => &mut self.test,
        }
    }

    fn reasons(&self) -> BTreeMap<&str, usize> {
        let mut reasons = BTreeMap::new();
        for dropped in &self.dropped {
            *reasons.entry(dropped.reason.as_str()).or_default() += 1;
        }
        reasons
    }

    /// Checks that there are answers for train and for test. Dev may be empty, unless something is chosen on it.
    fn check(&self, context: &Context) -> anyhow::Result<()> {
        let (train, test) = (self.train.len(), self.test.len());
        if train > 0 && test > 0 {
            return Ok(());
        }
        let dropped: Vec<String> = self
            .reasons()
            .iter()
            .map(|(reason, n)| format!("{n} because {reason}"))
            .collect();
        let dropped = match dropped.is_empty() {
            true => "none were dropped".to_owned(),
            false => format!("dropped: {}", dropped.join(", ")),
        };
        let remedy = if test == 0 {
            "raise `test` in [curate], or import more prompts"
        } else if self.dropped.is_empty() {
            "lower `dev` or `test` in [curate], or import more prompts"
        } else {
            "raise `max_new_tokens` in [collect], or set `keep = \"all\"` or `wrong = \"keep\"` in [curate]"
        };
        bail!(
            "{train} answers are left to train on and {test} for test, and neither number may be 0 ({dropped}; {} is not changed)\nhint: {remedy}",
            context.dir.path("completions").display()
        )
    }
}

/// Splits the answers in `completions` by prompt. `verdicts` is the folder of verdicts if wrong answers are not
/// trained on, and `without` lists the answers without distributions, which no list has.
fn split(
    completions: &Path,
    verdicts: Option<&Path>,
    without: &HashSet<(String, u32)>,
    settings: &CurateSettings,
    seed: u32,
) -> anyhow::Result<Lists> {
    let mut lists = Lists::default();
    for (shard, path) in shards(completions)?.iter().enumerate() {
        let verdicts = match verdicts {
            Some(dir) => grade::verdicts(dir, shard)?,
            None => Vec::new(),
        };
        for (row, completion) in read_shard::<Completion>(path)?.enumerate() {
            let completion = completion?;
            let split = settings.split(seed, &completion.prompt_id);
            let wrong = verdicts.get(row).is_some_and(|verdict| !verdict.correct);
            let not_trained_on = || match split {
                Split::Train => filter_reason(settings.keep, completion.finish_reason)
                    .or(wrong.then_some("it is graded wrong")),
                Split::Dev | Split::Test => None,
            };
            let reason = unusable_reason(&completion, without).or_else(not_trained_on);
            let Completion {
                prompt_id,
                sample_index,
                ..
            } = completion;
            match reason {
                Some(reason) => lists.dropped.push(Dropped {
                    prompt_id,
                    sample_index,
                    reason: reason.to_owned(),
                }),
                None => lists.get_mut(split).push(Selected {
                    shard: shard as u32,
                    row: row as u32,
                    prompt_id,
                    sample_index,
                }),
            }
        }
    }
    Ok(lists)
}

/// Returns why an answer can be neither trained on nor measured, `None` if it can.
fn unusable_reason(
    completion: &Completion,
    without: &HashSet<(String, u32)>,
) -> Option<&'static str> {
    if completion.finish_reason == FinishReason::Error {
        return Some("the teacher failed");
    }
    // An answer without text that the teacher ended by itself consists of an end token.
    let has_text = completion.finish_reason == FinishReason::Stop
        || !completion.tokens.is_empty()
        || !completion.answer.is_empty()
        || !completion.tool_calls.is_empty()
        || completion.reasoning.as_ref().is_some_and(|r| !r.is_empty());
    if !has_text {
        return Some("it has no text");
    }
    let answer = (completion.prompt_id.clone(), completion.sample_index);
    let has_no_distributions = without.contains(&answer);
    has_no_distributions.then_some("it has no distributions")
}

/// Returns why an answer is not trained on, given how it ended; `None` if it is.
fn filter_reason(keep: KeptAnswers, finish_reason: FinishReason) -> Option<&'static str> {
    match (keep, finish_reason) {
        (KeptAnswers::All, _) | (KeptAnswers::Finished, FinishReason::Stop) => None,
        (_, FinishReason::Error) => Some("the teacher failed"),
        (_, FinishReason::Length) => Some("it was cut at `max_new_tokens`"),
        (_, FinishReason::ToolCalls) => Some("it ended in a tool call"),
        (_, FinishReason::ContentFilter) => Some("the teacher's filter cut it"),
    }
}

/// Finds the prompts of dev and test that are near-duplicates of prompts to train on, which are those with an answer in
/// `train`.
fn near_duplicates_of(
    prompts: &[Prompt],
    train: &[Selected],
    settings: &CurateSettings,
    seed: u32,
) -> Vec<NearDuplicate> {
    let trained_on = prompt_ids(train);
    let (mut train, mut others) = (Vec::new(), Vec::new());
    for prompt in prompts {
        match settings.split(seed, &prompt.id) {
            Split::Train if !trained_on.contains(prompt.id.as_str()) => {}
            Split::Train => train.push(prompt),
            split => others.push((split, prompt)),
        }
    }
    near_duplicates(&train, &others)
}

fn prompt_ids(list: &[Selected]) -> HashSet<&str> {
    list.iter().map(|s| s.prompt_id.as_str()).collect()
}

fn write_list<R: Record>(dir: &Path, rows: &[R]) -> anyhow::Result<()> {
    Ok(write_shard(&dir.join(shard_name(0)), rows, &[])?)
}

/// Reads a published list.
pub(crate) fn list(dir: &Path) -> anyhow::Result<Vec<Selected>> {
    let mut list = Vec::new();
    for shard in shards(dir)? {
        for selected in read_shard::<Selected>(&shard)? {
            list.push(selected?);
        }
    }
    Ok(list)
}
