//! `score`: the teacher's distributions over answers that were collected without them.
//!
//! `signals/` has the same shards and rows as `completions/`. Answers are scored in batches
//! in their order; each batch becomes a frame of the journal in `.work/score-<key>/`, synced,
//! so that a crash costs at most the batch in hand.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context as _, bail};
use potstill_datasets::{
    Completion, FrameSpan, Journal, Prompt, ShardWriter, Signal, Table, read_footer, read_shard,
    shard_name, shards,
};
use potstill_teacher::{Local, Scoring, Text};
use serde_json::{Value, json};

use super::collect::open_local;
use super::{Context, StageOutcome, StageSummary, checkpoint, counts, import, run_stage, served};
use crate::interrupt;
use crate::run_dir::{StagePlan, settings_of, short};
use crate::run_file::ranges::{Count, CountOrZero, Positive};

/// Scores every answer that is not scored yet, and publishes the distributions.
///
/// # Errors
/// When answers are not published, one cannot be encoded or is longer than the teacher's
/// context, or the disk refuses; what was scored stays.
pub fn score(context: &Context) -> anyhow::Result<StageOutcome> {
    let run = &context.run;
    let Some(settings) = &run.file.score else {
        bail!(
            "{} has no [score]: add it with `top_k = 64`, and take `signals` out of [collect]",
            run.path.display()
        );
    };
    if run.file.served().is_some() {
        return served::score::score(context, settings);
    }
    let completions = context.dir.require("completions", "collect", run)?;
    let folder = checkpoint::teacher(run)?;
    let teacher = checkpoint::teacher_table(run)?;
    let mut plan = StagePlan {
        stage: "score".to_owned(),
        home: "signals".to_owned(),
        outputs: vec!["signals".to_owned()],
        settings: json!({
            "teacher": checkpoint::content_hash(&folder)?,
            "dtype": settings_of(&teacher.dtype)?,
            "template": checkpoint::template(run, &folder)?.hash(),
            "licence": teacher.licence,
            "reasoning": settings_of(&run.file.collect.reasoning)?,
            "score": without_no_draws(settings_of(settings)?),
        }),
        inputs: BTreeMap::from([("completions".to_owned(), completions.content_hash())]),
    };
    if settings.tail_draws.get() > 0 {
        plan.settings["seed"] = json!(run.file.run.seed);
    }
    let mut finished_work = None;
    let outcome = run_stage(context, &plan, |out| {
        let work = context
            .dir
            .work_path(&format!("score-{}", short(&plan.key())))?;
        let mut scorer = Scorer {
            context,
            teacher: open_local(context, &folder)?,
            scoring: scoring(
                settings.top_k,
                &settings.temperatures,
                settings.tail_draws,
                u64::from(run.file.run.seed),
            ),
            batch: settings.batch.get(),
            journal: SignalJournal::open(&work.join("journal.bin"))?,
        };
        if !scorer.score_missing()? {
            return Ok(None);
        }
        let counts = scorer.write(out)?;
        finished_work = Some(work);
        Ok(Some(StageSummary::new(counts)))
    })?;
    // Everything in the journal is published now.
    if let Some(work) = finished_work {
        fs::remove_dir_all(&work).with_context(|| format!("cannot delete {}", work.display()))?;
    }
    Ok(outcome)
}

/// Rows of logits held at once while answers are scored.
const SCORE_ROWS: usize = 256;

/// Settings of signals as a key has them: without `tail_draws` where it is 0, so that signals from
/// before it existed keep theirs.
pub(super) fn without_no_draws(mut settings: Value) -> Value {
    let is_none = |draws: &Value| draws.as_f64() == Some(0.0);
    if settings.get("tail_draws").is_some_and(is_none)
        && let Some(settings) = settings.as_object_mut()
    {
        settings.remove("tail_draws");
    }
    settings
}

/// What is stored of each distribution.
pub(super) fn scoring(
    top_k: Count,
    temperatures: &[Positive],
    tail_draws: CountOrZero,
    seed: u64,
) -> Scoring {
    Scoring {
        top_k: top_k.get(),
        temperatures: temperatures.iter().map(|t| t.get() as f32).collect(),
        tail_draws: tail_draws.get() as u32,
        seed,
        chunk_rows: SCORE_ROWS,
    }
}

/// Scores texts together, to the end.
pub(super) fn score_all(
    teacher: &Local,
    texts: &[Text],
    scoring: &Scoring,
) -> anyhow::Result<Vec<Signal>> {
    let signals = teacher.score(texts, scoring, &mut |_| ControlFlow::Continue(()))?;
    signals.context("the teacher stopped without being asked to")
}

/// What a training or an evaluation reads besides `completions/`, for its key.
pub(crate) fn input(context: &Context) -> anyhow::Result<Option<(String, String)>> {
    if context.run.file.score.is_none() {
        return Ok(None);
    }
    let manifest = context.dir.require("signals", "score", &context.run)?;
    Ok(Some(("signals".to_owned(), manifest.content_hash())))
}

struct Scorer<'a> {
    context: &'a Context,
    teacher: Local,
    scoring: Scoring,
    batch: usize,
    journal: SignalJournal,
}

