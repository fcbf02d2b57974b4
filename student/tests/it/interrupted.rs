//! Every kind of training state survives an interruption: N steps end in the bits of k steps and the rest.

use std::ops::ControlFlow;
use std::path::Path;

use burn::tensor::{DType, Device};
use potstill_datasets::Signal;
use potstill_model::{Config, Decoder, quantized, with_adapter};
use potstill_student::{
    AdapterBase, AdapterSettings, Arm, GuardSettings, MomentType, OptimizerKind, Precision,
    StepMetrics, TrainSettings, TrainingInputs, TrainingPlan, TrainingResult, train,
};

use crate::support::{bits, scaled, settings, signals};

const STEPS: u64 = 8;

/// A random model of one layer, whose matrices have enough numbers for moments in 8 bits. Its width is a multiple of the
/// blocks of each type.
fn start(settings: &TrainSettings) -> Decoder {
    let base = settings.adapter.as_ref().and_then(|adapter| adapter.base);
    let width = match base {
        Some(AdapterBase::Q4K) => 256,
        _ => 64,
    };
    let config = format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 47, "hidden_size": {width},
        "intermediate_size": {width}, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": {}, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64, "hidden_act": "silu",
        "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2}}"#,
        width / 4
    );
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    let config = Config::from_dir(dir.path()).unwrap();
    let model = Decoder::init(&config, 3, DType::F32, &Device::flex()).unwrap();
    let model = scaled(model, 5.0);
    let model = match base {
        Some(base) => quantized(model, base.block_type()),
        None => model,
    };
    match &settings.adapter {
        Some(adapter) => with_adapter(model, &adapter.plan(), 1).unwrap(),
        None => model,
    }
}

