use std::path::PathBuf;

use potstill_datasets::{FinishReason, Spelling, Usage};
use serde_json::Value;

use super::*;

fn completion(tokens: Vec<SampledToken>) -> Completion {
    Completion {
        prompt_id: "p".into(),
        sample_index: 1,
        reasoning: None,
        answer: String::new(),
        tool_calls: Vec::new(),
        finish_reason: FinishReason::Stop,
        usage: Usage {
            prompt_tokens: 2,
            completion_tokens: tokens.len() as u32,
        },
        tokens,
        provenance: 0,
    }
}

fn sampled(id: u32, logprob: f32, top: &[(u32, f32)]) -> SampledToken {
    let top = top.iter().map(|(id, logprob)| TopToken {
        id: Some(*id),
        bytes: Spelling::default(),
        logprob: *logprob,
    });
    SampledToken {
        bytes: Spelling::default(),
        id: Some(id),
        logprob,
        top: top.collect(),
    }
}

fn signal_of(token: SampledToken, top_k: usize) -> Result<Signal, String> {
    answer_signal(100, None, &[7, 8], &completion(vec![token]), top_k)
}

fn signal_with(
    tokenizer: &Tokenizer,
    prompt_ids: &[u32],
    completion: &Completion,
    top_k: usize,
) -> Result<Signal, String> {
    let spellings = Spellings::new(tokenizer);
    answer_signal(
        tokenizer.vocab_size(),
        Some(&spellings),
        prompt_ids,
        completion,
        top_k,
    )
}

#[test]
fn the_tail_is_the_remaining_mass_and_the_entropy_is_that_of_the_coarse_distribution() {
    let ln = |p: f64| p.ln() as f32;
    let token = sampled(9, ln(0.05), &[(4, ln(0.5)), (3, ln(0.25)), (5, ln(0.1))]);
    let signal = signal_of(token, 2).unwrap();
    assert_eq!(signal.token_ids, [7, 8, 9]);
    assert_eq!(signal.loss_mask, [false, false, true]);
    let row = signal.rows.row(0);
    // The two most likely tokens and the target token; token 5 is in the tail.
    assert_eq!(row.ids, [4, 3, 9]);
    assert!((f64::from(row.tail_logprob).exp() - 0.2).abs() < 1e-6);
    let entropy: f64 = [0.5_f64, 0.25, 0.05, 0.2].iter().map(|p| -p * p.ln()).sum();
    assert!((f64::from(row.entropy) - entropy).abs() < 1e-6);
    assert!(row.log_z_at.is_empty());
}

#[test]
fn defective_log_probabilities_are_corrected_or_refused() {
    // A mass of 1.0005 is a rounding error: the values are rescaled, and the tail is empty.
    let over = |mass: f64| {
        sampled(
            1,
            (mass / 2.0).ln() as f32,
            &[(2, (mass / 2.0).ln() as f32)],
        )
    };
    let signal = signal_of(over(1.0005), 9).unwrap();
    let row = signal.rows.row(0);
    assert_eq!(row.tail_logprob, f32::NEG_INFINITY);
    let mass: f64 = row
        .logprobs
        .iter()
        .map(|value| f64::from(*value).exp())
        .sum();
    assert!((mass - 1.0).abs() < 1e-6);
    let why = |token| signal_of(token, 9).unwrap_err();
    assert!(why(over(1.01)).contains("a mass of 1.010"));
    assert!(why(sampled(1, f32::NAN, &[])).contains("NaN"));
    assert!(why(sampled(1, -9999.0, &[])).contains("is no log-probability"));
    assert!(why(sampled(1, -1.0, &[(2, 0.5)])).contains("token 2 is 0.5"));
    assert!(why(sampled(1, -1.0, &[(1, -1.5)])).contains("two log-probabilities"));
    assert!(why(sampled(100, -1.0, &[])).contains("outside a vocabulary of 100"));
    // An alternative without probability is dropped, and duplicates are merged.
    let token = sampled(1, -1.0, &[(2, -9999.0), (1, -1.0), (3, f32::NEG_INFINITY)]);
    assert_eq!(signal_of(token, 9).unwrap().rows.row(0).ids, [1]);
    let none = answer_signal(100, None, &[7], &completion(vec![]), 4).unwrap_err();
    assert!(none.contains("has no tokens"), "{none}");
}

