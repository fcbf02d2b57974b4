//! The peak of the run's GPU, for the model FLOP utilisation.

use std::fs;
use std::path::PathBuf;

use super::Context;

/// Folder in which NVIDIA's driver describes each GPU, on Linux.
const DRIVER_FOLDER: &str = "/proc/driver/nvidia/gpus";

/// The operations that the run's device computes in a second at most, in the type of the training: those of the run file, or
/// those of the GPU by its name. `None` on a CPU, and for a GPU that is not known.
pub(super) fn peak_flops(context: &Context) -> anyhow::Result<Option<f64>> {
    if context.device == potstill_model::device("cpu")? {
        return Ok(None);
    }
    let settings = &context.run.settings;
    let stated = settings.run.peak_tflops.map(|peak| peak * 1e12);
    let of_driver = || potstill_student::peak_flops(&driver_name()?, settings.train.precision);
    Ok(stated.or_else(of_driver))
}

/// Name of the first GPU of NVIDIA's driver, such as `NVIDIA H200`.
fn driver_name() -> Option<String> {
    let entries = fs::read_dir(DRIVER_FOLDER).ok()?.flatten();
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    folders.sort();
    let text = fs::read_to_string(folders.first()?.join("information")).ok()?;
    model_name(&text).map(str::to_owned)
}

/// Finds the name in the driver's description of a GPU.
fn model_name(text: &str) -> Option<&str> {
    let name = text.lines().find_map(|line| line.strip_prefix("Model:"));
    name.map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_that_of_the_driver() {
        let text = "Model: \t\t NVIDIA H200\nIRQ:   \t\t 204\nGPU UUID: \t GPU-0\n";
        assert_eq!(model_name(text), Some("NVIDIA H200"));
        assert_eq!(model_name("IRQ: 204\n"), None);
    }
}
