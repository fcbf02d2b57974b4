//! Twenty steps of training against PyTorch's. `golden/curves.py` writes the model, the batch and PyTorch's losses.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device};
use potstill_datasets::range::FilePath;
use potstill_datasets::{Signal, SignalRow};
use potstill_student::{
    AdapterSettings, Arm, MomentType, Objective, OptimizerKind, Precision, ScheduleShape,
    TrainSettings,
};
use serde::Deserialize;

use crate::support::train_on;

/// Content of `curves.json`.
#[derive(Deserialize)]
struct Golden {
    settings: GoldenSettings,
    batch: Vec<Sequence>,
    curves: BTreeMap<String, Curve>,
    /// Largest relative difference of PyTorch's losses under bf16 autocast from those in f32.
    band: f64,
}

#[derive(Deserialize)]
struct GoldenSettings {
    steps: u64,
    rate: f64,
    min_rate: f64,
    warmup: f64,
    decay: f64,
    weight_decay: f64,
    clip: f64,
}

#[derive(Deserialize)]
struct Sequence {
    token_ids: Vec<u32>,
    loss_mask: Vec<bool>,
    rows: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    tail_logprob: f32,
    entropy: f32,
}

#[derive(Deserialize, Default)]
struct Curve {
    losses: Vec<f64>,
    gradient_norms: Vec<f64>,
}

fn folder(name: &str) -> PathBuf {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/curves");
    golden.join(name)
}

fn golden() -> Golden {
    serde_json::from_slice(&std::fs::read(folder("curves.json")).unwrap()).unwrap()
}

impl Golden {
    fn signals(&self) -> Vec<Signal> {
        let row = |row: &Row| SignalRow {
            ids: row.ids.clone(),
            logprobs: row.logprobs.clone(),
            tail_logprob: row.tail_logprob,
            entropy: row.entropy,
            log_z_at: Vec::new(),
            draw_ids: Vec::new(),
            draw_counts: Vec::new(),
        };
        let signal = |(index, sequence): (usize, &Sequence)| Signal {
            prompt_id: format!("p{index}"),
            sample_index: 0,
            token_ids: sequence.token_ids.clone(),
            loss_mask: sequence.loss_mask.clone(),
            rows: sequence.rows.iter().map(row).collect(),
            provenance: 0,
        };
        self.batch.iter().enumerate().map(signal).collect()
    }

    /// Settings of PyTorch's side: each step learns from all sequences.
    fn settings(&self) -> TrainSettings {
        TrainSettings {
            steps: Some(self.settings.steps),
            batch: self.batch.len(),
            micro_batch: self.batch.len(),
            learning_rate: Some(self.settings.rate),
            min_learning_rate: self.settings.min_rate,
            warmup: self.settings.warmup,
            decay: self.settings.decay,
            weight_decay: self.settings.weight_decay,
            clip: self.settings.clip,
            objective: Objective::default(),
            checkpoint_every: 100,
            ..TrainSettings::default()
        }
    }

