//! `curate`: splits the answers by prompt into train, dev and test, and filters those to train on.
//!
//! The split is made before anything is dropped, and dev and test hold all answers of their prompts, also wrong ones
//! and those that were cut. If they were filtered, their text would not be a sample from the teacher's distributions:
//! a model that learned the filter would have a lower NLL on it than the teacher itself.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail};
use potstill_datasets::{
    Completion, CurateSettings, Dropped, Failed, FinishReason, KeptAnswers, NearDuplicate, Prompt,
    Record, Selected, Split, WrongAnswers, canonical_json, near_duplicates, read_shard,
    replace_file, shard_name, shards, write_shard,
};
use serde::Deserialize;
use serde_json::json;

use super::score::UNSCORED;
use super::{Context, StageOutcome, StageSummary, counts, grade, import, known, run_stage};
use crate::run_dir::{StagePlan, settings_of};

/// File with the counts of the stage.
const CURATION_FILE: &str = "curation.json";

/// Writes the lists of answers for train, dev and test, and of those that are left out.
///
/// # Errors
/// When nothing was collected, or train or test would be empty.
pub fn curate(context: &Context) -> anyhow::Result<StageOutcome> {
    let Some((plan, without_signals)) = known(context, "curate", "train", || plan(context))? else {
        return Ok(StageOutcome::WouldRun);
    };
    let settings = &context.run.settings.curate;
    let seed = context.run.settings.run.seed;
    run_stage(context, &plan, |out| {
        let verdicts = match drops_wrong(context) {
            true => Some(context.dir.verified("verdicts")?),
            false => None,
        };
        let completions = context.dir.verified("completions")?;
        let without = listed_answers(context, without_signals)?;
        let lists = split(&completions, verdicts.as_deref(), &without, settings, seed)?;
        lists.check(context)?;
        for split in Split::ALL {
            write_list(&out.join(split.name()), lists.get(split))?;
        }
        write_list(&out.join("dropped"), &lists.dropped)?;
        let prompts = import::published(&context.dir.verified("prompts")?)?;
        let near = near_duplicates_of(&prompts, &lists.train, settings, seed);
        write_list(&out.join("near_duplicates"), &near)?;
        let counts = counts([
            (count_name(Split::Train), lists.train.len()),
            (count_name(Split::Dev), lists.dev.len()),
            (count_name(Split::Test), lists.test.len()),
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
        replace_file(&out.join(CURATION_FILE), summary.as_bytes())?;
        Ok(Some(StageSummary::new(counts)))
    })
}

/// Name in the manifest of the number of a split's answers.
fn count_name(split: Split) -> &'static str {
    match split {
        Split::Train => "to train on",
        Split::Dev => "for dev",
        Split::Test => "for test",
    }
}

/// Reads the number of a split's answers from the manifest alone.
///
/// # Errors
/// When nothing was curated.
pub(super) fn selected_count(context: &Context, split: Split) -> anyhow::Result<usize> {
    let manifest = context.dir.require("train", "curate", &context.run)?;
    let count = manifest.counts.get(count_name(split)).copied();
    Ok(count.unwrap_or_default() as usize)
}

/// Makes the plan of the stage, and finds the folder that lists the answers without distributions.
fn plan(context: &Context) -> anyhow::Result<(StagePlan, Option<&'static str>)> {
    let (dir, run) = (&context.dir, &context.run);
    let completions = dir.require("completions", "collect", run)?;
    let prompts = dir.require("prompts", "import", run)?;
    let mut inputs = BTreeMap::from([
        ("completions".to_owned(), completions.content_hash()),
        ("prompts".to_owned(), prompts.content_hash()),
    ]);
    if drops_wrong(context) {
        let verdicts = dir.require("verdicts", "grade", run)?;
        inputs.insert("verdicts".to_owned(), verdicts.content_hash());
    }
    let without_signals = without_signals_folder(context, &mut inputs)?;
    let settings = settings_of(&run.settings.curate)?;
    let plan = StagePlan {
        stage: "curate".to_owned(),
        home: "train".to_owned(),
        outputs: [
            "dev",
            "test",
            "dropped",
            "near_duplicates",
            CURATION_FILE,
            "train",
        ]
        .map(str::to_owned)
        .to_vec(),
        settings: json!({ "curate": settings, "seed": run.settings.run.seed }),
        inputs,
    };
    Ok((plan, without_signals))
}

/// Whether answers that are graded wrong are not trained on.
fn drops_wrong(context: &Context) -> bool {
    let file = &context.run.settings;
    file.grade.is_some() && file.curate.wrong == WrongAnswers::Drop
}

/// Counts of the splits, as `curation.json` has them.
#[derive(Deserialize)]
struct CurationCounts {
    train: SplitCounts,
    dev: SplitCounts,
    test: SplitCounts,
}

/// Counts of a split.
#[derive(Deserialize)]
pub(super) struct SplitCounts {
    /// Number of prompts with an answer.
    pub(super) prompts: u64,
    /// Number of answers.
    pub(super) sequences: u64,
}

/// Reads the counts of a split.
///
/// # Errors
/// When `curation.json` cannot be read.
pub(super) fn split_counts(context: &Context, split: Split) -> anyhow::Result<SplitCounts> {
    let path = context.dir.verified(CURATION_FILE)?;
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let counts: CurationCounts = serde_json::from_slice(&text)
        .with_context(|| format!("{} is damaged\nhint: run `curate` again", path.display()))?;
    Ok(match split {
        Split::Train => counts.train,
        Split::Dev => counts.dev,
        Split::Test => counts.test,
    })
}

/// Returns the folder that lists the answers without distributions, which only a teacher behind a server
/// leaves; adds its hash to `inputs`.
fn without_signals_folder(
    context: &Context,
    inputs: &mut BTreeMap<String, String>,
) -> anyhow::Result<Option<&'static str>> {
    let file = &context.run.settings;
    if file.served().is_none() {
        return Ok(None);
    }
    if file.score.is_some() {
        let signals = context.dir.require("signals", "score", &context.run)?;
        inputs.insert("signals".to_owned(), signals.content_hash());
        return Ok(Some(UNSCORED));
    }
    let signals = file.collect.signals.as_ref();
    Ok(signals.map(|_| "failures"))
}

