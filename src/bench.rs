//! `bench`: each part of the work with Potstill and with PyTorch, in one run on one machine.
//!
//! Both sides get the same request (token ids, targets, settings) in processes of their own, in
//! turn, with each number of threads; what they computed is compared, so that a fast wrong answer
//! does not count. `docs/benchmarks.md` says what each part does.

mod child;
mod ops;
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
pub use request::Float;
use request::{Request, Sizes, Work};
use sides::{Side, measure};
use table::{Growth, Row, Table};

/// Processes of each side with its best number of threads.
const ROUNDS: usize = 3;
/// Sequences that are decoded together.
const SEQUENCES: usize = 32;
/// Lengths whose memory is measured, the longest; the first is a sixteenth of it.
const LONGEST: usize = 8192;

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
    /// The memory of a step by length; only where it is asked for.
    Memory,
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
const ALONE: [Part; 2] = [Part::Profile, Part::Memory];

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
    /// Tokens of a text.
    pub tokens: usize,
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
    let (sides, mut notes) = sides_of(options, parts)?;
    if options.quick {
        notes.push("Measured once and briefly (`--quick`): the numbers say little.".to_owned());
    }
    let mut table = Table {
        head: head(options, &config, cores),
        notes,
        ..Table::default()
    };
    let bench = Bench {
        options,
        sizes: Sizes::of(&config, options.tokens),
        config,
        sides,
        threads: thread_counts(cores, options),
        talk,
    };
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

/// The sides there are, and what to say about the one that is not there.
fn sides_of(options: &Options, parts: &[Part]) -> anyhow::Result<(Vec<Side>, Vec<String>)> {
    if parts.iter().all(|part| ALONE.contains(part)) {
        return Ok((vec![Side::Potstill], Vec::new()));
    }
    // The other names are of APIs that PyTorch does not compute on.
    let comparable = options.device == "cpu" || options.device.starts_with("cuda");
    let python = match comparable {
        true => peer::python(options.python.as_deref())?,
        false => None,
    };
    Ok(match python {
        Some(python) => (vec![Side::Potstill, Side::Torch(python)], Vec::new()),
        None => {
            let why = match comparable {
                true => "No Python with torch and transformers was found, so these are Potstill's numbers alone: `pip install torch transformers`, or name another one with `--python PATH`.".to_owned(),
                false => format!("PyTorch does not compute on `{}`, so these are Potstill's numbers alone.", options.device),
            };
            (vec![Side::Potstill], vec![why])
        }
    })
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
    let cells = table.rows.iter().flat_map(|row| {
        let sides = [Some(&row.potstill), row.torch.as_ref()];
        sides.into_iter().flatten().flatten()
    });
    let mut engines: Vec<String> = Vec::new();
    for measured in cells {
        if !engines.contains(&measured.engine) {
            engines.push(measured.engine.clone());
        }
    }
    match engines.is_empty() {
        true => Vec::new(),
        false => vec![engines.join("; ")],
    }
}

struct Bench<'a> {
    options: &'a Options,
    config: Config,
    sizes: Sizes,
    sides: Vec<Side>,
    threads: Vec<usize>,
    talk: &'a Talk,
}

