//! Seeds of the targets that the writers of the formats make. Other seeds are files in `corpus/`.

use std::fs;
use std::path::Path;

use potstill::datasets::{
    Answer, Completion, Dropped, Failed, FinishReason, Manifest, Message, NO_SIGNAL, NearDuplicate,
    OwnText, Prompt, Provenance, Record, Role, SampledToken, Selected, SequenceValues, Signal,
    SignalRow, Split, Store, TaskSample, ToolCall, TopToken, UnitIndex, Usage, Verdict,
    write_shard,
};
use potstill::model::{
    Config, DType, Decoder, Device, GgufLabels, GgufType, export_gguf, save, save_sharded,
};
use serde_json::json;

use crate::scratch::folder;
use crate::{models, replies};

/// Returns the seeds that code makes for a target.
pub(crate) fn seeds(target: &str) -> Vec<Vec<u8>> {
    match target {
        "tokenizer" => vec![tokenizer()],
        "json_rows" => vec![
            b"[".repeat(1_000_000),
            [b"{\"text\": ".to_vec(), b"[".repeat(1_000_000)].concat(),
        ],
        "replies" => replies(),
        "error_replies" => vec![[vec![2, 100, 0], b"{\"error\":".repeat(200_000)].concat()],
        "tables" => tables(),
        "journal" => journals(),
        "journal_records" => vec![journal_records()],
        "manifest" => vec![manifest()],
        "config" => vec![models::CONFIG.as_bytes().to_vec()],
        "safetensors" => weights(),
        "gguf" => gguf(),
        _ => Vec::new(),
    }
}

fn provenance() -> Provenance {
    Provenance {
        teacher: "teacher".into(),
        revision: "abc".into(),
        engine: "potstill 0.1.0".into(),
        dtype: "f32".into(),
        tokenizer: "t".into(),
        template: "plain".into(),
        sampling: "{}".into(),
        temperatures: vec![1.0],
        licence: Some("MIT".into()),
    }
}

fn completion(number: u32) -> Completion {
    let token = |text: &str, id: u32| SampledToken {
        bytes: text.as_bytes().to_vec().into(),
        id: Some(id),
        logprob: -0.5,
        top: vec![TopToken {
            id: Some(id),
            bytes: text.as_bytes().to_vec().into(),
            logprob: -0.5,
        }],
    };
    Completion {
        prompt_id: format!("prompt {}", number / 2),
        sample_index: number % 2,
        reasoning: Some("7 + 5 is 12".into()),
        answer: "12 µ".into(),
        tool_calls: vec![ToolCall {
            id: Some("1".into()),
            name: "add".into(),
            arguments: r#"{"a":7,"b":5}"#.into(),
        }],
        finish_reason: FinishReason::Stop,
        usage: Usage {
            prompt_tokens: 9,
            completion_tokens: 2,
        },
        tokens: vec![token("12", 4), token(" µ", 5)],
        provenance: 0,
    }
}

fn signal(number: u32) -> Signal {
    let row = SignalRow {
        ids: vec![4, 2],
        logprobs: vec![-0.5, -1.5],
        tail_logprob: -1.77,
        entropy: 0.9,
        log_z_at: vec![Some(0.0)],
        draw_ids: vec![7],
        draw_counts: vec![2],
    };
    Signal {
        prompt_id: format!("prompt {}", number / 2),
        sample_index: number % 2,
        token_ids: vec![1, 3, 4, 2],
        loss_mask: vec![false, false, true, true],
        rows: [row.clone(), row].into_iter().collect(),
        provenance: 0,
    }
}

fn shard<R: Record>(kind: u8, rows: &[R]) -> Vec<u8> {
    let path = folder().join("shard-00000.parquet");
    write_shard(&path, rows, &[provenance()]).unwrap();
    [vec![kind], fs::read(&path).unwrap()].concat()
}

