//! Potstill's side: one measurement, in a process of its own so that memory and threads are its own.

use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::Context as _;
use potstill_datasets::{ChatTemplate, Encoded, Signal, SignalRow};
use potstill_model::{
    BatchLimits, Config, DType, Device, Error, Int, Llama, Module, Sampling, StopConditions,
    Tensor, TensorData, device, generate, load,
};
use potstill_student::{
    AdamW, Arm, Form, Objective, Overlong, Settings, clip_global_norm, window_gradient,
};
use potstill_teacher::{Local, LocalSettings, Scoring, Text};

use super::loss::{loss, loss_memory};
use super::profile::profile;
use super::quiet::{own_cpu_s, own_memory};
use super::request::{Float, How, Reply, Request, Work};

/// Rows of logits at a time; the default of `[train] chunk_rows` and what `collect` takes.
pub(crate) const CHUNK_ROWS: usize = 256;

/// Measures what is asked for.
///
/// # Errors
/// What stands in the way: a checkpoint that does not load, a type or a device that does not run.
pub(crate) fn answer(request: &Request) -> anyhow::Result<Reply> {
    let mut reply = match request.work {
        Work::Step => step(request),
        Work::Prefill => prefill(request),
        Work::Decode => decode(request),
        Work::Capture => capture(request),
        Work::Profile => profile(request),
        Work::Memory => memory(request),
        Work::Loss => loss(request),
        Work::LossMemory => loss_memory(request),
    }?;
    reply.peak_bytes = own_memory().1.filter(|_| request.device == "cpu");
    reply.cpu_s = own_cpu_s().unwrap_or(0.0);
    reply.engine = concat!("potstill ", env!("CARGO_PKG_VERSION")).to_owned();
    Ok(reply)
}

