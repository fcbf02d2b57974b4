//! The training loop: read a window, its gradient, clip, step, report, checkpoint.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use burn::module::Module;
use potstill_datasets::{Arm, Order, Signal};
use potstill_model::Llama;
use serde::Serialize;

use crate::checkpoint::{self, Checkpoint, State};
use crate::error::Error;
use crate::gradient::window_gradient;
use crate::loss::Divergence;
use crate::objective::Objective;
use crate::optimizer::{AdamW, clip_global_norm};
use crate::schedule::learning_rate;
use crate::settings::{Overlong, Settings};
use crate::tensorboard::Events;

/// A line of `metrics.jsonl`. Losses are means over the window's loss tokens, in nats.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepMetrics {
    /// From 1.
    pub step: u64,
    /// What was minimised: the weighted sum of the terms in use.
    pub loss: f64,
    /// Forward KL to the distributions trained on (for `shuffled`, the shuffled ones), by the loss's tail
    /// and temperature.
    pub forward_kl: f64,
    /// −log q of the realised tokens.
    pub cross_entropy: f64,
    /// The loss's other divergences, by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub divergences: BTreeMap<String, f64>,
    /// The teacher's −log p of the realised tokens.
    pub teacher_nll: f64,
    /// Global norm before clipping.
    pub gradient_norm: f64,
    /// At this step.
    pub learning_rate: f64,
    /// Tokens that carried loss.
    pub loss_tokens: u64,
    /// Tokens that were read, prompts included.
    pub tokens: u64,
    /// `tokens` by the step's wall time.
    pub tokens_per_second: f64,
}

/// Rows that are not trained on as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Dropped {
    /// Over `max_length`, left out.
    pub dropped: u64,
    /// Over `max_length`, their end cut off.
    pub cut: u64,
}

/// Where training ended.
#[derive(Debug)]
pub struct Trained {
    /// Without autodiff.
    pub model: Llama,
    /// Steps made, earlier sittings included.
    pub step: u64,
    /// Whether all steps are made; if not, the next call goes on from the checkpoint.
    pub finished: bool,
    /// Rows over the length.
    pub overlong: Dropped,
}

/// Trains `start` as `arm` says on `row(0..len)`, in `dir`: `checkpoints/`, `metrics.jsonl`, and the same
/// numbers for TensorBoard in `tensorboard/`.
///
/// Where the loss has a temperature other than 1, a row's `log_z_at` holds one number, that of the
/// temperature.
///
/// Goes on from the newest checkpoint in `dir` as if it had never stopped: the same weights, bit for
/// bit. `on_step` is called after each step; when it breaks, a checkpoint is saved and the result is
/// not finished.
///
/// # Errors
/// What `row` gives; nothing to train on; a loss that is not finite; a checkpoint of other settings
/// or damaged; a full disk (what was saved before stays).
pub fn train(
    start: Llama,
    row: &mut dyn FnMut(usize) -> Result<Signal, potstill_datasets::Error>,
    len: usize,
    arm: Arm,
    settings: &Settings,
    dir: &Path,
    on_step: &mut dyn FnMut(&StepMetrics) -> ControlFlow<()>,
) -> Result<Trained, Error> {
    settings.objective.check()?;
    let (usable, overlong) = usable_rows(row, len, settings)?;
    let fresh = State {
        step: 0,
        position: 0,
        metrics_bytes: 0,
        events_bytes: 0,
        arm,
        settings: settings.identity(),
        rows: usable.len() as u64,
    };
    let (device, dtype) = (start.device(), start.dtype());
    let from = checkpoint::newest(dir, dtype, &device, &fresh, settings.weight_decay)?
        .unwrap_or_else(|| Checkpoint {
            state: fresh,
            model: start,
            optimizer: AdamW::new(settings.weight_decay),
        });
    let Checkpoint {
        mut state,
        model,
        mut optimizer,
    } = from;
    let mut metrics = open_metrics(dir, state.metrics_bytes)?;
    let (mut events, events_bytes) = Events::open(dir, state.events_bytes)?;
    state.events_bytes = events_bytes;
    let mut model = model.train();
    let mut order = Order::new(settings.seed, usable.len())?;

    while state.step < settings.steps {
        let began = Instant::now();
        let step = state.step + 1;
        let mut window = Vec::with_capacity(settings.batch);
        for position in state.position..state.position + settings.batch as u64 {
            let mut signal = row(usable[order.item(position)])?;
            cut(&mut signal, settings.max_length);
            window.push(signal);
        }
        let result = window_gradient(&model, &window, arm, settings, step)?;
        let (norm, scale) = clip_global_norm(&result.gradients, settings.clip);
        for (what, value) in [("loss", result.loss), ("gradient norm", norm)] {
            if !value.is_finite() {
                return Err(Error::NotFinite { step, what, value });
            }
        }
        let rate = learning_rate(settings, step);
        model = optimizer.step(model, result.gradients, scale, rate);

        let tokens: usize = window.iter().map(|signal| signal.token_ids.len()).sum();
        let per_row = 1.0 / result.terms.rows.max(1) as f64;
        let line = StepMetrics {
            step,
            loss: result.loss,
            forward_kl: result.terms.forward_kl * per_row,
            cross_entropy: result.terms.cross_entropy * per_row,
            divergences: others(&settings.objective, &result.terms.divergences, per_row),
            teacher_nll: result.teacher_nll * per_row,
            gradient_norm: norm,
            learning_rate: rate,
            loss_tokens: result.terms.rows as u64,
            tokens: tokens as u64,
            tokens_per_second: tokens as f64 / began.elapsed().as_secs_f64(),
        };
        state.metrics_bytes += metrics.write(&line)?;
        state.events_bytes += events.write(&line)?;
        state.step = step;
        state.position += settings.batch as u64;
        let stop = on_step(&line).is_break() && step < settings.steps;
        if stop || step == settings.steps || step.is_multiple_of(settings.checkpoint_every.max(1)) {
            metrics.sync()?;
            events.sync()?;
            checkpoint::save(dir, &state, &model.valid(), &optimizer)?;
        }
        if stop {
            break;
        }
    }
    Ok(Trained {
        model: model.valid(),
        step: state.step,
        finished: state.step >= settings.steps,
        overlong,
    })
}

