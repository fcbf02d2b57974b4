//! Low-rank adapters of linear layers (LoRA, Hu et al. 2021): which layers have one, how it starts, and how it is merged.
//!
//! A layer with an adapter computes y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ. The scale s is α / r, or α / √r (rsLoRA, Kalajdzievski
//! 2023). Layers are named as in PEFT: a name is whole, such as `model.layers.0.self_attn.q_proj`, or the end of a name
//! after a dot, such as `q_proj`. The head, routers and experts have no adapters.

mod config;
mod files;
mod quantise;

use std::collections::BTreeSet;

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::layers::{Adapter, AdapterScale, Linear, MapLayers, Weight};
use crate::parameters::{MapParameters, ParameterName, Role};
use crate::{Decoder, Error};

pub use files::{ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, load_adapter, save_adapter};
pub use quantise::quantized;
pub(crate) use quantise::quantized_layer;

/// The layers that get an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdapterLayers {
    /// Every linear layer but the head, routers and experts.
    AllLinear,
    /// The layers with these names, whole or as the end after a dot.
    Named(Vec<String>),
}

/// The adapters of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterPlan {
    /// Rank r: A is `[r, in]` and B is `[out, r]`.
    pub rank: usize,
    /// α of the scale.
    pub alpha: f64,
    /// Whether the scale is α / √r in place of α / r.
    pub rslora: bool,
    /// The layers that get an adapter.
    pub targets: AdapterLayers,
    /// Ranks of some layers, by name as in `targets`. The first name that fits a layer counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// α of some layers, likewise.
    pub alpha_pattern: Vec<(String, f64)>,
}

impl AdapterPlan {
    /// Returns the rank of the adapter of a layer.
    #[must_use]
    pub fn rank_of(&self, layer: &str) -> usize {
        *matching(&self.rank_pattern, layer).unwrap_or(&self.rank)
    }

    /// Returns the scale of the adapter of a layer.
    fn scale_of(&self, layer: &str) -> AdapterScale {
        AdapterScale {
            alpha: *matching(&self.alpha_pattern, layer).unwrap_or(&self.alpha),
            rslora: self.rslora,
        }
    }
}

fn matching<'a, T>(patterns: &'a [(String, T)], layer: &str) -> Option<&'a T> {
    let found = patterns.iter().find(|(name, _)| is_named(layer, name));
    found.map(|(_, value)| value)
}

