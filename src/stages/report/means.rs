//! Figures on dev of the trained models and of the running means of their weights, from the exported checkpoints.

use potstill_datasets::Manifest;
use potstill_eval::MeanOfWeights;

use crate::run_file::ExportedWeights;
use crate::stages::training::exported_checkpoint;
use crate::stages::{Context, start};

/// Reads the figures of every trained model of the run; none without `ema`.
pub(super) fn means(context: &Context) -> anyhow::Result<Vec<MeanOfWeights>> {
    let file = &context.run.settings;
    let mut means = Vec::new();
    if file.train.ema.is_none() {
        return Ok(means);
    }
    for variant in context.variants() {
        let home = format!("students/{variant}");
        let Some(trained) = Manifest::read(&context.dir.path(&home))? else {
            continue;
        };
        let folder = exported_checkpoint(&home, &trained.counts, file.export.weights);
        let figures = potstill_student::dev_figures(&context.dir.path(&folder))?;
        means.extend(figures.map(|figures| MeanOfWeights {
            name: variant.arm.first().into(),
            seed: start::seed(file, variant.seed_index),
            step: figures.step,
            trained: figures.trained.into(),
            mean: figures.mean.into(),
            exports_mean: file.export.weights == ExportedWeights::Mean,
        }));
    }
    Ok(means)
}
