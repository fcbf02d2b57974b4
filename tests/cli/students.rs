//! Students of other shapes and families than the checkpoint, with a tiny random teacher.

use std::fs;

use potstill::model::{Config, DType, Decoder, Device};
use serde_json::{Value, json};

use crate::fixture::{Run, VOCABULARY, write_model};

/// Replaces the teacher by a random model with these keys besides those of the tiny one.
fn write_teacher(run: &Run, keys: &Value) {
    let dir = run.path("model");
    let config = Config::from_dir(&dir).unwrap();
    let keys = keys.as_object().unwrap().iter();
    let config = config.with_keys(keys.map(|(key, value)| (key.as_str(), value.clone())));
    let model = Decoder::init(&config.unwrap(), 5, DType::F32, &Device::flex()).unwrap();
    potstill::model::save(&model, &dir, DType::F32).unwrap();
}

fn exported(run: &Run) -> Config {
    Config::from_dir(&run.path("runs/tiny/students/student/export")).unwrap()
}

#[test]
fn a_dense_student_of_another_family_learns_from_experts_with_a_padded_vocabulary() {
    let run = Run::new();
    write_model(&run.path("model"), VOCABULARY + 5);
    let experts = json!({
        "model_type": "qwen3_moe", "architectures": null, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    });
    write_teacher(&run, &experts);
    run.edit(
        "layers = { every = 2 }",
        "random = { family = \"gemma2\", hidden_size = 16, intermediate_size = 24, layers = 2, heads = 2, sliding_window = 8, final_logit_softcapping = 20.0 }",
    );
    let output = run.run();
    assert!(!output.stderr.contains("rescaled"), "{}", output.stderr);
    let student = exported(&run);
    assert_eq!(
        (student.model_type(), student.vocab_size),
        ("gemma2", VOCABULARY)
    );
    assert_eq!(
        student.keys()["architectures"],
        json!(["Gemma2ForCausalLM"])
    );
    assert!(run.path("runs/tiny/report.md").exists());
}

#[test]
fn layers_and_width_are_cut_together() {
    let run = Run::new();
    run.edit(
        "layers = { every = 2 }",
        "layers = { every = 2 }\nintermediate_size = 10",
    );
    let output = run.potstill(&["check", "run.toml"]);
    assert!(
        output
            .stdout
            .contains("1 of 2 layers: [0]; 10 neurons in each feed-forward layer"),
        "{}",
        output.stdout
    );
    run.run();
    let student = exported(&run);
    assert_eq!(
        (
            student.num_hidden_layers(),
            &student.keys()["intermediate_size"]
        ),
        (1, &json!(10))
    );
}

#[test]
fn students_that_cannot_be_made_are_refused_at_their_key() {
    let message = |edit: &str, teacher: &Value| {
        let run = Run::new();
        write_teacher(&run, teacher);
        run.edit("layers = { every = 2 }", edit);
        let output = run.potstill(&["check", "run.toml"]);
        assert_eq!(output.code, 2, "{}", output.stderr);
        output.stderr
    };
    let random = |keys: &str| {
        let edit = format!("random = {{ hidden_size = 16, intermediate_size = 24, {keys} }}");
        message(&edit, &json!({}))
    };
    let experts = json!({
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    });
    let cases = [
        (
            random("layers = 2, heads = 3"),
            "`random.heads` in [student]: `hidden_size` 16 is not 3 heads times an even number",
        ),
        (
            random("layers = 2, heads = 2, sliding_windw = 8"),
            "`random.sliding_windw` in [student]: this key changes nothing in a model of the family llama",
        ),
        (
            random("layers = 2, heads = 2, family = \"mamba\""),
            "`random.family` in [student]: \"mamba\" is not supported, only llama, ",
        ),
        (
            random("heads = 2"),
            "`random.num_hidden_layers` in [student]: absent, must be a whole number above 0",
        ),
        (
            message("intermediate_size = 24", &json!({})),
            "`intermediate_size` in [student]: the feed-forward blocks cannot be cut to 24 neurons, because the model has 24",
        ),
        (
            message("intermediate_size = 8", &experts),
            "`intermediate_size` in [student]: the feed-forward blocks cannot be cut to 8 neurons, because the model has experts",
        ),
    ];
    for (message, expected) in cases {
        assert!(message.contains(expected), "{message}");
        assert!(
            message.contains("error: run.toml:2") && message.contains("\nhint: "),
            "{message}"
        );
    }
}

#[test]
fn a_student_larger_than_the_memory_is_refused_before_anything_is_computed() {
    let run = Run::new();
    run.edit(
        "layers = { every = 2 }",
        "random = { hidden_size = 1000000, intermediate_size = 1000000, layers = 9, heads = 10000 }",
    );
    for command in ["check", "run"] {
        let output = run.potstill(&[command, "run.toml"]);
        assert_ne!(output.code, 0);
        assert!(
            output
                .stderr
                .contains("`random` in [student]: training the student takes at least 1e6 GB")
                && output.stderr.contains("\nhint: choose a smaller student"),
            "{}",
            output.stderr
        );
    }
    assert!(fs::metadata(run.path("runs/tiny/completions")).is_err());
}

/// A configuration that does not belong to the weights is found before anything is computed.
#[test]
fn a_configuration_of_another_model_is_refused_with_a_way_out() {
    let message = |key: &str, value: Value| {
        let run = Run::new();
        run.edit("layers = { every = 2 }", "path = \"model\"");
        let path = run.path("model/config.json");
        let mut keys: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        keys[key] = value;
        fs::write(&path, keys.to_string()).unwrap();
        let output = run.potstill(&["run", "run.toml"]);
        assert_ne!(output.code, 0, "{}", output.stderr);
        assert!(!output.stderr.contains("panicked"), "{}", output.stderr);
        output.stderr
    };
    let cases = [
        (
            "vocab_size",
            json!(1_000_000_000u64),
            "model/config.json`, key `vocab_size`: 1000000000 is larger than any model",
        ),
        (
            "vocab_size",
            json!(1_000_000),
            "tensor `model.embed_tokens.weight` has the shape [259, 16]",
        ),
        (
            "hidden_size",
            json!(1u64 << 63),
            "model/config.json`, key `hidden_size`: 9223372036854775808 is larger than any model",
        ),
        (
            "num_hidden_layers",
            json!(1),
            "has no place for 9 of the stored tensors, among them `model.layers.1.",
        ),
        (
            "eos_token_id",
            json!(259),
            "model/config.json: `eos_token_id` 259 is not an id of the vocabulary in tokenizer.json",
        ),
        (
            "eos_token_id",
            json!([]),
            "model/config.json: `eos_token_id` [] names no token",
        ),
        (
            "model_type",
            json!("mamba"),
            "model/config.json`, key `model_type`: \"mamba\" is not supported",
        ),
    ];
    for (key, value, expected) in cases {
        let message = message(key, value);
        assert!(message.contains(expected), "{message}");
        assert!(message.contains("hint: "), "{message}");
    }
}
