//! Batched generation agrees with the model without a cache; every invalid request is refused.

use std::ops::ControlFlow;

use burn::module::Module;
use burn::tensor::{DType, Device};
use potstill_model::{
    BatchLimits, Decoder, Error, GeneratedAnswer, Sampling, StopConditions, StopReason, generate,
    load,
};

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

fn run(
    model: &Decoder,
    prompts: &[Vec<u32>],
    eos: &[u32],
    sampling: &Sampling,
) -> Vec<GeneratedAnswer> {
    let seeds: Vec<u64> = (0..prompts.len() as u64).map(|row| 100 + row).collect();
    run_with(
        model,
        prompts,
        &StopConditions::at(eos),
        sampling,
        &seeds,
        &BatchLimits::default(),
    )
}

fn run_with(
    model: &Decoder,
    prompts: &[Vec<u32>],
    stop: &StopConditions<'_>,
    sampling: &Sampling,
    seeds: &[u64],
    limits: &BatchLimits,
) -> Vec<GeneratedAnswer> {
    try_generate(model, prompts, stop, sampling, seeds, limits).unwrap()
}

/// Generates without stopping early.
fn try_generate(
    model: &Decoder,
    prompts: &[Vec<u32>],
    stop: &StopConditions<'_>,
    sampling: &Sampling,
    seeds: &[u64],
    limits: &BatchLimits,
) -> Result<Vec<GeneratedAnswer>, Error> {
    let mut progress = |_| ControlFlow::Continue(());
    let answers = generate(model, prompts, stop, sampling, seeds, limits, &mut progress);
    answers.map(Option::unwrap)
}

/// Computes the log-probabilities of the next token after a text, without a cache.
fn logprobs(model: &Decoder, text: &[u32]) -> Vec<f64> {
    let hidden = model.hidden(ids(&[text], &model.device()));
    let [_, t, d] = hidden.dims();
    let logits = host(model.logits(hidden.reshape([t, d]).narrow(0, t - 1, 1)));
    let largest = logits.iter().fold(f64::MIN, |max, z| max.max(*z));
    let lse = largest + logits.iter().map(|z| (z - largest).exp()).sum::<f64>().ln();
    logits.iter().map(|z| z - lse).collect()
}

