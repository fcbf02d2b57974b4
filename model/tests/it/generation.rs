//! Batched generation against the model without a cache, and every refused request.

use std::ops::ControlFlow;

use burn::module::Module;
use burn::tensor::{DType, Device};
use potstill_model::{End, Generated, Limits, Llama, Sampling, Stop, generate, load};

use crate::{host, ids, lively, real};

const GREEDY: Sampling = Sampling {
    max_new_tokens: 12,
    temperature: 0.0,
    top_k: None,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
};

fn prompts() -> Vec<Vec<u32>> {
    vec![
        vec![1, 5, 9],
        vec![4],
        vec![8, 8, 3, 2, 19, 7, 6],
        vec![22, 0],
    ]
}

fn run(model: &Llama, prompts: &[Vec<u32>], eos: &[u32], sampling: &Sampling) -> Vec<Generated> {
    let seeds: Vec<u64> = (0..prompts.len() as u64).map(|row| 100 + row).collect();
    run_with(
        model,
        prompts,
        &Stop::at(eos),
        sampling,
        &seeds,
        &Limits::default(),
    )
}

fn run_with(
    model: &Llama,
    prompts: &[Vec<u32>],
    stop: &Stop<'_>,
    sampling: &Sampling,
    seeds: &[u64],
    limits: &Limits,
) -> Vec<Generated> {
    let mut forward = |_| ControlFlow::Continue(());
    generate(model, prompts, stop, sampling, seeds, limits, &mut forward)
        .unwrap()
        .unwrap()
}

/// Log-probabilities after a text, without a cache.
fn logprobs(model: &Llama, text: &[u32]) -> Vec<f64> {
    let hidden = model.hidden(ids(&[text], &model.device()));
    let [_, t, d] = hidden.dims();
    let logits = host(model.logits(hidden.reshape([t, d]).narrow(0, t - 1, 1)));
    let largest = logits.iter().fold(f64::MIN, |max, z| max.max(*z));
    let lse = largest + logits.iter().map(|z| (z - largest).exp()).sum::<f64>().ln();
    logits.iter().map(|z| z - lse).collect()
}

#[test]
fn the_cache_changes_nothing() {
    let model = lively(DType::F64);
    for (prompt, answer) in prompts().iter().zip(run(&model, &prompts(), &[], &GREEDY)) {
        assert_eq!(answer.ids.len(), 12);
        assert_eq!(answer.end, End::Length);
        let mut text = prompt.clone();
        for (id, logprob) in answer.ids.iter().zip(&answer.logprobs) {
            let expected = logprobs(&model, &text);
            let best = (0..expected.len()).max_by(|a, b| expected[*a].total_cmp(&expected[*b]));
            assert_eq!(*id as usize, best.unwrap());
            assert!((f64::from(*logprob) - expected[*id as usize]).abs() < 1e-5);
            text.push(*id);
        }
    }
}

/// Prompts of many lengths: equal ones, ones that begin alike over several pages, and single tokens.
fn crowd(vocab_size: u32) -> Vec<Vec<u32>> {
    let text = |seed: u32, length: u32| -> Vec<u32> {
        let id = |t| (seed * 7919 + t * t * 31 + t * 17 + 5) % vocab_size;
        (0..length).map(id).collect()
    };
    let mut prompts: Vec<Vec<u32>> = (0..7).map(|i| text(i, 1 + i * 5)).collect();
    for _ in 0..3 {
        prompts.push(text(3, 32));
        prompts.push(text(3, 33));
    }
    prompts.push([text(3, 20), text(9, 7)].concat());
    prompts
}

/// What shares a batch, and how it is run.
fn arrangements() -> Vec<Limits> {
    let limits = |cache_tokens, sequences, prefill_rows, page_size| Limits {
        cache_tokens,
        sequences,
        prefill_rows,
        page_size,
    };
    vec![
        limits(1 << 15, 64, 512, 16),
        limits(0, 64, 512, 16),
        limits(200, 5, 7, 4),
        limits(150, 3, 1, 1),
        limits(1000, 64, 30, 33),
    ]
}