/// Whether `name` is the name of a layer, or its end after a dot.
fn is_named(layer: &str, name: &str) -> bool {
    let before = layer.strip_suffix(name);
    !name.is_empty() && before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// Whether a linear layer may have an adapter.
pub(crate) fn can_have_adapter(layer: &str, role: Role) -> bool {
    role == Role::Projection && !layer.contains(".experts.")
}

/// Gives layers of a model new adapters: A is uniform in ±1/√in, as PEFT draws it, and B is zero, so the model computes
/// what it computed before. The same seed gives the same numbers on every device. An adapter that a layer has already is
/// replaced.
///
/// # Errors
/// Returns an error for a name of the plan that no layer has, or that only layers have that get no adapter, and for a rank
/// of 0.
pub fn with_adapter(model: Decoder, plan: &AdapterPlan, seed: u64) -> Result<Decoder, Error> {
    let mut names = LayerNames::default();
    let model = model.map_layers(&mut names);
    names.check(plan)?;
    let mut attach = Attach {
        dtype: model.dtype(),
        device: model.device().inner(),
        plan,
        seed,
        stream: 0,
    };
    Ok(model.map_layers(&mut attach))
}

/// Returns the names of the linear layers that have an adapter, in the order of the parameters.
#[must_use]
pub fn adapted_layers(model: &Decoder) -> Vec<String> {
    let mut names = LayerNames::default();
    let _unchanged = model.clone().map_layers(&mut names);
    names.adapted
}

/// Merges adapters into the weights: W + s·B·A, computed in f32 (in f64 for models in f64) and cast to the type of the
/// model. The result has no adapters and no weights in blocks. A weight whose storage is not shared is freed when its
/// successor is made.
#[must_use]
pub fn merged(model: Decoder) -> Decoder {
    let (dtype, device) = (model.dtype(), model.device().inner());
    model.map_layers(&mut MergeAdapters { dtype, device })
}

/// Names of linear layers.
#[derive(Default)]
struct LayerNames {
    /// Layers that may have an adapter.
    free: Vec<String>,
    /// Other linear layers, and stacked weights of experts.
    barred: Vec<String>,
    /// Layers that have an adapter.
    adapted: Vec<String>,
}

impl LayerNames {
    fn check(&self, plan: &AdapterPlan) -> Result<(), Error> {
        let targets = match &plan.targets {
            AdapterLayers::AllLinear => &[],
            AdapterLayers::Named(names) => names.as_slice(),
        };
        let named = targets.iter().map(|name| ("targets", name));
        let ranks = plan.rank_pattern.iter();
        let ranks = ranks.map(|(name, _)| ("rank_pattern", name));
        let alphas = plan.alpha_pattern.iter();
        let alphas = alphas.map(|(name, _)| ("alpha_pattern", name));
        for (key, name) in named.chain(ranks).chain(alphas) {
            self.check_name(key, name)?;
        }
        let ranks = plan.rank_pattern.iter().map(|(_, rank)| *rank);
        match ranks.chain([plan.rank]).min() {
            Some(0) => Err(Error::Adapter {
                what: "an adapter of rank 0 has no parameters".to_owned(),
                hint: "set a rank of 1 or more".to_owned(),
            }),
            _ => Ok(()),
        }
    }

    fn check_name(&self, key: &str, name: &str) -> Result<(), Error> {
        if self.free.iter().any(|layer| is_named(layer, name)) {
            return Ok(());
        }
        let hint = format!(
            "the linear layers of this model are called {}; name some of them, or set `targets = \"all-linear\"`",
            self.ends()
        );
        let barred = self.barred.iter().find(|layer| is_named(layer, name));
        let what = match barred {
            Some(layer) => format!(
                "`{key}` names `{name}`, but `{layer}` cannot have an adapter: the head, routers and experts have none"
            ),
            None => format!("`{key}` names `{name}`, but no linear layer has this name"),
        };
        Err(Error::Adapter { what, hint })
    }

    /// The distinct ends of the layers' names, in the order of the layers.
    fn ends(&self) -> String {
        let mut seen = BTreeSet::new();
        let ends = self
            .free
            .iter()
            .filter_map(|layer| layer.rsplit('.').next());
        let ends: Vec<&str> = ends.filter(|end| seen.insert(*end)).collect();
        ends.join(", ")
    }
}

impl MapParameters for LayerNames {
    fn map<const D: usize>(&mut self, parameter: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        if D == 3 {
            self.barred.push(parameter.name.clone());
        }
        tensor
    }
}

impl MapLayers for LayerNames {
    fn map_linear(&mut self, name: &str, role: Role, linear: Linear) -> Linear {
        match can_have_adapter(name, role) {
            true => self.free.push(name.to_owned()),
            false => self.barred.push(name.to_owned()),
        }
        if linear.adapter.is_some() {
            self.adapted.push(name.to_owned());
        }
        linear
    }
}

/// Gives layers the adapters of a plan.
struct Attach<'a> {
    plan: &'a AdapterPlan,
    dtype: DType,
    device: Device,
    seed: u64,
    /// Number of adapters made so far: each draws from a ChaCha stream of its own.
    stream: u64,
}

impl Attach<'_> {
    fn is_target(&self, name: &str) -> bool {
        match &self.plan.targets {
            AdapterLayers::AllLinear => true,
            AdapterLayers::Named(names) => names.iter().any(|target| is_named(name, target)),
        }
    }

    /// Draws A `[rank, inputs]`.
    fn draw(&mut self, [rank, inputs]: [usize; 2]) -> TensorData {
        let mut generator = ChaCha8Rng::seed_from_u64(self.seed);
        generator.set_stream(self.stream);
        self.stream += 1;
        let bound = 1.0 / (inputs as f64).sqrt();
        let values: Vec<f64> = (0..rank * inputs)
            .map(|_| bound * (2.0 * generator.random::<f64>() - 1.0))
            .collect();
        TensorData::new(values, [rank, inputs])
    }
}

