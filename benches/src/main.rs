//! `potstill-bench` measures parts of Potstill's work and of PyTorch's in one run on one machine.
//!
//! Both get the same request (token ids, targets, settings) in processes of their own, in turn, with each
//! number of threads. What they computed is compared, so that a fast wrong answer does not count.
//! `docs/benchmarks.md` describes each part and has results.

// This is the one file of the program that prints.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod comparison;
mod machine;
mod measure;
mod processes;
mod python;
mod request;
mod results;
mod sizes;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;

use crate::measure::{BenchmarkOptions, BenchmarkPart};
use crate::request::{FloatType, MeasurementRequest};

/// Stack of each thread, the usual size of a main thread's.
const STACK_BYTES: usize = 8 << 20;

/// Measure speed and memory of Potstill beside PyTorch
#[derive(Debug, Parser)]
#[command(name = "potstill-bench", version)]
struct Arguments {
    /// Folder of the model in Hugging Face layout
    model: PathBuf,
    /// Python that runs the PyTorch side [default: one that has torch and transformers]
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
    /// Measure these parts only
    #[arg(long, value_name = "PARTS", value_enum, value_delimiter = ',')]
    only: Vec<BenchmarkPart>,
    /// Number type of step and prefill [default: f32 and bf16]
    #[arg(long = "type", value_name = "TYPE", value_enum)]
    float: Option<FloatType>,
    /// Tokens of a text, and positions of the part `loss` [default: 512, and 2048]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    tokens: Option<u32>,
    /// Device of both sides: cpu, and cuda in a build with that feature
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Run one short process for each implementation
    #[arg(long)]
    quick: bool,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
    /// Measure the one request on stdin and print a reply
    #[arg(long, hide = true)]
    worker: bool,
}

fn main() -> ExitCode {
    potstill::kernels::use_one_heap();
    let arguments = Arguments::parse();
    // This fails only if the pool exists already, which serves as well.
    let _ = rayon::ThreadPoolBuilder::new()
        .stack_size(STACK_BYTES)
        .build_global();
    // The work runs on a thread of the pool, as in `potstill`: a thread outside it would be suspended and
    // woken at every parallel loop.
    match rayon::scope(|_| run(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if arguments.worker {
        let request: MeasurementRequest = serde_json::from_reader(std::io::stdin().lock())
            .context("`--worker` is for the processes that `potstill-bench` starts itself")?;
        println!("{}", serde_json::to_string(&worker::answer(&request)?)?);
        return Ok(());
    }
    let options = BenchmarkOptions {
        model: arguments.model.clone(),
        python: arguments.python.clone(),
        only: arguments.only.clone(),
        float: arguments.float,
        tokens: arguments.tokens.map(|n| n as usize),
        device: arguments.device.clone(),
        quick: arguments.quick,
    };
    let results = measure::benchmark(&options, &|line| eprintln!("{line}"))?;
    let text = match arguments.json {
        true => results.json(),
        false => results.markdown(),
    };
    println!("{}", text.trim_end());
    match results.disagreements().as_slice() {
        [] => Ok(()),
        wrong => anyhow::bail!(
            "Potstill and PyTorch did not compute the same: {}",
            wrong.join("; ")
        ),
    }
}
