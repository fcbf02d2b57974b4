//! The stages. Each is a function of a [`Context`]; `run_stage` publishes what one writes.

mod abilities;
mod acquire;
mod answers;
pub mod check;
pub mod check_loss;
pub mod checkpoint;
pub mod clean;
pub mod collect;
pub mod curate;
pub mod eval;
pub mod export;
mod follow;
mod forecast;
mod gpu;
pub mod grade;
pub mod import;
mod memory;
mod models;
mod own_text;
pub mod plan;
mod planned;
pub mod probe;
pub mod report;
mod rows;
mod sampling;
pub mod score;
mod served;
pub(crate) mod sources;
mod start;
pub mod train;
pub(crate) mod trainable;
mod training;
pub mod tune;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use potstill_datasets::{Arm, Variant};
use potstill_model::Device;
use potstill_student::MpiRank;

use crate::events::Event;
use crate::interrupt;
use crate::progress::{Console, OutputOptions};
use crate::ranks;
use crate::run_dir::{
    Access, Counts, EarlierOutput, Entry, LedgerLine, NotYetWritten, RunDir, StagePlan, now, short,
};
use crate::run_file::{ConfigError, Loaded};
pub(crate) use follow::follow;
use sources::{Extent, Needed, Sources};

/// Operational options of a run. Except for `limit`, none changes what the run computes.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// The run directory; `runs/<name>` below the current folder if `None`.
    pub run_dir: Option<PathBuf>,
    /// Name of the device; `cpu` if empty.
    pub device: String,
    /// Largest number of prompts to take.
    pub limit: Option<usize>,
    /// Whether to say what would run instead of running it.
    pub dry_run: bool,
    /// Whether to repeat requests that a server failed to answer.
    pub retry_failures: bool,
    /// Amount and form of the output.
    pub output: OutputOptions,
}

/// An open run, which every stage takes.
pub struct Context {
    /// The run file.
    pub run: Loaded,
    /// The run directory.
    pub dir: RunDir,
    /// Prints the events of the run.
    pub console: Console,
    /// Device that computes.
    pub device: Device,
    /// Largest number of prompts to take.
    pub limit: Option<usize>,
    /// Whether to say what would run instead of running it.
    pub dry_run: bool,
    /// Whether to repeat requests that a server failed to answer.
    pub retry_failures: bool,
    /// This process among those that `mpirun` started to train together; `None` if it is alone.
    pub ranks: Option<MpiRank>,
}

/// Outcome of a stage or a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StageOutcome {
    /// The work is finished.
    Done,
    /// The output was up to date.
    UpToDate,
    /// Nothing was done, because this is a dry run.
    WouldRun,
    /// The work was stopped on request.
    Stopped,
}

impl StageOutcome {
    /// The outcome of two pieces of work: the first of stopped, would run, done, up to date that one of them has.
    pub(crate) fn and(self, other: StageOutcome) -> StageOutcome {
        let order = [
            StageOutcome::Stopped,
            StageOutcome::WouldRun,
            StageOutcome::Done,
        ];
        let first = order.into_iter().find(|o| [self, other].contains(o));
        first.unwrap_or(StageOutcome::UpToDate)
    }
}

impl Context {
    /// Reads the run file and opens its run directory.
    ///
    /// # Errors
    /// [`ConfigError`] for mistakes in the run file or the options; errors of the file system.
    pub fn open(file: &Path, options: &RunOptions) -> anyhow::Result<Context> {
        let run = Loaded::read(file)?;
        let device = device(&options.device, &run)?;
        let access = match options.dry_run {
            true => Access::Look,
            false => Access::Work,
        };
        let dir = RunDir::open(&run_dir_path(&run, options), &run, access)?;
        Ok(Context {
            run,
            dir,
            console: Console::new(options.output),
            device,
            limit: options.limit,
            dry_run: options.dry_run,
            retry_failures: options.retry_failures,
            ranks: None,
        })
    }

    /// Fetches the models and data that are not on this machine, and records their commits. In a dry run absent files
    /// are only named. The outcome is [`StageOutcome::UpToDate`] if all is there afterwards.
    ///
    /// # Errors
    /// Repositories that do not exist, failures of the connection and of the file system.
    pub(crate) fn fetch_sources(&mut self, needed: Needed) -> anyhow::Result<StageOutcome> {
        let extent = match self.dry_run {
            true => Extent::Nothing,
            false => Extent::Whole,
        };
        let dir = self.dir.path("");
        Ok(
            match sources::resolve(&mut self.run, &dir, &self.console, needed, extent)? {
                Sources::Complete => StageOutcome::UpToDate,
                Sources::WithoutWeights | Sources::Incomplete => StageOutcome::WouldRun,
                Sources::Stopped => StageOutcome::Stopped,
            },
        )
    }

    /// Returns the time that went into comparing published files with their manifests since the last call, in seconds,
    /// and prints it as a detail.
    pub(crate) fn verify_seconds(&self, stage: &str) -> f64 {
        let verified = self.dir.take_verification();
        if let Some(text) = verified.text() {
            self.console.detail(&format!("{stage}: {text}"));
        }
        verified.seconds
    }

