//! The cost of the run's trainings, from the ledger and the metrics.

use potstill_datasets::{Manifest, read_checked_lines};
use potstill_eval::cost::{CostFacts, TrainingCost};
use potstill_eval::covered_seconds;
use serde::Deserialize;

use super::homes;
use crate::stages::memory::PEAK_COUNT;
use crate::stages::{Context, plan};

/// The figures of a line of `metrics.jsonl` that the cost depends on.
#[derive(Debug, Clone, Copy, Deserialize)]
struct StepCost {
    tokens: u64,
    tokens_per_second: f64,
}

/// Collects what the trainings took; `None` if none took time, as where all were taken from an earlier run.
pub(super) fn facts(context: &Context) -> anyhow::Result<Option<CostFacts>> {
    let ledger = context.dir.ledger()?;
    let (mut spans, mut peak) = (Vec::new(), None);
    let (mut tokens, mut step_seconds) = (0.0, 0.0);
    for (home, _) in homes(context)? {
        let folder = context.dir.path(&home);
        let (metrics, manifest) = (folder.join("metrics.jsonl"), Manifest::read(&folder)?);
        let Some(stage) = manifest.map(|m| m.stage).filter(|_| metrics.is_file()) else {
            continue;
        };
        let lines: Vec<_> = ledger.iter().filter(|line| line.stage == stage).collect();
        // A training of `tune` that became a model of the run took its time there.
        if lines.iter().all(|line| line.seconds == 0.0) {
            continue;
        }
        let times = lines.iter();
        spans.extend(times.map(|line| (line.started_unix_seconds as f64, line.seconds)));
        peak = peak.max(
            lines
                .iter()
                .filter_map(|line| line.counts.get(PEAK_COUNT))
                .max()
                .copied(),
        );
        let hint =
            "restore the file from a copy, or move the folder that it is in away and train again";
        read_checked_lines(&metrics, hint, &mut |step: StepCost| {
            tokens += step.tokens as f64;
            step_seconds += step.tokens as f64 / step.tokens_per_second.max(f64::MIN_POSITIVE);
        })?;
    }
    if spans.is_empty() {
        return Ok(None);
    }
    let is_cpu = context.device == potstill_model::device("cpu")?;
    let settings = &context.run.settings;
    let devices = if is_cpu { 1 } else { settings.train.replicas };
    Ok(Some(CostFacts {
        training: TrainingCost {
            device_hours: covered_seconds(spans) / 3600.0 * devices as f64,
            tokens,
            usd_per_hour: settings.run.usd_per_hour,
        },
        device: if is_cpu { "machine" } else { "GPU" }.to_owned(),
        tokens_per_second: match step_seconds > 0.0 {
            true => tokens / step_seconds,
            false => 0.0,
        },
        predicted_bytes: Some(plan::predicted_bytes(context)?),
        peak_bytes: peak,
    }))
}
