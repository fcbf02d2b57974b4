//! The command line: which stages to run, and operational flags. Hyperparameters are in
//! the run file only.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::progress::Talk;
use crate::run_file::ConfigError;
use crate::stages::{self, Context, Options, Outcome};

/// Distill a large language model into a small one, and know whether it helped
#[derive(Debug, Parser)]
#[command(name = "potstill", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run every stage that is not up to date, in order
    Run(Flags),
    /// Check everything that is cheap to check, and say what a run would do
    Check(Flags),
    /// Read prompts into `prompts/`
    Import(Flags),
    /// Ask the teacher: `completions/` and `signals/`
    Collect(Flags),
    /// Ask the teacher for distributions over answers that have none: `signals/`
    Score(Flags),
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
    /// Write `report.md` and `report.json`
    Report(Flags),
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
}

impl Command {
    fn flags(&self) -> &Flags {
        match self {
            Command::Run(flags)
            | Command::Check(flags)
            | Command::Import(flags)
            | Command::Collect(flags)
            | Command::Score(flags)
            | Command::Grade(flags)
            | Command::Curate(flags)
            | Command::Train(flags)
            | Command::Export(flags)
            | Command::Eval(flags)
            | Command::Report(flags) => flags,
        }
    }
}

/// Runs a command and gives the exit code: 0 done, 1 failed or incomplete, 2 usage or
/// configuration.
pub fn main(cli: &Cli) -> u8 {
    let flags = cli.command.flags();
    let talk = Talk::new(flags.verbose);
    match run(cli, &talk) {
        Ok(Outcome::Done | Outcome::UpToDate | Outcome::WouldRun) => 0,
        Ok(Outcome::Stopped) => {
            talk.line(&format!(
                "stopped; what is done is kept, and `{}` goes on",
                again(flags)
            ));
            1
        }
        Err(error) => {
            talk.line(&format!("error: {}", explain(&error)));
            if full_disk(&error) {
                talk.line(&format!(
                    "the disk is full: free some space, and `{}` goes on from what is there",
                    again(flags)
                ));
            }
            if error.is::<ConfigError>() { 2 } else { 1 }
        }
    }
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

fn run(cli: &Cli, talk: &Talk) -> anyhow::Result<Outcome> {
    let flags = cli.command.flags();
    let options = Options {
        run_dir: flags.run_dir.clone(),
        device: flags.device.clone(),
        limit: flags.limit.map(|n| n as usize),
        dry_run: flags.dry_run || matches!(cli.command, Command::Check(_)),
        verbose: flags.verbose,
    };
    if let Command::Check(_) = cli.command {
        return stages::check::check(&flags.file, &options, talk);
    }
    let context = Context::open(&flags.file, &options)?;
    crate::interrupt::watch(talk)?;
    match cli.command {
        Command::Run(_) | Command::Check(_) => stages::run(&context),
        Command::Import(_) => stages::import::import(&context),
        Command::Collect(_) => stages::collect::collect(&context),
        Command::Score(_) => stages::score::score(&context),
        Command::Grade(_) => stages::grade::grade(&context),
        Command::Curate(_) => stages::curate::curate(&context),
        Command::Train(_) => stages::train::train(&context),
        Command::Export(_) => stages::export::export(&context),
        Command::Eval(_) => stages::eval::eval(&context),
        Command::Report(_) => stages::report::report(&context),
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
