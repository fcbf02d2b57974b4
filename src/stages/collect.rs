//! `collect`: the teacher's answers and distributions into `completions/` and `signals/`.
//!
//! A unit is (prompt, sample index), in the order of `prompts/`. Batch b is the units
//! from b·B to (b+1)·B by position, less those that are already there; it is asked
//! together and becomes one frame of the journal in `.work/collect-<key>/`, synced before
//! it counts. So a crash costs at most the batch in hand, which is redone whole, and the
//! same prompts give the same bytes. When every unit is there, shards are written from
//! the journal and the shards published before, one row in memory at a time.
//!
//! Answers are keyed by what they depend on (teacher, template, sampling, signals), not
//! by the prompt set: more prompts or more samples only add.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Context as _;
use potstill_datasets::{
    AnswerSource, Completion, PROMPTS_PER_SHARD, Prompt, Provenance, Reasoning, ShardWriter,
    Signal, prompt_ids, shard_name, stage_key,
};
use potstill_model::Config;
use potstill_teacher::{Ask, Local, LocalSettings, Sampling, Scoring};
use serde_json::{Value, json};

pub(super) use super::collect_given::check_answered;
use super::collect_sources::{Answer, Sources, Unit};
use super::score::{score_all, scoring, without_no_draws};
use super::{Context, Done, Outcome, checkpoint, collect_given, counts, import, served, stage};
use crate::interrupt;
use crate::run_dir::{Earlier, Plan, settings_of, short};
use crate::run_file::{Loaded, RunFile, Signals};

/// Asks the teacher for what is not there yet, and publishes all of it.
///
/// # Errors
/// When prompts are not published, a prompt does not fit the teacher's context, the
/// teacher cannot be read, or the disk refuses; what was answered stays.
pub fn collect(context: &Context) -> anyhow::Result<Outcome> {
    let run = &context.run;
    if run.file.import.answers == AnswerSource::Given {
        return collect_given::collect(context);
    }
    if run.file.served().is_some() {
        return served::collect::collect(context);
    }
    let manifest = context.dir.require("prompts", "import", run)?;
    let folder = checkpoint::teacher(run)?;
    let answers = answers(run, &folder)?;
    let samples = run.file.collect.samples.get();
    let plan = Plan {
        stage: "collect".to_owned(),
        home: "completions".to_owned(),
        outputs: outputs(&run.file),
        settings: json!({ "answers": answers, "samples": samples }),
        inputs: BTreeMap::from([("prompts".to_owned(), manifest.content_hash())]),
    };
    let mut finished_work = None;
    let outcome = stage(context, &plan, |out| {
        let key = stage_key("answers", &answers, &BTreeMap::new());
        let work = context.dir.work(&format!("collect-{}", short(&key)))?;
        let prompts = import::published(&context.dir.path("prompts"))?;
        let mut sources = Sources::open(&context.dir, &work.join("journal.bin"), &answers)?;
        if sources.cut_bytes > 0 {
            let bytes = sources.cut_bytes;
            context.talk.line(&format!(
                "collect: a batch that was cut short is asked again ({bytes} bytes)"
            ));
        }
        let units: Vec<(usize, u32)> = (0..prompts.len())
            .flat_map(|prompt| (0..samples as u32).map(move |sample| (prompt, sample)))
            .collect();
        let names: HashSet<Unit> = units
            .iter()
            .map(|(p, s)| (prompts[*p].id.clone(), *s))
            .collect();
        let asked = match ask_missing(context, &folder, &prompts, &units, &mut sources)? {
            ControlFlow::Break(()) => return Ok(None),
            ControlFlow::Continue(asked) => asked,
        };
        let tokens = write(
            out,
            &prompts,
            samples as u32,
            run.file.collect.signals.as_ref(),
            &mut sources,
        )?;
        let all_in = sources.all_in(&names);
        let same = published_answers(context)?.is_some_and(|published| published == answers);
        if all_in {
            finished_work = Some(work);
        }
        Ok(Some(Done {
            counts: counts([("answers", units.len()), ("answer tokens", tokens)]),
            worked: counts([
                ("asked", asked.answers),
                ("answer tokens", asked.tokens),
                ("there before", units.len() - asked.answers),
            ]),
            earlier: match all_in && same {
                true => Earlier::Replace,
                false => Earlier::Keep,
            },
        }))
    })?;
    // Everything in the journal is published now.
    if let Some(work) = finished_work {
        fs::remove_dir_all(&work).with_context(|| format!("cannot delete {}", work.display()))?;
    }
    Ok(outcome)
}

fn outputs(file: &RunFile) -> Vec<String> {
    match file.collect.signals {
        Some(_) => vec!["signals".to_owned(), "completions".to_owned()],
        None => vec!["completions".to_owned()],
    }
}

