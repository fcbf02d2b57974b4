//! The check of losses finds wrong losses, and reports no error for right ones.

use burn::module::Module;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_datasets::Signal;
use potstill_kernels::{EMPTY_NATS, LogQSum, LogitTransform, row_stats};
use potstill_model::{Decoder, Parameter, named_parameters};
use potstill_student::check::{LossCase, LossCheck, check_loss, trainer};
use potstill_student::loss::{CustomDivergence, Divergence, Tail, forward_kl};
use potstill_student::{
    BatchGradient, Error, Form, Gradients, LossSums, MicroBatch, Objective, Target, TrainSettings,
};

use crate::support::{real, signals, times};

fn case(objective: &Objective) -> LossCase {
    LossCase::random(objective.temperature, &Device::flex()).unwrap()
}

fn failed(checks: &[LossCheck]) -> Vec<&str> {
    let failed = checks.iter().filter(|check| !check.passed());
    failed.map(|check| check.comparison.as_str()).collect()
}

fn every_divergence() -> Vec<Divergence> {
    let (alpha, beta, head_mass) = (0.3, 0.4, 0.5);
    vec![
        Divergence::ForwardKl,
        Divergence::ReverseKl,
        Divergence::Jsd { beta },
        Divergence::SkewKl { alpha },
        Divergence::SkewReverseKl { alpha },
        Divergence::AdaptiveKl { head_mass },
        Divergence::TotalVariation,
        Divergence::Alpha { alpha },
    ]
}

fn objectives() -> Vec<Objective> {
    let mut all = Vec::new();
    for divergence in every_divergence() {
        for (tail, temperature) in [
            (Tail::Bucket, 1.0),
            (Tail::Bucket, 2.0),
            (Tail::Renormalize, 1.0),
            (Tail::Ignore, 1.0),
            (Tail::Draws, 1.0),
        ] {
            if tail != Tail::Draws || divergence.works_on_draws() {
                all.push(Objective {
                    tail,
                    temperature,
                    temperature_squared: temperature != 1.0,
                    ..Objective::of(divergence.clone())
                });
            }
        }
    }
    let smoothed = Objective {
        label_smoothing: 0.1,
        temperature: 2.0,
        ..Objective::mixed(0.0, 0.7)
    };
    let mixture = (every_divergence().into_iter()).fold(smoothed, |mixture, divergence| {
        mixture.with(divergence, 0.4)
    });
    all.push(mixture);
    all.push(Objective::mixed(0.0, 1.0));
    let smoothed = Objective {
        label_smoothing: 0.2,
        ..Objective::mixed(0.0, 1.0)
    };
    all.push(smoothed);
    all
}

/// Checks the trainer with every divergence, tail and temperature, alone and in a sum.
#[test]
fn the_trainer_passes_with_every_loss() {
    for objective in objectives() {
        let softcapped = LossCase::softcapped(objective.temperature, &Device::flex()).unwrap();
        for case in [case(&objective), softcapped] {
            let checks = check_loss(&objective, &case, &trainer).unwrap();
            for check in &checks {
                println!("{}: {:.1e}", check.comparison, check.difference);
            }
            assert_eq!(failed(&checks), [""; 0], "{objective:?}: {checks:?}");
        }
    }
}

/// A trainer that forgets the softcap, or takes padding for tokens, is found.
#[test]
fn a_loss_without_the_models_transform_is_found() {
    let objective = Objective::mixed(1.0, 0.5);
    let case = LossCase::softcapped(1.0, &Device::flex()).unwrap();
    let with_padding = |model: &Decoder, signals: &[Signal], settings: &TrainSettings| {
        trainer(
            &model.clone().with_token_count(usize::MAX),
            signals,
            settings,
        )
    };
    let checks = check_loss(&objective, &case, &with_padding).unwrap();
    assert!(
        failed(&checks)[0].starts_with("value, against the definition"),
        "{checks:?}"
    );
    let keys = case
        .model
        .config()
        .with_keys([("final_logit_softcapping", serde_json::json!(null))]);
    let uncapped = keys.unwrap();
    let without_softcap = |model: &Decoder, signals: &[Signal], settings: &TrainSettings| {
        let plain = Decoder::init(&uncapped, 0, model.dtype(), &Device::flex())?;
        let plain = crate::support::with_parameters_of(plain, &model.valid()).train();
        trainer(
            &plain.with_token_count(model.token_count()),
            signals,
            settings,
        )
    };
    let checks = check_loss(&objective, &case, &without_softcap).unwrap();
    assert!(
        failed(&checks)[0].starts_with("value, against the definition"),
        "{checks:?}"
    );
}

#[test]
fn the_trainer_passes_on_stories260k() {
    let Some(dir) = real("models/stories260K") else {
        return;
    };
    let model = potstill_model::load(&dir, DType::F32, &Device::flex()).unwrap();
    let case = LossCase {
        on_device: model.clone(),
        model,
        signals: signals(4, 512, 3),
        parameters: 6,
    };
    for divergence in every_divergence() {
        let checks = check_loss(&Objective::of(divergence), &case, &trainer).unwrap();
        assert_eq!(failed(&checks), [""; 0], "{checks:?}");
    }
}

