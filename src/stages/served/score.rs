//! `score` by a teacher behind a server: distributions over given text from the log-probabilities that
//! it gives for prompts.
//!
//! A unit is a row of `completions/`. A text that is longer than `window` is sent in parts, and its
//! distributions are put together when the last part has landed.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context as _, bail};
use potstill_datasets::{
    Completion, Encoded, Failed, Imported, Provenance, Reasoning, ShardWriter, Signal, read_footer,
    read_shard, shard_name, shards,
};
use potstill_teacher::http::{
    self, Api, Call, CallEvent, CallTask, CallbackError, CollectProgress, CompletedCall,
    PromptLogprobs, RequestSettings, ScoringWindow,
};
use serde_json::json;

use super::forecast::{self, Measured};
use super::pairs::{self, Pair, Pairs};
use super::publish::{NO_SIGNAL, empty};
use super::requests::{self, Requests};
use super::store::{Index, Outcome as Fate, Row, Store};
use super::{REQUESTS_FILE, Served, Text, collect, probe};
use crate::interrupt;
use crate::run_dir::{Counts, Plan, settings_of, short};
use crate::run_file::Score;
use crate::stages::collect::reasoning;
use crate::stages::{Context, Done, Outcome, counts, stage_again};

const NO_TOKENIZER: &str = "[score] needs the `tokenizer` of [teacher]";

/// Where what could not be scored is listed.
pub(crate) const UNSCORED: &str = "unscored";

/// Scores every answer that is not scored yet, and publishes the distributions.
///
/// # Errors
/// When answers are not published, the server cannot be used, a cap is reached, or the disk refuses;
/// what was scored stays.
pub(crate) fn score(context: &Context, settings: &Score) -> anyhow::Result<Outcome> {
    let run = &context.run;
    let completions = context.dir.require("completions", "collect", run)?;
    let served = Served::open(run)?;
    probe::check(&served, &context.dir.path(""))?;
    let text = served.text.as_ref();
    let text = text.context(NO_TOKENIZER)?;
    let plan = Plan {
        stage: "score".to_owned(),
        home: "signals".to_owned(),
        outputs: vec![UNSCORED.to_owned(), "signals".to_owned()],
        settings: json!({
            "served": served.model,
            "tokenizer": text.tokenizer.fingerprint(),
            "template": text.template.hash(),
            "licence": served.provenance()?.licence,
            "reasoning": settings_of(&run.file.collect.reasoning)?,
            "score": { "top_k": settings.top_k.get(), "window": settings.window.map(|w| w.get()) },
        }),
        inputs: BTreeMap::from([("completions".to_owned(), completions.content_hash())]),
    };
    let failed = context.dir.published("signals")?;
    let failed = failed.and_then(|m| m.counts.get("failures").copied());
    let again = context.retry_failures && failed.is_some_and(|n| n > 0);
    let folder = format!("score-{}", short(&plan.key()));
    if context.dry_run && (again || !collect::is_published(context, &plan)?) {
        say_forecast(context, &served, text, settings, &folder)?;
    }
    let mut finished_work = None;
    let outcome = stage_again(context, &plan, again, |out| {
        let work = context.dir.work(&folder)?;
        let mut scoring = Scoring::open(context, &served, text, settings, &work)?;
        if !scoring.ask_missing()? {
            return Ok(None);
        }
        let counts = scoring.write(out)?;
        // What failed can be asked for again without paying for the rest, as long as the journal is there.
        if counts.get("failures") == Some(&0) {
            finished_work = Some(work);
        }
        Ok(Some(Done::new(counts)))
    })?;
    if let Some(work) = finished_work {
        fs::remove_dir_all(&work).with_context(|| format!("cannot delete {}", work.display()))?;
    }
    Ok(outcome)
}

