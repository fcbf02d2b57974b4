//! The float types that models run and are stored in.

use burn::tensor::DType;
use safetensors::tensor::Dtype;

use crate::Error;

/// The types of burn with their counterparts in safetensors.
const TYPES: [(DType, Dtype); 4] = [
    (DType::F64, Dtype::F64),
    (DType::F32, Dtype::F32),
    (DType::F16, Dtype::F16),
    (DType::BF16, Dtype::BF16),
];

/// Checks that models run in a type.
pub(crate) fn check_model_dtype(dtype: DType) -> Result<(), Error> {
    to_safetensors(dtype).map(|_| ())
}

/// Returns the safetensors type of a type that models run in.
pub(crate) fn to_safetensors(dtype: DType) -> Result<Dtype, Error> {
    let found = TYPES.iter().find(|(burn, _)| *burn == dtype);
    found
        .map(|(_, stored)| *stored)
        .ok_or(Error::FloatType { dtype })
}

/// Returns the type that models run in of a safetensors type, if there is one.
pub(crate) fn from_safetensors(stored: Dtype) -> Option<DType> {
    let found = TYPES.iter().find(|(_, other)| *other == stored);
    found.map(|(burn, _)| *burn)
}
