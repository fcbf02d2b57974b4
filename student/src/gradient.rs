//! The training step without the optimizer: loss and gradient of a global batch.
//!
//! The states at loss positions are cut out of the autodiff graph. The head and the loss are computed in
//! chunks of rows, so that at most one [chunk, v] block of logits exists, and the gradient of the states is
//! then propagated back through the model. Every other position gets a gradient of exactly 0.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::module::Module;
use burn::tensor::Tensor;
use potstill_datasets::{Arm, Signal};
use potstill_kernels::{LogQSum, LogitTransform, RowStats, add_rows, linear, sum_of_squares};
use potstill_model::{Decoder, Parameter};

use crate::backbone::{ForwardPass, TrackedParameters};
use crate::batch::Batch;
use crate::error::Error;
use crate::gradients::{Gradients, widened};
use crate::head_loss::{Form, HeadLossOptions, head_loss_added, logits_gradient, stats_dtype};
use crate::loss::{
    Divergence, Tail, cross_entropy, forward_kl, smoothed_cross_entropy, soft_cross_entropy,
};
use crate::micro_batch::{MicroBatch, TargetTensors};
use crate::objective::Objective;
use crate::settings::TrainSettings;

/// Names of the embedding and of a head that is not tied to it.
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
/// Steps from one measurement of the terms' gradient norms to the next; the first step is measured.
const TERM_NORM_STEPS: u64 = 10;

/// Sums over rows, in nats, from which the loss and its metrics are computed.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LossSums {
    /// Number of rows, that is loss positions.
    pub rows: usize,
    /// Σ forward KL to the target that was trained on, by the objective's tail and temperature.
    pub forward_kl: f64,
    /// Σ −log q(target token).
    pub cross_entropy: f64,
    /// Σ of each of the objective's divergences, in the objective's order.
    pub divergences: Vec<f64>,
    /// Σ of the weighted terms, which training minimises.
    pub loss: f64,
    /// Gradient norm of each weighted term at the logits, by the term's name, where it was measured: the root of the mean over
    /// some rows of the square of |∂(weight · term)/∂logits|.
    pub term_norms: BTreeMap<String, f64>,
}

impl LossSums {
    fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.forward_kl += other.forward_kl;
        self.cross_entropy += other.cross_entropy;
        self.loss += other.loss;
        self.divergences.resize(other.divergences.len(), 0.0);
        for (sum, other) in self.divergences.iter_mut().zip(&other.divergences) {
            *sum += other;
        }
        self.term_norms.extend(other.term_norms.clone());
    }
}

/// Gradient and loss of a global batch.
#[derive(Debug)]
pub struct BatchGradient {
    /// Gradients by parameter name.
    pub gradients: Gradients,
    /// Sums over the global batch.
    pub sums: LossSums,
    /// Mean of the objective over the rows of the global batch, whose gradient `gradients` is.
    pub loss: f64,
    /// Teacher's negative log-likelihood of the target tokens, summed, nats.
    pub teacher_nll: f64,
    /// Number of rows whose stored mass was over 1 and was rescaled.
    pub rescaled_rows: usize,
}

/// Computes loss and gradient of a global batch: `signals` are all sequences of one optimizer step.
///
/// Each term divides by its own count of tokens over the global batch, counted before the first forward
/// pass, so packing and the split into micro-batches change nothing but rounding. `model` must be tracked
/// (`model.train()`). See [`Batch::new`] for the other arguments.
///
/// # Errors
/// As [`Batch::new`].
pub fn batch_gradient(
    model: &Decoder,
    signals: &[Signal],
    arm: Arm,
    settings: &TrainSettings,
    step: u64,
) -> Result<BatchGradient, Error> {
    let batch = Batch::new(signals.to_vec(), arm, settings, step, model.token_count())?;
    Ok(gradient_of(model, &batch, settings))
}

/// Computes loss and gradient of a planned step. `model` must be tracked.
#[must_use]
pub fn gradient_of(model: &Decoder, batch: &Batch, settings: &TrainSettings) -> BatchGradient {
    gradient_of_share(model, batch, settings, (0, 1))
}

