//! Potstill's measuring process: one workload in a process of its own, so that its memory and threads
//! are not shared with another one.

mod inputs;
mod loss;
mod operations;
mod profile;

use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::Context as _;
use potstill::datasets::{ChatTemplate, DistributionRow, Encoded, Signal};
use potstill::model::{
    BatchLimits, Int, Module, Sampling, StopConditions, Tensor, TensorData, device, generate,
};
use potstill::student::{Arm, Optimizer, batch_gradient, clip_global_norm};
use potstill::teacher::{Local, LocalSettings, Scoring, ScoringText, SignalSettings};

use self::inputs::{CHUNK_ROWS, dtype, loss_mask, open_model, settings, signal, wait};
use crate::machine::{own_processor_seconds, resident_bytes};
use crate::request::{MeasurementReply, MeasurementRequest, Workload};

pub(crate) use self::inputs::CHUNK_ROWS as CPU_CHUNK_ROWS;

/// Measures the requested workload.
///
/// # Errors
/// When the checkpoint does not load, or the type or the device is not supported.
pub(crate) fn answer(request: &MeasurementRequest) -> anyhow::Result<MeasurementReply> {
    let mut reply = match request.workload {
        Workload::Step => step(request),
        Workload::Prefill => prefill(request),
        Workload::Decode => decode(request),
        Workload::Capture => capture(request),
        Workload::Profile => profile::profile(request),
        Workload::Memory => memory(request),
        Workload::Loss => loss::loss(request),
        Workload::LossMemory => loss::loss_memory(request),
    }?;
    reply.peak_bytes = resident_bytes().1.filter(|_| request.device == "cpu");
    reply.cpu_s = own_processor_seconds().unwrap_or(0.0);
    reply.engine = concat!("potstill ", env!("CARGO_PKG_VERSION")).to_owned();
    Ok(reply)
}