impl MapParameters for Attach<'_> {
    fn map<const D: usize>(&mut self, _: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        tensor
    }
}

impl MapLayers for Attach<'_> {
    fn map_linear(&mut self, name: &str, role: Role, linear: Linear) -> Linear {
        if !can_have_adapter(name, role) || !self.is_target(name) {
            return linear;
        }
        let rank = self.plan.rank_of(name);
        let [outputs, inputs] = linear.weight.dims();
        let drawn = self.draw([rank, inputs]);
        let options = (&self.device, self.dtype);
        let down_ri = Tensor::from_data(drawn, options);
        let up_or = Tensor::zeros([outputs, rank], options);
        Linear {
            adapter: Some(new_adapter(down_ri, up_or, self.plan.scale_of(name))),
            ..linear
        }
    }
}

fn new_adapter(down_ri: Tensor<2>, up_or: Tensor<2>, scale: AdapterScale) -> Adapter {
    Adapter {
        down: Param::from_tensor(down_ri),
        up: Param::from_tensor(up_or),
        scale,
    }
}

/// Replaces weights by merged weights.
struct MergeAdapters {
    dtype: DType,
    device: Device,
}

impl MapParameters for MergeAdapters {
    fn map<const D: usize>(&mut self, _: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        tensor
    }
}

impl MapLayers for MergeAdapters {
    fn map_linear(&mut self, _: &str, _: Role, linear: Linear) -> Linear {
        let weight = match linear.weight {
            Weight::Dense(weight) => weight,
            Weight::Blocks(_) => Param::from_tensor(linear.weight.dense(self.dtype, &self.device)),
        };
        let adapter = linear.adapter;
        Linear {
            weight: Weight::Dense(match adapter {
                Some(adapter) => weight.map(|weight_oi| merge(weight_oi, &adapter)),
                None => weight,
            }),
            bias: linear.bias,
            adapter: None,
        }
    }
}

/// Computes W + s·B·A.
fn merge(weight_oi: Tensor<2>, adapter: &Adapter) -> Tensor<2> {
    let dtype = weight_oi.dtype();
    let wide = match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    let widened = |tensor: Tensor<2>| tensor.without_autodiff().cast(wide);
    let product_oi = widened(adapter.up.val()).matmul(widened(adapter.down.val()));
    (widened(weight_oi) + product_oi * adapter.factor()).cast(dtype)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_whole_or_end_after_a_dot() {
        let layer = "model.layers.1.self_attn.q_proj";
        for name in [
            layer,
            "q_proj",
            "self_attn.q_proj",
            "layers.1.self_attn.q_proj",
        ] {
            assert!(is_named(layer, name), "{name}");
        }
        for name in [
            "",
            "proj",
            "_proj",
            "q",
            "model.layers.1",
            ".q_proj",
            "q_proj.",
        ] {
            assert!(!is_named(layer, name), "{name}");
        }
    }

    #[test]
    fn scales_follow_from_rank_and_alpha_and_their_patterns() {
        let mut plan = AdapterPlan {
            rank: 4,
            alpha: 8.0,
            rslora: false,
            targets: AdapterLayers::AllLinear,
            rank_pattern: vec![("q_proj".to_owned(), 16)],
            alpha_pattern: vec![("model.a.k_proj".to_owned(), 2.0)],
        };
        let of = |plan: &AdapterPlan, layer: &str| {
            let rank = plan.rank_of(layer);
            (rank, plan.scale_of(layer).factor(rank))
        };
        assert_eq!(of(&plan, "model.a.v_proj"), (4, 2.0));
        assert_eq!(of(&plan, "model.a.q_proj"), (16, 0.5));
        assert_eq!(of(&plan, "model.a.k_proj"), (4, 0.5));
        plan.rslora = true;
        assert_eq!(of(&plan, "model.a.q_proj"), (16, 2.0));
        assert_eq!(of(&plan, "model.a.v_proj"), (4, 4.0));
    }
}