/// Trains, and breaks after the step `stop_at`. Also returns the metrics of the steps.
fn run(
    dir: &Path,
    data: &[Signal],
    settings: &TrainSettings,
    stop_at: u64,
) -> (
    Result<TrainingResult, potstill_student::Error>,
    Vec<StepMetrics>,
) {
    let mut steps = Vec::new();
    let mut on_step = |metrics: &StepMetrics| {
        steps.push(metrics.clone());
        match metrics.step == stop_at {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    // An arbitrary figure that follows from the weights.
    let mut dev = |model: &Decoder| Ok(f64::from(bits(model)[0] % 1000));
    let result = train(
        start(settings),
        TrainingInputs {
            len: data.len(),
            row: &mut |index: usize| Ok(data[index].clone()),
            lengths: None,
            dev: Some(&mut dev),
            collective: None,
            on_step: &mut on_step,
        },
        &TrainingPlan {
            arm: Arm::Student,
            settings,
            schedule: settings.schedule(data.len(), settings.learning_rate.unwrap()),
        },
        dir,
    );
    (result, steps)
}

fn base() -> TrainSettings {
    TrainSettings {
        steps: Some(STEPS),
        batch: 5,
        micro_batch: 2,
        checkpoint_every: 3,
        ..settings()
    }
}

fn adapter(base: Option<AdapterBase>) -> Option<AdapterSettings> {
    Some(AdapterSettings {
        rank: 2,
        base,
        ..AdapterSettings::default()
    })
}

/// Trainings that differ in what a checkpoint has to hold.
fn kinds() -> Vec<(&'static str, TrainSettings)> {
    let bf16 = || TrainSettings {
        precision: Precision::Bf16,
        ..base()
    };
    vec![
        (
            "muon",
            TrainSettings {
                optimizer: OptimizerKind::Muon,
                ..base()
            },
        ),
        (
            "muon in bf16 with a mean",
            TrainSettings {
                optimizer: OptimizerKind::Muon,
                ema: Some(0.8),
                ..bf16()
            },
        ),
        (
            "8-bit moments",
            TrainSettings {
                moments: MomentType::Int8,
                ..base()
            },
        ),
        (
            "8-bit moments in bf16",
            TrainSettings {
                moments: MomentType::Int8,
                ..bf16()
            },
        ),
        (
            "bf16 moments and a mean",
            TrainSettings {
                moments: MomentType::Bf16,
                ema: Some(0.8),
                keep_best: true,
                ..base()
            },
        ),
        (
            "adapter over q8_0",
            TrainSettings {
                adapter: adapter(Some(AdapterBase::Q8_0)),
                ..base()
            },
        ),
        (
            "adapter over q4_0 in bf16",
            TrainSettings {
                adapter: adapter(Some(AdapterBase::Q4_0)),
                ..bf16()
            },
        ),
        (
            "adapter over q4_k in bf16",
            TrainSettings {
                adapter: adapter(Some(AdapterBase::Q4K)),
                ..bf16()
            },
        ),
    ]
}

/// Bytes of the newest checkpoint's optimizer.
fn optimizer(dir: &Path) -> Vec<u8> {
    let name = format!("checkpoints/step-{STEPS:08}/optimizer.safetensors");
    std::fs::read(dir.join(name)).unwrap()
}

#[test]
fn each_kind_of_state_is_resumed_to_the_bit() {
    let data = signals(9, 47, 31);
    for (what, settings) in kinds() {
        for replicas in [1, 2] {
            let settings = TrainSettings {
                replicas,
                ..settings.clone()
            };
            let whole_dir = tempfile::tempdir().unwrap();
            let (whole, steps) = run(whole_dir.path(), &data, &settings, 0);
            let whole = whole.unwrap();
            let untrained = bits(&start(&settings));
            assert!(bits(&whole.model()) != untrained, "{what} learns nothing");
            assert!(
                steps
                    .iter()
                    .all(|step| step.loss.is_finite() && step.skipped.is_none()),
                "{what}"
            );
            for stop_at in [1, 3, 4, 7] {
                let dir = tempfile::tempdir().unwrap();
                let (part, _) = run(dir.path(), &data, &settings, stop_at);
                assert_eq!(part.unwrap().step, stop_at, "{what}");
                let (rest, _) = run(dir.path(), &data, &settings, 0);
                let context = format!("{what}, {replicas} replicas, stopped after {stop_at}");
                assert!(
                    bits(&rest.unwrap().model()) == bits(&whole.model()),
                    "{context}"
                );
                let optimizers = [dir.path(), whole_dir.path()].map(optimizer);
                assert!(optimizers[0] == optimizers[1], "{context}: the optimizer");
            }
        }
    }
}

/// Without 8-bit codes in the file, the kinds with 8-bit moments would test those in f32.
#[test]
fn moments_in_8_bits_are_in_the_checkpoint() {
    let data = signals(9, 47, 31);
    let (what, settings) = kinds().remove(2);
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), &data, &settings, 0).0.unwrap();
    let file = optimizer(dir.path());
    let has = |name: &[u8]| file.windows(name.len()).any(|window| window == name);
    assert!(has(b"m_codes.model.layers.0"), "{what}");
}

/// The learning rate is so large that the gradient jumps; after a return with a smaller one it does not.
#[test]
fn a_return_with_a_smaller_rate_recovers() {
    let data = signals(12, 47, 31);
    for replicas in [1, 2] {
        let settings = TrainSettings {
            steps: Some(16),
            batch: 4,
            micro_batch: 2,
            checkpoint_every: 5,
            warmup: 0.0,
            learning_rate: Some(0.1),
            replicas,
            guard: GuardSettings {
                skips: 0,
                returns: 2,
                rate_factor: 0.05,
                spike: 1.6,
            },
            ..settings()
        };
        let whole_dir = tempfile::tempdir().unwrap();
        let (whole, steps) = run(whole_dir.path(), &data, &settings, 0);
        let whole = bits(&whole.unwrap().model());
        let norms: Vec<f64> = steps.iter().map(|step| step.gradient_norm).collect();
        println!("{replicas} replicas: gradient norms {norms:.2?}");
        let mut skipped = steps.iter().filter_map(|step| step.skipped.as_ref());
        assert!(skipped.any(|why| why.contains("goes back")));
        let last = steps.last().unwrap();
        assert!(last.step == 16 && last.skipped.is_none());
        for stop_at in [2, 5, 8, 9, 10, 13] {
            let dir = tempfile::tempdir().unwrap();
            drop(run(dir.path(), &data, &settings, stop_at));
            let (rest, _) = run(dir.path(), &data, &settings, 0);
            assert!(
                bits(&rest.unwrap().model()) == whole,
                "{replicas} replicas, stopped after {stop_at}"
            );
        }
    }
}
