use serde_json::json;

use super::*;

fn base() -> Map<String, Value> {
    let value = json!({
        "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "eos_token_id": [2, 3],
    });
    value.as_object().unwrap().clone()
}

fn read(keys: &Map<String, Value>) -> Result<Config, Error> {
    Config::read(Path::new("m/config.json"), keys.clone())
}

#[test]
fn defaults_are_those_of_transformers() {
    let config = read(&base()).unwrap();
    assert_eq!(config.max_position_embeddings, 2048);
    assert!(!config.tie_word_embeddings);
    assert_eq!(config.eos_token_id, [2, 3]);
    assert_eq!(config.bos_token_id, None);
}

#[test]
fn both_forms_of_the_rotary_base_are_read() {
    let mut keys = base();
    keys.remove("rope_theta");
    keys.insert(
        "rope_parameters".to_owned(),
        json!({"rope_theta": 5000.0, "rope_type": "default"}),
    );
    let (new, old) = (read(&keys).unwrap(), read(&base()).unwrap());
    assert_eq!(new.plan.rotary, old.plan.rotary);
    assert_eq!(old.plan.rotary[0].frequencies[1], 1.0 / 5000f32.powf(0.5));
}

#[test]
fn a_written_configuration_is_read_back_unchanged() {
    let mut keys = base();
    keys.insert("unknown".to_owned(), json!({"kept": true}));
    let config = read(&keys).unwrap();
    let json = config.to_json(DType::BF16);
    assert_eq!(json["torch_dtype"], "bfloat16");
    assert_eq!(json["unknown"], json!({"kept": true}));
    let again = Config::from_json(&json).unwrap();
    assert_eq!((again.plan, again.eos_token_id), (config.plan, vec![2, 3]));
}

#[test]
fn errors_name_the_file_and_the_key() {
    let cases = [
        (
            "hidden_act",
            json!("gelu"),
            "\"gelu\" is not supported, only \"silu\" and \"gelu_pytorch_tanh\"",
        ),
        (
            "rope_scaling",
            json!({"type": "ntk"}),
            "rope_type \"ntk\" is not supported, only \"default\", \"linear\", \"dynamic\", \"llama3\", \"yarn\" and \"longrope\"",
        ),
        (
            "num_hidden_layers",
            json!(0),
            "0 must be a whole number above 0",
        ),
        (
            "vocab_size",
            json!(1u64 << 40),
            "1099511627776 is larger than any model, 268435456",
        ),
        (
            "num_hidden_layers",
            json!(20_000),
            "20000 is more than the 10000 layers that are supported",
        ),
        (
            "num_key_value_heads",
            json!(3),
            "3 does not divide num_attention_heads, 4",
        ),
        (
            "head_dim",
            json!(3),
            "3 is odd, but rotary positions rotate pairs of numbers",
        ),
        (
            "rope_theta",
            json!("big"),
            "\"big\" must be a number above 0",
        ),
        ("tie_word_embeddings", json!(1), "1 must be true or false"),
        ("eos_token_id", json!([2, -1]), "-1 must be a token id"),
        ("pretraining_tp", json!(2), "2 is not supported, only 1"),
    ];
    for (key, value, why) in cases {
        let mut keys = base();
        keys.insert(key.to_owned(), value);
        let message = format!("`m/config.json`, key `{key}`: {why}");
        let error = read(&keys).unwrap_err().to_string();
        assert_eq!(error.split("\nhint: ").next(), Some(message.as_str()));
    }
    let mut keys = base();
    keys.insert("model_type".to_owned(), json!("mamba"));
    let message = read(&keys).unwrap_err().to_string();
    assert!(
        message.starts_with(
            "`m/config.json`, key `model_type`: \"mamba\" is not supported, only llama, mistral, "
        ),
        "{message}"
    );
}

#[test]
fn the_error_of_an_absent_file_names_it() {
    let error = Config::from_dir(Path::new("no/such/folder")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot read `no/such/folder/config.json`"
    );
}

#[test]
fn phi3_has_earlier_names_of_longrope() {
    let with = |kind: &str| {
        let mut keys = base();
        keys.insert("model_type".to_owned(), json!("phi3"));
        keys.insert(
            "rope_scaling".to_owned(),
            json!({
                "type": kind, "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0],
                "original_max_position_embeddings": 64,
            }),
        );
        read(&keys).unwrap().plan.rotary
    };
    assert_eq!(with("longrope")[0].long.as_ref().unwrap().limit, 64);
    for kind in ["su", "yarn"] {
        assert_eq!(with(kind), with("longrope"), "{kind}");
    }
}
