//! The `potstill` command: parse, run, map the result to an exit code.

use std::process::ExitCode;

use clap::Parser;
use potstill::cli::Cli;

/// Of each thread: what a main thread usually has.
const STACK_BYTES: usize = 8 << 20;

fn main() -> ExitCode {
    potstill::kernels::use_one_heap();
    let cli = Cli::parse();
    // Only fails where the pool exists, which then serves.
    let _ = rayon::ThreadPoolBuilder::new()
        .stack_size(STACK_BYTES)
        .build_global();
    // The command itself runs on a thread of the pool: one from outside would be put to sleep and woken
    // at every parallel loop, of which generating a token has hundreds.
    ExitCode::from(rayon::scope(|_| potstill::cli::main(&cli)))
}