/// For a dry run: what is ahead, on stdout.
fn say_forecast(
    context: &Context,
    served: &Served<'_>,
    text: &Text,
    settings: &Score,
    folder: &str,
) -> anyhow::Result<()> {
    // Nothing is written: a journal that is not there is not begun.
    let work = context.dir.path(".work").join(folder);
    let (missing, measured) = match work.is_dir() {
        true => {
            let scoring = Scoring::open(context, served, text, settings, &work)?;
            (scoring.missing(), scoring.measured)
        }
        false => {
            let (mut measured, mut answers) = (Measured::default(), 0);
            let (window, reasoning) = (window(settings, served), reasoning(&context.run));
            for pair in pairs(context, text)? {
                measure(&mut measured, &pair?, text, reasoning.as_ref(), window)?;
                answers += 1;
            }
            (answers, measured)
        }
    };
    let spent = requests::spent(&context.dir.path(REQUESTS_FILE))?;
    let tokens = measured.tokens_of(missing);
    let ahead = forecast::of_scores(served, tokens, missing, &spent);
    context.talk.data(&ahead);
    Ok(())
}

/// For `check`, where the answers are the data's own: tokens that would be sent, about, and answers.
///
/// # Errors
/// Where the run file names no tokenizer, or a text cannot be rendered.
pub(super) fn check(
    served: &Served<'_>,
    settings: &Score,
    imported: &Imported,
) -> anyhow::Result<(u64, usize)> {
    let text = served.text.as_ref().context(NO_TOKENIZER)?;
    let (window, reasoning) = (window(settings, served), reasoning(served.run));
    let mut measured = Measured::default();
    for pair in pairs::given(imported) {
        measure(&mut measured, &pair, text, reasoning.as_ref(), window)?;
    }
    let answers = imported.answers.len();
    Ok((measured.tokens_of(answers), answers))
}

/// Most tokens that are sent at once.
fn window(settings: &Score, served: &Served<'_>) -> Option<usize> {
    let window = settings.window.map(|w| w.get());
    // One place is for the token that a server generates.
    window.or(served.context.map(|c| c as usize - 1))
}

/// The parts in which a text is sent.
fn parts(encoded: &Encoded, window: Option<usize>) -> Vec<ScoringWindow> {
    let tokens = encoded.token_ids.len();
    let from = encoded.loss_mask.iter().position(|loss| *loss);
    let most = window.unwrap_or(tokens).max(2);
    http::scoring_windows(tokens, from.unwrap_or(tokens).max(1), most, most / 2)
}

fn pairs(context: &Context, text: &Text) -> anyhow::Result<Pairs> {
    let (completions, prompts) = (context.dir.path("completions"), context.dir.path("prompts"));
    Pairs::open(&completions, &prompts, text)
}

/// Adds a pair to what is reckoned with: the tokens of all its parts.
fn measure(
    measured: &mut Measured,
    pair: &Pair,
    text: &Text,
    reasoning: Option<&Reasoning>,
    window: Option<usize>,
) -> anyhow::Result<()> {
    measured.add(pair.bytes(), || {
        // What cannot be rendered is not sent.
        let encoded = pair.encode(text, reasoning).ok();
        let parts = encoded.map(|encoded| parts(&encoded, window));
        Ok(parts.map(|parts| parts.iter().map(|p| p.end - p.start).sum()))
    })
}

struct Scoring<'a> {
    context: &'a Context,
    served: &'a Served<'a>,
    text: &'a Text,
    settings: &'a Score,
    provenance: Provenance,
    store: Store<Signal>,
    measured: Measured,
    /// Answers in all.
    len: usize,
}

