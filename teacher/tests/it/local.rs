//! The local teacher on real checkpoints: answers, signals, and every refused request.

mod support;

use std::ops::ControlFlow;
use std::path::Path;

use potstill_datasets::{ChatTemplate, FinishReason, Message, Prompt, Reasoning, Role, Signal};
use potstill_model::{Config, Decoder};
use potstill_teacher::{
    Ask, DType, Device, Local, LocalSettings, Sampling, Scoring, ScoringText, SignalSettings,
};
use serde_json::Value;

use self::support::*;

#[test]
fn greedy_answers_equal_those_of_transformers() {
    let Some(teacher) = stories() else { return };
    let reference = reference("stories260k.json");
    for item in reference["items"].as_array().unwrap() {
        let prompt = ask(item["text"].as_str().unwrap());
        let answer = sample(&teacher, &[&prompt], &GREEDY).remove(0);
        assert_eq!(*teacher.prompt_ids(&prompt).unwrap(), numbers(&item["ids"]));
        let ids: Vec<u32> = answer
            .tokens
            .iter()
            .map(|token| token.id.unwrap())
            .collect();
        assert_eq!(ids, numbers(&item["greedy32_ids"]));
        assert_eq!(
            answer.answer.trim(),
            item["greedy32_text"].as_str().unwrap().trim()
        );
        assert_eq!(answer.finish_reason, FinishReason::Length);
        assert_eq!(answer.usage.completion_tokens, 32);
        assert_eq!(answer.prompt_id, prompt.id);
    }
}

#[test]
fn chat_prompts_equal_those_of_transformers() {
    let Some(dir) = weights("SmolLM2-135M-Instruct") else {
        return;
    };
    let teacher = Local::open(settings(&dir, None)).unwrap();
    let reference = reference("smollm2.json");
    let chats = reference["items"].as_array().unwrap().iter();
    for item in chats.filter(|item| !item["chat"].is_null()) {
        let messages = item["chat"].as_array().unwrap().iter().map(|message| {
            let name = message["role"].as_str().unwrap();
            let role = Role::from_name(name).unwrap();
            Message::text(role, message["content"].as_str().unwrap())
        });
        let prompt = Prompt::new(messages.collect(), None, None, "chat:1".to_owned());
        assert_eq!(*teacher.prompt_ids(&prompt).unwrap(), numbers(&item["ids"]));
        let answer = sample(&teacher, &[&prompt], &GREEDY).remove(0);
        let ids: Vec<u32> = answer
            .tokens
            .iter()
            .map(|token| token.id.unwrap())
            .collect();
        let expected = numbers(&item["greedy32_ids"]);
        assert_eq!(ids, expected);
        let finished = teacher
            .tokenizer()
            .eos_ids()
            .contains(expected.last().unwrap());
        assert_eq!(answer.finish_reason == FinishReason::Stop, finished);
        assert!(!answer.answer.contains("<|im_end|>"));
    }
    shakespeare(&teacher, &reference["tinyshakespeare512"], 512, &[]);
}

#[test]
fn plain_text_has_the_reference_loss() {
    let Some(teacher) = stories() else { return };
    let reference = &reference("stories260k.json")["tinyshakespeare512"];
    shakespeare(&teacher, reference, 512, &[]);
}

#[test]
fn a_text_behind_the_window_has_the_reference_loss() {
    let Some(dir) = weights("gemma-3-270m") else {
        return;
    };
    let plain = ChatTemplate::plain().unwrap();
    let teacher = Local::open(settings(&dir, Some(plain))).unwrap();
    let reference = &reference("gemma-270m.json")["tinyshakespeare1024"];
    shakespeare(&teacher, reference, 1024, &[2]);
}

