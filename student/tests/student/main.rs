//! Flows of the crate: gradients against finite differences, splits and PyTorch; resumption.

mod gradients;
mod reference;
mod resume;
mod support;
