//! RMS norm (Zhang and Sennrich 2019).

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};
use potstill_kernels::rms_norm_as;

use super::Shapes;
use crate::parameters::{MapParameters, Role, map_parameter};
use crate::plan::NormPlan;

/// A norm over the columns of a row, or over the columns of each head.
#[derive(Module, Debug)]
pub(crate) struct Norm {
    pub(crate) gain: Param<Tensor<1>>,
    #[module(skip)]
    plan: NormPlan,
}

impl Norm {
    pub(crate) fn unset(width: usize, plan: NormPlan, shapes: &Shapes) -> Self {
        Self {
            gain: shapes.zeros([width]),
            plan,
        }
    }

    /// Computes the norm of each row: `[n, width]` → `[n, width]` in the type of the rows.
    pub(crate) fn forward(&self, x_nd: Tensor<2>) -> Tensor<2> {
        let dtype = x_nd.dtype();
        self.forward_as(x_nd, dtype)
    }

    /// Computes the norm of each row: `[n, width]` → `[n, width]` in the type `dtype`.
    pub(crate) fn forward_as(&self, x_nd: Tensor<2>, dtype: DType) -> Tensor<2> {
        let NormPlan {
            epsilon,
            gain_offset,
        } = self.plan;
        rms_norm_as(x_nd, self.gain.val(), epsilon, gain_offset, dtype)
    }

    /// Computes the norm of each head in each row: `[n, heads · width]` → `[n, heads · width]`.
    pub(crate) fn forward_heads(&self, x_nc: Tensor<2>) -> Tensor<2> {
        let ([n, columns], [width]) = (x_nc.dims(), self.gain.val().dims());
        let heads = x_nc.reshape([n * (columns / width), width]);
        self.forward(heads).reshape([n, columns])
    }

    pub(crate) fn map_parameters(self, name: &str, mapper: &mut impl MapParameters) -> Self {
        Self {
            gain: map_parameter(mapper, format!("{name}.weight"), Role::Norm, self.gain),
            plan: self.plan,
        }
    }
}
