//! Trainings in bf16 with f32 masters, with frozen parameters and with the best checkpoint kept: they learn as in f32, and
//! are resumed bit for bit.

use std::ops::ControlFlow;
use std::path::Path;

use burn::tensor::DType;
use potstill_datasets::Signal;
use potstill_model::{Decoder, named_parameters, with_adapter};
use potstill_student::{
    AdapterSettings, Arm, DevFigures, Error, MomentType, Precision, StepMetrics, TrainSettings,
    Trainable, TrainingInputs, TrainingPlan, TrainingResult, checkpoint_model, dev_figures, train,
    with_mean,
};

use crate::support::{bits, numbers, settings, signals, tiny};

/// Trains the tiny model, breaks after the step `stop_at`, and collects the losses.
fn run(
    dir: &Path,
    data: &[Signal],
    settings: &TrainSettings,
    stop_at: u64,
    losses: &mut Vec<f64>,
) -> Result<TrainingResult, Error> {
    let mut row = |index: usize| Ok(data[index].clone());
    let mut on_step = |line: &StepMetrics| {
        losses.push(line.loss);
        match line.step == stop_at {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    // An arbitrary figure that follows from the weights.
    let mut dev = |model: &Decoder| {
        assert_eq!(model.dtype(), DType::F32);
        Ok(f64::from(bits(model)[0] % 1000))
    };
    let plan = TrainingPlan {
        arm: Arm::Student,
        settings,
        schedule: settings.schedule(data.len(), settings.learning_rate.unwrap()),
    };
    train(
        start(settings),
        TrainingInputs {
            len: data.len(),
            row: &mut row,
            lengths: None,
            dev: Some(&mut dev),
            collective: None,
            on_step: &mut on_step,
        },
        &plan,
        dir,
    )
}

#[test]
fn the_running_mean_of_a_checkpoint_is_that_of_all_steps() {
    let data = signals(9, 47, 31);
    for precision in [Precision::F32, Precision::Bf16] {
        for (freeze, adapter) in [
            (vec![], None),
            (vec!["model.embed_tokens".to_owned()], None),
            (vec![], Some(AdapterSettings::default())),
        ] {
            let settings = TrainSettings {
                steps: Some(5),
                checkpoint_every: 1,
                keep_checkpoints: 9,
                ema: Some(0.75),
                precision,
                freeze,
                adapter,
                ..settings()
            };
            let dir = tempfile::tempdir().unwrap();
            run(dir.path(), &data, &settings, 0, &mut Vec::new()).unwrap();
            let folder = |step| dir.path().join(format!("checkpoints/step-{step:08}"));
            let trained = |step| {
                let model = || Ok::<_, Error>(start(&settings));
                checkpoint_model(&folder(step), &burn::tensor::Device::flex(), model).unwrap()
            };
            let flat = |model: &Decoder| -> Vec<f64> {
                let parameters = named_parameters(model).into_iter();
                parameters.flat_map(|(_, p)| numbers(&p)).collect()
            };
            let mut expected = flat(&start(&settings));
            for step in 1..=5 {
                let now = flat(&trained(step));
                for (mean, now) in expected.iter_mut().zip(now) {
                    *mean = 0.75 * *mean + 0.25 * now;
                }
            }
            let mean = with_mean(&folder(5), trained(5)).unwrap();
            let largest = (flat(&mean).iter().zip(&expected))
                .map(|(found, expected)| (found - expected).abs())
                .fold(0.0, f64::max);
            assert!(largest < 1e-6, "{largest}");
            let figures = dev_figures(&folder(5)).unwrap().unwrap();
            let figure = |model: &Decoder| (bits(model)[0] % 1000) as f32;
            let expected = DevFigures {
                step: 5,
                trained: figure(&trained(5)),
                mean: figure(&mean),
            };
            // In bf16, frozen parameters are rounded while dev is measured, and the figure is of the first parameter.
            if precision == Precision::F32 || Trainable::of(&mean, &settings).unwrap().is_whole() {
                assert_eq!(figures, expected);
            }
        }
    }
    // A training without a mean has none.
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), &data, &settings(), 0, &mut Vec::new()).unwrap();
    let folder = dir.path().join("checkpoints/step-00000006");
    assert_eq!(dev_figures(&folder).unwrap(), None);
    let message = with_mean(&folder, tiny(DType::F32))
        .unwrap_err()
        .to_string();
    assert!(message.contains("no running mean"), "{message}");
}