fn tables() -> Vec<Vec<u8>> {
    let messages = vec![
        Message::text(Role::System, "Be brief."),
        Message::text(Role::User, "7 + 5?"),
    ];
    let prompt = Prompt::new(messages, Some("[]".into()), Some("12".into()), "a:1".into());
    let id = || "prompt 0".to_owned();
    let dropped = Dropped {
        prompt_id: id(),
        sample_index: 1,
        reason: "wrong".into(),
    };
    let selected = |row| Selected {
        shard: 0,
        row,
        prompt_id: id(),
        sample_index: row,
    };
    let near = NearDuplicate {
        split: Split::Test,
        prompt_id: id(),
        train_prompt_id: "prompt 1".into(),
        similarity: 0.75,
    };
    let failed = Failed {
        prompt_id: id(),
        sample_index: 0,
        reason: NO_SIGNAL.into(),
        message: "no distributions".into(),
    };
    let values = SequenceValues {
        prompt_id: id(),
        sample_index: 0,
        tokens: 2,
        kl_nats: 0.5,
        nll_nats: 1.5,
        agree: 1,
        teacher_nll_nats: 1.25,
        teacher_entropy_nats: 1.0,
        confidence: vec![0.5, 0.25],
        expected: vec![0.5, 1.0],
    };
    let verdict = Verdict {
        prompt_id: id(),
        sample_index: 0,
        grader: "number".into(),
        correct: true,
        extracted: Some("12".into()),
    };
    let task = TaskSample {
        prompt_id: id(),
        reasoning: None,
        answer: "12".into(),
        extracted: Some("12".into()),
        correct: true,
        finished: true,
        tokens: 2,
    };
    let own = OwnText {
        prompt_id: id(),
        sample_index: 0,
        tokens: 2,
        reverse_kl_nats: 0.25,
    };
    vec![
        shard(0, &[prompt]),
        shard(1, &[completion(0), completion(1)]),
        shard(2, &[signal(0), signal(1)]),
        shard(3, &[selected(0), selected(1)]),
        shard(4, &[dropped]),
        shard(5, &[near]),
        shard(6, &[failed]),
        shard(7, &[values]),
        shard(8, &[verdict]),
        shard(9, &[task]),
        shard(10, &[own]),
    ]
}

/// The journal of two answers, one with distributions, and of a failure.
fn journal() -> Vec<u8> {
    let path = folder().join("answers.journal");
    let units =
        (0..8).map(|n| Ok::<_, potstill::datasets::Error>((format!("prompt {}", n / 2), n % 2)));
    let index = UnitIndex::new(8, units).unwrap();
    let mut store = Store::<Answer>::open(&path, &index).unwrap();
    let answer = |number, signal| {
        Ok(Answer {
            completion: completion(number),
            signal,
        })
    };
    store
        .add(
            &provenance(),
            vec![(0, answer(0, Some(signal(0)))), (1, answer(1, None))],
        )
        .unwrap();
    let failed = Failed {
        prompt_id: "prompt 1".into(),
        sample_index: 0,
        reason: "content_filter".into(),
        message: "withheld".into(),
    };
    store.add(&provenance(), vec![(2, Err(failed))]).unwrap();
    drop(store);
    fs::read(&path).unwrap()
}

fn journals() -> Vec<Vec<u8>> {
    let whole = journal();
    let torn = whole[..whole.len() - 3].to_vec();
    vec![whole, torn, Vec::new()]
}

/// The payloads of the journal's frames.
fn journal_records() -> Vec<u8> {
    let bytes = journal();
    let path = folder().join("copy.journal");
    fs::write(&path, &bytes).unwrap();
    let (journal, spans) = potstill::datasets::Journal::open(&path).unwrap();
    drop(journal);
    let mut out = Vec::new();
    for (at, span) in spans.iter().enumerate() {
        let next = spans
            .get(at + 1)
            .map_or(bytes.len(), |next| next.offset as usize);
        let payload = &bytes[next - span.len as usize..next];
        let length = u8::try_from(payload.len()).unwrap_or(u8::MAX);
        out.push(length);
        out.extend(&payload[..usize::from(length)]);
    }
    out
}

fn manifest() -> Vec<u8> {
    let dir = folder();
    fs::create_dir(dir.join("prompts")).unwrap();
    fs::write(dir.join("prompts/shard-00000.parquet"), "rows").unwrap();
    let manifest = Manifest {
        stage: "import".into(),
        schema: 1,
        key: "0".repeat(64),
        settings: json!({ "limit": null, "columns": { "text": "text" } }),
        inputs: [("data".to_owned(), "1".repeat(64))].into(),
        files: potstill::datasets::hash_files(&dir.join("prompts")).unwrap(),
        counts: [("prompts".to_owned(), 12)].into(),
        measures: [("sampling_z".to_owned(), -0.5)].into(),
    };
    manifest.write(&dir.join("prompts")).unwrap();
    fs::read(dir.join("prompts_manifest.json")).unwrap()
}