#[test]
fn windows_cover_each_position_once() {
    assert_eq!(
        scoring_windows(100, 10, 100, 20),
        [ScoringWindow {
            start: 0,
            end: 100,
            from: 10
        }]
    );
    assert!(scoring_windows(5, 5, 100, 20).is_empty());
    for (tokens, from, most, context) in [
        (100, 0, 30, 10),
        (100, 95, 30, 10),
        (101, 1, 2, 1),
        (64, 31, 32, 99),
        (50, 29, 30, 29),
    ] {
        let windows = scoring_windows(tokens, from, most, context);
        let mut next = from.max(1);
        for window in &windows {
            assert!(window.end - window.start <= most, "{window:?}");
            assert!(
                window.start < window.from && window.from < window.end,
                "{window:?}"
            );
            assert_eq!(window.from, next);
            next = window.end;
        }
        assert_eq!(next, tokens, "{windows:?}");
        let parts = windows.iter().map(|window| {
            let given = (window.start..window.end).map(|at| Some(vec![(at as u32, -1.0)]));
            (*window, given.collect())
        });
        let whole = join_scoring_windows(tokens, parts.collect()).unwrap();
        for (at, position) in whole.iter().enumerate() {
            let expected = (at >= from.max(1)).then(|| vec![(at as u32, -1.0)]);
            assert_eq!(*position, expected);
        }
    }
}

/// The folder with recorded exchanges and models. Without it these tests print a note and check nothing.
fn real() -> Option<PathBuf> {
    let folder = std::env::var_os("POTSTILL_REAL").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("skipped: POTSTILL_REAL names no folder with recorded exchanges");
    }
    folder
}

fn recorded(file: &str) -> Option<Vec<Value>> {
    let text = std::fs::read_to_string(real()?.join("ref").join(file)).unwrap();
    Some(serde_json::from_str(&text).unwrap())
}

fn given(positions: &Value) -> PromptLogprobs {
    let position = |position: &Value| {
        let entries = position.as_object()?.iter().map(|(id, entry)| {
            (
                id.parse().unwrap(),
                entry["logprob"].as_f64().unwrap() as f32,
            )
        });
        Some(entries.collect())
    };
    positions.as_array().unwrap().iter().map(position).collect()
}

/// vLLM in bf16 is compared with transformers in f32 on the same weights.
#[test]
fn prompt_logprobs_of_vllm_agree_with_the_reference() {
    let Some(exchanges) = recorded("vllm_responses.json") else {
        return;
    };
    let positions = given(&exchanges[8]["response"]["choices"][0]["prompt_logprobs"]);
    let ids = [504, 3575, 282, 4649, 314];
    let signal = prompt_signal("p", 0, &ids, 0, &positions, 20, 49_152).unwrap();
    assert_eq!(signal.rows.len(), 4);
    let path = real().unwrap().join("ref/smollm2.json");
    let reference: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let item = &reference["items"][0];
    let (mut most, mut sum, mut count) = (0.0_f64, 0.0, 0);
    for (at, row) in signal.rows.rows().enumerate() {
        let ids = item["top20_ids"][at].as_array().unwrap();
        let values = item["top20_logprobs"][at].as_array().unwrap();
        for (id, value) in ids.iter().zip(values) {
            let found = row
                .ids
                .iter()
                .position(|found| u64::from(*found) == id.as_u64().unwrap());
            if let Some(found) = found {
                let apart = (f64::from(row.logprobs[found]) - value.as_f64().unwrap()).abs();
                most = most.max(apart);
                sum += apart;
                count += 1;
            }
        }
        // The tail is the mass that the server's values leave.
        let mass: f64 = row
            .logprobs
            .iter()
            .map(|value| f64::from(*value).exp())
            .sum();
        assert!((mass + f64::from(row.tail_logprob).exp() - 1.0).abs() < 1e-6);
    }
    assert!(count > 60, "{count} values in common");
    let mean = sum / f64::from(count);
    assert!(mean < 0.12 && most < 0.4, "mean {mean}, most {most}");
    let one_short = prompt_signal("p", 0, &ids[..4], 0, &positions, 20, 49_152).unwrap_err();
    assert!(
        one_short.contains("5 positions for 4 tokens"),
        "{one_short}"
    );
    let other = [504, 3575, 282, 4649, 315];
    let other = prompt_signal("p", 0, &other, 0, &positions, 20, 49_152).unwrap_err();
    assert!(other.contains("has no log-probability"), "{other}");
}

