//! `collect`: the teacher's answers and distributions into `completions/` and `signals/`.
//!
//! A unit is (prompt, sample index), and its ordinal is its place in the order of `prompts/`. Answers that complete
//! together become one frame of the store in `.work/collect-<key>/`, synced before they count. When every unit has an
//! entry, shards are written in the order of units: the same answers give the same bytes, whatever order they came in.
//!
//! The store's key covers what an answer depends on (teacher, template, sampling, signals) and not the prompts: more
//! prompts or more samples only add answers.

mod given;
mod local;
mod preview;
mod source;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use potstill_datasets::{
    Answer, FolderRows, Manifest, Prompt, Published, Store, Tables, UnitIndex, publish_answers,
    row_count,
};
use potstill_teacher::http::{Spending, TokenEstimate};
use potstill_teacher::{AnswerRequest, HttpTeacher, Teacher};
use serde_json::Value;

pub(super) use self::given::check_answered;
pub(crate) use self::local::{check_prompts, open_local};
use self::source::{CollectSource, Samples};
use super::acquire::{self, Acquired, Acquisition};
use super::{Context, StageOutcome, StageSummary, forecast, import, run_stage_again, sampling};
use crate::events::Event;
use crate::run_dir::{EarlierOutput, StagePlan};

/// Asks the teacher for the answers that are missing, and publishes all of them.
///
/// # Errors
/// When prompts are not published, a prompt does not fit into the context of a local teacher, the teacher cannot be
/// used, a cap is reached, or the disk refuses; completed answers stay.
pub fn collect(context: &Context) -> anyhow::Result<StageOutcome> {
    let mut source = CollectSource::open(context)?;
    if context.dry_run {
        return preview::preview(context, &source);
    }
    let prompts = context.dir.require("prompts", "import", &context.run)?;
    let plan = source.plan(context, prompts.content_hash());
    let again = context.retry_failures && has_failures(context)?;
    let mut finished_work = None;
    let outcome = run_stage_again(context, &plan, again, |out| {
        source.count_given(context)?;
        let mut collection = Collection::open(context, &source)?;
        let before = collection.store.tally();
        let Some(acquired) = collection.ask_missing(context, &mut source)? else {
            return Ok(None);
        };
        let tables = source.tables(out, context);
        let published = collection.publish(context, &source, &tables)?;
        let sampling = match (&tables.signals, &context.run.settings.collect.signals) {
            (Some(folder), Some(signals)) => {
                sampling::check(context, "collect", folder, signals.top_k)?
            }
            _ => None,
        };
        let is_whole = collection.store.unlisted() == 0;
        let same = published_answers(context)?.as_ref() == Some(&source.answers);
        if is_whole {
            finished_work = Some(collection.work);
        }
        Ok(Some(StageSummary {
            worked: source.worked(acquired, before.records, &published),
            counts: source.counts(&published),
            earlier: match is_whole && same {
                true => EarlierOutput::Replace,
                false => EarlierOutput::Keep,
            },
            measures: sampling.map_or_else(BTreeMap::new, |check| check.to_measures()),
        }))
    })?;
    // The journal is not needed any more: all of it is published.
    if let Some(work) = finished_work {
        fs::remove_dir_all(&work).with_context(|| format!("cannot delete {}", work.display()))?;
    }
    Ok(outcome)
}

/// Whether the output of a plan is published already.
pub(super) fn is_published(context: &Context, plan: &StagePlan) -> anyhow::Result<bool> {
    let manifest = context.dir.published(&plan.home)?;
    Ok(manifest.is_some_and(|manifest| manifest.key == plan.key()))
}

fn has_failures(context: &Context) -> anyhow::Result<bool> {
    let manifest = context.dir.published("completions")?;
    Ok(manifest.is_some_and(|m| m.counts.get("failures").is_some_and(|n| *n > 0)))
}

fn published_answers(context: &Context) -> anyhow::Result<Option<Value>> {
    let manifest = context.dir.published("completions")?;
    Ok(manifest.and_then(|m| m.settings.get("answers").cloned()))
}

/// All units in order: each prompt with each of its samples.
fn units<'a>(
    context: &Context,
    samples: &'a Samples,
) -> anyhow::Result<impl Iterator<Item = anyhow::Result<(Arc<Prompt>, u32)>> + use<'a>> {
    let prompts = FolderRows::<Prompt>::open(&context.dir.verified("prompts")?)?;
    Ok(prompts.enumerate().flat_map(|(number, prompt)| {
        let prompt = match prompt {
            Ok(prompt) => Arc::new(prompt),
            Err(error) => return vec![Err(error.into())],
        };
        let samples = 0..samples.of(number);
        samples.map(|sample| Ok((prompt.clone(), sample))).collect()
    }))
}

/// A request for each unit.
fn prompt_requests<'a>(
    context: &Context,
    samples: &'a Samples,
) -> anyhow::Result<impl Iterator<Item = anyhow::Result<(u32, AnswerRequest)>> + use<'a>> {
    Ok(units(context, samples)?.zip(0..).map(|(unit, ordinal)| {
        let (prompt, sample_index) = unit?;
        let request = AnswerRequest {
            ordinal,
            prompt,
            sample_index,
            given: None,
        };
        Ok((ordinal, request))
    }))
}