/// The reference's softmax is over all rows of the embedding, the teacher's over the tokens alone. In a trained model the
/// rows of padding have so little mass that both agree.
#[test]
fn a_padded_vocabulary_has_the_reference_probabilities() {
    let Some(dir) = weights("Qwen2.5-Coder-0.5B-Instruct") else {
        return;
    };
    let teacher = Local::open(settings(&dir, None)).unwrap();
    let model = teacher.model();
    assert_eq!(
        (model.token_count(), model.config().vocab_size),
        (151_665, 151_936)
    );
    let mut largest = 0.0f64;
    let reference = reference("qwen-0.5b.json");
    for item in reference["items"].as_array().unwrap() {
        let text = text_of(numbers(&item["ids"]), 1);
        let signal = score(&teacher, &[text], &scoring(20)).remove(0);
        let (ids, logprobs) = (&item["top20_ids"], &item["top20_logprobs"]);
        for (t, row) in signal.rows.rows().enumerate() {
            assert!(row.ids.iter().all(|id| *id < 151_665));
            let expected = logprobs[t]
                .as_array()
                .unwrap()
                .iter()
                .map(|p| p.as_f64().unwrap());
            for (id, expected) in numbers(&ids[t]).into_iter().zip(expected) {
                // Several tokens may have the same logit as the 20th. Then the row may hold another of them than the
                // reference does, with the same log-probability.
                let Some(slot) = row.ids.iter().position(|found| *found == id) else {
                    let least = f64::from(row.logprobs[19]);
                    assert!(
                        (expected - least).abs() < 1e-3,
                        "{expected} against {least}"
                    );
                    continue;
                };
                largest = largest.max((f64::from(row.logprobs[slot]) - expected).abs());
            }
        }
    }
    eprintln!("largest difference of a top-20 logprob: {largest:.1e}");
    assert!(largest < 1e-3);
}

/// Compares the mean NLL of the first tokens of TinyShakespeare, after a BOS token or none, with the reference.
fn shakespeare(teacher: &Local, expected: &Value, tokens: usize, bos: &[u32]) {
    let Some(path) = real("data/tinyshakespeare/input.txt") else {
        return;
    };
    let text = std::fs::read_to_string(path).unwrap();
    let mut token_ids = teacher.tokenizer().encode(&text[..20_000], false).unwrap();
    token_ids.truncate(tokens);
    token_ids.splice(0..0, bos.iter().copied());
    assert_eq!(token_ids[..16], numbers(&expected["first16"]));
    let signal = score(teacher, &[text_of(token_ids, 1)], &scoring(1)).remove(0);
    let nll: Vec<f64> = target_logprobs(&signal)
        .map(|logprob| -f64::from(logprob))
        .collect();
    let mean = nll.iter().sum::<f64>() / nll.len() as f64;
    let difference = (mean - expected["mean_nll"].as_f64().unwrap()).abs();
    eprintln!("mean NLL of {tokens} tokens: {mean:.6}, off by {difference:.1e}");
    assert!(difference < 1e-4);
}

#[test]
fn signals_equal_brute_force() {
    let Some(teacher) = stories() else { return };
    let prompts = [
        ask("Once upon a time"),
        ask("The cat"),
        ask("Lily and Tom went to"),
    ];
    let texts = sampled_texts(&teacher, &prompts);
    let signals = score(&teacher, &texts, &scoring(8));
    let temperatures = scoring(8).signals.temperatures;
    for (text, signal) in texts.iter().zip(&signals) {
        signal.validate().unwrap();
        assert_eq!(signal.token_ids, text.encoded.token_ids);
        let logprobs = logprobs(teacher.model(), &text.encoded.token_ids);
        for (position, row) in signal.loss_positions().zip(&signal.rows) {
            let full = &logprobs[position - 1];
            let mut order: Vec<u32> = (0..full.len() as u32).collect();
            order.sort_by(|a, b| full[*b as usize].total_cmp(&full[*a as usize]));
            let mut support = order[..8].to_vec();
            support.extend([2, text.encoded.token_ids[position]]);
            support.sort_unstable();
            support.dedup();
            let mut found = row.ids.to_vec();
            found.sort_unstable();
            assert_eq!(found, support, "position {position}");
            for (id, logprob) in row.ids.iter().zip(row.logprobs) {
                assert!((f64::from(*logprob) - full[*id as usize]).abs() < 1e-4);
            }
            let outside = (0..full.len()).filter(|id| !support.contains(&(*id as u32)));
            let tail: f64 = outside.map(|id| full[id].exp()).sum();
            assert!((f64::from(row.tail_logprob) - tail.ln()).abs() < 1e-4);
            let entropy: f64 = full.iter().map(|logprob| -logprob * logprob.exp()).sum();
            assert!((f64::from(row.entropy) - entropy).abs() < 1e-4);
            for (t, log_z) in temperatures.iter().zip(row.log_z_at) {
                let t = *t;
                let expected = full
                    .iter()
                    .map(|logprob| (logprob / t).exp())
                    .sum::<f64>()
                    .ln();
                assert!((f64::from(log_z.unwrap()) - expected).abs() < 1e-4);
            }
            let mass: f64 = row.logprobs.iter().map(|x| f64::from(*x).exp()).sum();
            assert!((mass + f64::from(row.tail_logprob).exp() - 1.0).abs() < 1e-5);
        }
    }
}

