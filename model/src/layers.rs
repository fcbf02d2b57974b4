//! The layers of a decoder. Each is made from its part of the plan, and knows its parameters by name.

// A layer exists a few dozen times, so a difference in size between variants costs nothing.
#![allow(clippy::large_enum_variant)]

mod attention;
mod experts;
mod feed_forward;
mod gated;
mod latent;
mod linear;
mod norm;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor};

use crate::attend::Attend;
use crate::parameters::{MapParameters, ParameterName, Role};
use crate::plan::{AttentionPlan, DecoderPlan, LayerPlan};
use crate::rotary::RotaryAngles;

pub(crate) use attention::GroupedAttention;
pub(crate) use experts::Experts;
pub(crate) use feed_forward::FeedForward;
pub(crate) use gated::GatedFeedForward;
pub(crate) use latent::LatentAttention;
pub(crate) use linear::{Adapter, AdapterScale, FrozenBlocks, Linear, Weight};
pub(crate) use norm::Norm;

/// Makes parameters that have a shape but no values yet; see [`Shapes::zeros`].
#[derive(Debug, Clone)]
pub(crate) struct Shapes {
    pub(crate) dtype: DType,
    pub(crate) device: Device,
}

impl Shapes {
    /// Makes a parameter that is filled with zeros on first use.
    pub(crate) fn zeros<const D: usize>(&self, shape: [usize; D]) -> Param<Tensor<D>> {
        self.zeros_of(shape, self.dtype)
    }

    /// Makes a parameter that keeps f32 in models of half precision.
    pub(crate) fn zeros_f32<const D: usize>(&self, shape: [usize; D]) -> Param<Tensor<D>> {
        let dtype = match self.dtype {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        self.zeros_of(shape, dtype)
    }

    fn zeros_of<const D: usize>(&self, shape: [usize; D], dtype: DType) -> Param<Tensor<D>> {
        Param::uninitialized(
            burn::module::ParamId::new(),
            move |device, require_grad| {
                Tensor::zeros(shape, (device, dtype)).set_require_grad(require_grad)
            },
            self.device.clone(),
            true,
            shape.into(),
        )
    }
}

/// A function that replaces linear layers, and the parameters outside of them.
pub(crate) trait MapLayers: MapParameters {
    /// Returns the new layer. `name` is the name of its weight without `.weight`.
    fn map_linear(&mut self, name: &str, role: Role, linear: Linear) -> Linear;
}

/// Replaces every parameter, also those of linear layers.
pub(crate) struct EachParameter<'a, M>(pub(crate) &'a mut M);

impl<M: MapParameters> MapParameters for EachParameter<'_, M> {
    fn map<const D: usize>(&mut self, parameter: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        self.0.map(parameter, tensor)
    }

    fn accepts(&mut self, parameter: &ParameterName, shape: &[usize]) -> bool {
        self.0.accepts(parameter, shape)
    }
}

impl<M: MapParameters> MapLayers for EachParameter<'_, M> {
    fn map_linear(&mut self, name: &str, role: Role, linear: Linear) -> Linear {
        linear.map_own_parameters(name, role, self)
    }
}

/// One decoder layer.
#[derive(Module, Debug)]
pub(crate) struct DecoderLayer {
    pub(crate) input_norm: Option<Norm>,
    pub(crate) attention: Attention,
    pub(crate) attention_output_norm: Option<Norm>,
    pub(crate) feed_norm: Option<Norm>,
    pub(crate) feed_forward: FeedForward,
    pub(crate) feed_output_norm: Option<Norm>,
    #[module(skip)]
    plan: LayerPlan,
}

/// The attention of a layer.
#[derive(Module, Debug)]
pub(crate) enum Attention {
    Grouped(GroupedAttention),
    Latent(LatentAttention),
}