/// Reads the names of all units, and estimates the tokens of their prompts.
fn index_units(
    context: &Context,
    source: &CollectSource,
) -> anyhow::Result<(UnitIndex, TokenEstimate)> {
    let mut estimate = TokenEstimate::default();
    let prompts = row_count(&context.dir.verified("prompts")?)?;
    let names = units(context, &source.samples)?.map(|unit| {
        let (prompt, sample_index) = unit?;
        if let Some(http) = source.http()
            && sample_index == 0
        {
            http.estimate_prompt(&mut estimate, &prompt)?;
        }
        Ok::<_, anyhow::Error>((prompt.id.clone(), sample_index))
    });
    let index = UnitIndex::new(source.samples.total(prompts), names)?;
    Ok((index, estimate))
}

/// The store of a collection.
struct Collection {
    store: Store<Answer>,
    work: PathBuf,
    estimate: TokenEstimate,
}

impl Collection {
    /// Opens the journal, and every published folder with answers of the same settings.
    fn open(context: &Context, source: &CollectSource) -> anyhow::Result<Collection> {
        let dir = &context.dir;
        // The prompts are not part of what the journal depends on.
        let plan = source.plan(context, String::new());
        let work = dir.work_path(&source.work_folder(), &plan)?;
        let (index, estimate) = index_units(context, source)?;
        let mut store = Store::open(&work.join("journal.bin"), &index)?;
        add_published(context, source, &mut store, &index)?;
        Ok(Collection {
            store,
            work,
            estimate,
        })
    }

    /// Asks for what is missing. `None` if the user asked for a stop.
    fn ask_missing(
        &mut self,
        context: &Context,
        source: &mut CollectSource,
    ) -> anyhow::Result<Option<Acquired>> {
        let to_ask = acquire::say_present(context, "collect", "there", &self.store);
        if to_ask == 0 {
            return Ok(Some(Acquired::default()));
        }
        source.prepare(context)?;
        let settings;
        let mut requests: Box<dyn Iterator<Item = anyhow::Result<(u32, AnswerRequest)>>> =
            match &source.samples {
                Samples::PerPrompt(samples) => {
                    settings = import::settings_of(&context.run, context.limit)?;
                    Box::new(given::requests(context, &settings, samples)?)
                }
                Samples::Each(_) => Box::new(prompt_requests(context, &source.samples)?),
            };
        let mut teacher = source.teacher.take().context("no teacher is open")?;
        let (estimate, budget) = (&self.estimate, &context.run.settings.budget);
        let acquired = Acquisition {
            stage: "collect",
            store: &mut self.store,
            units: &mut requests,
            forecast: &|http: &HttpTeacher, spent: &Spending| {
                forecast::of_answers(http, budget, estimate, to_ask, spent)
            },
            work: &Teacher::answer,
        }
        .run(context, &mut teacher)?;
        drop(requests);
        source.teacher = Some(teacher);
        Ok(acquired)
    }

    fn publish(
        &mut self,
        context: &Context,
        source: &CollectSource,
        tables: &Tables,
    ) -> anyhow::Result<Published> {
        let published = publish_answers(
            &mut self.store,
            FolderRows::open(&context.dir.verified("prompts")?)?,
            &|number| source.samples.of(number),
            tables,
            &mut |prompt, answer| match &source.teacher {
                Some(teacher) => teacher.complete(prompt, answer),
                None => Ok(()),
            },
        )?;
        say_failures(context, &published);
        if let Some(first) = &published.first_failure
            && published.answers == 0
        {
            bail!(
                "all {} answers failed; the first one: {first}\nhint: `--retry-failures` asks again",
                published.failures
            );
        }
        Ok(published)
    }
}

/// Adds every published folder with answers of the same settings to a store.
fn add_published(
    context: &Context,
    source: &CollectSource,
    store: &mut Store<Answer>,
    index: &UnitIndex,
) -> anyhow::Result<()> {
    let dir = &context.dir;
    let mut homes = vec!["completions".to_owned()];
    let earlier = dir.earlier_outputs("collect")?.into_iter();
    homes.extend(earlier.map(|folder| format!("{folder}/completions")));
    homes.retain(|home| dir.path(home).is_dir());
    for home in homes {
        let manifest = Manifest::read(&dir.path(&home))?;
        let answers = manifest.as_ref().and_then(|m| m.settings.get("answers"));
        if !answers.is_some_and(|answers| source.can_use(answers)) {
            continue;
        }
        let folder = home.strip_suffix("completions").unwrap_or_default();
        let beside = |table: &str| match folder {
            "" => dir.verified(table),
            folder => dir.verified_in(folder, table),
        };
        let signals = match source.has_local_signals() {
            true => Some(beside("signals")?),
            false => None,
        };
        store.add_published(&beside("completions")?, signals.as_deref(), index)?;
        if let Some(http) = source.http()
            && !context.retry_failures
            && beside("failures")?.is_dir()
        {
            store.add_published_failures(&beside("failures")?, &http.provenance, index)?;
        }
    }
    Ok(())
}

/// The folder below `.work/` with the answers that the present settings continue.
///
/// # Errors
/// When the source of the answers cannot be used.
pub(super) fn work_folder(context: &Context) -> anyhow::Result<String> {
    Ok(CollectSource::open(context)?.work_folder())
}

/// Says what failed, by reason.
fn say_failures(context: &Context, published: &Published) {
    if published.reasons.is_empty() {
        return;
    }
    let reasons = published.reasons.iter();
    let reasons: Vec<String> = reasons.map(|(reason, n)| format!("{n} {reason}")).collect();
    context.console.emit(&Event::Warning {
        text: format!(
            "collect: without an answer or its distributions: {}; `failures/` says why, and `--retry-failures` asks again",
            reasons.join(", ")
        ),
    });
}
