//! Evaluation on held-out text: values of each token, summed by sequence.

use std::ops::ControlFlow;

use burn::tensor::Tensor;
use potstill_datasets::{SequenceValues, Signal};
use potstill_kernels::{LogQSum, LogitTransform, row_stats};
use potstill_model::Decoder;

use crate::error::Error;
use crate::loss::{Tail, cross_entropy, forward_kl};
use crate::micro_batch::MicroBatch;
use crate::target::Target;

/// Content of the signals that a model is evaluated on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalKind {
    /// The teacher's distributions.
    Distributions,
    /// Text without distributions, as made by [`Signal::of_text`].
    Text,
}

/// Computes forward KL on the coarse vocabulary, negative log-likelihood, top-1 agreement with the teacher's
/// stored distributions, and the probabilities for calibration. Sequences are evaluated one at a time, so that
/// no value depends on other sequences.
///
/// `row` returns sequence i of `len`, of the given kind. `on_row` is called with the number of sequences done; when it breaks,
/// the result is `None`.
///
/// # Errors
/// An error of `row`, a signal that breaks its rules, or an id outside the vocabulary.
pub fn evaluate(
    model: &Decoder,
    row: &mut dyn FnMut(usize) -> Result<Signal, potstill_datasets::Error>,
    len: usize,
    kind: SignalKind,
    chunk_rows: usize,
    on_row: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<Vec<SequenceValues>>, Error> {
    let mut values = Vec::with_capacity(len);
    for index in 0..len {
        let signal = row(index)?;
        values.push(sequence(model, &signal, kind, chunk_rows)?);
        if on_row(index + 1).is_break() && index + 1 < len {
            return Ok(None);
        }
    }
    Ok(Some(values))
}

fn sequence(
    model: &Decoder,
    signal: &Signal,
    kind: SignalKind,
    chunk_rows: usize,
) -> Result<SequenceValues, Error> {
    let (target, _) = Target::new(signal, Tail::Bucket, 1.0)?;
    // The first token of a support is the teacher's most probable one.
    let expected = match kind {
        SignalKind::Distributions => (target.rows.iter())
            .filter_map(|row| row.p.first().map(|p| *p as f32))
            .collect(),
        SignalKind::Text => Vec::new(),
    };
    let micro_batch = MicroBatch::new(&[signal], vec![target], model.token_count())?;
    let mut values = SequenceValues {
        prompt_id: signal.prompt_id.clone(),
        sample_index: signal.sample_index,
        tokens: micro_batch.rows() as u32,
        kl_nats: 0.0,
        nll_nats: 0.0,
        agree: 0,
        teacher_nll_nats: crate::target::teacher_nll(signal),
        teacher_entropy_nats: signal.rows.rows().map(|row| f64::from(row.entropy)).sum(),
        confidence: Vec::with_capacity(micro_batch.rows()),
        expected,
    };
    if micro_batch.rows() == 0 {
        return Ok(values);
    }
    let device = model.device();
    let hidden_nd = micro_batch.select(micro_batch.hidden(model));
    let chunk_rows = chunk_rows.max(1);
    for start in (0..micro_batch.rows()).step_by(chunk_rows) {
        let rows = start..micro_batch.rows().min(start + chunk_rows);
        let logits_nv = model.logits(hidden_nd.clone().slice(rows.clone()));
        let dtype = crate::head_loss::stats_dtype(logits_nv.dtype());
        let targets = micro_batch.targets(rows.clone(), dtype, &device);
        let support_nk = targets.support_nk.clone();
        // The model's own transform is applied already.
        let transform = LogitTransform::default();
        let stats = row_stats(logits_nv.clone(), support_nk, &transform, LogQSum::Omitted);
        let kl_n = forward_kl(targets.log_p_nk.clone(), targets.log_q_nk(&stats));
        let nll_n = cross_entropy(targets.log_q_target_n1(&stats));
        let top1_n1 = logits_nv.clone().argmax(1);
        let confidence_n1 = match kind {
            SignalKind::Distributions => stats.log_q_nk().narrow(1, 0, 1).exp(),
            SignalKind::Text => {
                let logit_n1 = logits_nv.gather(1, top1_n1.clone()).cast(dtype);
                (logit_n1 - stats.log_z_n1()).exp()
            }
        };
        // Rounding can make a probability slightly larger than 1.
        let confidence = confidence_n1.into_data();
        let confidence = confidence.iter::<f32>().map(|q| q.min(1.0));
        values.confidence.extend(confidence);
        let top1: Vec<i64> = top1_n1.into_data().iter::<i64>().collect();

        values.kl_nats += sum(kl_n);
        values.nll_nats += sum(nll_n);
        let agree = top1.iter().zip(micro_batch.teacher_top1(rows.clone()));
        values.agree += agree
            .filter(|(student, teacher)| **student == i64::from(*teacher))
            .count() as u32;
        if kind == SignalKind::Text {
            let target_tokens = micro_batch.target_tokens(rows).iter();
            let correct = (top1.iter().zip(target_tokens)).map(|(a, b)| *a == i64::from(*b));
            values
                .expected
                .extend(correct.map(|correct| f32::from(u8::from(correct))));
        }
    }
    Ok(values)
}

fn sum(values_n: Tensor<1>) -> f64 {
    values_n.into_data().iter::<f64>().sum()
}
