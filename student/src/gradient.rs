//! The training step without the optimizer: loss and gradient of an accumulation window.
//!
//! The states at loss positions are cut out of the graph; the head and the loss are walked in chunks
//! of rows, so that at most one [chunk, v] block of logits exists; the gradient they leave on the
//! states is then sent back through the model. Every other position gets a gradient of exactly 0.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{DType, Gradients as Tape, Tensor};
use potstill_datasets::{Signal, pack};
use potstill_kernels::{
    Head, add_rows, linear, linear_input_gradient, linear_weight_gradient, row_stats,
};
use potstill_model::{Llama, Parameter, named_parameters};

use crate::block::Block;
use crate::control::{Method, shuffle};
use crate::error::Error;
use crate::loss::{cross_entropy, forward_kl};
use crate::settings::Settings;
use crate::target::Target;

/// Gradients by the parameter's Hugging Face name, without autodiff.
pub type Gradients = BTreeMap<String, Parameter>;

/// What each term of the loss is multiplied with: its weight over its own count of tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weights {
    /// On the sum of the forward KL over rows.
    pub forward_kl: f64,
    /// On the sum of the cross-entropy over rows.
    pub cross_entropy: f64,
}

/// Sums over rows, in nats; what the loss and its report are made of.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Terms {
    /// Rows: loss positions.
    pub rows: usize,
    /// Σ forward KL to the target that was trained on.
    pub forward_kl: f64,
    /// Σ −log q(realised token).
    pub cross_entropy: f64,
}

/// A window's gradient and what was measured on the way.
#[derive(Debug)]
pub struct WindowGradient {
    /// By parameter name.
    pub gradients: Gradients,
    /// Sums over the window.
    pub terms: Terms,
    /// Σ over terms of weight · sum / count: what the gradient is the gradient of.
    pub loss: f64,
    /// Teacher's negative log-likelihood of the realised tokens, summed, nats.
    pub teacher_nll: f64,
    /// Rows whose stored mass was over 1 and was rescaled.
    pub rescaled_rows: usize,
}

/// Loss and gradient of a window: `signals` are all sequences of one optimizer step.
///
/// Each term divides by its own count of tokens over the whole window, counted before the first
/// forward pass, so packing and the split into micro-batches change nothing but rounding. `model`
/// must be tracked (`model.train()`). `step` feeds the permutation of [`Method::Shuffled`].
///
/// # Errors
/// A signal that breaks its rules, or an id outside the vocabulary.
pub fn window_gradient(
    model: &Llama,
    signals: &[Signal],
    method: Method,
    settings: &Settings,
    step: u64,
) -> Result<WindowGradient, Error> {
    let mut targets = Vec::with_capacity(signals.len());
    let mut rescaled_rows = 0;
    for signal in signals {
        let (target, rescaled) = Target::tail_bucket(signal)?;
        rescaled_rows += rescaled;
        targets.push(target);
    }
    let rows: usize = targets.iter().map(|target| target.rows.len()).sum();
    let per_row = 1.0 / rows.max(1) as f64;
    let weights = match method {
        Method::Sft => Weights {
            forward_kl: 0.0,
            cross_entropy: (settings.forward_kl + settings.cross_entropy) * per_row,
        },
        Method::Distill | Method::Shuffled => Weights {
            forward_kl: settings.forward_kl * per_row,
            cross_entropy: settings.cross_entropy * per_row,
        },
    };
    if method == Method::Shuffled {
        shuffle(&mut targets, settings.seed, step);
    }

    let mut gradients = Gradients::new();
    let mut terms = Terms::default();
    for micro_batch in lines(signals, settings).chunks(settings.micro_batch.max(1)) {
        let mut sequence = |&index: &usize| (&signals[index], std::mem::take(&mut targets[index]));
        let line = |line: &Vec<usize>| line.iter().map(&mut sequence).collect();
        let block = Block::packed(micro_batch.iter().map(line).collect(), model)?;
        let part = block_gradient(model, &block, weights, settings.chunk_rows, &mut gradients);
        terms.rows += part.rows;
        terms.forward_kl += part.forward_kl;
        terms.cross_entropy += part.cross_entropy;
    }
    Ok(WindowGradient {
        gradients,
        terms,
        loss: weights.forward_kl * terms.forward_kl + weights.cross_entropy * terms.cross_entropy,
        teacher_nll: signals.iter().map(teacher_nll).sum(),
        rescaled_rows,
    })
}

