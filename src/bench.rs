//! `bench`: each part of the work with Potstill and with PyTorch, in one run on one machine.
//!
//! Both sides get the same request (token ids, targets, settings) in processes of their own, in
//! turn, with each number of threads; what they computed is compared, so that a fast wrong answer
//! does not count. `docs/benchmarks.md` says what each part does.

mod child;
mod loss;
mod ops;
mod parts;
mod peer;
mod profile;
mod quiet;
mod request;
mod sides;
mod table;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use potstill_model::Config;

use crate::progress::Talk;
use parts::Bench;
pub use request::Float;
use request::{How, Request, Sizes};
use sides::Side;
use table::Table;

/// Tokens of a text.
const TOKENS: usize = 512;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// An optimizer step on sparse targets.
    Step,
    /// Hidden states of one text.
    Prefill,
    /// Greedy answers to 32 prompts together.
    #[value(name = "decode-32")]
    DecodeMany,
    /// A greedy answer to one prompt.
    #[value(name = "decode-1")]
    DecodeOne,
    /// Sparse distributions of given texts.
    Capture,
    /// The share of each part of a step.
    Profile,
    /// The memory of a step by length; only where it is asked for, as all that follows.
    Memory,
    /// The step with the plain form of the loss beside the fused one.
    StepPlain,
    /// The loss alone, from hidden states and head.
    Loss,
    /// The same with a teacher of 128 tokens instead of 64.
    #[value(name = "loss-128")]
    LossWide,
    /// The memory of the loss by rows.
    LossMemory,
}

/// What is measured where nothing is asked for.
const USUAL: [Part; 6] = [
    Part::Step,
    Part::Prefill,
    Part::DecodeMany,
    Part::DecodeOne,
    Part::Capture,
    Part::Profile,
];

/// What is measured of Potstill alone.
const ALONE: [Part; 4] = [
    Part::Profile,
    Part::Memory,
    Part::StepPlain,
    Part::LossMemory,
];

/// How to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// A checkpoint's folder.
    pub model: PathBuf,
    /// The Python of the PyTorch side; `None` looks for one.
    pub python: Option<PathBuf>,
    /// What to measure; empty for all but the memory by length.
    pub only: Vec<Part>,
    /// The type to compute in; `None` for both where a part runs in both.
    pub float: Option<Float>,
    /// Tokens of a text; `None` for 512, and for 2,048 rows of the loss.
    pub tokens: Option<usize>,
    /// What computes, on both sides.
    pub device: String,
    /// One short process a side, to see that all works.
    pub quick: bool,
    /// JSON instead of Markdown.
    pub json: bool,
}

/// Measures, and puts the table on stdout.
///
/// # Errors
/// A folder without a model; a named Python that has no torch; and, once the table is out, parts on
/// which the two sides did not compute the same. A part that fails on a side says so in its cell.
pub fn bench(options: &Options, talk: &Talk) -> anyhow::Result<()> {
    let config = Config::from_dir(&options.model)?;
    potstill_model::device(&options.device)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let parts = match options.only.as_slice() {
        [] => &USUAL,
        only => only,
    };
    let (python, mut notes) = python_of(options, parts)?;
    if options.quick {
        notes.push("Measured once and briefly (`--quick`): the numbers say little.".to_owned());
    }
    let mut table = Table {
        head: head(options, &config, cores),
        ..Table::default()
    };
    let bench = Bench {
        options,
        sizes: Sizes::of(&config, options.tokens.unwrap_or(TOKENS)),
        config,
        sides: sides_of(options, parts, python.clone(), &mut notes),
        python,
        threads: thread_counts(cores, options),
        talk,
    };
    table.notes = notes;
    for part in parts {
        bench.part(*part, &mut table);
    }
    table.head.extend(engines(&table));
    talk.data(
        match options.json {
            true => table.json(),
            false => table.markdown(),
        }
        .trim_end(),
    );
    match table.disagreements().as_slice() {
        [] => Ok(()),
        wrong => bail!(
            "Potstill and PyTorch did not compute the same: {}",
            wrong.join("; ")
        ),
    }
}