#[test]
fn generation_with_the_cache_agrees_with_the_model_without_it() {
    let model = lively(DType::F64);
    for (prompt, answer) in prompts().iter().zip(run(&model, &prompts(), &[], &GREEDY)) {
        assert_eq!(answer.ids.len(), 12);
        assert_eq!(answer.stop_reason, StopReason::Length);
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

/// Prompts of many lengths, among them equal prompts, prompts with equal beginnings of several pages, and a single token.
fn varied_prompts(vocab_size: u32) -> Vec<Vec<u32>> {
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

/// Batch limits under which the prompts are grouped into steps and pages differently.
fn varied_limits() -> Vec<BatchLimits> {
    let limits = |cache_tokens, sequences, prefill_rows, page_size| BatchLimits {
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

/// Asserts that answers are the same bit for bit when each prompt is run alone, together with others, in other orders and
/// under other limits.
fn check_independence(model: &Decoder, prompts: &[Vec<u32>], eos: &[u32], sampling: &Sampling) {
    let (count, stop) = (prompts.len(), StopConditions::at(eos));
    let seeds: Vec<u64> = (0..count as u64).map(|row| 100 + row).collect();
    let pick = |order: &[usize]| -> (Vec<Vec<u32>>, Vec<u64>) {
        order
            .iter()
            .map(|row| (prompts[*row].clone(), seeds[*row]))
            .unzip()
    };
    let alone: Vec<GeneratedAnswer> = (0..count)
        .map(|row| {
            let (prompts, seeds) = pick(&[row]);
            run_with(
                model,
                &prompts,
                &stop,
                sampling,
                &seeds,
                &BatchLimits::default(),
            )
            .remove(0)
        })
        .collect();
    let backwards: Vec<usize> = (0..count).rev().collect();
    let mixed: Vec<usize> = (0..count).map(|row| (row * 5 + 3) % count).collect();
    let some: Vec<usize> = (0..count).step_by(3).collect();
    for order in [(0..count).collect(), backwards, mixed, some] {
        for limits in varied_limits() {
            let (prompts, seeds) = pick(&order);
            let found = run_with(model, &prompts, &stop, sampling, &seeds, &limits);
            for (row, found) in order.iter().zip(found) {
                assert_eq!(found, alone[*row], "{sampling:?} {limits:?}, prompt {row}");
            }
        }
    }
}

#[test]
fn an_answer_does_not_depend_on_the_other_prompts_of_the_batch() {
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
            check_independence(&model, &varied_prompts(23), &[2, 11], &sampling);
        }
    }
}

#[test]
fn an_answer_of_a_real_model_does_not_depend_on_the_other_prompts_of_the_batch() {
    for (name, new_tokens) in [("stories260K", 24), ("SmolLM2-135M-Instruct", 6)] {
        let Some(dir) = real(&format!("models/{name}")) else {
            continue;
        };
        if !dir.join("model.safetensors").exists() {
            eprintln!("skipped: {name} has no weights here");
            continue;
        }
        let model = load(&dir, DType::F32, &Device::flex()).unwrap();
        let prompts = varied_prompts(500);
        let count = if new_tokens > 10 { prompts.len() } else { 4 };
        let sampling = Sampling {
            max_new_tokens: new_tokens,
            temperature: 0.8,
            ..Sampling::default()
        };
        check_independence(&model, &prompts[prompts.len() - count..], &[2], &sampling);
    }
}

/// Checkpoints of families whose caches differ: a window in some layers or in all, softcaps, sinks, layers without
/// positions, latent attention, experts, and rotary frequencies that depend on the length.
const TINY: [&str; 10] = [
    "mistral", "gemma2", "gemma3", "gptoss", "smollm3", "olmo2", "phi3", "qwen3moe", "dsv2lite",
    "dsv3",
];

#[test]
fn answers_of_every_family_do_not_depend_on_the_batch_and_agree_with_the_model_without_a_cache() {
    let sampling = Sampling {
        max_new_tokens: 40,
        temperature: 1.0,
        ..Sampling::default()
    };
    for name in TINY {
        let Some(dir) = real(&format!("tiny/{name}")) else {
            return;
        };
        let model = load(&dir, DType::F32, &Device::flex()).unwrap();
        // Windows are of 8 positions, and phi3 has other frequencies above 64.
        let mut prompts = varied_prompts(500);
        prompts.push(prompts.concat()[..90].to_vec());
        prompts.push(prompts.concat()[..91].to_vec());
        check_independence(&model, &prompts, &[2], &sampling);
        let mut largest = 0f64;
        let answers = run(&model, &prompts, &[2], &sampling);
        for (prompt, answer) in prompts.iter().zip(answers) {
            // Without a cache, phi3 takes the frequencies of the text's own length.
            if name == "phi3" && prompt.len() + 40 > 64 && prompt.len() + answer.ids.len() <= 64 {
                continue;
            }
            let text = [&prompt[..], &answer.ids].concat();
            for (logprob, exact) in
                answer
                    .logprobs
                    .iter()
                    .zip(answer_logprobs(&model, &text, prompt.len()))
            {
                largest = largest.max((f64::from(*logprob) - exact).abs());
            }
        }
        eprintln!("{name}: largest difference of logprobs with and without cache {largest:.1e}");
        assert!(largest < 1e-4, "{name}: {largest}");
    }
}

/// Computes the log-probability of each token of an answer, without a cache. The answer begins at position `start`.
fn answer_logprobs(model: &Decoder, text: &[u32], start: usize) -> Vec<f64> {
    let hidden = model.hidden(ids(&[text], &model.device()));
    let [_, t, d] = hidden.dims();
    let logits = host(model.logits(hidden.reshape([t, d]).narrow(0, start - 1, t - start)));
    let rows = logits.chunks(model.token_count()).zip(&text[start..]);
    let logprob = |(row, id): (&[f64], &u32)| {
        let largest = row.iter().fold(f64::MIN, |max, z| max.max(*z));
        let sum: f64 = row.iter().map(|z| (z - largest).exp()).sum();
        row[*id as usize] - largest - sum.ln()
    };
    rows.map(logprob).collect()
}

#[test]
fn a_long_answer_of_a_real_model_with_windows_agrees_with_the_model_without_a_cache() {
    let Some(dir) = real("models/gemma-3-270m/model.safetensors") else {
        return;
    };
    let model = load(dir.parent().unwrap(), DType::F32, &Device::flex()).unwrap();
    // Two samples of a prompt that is longer than the window of 512, and a prompt that its answer carries past it.
    let text: Vec<u32> = [2]
        .into_iter()
        .chain((0..719).map(|t| 500 + t * t * 37 % 3001))
        .collect();
    let prompts = [text.clone(), text.clone(), text[..500].to_vec()];
    let sampling = Sampling {
        max_new_tokens: 40,
        temperature: 0.7,
        ..Sampling::default()
    };
    let limits = |prefill_rows, page_size| BatchLimits {
        prefill_rows,
        page_size,
        ..BatchLimits::default()
    };
    let generate = |limits: &BatchLimits| {
        let stop = StopConditions::at(&[1]);
        run_with(&model, &prompts, &stop, &sampling, &[1, 2, 3], limits)
    };
    let answers = generate(&limits(512, 16));
    assert_eq!(answers, generate(&limits(100, 64)));
    let mut largest = 0f64;
    for (prompt, answer) in prompts.iter().zip(&answers) {
        let text = [&prompt[..], &answer.ids].concat();
        let exact = answer_logprobs(&model, &text, prompt.len());
        for (logprob, exact) in answer.logprobs.iter().zip(exact) {
            largest = largest.max((f64::from(*logprob) - exact).abs());
        }
    }
    eprintln!("largest difference of logprobs with and without cache {largest:.1e}");
    assert!(largest < 1e-4, "{largest}");
}

#[test]
fn a_prompt_computed_in_parts_agrees_with_the_model_without_a_cache() {
    let model = lively(DType::F64);
    for (prompt, answer) in
        varied_prompts(23)
            .iter()
            .zip(run(&model, &varied_prompts(23), &[], &GREEDY))
    {
        let mut text = prompt.clone();
        for (id, logprob) in answer.ids.iter().zip(&answer.logprobs) {
            let expected = logprobs(&model, &text);
            assert!((f64::from(*logprob) - expected[*id as usize]).abs() < 1e-5);
            text.push(*id);
        }
    }
}

#[test]
fn a_stop_string_ends_an_answer_wherever_token_boundaries_are() {
    let model = lively(DType::F32);
    let open = run(&model, &prompts(), &[], &GREEDY);
    // Every token spells two letters, so that a string can begin and end inside a token.
    let bytes = |id: u32| vec![b'a' + (id % 23) as u8, b'A' + (id % 23) as u8];
    let spelled: Vec<u8> = open[1].ids.iter().flat_map(|id| bytes(*id)).collect();
    let strings = [spelled[5..10].to_vec(), b"never".to_vec()];
    let stop = StopConditions {
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
        &BatchLimits::default(),
    );
    for (answer, open) in found.iter().zip(&open) {
        let spelled: Vec<u8> = open.ids.iter().flat_map(|id| bytes(*id)).collect();
        let at = spelled.windows(5).position(|part| part == strings[0]);
        let tokens = at.map_or(12, |at| (at + 5).div_ceil(2));
        assert_eq!(answer.ids, open.ids[..tokens]);
        let end = at.map_or(StopReason::Length, |_| StopReason::StopString);
        assert_eq!(answer.stop_reason, end);
    }
    assert_eq!(found[1].stop_reason, StopReason::StopString);
    let empty = StopConditions {
        strings: &[b"a".to_vec(), Vec::new()],
        ..stop
    };
    let limits = BatchLimits::default();
    let error = try_generate(&model, &prompts(), &empty, &GREEDY, &seeds, &limits);
    assert_eq!(
        error.unwrap_err().to_string(),
        "stop string 1 is empty and would end every answer at once\nhint: remove the empty string"
    );
}

#[test]
fn equal_seeds_give_equal_answers_and_other_seeds_give_others() {
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
fn an_eos_token_ends_an_answer_and_is_part_of_it() {
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
        assert_eq!(answer.stop_reason == StopReason::StopToken, stopped);
    }
}

#[test]
fn right_padding_does_not_change_the_states_before_it() {
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
fn half_precision_models_are_close_to_f32() {
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
    let (stop, limits) = (StopConditions::at(&[]), BatchLimits::default());
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
fn errors_of_refused_requests_name_the_problem() {
    let model = lively(DType::F32);
    let fail = |prompts: &[Vec<u32>], sampling: &Sampling, seeds: &[u64]| {
        let (stop, limits) = (StopConditions::at(&[]), BatchLimits::default());
        let answers = try_generate(&model, prompts, &stop, sampling, seeds, &limits);
        answers.unwrap_err().to_string()
    };
    assert_eq!(
        fail(&[vec![1], vec![]], &GREEDY, &[0, 0]),
        "prompt 1 has no tokens\nhint: begin the prompt with a token, such as the model's BOS token"
    );
    assert_eq!(
        fail(&[vec![1; 53]], &GREEDY, &[0]),
        "prompt 0 has 53 tokens, and with 12 new tokens it exceeds the context of 64\nhint: shorten the prompt, or generate fewer tokens"
    );
    assert_eq!(
        fail(&[vec![1, 23]], &GREEDY, &[0]),
        "prompt 0, position 1: token id 23 is outside the vocabulary of 23 tokens\nhint: use the tokenizer that belongs to the model"
    );
    assert_eq!(
        fail(&[vec![1]], &GREEDY, &[]),
        "there are 1 prompts but 0 seeds: each prompt needs a seed of its own"
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
        "sampling setting `temperature` is -1, but must be 0 (the likeliest token) or above"
    );
    assert_eq!(
        with(1.0, 0.0, 1),
        "sampling setting `top_p` is 0, but must be above 0 and at most 1"
    );
    assert_eq!(
        with(1.0, f64::NAN, 1),
        "sampling setting `top_p` is NaN, but must be above 0 and at most 1"
    );
    assert_eq!(
        with(1.0, 1.0, 0),
        "sampling setting `max_new_tokens` is 0, but must be at least 1"
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
        "sampling setting `top_k` is 0, but must be at least 1\nhint: leave `top_k` out to draw from all tokens"
    );
    for min_p in [-0.1, 1.1, f64::NAN] {
        assert_eq!(
            with(None, min_p),
            format!(
                "sampling setting `min_p` is {min_p}, but must be at least 0 (which excludes no token) and at most 1"
            )
        );
    }
    let sampling = Sampling {
        repetition_penalty: 0.0,
        ..GREEDY
    };
    assert_eq!(
        fail(&[vec![1]], &sampling, &[0]),
        "sampling setting `repetition_penalty` is 0, but must be above 0 (1 for no penalty)"
    );
    let limits = BatchLimits {
        prefill_rows: 0,
        ..BatchLimits::default()
    };
    let (prompts, stop) = ([vec![1]], StopConditions::at(&[]));
    let error = try_generate(&model, &prompts, &stop, &GREEDY, &[0], &limits);
    assert_eq!(
        error.unwrap_err().to_string(),
        "sampling setting `prefill_rows` is 0, but must be at least 1"
    );
}
