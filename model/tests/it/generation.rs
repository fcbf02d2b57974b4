//! Batched generation against the model without a cache, and every refused request.

use std::ops::ControlFlow;

use burn::module::Module;
use burn::tensor::DType;
use potstill_model::{Generated, Llama, Sampling, generate};

use crate::{host, ids, lively};

const GREEDY: Sampling = Sampling {
    max_new_tokens: 12,
    temperature: 0.0,
    top_k: None,
    top_p: 1.0,
    min_p: 0.0,
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
    let mut forward = |_| ControlFlow::Continue(());
    generate(model, prompts, eos, sampling, &seeds, &mut forward)
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
        assert!(!answer.finished);
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

#[test]
fn a_batch_equals_its_rows_alone() {
    for dtype in [DType::F32, DType::F64] {
        let model = lively(dtype);
        for (temperature, top_k, min_p) in
            [(0.0, None, 0.0), (1.0, None, 0.0), (1.0, Some(7), 0.02)]
        {
            let sampling = Sampling {
                temperature,
                top_k,
                top_p: 0.9,
                min_p,
                ..GREEDY
            };
            let together = run(&model, &prompts(), &[2, 11], &sampling);
            for (row, prompt) in prompts().into_iter().enumerate() {
                let seed = [100 + row as u64];
                let mut forward = |_| ControlFlow::Continue(());
                let alone = generate(&model, &[prompt], &[2, 11], &sampling, &seed, &mut forward)
                    .unwrap()
                    .unwrap()
                    .remove(0);
                assert_eq!(alone.ids, together[row].ids);
                assert_eq!(alone.finished, together[row].finished);
                for (a, b) in alone.logprobs.iter().zip(&together[row].logprobs) {
                    assert!((a - b).abs() < 1e-4);
                }
            }
        }
    }
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
        assert_eq!(answer.finished, open.ids.contains(&eos));
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
    let stopped = generate(&model, &prompts(), &[], &GREEDY, &[0; 4], &mut watch).unwrap();
    assert_eq!(stopped, None);
    assert_eq!(seen, [4, 8, 12]);
    assert_eq!(run(&model, &[], &[], &GREEDY), []);
}

#[test]
fn refused_requests_say_what_is_wrong() {
    let model = lively(DType::F32);
    let fail = |prompts: &[Vec<u32>], sampling: &Sampling, seeds: &[u64]| {
        let mut forward = |_| ControlFlow::Continue(());
        generate(&model, prompts, &[], sampling, seeds, &mut forward)
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
}
