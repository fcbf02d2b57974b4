//! The state that an optimizer keeps for one parameter, and the parameter's update.

use std::collections::BTreeMap;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_kernels::{AdamStep, ByteMoment, adamw, adamw_8bit, adamw_master};
use potstill_model::{Parameter, ParameterName, Role, StoredValues};

use super::muon::muon;
use super::{MASTER, UpdateSettings, is_narrow, widened};
use crate::optimizer_settings::{MomentType, OptimizerKind};

/// Parameters of fewer numbers keep f32 moments where moments have 8 bits.
pub(crate) const FEW_NUMBERS: usize = 4096;
/// Names of the floating-point tensors of a state: AdamW's moments, the scales of those in 8 bits, Muon's momentum, and the
/// mean of the weights.
const FLOATS: [&str; 6] = ["m", "v", "m_scales", "v_scales", "momentum", EMA];
/// Name of the mean of the weights, the part of a tensor's name before the parameter's.
pub(crate) const EMA: &str = "ema";
/// Names of the tensors of 8-bit codes.
const CODES: [&str; 2] = ["m_codes", "v_codes"];

/// The state of one parameter.
#[derive(Debug, Clone, Default)]
pub(super) struct ParameterState {
    /// The parameter in f32, if the model has it in another type.
    pub(super) master: Option<Parameter>,
    /// Tensors by the names in [`FLOATS`].
    floats: BTreeMap<&'static str, Parameter>,
    /// Tensors by the names in [`CODES`].
    codes: BTreeMap<&'static str, Tensor<1, Int>>,
}

/// The rule by which a parameter is updated.
enum Rule {
    /// By AdamW with moments of this type.
    AdamW(DType),
    /// By AdamW with moments in 8 bits.
    AdamW8Bit,
    /// By Muon.
    Muon,
}

impl Rule {
    fn new<const D: usize>(
        parameter: &ParameterName,
        wide: &Tensor<D>,
        settings: &UpdateSettings,
    ) -> Self {
        let dtype = wide.dtype();
        let is_matrix = parameter.role == Role::Projection && D >= 2;
        if settings.kind == OptimizerKind::Muon && is_matrix {
            return Self::Muon;
        }
        match settings.moments {
            _ if dtype != DType::F32 => Self::AdamW(dtype),
            MomentType::F32 => Self::AdamW(DType::F32),
            MomentType::Bf16 => Self::AdamW(DType::BF16),
            MomentType::Int8 if wide.shape().num_elements() < FEW_NUMBERS => {
                Self::AdamW(DType::F32)
            }
            MomentType::Int8 => Self::AdamW8Bit,
        }
    }
}

impl ParameterState {
    /// Returns the parameter after one step.
    pub(super) fn update<const D: usize>(
        &mut self,
        parameter: &ParameterName,
        tensor: Tensor<D>,
        gradient: Tensor<D>,
        step: &AdamStep,
        settings: &UpdateSettings,
    ) -> Tensor<D> {
        let gradient = widened(gradient);
        let rule = Rule::new(parameter, &gradient, settings);
        let dtype = tensor.dtype();
        if settings.ema.is_some() && !self.floats.contains_key(EMA) {
            let start = self.value().unwrap_or_else(|| widened(tensor.clone()));
            self.put(EMA, start);
        }
        if !is_narrow(&tensor) {
            self.master = None;
            let tensor = self.advance(tensor, gradient, step, &rule);
            self.average(&tensor, settings);
            return tensor;
        }
        let master = self.master.take().and_then(Parameter::tensor);
        let master = master.unwrap_or_else(|| widened(tensor.clone()));
        let (tensor, master) = match rule {
            Rule::AdamW(moments) => {
                let moments = self.take_moments(&gradient, moments);
                let (tensor, master, moments) =
                    adamw_master(tensor, master, gradient, moments, step);
                self.put_moments(moments);
                (tensor, master)
            }
            Rule::AdamW8Bit | Rule::Muon => {
                drop(tensor);
                let master = self.advance(master, gradient, step, &rule);
                (master.clone().cast(dtype), master)
            }
        };
        self.average(&master, settings);
        self.master = Some(Parameter::new(master));
        tensor
    }

    /// Returns the master.
    fn value<const D: usize>(&self) -> Option<Tensor<D>> {
        self.master.clone().and_then(Parameter::tensor)
    }

