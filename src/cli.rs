//! The command line: subcommands and operational flags. Hyperparameters are set in the run
//! file only.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use potstill_student::{Collective as _, MpiProcesses, MpiRank};

use crate::events::Event;
use crate::init::{self, InitOptions};
use crate::progress::{Console, OutputOptions};
use crate::run_file::ConfigError;
use crate::stages::plan::PlanOptions;
use crate::stages::sources::Needed;
use crate::stages::{self, Context, RunOptions, StageOutcome};
use crate::{errors, exhausted, panics, ranks, render, schema};

/// Printed below the list of subcommands.
const EXAMPLES: &str = "\
A first session:
  potstill init --data prompts.jsonl --teacher models/teacher
  potstill check run.toml
  potstill run run.toml

Exit codes: 0 done, 1 failed or incomplete, 2 wrong usage or configuration.";

/// The output of a process that only helps another one to train.
const ERRORS_ALONE: OutputOptions = OutputOptions {
    verbose: false,
    quiet: true,
    json: false,
};

/// Distills a large language model into a small one, and tests whether that helped.
///
/// A run file (TOML) describes the job; `init` writes one. `run` executes all stages and
/// resumes where an earlier run was interrupted; each stage is a subcommand as well.
#[derive(Debug, Parser)]
#[command(name = "potstill", version, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write a commented run file, from flags or after a few questions
    Init(InitFlags),
    #[command(flatten)]
    Stage(Stage),
    /// List earlier outputs and unfinished work of other settings, or delete them
    Clean(CleanFlags),
    /// Show a few training rows token by token, and check their loss mask
    Render(RenderFlags),
    /// Compare the run file's loss with its definition and with finite differences
    CheckLoss(CheckLossFlags),
    /// Print the JSON Schema of the run file
    Schema,
    /// Print a completion script for a shell
    Completions {
        /// Shell to complete for
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
enum Stage {
    /// Run all stages in order, except those that are up to date
    Run(TeacherFlags),
    /// Check the run file, data, models and prompt lengths, and print the plan of a run
    Check(Flags),
    /// Calibrate for up to a minute, and print the memory, time and cost of a run on this device
    Plan(PlanFlags),
    /// Find out with a few short requests what a teacher's server can do
    Probe(Flags),
    /// Read prompts from the data into `prompts/`
    Import(Flags),
    /// Have the teacher answer the prompts: `completions/` and `signals/`
    Collect(TeacherFlags),
    /// Have the teacher score existing answers: `signals/`
    Score(TeacherFlags),
    /// Compare answers with references: `verdicts/`
    Grade(Flags),
    /// Split the answers into `train/`, `dev/`, `test/` and `dropped/`
    Curate(Flags),
    /// Choose the learning rate of each arm on dev: `tuning/` and `tuning.json`
    Tune(Flags),
    /// Train the student and its controls: `students/`
    Train(Flags),
    /// Write the trained students in Hugging Face layout
    Export(Flags),
    /// Measure the students on test
    Eval(Flags),
    /// Write `report.html`, `report.md` and `report.json`
    Report(ReportFlags),
}

#[derive(Debug, Args)]
struct Flags {
    /// The run file
    file: PathBuf,
    /// Run directory [default: runs/<name>]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Device to compute on: cpu; or wgpu, vulkan or cuda in a build with that feature
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Use only the first N prompts
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Print what would run, without running it
    #[arg(long)]
    dry_run: bool,
    /// Print more details
    #[arg(short, long)]
    verbose: bool,
    /// Print errors only, and what the command was asked for, such as the plan of `check`
    #[arg(short, long, conflicts_with = "verbose")]
    quiet: bool,
    /// Write events to stdout, one JSON object per line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct TeacherFlags {
    #[command(flatten)]
    flags: Flags,
    /// Repeat requests to a server that failed in an earlier run
    #[arg(long)]
    retry_failures: bool,
}

#[derive(Debug, Args)]
struct ReportFlags {
    #[command(flatten)]
    flags: Flags,
    /// Open `report.html` in the browser
    #[arg(long, conflicts_with = "dry_run")]
    open: bool,
}

#[derive(Debug, Args)]
struct PlanFlags {
    #[command(flatten)]
    flags: Flags,
    /// Memory that there is, GB [default: what this machine has to give]
    #[arg(long, value_name = "GB", value_parser = above_zero)]
    memory_gb: Option<f64>,
    /// USD for an hour of a device [default: `usd_per_hour` of [run]]
    #[arg(long, value_name = "USD", value_parser = above_zero)]
    usd_per_hour: Option<f64>,
    /// Tokens of an answer that is not there yet [default: as a local teacher answers, or half of `max_new_tokens`]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    answer_tokens: Option<u32>,
}

/// Parses a number above 0.
fn above_zero(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "set a number above 0")?;
    match value > 0.0 && value.is_finite() {
        true => Ok(value),
        false => Err("set a number above 0".to_owned()),
    }
}

