//! Tensors by name as bytes, in the format of safetensors, which replicas send to one another.

use burn::tensor::{DType, TensorData};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

/// Number types of the tensors, with their counterparts in safetensors.
const TENSOR_TYPES: [(DType, Dtype); 5] = [
    (DType::F64, Dtype::F64),
    (DType::F32, Dtype::F32),
    (DType::F16, Dtype::F16),
    (DType::BF16, Dtype::BF16),
    (DType::U8, Dtype::U8),
];

/// Returns views of tensors for safetensors. An error is the reason.
fn tensor_views(tensors: &[(String, TensorData)]) -> Result<Vec<(&str, TensorView<'_>)>, String> {
    let mut views = Vec::with_capacity(tensors.len());
    for (name, data) in tensors {
        let stored = TENSOR_TYPES
            .iter()
            .find(|(dtype, _)| *dtype == data.dtype());
        let Some((_, stored)) = stored else {
            return Err(format!("{name} is {:?}", data.dtype()));
        };
        let view = TensorView::new(*stored, data.shape().to_vec(), data.bytes());
        views.push((name.as_str(), view.map_err(|why| why.to_string())?));
    }
    Ok(views)
}

/// Encodes tensors. An error is the reason.
pub(crate) fn encode_tensors(tensors: &[(String, TensorData)]) -> Result<Vec<u8>, String> {
    safetensors::serialize(tensor_views(tensors)?, None).map_err(|why| why.to_string())
}

/// Decodes tensors. An error is the reason.
pub(crate) fn decode_tensors(bytes: &[u8]) -> Result<Vec<(String, TensorData)>, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|why| why.to_string())?;
    let mut tensors = Vec::new();
    for (name, view) in file.tensors() {
        let stored = view.dtype();
        let dtype = TENSOR_TYPES.iter().find(|(_, other)| *other == stored);
        let Some((dtype, _)) = dtype else {
            return Err(format!("{name} is {stored:?}"));
        };
        let (bytes, shape) = (view.data().to_vec(), view.shape().to_vec());
        tensors.push((name, TensorData::from_bytes_vec(bytes, shape, *dtype)));
    }
    Ok(tensors)
}
