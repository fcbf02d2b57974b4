//! Per-token values on held-out text, summed by sequence.

use std::ops::ControlFlow;

use burn::tensor::Tensor;
use potstill_datasets::{CONFIDENCE_BINS, SequenceValues, Signal};
use potstill_kernels::{LogQSum, LogitTransform, row_stats};
use potstill_model::Llama;

use crate::block::Block;
use crate::error::Error;
use crate::loss::{Tail, cross_entropy, forward_kl};
use crate::target::Target;

/// Forward KL on the coarse vocabulary, negative log-likelihood and top-1 agreement of `model` with
/// the teacher's stored distributions, and how often it is right at which confidence; a sequence at a
/// time, so that nothing depends on neighbours.
///
/// `row` gives sequence i of `len`. `on_row` is told how many are done and may stop; then the result
/// is `None`.
///
/// # Errors
/// What `row` gives, a signal that breaks its rules, an id outside the vocabulary.
pub fn evaluate(
    model: &Llama,
    row: &mut dyn FnMut(usize) -> Result<Signal, potstill_datasets::Error>,
    len: usize,
    chunk_rows: usize,
    on_row: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<Vec<SequenceValues>>, Error> {
    let mut values = Vec::with_capacity(len);
    for index in 0..len {
        let signal = row(index)?;
        values.push(sequence(model, &signal, chunk_rows)?);
        if on_row(index + 1).is_break() && index + 1 < len {
            return Ok(None);
        }
    }
    Ok(Some(values))
}

fn sequence(model: &Llama, signal: &Signal, chunk_rows: usize) -> Result<SequenceValues, Error> {
    let (target, _) = Target::new(signal, Tail::Bucket, 1.0)?;
    let block = Block::new(&[signal], vec![target], model)?;
    let mut values = SequenceValues {
        prompt_id: signal.prompt_id.clone(),
        sample_index: signal.sample_index,
        tokens: block.rows() as u32,
        kl_nats: 0.0,
        nll_nats: 0.0,
        agree: 0,
        teacher_nll_nats: crate::gradient::teacher_nll(signal),
        bin_tokens: vec![0; CONFIDENCE_BINS],
        bin_confidence: vec![0.0; CONFIDENCE_BINS],
        bin_correct: vec![0; CONFIDENCE_BINS],
    };
    if block.rows() == 0 {
        return Ok(values);
    }
    let device = model.device();
    let hidden_nd = block.select(block.hidden(model));
    let chunk_rows = chunk_rows.max(1);
    for start in (0..block.rows()).step_by(chunk_rows) {
        let end = block.rows().min(start + chunk_rows);
        let logits_nv = model.logits(hidden_nd.clone().slice(start..end));
        let dtype = crate::head_loss::stats_dtype(logits_nv.dtype());
        let targets = block.targets(start, end, dtype, &device);
        let support_nk = targets.support_nk.clone();
        let head = LogitTransform::default();
        let stats = row_stats(logits_nv.clone(), support_nk, &head, LogQSum::Omitted);
        let kl_n = forward_kl(targets.log_p_nk.clone(), targets.log_q_nk(&stats));
        let nll_n = cross_entropy(targets.log_q_realised_n1(&stats));
        let likeliest_n1 = logits_nv.clone().argmax(1);
        let logit_n1 = logits_nv.gather(1, likeliest_n1.clone()).cast(dtype);
        let confidence_n1 = (logit_n1 - stats.log_z_n1()).exp();
        let likeliest: Vec<i64> = likeliest_n1.into_data().iter::<i64>().collect();

        values.kl_nats += sum(kl_n);
        values.nll_nats += sum(nll_n);
        let agree = likeliest.iter().zip(block.likeliest(start, end));
        values.agree += agree
            .filter(|(student, teacher)| **student == i64::from(*teacher))
            .count() as u32;
        let realised = block.realised(start, end).iter().map(|&id| i64::from(id));
        let correct = likeliest.iter().zip(realised).map(|(a, b)| *a == b);
        for (confidence, correct) in confidence_n1.into_data().iter::<f64>().zip(correct) {
            count(&mut values, confidence, correct);
        }
    }
    Ok(values)
}

/// Puts one position into its bin of confidence.
fn count(values: &mut SequenceValues, confidence: f64, correct: bool) {
    // Rounding can leave a probability of 1 a little above it.
    let bin = ((confidence * CONFIDENCE_BINS as f64) as usize).min(CONFIDENCE_BINS - 1);
    values.bin_tokens[bin] += 1;
    values.bin_confidence[bin] += confidence.min(1.0);
    values.bin_correct[bin] += u32::from(correct);
}

fn sum(values_n: Tensor<1>) -> f64 {
    values_n.into_data().iter::<f64>().sum()
}
