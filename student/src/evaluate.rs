//! Per-token values on held-out text, summed by sequence.

use std::ops::ControlFlow;

use potstill_datasets::{SequenceValues, Signal};
use potstill_kernels::{Head, row_stats};
use potstill_model::Llama;

use crate::block::Block;
use crate::error::Error;
use crate::loss::{cross_entropy, forward_kl};
use crate::target::Target;

/// Forward KL on the coarse vocabulary, negative log-likelihood and top-1 agreement of `model` with
/// the teacher's stored distributions, a sequence at a time so that nothing depends on neighbours.
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
    let (target, _) = Target::tail_bucket(signal)?;
    let block = Block::new(&[signal], vec![target], model)?;
    let mut values = SequenceValues {
        prompt_id: signal.prompt_id.clone(),
        sample_index: signal.sample_index,
        tokens: block.rows() as u32,
        kl_nats: 0.0,
        nll_nats: 0.0,
        agree: 0,
        teacher_nll_nats: crate::gradient::teacher_nll(signal),
    };
    if block.rows() == 0 {
        return Ok(values);
    }
    let device = model.device();
    let hidden_nd = block.select(model.hidden(block.ids_bt(&device)));
    let chunk_rows = chunk_rows.max(1);
    for start in (0..block.rows()).step_by(chunk_rows) {
        let end = block.rows().min(start + chunk_rows);
        let logits_nv = model.logits(hidden_nd.clone().slice(start..end));
        let dtype = crate::gradient::stats_dtype(logits_nv.dtype());
        let (support_nk, p_nk, log_p_nk) = block.target(start, end, dtype, &device);
        let realised_n1 = block.realised_n1(start, end, &device);
        let stats = row_stats(logits_nv.clone(), support_nk, &Head::default());
        let kl_n = forward_kl(p_nk, log_p_nk, stats.log_q_nk);
        let stats = row_stats(logits_nv.clone(), realised_n1, &Head::default());
        let nll_n = cross_entropy(stats.log_q_nk.narrow(1, 0, 1));
        let likeliest = logits_nv.argmax(1).into_data();

        values.kl_nats += kl_n.into_data().iter::<f64>().sum::<f64>();
        values.nll_nats += nll_n.into_data().iter::<f64>().sum::<f64>();
        let agree = likeliest.iter::<i64>().zip(block.likeliest(start, end));
        values.agree += agree
            .filter(|(student, teacher)| *student == i64::from(*teacher))
            .count() as u32;
    }
    Ok(values)
}
