//! Measures the parts of the benchmark: which requests they are, and which implementations run them.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use potstill::datasets::Tokenizer;
use potstill::model::{Config, device, weight_files};

use crate::comparison::Comparison;
use crate::machine;
use crate::processes::{MeasurementResult, Runner, measure};
use crate::python;
use crate::request::{FloatType, Implementation, LossShape, MeasurementRequest, Workload};
use crate::results::{BenchmarkResults, MemoryAtLength};
use crate::sizes::WorkloadSizes;
use crate::worker::CPU_CHUNK_ROWS;

/// Tokens of a text.
const TOKENS: usize = 512;
/// Processes of each implementation with its best number of threads.
const ROUNDS: usize = 3;
/// Sequences that are decoded together.
const SEQUENCES: usize = 32;
/// Longest text whose memory is measured; the shortest has a sixteenth of its tokens.
const LONGEST: usize = 8192;
/// Rows of the loss.
const LOSS_ROWS: usize = 2048;
/// Numbers of rows with which the memory of the loss is measured.
const LOSS_LENGTHS: [usize; 3] = [1024, 4096, 16_384];
/// Rows of logits at a time on a GPU, whose products need more rows than a CPU's to be fast.
const GPU_CHUNK_ROWS: usize = 1024;

/// Part of the benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchmarkPart {
    /// An optimizer step on sparse targets
    Step,
    /// Hidden states of one text
    Prefill,
    /// Greedy answers to 32 prompts together
    #[value(name = "decode-32")]
    DecodeMany,
    /// A greedy answer to one prompt
    #[value(name = "decode-1")]
    DecodeOne,
    /// Sparse distributions of given texts
    Capture,
    /// The share of each part of a step
    Profile,
    /// The memory of a step by length; this and the following parts are measured on request only
    Memory,
    /// The step with the plain form of the loss beside the fused one
    StepPlain,
    /// The step beside transformers, plain and with Liger's layers and FlashAttention, on a GPU
    StepPeers,
    /// The loss alone, from hidden states and head
    Loss,
    /// The loss alone with a teacher of 128 tokens instead of 64
    #[value(name = "loss-128")]
    LossWide,
    /// The memory of the loss by rows
    LossMemory,
}

impl BenchmarkPart {
    /// Parts that are measured by default.
    const DEFAULT: [BenchmarkPart; 6] = [
        BenchmarkPart::Step,
        BenchmarkPart::Prefill,
        BenchmarkPart::DecodeMany,
        BenchmarkPart::DecodeOne,
        BenchmarkPart::Capture,
        BenchmarkPart::Profile,
    ];

    /// Whether only Potstill is measured.
    fn is_potstill_only(self) -> bool {
        use BenchmarkPart::{LossMemory, Memory, Profile, StepPlain};
        matches!(self, Profile | Memory | StepPlain | LossMemory)
    }

    /// Whether the weights of the model do not matter.
    fn needs_no_model(self) -> bool {
        use BenchmarkPart::{Loss, LossMemory, LossWide};
        matches!(self, Loss | LossWide | LossMemory)
    }
}

/// Options of a benchmark.
#[derive(Debug, Clone)]
pub(crate) struct BenchmarkOptions {
    /// Folder of the checkpoint.
    pub(crate) model: PathBuf,
    /// Python of the PyTorch side; `None` to look for one.
    pub(crate) python: Option<PathBuf>,
    /// Parts to measure; empty for the default ones.
    pub(crate) only: Vec<BenchmarkPart>,
    /// Number type; `None` for both where a part runs in both.
    pub(crate) float: Option<FloatType>,
    /// Tokens of a text; `None` for 512, and for 2,048 rows of the loss.
    pub(crate) tokens: Option<usize>,
    /// Device of both sides.
    pub(crate) device: String,
    /// Whether to run one short process for each implementation.
    pub(crate) quick: bool,
}