    /// Arms that the run trains: the student first, then its controls.
    pub fn arms(&self) -> Vec<Arm> {
        let controls = &self.run.settings.train.controls;
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

    /// The models of one arm, one for each seed.
    pub(crate) fn variants_of(&self, arm: Arm) -> impl Iterator<Item = Variant> + use<> {
        (0..self.run.settings.train.seeds).map(move |seed_index| Variant { arm, seed_index })
    }
}

/// Path of the run directory.
pub(crate) fn run_dir_path(run: &Loaded, options: &RunOptions) -> PathBuf {
    let default = || Path::new("runs").join(run.settings.run.name.as_str());
    options.run_dir.clone().unwrap_or_else(default)
}

/// Returns the device with a name, which can do what the run file asks for, with the processes that there are.
pub(crate) fn device(name: &str, run: &Loaded) -> anyhow::Result<Device> {
    let name = if name.is_empty() { "cpu" } else { name };
    let device = potstill_model::device(name)
        .map_err(|error| ConfigError::plain(format!("`--device`: {error}")))?;
    abilities::require(run, &device)?;
    ranks::check_replicas(run)?;
    Ok(device)
}

/// Runs every stage in order.
///
/// # Errors
/// Those of the first stage that fails.
pub fn run(context: &Context) -> anyhow::Result<StageOutcome> {
    type Stage = fn(&Context) -> anyhow::Result<StageOutcome>;
    let mut stages: Vec<(&str, Stage)> = vec![
        ("import", import::import),
        ("collect", collect::collect),
        ("score", score::score),
        ("grade", grade::grade),
        ("curate", curate::curate),
        ("tune", tune::tune),
        ("train", train::train),
        ("export", export::export),
        ("eval", eval::eval),
        ("report", report::report),
    ];
    let file = &context.run.settings;
    stages.retain(|(name, _)| match *name {
        "score" => file.score.is_some(),
        "grade" => file.grade.is_some(),
        "tune" => !file.train.learning_rates.is_empty(),
        _ => true,
    });
    let mut all = StageOutcome::UpToDate;
    for (_, stage) in &stages {
        all = all.and(stage(context)?);
        if all == StageOutcome::Stopped {
            return Ok(all);
        }
    }
    match all {
        StageOutcome::UpToDate => {
            let text = "nothing to do: every stage is up to date";
            context.console.note(text);
        }
        StageOutcome::WouldRun => context.console.note(
            "a stage that would run because another one runs is up to date if that one writes what it wrote before",
        ),
        StageOutcome::Done | StageOutcome::Stopped => {}
    }
    Ok(all)
}

/// Result of a stage's work: its counts, and what happens to earlier output.
pub(crate) struct StageSummary {
    /// Counts of the whole output.
    pub(crate) counts: Counts,
    /// Counts of this process, for the ledger. They equal `counts` for most stages.
    pub(crate) worked: Counts,
    pub(crate) earlier: EarlierOutput,
    /// Figures of the whole output, for its manifest.
    pub(crate) measures: BTreeMap<String, f64>,
}

impl StageSummary {
    pub(crate) fn new(counts: Counts) -> StageSummary {
        StageSummary {
            worked: counts.clone(),
            counts,
            earlier: EarlierOutput::Keep,
            measures: BTreeMap::new(),
        }
    }
}

/// Runs a stage unless its output is up to date: `work` writes a draft, which is then published. If `work`
/// returns `None`, it was stopped.
pub(crate) fn run_stage(
    context: &Context,
    plan: &StagePlan,
    work: impl FnOnce(&Path) -> anyhow::Result<Option<StageSummary>>,
) -> anyhow::Result<StageOutcome> {
    run_stage_again(context, plan, false, work)
}

/// As [`run_stage`]; with `again`, output that is up to date does not prevent the work.
pub(crate) fn run_stage_again(
    context: &Context,
    plan: &StagePlan,
    again: bool,
    work: impl FnOnce(&Path) -> anyhow::Result<Option<StageSummary>>,
) -> anyhow::Result<StageOutcome> {
    let Context { dir, console, .. } = context;
    let name = &plan.stage;
    if let Some(outcome) = settled(context, plan, again)? {
        return Ok(outcome);
    }
    if context.dry_run {
        return would_run(context, plan, EarlierOutput::Keep, None, None);
    }
    dir.check_writable()?;
    console.emit(&Event::started(name));
    let (started, began) = (now(), Instant::now());
    let draft = dir.draft(plan)?;
    let done = work(&draft)?;
    let mut line = LedgerLine {
        stage: name.clone(),
        started_unix_seconds: started,
        seconds: 0.0,
        verify_seconds: context.verify_seconds(name),
        finished: done.is_some(),
        counts: Counts::new(),
    };
    if let Some(done) = done {
        let counts = done.counts.clone();
        line.counts = done.worked;
        let kept = dir
            .publish(plan, done.earlier, done.counts, done.measures)
            .with_context(|| format!("cannot publish `{name}`"))?;
        line.seconds = began.elapsed().as_secs_f64();
        console.emit(&Event::finished(name, counts, line.seconds));
        say_kept(context, name, &kept);
    } else {
        line.seconds = began.elapsed().as_secs_f64();
        console.emit(&Event::stopped(name));
    }
    dir.log(&line)?;
    Ok(match line.finished {
        true => StageOutcome::Done,
        false => StageOutcome::Stopped,
    })
}

/// Returns the outcome of a stage if there is nothing to do: its output is up to date, or is taken back from `earlier/`.
/// `None` if it has to run, or to run `again`.
pub(crate) fn settled(
    context: &Context,
    plan: &StagePlan,
    again: bool,
) -> anyhow::Result<Option<StageOutcome>> {
    let Context { dir, console, .. } = context;
    let (name, key) = (&plan.stage, plan.key());
    console.detail(&format!("{name}: key {}", short(&key)));
    if again {
        return Ok(None);
    }
    if let Some(manifest) = dir.published(&plan.home)?.filter(|m| m.key == key) {
        console.emit(&Event::up_to_date(name, manifest.counts));
        return Ok(Some(StageOutcome::UpToDate));
    }
    let entry = dir.find_earlier(plan)?;
    entry
        .map(|entry| restore(context, plan, &entry))
        .transpose()
}

/// Takes the output of a stage back from `earlier/`. In a dry run this is only said.
pub(crate) fn restore(
    context: &Context,
    plan: &StagePlan,
    entry: &Entry,
) -> anyhow::Result<StageOutcome> {
    let Context { dir, console, .. } = context;
    let kept = dir.restore(plan, entry)?;
    let (stage, path) = (plan.stage.clone(), dir.path(&entry.name));
    let path = path.display().to_string();
    console.emit(&match context.dry_run {
        true => Event::WouldRestore { stage, path },
        false => Event::Restored { stage, path },
    });
    say_kept(context, &plan.stage, &kept);
    Ok(match context.dry_run {
        true => StageOutcome::WouldRun,
        false => StageOutcome::Done,
    })
}

/// Says in a dry run that a stage would run, and what would become of its present output. `because` is a stage that would
/// run before and write what it reads; `from_step` is the step at which a training would go on.
pub(crate) fn would_run(
    context: &Context,
    plan: &StagePlan,
    earlier: EarlierOutput,
    because: Option<String>,
    from_step: Option<u64>,
) -> anyhow::Result<StageOutcome> {
    context.console.emit(&Event::WouldRun {
        stage: plan.stage.clone(),
        because,
        from_step,
    });
    let kept = context.dir.assume_run(plan, earlier)?;
    say_kept(context, &plan.stage, &kept);
    Ok(StageOutcome::WouldRun)
}

/// Says which folders of `earlier/` get the present output of a stage.
pub(crate) fn say_kept(context: &Context, stage: &str, kept: &[String]) {
    for folder in kept {
        let path = context.dir.path(folder).display().to_string();
        let stage = stage.to_owned();
        context.console.emit(&match context.dry_run {
            true => Event::WouldKeep { stage, path },
            false => Event::Kept { stage, path },
        });
    }
}

/// Makes the plan of a stage. In a dry run, `None` if a stage that would run before writes one of its inputs: that the
/// stage would run then is said.
pub(crate) fn known<T>(
    context: &Context,
    stage: &str,
    home: &str,
    plan: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<Option<T>> {
    let error = match plan() {
        Ok(plan) => return Ok(Some(plan)),
        Err(error) => error,
    };
    let before = match error.downcast_ref() {
        Some(NotYetWritten { stage }) => stage.clone(),
        None => return Err(error),
    };
    let unknown = StagePlan {
        stage: stage.to_owned(),
        home: home.to_owned(),
        outputs: Vec::new(),
        settings: serde_json::Value::Null,
        inputs: BTreeMap::new(),
    };
    let earlier = EarlierOutput::Keep;
    would_run(context, &unknown, earlier, Some(before), None)?;
    Ok(None)
}

/// Runs a stage for each model, and stops when one of them stops.
pub(crate) fn for_each_model<S>(
    students: impl IntoIterator<Item = S>,
    mut one: impl FnMut(S) -> anyhow::Result<StageOutcome>,
) -> anyhow::Result<StageOutcome> {
    let mut all = StageOutcome::UpToDate;
    for student in students {
        if interrupt::is_requested() {
            return Ok(StageOutcome::Stopped);
        }
        all = all.and(one(student)?);
        if all == StageOutcome::Stopped {
            break;
        }
    }
    Ok(all)
}

/// Counts from pairs.
pub(crate) fn counts<const N: usize>(pairs: [(&str, usize); N]) -> Counts {
    pairs
        .into_iter()
        .map(|(name, n)| (name.to_owned(), n as u64))
        .collect()
}
