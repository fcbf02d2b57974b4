//! The predicted memory against tensors that are counted: weights, gradients and the optimizer's state of one step.

use burn::tensor::{DType, Device};
use potstill_datasets::SequenceLength;
use potstill_model::{
    AdapterLayers, AdapterPlan, Config, Decoder, Parameter, Role, named_parameters,
    parameter_shapes, with_adapter,
};
use potstill_student::{
    AdapterSettings, Arm, MemorySurroundings, MomentType, Optimizer, OptimizerKind, Precision,
    TrainSettings, Trainable, TrainedNumbers, TrainingMemory, batch_gradient, memory_advice, track,
};
use serde_json::json;

use crate::support::{settings, signals};

/// A model whose matrices are large enough for moments in 8 bits.
fn model(tied: bool) -> Decoder {
    let config = json!({
        "model_type": "qwen2", "vocab_size": 47, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": tied,
    });
    let config = Config::from_json(&config).unwrap();
    Decoder::init(&config, 3, DType::F32, &Device::flex()).unwrap()
}

fn numbers(parameter: &Parameter) -> u64 {
    parameter.shape().iter().product::<usize>() as u64
}

fn adapter() -> Option<AdapterSettings> {
    Some(AdapterSettings {
        rank: 3,
        rank_pattern: [("q_proj".to_owned(), 5)].into(),
        ..AdapterSettings::default()
    })
}

const SURROUNDINGS: MemorySurroundings = MemorySurroundings {
    replicas: 1,
    support: 4,
    // The optimizer's state is counted once.
    is_host: false,
    program: 1000,
};

const LENGTHS: [SequenceLength; 2] = [
    SequenceLength {
        tokens: 20,
        first_loss: Some(10),
    },
    SequenceLength {
        tokens: 12,
        first_loss: Some(7),
    },
];

#[test]
fn weights_gradients_and_moments_are_counted_exactly() {
    let cases = [
        settings(),
        TrainSettings {
            freeze: vec![
                "model.embed_tokens".to_owned(),
                "model.layers.*.mlp".to_owned(),
            ],
            ..settings()
        },
        TrainSettings {
            adapter: adapter(),
            ..settings()
        },
        TrainSettings {
            moments: MomentType::Bf16,
            ..settings()
        },
        TrainSettings {
            moments: MomentType::Int8,
            ..settings()
        },
        TrainSettings {
            optimizer: OptimizerKind::Muon,
            ..settings()
        },
    ];
    for (case, settings) in cases.iter().enumerate() {
        for tied in [true, false] {
            let mut model = model(tied);
            let config = model.config().clone();
            if let Some(adapter) = &settings.adapter {
                let plan = AdapterPlan {
                    rank: adapter.rank,
                    alpha: 6.0,
                    rslora: false,
                    targets: AdapterLayers::AllLinear,
                    rank_pattern: vec![("q_proj".to_owned(), 5)],
                    alpha_pattern: Vec::new(),
                };
                model = with_adapter(model, &plan, 1).unwrap();
            }
            let predicted = TrainingMemory::predict(&config, settings, &LENGTHS, &SURROUNDINGS);
            let counted = TrainedNumbers::of(&config, settings);
            let trainable = Trainable::of(&model, settings).unwrap();
            let all = named_parameters(&model);
            let whole: u64 = all.iter().map(|(_, parameter)| numbers(parameter)).sum();
            assert_eq!(counted.all + counted.adapter, whole, "case {case}");
            assert_eq!(counted.weights, 4 * whole, "case {case}");
            let trained = all
                .iter()
                .filter(|(name, _)| trainable.contains(&name.name));
            let trained: u64 = trained.map(|(_, parameter)| numbers(parameter)).sum();
            assert_eq!(counted.trained, trained, "case {case}");

            let tracked = track(model, &trainable);
            let data = signals(4, 47, 31);
            let result = batch_gradient(&tracked, &data, Arm::Student, settings, 1).unwrap();
            let stored: u64 = result
                .gradients
                .iter()
                .filter(|(name, _)| trainable.contains(name))
                .map(|(_, gradient)| numbers(gradient))
                .sum();
            assert_eq!(stored, trained, "case {case}");
            let mut optimizer = Optimizer::new(settings);
            let gradients = result.gradients.into_iter();
            let gradients = gradients.filter(|(name, _)| trainable.contains(name));
            let _next = optimizer.step(tracked, gradients.collect(), 1.0, 1e-3);
            let state = optimizer.tensors().unwrap().into_iter();
            let state = state.filter(|tensor| tensor.name != "step");
            let bytes: usize = state.map(|tensor| tensor.bytes()).sum();
            assert_eq!(counted.moments, bytes as u64, "case {case}, tied {tied}");
            assert_eq!(predicted.masters, 0);
            assert_eq!(predicted.program, 1000);
        }
    }
}

