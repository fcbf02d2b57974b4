//! The parts one by one: what is asked for, of which sides.

use std::path::PathBuf;

use potstill_model::Config;

use super::child::CHUNK_ROWS;
use super::request::{How, LossShape, Request, Sizes, Work};
use super::sides::{Side, measure};
use super::table::{Cell, Contest, Growth, Row, Table};
use super::{Float, Options, Part};
use crate::progress::Talk;

/// Processes of each side with its best number of threads.
const ROUNDS: usize = 3;
/// Sequences that are decoded together.
const SEQUENCES: usize = 32;
/// Lengths whose memory is measured, the longest; the first is a sixteenth of it.
const LONGEST: usize = 8192;
/// Rows of the loss, and how many its memory is measured with.
const LOSS_ROWS: usize = 2048;
const LOSS_LENGTHS: [usize; 3] = [1024, 4096, 16_384];
/// Rows of logits at a time on a GPU, whose products want more of them than a CPU's.
const GPU_ROWS: usize = 1024;

/// What all parts have in common.
pub(crate) struct Bench<'a> {
    pub(crate) options: &'a Options,
    pub(crate) config: Config,
    pub(crate) sizes: Sizes,
    pub(crate) sides: Vec<Side>,
    pub(crate) python: Option<PathBuf>,
    pub(crate) threads: Vec<usize>,
    pub(crate) talk: &'a Talk,
}

impl Bench<'_> {
    /// Measures one part, into the table.
    pub(crate) fn part(&self, part: Part, table: &mut Table) {
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
            Part::StepPlain => table.contests.push(self.step_plain()),
            Part::Loss => table.contests.push(self.loss("loss", self.sizes)),
            Part::LossWide => table
                .contests
                .push(self.loss("loss-128", self.sizes.wide())),
            Part::LossMemory => table.loss_growth = self.loss_growth(),
        }
    }

    fn step(&self, dtype: Float) -> Row {
        let tokens = self.sizes.tokens;
        let request = self.with_targets(Work::Step, dtype, tokens);
        self.row("step", self.sizes.step(), request, tokens)
    }

    /// The step in both forms of the loss.
    fn step_plain(&self) -> Contest {
        let dtype = self.options.float.unwrap_or(Float::F32);
        let request = self.with_targets(Work::Step, dtype, self.sizes.tokens);
        let sides = [How::Fused, How::Plain].map(Side::potstill);
        self.contest("step-plain", self.sizes.step(), &request, &sides)
    }

    fn loss(&self, part: &'static str, sizes: Sizes) -> Contest {
        let dtype = self.options.float.unwrap_or(Float::F32);
        let rows = self.options.tokens.unwrap_or(LOSS_ROWS);
        let request = self.loss_request(Work::Loss, dtype, rows, sizes);
        let mut sides = vec![Side::potstill(How::Fused)];
        if let Some(python) = &self.python {
            let mut others = vec![How::Eager, How::Compile];
            if self.options.device != "cpu" {
                // Triton has no CPU.
                others.extend([How::LigerJsd, How::LigerKl, How::LigerCrossEntropy]);
            }
            sides.extend(
                others
                    .into_iter()
                    .map(|how| Side::torch(how, python.clone())),
            );
        }
        let LossShape {
            rows, width, vocab, ..
        } = request.loss;
        let what = format!(
            "{rows} hidden states of width {width}, a vocabulary of {vocab}: the mean forward KL to {} tokens and the tail, with the gradients of states and head",
            request.top_k
        );
        self.contest(part, what, &request, &sides)
    }

    fn loss_growth(&self) -> Vec<Growth> {
        let shorter = |rows: &usize| !self.options.quick || *rows <= LOSS_ROWS;
        let lengths = LOSS_LENGTHS.into_iter().filter(shorter);
        let dtype = self.options.float.unwrap_or(Float::F32);
        lengths
            .map(|tokens| {
                let request = self.loss_request(Work::LossMemory, dtype, tokens, self.sizes);
                Growth {
                    tokens,
                    potstill: self.alone(&format!("loss at {tokens} positions"), &request),
                }
            })
            .collect()
    }

    fn loss_request(&self, work: Work, dtype: Float, rows: usize, sizes: Sizes) -> Request {
        Request {
            loss: LossShape {
                rows,
                width: self.config.hidden_size,
                vocab: self.config.vocab_size,
                chunk_rows: match self.options.device.as_str() {
                    "cpu" => CHUNK_ROWS,
                    _ => GPU_ROWS,
                },
            },
            logprobs: vec![sizes.falling(0.9)],
            top_k: sizes.top_k,
            budget_s: 20.0,
            ..self.request(work, dtype)
        }
    }

    /// Measures a request on these sides, on all cores.
    fn contest(
        &self,
        part: &'static str,
        what: String,
        request: &Request,
        sides: &[Side],
    ) -> Contest {
        let rounds = if self.options.quick { 1 } else { ROUNDS };
        let threads: Vec<usize> = self.threads.iter().copied().take(1).collect();
        let mut say = |line: &str| {
            let name = request.dtype.name();
            self.talk.line(&format!("{part} {name}: {line}"));
        };
        let cells = measure(request, sides, &threads, rounds, &mut say);
        Contest {
            part,
            what,
            work: request.work,
            dtype: request.dtype,
            tokens: self.sizes.tokens,
            shape: request.loss,
            sides: sides.iter().map(|side| side.how).zip(cells).collect(),
        }
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

    fn profile(&self) -> Cell {
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
    fn alone(&self, part: &str, request: &Request) -> Cell {
        let all = self.threads.first().copied().unwrap_or(1);
        let mut say = |line: &str| self.talk.line(&format!("{part}: {line}"));
        let measured = measure(request, &[Side::potstill(How::Fused)], &[all], 1, &mut say);
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
            Work::Step | Work::Loss if !quick => 2,
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
            how: How::Fused,
            loss: LossShape::default(),
            learning_rate: 1e-5,
            weight_decay: 0.01,
            clip: 1.0,
        }
    }
}

fn none() -> Cell {
    Err("it was not measured".to_owned())
}
