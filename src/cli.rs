//! The command line: which stages to run, and operational flags. Hyperparameters are in
//! the run file only.

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::events::Event;
use crate::init::{self, Wanted};
use crate::progress::{Console, OutputOptions};
use crate::run_file::ConfigError;
use crate::stages::{self, Context, RunOptions, StageOutcome};
use crate::{render, schema};

/// Distill a large language model into a small one, and know whether it helped
#[derive(Debug, Parser)]
#[command(name = "potstill", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write a run file, after a few questions or from flags
    Init(InitFlags),
    #[command(flatten)]
    Stage(Stage),
    /// Show which tokens of a few rows carry loss
    Render(RenderFlags),
    /// Hold the run file's loss to its definition
    CheckLoss(CheckLossFlags),
    /// Print the JSON Schema of the run file
    Schema,
    /// Print a completion script for a shell
    Completions {
        /// For which shell
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
enum Stage {
    /// Run every stage that is not up to date, in order
    Run(AskFlags),
    /// Check everything that is cheap to check, and say what a run would do
    Check(Flags),
    /// Ask a teacher behind a server what it can do
    Probe(Flags),
    /// Read prompts into `prompts/`
    Import(Flags),
    /// Ask the teacher: `completions/` and `signals/`
    Collect(AskFlags),
    /// Ask the teacher for distributions over answers that have none: `signals/`
    Score(AskFlags),
    /// Say which answers are right: `verdicts/`
    Grade(Flags),
    /// Split into `train/`, `heldout/` and `dropped/`
    Curate(Flags),
    /// Train the student and its controls: `students/`
    Train(Flags),
    /// Write the students in Hugging Face layout
    Export(Flags),
    /// Measure the students on `heldout/`
    Eval(Flags),
    /// Write `report.html`, `report.md` and `report.json`
    Report(ReportFlags),
}

#[derive(Debug, Args)]
struct Flags {
    /// The run file
    file: PathBuf,
    /// Where the run lives [default: runs/<name>]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// What computes: cpu, and wgpu, vulkan or cuda in a build with that feature
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Take the first N prompts only
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Say what would run, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Say more
    #[arg(short, long)]
    verbose: bool,
    /// Say errors only
    #[arg(short, long, conflicts_with = "verbose")]
    quiet: bool,
    /// Put events on stdout, one JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct AskFlags {
    #[command(flatten)]
    flags: Flags,
    /// Ask again for what a teacher behind a server failed to give
    #[arg(long)]
    retry_failures: bool,
}

#[derive(Debug, Args)]
struct ReportFlags {
    #[command(flatten)]
    flags: Flags,
    /// Show `report.html` in the browser
    #[arg(long, conflicts_with = "dry_run")]
    open: bool,
}

#[derive(Debug, Args)]
struct RenderFlags {
    /// The run file
    file: PathBuf,
    /// How many rows to show
    #[arg(long, value_name = "N", default_value = "3", value_parser = clap::value_parser!(u32).range(1..))]
    rows: u32,
    /// Where the run lives [default: runs/<name>]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct CheckLossFlags {
    /// The run file
    file: PathBuf,
    /// Where the run lives [default: runs/<name>]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// What computes what is checked: cpu, and wgpu, vulkan or cuda in a build with that feature
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
}

#[derive(Debug, Args)]
struct InitFlags {
    /// The run file to write
    #[arg(default_value = "run.toml")]
    file: PathBuf,
    /// The data: prompts, with or without answers
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// The teacher: a folder in Hugging Face layout
    #[arg(long, value_name = "PATH")]
    teacher: Option<String>,
    /// The run's name [default: that of the data]
    #[arg(long)]
    name: Option<String>,
    /// Write over a file that is there
    #[arg(long)]
    force: bool,
}

impl Stage {
    fn flags(&self) -> &Flags {
        match self {
            Stage::Run(AskFlags { flags, .. })
            | Stage::Collect(AskFlags { flags, .. })
            | Stage::Score(AskFlags { flags, .. })
            | Stage::Check(flags)
            | Stage::Probe(flags)
            | Stage::Import(flags)
            | Stage::Grade(flags)
            | Stage::Curate(flags)
            | Stage::Train(flags)
            | Stage::Export(flags)
            | Stage::Eval(flags)
            | Stage::Report(ReportFlags { flags, .. }) => flags,
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

/// Runs a command and gives the exit code: 0 done, 1 failed or incomplete, 2 usage or
/// configuration.
pub fn main(cli: &Cli) -> u8 {
    let (output, again) = match &cli.command {
        Command::Stage(stage) => (stage.flags().options().output, Some(again(stage.flags()))),
        _ => (OutputOptions::default(), None),
    };
    let console = Console::new(output);
    let (outcome, exit_code) = match run(&cli.command, &console) {
        Ok(StageOutcome::Done) => ("done", 0),
        Ok(StageOutcome::UpToDate) => ("up_to_date", 0),
        Ok(StageOutcome::WouldRun) => ("would_run", 0),
        Ok(StageOutcome::Stopped) => ("stopped", 1),
        Err(error) => {
            let mut text = explain(&error);
            if let (true, Some(again)) = (full_disk(&error), &again) {
                text += &format!(
                    "\nthe disk is full: free some space, and `{again}` goes on from what is there"
                );
            }
            console.emit(&Event::Error { text });
            ("failed", if error.is::<ConfigError>() { 2 } else { 1 })
        }
    };
    console.emit(&Event::Ended {
        outcome: outcome.to_owned(),
        exit_code,
        again: again.filter(|_| outcome == "stopped"),
    });
    exit_code
}

/// The chain of causes in one line, less what a message repeats of its own cause.
fn explain(error: &anyhow::Error) -> String {
    let mut said = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if said.is_empty() {
            said = cause;
        } else if !said.contains(&cause) {
            said += &format!(": {cause}");
        }
    }
    said
}

fn full_disk(error: &anyhow::Error) -> bool {
    let full = |cause: &std::io::Error| cause.kind() == std::io::ErrorKind::StorageFull;
    // Some libraries keep the system's error as text only.
    error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(full)
            || cause.to_string().contains("No space left on device")
    })
}

fn run(command: &Command, console: &Console) -> anyhow::Result<StageOutcome> {
    match command {
        Command::Stage(stage) => return run_stage_command(stage, console),
        Command::Init(flags) => {
            let wanted = Wanted {
                data: flags.data.clone(),
                teacher: flags.teacher.clone(),
                name: flags.name.clone(),
            };
            init::init(&flags.file, wanted, flags.force, console)?;
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

fn run_stage_command(stage: &Stage, console: &Console) -> anyhow::Result<StageOutcome> {
    let flags = stage.flags();
    let mut options = flags.options();
    if let Stage::Run(ask) | Stage::Collect(ask) | Stage::Score(ask) = stage {
        options.retry_failures = ask.retry_failures;
    }
    if let Stage::Check(_) = stage {
        return stages::check::check(&flags.file, &options, console);
    }
    let context = Context::open(&flags.file, &options)?;
    crate::interrupt::watch(console)?;
    match stage {
        Stage::Run(_) | Stage::Check(_) => stages::run(&context),
        Stage::Probe(_) => stages::probe::probe(&context),
        Stage::Import(_) => stages::import::import(&context),
        Stage::Collect(_) => stages::collect::collect(&context),
        Stage::Score(_) => stages::score::score(&context),
        Stage::Grade(_) => stages::grade::grade(&context),
        Stage::Curate(_) => stages::curate::curate(&context),
        Stage::Train(_) => stages::train::train(&context),
        Stage::Export(_) => stages::export::export(&context),
        Stage::Eval(_) => stages::eval::eval(&context),
        Stage::Report(ReportFlags { open, .. }) => {
            let outcome = stages::report::report(&context)?;
            if *open {
                stages::report::open(&context);
            }
            Ok(outcome)
        }
    }
}

/// The command that resumes, with the flags that matter to where and on what it runs.
fn again(flags: &Flags) -> String {
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
