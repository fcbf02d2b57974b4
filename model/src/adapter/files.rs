//! Adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::{DType, Device, Tensor};

use super::{AdapterLayers, AdapterPlan, can_have_adapter, config, new_adapter};
use crate::checkpoint::write_weights;
use crate::files::write_json;
use crate::layers::{AdapterScale, Linear, MapLayers};
use crate::named_parameters::named_parameters;
use crate::parameters::{MapParameters, ParameterName, Role};
use crate::safetensors_files::SafetensorsFiles;
use crate::tensor_files::{StoredTensor, StoredValues};
use crate::weights::Weights;
use crate::{Decoder, Error};

/// The settings of an adapter in PEFT's layout.
pub const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";
/// The matrices of an adapter in PEFT's layout.
pub const ADAPTER_WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// PEFT's prefix of the names of a model's modules.
const PREFIX: &str = "base_model.model.";

/// Saves the adapters of `model` to `dir` as PEFT does, in the type that they have. The folder is created if it is absent.
/// `base` is the name or the folder of the model without adapters, and `revision` its commit, if it has one.
///
/// # Errors
/// Returns an error for a model without adapters, and for a failure of the file system.
pub fn save_adapter(
    model: &Decoder,
    dir: &Path,
    base: &str,
    revision: Option<&str>,
) -> Result<(), Error> {
    let mut scales = AdapterScales::default();
    let _unchanged = model.clone().map_layers(&mut scales);
    let Some(plan) = scales.plan() else {
        return Err(Error::Adapter {
            what: "the model has no adapter to save".to_owned(),
            hint: "save the whole model".to_owned(),
        });
    };
    std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let parameters = named_parameters(model).into_iter();
    let parameters = parameters.filter(|(parameter, _)| parameter.role == Role::Adapter);
    let tensors = parameters.map(|(parameter, tensor)| {
        let name = format!("{PREFIX}{}", parameter.name);
        StoredTensor::new(name, StoredValues::Float(tensor))
    });
    let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
    write_weights(&dir.join(ADAPTER_WEIGHTS_FILE), &tensors)?;
    let layers: Vec<String> = scales.layers.into_iter().map(|(name, ..)| name).collect();
    let config = config::write(&plan, &layers, base, revision);
    write_json(&dir.join(ADAPTER_CONFIG_FILE), &config)
}

/// The adapters of a model: name of the layer, rank, and scale.
#[derive(Default)]
struct AdapterScales {
    layers: Vec<(String, usize, AdapterScale)>,
}

impl AdapterScales {
    /// Makes the plan with which PEFT gives the layers their ranks and scales; `None` if there are no adapters. The rank
    /// and the α of most layers are the plan's, and the others are named.
    fn plan(&self) -> Option<AdapterPlan> {
        let (_, _, first) = self.layers.first()?;
        let rank = most_common(self.layers.iter().map(|(_, rank, _)| *rank))?;
        let alphas = self.layers.iter().map(|(.., scale)| scale.alpha.to_bits());
        let alpha = f64::from_bits(most_common(alphas)?);
        let layers = self.layers.iter();
        let ranks = layers.clone().filter(|(_, other, _)| *other != rank);
        let alphas = layers.filter(|(.., scale)| scale.alpha != alpha);
        Some(AdapterPlan {
            rank,
            alpha,
            rslora: first.rslora,
            targets: AdapterLayers::AllLinear,
            rank_pattern: ranks.map(|(name, rank, _)| (name.clone(), *rank)).collect(),
            alpha_pattern: alphas
                .map(|(name, _, scale)| (name.clone(), scale.alpha))
                .collect(),
        })
    }
}

fn most_common<T: Ord + Copy>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts = BTreeMap::new();
    for value in values {
        *counts.entry(value).or_insert(0usize) += 1;
    }
    let most = counts.into_iter().max_by_key(|(_, count)| *count);
    most.map(|(value, _)| value)
}

impl MapParameters for AdapterScales {
    fn map<const D: usize>(&mut self, _: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        tensor
    }
}

impl MapLayers for AdapterScales {
    fn map_linear(&mut self, name: &str, _: Role, linear: Linear) -> Linear {
        if let Some(adapter) = &linear.adapter {
            self.layers
                .push((name.to_owned(), adapter.rank(), adapter.scale));
        }
        linear
    }
}

