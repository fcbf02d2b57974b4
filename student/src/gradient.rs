//! The training step without the optimizer: loss and gradient of an accumulation window.
//!
//! The states at loss positions are cut out of the graph; the head and the loss are walked in chunks
//! of rows, so that at most one [chunk, v] block of logits exists; the gradient they leave on the
//! states is then sent back through the model. Every other position gets a gradient of exactly 0.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::module::Module;
use burn::tensor::{Gradients as Tape, Tensor};
use potstill_datasets::{Arm, Signal, pack};
use potstill_kernels::{LogQSum, LogitTransform, RowStats, add_rows};
use potstill_model::{Llama, Parameter, named_parameters};

use crate::block::{Block, Targets};
use crate::control::shuffle;
use crate::error::Error;
use crate::head_loss::{Form, HeadLoss, head_loss, leaf, stats_dtype};
use crate::loss::{
    Divergence, Tail, cross_entropy, forward_kl, smoothed_cross_entropy, soft_cross_entropy,
};
use crate::objective::Objective;
use crate::settings::Settings;
use crate::target::Target;

/// Gradients by the parameter's Hugging Face name, without autodiff.
pub type Gradients = BTreeMap<String, Parameter>;

/// Sums over rows, in nats; what the loss and its report are made of.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Terms {
    /// Rows: loss positions.
    pub rows: usize,
    /// Σ forward KL to the target that was trained on, by the objective's tail and temperature.
    pub forward_kl: f64,
    /// Σ −log q(realised token).
    pub cross_entropy: f64,
    /// Σ of each of the objective's divergences, in its order.
    pub divergences: Vec<f64>,
    /// Σ over rows of what is minimised, weights and all.
    pub loss: f64,
}

impl Terms {
    fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.forward_kl += other.forward_kl;
        self.cross_entropy += other.cross_entropy;
        self.loss += other.loss;
        self.divergences.resize(other.divergences.len(), 0.0);
        for (sum, other) in self.divergences.iter_mut().zip(&other.divergences) {
            *sum += other;
        }
    }
}

