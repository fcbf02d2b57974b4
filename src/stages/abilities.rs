//! Settings that a device other than the CPU cannot compute, found before a run starts.

use potstill_model::{DType, Device, check_device_dtype};

use super::checkpoint;
use crate::run_file::{ConfigError, Loaded};

/// Refuses a run file that asks the device for something that it cannot do.
///
/// # Errors
/// A [`ConfigError`] that names the key.
pub(super) fn require(run: &Loaded, device: &Device) -> anyhow::Result<()> {
    if *device == potstill_model::device("cpu")? {
        return Ok(());
    }
    if let Some(teacher) = &run.settings.teacher {
        computes_in(
            run,
            &["teacher", "dtype"],
            device,
            checkpoint::dtype(teacher.dtype),
        )?;
    }
    let train = &run.settings.train;
    computes_in(
        run,
        &["train", "precision"],
        device,
        train.precision.dtype(),
    )?;
    if train.replicas > 1 {
        let what = "replicas are computed by threads of a CPU, and this device has one\nhint: set `replicas = 1`, or use `--device cpu`";
        return Err(run.problem(&["train", "replicas"], what).into());
    }
    if train
        .adapter
        .as_ref()
        .is_some_and(|adapter| adapter.base.is_some())
    {
        let what = "products with quantised weights are computed on a CPU alone\nhint: leave out `base`, or use `--device cpu`";
        return Err(run.problem(&["train", "adapter", "base"], what).into());
    }
    Ok(())
}

fn computes_in(
    run: &Loaded,
    key: &[&str],
    device: &Device,
    dtype: DType,
) -> Result<(), ConfigError> {
    check_device_dtype(device, dtype).map_err(|error| run.problem(key, error.to_string()))
}
