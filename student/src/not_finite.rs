//! The rows that are to blame for a loss or a gradient that is not finite.

use potstill_model::Decoder;

use crate::batch::Batch;
use crate::error::{Error, SequenceId};
use crate::gradient::{GradientOptions, micro_batch_gradient};
use crate::gradients::Gradients;
use crate::micro_batch::MicroBatch;
use crate::optimizer::clip_global_norm;
use crate::settings::TrainSettings;
use crate::target::Target;

/// Checks the loss and the gradient's global norm of a step.
///
/// # Errors
/// [`Error::NotFinite`] with the rows of the global batch that are not finite by themselves.
pub(crate) fn check_finite(
    model: &Decoder,
    batch: &Batch,
    (loss, norm): (f64, f64),
    settings: &TrainSettings,
    step: u64,
) -> Result<(), Error> {
    for (quantity, value) in [("loss", loss), ("gradient norm", norm)] {
        if !value.is_finite() {
            return Err(Error::NotFinite {
                step,
                quantity,
                value,
                rows: rows_not_finite(model, batch, settings)?,
                batch: batch.signals.len(),
            });
        }
    }
    Ok(())
}

/// Computes the gradient of each sequence by itself and returns the sequences for which it or the loss is not
/// finite; all sequences if only their sum overflows.
fn rows_not_finite(
    model: &Decoder,
    batch: &Batch,
    settings: &TrainSettings,
) -> Result<Vec<SequenceId>, Error> {
    let options = GradientOptions::new(batch, settings, model);
    let mut rows = Vec::new();
    for signal in &batch.signals {
        let objective = &batch.objective;
        let (target, _) = Target::new(signal, objective.tail, objective.temperature)?;
        let micro_batch = MicroBatch::new(&[signal], vec![target], model.token_count())?;
        let mut gradients = Gradients::new();
        let sums = micro_batch_gradient(model, &micro_batch, &options, &mut gradients);
        let (norm, _) = clip_global_norm(&gradients, 0.0);
        if !(sums.loss.is_finite() && norm.is_finite()) {
            rows.push(SequenceId::of(signal));
        }
    }
    match rows.is_empty() {
        true => Ok(batch.signals.iter().map(SequenceId::of).collect()),
        false => Ok(rows),
    }
}
