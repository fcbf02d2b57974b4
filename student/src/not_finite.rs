//! The rows that are to blame for a loss or a gradient that is not finite.

use potstill_datasets::{Arm, Signal};
use potstill_model::Decoder;

use crate::error::{Error, SequenceId};
use crate::gradient::{
    BatchGradient, GradientOptions, Gradients, batch_targets, micro_batch_gradient,
};
use crate::micro_batch::MicroBatch;
use crate::optimizer::clip_global_norm;
use crate::settings::TrainSettings;

/// Checks the loss and the gradient's global norm of a step.
///
/// # Errors
/// [`Error::NotFinite`] with the rows of the global batch that are not finite by themselves.
pub(crate) fn check_finite(
    model: &Decoder,
    signals: &[Signal],
    (result, norm): (&BatchGradient, f64),
    arm: Arm,
    settings: &TrainSettings,
    step: u64,
) -> Result<(), Error> {
    for (quantity, value) in [("loss", result.loss), ("gradient norm", norm)] {
        if !value.is_finite() {
            return Err(Error::NotFinite {
                step,
                quantity,
                value,
                rows: rows_not_finite(model, signals, arm, settings, step)?,
                batch: signals.len(),
            });
        }
    }
    Ok(())
}

/// Computes the gradient of each sequence by itself and returns the sequences for which it or the loss is not
/// finite; all sequences if only their sum overflows.
fn rows_not_finite(
    model: &Decoder,
    signals: &[Signal],
    arm: Arm,
    settings: &TrainSettings,
    step: u64,
) -> Result<Vec<SequenceId>, Error> {
    let objective = settings.objective.of_arm(arm);
    let (targets, _) = batch_targets(signals, &objective, arm, settings, step)?;
    let options = GradientOptions::new(&objective, &targets, settings, model);
    let mut rows = Vec::new();
    for (signal, target) in signals.iter().zip(targets) {
        let micro_batch = MicroBatch::new(&[signal], vec![target], model)?;
        let mut gradients = Gradients::new();
        let sums = micro_batch_gradient(model, &micro_batch, &options, &mut gradients);
        let (norm, _) = clip_global_norm(&gradients, 0.0);
        if !(sums.loss.is_finite() && norm.is_finite()) {
            rows.push(SequenceId::of(signal));
        }
    }
    match rows.is_empty() {
        true => Ok(signals.iter().map(SequenceId::of).collect()),
        false => Ok(rows),
    }
}