#[test]
fn sampled_logprobs_equal_those_of_the_signals() {
    let Some(teacher) = stories() else { return };
    let prompts = [
        ask("Once upon a time"),
        ask("Ben"),
        ask("The big dog was very"),
    ];
    let sampling = Sampling {
        max_new_tokens: 40,
        temperature: 0.8,
        top_k: None,
        top_p: 0.95,
        min_p: 0.0,
        repetition_penalty: 1.0,
    };
    let all: Vec<&Prompt> = prompts.iter().collect();
    let answers = sample(&teacher, &all, &sampling);
    let texts: Vec<ScoringText> = prompts
        .iter()
        .zip(&answers)
        .map(|(prompt, answer)| teacher.text(prompt, answer, true).unwrap())
        .collect();
    for (signal, answer) in score(&teacher, &texts, &scoring(4)).iter().zip(&answers) {
        assert_eq!(signal.rows.len(), answer.tokens.len());
        for (logprob, token) in target_logprobs(signal).zip(&answer.tokens) {
            assert!((logprob - token.logprob).abs() < 1e-4);
        }
    }
}

#[test]
fn a_stop_text_ends_an_answer_and_is_not_in_its_text() {
    let Some(teacher) = stories() else { return };
    let prompt = ask("Once upon a time");
    let open = sample(&teacher, &[&prompt], &GREEDY).remove(0);
    let words: Vec<&str> = open.answer.split(' ').collect();
    let stop = words[4].to_owned();
    let asks = [Ask {
        prompt: &prompt,
        sample_index: 0,
    }];
    let mut forward = |_| ControlFlow::Continue(());
    let stops = [stop.clone()];
    let stopped = teacher.sample(&asks, &GREEDY, &stops, 11, &mut forward);
    let stopped = stopped.unwrap().unwrap().remove(0);
    assert_eq!(stopped.finish_reason, FinishReason::Stop);
    assert_eq!(
        stopped.answer,
        open.answer[..open.answer.find(&stop).unwrap()]
    );
    assert!(stopped.tokens.len() < open.tokens.len());
    assert_eq!(stopped.tokens[..], open.tokens[..stopped.tokens.len()]);
}

#[test]
fn answers_and_signals_repeat_bit_for_bit() {
    let Some(teacher) = stories() else { return };
    let prompt = ask("One day");
    let asks: Vec<Ask<'_>> = (0..4)
        .map(|sample_index| Ask {
            prompt: &prompt,
            sample_index,
        })
        .collect();
    let sampling = Sampling {
        max_new_tokens: 24,
        temperature: 1.0,
        top_k: None,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
    };
    let run = |seed| {
        let mut forward = |_| ControlFlow::Continue(());
        let answers = teacher.sample(&asks, &sampling, &[], seed, &mut forward);
        answers.unwrap().unwrap()
    };
    let answers = run(5);
    assert_eq!(answers, run(5));
    assert_ne!(answers, run(6));
    assert!(
        answers
            .iter()
            .any(|answer| answer.answer != answers[0].answer)
    );

    let texts = sampled_texts(
        &teacher,
        &[ask("One day"), ask("A"), ask("The sun was hot")],
    );
    let whole = score(&teacher, &texts, &scoring(8));
    assert_eq!(whole, score(&teacher, &texts, &scoring(8)));
    // Chunk size and batch change a distribution only by rounding.
    let small = Scoring {
        chunk_rows: 5,
        ..scoring(8)
    };
    assert_close(&whole, &score(&teacher, &texts, &small));
    for (at, text) in texts.iter().enumerate() {
        let alone = score(&teacher, std::slice::from_ref(text), &scoring(8));
        assert_close(&whole[at..=at], &alone);
    }
}

#[test]
fn texts_of_any_length_keep_their_order() {
    let Some(teacher) = stories() else { return };
    let text = |length: u32, start| text_of((0..length).map(|i| 3 + i * 7 % 500).collect(), start);
    // The texts fill more than one batch, and some of them have no loss position.
    let mut texts = vec![
        text(2, 1),
        text(512, 500),
        text(40, 2),
        text(9, 9),
        text(1, 1),
    ];
    texts.extend((0..12).map(|i| text(500 - 30 * i, 20)));
    let signals = score(&teacher, &texts, &scoring(5));
    assert_eq!(signals.len(), texts.len());
    for (text, signal) in texts.iter().zip(&signals) {
        signal.validate().unwrap();
        assert_eq!(signal.token_ids, text.encoded.token_ids);
        let alone = score(&teacher, std::slice::from_ref(text), &scoring(5));
        assert_close(std::slice::from_ref(signal), &alone);
    }
}