impl Bench<'_> {
    fn part(&self, part: Part, table: &mut Table) {
        let floats = match self.options.float {
            Some(float) => vec![float],
            None => vec![Float::F32, Float::Bf16],
        };
        let floats = floats.into_iter();
        match part {
            Part::Step => table.rows.extend(floats.map(|dtype| self.step(dtype))),
            Part::Prefill => table.rows.extend(floats.map(|dtype| self.prefill(dtype))),
            Part::DecodeMany => table.rows.push(self.decode("decode-32", SEQUENCES)),
            Part::DecodeOne => table.rows.push(self.decode("decode-1", 1)),
            Part::Capture => table.rows.push(self.capture()),
            Part::Profile => table.profile = Some(self.profile()),
            Part::Memory => table.growth = self.growth(),
        }
    }

    fn step(&self, dtype: Float) -> Row {
        let Sizes { tokens, top_k, .. } = self.sizes;
        let request = self.with_targets(Work::Step, dtype, tokens);
        let what = format!(
            "one text of {tokens} tokens, loss at {} of them: forward, KL to {top_k} tokens and the tail, backward, clipping by the global norm, AdamW",
            tokens.saturating_sub(1)
        );
        self.row("step", what, request, tokens)
    }

    fn prefill(&self, dtype: Float) -> Row {
        let tokens = self.sizes.tokens;
        let request = Request {
            ids: self.sizes.ids(1, tokens),
            ..self.request(Work::Prefill, dtype)
        };
        let what = format!(
            "one text of {tokens} tokens: all hidden states, logits of the last position alone, no cache, on both sides"
        );
        self.row("prefill", what, request, tokens)
    }

    fn decode(&self, part: &'static str, sequences: usize) -> Row {
        let Sizes { prompt, new, .. } = self.sizes;
        let request = Request {
            ids: self.sizes.ids(sequences, prompt),
            ..self.request(Work::Decode, Float::F32)
        };
        let what = format!(
            "{sequences} × {new} new tokens, greedy, behind prompts of {prompt} tokens, whose time counts and whose tokens do not"
        );
        self.row(part, what, request, sequences * new)
    }

    fn capture(&self) -> Row {
        let Sizes {
            texts,
            tokens,
            top_k,
            ..
        } = self.sizes;
        let request = Request {
            ids: self.sizes.ids(texts, tokens),
            ..self.request(Work::Capture, Float::F32)
        };
        let what = format!(
            "{texts} texts of {tokens} tokens: top-{top_k}, log-sum-exp and entropy at every position but the first; Potstill also the tail's mass and the realised token"
        );
        self.row("capture", what, request, texts * tokens)
    }

    /// Measures a request on all sides.
    fn row(&self, part: &'static str, what: String, request: Request, tokens: usize) -> Row {
        let rounds = if self.options.quick { 1 } else { ROUNDS };
        let (work, dtype) = (request.work, request.dtype);
        let mut say = |line: &str| {
            let name = dtype.name();
            self.talk.line(&format!("{part} {name}: {line}"));
        };
        let measured = measure(&request, &self.sides, &self.threads, rounds, &mut say);
        let mut cells = measured.into_iter();
        Row {
            part,
            what,
            work,
            dtype,
            tokens,
            potstill: cells.next().unwrap_or_else(none),
            torch: cells.next(),
        }
    }

    fn profile(&self) -> table::Cell {
        let request = self.with_targets(Work::Profile, Float::F32, self.sizes.tokens);
        self.alone("profile", &request)
    }

    fn growth(&self) -> Vec<Growth> {
        let longest = LONGEST.min(self.config.max_position_embeddings);
        let lengths = (0..5).rev().map(|halvings| longest >> halvings);
        let lengths = lengths.filter(|tokens| *tokens >= 2);
        lengths
            .map(|tokens| {
                let request = self.with_targets(Work::Memory, Float::F32, tokens);
                Growth {
                    tokens,
                    potstill: self.alone(&format!("memory of {tokens} tokens"), &request),
                }
            })
            .collect()
    }

    /// One process of Potstill, on all cores.
    fn alone(&self, part: &str, request: &Request) -> table::Cell {
        let all = self.threads.first().copied().unwrap_or(1);
        let mut say = |line: &str| self.talk.line(&format!("{part}: {line}"));
        let measured = measure(request, &[Side::Potstill], &[all], 1, &mut say);
        measured.into_iter().next().unwrap_or_else(none)
    }

    fn with_targets(&self, work: Work, dtype: Float, tokens: usize) -> Request {
        let ids = self.sizes.ids(1, tokens);
        let text = ids.first().map(Vec::as_slice).unwrap_or_default();
        let (support, logprobs) = self.sizes.targets(text);
        Request {
            ids,
            support,
            logprobs,
            ..self.request(work, dtype)
        }
    }

    fn request(&self, work: Work, dtype: Float) -> Request {
        let quick = self.options.quick;
        // The second step is the first whose memory has been used before.
        let warm_up = match work {
            Work::Step if !quick => 2,
            _ => 1,
        };
        Request {
            work,
            model: self.options.model.clone(),
            dtype,
            device: self.options.device.clone(),
            threads: 1,
            warm_up,
            repetitions: if quick { 1 } else { 4 },
            budget_s: 10.0,
            ids: Vec::new(),
            support: Vec::new(),
            logprobs: Vec::new(),
            top_k: self.sizes.top_k,
            new_tokens: self.sizes.new,
            learning_rate: 1e-5,
            weight_decay: 0.01,
            clip: 1.0,
        }
    }
}

fn none() -> table::Cell {
    Err("it was not measured".to_owned())
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
            tokens: 512,
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