/// A window's gradient and what was measured on the way.
#[derive(Debug)]
pub struct WindowGradient {
    /// By parameter name.
    pub gradients: Gradients,
    /// Sums over the window.
    pub terms: Terms,
    /// The objective's mean over the window's rows: what the gradient is the gradient of.
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
/// must be tracked (`model.train()`). `step` feeds the permutation of [`Arm::Shuffled`].
///
/// # Errors
/// A signal that breaks its rules, or an id outside the vocabulary.
pub fn window_gradient(
    model: &Llama,
    signals: &[Signal],
    arm: Arm,
    settings: &Settings,
    step: u64,
) -> Result<WindowGradient, Error> {
    let objective = settings.objective.of_arm(arm);
    objective.check()?;
    let mut targets = Vec::with_capacity(signals.len());
    let mut rescaled_rows = 0;
    for signal in signals {
        let (target, rescaled) = Target::new(signal, objective.tail, objective.temperature)?;
        rescaled_rows += rescaled;
        targets.push(target);
    }
    let rows: usize = targets.iter().map(|target| target.rows.len()).sum();
    let per_row = 1.0 / rows.max(1) as f64;
    if arm == Arm::Shuffled {
        shuffle(&mut targets, settings.seed, step);
    }
    let how = How {
        objective: &objective,
        per_row,
        chunk_rows: settings.chunk_rows,
        form: settings.form,
    };

    let mut gradients = Gradients::new();
    let mut terms = Terms::default();
    for micro_batch in lines(signals, settings).chunks(settings.micro_batch.max(1)) {
        let mut sequence = |&index: &usize| (&signals[index], std::mem::take(&mut targets[index]));
        let line = |line: &Vec<usize>| line.iter().map(&mut sequence).collect();
        let block = Block::packed(micro_batch.iter().map(line).collect(), model)?;
        terms.add(&block_gradient(model, &block, &how, &mut gradients));
    }
    Ok(WindowGradient {
        gradients,
        loss: per_row * terms.loss,
        terms,
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

/// By what a block's gradient is taken.
#[derive(Debug, Clone, Copy)]
pub struct How<'a> {
    /// What is minimised.
    pub objective: &'a Objective,
    /// What each row counts: one over the rows of the whole window.
    pub per_row: f64,
    /// Rows of logits that exist at a time.
    pub chunk_rows: usize,
    /// By kernels or by tensor operations.
    pub form: Form,
}

/// Adds the gradient of one block to `gradients` and returns the block's sums.
pub fn block_gradient(
    model: &Llama,
    block: &Block,
    how: &How<'_>,
    gradients: &mut Gradients,
) -> Terms {
    if block.rows() == 0 || how.objective.is_empty() {
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
    } = hidden_gradient(&hidden_nd, &model.head(), block, how);
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
    how: &How<'_>,
) -> HiddenGradient {
    let shape = hidden_nd.dims();
    let states_nd = block.select(hidden_nd.clone().inner());
    let head_vd = head_vd.clone().inner();
    let vocab = head_vd.dims()[0];
    let dtype = stats_dtype(head_vd.dtype());
    let targets = block.targets(0, block.rows(), dtype, &head_vd.device());
    let heads = heads(how.objective);
    let options = HeadLoss {
        heads: &heads,
        sum: match how.objective.label_smoothing > 0.0 && how.objective.cross_entropy > 0.0 {
            true => LogQSum::Included,
            false => LogQSum::Omitted,
        },
        train_head: true,
        chunk_rows: how.chunk_rows,
        form: how.form,
    };
    let mut terms = Terms::default();
    let support_nk = targets.support_nk.clone();
    let mut loss = |rows: Range<usize>, stats: &[RowStats]| {
        let (loss, part) = rows_loss(&targets.slice(rows), stats, how.objective, vocab);
        terms.add(&part);
        loss * how.per_row
    };
    let gradient = head_loss(states_nd, head_vd.clone(), support_nk, &options, &mut loss);
    HiddenGradient {
        terms,
        hidden_nd: block.scatter(gradient.hidden_nd, shape),
        // Summed in f32 at least, and then of the head's own type, as all gradients are.
        head_vd: match gradient.head_vd {
            Some(gradient_vd) => gradient_vd.cast(head_vd.dtype()),
            None => head_vd.zeros_like(),
        },
    }
}

/// That of the divergences, and behind it that of the cross-entropy where it is another.
fn heads(objective: &Objective) -> Vec<LogitTransform> {
    let plain = LogitTransform::default();
    let tempered = LogitTransform {
        temperature: objective.temperature,
        ..plain
    };
    match objective.temperature == 1.0 {
        true => vec![plain],
        false => vec![tempered, plain],
    }
}

/// The objective summed over rows, as a tracked scalar, and its terms. `stats` are of [`heads`].
fn rows_loss(
    targets: &Targets,
    stats: &[RowStats],
    objective: &Objective,
    vocab: usize,
) -> (Tensor<1>, Terms) {
    // One head may serve both.
    let (tempered, plain) = (&stats[0], &stats[stats.len() - 1]);
    let log_p_nk = targets.log_p_nk.clone();
    let (log_p_nk, log_q_nk) = objective.tail.apply(log_p_nk, targets.log_q_nk(tempered));
    let forward_kl = |log_q_nk: Tensor<2>| match objective.tail {
        Tail::Draws => soft_cross_entropy(log_p_nk.clone(), log_q_nk) - targets.entropy_n.clone(),
        _ => forward_kl(log_p_nk.clone(), log_q_nk),
    };
    let log_q_n1 = targets.log_q_realised_n1(plain);
    let mut terms = Terms {
        rows: log_q_n1.dims()[0],
        forward_kl: sum(&forward_kl(log_q_nk.clone().inner())),
        cross_entropy: sum(&cross_entropy(log_q_n1.clone().inner())),
        ..Terms::default()
    };
    let mut loss: Option<Tensor<1>> = None;
    let mut add = |rows_n: Tensor<1>, weight: f64| {
        let sum = rows_n.sum() * weight;
        loss = Some(match loss.take() {
            Some(loss) => loss + sum,
            None => sum,
        });
    };
    for term in &objective.divergences() {
        let rows_n = match term.divergence {
            Divergence::ForwardKl => forward_kl(log_q_nk.clone()),
            ref other => other.rows(log_p_nk.clone(), log_q_nk.clone()),
        };
        let (value, weight) = (sum(&rows_n), objective.weight(term));
        terms.divergences.push(value);
        if weight > 0.0 {
            terms.loss += weight * value;
            add(rows_n, weight);
        }
    }
    if objective.cross_entropy > 0.0 {
        let rows_n = match plain.sum_log_q_n1() {
            Some(sum_n1) => {
                smoothed_cross_entropy(log_q_n1, sum_n1, vocab, objective.label_smoothing)
            }
            None => cross_entropy(log_q_n1),
        };
        terms.loss += objective.cross_entropy * sum(&rows_n);
        add(rows_n, objective.cross_entropy);
    }
    let nothing = || log_q_nk.sum() * 0.0;
    (loss.unwrap_or_else(nothing), terms)
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
