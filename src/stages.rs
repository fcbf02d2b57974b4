//! The stages, each a function of a [`Context`], and what they share.

mod answers;
pub mod check;
pub mod check_loss;
pub mod checkpoint;
pub mod collect;
mod collect_given;
mod collect_sources;
pub mod curate;
pub mod eval;
pub mod export;
pub mod grade;
pub mod import;
mod models;
pub mod report;
mod rows;
pub mod score;
pub(crate) mod served;
pub mod train;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use potstill_datasets::{Arm, Variant};
use potstill_model::Device;

use crate::events::Event;
use crate::interrupt;
use crate::progress::{Manner, Talk};
use crate::run_dir::{Counts, Earlier, LedgerLine, Plan, RunDir, now, short};
use crate::run_file::{ConfigError, Loaded};

/// How a run is operated; nothing here changes what it computes, except `limit`.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Where the run lives; by default `runs/<name>` below the current folder.
    pub run_dir: Option<PathBuf>,
    /// What computes; empty for `cpu`.
    pub device: String,
    /// Take the first so many prompts only.
    pub limit: Option<usize>,
    /// Say what would run, and do nothing.
    pub dry_run: bool,
    /// Ask again for what a teacher behind a server failed to give.
    pub retry_failures: bool,
    /// How much to say, and in which form.
    pub manner: Manner,
}

/// An open run: what every stage takes.
pub struct Context {
    /// The run file.
    pub run: Loaded,
    /// The run directory.
    pub dir: RunDir,
    /// Where talk goes.
    pub talk: Talk,
    /// What computes.
    pub device: Device,
    /// Take the first so many prompts only.
    pub limit: Option<usize>,
    /// Say what would run, and do nothing.
    pub dry_run: bool,
    /// Ask again for what a teacher behind a server failed to give.
    pub retry_failures: bool,
}

/// How a stage ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It did its work.
    Done,
    /// There was nothing to do.
    UpToDate,
    /// It would have worked, and this was a dry run.
    WouldRun,
    /// It was asked to stop, and did.
    Stopped,
}

impl Context {
    /// Reads the run file and opens its run directory.
    ///
    /// # Errors
    /// [`ConfigError`] for what the run file or the options get wrong; what the file
    /// system refuses.
    pub fn open(file: &Path, options: &Options) -> anyhow::Result<Context> {
        let run = Loaded::read(file)?;
        let device = device(&options.device)?;
        let dir = RunDir::open(&run_dir_path(&run, options), &run)?;
        Ok(Context {
            run,
            dir,
            talk: Talk::new(options.manner),
            device,
            limit: options.limit,
            dry_run: options.dry_run,
            retry_failures: options.retry_failures,
        })
    }

    /// Arms that the run trains: the student first, then its controls.
    pub fn arms(&self) -> Vec<Arm> {
        let controls = &self.run.file.train.controls;
        let controls = controls.iter().map(|control| control.arm());
        [Arm::Student].into_iter().chain(controls).collect()
    }

    /// All models that the run trains, by seed: every arm with the first seed comes before any arm with
    /// the second, so that a run that is cut short has every control.
    pub(crate) fn variants(&self) -> Vec<Variant> {
        let mut variants: Vec<Variant> = (self.arms().into_iter())
            .flat_map(|arm| self.variants_of(arm))
            .collect();
        variants.sort_by_key(|variant| variant.seed_index);
        variants
    }

    /// The models of one arm, one a seed. The shuffled control has the first seed only.
    pub(crate) fn variants_of(&self, arm: Arm) -> impl Iterator<Item = Variant> + use<> {
        let seeds = match arm {
            Arm::Student | Arm::Sft => self.run.file.train.seeds,
            Arm::Shuffled => 1,
        };
        (0..seeds).map(move |seed_index| Variant { arm, seed_index })
    }
}

/// Where the run lives.
pub(crate) fn run_dir_path(run: &Loaded, options: &Options) -> PathBuf {
    let default = || Path::new("runs").join(run.file.run.name.as_str());
    options.run_dir.clone().unwrap_or_else(default)
}

pub(crate) fn device(name: &str) -> anyhow::Result<Device> {
    let name = if name.is_empty() { "cpu" } else { name };
    potstill_model::device(name).map_err(|e| ConfigError::plain(format!("`--device`: {e}")).into())
}