/// Reads the prompt ids and sample indices of a folder of failures.
fn listed_answers(
    context: &Context,
    folder: Option<&str>,
) -> anyhow::Result<HashSet<(String, u32)>> {
    let mut answers = HashSet::new();
    let Some(folder) = folder else {
        return Ok(answers);
    };
    for shard in shards(&context.dir.verified(folder)?)? {
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

#[cfg(test)]
mod tests {
    use potstill_datasets::{Provenance, Usage, Verdict};

    use super::*;

    /// Number of the sample that was cut; sample 0 is finished.
    const CUT: u32 = 1;

    fn completion(prompt: usize, sample_index: u32) -> Completion {
        Completion {
            prompt_id: format!("p{prompt}"),
            sample_index,
            reasoning: None,
            answer: "once".to_owned(),
            tool_calls: Vec::new(),
            finish_reason: match sample_index {
                CUT => FinishReason::Length,
                _ => FinishReason::Stop,
            },
            usage: Usage {
                prompt_tokens: 1,
                completion_tokens: 1,
            },
            tokens: Vec::new(),
            provenance: 0,
        }
    }

    fn provenance() -> Provenance {
        Provenance {
            teacher: "t".to_owned(),
            revision: String::new(),
            engine: String::new(),
            dtype: "f32".to_owned(),
            tokenizer: String::new(),
            template: String::new(),
            sampling: "{}".to_owned(),
            temperatures: Vec::new(),
            licence: None,
        }
    }

    /// Both answers to every third prompt are wrong.
    fn is_wrong(prompt_id: &str) -> bool {
        let number: usize = prompt_id[1..].parse().unwrap();
        number.is_multiple_of(3)
    }

    /// Splits two answers to each of `prompts` prompts, after `change` has changed the answers.
    fn lists(
        prompts: usize,
        settings: &CurateSettings,
        change: impl Fn(&mut Completion),
        without: &[(String, u32)],
    ) -> Lists {
        let dir = tempfile::tempdir().unwrap();
        let path = |table: &str| dir.path().join(table);
        let both = |prompt| [completion(prompt, 0), completion(prompt, CUT)];
        let mut completions: Vec<Completion> = (0..prompts).flat_map(both).collect();
        completions.iter_mut().for_each(change);
        let verdicts = completions.iter().map(|completion| Verdict {
            prompt_id: completion.prompt_id.clone(),
            sample_index: completion.sample_index,
            grader: "exact".to_owned(),
            correct: !is_wrong(&completion.prompt_id),
            extracted: None,
        });
        let verdicts: Vec<Verdict> = verdicts.collect();
        for table in ["completions", "verdicts"] {
            std::fs::create_dir(path(table)).unwrap();
        }
        let shard = path("completions").join(shard_name(0));
        write_shard(&shard, &completions, &[provenance()]).unwrap();
        write_list(&path("verdicts"), &verdicts).unwrap();
        let verdicts = path("verdicts");
        let without = without.iter().cloned().collect();
        split(&path("completions"), Some(&verdicts), &without, settings, 1).unwrap()
    }

    fn settings(dev: f64, test: f64) -> CurateSettings {
        CurateSettings {
            dev,
            test,
            ..CurateSettings::default()
        }
    }

    #[test]
    fn only_train_is_filtered() {
        let lists = lists(90, &settings(0.3, 0.3), |_| {}, &[]);
        for list in [&lists.dev, &lists.test] {
            let answers = 2 * prompt_ids(list).len();
            assert_eq!(list.len(), answers);
            assert!(list.iter().any(|s| s.sample_index == CUT));
            assert!(list.iter().any(|s| is_wrong(&s.prompt_id)));
        }
        let is_kept = |s: &Selected| s.sample_index != CUT && !is_wrong(&s.prompt_id);
        assert!(lists.train.iter().all(is_kept));
        let all = [&lists.train, &lists.dev, &lists.test].map(|list| list.len());
        assert_eq!(all.iter().sum::<usize>() + lists.dropped.len(), 180);
        assert!(all.iter().all(|n| *n > 10), "{all:?}");
        let others = [Split::Dev, Split::Test].map(|split| prompt_ids(lists.get(split)));
        let train = prompt_ids(&lists.train);
        assert!(train.is_disjoint(&others[0]) && train.is_disjoint(&others[1]));
        assert!(others[0].is_disjoint(&others[1]));
    }

    #[test]
    fn prompts_stay_in_their_split_when_prompts_are_added() {
        let settings = settings(0.2, 0.2);
        let (few, many) = (
            lists(50, &settings, |_| {}, &[]),
            lists(90, &settings, |_| {}, &[]),
        );
        for split in Split::ALL {
            let many: Vec<&Selected> = many.get(split).iter().filter(|s| s.row < 100).collect();
            assert_eq!(few.get(split).iter().collect::<Vec<_>>(), many);
        }
    }

    #[test]
    fn without_dev_its_list_is_empty() {
        let lists = lists(50, &settings(0.0, 0.3), |_| {}, &[]);
        assert!(lists.dev.is_empty() && !lists.train.is_empty() && !lists.test.is_empty());
    }

    /// Answers that cannot be measured are in no list, whatever their split.
    #[test]
    fn answers_that_cannot_be_measured_are_dropped() {
        let settings = settings(0.3, 0.3);
        let all = lists(60, &settings, |_| {}, &[]);
        let first = |split| (all.get(split)[0].prompt_id.clone(), 0);
        let [train, dev, test] = Split::ALL.map(first);
        let change = |completion: &mut Completion| {
            let is = |answer: &(String, u32)| {
                (&answer.0, answer.1) == (&completion.prompt_id, completion.sample_index)
            };
            if is(&dev) {
                completion.finish_reason = FinishReason::Error;
            } else if is(&test) {
                completion.finish_reason = FinishReason::ContentFilter;
                completion.answer.clear();
            }
        };
        let lists = lists(60, &settings, change, std::slice::from_ref(&train));
        let expected = [
            (train, Split::Train, "it has no distributions"),
            (dev, Split::Dev, "the teacher failed"),
            (test, Split::Test, "it has no text"),
        ];
        for ((prompt_id, sample_index), split, reason) in expected {
            let dropped = Dropped {
                prompt_id,
                sample_index,
                reason: reason.to_owned(),
            };
            assert!(lists.dropped.contains(&dropped), "{dropped:?}");
            assert_eq!(lists.get(split).len() + 1, all.get(split).len());
        }
    }
}