/// The tiny model, with the adapter of the settings.
fn start(settings: &TrainSettings) -> Decoder {
    match &settings.adapter {
        Some(adapter) => with_adapter(tiny(DType::F32), &adapter.plan(), 1).unwrap(),
        None => tiny(DType::F32),
    }
}

fn twenty() -> TrainSettings {
    TrainSettings {
        steps: Some(20),
        checkpoint_every: 6,
        ..settings()
    }
}

/// Settings whose trainings must be resumed bit for bit.
fn kinds() -> Vec<(&'static str, TrainSettings)> {
    let bf16 = TrainSettings {
        precision: Precision::Bf16,
        ..twenty()
    };
    vec![
        ("f32", twenty()),
        ("bf16", bf16.clone()),
        (
            "bf16, frozen, recomputed",
            TrainSettings {
                freeze: vec!["model.embed_tokens".to_owned(), "model.layers.0".to_owned()],
                recompute: true,
                ..bf16.clone()
            },
        ),
        (
            "bf16, adapter",
            TrainSettings {
                adapter: Some(AdapterSettings {
                    rank: 2,
                    ..AdapterSettings::default()
                }),
                ..bf16.clone()
            },
        ),
        (
            "bf16, 8-bit moments, best",
            TrainSettings {
                moments: MomentType::Int8,
                keep_best: true,
                keep_checkpoints: 1,
                ..bf16
            },
        ),
    ]
}

#[test]
fn n_steps_equal_k_and_the_rest_for_each_k() {
    let data = signals(9, 47, 31);
    for (what, settings) in kinds() {
        let dir = tempfile::tempdir().unwrap();
        let whole = run(dir.path(), &data, &settings, 0, &mut Vec::new()).unwrap();
        for k in 1..20 {
            let dir = tempfile::tempdir().unwrap();
            let part = run(dir.path(), &data, &settings, k, &mut Vec::new()).unwrap();
            assert_eq!((part.step, part.finished), (k, false), "{what}");
            let rest = run(dir.path(), &data, &settings, 0, &mut Vec::new()).unwrap();
            assert!(
                bits(&rest.model()) == bits(&whole.model()),
                "{what}: {k} + rest"
            );
            assert_eq!(rest.best_step, whole.best_step, "{what}: {k} + rest");
        }
    }
}

#[test]
fn bf16_with_masters_learns_as_f32_does() {
    let data = signals(9, 47, 31);
    let dir = tempfile::tempdir().unwrap();
    // With this rate most updates are smaller than the rounding of a bf16 weight.
    let small = |precision| TrainSettings {
        precision,
        learning_rate: Some(5e-4),
        steps: Some(40),
        ..settings()
    };
    let (mut wide, mut narrow) = (Vec::new(), Vec::new());
    run(
        &dir.path().join("f32"),
        &data,
        &small(Precision::F32),
        0,
        &mut wide,
    )
    .unwrap();
    run(
        &dir.path().join("bf16"),
        &data,
        &small(Precision::Bf16),
        0,
        &mut narrow,
    )
    .unwrap();
    let fall = |losses: &[f64]| losses[..9].iter().sum::<f64>() - losses[31..].iter().sum::<f64>();
    let ratio = fall(&narrow) / fall(&wide);
    println!("the loss falls {ratio:.3} times as far in bf16 as in f32");
    assert!((0.95..1.05).contains(&ratio), "{ratio}");
}

