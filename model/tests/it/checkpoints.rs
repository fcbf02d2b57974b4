//! Saving, loading and layer pruning, and the error of each kind of broken checkpoint.

use std::path::Path;

use burn::tensor::{DType, Device};
use half::{bf16, f16};
use potstill_model::{Decoder, Error, load, prune_layers, save, save_sharded, weight_files};

use crate::{small, values};

/// The rounding of a value to a stored type.
type Round = fn(f64) -> f64;

#[test]
fn every_type_survives_a_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    for tied in [true, false] {
        let model = small(tied, DType::F64);
        let rounded: [(DType, Round); 4] = [
            (DType::F64, |x| x),
            (DType::F32, |x| f64::from(x as f32)),
            (DType::F16, |x| f16::from_f64(x).to_f64()),
            (DType::BF16, |x| bf16::from_f64(x).to_f64()),
        ];
        for (dtype, round) in rounded {
            save(&model, dir.path(), dtype).unwrap();
            let wide = load(dir.path(), DType::F64, &Device::flex()).unwrap();
            let same = load(dir.path(), dtype, &Device::flex()).unwrap();
            assert_eq!(same.dtype(), dtype);
            assert_eq!(same.config().to_json(dtype), model.config().to_json(dtype));
            assert_eq!(values(&same), values(&wide));
            for ((_, _, expected), (name, _, found)) in
                values(&model).into_iter().zip(values(&wide))
            {
                let expected: Vec<f64> = expected.into_iter().map(round).collect();
                assert_eq!(found, expected, "{name} {dtype:?}");
            }
            // Saving the loaded model writes the same bytes.
            let first = std::fs::read(dir.path().join("model.safetensors")).unwrap();
            save(&same, dir.path(), dtype).unwrap();
            let second = std::fs::read(dir.path().join("model.safetensors")).unwrap();
            assert_eq!(first, second);
        }
    }
}

#[test]
fn a_configuration_counts_the_parameters_of_its_model() {
    for tied in [true, false] {
        let model = small(tied, DType::F32);
        let counted: usize = values(&model).iter().map(|(_, _, v)| v.len()).sum();
        assert_eq!(model.config().parameters(), counted as u64);
    }
}

#[test]
fn shards_are_written_and_read() {
    let dir = tempfile::tempdir().unwrap();
    let model = small(false, DType::F32);
    save(&model, dir.path(), DType::F32).unwrap();
    save_sharded(&model, dir.path(), DType::F32, 8_000).unwrap();
    let files = weight_files(dir.path()).unwrap();
    assert!(files.len() > 2, "{files:?}");
    assert!(files[0].ends_with(format!("model-00001-of-{:05}.safetensors", files.len())));
    let loaded = load(dir.path(), DType::F32, &Device::flex()).unwrap();
    assert_eq!(values(&loaded), values(&model));

    std::fs::remove_file(&files[1]).unwrap();
    let error = load(dir.path(), DType::F32, &Device::flex()).unwrap_err();
    assert!(matches!(error, Error::MissingShard { .. }));
    let message = message(&error, dir.path());
    assert!(
        message.starts_with("`DIR/model-00002-of-")
            && message.contains("does not exist, but `DIR/model.safetensors.index.json` names it for the tensor `model.layers.")
            && message.ends_with("\nhint: download the missing shard"),
        "{message}"
    );

    // Saving to one file removes the index.
    save(&model, dir.path(), DType::F32).unwrap();
    assert_eq!(weight_files(dir.path()).unwrap().len(), 1);
    assert!(!dir.path().join("model.safetensors.index.json").exists());
}