#[derive(Debug, Args)]
struct RenderFlags {
    /// The run file
    file: PathBuf,
    /// Number of rows to show
    #[arg(long, value_name = "N", default_value = "3", value_parser = clap::value_parser!(u32).range(1..))]
    rows: u32,
    /// Run directory [default: runs/<name>]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct CleanFlags {
    /// The run file
    file: PathBuf,
    /// Run directory [default: runs/<name>]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Delete what is listed
    #[arg(long)]
    yes: bool,
    /// Write events to stdout, one JSON object per line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct CheckLossFlags {
    /// The run file
    file: PathBuf,
    /// Run directory [default: runs/<name>]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Device of the loss under test: cpu; or wgpu, vulkan or cuda in a build with that feature
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
}

#[derive(Debug, Args)]
struct InitFlags {
    /// The run file to write
    #[arg(default_value = "run.toml")]
    file: PathBuf,
    /// File of prompts, with or without answers; hf://datasets/org/name/file for one of the Hugging Face Hub
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// The teacher: a folder, a GGUF file, or org/name of the Hugging Face Hub
    #[arg(long, value_name = "PATH")]
    teacher: Option<String>,
    /// Name of the run [default: the name of the data file]
    #[arg(long)]
    name: Option<String>,
    /// Overwrite an existing file
    #[arg(long)]
    force: bool,
}

impl Stage {
    fn flags(&self) -> &Flags {
        match self {
            Stage::Run(TeacherFlags { flags, .. })
            | Stage::Collect(TeacherFlags { flags, .. })
            | Stage::Score(TeacherFlags { flags, .. })
            | Stage::Check(flags)
            | Stage::Probe(flags)
            | Stage::Import(flags)
            | Stage::Grade(flags)
            | Stage::Curate(flags)
            | Stage::Tune(flags)
            | Stage::Train(flags)
            | Stage::Export(flags)
            | Stage::Eval(flags)
            | Stage::Plan(PlanFlags { flags, .. })
            | Stage::Report(ReportFlags { flags, .. }) => flags,
        }
    }
}

impl PlanFlags {
    fn options(&self) -> PlanOptions {
        PlanOptions {
            memory_gb: self.memory_gb,
            usd_per_hour: self.usd_per_hour,
            answer_tokens: self.answer_tokens.map(|n| n as usize),
        }
    }
}

impl CleanFlags {
    fn options(&self) -> RunOptions {
        RunOptions {
            run_dir: self.run_dir.clone(),
            output: OutputOptions {
                json: self.json,
                ..OutputOptions::default()
            },
            ..RunOptions::default()
        }
    }
}

impl Flags {
    fn options(&self) -> RunOptions {
        RunOptions {
            run_dir: self.run_dir.clone(),
            device: self.device.clone(),
            limit: self.limit.map(|n| n as usize),
            dry_run: self.dry_run,
            retry_failures: false,
            output: OutputOptions {
                verbose: self.verbose,
                quiet: self.quiet,
                json: self.json,
            },
        }
    }
}

/// Runs a command and returns the exit code: 0 done, 1 failed or incomplete, 2 wrong usage or
/// configuration.
pub fn main(cli: &Cli) -> u8 {
    let (output, resume) = match &cli.command {
        Command::Stage(stage) => (
            stage.flags().options().output,
            Some(resume_command(stage.flags())),
        ),
        Command::Clean(flags) => (flags.options().output, None),
        _ => (OutputOptions::default(), None),
    };
    let joined = match &cli.command {
        Command::Stage(_) => ranks::join(),
        _ => Ok(None),
    };
    let (processes, refused) = match joined {
        Ok(processes) => (processes, None),
        Err(error) => (None, Some(error)),
    };
    let rank = processes.as_ref().map(MpiProcesses::rank);
    let is_follower = rank.is_some_and(|rank| rank.rank() > 0);
    let console = Console::new(match is_follower {
        true => ERRORS_ALONE,
        false => output,
    });
    let done = match refused {
        Some(error) => Err(error.into()),
        None => panics::guard(|| run(&cli.command, &console, rank)),
    };
    if is_follower && done.is_err() {
        ranks::wait_for_same_error();
    }
    let is_failed = done.is_err();
    let (outcome, exit_code) = match done {
        Ok(StageOutcome::Done) => ("done", 0),
        Ok(StageOutcome::UpToDate) => ("up_to_date", 0),
        Ok(StageOutcome::WouldRun) => ("would_run", 0),
        Ok(StageOutcome::Stopped) => ("stopped", 1),
        Err(error) => {
            let mut text = errors::message(&error);
            if let (Some(remedy), Some(resume)) = (exhausted::remedy(&error), &resume) {
                text = errors::with_hint(&text, &format!("{remedy}; `{resume}` then resumes"));
            }
            console.emit(&Event::Error { text });
            ("failed", if error.is::<ConfigError>() { 2 } else { 1 })
        }
    };
    console.emit(&Event::Ended {
        outcome: outcome.to_owned(),
        exit_code,
        again: resume.filter(|_| outcome == "stopped"),
    });
    if let Some(processes) = processes {
        ranks::leave(processes, is_failed.then_some(exit_code));
    }
    exit_code
}