fn negated(gradients: Gradients) -> Gradients {
    scaled(gradients, -1.0)
}

#[test]
fn a_sign_error_is_found() {
    let objective = Objective::default();
    let batch_loss = |model: &Decoder, signals: &[Signal], settings: &TrainSettings| {
        let mut result = trainer(model, signals, settings)?;
        result.gradients = negated(result.gradients);
        Ok::<_, Error>(result)
    };
    let checks = check_loss(&objective, &case(&objective), &batch_loss).unwrap();
    assert_eq!(
        failed(&checks),
        ["gradient, against finite differences of the definition"]
    );
}

/// The custom loss has the right value and a gradient with the wrong sign.
#[test]
fn a_sign_error_in_a_custom_loss_is_found() {
    fn wrong(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>) -> Tensor<1> {
        let kl_n = forward_kl(log_p_nk, log_q_nk);
        kl_n.clone().detach() * 2.0 - kl_n
    }
    fn right(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>) -> Tensor<1> {
        forward_kl(log_p_nk, log_q_nk)
    }
    let of = |function| {
        Objective::of(Divergence::Custom(CustomDivergence {
            name: "own".to_owned(),
            function: Some(function),
        }))
    };
    let run = |objective: Objective| check_loss(&objective, &case(&objective), &trainer).unwrap();
    assert_eq!(failed(&run(of(right))), [""; 0]);
    assert_eq!(
        failed(&run(of(wrong))),
        ["gradient, against finite differences of the definition"]
    );
}

/// Each micro-batch divides by its own number of rows, and the loss of the batch is the mean of these means.
#[test]
fn a_wrong_denominator_is_found() {
    let objective = Objective::default();
    let batch_loss = |model: &Decoder, signals: &[Signal], settings: &TrainSettings| {
        let parts = signals.chunks(settings.micro_batch.clamp(1, 2));
        let count = parts.len() as f64;
        let mut sum: Option<BatchGradient> = None;
        for part in parts {
            let part = trainer(model, part, settings)?;
            sum = Some(match sum {
                None => part,
                Some(sum) => BatchGradient {
                    loss: sum.loss + part.loss,
                    gradients: added(sum.gradients, part.gradients),
                    ..part
                },
            });
        }
        let mut sum = sum.unwrap();
        sum.loss /= count;
        sum.gradients = scaled(sum.gradients, 1.0 / count);
        Ok::<_, Error>(sum)
    };
    let checks = check_loss(&objective, &case(&objective), &batch_loss).unwrap();
    let failed = failed(&checks);
    for comparison in [
        "value, against the definition in f64",
        "gradient, against finite differences of the definition",
        "gradient in micro-batches, against the whole batch",
    ] {
        assert!(failed.contains(&comparison), "{checks:?}");
    }
}

fn added(a: Gradients, mut b: Gradients) -> Gradients {
    let add = |(name, a): (String, Parameter)| {
        let sum = match (a, b.remove(&name).unwrap()) {
            (Parameter::Matrix(a), Parameter::Matrix(b)) => Parameter::Matrix(a + b),
            (Parameter::Vector(a), Parameter::Vector(b)) => Parameter::Vector(a + b),
            _ => unreachable!(),
        };
        (name, sum)
    };
    a.into_iter().map(add).collect()
}

fn scaled(gradients: Gradients, by: f64) -> Gradients {
    let scale = |(name, parameter)| (name, times(parameter, by));
    gradients.into_iter().map(scale).collect()
}

