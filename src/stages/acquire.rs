//! Acquisition: asks a teacher for the units that a store lacks, and keeps what it gives.

use std::cell::RefCell;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::bail;
use potstill_datasets::{Store, StoredRecord, Tally};
use potstill_teacher::http::{CallbackError, CollectProgress, CollectionEnd, RequestLog, Spending};
use potstill_teacher::{Error as TeacherError, Exchange, HttpTeacher, Teacher};

use super::{Context, forecast, served};
use crate::events::Event;
use crate::interrupt;
use crate::progress::StageProgress;

/// Shortest wait that is said in a line of its own, seconds.
const SAID_WAIT_SECONDS: f64 = 2.0;

/// The list of requests in the run directory.
pub(super) const REQUESTS_FILE: &str = "requests.jsonl";

/// The units that a stage acquires, and the store for them.
pub(super) struct Acquisition<'a, Q, T> {
    /// The stage's name.
    pub(super) stage: &'static str,
    pub(super) store: &'a mut Store<T>,
    /// All units in order, each with its ordinal. Units that the store has are skipped.
    pub(super) units: &'a mut dyn Iterator<Item = anyhow::Result<(u32, Q)>>,
    /// Forecast of what a teacher behind a server will cost, after the spending so far.
    pub(super) forecast: &'a dyn Fn(&HttpTeacher, &Spending) -> String,
    /// The teacher's method for these requests.
    pub(super) work: &'a AcquireMethod<'a, Q, T>,
}

type AcquireMethod<'a, Q, T> =
    dyn Fn(&Teacher, Exchange<'_, Q, T>) -> Result<CollectionEnd, TeacherError> + 'a;

/// Counts of what this process acquired.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Acquired {
    pub(super) entries: usize,
    /// Tokens of the records.
    pub(super) tokens: usize,
}

/// Says how many units are there already, and returns how many have to be asked for.
pub(super) fn say_present<T: StoredRecord>(
    context: &Context,
    stage: &str,
    done: &str,
    store: &Store<T>,
) -> usize {
    let tally = store.tally();
    let to_ask = tally.to_ask(context.retry_failures);
    let Tally {
        records,
        published,
        failures,
        missing,
    } = tally;
    let of_published = match published {
        0 => String::new(),
        n => format!(" ({n} of them published)"),
    };
    if store.cut_bytes() > 0 {
        context.console.note(&format!(
            "{stage}: answers that were being written when the process or the disk failed are asked for again ({} bytes)",
            store.cut_bytes()
        ));
    }
    if to_ask == 0 {
        context
            .console
            .note(&format!("{stage}: all {records} answers are {done}"));
    } else if records > 0 {
        let all = records + failures + missing;
        context.console.note(&format!(
            "{stage}: {records} of {all} answers are {done}{of_published}, {to_ask} to ask for"
        ));
    }
    to_ask
}

impl<Q, T: StoredRecord> Acquisition<'_, Q, T> {
    /// Asks for every unit that the store lacks. `None` if the user asked for a stop; what is in flight is kept.
    ///
    /// # Errors
    /// If a cap of the budget is reached, no endpoint answers, the teacher fails, or the disk refuses; what was
    /// completed stays.
    pub(super) fn run(
        self,
        context: &Context,
        teacher: &mut Teacher,
    ) -> anyhow::Result<Option<Acquired>> {
        let tally = self.store.tally();
        let to_ask = tally.to_ask(context.retry_failures);
        let requests_path = context.dir.path(REQUESTS_FILE);
        let mut spent_before = Spending::default();
        if let Teacher::Http(http) = teacher {
            spent_before = self.open_requests(context, http, to_ask, &requests_path)?;
        }
        let teacher: &Teacher = teacher;
        let provenance = teacher.provenance();
        let mut progress = StageBar::new(context, self.stage, tally, to_ask, spent_before);
        let store = RefCell::new(self.store);
        let mut acquired = Acquired::default();
        let retry = context.retry_failures;
        let disk_bytes = context.run.settings.budget.disk_bytes;
        let mut store_error = None;
        let ended = (self.work)(
            teacher,
            Exchange {
                next: &mut || loop {
                    match self.units.next().transpose().map_err(CallbackError::from)? {
                        Some((ordinal, _)) if !store.borrow().is_missing(ordinal, retry) => {}
                        unit => return Ok(unit.map(|(_, request)| request)),
                    }
                },
                completed: &mut |entries| {
                    acquired.entries += entries.len();
                    let records = entries.iter().filter_map(|(_, entry)| entry.as_ref().ok());
                    acquired.tokens += records.map(StoredRecord::tokens).sum::<usize>();
                    let mut store = store.borrow_mut();
                    if let Err(error) = store.add(&provenance, entries) {
                        store_error = Some(error);
                        return Err("the answers are not kept".into());
                    }
                    let bytes = store.journal_bytes() + file_bytes(&requests_path);
                    Ok(check_disk(bytes, disk_bytes))
                },
                progress: &mut |now| progress.show(teacher, now),
                stop: &interrupt::is_requested,
            },
        );
        drop(progress);
        if let Some(error) = store_error {
            return Err(error.into());
        }
        let tally = store.into_inner().tally();
        Ok(finished(context, tally, ended?)?.then_some(acquired))
    }

    /// Opens the list of requests, says what will be sent, and returns what was spent so far.
    fn open_requests(
        &self,
        context: &Context,
        http: &mut HttpTeacher,
        to_ask: usize,
        path: &Path,
    ) -> anyhow::Result<Spending> {
        if context
            .run
            .settings
            .served()
            .is_some_and(|teacher| teacher.offline)
        {
            let what = format!(
                "{to_ask} answers are missing, and no socket may be opened\nhint: leave `offline` out to ask for them"
            );
            return Err(context.run.problem(&["teacher", "offline"], what).into());
        }
        http.client.endpoints = served::endpoints(&context.run)?;
        let log = http.open_log(path, self.stage)?;
        say_lost(context, self.stage, log);
        let spent = log.spent();
        let forecast = (self.forecast)(http, &spent);
        context.console.note(&format!("{}: {forecast}", self.stage));
        Ok(spent)
    }
}