/// Runs every stage in order, and says so when there was nothing to do.
///
/// # Errors
/// Those of the first stage that fails.
pub fn run(context: &Context) -> anyhow::Result<Outcome> {
    type Stage = fn(&Context) -> anyhow::Result<Outcome>;
    let mut stages: Vec<(&str, Stage)> = vec![
        ("import", import::import),
        ("collect", collect::collect),
        ("score", score::score),
        ("grade", grade::grade),
        ("curate", curate::curate),
        ("train", train::train),
        ("export", export::export),
        ("eval", eval::eval),
        ("report", report::report),
    ];
    let file = &context.run.file;
    stages.retain(|(name, _)| match *name {
        "score" => file.score.is_some(),
        "grade" => file.grade.is_some(),
        _ => true,
    });
    let mut all = Outcome::UpToDate;
    for (name, stage) in &stages {
        match (all, stage(context)?) {
            (_, Outcome::Stopped) => return Ok(Outcome::Stopped),
            (_, Outcome::WouldRun) => {
                let rest = stages
                    .iter()
                    .map(|(n, _)| *n)
                    .skip_while(|n| n != name)
                    .skip(1);
                let rest: Vec<&str> = rest.collect();
                if !rest.is_empty() {
                    context.talk.line(&format!("then: {}", rest.join(", ")));
                }
                return Ok(Outcome::WouldRun);
            }
            (_, Outcome::Done) => all = Outcome::Done,
            (_, Outcome::UpToDate) => {}
        }
    }
    if all == Outcome::UpToDate {
        context
            .talk
            .line("nothing to do: every stage is up to date");
    }
    Ok(all)
}

/// What a stage's work gives: what to say, and what becomes of earlier output.
pub(crate) struct Done {
    pub(crate) counts: Counts,
    /// Counts of this process, for the ledger; the same as `counts` for most stages.
    pub(crate) worked: Counts,
    pub(crate) earlier: Earlier,
}

impl Done {
    pub(crate) fn new(counts: Counts) -> Done {
        Done {
            worked: counts.clone(),
            counts,
            earlier: Earlier::Keep,
        }
    }
}

/// Runs the work of a stage, unless its output is up to date, and publishes the draft it
/// writes. Work that gives nothing was stopped.
pub(crate) fn stage(
    context: &Context,
    plan: &Plan,
    work: impl FnOnce(&Path) -> anyhow::Result<Option<Done>>,
) -> anyhow::Result<Outcome> {
    stage_again(context, plan, false, work)
}

/// As [`stage`], and with `again` also where the output is up to date.
pub(crate) fn stage_again(
    context: &Context,
    plan: &Plan,
    again: bool,
    work: impl FnOnce(&Path) -> anyhow::Result<Option<Done>>,
) -> anyhow::Result<Outcome> {
    let Context { dir, talk, .. } = context;
    let name = &plan.stage;
    let key = plan.key();
    talk.detail(&format!("{name}: key {}", short(&key)));
    if let Some(manifest) = dir.published(&plan.home)?
        && manifest.key == key
        && !again
    {
        talk.say(&Event::up_to_date(name, manifest.counts));
        return Ok(Outcome::UpToDate);
    }
    if context.dry_run {
        talk.say(&Event::would_run(name));
        return Ok(Outcome::WouldRun);
    }
    talk.say(&Event::started(name));
    let (started, began) = (now(), Instant::now());
    let draft = dir.draft(plan)?;
    let done = work(&draft)?;
    let mut line = LedgerLine {
        stage: name.clone(),
        started_unix_seconds: started,
        seconds: 0.0,
        finished: done.is_some(),
        counts: Counts::new(),
    };
    if let Some(done) = done {
        let counts = done.counts.clone();
        line.counts = done.worked;
        let kept = dir
            .publish(plan, done.earlier, done.counts)
            .with_context(|| format!("cannot publish `{name}`"))?;
        line.seconds = began.elapsed().as_secs_f64();
        talk.say(&Event::finished(name, counts, line.seconds));
        for old in kept {
            talk.say(&Event::kept(name, &dir.path(&old)));
        }
    } else {
        line.seconds = began.elapsed().as_secs_f64();
        talk.say(&Event::stopped(name));
    }
    dir.log(&line)?;
    Ok(match line.finished {
        true => Outcome::Done,
        false => Outcome::Stopped,
    })
}

/// Runs a stage for each student, and stops when one does.
pub(crate) fn each<S>(
    students: impl IntoIterator<Item = S>,
    mut one: impl FnMut(S) -> anyhow::Result<Outcome>,
) -> anyhow::Result<Outcome> {
    let mut all = Outcome::UpToDate;
    for student in students {
        if interrupt::asked() {
            return Ok(Outcome::Stopped);
        }
        match one(student)? {
            Outcome::UpToDate => {}
            Outcome::Done => all = Outcome::Done,
            ended @ (Outcome::WouldRun | Outcome::Stopped) => return Ok(ended),
        }
    }
    Ok(all)
}

/// Counts as a person reads them, without those of nothing.
pub(crate) fn said(counts: &Counts) -> String {
    let some = counts.iter().filter(|(_, n)| **n > 0);
    let all: Vec<String> = some.map(|(name, n)| format!("{n} {name}")).collect();
    all.join(", ")
}

/// Counts from pairs.
pub(crate) fn counts<const N: usize>(pairs: [(&str, usize); N]) -> Counts {
    pairs
        .into_iter()
        .map(|(name, n)| (name.to_owned(), n as u64))
        .collect()
}