#[test]
fn a_checkpoint_has_what_is_trained_and_gives_the_model_back() {
    let data = signals(9, 47, 31);
    for (what, settings) in kinds() {
        let dir = tempfile::tempdir().unwrap();
        let trained = run(dir.path(), &data, &settings, 0, &mut Vec::new()).unwrap();
        let checkpoint = dir.path().join("checkpoints/step-00000020");
        let start = || Ok::<_, Error>(tiny(DType::F32));
        let device = tiny(DType::F32).device();
        let model = checkpoint_model(&checkpoint, &device, start).unwrap();
        // The checkpoint's model has the frozen parameters as they were at the start, and the result has them rounded.
        let trainable = Trainable::of(&model, &settings).unwrap();
        let values = |model: &Decoder| -> Vec<Vec<f64>> {
            let parameters = named_parameters(model).into_iter();
            let trained = parameters.filter(|(name, _)| trainable.contains(&name.name));
            trained.map(|(_, parameter)| numbers(&parameter)).collect()
        };
        assert!(values(&model) == values(&trained.model()), "{what}");
        let is_whole = settings.freeze.is_empty() && settings.adapter.is_none();
        assert_eq!(
            checkpoint.join("model.safetensors").exists(),
            is_whole,
            "{what}"
        );
        assert_eq!(
            checkpoint.join("trained.safetensors").exists(),
            !settings.freeze.is_empty(),
            "{what}"
        );
    }
}

#[test]
fn the_best_checkpoint_is_kept_beside_the_last() {
    let data = signals(9, 47, 31);
    let settings = TrainSettings {
        keep_best: true,
        keep_checkpoints: 1,
        checkpoint_every: 2,
        ..twenty()
    };
    let dir = tempfile::tempdir().unwrap();
    let trained = run(dir.path(), &data, &settings, 0, &mut Vec::new()).unwrap();
    let state = std::fs::read(dir.path().join("checkpoints/step-00000020/state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
    let dev = state["dev"].as_object().unwrap();
    assert_eq!(dev.len(), 10);
    let value = |step: u64| dev[&step.to_string()].as_f64().unwrap();
    let best = (1..=10)
        .map(|i| 2 * i)
        .min_by(|a, b| value(*a).total_cmp(&value(*b)));
    assert_eq!(trained.best_step, best);
    let folders = std::fs::read_dir(dir.path().join("checkpoints")).unwrap();
    let mut names: Vec<String> = folders
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let mut expected = vec![
        format!("step-{:08}", best.unwrap()),
        "step-00000020".to_owned(),
    ];
    expected.dedup();
    assert_eq!(names, expected);
}

#[test]
fn a_checkpoint_of_another_base_or_freeze_is_refused_and_kept() {
    let data = signals(9, 47, 31);
    let frozen = TrainSettings {
        freeze: vec!["model.embed_tokens".to_owned()],
        base: "a".to_owned(),
        ..settings()
    };
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), &data, &frozen, 2, &mut Vec::new()).unwrap();
    let mut others = vec![("base", frozen.clone()), ("freeze", frozen.clone())];
    others[0].1.base = "b".to_owned();
    others[1].1.freeze = vec!["model.layers.0".to_owned()];
    for (key, other) in others {
        let error = run(dir.path(), &data, &other, 0, &mut Vec::new()).unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains(&format!("other settings ({key})")),
            "{message}"
        );
    }
    assert!(
        run(dir.path(), &data, &frozen, 0, &mut Vec::new())
            .unwrap()
            .finished
    );
}

#[test]
fn a_truncated_optimizer_file_is_an_error_that_names_it() {
    let data = signals(9, 47, 31);
    let dir = tempfile::tempdir().unwrap();
    let settings = TrainSettings {
        precision: Precision::Bf16,
        ..settings()
    };
    run(dir.path(), &data, &settings, 4, &mut Vec::new()).unwrap();
    let path = dir
        .path()
        .join("checkpoints/step-00000004/optimizer.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let error = run(dir.path(), &data, &settings, 0, &mut Vec::new()).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("optimizer.safetensors"), "{message}");
    assert!(message.contains("remove the folder"), "{message}");
    std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
    assert!(
        run(dir.path(), &data, &settings, 0, &mut Vec::new())
            .unwrap()
            .finished
    );
}