/// Measures all requested parts. `progress` receives a line after each measuring process.
///
/// # Errors
/// When the folder has no model, or a named Python has no torch. A part that fails is an entry of the
/// results.
pub(crate) fn benchmark(
    options: &BenchmarkOptions,
    progress: &dyn Fn(&str),
) -> anyhow::Result<BenchmarkResults> {
    let config = Config::from_dir(&options.model)?;
    // A folder without weights may be without a tokenizer as well.
    let tokens = Tokenizer::from_dir(&options.model).map(|tokenizer| tokenizer.vocab_size());
    let vocab = tokens.map_or(config.vocab_size, |tokens| tokens.min(config.vocab_size));
    device(&options.device)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let parts = match options.only.as_slice() {
        [] => &BenchmarkPart::DEFAULT,
        only => only,
    };
    let mut results = BenchmarkResults {
        head: head(options, &config, cores),
        ..BenchmarkResults::default()
    };
    let python = find_python(options, parts, &mut results.notes)?;
    if options.quick {
        let note = "Measured once and briefly (`--quick`): the numbers say little.";
        results.notes.push(note.to_owned());
    }
    let benchmark = Benchmark {
        options,
        sizes: WorkloadSizes::new(&config, vocab, options.tokens.unwrap_or(TOKENS)),
        config,
        runners: model_runners(options, parts, python.clone(), &mut results.notes),
        python,
        threads: thread_counts(cores, options),
        progress,
    };
    for part in parts {
        benchmark.measure_part(*part, &mut results);
    }
    let engines = results.engines();
    results.head.extend(engines);
    Ok(results)
}

/// Finds the Python of the PyTorch side, and adds a note if PyTorch is not measured.
fn find_python(
    options: &BenchmarkOptions,
    parts: &[BenchmarkPart],
    notes: &mut Vec<String>,
) -> anyhow::Result<Option<PathBuf>> {
    if parts.iter().all(|part| part.is_potstill_only()) {
        return Ok(None);
    }
    // PyTorch does not compute on the other devices that Potstill has.
    if options.device != "cpu" && !options.device.starts_with("cuda") {
        notes.push(format!(
            "PyTorch does not compute on `{}`, so these are Potstill's numbers alone.",
            options.device
        ));
        return Ok(None);
    }
    let python = python::find(options.python.as_deref())?;
    if python.is_none() {
        notes.push("No Python with torch and transformers was found, so these are Potstill's numbers alone: `pip install torch transformers`, or name another one with `--python PATH`.".to_owned());
    }
    Ok(python)
}

/// The runners of the parts that need a model.
fn model_runners(
    options: &BenchmarkOptions,
    parts: &[BenchmarkPart],
    python: Option<PathBuf>,
    notes: &mut Vec<String>,
) -> Vec<Runner> {
    let random = weight_files(&options.model).is_err();
    if random && !parts.iter().all(|part| part.needs_no_model()) {
        notes.push("The folder has no weights: they are random, and PyTorch, which would draw others, is measured on the loss alone.".to_owned());
    }
    let mut runners = vec![Runner::potstill(Implementation::Fused)];
    if let Some(python) = python.filter(|_| !random) {
        runners.push(Runner::pytorch(Implementation::Eager, python));
    }
    runners
}

/// All cores, and then the powers of two below that, largest first. On a GPU the number of threads does
/// not matter.
fn thread_counts(cores: usize, options: &BenchmarkOptions) -> Vec<usize> {
    if options.quick || options.device != "cpu" {
        return vec![cores];
    }
    let doubled = std::iter::successors(Some(1), |threads| Some(threads * 2));
    let mut counts: Vec<usize> = doubled.take_while(|threads| *threads < cores).collect();
    counts.push(cores);
    counts.reverse();
    counts
}

/// Lines that describe the model and the machine.
fn head(options: &BenchmarkOptions, config: &Config, cores: usize) -> Vec<String> {
    let name = |path: &Path| {
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        path.file_name()
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    };
    let load = machine::load();
    let load = load.map_or_else(String::new, |load| format!("; load {load:.2} at the start"));
    vec![
        format!(
            "{}: {} parameters, {} layers, a vocabulary of {}",
            name(&options.model),
            config.parameters(),
            config.num_hidden_layers(),
            config.vocab_size
        ),
        format!(
            "{}; device {}{load}",
            machine::describe(cores),
            options.device
        ),
    ]
}

