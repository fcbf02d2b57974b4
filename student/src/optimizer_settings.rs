use potstill_model::Role;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `optimizer` of `[train]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// AdamW (Loshchilov and Hutter 2019).
    #[default]
    AdamW,
    /// Muon (Jordan et al. 2024) for the weights of linear layers, and AdamW for all other parameters.
    Muon,
}

/// `moments` of `[train]`: the number type of AdamW's moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum MomentType {
    /// 32 bits.
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// bfloat16.
    #[serde(rename = "bf16")]
    Bf16,
    /// 8 bits, with a scale for a block of 256 (Dettmers et al. 2022). Parameters of fewer than 4,096 numbers keep 32 bits.
    #[serde(rename = "8bit")]
    Int8,
}

/// An entry of `weight_decay_on` of `[train]`: parameters with the same part in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DecayedRole {
    /// Weights of linear layers.
    Projections,
    /// The head, if it is not tied to the embedding.
    Head,
    /// The embedding, and the head if the two are tied.
    Embedding,
    /// Gains of norms.
    Norms,
    /// Biases, and the sinks of attention.
    Biases,
    /// Matrices of a low-rank adapter.
    Adapters,
}

impl DecayedRole {
    /// Roles that decay unless the run file says otherwise.
    pub(crate) const DEFAULT: [Self; 3] = [Self::Projections, Self::Head, Self::Adapters];

    pub(super) fn has(self, role: Role) -> bool {
        match self {
            Self::Projections => role == Role::Projection,
            Self::Head => role == Role::Head,
            Self::Embedding => role == Role::Embedding,
            Self::Norms => role == Role::Norm,
            Self::Biases => role == Role::Bias,
            Self::Adapters => role == Role::Adapter,
        }
    }
}