/// Computes what one of `size` replicas adds to loss and gradient of a planned step: every `size`-th micro-batch, from
/// micro-batch `rank` on.
pub(crate) fn gradient_of_share(
    model: &Decoder,
    batch: &Batch,
    settings: &TrainSettings,
    (rank, size): (usize, usize),
) -> BatchGradient {
    let mut options = GradientOptions::new(batch, settings, model);
    let mut gradients = Gradients::new();
    let mut sums = LossSums::default();
    let is_measured = rank == 0 && batch.step % TERM_NORM_STEPS == 1;
    options.measures_terms = is_measured && batch.objective.terms() > 1;
    for micro_batch in batch.micro_batches.iter().skip(rank).step_by(size) {
        let of_micro_batch = micro_batch_gradient(model, micro_batch, &options, &mut gradients);
        sums.add(&of_micro_batch);
        options.measures_terms &= sums.rows == 0;
    }
    BatchGradient {
        gradients,
        loss: options.row_weight * sums.loss,
        sums,
        teacher_nll: batch.teacher_nll,
        rescaled_rows: batch.rescaled_rows,
    }
}

/// Options for [`micro_batch_gradient`].
#[derive(Debug, Clone, Copy)]
pub struct GradientOptions<'a> {
    /// Loss to minimise.
    pub objective: &'a Objective,
    /// Weight of each row: 1 divided by the number of rows of the global batch.
    pub row_weight: f64,
    /// Number of rows whose logits exist at a time.
    pub chunk_rows: usize,
    /// Implementation: kernels, or tensor operations.
    pub form: Form,
    /// The model's [`Decoder::logit_transform`].
    pub transform: LogitTransform,
    /// Whether the activations of a layer are computed again in the backward pass.
    pub recompute: bool,
    /// Whether the gradient norm of each term is measured at the logits of the first `chunk_rows` rows. Their logits are
    /// computed once more for each term.
    pub measures_terms: bool,
}

impl<'a> GradientOptions<'a> {
    /// Options for the micro-batches of a global batch.
    pub(crate) fn new(batch: &'a Batch, settings: &TrainSettings, model: &Decoder) -> Self {
        Self {
            objective: &batch.objective,
            row_weight: batch.row_weight(),
            chunk_rows: settings.chunk_rows,
            form: settings.form,
            transform: model.logit_transform(),
            recompute: settings.recompute,
            measures_terms: false,
        }
    }
}

/// Adds the gradient of one micro-batch to `gradients` and returns the micro-batch's sums.
pub fn micro_batch_gradient(
    model: &Decoder,
    micro_batch: &MicroBatch,
    options: &GradientOptions<'_>,
    gradients: &mut Gradients,
) -> LossSums {
    if micro_batch.rows() == 0 || options.objective.is_empty() {
        return LossSums::default();
    }
    let tracked = TrackedParameters::of(model);
    let ids_bt = micro_batch.ids_bt(&model.device().inner());
    // Embedding without autodiff keeps no reference to the matrix, so the optimizer can update it in place.
    // The residual stream is in f32 also where products are in bf16, as under PyTorch's autocast: in bf16 it would lose the
    // last bits of what each layer adds.
    let embedded_nd = widened(model.valid().embedded(ids_bt));
    let documents = micro_batch.documents();
    let pass = ForwardPass::new(model, embedded_nd, &documents, &tracked, options.recompute);
    // The gradient of the embeddings is added row by row to the embedding matrix, which also has the head's gradient if
    // the two are tied.
    let head_name = match model.config().tie_word_embeddings {
        true => EMBEDDING,
        false => HEAD,
    };
    let head = HeadSum {
        is_trained: tracked.head,
        sum_vd: gradients.remove(head_name).and_then(Parameter::tensor),
    };
    let HiddenGradient {
        sums,
        hidden_nd: gradient_nd,
        head_vd,
    } = hidden_gradient_added(&pass.hidden_nd, &model.head(), micro_batch, options, head);
    if let Some(head_vd) = head_vd {
        gradients.insert(head_name.to_owned(), Parameter::Matrix(head_vd));
    }
    let rows_nd = pass.backward(model, &documents, gradient_nd, tracked, gradients);
    if let Some(rows_nd) = rows_nd {
        let rows_nd = widened(rows_nd);
        let sum_vd = gradients.remove(EMBEDDING).and_then(Parameter::tensor);
        let shape = [model.config().vocab_size, model.config().hidden_size];
        let options = (&rows_nd.device(), rows_nd.dtype());
        let sum_vd = sum_vd.unwrap_or_else(|| Tensor::zeros(shape, options));
        let sum_vd = add_rows(sum_vd, &micro_batch.ids(), rows_nd);
        gradients.insert(EMBEDDING.to_owned(), Parameter::Matrix(sum_vd));
    }
    sums
}