/// llama-cpp-python gives strings without bytes, so the ids come from the tokenizer.
#[test]
fn ids_are_recovered_through_the_tokenizer() {
    let (Some(exchanges), Some(model)) = (recorded("llamacpp_responses.json"), model()) else {
        return;
    };
    let tokenizer = Tokenizer::from_dir(&model).unwrap();
    let content = exchanges[3]["response"]["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    let bytes = |entry: &Value| entry["token"].as_str().unwrap().into();
    let logprob = |entry: &Value| entry["logprob"].as_f64().unwrap() as f32;
    let token = |entry: &Value| SampledToken {
        bytes: bytes(entry),
        id: None,
        logprob: logprob(entry),
        top: entry["top_logprobs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|top| TopToken {
                id: None,
                bytes: bytes(top),
                logprob: logprob(top),
            })
            .collect(),
    };
    let mut answer = completion(content.iter().map(token).collect());
    let signal = signal_with(&tokenizer, &[1, 2], &answer, 20).unwrap();
    // The ids of "The capital of" that vLLM gives.
    assert_eq!(signal.token_ids, [1, 2, 504, 3575, 282]);
    assert!(
        signal.rows.rows().all(|row| row.ids.len() >= 15),
        "alternatives were lost"
    );
    answer.tokens[1].bytes = "\u{fffd}".into();
    let why = signal_with(&tokenizer, &[1, 2], &answer, 20).unwrap_err();
    assert!(
        why.starts_with("token 1 of the answer: the server gives no token ids"),
        "{why}"
    );
}

/// Some bytes are spelled by two ids of a SentencePiece vocabulary, so the string does not determine the id.
#[test]
fn an_ambiguous_string_is_refused() {
    let Some(real) = real() else { return };
    let tokenizer = Tokenizer::from_dir(&real.join("models/stories260K")).unwrap();
    let spelled = |token: &str| {
        let token = SampledToken {
            bytes: token.into(),
            id: None,
            logprob: -1.0,
            top: Vec::new(),
        };
        signal_with(&tokenizer, &[1], &completion(vec![token]), 4)
    };
    let ambiguous = (b'a'..=b'z')
        .map(|letter| spelled(&char::from(letter).to_string()))
        .filter_map(Result::err)
        .collect::<Vec<_>>();
    assert!(
        ambiguous.iter().any(|why| why.contains("is ambiguous")),
        "{ambiguous:?}"
    );
}

/// The folder of SmolLM2's tokenizer: in POTSTILL_MODELS, or beside the exchanges.
fn model() -> Option<PathBuf> {
    let beside = real()?.join("models/SmolLM2-135M-Instruct");
    let models = std::env::var_os("POTSTILL_MODELS").map(PathBuf::from);
    let given = models.map(|models| models.join("SmolLM2-135M-Instruct"));
    let found = given
        .into_iter()
        .chain([beside])
        .find(|dir| dir.join("tokenizer.json").exists());
    if found.is_none() {
        eprintln!("skipped: no folder SmolLM2-135M-Instruct in POTSTILL_MODELS");
    }
    found
}