/// Computes forward KL without the trainer, in one autodiff graph. With `shift` 1 the logits at t − 1 predict token t;
/// with 0, as with an unshifted mask, the logits at t do.
fn independent_loss(
    model: &Decoder,
    signals: &[Signal],
    shift: usize,
) -> Result<BatchGradient, Error> {
    let mut loss: Option<Tensor<1>> = None;
    let rows: usize = signals.iter().map(|signal| signal.rows.len()).sum();
    for signal in signals {
        let (target, _) = Target::new(signal, Tail::Bucket, 1.0)?;
        let k = target.rows.iter().map(|row| row.ids.len()).max().unwrap();
        let (mut ids, mut log_p) = (Vec::new(), Vec::new());
        for row in &target.rows {
            let empty = k - row.ids.len();
            ids.extend(row.ids.iter().map(|id| *id as i32));
            ids.extend(vec![-1; empty]);
            log_p.extend(row.p.iter().map(|p| p.ln()));
            log_p.extend(vec![EMPTY_NATS; empty]);
            log_p.push(row.tail.ln());
        }
        let micro_batch = MicroBatch::new(&[signal], vec![target], model.token_count())?;
        let hidden_nd = micro_batch.hidden(model);
        let device = hidden_nd.device();
        let at: Vec<i32> = signal
            .loss_positions()
            .map(|t| (t - shift) as i32)
            .collect();
        let n = at.len();
        let at_n = Tensor::<1, Int>::from_data(TensorData::new(at, [n]), (&device, DType::I32));
        let logits_nv = hidden_nd.select(0, at_n).matmul(model.head().transpose());
        let support_nk =
            Tensor::<2, Int>::from_data(TensorData::new(ids, [n, k]), (&device, DType::I32));
        let stats = row_stats(
            logits_nv.clone(),
            support_nk,
            &LogitTransform::default(),
            LogQSum::Omitted,
        );
        let log_q_nk = stats.log_q_nk();
        let log_p_nk = Tensor::<2>::from_data(
            TensorData::new(log_p, [n, k + 1]),
            (&device, log_q_nk.dtype()),
        );
        let part = forward_kl(log_p_nk, log_q_nk).sum() / rows as f64;
        loss = Some(match loss {
            Some(loss) => loss + part,
            None => part,
        });
    }
    let loss = loss.unwrap();
    let value = loss.to_data().iter::<f64>().next().unwrap();
    let mut tape = loss.backward();
    let mut gradients = Gradients::new();
    for (name, parameter) in named_parameters(model) {
        let gradient = match parameter {
            Parameter::Matrix(tensor) => tensor.grad_remove(&mut tape).map(Parameter::Matrix),
            Parameter::Vector(tensor) => tensor.grad_remove(&mut tape).map(Parameter::Vector),
            Parameter::Stack(tensor) => tensor.grad_remove(&mut tape).map(Parameter::Stack),
        };
        gradients.extend(gradient.map(|gradient| (name.name, gradient)));
    }
    Ok(BatchGradient {
        gradients,
        sums: LossSums::default(),
        loss: value,
        teacher_nll: 0.0,
        rescaled_rows: 0,
    })
}

#[test]
fn an_unshifted_mask_is_found_and_a_shifted_one_passes() {
    let objective = Objective::default();
    let run = |shift| {
        let batch_loss = move |model: &Decoder, signals: &[Signal], _: &TrainSettings| {
            independent_loss(model, signals, shift)
        };
        check_loss(&objective, &case(&objective), &batch_loss).unwrap()
    };
    assert_eq!(failed(&run(1)), [""; 0]);
    let checks = run(0);
    let failed = failed(&checks);
    assert!(
        failed.contains(&"value, against the definition in f64"),
        "{checks:?}"
    );
}

/// Only one of the two implementations is wrong.
#[test]
fn an_implementation_that_differs_is_found() {
    let objective = Objective::default();
    let batch_loss = |model: &Decoder, signals: &[Signal], settings: &TrainSettings| {
        let mut result = trainer(model, signals, settings)?;
        if settings.form == Form::Plain {
            result.gradients = scaled(result.gradients, 1.001);
        }
        Ok::<_, Error>(result)
    };
    let checks = check_loss(&objective, &case(&objective), &batch_loss).unwrap();
    assert_eq!(
        failed(&checks),
        ["gradient by tensor operations, against the kernels"]
    );
}

#[test]
fn objectives_that_cannot_be_trained_are_refused() {
    let message = |objective: Objective| objective.check().unwrap_err().to_string();
    let draws = Objective {
        tail: Tail::Draws,
        ..Objective::of(Divergence::ReverseKl)
    };
    contains(
        &message(draws),
        "reverse_kl has no unbiased gradient on tail draws",
    );
    let tempered = Objective {
        tail: Tail::Draws,
        temperature: 2.0,
        ..Objective::default()
    };
    contains(
        &message(tempered),
        "tail draws are from the distribution at temperature 1",
    );
    contains(&message(Objective::mixed(0.0, 0.0)), "no term");
    contains(
        &message(Objective::mixed(f64::NAN, 1.0)),
        "the weight of forward_kl is NaN",
    );
    contains(
        &message(Objective::of(Divergence::Jsd { beta: 1.5 })),
        "beta is 1.5",
    );
    let named = CustomDivergence {
        name: "forward_kl".to_owned(),
        function: None,
    };
    let twice = Objective::default().with(Divergence::Custom(named), 1.0);
    contains(&message(twice), "two divergences are named forward_kl");
    let lost = CustomDivergence {
        name: "own".to_owned(),
        function: None,
    };
    contains(
        &message(Objective::of(Divergence::Custom(lost))),
        "own has no function",
    );
}

fn contains(message: &str, part: &str) {
    assert!(message.contains(part), "{message}");
}

#[test]
fn signals_without_draws_or_normaliser_are_refused() {
    let signal = signals(1, 47, 5).remove(0);
    let message = |tail, temperature| {
        let error = Target::new(&signal, tail, temperature).unwrap_err();
        error.to_string()
    };
    assert!(message(Tail::Bucket, 2.0).contains("temperature 2"));
    assert!(message(Tail::Draws, 1.0).contains("tail_draws"));
}
