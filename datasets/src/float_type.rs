use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Floating-point type of a model's weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FloatType {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits with the exponent range of `f32`.
    Bf16,
    /// 16 bits, IEEE 754 half precision.
    F16,
    /// 64 bits.
    F64,
}
