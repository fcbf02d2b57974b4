//! The `potstill` command: parses the command line, runs the command and maps its result to an
//! exit code.

use std::process::ExitCode;

use clap::Parser;
use potstill::cli::Cli;

/// Stack size of a worker thread, equal to the usual stack size of a main thread.
const STACK_BYTES: usize = 8 << 20;

fn main() -> ExitCode {
    potstill::kernels::use_one_heap();
    let cli = Cli::parse();
    // Building the pool fails only if one exists already; that pool is used then.
    let _ = rayon::ThreadPoolBuilder::new()
        .stack_size(STACK_BYTES)
        .build_global();
    // The command itself runs on a thread of the pool. A thread outside the pool would sleep and be
    // woken at every parallel loop, and generating one token takes hundreds of these.
    ExitCode::from(rayon::scope(|_| potstill::cli::main(&cli)))
}
