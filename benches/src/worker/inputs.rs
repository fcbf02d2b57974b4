//! The model, texts and settings of a request, as Potstill takes them.

use anyhow::Context as _;
use potstill::datasets::{Signal, SignalRow};
use potstill::model::{Config, DType, Decoder, Device, Error, device, load};
use potstill::student::{Form, Objective, Overlong, TrainSettings};

use crate::request::{FloatType, Implementation, MeasurementRequest};

/// Rows of logits at a time on a CPU: the default of `[train] chunk_rows` and the value that `collect`
/// uses.
pub(crate) const CHUNK_ROWS: usize = 256;

/// Opens the model. If the folder has no weights, they are random, and the same each time.
pub(super) fn open_model(request: &MeasurementRequest) -> anyhow::Result<(Decoder, Device)> {
    let device = device(&request.device)?;
    let dtype = dtype(request);
    let model = match load(&request.model, dtype, &device) {
        Err(Error::NoWeights { .. }) => {
            Decoder::init(&Config::from_dir(&request.model)?, 0, dtype, &device)?
        }
        loaded => loaded?,
    };
    Ok((model, device))
}

pub(super) fn dtype(request: &MeasurementRequest) -> DType {
    match request.float {
        FloatType::F32 => DType::F32,
        FloatType::Bf16 => DType::BF16,
    }
}

/// Waits until the device has finished its work.
pub(super) fn wait(device: &Device) -> anyhow::Result<()> {
    device.sync().context("the device does not finish its work")
}

/// Loss at every position except the first, which no token precedes.
pub(super) fn loss_mask(tokens: usize) -> Vec<bool> {
    (0..tokens).map(|position| position > 0).collect()
}

/// The form of the loss that the request asks for.
pub(super) fn loss_form(request: &MeasurementRequest) -> Form {
    match request.implementation {
        Implementation::Plain => Form::Plain,
        _ => Form::Fused,
    }
}

/// The request's first text with its targets.
pub(super) fn signal(request: &MeasurementRequest) -> Signal {
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

/// Settings of one training step on one text.
pub(super) fn settings(request: &MeasurementRequest) -> TrainSettings {
    TrainSettings {
        batch: 1,
        micro_batch: 1,
        packing: false,
        weight_decay: request.weight_decay,
        clip: request.clip,
        objective: Objective::default(),
        form: loss_form(request),
        max_length: request.ids.first().map_or(0, Vec::len),
        overlong: Overlong::Drop,
        checkpoint_every: 1,
        chunk_rows: CHUNK_ROWS,
        ..TrainSettings::default()
    }
}