/// Means of the divergences that have no field of their own.
fn others(objective: &Objective, sums: &[f64], per_row: f64) -> BTreeMap<String, f64> {
    let terms = objective.divergences();
    let named = terms.iter().zip(sums);
    named
        .filter(|(term, _)| term.divergence != Divergence::ForwardKl)
        .map(|(term, sum)| (term.divergence.name().to_owned(), sum * per_row))
        .collect()
}

/// Indices of the rows that are trained on. Reads every row once: lengths are in the rows alone.
fn usable_rows(
    row: &mut dyn FnMut(usize) -> Result<Signal, potstill_datasets::Error>,
    len: usize,
    settings: &Settings,
) -> Result<(Vec<usize>, Dropped), Error> {
    let mut usable = Vec::with_capacity(len);
    let mut overlong = Dropped::default();
    for index in 0..len {
        let mut signal = row(index)?;
        if signal.token_ids.len() > settings.max_length {
            if settings.overlong == Overlong::Drop {
                overlong.dropped += 1;
                continue;
            }
            cut(&mut signal, settings.max_length);
            if signal.rows.is_empty() {
                overlong.dropped += 1;
                continue;
            }
            overlong.cut += 1;
        }
        if signal.rows.is_empty() {
            let Signal {
                prompt_id,
                sample_index,
                ..
            } = signal;
            return Err(Error::NoLossPositions {
                row: index,
                prompt_id,
                sample_index,
            });
        }
        usable.push(index);
    }
    if usable.is_empty() {
        let max_length = settings.max_length;
        return Err(Error::NothingToTrain {
            rows: len,
            dropped: overlong.dropped as usize,
            max_length,
        });
    }
    Ok((usable, overlong))
}

/// Cuts a row to `max_length` tokens. Nothing is put in place of the EOS that goes with the rest.
fn cut(signal: &mut Signal, max_length: usize) {
    if signal.token_ids.len() > max_length {
        signal.token_ids.truncate(max_length);
        signal.loss_mask.truncate(max_length);
        let positions = signal.loss_positions().count();
        signal.rows.truncate(positions);
    }
}

struct Metrics {
    file: File,
    path: std::path::PathBuf,
}

/// Opens `metrics.jsonl` at the checkpoint's length: lines of a lost stretch are written again.
fn open_metrics(dir: &Path, bytes: u64) -> Result<Metrics, Error> {
    fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let path = dir.join("metrics.jsonl");
    let open = || {
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        file.set_len(bytes)?;
        Ok(file)
    };
    let file = open().map_err(Error::io(&path))?;
    Ok(Metrics { file, path })
}

impl Metrics {
    /// Appends a line; returns its length in bytes.
    fn write(&mut self, line: &StepMetrics) -> Result<u64, Error> {
        let mut text = serde_json::to_vec(line)
            .map_err(|why| Error::io(&self.path)(std::io::Error::other(why)))?;
        text.push(b'\n');
        self.file.write_all(&text).map_err(Error::io(&self.path))?;
        Ok(text.len() as u64)
    }

    fn sync(&self) -> Result<(), Error> {
        self.file.sync_all().map_err(Error::io(&self.path))
    }
}