/// Everything that an answer depends on, besides its prompt and sample index.
fn answers(run: &Loaded, folder: &Path) -> anyhow::Result<Value> {
    let RunFile {
        collect, run: head, ..
    } = &run.file;
    let teacher = checkpoint::teacher_table(run)?;
    let template = checkpoint::template(run, folder)?;
    let mut answers = json!({
        "teacher": checkpoint::content_hash(folder)?,
        "dtype": settings_of(&teacher.dtype)?,
        "template": template.hash(),
        "licence": teacher.licence,
        "seed": head.seed,
        "max_new_tokens": collect.max_new_tokens.get(),
        "temperature": collect.temperature.get(),
        "top_p": collect.top_p.get(),
        "batch": collect.batch.get(),
        "signals": without_no_draws(settings_of(&collect.signals)?),
        "reasoning": settings_of(&collect.reasoning)?,
    });
    // Settings that are off are left out: answers from before they existed keep their key.
    if let Some(top_k) = collect.top_k {
        answers["top_k"] = json!(top_k.get());
    }
    if collect.min_p.get() > 0.0 {
        answers["min_p"] = json!(collect.min_p.get());
    }
    if collect.repetition_penalty.get() != 1.0 {
        answers["repetition_penalty"] = json!(collect.repetition_penalty.get());
    }
    if !collect.stop.is_empty() {
        answers["stop"] = json!(collect.stop);
    }
    Ok(answers)
}

fn published_answers(context: &Context) -> anyhow::Result<Option<Value>> {
    let manifest = context.dir.published("completions")?;
    Ok(manifest.and_then(|m| m.settings.get("answers").cloned()))
}

struct Asked {
    answers: usize,
    tokens: usize,
}

/// Asks for the units that no source has, batch by batch. `Break` when it was stopped.
fn ask_missing(
    context: &Context,
    folder: &Path,
    prompts: &[Prompt],
    units: &[(usize, u32)],
    sources: &mut Sources,
) -> anyhow::Result<ControlFlow<(), Asked>> {
    let unit = |(p, s): &(usize, u32)| (prompts[*p].id.clone(), *s);
    let there = units.iter().filter(|u| sources.has(&unit(u))).count();
    let mut asked = Asked {
        answers: 0,
        tokens: 0,
    };
    if there == units.len() {
        context
            .talk
            .line(&format!("collect: all {there} answers are there"));
        return Ok(ControlFlow::Continue(asked));
    }
    if there > 0 {
        context.talk.line(&format!(
            "collect: {there} of {} answers are there ({} of them published), {} to ask for",
            units.len(),
            sources.in_published(),
            units.len() - there
        ));
    }
    check_lengths(&context.run, folder, prompts)?;
    let teacher = Teacher::open(context, folder)?;
    let mut work = context
        .talk
        .work("collect", "answers", there as u64, units.len() as u64);
    for batch in units.chunks(context.run.file.collect.batch.get()) {
        let missing: Vec<_> = batch
            .iter()
            .filter(|u| !sources.has(&unit(u)))
            .copied()
            .collect();
        if missing.is_empty() {
            continue;
        }
        if interrupt::asked() {
            return Ok(ControlFlow::Break(()));
        }
        let done = (there + asked.answers) as u64;
        let answers = teacher.ask(prompts, &missing, &mut |tokens| {
            work.show(done, (asked.tokens + tokens) as u64, "");
        })?;
        asked.answers += answers.len();
        asked.tokens += answers.iter().map(|(c, _)| c.tokens.len()).sum::<usize>();
        sources.add(&teacher.provenance, answers)?;
        work.show((there + asked.answers) as u64, asked.tokens as u64, "");
    }
    Ok(ControlFlow::Continue(asked))
}

/// The teacher of the run file, open.
struct Teacher {
    local: Local,
    provenance: Provenance,
    sampling: Sampling,
    stop: Vec<String>,
    scoring: Option<Scoring>,
    seed: u64,
}

impl Teacher {
    fn open(context: &Context, folder: &Path) -> anyhow::Result<Teacher> {
        let RunFile { collect, run, .. } = &context.run.file;
        let local = open_local(context, folder)?;
        let sampling = Sampling {
            max_new_tokens: collect.max_new_tokens.get(),
            temperature: collect.temperature.get(),
            top_k: collect.top_k.map(|k| k.get()),
            top_p: collect.top_p.get(),
            min_p: collect.min_p.get(),
            repetition_penalty: collect.repetition_penalty.get(),
        };
        let seed = u64::from(run.seed);
        let scoring = collect
            .signals
            .as_ref()
            .map(|s| scoring(s.top_k, &s.temperatures, s.tail_draws, seed));
        let temperatures = scoring.as_ref().map_or(&[][..], |s| &s.temperatures);
        let provenance = local.provenance(&sampling, &collect.stop, seed, temperatures);
        Ok(Teacher {
            local,
            provenance,
            sampling,
            stop: collect.stop.clone(),
            scoring,
            seed,
        })
    }