#[test]
fn tail_draws_depend_on_seed_text_and_position_only() {
    let Some(teacher) = stories() else { return };
    let mut texts = sampled_texts(&teacher, &[ask("One day"), ask("The sun was hot")]);
    let drawn = |seed, texts: &[ScoringText]| {
        let scoring = Scoring {
            signals: SignalSettings {
                tail_draws: 9,
                ..scoring(4).signals
            },
            seed,
            ..scoring(4)
        };
        score(&teacher, texts, &scoring)
    };
    let signals = drawn(1, &texts);
    assert_eq!(signals, drawn(1, &texts));
    for signal in &signals {
        signal.validate().unwrap();
        for row in &signal.rows {
            assert_eq!(row.draw_counts.iter().sum::<u32>(), 9);
        }
    }
    let ids = |signals: &[Signal]| -> Vec<Vec<u32>> {
        let rows = signals.iter().flat_map(|signal| &signal.rows);
        rows.map(|row| row.draw_ids.to_vec()).collect()
    };
    assert_ne!(ids(&signals), ids(&drawn(2, &texts)));
    texts.iter_mut().for_each(|text| text.sample_index += 1);
    assert_ne!(ids(&signals), ids(&drawn(1, &texts)));
    // Draws do not change the distributions.
    let mut without = signals;
    for signal in &mut without {
        signal.rows.change_rows(|_, row| {
            row.draw_ids.clear();
            row.draw_counts.clear();
        });
    }
    texts.iter_mut().for_each(|text| text.sample_index -= 1);
    assert_eq!(without, score(&teacher, &texts, &scoring(4)));
}

#[test]
fn control_tokens_are_in_every_support() {
    let Some(dir) = weights("stories260K") else {
        return;
    };
    let reasoning = Reasoning {
        open: "<think>".to_owned(),
        close: "</think>".to_owned(),
    };
    let teacher = Local::open(LocalSettings {
        reasoning: Some(reasoning),
        ..settings(&dir, Some(ChatTemplate::plain().unwrap()))
    })
    .unwrap();
    let close = teacher.tokenizer().encode("</think>", false).unwrap()[0];
    let texts = sampled_texts(&teacher, &[ask("Once")]);
    let signal = score(&teacher, &texts, &scoring(2)).remove(0);
    for row in &signal.rows {
        assert!(row.ids.contains(&2) && row.ids.contains(&close));
        assert!(row.ids.len() <= 5);
    }
}

#[test]
fn a_support_may_be_the_whole_vocabulary() {
    let Some(teacher) = stories() else { return };
    let texts = [text_of(vec![1, 403, 280], 1)];
    let signal = score(&teacher, &texts, &scoring(100_000)).remove(0);
    signal.validate().unwrap();
    for row in &signal.rows {
        assert_eq!(row.ids.len(), 512);
        assert_eq!(row.tail_logprob, f32::NEG_INFINITY);
    }
}

#[test]
fn progress_callbacks_can_stop_sampling_and_scoring() {
    let Some(teacher) = stories() else { return };
    let prompt = ask("Once");
    let asks = [Ask {
        prompt: &prompt,
        sample_index: 0,
    }];
    let mut stop = |_| ControlFlow::Break(());
    assert_eq!(
        teacher.sample(&asks, &GREEDY, &[], 0, &mut stop).unwrap(),
        None
    );
    let texts = [text_of(vec![1, 5, 6], 1)];
    assert_eq!(teacher.score(&texts, &scoring(4), &mut stop).unwrap(), None);
    assert_eq!(score(&teacher, &[], &scoring(4)), []);
}