    /// Trains with these settings and returns the loss and the gradient norm of each step.
    fn train(&self, settings: &TrainSettings) -> Curve {
        let data = self.signals();
        let mut start =
            potstill_model::load(&folder("start"), DType::F32, &Device::flex()).unwrap();
        if let Some(adapter) = settings.adapter.as_ref().and_then(|a| a.path.as_ref()) {
            start = potstill_model::load_adapter(start, adapter.as_ref()).unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let (trained, steps) = train_on(start, &data, Arm::Student, settings, dir.path(), 0);
        trained.unwrap();
        Curve {
            losses: steps.iter().map(|step| step.loss).collect(),
            gradient_norms: steps.iter().map(|step| step.gradient_norm).collect(),
        }
    }

    /// Trains with these settings and returns the largest relative differences of losses and gradient norms from a curve of
    /// PyTorch.
    fn difference(&self, settings: &TrainSettings, curve: &str) -> [f64; 2] {
        let (found, wanted) = (self.train(settings), &self.curves[curve]);
        [
            largest_difference(&found.losses, &wanted.losses),
            largest_difference(&found.gradient_norms, &wanted.gradient_norms),
        ]
    }
}

/// The largest relative difference.
fn largest_difference(found: &[f64], wanted: &[f64]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let differences = found.iter().zip(wanted).map(|(f, w)| (f - w).abs() / w);
    differences.fold(0.0, f64::max)
}

#[test]
fn adamw_in_f32_is_pytorchs() {
    let golden = golden();
    let whole = golden.settings();
    let split = TrainSettings {
        micro_batch: 3,
        ..golden.settings()
    };
    let packed = TrainSettings {
        packing: true,
        max_length: 64,
        micro_batch: 2,
        ..golden.settings()
    };
    let recomputed = TrainSettings {
        recompute: true,
        micro_batch: 3,
        ..golden.settings()
    };
    for settings in [whole, split, packed, recomputed] {
        let [losses, norms] = golden.difference(&settings, "f32");
        assert!(losses < 1e-5 && norms < 1e-4, "{losses:e} {norms:e}");
    }
}

#[test]
fn schedules_are_pytorchs() {
    let golden = golden();
    for (curve, schedule_shape) in [
        ("linear", ScheduleShape::Linear),
        ("constant", ScheduleShape::Constant),
        ("wsd", ScheduleShape::WarmupStableDecay),
    ] {
        let settings = TrainSettings {
            schedule_shape,
            ..golden.settings()
        };
        let [losses, norms] = golden.difference(&settings, curve);
        println!("{curve}: losses differ by {losses:e}, gradient norms by {norms:e}");
        assert!(losses < 1e-4 && norms < 1e-3, "{curve}");
    }
}

#[test]
fn muon_is_pytorchs() {
    let golden = golden();
    let settings = TrainSettings {
        optimizer: OptimizerKind::Muon,
        ..golden.settings()
    };
    let [losses, norms] = golden.difference(&settings, "muon");
    println!("muon: losses differ by {losses:e}, gradient norms by {norms:e}");
    assert!(losses < 1e-4 && norms < 1e-3);
}

/// Moments in fewer bits change the curve by less than bf16 autocast changes PyTorch's; the model's largest matrices have
/// fewer than 4,096 numbers, so that 8-bit moments are measured in the tests of the crate `potstill-kernels`.
#[test]
fn moments_in_bf16_stay_near_the_curve() {
    let golden = golden();
    let settings = TrainSettings {
        moments: MomentType::Bf16,
        ..golden.settings()
    };
    let [losses, norms] = golden.difference(&settings, "f32");
    println!("bf16 moments: losses differ by {losses:e}, gradient norms by {norms:e}");
    assert!(losses < golden.band);
}

/// A batch of `bf16.json`.
#[derive(Deserialize)]
struct Bf16Batch {
    batch: Vec<Sequence>,
    /// PyTorch's losses in f32.
    losses: Vec<f64>,
    /// Largest relative difference of its losses under bf16 autocast from them.
    band: f64,
}

/// bf16 changes the losses about as much as autocast changes PyTorch's: on average over these batches 1.19 times as much,
/// where autocast with a rounded embedding, which is the one difference that is known, has 1.09 times. A single batch says
/// little, since its largest difference is that of one step out of twenty.
#[test]
fn bf16_stays_in_pytorchs_band() {
    let mut golden = golden();
    let batches = std::fs::read(folder("bf16.json")).unwrap();
    let batches: Vec<Bf16Batch> = serde_json::from_slice(&batches).unwrap();
    let (mut found, mut bands) = (Vec::new(), Vec::new());
    for batch in batches {
        golden.batch = batch.batch;
        let settings = TrainSettings {
            precision: Precision::Bf16,
            ..golden.settings()
        };
        found.push(largest_difference(
            &golden.train(&settings).losses,
            &batch.losses,
        ));
        bands.push(batch.band);
    }
    println!("bf16: losses differ by {found:?} (bands {bands:?})");
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    assert!(mean(&found) < 1.25 * mean(&bands));
}

#[test]
fn adapters_learn_as_pefts() {
    let golden = golden();
    for (curve, name, rslora) in [("lora", "adapter", false), ("rslora", "rslora", true)] {
        let settings = TrainSettings {
            adapter: Some(AdapterSettings {
                path: Some(FilePath::from(folder(name))),
                rslora,
                ..AdapterSettings::default()
            }),
            ..golden.settings()
        };
        let [losses, norms] = golden.difference(&settings, curve);
        println!("{curve}: losses differ by {losses:e}, gradient norms by {norms:e}");
        assert!(losses < 1e-4 && norms < 1e-3, "{curve}");
    }
}