/// The sum that the head's gradient is added to.
struct HeadSum {
    is_trained: bool,
    sum_vd: Option<Tensor<2>>,
}

/// Gradients of the loss with respect to the model's last hidden states and the head, without autodiff.
#[derive(Debug)]
pub struct HiddenGradient {
    /// Sums over the micro-batch's rows.
    pub sums: LossSums,
    /// ∂L/∂hidden, `[n, d]`: exactly 0 at positions without loss.
    pub hidden_nd: Tensor<2>,
    /// ∂L/∂head, `[v, d]`, summed in f32 or f64; `None` if the head is not trained.
    pub head_vd: Option<Tensor<2>>,
}

/// Computes the loss's sums, ∂/∂hidden and ∂/∂head in one pass over chunks of rows.
///
/// `hidden_nd` and `head_vd` are constants here; the caller propagates the gradient through the model.
#[must_use]
pub fn hidden_gradient(
    hidden_nd: &Tensor<2>,
    head_vd: &Tensor<2>,
    micro_batch: &MicroBatch,
    options: &GradientOptions<'_>,
) -> HiddenGradient {
    let head = HeadSum {
        is_trained: true,
        sum_vd: None,
    };
    hidden_gradient_added(hidden_nd, head_vd, micro_batch, options, head)
}

/// Computes [`hidden_gradient`] and adds ∂L/∂head to a sum.
fn hidden_gradient_added(
    hidden_nd: &Tensor<2>,
    head_vd: &Tensor<2>,
    micro_batch: &MicroBatch,
    options: &GradientOptions<'_>,
    head: HeadSum,
) -> HiddenGradient {
    let shape = hidden_nd.dims();
    let states_nd = micro_batch.select(hidden_nd.clone().without_autodiff());
    let head_vd = head_vd.clone().without_autodiff();
    let rows_of_head = head_vd.dims()[0];
    let vocab = options.transform.vocab.unwrap_or(rows_of_head);
    let dtype = stats_dtype(head_vd.dtype());
    let targets = micro_batch.targets(0..micro_batch.rows(), dtype, &head_vd.device());
    let objective = options.objective;
    let heads = heads(objective, &options.transform);
    let head_options = HeadLossOptions {
        heads: &heads,
        sum: match objective.label_smoothing > 0.0 && objective.cross_entropy > 0.0 {
            true => LogQSum::Included,
            false => LogQSum::Omitted,
        },
        train_head: head.is_trained,
        chunk_rows: options.chunk_rows,
        form: options.form,
    };
    let support_nk = targets.support_nk.clone();
    let mut sums = LossSums::default();
    if options.measures_terms {
        let rows = 0..micro_batch.rows().min(options.chunk_rows);
        let states_nd = states_nd.clone().slice(rows.clone());
        let targets = targets.slice(rows);
        sums.term_norms = term_norms(&states_nd, &head_vd, &targets, objective, &head_options);
    }
    let mut loss = |rows: Range<usize>, stats: &[RowStats]| {
        let (terms, chunk_sums) = rows_loss(&targets.slice(rows), stats, objective, vocab);
        sums.add(&chunk_sums);
        let loss = terms.into_iter().map(|(_, loss)| loss);
        let zero = || stats[0].log_q_nk().sum() * 0.0;
        loss.reduce(|sum, term| sum + term).unwrap_or_else(zero) * options.row_weight
    };
    let gradient = head_loss_added(
        states_nd,
        head_vd,
        support_nk,
        &head_options,
        head.sum_vd,
        &mut loss,
    );
    HiddenGradient {
        sums,
        hidden_nd: micro_batch.scatter(gradient.hidden_nd, shape),
        head_vd: gradient.head_vd,
    }
}