/// The answers are the same, bit for bit, alone, together, in other orders and under other limits.
fn answers_stand_alone(model: &Llama, prompts: &[Vec<u32>], eos: &[u32], sampling: &Sampling) {
    let (count, stop) = (prompts.len(), Stop::at(eos));
    let seeds: Vec<u64> = (0..count as u64).map(|row| 100 + row).collect();
    let pick = |order: &[usize]| -> (Vec<Vec<u32>>, Vec<u64>) {
        order
            .iter()
            .map(|row| (prompts[*row].clone(), seeds[*row]))
            .unzip()
    };
    let alone: Vec<Generated> = (0..count)
        .map(|row| {
            let (prompts, seeds) = pick(&[row]);
            run_with(model, &prompts, &stop, sampling, &seeds, &Limits::default()).remove(0)
        })
        .collect();
    let backwards: Vec<usize> = (0..count).rev().collect();
    let mixed: Vec<usize> = (0..count).map(|row| (row * 5 + 3) % count).collect();
    let some: Vec<usize> = (0..count).step_by(3).collect();
    for order in [(0..count).collect(), backwards, mixed, some] {
        for limits in arrangements() {
            let (prompts, seeds) = pick(&order);
            let found = run_with(model, &prompts, &stop, sampling, &seeds, &limits);
            for (row, found) in order.iter().zip(found) {
                assert_eq!(found, alone[*row], "{sampling:?} {limits:?}, prompt {row}");
            }
        }
    }
}

#[test]
fn an_answer_does_not_depend_on_what_shares_the_batch() {
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let model = lively(dtype);
        for (temperature, top_k, min_p, repetition_penalty) in [
            (0.0, None, 0.0, 1.0),
            (1.0, None, 0.0, 1.0),
            (1.0, Some(7), 0.02, 1.2),
        ] {
            let sampling = Sampling {
                max_new_tokens: 14,
                temperature,
                top_k,
                top_p: 0.9,
                min_p,
                repetition_penalty,
            };
            answers_stand_alone(&model, &crowd(23), &[2, 11], &sampling);
        }
    }
}

#[test]
fn an_answer_of_a_real_model_does_not_depend_on_what_shares_the_batch() {
    for (name, new_tokens) in [("stories260K", 24), ("SmolLM2-135M-Instruct", 6)] {
        let Some(dir) = real(&format!("models/{name}")) else {
            continue;
        };
        if !dir.join("model.safetensors").exists() {
            eprintln!("skipped: {name} has no weights here");
            continue;
        }
        let model = load(&dir, DType::F32, &Device::flex()).unwrap();
        let prompts = crowd(500);
        let count = if new_tokens > 10 { prompts.len() } else { 4 };
        let sampling = Sampling {
            max_new_tokens: new_tokens,
            temperature: 0.8,
            ..Sampling::default()
        };
        answers_stand_alone(&model, &prompts[prompts.len() - count..], &[2], &sampling);
    }
}

#[test]
fn pieces_of_a_prompt_are_the_prompt() {
    let model = lively(DType::F64);
    for (prompt, answer) in crowd(23).iter().zip(run(&model, &crowd(23), &[], &GREEDY)) {
        let mut text = prompt.clone();
        for (id, logprob) in answer.ids.iter().zip(&answer.logprobs) {
            let expected = logprobs(&model, &text);
            assert!((f64::from(*logprob) - expected[*id as usize]).abs() < 1e-5);
            text.push(*id);
        }
    }
}