#[test]
fn bf16_halves_the_weights_and_adds_masters_of_what_is_trained() {
    let config = model(true).config().clone();
    let of = |settings: &TrainSettings| {
        TrainingMemory::predict(&config, settings, &LENGTHS, &SURROUNDINGS)
    };
    let (wide, narrow) = (
        of(&settings()),
        of(&TrainSettings {
            precision: Precision::Bf16,
            ..settings()
        }),
    );
    assert_eq!(narrow.weights, wide.weights / 2);
    assert_eq!(narrow.masters, wide.weights);
    assert_eq!(narrow.moments, wide.moments);
    assert!(narrow.activations < wide.activations);
    let mean = of(&TrainSettings {
        ema: Some(0.9),
        ..settings()
    });
    assert_eq!(mean.masters, wide.weights);
    // The first micro-batch of an adapter leaves no gradient of the head.
    let frozen = of(&TrainSettings {
        adapter: adapter(),
        ..settings()
    });
    assert!(frozen.gradients < wide.gradients / 2);
}

#[test]
fn parts_grow_with_what_they_depend_on() {
    let config = model(true).config().clone();
    let of = |settings: &TrainSettings, replicas| {
        let surroundings = MemorySurroundings {
            replicas,
            ..SURROUNDINGS
        };
        TrainingMemory::predict(&config, settings, &LENGTHS, &surroundings)
    };
    let one = of(&settings(), 1);
    assert_eq!(
        one.parts().iter().map(|(_, bytes)| bytes).sum::<u64>(),
        one.peak()
    );
    let two = of(&settings(), 2);
    // Replicas share the optimizer's state.
    assert_eq!(
        (two.weights, two.activations, two.moments),
        (2 * one.weights, 2 * one.activations, one.moments)
    );
    let larger = of(
        &TrainSettings {
            micro_batch: 4,
            ..settings()
        },
        1,
    );
    assert!(larger.activations > one.activations);
    // One micro-batch needs no sum.
    assert!(larger.gradients < one.gradients);
    let recomputed = of(
        &TrainSettings {
            recompute: true,
            micro_batch: 4,
            ..settings()
        },
        1,
    );
    assert!(recomputed.activations < larger.activations);
}

#[test]
fn advice_that_is_followed_fits() {
    let config = model(true).config().clone();
    let lengths = [SequenceLength {
        tokens: 64,
        first_loss: Some(4),
    }; 8];
    let before = TrainSettings {
        batch: 8,
        micro_batch: 8,
        chunk_rows: 512,
        ..settings()
    };
    let predict = |settings: &TrainSettings| {
        TrainingMemory::predict(&config, settings, &lengths, &SURROUNDINGS).peak()
    };
    let peak = predict(&before);
    for share in [0.9, 0.6, 0.4, 0.3] {
        let limit = (peak as f64 * share) as u64;
        let advice = memory_advice(&config, &before, &lengths, &SURROUNDINGS, limit);
        let last = advice.last().unwrap();
        assert!(last.memory.peak() <= limit, "{share}: {advice:?}");
        assert_eq!(predict(&last.settings), last.memory.peak());
        let peaks: Vec<u64> = advice.iter().map(|advice| advice.memory.peak()).collect();
        assert!(peaks.windows(2).all(|pair| pair[0] > pair[1]), "{peaks:?}");
        // Nothing is advised after a change that fits.
        let fitting = peaks.iter().filter(|peak| **peak <= limit).count();
        assert_eq!(fitting, 1, "{share}");
    }
    let fits = memory_advice(&config, &before, &lengths, &SURROUNDINGS, peak);
    assert!(fits.is_empty());
}

#[test]
fn shapes_are_those_of_the_parameters() {
    for tied in [true, false] {
        let model = model(tied);
        let shapes = parameter_shapes(model.config());
        let found: Vec<_> = named_parameters(&model)
            .into_iter()
            .map(|(name, parameter)| (name, parameter.shape()))
            .collect();
        assert_eq!(shapes, found);
        assert_eq!(
            shapes.iter().any(|(name, _)| name.role == Role::Head),
            !tied
        );
    }
}