/// Computes the gradient norm of each term at the logits: the root of the mean over rows of the squares.
fn term_norms(
    states_nd: &Tensor<2>,
    head_vd: &Tensor<2>,
    targets: &TargetTensors,
    objective: &Objective,
    options: &HeadLossOptions<'_>,
) -> BTreeMap<String, f64> {
    let [rows, _] = states_nd.dims();
    let vocab = options.heads.iter().find_map(|head| head.vocab);
    let vocab = vocab.unwrap_or(head_vd.dims()[0]);
    let norm = |term: usize| {
        let mut name = String::new();
        let mut loss = |_: Range<usize>, stats: &[RowStats]| {
            let (mut terms, _) = rows_loss(targets, stats, objective, vocab);
            let (of_term, loss) = terms.swap_remove(term);
            name = of_term;
            loss
        };
        // The gradient is written over the logits, so that a second block of this size is never needed.
        let logits_nv = linear(states_nd.clone(), head_vd.clone());
        let support_nk = &targets.support_nk;
        let gradient_nv = logits_gradient(logits_nv, support_nk, 0..rows, options, &mut loss);
        let squares = gradient_nv.map_or(0.0, sum_of_squares);
        (name, (squares / rows.max(1) as f64).sqrt())
    };
    (0..objective.terms()).map(norm).collect()
}

/// Logit transforms to evaluate: one at the loss temperature and, if that is not 1, a second one at T = 1 for
/// the cross-entropy.
fn heads(objective: &Objective, plain: &LogitTransform) -> Vec<LogitTransform> {
    let tempered = LogitTransform {
        temperature: objective.temperature,
        ..*plain
    };
    match objective.temperature == 1.0 {
        true => vec![*plain],
        false => vec![tempered, *plain],
    }
}

/// Computes each weighted term of the objective summed over rows, as a tracked scalar with the term's name, and the sums of
/// the terms. `stats` has one entry for each of [`heads`].
fn rows_loss(
    targets: &TargetTensors,
    stats: &[RowStats],
    objective: &Objective,
    vocab: usize,
) -> (Vec<(String, Tensor<1>)>, LossSums) {
    // At temperature 1 both are the same entry.
    let (tempered, plain) = (&stats[0], &stats[stats.len() - 1]);
    let log_p_nk = targets.log_p_nk.clone();
    let (log_p_nk, log_q_nk) = objective.tail.apply(log_p_nk, targets.log_q_nk(tempered));
    let forward_kl = |log_q_nk: Tensor<2>| match objective.tail {
        Tail::Draws => soft_cross_entropy(log_p_nk.clone(), log_q_nk) - targets.entropy_n.clone(),
        _ => forward_kl(log_p_nk.clone(), log_q_nk),
    };
    let log_q_n1 = targets.log_q_target_n1(plain);
    let mut sums = LossSums {
        rows: log_q_n1.dims()[0],
        forward_kl: sum(&forward_kl(log_q_nk.clone().inner())),
        cross_entropy: sum(&cross_entropy(log_q_n1.clone().inner())),
        ..LossSums::default()
    };
    let mut terms = Vec::new();
    let mut add = |name: &str, rows_n: Tensor<1>, weight: f64| {
        terms.push((name.to_owned(), rows_n.sum() * weight));
    };
    for term in &objective.divergences() {
        let rows_n = match term.divergence {
            Divergence::ForwardKl => forward_kl(log_q_nk.clone()),
            ref other => other.rows(log_p_nk.clone(), log_q_nk.clone()),
        };
        let (value, weight) = (sum(&rows_n), objective.weight(term));
        sums.divergences.push(value);
        if weight > 0.0 {
            sums.loss += weight * value;
            add(term.divergence.name(), rows_n, weight);
        }
    }
    if objective.cross_entropy > 0.0 {
        let rows_n = match plain.sum_log_q_n1() {
            Some(sum_n1) => {
                smoothed_cross_entropy(log_q_n1, sum_n1, vocab, objective.label_smoothing)
            }
            None => cross_entropy(log_q_n1),
        };
        sums.loss += objective.cross_entropy * sum(&rows_n);
        add("cross_entropy", rows_n, objective.cross_entropy);
    }
    (terms, sums)
}

/// Sums in f64 on the host: a global batch has a few thousand rows.
fn sum(values_n: &Tensor<1>) -> f64 {
    values_n.to_data().iter::<f64>().sum()
}