#[test]
fn a_stop_string_ends_an_answer_wherever_tokens_are_cut() {
    let model = lively(DType::F32);
    let open = run(&model, &prompts(), &[], &GREEDY);
    // Token i spells two letters, so that a string can begin and end inside of tokens.
    let bytes = |id: u32| vec![b'a' + (id % 23) as u8, b'A' + (id % 23) as u8];
    let spelled: Vec<u8> = open[1].ids.iter().flat_map(|id| bytes(*id)).collect();
    let strings = [spelled[5..10].to_vec(), b"never".to_vec()];
    let stop = Stop {
        ids: &[],
        strings: &strings,
        token_bytes: &bytes,
    };
    let seeds = [100, 101, 102, 103];
    let found = run_with(
        &model,
        &prompts(),
        &stop,
        &GREEDY,
        &seeds,
        &Limits::default(),
    );
    for (answer, open) in found.iter().zip(&open) {
        let spelled: Vec<u8> = open.ids.iter().flat_map(|id| bytes(*id)).collect();
        let at = spelled.windows(5).position(|part| part == strings[0]);
        let tokens = at.map_or(12, |at| (at + 5).div_ceil(2));
        assert_eq!(answer.ids, open.ids[..tokens]);
        let end = at.map_or(End::Length, |_| End::StopString);
        assert_eq!(answer.end, end);
    }
    assert_eq!(found[1].end, End::StopString);
    let empty = Stop {
        strings: &[b"a".to_vec(), Vec::new()],
        ..stop
    };
    let mut forward = |_| ControlFlow::Continue(());
    let limits = Limits::default();
    let error = generate(
        &model,
        &prompts(),
        &empty,
        &GREEDY,
        &seeds,
        &limits,
        &mut forward,
    );
    assert_eq!(
        error.unwrap_err().to_string(),
        "stop string 1 is empty, which would end every answer at once: leave it out"
    );
}

#[test]
fn runs_repeat_bit_for_bit_and_seeds_differ() {
    let model = lively(DType::F32);
    let sampling = Sampling {
        temperature: 1.0,
        ..GREEDY
    };
    let first = run(&model, &prompts(), &[2], &sampling);
    assert_eq!(first, run(&model, &prompts(), &[2], &sampling));
    assert_eq!(
        first,
        run(&model.clone().train(), &prompts(), &[2], &sampling)
    );
    let same = vec![vec![1, 5, 9]; 6];
    let answers = run(&model, &same, &[2], &sampling);
    assert!(answers.iter().any(|answer| answer.ids != answers[0].ids));
}

#[test]
fn an_eos_ends_an_answer_and_is_kept() {
    let model = lively(DType::F32);
    let open = run(&model, &prompts(), &[], &GREEDY);
    let eos = open[1].ids[3];
    for (answer, open) in run(&model, &prompts(), &[eos], &GREEDY).iter().zip(&open) {
        let end = open
            .ids
            .iter()
            .position(|id| *id == eos)
            .map_or(12, |at| at + 1);
        assert_eq!(answer.ids, open.ids[..end]);
        assert_eq!(answer.logprobs.len(), answer.ids.len());
        let stopped = open.ids.contains(&eos);
        assert_eq!(answer.end == End::StopId, stopped);
    }
}