/// Gives the layers of `model` the adapters in `dir`, which is in PEFT's layout, in the type of the model. An adapter that
/// a layer has already is replaced.
///
/// # Errors
/// Returns an error for a configuration that is not supported (`use_dora`, `bias`, `fan_in_fan_out`, `modules_to_save`,
/// `target_parameters`, another `peft_type` and others, by name), for a truncated file, for tensors that fit no layer of the
/// model, and for a layer of which one of the two matrices is absent or has another shape than the configuration says.
pub fn load_adapter(model: Decoder, dir: &Path) -> Result<Decoder, Error> {
    let plan = config::read(&dir.join(ADAPTER_CONFIG_FILE))?;
    let path = dir.join(ADAPTER_WEIGHTS_FILE);
    let stored = SafetensorsFiles::open(path.clone(), vec![path], [1, 1])?;
    let (dtype, device) = (model.dtype(), model.device());
    let mut reader = AdapterReader {
        plan: &plan,
        dtype,
        device: &device,
        unread: stored.names().into_iter().collect(),
        stored: &stored,
        error: None,
    };
    let model = model.map_layers(&mut reader);
    match (reader.error, reader.unread.first()) {
        (Some(error), _) => Err(error),
        (None, Some(name)) => Err(Error::Adapter {
            what: format!(
                "`{}` holds the tensor `{name}`, and the model has no layer for it that can have an adapter",
                stored.file(name).display()
            ),
            hint: "use the adapter with the model that it was trained on".to_owned(),
        }),
        (None, None) => Ok(model),
    }
}

/// Gives layers the adapters that are stored. It stops reading at the first error and keeps the error.
struct AdapterReader<'a> {
    plan: &'a AdapterPlan,
    stored: &'a SafetensorsFiles,
    dtype: DType,
    device: &'a Device,
    /// Names of the tensors that no layer has taken yet.
    unread: BTreeSet<String>,
    error: Option<Error>,
}

impl AdapterReader<'_> {
    fn matrix(&mut self, name: &str, expected: [usize; 2]) -> Result<Tensor<2>, Error> {
        let path = self.stored.file(name);
        let found = self
            .stored
            .shape(name)
            .ok_or_else(|| Error::MissingTensor {
                path: path.clone(),
                tensor: name.to_owned(),
            })?;
        if found != expected {
            return Err(Error::Adapter {
                what: format!(
                    "`{}`: tensor `{name}` has the shape {found:?}, but the model and the rank in {ADAPTER_CONFIG_FILE} require {expected:?}",
                    path.display()
                ),
                hint: "use the adapter with the model that it was trained on".to_owned(),
            });
        }
        let data = self.stored.read(name, self.dtype)?;
        self.unread.remove(name);
        Ok(Tensor::from_data(data, (self.device, self.dtype)))
    }

    fn adapted(&mut self, name: &str, linear: Linear) -> Result<Linear, Error> {
        let [down, up] = ["A", "B"].map(|part| format!("{PREFIX}{name}.lora_{part}.weight"));
        if !self.unread.contains(&down) && !self.unread.contains(&up) {
            return Ok(linear);
        }
        let [outputs, inputs] = linear.weight.dims();
        let rank = self.plan.rank_of(name);
        let down_ri = self.matrix(&down, [rank, inputs])?;
        let up_or = self.matrix(&up, [outputs, rank])?;
        Ok(Linear {
            adapter: Some(new_adapter(down_ri, up_or, self.plan.scale_of(name))),
            ..linear
        })
    }
}

impl MapParameters for AdapterReader<'_> {
    fn map<const D: usize>(&mut self, _: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        tensor
    }
}

impl MapLayers for AdapterReader<'_> {
    fn map_linear(&mut self, name: &str, role: Role, linear: Linear) -> Linear {
        if self.error.is_some() || !can_have_adapter(name, role) {
            return linear;
        }
        match self.adapted(name, linear.clone()) {
            Ok(adapted) => adapted,
            Err(error) => {
                self.error = Some(error);
                linear
            }
        }
    }
}