#[test]
fn provenance_follows_the_checkpoint() {
    let Some(dir) = weights("stories260K") else {
        return;
    };
    let open = |dir: &Path| {
        let plain = Some(ChatTemplate::plain().unwrap());
        Local::open(settings(dir, plain))
            .unwrap()
            .provenance(&GREEDY, &[], 3, &[2.0])
    };
    let provenance = open(&dir);
    assert_eq!(provenance.teacher, "stories260K");
    assert_eq!(provenance.dtype, "f32");
    assert_eq!(provenance.temperatures, [2.0]);
    assert_eq!(
        provenance.sampling,
        r#"{"max_new_tokens":32,"seed":3,"temperature":0.0,"top_p":1.0}"#
    );
    let narrow = Sampling {
        top_k: Some(40),
        min_p: 0.05,
        repetition_penalty: 1.5,
        ..GREEDY
    };
    let plain = Some(ChatTemplate::plain().unwrap());
    let drawn = Local::open(settings(&dir, plain)).unwrap();
    assert_eq!(
        drawn
            .provenance(&narrow, &["%".to_owned()], 3, &[])
            .sampling,
        r#"{"max_new_tokens":32,"min_p":0.05,"repetition_penalty":1.5,"seed":3,"stop":["%"],"temperature":0.0,"top_k":40,"top_p":1.0}"#
    );
    assert_eq!(provenance.revision.len(), 64);
    assert_eq!(provenance, open(&dir));

    let copy = tempfile::tempdir().unwrap();
    copy_checkpoint(&dir, copy.path());
    assert_eq!(open(copy.path()).revision, provenance.revision);
    let mut bytes = std::fs::read(copy.path().join("model.safetensors")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(copy.path().join("model.safetensors"), bytes).unwrap();
    assert_ne!(open(copy.path()).revision, provenance.revision);
}

#[test]
fn refused_requests_name_the_defect() {
    let Some(dir) = weights("stories260K") else {
        return;
    };
    let teacher = stories().unwrap();
    let long = ask(&"word ".repeat(400));
    let asks = [Ask {
        prompt: &long,
        sample_index: 0,
    }];
    let mut forward = |_| ControlFlow::Continue(());
    let error = teacher
        .sample(&asks, &GREEDY, &[], 0, &mut forward)
        .unwrap_err();
    let tokens = teacher.prompt_ids(&long).unwrap().len();
    assert_eq!(
        error.to_string(),
        format!(
            "train.jsonl:17: the prompt has {tokens} tokens, and with 32 new ones it exceeds the teacher's context of 512\nhint: drop or shorten the prompt, or lower `max_new_tokens`"
        )
    );

    let fail = |text: ScoringText, scoring: &Scoring| {
        let mut forward = |_| ControlFlow::Continue(());
        let error = teacher.score(&[text], scoring, &mut forward).unwrap_err();
        error.to_string()
    };
    let four = scoring(4);
    assert_eq!(
        fail(text_of(vec![1; 513], 1), &four),
        "prompt p, sample 0: the text has 513 tokens, and the teacher's context is 512\nhint: drop or cut the text"
    );
    assert_eq!(
        fail(text_of(vec![1, 512], 1), &four),
        "prompt p, sample 0: token id 512 is outside of the teacher's vocabulary of 512"
    );
    assert_eq!(
        fail(text_of(vec![1, 2], 0), &four),
        "prompt p, sample 0: its first token carries loss, and nothing precedes it"
    );
    let mut short = text_of(vec![1, 2], 1);
    short.encoded.loss_mask.pop();
    assert_eq!(
        fail(short, &four),
        "prompt p, sample 0: 2 tokens come with a loss mask of 1"
    );
    let cold = Scoring {
        signals: SignalSettings {
            temperatures: vec![0.0],
            ..scoring(4).signals
        },
        ..scoring(4)
    };
    assert_eq!(
        fail(text_of(vec![1, 2], 1), &cold),
        "scoring setting `temperatures` is 0: each is above 0"
    );
    assert_eq!(
        fail(text_of(vec![1, 2], 1), &scoring(0)),
        "scoring setting `top_k` is 0: it is at least 1"
    );

    // The checkpoint has no template of its own.
    let error = Local::open(settings(&dir, None)).unwrap_err().to_string();
    assert!(error.contains("has no chat template"), "{error}");

    // The model has fewer embedding rows than the tokenizer has ids.
    let copy = tempfile::tempdir().unwrap();
    copy_checkpoint(&dir, copy.path());
    let config = Config::from_dir(&dir).unwrap();
    let config = config.with_keys([("vocab_size", 500.into())]).unwrap();
    let smaller = Decoder::init(&config, 0, DType::F32, &Device::flex()).unwrap();
    potstill_model::save(&smaller, copy.path(), DType::F32).unwrap();
    let plain = Some(ChatTemplate::plain().unwrap());
    let error = Local::open(settings(copy.path(), plain))
        .unwrap_err()
        .to_string();
    let place = copy.path().display();
    assert_eq!(
        error,
        format!(
            "the tokenizer `{place}/tokenizer.json` has 512 ids, but the embedding of `{place}/config.json` has 500 rows, so \"\\\\\" has none\nhint: use tokenizer and model of one checkpoint"
        )
    );
}