/// The progress output of an acquisition.
struct StageBar<'a> {
    context: &'a Context,
    bar: StageProgress,
    /// Units with a record before this process.
    there: u64,
    to_ask: usize,
    spent_before: Spending,
    stage: String,
    /// Whether the present wait that the servers ask for was said.
    is_wait_said: bool,
    implausible_usages: u64,
}

impl<'a> StageBar<'a> {
    fn new(
        context: &'a Context,
        stage: &str,
        before: Tally,
        to_ask: usize,
        spent_before: Spending,
    ) -> StageBar<'a> {
        let there = before.records as u64;
        let total = there + to_ask as u64;
        StageBar {
            context,
            bar: context.console.progress(stage, "answers", there, total),
            there,
            to_ask,
            spent_before,
            stage: stage.to_owned(),
            is_wait_said: false,
            implausible_usages: 0,
        }
    }

    fn show(&mut self, teacher: &Teacher, now: &CollectProgress) {
        self.say_wait(now);
        self.implausible_usages = now.implausible_usages;
        let note = match teacher {
            Teacher::Http(http) => forecast::live(
                http.client.price.as_ref(),
                &self.context.run.settings.budget,
                &self.spent_before,
                self.to_ask,
                now,
            ),
            _ => String::new(),
        };
        let completed = (now.answered + now.failed).min(self.to_ask as u64);
        self.bar.update(self.there + completed, now.tokens, &note);
    }
}

impl StageBar<'_> {
    /// Says once for each longer wait that the servers ask for it.
    fn say_wait(&mut self, now: &CollectProgress) {
        let wait = now.server_wait_seconds;
        let is_long = wait.is_some_and(|seconds| seconds >= SAID_WAIT_SECONDS);
        if let Some(seconds) = wait.filter(|_| is_long && !self.is_wait_said) {
            self.context.console.note(&format!(
                "{}: the server asks to wait {:.0} s; {} requests wait for that (`longest_wait` of [teacher] sets the longest wait)",
                self.stage,
                seconds.ceil(),
                now.waiting
            ));
        }
        self.is_wait_said = wait.is_some() && (self.is_wait_said || is_long);
    }
}

impl Drop for StageBar<'_> {
    fn drop(&mut self) {
        if self.implausible_usages > 0 {
            self.context.console.emit(&Event::Warning {
                text: format!(
                    "{}: {} replies state token counts (`usage`) that cannot be right; these requests are charged in full, as reserved",
                    self.stage, self.implausible_usages
                ),
            });
        }
    }
}

/// Says how many requests an earlier process left in flight.
pub(super) fn say_lost(context: &Context, stage: &str, log: &RequestLog) {
    if log.lost() > 0 {
        context.console.note(&format!(
            "{stage}: {} requests were in flight when an earlier process ended; they count as paid in full",
            log.lost()
        ));
    }
}

/// Whether every unit has an entry; false after a stop.
fn finished(context: &Context, tally: Tally, end: CollectionEnd) -> anyhow::Result<bool> {
    let file = context.run.path.display();
    let there = format!(
        "{} answers are there and kept, {} are missing",
        tally.records, tally.missing
    );
    match end {
        CollectionEnd::Finished => Ok(true),
        CollectionEnd::Stopped => Ok(false),
        CollectionEnd::CapReached { cap } => {
            let spent = RequestLog::read_spending(&context.dir.path(REQUESTS_FILE))?;
            bail!(
                "the budget is used up ({cap}): {} requests, {} tokens and {} were spent; {there}\nhint: raise [budget], and `potstill run {file}` goes on",
                spent.requests,
                spent.tokens,
                forecast::dollars(spent.usd),
            )
        }
        CollectionEnd::StoppedByCaller { why } => match why.split_once("\nhint: ") {
            Some((why, hint)) => bail!("{why}; {there}\nhint: {hint}"),
            None => bail!("{why}; {there}"),
        },
        CollectionEnd::EndpointsDown { last } => bail!(
            "no endpoint is available: the last one said {}{} ({}); {there}\nhint: check `url`, `model` and the key in [teacher], and `potstill run {file}` goes on",
            last.status.map_or_else(String::new, |s| format!("{s} ")),
            last.message,
            last.reason.name(),
        ),
    }
}

fn file_bytes(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |m| m.len())
}

/// Ends the work when the files have grown to the cap.
fn check_disk(bytes: u64, cap: Option<u64>) -> ControlFlow<String> {
    match cap.filter(|cap| bytes >= *cap) {
        None => ControlFlow::Continue(()),
        Some(cap) => ControlFlow::Break(format!(
            "the answers and the list of requests take {bytes} bytes, and `disk_bytes` of [budget] is {cap}\nhint: raise it, and the run goes on"
        )),
    }
}
