//! `curate`: splits the answers into those to train on, those held out and those dropped.
//!
//! The split hashes the run's seed and the prompt's id. All samples of a prompt are therefore on the same
//! side, and a prompt stays on its side when prompts are added.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use anyhow::bail;
use potstill_datasets::{
    Completion, CurateSettings, Dropped, Failed, FinishReason, KeptAnswers, Record, Selected,
    WrongAnswers, canonical_json, read_shard, replace_file, shard_name, shards, write_shard,
};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::score::UNSCORED;
use super::{Context, StageOutcome, StageSummary, counts, grade, run_stage};
use crate::run_dir::{StagePlan, settings_of};

/// Writes the lists of answers to train on, to measure on and to leave out.
///
/// # Errors
/// When nothing was collected, or one side of the split would be empty.
pub fn curate(context: &Context) -> anyhow::Result<StageOutcome> {
    let completions = context
        .dir
        .require("completions", "collect", &context.run)?;
    let file = &context.run.settings;
    let settings = &file.curate;
    let mut inputs = BTreeMap::from([("completions".to_owned(), completions.content_hash())]);
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
        outputs: ["heldout", "dropped", "curation.json", "train"]
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
        write_list(&out.join("train"), &lists.train)?;
        write_list(&out.join("heldout"), &lists.heldout)?;
        write_list(&out.join("dropped"), &lists.dropped)?;
        let counts = counts([
            ("to train on", lists.train.len()),
            ("held out", lists.heldout.len()),
            ("dropped", lists.dropped.len()),
        ]);
        let summary = json!({
            "train": { "sequences": lists.train.len(), "prompts": count_prompts(&lists.train) },
            "heldout": { "sequences": lists.heldout.len(), "prompts": count_prompts(&lists.heldout) },
            "dropped": lists.reasons(),
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

/// The three lists of a split.
#[derive(Default)]
struct Split {
    train: Vec<Selected>,
    heldout: Vec<Selected>,
    dropped: Vec<Dropped>,
}

impl Split {
    fn reasons(&self) -> BTreeMap<&str, usize> {
        let mut reasons = BTreeMap::new();
        for dropped in &self.dropped {
            *reasons.entry(dropped.reason.as_str()).or_default() += 1;
        }
        reasons
    }

    fn check(&self, context: &Context) -> anyhow::Result<()> {
        let (train, heldout) = (self.train.len(), self.heldout.len());
        if train > 0 && heldout > 0 {
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
        let remedy = if self.dropped.len() > train + heldout {
            "raise `max_new_tokens` in [collect], or set `keep = \"all\"` in [curate]"
        } else if train == 0 {
            "lower `heldout` in [curate], or import more prompts"
        } else {
            "raise `heldout` in [curate], or import more prompts"
        };
        bail!(
            "{train} answers are left to train on and {heldout} are held out, and neither number may be 0 ({dropped}; {} is not changed)\nhint: {remedy}",
            context.dir.path("completions").display()
        )
    }
}

/// Splits the answers in `completions`. `verdicts` is the folder of verdicts if wrong answers are
/// dropped, and `without` lists the answers without distributions, which are dropped too.
fn split(
    completions: &Path,
    verdicts: Option<&Path>,
    without: &HashSet<(String, u32)>,
    settings: &CurateSettings,
    seed: u32,
) -> anyhow::Result<Split> {
    let mut lists = Split::default();
    for (shard, path) in shards(completions)?.iter().enumerate() {
        let verdicts = match verdicts {
            Some(dir) => grade::verdicts(dir, shard)?,
            None => Vec::new(),
        };
        for (row, completion) in read_shard::<Completion>(path)?.enumerate() {
            let Completion {
                prompt_id,
                sample_index,
                finish_reason,
                ..
            } = completion?;
            let wrong = verdicts.get(row).is_some_and(|verdict| !verdict.correct);
            let reason = drop_reason(settings.keep, finish_reason)
                .or(wrong.then_some("it is graded wrong"))
                .or_else(|| {
                    let answer = (prompt_id.clone(), sample_index);
                    without
                        .contains(&answer)
                        .then_some("it has no distributions")
                });
            if let Some(reason) = reason {
                let reason = reason.to_owned();
                lists.dropped.push(Dropped {
                    prompt_id,
                    sample_index,
                    reason,
                });
                continue;
            }
            let side = match is_heldout(settings, seed, &prompt_id) {
                true => &mut lists.heldout,
                false => &mut lists.train,
            };
            side.push(Selected {
                shard: shard as u32,
                row: row as u32,
                prompt_id,
                sample_index,
            });
        }
    }
    Ok(lists)
}

/// Returns the reason for which an answer is dropped, `None` if it is kept.
fn drop_reason(keep: KeptAnswers, finish_reason: FinishReason) -> Option<&'static str> {
    match (keep, finish_reason) {
        (_, FinishReason::Error) => Some("the teacher failed"),
        (KeptAnswers::All, _) | (KeptAnswers::Finished, FinishReason::Stop) => None,
        (KeptAnswers::Finished, FinishReason::Length) => Some("it was cut at `max_new_tokens`"),
        (KeptAnswers::Finished, FinishReason::ToolCalls) => Some("it ended in a tool call"),
        (KeptAnswers::Finished, FinishReason::ContentFilter) => Some("the teacher's filter cut it"),
    }
}

/// Returns whether a prompt is on the held-out side.
pub(super) fn is_heldout(settings: &CurateSettings, seed: u32, prompt_id: &str) -> bool {
    split_position(seed, prompt_id) < settings.heldout
}

/// Maps a prompt to a number in [0, 1), uniformly over prompts.
fn split_position(seed: u32, prompt_id: &str) -> f64 {
    let digest = Sha256::digest(format!("heldout {seed} {prompt_id}"));
    let first = digest
        .iter()
        .take(8)
        .fold(0u64, |all, byte| all << 8 | u64::from(*byte));
    (first >> 11) as f64 / (1u64 << 53) as f64
}

fn count_prompts(list: &[Selected]) -> usize {
    list.iter()
        .map(|s| &s.prompt_id)
        .collect::<BTreeSet<_>>()
        .len()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_split_is_even_and_depends_on_the_seed() {
        let held = |seed| {
            (0..2000)
                .filter(|i| split_position(seed, &format!("p{i}")) < 0.2)
                .collect::<Vec<_>>()
        };
        let (one, two) = (held(1), held(2));
        assert!((350..450).contains(&one.len()), "{}", one.len());
        assert_ne!(one, two);
        assert_eq!(one, held(1));
    }
}