/// The bodies of the recorded replies of each dialect.
fn replies() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("teacher/tests/fixtures/replies");
    let mut paths: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    let seed = |path: &std::path::PathBuf| {
        let fixture: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let mut kind = match (fixture["kind"].as_str(), fixture["dialect"].as_str()) {
            (Some("sglang"), _) => 2,
            (_, Some("vllm")) => 1,
            _ => 0,
        };
        kind |= if fixture["logprobs"].is_u64() {
            replies::LOGPROBS
        } else {
            0
        };
        kind |= match fixture["task"].as_str() {
            Some("ids") => replies::IDS,
            Some("score") => replies::SCORE,
            _ => 0,
        };
        match fixture["sse"].as_str() {
            Some(sse) => [&[kind | replies::STREAM], sse.as_bytes()].concat(),
            None => [
                vec![kind],
                serde_json::to_vec(&fixture["response"]).unwrap(),
            ]
            .concat(),
        }
    };
    let deep = [
        [b"\0".to_vec(), b"[".repeat(1_000_000)],
        [b"\0".to_vec(), b"{\"a\":".repeat(200_000)],
        [b"\x10data: ".to_vec(), b"[".repeat(1_000_000)],
    ];
    let deep = deep.map(|parts| parts.concat());
    paths.iter().map(seed).chain(deep).collect()
}

/// `tokenizer.json` with BPE over bytes, a normaliser and a pre-tokenizer.
pub(crate) fn tokenizer_json() -> serde_json::Value {
    let mut vocabulary = serde_json::Map::new();
    for token in ["<unk>", "<s>", "</s>"] {
        vocabulary.insert(token.to_owned(), json!(vocabulary.len()));
    }
    for byte in 0..256 {
        vocabulary.insert(format!("<0x{byte:02X}>"), json!(vocabulary.len()));
    }
    for token in ["a", "b", "ab", "\u{2581}"] {
        vocabulary.insert(token.to_owned(), json!(vocabulary.len()));
    }
    let special = |id: usize, token: &str| {
        json!({ "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "NFC" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" } ] },
        "pre_tokenizer": { "type": "Split", "pattern": { "Regex": "\\d{1,3}" }, "behavior": "Isolated", "invert": false },
        "post_processor": { "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } } },
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" } ] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                   "vocab": vocabulary, "merges": [["a", "b"]] },
    })
}

const TOKENIZER_CONFIG: &str = r#"{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}"#;
const GENERATION_CONFIG: &str = r#"{"eos_token_id": 2}"#;

fn tokenizer() -> Vec<u8> {
    let text = "ab 12 µ </s>";
    [
        &tokenizer_json().to_string(),
        TOKENIZER_CONFIG,
        GENERATION_CONFIG,
        text,
    ]
    .join("\0")
    .into()
}

fn model(config: &str, dir: &Path) {
    let config = Config::from_json(&serde_json::from_str(config).unwrap()).unwrap();
    let model = Decoder::init(&config, 5, DType::F32, &Device::flex()).unwrap();
    save(&model, dir, DType::F32).unwrap();
}

fn weights() -> Vec<Vec<u8>> {
    let dir = folder();
    model(models::CONFIG, &dir);
    let single = fs::read(dir.join("model.safetensors")).unwrap();
    let half = potstill::model::load(&dir, DType::F32, &Device::flex()).unwrap();
    save_sharded(&half, &dir.join("half"), DType::BF16, u64::MAX).unwrap();
    vec![
        single,
        fs::read(dir.join("half/model.safetensors")).unwrap(),
    ]
}

fn gguf() -> Vec<Vec<u8>> {
    let dir = folder();
    let mut config: serde_json::Value = serde_json::from_str(models::CONFIG).unwrap();
    config["vocab_size"] = json!(263);
    for (key, value) in [
        ("hidden_size", 32),
        ("intermediate_size", 32),
        ("head_dim", 16),
    ] {
        config[key] = json!(value);
    }
    model(&config.to_string(), &dir);
    // llama.cpp knows neither the normaliser nor the pre-tokenizer of the other seed.
    let mut tokenizer = tokenizer_json();
    tokenizer["normalizer"] =
        json!({ "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" });
    tokenizer["pre_tokenizer"] = json!(null);
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(dir.join("tokenizer_config.json"), TOKENIZER_CONFIG).unwrap();
    fs::write(dir.join("generation_config.json"), GENERATION_CONFIG).unwrap();
    let labels = GgufLabels {
        name: "tiny".into(),
        licence: None,
    };
    let write = |kind: GgufType| {
        let path = dir.join("model.gguf");
        export_gguf(&dir, &path, kind, &labels).unwrap();
        fs::read(&path).unwrap()
    };
    vec![write(GgufType::F16), write(GgufType::Q8_0)]
}
