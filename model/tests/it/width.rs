//! Width pruning of every family whose feed-forward blocks are dense.

use std::collections::BTreeMap;

use burn::tensor::{DType, Device, Tensor};
use potstill_model::{
    Config, Decoder, Error, MapParameters, ParameterName, load, map_parameters, prune_width, save,
};
use serde_json::Value;

use crate::bad_input::keys;
use crate::{host, ids, values};

type Values = BTreeMap<String, (Vec<usize>, Vec<f64>)>;

/// Number of neurons that are kept of 20.
const KEPT: usize = 13;

fn model(family: &str) -> Decoder {
    let config = Config::from_json(&Value::Object(keys(family))).unwrap();
    Decoder::init(&config, 5, DType::F64, &Device::flex()).unwrap()
}

fn by_name(model: &Decoder) -> Values {
    let values = values(model).into_iter();
    values
        .map(|(name, shape, values)| (name, (shape, values)))
        .collect()
}

fn is_dense(family: &str) -> bool {
    !matches!(
        family,
        "qwen3_moe" | "deepseek_v2" | "deepseek_v3" | "gpt_oss"
    )
}

/// The gate and the up rows of a layer, `[w][d]` each.
fn gate_and_up(values: &Values, layer: usize) -> [Vec<Vec<f64>>; 2] {
    let rows = |part: &str| -> Option<Vec<Vec<f64>>> {
        let (shape, values) = values.get(&format!("model.layers.{layer}.mlp.{part}.weight"))?;
        Some(values.chunks(shape[1]).map(<[f64]>::to_vec).collect())
    };
    match rows("gate_up_proj") {
        Some(mut gate) => {
            let up = gate.split_off(gate.len() / 2);
            [gate, up]
        }
        None => ["gate_proj", "up_proj"].map(|part| rows(part).unwrap()),
    }
}

fn down_columns(values: &Values, layer: usize) -> Vec<Vec<f64>> {
    let (shape, values) = &values[&format!("model.layers.{layer}.mlp.down_proj.weight")];
    let column = |j| values.chunks(shape[1]).map(|row| row[j]).collect();
    (0..shape[1]).map(column).collect()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn the_neurons_with_the_largest_weights_are_kept_in_order() {
    for family in Config::families().filter(|family| is_dense(family)) {
        let whole = model(family);
        let cut = prune_width(&whole, KEPT).unwrap();
        assert_eq!(cut.config().keys()["intermediate_size"], KEPT);
        let (all, found) = (by_name(&whole), by_name(&cut));
        for layer in 0..whole.config().num_hidden_layers() {
            let ([gate, up], down) = (gate_and_up(&all, layer), down_columns(&all, layer));
            let weight = |j: usize| norm(&gate[j]) * norm(&up[j]) * norm(&down[j]);
            let mut order: Vec<usize> = (0..20).collect();
            order.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)));
            order.truncate(KEPT);
            order.sort_unstable();
            let kept = |rows: &[Vec<f64>]| -> Vec<Vec<f64>> {
                order.iter().map(|&j| rows[j].clone()).collect()
            };
            assert_eq!(
                gate_and_up(&found, layer),
                [kept(&gate), kept(&up)],
                "{family}"
            );
            assert_eq!(down_columns(&found, layer), kept(&down), "{family}");
        }
        for (name, value) in &found {
            assert!(
                name.contains(".mlp.") || *value == all[name],
                "{family}: {name}"
            );
        }
        let counted: usize = found.values().map(|(_, values)| values.len()).sum();
        assert_eq!(cut.config().parameters(), counted as u64);
        let dir = tempfile::tempdir().unwrap();
        save(&cut, dir.path(), DType::F64).unwrap();
        let loaded = load(dir.path(), DType::F64, &Device::flex()).unwrap();
        assert_eq!(by_name(&loaded), found);
    }
}

/// Sets the columns of `down_proj` from a neuron on to 0.
struct Silence(usize);

impl MapParameters for Silence {
    fn map<const D: usize>(&mut self, parameter: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        if !parameter.name.ends_with("down_proj.weight") {
            return tensor;
        }
        let mut data = tensor.to_data();
        for row in data.as_mut_slice::<f64>().unwrap().chunks_mut(20) {
            row[self.0..].fill(0.0);
        }
        Tensor::from_data(data, (&tensor.device(), DType::F64))
    }
}

#[test]
fn neurons_that_do_nothing_are_cut_without_a_change() {
    for family in Config::families().filter(|family| is_dense(family)) {
        let silent = map_parameters(model(family), &mut Silence(KEPT));
        let cut = prune_width(&silent, KEPT).unwrap();
        let text = ids(&[&[3, 1, 22, 7, 7, 12, 0, 5, 19]], &Device::flex());
        let [a, b] = [&silent, &cut].map(|model| host(model.hidden(text.clone())));
        let largest = (a.iter().zip(&b)).fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
        assert!(largest < 1e-12, "{family}: {largest}");
    }
}

#[test]
fn widths_and_models_that_cannot_be_cut_are_refused() {
    let error = |family, width| match prune_width(&model(family), width) {
        Err(error @ Error::PrunedWidth { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let of_experts = error("qwen3_moe", 3);
    assert!(
        of_experts.contains("because the model has experts\nhint: "),
        "{of_experts}"
    );
    for width in [0, 20, usize::MAX] {
        let message = error("llama", width);
        let start = format!(
            "the feed-forward blocks cannot be cut to {width} neurons, because the model has 20\nhint: "
        );
        assert!(message.starts_with(&start), "{message}");
    }
}