impl Scorer<'_> {
    /// Scores what the journal does not hold; false when it was asked to stop.
    fn score_missing(&mut self) -> anyhow::Result<bool> {
        let Context { dir, console, .. } = self.context;
        let completions = dir.path("completions");
        let len = Table::<Completion>::open(&completions)?.len();
        let there = self.journal.len;
        if there > 0 {
            console.note(&format!("score: {there} of {len} answers are scored"));
        }
        let prompts = prompts(&dir.path("prompts"))?;
        let mut work = console.progress("score", "answers", there as u64, len as u64);
        let (mut position, mut tokens, mut texts) = (0, 0, Vec::with_capacity(self.batch));
        for shard in shards(&completions)? {
            let own_ids = own_ids(&shard, self.teacher.tokenizer().fingerprint())?;
            for completion in read_shard::<Completion>(&shard)? {
                let completion = completion?;
                position += 1;
                if position <= there {
                    continue;
                }
                let prompt = prompts.get(&completion.prompt_id);
                let prompt = prompt.with_context(|| {
                    format!("`prompts/` has no prompt {}", completion.prompt_id)
                })?;
                let own = own_ids.get(completion.provenance as usize) == Some(&true);
                texts.push(self.teacher.text(prompt, &completion, own)?);
                if texts.len() == self.batch || position == len {
                    tokens += self.flush(&mut texts)?;
                    work.update(position as u64, tokens as u64, "");
                    if interrupt::is_requested() && position < len {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    }

    /// Scores the texts at hand; when this returns, their distributions are on the disk.
    fn flush(&mut self, texts: &mut Vec<Text>) -> anyhow::Result<usize> {
        let signals = score_all(&self.teacher, texts, &self.scoring)?;
        let tokens = signals.iter().map(|s| s.rows.len()).sum();
        self.journal.add(&signals)?;
        texts.clear();
        Ok(tokens)
    }

    /// Writes `signals/` from the journal, shard for shard as `completions/` is.
    fn write(&mut self, out: &Path) -> anyhow::Result<crate::run_dir::Counts> {
        let (mut answers, mut rows) = (0, 0);
        for (index, shard) in shards(&self.context.dir.path("completions"))?
            .iter()
            .enumerate()
        {
            let provenance: Vec<_> = read_footer(shard)?
                .provenance
                .into_iter()
                .map(|p| {
                    self.teacher
                        .provenance_of(p.sampling, &self.scoring.temperatures)
                })
                .collect();
            let path = out.join("signals").join(shard_name(index));
            let with_draws = self.scoring.tail_draws > 0;
            let mut signals = ShardWriter::<Signal>::begin(&path, &provenance, with_draws)?;
            for completion in read_shard::<Completion>(shard)? {
                let completion = completion?;
                let mut signal = self.journal.get(answers)?;
                anyhow::ensure!(
                    signal.prompt_id == completion.prompt_id
                        && signal.sample_index == completion.sample_index,
                    "the journal of `score` is of other answers: delete {}",
                    self.context.dir.path(".work").display()
                );
                signal.provenance = completion.provenance;
                answers += 1;
                rows += signal.rows.len();
                signals.push(signal)?;
            }
            signals.finish()?;
        }
        Ok(counts([("answers", answers), ("distributions", rows)]))
    }
}

/// Signals in the order of the answers; a frame is a batch.
struct SignalJournal {
    journal: Journal,
    /// Of each frame, its place and the position of its first signal.
    frames: Vec<(FrameSpan, usize)>,
    len: usize,
    /// The frame read last, with the position of its first signal.
    held: (usize, Vec<Signal>),
}

impl SignalJournal {
    fn open(path: &Path) -> anyhow::Result<SignalJournal> {
        let (journal, spans) = Journal::open(path)?;
        let (mut frames, mut len) = (Vec::with_capacity(spans.len()), 0);
        for span in spans {
            frames.push((span, len));
            len += journal.read::<Vec<Signal>>(span)?.len();
        }
        Ok(SignalJournal {
            journal,
            frames,
            len,
            held: (0, Vec::new()),
        })
    }

    fn add(&mut self, signals: &Vec<Signal>) -> anyhow::Result<()> {
        let span = self.journal.append(signals)?;
        self.frames.push((span, self.len));
        self.len += signals.len();
        Ok(())
    }

    fn get(&mut self, position: usize) -> anyhow::Result<Signal> {
        let (start, held) = &self.held;
        if !(*start..*start + held.len()).contains(&position) {
            let frame = self.frames.partition_point(|(_, first)| *first <= position);
            let (span, first) = frame
                .checked_sub(1)
                .and_then(|frame| self.frames.get(frame))
                .context("the journal is empty")?;
            self.held = (*first, self.journal.read(*span)?);
        }
        let (start, held) = &self.held;
        let signal = held.get(position - start).cloned();
        signal.context("the journal changed while it was read")
    }
}

/// Published prompts by id.
pub(super) fn prompts(dir: &Path) -> anyhow::Result<HashMap<String, Prompt>> {
    let prompts = import::published(dir)?;
    Ok(prompts.into_iter().map(|p| (p.id.clone(), p)).collect())
}

/// Of each provenance of a shard, whether its token ids are of the tokenizer with this
/// fingerprint.
pub(super) fn own_ids(shard: &Path, fingerprint: &str) -> anyhow::Result<Vec<bool>> {
    let provenance = read_footer(shard)?.provenance;
    Ok(provenance
        .iter()
        .map(|p| p.tokenizer == fingerprint)
        .collect())
}
