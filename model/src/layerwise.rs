//! The forward pass, one layer at a time: for callers that keep only the inputs of layers and compute the rest again.

use burn::tensor::Tensor;

use crate::Decoder;
use crate::attend::Documents;
use crate::rotary::{RotaryAngles, RowPosition};

/// A forward pass over consecutive documents, in steps. [`Decoder::hidden_from`] computes the same, bit for bit.
#[derive(Debug)]
pub struct Layerwise<'a> {
    model: &'a Decoder,
    documents: &'a [usize],
    rotary: Vec<RotaryAngles>,
}

impl<'a> Layerwise<'a> {
    /// Prepares a pass over documents of these lengths.
    #[must_use]
    pub fn new(model: &'a Decoder, documents: &'a [usize]) -> Self {
        Self {
            model,
            documents,
            rotary: model.rotary_angles(&RowPosition::of_documents(documents)),
        }
    }

    /// Number of layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.model.layers.len()
    }

    /// Computes the input of the first layer from embeddings: `[n, d]` → `[n, d]`.
    #[must_use]
    pub fn first_input(&self, embedded_nd: Tensor<2>) -> Tensor<2> {
        self.model.scaled_embeddings(embedded_nd)
    }

    /// Computes a layer below [`Self::layers`]: `[n, d]` → `[n, d]` in the type of its input, see [`Decoder::hidden_from`].
    #[must_use]
    pub fn layer(&self, index: usize, x_nd: Tensor<2>) -> Tensor<2> {
        let attend = &mut Documents(self.documents);
        let dtype = self.model.dtype();
        self.model.layers[index].forward(index, x_nd, dtype, &self.rotary, attend)
    }

    /// Computes the final norm of the last layer's output: `[n, d]` → `[n, d]`.
    #[must_use]
    pub fn last_norm(&self, x_nd: Tensor<2>) -> Tensor<2> {
        self.model.normed(x_nd)
    }
}
