use std::collections::BTreeMap;

use potstill_datasets::range::{Count, FilePath, Optional, Positive};
use potstill_model::{AdapterLayers, AdapterPlan, BlockType};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A low-rank adapter (Hu et al. 2021): the table `[train.adapter]` of the run file. The layers that it names compute
/// x·Wᵀ + s·(x·Aᵀ)·Bᵀ with a frozen W; only A and B are trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdapterSettings {
    /// Rank r: A is `[r, in]` and B is `[out, r]`.
    #[serde(with = "Count")]
    pub rank: usize,
    /// α of the scale s = α / r. Default: twice the rank.
    #[serde(with = "Optional::<Positive>")]
    pub alpha: Option<f64>,
    /// Whether the scale is α / √r (rsLoRA, Kalajdzievski 2023).
    pub rslora: bool,
    /// Layers that get an adapter: `"all-linear"`, or a list of names, each whole or as the end after a dot, such as
    /// `["q_proj", "v_proj"]`.
    pub targets: AdapterTargets,
    /// Ranks of some layers, by name as in `targets`.
    pub rank_pattern: BTreeMap<String, usize>,
    /// α of some layers, by name as in `targets`.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Quantisation of the frozen weights under the adapter (QLoRA, Dettmers et al. 2023). Default: the type of
    /// `precision`.
    pub base: Option<AdapterBase>,
    /// Folder of an adapter in PEFT's layout that training starts from. Default: A is random and B is zero.
    pub path: Option<FilePath>,
}

impl Default for AdapterSettings {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: None,
            rslora: false,
            targets: AdapterTargets::default(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            base: None,
            path: None,
        }
    }
}

/// Learning rate of an adapter, if the run file sets none: about ten times that of a whole checkpoint's weights would learn
/// as fast, and half of that is PEFT's and TRL's usual choice.
pub(crate) const ADAPTER_RATE: f64 = 2e-4;

impl AdapterSettings {
    /// The adapters of a model; see [`potstill_model::with_adapter`].
    #[must_use]
    pub fn plan(&self) -> AdapterPlan {
        AdapterPlan {
            rank: self.rank,
            alpha: self.alpha.unwrap_or(2.0 * self.rank as f64),
            rslora: self.rslora,
            targets: match &self.targets {
                AdapterTargets::All(_) => AdapterLayers::AllLinear,
                AdapterTargets::Named(names) => AdapterLayers::Named(names.clone()),
            },
            rank_pattern: self.rank_pattern.clone().into_iter().collect(),
            alpha_pattern: self.alpha_pattern.clone().into_iter().collect(),
        }
    }

    /// Whether the run file says which layers have an adapter, and of which rank and scale.
    #[must_use]
    pub fn has_shape(&self) -> bool {
        let unset = Self {
            base: self.base,
            path: self.path.clone(),
            ..Self::default()
        };
        *self != unset
    }
}

/// `targets` of `[train.adapter]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum AdapterTargets {
    /// `"all-linear"`: every linear layer but the head.
    All(AllLinear),
    /// Names of layers.
    Named(Vec<String>),
}

/// The word for all linear layers but the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum AllLinear {
    /// Every linear layer but the head.
    #[default]
    #[serde(rename = "all-linear")]
    AllLinear,
}

impl Default for AdapterTargets {
    fn default() -> Self {
        Self::All(AllLinear::AllLinear)
    }
}

/// `base` of `[train.adapter]`: the blocks in which the frozen weights are kept, as in GGUF files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AdapterBase {
    /// 8 bits and a scale for 32 weights.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// 4 bits and a scale for 32 weights.
    #[serde(rename = "q4_0")]
    Q4_0,
    /// 4 bits, with scales and minima for 32 of 256 weights.
    #[serde(rename = "q4_k")]
    Q4K,
}

impl AdapterBase {
    /// The type of the blocks. A weight whose rows are not whole blocks takes the one that `llama-quantize` takes for it.
    #[must_use]
    pub fn block_type(self) -> BlockType {
        match self {
            Self::Q8_0 => BlockType::Q8_0,
            Self::Q4_0 => BlockType::Q4_0,
            Self::Q4K => BlockType::Q4K,
        }
    }
}