/// Everything that the parts share.
struct Benchmark<'a> {
    options: &'a BenchmarkOptions,
    config: Config,
    sizes: WorkloadSizes,
    runners: Vec<Runner>,
    python: Option<PathBuf>,
    threads: Vec<usize>,
    progress: &'a dyn Fn(&str),
}

impl Benchmark<'_> {
    fn measure_part(&self, part: BenchmarkPart, results: &mut BenchmarkResults) {
        let floats = match self.options.float {
            Some(float) => vec![float],
            None => vec![FloatType::F32, FloatType::Bf16],
        };
        let floats = floats.into_iter();
        let rates = &mut results.rates;
        match part {
            BenchmarkPart::Step => rates.extend(floats.map(|float| self.step(float))),
            BenchmarkPart::Prefill => rates.extend(floats.map(|float| self.prefill(float))),
            BenchmarkPart::DecodeMany => rates.push(self.decode("decode-32", SEQUENCES)),
            BenchmarkPart::DecodeOne => rates.push(self.decode("decode-1", 1)),
            BenchmarkPart::Capture => rates.push(self.capture()),
            BenchmarkPart::Profile => results.profile = Some(self.profile()),
            BenchmarkPart::Memory => results.memory = self.memory(),
            BenchmarkPart::StepPlain => results.losses.push(self.step_plain()),
            BenchmarkPart::StepPeers => results
                .losses
                .extend(floats.map(|float| self.step_peers(float))),
            BenchmarkPart::Loss => results.losses.push(self.loss("loss", self.sizes)),
            BenchmarkPart::LossWide => results
                .losses
                .push(self.loss("loss-128", self.sizes.with_wide_support())),
            BenchmarkPart::LossMemory => results.loss_memory = self.loss_memory(),
        }
    }

    fn step(&self, float: FloatType) -> Comparison {
        let tokens = self.sizes.tokens;
        let request = self.request_with_targets(Workload::Step, float, tokens);
        self.compare_rates("step", self.describe_step(), &request, tokens)
    }

    fn describe_step(&self) -> String {
        let WorkloadSizes { tokens, top_k, .. } = self.sizes;
        format!(
            "one text of {tokens} tokens, loss at {} of them: forward, KL to {top_k} tokens and the tail, backward, clipping by the global norm, AdamW",
            tokens.saturating_sub(1)
        )
    }

    /// The step with both forms of the loss.
    fn step_plain(&self) -> Comparison {
        let float = self.options.float.unwrap_or(FloatType::F32);
        let request = self.request_with_targets(Workload::Step, float, self.sizes.tokens);
        let runners = [Implementation::Fused, Implementation::Plain].map(Runner::potstill);
        let tokens = self.sizes.tokens;
        let description = self.describe_step();
        self.compare_on_all_cores("step-plain", description, &request, tokens, &runners)
    }

    /// The step beside all forms of transformers'.
    fn step_peers(&self, float: FloatType) -> Comparison {
        let tokens = self.sizes.tokens;
        let request = self.request_with_targets(Workload::Step, float, tokens);
        let mut runners = self.runners.clone();
        if let Some(python) = &self.python {
            if float == FloatType::Bf16 {
                runners.push(Runner::pytorch(Implementation::EagerBf16, python.clone()));
            }
            // Liger and FlashAttention have no CPU backend, and FlashAttention no f32.
            if self.options.device != "cpu" && float == FloatType::Bf16 {
                runners.push(Runner::pytorch(Implementation::LigerLayers, python.clone()));
            }
        }
        self.compare_on_all_cores(
            "step-peers",
            self.describe_step(),
            &request,
            tokens,
            &runners,
        )
    }

    fn loss(&self, part: &'static str, sizes: WorkloadSizes) -> Comparison {
        let float = self.options.float.unwrap_or(FloatType::F32);
        let rows = self.options.tokens.unwrap_or(LOSS_ROWS);
        let request = self.loss_request(Workload::Loss, float, rows, sizes);
        let mut runners = vec![Runner::potstill(Implementation::Fused)];
        if let Some(python) = &self.python {
            let mut others = vec![Implementation::Eager, Implementation::Compile];
            if self.options.device != "cpu" {
                // The losses of Liger and QuACK are written in Triton and CuTe, which have no CPU backend.
                others.extend([
                    Implementation::LigerJsd,
                    Implementation::LigerKl,
                    Implementation::LigerCrossEntropy,
                    Implementation::LigerCuteCrossEntropy,
                    Implementation::QuackCrossEntropy,
                ]);
            }
            let runner = |implementation| Runner::pytorch(implementation, python.clone());
            runners.extend(others.into_iter().map(runner));
        }
        let LossShape { width, vocab, .. } = request.loss;
        let description = format!(
            "{rows} hidden states of width {width}, a vocabulary of {vocab}: the mean forward KL to {} tokens and the tail, with the gradients of states and head",
            request.top_k
        );
        self.compare_on_all_cores(part, description, &request, rows, &runners)
    }

    fn loss_memory(&self) -> Vec<MemoryAtLength> {
        let float = self.options.float.unwrap_or(FloatType::F32);
        let measured = |rows: &usize| !self.options.quick || *rows <= LOSS_ROWS;
        let rows = LOSS_LENGTHS.into_iter().filter(measured);
        rows.map(|rows| {
            let request = self.loss_request(Workload::LossMemory, float, rows, self.sizes);
            MemoryAtLength {
                tokens: rows,
                potstill: self.potstill_once(&format!("loss at {rows} positions"), &request),
            }
        })
        .collect()
    }

    fn prefill(&self, float: FloatType) -> Comparison {
        let tokens = self.sizes.tokens;
        let request = MeasurementRequest {
            ids: self.sizes.ids(1, tokens),
            ..self.request(Workload::Prefill, float)
        };
        let description = format!(
            "one text of {tokens} tokens: all hidden states, logits of the last position alone, no cache, on both sides"
        );
        self.compare_rates("prefill", description, &request, tokens)
    }

    fn decode(&self, part: &'static str, sequences: usize) -> Comparison {
        let WorkloadSizes { prompt, new, .. } = self.sizes;
        let request = MeasurementRequest {
            ids: self.sizes.ids(sequences, prompt),
            ..self.request(Workload::Decode, FloatType::F32)
        };
        let description = format!(
            "{sequences} × {new} new tokens, greedy, behind prompts of {prompt} tokens, whose time counts and whose tokens do not"
        );
        self.compare_rates(part, description, &request, sequences * new)
    }

    fn capture(&self) -> Comparison {
        let WorkloadSizes {
            texts,
            tokens,
            top_k,
            ..
        } = self.sizes;
        let request = MeasurementRequest {
            ids: self.sizes.ids(texts, tokens),
            ..self.request(Workload::Capture, FloatType::F32)
        };
        let description = format!(
            "{texts} texts of {tokens} tokens: top-{top_k}, log-sum-exp and entropy at every position but the first; Potstill also the tail's mass and the target token"
        );
        self.compare_rates("capture", description, &request, texts * tokens)
    }

    fn profile(&self) -> MeasurementResult {
        let request =
            self.request_with_targets(Workload::Profile, FloatType::F32, self.sizes.tokens);
        self.potstill_once("profile", &request)
    }

    fn memory(&self) -> Vec<MemoryAtLength> {
        let longest = LONGEST.min(self.config.max_position_embeddings);
        let lengths = (0..5).rev().map(|halvings| longest >> halvings);
        let lengths = lengths.filter(|tokens| *tokens >= 2);
        lengths
            .map(|tokens| {
                let request = self.request_with_targets(Workload::Memory, FloatType::F32, tokens);
                MemoryAtLength {
                    tokens,
                    potstill: self.potstill_once(&format!("memory of {tokens} tokens"), &request),
                }
            })
            .collect()
    }

    /// Compares Potstill and PyTorch, each with its best number of threads.
    fn compare_rates(
        &self,
        part: &'static str,
        description: String,
        request: &MeasurementRequest,
        tokens: usize,
    ) -> Comparison {
        let runners = (self.runners.as_slice(), self.threads.as_slice());
        self.compare(part, description, request, tokens, runners)
    }

    fn compare_on_all_cores(
        &self,
        part: &'static str,
        description: String,
        request: &MeasurementRequest,
        tokens: usize,
        runners: &[Runner],
    ) -> Comparison {
        let all_cores = self.threads.get(..1).unwrap_or_default();
        self.compare(part, description, request, tokens, (runners, all_cores))
    }

    fn compare(
        &self,
        part: &'static str,
        description: String,
        request: &MeasurementRequest,
        tokens: usize,
        (runners, threads): (&[Runner], &[usize]),
    ) -> Comparison {
        let rounds = if self.options.quick { 1 } else { ROUNDS };
        let name = format!("{part} {}", request.float.name());
        let mut progress = |line: &str| (self.progress)(&format!("{name}: {line}"));
        let results = measure(request, runners, threads, rounds, &mut progress);
        let implementations = runners.iter().map(|runner| runner.implementation);
        Comparison {
            part,
            description,
            workload: request.workload,
            float: request.float,
            tokens,
            shape: request.loss,
            results: implementations.zip(results).collect(),
        }
    }

    /// Runs one process of Potstill on all cores.
    fn potstill_once(&self, part: &str, request: &MeasurementRequest) -> MeasurementResult {
        let threads = self.threads.get(..1).unwrap_or_default();
        let mut progress = |line: &str| (self.progress)(&format!("{part}: {line}"));
        let runner = Runner::potstill(Implementation::Fused);
        let results = measure(request, &[runner], threads, 1, &mut progress);
        let result = results.into_iter().next();
        result.unwrap_or_else(|| Err("it was not measured".to_owned()))
    }

    fn loss_request(
        &self,
        workload: Workload,
        float: FloatType,
        rows: usize,
        sizes: WorkloadSizes,
    ) -> MeasurementRequest {
        MeasurementRequest {
            loss: LossShape {
                rows,
                width: self.config.hidden_size,
                vocab: self.config.vocab_size,
                chunk_rows: match self.options.device.as_str() {
                    "cpu" => CPU_CHUNK_ROWS,
                    _ => GPU_CHUNK_ROWS,
                },
            },
            logprobs: vec![sizes.falling_logprobs(0.9)],
            top_k: sizes.top_k,
            budget_s: 20.0,
            ..self.request(workload, float)
        }
    }

    fn request_with_targets(
        &self,
        workload: Workload,
        float: FloatType,
        tokens: usize,
    ) -> MeasurementRequest {
        let ids = self.sizes.ids(1, tokens);
        let text = ids.first().map(Vec::as_slice).unwrap_or_default();
        let (support, logprobs) = self.sizes.targets(text);
        MeasurementRequest {
            ids,
            support,
            logprobs,
            ..self.request(workload, float)
        }
    }

    fn request(&self, workload: Workload, float: FloatType) -> MeasurementRequest {
        let quick = self.options.quick;
        // The second step is the first one that finds its memory already mapped.
        let warm_up = match workload {
            Workload::Step | Workload::Loss if !quick => 2,
            _ => 1,
        };
        MeasurementRequest {
            workload,
            model: self.options.model.clone(),
            float,
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
            implementation: Implementation::Fused,
            loss: LossShape::default(),
            learning_rate: 1e-5,
            weight_decay: 0.01,
            clip: 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_doubled_up_to_all_cores() {
        let mut options = BenchmarkOptions {
            model: PathBuf::new(),
            python: None,
            only: Vec::new(),
            float: None,
            tokens: None,
            device: "cpu".to_owned(),
            quick: false,
        };
        assert_eq!(thread_counts(1, &options), [1]);
        assert_eq!(thread_counts(2, &options), [2, 1]);
        assert_eq!(thread_counts(12, &options), [12, 8, 4, 2, 1]);
        options.device = "cuda".to_owned();
        assert_eq!(thread_counts(12, &options), [12]);
    }
}
