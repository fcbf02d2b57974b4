//! Divergence from the teacher on text that the student wrote itself, where its mistakes follow from its mistakes.

use burn::tensor::Tensor;
use burn::tensor::activation::log_softmax;
use potstill_datasets::{Encoded, Signal};
use potstill_model::Decoder;

use crate::error::Error;
use crate::head_loss::stats_dtype;
use crate::loss::Tail;
use crate::micro_batch::MicroBatch;
use crate::target::Target;

/// Computes the reverse KL(q‖p) from the student's whole distribution q to the teacher's p, summed over the loss
/// positions of `text`, in nats. On text that the student sampled at temperature 1, its mean is the KL between the two
/// models' distributions over texts, for each token (Agarwal et al. 2024, "On-Policy Distillation of Language Models").
///
/// Both models read the same token ids. If one has more tokens than the other, those beyond the smaller vocabulary are
/// left out of both distributions. The logits of `chunk_rows` positions are in memory at a time.
///
/// # Errors
/// [`Error::Vocabulary`] for an id that is not a token of one of the models.
pub fn own_text_kl(
    student: &Decoder,
    teacher: &Decoder,
    text: Encoded,
    chunk_rows: usize,
) -> Result<f64, Error> {
    let signal = Signal::of_text(String::new(), 0, text);
    let states = |model: &Decoder| -> Result<Tensor<2>, Error> {
        let (target, _) = Target::new(&signal, Tail::Bucket, 1.0)?;
        let micro_batch = MicroBatch::new(&[&signal], vec![target], model.token_count())?;
        Ok(micro_batch.select(micro_batch.hidden(model)))
    };
    let rows = signal.rows.len();
    if rows == 0 {
        return Ok(0.0);
    }
    let (student_nd, teacher_nd) = (states(student)?, states(teacher)?);
    let vocab = student.token_count().min(teacher.token_count());
    let dtype = stats_dtype(student_nd.dtype());
    let log_probs = |model: &Decoder, hidden_nd: Tensor<2>| {
        let logits_nv = model.logits(hidden_nd).narrow(1, 0, vocab);
        log_softmax(logits_nv.cast(dtype), 1)
    };
    let chunk_rows = chunk_rows.max(1);
    let mut sum = 0.0;
    for start in (0..rows).step_by(chunk_rows) {
        let chunk = start..rows.min(start + chunk_rows);
        let log_q_nv = log_probs(student, student_nd.clone().slice(chunk.clone()));
        let log_p_nv = log_probs(teacher, teacher_nd.clone().slice(chunk));
        let kl_n1 = (log_q_nv.clone().exp() * (log_q_nv - log_p_nv)).sum_dim(1);
        sum += kl_n1.into_data().iter::<f64>().sum::<f64>();
    }
    Ok(sum)
}
