//! The time of a step by its parts: whole steps, and each part alone at the model's shapes.

use std::time::Instant;

use anyhow::Context as _;
use potstill::model::{Config, Device, Module, device};
use potstill::student::loss::Tail;
use potstill::student::{Arm, MicroBatch, Optimizer, Target, batch_gradient, clip_global_norm};

use super::inputs::{open_model, settings, signal, wait};
use super::operations::operations;
use crate::request::{MeasurementReply, MeasurementRequest};

/// Number of measured steps; the fastest counts.
const STEPS: usize = 3;

/// Measures a whole step and its parts, in seconds.
///
/// # Errors
/// Those of a training step.
pub(crate) fn profile(request: &MeasurementRequest) -> anyhow::Result<MeasurementReply> {
    let device = device(&request.device)?;
    let config = Config::from_dir(&request.model)?;
    let [step, clip, update, forward] = steps(request, &device)?;
    let n = request.ids.first().map_or(0, Vec::len);
    let operations = operations(&config, n, request.top_k, &device)?;
    let known = clip + update + operations.iter().map(|(_, seconds)| seconds).sum::<f64>();
    let mut parts = vec![("the whole step".to_owned(), step)];
    parts.extend(operations);
    parts.push(("clipping".to_owned(), clip));
    parts.push(("AdamW".to_owned(), update));
    let rest = "the rest: embedding, residual sums, sums of gradients, overhead of the graph";
    parts.push((rest.to_owned(), step - known));
    parts.push((
        "(forward pass of the layers, of the above)".to_owned(),
        forward,
    ));
    let seconds = parts.first().map(|(_, seconds)| *seconds);
    Ok(MeasurementReply {
        seconds: seconds.into_iter().collect(),
        parts,
        ..MeasurementReply::default()
    })
}

/// Runs whole steps and gives the fewest seconds of the whole, of clipping, of the optimizer, and of the
/// layers' forward pass.
fn steps(request: &MeasurementRequest, device: &Device) -> anyhow::Result<[f64; 4]> {
    let (model, _) = open_model(request)?;
    let (signal, settings) = (signal(request), settings(request));
    let (target, _) = Target::new(&signal, Tail::Bucket, 1.0)?;
    let block = MicroBatch::new(&[&signal], vec![target], model.token_count())?;
    let signals = [signal];
    let mut optimizer = Optimizer::new(&settings);
    let mut model = Some(model.train());
    let mut fastest = [f64::INFINITY; 4];
    // The first step is not representative: there are no moments yet, and all memory is new.
    for _ in 0..=STEPS {
        let tracked = model.take().context("an earlier step failed")?;
        let mut watch = Stopwatch::start();
        let result = batch_gradient(&tracked, &signals, Arm::Student, &settings, 1)?;
        wait(device)?;
        let gradient = watch.lap();
        let (_, scale) = clip_global_norm(&result.gradients, request.clip);
        wait(device)?;
        let clip = watch.lap();
        let moved = optimizer.step(tracked, result.gradients, scale, request.learning_rate);
        wait(device)?;
        let update = watch.lap();
        let hidden = block.hidden(&moved);
        wait(device)?;
        let forward = watch.lap();
        drop(hidden);
        let seconds = [gradient + clip + update, clip, update, forward];
        for (fastest, seconds) in fastest.iter_mut().zip(seconds) {
            *fastest = fastest.min(seconds);
        }
        model = Some(moved);
    }
    Ok(fastest)
}

/// Measures consecutive intervals.
struct Stopwatch(Instant);

impl Stopwatch {
    fn start() -> Stopwatch {
        Stopwatch(Instant::now())
    }

    /// Seconds since the start or the last lap.
    fn lap(&mut self) -> f64 {
        let began = std::mem::replace(&mut self.0, Instant::now());
        (self.0 - began).as_secs_f64()
    }
}