    /// Asks for one batch. A stop waits for its end, so that nothing is asked twice.
    fn ask(
        &self,
        prompts: &[Prompt],
        units: &[(usize, u32)],
        progress: &mut dyn FnMut(usize),
    ) -> anyhow::Result<Vec<Answer>> {
        let asks: Vec<Ask<'_>> = units
            .iter()
            .map(|(prompt, sample_index)| Ask {
                prompt: &prompts[*prompt],
                sample_index: *sample_index,
            })
            .collect();
        let mut progress = |tokens| {
            progress(tokens);
            ControlFlow::Continue(())
        };
        let (sampling, stop) = (&self.sampling, &self.stop);
        let completions = self
            .local
            .sample(&asks, sampling, stop, self.seed, &mut progress)?;
        let completions = completions.context("the teacher stopped without being asked to")?;
        let Some(scoring) = &self.scoring else {
            return Ok(completions.into_iter().map(|c| (c, None)).collect());
        };
        let mut texts = Vec::with_capacity(completions.len());
        for (ask, completion) in asks.iter().zip(&completions) {
            texts.push(self.local.text(ask.prompt, completion, true)?);
        }
        let signals = score_all(&self.local, &texts, scoring)?;
        Ok(completions
            .into_iter()
            .zip(signals.into_iter().map(Some))
            .collect())
    }
}

/// The teacher of the run file.
pub(super) fn open_local(context: &Context, folder: &Path) -> anyhow::Result<Local> {
    let teacher = checkpoint::teacher_table(&context.run)?;
    Ok(Local::open(LocalSettings {
        dir: folder.to_owned(),
        dtype: checkpoint::dtype(teacher.dtype),
        device: context.device.clone(),
        template: Some(checkpoint::template(&context.run, folder)?),
        reasoning: reasoning(&context.run),
        licence: teacher.licence.clone(),
    })?)
}

/// Marks of reasoning, as the run file has them.
pub(crate) fn reasoning(run: &Loaded) -> Option<Reasoning> {
    run.file.collect.reasoning.clone()
}

/// The longest prompt in tokens, when every prompt fits into the teacher's context with
/// its answer.
///
/// # Errors
/// Naming the first prompt that does not, or that the template cannot render.
pub(crate) fn check_lengths(
    run: &Loaded,
    folder: &Path,
    prompts: &[Prompt],
) -> anyhow::Result<usize> {
    let tokenizer = checkpoint::tokenizer(folder)?;
    let template = checkpoint::template(run, folder)?;
    let reasoning = reasoning(run);
    let context = Config::from_dir(folder)?.max_position_embeddings;
    let answer = run.file.collect.max_new_tokens.get();
    let mut longest = 0;
    for prompt in prompts {
        let ids = prompt_ids(
            &tokenizer,
            &template,
            &prompt.messages,
            prompt.tools.as_deref(),
            reasoning.as_ref(),
        )
        .with_context(|| format!("cannot render the prompt of {}", prompt.source))?;
        if ids.len() + answer > context {
            let room = context.saturating_sub(ids.len());
            let way_out = match room {
                0 => "shorten it, or take it out of the source".to_owned(),
                room => {
                    format!("shorten it, or set `max_new_tokens` in [collect] to {room} or less")
                }
            };
            anyhow::bail!(
                "the prompt of {} has {} tokens, and with {answer} for the answer that is more than the teacher's context of {context}: {way_out}",
                prompt.source,
                ids.len()
            );
        }
        longest = longest.max(ids.len());
    }
    Ok(longest)
}

/// Writes the tables, and counts the tokens of all answers.
fn write(
    out: &Path,
    prompts: &[Prompt],
    samples: u32,
    wanted: Option<&Signals>,
    sources: &mut Sources,
) -> anyhow::Result<usize> {
    let provenance = sources.provenance.clone();
    let mut tokens = 0;
    for (index, prompts) in prompts.chunks(PROMPTS_PER_SHARD).enumerate() {
        let name = shard_name(index);
        let mut completions =
            ShardWriter::<Completion>::new(&out.join("completions").join(&name), &provenance)?;
        let mut signals = match wanted {
            Some(wanted) => Some(ShardWriter::<Signal>::begin(
                &out.join("signals").join(&name),
                &provenance,
                wanted.tail_draws.get() > 0,
            )?),
            None => None,
        };
        for prompt in prompts {
            for sample_index in 0..samples {
                let (completion, signal) = sources.get(prompt, sample_index)?;
                tokens += completion.tokens.len();
                completions.push(completion)?;
                if let (Some(signals), Some(signal)) = (&mut signals, signal) {
                    signals.push(signal)?;
                }
            }
        }
        completions.finish()?;
        if let Some(signals) = signals {
            signals.finish()?;
        }
    }
    Ok(tokens)
}