#[test]
fn errors_of_broken_checkpoints_name_file_and_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let fail = || {
        let error = load(dir.path(), DType::F32, &Device::flex()).unwrap_err();
        message(&error, dir.path())
    };
    assert_eq!(fail(), "cannot read `DIR/config.json`");

    let model = small(false, DType::F32);
    let weights = dir.path().join("model.safetensors");
    let config = dir.path().join("config.json");
    save(&model, dir.path(), DType::F32).unwrap();
    let whole = std::fs::read(&weights).unwrap();

    std::fs::remove_file(&weights).unwrap();
    assert_eq!(
        fail(),
        "`DIR` holds neither `model.safetensors` nor `model.safetensors.index.json` nor `model.gguf`\nhint: name a folder with weights in Hugging Face layout"
    );

    for length in [0, 4, 100, whole.len() - 1] {
        std::fs::write(&weights, &whole[..length]).unwrap();
        assert_eq!(
            fail(),
            "`DIR/model.safetensors` is not a complete safetensors file\nhint: the file may be truncated; download it again"
        );
    }
    std::fs::write(&weights, &whole).unwrap();

    let with = |key, value: usize| {
        let changed = model.config().with_keys([(key, value.into())]).unwrap();
        std::fs::write(&config, changed.to_json(DType::F32).to_string()).unwrap();
    };
    with("num_hidden_layers", 5);
    assert_eq!(
        fail(),
        "`DIR/model.safetensors` has no tensor `model.layers.4.input_layernorm.weight`\nhint: the weights do not belong to this `config.json`; use both from the same model"
    );
    with("num_hidden_layers", 3);
    assert_eq!(
        fail(),
        "`DIR/model.safetensors`: `config.json` has no place for 9 of the stored tensors, among them `model.layers.3.input_layernorm.weight`\nhint: `num_hidden_layers` or another size in `config.json` may be wrong; use both files from the same model"
    );
    with("intermediate_size", 21);
    assert_eq!(
        fail(),
        "`DIR/model.safetensors`: tensor `model.layers.0.mlp.gate_proj.weight` has the shape [20, 12], but `config.json` requires [21, 12]\nhint: the weights do not belong to this `config.json`; use both from the same model"
    );
    std::fs::write(&config, "{ \"model_type\": ").unwrap();
    assert_eq!(
        fail(),
        "`DIR/config.json` is not valid JSON for a model configuration\nhint: the file may be truncated; get it again"
    );

    std::fs::write(&config, model.config().to_json(DType::F32).to_string()).unwrap();
    let text = String::from_utf8_lossy(&whole[8..]).into_owned();
    assert!(text.contains("\"F32\""));
    let integers: Vec<u8> = {
        // The type in the JSON header is changed to integers of the same width.
        let mut bytes = whole.clone();
        let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        let replaced = String::from_utf8(whole[8..8 + header].to_vec())
            .unwrap()
            .replace("F32", "I32");
        bytes[8..8 + header].copy_from_slice(replaced.as_bytes());
        bytes
    };
    std::fs::write(&weights, integers).unwrap();
    assert_eq!(
        fail(),
        "`DIR/model.safetensors`: tensor `model.embed_tokens.weight` is stored as I32, but only F64, F32, F16, BF16 and F8_E4M3 are supported\nhint: use the checkpoint in one of these types"
    );

    let error = load(dir.path(), DType::I32, &Device::flex()).unwrap_err();
    assert!(matches!(error, Error::FloatType { .. }));
}

#[test]
fn saving_to_a_folder_that_cannot_be_created_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = save(&small(true, DType::F32), &file.join("sub"), DType::F32).unwrap_err();
    assert_eq!(message(&error, dir.path()), "cannot create `DIR/file/sub`");
}

#[test]
fn layer_pruning_keeps_the_named_layers_in_order() {
    let model = small(false, DType::F32);
    for kept in [
        vec![0, 1, 2, 3],
        vec![0, 2],
        vec![0, 3],
        vec![2],
        vec![3, 1],
    ] {
        let student = prune_layers(&model, &kept).unwrap();
        assert_eq!(student.config().num_hidden_layers(), kept.len());
        let all = values(&model);
        for (name, shape, found) in values(&student) {
            let source = match name.strip_prefix("model.layers.") {
                None => name.clone(),
                Some(rest) => {
                    let (layer, part) = rest.split_once('.').unwrap();
                    let from = kept[layer.parse::<usize>().unwrap()];
                    format!("model.layers.{from}.{part}")
                }
            };
            let expected = all.iter().find(|(name, _, _)| *name == source).unwrap();
            assert_eq!((&shape, &found), (&expected.1, &expected.2), "{name}");
        }
    }
    for wrong in [vec![], vec![4], vec![0, 17]] {
        let pruned = prune_layers(&model, &wrong);
        assert!(matches!(pruned, Err(Error::PrunedLayers { count: 4, .. })));
    }
}

#[test]
fn initial_weights_depend_on_the_seed_only() {
    let model = small(false, DType::F32);
    assert_eq!(values(&model), values(&small(false, DType::F32)));
    let init = |seed| Decoder::init(model.config(), seed, DType::F32, &Device::flex()).unwrap();
    assert_ne!(values(&model), values(&init(8)));
    // A model of another type has the same numbers, rounded.
    for ((name, _, wide), (_, _, narrow)) in values(&small(false, DType::F64))
        .into_iter()
        .zip(values(&model))
    {
        let rounded: Vec<f64> = wide.iter().map(|x| f64::from(*x as f32)).collect();
        assert_eq!(rounded, narrow, "{name}");
    }
    let (name, shape, embedding) = values(&model).remove(0);
    assert_eq!(
        (name.as_str(), shape),
        ("model.embed_tokens.weight", vec![23, 12])
    );
    let mean_square = embedding.iter().map(|x| x * x).sum::<f64>() / embedding.len() as f64;
    assert!((mean_square.sqrt() - 0.02).abs() < 0.002, "{mean_square}");
}

/// Returns the message of an error, with `DIR` in place of the temporary folder.
fn message(error: &Error, dir: &Path) -> String {
    error.to_string().replace(&dir.display().to_string(), "DIR")
}