    /// Moves the mean of the weights towards the new value.
    fn average<const D: usize>(&mut self, value: &Tensor<D>, settings: &UpdateSettings) {
        if let Some((decay, mean)) = settings.ema.zip(self.take::<D>(EMA)) {
            self.put(EMA, mean * decay + value.clone() * (1.0 - decay));
        }
    }

    /// Returns the mean of the weights, if there is one.
    pub(super) fn mean(&self) -> Option<Parameter> {
        self.floats.get(EMA).cloned()
    }

    /// Returns a parameter in f32 or f64 after one step.
    fn advance<const D: usize>(
        &mut self,
        tensor: Tensor<D>,
        gradient: Tensor<D>,
        step: &AdamStep,
        rule: &Rule,
    ) -> Tensor<D> {
        match rule {
            Rule::AdamW(moments) => {
                let moments = self.take_moments(&gradient, *moments);
                let (tensor, moments) = adamw(tensor, gradient, moments, step);
                self.put_moments(moments);
                tensor
            }
            Rule::Muon => {
                let momentum = self.take("momentum");
                let (tensor, momentum) = muon(tensor, gradient, momentum, step);
                self.put("momentum", momentum);
                tensor
            }
            Rule::AdamW8Bit => {
                let moments = [
                    ("m_codes", "m_scales", true),
                    ("v_codes", "v_scales", false),
                ];
                let taken = moments.map(|(codes, scales, signed)| {
                    let stored = self.codes.remove(codes).zip(self.take(scales));
                    match stored {
                        Some((codes_n, scales_b)) => ByteMoment { codes_n, scales_b },
                        None => ByteMoment::zeros(
                            tensor.shape().num_elements(),
                            signed,
                            &tensor.device(),
                        ),
                    }
                });
                let (tensor, new) = adamw_8bit(tensor, gradient, taken, step);
                for ((codes, scales, _), moment) in moments.into_iter().zip(new) {
                    self.codes.insert(codes, moment.codes_n);
                    self.put(scales, moment.scales_b);
                }
                tensor
            }
        }
    }

    /// Takes m and v; zeros of type `dtype` before the first step.
    fn take_moments<const D: usize>(
        &mut self,
        gradient: &Tensor<D>,
        dtype: DType,
    ) -> [Tensor<D>; 2] {
        ["m", "v"].map(|name| {
            let zeros = || Tensor::zeros(gradient.shape(), (&gradient.device(), dtype));
            self.take(name).unwrap_or_else(zeros)
        })
    }

    fn put_moments<const D: usize>(&mut self, [m, v]: [Tensor<D>; 2]) {
        self.put("m", m);
        self.put("v", v);
    }

    fn take<const D: usize>(&mut self, name: &str) -> Option<Tensor<D>> {
        self.floats.remove(name).and_then(Parameter::tensor)
    }

    fn put<const D: usize>(&mut self, name: &'static str, tensor: Tensor<D>) {
        self.floats.insert(name, Parameter::new(tensor));
    }

    /// Returns all tensors but the master, with names like `m.model.norm.weight`.
    pub(super) fn tensors(&self, parameter: &str) -> impl Iterator<Item = (String, StoredValues)> {
        let floats = self.floats.iter();
        let floats = floats.map(|(name, float)| (*name, StoredValues::Float(float.clone())));
        let codes = self.codes.iter();
        let codes = codes.map(|(name, codes)| (*name, StoredValues::Codes(codes.clone())));
        let all = floats.chain(codes);
        all.map(move |(name, values)| (format!("{name}.{parameter}"), values))
    }

    /// Restores a tensor by the part of its name before the parameter's.
    pub(super) fn restore(
        &mut self,
        name: &str,
        data: TensorData,
        device: &Device,
    ) -> Result<(), String> {
        let known = |names: &[&'static str]| names.iter().copied().find(|known| *known == name);
        let options = (device, data.dtype());
        let parameter = |data: TensorData| match data.shape().len() {
            1 => Ok(Parameter::Vector(Tensor::from_data(data, options))),
            2 => Ok(Parameter::Matrix(Tensor::from_data(data, options))),
            3 => Ok(Parameter::Stack(Tensor::from_data(data, options))),
            rank => Err(format!("{name} has {rank} dimensions")),
        };
        if let Some(name) = known(&CODES) {
            self.codes.insert(name, Tensor::from_data(data, options));
        } else if let Some(name) = known(&FLOATS) {
            self.floats.insert(name, parameter(data)?);
        } else if name == MASTER {
            self.master = Some(parameter(data)?);
        } else {
            return Err("it is no tensor of an optimizer".to_owned());
        }
        Ok(())
    }
}