impl<'a> Scoring<'a> {
    fn open(
        context: &'a Context,
        served: &'a Served<'a>,
        text: &'a Text,
        settings: &'a Score,
        work: &Path,
    ) -> anyhow::Result<Scoring<'a>> {
        let folder = context.dir.path("completions");
        let mut len = 0;
        for shard in shards(&folder)? {
            len += read_footer(&shard)?.rows;
        }
        let mut measured = Measured::default();
        let (window, reasoning) = (window(settings, served), reasoning(&context.run));
        let units = pairs(context, text)?.map(|pair| {
            let pair = pair?;
            measure(&mut measured, &pair, text, reasoning.as_ref(), window)?;
            Ok((pair.completion.prompt_id, pair.completion.sample_index))
        });
        let index = Index::new(len, units)?;
        let store = Store::open(&work.join("journal.bin"), &index)?;
        Ok(Scoring {
            context,
            served,
            text,
            settings,
            provenance: served.provenance()?,
            store,
            measured,
            len,
        })
    }

    /// How many answers are to be scored.
    fn missing(&self) -> usize {
        self.store.tally().to_ask(self.context.retry_failures)
    }

    /// What every request has in common.
    fn request_settings(&self) -> RequestSettings {
        RequestSettings {
            api: Api::Completions,
            max_tokens: Some(1),
            temperature: (!self.served.request_settings().reasoning_model).then_some(1.0),
            top_p: None,
            top_k: None,
            min_p: None,
            repetition_penalty: None,
            stop: Vec::new(),
            logprobs: None,
            stream: false,
            ..self.served.request_settings()
        }
    }

    /// Asks for what is missing; false when it was stopped.
    fn ask_missing(&mut self) -> anyhow::Result<bool> {
        let Context { talk, run, dir, .. } = self.context;
        let tally = self.store.tally();
        let missing = self.missing();
        if missing == 0 {
            return Ok(true);
        }
        if tally.answers > 0 {
            talk.line(&format!(
                "score: {} of {} answers are scored",
                tally.answers, self.len
            ));
        }
        let requests = Requests::open(&dir.path(REQUESTS_FILE), "score")?;
        requests.say_lost(talk, "score");
        let tokens = self.measured.tokens_of(missing);
        talk.line(&format!(
            "score: {}",
            forecast::of_scores(self.served, tokens, missing, &requests.spent)
        ));
        let settings = self
            .served
            .settings(self.request_settings(), requests.spent)?;
        let (before, budget) = (requests.spent, &run.file.budget);
        let mut bar = talk.work("score", "answers", tally.answers as u64, self.len as u64);
        let asker = RefCell::new(Asker {
            window: window(self.settings, self.served),
            top_k: self.settings.top_k.get(),
            vocabulary: self.text.tokenizer.vocab_size(),
            text: self.text,
            reasoning: reasoning(run),
            store: &mut self.store,
            provenance: &self.provenance,
            requests: &requests,
            pairs: pairs(self.context, self.text)?,
            ordinal: 0,
            retry: self.context.retry_failures,
            disk_bytes: budget.disk_bytes.map(|bytes| bytes.get()),
            waiting: Vec::new(),
            texts: HashMap::new(),
        });
        let (there, total) = (tally.answers as u64, self.len as u64);
        let ended = http::collect(
            &settings,
            &mut || asker.borrow_mut().next().map_err(CallbackError::from),
            &|sent| requests.sent(sent),
            &mut |events| {
                asker
                    .borrow_mut()
                    .complete(events)
                    .map_err(CallbackError::from)
            },
            &mut |progress: &CollectProgress| {
                let note = forecast::live(self.served, budget, &before, missing, progress);
                let over = there + progress.answered + progress.failed;
                bar.show(over.min(total), progress.tokens, &note);
            },
            &interrupt::asked,
        )?;
        drop(bar);
        collect::ended(self.context, self.store.tally(), ended)
    }

    /// Writes `signals/` shard for shard and row for row as `completions/` is, and `unscored/`.
    fn write(&mut self, out: &Path) -> anyhow::Result<Counts> {
        let (mut answers, mut distributions, mut failures, mut first) = (0, 0, 0, 0);
        let mut why = None;
        for (index, shard) in shards(&self.context.dir.path("completions"))?
            .iter()
            .enumerate()
        {
            let provenance: Vec<Provenance> = read_footer(shard)?
                .provenance
                .into_iter()
                .map(|p| Provenance {
                    sampling: p.sampling,
                    ..self.provenance.clone()
                })
                .collect();
            let name = shard_name(index);
            let mut signals =
                ShardWriter::<Signal>::new(&out.join("signals").join(&name), &provenance)?;
            let mut unscored = ShardWriter::<Failed>::new(&out.join(UNSCORED).join(&name), &[])?;
            for completion in read_shard::<Completion>(shard)? {
                let completion = completion?;
                let row = self.store.signals(first..first + 1)?.pop().flatten();
                let row = row.context("an answer is not scored")?;
                first += 1;
                match row.outcome {
                    Fate::Got(mut signal) => {
                        answers += 1;
                        distributions += signal.rows.len();
                        signal.provenance = completion.provenance;
                        signals.push(signal)?;
                    }
                    Fate::Failed { reason, message } => {
                        failures += 1;
                        why.get_or_insert_with(|| format!("{reason}: {message}"));
                        signals.push(empty(&completion))?;
                        unscored.push(Failed {
                            prompt_id: completion.prompt_id,
                            sample_index: completion.sample_index,
                            reason,
                            message,
                        })?;
                    }
                }
            }
            signals.finish()?;
            unscored.finish()?;
        }
        if answers == 0 {
            bail!(
                "none of {failures} answers could be scored: {}; `potstill probe` says what this server can do, and `--retry-failures` asks again",
                why.unwrap_or_default()
            );
        }
        Ok(counts([
            ("answers", answers),
            ("distributions", distributions),
            ("failures", failures),
        ]))
    }
}

