//! The `potstill` command: parses the command line, runs the command and maps its result to an
//! exit code.

use std::process::ExitCode;

use clap::Parser;
use potstill::cli::Cli;
use potstill::kernels::ReportingHeap;
use potstill::{interrupt, panics, progress};

#[global_allocator]
static HEAP: ReportingHeap = ReportingHeap {
    on_refusal: progress::out_of_memory,
};

/// Stack size of a worker thread, equal to the usual stack size of a main thread.
const STACK_BYTES: usize = 8 << 20;

fn main() -> ExitCode {
    potstill::kernels::use_one_heap();
    panics::watch();
    interrupt::watch_limits();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return ExitCode::from(progress::command_line(&error)),
    };
    let pool = rayon::ThreadPoolBuilder::new().stack_size(STACK_BYTES);
    if let Err(error) = pool.build_global() {
        progress::fail(&format!(
            "the system refuses to start threads: {error}\nhint: raise the limit of processes (`ulimit -u`) or of memory (`ulimit -v`)"
        ));
        return ExitCode::FAILURE;
    }
    // The command itself runs on a thread of the pool. A thread outside the pool would sleep and be
    // woken at every parallel loop, and generating one token takes hundreds of these.
    let exit_code = panics::guard(|| Ok(rayon::scope(|_| potstill::cli::main(&cli))));
    ExitCode::from(exit_code.unwrap_or_else(|error| {
        progress::fail(&error.to_string());
        1
    }))
}