#[test]
fn right_padding_is_harmless() {
    for dtype in [DType::F32, DType::F64] {
        let model = lively(dtype);
        for model in [model.clone(), model.train()] {
            let short = model.hidden(ids(&[&[4, 9, 1]], &model.device()));
            let padded = model.hidden(ids(&[&[4, 9, 1, 0, 0], &[3, 1, 2, 6, 5]], &model.device()));
            let start = padded.narrow(0, 0, 1).narrow(1, 0, 3);
            for (a, b) in host(short).iter().zip(host(start)) {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
    }
}

#[test]
fn half_precision_models_run() {
    let wide = lively(DType::F32);
    for dtype in [DType::BF16, DType::F16] {
        let model = lively(dtype);
        let answers = run(&model, &prompts(), &[], &GREEDY);
        assert!(answers.iter().all(|answer| answer.ids.len() == 12));
        let text = [1u32, 5, 9, 4, 4, 17];
        for (a, b) in logprobs(&model, &text).iter().zip(logprobs(&wide, &text)) {
            assert!((a - b).abs() < 0.3, "{dtype:?}: {a} {b}");
        }
        let trained = model.train();
        assert_eq!(
            trained.hidden(ids(&[&text], &trained.device())).dtype(),
            dtype
        );
    }
}

#[test]
fn progress_counts_tokens_and_can_stop() {
    let model = lively(DType::F32);
    let mut seen = Vec::new();
    let mut watch = |tokens| {
        seen.push(tokens);
        if seen.len() == 3 {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    };
    let (stop, limits) = (Stop::at(&[]), Limits::default());
    let stopped = generate(
        &model,
        &prompts(),
        &stop,
        &GREEDY,
        &[0; 4],
        &limits,
        &mut watch,
    );
    let stopped = stopped.unwrap();
    assert_eq!(stopped, None);
    assert_eq!(seen, [4, 8, 12]);
    assert_eq!(run(&model, &[], &[], &GREEDY), []);
}

#[test]
fn refused_requests_say_what_is_wrong() {
    let model = lively(DType::F32);
    let fail = |prompts: &[Vec<u32>], sampling: &Sampling, seeds: &[u64]| {
        let mut forward = |_| ControlFlow::Continue(());
        let (stop, limits) = (Stop::at(&[]), Limits::default());
        generate(
            &model,
            prompts,
            &stop,
            sampling,
            seeds,
            &limits,
            &mut forward,
        )
        .unwrap_err()
        .to_string()
    };
    assert_eq!(
        fail(&[vec![1], vec![]], &GREEDY, &[0, 0]),
        "prompt 1 has no tokens: a model needs at least one, such as its BOS token"
    );
    assert_eq!(
        fail(&[vec![1; 53]], &GREEDY, &[0]),
        "prompt 0 has 53 tokens, and 53 + 12 new ones exceed the context of 64: shorten the prompt or ask for fewer tokens"
    );
    assert_eq!(
        fail(&[vec![1, 23]], &GREEDY, &[0]),
        "prompt 0, position 1: token id 23 is outside of the vocabulary of 23: is this the model's own tokenizer?"
    );
    assert_eq!(
        fail(&[vec![1]], &GREEDY, &[]),
        "1 prompts came with 0 seeds: each sequence needs its own"
    );
    let with = |temperature, top_p, max_new_tokens| {
        let sampling = Sampling {
            temperature,
            top_p,
            max_new_tokens,
            ..GREEDY
        };
        fail(&[vec![1]], &sampling, &[0])
    };
    assert_eq!(
        with(-1.0, 1.0, 1),
        "sampling setting `temperature` is -1: it is 0 (the likeliest token) or above"
    );
    assert_eq!(
        with(1.0, 0.0, 1),
        "sampling setting `top_p` is 0: it is above 0 and at most 1"
    );
    assert_eq!(
        with(1.0, f64::NAN, 1),
        "sampling setting `top_p` is NaN: it is above 0 and at most 1"
    );
    assert_eq!(
        with(1.0, 1.0, 0),
        "sampling setting `max_new_tokens` is 0: it is at least 1"
    );
    let with = |top_k, min_p| {
        let sampling = Sampling {
            top_k,
            min_p,
            ..GREEDY
        };
        fail(&[vec![1]], &sampling, &[0])
    };
    assert_eq!(
        with(Some(0), 0.0),
        "sampling setting `top_k` is 0: it is at least 1; leave it out to draw from all tokens"
    );
    for (min_p, told) in [(-0.1, "-0.1"), (1.1, "1.1"), (f64::NAN, "NaN")] {
        assert_eq!(
            with(None, min_p),
            format!(
                "sampling setting `min_p` is {told}: it is at least 0 (which leaves no token out) and at most 1"
            )
        );
    }
    let sampling = Sampling {
        repetition_penalty: 0.0,
        ..GREEDY
    };
    assert_eq!(
        fail(&[vec![1]], &sampling, &[0]),
        "sampling setting `repetition_penalty` is 0: it is above 0; 1 leaves the logits as they are"
    );
    let limits = Limits {
        prefill_rows: 0,
        ..Limits::default()
    };
    let mut forward = |_| ControlFlow::Continue(());
    let error = generate(
        &model,
        &[vec![1]],
        &Stop::at(&[]),
        &GREEDY,
        &[0],
        &limits,
        &mut forward,
    );
    assert_eq!(
        error.unwrap_err().to_string(),
        "sampling setting `prefill_rows` is 0: it is at least 1"
    );
}