impl DecoderLayer {
    /// Returns the layer with the `width` neurons of its gated feed-forward block that have the largest weights. `plan` is
    /// the plan of the narrower layer.
    pub(crate) fn narrowed(self, plan: &LayerPlan, width: usize) -> Self {
        Self {
            feed_forward: match self.feed_forward {
                FeedForward::Gated(block) => FeedForward::Gated(block.narrowed(width)),
                experts => experts,
            },
            plan: plan.clone(),
            ..self
        }
    }

    pub(crate) fn unset(
        decoder: &DecoderPlan,
        plan: &LayerPlan,
        d: usize,
        shapes: &Shapes,
    ) -> Self {
        let norm = |name: Option<&str>| name.map(|_| Norm::unset(d, decoder.norm, shapes));
        Self {
            input_norm: norm(plan.norms.input),
            attention: match &plan.attention {
                AttentionPlan::Grouped(plan) => {
                    Attention::Grouped(GroupedAttention::unset(plan, d, decoder.norm, shapes))
                }
                AttentionPlan::Latent(plan) => {
                    Attention::Latent(LatentAttention::unset(plan, d, shapes))
                }
            },
            attention_output_norm: norm(plan.norms.attention_output),
            feed_norm: norm(plan.norms.feed_forward),
            feed_forward: FeedForward::unset(&plan.feed_forward, d, shapes),
            feed_output_norm: norm(plan.norms.feed_forward_output),
            plan: plan.clone(),
        }
    }

    /// Computes the layer on rows of the residual stream: `[n, d]` → `[n, d]` in the type of the stream. The products
    /// between are in `dtype`, the type of the weights. `rotary` has the angles of each table.
    pub(crate) fn forward(
        &self,
        index: usize,
        x_nd: Tensor<2>,
        dtype: DType,
        rotary: &[RotaryAngles],
        attend: &mut impl Attend,
    ) -> Tensor<2> {
        let stream = x_nd.dtype();
        let y_nd = apply(self.input_norm.as_ref(), x_nd.clone(), dtype);
        let y_nd = match &self.attention {
            Attention::Grouped(attention) => attention.forward(index, y_nd, rotary, attend),
            Attention::Latent(attention) => attention.forward(index, y_nd, rotary, attend),
        };
        let x_nd = x_nd + apply(self.attention_output_norm.as_ref(), y_nd, stream);
        let y_nd = apply(self.feed_norm.as_ref(), x_nd.clone(), dtype);
        let y_nd = self.feed_forward.forward(y_nd);
        x_nd + apply(self.feed_output_norm.as_ref(), y_nd, stream)
    }

    pub(crate) fn map_parameters(self, prefix: &str, mapper: &mut impl MapLayers) -> Self {
        let names = self.plan.norms;
        let norm = |norm: Option<Norm>, name: Option<&str>, mapper: &mut _| {
            let name = format!("{prefix}.{}", name.unwrap_or_default());
            norm.map(|norm| norm.map_parameters(&name, mapper))
        };
        // Rust evaluates the fields in the order written here, which is the order of the parameters in a file.
        Self {
            input_norm: norm(self.input_norm, names.input, mapper),
            attention: match self.attention {
                Attention::Grouped(attention) => {
                    Attention::Grouped(attention.map_parameters(prefix, mapper))
                }
                Attention::Latent(attention) => {
                    Attention::Latent(attention.map_parameters(prefix, mapper))
                }
            },
            attention_output_norm: norm(self.attention_output_norm, names.attention_output, mapper),
            feed_norm: norm(self.feed_norm, names.feed_forward, mapper),
            feed_forward: self.feed_forward.map_parameters(prefix, mapper),
            feed_output_norm: norm(self.feed_output_norm, names.feed_forward_output, mapper),
            plan: self.plan,
        }
    }
}

/// Computes the norm of each row, or the rows themselves without a norm, in the type `dtype`.
fn apply(norm: Option<&Norm>, x_nd: Tensor<2>, dtype: DType) -> Tensor<2> {
    match norm {
        Some(norm) => norm.forward_as(x_nd, dtype),
        None => x_nd.cast(dtype),
    }
}