/// Which sequences share a line of a block, by index.
fn lines(signals: &[Signal], settings: &Settings) -> Vec<Vec<usize>> {
    if settings.packing {
        let lengths: Vec<usize> = signals.iter().map(|s| s.token_ids.len()).collect();
        pack(&lengths, settings.max_length)
    } else {
        (0..signals.len()).map(|index| vec![index]).collect()
    }
}

/// Adds the gradient of one block to `gradients` and returns the block's sums.
pub fn block_gradient(
    model: &Llama,
    block: &Block,
    weights: Weights,
    chunk_rows: usize,
    gradients: &mut Gradients,
) -> Terms {
    if block.rows() == 0 || (weights.forward_kl == 0.0 && weights.cross_entropy == 0.0) {
        return Terms::default();
    }
    // The embedding's rows are a leaf of their own: the gradient they get is added, row by row, to what
    // the head leaves on the same matrix.
    let ids_bt = block.ids_bt(&model.device().inner());
    // Without autodiff, so that no tape holds on to the matrix and the optimizer moves it in place.
    let embedded_nd = leaf(model.valid().embedded(ids_bt));
    let hidden_nd = model.hidden_from(embedded_nd.clone(), &block.documents());
    let HiddenGradient {
        terms,
        hidden_nd: gradient_nd,
        head_vd,
    } = hidden_gradient(&hidden_nd, &model.head(), block, weights, chunk_rows);
    let mut tape = (hidden_nd * Tensor::from_inner(gradient_nd))
        .sum()
        .backward();
    let embedded_nd = embedded_nd.grad_remove(&mut tape);

    let mut head_vd = Some(head_vd);
    for (name, parameter) in named_parameters(model) {
        let gradient = match (name.as_str(), parameter) {
            ("model.embed_tokens.weight", Parameter::Matrix(embedding_vd)) => {
                let tied = model.config().tie_word_embeddings;
                let sum_vd = if tied { head_vd.take() } else { None };
                let sum_vd = sum_vd.unwrap_or_else(|| embedding_vd.inner().zeros_like());
                embedded_nd
                    .clone()
                    .map(|rows_nd| add_rows(sum_vd, &block.ids(), rows_nd))
                    .map(Parameter::Matrix)
            }
            ("lm_head.weight", _) => head_vd.take().map(Parameter::Matrix),
            (_, parameter) => taken(parameter, &mut tape),
        };
        let sum = added(gradients.remove(&name), gradient);
        if let Some(sum) = sum {
            gradients.insert(name, sum);
        }
    }
    terms
}

/// What the loss leaves on the model's last states and on the head; without autodiff.
#[derive(Debug)]
pub struct HiddenGradient {
    /// Sums over the block's rows.
    pub terms: Terms,
    /// ∂L/∂hidden, `[n, d]`: exactly 0 wherever no loss is carried.
    pub hidden_nd: Tensor<2>,
    /// ∂L/∂head, `[v, d]`.
    pub head_vd: Tensor<2>,
}

/// Loss terms, ∂/∂hidden and ∂/∂head in one walk over chunks of rows.
///
/// `hidden_nd` and `head_vd` are taken as constants; the chain through the model is the caller's.
#[must_use]
pub fn hidden_gradient(
    hidden_nd: &Tensor<2>,
    head_vd: &Tensor<2>,
    block: &Block,
    weights: Weights,
    chunk_rows: usize,
) -> HiddenGradient {
    let shape = hidden_nd.dims();
    let states_nd = block.select(hidden_nd.clone().inner());
    let head_vd = head_vd.clone().inner();
    let n = block.rows();
    let mut terms = Terms {
        rows: n,
        ..Terms::default()
    };
    let mut states_gradients = Vec::new();
    let mut head_gradient_vd: Option<Tensor<2>> = None;
    for start in (0..n).step_by(chunk_rows.max(1)) {
        let end = n.min(start + chunk_rows.max(1));
        let chunk_nd = states_nd.clone().slice(start..end);
        let logits_nv = leaf(linear(chunk_nd.clone(), head_vd.clone()));
        let (loss, part) = chunk_loss(logits_nv.clone(), block, start, end, weights);
        let mut tape = loss.backward();
        terms.forward_kl += part.forward_kl;
        terms.cross_entropy += part.cross_entropy;
        let Some(gradient_nv) = logits_nv.grad_remove(&mut tape) else {
            states_gradients.push(chunk_nd.zeros_like());
            continue;
        };
        drop((logits_nv, tape));
        let states_gradient = linear_input_gradient(gradient_nv.clone(), head_vd.clone());
        states_gradients.push(states_gradient);
        let sum_vd = head_gradient_vd.take();
        head_gradient_vd = Some(linear_weight_gradient(gradient_nv, chunk_nd, sum_vd));
    }
    HiddenGradient {
        terms,
        hidden_nd: block.scatter(Tensor::cat(states_gradients, 0), shape),
        head_vd: head_gradient_vd.unwrap_or_else(|| head_vd.zeros_like()),
    }
}