/// Seconds of each repetition behind the warm-up, and what all of them gave.
fn measured<T>(
    request: &Request,
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

/// The model; with random weights, alike each time, where the folder has none.
pub(crate) fn open(request: &Request) -> anyhow::Result<(Llama, Device)> {
    let device = device(&request.device)?;
    let dtype = dtype(request);
    let model = match load(&request.model, dtype, &device) {
        Err(Error::NoWeights { .. }) => {
            Llama::init(&Config::from_dir(&request.model)?, 0, dtype, &device)?
        }
        loaded => loaded?,
    };
    Ok((model, device))
}

pub(crate) fn dtype(request: &Request) -> DType {
    match request.dtype {
        Float::F32 => DType::F32,
        Float::Bf16 => DType::BF16,
    }
}

/// Waits until the device has done what it was given.
pub(crate) fn wait(device: &Device) -> anyhow::Result<()> {
    device.sync().context("the device does not finish its work")
}

fn step(request: &Request) -> anyhow::Result<Reply> {
    let (model, device) = open(request)?;
    let (signals, settings) = ([signal(request)], settings(request));
    let mut optimizer = AdamW::new(request.weight_decay);
    let mut model = Some(model.train());
    let before_bytes = own_memory().0;
    let (seconds, check) = measured(request, || {
        // Moved, not shared: an optimizer that works in place can.
        let tracked = model.take().context("a step before this one failed")?;
        let result = window_gradient(&tracked, &signals, Arm::Student, &settings, 1)?;
        let (_, scale) = clip_global_norm(&result.gradients, request.clip);
        let rate = request.learning_rate;
        model = Some(optimizer.step(tracked, result.gradients, scale, rate));
        wait(&device)?;
        Ok(result.loss)
    })?;
    Ok(Reply {
        seconds,
        check,
        before_bytes,
        ..Reply::default()
    })
}

fn memory(request: &Request) -> anyhow::Result<Reply> {
    let (model, device) = open(request)?;
    let model = model.train();
    let before_bytes = own_memory().0;
    let began = Instant::now();
    let (signals, settings) = ([signal(request)], settings(request));
    let result = window_gradient(&model, &signals, Arm::Student, &settings, 1)?;
    wait(&device)?;
    Ok(Reply {
        seconds: vec![began.elapsed().as_secs_f64()],
        check: vec![result.loss],
        before_bytes,
        ..Reply::default()
    })
}

fn prefill(request: &Request) -> anyhow::Result<Reply> {
    let (model, device) = open(request)?;
    let (b, t) = shape(&request.ids);
    let ids: Vec<i32> = request.ids.iter().flatten().map(|id| *id as i32).collect();
    let ids_bt = Tensor::<2, Int>::from_data(TensorData::new(ids, [b, t]), &device);
    let d = model.config().hidden_size;
    let (seconds, logits) = measured(request, || {
        let hidden_nd = model.hidden(ids_bt.clone()).reshape([b * t, d]);
        let logits_nv = model.logits(hidden_nd.slice(b * t - 1..b * t));
        let some = logits_nv.slice([0..1, 0..8]).into_data();
        Ok(some.iter::<f64>().collect::<Vec<f64>>())
    })?;
    Ok(reply(seconds, logits))
}

fn decode(request: &Request) -> anyhow::Result<Reply> {
    let (model, _) = open(request)?;
    let sampling = Sampling {
        max_new_tokens: request.new_tokens,
        temperature: 0.0,
        ..Sampling::default()
    };
    let (stop, limits) = (StopConditions::at(&[]), BatchLimits::default());
    let seeds = vec![0; request.ids.len()];
    let (seconds, ids) = measured(request, || {
        let mut go_on = |_: usize| ControlFlow::Continue(());
        let ids = &request.ids;
        let answers = generate(&model, ids, &stop, &sampling, &seeds, &limits, &mut go_on)?;
        let ids = answers.into_iter().flatten().flat_map(|answer| answer.ids);
        Ok(ids.map(f64::from).collect::<Vec<f64>>())
    })?;
    Ok(reply(seconds, ids))
}

fn capture(request: &Request) -> anyhow::Result<Reply> {
    let teacher = Local::open(LocalSettings {
        dir: request.model.clone(),
        dtype: dtype(request),
        device: device(&request.device)?,
        template: Some(ChatTemplate::plain()?),
        reasoning: None,
        licence: None,
    })?;
    let text = |(index, ids): (usize, &Vec<u32>)| Text {
        prompt_id: "bench".to_owned(),
        sample_index: index as u32,
        encoded: Encoded {
            token_ids: ids.clone(),
            loss_mask: loss_mask(ids.len()),
        },
    };
    let texts: Vec<Text> = request.ids.iter().enumerate().map(text).collect();
    let scoring = Scoring {
        top_k: request.top_k,
        temperatures: Vec::new(),
        tail_draws: 0,
        seed: 0,
        chunk_rows: CHUNK_ROWS,
    };
    let (seconds, means) = measured(request, || {
        let mut go_on = |_: usize| ControlFlow::Continue(());
        let signals = teacher.score(&texts, &scoring, &mut go_on)?;
        let rows: Vec<SignalRow> = signals.into_iter().flatten().flat_map(|s| s.rows).collect();
        let mean = |value: fn(&SignalRow) -> f32| {
            rows.iter().map(|row| f64::from(value(row))).sum::<f64>() / rows.len().max(1) as f64
        };
        let likeliest = |row: &SignalRow| row.logprobs.first().copied().unwrap_or(f32::NAN);
        Ok(vec![mean(|row| row.entropy), mean(likeliest)])
    })?;
    Ok(reply(seconds, means))
}

/// What is checked is the first result: both sides start from the same.
fn reply(seconds: Vec<f64>, results: Vec<Vec<f64>>) -> Reply {
    Reply {
        seconds,
        check: results.into_iter().next().unwrap_or_default(),
        ..Reply::default()
    }
}

fn shape(ids: &[Vec<u32>]) -> (usize, usize) {
    (ids.len(), ids.first().map_or(0, Vec::len))
}

/// Every position but the first, which nothing precedes.
fn loss_mask(tokens: usize) -> Vec<bool> {
    (0..tokens).map(|position| position > 0).collect()
}

/// The request's first text with its targets.
pub(crate) fn signal(request: &Request) -> Signal {
    let token_ids = request.ids.first().cloned().unwrap_or_default();
    let rows = request.support.iter().zip(&request.logprobs);
    let rows = rows.map(|(ids, logprobs)| SignalRow {
        ids: ids.clone(),
        logprobs: logprobs.clone(),
        tail_logprob: 0.05f32.ln(),
        entropy: 0.0,
        log_z_at: Vec::new(),
        draw_ids: Vec::new(),
        draw_counts: Vec::new(),
    });
    Signal {
        prompt_id: "bench".to_owned(),
        sample_index: 0,
        loss_mask: loss_mask(token_ids.len()),
        token_ids,
        rows: rows.collect(),
        provenance: 0,
    }
}

pub(crate) fn settings(request: &Request) -> Settings {
    Settings {
        steps: 1,
        batch: 1,
        micro_batch: 1,
        packing: false,
        learning_rate: request.learning_rate,
        warmup: 0,
        min_learning_rate: 0.0,
        weight_decay: request.weight_decay,
        clip: request.clip,
        objective: Objective::default(),
        form: match request.how {
            How::Plain => Form::Plain,
            _ => Form::Fused,
        },
        max_length: request.ids.first().map_or(0, Vec::len),
        overlong: Overlong::Drop,
        checkpoint_every: 1,
        chunk_rows: CHUNK_ROWS,
        ..Settings::default()
    }
}