fn run(
    command: &Command,
    console: &Console,
    rank: Option<MpiRank>,
) -> anyhow::Result<StageOutcome> {
    match command {
        Command::Stage(stage) => {
            return match rank.filter(|rank| rank.rank() > 0) {
                Some(rank) => follow(stage.flags(), console, rank),
                None => run_stage_command(stage, console, rank),
            };
        }
        Command::Clean(flags) => {
            return stages::clean::clean(&flags.file, &flags.options(), flags.yes, console);
        }
        Command::Init(flags) => {
            let given = InitOptions {
                data: flags.data.clone(),
                teacher: flags.teacher.clone(),
                name: flags.name.clone(),
            };
            init::init(&flags.file, given, flags.force, console)?;
        }
        Command::Render(flags) => {
            render::render(
                &flags.file,
                flags.run_dir.clone(),
                flags.rows as usize,
                console,
            )?;
        }
        Command::CheckLoss(flags) => {
            let options = RunOptions {
                run_dir: flags.run_dir.clone(),
                device: flags.device.clone(),
                ..RunOptions::default()
            };
            stages::check_loss::check_loss(&flags.file, &options, console)?;
        }
        Command::Schema => console.output(schema::run_file_text().trim_end()),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "potstill", &mut script);
            console.output(String::from_utf8_lossy(&script).trim_end());
        }
    }
    Ok(StageOutcome::Done)
}

/// Helps process 0 to train until it ends.
fn follow(flags: &Flags, console: &Console, rank: MpiRank) -> anyhow::Result<StageOutcome> {
    stages::follow(rank, &flags.file, &flags.options(), console)
        .with_context(|| format!("process {} of {}", rank.rank(), rank.size()))?;
    Ok(StageOutcome::Done)
}

fn run_stage_command(
    stage: &Stage,
    console: &Console,
    rank: Option<MpiRank>,
) -> anyhow::Result<StageOutcome> {
    let flags = stage.flags();
    let mut options = flags.options();
    if let Stage::Run(flags) | Stage::Collect(flags) | Stage::Score(flags) = stage {
        options.retry_failures = flags.retry_failures;
    }
    if let Stage::Check(_) = stage {
        return stages::check::check(&flags.file, &options, console);
    }
    // A plan only looks at the run directory.
    options.dry_run |= matches!(stage, Stage::Plan(_));
    let mut context = Context::open(&flags.file, &options)?;
    context.ranks = rank;
    crate::interrupt::watch(console, &resume_command(flags))?;
    if let Stage::Plan(flags) = stage {
        return stages::plan::plan(&mut context, &flags.options());
    }
    match context.fetch_sources(needed_sources(stage))? {
        StageOutcome::UpToDate => {}
        outcome => return Ok(outcome),
    }
    match stage {
        Stage::Run(_) | Stage::Check(_) | Stage::Plan(_) => stages::run(&context),
        Stage::Probe(_) => stages::probe::probe(&context),
        Stage::Import(_) => stages::import::import(&context),
        Stage::Collect(_) => stages::collect::collect(&context),
        Stage::Score(_) => stages::score::score(&context),
        Stage::Grade(_) => stages::grade::grade(&context),
        Stage::Curate(_) => stages::curate::curate(&context),
        Stage::Tune(_) => stages::tune::tune(&context),
        Stage::Train(_) => stages::train::train(&context),
        Stage::Export(_) => stages::export::export(&context),
        Stage::Eval(_) => stages::eval::eval(&context),
        Stage::Report(ReportFlags { open, .. }) => {
            let outcome = stages::report::report(&context)?;
            if *open {
                stages::report::open(&context)?;
            }
            Ok(outcome)
        }
    }
}

/// The sources that a command reads.
fn needed_sources(stage: &Stage) -> Needed {
    match stage {
        Stage::Grade(_) | Stage::Curate(_) => Needed::Nothing,
        Stage::Import(_) => Needed::Data,
        _ => Needed::Everything,
    }
}

/// Builds the command that resumes a run, with the flags that select its directory, device and
/// prompts.
fn resume_command(flags: &Flags) -> String {
    let mut command = format!("potstill run {}", flags.file.display());
    if let Some(dir) = &flags.run_dir {
        command += &format!(" --run-dir {}", dir.display());
    }
    if flags.device != "cpu" {
        command += &format!(" --device {}", flags.device);
    }
    if let Some(limit) = flags.limit {
        command += &format!(" --limit {limit}");
    }
    command
}
