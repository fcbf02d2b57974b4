//! `collect` from a teacher behind a server.
//!
//! A unit is (prompt, sample index), and its ordinal is its place in `prompts/`. Prompts are read from
//! there as places for requests become free. What lands together becomes one frame of the journal in
//! `.work/collect-<key>/`, synced, before it counts. When every unit has landed, as an answer or as a
//! failure, shards are written from the journal and from what was published before, in the order of
//! prompts: the same answers give the same bytes, whatever order they came in.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use potstill_datasets::{Completion, Manifest, Prompt, Provenance, stage_key};
use potstill_teacher::http::{
    self, Api, Call, CallEvent, CallTask, CallbackError, CollectProgress, CollectionEnd,
    CompletedCall, FailureReason,
};
use serde_json::{Value, json};

use super::forecast::{self, Measured};
use super::prompts::{self, Prompts};
use super::requests::{self, Requests};
use super::store::{Index, Outcome as Fate, Row, Store, Tally};
use super::{REQUESTS_FILE, Served};
use super::{probe, publish};
use crate::events::Event;
use crate::interrupt;
use crate::run_dir::{Earlier, Plan, short};
use crate::stages::{Context, Done, Outcome, counts, stage_again};

/// Asks the server for what is not there yet, and publishes all of it.
///
/// # Errors
/// When prompts are not published, the server cannot be used, a cap is reached, or the disk refuses;
/// what was answered stays.
pub(crate) fn collect(context: &Context) -> anyhow::Result<Outcome> {
    let run = &context.run;
    let manifest = context.dir.require("prompts", "import", run)?;
    let served = Served::open(run)?;
    probe::check(&served, &context.dir.path(""))?;
    let answers = served.answers()?;
    let signals = run.file.collect.signals.as_ref().map(|s| s.top_k.get());
    let plan = plan(context, &served, &answers, manifest.content_hash())?;
    let again = context.retry_failures && has_failures(context)?;
    if context.dry_run && (again || !is_published(context, &plan)?) {
        say_forecast(context, &served, &answers)?;
    }
    let mut finished_work = None;
    let outcome = stage_again(context, &plan, again, |out| {
        let mut collection = Collection::open(context, &served, &answers)?;
        let before = collection.store.tally();
        if !collection.ask_missing()? {
            return Ok(None);
        }
        let written = publish::write(&mut collection, &served, signals, out)?;
        let all_in = collection.store.others == 0;
        if all_in {
            finished_work = Some(collection.work.clone());
        }
        let same = published_answers(context)?.is_some_and(|published| published == answers);
        Ok(Some(Done {
            worked: counts([
                ("asked", written.answers + written.failures - before.answers),
                ("there before", before.answers),
                ("answer tokens", written.tokens),
                ("failures", written.failures),
            ]),
            counts: counts([
                ("answers", written.answers),
                ("answer tokens", written.tokens),
                ("cut at the limit", written.cut),
                ("failures", written.failures),
                ("without distributions", written.unsignalled),
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

/// What is published, and what it depends on.
fn plan(
    context: &Context,
    served: &Served<'_>,
    answers: &Value,
    prompts: String,
) -> anyhow::Result<Plan> {
    let collect = &context.run.file.collect;
    let mut settings = json!({ "answers": answers, "samples": collect.samples.get() });
    let mut outputs = vec!["failures".to_owned(), "completions".to_owned()];
    if let Some(signals) = &collect.signals {
        // Distributions are made of the answers' own alternatives and of the text around them.
        let text = served.text.as_ref().context("signals need a tokenizer")?;
        settings["signals"] = json!({
            "top_k": signals.top_k.get(),
            "tokenizer": text.tokenizer.fingerprint(),
            "template": text.template.hash(),
        });
        outputs.insert(0, "signals".to_owned());
    }
    Ok(Plan {
        stage: "collect".to_owned(),
        home: "completions".to_owned(),
        outputs,
        settings,
        inputs: BTreeMap::from([("prompts".to_owned(), prompts)]),
    })
}

pub(super) fn is_published(context: &Context, plan: &Plan) -> anyhow::Result<bool> {
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

/// For a dry run: what is ahead, on stdout.
fn say_forecast(context: &Context, served: &Served<'_>, answers: &Value) -> anyhow::Result<()> {
    let folder = work_folder(answers);
    // Nothing is written: a journal that is not there is not begun.
    let missing = match context.dir.path(".work").join(&folder).is_dir() {
        true => {
            let collection = Collection::open(context, served, answers)?;
            (collection.missing(), collection.measured)
        }
        false => measure(context, served)?,
    };
    let (missing, measured) = missing;
    let spent = requests::spent(&context.dir.path(REQUESTS_FILE))?;
    context
        .talk
        .data(&forecast::of_answers(served, &measured, missing, &spent));
    Ok(())
}

fn measure(context: &Context, served: &Served<'_>) -> anyhow::Result<(usize, Measured)> {
    let mut measured = Measured::default();
    let mut prompts = 0;
    for prompt in Prompts::open(&context.dir.path("prompts"))? {
        served.measure(&mut measured, &prompt?)?;
        prompts += 1;
    }
    Ok((prompts * context.run.file.collect.samples.get(), measured))
}

fn work_folder(answers: &Value) -> String {
    let key = stage_key("answers", answers, &BTreeMap::new());
    format!("collect-{}", short(&key))
}

/// A collection: what is there, and what is asked for.
pub(super) struct Collection<'a> {
    context: &'a Context,
    served: &'a Served<'a>,
    pub(super) store: Store<Completion>,
    provenance: Provenance,
    measured: Measured,
    pub(super) samples: usize,
    pub(super) work: PathBuf,
}

impl<'a> Collection<'a> {
    fn open(
        context: &'a Context,
        served: &'a Served<'a>,
        answers: &Value,
    ) -> anyhow::Result<Collection<'a>> {
        let dir = &context.dir;
        let work = dir.work(&work_folder(answers))?;
        let (folder, samples) = (dir.path("prompts"), context.run.file.collect.samples.get());
        let mut measured = Measured::default();
        let units = Prompts::open(&folder)?.flat_map(|prompt| {
            let prompt = prompt.and_then(|prompt| {
                served.measure(&mut measured, &prompt)?;
                Ok(prompt.id)
            });
            let of_prompt: Vec<anyhow::Result<(String, u32)>> = match prompt {
                Ok(id) => (0..samples as u32).map(|s| Ok((id.clone(), s))).collect(),
                Err(error) => vec![Err(error)],
            };
            of_prompt
        });
        let index = Index::new(prompts::count(&folder)? * samples, units)?;
        let mut store = Store::open(&work.join("journal.bin"), &index)?;
        if store.cut_bytes > 0 {
            context.talk.line(&format!(
                "collect: answers that completed while the disk or the process failed are asked for again ({} bytes cut)",
                store.cut_bytes
            ));
        }
        let provenance = served.provenance()?;
        let mut failed = Vec::new();
        let mut homes = vec!["completions".to_owned()];
        homes.extend(dir.old("completions"));
        for home in homes {
            let same = |m: &Manifest| {
                m.settings
                    .get("answers")
                    .is_some_and(|a| serves(a, answers))
            };
            if Manifest::read(&dir.path(&home))?.as_ref().is_some_and(same) {
                let failures = dir.path(&home.replacen("completions", "failures", 1));
                failed.extend(store.add_published(&dir.path(&home), &failures, &index)?);
            }
        }
        drop(index);
        let mut collection = Collection {
            context,
            served,
            store,
            provenance,
            measured,
            samples,
            work,
        };
        collection.take_up(failed)?;
        Ok(collection)
    }

    /// Failures that were published before are in the journal too, unless they are to be asked for again.
    fn take_up(&mut self, failed: Vec<(u32, potstill_datasets::Failed)>) -> anyhow::Result<()> {
        if self.context.retry_failures {
            return Ok(());
        }
        let rows = failed
            .into_iter()
            .filter(|(ordinal, _)| self.store.is_missing(u64::from(*ordinal), false));
        let rows: Vec<(u32, Row<Completion>)> = rows
            .map(|(ordinal, failed)| {
                let row = Row {
                    prompt_id: failed.prompt_id,
                    sample_index: failed.sample_index,
                    attempts: 0,
                    outcome: Fate::Failed {
                        reason: failed.reason,
                        message: failed.message,
                    },
                };
                (ordinal, row)
            })
            .collect();
        self.store.add(&self.provenance, rows)
    }

    pub(super) fn prompts_folder(&self) -> PathBuf {
        self.context.dir.path("prompts")
    }

    /// Says what failed, by reason.
    pub(super) fn say_failures(&self, reasons: &BTreeMap<String, usize>) {
        if reasons.is_empty() {
            return;
        }
        let said: Vec<String> = reasons.iter().map(|(r, n)| format!("{n} {r}")).collect();
        self.context.talk.say(&Event::Warning {
            text: format!(
                "collect: without an answer or its distributions: {}; `failures/` says why, and `--retry-failures` asks again",
                said.join(", ")
            ),
        });
    }

    /// How many units have to be asked for.
    fn missing(&self) -> usize {
        self.store.tally().to_ask(self.context.retry_failures)
    }

    /// Asks for what is missing; false when it was stopped.
    fn ask_missing(&mut self) -> anyhow::Result<bool> {
        let Context { talk, run, dir, .. } = self.context;
        let missing = self.missing();
        let tally = self.store.tally();
        if missing == 0 {
            talk.line(&format!("collect: all {} answers are there", tally.answers));
            return Ok(true);
        }
        if tally.answers > 0 {
            talk.line(&format!("collect: {} answers are there", tally.answers));
        }
        if run.file.served().is_some_and(|teacher| teacher.offline) {
            return Err(run
                .problem(
                    &["teacher", "offline"],
                    format!("{missing} answers are missing and no socket may be opened: leave it out to ask for them"),
                )
                .into());
        }
        let requests = Requests::open(&dir.path(REQUESTS_FILE), "collect")?;
        requests.say_lost(talk, "collect");
        talk.line(&format!(
            "collect: {}",
            forecast::of_answers(self.served, &self.measured, missing, &requests.spent)
        ));
        let over = self.ask(&requests, missing)?;
        ended(self.context, self.store.tally(), over)
    }

    fn ask(&mut self, requests: &Requests, missing: usize) -> anyhow::Result<CollectionEnd> {
        let Context { talk, run, dir, .. } = self.context;
        let settings = self
            .served
            .settings(self.served.request_settings(), requests.spent)?;
        let there = self.store.tally().answers as u64;
        let total = there + missing as u64;
        let before = requests.spent;
        let budget = &run.file.budget;
        let mut bar = talk.work("collect", "answers", there, total);
        let asker = RefCell::new(Asker {
            served: self.served,
            store: &mut self.store,
            provenance: &self.provenance,
            requests,
            prompts: Prompts::open(&dir.path("prompts"))?,
            held: None,
            ordinal: 0,
            samples: self.samples as u64,
            retry: self.context.retry_failures,
            looked_at: 0,
            disk_bytes: budget.disk_bytes.map(|bytes| bytes.get()),
        });
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
        Ok(ended)
    }
}

/// Whether everything has landed; false when it was stopped.
pub(super) fn ended(context: &Context, tally: Tally, ended: CollectionEnd) -> anyhow::Result<bool> {
    let file = context.run.path.display();
    let there = format!(
        "{} answers are there and kept, {} are missing",
        tally.answers, tally.missing
    );
    match ended {
        CollectionEnd::Finished => Ok(true),
        CollectionEnd::Stopped => Ok(false),
        CollectionEnd::CapReached { cap } => {
            let spent = requests::spent(&context.dir.path(REQUESTS_FILE))?;
            bail!(
                "the budget is used up ({cap}): {} requests, {} tokens and {} were spent; {there}: raise [budget], and `potstill run {file}` goes on",
                spent.requests,
                spent.tokens,
                forecast::dollars(spent.usd),
            )
        }
        CollectionEnd::StoppedByCaller { why } => bail!("{why}; {there}"),
        CollectionEnd::EndpointsDown { last } => bail!(
            "no endpoint can be used: the last one said {}{} ({}); {there}: see to url, model and key in [teacher], and `potstill run {file}` goes on",
            last.status.map_or_else(String::new, |s| format!("{s} ")),
            last.message,
            last.reason.name(),
        ),
    }
}

/// Ends a collection whose files have grown to the cap.
pub(super) fn full(bytes: u64, most: Option<u64>) -> ControlFlow<String> {
    match most.filter(|most| bytes >= *most) {
        None => ControlFlow::Continue(()),
        Some(most) => ControlFlow::Break(format!(
            "what was asked for takes {bytes} bytes, and `disk_bytes` of [budget] is {most}: raise it, and the run goes on"
        )),
    }
}

/// Whether answers of these settings hold all that is asked for.
fn serves(there: &Value, wanted: &Value) -> bool {
    let without = |answers: &Value| {
        let mut answers = answers.clone();
        if let Some(fields) = answers.as_object_mut() {
            fields.remove("logprobs");
        }
        answers
    };
    there == wanted || wanted["logprobs"].is_null() && without(there) == without(wanted)
}

/// So many answers at the beginning are looked at more closely: whether distributions can be made of
/// them, and whether the server renders prompts as we do.
const LOOKED_AT: usize = 8;

/// What the client calls back: the next call, and what landed.
struct Asker<'a> {
    served: &'a Served<'a>,
    store: &'a mut Store<Completion>,
    provenance: &'a Provenance,
    requests: &'a Requests,
    prompts: Prompts,
    /// The prompt whose samples are being asked for.
    held: Option<Arc<Prompt>>,
    /// The next unit.
    ordinal: u64,
    samples: u64,
    retry: bool,
    looked_at: usize,
    disk_bytes: Option<u64>,
}

impl Asker<'_> {
    /// The next unit that is missing. One that cannot fit is a failure that costs nothing.
    fn next(&mut self) -> anyhow::Result<Option<Call>> {
        loop {
            let sample_index = (self.ordinal % self.samples) as u32;
            if sample_index == 0 {
                self.held = self.prompts.next().transpose()?.map(Arc::new);
            }
            let Some(prompt) = self.held.clone() else {
                return Ok(None);
            };
            let number = self.ordinal;
            self.ordinal += 1;
            if !self.store.is_missing(number, self.retry) {
                continue;
            }
            let ids = self.served.prompt_ids(&prompt)?;
            if let Some(why) = self.too_long(ids.as_deref()) {
                let row = Row {
                    prompt_id: prompt.id.clone(),
                    sample_index,
                    attempts: 0,
                    outcome: Fate::Failed {
                        reason: FailureReason::ContextTooLong.name(),
                        message: why,
                    },
                };
                self.store
                    .add(self.provenance, vec![(number as u32, row)])?;
                continue;
            }
            let at_most = self.served.max_prompt_tokens(&prompt, ids.as_deref());
            let task = match (self.served.request_settings().api, ids) {
                (Api::Completions, Some(ids)) => CallTask::AnswerIds(ids),
                _ => CallTask::Answer,
            };
            return Ok(Some(Call {
                number,
                prompt,
                sample_index,
                task,
                max_prompt_tokens: at_most,
            }));
        }
    }

    fn too_long(&self, ids: Option<&[u32]>) -> Option<String> {
        let (tokens, context) = (ids?.len() as u64, u64::from(self.served.context?));
        let answer = u64::from(self.served.request_settings().max_tokens.unwrap_or(1));
        (tokens + answer > context).then(|| {
            format!("the prompt has {tokens} tokens, and with {answer} for the answer that is more than the context of {context}")
        })
    }

    /// Puts a group on the disk.
    fn complete(&mut self, events: Vec<CallEvent>) -> anyhow::Result<ControlFlow<String>> {
        let mut rows = Vec::new();
        let mut fault = None;
        for event in events {
            match event {
                CallEvent::Attempt(attempt) => self.requests.over(&attempt)?,
                CallEvent::Completed(completed) => {
                    fault = fault.or(self.look_at(&completed)?);
                    rows.push((completed.call.number as u32, row(*completed)));
                }
            }
        }
        self.requests.sync()?;
        self.store.add(self.provenance, rows)?;
        let bytes = self.store.bytes() + self.requests.bytes();
        Ok(match fault {
            Some(fault) => ControlFlow::Break(fault),
            None => full(bytes, self.disk_bytes),
        })
    }

    /// What is wrong with every answer, as far as the first ones show it.
    fn look_at(&mut self, completed: &CompletedCall) -> anyhow::Result<Option<String>> {
        let (Ok(response), Some(text)) = (&completed.result, &self.served.text) else {
            return Ok(None);
        };
        let Some(top_k) = self.served.request_settings().logprobs else {
            return Ok(None);
        };
        if self.looked_at >= LOOKED_AT {
            return Ok(None);
        }
        self.looked_at += 1;
        let Some(ids) = self.served.prompt_ids(&completed.call.prompt)? else {
            return Ok(None);
        };
        if let Some(servers) = response
            .prompt_token_ids
            .as_ref()
            .filter(|servers| **servers != ids)
        {
            return Ok(Some(format!(
                "the server renders the prompt of {} to {} tokens, and template and tokenizer here to {}: distributions would belong to another text; set `template` or `tokenizer` in [teacher] to the server's, or `method = \"completions\"`",
                completed.call.prompt.source,
                servers.len(),
                ids.len()
            )));
        }
        let signal = text.signal(&ids, &response.completion, top_k as usize);
        Ok(signal.err().map(|why| {
            format!(
                "no distributions can be made of the answer to {}: {why}; `potstill probe` says what this server can do",
                completed.call.prompt.source
            )
        }))
    }
}

fn row(completed: CompletedCall) -> Row<Completion> {
    Row {
        prompt_id: completed.call.prompt.id.clone(),
        sample_index: completed.call.sample_index,
        attempts: completed.attempts,
        outcome: match completed.result {
            Ok(response) => Fate::Got(response.completion),
            Err(failure) => Fate::Failed {
                reason: failure.reason.name(),
                message: failure.message,
            },
        },
    }
}
