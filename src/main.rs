//! The `potstill` command: parse, run, map the result to an exit code.

use std::process::ExitCode;

use clap::Parser;
use potstill::cli::Cli;

fn main() -> ExitCode {
    ExitCode::from(potstill::cli::main(&Cli::parse()))
}
