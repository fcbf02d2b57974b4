//! The rows that are to blame for a loss or a gradient that is not finite or jumps.

use potstill_model::Decoder;

use crate::batch::Batch;
use crate::error::{Error, SequenceId};
use crate::gradient::{GradientOptions, micro_batch_gradient};
use crate::gradients::Gradients;
use crate::guard::Fault;
use crate::micro_batch::MicroBatch;
use crate::optimizer::clip_global_norm;
use crate::settings::TrainSettings;
use crate::target::Target;

/// Returns the error about a fault of a step, with the rows of the global batch that are to blame.
///
/// # Errors
/// A row whose gradient cannot be computed.
pub(crate) fn blame(
    model: &Decoder,
    batch: &Batch,
    fault: Fault,
    settings: &TrainSettings,
    step: u64,
) -> Result<Error, Error> {
    let own = own_gradients(model, batch, settings)?;
    let all = batch.signals.len();
    Ok(match fault {
        Fault::NotFinite { quantity, value } => Error::NotFinite {
            step,
            quantity,
            value,
            rows: rows_with(&own, |row| !(row.loss.is_finite() && row.norm.is_finite())),
            batch: all,
        },
        Fault::Jump { norm, mean } => {
            let largest = own.iter().map(|row| row.norm).fold(0.0, f64::max);
            Error::GradientJump {
                step,
                norm,
                mean,
                rows: rows_with(&own, |row| row.norm >= LARGE_SHARE * largest),
                batch: all,
            }
        }
    })
}

/// Rows with at least this share of the largest gradient norm are named for a jump.
const LARGE_SHARE: f64 = 0.5;

/// Loss and gradient norm of a sequence by itself.
struct OwnGradient {
    sequence: SequenceId,
    loss: f64,
    norm: f64,
}

/// The sequences with a property; all if none has it by itself, such as if only their sum overflows.
fn rows_with(own: &[OwnGradient], property: impl Fn(&OwnGradient) -> bool) -> Vec<SequenceId> {
    let named = own.iter().filter(|row| property(row));
    let named: Vec<SequenceId> = named.map(|row| row.sequence.clone()).collect();
    match named.is_empty() {
        true => own.iter().map(|row| row.sequence.clone()).collect(),
        false => named,
    }
}

/// Computes the gradient of each sequence by itself.
fn own_gradients(
    model: &Decoder,
    batch: &Batch,
    settings: &TrainSettings,
) -> Result<Vec<OwnGradient>, Error> {
    let options = GradientOptions::new(batch, settings, model);
    let mut rows = Vec::new();
    for signal in &batch.signals {
        let objective = &batch.objective;
        let (target, _) = Target::new(signal, objective.tail, objective.temperature)?;
        let micro_batch = MicroBatch::new(&[signal], vec![target], model.token_count())?;
        let mut gradients = Gradients::new();
        let sums = micro_batch_gradient(model, &micro_batch, &options, &mut gradients);
        let (norm, _) = clip_global_norm(&gradients, 0.0);
        rows.push(OwnGradient {
            sequence: SequenceId::of(signal),
            loss: sums.loss,
            norm,
        });
    }
    Ok(rows)
}