/// A text whose parts are on their way.
struct Parts {
    prompt_id: String,
    sample_index: u32,
    encoded: Encoded,
    got: Vec<(ScoringWindow, PromptLogprobs)>,
    /// Parts that have not landed, with their windows.
    windows: HashMap<u64, ScoringWindow>,
    attempts: u32,
    failed: Option<(String, String)>,
}

/// What the client calls back: the next call, and what landed.
struct Asker<'a> {
    /// Most tokens that are sent at once.
    window: Option<usize>,
    top_k: usize,
    vocabulary: usize,
    text: &'a Text,
    reasoning: Option<Reasoning>,
    store: &'a mut Store<Signal>,
    provenance: &'a Provenance,
    requests: &'a Requests,
    pairs: Pairs,
    /// The next unit.
    ordinal: u64,
    retry: bool,
    disk_bytes: Option<u64>,
    /// Parts of a long text that are still to be asked for.
    waiting: Vec<Call>,
    texts: HashMap<u64, Parts>,
}

/// A call's number: the unit, and which part of it.
const PART_BITS: u32 = 16;

impl Asker<'_> {
    fn next(&mut self) -> anyhow::Result<Option<Call>> {
        loop {
            if let Some(call) = self.waiting.pop() {
                return Ok(Some(call));
            }
            let Some(pair) = self.pairs.next().transpose()? else {
                return Ok(None);
            };
            let ordinal = self.ordinal;
            self.ordinal += 1;
            if !self.store.is_missing(ordinal, self.retry) {
                continue;
            }
            match pair.encode(self.text, self.reasoning.as_ref()) {
                Ok(encoded) => self.split(ordinal, &pair, encoded),
                Err(error) => {
                    let row = failure(&pair.completion, NO_SIGNAL.to_owned(), error.to_string());
                    self.store
                        .add(self.provenance, vec![(ordinal as u32, row)])?;
                }
            }
        }
    }

    fn split(&mut self, ordinal: u64, pair: &Pair, encoded: Encoded) {
        let Pair {
            prompt, completion, ..
        } = pair;
        let mut windows = HashMap::new();
        let cut = parts(&encoded, self.window);
        for (part, window) in cut.into_iter().enumerate().rev() {
            let number = ordinal << PART_BITS | part as u64;
            let ids = encoded.token_ids.get(window.start..window.end);
            let ids = ids.unwrap_or_default().to_vec();
            self.waiting.push(Call {
                number,
                prompt: prompt.clone(),
                sample_index: completion.sample_index,
                max_prompt_tokens: ids.len() as u32,
                task: CallTask::Score {
                    from: window.from - window.start,
                    top_k: self.top_k as u32,
                    token_ids: ids,
                },
            });
            windows.insert(number, window);
        }
        let parts = Parts {
            prompt_id: completion.prompt_id.clone(),
            sample_index: completion.sample_index,
            encoded,
            got: Vec::new(),
            windows,
            attempts: 0,
            failed: None,
        };
        self.texts.insert(ordinal, parts);
    }

    /// Puts a group on the disk: texts all of whose parts have landed.
    fn complete(&mut self, events: Vec<CallEvent>) -> anyhow::Result<ControlFlow<String>> {
        let mut rows = Vec::new();
        for event in events {
            match event {
                CallEvent::Attempt(attempt) => self.requests.over(&attempt)?,
                CallEvent::Completed(completed) => rows.extend(self.part(*completed)),
            }
        }
        self.requests.sync()?;
        self.store.add(self.provenance, rows)?;
        let bytes = self.store.bytes() + self.requests.bytes();
        Ok(collect::full(bytes, self.disk_bytes))
    }

    /// The row of a text whose last part this is.
    fn part(&mut self, completed: CompletedCall) -> Option<(u32, Row<Signal>)> {
        let ordinal = completed.call.number >> PART_BITS;
        let parts = self.texts.get_mut(&ordinal)?;
        let window = parts.windows.remove(&completed.call.number)?;
        parts.attempts += completed.attempts;
        match completed.result.map(|response| response.prompt_logprobs) {
            Ok(Some(given)) => parts.got.push((window, given)),
            Ok(None) => {
                let why = "the server gave no log-probabilities of the prompt".to_owned();
                parts.failed = Some((NO_SIGNAL.to_owned(), why));
            }
            Err(failure) => parts.failed = Some((failure.reason.name(), failure.message)),
        }
        if !parts.windows.is_empty() {
            return None;
        }
        let parts = self.texts.remove(&ordinal)?;
        Some((ordinal as u32, self.row(parts)))
    }

    fn row(&self, parts: Parts) -> Row<Signal> {
        let (prompt_id, sample_index) = (parts.prompt_id.clone(), parts.sample_index);
        let attempts = parts.attempts;
        let outcome = match parts.failed.clone() {
            Some((reason, message)) => Fate::Failed { reason, message },
            None => match self.signal(parts) {
                Ok(signal) => Fate::Got(signal),
                Err(message) => Fate::Failed {
                    reason: NO_SIGNAL.to_owned(),
                    message,
                },
            },
        };
        Row {
            prompt_id,
            sample_index,
            attempts,
            outcome,
        }
    }

    fn signal(&self, mut parts: Parts) -> Result<Signal, String> {
        let Encoded {
            token_ids,
            loss_mask,
        } = parts.encoded;
        parts.got.sort_by_key(|(window, _)| window.start);
        let given = http::join_scoring_windows(token_ids.len(), parts.got)?;
        let from = loss_mask.iter().position(|loss| *loss);
        let from = from.ok_or("the answer is empty")?.max(1);
        let whole = http::prompt_signal(
            &parts.prompt_id,
            parts.sample_index,
            &token_ids,
            from,
            &given,
            self.top_k,
            self.vocabulary,
        )?;
        // What a template puts behind an answer carries no loss.
        let kept: Vec<bool> = whole
            .loss_positions()
            .map(|at| loss_mask.get(at) == Some(&true))
            .collect();
        let rows = whole.rows.into_iter().zip(kept);
        let signal = Signal {
            rows: rows.filter(|(_, kept)| *kept).map(|(row, _)| row).collect(),
            loss_mask,
            ..Signal {
                rows: Vec::new(),
                ..whole
            }
        };
        signal.validate().map_err(|e| e.to_string())?;
        Ok(signal)
    }
}

fn failure(completion: &Completion, reason: String, message: String) -> Row<Signal> {
    Row {
        prompt_id: completion.prompt_id.clone(),
        sample_index: completion.sample_index,
        attempts: 0,
        outcome: Fate::Failed { reason, message },
    }
}