/// Repeats `work` and gives the seconds of each repetition after the warm-up, and the results of all.
fn repeat<T>(
    request: &MeasurementRequest,
    mut work: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<(Vec<f64>, Vec<T>)> {
    let (mut seconds, mut results, mut spent) = (Vec::new(), Vec::new(), 0.0);
    let begin = Instant::now();
    for _ in 0..request.warm_up {
        if begin.elapsed().as_secs_f64() < request.budget_s {
            results.push(work()?);
        }
    }
    for _ in 0..request.repetitions {
        let began = Instant::now();
        results.push(work()?);
        let took = began.elapsed().as_secs_f64();
        seconds.push(took);
        spent += took;
        let long = spent > 3.0 * request.budget_s;
        if spent > request.budget_s && (seconds.len() >= 2 || long) {
            break;
        }
    }
    Ok((seconds, results))
}

/// A reply whose check is the first result: all implementations start from the same inputs.
fn reply_with_first(seconds: Vec<f64>, results: Vec<Vec<f64>>) -> MeasurementReply {
    MeasurementReply {
        seconds,
        check: results.into_iter().next().unwrap_or_default(),
        ..MeasurementReply::default()
    }
}

fn step(request: &MeasurementRequest) -> anyhow::Result<MeasurementReply> {
    let (model, device) = open_model(request)?;
    let (signals, settings) = ([signal(request)], settings(request));
    let mut optimizer = Optimizer::new(&settings);
    let mut model = Some(model.train());
    let before_bytes = resident_bytes().0;
    let (seconds, check) = repeat(request, || {
        // The model is moved, not cloned, so that the optimizer can work in place.
        let tracked = model.take().context("an earlier step failed")?;
        let result = batch_gradient(&tracked, &signals, Arm::Student, &settings, 1)?;
        let (_, scale) = clip_global_norm(&result.gradients, request.clip);
        let rate = request.learning_rate;
        model = Some(optimizer.step(tracked, result.gradients, scale, rate));
        wait(&device)?;
        Ok(result.loss)
    })?;
    Ok(MeasurementReply {
        seconds,
        check,
        before_bytes,
        ..MeasurementReply::default()
    })
}

fn memory(request: &MeasurementRequest) -> anyhow::Result<MeasurementReply> {
    let (model, device) = open_model(request)?;
    let model = model.train();
    let before_bytes = resident_bytes().0;
    let began = Instant::now();
    let (signals, settings) = ([signal(request)], settings(request));
    let result = batch_gradient(&model, &signals, Arm::Student, &settings, 1)?;
    wait(&device)?;
    Ok(MeasurementReply {
        seconds: vec![began.elapsed().as_secs_f64()],
        check: vec![result.loss],
        before_bytes,
        ..MeasurementReply::default()
    })
}

fn prefill(request: &MeasurementRequest) -> anyhow::Result<MeasurementReply> {
    let (model, device) = open_model(request)?;
    let (b, t) = (request.ids.len(), request.ids.first().map_or(0, Vec::len));
    let ids: Vec<i32> = request.ids.iter().flatten().map(|id| *id as i32).collect();
    let ids_bt = Tensor::<2, Int>::from_data(TensorData::new(ids, [b, t]), &device);
    let d = model.config().hidden_size;
    let (seconds, logits) = repeat(request, || {
        let hidden_nd = model.hidden(ids_bt.clone()).reshape([b * t, d]);
        let logits_nv = model.logits(hidden_nd.slice(b * t - 1..b * t));
        let some = logits_nv.slice([0..1, 0..8]).into_data();
        Ok(some.iter::<f64>().collect::<Vec<f64>>())
    })?;
    Ok(reply_with_first(seconds, logits))
}

fn decode(request: &MeasurementRequest) -> anyhow::Result<MeasurementReply> {
    let (model, _) = open_model(request)?;
    let sampling = Sampling {
        max_new_tokens: request.new_tokens,
        temperature: 0.0,
        ..Sampling::default()
    };
    let (stop, limits) = (StopConditions::at(&[]), BatchLimits::default());
    let seeds = vec![0; request.ids.len()];
    let (seconds, ids) = repeat(request, || {
        let mut go_on = |_: usize| ControlFlow::Continue(());
        let ids = &request.ids;
        let answers = generate(&model, ids, &stop, &sampling, &seeds, &limits, &mut go_on)?;
        let ids = answers.into_iter().flatten().flat_map(|answer| answer.ids);
        Ok(ids.map(f64::from).collect::<Vec<f64>>())
    })?;
    Ok(reply_with_first(seconds, ids))
}

fn capture(request: &MeasurementRequest) -> anyhow::Result<MeasurementReply> {
    let teacher = Local::open(LocalSettings {
        dir: request.model.clone(),
        dtype: dtype(request),
        device: device(&request.device)?,
        template: Some(ChatTemplate::plain()?),
        reasoning: None,
        licence: None,
        origin: None,
    })?;
    let text = |(index, ids): (usize, &Vec<u32>)| ScoringText {
        prompt_id: "bench".to_owned(),
        sample_index: index as u32,
        encoded: Encoded {
            token_ids: ids.clone(),
            loss_mask: loss_mask(ids.len()),
        },
    };
    let texts: Vec<ScoringText> = request.ids.iter().enumerate().map(text).collect();
    let scoring = Scoring {
        signals: SignalSettings {
            top_k: request.top_k,
            temperatures: Vec::new(),
            tail_draws: 0,
        },
        seed: 0,
        chunk_rows: CHUNK_ROWS,
    };
    let (seconds, means) = repeat(request, || {
        let mut go_on = |_: usize| ControlFlow::Continue(());
        let signals = teacher.score(&texts, &scoring, &mut go_on)?;
        let signals: Vec<Signal> = signals.into_iter().flatten().collect();
        let rows: Vec<DistributionRow<'_>> = signals.iter().flat_map(|s| &s.rows).collect();
        let mean = |value: fn(&DistributionRow<'_>) -> f32| {
            rows.iter().map(|row| f64::from(value(row))).sum::<f64>() / rows.len().max(1) as f64
        };
        let likeliest =
            |row: &DistributionRow<'_>| row.logprobs.first().copied().unwrap_or(f32::NAN);
        Ok(vec![mean(|row| row.entropy), mean(likeliest)])
    })?;
    Ok(reply_with_first(seconds, means))
}