/// The weighted loss of rows `start..end` as a tracked scalar, and its terms.
fn chunk_loss(
    logits_nv: Tensor<2>,
    block: &Block,
    start: usize,
    end: usize,
    weights: Weights,
) -> (Tensor<1>, Terms) {
    let device = logits_nv.device();
    let dtype = stats_dtype(logits_nv.dtype());
    let head = Head::default();
    // A term without weight is measured outside the graph.
    let logits_for = |weight: f64| match weight {
        0.0 => logits_nv.clone().inner(),
        _ => logits_nv.clone(),
    };

    let (support_nk, log_p_nk) = block.target(start, end, dtype, &device);
    let stats = row_stats(logits_for(weights.forward_kl), support_nk, &head);
    let kl_n = forward_kl(log_p_nk, stats.log_q_nk);

    let realised_n1 = block.realised_n1(start, end, &device);
    let log_q_n1 = if weights.cross_entropy == 0.0 {
        let logit_n1 = logits_nv.clone().inner().gather(1, realised_n1);
        logit_n1.cast(dtype) - stats.log_z_n1.inner()
    } else {
        let stats = row_stats(logits_for(weights.cross_entropy), realised_n1, &head);
        stats.log_q_nk.narrow(1, 0, 1)
    };
    let nll_n = cross_entropy(log_q_n1);

    let terms = Terms {
        rows: end - start,
        forward_kl: sum(&kl_n),
        cross_entropy: sum(&nll_n),
    };
    let loss = match (weights.forward_kl, weights.cross_entropy) {
        (kl, 0.0) => kl_n.sum() * kl,
        (0.0, nll) => nll_n.sum() * nll,
        (kl, nll) => kl_n.sum() * kl + nll_n.sum() * nll,
    };
    (loss, terms)
}

pub(crate) fn stats_dtype(logits: DType) -> DType {
    match logits {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// Sum in f64 on the host: a window's terms are a few thousand numbers.
fn sum(values_n: &Tensor<1>) -> f64 {
    values_n.to_data().iter::<f64>().sum()
}

pub(crate) fn teacher_nll(signal: &Signal) -> f64 {
    let nll = |(position, row): (usize, &potstill_datasets::SignalRow)| {
        let slot = row
            .ids
            .iter()
            .position(|id| Some(id) == signal.token_ids.get(position))?;
        row.logprobs.get(slot).map(|&logprob| -f64::from(logprob))
    };
    signal
        .loss_positions()
        .zip(&signal.rows)
        .filter_map(nll)
        .sum()
}

fn leaf<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    Tensor::from_inner(tensor).require_grad()
}

fn taken(parameter: Parameter, tape: &mut Tape) -> Option<Parameter> {
    match parameter {
        Parameter::Matrix(tensor) => tensor.grad_remove(tape).map(Parameter::Matrix),
        Parameter::Vector(tensor) => tensor.grad_remove(tape).map(Parameter::Vector),
    }
}

fn added(a: Option<Parameter>, b: Option<Parameter>) -> Option<Parameter> {
    match (a, b) {
        (Some(Parameter::Matrix(a)), Some(Parameter::Matrix(b))) => Some(Parameter::Matrix(a + b)),
        (Some(Parameter::Vector(a)), Some(Parameter::Vector(b))) => Some(Parameter::Vector(a + b)),
        (a, b) => a.or(b),
    }
}
