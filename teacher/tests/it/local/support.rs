//! Teachers, texts and comparisons that the tests share.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use potstill_datasets::{ChatTemplate, Encoded, Message, Prompt, Role, Signal};
use potstill_model::{Decoder, Tensor, TensorData};
use potstill_teacher::{
    Ask, DType, Device, Local, LocalSettings, Sampling, Scoring, ScoringText, SignalSettings,
};
use serde_json::Value;

pub(crate) const GREEDY: Sampling = Sampling {
    max_new_tokens: 32,
    temperature: 0.0,
    top_k: None,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
};

pub(crate) fn stories() -> Option<Local> {
    let dir = weights("stories260K")?;
    let plain = ChatTemplate::plain().unwrap();
    Some(Local::open(settings(&dir, Some(plain))).unwrap())
}

pub(crate) fn settings(dir: &Path, template: Option<ChatTemplate>) -> LocalSettings {
    LocalSettings {
        dir: dir.to_path_buf(),
        dtype: DType::F32,
        device: Device::flex(),
        template,
        reasoning: None,
        licence: Some("MIT".to_owned()),
        origin: None,
    }
}

pub(crate) fn scoring(top_k: usize) -> Scoring {
    Scoring {
        signals: SignalSettings {
            top_k,
            temperatures: vec![1.0, 2.0, 0.5],
            tail_draws: 0,
        },
        seed: 0,
        chunk_rows: 64,
    }
}

pub(crate) fn ask(text: &str) -> Prompt {
    let messages = vec![Message::text(Role::User, text)];
    Prompt::new(messages, None, None, "train.jsonl:17".to_owned())
}

pub(crate) fn sample(
    teacher: &Local,
    prompts: &[&Prompt],
    sampling: &Sampling,
) -> Vec<potstill_datasets::Completion> {
    let ask = |prompt| Ask {
        prompt,
        sample_index: 0,
    };
    let asks: Vec<Ask<'_>> = prompts.iter().copied().map(ask).collect();
    let mut forward = |_| ControlFlow::Continue(());
    teacher
        .sample(&asks, sampling, &[], 11, &mut forward)
        .unwrap()
        .unwrap()
}

pub(crate) fn score(teacher: &Local, texts: &[ScoringText], scoring: &Scoring) -> Vec<Signal> {
    let mut forward = |_| ControlFlow::Continue(());
    teacher
        .score(texts, scoring, &mut forward)
        .unwrap()
        .unwrap()
}

/// Greedy answers as texts to score.
pub(crate) fn sampled_texts(teacher: &Local, prompts: &[Prompt]) -> Vec<ScoringText> {
    let text = |prompt: &Prompt| {
        let answer = sample(teacher, &[prompt], &GREEDY).remove(0);
        teacher.text(prompt, &answer, true).unwrap()
    };
    prompts.iter().map(text).collect()
}

/// A text with loss from position `start` on.
pub(crate) fn text_of(token_ids: Vec<u32>, start: usize) -> ScoringText {
    let loss_mask = (0..token_ids.len()).map(|at| at >= start).collect();
    ScoringText {
        prompt_id: "p".to_owned(),
        sample_index: 0,
        encoded: Encoded {
            token_ids,
            loss_mask,
        },
    }
}

/// Log-probability of the target token of each row.
pub(crate) fn target_logprobs(signal: &Signal) -> impl Iterator<Item = f32> {
    signal
        .loss_positions()
        .zip(&signal.rows)
        .map(|(position, row)| {
            let id = signal.token_ids[position];
            row.logprobs[row.ids.iter().position(|other| *other == id).unwrap()]
        })
}

/// The full distribution after each position, computed from the model's logits.
pub(crate) fn logprobs(model: &Decoder, token_ids: &[u32]) -> Vec<Vec<f64>> {
    let ids: Vec<i32> = token_ids.iter().map(|id| *id as i32).collect();
    let data = TensorData::new(ids, [1, token_ids.len()]);
    let hidden = model.hidden(Tensor::from_data(data, &model.device()));
    let [_, t, d] = hidden.dims();
    let logits: Vec<f64> = model
        .logits(hidden.reshape([t, d]))
        .try_into_vec_as()
        .unwrap();
    let normalise = |row: &[f64]| {
        let largest = row.iter().fold(f64::MIN, |max, z| max.max(*z));
        let lse = largest + row.iter().map(|z| (z - largest).exp()).sum::<f64>().ln();
        row.iter().map(|z| z - lse).collect()
    };
    logits
        .chunks(model.config().vocab_size)
        .map(normalise)
        .collect()
}

pub(crate) fn assert_close(a: &[Signal], b: &[Signal]) {
    for (a, b) in a.iter().zip(b) {
        assert_eq!((&a.token_ids, a.rows.len()), (&b.token_ids, b.rows.len()));
        for (a, b) in a.rows.rows().zip(&b.rows) {
            assert_eq!(a.ids, b.ids);
            for (a, b) in a.logprobs.iter().zip(b.logprobs) {
                assert!((a - b).abs() < 1e-4);
            }
            assert!((a.tail_logprob - b.tail_logprob).abs() < 1e-4);
        }
    }
}

pub(crate) fn copy_checkpoint(from: &Path, to: &Path) {
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        // The files are read and written instead of copied, since a copy of a read-only file is read-only.
        std::fs::write(
            to.join(file.file_name()),
            std::fs::read(file.path()).unwrap(),
        )
        .unwrap();
    }
}

pub(crate) fn numbers(values: &Value) -> Vec<u32> {
    let values = values.as_array().unwrap();
    values
        .iter()
        .map(|value| value.as_u64().unwrap() as u32)
        .collect()
}

pub(crate) fn reference(name: &str) -> Value {
    let path = real(&format!("ref/{name}")).unwrap();
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The folder of a model, if its weights are available.
pub(crate) fn weights(model: &str) -> Option<PathBuf> {
    real(&format!("models/{model}/model.safetensors")).and(real(&format!("models/{model}")))
}

/// A file or folder of real models. Without it this prints why the test is skipped, and returns `None`.
pub(crate) fn real(part: &str) -> Option<PathBuf> {
    let Some(root) = std::env::var_os("POTSTILL_REAL") else {
        eprintln!("skipped: POTSTILL_REAL is not set");
        return None;
    };
    let path = PathBuf::from(root).join(part);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: POTSTILL_REAL has no {part}");
    None
}