/// The process that measures Potstill's side: a request on stdin, a reply on stdout.
///
/// # Errors
/// A request that cannot be read, and what stands in the way of the measurement.
pub fn child(talk: &Talk) -> anyhow::Result<()> {
    let request: Request = serde_json::from_reader(std::io::stdin().lock())
        .context("`--child` is for the processes that `potstill bench` starts itself")?;
    let reply = child::answer(&request)?;
    talk.data(&serde_json::to_string(&reply)?);
    Ok(())
}

/// The Python of the other side, and what to say where there is none.
fn python_of(options: &Options, parts: &[Part]) -> anyhow::Result<(Option<PathBuf>, Vec<String>)> {
    if parts.iter().all(|part| ALONE.contains(part)) {
        return Ok((None, Vec::new()));
    }
    // The other names are of APIs that PyTorch does not compute on.
    let comparable = options.device == "cpu" || options.device.starts_with("cuda");
    let python = match comparable {
        true => peer::python(options.python.as_deref())?,
        false => None,
    };
    let note = match (&python, comparable) {
        (Some(_), _) => None,
        (None, true) => Some("No Python with torch and transformers was found, so these are Potstill's numbers alone: `pip install torch transformers`, or name another one with `--python PATH`.".to_owned()),
        (None, false) => Some(format!("PyTorch does not compute on `{}`, so these are Potstill's numbers alone.", options.device)),
    };
    Ok((python, note.into_iter().collect()))
}

/// The sides of all parts that need a model.
fn sides_of(
    options: &Options,
    parts: &[Part],
    python: Option<PathBuf>,
    notes: &mut Vec<String>,
) -> Vec<Side> {
    let potstill = Side::potstill(How::Fused);
    let without = [Part::Loss, Part::LossWide, Part::LossMemory];
    let random = potstill_model::weight_files(&options.model).is_err();
    if random && !parts.iter().all(|part| without.contains(part)) {
        notes.push("The folder has no weights: they are random, and PyTorch, which would draw others, is measured on the loss alone.".to_owned());
    }
    match python.filter(|_| !random) {
        Some(python) => vec![potstill, Side::torch(How::Eager, python)],
        None => vec![potstill],
    }
}

/// All cores, and then 1, 2, 4 and so on of them, the most first. A GPU is fed by one process as it likes.
fn thread_counts(cores: usize, options: &Options) -> Vec<usize> {
    if options.quick || options.device != "cpu" {
        return vec![cores];
    }
    let doubled = std::iter::successors(Some(1), |threads| Some(threads * 2));
    let mut counts: Vec<usize> = doubled.take_while(|threads| *threads < cores).collect();
    counts.push(cores);
    counts.reverse();
    counts
}

fn head(options: &Options, config: &Config, cores: usize) -> Vec<String> {
    let name = |path: &Path| {
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        path.file_name()
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    };
    let load =
        quiet::load().map_or_else(String::new, |load| format!("; load {load:.2} at the start"));
    vec![
        format!(
            "{}: {} parameters, {} layers, a vocabulary of {}",
            name(&options.model),
            config.parameters(),
            config.num_hidden_layers,
            config.vocab_size
        ),
        format!("{}; device {}{load}", quiet::machine(cores), options.device),
    ]
}

/// What computed, from the replies.
fn engines(table: &Table) -> Vec<String> {
    let mut engines: Vec<String> = Vec::new();
    for measured in table.measured() {
        if !engines.contains(&measured.engine) {
            engines.push(measured.engine.clone());
        }
    }
    match engines.is_empty() {
        true => Vec::new(),
        false => vec![engines.join("; ")],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_doubled_up_to_all_cores() {
        let mut options = Options {
            model: PathBuf::new(),
            python: None,
            only: Vec::new(),
            float: None,
            tokens: None,
            device: "cpu".to_owned(),
            quick: false,
            json: false,
        };
        assert_eq!(thread_counts(1, &options), [1]);
        assert_eq!(thread_counts(2, &options), [2, 1]);
        assert_eq!(thread_counts(12, &options), [12, 8, 4, 2, 1]);
        options.device = "cuda".to_owned();
        assert_eq!(thread_counts(12, &options), [12]);
    }
}
