use burn::tensor::Tensor;
use potstill_model::{DType, Decoder, MapParameters, ParameterName, Role, map_parameters};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Number type in which a training computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// Weights, activations and products in bfloat16. The weights that are trained, the gains of norms, the residual stream,
    /// sums of gradients, losses and statistics are in f32.
    Bf16,
}

impl Precision {
    /// The type of the model's tensors.
    #[must_use]
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// Casts all parameters of a model but the gains of norms, whose rounding changes a loss by more than that of all products,
/// and the corrections of routers, which are in f32 in every model.
pub(crate) fn cast(model: Decoder, dtype: DType) -> Decoder {
    struct Cast(DType);
    impl MapParameters for Cast {
        fn map<const D: usize>(&mut self, name: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
            match name.role {
                Role::Norm | Role::Correction => tensor,
                _ => tensor.cast(self.0),
            }
        }
    }
    map_parameters(model, &mut Cast(dtype))
}
